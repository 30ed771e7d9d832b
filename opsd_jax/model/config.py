"""Sizes of the network, as frozen (hashable) dataclasses, so that they can be static arguments of `jax.jit`.

Numbers only: 7B and the laptop miniature differ here and nowhere else.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Qwen2 mixture-of-transformers decoder (official: modeling/bagel/qwen2_navit.py)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    head_dim: int = 0  # 0: hidden_size // num_heads

    def __post_init__(self):
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                    "set head_dim or change one of them")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """SigLIP NaViT encoder. `num_layers` counts the layers that run (the release configures 27, keeps 26)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int = 14
    side: int = 70  # patches a side of the position tables: patch id = row * side + column
    layer_norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        return self.patch_size * self.patch_size * 3


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole network and how it is computed.

    `generation`: whether the generation expert (`*_moe_gen` weights) is in the parameter tree. False where
    nothing draws: it then costs no memory at all.
    `dtype`: compute dtype, "float32" or "bfloat16"; parameters keep their own dtype.
    `remat`: "none" saves all activations of a block for the backward pass, "full" recomputes them.
    `unroll`: layers of the scan that are unrolled (a CPU gains about a fifth on shallow models).
    """

    llm: LLMConfig
    vit: ViTConfig
    generation: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}: use 'float32' or 'bfloat16'")
        if self.remat not in ("none", "full"):
            raise ValueError(f"model.remat is {self.remat!r}: use 'none' or 'full'")
