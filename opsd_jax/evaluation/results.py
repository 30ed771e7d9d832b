"""Result files of evaluations, and tables of several of them."""

import collections
import dataclasses
import json
import os
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from opsd_jax.evaluation import statistics, tables
from opsd_jax.evaluation.benchmark import Benchmark
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Result:
    """Predictions of one benchmark in one mode, with what they cost.

    Attributes:
      name: of the benchmark.
      predictions: dicts with index, prediction, hit, tokens; of prepared examples also pid, answer,
        expected, stop.
      seconds: of generation, without batches that compiled a program.
      timed: number of examples that `seconds` covers.
      judged: scores by another rule than the share of hits, see `Benchmark.judge`.
      without_visual_thoughts, subset: see `Benchmark`.
    """

    name: str
    predictions: list[dict]
    seconds: float
    timed: int
    judged: dict | None = None
    without_visual_thoughts: int | None = None
    subset: dict | None = None

    @property
    def hits(self) -> int:
        return sum(bool(p["hit"]) for p in self.predictions)

    def summary(self) -> dict:
        """What summary.json says of the benchmark."""
        n = len(self.predictions)
        found = self.judged or {
            "overall": self.hits / n,
            "unit": "fraction",
            "n": n,
            "categories": {},
            "interval_95": list(statistics.wilson(self.hits, n)),
        }
        found = {
            **found,
            "mean_output_tokens": sum(p["tokens"] for p in self.predictions) / n,
            "seconds_per_sample": self.seconds / self.timed if self.timed else None,
            "timed_samples": self.timed,
        }
        if self.subset:
            found["rows"] = self.subset
        if "stop" in self.predictions[0]:
            found |= {
                "eos_rate": sum(p["stop"] == "eos" for p in self.predictions) / n,
                "image_skip_rate": sum(p["image_skips"] > 0 for p in self.predictions) / n,
            }
        if self.without_visual_thoughts is not None:
            found["without_visual_thoughts"] = self.without_visual_thoughts
        if "pictures" in self.predictions[0]:
            found["pictures_per_sample"] = sum(p["pictures"] for p in self.predictions) / n
        return found


def collect(
    benchmarks: Sequence[Benchmark],
    batches: Sequence[tuple[Benchmark, list]],
    records: Sequence[dict],
    *,
    processes: int = 1,
) -> list[Result]:
    """Scores the records of `inference.answer`, benchmark by benchmark.

    Args:
      batches: (benchmark, keys), as they were answered. records: of the batches, in their order.
      processes: how many of them answered side by side, so that their seconds overlap.
    """
    results = []
    for benchmark in benchmarks:
        own = [r for r, (b, _) in zip(records, batches, strict=True) if b is benchmark]
        predictions = {p["index"]: p for r in own for p in r["predictions"]}
        found, judged = benchmark.judge({key: p["prediction"] for key, p in predictions.items()})
        if judged is not None:
            judged = judged | {"bad_rows": [str(key) for key in benchmark.left_out]}
        clean = [r for r in own if not r["compiled"]]
        results.append(
            Result(
                benchmark.name,
                [{**predictions[key], **found[key]} for key in benchmark.keys],
                sum(r["seconds"] for r in clean) / processes,
                sum(len(r["predictions"]) for r in clean),
                judged,
                benchmark.without_visual_thoughts,
                benchmark.subset,
            )
        )
    return results


