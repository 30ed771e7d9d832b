"""A released tokenizer folder: delimiters, `encode` and `decode`.

The delimiters are resolved by name, never by counting added tokens: transformers 5 no longer lists
them in `special_tokens_map`, so the official helper counts existing tokens as new.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, SupportsInt

import numpy as np
from jaxtyping import Int32

from opsd_jax import chat_template
from opsd_jax.chat_template import ChatTemplate
from opsd_jax.inputs import json_files, paths

if TYPE_CHECKING:
    import tokenizers

DELIMITERS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
}
# Bytes that ordinary text lacks: control characters, those that UTF-8 never has, and those of
# Unicode's planes without characters. SmolLM2's vocabulary lacks 21 of them.
_RARE = frozenset(
    {*range(32), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {*map(ord, "\t\n\r")}
)
# Qwen2's split rule. Each digit is a token of its own.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Larger ids mean a damaged file: the list of all tokens would not fit into memory.
_MOST = 1 << 24

# Cases in which tokenizers with the same tokens differ: contractions, digits, spaces, Unicode
# forms, scripts, case.
_PROBE = (
    "It's DON'T 12345 + 6.75%  \n\n\tx_y==Straße café cafe\u0301 \ufb01 Ⅷ 日本語 Привет 🙂 "
    "unbelievable <think>(A)</think>"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the library `tokenizers`, and the token ids of its four delimiters.

    bos, eos: the tokens before and after a text. In chat form, of a completion alone: the last
      token of the text with which the template begins the assistant's turn, and the token with
      which it ends the turn.
    image_start, image_end: -1 where the tokenizer of a model that reads text alone has none.
    further_ends: ids beside eos that its folder says an answer ends with.
    chat: the chat template; None in BAGEL's form.
    """

    backend: "tokenizers.Tokenizer"
    bos: int
    eos: int
    image_start: int
    image_end: int
    further_ends: tuple[int, ...] = ()
    chat: ChatTemplate | None = None

    @functools.cached_property
    def encode(self) -> Callable[[str], np.ndarray]:
        """A function from a text to its ids, int32 [n], without delimiters.

        It keeps the ids of recent texts, because prompts and questions recur in every example, and
        traces in every epoch. The arrays are read-only. ValueError for a text with a byte that is
        `lacking`.
        """

        @functools.lru_cache(maxsize=1 << 16)
        def encode(text: str) -> Int32[np.ndarray, " n"]:
            if self.lacking and (lost := self.lacking.intersection(text.encode())):
                raise ValueError(
                    f"the tokenizer has no token for the byte {min(lost):#04x} in the text "
                    f"{json_files.shown(text)}: remove the character"
                )
            ids = np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)
            ids.setflags(write=False)
            return ids

        return encode

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of token ids.

        Bytes that are not UTF-8, for example those of an incomplete character, become U+FFFD. Ids
        beyond the vocabulary are shown as <|id|>: the embedding is padded (to 152,064 rows in the
        released model), and sampling may return any of its rows.

        Args:
          ids: int [n].
        Raises:
          ValueError: a negative id.
        """
        known, parts = self.token_bytes, []
        for token in map(int, ids):
            if token < 0:
                raise ValueError(
                    f"token id {token} is negative: cut padding and ignored labels off before "
                    "decoding"
                )
            parts.append(token < len(known) and known[token] or b"<|%d|>" % token)
        return b"".join(parts).decode(errors="replace")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token by id, empty at an unused id.

        `decode` joins them, and `marker.Marker` searches them.
        """
        to_byte = {char: byte for byte, char in _byte_alphabet().items()}
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        vocabulary = self.backend.get_vocab()
        spelled = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            spelled[index] = (
                token.encode() if token in added else bytes(to_byte[char] for char in token)
            )
        return spelled

    @functools.cached_property
    def lacking(self) -> frozenset[int]:
        """The bytes without a token; only some that no ordinary text has (`_RARE`)."""
        vocabulary = self.backend.get_vocab()
        return frozenset(b for b, char in _byte_alphabet().items() if char not in vocabulary)

    @functools.cached_property
    def ordinary(self) -> Int32[np.ndarray, " n"]:
        """Ids of the tokens that text is made of, ascending, int32 [n].

        Delimiters, tags and other added tokens are not among them.
        """
        added = {*self.backend.get_added_tokens_decoder()}
        added |= {self.bos, self.eos, self.image_start, self.image_end}
        ids = sorted({*self.backend.get_vocab().values()} - added)
        return np.asarray(ids, np.int32)

    @functools.cached_property
    def digest(self) -> str:
        """Checksum of what ids mean and how text is split.

        It covers the bytes of every token, the merges, and the ids of the delimiters and of a text.
        It is the same in chat form: the chat template has a checksum of its own.
        A checksum of the file would not do, because its format differs between versions of the
        library.
        """
        found = hashlib.blake2b(digest_size=16)
        for token in self.token_bytes:
            found.update(len(token).to_bytes(4, "little") + token)
        merges = json.loads(self.backend.to_str())["model"].get("merges", [])
        # Older versions of the library store a merge as one string, newer ones as a pair.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        delimiters = [self.bos, self.eos, self.image_start, self.image_end]
        if self.chat:
            delimiters = [*_delimiters(self.backend.get_vocab()).values()]
        found.update(json.dumps([merges, delimiters, self.encode(_PROBE).tolist()]).encode())
        return found.hexdigest()


