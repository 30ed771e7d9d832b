"""OPSD of a text model: the student reads the question, the teacher also a worked solution.

What configs/qwen2_5.py, qwen3.py, llama.py and smollm2.py share; sizes are theirs.
"""

from opsd_jax import config as config_lib
from opsd_jax import presets

SYSTEM = (
    "Think step by step, and give the final answer at the end, wrapped in <answer></answer> tags."
)
INTRO = (
    "The following text is a worked solution of the problem. Use it silently as a reference; do "
    "not quote it."
)
ASKED = ("system", "question")


def get_config():
    """The configuration; sizes of the model, data and tokenizer are left to set."""
    c = config_lib.default()
    c.model.vit.on = False
    c.data.limits = ()  # the default has those of the paper's four data sets
    c.prompts.update(system=SYSTEM, intro=INTRO, form="chat")
    c.student.blocks = ASKED
    c.teacher.blocks = (*ASKED, "intro", presets.SOLUTION, "transition")
    c.data.buckets.student = ((512, 0), (2048, 0))
    c.data.buckets.teacher = ((1536, 0), (4096, 0))
    c.data.buckets.trace = ((1536, 0, 1024), (4096, 0, 2048))
    c.warmup.mix.update(interleaved=0, reference=1, text=1)
    c.rollout.max_image_skips = 0  # text models ask for no images
    c.eval.visual_thoughts = ("none",)
    c.eval.final_split = ""
    return c
