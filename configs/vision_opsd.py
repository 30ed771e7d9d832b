"""OPSD of a Qwen vision-language model: the student reads images and question, the teacher also the
visual thoughts.

What configs/qwen2_5_vl.py and configs/qwen3_vl.py share; sizes are theirs.
"""

from opsd_jax import config as config_lib

SYSTEM = (
    "Think step by step, and give the final answer at the end, wrapped in <answer></answer> tags."
)
TOKENS = 1280  # of the largest image


def get_config(patch_size: int):
    """The configuration; sizes of the model, data and tokenizer are left to set.

    patch_size: pixels along a side of a patch. 2 x 2 patches become one token.
    """
    c = config_lib.default()
    stride = 2 * patch_size
    c.model.vit.update(patch_size=patch_size, merge=2, temporal_patch=2)
    c.images.update(
        stride=stride,
        min_pixels=4 * stride**2,
        max_pixels=TOKENS * stride**2,
        transparency="white",
    )
    c.data.buckets.student = ((1024, 2 * TOKENS), (2048, 4 * TOKENS))
    c.data.buckets.teacher = ((2048, 4 * TOKENS), (4096, 8 * TOKENS))
    c.data.buckets.trace = ((2048, 2 * TOKENS, 1024), (5120, 8 * TOKENS, 2048))
    c.prompts.update(system=SYSTEM, form="chat")
    c.warmup.mix.update(interleaved=0, reference=1, text=1)
    c.rollout.max_image_skips = 0  # these models ask for no images
    return c
