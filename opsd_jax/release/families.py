"""The model family that released folders of a model belong to, and with it their key table."""

from opsd_jax.model.config import ModelConfig
from opsd_jax.release import bagel_keys, decoder_keys, qwen_vl_keys
from opsd_jax.release.keys import Key

# {model_type: its decoder's class} of families whose models read text alone.
DECODERS = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def family(config: ModelConfig) -> str:
    """The family of a model, by what it has: "bagel", or its model_type in config.json.

    Raises ValueError for a decoder that no family has.
    """
    llm = config.llm
    if config.vit is not None:
        return "bagel" if config.is_bagel else config.vit.kind
    if llm.qk_norm and llm.qkv_bias == llm.output_bias and not llm.mlp_bias:
        return "qwen3"
    if llm.qkv_bias and not (llm.qk_norm or llm.output_bias or llm.mlp_bias):
        return "qwen2"
    if llm.qkv_bias == llm.output_bias and not llm.qk_norm:
        return "llama"
    raise ValueError(
        "no released family has a decoder with "
        + ", ".join(
            f"{name} {getattr(llm, name)}"
            for name in ("qk_norm", "qkv_bias", "output_bias", "mlp_bias")
        )
        + ": Qwen2 has biases of q, k and v alone, Qwen3 q/k norms and no bias, Llama neither (or, "
        "as attention_bias, all biases of attention)"
    )


def key(config: ModelConfig, path: str) -> Key:
    """Where released folders of a model store the parameter at a path.

    Raises KeyError for a path that releases of its family do not have.
    """
    if config.has_grids:
        return qwen_vl_keys.key(config.vit.kind, path)
    return (bagel_keys if config.is_bagel else decoder_keys).key(path)


def unread(config: ModelConfig, name: str) -> str:
    """Why a tensor of a released folder that no parameter uses stays on disk; "" if it must not."""
    if config.is_bagel:
        left_out = config.generation is None and bagel_keys.GENERATION_KEYS.fullmatch(name)
        return "of the generation expert" if left_out else ""
    if decoder_keys.BUFFER_KEYS.fullmatch(name):
        return "of rotary frequencies, which follow from the sizes,"
    tied = config.llm.tied_head and name == key(config, "llm/head").template
    return "of the output head, which is the embedding table," if tied else ""
