"""Prepared rows -> batches of contexts on the device; and the command line that prepares them.

  python -m opsd_jax.data prepare --source=PARQUET_DIR --target=DIR [--on_bad_row=skip]
  python -m opsd_jax.data make-mini --target=DIR [--families=maze,chart] [--train=4000]

Every batch is a pure function of (seed, step): a host needs the step number alone to resume, and any number of
hosts read the same global batches.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import threading

import numpy as np

from opsd_jax import (
    cli,
    config as config_lib,
    context as context_lib,
    distributed,
    files,
    images,
    json_files,
    locks,
    paths,
    tags,
    tasks,
    tokenizer as tokenizer_lib,
)
from opsd_jax.context import Batch, GenerationBatch, Image, PaddedImages
from opsd_jax.datasets import visual_opsd
from opsd_jax.datasets.plan import BatchPlan
from opsd_jax.datasets.visual_opsd import Example


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A row ready for packing: the example, its question's ids, its pictures cut into patches.

    pixels: the same pictures, problem first, as the autoencoder sees them, uint8 [H, W, 3]; empty where nothing draws.
    """

    example: Example
    question: np.ndarray
    problem: Image
    visual_thoughts: tuple[Image, ...]
    pixels: tuple[np.ndarray, ...] = ()


def folder(config, workdir: str) -> str:
    """The TFDS data_dir of a run: config.data.dir, else <workdir>/data."""
    paths.check("config.data.dir", config.data.dir)
    return config.data.dir or os.path.join(workdir, "data")


_WRITE_AGAIN = (
    "delete the file and give the run's training command once more, which writes it again (checkpoints hold the "
    "settings, too)"
)


def load_config(workdir: str):
    """The settings of the run in a workdir, as ConfigDict. FileNotFoundError if there is no run; ValueError if its record
    of them cannot be read."""
    record, config = read_record(workdir), config_lib.default()
    try:
        config.update(record)  # JSON's lists become tuples where the default is one
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{workdir}/config.json holds settings of another type ({error}): {_WRITE_AGAIN}"
        ) from error
    return config


def read_record(workdir: str) -> dict:
    """What <workdir>/config.json holds: the settings as JSON; the errors of `load_config`."""
    paths.check_given("--workdir", workdir, orbax=True)
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{workdir} holds no run (no {path}): give the --workdir of a run of "
            "`python -m opsd_jax.train`, or of one of its arms, W/arms/NAME"
        )
    return json_files.read(path, fix=_WRITE_AGAIN)


def workdir_of(config, workdir: str) -> str:
    """The workdir whose data the run in `workdir` used: its own, or for an arm (W/arms/NAME) the run's, W."""
    places = {folder(config, w): w for w in (workdir, os.path.join(workdir, "..", ".."))}
    for place, where in places.items():
        if os.path.isdir(os.path.join(place, visual_opsd.NAME)):
            return where
    raise FileNotFoundError(
        f"the data of {workdir} are not there: looked for {visual_opsd.NAME}/ in "
        f"{' and '.join(places)}. Put them back, or set data.dir in "
        f"{workdir}/config.json"
    )


def with_tasks(config, chosen):
    """A copy of the settings with some of the tasks, each with its own entry of `data.limits`."""
    config = config.copy_and_resolve_references()
    limits = dict(zip(config.data.tasks, config.data.limits))
    config.data.tasks, config.data.limits = (
        tuple(chosen),
        tuple(limits[task] for task in chosen if limits),
    )
    return config


def make_if_absent(config, workdir: str) -> None:
    """Makes the procedural data of `config.data.make` in <workdir>/data, or finishes what was begun in the data folder.
    Where another command is doing that, waits until it is done.

    In a folder that `config.data.dir` names nothing is begun, because a mistyped name would be a new folder. What
    make-mini began there is finished; it may hold more families than `config.data.make` asks for.

    Raises FileNotFoundError if there are no data and none to make; ValueError if those that are there were made with
    other settings.
    """
    target = folder(config, workdir)
    make = _to_make(config, target)
    if make:
        with locks.only_writer(target, wait=True):
            make_procedural(target, make)