def _byte_alphabet() -> dict[int, str]:
    """The printable character that represents each byte in byte-level BPE.

    Printable Latin-1 characters represent themselves. The other bytes are mapped to U+0100 and up.
    """
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in keep]
    return {**{b: chr(b) for b in keep}, **{b: chr(256 + n) for n, b in enumerate(moved)}}


def check_there(directory: str | os.PathLike) -> list[str]:
    """The names of the files in a tokenizer folder.

    Raises:
      FileNotFoundError: the files that `load` reads do not exist.
    """
    files = os.listdir(directory) if os.path.isdir(directory) else []
    if "tokenizer_config.json" not in files:
        fault = " holds no tokenizer (no tokenizer_config.json)"
        if not os.path.isdir(directory):
            fault = f": {paths.absent(directory)}"
        raise FileNotFoundError(
            f"{directory}{fault}: give the folder of the "
            "released model's tokenizer as --config.tokenizer=FOLDER of a run, or as "
            "--tokenizer=FOLDER to ask a model. For a small model with random weights, "
            "`python -m opsd_jax.data make-mini --target=DIR --families=maze --train=1 "
            "--validation=0 --test=0` makes a small one in DIR/made/tokenizer"
        )
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
        raise FileNotFoundError(
            f"the tokenizer in {directory} has no vocabulary: copy its tokenizer.json there, or "
            "both vocab.json and merges.txt"
        )
    return files


