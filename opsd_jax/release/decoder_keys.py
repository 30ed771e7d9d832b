"""Key table of decoders that read text alone: Qwen2 (and Qwen2.5), Qwen3 and Llama (and SmolLM2).

The three families have the same names. Which of the parameters a model has, `LLMConfig` says.
"""

import re

from opsd_jax.release import keys as keys_lib
from opsd_jax.release.keys import Key, decoder_layers

# Tensors that some releases hold beside the parameters: frequencies that follow from the sizes.
BUFFER_KEYS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

TABLE = {
    "llm/embed": Key("model.embed_tokens.weight"),
    "llm/head": Key("lm_head.weight", order=(1, 0)),
    "llm/norm": Key("model.norm.weight"),
    **decoder_layers("und", "model", more_biases=True),
}


def key(path: str) -> Key:
    """Key of the parameter at a path such as "llm/layers/und/q_kernel".

    Raises KeyError for a path that releases do not have.
    """
    return keys_lib.find(path, TABLE, "decoder_keys")
