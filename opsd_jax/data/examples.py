"""Random access to prepared examples."""

import collections
import dataclasses
import functools
import threading

import numpy as np

from opsd_jax import (
    config as config_lib,
)
from opsd_jax import (
    images,
    tags,
    tasks,
)
from opsd_jax.context import Image
from opsd_jax.data import arrayrecord
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.schema import Example


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedExample:
    """A row ready for packing: the example, its question's ids, its pictures cut into patches.

    pixels: the same pictures, problem first, as the autoencoder sees them, uint8 [H, W, 3]; empty where nothing draws.
    """

    example: Example
    question: np.ndarray
    problem: Image
    visual_thoughts: tuple[Image, ...]
    pixels: tuple[np.ndarray, ...] = ()


def _open(where, split: str, task: str, limit: int) -> arrayrecord.Source:
    """A split of a task, of which `limit` rows are taken; 0: all."""
    source = arrayrecord.open_source(where, split, task=task)
    if limit > len(source):
        raise ValueError(
            f"config.data.limits asks for the first {limit} rows of {task}, but {where} holds {len(source)} for "
            f"{split}: give at most that, or 0 for all"
        )
    return arrayrecord.open_source(where, f"{split}[:{limit}]", task=task) if limit else source


class Examples:
    """Random access to the prepared rows of the tasks of a split, with a bounded cache. drawing: with `pixels`."""

    def __init__(self, config, workdir, tokenizer, split: str, generation: bool = False):
        where = workdir_lib.folder(config, workdir)
        limits = (
            config.data.limits
            if split == "train" and config.data.limits
            else [0] * len(config.data.tasks)
        )
        self.sources = [
            _open(where, split, task, limit) for task, limit in zip(config.data.tasks, limits)
        ]
        self._where, self._tasks, self._tokenizer, self._suffix = (
            where,
            config.data.tasks,
            tokenizer,
            config.prompts.suffix,
        )
        self._rule, self._transparency = config_lib.resize_rule(config), config.images.transparency
        self._patch = config.model.vit.patch_size
        self.generation = generation
        self._drawn_rule = (
            images.vae_rule(config_lib.model(config).generation) if generation else None
        )
        self._cache, self._capacity = collections.OrderedDict(), config.data.cache_rows
        self._lock = threading.Lock()

    @functools.cached_property
    def digests(self) -> list[str]:
        """Checksum of the prepared rows of each task, on which caches depend; not asked for, nothing is read for it."""
        return [arrayrecord.digest(self._where, task) for task in self._tasks]

    def __call__(self, source: int, row: int) -> PreparedExample:
        key = source, row
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        example = self.sources[source][row]
        question = self._tokenizer.encode(example.question)
        if self._suffix:
            question = np.concatenate([question, self._tokenizer.encode(self._suffix)])
        try:
            shown = [
                images.open_rgb(data, transparency=self._transparency)
                for data in (example.problem_image, *example.visual_thoughts)
            ]
        except images.UnreadableImage as error:
            raise images.UnreadableImage(f"row {example.pid}: {error}") from error
        problem, *thoughts = map(self._image, shown)
        pixels = (
            tuple(images.resize(picture, self._drawn_rule) for picture in shown)
            if self._drawn_rule
            else ()
        )
        prepared = PreparedExample(example, question, problem, tuple(thoughts), pixels)
        with self._lock:
            self._cache[key] = prepared
            while len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
        return prepared

    def _image(self, picture) -> Image:
        pixels = images.resize(picture, self._rule)
        grid = pixels.shape[0] // self._patch, pixels.shape[1] // self._patch
        return Image(images.patchify(pixels, self._patch), grid)

    def partner(self, source: int, row: int) -> PreparedExample:
        """Another row of the same task: the one half a source further. ValueError where there is no other."""
        size = len(self.sources[source])
        if size < 2:
            raise ValueError(
                f"visual thoughts in mode swap are those of another row, and {self._tasks[source]} has a single "
                f"row in {self.sources[source].split}: raise its config.data.limits, or leave the task out"
            )
        return self(source, (row + size // 2) % size)

    def check_references(self, source: int, numbers) -> None:
        """ValueError that names the rows whose stored answer no completion matches, not even the one training teaches.

        Preparation refuses such rows; this is for folders that an older version prepared, and for what only the tokenizer
        tells.
        """
        found = []
        for n in numbers:
            example = self.sources[source][n]
            taught = tags.wrap_answer(example.answer)
            fault = tasks.fault(example.metadata, taught)
            if not fault:
                ids = self._tokenizer.encode(taught).tolist()
                said = self._tokenizer.decode(
                    ids[: ids.index(self._tokenizer.eos)] if self._tokenizer.eos in ids else ids
                )
                if not tasks.judge(example.metadata, taught, said)[1]:
                    fault = f"answer {example.answer!r} is read as {said!r} by the tokenizer"
            if fault:
                found.append(f"row {example.pid}: {fault}")
        if found:
            raise ValueError(
                f"no completion can be right for {len(found)} rows of {self._tasks[source]} in {self.sources[source].directory}: "
                f"{'; '.join(found[:5])}{' ...' if found[5:] else ''}. Correct them in the parquet files and prepare the folder "
                "again with --overwrite, or leave them out with --on_bad_row=skip --overwrite"
            )
