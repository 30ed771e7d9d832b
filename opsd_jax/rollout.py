"""The on-policy sampler: prefill and decoding in one jitted program, image-skip rounds included.

Official: scripts/visual_opsd/on_policy_sampler.py, bagel.py:generate_text. A completion is sampled
in rounds. A round feeds bos, then samples and feeds tokens until eos is sampled (eos itself is not
fed). If the round's text holds the marker `<image_start>`, the model asks for an image; instead,
eos is fed and a new round starts with bos:

  fed       bos c1 c2 <image_start> | eos bos d1 d2 | (eos sampled: stop)
  returned      c1 c2 <image_start>           d1 d2

Every fed token counts against the budget `max_new_tokens`, delimiters included. A round that used
up the budget is never continued, nor is one after which at most one token is left, nor one past
`max_image_skips`.

The marker is a string, and tokens merge across its edges (`><` is one Qwen token), so it is found
in the bytes: `Marker` combines a string-matching automaton and the tokenizer in one table
next[state, token].

Sequences end at different lengths, and a finished sequence keeps occupying its batch entry, its
lane, at every decode step. With fewer lanes than sequences (`RolloutConfig.slots`) the sequences
wait in a queue, and free lanes take the next ones, all in the same program:

  lane 0   aaaaaa ccccccccc          step by step, every lane holds one sequence
  lane 1   bbbbbbbbbbb ddddd

Keys go to the same column in all lanes, so that a step writes one column of the cache. The columns
after the context are a ring of `max_new_tokens`, and no sequence is longer than that:

  cache of a lane   [ context 0 .. T-1 | ring, at T + (step mod budget) ]

Letters: B lanes, Q sequences (B = Q without a queue), T context positions, N completion tokens, V
vocabulary, D shards.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, Shaped

from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.context import Context
from opsd_jax.marker import Marker as Marker  # a part of `RolloutConfig`
from opsd_jax.method_config import RolloutConfig
from opsd_jax.model import bagel
from opsd_jax.model.masks import Mask

STOP_BUDGET, STOP_EOS = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Sampled completions. N = max_new_tokens - 1, F = max_new_tokens.

    tokens: int32 [B, N], content only: no bos, no eos, no injected token; 0 after the end.
    mask: bool [B, N], True for the content tokens, which are a prefix of each sequence.
    logprobs: float32 [B, N], log-probability of each token under the distribution that it was
      sampled from.
    num_skips: int32 [B], number of image-skip rounds. stop: int32 [B], STOP_EOS or STOP_BUDGET.
    fed: int32 [B, F], every token in the order it was fed, with bos and injected delimiters.
    fed_sampled: bool [B, F], whether the model chose the token. True for content and for the eos
      that a skip fed, False for bos and padding.
    num_fed: int32 [B], number of fed tokens.
    ended: int32 [B], decoding steps of the whole call that had run when the sequence was done; None
      if it was not sampled by this call.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    num_skips: jax.Array
    stop: jax.Array
    fed: jax.Array
    fed_sampled: jax.Array
    num_fed: jax.Array
    ended: jax.Array | None = None


def relayout_program(
    mesh: jax.sharding.Mesh, params: dict, dtype: str, int8: bool = False
) -> Callable[[dict], dict]:
    """A function that maps trained parameters to those that the sampler uses.

    These are in the rollout layout and the compute dtype, without the parameters of image
    generation (`params.for_sampling`).

    Args:
      mesh: the sampler's, see `sharding.regrouped`.
      params: arrays or ShapeDtypeStructs with the shardings of the returned function's arguments.
      dtype: the compute dtype. int8: whether matrices are rounded to int8.
    """
    program = sharding.relayout_program(
        mesh,
        params_lib.understanding(params),
        "rollout",
        cast=lambda tree: params_lib.for_sampling(tree, dtype, int8),
    )
    return lambda params: program(params_lib.understanding(params))


def utilisation(trajectory: Trajectory, lanes: int = 0) -> Float[Array, ""] | np.floating:
    """Share of the lanes' decoding steps that fed a token to an unfinished sequence, in (0, 1].

    lanes: number of lanes, `RolloutConfig.slots`; 0 for one lane per sequence.
    """
    count = trajectory.num_fed.shape[0]
    return trajectory.num_fed.sum() / (min(lanes or count, count) * trajectory.ended.max())


def _restrict(logits: Float32[Array, "B V"], config: RolloutConfig) -> Float32[Array, "B V"]:
    """Logits after temperature, top-k and top-p. Excluded entries are -inf."""
    logits = logits / (1.0 if config.greedy else config.temperature)
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
            ordered, axis=-1
        )
        lowest = jnp.min(jnp.where(before < config.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """What is sampled so far, and what a finished sequence leaves. F = max_new_tokens, N = F - 1.

    tokens: int32 [B, N], content tokens. logprobs: float32 [B, N], their log-probabilities.
    count: int32 [B], number of content tokens.
    fed: int32 [B, F], tokens in the order they were fed. fed_sampled: bool [B, F], chosen by the
      model.
    num_fed: int32 [B], number of fed tokens. num_skips: int32 [B], image-skip rounds.
    stop: int32 [B], STOP_EOS or STOP_BUDGET. ended: int32 [B], decoding steps when it was done.
    logits: float32 [B, F, V] of every fed token, or None where they are not returned.
    """

    tokens: jax.Array
    logprobs: jax.Array
    count: jax.Array
    fed: jax.Array
    fed_sampled: jax.Array
    num_fed: jax.Array
    num_skips: jax.Array
    stop: jax.Array
    ended: jax.Array
    logits: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes:
    """State of the decoding loop: B lanes, each of which samples one sequence at a time.

    step: int32 [], decoding steps of the whole call so far.
    sequence: int32 [B], number of the sequence in the lane; it selects the lane's random numbers.
    t: int32 [B], tokens of the sequence that were fed before the current one.
    token: int32 [B], the token that is fed next.
    position: int32 [B], rope position of the first fed token.
    segment: int32 [B, S], 1 at cache columns that hold keys of the sequence; S is T + F, rounded up
      to whole blocks (`bagel.cache_columns`).
    done: bool [B], the sequence is finished and the lane is free.
    inject: int32 [B], 1 where bos is fed next, after the eos of an image skip.
    marker: int32 [B], state of the marker's automaton in the current round.
    completions: Completions of the sequences in the lanes.
    cache: {"k", "v": [L, B, S, K, h]}, or None before the prefill.
    """

    step: jax.Array
    sequence: jax.Array
    t: jax.Array
    token: jax.Array
    position: jax.Array
    segment: jax.Array
    done: jax.Array
    inject: jax.Array
    marker: jax.Array
    completions: Completions
    cache: dict[str, jax.Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """State of the sampler with fewer lanes than sequences.

    lanes: the decoding loop. next: int32 [D], next waiting sequence of each shard.
    results: Completions of all Q sequences.
    """

    lanes: Lanes
    next: jax.Array
    results: Completions


@sharding.jit_on_mesh(static_argnames=("config", "return_logits"))
def sample(
    params: dict,
    context: Context,
    rng: PRNGKeyArray,
    *,
    config: RolloutConfig,
    return_logits: bool = False,
) -> Trajectory | tuple[Trajectory, Float32[Array, "Q F V"]]:
    """Samples one completion per sequence.

    What a sequence samples depends on `rng` and its number only, not on its neighbours, lanes or
    devices.

    Args:
      params: the model's dict. context: Context [Q, T] (sequences may differ in length).
      rng: a PRNG key.
    Returns:
      Trajectory; with `return_logits` (Trajectory, logits float32 [Q, F, V] of every fed token).
    Raises:
      ValueError: the sequences do not divide into config.shards.
    """
    model, budget = config.model, config.max_new_tokens
    queued, size = context.limit.shape
    if not config.slots or config.slots >= queued:  # every sequence has its own lane
        lanes = _begin(jnp.arange(queued), context, config, return_logits)
        with jax.named_scope("prefill"):
            columns = bagel.cache_columns(size + budget, config=model)
            empty = bagel.init_cache(queued, columns, config=model)
            _, cache = bagel.read(
                params, context, config=model, cache=empty, key_segment=lanes.segment
            )
        step = functools.partial(_step, params, rng, config, size)
        lanes = jax.lax.while_loop(
            lambda lanes: ~jnp.all(lanes.done), step, dataclasses.replace(lanes, cache=cache)
        )
        return _result(lanes.completions)
    return _sample_queue(params, context, rng, config, return_logits)


def _begin(
    numbers: Int[Array, " B"], context: Context, config: RolloutConfig, return_logits: bool
) -> Lanes:
    """Lanes without their cache, before the sequences feed bos after their contexts.

    numbers: int32 [B], numbers of the sequences. context: Context [B, T].
    """
    batch, budget = numbers.shape[0], config.max_new_tokens
    zeros = jnp.zeros(batch, jnp.int32)
    size = context.segment.shape[1]
    columns = bagel.cache_columns(size + budget, config=config.model)
    logits = jnp.zeros((batch, budget, config.model.llm.vocab_size)) if return_logits else None
    return Lanes(
        step=jnp.int32(0),
        sequence=numbers,
        t=zeros,
        token=zeros + config.bos,
        position=jnp.asarray(context.next_rope_position),
        segment=jnp.pad(context.segment, ((0, 0), (0, columns - size))),
        done=jnp.zeros(batch, bool),
        inject=zeros,
        marker=zeros,
        completions=Completions(
            tokens=jnp.zeros((batch, budget - 1), jnp.int32),
            logprobs=jnp.zeros((batch, budget - 1)),
            count=zeros,
            fed=jnp.zeros((batch, budget), jnp.int32).at[:, 0].set(config.bos),
            fed_sampled=jnp.zeros((batch, budget), bool),
            num_fed=zeros + 1,
            num_skips=zeros,
            stop=zeros,
            ended=zeros,
            logits=logits,
        ),
    )


@jax.named_scope("decode")
def _step(params: dict, rng: PRNGKeyArray, config: RolloutConfig, size: int, lanes: Lanes) -> Lanes:
    """Feeds one token in every lane and samples the next. size: T, where the ring begins."""
    model, budget = config.model, config.max_new_tokens
    t, done, out = lanes.t, lanes.done, lanes.completions
    column = size + lanes.step % budget
    segment = jax.lax.dynamic_update_slice_in_dim(
        lanes.segment, jnp.ones_like(t)[:, None], column, axis=1
    )
    x = bagel.embed_tokens(params, lanes.token[:, None], config=model)
    # All keys of the segment are in the past: admission removed those of the lane's previous
    # sequence.
    hidden, cache = bagel.forward(
        params,
        bagel.Embedded(
            x,
            (lanes.position + t)[:, None],
            Mask(jnp.full((1, 1), segment.shape[1]), jnp.ones_like(t)[:, None], segment),
        ),
        config=model,
        cache=lanes.cache,
        offset=column,
    )
    raw = bagel.logits(params, hidden[:, 0])
    sampled, logprob = _choose(raw, rng, config, lanes)
    after = _feed(sampled, config, lanes)
    over, content, again = after.over, after.content, after.again
    used = t + 1
    # Updates out of bounds are dropped. The update is mapped over lanes. Without this, devices
    # would exchange their lanes at every token.
    written, fed = jnp.where(content, out.count, budget), jnp.where(over, budget, used)
    write = jax.vmap(lambda x, column, value: x.at[column].set(value, mode="drop"))
    kept = out.logits
    if kept is not None:
        kept = write(kept, jnp.where(done, budget, t), raw)
    stops = after.stops & ~done
    return Lanes(
        step=lanes.step + 1,
        sequence=lanes.sequence,
        t=jnp.where(done, t, used),
        token=after.token,
        position=lanes.position,
        segment=segment,
        done=over,
        inject=jnp.where(again, 1, 0),
        marker=after.marker,
        completions=Completions(
            tokens=write(out.tokens, written, sampled),
            logprobs=write(out.logprobs, written, logprob),
            count=out.count + content,
            fed=write(out.fed, fed, after.token),
            fed_sampled=write(out.fed_sampled, fed, content | again),
            num_fed=jnp.where(over, out.num_fed, used + 1),
            num_skips=out.num_skips + again,
            stop=jnp.where(stops, jnp.where(after.ends, STOP_EOS, STOP_BUDGET), out.stop),
            ended=jnp.where(stops, lanes.step + 1, out.ended),
            logits=kept,
        ),
        cache=cache,
    )


def _choose(
    raw: Float32[Array, "B V"], rng: PRNGKeyArray, config: RolloutConfig, lanes: Lanes
) -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
    """The token that each lane samples, int32 [B], and its log-probability in what it is sampled
    from.

    raw: logits after the token that was fed.
    """
    logits = raw
    if config.ban_marker:
        table = jnp.asarray(config.marker.table)
        logits = jnp.where(table[lanes.marker] == table.shape[0] - 1, -jnp.inf, logits)
    logits = _restrict(logits, config)
    if config.greedy:
        sampled = jnp.argmax(logits, axis=-1)
    else:
        keys = jax.vmap(lambda n, t: jax.random.fold_in(jax.random.fold_in(rng, n), t))(
            lanes.sequence, lanes.t
        )
        sampled = jax.vmap(jax.random.categorical)(keys, logits)
    sampled = sampled.astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return sampled, jnp.take_along_axis(log_probs, sampled[:, None], axis=1)[:, 0]


class _Fed(NamedTuple):
    """What is fed next in each lane; all [B].

    token: int32. ends: bool, the sampled token is an eos that counts. stops: bool, the sequence
    ends with it. over: bool, the lane is free. content: bool, the sampled token is fed and belongs
    to the completion. again: bool, an image skip begins. marker: int32, the automaton's state.
    """

    token: jax.Array
    ends: jax.Array
    stops: jax.Array
    over: jax.Array
    content: jax.Array
    again: jax.Array
    marker: jax.Array


def _feed(sampled: Int[Array, " B"], config: RolloutConfig, lanes: Lanes) -> _Fed:
    """What follows the sampled tokens.

      the round's text            sampled   fed next
      contains <image_start>      an end    eos, then bos whatever is sampled: an image skip
      anything else               an end    nothing: the sequence stops
      anything                    another   the sampled token

    An end is eos or one of `further_ends`. A skip needs room for both tokens, and that skips are
    left; `Lanes.inject` marks the bos.
    """
    table = jnp.asarray(config.marker.table)
    seen = table.shape[0] - 1
    used, done, inject = lanes.t + 1, lanes.done, lanes.inject
    ends = sampled == config.eos
    for end in config.further_ends:
        ends |= sampled == end
    ends &= inject == 0
    again = (
        ends
        & (lanes.completions.num_skips < config.max_image_skips)
        & (config.max_new_tokens - used > 1)
        & (lanes.marker == seen)
        & ~done
    )
    is_forced = again | (inject == 1)
    stops = (ends & ~again) | (used == config.max_new_tokens)
    over = done | stops
    content = ~(over | is_forced)
    forced = jnp.where(again, config.eos, config.bos)
    following = table[lanes.marker, sampled].astype(jnp.int32)
    return _Fed(
        token=jnp.where(over, 0, jnp.where(is_forced, forced, sampled)),
        ends=ends,
        stops=stops,
        over=over,
        content=content,
        again=again,
        marker=jnp.where(content, following, jnp.where(is_forced, 0, lanes.marker)),
    )


def _result(out: Completions) -> Trajectory | tuple[Trajectory, Float32[Array, "B F V"]]:
    """Trajectory of the completions; (Trajectory, logits) where logits are returned."""
    trajectory = Trajectory(
        tokens=out.tokens,
        mask=jnp.arange(out.tokens.shape[1]) < out.count[:, None],
        logprobs=out.logprobs,
        num_skips=out.num_skips,
        stop=out.stop,
        fed=out.fed,
        fed_sampled=out.fed_sampled,
        num_fed=out.num_fed,
        ended=out.ended,
    )
    return trajectory if out.logits is None else (trajectory, out.logits)


# --- the queue -----------------------------------------------------------------------------------


class _Shares(NamedTuple):
    """How a queue is divided over the D batch shards; all are numbers of one shard but `shards`.

    shards: D. sequences: q = Q / D. lanes: b = B / D. group: g, sequences admitted at a time.
    """

    shards: int
    sequences: int
    lanes: int
    group: int

    @property
    def first(self) -> Int[Array, "D 1"]:
        """Number of each shard's first sequence."""
        return jnp.arange(self.shards)[:, None] * self.sequences


