"""The cached teacher of the offline stage: collected once, read for every batch."""

import concurrent.futures
import functools
import hashlib
import json
import os
import threading
import zipfile

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax import config as config_lib
from opsd_jax import offline, sharding
from opsd_jax.data import batches, examples, packing
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files
from opsd_jax.runtime import progress as progress_lib

FORMAT = 1  # raise it when the files above, or what is in them, change
SHARD = 128  # rows of a file: at 7B about 80 MB, and what a kill loses
OPEN = 256  # files that are held open; systems often allow 1,024


class WrongCache(ValueError):
    """The cache in the workdir is not of this teacher, these settings or these data."""


class MissingRow(LookupError):
    """A row to train on has no cached teacher."""


def key(params, config, rows) -> dict:
    """What cached outputs depend on. Not the temperature: it is applied when training."""
    part = config_lib.to_json(config)
    return {
        "format": FORMAT,
        "teacher": offline.fingerprint(params),
        "top_k": kept_entries(config),
        "model": part["model"],
        "lora": part["lora"],
        "prompts": part["prompts"],
        "images": part["images"],
        "buckets": part["data"]["buckets"],
        "rows": {
            task: [str(source.split), len(source), digest]
            for task, source, digest in zip(
                config.data.tasks, rows.sources, rows.digests, strict=True
            )
        },
    }


def kept_entries(config) -> int:
    """K: how many of the teacher's entries are kept."""
    return min(config.offline.top_k, config.model.llm.vocab_size)


def record_type(top_k: int) -> np.dtype:
    """What is stored of a target."""
    return np.dtype(
        [
            ("label", np.int32),
            ("weight", np.float16),
            ("log_probs", np.float16, (top_k,)),
            ("indices", np.int32, (top_k,)),
        ]
    )


class Cache:
    """The files of a cache. Reading is safe in threads; writing is for the first process.

    Raises WrongCache where the folder holds one of another key.
    """

    def __init__(self, folder: str, facts: dict):
        facts = json.loads(json.dumps(facts))
        self.folder, self.top_k = folder, facts["top_k"]
        self.digest = hashlib.blake2b(
            json.dumps(facts, sort_keys=True).encode(), digest_size=16
        ).hexdigest()
        self._open, self._lock = {}, threading.Lock()
        path = os.path.join(folder, "key.json")
        if os.path.exists(path):
            was = json_files.read(path, fix=f"delete {folder}, and it is collected anew")
            if was != facts:
                raise WrongCache(
                    f"{folder} holds the outputs of another teacher or of other settings:\n"
                    + "\n".join(_differences(was, facts))
                    + "\nUse those, another --workdir, or delete the folder: it is then collected anew"
                )
        elif jax.process_index() == 0:
            files.write_json(path, facts)

    def path(self, task: str, row: int) -> str:
        """The file that holds a row."""
        return os.path.join(self.folder, f"{task}-{row // SHARD * SHARD:07d}.npz")

    def write(self, task: str, row: int, found: dict) -> None:
        """Writes the file of `row`. found: {(row, pid): array of `record_type`}."""
        with files.replacing(self.path(task, row)) as f:
            np.savez(
                f, key=self.digest, **{f"{n}:{pid}": array for (n, pid), array in found.items()}
            )

    def __call__(self, task: str, row: int, pid: str, labels) -> np.ndarray:
        """The stored targets of a row, [tokens of `record_type`]. MissingRow, or WrongCache if they are of another
        trace than `labels`."""
        path, name = self.path(task, row), f"{row}:{pid}"
        again = "delete that file and start again, which collects it anew"
        with self._lock:
            try:
                if path not in self._open:
                    while len(self._open) >= OPEN:
                        self._open.pop(next(iter(self._open))).close()
                    self._open[path] = np.load(path, allow_pickle=False)
                shard = self._open[path]
                if shard["key"] != self.digest:
                    raise WrongCache(
                        f"{path} belongs to another cache than key.json beside it: {again}"
                    )
                if name not in shard.files:
                    raise MissingRow(
                        f"{path} has no teacher for row {row}, pid {pid}, of {task}: {again}"
                    )
                found = shard[name]
            except FileNotFoundError as error:
                raise MissingRow(
                    f"{path}, with the teacher for row {row}, pid {pid}, of {task}, is not there: start "
                    "again, which collects it anew"
                ) from error
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}): {again}") from error
        if found.dtype != record_type(self.top_k) or not np.array_equal(found["label"], labels):
            raise WrongCache(
                f"{path} was made for another trace of row {row}, pid {pid}, of {task}: {again}"
            )
        return found


def _differences(was, now, name=""):
    if isinstance(was, dict) and isinstance(now, dict):
        for part in sorted(was.keys() | now.keys()):
            path = f"{name}.{part}" if name else part
            yield from _differences(was.get(part, "absent"), now.get(part, "absent"), path)
    elif was != now:
        yield f"  {name}: there {was}, now {now}"


