"""Reads the weights of a released or imported folder onto devices, tensor by tensor.

config files -> abstract parameters -> plan: which tensors of which files fill each parameter (or
one error that lists everything that is wrong) -> each tensor's slices, straight to the devices
that hold them
"""

import collections
import dataclasses
import functools
import math
import os
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.inputs import paths
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.siglip import sincos_table
from opsd_jax.release import bagel_keys, families, folders, memory, safetensors_io
from opsd_jax.release.keys import Key
from opsd_jax.runtime import checkpoint
from opsd_jax.runtime import progress as progress_lib

Sharding = jax.sharding.NamedSharding | jax.sharding.SingleDeviceSharding
_MOST_FAULTS = 1000  # tensors that an error lists


@dataclasses.dataclass(frozen=True)
class PlannedParameter:
    """One parameter and what fills it.

    key: where a release stores it.
    shape, dtype: shape and dtype of the parameter.
    tensors: where its tensors are stored: one, or one for each layer in order.
    table: the parameter itself, if it is a table of fixed positions that is computed; no tensors
      then.
    """

    path: str
    key: Key
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[safetensors_io.Tensor, ...]
    table: np.ndarray | None = None


def load(
    directory: str,
    *,
    generation: bool = False,
    dtype: str | None = "float32",
    mesh: jax.sharding.Mesh | None = None,
    layout: str = "train",
    **compute,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a released folder, or one that `convert import` made: (ModelConfig, params).

    Tensor by tensor, and of each only what the devices of this process hold: the host's memory
    peaks at their share of the parameters plus two tensors.

    Args:
      generation: also image generation: its expert, the latent path and the autoencoder.
      dtype: dtype of the parameters; None or "" for each as it is stored. In the rollout layout the
        scales of the norms stay as stored, as for the sampler of a run
        (`params.in_compute_dtype`). (The compute dtype is `ModelConfig.dtype`.)
      mesh, layout: where they go, see `sharding`; None for the first device.
      compute: remat, unroll, query_block of `ModelConfig`.
    Raises:
      FileNotFoundError: a file is missing. ValueError: files cannot be read or do not fit; names
      each tensor.
    """
    paths.check_given("checkpoint", directory)
    kind = None if not dtype else jnp.dtype(dtype)
    if kind is not None and kind not in safetensors_io.DTYPES.values():
        raise ValueError(f"dtype={dtype}: parameters are float32, bfloat16 or float16")
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            f"{directory}: {paths.absent(directory)}: give the folder of a released or imported "
            "model"
        )
    if not folders.is_model(directory):
        raise FileNotFoundError(
            f"{directory} is not a released folder (no llm_config.json, nor a config.json beside "
            "weights in safetensors) and was not made by `python -m opsd_jax.convert import`"
        )
    config = folders.read_config(directory, generation=generation, **compute)
    if folders.is_imported(directory):
        return config, _restore_imported(directory, config, kind, mesh, layout)
    parameters, notes = plan(directory, config, kind, layout)
    _check_tied_head(directory, config)
    if jax.process_index() == 0:
        for note in notes:
            print(f"{directory}: {note}", file=sys.stderr)
    return config, _read_onto_devices(directory, parameters, mesh, layout)


@functools.cache
def abstract_params(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the model's parameters."""
    shapes = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config))
    return types.MappingProxyType(params_lib.flatten(shapes))


def _restore_imported(directory, config, dtype, mesh, layout) -> dict[str, Any]:
    """The parameters of an imported folder."""
    only = folders.read_import_source(directory)["only"]
    if config.generation and only:
        raise ValueError(
            f"{directory} was imported with --only={only} and cannot generate images: import the "
            "release again without it"
        )
    stored = folders.checkpoint_shapes(directory)
    typed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            _wanted_dtype(path, dtype, layout) or getattr(stored.get(path), "dtype", leaf.dtype),
        )
        for path, leaf in abstract_params(config).items()
    }
    abstract = params_lib.unflatten(typed)
    if mesh is not None:
        abstract = sharding.abstract(mesh, abstract, layout)
    return checkpoint.restore_params(
        directory, abstract, partial=not config.generation and not only
    )


