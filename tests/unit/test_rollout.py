"""The sampler: its logits against the full forward, what it samples, and the image-skip rounds."""

import collections
import dataclasses
import types

import jax
import numpy as np
import pytest

import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import context, rollout, sharding
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.model.config import LLMConfig
from opsd_jax.tokenizer import DELIMITERS, Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compiles")

EOS_DRAWN, BUDGET_SPENT = rollout.STOP_EOS, rollout.STOP_BUDGET
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "up><image_start><image_end><image_start>up",
    "<image_start>",
    "up <image_start> up",
    '"<image_start>"',
)
CHAINS, COPIES = 96, 4


def numpy_of(trajectory):
    return jax.tree.map(np.asarray, trajectory)


def content(trajectory, row):
    return trajectory.tokens[row][trajectory.mask[row]].tolist()


# ---- logits


@pytest.fixture(scope="module")
def sampled():
    """A random model that often samples eos, six rows of different lengths, and one call that
    returns logits.

    Every second token spells the marker, so that half of the rounds are continued.
    """
    params = tiny.params()
    params["llm"]["head"] = params["llm"]["head"].at[:, tiny.TOKENIZER.eos].multiply(3)
    spelled = [blocks_lib.MARKER.encode() if n % 2 else b"x" for n in range(256)]
    config = tiny.rollout_config(
        marker=rollout.Marker.build(spelled, 264),
        max_new_tokens=14,
        max_image_skips=2,
        temperature=0.7,
    )
    blocks, _ = tiny.rows(np.random.default_rng(3), 6)
    packed = tiny.pack(blocks, positions=28, patches=9)
    trajectory, logits = rollout.sample(
        params, packed, jax.random.key(11), config=config, return_logits=True
    )
    return types.SimpleNamespace(
        params=params,
        config=config,
        blocks=blocks,
        context=packed,
        trajectory=numpy_of(trajectory),
        logits=np.asarray(logits),
    )


@jax.jit
def full_forward(params, whole):
    hidden, _ = bagel.read(params, whole, config=tiny.MODEL)
    return bagel.logits(params, hidden)


def test_decoding_equals_the_full_forward(sampled):
    """Without cache and the sampler's vectors: fed tokens right after the context, one sequence a
    row.
    """
    t, c = sampled.trajectory, sampled.context
    assert len(set(c.length)) > 2
    assert set(t.num_skips) >= {0, 1} and set(t.stop) == {EOS_DRAWN, BUDGET_SPENT}
    whole = {
        name: np.pad(getattr(c, name), ((0, 0), (0, 14)))
        for name in ("tokens", "rope_positions", "limit", "segment")
    }
    for row, (used, rope) in enumerate(zip(c.length, c.next_rope_position)):
        fed = slice(used, used + 14)
        whole["tokens"][row, fed] = t.fed[row]
        whole["rope_positions"][row, fed] = np.arange(rope, rope + 14)
        whole["limit"][row, fed] = np.arange(used + 1, used + 15)
        whole["segment"][row, fed] = 1
    patch_positions = np.where(c.patch_image > 0, c.patch_positions, 28 + 14)
    expected = full_forward(
        sampled.params, dataclasses.replace(c, **whole, patch_positions=patch_positions)
    )
    for row, (used, n) in enumerate(zip(c.length, t.num_fed)):
        np.testing.assert_allclose(
            sampled.logits[row, :n], expected[row, used : used + n], atol=2e-4
        )


def in_blocks(config, size=8):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, key_block=size))


def test_keys_in_blocks_sample_the_same(sampled):
    """28 + 14 positions in six blocks of 8 columns."""
    config = in_blocks(sampled.config)
    assert bagel.cache_columns(28 + 14, config=config.model) == 48
    trajectory, logits = rollout.sample(
        sampled.params, sampled.context, jax.random.key(11), config=config, return_logits=True
    )
    for name in ("tokens", "mask", "fed", "num_fed", "stop"):
        np.testing.assert_array_equal(getattr(trajectory, name), getattr(sampled.trajectory, name))
    np.testing.assert_allclose(logits, sampled.logits, atol=2e-4)


