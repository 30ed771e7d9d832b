"""Greedy answers to every row of a split, scored: `python -m opsd_jax.eval --workdir=W`.

What the model sees is chosen by --visual_thoughts: `none` is the student (image and question), the others are the
teacher's context with its own pictures (`real`), noise, another row's (`swap`) or the problem image (`image`).
"""

import dataclasses
import json
import os
import time

import numpy as np

from opsd_jax import metrics, tasks


@dataclasses.dataclass(frozen=True)
class Result:
    """Predictions of one benchmark in one mode, with what they cost."""

    name: str
    predictions: list  # dicts: index, pid, prediction, answer, expected, hit, tokens, stop, image_skips
    seconds: float  # of generation, without the first batch (it compiles)
    timed: int  # rows that `seconds` covers

    @property
    def hits(self) -> int:
        return sum(p["hit"] for p in self.predictions)

    def summary(self) -> dict:
        n = len(self.predictions)
        low, high = metrics.wilson(self.hits, n)
        return {
            "overall": self.hits / n, "unit": "fraction", "n": n, "categories": {}, "interval_95": [low, high],
            "mean_output_tokens": sum(p["tokens"] for p in self.predictions) / n,
            "seconds_per_sample": self.seconds / self.timed if self.timed else None, "timed_samples": self.timed,
            "eos_rate": sum(p["stop"] == "eos" for p in self.predictions) / n,
            "image_skip_rate": sum(p["image_skips"] > 0 for p in self.predictions) / n,
        }


def is_hit(example, text: str) -> tuple[str | None, bool]:
    """(answer found in the text, whether it is right): by the procedural task's own rule, or word for word."""
    answer = tasks.extract_answer(text)
    if "family" in example.metadata:
        return answer, tasks.score(example.metadata, answer)
    return answer, answer is not None and answer.split() == example.answer.split()


def batches(size: int, batch_size: int):
    """Row numbers by batch; the last batch is filled up with its last row: ([rows], real ones)."""
    for start in range(0, size, batch_size):
        rows = list(range(start, min(start + batch_size, size)))
        yield rows + [rows[-1]] * (batch_size - len(rows)), len(rows)


def contexts(rows, packer, source: int, numbers, mode: str, seed: int):
    """Prepared rows and the context of a mode for them: the student's for "none", else the teacher's."""
    from opsd_jax.data import generator

    prepared = [rows(source, n) for n in numbers]
    if mode == "none":
        return prepared, packer.student(prepared)
    partners = [rows.partner(source, n) if mode == "swap" else None for n in numbers]
    return prepared, packer.teacher(prepared, partners, mode, generator(seed, "eval visual thoughts", numbers[0]))


def evaluate(params, rows, packer, *, config, task_names, mode: str, batch_size: int, limit: int = 0, seed: int = 0,
             mesh=None, on_batch=None) -> list[Result]:
    """Answers all rows of all sources greedily.

    Args:
      params: the model's dict. rows, packer: of the split. config: RolloutConfig; sampling is made greedy.
      mode: see the module. limit: first rows of each task only; 0 for all. on_batch: called with the rows done.
    """
    import jax

    from opsd_jax import rollout, sharding

    config = dataclasses.replace(config, greedy=True)
    results = []
    for source, name in enumerate(task_names):
        size = len(rows.sources[source])
        size = min(limit, size) if limit else size
        predictions, seconds, timed = [], 0.0, 0
        for numbers, real in batches(size, batch_size):
            prepared, packed = contexts(rows, packer, source, numbers, mode, seed)
            packed = sharding.put_batch(mesh, packed) if mesh else packed
            began = time.perf_counter()
            trajectory = jax.device_get(rollout.sample(params, packed, jax.random.key(seed), config=config))
            if predictions:  # the first batch compiles
                seconds, timed = seconds + time.perf_counter() - began, timed + real
            for b in range(real):
                ids = trajectory.tokens[b][trajectory.mask[b]]
                text = packer.tokenizer.decode(ids)
                answer, hit = is_hit(prepared[b].example, text)
                predictions.append({
                    "index": numbers[b], "pid": prepared[b].example.pid, "prediction": text, "answer": answer,
                    "expected": prepared[b].example.answer, "hit": bool(hit), "tokens": len(ids),
                    "stop": "eos" if trajectory.stop[b] == rollout.STOP_EOS else "budget",
                    "image_skips": int(trajectory.num_skips[b])})
            if on_batch:
                on_batch(len(predictions))
        results.append(Result(name, predictions, seconds, timed))
    return results


def reference_kl(teacher, student, rows, packer, *, config, task_names, batch_size: int, limit: int = 0,
                 mesh=None) -> dict:
    """KL(teacher with the true visual thoughts || student without) on the rows' text traces, nats per token.

    Paper Eq. 4 on fixed completions: mean over the tokens of a trace, then over rows. config: ModelConfig.
    Returns {task: {"kl", "n"}}.
    """
    import jax

    from opsd_jax import context as context_lib
    from opsd_jax import distill, sharding

    found = {}
    for source, name in enumerate(task_names):
        size = len(rows.sources[source])
        size = min(limit, size) if limit else size
        width = packer.buckets.trace[-1][2]
        values = []
        for numbers, real in batches(size, batch_size):
            prepared, c_t = contexts(rows, packer, source, numbers, "real", 0)
            tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
            for b, row in enumerate(prepared):
                ids = packer.reference(row)
                tokens[b, :len(ids)], mask[b, :len(ids)] = ids, True
            batch = distill.Batch(packer.student(prepared), c_t)
            if mesh:
                batch, tokens, mask = sharding.put_batch(mesh, (batch, tokens, mask))
            completion = context_lib.completion(tokens, mask, bos=packer.tokenizer.bos, eos=packer.tokenizer.eos)
            kl = distill.kl_to_student(teacher, student, batch, completion, config=config)
            kl, counted = jax.device_get((kl, completion.mask))
            values += list((kl * counted).sum(1)[:real] / counted.sum(1)[:real])
        found[name] = {"kl": float(np.mean(values)), "n": len(values)}
    return found


def write(directory: str, results, *, checkpoint: str, seed: int, protocol: str, **more) -> dict:
    """Writes predictions.jsonl and summary.json, the latter last and atomically; returns the summary."""
    os.makedirs(directory, exist_ok=True)
    _write(os.path.join(directory, "predictions.jsonl"), "".join(
        json.dumps({"benchmark": r.name, **p}) + "\n" for r in results for p in r.predictions))
    summary = {"protocol": protocol, "checkpoint": checkpoint, "seed": seed, **more,
               "benchmarks": {r.name: r.summary() for r in results}}
    _write(os.path.join(directory, "summary.json"), json.dumps(summary, indent=1) + "\n")
    return summary


def _write(path, text):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def table(summaries: dict[str, dict]) -> str:
    """Markdown table of summaries by name: accuracy with its 95 % interval, tokens, seconds."""
    lines = ["| run | task | accuracy | 95 % interval | n | tokens | s/sample |", "|---|---|---|---|---|---|---|"]
    for name, summary in summaries.items():
        for task, b in summary["benchmarks"].items():
            low, high = b["interval_95"]
            cost = f"{b['seconds_per_sample']:.4f}" if b["seconds_per_sample"] is not None else "-"
            lines.append(f"| {name} | {task} | {100 * b['overall']:.1f} % | {100 * low:.1f}–{100 * high:.1f} | {b['n']} "
                         f"| {b['mean_output_tokens']:.1f} | {cost} |")
    return "\n".join(lines)
