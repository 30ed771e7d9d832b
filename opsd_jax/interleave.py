"""Rounds of text and generated images: how a unified model answers a question.

  system, images, question -> text -> if it contains <image_start>: an image is generated and enters
  the context -> text -> ...

Official: inferencer.py, InterleaveInferencer.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import flow, images, rollout, sharding
from opsd_jax.inputs import checks
from opsd_jax.method_config import FlowConfig, RolloutConfig
from opsd_jax.model.config import ModelConfig
from opsd_jax.tokenizer import Tokenizer

IMAGE_MODES = ("none", "generated")
Question = tuple[Sequence[Image.Image], str | Sequence[str]]
"""(Pillow images, text), all images before the text; or (images, the texts around them), one more
than images (`tags.around_places`). Images of other modes than RGB are read as `images.open_rgb`
reads files.
"""
Intervention = Callable[[int, int, np.ndarray], np.ndarray | None]
"""(batch entry, round, generated image uint8 [H, W, 3]) -> the image that the model sees instead of
the generated one, or None for none.
"""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Prompt, sizes, decoding and guidance.

    Attributes:
      system: system prompt, "" for none.
      vit: size rule of the images for the ViT, for position tables of the released size.
      two_stages: whether the ViT sees an image after the autoencoder's resize (as the inference
        pipeline does) or the original.
      transparency: see `images.open_rgb`.
      greedy, temperature, max_new_tokens: decoding of each round of text; max_new_tokens counts
        bos.
      guidance: "official" (inferencer.py) or "harness".
      rounds: largest number of rounds of text.
      max_image_skips: where no images are generated, how often a text that asks for one is
        continued without it, as in training. The official inferencer stops there: 0.
    """

    system: str = blocks_lib.SYSTEM_INFERENCE
    vit: images.Resize = images.TRAINING
    two_stages: bool = False
    transparency: str = "white"
    greedy: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 1024
    guidance: str = "official"
    rounds: int = 3
    max_image_skips: int = 0


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
class TrainingContexts:
    """What the contexts of a run's student and teacher consist of.

    Attributes:
      prompts: their fixed texts.
      names: names of their blocks.
      transforms: parameters of the transforms that make some of these blocks.
    """

    prompts: blocks_lib.Prompts
    names: blocks_lib.BlockNames
    transforms: images.Transforms


@dataclasses.dataclass(frozen=True, repr=False)
class Reasoner:
    """A model with all that it needs to answer questions.

    Attributes:
      config: sizes of the network.
      params: its weights, laid out for the sampler.
      tokenizer: the model's tokenizer.
      protocol: how questions are asked.
      vit, vae: size rules of images for the ViT and for the autoencoder.
      mesh: devices that batches are placed on; None leaves the placement to JAX (one question).
      flow: changes to the defaults of `FlowConfig` and to the protocol's guidance.
      training: contexts of the run that the model is of, in which `opsd_jax.answer` asks it; None
        for a released model, and for a run's that is asked by a named protocol.
    """

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    protocol: Protocol
    vit: images.Rule
    vae: images.Resize
    mesh: Mesh | None = None
    flow: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: TrainingContexts | None = None

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.params))
        asked = "as in its run" if self.training else "by a protocol"
        images_too = ", generates images" if self.config.generation else ""
        return f"<model of {count:,} parameters, asked {asked}{images_too}>"


@dataclasses.dataclass(frozen=True)
class ImageGeneration:
    """When an answer has generated images, and what the model sees of them.

    Attributes:
      always: whether an image is generated after every round of text but the last, whatever the
        text says. Otherwise the text asks for it with <image_start>.
      intervention: replaces the images that enter the context; the answer keeps the generated ones.
      on_step: called with (round, steps done, steps) during image generation.
    """

    always: bool = False
    intervention: Intervention | None = None
    on_step: Callable[[int, int, int], None] | None = None


