"""Questions of any benchmark put to a model, batch by batch; what was answered before a kill is kept.

  procedural tasks, prepared rows    one picture and one question; the rule of the task scores
  public tables (`benchmarks`)       their pictures and prompts; the rules of the public harness score

A benchmark here is names, keys and three functions, so that the loop and the page know neither kind.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable

import numpy as np

from opsd_jax import benchmarks, generate, images, metrics

# What is done to a picture that the model has drawn before it sees it.
CHANGES = ("noise", "swap", "remove")


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """keys: of its rows, in order. question: key -> (Pillow RGB images, text). expected: key -> the right answer.

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
    table: benchmarks.Table | None = None


def of_table(table: benchmarks.Table, *, cache: str, limit: int = 0) -> Benchmark:
    """A public table as a benchmark. cache: see `benchmarks.images`. limit: see `benchmarks.first`; 0: all."""
    part = benchmarks.first(table, limit) if limit else table
    rows = {row.index: row for row in part.rows}

    def question(key):
        text, places = benchmarks.wrapper(benchmarks.messages(rows[key]))
        shown = benchmarks.images(rows[key], cache=cache)
        return [shown[place] for place in places], text

    def expected(key):
        cells = rows[key].cells
        return str(cells["maze_map"] if table.kind == "vsp" else cells["answer"])

    def judge(texts):
        report = benchmarks.score(part, texts, partial=True)
        found = {row["index"]: {k: v for k, v in row.items() if k != "index"} for row in report.rows}
        scores = list(report.groups.values()) if report.groups else [row["hit"] for row in found.values()]
        n, hits = len(scores), sum(bool(score) for score in scores)
        return found, {
            "overall": report.overall, "unit": report.unit, "n": n, "categories": report.per_category,
            "interval_95": list(metrics.wilson(hits, n)), "extras": report.extras,
            "needs_judge": sum(bool(row.get("needs_judge")) for row in found.values()),
            "without_main_row": len(report.orphans)}

    def size(key):
        return len(benchmarks.wrapper(benchmarks.messages(rows[key]))[1])

    return Benchmark(table.name, tuple(rows), question, expected, judge, size, part)


def broken(benchmark: Benchmark) -> dict:
    """{key: what is wrong} of rows whose question or pictures cannot be made; reads all pictures once."""
    found = {}
    for key in benchmark.keys:
        try:
            benchmark.question(key)
        except ValueError as error:
            found[key] = str(error)
    return found


def plan(chosen, batch_size: int, skip=frozenset()) -> list:
    """Batches (benchmark, keys), rows of like size together, the last one of a benchmark shorter.

    skip: (name, key) of rows that take no part.
    """
    batches = []
    for benchmark in chosen:
        keys = [key for key in benchmark.keys if (benchmark.name, key) not in skip]
        keys.sort(key=benchmark.size)  # stable: rows of one size stay in order
        batches += [(benchmark, keys[n:n + batch_size]) for n in range(0, len(keys), batch_size)]
    return batches


# --- asking ----------------------------------------------------------------------------------------------------

def ask(model: generate.Model, questions, key, *, mode: str, batch_size: int, change=None, steps: dict | None = None):
    """Traces of questions, and (seconds, whether something was compiled).

    mode: "none", "generated", or "generated-noise", "-swap", "-remove". The batch is filled up to batch_size with its
    last question. change: see `generate.reason`. steps: changes to `flow.FlowConfig`.
    """
    filled = [*questions, *[questions[-1]] * (batch_size - len(questions))]
    programs, before = generate.compilations(), time.perf_counter()
    traces = generate.reason(model, filled, key, draw=mode != "none", changes=steps, change=change)
    return traces[:len(questions)], time.perf_counter() - before, generate.compilations() > programs


