"""Facts about each parameter, once: its axes, its group, its name in the released checkpoints.

Freezing, optimizer slots, EMA, shardings, import and export are readings of this table. Parameters live in one
plain nested dict; a path such as "llm/layers/und/q_kernel" names a leaf. Leaves under "layers" are stacked over
layers (first axis), checkpoints hold them one by one ({layer} in the name). Linear kernels are [in, out] here and
[out, in] there. Adapters (LoRA) are unknown to released checkpoints: `merge_lora` adds them to the matrices.
"""

import dataclasses
import hashlib
import json
import math
import re

import jax
import jax.numpy as jnp

LORA_TARGETS = (
    "q",
    "k",
    "v",
    "o",
    "gate",
    "up",
    "down",
)  # matrices of a decoder layer that can have adapters


@dataclasses.dataclass(frozen=True)
class Fact:
    """One parameter: path, logical axes (see `sharding`), group, checkpoint name (None: releases do not
    know it), and `order`: our axes as axes of the checkpoint's tensor, None if they are the same."""

    path: str
    axes: tuple[str | None, ...]
    group: str
    name: str | None
    order: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def file(self) -> str:
        """Which file of a release holds it: "model" or, for the autoencoder, "ae"."""
        return "ae" if self.group == "vae" else "model"

    def ours(self, tensor):
        """A tensor of the checkpoint (of one layer) with our axes."""
        return tensor if self.order is None else tensor.transpose(self.order)

    def theirs(self, array):
        """Inverse of `ours`."""
        return (
            array
            if self.order is None
            else array.transpose([self.order.index(n) for n in range(array.ndim)])
        )

    def their_shape(self, shape) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor for our shape (of one layer)."""
        return (
            tuple(shape)
            if self.order is None
            else tuple(shape[self.order.index(n)] for n in range(len(shape)))
        )


def _linear(path, name, axes, group, bias=True):
    rows = [Fact(f"{path}_kernel", axes, group, f"{name}.weight", order=(1, 0))]
    if bias:
        rows.append(Fact(f"{path}_bias", axes[:-2] + axes[-1:], group, f"{name}.bias"))
    return rows


def _expert(expert, group):
    """One expert's rows; the generation expert's modules carry the suffix _moe_gen in the checkpoint."""
    ours, gen = f"llm/layers/{expert}", "_moe_gen" if expert == "gen" else ""
    theirs = "language_model.model.layers.{layer}"
    rows = []
    for letter, axis in (("q", "heads"), ("k", "kv"), ("v", "kv")):
        rows += _linear(
            f"{ours}/{letter}",
            f"{theirs}.self_attn.{letter}_proj{gen}",
            ("layers", "embed", axis),
            group,
        )
    rows += _linear(
        f"{ours}/o",
        f"{theirs}.self_attn.o_proj{gen}",
        ("layers", "heads", "embed"),
        group,
        bias=False,
    )
    for word, axes in (
        ("gate", ("layers", "embed", "mlp")),
        ("up", ("layers", "embed", "mlp")),
        ("down", ("layers", "mlp", "embed")),
    ):
        rows += _linear(f"{ours}/{word}", f"{theirs}.mlp{gen}.{word}_proj", axes, group, bias=False)
    for path, name in (
        ("q_norm", f"self_attn.q_norm{gen}"),
        ("k_norm", f"self_attn.k_norm{gen}"),
        ("input_norm", f"input_layernorm{gen}"),
        ("post_norm", f"post_attention_layernorm{gen}"),
    ):
        rows.append(Fact(f"{ours}/{path}", ("layers", None), group, f"{theirs}.{name}.weight"))
    return rows


def _vit():
    base, layer = "vit_model.vision_model", "vit_model.vision_model.encoder.layers.{layer}"
    rows = _linear("vit/patch", f"{base}.embeddings.patch_embedding", (None, "vit_embed"), "vit")
    rows.append(
        Fact(
            "vit/position",
            (None, "vit_embed"),
            "vit",
            f"{base}.embeddings.position_embedding.weight",
        )
    )
    for ours, theirs, axes in (
        ("q", "self_attn.q_proj", ("vit_embed", "vit_heads")),
        ("k", "self_attn.k_proj", ("vit_embed", "vit_heads")),
        ("v", "self_attn.v_proj", ("vit_embed", "vit_heads")),
        ("o", "self_attn.out_proj", ("vit_heads", "vit_embed")),
        ("fc1", "mlp.fc1", ("vit_embed", "vit_mlp")),
        ("fc2", "mlp.fc2", ("vit_mlp", "vit_embed")),
    ):
        rows += _linear(f"vit/layers/{ours}", f"{layer}.{theirs}", ("layers", *axes), "vit")
    norms = [
        ("vit/layers/norm1", f"{layer}.layer_norm1", ("layers", None)),
        ("vit/layers/norm2", f"{layer}.layer_norm2", ("layers", None)),
        ("vit/post_norm", f"{base}.post_layernorm", (None,)),
    ]
    for ours, theirs, axes in norms:
        rows += [
            Fact(f"{ours}_scale", axes, "vit", f"{theirs}.weight"),
            Fact(f"{ours}_bias", axes, "vit", f"{theirs}.bias"),
        ]
    return rows


TABLE = {
    fact.path: fact
    for fact in [
        Fact("llm/embed", ("vocab", "embed"), "embed", "language_model.model.embed_tokens.weight"),
        Fact(
            "llm/head", ("embed", "vocab"), "embed", "language_model.lm_head.weight", order=(1, 0)
        ),
        Fact("llm/norm", (None,), "und", "language_model.model.norm.weight"),
        Fact("llm/norm_gen", (None,), "gen", "language_model.model.norm_moe_gen.weight"),
        *_expert("und", "und"),
        *_expert("gen", "gen"),
        *_vit(),
        *_linear("connector/fc1", "connector.fc1", (None, "embed"), "connector"),
        *_linear("connector/fc2", "connector.fc2", (None, "embed"), "connector"),
        Fact("connector/position_table", (None, "embed"), "fixed", "vit_pos_embed.pos_embed"),
        *_linear("latent/time_fc1", "time_embedder.mlp.0", (None, "embed"), "latent"),
        *_linear("latent/time_fc2", "time_embedder.mlp.2", (None, "embed"), "latent"),
        *_linear("latent/in", "vae2llm", (None, "embed"), "latent"),
        *_linear("latent/out", "llm2vae", ("embed", None), "latent"),
        Fact("latent/position_table", (None, "embed"), "fixed", "latent_pos_embed.pos_embed"),
    ]
}

GROUPS = ("embed", "und", "gen", "vit", "connector", "latent", "vae", "fixed", "lora")
DRAWING = ("gen", "latent")  # trained only where something is drawn


def flatten(tree) -> dict:
    """Nested dict -> {"a/b/c": leaf}."""
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def unflatten(flat: dict) -> dict:
    """{"a/b/c": leaf} -> nested dict."""
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# The autoencoder's names follow from its paths, because how many blocks it has is a matter of its config:
# vae/encoder/down_0_block_1/conv1_kernel is encoder.down.0.block.1.conv1.weight of ae.safetensors.
_VAE_PATH = re.compile(
    r"vae/(?P<side>encoder|decoder)/((?P<level>(down|up)_\d+|mid)_(?P<block>(block|attn)_\d+|downsample|upsample)/)?"
    r"(?P<module>\w+)_(?P<kind>kernel|bias|scale)"
)


def _vae_fact(path):
    match = _VAE_PATH.fullmatch(path)
    if not match:
        return None
    level, block, module, kind = match["level"], match["block"], match["module"], match["kind"]
    parts = [match["side"]]
    if level:
        # down_0 -> down.0; blocks of a resolution are a list (block.1), those in the middle are not (block_1)
        parts += [level.replace("_", "."), block if level == "mid" else block.replace("_", ".")]
    name = ".".join([*parts, module, "bias" if kind == "bias" else "weight"])
    if kind == "kernel":  # HWIO here, OIHW there
        return Fact(path, (None,) * 4, "vae", name, order=(2, 3, 1, 0))
    return Fact(path, (None,), "vae", name)


# The factors of an adapter lie like the matrix they are beside: a [L, in, r] is cut as its input, b [L, r, out] as its
# output. "llm/layers/und/q_lora_a" is beside "llm/layers/und/q_kernel".
_LORA_PATH = re.compile(
    rf"(?P<matrix>llm/layers/und/({'|'.join(LORA_TARGETS)}))_lora_(?P<factor>[ab])"
)


def _lora_fact(path):
    match = _LORA_PATH.fullmatch(path)
    if not match:
        return None
    layers, into, out = TABLE[f"{match['matrix']}_kernel"].axes
    return Fact(
        path, (layers, into, None) if match["factor"] == "a" else (layers, None, out), "lora", None
    )


def find(path: str) -> Fact | None:
    """The facts of a path, or None if it is no parameter's."""
    return TABLE.get(path) or _vae_fact(path) or _lora_fact(path)


