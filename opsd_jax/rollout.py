"""The on-policy sampler: prefill and decoding in one jitted program, image-skip rounds included.

Official: scripts/visual_opsd/on_policy_sampler.py, bagel.py:generate_text. A completion is sampled in rounds. A
round feeds bos, then samples and feeds tokens until eos is sampled (eos itself is not fed). If the round's text
holds the marker `<image_start>`, the model wants to draw; instead eos is fed and a new round starts with bos:

  fed       bos c1 c2 <image_start> | eos bos d1 d2 | (eos sampled: stop)
  returned      c1 c2 <image_start>           d1 d2

Every fed token counts against the budget `max_new_tokens`, delimiters too. A round that used up the budget is
never continued, nor is one after which at most one token is left, nor one past `max_image_skips`.

The marker is a string, and tokens merge across its edges (`><` is one Qwen token), so it is found in the bytes:
`Marker` folds a string-matching automaton and the tokenizer into one table next[state, token].

Letters: B batch, T context slots, N completion tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import context as context_lib
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig

STOP_BUDGET, STOP_EOS = 0, 1


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
        import hashlib

        pattern = text.encode()
        step = _automaton(pattern)
        longest = max(map(len, token_bytes), default=0)
        bytes_at = np.full((longest, vocab_size), -1, np.int16)  # -1: the token has no such byte
        for token, data in enumerate(token_bytes[:vocab_size]):
            bytes_at[:len(data), token] = list(data)
        states = np.repeat(np.arange(len(pattern) + 1)[:, None], vocab_size, axis=1)
        for row in bytes_at:
            states = np.where(row >= 0, step[states, row], states)
        table = states.astype(np.int8)
        return cls(table, hashlib.blake2b(table.tobytes() + text.encode(), digest_size=16).hexdigest())


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


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled (defaults: the official launcher's).

    max_new_tokens: budget of fed tokens, all rounds together. greedy: argmax instead of sampling.
    temperature, top_k (0: off), top_p (1: off): of the sampling distribution.
    max_image_skips: rounds continued after the marker. ban_marker: tokens that would complete the marker are
    never chosen. bos, eos: token ids.
    """

    model: ModelConfig
    bos: int
    eos: int
    marker: Marker
    max_new_tokens: int = 1024
    temperature: float = 1.0
    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0
    max_image_skips: int = 1
    ban_marker: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 2:
            raise ValueError(f"rollout.max_new_tokens is {self.max_new_tokens}: bos and one token need at least 2")
        if self.temperature <= 0:
            raise ValueError("rollout.temperature must be positive: for the argmax set rollout.greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p is {self.top_p}: it must lie in (0, 1]")
        if self.top_k < 0 or self.max_image_skips < 0:
            raise ValueError("rollout.top_k and rollout.max_image_skips must not be negative")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "logprobs", "num_skips", "stop", "fed", "fed_sampled", "num_fed"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Sampled completions. N = max_new_tokens - 1, F = max_new_tokens.

    tokens: int32 [B, N], content only: no bos, no eos, nothing that was injected; 0 after the end.
    mask: bool [B, N], the real ones, a prefix of each row.
    logprobs: float32 [B, N], log-probability of each token under the distribution it was drawn from.
    num_skips: int32 [B], image-skip rounds. stop: int32 [B], STOP_EOS or STOP_BUDGET.
    fed: int32 [B, F], every token in the order it was fed, with bos and injected delimiters.
    fed_sampled: bool [B, F], whether the model chose it: content, and the eos that a skip fed (False: bos, padding).
    num_fed: int32 [B].
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    num_skips: jax.Array
    stop: jax.Array
    fed: jax.Array
    fed_sampled: jax.Array
    num_fed: jax.Array


