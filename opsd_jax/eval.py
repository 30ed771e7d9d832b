"""Answers to every question of a benchmark, scored: `python -m opsd_jax.eval --workdir=W`.

  --benchmarks        tasks of the run, by their own name or that of their family; with --data_dir also the public
                      tables there (`benchmarks.KINDS`); all that there are if not given
  --visual_thoughts   what the model sees, several separated by commas:
                        none       the student: pictures and question of the row
                        real       the teacher's context with the row's own visual thoughts; noise, another row's (swap)
                                   or the problem image (image) in their places; none of them (remove): tasks whose rows
                                   have visual thoughts, those without are counted
                        generated  the model draws them where its text asks for it, as ThinkMorph does, and sees them;
                                   generated-noise, -swap, -remove: it sees noise, what another row drew, or nothing
  --protocol          prompt, picture sizes and decoding of a named protocol (`generate.PROTOCOLS`); the run's own and
                      greedy if not given

  W/eval/<name>/predictions.jsonl   one answer a line        W/eval/<name>/<table>.tsv   for the public harness
  W/eval/<name>/summary.json        scores                   W/eval/<name>/pictures/     what was drawn
  W/eval/<name>/report.html         all of it to leaf through
  W/eval/<name>/answers.jsonl       what was answered so far
  W/eval/summary.md                 all summaries in W/eval as one table

An evaluation that was killed goes on where it stopped when the same command comes again, and one that is done is scored
again without asking. Training evaluates with the same functions: the same checkpoint gives the same answers.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable

import numpy as np
from absl import logging

from opsd_jax import (
    benchmarks as benchmarks_lib,
    cli,
    config as config_lib,
    distributed,
    images,
    json_files,
    metrics,
    params as params_lib,
    paths,
    tags,
    tasks,
)
from opsd_jax.datasets import plan

# Modes of the teacher's context, of drawing, and all.
CONTEXTS = tuple(mode for mode in config_lib.MODES if mode != "none")
DRAWN = ("generated", "generated-noise", "generated-swap", "generated-remove")
MODES = ("none", *CONTEXTS, *DRAWN)


@dataclasses.dataclass(frozen=True)
class Result:
    """Predictions of one benchmark in one mode, with what they cost."""

    name: str
    predictions: list  # dicts: index, prediction, hit, tokens; of prepared rows also pid, answer, expected, stop, ...
    seconds: float  # of generation, without batches that compiled
    timed: int  # rows that `seconds` covers
    judged: dict | None = (
        None  # what another rule than the share of hits gave, see `answers.Benchmark.judge`
    )
    without_visual_thoughts: int | None = (
        None  # rows that have none, in a mode that shows them or something instead
    )
    subset: dict | None = None  # see `plan.subset_facts`

    @property
    def hits(self) -> int:
        return sum(bool(p["hit"]) for p in self.predictions)

    def summary(self) -> dict:
        n = len(self.predictions)
        share = lambda of: sum(map(of, self.predictions)) / n
        found = self.judged or {
            "overall": self.hits / n,
            "unit": "fraction",
            "n": n,
            "categories": {},
            "interval_95": list(metrics.wilson(self.hits, n)),
        }
        found = {
            **found,
            "mean_output_tokens": share(lambda p: p["tokens"]),
            "seconds_per_sample": self.seconds / self.timed if self.timed else None,
            "timed_samples": self.timed,
        }
        if self.subset:
            found["rows"] = self.subset
        if "stop" in self.predictions[0]:
            found |= {
                "eos_rate": share(lambda p: p["stop"] == "eos"),
                "image_skip_rate": share(lambda p: p["image_skips"] > 0),
            }
        if self.without_visual_thoughts is not None:
            found["without_visual_thoughts"] = self.without_visual_thoughts
        if "pictures" in self.predictions[0]:
            found["pictures_per_sample"] = share(lambda p: p["pictures"])
        return found


def is_hit(example, text: str) -> tuple[str | None, bool]:
    """(answer found in the text, whether it is right): by the procedural task's rule, or word for word."""
    return tasks.judge(example.metadata, tags.wrap_answer(example.answer), text)


def batches(numbers, batch_size: int):
    """Row numbers by batch, the last one filled up with its last row: 0, 1, 2 by 2 -> [0, 1], [2, 2]."""
    for start in range(0, len(numbers), batch_size):
        part = list(numbers[start : start + batch_size])
        yield part + part[-1:] * (batch_size - len(part))


def buckets_of(rows, packer, source: int, numbers, modes) -> list[int]:
    """For each of the numbered rows of a source the bucket that holds its context in all of the modes.

    With a single bucket nothing is read; else all of these rows are, by every process for itself.
    """
    from concurrent.futures import ThreadPoolExecutor

    if len(packer.buckets.student) == 1:
        return [0] * len(numbers)

    def find(n):
        return max(packer.fitting(*_blocks_of(rows, packer, source, n, mode)) for mode in modes)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(find, numbers))


def _blocks_of(rows, packer, source: int, n: int, mode: str):
    """(kind of context, blocks) of a row in a mode; of noise those of what it replaces, which are as large."""
    from opsd_jax import context as context_lib

    row = rows(source, n)
    if mode == "none":
        return "student", packer.blocks(row, "student")
    partner = rows.partner(source, n) if mode == "swap" else None
    shown = context_lib.replace_visual_thoughts(
        {"remove": "none", "noise": "real"}.get(mode, mode),
        row.problem,
        row.visual_thoughts,
        partner.visual_thoughts if partner else (),
        None,
    )
    return "teacher", packer.blocks(row, "teacher", shown)


def check_fit(
    rows, packer, task_names, modes, limit: int = 0, subset_seed: int = 0, traces: bool = False
) -> None:
    """TooLong, with the row's pid, where a context of a mode fits no bucket, or (traces) a text trace its targets."""
    from opsd_jax import context as context_lib

    for source, name in enumerate(task_names):
        numbers = _numbers(rows, source, limit, subset_seed)
        rows.check_references(source, numbers)
        for n in numbers:
            row = rows(source, n)
            for mode in modes:
                kind, blocks = _blocks_of(rows, packer, source, n, mode)
                slots, patches, _ = context_lib.need(blocks)
                if np.any(np.array([slots, patches]) > packer.buckets[kind][-1][:2]):
                    raise context_lib.TooLong(
                        f"row {row.example.pid} of {name}, to be evaluated in mode {mode}, needs {slots} slots and {patches} "
                        f"patches, the largest of config.data.buckets.{kind} has {packer.buckets[kind][-1][:2]}: enlarge it, or "
                        "change config.eval"
                    )
            if traces:
                packer.references([row])


def by_length(rows, packer, source: int, chosen, batch_size: int, modes):
    """(bucket, row numbers) of every batch of the chosen rows: rows of one bucket together, in order."""
    found = dict(zip(chosen, buckets_of(rows, packer, source, chosen, modes), strict=True))
    for numbers in batches(sorted(chosen, key=found.__getitem__), batch_size):
        yield max(found[n] for n in numbers), numbers


