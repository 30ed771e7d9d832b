"""The files of a prepared task: where they are, their checksums, and the record of finished ones.

TARGET/visual_opsd/<task>/1.0.0/
    visual_opsd-train.array_record-00000-of-00003   one shard for each file
    dataset_info.json, features.json                what plain TFDS reads
    progress.json                                   records of finished shards: a rerun keeps them
    report.json                                     rows, bad rows, warnings; written last
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from absl import logging

from opsd_jax.data import schema
from opsd_jax.inputs import json_files

REPORT = "report.json"


class Shard(NamedTuple):
    """One output file: the first `rows` rows of one parquet or JSONL file.

    Attributes:
      split: the split that it belongs to.
      name: name of the ArrayRecord file.
      file: path of that file in the task's source folder.
      blake2b: checksum of that file and of the images that it names.
      rows: number of its rows, bad ones included.
      columns: names of the further columns, in the order that they were asked for.
      several_images: whether a row of the task may have several problem images.
      optional_image: whether a row of the task may have none.
    """

    split: str
    name: str
    file: str
    blake2b: str
    rows: int
    columns: tuple[str, ...] = ()
    several_images: bool = False
    optional_image: bool = False

    def record(self) -> list:
        """The fields as progress.json has them.

        The last ones are left out where older versions, which lack them, would write the same file.
        """
        fields = [*self[:5], [*self.columns], self.several_images, self.optional_image]
        used = 8 if self.optional_image else 7 if self.several_images else 6 if self.columns else 5
        return fields[:used]


def version_folder(target: str | os.PathLike, task: str) -> Path:
    """The folder of a task's prepared files in a TFDS data_dir."""
    return Path(target) / schema.NAME / task.lower() / schema.VERSION


def task_names(target: str | os.PathLike) -> list[str]:
    """Names of the prepared tasks in a TFDS data_dir, as their source folders spell them.

    TFDS wants folders in lower case; `prepare` keeps the spelling in report.json.
    """
    folder, found = Path(target) / schema.NAME, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            found.append(path.name)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                rows = json_files.read(str(path / schema.VERSION / REPORT))["rows"]
                found[-1] = next(
                    (t for name in rows if (t := name.split("/")[0]).lower() == path.name),
                    path.name,
                )
    return found


def digests(target: str | os.PathLike, tasks: Iterable[str]) -> dict[str, str]:
    """{task: checksum of its prepared examples} in a TFDS data_dir, see `digest`."""
    return {task: digest(version_folder(target, task)) for task in tasks}


def digest(folder: Path) -> str:
    """Checksum of the prepared examples in a version folder, on which caches of them depend.

    It is that of the content of the shards, wherever the folder is stored and whenever it was
    written. `prepare` recorded the shards' own checksums in progress.json. A shard without one, as
    in a folder made by the TFDS builder, or of another size than recorded, is read. Damaged files
    are not reported here: `arrayrecord.open_source` does that.
    """
    found = hashlib.blake2b(digest_size=16)
    try:
        records = read_progress(folder / "progress.json")
    except (FileNotFoundError, ValueError):
        records = {}
    for path in sorted(folder.glob(f"{schema.NAME}-*.array_record-*")):
        record = records.get(path.name, {})
        known = "blake2b" in record and record["file_bytes"] == path.stat().st_size
        found.update(f"{path.name} {record['blake2b'] if known else checksum(path)}\n".encode())
    return found.hexdigest()


def checksum(path: Path) -> str:
    """BLAKE2b checksum of a file's content, 16 bytes as hexadecimal digits."""
    if (size := path.stat().st_size) > 1 << 28:  # seconds, on a mounted bucket perhaps a minute
        logging.info("%s: reading %.1f GB for a checksum", path, size / 1e9)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def count_records(shard: Path) -> int:
    """Number of records of an ArrayRecord file; 0 where it is missing or truncated."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(shard))
    count = reader.num_records()
    with contextlib.suppress(RuntimeError):  # raised by close if there was nothing to read
        reader.close()
    return count


def read_progress(path: Path) -> dict[str, dict]:
    """The records of finished shards in progress.json, by the names of the shards.

    A record holds `shard` (the fields of Shard), `rows` and `bytes` written, `bad_rows` and
    `warnings` (the fields of Notes), and, unless an older version wrote it, `file_bytes` and
    `blake2b`, size and checksum of the ArrayRecord file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged; the message names it.
    """
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        for record in done.values():
            Shard(*record["shard"]), record["rows"] + record["bytes"]
            [schema.Note(*note) for note in (*record["bad_rows"], *record["warnings"])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return done
