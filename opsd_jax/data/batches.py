"""Batches of a run's stages, each a pure function of (seed, step)."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from opsd_jax import (
    config as config_lib,
)
from opsd_jax import (
    context as context_lib,
)
from opsd_jax.context import Batch, GenerationBatch, PaddedImages
from opsd_jax.data import examples, packing, randomness
from opsd_jax.data.schedule import BatchSchedule
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files


class Batches:
    """The training batches of a stage: host arrays of this process's rows for every step.

    share: which rows of a batch these are, see `sharding.local_rows`; None for all.
    """

    def __init__(
        self,
        config,
        workdir,
        stage: str,
        rows: examples.Examples,
        packer: packing.Packer,
        *,
        share=None,
    ):
        self.config, self.stage, self.rows, self.packer = config, stage, rows, packer
        if stage == "opsd" and config.teacher.visual_thoughts == "swap":
            for source in range(len(rows.sources)):
                rows.partner(
                    source, 0
                )  # where a task has no other row, this tells before the first step
        batch_size = config[stage].batch_size
        self._share = list(range(batch_size) if share is None else share)
        buckets = range(len(config.data.buckets.student))
        whole = len(buckets) == 1 and config.data.on_too_long == "fail"
        lengths = [
            len(s) if whole else _bucket_index(config, workdir, rows, packer, n)
            for n, s in enumerate(rows.sources)
        ]
        self.schedule = BatchSchedule(
            lengths, config.data.weights or None, list(buckets), batch_size, config.seed
        )

    def opsd(self, step: int, attempt: int = 0) -> tuple[Batch, list[examples.PreparedExample]]:
        """Both contexts of the batch, and its rows."""
        bucket, pairs = self.schedule(step, attempt)
        rows = [self.rows(*pairs[n]) for n in self._share]
        mode = self.config.teacher.visual_thoughts
        partners = [self.rows.partner(*pairs[n]) if mode == "swap" else None for n in self._share]
        rngs = [
            randomness.generator(self.config.seed, "visual thoughts", step, attempt, n)
            for n in self._share
        ]
        return Batch(
            self.packer.student(rows, bucket),
            self.packer.teacher(rows, partners, mode, rngs, bucket),
        ), rows

    def traces(
        self, step: int
    ) -> tuple[context_lib.Supervised | GenerationBatch, list[examples.PreparedExample]]:
        """Supervised traces in the layouts of the stage's mix, with their pictures where it draws."""
        bucket, pairs = self.schedule(step)
        layouts = mixture(self.config[self.stage].mix, len(pairs))
        rows, layouts = (
            [self.rows(*pairs[n]) for n in self._share],
            [layouts[n] for n in self._share],
        )
        traces = self.packer.traces(rows, layouts, bucket)
        if not config_lib.draws(self.config, self.stage):
            return traces, rows
        shown = [row if layout == "drawn" else None for row, layout in zip(rows, layouts)]
        return GenerationBatch(traces, self.packer.pictures(shown, bucket)), rows

    def pictures(self, step: int) -> tuple[PaddedImages, list[examples.PreparedExample]]:
        """All pictures of the batch's rows."""
        bucket, pairs = self.schedule(step)
        rows = [self.rows(*pairs[n]) for n in self._share]
        return self.packer.pictures(rows, bucket), rows

    def stream(self, start: int, stop: int):
        """Iterator over the steps start..stop, made ahead of time in threads."""
        import grain

        load = {"opsd": self.opsd, "autoencoder": self.pictures}.get(self.stage, self.traces)
        options = grain.ReadOptions(
            num_threads=self.config.data.threads,
            prefetch_buffer_size=max(self.config.data.prefetch, self.config.data.threads),
        )
        return iter(
            grain.MapDataset.range(start, stop)
            .map(lambda step: load(int(step)))
            .to_iter_dataset(options)
        )


def mixture(ratios, count: int) -> list[str]:
    """Layout of each of `count` rows, in proportion to the ratios: {"a": 2, "b": 1}, 6 -> a a a a b b."""
    names, total = [name for name in ratios if ratios[name]], sum(ratios.values())
    if not names:
        raise ValueError(f"the stage's mix {dict(ratios)} has no layout with a positive share")
    edges = np.round(np.cumsum([ratios[name] for name in names]) / total * count).astype(int)
    return [names[np.searchsorted(edges, n, side="right")] for n in range(count)]


def _bucket_index(
    config, workdir, rows: examples.Examples, packer: packing.Packer, source: int
) -> np.ndarray:
    """Bucket of every row of a source, int [rows]; computed once and kept in the workdir.

    Rows that fit no bucket: an error that names the first ones, or with data.on_too_long = "skip" -1 in the index
    and all their names in <workdir>/too_long.json.
    """

    task, size = config.data.tasks[source], len(rows.sources[source])
    mode = config.teacher.visual_thoughts
    vocabulary = hashlib.blake2b(b"\0".join(packer.tokenizer.token_bytes)).hexdigest()
    facts = json.dumps(
        [
            task,
            size,
            str(rows.sources[source].split),
            rows.digests[source],
            vocabulary,
            config.data.buckets.to_dict(),
            config.images.to_dict(),
            config.prompts.to_dict(),
            mode,
            config.model.generation.to_dict() if rows.generation else None,
        ],
        sort_keys=True,
    )
    path = os.path.join(
        workdir, f"buckets-{task}-{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}.npy"
    )
    index = None
    if os.path.exists(path):
        with contextlib.suppress(ValueError, EOFError):  # cut by a power failure: worked out again
            index = np.load(path, allow_pickle=False)
    if is_new := index is None or index.shape != (size,):
        find = lambda n: packer.bucket(
            rows(source, n), mode, rows.partner(source, n) if mode == "swap" else None
        )
        with ThreadPoolExecutor(config.data.threads) as pool:
            index = np.fromiter(pool.map(find, range(size)), np.int32, size)
    left_out = [rows.sources[source][int(n)].pid for n in np.flatnonzero(index < 0)]
    if left_out and config.data.on_too_long == "fail":
        raise context_lib.TooLong(
            f"{len(left_out)} rows of {task} fit no bucket, first {left_out[:5]}: enlarge config.data.buckets, or set "
            "config.data.on_too_long=skip, which names them in too_long.json"
        )
    if is_new and jax.process_index() == 0:
        with files.replacing(path) as f:
            np.save(f, index, allow_pickle=False)
    if left_out and jax.process_index() == 0:
        report = os.path.join(workdir, "too_long.json")
        known = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # none yet, or cut
            known = json_files.read(report, fix="delete it, and it is written again")
        files.write_json(report, known | {task: left_out})
    return index
