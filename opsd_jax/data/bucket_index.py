"""The bucket of every example of a task, computed once and kept beside the prepared data.

A bucket is an entry of `config.data.buckets`: static sizes that contexts are padded to. An example
goes to the first bucket that it fits completely, in every role. The index depends on the data, the
tokenizer and some settings; all of them are in the digest in its file's name, so that an index of
other data or settings is never read. Images are not decoded: their headers tell their sizes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.config import DataConfig
from opsd_jax.context import TooLongError
from opsd_jax.data import existing, packing
from opsd_jax.data.examples import Examples, Preprocessor
from opsd_jax.data.packing import Packer
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files
from opsd_jax.runtime.progress import Progress

_VERSION = 2  # part of the digest: raise it when `Packer.needs` counts otherwise
_LEFT_OUT, _UNKNOWN = -1, -2  # in the place of a bucket
_MANY = 1000  # examples: a progress bar is shown for more


def is_needed(data: DataConfig) -> bool:
    """Whether batches depend on the buckets of single examples.

    Otherwise there is one bucket, and packing refuses an example that does not fit.
    """
    return len(data.buckets.student) > 1 or data.on_too_long == "skip"


def bucket_index(
    workdir: str,
    examples: Examples,
    packer: Packer,
    source: int,
    *,
    visual_thoughts: str,
    data: DataConfig,
) -> np.ndarray:
    """Bucket of every example of a source, int32 [number of examples].

    The index is read from buckets-<digest>.npy in the folder of the task's prepared files, or
    computed and written there; in `workdir` where that folder is read-only. Of several processes
    the first one reads it; without a file each computes a part. With data.on_too_long = "skip",
    examples that fit no bucket have -1, and <workdir>/too_long.json holds their pids.

    Args:
      workdir: folder of the run; "" to write nothing there.
      visual_thoughts: what the teacher sees, one of `blocks.VISUAL_THOUGHTS`.
    Raises:
      TooLongError, with the pids of the first ones: examples fit no bucket and are not skipped.
      OSError: a new index can be written in neither folder.
    """
    task, size = examples.tasks[source], len(examples.sources[source])
    me, _ = _processes()
    paths: list[str] = []
    index = np.full(size, _UNKNOWN, np.int32)
    if me == 0:
        digest = _digest(examples, packer, source, visual_thoughts)
        folder = os.fspath(examples.sources[source].directory)
        paths = [os.path.join(folder, f"buckets-{digest}.npy")]
        if workdir:
            paths.append(os.path.join(workdir, f"buckets-{task}-{digest}.npy"))
        index = _read(task, paths, index)
    index = _of_first_process(index)
    is_new = size > 0 and index[0] == _UNKNOWN
    if is_new:
        index = _measure(examples, packer, source, visual_thoughts, data.threads)
    left_out = [examples.sources[source][int(n)].pid for n in np.flatnonzero(index == _LEFT_OUT)]
    if left_out and data.on_too_long == "fail":
        needs = packer.needs(examples.measured(source, int(np.argmin(index))))
        kinds = packer.too_small(needs) or ["teacher"]  # of other visual thoughts than the true
        small = " and ".join(f"config.data.buckets.{kind}" for kind in kinds)
        raise TooLongError(
            f"{len(left_out)} examples of {task} fit no bucket, first {left_out[:5]}: enlarge "
            f"{small}, or set config.data.on_too_long=skip, which names them in too_long.json. "
            f"{packing.SIZES}"
        )
    if me == 0:
        if is_new:
            _write(task, paths, index)
        if left_out and workdir:
            _name_left_out(workdir, task, left_out)
    return index


def make(config: ConfigDict, workdir: str = "") -> str:
    """Makes the indexes that a run and the arms that it starts need; says what is in them.

    Args:
      workdir: folder of the run; needed where config.data.dir is empty.
    Raises:
      ValueError, FileNotFoundError: as `existing.open_data`. TooLongError, OSError: as
        `bucket_index`.
    """
    found = {}
    for run in existing.runs(config):
        data = config_lib.data(run)
        if not is_needed(data):
            continue
        data_dir, packer = existing.open_data(run, workdir)
        for stage in run.stages:
            batches = config_lib.batches(run, stage)
            preprocess = Preprocessor.from_config(
                run, packer.tokenizer, generation=batches.generation
            )
            own = config_lib.data_of(run, stage)
            examples = Examples.open(own, data_dir, "train", preprocess, asked_by="training")
            for source, task in enumerate(examples.tasks):
                mode = batches.measured
                key = examples.sources[source].directory, _digest(examples, packer, source, mode)
                if key not in found:
                    index = bucket_index(
                        "", examples, packer, source, visual_thoughts=mode, data=data
                    )
                    found[key] = _counts(task, mode, index, len(data.buckets.student))
    if not found:
        return (
            "nothing to do: with one bucket of each kind and config.data.on_too_long=fail a run "
            "needs no index"
        )
    return "\n".join(found.values())


def _counts(task: str, mode: str, index: np.ndarray, buckets: int) -> str:
    """A line about an index."""
    each = ", ".join(f"{np.sum(index == n):,} in bucket {n}" for n in range(buckets))
    left_out = np.sum(index == _LEFT_OUT)
    more = f", {left_out:,} in none: training leaves them out" if left_out else ""
    return f"{task}, teacher sees {mode}: {len(index):,} examples, {each}{more}"


def _processes() -> tuple[int, int]:
    """(number of this process, how many there are).

    A command that joined no others does not ask JAX, which would open the devices: on a host of a
    pod that waits for the other hosts.
    """
    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def _of_first_process(index: np.ndarray) -> np.ndarray:
    """The index that the first process has: the others may not see its file yet."""
    return index if _processes()[1] == 1 else multihost_utils.broadcast_one_to_all(index)


def _measure(
    examples: Examples, packer: Packer, source: int, visual_thoughts: str, threads: int
) -> np.ndarray:
    """Computes an index. Of several processes each measures a part of the examples."""
    size, (me, count) = len(examples.sources[source]), _processes()

    def bucket_of(n: int) -> int:
        partner = None
        if visual_thoughts == "swap":
            partner = examples.measured(source, examples.partner_of(source, n))
        return packer.bucket(examples.measured(source, n), visual_thoughts, partner)

    def bucket_or_unknown(n: int) -> int:
        with contextlib.suppress(ValueError, OSError):  # raised below, by all processes
            return bucket_of(n)
        return _UNKNOWN

    mine = range(me, size, count)
    part = np.full(len(range(0, size, count)), _UNKNOWN, np.int32)
    shows = me == 0 and len(mine) > _MANY
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress(len(mine), f"measuring {examples.tasks[source]}", primary=shows) as bar,
    ):
        for n, bucket in enumerate(pool.map(bucket_of if count == 1 else bucket_or_unknown, mine)):
            part[n] = bucket
            bar.update(n + 1)
    if count == 1:
        return part
    index = multihost_utils.process_allgather(part).T.reshape(-1)[:size]
    # An example that one process could not measure: all processes try, and end with its error
    # instead of waiting for that one.
    for n in np.flatnonzero(index == _UNKNOWN):
        index[n] = bucket_of(int(n))
    return index


def _read(task: str, paths: Sequence[str], absent: np.ndarray) -> np.ndarray:
    """The index in the first of some files; `absent` if there is none, or it is damaged."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):
            index = np.load(path, allow_pickle=False)
            if index.shape == absent.shape and index.dtype == absent.dtype:
                logging.info("buckets of %d examples of %s: read from %s", len(index), task, path)
                return index
    return absent


