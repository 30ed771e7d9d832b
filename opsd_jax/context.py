"""What each role sees: prompts, packing, masks and rope positions as vectors.

One room for training, sampling, scoring and evaluation. A context is a list of blocks packed into one sequence
(official: data/opsd_pack_builder.py):

  student  [sys] [problem image] [question]
  teacher  [sys] [problem image] [question] [intro] [VT image]* [transition]
  both                                                               + [completion]

  text block   bos + ids + eos                    causal          rope ids count up by one
  image block  vision_start + patches + vision_end  all-to-all    ONE rope id for the whole block

Nothing sees a later block. Example, one text block of 1 id and one image of 2 patches:

  slot       0    1    2    3     4   5   6
  token     bos   x   eos  <img   .   .  img>
  position   0    1    2    3     3   3   3      the next block starts at 4
  limit      1    2    3    7     7   7   7      slot i sees slots j < limit[i]

Where images are drawn, an image also stands as VAE latents (official: data/interleave_datasets, bagel.py). Latent
tokens run through another expert, so they are kept behind all other slots, cut off at a static place, and `order`
says where each slot really stands:

  sequence   bos x eos <img L0 L1 img> bos y eos         L0, L1: latent tokens
  slots      bos x eos <img img> bos y eos | L0 L1
  order       0  1  2   3    6    7  8  9  | 4  5

`limit` counts places of the sequence. A noised image (what the flow loss is taken on) is seen by itself alone and
leaves the rope id to the next block, its clean copy.

Letters: B batch, T slots, P patches, C values of a patch, G latent tokens, N completion tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import images
from opsd_jax.tags import wrap_answer, wrap_thought

# Official prompts, byte for byte (data/opsd_pack_builder.py; inferencer.py for the inference variant, which
# differs in the outer newlines and in the missing space after "i.e.": other token ids).
SYSTEM_TRAINING = (
    "Let's think step by step to answer the question. For text-based thinking, enclose the process within "
    "<think> </think>, e.g. <think> thinking process here </think>. For visual thinking, enclose the content within "
    "<image_start> </image_end>, e.g. <image_start> thinking image here </image_end>. Finally conclude with the final "
    "answer wrapped in <answer></answer> tags, i.e. <answer> answer here </answer>."
)
SYSTEM_INFERENCE = "\n" + SYSTEM_TRAINING.replace("i.e. <answer>", "i.e.<answer>") + "\n"
INTRO = (
    "The following images are privileged visual references that depict the intermediate visual thoughts on the path "
    "to the correct answer. Use them silently as grounding context; do not describe or echo them."
)
TRANSITION = (
    "Now, using your own independent reasoning, answer the problem above. Think step by step."
)

VISUAL_THOUGHTS = ("real", "noise", "swap", "image", "none")
MARKER = "<image_start>"
MARKER_END = "<image_end>"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The fixed texts of the contexts; an empty one leaves its block out. `suffix` is appended to the question."""

    system: str = SYSTEM_TRAINING
    intro: str = INTRO
    transition: str = TRANSITION
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text block: ids int32 [n] without delimiters. `loss`: its tokens and closing eos are training targets."""

    ids: np.ndarray
    loss: bool = False

    @property
    def slots(self) -> int:
        return len(self.ids) + 2


@dataclasses.dataclass(frozen=True)
class Image:
    """An image block: patches [n, C] (uint8, or float32 already normalised) and grid (rows, columns)."""

    patches: np.ndarray
    grid: tuple[int, int]

    @property
    def slots(self) -> int:
        return len(self.patches) + 2


@dataclasses.dataclass(frozen=True)
class Latent:
    """An image block as VAE latents: tokens float32 [n, C] (clean) and grid (rows, columns) of tokens.

    `noised`: a copy that the flow loss is taken on; nothing outside sees it.
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
    """The VAE latents of a packed batch, G a row behind its T other slots.

    tokens: float32 [B, G, C], clean. positions: int32 [B, G], row * side + column in the latents' position table.
    image: int32 [B, G], number of the latent image in its row, 0 at padding.
    order: int32 [B, T + G], place of each slot in the sequence.
    noised: int32 [B, T + G], number of the noised image that a slot belongs to, delimiters too; 0 elsewhere.
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

    tokens: int32 [B, T], the id at each text or delimiter slot, 0 at patches and padding.
    positions: int32 [B, T], rope ids. (This and the next two have T + G entries where there are latents.)
    limit: int32 [B, T], a query at slot i sees slots j < limit[i].
    segment: int32 [B, T], document number, 0 at padding; nothing sees another document.
    patches: uint8 or float32 [B, P, C], all images of the row one after another.
    patch_positions: int32 [B, P], row * side + column of each patch.
    patch_image: int32 [B, P], number of the image, 0 at padding.
    patch_slots: int32 [B, P], slot of each patch in the sequence, T at padding.
    length: int32 [B], used slots.
    next_position: int32 [B], rope id of whatever follows.
    latents: Latents, or None where the batch was packed without.
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
    """A row that does not fit its bucket."""


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
    """Packs a batch of rows, each a list of blocks, into one Context of static shape [len(rows), slots].

    Args:
      slots, patches: the bucket: static sizes T and P. tokenizer: gives the four delimiter ids.
      side: patches a side of the position tables. names: one name a row for error messages.
      latents, latent_dim, latent_side: static sizes G and C, and the side of the latents' position table; 0 where
        nothing is drawn.
    Raises:
      TooLongError: a row needs more slots, patches or latents than the bucket has. Nothing is truncated.
    """
    image_blocks = [b for row in rows for b in row if isinstance(b, Image)]
    if latents and not (latent_dim and latent_side):
        raise ValueError(
            f"packing {latents} latents a row needs latent_dim and latent_side, static sizes as well"
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
                f"{f' and {latents}' if latents or needs[2] else ''}: enlarge data.buckets, lower the image size, or leave "
                "the row out"
            )
        # place: in the sequence. at, patch, latent: the next free slot, patch, latent token
        place = rope = at = patch = latent = number = drawn = 0
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
                pixels = block.patches
                if dtype != np.uint8 and pixels.dtype == np.uint8:
                    pixels = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
                values[r, new] = pixels
                patch_positions[r, new] = images.position_ids(block.grid, side)
                patch_image[r, new] = number
                patch_slots[r, new] = own[1:-1]
                at, patch, advance = at + block.slots, new.stop, 1
            else:
                new = slice(latent, latent + len(block.tokens))
                own = np.array([at, *range(slots + new.start, slots + new.stop), at + 1])
                tokens[r, at], tokens[r, at + 1] = tokenizer.image_start, tokenizer.image_end
                drawn += 1
                latent_tokens[r, new] = block.tokens
                latent_positions[r, new] = images.position_ids(block.grid, latent_side)
                latent_image[r, new] = drawn
                noised[r, own] = drawn if block.noised else 0
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
    """Slots, patches and latents that a row of blocks takes in `pack`."""
    latents = sum(len(b.tokens) for b in blocks if isinstance(b, Latent))
    return (
        sum(b.slots for b in blocks) - latents,
        sum(len(b.patches) for b in blocks if isinstance(b, Image)),
        latents,
    )


def student(tokenizer, prompts: Prompts, question, problem: Image) -> list:
    """Blocks of the student's context (Eq. 2/6). question: ids or str."""
    ids = question
    if isinstance(question, str):
        ids = tokenizer.encode(question)
        if prompts.suffix:
            ids = np.concatenate([ids, tokenizer.encode(prompts.suffix)])
    return [*_prompt(tokenizer, prompts.system), problem, Text(ids)]


