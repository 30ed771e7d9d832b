"""What the examples of a run need of `config.data.buckets`.

  settings, data -> what each example needs -> a table, and sizes that fit all examples

No image is decoded: the headers of their files tell their sizes.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check, images, tasks
from opsd_jax.blocks import Image
from opsd_jax.context import TooLongError
from opsd_jax.data import bucket_index, existing, packing, schema
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.examples import Examples, Preprocessor
from opsd_jax.data.packing import Packer
from opsd_jax.inputs import checks
from opsd_jax.runtime.progress import Progress
from opsd_jax.tasks import parquet, vocabulary

_MANY = 1000  # examples: a progress bar is shown for more
_SAMPLE = 64  # examples of a family: their texts differ in length by a few tokens at most
_SPARE = 8  # positions that a longer example than those may need


@dataclasses.dataclass(frozen=True)
class Use:
    """What a run does with the examples of a split.

    Attributes:
      split: the split.
      setting: the setting that names it, for messages.
      modes: what is shown in the place of visual thoughts (`config.MODES`).
      trains: whether the run trains on them. Otherwise it evaluates them.
      traces: whether an evaluation measures the KL on their text traces.
    """

    split: str
    setting: str
    modes: frozenset[str]
    trains: bool = False
    traces: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """What an example needs.

    Attributes:
      name: pid, task and split.
      trains: whether it is one to train on.
      needs: {kind of buckets: sizes}, see `Packer.needs`.
      answer: tokens of its text trace, with the one that ends it; 0 without a trace.
    """

    name: str
    trains: bool
    needs: dict[str, np.ndarray]
    answer: int


def report(config: ConfigDict, workdir: str = "", count: int = 1) -> str:
    """A table of what the examples of a run need, and options for `count` buckets that fit all.

    Args:
      workdir: folder of the run; needed where config.data.dir is empty.
    Raises:
      ValueError, FileNotFoundError: settings, data or a tokenizer that the run would refuse, too.
    """
    data_dir, packer = existing.open_data(config, workdir)
    rows = [row for use in _uses(config) for row in _measured(config, data_dir, packer, use)]
    used = _used_kinds(config)
    refused = [row for row in rows if used.intersection(packer.too_small(row.needs))]
    options = _options(rows, count)
    # A split that is read twice counts once.
    count_all, count_refused = (len({row.name for row in some}) for some in (rows, refused))
    longest = max(row.answer for row in rows)
    if longest > config.rollout.max_new_tokens:
        options["rollout.max_new_tokens"] = longest
    lines = [*_table(rows), ""]
    if refused:
        lines.append(
            f"The present settings refuse {count_refused} of {count_all} examples "
            f"({100 * count_refused / count_all:.1f} %). These fit all:"
        )
    else:
        lines.append(f"The present settings fit all {count_all} examples. The smallest that do:")
    lines += ["", " ".join(f'--config.{key}="{value}"' for key, value in options.items())]
    return "\n".join(lines + _contradiction(config, options))


def check_training(config: ConfigDict, data_dir: str, packer: Packer) -> None:
    """Checks that all examples that a run and its arms train on fit the only bucket.

    Otherwise the first batch with one that does not would end the run, after hours maybe, and other
    buckets would be a new run. Where there are several buckets, `bucket_index` checks. Data that
    the run makes itself are not read: their sizes are known.

    Raises TooLongError, with the first example and what all need.
    """
    if bucket_index.is_needed(config_lib.data(config)) or not config.data.dir:
        return
    rows = list(_measured(config, data_dir, packer, _uses(config)[0]))
    if refused := _refused(config, packer, rows):
        raise TooLongError(f"{refused}. {packing.SIZES}")


def check_unmade(config: ConfigDict) -> None:
    """Checks a few of the procedural examples that a run makes itself, before it makes them.

    The buckets of such data are known, but other prompts, blocks or image sizes need others.

    Raises TooLongError, with the first example and what these need; the errors of a tokenizer.
    """
    data = config_lib.data(config)
    if data.dir or not data.make.train or data.on_too_long == "skip":
        return
    with tempfile.TemporaryDirectory() as folder:
        if not config.tokenizer:
            vocabulary.build_tokenizer(folder)
        try:
            tok = config_lib.load_tokenizer(config, config.tokenizer or folder)
        except ValueError as error:  # the temporary folder says nothing
            made = workdir_lib.tokenizer_folder(config.tokenizer, "W/data")
            raise ValueError(str(error).replace(folder, made)) from error
    sources = {}
    for family in data.make.families:
        task = tasks.FAMILIES[family].TASK
        if task.lower() in map(str.lower, data.tasks):
            count, seed = min(data.make.train, _SAMPLE), data.make.seed
            stream = tasks.generate(
                family, "train", count, seed=seed, difficulty=data.make.difficulty
            )
            sources[task] = [
                schema.read_row(row, file=task, index=n, task=task)[0]
                for n, row in enumerate(parquet.rows(stream, task))
            ]
    packer, use = Packer.from_config(config, tok), _uses(config)[0]
    examples = Examples(sources, _preprocessor(config, packer))
    rows = [
        _need(examples, packer, use, (s, n))
        for s, source in enumerate(examples.sources)
        for n in range(len(source))
    ]
    if refused := _refused(config, packer, rows):
        small = dict.fromkeys(kind for row in rows for kind in packer.too_small(row.needs))
        largest = _largest(rows)
        spare = {kind: (_SPARE, *[0] * (len(largest[kind]) - 1)) for kind in small}
        options = " ".join(
            f'--config.data.buckets.{kind}="({tuple(map(int, sizes))},)"'
            for kind in small
            for sizes in [np.maximum(np.add(largest[kind], spare[kind]), packer.buckets[kind][-1])]
        )
        raise TooLongError(
            f"Of the first examples that the run would make {refused}. Other prompts, blocks or "
            f"image sizes need other buckets: give {options}"
        )


def _refused(config: ConfigDict, packer: Packer, rows: Sequence[Row]) -> str:
    """How many training examples do not fit the largest bucket, and why the first; "" for none."""
    used = _used_kinds(config)
    refused = [row for row in rows if used.intersection(packer.too_small(row.needs))]
    if refused:
        kinds = [k for k in packer.too_small(refused[0].needs) if k in used]
        first = "; ".join(
            f"config.data.buckets.{kind} is {packer.buckets[kind][-1]}, it needs "
            + ", ".join(
                f"{size} {what}"
                for size, what in zip(refused[0].needs[kind], config_lib.BUCKET_SIZES[kind])
            )
            for kind in kinds
        )
        return (
            f"{len(refused)} of {len(rows)} training examples are too long, first "
            f"{refused[0].name}: {first}"
        )
    return ""


def _uses(config: ConfigDict) -> list[Use]:
    """What the run and its arms read."""
    runs = existing.runs(config)
    teachers = {run.teacher.visual_thoughts for run in runs}
    contrasts = {"swap" for run in runs if config_lib.contrasts_swapped(run)}
    found, c = [Use("train", "training", frozenset(teachers | contrasts), trains=True)], config.eval
    if c.every:
        modes = {*c.visual_thoughts, *teachers}
        found.append(Use(c.split, "config.eval.split", frozenset(modes)))
    if c.final_split:
        modes = {*c.final_visual_thoughts, *(("real",) if c.kl else ())}
        found.append(Use(c.final_split, "config.eval.final_split", frozenset(modes), traces=c.kl))
    return found


def _used_kinds(config: ConfigDict) -> set[str]:
    """The kinds of buckets that an example must fit; all where there are several to choose from."""
    if len(config.data.buckets.student) > 1 or config.data.on_too_long == "skip":
        return {*config_lib.BUCKET_SIZES}
    used = {"student", "teacher"} if config.eval.every or config.eval.final_split else set()
    for run in existing.runs(config):
        for stage in run.stages:
            used |= {"opsd": {"student", "teacher"}, "autoencoder": {"drawn"}}.get(stage, {"trace"})
            if config_lib.trains_generation(run, stage):
                used.add("drawn")
        if run.data.screen.on:  # it scores the traces
            used.add("trace")
    return used


def _measured(config: ConfigDict, data_dir: str, packer: Packer, use: Use) -> Iterator[Row]:
    """What the examples of a split need, in order."""
    data, preprocess = config_lib.data(config), _preprocessor(config, packer)
    examples = Examples.open(data, data_dir, use.split, preprocess, asked_by=use.setting)
    measure = functools.partial(_need, examples, packer, use)
    places = [(s, n) for s, source in enumerate(examples.sources) for n in range(len(source))]
    with (
        ThreadPoolExecutor(data.threads) as pool,
        Progress(len(places), f"measuring {use.split}", primary=len(places) > _MANY) as bar,
    ):
        for done, row in enumerate(pool.map(measure, places), 1):
            bar.update(done)
            yield row


def _preprocessor(config: ConfigDict, packer: Packer) -> Preprocessor:
    generates = any(config_lib.trains_generation(config, stage) for stage in config.stages)
    return Preprocessor.from_config(config, packer.tokenizer, generation=generates)


def _need(examples: Examples, packer: Packer, use: Use, place: tuple[int, int]) -> Row:
    """What an example needs. place: its source and its index there."""
    source, index = place
    example, partner = examples.measured(source, index), None
    modes = {"none" if mode == "remove" else mode for mode in use.modes}
    if "swap" in modes:
        partner = examples.measured(source, examples.partner_of(source, index))
    name = f"{example.example.pid} ({examples.tasks[source]}, {use.split})"
    parts = (part for part in example.content.values() if isinstance(part, tuple))
    for image in (block for part in parts for block in part if isinstance(block, Image)):
        try:
            if packer.side > 1:  # 0: a tower of any size; 1: the model reads text alone
                images.position_ids(image.grid, packer.side)
        except ValueError as error:
            raise ValueError(f"example {name}: {error}") from None
    needs, answer = packer.needs(example, sorted(modes), partner), 0
    if use.traces or example.example.full_text_only_thought.strip():
        answer = len(packer.reference(example)) + 1
    if not use.trains:
        needs = {kind: needs[kind] for kind in ("student", "teacher")}
        if use.traces:
            needs["trace"] = np.array([0, 0, answer - 1])
    return Row(name, use.trains, needs, answer)


def _options(rows: Sequence[Row], count: int) -> dict[str, int | tuple]:
    """Settings with the smallest buckets, each for as many of the training examples as the others.

    The last bucket fits all examples.
    """
    trained = sorted(
        (row for row in rows if row.trains),
        key=lambda row: sum(int(sizes[0]) for sizes in row.needs.values()),
    )
    shares = [trained[: math.ceil(len(trained) * n / count)] for n in range(1, count)]
    buckets = [_largest(share) for share in [*shares, rows]]
    distinct = [b for n, b in enumerate(buckets) if b not in buckets[:n]]
    return {
        f"data.buckets.{kind}": tuple(bucket[kind] for bucket in distinct) for kind in distinct[0]
    }


def _largest(rows: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """{kind: the largest of each size that some examples need}."""
    kinds = dict.fromkeys(kind for row in rows for kind in row.needs)
    return {
        kind: tuple(np.max([r.needs[kind] for r in rows if kind in r.needs], axis=0).tolist())
        for kind in kinds
    }


def _table(rows: Sequence[Row]) -> list[str]:
    """Lines: of each size the median, the 95th percentile, the largest, and who needs that.

    A size that no example needs has no line.
    """
    lines = [("", "", "median", "95 %", "largest", "of example")]
    for kind, counted in config_lib.BUCKET_SIZES.items():
        having = [row for row in rows if kind in row.needs]
        for column, what in enumerate(counted if having else ()):
            values = np.array([row.needs[kind][column] for row in having])
            values, owners = values[values > 0], [r for r, n in zip(having, values) if n > 0]
            if not owners:  # patches of questions without images
                continue
            lines.append(
                (
                    kind if column == 0 else "",
                    what,
                    f"{np.percentile(values, 50):.0f}",
                    f"{np.percentile(values, 95):.0f}",
                    f"{values.max()}",
                    owners[int(values.argmax())].name,
                )
            )
    return checks.table(lines).splitlines()


def _contradiction(config: ConfigDict, options: dict) -> list[str]:
    """What else has to change with these options, as lines; [] for nothing."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(options)
    try:
        config_check.check(changed)
    except ValueError as error:
        return ["", f"With these options, {error}"]
    return []
