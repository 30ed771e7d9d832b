"""Prepared examples as a model needs them: question as tokens, images as patches."""

import collections
import contextlib
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from ml_collections import ConfigDict
from PIL import Image as PILImage

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import images, tags, tasks
from opsd_jax.blocks import Content, Image
from opsd_jax.config import DataConfig
from opsd_jax.data import arrayrecord, schema, shards
from opsd_jax.data.schema import Example
from opsd_jax.inputs import columns as columns_lib
from opsd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedExample:
    """An example ready for packing.

    Attributes:
      example: the example itself.
      question: token ids of the question and the prompts' suffix, int [N]; of each text around the
        places of images in the question, where it has any (`blocks.question_ids`).
      problems: the problem images, cut into patches; () for a question without any.
      visual_thoughts: the visual thoughts, cut into patches.
      pixels: the same images, the problem images first, as the autoencoder sees them, uint8
        [H, W, 3]; None where no images are generated.
      further: the other blocks that contexts show, by name (`context.Content`): columns and
        transformed images.
    """

    example: Example
    question: np.ndarray | tuple[np.ndarray, ...]
    problems: tuple[Image, ...]
    visual_thoughts: tuple[Image, ...]
    pixels: tuple[np.ndarray, ...] | None = None
    further: Mapping[str, np.ndarray | tuple[Image, ...]] = dataclasses.field(default_factory=dict)

    @property
    def content(self) -> Content:
        """What the example has for each block of a context."""
        return {
            "image": self.problems,
            "question": self.question,
            "visual_thoughts": self.visual_thoughts,
            **self.further,
        }


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """How an example is turned into tokens and patches.

    Attributes:
      tokenizer: tokenizer of the question.
      suffix: text appended to every question; "" for none.
      resize: size rule of the images that are cut into patches.
      transparency: how transparent pixels are read, see `images.open_rgb`.
      patch_size: side of a patch, in pixels.
      merge: patches along a side of the block that becomes one token.
      vae_resize: size rule of the images for the autoencoder; None to leave those out.
      further: names of the blocks that need a column or a transform.
      transforms: parameters of the image transforms.
    """

    tokenizer: Tokenizer
    suffix: str
    resize: images.Rule
    transparency: str
    patch_size: int
    merge: int = 1
    vae_resize: images.Resize | None = None
    further: tuple[str, ...] = ()
    transforms: images.Transforms = images.Transforms()

    @classmethod
    def from_config(
        cls, config: ConfigDict, tokenizer: Tokenizer, *, generation: bool = False
    ) -> "Preprocessor":
        """The preprocessor of a run's settings.

        generation: whether to prepare the images for the autoencoder, too.
        """
        sizes = config_lib.generation(config) if generation else None
        names = config_lib.block_names(config).contents
        return cls(
            tokenizer=tokenizer,
            suffix=config.prompts.suffix,
            resize=config_lib.resize_rule(config),
            transparency=config.images.transparency,
            patch_size=config.model.vit.patch_size,
            merge=config.model.vit.merge,
            vae_resize=images.vae_rule(sizes) if sizes else None,
            further=tuple(name for name in names if name not in blocks_lib.CONTENTS),
            transforms=config_lib.transforms(config),
        )

    def __call__(self, example: Example) -> PreparedExample:
        """Raises images.UnreadableImageError, ValueError (a wrong crop, or another number of places
        in the question than of images), with the example's pid."""
        with _named(example):
            shown = [self._open(d) for d in (*example.problem_images, *example.visual_thoughts)]
            further = self._further(
                example,
                lambda data: self._patches(self._open(data)),
                lambda name, n, box: self._cut(self.transforms(name, shown[n], self.resize, box)),
            )
        pixels: tuple[np.ndarray, ...] | None = None
        if self.vae_resize:
            pixels = tuple(images.resize(image, self.vae_resize) for image in shown)
        return self._prepared(example, [*map(self._patches, shown)], pixels, further)

    def measured(self, example: Example) -> PreparedExample:
        """The example with blank images, of the sizes that the model would see.

        It takes no memory and little time: only the headers of the images are read. Raises the
        errors of `__call__`.
        """
        with _named(example):
            shown = [
                images.size_of(data) for data in (*example.problem_images, *example.visual_thoughts)
            ]
            further = self._further(
                example,
                lambda data: self._blank(*self.resize(*images.size_of(data))),
                lambda name, n, box: self._blank(
                    *self.transforms.size(name, shown[n], self.resize, box)
                ),
            )
        blank = [self._blank(*self.resize(*size)) for size in shown]
        pixels: tuple[np.ndarray, ...] | None = None
        if self.vae_resize:
            pixels = tuple(
                np.broadcast_to(np.uint8(0), (height, width, 3))
                for width, height in (self.vae_resize(*size) for size in shown)
            )
        return self._prepared(example, blank, pixels, further)

    def _prepared(
        self,
        example: Example,
        shown: Sequence[Image],
        pixels: tuple[np.ndarray, ...] | None,
        further: dict[str, np.ndarray | tuple[Image, ...]],
    ) -> PreparedExample:
        """shown: the problem images, then the visual thoughts."""
        _check_places(example)
        count = len(example.problem_images)
        return PreparedExample(
            example,
            blocks_lib.question_ids(self.tokenizer, example.question, self.suffix),
            tuple(shown[:count]),
            tuple(shown[count:]),
            pixels,
            further,
        )

    def _further(
        self,
        example: Example,
        of_file: Callable[[bytes], Image],
        of_problem: Callable[[str, int, tuple[float, ...]], Image],
    ) -> dict[str, np.ndarray | tuple[Image, ...]]:
        """The blocks of columns and transforms.

        Args:
          of_file: makes an image block of an encoded image.
          of_problem: makes one of a problem image, with a transform, the number of the image, and a
            box for a crop.
        """
        found: dict[str, np.ndarray | tuple[Image, ...]] = {}
        for name in self.further:
            if name.startswith(blocks_lib.TRANSFORMED):
                transform = name.removeprefix(blocks_lib.TRANSFORMED)
                boxes = self._boxes(example, transform)
                found[name] = tuple(of_problem(transform, n, box) for n, box in enumerate(boxes))
                continue
            value = example.column(name)
            if not isinstance(value, str):
                found[name] = tuple(map(of_file, value))
            else:  # a blank text leaves its block out
                found[name] = () if tasks.is_blank(value) else self.tokenizer.encode(value)
        return found

    def _boxes(self, example: Example, transform: str) -> list[tuple[float, ...]]:
        """The example's own box for a crop of each problem image, () for that of the settings.

        The metadata have one box for all images, or a list of one for each. Raises ValueError if
        they lack it or it is none.
        """
        count, key = len(example.problem_images), self.transforms.crop_metadata
        if not key or transform != "crop":
            return [()] * count
        found = example.metadata.get(key)
        several = isinstance(found, list) and len(found) == count and isinstance(found[0], list)
        boxes = found if several else [found] * count
        if fault := next(filter(None, map(images.box_fault, boxes)), None):
            raise ValueError(
                f"example {example.pid}: its metadata has {key} = {found!r}, which {fault}. "
                "Correct the metadata column and prepare the data again, or set "
                "config.transforms.crop_metadata=''"
            )
        return [tuple(map(float, box)) for box in boxes]

    def _open(self, data: bytes) -> PILImage.Image:
        return images.open_rgb(data, transparency=self.transparency)

    def question(self, example: Example) -> tuple[list[PILImage.Image], str | tuple[str, ...]]:
        """(RGB images, text) of an example, as a question without a context around it.

        Instead of a text, the texts around the places of images, where the question has any
        (`interleave.Question`).
        """
        _check_places(example)
        *before, last = tags.around_places(example.question)
        opened, text = [*map(self._open, example.problem_images)], last + self.suffix
        return opened, (*before, text) if before else text

    def _patches(self, image: PILImage.Image) -> Image:
        return self._cut(images.resize(image, self.resize))

    def _cut(self, pixels: np.ndarray) -> Image:
        return blocks_lib.image_block(pixels, self.patch_size, self.merge)

    def _blank(self, width: int, height: int) -> Image:
        grid = height // self.patch_size, width // self.patch_size
        shape = grid[0] * grid[1], 3 * self.patch_size**2
        return Image(np.broadcast_to(np.uint8(0), shape), grid, self.merge)


