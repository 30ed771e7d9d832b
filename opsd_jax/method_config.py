"""Frozen configuration of the method's functions: static, hashable arguments under `jax.jit`.

One dataclass per training stage, and one for each of the two samplers (text: `RolloutConfig`,
images: `FlowConfig`). The sizes of the network (`model.config`) and the divergence
(`divergence.DivergenceConfig`) are defined next to the code that they configure. This module
imports neither flax nor optax, so that configuration and data preparation do not load them.
"""

import dataclasses
from typing import Annotated

from opsd_jax.divergence import DivergenceConfig
from opsd_jax.inputs import checks
from opsd_jax.marker import Marker
from opsd_jax.model.config import ModelConfig
from opsd_jax.params import GROUPS
from opsd_jax.weighting import WEIGHTS, PositionsConfig

CONTRASTS = ("none", "swap")
TEACHERS = ("ema", "self", "fixed", "snapshot")
REDUCTIONS = ("completion", "token")
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
RENORMS = ("global", "channel", "text_channel")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning-rate schedule and gradient clipping. Defaults are the paper's (App. C).

    kind: "adamw", or "muon": the matrices inside the model are moved by Muon (see
      `optimizer.apply_gradients`), all other parameters by AdamW.
    lr: peak learning rate. min_lr: learning rate at the end of the cosine.
    warmup_steps: steps of the linear warm-up from 0.
    total_steps: steps of the stage, warm-up included.
    schedule: "cosine" (linear warm-up, then cosine to min_lr) or "constant" (linear warm-up, then
      lr). As in the official code, the first step has learning rate 0: it fills the moments and
      changes no parameter.
    b1, b2, eps, weight_decay: settings of AdamW; b1 is also the momentum of Muon, and weight_decay
      its decay.
    max_grad_norm: bound of the global gradient norm; 0 for none.
    """

    kind: Annotated[str, OPTIMIZERS] = "adamw"
    lr: Annotated[float, "[0, 1]"] = 1e-5
    min_lr: Annotated[float, "[0, 1]"] = 1e-7
    warmup_steps: Annotated[int, "[0, inf)"] = 200
    total_steps: Annotated[int, "[1, inf)"] = 1000
    schedule: Annotated[str, SCHEDULES] = "cosine"
    b1: Annotated[float, "[0, 1)"] = 0.9
    b2: Annotated[float, "[0, 1)"] = 0.95
    eps: Annotated[float, "[1e-30, 1]"] = 1e-15  # smaller values are 0 in float32 and give 0 / 0
    weight_decay: Annotated[float, "[0, 1]"] = 0.0
    max_grad_norm: Annotated[float, "[0, inf)"] = 1.0

    def __post_init__(self):
        checks.fields(self, "optim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The fields that all training stages have.

    model: sizes and compute settings of the network. optim: optimizer and schedule.
    accumulation: number of micro steps that one batch is divided into; the gradient is exact.
    """

    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    accumulation: Annotated[int, "[1, inf)"] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(StageConfig):
    """On-policy self-distillation (`distill.update_step`).

    bos, eos: token ids.
    divergence: divergence between teacher and student.
    teacher: "ema" (official default), "self" (the current weights: one pytree), "fixed" (the
      weights at the start of the stage), or "snapshot" (those after the last step that
      snapshot_every divides).
    ema_decay: decay of the teacher's moving average per optimizer step.
    snapshot_every: optimizer steps between two snapshots.
    jsd_weight, ce_weight: weights of the divergence and of the cross entropy on the sampled tokens.
    reduction: "completion" averages each completion first and then over completions (official:
      short completions weigh as much as long ones); "token" weighs all tokens alike.
    max_forward_tokens: completions are truncated so that context + completion + 2 positions fit
      (official: 10,240).
    eos_after_cut: whether completions that did not end with eos still get a label eos (official:
      yes).
    score_seam: whether the delimiters that an image skip fed between two rounds are scored, exactly
      as sampled (official: no).
    positions: which positions of a completion count, see `weighting`.
    token_weights: what each token's terms are multiplied by, relative to the others: "none",
      "teacher_entropy" (that of the metrics), or "advantage", see `weighting.advantage`.
    contrast: a in the target log p + a (log p - log p'), renormalised, with the teacher's p in its
      own and p' in another context; 0 for p. contrast_with: that context: "none" is the student's,
      "swap" the one in `batch.contrast`, with the privileged blocks of another example.
    freeze: parameter groups (`params.GROUPS`) that are not trained; they have no gradient, moments
      or EMA. With LoRA (`model.lora`) only the adapters are trained, and this must be empty.
    """

    bos: int
    eos: int
    divergence: DivergenceConfig = DivergenceConfig()
    teacher: Annotated[str, TEACHERS] = "ema"
    ema_decay: Annotated[float, "[0, 1]"] = 0.995
    snapshot_every: Annotated[int, "[1, inf)"] = 100
    jsd_weight: Annotated[float, "[0, inf)"] = 1.0
    ce_weight: Annotated[float, "[0, inf)"] = 0.0
    reduction: Annotated[str, REDUCTIONS] = "completion"
    max_forward_tokens: Annotated[int, "[1, inf)"] = 10240
    eos_after_cut: bool = True
    score_seam: bool = False
    positions: PositionsConfig = PositionsConfig()
    token_weights: Annotated[str, WEIGHTS] = "none"
    contrast: Annotated[float, "[0, 100]"] = 0.0
    contrast_with: Annotated[str, CONTRASTS] = "none"
    freeze: Annotated[tuple[str, ...], GROUPS] = ()

    def __post_init__(self):
        checks.fields(self, "distill")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(StageConfig):
    """Supervised training on text traces (`supervised.sft_step`).

    reduction, freeze: as in `DistillConfig`.
    chunk: number of target positions whose logits exist at the same time.
    """

    reduction: Annotated[str, REDUCTIONS] = "token"
    freeze: Annotated[tuple[str, ...], GROUPS] = ()
    chunk: Annotated[int, "[1, inf)"] = 192

    def __post_init__(self):
        checks.fields(self, "supervised")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGenerationConfig(SupervisedConfig):
    """Supervised training on traces with images to generate (`supervised.image_generation_step`).

    ce_weight, mse_weight: weights of the cross entropy on the text and of the flow-matching loss.
    """

    ce_weight: Annotated[float, "[0, inf)"] = 1.0
    mse_weight: Annotated[float, "[0, inf)"] = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_generates(self.model, "image generation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineConfig(SupervisedConfig):
    """Distillation from a cached teacher on text traces (`offline.step`).

    weight, temperature: weight and temperature of the KL divergence to the cached teacher.
    """

    weight: Annotated[float, "[0, inf)"] = 0.5
    temperature: Annotated[float, checks.TEMPERATURE] = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(StageConfig):
    """Training of the autoencoder alone (`supervised.autoencoder_step`).

    kl_weight: weight of the posterior's KL divergence to the standard normal distribution.
    """

    kl_weight: Annotated[float, "[0, inf)"] = 1e-4

    def __post_init__(self):
        checks.fields(self, "autoencoder")
        _check_generates(self.model, "the autoencoder")


def _check_generates(model: ModelConfig, what: str) -> None:
    if model.generation is None:
        raise ValueError(
            f"this stage trains {what}, but the model has no image-generation path: set "
            "model.generation"
        )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled. Defaults are those of the official launcher.

    bos, eos: token ids. further_ends: ids that end a completion as eos does.
    marker: where `<image_start>` is in a stream of tokens.
    max_new_tokens: budget of fed tokens, all rounds together. greedy: argmax instead of sampling.
    temperature, top_k (0: off), top_p (1: off): settings of the sampling distribution.
    max_image_skips: rounds that are continued after the marker. ban_marker: tokens that would
      complete the marker are never chosen.
    slots: number of lanes, the sequences that are sampled at the same time; the others wait in a
      queue. 0 for one lane per sequence.
    refill: lanes that must be free before sequences are taken from the queue; 0 for a quarter.
    shards: devices along the batch. Each shard has its own part of the lanes and of the queue, so
      that no sequence moves between devices.
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
    further_ends: tuple[int, ...] = ()

    def __post_init__(self):
        checks.fields(self, "rollout")
        if self.slots % self.shards or self.refill > self.slots:
            raise ValueError(
                f"rollout.slots {self.slots} must be a multiple of the {self.shards} batch shards, "
                f"and rollout.refill {self.refill} at most that"
            )

    @property
    def group(self) -> int:
        """Number of sequences taken from the queue at a time.

        It is refill, or a quarter of the lanes, rounded up to a multiple of the shards.
        """
        wanted = self.refill or self.slots // 4
        return max(-(-wanted // self.shards), 1) * self.shards


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How an image is generated.

    Defaults are those of the official inferencer.py; `flow.HARNESS` has the evaluation's.

    image_start, image_end: token ids.
    num_timesteps: points of the time grid, one more than steps.
    timestep_shift: shift of the grid towards t = 1.
    text_scale, image_scale: scales of the two guidances. As in the official code, text_scale <= 1
      switches both off.
    interval: guidance applies where low < t <= high.
    renorm: "global", "channel" or "text_channel", see `flow.guide`.
    renorm_min: the guided velocity is not scaled down below this share.
    compute_every: the velocities of every n-th step are computed, the others extrapolated; 1 for
      all, as in the official code (see `flow`).
    extrapolation: degree of the polynomial through the last computed velocities.
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
    compute_every: Annotated[int, "[1, inf)"] = 1
    extrapolation: Annotated[int, "[0, 2]"] = 1

    def __post_init__(self):
        if self.model.generation is None:
            raise ValueError(
                "this model cannot generate images: it was loaded without its generation expert "
                "(import the checkpoint without --only=understanding)"
            )
        checks.fields(self, "drawing")
        checks.choice("renorm", self.renorm, RENORMS)

    @property
    def branches(self) -> tuple[str, ...]:
        """Contexts that guidance needs, in the order of the batch axis."""
        if self.text_scale <= 1:
            return ("cond",)
        return ("cond", "text", "image") if self.image_scale > 1 else ("cond", "text")
