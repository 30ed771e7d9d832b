"""Distillation from a cached teacher: the control without a student that samples. Stage `offline`.

  collect, once      teacher  C_T + reference trace  ->  its top K log-probabilities on the trace, on disk
                     student  C_S + reference trace  ->  weight of a token: KL(with visual thoughts || without)
  train, each step   student  C_S + reference trace  ->  cross entropy + weight * KL(cached teacher || student)

Teacher is the model with which the stage starts, frozen, in both contexts. Official: scripts/visual_opsd/
collect_traces.py and train_visual_opsd_offline.py. There the teacher reads another text than the student (two
thoughts around the picture, against the text-only thought), so that rows are paired from the end, and the trainer
looks rows up by another name than they were stored under, so that nothing is ever found. Here the same trace stands
behind both contexts, token n pairs with token n, each row is stored with the labels it was made for, and a row
without its cache is an error.

    <workdir>/teacher_cache/key.json                       what the outputs depend on
    <workdir>/teacher_cache/Chart_Refocus-0000128.npz      rows 128 .. 255 of the task, whole or not there
        key                                                digest of key.json
        <row>:<pid>                                        [tokens of `record_type`], one array a row

Letters: B batch, R targets of a row (tokens of the trace and eos), K kept entries, D hidden, V vocabulary.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import threading
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import (
    checkpoint,
    context as context_lib,
    data,
    distill,
    divergence,
    files,
    json_files,
    metrics,
    params as params_lib,
    sharding,
)
from opsd_jax.model import bagel

FORMAT = 1  # raise it when the files above, or what is in them, change
SHARD = 128  # rows of a file: at 7B about 80 MB, and what a kill loses
OPEN = 256  # files that are held open; systems often allow 1,024


class WrongCache(ValueError):
    """The cache in the workdir is not of this teacher, these settings or these data."""


class MissingRow(LookupError):
    """A row to train on has no cached teacher."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["traces", "labels", "log_probs", "indices", "weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cached:
    """Text traces with what the teacher made of them.

    traces: Supervised [B, R]. labels: int32 [B, R], those that the cache was made for, -1 where it holds nothing.
    log_probs: float16 [B, R, K], the teacher's largest, at temperature 1 over the whole vocabulary.
    indices: int32 [B, R, K], their tokens. weights: float16 [B, R], nats.
    """

    traces: context_lib.Supervised
    labels: jax.Array
    log_probs: jax.Array
    indices: jax.Array
    weights: jax.Array


# --- the loss --------------------------------------------------------------------------------------------------


def cached_kl(logits, log_probs, indices, temperature: float):
    """T^2 KL(teacher || student) of each token, float32 [...].

    The teacher's kept entries are divided by the temperature and renormalised among themselves; the student's
    log-softmax is over the whole vocabulary. So a student equal to the teacher does not reach 0, but -T^2 log of its
    own mass on the kept entries.

    Args:
      logits: [..., V] of the student. log_probs, indices: [..., K] as in `Cached`.
    """
    scaled = logits.astype(jnp.float32) / temperature
    log_t = jax.nn.log_softmax(log_probs.astype(jnp.float32) / temperature, axis=-1)
    log_s = jnp.take_along_axis(scaled, indices, axis=-1) - jax.nn.logsumexp(
        scaled, axis=-1, keepdims=True
    )
    return temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def shares(weights, used):
    """Share of each token in the KL of the batch, float32 [B, R]: w / sum w in its row, over B rows.

    Weights of tokens that are not `used` (bool [B, R]) count 0. A row whose weights are all 0 counts its tokens alike,
    as officially.
    """
    weights, even = weights.astype(jnp.float32) * used, used.astype(jnp.float32)
    total = jnp.sum(weights, axis=1, keepdims=True)
    chosen = jnp.where(total > 0, weights, even)
    return (
        chosen
        / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        / used.shape[0]
    )


