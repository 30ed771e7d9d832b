"""Which tokens of a completion count in the loss of OPSD, and how much.

By default every scored position of a completion counts alike, as in the paper. Weights are
relative: the loss is a weighted mean in the place of the mean, so that its scale does not change.

Letters: B batch, N scored positions of a completion, D embedding, V vocabulary.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from opsd_jax import divergence
from opsd_jax.array_types import AnyArray
from opsd_jax.inputs import checks

WEIGHTS = ("none", "teacher_entropy", "advantage")


@dataclasses.dataclass(frozen=True)
class PositionsConfig:
    """Which positions of a completion count. By default all do.

    Positions are counted from 0, the one that predicts the completion's first token.

    first_fraction: share of the positions of each completion that count, from its start; rounded up
      to a whole number of positions. A completion's length is its own, its end included.
    skip: number of positions at the start of each completion that do not count.
    limit: number of positions after which none counts; 0 for all. Training samples no further than
      that, so a completion need not be complete. Evaluation does not know of it.
    power: position n has the relative weight (n + 1) ** power: 0 weighs all alike, a negative power
      favours the start of a completion.
    """

    first_fraction: Annotated[float, "(0, 1]"] = 1.0
    skip: Annotated[int, "[0, inf)"] = 0
    limit: Annotated[int, "[0, inf)"] = 0
    # The sum over 10,240 positions stays in the range of float32.
    power: Annotated[float, "[-8, 8]"] = 0.0

    def __post_init__(self):
        checks.fields(self, "positions")
        if self.limit and self.skip >= self.limit:
            raise ValueError(
                f"positions.skip is {self.skip} with a positions.limit of {self.limit}, so that no "
                "position counts: skip fewer, or raise the limit"
            )


def counted(mask: Bool[AnyArray, "B N"], config: PositionsConfig) -> Bool[AnyArray, "B N"]:
    """The scored positions that count.

    A completion that is too short has none, and adds nothing to the loss.

    Args:
      mask: bool [B, N], scored positions of each completion. The last one is its length.
    Returns:
      bool [B, N].
    """
    if config == PositionsConfig(power=config.power):
        return mask
    index = jnp.arange(mask.shape[1])
    stop = config.limit or mask.shape[1]
    if config.first_fraction < 1:
        # A table, because a product of float32 may be rounded to above a whole number.
        products = np.round(config.first_fraction * np.arange(mask.shape[1] + 1), 9)
        length = jnp.max(jnp.where(mask, index + 1, 0), axis=1, keepdims=True)
        stop = jnp.minimum(stop, jnp.asarray(np.ceil(products), jnp.int32)[length])
    return mask & (index >= config.skip) & (index < stop)


def by_position(
    mask: Bool[AnyArray, "B N"], config: PositionsConfig
) -> Bool[AnyArray, "B N"] | Float32[Array, "B N"]:
    """Relative weights of the positions that count: (n + 1) ** power, 0 where the mask is False.

    Returns the mask itself where the power is 0.
    """
    if not config.power:
        return mask
    return jnp.where(mask, (1.0 + jnp.arange(mask.shape[1])) ** config.power, 0)


def advantage(
    hidden: Float[AnyArray, "B N D"],
    without: Float[AnyArray, "B N D"],
    head: Float[AnyArray, "D V"],
    chunk: int,
) -> Float32[Array, "B N"]:
    """KL(teacher with privileged content || teacher without) of each token, in nats.

    Over the whole vocabulary at temperature 1; not below 0. The logits of a chunk exist at a time.

    Args:
      hidden, without: the teacher's hidden states [B, N, D] after its own and after the student's
        context.
      head: its head [D, V]. chunk: see `divergence.over_chunks`.
    Returns:
      float32 [B, N].
    """
    exact = divergence.DivergenceConfig(beta=0.0, top_k=0, clip=0.0, chunk=chunk)
    labels = jnp.zeros(hidden.shape[:2], jnp.int32)  # of the cross entropy, which is not computed
    values, _, _ = divergence.chunked(without, head, hidden, head, labels, exact, with_ce=False)
    return jnp.maximum(values, 0)


def reweighted(
    weights: Float32[Array, "B N"], values: Float32[Array, "B N"], reduction: str
) -> Float32[Array, "B N"]:
    """Weights in a mean, times a value of each token.

    With the reduction "completion" the weights of a completion add up to what they did before (0
    where all values are 0). With "token" the sum is that of the whole batch, which a micro step
    does not know: the caller divides the loss and its gradient by the sum over all micro steps.

    Args:
      weights: [B, N], as `divergence.token_weights` returns them. values: [B, N], at least 0.
    """
    weighted = weights * values
    if reduction == "token":
        return weighted
    total = jnp.sum(weighted, axis=1, keepdims=True)
    return weighted * (jnp.sum(weights, axis=1, keepdims=True) / jnp.where(total > 0, total, 1))
