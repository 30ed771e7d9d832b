"""Packing: lists of blocks as sequences, masks and rope positions as vectors.

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
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from opsd_jax import images
from opsd_jax.array_types import AnyArray
from opsd_jax.blocks import Block, Image, Latent, Text


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
    if sizes.latents and generation is None:
        raise ValueError(
            f"packing {sizes.latents} latents per sequence needs the sizes of the model's latents: "
            "pass generation, or set latents to 0"
        )
    packed = _Arrays.empty(sequences, sizes, generation, patch_dim)
    for number, blocks in enumerate(sequences):
        _check_fit(need(blocks), sizes, _named(number, names))
        row = packed.row(number)
        end = _Cursor()
        for block in blocks:
            if isinstance(block, Text):
                own, advance = _put_text(row, end, block, tokenizer)
            elif isinstance(block, Image):
                own, advance = _put_image(row, end, block, tokenizer, side)
            else:
                own, advance = _put_latent(row, end, block, tokenizer, generation.side)
            stop = end.place + block.length
            row.order[own], row.segment[own] = np.arange(end.place, stop), 1
            end.place, end.rope = stop, end.rope + advance
        packed.length[number], packed.next_rope_position[number] = end.place, end.rope
    return packed.context(side, with_latents=sizes.latents > 0)


@dataclasses.dataclass
class _Arrays:
    """The arrays of `Context` and `Latents` while they are filled, of all sequences or of one.

    rope_positions always have three dimensions here. A position of one is one of three equal ones.
    """

    tokens: np.ndarray
    rope_positions: np.ndarray
    limit: np.ndarray
    segment: np.ndarray
    order: np.ndarray
    noised: np.ndarray
    patches: np.ndarray
    patch_table_ids: np.ndarray
    patch_image: np.ndarray
    patch_positions: np.ndarray
    patch_cells: np.ndarray
    latent_tokens: np.ndarray
    latent_table_ids: np.ndarray
    latent_image: np.ndarray
    length: np.ndarray
    next_rope_position: np.ndarray

    @classmethod
    def empty(
        cls, sequences: Sequence[Sequence[Block]], sizes: Sizes, generation, patch_dim: int
    ) -> "_Arrays":
        """Padding for a bucket. Patches are float32 if those of any image are no bytes."""
        of_images = [b.patches for blocks in sequences for b in blocks if isinstance(b, Image)]
        width = of_images[0].shape[1] if of_images else patch_dim
        # a float batch is normalised as a whole
        dtype = np.uint8 if all(patches.dtype == np.uint8 for patches in of_images) else np.float32
        n, ints = len(sequences), functools.partial(np.zeros, dtype=np.int32)
        channels = generation.latent_dim if generation else 0
        every = n, sizes.positions + sizes.latents
        shown, drawn = (n, sizes.patches), (n, sizes.latents)
        return cls(
            tokens=ints((n, sizes.positions)),
            rope_positions=ints((*every, 3)),
            limit=ints(every),
            segment=ints(every),
            order=ints(every),
            noised=ints(every),
            patches=np.zeros((*shown, width), dtype),
            patch_table_ids=ints(shown),
            patch_image=ints(shown),
            patch_positions=np.full(shown, sizes.positions, np.int32),
            patch_cells=ints((*shown, 4)),
            latent_tokens=np.zeros((*drawn, channels), np.float32),
            latent_table_ids=ints(drawn),
            latent_image=ints(drawn),
            length=ints(n),
            next_rope_position=ints(n),
        )

    def row(self, number: int) -> "_Arrays":
        """Views of the arrays of one sequence."""
        views = {f.name: getattr(self, f.name)[number] for f in dataclasses.fields(self)}
        return _Arrays(**views)

    def context(self, side: int, *, with_latents: bool) -> Context:
        """The filled batch; side: see `pack`."""
        latents = Latents(
            self.latent_tokens, self.latent_table_ids, self.latent_image, self.order, self.noised
        )
        return Context(
            self.tokens,
            self.rope_positions[:, :, 0] if side else self.rope_positions,
            self.limit,
            self.segment,
            self.patches,
            self.patch_table_ids,
            self.patch_image,
            self.patch_positions,
            self.length,
            self.next_rope_position,
            latents if with_latents else None,
            None if side else self.patch_cells,
        )


@dataclasses.dataclass
class _Cursor:
    """Where the next block of a sequence begins.

    place: in the sequence. rope: rope position. position, patch, latent: the next free entries of
    the arrays. images, drawn: image and latent blocks so far.
    """

    place: int = 0
    rope: int = 0
    position: int = 0
    patch: int = 0
    latent: int = 0
    images: int = 0
    drawn: int = 0

    def take(self, count: int) -> Int[np.ndarray, " count"]:
        """The next `count` positions."""
        first, self.position = self.position, self.position + count
        return np.arange(first, self.position)


def _put_text(row: _Arrays, end: _Cursor, block: Text, tokenizer) -> tuple[np.ndarray, int]:
    """Adds a text, causal. Returns its positions, and by how much it advances the rope position."""
    own = end.take(block.length)
    ids = [tokenizer.bos, *block.ids, tokenizer.eos]
    row.tokens[own] = ids if block.delimited else block.ids
    row.rope_positions[own] = np.arange(end.rope, end.rope + block.length)[:, None]
    row.limit[own] = np.arange(end.place + 1, end.place + block.length + 1)
    return own, block.length


def _put_image(
    row: _Arrays, end: _Cursor, block: Image, tokenizer, side: int
) -> tuple[np.ndarray, int]:
    """Adds an image between its delimiters; see `_put_text`.

    With a position table (side > 0) all of its positions see all of it and share a rope position,
    as in BAGEL. Without, it is causal and has rope positions of three dimensions, as in Qwen-VL.
    """
    own = end.take(block.length)
    row.tokens[own[0]], row.tokens[own[-1]] = tokenizer.image_start, tokenizer.image_end
    end.images += 1
    new = slice(end.patch, end.patch + len(block.patches))
    end.patch = new.stop
    as_bytes = row.patches.dtype == np.uint8
    row.patches[new] = block.patches if as_bytes else images.normalize(block.patches)
    row.patch_image[new] = end.images
    row.patch_positions[new] = np.repeat(own[1:-1], block.merge**2)
    stop = end.place + block.length
    if side:
        row.patch_table_ids[new] = images.position_ids(block.grid, side)
        row.rope_positions[own], row.limit[own] = end.rope, stop
        return own, 1
    row.patch_cells[new] = images.cells(block.grid, block.merge)
    relative, advance = _rope_of_image(block, len(row.patches))
    row.rope_positions[own] = end.rope + relative
    row.limit[own] = np.arange(end.place + 1, stop + 1)
    return own, advance


def _put_latent(
    row: _Arrays, end: _Cursor, block: Latent, tokenizer, side: int
) -> tuple[np.ndarray, int]:
    """Adds an image as latents, whose tokens are after the other T positions; see `_put_text`.

    A noised image does not advance the rope position: its clean version follows at the same one.
    side: rows of the latents' position table.
    """
    first, last = end.take(2)
    new = slice(end.latent, end.latent + len(block.tokens))
    end.latent, end.drawn = new.stop, end.drawn + 1
    own = np.array([first, *(len(row.tokens) + np.arange(new.start, new.stop)), last])
    row.tokens[first], row.tokens[last] = tokenizer.image_start, tokenizer.image_end
    row.latent_tokens[new] = block.tokens
    row.latent_table_ids[new] = images.position_ids(block.grid, side)
    row.latent_image[new] = end.drawn
    row.noised[own] = end.drawn if block.noised else 0
    row.rope_positions[own], row.limit[own] = end.rope, end.place + block.length
    return own, 0 if block.noised else 1


def _rope_of_image(block: Image, patches: int) -> tuple[Int32[np.ndarray, "_ 3"], int]:
    """Rope positions of an image block's tokens, and by how much they advance those after it.

    They have three dimensions, relative to that of vision_start. The delimiters count as text.
    patches: of the bucket.
    """
    if patches % block.merge**2:
        raise ValueError(
            f"a bucket of {patches} patches does not divide into merge blocks of "
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
