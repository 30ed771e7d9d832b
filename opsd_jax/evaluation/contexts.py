"""Prepared examples in the contexts of an evaluation mode, and greedy answers to them.

none                 the student's context: image and question
real                 the teacher's context with the example's own visual thoughts
noise, swap, image   noise, another example's visual thoughts, or the problem image instead
remove               the teacher's texts without any visual thought

With other blocks (`blocks.BlockNames`), all privileged ones are replaced like the visual thoughts.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax import images, rollout, sharding
from opsd_jax.data import packing, randomness
from opsd_jax.data.examples import Examples, PreparedExample, has_content
from opsd_jax.data.packing import Packer
from opsd_jax.data.randomness import generator
from opsd_jax.evaluation import benchmark as benchmark_lib
from opsd_jax.evaluation import inference
from opsd_jax.evaluation import results as results_lib
from opsd_jax.evaluation.benchmark import Benchmark
from opsd_jax.method_config import RolloutConfig
from opsd_jax.runtime.stopping import BeforeBatch, never_stop

# Modes of the teacher's context, modes of image generation, and all modes.
CONTEXTS = tuple(mode for mode in config_lib.MODES if mode != "none")
GENERATED = ("generated", "generated-noise", "generated-swap", "generated-remove")
MODES = ("none", *CONTEXTS, *GENERATED)


def mode_of_teacher(visual_thoughts: str) -> str:
    """The mode that shows the context of the teacher in training.

    Args:
      visual_thoughts: value of config.teacher.visual_thoughts. Its "none" leaves the teacher's
        texts, which is the mode "remove"; the mode "none" is the student's context.
    """
    return "remove" if visual_thoughts == "none" else visual_thoughts


def replacement(mode: str) -> str:
    """What `blocks.replace_privileged` puts in place of the privileged blocks in a mode.

    Args:
      mode: one of `CONTEXTS`.
    """
    return "none" if mode == "remove" else mode


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The examples of an evaluation, and how they are batched.

    Attributes:
      examples: prepared examples of a split, by task.
      packer: packs them into contexts.
      mesh: devices that batches are placed on.
      batch_size: examples per batch, of all processes together.
      limit: size of the random subset of each task; 0 for all examples.
      subset_seed: chooses the subset.
      seed: seed of the noise that replaces visual thoughts.
    """

    examples: Examples
    packer: Packer
    mesh: Mesh
    batch_size: int
    limit: int = 0
    subset_seed: int = 0
    seed: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks of the examples."""
        return self.examples.tasks

    def numbers(self, source: int) -> list[int]:
        """Numbers of the chosen examples of a task, ascending."""
        return randomness.subset(len(self.examples.sources[source]), self.limit, self.subset_seed)

    def without_visual_thoughts(self, source: int) -> int:
        """How many of the chosen examples of a task have nothing in the privileged blocks.

        By default these are the visual thoughts.
        """
        stored, names = self.examples.sources[source], self.packer.names.privileged
        return sum(not has_content(stored[n], names) for n in self.numbers(source))

    @property
    def privileged(self) -> str:
        """The privileged blocks in messages that say that an example has none of them."""
        names = self.packer.names.privileged
        if not names:
            return "a privileged block (the student has all blocks of the teacher)"
        return "visual thoughts" if names == ("visual_thoughts",) else f"any of {', '.join(names)}"

    def local(self, numbers: Sequence[int]) -> list[int]:
        """Those of a batch of examples that this process packs."""
        return [numbers[n] for n in sharding.local_batch_indices(self.mesh, len(numbers))]

    def put(self, host_batch: Any) -> Any:
        """Arrays of this process's part of a batch -> arrays of the whole batch on the mesh."""
        return sharding.put_batch(self.mesh, host_batch)

    def packed(
        self, source: int, numbers: Sequence[int], mode: str, bucket: int = -1
    ) -> tuple[list[PreparedExample], context_lib.Context]:
        """(prepared examples, their Context [B, T] in a mode) of numbered examples of a task.

        Args:
          mode: one of `CONTEXTS`, or "none" for the student's context.
          bucket: number of the bucket in config.data.buckets.
        """
        prepared = [self.examples(source, n) for n in numbers]
        if mode == "none":
            return prepared, self.packer.student(prepared, bucket)
        partners = [self.examples.partner(source, n) if mode == "swap" else None for n in numbers]
        rngs = [self._noise(source, n) for n in numbers]
        return prepared, self.packer.teacher(prepared, partners, replacement(mode), rngs, bucket)

    def shown_images(self, source: int, n: int, mode: str) -> list[tuple[str, np.ndarray]]:
        """(caption, uint8 [H, W, 3]) of the images in an example's context, for reports.

        The first are the problem images, whether the context has them or not.
        """
        example = self.examples(source, n)
        found = [
            (f"problem {k}" if len(example.problems) > 1 else "problem", _pixels(image))
            for k, image in enumerate(example.problems, 1)
        ]
        kind, content = "student", example.content
        if mode != "none":
            partner = self.examples.partner(source, n) if mode == "swap" else None
            noise = self._noise(source, n)
            kind, content = "teacher", self.packer.shown(example, replacement(mode), partner, noise)
        counts: collections.Counter[str] = collections.Counter()
        for name, block in self.packer.named_blocks(example, kind, content):
            # A problem image is shown once, but in mode "image" also where it replaces another.
            if isinstance(block, blocks_lib.Image) and not (
                name == "image" and any(block is image for image in example.problems)
            ):
                counts[name] += 1
                title = "visual thought" if name == "visual_thoughts" else name
                found.append((f"{title} {counts[name]} ({mode})", _pixels(block)))
        return found

    def _noise(self, source: int, n: int) -> np.random.Generator:
        return generator(self.seed, "eval visual thoughts", source, n)


