"""What each role sees: prompts, packing, masks and rope positions as vectors.

Training, sampling, scoring and evaluation all use this module. A context is a list of blocks that
are packed into one sequence (official: data/opsd_pack_builder.py):

  student  [sys] [problem image] [question]
  teacher  [sys] [problem image] [question] [intro] [VT image]* [transition]
  both                                                               + [completion]

These are the defaults. `BlockNames` chooses other blocks for each role, and `named_blocks` makes
them of an example's content. Where a question has places of images (`tags.PLACE`), it is several
text blocks, with the problem images between them.

  text block   bos + ids + eos                      causal       rope positions count up by one
  image block  vision_start + patches + vision_end  all-to-all   ONE rope position for all of it

Models whose positions follow from the grids of images (Qwen2.5-VL, Qwen3-VL) read an image as
merge blocks of patches, one token for each, which are causal like texts:

  image block  vision_start + merge blocks + vision_end   rope positions of three dimensions

No token sees a later block. A position is the index of a token in the arrays. Example with one
text block of 1 id and one image of 2 patches:

  position        0    1    2    3     4   5   6
  token          bos   x   eos  <img   .   .  img>
  rope position   0    1    2    3     3   3   3      the next block starts at 4
  limit           1    2    3    7     7   7   7      position i sees positions j < limit[i]

In chat form (`Prompts.form`), a context is a conversation up to the assistant's turn: the system
prompt, and all other blocks in the user's turn. The texts have no bos and eos of their own, and the
chat template's texts around them are blocks, too (`chat`).

With three dimensions (time, row, column) a text counts up all three by one, and the token at row r
and column c of an image that starts at p has (p, p + r, p + c). The next token continues with p +
the longer side of the image, in tokens. Official: transformers, get_rope_index.

For image generation, an image is also present as VAE latents (official: data/interleave_datasets,
bagel.py). The generation expert processes the latent tokens, so they follow all others, from a
static position on. `order` gives the place of each position in the sequence:

  sequence    bos x eos <img L0 L1 img> bos y eos         L0, L1: latent tokens
  positions   bos x eos <img img> bos y eos | L0 L1
  order        0  1  2   3    6    7  8  9  | 4  5

`limit` counts places in the sequence. Only its own tokens see a noised image, on which the flow
loss is computed. It does not advance the rope position: the next block, its clean copy, has the
same one.

Axes: B batch, T positions, P patches, C values of a patch or of a latent token, G latent tokens,
N completion tokens, R targets.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Shaped

from opsd_jax import chat, images
from opsd_jax.array_types import AnyArray
from opsd_jax.inputs import columns
from opsd_jax.tags import around_places, places_fault, wrap_answer, wrap_thought

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

# Names of blocks. The fixed texts are fields of `Prompts`, and the others come from the example.
FIXED_TEXTS = ("system", "intro", "transition")
CONTENTS = ("image", "question", "visual_thoughts")
# Names may also be "text:COLUMN" and "images:COLUMN", columns of the data (`inputs.columns`), and
# "image@TRANSFORM", the problem image after one of `images.TRANSFORMS`.
TRANSFORMED = "image@"

VISUAL_THOUGHTS = ("real", "noise", "swap", "image", "none")
MARKER = "<image_start>"
MARKER_END = "<image_end>"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The fixed texts of the contexts, and their form. An empty text leaves its block out.

    system: first block of both contexts.
    intro, transition: texts before and after the teacher's visual thoughts.
    suffix: text that is appended to the question.
    form: "bagel", in which bos and eos are around each text; "chat", turns of system, user and
      assistant by the chat template of the tokenizer's folder.
    thinking: whether an assistant's turn in chat form begins with the model's thoughts, where its
      template has that choice. Otherwise Qwen3's begins with an empty think block.
    """

    system: str = SYSTEM_TRAINING
    intro: str = INTRO
    transition: str = TRANSITION
    suffix: str = ""
    form: Annotated[str, ("bagel", "chat")] = "bagel"
    thinking: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """A text block.

    ids: int32 [n], without delimiters.
    loss: whether its tokens and its closing eos are training targets.
    delimited: whether bos and eos are around it. In chat form the template's texts delimit it.
    noise: of a `NoisedText`, until `conversation` has put it in place.
    """

    ids: np.ndarray
    loss: bool = False
    delimited: bool = True
    noise: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of tokens, delimiters included."""
        return len(self.ids) + 2 * self.delimited


@dataclasses.dataclass(frozen=True)
class Image:
    """An image block.

    patches: [n, C], uint8, or float32 that is already normalised to [-1, 1]. Their order is that of
      `images.patchify` with the same merge.
    grid: numbers of rows and columns of patches.
    merge: patches along a side of the merge block that becomes one token; 1: each patch is a token.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    merge: int = 1

    @property
    def length(self) -> int:
        """Number of tokens, delimiters included."""
        return len(self.patches) // self.merge**2 + 2