def fact(path: str) -> Fact:
    """The facts of a path. KeyError for a parameter that is not known here."""
    row = find(path)
    if row is None:
        raise KeyError(
            f"parameter {path!r} has no row in opsd_jax/params.py: add its axes, group and checkpoint name"
        )
    return row


def partition(params, freeze=(), *, drawing: bool = False):
    """Splits params into (trainable, frozen) nested dicts without common leaves; `merge` puts them together.

    `freeze`: names from GROUPS. "fixed" (the 2-D position tables) and "vae" are always frozen, as officially;
    so is what only draws (`DRAWING`: it gets no gradient from text) unless `drawing` is set. Params with adapters
    (group "lora") train these alone.
    ValueError for an unknown group, for `freeze` with adapters, or when nothing is left to train.
    """
    unknown = set(freeze) - set(GROUPS)
    if unknown:
        raise ValueError(
            f"freeze names unknown parameter groups {sorted(unknown)}: choose from {GROUPS}"
        )
    frozen_groups = {"fixed", "vae", *freeze, *(() if drawing else DRAWING)}
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if fact(path).group not in frozen_groups}
    adapters = {path: leaf for path, leaf in flat.items() if fact(path).group == "lora"}
    if adapters and freeze:
        raise ValueError(
            f"freeze={tuple(freeze)} with LoRA, which trains its adapters alone: leave freeze empty"
        )
    trainable = adapters or trainable
    if not trainable:
        raise ValueError(f"freeze={tuple(freeze)} leaves no parameter to train")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable, frozen):
    """Inverse of `partition`."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def adapters_of(path: str) -> tuple[str, str] | None:
    """Paths of the two factors (a, b) of the adapter that a matrix may have; None where there never is one."""
    pair = tuple(f"{path.removesuffix('_kernel')}_lora_{factor}" for factor in "ab")
    return pair if path.endswith("_kernel") and find(pair[0]) else None


def merge_matrix(kernel, a, b, lora):
    """kernel [..., in, out] + alpha / rank * a [..., in, r] b [..., r, out]: in float32, then in the kernel's dtype."""
    product = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + lora.scale * product).astype(kernel.dtype)


