"""What each role sees: blocks, masks, rope positions, targets.

The expectations are written out by hand.
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import context, images, tags
from opsd_jax.blocks import Image, Latent, Prompts, Text
from opsd_jax.model.masks import Mask, visible
from tiny import DRAWING, ENDS, PROMPTS, TOKENIZER, image, latent, pack

BOS, EOS, IMAGE, IMAGE_END = (
    TOKENIZER.bos,
    TOKENIZER.eos,
    TOKENIZER.image_start,
    TOKENIZER.image_end,
)
SHORT = Prompts(system="s", intro="i", transition="t")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def ids(text):
    return TOKENIZER.encode(text).tolist()


def masks(packed):
    """bool [B, T, T] (T + G with latents), what the network makes of the vectors."""
    limit, segment = jnp.asarray(packed.limit), jnp.asarray(packed.segment)
    if packed.latents is None:
        return np.asarray(visible(Mask(limit, segment, segment)))
    order, noised = map(jnp.asarray, (packed.latents.order, packed.latents.noised))
    mask = Mask(limit, segment, segment, order, noised, noised)
    return np.asarray(visible(mask))


def dense_mask(blocks):
    """The official rule as a matrix: a block sees all earlier ones but noised images, and itself
    causally (text) or wholly.
    """
    total = sum(block.length for block in blocks)
    mask, start, hidden = np.zeros((total, total), bool), 0, np.zeros(total, bool)
    for block in blocks:
        stop = start + block.length
        mask[start:stop, :start] = ~hidden[:start]
        inside = np.ones((block.length, block.length), bool)
        mask[start:stop, start:stop] = np.tril(inside) if isinstance(block, Text) else inside
        hidden[start:stop] = isinstance(block, Latent) and block.noised
        start = stop
    return mask


def in_sequence(packed, row):
    """Positions of a sequence in the order of its tokens, by `Latents.order`."""
    used = np.flatnonzero(packed.segment[row])
    return used[np.argsort(packed.latents.order[row, used])]


# ---- packing


def test_student_position_by_position(rng):
    problem = image(rng, (1, 2))
    packed = pack([blocks_lib.student(TOKENIZER, SHORT, "ab", problem)], positions=13, patches=3)
    s, a, b = ids("sab")
    assert packed.tokens[0].tolist() == [BOS, s, EOS, IMAGE, 0, 0, IMAGE_END, BOS, a, b, EOS, 0, 0]
    assert packed.rope_positions[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 0, 0]
    assert packed.segment[0].tolist() == [1] * 11 + [0] * 2
    assert (packed.length.tolist(), packed.next_rope_position.tolist()) == ([11], [8])
    assert packed.patch_positions[0].tolist() == [4, 5, 13]
    assert packed.patch_table_ids[0].tolist() == [0, 1, 0]
    assert packed.patch_image[0].tolist() == [1, 1, 0]
    assert packed.patches.dtype == np.uint8 and (packed.patches[0, :2] == problem.patches).all()
    drawn = """
        #............
        ##...........
        ###..........
        #######......
        #######......
        #######......
        #######......
        ########.....
        #########....
        ##########...
        ###########..
        .............
        ............."""
    assert masks(packed)[0].tolist() == [[c == "#" for c in line] for line in drawn.split()]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_teacher_is_the_student_plus_references(rng, count):
    problem, thoughts = image(rng, (2, 2)), [image(rng, (1, 3)), image(rng, (2, 1))][:count]
    mine = blocks_lib.student(TOKENIZER, PROMPTS, "why?", problem)
    blocks = blocks_lib.teacher(TOKENIZER, PROMPTS, "why?", problem, [None, *thoughts, None])
    assert [ids("look"), ids("now")] == [blocks[3].ids.tolist(), blocks[-1].ids.tolist()]
    assert [b.length for b in blocks[:3]] == [b.length for b in mine] and blocks[4:-1] == thoughts
    packed = pack([mine, blocks])
    for row, made in enumerate([mine, blocks]):
        used = int(packed.length[row])
        assert used == sum(b.length for b in made)
        assert (masks(packed)[row, :used, :used] == dense_mask(made)).all()
        assert not masks(packed)[row, used:].any() and not masks(packed)[row, :, used:].any()
    assert (packed.tokens[1, : packed.length[0]] == packed.tokens[0, : packed.length[0]]).all()
    # 5 + 1 + 6 rope ids of the student; intro 4 + 2, one an image, transition 3 + 2
    assert packed.next_rope_position.tolist() == [12, 12 + 6 + count + 5]
    images_of_row = [packed.patch_image[1][packed.patch_image[1] > 0].tolist()]
    assert images_of_row == [[1] * 4 + [2] * 3 * (count > 0) + [3] * 2 * (count > 1)]
    assert packed.patch_table_ids[1, :4].tolist() == [0, 1, 6, 7]  # the table is 6 patches wide


def test_rows_of_different_lengths_do_not_touch(rng):
    short = blocks_lib.student(TOKENIZER, SHORT, "a", image(rng, (1, 1)))
    long = blocks_lib.teacher(
        TOKENIZER, PROMPTS, "a long question", image(rng, (3, 3)), [image(rng, (3, 1))]
    )
    together, alone = pack([short, long]), pack([short])
    assert together.latents is alone.latents is None
    for ours, its in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours[:1], its)


@pytest.mark.parametrize("left_out", ["system", "intro", "transition"])
def test_every_prompt_may_be_left_out(rng, left_out):
    prompts = dataclasses.replace(SHORT, **{left_out: ""})
    blocks = blocks_lib.teacher(TOKENIZER, prompts, "q", image(rng), [image(rng)])
    texts = [bytes(b.ids.tolist()).decode() for b in blocks if isinstance(b, Text)]
    assert texts == [t for t in (prompts.system, "q", prompts.intro, prompts.transition) if t]


def test_suffix_follows_the_question(rng):
    blocks = blocks_lib.student(TOKENIZER, Prompts(system="", suffix=" end"), "q", image(rng))
    assert blocks[1].ids.tolist() == ids("q end")
    assert blocks_lib.student(TOKENIZER, SHORT, np.array([7, 8]), image(rng))[2].ids.tolist() == [
        7,
        8,
    ]


def test_too_long_names_the_example_and_the_fix(rng):
    row = blocks_lib.student(TOKENIZER, SHORT, "question", image(rng, (2, 2)))
    assert pack([row], positions=19, patches=4).length == 19  # fits exactly, nothing cut
    with pytest.raises(
        context.TooLongError,
        match=r"vsp-7 needs 19 positions and 4 patches.*18 and 4.*data\.buckets",
    ):
        pack([row[:2], row], positions=18, patches=4, names=["vsp-6", "vsp-7"])
    with pytest.raises(
        context.TooLongError, match="sequence 1 needs 19 positions and 4 patches.*19 and 3"
    ):
        pack([row[:1], row], positions=19, patches=3)
    with pytest.raises(ValueError, match="exceeds the 6x6 position table"):
        pack([[Image(np.zeros((7, 48), np.uint8), (1, 7))]])


def test_one_float_image_normalises_the_whole_batch(rng):
    pixels, noise = image(rng, (1, 2)), Image(np.full((1, 48), 0.25, np.float32), (1, 1))
    packed = pack([[pixels, noise], [pixels]])
    assert packed.patches.dtype == np.float32
    expected = pixels.patches / 127.5 - 1
    np.testing.assert_allclose(packed.patches[:, :2], np.stack([expected] * 2), atol=1e-6)
    assert (packed.patches[0, 2] == 0.25).all()
    np.testing.assert_allclose(images.normalize(jnp.asarray(pixels.patches)), expected, atol=1e-6)
    np.testing.assert_array_equal(images.normalize(jnp.asarray(packed.patches)), packed.patches)


# ---- packing with latents

draw_pack = functools.partial(pack, generation=DRAWING.generation)


def test_latents_position_by_position(rng):
    """The noised copy of an image, then the clean one, at the same rope id; and a row beside it
    without latents.
    """
    noised, clean = latent(rng, (1, 2), noised=True), latent(rng, (2, 1))
    row = [Text(np.array([7])), noised, clean, Text(np.array([8]))]
    packed = draw_pack([row, [Text(np.array([9]))]], positions=12, patches=2, latents=6)
    # sequence: bos 7 eos <img N0 N1 img> <img C0 C1 img> bos 8 eos
    assert packed.tokens[0].tolist() == [
        BOS,
        7,
        EOS,
        IMAGE,
        IMAGE_END,
        IMAGE,
        IMAGE_END,
        BOS,
        8,
        EOS,
        0,
        0,
    ]
    found = packed.latents
    assert found.order[0].tolist() == [0, 1, 2, 3, 6, 7, 10, 11, 12, 13, 0, 0] + [4, 5, 8, 9, 0, 0]
    assert packed.rope_positions[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 0, 0] + [
        3,
        3,
        3,
        3,
        0,
        0,
    ]
    assert packed.limit[0].tolist() == [1, 2, 3, 7, 7, 11, 11, 12, 13, 14, 0, 0] + [
        7,
        7,
        11,
        11,
        0,
        0,
    ]
    assert packed.segment[0].tolist() == [1] * 10 + [0] * 2 + [1] * 4 + [0] * 2
    assert found.noised[0].tolist() == [0, 0, 0, 1, 1] + [0] * 7 + [1, 1] + [0] * 4
    assert found.image[0].tolist() == [1, 1, 2, 2, 0, 0]
    assert found.table_ids[0].tolist() == [0, 1, 0, 6, 0, 0]  # the table is 6 tokens wide
    np.testing.assert_array_equal(
        found.tokens[0], [*noised.tokens, *clean.tokens, *np.zeros((2, 16))]
    )
    assert (packed.length.tolist(), packed.next_rope_position.tolist(), packed.padded_length) == (
        [14, 3],
        [7, 3],
        18,
    )
    assert packed.tokens[1].tolist() == [BOS, 9, EOS] + [0] * 9
    assert (
        packed.segment[1].tolist() == [1] * 3 + [0] * 15
        and packed.limit[1].tolist() == [1, 2, 3] + [0] * 15
    )
    assert not any(x[1].any() for x in (found.tokens, found.table_ids, found.image, found.noised))
    seen = masks(packed)
    assert (
        seen[1].sum() == 6
        and not seen[0, [10, 11, 16, 17]].any()
        and not seen[0][:, [10, 11, 16, 17]].any()
    )
    drawn = """
        #.............
        ##............
        ###...........
        #######.......
        #######.......
        #######.......
        #######.......
        ###....####...
        ###....####...
        ###....####...
        ###....####...
        ###....#####..
        ###....######.
        ###....#######"""
    places = in_sequence(packed, 0)
    assert seen[0][np.ix_(places, places)].tolist() == [
        [c == "#" for c in line] for line in drawn.split()
    ]


