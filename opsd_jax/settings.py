"""Every setting of a run with its default, and what the settings become.

`default()` is the whole configuration: the files in configs/ change values in it and add no keys. The functions
below turn it into the frozen, hashable views that jitted functions take as static arguments; a ConfigDict never
enters jit. Defaults are the paper's (App. C) and the official release's; where the two disagree, the paper's.
"""

import dataclasses

from ml_collections import ConfigDict

from opsd_jax import context, images, metrics, paths
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.model.config import (
    GenerationConfig, LLMConfig, LoRAConfig, ModelConfig, VAEConfig, ViTConfig)
from opsd_jax.params import LORA_TARGETS

STAGES = ("autoencoder", "warmup", "opsd", "sft", "offline")
MODES = (*context.VISUAL_THOUGHTS, "remove")  # what evaluation may show: the last, the teacher's texts alone
LEAST_SCORED = 64  # tokens of a completion that opsd.max_forward_tokens must leave beside any teacher's context
LAYOUTS = ("interleaved", "reference", "text", "drawn")


def default() -> ConfigDict:
    """The paper's run: Visual-OPSD of ThinkMorph-7B, 1,000 steps."""
    c = ConfigDict()
    c.seed = 0
    c.stages = ("opsd",)  # stages of the run in order, from STAGES; each starts with a fresh optimizer
    c.init_from = ""  # where parameters come from: a checkpoint, workdir or released folder; "": random

    c.model = ConfigDict()
    c.model.llm = ConfigDict(dict(
        vocab_size=152064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, intermediate_size=18944,
        rope_theta=1e6, rms_norm_eps=1e-6, head_dim=0))  # head_dim 0: hidden_size / num_heads
    c.model.vit = ConfigDict(dict(
        hidden_size=1152, num_layers=26, num_heads=16, intermediate_size=4304, patch_size=14, side=70,
        layer_norm_eps=1e-6))  # side: patches a side of the position tables
    c.model.generation = ConfigDict(dict(  # what draws; without `on` it is not in the model
        on=False, channels=128, multipliers=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, scale=0.3611, shift=0.1159,
        patch=2, side=64, timestep_shift=1.0))
    c.model.dtype = "bfloat16"  # compute dtype; parameters are float32
    c.model.remat = "full"  # "none" keeps activations, "full" recomputes each layer in the backward pass
    c.model.unroll = 1  # layers of the scan that are unrolled
    c.model.attention = "dense"  # or "flash" (TPU), "cudnn" (GPU): kernels without scores in memory
    c.model.rope_bfloat16 = False  # True: rotary frequencies in bfloat16, as the official trainer has them under FSDP
    c.model.query_block = 512  # dense attention: queries at a time; 0: all at once

    c.lora = ConfigDict(dict(rank=0, alpha=16.0, targets=LORA_TARGETS))  # rank 0: off; else only adapters are trained

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
    c.data.make = ConfigDict(dict(  # procedural data, made if data.dir is empty; families () makes nothing
        families=(), train=0, validation=0, test=0, difficulty="default", seed=0))
    c.data.buckets = ConfigDict(dict(  # static sizes, ascending; a row goes to the first bucket that it fits whole
        student=((2048, 1500), (5376, 4900)),  # (slots, patches)
        teacher=((4096, 3000), (10112, 9800)),  # opsd.max_forward_tokens less 126 tokens to score
        trace=((3072, 1500, 1024), (10240, 9800, 2048)),  # (slots, patches, targets) of warm-up and SFT
        drawn=()))  # (latent tokens, pictures of a row, their height, width) where a stage draws
    c.data.on_too_long = "fail"  # or "skip": rows beyond the largest bucket are named in <workdir>/too_long.json
    c.data.threads = 4  # that decode and pack batches ahead of the step
    c.data.prefetch = 4  # batches held ready
    c.data.cache_rows = 0  # rows kept decoded and tokenised in memory

    c.teacher = ConfigDict()
    c.teacher.kind = "ema"  # "ema", "self" (the live weights) or "fixed" (the weights at the stage's start)
    c.teacher.ema_decay = 0.995
    c.teacher.visual_thoughts = "real"  # what stands in the teacher's VT slots: real | noise | swap | image | none

    c.divergence = ConfigDict(dict(  # see divergence.DivergenceConfig
        kind="jsd", beta=0.5, temperature=1.0, top_k=256, tail=False, clip=0.05, clip_unit="entry", chunk=192))

    c.rollout = ConfigDict()
    c.rollout.max_new_tokens = 1024  # budget of fed tokens, all rounds and delimiters
    c.rollout.temperature = 1.0
    c.rollout.greedy = False
    c.rollout.top_k = 0  # 0: off
    c.rollout.top_p = 1.0  # 1: off
    c.rollout.max_image_skips = 1
    c.rollout.ban_marker = False  # never sample a token that completes <image_start>
    c.rollout.slots = 0  # rows sampled at a time, the others of the batch wait in a queue; 0: all at once
    c.rollout.refill = 0  # slots that must be free before waiting rows take them; 0: a quarter
    c.rollout.score_seam = False  # True: score the delimiters between rounds as they were sampled
    c.rollout.eos_after_cut = True  # False: no eos target behind a completion that did not end by itself
    c.rollout.empty_retries = 3  # new rows for a batch that holds an empty completion; then it becomes one eos

    c.autoencoder = _stage(steps=2000, batch_size=16, lr=1e-4, reduction="token")
    del c.autoencoder.reduction, c.autoencoder.freeze  # it has neither tokens nor other groups than its own
    c.autoencoder.kl_weight = 1e-4
    c.warmup = _stage(steps=3000, batch_size=16, lr=1e-5, reduction="token")
    c.warmup.mix = ConfigDict(dict(interleaved=2, reference=1, text=1, drawn=0))  # rows of a batch by layout, as ratios
    c.warmup.ce_weight = 1.0  # where the mix has drawn rows: of the cross entropy
    c.warmup.mse_weight = 1.0  # and of the squared error of the velocities
    c.opsd = _stage(steps=1000, batch_size=16, lr=1e-5, reduction="completion")
    c.opsd.accumulation = 2
    c.opsd.jsd_weight = 1.0
    c.opsd.ce_weight = 0.0
    c.opsd.max_forward_tokens = 10240  # completions are cut so that the teacher's sequence fits, see `cut_rate`
    c.sft = _stage(steps=2000, batch_size=16, lr=1e-5, reduction="token")
    c.sft.mix = ConfigDict(dict(interleaved=0, reference=0, text=1))
    c.offline = _stage(steps=8000, batch_size=16, lr=1e-5, reduction="token")  # a cached teacher, see offline.py
    c.offline.top_k = 256  # the teacher's entries that are kept; the whole vocabulary where that is smaller
    c.offline.temperature = 2.0
    c.offline.weight = 0.5  # of the KL beside the cross entropy

    c.drawing = ConfigDict(dict(  # how a run's model draws, see flow.FlowConfig
        num_timesteps=50, timestep_shift=3.0, text_scale=3.0, image_scale=1.5))

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations on `split` while training; 0: none
    c.eval.split = "validation"
    c.eval.rows = 128  # random subset of each task, the same every time, in those evaluations; 0: all
    c.eval.visual_thoughts = ("none",)  # modes evaluated then
    c.eval.final_split = "test"  # evaluated whole when a stage ends; "": not at all
    c.eval.final_visual_thoughts = ("none", "real")
    c.eval.final_banned = False  # also without pictures and with the marker banned
    c.eval.kl = True  # also KL(start with VT || now without) on reference traces, after opsd, sft, offline
    c.eval.batch_size = 64
    c.eval.slots = 0  # as rollout.slots, of an evaluation batch
    c.eval.max_new_tokens = 0  # 0: as rollout.max_new_tokens

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps; the last step of each stage is always saved and kept
    c.checkpoint.keep_latest = 2
    c.checkpoint.params = "student"  # the item for inference: "student" (what was evaluated officially) or "ema"

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of metrics.jsonl
    c.log.samples_every = 50  # steps between rollouts written to samples/; 0: only the first batch
    c.log.tensorboard = True
    c.log.wandb = ""  # project name; "" for none

    c.health = ConfigDict(dataclasses.asdict(metrics.Health()))  # when to stop a run early; 0 switches a watch off
    del c.health.finite  # no setting: always watched

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))  # -1: whatever is left
    c.arms = ConfigDict()  # name -> changed settings: controls that start where this run's OPSD stage started
    c.run_arms = ()  # names of the arms that the run starts by itself; any can be run with --arm=NAME
    return c


