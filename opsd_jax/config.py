"""Every setting of a run with its default, and what the settings become.

`default()` is the whole configuration: the files in configs/ change values in it and add no keys. The functions
below turn it into the frozen, hashable views that jitted functions take as static arguments; a ConfigDict never
enters jit. Defaults are the paper's (App. C) and the official release's; where the two disagree, the paper's.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import sys
import types

from ml_collections import ConfigDict

from opsd_jax import context, images, params, tasks
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.inputs import checks, paths
from opsd_jax.method_config import DistillConfig, FlowConfig, OptimConfig, RolloutConfig
from opsd_jax.model.config import (
    MULTIPLIER,
    GenerationConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    VAEConfig,
    ViTConfig,
)
from opsd_jax.params import LORA_TARGETS
from opsd_jax.runtime import health

STAGES = ("autoencoder", "warmup", "opsd", "sft", "offline")
MODES = (
    *context.VISUAL_THOUGHTS,
    "remove",
)  # what evaluation may show: the last, the teacher's texts alone
LEAST_SCORED = 64  # tokens of a completion that opsd.max_forward_tokens must leave beside any teacher's context
LAYOUTS = ("interleaved", "reference", "text", "drawn")


def default() -> ConfigDict:
    """The paper's run: Visual-OPSD of ThinkMorph-7B, 1,000 steps."""
    c = ConfigDict()
    c.seed = 0
    c.stages = (
        "opsd",
    )  # stages of the run in order, from STAGES; each starts with a fresh optimizer
    c.init_from = (
        ""  # where parameters come from: a checkpoint, workdir or released folder; "": random
    )

    c.model = ConfigDict()
    c.model.llm = ConfigDict(
        dict(
            vocab_size=152064,
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            intermediate_size=18944,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            head_dim=0,
        )
    )  # head_dim 0: hidden_size / num_heads
    c.model.vit = ConfigDict(
        dict(
            hidden_size=1152,
            num_layers=26,
            num_heads=16,
            intermediate_size=4304,
            patch_size=14,
            side=70,
            layer_norm_eps=1e-6,
        )
    )  # side: patches a side of the position tables
    c.model.generation = ConfigDict(
        dict(  # what draws; without `on` it is not in the model
            on=False,
            channels=128,
            multipliers=(1, 2, 4, 4),
            num_res_blocks=2,
            z_channels=16,
            scale=0.3611,
            shift=0.1159,
            patch=2,
            side=64,
            timestep_shift=1.0,
        )
    )
    c.model.dtype = "bfloat16"  # compute dtype; parameters are float32
    c.model.remat = (
        "full"  # "none" keeps activations, "full" recomputes each layer in the backward pass
    )
    c.model.unroll = 1  # layers of the scan that are unrolled
    c.model.attention = "dense"  # or "flash" (TPU), "cudnn" (GPU): kernels without scores in memory
    c.model.rope_bfloat16 = (
        False  # True: rotary frequencies in bfloat16, as the official trainer has them under FSDP
    )
    c.model.query_block = 512  # dense attention: queries at a time; 0: all at once

    c.lora = ConfigDict(
        dict(rank=0, alpha=16.0, targets=LORA_TARGETS)
    )  # rank 0: off; else only adapters are trained

    c.tokenizer = ""  # a tokenizer folder; "": the one that data.make made
    c.prompts = ConfigDict()
    c.prompts.system = context.SYSTEM_TRAINING  # an empty text leaves its block out
    c.prompts.intro = context.INTRO
    c.prompts.transition = context.TRANSITION
    c.prompts.suffix = ""  # appended to every question

    c.images = ConfigDict(dataclasses.asdict(images.TRAINING))  # pixels, see images.Resize
    c.images.transparency = "drop"  # what the official loader does; "white" composites on white

    c.data = ConfigDict()
    c.data.dir = ""  # prepared data (a TFDS data_dir); "": <workdir>/data
    c.data.tasks = ("Visual_Search", "Spatial_Navigation", "Jigsaw_Assembly", "Chart_Refocus")
    c.data.limits = (6990, 6000, 6000, 6000)  # first rows of each task's train split; () for all
    c.data.weights = ()  # share of each task in a batch; () for shares by row count, as officially
    c.data.make = ConfigDict(
        dict(  # procedural data, made if data.dir is empty; families () makes nothing
            families=(), train=0, validation=0, test=0, difficulty="default", seed=0
        )
    )
    c.data.buckets = ConfigDict(
        dict(  # static sizes, ascending; a row goes to the first bucket that it fits whole
            student=((2048, 1500), (5376, 4900)),  # (slots, patches)
            teacher=(
                (4096, 3000),
                (10112, 9800),
            ),  # opsd.max_forward_tokens less 126 tokens to score
            trace=(
                (3072, 1500, 1024),
                (10240, 9800, 2048),
            ),  # (slots, patches, targets) of warm-up and SFT
            drawn=(),
        )
    )  # (latent tokens, pictures of a row, their height, width) where a stage draws
    c.data.on_too_long = (
        "fail"  # or "skip": rows beyond the largest bucket are named in <workdir>/too_long.json
    )
    c.data.threads = 4  # that decode and pack batches ahead of the step
    c.data.prefetch = 4  # batches held ready
    c.data.cache_rows = 0  # rows kept decoded and tokenised in memory

    c.teacher = ConfigDict()
    c.teacher.kind = (
        "ema"  # "ema", "self" (the live weights) or "fixed" (the weights at the stage's start)
    )
    c.teacher.ema_decay = 0.995
    c.teacher.visual_thoughts = (
        "real"  # what stands in the teacher's VT slots: real | noise | swap | image | none
    )

    c.divergence = ConfigDict(
        dict(  # see divergence.DivergenceConfig
            kind="jsd",
            beta=0.5,
            temperature=1.0,
            top_k=256,
            tail=False,
            clip=0.05,
            clip_unit="entry",
            chunk=192,
        )
    )

    c.rollout = ConfigDict()
    c.rollout.max_new_tokens = 1024  # budget of fed tokens, all rounds and delimiters
    c.rollout.temperature = 1.0
    c.rollout.greedy = False
    c.rollout.top_k = 0  # 0: off
    c.rollout.top_p = 1.0  # 1: off
    c.rollout.max_image_skips = 1
    c.rollout.ban_marker = False  # never sample a token that completes <image_start>
    c.rollout.slots = (
        0  # rows sampled at a time, the others of the batch wait in a queue; 0: all at once
    )
    c.rollout.refill = 0  # slots that must be free before waiting rows take them; 0: a quarter
    c.rollout.score_seam = False  # True: score the delimiters between rounds as they were sampled
    c.rollout.eos_after_cut = (
        True  # False: no eos target behind a completion that did not end by itself
    )
    c.rollout.empty_retries = (
        3  # new rows for a batch that holds an empty completion; then it becomes one eos
    )

    c.autoencoder = _stage(steps=2000, batch_size=16, lr=1e-4, reduction="token")
    del (
        c.autoencoder.reduction,
        c.autoencoder.freeze,
    )  # it has neither tokens nor other groups than its own
    c.autoencoder.kl_weight = 1e-4
    c.warmup = _stage(steps=3000, batch_size=16, lr=1e-5, reduction="token")
    c.warmup.mix = ConfigDict(
        dict(interleaved=2, reference=1, text=1, drawn=0)
    )  # rows of a batch by layout, as ratios
    c.warmup.ce_weight = 1.0  # where the mix has drawn rows: of the cross entropy
    c.warmup.mse_weight = 1.0  # and of the squared error of the velocities
    c.opsd = _stage(steps=1000, batch_size=16, lr=1e-5, reduction="completion")
    c.opsd.accumulation = 2
    c.opsd.jsd_weight = 1.0
    c.opsd.ce_weight = 0.0
    c.opsd.max_forward_tokens = (
        10240  # completions are cut so that the teacher's sequence fits, see `cut_rate`
    )
    c.sft = _stage(steps=2000, batch_size=16, lr=1e-5, reduction="token")
    c.sft.mix = ConfigDict(dict(interleaved=0, reference=0, text=1))
    c.offline = _stage(
        steps=8000, batch_size=16, lr=1e-5, reduction="token"
    )  # a cached teacher, see offline.py
    c.offline.top_k = (
        256  # the teacher's entries that are kept; the whole vocabulary where that is smaller
    )
    c.offline.temperature = 2.0
    c.offline.weight = 0.5  # of the KL beside the cross entropy

    c.drawing = ConfigDict(
        dict(  # how a run's model draws, see flow.FlowConfig
            num_timesteps=50, timestep_shift=3.0, text_scale=3.0, image_scale=1.5
        )
    )

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations on `split` while training; 0: none
    c.eval.split = "validation"
    c.eval.rows = (
        128  # random subset of each task, the same every time, in those evaluations; 0: all
    )
    c.eval.visual_thoughts = ("none",)  # modes evaluated then
    c.eval.final_split = "test"  # evaluated whole when a stage ends; "": not at all
    c.eval.final_visual_thoughts = ("none", "real")
    c.eval.final_banned = False  # also without pictures and with the marker banned
    c.eval.kl = (
        True  # also KL(start with VT || now without) on reference traces, after opsd, sft, offline
    )
    c.eval.batch_size = 64
    c.eval.slots = 0  # as rollout.slots, of an evaluation batch
    c.eval.max_new_tokens = 0  # 0: as rollout.max_new_tokens

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps; the last step of each stage is always saved and kept
    c.checkpoint.keep_latest = 2
    c.checkpoint.accept_changed = ()  # "data", "tokenizer": a run goes on although their content is another than before
    c.checkpoint.params = (
        "student"  # the item for inference: "student" (what was evaluated officially) or "ema"
    )

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of metrics.jsonl
    c.log.samples_every = 50  # steps between rollouts written to samples/; 0: only the first batch
    c.log.tensorboard = True
    c.log.wandb = ""  # project name; "" for none

    c.health = ConfigDict(
        dataclasses.asdict(health.Health())
    )  # when to stop a run early; 0 switches a watch off
    del c.health.finite  # no setting: always watched

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))  # -1: whatever is left
    c.arms = (
        ConfigDict()
    )  # name -> changed settings: controls that start where this run's OPSD stage started
    c.run_arms = ()  # names of the arms that the run starts by itself; any can be run with --arm=NAME
    return c


