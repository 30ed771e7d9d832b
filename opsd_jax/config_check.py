"""Checks of a configuration: its values (`check`), and the run that it continues.

`check` reads and makes nothing, so that a wrong setting ends a command before it has begun. It
checks each value by itself first (keys, types, ranges, choices), then each group of settings
together with what it depends on. `check_unchanged` and `check_digests` compare a run with its
continuation.
"""

import contextlib
import difflib
import importlib.util
import json
import os
import re
import shlex
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import images, params, tasks
from opsd_jax.inputs import checks, columns, paths
from opsd_jax.method_config import FlowConfig
from opsd_jax.runtime import run_folder

# Tokens of a completion that opsd.max_forward_tokens must leave after the largest teacher context.
LEAST_SCORED = 64

# Settings that may change between a run and its continuation. "log" covers "log" and "log.every".
# Accumulation is one: its gradient is that of the whole batch, so a run may go on with a mesh that
# needs another one. So are the places of data and tokenizer, whose content is compared
# (`check_digests`).
FREE_SETTINGS = (
    "log",
    "health",
    "eval",
    "checkpoint.keep_latest",
    "checkpoint.timeout",
    "checkpoint.accept_changed",
    "data.threads",
    "data.prefetch",
    "data.cache_rows",
    "data.dir",
    "tokenizer",
    "mesh",
    "rollout.tensor",
    *(f"{stage}.accumulation" for stage in config_lib.STAGES),
    "arms",
    "run_arms",
)


_NAME = re.compile(r"(?!True|False|None)[A-Za-z][\w.:@-]*")  # in a tuple on a command line
_MOST_SHOWN = 12  # settings that differ, in an error message


class ConfigMismatchError(ValueError):
    """A run would continue with other settings, data or another tokenizer than it started with."""


