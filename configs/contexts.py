"""The miniature with other contexts: what the teacher sees beyond the student, by configuration.

  python -m opsd_jax.train --config=configs/contexts.py:opsd_text --workdir=W

  configs/contexts.py:opsd_text        the teacher reads the solution as a text, and sees no visual
                                       thought
                     :crop             the teacher also sees the middle of the image, enlarged
                     :degraded         the student sees the image in a low resolution, the teacher
                                       as it is; the teacher has no other information
                     :solution_and_vt  the teacher reads the solution and sees the visual thoughts
                     :crop,maze        on another preset of configs/mini.py; the default is chart

opsd_jax/presets.py has the blocks of each name; docs/concepts/contexts.md explains them.
"""

import pathlib
import runpy

from opsd_jax import presets
from opsd_jax.inputs import checks


def get_config(arg: str = "opsd_text"):
    """The configuration; arg: a name, and after a comma a preset of configs/mini.py, see above."""
    name, _, preset = arg.partition(",")
    if name not in presets.CONTEXTS:
        raise ValueError(
            f"configs/contexts.py:{arg}: choose from {', '.join(presets.CONTEXTS)}"
            + checks.did_you_mean(name, presets.CONTEXTS)
        )
    mini = pathlib.Path(__file__).with_name("mini.py")
    c = runpy.run_path(str(mini))["get_config"](preset or "chart")
    presets.use_contexts(c, name)
    if presets.SOLUTION in c.teacher.blocks:
        buckets = c.data.buckets
        for kind in ("teacher", "trace"):  # a solution is at most as long as the targets of a trace
            ((positions, *rest),) = buckets[kind]
            buckets[kind] = ((positions + buckets.trace[0][2], *rest),)
    c.run_arms = ("noise", "swap")  # the arm image does not suit every context
    return c