def _stage(*, steps, batch_size, lr, reduction):
    c = ConfigDict(
        dict(steps=steps, batch_size=batch_size, accumulation=1, reduction=reduction, freeze=())
    )
    c.optim = ConfigDict(
        dict(
            lr=lr,
            min_lr=1e-7,
            warmup_steps=200,
            schedule="cosine",
            b1=0.9,
            b2=0.95,
            eps=1e-15,
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
    )
    return c


# --- what a setting may be -------------------------------------------------------------------------------------

# Numbers in tuples, each with its range.
_ELEMENTS = {
    "data.limits": (int, "[0, inf)"),
    "data.weights": (float, "[0, inf)"),
    "model.generation.multipliers": (int, MULTIPLIER),
}

# What one entry of data.buckets.KIND holds, whole numbers of at least 1.
_BUCKETS = {
    "student": ("slots", "patches"),
    "teacher": ("slots", "patches"),
    "trace": ("slots", "patches", "targets"),
    "drawn": ("latent tokens", "pictures", "height", "width"),
}

_CHOICES = {
    "stages": STAGES,
    "teacher.visual_thoughts": context.VISUAL_THOUGHTS,
    "eval.visual_thoughts": MODES,
    "eval.final_visual_thoughts": MODES,
    "checkpoint.params": ("student", "ema"),
    "checkpoint.accept_changed": ("data", "tokenizer"),
    "data.on_too_long": ("fail", "skip"),
    "images.transparency": ("drop", "white"),
    "data.make.families": tuple(tasks.FAMILIES),
    "data.make.difficulty": ("easy", "default", "hard"),
    "lora.targets": LORA_TARGETS,
    **{f"{stage}.freeze": params.GROUPS for stage in STAGES},
}


@functools.cache
def ranges() -> dict[str, str]:
    """{key: range} of every number among the settings, or of each in a tuple; see `checks`. Fields of dataclasses declare
    theirs there."""
    views = [
        ("model.llm", LLMConfig),
        ("model.vit", ViTConfig),
        ("model.generation", VAEConfig),
        ("model.generation", GenerationConfig),
        ("model", ModelConfig),
        ("lora", LoRAConfig),
        ("images", images.Resize),
        ("teacher", DistillConfig),
        ("divergence", DivergenceConfig),
        ("rollout", RolloutConfig),
        ("drawing", FlowConfig),
        ("health", health.Health),
        *((stage, DistillConfig) for stage in STAGES),
        *((f"{stage}.optim", OptimConfig) for stage in STAGES),
    ]
    cached, seed = checks.ranges(DistillConfig), checks.SEED
    found = {
        f"{group}.{name}": allowed
        for group, view in views
        for name, (_, allowed) in checks.ranges(view).items()
    } | {
        **{key: allowed for key, (_, allowed) in _ELEMENTS.items()},
        "seed": seed,
        "lora.rank": "[0, inf)",
        "data.make.seed": seed,
        "data.make.train": "[0, inf)",
        "data.make.validation": "[0, inf)",
        "data.make.test": "[0, inf)",
        "data.threads": "[1, inf)",
        "data.prefetch": "[0, inf)",
        "data.cache_rows": "[0, inf)",
        "rollout.empty_retries": "[0, inf)",
        **{f"{stage}.{name}": "[1, inf)" for stage in STAGES for name in ("steps", "batch_size")},
        **{
            f"{stage}.mix.{layout}": "[0, inf)" for stage in ("warmup", "sft") for layout in LAYOUTS
        },
        "offline.top_k": "[1, inf)",
        "offline.temperature": cached["cached_temperature"][1],
        "offline.weight": cached["cached_weight"][1],
        "eval.every": "[0, inf)",
        "eval.rows": "[0, inf)",
        "eval.batch_size": "[1, inf)",
        "eval.slots": "[0, inf)",
        "eval.max_new_tokens": "[2, inf), or 0",
        "checkpoint.every": "[1, inf)",
        "checkpoint.keep_latest": "[1, inf)",
        "log.every": "[1, inf)",
        "log.samples_every": "[0, inf)",
        **{f"mesh.{axis}": "[1, inf), or -1" for axis in ("data", "fsdp", "tensor")},
    }
    return {key: allowed for key, allowed in found.items() if key in default_values()}


@functools.cache
def default_values() -> dict:
    """{"group.key": value} of `default()`, without `arms`, whose keys are free."""

    def values(group, prefix=""):
        found = {}
        for name, value in group.items():
            key = prefix + name
            if key != "arms":
                found |= values(value, f"{key}.") if isinstance(value, ConfigDict) else {key: value}
        return found

    return values(default())


def unknown(key: str) -> str:
    """What to say of a key that is no setting, with the nearest one that is."""
    group, path = default(), []
    for part in key.split("."):
        if part not in group:
            close = difflib.get_close_matches(part, group, 1)
            hint = (
                f'Did you mean "{close[0]}"?' if close else "All of them are in opsd_jax/config.py."
            )
            return f"there is no setting '{part}' in {'.'.join(['config', *path])}. {hint}"
        group, path = group[part], [*path, part]
        if not isinstance(group, ConfigDict):
            break
    return f"{'.'.join(['config', *path])} is not a group of settings"


def check(config: ConfigDict) -> None:
    """ValueError, with key, value and what is right, for settings that no run can have: keys that are unknown or missing,
    values of another type or out of their range, and values that do not go together. Nothing is read or made."""
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config is a {type(config).__name__}: get_config() returns the ConfigDict of "
            "opsd_jax.config.default(), with changed values"
        )
    _check_group(config, default(), "config", "")
    _check_together(config)
    for name, changes in config.arms.items():
        checks.folder_name(f"config.arms.{name}", name)  # its folder is <workdir>/arms/<name>
        if not isinstance(changes, ConfigDict):
            raise ValueError(
                f"config.arms.{name} is {changes!r}: give the settings that the arm changes, such as "
                '{"teacher": {"visual_thoughts": "noise"}}'
            )
        _check_group(changes, default(), f"config.arms.{name}", "", partial=True)
    for name in config.run_arms:
        if name not in config.arms or "opsd" not in config.stages:
            raise ValueError(
                f"config.run_arms names {name!r}: arms are {sorted(config.arms)}, and they need an opsd stage "
                "to start from"
            )
        changed = arm(config, name)
        try:
            _check_together(changed)
        except ValueError as error:
            raise ValueError(f"config.arms.{name}: {error}") from None
        if any(
            not c.eval.final_split or "none" not in c.eval.final_visual_thoughts
            for c in (config, changed)
        ):
            raise ValueError(
                "config.run_arms ends with a table of text-only accuracies: set config.eval.final_split, and "
                "'none' in config.eval.final_visual_thoughts"
            )


