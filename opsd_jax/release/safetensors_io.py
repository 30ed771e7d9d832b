"""safetensors files, and folders of them: read slice by slice, written tensor by tensor.

A file is a uint64 with the length of a JSON header, the header {name: {dtype, shape,
data_offsets}}, and the data. Both directions are written here instead of taken from the safetensors
library:

* Writing: the library wants all tensors of a file at once, so a host would need a multiple of its
  share of the weights. `write` holds one tensor.
* Reading: the library maps files into memory, so a process that reads a file that gets shorter
  meanwhile (a download that starts over) dies of SIGBUS, without a message; and it names the tensor
  for few of the faults of a header. Reading whole tensors and rows through it takes about twice as
  long; transposed matrices take the same time, columns about half.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from opsd_jax.inputs import json_files
from opsd_jax.inputs.json_files import DAMAGED
from opsd_jax.release import memory
from opsd_jax.runtime import progress as progress_lib

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
# Of each dtype, the unsigned integer of the same size and the bits of the exponent.
_EXPONENT = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}

# {(file, name): (shape, dtype)} of tensors to write; file is "model" or "ae".
Outline = Mapping[tuple[str, str], tuple[tuple[int, ...], np.dtype]]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is stored.

    offset, end: positions in the file of its first byte and after its last one.
    dtype: as the format spells it.
    """

    file: str
    offset: int
    end: int
    dtype: str
    shape: tuple[int, ...]


# --- reading -------------------------------------------------------------------------------------


def open_weights(directory: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a released folder's weights, from headers alone.

    Returns:
      ({name: Tensor}, stem) of model.safetensors, else of ema.safetensors, or of the shards of an
      index of either one; stem is "model" or "ema".
    Raises:
      FileNotFoundError: the folder has neither, or lacks a shard. ValueError: a damaged file, or an
      index that does not fit its shards.
    """
    for stem in ("model", "ema"):
        index = f"{stem}.safetensors.index.json"
        if has_weights(directory, stem):
            if os.path.isfile(os.path.join(directory, index)):
                return _open_shards(directory, index), stem
            return header(os.path.join(directory, f"{stem}.safetensors")), stem
    raise FileNotFoundError(
        f"{directory} holds neither model.safetensors nor ema.safetensors (nor an index of one)"
    )


def has_weights(directory: str, stem: str) -> bool:
    """Whether a folder holds STEM.safetensors, or an index of its shards."""
    return any(
        os.path.isfile(os.path.join(directory, f"{stem}.safetensors{end}"))
        for end in ("", ".index.json")
    )


def header(path: str) -> dict[str, Tensor]:
    """{name: Tensor} of a safetensors file.

    Raises ValueError, which names the file, the fault and the fix, if the file is cut off, is not a
    safetensors file, or if the sizes in its header do not add up.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{path} ends inside its header ({size:,} bytes): "
                f"{DAMAGED}{json_files.is_pointer(path)}"
            )
        try:
            entries = json.loads(f.read(length))
            if not isinstance(entries, dict):
                raise ValueError(f"a {type(entries).__name__}, not a JSON object")
            entries.pop("__metadata__", None)
            found = {
                name: _tensor(path, 8 + length, name, entry) for name, entry in entries.items()
            }
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of open brackets
            raise ValueError(
                f"{path} has no readable safetensors header ({str(error)[:200]}): {DAMAGED}"
            ) from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].end)):
        if tensor.offset != end or _size(tensor) not in (None, tensor.end - tensor.offset):
            raise ValueError(
                f"{path}: sizes in its header contradict each other, first at {name}: {DAMAGED}"
            )
        end = tensor.end
    if end != size:
        raise ValueError(f"{path} has {size:,} bytes, its header says {end:,}: {DAMAGED}")
    return found