def test_masks_of_mixed_rows(rng):
    """Rows with two noised images, with clean ones alone, and without latents, against the matrix
    of the blocks.
    """

    def text(n):
        return Text(rng.integers(0, 256, n).astype(np.int32))

    rows = [
        [
            text(2),
            image(rng, (1, 2)),
            latent(rng, (2, 2), True),
            latent(rng, (2, 2)),
            image(rng, (1, 3)),
            text(1),
            latent(rng, (1, 3), True),
            latent(rng, (1, 3)),
            text(3),
        ],
        [latent(rng, (3, 3)), text(1), latent(rng, (1, 1)), image(rng, (2, 2))],
        [text(4), image(rng, (2, 1)), text(0)],
        [latent(rng, (1, 2), True)],
    ]
    packed = draw_pack(rows, positions=40, patches=8, latents=15)
    seen, noised = masks(packed), packed.latents.noised
    for row, blocks in enumerate(rows):
        places = in_sequence(packed, row)
        total = sum(block.length for block in blocks)
        assert packed.length[row] == len(places) == total
        assert packed.latents.order[row, places].tolist() == list(range(total))
        assert (seen[row][np.ix_(places, places)] == dense_mask(blocks)).all()
        assert seen[row].sum() == dense_mask(blocks).sum()  # padding neither sees nor is seen
        inner = [
            packed.rope_positions[row, places[sum(b.length for b in blocks[:n])]]
            for n in range(len(blocks))
        ]
        rope = 0
        for block, at in zip(blocks, inner):
            assert at == rope
            rope += (
                block.length
                if isinstance(block, Text)
                else 0
                if isinstance(block, Latent) and block.noised
                else 1
            )
        assert packed.next_rope_position[row] == rope
    places = in_sequence(packed, 0)
    # 4 text, 4 image, 6 noised, 6 clean, 5 image, 3 text, 5 noised, 5 clean, 5 text
    assert noised[0, places].tolist() == [0] * 8 + [1] * 6 + [0] * 14 + [3] * 5 + [0] * 10
    assert packed.patch_positions[0].tolist() == [
        5,
        6,
        13,
        14,
        15,
        40,
        40,
        40,
    ]  # delimiters of latents take positions, too