@dataclasses.dataclass
class Answer:
    """What the model answers to one question.

    Attributes:
      parts: texts (str) and generated images (uint8 [H, W, 3]) in order.
      tokens: number of sampled tokens.
      image_skips: how often the text asked for an image and was continued without it.
      text_seconds, image_seconds: time that the whole batch took for text and for images.
    """

    parts: list[str | np.ndarray] = dataclasses.field(default_factory=list)
    tokens: int = 0
    image_skips: int = 0
    text_seconds: float = 0.0
    image_seconds: float = 0.0

    @property
    def text(self) -> str:
        """All texts, joined as the model wrote them."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[np.ndarray]:
        """All generated images."""
        return [part for part in self.parts if not isinstance(part, str)]


_Contexts = dict[str, list]
"""The contexts of a question, {branch of guidance: blocks}.

  cond    system, images, question          grows with every round; or images between texts
  text    system, images                    what guidance by text compares with
  image   system, question                  what guidance by images compares with
"""


def resize_for_model(
    image: Image.Image, reasoner: Reasoner
) -> tuple[
    UInt8[np.ndarray, "vit_height vit_width 3"], UInt8[np.ndarray, "vae_height vae_width 3"]
]:
    """Pixels of a Pillow RGB image for the ViT and for the autoencoder."""
    # also where no image is generated
    if reasoner.protocol.two_stages and isinstance(reasoner.vit, images.Resize):
        vae_pixels, vit_pixels = images.two_stage(image, reasoner.vae, reasoner.vit)
        return vit_pixels, vae_pixels
    return images.resize(image, reasoner.vit), images.resize(image, reasoner.vae)


def bucket(n: int, step: int = 16) -> int:
    """The least of step * 2^k and step * 3/2 * 2^k that holds n: few shapes, so few compilations.

    16, 24, 32, 48, 64, 96, ... for a step of 16; 0 for n = 0.

    Raises ValueError for a step that is not a power of two, or is below 2.
    """
    if step < 2 or step & (step - 1):
        raise ValueError(f"step is {step}: give a power of two, at least 2")
    if not n:
        return 0
    size = step
    while size < n:
        is_power = size & (size - 1) == 0
        size = size * 3 // 2 if is_power else size // 3 * 4
    return size


def check_generation(reasoner: Reasoner, generation: Any) -> None:
    """Checks what a user gives as an `ImageGeneration` or None.

    TypeError for something else, ValueError for a model that generates no images.
    """
    if generation is None:
        return
    fix = "give opsd_jax.interleave.ImageGeneration(), or None for text alone"
    checks.instance("generation", generation, ImageGeneration, fix)
    if reasoner.tokenizer.chat:
        raise ValueError("a model that is asked in chat form generates no images: ask for text")
    if reasoner.config.generation is None:
        raise ValueError(
            "generation: the model was loaded without image generation. Load it with: "
            "model = opsd_jax.load(W, generation=True)"
        )


def _checked(reasoner: Reasoner, questions: Any) -> list[Question]:
    """The questions of a user with RGB images. TypeError, ValueError: see `reason`."""
    checks.instance("questions", questions, Sequence, "give a list of (images, text)")
    if not questions:
        raise ValueError("questions is empty: give at least one, ([image], text)")
    found: list[Question] = []
    for n, question in enumerate(questions):
        shown = f"questions[{n}]"
        checks.instance(shown, question, Sequence, "give ([image], text)")
        if len(question) != 2:
            raise ValueError(f"{shown} has {len(question)} entries: give ([image], text)")
        given, text = question
        fix = "give a list of images, [image], or [] for none"
        checks.instance(f"{shown}[0]", given, Sequence, fix)
        checks.instance(f"{shown}[1]", text, Sequence, "give a text")
        texts = (text,) if isinstance(text, str) else text
        if not isinstance(text, str) and len(texts) not in (1, len(given) + 1):
            raise ValueError(
                f"{shown} has {len(given)} images and {len(texts)} texts: give one text, or one "
                "more than images"
            )
        check_images(f"{shown}[0]", given)
        # An RGB image is taken as it is: it may have been opened by another rule.
        how = reasoner.protocol.transparency
        rgb = [
            image if image.mode == "RGB" else images.open_rgb(image, transparency=how)
            for image in given
        ]
        found.append((rgb, texts))
    return found


def check_images(shown: str, given: Sequence[Any]) -> None:
    """Raises TypeError for what is no Pillow image. shown: what the user calls the sequence."""
    for n, image in enumerate(given):
        fix = "give a Pillow image, PIL.Image.open(FILE), or Image.fromarray of a uint8 array"
        checks.instance(f"{shown}[{n}]", image, Image.Image, fix)


def reason(
    reasoner: Reasoner,
    questions: Sequence[Question],
    key: jax.Array,
    generation: ImageGeneration | None = None,
) -> list[Answer]:
    """Answers a batch of questions with text, and with generated images if `generation` is given.

    A question is asked as it is: system prompt, images, text; in the form of the tokenizer.
    `opsd_jax.answer` also adds the other blocks of a run's contexts.

    Args:
      questions: at least one.
      key: a PRNG key.
    Returns:
      An answer per question.
    Raises:
      TypeError: an argument of another type.
      ValueError: `generation` with a model that has no generation expert, or in chat form; no
        questions; a text that does not fit its images; an image that cannot be read.
    """
    check_generation(reasoner, generation)
    questions = _checked(reasoner, questions)
    keys = (jax.random.fold_in(key, n) for n in itertools.count())
    contexts = [_contexts(reasoner, question, keys, bool(generation)) for question in questions]
    if generation is None:
        return complete(reasoner, [own["cond"] for own in contexts], next(keys))
    tokenizer, rounds = reasoner.tokenizer, reasoner.protocol.rounds
    sampling, flow_settings = rollout_config(reasoner, generation=True), flow_config(reasoner)
    answers = [Answer() for _ in questions]
    active = list(range(len(questions)))
    for number in range(rounds):
        start = time.perf_counter()
        batch = [contexts[n]["cond"] for n in _filled(active, len(questions))]
        sampled, _ = _sample_texts(reasoner, batch, next(keys), sampling)
        seconds = time.perf_counter() - start
        texts = [tokenizer.decode(_until_bos(ids, tokenizer.bos)) for ids in sampled[: len(active)]]
        for n, ids, text in zip(active, sampled, texts):
            answers[n].parts.append(text)
            answers[n].tokens += len(ids)
            contexts[n]["cond"].append(blocks_lib.Text(tokenizer.encode(text)))
        for answer in answers:
            answer.text_seconds += seconds
        more = generation.always and number + 1 < rounds
        active = [n for n, text in zip(active, texts) if more or blocks_lib.MARKER in text]
        if not active:
            break
        start = time.perf_counter()
        asking = [contexts[n] for n in _filled(active, len(questions))]
        on_step = _reporter(generation.on_step, number, flow_settings.num_timesteps - 1)
        generated = _generate(reasoner, asking, next(keys), flow_settings, on_step)
        for n, image in zip(active, generated):
            answers[n].parts.append(image)
            seen: np.ndarray | None = image
            if generation.intervention:
                seen = generation.intervention(n, number, image)
            if number + 1 < rounds and seen is not None:
                pillow_image = images.open_rgb(seen)
                contexts[n]["cond"] += _image_blocks(reasoner, pillow_image, next(keys), True)
        seconds = time.perf_counter() - start
        for answer in answers:
            answer.image_seconds += seconds
    return answers


def complete(
    reasoner: Reasoner, contexts: Sequence[Sequence[blocks_lib.Block]], key: jax.Array
) -> list[Answer]:
    """Answers a batch of contexts, each a list of blocks, with text.

    A run's texts are those that its evaluation reads: whole, and with its image skips.

    Args:
      key: a PRNG key.
    Returns:
      An answer per context.
    """
    tokenizer, start = reasoner.tokenizer, time.perf_counter()
    sampled, skips = _sample_texts(reasoner, contexts, key, rollout_config(reasoner))
    seconds = time.perf_counter() - start
    # What begins a completion in chat form is an ordinary token.
    cut = not (reasoner.training or tokenizer.chat)
    return [
        Answer(
            [tokenizer.decode(_until_bos(ids, tokenizer.bos) if cut else ids)],
            len(ids),
            count,
            seconds,
        )
        for ids, count in zip(sampled, skips, strict=True)
    ]


def _filled(entries: list[int], size: int) -> list[int]:
    """Entries of a batch, filled up with the first one.

    The batch keeps its size, so that nothing compiles again.
    """
    return entries + entries[:1] * (size - len(entries))


def rollout_config(reasoner: Reasoner, *, generation: bool = False) -> RolloutConfig:
    """How a round of text is sampled.

    generation: whether images that a text asks for are generated. Otherwise they are skipped, or
      the answer ends there (`Protocol.max_image_skips`).
    """
    config, tokenizer, protocol = reasoner.config, reasoner.tokenizer, reasoner.protocol
    return RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        further_ends=() if config.is_bagel else tokenizer.further_ends,
        marker=rollout.Marker.build(tokenizer.token_bytes, config.llm.vocab_size),
        max_new_tokens=protocol.max_new_tokens,
        greedy=protocol.greedy,
        temperature=protocol.temperature,
        max_image_skips=0 if generation else protocol.max_image_skips,
    )


def flow_config(reasoner: Reasoner) -> FlowConfig:
    """How an image is generated."""
    guidance = flow.HARNESS if reasoner.protocol.guidance == "harness" else {}
    return FlowConfig(
        model=reasoner.config,
        image_start=reasoner.tokenizer.image_start,
        image_end=reasoner.tokenizer.image_end,
        **{**guidance, **reasoner.flow},
    )


def _reporter(
    on_step: Callable[[int, int, int], None] | None, number: int, steps: int
) -> Callable[[int], None] | None:
    """The `on_step` of `flow.generate` in a round."""
    return on_step and (lambda done: on_step(number, done, steps))


def _sample_texts(
    reasoner: Reasoner,
    contexts: Sequence[Sequence[blocks_lib.Block]],
    key: jax.Array,
    config: RolloutConfig,
) -> tuple[list[np.ndarray], list[int]]:
    """(token ids int32 [n], number of image skips) that the model samples after each context."""
    packed = _pack(contexts, reasoner)
    trajectory = rollout.sample(reasoner.params, packed, key, config=config)
    tokens, mask = np.asarray(trajectory.tokens), np.asarray(trajectory.mask)
    ids = [tokens[b][mask[b]] for b in range(len(contexts))]
    return ids, np.asarray(trajectory.num_skips).tolist()


def _until_bos(ids: np.ndarray, bos: int) -> np.ndarray:
    """The ids before another bos, where the official code cuts the text."""
    stops = np.flatnonzero(ids == bos)
    return ids[: stops[0]] if len(stops) else ids


def _contexts(
    reasoner: Reasoner, question: Question, keys: Iterator[jax.Array], generation: bool
) -> _Contexts:
    """The contexts of a question before its first round.

    Args:
      keys: PRNG keys, one per image, of the noise of its latents.
    """
    question_images, text = question
    texts = (text,) if isinstance(text, str) else text
    if reasoner.tokenizer.chat:
        return {"cond": _conversation(reasoner, question_images, texts)}
    system, *asked = (
        [blocks_lib.Text(reasoner.tokenizer.encode(t))] if t else []
        for t in (reasoner.protocol.system, *texts)
    )
    shown = [_image_blocks(reasoner, image, next(keys), generation) for image in question_images]
    first = len(shown) + 1 - len(asked)  # images before the first text
    parts = [system, *shown[:first]]
    for n, own in enumerate(asked, first):
        parts += [own, *shown[n : n + 1]]
    branches = {"cond": parts, "text": [system, *shown], "image": [system, *asked]}
    return {branch: sum(blocks, []) for branch, blocks in branches.items()}


def _conversation(
    reasoner: Reasoner, question_images: Sequence[Image.Image], texts: Sequence[str]
) -> list[blocks_lib.Block]:
    """The blocks of a question in chat form: system prompt, and the user's images and texts."""
    encode = reasoner.tokenizer.encode
    shown: list[blocks_lib.Block] = [image_block(image, reasoner) for image in question_images]
    asked = [blocks_lib.Text(encode(text) if text else np.zeros(0, np.int32)) for text in texts]
    first = len(shown) + 1 - len(asked)  # images before the first text
    turn = shown[:first]
    for n, own in enumerate(asked, first):
        turn += [*([own] if len(own.ids) else []), *shown[n : n + 1]]
    system = reasoner.protocol.system
    named = blocks_lib.conversation(
        reasoner.tokenizer,
        encode(system) if system else np.zeros(0, np.int32),
        [("image" if isinstance(b, blocks_lib.Image) else "question", b) for b in turn],
    )
    return [block for _, block in named]


