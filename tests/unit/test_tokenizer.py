"""Tokenizer folders in both released forms: loading, ids, bytes, and folders that are refused."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import rollout, tokenizer

# Qwen2.5's: its split rule, and the first eleven added tokens in their order (151643 to 151653
# there).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
CORPUS = [
    blocks_lib.SYSTEM_TRAINING,
    blocks_lib.INTRO,
    blocks_lib.TRANSITION,
    "<think>the red box is left of the blue "
    "box</think><image_start><image_end><think>so it is B</think>"
    "<answer>B</answer>",
] * 3

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "ünïcode façade ß",
    "汉字 и кириллица",
    "🦊👩‍👩‍👧 fox",
    "line\nline\r\n\n\n  indented\ttab",
    "<think>the red box</think><image_start>",
    "12345 it's I'LL we've",
    "\x00\x07 \u200d\u00a0",
    "Ġ Ċ ▁",
    "a <|im_end|><|im_start|> b<|vision_start|>",
    blocks_lib.SYSTEM_TRAINING,
    blocks_lib.SYSTEM_INFERENCE,
]


def added_token(content):
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def trained():
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return made


def write(folder, *, with_json, added=tuple(ADDED), first=None, made=None):
    """Writes the folder; `first` is the id that tokenizer_config.json gives to the first added
    token.
    """
    import tokenizers

    made = made or trained()
    folder.mkdir()
    made.model.save(str(folder))
    first = made.get_vocab_size() if first is None else first
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {
            str(first + n): added_token(token) for n, token in enumerate(added)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if with_json:
        made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
        made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["vocab and merges", "tokenizer.json"])
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokenizer") / "released", with_json=request.param)


@pytest.fixture(scope="module")
def tok(folder):
    return tokenizer.load(folder)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- ids and text ---------------------------------------------------------------------------------


def test_delimiters_by_name(tok):
    """They stand among the other added tokens as in Qwen2.5: 151644, 151645, 151652, 151653 of
    151643 + n.
    """
    plain = len(trained().get_vocab())
    assert 300 <= plain <= 600
    assert [tok.bos, tok.eos, tok.image_start, tok.image_end] == [plain + n for n in (1, 2, 9, 10)]
    for name, text in tokenizer.DELIMITERS.items():
        assert tok.encode(text).tolist() == [getattr(tok, name)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert ids.dtype == np.int32 and not ids.flags.writeable
    assert tok.decode(ids) == text
    assert b"".join(tok.token_bytes[n] for n in ids) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_plain_library(tok, text):
    """Nothing is added around the text, and the class that transformers picks splits as the trained
    one.
    """
    import tokenizers

    made = trained()
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in ADDED])
    assert tok.encode(text).tolist() == made.encode(text).ids


def test_text_is_composed_first(tok):
    """Qwen's normaliser; as in the official code. So a decomposed letter comes back as one
    character.
    """
    assert tok.decode(tok.encode("e\u0301")) == unicodedata.normalize("NFC", "e\u0301") == "\u00e9"


def test_decode_as_the_library_does(tok):
    rng = np.random.default_rng(0)
    for _ in range(300):  # most of them cut characters apart
        ids = rng.integers(0, len(tok.token_bytes), rng.integers(0, 12))
        assert tok.decode(ids) == tok.backend.decode(ids.tolist(), skip_special_tokens=False)


def test_ids_beyond_the_vocabulary(tok):
    size = len(tok.token_bytes)
    assert size == tok.image_end + 1
    a, b = (int(tok.encode(letter)[0]) for letter in "ab")
    assert tok.decode([a, size, 152_063, b, size + 1]) == f"a<|{size}|><|152063|>b<|{size + 1}|>"
    assert tok.decode(np.array([a, tok.eos], np.int32)) == "a<|im_end|>"
    assert tok.decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [0, -100]])
def test_negative_id(tok, ids):
    with pytest.raises(ValueError, match=f"token id {ids[-1]} is negative: cut padding"):
        tok.decode(ids)


def test_added_token_is_spelled_literally(tmp_path):
    """Not in the stand-ins of byte-level BPE, which have no space."""
    tok = tokenizer.load(write(tmp_path / "t", with_json=True, added=[*ADDED, "<|two words|>"]))
    (n,) = tok.encode("<|two words|>")
    assert tok.token_bytes[n] == b"<|two words|>" and tok.decode([n, n]) == "<|two words|>" * 2


def test_token_bytes_of_unused_ids(tmp_path):
    """A hole in vocab.json: it has no bytes, and shows as an id beyond the vocabulary does."""
    folder = write(tmp_path / "t", with_json=False, added=())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    top = len(vocabulary)
    vocabulary |= {token: top + 1 + n for n, token in enumerate(ADDED)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tok = tokenizer.load(folder)
    assert tok.bos == top + 2 and len(tok.token_bytes) == top + 1 + len(ADDED)
    assert tok.token_bytes[top] == b"" and tok.token_bytes[top + 2] == b"<|im_start|>"
    assert tok.decode([top, tok.bos]) == f"<|{top}|><|im_start|>"


# --- what tokenizer.json says is the truth --------------------------------------------------------

OTHER_TEXTS = [
    "It's 12345 words,  isn't it?",
    "\u0041\u030a \u212b caf\u00e9 CAFE\u0301",
    "a  b\n\n c",
    "GPT'S don't",
]


def other_tokenizers():
    """Byte-level tokenizers with other normalisers and split rules than Qwen2's."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    def change(normalizer=None, pre=None):
        made = trained()
        made.normalizer = normalizer
        if pre:
            made.pre_tokenizer = pre
        return made

    def bytes_of(**k):
        return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False} | k)

    return {
        "no normaliser": change(),
        "lower case": change(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        "GPT-2's rule": change(pre=bytes_of(use_regex=True)),
        "prefix space": change(pre=bytes_of(add_prefix_space=True)),
        "digits by three": change(
            pre=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(
                        tokenizers.Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"), "isolated"
                    ),
                    bytes_of(),
                ]
            )
        ),
    }


