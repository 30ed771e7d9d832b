"""The table of facts per parameter: its axes and its group.

Freezing, optimizer state, EMA and shardings are derived from this table; `release.bagel_keys` has
the names in released checkpoints. The parameters are one plain nested dict; a path such as
"llm/layers/und/q_kernel" names a leaf. Leaves under "layers" are stacked over layers (first axis).
Linear kernels are [in, out]. Released checkpoints have no adapters (LoRA): `merge_lora` adds them
to the matrices.

Axes: L layers, r rank of an adapter.
"""

import dataclasses
import hashlib
import json
import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opsd_jax.array_types import AnyArray
from opsd_jax.inputs import checks

# The matrices of a decoder layer that can have adapters.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Fact:
    """The facts about one parameter.

    path: its path in the nested dict.
    axes: its logical axes (see `sharding`), None for an axis that is never sharded.
    group: one of `GROUPS`.
    """

    path: str
    axes: tuple[str | None, ...]
    group: str

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return self.axes[0] == "layers"


def _linear(path, axes, group, bias=True):
    """The facts of a matrix and of its bias, which need not be in every model."""
    facts = [Fact(f"{path}_kernel", axes, group)]
    if bias:
        facts.append(Fact(f"{path}_bias", axes[:-2] + axes[-1:], group))
    return facts


def _expert(expert, group):
    """The facts of one decoder expert's parameters."""
    layers, facts = f"llm/layers/{expert}", []
    for letter, axis in (("q", "heads"), ("k", "kv"), ("v", "kv")):
        facts += _linear(f"{layers}/{letter}", ("layers", "embed", axis), group)
    further = expert == "und"  # only decoders that have no other expert have more biases
    facts += _linear(f"{layers}/o", ("layers", "heads", "embed"), group, bias=further)
    for word, axes in (
        ("gate", ("layers", "embed", "mlp")),
        ("up", ("layers", "embed", "mlp")),
        ("down", ("layers", "mlp", "embed")),
    ):
        facts += _linear(f"{layers}/{word}", axes, group, bias=further)
    for norm in ("q_norm", "k_norm", "input_norm", "post_norm"):
        facts.append(Fact(f"{layers}/{norm}", ("layers", None), group))
    return facts


def _vit():
    facts = _linear("vit/patch", (None, "vit_embed"), "vit")
    facts.append(Fact("vit/position", (None, "vit_embed"), "vit"))
    for matrix, axes in (
        ("q", ("vit_embed", "vit_heads")),
        ("k", ("vit_embed", "vit_heads")),
        ("v", ("vit_embed", "vit_heads")),
        ("o", ("vit_heads", "vit_embed")),
        ("fc1", ("vit_embed", "vit_mlp")),
        ("fc2", ("vit_mlp", "vit_embed")),
    ):
        facts += _linear(f"vit/layers/{matrix}", ("layers", *axes), "vit")
    for norm, stacked in (
        ("vit/layers/norm1", ("layers", None)),
        ("vit/layers/norm2", ("layers", None)),
        ("vit/post_norm", (None,)),
    ):
        facts += [Fact(f"{norm}_{kind}", stacked, "vit") for kind in ("scale", "bias")]
    return facts


def _qwen_vision():
    """The facts of what the towers of Qwen2.5-VL and Qwen3-VL have in addition (`_vit`)."""
    facts = [Fact("vit/patch_convolution", (None,) * 4 + ("vit_embed",), "vit")]
    for matrix, axes in (
        ("qkv", ("vit_embed", None)),  # parts of three matrices, which devices would not share
        ("gate", ("vit_embed", "vit_mlp")),
        ("up", ("vit_embed", "vit_mlp")),
        ("down", ("vit_mlp", "vit_embed")),
    ):
        facts += _linear(f"vit/layers/{matrix}", ("layers", *axes), "vit")
    for merger, stacked in (("merger", ()), ("deepstack", ("layers",))):
        for kind in ("scale", "bias"):
            facts.append(Fact(f"connector/{merger}/norm_{kind}", (*stacked, None), "connector"))
        for matrix, axes in (("fc1", ("vit_embed", "vit_mlp")), ("fc2", ("vit_mlp", "embed"))):
            facts += _linear(f"connector/{merger}/{matrix}", (*stacked, *axes), "connector")
    return facts


TABLE = {
    fact.path: fact
    for fact in [
        Fact("llm/embed", ("vocab", "embed"), "embed"),
        Fact("llm/head", ("embed", "vocab"), "embed"),
        Fact("llm/norm", (None,), "und"),
        Fact("llm/norm_gen", (None,), "gen"),
        *_expert("und", "und"),
        *_expert("gen", "gen"),
        *_vit(),
        *_qwen_vision(),
        *_linear("connector/fc1", (None, "embed"), "connector"),
        *_linear("connector/fc2", (None, "embed"), "connector"),
        Fact("connector/position_table", (None, "embed"), "fixed"),
        *_linear("latent/time_fc1", (None, "embed"), "latent"),
        *_linear("latent/time_fc2", (None, "embed"), "latent"),
        *_linear("latent/in", (None, "embed"), "latent"),
        *_linear("latent/out", ("embed", None), "latent"),
        Fact("latent/position_table", (None, "embed"), "fixed"),
    ]
}

