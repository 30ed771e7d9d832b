"""What each role sees: prompts, packing, masks and rope positions as vectors.

Training, sampling, scoring and evaluation all use this module. A context is a list of blocks that
are packed into one sequence (official: data/opsd_pack_builder.py):

  student  [sys] [problem image] [question]
  teacher  [sys] [problem image] [question] [intro] [VT image]* [transition]
  both                                                               + [completion]

  text block   bos + ids + eos                    causal          rope ids count up by one
  image block  vision_start + patches + vision_end  all-to-all    ONE rope id for the whole block

No token sees a later block. A slot is the index of a token in the arrays. Example with one text
block of 1 id and one image of 2 patches:

  slot       0    1    2    3     4   5   6
  token     bos   x   eos  <img   .   .  img>
  position   0    1    2    3     3   3   3      the next block starts at 4
  limit      1    2    3    7     7   7   7      slot i sees slots j < limit[i]

For image generation, an image is also present as VAE latents (official: data/interleave_datasets,
bagel.py). The generation expert processes the latent tokens, so they follow all other slots, from a
static index on. `order` gives the place of each slot in the sequence:

  sequence   bos x eos <img L0 L1 img> bos y eos         L0, L1: latent tokens
  slots      bos x eos <img img> bos y eos | L0 L1
  order       0  1  2   3    6    7  8  9  | 4  5

`limit` counts places in the sequence. Only its own tokens see a noised image, on which the flow
loss is computed. It does not advance the rope id: the next block, its clean copy, has the same one.

Axes: B batch, T slots, P patches, C values of a patch or of a latent token, G latent tokens,
N completion tokens, R targets.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import images
from opsd_jax.tags import wrap_answer, wrap_thought

# Official prompts, byte for byte (data/opsd_pack_builder.py; inferencer.py for the inference
# variant, which has newlines around it and no space after "i.e.", so its token ids differ).
SYSTEM_TRAINING = (
    "Let's think step by step to answer the question. For text-based thinking, enclose the process "
    "within <think> </think>, e.g. <think> thinking process here </think>. For visual thinking, "
    "enclose the content within <image_start> </image_end>, e.g. <image_start> thinking image here "
    "</image_end>. Finally conclude with the final answer wrapped in <answer></answer> tags, i.e. "
    "<answer> answer here </answer>."
)
SYSTEM_INFERENCE = "\n" + SYSTEM_TRAINING.replace("i.e. <answer>", "i.e.<answer>") + "\n"
INTRO = (
    "The following images are privileged visual references that depict the intermediate visual "
    "thoughts on the path to the correct answer. Use them silently as grounding context; do not "
    "describe or echo them."
)
TRANSITION = (
    "Now, using your own independent reasoning, answer the problem above. Think step by step."
)

VISUAL_THOUGHTS = ("real", "noise", "swap", "image", "none")
MARKER = "<image_start>"
MARKER_END = "<image_end>"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The fixed texts of the contexts. An empty text leaves its block out.

    system: first block of both contexts.
    intro, transition: texts before and after the teacher's visual thoughts.
    suffix: text that is appended to the question.
    """

    system: str = SYSTEM_TRAINING
    intro: str = INTRO
    transition: str = TRANSITION
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text block.

    ids: int32 [n], without delimiters.
    loss: whether its tokens and its closing eos are training targets.
    """

    ids: np.ndarray
    loss: bool = False

    @property
    def slots(self) -> int:
        return len(self.ids) + 2


@dataclasses.dataclass(frozen=True)
class Image:
    """An image block.

    patches: [n, C], uint8, or float32 that is already normalised to [-1, 1].
    grid: numbers of rows and columns of patches.
    """

    patches: np.ndarray
    grid: tuple[int, int]

    @property
    def slots(self) -> int:
        return len(self.patches) + 2


@dataclasses.dataclass(frozen=True)
class Latent:
    """An image block as VAE latents.

    tokens: float32 [n, C], clean.
    grid: numbers of rows and columns of latent tokens.
    noised: whether this is a copy that the flow loss is computed on. Other blocks do not see it.
    """

    tokens: np.ndarray
    grid: tuple[int, int]
    noised: bool = False

    @property
    def slots(self) -> int:
        return len(self.tokens) + 2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "positions", "image", "order", "noised"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Latents:
    """The VAE latents of a packed batch: G per sequence, after its T other slots.

    tokens: float32 [B, G, C], clean.
    positions: int32 [B, G], row * side + column in the latents' position table.
    image: int32 [B, G], number of the latent image in its sequence, from 1; 0 at padding.
    order: int32 [B, T + G], place of each slot in the sequence.
    noised: int32 [B, T + G], number of the noised image that a slot belongs to, also at the image's
      delimiters; 0 elsewhere.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image: np.ndarray
    order: np.ndarray
    noised: np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "positions",
        "limit",
        "segment",
        "patches",
        "patch_positions",
        "patch_image",
        "patch_slots",
        "length",
        "next_position",
        "latents",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """A batch of packed sequences of one static shape, padded at the end.

    With latents, positions, limit and segment have T + G entries per sequence instead of T.

    tokens: int32 [B, T], the id at each text or delimiter slot, 0 at patches and padding.
    positions: int32 [B, T], rope ids.
    limit: int32 [B, T], a query at slot i sees slots j < limit[i].
    segment: int32 [B, T], document number, 0 at padding. No token sees another document.
    patches: uint8 or float32 [B, P, C], all images of the sequence one after another.
    patch_positions: int32 [B, P], row * side + column of each patch.
    patch_image: int32 [B, P], number of the image in its sequence, from 1; 0 at padding.
    patch_slots: int32 [B, P], slot of each patch in the sequence, T at padding.
    length: int32 [B], number of used slots.
    next_position: int32 [B], rope id of the first token that follows.
    latents: Latents, or None if the batch was packed without latents.
    """

    tokens: np.ndarray
    positions: np.ndarray
    limit: np.ndarray
    segment: np.ndarray
    patches: np.ndarray
    patch_positions: np.ndarray
    patch_image: np.ndarray
    patch_slots: np.ndarray
    length: np.ndarray
    next_position: np.ndarray
    latents: Latents | None = None

    @property
    def slots(self) -> int:
        """Static number of slots, T or T + G."""
        return self.positions.shape[1]


