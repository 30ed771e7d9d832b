"""Data of a run that exist, opened for commands that measure them before the run starts."""

import os

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.data import procedural, schema
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.packing import Packer


def open_data(config: ConfigDict, workdir: str = "") -> tuple[str, Packer]:
    """(TFDS data_dir, packer) of the settings of a run.

    Args:
      workdir: folder of the run; needed where config.data.dir is empty.
    Raises:
      ValueError, FileNotFoundError: settings, data or a tokenizer that the run would refuse, too;
        data that the run has not made yet.
    """
    config_check.check(config)
    if not (config.data.dir or workdir):
        raise ValueError(
            "config.data.dir is empty: give --config.data.dir=FOLDER, or --workdir=W of a run that "
            "has its data in W/data"
        )
    data_dir = workdir_lib.data_dir(config, workdir)
    procedural.check_available(config_lib.data(config), data_dir, config.tokenizer)
    if not os.path.isdir(os.path.join(data_dir, schema.NAME)):
        raise FileNotFoundError(
            f"{data_dir} holds no data yet: start the run, which makes them, then ask again"
        )
    folder = workdir_lib.tokenizer_folder(config.tokenizer, data_dir)
    tok = config_lib.load_tokenizer(config, folder)
    return data_dir, Packer.from_config(config, tok)


def runs(config: ConfigDict) -> list[ConfigDict]:
    """The settings of the run and of the arms that it starts."""
    return [config, *(config_lib.arm(config, name) for name in config.run_arms)]