def _wanted_dtype(path: str, dtype: np.dtype | None, layout: str) -> np.dtype | None:
    """The dtype that a parameter is read in; None for its own."""
    return None if layout == "rollout" and params_lib.keeps_dtype(path) else dtype


# --- the plan: which tensors fill which parameter ------------------------------------------------


def plan(
    directory: str, config: ModelConfig, dtype: np.dtype | None, layout: str = "train"
) -> tuple[list[PlannedParameter], list[str]]:
    """How the files of a released folder fill the model's parameters, from their headers alone.

    dtype: dtype of all parameters; None for each as it is stored. layout: as of `load`.
    Returns:
      (parameters, sentences for the user).
    Raises:
      FileNotFoundError: there are no weights, or no autoencoder though `config` has one.
      ValueError that lists every missing, surplus, misshapen or mistyped tensor by name.
    """
    tensors, stem = safetensors_io.open_weights(directory)
    files = {"model": _File(f"{stem}.safetensors", tensors)}
    if config.generation:
        path = os.path.join(directory, "ae.safetensors")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing: image generation needs the autoencoder; copy it there, or do "
                "without (import --only=understanding)"
            )
        files["ae"] = _File("ae.safetensors", safetensors_io.header(path))
    findings = _Findings()
    if stem == "model" and safetensors_io.has_weights(directory, "ema"):
        findings.notes.append(
            "there is model.safetensors and ema.safetensors; the weights of model.safetensors are "
            "read"
        )
    default = dtype or _dtype_of(tensors.get(families.key(config, "llm/embed").template))
    parameters = []
    for path, leaf in abstract_params(config).items():
        key = families.key(config, path)
        found = _find_tensors(path, key, leaf.shape, files, findings)
        stored = {tensor.dtype for tensor in found}
        # layers of unlike dtypes become one
        wanted = dtype if len(stored) > 1 else _wanted_dtype(path, dtype, layout)
        if len(stored) > 1 and dtype is None:
            findings.faults.append(
                f"mistyped {key.template}: its layers are "
                f"{', '.join(sorted(stored))}; choose one with --dtype"
            )
        target = wanted or (safetensors_io.DTYPES[stored.pop()] if stored else default)
        parameters.append(PlannedParameter(path, key, leaf.shape, target, tuple(found)))
    for file in files.values():
        _find_surplus(file, config, findings)
    findings.check(directory)
    return [_with_table(parameter) for parameter in parameters], findings.notes


@dataclasses.dataclass
class _File:
    """A file of a release (or its shards): its name, its tensors, and names that are used."""

    name: str
    tensors: Mapping[str, safetensors_io.Tensor]
    used: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class _Findings:
    """What is wrong with the tensors of a release, and what the user should know.

    missing: names of tensors that the files lack; each is also among the faults.
    """

    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)

    def check(self, directory: str) -> None:
        """Raises ValueError if there is a fault; the first thousand are listed."""
        if not self.faults:
            return
        lines = self.faults
        if any(map(bagel_keys.GENERATION_KEYS.fullmatch, self.missing)):
            lines = [
                "if the folder holds no generation expert: import --only=understanding",
                *lines,
            ]
        more = len(lines) - _MOST_FAULTS
        raise ValueError(
            f"{directory} does not fit its configs:\n  "
            + "\n  ".join(lines[:_MOST_FAULTS] + ([f"and {more:,} more"] if more > 0 else []))
        )


