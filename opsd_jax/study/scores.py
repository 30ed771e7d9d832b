"""What the finished runs and arms of a study answered, and how they differ from the reference."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from opsd_jax.evaluation import results, statistics
from opsd_jax.inputs import json_files
from opsd_jax.runtime import run_folder
from opsd_jax.study.grid import OPSD, Job, Study

# The weights that OPSD and all arms start from, answering without visual thoughts and with them.
START, TEACHER = "start", "teacher"


@dataclasses.dataclass(frozen=True)
class Score:
    """One final evaluation on one task.

    Attributes:
      hits: {(index, pid, expected answer): whether the answer was right}.
      accuracy, tokens: share of right answers, mean number of output tokens.
      real: accuracy with the true visual thoughts; None if that was not measured, as in the next.
      kl_before, kl, closure: KL to the starting teacher before and after, see `stage_evaluation`.
    """

    hits: Mapping[tuple[str, ...], bool]
    accuracy: float
    tokens: float
    real: float | None = None
    kl_before: float | None = None
    kl: float | None = None
    closure: float | None = None


Scores = dict[str, dict[str, dict[int, dict[str, Score]]]]
"""{group: {arm: {seed: {task: score}}}}, of the jobs that are done."""


def read(study: Study) -> Scores:
    """The scores of all jobs that are done, and of the weights that their runs started with.

    Raises:
      ValueError: a damaged file, or answers to another split than the settings name.
    """
    found: Scores = {}
    for job in study.jobs:
        group = found.setdefault(job.group, {})
        if not job.is_done():
            continue
        if job.is_run:
            for arm, mode in ((START, "none"), (TEACHER, "real")):
                if os.path.exists(_summary(job, job.start, mode)):
                    group.setdefault(arm, {})[job.seed] = _scores(job, job.start, mode)
        group.setdefault(job.arm, {})[job.seed] = _trained(job)
    return found


def predictions(job: Job, step: int, mode: str) -> list[dict]:
    """The answers of an evaluation, as in predictions.jsonl."""
    folder = os.path.dirname(_summary(job, step, mode))
    path = os.path.join(folder, run_folder.PREDICTIONS)
    try:
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete {folder}, and give the same command again"
        ) from error


def _summary(job: Job, step: int, name: str) -> str:
    folder = run_folder.evaluation(job.workdir, run_folder.evaluation_name(step, name))
    return os.path.join(folder, run_folder.SUMMARY)


def _trained(job: Job) -> dict[str, Score]:
    """Scores of the job's last step."""
    found = _scores(job, job.last, "none")
    real = _read(job, job.last, "real")["benchmarks"] if _exists(job, "real") else {}
    kl = {}
    if _exists(job, "kl"):
        kl = json_files.read(_summary(job, job.last, "kl"), fix="delete it")["tasks"]
    for task, score in found.items():
        more: dict = {"real": real[task]["overall"]} if task in real else {}
        if task in kl:
            more |= {"kl_before": kl[task]["before"], "kl": kl[task]["after"]}
            more["closure"] = kl[task]["closure"]
        found[task] = dataclasses.replace(score, **more)
    return found


def _exists(job: Job, name: str) -> bool:
    return os.path.exists(_summary(job, job.last, name))


def _read(job: Job, step: int, mode: str) -> dict:
    path, split = _summary(job, step, mode), job.config.eval.final_split
    summary = results.read_summary(path)
    if summary.get("split", split) != split:
        raise ValueError(
            f"{path} is of the split {summary['split']}, and the settings say {split}: delete "
            f"{run_folder.evaluations(job.workdir)}, and give the same command again"
        )
    return summary


def _scores(job: Job, step: int, mode: str) -> dict[str, Score]:
    """Scores of one evaluation, {task: score}."""
    hits: dict[str, dict[tuple[str, ...], bool]] = {}
    for p in predictions(job, step, mode):
        key = tuple(str(p[name]) for name in ("index", "pid", "expected"))
        hits.setdefault(p["benchmark"], {})[key] = bool(p["hit"])
    return {
        task: Score(hits[task], b["overall"], b["mean_output_tokens"])
        for task, b in _read(job, step, mode)["benchmarks"].items()
    }


# --- differences ---------------------------------------------------------------------------------


def difference(
    arm: Mapping[int, Mapping[str, Score]], reference: Mapping[int, Mapping[str, Score]], task: str
) -> dict | None:
    """Accuracy of an arm minus that of the reference, question by question.

    Args:
      arm, reference: {seed: {task: score}}.
    Returns:
      {"mean", "interval_95", "seeds": those that both have, "rows": questions of each seed}, in
      0..1; None where both have no seed.
    """
    seeds = [s for s in arm if task in arm[s] and task in reference.get(s, {})]
    keys, values = [], []
    for seed in seeds:
        ours, theirs = arm[seed][task].hits, reference[seed][task].hits
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"seed {seed}, {task}: {len(ours)} and {len(theirs)} questions, of which "
                f"{len(ours.keys() & theirs.keys())} are the same: evaluate both again"
            )
        keys.append(sorted(ours))
        values.append(np.array([float(ours[k]) - float(theirs[k]) for k in keys[-1]]))
    if not seeds:
        return None
    shared = all(own == keys[0] for own in keys)
    low, high = statistics.paired_interval(values, shared=shared)
    return {
        "mean": float(np.mean([part.mean() for part in values])),
        "interval_95": [low, high],
        "seeds": seeds,
        "rows": len(keys[0]) if len({*map(len, keys)}) == 1 else [*map(len, keys)],
    }


def rows(study: Study, scores: Scores, failed: Mapping[str, str]) -> list[dict]:
    """The rows of the table: one for each group, arm and task.

    Args:
      failed: {name of a job: why it is not done}.
    Returns:
      dicts with group, arm, task, accuracy, seeds {seed: accuracy}, difference and over_start (see
      `difference`: from the reference, and of a trained arm from the start; None for others),
      real, tokens, kl_before, kl, closure (means over seeds; None where they were not measured),
      and status: "done", or what is missing.
    """
    found = []
    for group in study.groups:
        of_group = scores[group]
        tasks = list(dict.fromkeys(t for a in of_group.values() for s in a.values() for t in s))
        starts = [arm for arm in (START, TEACHER) if arm in of_group]
        for arm in (*starts, *study.arms(group)):
            seeds = of_group.get(arm, {})
            status = _status(study, failed, group, OPSD if arm in starts else arm)
            for task in tasks or [""]:
                own = {seed: by_task[task] for seed, by_task in seeds.items() if task in by_task}
                means = {
                    key: _mean([getattr(score, key) for score in own.values()])
                    for key in ("accuracy", "real", "tokens", "kl_before", "kl", "closure")
                }
                versus = {
                    other: difference(seeds, of_group.get(other, {}), task)
                    for other in (study.reference, START)
                    if other != arm
                }
                found.append(
                    {
                        "group": group,
                        "arm": arm,
                        "task": task,
                        "seeds": {seed: score.accuracy for seed, score in own.items()},
                        "difference": versus.get(study.reference),
                        "over_start": None if arm == TEACHER else versus.get(START),
                        **means,
                        "status": status,
                    }
                )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None


def _status(study: Study, failed: Mapping[str, str], group: str, arm: str) -> str:
    """ "done", or what is missing, seed by seed."""
    jobs = [job for job in study.jobs if job.group == group and job.arm == arm]
    missing = [
        f"seed {job.seed} {failed.get(job.name, 'is not done')}"
        for job in jobs
        if not job.is_done()
    ]
    return "; ".join(missing) or "done"