def _check_group(config, known, shown: str, prefix: str, partial: bool = False) -> None:
    """The keys of a group are the known ones, and the value of each is right by itself. partial: some may be missing."""
    for name in config:
        if name not in known:
            raise ValueError(f"{shown}.{name}: {unknown(prefix + name)}")
    if missing := [name for name in known if name not in config and not partial]:
        raise ValueError(
            f"{shown} lacks {', '.join(missing)}: change values of config.default() one by one, or with "
            "update(), instead of replacing a whole group"
        )
    for name, usual in known.items():
        if name not in config:
            continue
        value = config[name]
        if not isinstance(usual, ConfigDict):
            _check_value(value, usual, f"{shown}.{name}", prefix + name)
        elif not isinstance(value, ConfigDict):
            raise ValueError(
                f"{shown}.{name} is {value!r}, but it is a group of settings: set one of "
                f"{', '.join(usual)} in it"
            )
        elif prefix + name != "arms":
            _check_group(value, usual, f"{shown}.{name}", f"{prefix}{name}.", partial)


def _check_value(value, usual, shown: str, key: str) -> None:
    """One value by itself: type, range, choices."""
    group, _, name = key.rpartition(".")
    if isinstance(usual, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{shown} is {value!r}: give True or False")
    elif isinstance(usual, (int, float)):
        checks.number(shown, value, type(usual), ranges()[key])
    elif isinstance(usual, str):
        if not isinstance(value, str):
            raise ValueError(f"{shown} is {value!r}: give a text")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{shown} is {value!r}: {_choose(_CHOICES[key])}")
    elif not isinstance(value, (tuple, list)):
        raise ValueError(f"{shown} is {value!r}: give a tuple, such as {usual or '()'}")
    elif key in _ELEMENTS:
        for n, element in enumerate(value):
            checks.number(f"{shown}[{n}]", element, *_ELEMENTS[key])
    elif group == "data.buckets":
        whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0
        if not all(
            isinstance(sizes, (tuple, list))
            and len(sizes) == len(_BUCKETS[name])
            and all(map(whole, sizes))
            for sizes in value
        ):
            raise ValueError(
                f"{shown} is {value}: give a tuple that holds one ({', '.join(_BUCKETS[name])}) for each "
                "bucket, in whole numbers of at least 1, such as "
                f"({tuple(2 ** (11 - n) for n in range(len(_BUCKETS[name])))},)"
            )
        if any(any(a > b for a, b in zip(small, large)) for small, large in zip(value, value[1:])):
            raise ValueError(f"{shown} is {value}: sizes must not fall from one bucket to the next")
    else:
        for element in value:
            if not isinstance(element, str):
                raise ValueError(f"{shown} is {value!r}: give names, each in quotes")
            if key in _CHOICES and element not in _CHOICES[key]:
                raise ValueError(f"{shown} names {element!r}: {_choose(_CHOICES[key])}")
        checks.once(shown, value)
        if key == "data.tasks":  # a task's folder has its name in lower case
            checks.once(shown, [element.lower() for element in value])


def _choose(choices) -> str:
    return (
        f"use {choices[0]!r} or {choices[1]!r}" if len(choices) == 2 else f"choose from {choices}"
    )


def _check_together(config) -> None:
    """What depends on several settings, or on this machine. Each is right by itself."""
    paths.check("config.init_from", config.init_from)
    paths.check("config.tokenizer", config.tokenizer)
    paths.check("config.data.dir", config.data.dir)
    if not config.stages:
        raise ValueError(f"config.stages is empty: name at least one of {STAGES}")
    _check_data(config)
    with _keys_named():
        network = model(config)
    if config.images.stride != config.model.vit.patch_size:
        raise ValueError(
            f"config.images.stride {config.images.stride} must equal config.model.vit.patch_size "
            f"{config.model.vit.patch_size}: images are cut into whole patches"
        )
    if network.generation:
        FlowConfig(network, 0, 1, **config.drawing)
    if list(config.mesh.values()).count(-1) > 1:
        raise ValueError(
            f"config.mesh is {config.mesh.to_dict()}: only one size can be -1, whatever is left"
        )
    ends = types.SimpleNamespace(bos=0, eos=1)  # of the tokenizer, which may be still to be made
    with _keys_named():
        rollout(config, ends, None)
        rollout(
            config,
            ends,
            None,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            slots=config.eval.slots,
            refill=0,
        )
    for stage in config.stages:
        _check_stage(config, stage)
        with _keys_named(stage):
            distill(config, stage, ends)
    if "offline" in config.stages and config.teacher.visual_thoughts != "real":
        raise ValueError(
            f"config.teacher.visual_thoughts is {config.teacher.visual_thoughts!r}, but the cached "
            "teacher of the offline stage reads the true ones: set it to 'real', or leave the stage out"
        )
    for modes, asked, off in (
        ("visual_thoughts", config.eval.every, "every=0"),
        ("final_visual_thoughts", config.eval.final_split, "final_split=''"),
    ):
        if asked and not config.eval[modes]:
            raise ValueError(
                f"config.eval.{modes} is empty, so that evaluation has nothing to do: name some of {MODES}, or "
                f"set config.eval.{off}"
            )
    if config.log.wandb and not ("wandb" in sys.modules or importlib.util.find_spec("wandb")):
        raise ValueError(
            f"config.log.wandb is {config.log.wandb!r}, but wandb is not installed: pip install -e "
            "\".[wandb]\", or set config.log.wandb=''"
        )


@contextlib.contextmanager
def _keys_named(stage: str = ""):
    """Errors of the dataclasses begin with the name of a field: here with the whole key, of the stage or of all stages."""
    try:
        yield
    except ValueError as error:
        name = str(error).split(maxsplit=1)[0]
        key = next((key for key in (f"{stage}.{name}", name) if key in default_values()), None)
        raise ValueError(
            str(error).replace(name, f"config.{key}", 1) if key else str(error)
        ) from None


def _check_data(config) -> None:
    """Tasks, their shares, the procedural data and the buckets."""
    data, buckets = config.data, config.data.buckets
    if not data.tasks:
        raise ValueError("config.data.tasks is empty: name at least one")
    for name in ("limits", "weights"):
        if data[name] and len(data[name]) != len(data.tasks):
            raise ValueError(
                f"config.data.{name} needs one number for each of config.data.tasks, or (); it is {data[name]} "
                f"for {data.tasks}"
            )
    if data.weights and not any(data.weights):
        raise ValueError(
            f"config.data.weights is {data.weights}: give at least one task a share above 0"
        )
    if data.make.families and not data.dir:  # else the data are there
        used = {
            "train": "config.stages",
            config.eval.split: "config.eval.every" if config.eval.every else "",
            config.eval.final_split: "config.eval.final_split",
        }
        for key, split in (("split", config.eval.split), ("final_split", config.eval.final_split)):
            if (
                used.get(split) and split.isidentifier() and split not in tasks.BUCKETS
            ):  # else a slice, as test[:64]
                raise ValueError(
                    f"config.eval.{key} is {split!r}: procedural data have the splits {', '.join(tasks.BUCKETS)}"
                )
        for split in tasks.BUCKETS:
            if used.get(split) and not data.make[split]:
                raise ValueError(
                    f"config.data.make.{split} is 0, but {used[split]} needs that split: give at least 1"
                )
    if (
        len({len(buckets.student), len(buckets.teacher), len(buckets.trace)}) != 1
        or not buckets.student
    ):
        raise ValueError(
            "config.data.buckets needs equally many entries for student, teacher and trace, at least one"
        )


def _check_stage(config, stage: str) -> None:
    """A stage that will run."""
    s, drawing = config[stage], draws(config, stage)
    if s.batch_size % s.accumulation:
        raise ValueError(
            f"config.{stage}.batch_size {s.batch_size} is not divisible by config.{stage}.accumulation "
            f"{s.accumulation}"
        )
    if s.optim.warmup_steps > s.steps:
        raise ValueError(
            f"config.{stage}.optim.warmup_steps is {s.optim.warmup_steps}, but the stage has {s.steps} steps: "
            f"give at most config.{stage}.steps"
        )
    if s.optim.schedule == "cosine" and s.optim.min_lr > s.optim.lr:
        raise ValueError(
            f"config.{stage}.optim.min_lr is {s.optim.min_lr}, above config.{stage}.optim.lr {s.optim.lr}: the "
            "cosine falls to it, so give at most the peak rate"
        )
    if "mix" in s and not any(s.mix.values()):
        raise ValueError(
            f"config.{stage}.mix is {s.mix.to_dict()}: give at least one layout a share above 0"
        )
    if "freeze" in s:
        if lora(config) and s.freeze:
            raise ValueError(
                f"config.{stage}.freeze is {s.freeze} with config.lora, which trains its adapters alone: leave "
                "freeze empty, or set config.lora.rank=0"
            )
        if not {*params.GROUPS} - {
            "fixed",
            "vae",
            "lora",
            *(() if drawing else params.DRAWING),
            *s.freeze,
        }:
            raise ValueError(f"config.{stage}.freeze is {s.freeze}: nothing is left to train")
    if stage == "opsd" and not s.jsd_weight and not s.ce_weight:
        raise ValueError(
            "config.opsd.jsd_weight and config.opsd.ce_weight are both 0: nothing would be learned"
        )
    if stage == "opsd":
        largest, least = (
            config.data.buckets.teacher[-1][0],
            min(LEAST_SCORED, config.rollout.max_new_tokens),
        )
        if s.max_forward_tokens < largest + 2 + least:
            raise ValueError(
                f"config.opsd.max_forward_tokens is {s.max_forward_tokens}: with a teacher's context of {largest} positions, "
                f"the largest of config.data.buckets.teacher, a completion would be cut to "
                f"{max(s.max_forward_tokens - largest - 2, 1)} tokens. Give at least {largest + 2 + least} ({least} tokens to "
                f"score), or {largest + 2 + config.rollout.max_new_tokens} so that none is cut, or make that bucket smaller"
            )
    if not drawing:
        return
    what = "stages" if stage == "autoencoder" else "warmup.mix.drawn"
    if not config.model.generation.on:
        raise ValueError(
            f"config.{what} trains image generation, which this model lacks: set config.model.generation.on=True"
        )
    if len(config.data.buckets.drawn) != len(config.data.buckets.trace):
        raise ValueError(
            f"config.{what} needs config.data.buckets.drawn, one (latents, pictures, height, width) "
            "for each entry of config.data.buckets.trace"
        )
    stride = model(config).generation.stride
    if any(side % stride for sizes in config.data.buckets.drawn for side in sizes[2:]):
        raise ValueError(
            f"config.data.buckets.drawn is {config.data.buckets.drawn}: heights and widths must be "
            f"multiples of the {stride} pixels of a latent token"
        )
    if lora(config):
        raise ValueError(
            f"config.{what} trains image generation, but with config.lora only adapters are trained: "
            "set config.lora.rank=0"
        )


# --- what the settings become ----------------------------------------------------------------------------------


def arm(config, name: str, start: str = "") -> ConfigDict:
    """The settings of a control arm: those of the run with the arm's changes, from the OPSD stage on. start: the
    checkpoint that the stage starts from."""
    changed = config.copy_and_resolve_references()  # ConfigDict(config) would share its inner dicts
    changed.run_arms = ()
    changed.stages = ("opsd",)
    changed.init_from = start
    changed.update(config.arms[name].to_dict())
    return changed


def draws(config, stage: str) -> bool:
    """Whether a stage trains image generation, and so needs images as the autoencoder sees them."""
    return stage == "autoencoder" or (stage == "warmup" and config.warmup.mix.drawn > 0)


def stage_ends(config) -> dict[str, int]:
    """The step at which each stage ends: {"warmup": 350, "opsd": 750}."""
    ends, at = {}, 0
    for stage in config.stages:
        at += config[stage].steps
        ends[stage] = at
    return ends


def model(config: ConfigDict) -> ModelConfig:
    """Sizes and compute of the network."""
    m = config.model
    return ModelConfig(
        llm=LLMConfig(**m.llm),
        vit=ViTConfig(**m.vit),
        generation=generation(m.generation),
        lora=lora(config),
        dtype=m.dtype,
        remat=m.remat,
        unroll=m.unroll,
        attention=m.attention,
        query_block=m.query_block,
        rope_bfloat16=m.rope_bfloat16,
    )


def generation(g) -> GenerationConfig | None:
    """Sizes of what draws, from config.model.generation or the same read from JSON; None where it is off."""
    if not g["on"]:
        return None
    vae = VAEConfig(
        g["channels"],
        tuple(g["multipliers"]),
        g["num_res_blocks"],
        g["z_channels"],
        g["scale"],
        g["shift"],
    )
    return GenerationConfig(vae, g["patch"], g["side"], g["timestep_shift"])


def lora(config: ConfigDict) -> LoRAConfig | None:
    """The adapters of the understanding expert; None where they are off."""
    c = config.lora
    return LoRAConfig(c.rank, c.alpha, tuple(c.targets)) if c.rank else None


def prompts(config: ConfigDict) -> context.Prompts:
    """The fixed texts of the contexts."""
    return context.Prompts(**config.prompts)


def resize_rule(config: ConfigDict) -> images.Resize:
    """The size rule of all pictures."""
    return images.Resize(**{k: v for k, v in config.images.items() if k != "transparency"})


def rollout(config: ConfigDict, tokenizer, marker, **changes):
    """RolloutConfig of the training rollouts; `changes` for evaluation. The sampler reads and writes text: it needs
    no parameters of what draws."""
    scored = ("score_seam", "eos_after_cut", "empty_retries")
    values = {k: v for k, v in config.rollout.items() if k not in scored}
    text = dataclasses.replace(model(config), generation=None)
    return RolloutConfig(
        model=text, bos=tokenizer.bos, eos=tokenizer.eos, marker=marker, **(values | changes)
    )


def distill(config: ConfigDict, stage: str, tokenizer):
    """DistillConfig of one stage. Supervised stages have no teacher; that of `offline` is on disk."""
    s = config[stage]
    if stage == "opsd":
        own = dict(
            teacher=config.teacher.kind,
            ema_decay=config.teacher.ema_decay,
            jsd_weight=s.jsd_weight,
            ce_weight=s.ce_weight,
            max_forward_tokens=s.max_forward_tokens,
            score_seam=config.rollout.score_seam,
            eos_after_cut=config.rollout.eos_after_cut,
        )
    elif stage == "autoencoder":
        own = dict(teacher="self", trains="autoencoder", kl_weight=s.kl_weight)
    elif draws(config, stage):
        own = dict(teacher="self", trains="drawing", ce_weight=s.ce_weight, mse_weight=s.mse_weight)
    elif stage == "offline":
        own = dict(teacher="self", cached_weight=s.weight, cached_temperature=s.temperature)
    else:
        own = dict(teacher="self")
    if stage != "autoencoder":
        own |= dict(reduction=s.reduction, freeze=tuple(s.freeze))
    return DistillConfig(
        model=model(config),
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        divergence=DivergenceConfig(**config.divergence),
        optim=OptimConfig(total_steps=s.steps, **s.optim),
        accumulation=s.accumulation,
        **own,
    )