def check(config: ConfigDict) -> None:
    """Raises ValueError, with key, value and what is allowed, for settings that no run can have.

    These are keys that are unknown or missing, values of another type or out of their range, and
    values that contradict each other. Nothing is read or made.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config is a {type(config).__name__}: get_config() returns the ConfigDict of "
            "opsd_jax.config.default(), with changed values"
        )
    check_values(config)
    _check_sections(config)
    for name in config.run_arms:
        _check_run_arm(config, name)


def check_values(config: ConfigDict, *, partial: bool = False) -> None:
    """Raises ValueError for unknown keys, and for values that are wrong by themselves.

    partial: whether keys may be missing.
    """
    _check_group(config, config_lib.default(), "config", "", partial)
    for name, changes in config.get("arms", {}).items():
        check_arm(name, changes)


def check_arm(name: str, changes: object) -> None:
    """Raises ValueError for a wrong name of an arm, or for changes that no arm can make."""
    checks.folder_name(f"config.arms.{name}", name)  # its folder is <workdir>/arms/<name>
    if not isinstance(changes, ConfigDict):
        raise ValueError(
            f"config.arms.{name} is {changes!r}: give the settings that the arm changes, such "
            'as {"teacher": {"visual_thoughts": "noise"}}'
        )
    _check_group(changes, config_lib.default(), f"config.arms.{name}", "", partial=True)


def wrong_value(record: Mapping) -> str:
    """What is wrong with the first wrong key or value of settings as JSON; "" for nothing."""
    try:
        check_values(ConfigDict(record), partial=True)
    except ValueError as error:
        return str(error)
    return ""


def unknown(key: str) -> str:
    """The message about a key that is not a setting, with the most similar one that is.

    Keys of an arm are unknown, too, where the arm does not exist or does not change that setting.
    """
    parts, path = key.split("."), ["config"]
    if parts[0] == "arms":
        path, parts = [*path, *parts[:2]], parts[2:]
    whole, group = ".".join([*path, *parts]), config_lib.default()
    for part in parts:
        if part not in group:
            close = difflib.get_close_matches(part, group, 1) or _similar_elsewhere(part)
            hint = "All of them are in opsd_jax/config.py."
            if close:
                names = " or ".join(f'"{name}"' for name in close)
                hint = f"Did you mean {names}?"
            return f"there is no setting '{part}' in {'.'.join(path)}. {hint}"
        group, path = group[part], [*path, part]
        if not isinstance(group, ConfigDict):
            break
    if ".".join(path) == whole:
        return (
            f"the settings have no {whole}. Arms, and the settings that each of them changes, are "
            "added in a config file, or from Python by the changes of read_config"
        )
    return f"{'.'.join(path)} is not a group of settings"


def _similar_elsewhere(part: str) -> list[str]:
    """Keys, in any group, whose last part is the name that is most similar to `part`."""
    places: dict[str, dict[str, None]] = {}
    for key in config_lib.settings():
        parts = key.split(".")
        for n, name in enumerate(parts, 1):
            places.setdefault(name, {})[".".join(parts[:n])] = None
    return [key for name in difflib.get_close_matches(part, places, 1) for key in places[name]]


# --- each value by itself ------------------------------------------------------------------------


def _check_group(
    config: ConfigDict, known: ConfigDict, shown: str, prefix: str, partial: bool = False
) -> None:
    """Checks that a group has the known keys, and the value of each by itself.

    Args:
      known: the same group with its defaults.
      shown: name of the group in messages. prefix: its key with a dot; "" for the whole
        configuration.
      partial: whether keys may be missing.
    """
    for name in config:
        if name not in known:
            raise ValueError(f"{shown}.{name}: {unknown(prefix + name)}")
    if missing := [name for name in known if name not in config and not partial]:
        raise ValueError(
            f"{shown} lacks {', '.join(missing)}: change values of config.default() one by one, or "
            "with update(), instead of replacing a whole group"
        )
    for name, usual in known.items():
        if name not in config:
            continue
        value = config[name]
        if not isinstance(usual, ConfigDict):
            check_value(value, f"{shown}.{name}", prefix + name)
        elif not isinstance(value, ConfigDict):
            inside = ", ".join(usual) or 'NAME = {"group": {"setting": value}}'  # of arms
            raise ValueError(
                f"{shown}.{name} is {value!r}, but it is a group of settings: set one of "
                f"{inside} in it"
            )
        elif prefix + name != "arms":
            _check_group(value, usual, f"{shown}.{name}", f"{prefix}{name}.", partial)


def check_value(value, shown: str, key: str) -> None:
    """Checks one value by itself: type, range, choices. shown: name of the setting in messages."""
    setting = config_lib.settings()[key]
    usual, rule = setting.default, setting.rule
    if isinstance(usual, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{shown} is {value!r}: give True or False")
    elif isinstance(usual, str) and not isinstance(value, str):
        raise ValueError(f"{shown} is {value!r}: give a text")
    elif isinstance(usual, tuple) and not isinstance(value, (tuple, list)):
        text = isinstance(value, str)
        fix = tuple(value.split(",")) if text else f"such as {usual or '()'}"
        raise ValueError(f"{shown} is {value!r}: give a tuple, {fix}")
    elif key.startswith("data.buckets."):
        _check_buckets(value, shown, config_lib.BUCKET_SIZES[key.rpartition(".")[2]])
    elif rule:
        rule.check(shown, value)
    elif isinstance(usual, tuple):
        checks.names(shown, value)
        if key == "data.tasks":  # a task's folder has its name in lower case
            checks.once(shown, [element.lower() for element in value])


_OR_NO_PATCHES = " (patches: of at least 0)"


def _check_buckets(value, shown: str, counted: tuple[str, ...]) -> None:
    """Checks the shape and order of buckets. counted: what the numbers of each bucket count."""
    if not all(
        isinstance(sizes, (tuple, list))
        and len(sizes) == len(counted)
        and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= (name != "patches")
            for n, name in zip(sizes, counted)
        )
        for sizes in value
    ):
        example = tuple(2 ** (11 - n) for n in range(len(counted)))
        raise ValueError(
            f"{shown} is {value}: give a tuple that holds one ({', '.join(counted)}) for each "
            f"bucket, in whole numbers of at least 1{_OR_NO_PATCHES * ('patches' in counted)}, "
            f"such as ({example},)"
        )
    if any(any(a > b for a, b in zip(small, large)) for small, large in zip(value, value[1:])):
        raise ValueError(f"{shown} is {value}: sizes must not fall from one bucket to the next")


# --- groups of settings, each with what it depends on --------------------------------------------


def _check_sections(config: ConfigDict) -> None:
    """Checks what depends on several settings, or on this machine. Each value alone is valid."""
    _check_run(config)
    _check_data(config)
    _check_contexts(config)
    _check_buckets_together(config)
    _check_model(config)
    _check_mesh(config)
    _check_rollout(config)
    _check_prompts(config)
    for stage in config.stages:
        _check_stage(config, stage)
    _check_offline(config)
    _check_eval(config)
    _check_log(config)


def _check_run(config: ConfigDict) -> None:
    paths.check("config.init_from", config.init_from)
    paths.check("config.tokenizer", config.tokenizer)
    paths.check("config.data.dir", config.data.dir)
    if not config.stages:
        raise ValueError(
            f"config.stages is empty: name at least one of {', '.join(config_lib.STAGES)}"
        )


def _check_run_arm(config: ConfigDict, name: str) -> None:
    """Checks an arm that the run starts by itself."""
    if name not in config.arms:
        raise ValueError(
            f"config.run_arms names {name!r}, which is not one of the arms "
            + ", ".join(sorted(config.arms))
            + checks.did_you_mean(name, config.arms)
        )
    if "opsd" not in config.stages:
        raise ValueError(
            f"config.run_arms names {name!r}: an arm needs an opsd stage to start from, and "
            f"config.stages is {config.stages}"
        )
    if fault := _arm_fault(config, name):
        raise ValueError(f"config.arms.{name}: {fault}. {_other_arms(config, name)}")
    for c in (config, config_lib.arm(config, name)):
        if not c.eval.final_split or "none" not in c.eval.final_visual_thoughts:
            raise ValueError(
                "config.run_arms ends with a table of text-only accuracies: set "
                "config.eval.final_split, and 'none' in config.eval.final_visual_thoughts"
            )


def _arm_fault(config: ConfigDict, name: str) -> str:
    """What is wrong with the settings of an arm that exists; "" for nothing."""
    try:
        _check_sections(config_lib.arm(config, name))
    except ValueError as error:
        return str(error)
    return ""


def _other_arms(config: ConfigDict, name: str) -> str:
    """Which arms to start instead of a wrong one, for messages.

    Those of the run that are right. In the place of a control of what the teacher sees also noise
    and swap, which any privileged blocks have.
    """

    def seen(arm: str) -> str:
        return config.arms[arm].get("teacher", {}).get("visual_thoughts", "")

    controls = [arm for arm in config.arms if seen(name) and seen(arm) in ("noise", "swap")]
    wanted = dict.fromkeys((*config.run_arms, *controls))
    right = [arm for arm in wanted if arm in config.arms and not _arm_fault(config, arm)]
    others = f"give --config.run_arms={','.join(right)}, or " if right else "give "
    return f"Or leave the arm out: {others}--config.run_arms='()' for no arm"


def _check_data(config: ConfigDict) -> None:
    """Checks tasks, their shares, and the procedural data that the run makes."""
    data = config.data
    if not data.tasks:
        raise ValueError("config.data.tasks is empty: name at least one")
    for name in ("limits", "trace_limits", "weights"):
        if data[name] and len(data[name]) != len(data.tasks):
            raise ValueError(
                f"config.data.{name} needs one number for each of config.data.tasks, or (); it is "
                f"{data[name]} for {data.tasks}"
            )
    if data.weights and not any(data.weights):
        raise ValueError(
            f"config.data.weights is {data.weights}: give at least one task a share above 0"
        )
    if not data.make.families or data.dir:  # the data exist already
        return
    used = {
        "train": "config.stages",
        config.eval.split: "config.eval.every" if config.eval.every else "",
        config.eval.final_split: "config.eval.final_split",
    }
    for key in ("split", "final_split"):
        split = config.eval[key]
        # A split that is not an identifier is a slice, such as test[:64].
        if used.get(split) and split.isidentifier() and split not in tasks.SPLITS:
            raise ValueError(
                f"config.eval.{key} is {split!r}: procedural data have the splits "
                f"{', '.join(tasks.SPLITS)}"
            )
    for split in tasks.SPLITS:
        if used.get(split) and not data.make[split]:
            raise ValueError(
                f"config.data.make.{split} is 0, but {used[split]} needs that split: "
                "give at least 1"
            )


def _check_contexts(config: ConfigDict) -> None:
    """Checks the blocks of both contexts, and the control that replaces privileged ones."""
    columns.check("config.data.columns", config.data.columns)
    if config.data.columns and config.data.make.families and not config.data.dir:
        raise ValueError(
            f"config.data.columns is {config.data.columns}, which procedural data lack: of the "
            f"texts they have {', '.join(columns.OWN_TEXTS)}, which need no declaration. Set it to "
            "()"
        )
    known = (
        *blocks_lib.FIXED_TEXTS,
        *blocks_lib.CONTENTS,
        *(f"{blocks_lib.TRANSFORMED}{name}" for name in images.TRANSFORMS),
        *columns.OWN_TEXTS,
        *config.data.columns,
    )
    for role in ("student", "teacher"):
        shown, blocks = f"config.{role}.blocks", config[role].blocks
        for name in blocks:
            if name in known:
                continue
            if name.startswith((columns.TEXT, columns.IMAGES)):
                raise ValueError(
                    f"{shown} names {name}, which config.data.columns does not declare: prepare "
                    f"the data with --columns={name} and set config.data.columns=({name!r},)"
                )
            raise ValueError(
                f"{shown} names {name!r}: choose from {', '.join(known)}, or text:COLUMN and "
                f"images:COLUMN of config.data.columns{checks.did_you_mean(name, known)}"
            )
        if not {*blocks} - {*blocks_lib.FIXED_TEXTS}:
            raise ValueError(f"{shown} is {blocks}: name at least one block of the example")
    with _keys_named("transforms"):
        config_lib.transforms(config)
    check_control(config, "config.teacher.visual_thoughts", config.teacher.visual_thoughts)
    _check_screen(config)


NOT_PRIVILEGED = (
    "the student has all blocks of the teacher, so that it is taught nothing that it does not see: "
    "name more blocks in config.teacher.blocks"
)


def check_control(config: ConfigDict, shown: str, mode: str, nothing: str = "none") -> None:
    """Raises ValueError where a mode changes nothing, or does what another one says.

    Args:
      shown: the setting or flag that names the mode, for the message.
      mode: one of blocks.VISUAL_THOUGHTS.
      nothing: what the setting or flag calls the mode "none" of these.
    """
    names = config_lib.block_names(config)
    privileged = names.privileged
    if mode != "real" and not privileged:
        raise ValueError(
            f"{shown} is {mode!r}, but the student has all blocks of the teacher: nothing would be "
            "replaced. Set it to 'real', or name more blocks in config.teacher.blocks"
        )
    if mode == "image" and not blocks_lib.replaces_images(names):
        raise ValueError(
            f"{shown} is 'image', which puts the problem image in the place of other images, but "
            f"the teacher's privileged blocks are {', '.join(privileged)}: choose from 'noise', "
            f"'swap' and {nothing!r}"
        )


def _check_screen(config: ConfigDict) -> None:
    """Checks that screening has contexts to compare, and a stage that leaves examples out."""
    if not config.data.screen.on:
        return
    if not config_lib.block_names(config).privileged:
        raise ValueError(
            "config.data.screen.on compares the teacher's context with the student's, but the "
            "student has all blocks of the teacher: name more blocks in config.teacher.blocks, or "
            "set config.data.screen.on=False"
        )
    if not config_lib.screened_stages(config):
        raise ValueError(
            "config.data.screen.on leaves examples out of the stages opsd, sft and offline, and "
            f"config.stages is {config.stages}: set config.data.screen.on=False"
        )


def _check_buckets_together(config: ConfigDict) -> None:
    buckets = config.data.buckets
    counts = {len(buckets.student), len(buckets.teacher), len(buckets.trace)}
    if len(counts) != 1 or not buckets.student:
        raise ValueError(
            "config.data.buckets needs equally many entries for student, teacher and trace, at "
            "least one"
        )


def _check_model(config: ConfigDict) -> None:
    """Checks the network, the size rule of its images, and image generation."""
    with _keys_named():
        network = config_lib.model(config)
        config_lib.resize_rule(config)
    vit = config.model.vit
    if config.images.stride != vit.patch_size * vit.merge:
        merged = f" * config.model.vit.merge {vit.merge}" if vit.merge > 1 else ""
        raise ValueError(
            f"config.images.stride {config.images.stride} must equal config.model.vit.patch_size "
            f"{vit.patch_size}{merged}: images are cut into whole patches"
        )
    for kind in ("student", "teacher", "trace"):
        if any(sizes[1] % vit.merge**2 for sizes in config.data.buckets[kind]):
            raise ValueError(
                f"config.data.buckets.{kind} is {config.data.buckets[kind]}: make the second "
                f"number of each entry, patches, a multiple of {vit.merge**2}, since {vit.merge} x "
                f"{vit.merge} patches become one token"
            )
    if network.vit is None:
        _check_text_alone(config)
    if network.generation:
        FlowConfig(network, 0, 1, **config.drawing)


def _check_text_alone(config: ConfigDict) -> None:
    """Checks that a model without a vision tower is shown no image."""
    off = "config.model.vit.on is False, so the model reads text alone, but"
    for role in ("student", "teacher"):
        blocks = config[role].blocks
        if shown := [name for name in blocks if blocks_lib.holds_images(name)]:
            rest = tuple(name for name in blocks if name not in shown)
            raise ValueError(
                f"{off} config.{role}.blocks names {', '.join(shown)}, which are images: set it to "
                f"{rest}"
            )
    for kind in ("student", "teacher", "trace"):
        if any(sizes[1] for sizes in config.data.buckets[kind]):
            raise ValueError(
                f"{off} config.data.buckets.{kind} is {config.data.buckets[kind]}: set the second "
                "number of each entry, patches, to 0"
            )
    for stage in config.stages:
        if config[stage].get("mix", {}).get("interleaved", 0):
            raise ValueError(
                f"{off} config.{stage}.mix.interleaved is {config[stage].mix.interleaved}: set it "
                "to 0, since interleaved traces hold images"
            )


def _check_mesh(config: ConfigDict) -> None:
    if list(config.mesh.values()).count(-1) > 1:
        raise ValueError(
            f"config.mesh is {config.mesh.to_dict()}: only one size can be -1, whatever is left"
        )


# The token ids of a tokenizer that may not have been made yet.
_ENDS = types.SimpleNamespace(bos=0, eos=1, further_ends=())


def _check_rollout(config: ConfigDict) -> None:
    """Checks sampling, in training and in evaluation."""
    evaluated = {
        "max_new_tokens": config.eval.max_new_tokens or config.rollout.max_new_tokens,
        "slots": config.eval.slots,
        "refill": 0,
    }
    with _keys_named():
        config_lib.rollout(config, _ENDS, None)
        config_lib.rollout(config, _ENDS, None, **evaluated)


def _check_stage(config: ConfigDict, stage: str) -> None:
    """Checks a stage that will run."""
    s = config[stage]
    if s.batch_size % s.accumulation:
        raise ValueError(
            f"config.{stage}.batch_size {s.batch_size} is not divisible by "
            f"config.{stage}.accumulation {s.accumulation}"
        )
    _check_optimizer(config, stage)
    if "mix" in s and not any(s.mix.values()):
        raise ValueError(
            f"config.{stage}.mix is {s.mix.to_dict()}: give at least one layout a share above 0"
        )
    if "freeze" in s:
        _check_freeze(config, stage)
    if stage == "opsd":
        _check_opsd(config)
    if config_lib.trains_generation(config, stage):
        _check_image_generation(config, stage)
    with _keys_named(stage):
        config_lib.stage_config(config, stage, _ENDS)


def _check_optimizer(config: ConfigDict, stage: str) -> None:
    steps, optim = config[stage].steps, config[stage].optim
    if stage == "autoencoder" and optim.kind == "muon":
        raise ValueError(
            "config.autoencoder.optim.kind is 'muon', which moves no parameter of the autoencoder: "
            "use 'adamw'"
        )
    if optim.warmup_steps > steps:
        raise ValueError(
            f"config.{stage}.optim.warmup_steps is {optim.warmup_steps}, but the stage has {steps} "
            f"steps: give at most config.{stage}.steps"
        )
    if optim.schedule == "cosine" and optim.min_lr > optim.lr:
        raise ValueError(
            f"config.{stage}.optim.min_lr is {optim.min_lr}, above config.{stage}.optim.lr "
            f"{optim.lr}: the cosine falls to it, so give at most the peak rate"
        )


def _check_freeze(config: ConfigDict, stage: str) -> None:
    """Checks that a stage has parameters to train."""
    freeze = config[stage].freeze
    if config_lib.lora(config) and freeze:
        raise ValueError(
            f"config.{stage}.freeze is {freeze} with config.lora, which trains its adapters alone: "
            "leave freeze empty, or set config.lora.rank=0"
        )
    never = {"fixed", "vae", "lora"}
    if not config_lib.trains_generation(config, stage):
        never |= {*params.GENERATION_GROUPS}
    if not {*params.GROUPS} - never - {*freeze}:
        raise ValueError(f"config.{stage}.freeze is {freeze}: nothing is left to train")


def _check_opsd(config: ConfigDict) -> None:
    """Checks the weights of the loss, and that completions fit after the teacher's context."""
    s = config.opsd
    if not s.jsd_weight and not s.ce_weight:
        raise ValueError(
            "config.opsd.jsd_weight and config.opsd.ce_weight are both 0: nothing would be learned"
        )
    _check_objective(config)
    largest = config.data.buckets.teacher[-1][0]
    least = min(LEAST_SCORED, config.rollout.max_new_tokens)
    if s.max_forward_tokens < largest + 2 + least:
        raise ValueError(
            f"config.opsd.max_forward_tokens is {s.max_forward_tokens}: with a teacher's context "
            f"of {largest} positions, the largest of config.data.buckets.teacher, a completion "
            f"would be cut to {max(s.max_forward_tokens - largest - 2, 1)} tokens. Give at least "
            f"{largest + 2 + least} ({least} tokens to score), or "
            f"{largest + 2 + config.rollout.max_new_tokens} so that none is cut, or make that "
            "bucket smaller"
        )


