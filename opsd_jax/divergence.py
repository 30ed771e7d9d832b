"""Token-level divergences between teacher and student, their signals, and cross entropy.

`generalized_jsd` on logits is the definition (official: scripts/visual_opsd/opsd_loss.py). Training
calls `chunked`, which computes the same from hidden states and output heads and never holds the
logits of more than one chunk of tokens: for 8,192 tokens and a vocabulary of 152,064, full logits
would take 29.9 GiB.

Axes: B batch, N completion tokens, D embedding, V vocabulary, K entries kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from opsd_jax import sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.inputs import checks

KINDS = ("jsd", "sampled_reverse_kl")
SUPPORTS = ("teacher", "student", "union")
_KEPT = "the teacher's largest entries"  # the name of values that `jax.checkpoint` saves
_NEVER = -1e30  # a logit of an entry that does not count, finite so that differences are


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """Which divergence is computed, and how.

    kind: "jsd", or "sampled_reverse_kl", the policy-gradient form on the sampled tokens ("tinker"
      in the official code).
    beta: 0 is forward KL(teacher || student), 1 reverse KL(student || teacher). Between them it is
      the generalised JSD beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S
      (paper Eq. 7). Both ends are separate cases, as in the official code: the limits of the
      mixture form are 0.
    temperature: divides both logits. The result is multiplied by its square, except in the sampled
      form.
    top_k: both sides are restricted to the top_k entries of `support` and renormalised. 0 keeps
      the whole vocabulary.
    support: whose entries of highest probability are kept: "teacher" (official), "student", or
      "union", those that are among the top_k of either side.
    tail: whether one more entry holds all other probability on each side, instead of
      renormalising. The official code has no such entry.
    clip: upper bound, 0 for none.
    clip_unit: "entry" bounds every (token, vocabulary) entry before the sum over the vocabulary,
      which is what the official code does, whatever it calls it. "token" bounds the sum.
    chunk: number of tokens per sequence whose logits exist at once in `chunked`: the logits of one
      side if they are restricted to the top_k of the teacher, else of both.
    """

    kind: Annotated[str, KINDS] = "jsd"
    beta: Annotated[float, "[0, 1]"] = 0.5
    temperature: Annotated[float, checks.TEMPERATURE] = 1.0
    top_k: Annotated[int, "[0, inf)"] = 256
    support: Annotated[str, SUPPORTS] = "teacher"
    tail: bool = False
    clip: Annotated[float, "[0, inf)"] = 0.05
    clip_unit: Annotated[str, ("entry", "token")] = "entry"
    chunk: Annotated[int, "[1, inf)"] = 192

    def __post_init__(self):
        checks.fields(self, "divergence")
        if self.support != "teacher" and (self.kind != "jsd" or not self.top_k):
            raise ValueError(
                f"divergence.support is {self.support!r}, but with divergence.kind {self.kind!r} "
                f"and divergence.top_k {self.top_k} the whole vocabulary is compared: use "
                "divergence.kind='jsd' with a top_k, or divergence.support='teacher'"
            )


class _Teacher(NamedTuple):
    """What the divergence needs of the teacher's logits, after the temperature.

    Attributes:
      entries: float32 [..., K], the kept entries; all V of them without top_k.
      places: int32 [..., K], their places in the vocabulary. None without top_k, as the next two.
      total: float32 [..., 1], logsumexp of all entries.
      counts: bool [..., K], which entries count: the union of two supports names some entries
        twice. None if all count.
    """

    entries: AnyArray
    places: AnyArray | None = None
    total: AnyArray | None = None
    counts: AnyArray | None = None


def _of_teacher(logits, config, student_logits=None) -> _Teacher:
    """What the divergence needs of the teacher's logits [..., V].

    Args:
      student_logits: [..., V], needed unless config.support is "teacher".
    """

    def scaled(x):
        return (x / config.temperature).astype(jnp.float32)

    if not _restricts(config, logits.shape[-1]):
        return _Teacher(scaled(logits))
    total = jax.nn.logsumexp(scaled(logits), axis=-1, keepdims=True)
    if config.support == "teacher":
        top, index = _largest(logits, config.top_k)
        return _Teacher(scaled(top), index, total)
    _, index = _largest(jax.lax.stop_gradient(student_logits), config.top_k)
    counts = None
    if config.support == "union":
        both = [_largest(logits, config.top_k)[1], index]
        index = jnp.sort(jnp.concatenate(both, axis=-1), axis=-1)
        counts = jnp.diff(index, axis=-1, prepend=-1) > 0  # the second of two equals does not
    entries = scaled(jnp.take_along_axis(logits, index, axis=-1))
    target = _Teacher(entries, index, total, counts)
    return jax.tree.map(lambda x: checkpoint_name(x, _KEPT), target)


def _largest(logits, count: int):
    """The largest entries of [..., V] and their indices, [..., count] each."""
    # Two-dimensional like XLA's own top-k, which copies all logits of another shape first.
    largest = jax.lax.top_k(logits.reshape(-1, logits.shape[-1]), count)
    return tuple(x.reshape(*logits.shape[:-1], count) for x in largest)


def _restricts(config, vocabulary: int) -> bool:
    """Whether top_k leaves out a part of the vocabulary."""
    return 0 < config.top_k < vocabulary


def _log_probs(student_logits, teacher, config):
    """Log probabilities on the kept entries, and the teacher's mass on them.

    Args:
      student_logits: [..., V].
      teacher: what `_of_teacher` returned.
    Returns:
      (log p_S [..., K], log p_T [..., K], mass [...]), float32. K is V without top_k, and one more
      with a tail.
    """
    student = (student_logits / config.temperature).astype(jnp.float32)
    if not _restricts(config, student.shape[-1]):
        return (
            jax.nn.log_softmax(student, axis=-1),
            jax.nn.log_softmax(teacher.entries, axis=-1),
            jnp.ones(student.shape[:-1], jnp.float32),
        )
    # All that the backward pass needs: with these saved, `over_chunks` does not compute the
    # student's logits again.
    own = checkpoint_name(jnp.take_along_axis(student, teacher.places, axis=-1), _KEPT)
    kept = [own, teacher.entries]
    if teacher.counts is not None:
        kept = [jnp.where(teacher.counts, x, _NEVER) for x in kept]
    total = [jax.nn.logsumexp(student, axis=-1, keepdims=True), teacher.total]
    inside = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in kept]
    mass = jnp.exp(inside[1] - total[1])[..., 0]
    if not config.tail:
        return kept[0] - inside[0], kept[1] - inside[1], mass
    # log(1 - mass), with the mass at most one float32 step below 1: for an empty tail the result is
    # very small, not -inf.
    tails = [jnp.log1p(-jnp.minimum(jnp.exp(i - t), 1 - 2.0**-24)) for i, t in zip(inside, total)]
    log_s, log_t = (
        jnp.concatenate([entries - of_all, tail], axis=-1)
        for entries, of_all, tail in zip(kept, total, tails)
    )
    return log_s, log_t, mass


def _entries(log_s, log_t, beta):
    """Contribution of every entry to the divergence, exactly 0 where both sides agree.

    With d = log p_S - log p_T, the mixture needs no sum of exponentials, which would round:
      d >= 0:  log m - log p_S = log1p(beta (e^-d - 1)),        log m - log p_T = d + that
      d <  0:  log m - log p_T = log1p((1 - beta) (e^d - 1)),   log m - log p_S = -d + that
    """
    p_s, p_t, d = jnp.exp(log_s), jnp.exp(log_t), log_s - log_t
    if beta == 0:
        return -p_t * d
    if beta == 1:
        return p_s * d
    ahead = d >= 0
    common = jnp.log1p(jnp.where(ahead, beta, 1 - beta) * jnp.expm1(jnp.where(ahead, -d, d)))
    return -beta * p_t * (jnp.where(ahead, d, 0) + common) - (1 - beta) * p_s * (
        jnp.where(ahead, 0, -d) + common
    )


def generalized_jsd(
    student_logits: Float[AnyArray, "*any V"],
    teacher_logits: Float[AnyArray, "*any V"],
    config: DivergenceConfig,
) -> tuple[Float32[Array, "*any"], dict[str, Float32[Array, "*any"]]]:
    """Divergence at each token, from logits (paper Eq. 7).

    No gradient flows to the teacher, and clipped entries give no gradient. For beta 0 or 1 entries
    may be negative. Because they are only bounded from above, the value of a token can then be
    negative.
    Official: scripts/visual_opsd/opsd_loss.py.

    Args:
      student_logits, teacher_logits: [..., V].
    Returns:
      (values float32 [...], signals). The signals are float32 [...] without gradient:
      teacher_topk_mass; clip_fraction, the share of entries (or of tokens) above the bound;
      student_entropy and teacher_entropy in nats, over the kept entries, after the temperature.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {list(student_logits.shape)} and teacher_logits "
            f"{list(teacher_logits.shape)}: give equal shapes"
        )
    teacher = _of_teacher(jax.lax.stop_gradient(teacher_logits), config, student_logits)
    return _divergence(student_logits, teacher, config)


