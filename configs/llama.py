"""OPSD of the Llama 3 models, which read text alone.

  python -m opsd_jax.train --config=configs/llama.py:3B --workdir=W \
      --config.init_from=Llama-3.2-3B-Instruct --config.tokenizer=Llama-3.2-3B-Instruct \
      --config.data.dir=PREPARED

  configs/llama.py:1B         3B (both Llama 3.2) or 8B (Llama 3.1); 1B is the default
                  :8B,v5p-8   on a slice: v5p-8, v6e-16 or v5e-16

Sizes are those of the released config.json. configs/text_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax import presets

# Size: (hidden_size, num_layers, num_heads, intermediate_size, tied_head, factor of the rope)
SIZES = {
    "1B": (2048, 16, 32, 8192, True, 32.0),
    "3B": (3072, 28, 24, 8192, True, 32.0),
    "8B": (4096, 32, 32, 14336, False, 8.0),
}


def get_config(arg: str = "1B"):
    """The configuration; arg: a size, and after a comma a slice, see above."""
    size, on = presets.size_and_slice("configs/llama.py", arg, SIZES)
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("text_opsd.py")))
    c = shared["get_config"]()
    hidden_size, num_layers, num_heads, width, tied_head, factor = SIZES[size]
    c.model.llm.update(
        vocab_size=128256,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        intermediate_size=width,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied_head=tied_head,
        rope_llama3=(factor, 1.0, 4.0, 8192.0),
    )
    if on:
        presets.use_slice(c, on)
    return c