def test_int8_weights_compute_what_they_stand_for(sampled):
    """The sampler with int8 matrices against float32 matrices of the same values."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placed = jax.device_put(sampled.params, place)
    rounded = rollout.relayout_program(mesh, placed, "float32", int8=True)(placed)
    flat = params_lib.flatten(rounded)
    same = {
        path: leaf * flat[scale][..., None, :]
        for path, leaf in flat.items()
        if leaf.dtype == "int8"
        for scale in [path.removesuffix("_kernel") + "_scale"]
    }
    kept = {path: leaf for path, leaf in flat.items() if not path.endswith("_scale")}
    kept |= {path: leaf for path, leaf in flat.items() if path.startswith("vit/")}
    (found, logits), (expected, wanted) = (
        rollout.sample(
            params, sampled.context, jax.random.key(11), config=sampled.config, return_logits=True
        )
        for params in (rounded, params_lib.unflatten(kept | same))
    )
    np.testing.assert_array_equal(found.fed, expected.fed)
    np.testing.assert_allclose(logits, wanted, atol=5e-4)
    assert np.abs(np.asarray(logits) - sampled.logits).max() > 1e-3  # something was rounded


def test_a_row_does_not_depend_on_its_neighbours(sampled):
    greedy = dataclasses.replace(sampled.config, greedy=True)

    def sample(packed):
        return numpy_of(rollout.sample(sampled.params, packed, jax.random.key(0), config=greedy))

    together, again = sample(sampled.context), sample(sampled.context)
    order = [2, 2, 5, 2, 0, 2]
    among_others = sample(jax.tree.map(lambda x: x[np.array(order)], sampled.context))
    assert together.mask[2].sum() > 3
    for name in ("tokens", "mask", "fed", "fed_sampled", "num_fed", "num_skips", "stop"):
        np.testing.assert_array_equal(getattr(together, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(together, name)[order], getattr(among_others, name))
    np.testing.assert_allclose(together.logprobs[order], among_others.logprobs, atol=1e-4)


def test_a_trajectory_tells_the_same_story_twice(sampled):
    """`fed` and `fed_sampled` against `tokens`, `num_skips`, `num_fed` and the budget."""
    t, eos, bos = sampled.trajectory, sampled.config.eos, sampled.config.bos
    for row in range(6):
        n = t.num_fed[row]
        fed, chosen = t.fed[row, :n], t.fed_sampled[row, :n]
        assert fed[0] == bos and not chosen[0] and n <= 14
        assert not t.fed[row, n:].any() and not t.fed_sampled[row, n:].any()
        seams = np.flatnonzero(fed == eos)  # eos is fed only by a skip, and bos follows
        assert len(seams) == t.num_skips[row]
        assert all(
            chosen[s] and fed[s + 1] == bos and not chosen[s + 1] for s in seams if s + 1 < n
        )
        assert content(t, row) == fed[chosen & (fed != eos)].tolist()
        assert (
            n == 14 or t.stop[row] == EOS_DRAWN
        )  # eos may be sampled after the last token of the budget, too
        assert t.ended[row] == n
        assert not t.tokens[row][~t.mask[row]].any() and not t.logprobs[row][~t.mask[row]].any()
        assert (np.diff(t.mask[row].astype(int)) <= 0).all()


# ---- the queue

SAME = ("tokens", "mask", "fed", "fed_sampled", "num_fed", "num_skips", "stop")


@pytest.fixture(scope="module")
def crowd(sampled):
    """Twelve rows of different contexts and lengths, all at once."""
    blocks, _ = tiny.rows(np.random.default_rng(4), 12)
    packed = tiny.pack(blocks, positions=28, patches=9)

    def draw(**kw):
        return numpy_of(
            rollout.sample(
                sampled.params,
                packed,
                jax.random.key(2),
                config=dataclasses.replace(sampled.config, **kw),
            )
        )

    return types.SimpleNamespace(draw=draw, packed=packed, whole=draw())


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(slots=1),
        dict(slots=5, refill=1),
        dict(slots=5, refill=3),
        dict(slots=4, refill=4),
        dict(slots=6, refill=2, shards=2),
        dict(slots=8, refill=8, shards=4),
        dict(slots=5, refill=1, model=in_blocks(tiny.rollout_config()).model),
    ],
    ids=lambda sizes: "-".join(f"{key}={value}" for key, value in sizes.items())[:40],
)
def test_a_queue_samples_what_lanes_for_all_sample(crowd, sizes):
    """Sampled, with image skips: the columns of the ring are reused and nothing of the row before
    shows through.
    """
    queued = crowd.draw(**sizes)
    assert len(set(crowd.whole.num_fed)) > 3
    for name in SAME:
        np.testing.assert_array_equal(
            getattr(queued, name), getattr(crowd.whole, name), err_msg=name
        )
    np.testing.assert_allclose(queued.logprobs, crowd.whole.logprobs, atol=2e-4)
    steps, slots = queued.ended.max(), sizes["slots"]
    assert crowd.whole.num_fed.sum() <= steps * slots
    if (
        sizes.get("refill") == 1
    ):  # a free slot never waits while there are rows: no slot ends early by a whole row
        assert steps * slots - queued.num_fed.sum() < slots * queued.num_fed.max()
        assert (np.sort(queued.ended)[:5] == np.sort(queued.num_fed[:5])).sum() >= 1
    assert rollout.utilisation(queued, slots) == queued.num_fed.sum() / (steps * slots)


@pytest.mark.slow
def test_a_queue_with_logits_and_a_remainder(sampled, crowd):
    """Seven rows by four slots, greedy, with a banned marker; logits of every fed token."""
    packed = jax.tree.map(lambda x: x[:7], crowd.packed)
    config = dataclasses.replace(sampled.config, greedy=True, ban_marker=True)

    def draw(**kw):
        return rollout.sample(
            sampled.params,
            packed,
            jax.random.key(0),
            return_logits=True,
            config=dataclasses.replace(config, **kw),
        )

    (whole, logits), (queued, found) = draw(), draw(slots=4, refill=2)
    np.testing.assert_array_equal(whole.fed, queued.fed)
    for row, n in enumerate(np.asarray(whole.num_fed)):
        np.testing.assert_allclose(found[row, :n], logits[row, :n], atol=2e-4)


def test_rows_must_divide_into_shards(crowd):
    with pytest.raises(ValueError, match="12 sequences cannot be shared by the 5 batch shards"):
        crowd.draw(slots=5, refill=5, shards=5)


# ---- distributions


def restricted(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Reference: log-probabilities float64 after temperature, top-k and top-p, by sorting."""
    logits = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-logits)
    keep = order[:top_k] if top_k else order
    p = np.exp(logits[keep] - logits[keep].max())
    p /= p.sum()
    keep = keep[
        : 1 + int(np.searchsorted(np.cumsum(p), top_p))
    ]  # up to the entry that reaches top_p
    out = np.full(logits.shape, -np.inf)
    out[keep] = (
        logits[keep] - np.log(np.exp(logits[keep] - logits[keep].max()).sum()) - logits[keep].max()
    )
    return out