def teacher(tokenizer, prompts: Prompts, question, problem: Image, visual_thoughts) -> list:
    """Blocks of the teacher's context (Eq. 1/5): the student's, then intro, VT images in order (None entries are
    skipped), transition. The reasoning texts and the answer are never in it."""
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
    """The VT images that the teacher gets in a mode of `VISUAL_THOUGHTS`.

    real: its own. noise: standard normal values of the same shapes, in normalised pixel space, drawn afresh at
    every call. swap: those of `other`, another row of the same task. image: the problem image in each slot.
    none: no image; intro and transition remain.
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
    """Blocks of an interleaved trace as the base model was trained on: text, drawn image, text, ...

    Round i is `<think>t_i</think><image_start>`, then the image, then the next round, which opens with
    `<image_end>`; the last one ends with the answer. Every text is a target. Here the images stand as ViT tokens.
    """
    blocks = student(tokenizer, prompts, question, problem)
    drawn = list(visual_thoughts)[: len(thoughts)]
    for n, thought in enumerate(thoughts):
        text = (MARKER_END if 0 < n <= len(drawn) else "") + wrap_thought(thought)
        text += MARKER if n < len(drawn) and n + 1 < len(thoughts) else ""
        text += wrap_answer(answer) if n + 1 == len(thoughts) else ""
        blocks.append(Text(tokenizer.encode(text), loss=True))
        if n < len(drawn) and n + 1 < len(thoughts):
            blocks.append(drawn[n])
    return blocks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["context", "rows", "labels", "mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Supervised:
    """A packed batch with training targets.

    context: Context [B, T]. rows: int32 [B, R], slots whose hidden state predicts a label. labels: int32 [B, R].
    mask: bool [B, R], real targets.
    """

    context: Context
    rows: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def supervise(rows, *, targets: int, tokenizer, names=None, **sizes) -> Supervised:
    """Packs rows of blocks; blocks with `loss` give the targets: bos predicts the first id, the last id eos.

    `targets`: static number R of target rows. `sizes`: see `pack`. TooLongError as there.
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
                        f"row {names[r] if names else r} has more than {targets} target tokens: enlarge "
                        "the bucket's `targets` or leave the row out"
                    )
                at[r, new] = np.arange(start, start + len(block.ids) + 1)
                labels[r, new] = [*block.ids, tokenizer.eos]
                mask[r, new] = True
                done = new.stop
            start += (
                2 if isinstance(block, Latent) else block.slots
            )  # its tokens are behind all other slots
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
    """The images of B examples as the autoencoder sees them: the problem image, then the visual thoughts.

    pixels: uint8 [B, M, H, W, 3], M images per example, each in the upper left corner.
    sizes: int32 [B, M, 2], height and width of each image; 0 where there is none.
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
    images: PaddedImages [B, M, H, W, 3], which these latents are encoded from (`flow.with_latents`).
    """

    traces: Supervised
    images: PaddedImages


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "labels", "mask"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Completion:
    """The same completion as it stands behind both contexts.

    tokens: int32 [B, N + 1], bos, c_1 .. c_N: the slots behind the context (the closing eos has no row of its own).
    labels: int32 [B, N + 1], c_1 .. c_n, eos: what the state at each slot predicts.
    mask: bool [B, N + 1], rows that count: n + 1 of them.
    """

    tokens: jax.Array
    labels: jax.Array
    mask: jax.Array


