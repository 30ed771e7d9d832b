"""Drawing: latents in the network, the sampler and the loss, against a dense forward in the order
of the sequence.

The second opinion is `Sequence`: float64 NumPy, one row, no padding, no cache, no static cut; each
slot has the weights of its own expert, and the mask is built block by block.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
import tiny
from opsd_jax import flow, rollout
from opsd_jax import params as params_lib
from opsd_jax.blocks import Image, Latent, Text
from opsd_jax.method_config import RENORMS
from opsd_jax.model import bagel, masks
from tiny import DRAWING, TOKENIZER, image, latent

C, SIDE = DRAWING.generation.latent_dim, DRAWING.generation.side
pack = functools.partial(tiny.pack, generation=DRAWING.generation)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def params():
    return tiny.params(DRAWING)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def text(rng, n):
    return Text(rng.integers(0, 256, n).astype(np.int32))


# ---- the second opinion


class Sequence:
    """A row of blocks, slot after slot. Latent blocks may be given as (block, tokens, times) with
    what is fed.

    x [T, D], positions [T], mask [T, T], gen: bool [T], the slots of latent tokens, hidden [T, D].
    """

    def __init__(self, params, blocks, after=()):
        p = jax.tree.map(
            lambda a: np.asarray(a, np.float64), {name: params[name] for name in ("llm", "latent")}
        )
        table, pieces, positions, gens, noised = p["llm"]["embed"], [], [], [], []
        rope, stops = 0, []
        for block in [*blocks, *([np.asarray(after)] if len(after) else [])]:
            block, tokens, times = block if isinstance(block, tuple) else (block, None, 0.0)
            causal, advance, hidden = False, 1, isinstance(block, Latent) and block.noised
            ends = table[[TOKENIZER.image_start]], table[[TOKENIZER.image_end]]
            if isinstance(block, np.ndarray):  # raw ids
                piece, causal, advance = table[block], True, len(block)
            elif isinstance(block, Text):
                piece, causal, advance = (
                    table[[TOKENIZER.bos, *block.ids, TOKENIZER.eos]],
                    True,
                    len(block.ids) + 2,
                )
            elif isinstance(block, Image):
                piece = np.concatenate([ends[0], vit_of(params, block), ends[1]])
            else:
                tokens = block.tokens if tokens is None else tokens
                piece = np.concatenate(
                    [ends[0], latents_of(p["latent"], tokens, times, block.grid), ends[1]]
                )
                advance = 0 if block.noised else 1
            n, at = len(piece), len(positions)
            pieces.append(piece)
            positions += range(rope, rope + n) if causal else [rope] * n
            gens += [isinstance(block, Latent) and 0 < i < n - 1 for i in range(n)]
            noised += [at + 1 if hidden else 0] * n
            stops += range(at + 1, at + n + 1) if causal else [at + n] * n
            rope += advance
        self.p, self.x, self.positions, self.gen = (
            p,
            np.concatenate(pieces),
            np.array(positions),
            np.array(gens),
        )
        noised = np.array(noised)
        self.mask = np.arange(len(positions)) < np.array(stops)[:, None]
        self.mask &= (noised == 0) | (noised == noised[:, None])
        self.hidden = self.forward()

    def forward(self):
        c, llm, x = DRAWING.llm, self.p["llm"], self.x

        def own(name, n):
            return np.where(self.gen[:, None], *(llm["layers"][e][name][n] for e in ("gen", "und")))

        def both(y, name, n):
            return np.where(
                self.gen[:, None],
                *(y @ llm["layers"][e][f"{name}_kernel"][n] for e in ("gen", "und")),
            )

        def norm(y, scale):
            return y / np.sqrt((y * y).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

        for n in range(c.num_layers):
            y = norm(x, own("input_norm", n))
            q, k, v = (
                (both(y, a, n) + own(f"{a}_bias", n)).reshape(len(x), -1, c.head_dim) for a in "qkv"
            )
            q, k = (
                reference.rope(
                    norm(a, own(f"{name}_norm", n)[:, None]), self.positions, c.rope_theta
                )
                for name, a in (("q", q), ("k", k))
            )
            x = x + both(reference.attention(q, k, v, self.mask), "o", n)
            y = norm(x, own("post_norm", n))
            gate = both(y, "gate", n)
            x = x + both(gate / (1 + np.exp(-gate)) * both(y, "up", n), "down", n)
        return norm(x, np.where(self.gen[:, None], llm["norm_gen"], llm["norm"]))

    def velocity(self):
        """[number of latent tokens, C]."""
        return self.hidden[self.gen] @ self.p["latent"]["out_kernel"] + self.p["latent"]["out_bias"]


_encode_images = jax.jit(functools.partial(bagel.encode_images, config=DRAWING))


def vit_of(params, block):
    """What an image's patches become in the decoder's sequence, by the package itself."""
    alone = pack([[block]], positions=6, patches=4)
    return np.asarray(_encode_images(params, alone), np.float64)[0, : len(block.patches)]


def latents_of(p, tokens, times, grid):
    """What latent tokens become in the decoder's sequence."""
    times = np.broadcast_to(np.asarray(times, np.float64), len(tokens))
    angles = times[:, None] * 10000.0 ** (-np.arange(128) / 128)
    wave = (
        np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ p["time_fc1_kernel"]
        + p["time_fc1_bias"]
    )
    time = wave / (1 + np.exp(-wave)) @ p["time_fc2_kernel"] + p["time_fc2_bias"]
    ids = [row * SIDE + column for row in range(grid[0]) for column in range(grid[1])]
    return tokens @ p["in_kernel"] + p["in_bias"] + time + p["position_table"][ids]


