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

Rows end at different lengths, and a row that is done still costs its place in every step. With fewer slots than rows
(`RolloutConfig.slots`) the rows wait in a queue, and slots that are free take the next ones, all in the same program:

  slot 0   aaaaaa ccccccccc          step by step, every slot holds one row
  slot 1   bbbbbbbbbbb ddddd

Keys go to the same column in all slots, so that a step writes one column of the cache; the columns behind the
context are a ring of `max_new_tokens`, and no row lives longer than that:

  cache of a slot   [ context 0 .. T-1 | ring, at T + (step mod budget) ]

Letters: B slots, Q rows (B = Q without a queue), T context slots, N completion tokens, V vocabulary; D shards.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.marker import Marker as Marker
from opsd_jax.method_config import RolloutConfig
from opsd_jax.model import bagel

STOP_BUDGET, STOP_EOS = 0, 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "mask",
        "logprobs",
        "num_skips",
        "stop",
        "fed",
        "fed_sampled",
        "num_fed",
        "ended",
    ],
    meta_fields=[],
)
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
    ended: int32 [B], decoding steps of the whole call that had run when the row was done; None if not sampled here.
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


def relayout_program(mesh, params, dtype: str):
    """A function that lays trained parameters out for the sampler: in the rollout layout and the compute dtype, without
    the parameters of image generation.

    Args:
      params: arrays or ShapeDtypeStructs, laid out as the arguments of the returned function will be.
    """
    program = sharding.relayout_program(
        mesh,
        params_lib.understanding(params),
        "rollout",
        cast=lambda tree: params_lib.in_compute_dtype(tree, dtype),
    )
    return lambda params: program(params_lib.understanding(params))


def utilisation(trajectory: Trajectory, slots: int = 0):
    """Share of the decoding steps' places that held a row which was not done. slots: `RolloutConfig.slots`."""
    rows = trajectory.num_fed.shape[0]
    return trajectory.num_fed.sum() / (min(slots or rows, rows) * trajectory.ended.max())


def _restrict(logits, config):
    """Sampling logits float32 [B, V] after temperature, top-k and top-p; excluded entries are -inf."""
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


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config", "return_logits"))
def sample(params, context, rng, *, config: RolloutConfig, return_logits: bool = False):
    """Samples one completion a row.

    What a row draws depends on `rng` and its number alone, not on its neighbours, on slots or on devices.

    Args:
      params: the model's dict. context: Context [Q, T] (rows may differ in length). rng: a PRNG key.
    Returns:
      Trajectory; with `return_logits` (Trajectory, logits float32 [Q, F, V] of every fed token).
    Raises:
      ValueError: the rows do not divide into config.shards.
    """
    model, budget = config.model, config.max_new_tokens
    queued, slots = context.positions.shape
    if not config.slots or config.slots >= queued:  # every row has its slot
        state = _begin(jnp.arange(queued), context, config, return_logits)
        cache = bagel.init_cache(queued, slots + budget, config=model)
        _, state["cache"] = bagel.read(
            params, context, config=model, cache=cache, key_segment=state["segment"]
        )
        step = functools.partial(_step, params, rng, config, slots)
        state = jax.lax.while_loop(lambda s: ~jnp.all(s["done"]), step, state)
        return _result(state, budget)
    return _sample_queue(params, context, rng, config, return_logits)


def _begin(rows, context, config, return_logits):
    """What the slots remember besides the cache before rows `rows`, int32 [B], with these contexts feed bos."""
    batch, budget = rows.shape[0], config.max_new_tokens
    zeros = jnp.zeros(batch, jnp.int32)
    out = {
        "tokens": jnp.zeros((batch, budget - 1), jnp.int32),
        "logprobs": jnp.zeros((batch, budget - 1)),
        "fed": jnp.zeros((batch, budget), jnp.int32).at[:, 0].set(config.bos),
        "fed_sampled": jnp.zeros((batch, budget), bool),
    }
    if return_logits:
        out["logits"] = jnp.zeros((batch, budget, config.model.llm.vocab_size))
    return {
        "step": jnp.int32(0),
        "row": rows,
        "t": zeros,
        "token": zeros + config.bos,
        "out": out,
        "position": jnp.asarray(context.next_position),
        "segment": jnp.pad(context.segment, ((0, 0), (0, budget))),
        "done": jnp.zeros(batch, bool),
        "stop": zeros,
        "inject": zeros,
        "marker": zeros,
        "skips": zeros,
        "count": zeros,
        "num_fed": zeros + 1,
        "ended": zeros,
    }