def _write(task: str, paths: Sequence[str], index: np.ndarray) -> None:
    """Writes an index to the first of some files that can be written."""
    for path in paths:
        try:
            with files.replacing(path) as file:
                np.save(file, index, allow_pickle=False)
        except OSError:  # a folder of data may be read-only
            if path == paths[-1]:
                raise
        else:
            logging.info("buckets of %d examples of %s: made, in %s", len(index), task, path)
            return


def _name_left_out(workdir: str, task: str, pids: Sequence[str]) -> None:
    """Writes <workdir>/too_long.json, with the pids of a task in the place of its earlier ones."""
    report = os.path.join(workdir, "too_long.json")
    known = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # there is none, or it is damaged
        known = json_files.read(report, fix="delete it, and it is written again")
    files.write_json(report, known | {task: pids})


def _digest(examples: Examples, packer: Packer, source: int, visual_thoughts: str) -> str:
    """Digest of everything that the buckets of a source's examples depend on."""
    preprocess, generation = examples.preprocess, None
    if preprocess.vae_resize:
        generation = {"on": True, **dataclasses.asdict(packer.generation)}
        generation |= generation.pop("vae")
    facts = json.dumps(
        [
            _VERSION,
            examples.tasks[source],
            len(examples.sources[source]),
            str(examples.sources[source].split),
            examples.digests[source],
            packer.tokenizer.digest,
            dataclasses.asdict(packer.buckets),
            dataclasses.asdict(preprocess.resize),
            preprocess.patch_size,
            dataclasses.asdict(packer.prompts),
            visual_thoughts,
            generation,
            dataclasses.asdict(packer.names),
            dataclasses.asdict(preprocess.transforms),
        ],
        sort_keys=True,
    )
    return hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()
