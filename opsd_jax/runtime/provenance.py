"""What made a page: the command, the time, and the versions of the software."""

import datetime
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
    return f"opsd_jax {opsd_jax.__version__}, jax {jax.__version__}, Python {python}"