def contexts(rows, packer, source: int, numbers, mode: str, seed: int, bucket: int = -1):
    """Prepared rows and the context of a mode for them: the student's for "none", else the teacher's ("remove": with
    its texts alone). bucket: of config.data.buckets."""
    from opsd_jax.data import generator

    prepared = [rows(source, n) for n in numbers]
    if mode == "none":
        return prepared, packer.student(prepared, bucket)
    partners = [rows.partner(source, n) if mode == "swap" else None for n in numbers]
    rngs = [generator(seed, "eval visual thoughts", source, n) for n in numbers]
    return prepared, packer.teacher(
        prepared, partners, "none" if mode == "remove" else mode, rngs, bucket
    )


def evaluate(
    params,
    rows,
    packer,
    *,
    config,
    task_names,
    mode: str,
    batch_size: int,
    limit: int = 0,
    subset_seed: int = 0,
    seed: int = 0,
    mesh=None,
    on_batch=None,
    before_batch=lambda: None,
) -> list[Result]:
    """Answers all rows of all sources greedily, or a random subset of each.

    Args:
      params: the model's dict. rows, packer: of the split. config: RolloutConfig; sampling is made greedy.
      mode: see the module. batch_size: of all processes together.
      limit, subset_seed: rows of each task, chosen by the seed (`plan.subset`); 0: all. seed: of noise.
      on_batch: called after each batch with how many rows are done, and how many of them right, in all tasks.
      before_batch: called before each batch, such as `checkpoint.Flag.check`.
    """
    config = dataclasses.replace(config, greedy=True)
    results, done, hits = [], 0, 0
    for source, name in enumerate(task_names):
        predictions, seconds, timed, single = {}, 0.0, 0, None
        for bucket, numbers in by_length(
            rows, packer, source, _numbers(rows, source, limit, subset_seed), batch_size, (mode,)
        ):
            before_batch()
            packed, placed = _batch(rows, packer, source, numbers, mode, seed, mesh, bucket)
            found, took, compiled = _sample(params, packed, config)
            if not compiled:  # else the time is the compiler's
                seconds, timed = seconds + took, timed + len(set(numbers))
            single = packed, numbers
            predictions |= _read(found, placed, rows.sources[source], packer.tokenizer)
            if on_batch:
                on_batch(
                    done + len(predictions), hits + sum(p["hit"] for p in predictions.values())
                )
        if not timed:  # a single batch, and it compiled
            seconds, timed = _sample(params, single[0], config)[1], len(set(single[1]))
        without = (
            _without_visual_thoughts(rows, source, sorted(predictions))
            if mode in CONTEXTS
            else None
        )
        results.append(
            Result(
                name,
                [predictions[n] for n in sorted(predictions)],
                seconds,
                timed,
                None,
                without,
                plan.subset_facts(len(predictions), len(rows.sources[source]), subset_seed),
            )
        )
        done, hits = done + len(predictions), hits + results[-1].hits
    return results


def _batch(rows, packer, source, numbers, mode, seed, mesh, bucket):
    """(context of the batch, row numbers as they lie in it) on the mesh."""
    mine = _own_part(numbers, mesh)
    return _put(
        mesh,
        (contexts(rows, packer, source, mine, mode, seed, bucket)[1], np.asarray(mine, np.int32)),
    )


def _sample(params, packed, config):
    """(Trajectory, seconds, whether that holds a compilation)."""
    import jax

    from opsd_jax import rollout

    before, programs = time.perf_counter(), rollout.sample._cache_size()
    found = jax.block_until_ready(rollout.sample(params, packed, jax.random.key(0), config=config))
    return found, time.perf_counter() - before, rollout.sample._cache_size() > programs


def _read(found, placed, examples, tokenizer) -> dict:
    """{row number: prediction} of a sampled batch."""
    from opsd_jax import rollout, sharding

    found, placed = sharding.fetch((found, placed))
    predictions = {}
    for b, n in enumerate(placed.tolist()):
        ids, example = found.tokens[b][found.mask[b]], examples[n]
        text = tokenizer.decode(ids)
        answer, hit = is_hit(example, text)
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


def reference_kl(
    teacher,
    student,
    rows,
    packer,
    *,
    config,
    task_names,
    batch_size: int,
    limit: int = 0,
    subset_seed: int = 0,
    mesh=None,
    before_batch=lambda: None,
) -> dict:
    """KL(teacher with the true visual thoughts || student without) on the rows' text traces, nats per token.

    Paper Eq. 4 on fixed completions: mean over the tokens of a trace, then over rows. config: ModelConfig.
    before_batch: as in `evaluate`.
    Returns {task: {"kl", "n"}}.
    """
    from opsd_jax import context as context_lib, distill, sharding

    found = {}
    ends = {"bos": packer.tokenizer.bos, "eos": packer.tokenizer.eos}
    for source, name in enumerate(task_names):
        values = {}
        chosen = _numbers(rows, source, limit, subset_seed)
        for bucket, numbers in by_length(
            rows, packer, source, chosen, batch_size, ("none", "real")
        ):
            before_batch()
            mine = _own_part(numbers, mesh)
            prepared, c_t = contexts(rows, packer, source, mine, "real", 0, bucket)
            tokens, mask = packer.references(prepared)
            batch = context_lib.Batch(packer.student(prepared, bucket), c_t)
            batch, tokens, mask, placed = _put(
                mesh, (batch, tokens, mask, np.asarray(mine, np.int32))
            )
            completion = context_lib.completion(tokens, mask, **ends)
            kl = distill.kl_to_student(teacher, student, batch, completion, config=config)
            kl, counted, placed = sharding.fetch((kl, completion.mask, placed))
            values |= zip(placed.tolist(), ((kl * counted).sum(1) / counted.sum(1)).tolist())
        found[name] = {"kl": float(np.mean(list(values.values()))), "n": len(values)}
    return found


def _without_visual_thoughts(rows, source: int, numbers) -> int:
    return sum(not rows.sources[source][n].visual_thoughts for n in numbers)


def _numbers(rows, source: int, limit: int, subset_seed: int) -> list[int]:
    return plan.subset(len(rows.sources[source]), limit, subset_seed)


def _own_part(numbers: list, mesh) -> list:
    """The rows of a batch that this process packs."""
    from opsd_jax import sharding

    return [numbers[n] for n in sharding.local_rows(mesh, len(numbers))] if mesh else numbers


def _put(mesh, host_batch):
    from opsd_jax import sharding

    return sharding.put_batch(mesh, host_batch) if mesh else host_batch


# --- files --------------------------------------------------------------------------------------------------


