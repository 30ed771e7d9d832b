"""Answers kept on disk while they are collected, so that a killed evaluation continues.

<folder>/answers.jsonl             the identity, then one line per batch that is answered
<folder>/answers-<process>.jsonl   the same of another process, where each process answers a share
<folder>/pictures/                 images that the model generated while it answered
"""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax.runtime import files

FILE = "answers.jsonl"


class DifferentAnswersError(ValueError):
    """A folder holds answers that were begun under other conditions."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder in which answers are kept batch by batch.

    Attributes:
      folder: folder of the results.
      identity: what must be the same to continue: fingerprints of weights, tokenizer and data,
        mode, protocol, seed, tables, the examples of the batches. A dict that JSON takes.
      together: whether all processes answer each batch together, so that the first one writes for
        all. Otherwise each process writes the answers of its own share to a file of its own.
    """

    folder: str
    identity: dict
    together: bool = True

    def open(self) -> dict[int, dict]:
        """{batch number: record} of the answers that are kept; called by every process.

        A line that a kill cut off is dropped: that batch is answered again. Where nothing is kept,
        generated images in the folder are removed, because they belong to other answers.

        Raises:
          DifferentAnswersError: the folder holds answers of another identity.
          ValueError: a damaged file.
        """
        process, processes = jax.process_index(), jax.process_count()
        identity, records, trouble = self._identity(), {}, None
        if process == 0:
            try:
                records = _gather(self.folder, identity)
            except (OSError, ValueError) as error:
                trouble = error
        if processes > 1:
            # All learn of the first one's error, and wait until it has put the files in order.
            fine = multihost_utils.process_allgather(np.array([trouble is None]))
            if not np.all(fine) and trouble is None:
                trouble = DifferentAnswersError(
                    f"{self.folder}: the first process cannot continue there; its message says why"
                )
        if trouble:
            raise trouble
        if process:
            records = _read(os.path.join(self.folder, FILE), identity)
        if not self.together and processes > 1:
            _write(self._path(), identity, {})
        return records

    def append(self, record: dict) -> None:
        """Writes the record of a batch, durably."""
        if self.together and jax.process_index():
            return
        with open(self._path(), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def close(self, records: dict[int, dict]) -> dict[int, dict]:
        """Waits for all processes.

        On the first one: their answers, in one file, where each had a share.
        """
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"all of {self.folder} is answered")
        if self.together or jax.process_index():
            return records
        return _gather(self.folder, self._identity())

    def _identity(self) -> dict:
        return json.loads(json.dumps(self.identity))

    def _path(self) -> str:
        shared = self.together or jax.process_count() == 1
        name = FILE if shared else f"answers-{jax.process_index()}.jsonl"
        return os.path.join(self.folder, name)


def is_begun(folder: str) -> bool:
    """Whether a folder holds answers that a `Store` kept."""
    return bool(_files(folder))


def identity_of(folder: str) -> dict:
    """The identity of the answers in a folder where `is_begun`. ValueError for a damaged file."""
    path = _files(folder)[0]
    with open(path, encoding="utf-8") as f:
        try:
            return dict(json.loads(f.readline()))
        except (TypeError, ValueError) as error:
            raise _damaged(path, error) from error


def finished(folder: str, identity: dict) -> dict | None:
    """The identity of a folder's answers, if all are there and only their batches may differ.

    Answers that do not depend on their batches then need not be asked again in others. The batches
    are the `rows` of an identity: [benchmark, keys] of each.

    Raises:
      ValueError: a damaged file.
    """
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        return None
    kept, records = _lines(path)

    def without_batches(of: dict) -> dict:
        examples = sorted([name, key] for name, keys in of.get("rows", ()) for key in keys)
        return {**of, "rows": examples, "batch_size": None}

    is_same = without_batches(kept) == without_batches(json.loads(json.dumps(identity)))
    return kept if is_same and len(records) == len(kept["rows"]) else None


def forget(folder: str) -> None:
    """Removes the answers that a `Store` kept; the first process does so for all."""
    if jax.process_index() == 0:
        for path in _files(folder):
            os.remove(path)


def _damaged(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({error}): delete it, and all its questions are asked again"
    )


def _files(folder: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(
        os.path.join(folder, n) for n in names if re.fullmatch(r"answers(-\d+)?\.jsonl", n)
    )


def _gather(folder: str, identity: dict) -> dict[int, dict]:
    """{batch number: record} of all files of a folder, which become one file."""
    os.makedirs(folder, exist_ok=True)
    records, found = {}, _files(folder)
    for path in found:
        records |= _read(path, identity)
    if not records:
        shutil.rmtree(os.path.join(folder, "pictures"), ignore_errors=True)
    _write(os.path.join(folder, FILE), identity, records)
    for path in found:
        if os.path.basename(path) != FILE:
            os.remove(path)
    return records


def _read(path: str, identity: dict) -> dict[int, dict]:
    """{batch number: record} of the complete lines of a file.

    Raises DifferentAnswersError if there are some of another identity.
    """
    there, records = _lines(path)
    if records and there != identity:
        _raise_different(path, there, identity)
    return records


def _lines(path: str) -> tuple[dict, dict[int, dict]]:
    """(identity, {batch number: record}) of the complete lines of a file; {} without a line."""
    with open(path, "rb") as f:
        text = f.read()
    try:
        lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is not a JSON object")
        records = {record["batch"]: record for record in lines[1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return lines[0] if lines else {}, records


def _raise_different(path: str, there: dict, identity: dict) -> None:
    changed = sorted(key for key in {*there, *identity} if there.get(key) != identity.get(key))
    if "weights" in changed and "weights" not in there:
        raise DifferentAnswersError(
            f"{path} has no fingerprint of the weights: an older version began it, so which model "
            "gave its answers is not known: choose another --name, or delete the folder"
        )
    model = (
        "the model has changed since: "
        if {"weights", "generation_weights", "tokenizer"} & {*changed}
        else "give the same, "
    )
    raise DifferentAnswersError(
        f"{path} was begun with another {', '.join(changed)}: {model}choose another --name, or "
        "delete the folder"
    )


def _write(path: str, identity: dict, records: dict[int, dict]) -> None:
    lines = [identity, *(records[number] for number in sorted(records))]
    files.write(path, "".join(json.dumps(line) + "\n" for line in lines))