def image_block(pixels: Shaped[np.ndarray, "H W 3"], patch: int, merge: int = 1) -> Image:
    """The block of an image of the model's size.

    Args:
      pixels: [H, W, 3], uint8, or float32 in [-1, 1].
      patch: pixels along a side of a patch. merge: see `Image`.
    Raises:
      ValueError: H or W is not a multiple of patch * merge.
    """
    grid = pixels.shape[0] // patch, pixels.shape[1] // patch
    return Image(images.patchify(pixels, patch, merge), grid, merge)


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
    def length(self) -> int:
        """Number of tokens, delimiters included."""
        return len(self.tokens) + 2


Block = Text | Image | Latent


@dataclasses.dataclass(frozen=True, eq=False)
class NoisedText:
    """A text of a context in chat form whose tokens become noise where they are in the context.

    ids: int32 [n], the text. Its tokens in a context may be fewer, as neighbours merge.
    noise: int32 [n], what takes their place, so that the context has the same length.
    """

    ids: np.ndarray
    noise: np.ndarray


Content = Mapping[str, np.ndarray | NoisedText | Sequence[np.ndarray | NoisedText | Image]]
"""What an example has for each block name: token ids int32 [n] of a text, the ids of each text
around the places in a question (`question_ids`), or images. An empty sequence leaves the block out.
"""


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """Names of the blocks of both contexts, in order. The defaults are the paper's (Eq. 1, 2).

    student, teacher: each name is one of `FIXED_TEXTS` or `CONTENTS`, or the name of a column
      ("text:COLUMN" or "images:COLUMN"), or begins with `TRANSFORMED`.
    """

    student: tuple[str, ...] = ("system", "image", "question")
    teacher: tuple[str, ...] = (
        "system",
        "image",
        "question",
        "intro",
        "visual_thoughts",
        "transition",
    )

    @property
    def privileged(self) -> tuple[str, ...]:
        """The blocks of an example that the teacher has and the student lacks, in order."""
        return tuple(n for n in self.teacher if n not in (*self.student, *FIXED_TEXTS))

    @property
    def contents(self) -> tuple[str, ...]:
        """The blocks of an example in either context, each once."""
        every = dict.fromkeys((*self.student, *self.teacher))
        return tuple(name for name in every if name not in FIXED_TEXTS)


