"""JSON files that other programs wrote. Errors name file, key, value and fix."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

DAMAGED = "the file is incomplete or damaged: download or copy it again"
_LFS = b"version https://git-lfs"
_REQUIRED = object()


def read(path: str, why: str = "", fix: str = DAMAGED) -> dict:
    """The JSON object in a file.

    Args:
      why: what the file is needed for, for the error message.
      fix: what to do about a damaged file, for the error message.

    Raises:
      FileNotFoundError: the file is missing. ValueError: it is not JSON, or not an object.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing" + (f": {why}" if why else ""))
    with open(path, encoding="utf-8") as f:
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of open brackets
            raise ValueError(
                f"{path} is not valid JSON ({error}): {fix}{is_pointer(path)}"
            ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a JSON object: {fix}")
    return found


def write(path: str, content: Mapping) -> None:
    """Writes a JSON file in the format of released folders: two spaces of indentation."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=2) + "\n")


def is_pointer(path: str) -> str:
    """For error messages: what to do about a Git LFS pointer; "" for another file."""
    with open(path, "rb") as f:
        return " (it is a Git LFS pointer: run `git lfs pull`)" if f.read(len(_LFS)) == _LFS else ""


@dataclasses.dataclass(frozen=True)
class Object:
    """A JSON object of a file, read key by key with type and range.

    A faulty value is read as None, and a sentence about it is added to `problems`: the caller reads
    all keys, then raises one error with every fault (`check`). null counts as an absent key.

    Attributes:
      file: the name of the file in messages.
      values: the object.
      problems: sentences about faulty values; shared with the objects of its keys.
      prefix: the path of keys to this object, "vae_config." for example.
    """

    file: str
    values: Mapping[str, Any]
    problems: list[str]
    prefix: str = ""

    def integer(
        self, key: str, *, least: int = 1, most: int = 1 << 24, default=_REQUIRED
    ) -> int | None:
        """A whole number in [least, most]."""
        return self._get(
            key,
            f"a whole number from {least} to {most}",
            default,
            lambda x: type(x) is int and least <= x <= most,
        )

    def number(self, key: str, *, positive: bool = True, default=_REQUIRED) -> float | None:
        """A finite number, by default positive."""

        def fits(x):
            return (
                type(x) in (int, float)
                and abs(x) <= 1e300
                and math.isfinite(x)
                and (x > 0 or not positive)
            )

        return self._get(key, "a positive number" if positive else "a finite number", default, fits)

    def text(self, key: str, default=_REQUIRED) -> str | None:
        """A text."""
        return self._get(key, "a text", default, lambda x: isinstance(x, str))

    def integers(
        self, key: str, *, least: int = 1, most: int = 1 << 24, default=_REQUIRED
    ) -> tuple[int, ...] | None:
        """A list of whole numbers in [least, most], as a tuple; not empty if all are positive."""
        found = self._get(
            key,
            f"a list of whole numbers from {least} to {most}",
            default,
            lambda x: (
                isinstance(x, list)
                and (x != [] or least < 1)
                and all(type(n) is int and least <= n <= most for n in x)
            ),
        )
        return tuple(found) if isinstance(found, list) else found

    def numbers(self, key: str, default=_REQUIRED) -> tuple[float, ...] | None:
        """A list of finite numbers, as a tuple."""
        found = self._get(
            key,
            "a list of numbers",
            default,
            lambda x: (
                isinstance(x, list) and all(type(n) in (int, float) and math.isfinite(n) for n in x)
            ),
        )
        return tuple(map(float, found)) if isinstance(found, list) else found

    def flag(self, key: str, default=_REQUIRED) -> bool | None:
        """A boolean."""
        return self._get(key, "true or false", default, lambda x: isinstance(x, bool))

    def texts(self, key: str, default=_REQUIRED) -> tuple[str, ...] | None:
        """A list of texts, as a tuple."""
        found = self._get(
            key,
            "a list of texts",
            default,
            lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x),
        )
        return tuple(found) if isinstance(found, list) else found

    def child(self, key: str) -> "Object":
        """The object that a key holds; an empty one if the key is absent."""
        found = self._get(key, "an object in braces", {}, lambda x: isinstance(x, dict))
        return Object(self.file, found or {}, self.problems, f"{self.prefix}{key}.")

    def has(self, key: str) -> bool:
        """Whether a key is there, and not null."""
        return self.values.get(key) is not None

    def refuse(self, key: str, why: str) -> None:
        """Adds what is wrong with the value of a key."""
        self.problems.append(
            f"{self.file}: {self.prefix}{key} is {shown(self.values.get(key))}{why}"
        )

    def check(self, summary: str) -> None:
        """Raises ValueError with all problems so far, if any."""
        if self.problems:
            raise ValueError(summary + "\n  " + "\n  ".join(self.problems))

    def _get(self, key, wanted, default, fits):
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if value is None and key not in self.values:
            self.problems.append(f"{self.file} lacks {self.prefix + key!r}: give {wanted}")
        elif not fits(value):
            self.refuse(key, f": give {wanted}")
            return None
        return value


def shown(value) -> str:
    """A JSON value in an error message, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