@functools.partial(jax.jit, static_argnames="config")
def read(params, context, latents=None, times=None, *, config=DRAWING):
    return bagel.read(params, context, config=config, latents=latents, times=times)[0]


def in_sequence(packed, row):
    """Slots of a row in the order of the sequence."""
    used = np.flatnonzero(packed.segment[row])
    return used[np.argsort(packed.latents.order[row, used])]


# ---- latents in the network


@pytest.fixture(scope="module")
def mixed(params):
    """Three rows: two noised images with their clean copies among text and patches; a clean image;
    none at all. tokens, times: what is fed, noisy where the image is.
    """
    rng = np.random.default_rng(2)
    first, second = latent(rng, (2, 2)), latent(rng, (1, 3))

    def noised(block):
        return dataclasses.replace(block, noised=True)

    rows = [
        [
            text(rng, 2),
            image(rng, (1, 2)),
            noised(first),
            first,
            text(rng, 3),
            noised(second),
            second,
            text(rng, 1),
        ],
        [text(rng, 1), latent(rng, (3, 2)), image(rng, (2, 2)), text(rng, 4)],
        [text(rng, 5), image(rng, (1, 1)), text(rng, 2)],
    ]
    packed = pack(rows, positions=32, patches=6, latents=16)
    noise = rng.standard_normal(packed.latents.tokens.shape, np.float32)
    times = np.zeros(noise.shape[:2], np.float32)
    times[0, :4], times[0, 8:11] = 0.3, 0.8  # slots: 4 noised, 4 clean, 3 noised, 3 clean
    tokens = ((1 - times)[..., None] * packed.latents.tokens + times[..., None] * noise).astype(
        np.float32
    )
    fed = [list(row) for row in rows]
    fed[0][2] = (rows[0][2], tokens[0, :4], 0.3)
    fed[0][5] = (rows[0][5], tokens[0, 8:11], 0.8)
    return types.SimpleNamespace(
        rows=rows, fed=fed, packed=packed, noise=noise, times=times, tokens=tokens
    )


def test_hidden_states_equal_a_dense_forward(params, mixed):
    hidden = np.asarray(read(params, mixed.packed, mixed.tokens, mixed.times))
    assert hidden.shape == (3, 32 + 16, 32) and np.isfinite(hidden).all()
    for row, blocks in enumerate(mixed.fed):
        expected = Sequence(params, blocks)
        places = in_sequence(mixed.packed, row)
        assert (expected.gen == (places >= 32)).all()
        np.testing.assert_allclose(hidden[row, places], expected.hidden, atol=1e-4)
    assert Sequence(params, mixed.fed[0]).gen.sum() == 14


