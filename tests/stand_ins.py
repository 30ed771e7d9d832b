"""Stand-ins for the commands of clouds and clusters, for the tests of the launch files."""

import os
import pathlib
import stat
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
COMMAND = [
    "python",
    "-m",
    "opsd_jax.train",
    "--config=configs/mini.py",
    "--workdir=runs/a b",
    "--config.run_arms=()",
]


def environment(**changes) -> dict:
    """This process's environment without what would make a run of several processes of it."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OPSD_", "SLURM_", "XLA_FLAGS", "DRY_RUN"))
    }
    return (
        inherited
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        | {k: str(v) for k, v in changes.items()}
    )


def bash(script, *arguments, cwd=ROOT, timeout=120, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", LAUNCH / script, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def stand_in(folder, name: str, body: str) -> str:
    """Puts a command `name` on a PATH, which it returns; its log gets the arguments, a NUL after
    each, and a record separator and NUL at the end. Several may run at once, so in one write: bash
    makes two of a newline.
    """
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!/usr/bin/env bash\nprintf '%s\\0' {name} \"$@\" $'\\x1e' >> {folder}/log\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def calls(folder) -> list[list[str]]:
    log = folder / "log"
    return (
        [line.split("\0")[:-1] for line in log.read_text().split("\x1e\0")[:-1]]
        if log.exists()
        else []
    )


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