class TooLongError(ValueError):
    """A sequence that does not fit its bucket."""


def pack(
    rows,
    *,
    slots: int,
    patches: int,
    tokenizer,
    side: int,
    latents: int = 0,
    latent_dim: int = 0,
    latent_side: int = 0,
    names=None,
) -> Context:
    """Packs a batch of rows, each a list of blocks, into one Context.

    Official: data/opsd_pack_builder.py.

    Args:
      rows: the blocks of each sequence, B lists of Text, Image and Latent.
      slots, patches: the bucket, static sizes T and P.
      tokenizer: gives the four delimiter ids.
      side: number of rows, and of columns, of the position tables, in patches.
      latents, latent_dim: static sizes G and C of the latents. 0 without image generation.
      latent_side: number of rows, and of columns, of the latents' position table, in latent tokens.
        0 without image generation.
      names: one name per row for error messages.
    Returns:
      Context of static shape [B, T], with latents [B, G, C] if `latents` is positive.
    Raises:
      TooLongError: a row needs more slots, patches or latents than the bucket has. Nothing is
        truncated.
      ValueError: latents without latent_dim or latent_side, or an image that is larger than the
        position table.
    """
    image_blocks = [b for row in rows for b in row if isinstance(b, Image)]
    if latents and not (latent_dim and latent_side):
        raise ValueError(
            f"packing {latents} latents per row needs latent_dim and latent_side: pass both, "
            "they are static sizes as well"
        )
    width = image_blocks[0].patches.shape[1] if image_blocks else 1
    dtype = np.result_type(*{b.patches.dtype for b in image_blocks}) if image_blocks else np.uint8
    if dtype != np.uint8:  # a float batch is normalised as a whole
        dtype = np.dtype(np.float32)
    n, ints = len(rows), functools.partial(np.zeros, dtype=np.int32)
    tokens = ints((n, slots))
    positions, limit, segment, order, noised = (ints((n, slots + latents)) for _ in range(5))
    values = np.zeros((n, patches, width), dtype)
    patch_positions, patch_image = ints((n, patches)), ints((n, patches))
    patch_slots = np.full((n, patches), slots, np.int32)
    latent_tokens = np.zeros((n, latents, latent_dim), np.float32)
    latent_positions, latent_image = ints((n, latents)), ints((n, latents))
    length, next_position = ints(n), ints(n)
    for r, blocks in enumerate(rows):
        needs = need(blocks)
        if any(has < wants for has, wants in zip((slots, patches, latents), needs)):
            what = " and ".join(
                f"{n} {name}" for n, name in zip(needs, ("slots", "patches", "latents")) if n
            )
            raise TooLongError(
                f"row {names[r] if names else r} needs {what}, its bucket has {slots} and {patches}"
                f"{f' and {latents}' if latents or needs[2] else ''}: enlarge data.buckets, lower "
                "the image size, or leave the row out"
            )
        # `place` is the place in the sequence; `at`, `patch` and `latent` are the next free slot,
        # patch and latent token; `number` and `generated` count the image and latent blocks.
        place = rope = at = patch = latent = number = generated = 0
        for block in blocks:
            stop = place + block.slots
            if isinstance(block, Text):
                own = np.arange(at, at + block.slots)
                tokens[r, own] = [tokenizer.bos, *block.ids, tokenizer.eos]
                positions[r, own] = np.arange(rope, rope + block.slots)
                limit[r, own] = np.arange(place + 1, stop + 1)
                at, advance = at + block.slots, block.slots
            elif isinstance(block, Image):
                own = np.arange(at, at + block.slots)
                tokens[r, own[0]], tokens[r, own[-1]] = tokenizer.image_start, tokenizer.image_end
                number += 1
                new = slice(patch, patch + len(block.patches))
                values[r, new] = (
                    block.patches if dtype == np.uint8 else images.normalize(block.patches)
                )
                patch_positions[r, new] = images.position_ids(block.grid, side)
                patch_image[r, new] = number
                patch_slots[r, new] = own[1:-1]
                at, patch, advance = at + block.slots, new.stop, 1
            else:
                new = slice(latent, latent + len(block.tokens))
                own = np.array([at, *range(slots + new.start, slots + new.stop), at + 1])
                tokens[r, at], tokens[r, at + 1] = tokenizer.image_start, tokenizer.image_end
                generated += 1
                latent_tokens[r, new] = block.tokens
                latent_positions[r, new] = images.position_ids(block.grid, latent_side)
                latent_image[r, new] = generated
                noised[r, own] = generated if block.noised else 0
                at, latent, advance = at + 2, new.stop, 0 if block.noised else 1
            if not isinstance(block, Text):
                positions[r, own], limit[r, own] = rope, stop
            order[r, own], segment[r, own] = np.arange(place, stop), 1
            place, rope = stop, rope + advance
        length[r], next_position[r] = place, rope
    extra = (
        Latents(latent_tokens, latent_positions, latent_image, order, noised) if latents else None
    )
    return Context(
        tokens,
        positions,
        limit,
        segment,
        values,
        patch_positions,
        patch_image,
        patch_slots,
        length,
        next_position,
        extra,
    )