def _step(params, rng, config, slots, state):
    """Feeds one token in every slot and draws the next. slots: T, where the ring begins."""
    model, budget = config.model, config.max_new_tokens
    t, token, done, inject = state["t"], state["token"], state["done"], state["inject"]
    table = jnp.asarray(config.marker.table)
    seen = table.shape[0] - 1

    column = slots + state["step"] % budget
    segment = jax.lax.dynamic_update_slice_in_dim(
        state["segment"], jnp.ones_like(t)[:, None], column, axis=1
    )
    x = bagel.embed_tokens(params, token[:, None], config=model)
    # All keys of the segment are in the past: those of the row before were taken out when its slot was given away.
    hidden, cache = bagel.forward(
        params,
        x,
        (state["position"] + t)[:, None],
        jnp.full((1, 1), segment.shape[1]),
        jnp.ones_like(t)[:, None],
        config=model,
        cache=state["cache"],
        offset=column,
        key_segment=segment,
    )
    raw = bagel.logits(params, hidden[:, 0])
    logits = raw
    if config.ban_marker:
        logits = jnp.where(table[state["marker"]] == seen, -jnp.inf, logits)
    logits = _restrict(logits, config)
    if config.greedy:
        drawn = jnp.argmax(logits, axis=-1)
    else:
        keys = jax.vmap(lambda row, t: jax.random.fold_in(jax.random.fold_in(rng, row), t))(
            state["row"], t
        )
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
    drawn = drawn.astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), drawn[:, None], axis=1)[:, 0]

    # What is fed next. A skip forces two tokens: eos at once, and after it (inject == 1) bos.
    used = t + 1
    ends = (drawn == config.eos) & (inject == 0)
    again = (
        ends
        & (state["skips"] < config.max_image_skips)
        & (budget - used > 1)
        & (state["marker"] == seen)
        & ~done
    )
    forced = jnp.where(again, config.eos, config.bos)
    is_forced = again | (inject == 1)
    stops = (ends & ~again) | (used == budget)
    over = done | stops
    content = ~(over | is_forced)
    token = jnp.where(over, 0, jnp.where(is_forced, forced, drawn))
    # out of bounds: dropped. Mapped over rows, or devices would exchange theirs at every token.
    written, fed = jnp.where(content, state["count"], budget), jnp.where(over, budget, used)
    write = jax.vmap(lambda x, column, value: x.at[column].set(value, mode="drop"))
    put = lambda name, column, value: write(state["out"][name], column, value)
    out = {
        "tokens": put("tokens", written, drawn),
        "logprobs": put("logprobs", written, logprob),
        "fed": put("fed", fed, token),
        "fed_sampled": put("fed_sampled", fed, content | again),
    }
    if "logits" in state["out"]:
        out["logits"] = put("logits", jnp.where(done, budget, t), raw)
    return {
        "step": state["step"] + 1,
        "row": state["row"],
        "t": jnp.where(done, t, used),
        "token": token,
        "cache": cache,
        "out": out,
        "position": state["position"],
        "segment": segment,
        "done": over,
        "stop": jnp.where(stops & ~done, jnp.where(ends, STOP_EOS, STOP_BUDGET), state["stop"]),
        "inject": jnp.where(again, 1, 0),
        "marker": jnp.where(
            content,
            table[state["marker"], drawn].astype(jnp.int32),
            jnp.where(is_forced, 0, state["marker"]),
        ),
        "skips": state["skips"] + again,
        "count": state["count"] + content,
        "num_fed": jnp.where(over, state["num_fed"], used + 1),
        "ended": jnp.where(stops & ~done, state["step"] + 1, state["ended"]),
    }


def _result(state, budget):
    out = state["out"]
    trajectory = Trajectory(
        tokens=out["tokens"],
        mask=jnp.arange(budget - 1) < state["count"][:, None],
        logprobs=out["logprobs"],
        num_skips=state["skips"],
        stop=state["stop"],
        fed=out["fed"],
        fed_sampled=out["fed_sampled"],
        num_fed=state["num_fed"],
        ended=state["ended"],
    )
    return (trajectory, out["logits"]) if "logits" in out else trajectory


# --- the queue -------------------------------------------------------------------------------------------------

_KEPT = ("out", "stop", "skips", "count", "num_fed", "ended")  # what a row leaves behind


