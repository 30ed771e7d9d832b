"""Rates of matrix products and of memory, against the data sheet of the chip."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import sharding
from opsd_jax.doctor.result import OK, Result, judge, seconds_of
from opsd_jax.plan.bill import UTILIZATION
from opsd_jax.runtime.chips import Chip

LEAST_FLOPS = UTILIZATION  # share of the peak that `plan` counts on
LEAST_BANDWIDTH = 0.6  # share of the data sheet's; plan counts on all of it
_PRODUCTS, _COPIES = 16, 8  # in one program, so that starting it takes no part of the time


def products(
    devices: Sequence[jax.Device], chip: Chip | None, size: int, budget: float
) -> Iterator[Result]:
    """Rate of products of square matrices on all devices at once, in bfloat16 and in float32.

    A product of whole numbers, which is exact, is checked first. float32 is computed as the
    platform does by default (bfloat16 on a TPU, TF32 on a GPU), so it is not compared with a peak.

    Args:
      devices: of this process. chip: their data sheet; None if there is none.
      size: rows and columns of a matrix. budget: seconds of repeated runs.
    """
    yield exact_product(devices[0], size)
    for dtype in ("bfloat16", "float32"):
        rate = product_rate(devices, size, dtype, budget)
        peak = chip.flops if chip and dtype == "bfloat16" else None
        yield compare(f"matmul/{dtype}", rate, peak, "TFLOP/s", LEAST_FLOPS)


def exact_product(device: jax.Device, size: int) -> Result:
    """Whether a bfloat16 product of whole numbers, summed in float32, is exact."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-2, 3, (size, size)).astype(np.float32) for _ in range(2))
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    # The first and the last rows; a whole product would take NumPy seconds.
    rows = [*range(4), *range(size - 4, size)]
    found = multiply(*(jax.device_put(x.astype(jnp.bfloat16), device) for x in (a, b)))
    wrong = int(np.sum(np.asarray(found)[rows] != a[rows] @ b))
    return judge(
        "matmul/exact",
        wrong == 0,
        f"a product of whole numbers, {size} x {size}, is exact",
        f"{wrong} of {len(rows) * size} sums of whole numbers are wrong: the device is broken, or "
        "flags of the compiler change products",
        {"size": size, "wrong": wrong},
    )


def product_rate(devices: Sequence[jax.Device], size: int, dtype: str, budget: float) -> float:
    """Floating point operations per second of each device, all at work; the slowest counts."""
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
    place = sharding.batch(mesh)

    @functools.partial(jax.jit, out_shardings=place)
    def make(key):
        return jax.random.normal(key, (len(devices), size, size), jnp.dtype(dtype))

    @functools.partial(jax.jit, out_shardings=place)
    def run(x, w, count):
        # Divided by its root, w keeps the size of the values: its own have variance 1.
        w = w * jnp.asarray(size**-0.5, w.dtype)
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.matmul(x, w), x)

    x, w = make(jax.random.key(0)), make(jax.random.key(1))
    # The number is an argument: the compiler cannot unroll the loop.
    return 2 * size**3 * _PRODUCTS / seconds_of(lambda: run(x, w, _PRODUCTS), budget)


def bandwidth(
    devices: Sequence[jax.Device], chip: Chip | None, size: int, budget: float
) -> Iterator[Result]:
    """Rate at which all devices at once read and write an array; arguments as of `products`.

    size: bytes of the array of each device.
    """
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
    place = sharding.batch(mesh)

    @functools.partial(jax.jit, out_shardings=place)
    def run(x, count):  # an argument: unrolled, all passes would become one
        return jax.lax.fori_loop(0, count, lambda _, x: x * 0.5 + 1.0, x)

    ones = jax.jit(lambda: jnp.ones((len(devices), size // 4)), out_shardings=place)()
    rate = 2 * size * _COPIES / seconds_of(lambda: run(ones, _COPIES), budget)
    yield compare("bandwidth", rate, chip.bandwidth if chip else None, "TB/s", LEAST_BANDWIDTH)


def compare(name: str, rate: float, peak: float | None, unit: str, least: float) -> Result:
    """Whether a measured rate is the least share of the peak.

    Args:
      rate, peak: per second and device; peak is None if no data sheet has it.
      unit: of rate / 1e12. least: smallest share that is right.
    """
    values = {"per_second": rate, "peak": peak, "share": rate / peak if peak else None}
    shown = f"{rate / 1e12:.3g} {unit} a device"
    if peak is None:
        return Result(name, OK, f"{shown}; no peak to compare with", values)
    shown += f", {rate / peak:.0%} of {peak / 1e12:g}"
    return judge(
        name,
        rate >= least * peak,
        shown,
        f"{shown}, at least {least:.0%} expected: other programs use the device, or it is "
        "throttled by power or heat",
        values,
    )
