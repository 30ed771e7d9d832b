"""Weights of a released folder, read shard by shard onto devices."""

import dataclasses
import functools
import math
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.inputs import paths
from opsd_jax.model import bagel
from opsd_jax.model.siglip import sincos_table
from opsd_jax.release import folders, safetensors_io
from opsd_jax.runtime import checkpoint
from opsd_jax.runtime import progress as progress_lib

GROUP = (
    1 << 28
)  # bytes of parameters that export takes from a checkpoint at a time (or one larger parameter)


@functools.cache
def abstract_params(config) -> types.MappingProxyType:
    """{path: shape and dtype} of the model's parameters."""
    shapes = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config))
    return types.MappingProxyType(params_lib.flatten(shapes))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One parameter and what fills it: tensors of files (one, or one a layer in order), or a table made here."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[safetensors_io.Tensor, ...]
    table: np.ndarray | None = None

    @property
    def row(self) -> params_lib.Fact:
        return params_lib.fact(self.path)

    @property
    def names(self) -> list[str]:
        return folders.names(self.row, self.shape)


def layer_shape(row, shape):
    """Shape of the checkpoint's tensors for our shape."""
    return row.their_shape(shape[1:] if row.stacked else shape)


def plan(directory, config, dtype) -> tuple[list[_Leaf], list[str]]:
    """How the files of a released folder fill the model's parameters, from their headers alone.

    dtype: of all parameters; None for each as it is stored.
    Returns:
      (parameters, sentences for the user).
    Raises:
      ValueError that lists every missing, surplus, misshapen or mistyped tensor by name.
    """
    files, stem = {}, {}
    files["model"], name = safetensors_io.folder(directory)
    stem["model"] = f"{name}.safetensors"
    if config.generation:
        path = os.path.join(directory, "ae.safetensors")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing: what draws needs the autoencoder; copy it there, or do "
                "without (import --only=understanding)"
            )
        files["ae"], stem["ae"] = safetensors_io.header(path), "ae.safetensors"
    problems, notes, leaves = [], [], []
    if name == "model" and safetensors_io.is_there(directory, "ema"):
        notes.append(
            "there is model.safetensors and ema.safetensors; the weights of model.safetensors are read"
        )
    used = {file: set() for file in files}
    default = dtype or safetensors_io.DTYPES.get(
        getattr(files["model"].get(params_lib.fact("llm/embed").name), "dtype", None)
    )
    for path, leaf in abstract_params(config).items():
        row = params_lib.fact(path)
        shape, found = layer_shape(row, leaf.shape), []
        for name in folders.names(row, leaf.shape):
            used[row.file].add(name)
            tensor = files[row.file].get(name)
            if tensor is None:
                wrong = f"missing {name} (expected shape {shape})"
            elif tensor.dtype not in safetensors_io.DTYPES:
                wrong = f"mistyped {name}: {tensor.dtype}, where one of {', '.join(safetensors_io.DTYPES)} is expected"
            elif tensor.shape != shape:
                wrong = f"misshapen {name}: the file has {tensor.shape}, the configs say {shape}"
            else:
                found.append(tensor)
                continue
            if row.group == "fixed" and tensor is None:
                notes.append(f"{name} is not in the file: its fixed positions are computed")
            elif (
                row.group == "fixed"
                and wrong.startswith("misshapen")
                and tensor.shape[1:] == shape[1:]
            ):
                notes.append(
                    f"{name} has {tensor.shape[0]} rows in the file, not {shape[0]}: its fixed positions are "
                    "computed instead"
                )
            else:
                problems.append(wrong)
        stored = {tensor.dtype for tensor in found}
        if len(stored) > 1 and dtype is None:
            problems.append(
                f"mistyped {row.name}: its layers are {', '.join(sorted(stored))}; choose one with --dtype"
            )
        target = dtype or (safetensors_io.DTYPES[stored.pop()] if stored else default)
        leaves.append(_Leaf(path, leaf.shape, target, tuple(found)))
    for file, tensors in files.items():
        left = [name for name in tensors if name not in used[file]]
        ignored = [
            name for name in left if not config.generation and folders.GENERATION.fullmatch(name)
        ]
        problems += [f"surplus {name} in {stem[file]}" for name in left if name not in ignored]
        if ignored:
            notes.append(f"{len(ignored)} tensors of the generation expert stay on disk")
    if problems:
        lacking = [problem.split()[1] for problem in problems if problem.startswith("missing")]
        if any(map(folders.GENERATION.fullmatch, lacking)):
            problems.insert(
                0, "if the folder holds no generation expert: import --only=understanding"
            )
        more = (
            [f"and {len(problems) - folders.LISTED:,} more"]
            if len(problems) > folders.LISTED
            else []
        )
        raise ValueError(
            f"{directory} does not fit its configs:\n  "
            + "\n  ".join(problems[: folders.LISTED] + more)
        )
    for n, leaf in enumerate(leaves):
        if leaf.row.group == "fixed" and not leaf.tensors:
            leaves[n] = dataclasses.replace(
                leaf, table=sincos_table(math.isqrt(leaf.shape[0]), leaf.shape[1])
            )
    return leaves, notes