def _pixels(image: blocks_lib.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an image's patches, which may be normalised."""
    patches = image.patches
    if patches.dtype != np.uint8:
        patches = np.round(np.clip(patches + 1, 0, 2) * 127.5).astype(np.uint8)
    return images.unpatchify(patches, image.grid, round((patches.shape[1] / 3) ** 0.5))


def benchmarks(selection: Selection, modes: Iterable[str]) -> list[Benchmark]:
    """The tasks of a selection as benchmarks.

    Their sizes are the buckets that hold the contexts of all the modes.
    """
    modes, found = tuple(modes), []
    for source in range(len(selection.tasks)):
        task = benchmark_lib.of_examples(
            selection.examples,
            source,
            limit=selection.limit,
            seed=selection.subset_seed,
        )
        buckets = dict(zip(task.keys, buckets_of(selection, source, modes), strict=True))
        without = None
        if set(modes) & set(CONTEXTS):
            without = selection.without_visual_thoughts(source)
        found.append(
            dataclasses.replace(task, size=buckets.__getitem__, without_visual_thoughts=without)
        )
    return found


def buckets_of(selection: Selection, source: int, modes: Iterable[str]) -> list[int]:
    """For each chosen example of a task the bucket that holds its context in all of the modes.

    With a single bucket nothing is read; otherwise every process reads all of these examples.
    """
    numbers, packer = selection.numbers(source), selection.packer
    if len(packer.buckets.student) == 1:
        return [0] * len(numbers)

    def find(n):
        return max(packer.fitting(*_blocks_of(selection, source, n, mode)) for mode in modes)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(find, numbers))


def _blocks_of(selection: Selection, source: int, n: int, mode: str) -> tuple[str, list]:
    """(kind of context, blocks) of an example in a mode.

    Mode noise: the blocks with the real content, which have the same sizes.
    """
    example, packer = selection.examples(source, n), selection.packer
    if mode == "none":
        return "student", packer.blocks(example, "student")
    partner = selection.examples.partner(source, n) if mode == "swap" else None
    shown = packer.shown(example, "real" if mode == "noise" else replacement(mode), partner)
    return "teacher", packer.blocks(example, "teacher", shown)


def check_fit(selection: Selection, modes: Iterable[str], *, traces: bool = False) -> None:
    """Checks that contexts of all modes fit a bucket, and (traces) text traces their targets.

    Raises:
      TooLongError: names the example by its pid. ValueError: a stored answer matches no completion.
    """
    packer, modes = selection.packer, tuple(modes)
    for source, name in enumerate(selection.tasks):
        numbers = selection.numbers(source)
        selection.examples.check_references(source, numbers)
        for n in numbers:
            example = selection.examples(source, n)
            for mode in modes:
                kind, blocks = _blocks_of(selection, source, n, mode)
                positions, patches = context_lib.need(blocks)[:2]
                largest = packer.buckets[kind][-1][:2]
                if positions > largest[0] or patches > largest[1]:
                    raise context_lib.TooLongError(
                        f"example {example.example.pid} of {name}, to be evaluated in mode {mode}, "
                        f"needs {positions} positions and {patches} patches, the largest of "
                        f"config.data.buckets.{kind} has {largest}: enlarge it, or change "
                        f"config.eval. {packing.SIZES}"
                    )
            if traces:
                packer.references([example])


def modes_of(selection: Selection) -> tuple[str, ...]:
    """`CONTEXTS`, without "image" where it would be the mode "remove" of a task."""
    replaces = blocks_lib.replaces_images(selection.packer.names) and all(
        _has_problem_images(selection, source) for source in range(len(selection.tasks))
    )
    return tuple(mode for mode in CONTEXTS if replaces or mode != "image")


def _has_problem_images(selection: Selection, source: int) -> bool:
    """Whether a chosen example of a task has a problem image."""
    stored = selection.examples.sources[source]
    return any(has_content(stored[n], ("image",)) for n in selection.numbers(source))