def write(directory: str, results, *, checkpoint: str, seed: int, protocol: str, **more) -> dict:
    """Writes predictions.jsonl and summary.json, the latter last and atomically.

    Returns the summary.
    """
    summary = {
        "protocol": protocol,
        "checkpoint": checkpoint,
        "seed": seed,
        **more,
        "benchmarks": {r.name: r.summary() for r in results},
    }
    files.write(
        os.path.join(directory, "predictions.jsonl"),
        "".join(
            json.dumps({"benchmark": r.name, **p}) + "\n" for r in results for p in r.predictions
        ),
        primary=jax.process_index() == 0,
    )
    files.write(
        os.path.join(directory, "summary.json"),
        json.dumps(summary, indent=1) + "\n",
        primary=jax.process_index() == 0,
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
    """Writes W/eval/summary.md, the table of all summaries in W/eval, and returns it. What cannot
    be read is left out, with a warning."""
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
    files.write(os.path.join(folder, "summary.md"), text, primary=jax.process_index() == 0)
    return text


def percent(found: dict) -> float:
    """The overall score of a benchmark's summary in per cent."""
    return found["overall"] * (100 if found["unit"] == "fraction" else 1)


def counted(found: dict) -> str:
    """How many rows a score is of: "128", or of a random subset "128 of 512"."""
    return f"{found['n']} of {found['rows']['of']}" if "rows" in found else str(found["n"])


def table(summaries: dict[str, dict]) -> str:
    """Markdown table of summaries by name: score with its 95 % interval, tokens, seconds.

    The paper's where it has one.
    """
    public = any(b in tables.PAPER for s in summaries.values() for b in s["benchmarks"])
    head = ["run", "task", "accuracy", "95 % interval", "n", "tokens", "s/sample"]
    head += ["paper: ThinkMorph", "paper: Visual-OPSD"] if public else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, summary in summaries.items():
        for task, b in summary["benchmarks"].items():
            low, high = b["interval_95"]
            seconds = "–" if b["seconds_per_sample"] is None else f"{b['seconds_per_sample']:.4f}"
            line = (
                f"| {name} | {task} | {percent(b):.1f} % | {100 * low:.1f}–{100 * high:.1f} "
                f"| {counted(b)} | {b['mean_output_tokens']:.1f} | {seconds} |"
            )
            if public:
                teacher, student = tables.PAPER.get(task, (None, None))
                line += f" {teacher} | {student} |" if teacher else " | |"
            lines.append(line)
    return "\n".join(lines)


def _model_of(summary: dict) -> str:
    """What two summaries of one model have in common: its weights.

    Of results without a fingerprint the path.
    """
    return summary.get("weights") or summary["checkpoint"]


def seeds(summaries: dict[str, dict]) -> str:
    """Markdown table of scores over seeds: of summaries that differ in the seed alone, mean and
    standard deviation.
    """
    groups = collections.defaultdict(dict)
    for summary in summaries.values():
        alike = [_model_of(summary), *(summary.get(key) for key in ("protocol", "split"))]
        for task, b in summary["benchmarks"].items():
            groups[task, counted(b), *map(str, [*alike, b.get("rows")])].setdefault(
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
    """Markdown table of how much longer drawing takes than answering in text: pairs that differ in
    the mode alone.
    """
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
            "| task | drawing | text alone | pictures a sample | s/sample | s/sample | speed-up "
            "(paper: 14.3x) | accuracy gained |",
            "|---" * 8 + "|",
            *lines,
        ]
    )


@dataclasses.dataclass(frozen=True)
class Compared:
    """Earlier results that new ones are compared with."""

    name: str
    split: str | None  # of the tasks
    # benchmark -> {what was asked, as in `answers.Benchmark.asked`: whether the answer was right}
    hits: dict


def read_results(workdir: str, against: str) -> Compared:
    """Earlier results: a name in W/eval, or a folder."""
    folder = against if os.path.isdir(against) else os.path.join(workdir, "eval", against)
    record, path = (os.path.join(folder, name) for name in ("summary.json", "predictions.jsonl"))
    if absent := [file for file in (record, path) if not os.path.isfile(file)]:
        raise FileNotFoundError(
            f"--against={against}: no {absent[-1]}: give a name in {workdir}/eval, or such a "
            "folder, of a finished evaluation"
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
    """ValueError unless the rows of each benchmark are those that the earlier results answered,
    half of them at least.

    A row and its pair have the same pid and the same answer, of a public table the same file and
    index.
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
            f"{start} has results of split {compared.split}, these are of {split}: give results "
            "of the same rows"
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
                f"{start}: {benchmark.name} has {len(here)} rows here and {len(there)} there, of "
                f"which {pairs} are the same{why}: give results of the same data"
            )
