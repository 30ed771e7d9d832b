"""Rounds of text and generated images: how a unified model answers a question.

  system, images, question -> text -> if it contains <image_start>: an image is generated and enters
  the context -> text -> ...

Official: inferencer.py, InterleaveInferencer.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from opsd_jax import context as context_lib
from opsd_jax import flow, images, rollout, sharding
from opsd_jax.model.config import ModelConfig
from opsd_jax.tokenizer import Tokenizer

VISUAL_THOUGHTS = ("none", "generated")
Question = tuple[Sequence[Image.Image], str]
"""(Pillow RGB images, text)."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a question is asked.

    Attributes:
      system: system prompt, "" for none.
      vit: size rule of what the ViT sees, for position tables of the released size.
      two_stages: whether the ViT sees an image after the autoencoder's resize (as the inference
        pipeline does) or the original.
      transparency: see `images.open_rgb`.
      greedy, temperature, max_new_tokens: of each round of text; the budget counts bos.
      guidance: "official" (inferencer.py) or "harness".
      rounds: of text, at most.
    """

    system: str = context_lib.SYSTEM_INFERENCE
    vit: images.Resize = images.TRAINING
    two_stages: bool = False
    transparency: str = "white"
    greedy: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 1024
    guidance: str = "official"
    rounds: int = 3


PROTOCOLS = {
    # what the paper states (Sec. 3.1, App. M); its guidance is that of the official inferencer.py
    "paper": Protocol(),
    # what the public evaluation harness does (vlm/ThinkMorph.py)
    "harness": Protocol(
        vit=images.HARNESS_VIT,
        two_stages=True,
        greedy=False,
        temperature=0.3,
        max_new_tokens=4096,
        guidance="harness",
    ),
}


@dataclasses.dataclass(frozen=True)
class Reasoner:
    """A model with all that it needs to answer questions.

    Attributes:
      config: sizes of the network.
      params: its weights, laid out for the sampler.
      tokenizer: of the model.
      protocol: how it is asked.
      vit, vae: size rules of the ViT and of the autoencoder.
      mesh: devices that batches are placed on; None leaves the placement to JAX (one question).
      flow: changes to the defaults of `FlowConfig` that belong to the model.
    """

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    protocol: Protocol
    vit: images.Resize
    vae: images.Resize
    mesh: Mesh | None = None
    flow: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Trace:
    """The answer to one question.

    Attributes:
      steps: texts (str) and generated images (uint8 [H, W, 3]) in order.
      tokens: number of sampled tokens.
      seconds: {"text", "drawing"}: spent on text and on image generation by the whole batch.
    """

    steps: list[str | np.ndarray]
    tokens: int
    seconds: dict[str, float]

    @property
    def text(self) -> str:
        """All texts, joined as the model wrote them."""
        return "".join(step for step in self.steps if isinstance(step, str))

    @property
    def images(self) -> list[np.ndarray]:
        """All generated images."""
        return [step for step in self.steps if not isinstance(step, str)]


@dataclasses.dataclass
class _Asked:
    """The contexts of a question by branch of guidance, and the grid of images it may generate.

      cond    system, images, question          grows with every round
      text    system, images                    what guidance by text compares with
      image   system, question                  what guidance by images compares with

    Attributes:
      blocks: {branch: blocks of `context`}.
      grid: (rows, columns) of latent tokens of a generated image; None without image generation.
    """

    blocks: dict[str, list]
    grid: tuple[int, int] | None


def see(image: Image.Image, reasoner: Reasoner) -> tuple[np.ndarray, np.ndarray]:
    """A Pillow RGB image -> uint8 pixels [H, W, 3] for the ViT and for the autoencoder."""
    if reasoner.protocol.two_stages:  # also where no image is generated
        pixels, seen = images.two_stage(image, reasoner.vae, reasoner.vit)
        return seen, pixels
    return images.resize(image, reasoner.vit), images.resize(image, reasoner.vae)


def bucket(n: int, step: int = 16) -> int:
    """The least of step * 2^k and step * 3 * 2^k that holds n: few shapes, so few compilations.

    0 for n = 0.
    """
    if not n:
        return 0
    size = step
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def reason(
    reasoner: Reasoner,
    questions: Sequence[Question],
    key: jax.Array,
    *,
    generation: bool,
    always: bool = False,
    flow_changes: Mapping[str, Any] | None = None,
    change: Callable[[int, int, np.ndarray], np.ndarray | None] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
) -> list[Trace]:
    """Answers a batch of questions, generating images where the text asks for it.

    Args:
      questions: of the batch.
      key: a PRNG key.
      generation: whether images are generated; False for text alone.
      always: generate an image after every round but the last, whatever the text says.
      flow_changes: to `FlowConfig`, over those of the reasoner.
      change: (batch entry, round, image uint8 [H, W, 3]) -> the image that the model sees instead
        of the one that it generated, or None for none; the trace keeps what was generated.
      on_step: called with (round, steps done, steps) during image generation.
    Returns:
      A trace per question.
    Raises:
      ValueError: `generation` with a model that has no generation expert.
    """
    protocol, tokenizer, config = reasoner.protocol, reasoner.tokenizer, reasoner.config
    marker = rollout.Marker.build(tokenizer.token_bytes, config.llm.vocab_size)
    sampling = rollout.RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        marker=marker,
        max_new_tokens=protocol.max_new_tokens,
        greedy=protocol.greedy,
        temperature=protocol.temperature,
        max_image_skips=0,
    )
    flow_config = _flow_config(reasoner, flow_changes) if generation else None
    keys = (jax.random.fold_in(key, n) for n in itertools.count())
    asked = [_ask(reasoner, shown, text, keys, generation) for shown, text in questions]
    traces = [Trace([], 0, {"text": 0.0, "drawing": 0.0}) for _ in asked]
    active = list(range(len(asked)))
    for number in range(protocol.rounds if generation else 1):
        # The batch keeps its size, so that nothing compiles again: another question takes the
        # place of those that are done.
        chosen = active + [active[0]] * (len(asked) - len(active))
        before = time.perf_counter()
        packed = _pack([asked[n].blocks["cond"] for n in chosen], reasoner)
        found = rollout.sample(reasoner.params, packed, next(keys), config=sampling)
        tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
        _add_seconds(traces, "text", before)
        wants = []
        for b, n in enumerate(active):
            ids = tokens[b][mask[b]]
            text = _until_bos(tokenizer, ids)
            traces[n].steps.append(text)
            traces[n].tokens += len(ids)
            asked[n].blocks["cond"].append(context_lib.Text(tokenizer.encode(text)))
            more = always and number + 1 < protocol.rounds
            if generation and (context_lib.MARKER in text or more):
                wants.append(n)
        if not wants:
            break
        before = time.perf_counter()
        chosen = wants + [wants[0]] * (len(asked) - len(wants))
        report = on_step and _reporter(on_step, number, flow_config.num_timesteps - 1)
        generated = _generate(reasoner, [asked[n] for n in chosen], next(keys), flow_config, report)
        for image, n in zip(generated, wants):
            traces[n].steps.append(image)
            seen = change(n, number, image) if change else image
            if number + 1 < protocol.rounds and seen is not None:
                blocks, _ = _image_blocks(reasoner, images.open_rgb(seen), next(keys), True)
                asked[n].blocks["cond"] += blocks
        _add_seconds(traces, "drawing", before)
        active = wants
    return traces


def _flow_config(reasoner: Reasoner, changes: Mapping[str, Any] | None) -> flow.FlowConfig:
    guidance = flow.HARNESS if reasoner.protocol.guidance == "harness" else {}
    return flow.FlowConfig(
        model=reasoner.config,
        image_start=reasoner.tokenizer.image_start,
        image_end=reasoner.tokenizer.image_end,
        **{**guidance, **reasoner.flow, **(changes or {})},
    )


def _reporter(on_step: Callable[[int, int, int], None], number: int, steps: int):
    return lambda done: on_step(number, done, steps)


def _add_seconds(traces: list[Trace], what: str, before: float) -> None:
    for trace in traces:
        trace.seconds[what] += time.perf_counter() - before


def _until_bos(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Text of the ids up to another bos, where the official code cuts it."""
    stops = np.flatnonzero(ids == tokenizer.bos)
    return tokenizer.decode(ids[: stops[0]] if len(stops) else ids)


