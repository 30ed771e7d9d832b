"""Which paths are accepted: every command checks every path here, before it does anything.

Paths of mounted file systems are accepted. An address such as gs://bucket/x is refused: `os` would
take it for a local folder named `gs:`. Buckets are used through a mount, see
docs/guides/several-machines.md.
"""

import os
import re
import unicodedata

_ADDRESS = re.compile(
    r"://|(?:^|/)[A-Za-z][A-Za-z0-9+.-]*:(?:/|$)"
)  # the second: what `os.path` makes of gs://b
_GLOB = "[]*?\\"  # patterns to Orbax and TensorStore: arrays are written and never found again
_REMOTE_ROOTS = ("gs", "s3", "az", "hf")  # epath, which Orbax and TFDS use, reads /gs/b as gs://b


def check(name: str, path: str | os.PathLike, *, orbax: bool = False) -> None:
    """Raises ValueError for a path that cannot be used; makes and reads nothing.

    Args:
      name: what the user calls it, such as "--workdir" or "config.data.dir".
      path: what was given. "" passes: it means "not given" (see `check_given`).
      orbax: whether checkpoints are written to or read from it, or from a folder in it.
    """
    path = os.fspath(path)
    if not path:
        return
    shown = f"{name}={path!r}"
    if _ADDRESS.search(path):
        raise ValueError(
            f"{shown} is an address, not a folder of a mounted file system: mount the bucket, for "
            "example with gcsfuse, and give the mounted folder"
        )
    if odd := [char for char in path if unicodedata.category(char) == "Cc"]:
        raise ValueError(
            f"{shown} holds the character {odd[0]!r}: use a path of printable characters"
        )
    if re.search("[\ud800-\udfff]", path):  # bytes that Python could not decode
        raise ValueError(
            f"{shown} is not UTF-8, or the terminal's encoding is not: set a UTF-8 locale, such as "
            "LC_ALL=C.UTF-8"
        )
    if path[0] == "~":
        raise ValueError(
            f"{shown} starts with ~, which shells do not expand after a =: write $HOME, or the "
            "whole path"
        )
    place = os.path.realpath(path)  # the folder above counts as well, and where a link leads
    root, _, rest = place.lstrip("/").partition("/")
    if root in _REMOTE_ROOTS:
        raise ValueError(
            f"{shown}: Orbax and TFDS take {place} for the address {root}://{rest}: mount the "
            "bucket at another place"
        )
    if orbax and (found := sorted(set(place) & set(_GLOB))):
        whole = "" if place == path else f" (which is {place})"
        raise ValueError(
            f"{shown}{whole} holds {' '.join(found)}: checkpoints written to such a path cannot be "
            f"read again, because Orbax takes {' '.join(_GLOB)} for patterns. Use a path without "
            "them"
        )


def check_given(name: str, path: str | os.PathLike, *, orbax: bool = False) -> None:
    """As `check`; "" is an error too: without this, it would mean the current folder."""
    if not os.fspath(path):
        raise ValueError(f"{name} is empty (an unset shell variable?): give a path")
    check(name, path, orbax=orbax)


def absent(folder: str | os.PathLike) -> str:
    """What a message says of a folder that does not exist, and that may be a name on a hub."""
    on_hub = re.fullmatch(r"(?=.*[A-Za-z])\w[\w.-]*(/[\w.-]+)?", os.fspath(folder))
    hint = " (models are not downloaded by their name on a hub)" if on_hub else ""
    return f"there is no such folder{hint}"


def check_writable(name: str, folder: str | os.PathLike) -> None:
    """Raises ValueError unless files can be written in the folder; makes nothing.

    The folder need not exist yet.
    """
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ValueError(
            f"{name}={os.fspath(folder)}: {there} is not a folder: give another path, or move that "
            "file away"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name}={os.fspath(folder)}: no permission to write in {there}: give another path"
        )
