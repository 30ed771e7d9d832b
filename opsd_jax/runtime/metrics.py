"""Metrics of a run: means over steps, and the files that they are written to.

<workdir>/metrics.jsonl             one JSON object per line: step, unix time, stage, numbers
<workdir>/metrics.jsonl.superseded  lines of updates of a killed run that were done again
<workdir>/tb/                       the same numbers for TensorBoard
<workdir>/samples/<step>/           texts and images
<workdir>/wandb.json                id of the run at Weights & Biases, kept by a continuation

Sums and counts stay on the device until they are written (`Means`), so that logging never makes the
host wait for the step that is running. This module serves any training loop; the loop decides what
is measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from opsd_jax.inputs import paths
from opsd_jax.runtime import files, growing_file, run_folder


class Means:
    """Means over several steps, from (sum, count) pairs that stay on the device until `take`."""

    def __init__(self):
        self._added = []

    def add(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds `{key: (sum, count)}`, scalars on device or host, without copying or waiting."""
        for key, pair in pairs.items():
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(
                    f"metric {key!r} must be a tuple (sum, count); a plain number is (x, 1)"
                )
        self._added.append(dict(pairs))

    def take(self) -> dict[str, float]:
        """Means since the last `take`: one transfer, summed in float64. A count of 0 gives nan."""
        totals = {}
        for pairs in jax.device_get(self._added):
            for key, pair in pairs.items():
                totals[key] = totals.get(key, 0) + np.array(pair, np.float64)
        self._added = []
        return {
            key: float(total / count) if count else math.nan
            for key, (total, count) in totals.items()
        }


def read(metrics_jsonl: str | os.PathLike) -> list[dict]:
    """The records of a metrics.jsonl, without an incomplete last line, which a run is writing.

    Raises:
      ValueError: names file and line of any other line that is not a record.
    """
    lines = Path(metrics_jsonl).read_text(encoding="utf-8", errors="replace").split("\n")
    return [_record(line, f"{metrics_jsonl}:{number}") for number, line in enumerate(lines[:-1], 1)]


def last_step(metrics_jsonl: str | os.PathLike) -> int:
    """The last step of a run that is going on; 0 before its first record."""
    return progress(metrics_jsonl)[0]


def progress(metrics_jsonl: str | os.PathLike) -> tuple[int, dict[str, float]]:
    """(last step, {"loss": last loss}) of a run that is going on.

    (0, {}) before its first record.
    """
    records = read(metrics_jsonl) if os.path.exists(metrics_jsonl) else []
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    return records[-1]["step"] if records else 0, {"loss": losses[-1]} if losses else {}


def wandb_arguments(project: str, workdir: str, group: str, settings: dict) -> dict | None:
    """Arguments of `wandb.init`; None for a run that does not log to Weights & Biases.

    Args:
      project: config.log.wandb; "" for none.
      group: folder of the run that a control arm belongs to: they are one group there.
      settings: all settings of the run, as JSON.
    """
    if not project:
        return None
    name, group = (os.path.basename(os.path.abspath(folder)) for folder in (workdir, group))
    return {"project": project, "name": name, "group": group, "config": settings}


