"""The folder of a run, as seen by what reads it later: its settings and where its data are."""

import glob
import os
from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.data import schema
from opsd_jax.inputs import json_files, paths
from opsd_jax.runtime import files, run_folder

_WRITE_AGAIN = (
    "delete the file and give the run's training command again, which writes it "
    "(checkpoints hold the settings, too)"
)


def load_config(workdir: str) -> ConfigDict:
    """The settings of the run in a workdir.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its record of the settings is damaged.
    """
    record = read_record(workdir)
    try:
        return config_lib.from_json(record)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        fault = config_check.wrong_value(record) or f"it holds settings of another type ({error})"
        raise ValueError(f"{workdir}/config.json: {fault}. To repair it, {_WRITE_AGAIN}") from error


def read_record(workdir: str) -> dict:
    """The settings in <workdir>/config.json as JSON. Raises the errors of `load_config`."""
    paths.check_given("--workdir", workdir, orbax=True)
    path = run_folder.config(workdir)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{workdir} holds no run (no {path}): give the --workdir of a run of "
            "`python -m opsd_jax.train`, or of one of its arms, W/arms/NAME"
        )
    return json_files.read(path, fix=_WRITE_AGAIN)


def write_record(workdir: str, record: dict) -> None:
    """Writes the settings of a run, as JSON, to <workdir>/config.json.

    A run that logged no step has nothing to protect: its record is replaced.

    Raises ConfigMismatchError if the workdir holds a run with other settings.
    """
    if not check_same_run(workdir, record):
        path = run_folder.config(workdir)
        files.write_json(path, record, primary=jax.process_index() == 0)


def check_same_run(workdir: str, record: dict) -> bool:
    """Whether a workdir holds a run that logged a step; it has these settings then.

    Raises ConfigMismatchError if it has others.
    """
    if not (os.path.exists(run_folder.config(workdir)) and has_logged(workdir)):
        return False
    config_check.check_unchanged(read_record(workdir), record, workdir=workdir)
    return True


def write_places(workdir: str, record: dict) -> None:
    """Writes the places of a continued run's data, tokenizer and initial weights to its record.

    They may be others than before. The content of data and tokenizer has been compared by now.
    """
    if jax.process_index() != 0:
        return
    found = read_record(workdir)
    places = {key: record[key] for key in ("tokenizer", "init_from")}
    places["data"] = found["data"] | {"dir": record["data"]["dir"]}
    if found | places != found:
        files.write_json(run_folder.config(workdir), found | places)


def has_logged(workdir: str) -> bool:
    """Whether the run in a workdir, or one of its control arms, has a line in metrics.jsonl."""
    arms = glob.glob(run_folder.arm(glob.escape(workdir), "*"))
    paths = map(run_folder.metrics, [workdir, *arms])
    return any(os.path.exists(path) and os.path.getsize(path) for path in paths)


def with_tasks(config: ConfigDict, chosen: Iterable[str]) -> ConfigDict:
    """A copy of the settings with some of the tasks, each with its own entries of the limits."""
    config, chosen = config.copy_and_resolve_references(), tuple(chosen)
    for key in ("limits", "trace_limits"):
        limits = dict(zip(config.data.tasks, config.data[key]))
        config.data[key] = tuple(limits[task] for task in chosen if limits)
    config.data.tasks = chosen
    return config


def data_dir(config: ConfigDict, workdir: str) -> str:
    """The TFDS data_dir of a run: config.data.dir, or else <workdir>/data."""
    paths.check("config.data.dir", config.data.dir)
    return config.data.dir or run_folder.data(workdir)


def found_data_dir(config: ConfigDict, workdir: str) -> str:
    """The TFDS data_dir that the run in a workdir used.

    It is the run's own, or for a control arm (W/arms/NAME) that of the run, W. Raises
    FileNotFoundError if there are no data.
    """
    owners = (workdir, os.path.join(workdir, "..", ".."))
    places = dict.fromkeys(data_dir(config, owner) for owner in owners)
    for place in places:
        if os.path.isdir(os.path.join(place, schema.NAME)):
            return place
    raise FileNotFoundError(
        f"{workdir} has no data: looked for {schema.NAME}/ in {' and '.join(places)}. Restore "
        f"them, or set data.dir in {workdir}/config.json"
    )


def tokenizer_folder(named: str, data_dir: str) -> str:
    """The tokenizer folder of a run: config.tokenizer, `named`, or else the procedural data's."""
    return named or os.path.join(data_dir, "made", "tokenizer")