def _find_tensors(
    path: str,
    key: Key,
    our_shape: tuple[int, ...],
    files: Mapping[str, _File],
    findings: _Findings,
) -> list[safetensors_io.Tensor]:
    """The tensors of a parameter that fit; a fault for each other one.

    A table of fixed positions may be absent or have another number of rows: a note.
    """
    fixed = params_lib.fact(path).group == "fixed"
    file, shape, found = files[key.file], key.tensor_shape(our_shape), []
    for name in key.names(our_shape):
        file.used.add(name)
        tensor = file.tensors.get(name)
        if tensor is None and fixed:
            findings.notes.append(f"{name} is not in the file: its fixed positions are computed")
        elif tensor is None:
            findings.missing.append(name)
            findings.faults.append(f"missing {name} (expected shape {shape})")
        elif tensor.dtype not in safetensors_io.DTYPES:
            findings.faults.append(
                f"mistyped {name}: {tensor.dtype}, where one of "
                f"{', '.join(safetensors_io.DTYPES)} is expected"
            )
        elif tensor.shape == shape:
            found.append(tensor)
        elif fixed and tensor.shape[1:] == shape[1:]:
            findings.notes.append(
                f"{name} has {tensor.shape[0]} rows in the file, not {shape[0]}: its fixed "
                "positions are computed instead"
            )
        else:
            findings.faults.append(
                f"misshapen {name}: the file has {tensor.shape}, the configs say {shape}"
            )
    return found


def _dtype_of(tensor: safetensors_io.Tensor | None) -> np.dtype | None:
    """None for no tensor, or one of a dtype that parameters do not have."""
    return None if tensor is None else safetensors_io.DTYPES.get(tensor.dtype)


def _find_surplus(file: _File, config: ModelConfig, findings: _Findings) -> None:
    """A fault for each tensor that no parameter uses, unless its family leaves it on disk."""
    unread = {name: families.unread(config, name) for name in file.tensors if name not in file.used}
    findings.faults += [f"surplus {name} in {file.name}" for name, why in unread.items() if not why]
    for why, count in collections.Counter(filter(None, unread.values())).items():
        findings.notes.append(
            f"{count} tensors {why} stay on disk" if count > 1 else f"1 tensor {why} stays on disk"
        )


def _check_tied_head(directory: str, config: ModelConfig) -> None:
    """Raises ValueError if a tied head is in the files and has other weights than the embedding.

    transformers 5 would use both.
    """
    if not config.llm.tied_head:
        return
    tensors, _ = safetensors_io.open_weights(directory)
    names = [families.key(config, f"llm/{part}").template for part in ("embed", "head")]
    embed, head = map(tensors.get, names)
    if embed is None or head is None or safetensors_io.same(embed, head):
        return
    raise ValueError(
        f"{directory} holds {names[1]} with other weights than {names[0]}, but its config.json "
        "says tie_word_embeddings true: set it to false, or delete the tensor"
    )


def _with_table(parameter: PlannedParameter) -> PlannedParameter:
    """The parameter, with its table if it is one of fixed positions that no tensor fills."""
    if params_lib.fact(parameter.path).group != "fixed" or parameter.tensors:
        return parameter
    positions, width = parameter.shape
    return dataclasses.replace(parameter, table=sincos_table(math.isqrt(positions), width))


# --- reading onto devices ------------------------------------------------------------------------


def _read_onto_devices(
    directory: str,
    parameters: Sequence[PlannedParameter],
    mesh: jax.sharding.Mesh | None,
    layout: str,
) -> dict[str, Any]:
    """Reads the planned parameters; ValueError, which names them, for NaN or infinite weights."""
    began, flat = time.monotonic(), {}
    total = sum(len(parameter.tensors) for parameter in parameters)
    with progress_lib.Progress(
        total, "tensors", "read", primary=jax.process_index() == 0
    ) as progress:
        reader = _Reader(progress)
        for parameter in parameters:
            where = _sharding(parameter, mesh, layout)
            flat[parameter.path] = _read_parameter(parameter, where, reader)
    if reader.non_finite:
        raise ValueError(
            f"{directory} holds NaN or infinite weights: a damaged file, or its training diverged:"
            "\n  " + "\n  ".join(reader.non_finite)
        )
    if jax.process_index() == 0:
        held = sum(
            shard.data.nbytes for array in flat.values() for shard in array.addressable_shards
        )
        print(
            f"{directory}: read {memory.format_bytes(reader.bytes)} in "
            f"{time.monotonic() - began:.0f} s; target {memory.format_bytes(held)} on this "
            f"process, peak host memory of the process {memory.format_bytes(memory.peak())}",
            file=sys.stderr,
        )
    return params_lib.unflatten(flat)


