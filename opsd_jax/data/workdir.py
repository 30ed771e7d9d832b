"""The folder of a run: the settings it was started with, and whose data it uses."""

import os

from opsd_jax import (
    config as config_lib,
)
from opsd_jax.data import schema
from opsd_jax.inputs import json_files, paths


def folder(config, workdir: str) -> str:
    """The TFDS data_dir of a run: config.data.dir, else <workdir>/data."""
    paths.check("config.data.dir", config.data.dir)
    return config.data.dir or os.path.join(workdir, "data")


_WRITE_AGAIN = (
    "delete the file and give the run's training command once more, which writes it again (checkpoints hold the "
    "settings, too)"
)


def load_config(workdir: str):
    """The settings of the run in a workdir, as ConfigDict. FileNotFoundError if there is no run; ValueError if its record
    of them cannot be read."""
    record, config = read_record(workdir), config_lib.default()
    try:
        config.update(record)  # JSON's lists become tuples where the default is one
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{workdir}/config.json holds settings of another type ({error}): {_WRITE_AGAIN}"
        ) from error
    return config


def read_record(workdir: str) -> dict:
    """What <workdir>/config.json holds: the settings as JSON; the errors of `load_config`."""
    paths.check_given("--workdir", workdir, orbax=True)
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{workdir} holds no run (no {path}): give the --workdir of a run of "
            "`python -m opsd_jax.train`, or of one of its arms, W/arms/NAME"
        )
    return json_files.read(path, fix=_WRITE_AGAIN)


def workdir_of(config, workdir: str) -> str:
    """The workdir whose data the run in `workdir` used: its own, or for an arm (W/arms/NAME) the run's, W."""
    places = {folder(config, w): w for w in (workdir, os.path.join(workdir, "..", ".."))}
    for place, where in places.items():
        if os.path.isdir(os.path.join(place, schema.NAME)):
            return where
    raise FileNotFoundError(
        f"the data of {workdir} are not there: looked for {schema.NAME}/ in "
        f"{' and '.join(places)}. Put them back, or set data.dir in "
        f"{workdir}/config.json"
    )


def with_tasks(config, chosen):
    """A copy of the settings with some of the tasks, each with its own entry of `data.limits`."""
    config = config.copy_and_resolve_references()
    limits = dict(zip(config.data.tasks, config.data.limits))
    config.data.tasks, config.data.limits = (
        tuple(chosen),
        tuple(limits[task] for task in chosen if limits),
    )
    return config


def tokenizer_folder(config, workdir: str) -> str:
    """config.tokenizer, else the folder that making the procedural data left."""
    return config.tokenizer or os.path.join(folder(config, workdir), "made", "tokenizer")