def test_clean_latents_are_read_at_time_zero(params, mixed):
    """Without noisy tokens `read` takes those of the context."""
    hidden = np.asarray(read(params, mixed.packed))
    for row, blocks in enumerate(mixed.rows):
        expected = Sequence(params, blocks).hidden
        np.testing.assert_allclose(hidden[row, in_sequence(mixed.packed, row)], expected, atol=1e-4)


def test_each_expert_has_its_own_slots(params, mixed):
    """Other generation weights change latents and what comes after them, nothing before and no row
    without.
    """
    other = params_lib.unflatten(
        {
            path: leaf * 1.5 if params_lib.fact(path).group in ("gen", "latent") else leaf
            for path, leaf in params_lib.flatten(params).items()
        }
    )
    one, two = (
        np.asarray(read(p, mixed.packed, mixed.tokens, mixed.times)) for p in (params, other)
    )
    for row, first in ((0, 8), (1, 3)):  # places before the first image with its delimiters
        places = in_sequence(mixed.packed, row)
        np.testing.assert_array_equal(one[row, places[:first]], two[row, places[:first]])
        assert (
            np.abs(one[row, places[first:]] - two[row, places[first:]]).max(axis=1) > 1e-3
        ).all()
    used = mixed.packed.segment[2] > 0
    np.testing.assert_array_equal(one[2, used], two[2, used])


def test_a_noised_image_touches_itself_alone(params, mixed):
    tokens = mixed.tokens.copy()
    tokens[0, :4] += 1
    one, two = (
        np.asarray(read(params, mixed.packed, x, mixed.times)) for x in (mixed.tokens, tokens)
    )
    changed = (np.abs(one - two).max(axis=2) > 1e-4) & (mixed.packed.segment > 0)
    expected = np.zeros_like(changed)
    expected[0, in_sequence(mixed.packed, 0)[8:14]] = (
        True  # 4 text and 4 image slots before, delimiters too
    )
    np.testing.assert_array_equal(changed, expected)


def test_padding_latents_do_not_matter(params, mixed, rng):
    padding = mixed.packed.latents.image == 0
    assert padding.sum(axis=1).tolist() == [2, 10, 16]
    tokens = np.where(
        padding[..., None], rng.standard_normal(mixed.tokens.shape, np.float32) * 9, mixed.tokens
    )
    times = np.where(padding, 0.7, mixed.times).astype(np.float32)
    one, two = (
        np.asarray(read(params, mixed.packed, *fed))
        for fed in ((mixed.tokens, mixed.times), (tokens, times))
    )
    used = mixed.packed.segment > 0
    np.testing.assert_array_equal(one[used], two[used])


def test_unused_latents_leave_hidden_states_alone(params, rng):
    """Rows without latents, packed with positions for them and without."""
    rows = [[text(rng, 3), image(rng, (2, 1)), text(rng, 2)], [text(rng, 6)]]
    with_room, without = (
        pack(rows, positions=20, patches=3, latents=6),
        pack(rows, positions=20, patches=3),
    )
    ours, its = np.asarray(read(params, with_room)), np.asarray(read(params, without))
    used = without.segment > 0
    np.testing.assert_allclose(ours[:, :20][used], its[used], atol=1e-5)
    understanding = {name: params[name] for name in ("llm", "vit", "connector")}
    alone = read(understanding, without, config=dataclasses.replace(DRAWING, generation=None))
    np.testing.assert_array_equal(np.asarray(alone)[used], its[used])


def test_latents_need_the_generation_expert(params, mixed):
    with pytest.raises(ValueError, match="latent tokens need the generation expert"):
        bagel.forward(
            params,
            bagel.Embedded(
                jnp.zeros((1, 2, 32)),
                jnp.ones((1, 2), jnp.int32),
                masks.Mask(*jnp.ones((3, 1, 2), jnp.int32)),
            ),
            config=tiny.MODEL,
            latents=1,
        )


def test_a_fresh_model_generates_no_image():
    """The first velocities are zero."""
    latent = jax.jit(lambda key: bagel.init(key, config=DRAWING)["latent"])(jax.random.key(0))
    assert not latent["out_kernel"].any() and not latent["out_bias"].any()
    assert all(latent[f"{name}_kernel"].std() > 0.03 for name in ("in", "time_fc1", "time_fc2"))


