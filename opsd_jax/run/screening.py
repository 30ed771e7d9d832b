"""Screening: training examples whose privileged content helps the starting weights too little.

Before the first step of OPSD the weights that it starts from score a reference of every training
example after both contexts:

    gain = mean over its tokens of log p(y_n | C_T, y_<n) - log p(y_n | C_S, y_<n)    nats per token

The reference is the text-only trace with the answer, or the answer alone where an example has no
trace. An example is kept if its gain is at least `config.data.screen.margin`. The teacher's context
has the true privileged blocks, whatever `config.teacher.visual_thoughts` is, so that a run and its
control arms keep the same examples.

  W/screen.json   the gain of each training example, and what it depends on

An arm reads the file of its run where that is of the same weights and settings. Margins may differ.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax import distill, offline, sharding
from opsd_jax.data.batches import Batches
from opsd_jax.data.examples import Examples
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import inference
from opsd_jax.inputs import json_files
from opsd_jax.run import saves, start
from opsd_jax.run.session import Session
from opsd_jax.run.stage import Stage
from opsd_jax.runtime import files, run_folder
from opsd_jax.runtime.progress import Progress
from opsd_jax.runtime.stopping import BeforeBatch, never_stop

FORMAT = 1  # to be raised when the file, or what it holds, changes
UNSAVED = 1024  # examples that are measured between two writes of the file: what a kill can cost
_FIX = "delete it, and the examples are measured again"


@dataclasses.dataclass
class Gains:
    """What is known about the training examples.

    Attributes:
      values: for each task the gains, float32 [examples]; nan where none was measured.
      pids: for each task {number: pid} of the measured examples; in the first process only.
      weights: checksum of the weights; in the first process only.
      complete: whether all are measured; an example without a gain then fits no bucket.
    """

    values: list[np.ndarray]
    pids: list[dict[int, str]]
    weights: str = ""
    complete: bool = False


def kept_rows(
    run: Session, stage: Stage, batches: Batches, params, *, before_batch: BeforeBatch = never_stop
) -> list[np.ndarray]:
    """Which examples a stage trains on, for each task bool [examples]. Writes W/screen.json.

    Args:
      batches: those of the stage with all examples.
      params: the weights that the stage starts from, laid out on the mesh; None where it continues:
        they are read if the file is missing.
      before_batch: called before each batch, such as `StopRequest.check`. If it raises, the next
        call continues.
    Raises:
      ValueError: fewer examples are kept than a batch needs, or none of a task; a damaged file.
      FloatingPointError: a gain is not finite.
    """
    config, examples = run.config, batches.examples
    first = config_lib.screened_stages(config)[0]
    if stage.name != first:
        params = None  # other weights than those that the gains are of
    weights = "" if params is None else offline.fingerprint(params)
    found = _known(run, examples, weights)
    if not found.complete:
        if params is None:
            params = start.read(run, saves.origin(config, run.workdir, first))
        found.weights = weights or offline.fingerprint(params)
        _complete(run, stage, batches, params, found, before_batch)
    kept = [
        (gains >= config.data.screen.margin) & (buckets >= 0)
        for gains, buckets in zip(found.values, batches.buckets, strict=True)
    ]
    tasks = {
        task: _counts(*of_task)
        for task, *of_task in zip(examples.tasks, found.values, batches.buckets, kept)
    }
    if jax.process_index() == 0:
        _write(run, examples, found, tasks)
    for line in in_words(tasks, config.data.screen.margin):
        logging.info("%s", line)
    _check(run, stage, tasks, found)
    return kept


def _facts(run: Session, examples: Examples, weights: str) -> dict:
    """What the gains depend on."""
    part = run.record
    return {
        "weights": weights,
        "format": FORMAT,
        "model": part["model"],
        "lora": part["lora"],
        "prompts": run.prompts_record,
        "images": part["images"],
        "transforms": part["transforms"],
        "blocks": dataclasses.asdict(run.packer.names),
        "buckets": part["data"]["buckets"],
        "tokenizer": run.tokenizer.digest,
        "rows": {
            task: [str(source.split), len(source), digest]
            for task, source, digest in zip(
                examples.tasks, examples.sources, examples.digests, strict=True
            )
        },
    }


# --- the file ------------------------------------------------------------------------------------


def _known(run: Session, examples: Examples, weights: str) -> Gains:
    """What the file of the run holds, or that of the run that an arm belongs to.

    weights: checksum of the weights; "" accepts those of a complete file.
    """
    sizes = [len(source) for source in examples.sources]
    found = Gains([np.full(n, np.nan, np.float32) for n in sizes], [{} for _ in sizes])
    if jax.process_index() == 0:
        own = run_folder.screening(run.workdir)
        owner = run_folder.run_of(run.workdir)
        for path in (own, *([run_folder.screening(owner)] if owner else ())):
            read = _read(path, run, examples, weights)
            if read and (read.complete or path == own):
                found = read
                break
    if jax.process_count() > 1:
        values, complete = multihost_utils.broadcast_one_to_all(
            (np.concatenate(found.values), np.int32(found.complete))
        )
        parts = np.split(np.array(values), np.cumsum(sizes)[:-1])
        found = Gains(parts, found.pids, found.weights, bool(complete))
    return found


def _read(path: str, run: Session, examples: Examples, weights: str) -> Gains | None:
    """The gains in a file; None if there is none, or it is of other weights or settings."""
    if not os.path.exists(path):
        return None
    record = json_files.read(path, fix=_FIX)
    try:
        was, complete = record["facts"], bool(record["complete"])
        if not weights and complete:
            weights = was["weights"]
        if was != json.loads(json.dumps(_facts(run, examples, weights))):
            logging.info("screening: %s is of other weights or settings", path)
            return None
        lists = [record["gains"][task] for task in examples.tasks]
        values = [np.array(x["gain"], np.float64).astype(np.float32) for x in lists]  # null: nan
        pids = [{n: pid for n, pid in enumerate(x["pid"]) if pid is not None} for x in lists]
        if [x.shape for x in values] != [(len(source),) for source in examples.sources]:
            raise ValueError("a list of gains has another length than the data")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {_FIX}") from error
    logging.info("screening: gains of %d examples are in %s", sum(map(len, pids)), path)
    return Gains(values, pids, weights, complete)


def _write(run: Session, examples: Examples, found: Gains, tasks: Mapping | None = None) -> None:
    """Writes W/screen.json, unless it has this content.

    tasks: what `_counts` found for each task; None while examples are left to measure.
    """
    path = run_folder.screening(run.workdir)
    gains = {
        task: {
            "pid": [pids.get(n) for n in range(len(values))],
            "gain": [None if np.isnan(x) else float(x) for x in values],
        }
        for task, values, pids in zip(examples.tasks, found.values, found.pids)
    }
    record = {
        "complete": found.complete,
        "margin": run.config.data.screen.margin,
        "tasks": tasks or {},
        "facts": _facts(run, examples, found.weights),
        "gains": gains,
    }
    if os.path.exists(path) and json_files.read(path, fix=_FIX) == json.loads(json.dumps(record)):
        return
    files.write_json(path, record)


# --- measuring -----------------------------------------------------------------------------------


def _complete(
    run: Session,
    stage: Stage,
    batches: Batches,
    params,
    found: Gains,
    before_batch: BeforeBatch,
) -> None:
    """Measures what is left, and keeps it in W/screen.json on the way."""
    primary, unsaved = jax.process_index() == 0, 0
    done = sum(int(np.isfinite(values).sum()) for values in found.values)
    total = sum(int((buckets >= 0).sum()) for buckets in batches.buckets)
    size = stage.batches.size // stage.config.accumulation  # a micro step fits the memory
    plan = list(_plan(batches, found, size))
    try:
        with Progress(total, "screening", start=done, primary=primary) as progress:
            for count in _measured(run, batches, params, found, plan, before_batch):
                done, unsaved = done + count, unsaved + count
                progress.update(done)
                if unsaved >= UNSAVED and primary:
                    _write(run, batches.examples, found)
                    unsaved = 0
        found.complete = True
    finally:
        if unsaved and not found.complete and primary:
            _write(run, batches.examples, found)


def _plan(batches: Batches, found: Gains, size: int) -> Iterator[tuple[int, int, list[int]]]:
    """(task, bucket, numbers of examples) of the batches that are left.

    The last example repeats until a batch is full.
    """
    for source, (buckets, gains) in enumerate(zip(batches.buckets, found.values, strict=True)):
        for bucket in range(batches.schedule.num_buckets):
            numbers = np.flatnonzero((buckets == bucket) & np.isnan(gains)).tolist()
            for at in range(0, len(numbers), size):
                yield source, bucket, inference.filled(numbers[at : at + size], size)


def _measured(
    run: Session,
    batches: Batches,
    params,
    found: Gains,
    plan: Sequence[tuple[int, int, list[int]]],
    before_batch: BeforeBatch,
) -> Iterator[int]:
    """Measures the batches of a plan; yields how many examples each added to `found`."""
    primary = jax.process_index() == 0

    def load(batches: Batches, place: int) -> tuple:
        """This process's part of a batch, and the pids of the whole batch in the first process."""
        source, bucket, numbers = plan[place]
        mine = [numbers[n] for n in sharding.local_batch_indices(run.mesh, len(numbers))]
        rows, packer = [batches.examples(source, n) for n in mine], batches.packer
        blocks = [packer.blocks(row, "teacher") for row in rows]
        host = (
            context_lib.Batch(
                packer.student(rows, bucket), packer.pack(rows, "teacher", bucket, blocks)
            ),
            *packer.references_or_answers(rows, bucket),
            np.asarray(mine, np.int32),
        )
        pids = {n: row.example.pid for n, row in zip(mine, rows)}
        others = [n for n in dict.fromkeys(numbers) if n not in pids] if primary else []
        return host, pids | {n: batches.examples.sources[source][n].pid for n in others}

    if not plan:
        return
    for (source, _, numbers), (host, pids) in zip(plan, batches.stream(load, 0, len(plan))):
        before_batch()
        batch, tokens, mask, placed = sharding.put_batch(run.mesh, host)
        completion = context_lib.completion(
            tokens, mask, bos=run.tokenizer.bos, eos=run.tokenizer.eos
        )
        gains = distill.log_prob_gain(
            params, batch, completion, config=run.model, chunk=run.config.divergence.chunk
        )
        gains, placed = sharding.gather_to_host((gains, placed))
        if not np.isfinite(gains).all():
            pid = batches.examples.sources[source][int(placed[np.argmin(np.isfinite(gains))])].pid
            raise FloatingPointError(
                f"screening: the gain of example {pid} is not finite: the weights that the stage "
                "starts with are damaged, or config.model.dtype is too narrow for them"
            )
        found.values[source][placed] = gains
        found.pids[source] |= pids
        yield len(set(numbers))


