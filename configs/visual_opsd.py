"""Visual-OPSD of ThinkMorph-7B as in the paper, and its controls.

  python -m opsd_jax.train --config=configs/visual_opsd.py --workdir=W \
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

Prepare the data once: python -m opsd_jax.data prepare --source=PARQUET --target=PREPARED
"""

from opsd_jax import config as config_lib


def get_config(arg: str = "paper"):
    """The configuration; arg: one of the names above."""
    c = config_lib.default()
    c.eval.final_split = ""  # the released data sets have a train split only
    if arg in ("self", "fixed"):
        c.teacher.kind = arg
    elif arg in ("noise", "swap", "image", "none"):
        c.teacher.visual_thoughts = arg
    elif arg in ("sft", "offline"):
        c.stages = (arg,)
    elif arg == "lora":
        c.lora.update(rank=64, alpha=128.0)
        c.opsd.optim.update(lr=1e-4, min_lr=1e-6)
    elif arg != "paper":
        raise ValueError(
            f"configs/visual_opsd.py:{arg}: choose paper, self, fixed, noise, swap, image, none, "
            "sft, offline or lora"
        )
    return c