def write(directory: str, results, *, checkpoint: str, seed: int, protocol: str, **more) -> dict:
    """Writes predictions.jsonl and summary.json, the latter last and atomically; returns the summary."""
    summary = {
        "protocol": protocol,
        "checkpoint": checkpoint,
        "seed": seed,
        **more,
        "benchmarks": {r.name: r.summary() for r in results},
    }
    metrics.write_text(
        os.path.join(directory, "predictions.jsonl"),
        "".join(
            json.dumps({"benchmark": r.name, **p}) + "\n" for r in results for p in r.predictions
        ),
    )
    metrics.write_text(
        os.path.join(directory, "summary.json"), json.dumps(summary, indent=1) + "\n"
    )
    return summary


_IN_SUMMARIES = ("overall", "unit", "n", "interval_95", "mean_output_tokens", "seconds_per_sample")


def read_summary(path: str) -> dict:
    """A summary.json. ValueError, with what to do, where it is cut or something else."""
    fix = "delete its folder, and evaluate again"
    found = json_files.read(path, fix=fix)
    try:
        scores = found.get("benchmarks", {})
        lacking = [key for key in _IN_SUMMARIES for b in scores.values() if key not in b]
        lacking += [
            key for key in ("seed", "checkpoint", "protocol") if scores and key not in found
        ]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no summary ({error}): {fix}") from error
    if lacking:
        raise ValueError(f"{path} is no summary (no {lacking[0]}): {fix}")
    return found


def write_table(workdir: str) -> str:
    """Writes W/eval/summary.md, the table of all summaries in W/eval, and returns it. What cannot be read is left out,
    with a warning."""
    folder, summaries = os.path.join(workdir, "eval"), {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name, "summary.json")
        if os.path.exists(path):
            try:
                summary = read_summary(path)
            except (OSError, ValueError) as error:
                logging.warning("left out of summary.md: %s", error)
                continue
            if "benchmarks" in summary:  # a summary of the KL has none
                summaries[name] = summary
    text = "\n\n".join(filter(None, [table(summaries), seeds(summaries), speeds(summaries)])) + "\n"
    metrics.write_text(os.path.join(folder, "summary.md"), text)
    return text


def percent(found: dict) -> float:
    """The overall score of a benchmark's summary in per cent."""
    return found["overall"] * (100 if found["unit"] == "fraction" else 1)


def _counted(found: dict) -> str:
    """How many rows a score is of: "128", or of a random subset "128 of 512"."""
    return f"{found['n']} of {found['rows']['of']}" if "rows" in found else str(found["n"])


def table(summaries: dict[str, dict]) -> str:
    """Markdown table of summaries by name: score with its 95 % interval, tokens, seconds; the paper's where it has one."""
    public = any(b in benchmarks_lib.PAPER for s in summaries.values() for b in s["benchmarks"])
    head = ["run", "task", "accuracy", "95 % interval", "n", "tokens", "s/sample"]
    head += ["paper: ThinkMorph", "paper: Visual-OPSD"] if public else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, summary in summaries.items():
        for task, b in summary["benchmarks"].items():
            low, high = b["interval_95"]
            seconds = "–" if b["seconds_per_sample"] is None else f"{b['seconds_per_sample']:.4f}"
            line = (
                f"| {name} | {task} | {percent(b):.1f} % | {100 * low:.1f}–{100 * high:.1f} "
                f"| {_counted(b)} | {b['mean_output_tokens']:.1f} | {seconds} |"
            )
            if public:
                teacher, student = benchmarks_lib.PAPER.get(task, (None, None))
                line += f" {teacher} | {student} |" if teacher else " | |"
            lines.append(line)
    return "\n".join(lines)


def _model_of(summary: dict) -> str:
    """What two summaries of one model have in common: its weights; of results without a fingerprint the path."""
    return summary.get("weights") or summary["checkpoint"]


def seeds(summaries: dict[str, dict]) -> str:
    """Markdown table of scores over seeds: of summaries that differ in the seed alone, mean and standard deviation."""
    groups = collections.defaultdict(dict)
    for summary in summaries.values():
        alike = [_model_of(summary), *(summary.get(key) for key in ("protocol", "split"))]
        for task, b in summary["benchmarks"].items():
            groups[task, _counted(b), *map(str, [*alike, b.get("rows")])].setdefault(
                summary["seed"], (summary, b)
            )
    lines = []
    for (task, n, _, protocol, *_), by_seed in groups.items():
        if len(by_seed) > 1:
            scores, checkpoint = (
                [percent(b) for _, b in by_seed.values()],
                next(iter(by_seed.values()))[0]["checkpoint"],
            )
            lines.append(
                f"| {protocol} | {os.path.basename(checkpoint)} | {task} | {np.mean(scores):.1f} ± "
                f"{np.std(scores, ddof=1):.1f} % | {', '.join(map(str, sorted(by_seed)))} | {n} |"
            )
    head = "| protocol | checkpoint | task | accuracy, mean ± standard deviation | seeds | n |"
    return "\n".join([head, "|---" * 6 + "|", *lines]) if lines else ""


def speeds(summaries: dict[str, dict]) -> str:
    """Markdown table of how much longer drawing takes than answering in text: pairs that differ in the mode alone."""
    same = lambda s: [_model_of(s), *(s.get(key) for key in ("split", "asked_by", "seed"))]
    lines = []
    for name, drawn in summaries.items():
        for other, text in summaries.items():
            if (
                drawn.get("mode") != "generated"
                or text.get("mode") != "none"
                or same(drawn) != same(text)
            ):
                continue
            for task in sorted(set(drawn["benchmarks"]) & set(text["benchmarks"])):
                long, short = (s["benchmarks"][task] for s in (drawn, text))
                if long.get("rows") != short.get("rows"):
                    continue
                if long["seconds_per_sample"] and short["seconds_per_sample"]:
                    ratio = long["seconds_per_sample"] / short["seconds_per_sample"]
                    gain = percent(short) - percent(long)
                    lines.append(
                        f"| {task} | {name} | {other} | {long.get('pictures_per_sample', 0):.2f} "
                        f"| {long['seconds_per_sample']:.4f} | {short['seconds_per_sample']:.4f} "
                        f"| {ratio:.1f}x | {gain:+.1f} |"
                    )
    if not lines:
        return ""
    return "\n".join(
        [
            "| task | drawing | text alone | pictures a sample | s/sample | s/sample | speed-up (paper: 14.3x) "
            "| accuracy gained |",
            "|---" * 8 + "|",
            *lines,
        ]
    )


# --- command line -------------------------------------------------------------------------------------------


def choose_tasks(benchmarks, task_names) -> tuple[str, ...]:
    """The tasks that `benchmarks` name, or whose family; all for (). ValueError lists what there is."""
    families = {
        family: module.TASK
        for family, module in tasks.FAMILIES.items()
        if module.TASK in task_names
    }
    known = {task.lower(): task for task in task_names} | families
    for name in benchmarks:
        if name.lower() not in known:
            raise ValueError(
                f"--benchmarks={name}: this run has the tasks {', '.join(task_names)} (or, by "
                f"family, {', '.join(families) or 'none'})"
            )
    return tuple(dict.fromkeys(known[name.lower()] for name in benchmarks)) or tuple(task_names)


