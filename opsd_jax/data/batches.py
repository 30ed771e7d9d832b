"""Training batches of a stage, each a pure function of (seed, step).

A host needs the step number alone to resume, and any number of hosts read the same global batches.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from opsd_jax.config import BatchesConfig
from opsd_jax.context import Batch, GenerationBatch, PaddedImages, References, Supervised
from opsd_jax.data import bucket_index
from opsd_jax.data.examples import Examples, PreparedExample
from opsd_jax.data.packing import Packer
from opsd_jax.data.randomness import generator
from opsd_jax.data.schedule import BatchSchedule


class Batches:
    """The training batches of a stage: host arrays of this process's part of every global batch.

    Attributes:
      examples, packer: what the batches are made of.
      buckets: for each task the bucket of each example, int [examples]; -1 is left out.
      schedule: which examples the batch of a step holds.
      share: positions in the global batch that this process makes.
    """

    def __init__(
        self,
        config: BatchesConfig,
        workdir: str,
        examples: Examples,
        packer: Packer,
        *,
        share: Sequence[int] | None = None,
    ):
        """
        Args:
          workdir: folder of the run, for the index of buckets where that of the data is read-only.
          examples: those of the train split.
          share: see `sharding.local_batch_indices`; None for the whole batch.
        Raises:
          ValueError: privileged blocks are to be swapped, and a task has a single example.
          TooLongError: an example fits no bucket, see `bucket_index`.
        """
        self._config, self.examples, self.packer = config, examples, packer
        self.share = range(config.size) if share is None else share
        if config.stage == "opsd" and config.measured == "swap":
            for source in range(len(examples.sources)):
                examples.partner(source, 0)  # raises before the first step if there is none
        data, num_buckets = config.data, len(config.data.buckets.student)
        if not bucket_index.is_needed(data):
            self.buckets = [
                np.full(len(source), num_buckets - 1, np.int32) for source in examples.sources
            ]
        else:
            self.buckets = [
                bucket_index.bucket_index(
                    workdir, examples, packer, n, visual_thoughts=config.measured, data=data
                )
                for n in range(len(examples.sources))
            ]
        self.schedule = self._schedule()
        if config.num_references:  # before the first step, if a task has none
            for source in range(len(examples.sources)):
                packer.reference(examples.measured(source, 0))

    def _schedule(self) -> BatchSchedule:
        config = self._config
        return BatchSchedule(
            self.buckets,
            config.data.weights or None,
            range(len(config.data.buckets.student)),
            config.size // config.completions,
            config.seed,
        )

    def only(self, kept: Sequence[np.ndarray]) -> "Batches":
        """Batches of some of the examples.

        kept: for each task which ones, bool [examples].
        """
        found = copy.copy(self)
        found.buckets = [np.where(k, b, -1) for k, b in zip(kept, self.buckets, strict=True)]
        found.schedule = found._schedule()
        return found

    def opsd(self, step: int, attempt: int = 0) -> tuple[Batch, list[PreparedExample]]:
        """Student and teacher contexts of the batch, one to contrast, and its examples.

        Where a question has several completions, its contexts repeat in adjacent sequences.

        attempt: above 0 for another batch of the same step, see `BatchSchedule`.
        """
        bucket, pairs = self.schedule(step, attempt)
        config = self._config
        numbers = [n // config.completions for n in self.share]  # of the question of each sequence
        asked = list(dict.fromkeys(numbers))
        examples = [self.examples(*pairs[n]) for n in asked]
        swaps = config.measured == "swap"
        partners = [self.examples.partner(*pairs[n]) if swaps else None for n in asked]
        rngs = [generator(config.seed, "visual thoughts", step, attempt, n) for n in asked]
        student = self.packer.student(examples, bucket)
        teacher = self.packer.teacher(examples, partners, config.visual_thoughts, rngs, bucket)
        contrast = None
        if config.contrast:
            contrast = self.packer.teacher(examples, partners, "swap", rngs, bucket)
        batch = Batch(student, teacher, contrast)
        if config.completions > 1:
            repeated = [asked.index(n) for n in numbers]
            batch = jax.tree.map(lambda x: x[repeated], batch)
            examples = [examples[n] for n in repeated]
        if config.num_references:
            batch = dataclasses.replace(batch, references=self._references(step, examples))
        return batch, examples

    def _references(self, step: int, examples: Sequence[PreparedExample]) -> References:
        """Text traces of the sequences that learn from one at a step; examples: of each sequence.

        Seed and step choose the sequences, the same number of each global batch.
        """
        config = self._config
        order = generator(config.seed, "references", step).permutation(config.size)
        chosen = set(order[: config.num_references].tolist())
        return self.packer.in_place_of_completions(
            [example if n in chosen else None for n, example in zip(self.share, examples)],
            config.tokens,
        )

    def traces(self, step: int) -> tuple[Supervised | GenerationBatch, list[PreparedExample]]:
        """Supervised traces in the layouts of the stage's mix, and their examples.

        With images for the autoencoder where the stage trains image generation.
        """
        bucket, pairs = self.schedule(step)
        layouts = mixture(self._config.mix, len(pairs))
        layouts = [layouts[n] for n in self.share]
        examples = [self.examples(*pairs[n]) for n in self.share]
        traces = self.packer.traces(examples, layouts, bucket)
        if not self._config.generation:
            return traces, examples
        shown = [
            example if layout == "drawn" else None for example, layout in zip(examples, layouts)
        ]
        return GenerationBatch(traces, self.packer.images(shown, bucket)), examples

    def images(self, step: int) -> tuple[PaddedImages, list[PreparedExample]]:
        """All images of the batch's examples, for the autoencoder, and the examples."""
        bucket, pairs = self.schedule(step)
        examples = [self.examples(*pairs[n]) for n in self.share]
        return self.packer.images(examples, bucket), examples

    def stream(
        self, make: Callable[["Batches", int], tuple], start: int, stop: int
    ) -> Iterator[tuple]:
        """make(self, step) for the steps start .. stop-1, made ahead of time in threads.

        make: a batch maker, such as `Batches.opsd`.
        """
        import grain

        data = self._config.data
        options = grain.ReadOptions(
            num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads)
        )
        steps = grain.MapDataset.range(start, stop)
        return iter(steps.map(lambda step: make(self, int(step))).to_iter_dataset(options))


def mixture(ratios: Mapping[str, float], count: int) -> list[str]:
    """Layout of each of `count` examples, in proportion to the ratios.

    {"a": 2, "b": 1}, 6 -> a a a a b b

    Raises ValueError if no ratio is positive.
    """
    names, total = [name for name in ratios if ratios[name]], sum(ratios.values())
    if not names:
        raise ValueError(f"the stage's mix {dict(ratios)} has no layout with a positive share")
    edges = np.round(np.cumsum([ratios[name] for name in names]) / total * count).astype(int)
    return [names[np.searchsorted(edges, n, side="right")] for n in range(count)]
