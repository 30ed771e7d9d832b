"""What all commands share: output to a terminal of any encoding, and checks of flag values."""

import argparse
import os
import re
import sys
from collections.abc import Sequence

import jax

from opsd_jax.inputs import checks


def start() -> None:
    """Prints characters that the terminal's encoding lacks as escapes such as \\u2013.

    To be called first in every command. Otherwise a finished evaluation could end with a
    UnicodeEncodeError while it prints its table.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------------------- types of flags


def names(text: str) -> tuple[str, ...]:
    """The names in "a,b"."""
    return tuple(text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """The numbers in "0,1"."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number nor a list of them such as 0,1,2"
        ) from None


def text(flag: str, value: str) -> str:
    """The value of a flag as it was typed, also if Python read it without UTF-8."""
    try:
        return os.fsencode(value).decode() if re.search("[\ud800-\udfff]", value) else value
    except UnicodeError as error:
        raise ValueError(
            f"--{flag}={value}: the text is not UTF-8 ({error}): set a UTF-8 locale, such as "
            "LC_ALL=C.UTF-8"
        ) from error


# ---------------------------------------------------------------------------- checks of flags


def check_number(flag: str, value: int | None, least: int) -> None:
    """Raises ValueError for a whole number below `least`. None: the flag was not given."""
    if value is not None:
        checks.number(f"--{flag}", value, int, f"[{least}, inf)")


def check_temperature(value: float | None) -> None:
    """Raises ValueError for a temperature that sampling cannot use. None: not given."""
    if value is not None:
        allowed = f"{checks.TEMPERATURE}, or 0; 0 takes the most probable token"
        checks.number("--temperature", value, float, allowed)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed of more than 32 bits."""
    checks.number("--seed", seed, int, f"{checks.SEED}; others would repeat one of these")


def check_name(name: str) -> None:
    """Raises ValueError unless a name of results is the name of one folder.

    Then nothing is written elsewhere, and every summary is found.
    """
    checks.folder_name(f"--name={name}", name)
    if name == "summary.md":
        raise ValueError(
            "--name=summary.md: the table of all results has that name: give one folder name of "
            "your own"
        )


def check_once(flag: str, values: Sequence) -> None:
    """Raises ValueError for a value that is given twice."""
    checks.once(f"--{flag}={','.join(map(str, values))}", values)


def check_precision() -> None:
    """Raises ValueError if JAX would compute in 64 bits. Commands that compute call this first."""
    if jax.config.jax_enable_x64:
        raise ValueError(
            "JAX_ENABLE_X64 is set, but the programs of opsd_jax compute in 32 bits and less and "
            "do not compile with 64: unset JAX_ENABLE_X64, or set it to 0"
        )
