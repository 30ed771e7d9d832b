"""What a run tells: numbers to files, a bar to the terminal, and a stop when it goes wrong.

    <workdir>/metrics.jsonl             one JSON object a line: step, time (unix seconds), stage, numbers
    <workdir>/metrics.jsonl.superseded  lines of updates that a killed run did and its successor did again
    <workdir>/tb/                       the same for TensorBoard
    <workdir>/samples/<step>/           texts and pictures
    <workdir>/wandb.json                the id of the run at Weights & Biases, which a continuation takes up again

Sums and counts stay on the device until they are written (`Means`), so that logging never makes the
host wait for the step that is running. Everything here is for any training loop; what is measured is
the loop's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from absl import logging

from opsd_jax import files, paths


class UnhealthyRun(RuntimeError):
    """Going on would waste the machine: the message says what is seen and how to mend it."""


class TooManyCompiles(RuntimeError):
    """A function is compiled again and again, instead of once for each bucket of shapes."""


# ---------------------------------------------------------------------------- numbers


def wilson_of_mean(parts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of the mean of several proportions, each (successes, n): Wilson's intervals combined by the method of
    Zou and Donner, in which the distances from each proportion to its own limits add up as squares. Of one it is `wilson`."""
    if len(parts) == 1:
        return wilson(*parts[0])
    shares = [successes / n for successes, n in parts]
    mean, limits = sum(shares) / len(parts), [wilson(*part) for part in parts]
    off = [
        math.sqrt(sum((limit[side] - share) ** 2 for limit, share in zip(limits, shares)))
        / len(parts)
        for side in (0, 1)
    ]
    return max(mean - off[0], 0.0), min(mean + off[1], 1.0)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, in 0..1 (Wilson's score interval); (0, 1) for n = 0.

    Unlike p +- 1.96 s it stays inside 0..1 and has a width at 0 of n and n of n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value of McNemar's test: how likely pairs that differ would be as uneven if each were a coin."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


class Means:
    """Means over several steps, from (sum, count) pairs that stay on the device until `take`."""

    def __init__(self):
        self._added = []

    def add(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds `{key: (sum, count)}`, scalars on device or host. Copies nothing and waits for nothing."""
        for key, pair in pairs.items():
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(
                    f"metric {key!r} must be a tuple (sum, count); a plain number is (x, 1)"
                )
        self._added.append(dict(pairs))

    def take(self) -> dict[str, float]:
        """Means since the last `take`: one transfer, summed in double precision. A count of 0 gives nan."""
        totals = {}
        for pairs in jax.device_get(self._added):
            for key, pair in pairs.items():
                totals[key] = totals.get(key, 0) + np.array(pair, np.float64)
        self._added = []
        return {
            key: float(total / count) if count else math.nan
            for key, (total, count) in totals.items()
        }


# ---------------------------------------------------------------------------- files


def read(metrics_jsonl) -> list[dict]:
    """The rows of a metrics.jsonl. A last line without its end, which a run is writing, is left out.

    Raises ValueError, naming file and line, for any other line that is not a row.
    """
    lines = Path(metrics_jsonl).read_text(encoding="utf-8", errors="replace").split("\n")
    return [_row(line, f"{metrics_jsonl}:{number}") for number, line in enumerate(lines[:-1], 1)]


def _row(line: str, where: str) -> dict:
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    raise ValueError(
        f"{where}: not a JSON object with a whole number as step: {line[:80]!r}. Delete that line: a "
        "continuation of the run moves such lines to metrics.jsonl.superseded"
    )


class Writer:
    """Writes what a run measures; a context manager.

    Args:
      workdir: a local (or mounted) folder; made if missing.
      primary: whether this process writes, `jax.process_index() == 0`; the others do nothing.
      tensorboard: whether to write `<workdir>/tb/` too.
      wandb: arguments for `wandb.init` (such as {"project": "opsd", "name": ...}) to log there too. The id is made once
        and kept in the workdir, so that all starts of a run are one run there.
      resume_step: the first step that this process will do. Rows of it and of later steps are
        from a killed run: they are moved to `metrics.jsonl.superseded`, so that each step appears
        once. None keeps all rows and appends.
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
        _supersede(self.workdir / "metrics.jsonl", resume_step)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self.workdir / "tb"), purge_step=resume_step, flush_secs=30
            )
        if wandb is not None:
            try:
                import wandb as client
            except ImportError as error:
                raise ImportError(
                    "no wandb here: pip install opsd_jax[wandb], or log without it"
                ) from error
            self._wandb = client.init(
                dir=str(self.workdir), id=_wandb_id(self.workdir), resume="allow", **wandb
            )
        self._jsonl = open(self.workdir / "metrics.jsonl", "a", encoding="utf-8")

    def scalars(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """Writes one line, flushed: `{"step", "time", "stage", **values}`.

        Args:
          step: updates done.
          stage: of `config.STAGES`.
          values: numbers, or arrays of one number. JSON has no nan and inf: such a value is
            written as null and its key is listed under `nonfinite`.

        Raises TypeError or ValueError, naming the key, for values that are no number; FileNotFoundError when the file was
        deleted while it was being written.
        """
        if not self.primary:
            return
        row = {"step": int(step), "time": round(time.time(), 3), "stage": stage}
        numbers = {}
        for key, value in values.items():
            if key in row or key == "nonfinite":
                raise ValueError(f"metric {key!r}: the writer sets this key itself; choose another")
            array = np.asarray(value)
            if array.size != 1 or array.dtype.kind not in "biufV":  # V: bfloat16
                raise TypeError(f"metric {key!r} is no number: {value!r:.60}. Reduce it to one")
            numbers[key] = int(array.item()) if array.dtype.kind in "biu" else float(array.item())
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        row |= {key: finite.get(key) for key in numbers}
        if len(finite) < len(numbers):
            row["nonfinite"] = [key for key in numbers if key not in finite]
        self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
        self._jsonl.flush()
        self._check_kept()
        if self._tensorboard:
            for key, value in finite.items():
                self._tensorboard.add_scalar(key if "/" in key else f"{stage}/{key}", value, step)
        if self._wandb:
            self._wandb.log(row, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes `<workdir>/samples/<step>/<name>.txt`, and to TensorBoard."""
        if self.primary:
            self._sample(step, f"{name}.txt", text.encode())
            if self._tensorboard:
                self._tensorboard.add_text(name, text, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes `<workdir>/samples/<step>/<name>.png`, and to TensorBoard; uint8 [height, width, 3]."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"{name!r}: {image.dtype}{list(image.shape)} not uint8 [height, width, 3]"
            )
        if self.primary:
            from PIL import Image

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
        files.write(self.workdir / "samples" / f"{int(step):06d}" / name, content)

    def _check_kept(self) -> None:
        """Writing to a deleted file succeeds, and the numbers are lost: FileNotFoundError instead."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists() or path.stat().st_size < self._jsonl.tell():
            raise FileNotFoundError(
                f"{path} was deleted or replaced while the run was writing it. What the run has not "
                "saved elsewhere is lost: start it again, and keep the folder until it ends"
            )

    def close(self) -> None:
        """Flushes and closes all."""
        if self._jsonl:
            self._jsonl.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if self._jsonl and kind is None:
                self._check_kept()
        finally:
            self.close()


def _wandb_id(workdir: Path) -> str:
    """The id of the workdir's run at Weights & Biases; made, and kept in wandb.json, at the first call."""
    path = workdir / "wandb.json"
    if not path.exists():
        files.write(path, json.dumps({"id": secrets.token_hex(8)}))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(found, str) and found:
            return found
    raise ValueError(
        f'{path} is damaged: it should hold {{"id": "..."}}, the last part of the run\'s address at Weights & '
        "Biases. Write that, or delete the file: the run then goes on as a new one there"
    )


def _supersede(path: Path, resume_step: int | None) -> None:
    """Moves rows with step >= resume_step, and lines that are damaged, from `path` to `path`.superseded."""
    if not path.exists():
        return
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept, moved, damaged = [], [], []
    for number, line in enumerate(lines, 1):
        try:
            again = _row(line, f"{path}:{number}")["step"] >= (
                math.inf if resume_step is None else resume_step
            )
        except (
            ValueError
        ):  # a power cut leaves NUL, or half a line that the next start went on behind
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
        # The old file first: should we be killed in between, lines are there twice rather than lost.
        before = old.read_bytes() if old.exists() else b""
        files.write(old, before + "".join(line + "\n" for line in moved).encode())
        files.write(path, "".join(line + "\n" for line in kept))
        logging.warning(
            "%s: moved %d lines of an interrupted run to %s", path, len(moved), old.name
        )


def write_text(path, text: str) -> None:
    """`files.write`, by the first process for all."""
    if jax.process_index() == 0:
        files.write(path, text)


# ---------------------------------------------------------------------------- the terminal


class Progress:
    """A bar on a terminal, else one plain line every `interval` seconds; a context manager.

    Args:
      total: steps of the stage; start: those done before (after a resume).
      description, stage: shown at the left.
      primary: the other processes of a run show nothing.
      file: where to; stderr by default.
    """

    def __init__(
        self,
        total: int,
        description: str = "",
        stage: str = "",
        *,
        start: int = 0,
        primary: bool = True,
        interval: float = 10.0,
        file=None,
    ):
        self._file = file or sys.stderr
        self._total, self._start, self._interval, self._primary = total, start, interval, primary
        self._title = " ".join(filter(None, (description, stage)))
        self._began = time.monotonic()
        self._shown = -math.inf
        self._bar = None
        if primary and self._file.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                "{task.description}",
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                "{task.fields[numbers]}",
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(file=self._file))
            self._task = self._bar.add_task(self._title, total=total, completed=start, numbers="")
            self._bar.start()

    def update(self, step: int, **fields) -> None:
        """Shows that `step` steps are done, and the fields (numbers or strings) beside it."""
        numbers = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in fields.items()
        )
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif self._primary and (now - self._shown >= self._interval or step >= self._total):
            self._shown = now
            left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
            print(
                f"{self._title}  {step}/{self._total}  {numbers}  elapsed {_hms(now - self._began)}  "
                f"left {_hms(left) if step > self._start else '?'}",
                file=self._file,
                flush=True,
            )

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _hms(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# ---------------------------------------------------------------------------- time


class Clock:
    """What the wall time went into.

        clock = Clock()
        with clock("update"):           update 3 s, of which XLA compiled 1 s  ->  update 2.0, compile 1.0
            with clock("checkpoint"):   0.5 s inside                           ->  update 1.5, checkpoint 0.5

    An inner phase is subtracted from the outer one, so phases add up to the total; what is in none
    is `other`. XLA compilation on this thread counts as `compile`, in whichever phase it happens.
    JAX returns before the device is done: the device's time falls to the phase that waits for it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._began = now, now()
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds that belong to inner phases, for each open phase
        thread, self_ref = threading.get_ident(), weakref.ref(self)

        def listen(event: str, seconds: float, **_) -> None:
            if (
                event == "/jax/core/compile/backend_compile_duration"
                and threading.get_ident() == thread
                and (clock := self_ref())
            ):
                clock._spend("compile", seconds)
                clock._inner[-1] += seconds

        jax.monitoring.register_event_duration_secs_listener(listen)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, listen)

    def _spend(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the time within under `phase`: sample, update, data, eval, checkpoint, ..."""
        began = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - began
            self._spend(phase, elapsed - self._inner.pop())
            self._inner[-1] += elapsed

    def report(self) -> dict[str, float]:
        """Seconds of each phase, longest first, then `other` (open phases too) and `total`, their sum."""
        total = self._now() - self._began
        phases = dict(sorted(self._seconds.items(), key=lambda item: -item[1]))
        return phases | {
            "other": total - sum(phases.values()) + phases.get("other", 0.0),
            "total": total,
        }

    def table(self) -> str:
        """The report as text, with per cent of the wall time."""
        report = self.report()
        share = 100 / report["total"] if report["total"] else 0.0
        width = max(map(len, report))
        return "\n".join(
            f"{phase:<{width}} {seconds:10.1f} s {seconds * share:6.1f} %"
            for phase, seconds in report.items()
        )


# ---------------------------------------------------------------------------- stopping in time


@dataclasses.dataclass(kw_only=True)
class Health:
    """Stops a run of one stage that has gone wrong. None or 0 switches a watch off.

    Most watches compare with the run's own start: references are means of the first `reference_checks` checks. What is
    wrong from the start has absolute limits: `min_length`, `max_unfinished`. A watch raises after `patience` bad checks
    one after the other; `max_unfinished` waits for `reference_checks` more. On resume, `replay` the rows of the stage
    first: a reference taken from a run that is already sick would find it healthy.
    """

    finite: tuple[str, ...] | None = ("loss", "grad_norm")  # may not be nan or inf, not even once
    min_length: Annotated[float | None, "[0, inf)"] = (
        1.0  # tokens: completion_len may not start at this or below
    )
    max_unfinished: Annotated[float | None, "[0, 1]"] = (
        1.0  # 1 - eos_rate may not be this or more from the start
    )
    min_length_fraction: Annotated[float | None, "[0, inf)"] = (
        0.1  # completion_len may not fall below this part of its reference
    )
    min_eos_rate: Annotated[float | None, "[0, 1]"] = (
        0.02  # eos_rate may not fall to this, once it was above 0.5
    )
    teacher_floor: Annotated[float | None, "[0, 1]"] = (
        0.5  # the teacher's own accuracy: nor below this part of its first value
    )
    teacher_entropy_rise: Annotated[float | None, "[0, inf)"] = (
        1.0  # teacher_entropy: nor more nats above its reference
    )
    teacher_topk_fraction: Annotated[float | None, "[0, 1]"] = (
        0.5  # teacher_topk_mass: nor below this part of its reference
    )
    patience: Annotated[int, "[1, inf)"] = 5
    reference_checks: Annotated[int, "[1, inf)"] = 5

    def __post_init__(self):
        if min(self.patience, self.reference_checks) < 1:
            raise ValueError(
                f"patience={self.patience}, reference_checks={self.reference_checks}: need >= 1"
            )
        self._first: dict[
            tuple[str, str], list[float]
        ] = {}  # watch and metric -> values at the start
        self._bad: dict[
            tuple[str, str], int
        ] = {}  # watch and metric -> bad checks one after the other
        self._ended = False  # completions did end, once

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at one row of metrics; keys that it lacks are not looked at. Raises UnhealthyRun."""
        if problems := self._look(metrics):
            raise UnhealthyRun(f"stopped at step {step}: " + "; ".join(problems))

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes in earlier rows of this stage, as `read` gives them, without judging them."""
        for row in rows:
            self._look(row)

    def _look(self, metrics: Mapping[str, Any]) -> list[str]:
        values = {key: _number(value) for key, value in metrics.items()}
        problems = [
            f"{key} is {metrics[key]}. Go back to an earlier checkpoint with a lower optim.lr or a gradient "
            "clip, and look at the batch of this step"
            for key in self.finite or ()
            if key in values and not math.isfinite(values[key])
        ]

        def watch(name, key, bad, message, checks=self.reference_checks, patience=self.patience):
            value, limit = values.get(key, math.nan), getattr(self, name)
            if not limit or not math.isfinite(value):
                return
            first = self._first.setdefault((name, key), [])
            if len(first) < checks:
                first.append(value)
            usual = sum(first) / len(first)
            self._bad[name, key] = (
                self._bad.get((name, key), 0) + 1 if bad(value, limit, usual) else 0
            )
            if self._bad[name, key] >= patience:
                problems.append(
                    message.format(key=key, value=value, usual=usual)
                    + f" (health.{name}=0 to go on)"
                )

        self._ended |= values.get("eos_rate", 0.0) > 0.5
        watch(
            "min_length",
            "completion_len",
            lambda value, low, usual: max(value, usual) <= low,
            "completions are empty from the start: completion_len is {value:.3g}, in spite of rollout.empty_retries. The "
            "model ends its answers at once: do its weights (init_from) and the tokenizer belong together, and is it "
            "trained for these prompts?",
        )
        watch(
            "max_unfinished",
            "eos_rate",
            lambda value, high, _: not self._ended and 1 - value >= high,
            "completions never end within the budget: eos_rate is {value:.3g}, and was never above 0.5. Raise "
            "rollout.max_new_tokens, or lower rollout.temperature; if the texts in samples/ make no sense, weights "
            "(init_from) and tokenizer do not belong together",
            patience=self.reference_checks + self.patience,
        )  # a short budget and a young model look alike at first
        watch(
            "min_length_fraction",
            "completion_len",
            lambda value, part, usual: value < part * usual,
            "completions have collapsed to {value:.3g} tokens, from {usual:.3g} at the start. Lower optim.lr or take a "
            "fixed teacher, unless short answers are right",
        )
        watch(
            "min_eos_rate",
            "eos_rate",
            lambda value, low, _: self._ended and value <= low,
            "completions no longer end within the budget: eos_rate is {value:.3g} and was above 0.5. Take a fixed or ema "
            "teacher instead of self, or lower optim.lr",
        )
        # A student forgets how to read the visual thoughts; a teacher that is its average forgets with it.
        for key in values:
            if key.startswith("eval/") and key.endswith("/teacher"):
                watch(
                    "teacher_floor",
                    key,
                    lambda value, part, start: value < part * start,
                    "the teacher's own accuracy {key} fell to {value:.3f}, from {usual:.3f} at the start: what it teaches "
                    "is no longer right. Go back to an earlier checkpoint with a fixed teacher, a slower EMA or a lower "
                    "optim.lr",
                    checks=1,
                    patience=1,
                )
        watch(
            "teacher_entropy_rise",
            "teacher_entropy",
            lambda value, rise, usual: value > usual + rise,
            "the teacher has become unsure: teacher_entropy is {value:.3g} nats, from {usual:.3g} at the start. Take a "
            "fixed teacher or a slower EMA",
        )
        watch(
            "teacher_topk_fraction",
            "teacher_topk_mass",
            lambda value, part, usual: value < part * usual,
            "the top-k entries hold only {value:.3g} of the teacher's probability, from {usual:.3g} at the start. Raise "
            "top-k or take a fixed teacher",
        )
        return problems


def _number(value) -> float:
    """As a float; nan for None, a text and whatever else is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


class CompileGuard:
    """Raises when a jitted function is compiled for more signatures than it has buckets.

    A shape that is not padded to a bucket costs minutes of compilation a step, without an error.
    """

    def __init__(self):
        self._watched = {}

    def watch(self, name: str, jitted: Callable, limit: int) -> None:
        """Watches `jitted` (what `jax.jit` returned), which may have `limit` signatures."""
        if not hasattr(jitted, "_cache_size"):
            raise TypeError(f"{name!r} is not a jitted function: give what jax.jit returned")
        self._watched[name] = jitted, limit

    def check(self) -> dict[str, int]:
        """`{"compiles": of all, "compiles/<name>": of each}`, for the metrics. Raises TooManyCompiles."""
        counts = {name: jitted._cache_size() for name, (jitted, _) in self._watched.items()}
        if over := [name for name, count in counts.items() if count > self._watched[name][1]]:
            each = ", ".join(
                f"{name} {counts[name]} times, limit {self._watched[name][1]}" for name in over
            )
            raise TooManyCompiles(
                f"compiled too often: {each}. The arguments change in shape, dtype, weak type, sharding, "
                "static value, or between host and device. JAX_EXPLAIN_CACHE_MISSES=1 shows which: pad them "
                "to the buckets and place them alike, or allow more buckets"
            )
        return {
            "compiles": sum(counts.values()),
            **{f"compiles/{name}": n for name, n in counts.items()},
        }


# ---------------------------------------------------------------------------- curves


def plot_curves(metrics_jsonl, out_png) -> None:
    """Draws loss, completion length, entropies and accuracies over steps into a PNG.

    Raises ImportError without matplotlib, ValueError when the file has no rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install opsd_jax[viz]") from error

    rows = read(metrics_jsonl)
    if not rows:
        raise ValueError(f"{metrics_jsonl} holds no rows: nothing to draw yet")
    names = sorted({key for row in rows for key in row})
    panels = {
        "loss": [name for name in ("loss", "jsd", "ce") if name in names],
        "completion length (tokens)": [name for name in names if name == "completion_len"],
        "entropy (nats)": [
            name for name in ("student_entropy", "teacher_entropy") if name in names
        ],
        "accuracy": [name for name in names if name.startswith("eval/")],
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for (title, keys), axes in zip(panels.items(), figure.subplots(2, 2).flat):
        for key in keys:
            for stage in dict.fromkeys(row["stage"] for row in rows if row.get(key) is not None):
                points = [
                    (row["step"], row[key])
                    for row in rows
                    if row["stage"] == stage and row.get(key) is not None
                ]
                axes.plot(
                    *zip(*points),
                    marker="." if len(points) < 50 else None,
                    label=f"{key} ({stage})",
                )
        axes.set(title=title, xlabel="step", ylim=(-0.02, 1.02) if title == "accuracy" else None)
        axes.grid(alpha=0.3)
        if keys:
            axes.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    files.write(out_png, png.getvalue())