def test_sampling_after_latents_is_greedy_decoding(params):
    """Every token that was fed is the argmax of a whole forward over the sequence so far."""
    rng = np.random.default_rng(5)
    drawn = latent(rng, (2, 2))
    rows = [
        [text(rng, 2), drawn, image(rng, (2, 2)), text(rng, 3)],
        [text(rng, 1), latent(rng, (1, 3))],
        [text(rng, 4)],
    ]
    packed = pack(rows, positions=24, patches=4, latents=5)
    config = tiny.rollout_config(model=DRAWING, max_new_tokens=8, greedy=True)
    trajectory, logits = rollout.sample(
        params, packed, jax.random.key(0), config=config, return_logits=True
    )
    assert len(np.unique(trajectory.fed, axis=0)) == 3
    for row, blocks in enumerate(rows):
        n = int(trajectory.num_fed[row])
        fed = np.asarray(trajectory.fed[row, :n])
        expected = Sequence(params, blocks, after=fed).hidden[-n:] @ np.asarray(
            params["llm"]["head"], np.float64
        )
        np.testing.assert_allclose(logits[row, :n], expected, atol=5e-4)
        assert n > 3 and fed[0] == TOKENIZER.bos and (fed[1:] == expected[:-1].argmax(axis=1)).all()


# ---- schedule and guidance


def config_of(**kwargs):
    defaults = {
        "model": DRAWING,
        "image_start": TOKENIZER.image_start,
        "image_end": TOKENIZER.image_end,
    }
    return flow.FlowConfig(**{**defaults, **kwargs})


def test_timesteps():
    times = flow.timesteps(config_of(num_timesteps=50, timestep_shift=3.0))
    assert times.dtype == np.float32 and times.shape == (50,) and times[0] == 1 and times[-1] == 0
    assert (np.diff(times) < 0).all()
    t = 1 - np.arange(50) / 49
    np.testing.assert_allclose(times, 3 * t / (1 + 2 * t), atol=1e-6)
    assert flow.timesteps(config_of(num_timesteps=5, timestep_shift=1.0)).tolist() == [
        1,
        0.75,
        0.5,
        0.25,
        0,
    ]
    assert flow.shifted(jnp.float32(0.5), 3.0) == 0.75


def test_training_times(rng):
    raw = np.array([-np.inf, -1, 0, 2, np.inf], np.float32)
    found = np.asarray(flow.training_times(raw, 1.0))
    np.testing.assert_allclose(found, [0, 1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-2)), 1], atol=1e-6)
    assert found[0] == 0  # exactly: such an image is clean
    np.testing.assert_allclose(
        flow.training_times(raw, 4.0), 4 * found / (1 + 3 * found), atol=1e-6
    )


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ((0.0, 1.0), (0, 4)),
        ((0.5, 1.0), (0, 2)),
        ((0.25, 0.75), (1, 3)),
        ((0.2, 0.8), (1, 4)),
        ((0.0, 0.25), (3, 4)),
        ((0.3, 0.4), (0, 0)),
        ((1.0, 1.0), (0, 0)),
        ((0.9, 2.0), (0, 1)),
        ((0.8, 0.2), (0, 0)),
    ],
)
def test_guided_steps(interval, steps):
    """Steps start at 1, 0.75, 0.5 and 0.25; the interval is open below and closed above."""
    config = config_of(num_timesteps=5, timestep_shift=1.0, interval=interval)
    assert flow.guided_steps(config) == steps
    assert flow.guided_steps(dataclasses.replace(config, text_scale=1.0)) == (0, 0)


def test_guided_steps_compare_shifted_times():
    """Half of the grid is at t = 0.75 where the shift is 3."""
    config = config_of(num_timesteps=5, timestep_shift=3.0, interval=(0.7, 1.0))
    assert flow.guided_steps(config) == (0, 3)
    times, (first, last) = flow.timesteps(config_of()), flow.guided_steps(config_of())
    assert (first, last) == (0, (times > 0.4).sum())


def test_branches():
    def branches(a, b):
        return config_of(text_scale=a, image_scale=b).branches

    assert branches(3.0, 1.5) == ("cond", "text", "image") and branches(3.0, 1.0) == (
        "cond",
        "text",
    )
    assert branches(1.0, 1.5) == branches(0.5, 9.0) == ("cond",)
    assert config_of(**flow.HARNESS).branches == ("cond", "text", "image")
    assert flow.guided_steps(config_of(**flow.HARNESS)) == (0, 49)


