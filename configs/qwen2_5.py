"""OPSD of the Qwen2.5 models, which read text alone.

  python -m opsd_jax.train --config=configs/qwen2_5.py:7B --workdir=W \
      --config.init_from=Qwen2.5-7B-Instruct --config.tokenizer=Qwen2.5-7B-Instruct \
      --config.data.dir=PREPARED

  configs/qwen2_5.py:0.5B       1.5B, 3B or 7B; 0.5B is the default
                    :7B,v5p-8   on a slice: v5p-8, v6e-16 or v5e-16

Sizes are those of the released config.json. configs/text_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax import presets

# Size: (vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, tied_head)
SIZES = {
    "0.5B": (151936, 896, 24, 14, 2, 4864, True),
    "1.5B": (151936, 1536, 28, 12, 2, 8960, True),
    "3B": (151936, 2048, 36, 16, 2, 11008, True),
    "7B": (152064, 3584, 28, 28, 4, 18944, False),
}


def get_config(arg: str = "0.5B"):
    """The configuration; arg: a size, and after a comma a slice, see above."""
    size, on = presets.size_and_slice("configs/qwen2_5.py", arg, SIZES)
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("text_opsd.py")))
    c = shared["get_config"]()
    vocabulary, hidden_size, num_layers, num_heads, num_kv_heads, width, tied_head = SIZES[size]
    c.model.llm.update(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=width,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        qk_norm=False,
        tied_head=tied_head,
    )
    if on:
        presets.use_slice(c, on)
    return c
