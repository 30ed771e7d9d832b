"""Checks of what people give: numbers within their ranges, names that may be given once.

A range is written as in mathematics, "[0, 1)" or "(0, inf)", with single values that are also right after a comma,
"[2, inf), or 0", and advice after a semicolon. Fields of dataclasses declare theirs in the annotation, beside the
default: `top_p: Annotated[float, "(0, 1]"] = 1.0`.
"""

import functools
import numbers
import re
import typing

import numpy as np

TEMPERATURE = "[0.001, 1000]"  # beyond it float32 logits overflow, or all tokens are equally likely
SEED = f"[0, {2**32})"  # JAX keeps the low 32 bits of a seed: a larger one would repeat another
_LARGEST = float(np.finfo(np.float32).max)


def number(name: str, value, kind: type, allowed: str) -> None:
    """ValueError, with name, value and range, unless a value is a number of a kind (int or float) in the range."""
    right = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(
        value, bool
    )
    if not right or not holds(allowed, value):
        raise ValueError(
            f"{name} is {value!r}: give a {'whole ' if kind is int else ''}number in {allowed}"
        )


def holds(allowed: str, value) -> bool:
    """Whether a finite number is in a range."""
    text = allowed.partition(";")[0]
    interval, *single = text.split(", or ")
    opening, low, high, closing = re.fullmatch(r"([\[(])(.+), (.+)([\])])", interval).groups()
    above = value >= float(low) if opening == "[" else value > float(low)
    below = value <= float(high) if closing == "]" else value < float(high)
    return (above and below and abs(value) <= _LARGEST) or value in map(float, single)


@functools.cache
def ranges(cls) -> dict[str, tuple[type, str]]:
    """{field: (int or float, range)} of the fields of a dataclass that declare one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: (int if hint.__origin__ is int else float, hint.__metadata__[0])
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Annotated
    }


def fields(instance, group: str) -> None:
    """`number` for each field of a dataclass that declares a range; a message names it as group.field."""
    for name, (kind, allowed) in ranges(type(instance)).items():
        number(f"{group}.{name}", getattr(instance, name), kind, allowed)


def folder_name(shown: str, value: str) -> None:
    """ValueError unless a value is the name of one folder, which is made where it belongs and nowhere else."""
    if not re.fullmatch(r"[\w=,-][\w.=,-]*", value):
        raise ValueError(
            f"{shown}: give one folder name of letters, digits and _ - . = , that does not start with a dot"
        )


def once(name: str, values) -> None:
    """ValueError where one of the values is given twice."""
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise ValueError(f"{name} names {twice[0]} twice: give each once")
