"""Diagnoses: divergences against full logits, attention shares against a dense softmax, intervals,
the commands.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import browser
import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import context, distill
from opsd_jax.data import examples, randomness
from opsd_jax.diagnose import __main__ as command
from opsd_jax.diagnose import attention as looks
from opsd_jax.diagnose import interventions, kl, official, selection
from opsd_jax.diagnose.bootstrap import bootstrap
from opsd_jax.evaluation import contexts, html, reference_kl
from opsd_jax.model import attention, bagel, masks, mot
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import session
from tiny import MODEL, TOKENIZER

LAST = f"{small_run.LAST:06d}"
QUERIES, KEYS = len(looks.QUERIES), len(looks.KEYS)

pytestmark = pytest.mark.usefixtures("fast_compiles")


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_kl(teacher_logits, student_logits):
    """KL(teacher || student) of each row."""
    t, s = log_softmax(teacher_logits), log_softmax(student_logits)
    return (np.exp(t) * (t - s)).sum(-1)


# --- attention ------------------------------------------------------------------------------------


def numpy_shares(q, k, seen, queries, keys, scale):
    """Sums over groups of the head-averaged weights, slot by slot in float64: [B, M, K]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    heads, kv_heads = q.shape[2], k.shape[2]
    found = np.zeros((len(q), queries.max(), keys.max()))
    for b in range(len(q)):
        for t in np.flatnonzero(queries[b]):
            for head in range(heads):
                scores = k[b, :, head // (heads // kv_heads)] @ q[b, t, head] * scale
                weights = np.where(seen[b, t], np.exp(scores - scores[seen[b, t]].max()), 0)
                weights /= weights.sum()
                for s in np.flatnonzero(keys[b]):
                    found[b, queries[b, t] - 1, keys[b, s] - 1] += weights[s] / heads
    return found


@pytest.mark.parametrize("block", [0, 1, 3, 4, 7, 20])
def test_shares_of_random_queries_and_keys(block):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 7, heads, 8), np.float32) for heads in (4, 2))
    limit = rng.integers(1, 8, (2, 7)).astype(np.int32)
    segment = np.ones((2, 7), np.int32)
    queries, keys = rng.integers(0, 3, (2, 7)), rng.integers(0, 4, (2, 7))
    seen = np.arange(7) < limit[:, :, None]

    def hot(numbers, count):
        return jax.nn.one_hot(numbers - 1, count)

    for scale in (8**-0.5, 1.0):
        found = attention.shares(
            q,
            k,
            masks.Mask(limit, segment, segment),
            attention.Groups(hot(queries, 2), hot(keys, 3), jnp.float32(scale)),
            block,
        )
        np.testing.assert_allclose(found, numpy_shares(q, k, seen, queries, keys, scale), atol=1e-5)