def _check_objective(config: ConfigDict) -> None:
    """Checks what the loss of OPSD compares, and which completions it has."""
    s, seen = config.opsd, config.teacher.visual_thoughts
    for key, used in (
        ("teacher.contrast", config.teacher.contrast > 0),
        ("opsd.token_weights", s.token_weights == "advantage"),
    ):
        if used and not config_lib.block_names(config).privileged:
            raise ValueError(
                f"config.{key} compares the teacher with itself without its privileged blocks, but "
                "the student has all of them: name more blocks in config.teacher.blocks, or leave "
                f"config.{key} as it is by default"
            )
    if config_lib.contrasts_swapped(config) and seen in ("swap", "image"):
        raise ValueError(
            f"config.teacher.contrast_with is 'swap' with config.teacher.visual_thoughts {seen!r}: "
            "contrast 'real', 'noise' or 'none' with it, or set "
            "config.teacher.contrast_with='none'"
        )
    if s.batch_size % s.completions:
        raise ValueError(
            f"config.opsd.batch_size {s.batch_size} is not divisible by config.opsd.completions "
            f"{s.completions}: a batch holds all completions of its questions"
        )
    if s.reference_share and config.data.trace_limits:
        raise ValueError(
            f"config.opsd.reference_share is {s.reference_share} with config.data.trace_limits "
            f"{config.data.trace_limits}: a batch of OPSD has all examples, and some of them must "
            "not show their trace. Set one of them back"
        )
    if s.completions > 1 and config.rollout.greedy:
        raise ValueError(
            f"config.opsd.completions is {s.completions} with config.rollout.greedy, which gives a "
            "question the same completion each time: set one of them back"
        )
    if config.teacher.kind == "snapshot" and config.teacher.snapshot_every >= s.steps:
        raise ValueError(
            f"config.teacher.snapshot_every is {config.teacher.snapshot_every}, but the stage has "
            f"{s.steps} steps, so that the teacher would stay as it starts: give less than "
            "config.opsd.steps, or set config.teacher.kind='fixed'"
        )
    budget = config_lib.training_budget(config)
    if s.positions.skip >= budget:
        raise ValueError(
            f"config.opsd.positions.skip is {s.positions.skip}, but a completion has at most "
            f"{budget} positions: skip fewer, or raise config.rollout.max_new_tokens"
        )


