"""A model, a tokenizer and inputs small enough to compile fast; for tests alone.

tokenizer   a byte is a token (0-255), then the four delimiters
model       V 264, D 32, 2 layers of 4 heads over 2 kv heads; ViT of 4-pixel patches, E 16, 2 layers
drawing     the same with a generation expert; a latent token is 2 x 2 latents of 4 channels, 8 x 8
pixels images      1 x 1 to 3 x 3 patches of random uint8 values
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import blocks as blocks_lib
from opsd_jax import context, rollout
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.model.config import GenerationConfig, LLMConfig, ModelConfig, VAEConfig, ViTConfig
from opsd_jax.release import bagel_keys

MODEL = ModelConfig(
    llm=LLMConfig(
        vocab_size=264,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
    ),
    vit=ViTConfig(
        hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, patch_size=4, side=6
    ),
    dtype="float32",
    remat="none",
    query_block=0,
)
# The autoencoder's norm has 32 groups, so its widths are multiples of 32; one of its steps keeps
# the width.
DRAWING = dataclasses.replace(
    MODEL,
    generation=GenerationConfig(
        vae=VAEConfig(channels=32, multipliers=(1, 1, 2), num_res_blocks=1, z_channels=4),
        patch=2,
        side=6,
    ),
)
# The towers of Qwen: windows of 2 x 2 tokens in two of three layers; outputs of the layers 2 and 0
# for the decoder's first layers.
_MROPE = dataclasses.replace(MODEL.llm, mrope=(2, 1, 1))
_QWEN_TOWER = ViTConfig(
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    intermediate_size=24,
    patch_size=4,
    side=0,
    kind="qwen2_5_vl",
    merge=2,
    temporal_patch=2,
    window=16,
    full_layers=(1,),
    mean=(0.48, 0.46, 0.41),
    std=(0.27, 0.26, 0.28),
)
QWEN = {
    "qwen2_5_vl": dataclasses.replace(
        MODEL, llm=dataclasses.replace(_MROPE, qk_norm=False, tied_head=True), vit=_QWEN_TOWER
    ),
    "qwen3_vl": dataclasses.replace(
        MODEL,
        llm=dataclasses.replace(_MROPE, qkv_bias=False, mrope_interleaved=True),
        vit=dataclasses.replace(
            _QWEN_TOWER, kind="qwen3_vl", side=5, window=0, full_layers=(), deepstack=(2, 0)
        ),
    ),
}
POSITIONS, PATCHES = 64, 28  # the bucket that every context of `rows` fits
PROMPTS = blocks_lib.Prompts(system="sys", intro="look", transition="now")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Stands for `opsd_jax.tokenizer.Tokenizer`: every byte is its own token."""

    bos: int = 256
    eos: int = 257
    image_start: int = 258
    image_end: int = 259
    further_ends: tuple[int, ...] = ()
    chat = None

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids):
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    @property
    def ordinary(self):
        return np.arange(256, dtype=np.int32)

    @property
    def token_bytes(self):
        return [bytes([i]) for i in range(256)] + [b"<bos>", b"<eos>", b"<img>", b"</img>"]


TOKENIZER = ByteTokenizer()
ENDS = {"bos": TOKENIZER.bos, "eos": TOKENIZER.eos}


def params(config: ModelConfig = MODEL, seed: int = 0):
    """Random parameters, drawn with NumPy (compiling `bagel.init` takes seconds); logits spread by
    about 2.

    Every leaf carries noise: where norms are 1 and biases 0 a test would miss their misuse.
    """
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("kernel"):
            fan_in = np.prod(leaf.shape[:-1]) if path.startswith("vae") else leaf.shape[-2]
            return noise / np.float32(fan_in**0.5)
        if path == "llm/head":
            return noise * 2 / leaf.shape[0] ** 0.5
        is_gain = "norm" in path and not path.endswith("bias")
        return 1 + noise / 5 if is_gain else noise / 5

    return params_lib.unflatten(
        {path: jnp.asarray(draw(path, leaf)) for path, leaf in params_lib.flatten(abstract).items()}
    )


