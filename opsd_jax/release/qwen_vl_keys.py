"""Key tables of the families Qwen2.5-VL and Qwen3-VL."""

from opsd_jax.release import keys as keys_lib
from opsd_jax.release.keys import Key, decoder_layers, linear

# Our axes of a patch kernel (frame, row, column, channel, out) in the stored order.
_CONVOLUTION = (2, 3, 4, 1, 0)


def _decoder(prefix: str) -> dict[str, Key]:
    return {
        "llm/embed": Key(f"{prefix}.embed_tokens.weight"),
        "llm/head": Key("lm_head.weight", order=(1, 0)),
        "llm/norm": Key(f"{prefix}.norm.weight"),
        **decoder_layers("und", prefix, more_biases=True),
    }


def _norm(path: str, name: str) -> dict[str, Key]:
    """The keys of a norm; an RMS norm has no bias."""
    return {f"{path}_scale": Key(f"{name}.weight"), f"{path}_bias": Key(f"{name}.bias")}


def _tower(prefix: str, matrices: dict[str, str]) -> dict[str, Key]:
    """The keys of a tower. matrices: our names of a layer's matrices and theirs."""
    layer = f"{prefix}.blocks.{{layer}}"
    keys = {
        "vit/patch_convolution": Key(f"{prefix}.patch_embed.proj.weight", order=_CONVOLUTION),
        "vit/patch_bias": Key(f"{prefix}.patch_embed.proj.bias"),
        "vit/position": Key(f"{prefix}.pos_embed.weight"),
        **_norm("vit/layers/norm1", f"{layer}.norm1"),
        **_norm("vit/layers/norm2", f"{layer}.norm2"),
    }
    matrices = {"qkv": "attn.qkv", "o": "attn.proj"} | matrices
    for ours, theirs in matrices.items():
        keys |= linear(f"vit/layers/{ours}", f"{layer}.{theirs}")
    return keys


def _merger(ours: str, theirs: str, modules: tuple[str, str, str]) -> dict[str, Key]:
    """The keys of a merger. modules: their names of its norm and its two matrices."""
    norm, first, second = (f"{theirs}.{module}" for module in modules)
    path = f"connector/{ours}"
    return (
        _norm(f"{path}/norm", norm) | linear(f"{path}/fc1", first) | linear(f"{path}/fc2", second)
    )


_QWEN3_MERGER = ("norm", "linear_fc1", "linear_fc2")
TABLES = {
    "qwen2_5_vl": {
        **_decoder("model"),
        **_tower("visual", {word: f"mlp.{word}_proj" for word in ("gate", "up", "down")}),
        **_merger("merger", "visual.merger", ("ln_q", "mlp.0", "mlp.2")),
    },
    "qwen3_vl": {
        **_decoder("model.language_model"),
        **_tower("model.visual", {word: f"mlp.linear_{word}" for word in ("fc1", "fc2")}),
        **_merger("merger", "model.visual.merger", _QWEN3_MERGER),
        **_merger("deepstack", "model.visual.deepstack_merger_list.{layer}", _QWEN3_MERGER),
    },
}


def key(kind: str, path: str) -> Key:
    """Key of the parameter at a path such as "vit/layers/qkv_kernel".

    kind: the tower's, see `model.config.ViTConfig`.
    Raises KeyError for a path that releases do not have.
    """
    return keys_lib.find(path, TABLES[kind], "qwen_vl_keys")