def test_latents_that_do_not_fit(rng):
    row = [Text(np.array([1])), latent(rng, (2, 2)), latent(rng, (1, 2))]
    assert draw_pack([row], positions=7, patches=0, latents=6).length == 13  # fits exactly
    with pytest.raises(
        context.TooLongError, match=r"vsp-7 needs 7 positions and 6 latents.*7 and 3 and 5: enlarge"
    ):
        draw_pack([row[:1], row], positions=7, patches=3, latents=5, names=["vsp-6", "vsp-7"])
    with pytest.raises(
        context.TooLongError, match=r"sequence 0 needs 7 positions and 6 latents.*6 and 3 and 6"
    ):
        draw_pack([row], positions=6, patches=3, latents=6)
    with pytest.raises(
        context.TooLongError,
        match=r"sequence 0 needs 7 positions and 6 latents, its bucket has 9 and 3 and 0",
    ):
        draw_pack([row], positions=9, patches=3)
    with pytest.raises(ValueError, match="exceeds the 6x6 position table"):
        draw_pack([[latent(rng, (1, 7))]], latents=7)


def test_unused_latents_change_nothing_else(rng):
    rows = [blocks_lib.student(TOKENIZER, PROMPTS, "q", image(rng, (1, 2))), [Text(np.array([1]))]]
    with_room, without = (
        draw_pack(rows, positions=30, patches=4, latents=5),
        pack(rows, positions=30, patches=4),
    )
    assert with_room.padded_length == 35 and without.padded_length == 30
    for field in dataclasses.fields(context.Context):
        if field.name not in ("latents", "patch_cells"):  # which this model has not
            ours, its = (getattr(packed, field.name) for packed in (with_room, without))
            np.testing.assert_array_equal(
                ours[:, :30] if ours.ndim > 1 else ours, its, err_msg=field.name
            )
    used = without.segment > 0
    assert (with_room.latents.order[:, :30][used] == np.nonzero(used)[1]).all()
    assert not with_room.segment[:, 30:].any() and not with_room.latents.noised.any()


