"""The towers of Qwen2.5-VL and Qwen3-VL, and the contexts of models that have them.

What they compute is held by tests/test_hf_parity.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import context, distill, images
from opsd_jax.model import attention, bagel, mot, qwen_vision
from opsd_jax.model.config import ViTConfig

FAMILIES = tuple(tiny.QWEN)
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pack(blocks, positions=60, patches=64):
    return context.pack(blocks, context.Sizes(positions, patches), tokenizer=tiny.TOKENIZER, side=0)


def text(*ids):
    return blocks_lib.Text(np.array(ids, np.int32), delimited=False)


def encode(model, packed):
    """(last outputs of the tower, those of its layers `deepstack`)."""
    patches = qwen_vision.normalize(packed.patches, model.vit)
    tower = jax.jit(qwen_vision.Encoder(model.vit).apply)
    return tower(
        {"params": tiny.params(model)["vit"]}, patches, packed.patch_cells, packed.patch_image
    )


def test_context_position_by_position(rng):
    """Text, an image of 2 x 3 tokens, text, an image of 3 x 1 tokens, text."""
    wide, high = tiny.merged_image(rng, (4, 6)), tiny.merged_image(rng, (6, 2))
    c = pack([[text(1, 2), wide, text(3), high, text(4)], [text(5)]], 20, 40)
    start, end = tiny.TOKENIZER.image_start, tiny.TOKENIZER.image_end
    tokens = [1, 2, start, *[0] * 6, end, 3, start, *[0] * 3, end, 4]
    assert c.tokens[0].tolist() == [*tokens, 0, 0, 0]
    assert c.rope_positions[0, :17].tolist() == [
        *[[n] * 3 for n in range(3)],
        *[[3, 3 + row, 3 + column] for row in range(2) for column in range(3)],
        *[[n] * 3 for n in (6, 7, 8)],  # after 3 columns
        *[[9, 9 + row, 9] for row in range(3)],
        *[[n] * 3 for n in (12, 13)],  # after 3 rows
    ]
    assert c.limit[0, :17].tolist() == list(range(1, 18))  # causal, images, too
    assert (c.length.tolist(), c.next_rope_position.tolist()) == ([17, 1], [14, 1])
    assert c.patch_positions[0, :36:4].tolist() == [3, 4, 5, 6, 7, 8, 12, 13, 14]
    assert (c.patch_positions[0, 36:] == 20).all() and (c.patch_positions[1] == 20).all()
    assert c.patch_image[0].tolist() == [1] * 24 + [2] * 12 + [0] * 4
    # merge blocks: the second one begins at column 2
    assert c.patch_cells[0, :5].tolist() == [
        [0, 0, 4, 6],
        [0, 1, 4, 6],
        [1, 0, 4, 6],
        [1, 1, 4, 6],
        [0, 2, 4, 6],
    ]
    assert c.patch_cells[0, 24 + 4].tolist() == [2, 0, 6, 2]
    rope, limit, _ = context.following(c, 2)
    assert rope[0].tolist() == [[14] * 3, [15] * 3] and limit[0].tolist() == [21, 22]


def test_merge_blocks_must_fit_the_bucket(rng):
    with pytest.raises(ValueError, match="bucket of 30 patches .* multiples of 4"):
        pack([[tiny.merged_image(rng)]], patches=30)
    with pytest.raises(ValueError, match="text with targets, but without the bos and eos"):
        context.supervise(
            [[blocks_lib.Text(np.array([1]), loss=True, delimited=False)]],
            context.Sizes(4, 0, 4),
            tokenizer=tiny.TOKENIZER,
            side=0,
        )


def test_patches_of_merge_blocks_are_put_together_again(rng):
    pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)
    block = blocks_lib.image_block(pixels, 4, 2)
    assert block.grid == (6, 10) and block.length == 15 + 2
    row, column = images.cells(block.grid, 2)[13, :2]
    own = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    np.testing.assert_array_equal(block.patches[13], own.reshape(-1))
    np.testing.assert_array_equal(images.unpatchify(block.patches, block.grid, 4, 2), pixels)
    with pytest.raises(ValueError, match="does not divide into patches of 8"):
        images.patchify(pixels[:20], 4, 2)


def test_normalisation_of_floats_is_that_of_bytes(rng):
    """Noise in the place of an image is given in [-1, 1], as for BAGEL's tower."""
    vit = tiny.QWEN["qwen2_5_vl"].vit
    patches = rng.integers(0, 256, (1, 2, vit.patch_dim), np.uint8)
    ours = qwen_vision.normalize(patches, vit)
    np.testing.assert_allclose(
        ours, qwen_vision.normalize(images.normalize(patches), vit), atol=1e-5
    )
    values = images.pixel_values(patches[0], vit.mean, vit.std).reshape(2, 3, 2, -1)
    own = np.asarray(ours)[0].reshape(2, -1, 3)
    for frame in range(2):
        np.testing.assert_allclose(np.moveaxis(values[:, :, frame], 1, -1), own, atol=2e-6)