def evaluate_run(
    workdir: str,
    modes=("none",),
    *,
    checkpoint: str = "",
    benchmarks=(),
    data_dir: str = "",
    protocol: str = "",
    split: str = "test",
    limit: int = 0,
    ban_marker: bool = False,
    seed: int | None = None,
    name: str = "",
    batch_size: int = 0,
    skip_bad: bool = False,
    against: str = "",
    before_batch=lambda: None,
) -> dict:
    """Evaluates a model in each of the modes and writes the results to W/eval.

    Args:
      workdir: of the run, or of an arm; with another model in `checkpoint`, a folder for results.
      checkpoint: a step folder; "" for the newest one of the run; or a released or imported model.
      benchmarks: names, see the module. data_dir: folder of the public tables. protocol: see the module.
      limit: a random subset of so many rows of each benchmark (of whole questions where a table asks each several times);
        0 for all. It depends on config.seed (0 for a model that is no run), so results of several seeds stay paired.
      seed: of noise and sampling; None for the run's.
      name: of the results. "" makes one that tells what was measured, so that a rerun replaces equals by
        equals: <step>-<mode>[-banned][-<protocol>], and more where split, rows, tasks or seed are not the run's own.
      batch_size: 0 for config.eval.batch_size (16 for a model that is no run).
      skip_bad: rows of a table that cannot be shown are listed in the summary and left out, instead of an error.
      against: results to compare with in the report: a name in W/eval, or a folder.
      before_batch: called before each batch, such as `checkpoint.Flag.check`.
    Returns:
      {name: summary}.
    Raises:
      FileNotFoundError: no run, data or checkpoint. FileExistsError: `name` is taken. ValueError: unknown
      modes, benchmarks or split, or a checkpoint of another run without a name.
    """
    from opsd_jax import checkpoint as checkpoint_lib

    paths.check_given("--workdir", workdir, orbax=True)
    paths.check("--checkpoint", checkpoint)
    paths.check("--data_dir", data_dir)
    paths.check("--against", against)

    def evaluate():
        job = prepare(
            workdir,
            modes,
            checkpoint=checkpoint,
            benchmarks=benchmarks,
            data_dir=data_dir,
            protocol=protocol,
            split=split,
            limit=limit,
            ban_marker=ban_marker,
            seed=seed,
            name=name,
            batch_size=batch_size,
        )
        job = dataclasses.replace(job, before_batch=before_batch)
        compared = read_results(workdir, against) if against else None
        summaries = {}
        for mode in modes:
            summaries[job.names[mode]] = (
                answer_in_context(job, mode, open_model(job, mode), compared)
                if mode in job.contexts
                else _asked(job, mode, skip_bad, compared)
            )
        return summaries

    return checkpoint_lib.retry_if_gone(evaluate, given=checkpoint)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all modes of one command share. Made by `prepare`, which finds out what cannot be done."""

    workdir: str
    config: object  # of the run; None for a model that is none
    checkpoint: str
    names: dict  # mode -> name of the results
    contexts: tuple  # modes in which rows are packed as in training, by the run's own protocol
    tasks: tuple  # of the run
    tables: tuple  # benchmarks.Table
    where: str  # whose data: W, or of an arm the run's
    protocol: str
    split: str
    limit: int
    subset_seed: int  # the same for every --seed
    ban_marker: bool
    seed: int
    batch_size: int
    about: dict  # for every summary
    before_batch: Callable = lambda: None


def prepare(
    workdir,
    modes,
    *,
    checkpoint,
    benchmarks,
    data_dir,
    protocol,
    split,
    limit,
    ban_marker,
    seed,
    name,
    batch_size,
    config=None,
) -> Job:
    """Checks what `evaluate_run` is given, before anything slow. config: of the run; None: what W/config.json says."""
    from opsd_jax import answers, checkpoint as checkpoint_lib, convert, data, generate
    from opsd_jax.datasets import visual_opsd

    cli.check_precision()
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"--visual_thoughts={mode}: choose from {', '.join(MODES)}")
    cli.check_once("visual_thoughts", modes)
    cli.check_once("benchmarks", benchmarks)
    if seed is not None:
        cli.check_seed(seed)
    if name:
        cli.check_name(name)
    cli.check_number("rows", limit, 0)
    cli.check_number("batch_size", batch_size, 0)
    if protocol and protocol not in generate.PROTOCOLS:
        raise ValueError(f"--protocol={protocol}: choose from {', '.join(generate.PROTOCOLS)}")
    released = bool(checkpoint) and convert.is_model(checkpoint)
    config = None if released else config if config is not None else data.load_config(workdir)
    files = benchmarks_lib.find(data_dir) if data_dir else {}
    if released and not data_dir:
        raise ValueError(
            f"--checkpoint={checkpoint} is a model without data of its own: give --data_dir=FOLDER with "
            "the public tables"
        )
    public = [b for b in benchmarks if b in files] if benchmarks else list(files)
    rest = [b for b in benchmarks if b not in files]
    if data_dir and (unknown := [b for b in rest if b in benchmarks_lib.KINDS or released]):
        raise ValueError(f"--benchmarks={unknown[0]}: {data_dir} holds {', '.join(files)}")
    if not data_dir and (absent := [b for b in rest if b in benchmarks_lib.KINDS]):
        raise ValueError(
            f"--benchmarks={absent[0]} is a public table: give --data_dir=FOLDER that holds {absent[0]}.tsv"
        )
    own = choose_tasks(rest, config.data.tasks) if config and (rest or not data_dir) else ()
    if public and (wrong := [mode for mode in modes if mode in CONTEXTS]):
        raise ValueError(
            f"--visual_thoughts={wrong[0]}: public tables hold no visual thoughts of their rows: choose from "
            f"none, {', '.join(DRAWN)}"
        )
    if protocol and (wrong := [mode for mode in modes if mode in CONTEXTS]):
        raise ValueError(
            f"--protocol={protocol} with --visual_thoughts={wrong[0]}: the teacher's contexts are those of "
            "training, without a protocol"
        )
    if ban_marker and (protocol or public or set(modes) & set(DRAWN)):
        raise ValueError(
            "--ban_marker is for tasks of a run without a protocol and without drawing"
        )
    contexts = () if protocol or public else ("none", *CONTEXTS)

    if released:
        step, stem = None, os.path.basename(os.path.abspath(checkpoint))
    else:
        steps = os.path.join(workdir, "checkpoints")
        checkpoint = checkpoint or checkpoint_lib.newest(workdir)
        step = checkpoint_lib.metadata(checkpoint)["step"]
        stem = f"{step:06d}"
        if not name and os.path.realpath(
            os.path.dirname(os.path.normpath(checkpoint))
        ) != os.path.realpath(steps):
            raise ValueError(
                f"--checkpoint={checkpoint} is no step of {steps}: say with --name under which name "
                f"its results shall stand in {workdir}/eval"
            )
    tables = tuple(benchmarks_lib.read(files[b]) for b in public)
    where = data.workdir_of(config, workdir) if own else workdir
    own_seed = config.seed if config else 0
    seed = own_seed if seed is None else seed
    labels = {mode: f"{mode}-banned" if ban_marker else mode for mode in modes}
    if name:
        names = {
            mode: name if len(modes) == 1 else f"{name}-{label}" for mode, label in labels.items()
        }
        for folder in (os.path.join(workdir, "eval", n) for n in names.values()):
            if os.path.exists(os.path.join(folder, "summary.json")) and not answers.is_begun(
                folder
            ):
                raise FileExistsError(
                    f"{folder} holds results of something else: choose another --name, or delete it"
                )
        if "generated-swap" in modes and len(modes) == 1:
            raise ValueError(
                "--visual_thoughts=generated-swap with a --name: it shows what other rows drew in mode generated "
                "of the same name, so give --visual_thoughts=generated,generated-swap"
            )
    else:
        sizes = [benchmarks_lib.size(table) for table in tables]
        if limit and own:
            place = data.folder(config, where)
            sizes += [len(visual_opsd.open_source(place, split, task=task)) for task in own]
        differs = [protocol] if protocol else []
        differs += [split] if config and own and split != config.eval.final_split else []
        differs += [f"random{limit}"] if any(limit < size for size in sizes) and limit else []
        if public:
            differs += [*public, *own] if benchmarks else ["public"]
        elif own != tuple(config.data.tasks):
            differs += own
        differs += [f"seed{seed}"] if seed != own_seed else []
        names = {mode: "-".join([stem, label, *differs]) for mode, label in labels.items()}
    for folder in names.values():
        paths.check_writable("--workdir", os.path.join(workdir, "eval", folder))
    batch_size = batch_size or (config.eval.batch_size if config else 16)
    about = {
        "checkpoint": checkpoint,
        "seed": seed,
        "split": split if own else None,
        "step": step,
        "asked_by": protocol or "run",
    }
    return Job(
        workdir,
        config,
        checkpoint,
        names,
        contexts,
        own,
        tables,
        where,
        protocol,
        split,
        limit,
        own_seed,
        ban_marker,
        seed,
        batch_size,
        about,
    )


@dataclasses.dataclass(frozen=True)
class Opened:
    """What answers tasks of a run in its contexts: rows of the split, and the model.

    params: laid out for the sampler. facts: see `facts_of`.
    """

    params: dict
    rows: object
    packer: object
    marker: object
    mesh: object
    facts: dict


def open_model(job: Job, mode: str) -> Opened:
    """Reads what a command needs; ValueError where no row of a task has the visual thoughts that the mode shows."""
    import jax

    from opsd_jax import checkpoint as checkpoint_lib, data, distill, rollout, sharding, tokenizer
    from opsd_jax.model import bagel

    config = data.with_tasks(job.config, job.tasks)
    tok = tokenizer.load(
        data.tokenizer_folder(config, job.where), vocab_size=config.model.llm.vocab_size
    )
    rows, packer = data.Rows(config, job.where, tok, job.split), data.Packer(config, tok)
    for source, name in enumerate(job.tasks if mode in CONTEXTS else ()):
        numbers = _numbers(rows, source, job.limit, job.subset_seed)
        if _without_visual_thoughts(rows, source, numbers) == len(numbers):
            raise ValueError(
                f"--visual_thoughts={mode}: no row of {name}, {job.split}, has visual thoughts: leave the mode "
                "or the task out"
            )
    mesh, model = sharding.make_mesh(tensor=config.mesh.tensor), config_lib.model(config)
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    params = checkpoint_lib.restore_params(job.checkpoint, sharding.abstract(mesh, abstract))
    facts = facts_of(params, rows, packer, job.tasks)
    return Opened(
        distill.for_sampling(mesh, params, config.model.dtype)(params),
        rows,
        packer,
        rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size),
        mesh,
        facts,
    )


def answer_in_context(job: Job, mode: str, opened: Opened, compared=None) -> dict:
    """Tasks of the run, rows packed as in training; the summary."""
    from opsd_jax import answers, sharding

    config, rows, packer, mesh = job.config, opened.rows, opened.packer, opened.mesh
    sampling = config_lib.rollout(
        config,
        packer.tokenizer,
        opened.marker,
        ban_marker=job.ban_marker,
        slots=config.eval.slots,
        refill=0,
        greedy=True,
        shards=sharding.batch_divisor(mesh),
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
    )
    asked = {
        "max_new_tokens": sampling.max_new_tokens,
        "prompts": config.prompts.to_dict(),
        "images": config.images.to_dict(),
    }
    chosen = [_of_rows(rows, source, name, job) for source, name in enumerate(job.tasks)]
    lengths = {
        b.name: dict(zip(b.keys, buckets_of(rows, packer, source, b.keys, (mode,)), strict=True))
        for source, b in enumerate(chosen)
    }
    chosen = [dataclasses.replace(b, size=lengths[b.name].__getitem__) for b in chosen]
    without = (
        {b.name: _without_visual_thoughts(rows, source, b.keys) for source, b in enumerate(chosen)}
        if mode in CONTEXTS
        else {}
    )

    def answer(number, benchmark, keys):
        source = job.tasks.index(benchmark.name)
        filled = [*keys, *[keys[-1]] * (job.batch_size - len(keys))]
        packed, placed = _batch(
            rows, packer, source, filled, mode, job.seed, mesh, max(map(benchmark.size, keys))
        )
        found, seconds, compiled = _sample(opened.params, packed, sampling)
        if compiled:  # or there might be no time of rows of this length at all
            found, seconds, compiled = _sample(opened.params, packed, sampling)
        predictions = _read(found, placed, rows.sources[source], packer.tokenizer)
        return {
            "predictions": [predictions[key] for key in keys],
            "seconds": seconds,
            "compiled": compiled,
        }

    label = f"{mode}-banned" if job.ban_marker else mode
    shown = lambda benchmark, key: _shown(
        rows, job.tasks.index(benchmark.name), key, mode, job.seed
    )
    return _run(
        job,
        mode,
        chosen,
        answers.plan(chosen, job.batch_size),
        answer,
        together=True,
        shown=shown,
        compared=compared,
        protocol=f"mini-greedy-{label}",
        without=without,
        facts=opened.facts,
        asked=asked,
    )


def _asked(job: Job, mode: str, skip_bad: bool, compared) -> dict:
    """Questions put by a protocol, with drawing or without; each process asks its share on its own devices."""
    import jax

    from opsd_jax import answers, data, generate, sharding

    mesh = sharding.make_mesh(
        tensor=job.config.mesh.tensor if job.config else 1, devices=jax.local_devices()
    )
    cache = "jpeg75" if job.protocol == "harness" else "lossless"
    chosen = [
        answers.of_table(table, cache=cache, limit=job.limit, seed=job.subset_seed)
        for table in job.tables
    ]
    bad = {
        benchmark.name: answers.broken(benchmark) for benchmark in chosen
    }  # before minutes of loading
    bad = {name: rows for name, rows in bad.items() if rows}
    if bad and not skip_bad:
        first = next(iter(next(iter(bad.values())).values()))
        where = "; ".join(f"{name}: {', '.join(map(str, rows))}" for name, rows in bad.items())
        raise ValueError(
            f"{sum(map(len, bad.values()))} rows cannot be shown, or no answer can match them, the first: {first}. "
            f"Correct them, or leave them out with --on_bad_row=skip; {where}"
        )
    model = generate.load(job.checkpoint, draw=mode != "none", protocol=job.protocol, mesh=mesh)
    facts = model_facts(model.params, model.tokenizer)
    if job.tasks:
        rows = data.Rows(
            data.with_tasks(job.config, job.tasks), job.where, model.tokenizer, job.split
        )
        facts["data"] = dict(zip(job.tasks, rows.digests, strict=True))
        chosen += [_of_rows(rows, source, name, job) for source, name in enumerate(job.tasks)]
    batch_size = -(-job.batch_size // sharding.batch_divisor(mesh)) * sharding.batch_divisor(mesh)
    for benchmark in chosen:  # what cannot be scored shows before anything is asked
        left = [key for key in benchmark.keys if key not in bad.get(benchmark.name, {})]
        try:
            benchmark.judge(dict.fromkeys(left, ""))
        except ValueError as error:
            raise ValueError(
                f"{benchmark.name}: {len(left)} of {len(benchmark.keys)} rows can be asked, and no score comes of "
                f"them ({error}): mend the rows that cannot be shown, or ask more of them"
            ) from error
    folder = os.path.join(job.workdir, "eval", job.names[mode])
    drawn = _generated_of(job, mode, facts) if mode == "generated-swap" else ""
    batches = answers.plan(chosen, batch_size, bad)
    last = {benchmark.name: number for number, (benchmark, _) in enumerate(batches)}

    def answer(number, benchmark, keys):
        questions = [benchmark.question(key) for key in keys]
        key = jax.random.fold_in(jax.random.key(job.seed), number)
        again = functools.partial(
            answers.ask,
            model,
            questions,
            key,
            mode=mode,
            batch_size=batch_size,
            change=answers.changer(mode, benchmark.name, keys, seed=job.seed, drawn=drawn),
        )
        traces, seconds, compiled = again()
        if (
            compiled and number == last[benchmark.name]
        ):  # or there might be no time of this benchmark at all
            traces, seconds, compiled = again()
        predictions = []
        for row, trace in zip(keys, traces):
            for n, picture in enumerate(trace.pictures):
                generate.save_picture(picture, answers.picture_path(folder, benchmark.name, row, n))
            text = (
                generate.as_harness(trace)
                if job.protocol == "harness" and mode != "none"
                else trace.text
            )
            predictions.append(
                {
                    "index": row,
                    "prediction": text,
                    "expected": benchmark.expected(row),
                    "tokens": trace.tokens,
                    "pictures": len(trace.pictures),
                }
            )
        return {"predictions": predictions, "seconds": seconds, "compiled": compiled}

    def shown(benchmark, key):
        own = [
            (f"picture {n + 1}", picture) for n, picture in enumerate(benchmark.question(key)[0])
        ]
        files = itertools.takewhile(
            os.path.exists,
            (answers.picture_path(folder, benchmark.name, key, n) for n in itertools.count()),
        )
        return own + [(f"drawn {n + 1}", images.open_rgb(file)) for n, file in enumerate(files)]

    return _run(
        job,
        mode,
        chosen,
        batches,
        answer,
        together=False,
        shown=shown,
        compared=compared,
        bad=bad,
        protocol=f"{job.protocol or 'run'}-{mode}",
        facts=facts,
        asked={**dataclasses.asdict(model.protocol), "drawing": model.drawing},
    )


def model_facts(params, tokenizer) -> dict:
    """What tells a model from another one under the same path. Weights that only generate images are apart, so that
    results with and without images have the other fingerprint in common."""
    from opsd_jax import distill

    understanding = distill.understanding(params)
    text = params_lib.flatten(understanding)
    rest = {path: leaf for path, leaf in params_lib.flatten(params).items() if path not in text}
    facts = {"weights": params_lib.fingerprint(understanding), "tokenizer": tokenizer.digest}
    return facts | (
        {"generation_weights": params_lib.fingerprint(params_lib.unflatten(rest))} if rest else {}
    )


def facts_of(params, rows, packer, task_names) -> dict:
    """What tells a run's model and its rows from others under the same paths. params: as they are stored."""
    from opsd_jax import distill

    return {
        **model_facts(distill.understanding(params), packer.tokenizer),
        "data": dict(zip(task_names, rows.digests, strict=True)),
    }