def test_wrong_configs_are_refused():
    with pytest.raises(
        ValueError, match="this model cannot generate images.*without --only=understanding"
    ):
        config_of(model=tiny.MODEL)
    with pytest.raises(
        ValueError,
        match="num_timesteps is 1: give a whole number in .2, inf.; "
        "a grid has at least its two ends",
    ):
        config_of(num_timesteps=1)
    with pytest.raises(
        ValueError, match=r"renorm is 'none': choose from global, channel, text_channel"
    ):
        config_of(renorm="none")
    assert len(flow.timesteps(config_of(num_timesteps=2))) == 2


def guided_by_hand(cond, text, image, config):
    """One image without padding, [G, C], float64; image is None where its guidance is off."""
    norm = {"global": np.linalg.norm}.get(
        config.renorm, lambda v: np.linalg.norm(v, axis=1, keepdims=True)
    )

    def shrink(u):
        return u * np.clip(norm(cond) / (norm(u) + 1e-8), config.renorm_min, 1)

    u = text + config.text_scale * (cond - text)
    if config.renorm == "text_channel":
        u = shrink(u)
        return u if image is None else image + config.image_scale * (u - image)
    return shrink(u if image is None else image + config.image_scale * (u - image))


@pytest.mark.parametrize("minimum", [0.0, 0.5])
@pytest.mark.parametrize("scales", [(3.0, 1.5), (4.0, 1.0), (1.2, 2.0)])
@pytest.mark.parametrize("renorm", RENORMS)
def test_guidance(rng, renorm, scales, minimum):
    """Two images of 5 and 3 tokens; padding holds huge values."""
    config = config_of(
        renorm=renorm, text_scale=scales[0], image_scale=scales[1], renorm_min=minimum
    )
    counts, (cond, text, image) = (5, 3), rng.standard_normal((3, 2, 5, C)).astype(np.float32)
    cond[0, 2] *= 9  # a token whose guided norm is not larger than its own
    real = np.arange(5) < np.array(counts)[:, None]
    for velocity in (cond, text, image):
        velocity[~real] = 1e3
    image = image if scales[1] > 1 else None
    found = np.asarray(flow.guide(cond, text, image, real, config))
    for n, count in enumerate(counts):
        alone = [
            None if v is None else v[n, :count].astype(np.float64) for v in (cond, text, image)
        ]
        expected = guided_by_hand(*alone, config)
        np.testing.assert_allclose(found[n, :count], expected, atol=1e-4)


# ---- image generation


@pytest.mark.parametrize(
    "changes, computed",
    [
        ({}, "1111111"),
        ({"compute_every": 2}, "1111011"),  # phases of 2, 4 and 1 steps
        ({"compute_every": 3, "interval": (0.0, 1.0)}, "1100100"),  # all are guided
        ({"compute_every": 3, "extrapolation": 2, "interval": (0.0, 1.0)}, "1110010"),
        ({"compute_every": 2, "extrapolation": 0, "text_scale": 1.0}, "1010101"),
        ({"compute_every": 9, "text_scale": 1.0}, "1100000"),
    ],
)
def test_which_steps_compute_their_velocities(changes, computed):
    config = config_of(**{**MIDDLE, **changes})
    assert "".join(map(str, flow.computed_steps(config).astype(int))) == computed


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_polynomials_are_extrapolated_exactly(degree):
    rng = np.random.default_rng(degree)
    coefficients = rng.standard_normal((degree + 1, 3, 2, 4, C))

    def polynomial(t):
        return sum(c * t**n for n, c in enumerate(coefficients))

    times = np.linspace(0.6, 0.8, degree + 1)
    found = flow.extrapolated(np.stack([polynomial(t) for t in times]), times, np.asarray(0.5))
    np.testing.assert_allclose(found, polynomial(0.5), rtol=1e-9, atol=1e-9)


MIDDLE = {
    "num_timesteps": 8,
    "interval": (0.5, 0.9),
}  # steps 0 and 1 before, 2 to 5 guided, 6 after
GRIDS, TOKENS = [(2, 3), (1, 2)], 7


