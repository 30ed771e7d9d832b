"""When a run is stopped early because it learns nothing or breaks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any


class UnhealthyRunError(RuntimeError):
    """Going on would waste the machine: the message says what is seen and how to mend it."""


@dataclasses.dataclass(kw_only=True)
class Health:
    """Stops a run of one stage that has gone wrong. None or 0 switches a watch off.

    Most watches compare with the run's own start: references are means of the first `reference_checks` checks. What is
    wrong from the start has absolute limits: `min_length`, `max_unfinished`. A watch raises after `patience` bad checks
    one after the other; `max_unfinished` waits for `reference_checks` more. On resume, `replay` the rows of the stage
    first: a reference taken from a run that is already sick would find it healthy.
    """

    finite: tuple[str, ...] | None = ("loss", "grad_norm")  # may not be nan or inf, not even once
    min_length: Annotated[float | None, "[0, inf)"] = (
        1.0  # tokens: completion_len may not start at this or below
    )
    max_unfinished: Annotated[float | None, "[0, 1]"] = (
        1.0  # 1 - eos_rate may not be this or more from the start
    )
    min_length_fraction: Annotated[float | None, "[0, inf)"] = (
        0.1  # completion_len may not fall below this part of its reference
    )
    min_eos_rate: Annotated[float | None, "[0, 1]"] = (
        0.02  # eos_rate may not fall to this, once it was above 0.5
    )
    teacher_floor: Annotated[float | None, "[0, 1]"] = (
        0.5  # the teacher's own accuracy: nor below this part of its first value
    )
    teacher_entropy_rise: Annotated[float | None, "[0, inf)"] = (
        1.0  # teacher_entropy: nor more nats above its reference
    )
    teacher_topk_fraction: Annotated[float | None, "[0, 1]"] = (
        0.5  # teacher_topk_mass: nor below this part of its reference
    )
    patience: Annotated[int, "[1, inf)"] = 5
    reference_checks: Annotated[int, "[1, inf)"] = 5

    def __post_init__(self):
        if min(self.patience, self.reference_checks) < 1:
            raise ValueError(
                f"patience={self.patience}, reference_checks={self.reference_checks}: need >= 1"
            )
        self._first: dict[
            tuple[str, str], list[float]
        ] = {}  # watch and metric -> values at the start
        self._bad: dict[
            tuple[str, str], int
        ] = {}  # watch and metric -> bad checks one after the other
        self._ended = False  # completions did end, once

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at one row of metrics; keys that it lacks are not looked at. Raises UnhealthyRunError."""
        if problems := self._look(metrics):
            raise UnhealthyRunError(f"stopped at step {step}: " + "; ".join(problems))

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes in earlier rows of this stage, as `read` gives them, without judging them."""
        for row in rows:
            self._look(row)

    def _look(self, metrics: Mapping[str, Any]) -> list[str]:
        values = {key: _number(value) for key, value in metrics.items()}
        problems = [
            f"{key} is {metrics[key]}. Go back to an earlier checkpoint with a lower optim.lr or a gradient "
            "clip, and look at the batch of this step"
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
            "completions are empty from the start: completion_len is {value:.3g}, in spite of rollout.empty_retries. The "
            "model ends its answers at once: do its weights (init_from) and the tokenizer belong together, and is it "
            "trained for these prompts?",
        )
        watch(
            "max_unfinished",
            "eos_rate",
            lambda value, high, _: not self._ended and 1 - value >= high,
            "completions never end within the budget: eos_rate is {value:.3g}, and was never above 0.5. Raise "
            "rollout.max_new_tokens, or lower rollout.temperature; if the texts in samples/ make no sense, weights "
            "(init_from) and tokenizer do not belong together",
            patience=self.reference_checks + self.patience,
        )  # a short budget and a young model look alike at first
        watch(
            "min_length_fraction",
            "completion_len",
            lambda value, part, usual: value < part * usual,
            "completions have collapsed to {value:.3g} tokens, from {usual:.3g} at the start. Lower optim.lr or take a "
            "fixed teacher, unless short answers are right",
        )
        watch(
            "min_eos_rate",
            "eos_rate",
            lambda value, low, _: self._ended and value <= low,
            "completions no longer end within the budget: eos_rate is {value:.3g} and was above 0.5. Take a fixed or ema "
            "teacher instead of self, or lower optim.lr",
        )
        # A student forgets how to read the visual thoughts; a teacher that is its average forgets with it.
        for key in values:
            if key.startswith("eval/") and key.endswith("/teacher"):
                watch(
                    "teacher_floor",
                    key,
                    lambda value, part, start: value < part * start,
                    "the teacher's own accuracy {key} fell to {value:.3f}, from {usual:.3f} at the start: what it teaches "
                    "is no longer right. Go back to an earlier checkpoint with a fixed teacher, a slower EMA or a lower "
                    "optim.lr",
                    checks=1,
                    patience=1,
                )
        watch(
            "teacher_entropy_rise",
            "teacher_entropy",
            lambda value, rise, usual: value > usual + rise,
            "the teacher has become unsure: teacher_entropy is {value:.3g} nats, from {usual:.3g} at the start. Take a "
            "fixed teacher or a slower EMA",
        )
        watch(
            "teacher_topk_fraction",
            "teacher_topk_mass",
            lambda value, part, usual: value < part * usual,
            "the top-k entries hold only {value:.3g} of the teacher's probability, from {usual:.3g} at the start. Raise "
            "top-k or take a fixed teacher",
        )
        return problems


def _number(value) -> float:
    """As a float; nan for None, a text and whatever else is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
