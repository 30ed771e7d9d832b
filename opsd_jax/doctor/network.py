"""Checks of several processes: all-reduce between their devices, one shared workdir.

All processes call these functions, in the same order.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax import sharding
from opsd_jax.doctor.result import SKIPPED, Result, judge, seconds_of
from opsd_jax.runtime import files

_SHARED = ".doctor-shared"  # folder in the workdir, the same for all processes


def all_reduce(devices: Sequence[jax.Device], size: int) -> Iterator[Result]:
    """All-reduce of float32 over all devices: whether the sum is right, and how long it takes.

    Args:
      devices: `jax.devices()`. size: bytes that each device contributes.
    """
    count = len(devices)
    if count == 1:
        yield Result("network/all-reduce", SKIPPED, "one device")
        return
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=sharding.replicated(mesh))

    def numbered(width: int) -> jax.Array:
        """[devices, width], the row of device n filled with n + 1."""
        rows = np.array(sharding.local_batch_indices(mesh, count), np.float32) + 1
        return sharding.put_batch(mesh, np.repeat(rows[:, None], width, axis=1))

    small, large = numbered(1), numbered(size // 4)
    found = np.unique(np.asarray(total(large).addressable_data(0)))
    expected = count * (count + 1) / 2
    # Not as long as there is time: all processes must call it equally often.
    latency = seconds_of(lambda: total(small), float("inf"), 20)
    seconds = seconds_of(lambda: total(large), float("inf"), 5)
    rate = 2 * (count - 1) / count * size / seconds
    yield judge(
        "network/all-reduce",
        found.tolist() == [expected],
        f"{count} devices: {1e6 * latency:.0f} us for one number, {rate / 1e9:.2f} GB/s a device "
        f"for {size / 1e6:.0f} MB",
        f"the sum over {count} devices is {found[:3].tolist()}, not {expected:g}: a device or link "
        "is broken",
        {
            "devices": count,
            "latency_seconds": latency,
            "seconds": seconds,
            "bytes": size,
            "bytes_per_second": rate,
        },
    )


def shared_workdir(workdir: str) -> Iterator[Result]:
    """Whether all processes see one workdir: each finds the files that all others wrote."""
    me, count = jax.process_index(), jax.process_count()
    if count == 1:
        yield Result("network/workdir", SKIPPED, "one process")
        return
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(16), np.uint8)).tobytes()
    folder = pathlib.Path(workdir, _SHARED)
    with contextlib.suppress(OSError):  # the others would wait for ever for one that raises here
        files.write(folder / str(me), token)
    multihost_utils.sync_global_devices("doctor: written")
    seen = files_with(folder, token)
    found = multihost_utils.process_allgather(np.isin(np.arange(count), seen))
    if me == 0:
        shutil.rmtree(folder, ignore_errors=True)
    yield who_sees_whom(np.asarray(found).reshape(count, count), workdir)


def files_with(folder: pathlib.Path, token: bytes) -> list[int]:
    """Numbers of the processes whose files in the folder are listed and hold the token."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.isdigit() and (folder / name).read_bytes() == token:
                found.append(int(name))
    return sorted(found)


def who_sees_whom(seen: np.ndarray, workdir: str) -> Result:
    """Result of `shared_workdir`.

    seen: bool [processes, processes], whether the first sees the file of the second.
    """
    blind = [
        f"process {n} misses files of {np.flatnonzero(~row).tolist()}"
        for n, row in enumerate(seen)
        if not row.all()
    ]
    return judge(
        "network/workdir",
        not blind,
        f"all {len(seen)} processes see one {workdir}",
        f"{workdir} is not one folder for all processes: {'; '.join(blind[:3])}. Mount the same "
        "bucket or disk on all machines, without caches of listings",
        {"seen": seen.tolist()},
    )


def gather(text: str) -> list[str]:
    """The texts of all processes, by their numbers."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]