def released(path: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """{name: tensor} of one parameter as in a release; a stacked one has a tensor per layer."""
    key = bagel_keys.key(path)
    layers = array if key.stacked else [array]
    return {name: key.to_release(x) for name, x in zip(key.names(array.shape), layers, strict=True)}


@contextlib.contextmanager
def quick_compiles():
    """XLA without most of its optimisations: large programs compile in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def copy(tree):
    """New buffers in the same places: an update deletes those of the state that it is given."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding, may_alias=False), tree)


def image(rng, grid=(2, 2), patch_dim: int = MODEL.vit.patch_dim) -> blocks_lib.Image:
    return blocks_lib.Image(rng.integers(0, 256, (grid[0] * grid[1], patch_dim), np.uint8), grid)


def merged_image(rng, grid=(4, 4)) -> blocks_lib.Image:
    """An image for the models `QWEN`, whose rows and columns of patches are even."""
    return blocks_lib.Image(image(rng, grid).patches, grid, QWEN["qwen3_vl"].vit.merge)


def latent(rng, grid=(2, 2), noised: bool = False) -> blocks_lib.Latent:
    tokens = rng.standard_normal((grid[0] * grid[1], DRAWING.generation.latent_dim), np.float32)
    return blocks_lib.Latent(tokens, grid, noised)


def rows(
    rng, count: int, prompts: blocks_lib.Prompts = PROMPTS, visual_thoughts: int | None = None
):
    """Random rows of different lengths, 0 to 2 visual thoughts: (student rows, teacher rows) of
    blocks.
    """

    def grid():
        return tuple(int(n) for n in rng.integers(1, 4, 2))

    made = []
    for _ in range(count):
        question = rng.integers(0, 256, rng.integers(1, 9)).astype(np.int32)
        thoughts = rng.integers(0, 3) if visual_thoughts is None else visual_thoughts
        made.append((question, image(rng, grid()), [image(rng, grid()) for _ in range(thoughts)]))
    return (
        [blocks_lib.student(TOKENIZER, prompts, q, problem) for q, problem, _ in made],
        [
            blocks_lib.teacher(TOKENIZER, prompts, q, problem, thoughts)
            for q, problem, thoughts in made
        ],
    )


def pack(
    blocks, positions: int = POSITIONS, patches: int = PATCHES, latents: int = 0, **kwargs
) -> context.Context:
    sizes = context.Sizes(positions, patches, latents=latents)
    return context.pack(blocks, sizes, tokenizer=TOKENIZER, side=MODEL.vit.side, **kwargs)


def batch(rng, count: int, **kwargs) -> context.Batch:
    """Packed contexts of `count` random rows, both roles in the same bucket."""
    return context.Batch(*map(pack, rows(rng, count, **kwargs)))


def trajectory(completions, budget: int, ended_on_eos=True) -> rollout.Trajectory:
    """What the sampler returns if it samples these completions: for each row a list of rounds of
    token ids.

    [[5, 6], [7]] is fed as  bos 5 6 eos bos 7,  one image skip between its two rounds.
    """
    n = len(completions)
    ended = np.broadcast_to(np.asarray(ended_on_eos), n)
    tokens, mask = np.zeros((n, budget - 1), np.int32), np.zeros((n, budget - 1), bool)
    fed, chosen = np.zeros((n, budget), np.int32), np.zeros((n, budget), bool)
    num_fed = np.zeros(n, np.int32)
    for r, rounds in enumerate(completions):
        content = [token for tokens_of_round in rounds for token in tokens_of_round]
        tokens[r, : len(content)], mask[r, : len(content)] = content, True
        stream = [(TOKENIZER.bos, False)]
        for i, tokens_of_round in enumerate(rounds):
            stream += [(TOKENIZER.eos, True), (TOKENIZER.bos, False)] if i else []
            stream += [(token, True) for token in tokens_of_round]
        num_fed[r] = len(stream)
        fed[r, : len(stream)], chosen[r, : len(stream)] = zip(*stream)
    return rollout.Trajectory(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        logprobs=jnp.zeros((n, budget - 1)),
        num_skips=jnp.asarray([len(rounds) - 1 for rounds in completions], jnp.int32),
        stop=jnp.where(ended, rollout.STOP_EOS, rollout.STOP_BUDGET).astype(jnp.int32),
        fed=jnp.asarray(fed),
        fed_sampled=jnp.asarray(chosen),
        num_fed=jnp.asarray(num_fed),
    )


def random_trajectory(rng, count: int, budget: int) -> rollout.Trajectory:
    """Random completions of one or two rounds that fit the budget; about half of them ended on
    eos.
    """
    completions = []
    for _ in range(count):
        lengths = rng.integers(1, max(budget // 2 - 2, 2), rng.integers(1, 3))
        completions.append([rng.integers(0, 256, n).tolist() for n in lengths])
    return trajectory(completions, budget, rng.random(count) < 0.5)


@functools.cache
def marker(text: str = blocks_lib.MARKER) -> rollout.Marker:
    return rollout.Marker.build(TOKENIZER.token_bytes, MODEL.llm.vocab_size, text)


def rollout_config(**kwargs) -> rollout.RolloutConfig:
    defaults = {"model": MODEL, "marker": marker(), "max_new_tokens": 12, **ENDS}
    return rollout.RolloutConfig(**{**defaults, **kwargs})


def distances(a, b) -> dict[str, float]:
    """Largest absolute difference by parameter path."""
    a, b = params_lib.flatten(a), params_lib.flatten(b)
    assert a.keys() == b.keys()
    return {path: float(np.abs(np.asarray(a[path]) - np.asarray(b[path])).max()) for path in a}


DELIMITERS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


def write_tokenizer(directory, delimiters, size):
    """A byte-level tokenizer without merges whose delimiters have given ids; the rest is filled up
    with <|n|>.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: n for n, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    special = {id_: DELIMITERS[key] for key, id_ in delimiters.items() if key in DELIMITERS}
    for n in range(len(vocabulary), size):
        vocabulary[special.get(n, f"<|{n}|>")] = n
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special.values()))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(str(directory))
    return str(directory)
