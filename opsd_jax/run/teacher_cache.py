"""The cached teacher of the offline stage: its outputs are collected once and read for every batch.

  W/teacher_cache/key.json              what the outputs depend on
  W/teacher_cache/<task>-<first>.npz    outputs for SHARD examples of a task, from number <first> on

The format of an output is `record_type`. `offline` describes what the teacher computes, and why it
is stored like this.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from opsd_jax import offline, sharding
from opsd_jax.blocks import BlockNames
from opsd_jax.data.batches import Batches
from opsd_jax.data.examples import Examples, PreparedExample
from opsd_jax.inputs import json_files
from opsd_jax.run.session import Session
from opsd_jax.runtime import files
from opsd_jax.runtime import progress as progress_lib
from opsd_jax.runtime.stopping import BeforeBatch, never_stop

FORMAT = 1  # to be raised when the files above, or what they hold, change
SHARD = 128  # examples per file: at 7B about 80 MB, and what a kill can cost
OPEN = 256  # files that are held open; systems often allow 1,024


class WrongCacheError(ValueError):
    """The cache in the working folder is not of this teacher, these settings or these data."""


class MissingTargetsError(LookupError):
    """An example to train on has no cached teacher."""


def key(run: Session, params, examples: Examples) -> dict:
    """What cached outputs depend on; not the temperature, which is applied when training."""
    part = run.record
    names, blocks = run.packer.names, {}
    if names != BlockNames():  # caches of older versions have no names
        blocks["blocks"] = {**dataclasses.asdict(names), "transforms": part["transforms"]}
    return {
        "format": FORMAT,
        "teacher": offline.fingerprint(params),
        "top_k": kept_entries(run.config),
        "model": part["model"],
        "lora": part["lora"],
        "prompts": run.prompts_record,
        "images": part["images"],
        "buckets": part["data"]["buckets"],
        "rows": {
            task: [str(source.split), len(source), digest]
            for task, source, digest in zip(
                examples.tasks, examples.sources, examples.digests, strict=True
            )
        },
        **blocks,
    }


def kept_entries(config: ConfigDict) -> int:
    """K, the number of the teacher's entries that are kept."""
    return min(config.offline.top_k, config.model.llm.vocab_size)


def record_type(top_k: int) -> np.dtype:
    """What is stored for each target token."""
    return np.dtype(
        [
            ("label", np.int32),
            ("weight", np.float16),
            ("log_probs", np.float16, (top_k,)),
            ("indices", np.int32, (top_k,)),
        ]
    )


class Cache:
    """The files of a cache. Reading is safe in threads; only the first process writes.

    Args:
      folder: where the files are.
      facts: see `key`.
    Raises:
      WrongCacheError: the folder holds a cache with another key.
    """

    def __init__(self, folder: str, facts: dict):
        facts = json.loads(json.dumps(facts))
        self.folder, self.top_k = folder, facts["top_k"]
        text = json.dumps(facts, sort_keys=True)
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._open: dict[str, np.lib.npyio.NpzFile] = {}
        self._lock = threading.Lock()
        path = os.path.join(folder, "key.json")
        if os.path.exists(path):
            was = json_files.read(path, fix=f"delete {folder}, and it is collected again")
            if was != facts:
                raise WrongCacheError(
                    f"{folder} holds the outputs of another teacher or of other settings:\n"
                    + "\n".join(_differences(was, facts))
                    + "\nUse those, another --workdir, or delete the folder: it is then collected "
                    "again"
                )
        elif jax.process_index() == 0:
            files.write_json(path, facts)

    def path(self, task: str, number: int) -> str:
        """The file that holds an example of a task."""
        return os.path.join(self.folder, f"{task}-{number // SHARD * SHARD:07d}.npz")

    def write(self, task: str, number: int, found: dict[tuple[int, str], np.ndarray]) -> None:
        """Writes the file that holds example `number`.

        found: {(number, pid): array of `record_type`} of all examples of the file.
        """
        with files.replacing(self.path(task, number)) as f:
            arrays = {f"{n}:{pid}": array for (n, pid), array in found.items()}
            np.savez(f, key=self.digest, **arrays)  # type: ignore[arg-type]  # none: allow_pickle

    def __call__(self, task: str, number: int, pid: str, labels: np.ndarray) -> np.ndarray:
        """The stored targets of an example, an array [target tokens] of `record_type`.

        Raises:
          MissingTargetsError: the cache lacks them.
          WrongCacheError: they belong to another trace than `labels`, int [target tokens].
          ValueError: the file is damaged.
        """
        path, name = self.path(task, number), f"{number}:{pid}"
        again = "delete that file and start again, which collects it again"
        where = f"example {number}, pid {pid}, of {task}"
        with self._lock:
            try:
                shard = self._shard(path)
                if shard["key"] != self.digest:
                    raise WrongCacheError(
                        f"{path} belongs to another cache than key.json in its folder: {again}"
                    )
                if name not in shard.files:
                    raise MissingTargetsError(f"{path} has no teacher for {where}: {again}")
                found = shard[name]
            except FileNotFoundError as error:
                raise MissingTargetsError(
                    f"{path}, with the teacher for {where}, is missing: start again, which "
                    "collects it again"
                ) from error
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}): {again}") from error
        if found.dtype != record_type(self.top_k) or not np.array_equal(found["label"], labels):
            raise WrongCacheError(f"{path} was made for another trace of {where}: {again}")
        return found

    def _shard(self, path: str) -> np.lib.npyio.NpzFile:
        """The opened file; the one that was opened first is closed where OPEN are open."""
        if path not in self._open:
            while len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = np.load(path, allow_pickle=False)
        return self._open[path]