# ---- what the teacher gets


def test_visual_thought_modes(rng):
    problem, real, other = (
        image(rng, (3, 3)),
        [image(rng, (1, 2)), image(rng, (2, 2))],
        [None, image(rng)],
    )
    own = [real[0], None, real[1]]

    def replace(mode):
        return blocks_lib.replace_visual_thoughts(mode, problem, own, other, rng)

    assert replace("real") == real
    assert replace("swap") == [other[1]]
    assert replace("image") == [problem, problem]
    assert replace("none") == []
    first, second = replace("noise"), replace("noise")
    assert [vt.grid for vt in first] == [vt.grid for vt in real]
    assert [vt.patches.shape for vt in first] == [vt.patches.shape for vt in real]
    assert first[0].patches.dtype == np.float32
    assert not any(np.isin(a.patches, b.patches).any() for a, b in zip(first, second))
    with pytest.raises(ValueError, match="is 'blank': choose from real, noise, swap, image, none"):
        replace("blank")


def test_noise_is_standard_normal(rng):
    (noise,) = blocks_lib.replace_visual_thoughts(
        "noise", image(rng), [image(rng, (5, 5), 4000)], [], rng
    )
    values = noise.patches.ravel()  # 100,000 of them: a standard error is 0.003
    assert abs(values.mean()) < 0.015 and abs(values.std() - 1) < 0.015
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.008