# --- what is kept --------------------------------------------------------------------------------


def _counts(gains: np.ndarray, buckets: np.ndarray, kept: np.ndarray) -> dict:
    """Numbers of examples of a task, and their mean gains; null for the mean of none.

    Args:
      gains, buckets, kept: of each example, [examples].
    """
    left_out = np.isfinite(gains) & (buckets >= 0) & ~kept

    def mean(chosen: np.ndarray) -> float | None:
        return float(gains[chosen].mean(dtype=np.float64)) if chosen.any() else None

    return {
        "examples": len(gains),
        "kept": int(kept.sum()),
        "left_out": int(left_out.sum()),
        "too_long": int(len(gains) - kept.sum() - left_out.sum()),
        "mean_gain_kept": mean(kept),
        "mean_gain_left_out": mean(left_out),
    }


def _check(run: Session, stage: Stage, tasks: Mapping[str, dict], found: Gains) -> None:
    """Raises ValueError where too few examples are kept to train on."""
    margin = run.config.data.screen.margin
    needed = stage.batches.size // stage.batches.completions
    kept = sum(counts["kept"] for counts in tasks.values())
    empty = [n for n, counts in enumerate(tasks.values()) if not counts["kept"]]
    if kept >= needed and not empty:
        return
    if empty:
        task = list(tasks)[empty[0]]
        what = f"none of the {tasks[task]['examples']:,} training examples of {task}"
        wanted, gains, fix = 1, found.values[empty[0]], "take that task out of config.data.tasks"
    else:
        of_all = sum(counts["examples"] for counts in tasks.values())
        what = f"{kept:,} of {of_all:,} training examples, fewer than the {needed} of a batch"
        wanted, gains = needed, np.concatenate(found.values)
        fix = f"lower config.{stage.name}.batch_size"
    largest = np.sort(gains[np.isfinite(gains)])[::-1]
    at_most = ""
    if len(largest) >= wanted:
        at_most = f" ({math.floor(largest[wanted - 1] * 1e4) / 1e4:g} keeps {wanted})"
    again = ""
    if stage.first:  # what was trained before keeps its settings
        origin = saves.origin(run.config, run.workdir, stage.name)
        again = (
            f". A run keeps its settings: start another --workdir with --config.init_from={origin} "
            f"--config.stages=\"('{stage.name}',)\", which begins where this one is"
        )
    raise ValueError(
        f"config.data.screen keeps {what}, with a margin of {margin:g} nats per token "
        f"({run_folder.screening(run.workdir)} has the gain of each): lower "
        f"config.data.screen.margin{at_most}, or {fix}{again}"
    )


