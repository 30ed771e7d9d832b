"""Results of an evaluation: scores of its predictions, and their files."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax

from opsd_jax.evaluation import statistics
from opsd_jax.evaluation.benchmark import Benchmark
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files, run_folder


@dataclasses.dataclass(frozen=True)
class Result:
    """Predictions for one benchmark in one mode, and their cost.

    Attributes:
      name: name of the benchmark.
      predictions: dicts with index, prediction, hit, tokens; of prepared examples also pid, answer,
        expected, stop; where several answers were sampled, `samples` has them all, of which the
        prediction is the first.
      seconds: time to answer, without batches that compiled a program.
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
            found["eos_rate"] = sum(p["stop"] == "eos" for p in self.predictions) / n
        if "image_skips" in self.predictions[0]:
            found["image_skip_rate"] = sum(p["image_skips"] > 0 for p in self.predictions) / n
        if "samples" in self.predictions[0]:
            found |= self._of_samples()
        if self.without_visual_thoughts is not None:
            found["without_visual_thoughts"] = self.without_visual_thoughts
        if "pictures" in self.predictions[0]:
            found["pictures_per_sample"] = sum(p["pictures"] for p in self.predictions) / n
        return found

    def _of_samples(self) -> dict:
        """What summary.json says of several sampled answers to each example.

        pass_at_k has k = 1, 2, 4, ... and the number of answers.
        """
        right = [sum(sample["hit"] for sample in p["samples"]) for p in self.predictions]
        count = len(self.predictions[0]["samples"])
        powers = [2**n for n in range(count.bit_length()) if 2**n < count]
        return {
            "samples": count,
            "pass_at_k": {
                str(k): sum(statistics.pass_at_k(count, c, k) for c in right) / len(right)
                for k in (*powers, count)
            },
        }


def collect(
    benchmarks: Sequence[Benchmark],
    batches: Sequence[tuple[Benchmark, list]],
    records: Sequence[dict],
    *,
    processes: int = 1,
) -> list[Result]:
    """Scores the records of `inference.answer`, benchmark by benchmark.

    Args:
      batches: (benchmark, keys) of each batch.
      records: a record per batch, in the same order.
      processes: number of processes that answered in parallel, so that their seconds overlap.
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


def write(
    directory: str,
    results: Sequence[Result],
    *,
    checkpoint: str,
    seed: int,
    protocol: str,
    **more: Any,
) -> dict:
    """Writes predictions.jsonl and then summary.json, each atomically; returns the summary.

    Args:
      directory: folder of the results. more: further entries of the summary.
    """
    summary = {
        "protocol": protocol,
        "checkpoint": checkpoint,
        "seed": seed,
        **more,
        "benchmarks": {r.name: r.summary() for r in results},
    }
    files.write(
        os.path.join(directory, run_folder.PREDICTIONS),
        "".join(
            json.dumps({"benchmark": r.name, **p}) + "\n" for r in results for p in r.predictions
        ),
        primary=jax.process_index() == 0,
    )
    files.write(
        os.path.join(directory, run_folder.SUMMARY),
        json.dumps(summary, indent=1) + "\n",
        primary=jax.process_index() == 0,
    )
    return summary


def read_predictions(directory: str) -> list[dict]:
    """The lines of predictions.jsonl in a folder of results: one dict per answer, in order.

    Raises FileNotFoundError where there are none, ValueError for a damaged file.
    """
    path = os.path.join(directory, run_folder.PREDICTIONS)
    with open(path, encoding="utf-8") as lines:
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete its folder, and evaluate again"
            ) from error


_IN_SUMMARIES = ("overall", "unit", "n", "interval_95", "mean_output_tokens", "seconds_per_sample")


def read_summary(path: str) -> dict:
    """Content of a summary.json. Raises ValueError if it is truncated or another kind of file."""
    fix = "delete its folder, and evaluate again"
    found = json_files.read(path, fix=fix)
    try:
        scores = found.get("benchmarks", {})
        lacking = [key for key in _IN_SUMMARIES for b in scores.values() if key not in b]
        lacking += [
            key for key in ("seed", "checkpoint", "protocol") if scores and key not in found
        ]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a summary ({error}): {fix}") from error
    if lacking:
        raise ValueError(f"{path} is not a summary (no {lacking[0]}): {fix}")
    return found


def percent(found: dict) -> float:
    """The overall score of a benchmark's summary in per cent."""
    return found["overall"] * (100 if found["unit"] == "fraction" else 1)


def counted(found: dict) -> str:
    """Number of examples of a score: "128", or for a random subset "128 of 512"."""
    return f"{found['n']} of {found['rows']['of']}" if "rows" in found else str(found["n"])