def noise_picture(picture, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise in place of a picture uint8 [H, W, 3]: standard normal in [-1, 1], cut off there, since it goes
    through the autoencoder as a picture."""
    values = np.clip(rng.standard_normal(picture.shape, np.float32), -1, 1)
    return np.round((values + 1) * 127.5).astype(np.uint8)


def picture_path(folder: str, name: str, key, number: int) -> str:
    """Where the `number`-th picture that was drawn for a row lies."""
    return os.path.join(folder, "pictures", name, f"{key}-{number}.png")


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
            from opsd_jax.data import generator

            b = min(b, len(keys) - 1)
            return noise_picture(picture, generator(seed, f"noise for a drawn picture, {name} {keys[b]}", number))
        return noise
    others = _drawn_rows(drawn, name)

    def swap(b, number, picture):
        own = str(keys[min(b, len(keys) - 1)])
        there = sorted(key for key, count in others.items() if number < count and key != own)
        if not there:
            raise FileNotFoundError(f"no other row of {name} has a picture of round {number + 1} in {drawn}/pictures/{name}: "
                                    "a swap needs two rows that draw")
        chosen = next((key for key in there if key > own), there[0])
        return np.asarray(images.open_rgb(picture_path(drawn, name, chosen, number)))
    return swap


def _drawn_rows(folder, name) -> dict[str, int]:
    """{key as text: how many pictures} of a finished evaluation."""
    place = os.path.join(folder, "pictures", name)
    if not folder or not os.path.isdir(place):
        raise FileNotFoundError(
            f"{place or 'no folder'} holds no drawn pictures: swaps show a row what another one drew. Evaluate "
            "--visual_thoughts=generated of the same checkpoint and rows first, or in the same command")
    found = {}
    for file in os.listdir(place):
        stem, _, ending = file.rpartition(".")
        row, _, number = stem.rpartition("-")
        if ending == "png":
            found[row] = max(found.get(row, 0), int(number) + 1)
    return found


# --- keeping ---------------------------------------------------------------------------------------------------

class Other(ValueError):
    """A folder holds answers that were begun under other conditions."""


def collect(folder: str, identity: dict, batches, answer, on_batch=None, *, together: bool):
    """Answers all batches, or those that are missing: their records in order on the first process, None on others.

    W/eval/<name>/partial.jsonl holds the identity and then a line for each batch that is done. A line that a kill cut
    off is dropped; the batch is answered again, with the same key.

    Args:
      identity: what must be the same to go on: checkpoint, mode, protocol, seed, the rows of the batches.
      batches: (benchmark, keys). answer: (number, benchmark, keys) -> record, a dict that JSON takes.
      on_batch: called with each record, also with those that were there.
      together: whether all processes answer each batch together. Else each answers every n-th one, with a file of its
        own, partial-<process>.jsonl.
    Raises:
      Other: the folder holds answers of another identity.
    """
    import jax
    from jax.experimental import multihost_utils

    process, processes = jax.process_index(), jax.process_count()
    share = range(len(batches)) if together else range(process, len(batches), processes)
    writes = process == 0 or not together
    path = lambda n: os.path.join(folder, "partial.jsonl" if together or processes == 1 else f"partial-{n}.jsonl")
    identity = json.loads(json.dumps({**identity, "shares": 1 if together else processes}))
    records, trouble = [], None
    if writes:
        try:
            os.makedirs(folder, exist_ok=True)
            records = _resume(path(process), identity)
        except Other as error:
            trouble = error
    done = len(records) if trouble is None else -1
    if processes > 1:  # all learn of an error of one, and where to go on
        known = np.ravel(multihost_utils.process_allgather(np.array([done])))
        done = int(known[0]) if together else done
        trouble = trouble or (Other(f"{folder}: another process found answers of other conditions") if min(known) < 0
                              else None)
    if trouble:
        raise trouble
    for record in records:
        if on_batch:
            on_batch(record)
    for number in share[done:]:
        record = {"batch": number, **answer(number, *batches[number])}
        if writes:
            with open(path(process), "a", encoding="utf-8") as f:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
                f.flush()
                os.fsync(f.fileno())
        records.append(record)
        if on_batch:
            on_batch(record)
    if processes > 1:
        multihost_utils.sync_global_devices(f"all of {folder} is answered")
    if process:
        return None
    if processes > 1 and not together:
        records = [record for n in range(processes) for record in _resume(path(n), identity)]
    return sorted(json.loads(json.dumps(records)), key=lambda record: record["batch"])


def forget(folder: str) -> None:
    """Removes what `collect` kept, when all of it is in other files."""
    for name in os.listdir(folder):
        if name.startswith("partial") and name.endswith(".jsonl"):
            os.remove(os.path.join(folder, name))


def _resume(path, identity) -> list[dict]:
    """Records in the whole lines behind the identity; the file is cut to those, or begun."""
    lines = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            text = f.read()
        lines = [json.loads(line) for line in text[:text.rfind(b"\n") + 1].splitlines()]
    if lines and lines[0] != identity:
        changed = sorted(key for key in {*lines[0], *identity} if lines[0].get(key) != identity.get(key))
        raise Other(f"{path} was begun with another {', '.join(changed)}: give the same, choose another --name, or delete "
                    "the folder")
    kept = lines or [identity]
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    os.replace(path + ".tmp", path)
    return kept[1:]
