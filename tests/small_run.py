"""The miniature made smaller still: a run of seconds, in this process or as the command that a user
types.

One dict of changes serves both: `config()` applies it, `command()` writes it as --config.key=value.
Most of the time of such a run is compilation, so programs are compiled without much optimisation
and kept in a folder that all tests of a session and their processes share.
"""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
MINI = ROOT / "configs" / "mini.py"
TASK = "Chart_Refocus"
WARMUP, OPSD = 2, 4  # steps
LAST = WARMUP + OPSD
TEST_ROWS = 20

_STAGE = {
    "batch_size": 8,
    "optim.kind": "adamw",
    "optim.lr": 3e-3,
    "optim.min_lr": 3e-4,
    "optim.warmup_steps": 1,
}
CHANGES = {
    "model.llm.hidden_size": 32,
    "model.llm.num_layers": 2,
    "model.llm.num_heads": 2,
    "model.llm.num_kv_heads": 1,
    "model.llm.intermediate_size": 48,
    "model.vit.hidden_size": 16,
    "model.vit.num_heads": 2,
    "model.vit.intermediate_size": 24,
    "model.unroll": 1,
    "data.make.train": 64,
    "data.make.validation": 16,
    "data.make.test": TEST_ROWS,
    "warmup.steps": WARMUP,
    "opsd.steps": OPSD,
    "sft.steps": WARMUP,  # warm-up and SFT as one program
    **{
        f"{stage}.{key}": value
        for stage in ("warmup", "opsd", "sft")
        for key, value in _STAGE.items()
    },
    "rollout.max_new_tokens": 8,
    "eval.batch_size": 8,
    "eval.final_banned": True,
    "eval.rows": 8,
    "checkpoint.every": 1,
    "checkpoint.keep_latest": 100,
    "log.every": 1,
    "log.samples_every": 2,
}


def config(**changes):
    """The configuration without arms; a key's dots are written as __: config(opsd__steps=8)."""
    spec = importlib.util.spec_from_file_location("mini", MINI)
    mini = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mini)
    c = mini.get_config("smoke")
    c.run_arms = ()
    c.update_from_flattened_dict(
        CHANGES | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return c


def two_tasks(folder, **changes):
    """`config` of charts and mazes, which take different buckets; their data are in `folder`."""
    c = config(
        **dict(
            data__dir=str(folder),
            data__tasks=(TASK, "Spatial_Navigation"),
            data__make__families=("chart", "maze"),
            data__make__train=20,
            data__cache_rows=200,
            images__max_size=40,
            images__min_size=32,
        )
        | changes
    )
    c.data.buckets.update(
        student=((25, 16), (36, 25)),
        teacher=((50, 32), (70, 50)),
        trace=((87, 32, 41), (90, 50, 41)),
    )
    return c


def command(workdir, *arguments) -> list[str]:
    """The training command, with the arm `noise`; `arguments` come last."""
    changes = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    return [
        sys.executable,
        "-m",
        "opsd_jax.train",
        f"--config={MINI}:smoke",
        f"--workdir={workdir}",
        *changes,
        "--config.run_arms=noise",
        *arguments,
    ]


def _jax_settings(tmp_path_factory) -> dict:
    return {
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
    }


@contextlib.contextmanager
def fast_compiles(tmp_path_factory):
    """Settings of JAX for this process, put back at the end."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = _jax_settings(tmp_path_factory)
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def environment(tmp_path_factory) -> dict[str, str]:
    """The same for a process of its own."""
    settings = {name.upper(): str(value) for name, value in _jax_settings(tmp_path_factory).items()}
    return os.environ | settings | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs)


def trained(tmp_path_factory) -> pathlib.Path:
    """A finished run (warm-up, OPSD) that the tests of a session share: copy it to change it."""
    from opsd_jax import train

    workdir = tmp_path_factory.getbasetemp() / "trained"
    finished = workdir.with_suffix(".finished")
    if not finished.exists():  # a run that a test's time limit stopped has most of its files
        train.train(config(), str(workdir))
        finished.touch()
    return workdir


def make_data(config, workdir) -> None:
    """Makes the data of a run, as the run does."""
    from opsd_jax import config as config_lib
    from opsd_jax.data import procedural
    from opsd_jax.data import workdir as workdir_lib

    data_dir = workdir_lib.data_dir(config, str(workdir))
    procedural.make_if_absent(config_lib.data(config), data_dir)


def examples(config, tokenizer, split="train", *, data_dir="", generation=False):
    """Prepared examples of a split, in config.data.dir or another folder."""
    from opsd_jax import config as config_lib
    from opsd_jax.data.examples import Examples, Preprocessor

    preprocess = Preprocessor.from_config(config, tokenizer, generation=generation)
    return Examples.open(
        config_lib.data(config), str(data_dir or config.data.dir), split, preprocess
    )


def abstract_params():
    """Shapes of the model's parameters, what restoring them asks for."""
    import jax

    from opsd_jax import config as config_lib
    from opsd_jax.model import bagel

    return jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config_lib.model(config())))