def _check_image_generation(config: ConfigDict, stage: str) -> None:
    """Checks a stage that trains image generation."""
    what = "stages" if stage == "autoencoder" else "warmup.mix.drawn"
    buckets = config.data.buckets
    if not config.model.generation.on:
        raise ValueError(
            f"config.{what} trains image generation, which this model lacks: set "
            "config.model.generation.on=True"
        )
    if len(buckets.drawn) != len(buckets.trace):
        raise ValueError(
            f"config.{what} needs config.data.buckets.drawn, one (latent tokens, images, height, "
            "width) for each entry of config.data.buckets.trace"
        )
    stride = config_lib.model(config).generation.stride
    if any(side % stride for sizes in buckets.drawn for side in sizes[2:]):
        raise ValueError(
            f"config.data.buckets.drawn is {buckets.drawn}: heights and widths must be multiples "
            f"of the {stride} pixels of a latent token"
        )
    shown = [*filter(blocks_lib.holds_images, config.student.blocks)]
    if shown != ["image"]:
        raise ValueError(
            f"config.{what} trains image generation, which asks with the problem image alone, but "
            f"the images of config.student.blocks are {shown}: leave that stage out, or give "
            "config.student.blocks the block image and no other images"
        )
    if config_lib.lora(config):
        raise ValueError(
            f"config.{what} trains image generation, but with config.lora only adapters are "
            "trained: set config.lora.rank=0"
        )