def holds_images(name: str) -> bool:
    """Whether a block of this name consists of images. Otherwise it is a text."""
    return name in ("image", "visual_thoughts") or name.startswith((columns.IMAGES, TRANSFORMED))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "table_ids", "image", "order", "noised"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Latents:
    """The VAE latents of a packed batch: G per sequence, after its T other positions.

    tokens: float32 [B, G, C], clean.
    table_ids: int32 [B, G], row * side + column in the latents' position table.
    image: int32 [B, G], number of the latent image in its sequence, from 1; 0 at padding.
    order: int32 [B, T + G], place of each position in the sequence.
    noised: int32 [B, T + G], number of the noised image that a position belongs to, also at the
      image's delimiters; 0 elsewhere.
    """

    tokens: np.ndarray
    table_ids: np.ndarray
    image: np.ndarray
    order: np.ndarray
    noised: np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "rope_positions",
        "limit",
        "segment",
        "patches",
        "patch_table_ids",
        "patch_image",
        "patch_positions",
        "length",
        "next_rope_position",
        "latents",
        "patch_cells",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """A batch of packed sequences of one static shape, padded at the end.

    With latents, rope_positions, limit and segment have T + G entries per sequence instead of T.

    tokens: int32 [B, T], the id of each text token or delimiter, 0 at patches and padding.
    rope_positions: int32 [B, T]; [B, T, 3] (time, row, column) where the model's positions follow
      from the grids of images.
    limit: int32 [B, T], a query at position i sees positions j < limit[i].
    segment: int32 [B, T], document number, 0 at padding. No token sees another document.
    patches: uint8 or float32 [B, P, C], all images of the sequence one after another.
    patch_table_ids: int32 [B, P], row * side + column in the vision tower's position table; 0
      where there are `patch_cells` instead.
    patch_image: int32 [B, P], number of the image in its sequence, from 1; 0 at padding.
    patch_positions: int32 [B, P], position of the token that each patch is part of, T at padding.
    length: int32 [B], number of positions in use.
    next_rope_position: int32 [B], rope position of the first token that follows.
    latents: Latents, or None if the batch was packed without latents.
    patch_cells: int32 [B, P, 4], row and column of each patch in its image, and the image's rows
      and columns, in patches; 0 at padding. None where a table of positions has `patch_table_ids`.
    """

    tokens: np.ndarray
    rope_positions: np.ndarray
    limit: np.ndarray
    segment: np.ndarray
    patches: np.ndarray
    patch_table_ids: np.ndarray
    patch_image: np.ndarray
    patch_positions: np.ndarray
    length: np.ndarray
    next_rope_position: np.ndarray
    latents: Latents | None = None
    patch_cells: np.ndarray | None = None

    @property
    def padded_length(self) -> int:
        """Static number of positions, T or T + G."""
        return self.limit.shape[1]


class TooLongError(ValueError):
    """A sequence that does not fit its bucket."""


class Sizes(NamedTuple):
    """Static sizes of a packed batch, or what a sequence needs of them.

    positions: T, without latent tokens.
    patches: P.
    targets: R, number of targets (`Supervised`).
    latents: G, number of latent tokens; 0 without image generation.
    """

    positions: int
    patches: int
    targets: int = 0
    latents: int = 0


def need(blocks: Sequence[Block]) -> Sizes:
    """The sizes that one sequence of blocks needs."""
    latents = sum(len(b.tokens) for b in blocks if isinstance(b, Latent))
    return Sizes(
        sum(b.length for b in blocks) - latents,
        sum(len(b.patches) for b in blocks if isinstance(b, Image)),
        sum(len(b.ids) + 1 for b in blocks if isinstance(b, Text) and b.loss),
        latents,
    )


