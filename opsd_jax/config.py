"""Every setting of a run with its default, and the typed views that the program takes from them.

A setting is a field of a frozen dataclass. The field holds the default, and its annotation holds
the range or the choices (see `inputs.checks`). Most of these dataclasses belong to the method: they
are the static arguments of its jitted functions. The groups that configure no such function have
their dataclasses in this module. `settings` lists all of them under their keys, `default` makes the
ConfigDict that config files and the command line change, and the functions after it turn a
ConfigDict back into the dataclasses. A ConfigDict never enters jit.

Defaults are those of the paper (App. C) and of the official release; where the two differ, the
paper's. `config_check` holds the checks of values.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import images, tasks, tokenizer
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.inputs import checks
from opsd_jax.marker import Marker
from opsd_jax.method_config import (
    AutoencoderConfig,
    DistillConfig,
    FlowConfig,
    ImageGenerationConfig,
    OfflineConfig,
    OptimConfig,
    RolloutConfig,
    StageConfig,
    SupervisedConfig,
)
from opsd_jax.model.config import (
    GenerationConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    VAEConfig,
    ViTConfig,
)
from opsd_jax.runtime.health import Health
from opsd_jax.weighting import PositionsConfig

STAGES = ("autoencoder", "warmup", "opsd", "sft", "offline")
TRACED = ("warmup", "sft", "offline")  # stages that learn from traces of the examples
LAYOUTS = ("interleaved", "reference", "text", "drawn")  # of traces, see `data.packing`
# What evaluation may show: the visual thoughts of a mode, or ("remove") the teacher's texts alone.
MODES = (*blocks_lib.VISUAL_THOUGHTS, "remove")

Value = bool | int | float | str | tuple


# --- groups of settings that no dataclass of the method describes --------------------------------


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The run as a whole; its keys have no group."""

    seed: Annotated[int, checks.SEED] = 0
    # Stages of the run, in order. Each starts with a fresh optimizer.
    stages: Annotated[tuple[str, ...], STAGES] = ("opsd",)
    # Origin of the initial parameters: a checkpoint, workdir or released folder. "" initialises
    # them at random.
    init_from: str = ""
    # A tokenizer folder; "" for the tokenizer that data.make made.
    tokenizer: str = ""
    # Names of the control arms that the run starts by itself. Any arm can be run with --arm=NAME.
    run_arms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class VisionSwitch:
    """Whether the model has a vision tower (`model.vit`); without one it reads text alone."""

    on: bool = True


@dataclasses.dataclass(frozen=True)
class ImageSwitch:
    """Whether the model has an image-generation path (`model.generation`)."""

    on: bool = False


@dataclasses.dataclass(frozen=True)
class ImageLoading:
    """How images are read, in addition to their size rule (`images`)."""

    # "drop" keeps the colour of transparent pixels, as in the official code; "white" composites.
    transparency: Annotated[str, ("drop", "white")] = "drop"


@dataclasses.dataclass(frozen=True)
class MakeConfig:
    """Procedural data that a run makes where data.dir is empty (`data.make`)."""

    families: Annotated[tuple[str, ...], tuple(tasks.FAMILIES)] = ()  # () makes nothing
    train: Annotated[int, "[0, inf)"] = 0  # examples of each family, also in the next two
    validation: Annotated[int, "[0, inf)"] = 0
    test: Annotated[int, "[0, inf)"] = 0
    difficulty: Annotated[str, ("easy", "default", "hard")] = "default"
    seed: Annotated[int, checks.SEED] = 0
    # Share of the train examples whose text trace is that of another example, with a wrong answer.
    wrong_traces: Annotated[float, "[0, 1]"] = 0.0