def test_logprobs_and_tokens_belong_to_the_returned_logits(sampled):
    t, checked = sampled.trajectory, 0
    for row in range(6):
        number = 0
        for at in range(
            1, t.num_fed[row]
        ):  # what was fed at `at` was sampled from the logits at `at` - 1
            if t.fed_sampled[row, at] and t.fed[row, at] != sampled.config.eos:
                expected = restricted(sampled.logits[row, at - 1], temperature=0.7)[t.fed[row, at]]
                np.testing.assert_allclose(t.logprobs[row, number], expected, atol=2e-5)
                number += 1
        assert number == t.mask[row].sum()
        checked += number
    assert checked > 40


def test_a_tiny_top_p_is_the_argmax(sampled):
    def sample(**kw):
        return numpy_of(
            rollout.sample(
                sampled.params,
                sampled.context,
                jax.random.key(6),
                config=dataclasses.replace(sampled.config, **kw),
            )
        )

    greedy, narrow = sample(greedy=True), sample(top_p=1e-6)
    np.testing.assert_array_equal(greedy.fed, narrow.fed)
    np.testing.assert_array_equal(narrow.logprobs, 0)


@pytest.mark.parametrize(
    "settings", [dict(temperature=1.5), dict(temperature=1.5, top_k=40, top_p=0.7)], ids=str
)
def test_first_tokens_follow_the_restricted_distribution(sampled, settings):
    """2,000 draws from one distribution; chi-squared over tokens that are expected at least five
    times.
    """
    n = 2000
    repeated = jax.tree.map(lambda x: np.repeat(x[:1], n, axis=0), sampled.context)
    config = dataclasses.replace(sampled.config, max_new_tokens=2, **settings)
    t, logits = rollout.sample(
        sampled.params, repeated, jax.random.key(7), config=config, return_logits=True
    )
    t, log_p = numpy_of(t), restricted(logits[0, 0], **settings)
    drawn = np.where(t.mask[:, 0], t.tokens[:, 0], config.eos)
    assert np.isfinite(log_p[drawn]).all() and len(set(drawn)) > 5
    np.testing.assert_allclose(t.logprobs[t.mask], log_p[drawn[t.mask[:, 0]]], atol=2e-5)
    assert (t.stop[~t.mask[:, 0]] == EOS_DRAWN).all()
    often = n * np.exp(log_p) >= 5
    counts, p = np.bincount(drawn, minlength=264), np.exp(log_p)
    observed, expected = (np.append(x[often], x[~often].sum()) for x in (counts, n * p))
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    assert ((observed - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


# ---- the marker


@pytest.mark.parametrize("pattern", ["<image_start>", "aab", "abab", "aabaa", "a"])
def test_marker_states_against_search(pattern):
    rng = np.random.default_rng(len(pattern))
    letters = list(dict.fromkeys(pattern)) + ["z"]
    pieces = [pattern[i:j] for i in range(len(pattern)) for j in range(i + 1, len(pattern) + 1)]
    tokens = [
        *("".join(rng.choice(letters, rng.integers(1, 5))).encode() for _ in range(20)),
        *(piece.encode() for piece in rng.choice(pieces, 20)),
        b"",
        "é".encode(),
        b"\xff" + pattern[-1:].encode(),
    ]
    marker = rollout.Marker.build(tokens, len(tokens) + 2, pattern)
    assert marker.table.shape == (len(pattern) + 1, len(tokens) + 2)
    hits = 0
    for _ in range(300):
        state, stream = 0, b""
        for token in rng.integers(0, len(tokens) + 2, 12):
            stream += tokens[token] if token < len(tokens) else b""
            state = marker.table[state, token]
            if pattern.encode() in stream:
                expected = len(pattern)
            else:
                expected = max(
                    n for n in range(len(pattern)) if stream.endswith(pattern.encode()[:n])
                )
            assert state == expected
        hits += expected == len(pattern)
    assert 0 < hits
    same = rollout.Marker.build(tokens, len(tokens) + 2, pattern)
    other = rollout.Marker.build(tokens[::-1], len(tokens) + 2, pattern)
    assert marker == same and hash(marker) == hash(same) and marker != other


def test_a_marker_of_more_tokens_than_embeddings():
    """Tokens that the model cannot read would otherwise be left out without a word."""
    tokens = [bytes([n]) for n in range(100)]
    assert rollout.Marker.build(tokens, 100).table.shape[1] == 100
    assert rollout.Marker.build(tokens, 128).table.shape[1] == 128  # padded, as in the release
    with pytest.raises(ValueError, match=r"ids up to 99, but the model has 99 embeddings"):
        rollout.Marker.build(tokens, 99)


def qwen_like():
    """A byte-level BPE with Qwen's split rule: tokens merge across both edges of the marker."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=64, special_tokens=list(DELIMITERS.values()), show_progress=False
        ),
    )
    vocabulary = backend.get_vocab()
    return Tokenizer(backend, **{name: vocabulary[token] for name, token in DELIMITERS.items()})


@pytest.fixture(scope="module")
def chain():
    """One model that is CHAINS different Markov chains, by what the prompt says.

    The residual stream is one-hot: [token | chain]. Attention is uniform and moves the chain's
    number from the prompt to every position; the MLPs are off. So logits = A[token] + w B[chain],
    A and B random, A bent towards the bigrams of TEXTS: greedy completions are full of markers,
    half markers and ends of turn. Every piece of text is in the vocabulary COPIES times, so that
    chains are long before they repeat.
    """
    tokenizer, rng = qwen_like(), np.random.default_rng(2)
    spelled, eos = list(tokenizer.token_bytes), tokenizer.eos
    pieces = [
        n
        for n, data in enumerate(spelled)
        if len(data) > 1 and any(data.decode() in text for text in TEXTS)
    ]
    copies = np.array(
        [pieces]
        + [
            [len(spelled) + i * len(pieces) + n for n in range(len(pieces))]
            for i in range(COPIES - 1)
        ]
    )  # [copy, piece]
    spelled += [spelled[n] for n in pieces] * (COPIES - 1)
    known = len(spelled)
    size = (
        known + CHAINS + 3
    )  # prompts name their chain with ids that spell nothing; three rows are padding
    width = (size + CHAINS + 3) // 4 * 4
    model = dataclasses.replace(
        tiny.MODEL,
        llm=LLMConfig(
            vocab_size=size,
            hidden_size=width,
            num_layers=1,
            num_heads=4,
            num_kv_heads=4,
            intermediate_size=8,
            head_dim=CHAINS // 4,
        ),
    )
    numbers, chains = np.arange(CHAINS), np.zeros((CHAINS, width), np.float32)
    chains[numbers, size + numbers] = 1
    params = jax.tree.map(np.array, tiny.params(model))
    params["llm"]["embed"] = np.eye(size, width, dtype=np.float32)
    params["llm"]["embed"][known : known + CHAINS] = chains
    layer = params["llm"]["layers"]["und"]
    for name, value in layer.items():
        layer[name] = np.ones_like(value) if "norm" in name else np.zeros_like(value)
    layer["v_kernel"], layer["o_kernel"] = chains.T[None], chains[None]

    a, b = rng.normal(size=(size, size)), rng.normal(size=(CHAINS, size))
    allowed = np.zeros(size, bool)
    allowed[[eos, size - 1, *copies.ravel()]] = True
    a[:, ~allowed] -= 20
    encoded = [tokenizer.encode(text).tolist() for text in TEXTS]
    bigrams = {pair for ids in encoded for pair in zip(ids, ids[1:])}
    same = {n: copies[:, i] for i, n in enumerate(pieces)}
    for before, after in bigrams:
        if before in same and after in same:
            a[np.ix_(same[before], same[after])] += 3
    for n in pieces:
        if b">" in spelled[n]:
            a[same[n], eos] += 3.5
    a[eos, eos] += 50  # what is sampled after an injected eos must be ignored
    params["llm"]["head"] = np.zeros((width, size), np.float32)
    params["llm"]["head"][:size], params["llm"]["head"][size : size + CHAINS] = a, b * 0.4
    params["llm"]["norm"] = np.ones(width, np.float32)

    blocks = [
        blocks_lib.student(
            tokenizer,
            blocks_lib.Prompts(system=""),
            np.array([known + n] * (1 + n % 3)),
            tiny.image(rng, (1 + n % 2, 1)),
        )
        for n in range(CHAINS)
    ]
    packed = context.pack(blocks, context.Sizes(9, 2), tokenizer=tokenizer, side=model.vit.side)
    config = rollout.RolloutConfig(
        model=model,
        bos=tokenizer.bos,
        eos=eos,
        greedy=True,
        marker=rollout.Marker.build(spelled, size),
    )
    return types.SimpleNamespace(spelled=spelled, params=params, context=packed, config=config)


def text_of(spelled, ids):
    return b"".join(spelled[n] for n in ids if n < len(spelled)).decode(errors="replace")


def official_loop(draw, config, spelled):
    """The sampling loop of the release in plain Python. draw(t): the token chosen after the t-th
    fed one.

    Returns (completion, fed, skips, whether eos was drawn last).
    """
    fed, rounds, skips, budget = [], [], 0, config.max_new_tokens
    while budget - len(fed) > 0:
        remaining = budget - len(fed)
        generated, token = [], config.bos
        while True:
            generated.append(token)
            fed.append(token)
            token = draw(len(fed) - 1)
            if token == config.eos or len(generated) >= remaining:
                break
        rounds.append(generated)
        if skips >= config.max_image_skips or len(generated) >= remaining or budget - len(fed) <= 1:
            break
        if blocks_lib.MARKER not in text_of(spelled, generated):
            break
        fed.append(config.eos)
        skips += 1
    completion = [n for generated in rounds for n in generated[1:]]
    return completion, fed, skips, token == config.eos


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "max_skips"), [(2, 1), (7, 2), (12, 0), (12, 1), (24, 5)])
def test_image_skips_equal_the_official_loop(chain, budget, max_skips):
    config = dataclasses.replace(chain.config, max_new_tokens=budget, max_image_skips=max_skips)
    key = jax.random.key(0)
    t, logits = rollout.sample(chain.params, chain.context, key, config=config, return_logits=True)
    t, greedy = numpy_of(t), np.argmax(logits, axis=-1)
    for row in range(CHAINS):
        completion, fed, skips, ended = official_loop(
            lambda n: int(greedy[row, n]), config, chain.spelled
        )
        assert t.fed[row, : t.num_fed[row]].tolist() == fed
        assert content(t, row) == completion
        assert t.num_skips[row] == skips
        assert t.stop[row] == (EOS_DRAWN if ended else BUDGET_SPENT)
    if budget == 24:  # the chains show what there is to see
        assert len({row.tobytes() for row in t.fed}) > 80
        assert min(collections.Counter(t.num_skips.tolist())[n] for n in range(4)) >= 3
        assert min(np.bincount(t.stop)) > 20
        texts = [text_of(chain.spelled, content(t, row)) for row in range(CHAINS)]
        assert sum("><image_start>" in text or "<image_start><" in text for text in texts) > 10


def test_a_banned_marker_is_never_completed(chain):
    config = dataclasses.replace(chain.config, max_new_tokens=24, max_image_skips=5)

    def draw(**settings):
        return numpy_of(
            rollout.sample(
                chain.params,
                chain.context,
                jax.random.key(0),
                config=dataclasses.replace(config, **settings),
                return_logits=True,
            )[0]
        )

    free, banned = draw(), draw(ban_marker=True)
    drew = np.array(
        [blocks_lib.MARKER in text_of(chain.spelled, content(free, row)) for row in range(CHAINS)]
    )
    assert 20 < drew.sum() < 90 and not banned.num_skips.any()
    for row in range(CHAINS):
        assert blocks_lib.MARKER not in text_of(chain.spelled, content(banned, row))
        assert (banned.fed[row].tolist() == free.fed[row].tolist()) == (not drew[row])


# ---- the program


def test_programs_are_reused(sampled):
    """One program a bucket: other values, another key or an equal marker compile nothing."""
    programs = rollout.sample._cache_size
    rng, marker = np.random.default_rng(8), sampled.config.marker

    def draw(positions, key):
        config = dataclasses.replace(
            sampled.config,
            greedy=True,
            marker=dataclasses.replace(marker, table=marker.table.copy()),
        )
        packed = tiny.pack(tiny.rows(rng, 6)[0], positions=positions, patches=9)
        rollout.sample(sampled.params, packed, jax.random.key(key), config=config)

    draw(28, 0)
    start = programs()
    for key in (1, 2):
        draw(28, key)
    assert programs() == start
    for key in (3, 4):
        draw(32, key)
    assert programs() == start + 1


def test_keys_differ_and_repeat(sampled):
    def draw(key):
        return np.asarray(
            rollout.sample(
                sampled.params,
                sampled.context,
                jax.random.key(key),
                config=sampled.config,
                return_logits=True,
            )[0].fed
        )

    np.testing.assert_array_equal(draw(11), sampled.trajectory.fed)
    assert (draw(12) != sampled.trajectory.fed).any(axis=1).sum() >= 4


def test_every_step_samples_afresh(sampled):
    """A model without preferences: tokens of a row differ from step to step, and from row to
    row.
    """
    params = {
        **sampled.params,
        "llm": {**sampled.params["llm"], "head": sampled.params["llm"]["head"] * 0},
    }
    key = jax.random.key(1)
    t, _ = rollout.sample(params, sampled.context, key, config=sampled.config, return_logits=True)
    t = numpy_of(t)
    np.testing.assert_allclose(t.logprobs[t.mask], -np.log(264), rtol=1e-5)
    drawn = t.tokens[t.mask]
    assert len(drawn) > 50 and len(set(drawn.tolist())) > 0.8 * len(drawn)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(max_new_tokens=1), "max_new_tokens is 1"),
        (dict(temperature=0.0), "set rollout.greedy"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(slots=3, shards=2), "rollout.slots 3 must be a multiple of the 2 batch shards"),
        (dict(slots=2, refill=3), "rollout.refill 3 at most that"),
        (dict(slots=-1), "rollout.slots is -1"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(max_image_skips=-1), "max_image_skips is -1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1e-40), r"in \[0.001, 1000\]"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny.rollout_config(**wrong)