def test_windows(rng):
    """Windows of 4 x 4 patches, from the upper left corner; different in every image."""
    c = pack([[tiny.merged_image(rng, (6, 10)), tiny.merged_image(rng, (2, 2))]])
    found = np.asarray(qwen_vision.window_numbers(c.patch_cells, c.patch_image, 4))[0]
    windows = {}
    for n, (row, column, *_) in enumerate(c.patch_cells[0, :60]):
        windows.setdefault((row // 4, column // 4), set()).add(found[n])
    assert [len(numbers) for numbers in windows.values()] == [1] * 6
    every = set.union(*windows.values())
    assert len(every) == 6 and found[60] not in every | {0}
    assert (found[60:64] == found[60]).all() and (found[64:] == 0).all()


def test_resampling(rng):
    """Against interpolation in float64; an image of the table's size reads the table itself."""
    table = rng.standard_normal((25, 3))
    for rows, columns in ((5, 5), (2, 8), (10, 4)):
        cells = images.cells((rows, columns), 1)
        found = qwen_vision.resample(jnp.asarray(table, jnp.float32), cells[None])[0]
        grid = table.reshape(5, 5, 3)
        y, x = np.linspace(0, 4, rows), np.linspace(0, 4, columns)
        by_row = np.stack(
            [[np.interp(y, range(5), grid[:, n, e]) for e in range(3)] for n in range(5)]
        )
        whole = np.array(
            [
                [[np.interp(at, range(5), by_row[:, e, r]) for e in range(3)] for at in x]
                for r in range(rows)
            ]
        )
        np.testing.assert_allclose(found, whole.reshape(-1, 3), atol=1e-6)
    np.testing.assert_array_equal(
        qwen_vision.resample(jnp.asarray(table, jnp.float32), images.cells((5, 5), 1)[None])[0],
        table.astype(np.float32),
    )


def test_axes_of_frequencies():
    assert attention.rope_axes((2, 3, 3), False) == (0, 0, 1, 1, 1, 2, 2, 2)
    assert attention.rope_axes((6, 3, 3), True) == (0, 1, 2) * 3 + (0,) * 3
    assert attention.rope_axes((3, 3, 2), True) == (0, 1, 2, 0, 1, 2, 0, 1)
    same = np.arange(4)[None]
    axes = attention.rope_axes((2, 3, 3), False)
    one = attention.rope_tables(same, 16, 1e4)
    three = attention.rope_tables(np.repeat(same[:, :, None], 3, 2), 16, 1e4, axes=axes)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_see_each_other_nor_padding(family, rng):
    model = tiny.QWEN[family]
    first, second = tiny.merged_image(rng, (4, 6)), tiny.merged_image(rng, (8, 2))
    both, taps = encode(model, pack([[first, second]]))
    alone, own_taps = encode(model, pack([[second]], patches=16))
    np.testing.assert_allclose(both[0, 24:40], alone[0], rtol=1e-6, atol=2e-6)
    if taps is not None:
        np.testing.assert_allclose(taps[:, 0, 24:40], own_taps[:, 0], rtol=1e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ways_to_compute(family, rng):
    """Recomputed, in blocks of queries, or unrolled: the same values and gradients."""
    model = tiny.QWEN[family]
    c = pack([[text(1), tiny.merged_image(rng, (4, 6)), text(2)]], 12, 32)

    @functools.partial(jax.jit, static_argnames="config")
    def loss(params, config):
        def of(params):
            return jnp.sum(bagel.read(params, c, config=config)[0][:, :10] ** 2)

        return jax.value_and_grad(of)(params)

    value, grads = loss(tiny.params(model), model)
    otherwise = dataclasses.replace(model, remat="full", query_block=24, unroll=3)
    other, others = loss(tiny.params(model), otherwise)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for path, distance in tiny.distances(grads, others).items():
        assert distance < 2e-3, path
    kernel = grads["vit"]["patch_convolution"]
    assert np.abs(kernel).max() > 0
    np.testing.assert_array_equal(kernel[0], kernel[1])  # a still image: equal frames


@pytest.mark.slow
def test_windows_in_the_kernel(rng):
    """The TPU's kernel, run slowly, with several windows in each of its blocks of patches."""
    model = tiny.QWEN["qwen2_5_vl"]
    c = pack([[tiny.merged_image(rng, (6, 6)), tiny.merged_image(rng, (12, 8))]], 80, 256)
    patches = qwen_vision.normalize(c.patches, model.vit)
    dense, kernel = (
        jax.jit(qwen_vision.Encoder(model.vit, kind=kind).apply)(
            {"params": tiny.params(model)["vit"]}, patches, c.patch_cells, c.patch_image
        )[0]
        for kind in ("dense", "flash_interpret")
    )
    np.testing.assert_allclose(dense[0, :132], kernel[0, :132], atol=1e-5)


def test_windows_and_whole_images_differ(rng):
    model = tiny.QWEN["qwen2_5_vl"]
    c = pack([[tiny.merged_image(rng, (6, 6))]])
    windows, _ = encode(model, c)
    everywhere = dataclasses.replace(model.vit, full_layers=(0, 1, 2))
    whole, _ = encode(dataclasses.replace(model, vit=everywhere), c)
    assert np.abs(windows - whole)[0, :36].max() > 1e-2
    uneven = dataclasses.replace(model.vit, window=19)  # whole tokens count: 2 of 8 pixels
    np.testing.assert_array_equal(windows, encode(dataclasses.replace(model, vit=uneven), c)[0])
    small = pack([[tiny.merged_image(rng, (4, 4))]])  # one window
    np.testing.assert_allclose(
        encode(model, small)[0][0, :16],
        encode(dataclasses.replace(model, vit=everywhere), small)[0][0, :16],
        atol=1e-6,
    )


def test_features_are_added_after_the_first_layers(rng):
    """Layer by layer: what the scan adds is in its own layer and at its own tokens."""
    model = tiny.QWEN["qwen3_vl"]
    deeper = dataclasses.replace(model, llm=dataclasses.replace(model.llm, num_layers=3))
    features = jnp.asarray(rng.standard_normal((2, 1, 3, 32)), jnp.float32)
    x = jnp.zeros((1, 6, 32))
    deep = mot.Deep(features, jnp.array([[1, 4, 2**30]]))  # the third is padding
    for layer in range(3):
        found = mot._add_features(x, deep, jnp.int32(layer))
        expected = np.zeros((6, 32), np.float32)
        if layer < 2:
            expected[[1, 4]] = features[layer, 0, :2]
        np.testing.assert_array_equal(found[0], expected)
    # Through the model: the text before the image is the same, the image's tokens are not.
    c = pack([[text(1, 2), tiny.merged_image(rng), text(3)]], 12, 16)
    params = tiny.params(deeper)
    mask = bagel.Mask(c.limit, c.segment, c.segment)

    @jax.jit
    def forward(params):
        x, deep = bagel.embed_deep(params, c, config=deeper)
        return [
            bagel.forward(params, bagel.Embedded(x, c.rope_positions, mask, d), config=deeper)[0]
            for d in (deep, None)
        ]

    with_features, without = forward(params)
    np.testing.assert_array_equal(with_features[0, :3], without[0, :3])
    assert np.abs(with_features - without)[0, 3:7].max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_scored_as_they_are_decoded(family, rng):
    """`distill.score` after a padded context equals prefill and one step per token with a cache.

    The contexts have different lengths. Padding patches must not be added anywhere.
    """
    model, params = tiny.QWEN[family], tiny.params(tiny.QWEN[family])
    c = pack(
        [[text(1, 2), tiny.merged_image(rng, (4, 6)), text(3)], [tiny.merged_image(rng, (2, 2))]],
        14,
        32,
    )
    tokens = rng.integers(0, 256, (2, 3)).astype(np.int32)
    block = context.completion(jnp.asarray(tokens), np.ones((2, 3), bool), bos=256, eos=257)

    @jax.jit
    def by_steps(params):
        segment = jnp.pad(c.segment, ((0, 0), (0, 4)))
        cache = bagel.init_cache(2, 18, config=model)
        _, cache = bagel.read(params, c, config=model, cache=cache, key_segment=segment)
        found = []
        for n in range(4):
            segment = segment.at[:, 14 + n].set(1)
            x = bagel.embed_tokens(params, block.tokens[:, n : n + 1], config=model)
            mask = bagel.Mask(jnp.full((1, 1), 18), jnp.ones((2, 1), jnp.int32), segment)
            inputs = bagel.Embedded(x, (c.next_rope_position + n)[:, None], mask)
            hidden, cache = bagel.forward(params, inputs, config=model, cache=cache, offset=14 + n)
            found.append(hidden[:, 0])
        return jnp.stack(found, axis=1)

    scored = jax.jit(functools.partial(distill.score, config=model))(params, c, block)
    np.testing.assert_allclose(by_steps(params), scored, atol=2e-5)


def test_model_without_grids_of_images_has_positions_of_one_dimension(rng):
    packed = tiny.pack([[blocks_lib.Text(np.array([1]))]])
    assert packed.rope_positions.shape == (1, tiny.POSITIONS) and packed.patch_cells is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "siglip", "side": 6, "window": 0, "full_layers": ()}, "has no merge"),
        ({"num_heads": 8}, "heads of 2 are not divisible by 4"),
        ({"window": 7}, "window 7 is smaller than a token of 8 x 8 pixels"),
        ({"full_layers": (3,)}, "name a layer past the last of 3"),
        ({"mean": (0.5,)}, "mean and std are of three channels"),
        ({"kind": "qwen3_vl"}, "which has a table of positions: set side"),
        ({"kind": "clip"}, "model.vit.kind is 'clip': choose from"),
    ],
)
def test_wrong_towers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.QWEN["qwen2_5_vl"].vit, **changes)