def _check_prompts(config: ConfigDict) -> None:
    """Checks that nothing in chat form needs BAGEL's image marker."""
    if config.prompts.form == "bagel":
        if config.prompts.thinking:
            raise ValueError(
                "config.prompts.thinking is True, but config.prompts.form is 'bagel', which has no "
                "thinking mode: set form to 'chat', or thinking to False"
            )
        return
    chat = "config.prompts.form is 'chat', in which models have no marker that asks for images, but"
    if config.rollout.max_image_skips:
        raise ValueError(
            f"{chat} config.rollout.max_image_skips is {config.rollout.max_image_skips}: set it "
            "to 0"
        )
    if config.eval.final_banned:
        raise ValueError(f"{chat} config.eval.final_banned is True: set it to False")
    if config.model.generation.on:
        raise ValueError(
            f"{chat} config.model.generation.on is True: set it to False, or "
            "config.prompts.form='bagel'"
        )
    for stage in config.stages:
        if count := config[stage].get("mix", {}).get("interleaved", 0):
            raise ValueError(
                f"{chat} config.{stage}.mix.interleaved is {count}: set it to 0, since interleaved "
                "traces ask for images with the marker"
            )


def _check_offline(config: ConfigDict) -> None:
    if "offline" in config.stages and config.teacher.visual_thoughts != "real":
        raise ValueError(
            f"config.teacher.visual_thoughts is {config.teacher.visual_thoughts!r}, but the cached "
            "teacher of the offline stage reads the true ones: set it to 'real', or leave the "
            "stage out"
        )


