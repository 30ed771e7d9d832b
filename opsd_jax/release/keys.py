"""Where released folders store a parameter: the type of the entries of every family's key table.

A key says which file of a release holds a parameter, under which name, and in which order of axes.
What a parameter means (axes, group) is in `params.TABLE`, which does not depend on a release. Each
model family has a module with its table: `bagel_keys`, `decoder_keys`. `families` chooses it.

Paths under "layers" are stacked over layers (first axis); a release stores one tensor for each
layer. Linear kernels are [in, out] here and [out, in] there, kernels of convolutions HWIO and OIHW.
Adapters (LoRA) have no key: export adds them to their matrices.
"""

import dataclasses
from collections.abc import Mapping, Sequence
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
    "chat_template.jinja",
    "chat_template.json",
)


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


def find(path: str, table: Mapping[str, Key], module: str) -> Key:
    """The key of a parameter in the table of a module.

    Raises KeyError for a path that releases of the family do not have.
    """
    if path not in table:
        raise KeyError(
            f"parameter {path!r} has no key in opsd_jax/release/{module}.py: add one. (Adapters "
            "of LoRA have none: export adds them to their matrices.)"
        )
    return table[path]


def linear(path: str, name: str, bias: bool = True) -> dict[str, Key]:
    """The keys of a matrix and, unless it never has one, of its bias."""
    keys = {f"{path}_kernel": Key(f"{name}.weight", order=(1, 0))}
    return keys | ({f"{path}_bias": Key(f"{name}.bias")} if bias else {})


def decoder_layers(
    expert: str, prefix: str, *, suffix: str = "", more_biases: bool = False
) -> dict[str, Key]:
    """The keys of one expert of the decoder's layers, named as in transformers.

    Args:
      expert: "und" or "gen".
      prefix: what the names begin with, before ".layers".
      suffix: what the names of the expert's modules end with.
      more_biases: whether output projections and MLPs may have biases.
    """
    ours, theirs = f"llm/layers/{expert}", f"{prefix}.layers.{{layer}}"
    keys = {}
    for letter in "qkv":
        keys |= linear(f"{ours}/{letter}", f"{theirs}.self_attn.{letter}_proj{suffix}")
    keys |= linear(f"{ours}/o", f"{theirs}.self_attn.o_proj{suffix}", more_biases)
    for word in ("gate", "up", "down"):
        keys |= linear(f"{ours}/{word}", f"{theirs}.mlp{suffix}.{word}_proj", more_biases)
    for norm, module in (
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
        ("input_norm", "input_layernorm"),
        ("post_norm", "post_attention_layernorm"),
    ):
        keys[f"{ours}/{norm}"] = Key(f"{theirs}.{module}{suffix}.weight")
    return keys
