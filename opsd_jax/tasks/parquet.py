"""Procedural examples as parquet files in the schema of the released data sets.

One reader serves both. The released column names are kept with their misspelling
(`resoning_thought_0`). One column is not in the released files: `metadata`, JSON with what
`tasks.score` needs.
"""

import io
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from opsd_jax.inputs import paths as paths_lib
from opsd_jax.tasks import VISUAL, generate, generator, wrong_traces
from opsd_jax.tasks.example import TaskExample
from opsd_jax.tasks.vocabulary import build_tokenizer

if TYPE_CHECKING:
    import pyarrow


def write(
    examples: Iterable[TaskExample],
    directory: str | os.PathLike,
    *,
    split: str,
    shard_rows: int = 2048,
    overwrite: bool = False,
) -> list[pathlib.Path]:
    """Writes examples of one task as `<directory>/<task>/data/<split>-00000-of-0000N.parquet`.

    One shard is in memory at a time. The shards get their names when all of them are written, so a
    failure leaves no shards.

    Returns: the paths of the shards, in order.
    Raises:
      FileExistsError: there are shards of this split and `overwrite` is false.
      ValueError: there are no examples, or examples of two tasks, or one that does not have two
        thoughts and one visual thought; without a problem image, one thought and no visual one.
    """
    import pyarrow.parquet as pq

    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows} must be at least 1")
    examples = iter(examples)
    first = next(examples, None)
    if first is None:
        raise ValueError(f"no examples to write for split {split!r} in {directory}")
    examples = itertools.chain([first], examples)
    folder = pathlib.Path(directory) / first.task / "data"
    existing = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing[0]} exists; choose another directory or pass overwrite=True"
        )
    folder.mkdir(parents=True, exist_ok=True)

    unfinished = []
    try:
        while shard := list(itertools.islice(examples, shard_rows)):
            unfinished.append(folder / f".tmp-{os.getpid()}-{split}-{len(unfinished):05d}")
            pq.write_table(_table(shard, first.task), unfinished[-1], row_group_size=256)
        for path in existing:  # shards of an older, longer set must not stay among the new ones
            path.unlink()
        paths = [
            folder / f"{split}-{index:05d}-of-{len(unfinished):05d}.parquet"
            for index in range(len(unfinished))
        ]
        for path, final in zip(unfinished, paths, strict=True):
            os.replace(path, final)
        return paths
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


def make_mini(
    target: str | os.PathLike,
    *,
    families: Iterable[str] = VISUAL,
    counts: Mapping[str, int],
    seed: int = 0,
    difficulty: str = "default",
    wrong: float = 0.0,
) -> None:
    """Makes a data set of procedural tasks and the tokenizer for it.

        <target>/parquet/<task>/data/*.parquet
        <target>/tokenizer/

    The tokenizer knows all families, so its ids do not depend on which of them are made. The
    examples of a split are shuffled, because `generate` uses up small problems first: so the first
    examples are like all the others. They keep the pids of `generate`.

    Args:
      counts: number of examples of each family by split, such as {"train": 4000, "validation": 512,
        "test": 512}.
      families, seed, difficulty: as for `generate`.
      wrong: share of the train split whose text trace is wrong, see `wrong_traces`; no other
        content depends on it.
    Raises:
      FileExistsError: `target` holds anything. A failure leaves no target, and what a killed
        process left is removed.
      ValueError: as `generate`.
    """
    paths_lib.check_given("target", target)
    target = pathlib.Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} is not an empty folder; remove it or choose another target"
        )
    unfinished = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for family in families:
            for split, count in counts.items():
                stream = generate(family, split, count, seed=seed, difficulty=difficulty)
                examples = list(stream)
                order = generator(f"order/{seed}/{split}/{family}").permutation(count)
                examples = [examples[n] for n in order]
                if wrong and split == "train":
                    rng = generator(f"wrong traces/{seed}/{family}")
                    examples = wrong_traces.mixed_in(examples, wrong, rng)
                write(examples, unfinished / "parquet", split=split)
        build_tokenizer(unfinished / "tokenizer")
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _table(examples: list[TaskExample], task: str) -> "pyarrow.Table":
    """The pyarrow.Table of a shard."""
    import pyarrow as pa

    records = rows(examples, task)
    image, text = pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string()
    schema = pa.schema(
        {
            "pid": text,
            "question": text,
            "answer": text,
            "problem_image_0": image,
            "resoning_thought_0": text,
            "reasoning_image_0": image,
            "resoning_thought_1": text,
            "task": text,
            "full_text_only_thought": text,
            "metadata": text,
        }
    )
    for name in {*schema.names} - {*records[0]}:  # of images, in families of texts
        schema = schema.remove(schema.get_field_index(name))
    return pa.Table.from_pylist(records, schema=schema)


def rows(examples: Iterable[TaskExample], task: str) -> list[dict]:
    """The examples as rows with the released columns: {column: value}; without those of images,
    and of the thought after one, in families of texts.

    Raises ValueError for an example of another task, or with another number of thoughts and visual
    thoughts: two and one, or one and none without a problem image.
    """
    records = []
    problem, thought = "problem_image_0", "reasoning_image_0"
    for example in examples:
        if example.task != task:
            raise ValueError(
                f"example {example.pid} is of task {example.task}, others of {task}; write each "
                "task on its own"
            )
        wanted = (1, 0) if example.problem_image is None else (2, 1)
        if (len(example.thoughts), len(example.visual_thoughts)) != wanted:
            raise ValueError(
                f"example {example.pid} has {len(example.thoughts)} thoughts and "
                f"{len(example.visual_thoughts)} visual thoughts; the schema of its task holds "
                f"{wanted[0]} and {wanted[1]}"
            )
        record = {
            "pid": example.pid,
            "question": example.question,
            "answer": example.answer,
            "resoning_thought_0": example.thoughts[0],
            "task": example.task,
            "full_text_only_thought": example.full_text_only_thought,
            "metadata": json.dumps(example.metadata),
        }
        if example.problem_image is not None:
            record["resoning_thought_1"] = example.thoughts[1]
            for column, image in (
                (problem, example.problem_image),
                (thought, example.visual_thoughts[0]),
            ):
                path = f"{example.pid}_{column}.png"
                record[column] = {"bytes": _png(image), "path": path}
        records.append(record)
    return records


def _png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
