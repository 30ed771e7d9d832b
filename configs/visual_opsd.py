"""Visual-OPSD of ThinkMorph-7B as in the paper, its controls, and presets for slices of TPUs.

  python -m opsd_jax.train --config=configs/visual_opsd.py:v5p-16 --workdir=W \
      --config.init_from=ThinkMorph-7B --config.tokenizer=ThinkMorph-7B --config.data.dir=PREPARED

  configs/visual_opsd.py:paper    EMA teacher with real visual thoughts (the default)
                        :self     the teacher is the current weights: one parameter pytree
                        :fixed    the teacher is the initial weights
                        :noise    Gaussian noise in place of the visual thoughts
                        :swap     the visual thoughts of another example
                        :image    the problem image in place of the visual thoughts
                        :none     intro and transition only
                        :sft      text-only SFT from the same initial weights
                        :offline  :sft with KL to a teacher whose log-probabilities are cached first
                        :lora     only adapters of rank 64 are trained, at ten times the learning
                                  rate; not in the paper
                        :opsd_text, :crop, :degraded, :solution_and_vt
                                  other contexts, see configs/contexts.py; not in the paper

  configs/visual_opsd.py:v5p-16        the paper's run on a slice: v5p-8, v5p-16, v5p-32, v6e-16
                                       or v5e-64
                        :noise,v5p-16  another run of the list on a slice

Without a slice, batches are cut for 8 devices, as in the paper. A slice changes how a batch is
divided over devices and over time, and no number of the paper: 16 sequences a step.

Prepare the data once: python -m opsd_jax.data prepare --source=PARQUET --target=PREPARED
"""

from opsd_jax import config as config_lib
from opsd_jax import presets
from opsd_jax.inputs import checks

RUNS = (
    "paper",
    "self",
    "fixed",
    "noise",
    "swap",
    "image",
    "none",
    "sft",
    "offline",
    "lora",
    *presets.CONTEXTS,
)

# Slice: (mesh.fsdp, mesh.tensor, sequences that a shard of fsdp takes at a time), all of its chips.
# A batch of 16 cannot be divided over more than 16 of them, and v6e takes longer without
# mesh.tensor (docs/performance/plan.md). A v5p has the memory for all of its sequences at once, so
# that weights are gathered once a pass. The sampler has a
# mesh of its own, `rollout.tensor`. `presets.use_mesh` has what else a slice sets; the rest is as
# in config.default: recomputed layers, queries of dense attention 512 at a time.
# perf/presets.py compiles all of them.
SLICES = {
    "v5p-8": (4, 1, 4),
    "v5p-16": (8, 1, 2),
    "v5p-32": (16, 1, 1),
    "v6e-16": (4, 4, 1),
    "v5e-64": (16, 4, 1),
}


def get_config(arg: str = "paper"):
    """The configuration; arg: a run, a slice, or both separated by a comma, see above."""
    run, on = _run_and_slice(arg)
    c = config_lib.default()
    c.eval.final_split = ""  # the released data sets have a train split only
    if run in ("self", "fixed"):
        c.teacher.kind = run
    elif run in ("noise", "swap", "image", "none"):
        c.teacher.visual_thoughts = run
    elif run in ("sft", "offline"):
        c.stages = (run,)
    elif run in presets.CONTEXTS:
        presets.use_contexts(c, run)
    elif run == "lora":
        c.lora.update(rank=64, alpha=128.0)
        c.opsd.optim.update(lr=1e-4, min_lr=1e-6)
    if on:
        presets.use_mesh(c, *SLICES[on])
    return c


def _run_and_slice(arg: str) -> tuple[str, str]:
    """The run, "paper" if none is named, and the slice, "" if none is."""
    names = arg.split(",")
    runs = [name for name in names if name in RUNS]
    slices = [name for name in names if name in SLICES]
    if len(runs) > 1 or len(slices) > 1 or len(runs) + len(slices) < len(names):
        raise ValueError(
            f"configs/visual_opsd.py:{arg}: name one of the runs {', '.join(RUNS)}, one of the "
            f"slices that they fit, {', '.join(SLICES)}, or both, such as noise,v5p-16. What "
            "another slice needs, python -m opsd_jax.plan says"
            + "".join(
                checks.did_you_mean(name, [*RUNS, *SLICES])
                for name in names
                if name not in (*RUNS, *SLICES)
            )
        )
    return (*runs, "paper")[0], (*slices, "")[0]