def collect(
    params,
    config,
    workdir: str,
    rows: examples.Examples,
    packer: packing.Packer,
    mesh,
    *,
    before_batch=lambda: None,
) -> Cache:
    """The teacher's outputs on all training rows, in <workdir>/teacher_cache; what is there already stays.

    Args:
      params: the teacher, laid out on the mesh. rows: of the train split.
      before_batch: called before each batch, such as `checkpoint.Flag.check`. If it raises, the next call goes on.
    """
    cache = Cache(os.path.join(workdir, "teacher_cache"), key(params, config, rows))
    shards = [
        (source, first)
        for source, held in enumerate(rows.sources)
        for first in range(0, len(held), SHARD)
    ]
    missing = [
        (source, first)
        for source, first in shards
        if not os.path.exists(cache.path(config.data.tasks[source], first))
    ]
    _meet("listed")  # before the first process writes what others would not miss any more
    one_bucket = len(packer.buckets.trace) == 1 and config.data.on_too_long == "fail"
    size = config.offline.batch_size // config.offline.accumulation
    primary = jax.process_index() == 0
    with (
        concurrent.futures.ThreadPoolExecutor(config.data.threads) as pool,
        progress_lib.Progress(
            len(shards),
            "teacher cache",
            "collect",
            start=len(shards) - len(missing),
            primary=primary,
        ) as progress,
    ):
        for done, (source, first) in enumerate(missing, len(shards) - len(missing) + 1):
            numbers = range(first, min(first + SHARD, len(rows.sources[source])))
            prepared = dict(zip(numbers, pool.map(functools.partial(rows, source), numbers)))
            groups, found = {}, {}
            for n, row in prepared.items():
                groups.setdefault(0 if one_bucket else packer.bucket(row), []).append(n)
            groups.pop(-1, None)  # left out of training too, and named in too_long.json
            for bucket, members in sorted(groups.items()):
                for at in range(0, len(members), size):
                    before_batch()
                    batch = members[at : at + size]
                    batch += batch[-1:] * (size - len(batch))
                    found |= _outputs(params, prepared, batch, bucket, config, packer, mesh)
            if primary:
                cache.write(config.data.tasks[source], first, found)
            progress.update(done)
    _meet("collected")
    return cache


def _outputs(params, prepared, numbers, bucket, config, packer, mesh) -> dict:
    """{(row, pid): array of `record_type`} of a batch, on every process. numbers: row numbers, as many as a batch has;
    they may repeat."""
    mine = [numbers[n] for n in sharding.local_batch_indices(mesh, len(numbers))]
    shown, top_k = [prepared[n] for n in mine], kept_entries(config)
    both = [packer.traces(shown, [layout] * len(shown), bucket) for layout in ("reference", "text")]
    teacher, student, placed = sharding.put_batch(mesh, (*both, np.asarray(mine, np.int32)))
    values = offline.teacher_outputs(
        params,
        teacher,
        student,
        config=config_lib.model(config),
        top_k=top_k,
        chunk=config.divergence.chunk,
    )
    log_probs, indices, weights, labels, mask, placed = sharding.gather_to_host(
        (*values, student.labels, student.mask, placed)
    )
    found = {}
    for b, n in enumerate(placed.tolist()):
        pid, real = prepared[n].example.pid, mask[b]
        record = np.zeros(real.sum(), record_type(top_k))
        for name, array in (
            ("label", labels),
            ("weight", weights),
            ("log_probs", log_probs),
            ("indices", indices),
        ):
            record[name] = array[b][real]
        if not (np.isfinite(record["log_probs"]).all() and np.isfinite(record["weight"]).all()):
            raise FloatingPointError(
                f"the teacher's log-probabilities of row {pid} are not finite: the weights that the stage starts with "
                "are damaged, or config.model.dtype is too narrow for them"
            )
        found[n, pid] = record
    return found


def _meet(what):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"teacher cache {what}")


class Batches(batches.Batches):
    """The batches of the stage: text traces with their cached teacher. `cache` is to be set before the first one."""

    cache: Cache | None = None

    def traces(self, step: int):
        """(Cached, its rows)."""
        bucket, pairs = self.schedule(step)
        pairs = [pairs[n] for n in self.share]
        rows = [self.examples(*pair) for pair in pairs]
        traces = self.packer.traces(rows, ["text"] * len(rows), bucket)
        shape = traces.labels.shape
        found = np.zeros(shape, record_type(self.cache.top_k))
        found["label"] = -1
        for b, ((source, n), row) in enumerate(zip(pairs, rows)):
            labels = traces.labels[b][traces.mask[b]]
            found[b, : len(labels)] = self.cache(
                self.examples.tasks[source], n, row.example.pid, labels
            )
        parts = [
            np.ascontiguousarray(found[name])
            for name in ("label", "log_probs", "indices", "weight")
        ]
        return offline.Cached(traces, *parts), rows
