"""A released tokenizer folder (Qwen2 or the miniature's) behind five facts and three functions.

The delimiters are resolved by name, never by counting added tokens: transformers 5 no longer lists them in
`special_tokens_map`, which made the official helper count tokens as new that were there already.
"""

import dataclasses
import functools
import hashlib
import json
import os

import numpy as np

DELIMITERS = {"bos": "<|im_start|>", "eos": "<|im_end|>",
              "image_start": "<|vision_start|>", "image_end": "<|vision_end|>"}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Token ids of the four delimiters, and the transformers tokenizer behind them."""

    backend: object
    bos: int
    eos: int
    image_start: int
    image_end: int

    @functools.cached_property
    def encode(self):
        """text -> int32 ids; nothing is added around them. Keeps the ids of recent texts: prompts and questions recur
        in every row, traces in every epoch."""

        @functools.lru_cache(maxsize=1 << 16)
        def encode(text: str) -> np.ndarray:
            ids = np.asarray(self.backend.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
            ids.setflags(write=False)
            return ids

        return encode

    def decode(self, ids) -> str:
        """Text of the ids; bytes that are no UTF-8, as where a character is cut, become U+FFFD.

        Ids beyond the vocabulary show as <|id|>: the embedding is padded (released: 152,064 rows) and sampling may
        return any row. Raises ValueError for a negative id.
        """
        known, parts = self.token_bytes, []
        for token in map(int, ids):
            if token < 0:
                raise ValueError(f"token id {token} is negative: cut padding and ignored labels off before decoding")
            parts.append(token < len(known) and known[token] or b"<|%d|>" % token)
        return b"".join(parts).decode(errors="replace")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token, by id (none at an unused id): what `decode` joins and `rollout.Marker` reads."""
        to_byte = {char: byte for byte, char in _byte_alphabet().items()}
        added, vocabulary = self.backend.get_added_vocab(), self.backend.get_vocab()
        spelled = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            spelled[index] = token.encode() if token in added else bytes(to_byte[char] for char in token)
        return spelled

    @functools.cached_property
    def digest(self) -> str:
        """Checksum of what ids mean: the bytes of every token, and the ids of the delimiters."""
        found = hashlib.blake2b(digest_size=16)
        for token in self.token_bytes:
            found.update(len(token).to_bytes(4, "little") + token)
        found.update(json.dumps([self.bos, self.eos, self.image_start, self.image_end]).encode())
        return found.hexdigest()


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level BPE: printable Latin-1 stays, the rest moves past U+0100."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in keep]
    return {**{b: chr(b) for b in keep}, **{b: chr(256 + n) for n, b in enumerate(moved)}}


def load(directory: str) -> Tokenizer:
    """Reads a tokenizer folder: tokenizer_config.json with tokenizer.json, or with vocab.json and merges.txt.

    The official code adds delimiters that the folder lacks, at the next free ids. Here that is an error: the released
    folders hold all four (151644, 151645, 151652, 151653), others belong to another model.

    Raises FileNotFoundError if there is no tokenizer; ValueError if its files do not parse or contradict each other,
    if it is not byte-level, or if a delimiter is absent.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # that PyTorch is absent is as it should be
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it takes a released folder's config.json for a model that it does not know
    files = os.listdir(directory) if os.path.isdir(directory) else []
    if "tokenizer_config.json" not in files:
        raise FileNotFoundError(f"{directory} holds no tokenizer (no tokenizer_config.json): give the folder of the "
                                "released model's tokenizer as --config.tokenizer=FOLDER")
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
        raise FileNotFoundError(f"the tokenizer in {directory} has no vocabulary: copy its tokenizer.json there, or "
                                "both vocab.json and merges.txt")
    try:
        with open(os.path.join(directory, "tokenizer_config.json"), encoding="utf-8") as f:
            added = json.load(f).get("added_tokens_decoder", {})
        backend = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        backend.backend_tokenizer.no_truncation()  # a tokenizer.json may ask for both, and `encode` would obey
        backend.backend_tokenizer.no_padding()
    except Exception as e:  # the parsers raise anything, bare Exception too
        raise ValueError(f"cannot read the tokenizer in {directory} ({e}): copy the folder of the released model's "
                         "tokenizer again") from e
    vocabulary = backend.get_vocab()
    for index, token in added.items():  # transformers would number them anew without a word
        found = vocabulary.get(token["content"])
        if found != int(index):
            raise ValueError(f"the tokenizer in {directory} gives {token['content']} the id {found}, but its "
                             f"tokenizer_config.json {index}: the vocabulary is cut or another model's, copy the "
                             "folder again")
    if not vocabulary.keys() >= set(_byte_alphabet().values()):
        raise ValueError(f"the tokenizer in {directory} has no token for some bytes, so it would drop text: use one of "
                         "byte-level BPE, as Qwen2's")
    missing = [token for token in DELIMITERS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer in {directory} lacks {missing}: use the folder released with the model "
                         "(Qwen2.5's tokenizers have all four)")
    return Tokenizer(backend, **{name: vocabulary[token] for name, token in DELIMITERS.items()})
