"""Checks of a run before anything is made."""

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.data import procedural
from opsd_jax.inputs import cli, paths
from opsd_jax.release import folders
from opsd_jax.runtime import checkpoint, run_folder


def check(config: ConfigDict, workdir: str, data_workdir: str = "") -> None:
    """Raises what would fail later, in the run or in a control arm that it starts. Nothing is made.

    Args:
      data_workdir: folder of the run whose data and tokenizer are used; "" for workdir.
    Raises:
      ValueError: settings or paths that cannot be used.
      FileNotFoundError: no data, no tokenizer or no weights.
    """
    cli.check_precision()
    paths.check_given("--workdir", workdir, orbax=True)
    config_check.check(config)
    _check_inputs(config, workdir, data_workdir or workdir)
    for name in config.run_arms:
        try:
            arm = config_lib.arm(config, name)
            _check_inputs(arm, run_folder.arm(workdir, name), workdir)
        except (ValueError, OSError) as error:
            raise ValueError(f"config.arms.{name}: {error}") from None


def _check_inputs(config: ConfigDict, workdir: str, data_workdir: str) -> None:
    """Checks that what a run reads is present: data (or how to make them), tokenizer, weights."""
    if config.init_from and not folders.is_released(config.init_from):
        paths.check(
            "config.init_from", config.init_from, orbax=True
        )  # before anything is looked up
    procedural.check_there(config, data_workdir)
    if (
        config.init_from
        and not folders.is_model(config.init_from)
        and not checkpoint.is_begun(workdir)
    ):
        try:
            checkpoint.resolve(config.init_from)
        except checkpoint.CheckpointNotFoundError as error:
            raise checkpoint.CheckpointNotFoundError(
                f"config.init_from={config.init_from!r} is not a model and holds no checkpoint: "
                f"{error}"
            ) from None