@pytest.fixture(scope="module")
def scene():
    """Two images to generate after three contexts each.

    The first follows an image that was generated before.
    """
    rng = np.random.default_rng(7)
    words, before, seen, system = (
        text(rng, 4),
        latent(rng, (2, 2)),
        image(rng, (2, 2)),
        text(rng, 2),
    )
    other, problem = text(rng, 3), image(rng, (1, 3))
    rows = {
        "cond": [[system, before, seen, words], [problem, other]],
        "text": [[system, before, seen], [problem]],
        "image": [[system, words], [other]],
    }
    noise = rng.standard_normal((2, TOKENS, C), np.float32)
    return types.SimpleNamespace(rows=rows, noise=noise)


def contexts_of(scene, branches, images=(0, 1), positions=20):
    return pack(
        [scene.rows[branch][n] for branch in branches for n in images],
        positions=positions,
        patches=4,
        latents=5,
    )


def generated(params, scene, config, images=(0, 1), tokens=TOKENS, **kwargs):
    positions = flow.latent_positions([GRIDS[n] for n in images], tokens, SIDE)
    return np.asarray(
        flow.generate(
            params,
            contexts_of(scene, config.branches, images),
            scene.noise[list(images), :tokens],
            positions,
            config=config,
            **kwargs,
        )
    )


def generated_by_hand(params, scene, n, config):
    """Euler steps over whole forwards, the block in its real order after each context."""
    grid, count = GRIDS[n], GRIDS[n][0] * GRIDS[n][1]
    grid_points = np.linspace(1, 0, config.num_timesteps)
    times = config.timestep_shift * grid_points / (1 + (config.timestep_shift - 1) * grid_points)
    x, guided = scene.noise[n, :count].astype(np.float64), []
    computed, kept = flow.computed_steps(config), {}
    for step, (t, following) in enumerate(zip(times, times[1:])):

        def v(branch):
            known = kept.setdefault(branch, [])
            if not computed[step]:  # the polynomial through the last ones
                moments, values = zip(*known[-config.extrapolation - 1 :])
                powers = np.vander(moments, increasing=True)
                solved = np.linalg.solve(powers, np.reshape(values, (len(values), -1)))
                return (t ** np.arange(len(values)) @ solved).reshape(count, -1)
            sequence = Sequence(params, [*scene.rows[branch][n], (Latent(x, grid), x, t)])
            known.append((t, sequence.velocity()[-count:]))
            return known[-1][1]

        guided.append(len(config.branches) > 1 and config.interval[0] < t <= config.interval[1])
        if guided[-1]:
            others = [v(branch) for branch in config.branches[1:]]
            velocity = guided_by_hand(
                v("cond"), others[0], others[1] if len(others) > 1 else None, config
            )
        else:
            velocity = v("cond")
        x = x - velocity * (t - following)
    return x, guided


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "guided"),
    [
        ({**MIDDLE}, [0, 0, 1, 1, 1, 1, 0]),
        ({**MIDDLE, **flow.HARNESS}, [1] * 7),
        ({**MIDDLE, "text_scale": 1.0}, [0] * 7),
        ({**MIDDLE, "image_scale": 1.0, "renorm": "channel"}, [0, 0, 1, 1, 1, 1, 0]),
        ({**MIDDLE, "interval": (0.5, 0.5)}, [0] * 7),
        ({**MIDDLE, "model": dataclasses.replace(DRAWING, query_block=4)}, [0, 0, 1, 1, 1, 1, 0]),
        ({**MIDDLE, "compute_every": 2}, [0, 0, 1, 1, 1, 1, 0]),
        ({**MIDDLE, **flow.HARNESS, "compute_every": 3, "extrapolation": 2}, [1] * 7),
        ({**MIDDLE, **flow.HARNESS, "compute_every": 4, "extrapolation": 0}, [1] * 7),
    ],
    ids=[
        *("middle", "harness", "unguided", "two", "never", "query_block"),
        *("every_second", "every_third", "repeated"),
    ],
)
def test_image_generation_equals_the_definition(params, scene, case, guided):
    config = config_of(**case)
    found = generated(params, scene, config)
    assert found.shape == (2, TOKENS, C) and found.dtype == np.float32
    for n, (rows, columns) in enumerate(GRIDS):
        expected, steps = generated_by_hand(params, scene, n, config)
        assert steps == guided
        assert np.abs(expected - scene.noise[n, : rows * columns]).max() > 0.5  # it went somewhere
        np.testing.assert_allclose(found[n, : rows * columns], expected, atol=2e-3)