def pack(
    sequences: Sequence[Sequence[Block]],
    sizes: Sizes,
    *,
    tokenizer,
    side: int,
    generation=None,
    names: Sequence[str] | None = None,
    patch_dim: int = 1,
) -> Context:
    """Packs a batch of sequences, each a list of blocks, into one Context.

    Official: data/opsd_pack_builder.py.

    Args:
      sequences: the blocks of each sequence, B lists.
      sizes: the bucket.
      tokenizer: gives the four delimiter ids.
      side: number of rows, and of columns, of the vision tower's position table, in patches. 0
        where positions follow from the grids of images: rope positions then have three dimensions,
        and the context has `patch_cells`.
      generation: GenerationConfig, sizes of the model's latents. None without image generation.
      names: a name of each sequence's example, for error messages.
      patch_dim: C, where no sequence has an image.
    Returns:
      Context of static shape [B, T], with latents [B, G, C] if `sizes` has any.
    Raises:
      TooLongError: a sequence needs more positions, patches or latents than the bucket has. Nothing
        is truncated.
      ValueError: latents without `generation`, an image that is larger than its position table, or
        a number of patches in the bucket that does not divide into merge blocks.
    """
    image_blocks = [b for blocks in sequences for b in blocks if isinstance(b, Image)]
    if sizes.latents and generation is None:
        raise ValueError(
            f"packing {sizes.latents} latents per sequence needs the sizes of the model's latents: "
            "pass generation, or set latents to 0"
        )
    width = image_blocks[0].patches.shape[1] if image_blocks else patch_dim
    dtype = np.result_type(*{b.patches.dtype for b in image_blocks}) if image_blocks else np.uint8
    if dtype != np.uint8:  # a float batch is normalised as a whole
        dtype = np.dtype(np.float32)
    n, ints = len(sequences), functools.partial(np.zeros, dtype=np.int32)
    tokens = ints((n, sizes.positions))
    every = n, sizes.positions + sizes.latents
    # A position of one dimension is one of three that are equal. The first of them is kept.
    rope_positions = ints((*every, 3))
    limit, segment, order, noised = (ints(every) for _ in range(4))
    values = np.zeros((n, sizes.patches, width), dtype)
    patch_table_ids, patch_image = ints((n, sizes.patches)), ints((n, sizes.patches))
    patch_cells = ints((n, sizes.patches, 4))
    patch_positions = np.full((n, sizes.patches), sizes.positions, np.int32)
    latent_tokens = np.zeros(
        (n, sizes.latents, generation.latent_dim if generation else 0), np.float32
    )
    latent_table_ids, latent_image = ints((n, sizes.latents)), ints((n, sizes.latents))
    length, next_rope_position = ints(n), ints(n)
    for b, blocks in enumerate(sequences):
        _check_fit(need(blocks), sizes, _named(b, names))
        # `place` is the place in the sequence; `at`, `patch` and `latent` are the next free
        # position, patch and latent token; `number` and `generated` count the image and latent
        # blocks.
        place = rope = at = patch = latent = number = generated = 0
        for block in blocks:
            stop = place + block.length
            if isinstance(block, Text):
                own = np.arange(at, at + block.length)
                own_ids = [tokenizer.bos, *block.ids, tokenizer.eos]
                tokens[b, own] = own_ids if block.delimited else block.ids
                rope_positions[b, own] = np.arange(rope, rope + block.length)[:, None]
                limit[b, own] = np.arange(place + 1, stop + 1)
                at, advance = at + block.length, block.length
            elif isinstance(block, Image):
                own = np.arange(at, at + block.length)
                tokens[b, own[0]], tokens[b, own[-1]] = tokenizer.image_start, tokenizer.image_end
                number += 1
                new = slice(patch, patch + len(block.patches))
                values[b, new] = (
                    block.patches if dtype == np.uint8 else images.normalize(block.patches)
                )
                patch_image[b, new] = number
                patch_positions[b, new] = np.repeat(own[1:-1], block.merge**2)
                if side:
                    patch_table_ids[b, new] = images.position_ids(block.grid, side)
                    rope_positions[b, own], limit[b, own], advance = rope, stop, 1
                else:
                    patch_cells[b, new] = images.cells(block.grid, block.merge)
                    relative, advance = _rope_of_image(block, sizes)
                    rope_positions[b, own] = rope + relative
                    limit[b, own] = np.arange(place + 1, stop + 1)
                at, patch = at + block.length, new.stop
            else:
                new = slice(latent, latent + len(block.tokens))
                own = np.array([at, *(sizes.positions + np.arange(new.start, new.stop)), at + 1])
                tokens[b, at], tokens[b, at + 1] = tokenizer.image_start, tokenizer.image_end
                generated += 1
                latent_tokens[b, new] = block.tokens
                latent_table_ids[b, new] = images.position_ids(block.grid, generation.side)
                latent_image[b, new] = generated
                noised[b, own] = generated if block.noised else 0
                rope_positions[b, own], limit[b, own] = rope, stop
                at, latent, advance = at + 2, new.stop, 0 if block.noised else 1
            order[b, own], segment[b, own] = np.arange(place, stop), 1
            place, rope = stop, rope + advance
        length[b], next_rope_position[b] = place, rope
    latents = Latents(latent_tokens, latent_table_ids, latent_image, order, noised)
    return Context(
        tokens,
        rope_positions[:, :, 0] if side else rope_positions,
        limit,
        segment,
        values,
        patch_table_ids,
        patch_image,
        patch_positions,
        length,
        next_rope_position,
        latents if sizes.latents else None,
        None if side else patch_cells,
    )


