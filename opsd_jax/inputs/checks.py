"""Checks of values that users give: numbers in their ranges, names among their choices.

A range is written as in mathematics, "[0, 1)" or "(0, inf)". Single values that are also allowed
follow after a comma, "[2, inf), or 0", and advice follows after a semicolon.

The fields of a dataclass declare what they allow in the annotation, next to the default:

  top_p: Annotated[float, "(0, 1]"] = 1.0                   a range
  kind: Annotated[str, ("jsd", "kl")] = "jsd"               choices
  limits: Annotated[tuple[int, ...], "[0, inf)"] = ()       a range or choices for each element
"""

import dataclasses
import difflib
import functools
import numbers
import os
import re
import typing
from collections.abc import Iterable

import numpy as np

TEMPERATURE = "[0.001, 1000]"  # beyond it float32 logits overflow, or all tokens are equally likely
SEED = f"[0, {2**32})"  # JAX keeps the low 32 bits of a seed: a larger one would repeat another
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the annotation of a field allows.

    kind: int, float or str, the type of the value, or of each element where `many` is set.
    many: whether the value is a tuple of such elements.
    allowed: the range of a number as text, or the tuple of names to choose from.
    """

    kind: type
    many: bool
    allowed: str | tuple[str, ...]

    def check(self, name: str, value) -> None:
        """Raises ValueError, with name, value and what is allowed, for a value against the rule."""
        if self.kind is str and self.many:
            names(name, value, self.allowed)
        elif self.kind is str:
            choice(name, value, self.allowed)
        elif self.many:
            for n, element in enumerate(value):
                number(f"{name}[{n}]", element, self.kind, self.allowed)
        else:
            number(name, value, self.kind, self.allowed)


@functools.cache
def rules(cls: type) -> dict[str, Rule]:
    """{field: rule} of the fields of a dataclass that declare a range or choices."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: _rule(*typing.get_args(hint))
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Annotated
    }


def _rule(hint, allowed) -> Rule:
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    return Rule(kind if kind in (int, str) else float, many, allowed)  # float | None is a float


def fields(instance, group: str) -> None:
    """Checks the fields of a dataclass that declare a rule. Messages name one as group.field."""
    for name, rule in rules(type(instance)).items():
        rule.check(f"{group}.{name}", getattr(instance, name))


def number(name: str, value, kind: type, allowed: str) -> None:
    """Raises ValueError, with name, value and range, unless a value is a number in the range.

    kind: int or float, the type of the number.
    """
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


def choice(name: str, value, choices: tuple[str, ...]) -> None:
    """Raises ValueError, with name, value and choices, unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: {_choose(value, choices)}")


def names(name: str, values, choices: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless values are names, each given once.

    choices: the names that are allowed; () allows any.
    """
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name} is {values!r}: give names, each in quotes")
        if choices and value not in choices:
            raise ValueError(f"{name} names {value!r}: {_choose(value, choices)}")
    once(name, values)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'noise'?" with the most similar choice; "" where none is similar.

    One that differs in upper and lower case alone is the most similar.
    """
    return f"; did you mean {close!r}?" if (close := closest(name, choices)) else ""


def closest(name: str, choices: Iterable[str]) -> str:
    """The most similar choice; "" where none is similar. See `did_you_mean`."""
    known = list(choices)
    close = [choice for choice in known if choice.lower() == name.lower()]
    return next(iter(close or difflib.get_close_matches(name, known, n=1)), "")


def choose_from(name: str, choices: Iterable[str]) -> str:
    """ "choose from noise, swap; did you mean 'noise'?", for a name that is none of the choices."""
    known = list(choices)
    shown = ", ".join(choice or "''" for choice in known)
    return f"choose from {shown}{did_you_mean(name, known)}"


def _choose(value, choices: tuple[str, ...]) -> str:
    if len(choices) == 2:
        return f"use {choices[0]!r} or {choices[1]!r}"
    return choose_from(str(value), choices)


def instance(name: str, value, kind: type | tuple[type, ...], fix: str) -> None:
    """Raises TypeError, with what to do, unless an argument is of a type, or of one of several."""
    if not isinstance(value, kind):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise TypeError(f"{name} is {shown}, of type {type(value).__name__}: {fix}")


def path(name: str, value) -> None:
    """Raises TypeError unless an argument is a path: a text or a `pathlib.Path`."""
    instance(name, value, (str, os.PathLike), "give the path of a folder, such as a run's workdir")


def folder_name(shown: str, value: str) -> None:
    """Raises ValueError unless a value is the name of one folder, not a path to another place."""
    if not re.fullmatch(r"[\w=,-][\w.=,-]*", value):
        raise ValueError(
            f"{shown}: give one folder name of letters, digits and _ - . = , that does not start "
            "with a dot"
        )


def once(name: str, values) -> None:
    """Raises ValueError where one of the values is given twice."""
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise ValueError(f"{name} names {twice[0]} twice: give each once")


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of a table as indented lines of aligned columns, for an error message."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return "\n".join("  " + line.rstrip() for line in lines)
