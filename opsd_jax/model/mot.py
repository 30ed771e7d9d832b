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

    The last `latents` positions run through the expert `gen`, the others through `und`. The
    boundary is static, so that each expert computes its own positions only.
    """

    config: ModelConfig
    latents: int = 0

    def setup(self):
        self.und = Expert(self.config.llm, self.config.lora)
        if self.config.generation:
            self.gen = Expert(self.config.llm)

    def _route(self, method, *args):
        if not self.latents:
            return getattr(self.und, method)(*args)
        cut = args[0].shape[1] - self.latents
        mine = getattr(self.und, method)(*(x[:, :cut] for x in args))
        other = getattr(self.gen, method)(*(x[:, cut:] for x in args))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), mine, other)

    def __call__(self, carry, rope, mask, offset, record=None, deep=None):
        x, cache, layer = carry
        x = sharding.constrain_batch(x)
        q, k, v = self._route("qkv", x)
        q, k = attention.rotate(q, rope), attention.rotate(k, rope)
        if cache is not None:
            cache = {
                name: jax.lax.dynamic_update_slice(
                    cache[name], new[None].astype(cache[name].dtype), (layer, 0, offset, 0, 0)
                )
                for name, new in (("k", k), ("v", v))
            }
        if isinstance(mask, masks.KeyBlocks):
            attended = attention.attend_to_blocks(q, cache["k"], cache["v"], layer, mask)
        else:
            if cache is not None:
                k, v = (
                    jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False).astype(x.dtype)
                    for name in ("k", "v")
                )
            attended = attention.attend(
                q, k, v, mask, self.config.query_block, self.config.attention
            )
        x = self._route("output", x, attended)
        if deep is not None:
            x = _add_features(x, deep, layer)
        shares = None
        if record is not None:
            seen, groups = record
            shares = attention.shares(q, k, seen, groups, self.config.query_block)
        return (sharding.constrain_batch(x), cache, layer + 1), shares


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
        laid: Any = masks.lay_out(mask, x.shape[1], self.config.attention)
        size, columns = self.config.key_block, mask.key_segment.shape[1]
        if cache is not None and x.shape[1] == 1 and 0 < size < columns:
            laid = masks.key_blocks(mask, size)
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
        )(self.config, self.latents, name="layers")
        (x, cache, _), shares = layers((x, cache, jnp.int32(0)), rope, laid, offset, record, deep)
        cut = x.shape[1] - self.latents
        norm = self.param("norm", nn.initializers.ones, (c.hidden_size,))
        hidden = rms_norm(x[:, :cut], norm, c.rms_norm_eps)
        if self.config.generation:
            norm_gen = self.param("norm_gen", nn.initializers.ones, (c.hidden_size,))
            if self.latents:
                hidden = jnp.concatenate(
                    [hidden, rms_norm(x[:, cut:], norm_gen, c.rms_norm_eps)], axis=1
                )
        return (hidden, cache) if groups is None else (hidden, cache, shares)