@dataclasses.dataclass
class _Reader:
    """Reads tensors onto devices, counts them and shows the progress.

    tensors, bytes: number of those read so far.
    non_finite: a sentence for each tensor with NaN or infinities.
    """

    progress: progress_lib.Progress
    tensors: int = 0
    bytes: int = 0
    non_finite: list[str] = dataclasses.field(default_factory=list)

    def read(
        self,
        name: str,
        tensor: safetensors_io.Tensor,
        key: Key,
        where: Sharding,
    ) -> jax.Array:
        """A tensor with our axes (of one layer) on the devices, in the file's dtype."""
        shape = key.from_release(np.broadcast_to(0, tensor.shape)).shape
        # Devices that hold the same slice share one array, those that hold other columns of the
        # same rows one reading.
        indices = {
            str(index): index for index in where.addressable_devices_indices_map(shape).values()
        }
        stored = [key.stored_order(index) for index in indices.values()]
        arrays, count = safetensors_io.read_slices(tensor, stored, key.order)
        slices = dict(zip(indices, arrays))
        array = jax.make_array_from_callback(shape, where, lambda index: slices[str(index)])
        array.block_until_ready()
        self.tensors += 1
        self.bytes += count
        if not all(safetensors_io.is_finite(x, tensor.dtype) for x in arrays):
            self.non_finite.append(f"non-finite {name} in {tensor.file}")
        self.progress.update(self.tensors, size=memory.format_bytes(self.bytes))
        return array


def _read_parameter(parameter: PlannedParameter, where: Sharding, reader: _Reader) -> jax.Array:
    """The parameter on its devices, in its dtype.

    Waiting bounds the memory: no second tensor is read before the one before it is gone.
    """
    key, dtype = parameter.key, parameter.dtype
    if parameter.table is not None:
        table = parameter.table.astype(dtype)
        return jax.make_array_from_callback(parameter.shape, where, table.__getitem__)
    if not key.stacked:
        (tensor,) = parameter.tensors
        array = reader.read(key.template, tensor, key, where).astype(dtype)
        return array.block_until_ready()
    array, layer_sharding = _zeros(parameter.shape, dtype, where)(), _layer_sharding(where)
    for n, (name, tensor) in enumerate(zip(key.names(parameter.shape), parameter.tensors)):
        layer = reader.read(name, tensor, key, layer_sharding)
        array = _put_layer(where)(array, layer, n).block_until_ready()
        del layer
    return array


def _sharding(parameter: PlannedParameter, mesh: jax.sharding.Mesh | None, layout: str) -> Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding.parameter(mesh, parameter.path, parameter.shape, layout)


def _layer_sharding(where: Sharding) -> Sharding:
    """Sharding of one layer of a stacked parameter."""
    if isinstance(where, jax.sharding.SingleDeviceSharding):
        return where
    return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec(*where.spec[1:]))


@functools.cache
def _zeros(shape, dtype, where) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@functools.cache
def _put_layer(where) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(parameter, tensor, n) -> the parameter with the tensor as its layer n, in place."""

    def put(parameter, tensor, n):
        return jax.lax.dynamic_update_index_in_dim(parameter, tensor.astype(parameter.dtype), n, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=where)
