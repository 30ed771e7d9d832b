"""OPSD of the SmolLM2 models, Llama decoders that read text alone.

  python -m opsd_jax.train --config=configs/smollm2.py:135M --workdir=W \
      --config.init_from=SmolLM2-135M-Instruct --config.tokenizer=SmolLM2-135M-Instruct \
      --config.data.dir=PREPARED

  configs/smollm2.py:135M   360M or 1.7B; 135M is the default

Sizes are those of the released config.json. configs/text_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax.inputs import checks

# Size: (hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, rope_theta)
SIZES = {
    "135M": (576, 30, 9, 3, 1536, 1e5),
    "360M": (960, 32, 15, 5, 2560, 1e5),
    "1.7B": (2048, 24, 32, 32, 8192, 1.3e5),
}


def get_config(arg: str = "135M"):
    """The configuration; arg: a size, see above."""
    if arg not in SIZES:
        raise ValueError(
            f"configs/smollm2.py:{arg}: choose from {', '.join(SIZES)}"
            + checks.did_you_mean(arg, SIZES)
        )
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("text_opsd.py")))
    c = shared["get_config"]()
    hidden_size, num_layers, num_heads, num_kv_heads, width, rope_theta = SIZES[arg]
    c.model.llm.update(
        vocab_size=49152,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=width,
        rope_theta=rope_theta,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied_head=True,
    )
    return c
