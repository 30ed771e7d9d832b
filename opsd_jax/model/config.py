"""Sizes of the network as frozen (hashable) dataclasses, static arguments of `jax.jit`.

They hold numbers and names only: the 7B model and the miniature differ here and nowhere else.
"""

import dataclasses
from typing import Annotated

from opsd_jax.inputs import checks
from opsd_jax.params import LORA_TARGETS

ATTENTION = ("dense", "auto", "flash", "cudnn", "flash_interpret")
TOWERS = ("siglip", "qwen2_5_vl", "qwen3_vl")


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """The decoder. Defaults are those of BAGEL's Qwen2 (official: modeling/bagel/qwen2_navit.py).

    head_dim: size of a head; num_heads * head_dim need not be hidden_size.
    qkv_bias, output_bias, mlp_bias: whether the projections to q, k and v, the output projection,
      and the three matrices of the MLP have biases.
    qk_norm: whether q and k are normalised per head before rotary positions are applied.
    tied_head: whether the output head is the embedding table. There is no parameter "head" then.
    rope_llama3: the frequencies of rotary positions are scaled as in Llama 3 by (factor,
      low_freq_factor, high_freq_factor, original_max_position_embeddings), see
      `attention.rope_frequencies`; () for no scaling.
    mrope: number of frequencies of rotary positions that turn with time, with the row and with the
      column of a position, for positions of three dimensions; () for positions of one.
    mrope_interleaved: whether the three kinds of frequencies alternate (Qwen3-VL), or follow one
      another (Qwen2.5-VL); see `attention.rope_axes`.
    """

    vocab_size: Annotated[int, "[1, inf)"]
    hidden_size: Annotated[int, "[1, inf)"]
    num_layers: Annotated[int, "[1, inf)"]
    num_heads: Annotated[int, "[1, inf)"]
    num_kv_heads: Annotated[int, "[1, inf)"]
    intermediate_size: Annotated[int, "[1, inf)"]
    rope_theta: Annotated[float, "(0, inf)"] = 1e6
    rms_norm_eps: Annotated[float, "(0, 1]"] = 1e-6
    head_dim: Annotated[int, "[0, inf)"] = 0  # 0: hidden_size // num_heads
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    tied_head: bool = False
    rope_llama3: Annotated[tuple[float, ...], "(0, inf)"] = ()
    mrope: Annotated[tuple[int, ...], "[0, inf)"] = ()
    mrope_interleaved: bool = False

    def __post_init__(self):
        checks.fields(self, "model.llm")
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"model.llm.hidden_size {self.hidden_size} is not divisible by num_heads "
                    f"{self.num_heads}: set head_dim or change one of them"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.llm.num_heads {self.num_heads} must be a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.llm.head_dim {self.head_dim} is odd: make it even, since rotary positions "
                "rotate pairs of values"
            )
        if self.rope_llama3 and (
            len(self.rope_llama3) != 4 or self.rope_llama3[1] >= self.rope_llama3[2]
        ):
            raise ValueError(
                f"model.llm.rope_llama3 is {self.rope_llama3}: give (factor, low_freq_factor, "
                "high_freq_factor, original_max_position_embeddings), the second below the third, "
                "or () for no scaling"
            )
        if self.mrope and (len(self.mrope) != 3 or sum(self.mrope) != self.head_dim // 2):
            raise ValueError(
                f"model.llm.mrope is {self.mrope}: give three numbers (time, row, column) with the "
                f"sum head_dim / 2 = {self.head_dim // 2}, or () for positions of one dimension"
            )


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The vision tower: SigLIP NaViT of BAGEL, or the tower of Qwen2.5-VL or Qwen3-VL.

    kind: which of the three. The fields after layer_norm_eps are for the other two alone.
    num_layers: number of layers that run (BAGEL's release configures 27 and keeps 26).
    side: patches along a side of the position tables; patch id = row * side + column. Qwen3-VL
      resamples its table to the size of each image. Qwen2.5-VL has none: 0.
    layer_norm_eps: of the layer norms; of the RMS norms in Qwen2.5-VL.
    merge: patches along a side of a merge block, whose patches become one token.
    temporal_patch: frames of a patch. A still image is repeated.
    window: pixels along a side of a window of attention; 0 for none.
    full_layers: the layers that attend to the whole image where there are windows.
    deepstack: the layers whose outputs the decoder adds after its own first layers.
    mean, std: of the pixel values of each channel, in [0, 1], by which they are normalised.
    """

    hidden_size: Annotated[int, "[1, inf)"]
    num_layers: Annotated[int, "[1, inf)"]
    num_heads: Annotated[int, "[1, inf)"]
    intermediate_size: Annotated[int, "[1, inf)"]
    patch_size: Annotated[int, "[1, inf)"] = 14
    side: Annotated[int, "[0, inf)"] = 70
    layer_norm_eps: Annotated[float, "(0, 1]"] = 1e-6
    kind: Annotated[str, TOWERS] = "siglip"
    merge: Annotated[int, "[1, inf)"] = 1
    temporal_patch: Annotated[int, "[1, inf)"] = 1
    window: Annotated[int, "[0, inf)"] = 0
    full_layers: Annotated[tuple[int, ...], "[0, inf)"] = ()
    deepstack: Annotated[tuple[int, ...], "[0, inf)"] = ()
    mean: Annotated[tuple[float, ...], "[0, 1]"] = (0.5, 0.5, 0.5)
    std: Annotated[tuple[float, ...], "(0, 1]"] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        checks.fields(self, "model.vit")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.vit.hidden_size {self.hidden_size} is not divisible by its num_heads "
                f"{self.num_heads}: change one of them"
            )
        if fault := self._fault():
            raise ValueError(f"model.vit.kind is {self.kind!r}, {fault}")

    def _fault(self):
        """What does not suit the kind of tower; None if all does."""
        if self.kind == "siglip":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            if given := [name for name in _OF_QWEN if getattr(self, name) != defaults[name]]:
                return f"which has no {', '.join(given)}: leave the default, or set another kind"
        elif self.hidden_size // self.num_heads % 4:
            return (
                f"whose heads of {self.hidden_size // self.num_heads} are not divisible by 4, "
                "which rotary positions of two dimensions need: change hidden_size or num_heads"
            )
        elif len(self.mean) != 3 or len(self.std) != 3:
            return "whose mean and std are of three channels: give three numbers for each"
        if self.kind != "qwen2_5_vl" and self.side < 1:
            return "which has a table of positions: set side to its patches along a side"
        if 0 < self.window < self.stride:
            return (
                f"but window {self.window} is smaller than a token of {self.stride} x "
                f"{self.stride} pixels: enlarge it, or set 0 for none"
            )
        if any(layer >= self.num_layers for layer in (*self.full_layers, *self.deepstack)):
            return (
                f"but full_layers {self.full_layers} or deepstack {self.deepstack} name a layer "
                f"past the last of {self.num_layers}: count layers from 0"
            )
        return None

    @property
    def patch_dim(self) -> int:
        """Number of values of a patch of one frame."""
        return self.patch_size * self.patch_size * 3

    @property
    def window_side(self) -> int:
        """Patches along a side of a window, those of whole tokens."""
        return self.window // self.stride * self.merge

    @property
    def stride(self) -> int:
        """Pixels along a side of a token. Sides of an image are multiples of it."""
        return self.patch_size * self.merge


# The fields of ViTConfig that SigLIP does not have.
_OF_QWEN = ("merge", "temporal_patch", "window", "full_layers", "deepstack", "mean", "std")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """FLUX autoencoder (official: modeling/autoencoder.py, which hard-codes these defaults).

    multipliers: channels of each resolution, in units of `channels`; between two resolutions the
      image is halved.
    scale, shift: a latent is scale * (z - shift).
    """

    channels: Annotated[int, "[1, inf)"] = 128
    multipliers: Annotated[tuple[int, ...], "[1, inf)"] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, "[1, inf)"] = 2
    z_channels: Annotated[int, "[1, inf)"] = 16
    scale: Annotated[float, "(0, inf)"] = 0.3611
    shift: Annotated[float, "(-inf, inf)"] = 0.1159

    def __post_init__(self):
        checks.fields(self, "model.generation")
        if not self.multipliers:
            raise ValueError(
                "model.generation.multipliers is empty: give the channels of at least one "
                "resolution"
            )
        if self.channels % 32:
            raise ValueError(
                f"model.generation.channels is {self.channels}: group norms need a multiple of 32"
            )

    @property
    def downsample(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What image generation adds to the network: generation expert, latent path, autoencoder.

    patch: latents along a side of one token. side: tokens along a side of the latent position
      table.
    timestep_shift: shift of the training times (sampling has its own, `flow.FlowConfig`).
    """

    vae: VAEConfig = VAEConfig()
    patch: Annotated[int, "[1, inf)"] = 2
    side: Annotated[int, "[1, inf)"] = 64
    timestep_shift: Annotated[float, "(0, inf)"] = 1.0

    def __post_init__(self):
        checks.fields(self, "model.generation")

    @property
    def latent_dim(self) -> int:
        """Number of values of one latent token."""
        return self.patch * self.patch * self.vae.z_channels

    @property
    def stride(self) -> int:
        """Pixels along a side of a latent token. Sides of a generated image are multiples of it."""
        return self.patch * self.vae.downsample


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of the understanding expert.

    alpha / rank * a b is added to each target matrix. Only the adapters are then trained
    (`params.partition`). targets: names from LORA_TARGETS.
    """

    rank: Annotated[int, "[1, inf)"]
    alpha: Annotated[float, "(0, inf)"]
    targets: Annotated[tuple[str, ...], LORA_TARGETS] = LORA_TARGETS

    def __post_init__(self):
        checks.fields(self, "lora")
        if not self.targets:
            raise ValueError(
                f"lora.targets is empty, so rank {self.rank} adapts nothing: name some of "
                f"{LORA_TARGETS}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole network and how it is computed.

    vit: sizes of the vision tower; None where the model reads text alone. The tower and its
      connector are then not in the parameter tree.
    generation: sizes of the image-generation path; None where the model generates no images. The
      generation expert (`*_moe_gen` weights), the latent path and the autoencoder are then not in
      the parameter tree and cost no memory.
    lora: adapters of matrices of the understanding expert; None for none.
    dtype: compute dtype; parameters keep their own dtype.
    remat: "none" saves all activations of a block for the backward pass, "full" recomputes them.
    unroll: layers of the scan that are unrolled (a CPU gains about a fifth on shallow models).
    query_block: number of queries for which dense attention computes scores at a time; 0 for all at
      once. A generated image of 4,096 tokens after a long context needs it: scores at once would
      take tens of GiB.
    key_block: number of keys that decoding attends to at a time; 0 for all at once. Blocks in which
      no sequence has a key are skipped. XLA:TPU copies the keys of a layer before use where they
      exceed its on-chip memory, and does not copy such blocks.
    attention: "dense" (scores in memory), "flash" (own kernel, TPU), "cudnn" (cuDNN's kernel, GPU,
      bfloat16), "flash_interpret" (the TPU kernel run slowly anywhere, for tests), or "auto" (a run
      chooses, `run.attention_check`; elsewhere as "dense"); see `model.attention`. The autoencoder,
      with one head of all channels, is always dense.
    rope_bfloat16: round the decoder's rotary frequencies (inv_freq) to bfloat16, up to 0.37 % off,
      as the official trainer does under FSDP, which casts buffers. The official inference code does
      not.
    """

    llm: LLMConfig
    vit: ViTConfig | None = None
    generation: GenerationConfig | None = None
    lora: LoRAConfig | None = None
    dtype: Annotated[str, ("float32", "bfloat16")] = "bfloat16"
    remat: Annotated[str, ("none", "full")] = "full"
    unroll: Annotated[int, "[1, inf)"] = 1
    query_block: Annotated[int, "[0, inf)"] = 512
    key_block: Annotated[int, "[0, inf)"] = 0
    attention: Annotated[str, ATTENTION] = "dense"
    rope_bfloat16: bool = False

    def __post_init__(self):
        checks.fields(self, "model")
        if self.vit is None and self.generation is not None:
            raise ValueError(
                "model.generation.on is True, but the model has no vision tower, which reads the "
                "generated images again: set model.vit.on=True, or model.generation.on=False"
            )
        if self.generation is not None and (self.llm.output_bias or self.llm.mlp_bias):
            raise ValueError(
                "model.llm.output_bias and mlp_bias are not implemented for a model with a "
                "generation expert: set them to False, or model.generation.on=False"
            )
        if self.has_grids != bool(self.llm.mrope):
            raise ValueError(
                "rotary positions of three dimensions (model.llm.mrope) belong to the towers of "
                f"Qwen2.5-VL and Qwen3-VL (model.vit.kind), but mrope is {self.llm.mrope} and "
                f"{self.vit.kind if self.vit else 'there is no tower'}: set both or neither"
            )
        if self.has_grids and self.generation is not None:
            raise ValueError(
                f"model.vit.kind is {self.vit.kind!r}, whose family generates no images: set "
                "model.generation.on=False"
            )
        if self.has_grids and len(self.vit.deepstack) > self.llm.num_layers:
            raise ValueError(
                f"model.vit.deepstack names {len(self.vit.deepstack)} layers, but the decoder has "
                f"{self.llm.num_layers}, one of which reads each: name fewer"
            )
        if self.vit is not None and not self.has_grids and self.llm.hidden_size % 4:
            raise ValueError(
                f"model.llm.hidden_size {self.llm.hidden_size} is not divisible by 4: make it a "
                "multiple of 4, since the table of 2-D positions needs it"
            )

    @property
    def patch_dim(self) -> int:
        """Number of values of a patch; 1 for a model that reads text alone."""
        return self.vit.patch_dim if self.vit else 1

    @property
    def is_bagel(self) -> bool:
        """Whether the model is of BAGEL's family, by its vision tower."""
        return self.vit is not None and self.vit.kind == "siglip"

    @property
    def has_grids(self) -> bool:
        """Whether positions follow from the grids of images: the towers of Qwen, not SigLIP."""
        return self.vit is not None and self.vit.kind != "siglip"

    @property
    def patches_per_side(self) -> int:
        """`side` of `context.pack`: patches along a side of the tower's position table.

        1 for a model that reads text alone. 0 where positions follow from the grids of images.
        """
        if self.vit is None:
            return 1
        return 0 if self.has_grids else self.vit.side