def _stage(*, steps, batch_size, lr, reduction):
    c = ConfigDict(dict(steps=steps, batch_size=batch_size, accumulation=1, reduction=reduction, freeze=()))
    c.optim = ConfigDict(dict(
        lr=lr, min_lr=1e-7, warmup_steps=200, schedule="cosine", b1=0.9, b2=0.95, eps=1e-15, weight_decay=0.0,
        max_grad_norm=1.0))
    return c


def check(config: ConfigDict) -> None:
    """Raises ValueError for what no single frozen view can see. Cheap: called before anything is read or made."""
    paths.check("config.init_from", config.init_from)
    paths.check("config.tokenizer", config.tokenizer)
    paths.check("config.data.dir", config.data.dir)
    least = {"checkpoint.every": 1, "checkpoint.keep_latest": 1, "log.every": 1, "log.samples_every": 0, "eval.every": 0,
             "eval.rows": 0, "eval.batch_size": 1, "eval.slots": 0, "data.threads": 1, "data.prefetch": 0, "data.cache_rows": 0,
             "rollout.empty_retries": 0, "health.patience": 1, "health.reference_checks": 1,
             **{f"{stage}.{key}": bound for stage in config.stages if stage in STAGES
                for key, bound in (("steps", 1), ("batch_size", 1), ("accumulation", 1))}}
    for key, bound in least.items():
        group, name = key.split(".")
        if config[group][name] < bound:
            raise ValueError(f"config.{key} is {config[group][name]}: give at least {bound}")
    if config.eval.max_new_tokens and config.eval.max_new_tokens < 2:
        raise ValueError(f"config.eval.max_new_tokens is {config.eval.max_new_tokens}: bos and one token need 2; 0 takes "
                         "config.rollout.max_new_tokens")
    for key in ("visual_thoughts", "final_visual_thoughts"):
        if wrong := [mode for mode in config.eval[key] if mode not in MODES]:
            raise ValueError(f"config.eval.{key} names {wrong[0]!r}: choose from {MODES}")
    if not config.data.tasks:
        raise ValueError("config.data.tasks is empty: name at least one")
    for kind, sizes in config.data.buckets.items():
        if any(any(a > b for a, b in zip(small, large)) for small, large in zip(sizes, sizes[1:])):
            raise ValueError(f"config.data.buckets.{kind} is {sizes}: sizes must not fall from one bucket to the next")
    if not config.stages:
        raise ValueError(f"config.stages is empty: name at least one of {STAGES}")
    for stage in config.stages:
        if stage not in STAGES:
            raise ValueError(f"config.stages names {stage!r}: choose from {STAGES}")
        if config[stage].batch_size % config[stage].accumulation:
            raise ValueError(f"config.{stage}.batch_size {config[stage].batch_size} is not divisible by "
                             f"config.{stage}.accumulation {config[stage].accumulation}")
        if draws(config, stage):
            what = "stages" if stage == "autoencoder" else "warmup.mix.drawn"
            if not config.model.generation.on:
                raise ValueError(f"config.{what} trains what draws, which this model lacks: set "
                                 "config.model.generation.on=True")
            if len(config.data.buckets.drawn) != len(config.data.buckets.trace):
                raise ValueError(f"config.{what} needs config.data.buckets.drawn, one (latents, pictures, height, width) "
                                 "for each entry of config.data.buckets.trace")
            stride = model(config).generation.stride
            if any(side % stride for sizes in config.data.buckets.drawn for side in sizes[2:]):
                raise ValueError(f"config.data.buckets.drawn is {config.data.buckets.drawn}: heights and widths must be "
                                 f"multiples of the {stride} pixels of a latent token")
            if lora(config):
                raise ValueError(f"config.{what} trains what draws, config.lora its adapters alone: set config.lora.rank=0")
        if lora(config) and config[stage].get("freeze"):
            raise ValueError(f"config.{stage}.freeze is {config[stage].freeze} with config.lora, which trains its "
                             "adapters alone: leave freeze empty, or set config.lora.rank=0")
    for name in config.run_arms:
        if name not in config.arms or "opsd" not in config.stages:
            raise ValueError(f"config.run_arms names {name!r}: arms are {sorted(config.arms)}, and they need an opsd stage "
                             "to start from")
        if not config.eval.final_split or "none" not in config.eval.final_visual_thoughts:
            raise ValueError("config.run_arms ends with a table of text-only accuracies: set config.eval.final_split, and "
                             "'none' in config.eval.final_visual_thoughts")
    if "offline" in config.stages:
        if config.offline.top_k < 1 or config.offline.temperature <= 0 or config.offline.weight < 0:
            raise ValueError("config.offline needs top_k >= 1, temperature > 0 and weight >= 0")
        if config.teacher.visual_thoughts != "real":
            raise ValueError(f"config.teacher.visual_thoughts is {config.teacher.visual_thoughts!r}, but the cached "
                             "teacher of the offline stage reads the true ones: set it to 'real', or leave the stage out")
    buckets = config.data.buckets
    if len({len(buckets.student), len(buckets.teacher), len(buckets.trace)}) != 1 or not buckets.student:
        raise ValueError("config.data.buckets needs equally many entries for student, teacher and trace, at least one")
    if "opsd" in config.stages:
        largest, least = buckets.teacher[-1][0], min(LEAST_SCORED, config.rollout.max_new_tokens)
        if config.opsd.max_forward_tokens < largest + 2 + least:
            raise ValueError(
                f"config.opsd.max_forward_tokens is {config.opsd.max_forward_tokens}: with a teacher's context of {largest} "
                f"positions, the largest of config.data.buckets.teacher, a completion would be cut to "
                f"{max(config.opsd.max_forward_tokens - largest - 2, 1)} tokens. Give at least {largest + 2 + least} "
                f"({least} tokens to score), or {largest + 2 + config.rollout.max_new_tokens} so that none is cut, or make that "
                "bucket smaller")
    if config.teacher.visual_thoughts not in context.VISUAL_THOUGHTS:
        raise ValueError(f"config.teacher.visual_thoughts is {config.teacher.visual_thoughts!r}: "
                         f"choose from {context.VISUAL_THOUGHTS}")
    if config.images.stride != config.model.vit.patch_size:
        raise ValueError(f"config.images.stride {config.images.stride} must equal config.model.vit.patch_size "
                         f"{config.model.vit.patch_size}: images are cut into whole patches")
    if config.checkpoint.params not in ("student", "ema"):
        raise ValueError(f"config.checkpoint.params is {config.checkpoint.params!r}: use 'student' or 'ema'")
    if config.data.limits and len(config.data.limits) != len(config.data.tasks):
        raise ValueError("config.data.limits needs one number for each of config.data.tasks, or ()")
    if config.data.on_too_long not in ("fail", "skip"):
        raise ValueError(f"config.data.on_too_long is {config.data.on_too_long!r}: use 'fail' or 'skip'")