def load(
    directory: str,
    *,
    generation: bool = False,
    dtype: str | None = "float32",
    mesh=None,
    layout: str = "train",
    **compute,
):
    """Reads a released folder, or one that `import` made: (ModelConfig, params).

    Tensor by tensor, and of each only what the devices of this process hold: the host's memory peaks at their
    share of the parameters plus two tensors.

    Args:
      generation: also what draws: generation expert, latent path, autoencoder.
      dtype: of the parameters; None or "" for each as it is stored. (The compute dtype is `ModelConfig.dtype`.)
      mesh, layout: where they go, see `sharding`; None for the first device.
      compute: remat, unroll, query_block of `ModelConfig`.
    Raises:
      FileNotFoundError: a file is missing. ValueError: files cannot be read or do not fit; names each tensor.
    """
    paths.check_given("checkpoint", directory)
    kind = None if not dtype else jnp.dtype(dtype)
    if kind is not None and kind not in safetensors_io.DTYPES.values():
        raise ValueError(f"dtype={dtype}: parameters are float32, bfloat16 or float16")
    if not folders.is_model(directory):
        raise FileNotFoundError(
            f"{directory} is no released folder (no llm_config.json) and was not made by "
            "`python -m opsd_jax.convert import`"
        )
    config = folders.read_config(directory, generation=generation, **compute)
    if folders.is_imported(directory):
        return config, _restore(directory, config, kind, mesh, layout)
    leaves, notes = plan(directory, config, kind)
    if jax.process_index() == 0:
        for note in notes:
            print(f"{directory}: {note}", file=sys.stderr)
    return config, _place(directory, leaves, mesh, layout)


def _restore(directory, config, dtype, mesh, layout):
    """The parameters of an imported folder."""
    only = folders.note(directory)["only"]
    if config.generation and only:
        raise ValueError(
            f"{directory} was imported with --only={only} and cannot draw: import the release again "
            "without it"
        )
    stored = folders.stored(directory)
    typed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, dtype or getattr(stored.get(path), "dtype", leaf.dtype)
        )
        for path, leaf in abstract_params(config).items()
    }
    abstract = params_lib.unflatten(typed)
    if mesh is not None:
        abstract = sharding.abstract(mesh, abstract, layout)
    return checkpoint.restore_params(
        directory, abstract, partial=not config.generation and not only
    )


def _place(directory, leaves, mesh, layout):
    """Reads the planned parameters onto the devices."""
    began, done, read, flat, bad = time.monotonic(), 0, 0, {}, []
    total = sum(len(leaf.tensors) for leaf in leaves)
    with progress_lib.Progress(
        total, "tensors", "read", primary=jax.process_index() == 0
    ) as progress:
        for leaf in leaves:
            where = _sharding(leaf, mesh, layout)
            slices = _layer_sharding(where) if leaf.row.stacked else where
            if leaf.table is not None:
                array = jax.make_array_from_callback(
                    leaf.shape, where, leaf.table.astype(leaf.dtype).__getitem__
                )
            elif leaf.row.stacked:
                array = _zeros(leaf.shape, leaf.dtype, where)()
            for n, (name, tensor) in enumerate(zip(leaf.names, leaf.tensors)):
                piece, count, finite = _fetch(tensor, leaf.row, slices)
                array = (
                    _put(where)(array, piece, n) if leaf.row.stacked else piece.astype(leaf.dtype)
                )
                # waiting bounds the memory: no second tensor is read before this one is gone
                array.block_until_ready()
                del piece
                if not finite:
                    bad.append(f"non-finite {name} in {tensor.file}")
                read, done = read + count, done + 1
                progress.update(done, size=safetensors_io.size_of(read))
            flat[leaf.path] = array
    if bad:
        raise ValueError(
            f"{directory} holds NaN or infinite weights: a damaged file, or its training diverged:\n  "
            + "\n  ".join(bad)
        )
    if jax.process_index() == 0:
        held = sum(
            shard.data.nbytes for array in flat.values() for shard in array.addressable_shards
        )
        size_of = safetensors_io.size_of
        print(
            f"{directory}: read {size_of(read)} in {time.monotonic() - began:.0f} s; target {size_of(held)} on this process, "
            f"peak host memory of the process {size_of(folders.peak_memory())}",
            file=sys.stderr,
        )
    return params_lib.unflatten(flat)


def _fetch(tensor, row, where):
    """(a tensor with our axes on the devices, bytes read, whether they are finite); in the checkpoint's dtype."""
    kept, finite = {}, True

    def read(index):
        nonlocal finite
        key = str(index)  # devices that hold the same slice share one reading
        if key not in kept:
            kept[key] = safetensors_io.read(tensor, row.their_shape(index), row.order)
            finite = finite and safetensors_io.is_finite(kept[key], tensor.dtype)
        return kept[key]

    shape = row.ours(np.broadcast_to(0, tensor.shape)).shape
    array = jax.make_array_from_callback(shape, where, read)
    array.block_until_ready()
    return array, sum(piece.nbytes for piece in kept.values()), finite


def _sharding(leaf, mesh, layout):
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding.parameter(mesh, leaf.path, leaf.shape, layout)


def _layer_sharding(where):
    """Sharding of one layer of a stacked parameter."""
    if isinstance(where, jax.sharding.SingleDeviceSharding):
        return where
    return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec(*where.spec[1:]))


@functools.cache
def _zeros(shape, dtype, where):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@functools.cache
def _put(where):
    """(leaf, tensor, n) -> leaf with the tensor as its layer n, in place."""

    def put(leaf, tensor, n):
        return jax.lax.dynamic_update_index_in_dim(leaf, tensor.astype(leaf.dtype), n, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=where)
