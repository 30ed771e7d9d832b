"""Names of columns of the data: "text:COLUMN" holds a text, "images:COLUMN" a list of images.

The same names are those of the prepared files' features and of blocks of contexts.
"""

import re
from collections.abc import Sequence

TEXT, IMAGES = "text:", "images:"
OWN_TEXTS = ("text:answer", "text:full_text_only_thought")  # columns that all data have
_NAME = re.compile(rf"({TEXT}|{IMAGES})([A-Za-z0-9_.-]+)")


def is_column(name: str) -> bool:
    """Whether a name is "text:COLUMN" or "images:COLUMN"."""
    return _NAME.fullmatch(name) is not None


def of_files(name: str) -> str:
    """The column of the parquet files: "text:solution" -> "solution"."""
    return name.partition(":")[2]


def check(shown: str, names: Sequence[str]) -> None:
    """Raises ValueError unless these are names of further columns, each given once.

    shown: the setting or flag that names them, for the message.
    """
    for name in names:
        if not is_column(name):
            raise ValueError(
                f"{shown} names {name!r}: give text:COLUMN or images:COLUMN, such as "
                "text:solution. The name of a column has letters, digits and _ . - only"
            )
        if name in OWN_TEXTS:
            raise ValueError(f"{shown} names {name}, which all data have: leave it out")
    found = [of_files(name) for name in names]
    if twice := [column for column in found if found.count(column) > 1]:
        raise ValueError(f"{shown} names the column {twice[0]} twice: give each once")