def check_there(config, workdir: str) -> None:
    """FileNotFoundError where `make_if_absent` finds no data and has none to make, or there is no tokenizer and none comes
    with the data; ValueError where they lack a task of config.data.tasks; makes nothing."""
    target = folder(config, workdir)
    make, prepared = _to_make(config, target), pathlib.Path(target, visual_opsd.NAME)
    families = {family: module.TASK for family, module in tasks.FAMILIES.items()}
    made = [families[family] for family in (make["families"] if make else ()) if family in families]
    there = {
        path.name: path.name
        for path in (prepared.iterdir() if prepared.is_dir() else ())
        if path.is_dir()
    }
    there |= {task.lower(): task for task in made}
    for task in config.data.tasks:
        if task.lower() not in there:
            more = (
                f"choose from {', '.join(sorted(there.values())) or 'none'}, or make another: config.data.make.families is "
                f"{tuple(make['families'])}, of {families}"
                if make
                else f"it holds {', '.join(sorted(there.values())) or 'none'}: choose from these, or prepare that one there"
            )
            raise ValueError(
                f"config.data.tasks names {task!r}, which the data in {target} lack: {more}"
            )
    if config.tokenizer or make is None:
        tokenizer_lib.check_there(tokenizer_folder(config, workdir))


def _to_make(config, target) -> dict | None:
    """With which settings procedural data are made or finished in the data folder; None: all is there, prepared from
    elsewhere. FileNotFoundError as `make_if_absent`."""
    was, make = (
        _made(target),
        json.loads(config.data.make.to_json()),
    )  # as it comes back from the record
    if was is None:
        if os.path.isdir(os.path.join(target, visual_opsd.NAME)):
            return None
        if config.data.dir or not make["families"]:
            if os.path.basename(os.path.abspath(target)) == visual_opsd.NAME:
                raise FileNotFoundError(
                    f"{target} holds no data itself: give the folder that it is in, "
                    f"--config.data.dir={os.path.dirname(os.path.abspath(target))}"
                )
            raise FileNotFoundError(
                f"{target} holds no data: make them with `python -m opsd_jax.data prepare --source=PARQUET_DIR "
                f"--target={target}` or `python -m opsd_jax.data make-mini --target={target}`, or give "
                f"--config.data.dir=FOLDER that holds {visual_opsd.NAME}/. Procedural data (config.data.make.families) "
                "are made by the run itself only where config.data.dir is empty"
            )
    elif not make["families"]:  # as they are
        make = was
    elif config.data.dir and {*make["families"]} <= {*was["families"]}:
        make["families"] = was["families"]
    if was is not None:
        _check_same(target, was, make)
    return make


def _check_same(target: str, was: dict, make: dict) -> None:
    """ValueError, with what differs, where a folder holds procedural data of other settings than `make`."""
    if differs := [key for key in {**was, **make} if was.get(key) != make.get(key)]:
        there, now = ({key: of.get(key, "absent") for key in differs} for of in (was, make))
        raise ValueError(
            f"{target} was made with other settings: config.data.make was {there} and is now {now}. Give those of "
            "the folder, use its data as they are (--config.data.make.families='()' of a run), choose another "
            f"folder, or delete {target} to make the data again"
        )


def make_procedural(target: str, make: dict) -> None:
    """Makes procedural data in a folder, or finishes what the same settings began there. make: as `config.data.make`.

    Raises ValueError if others were begun there; locks.FolderInUse.
    """
    with locks.only_writer(target):
        _make(target, json.loads(json.dumps(make)))  # lists for tuples, as in the record