def _check_places(example: Example) -> None:
    """Raises ValueError if a question has another number of places than the example has images.

    Preparation refuses it. This check is for folders that an older version prepared.
    """
    if fault := tags.places_fault(example.question, len(example.problem_images)):
        raise ValueError(
            f"example {example.pid}: its question {fault}. Correct it in the source and prepare "
            "the data again with --overwrite"
        )


@contextlib.contextmanager
def _named(example: Example) -> Iterator[None]:
    """Adds the example's pid to the error of an image."""
    try:
        yield
    except images.UnreadableImageError as error:
        raise images.UnreadableImageError(f"example {example.pid}: {error}") from error


class Examples:
    """Random access to the prepared examples of a split of some tasks: `examples(source, index)`.

    Threads may share it.

    Attributes:
      tasks: names of the tasks.
      sources: sources of the tasks, in the same order. A number of a source is its place here.
      preprocess: how an example is turned into tokens and patches.
    """

    def __init__(
        self,
        sources: Mapping[str, arrayrecord.Source],
        preprocess: Preprocessor,
        cache_size: int = 0,
    ):
        """
        Args:
          sources: {task: source}.
          cache_size: number of prepared examples that are kept in memory.
        """
        self.tasks, self.sources = tuple(sources), list(sources.values())
        self.preprocess = preprocess
        self._cache, self._cache_size = collections.OrderedDict(), cache_size
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        data: DataConfig,
        folder: str,
        split: str,
        preprocess: Preprocessor,
        *,
        asked_by: str = "",
    ) -> "Examples":
        """Opens a split of a run's data.

        Args:
          folder: the run's data folder, see `workdir.data_dir`.
          split: "train", whose examples `data.limits` bounds, or another split or TFDS slice.
          asked_by: the setting or flag that names the split, for messages.
        Raises:
          ValueError: a limit exceeds the data, or the data lack one of `data.columns`.
          ValueError, FileNotFoundError: see `arrayrecord.open_source`.
        """
        limits = data.limits if split == "train" and data.limits else [0] * len(data.tasks)
        sources = {
            task: _open_source(folder, split, task, limit, asked_by)
            for task, limit in zip(data.tasks, limits)
        }
        for task, source in sources.items():
            _check_columns(task, source, data.columns)
        return cls(sources, preprocess, data.cache_rows)

    @functools.cached_property
    def digests(self) -> list[str]:
        """Checksum of the prepared files of each task, on which caches depend. Files are read only
        when it is asked for."""
        return [shards.digest(source.directory) for source in self.sources]

    def __len__(self) -> int:
        """Number of examples of all tasks."""
        return sum(map(len, self.sources))

    def __repr__(self) -> str:
        counts = (f"{task} {len(source)}" for task, source in zip(self.tasks, self.sources))
        return f"<{len(self)} examples: {', '.join(counts)}>"

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index):
        """An example, counted through the tasks in order, or a list of the examples of a slice.

        Raises IndexError beyond the last.
        """
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        place = operator.index(index)
        place += len(self) * (place < 0)
        if not 0 <= place < len(self):
            raise IndexError(f"example {index} of {len(self)}: give 0 to {len(self) - 1}")
        for source in self.sources:
            if place < len(source):
                return source[place]
            place -= len(source)
        raise AssertionError  # place is below the sum

    def __call__(self, source: int, index: int) -> PreparedExample:
        """The example of an index in a source. Raises images.UnreadableImageError."""
        key = source, index
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        prepared = self.preprocess(self.sources[source][index])
        with self._lock:
            self._cache[key] = prepared
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return prepared

    def measured(self, source: int, index: int) -> PreparedExample:
        """The example with blank images of the right sizes, see `Preprocessor.measured`."""
        return self.preprocess.measured(self.sources[source][index])

    def partner(self, source: int, index: int) -> PreparedExample:
        """Another example of the same task: the one that is half a source further on.

        Raises ValueError if the source has no other.
        """
        return self(source, self.partner_of(source, index))

    def partner_of(self, source: int, index: int) -> int:
        """Index of that example."""
        size = len(self.sources[source])
        if size < 2:
            raise ValueError(
                "visual thoughts in mode swap are those of another example, and "
                f"{self.tasks[source]} has a single example in {self.sources[source].split}: raise "
                "its config.data.limits, or leave the task out"
            )
        return (index + size // 2) % size

    def without(self, names: Sequence[str]) -> list[str]:
        """The tasks of which no example has anything to show in one of these blocks.

        The examples of a task are read up to the first that has something.
        """
        return [
            task
            for task, source in zip(self.tasks, self.sources)
            if not any(has_content(source[n], names) for n in range(len(source)))
        ]

    def check_references(self, source: int, indices: Iterable[int]) -> None:
        """Checks that a completion can match the stored answers of examples.

        Preparation refuses others. This check is for folders that an older version prepared, and
        for faults that only the tokenizer shows.

        Raises ValueError, with the pids, if no completion matches, not even the one that training
        teaches.
        """
        found = []
        for index in indices:
            example = self.sources[source][index]
            if fault := self._reference_fault(example):
                found.append(f"example {example.pid}: {fault}")
        if found:
            raise ValueError(
                f"no completion can be right for {len(found)} examples of {self.tasks[source]} in "
                f"{self.sources[source].directory}: "
                f"{'; '.join(found[:5])}{' ...' if found[5:] else ''}. Correct them in the parquet "
                "files and prepare the folder again with `--overwrite`, or leave them out with "
                "`--on_bad_row=skip --overwrite`"
            )

    def _reference_fault(self, example: Example) -> str | None:
        """Why no completion matches an example's answer; None if one does."""
        tokenizer, taught = self.preprocess.tokenizer, tags.wrap_answer(example.answer)
        if fault := tasks.fault(example.metadata, taught):
            return fault
        ids = tokenizer.encode(taught).tolist()
        said = tokenizer.decode(ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids)
        if not tasks.judge(example.metadata, taught, said)[1]:
            return f"answer {example.answer!r} is read as {said!r} by the tokenizer"
        return None


def has_content(example: Example, names: Sequence[str]) -> bool:
    """Whether an example has anything to show in one of these blocks (`blocks.BlockNames`)."""
    for name in names:
        if name == "visual_thoughts":
            value: str | tuple = example.visual_thoughts
        elif name.startswith((columns_lib.TEXT, columns_lib.IMAGES)):
            value = example.column(name)
        elif name == "question":
            return True
        else:  # the problem images, as they are or transformed
            value = example.problem_images
        if not tasks.is_blank(value) if isinstance(value, str) else value:
            return True
    return False


def _check_columns(task: str, source: arrayrecord.Source, columns: Sequence[str]) -> None:
    """Raises ValueError if a task's prepared files lack further columns."""
    if absent := [name for name in columns if name not in source.columns]:
        held = ", ".join(source.columns) or "none"
        raise ValueError(
            f"config.data.columns names {', '.join(absent)}, which the prepared {task} in "
            f"{source.directory} lacks (its further columns: {held}): prepare it again with "
            f"`{schema.prepare_command(target=Path(*source.directory.parts[:-3]))} "
            f"--columns={','.join(columns)} --overwrite`"
        )


def _open_source(
    folder: str, split: str, task: str, limit: int, asked_by: str
) -> arrayrecord.Source:
    """A split of a task, or with a `limit` above 0 its first examples."""
    source = arrayrecord.open_source(folder, split, task=task, asked_by=asked_by)
    if limit > len(source):
        raise ValueError(
            f"config.data.limits asks for the first {limit} examples of {task}, but {folder} holds "
            f"{len(source)} for {split}: give at most that (of data.trace_limits, too), or 0 for "
            "all"
        )
    return arrayrecord.open_source(folder, f"{split}[:{limit}]", task=task) if limit else source