@pytest.mark.parametrize(
    "config_json", [None, {"model_type": "qwen2"}, {"model_type": "llama"}, {"model_type": "bagel"}]
)
@pytest.mark.parametrize(
    "named", ["Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", None]
)
@pytest.mark.parametrize(
    "kind", ["no normaliser", "lower case", "GPT-2's rule", "prefix space", "digits by three"]
)
def test_ids_are_those_of_tokenizer_json(tmp_path, kind, named, config_json):
    """Whatever tokenizer_class or a neighbouring config.json say: transformers 5 rebuilds the rules
    from them.
    """
    import tokenizers

    folder = write(tmp_path / "t", with_json=True, made=other_tokenizers()[kind])
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class=named))
    if config_json:
        (folder / "config.json").write_text(json.dumps(config_json))
    plain, tok = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
        tokenizer.load(folder),
    )
    for text in OTHER_TEXTS + TEXTS:
        assert tok.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids, text


LOSSY = {
    "no pre-tokenizer": (lambda made: made.update(pre_tokenizer=None), "text would be lost"),
    "another pre-tokenizer": (
        lambda made: made.update(
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "\u2581",
                "prepend_scheme": "always",
                "split": True,
            }
        ),
        "text would be lost",
    ),
    "whole words": (
        lambda made: made.update(
            model={"type": "WordLevel", "vocab": made["model"]["vocab"], "unk_token": "a"}
        ),
        "text would be lost",
    ),
    "dropout": (lambda made: made["model"].update(dropout=0.5), "has dropout 0.5.*set it to null"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_tokenizers_that_lose_text_are_refused(tmp_path, kind):
    """All bytes have tokens, but the rules never ask for them; or the ids are others each time."""
    change, message = LOSSY[kind]
    folder = write(tmp_path / "t", with_json=True)
    edit(folder / "tokenizer.json", change)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(folder)


def test_other_tokenizers_differ(tmp_path):
    """Or the test above would show nothing."""
    usual = [trained().encode(text).ids for text in OTHER_TEXTS]
    digest = tokenizer.load(write(tmp_path / "usual", with_json=True)).digest
    for kind, made in other_tokenizers().items():
        assert [made.encode(text).ids for text in OTHER_TEXTS] != usual, kind
        # the vocabulary is the same
        assert tokenizer.load(write(tmp_path / kind, with_json=True, made=made)).digest != digest, (
            kind
        )


def test_vocabulary_and_merges_as_qwen2_reads_them(tmp_path):
    """The same ids as transformers' class, and no other class is taken for it."""
    from transformers import Qwen2Tokenizer

    folder = write(tmp_path / "t", with_json=False)
    theirs, tok = Qwen2Tokenizer.from_pretrained(folder), tokenizer.load(folder)
    for text in OTHER_TEXTS + TEXTS:
        assert tok.encode(text).tolist() == theirs.encode(text, add_special_tokens=False), text
    edit(
        folder / "tokenizer_config.json",
        lambda config: config.update(tokenizer_class="GPT2Tokenizer"),
    )
    with pytest.raises(
        ValueError,
        match="tokenizer_class is 'GPT2Tokenizer' in tokenizer_config.json.*save it with a tok",
    ):
        tokenizer.load(folder)


@pytest.mark.parametrize("with_json", [False, True])
def test_ids_beyond_the_embedding(tmp_path, with_json):
    """Looking them up would read the last row, without a word."""
    folder = write(tmp_path / "t", with_json=with_json)
    largest = tokenizer.load(folder).image_end
    assert tokenizer.load(folder, vocab_size=largest + 1).image_end == largest
    with pytest.raises(
        ValueError,
        match=rf"has ids up to {largest} \('<\|vision_end\|>'\), but the model has {largest} "
        rf"embeddings .*set vocab_size to at least {largest + 1}",
    ):
        tokenizer.load(folder, vocab_size=largest)


# --- marker and prompts ---------------------------------------------------------------------------


def finds(marker, ids) -> bool:
    state = 0
    for n in ids:
        state = marker.table[state, n]
    return state == len(marker.table) - 1


def test_marker_across_merged_tokens(tok):
    alone = tok.encode(blocks_lib.MARKER).tolist()
    assert len(alone) > 1
    inside = tok.encode("<think>the red box</think><image_start><image_end>").tolist()
    spelled = [tok.token_bytes[n] for n in inside]
    assert b"><" in spelled and b"<" not in spelled[1:]  # so no token begins where the marker does
    runs = [inside[n : n + len(alone)] for n in range(len(inside))]
    assert alone not in runs
    marker = rollout.Marker.build(
        tok.token_bytes, 152_064 // 100
    )  # more rows than tokens, as released
    assert marker.table.shape == (len(blocks_lib.MARKER) + 1, 1520)
    assert finds(marker, alone) and finds(marker, inside) and finds(marker, [1519, *inside, 1519])
    for text in ("<image_start", "<image_ start>", "<image_end>", "image_start>", ""):
        assert not finds(marker, tok.encode(text)), text
    cut = list(itertools.accumulate(spelled)).index(b"<think>the red box</think><image_start><")
    assert not finds(marker, inside[:cut]) and finds(marker, inside[: cut + 1])


def test_system_prompts(tok):
    training = (
        "Let's think step by step to answer the question. "
        "For text-based thinking, enclose the process within <think> </think>, "
        "e.g. <think> thinking process here </think>. "
        "For visual thinking, enclose the content within <image_start> </image_end>, "
        "e.g. <image_start> thinking image here </image_end>. "
        "Finally conclude with the final answer wrapped in <answer></answer> tags, "
        "i.e. <answer> answer here </answer>."
    )
    inference = (
        "\nLet's think step by step to answer the question. "
        "For text-based thinking, enclose the process within <think> </think>, "
        "e.g. <think> thinking process here </think>. "
        "For visual thinking, enclose the content within <image_start> </image_end>, "
        "e.g. <image_start> thinking image here </image_end>. "
        "Finally conclude with the final answer wrapped in <answer></answer> tags, "
        "i.e.<answer> answer here </answer>.\n"
    )
    assert blocks_lib.SYSTEM_TRAINING == training and blocks_lib.SYSTEM_INFERENCE == inference
    seen, shown = tok.encode(training).tolist(), tok.encode(inference).tolist()
    assert tok.decode(seen) == training and tok.decode(shown) == inference
    inner = tok.encode(inference.strip()).tolist()
    assert seen != shown and seen != inner  # the outer newlines are not all of it


# --- loading --------------------------------------------------------------------------------------


def test_without_torch_and_network(tmp_path):
    """In a fresh process that may ask the hub, but whose every connection fails."""
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("it opens a connection")
socket.socket.connect = socket.getaddrinfo = refuse
from opsd_jax import tokenizer
assert "transformers" not in sys.modules
tok = tokenizer.load(sys.argv[1])
assert tok.decode(tok.encode("to be")) == "to be"
assert "torch" not in sys.modules and "jax" not in sys.modules
"""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    folder = write(tmp_path / "t", with_json=False)
    root = pathlib.Path(tokenizer.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_beside_a_model(folder, tmp_path):
    """The released folder holds the model's configs too, of a type that transformers does not
    know.
    """
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bagel", "architectures": ["Bagel"]})
    )
    assert tokenizer.load(str(tmp_path)).decode([5, 6]) == tokenizer.load(folder).decode([5, 6])


def test_saved_again_by_transformers(tok, tmp_path):
    """Such a folder has no added_tokens_decoder and no vocab.json any more."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tok.backend).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    again = tokenizer.load(tmp_path)
    assert again.token_bytes == tok.token_bytes and again.image_end == tok.image_end


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    folder = write(tmp_path / "t", with_json=True)
    whole = tokenizer.load(folder).encode("the red box").tolist()
    edit(
        folder / "tokenizer.json",
        lambda content: content.update(
            truncation={
                "direction": "Right",
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            padding={
                "strategy": {"Fixed": 50},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            },
        ),
    )
    found = tokenizer.load(folder).encode("the red box").tolist()
    assert found == whole and 1 < len(whole) < 50


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize("absent", [["<|vision_start|>", "<|vision_end|>"], ["<|im_end|>"]])
def test_absent_delimiters(tmp_path, absent, with_json):
    folder = write(
        tmp_path / "t", with_json=with_json, added=[token for token in ADDED if token not in absent]
    )
    edit(
        folder / "tokenizer_config.json", lambda config: config.update(additional_special_tokens=[])
    )
    with pytest.raises(
        ValueError, match=r"t lacks .*: use the folder released with the model"
    ) as e:
        tokenizer.load(folder)
    assert str(absent) in str(e.value)


@pytest.mark.parametrize("removed", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"]])
def test_no_vocabulary(tmp_path, removed):
    folder = write(tmp_path / "t", with_json=False)
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=f"{folder} has no vocabulary: copy its tokenizer.json there, or both",
    ):
        tokenizer.load(folder)


@pytest.mark.parametrize("missing", ["folder", "tokenizer_config.json"])
def test_no_tokenizer(tmp_path, missing):
    folder = tmp_path / "t"
    if missing != "folder":
        write(folder, with_json=True)
        (folder / missing).unlink()
    fault = ": there is no such folder" if missing == "folder" else r" holds no tokenizer \(no"
    with pytest.raises(FileNotFoundError, match=f"{folder}{fault}.*--config.tokenizer=FOLDER"):
        tokenizer.load(folder)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "<html>"),
        ("tokenizer_config.json", "{"),
        ("vocab.json", '{"a": 0'),
        ("merges.txt", "three words here\n"),
        ("vocab.json", '{"a": 0}'),
    ],
)
def test_files_that_do_not_parse(tmp_path, name, content):
    folder = write(tmp_path / "t", with_json=name == "tokenizer.json")
    (folder / name).write_text(content)
    with pytest.raises(
        ValueError, match=f"cannot read the tokenizer in {folder} .*copy the folder"
    ):
        tokenizer.load(folder)


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize(
    "added",
    [["<|im_start|>"], {"x": {"content": "a"}}, {"5": "a"}, {"5": {"content": None}}, {"5": {}}, 3],
)
def test_added_tokens_that_are_malformed(tmp_path, added, with_json):
    folder = write(tmp_path / "t", with_json=with_json)
    edit(folder / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=added))
    with pytest.raises(
        ValueError,
        match=f"{folder} .tokenizer_config.json: added_tokens_decoder is .*copy the folder",
    ):
        tokenizer.load(folder)