def _tensor(path: str, base: int, name: str, entry) -> Tensor:
    """An entry of a header, whose offsets count from `base`; ValueError if it is not one."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or entry.keys() != {*keys}:
        raise ValueError(f"{name} is {json_files.shown(entry)}, not {', '.join(keys)} alone")
    dtype, shape, offsets = (entry[key] for key in keys)
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(n) is not int or n < 0 for n in (*shape, *offsets))
    ):
        raise ValueError(f"{name}: dtype {dtype}, shape {shape}, data_offsets {offsets}")
    return Tensor(path, base + offsets[0], base + offsets[1], dtype, tuple(shape))


def _size(tensor: Tensor) -> int | None:
    """Bytes of a tensor by its shape; None for a dtype that is not read here."""
    if tensor.dtype not in DTYPES:
        return None
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def _open_shards(directory: str, index: str) -> dict[str, Tensor]:
    """{name: Tensor} of all shards that an index names."""
    path = os.path.join(directory, index)
    places = json_files.read(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise ValueError(f"{path} has no weight_map of names to files: {DAMAGED}")
    parts = sorted(set(places.values()))
    if outside := [part for part in parts if os.path.isabs(part) or ".." in part.split("/")]:
        raise ValueError(
            f"{path} names {outside[0]}, which is outside the folder: copy the file into it and "
            "correct the name"
        )
    if missing := [part for part in parts if not os.path.isfile(os.path.join(directory, part))]:
        whole = index.removesuffix(".index.json")
        or_else = (
            f", or delete the index, because {whole} exists"
            if os.path.isfile(os.path.join(directory, whole))
            else ""
        )
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}, which {index} names: download them{or_else}"
        )
    found, problems = {}, []
    for part in parts:
        held = header(os.path.join(directory, part))
        named = {name for name, place in places.items() if place == part}
        problems += [
            f"{part} lacks {name}, which the index puts there"
            for name in sorted(named - held.keys())
        ]
        problems += [
            f"{part} holds {name}, which the index does not put there"
            for name in sorted(held.keys() - named)
        ]
        found |= held
    if problems:
        raise ValueError(
            f"{path} does not fit its files; take all from one release:\n  " + "\n  ".join(problems)
        )
    return found


def read(
    tensor: Tensor, index: Sequence[slice] = (), order: Sequence[int] | None = None
) -> np.ndarray:
    """A slice of a tensor, see `read_slices`."""
    return read_slices(tensor, [index], order)[0][0]


def read_slices(
    tensor: Tensor, indices: Sequence[Sequence[slice]], order: Sequence[int] | None = None
) -> tuple[list[np.ndarray], int]:
    """Slices of a tensor, their axes in `order`, contiguous, in the dtype of the file.

    Of the file, only the rows of the slices are read, and once: slices of the same rows share one
    reading, because devices that divide the columns of a matrix would read it as often as there are
    devices. Columns and transposed tensors go through a buffer of few rows, which stays in the
    processor's cache while it is read and transposed: at 7B several times as fast as a transpose by
    XLA.

    Args:
      indices: for each result a slice for each axis of the tensor; () for all of it. The rows of
        two slices are the same, or they have none in common.
      order: for each axis of a result, the tensor's axis; None to keep them.
    Returns:
      (arrays, number of bytes read).
    Raises:
      ValueError: the file has become shorter since its header was read.
    """
    dtype = DTYPES[tensor.dtype]
    row_bytes, by_rows = math.prod(tensor.shape[1:]) * dtype.itemsize, {}
    found, columns, count = [], [], 0
    for index in indices:
        bounds = [s.indices(size)[:2] for s, size in zip(index, tensor.shape)] or [
            (0, size) for size in tensor.shape
        ]
        shape = tuple(stop - start for start, stop in bounds)
        by_rows.setdefault(bounds[0] if bounds else (0, 1), []).append(len(found))
        columns.append(tuple(slice(*pair) for pair in bounds[1:]))
        found.append(np.empty(shape if order is None else [shape[n] for n in order], dtype))
    with open(tensor.file, "rb", buffering=0) as f:
        for (first, last), members in by_rows.items():
            offset = tensor.offset + first * row_bytes
            count += (last - first) * row_bytes
            out = found[members[0]]
            if order is None and out.shape[1:] == tensor.shape[1:]:
                _fill(f, offset, out)
                continue
            # NumPy moves integers faster than bfloat16.
            kind = _EXPONENT[tensor.dtype][0]
            bits = [found[n].view(kind) for n in members]
            if order is not None:
                bits = [x.transpose(np.argsort(order)) for x in bits]
            rows = min(last - first, max(64, (1 << 20) // row_bytes))
            block = np.empty((rows, *tensor.shape[1:]), kind)
            for at in range(0, last - first, rows):
                part = block[: last - first - at]
                _fill(f, offset + at * row_bytes, part)
                for n, x in zip(members, bits):
                    x[at : at + rows] = part[(slice(None), *columns[n])]
    return found, count


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size, step = one.end - one.offset, 1 << 24
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for at in range(0, size, step):
            count = min(step, size - at)
            if first.read(count) != second.read(count):
                return False
    return True


def _fill(file: BinaryIO, offset: int, array: np.ndarray) -> None:
    """Reads the bytes of a contiguous array, straight into it."""
    file.seek(offset)
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(f"{file.name} ended while it was read: {DAMAGED}")
        rest = rest[count:]


def is_finite(array: np.ndarray, dtype: str) -> bool:
    """Whether a contiguous array has no NaN and no infinity: all exponent bits of those are set.

    dtype: dtype of the array, as the format spells it.
    """
    kind, exponent = _EXPONENT[dtype]
    bits, step = array.reshape(-1).view(kind), 1 << 18  # pieces that stay in the processor's cache
    return not any(
        ((bits[at : at + step] & kind(exponent)) == exponent).any()
        for at in range(0, bits.size, step)
    )


# --- writing -------------------------------------------------------------------------------------


def write(
    folder: str,
    outline: Outline,
    tensors: Iterable[tuple[str, str, np.ndarray]],
    stem: str,
    limit: int,
) -> int:
    """Writes the weight files of a release: headers first, then each tensor at its place.

    Memory holds one tensor at a time, in whatever order they come.

    Args:
      outline: shapes and dtypes of all tensors.
      tensors: (file, name, tensor), each of the outline once; they are converted to its dtypes.
      stem: name of the file of the model, "model" or "ema".
      limit: bytes of a file of the model; larger ones become shards with an index. 0: one file.
    Returns:
      Bytes of all tensors.
    Raises:
      ValueError: weights are NaN or infinite, or a tensor of the outline did not come; names them.
    """
    nbytes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in outline.items()}
    files = _files(nbytes, stem, limit)
    model_files = [file for file in files if file != "ae.safetensors"]
    if len(model_files) > 1:
        _write_index(folder, files, model_files, nbytes, stem)
    places, non_finite, written = {}, [], 0
    with (
        contextlib.ExitStack() as stack,
        progress_lib.Progress(len(outline), "tensors", "written") as progress,
    ):
        for file, keys in files.items():
            out = stack.enter_context(open(os.path.join(folder, file), "wb"))
            places |= {key: (out, at) for key, at in _write_header(out, keys, outline).items()}
        for file, name, tensor in tensors:
            out, at = places.pop((file, name))
            dtype = outline[file, name][1]
            tensor = np.ascontiguousarray(tensor.astype(dtype, copy=False))
            if not is_finite(tensor, _spelling(dtype)):
                non_finite.append(name)
            out.seek(at)
            out.write(memoryview(tensor.reshape(-1).view(np.uint8)))
            written += tensor.nbytes
            progress.update(len(outline) - len(places), size=memory.format_bytes(written))
            del tensor  # and with it the array of which it is a view
    if non_finite:
        raise ValueError(
            "nothing is exported, because these weights are NaN or infinite: "
            + ", ".join(non_finite)
        )
    if places:
        raise ValueError(
            "these tensors were announced and never written: "
            + ", ".join(name for _, name in places)
        )
    return written


def _files(nbytes: dict, stem: str, limit: int) -> dict[str, list]:
    """{name of a file: keys of the outline that it holds, in order}."""
    shards, size = [], 0
    for key in sorted(nbytes):
        if key[0] == "model":
            if not shards or (limit and size + nbytes[key] > limit):
                shards.append([])
                size = 0
            shards[-1].append(key)
            size += nbytes[key]
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    autoencoder = [key for key in sorted(nbytes) if key[0] == "ae"]
    return dict(zip(names, shards)) | ({"ae.safetensors": autoencoder} if autoencoder else {})


def _write_index(folder: str, files: dict, shards: list[str], nbytes: dict, stem: str) -> None:
    json_files.write(
        os.path.join(folder, f"{stem}.safetensors.index.json"),
        {
            "metadata": {"total_size": sum(nbytes[key] for file in shards for key in files[file])},
            "weight_map": {key[1]: file for file in shards for key in files[file]},
        },
    )


def _write_header(out: BinaryIO, keys: list, outline: Outline) -> dict:
    """Writes the header of a file; {key: position of its tensor}."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for key in keys:
        shape, dtype = outline[key]
        end = at + math.prod(shape) * dtype.itemsize
        entries[key[1]] = {
            "dtype": _spelling(dtype),
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    return {key: 8 + len(text) + entries[key[1]]["data_offsets"][0] for key in keys}


def _spelling(dtype: np.dtype) -> str:
    """A dtype as the format spells it."""
    return next(name for name, known in DTYPES.items() if known == dtype)