@pytest.mark.slow
def test_guidance_matters(params, scene):
    """The cases of the test above differ by far more than its tolerance."""
    results = [
        generated(params, scene, config_of(**{**MIDDLE, **other}))
        for other in ({}, flow.HARNESS, {"text_scale": 1.0})
    ]
    for n, (rows, columns) in enumerate(GRIDS):
        for i in range(len(results)):
            for j in range(i):
                assert (
                    np.abs(results[i][n, : rows * columns] - results[j][n, : rows * columns]).max()
                    > 0.05
                )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, pieces",
    [
        ({}, {3: [2, 5, 6, 7], 1: [1, 2, 3, 4, 5, 6, 7], 100: [2, 6, 7]}),
        ({"compute_every": 2}, {3: [2, 5, 6, 7], 1: [1, 2, 3, 5, 6, 7]}),
        ({"compute_every": 3, **flow.HARNESS}, {1: [1, 4, 7], 2: [4, 7], 100: [7]}),
    ],
)
def test_image_generation_in_pieces_equals_one_call(params, scene, changes, pieces):
    config, done = config_of(**{**MIDDLE, **changes}), []
    at_once = generated(params, scene, config)
    for every, expected in pieces.items():
        done.clear()
        np.testing.assert_array_equal(
            generated(params, scene, config, on_step=done.append, every=every), at_once
        )
        assert done == expected


def test_images_of_a_batch_do_not_touch(params, scene):
    """The first alone, without padding tokens; the second beside another one."""
    config = config_of(**MIDDLE)
    together = generated(params, scene, config)
    np.testing.assert_allclose(
        together[0, :6], generated(params, scene, config, images=(0,), tokens=6)[0], atol=2e-4
    )
    exchanged = generated(params, scene, config, images=(1, 0))
    np.testing.assert_allclose(together[1, :2], exchanged[0, :2], atol=2e-4)
    twice = generated(params, scene, config, images=(0, 0))
    np.testing.assert_allclose(twice[0, :6], together[0, :6], atol=2e-4)


def test_arguments_survive_and_nothing_recompiles(params, scene):
    """Other contexts, noise and pieces need no further programs."""
    config = config_of(num_timesteps=9, interval=(0.5, 0.95))
    positions = jax.device_put(flow.latent_positions(GRIDS, TOKENS, SIDE))
    contexts, noise = jax.device_put(contexts_of(scene, config.branches)), jnp.asarray(scene.noise)
    other = jax.device_put(
        contexts_of(
            types.SimpleNamespace(rows={branch: pair[::-1] for branch, pair in scene.rows.items()}),
            config.branches,
        )
    )

    def programs():
        return [f._cache_size() for f in (flow.prefill, flow.denoise, flow._cond_branch)]

    start = programs()
    first = flow.generate(params, contexts, noise, positions, config=config)
    after = programs()
    assert after[1] - start[1] == 2  # with guidance and without
    again = flow.generate(params, contexts, noise, positions, config=config)
    np.testing.assert_array_equal(first, again)
    flow.generate(params, other, noise + 1, positions, config=config)
    flow.generate(
        params, contexts, noise, positions, config=config, on_step=lambda n: None, every=2
    )
    assert programs() == after
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, contexts, noise, positions)))
    np.testing.assert_array_equal(noise, scene.noise)


@pytest.mark.parametrize("guided, every", [(True, 1), (False, 1), (True, 3)])
def test_steps_do_not_copy_the_cache(guided, every):
    """12 layers after 2,048 slots: the cache is updated in place, and what a step needs beside it
    is small.
    """
    model = dataclasses.replace(DRAWING, llm=dataclasses.replace(DRAWING.llm, num_layers=12))
    config = config_of(model=model, compute_every=every)

    def struct(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, slots, keys = 3 if guided else 1, 2048, 2048 + 2 + 4
    conditioning = flow.Conditioning(
        segment=struct(rows, keys),
        rope_position=struct(rows),
        positions=flow.LatentPositions(struct(1, 4), struct(1, 4, dtype=bool)),
        context_size=slots,
    )
    cache = jax.eval_shape(lambda: bagel.init_cache(rows, keys, config=model))
    params = jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))
    x = struct(1, 4, C, dtype=jnp.float32)
    lowered = flow.denoise.lower(
        params,
        conditioning,
        jax.eval_shape(functools.partial(flow.start, config=config), x, cache),
        struct(),
        struct(),
        config=config,
    )
    jax.config.update("jax_disable_most_optimizations", False)
    memory = lowered.compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", True)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2, (memory.temp_size_in_bytes, size)


