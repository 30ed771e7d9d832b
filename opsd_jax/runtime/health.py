"""Early stopping of runs that break or that do not learn anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any


class UnhealthyRunError(RuntimeError):
    """The run has gone wrong: the message says what is observed and how to fix it."""


@dataclasses.dataclass(kw_only=True)
class Health:
    """Stops a run of one stage that has gone wrong. None or 0 switches a watch off.

    Most watches compare with the run's own start: references are means of the first
    `reference_checks` checks. Faults from the start on have absolute limits: `min_length`,
    `max_unfinished`. A watch raises after `patience` bad checks in a row; `max_unfinished` waits
    for `reference_checks` more. On resume, `replay` the records of the stage first: references
    taken from a run that has already gone wrong would find it healthy.

    Attributes:
      finite: metrics that may not be nan or inf, not even once.
      min_length: tokens; completion_len may not start at this or below.
      max_unfinished: 1 - eos_rate may not be this or more from the start.
      min_length_fraction: completion_len may not fall below this fraction of its reference.
      min_eos_rate: eos_rate may not fall to this, once it was above 0.5.
      teacher_floor: the teacher's own accuracy may not fall below this fraction of its first value.
      teacher_entropy_rise: teacher_entropy may not rise more nats than this above its reference.
      teacher_topk_fraction: teacher_topk_mass may not fall below this fraction of its reference.
      patience: bad checks in a row until a watch raises.
      reference_checks: checks from the start whose mean is the reference.
    """

    finite: tuple[str, ...] | None = ("loss", "grad_norm")
    min_length: Annotated[float | None, "[0, inf)"] = 1.0
    max_unfinished: Annotated[float | None, "[0, 1]"] = 1.0
    min_length_fraction: Annotated[float | None, "[0, inf)"] = 0.1
    min_eos_rate: Annotated[float | None, "[0, 1]"] = 0.02
    teacher_floor: Annotated[float | None, "[0, 1]"] = 0.5
    teacher_entropy_rise: Annotated[float | None, "[0, inf)"] = 1.0
    teacher_topk_fraction: Annotated[float | None, "[0, 1]"] = 0.5
    patience: Annotated[int, "[1, inf)"] = 5
    reference_checks: Annotated[int, "[1, inf)"] = 5

    def __post_init__(self):
        if min(self.patience, self.reference_checks) < 1:
            raise ValueError(
                f"patience={self.patience}, reference_checks={self.reference_checks}: need >= 1"
            )
        # Keys are (watch, metric).
        self._first: dict[tuple[str, str], list[float]] = {}  # values at the start
        self._bad: dict[tuple[str, str], int] = {}  # bad checks in a row
        self._ended = False  # whether completions did end, once

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Checks one record of metrics; keys that it lacks are not checked.

        Raises UnhealthyRunError.
        """
        if problems := self._look(metrics):
            raise UnhealthyRunError(f"stopped at step {step}: " + "; ".join(problems))

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes earlier records of this stage (see `metrics.read`) without judging them."""
        for record in records:
            self._look(record)

    def _look(self, metrics: Mapping[str, Any]) -> list[str]:
        values = {key: _number(value) for key, value in metrics.items()}
        problems = [
            f"{key} is {metrics[key]}. Go back to an earlier checkpoint with a lower optim.lr or a "
            "gradient clip, and look at the batch of this step"
            for key in self.finite or ()
            if key in values and not math.isfinite(values[key])
        ]

        def watch(name, key, bad, message, checks=self.reference_checks, patience=self.patience):
            value, limit = values.get(key, math.nan), getattr(self, name)
            if not limit or not math.isfinite(value):
                return
            first = self._first.setdefault((name, key), [])
            if len(first) < checks:
                first.append(value)
            usual = sum(first) / len(first)
            self._bad[name, key] = (
                self._bad.get((name, key), 0) + 1 if bad(value, limit, usual) else 0
            )
            if self._bad[name, key] >= patience:
                problems.append(
                    message.format(key=key, value=value, usual=usual)
                    + f" (health.{name}=0 to go on)"
                )

        self._ended |= values.get("eos_rate", 0.0) > 0.5
        watch(
            "min_length",
            "completion_len",
            lambda value, low, usual: max(value, usual) <= low,
            "completions are empty from the start: completion_len is {value:.3g}, in spite of "
            "rollout.empty_retries. The model ends its answers at once: do its weights (init_from) "
            "and the tokenizer belong together, and is it trained for these prompts?",
        )
        watch(
            "max_unfinished",
            "eos_rate",
            lambda value, high, _: not self._ended and 1 - value >= high,
            "completions never end within the budget: eos_rate is {value:.3g}, and was never above "
            "0.5. Raise rollout.max_new_tokens, or lower rollout.temperature; if the texts in "
            "samples/ make no sense, weights (init_from) and tokenizer do not belong together",
            patience=self.reference_checks + self.patience,
        )  # a short budget and a young model look alike at first
        watch(
            "min_length_fraction",
            "completion_len",
            lambda value, part, usual: value < part * usual,
            "completions have collapsed to {value:.3g} tokens, from {usual:.3g} at the start. "
            "Lower optim.lr or take a fixed teacher, unless short answers are right",
        )
        watch(
            "min_eos_rate",
            "eos_rate",
            lambda value, low, _: self._ended and value <= low,
            "completions no longer end within the budget: eos_rate is {value:.3g} and was above "
            "0.5. "
            "Take a fixed or ema teacher instead of self, or lower optim.lr",
        )
        # A student forgets how to read the visual thoughts, and so does a teacher that is its
        # average.
        for key in values:
            if key.startswith("eval/") and key.endswith("/teacher"):
                watch(
                    "teacher_floor",
                    key,
                    lambda value, part, start: value < part * start,
                    "the teacher's own accuracy {key} fell to {value:.3f}, from {usual:.3f} at the "
                    "start: what it teaches is no longer right. Go back to an earlier checkpoint "
                    "with a fixed teacher, a slower EMA or a lower optim.lr",
                    checks=1,
                    patience=1,
                )
        watch(
            "teacher_entropy_rise",
            "teacher_entropy",
            lambda value, rise, usual: value > usual + rise,
            "the teacher has become unsure: teacher_entropy is {value:.3g} nats, from {usual:.3g} "
            "at the start. Take a fixed teacher or a slower EMA",
        )
        watch(
            "teacher_topk_fraction",
            "teacher_topk_mass",
            lambda value, part, usual: value < part * usual,
            "the top-k entries hold only {value:.3g} of the teacher's probability, from "
            "{usual:.3g} "
            "at the start. Raise top-k or take a fixed teacher",
        )
        return problems


def _number(value: Any) -> float:
    """The value as a float; nan for None, a text and anything else that is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
