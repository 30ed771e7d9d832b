"""Questions of any benchmark put to a model, batch by batch; what was answered before a kill is kept.

  procedural tasks, prepared rows    one picture and one question; the rule of the task scores
  public tables (`benchmarks`)       their pictures and prompts; the rules of the public harness score

A benchmark here is names, keys and three functions, so that the loop and the page know neither kind.
"""

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax import images, interleave
from opsd_jax.data.randomness import generator, subset_facts
from opsd_jax.evaluation import statistics, tables
from opsd_jax.runtime import clock
from opsd_jax.runtime import files as files_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """keys: of its rows, in order. question: key -> (Pillow RGB images, text). expected: key -> the right answer.
    asked: key -> what tells the row from all others in any results: (pid, answer), or (md5 of the table, index).

    judge: {key: text} -> (what each prediction line gets besides, {key: {"hit": bool, ...}}; what the summary gets:
    overall, unit, n, categories, interval_95 and more). size: key -> number by which rows of like length are brought
    together: the pictures of a table's row, the bucket of a task's.
    """

    name: str
    keys: tuple
    question: Callable
    expected: Callable
    judge: Callable
    size: Callable = lambda key: 0
    table: tables.Table | None = None
    subset: dict | None = None  # see `randomness.subset_facts`
    asked: Callable = lambda key: ("", str(key))


def of_table(table: tables.Table, *, cache: str, limit: int = 0, seed: int = 0) -> Benchmark:
    """A public table as a benchmark. cache: see `benchmarks.images`. limit, seed: see `benchmarks.subset`."""
    part = tables.subset(table, limit, seed)
    rows = {row.index: row for row in part.rows}

    def question(key):
        text, places = tables.wrapper(tables.messages(rows[key]))
        shown = tables.images(rows[key], cache=cache)
        return [shown[place] for place in places], text

    def expected(key):
        cells = rows[key].cells
        return str(cells["maze_map"] if table.kind == "vsp" else cells["answer"])

    def judge(texts):
        report = tables.score(
            table, texts, partial=True
        )  # of the whole one: MMVP's pairs are told by their places
        found = {
            row["index"]: {k: v for k, v in row.items() if k != "index"} for row in report.rows
        }
        return found, {
            "overall": report.overall,
            "unit": report.unit,
            "n": sum(n for _, n in report.parts),
            "categories": report.per_category,
            "interval_95": list(statistics.wilson_of_mean(report.parts)),
            "extras": report.extras,
            "needs_judge": sum(bool(row.get("needs_judge")) for row in found.values()),
            "without_main_row": len(tables.questions(part) & set(report.orphans)),
        }

    def size(key):
        return len(tables.wrapper(tables.messages(rows[key]))[1])

    facts = subset_facts(tables.size(part), tables.size(table), seed)
    return Benchmark(
        table.name,
        tuple(rows),
        question,
        expected,
        judge,
        size,
        part,
        facts,
        asked=lambda key: (table.md5, str(key)),
    )


def broken(benchmark: Benchmark) -> dict:
    """{key: what is wrong} of rows whose question or pictures cannot be made, or that no answer can match; reads all
    pictures once."""
    found = tables.unmatchable(benchmark.table) if benchmark.table else {}
    for key in benchmark.keys:
        try:
            benchmark.question(key)
        except ValueError as error:
            found[key] = str(error)
    return found


def plan(chosen, batch_size: int, skip=None) -> list:
    """Batches (benchmark, keys), rows of like size together, the last one of a benchmark shorter.

    skip: {name: keys} of rows that take no part.
    """
    batches, skip = [], skip or {}
    for benchmark in chosen:
        keys = [key for key in benchmark.keys if key not in skip.get(benchmark.name, ())]
        keys.sort(key=benchmark.size)  # stable: rows of one size stay in order
        batches += [(benchmark, keys[n : n + batch_size]) for n in range(0, len(keys), batch_size)]
    return batches


def ask(model: interleave.Model, questions, key, *, mode: str, batch_size: int, change=None):
    """Traces of questions, and (seconds, whether something was compiled).

    mode: "none", "generated", or "generated-noise", "-swap", "-remove". The batch is filled up to batch_size with its
    last question. change: see `generate.reason`.
    """
    filled = [*questions, *[questions[-1]] * (batch_size - len(questions))]
    with clock.compilations() as compiled:
        before = time.perf_counter()
        traces = interleave.reason(model, filled, key, draw=mode != "none", change=change)
        seconds = time.perf_counter() - before
    return traces[: len(questions)], seconds, compiled.programs > 0