def completion(tokens, mask, *, bos: int, eos: int, eos_label=True) -> Completion:
    """Completion tokens int32 [B, N] with mask bool [B, N] (a prefix of each row) -> the block behind a context.

        tokens   c1  c2  c3  -         n = 3, N = 4
        in       bos c1  c2  c3  -
        labels   c1  c2  c3  eos -
        mask     1   1   1   1   0

    `eos_label`: bool, or bool [B]: whether the position that predicts eos counts.
    """
    n = jnp.sum(mask, axis=1, dtype=jnp.int32)
    index = jnp.arange(tokens.shape[1] + 1)
    blank = jnp.where(mask, tokens, 0)
    shifted = jnp.pad(blank, ((0, 0), (1, 0)), constant_values=bos)
    labels = jnp.where(index == n[:, None], eos, jnp.pad(blank, ((0, 0), (0, 1))))
    last = n + jnp.broadcast_to(jnp.asarray(eos_label), n.shape)
    return Completion(shifted, labels, index < last[:, None])


def following(context: Context, slots: int):
    """Vectors of `slots` text slots after each sequence's context: (positions, limit, segment), int32 [B, slots].

    They are the slots T..T+slots in every sequence. The gap between a shorter context and T is padding, which nothing
    sees, and rope ids continue without a gap.
    """
    index = jnp.arange(slots, dtype=jnp.int32)
    shape = (context.tokens.shape[0], slots)
    return (
        context.next_position[:, None] + index,
        jnp.broadcast_to(context.slots + 1 + index, shape),
        jnp.ones(shape, jnp.int32),
    )