def _restrict(logits, config):
    """Sampling logits float32 [B, V] after temperature, top-k and top-p; excluded entries are -inf."""
    logits = logits / (1.0 if config.greedy else config.temperature)
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        lowest = jnp.min(jnp.where(before < config.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


@functools.partial(jax.jit, static_argnames=("config", "return_logits"))
def sample(params, context, rng, *, config: RolloutConfig, return_logits: bool = False):
    """Samples one completion a row.

    Args:
      params: the model's dict. context: Context [B, T] (rows may differ in length). rng: a PRNG key.
    Returns:
      Trajectory; with `return_logits` (Trajectory, logits float32 [B, F, V] of every fed token).
    """
    model, budget = config.model, config.max_new_tokens
    batch, slots = context.positions.shape
    rows = jnp.arange(batch)
    table = jnp.asarray(config.marker.table)
    seen = table.shape[0] - 1

    positions, limits, _ = context_lib.behind(context, budget)
    segment = jnp.pad(context.segment, ((0, 0), (0, budget)))
    cache = bagel.init_cache(batch, slots + budget, config=model)
    _, cache = bagel.read(params, context, config=model, cache=cache, key_segment=segment)
    key_segment = segment.at[:, slots:].set(1)
    order = bagel.behind(context.latents.order, slots + budget) if context.latents else None

    def step(state):
        t, token = state["t"], state["token"]
        x = bagel.embed_tokens(params, token[:, None], config=model)
        at = lambda vector: jax.lax.dynamic_slice_in_dim(vector, t, 1, axis=1)
        hidden, cache = bagel.forward(
            params, x, at(positions), at(limits), jnp.ones((batch, 1), jnp.int32), config=model,
            cache=state["cache"], offset=slots + t, key_segment=key_segment, order=order)
        raw = bagel.logits(params, hidden[:, 0])
        logits = raw
        if config.ban_marker:
            logits = jnp.where(table[state["marker"]] == seen, -jnp.inf, logits)
        logits = _restrict(logits, config)
        key = jax.random.fold_in(rng, t)
        drawn = (jnp.argmax(logits, axis=-1) if config.greedy else jax.random.categorical(key, logits)).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), drawn[:, None], axis=1)[:, 0]

        # What is fed next. A skip forces two tokens: eos at once, and after it (inject == 1) bos.
        used = t + 1
        done, inject = state["done"], state["inject"]
        ends = (drawn == config.eos) & (inject == 0)
        again = (ends & (state["skips"] < config.max_image_skips) & (budget - used > 1)
                 & (state["marker"] == seen) & ~done)
        forced = jnp.where(again, config.eos, config.bos)
        is_forced = again | (inject == 1)
        stops = (ends & ~again) | (used == budget)
        content = ~(done | stops | is_forced)
        token = jnp.where(done | stops, 0, jnp.where(is_forced, forced, drawn))
        written = jnp.where(content, state["count"], budget)  # out of bounds: dropped
        out = {
            "tokens": state["out"]["tokens"].at[rows, written].set(drawn, mode="drop"),
            "logprobs": state["out"]["logprobs"].at[rows, written].set(logprob, mode="drop"),
            "fed": state["out"]["fed"].at[:, used].set(token, mode="drop"),
            "fed_sampled": state["out"]["fed_sampled"].at[:, used].set(content | again, mode="drop"),
        }
        if return_logits:
            out["logits"] = state["out"]["logits"].at[:, t].set(raw)
        return {
            "t": used, "token": token, "cache": cache, "out": out,
            "done": done | stops,
            "stop": jnp.where(stops & ~done, jnp.where(ends, STOP_EOS, STOP_BUDGET), state["stop"]),
            "inject": jnp.where(again, 1, 0),
            "marker": jnp.where(content, table[state["marker"], drawn].astype(jnp.int32),
                                jnp.where(is_forced, 0, state["marker"])),
            "skips": state["skips"] + again,
            "count": state["count"] + content,
            "num_fed": jnp.where(done | stops, state["num_fed"], used + 1),
        }

    zeros = jnp.zeros(batch, jnp.int32)
    out = {"tokens": jnp.zeros((batch, budget - 1), jnp.int32), "logprobs": jnp.zeros((batch, budget - 1)),
           "fed": jnp.zeros((batch, budget), jnp.int32).at[:, 0].set(config.bos),
           "fed_sampled": jnp.zeros((batch, budget), bool)}
    if return_logits:
        out["logits"] = jnp.zeros((batch, budget, model.llm.vocab_size))
    state = {"t": jnp.int32(0), "token": jnp.full(batch, config.bos, jnp.int32), "cache": cache, "out": out,
             "done": jnp.zeros(batch, bool), "stop": zeros, "inject": zeros, "marker": zeros, "skips": zeros,
             "count": zeros, "num_fed": zeros + 1}
    state = jax.lax.while_loop(lambda s: (s["t"] < budget) & ~jnp.all(s["done"]), step, state)
    out = state["out"]
    trajectory = Trajectory(
        tokens=out["tokens"], mask=jnp.arange(budget - 1) < state["count"][:, None], logprobs=out["logprobs"],
        num_skips=state["skips"], stop=state["stop"], fed=out["fed"], fed_sampled=out["fed_sampled"],
        num_fed=state["num_fed"])
    return (trajectory, out["logits"]) if return_logits else trajectory