def _ask(
    reasoner: Reasoner,
    shown: Sequence[Image.Image],
    text: str,
    keys: Iterator[jax.Array],
    generation: bool,
) -> _Asked:
    """The contexts of a question. keys: one is used per image, for the latents' noise."""
    system, question = (
        [context_lib.Text(reasoner.tokenizer.encode(t))] if t else []
        for t in (reasoner.protocol.system, text)
    )
    image_blocks, grid = [], None
    for image in shown:
        blocks, grid = _image_blocks(reasoner, image, next(keys), generation)
        image_blocks += blocks
    if generation and grid is None:  # without an image to take the size from: the largest square
        grid = (reasoner.config.generation.side,) * 2
    blocks = {
        "cond": system + image_blocks + question,
        "text": system + image_blocks,
        "image": system + question,
    }
    return _Asked(blocks, grid)


def _image_blocks(
    reasoner: Reasoner, image: Image.Image, key: jax.Array, generation: bool
) -> tuple[list, tuple[int, int] | None]:
    """(blocks of an image in a context: as latents, then as ViT patches; grid of its latents)."""
    config = reasoner.config
    seen, pixels = see(image, reasoner)
    blocks, grid = [_image(seen, config.vit.patch_size)], None
    if generation:
        sizes = config.generation
        grid = (pixels.shape[0] // sizes.stride, pixels.shape[1] // sizes.stride)
        shape = (1, grid[0] * sizes.patch, grid[1] * sizes.patch, sizes.vae.z_channels)
        values = images.normalize(pixels[None])
        noise = jax.random.normal(key, shape)
        latents = flow.encode(reasoner.params, values, noise, config=config)[0]
        blocks.insert(0, context_lib.Latent(np.asarray(flow.to_tokens(latents, sizes.patch)), grid))
    return blocks, grid


def _image(pixels: np.ndarray, patch: int) -> context_lib.Image:
    grid = (pixels.shape[0] // patch, pixels.shape[1] // patch)
    return context_lib.Image(images.patchify(pixels, patch), grid)


def _pack(sequences: list[list], reasoner: Reasoner) -> context_lib.Context:
    """Sequences of blocks -> Context [B, T] of bucketed sizes."""
    needs = np.max([context_lib.need(blocks) for blocks in sequences], axis=0)
    generation = reasoner.config.generation
    sizes = {}
    if generation:
        sizes = {"latent_dim": generation.latent_dim, "latent_side": generation.side}
    packed = context_lib.pack(
        sequences,
        slots=bucket(needs[0]),
        patches=bucket(needs[1]),
        latents=bucket(needs[2]),
        **sizes,
        tokenizer=reasoner.tokenizer,
        side=reasoner.config.vit.side,
    )
    return sharding.put_batch(reasoner.mesh, packed) if reasoner.mesh else packed


def _generate(
    reasoner: Reasoner,
    asked: list[_Asked],
    key: jax.Array,
    config: flow.FlowConfig,
    on_step: Callable[[int], None] | None,
) -> list[np.ndarray]:
    """One image per question, uint8 [H, W, 3]."""
    sizes, grids = reasoner.config.generation, [question.grid for question in asked]
    size = bucket(max(a * b for a, b in grids))
    positions, real = flow.layout(grids, size, sizes.side)
    noise = jax.random.normal(key, (len(asked), size, sizes.latent_dim))
    contexts = _pack(
        [question.blocks[branch] for branch in config.branches for question in asked], reasoner
    )
    tokens = flow.draw(
        reasoner.params, contexts, noise, positions, real, config=config, on_step=on_step
    )
    return [
        np.asarray(
            flow.decode(
                reasoner.params,
                tokens[b : b + 1, : height * width],
                grid=(height, width),
                config=reasoner.config,
            )[0]
        )
        for b, (height, width) in enumerate(grids)
    ]
