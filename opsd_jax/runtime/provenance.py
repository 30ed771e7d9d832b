"""What made a page: the command, the time, and the versions of the software."""

import datetime
import functools
import pathlib
import subprocess
import sys

import jax

import opsd_jax


def facts(command: str) -> list[tuple[str, str]]:
    """(name, content with `code`) of what makes a page now. command: "" where there was none."""
    shown = [("command", f"`{command}`")] if command else []
    return [*shown, ("made", f"{_now():%Y-%m-%d %H:%M} UTC by {_versions()}")]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _versions() -> str:
    """The software that this process uses."""
    python = ".".join(map(str, sys.version_info[:3]))
    commit = f" (commit {found})" if (found := _commit()) else ""
    return f"opsd_jax {opsd_jax.__version__}{commit}, jax {jax.__version__}, Python {python}"


@functools.cache
def _commit() -> str:
    """The commit of the clone that the package is in, with "-dirty" after it if files differ.

    "" for an installed package, which may lie in somebody else's repository.
    """
    folder = pathlib.Path(opsd_jax.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""
