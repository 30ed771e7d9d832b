"""Evaluation while training and at the end of a stage."""

import dataclasses
import functools
import os

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from opsd_jax import config as config_lib
from opsd_jax import distill, rollout, sharding
from opsd_jax.data import examples
from opsd_jax.evaluation import contexts, inference, reference_kl
from opsd_jax.evaluation import results as results_lib
from opsd_jax.run import job as job_lib
from opsd_jax.run import session
from opsd_jax.runtime import checkpoint, files


class Evaluation:
    """Accuracy while training (`during`) and when a stage ends (`final`), by the code of `opsd_jax.eval`.

    stop: `checkpoint.Flag`, asked before each batch. The step that is evaluated is saved by then.
    """

    def __init__(self, run: session.Session, stage: str, stop):
        self.run, self.stage, self._stop, self._rows, self._moves = run, stage, stop, {}, {}
        c = run.config.eval
        # What cannot be evaluated shows now, not after the last step: a missing split, rows that fit no bucket.
        run.sampling(
            max_new_tokens=c.max_new_tokens or run.config.rollout.max_new_tokens,
            slots=c.slots,
            refill=0,
        )
        fit = functools.partial(
            contexts.check_fit, packer=run.packer, task_names=run.config.data.tasks
        )
        if c.every:
            fit(
                self._of(c.split),
                modes={*c.visual_thoughts, run.config.teacher.visual_thoughts},
                limit=c.rows,
                subset_seed=run.config.seed,
            )
        if c.final_split:
            kl = {"none", "real"} if self._measures_kl else set()
            fit(self._of(c.final_split), modes={*c.final_visual_thoughts, *kl}, traces=bool(kl))

    def _of(self, split):
        if split not in self._rows:
            self._rows[split] = examples.Examples.open(
                self.run.config, self.run.data_workdir, self.run.tokenizer, split
            )
        return self._rows[split]

    def is_due(self, step, last) -> bool:
        """Whether `during` belongs to a step; the last one of a stage has `final`."""
        every = self.run.config.eval.every
        return self.stage != "autoencoder" and every > 0 and step % every == 0 and step < last

    def is_missing(self, step, history) -> bool:
        """Whether the rows of metrics.jsonl lack the scores of a step; for all processes as the first one finds it."""
        missing = not any(
            key.startswith("eval/") for row in history if row["step"] == step for key in row
        )
        if jax.process_count() > 1:
            missing = bool(multihost_utils.broadcast_one_to_all(np.int32(missing)))
        return missing

    def during(self, step, state, distill_config, health) -> None:
        """Logs {"eval/<task>/<mode>": accuracy} on the validation rows; with an EMA teacher also its own accuracy."""
        c, scores = self.run.config, {}
        self._stop.promise = f"step {step} is saved; stopping after this batch of the evaluation"
        with self.run.clock("eval"):
            for mode in c.eval.visual_thoughts:
                scores |= self._accuracies(state["params"], mode, mode)
            if "ema" in state and self.stage == "opsd":
                scores |= self._accuracies(
                    distill.teacher_params(state, distill_config),
                    c.teacher.visual_thoughts,
                    "teacher",
                )
        logging.info("step %d: %s", step, scores)
        self.run.writer.scalars(step, self.stage, scores)
        health.check(step, scores)

    def _accuracies(self, params, mode, name) -> dict:
        c = self.run.config
        budget = c.eval.max_new_tokens or c.rollout.max_new_tokens
        results = contexts.evaluate(
            self._for_sampling(params),
            self._of(c.eval.split),
            self.run.packer,
            task_names=c.data.tasks,
            mode=mode,
            config=self.run.sampling(max_new_tokens=budget, slots=c.eval.slots, refill=0),
            batch_size=c.eval.batch_size,
            limit=c.eval.rows,
            subset_seed=c.seed,
            seed=c.seed,
            mesh=self.run.mesh,
            before_batch=self._stop.check,
        )
        return {f"eval/{r.name}/{name}": r.hits / len(r.predictions) for r in results}

    def _for_sampling(self, params):

        places = tuple((x.dtype, x.sharding) for x in jax.tree.leaves(params))
        if places not in self._moves:  # a program each, which is compiled once
            self._moves[places] = rollout.relayout_program(
                self.run.mesh, params, self.run.config.model.dtype
            )
        return self._moves[places](params)

    def _modes(self) -> dict[str, tuple]:
        """What the final evaluation measures: {name: (mode, ban_marker)}."""
        c = self.run.config.eval
        modes = {mode: (mode, False) for mode in c.final_visual_thoughts}
        return modes | ({"none-banned": ("none", True)} if c.final_banned else {})

    def _folder(self, step, name) -> str:
        return os.path.join(self.run.workdir, "eval", f"{step:06d}-{name}")

    @property
    def _measures_kl(self) -> bool:
        return self.run.config.eval.kl and self.stage != "warmup"

    def is_complete(self, step) -> bool:
        """Whether all results of `final` are there."""
        names = [*self._modes(), *(["kl"] if self._measures_kl else [])]
        return all(
            os.path.exists(os.path.join(self._folder(step, name), "summary.json")) for name in names
        )

    def final(self, step, params, start_step) -> None:
        """Evaluates the whole final split and writes eval/<step>-<mode>/, exactly as the command `opsd_jax.eval` does.

        Stopped in between, it goes on with the batches that are missing.
        """

        c, run, scores = self.run.config, self.run, {}
        self._stop.promise = f"step {step} is saved; stopping after this batch of the evaluation"
        at = lambda step: os.path.join(run.workdir, "checkpoints", str(step))
        rows = self._of(c.eval.final_split)
        opened = job_lib.Opened(
            self._for_sampling(params),
            rows,
            run.packer,
            run.marker,
            run.mesh,
            job_lib.facts_of(params, rows, run.packer, c.data.tasks),
        )
        for name, (mode, ban_marker) in self._modes().items():
            job = job_lib.prepare(
                run.workdir,
                (mode,),
                checkpoint=at(step),
                benchmarks=(),
                data_dir="",
                protocol="",
                split=c.eval.final_split,
                limit=0,
                ban_marker=ban_marker,
                seed=None,
                name="",
                batch_size=0,
                config=c,
            )
            summary = _answers(
                dataclasses.replace(job, before_batch=self._stop.check), mode, opened
            )
            scores |= {
                f"eval/{task}/{name}": b["overall"]
                for task, b in summary.get("benchmarks", {}).items()
            }
        del opened  # the sampler's copy of the weights
        if self._measures_kl:
            abstract = sharding.abstract(run.mesh, jax.eval_shape(lambda: params))
            start = checkpoint.restore_params(at(start_step), abstract)
            kl = lambda student: reference_kl.reference_kl(
                start,
                student,
                self._of(c.eval.final_split),
                run.packer,
                config=config_lib.model(c),
                task_names=c.data.tasks,
                batch_size=c.eval.batch_size,
                mesh=run.mesh,
                before_batch=self._stop.check,
            )
            before, after = kl(start), kl(params)
            found = {
                task: {
                    "before": before[task]["kl"],
                    "after": after[task]["kl"],
                    "n": after[task]["n"],
                    "closure": 1 - after[task]["kl"] / before[task]["kl"],
                }
                for task in after
            }
            files.write_json(
                os.path.join(self._folder(step, "kl"), "summary.json"),
                {
                    "split": c.eval.final_split,
                    "start": at(start_step),
                    "unit": "nats per token",
                    "tasks": found,
                },
                primary=jax.process_index() == 0,
            )
            scores |= {
                f"kl/{task}/{k}": v for task, d in found.items() for k, v in d.items() if k != "n"
            }
        results_lib.write_table(run.workdir)
        run.writer.scalars(step, self.stage, scores)
        logging.info("step %d, %s: %s", step, c.eval.final_split, scores)


def _answers(job, mode, opened) -> dict:
    """The summary of `eval.answer_in_context`. Answers that were begun under other settings of config.eval, which may
    change in between, are dropped."""
    try:
        return job_lib.answer_in_context(job, mode, opened)
    except inference.Other as error:
        logging.warning("asking all again: %s", error)
        inference.forget(os.path.join(job.workdir, "eval", job.names[mode]))
        return job_lib.answer_in_context(job, mode, opened)