def _differences(was, now, name: str = "") -> Iterator[str]:
    """A line for each value in which two nested dicts differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for part in sorted(was.keys() | now.keys()):
            path = f"{name}.{part}" if name else part
            yield from _differences(was.get(part, "absent"), now.get(part, "absent"), path)
    elif was != now:
        yield f"  {name}: there {was}, now {now}"


def collect(
    run: Session, params, examples: Examples, *, before_batch: BeforeBatch = never_stop
) -> Cache:
    """Collects the teacher's outputs on all training examples in W/teacher_cache.

    Files that exist are kept.

    Args:
      params: the teacher, laid out on the mesh.
      examples: those of the train split.
      before_batch: called before each batch, such as `StopRequest.check`. If it raises, the next
        call continues.
    """
    config = run.config
    cache = Cache(os.path.join(run.workdir, "teacher_cache"), key(run, params, examples))
    shards = [
        (source, first)
        for source, held in enumerate(examples.sources)
        for first in range(0, len(held), SHARD)
    ]
    missing = [
        (source, first)
        for source, first in shards
        if not os.path.exists(cache.path(examples.tasks[source], first))
    ]
    _meet("listed")  # all processes list before the first one writes
    primary, done = jax.process_index() == 0, len(shards) - len(missing)
    with (
        concurrent.futures.ThreadPoolExecutor(config.data.threads) as pool,
        progress_lib.Progress(
            len(shards), "teacher cache", "collect", start=done, primary=primary
        ) as progress,
    ):
        for count, (source, first) in enumerate(missing, done + 1):
            numbers = range(first, min(first + SHARD, len(examples.sources[source])))
            prepared = dict(zip(numbers, pool.map(functools.partial(examples, source), numbers)))
            found = {}
            for bucket, batch in _batches(run, prepared):
                before_batch()
                found |= _outputs(run, params, prepared, batch, bucket)
            if primary:
                cache.write(examples.tasks[source], first, found)
            progress.update(count)
    _meet("collected")
    return cache


def _batches(run: Session, prepared: dict[int, PreparedExample]) -> Iterator[tuple[int, list[int]]]:
    """(bucket, numbers of examples) of batches as large as a micro step.

    The last example repeats until a batch is full.
    """
    config, packer = run.config, run.packer
    one_bucket = len(packer.buckets.trace) == 1 and config.data.on_too_long == "fail"
    size = config.offline.batch_size // config.offline.accumulation
    groups: dict[int, list[int]] = {}
    for number, example in prepared.items():
        groups.setdefault(0 if one_bucket else packer.bucket(example), []).append(number)
    groups.pop(-1, None)  # training leaves them out, too, and too_long.json names them
    for bucket, members in sorted(groups.items()):
        for at in range(0, len(members), size):
            numbers = members[at : at + size]
            yield bucket, numbers + numbers[-1:] * (size - len(numbers))


def _outputs(
    run: Session, params, prepared: dict[int, PreparedExample], numbers: list[int], bucket: int
) -> dict[tuple[int, str], np.ndarray]:
    """{(number, pid): array of `record_type`} of the examples of a batch, on every process.

    numbers: those of the batch's examples; a number may repeat.
    """
    mine = [numbers[n] for n in sharding.local_batch_indices(run.mesh, len(numbers))]
    shown, top_k = [prepared[n] for n in mine], kept_entries(run.config)
    both = [
        run.packer.traces(shown, [layout] * len(shown), bucket) for layout in ("reference", "text")
    ]
    placed = np.asarray(mine, np.int32)
    teacher, student, placed = sharding.put_batch(run.mesh, (*both, placed))
    values = offline.teacher_outputs(
        params,
        teacher,
        student,
        config=run.model,
        top_k=top_k,
        chunk=run.config.divergence.chunk,
    )
    log_probs, indices, weights, labels, mask, placed = sharding.gather_to_host(
        (*values, student.labels, student.mask, placed)
    )
    found = {}
    for b, n in enumerate(placed.tolist()):
        pid, real = prepared[n].example.pid, mask[b]
        record = np.zeros(real.sum(), record_type(top_k))
        record["label"], record["weight"] = labels[b][real], weights[b][real]
        record["log_probs"], record["indices"] = log_probs[b][real], indices[b][real]
        if not (np.isfinite(record["log_probs"]).all() and np.isfinite(record["weight"]).all()):
            raise FloatingPointError(
                f"the teacher's log-probabilities of example {pid} are not finite: the weights "
                "that the stage starts with are damaged, or config.model.dtype is too narrow for "
                "them"
            )
        found[n, pid] = record
    return found


def _meet(what: str) -> None:
    """Waits for the other processes of the run."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"teacher cache {what}")


def batch(
    batches: Batches, step: int, cache: Cache
) -> tuple[offline.Cached, list[PreparedExample]]:
    """The batch maker of the stage: text traces with their cached teacher, and their examples."""
    bucket, pairs = batches.schedule(step)
    pairs = [pairs[n] for n in batches.share]
    examples = [batches.examples(*pair) for pair in pairs]
    traces = batches.packer.traces(examples, ["text"] * len(examples), bucket)
    found = np.zeros(traces.labels.shape, record_type(cache.top_k))
    found["label"] = -1
    for b, ((source, number), example) in enumerate(zip(pairs, examples)):
        labels = traces.labels[b][traces.mask[b]]
        task = batches.examples.tasks[source]
        found[b, : len(labels)] = cache(task, number, example.example.pid, labels)
    parts = [
        np.ascontiguousarray(found[name]) for name in ("label", "log_probs", "indices", "weight")
    ]
    return offline.Cached(traces, *parts), examples