def merge_lora(params, lora):
    """Params without adapters that compute the same: each is added to its matrix.

    lora: the LoRAConfig that the params were made with. ValueError if they hold other adapters.
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
            f"the parameters have adapters of other targets or ranks than {lora}: {held or 'none'}"
        )
    merged = {path: leaf for path, leaf in flat.items() if path not in adapters}
    for path, leaf in merged.items():
        pair = adapters_of(path)
        if pair and pair[0] in adapters:
            merged[path] = merge_matrix(leaf, *(adapters[factor] for factor in pair), lora)
    return unflatten(merged)


def in_compute_dtype(params, dtype: str):
    """Parameters as the forward pass uses them: all but the norms' scales in the compute dtype (each use would cast
    them to it anyway, so results are the same), for programs that read them many times."""
    cast = lambda path, leaf: leaf if "norm" in path.rsplit("/", 1)[-1] else leaf.astype(dtype)
    return unflatten({path: cast(path, leaf) for path, leaf in flatten(params).items()})


def count(params) -> dict[str, int]:
    """Number of parameters by group, with their "total"."""
    counts = dict.fromkeys(GROUPS, 0)
    for path, leaf in flatten(params).items():
        counts[fact(path).group] += math.prod(leaf.shape)
    counts["total"] = sum(counts.values())
    return {group: n for group, n in counts.items() if n}


@jax.jit
def _checksums(flat):
    """uint32 of each array: its bits, each times an odd number of its place, modulo 2^32. The order in which devices
    add makes no difference."""

    def one(x):
        bits, place = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), jnp.uint32(0)
        for axis in range(x.ndim):
            place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(
                jnp.uint32, x.shape, axis
            )
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(one, flat)


def fingerprint(params) -> str:
    """Checksum of weights, computed where they are: it changes with any of them, and not with their layout on devices."""
    flat = flatten(params)
    sums = jax.device_get(_checksums(flat))
    facts = sorted((path, list(x.shape), int(sums[path])) for path, x in flat.items())
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _released(path):
    row = fact(path)
    if row.name is None:
        raise ValueError(
            f"{path} is an adapter, which released checkpoints do not know: merge_lora first"
        )
    return row


def from_checkpoint(path: str, tensors: list):
    """Checkpoint tensors of a parameter (one, or one a layer in order) -> our array. ValueError for an adapter's."""
    row = _released(path)
    arrays = [row.ours(t) for t in tensors]
    return jnp.stack(arrays) if row.stacked else jnp.asarray(arrays[0])


def to_checkpoint(path: str, array) -> dict:
    """Our array -> {checkpoint name: tensor}, one a layer for stacked parameters. ValueError for an adapter's."""
    row = _released(path)
    if not row.stacked:
        return {row.name: row.theirs(array)}
    return {row.name.format(layer=n): row.theirs(a) for n, a in enumerate(array)}