def load(
    directory: str | os.PathLike,
    *,
    vocab_size: int | None = None,
    images: bool = True,
    form: str = "bagel",
    thinking: bool = False,
) -> Tokenizer:
    """Reads a tokenizer folder.

    The folder has tokenizer_config.json, and either tokenizer.json or vocab.json and merges.txt. If
    there is a tokenizer.json, it alone determines how a text is split: transformers 5 would rebuild
    normaliser and pre-tokenizer from `tokenizer_class` or a config.json in the folder, and give
    other ids. The two other files are read as Qwen2's tokenizer reads them.

    The official code adds delimiters that the folder lacks, at the next free ids. Here that is an
    error: the released folders have all four (151644, 151645, 151652, 151653), and a folder without
    them belongs to another model.

    Args:
      vocab_size: number of rows in the embedding of the model that will read the ids. None if
        there is no model.
      images: whether the model sees images, so that their delimiters must be there.
      form: "bagel", texts between <|im_start|> and <|im_end|>; "chat", by the folder's chat
        template, which needs neither of them; "" where no context is made, for any folder.
      thinking: see `chat_template.read`.
    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: its files do not parse or contradict each other, it is not byte-level, it loses
        text, it has dropout, a delimiter is missing, an id is beyond the embedding, or the chat
        template cannot be used.
    """
    files = check_there(directory)
    again = "copy the folder of the released model's tokenizer again"
    reading = "tokenizer_config.json"
    try:
        config = json_files.read(os.path.join(directory, reading))
        added = _added(config)
        reading = "tokenizer.json" if "tokenizer.json" in files else "vocab.json and merges.txt"
        backend = (
            _of_tokenizer_json(directory)
            if "tokenizer.json" in files
            else _of_vocabulary(directory, config, added)
        )
    except Exception as e:  # the library raises arbitrary exceptions, also bare Exception
        raise ValueError(
            f"cannot read the tokenizer in {directory} ({reading}: {e}): {again}"
        ) from e
    vocabulary = backend.get_vocab()
    for index, token in added.items():
        found = vocabulary.get(token["content"])
        if found != index:
            raise ValueError(
                f"the tokenizer in {directory} gives {token['content']} the id {found}, but its "
                f"tokenizer_config.json {index}: the vocabulary is incomplete or another model's, "
                "copy the folder again"
            )
    _check_bytes(directory, backend)
    _check_lossless(directory, backend)
    wanted = {"image_start": images, "image_end": images}
    needed = [token for name, token in DELIMITERS.items() if wanted.get(name, form == "bagel")]
    if missing := [token for token in needed if token not in vocabulary]:
        raise ValueError(
            f"the tokenizer in {directory} lacks {missing}: use the folder released with the model "
            "(Qwen2.5's tokenizers have all four), or config.prompts.form='chat' with a model of "
            "text alone that has a chat template"
        )
    largest = max(vocabulary, key=vocabulary.get)
    if vocabulary[largest] >= (vocab_size or _MOST):
        raise ValueError(
            f"the tokenizer in {directory} has ids up to {vocabulary[largest]} ({largest!r}), but "
            f"the model has {vocab_size or _MOST} embeddings (model.llm.vocab_size): give the "
            "tokenizer that belongs to the model, or for a new model set vocab_size to at least "
            f"{vocabulary[largest] + 1}"
        )
    ids, template = _delimiters(vocabulary), None
    if form == "chat":
        template = chat_template.read(directory, thinking=thinking)
        ids["bos"], ids["eos"] = _ends_of_completion(backend, template)
    ends = tuple(n for n in end_tokens(directory, vocab_size) if n != ids["eos"])
    return Tokenizer(backend, **ids, further_ends=ends, chat=template)


def _delimiters(vocabulary: dict[str, int]) -> dict[str, int]:
    """The ids of the four delimiters by their names; -1 for one that a vocabulary lacks."""
    return {name: vocabulary.get(token, -1) for name, token in DELIMITERS.items()}


def _ends_of_completion(backend, template: ChatTemplate) -> tuple[int, int]:
    """The tokens before and after a completion: the last that the template writes, and its end.

    Raises ValueError for a template that ends the assistant's turn with no token of its own.
    """
    *_, begun = template.layout(system=False, kinds=(chat_template.TEXT,))
    end = template.end()
    before, after = (
        backend.encode(text if isinstance(text, str) else "", add_special_tokens=False).ids
        for text in (begun, end)
    )
    if not before or not after or after[0] not in backend.get_added_tokens_decoder():
        raise ValueError(
            f"the chat template in {template.path} writes {end!r} after the assistant's turn, "
            "which begins with no special token, or begins the turn with nothing: a completion "
            "would not end. Use the template of the model's folder, or set "
            "config.prompts.form='bagel'"
        )
    return before[-1], after[0]