def sequence(batch):
    """The teachers' contexts of a batch, embedded: (x, positions, limit, segment)."""
    c = batch.teacher
    return (
        jax.jit(functools.partial(bagel.embed, config=MODEL))(tiny.params(), c),
        c.rope_positions,
        c.limit,
        c.segment,
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_shares_in_a_model(scaled):
    """The first layer's, from its own q and k; the second one's sum to the number of queries."""
    rng = np.random.default_rng(1)
    params, (x, positions, limit, segment) = tiny.params(), sequence(tiny.batch(rng, 2))
    used = segment > 0
    queries, keys = (
        np.where(used, rng.integers(low, n + 1, used.shape), 0).astype(np.int32)
        for low, n in ((0, 2), (1, 3))
    )
    scale = MODEL.llm.head_dim**-0.5 if scaled else 1.0
    groups = attention.Groups(
        jax.nn.one_hot(queries - 1, 2), jax.nn.one_hot(keys - 1, 3), jnp.float32(scale)
    )
    config = dataclasses.replace(MODEL, query_block=20)
    inputs = bagel.Embedded(x, positions, masks.Mask(limit, segment, segment))
    found = jax.jit(functools.partial(bagel.attention_shares, config=config))(
        params, inputs, groups
    )
    assert found.shape == (2, 2, 2, 3)

    first = jax.tree.map(lambda leaf: leaf[0], params["llm"]["layers"]["und"])
    q, k, _ = mot.Expert(MODEL.llm).apply({"params": first}, x, method="qkv")
    rope = attention.rope_tables(positions, MODEL.llm.head_dim, MODEL.llm.rope_theta)
    seen = np.asarray(masks.visible(masks.Mask(limit, segment, segment)))
    expected = numpy_shares(
        attention.rotate(q, rope),
        attention.rotate(k, rope),
        seen,
        queries,
        keys,
        scale,
    )
    np.testing.assert_allclose(found[0], expected, atol=2e-4)
    counts = np.stack([(queries == n).sum(axis=1) for n in (1, 2)], axis=1)
    np.testing.assert_allclose(found.sum(axis=-1), np.broadcast_to(counts, (2, 2, 2)), rtol=1e-5)


def test_recording_leaves_the_model_alone():
    rng = np.random.default_rng(2)
    params, (x, positions, limit, segment) = tiny.params(), sequence(tiny.batch(rng, 2))
    mask = masks.Mask(limit, segment, segment)
    apply = jax.jit(
        functools.partial(mot.Decoder(MODEL).apply, {"params": params["llm"]}, x, positions, mask)
    )
    groups = attention.Groups(*(jax.nn.one_hot(segment - 1, 1),) * 2, jnp.float32(1))
    plain, recorded = apply(), apply(groups=groups)
    assert len(plain) == 2 and len(recorded) == 3
    np.testing.assert_allclose(plain[0], recorded[0], atol=1e-5)


def test_groups_of_positions():
    """Slot by slot: system prompt 1, problem image 2, question 3, intro 4, visual thoughts 5,
    transition 6, text 7, delimiters 8; queries 1 before, 2 after.
    """
    rng, usual = np.random.default_rng(0), blocks_lib.BlockNames()
    problem, thought = tiny.image(rng, (1, 2)), tiny.image(rng, (1, 1))

    def names(blocks, layout, own=usual):
        return [x.tolist() for x in looks.groups(own, blocks, layout)]

    abc = blocks_lib.Prompts("a", "bc", "d")

    def named(role, thoughts=(), prompts=abc, own=usual, **further):
        content = {"image": (problem,), "question": TOKENIZER.encode("q"), **further}
        content["visual_thoughts"] = thoughts
        return blocks_lib.named_blocks(TOKENIZER, prompts, getattr(own, role), content)

    teacher = named("teacher", [thought, thought])
    keys = [1] * 3 + [8, 2, 2, 8] + [3] * 3 + [4] * 4 + [8, 5, 8] * 2 + [6] * 3
    assert names(teacher, "teacher") == [[0] * 7 + [1] * 7 + [0] * 6 + [2] * 3, keys]
    assert names(named("student"), "student") == [[0] * 7 + [1] * 3, keys[:10]]
    removed = named("teacher")
    assert names(removed, "teacher") == [[0] * 7 + [1] * 7 + [2] * 3, keys[:14] + keys[20:]]
    # A privileged text counts with the visual thoughts, a degraded image as the problem image.
    own = blocks_lib.BlockNames(("image@blur", "question"), ("image@blur", "text:x", "question"))
    further = {"text:x": TOKENIZER.encode("ab"), "image@blur": (problem,)}
    told = named("teacher", own=own, **further)
    keys_of_text = [8, 2, 2, 8] + [5] * 4 + [3] * 3
    assert names(told, "teacher", own) == [[0] * 8 + [2] * 3, keys_of_text]
    blocks = named("student", prompts=blocks_lib.Prompts("", "", ""))
    trace = [blocks_lib.Text(np.array([5])), thought, blocks_lib.Text(np.array([6, 7]))]
    blocks += [("trace", block) for block in trace]
    assert names(blocks, "interleaved") == [
        [0] * 7 + [1] * 3 + [0] * 3 + [2] * 4,
        [8, 2, 2, 8] + [3] * 3 + [7] * 3 + [8, 5, 8] + [7] * 4,
    ]


def test_shares_are_means_over_the_queries_of_a_group():
    """With completions after contexts of different lengths; a group without queries is NaN."""
    rng = np.random.default_rng(3)
    batch, tokens = tiny.batch(rng, 2), rng.integers(0, 256, (2, 5)).astype(np.int32)
    c = batch.teacher
    queries, keys = (np.zeros((2, c.padded_length + 5), np.int32) for _ in range(2))
    keys[:, : c.padded_length], keys[:, c.padded_length :] = c.segment, 7
    queries[0, c.padded_length : c.padded_length + 3] = queries[1, c.padded_length :] = 3
    queries[0, 1] = 1
    found = looks.attention_shares(tiny.params(), c, tokens, queries, keys, config=MODEL)
    assert found.shape == (2, MODEL.llm.num_layers, QUERIES, KEYS)
    np.testing.assert_allclose(found[:, :, 2].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[0, :, 0].sum(-1), 1, rtol=1e-5)
    assert np.all(np.isnan(found[:, :, 1])) and np.all(np.isnan(found[1, :, 0]))
    assert np.all(found[:, :, 2, 6] > 0) and np.all(found[:, :, 2, 1:6] == 0)
    mean = looks.mean_over_examples({"a": np.asarray(found[:1]), "b": np.asarray(found[1:])})
    np.testing.assert_allclose(mean[:, 2], np.asarray(found)[:, :, 2].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(mean[:, 0], found[0, :, 0], rtol=1e-5)
    assert list(looks.named(mean)) == ["text before", "completion"]


# --- divergences ----------------------------------------------------------------------------------


def test_ends_are_aligned():
    """4 scored rows against 3, then 2 against 2 without a common end."""

    def side(rows, labels, counts):
        return context.Supervised(
            None, np.array(rows), np.array(labels), np.arange(4) < np.array(counts)[:, None]
        )

    teacher = side([[2, 3, 4, 5], [7, 8, 0, 0]], [[10, 11, 12, 13], [20, 21, 0, 0]], [4, 2])
    student = side([[1, 2, 3, 0], [5, 6, 0, 0]], [[11, 9, 13, 0], [20, 22, 0, 0]], [3, 2])
    pairs = official.align_ends(teacher, student)
    of_teacher, of_student, labels, mask, tail = dataclasses.astuple(pairs)
    assert of_teacher.tolist() == [[3, 4, 5, 0], [7, 8, 0, 0]] and of_student.tolist() == [
        [1, 2, 3, 0],
        [5, 6, 0, 0],
    ]
    assert labels.tolist() == [[11, 9, 13, 0], [20, 22, 0, 0]] and mask.sum(axis=1).tolist() == [
        3,
        2,
    ]
    assert tail.tolist() == [1, 0]
    assert official.align_ends(teacher, teacher).tail.tolist() == [4, 2]


BOS, EOS, START, END = TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.image_start, TOKENIZER.image_end
PATCH = -1
# thoughts, text-only thought, answer -> tokens of the teacher and of the student after [image]
# [question]
OFFICIAL = {
    "as released": (
        (("ab", "c"), "xy", "d"),
        [BOS, 97, 98, EOS, START, PATCH, PATCH, END, BOS, 99, EOS, BOS, 100, EOS],
        [BOS, 120, 121, EOS, BOS, 100, EOS],
    ),
    "raw: neither stripped nor tagged": (
        ((" a", "<think>"), "b\n", "1 "),
        [BOS, 32, 97, EOS, START, PATCH, PATCH, END, BOS, *b"<think>", EOS, BOS, 49, 32, EOS],
        [BOS, 98, 10, EOS, BOS, 49, 32, EOS],
    ),
    "no text-only thought": (
        (("ab", "c"), "", "d"),
        [BOS, 97, 98, EOS, START, PATCH, PATCH, END, BOS, 99, EOS, BOS, 100, EOS],
        [BOS, 97, 98, 32, 99, EOS, BOS, 100, EOS],
    ),
    "one thought": (
        (("ab",), "x", "d"),
        [BOS, 97, 98, EOS, START, PATCH, PATCH, END, BOS, 100, EOS],
        [BOS, 120, EOS, BOS, 100, EOS],
    ),
    "a third thought, which the script does not read": (
        (("a", "b", "c"), "x", "d"),
        [BOS, 97, EOS, START, PATCH, PATCH, END, BOS, 98, EOS, BOS, 100, EOS],
        [BOS, 120, EOS, BOS, 100, EOS],
    ),
}


def official_row(texts, rng):
    """(packer, row) with two visual thoughts, of which the script reads the first."""
    thoughts, text_only, answer = texts
    example = types.SimpleNamespace(
        thoughts=thoughts, answer=answer, full_text_only_thought=text_only, pid="p"
    )
    row = examples.PreparedExample(
        example=example,
        question=np.array([5, 6], np.int32),
        problems=(tiny.image(rng),),
        visual_thoughts=(tiny.image(rng, (1, 2)), tiny.image(rng)),
    )
    return types.SimpleNamespace(tokenizer=TOKENIZER, side=MODEL.vit.side), row


def one_by_one(blocks):
    """Tokens of a sequence, PATCH for each patch."""
    return [
        int(n)
        for block in blocks
        for n in (
            [START, *[PATCH] * len(block.patches), END]
            if isinstance(block, blocks_lib.Image)
            else [BOS, *block.ids, EOS]
        )
    ]


@pytest.mark.parametrize("case", OFFICIAL)
def test_blocks_of_the_official_script(case):
    """Worked out by hand from kl_diagnostic.py: build_sequence and compute_kl_for_sample."""
    texts, of_teacher, of_student = OFFICIAL[case]
    packer, row = official_row(texts, np.random.default_rng(4))
    ask = [START, PATCH, PATCH, PATCH, PATCH, END, BOS, 5, 6, EOS]
    teacher, student = official.official_blocks(packer, row)
    assert one_by_one(teacher) == ask + of_teacher and one_by_one(student) == ask + of_student
    for blocks, tokens in ((teacher, ask + of_teacher), (student, ask + of_student)):
        side = context.supervise(
            [blocks], context.Sizes(64, 8, 32), tokenizer=TOKENIZER, side=MODEL.vit.side
        )
        # scored: after the question, every text position but the eos that ends a block
        scored = [
            n
            for n, token in enumerate(tokens)
            if n >= len(ask) and token not in (PATCH, START, END, EOS)
        ]
        assert side.positions[0][side.mask[0]].tolist() == scored
        assert side.labels[0][side.mask[0]].tolist() == [tokens[n + 1] for n in scored]


def test_values_of_the_official_script():
    """From the logits of one full forward pass for each of the two sequences, packed and paired
    here by hand.
    """
    rng = np.random.default_rng(4)
    teacher, student = tiny.params(), tiny.params(seed=1)
    packer, row = official_row((("ab", "ca"), "xyca", "d"), rng)
    sides = [
        context.supervise(
            [blocks], context.Sizes(64, 8, 32), tokenizer=TOKENIZER, side=MODEL.vit.side
        )
        for blocks in official.official_blocks(packer, row)
    ]
    pairs = official.align_ends(*sides)
    of_teacher, of_student, labels, mask, tail = dataclasses.astuple(pairs)
    found = official.paired_kl(
        teacher, student, *(s.context for s in sides), of_teacher, of_student, config=MODEL
    )

    def text(text):
        return blocks_lib.Text(np.frombuffer(text.encode(), np.uint8).astype(np.int32))

    ask, shown = [*row.problems, blocks_lib.Text(row.question)], row.visual_thoughts[0]
    full_logits = jax.jit(lambda p, c: bagel.logits(p, bagel.read(p, c, config=MODEL)[0]))

    def every(params, blocks):
        return np.asarray(full_logits(params, tiny.pack([blocks], positions=64, patches=8))[0])

    # [image] 6, [question] 4, [ab] 4, [thought] 4, [ca] 4, [d] 3; and [image] 6, [question] 4,
    # [xyca] 6, [d] 3
    full = every(teacher, [*ask, text("ab"), shown, text("ca"), text("d")])
    teacher_logits = np.concatenate([full[10:13], full[18:21], full[22:24]])  # 8 positions
    full = every(student, [*ask, text("xyca"), text("d")])
    student_logits = np.concatenate([full[10:15], full[16:18]])  # 7
    expected = numpy_kl(teacher_logits[-7:], student_logits)
    assert mask.sum() == 7 and expected.max() > 0.1
    np.testing.assert_allclose(found[0][mask[0]], expected, rtol=1e-3, atol=1e-4)
    assert labels[0][mask[0]].tolist() == [*b"xyca", EOS, *b"d", EOS]
    assert tail[0] == len("ca") + 1 + len("d") + 1


def test_intervals_of_the_bootstrap():
    rng = np.random.default_rng(5)
    before = [rng.gamma(2, 1, 200), rng.gamma(2, 3, 100)]
    found = bootstrap(before, [x / 4 for x in before], seed=3)
    assert found == bootstrap(before, [x / 4 for x in before], seed=3)
    other = bootstrap(before, [x / 4 for x in before], seed=4)
    assert found["macro"]["before"] == other["macro"]["before"] and found["macro"] != other["macro"]
    # Paired: what is a quarter in each row is one in every resample.
    np.testing.assert_allclose(
        [found["macro"]["closure"], *found["samples"]["closure_95"]], 0.75, rtol=1e-12
    )
    means = [x.mean() for x in before]
    np.testing.assert_allclose([t["before"] for t in found["tasks"]], means)
    np.testing.assert_allclose(found["macro"]["before"], np.mean(means))
    np.testing.assert_allclose(found["samples"]["before"], np.concatenate(before).mean())
    assert [t["n"] for t in found["tasks"]] == [200, 100] and found["macro"]["n"] == 300
    low, high = found["tasks"][0]["before_95"]
    np.testing.assert_allclose((high - low) / 2, 1.96 * before[0].std() / 200**0.5, rtol=0.1)
    # Independent noise in both widens the closure's interval.
    noisy = bootstrap(before, [rng.permutation(x) / 4 for x in before])["macro"]
    assert noisy["closure_95"][0] < 0.75 - 0.02 and noisy["closure_95"][1] > 0.75 + 0.02
    nothing = bootstrap([np.zeros(3)], [np.zeros(3)])["macro"]
    assert nothing["closure"] is None and nothing["closure_95"] is None and nothing["before"] == 0
    rounding = bootstrap([np.full(3, 1e-9)], [np.full(3, 5e-3)])["macro"]
    assert rounding["closure"] is None and rounding["closure_95"] is None
    assert "after" not in bootstrap(before)["macro"]


def test_summary_of_divergences():
    """A mean over tokens, then over rows, then over tasks; the answer and the tail by
    themselves.
    """

    def record(task, before, after, tail):
        return {
            "task": task,
            "labels": [0] * len(before),
            "before": before,
            "after": after,
            "tail": tail,
            "answer": 1,
        }

    records = [
        record("a", [1, 3], [1, 1], 1),
        record("a", [5], [2], 1),
        record("b", [9, 9, 9], [3, 6, 9], 0),
    ]
    found = kl.summarise(records, ("a", "b"), seed=0)
    assert found["tasks"]["a"]["before"] == 3.5 and found["tasks"]["a"]["after"] == 1.5
    assert (
        found["macro"]["before"] == 6.25
        and found["macro"]["after"] == 3.75
        and found["macro"]["closure"] == 0.4
    )
    np.testing.assert_allclose(found["samples"]["before"], 16 / 3)
    assert found["tokens"] == 2 and found["spread"]["median"] == 5 and found["spread"]["max"] == 9
    assert found["tail"] is None  # task b has none
    assert kl.summarise(records[:2], ("a",), seed=0)["tail"]["macro"]["before"] == 4
    assert found["answer"]["tasks"]["b"] == found["tasks"]["b"] | {
        "after": 9,
        "after_95": [9, 9],
        "closure": 0,
        "closure_95": [0, 0],
    }


@pytest.mark.parametrize(
    "only_this, only_reference, p",
    [
        (1, 9, 22 / 1024),
        (9, 1, 22 / 1024),
        (0, 10, 2 / 1024),
        (5, 5, 1),
        (0, 0, 1),
        (3, 4, 1),
        (8, 2, 112 / 1024),
    ],
)
def test_pairs_are_compared(only_this, only_reference, p):
    hits = [True] * only_this + [False] * only_reference + [True, False]
    other = [False] * only_this + [True] * only_reference + [True, False]
    assert interventions.compare(hits, other) == {
        "only_this": only_this,
        "only_reference": only_reference,
        "p": p,
    }


def test_summary_of_interventions():
    def answers(*hits):
        return [{"hit": bool(hit)} for hit in hits]

    found = {
        "real": {"a": answers(1, 1, 0), "b": answers(1)},
        "noise": {"a": answers(0, 1, 1), "b": answers(0)},
        "none": {"a": answers(0, 0, 0), "b": answers(0)},
    }
    summary = interventions.summarise(found, ("a", "b"))
    assert summary["a"]["noise"]["against_real"] == {"only_this": 1, "only_reference": 1, "p": 1}
    assert summary["all"]["noise"]["against_real"] == {"only_this": 1, "only_reference": 2, "p": 1}
    assert summary["all"]["real"]["accuracy"] == 0.75 and summary["all"]["real"]["n"] == 4
    assert summary["all"]["real"]["against_none"] == {
        "only_this": 3,
        "only_reference": 0,
        "p": 0.25,
    }
    # Each pair once.
    assert "against_real" not in summary["all"]["real"]
    assert not [key for key in summary["b"]["none"] if key.startswith("against_")]
    low, high = summary["all"]["real"]["interval_95"]
    assert 0.30 < low < 0.31 and 0.95 < high < 0.96


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A copy of the finished run that the tests here share."""
    copy = tmp_path_factory.mktemp("diagnose") / "w"
    shutil.copytree(small_run.trained(tmp_path_factory), copy)
    return copy


def run(workdir, *arguments):
    """The folder of the results, and their summary."""
    before = set(os.listdir(workdir / "diagnose")) if (workdir / "diagnose").exists() else set()
    command.main([arguments[0], f"--workdir={workdir}", *arguments[1:]])
    (name,) = set(os.listdir(workdir / "diagnose")) - before
    return workdir / "diagnose" / name, json.loads(
        (workdir / "diagnose" / name / "summary.json").read_text()
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_page(folder, *texts):
    """Checks what every page has; returns it."""
    page = (folder / "report.html").read_text()
    for text in (*texts, "python -m opsd_jax.diagnose ", "<dt>seed</dt>"):
        assert text in page
    linked = set(re.findall(r'href="([^#"]+)"', page))
    assert all((folder / address).exists() for address in linked)
    anchors = set(re.findall(r'href="#(.+?)"', page))
    assert anchors and anchors <= set(re.findall(r'id="(.+?)"', page))
    words = re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert not re.search(r"\d[eE][-−+]\d|\bclosed\b|[{}]|visual thought 0", words)
    return page


def files_of(folder):
    """And nothing half-written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_kl_command(workdir):
    folder, summary = run(workdir, "kl", "--rows=10")
    assert folder.name == f"kl-{LAST}-random10"
    page = check_page(
        folder,
        "closure %",
        "shared end",
        "answer_span_avg_kl",
        "Closure on samples from before training (base)",
        "nats",
        "data:image/png",
    )
    assert files_of(folder) == ["report.html", "summary.json", "tokens.jsonl"]
    # The closure of the run's report comes first. With one task its row is the only one.
    body = page.partition("</nav>")[2]
    assert body.index("This is the closure of") < body.index("(base)") < body.index("(official)")
    assert list(summary["completions"]) == ["data", "base", "student", "official"]
    assert "mean of the tasks" not in page
    records = lines(folder / "tokens.jsonl")
    assert [summary[key].rsplit("/", 1)[1] for key in ("teacher", "base", "student")] == [
        str(small_run.WARMUP)
    ] * 2 + [str(small_run.LAST)]
    for kind in kl.COMPLETIONS:
        mine = [r for r in records if r["completion"] == kind]
        assert [r["index"] for r in mine] == randomness.subset(small_run.TEST_ROWS, 10, 0)
        by_task = summary["completions"][kind]["tasks"][small_run.TASK]
        for name in ("before", "after"):
            assert all(len(r[name]) == len(r["labels"]) == len(r["pieces"]) for r in mine)
            np.testing.assert_allclose(
                by_task[name], np.mean([np.mean(r[name]) for r in mine]), rtol=1e-9
            )
        np.testing.assert_allclose(
            by_task["closure"], 1 - by_task["after"] / by_task["before"], rtol=1e-9
        )

    # Token by token from full logits, each row alone, teacher and student as in training.
    opened = selection.open_run(str(workdir), rows=10)
    teacher, student = (
        opened.session.restore_params(str(workdir / "checkpoints" / str(step)))
        for step in (small_run.WARMUP, small_run.LAST)
    )
    logits = jax.jit(
        lambda params, c, fed: bagel.logits(
            params,
            distill.score(params, c, context.Completion(fed, None, None), config=opened.model),
        )
    )

    def context_of(r, mode):
        return opened.selection.packed(0, [r["index"]], mode)[1]

    for kind in ("base", "student", "data"):
        for r in [r for r in records if r["completion"] == kind][:3]:
            ids = r["labels"]
            if kind == "data":
                trace = opened.selection.packer.reference(opened.examples(0, r["index"])).tolist()
                assert ids == [*trace, opened.tokenizer.eos]
            fed = np.zeros((1, 40), np.int32)
            fed[0, : len(ids)] = opened.tokenizer.bos, *ids[:-1]
            of_teacher = logits(teacher, context_of(r, "real"), fed)[0, : len(ids)]
            for name, params in (("before", teacher), ("after", student)):
                expected = numpy_kl(
                    of_teacher, logits(params, context_of(r, "none"), fed)[0, : len(ids)]
                )
                np.testing.assert_allclose(r[name], expected, rtol=1e-3, atol=2e-5)

    # The released script's pairing of a row, each of its two sequences by itself, cut and paired by
    # hand.
    read = jax.jit(
        lambda params, c: bagel.logits(params, bagel.read(params, c, config=opened.model)[0])
    )
    for r in [r for r in records if r["completion"] == "official"][:2]:
        row = opened.examples(0, r["index"])
        e, text = row.example, lambda text: blocks_lib.Text(opened.tokenizer.encode(text))
        scored, sequences = (
            [],
            [
                [
                    row.problems[0],
                    text(e.question),
                    text(e.thoughts[0]),
                    row.visual_thoughts[0],
                    text(e.thoughts[1]),
                    text(e.answer),
                ],
                [row.problems[0], text(e.question), text(e.full_text_only_thought), text(e.answer)],
            ],
        )
        for params, blocks in zip((teacher, student), sequences):
            starts = np.cumsum([0] + [block.length for block in blocks])
            own = [
                n
                for start, block in zip(starts[2:], blocks[2:])
                if isinstance(block, blocks_lib.Text)
                for n in range(start, start + block.length - 1)
            ]
            packed = context.pack(
                [blocks],
                context.Sizes(96, 64),
                tokenizer=opened.tokenizer,
                side=opened.selection.packer.side,
            )
            scored.append(np.asarray(read(params, packed)[0])[own])
        n = min(map(len, scored))
        assert (
            r["answer"]
            == len(opened.tokenizer.encode(e.answer)) + 1
            <= r["tail"]
            <= n
            == len(r["after"])
        )
        np.testing.assert_allclose(
            r["after"], numpy_kl(scored[0][-n:], scored[1][-n:]), rtol=1e-3, atol=2e-5
        )

    # The same on the traces as training measured, over the same rows.
    theirs = reference_kl.reference_kl(teacher, student, opened.selection, config=opened.model)[
        small_run.TASK
    ]
    np.testing.assert_allclose(
        summary["completions"]["data"]["macro"]["after"], theirs["kl"], rtol=1e-5
    )


@pytest.mark.long
@pytest.mark.slow
def test_kl_of_chosen_completions(workdir):
    """Greedy completions end as sampled: with eos, or cut by the budget and then without.

    One model has no after.
    """
    folder, summary = run(
        workdir,
        "kl",
        "--rows=5",
        "--completions=base",
        "--temperature=0",
        "--batch_size=2",
        f"--student={workdir}/checkpoints/{small_run.WARMUP}",
    )
    assert folder.name == f"kl-{small_run.WARMUP:06d}-random5-base-temperature0"
    assert "after" not in summary["completions"]["base"]["macro"]
    predictions = lines(workdir / "eval" / f"{small_run.WARMUP:06d}-none" / "predictions.jsonl")
    opened = selection.open_run(str(workdir))
    for r, p in zip(
        lines(folder / "tokens.jsonl"),
        [predictions[n] for n in randomness.subset(small_run.TEST_ROWS, 5, 0)],
    ):
        ended = p["stop"] == "eos"
        assert (
            len(r["labels"]) == p["tokens"] + ended
            and (r["labels"][-1] == opened.tokenizer.eos) == ended
        )
        assert opened.tokenizer.decode(r["labels"][: p["tokens"]]) == p["prediction"]


@pytest.mark.slow
def test_interventions_command(workdir):
    folder, summary = run(workdir, "interventions", "--rows=8")
    assert folder.name == f"interventions-{LAST}-random8"
    page = check_page(folder, "McNemar", "Where the answers look", "visual thought 1")
    assert files_of(folder) == ["report.html", "summary.json"]
    pairs = re.findall(r'">(\w+)</a> against <a href="[^"]+">(\w+)</a>', page)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 7
    # Beside the problem each sample shows what real, noise and swap had.
    assert page.count("<img") == 8 * (1 + 3)
    assert summary["evaluations"] == {
        mode: f"{LAST}-{mode}-random8" for mode in interventions.MODES
    }
    for mode in ("none", "real"):  # what training's evaluation answered
        theirs = lines(workdir / "eval" / f"{LAST}-{mode}" / "predictions.jsonl")
        theirs = [theirs[n] for n in randomness.subset(small_run.TEST_ROWS, 8, 0)]
        assert (
            lines(workdir / "eval" / summary["evaluations"][mode] / "predictions.jsonl") == theirs
        )
        assert (
            summary["tasks"][small_run.TASK][mode]["accuracy"] == sum(p["hit"] for p in theirs) / 8
        )
    shares = summary["attention_of_the_answers"]
    for mode in interventions.MODES:
        np.testing.assert_allclose(sum(shares[mode].values()), 1, rtol=1e-5)
        assert (shares[mode]["visual thoughts"] > 0) == (mode in ("real", "noise", "swap"))
        assert (shares[mode]["transition"] > 0) == (mode != "none")


@pytest.fixture(scope="module")
def everything(workdir):
    """(folder and summary of `all`, modes that it asked again), in other batches than training."""
    asked = []

    class Predictor(contexts.ContextPredictor):
        def __call__(self, *batch):
            asked.append(self.mode)
            return super().__call__(*batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contexts, "ContextPredictor", Predictor)
        found = run(workdir, "all", "--batch_size=4")
    return *found, set(asked)


@pytest.mark.slow
def test_everything_on_one_page(workdir, everything):
    """With the answers of the weights that training started from: how it changed what true visual
    thoughts give. What training's evaluations have answered is not asked again.
    """
    folder, summary, asked = everything
    assert folder.name == f"all-{LAST}" and summary["analyses"] == [
        "kl",
        "interventions",
        "attention",
    ]
    assert asked == {"noise", "swap", "image", "remove"}
    start = f"{small_run.WARMUP:06d}"
    assert summary["evaluations"] == [f"{LAST}-{mode}" for mode in ("none", *contexts.CONTEXTS)] + [
        f"{start}-none",
        f"{start}-real",
    ]
    page = check_page(folder, "This is the closure of", "Interventions:", "Attention:")
    table = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    for name, label in (
        (f"{LAST}-real", "real"),
        (f"{LAST}-noise", "noise"),
        (f"{start}-real", "real, before training"),
        (f"{start}-none", "none, before training"),
    ):
        found = json.loads((workdir / "eval" / name / "summary.json").read_text())["benchmarks"][
            small_run.TASK
        ]
        link = html.link(label, f"../../eval/{name}/report.html")
        cells = next(
            cells
            for row in table
            if (cells := re.findall(r"<td[^>]*>(.*?)</td>", row)) and cells[0] == link
        )
        assert cells[2:5] == [
            html.fixed(100 * found["overall"], 1),
            str(small_run.TEST_ROWS),
            html.fixed(found["mean_output_tokens"], 1),
        ]
    assert files_of(folder) == [
        "attention/shares.npz",
        "attention/summary.json",
        "interventions/summary.json",
        "kl/summary.json",
        "kl/tokens.jsonl",
        "report.html",
        "summary.json",
    ]
    # The closure of the page is that of the run's report.
    (reported,) = json.loads((workdir / "eval" / f"{LAST}-kl" / "summary.json").read_text())[
        "tasks"
    ].values()
    found = json.loads((folder / "kl" / "summary.json").read_text())["completions"]["data"]
    np.testing.assert_allclose(
        [found["tasks"][small_run.TASK][key] for key in ("before", "after", "closure")],
        [reported[key] for key in ("before", "after", "closure")],
        rtol=1e-4,
    )


@browser.needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_everything(everything, tmp_path, width):
    page = everything[0] / "report.html"
    pixels = browser.screenshot(page, tmp_path, width, 3000)
    assert all(part.std() > 5 for part in np.array_split(pixels, 6))
    assert browser.scroll_width(page, tmp_path, width) == width


@pytest.mark.slow
def test_the_terminal_ends_with_the_page(workdir, capsys):
    folder, summary = run(workdir, "kl", "--rows=3", "--completions=data")
    *words, last = capsys.readouterr().out.splitlines()
    assert last == f"the page of {folder.name}: {folder}/report.html"
    closure = summary["completions"]["data"]["tasks"][small_run.TASK]["closure"]
    number = next(n for n, line in enumerate(words) if ", data: K " in line)
    assert words[number].startswith(f"{small_run.TASK}, data: K ")
    assert f" nats, closure {html.fixed(100 * closure, 1)} % (" in words[number]
    cautions = cautions_lib.of_run(str(workdir))
    assert cautions[0].startswith("These numbers mean little")
    assert words[number + 1] == cautions_lib.OF_THE_RUN
    assert words[number + 2 :] == [line.replace("`", "") for line in cautions]
    page = (folder / "report.html").read_text()
    assert page.count('<section class="cautions">') == 1 and f"<strong>{cautions[0]}" in page


@pytest.mark.slow
def test_attention_command(workdir):
    folder, summary = run(workdir, "attention", "--rows=8", "--batch_size=4")
    assert folder.name == f"attention-{LAST}-random8"
    check_page(folder, "Text before the visual thoughts", "txt1-&gt;img1", "share of attention, %")
    assert files_of(folder) == ["report.html", "shares.npz", "summary.json"]
    assert summary["scaled"] and set(summary["official"]) == {"real", "noise", "swap"}
    with np.load(folder / "shares.npz", allow_pickle=False) as arrays:
        arrays = {name: arrays[name] for name in arrays}
    layers = small_run.CHANGES["model.llm.num_layers"]
    assert {x.shape for x in arrays.values()} == {(8, layers, QUERIES, KEYS)} and len(arrays) == 6
    for name, x in arrays.items():
        there = [
            m
            for m, query in enumerate(looks.QUERIES)
            if query != "completion" or name.startswith("teacher")
        ]
        np.testing.assert_allclose(x[:, :, there].sum(axis=-1), 1, rtol=1e-5)
        assert np.all(np.isnan(x[:, :, 2])) == name.startswith("interleaved")
        assert np.all(
            x[:, :, 0, looks.KEYS.index("visual thoughts")] == 0
        )  # what comes later is not seen
        assert np.all(x[:, :, 1, looks.KEYS.index("visual thoughts")] > 0)
    real, noise = (arrays[f"interleaved/{mode}/{small_run.TASK}"] for mode in ("real", "noise"))
    np.testing.assert_allclose(real[:, :, 0], noise[:, :, 0], atol=1e-5)
    assert np.abs(real[:, :, 1] - noise[:, :, 1]).max() > 1e-4
    np.testing.assert_allclose(
        summary["official"]["real"]["txt1->img1"], real[:, :, 1, 4].mean(axis=0), rtol=1e-5
    )

    # One row from its own q and k: the first layer of the interleaved trace.
    opened = selection.open_run(str(workdir), rows=8)
    params = opened.session.restore_params(str(workdir / "checkpoints" / str(small_run.LAST)))
    row = opened.examples(0, opened.selection.numbers(0)[3])
    blocks = opened.selection.packer.named_blocks(row, "interleaved")
    c = opened.selection.packer.pack([row], "trace", -1, [[block for _, block in blocks]])
    x = bagel.embed(params, c, config=opened.model)
    first = jax.tree.map(lambda leaf: leaf[0], params["llm"]["layers"]["und"])
    q, k, _ = mot.Expert(opened.model.llm).apply({"params": first}, x, method="qkv")
    rope = attention.rope_tables(
        c.rope_positions, opened.model.llm.head_dim, opened.model.llm.rope_theta
    )

    def pad(numbers):
        return np.pad(numbers, (0, c.padded_length - len(numbers)))[None]

    queries, keys = map(pad, looks.groups(opened.selection.packer.names, blocks, "interleaved"))
    seen = np.asarray(masks.visible(masks.Mask(c.limit, c.segment, c.segment)))
    sums = numpy_shares(
        attention.rotate(q, rope),
        attention.rotate(k, rope),
        seen,
        queries,
        keys,
        opened.model.llm.head_dim**-0.5,
    )[0]
    for m in (0, 1):
        np.testing.assert_allclose(real[3, 0, m], sums[m] / (queries == m + 1).sum(), atol=1e-4)

    sharp = run(workdir, "attention", "--rows=8", "--official_scale")
    assert sharp[0].name == f"attention-{LAST}-random8-official-scale" and not sharp[1]["scaled"]
    assert "without 1/√d" in (sharp[0] / "report.html").read_text()
    assert sharp[1]["official"]["real"] != summary["official"]["real"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["kl", "--completions=base,mine"],
            "--completions=mine: choose from data, base, student, official",
        ),
        (["kl", "--temperature=-1"], "--temperature is -1.0: give a number in"),
        (["kl", "--rows=-1"], "--rows is -1: give a whole number in"),
        (
            ["attention", "--benchmarks=maze"],
            "--benchmarks=maze: this run has the tasks Chart_Refocus",
        ),
        (["interventions", "--split=dev"], "dev"),
        (["interventions", "--checkpoint={}/checkpoints/77"], "no such checkpoint"),
        (["kl", "--teacher=77"], "--teacher=77: there is no such folder; the run in"),
        (["kl", "--student={}/eval"], "/eval: no checkpoint there"),
    ],
)
def test_what_cannot_be_diagnosed(workdir, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command.main(
            [arguments[0], f"--workdir={workdir}", *(a.format(workdir) for a in arguments[1:])]
        )
    found = capsys.readouterr().err
    assert stopped.value.code == 1 and message in found and found.count("\n") == 1


@pytest.mark.long
@pytest.mark.slow
def test_names_and_missing_images(workdir, tmp_path, capsys, monkeypatch):
    folder, _ = run(workdir, "kl", "--rows=2", "--completions=data", "--name=mine")
    assert folder.name == "mine"
    with pytest.raises(SystemExit):
        command.main(["kl", f"--workdir={workdir}", "--name=mine"])
    assert "mine exists: choose another --name, or delete it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["kl", f"--workdir={tmp_path}"])
    assert "holds no run" in capsys.readouterr().err

    class Blind(examples.Examples):
        def __init__(self, *args):
            super().__init__(*args)
            self.sources = [
                [dataclasses.replace(s[n], visual_thoughts=()) for n in range(3)]
                for s in self.sources
            ]

    monkeypatch.setattr(session, "Examples", Blind)
    with pytest.raises(SystemExit):
        command.main(["attention", f"--workdir={workdir}", "--rows=3"])
    assert (
        f"none of the 3 examples of {small_run.TASK}, test, has visual thoughts"
        in capsys.readouterr().err
    )
