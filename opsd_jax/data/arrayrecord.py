"""Random access to the prepared examples of a task. `open_source` opens a split."""

import operator
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opsd_jax.data import schema, shards
from opsd_jax.inputs import checks

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def open_source(
    directory: str | os.PathLike,
    split: str = "train",
    task: str | None = None,
    *,
    asked_by: str = "",
) -> "Source":
    """Opens a prepared split.

    Args:
      directory: the version folder (.../visual_opsd/<task>/1.0.0), or with `task` the target of
        `prepare`.
      split: "train", or a TFDS slice such as "train[:512]", "train[10%:20%]", "train+validation".
      task: the task's name, such as "chart_refocus", in upper or lower case.
      asked_by: the setting or flag that names the split, for messages.

    Raises:
      FileNotFoundError: the folder is missing, its preparation is unfinished, or a shard is missing
        or truncated.
      ValueError: an unknown split, or a damaged file, which the message names. TypeError: a split
        that is no text.
    """
    checks.instance(asked_by or "split", split, str, "give the name of a split, such as 'test'")
    directory = shards.version_folder(directory, task) if task is not None else Path(directory)
    started, finished = (directory / "progress.json").exists(), (directory / shards.REPORT).exists()
    if started and not finished:
        raise FileNotFoundError(
            f"{directory} is not finished: run `{_prepare(directory)}` again, it continues where "
            "it stopped"
        )
    if not (directory / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no prepared data: make it with `{schema.prepare_command()}`, and "
            f"give DIR/{schema.NAME}/<task>/{schema.VERSION}, or DIR and the task"
        )
    return Source(directory, split, asked_by)


class Source:
    """Random access to a prepared split: `len(source)`, `source[i] -> Example`.

    Threads may share it, and it can be pickled.

    Attributes:
      directory: the version folder.
      split: the split as it was given.
      columns: names of the further columns that it holds, "text:COLUMN" or "images:COLUMN".
    """

    def __init__(self, directory: Path, split: str, asked_by: str = ""):
        self.directory, self.split = directory, split
        builder = _builder(directory)
        self.columns = schema.further_columns(builder.info.features)
        own = (*schema.IMAGE_FEATURES, schema.MORE_PROBLEMS, schema.PROBLEMS)
        held = filter(builder.info.features.__contains__, own)
        encoded = (*held, *schema.further_images(self.columns))
        for info in builder.info.splits.values():
            for path, rows in zip(info.filepaths, info.shard_lengths):
                if shards.count_records(path) != rows:
                    raise FileNotFoundError(
                        f"{path} is missing or truncated (it should hold {rows} rows): copy it "
                        f"again, or run `{_prepare(directory)}` again, which writes damaged files "
                        "again"
                    )
        try:
            self._records = builder.as_data_source(
                split, decoders={name: RawBytes() for name in encoded}
            )
            len(self._records)  # raises where a slice ends before it begins
        except (ValueError, KeyError) as error:
            asked = f"{asked_by} asks for the split" if asked_by else "the split"
            reason = re.split(r"Should be|See format|\n", str(error))[0].strip(" .")
            if "0 length" in reason or "__len__" in reason:  # TFDS and Python about an empty slice
                reason = "it holds no example"
            if not builder.info.splits:
                raise ValueError(
                    f"{directory}/dataset_info.json names no split: prepare the data again"
                ) from error
            name, held = max(builder.info.splits.items(), key=lambda item: item[1].num_examples)
            part = f"{name}[:{min(64, max(held.num_examples // 2, 1))}]"
            raise ValueError(
                f"{asked} {split!r} of {directory}: {reason}. The folder has the splits "
                f"{', '.join(builder.info.splits)}: give one of them, or a part of one, such as "
                f"{part!r}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"<{len(self)} examples, {self.split} of {self.directory}>"

    def __getitem__(self, index: int) -> schema.Example:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a source of {len(self)} examples")
        try:
            return schema.from_features(self._records[index])
        except Exception as error:  # TFDS and protobuf raise many types
            raise ValueError(
                f"{self.directory}, example {index} of {self.split}: it cannot be read ({error}): "
                "its file, or features.json, is damaged; delete the folder and run "
                f"`{_prepare(self.directory)}` again"
            ) from error

    def __reduce__(self):
        return Source, (self.directory, self.split)


class RawBytes:
    """TFDS decoder that leaves images encoded: `decoders={"reasoning_images": RawBytes()}`.

    It replaces tfds.decode.SkipDecoding, which in TFDS 4.9.10 cannot do a Sequence(Image) without
    TensorFlow. It has no state, so threads may share it.
    """

    def setup(self, *, feature: "tfds.features.FeatureConnector") -> None:
        """Called by TFDS before the first image."""

    def decode_example_np(self, image: bytes) -> bytes:
        """Called by TFDS for an image."""
        return image

    def decode_batch_example_np(self, images: np.ndarray) -> list[bytes]:
        """Called by TFDS for a sequence of images."""
        return list(images)


def describes(directory: Path, lengths: dict[str, list[int]]) -> bool:
    """Whether the files that TFDS reads describe these shards.

    lengths: {split: number of records of each shard, in order}.
    """
    try:
        splits = _builder(directory).info.splits
    except ValueError:
        return False
    return lengths == {name: info.shard_lengths for name, info in splits.items()}


def _prepare(directory: Path) -> str:
    """The command that prepares the folder in which a version folder is."""
    return schema.prepare_command(target=Path(*directory.parts[:-3]))


def _builder(directory: Path) -> "tfds.core.DatasetBuilder":
    """The TFDS builder of a prepared folder. Raises ValueError, which names the damaged file."""
    import tensorflow_datasets as tfds

    fix = f"run `{_prepare(directory)}` again, which writes it again"
    for name in ("features.json", "dataset_info.json"):  # the builder reads both
        try:
            if name == "features.json":
                held = {*tfds.features.FeatureConnector.from_config(directory)}
                absent = {*schema.TEXT_FEATURES, *schema.IMAGE_FEATURES} - held
                if schema.PROBLEMS in held:  # in the place of a single problem image
                    absent.discard(schema.IMAGE_FEATURES[0])
                if absent:
                    raise ValueError(f"it lacks {', '.join(sorted(absent))}")
            else:
                builder = tfds.builder_from_directory(directory)
                for split in builder.info.splits.values():
                    _ = split.filenames  # TFDS reads the entries of a split only here
        except Exception as error:  # TFDS and protobuf raise many types
            raise ValueError(
                f"{directory / name} is missing or damaged ({error}): {fix}"
            ) from error
    return builder
