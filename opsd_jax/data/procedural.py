"""Procedural data of a run: made once, finished if a command was stopped."""

import json
import os
import pathlib

from opsd_jax import (
    tasks,
)
from opsd_jax import (
    tokenizer as tokenizer_lib,
)
from opsd_jax.data import prepare, schema
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files, locks
from opsd_jax.tasks import parquet


def make_if_absent(config, workdir: str) -> None:
    """Makes the procedural data of `config.data.make` in <workdir>/data, or finishes what was begun in the data folder.
    Where another command is doing that, waits until it is done.

    In a folder that `config.data.dir` names nothing is begun, because a mistyped name would be a new folder. What
    make-mini began there is finished; it may hold more families than `config.data.make` asks for.

    Raises FileNotFoundError if there are no data and none to make; ValueError if those that are there were made with
    other settings.
    """
    target = workdir_lib.folder(config, workdir)
    make = _to_make(config, target)
    if make:
        with locks.only_writer(target, wait=True):
            make_procedural(target, make)


def check_there(config, workdir: str) -> None:
    """FileNotFoundError where `make_if_absent` finds no data and has none to make, or there is no tokenizer and none comes
    with the data; ValueError where they lack a task of config.data.tasks; makes nothing."""
    target = workdir_lib.folder(config, workdir)
    make, prepared = _to_make(config, target), pathlib.Path(target, schema.NAME)
    families = {family: module.TASK for family, module in tasks.FAMILIES.items()}
    made = [families[family] for family in (make["families"] if make else ()) if family in families]
    there = {
        path.name: path.name
        for path in (prepared.iterdir() if prepared.is_dir() else ())
        if path.is_dir()
    }
    there |= {task.lower(): task for task in made}
    for task in config.data.tasks:
        if task.lower() not in there:
            more = (
                f"choose from {', '.join(sorted(there.values())) or 'none'}, or make another: config.data.make.families is "
                f"{tuple(make['families'])}, of {families}"
                if make
                else f"it holds {', '.join(sorted(there.values())) or 'none'}: choose from these, or prepare that one there"
            )
            raise ValueError(
                f"config.data.tasks names {task!r}, which the data in {target} lack: {more}"
            )
    if config.tokenizer or make is None:
        tokenizer_lib.check_there(workdir_lib.tokenizer_folder(config, workdir))


def _to_make(config, target) -> dict | None:
    """With which settings procedural data are made or finished in the data folder; None: all is there, prepared from
    elsewhere. FileNotFoundError as `make_if_absent`."""
    was, make = (
        made_with(target),
        json.loads(config.data.make.to_json()),
    )  # as it comes back from the record
    if was is None:
        if os.path.isdir(os.path.join(target, schema.NAME)):
            return None
        if config.data.dir or not make["families"]:
            if os.path.basename(os.path.abspath(target)) == schema.NAME:
                raise FileNotFoundError(
                    f"{target} holds no data itself: give the folder that it is in, "
                    f"--config.data.dir={os.path.dirname(os.path.abspath(target))}"
                )
            raise FileNotFoundError(
                f"{target} holds no data: make them with `python -m opsd_jax.data prepare --source=PARQUET_DIR "
                f"--target={target}` or `python -m opsd_jax.data make-mini --target={target}`, or give "
                f"--config.data.dir=FOLDER that holds {schema.NAME}/. Procedural data (config.data.make.families) "
                "are made by the run itself only where config.data.dir is empty"
            )
    elif not make["families"]:  # as they are
        make = was
    elif config.data.dir and {*make["families"]} <= {*was["families"]}:
        make["families"] = was["families"]
    if was is not None:
        _check_same(target, was, make)
    return make


def _check_same(target: str, was: dict, make: dict) -> None:
    """ValueError, with what differs, where a folder holds procedural data of other settings than `make`."""
    if differs := [key for key in {**was, **make} if was.get(key) != make.get(key)]:
        there, now = ({key: of.get(key, "absent") for key in differs} for of in (was, make))
        raise ValueError(
            f"{target} was made with other settings: config.data.make was {there} and is now {now}. Give those of "
            "the folder, use its data as they are (--config.data.make.families='()' of a run), choose another "
            f"folder, or delete {target} to make the data again"
        )


def make_procedural(target: str, make: dict) -> None:
    """Makes procedural data in a folder, or finishes what the same settings began there. make: as `config.data.make`.

    Raises ValueError if others were begun there; locks.FolderInUseError.
    """
    with locks.only_writer(target):
        _make(target, json.loads(json.dumps(make)))  # lists for tuples, as in the record


def _make(target: str, make: dict) -> None:
    was, made = made_with(target), os.path.join(target, "made")
    if was is None:
        files.write_json(os.path.join(target, _RECORD), make)
    _check_same(target, was or make, make)
    if not os.path.isdir(made):
        counts = {split: make[split] for split in tasks.BUCKETS if make[split]}
        try:
            parquet.make_mini(
                made,
                families=make["families"],
                counts=counts,
                seed=make["seed"],
                difficulty=make["difficulty"],
            )
        except BaseException:  # nothing was begun: the corrected command may have other settings
            os.remove(os.path.join(target, _RECORD))
            raise
    parquet_dir = os.path.join(made, "parquet")
    try:
        prepare.prepare(parquet_dir, target)  # does nothing where all is done
    except FileExistsError as error:
        raise FileExistsError(
            f"{target} was prepared from other files than {parquet_dir} holds now (was one edited?): delete "
            f"{target} and give the same command again, or prepare {parquet_dir} into another folder with "
            "`python -m opsd_jax.data prepare`"
        ) from error


_RECORD = "made.json"  # settings of the procedural data in a folder, written before them


def made_with(target: str) -> dict | None:
    """With which settings procedural data were begun in a folder; None if none were. ValueError where it is damaged."""
    path = os.path.join(target, _RECORD)
    if not os.path.exists(path):
        return None
    fix = f"delete it to use the prepared data as they are, or delete {target} to make them again"
    was = json_files.read(path, fix=fix)
    if not isinstance(was.get("families"), list):
        raise ValueError(f"{path} names no families: {fix}")
    return was
