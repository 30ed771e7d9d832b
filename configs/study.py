"""Studies of the miniature: groups, arms and seeds, from shared warm-ups, in one table.

  python -m opsd_jax.study --config=configs/study.py:content --workdir=S

  configs/study.py:content     is it what visual thoughts show, or that something is shown? The
                               teacher sees them (the reference), the problem image, another
                               example's, noise, or nothing (the default)
                  :traces      SFT with 100, 500, 2,000 and all text traces against OPSD
                  :length      how many tokens of a completion are sampled and count
                  :loss        the divergence: interpolation, clip, support, weights, contrast
                  :teacher     fixed, moving average, current weights, snapshots
                  :policy      the student's samples, text traces among them or alone, SFT, offline
                  :privileged  what the teacher sees beyond the student: visual thoughts, the
                               solution as a text, both, or the middle of the image, enlarged
                  :smoke       two seeds and an arm, a few steps, to see whether everything works

At 7B the same arms have another base: --config.base=configs/visual_opsd.py:v5p-8, and
--config.changes.KEY=VALUE for what that file leaves open. docs/guides/study.md explains the keys.
"""

import pathlib
import runpy

from opsd_jax.study import grid

_HERE = pathlib.Path(__file__).parent
MINI = str(_HERE / "mini.py")


def nested(**changes):
    """Changed settings: {"a": {"b": 1}} of a__b=1."""
    found = {}
    for key, value in changes.items():
        *groups, name = key.split("__")
        target = found
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    return found


def _content(c):
    for control in ("image", "swap", "noise", "none"):
        c.arms[control] = nested(teacher__visual_thoughts=control)


def _traces(c):
    """OPSD needs no text traces; with few examples it is compared with SFT on the same ones."""
    c.arms["sft-all"] = nested(stages=("sft",))
    for count in (100, 500, 2000):
        c.arms[f"sft-{count}"] = nested(stages=("sft",), data__limits=(count,))
        c.arms[f"opsd-{count}"] = nested(data__limits=(count,))


def _length(c):
    """Of charts, and of mazes, whose completions are longer."""
    c.groups = {"chart": {}, "maze": {}}
    c.base_of = {"maze": f"{MINI}:maze"}
    for limit in (4, 8):
        c.arms[f"limit-{limit}"] = nested(opsd__positions__limit=limit)
    for percent in (25, 50):
        c.arms[f"first-{percent}"] = nested(opsd__positions__first_fraction=percent / 100)
    c.arms["skip-4"] = nested(opsd__positions__skip=4)
    c.arms["power"] = nested(opsd__positions__power=-0.5)


def _loss(c):
    for percent in (0, 10, 90, 100):
        c.arms[f"beta-{percent}"] = nested(divergence__beta=percent / 100)
    c.arms["clip"] = nested(divergence__clip=0.05)
    for support in ("teacher", "student", "union"):
        c.arms[f"top8-{support}"] = nested(divergence__top_k=8, divergence__support=support)
    c.arms["sampled"] = nested(divergence__kind="sampled_reverse_kl")
    for weights in ("teacher_entropy", "advantage"):
        c.arms[weights] = nested(opsd__token_weights=weights)
    c.arms["contrast"] = nested(teacher__contrast=0.5)


def _teacher(c):
    """The base's teacher is fixed."""
    c.arms["ema"] = nested(teacher__kind="ema")
    c.arms["ema-fast"] = nested(teacher__kind="ema", teacher__ema_decay=0.98)
    c.arms["self"] = nested(teacher__kind="self")
    c.arms["snapshot"] = nested(teacher__kind="snapshot", teacher__snapshot_every=50)


def _policy(c):
    c.arms["samples-4"] = nested(opsd__completions=4)
    c.arms["mixed"] = nested(opsd__reference_share=0.5)
    c.arms["traces"] = nested(opsd__reference_share=1.0)
    c.arms["offline"] = nested(stages=("offline",))
    c.arms["sft"] = nested(stages=("sft",))


def _privileged(c):
    """Each has a warm-up of its own: contexts are compared through their controls."""
    contexts = str(_HERE / "contexts.py")
    names = [name for name in runpy.run_path(contexts)["CONTEXTS"] if name != "degraded"]
    c.groups = {name: {} for name in ("visual_thoughts", *names)}
    c.base_of = {name: f"{contexts}:{name}" for name in names}
    for control in ("swap", "noise", "none"):
        c.arms[control] = nested(teacher__visual_thoughts=control)


def _smoke(c):
    c.base, c.seeds = f"{MINI}:smoke", (0, 1)
    c.arms.noise = nested(teacher__visual_thoughts="noise")
    c.changes = nested(
        model__llm__hidden_size=32,
        model__llm__intermediate_size=48,
        model__unroll=1,
        data__make__train=64,
        data__make__validation=16,
        data__make__test=20,
        warmup__steps=4,
        warmup__batch_size=8,
        warmup__optim__kind="adamw",
        warmup__optim__warmup_steps=1,
        opsd__steps=6,
        opsd__batch_size=8,
        opsd__optim__kind="adamw",
        opsd__optim__warmup_steps=1,
        eval__batch_size=8,
        checkpoint__every=2,
        log__every=1,
    )


PRESETS = {
    "content": _content,
    "traces": _traces,
    "length": _length,
    "loss": _loss,
    "teacher": _teacher,
    "policy": _policy,
    "privileged": _privileged,
    "smoke": _smoke,
}


def get_config(preset: str = "content"):
    """The settings of a study; preset: see above."""
    if preset not in PRESETS:
        raise ValueError(f"configs/study.py:{preset}: choose from {', '.join(PRESETS)}")
    c = grid.default()
    c.base, c.seeds = MINI, (0, 1, 2)
    PRESETS[preset](c)
    return c