def _divergence(student_logits, teacher, config):
    """`generalized_jsd` of student logits [..., V] and what `_of_teacher` returned."""
    log_s, log_t, mass = _log_probs(student_logits, teacher, config)
    entries = _entries(log_s, log_t, config.beta)
    clipped = jnp.zeros(entries.shape[:-1], jnp.float32)
    if config.clip and config.clip_unit == "entry":
        clipped = jnp.mean(entries > config.clip, axis=-1, dtype=jnp.float32)
        if teacher.counts is not None:
            left_out = jnp.sum(~teacher.counts, axis=-1)
            clipped *= entries.shape[-1] / (entries.shape[-1] - left_out)
        entries = jnp.minimum(entries, config.clip)
    values = jnp.sum(entries, axis=-1)
    if config.clip and config.clip_unit == "token":
        clipped = (values > config.clip).astype(jnp.float32)
        values = jnp.minimum(values, config.clip)

    def entropy(log_p):
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    signals = {
        "teacher_topk_mass": mass,
        "clip_fraction": clipped,
        "student_entropy": entropy(log_s),
        "teacher_entropy": entropy(log_t),
    }
    return values * config.temperature**2, jax.lax.stop_gradient(signals)


def sampled_reverse_kl(
    student_logits: Float[AnyArray, "*any V"],
    teacher_logits: Float[AnyArray, "*any V"],
    tokens: Int[AnyArray, "*any"],
    temperature: float = 1.0,
) -> Float32[Array, "*any"]:
    """-(log p_T(x) - log p_S(x)) log p_S(x) at the sampled tokens x, the bracket held constant.

    Its gradient is the policy gradient of the reverse KL. It uses the full vocabulary, without
    top-k, clip, or the square of the temperature. Official: "tinker".

    Args:
      student_logits, teacher_logits: [..., V].
      tokens: int [...], the sampled tokens.
      temperature: divides both logits.
    Returns:
      float32 [...].
    """

    def log_prob(logits):
        return -cross_entropy(logits / temperature, tokens)

    log_s, log_t = log_prob(student_logits), log_prob(jax.lax.stop_gradient(teacher_logits))
    return -jax.lax.stop_gradient(log_t - log_s) * log_s


