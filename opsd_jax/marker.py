"""Where the image marker is in a stream of tokens, by a table that the sampler looks up at every step.

Letters: S states, V vocabulary.
"""

import dataclasses
import hashlib

import numpy as np

from opsd_jax import context as context_lib


@dataclasses.dataclass(frozen=True)
class Marker:
    """Where the bytes of a string are in a stream of tokens.

    table: int8 [S, V], next state by state and token; state n means that the last n bytes are the string's first
    n; the last state S - 1 means "seen" and is never left. Hashed by its bytes: it is a constant of the program.
    """

    table: np.ndarray
    digest: str

    def __eq__(self, other):
        return isinstance(other, Marker) and self.digest == other.digest

    def __hash__(self):
        return hash(self.digest)

    @classmethod
    def build(cls, token_bytes, vocab_size: int, text: str = context_lib.MARKER) -> "Marker":
        """token_bytes: the bytes of each token by id; ids beyond it (padding rows of the embedding) are empty."""
        pattern = text.encode()
        step = _automaton(pattern)
        longest = max(map(len, token_bytes), default=0)
        bytes_at = np.full((longest, vocab_size), -1, np.int16)  # -1: the token has no such byte
        for token, data in enumerate(token_bytes[:vocab_size]):
            bytes_at[: len(data), token] = list(data)
        states = np.repeat(np.arange(len(pattern) + 1)[:, None], vocab_size, axis=1)
        for row in bytes_at:
            states = np.where(row >= 0, step[states, row], states)
        table = states.astype(np.int8)
        return cls(
            table, hashlib.blake2b(table.tobytes() + text.encode(), digest_size=16).hexdigest()
        )


def _automaton(pattern: bytes) -> np.ndarray:
    """Knuth-Morris-Pratt as a table int [len + 1, 256]: next state by state and byte; the last state absorbs.

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
