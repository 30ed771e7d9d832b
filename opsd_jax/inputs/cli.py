"""What all commands share: a terminal of any encoding, and the values of flags checked with messages that name the flag."""

import argparse
import os
import re
import sys

import jax

from opsd_jax.inputs import checks


def start() -> None:
    """To be called first in every command: what the terminal's encoding lacks is printed as an escape such as \\u2013.

    Otherwise a finished evaluation could end with a UnicodeEncodeError while it prints its table.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def text(flag: str, value: str) -> str:
    """The value of a flag as it was typed, where Python took the terminal for one without UTF-8."""
    try:
        return os.fsencode(value).decode() if re.search("[\ud800-\udfff]", value) else value
    except UnicodeError as error:
        raise ValueError(
            f"--{flag}={value}: the text is no UTF-8 ({error}): set a UTF-8 locale, such as "
            "LC_ALL=C.UTF-8"
        ) from error


def names(text: str) -> tuple[str, ...]:
    """The names in "a,b"."""
    return tuple(text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """The numbers in "0,1"."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number, and no list of them such as 0,1,2"
        ) from None


def check_once(flag: str, values) -> None:
    """Each value is given once."""
    checks.once(f"--{flag}={','.join(map(str, values))}", values)


def check_precision() -> None:
    """JAX computes in 32 bits. What computes calls this first."""
    if jax.config.jax_enable_x64:
        raise ValueError(
            "JAX_ENABLE_X64 is set, but the programs of opsd_jax compute in 32 bits and less and do not compile "
            "with 64: unset JAX_ENABLE_X64, or set it to 0"
        )


def check_seed(seed: int) -> None:
    """Seeds are told apart by 32 bits."""
    if not checks.holds(checks.SEED, seed):
        raise ValueError(
            f"--seed={seed}: give a whole number from 0 to {2**32 - 1}; others would repeat one of these"
        )


def check_name(name: str) -> None:
    """A name of results is one folder: nothing is written elsewhere, and every summary is found."""
    checks.folder_name(f"--name={name}", name)
    if name == "summary.md":
        raise ValueError(
            "--name=summary.md: the table of all results has that name: give one folder name of your own"
        )


def check_number(flag: str, value, least: int) -> None:
    """Whole numbers and the least one that makes sense; None: not given."""
    if value is not None and value < least:
        raise ValueError(f"--{flag}={value}: give a whole number, at least {least}")


def check_temperature(value) -> None:
    """None: not given."""
    if value is not None and not checks.holds(f"{checks.TEMPERATURE}, or 0", value):
        raise ValueError(
            f"--temperature={value:g}: give a number in {checks.TEMPERATURE}, or 0 for the most probable token"
        )
