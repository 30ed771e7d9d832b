"""Evaluation while training and at the end of a stage."""

import os

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from opsd_jax.evaluation import contexts, html, reference_kl, statistics, store, summary_tables
from opsd_jax.evaluation.wording import Words
from opsd_jax.run import evaluate as evaluate_lib
from opsd_jax.run import saves
from opsd_jax.run import scores as scores_lib
from opsd_jax.run import start as start_lib
from opsd_jax.run.checks import FINAL_SPLIT, SPLIT
from opsd_jax.run.evaluation_request import Job, Request, check
from opsd_jax.run.session import Session
from opsd_jax.run.stage import Kind, Stage
from opsd_jax.run.state import moving_teacher
from opsd_jax.runtime import files, run_folder
from opsd_jax.runtime.health import Health
from opsd_jax.runtime.stopping import StopRequest


def _final_modes(config: ConfigDict) -> dict[str, tuple[str, bool]]:
    """What the final evaluation of a stage measures: {name: (mode, ban_marker)}."""
    c = config.eval
    modes = {mode: (mode, False) for mode in c.final_visual_thoughts}
    return modes | ({"none-banned": ("none", True)} if c.final_banned else {})


def _measures_kl(config: ConfigDict, kind: Kind) -> bool:
    return config.eval.kl and kind.keeps_start


def missing_results(config: ConfigDict, workdir: str, kind: Kind, last: int) -> list[str]:
    """Files of the final evaluation of a stage that do not exist, [] where it is complete.

    kind: of the stage. last: its last step.
    """
    names = [*_final_modes(config), *(["kl"] if _measures_kl(config, kind) else [])]
    paths = [
        os.path.join(
            run_folder.evaluation(workdir, run_folder.evaluation_name(last, name)),
            run_folder.SUMMARY,
        )
        for name in names
    ]
    return [path for path in paths if not os.path.exists(path)]