def _check_eval(config: ConfigDict) -> None:
    for modes, asked, off in (
        ("visual_thoughts", config.eval.every, "every=0"),
        ("final_visual_thoughts", config.eval.final_split, "final_split=''"),
    ):
        if asked and not config.eval[modes]:
            raise ValueError(
                f"config.eval.{modes} is empty, so that evaluation has nothing to do: name some of "
                f"{config_lib.MODES}, or set config.eval.{off}"
            )
        if asked and "image" in config.eval[modes]:
            check_control(config, f"an entry of config.eval.{modes}", "image", "remove")


def _check_log(config: ConfigDict) -> None:
    if steps := config.log.profile_steps:
        shown = f"config.log.profile_steps is {steps}"
        last = max(config_lib.stage_ends(config).values())
        if len(steps) != 2 or steps[0] > steps[1]:
            raise ValueError(
                f"{shown}: give the first and the last step to trace, such as (10, 13), or () for "
                "none"
            )
        if steps[1] > last:
            raise ValueError(
                f"{shown}, but the run has {last} steps: give steps up to {last}, or () for none"
            )
    if config.log.wandb and not ("wandb" in sys.modules or importlib.util.find_spec("wandb")):
        raise ValueError(
            f"config.log.wandb is {config.log.wandb!r}, but wandb is not installed: pip install -e "
            "\".[wandb]\", or set config.log.wandb=''"
        )