def test_latent_positions():
    positions = flow.latent_positions([(2, 3), (1, 1), (6, 1)], 7, 6)
    ids, real = positions.table_ids, positions.real
    assert ids.tolist() == [[0, 1, 2, 6, 7, 8, 0], [0] * 7, [0, 6, 12, 18, 24, 30, 0]]
    assert real.sum(axis=1).tolist() == [6, 1, 6] and (np.diff(real.astype(int)) <= 0).all()
    assert ids.dtype == np.int32 and real.dtype == bool
    with pytest.raises(ValueError, match="exceeds the 6x6 position table"):
        flow.latent_positions([(1, 7)], 7, 6)
    with pytest.raises(ValueError):
        flow.latent_positions([(2, 4)], 7, 6)


# ---- the loss

loss_of = jax.jit(functools.partial(flow.loss, config=DRAWING))


def test_loss_equals_the_definition(params, mixed):
    errors, counted, hidden = loss_of(params, mixed.packed, mixed.times, mixed.noise)
    expected_counted = np.zeros((3, 16), bool)
    expected_counted[0, :4] = expected_counted[0, 8:11] = True
    np.testing.assert_array_equal(counted, expected_counted)
    assert errors.shape == (3, 16, C) and not np.asarray(errors)[~expected_counted].any()
    velocity = Sequence(params, mixed.fed[0]).velocity()  # 4 noised, 4 clean, 3 noised, 3 clean
    target = (mixed.noise - mixed.packed.latents.tokens)[0]
    for part in (slice(0, 4), slice(8, 11)):
        np.testing.assert_allclose(
            errors[0, part], (velocity[part] - target[part]) ** 2, rtol=1e-3, atol=1e-3
        )
    np.testing.assert_allclose(
        hidden, read(params, mixed.packed, mixed.tokens, mixed.times), atol=1e-5
    )


def test_padding_is_never_counted(params, mixed):
    times = np.full_like(mixed.times, 0.5)
    errors, counted, _ = loss_of(params, mixed.packed, times, mixed.noise)
    np.testing.assert_array_equal(counted, mixed.packed.latents.image > 0)
    assert not np.asarray(errors)[~np.asarray(counted)].any()


def test_gradients_of_the_loss(params, mixed):
    """They reach the image-generation path and what generated images see; they do not reach the
    autoencoder, the text's head and its last norm.
    """

    def loss(params):
        errors, counted, _ = flow.loss(
            params, mixed.packed, mixed.times, mixed.noise, config=DRAWING
        )
        return jnp.sum(errors) / jnp.sum(counted) / C

    grads = params_lib.flatten(jax.jit(jax.grad(loss))(params))
    reached = {path for path, g in grads.items() if np.asarray(g).any()}
    assert all(np.isfinite(g).all() for g in grads.values())
    unreached = {"llm/head", "llm/norm"} | {path for path in grads if path.startswith("vae/")}
    assert reached == grads.keys() - unreached
    frozen = ("embed", "und", "vit", "connector")
    trainable, _ = params_lib.partition(params, frozen, generation=True)
    trained = params_lib.flatten(trainable).keys()
    assert {params_lib.fact(path).group for path in trained} == {
        "gen",
        "latent",
    } and trained <= reached


def test_contexts_of_a_branch_that_is_missing(params, rng):
    """Short of branches, indexing would quietly take another one's velocity."""
    packed = pack([[text(rng, 3)]], positions=5, patches=0)
    positions = flow.latent_positions([(1, 2)], 2, SIDE)
    with pytest.raises(
        ValueError, match="1 images with the branches cond, text, image need 3 contexts, .* not 1"
    ):
        flow.generate(
            params, packed, np.zeros((1, 2, C), np.float32), positions, config=config_of()
        )