def _of_kind(student_logits, teacher_logits, tokens, config):
    """(values, signals) of the divergence `config.kind` from logits [..., V]: each kind is here.

    All kinds have the signals of `generalized_jsd`, so that runs can be compared.
    """
    if config.kind == "sampled_reverse_kl":
        _, signals = generalized_jsd(student_logits, teacher_logits, config)
        values = sampled_reverse_kl(student_logits, teacher_logits, tokens, config.temperature)
        return values, signals
    return generalized_jsd(student_logits, teacher_logits, config)


def cross_entropy(
    logits: Float[AnyArray, "*any V"], labels: Int[AnyArray, "*any"]
) -> Float32[Array, "*any"]:
    """-log softmax(logits)[labels], in nats.

    Args:
      logits: [..., V]. They are cast to float32.
      labels: int [...].
    Returns:
      float32 [...].
    """
    logits = logits.astype(jnp.float32)
    return (
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    )


def token_weights(
    mask: Bool[AnyArray, "B N"] | Float32[AnyArray, "B N"], reduction: str
) -> Float32[Array, "B N"]:
    """Weight of each token in the loss; the weights add up to 1 over the batch (paper Eq. 7).

    Args:
      mask: bool [B, N], tokens that count; or float32 [B, N] of at least 0, how much each counts
        relative to the others.
      reduction: "token", all tokens have the same weight; or "completion", the mean over the tokens
        of each completion first, and then over completions.
    Returns:
      float32 [B, N].
    """
    checks.choice("reduction", reduction, ("token", "completion"))
    counted = jnp.asarray(mask, jnp.float32)
    least = 1 if mask.dtype == bool else jnp.finfo(jnp.float32).tiny  # to divide by
    if reduction == "token":
        return counted / jnp.maximum(jnp.sum(counted), least)
    return counted / jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), least) / mask.shape[0]