def need(blocks) -> tuple[int, int, int]:
    """The numbers of slots, patches and latents that `pack` uses for one row of blocks."""
    latents = sum(len(b.tokens) for b in blocks if isinstance(b, Latent))
    return (
        sum(b.slots for b in blocks) - latents,
        sum(len(b.patches) for b in blocks if isinstance(b, Image)),
        latents,
    )


def student(tokenizer, prompts: Prompts, question, problem: Image) -> list:
    """Blocks of the student's context (paper Eq. 2 and 6): system prompt, problem image, question.

    Args:
      tokenizer: encodes the texts.
      question: text, or ids int32 [n]. `prompts.suffix` is appended only to a text.
    """
    ids = question
    if isinstance(question, str):
        ids = tokenizer.encode(question)
        if prompts.suffix:
            ids = np.concatenate([ids, tokenizer.encode(prompts.suffix)])
    return [*_prompt(tokenizer, prompts.system), problem, Text(ids)]


def teacher(tokenizer, prompts: Prompts, question, problem: Image, visual_thoughts) -> list:
    """Blocks of the teacher's context (paper Eq. 1 and 5).

    They are the student's blocks, then the intro, the visual thoughts in order (None entries are
    skipped) and the transition. The reasoning texts and the answer are never part of it.
    """
    return [
        *student(tokenizer, prompts, question, problem),
        *_prompt(tokenizer, prompts.intro),
        *(vt for vt in visual_thoughts if vt is not None),
        *_prompt(tokenizer, prompts.transition),
    ]


