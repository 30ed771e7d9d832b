"""Floating point operations of a traced program, counted in its jaxpr."""

import math

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr, trips: tuple[int, ...] = (1,)) -> int:
    """Floating point operations of all matrix products and convolutions, on all devices together.

    A scan counts its body as often as it runs, a kernel its body for every block of its grid (also
    those that it skips); of the branches of a condition the largest counts. Recomputation counts,
    because it is in the jaxpr.

    trips: how often a `while` loop runs, from the outermost inwards; see `programs.Program`.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, []
        deeper = trips[1:] or trips if name == "while" else trips
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                item = getattr(item, "jaxpr", item)  # of a closed one
                if hasattr(item, "eqns"):
                    inner.append(matmul_flops(item, deeper))
        if name == "dot_general":
            total += _dot_flops(eqn)
        elif name == "conv_general_dilated":
            total += _convolution_flops(eqn)
        body = max(inner, default=0) if name == "cond" else sum(inner)
        total += _repetitions(eqn, trips) * body
    return total


def _dot_flops(eqn: core.JaxprEqn) -> int:
    contracted = eqn.params["dimension_numbers"][0][0]
    return (
        2
        * math.prod(eqn.outvars[0].aval.shape)
        * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    )


def _convolution_flops(eqn: core.JaxprEqn) -> int:
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features


def _repetitions(eqn: core.JaxprEqn, trips: tuple[int, ...]) -> int:
    """How often an equation runs the jaxprs in its parameters."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "while":
            return trips[0]
        case "shard_map":  # its body is what one device does along these axes
            sizes = eqn.params["mesh"].shape
            return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
        case "pallas_call":  # its body is one block of its grid
            return math.prod(eqn.params["grid_mapping"].grid)
    return 1
