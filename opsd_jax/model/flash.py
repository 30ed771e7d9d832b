"""Attention for TPUs that never writes its scores to memory: a Pallas kernel.

Online softmax over blocks of keys in float32. The backward pass recomputes the scores from the one
number per query that the forward pass saves, the log of its sum of exponentials, as in
FlashAttention (Dao et al., 2022). Scores are transposed: keys along sublanes, queries along lanes.
Maxima, sums and other values per query are then rows [1, queries], and nothing is stored broadcast
over lanes.

The kernel reads a `masks.Plan` and evaluates the rule of `masks` one block at a time.

Letters: B batch, T queries, S keys, K kv heads, G query heads per kv head, h head_dim; I blocks of
q queries, J blocks of s keys. Not tested on a real TPU yet: see docs/performance/speed.md.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from opsd_jax import sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.model.masks import Plan

# Large but finite: -inf - -inf would be NaN for a query that has attended to no key yet.
_HIDDEN = -1e30


def attend(
    q: Float[AnyArray, "B T H h"],
    k: Float[AnyArray, "B S K h"],
    v: Float[AnyArray, "B S K h"],
    plan: Plan,
    interpret: bool = False,
) -> Float[Array, "B T H*h"]:
    """Softmax attention with grouped kv heads. The output of a query that attends to no key is 0.

    Args:
      q: [B, T, H, h]. k, v: [B, S, K, h] (query head n uses kv head n // G).
      plan: Plan of the mask.
      interpret: run the kernel as plain JAX on any backend; slow, for tests.
    Returns:
      [B, T, H * h].
    Raises:
      NotImplementedError: when compiled for another platform than TPU without `interpret`.
    """
    b, t, heads, h = q.shape
    kv = k.shape[2]

    def fill(x, count):
        return jnp.pad(x, ((0, 0), (0, count - x.shape[1]), (0, 0), (0, 0)))

    q = fill(q, plan.queries.shape[2]).reshape(b, -1, kv, heads // kv, h).transpose(0, 2, 3, 1, 4)
    k, v = (fill(x, plan.keys.shape[1]).transpose(0, 2, 1, 3) for x in (k, v))
    out = _attend(interpret, q, k, v, plan)
    return out.transpose(0, 3, 1, 2, 4)[:, :t].reshape(b, t, heads * h)


# --- the passes -----------------------------------------------------------------------------------
#
# Arrays of a pass: q, out and their gradients [B, K, G, T, h]; k and v [B, K, S, h]; float32 values
# per query [B, K, G, 1, T]: lse, the log of its sum of exponentials, and delta, the dot product of
# out and its gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret, q, k, v, plan):
    return _attend_forward(interpret, q, k, v, plan)[0]


def _attend_forward(interpret, q, k, v, plan):
    if not interpret:
        q = only_on(
            q,
            platform="tpu",
            message=(
                "model.attention is 'flash', a kernel for TPUs: on a CPU set 'dense' "
                "('flash_interpret' runs the kernel slowly, for tests), on a GPU 'dense' or 'cudnn'"
            ),
        )
    out, lse = _on_each_device(
        _forward, interpret, plan.queries, plan.keys, plan.key_blocks, q, k, v
    )
    return out, (q, k, v, plan, out, lse)


def _attend_backward(interpret, kept, gradient):
    q, k, v, plan, out, lse = kept
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)[:, :, :, None]
    rest = (q, k, v, gradient, lse, delta)
    dq = _on_each_device(
        _backward_queries, interpret, plan.queries, plan.keys, plan.key_blocks, *rest
    )
    dk, dv = _on_each_device(
        _backward_keys, interpret, plan.queries, plan.keys, plan.query_blocks, *rest
    )
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(queries, keys, q, k):
    """Transposed scores of a block, float32 [s, q], and the mask of the block, bool [s, q]."""
    row, column = queries[...], keys[...]
    seen = (column[:, 1:2] == row[1:2]) & (column[:, :1] < row[:1])
    if row.shape[0] > 2:
        seen &= (column[:, 2:3] == 0) | (column[:, 2:3] == row[2:3])
    return _product(k[...], q[...], 1, 1) * q.shape[-1] ** -0.5, seen


def _product(a, b, axis_a, axis_b):
    """Matrix product of a and b over the given axis of each, float32."""
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def _forward_kernel(resident, queries, keys, q, k, v, out, lse, top, total, mixed, *, place):
    step, last, computed = place(resident)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, _HIDDEN)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(computed)
    def _():
        scores, seen = _scores(queries, keys, q, k)
        new = jnp.maximum(
            top[...], jnp.max(jnp.where(seen, scores, _HIDDEN), axis=0, keepdims=True)
        )
        weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
        shrink = jnp.exp(top[...] - new)
        top[...] = new
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        mixed[...] = mixed[...] * shrink + _product(v[...], weights.astype(v.dtype), 0, 0)

    @pl.when(step == last)
    def _():
        some = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (mixed[...] / some).T.astype(out.dtype)
        lse[...] = top[...] + jnp.log(some)


def _gradients(queries, keys, q, k, v, gradient, lse, delta):
    """(attention weights, gradient of the scores), both transposed, float32 [s, q]."""
    scores, seen = _scores(queries, keys, q, k)
    weights = jnp.where(seen, jnp.exp(scores - lse[...]), 0.0)
    return weights, weights * (_product(v[...], gradient[...], 1, 1) - delta[...])


def _queries_kernel(resident, queries, keys, q, k, v, gradient, lse, delta, dq, total, *, place):
    step, last, computed = place(resident)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(computed)
    def _():
        _, change = _gradients(queries, keys, q, k, v, gradient, lse, delta)
        total[...] += _product(change.astype(k.dtype), k[...], 0, 0)

    @pl.when(step == last)
    def _():
        dq[...] = (total[...] * q.shape[-1] ** -0.5).astype(dq.dtype)


def _keys_kernel(
    resident, queries, keys, q, k, v, gradient, lse, delta, dk, dv, total_k, total_v, *, place
):
    step, last, computed = place(resident)

    @pl.when(step == 0)
    def _():
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)

    @pl.when(computed)
    def _():
        weights, change = _gradients(queries, keys, q, k, v, gradient, lse, delta)
        total_v[...] += _product(weights.astype(gradient.dtype), gradient[...], 1, 0)
        total_k[...] += _product(change.astype(q.dtype), q[...], 1, 0)

    @pl.when(step == last)
    def _():
        dk[...] = (total_k[...] * q.shape[-1] ** -0.5).astype(dk.dtype)
        dv[...] = total_v[...].astype(dv.dtype)


def _call(kernel, inputs, outputs, scratch, *, over_keys, interpret):
    """Runs one pass.

    The last axis of the grid is summed in scratch memory:
      over keys     (B, K * G, I, J)     step: the key block
      over queries  (B, K, J, G * I)     step: head of the group * I + query block

    Args:
      inputs: queries, keys, resident blocks, q, k, v; in backward passes also gradient, lse, delta.
      outputs: (layout, ShapeDtypeStruct) of each output; layouts are "query", "key" and "row".
      scratch: layout of each scratch array. over_keys: whether the pass is over keys or queries.
    """
    queries, keys, resident, q, k, *_ = inputs
    batch, kv, group, _, h = q.shape
    count_i, count_j = resident.shape[1:] if over_keys else resident.shape[:0:-1]
    size_q, size_s = queries.shape[2] // count_i, keys.shape[1] // count_j
    grid = (
        (batch, kv * group, count_i, count_j)
        if over_keys
        else (batch, kv, count_j, group * count_i)
    )
    # number of blocks that the steps go through, the length of a row of `resident`
    wide = count_j if over_keys else count_i

    over, rest = jax.lax.div, jax.lax.rem  # simpler code than for // and %, as nothing is negative

    def other(b, m, step, table):
        """The resident one of the blocks that the steps go through."""
        return table[(b * grid[2] + m) * wide + rest(step, wide)]

    def where(b, n, m, step, table):
        """(b, kv head, head of its group, query block, key block) of a step."""
        if over_keys:
            return b, over(n, group), rest(n, group), m, other(b, m, step, table)
        return b, n, over(step, wide), other(b, m, step, table), m

    def place(table):
        """(step, last step, whether this step computes), inside a kernel."""
        b, m, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        return step, grid[3] - 1, other(b, m, step, table) == rest(step, wide)

    def spec(shape, pick):
        return pl.BlockSpec(shape, lambda *at: pick(*where(*at)))

    of_queries = spec((None, queries.shape[1], size_q), lambda b, n, g, i, j: (b, 0, i))
    of_keys = spec((None, size_s, keys.shape[2]), lambda b, n, g, i, j: (b, j, 0))
    query = spec((None, None, None, size_q, h), lambda b, n, g, i, j: (b, n, g, i, 0))
    key = spec((None, None, size_s, h), lambda b, n, g, i, j: (b, n, j, 0))
    row = spec((None, None, None, 1, size_q), lambda b, n, g, i, j: (b, n, g, 0, i))
    sizes = {"query": query, "key": key, "row": row}
    memory = {
        "query": (size_q, h),
        "query_transposed": (h, size_q),
        "key": (size_s, h),
        "row": (1, size_q),
    }
    found = pl.pallas_call(
        functools.partial(kernel, place=place),
        out_shape=[shape for _, shape in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[of_queries, of_keys, query, key, key, query, row, row][: len(inputs) - 1],
            out_specs=[sizes[name] for name, _ in outputs],
            scratch_shapes=[pltpu.VMEM(memory[name], jnp.float32) for name in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",)
        ),
        interpret=interpret,
    )(resident.reshape(-1), queries, keys, *inputs[3:])
    return found


def _shape(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _row(q):
    return jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), jnp.float32)


def _forward(*inputs, interpret):
    q = inputs[3]
    return _call(
        _forward_kernel,
        inputs,
        [("query", _shape(q)), ("row", _row(q))],
        ["row", "row", "query_transposed"],
        over_keys=True,
        interpret=interpret,
    )


def _backward_queries(*inputs, interpret):
    q = inputs[3]
    return _call(
        _queries_kernel,
        inputs,
        [("query", _shape(q))],
        ["query"],
        over_keys=True,
        interpret=interpret,
    )[0]


def _backward_keys(*inputs, interpret):
    k, v = inputs[4:6]
    return _call(
        _keys_kernel,
        inputs,
        [("key", _shape(k)), ("key", _shape(v))],
        ["key", "key"],
        over_keys=False,
        interpret=interpret,
    )


def _on_each_device(function, interpret, *inputs):
    """Runs a pass on every device of the mesh of `sharding.mesh_context`, without communication.

    inputs: as in `_call`.

    Each device computes its sequences and its kv heads. An axis that its mesh axis does not
    divide is computed whole on every device. XLA cannot partition a kernel: without a mesh,
    compilation for several devices fails with a message that says so.
    """
    function, q = functools.partial(function, interpret=interpret), inputs[3]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*inputs)
    entries, kv_axis = sharding.batch(mesh).spec[0], sharding.LAYOUTS["train"]["kv"]
    entries = entries if q.shape[0] % sharding.batch_divisor(mesh) == 0 else None
    heads = kv_axis if q.shape[1] % mesh.shape[kv_axis] == 0 else None
    cut = PartitionSpec(entries, heads)
    specs = tuple(cut if x.ndim > 3 else PartitionSpec(entries) for x in inputs)
    return jax.shard_map(function, in_specs=specs, out_specs=cut, check_vma=False)(*inputs)


# --- supported platforms --------------------------------------------------------------------------


def only_on(x: jax.Array, *, platform: str, message: str) -> jax.Array:
    """Returns x unchanged, but cannot be lowered for another platform, nor differentiated.

    The default backend cannot be checked instead: programs are compiled on a CPU for a TPU topology
    that you do not have.

    Raises:
      NotImplementedError: with `message`, when lowered for a platform other than `platform`.
    """
    return _only_on.bind(x, platform=platform, message=message)


_only_on = Primitive("only_on")
_only_on.def_abstract_eval(lambda x, **_: x)


def _lower_only_on(ctx, x, *, platform, message):
    if set(ctx.platforms or ctx.module_context.platforms) - {platform}:
        raise NotImplementedError(message)
    return [x]


mlir.register_lowering(_only_on, _lower_only_on)
_only_on.def_impl(lambda x, **params: jax.jit(lambda x: _only_on.bind(x, **params))(x))