def draws(config, stage: str) -> bool:
    """Whether a stage trains what draws, and so wants pictures as the autoencoder sees them."""
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
    return ModelConfig(llm=LLMConfig(**m.llm), vit=ViTConfig(**m.vit), generation=generation(m.generation), lora=lora(config),
                       dtype=m.dtype, remat=m.remat, unroll=m.unroll, attention=m.attention, query_block=m.query_block,
                       rope_bfloat16=m.rope_bfloat16)


def generation(g) -> GenerationConfig | None:
    """Sizes of what draws, from config.model.generation or the same read from JSON; None where it is off."""
    if not g["on"]:
        return None
    vae = VAEConfig(g["channels"], tuple(g["multipliers"]), g["num_res_blocks"], g["z_channels"], g["scale"], g["shift"])
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
    from opsd_jax.rollout import RolloutConfig

    scored = ("score_seam", "eos_after_cut", "empty_retries")
    values = {k: v for k, v in config.rollout.items() if k not in scored}
    text = dataclasses.replace(model(config), generation=None)
    return RolloutConfig(model=text, bos=tokenizer.bos, eos=tokenizer.eos, marker=marker, **(values | changes))


def distill(config: ConfigDict, stage: str, tokenizer):
    """DistillConfig of one stage. Supervised stages have no teacher; that of `offline` is on disk."""
    from opsd_jax.distill import DistillConfig, OptimConfig

    s = config[stage]
    if stage == "opsd":
        own = dict(teacher=config.teacher.kind, ema_decay=config.teacher.ema_decay, jsd_weight=s.jsd_weight,
                   ce_weight=s.ce_weight, max_forward_tokens=s.max_forward_tokens,
                   score_seam=config.rollout.score_seam, eos_after_cut=config.rollout.eos_after_cut)
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
        model=model(config), bos=tokenizer.bos, eos=tokenizer.eos, divergence=DivergenceConfig(**config.divergence),
        optim=OptimConfig(total_steps=s.steps, **s.optim), accumulation=s.accumulation, **own)