def _generated_of(job: Job, mode: str, facts: dict) -> str:
    """Folder of the results in mode "generated" that go with those of `mode`. ValueError where other weights made them."""
    from opsd_jax import answers

    folder = os.path.join(job.workdir, "eval", job.names[mode].replace(mode, "generated"))
    there = answers.identity_of(folder) if answers.is_begun(folder) else facts
    if any(there.get(key) != facts[key] for key in ("weights", "generation_weights")):
        raise ValueError(
            f"{folder} holds images that other weights generated than those in {job.checkpoint}: delete it, and "
            "evaluate --visual_thoughts=generated again"
        )
    return folder


def _of_rows(rows, source: int, name: str, job: Job):
    """Prepared rows as a benchmark: the task's rule scores."""
    from opsd_jax import answers

    examples = rows.sources[source]

    def question(key):
        example = examples[key]
        picture = images.open_rgb(
            example.problem_image, transparency=job.config.images.transparency
        )
        return [picture], example.question + job.config.prompts.suffix

    def judge(texts):
        found = {}
        for key, text in texts.items():
            answer, hit = is_hit(examples[key], text)
            found[key] = {"pid": examples[key].pid, "answer": answer, "hit": hit}
        return found, None

    keys = tuple(_numbers(rows, source, job.limit, job.subset_seed))
    rows.check_references(source, keys)
    return answers.Benchmark(
        name,
        keys,
        question,
        lambda key: examples[key].answer,
        judge,
        asked=lambda key: (examples[key].pid, examples[key].answer),
        subset=plan.subset_facts(len(keys), len(examples), job.subset_seed),
    )


