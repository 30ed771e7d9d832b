"""Sizes of the network, as frozen (hashable) dataclasses, so that they can be static arguments of `jax.jit`.

Numbers only: 7B and the laptop miniature differ here and nowhere else.
"""

import dataclasses
from typing import Annotated

from opsd_jax.inputs import checks
from opsd_jax.params import LORA_TARGETS

ATTENTION = ("dense", "flash", "cudnn", "flash_interpret")
MULTIPLIER = "[1, inf)"  # range of each of VAEConfig.multipliers


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Qwen2 mixture-of-transformers decoder (official: modeling/bagel/qwen2_navit.py)."""

    vocab_size: Annotated[int, "[1, inf)"]
    hidden_size: Annotated[int, "[1, inf)"]
    num_layers: Annotated[int, "[1, inf)"]
    num_heads: Annotated[int, "[1, inf)"]
    num_kv_heads: Annotated[int, "[1, inf)"]
    intermediate_size: Annotated[int, "[1, inf)"]
    rope_theta: Annotated[float, "(0, inf)"] = 1e6
    rms_norm_eps: Annotated[float, "(0, 1]"] = 1e-6
    head_dim: Annotated[int, "[0, inf)"] = 0  # 0: hidden_size // num_heads

    def __post_init__(self):
        checks.fields(self, "model.llm")
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"model.llm.hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                    "set head_dim or change one of them"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.llm.num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.llm.head_dim {self.head_dim} is odd: rotary positions turn pairs of values"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"model.llm.hidden_size {self.hidden_size} is not divisible by 4, as the table of 2-D positions "
                "needs"
            )


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """SigLIP NaViT encoder. `num_layers` counts the layers that run (the release configures 27, keeps 26)."""

    hidden_size: Annotated[int, "[1, inf)"]
    num_layers: Annotated[int, "[1, inf)"]
    num_heads: Annotated[int, "[1, inf)"]
    intermediate_size: Annotated[int, "[1, inf)"]
    patch_size: Annotated[int, "[1, inf)"] = 14
    side: Annotated[int, "[1, inf)"] = (
        70  # patches a side of the position tables: patch id = row * side + column
    )
    layer_norm_eps: Annotated[float, "(0, 1]"] = 1e-6

    def __post_init__(self):
        checks.fields(self, "model.vit")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.vit.hidden_size {self.hidden_size} is not divisible by its num_heads {self.num_heads}"
            )

    @property
    def patch_dim(self) -> int:
        return self.patch_size * self.patch_size * 3


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """FLUX autoencoder (official: modeling/autoencoder.py, which hard-codes these defaults).

    `multipliers`: channels of each resolution, in units of `channels`; between two of them the picture is halved.
    `scale`, `shift`: a latent is scale * (z - shift).
    """

    channels: Annotated[int, "[1, inf)"] = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, "[1, inf)"] = 2
    z_channels: Annotated[int, "[1, inf)"] = 16
    scale: Annotated[float, "(0, inf)"] = 0.3611
    shift: Annotated[float, "(-inf, inf)"] = 0.1159

    def __post_init__(self):
        checks.fields(self, "model.generation")
        if not self.multipliers:
            raise ValueError(
                "model.generation.multipliers is empty: give the channels of at least one resolution"
            )
        for factor in self.multipliers:
            checks.number("model.generation.multipliers, of which one", factor, int, MULTIPLIER)
        if self.channels % 32:
            raise ValueError(
                f"model.generation.channels is {self.channels}: group norms need a multiple of 32"
            )

    @property
    def downsample(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What drawing adds to the network: the generation expert, the latent path and the autoencoder.

    `patch`: latents a side of one token. `side`: tokens a side of the latent position table.
    `timestep_shift`: of the training times (sampling has its own, `flow.FlowConfig`).
    """

    vae: VAEConfig = VAEConfig()
    patch: Annotated[int, "[1, inf)"] = 2
    side: Annotated[int, "[1, inf)"] = 64
    timestep_shift: Annotated[float, "(0, inf)"] = 1.0

    def __post_init__(self):
        checks.fields(self, "model.generation")

    @property
    def latent_dim(self) -> int:
        """Values of one latent token."""
        return self.patch * self.patch * self.vae.z_channels

    @property
    def stride(self) -> int:
        """Pixels a side of one latent token; both sides of a drawn image are multiples of it."""
        return self.patch * self.vae.downsample


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of the understanding expert: alpha / rank * a b is added to each target matrix.

    They are then all that is trained (`params.partition`). targets: of LORA_TARGETS.
    """

    rank: Annotated[int, "[1, inf)"]
    alpha: Annotated[float, "(0, inf)"]
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self):
        checks.fields(self, "lora")
        if not self.targets:
            raise ValueError(
                f"lora.targets is empty, so rank {self.rank} adapts nothing: name some of {LORA_TARGETS}"
            )
        if len({*self.targets} & {*LORA_TARGETS}) != len(self.targets):
            raise ValueError(
                f"lora.targets is {self.targets}: choose from {LORA_TARGETS}, each once at most"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole network and how it is computed.

    `generation`: sizes of what draws. None where nothing draws: the generation expert (`*_moe_gen` weights), the
    latent path and the autoencoder are then not in the parameter tree and cost no memory at all.
    `lora`: adapters beside matrices of the understanding expert; None for none.
    `dtype`: compute dtype, "float32" or "bfloat16"; parameters keep their own dtype.
    `remat`: "none" saves all activations of a block for the backward pass, "full" recomputes them.
    `unroll`: layers of the scan that are unrolled (a CPU gains about a fifth on shallow models).
    `attention`: "dense" (scores in memory), "flash" (own kernel, TPU), "cudnn" (cuDNN's kernel, GPU, bfloat16) or
    "flash_interpret" (the TPU kernel run slowly anywhere, for tests); see `attention`. The autoencoder, with one head
    of all channels, is always dense.
    `rope_bfloat16`: round the decoder's rotary frequencies (inv_freq) to bfloat16, up to 0.37 % off, as the official
    trainer does under FSDP, which casts buffers. The official inference code does not.
    `query_block`: dense attention scores are computed for this many queries at a time; 0 for all at once. A drawn image
    of 4,096 tokens behind a long context needs it: scores at once would take tens of GiB.
    """

    llm: LLMConfig
    vit: ViTConfig
    generation: GenerationConfig | None = None
    lora: LoRAConfig | None = None
    dtype: str = "float32"
    remat: str = "none"
    unroll: Annotated[int, "[1, inf)"] = 1
    query_block: Annotated[int, "[0, inf)"] = 0
    attention: str = "dense"
    rope_bfloat16: bool = False

    def __post_init__(self):
        checks.fields(self, "model")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype is {self.dtype!r}: use 'float32' or 'bfloat16'")
        if self.remat not in ("none", "full"):
            raise ValueError(f"model.remat is {self.remat!r}: use 'none' or 'full'")
        if self.attention not in ATTENTION:
            raise ValueError(f"model.attention is {self.attention!r}: choose from {ATTENTION}")