def over_chunks(function: Callable, heads: Any, arrays: Sequence[Any], chunk: int) -> Any:
    """function(heads, *arrays) over chunks of axis 1, with rematerialisation.

    A chunk's logits are therefore never saved. Values named _KEPT are saved, K numbers per token.
    Each device computes its own part of the batch.

    Args:
      heads: tree of arrays [D, V] that all tokens share.
      arrays: trees of [B, N, ...].
      chunk: upper bound of the number of tokens per sequence in a chunk. Chunks have equal sizes
        (1,025 tokens by 192 are 6 chunks of 171), and the padding of the last one is cut off again.
    Returns:
      tree of [B, N, ...].
    """
    n = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-n // chunk)
    size = -(-n // count)
    keep = jax.checkpoint_policies.save_only_these_names(_KEPT)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - n)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def loop(heads, *arrays):
        if count == 1:
            return jax.checkpoint(function, policy=keep)(heads, *arrays)
        body = jax.checkpoint(
            lambda _, xs: (None, function(heads, *xs)), policy=keep, prevent_cse=False
        )
        _, out = jax.lax.scan(body, None, jax.tree.map(split, arrays))
        return jax.tree.map(
            lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :n], out
        )

    return sharding.shard_map_batch(loop, heads, *arrays)


def project(
    hidden: Float[AnyArray, "*any D"], head: Float[AnyArray, "D V"] | Int8[AnyArray, "D V"]
) -> Float32[Array, "*any V"]:
    """Logits of hidden states, computed in the dtype of the hidden states.

    Args:
      hidden: [..., D].
      head: [D, V]; of int8 without its scale.
    Returns:
      float32 [..., V].
    """
    return jnp.einsum("...d,dv->...v", hidden, head.astype(hidden.dtype)).astype(jnp.float32)


@jax.named_scope("divergence")
def chunked(
    student_hidden: Float[AnyArray, "B N D"],
    student_head: Float[AnyArray, "D V"],
    teacher_hidden: Float[AnyArray, "B N D"],
    teacher_head: Float[AnyArray, "D V"],
    labels: Int[AnyArray, "B N"],
    config: DivergenceConfig,
    with_ce: bool = True,
) -> tuple[Float32[Array, "B N"], Float32[Array, "B N"], dict[str, Float32[Array, "B N"]]]:
    """The divergence `config.kind` (`_of_kind`) from hidden states, chunk by chunk.

    Args:
      student_hidden, teacher_hidden: [B, N, D].
      student_head, teacher_head: [D, V].
      labels: int32 [B, N], the sampled tokens.
      with_ce: whether the cross entropy is computed. Otherwise it is 0.
    Returns:
      (values [B, N], cross entropy [B, N] of the student on the labels in nats, signals of [B, N]);
      all float32. Padding has values too: mask them.
    """
    teacher_hidden, teacher_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))

    def with_cross_entropy(logits, label, measured):
        values, signals = measured
        ce = cross_entropy(logits, label) if with_ce else jnp.zeros_like(values)
        return values, ce, signals

    def from_entries(head, hidden, label, teacher):
        logits = project(hidden, head)
        return with_cross_entropy(logits, label, _divergence(logits, teacher, config))

    def from_states(heads, hidden, label, hidden_t):
        logits = project(hidden, heads[0])
        measured = _of_kind(logits, project(hidden_t, heads[1]), label, config)
        return with_cross_entropy(logits, label, measured)

    restricted = _restricts(config, student_head.shape[1])
    if config.kind == "jsd" and config.support == "teacher" and restricted:
        # The teacher's K entries of all tokens are computed before any logits of the student exist.
        # This halves the memory.
        entries = over_chunks(
            lambda head, hidden: _of_teacher(project(hidden, head), config),
            teacher_head,
            (teacher_hidden,),
            config.chunk,
        )
        arrays = (student_hidden, labels, entries)
        return over_chunks(from_entries, student_head, arrays, config.chunk)
    arrays = (student_hidden, labels, teacher_hidden)
    return over_chunks(from_states, (student_head, teacher_head), arrays, config.chunk)


@jax.named_scope("cross_entropy")
def chunked_cross_entropy(
    hidden: Float[AnyArray, "B N D"],
    head: Float[AnyArray, "D V"],
    labels: Int[AnyArray, "B N"],
    chunk: int,
) -> tuple[Float32[Array, "B N"], Float32[Array, "B N"]]:
    """Cross entropy and top-1 hits from hidden states, chunk by chunk.

    Args:
      hidden: [B, N, D].
      head: [D, V].
      labels: int32 [B, N].
      chunk: see `over_chunks`.
    Returns:
      (cross entropy in nats, 1 where the largest logit is the label's and else 0), float32 [B, N]
      each.
    """

    def piece(head, h, label):
        logits = project(h, head)
        return cross_entropy(logits, label), (jnp.argmax(logits, axis=-1) == label).astype(
            jnp.float32
        )

    return over_chunks(piece, head, (hidden, labels), chunk)