def _shown(rows, source, key, mode, seed):
    """(caption, picture) of what a row showed: its picture, and what stood in the slots of its visual thoughts."""
    from opsd_jax import context as context_lib
    from opsd_jax.data import generator

    def pixels(image):
        patches = image.patches
        if patches.dtype != np.uint8:  # normalised
            patches = np.round(np.clip(patches + 1, 0, 2) * 127.5).astype(np.uint8)
        return images.unpatchify(patches, image.grid, round((patches.shape[1] / 3) ** 0.5))

    row = rows(source, key)
    found = [("problem", pixels(row.problem))]
    if mode != "none":
        partner = rows.partner(source, key) if mode == "swap" else None
        slots = context_lib.replace_visual_thoughts(
            "none" if mode == "remove" else mode,
            row.problem,
            row.visual_thoughts,
            partner.visual_thoughts if partner else (),
            generator(seed, "eval visual thoughts", source, key),
        )
        found += [
            (f"visual thought {n + 1} ({mode})", pixels(image)) for n, image in enumerate(slots)
        ]
    return found


def _run(
    job: Job,
    mode: str,
    chosen,
    batches,
    answer,
    *,
    together: bool,
    shown,
    compared,
    protocol: str,
    facts: dict,
    asked: dict,
    bad=None,
    without=None,
) -> dict:
    """Answers, scores and writes; the summary.

    facts: fingerprints of the weights, the tokenizer and the tasks' rows, for the summary too. asked: prompts and decoding.
    bad: {benchmark: rows that are left out}. without: {benchmark: how many rows have no visual thoughts}.
    """
    import jax

    from opsd_jax import answers

    name, bad, without = job.names[mode], bad or {}, without or {}
    folder, share = os.path.join(job.workdir, "eval", name), answers.share(batches, together)
    total = sum(len(batches[number][1]) for number in share)
    identity = {
        **job.about,
        **facts,
        "prompt or decoding": asked,
        "mode": mode,
        "protocol": protocol,
        "batch_size": job.batch_size,
        "ban_marker": job.ban_marker,
        "tables": {table.name: table.md5 for table in job.tables},
        "images": {table.name: benchmarks_lib.digest_of_files(table) for table in job.tables},
        "rows": [[benchmark.name, list(keys)] for benchmark, keys in batches],
    }
    if compared:
        check_pairs(compared, chosen, job.about["split"])
    del identity["checkpoint"]  # the weights tell, wherever they are stored
    done = collections.Counter()
    with metrics.Progress(
        total, name, job.split if job.tasks else "", primary=jax.process_index() == 0
    ) as progress:

        def on_batch(record):
            done["rows"] += len(record["predictions"])
            done["hits"] += sum(bool(p.get("hit")) for p in record["predictions"])
            known = (
                {"accuracy": done["hits"] / done["rows"]}
                if "hit" in record["predictions"][0]
                else {}
            )
            progress.update(done["rows"], **known)

        records = answers.collect(
            folder,
            identity,
            batches,
            answer,
            on_batch,
            together=together,
            before_batch=job.before_batch,
        )
    results, processes = [], 1 if together else jax.process_count()
    if records is None:  # another process writes
        return {}
    for benchmark in chosen:
        own = [r for r, (b, _) in zip(records, batches, strict=True) if b is benchmark]
        predictions = {p["index"]: p for r in own for p in r["predictions"]}
        found, judged = benchmark.judge({key: p["prediction"] for key, p in predictions.items()})
        if judged is not None:
            judged |= {
                "bad_rows": [str(key) for key in bad.get(benchmark.name, ())],
                "md5": benchmark.table.md5,
                "without_image": list(benchmark.table.dropped),
            }
            judged |= (
                {"respelt_answers": benchmark.table.respelt} if benchmark.table.respelt else {}
            )
        in_order = [
            {**predictions[key], **found[key]} for key in benchmark.keys if key in predictions
        ]
        clean = [r for r in own if not r["compiled"]]  # several processes answer side by side
        results.append(
            Result(
                benchmark.name,
                in_order,
                sum(r["seconds"] for r in clean) / processes,
                sum(len(r["predictions"]) for r in clean),
                judged,
                without.get(benchmark.name),
                benchmark.subset,
            )
        )
        if benchmark.table:
            answered = tuple(row for row in benchmark.table.rows if row.index in predictions)
            benchmarks_lib.export(
                os.path.join(folder, f"{benchmark.name}.tsv"),
                dataclasses.replace(benchmark.table, rows=answered),
                {key: p["prediction"] for key, p in predictions.items()},
            )
    summary = write(folder, results, protocol=protocol, mode=mode, **job.about, **facts)
    metrics.write_text(
        os.path.join(folder, "report.html"),
        page(name, summary, results, {b.name: b for b in chosen}, shown, compared),
    )
    return summary


