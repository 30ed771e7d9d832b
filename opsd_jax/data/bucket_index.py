"""The bucket of every example of a task, computed once and kept in the workdir.

A bucket is an entry of `config.data.buckets`: static sizes that contexts are padded to. An example
goes to the first bucket that it fits completely, in every role.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from opsd_jax.config import DataConfig
from opsd_jax.context import TooLongError
from opsd_jax.data import packing
from opsd_jax.data.examples import Examples
from opsd_jax.data.packing import Packer
from opsd_jax.inputs import json_files
from opsd_jax.runtime import files


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

    The index is read from <workdir>/buckets-<task>-<digest>.npy, or computed and written there.
    With data.on_too_long = "skip", examples that fit no bucket have -1, and <workdir>/too_long.json
    holds their pids.

    visual_thoughts: what the teacher sees, one of `context.VISUAL_THOUGHTS`.

    Raises TooLongError, with the pids of the first ones, if examples fit no bucket and are not
    skipped.
    """
    task, size = examples.tasks[source], len(examples.sources[source])
    primary, digest = jax.process_index() == 0, _digest(examples, packer, source, visual_thoughts)
    path = os.path.join(workdir, f"buckets-{task}-{digest}.npy")
    index = _read(path, size)
    is_new = index is None
    if index is None:

        def bucket_of(n: int) -> int:
            partner = None
            if visual_thoughts == "swap":
                partner = examples.measured(source, examples.partner_of(source, n))
            return packer.bucket(examples.measured(source, n), visual_thoughts, partner)

        with ThreadPoolExecutor(data.threads) as pool:
            index = np.fromiter(pool.map(bucket_of, range(size)), np.int32, size)
    left_out = [examples.sources[source][int(n)].pid for n in np.flatnonzero(index < 0)]
    if left_out and data.on_too_long == "fail":
        needs = packer.needs(examples.measured(source, int(np.argmin(index))))
        kinds = packer.too_small(needs) or ["teacher"]  # of other visual thoughts than the true
        small = " and ".join(f"config.data.buckets.{kind}" for kind in kinds)
        raise TooLongError(
            f"{len(left_out)} examples of {task} fit no bucket, first {left_out[:5]}: enlarge "
            f"{small}, or set config.data.on_too_long=skip, which names them in too_long.json. "
            f"{packing.SIZES}"
        )
    if is_new and primary:
        with files.replacing(path) as file:
            np.save(file, index, allow_pickle=False)
    if left_out and primary:
        report = os.path.join(workdir, "too_long.json")
        known = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # there is none, or it is damaged
            known = json_files.read(report, fix="delete it, and it is written again")
        files.write_json(report, known | {task: left_out})
    return index


def _read(path: str, size: int) -> np.ndarray | None:
    """The index in a file; None if there is none, or a power failure damaged it."""
    if os.path.exists(path):
        with contextlib.suppress(ValueError, EOFError):
            index = np.load(path, allow_pickle=False)
            if index.shape == (size,):
                return index
    return None


def _digest(examples: Examples, packer: Packer, source: int, visual_thoughts: str) -> str:
    """Digest of everything that the buckets of a source's examples depend on."""
    vocabulary = hashlib.blake2b(b"\0".join(packer.tokenizer.token_bytes)).hexdigest()
    preprocess, generation = examples.preprocess, None
    if preprocess.vae_resize:
        generation = {"on": True, **dataclasses.asdict(packer.generation)}
        generation |= generation.pop("vae")
    facts = json.dumps(
        [
            examples.tasks[source],
            len(examples.sources[source]),
            str(examples.sources[source].split),
            examples.digests[source],
            vocabulary,
            dataclasses.asdict(packer.buckets),
            {**dataclasses.asdict(preprocess.resize), "transparency": preprocess.transparency},
            dataclasses.asdict(packer.prompts),
            visual_thoughts,
            generation,
        ],
        sort_keys=True,
    )
    return hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()
