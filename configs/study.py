"""Questions about the method, in miniature: groups, arms and seeds from shared warm-ups.

  python -m opsd_jax.study --config=configs/study.py:content --workdir=S

  configs/study.py:content     is it what visual thoughts show, or that something is shown? The
                               teacher sees them (the reference), the problem image, another
                               example's, noise, or nothing (the default)
                  :traces      few text traces for warm-up and SFT; OPSD has the visual thoughts of
                               all examples
                  :wrong       the same where a third of the traces is wrong
                  :length      only the first 30 or 60 % of a completion count
                  :loss        the divergence: interpolation, clip, support, weights, contrast
                  :teacher     fixed, moving average, current weights, snapshots
                  :policy      the student's samples, text traces among them, offline, SFT
                  :privileged  what the teacher sees beyond the student: visual thoughts, the
                               solution as a text, or both
                  :transfer    a warm-up on charts and mazes, then OPSD on one of them
                  :all         all of these
                  :smoke       two seeds and an arm, a few steps, to see whether everything works
                  :content,loss,charts  several questions; only the groups that are named. `charts`
                               and `mazes` name all groups of that task

All of them may have the same --workdir, one after the other or all at once: a warm-up and an arm
that several questions need are trained once. The last command writes the table of its questions.

At 7B the arms of the charts have another base: --config=configs/study.py:content,own with
--config.base=configs/visual_opsd.py:v5p-8, and --config.changes.KEY=VALUE for what that file leaves
open. docs/guides/study.md explains the keys.
"""

import pathlib

from opsd_jax.inputs import checks
from opsd_jax.study import grid

_HERE = pathlib.Path(__file__).parent
MINI, CONTEXTS = str(_HERE / "mini.py"), str(_HERE / "contexts.py")
OWN = "own"  # the group whose base is the study's


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


# A run that goes wrong is a result here, not a reason to stop.
_UNWATCHED = dict(
    health__min_length_fraction=0.0,
    health__min_eos_rate=0.0,
    health__teacher_floor=0.0,
    health__teacher_entropy_rise=0.0,
    health__max_unfinished=0.0,
)
# Fewer steps than the presets of mini.py have: there, OPSD ends so close to its teacher that
# variants of it could not be told apart. And a study has many runs.
_SHORT = dict(opsd__steps=100, sft__steps=100, offline__steps=100, eval__every=50)
_CHART = dict(warmup__steps=200, **_SHORT)
_MAZE = dict(  # with the optimizer and the batches of the charts
    warmup__steps=400,
    warmup__optim__kind="muon",
    **_SHORT,
    opsd__batch_size=32,
    opsd__optim__kind="muon",
    sft__batch_size=32,
    sft__optim__kind="muon",
    eval__rows=128,
    eval__final_banned=False,
)
# Charts and mazes in one run: images keep their sizes, 40 and 32 pixels.
_BOTH = dict(
    data__tasks=("Chart_Refocus", "Spatial_Navigation"),
    data__make__families=("chart", "maze"),
    data__make__train=6000,
    data__buckets__student=((36, 25),),
    data__buckets__teacher=((70, 50),),
    data__buckets__trace=((87, 50, 41),),
    images__min_size=32,
    model__llm__num_heads=4,
    model__llm__num_kv_heads=4,
    rollout__max_new_tokens=43,
    warmup__steps=500,
    **_SHORT,
)
_WRONG = dict(data__make__wrong_traces=1 / 3)


def _few(count):
    return dict(data__trace_limits=(count,))


# {group: (base, changed settings of its runs)}. A group has a warm-up of its own for each seed.
GROUPS = {
    "chart": (MINI, _CHART),
    "chart-100": (MINI, _CHART | _few(100)),
    "chart-500": (MINI, _CHART | _few(500)),
    "chart-2000": (MINI, _CHART | _few(2000)),
    "chart-wrong-500": (MINI, _CHART | _few(500) | _WRONG),
    "chart-wrong": (MINI, _CHART | _WRONG),
    "chart-text": (f"{CONTEXTS}:opsd_text", _CHART),
    "chart-text-vt": (f"{CONTEXTS}:solution_and_vt", _CHART),
    "maze": (f"{MINI}:maze", _MAZE),
    "maze-2000": (f"{MINI}:maze", _MAZE | _few(2000)),
    "maze-wrong": (f"{MINI}:maze", _MAZE | _WRONG),
    "maze-text": (f"{CONTEXTS}:opsd_text,maze", _MAZE),
    "maze-text-vt": (f"{CONTEXTS}:solution_and_vt,maze", _MAZE),
    "both": (MINI, _BOTH),
}