def _rope_of_image(block: Image, sizes: Sizes) -> tuple[Int32[np.ndarray, "_ 3"], int]:
    """Rope positions of an image block's tokens, and by how much they advance those after it.

    They have three dimensions, relative to that of vision_start. The delimiters count as text.
    """
    if sizes.patches % block.merge**2:
        raise ValueError(
            f"a bucket of {sizes.patches} patches does not divide into merge blocks of "
            f"{block.merge}x{block.merge} patches: make the patches of data.buckets multiples of "
            f"{block.merge**2}"
        )
    rows, columns = (count // block.merge for count in block.grid)
    row, column = np.divmod(np.arange(rows * columns), columns)
    inside = 1 + np.stack([np.zeros_like(row), row, column], axis=1)
    end = 1 + max(rows, columns)
    relative = np.concatenate([np.zeros((1, 3)), inside, np.full((1, 3), end)])
    return relative.astype(np.int32), end + 1


def _named(index: int, names: Sequence[str] | None) -> str:
    """A sequence of a batch, or the example that it shows, for an error message."""
    return f"example {names[index]}" if names else f"sequence {index}"


def _check_fit(needs: Sizes, sizes: Sizes, name: str) -> None:
    """Raises TooLongError if a sequence needs more than the bucket has."""
    what = ("positions", "patches", "latents")
    needed, available = ([getattr(x, field) for field in what] for x in (needs, sizes))
    if any(n > most for n, most in zip(needed, available)):
        latents = f" and {sizes.latents}" if needs.latents or sizes.latents else ""
        raise TooLongError(
            f"{name} needs {' and '.join(f'{n} {x}' for n, x in zip(needed, what) if n)}, its "
            f"bucket has {sizes.positions} and {sizes.patches}{latents}: enlarge data.buckets, "
            "lower the image size, or leave the example out"
        )


def named_blocks(
    tokenizer, prompts: Prompts, names: Sequence[str], content: Content
) -> list[tuple[str, Block]]:
    """(name, block) of each block of a context: the one place where names become blocks.

    Args:
      tokenizer: encodes the fixed texts.
      names: names of the blocks in order, see `BlockNames`. Several images have the same name.
      content: what the example has for the names that are not fixed texts.
    Returns:
      The blocks in order. The images of "image", or where the context lacks it those of the first
      transform, are in the places of the question if there are as many. Otherwise they are where
      their name is. In chat form, tokens of the template are blocks named `chat.TEMPLATE`.
    """
    found = _listed(tokenizer, prompts, names, content)
    if prompts.form == "bagel":
        return found
    own = [block.ids for name, block in found if name == "system" and isinstance(block, Text)]
    system = own[0] if own else np.zeros(0, np.int32)
    return conversation(tokenizer, system, [item for item in found if item[0] != "system"])


def conversation(
    tokenizer, system: Int[np.ndarray, " n"], turn: Sequence[tuple[str, Block]]
) -> list[tuple[str, Block]]:
    """(name, block) of each block of a context in chat form.

    Args:
      tokenizer: was loaded in chat form.
      system: ids of the system prompt, none of them for the template's own.
      turn: texts and images of the user's turn, with their names.
    Raises:
      ValueError: see `chat.encode`.
    """
    parts = [
        chat.Part(name, block.ids, block.noise)
        if isinstance(block, Text)
        else chat.Part(name, None)
        for name, block in turn
    ]
    shown = (block for _, block in turn if isinstance(block, Image))
    return [
        (name, next(shown) if ids is None else Text(ids, delimited=False))
        for name, ids in chat.encode(tokenizer, system, parts)
    ]


def _listed(
    tokenizer, prompts: Prompts, names: Sequence[str], content: Content
) -> list[tuple[str, Block]]:
    """The named blocks of a context in BAGEL's form."""
    placed, in_places = _placed(names, content)
    found: list[tuple[str, Block]] = []
    for name in names:
        if name in FIXED_TEXTS:
            found += [(name, block) for block in _prompt(tokenizer, getattr(prompts, name))]
        elif isinstance(value := content[name], np.ndarray | NoisedText):
            found.append((name, _text(value)))
        elif holds_images(name):
            found += [(name, image) for image in _images(value) if name != placed]
        else:
            for n, text in enumerate(map(_text, _texts(value))):
                found += [(name, text)] if len(text.ids) else []
                found += [(placed, image) for image in in_places[n : n + 1]]
    return found


def _placed(names: Sequence[str], content: Content) -> tuple[str, list[Image]]:
    """(name, images) of the blocks that are in the places of the question; ("", []) without any."""
    if "question" not in names or isinstance(content["question"], np.ndarray | NoisedText):
        return "", []
    problems = [name for name in names if name == "image" or name.startswith(TRANSFORMED)]
    name = "image" if "image" in problems else next(iter(problems), "")
    shown = _images(content[name]) if name else []
    return (name, shown) if len(shown) + 1 == len(content["question"]) else ("", [])


_Value = np.ndarray | NoisedText | Sequence[np.ndarray | NoisedText | Image]


def _images(value: _Value) -> list[Image]:
    """The images that an example has for a block."""
    every = () if isinstance(value, NoisedText) else value
    return [part for part in every if isinstance(part, Image)]


def _texts(value: _Value) -> list[np.ndarray | NoisedText]:
    """The texts that an example has for a block."""
    if isinstance(value, np.ndarray | NoisedText):
        return [value]
    return [part for part in value if isinstance(part, np.ndarray | NoisedText)]


def _text(value: np.ndarray | NoisedText) -> Text:
    if isinstance(value, np.ndarray):
        return Text(value)
    return Text(value.ids, noise=value.noise)


def student(
    tokenizer,
    prompts: Prompts,
    question: str | Int[np.ndarray, " n"],
    problem: Image | Sequence[Image],
) -> list[Block]:
    """Blocks of the paper's student context (Eq. 2 and 6): system prompt, problem image, question.

    Args:
      tokenizer: encodes the texts.
      question: text, or ids int32 [n]. Only a text may have places of images, and only to a text
        `prompts.suffix` is appended.
      problem: the problem image, or several.
    Raises:
      ValueError: the text has another number of places than there are images.
    """
    content = _asked(tokenizer, prompts, question, problem)
    return [b for _, b in named_blocks(tokenizer, prompts, BlockNames.student, content)]


def teacher(
    tokenizer,
    prompts: Prompts,
    question: str | Int[np.ndarray, " n"],
    problem: Image | Sequence[Image],
    visual_thoughts: Iterable[Image | None],
) -> list[Block]:
    """Blocks of the paper's teacher context (Eq. 1 and 5).

    They are the student's blocks, then the intro, the visual thoughts in order (None entries are
    skipped) and the transition. The reasoning texts and the answer are never part of it.
    """
    content = _asked(tokenizer, prompts, question, problem)
    content = {**content, "visual_thoughts": [vt for vt in visual_thoughts if vt is not None]}
    return [b for _, b in named_blocks(tokenizer, prompts, BlockNames.teacher, content)]


def _asked(tokenizer, prompts, question, problem) -> Content:
    shown = (problem,) if isinstance(problem, Image) else tuple(problem)
    if isinstance(question, str):
        if fault := places_fault(question, len(shown)):
            raise ValueError(f"the question {fault}")
        question = question_ids(tokenizer, question, prompts.suffix)
    return {"image": shown, "question": question}


def question_ids(
    tokenizer, question: str, suffix: str = ""
) -> Int32[np.ndarray, " n"] | tuple[Int32[np.ndarray, " _"], ...]:
    """The ids of a question, or where it has places of images of each text around them.

    suffix: text that is appended to the last one.
    """
    texts = [*around_places(question)]
    if suffix and tokenizer.chat:  # one text for its template
        texts[-1], suffix = texts[-1] + suffix, ""
    ids = [tokenizer.encode(text) if text else np.zeros(0, np.int32) for text in texts]
    if suffix:
        ids[-1] = np.concatenate([ids[-1], tokenizer.encode(suffix)])
    return ids[0] if len(ids) == 1 else tuple(ids)


def _prompt(tokenizer, text):
    if isinstance(text, str):
        text = tokenizer.encode(text) if text else np.zeros(0, np.int32)
    return [Text(text)] if len(text) else []


def replace_privileged(
    mode: str,
    names: Sequence[str],
    own: Content,
    other: Content,
    rng: np.random.Generator | None,
    ordinary: Int[np.ndarray, " K"] | None = None,
    noised: bool = False,
) -> Content:
    """The content that the teacher gets in a mode of `VISUAL_THOUGHTS`.

    Only the privileged blocks differ from the example's own content:

    real: its own.
    noise: images as in `replace_visual_thoughts`. A text becomes as many ids, each chosen uniformly
      from `ordinary`. `rng` gives both, in the order of the names. With `noised` it becomes a
      `NoisedText` of them.
    swap: those of `other`, another example of the same task.
    image: the first problem image in place of each image, nothing for a question without one.
      Texts are left out.
    none: nothing: all of these blocks are left out. The fixed texts remain.

    Args:
      names: the privileged blocks, see `BlockNames.privileged`.
      own, other: content of the example and of the other one, which is read in mode "swap" only.
      rng, ordinary: needed in mode "noise" only. ordinary: ids of the tokens that are not special.
    Raises:
      ValueError: an unknown mode.
    """
    if mode not in VISUAL_THOUGHTS:
        raise ValueError(f"visual_thoughts is {mode!r}: choose from {VISUAL_THOUGHTS}")
    shown: dict[str, _Value] = {}
    for name in names:
        value = own[name]
        if mode == "swap":
            shown[name] = other[name]
        elif holds_images(name):
            problem = next(iter(_images(own["image"])), None)
            shown[name] = replace_visual_thoughts(mode, problem, _images(value), (), rng)
        elif mode == "noise":
            assert rng is not None and ordinary is not None
            texts = [ids for ids in _texts(value) if isinstance(ids, np.ndarray)]
            noise = [rng.choice(ordinary, len(ids)).astype(np.int32) for ids in texts]
            every = [*map(NoisedText, texts, noise)] if noised else noise
            shown[name] = every[0] if isinstance(value, np.ndarray) else every
        elif mode != "real":
            shown[name] = ()
    return {**own, **shown}


def replace_visual_thoughts(
    mode: str,
    problem: Image | None,
    own: Iterable[Image | None],
    other: Iterable[Image | None],
    rng: np.random.Generator | None,
) -> list[Image]:
    """The images that take the place of some images in a mode of `VISUAL_THOUGHTS`.

    real: those of the example, `own`.
    noise: standard normal values of the same shapes, in normalised pixel space, sampled from `rng`
      in every call again.
    swap: those of `other`, another example of the same task.
    image: the problem image in place of each image; the first, if the example has several. No
      image, if it has none (`problem` is None).
    none: no image. Intro and transition remain.

    Args:
      own, other: images. None entries are skipped.
      rng: needed in mode "noise" only.
    Raises:
      ValueError: an unknown mode.
    """
    mine = [vt for vt in own if vt is not None]
    if mode == "real":
        return mine
    if mode == "noise":
        noise = [rng.standard_normal(vt.patches.shape, np.float32) for vt in mine]
        return [Image(values, vt.grid, vt.merge) for values, vt in zip(noise, mine)]
    if mode == "swap":
        return [vt for vt in other if vt is not None]
    if mode == "image":
        return [problem for _ in mine if problem is not None]
    if mode == "none":
        return []
    raise ValueError(f"visual_thoughts is {mode!r}: choose from {VISUAL_THOUGHTS}")


def text_trace(full_text_only_thought: str, answer: str) -> str:
    """The completion of a text-only trace."""
    return wrap_thought(full_text_only_thought) + wrap_answer(answer)


def interleaved(
    tokenizer,
    prompts: Prompts,
    question: str | Int[np.ndarray, " n"],
    problem: Image | Sequence[Image],
    thoughts: Sequence[str],
    visual_thoughts: Iterable[Image],
    answer: str,
) -> list[Block]:
    """Blocks of an interleaved trace as the base model was trained on: text, image, text, ...

    They are the paper's student context and then the `rounds`.
    """
    return [
        *student(tokenizer, prompts, question, problem),
        *rounds(tokenizer, thoughts, visual_thoughts, answer),
    ]


def rounds(
    tokenizer, thoughts: Sequence[str], visual_thoughts: Iterable[Image], answer: str
) -> list[Block]:
    """Blocks of an interleaved trace after its context.

    Round i is `<think>t_i</think><image_start>`, then the image, then the next round, which starts
    with `<image_end>`. The last round ends with the answer. Every text is a training target. The
    images are Image blocks here, which become ViT tokens.
    """
    blocks: list[Block] = []
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
    data_fields=["context", "positions", "labels", "mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Supervised:
    """A packed batch with training targets.

    context: Context [B, T].
    positions: int32 [B, R], positions whose hidden states predict a label.
    labels: int32 [B, R], the ids that they predict.
    mask: bool [B, R], True at targets, False at padding.
    """

    context: Context
    positions: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def supervise(
    sequences: Sequence[Sequence[Block]],
    sizes: Sizes,
    *,
    tokenizer,
    side: int,
    generation=None,
    names: Sequence[str] | None = None,
    patch_dim: int = 1,
) -> Supervised:
    """Packs sequences of blocks; blocks with `loss` give the targets.

    In such a block, bos predicts the first id, and the last id predicts eos.

    Args:
      sizes: static sizes, with the number R of targets per sequence. All others: see `pack`.
    Raises:
      TooLongError: a sequence does not fit its bucket (see `pack`) or has more than R targets.
    """
    packed = pack(
        sequences,
        sizes,
        tokenizer=tokenizer,
        side=side,
        generation=generation,
        names=names,
        patch_dim=patch_dim,
    )
    shape = len(sequences), sizes.targets
    positions, labels, mask = (np.zeros(shape, dtype) for dtype in (np.int32, np.int32, bool))
    for b, blocks in enumerate(sequences):
        if need(blocks).targets > sizes.targets:
            raise TooLongError(
                f"{_named(b, names)} has more than {sizes.targets} target tokens: enlarge the "
                "bucket's `targets` or leave the example out"
            )
        start = done = 0
        for block in blocks:
            if isinstance(block, Text) and block.loss:
                if not block.delimited:
                    raise ValueError(
                        f"{_named(b, names)} has a text with targets, but without the bos and eos "
                        "that begin and end them: make it a text with delimiters"
                    )
                new = slice(done, done + len(block.ids) + 1)
                positions[b, new] = np.arange(start, start + len(block.ids) + 1)
                labels[b, new] = [*block.ids, tokenizer.eos]
                mask[b, new] = True
                done = new.stop
            # The tokens of a Latent block follow all other positions.
            start += 2 if isinstance(block, Latent) else block.length
    return Supervised(packed, positions, labels, mask)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "mask", "cut"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class References:
    """Texts that take the place of some of the sampled completions of a batch.

    tokens: int32 [B, N], token ids, 0 after the end.
    mask: bool [B, N], True at tokens; nowhere in a sequence that keeps its sampled completion.
    cut: bool [B], whether the text goes on after N tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray
    cut: np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["student", "teacher", "contrast", "references"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """The contexts of the same B examples as both roles see them.

    student: Context [B, T], question and problem image.
    teacher: Context [B, T'], the same followed by the privileged content.
    contrast: Context [B, T'], the teacher's with the privileged blocks of other examples; None
      where no target is contrasted with it.
    references: texts in the place of sampled completions; None where there are none.
    """

    student: Context
    teacher: Context
    contrast: Context | None = None
    references: References | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pixels", "sizes"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class PaddedImages:
    """The images of B examples as the autoencoder sees them.

    The problem images are the first of an example; its visual thoughts follow.

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

    tokens: int32 [B, N + 1], bos, c_1 .. c_N: the positions after the context. The closing eos has
      no position of its own.
    labels: int32 [B, N + 1], c_1 .. c_n, eos: what the hidden state at each position predicts.
    mask: bool [B, N + 1], the n + 1 positions that count.
    """

    tokens: jax.Array
    labels: jax.Array
    mask: jax.Array


def completion(
    tokens: Int[AnyArray, "B N"],
    mask: Bool[AnyArray, "B N"],
    *,
    bos: int,
    eos: int,
    eos_label: bool | Bool[AnyArray, " B"] = True,
) -> Completion:
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


def following(
    context: Context, count: int
) -> tuple[Int32[Array, "B N"] | Int32[Array, "B N 3"], Int32[Array, "B N"], Int32[Array, "B N"]]:
    """Vectors of `count` text tokens after each sequence's context.

    They have the positions T .. T + count - 1 in every sequence. The gap between a shorter context
    and T is padding, which no token sees. Rope positions continue without a gap.

    Returns:
      (rope positions, limit, segment), int32 [B, count] each; the rope positions [B, count, 3]
      where those of the context have three dimensions.
    """
    index = jnp.arange(count, dtype=jnp.int32)
    shape = (context.tokens.shape[0], count)
    rope = jnp.asarray(context.next_rope_position)[:, None] + index
    if context.rope_positions.ndim == 3:
        rope = jnp.broadcast_to(rope[:, :, None], (*shape, 3))
    return (
        rope,
        jnp.broadcast_to(context.padded_length + 1 + index, shape),
        jnp.ones(shape, jnp.int32),
    )
