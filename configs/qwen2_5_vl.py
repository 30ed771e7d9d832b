"""OPSD of Qwen2.5-VL: the student reads images and question, the teacher also the visual thoughts.

  python -m opsd_jax.train --config=configs/qwen2_5_vl.py:7B --workdir=W \
      --config.init_from=Qwen2.5-VL-7B-Instruct --config.tokenizer=Qwen2.5-VL-7B-Instruct \
      --config.data.dir=PREPARED

  configs/qwen2_5_vl.py:3B         or 7B; 3B is the default
                       :7B,v5p-8   on a slice: v5p-8, v6e-16 or v5e-16

Sizes are those of the released config.json. configs/vision_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax import presets

# Size: (vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, tied_head)
SIZES = {
    "3B": (151936, 2048, 36, 16, 2, 11008, True),
    "7B": (152064, 3584, 28, 28, 4, 18944, False),
}


def get_config(arg: str = "3B"):
    """The configuration; arg: a size, and after a comma a slice, see above."""
    size, on = presets.size_and_slice("configs/qwen2_5_vl.py", arg, SIZES)
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("vision_opsd.py")))
    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, width, tied_head = SIZES[size]
    c = shared["get_config"](patch_size=14)
    c.model.llm.update(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=width,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qk_norm=False,
        tied_head=tied_head,
        mrope=(16, 24, 24),
    )
    c.model.vit.update(
        kind="qwen2_5_vl",
        hidden_size=1280,
        num_layers=32,
        num_heads=16,
        intermediate_size=3420,
        side=0,
        window=112,
        full_layers=(7, 15, 23, 31),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    if on:
        presets.use_slice(c, on)
    return c