def noise_picture(picture, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise in place of a picture uint8 [H, W, 3]: standard normal in [-1, 1], cut off there, since it goes
    through the autoencoder as a picture."""
    values = np.clip(rng.standard_normal(picture.shape, np.float32), -1, 1)
    return np.round((values + 1) * 127.5).astype(np.uint8)


def picture_path(folder: str, name: str, key, number: int) -> str:
    """Where the `number`-th picture that was drawn for a row lies."""
    return os.path.join(folder, "pictures", name, f"{_file_stem(key)}-{number}.png")


def _file_stem(key) -> str:
    """A row's key in file names: of a table it is any text, "../x" as well, and nothing is written elsewhere."""
    return str(key).replace("/", "%2F")


def changer(mode: str, name: str, keys, *, seed: int, drawn: str = ""):
    """What `generate.reason` does to a drawn picture in a mode: (row of the batch, round, picture) -> picture or None.

    drawn: for swaps, the folder of a finished "generated" evaluation: a row gets what the next row there (by name)
    drew in that round, the last row what the first drew. FileNotFoundError where none drew one.
    """
    if mode in ("none", "generated"):
        return None
    kind = mode.removeprefix("generated-")
    if kind == "remove":
        return lambda b, number, picture: None
    if kind == "noise":

        def noise(b, number, picture):
            b = min(b, len(keys) - 1)
            return noise_picture(
                picture, generator(seed, f"noise for a drawn picture, {name} {keys[b]}", number)
            )

        return noise
    others = _drawn_rows(drawn, name)

    def swap(b, number, picture):
        own = _file_stem(keys[min(b, len(keys) - 1)])
        there = sorted(key for key, count in others.items() if number < count and key != own)
        if not there:
            raise FileNotFoundError(
                f"no other row of {name} has a picture of round {number + 1} in {drawn}/pictures/{name}: "
                "a swap needs two rows that draw"
            )
        chosen = next((key for key in there if key > own), there[0])
        return np.asarray(images.open_rgb(picture_path(drawn, name, chosen, number)))

    return swap


def _drawn_rows(folder, name) -> dict[str, int]:
    """{key as in file names: how many pictures} of a finished evaluation."""
    place = os.path.join(folder, "pictures", name)
    if not folder or not os.path.isdir(place):
        raise FileNotFoundError(
            f"{place} holds no drawn pictures: swaps show a row what another one drew. Evaluate "
            "--visual_thoughts=generated of the same checkpoint and rows first, or in the same command"
        )
    found = {}
    for file in os.listdir(place):
        stem, _, ending = file.rpartition(".")
        row, _, number = stem.rpartition("-")
        if ending == "png":
            found[row] = max(found.get(row, 0), int(number) + 1)
    return found


FILE = "answers.jsonl"  # the identity, then a line for each batch that is done; next to it answers-<process>.jsonl


class Other(ValueError):
    """A folder holds answers that were begun under other conditions."""


def share(batches, together: bool) -> range:
    """Numbers of the batches that this process answers: all, or every n-th."""
    return (
        range(len(batches))
        if together
        else range(jax.process_index(), len(batches), jax.process_count())
    )


def collect(
    folder: str,
    identity: dict,
    batches,
    answer,
    on_batch=None,
    *,
    together: bool,
    before_batch=lambda: None,
):
    """Answers all batches, or those that are missing: their records in order on the first process, None on others.

    Answers stay in the folder, so that a killed evaluation goes on, with any number of processes, and a finished one is
    not asked again. A line that a kill cut off is dropped; the batch is answered again, with the same key. Where nothing
    is kept, drawn pictures of the folder are removed: they are of other answers.

    Args:
      identity: what must be the same to go on: fingerprints of weights, tokenizer and data, mode, protocol, seed, tables,
        the rows of the batches.
      batches: (benchmark, keys). answer: (number, benchmark, keys) -> record, a dict that JSON takes.
      on_batch: called with each record of this process's share, also with those that were there.
      together: whether all processes answer each batch together. Else each answers every n-th one.
      before_batch: called before each batch, such as `checkpoint.Flag.check`; by all processes equally often.
    Raises:
      Other: the folder holds answers of another identity. ValueError: a damaged file.
    """
    process, processes = jax.process_index(), jax.process_count()
    identity, records, trouble = json.loads(json.dumps(identity)), {}, None
    if process == 0:
        try:
            records = _gather(folder, identity)
        except (OSError, ValueError) as error:
            trouble = error
    if (
        processes > 1
    ):  # all learn of the first one's error, and wait until it has put the files in order
        fine = multihost_utils.process_allgather(np.array([trouble is None]))
        if not np.all(fine) and trouble is None:
            trouble = Other(f"{folder}: the first process cannot go on there; its message says why")
    if trouble:
        raise trouble
    path = os.path.join(folder, FILE)
    if process:
        records = _read(path, identity)
    if not together and processes > 1:
        path = os.path.join(folder, f"answers-{process}.jsonl")
        _write(path, identity, {})
    for number in share(batches, together):
        before_batch()
        if number not in records:
            records[number] = {"batch": number, **answer(number, *batches[number])}
            if process == 0 or not together:
                with open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(records[number]) + "\n")
                    f.flush()
                    os.fsync(f.fileno())
        if on_batch:
            on_batch(records[number])
    for _ in range(
        len(share(batches, together)), -(-len(batches) // (1 if together else processes))
    ):
        before_batch()  # others have a batch more
    if processes > 1:
        multihost_utils.sync_global_devices(f"all of {folder} is answered")
    if process:
        return None
    if not together:
        records = _gather(folder, identity)
    return [json.loads(json.dumps(records[number])) for number in sorted(records)]


def is_begun(folder: str) -> bool:
    """Whether a folder holds answers that `collect` kept."""
    return bool(_files(folder))


def identity_of(folder: str) -> dict:
    """The identity of the answers in a folder where `is_begun`."""
    path = _files(folder)[0]
    with open(path, encoding="utf-8") as f:
        try:
            return dict(json.loads(f.readline()))
        except (TypeError, ValueError) as error:
            raise _damaged(path, error) from error


def _damaged(path, error) -> ValueError:
    return ValueError(f"{path} is damaged ({error}): delete it, and all its rows are asked again")


def forget(folder: str) -> None:
    """Removes the answers that `collect` kept, by the first process for all."""
    if jax.process_index() == 0:
        for path in _files(folder):
            os.remove(path)


def _files(folder) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(
        os.path.join(folder, n) for n in names if re.fullmatch(r"answers(-\d+)?\.jsonl", n)
    )


def _gather(folder, identity) -> dict:
    """{batch: record} of all files of a folder, which are made one."""
    os.makedirs(folder, exist_ok=True)
    records, files = {}, _files(folder)
    for path in files:
        records |= _read(path, identity)
    if not records:
        shutil.rmtree(os.path.join(folder, "pictures"), ignore_errors=True)
    _write(os.path.join(folder, FILE), identity, records)
    for path in files:
        if os.path.basename(path) != FILE:
            os.remove(path)
    return records


def _read(path, identity) -> dict:
    """{batch: record} of the whole lines of a file. Other, if there are some of another identity."""
    with open(path, "rb") as f:
        text = f.read()
    try:
        lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no JSON object")
        records = {record["batch"]: record for record in lines[1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if records and lines[0] != identity:
        changed = sorted(
            key for key in {*lines[0], *identity} if lines[0].get(key) != identity.get(key)
        )
        if "weights" in changed and "weights" not in lines[0]:
            raise Other(
                f"{path} has no fingerprint of the weights: an older version began it, so which model gave its answers "
                "is not known: choose another --name, or delete the folder"
            )
        model = (
            "the model has changed since: "
            if {"weights", "generation_weights", "tokenizer"} & {*changed}
            else ("give the same, ")
        )
        raise Other(
            f"{path} was begun with another {', '.join(changed)}: {model}choose another --name, or delete the folder"
        )
    return records


def _write(path, identity, records) -> None:
    lines = [identity, *(records[number] for number in sorted(records))]
    files_lib.write(path, "".join(json.dumps(line) + "\n" for line in lines))