def _sample_queue(params, context, rng, config, return_logits):
    """`sample` with fewer slots than rows: until all are done, take rows into free slots, then decode until there are
    enough free ones again. Of each shard, slots b = B / D, rows q = Q / D, group g."""
    model, budget = config.model, config.max_new_tokens
    (queued, slots), shards, batch = context.positions.shape, config.shards, config.slots
    if queued % shards:
        raise ValueError(
            f"{queued} rows cannot be shared by the {shards} batch shards of rollout.shards"
        )
    rows, own, group = queued // shards, batch // shards, min(config.group, batch) // shards
    first = jnp.arange(shards)[:, None] * rows  # number of a shard's first row
    split = lambda x, n: x.reshape(shards, n, *x.shape[1:])
    join = lambda x: x.reshape(-1, *x.shape[2:])
    pick = jax.vmap(lambda x, at: x[at])  # [D, n, ..], [D, g] -> [D, g, ..]
    put = jax.vmap(lambda x, at, value: x.at[at].set(value, mode="drop"))
    step = functools.partial(_step, params, rng, config, slots)

    def left(state):
        return rows - state["next"]  # [D], rows that wait

    def free(state):
        return split(state["done"], own).sum(axis=1)  # [D]

    def harvest(state):
        """Copies what the slots hold of their rows; a row that is not done is copied again later."""
        at = split(state["row"], own) - first  # an empty slot has row Q or more: dropped
        at = jnp.where((at >= 0) & (at < rows), at, rows)
        kept = {name: state[name] for name in _KEPT}
        return jax.tree.map(
            lambda x, new: join(put(split(x, rows), at, split(new, own))), state["results"], kept
        )

    def admit(state):
        """Takes up to `group` rows a shard into free slots."""
        results, waits = harvest(state), split(state["done"], own)
        slot = jnp.argsort(~waits, axis=1)[:, :group]  # stable: free slots first
        row = state["next"][:, None] + jnp.arange(group)
        takes = jnp.take_along_axis(waits, slot, axis=1) & (row < rows)
        slot = jnp.where(takes, slot, own)  # out of bounds: dropped
        some = jax.tree.map(
            lambda x: join(pick(split(jnp.asarray(x), rows), jnp.minimum(row, rows - 1))), context
        )
        _, read = bagel.read(
            params,
            some,
            config=model,
            cache=bagel.init_cache(shards * group, slots, config=model),
            key_segment=some.segment,
        )
        new = _begin(join(first + row), some, config, return_logits)
        del new["step"]
        old = {name: state[name] for name in new}
        taken = jax.tree.map(
            lambda x, value: join(put(split(x, own), slot, split(value, group))), old, new
        )
        cache = jax.tree.map(lambda x, value: _put_keys(x, value, slot), state["cache"], read)
        return {
            **state,
            **taken,
            "cache": cache,
            "results": results,
            "next": state["next"] + takes.sum(axis=1),
        }

    def decodes(state):
        """Whether to go on without new rows: a shard that could use some has not enough free slots yet."""
        wanted = jnp.minimum(group, left(state))
        return ~jnp.all(state["done"]) & ((wanted.sum() == 0) | jnp.any(free(state) < wanted))

    empty = jax.tree.map(lambda x: jnp.repeat(x[:1], batch, axis=0), context)
    state = _begin(jnp.full(batch, queued), empty, config, return_logits)
    state |= {
        "done": jnp.ones(batch, bool),
        "next": jnp.zeros(shards, jnp.int32),
        "cache": bagel.init_cache(batch, slots + budget, config=model),
    }
    state["results"] = jax.tree.map(
        lambda x: jnp.zeros((queued, *x.shape[1:]), x.dtype), {name: state[name] for name in _KEPT}
    )
    state = jax.lax.while_loop(
        lambda s: ~jnp.all(s["done"]) | jnp.any(left(s) > 0),
        lambda s: jax.lax.while_loop(decodes, lambda s: {**s, **step(s)}, admit(s)),
        state,
    )
    return _result(harvest(state), budget)


def _put_keys(cache, new, slot):
    """Writes keys of contexts, new [L, D * g, T, K, h], to the slots of a cache [L, D * b, S, K, h], S >= T.

    slot: int32 [D, g], of the shard's b; b and more are dropped. Spelled out because a mapped update would move the
    shards to the front, and with them the cache.
    """
    layers, _, columns, heads, width = cache.shape
    shards, group = slot.shape
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 3, 4, 5),
        inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(2,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    found = jax.lax.scatter(
        cache.reshape(layers, shards, -1, columns, heads, width),
        slot[:, :, None],
        new.reshape(layers, shards, group, -1, heads, width),
        numbers,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
    return found.reshape(cache.shape)