def _shares(queued: int, config: RolloutConfig) -> _Shares:
    """Raises ValueError if the `queued` sequences do not divide into config.shards."""
    shards = config.shards
    if queued % shards:
        raise ValueError(
            f"{queued} sequences cannot be shared by the {shards} batch shards of rollout.shards: "
            "make their number a multiple of it"
        )
    group = min(config.group, config.slots) // shards
    return _Shares(shards, queued // shards, config.slots // shards, group)


def _split(x: Shaped[Array, "Dn ..."], shards: int) -> Shaped[Array, "D n ..."]:
    return x.reshape(shards, -1, *x.shape[1:])


def _join(x: Shaped[Array, "D n ..."]) -> Shaped[Array, "Dn ..."]:
    return x.reshape(-1, *x.shape[2:])


def _put(
    x: Shaped[Array, "Dn ..."], at: Int[Array, "D m"], values: Shaped[Array, "Dm ..."]
) -> Shaped[Array, "Dn ..."]:
    """Writes `values` at the places `at` of each shard's part; n and more are dropped.

    shards 2, x [a b c | d e f], at [[2], [0]], values [u | v]  ->  [a b u | v e f]
    """
    write = jax.vmap(lambda part, at, value: part.at[at].set(value, mode="drop"))
    return _join(write(_split(x, at.shape[0]), at, _split(values, at.shape[0])))


def _sample_queue(
    params: dict,
    context: Context,
    rng: PRNGKeyArray,
    config: RolloutConfig,
    return_logits: bool,
) -> Trajectory | tuple[Trajectory, Float32[Array, "Q F V"]]:
    """`sample` with fewer lanes than sequences.

    Until all sequences are done, it admits sequences to free lanes, then decodes until enough lanes
    are free again.
    """
    (queued, size), batch = context.limit.shape, config.slots
    shares = _shares(queued, config)

    def decode(queue: Queue) -> Queue:
        return dataclasses.replace(queue, lanes=_step(params, rng, config, size, queue.lanes))

    def admit(queue: Queue) -> Queue:
        lane, number = _admissible(queue, shares)
        some = jax.tree.map(
            lambda x: _take(jnp.asarray(x), jnp.minimum(number, shares.sequences - 1)),
            context,
        )
        new = _prefilled(params, some, _join(shares.first + number), config, return_logits)
        return Queue(
            _with_new(queue.lanes, new, lane),
            queue.next + (lane < shares.lanes).sum(axis=1),
            _harvest(queue, shares),
        )

    # Lanes without a sequence: their number is none of the Q, so that nothing is kept of them.
    empty = jax.tree.map(lambda x: jnp.repeat(x[:1], batch, axis=0), context)
    columns = bagel.cache_columns(size + config.max_new_tokens, config=config.model)
    lanes = dataclasses.replace(
        _begin(jnp.full(batch, queued), empty, config, return_logits),
        done=jnp.ones(batch, bool),
        cache=bagel.init_cache(batch, columns, config=config.model),
    )
    results = jax.tree.map(lambda x: jnp.zeros((queued, *x.shape[1:]), x.dtype), lanes.completions)
    queue = jax.lax.while_loop(
        lambda queue: ~jnp.all(queue.lanes.done) | jnp.any(queue.next < shares.sequences),
        lambda queue: jax.lax.while_loop(
            functools.partial(_keeps_decoding, shares=shares), decode, admit(queue)
        ),
        Queue(lanes, jnp.zeros(shares.shards, jnp.int32), results),
    )
    return _result(_harvest(queue, shares))


def _harvest(queue: Queue, shares: _Shares) -> Completions:
    """The results with the lanes' completions. One that is not done is copied again later."""
    at = _split(queue.lanes.sequence, shares.shards) - shares.first
    at = jnp.where((at >= 0) & (at < shares.sequences), at, shares.sequences)  # dropped
    return jax.tree.map(lambda x, new: _put(x, at, new), queue.results, queue.lanes.completions)


def _admissible(queue: Queue, shares: _Shares) -> tuple[Int[Array, "D g"], Int[Array, "D g"]]:
    """Which lane takes which sequence next, up to g per shard.

    Returns:
      lane: int32 [D, g], lane within the shard; b where none is free or no sequence waits.
      number: int32 [D, g], sequence within the shard; q and more where none waits.
    """
    free = _split(queue.lanes.done, shares.shards)
    lane = jnp.argsort(~free, axis=1)[:, : shares.group]  # stable: free lanes first
    number = queue.next[:, None] + jnp.arange(shares.group)
    takes = jnp.take_along_axis(free, lane, axis=1) & (number < shares.sequences)
    return jnp.where(takes, lane, shares.lanes), number


def _take(x: Shaped[Array, "Q ..."], at: Int[Array, "D g"]) -> Shaped[Array, "Dg ..."]:
    """The entries `at` of each shard's part."""
    return _join(jax.vmap(lambda part, at: part[at])(_split(x, at.shape[0]), at))


@jax.named_scope("admit")
def _prefilled(
    params: dict,
    context: Context,
    numbers: Int[Array, " Dg"],
    config: RolloutConfig,
    return_logits: bool,
) -> Lanes:
    """Lanes of new sequences, with the keys of their contexts [L, Dg, T, K, h] as the cache."""
    count, size = context.limit.shape
    with jax.named_scope("prefill"):
        _, keys = bagel.read(
            params,
            context,
            config=config.model,
            cache=bagel.init_cache(count, size, config=config.model),
            key_segment=context.segment,
        )
    return dataclasses.replace(_begin(numbers, context, config, return_logits), cache=keys)


@jax.named_scope("admit")
def _with_new(lanes: Lanes, new: Lanes, lane: Int[Array, "D g"]) -> Lanes:
    """`lanes` with `new` in the places `lane`; b and more are dropped. The steps go on."""
    updates = {
        field.name: jax.tree.map(
            lambda x, value: _put(x, lane, value),
            getattr(lanes, field.name),
            getattr(new, field.name),
        )
        for field in dataclasses.fields(Lanes)
        if field.name not in ("step", "cache")
    }
    cache = jax.tree.map(lambda x, value: _put_keys(x, value, lane), lanes.cache, new.cache)
    return dataclasses.replace(lanes, **updates, cache=cache)


def _keeps_decoding(queue: Queue, shares: _Shares) -> Bool[Array, ""]:
    """Whether to decode without new sequences: a shard that has some lacks free lanes."""
    wanted = jnp.minimum(shares.group, shares.sequences - queue.next)  # [D]
    free = _split(queue.lanes.done, shares.shards).sum(axis=1)
    return ~jnp.all(queue.lanes.done) & ((wanted.sum() == 0) | jnp.any(free < wanted))


def _put_keys(
    cache: Float[Array, "L _ S K h"], new: Float[Array, "L _ T K h"], lane: Int[Array, "D g"]
) -> Float[Array, "L _ S K h"]:
    """Writes the keys of contexts to the lanes of a cache, into its first T columns.

    This is an explicit scatter, because a mapped update would transpose the cache to have the
    shards first.

    Args:
      cache: [L, D * b, S, K, h] with S >= T. new: [L, D * g, T, K, h].
      lane: int32 [D, g], lane within the shard's b lanes; b and more are dropped.
    Returns:
      The updated cache.
    """
    layers, _, columns, heads, width = cache.shape
    shards, group = lane.shape
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 3, 4, 5),
        inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(2,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    written = jax.lax.scatter(
        cache.reshape(layers, shards, -1, columns, heads, width),
        lane[:, :, None],
        new.reshape(layers, shards, group, -1, heads, width),
        numbers,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
    return written.reshape(cache.shape)