class Writer:
    """Writes the metrics and samples of a run; a context manager.

    Args:
      workdir: a local (or mounted) folder; made if missing.
      primary: whether this process writes, `jax.process_index() == 0`; the others do nothing.
      tensorboard: whether to write `<workdir>/tb/` too.
      wandb: see `wandb_arguments`. The id is made once and kept in the workdir, so that all starts
        of a run are one run there.
      resume_step: the first step that this process will do. Records of it and of later steps are
        from a killed run: they are moved to `metrics.jsonl.superseded`, so that each step appears
        once. None keeps all records and appends.
    """

    def __init__(
        self,
        workdir,
        *,
        primary: bool = True,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ):
        paths.check_given("workdir", workdir)
        self.workdir = Path(workdir)
        self.primary = primary
        self._jsonl = self._tensorboard = self._wandb = None
        if not primary:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        _supersede(Path(run_folder.metrics(workdir)), resume_step)
        if tensorboard:
            from tensorboardX import SummaryWriter, record_writer

            record_writer.register_writer_factory(
                growing_file.EventFiles.PREFIX, growing_file.EventFiles()
            )
            self._tensorboard = SummaryWriter(
                growing_file.EventFiles.folder(run_folder.tensorboard(workdir)),
                purge_step=resume_step,
                flush_secs=int(growing_file.PERIOD),
            )
        if wandb is not None:
            try:
                import wandb as client
            except ImportError as error:
                raise ImportError(
                    "wandb is not installed: pip install opsd_jax[wandb], or log without it"
                ) from error
            self._wandb = client.init(
                dir=str(self.workdir), id=_wandb_id(self.workdir), resume="allow", **wandb
            )
        self._jsonl = growing_file.GrowingFile(run_folder.metrics(workdir))
        self._jsonl.write(b"")  # the file exists from the start

    def scalars(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """Writes one line: `{"step", "time", "stage", **values}`.

        On a mounted bucket it is visible within `growing_file.PERIOD`.

        Args:
          step: updates done.
          stage: one of `config.STAGES`.
          values: numbers, or arrays of one number. JSON has no nan and inf: such a value is
            written as null and its key is listed under `nonfinite`.

        Raises:
          TypeError: names the key of a value that is not a number.
          ValueError: a key that the writer sets itself.
          FileNotFoundError: the file was deleted while it was being written.
        """
        if not self.primary:
            return
        record = {"step": int(step), "time": round(time.time(), 3), "stage": stage}
        numbers = {}
        for key, value in values.items():
            if key in record or key == "nonfinite":
                raise ValueError(f"metric {key!r}: the writer sets this key itself; choose another")
            array = np.asarray(value)
            if array.size != 1 or array.dtype.kind not in "biufV":  # V: bfloat16
                raise TypeError(f"metric {key!r} is not a number: {value!r:.60}. Reduce it to one")
            numbers[key] = int(array.item()) if array.dtype.kind in "biu" else float(array.item())
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        record |= {key: finite.get(key) for key in numbers}
        if len(finite) < len(numbers):
            record["nonfinite"] = [key for key in numbers if key not in finite]
        self._jsonl.write((json.dumps(record, allow_nan=False) + "\n").encode())
        self._jsonl.check_kept()
        if self._tensorboard:
            for key, value in finite.items():
                self._tensorboard.add_scalar(key if "/" in key else f"{stage}/{key}", value, step)
        if self._wandb:
            self._wandb.log(record, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes `<workdir>/samples/<step>/<name>.txt`, and to TensorBoard."""
        if self.primary:
            self._sample(step, f"{name}.txt", text.encode())
            if self._tensorboard:
                self._tensorboard.add_text(name, text, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes `<workdir>/samples/<step>/<name>.png`, and to TensorBoard.

        Args:
          image: uint8 [height, width, 3]; ValueError for anything else.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"{name!r}: {image.dtype}{list(image.shape)} not uint8 [height, width, 3]"
            )
        if self.primary:
            png = io.BytesIO()
            Image.fromarray(np.asarray(image)).save(png, "PNG")
            self._sample(step, f"{name}.png", png.getvalue())
            if self._tensorboard:
                self._tensorboard.add_image(name, np.asarray(image), step, dataformats="HWC")

    def _sample(self, step: int, name: str, content: bytes) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name):
            raise ValueError(
                f"sample name {name!r}: use letters, digits, '_', '-', '.', and '/' for folders"
            )
        files.write(Path(run_folder.samples(self.workdir, int(step)), name), content)

    def close(self) -> None:
        """Writes what is left and closes all."""
        if self._jsonl:
            self._jsonl.publish()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if self._jsonl and kind is None:
                self._jsonl.check_kept()
        finally:
            self.close()


def _record(line: str, where: str) -> dict:
    """The record in a line; ValueError that names `where` for a line that is not a record."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record
    raise ValueError(
        f"{where}: not a JSON object with a whole number as step: {line[:80]!r}. Delete that line: "
        "a continuation of the run moves such lines to metrics.jsonl.superseded"
    )


def _wandb_id(workdir: Path) -> str:
    """The id of the workdir's run at Weights & Biases; the first call makes it, in wandb.json."""
    path = workdir / "wandb.json"
    if not path.exists():
        files.write(path, json.dumps({"id": secrets.token_hex(8)}))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(found, str) and found:
            return found
    raise ValueError(
        f'{path} is damaged: it should hold {{"id": "..."}}, the last part of the run\'s address '
        "at Weights & Biases. Write that, or delete the file: the run is then a new one "
        "there"
    )


def _supersede(path: Path, resume_step: int | None) -> None:
    """Moves records from resume_step on, and damaged lines, from `path` to `path`.superseded."""
    if not path.exists():
        return
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept, moved, damaged = [], [], []
    for number, line in enumerate(lines, 1):
        try:
            step = _record(line, f"{path}:{number}")["step"]
            again = resume_step is not None and step >= resume_step
        except ValueError:  # a power cut leaves NUL, or half a line that the next start continued
            again = True
            damaged.append(number)
        (moved if again else kept).append(line)
    if torn:  # the run was killed while it wrote this line
        moved.append(torn)
    if damaged:
        logging.warning(
            "%s: lines %s are damaged (a full disk, a power cut?); their numbers are lost",
            path,
            damaged,
        )
    if moved:
        old = Path(f"{path}.superseded")
        # The old file first: after a kill in between, lines exist twice rather than not at all.
        before = old.read_bytes() if old.exists() else b""
        files.write(old, before + "".join(line + "\n" for line in moved).encode())
        files.write(path, "".join(line + "\n" for line in kept))
        logging.warning(
            "%s: moved %d lines of an interrupted run to %s", path, len(moved), old.name
        )