def test_token_that_is_no_bytes(tmp_path):
    folder = write(tmp_path / "t", with_json=True)
    edit(
        folder / "tokenizer.json",
        lambda content: content["model"]["vocab"].update(
            {"\u2581x": content["model"]["vocab"].pop(next(reversed(content["model"]["vocab"])))}
        ),
    )
    edit(folder / "tokenizer.json", lambda content: content["model"].update(merges=[]))
    with pytest.raises(
        ValueError,
        match="does not spell its token '\u2581x' in bytes: use a tokenizer of byte-level BPE",
    ):
        tokenizer.load(folder)


def test_ids_that_contradict_the_config(tmp_path):
    """The config of a larger model beside a smaller vocabulary: transformers numbers the added
    tokens anew.
    """
    first = trained().get_vocab_size()
    for with_json in (False, True):
        folder = write(tmp_path / str(with_json), with_json=with_json, first=first + 10)
        said = (
            rf"gives <\|endoftext\|> the id {first}, but its tokenizer_config.json "
            rf"{first + 10}: .*copy the folder"
        )
        with pytest.raises(ValueError, match=said):
            tokenizer.load(folder)


def test_not_byte_level(tmp_path):
    """Without a token for every byte the encoder would leave letters out."""
    import tokenizers
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(tokenizer.DELIMITERS.values())
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has no token for some bytes.*byte-level BPE"):
        tokenizer.load(tmp_path)