def test_official_prompts_byte_for_byte():
    def sha(text):
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    facts = {
        name: (len(getattr(blocks_lib, name)), sha(getattr(blocks_lib, name)))
        for name in ("SYSTEM_TRAINING", "SYSTEM_INFERENCE", "INTRO", "TRANSITION")
    }
    assert facts == {
        "SYSTEM_TRAINING": (403, "f5475ea0eb6d7f81"),
        "SYSTEM_INFERENCE": (404, "85c1385d54725046"),
        "INTRO": (203, "1c74bdc0c9ecd965"),
        "TRANSITION": (88, "91987117d9d1b511"),
    }
    training, inference = blocks_lib.SYSTEM_TRAINING, blocks_lib.SYSTEM_INFERENCE
    assert training == training.strip() and inference == f"\n{inference.strip()}\n"
    assert "i.e. <answer>" in training and "i.e.<answer>" in inference
    assert inference.strip().replace("i.e.<", "i.e. <") == training
    assert "</image_end>" in training  # the odd closing tag is the original's
    assert Prompts() == Prompts(training, blocks_lib.INTRO, blocks_lib.TRANSITION, "")


# ---- completions


def test_completion_worked_example():
    tokens = jnp.array([[11, 12, 13, 99], [11, 99, 99, 99], [11, 12, 13, 14], [99, 99, 99, 99]])
    mask = jnp.arange(4) < jnp.array([3, 1, 4, 0])[:, None]
    block = context.completion(tokens, mask, **ENDS)
    assert block.tokens.tolist() == [
        [BOS, 11, 12, 13, 0],
        [BOS, 11, 0, 0, 0],
        [BOS, 11, 12, 13, 14],
        [BOS, 0, 0, 0, 0],
    ]
    assert block.labels.tolist() == [
        [11, 12, 13, EOS, 0],
        [11, EOS, 0, 0, 0],
        [11, 12, 13, 14, EOS],
        [EOS, 0, 0, 0, 0],
    ]
    assert block.mask.sum(axis=1).tolist() == [4, 2, 5, 1]
    assert (block.mask == (jnp.arange(5) < jnp.array([4, 2, 5, 1])[:, None])).all()
    without = context.completion(tokens, mask, **ENDS, eos_label=False)
    assert without.mask.sum(axis=1).tolist() == [3, 1, 4, 0]
    some = context.completion(tokens, mask, **ENDS, eos_label=jnp.array([True, False, False, True]))
    assert some.mask.sum(axis=1).tolist() == [4, 1, 4, 1]
    for other in (without, some):
        assert (other.tokens == block.tokens).all() and (other.labels == block.labels).all()


def test_positions_after_a_context_equal_one_packed_sequence(rng):
    """Context, padding, completion: without the padding it is the sequence of one more text
    block.
    """
    rows = [
        blocks_lib.student(TOKENIZER, SHORT, "ab", image(rng, (1, 2))),
        blocks_lib.teacher(TOKENIZER, SHORT, "abc", image(rng, (2, 1)), [image(rng, (2, 2))]),
    ]
    packed = pack(rows, positions=40)
    positions, limit, segment = map(np.asarray, context.following(packed, 5))
    assert segment.tolist() == [[1] * 5] * 2
    whole = [
        np.concatenate(pair, axis=1)
        for pair in (
            (packed.rope_positions, positions),
            (packed.limit, limit),
            (packed.segment, segment),
        )
    ]
    seen = np.asarray(visible(Mask(*map(jnp.asarray, (whole[1], whole[2], whole[2])))))
    for row, blocks in enumerate(rows):
        blocks = [*blocks, Text(np.arange(3))]  # 3 ids and their delimiters: 5 positions
        reference = pack([blocks])
        total = int(reference.length[0])
        used = np.flatnonzero(whole[2][row])
        assert used.tolist() == [*range(packed.length[row]), *range(40, 45)] and len(used) == total
        assert whole[0][row, used].tolist() == reference.rope_positions[0, :total].tolist()
        assert (seen[row][np.ix_(used, used)] == dense_mask(blocks)).all()
        assert seen[row, used].sum() == dense_mask(blocks).sum()


# ---- traces


def test_wrappers_are_idempotent():
    assert tags.wrap_thought(" so it is ") == "<think>so it is</think>"
    assert tags.wrap_answer("B\n") == "<answer>B</answer>"
    for wrap in (tags.wrap_thought, tags.wrap_answer):
        assert wrap(wrap("x")) == wrap("x")
    assert blocks_lib.text_trace("t", "<answer>B</answer>") == "<think>t</think><answer>B</answer>"


