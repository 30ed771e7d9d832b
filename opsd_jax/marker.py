"""Detection of the image marker in a stream of tokens.

The sampler looks the next state up in a table at every step.

Letters: S states, V vocabulary.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from opsd_jax import blocks as blocks_lib


@dataclasses.dataclass(frozen=True)
class Marker:
    """Automaton that finds the bytes of a string in a stream of tokens.

    table: int8 [S, V], next state by state and token. State n means that the last n bytes are the
      first n bytes of the string. The last state S - 1 means "seen" and is never left.
    digest: hash of the table and the string. It is what equality and `hash` use, as the table is a
      constant of compiled programs.
    """

    table: np.ndarray
    digest: str

    def __eq__(self, other):
        return isinstance(other, Marker) and self.digest == other.digest

    def __hash__(self):
        return hash(self.digest)

    @classmethod
    def build(
        cls, token_bytes: Sequence[bytes], vocab_size: int, text: str = blocks_lib.MARKER
    ) -> "Marker":
        """The automaton of `text` for a vocabulary.

        Args:
          token_bytes: bytes of each token, by id. Larger ids, the padding of the
            embedding table, have no bytes.
          vocab_size: V.

        Raises:
          ValueError: there are more tokens than embeddings.
        """
        if len(token_bytes) > vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {len(token_bytes) - 1}, but the model has "
                f"{vocab_size} embeddings (model.llm.vocab_size): give the tokenizer that belongs "
                "to the model"
            )
        pattern = text.encode()
        step = _automaton(pattern)
        longest = max(map(len, token_bytes), default=0)
        bytes_at = np.full((longest, vocab_size), -1, np.int16)  # -1: the token has no such byte
        for token, data in enumerate(token_bytes):
            bytes_at[: len(data), token] = list(data)
        states = np.repeat(np.arange(len(pattern) + 1)[:, None], vocab_size, axis=1)
        for row in bytes_at:
            states = np.where(row >= 0, step[states, row], states)
        table = states.astype(np.int8)
        return cls(
            table, hashlib.blake2b(table.tobytes() + text.encode(), digest_size=16).hexdigest()
        )


def _automaton(pattern: bytes) -> Int64[np.ndarray, "S 256"]:
    """Knuth-Morris-Pratt automaton as a table int64 [len + 1, 256]: next state by state and byte.

    The last state is never left.

    pattern "aab":   state 0 -a-> 1 -a-> 2 -b-> 3 (stays),   2 -a-> 2,   1 -other-> 0
    """
    n = len(pattern)
    table = np.zeros((n + 1, 256), np.int64)
    fallback = 0
    table[0, pattern[0]] = 1
    for state in range(1, n):
        table[state] = table[fallback]
        table[state, pattern[state]] = state + 1
        fallback = table[fallback, pattern[state]]
    table[n] = n
    return table
