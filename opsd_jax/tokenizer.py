"""A released tokenizer folder (Qwen2 or the miniature's) behind five facts and three functions.

The delimiters are resolved by name, never by counting added tokens: transformers 5 no longer lists them in
`special_tokens_map`, which made the official helper count tokens as new that were there already.
"""

import dataclasses
import functools
import os

import numpy as np

DELIMITERS = {"bos": "<|im_start|>", "eos": "<|im_end|>", "image_start": "<|vision_start|>", "image_end": "<|vision_end|>"}


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
        """Text of the ids. Ids beyond the vocabulary (models are padded to 152,064 rows) show as <|id|>."""
        size, parts, run = len(self.backend), [], []
        for token in [*map(int, ids), None]:
            if token is not None and token < size:
                run.append(token)
                continue
            parts.append(self.backend.decode(run, skip_special_tokens=False))
            run = []
            if token is not None:
                parts.append(f"<|{token}|>")
        return "".join(parts)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token, by id: what `rollout.Marker` reads."""
        to_byte = {char: byte for byte, char in _byte_alphabet().items()}
        added = self.backend.get_added_vocab().values()
        tokens = self.backend.convert_ids_to_tokens(range(len(self.backend)))
        plain = lambda token: bytes(to_byte[c] for c in token)
        return [t.encode() if n in added else plain(t) if t is not None else b"" for n, t in enumerate(tokens)]


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level BPE: printable Latin-1 stays, the rest moves past U+0100."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in keep]
    return {**{b: chr(b) for b in keep}, **{b: chr(256 + n) for n, b in enumerate(moved)}}


def load(directory: str) -> Tokenizer:
    """Reads a tokenizer folder. ValueError if it lacks a delimiter, FileNotFoundError if there is no tokenizer."""
    from transformers import AutoTokenizer

    if not os.path.isdir(directory) or "tokenizer_config.json" not in os.listdir(directory):
        raise FileNotFoundError(f"{directory} holds no tokenizer (no tokenizer_config.json): give the folder of the "
                                "released model's tokenizer as --config.tokenizer=FOLDER")
    backend = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    vocabulary = backend.get_vocab()
    missing = [token for token in DELIMITERS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer in {directory} lacks {missing}: add them (the model needs rows for their ids)")
    return Tokenizer(backend, **{name: vocabulary[token] for name, token in DELIMITERS.items()})
