"""Procedural data of a run: made once, and finished if a command was stopped while making them.

TARGET/made.json                      the settings, written first
TARGET/made/parquet, made/tokenizer   see `tasks.parquet.make_mini`
TARGET/visual_opsd/                   see `prepare`
"""

import dataclasses
import json
import os
from collections.abc import Mapping

from absl import logging

from opsd_jax import config as config_lib
from opsd_jax import tasks
from opsd_jax import tokenizer as tokenizer_lib
from opsd_jax.config import DataConfig, MakeConfig
from opsd_jax.data import prepare, schema, shards, source_files
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.inputs import checks, json_files
from opsd_jax.runtime import files, locks
from opsd_jax.tasks import parquet

_RECORD = "made.json"


# --- for a run -----------------------------------------------------------------------------------


def make_if_absent(data: DataConfig, target: str) -> None:
    """Makes the procedural data of a run in its data folder, or finishes what was begun.

    If another command is making them, waits until it is done.

    In a folder that `config.data.dir` names nothing is begun, because a mistyped name would become
    a new folder. What make-mini began there is finished; it may have more families than
    `config.data.make` asks for.

    Args:
      target: the run's data folder, see `workdir.data_dir`.
    Raises:
      FileNotFoundError: there are no data and none to make.
      ValueError: data were made there with other settings.
    """
    make = _to_make(data, target)
    if make:
        with locks.only_writer(target, wait=True):
            make_procedural(target, make)


def check_available(data: DataConfig, target: str, tokenizer: str) -> None:
    """Checks that `make_if_absent` will succeed and that there is a tokenizer; makes nothing.

    Args:
      target: the run's data folder.
      tokenizer: config.tokenizer; "" for the tokenizer that is made with the data.
    Raises:
      FileNotFoundError: there are no data and none to make, or there is no tokenizer and none comes
        with the data.
      ValueError: the data lack a task of config.data.tasks.
    """
    make = _to_make(data, target)
    families = {family: module.TASK for family, module in tasks.FAMILIES.items()}
    known = {task.lower(): task for task in shards.task_names(target)}
    for family in make["families"] if make else ():
        if family in families:
            known[families[family].lower()] = families[family]
    for task in data.tasks:
        if task.lower() not in known:
            names = ", ".join(sorted(known.values())) or "none"
            more = (
                f"choose from {names}, or make another: config.data.make.families is "
                f"{tuple(make['families'])}, of {families}"
                if make
                else f"it holds {names}: choose from these, or prepare that one there"
            )
            raise ValueError(
                f"config.data.tasks names {task!r}, which the data in {target} lack: {more}"
                f"{checks.did_you_mean(task, known.values())}"
            )
    folder = workdir_lib.tokenizer_folder(tokenizer, target)
    if make is None and not tokenizer and not os.path.isdir(folder):
        raise FileNotFoundError(
            f"config.tokenizer is empty, and the data in {target} come with no tokenizer: give the "
            "folder of the model's, --config.tokenizer=FOLDER"
        )
    if tokenizer or make is None:
        tokenizer_lib.check_there(folder)


def _to_make(data: DataConfig, target: str) -> dict | None:
    """The settings with which procedural data are made or finished in a run's data folder.

    None if the folder holds data that were prepared from elsewhere. Raises the errors of
    `make_if_absent`.
    """
    made = _made_with(target)
    make = config_lib.to_json(dataclasses.asdict(data.make))  # in the form of the record
    if made is None:
        if _holds_data(target):
            return None
        if data.dir or not make["families"]:
            raise FileNotFoundError(_no_data(target))
        return make
    if not make["families"]:
        make = made  # the data are used as they are
    elif data.dir and {*make["families"]} <= {*made["families"]}:
        make["families"] = made["families"]
    _check_same(target, made, make)
    return make


def _holds_data(target: str) -> bool:
    return os.path.isdir(os.path.join(target, schema.NAME))