def _make(target: str, make: dict) -> None:
    from opsd_jax.tasks import parquet

    was, made = _made(target), os.path.join(target, "made")
    if was is None:
        files.write_json(os.path.join(target, _RECORD), make)
    _check_same(target, was or make, make)
    if not os.path.isdir(made):
        counts = {split: make[split] for split in tasks.BUCKETS if make[split]}
        try:
            parquet.make_mini(
                made,
                families=make["families"],
                counts=counts,
                seed=make["seed"],
                difficulty=make["difficulty"],
            )
        except BaseException:  # nothing was begun: the corrected command may have other settings
            os.remove(os.path.join(target, _RECORD))
            raise
    parquet_dir = os.path.join(made, "parquet")
    try:
        visual_opsd.prepare(parquet_dir, target)  # does nothing where all is done
    except FileExistsError as error:
        raise FileExistsError(
            f"{target} was prepared from other files than {parquet_dir} holds now (was one edited?): delete "
            f"{target} and give the same command again, or prepare {parquet_dir} into another folder with "
            "`python -m opsd_jax.data prepare`"
        ) from error


_RECORD = "made.json"  # settings of the procedural data in a folder, written before them


def _made(target: str) -> dict | None:
    """With which settings procedural data were begun in a folder; None if none were. ValueError where it is damaged."""
    path = os.path.join(target, _RECORD)
    if not os.path.exists(path):
        return None
    fix = f"delete it to use the prepared data as they are, or delete {target} to make them again"
    was = json_files.read(path, fix=fix)
    if not isinstance(was.get("families"), list):
        raise ValueError(f"{path} names no families: {fix}")
    return was


def tokenizer_folder(config, workdir: str) -> str:
    """config.tokenizer, else the folder that making the procedural data left."""
    return config.tokenizer or os.path.join(folder(config, workdir), "made", "tokenizer")


def _open(where, split: str, task: str, limit: int) -> visual_opsd.Source:
    """A split of a task, of which `limit` rows are taken; 0: all."""
    source = visual_opsd.open_source(where, split, task=task)
    if limit > len(source):
        raise ValueError(
            f"config.data.limits asks for the first {limit} rows of {task}, but {where} holds {len(source)} for "
            f"{split}: give at most that, or 0 for all"
        )
    return visual_opsd.open_source(where, f"{split}[:{limit}]", task=task) if limit else source


class Rows:
    """Random access to the prepared rows of the tasks of a split, with a bounded cache. drawing: with `pixels`."""

    def __init__(self, config, workdir, tokenizer, split: str, drawing: bool = False):
        where = folder(config, workdir)
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
        self.drawing = drawing
        self._drawn_rule = images.vae_rule(config_lib.model(config).generation) if drawing else None
        self._cache, self._capacity = collections.OrderedDict(), config.data.cache_rows
        self._lock = threading.Lock()

    @functools.cached_property
    def digests(self) -> list[str]:
        """Checksum of the prepared rows of each task, on which caches depend; not asked for, nothing is read for it."""
        return [visual_opsd.digest(self._where, task) for task in self._tasks]

    def __call__(self, source: int, row: int) -> Prepared:
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
        prepared = Prepared(example, question, problem, tuple(thoughts), pixels)
        with self._lock:
            self._cache[key] = prepared
            while len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
        return prepared

    def _image(self, picture) -> Image:
        pixels = images.resize(picture, self._rule)
        grid = pixels.shape[0] // self._patch, pixels.shape[1] // self._patch
        return Image(images.patchify(pixels, self._patch), grid)

    def partner(self, source: int, row: int) -> Prepared:
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