# --- for reports ---------------------------------------------------------------------------------


def in_words(tasks: Mapping[str, Mapping], margin: float) -> list[str]:
    """A sentence about each task. tasks: as in the file."""
    found = []
    for task, counts in tasks.items():
        parts = [f"Screening kept {counts['kept']:,} of {counts['examples']:,} examples of {task}"]
        if counts["left_out"]:
            parts.append(
                f"the gain of {counts['left_out']:,} is below the margin of {margin:g} nats per "
                "token"
            )
        if counts["too_long"]:
            parts.append(f"{counts['too_long']:,} fit no bucket")
        found.append("; ".join(parts) + ".")
    return found


def of_runs(workdir: str, arms: Sequence[str]) -> dict[str, dict]:
    """{"run" or "arm NAME": {"margin", "tasks"} of its screen.json}, of those that screen."""
    folders = {"run": workdir} | {f"arm {arm}": run_folder.arm(workdir, arm) for arm in arms}
    found = {}
    for name, folder in folders.items():
        path = run_folder.screening(folder)
        if load_config(folder).data.screen.on and os.path.exists(path):
            record = json_files.read(path, fix=_FIX)
            if record.get("complete"):
                found[name] = {key: record[key] for key in ("margin", "tasks")}
    return found


def lines(workdir: str, arms: Sequence[str]) -> list[str]:
    """Sentences for the report: about the run, and about arms that kept other examples."""
    found = of_runs(workdir, arms)
    shown = {name: in_words(one["tasks"], one["margin"]) for name, one in found.items()}
    of_run = shown.pop("run", [])
    others = {name: words for name, words in shown.items() if words != of_run}
    return [*of_run, *(f"{name}: {line}" for name, words in others.items() for line in words)]
