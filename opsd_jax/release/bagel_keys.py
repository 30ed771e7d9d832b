"""Key table of the BAGEL family (BAGEL, ThinkMorph): where its releases store each parameter."""

import re

from opsd_jax.release import keys as keys_lib
from opsd_jax.release.keys import Key, decoder_layers, linear

# Tensors that understanding leaves on disk: the generation expert, and the latent path to and from
# it.
GENERATION_KEYS = re.compile(r".*_moe_gen\b.*|(time_embedder|vae2llm|llm2vae|latent_pos_embed)\..*")


def key(path: str) -> Key:
    """Key of the parameter at a path such as "llm/layers/und/q_kernel".

    Raises KeyError for a path that releases do not have.
    """
    if path.startswith("vae/"):
        return _autoencoder(path)
    return keys_lib.find(path, TABLE, "bagel_keys")


def _vision() -> dict[str, Key]:
    base, layer = "vit_model.vision_model", "vit_model.vision_model.encoder.layers.{layer}"
    keys = linear("vit/patch", f"{base}.embeddings.patch_embedding")
    keys["vit/position"] = Key(f"{base}.embeddings.position_embedding.weight")
    for ours, theirs in (
        ("q", "self_attn.q_proj"),
        ("k", "self_attn.k_proj"),
        ("v", "self_attn.v_proj"),
        ("o", "self_attn.out_proj"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    ):
        keys |= linear(f"vit/layers/{ours}", f"{layer}.{theirs}")
    for ours, theirs in (
        ("vit/layers/norm1", f"{layer}.layer_norm1"),
        ("vit/layers/norm2", f"{layer}.layer_norm2"),
        ("vit/post_norm", f"{base}.post_layernorm"),
    ):
        keys |= {f"{ours}_scale": Key(f"{theirs}.weight"), f"{ours}_bias": Key(f"{theirs}.bias")}
    return keys


TABLE = {
    "llm/embed": Key("language_model.model.embed_tokens.weight"),
    "llm/head": Key("language_model.lm_head.weight", order=(1, 0)),
    "llm/norm": Key("language_model.model.norm.weight"),
    "llm/norm_gen": Key("language_model.model.norm_moe_gen.weight"),
    **decoder_layers("und", "language_model.model"),
    **decoder_layers("gen", "language_model.model", suffix="_moe_gen"),
    **_vision(),
    **linear("connector/fc1", "connector.fc1"),
    **linear("connector/fc2", "connector.fc2"),
    "connector/position_table": Key("vit_pos_embed.pos_embed"),
    **linear("latent/time_fc1", "time_embedder.mlp.0"),
    **linear("latent/time_fc2", "time_embedder.mlp.2"),
    **linear("latent/in", "vae2llm"),
    **linear("latent/out", "llm2vae"),
    "latent/position_table": Key("latent_pos_embed.pos_embed"),
}


def _autoencoder(path: str) -> Key:
    """Key of a parameter of the autoencoder.

    Its names follow from the paths, because the number of blocks depends on the config:
    vae/encoder/down_0_block_1/conv1_kernel is encoder.down.0.block.1.conv1.weight.
    """
    _, side, *block, leaf = path.split("/")
    module, _, kind = leaf.rpartition("_")
    parts = [side]
    if block:
        level, part = re.fullmatch(r"((?:down|up)_\d+|mid)_(.+)", block[0]).groups()
        # down_0 -> down.0; blocks of a resolution are a list (block.1), those in the middle are
        # not (block_1)
        parts += [level.replace("_", "."), part if level == "mid" else part.replace("_", ".")]
    name = ".".join([*parts, module, "bias" if kind == "bias" else "weight"])
    return Key(name, "ae", (2, 3, 1, 0) if kind == "kernel" else None)
