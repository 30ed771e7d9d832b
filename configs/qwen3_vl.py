"""OPSD of the dense Qwen3-VL: the student reads images and question, the teacher also the visual
thoughts.

  python -m opsd_jax.train --config=configs/qwen3_vl.py:8B --workdir=W \
      --config.init_from=Qwen3-VL-8B-Instruct --config.tokenizer=Qwen3-VL-8B-Instruct \
      --config.data.dir=PREPARED

  configs/qwen3_vl.py:2B         4B or 8B; 2B is the default
                     :8B,v5p-8   on a slice: v5p-8, v6e-16 or v5e-16

Sizes are those of the released config.json. configs/vision_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax import presets

# The towers: (hidden_size, num_layers, intermediate_size, deepstack)
SMALL = (1024, 24, 4096, (5, 11, 17))
LARGE = (1152, 27, 4304, (8, 16, 24))
# Size: (hidden_size, num_layers, num_heads, intermediate_size, tied_head, tower)
SIZES = {
    "2B": (2048, 28, 16, 6144, True, SMALL),
    "4B": (2560, 36, 32, 9728, True, SMALL),
    "8B": (4096, 36, 32, 12288, False, LARGE),
}


def get_config(arg: str = "2B"):
    """The configuration; arg: a size, and after a comma a slice, see above."""
    size, on = presets.size_and_slice("configs/qwen3_vl.py", arg, SIZES)
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("vision_opsd.py")))
    hidden_size, num_layers, num_heads, width, tied_head, tower = SIZES[size]
    c = shared["get_config"](patch_size=16)
    c.model.llm.update(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=width,
        rope_theta=5e6,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        tied_head=tied_head,
        mrope=(24, 20, 20),
        mrope_interleaved=True,
    )
    c.model.vit.update(
        kind="qwen3_vl",
        hidden_size=tower[0],
        num_layers=tower[1],
        num_heads=16,
        intermediate_size=tower[2],
        side=48,
        deepstack=tower[3],
    )
    if on:
        presets.use_slice(c, on)
    return c