GROUPS = ("embed", "und", "gen", "vit", "connector", "latent", "vae", "fixed", "lora")
GENERATION_GROUPS = ("gen", "latent")  # trained only with image generation


def flatten(tree) -> dict:
    """A nested dict as a flat one: {"a/b/c": leaf}."""
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def unflatten(flat: dict) -> dict:
    """Inverse of `flatten`: {"a/b/c": leaf} as a nested dict."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# The autoencoder's parameters are recognised by their paths, because the number of its blocks
# depends on its configuration.
_VAE_PATH = re.compile(
    r"vae/(encoder|decoder)/(((down|up)_\d+|mid)_((block|attn)_\d+|downsample|upsample)/)?"
    r"\w+_(?P<kind>kernel|bias|scale)"
)


def _vae_fact(path):
    match = _VAE_PATH.fullmatch(path)
    if not match:
        return None
    return Fact(path, (None,) * (4 if match["kind"] == "kernel" else 1), "vae")


# The factors of an adapter have the axes of their matrix: a [L, in, r] is sharded like the matrix's
# input, b [L, r, out] like its output. "llm/layers/und/q_lora_a" belongs to
# "llm/layers/und/q_kernel".
_LORA_PATH = re.compile(
    rf"(?P<matrix>llm/layers/und/({'|'.join(LORA_TARGETS)}))_lora_(?P<factor>[ab])"
)


def _lora_fact(path):
    match = _LORA_PATH.fullmatch(path)
    if not match:
        return None
    layers, into, out = TABLE[f"{match['matrix']}_kernel"].axes
    return Fact(
        path, (layers, into, None) if match["factor"] == "a" else (layers, None, out), "lora"
    )


# Scales of the matrices that `in_int8` rounds, one for each output.
_INT8 = {
    **{
        f"llm/layers/und/{matrix}_kernel": f"llm/layers/und/{matrix}_scale"
        for matrix in LORA_TARGETS
    },
    "llm/head": "llm/head_scale",
}
_SCALES = {
    scale: Fact(scale, TABLE[matrix].axes[:-2] + TABLE[matrix].axes[-1:], TABLE[matrix].group)
    for matrix, scale in _INT8.items()
}


def find(path: str) -> Fact | None:
    """The facts about the parameter at a path, or None if the path names no known parameter."""
    return TABLE.get(path) or _vae_fact(path) or _lora_fact(path) or _SCALES.get(path)


def fact(path: str) -> Fact:
    """The facts about the parameter at a path.

    Raises:
      KeyError: the path names no known parameter.
    """
    row = find(path)
    if row is None:
        raise KeyError(
            f"parameter {path!r} has no row in opsd_jax/params.py: add its axes and its group"
        )
    return row


def partition(params, freeze=(), *, generation: bool = False):
    """Splits parameters into trainable and frozen ones; `merge` is the inverse.

    The groups "fixed" (the 2-D position tables) and "vae" are always frozen, as in the official
    code. So are `GENERATION_GROUPS`, which get no gradient from text, unless `generation` is set.
    If there are adapters (group "lora"), only they are trained.

    Args:
      params: nested dict of parameters.
      freeze: further groups to freeze, from `GROUPS`.
      generation: whether image generation is trained.
    Returns:
      (trainable, frozen), nested dicts without common leaves.
    Raises:
      ValueError: an unknown group, `freeze` together with adapters, or nothing is left to train.
    """
    if unknown := sorted(set(freeze) - set(GROUPS)):
        raise ValueError(
            f"freeze names unknown parameter groups {unknown}: "
            f"{checks.choose_from(unknown[0], GROUPS)}"
        )
    frozen_groups = {"fixed", "vae", *freeze, *(() if generation else GENERATION_GROUPS)}
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if fact(path).group not in frozen_groups}
    adapters = {path: leaf for path, leaf in flat.items() if fact(path).group == "lora"}
    if adapters and freeze:
        raise ValueError(
            f"freeze={tuple(freeze)} with LoRA, which trains its adapters alone: leave freeze empty"
        )
    trainable = adapters or trainable
    if not trainable:
        raise ValueError(
            f"freeze={tuple(freeze)} leaves no parameter to train: freeze fewer groups"
        )
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable, frozen):
    """Inverse of `partition`."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def understanding(params):
    """The parameters that text needs: all but those of image generation. No array is copied."""
    kept = {
        path: leaf
        for path, leaf in flatten(params).items()
        if path.split("/")[0] not in ("latent", "vae") and fact(path).group != "gen"
    }
    return unflatten(kept)