@contextlib.contextmanager
def _keys_named(stage: str = "") -> Iterator[None]:
    """Makes errors of dataclasses name the whole key of a setting.

    The errors begin with the name of a field. stage: the stage that the field may belong to.
    """
    try:
        yield
    except ValueError as error:
        name, known = str(error).split(maxsplit=1)[0], config_lib.settings()
        key = next((key for key in (f"{stage}.{name}", name) if key in known), None)
        message = str(error).replace(name, f"config.{key}", 1) if key else str(error)
        raise ValueError(message) from None


# --- a run and its continuation ------------------------------------------------------------------


def _tuples(value: Any) -> Any:
    """A setting as a flag takes it: JSON has lists in the place of tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _as_typed(value: Any) -> Any:
    """A value in JSON as an option takes it: names separated by commas, or as Python writes it."""
    names = value if isinstance(value, list) else []
    if names and all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        return ",".join(names)
    return _tuples(value)


def check_unchanged(
    saved: Mapping,
    current: Mapping,
    *,
    free: Iterable[str] = FREE_SETTINGS,
    defaults: Mapping | None = None,
    workdir: str = "",
) -> None:
    """Raises ConfigMismatchError, with the differences, unless two configurations are the same.

    Weights to start from are the same ones if both paths lead to one place or, of a control arm, to
    the same checkpoint of its run, wherever that is now.

    Args:
      saved, current: settings, compared as `config.to_json` writes them.
      free: keys that may change; "log" covers "log" and "log.every", not "logger".
      defaults: values of settings before they existed, taken for keys that `saved` lacks; None for
        `config.default()`.
      workdir: folder of the run or control arm that has the settings; "" for none.
    """
    free = tuple(free)
    before = config_lib.default() if defaults is None else defaults
    was, now, usual = (_flat(config_lib.to_json(c)) for c in (saved, current, before))
    was |= {key: usual[key] for key in now.keys() - was.keys() if key in usual}
    keys = [
        key
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
        and not any(key == name or key.startswith(name + ".") for name in free)
        and not (key == "init_from" and _same_start(was.get(key), now.get(key), workdir))
    ]
    if not keys:
        return
    rows = [("key", "saved", "now")]
    rows += [(key, was.get(key, "absent"), now.get(key, "absent")) for key in keys[:_MOST_SHOWN]]
    more = max(len(keys) - _MOST_SHOWN, 0)
    preset = f"  and {more} more: probably another preset of the settings file\n" * (more > 0)
    flags = [
        shlex.quote(f"--config.{key}={_as_typed(json.loads(was[key]))}")
        for key in keys
        if key in was and not more
    ]
    example = f", which are {' '.join(flags)}" if flags else ""
    may = f" May change on resume: {', '.join(free)}." if free else ""
    raise ConfigMismatchError(
        f"this run was started with other settings:\n{checks.table(rows)}\n{preset}Continue it "
        f"with the same settings file, preset and settings as before{example}, or start a new run "
        f"with another --workdir.{may}"
    )


def _same_start(was: str | None, now: str | None, workdir: str) -> bool:
    """Whether two values of init_from, as JSON, are the same weights, see `check_unchanged`."""
    before, after = (json.loads(value or '""') for value in (was, now))
    if not (before and after):
        return False
    before, after = os.path.realpath(before), os.path.realpath(after)
    run = run_folder.run_of(workdir) if workdir else ""
    checkpoints = os.path.realpath(run_folder.checkpoints(run)) if run else ""
    is_moved = os.path.split(after) == (checkpoints, os.path.basename(before))
    return before == after or is_moved


def _flat(value, key: str = "") -> dict[str, str]:
    """{"group.key": value as JSON} of nested dicts."""
    if isinstance(value, dict) and value:
        items = (_flat(item, f"{key}.{name}").items() for name, item in value.items())
        return dict(pair for pairs in items for pair in pairs)
    return {key[1:]: json.dumps(value)}


def check_digests(
    saved: Mapping, current: Mapping, *, accepted: Iterable[str] = (), whose: str = "this run"
) -> None:
    """Raises ConfigMismatchError, with the differences, unless data and tokenizer are the same.

    Args:
      saved, current: {"data": {task: digest}, "tokenizer": digest}, in chat form with a
        "chat_template". What `saved` lacks is accepted, with a warning: it was written before there
        were digests.
      accepted: which of these may differ (config.checkpoint.accept_changed).
      whose: the owner of the data and tokenizer in `saved`, for messages.
    """
    rows, kinds = [("what", "was", "now")], []
    for kind, now in current.items():
        was = saved.get(kind)
        if was is None:
            logging.warning(
                "%s has no digest of its %s: whether that is the same one cannot be told",
                whose,
                kind,
            )
        elif was != now and kind not in accepted:
            kinds.append(kind)
            if isinstance(now, str):
                rows.append((kind, was, now))
            else:
                names = sorted(was.keys() | now.keys())
                pairs = [(n, was.get(n, "absent"), now.get(n, "absent")) for n in names]
                rows += [(f"{kind}.{name}", a, b) for name, a, b in pairs if a != b]
    if kinds:
        names = " and ".join(kinds)
        raise ConfigMismatchError(
            f"{whose} was trained with another content of {names} (digests):\n"
            f"{checks.table(rows)}\n"
            f"Restore the {names} as before, or start a new run with another --workdir. To "
            "continue with the present content, knowing that it differs: "
            f'--config.checkpoint.accept_changed="{tuple(kinds)}"'
        )