@pytest.mark.parametrize(
    ("thoughts", "count", "texts"),
    [
        (["a"], 0, ["<think>a</think><answer>B</answer>"]),
        (
            ["a", "b"],
            1,
            ["<think>a</think><image_start>", 0, "<image_end><think>b</think><answer>B</answer>"],
        ),
        (
            ["a", "b", "c"],
            2,
            [
                "<think>a</think><image_start>",
                0,
                "<image_end><think>b</think><image_start>",
                1,
                "<image_end><think>c</think><answer>B</answer>",
            ],
        ),
    ],
)
def test_interleaved_structure(rng, thoughts, count, texts):
    problem, drawn = image(rng), [image(rng) for _ in range(count)]
    blocks = blocks_lib.interleaved(TOKENIZER, PROMPTS, "q", problem, thoughts, drawn, "B")
    prompt = blocks_lib.student(TOKENIZER, PROMPTS, "q", problem)
    assert [b.ids.tolist() for b in blocks[:3:2]] == [b.ids.tolist() for b in prompt[::2]]
    assert blocks[1] is problem
    number = {id(vt): n for n, vt in enumerate(drawn)}
    found = [
        bytes(b.ids.tolist()).decode() if isinstance(b, Text) else number[id(b)] for b in blocks[3:]
    ]
    assert found == texts
    assert [b.loss for b in blocks if isinstance(b, Text)] == [False, False] + [True] * (count + 1)


def test_supervise_targets_of_an_interleaved_trace(rng):
    row = [
        Text(np.array([1])),
        image(rng, (1, 2)),
        Text(np.array([2])),
        Text(np.array([3, 4]), loss=True),
        image(rng, (1, 1)),
        Text(np.array([5]), loss=True),
    ]

    #      0-2                  3-6                 7-9                  10-13: bos 3 4 eos
    #      14-16                17-19: bos 5 eos
    def made(targets):
        return context.supervise(
            [row, row[:4]],
            context.Sizes(24, 4, targets),
            tokenizer=TOKENIZER,
            side=6,
            names=["long", "short"],
        )

    found = made(6)
    assert found.positions.tolist() == [[10, 11, 12, 17, 18, 0], [10, 11, 12, 0, 0, 0]]
    assert found.labels.tolist() == [[3, 4, EOS, 5, EOS, 0], [3, 4, EOS, 0, 0, 0]]
    assert found.mask.tolist() == [[True] * 5 + [False], [True] * 3 + [False] * 3]
    reference = pack([row, row[:4]], positions=24, patches=4)
    np.testing.assert_array_equal(found.context.limit, reference.limit)
    np.testing.assert_array_equal(found.context.tokens, reference.tokens)
    # the position holds the token before its label
    before = np.take_along_axis(found.context.tokens, found.positions, axis=1)
    assert before[0, :5].tolist() == [BOS, 3, 4, BOS, 5]
    assert made(5).mask.sum() == 8
    with pytest.raises(
        context.TooLongError, match="example long has more than 4 target tokens: enlarge"
    ):
        made(4)


def test_supervise_targets_after_latents(rng):
    """Latents take two positions among the others, so targets after them are found by their
    tokens.
    """
    row = [
        Text(np.array([1])),
        Text(np.array([3, 4]), loss=True),
        latent(rng, (2, 2), True),
        latent(rng, (2, 2)),
        image(rng, (1, 1)),
        Text(np.array([5]), loss=True),
    ]
    # positions: 0-2, 3-6 bos 3 4 eos, 7-8 noised, 9-10 clean, 11-13 image, 14-16 bos 5 eos
    plain = [Text(np.array([1])), Text(np.array([6]), loss=True)]
    found = context.supervise(
        [row, plain],
        context.Sizes(20, 2, targets=6, latents=8),
        tokenizer=TOKENIZER,
        side=6,
        generation=DRAWING.generation,
    )
    assert found.positions.tolist() == [[3, 4, 5, 14, 15, 0], [3, 4, 0, 0, 0, 0]]
    assert found.labels.tolist() == [[3, 4, EOS, 5, EOS, 0], [6, EOS, 0, 0, 0, 0]]
    assert found.mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    before = np.take_along_axis(found.context.tokens, found.positions, axis=1)
    assert before[0, :5].tolist() == [BOS, 3, 4, BOS, 5] and before[1, :2].tolist() == [BOS, 6]
    assert found.context.latents.tokens.shape == (2, 8, 16)