def end_tokens(directory: str | os.PathLike, vocab_size: int | None = None) -> tuple[int, ...]:
    """Ids that generation_config.json in a folder says an answer ends with; () without the file.

    Raises:
      ValueError: they are no ids of the model.
    """
    path = os.path.join(directory, "generation_config.json")
    if not os.path.isfile(path):
        return ()
    named = json_files.read(path).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(n) is int and 0 <= n < (vocab_size or _MOST) for n in ids):
        raise ValueError(
            f"{path}: eos_token_id is {json_files.shown(named)}: give an id below "
            f"{vocab_size or _MOST}, or a list of them"
        )
    return tuple(dict.fromkeys(ids))


def _added(config) -> dict[int, dict]:
    """{id: description} of the added tokens in tokenizer_config.json.

    Raises:
      ValueError: they are malformed.
    """
    entries = config.get("added_tokens_decoder") or {}
    try:
        found = {
            int(index): token
            for index, token in sorted(entries.items(), key=lambda item: int(item[0]))
        }
        if all(isinstance(token["content"], str) for token in found.values()):
            return found
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(
        f"added_tokens_decoder is {json_files.shown(entries)}, which does not map ids to objects "
        "with a text as content"
    )


def _of_tokenizer_json(directory):
    """The tokenizer that tokenizer.json describes, without truncation and padding."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _of_vocabulary(directory, config, added):
    """Qwen2's tokenizer of vocab.json and merges.txt.

    It composes characters (NFC), splits by Qwen2's rule, and applies byte-level BPE.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    kind = config.get("tokenizer_class")
    if kind not in (None, "Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise ValueError(
            f"tokenizer_class is {kind!r} in tokenizer_config.json, but vocab.json and merges.txt "
            "are read as Qwen2Tokenizer reads them: save it with a tokenizer.json"
        )
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(
            *(os.path.join(directory, name) for name in ("vocab.json", "merges.txt"))
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    backend.add_tokens(
        [
            tokenizers.AddedToken(
                token["content"], **{flag: token[flag] for flag in flags if flag in token}
            )
            for token in added.values()
        ]
    )
    # Tokens of the vocabulary that the configuration lists as special: they are never split.
    named = [config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")]
    named += config.get("additional_special_tokens") or []
    named = [token["content"] if isinstance(token, dict) else token for token in named if token]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token in named
            if backend.token_to_id(token) is not None
        ]
    )
    return backend


def _check_bytes(directory, backend) -> None:
    """Raises ValueError unless the tokens are spelled in bytes, and the bytes of texts have one."""
    alphabet = set(_byte_alphabet().values())
    needed = {char for byte, char in _byte_alphabet().items() if byte not in _RARE}
    if not backend.get_vocab().keys() >= needed:
        raise ValueError(
            f"the tokenizer in {directory} has no token for some bytes, so it would drop text: use "
            "a tokenizer of byte-level BPE, such as Qwen2's"
        )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not set().union(*(backend.get_vocab().keys() - added)) <= alphabet:
        wrong = next(
            token
            for token in sorted(backend.get_vocab().keys() - added)
            if not set(token) <= alphabet
        )
        raise ValueError(
            f"the tokenizer in {directory} does not spell its token {wrong!r} in bytes: use a "
            "tokenizer of byte-level BPE, such as Qwen2's"
        )


def _check_lossless(directory, backend) -> None:
    """Raises ValueError if text would be lost, or if ids would be random.

    Text is lost without a pre-tokenizer of type ByteLevel, for example.
    """
    if getattr(backend.model, "dropout", None):
        raise ValueError(
            f"the tokenizer in {directory} has dropout {backend.model.dropout:g} (tokenizer.json, "
            "model), so the same text would get other ids each time: set it to null"
        )
    text = _PROBE.partition("<")[0]  # tags may be added tokens that absorb the blanks around them
    wanted = backend.normalizer.normalize_str(text) if backend.normalizer else text
    said = Tokenizer(backend, 0, 0, 0, 0).decode(backend.encode(text, add_special_tokens=False).ids)
    if said.strip() != wanted.strip():
        raise ValueError(
            f"the tokenizer in {directory} reads {wanted!r} as {said!r}: text would be lost "
            "silently. Give its tokenizer.json the pre-tokenizer ByteLevel, or use the released "
            "model's tokenizer"
        )