def step(state, batch: Cached, *, config: distill.DistillConfig):
    """One optimizer step: cross entropy as in `distill.sft_step`, plus cached_weight times the cached teacher's KL.

    Returns (state, metrics): as `sft_step`, and kl (T^2 sum w KL / sum w of each row, mean over rows) and cache_used,
    the share of the targets on which the teacher counted.
    """
    traces = batch.traces
    weights = distill.row_weights(traces.mask, config.reduction)
    used = traces.mask & (batch.labels == traces.labels)
    trainable, frozen = distill.split(state["params"], config)

    def loss(trainable, inputs):
        traces, log_probs, indices, weights, share = inputs
        params = params_lib.merge(trainable, frozen)

        def piece(head, hidden, labels, log_probs, indices):
            logits = divergence.project(hidden, head)
            hit = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
            return (
                divergence.cross_entropy(logits, labels),
                hit,
                cached_kl(logits, log_probs, indices, config.cached_temperature),
            )

        inputs = _target_states(params, traces, config.model), traces.labels, log_probs, indices
        ce, correct, kl = divergence.over_chunks(
            piece, params["llm"]["head"], inputs, config.divergence.chunk
        )
        ce, kl = jnp.sum(ce * weights), jnp.sum(kl * share)
        value = ce + config.cached_weight * kl
        return value, {"loss": value, "ce": ce, "kl": kl, "correct": jnp.sum(correct * traces.mask)}

    inputs = traces, batch.log_probs, batch.indices, weights, shares(batch.weights, used)
    grads, found = distill._accumulate(loss, trainable, inputs, config.accumulation)
    state, step_metrics = distill.apply_gradients(state, grads, config)
    targets = jnp.sum(traces.mask, dtype=jnp.float32)
    return state, {
        "loss": found["loss"],
        "ce": found["ce"],
        "kl": found["kl"],
        "cache_used": jnp.sum(used, dtype=jnp.float32) / jnp.maximum(targets, 1),
        "accuracy": found["correct"] / jnp.maximum(targets, 1),
        "completion_len": targets / traces.mask.shape[0],
        **step_metrics,
    }


def _target_states(params, traces, model):
    """Hidden states that predict the labels, [B, R, D]."""
    hidden, _ = bagel.read(params, traces.context, config=model)
    return jnp.take_along_axis(hidden, traces.rows[:, :, None], axis=1)


# --- what is cached --------------------------------------------------------------------------------------------


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config", "top_k", "chunk"))
def teacher_outputs(params, with_thoughts, without, *, config, top_k: int, chunk: int):
    """What the cache holds of a batch of traces: (log_probs, indices, weights) as in `Cached`.

    Args:
      with_thoughts, without: Supervised [B, R], the same traces behind both contexts.
      config: ModelConfig. chunk: targets of a row whose logits exist at once.
    """
    states = [_target_states(params, traces, config) for traces in (with_thoughts, without)]

    def piece(head, *pair):
        log_t, log_s = (jax.nn.log_softmax(divergence.project(x, head)) for x in pair)
        log_probs, indices = jax.lax.top_k(log_t, top_k)
        kl = jnp.maximum(
            jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1), 0
        )  # rounding may go below
        return log_probs.astype(jnp.float16), indices.astype(jnp.int32), kl.astype(jnp.float16)

    return divergence.over_chunks(piece, params["llm"]["head"], states, chunk)


def fingerprint(params) -> str:
    """Checksum of the weights that a teacher of texts uses, see `params.fingerprint`."""
    return params_lib.fingerprint(distill.understanding(params))


def key(params, config, rows) -> dict:
    """What cached outputs depend on. Not the temperature: it is applied when training."""
    part = checkpoint.config_to_json(config)
    return {
        "format": FORMAT,
        "teacher": fingerprint(params),
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
    rows: data.Rows,
    packer: data.Packer,
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
        metrics.Progress(
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
    from opsd_jax import config as config_lib

    mine = [numbers[n] for n in sharding.local_rows(mesh, len(numbers))]
    shown, top_k = [prepared[n] for n in mine], kept_entries(config)
    both = [packer.traces(shown, [layout] * len(shown), bucket) for layout in ("reference", "text")]
    teacher, student, placed = sharding.put_batch(mesh, (*both, np.asarray(mine, np.int32)))
    values = teacher_outputs(
        params,
        teacher,
        student,
        config=config_lib.model(config),
        top_k=top_k,
        chunk=config.divergence.chunk,
    )
    log_probs, indices, weights, labels, mask, placed = sharding.fetch(
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
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"teacher cache {what}")


class Batches(data.Batches):
    """The batches of the stage: text traces with their cached teacher. `cache` is to be set before the first one."""

    cache: Cache | None = None

    def traces(self, step: int):
        """(Cached, its rows)."""
        bucket, pairs = self.plan(step)
        pairs = [pairs[n] for n in self._share]
        rows = [self.rows(*pair) for pair in pairs]
        traces = self.packer.traces(rows, ["text"] * len(rows), bucket)
        shape = traces.labels.shape
        found = np.zeros(shape, record_type(self.cache.top_k))
        found["label"] = -1
        for b, ((source, n), row) in enumerate(zip(pairs, rows)):
            labels = traces.labels[b][traces.mask[b]]
            found[b, : len(labels)] = self.cache(
                self.config.data.tasks[source], n, row.example.pid, labels
            )
        parts = [
            np.ascontiguousarray(found[name])
            for name in ("label", "log_probs", "indices", "weight")
        ]
        return Cached(traces, *parts), rows