def image_block(image: Image.Image, reasoner: Reasoner) -> blocks_lib.Image:
    """The block of ViT patches of an image. ValueError for a model that reads text alone."""
    vit = reasoner.config.vit
    if vit is None:
        raise ValueError(
            "the model has no vision tower and reads text alone: ask it without an image"
        )
    pixels = resize_for_model(image, reasoner)[0]
    return blocks_lib.image_block(pixels, vit.patch_size, vit.merge)


def _image_blocks(reasoner: Reasoner, image: Image.Image, key: jax.Array, generation: bool) -> list:
    """The blocks of an image: as latents if images are generated, and as ViT patches."""
    patches = image_block(image, reasoner)
    if not generation:
        return [patches]
    config, sizes = reasoner.config, reasoner.config.generation
    _, vae_pixels = resize_for_model(image, reasoner)
    rows, columns = (side // sizes.stride for side in vae_pixels.shape[:2])
    shape = (1, rows * sizes.patch, columns * sizes.patch, sizes.vae.z_channels)
    noise = jax.random.normal(key, shape)
    pixels = images.normalize(vae_pixels[None])
    latents = flow.encode(reasoner.params, pixels, noise, config=config)[0]
    tokens = np.asarray(flow.to_tokens(latents, sizes.patch))
    return [blocks_lib.Latent(tokens, (rows, columns)), patches]


def bucketed(sequences: Sequence[Sequence[blocks_lib.Block]]) -> context_lib.Sizes:
    """Sizes of the batch that sequences of blocks are packed into."""
    needs = np.max([context_lib.need(blocks) for blocks in sequences], axis=0).tolist()
    return context_lib.Sizes(*map(bucket, needs))


def _pack(
    sequences: Sequence[Sequence[blocks_lib.Block]], reasoner: Reasoner
) -> context_lib.Context:
    """Sequences of blocks -> Context [B, T] of bucketed sizes."""
    packed = context_lib.pack(
        sequences,
        bucketed(sequences),
        tokenizer=reasoner.tokenizer,
        side=reasoner.config.patches_per_side,
        generation=reasoner.config.generation,
    )
    return sharding.put_batch(reasoner.mesh, packed) if reasoner.mesh else packed


def _generated_grid(contexts: _Contexts, side: int) -> tuple[int, int]:
    """(rows, columns) of latent tokens of an image to generate.

    They are those of the question's last image, or of the largest square without one.
    """
    grids = [block.grid for block in contexts["text"] if isinstance(block, blocks_lib.Latent)]
    return grids[-1] if grids else (side, side)


def _generate(
    reasoner: Reasoner,
    contexts: list[_Contexts],
    key: jax.Array,
    config: FlowConfig,
    on_step: Callable[[int], None] | None,
) -> list[np.ndarray]:
    """One image per question, uint8 [H, W, 3]."""
    sizes = reasoner.config.generation
    grids = [_generated_grid(own, sizes.side) for own in contexts]
    size = bucket(max(rows * columns for rows, columns in grids))
    positions = flow.latent_positions(grids, size, sizes.side)
    noise = jax.random.normal(key, (len(contexts), size, sizes.latent_dim))
    packed = _pack([own[branch] for branch in config.branches for own in contexts], reasoner)
    tokens = flow.generate(
        reasoner.params, packed, noise, positions, config=config, on_step=on_step
    )
    return [
        np.asarray(
            flow.decode(
                reasoner.params,
                tokens[b : b + 1, : grid[0] * grid[1]],
                grid=grid,
                config=reasoner.config,
            )[0]
        )
        for b, grid in enumerate(grids)
    ]
