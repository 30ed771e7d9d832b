"""Key table of the BAGEL family (BAGEL, ThinkMorph): where its releases store each parameter.

A key says which file of a release holds a parameter, under which name, and in which order of axes.
What a parameter means (axes, group) is in `params.TABLE`, which does not depend on a release. The
other modules of `release` get every name from here: another model family is another such module.

Paths under "layers" are stacked over layers (first axis); a release stores one tensor for each
layer. Linear kernels are [in, out] here and [out, in] there, kernels of convolutions HWIO and OIHW.
Adapters (LoRA) have no key: export adds them to their matrices.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

# Files of a release with the tokenizer, as far as it has them.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "special_tokens.json",
    "generation_config.json",
)
# Tensors that understanding leaves on disk: the generation expert, and the latent path to and from
# it.
GENERATION_KEYS = re.compile(r".*_moe_gen\b.*|(time_embedder|vae2llm|llm2vae|latent_pos_embed)\..*")


@dataclasses.dataclass(frozen=True)
class Key:
    """Where and how a release stores one parameter.

    template: name of the tensor; with "{layer}" in it, the parameter is stacked over layers and
      each layer is a tensor of its own.
    file: "model" for {model,ema}.safetensors (or their shards), "ae" for ae.safetensors.
    order: for each of our axes, of one layer, its axis in the stored tensor; None if all are equal.
    """

    template: str
    file: str = "model"
    order: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        """Whether each layer of the parameter is a tensor of its own."""
        return "{layer}" in self.template

    def names(self, shape: Sequence[int]) -> list[str]:
        """Names of the tensors of a parameter of our shape, in the order of layers."""
        if not self.stacked:
            return [self.template]
        return [self.template.format(layer=n) for n in range(shape[0])]

    def tensor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one stored tensor of a parameter of our shape."""
        return self.stored_order(shape[1:] if self.stacked else shape)

    def stored_order(self, values: Sequence[Any]) -> tuple:
        """Values of our axes (of one layer), such as sizes or slices, in the stored order."""
        if self.order is None:
            return tuple(values)
        return tuple(values[self.order.index(n)] for n in range(len(values)))

    def from_release(self, tensor):
        """A stored tensor with our axes (of one layer)."""
        return tensor if self.order is None else tensor.transpose(self.order)

    def to_release(self, array):
        """Inverse of `from_release`."""
        if self.order is None:
            return array
        return array.transpose([self.order.index(n) for n in range(array.ndim)])


def key(path: str) -> Key:
    """Key of the parameter at a path such as "llm/layers/und/q_kernel".

    Raises KeyError for a path that releases do not have.
    """
    if path.startswith("vae/"):
        return _autoencoder(path)
    if path not in TABLE:
        raise KeyError(
            f"parameter {path!r} has no key in opsd_jax/release/bagel_keys.py: add one. (Adapters "
            "of LoRA have none: export adds them to their matrices.)"
        )
    return TABLE[path]


def _linear(path: str, name: str, bias: bool = True) -> dict[str, Key]:
    keys = {f"{path}_kernel": Key(f"{name}.weight", order=(1, 0))}
    return keys | ({f"{path}_bias": Key(f"{name}.bias")} if bias else {})


def _expert(expert: str) -> dict[str, Key]:
    """One expert of the decoder; the generation expert's modules carry the suffix _moe_gen."""
    ours, gen = f"llm/layers/{expert}", "_moe_gen" if expert == "gen" else ""
    theirs = "language_model.model.layers.{layer}"
    keys = {}
    for letter in "qkv":
        keys |= _linear(f"{ours}/{letter}", f"{theirs}.self_attn.{letter}_proj{gen}")
    keys |= _linear(f"{ours}/o", f"{theirs}.self_attn.o_proj{gen}", bias=False)
    for word in ("gate", "up", "down"):
        keys |= _linear(f"{ours}/{word}", f"{theirs}.mlp{gen}.{word}_proj", bias=False)
    for norm, module in (
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
        ("input_norm", "input_layernorm"),
        ("post_norm", "post_attention_layernorm"),
    ):
        keys[f"{ours}/{norm}"] = Key(f"{theirs}.{module}{gen}.weight")
    return keys


def _vision() -> dict[str, Key]:
    base, layer = "vit_model.vision_model", "vit_model.vision_model.encoder.layers.{layer}"
    keys = _linear("vit/patch", f"{base}.embeddings.patch_embedding")
    keys["vit/position"] = Key(f"{base}.embeddings.position_embedding.weight")
    for ours, theirs in (
        ("q", "self_attn.q_proj"),
        ("k", "self_attn.k_proj"),
        ("v", "self_attn.v_proj"),
        ("o", "self_attn.out_proj"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    ):
        keys |= _linear(f"vit/layers/{ours}", f"{layer}.{theirs}")
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
    **_expert("und"),
    **_expert("gen"),
    **_vision(),
    **_linear("connector/fc1", "connector.fc1"),
    **_linear("connector/fc2", "connector.fc2"),
    "connector/position_table": Key("vit_pos_embed.pos_embed"),
    **_linear("latent/time_fc1", "time_embedder.mlp.0"),
    **_linear("latent/time_fc2", "time_embedder.mlp.2"),
    **_linear("latent/in", "vae2llm"),
    **_linear("latent/out", "llm2vae"),
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
