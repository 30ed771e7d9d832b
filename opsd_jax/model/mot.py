"""The decoder: a mixture of transformers with two sets of weights, one attention, scanned layers.

Text, image delimiters and ViT tokens run through the understanding expert `und`, latent tokens
through the generation expert `gen` (official: modeling/bagel/qwen2_navit.py, Qwen2MoTDecoderLayer).
Decoders of other families (Qwen2, Qwen3, Llama) are `und` alone; `LLMConfig` says which biases and
norms they have.

Letters: as in `attention`; L layers, D embedding.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opsd_jax import sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.model import attention, masks
from opsd_jax.model.config import LLMConfig, LoRAConfig, ModelConfig
from opsd_jax.model.layers import dense, matrix_init

Cache = dict[str, Float[Array, "L B S K h"]]  # "k" and "v" of all layers


def _residual(layers):
    """Initializer of matrices that write to the residual stream: smaller for more layers."""
    return nn.initializers.variance_scaling(0.5 / layers, "fan_in", "truncated_normal")


def rms_norm(
    x: Float[AnyArray, "*any D"], scale: Float[AnyArray, " D"], eps: float
) -> Float[Array, "*any D"]:
    """RMS norm of x [..., D] over the last axis, in float32; keeps the dtype of x."""
    y = jnp.asarray(x, jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


class Expert(nn.Module):
    """One expert in one layer: its weights, and what it computes around the shared attention.

    lora: adapters of the expert's matrices, x W + alpha / rank (x a) b with b = 0 at the start;
      None for no adapters.
    """

    config: LLMConfig
    lora: LoRAConfig | None = None

    def setup(self):
        c = self.config
        d, h, f = c.hidden_size, c.head_dim, c.intermediate_size
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        self.input_norm = self.param("input_norm", ones, (d,))

        def matrix(name, init, shape, biased):
            setattr(self, f"{name}_kernel", self.param(f"{name}_kernel", init, shape))
            bias = self.param(f"{name}_bias", zeros, shape[1:]) if biased else None
            setattr(self, f"{name}_bias", bias)

        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            matrix(name, matrix_init, (d, heads * h), c.qkv_bias)
        # Normalised q and k bound a score by sqrt(h). Small heads start with larger gains, so that
        # attention can be as sharp from the start as with the official model's heads of 128.
        gain = nn.initializers.constant((128 / h) ** 0.25)
        if c.qk_norm:
            self.q_norm = self.param("q_norm", gain, (h,))
            self.k_norm = self.param("k_norm", gain, (h,))
        matrix("o", _residual(c.num_layers), (c.num_heads * h, d), c.output_bias)
        self.post_norm = self.param("post_norm", ones, (d,))
        matrix("gate", matrix_init, (d, f), c.mlp_bias)
        matrix("up", matrix_init, (d, f), c.mlp_bias)
        matrix("down", _residual(c.num_layers), (f, d), c.mlp_bias)
        if self.lora:
            for name in self.lora.targets:
                width, out = getattr(self, f"{name}_kernel").shape
                setattr(
                    self,
                    f"{name}_lora_a",
                    self.param(f"{name}_lora_a", matrix_init, (width, self.lora.rank)),
                )
                setattr(
                    self,
                    f"{name}_lora_b",
                    self.param(f"{name}_lora_b", zeros, (self.lora.rank, out)),
                )

    def _dense(self, name, x):
        """x [..., in] times the matrix `name`, plus its bias and its adapter if any: [..., out]."""
        scale = f"{name}_scale"  # of a matrix in int8
        y = dense(
            x,
            getattr(self, f"{name}_kernel"),
            getattr(self, f"{name}_bias"),
            self.get_variable("params", scale) if self.has_variable("params", scale) else None,
        )
        if self.lora is None or name not in self.lora.targets:
            return y
        low = dense(x, getattr(self, f"{name}_lora_a"))
        return y + self.lora.scale * dense(low, getattr(self, f"{name}_lora_b"))

    def qkv(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
        """x [B, T, D] -> q [B, T, H, h], k [B, T, K, h] and v [B, T, K, h].

        q and k are normalised if the decoder does that. Rotary positions are not applied yet.
        """
        c = self.config
        x = rms_norm(x, self.input_norm, c.rms_norm_eps)

        def heads(name):
            y = self._dense(name, x)
            return y.reshape(*y.shape[:2], -1, c.head_dim)

        q, k = heads("q"), heads("k")
        if c.qk_norm:
            q = rms_norm(q, self.q_norm, c.rms_norm_eps)
            k = rms_norm(k, self.k_norm, c.rms_norm_eps)
        return q, k, heads("v")

    def output(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T _"]
    ) -> Float[Array, "B T D"]:
        """Residual stream x [B, T, D] with attention output [B, T, H * h] and gated MLP added."""
        x = x + self._dense("o", attended)
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.post_norm, self.config.rms_norm_eps)
            gated = jax.nn.silu(self._dense("gate", y)) * self._dense("up", y)
            return x + self._dense("down", gated)


class Deep(NamedTuple):
    """Features of images that are added to hidden states after the first layers (DeepStack).

    features: [N, B, M, D], those of M tokens of images for each of the first N layers.
    positions: int32 [B, M], position of each token; T at padding.
    """

    features: AnyArray
    positions: AnyArray


def _add_features(
    x: Float[Array, "B T D"], deep: Deep, layer: Int[Array, ""]
) -> Float[Array, "B T D"]:
    """x [B, T, D] with the features that belong after a layer, if any do.

    The features of all layers are an input of the scan as a whole. Padded with zeros to one input
    for each layer, they would take num_layers / N times the memory.
    """
    count = deep.features.shape[0]

    def add(x):
        own = jax.lax.dynamic_index_in_dim(deep.features, layer, keepdims=False)
        sequence = jnp.arange(x.shape[0])[:, None]
        return x.at[sequence, deep.positions].add(own.astype(x.dtype), mode="drop")

    return jax.lax.cond(layer < count, add, lambda x: x, x)


class Block(nn.Module):
    """One decoder layer.

    The carry of the scan is (x, cache, layer). A cache passed as scan inputs and outputs would be
    copied whole at every decode step.

    Hidden states, rotary tables and masks of queries are tuples of one entry for each expert, `und`
    and then `gen`; of one entry where no position is a latent token. Joined in each layer, 2 and
    4,096 positions would make blocks of 4,098, which no chip divides evenly.
    """

    config: ModelConfig

    def setup(self):
        self.und = Expert(self.config.llm, self.config.lora)
        if self.config.generation:
            self.gen = Expert(self.config.llm)

    def __call__(self, carry, ropes, laid, offset, record=None, deep=None):
        xs, cache, layer = carry
        c, dtype = self.config, xs[0].dtype
        experts = (self.und, self.gen) if len(xs) > 1 else (self.und,)
        xs = [sharding.constrain_batch(x) for x in xs]
        queries, keys, values = [], [], []
        for expert, x, rope in zip(experts, xs, ropes, strict=True):
            q, k, v = expert.qkv(x)
            queries.append(attention.rotate(q, rope))
            keys.append(attention.rotate(k, rope))
            values.append(v)
        if cache is None:
            k, v = _joined(keys), _joined(values)
        else:
            cache = {
                "k": _written(cache["k"], keys, layer, offset),
                "v": _written(cache["v"], values, layer, offset),
            }
            k, v = (
                jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False).astype(dtype)
                for name in ("k", "v")
            )

        def attend(q, mask):
            if isinstance(mask, masks.KeyBlocks):
                return attention.attend_to_blocks(q, cache["k"], cache["v"], layer, mask)
            return attention.attend(q, k, v, mask, c.query_block, c.attention)

        xs = [
            expert.output(x, attend(q, mask))
            for expert, x, q, mask in zip(experts, xs, queries, laid, strict=True)
        ]
        if deep is not None:  # of models whose positions are all of one expert
            xs[0] = _add_features(xs[0], deep, layer)
        shares = None
        if record is not None:
            seen, groups = record
            shares = attention.shares(_joined(queries), k, seen, groups, c.query_block)
        return (tuple(map(sharding.constrain_batch, xs)), cache, layer + 1), shares


def _joined(parts: list[Float[Array, "B _ K h"]]) -> Float[Array, "B T K h"]:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _written(
    cache: Float[Array, "L B S K h"],
    parts: list[Float[Array, "B _ K h"]],
    layer: Int[Array, ""],
    offset: Int[Array, ""] | int,
) -> Float[Array, "L B S K h"]:
    """The cache with the keys of a layer at the columns from `offset` on, part after part."""
    for part in parts:
        cache = jax.lax.dynamic_update_slice(
            cache, part[None].astype(cache.dtype), (layer, 0, offset, 0, 0)
        )
        offset = offset + part.shape[1]
    return cache


def _divided(x: AnyArray, cut: int) -> tuple[AnyArray, AnyArray]:
    """x [B, T, ...] before and after a position; twice x [B, 1, ...], which holds for all."""
    return (x, x) if x.shape[1] == 1 else (x[:, :cut], x[:, cut:])


def _divided_mask(mask: masks.Mask, cut: int) -> list[masks.Mask]:
    """The masks of the queries before and after a position."""
    vectors = {
        name: _divided(x, cut)
        for name, x in mask._asdict().items()
        if x is not None and not name.startswith("key")
    }
    return [mask._replace(**{name: x[n] for name, x in vectors.items()}) for n in (0, 1)]


class Decoder(nn.Module):
    """The decoder stack with its embedding table and output head.

    `__call__` maps embeddings x [B, T, D] to normalised hidden states [B, T, D]. With a cache the
    new keys are written at columns offset .. offset + T - 1 of its S columns, and queries attend to
    all columns that the mask allows. positions: rope positions [B, T], or [B, 1] if all are equal;
    [B, T, 3] where they have three dimensions.
    The last `latents` of the T positions are latent tokens. Returns (hidden, cache).

    deep: `Deep`; None where nothing is added to the hidden states.
    groups: `attention.Groups`. Their shares of attention in each layer, float32 [L, B, M, N], are
      then a third result; None for no record.

    Raises:
      ValueError: `latents` is given, but the model has no generation expert.
    """

    config: ModelConfig
    latents: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[AnyArray, "B _"] | Int[AnyArray, "B _ 3"],
        mask: masks.Mask,
        deep: Deep | None = None,
        cache: Cache | None = None,
        offset: Int[Array, ""] | int = 0,
        groups: attention.Groups | None = None,
    ):
        c = self.config.llm
        self.param(
            "embed", nn.initializers.normal(c.hidden_size**-0.5), (c.vocab_size, c.hidden_size)
        )
        if not c.tied_head:
            self.param("head", matrix_init, (c.hidden_size, c.vocab_size))
        if self.latents and not self.config.generation:
            raise ValueError(
                "latent tokens need the generation expert, which this model does not have: set "
                "model.generation"
            )
        rope = attention.rope_tables(
            positions,
            c.head_dim,
            c.rope_theta,
            self.config.rope_bfloat16,
            c.rope_llama3,
            attention.rope_axes(c.mrope, c.mrope_interleaved),
        )
        record = None if groups is None else (mask, groups)
        xs, ropes, parts, cut = [x], [rope], [mask], x.shape[1] - self.latents
        if self.latents:
            xs, parts = [x[:, :cut], x[:, cut:]], _divided_mask(mask, cut)
            ropes = list(zip(*(_divided(table, cut) for table in rope)))
        laid: list[Any] = [
            masks.lay_out(mask, x.shape[1], self.config.attention) for x, mask in zip(xs, parts)
        ]
        size, columns = self.config.key_block, mask.key_segment.shape[1]
        if cache is not None and x.shape[1] == 1 and 0 < size < columns:
            laid = [masks.key_blocks(mask, size)]
        block = Block
        if self.config.remat == "full":
            block = nn.remat(Block, prevent_cse=False)  # inside a scan, CSE cannot undo it
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            in_axes=(nn.broadcast,) * 5,
            unroll=self.config.unroll,
        )(self.config, name="layers")
        carry = (tuple(xs), cache, jnp.int32(0))
        (xs, cache, _), shares = layers(carry, tuple(ropes), tuple(laid), offset, record, deep)
        norm = self.param("norm", nn.initializers.ones, (c.hidden_size,))
        normed = [rms_norm(xs[0], norm, c.rms_norm_eps)]
        if self.config.generation:
            norm_gen = self.param("norm_gen", nn.initializers.ones, (c.hidden_size,))
            normed += [rms_norm(x, norm_gen, c.rms_norm_eps) for x in xs[1:]]
        hidden = jnp.concatenate(normed, axis=1) if self.latents else normed[0]
        return (hidden, cache) if groups is None else (hidden, cache, shares)