# --- the page -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compared:
    """Earlier results that new ones are compared with."""

    name: str
    split: str | None  # of the tasks
    hits: dict  # benchmark -> {what was asked, as in `answers.Benchmark.asked`: whether the answer was right}


def read_results(workdir: str, against: str) -> Compared:
    """Earlier results: a name in W/eval, or a folder."""
    folder = against if os.path.isdir(against) else os.path.join(workdir, "eval", against)
    record, path = (os.path.join(folder, name) for name in ("summary.json", "predictions.jsonl"))
    if absent := [file for file in (record, path) if not os.path.isfile(file)]:
        raise FileNotFoundError(
            f"--against={against}: no {absent[-1]}: give a name in {workdir}/eval, or such a folder, of a "
            "finished evaluation"
        )
    summary, hits, twice = read_summary(record), {}, set()
    try:
        with open(path, encoding="utf-8") as f:
            for row in map(json.loads, f):
                name = row["benchmark"]
                asked = (
                    (row["pid"], row["expected"])
                    if "pid" in row
                    else (summary["benchmarks"][name]["md5"], str(row["index"]))
                )
                if asked in hits.setdefault(name, {}):
                    twice.add((name, asked))
                hits[name][asked] = bool(row["hit"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--against={against}: {path} is damaged ({error!r}): evaluate again"
        ) from error
    for name, asked in twice:  # which of them a row is the pair of, nothing tells
        del hits[name][asked]
    return Compared(os.path.basename(os.path.normpath(folder)), summary.get("split"), hits)


def check_pairs(compared: Compared, chosen, split: str | None) -> None:
    """ValueError unless the rows of each benchmark are those that the earlier results answered, half of them at least.

    A row and its pair have the same pid and the same answer, of a public table the same file and index.
    """
    shared = [benchmark for benchmark in chosen if benchmark.name in compared.hits]
    start = f"--against={compared.name}"
    if not shared:
        raise ValueError(
            f"{start} has results of {', '.join(compared.hits) or 'nothing'}, not of "
            f"{', '.join(b.name for b in chosen)}: give results of the same benchmarks"
        )
    if any(not b.table for b in shared) and split and compared.split and split != compared.split:
        raise ValueError(
            f"{start} has results of split {compared.split}, these are of {split}: give results of the same rows"
        )
    for benchmark in shared:
        here, there = (
            {benchmark.asked(key) for key in benchmark.keys},
            compared.hits[benchmark.name],
        )
        pairs = len(here & there.keys())
        others = (
            len({name for name, _ in here} & {name for name, _ in there.keys() - here})
            if not benchmark.table
            else 0
        )
        if 2 * pairs < min(len(here), len(there)) or not pairs or 10 * others > pairs:
            why = f", and {others} have the same pid and another answer" if others else ""
            raise ValueError(
                f"{start}: {benchmark.name} has {len(here)} rows here and {len(there)} there, of which {pairs} are "
                f"the same{why}: give results of the same data"
            )


def page(
    name: str, summary: dict, results, benchmarks: dict, shown, compared=None, most: int = 30
) -> str:
    """HTML of one evaluation: scores, comparison, and up to `most` rows of each benchmark, spread evenly.

    shown: (benchmark, key) -> list of (caption, picture). compared: a `Compared`.
    """
    from opsd_jax import report

    scores = summary["benchmarks"]
    parts = [
        report.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, protocol `{summary['protocol']}`, seed {summary['seed']}. Intervals hold "
            "95 % (Wilson). Seconds leave out batches that compiled a program; “timed” says how many rows are left."
            + "".join(
                f" {task}: a random subset, {_counted(s)}, chosen with seed {s['rows']['seed']}."
                for task, s in scores.items()
                if "rows" in s
            )
        )
    ]
    parts.append(
        report.intervals(
            [
                (task, percent(s), 100 * s["interval_95"][0], 100 * s["interval_95"][1])
                for task, s in scores.items()
            ]
        )
    )
    rows = []
    for task, s in scores.items():
        teacher, student = benchmarks_lib.PAPER.get(task, (None, None))
        rows.append(
            [
                task,
                percent(s),
                _counted(s),
                s["mean_output_tokens"],
                s["seconds_per_sample"],
                s["timed_samples"],
                s.get("pictures_per_sample"),
                s.get("needs_judge"),
                len(s.get("bad_rows", ())),
                teacher,
                student,
            ]
        )
    parts.append(
        report.table(
            [
                "benchmark",
                "score %",
                "n",
                "tokens",
                "s/sample",
                "timed",
                "pictures",
                "no rule applied",
                "rows left out",
                "paper: ThinkMorph",
                "paper: Visual-OPSD",
            ],
            rows,
        )
    )
    for task, s in scores.items():
        if s["categories"] or s.get("extras"):
            parts += [
                report.heading(task, 3),
                report.table(
                    ["by", "value"],
                    [[k, v] for k, v in {**s["categories"], **s.get("extras", {})}.items()],
                ),
            ]
    if compared:
        lines = []
        for result in (r for r in results if r.name in compared.hits):
            hits, asked = compared.hits[result.name], benchmarks[result.name].asked
            both = [
                (bool(p["hit"]), hits[asked(p["index"])])
                for p in result.predictions
                if asked(p["index"]) in hits
            ]
            wins, losses = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
            lines.append(
                [
                    result.name,
                    len(both),
                    wins,
                    losses,
                    len(both) - wins - losses,
                    metrics.mcnemar(wins, losses),
                ]
            )
        parts += [
            report.heading(f"Against {compared.name}"),
            report.table(
                ["benchmark", "rows of both", "won", "lost", "alike", "p (McNemar, exact)"], lines
            ),
        ]
    for result in results:
        step = max(1, -(-len(result.predictions) // most))
        items = []
        for p in result.predictions[::step]:
            text = benchmarks[result.name].question(p["index"])[1]
            pictures = [
                report.picture(picture, caption=caption)
                for caption, picture in shown(benchmarks[result.name], p["index"])
            ]
            items.append(
                {
                    "title": f"{result.name} {p.get('pid', p['index'])}",
                    "hit": bool(p["hit"]),
                    "parts": [
                        report.row(*pictures),
                        report.paragraph(text),
                        report.paragraph(p["prediction"]),
                    ],
                    "note": f"expected {p['expected']}; {p['tokens']} tokens",
                }
            )
        parts += [
            report.heading(f"{result.name}: {len(items)} of {len(result.predictions)} rows"),
            report.samples(items),
        ]
    return report.page(f"Evaluation {name}", *parts)


def main(argv=None) -> None:
    """`python -m opsd_jax.eval`; errors in the arguments end it with one line and code 1."""
    import argparse

    import jax

    from opsd_jax import checkpoint as checkpoint_lib

    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.eval",
        description="Answer the questions of benchmarks and score the answers.",
    )
    parser.add_argument(
        "--workdir", required=True, help="of a run, or of one of its arms: W/arms/NAME"
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        help="a step folder (default: the newest of the run), or a released or imported model",
    )
    parser.add_argument(
        "--benchmarks",
        default=(),
        type=cli.names,
        help="tasks or families, public tables (default: all tables of --data_dir, else all of the run)",
    )
    parser.add_argument("--data_dir", default="", help="folder of the public tables, NAME.tsv")
    parser.add_argument(
        "--visual_thoughts",
        default=("none",),
        type=cli.names,
        help=f"{', '.join(MODES)}; several separated by commas",
    )
    parser.add_argument(
        "--protocol", default="", help="paper or harness (default: the run's own, greedy)"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        help="a random subset of so many rows of each benchmark (default, or 0: all)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=0, help="rows (default: the run's config.eval.batch_size)"
    )
    parser.add_argument(
        "--on_bad_row",
        choices=("fail", "skip"),
        default="fail",
        help="rows of a table that cannot be shown or scored; skip lists them in the summary",
    )
    parser.add_argument(
        "--ban_marker", action="store_true", help="never sample what completes <image_start>"
    )
    parser.add_argument(
        "--seed",
        default=(None,),
        type=cli.whole_numbers,
        help="of noise and sampling; several separated by commas (default: the run's)",
    )
    parser.add_argument(
        "--against", default="", help="results to compare with: a name in W/eval, or a folder"
    )
    parser.add_argument(
        "--name",
        default="",
        help="of the results in W/eval (default: <step>-<mode>[-banned][-<protocol>])",
    )
    args = parser.parse_args(argv)
    try:
        cli.check_once("seed", args.seed)
        for seed in args.seed:
            if seed is not None:
                cli.check_seed(seed)
        distributed.initialize()
        with checkpoint_lib.stoppable("the same command continues") as stop:
            for seed in args.seed:
                name = f"{args.name}-seed{seed}" if args.name and len(args.seed) > 1 else args.name
                evaluate_run(
                    args.workdir,
                    args.visual_thoughts,
                    checkpoint=args.checkpoint,
                    split=args.split,
                    benchmarks=args.benchmarks,
                    data_dir=args.data_dir,
                    protocol=args.protocol,
                    limit=args.rows,
                    ban_marker=args.ban_marker,
                    seed=seed,
                    name=name,
                    batch_size=args.batch_size,
                    skip_bad=args.on_bad_row == "skip",
                    against=args.against,
                    before_batch=stop.check,
                )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    if jax.process_index() == 0:
        print(write_table(args.workdir), end="")


if __name__ == "__main__":
    main()
