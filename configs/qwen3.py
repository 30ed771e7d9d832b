"""OPSD of the dense Qwen3 models, which read text alone.

  python -m opsd_jax.train --config=configs/qwen3.py:8B,v5p-8 --workdir=W \
      --config.init_from=Qwen3-8B --config.tokenizer=Qwen3-8B --config.data.dir=PREPARED

  configs/qwen3.py:0.6B   1.7B, 4B or 8B; 0.6B is the default
                  :8B,v5p-8   on a slice: v5p-8, v6e-16 or v5e-16

Sizes are those of the released config.json. configs/text_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax import presets

# Size: (hidden_size, num_layers, num_heads, intermediate_size, tied_head)
SIZES = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
}


def get_config(arg: str = "0.6B"):
    """The configuration; arg: a size, and after a comma a slice, see above."""
    size, on = presets.size_and_slice("configs/qwen3.py", arg, SIZES)
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("text_opsd.py")))
    c = shared["get_config"]()
    hidden_size, num_layers, num_heads, intermediate_size, tied_head = SIZES[size]
    c.model.llm.update(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate_size,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=True,
        tied_head=tied_head,
    )
    if on:
        presets.use_slice(c, on)
    return c