def _prompt(tokenizer, text):
    if isinstance(text, str):
        text = tokenizer.encode(text) if text else np.zeros(0, np.int32)
    return [Text(text)] if len(text) else []


def replace_visual_thoughts(
    mode: str, problem: Image, own, other, rng: np.random.Generator
) -> list:
    """The visual thoughts that the teacher gets in a mode of `VISUAL_THOUGHTS`.

    real: those of the example, `own`.
    noise: standard normal values of the same shapes, in normalised pixel space, sampled from `rng`
      anew in every call.
    swap: those of `other`, another example of the same task.
    image: the problem image in place of each visual thought.
    none: no image. Intro and transition remain.

    Args:
      own, other: lists of Image. None entries are skipped.
    Raises:
      ValueError: an unknown mode.
    """
    own = [vt for vt in own if vt is not None]
    if mode == "real":
        return own
    if mode == "noise":
        return [Image(rng.standard_normal(vt.patches.shape, np.float32), vt.grid) for vt in own]
    if mode == "swap":
        return [vt for vt in other if vt is not None]
    if mode == "image":
        return [problem for _ in own]
    if mode == "none":
        return []
    raise ValueError(f"visual_thoughts is {mode!r}: choose from {VISUAL_THOUGHTS}")


def text_trace(full_text_only_thought: str, answer: str) -> str:
    """The completion of a text-only trace."""
    return wrap_thought(full_text_only_thought) + wrap_answer(answer)