def check_visual_thoughts(selection: Selection, modes: Iterable[str], split: str) -> None:
    """ValueError where no chosen example of a task has what a mode shows.

    These are the privileged blocks; in mode "image" also a problem image.
    """
    for mode in (mode for mode in modes if mode in CONTEXTS):
        for source, name in enumerate(selection.tasks):
            if selection.without_visual_thoughts(source) == len(selection.numbers(source)):
                raise ValueError(
                    f"--visual_thoughts={mode}: no example of {name}, {split}, has "
                    f"{selection.privileged}: leave "
                    "the mode or the task out"
                )
            if mode == "image" and not _has_problem_images(selection, source):
                raise ValueError(
                    f"--visual_thoughts=image: no example of {name}, {split}, has a problem image "
                    "to show in the place of others: leave the mode or the task out, or choose "
                    "remove, which shows the teacher's texts alone"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class ContextPredictor:
    """Answers a batch of examples in the contexts of a mode, with one call of the jitted sampler.

    Attributes:
      params: the model's dict, laid out for the sampler.
      selection: the selection of the examples.
      mode: one of `CONTEXTS`, or "none".
      sampling: how answers are decoded. Greedy decoding makes them independent of batches.
      samples: answers that are sampled for each example; 0 for one greedy answer.
      seed: seed of the samples. They also depend on the batch that the example is in.
    """

    params: dict
    selection: Selection
    mode: str
    sampling: RolloutConfig
    samples: int = 0
    seed: int = 0

    def __call__(self, number: int, benchmark: Benchmark, keys: list[int]) -> dict:
        selection, source = self.selection, self.selection.tasks.index(benchmark.name)
        bucket = max(map(benchmark.size, keys))
        local = selection.local(inference.filled(keys, selection.batch_size))
        _, packed = selection.packed(source, local, self.mode, bucket)
        packed, placed = selection.put((packed, np.asarray(local, np.int32)))

        keys_of_samples = [jax.random.key(0)]  # greedy decoding does not use it
        if self.samples:
            of_batch = jax.random.fold_in(jax.random.key(self.seed), number)
            keys_of_samples = list(jax.random.split(of_batch, self.samples))

        def ask():
            return [
                rollout.sample(self.params, packed, key, config=self.sampling)
                for key in keys_of_samples
            ]

        found, seconds, compiled = inference.timed(ask)
        every = [self._read(one, placed, source) for one in found]
        predictions = every[0]
        if self.samples:
            predictions = {
                n: first | {"samples": [_as_sample(one[n]) for one in every]}
                for n, first in predictions.items()
            }
        return {
            "predictions": [predictions[key] for key in keys],
            "seconds": seconds,
            "compiled": compiled,
        }

    def _read(self, found: rollout.Trajectory, placed: jax.Array, source: int) -> dict[int, dict]:
        """{number of the example: prediction} of a sampled batch.

        placed: int32 [B], the examples' numbers.
        """
        found, placed = sharding.gather_to_host((found, placed))
        predictions = {}
        for b, n in enumerate(placed.tolist()):
            ids, example = (
                found.tokens[b][found.mask[b]],
                self.selection.examples.sources[source][n],
            )
            text = self.selection.packer.tokenizer.decode(ids)
            answer, hit = benchmark_lib.score(example, text)
            predictions[n] = {
                "index": n,
                "pid": example.pid,
                "prediction": text,
                "answer": answer,
                "expected": example.answer,
                "hit": hit,
                "tokens": len(ids),
                "stop": "eos" if found.stop[b] == rollout.STOP_EOS else "budget",
                "image_skips": int(found.num_skips[b]),
            }
        return predictions


def _as_sample(prediction: dict) -> dict:
    """What is kept of each of several answers to an example."""
    return {key: prediction[key] for key in ("prediction", "answer", "hit", "tokens", "stop")}


def answer_all(
    params: dict,
    selection: Selection,
    mode: str,
    *,
    sampling: RolloutConfig,
    on_batch: Callable[[inference.Answered], None] = lambda progress: None,
    before_batch: BeforeBatch = never_stop,
) -> list[results_lib.Result]:
    """Greedy answers to all examples of a selection in one mode, kept in memory.

    Returns one Result per task.

    Args:
      params: the model's dict, laid out for the sampler. mode: one of `CONTEXTS`, or "none".
      sampling: greedy. on_batch, before_batch: see `inference.answer`.
    """
    tasks = benchmarks(selection, (mode,))
    batches = inference.batches(tasks, selection.batch_size)
    records = inference.answer(
        batches,
        ContextPredictor(params, selection, mode, sampling),
        on_batch=on_batch,
        before_batch=before_batch,
    )
    assert records is not None  # without a store, each process has all of them
    return results_lib.collect(tasks, batches, records)