# {arm: its changed settings}. The run's own OPSD stage is the arm `opsd` of every group.
ARMS = {
    "image": dict(teacher__visual_thoughts="image"),
    "swap": dict(teacher__visual_thoughts="swap"),
    "noise": dict(teacher__visual_thoughts="noise"),
    "none": dict(teacher__visual_thoughts="none"),
    "sft": dict(stages=("sft",)),
    "first-30": dict(opsd__positions__first_fraction=0.3),
    "first-60": dict(opsd__positions__first_fraction=0.6),
    "beta-0": dict(divergence__beta=0.0),
    "beta-100": dict(divergence__beta=1.0),
    "clip": dict(divergence__clip=0.05),
    "top8": dict(divergence__top_k=8),
    "top8-union": dict(divergence__top_k=8, divergence__support="union"),
    "teacher-entropy": dict(opsd__token_weights="teacher_entropy"),
    "advantage": dict(opsd__token_weights="advantage"),
    "contrast": dict(teacher__contrast=0.5),
    "ema": dict(teacher__kind="ema"),
    "self": dict(teacher__kind="self"),
    "snapshot": dict(teacher__kind="snapshot"),
    "mixed": dict(opsd__reference_share=0.5),
    "offline": dict(stages=("offline",)),
    "only-charts": dict(data__weights=(1.0, 0.0)),
    "only-mazes": dict(data__weights=(0.0, 1.0)),
}

# Further changes for the short runs of the miniature.
ARMS_IN_MINIATURE = {
    "snapshot": dict(teacher__snapshot_every=25),
    # As many examples as 100 steps have: the teacher reads no others beforehand.
    "offline": dict(data__limits=(3200,)),
}

_FEW_ARMS = ("sft",)
# {question: (title, {group: its arms})}
QUESTIONS = {
    "content": (
        "Content or format",
        dict.fromkeys(("chart", "maze"), ("image", "swap", "noise", "none")),
    ),
    "traces": (
        "Few text traces",
        dict.fromkeys(
            ("chart-100", "chart-500", "chart-2000", "chart", "maze-2000", "maze"),
            _FEW_ARMS,
        ),
    ),
    "wrong": (
        "A third of the text traces wrong",
        dict.fromkeys(("chart-wrong-500", "chart-wrong", "maze-wrong"), _FEW_ARMS),
    ),
    "length": (
        "How much of a completion counts",
        dict.fromkeys(("chart", "maze"), ("first-30", "first-60")),
    ),
    "loss": (
        "The loss",
        dict.fromkeys(
            ("chart", "maze"),
            (
                *("beta-0", "beta-100", "clip", "top8", "top8-union"),
                *("teacher-entropy", "advantage", "contrast"),
            ),
        ),
    ),
    "teacher": (
        "The teacher's weights",
        dict.fromkeys(("chart", "maze"), ("ema", "self", "snapshot")),
    ),
    "policy": (
        "Whose completions",
        dict.fromkeys(("chart", "maze"), ("mixed", "offline", "sft")),
    ),
    "privileged": (
        "What the teacher sees",
        dict.fromkeys(
            ("chart", "chart-text", "chart-text-vt", "maze", "maze-text", "maze-text-vt"),
            ("swap",),
        ),
    ),
    "transfer": ("From one task to another", {"both": ("only-charts", "only-mazes")}),
}


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


def _asked(c, names, groups):
    """Adds the questions with these names, of these groups alone if there are any."""
    for name in names:
        title, arms_of = QUESTIONS[name]
        shown = {group: arms for group, arms in arms_of.items() if not groups or group in groups}
        if groups == [OWN] and "chart" in arms_of:
            shown = {OWN: arms_of["chart"]}
        if not shown:
            continue
        c.questions[title] = shown
        for group, arms in shown.items():
            if group not in c.groups:
                base, changes = GROUPS.get(group, ("", {}))
                c.groups[group] = nested(**changes, **(_UNWATCHED if base else {}))
                c.arms_of[group] = ()
                if base:
                    c.base_of[group] = base
            c.arms_of[group] = tuple(dict.fromkeys((*c.arms_of[group], *arms)))
            for arm in arms:
                more = {} if group == OWN else ARMS_IN_MINIATURE.get(arm, {})
                c.arms[arm] = nested(**ARMS[arm], **more)


def _groups_of(names):
    """The groups of these questions, each once."""
    return dict.fromkeys(group for name in names for group in QUESTIONS[name][1])


def get_config(arg: str = "content"):
    """The settings of a study; arg: names of questions and groups, see above."""
    c = grid.default()
    if arg == "smoke":
        _smoke(c)
        return c
    words = arg.split(",")
    families = {
        "charts": [group for group in GROUPS if group.startswith("chart")],
        "mazes": [group for group in GROUPS if group.startswith("maze")],
    }
    known = (*QUESTIONS, "all", *families, *GROUPS, OWN)
    if wrong := [word for word in words if word not in known]:
        raise ValueError(
            f"configs/study.py:{arg}: {wrong[0]!r} is no question and no group: choose from "
            f"{', '.join(known)}, or smoke{checks.did_you_mean(wrong[0], [*known, 'smoke'])}"
        )
    names = [word for word in words if word in QUESTIONS]
    c.base, c.seeds, c.groups = MINI, (0, 1, 2), {}
    groups = [word for word in words if word in GROUPS or word == OWN]
    groups += [group for word in words for group in families.get(word, ())]
    _asked(c, names or list(QUESTIONS), groups)
    if not c.groups:
        raise ValueError(
            f"configs/study.py:{arg}: none of these questions has the groups "
            f"{', '.join(groups)}; they have {', '.join(_groups_of(names))}"
        )
    return c