def interleaved(
    tokenizer, prompts: Prompts, question, problem: Image, thoughts, visual_thoughts, answer: str
) -> list:
    """Blocks of an interleaved trace as the base model was trained on: text, image, text, ...

    Round i is `<think>t_i</think><image_start>`, then the image, then the next round, which starts
    with `<image_end>`. The last round ends with the answer. Every text is a training target. The
    images are Image blocks here, which become ViT tokens.
    """
    blocks = student(tokenizer, prompts, question, problem)
    shown = list(visual_thoughts)[: len(thoughts)]
    for n, thought in enumerate(thoughts):
        text = (MARKER_END if 0 < n <= len(shown) else "") + wrap_thought(thought)
        text += MARKER if n < len(shown) and n + 1 < len(thoughts) else ""
        text += wrap_answer(answer) if n + 1 == len(thoughts) else ""
        blocks.append(Text(tokenizer.encode(text), loss=True))
        if n < len(shown) and n + 1 < len(thoughts):
            blocks.append(shown[n])
    return blocks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["context", "rows", "labels", "mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Supervised:
    """A packed batch with training targets.

    context: Context [B, T].
    rows: int32 [B, R], slots whose hidden states predict a label.
    labels: int32 [B, R], the ids that they predict.
    mask: bool [B, R], True at targets, False at padding.
    """

    context: Context
    rows: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def supervise(rows, *, targets: int, tokenizer, names=None, **sizes) -> Supervised:
    """Packs rows of blocks; blocks with `loss` give the targets.

    In such a block, bos predicts the first id, and the last id predicts eos.

    Args:
      rows, tokenizer, names: see `pack`.
      targets: static number R of targets per sequence.
      sizes: the other arguments of `pack`.
    Raises:
      TooLongError: a row does not fit its bucket (see `pack`) or has more than R targets.
    """
    packed = pack(rows, tokenizer=tokenizer, names=names, **sizes)
    at, labels = np.zeros((len(rows), targets), np.int32), np.zeros((len(rows), targets), np.int32)
    mask = np.zeros((len(rows), targets), bool)
    for r, blocks in enumerate(rows):
        start = done = 0
        for block in blocks:
            if isinstance(block, Text) and block.loss:
                new = slice(done, done + len(block.ids) + 1)
                if new.stop > targets:
                    raise TooLongError(
                        f"row {names[r] if names else r} has more than {targets} target tokens: "
                        "enlarge the bucket's `targets` or leave the row out"
                    )
                at[r, new] = np.arange(start, start + len(block.ids) + 1)
                labels[r, new] = [*block.ids, tokenizer.eos]
                mask[r, new] = True
                done = new.stop
            # The tokens of a Latent block follow all other slots.
            start += 2 if isinstance(block, Latent) else block.slots
    return Supervised(packed, at, labels, mask)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["student", "teacher"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """The contexts of the same B examples as both roles see them.

    student: Context [B, T], question and problem image.
    teacher: Context [B, T'], the same followed by the privileged content.
    """

    student: Context
    teacher: Context


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pixels", "sizes"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class PaddedImages:
    """The images of B examples as the autoencoder sees them.

    The problem image is the first of an example; its visual thoughts follow.

    pixels: uint8 [B, M, H, W, 3], M images per example, each in the upper left corner.
    sizes: int32 [B, M, 2], height and width of each image in pixels; 0 where there is none.
    """

    pixels: jax.Array
    sizes: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["traces", "images"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class GenerationBatch:
    """Traces that train image generation.

    traces: Supervised [B, T], whose contexts hold latents.
    images: PaddedImages [B, M, H, W, 3], from which these latents are encoded
      (`flow.with_latents`).
    """

    traces: Supervised
    images: PaddedImages


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "labels", "mask"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion as the block that follows both contexts.

    tokens: int32 [B, N + 1], bos, c_1 .. c_N: the slots after the context. The closing eos has no
      slot of its own.
    labels: int32 [B, N + 1], c_1 .. c_n, eos: what the hidden state at each slot predicts.
    mask: bool [B, N + 1], the n + 1 slots that count.
    """

    tokens: jax.Array
    labels: jax.Array
    mask: jax.Array


def completion(tokens, mask, *, bos: int, eos: int, eos_label=True) -> Completion:
    """The block of a completion after a context, with labels and mask.

        tokens   c1  c2  c3  -         n = 3, N = 4
        in       bos c1  c2  c3  -
        labels   c1  c2  c3  eos -
        mask     1   1   1   1   0

    Args:
      tokens: int32 [B, N], completion tokens.
      mask: bool [B, N], True at the first n tokens of each sequence.
      eos_label: bool, or bool [B]: whether the position that predicts eos counts.
    Returns:
      Completion [B, N + 1].
    """
    n = jnp.sum(mask, axis=1, dtype=jnp.int32)
    index = jnp.arange(tokens.shape[1] + 1)
    blank = jnp.where(mask, tokens, 0)
    shifted = jnp.pad(blank, ((0, 0), (1, 0)), constant_values=bos)
    labels = jnp.where(index == n[:, None], eos, jnp.pad(blank, ((0, 0), (0, 1))))
    last = n + jnp.broadcast_to(jnp.asarray(eos_label), n.shape)
    return Completion(shifted, labels, index < last[:, None])


def following(context: Context, slots: int):
    """Vectors of `slots` text slots after each sequence's context.

    They are the slots T .. T + slots - 1 in every sequence. The gap between a shorter context and T
    is padding, which no token sees. Rope ids continue without a gap.

    Returns:
      (positions, limit, segment), int32 [B, slots] each.
    """
    index = jnp.arange(slots, dtype=jnp.int32)
    shape = (context.tokens.shape[0], slots)
    return (
        context.next_position[:, None] + index,
        jnp.broadcast_to(context.slots + 1 + index, shape),
        jnp.ones(shape, jnp.int32),
    )