def adapters_of(path: str) -> tuple[str, str] | None:
    """Paths of the factors (a, b) of a matrix's adapter, or None if a leaf cannot have one."""
    matrix = path.removesuffix("_kernel")
    a, b = f"{matrix}_lora_a", f"{matrix}_lora_b"
    return (a, b) if path.endswith("_kernel") and find(a) else None


def merge_matrix(
    kernel: Float[AnyArray, "*any d e"],
    a: Float[AnyArray, "*any d r"],
    b: Float[AnyArray, "*any r e"],
    lora,
) -> Float[Array, "*any d e"]:
    """A matrix with its adapter added: kernel + alpha / rank * a b.

    The sum is computed in float32 and cast to the kernel's dtype.

    Args:
      kernel: [..., d, e], for inputs of size d and outputs of size e.
      a, b: the adapter's factors [..., d, r] and [..., r, e].
      lora: LoRAConfig, which has alpha and rank.
    Returns:
      [..., d, e].
    """
    product = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + lora.scale * product).astype(kernel.dtype)


def merge_lora(params, lora):
    """Parameters without adapters that compute the same: each adapter is added to its matrix.

    Args:
      params: nested dict of parameters.
      lora: the LoRAConfig that the parameters were created with.
    Raises:
      ValueError: the parameters have adapters of other targets or another rank.
    """
    flat = flatten(params)
    adapters = {path: leaf for path, leaf in flat.items() if fact(path).group == "lora"}
    held = {path: leaf.shape[-1 if path.endswith("a") else -2] for path, leaf in adapters.items()}
    wanted = {
        f"llm/layers/und/{target}_lora_{factor}": lora.rank
        for target in lora.targets
        for factor in "ab"
    }
    if held != wanted:
        raise ValueError(
            f"the parameters have adapters of other targets or ranks than {lora}: "
            f"{held or 'none'}; give the LoRA settings that they were created with"
        )
    merged = {path: leaf for path, leaf in flat.items() if path not in adapters}
    for path, leaf in merged.items():
        pair = adapters_of(path)
        if pair and pair[0] in adapters:
            merged[path] = merge_matrix(leaf, adapters[pair[0]], adapters[pair[1]], lora)
    return unflatten(merged)


def keeps_dtype(path: str) -> bool:
    """Whether a parameter keeps its own dtype where others are cast: the scales of the norms."""
    return "norm" in path.rsplit("/", 1)[-1]


def in_compute_dtype(params, dtype: str):
    """Parameters as the forward pass uses them, for programs that read them many times.

    All but the scales of the norms are cast to the compute dtype. Each use would cast them anyway,
    so the results are the same.
    """

    def cast(path, leaf):
        return leaf if keeps_dtype(path) else leaf.astype(dtype)

    return unflatten({path: cast(path, leaf) for path, leaf in flatten(params).items()})


def in_int8(params):
    """Parameters whose decoder matrices are rounded to int8, for a sampler that reads half as much.

    A matrix W [..., D, E] of the understanding expert's layers, or the head, becomes int8 values
    and a float32 scale [..., E] beside it, the largest magnitude of each output's column over 127:
    x W = (x values) scale, up to half a scale for each value. A tied head is the embedding table
    and stays.

    params: in the compute dtype, without parameters of image generation.
    """
    flat = flatten(params)
    for path, scale_path in _INT8.items():
        if path not in flat:
            continue
        matrix = flat[path].astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(matrix), axis=-2), jnp.finfo(jnp.float32).tiny) / 127
        flat[path] = jnp.round(matrix / scale[..., None, :]).astype(jnp.int8)
        flat[scale_path] = scale
    return unflatten(flat)


def for_sampling(params, dtype: str, int8: bool = False):
    """Parameters as the sampler reads them: those that text needs, in the compute dtype.

    int8: see `in_int8`.
    """
    own = in_compute_dtype(understanding(params), dtype)
    return in_int8(own) if int8 else own


def count(params) -> dict[str, int]:
    """Number of parameters of each group that has any, and of all groups as "total"."""
    counts = dict.fromkeys(GROUPS, 0)
    for path, leaf in flatten(params).items():
        counts[fact(path).group] += math.prod(leaf.shape)
    counts["total"] = sum(counts.values())
    return {group: n for group, n in counts.items() if n}


@jax.jit
def _checksums(flat):
    """A checksum, uint32, of each array: the sum of its values' bits modulo 2^32.

    The bits of each value are multiplied by an odd number that depends on its place in the array.
    The order in which devices add makes no difference.
    """

    def one(x):
        bits, place = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), jnp.uint32(0)
        for axis in range(x.ndim):
            place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(
                jnp.uint32, x.shape, axis
            )
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, flat)


def fingerprint(params) -> str:
    """Checksum of weights, computed on the devices that hold them.

    It changes with any weight, and does not depend on their layout on devices.
    """
    flat = flatten(params)
    sums = jax.device_get(_checksums(flat))
    facts = sorted((path, list(x.shape), int(sums[path])) for path, x in flat.items())
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