def test_bytes_that_no_ordinary_text_has(tmp_path):
    """SmolLM2's vocabulary has no token for some of them. A text with one is refused."""
    import json

    folder = write(tmp_path / "a", with_json=True)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]
    alphabet = tokenizer._byte_alphabet()
    for byte in (0x04, 0xF1):
        vocabulary[alphabet[byte] * 40] = vocabulary.pop(alphabet[byte])
    path.write_text(json.dumps(stored), encoding="utf-8")
    tok = tokenizer.load(folder)
    assert tok.lacking == {0x04, 0xF1} and tok.decode(tok.encode("a b")) == "a b"
    with pytest.raises(
        ValueError, match=r"no token for the byte 0x04 in the text \"a\\u0004b\": rem"
    ):
        tok.encode("a\x04b")
    vocabulary["aaaaaaaaaaaaaa"] = vocabulary.pop(alphabet[0xF3])
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ValueError, match="has no token for some bytes"):
        tokenizer.load(folder)


def test_digest_tells_vocabularies_apart(folder, tok):
    """The same folder again, and its other form, are the same tokenizer; swapped tokens or
    delimiters are not.
    """
    assert tokenizer.load(folder).digest == tok.digest
    other = tokenizer.load(folder)
    other.token_bytes[5], other.token_bytes[6] = other.token_bytes[6], other.token_bytes[5]
    joined = tokenizer.load(folder)  # b"ab", b"c" and b"a", b"bc"
    joined.token_bytes[5:7] = [
        joined.token_bytes[5] + joined.token_bytes[6][:1],
        joined.token_bytes[6][1:],
    ]
    delimiter = dataclasses.replace(tok, eos=tok.bos)
    assert len({t.digest for t in (tok, other, joined, delimiter)}) == 4