class Evaluation:
    """Accuracy while training (`during`) and at the end of a stage (`final`), as `opsd_jax.eval`.

    Args:
      stop: asked before each batch. The step that is evaluated is saved by then.
    Raises:
      ValueError, FileNotFoundError: something that cannot be evaluated.
    """

    def __init__(self, run: Session, stage: Stage, stop: StopRequest):
        self.run, self.stage, self._stop, self._examples = run, stage, stop, {}
        c = run.config.eval
        # What cannot be evaluated shows now, not after the last step: a missing split, examples
        # that fit no bucket.
        run.evaluation_sampling()
        if c.every:
            teacher = contexts.mode_of_teacher(run.config.teacher.visual_thoughts)
            modes = {*c.visual_thoughts, teacher}
            self._open(c.split, SPLIT)
            contexts.check_fit(self._select(c.split, c.rows), modes)
        if c.final_split:
            kl = {"none", "real"} if self._measures_kl else set()
            modes = {*c.final_visual_thoughts, *kl}
            self._open(c.final_split, FINAL_SPLIT)
            contexts.check_fit(self._select(c.final_split), modes, traces=bool(kl))

    def _open(self, split: str, asked_by: str) -> None:
        """Opens the examples of a split, once."""
        if split not in self._examples:
            self._examples[split] = self.run.examples(split, asked_by=asked_by)

    def _select(self, split: str, limit: int = 0, *, scored: bool = False) -> contexts.Selection:
        """The examples of an opened split, or a random subset of each task.

        scored: whether traces are scored, by the weights as they are trained; if not, answers are
          sampled.
        """
        c = self.run.config
        return contexts.Selection(
            examples=self._examples[split],
            packer=self.run.packer,
            mesh=self.run.mesh if scored else self.run.sampling_mesh,
            batch_size=c.eval.batch_size,
            limit=limit,
            subset_seed=c.seed,
            seed=c.seed,
        )

    def is_due(self, step: int) -> bool:
        """Whether `during` belongs to a step; the last one of a stage has `final`."""
        return saves.evaluates_at(self.run.config, self.stage.kind, self.stage.last, step)

    def is_final_due(self, *, is_new: bool) -> bool:
        """Whether `final` belongs to the end of the stage.

        is_new: whether this process took steps of the stage. If not, complete results are kept.
        """
        if not (self.stage.kind.evaluates and self.run.config.eval.final_split):
            return False
        return is_new or bool(
            missing_results(self.run.config, self.run.workdir, self.stage.kind, self.stage.last)
        )

    def is_missing(self, step: int, history: list[dict]) -> bool:
        """Whether the stage's records in metrics.jsonl, `history`, lack the scores of a step.

        The first process decides for all.
        """
        logged = (key for record in history if record["step"] == step for key in record)
        missing = not any(key.startswith("eval/") for key in logged)
        if jax.process_count() > 1:
            missing = bool(multihost_utils.broadcast_one_to_all(np.int32(missing)))
        return missing

    def during(self, step: int, state: dict, health: Health) -> None:
        """Logs {"eval/<task>/<mode>": accuracy} on the validation examples.

        With a teacher that follows the student also the accuracy of the teacher.
        """
        c, scores = self.run.config, {}
        self._stop.promise = f"step {step} is saved; stopping after this batch of the evaluation"
        with self.run.clock("eval"):
            for mode in c.eval.visual_thoughts:
                scores |= self._accuracies(state["params"], mode, mode)
            if teacher := moving_teacher(self.stage, state):
                mode = contexts.mode_of_teacher(c.teacher.visual_thoughts)
                scores |= self._accuracies(teacher, mode, "teacher")
        said = _in_words(scores, scores_lib.words_of(c))
        logging.info("step %d, %s: %s", step, c.eval.split, said)
        self.run.writer.scalars(step, self.stage.name, scores)
        health.check(step, scores)

    def _accuracies(self, params: dict, mode: str, name: str) -> dict[str, float]:
        c = self.run.config.eval
        results = contexts.answer_all(
            self.run.for_sampling(params),
            self._select(c.split, c.rows),
            mode,
            sampling=self.run.evaluation_sampling(),
            before_batch=self._stop.check,
        )
        return {f"eval/{r.name}/{name}": r.hits / len(r.predictions) for r in results}

    @property
    def _measures_kl(self) -> bool:
        return _measures_kl(self.run.config, self.stage.kind)

    def final(self, params: dict) -> None:
        """Evaluates the whole final split and writes eval/<step>-<mode>/, as `opsd_jax.eval` does.

        Where it was stopped before, it continues with the batches that are missing.
        """
        run, step, scores = self.run, self.stage.last, {}
        split = run.config.eval.final_split
        self._stop.promise = f"step {step} is saved; stopping after this batch of the evaluation"
        selection = self._select(split)
        sampled = run.for_sampling(params)
        facts = evaluate_lib.facts_of(sampled, selection)
        opened = evaluate_lib.Opened(run, selection, sampled, facts)
        for name, (mode, ban_marker) in _final_modes(self.run.config).items():
            request = Request(
                run.workdir,
                (mode,),
                checkpoint=run.checkpoint_folder(step),
                split=split,
                ban_marker=ban_marker,
            )
            summary = self._answers(check(request, run.config), mode, opened)
            for task, found in summary.get("benchmarks", {}).items():
                scores[f"eval/{task}/{name}"] = found["overall"]
        del opened, sampled  # the sampler's copy of the weights
        if self._measures_kl:
            scores |= _kl_scores(self._closure(params))
        summary_tables.write_table(run.workdir)
        run.writer.scalars(step, self.stage.name, scores)
        said = _in_words(scores, scores_lib.words_of(run.config))
        logging.info("step %d, %s: %s", step, split, said)

    def _answers(self, job: Job, mode: str, opened: evaluate_lib.Opened) -> dict:
        """The summary of `job.in_contexts`.

        Answers that were begun under other settings of config.eval, which may change in between,
        are dropped.
        """
        try:
            return evaluate_lib.in_contexts(job, mode, opened, before_batch=self._stop.check)
        except store.DifferentAnswersError as error:
            logging.warning("asking all again: %s", error)
            store.forget(job.folder(mode))
            return evaluate_lib.in_contexts(job, mode, opened, before_batch=self._stop.check)

    def _closure(self, params: dict) -> dict[str, dict]:
        """Writes eval/<step>-kl/.

        Returns {task: KL before and after training, and the closure (see `statistics.closure`)}.
        """
        run, split = self.run, self.run.config.eval.final_split
        origin = saves.origin(run.config, run.workdir, self.stage.name)
        start = start_lib.read(run, origin)

        def kl(student):
            return reference_kl.reference_kl(
                start,
                student,
                self._select(split, scored=True),
                config=run.model,
                before_batch=self._stop.check,
            )

        before, after = kl(start), kl(params)
        found = {
            task: {
                "before": before[task]["kl"],
                "after": after[task]["kl"],
                "n": after[task]["n"],
                "closure": statistics.closure(before[task]["kl"], after[task]["kl"]),
            }
            for task in after
        }
        files.write_json(
            os.path.join(run.results_folder(self.stage.last, "kl"), run_folder.SUMMARY),
            {"split": split, "start": origin, "unit": "nats per token", "tasks": found},
            primary=jax.process_index() == 0,
        )
        return found


def _kl_scores(found: dict[str, dict]) -> dict[str, float]:
    """What metrics.jsonl has of `Evaluation._closure`: its numbers, without what has none."""
    return {
        f"kl/{task}/{key}": value
        for task, measured in found.items()
        for key, value in measured.items()
        if key != "n" and value is not None
    }


def _in_words(scores: dict[str, float], words: Words) -> str:
    """{"eval/maze/none": 0.5, "kl/maze/closure": 0.4} -> "maze text only 50.0 %, closure 40.0 %".

    words: of the run.
    """
    shown = {
        "none": words.alone,
        "none-banned": f"{words.alone} with <image_start> banned",
        "real": words.given,
        "teacher": "the teacher",
    }
    tasks: dict[str, list[str]] = {}
    for key, score in scores.items():
        kind, task, name = key.split("/")
        if kind == "eval" or name == "closure":
            share = f"{shown.get(name, name)} {html.fixed(100 * score, 1)} %"
            tasks.setdefault(task, []).append(share)
    return "; ".join(f"{task} {', '.join(shares)}" for task, shares in tasks.items())