def test_wrong_models_are_refused():
    model = tiny.QWEN["qwen3_vl"]
    with pytest.raises(ValueError, match="mrope belong|belong to the towers"):
        dataclasses.replace(model, llm=dataclasses.replace(model.llm, mrope=()))
    with pytest.raises(ValueError, match="belong to the towers of Qwen2.5-VL"):
        dataclasses.replace(model, vit=tiny.MODEL.vit)
    with pytest.raises(ValueError, match="family generates no images"):
        dataclasses.replace(model, generation=tiny.DRAWING.generation)
    with pytest.raises(ValueError, match=r"sum head_dim / 2 = 4"):
        dataclasses.replace(model.llm, mrope=(1, 1, 1))
    with pytest.raises(ValueError, match="the decoder has 2, one of which reads each"):
        vit = dataclasses.replace(model.vit, deepstack=(0, 1, 2))
        dataclasses.replace(model, vit=vit)
    assert isinstance(model.vit, ViTConfig) and model.patches_per_side == 0


@pytest.mark.parametrize(
    ("size", "limits", "resized"),
    [
        ((70, 42), (3136, 10**7), (56, 56)),  # 2.5 and 1.5 strides: both to 2
        ((14, 14), (3136, 10**7), (56, 56)),  # half a stride: rounded to 0, then enlarged
        ((2000, 10), (784, 28 * 28 * 40), (420, 28)),  # 71 x 0 strides have no pixels: enlarged
        ((4000, 3000), (3136, 1_003_520), (1148, 840)),
        ((2800, 28), (784, 784 * 20), (28 * 44, 28)),  # at least one stride
    ],
)
def test_smart_resize(size, limits, resized):
    rule = images.SmartResize(28, *limits)
    assert rule(*size) == resized
    assert rule(*size[::-1]) == resized[::-1]


def test_smart_resize_refuses():
    rule = images.SmartResize()
    assert rule(200, 1)[1] == 28
    with pytest.raises(ValueError, match="more than 200 times the other"):
        rule(201, 1)
    with pytest.raises(ValueError, match="nothing to resize"):
        rule(0, 5)
    with pytest.raises(ValueError, match="images.min_pixels 5 is above max_pixels 4"):
        images.SmartResize(28, 5, 4)