class Packer:
    """Rows -> packed contexts of static buckets. The same for training, evaluation and diagnostics."""

    def __init__(self, config, tokenizer):
        self.tokenizer, self.prompts = tokenizer, config_lib.prompts(config)
        self.side, self.buckets = config.model.vit.side, config.data.buckets
        self.generation = config_lib.model(config).generation

    def blocks(self, row: Prepared, kind: str, visual_thoughts=()) -> list:
        """Blocks of a row as `student`, `teacher`, or one of the trace layouts `config.LAYOUTS`."""
        t, p, e = self.tokenizer, self.prompts, row.example
        if kind == "student":
            return context_lib.student(t, p, row.question, row.problem)
        if kind == "teacher":
            return context_lib.teacher(t, p, row.question, row.problem, visual_thoughts)
        if kind == "interleaved":
            return context_lib.interleaved(
                t, p, row.question, row.problem, e.thoughts, row.visual_thoughts, e.answer
            )
        if kind == "drawn":
            return self._drawn(row)
        trace = context_lib.Text(self.reference(row), loss=True)
        if kind == "reference":
            return [
                *context_lib.teacher(t, p, row.question, row.problem, row.visual_thoughts),
                trace,
            ]
        if kind == "text":
            return [*context_lib.student(t, p, row.question, row.problem), trace]
        raise ValueError(
            f"unknown layout {kind!r}: choose student, teacher or one of {config_lib.LAYOUTS}"
        )

    def _drawn(self, row: Prepared) -> list:
        """The interleaved trace as the model sees it when it draws: each picture as latents, then as patches, and each
        visual thought first as noised latents. The latents are filled in on the device (`flow.with_latents`)."""
        pictures, drawn, blocks = iter(row.pixels), self.generation, []
        for block in self.blocks(row, "interleaved"):
            if isinstance(block, Image):
                height, width, _ = next(pictures).shape
                grid = height // drawn.stride, width // drawn.stride
                empty = np.zeros((grid[0] * grid[1], drawn.latent_dim), np.float32)
                is_thought = any(isinstance(b, Image) for b in blocks)
                blocks += [context_lib.Latent(empty, grid, noised=True)] * is_thought + [
                    context_lib.Latent(empty, grid)
                ]
            blocks.append(block)
        return blocks

    def pictures(self, rows, bucket: int = -1) -> PaddedImages:
        """The pictures of rows for the autoencoder; None stands for a row without. TooLong where one does not fit."""
        _, count, height, width = self.buckets.drawn[bucket]
        pixels = np.zeros((len(rows), count, height, width, 3), np.uint8)
        sizes = np.zeros((len(rows), count, 2), np.int32)
        for r, row in enumerate(rows):
            shown = row.pixels if row else ()
            if len(shown) > count or any(x.shape[0] > height or x.shape[1] > width for x in shown):
                raise context_lib.TooLong(
                    f"row {row.example.pid} has pictures of {', '.join(f'{x.shape[0]}x{x.shape[1]}' for x in shown)} "
                    f"pixels, its bucket {count} of {height}x{width}: enlarge data.buckets.drawn, or leave the row out"
                )
            for m, picture in enumerate(shown):
                pixels[r, m, : picture.shape[0], : picture.shape[1]] = picture
                sizes[r, m] = picture.shape[:2]
        return PaddedImages(pixels, sizes)

    def reference(self, row: Prepared) -> np.ndarray:
        """Ids of the row's text-only trace with its answer."""
        e = row.example
        if not e.full_text_only_thought.strip():
            raise ValueError(
                f"row {e.pid} has no full_text_only_thought, which text and reference traces need: fill "
                "the column, or set the stage's mix to interleaved rows only and config.eval.kl to False"
            )
        return self.tokenizer.encode(context_lib.text_trace(e.full_text_only_thought, e.answer))

    def references(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """The rows' `reference`, padded to the targets of the largest bucket: int32 [B, R] and what is real, bool [B, R].
        TooLong where one does not fit."""
        width = self.buckets.trace[-1][2]
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for b, row in enumerate(rows):
            ids = self.reference(row)
            if len(ids) > width:
                raise context_lib.TooLong(
                    f"the text trace of row {row.example.pid} has {len(ids)} tokens, the largest of "
                    f"config.data.buckets.trace has room for {width}: enlarge it, or set config.eval.kl to False"
                )
            tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
        return tokens, mask

    def pack(self, rows, kind: str, bucket: int, blocks):
        """Contexts of blocks, a list a row, in the sizes of `data.buckets.<kind>[bucket]`."""
        slots, patches = self.buckets[kind][bucket][:2]
        return context_lib.pack(
            blocks,
            slots=slots,
            patches=patches,
            tokenizer=self.tokenizer,
            side=self.side,
            names=[row.example.pid for row in rows],
        )

    def student(self, rows, bucket: int = -1) -> context_lib.Context:
        """Student contexts: picture and question."""
        return self.pack(rows, "student", bucket, [self.blocks(row, "student") for row in rows])

    def teacher(self, rows, partners, mode: str, rngs, bucket: int = -1) -> context_lib.Context:
        """Teacher contexts with the visual thoughts of a mode (`context.VISUAL_THOUGHTS`). rngs: one a row, so that a
        row's noise does not depend on the others."""
        shown = [
            context_lib.replace_visual_thoughts(
                mode, row.problem, row.visual_thoughts, other.visual_thoughts if other else (), rng
            )
            for row, other, rng in zip(rows, partners, rngs, strict=True)
        ]
        return self.pack(
            rows,
            "teacher",
            bucket,
            [self.blocks(row, "teacher", vts) for row, vts in zip(rows, shown)],
        )

    def traces(self, rows, layouts, bucket: int = -1) -> context_lib.Supervised:
        """Traces to learn from, each row in its layout (`config.LAYOUTS`)."""
        slots, patches, targets = self.buckets.trace[bucket]
        sizes = {}
        if rows[
            0
        ].pixels:  # all batches of a stage that draws hold latents, whatever the layouts of this part of one
            sizes = {
                "latents": self.buckets.drawn[bucket][0],
                "latent_dim": self.generation.latent_dim,
                "latent_side": self.generation.side,
            }
        return context_lib.supervise(
            [self.blocks(row, layout) for row, layout in zip(rows, layouts)],
            slots=slots,
            patches=patches,
            targets=targets,
            tokenizer=self.tokenizer,
            side=self.side,
            names=[row.example.pid for row in rows],
            **sizes,
        )

    def bucket(self, row: Prepared, mode: str = "real", partner: Prepared | None = None) -> int:
        """Index of the first bucket that the row fits in every role; -1 if none does.

        It has room for the true visual thoughts and for those of `mode`, which a partner may have larger.
        """
        shown = context_lib.replace_visual_thoughts(
            "real" if mode == "noise" else mode,
            row.problem,
            row.visual_thoughts,
            partner.visual_thoughts if partner else (),
            None,
        )
        need = {
            "student": self._need([self.blocks(row, "student")]),
            "teacher": self._need(
                [self.blocks(row, "teacher", vts) for vts in (row.visual_thoughts, shown)]
            ),
        }
        layouts = [
            "interleaved",
            *(("reference", "text") if row.example.full_text_only_thought.strip() else ()),
            *(("drawn",) if row.pixels else ()),
        ]
        blocks = [self.blocks(row, layout) for layout in layouts]
        need["trace"] = self._need(blocks)
        if row.pixels:
            need["drawn"] = np.array(
                [
                    context_lib.need(blocks[-1])[2],
                    len(row.pixels),
                    *np.max([x.shape[:2] for x in row.pixels], axis=0),
                ]
            )
        for index in range(len(self.buckets.student)):
            if all(
                np.all(need[kind][: len(self.buckets[kind][index])] <= self.buckets[kind][index])
                for kind in need
            ):
                return index
        return -1

    def fitting(self, kind: str, blocks) -> int:
        """The first bucket of a kind of contexts that has room for a row's blocks; the last where none has, which packing
        will refuse by the row's name."""
        need, sizes = self._need([blocks])[:2], self.buckets[kind]
        return next((n for n, size in enumerate(sizes) if np.all(need <= size[:2])), len(sizes) - 1)

    @staticmethod
    def _need(rows):
        slots, patches, _ = zip(*map(context_lib.need, rows))
        targets = [
            sum(len(b.ids) + 1 for b in blocks if isinstance(b, context_lib.Text) and b.loss)
            for blocks in rows
        ]
        return np.array([max(slots), max(patches), max(targets)])


class Batches:
    """The training batches of a stage: host arrays of this process's rows for every step.

    share: which rows of a batch these are, see `sharding.local_rows`; None for all.
    """

    def __init__(self, config, workdir, stage: str, rows: Rows, packer: Packer, *, share=None):
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
        self.plan = BatchPlan(
            lengths, config.data.weights or None, list(buckets), batch_size, config.seed
        )

    def opsd(self, step: int, attempt: int = 0) -> tuple[Batch, list[Prepared]]:
        """Both contexts of the batch, and its rows."""
        bucket, pairs = self.plan(step, attempt)
        rows = [self.rows(*pairs[n]) for n in self._share]
        mode = self.config.teacher.visual_thoughts
        partners = [self.rows.partner(*pairs[n]) if mode == "swap" else None for n in self._share]
        rngs = [
            generator(self.config.seed, "visual thoughts", step, attempt, n) for n in self._share
        ]
        return Batch(
            self.packer.student(rows, bucket),
            self.packer.teacher(rows, partners, mode, rngs, bucket),
        ), rows

    def traces(self, step: int) -> tuple[context_lib.Supervised | GenerationBatch, list[Prepared]]:
        """Supervised traces in the layouts of the stage's mix, with their pictures where it draws."""
        bucket, pairs = self.plan(step)
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

    def pictures(self, step: int) -> tuple[PaddedImages, list[Prepared]]:
        """All pictures of the batch's rows."""
        bucket, pairs = self.plan(step)
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


def generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """Random numbers that depend on a seed, a use and counters only."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence([seed, *name.encode(), *numbers]))
    )


def _bucket_index(config, workdir, rows: Rows, packer: Packer, source: int) -> np.ndarray:
    """Bucket of every row of a source, int [rows]; computed once and kept in the workdir.

    Rows that fit no bucket: an error that names the first ones, or with data.on_too_long = "skip" -1 in the index
    and all their names in <workdir>/too_long.json.
    """
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    import jax

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
            config.model.generation.to_dict() if rows.drawing else None,
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


# --- command line ----------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    """`python -m opsd_jax.data prepare | make-mini`; errors in the data end it with one line and code 1."""
    import argparse

    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.data", description="Prepare data for training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="a folder of parquet -> ArrayRecord that TFDS reads"
    )
    prepare.add_argument(
        "--source",
        required=True,
        help="<Task>/data/train-*.parquet, the released layout, or one task",
    )
    prepare.add_argument("--target", required=True, help="the TFDS data_dir to write")
    prepare.add_argument("--on_bad_row", default="fail", choices=("fail", "skip"))
    prepare.add_argument("--limit", type=int, help="first rows of each split only")
    prepare.add_argument("--overwrite", action="store_true")
    mini = commands.add_parser("make-mini", help="make procedural tasks and prepare them")
    mini.add_argument("--target", required=True)
    mini.add_argument("--families", default=tuple(tasks.FAMILIES), type=cli.names)
    for split, count in (("train", 4000), ("validation", 512), ("test", 512)):
        mini.add_argument(f"--{split}", type=int, default=count, help="rows of each family")
    mini.add_argument("--difficulty", default="default", choices=("easy", "default", "hard"))
    mini.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            cli.check_number("limit", args.limit, 1)
            print(
                visual_opsd.prepare(
                    args.source,
                    args.target,
                    on_bad_row=args.on_bad_row,
                    limit=args.limit,
                    overwrite=args.overwrite,
                )
            )
        else:
            paths.check_given("--target", args.target)
            counts = {split: getattr(args, split) for split in tasks.BUCKETS}
            cli.check_once("families", args.families)
            for split, count in counts.items():
                cli.check_number(split, count, 0)
            if not any(counts.values()):
                raise ValueError(
                    "--train, --validation and --test are all 0: give at least one split a row"
                )
            cli.check_seed(args.seed)
            with locks.only_writer(args.target):
                if (
                    os.path.isdir(os.path.join(args.target, visual_opsd.NAME))
                    and _made(args.target) is None
                ):
                    raise FileExistsError(
                        f"{args.target} holds prepared data already: choose another --target"
                    )
                make_procedural(
                    args.target,
                    {
                        "families": args.families,
                        **counts,
                        "difficulty": args.difficulty,
                        "seed": args.seed,
                    },
                )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