@dataclasses.dataclass(frozen=True)
class BucketsConfig:
    """Static sizes of packed sequences, ascending (`data.buckets`).

    An example goes to the first bucket that it fits completely. `BUCKET_SIZES` names the numbers of
    an entry.
    """

    student: tuple[tuple[int, ...], ...] = ((2048, 1500), (5376, 4900))
    # The largest is opsd.max_forward_tokens without 126 tokens to score.
    teacher: tuple[tuple[int, ...], ...] = ((4096, 3000), (10112, 9800))
    trace: tuple[tuple[int, ...], ...] = ((3072, 1500, 1024), (10240, 9800, 2048))
    drawn: tuple[tuple[int, ...], ...] = ()  # where a stage trains image generation

    def __getitem__(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """The entries of a kind of sequences, by its name."""
        return getattr(self, kind)


# What the numbers of an entry of data.buckets count; each is at least 1, except patches.
BUCKET_SIZES = {
    "student": ("positions", "patches"),
    "teacher": ("positions", "patches"),
    "trace": ("positions", "patches", "targets"),
    "drawn": ("latent tokens", "images", "height", "width"),
}


@dataclasses.dataclass(frozen=True)
class ScreenConfig:
    """Which training examples OPSD leaves out (`data.screen`), see `run.screening`."""

    on: bool = False
    # Nats per token by which the teacher's context must raise the reference of an example.
    margin: Annotated[float, "(-inf, inf)"] = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run and how batches of them are made (`data`)."""

    dir: str = ""  # prepared data (a TFDS data_dir); "" for <workdir>/data
    tasks: tuple[str, ...] = (
        "Visual_Search",
        "Spatial_Navigation",
        "Jigsaw_Assembly",
        "Chart_Refocus",
    )
    # Number of examples taken from the start of each task's train split; () for all.
    limits: Annotated[tuple[int, ...], "[0, inf)"] = (6990, 6000, 6000, 6000)
    # Number of them whose traces the stages of `TRACED` read; () for no other number than limits.
    trace_limits: Annotated[tuple[int, ...], "[0, inf)"] = ()
    # Further columns that contexts may show, such as ("text:solution", "images:crops"); the data
    # are prepared with them.
    columns: tuple[str, ...] = ()
    # Share of each task in a batch; () for shares by number of examples, as in the official code.
    weights: Annotated[tuple[float, ...], "[0, inf)"] = ()
    make: MakeConfig = MakeConfig()
    buckets: BucketsConfig = BucketsConfig()
    # "skip" leaves out examples that fit no bucket and names them in <workdir>/too_long.json.
    on_too_long: Annotated[str, ("fail", "skip")] = "fail"
    screen: ScreenConfig = ScreenConfig()
    threads: Annotated[int, "[1, inf)"] = 4  # that decode and pack batches ahead of the step
    prefetch: Annotated[int, "[0, inf)"] = 4  # batches held ready
    cache_rows: Annotated[int, "[0, inf)"] = 0  # examples kept decoded and tokenised in memory


@dataclasses.dataclass(frozen=True)
class OnPolicyBatches:
    """What the completions of a batch are (`opsd`)."""

    # Completions of each question: a batch holds batch_size / completions questions.
    completions: Annotated[int, "[1, inf)"] = 1
    # Share of a batch's sequences whose completion is the example's text trace.
    reference_share: Annotated[float, "[0, 1]"] = 0.0


@dataclasses.dataclass(frozen=True)
class BatchesConfig:
    """How the batches of one stage are made; the values that `batches` takes from several groups.

    Attributes:
      stage: one of STAGES.
      size: number of sequences of the global batch.
      completions: number of sequences of each example; it divides the size.
      num_references: sequences of a batch whose completion is the example's text trace.
      tokens: tokens that a completion has space for.
      seed: seed of the schedule and of noise.
      visual_thoughts: what the teacher sees, one of blocks.VISUAL_THOUGHTS.
      contrast: whether batches also hold the teacher's context with swapped privileged blocks.
      mix: ratios of the layouts of traces, {layout: ratio}; {} for a stage without traces.
      generation: whether batches also hold images as the autoencoder sees them.
      data: shares of the tasks, what happens to examples that fit no bucket, threads.
    """

    stage: str
    size: int
    completions: int
    num_references: int
    tokens: int
    seed: int
    visual_thoughts: str
    contrast: bool
    mix: Mapping[str, int]
    generation: bool
    data: DataConfig

    @property
    def measured(self) -> str:
        """What the teacher sees in the largest of its contexts besides the true blocks."""
        return "swap" if self.contrast else self.visual_thoughts


@dataclasses.dataclass(frozen=True)
class StudentContext:
    """What the student sees (`student`)."""

    # Names of the blocks of its context, in order: see `blocks.BlockNames`.
    blocks: tuple[str, ...] = blocks_lib.BlockNames.student


@dataclasses.dataclass(frozen=True)
class TeacherContext:
    """What the teacher sees (`teacher`)."""

    blocks: tuple[str, ...] = blocks_lib.BlockNames.teacher
    # What takes the place of its privileged blocks, those that the student lacks. By default they
    # are the visual thoughts.
    visual_thoughts: Annotated[str, blocks_lib.VISUAL_THOUGHTS] = "real"


@dataclasses.dataclass(frozen=True)
class TrainingRollouts:
    """How training uses the sampler (`rollout`)."""

    # New examples for a batch that holds an empty completion; after them it becomes one eos.
    empty_retries: Annotated[int, "[0, inf)"] = 3
    # Devices that share a copy of the weights while completions are sampled; 0: chosen.
    tensor: Annotated[int, "[0, inf)"] = 0
    # Sample with the decoder's matrices rounded to int8. Evaluations and both scores do not.
    int8: bool = False


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Size of a batch, of every stage."""

    batch_size: Annotated[int, "[1, inf)"] = 16


@dataclasses.dataclass(frozen=True)
class TextMix:
    """Examples of a batch by layout, as ratios (`sft.mix`)."""

    interleaved: Annotated[int, "[0, inf)"] = 0
    reference: Annotated[int, "[0, inf)"] = 0
    text: Annotated[int, "[0, inf)"] = 1


@dataclasses.dataclass(frozen=True)
class TraceMix(TextMix):
    """Examples of a batch by layout, as ratios (`warmup.mix`)."""

    interleaved: Annotated[int, "[0, inf)"] = 2
    reference: Annotated[int, "[0, inf)"] = 1
    drawn: Annotated[int, "[0, inf)"] = 0


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What the cached teacher of the offline stage keeps (`offline`)."""

    # The teacher's largest entries of each token; the whole vocabulary where that is smaller.
    top_k: Annotated[int, "[1, inf)"] = 256


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training and at the end of a stage (`eval`)."""

    every: Annotated[int, "[0, inf)"] = 0  # steps between evaluations on `split`; 0 for none
    split: str = "validation"
    # Examples of each task in those evaluations, a random subset that stays the same; 0 for all.
    rows: Annotated[int, "[0, inf)"] = 128
    visual_thoughts: Annotated[tuple[str, ...], MODES] = ("none",)  # modes evaluated there
    final_split: str = "test"  # evaluated completely at the end of a stage; "" for none
    final_visual_thoughts: Annotated[tuple[str, ...], MODES] = ("none", "real")
    final_banned: bool = False  # also without images and with the marker banned
    # Also KL(initial model with visual thoughts || current model without) on reference traces,
    # after the stages opsd, sft and offline.
    kl: bool = True
    batch_size: Annotated[int, "[1, inf)"] = 64
    slots: Annotated[int, "[0, inf)"] = 0  # as rollout.slots, for a batch of evaluation
    max_new_tokens: Annotated[int, "[2, inf), or 0"] = 0  # 0: as rollout.max_new_tokens


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept (`checkpoint`)."""

    every: Annotated[int, "[1, inf)"] = 100  # steps; the last of a stage is always saved and kept
    keep_latest: Annotated[int, "[1, inf)"] = 2
    timeout: Annotated[int, "[1, inf)"] = 1200  # seconds that a save may take in the background
    # What may have another content than before without stopping the run.
    accept_changed: Annotated[tuple[str, ...], ("data", "tokenizer", "chat_template")] = ()
    # Weights for inference: "student", which the official code evaluated, or "ema".
    params: Annotated[str, ("student", "ema")] = "student"


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged and how often (`log`)."""

    every: Annotated[int, "[1, inf)"] = 10  # steps between lines of metrics.jsonl
    # Steps between rollouts written to samples/; 0 for the first batch only.
    samples_every: Annotated[int, "[0, inf)"] = 50
    # First and last step of a trace in profile/, counted from 1 over all stages; () for none.
    profile_steps: Annotated[tuple[int, ...], "[1, inf)"] = ()
    tensorboard: bool = True
    wandb: str = ""  # project name; "" for none


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (`mesh`); -1 for all that are left."""

    data: Annotated[int, "[1, inf), or -1"] = 1
    fsdp: Annotated[int, "[1, inf), or -1"] = -1
    tensor: Annotated[int, "[1, inf), or -1"] = 1


# --- all settings --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    default: its default value. rule: range or choices; None for flags and free texts.
    """

    default: Value
    rule: checks.Rule | None


# Fields of DistillConfig that are settings of the teacher, under the same names.
_OF_TEACHER = ("ema_decay", "snapshot_every", "contrast", "contrast_with")


@functools.cache
def settings() -> dict[str, Setting]:
    """{"group.key": setting} of all settings but `arms`, whose keys are free."""
    opsd = _of(DistillConfig)
    groups = {
        "": _of(RunConfig),
        "model": _of(ModelConfig, without=("vit", "generation", "lora")),
        # Sizes of ThinkMorph-7B.
        "model.llm": _of(
            LLMConfig,
            vocab_size=152064,
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            intermediate_size=18944,
        ),
        "model.vit": _of(VisionSwitch)
        | _of(ViTConfig, hidden_size=1152, num_layers=26, num_heads=16, intermediate_size=4304),
        "model.generation": _of(ImageSwitch)
        | _of(VAEConfig)
        | _of(GenerationConfig, without=("vae",)),
        "lora": _of(LoRAConfig, alpha=16.0)
        | {"rank": Setting(0, checks.Rule(int, False, "[0, inf)"))},  # 0: no adapters
        "prompts": _of(blocks_lib.Prompts),
        "images": _of(images.Resize)
        | {"min_pixels": _of(images.SmartResize)["min_pixels"]}
        | _of(ImageLoading),
        "transforms": _of(images.Transforms),
        "data": _of(DataConfig),
        "student": _of(StudentContext),
        "teacher": {"kind": opsd["teacher"]}
        | {name: opsd[name] for name in _OF_TEACHER}
        | _of(TeacherContext),
        "divergence": _of(DivergenceConfig),
        "rollout": _of(RolloutConfig, without=("shards", "further_ends"))
        | {name: opsd[name] for name in ("score_seam", "eos_after_cut")}
        | _of(TrainingRollouts),
        "autoencoder": _stage(AutoencoderConfig, optim=OptimConfig(lr=1e-4, total_steps=2000)),
        "warmup": _stage(ImageGenerationConfig, optim=OptimConfig(total_steps=3000))
        | _group("mix", _of(TraceMix)),
        "opsd": _stage(
            DistillConfig,
            without=("divergence", "teacher", *_OF_TEACHER, "score_seam", "eos_after_cut"),
            accumulation=2,
        )
        | _of(OnPolicyBatches),
        "sft": _stage(SupervisedConfig, optim=OptimConfig(total_steps=2000))
        | _group("mix", _of(TextMix)),
        "offline": _stage(OfflineConfig, optim=OptimConfig(total_steps=8000)) | _of(CacheConfig),
        "drawing": _of(FlowConfig, without=("interval", "renorm", "renorm_min")),
        "eval": _of(EvalConfig),
        "checkpoint": _of(CheckpointConfig),
        "log": _of(LogConfig),
        "health": _of(Health, without=("finite",)),  # always watched
        "mesh": _of(MeshConfig),
    }
    return {
        key: setting
        for name, group in groups.items()
        for key, setting in _group(name, group).items()
    }


def _group(name: str, group: dict[str, Setting]) -> dict[str, Setting]:
    return {f"{name}.{key}" if name else key: setting for key, setting in group.items()}


def _of(cls: type, *, without: tuple[str, ...] = (), **values: Value) -> dict[str, Setting]:
    """{name: setting} of the fields of a dataclass.

    A field whose default is a dataclass is a group of settings. Fields without a default (a
    tokenizer's ids, the network of a sampler) are not settings.

    Args:
      without: fields that are not settings although they have a default.
      values: defaults of fields that have none of their own.
    """
    rules, found = checks.rules(cls), {}
    for field in dataclasses.fields(cls):
        name, default = field.name, values.get(field.name, field.default)
        if name in without or default is dataclasses.MISSING:
            continue
        if dataclasses.is_dataclass(default):
            found |= _group(name, _of(type(default), **vars(default)))
        else:
            found[name] = Setting(default, rules.get(name))
    return found


def _stage(
    cls: type[StageConfig], *, without: tuple[str, ...] = (), **values
) -> dict[str, Setting]:
    """The settings of a stage. Its number of steps is that of its learning-rate schedule.

    Args:
      cls: the stage's dataclass.
      without: fields that are settings of other groups. `chunk` is always one: `divergence.chunk`.
      values: defaults, where the stage has others than the dataclass.
    """
    own = _of(cls, without=("chunk", *without), **values)
    return {"steps": own.pop("optim.total_steps")} | _of(BatchConfig) | own


def default() -> ConfigDict:
    """The paper's run: Visual-OPSD of ThinkMorph-7B, 1,000 steps.

    Config files change values in it and add no keys, except in `arms`: name -> changed settings of
    a control arm, which starts where this run's OPSD stage started.
    """
    config = ConfigDict({"arms": ConfigDict()})
    for key, setting in settings().items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        group[name] = setting.default
    return config


def from_json(record: Mapping) -> ConfigDict:
    """Settings as `to_json` wrote them, such as a run's W/config.json; the inverse of it.

    Settings that the record lacks have their defaults: it may be older than they are. Keys that are
    no settings are kept, for `config_check.check` to name.

    Raises TypeError, ValueError, KeyError or AttributeError for values of another type.
    """
    config, usual = default(), default()
    arms = {name: _tuples(arm, usual) for name, arm in record.get("arms", {}).items()}
    config.update({**_tuples(record, usual), "arms": arms})
    return config


def _tuples(value, usual):
    """A value of JSON whose lists are tuples, at all depths, where the default is a tuple."""
    if isinstance(value, Mapping) and isinstance(usual, ConfigDict):
        return {key: _tuples(item, usual.get(key)) for key, item in value.items()}
    if value is None:
        raise TypeError("a setting cannot be null")
    if isinstance(value, list) and (usual is None or isinstance(usual, tuple)):
        return tuple(_tuples(item, usual) for item in value)
    return value


def default_values() -> dict[str, Value]:
    """{"group.key": default} of all settings but `arms`, whose keys are free."""
    return {key: setting.default for key, setting in settings().items()}


def ranges() -> dict[str, str]:
    """{"group.key": range} of every setting that is a number or a tuple of numbers."""
    return {
        key: setting.rule.allowed
        for key, setting in settings().items()
        if setting.rule and setting.rule.kind is not str
    }


# --- from settings to the dataclasses of the program ---------------------------------------------


def arm(config: ConfigDict, name: str, start: str = "") -> ConfigDict:
    """The settings of a control arm: those of the run, with the arm's changes, from OPSD on.

    start: the checkpoint that the stage starts from.
    """
    changed = config.copy_and_resolve_references()  # ConfigDict(config) would share its inner dicts
    changed.run_arms = ()
    changed.stages = ("opsd",)
    changed.init_from = start
    changed.log.profile_steps = ()  # the run's; an arm counts its own steps
    changed.update(config.arms[name].to_dict())
    return changed


def contrasts_swapped(config: ConfigDict) -> bool:
    """Whether the target of OPSD is contrasted with the teacher under swapped privileged blocks."""
    return config.teacher.contrast > 0 and config.teacher.contrast_with == "swap"


def trains_generation(config: ConfigDict, stage: str) -> bool:
    """Whether a stage trains image generation, and so needs images as the autoencoder sees them."""
    return stage == "autoencoder" or (stage == "warmup" and config.warmup.mix.drawn > 0)


def screened_stages(config: ConfigDict) -> tuple[str, ...]:
    """The stages that train on the examples that screening keeps; () where it is off.

    Screening measures before the first of them. In a run without OPSD, such as a control arm, they
    are the stages in its place.
    """
    if not config.data.screen.on:
        return ()
    instead = tuple(stage for stage in config.stages if stage in ("sft", "offline"))
    return ("opsd",) if "opsd" in config.stages else instead


def stage_ends(config: ConfigDict) -> dict[str, int]:
    """The step at which each stage ends: {"warmup": 350, "opsd": 750}."""
    ends, at = {}, 0
    for stage in config.stages:
        at += config[stage].steps
        ends[stage] = at
    return ends


def start_of(config: ConfigDict, stage: str) -> int:
    """The step after which a stage starts: 350 for opsd in the example of `stage_ends`."""
    return stage_ends(config)[stage] - config[stage].steps


def model(config: ConfigDict) -> ModelConfig:
    """Sizes of the network and how it is computed."""
    compute = {
        name: value
        for name, value in config.model.items()
        if name not in ("llm", "vit", "generation")
    }
    llm, vit = dict(config.model.llm), dict(config.model.vit)
    vit |= {name: tuple(map(float, vit[name])) for name in ("mean", "std")}
    return ModelConfig(
        llm=LLMConfig(**llm | {"rope_llama3": tuple(map(float, llm["rope_llama3"]))}),
        vit=ViTConfig(**vit) if vit.pop("on") else None,
        generation=generation(config),
        lora=lora(config),
        **compute,
    )


def generation(config: ConfigDict) -> GenerationConfig | None:
    """Sizes of the image-generation path; None where it is off."""
    c = config.model.generation
    if not c.on:
        return None
    vae = VAEConfig(
        channels=c.channels,
        multipliers=tuple(c.multipliers),
        num_res_blocks=c.num_res_blocks,
        z_channels=c.z_channels,
        scale=c.scale,
        shift=c.shift,
    )
    return GenerationConfig(vae, c.patch, c.side, c.timestep_shift)


def lora(config: ConfigDict) -> LoRAConfig | None:
    """The adapters of the understanding expert; None where they are off."""
    c = config.lora
    return LoRAConfig(c.rank, c.alpha, tuple(c.targets)) if c.rank else None


def data(config: ConfigDict) -> DataConfig:
    """The data of a run and how batches of them are made."""
    c = config.data
    groups = {"make": MakeConfig, "buckets": BucketsConfig, "screen": ScreenConfig}
    return DataConfig(**{**c, **{name: group(**c[name]) for name, group in groups.items()}})


def data_of(config: ConfigDict, stage: str) -> DataConfig:
    """The data of a stage: those with `data.trace_limits` in force where it reads traces."""
    found = data(config)
    if stage not in TRACED or not found.trace_limits:
        return found
    pairs = zip(found.limits or found.trace_limits, found.trace_limits, strict=True)
    limits = tuple(min(filter(None, pair), default=0) for pair in pairs)
    return dataclasses.replace(found, limits=limits)


def batches(config: ConfigDict, stage: str) -> BatchesConfig:
    """How the batches of a stage are made."""
    s = config[stage]
    return BatchesConfig(
        stage=stage,
        size=s.batch_size,
        completions=s.get("completions", 1),
        num_references=round(s.get("reference_share", 0.0) * s.batch_size),
        tokens=training_budget(config) - 1,  # bos is fed, too
        seed=config.seed,
        visual_thoughts=config.teacher.visual_thoughts,
        contrast=stage == "opsd" and contrasts_swapped(config),
        mix={**config[stage].get("mix", {})},
        generation=trains_generation(config, stage),
        data=data_of(config, stage),
    )


def prompts(config: ConfigDict) -> blocks_lib.Prompts:
    """The fixed texts of the contexts."""
    return blocks_lib.Prompts(**config.prompts)


def load_tokenizer(config: ConfigDict, folder: str) -> tokenizer.Tokenizer:
    """The tokenizer of a folder in the form of a run's contexts; raises as `tokenizer.load`."""
    return tokenizer.load(
        folder,
        vocab_size=config.model.llm.vocab_size,
        images=config.model.vit.on,
        form=config.prompts.form,
        thinking=config.prompts.thinking,
    )


def block_names(config: ConfigDict) -> blocks_lib.BlockNames:
    """Names of the blocks of both contexts."""
    return blocks_lib.BlockNames(tuple(config.student.blocks), tuple(config.teacher.blocks))


def transforms(config: ConfigDict) -> images.Transforms:
    """Parameters of the image transforms."""
    return images.Transforms(**{**config.transforms, "crop": tuple(config.transforms.crop)})


def resize_rule(config: ConfigDict) -> images.Rule:
    """The size rule of all images: that of the model's family."""
    rule = images.Resize if config.model.vit.kind == "siglip" else images.SmartResize
    names = [field.name for field in dataclasses.fields(rule)]
    return rule(**{name: config.images[name] for name in names})


def rollout(config: ConfigDict, tokenizer, marker: Marker | None, **changes) -> RolloutConfig:
    """How completions are sampled in training.

    The sampler reads and writes text: it needs no parameters of the image-generation path.

    Args:
      tokenizer: has the token ids `bos` and `eos`.
      marker: see `rollout.Marker`.
      changes: fields with other values, for evaluation.
    """
    others = {"score_seam", "eos_after_cut"} | {
        f.name for f in dataclasses.fields(TrainingRollouts)
    }
    values = {k: v for k, v in config.rollout.items() if k not in others}
    text = dataclasses.replace(model(config), generation=None)
    # BAGEL ends its answers with eos alone, whatever else its folder names.
    ends = () if text.is_bagel else tokenizer.further_ends
    return RolloutConfig(
        model=text,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        further_ends=ends,
        marker=marker,
        **(values | changes),
    )


def training_budget(config: ConfigDict) -> int:
    """Budget of fed tokens of a completion in training: rollout.max_new_tokens, or less.

    Where no position from `opsd.positions.limit` on counts, sampling ends there. bos and the
    delimiters of image skips are fed in addition to the tokens that the limit counts.
    """
    budget, limit = config.rollout.max_new_tokens, config.opsd.positions.limit
    needed = limit + 1 + 2 * config.rollout.max_image_skips
    return min(budget, needed) if limit else budget


def health(config: ConfigDict, stage: str) -> Health:
    """What is watched during a stage.

    Completions that end at `opsd.positions.limit` are not expected to end by themselves.
    """
    values = {**config.health}
    if stage == "opsd" and config.opsd.positions.limit:
        values |= {"max_unfinished": None, "min_eos_rate": None}
    return Health(**values)


def stage_config(config: ConfigDict, stage: str, tokenizer) -> StageConfig:
    """The configuration of one stage's update.

    tokenizer: has the token ids `bos` and `eos`.
    """
    s = config[stage]
    common = {
        "model": model(config),
        "optim": OptimConfig(total_steps=s.steps, **s.optim),
        "accumulation": s.accumulation,
    }
    if stage == "autoencoder":
        return AutoencoderConfig(**common, kl_weight=s.kl_weight)
    common |= {"reduction": s.reduction, "freeze": tuple(s.freeze)}
    if stage == "opsd":
        return DistillConfig(
            **common,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            divergence=DivergenceConfig(**config.divergence),
            teacher=config.teacher.kind,
            **{name: config.teacher[name] for name in _OF_TEACHER},
            jsd_weight=s.jsd_weight,
            ce_weight=s.ce_weight,
            max_forward_tokens=s.max_forward_tokens,
            positions=PositionsConfig(**s.positions),
            token_weights=s.token_weights,
            score_seam=config.rollout.score_seam,
            eos_after_cut=config.rollout.eos_after_cut,
        )
    common["chunk"] = config.divergence.chunk
    if trains_generation(config, stage):
        return ImageGenerationConfig(**common, ce_weight=s.ce_weight, mse_weight=s.mse_weight)
    if stage == "offline":
        return OfflineConfig(**common, weight=s.weight, temperature=s.temperature)
    return SupervisedConfig(**common)


def to_json(config: Mapping) -> dict:
    """Settings (a ConfigDict, or any mapping) as dict, list, str, int, float, bool and None.

    Raises TypeError or ValueError, with the key, for what JSON cannot hold.
    """
    return _to_json(config, "")


def _to_json(value, key: str):
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):  # a ConfigDict is not a Mapping
        return {str(name): _to_json(value[name], f"{key}.{name}") for name in value}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"setting {key[1:]} is {value}, which JSON cannot hold: use None for 'no limit'"
        )
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"setting {key[1:]} is a {type(value).__name__}, which JSON cannot hold: use its name, a "
        "number, a list or a dict"
    )