def test_digest_tells_merges_apart(tmp_path):
    """The same tokens, joined in another order: some texts get other ids."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = {char: n for n, char in enumerate(tokenizer._byte_alphabet().values())}
    for token in ("ab", "bc", *tokenizer.DELIMITERS.values()):
        vocabulary[token] = len(vocabulary)
    digests, ids = [], []
    for n, merges in enumerate(([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")])):
        made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.add_special_tokens(list(tokenizer.DELIMITERS.values()))
        folder = tmp_path / str(n)
        folder.mkdir()
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text("{}")
        loaded = tokenizer.load(str(folder))
        digests.append(loaded.digest)
        ids.append(loaded.encode("abc").tolist())
    assert ids[0] != ids[1] and digests[0] != digests[1]


# --- tokenizers of models that read text alone ---------------------------------------------------


def test_delimiters_of_images_may_be_absent(tmp_path):
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder = write(tmp_path / "t", with_json=True, added=added)
    found = tokenizer.load(folder, images=False)
    assert (found.image_start, found.image_end) == (-1, -1) and found.bos + 1 == found.eos
    with pytest.raises(ValueError, match="vision_start"):
        tokenizer.load(folder)


@pytest.mark.parametrize(
    ("named", "wanted"), [(None, ()), (0, (0,)), ([3, "eos", 5, 3], (3, 5)), ("eos", ())]
)
def test_further_ends(tmp_path, named, wanted):
    """generation_config.json names one id or a list; eos is not a further one."""
    folder = write(tmp_path / "t", with_json=True)
    assert tokenizer.load(folder).further_ends == ()
    eos = tokenizer.load(folder).eos
    ids = [eos if n == "eos" else n for n in named] if isinstance(named, list) else named
    ids = eos if named == "eos" else ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert tokenizer.load(folder).further_ends == wanted


@pytest.mark.parametrize("wrong", ["<|im_end|>", [1, 300], [-1], [True]])
def test_ends_that_are_no_ids(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is"):
        tokenizer.end_tokens(tmp_path, 300)
