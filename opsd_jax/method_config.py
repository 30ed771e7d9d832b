"""Frozen configuration of the method's functions: static, hashable arguments under `jax.jit`.

Apart from the network's sizes (`model.config`) and the divergence (`divergence.DivergenceConfig`), which are defined
beside what they configure. This module loads neither flax nor optax, so that `config` and `data` load neither.
"""

import dataclasses
from typing import Annotated

from opsd_jax.divergence import DivergenceConfig
from opsd_jax.inputs import checks
from opsd_jax.marker import Marker
from opsd_jax.model.config import ModelConfig
from opsd_jax.params import GROUPS

TEACHERS = ("ema", "self", "fixed")
TRAINS = ("text", "drawing", "autoencoder")
REDUCTIONS = ("completion", "token")
SCHEDULES = ("cosine", "constant")
RENORMS = ("global", "channel", "text_channel")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and clipping; defaults are the paper's (App. C).

    schedule: "cosine" (linear warm-up from 0, cosine to min_lr) or "constant". The first step has lr 0, as
    officially: it fills the moments and changes nothing.
    """

    lr: Annotated[float, "[0, 1]"] = 1e-5
    min_lr: Annotated[float, "[0, 1]"] = 1e-7
    warmup_steps: Annotated[int, "[0, inf)"] = 200
    total_steps: Annotated[int, "[1, inf)"] = 1000
    schedule: Annotated[str, SCHEDULES] = "cosine"
    b1: Annotated[float, "[0, 1)"] = 0.9
    b2: Annotated[float, "[0, 1)"] = 0.95
    eps: Annotated[float, "[1e-30, 1]"] = 1e-15  # less is 0 in float32, where 0 / 0 follows
    weight_decay: Annotated[float, "[0, 1]"] = 0.0
    max_grad_norm: Annotated[float, "[0, inf)"] = 1.0

    def __post_init__(self):
        checks.fields(self, "optim")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """One training stage, static.

    teacher: "ema" (official default), "self" (the live weights: one pytree), "fixed" (the initial weights).
    reduction: "completion", the mean of each completion first, then over completions (official: short ones weigh
      as much as long ones), or "token", every token alike; both are exact under accumulation.
    accumulation: micro steps that one batch is cut into.
    max_forward_tokens: completions are cut so that context + completion + 2 fits the teacher (official 10,240).
    eos_after_cut: completions that did not end on eos still get a row that predicts eos (official: yes).
    score_seam: score the delimiters that an image skip fed between rounds, exactly as sampled (official: no).
    freeze: parameter groups (`params.GROUPS`) that are not trained; they have no gradient, slots or EMA.
      With LoRA (`model.lora`) all but the adapters are frozen, and this must be empty.
    trains: "text" (`update_step`, `sft_step`: what only draws is frozen), "drawing" (`drawn_step`: that too) or
      "autoencoder" (`autoencoder_step`: it alone). ce_weight, mse_weight: of the two losses of `drawn_step`.
    kl_weight: of the posterior's KL divergence in `autoencoder_step`.
    cached_weight, cached_temperature: of the KL to a cached teacher, in `offline.step`.
    """

    model: ModelConfig
    bos: int
    eos: int
    divergence: DivergenceConfig = DivergenceConfig()
    optim: OptimConfig = OptimConfig()
    teacher: Annotated[str, TEACHERS] = "ema"
    ema_decay: Annotated[float, "[0, 1]"] = 0.995
    jsd_weight: Annotated[float, "[0, inf)"] = 1.0
    ce_weight: Annotated[float, "[0, inf)"] = 0.0
    reduction: Annotated[str, REDUCTIONS] = "completion"
    accumulation: Annotated[int, "[1, inf)"] = 1
    max_forward_tokens: Annotated[int, "[1, inf)"] = 10240
    eos_after_cut: bool = True
    score_seam: bool = False
    freeze: Annotated[tuple[str, ...], GROUPS] = ()
    trains: str = "text"
    mse_weight: Annotated[float, "[0, inf)"] = 1.0
    kl_weight: Annotated[float, "[0, inf)"] = 0.0
    cached_weight: Annotated[float, "[0, inf)"] = 0.5
    cached_temperature: Annotated[float, checks.TEMPERATURE] = 2.0

    def __post_init__(self):
        checks.fields(self, "distill")
        if self.trains not in TRAINS:
            raise ValueError(f"trains is {self.trains!r}: choose from {TRAINS}")
        if self.trains != "text" and self.model.generation is None:
            raise ValueError(
                f"trains is {self.trains!r}, but this model has nothing that draws (model.generation)"
            )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled (defaults: the official launcher's).

    max_new_tokens: budget of fed tokens, all rounds together. greedy: argmax instead of sampling.
    temperature, top_k (0: off), top_p (1: off): of the sampling distribution.
    max_image_skips: rounds continued after the marker. ban_marker: tokens that would complete the marker are
    never chosen. bos, eos: token ids.
    slots: rows that are sampled at a time, the others wait; 0 for all at once. refill: slots that must be free before
    rows are taken from the queue; 0 for a quarter. shards: devices along the batch; each shard has its own part of
    slots and queue, so that no row moves between devices.
    """

    model: ModelConfig
    bos: int
    eos: int
    marker: Marker
    max_new_tokens: Annotated[int, "[2, inf)"] = 1024
    temperature: Annotated[float, f"{checks.TEMPERATURE}; for the argmax set rollout.greedy"] = 1.0
    greedy: bool = False
    top_k: Annotated[int, "[0, inf)"] = 0
    top_p: Annotated[float, "(0, 1]"] = 1.0
    max_image_skips: Annotated[int, "[0, inf)"] = 1
    ban_marker: bool = False
    slots: Annotated[int, "[0, inf)"] = 0
    refill: Annotated[int, "[0, inf)"] = 0
    shards: Annotated[int, "[1, inf)"] = 1

    def __post_init__(self):
        checks.fields(self, "rollout")
        if self.slots % self.shards or self.refill > self.slots:
            raise ValueError(
                f"rollout.slots {self.slots} must be a multiple of the {self.shards} batch shards, and "
                f"rollout.refill {self.refill} at most that"
            )

    @property
    def group(self) -> int:
        """Rows that are taken from the queue at a time: refill, or a quarter of the slots, rounded up to shards."""
        wanted = self.refill or self.slots // 4
        return max(-(-wanted // self.shards), 1) * self.shards


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How an image is drawn. Defaults: those of the official inferencer.py; `HARNESS` has the evaluation's.

    num_timesteps: points of the time grid, one more than steps. timestep_shift: of the grid, towards t = 1.
    text_scale, image_scale: of the two guidances; text_scale <= 1 switches both off, as officially.
    interval: guidance applies where low < t <= high. renorm: "global", "channel" or "text_channel", see `guide`.
    renorm_min: the guided velocity is not shrunk below this share. image_start, image_end: token ids.
    """

    model: ModelConfig
    image_start: int
    image_end: int
    num_timesteps: Annotated[int, "[2, inf); a grid has at least its two ends"] = 50
    timestep_shift: Annotated[float, "(0, inf)"] = 3.0
    text_scale: Annotated[float, "[0, inf)"] = 3.0
    image_scale: Annotated[float, "[0, inf)"] = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: Annotated[float, "[0, 1]"] = 0.0

    def __post_init__(self):
        if self.model.generation is None:
            raise ValueError(
                "this model cannot draw: it was loaded without its generation expert (import the checkpoint "
                "without --only=understanding)"
            )
        checks.fields(self, "drawing")
        if self.renorm not in RENORMS:
            raise ValueError(f"renorm is {self.renorm!r}: choose from {RENORMS}")

    @property
    def branches(self) -> tuple[str, ...]:
        """Contexts that guidance needs, in the order of the batch axis."""
        if self.text_scale <= 1:
            return ("cond",)
        return ("cond", "text", "image") if self.image_scale > 1 else ("cond", "text")