def _no_data(target: str) -> str:
    """The message for a data folder without data."""
    if os.path.basename(os.path.abspath(target)) == schema.NAME:
        return (
            f"{target} holds no data itself: give the folder that it is in, "
            f"--config.data.dir={os.path.dirname(os.path.abspath(target))}"
        )
    if _is_source(target):
        return (
            f"{target} holds parquet or JSONL files, which are not prepared yet: "
            f"`{schema.prepare_command(source=target)}` with another folder for DIR, then "
            "--config.data.dir=DIR"
        )
    return (
        f"{target} holds no data: make them with `{schema.prepare_command(target=target)}` or "
        f"`python -m opsd_jax.data make-mini --target={target}`, or give "
        f"--config.data.dir=FOLDER that holds {schema.NAME}/. "
        "Procedural data (config.data.make.families) are made by the run itself only where "
        "config.data.dir is empty"
    )


def _is_source(folder: str) -> bool:
    """Whether a folder holds files that `prepare` reads."""
    try:
        return bool(source_files.task_folders(folder))
    except schema.BadSourceError:
        return False


# --- for a command -------------------------------------------------------------------------------


def make_procedural(target: str, make: Mapping) -> None:
    """Makes procedural data in a folder, or finishes what the same settings began there.

    make: the settings, with the keys of `config.MakeConfig`.

    Raises:
      FileExistsError: the folder holds data that were prepared from elsewhere.
      ValueError: other settings began the data there, or a setting is wrong.
      locks.FolderInUseError: another command is writing there.
    """
    with locks.only_writer(target):
        if _holds_data(target) and _made_with(target) is None:
            raise FileExistsError(f"{target} holds prepared data already: choose another --target")
        _make(target, json.loads(json.dumps(dict(make))))  # lists for tuples, as in the record


def _make(target: str, make: dict) -> None:
    made = _made_with(target)
    if made is None:
        files.write_json(os.path.join(target, _RECORD), make)
    _check_same(target, made or make, make)
    folder = os.path.join(target, "made")
    if not os.path.isdir(folder):
        counts = {split: make[split] for split in tasks.SPLITS if make[split]}
        numbers = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        logging.info(
            "making examples (%s) of %s in %s", numbers, ", ".join(make["families"]), target
        )
        try:
            parquet.make_mini(
                folder,
                families=make["families"],
                counts=counts,
                seed=make["seed"],
                difficulty=make["difficulty"],
                wrong=make["wrong_traces"],
            )
        except BaseException:  # nothing was begun: the corrected command may have other settings
            os.remove(os.path.join(target, _RECORD))
            raise
    source = os.path.join(folder, "parquet")
    try:
        prepare.prepare(source, target)  # does nothing if all is done
    except FileExistsError as error:
        raise FileExistsError(
            f"{target} was prepared from other files than {source} holds now (was one edited?): "
            f"delete {target} and give the same command again, or prepare {source} into another "
            "folder with `python -m opsd_jax.data prepare`"
        ) from error


def _made_with(target: str) -> dict | None:
    """The settings with which procedural data were begun in a folder; None if none were.

    Settings that are younger than the folder have their defaults.

    Raises ValueError if the record is damaged.
    """
    path = os.path.join(target, _RECORD)
    if not os.path.exists(path):
        return None
    fix = f"delete it to use the prepared data as they are, or delete {target} to make them again"
    made = json_files.read(path, fix=fix)
    if not isinstance(made.get("families"), list):
        raise ValueError(f"{path} names no families: {fix}")
    return config_lib.to_json(dataclasses.asdict(MakeConfig())) | made


def _check_same(target: str, made: dict, make: dict) -> None:
    """Raises ValueError, with what differs, if a folder's data were made with other settings."""
    if differs := [key for key in {**made, **make} if made.get(key) != make.get(key)]:
        before, now = ({key: of.get(key, "absent") for key in differs} for of in (made, make))
        raise ValueError(
            f"{target} was made with other settings: config.data.make was {before} and is now "
            f"{now}. Give those of the folder (for a run the same --config=FILE:PRESET as before), "
            "or choose another folder (--workdir of a run, --target of make-mini). A run uses the "
            "data as they are with --config.data.make.families='()'"
        )
