"""safetensors files, and the folders of them that releases are: read by the slice, written tensor by tensor.

The format is a uint64 with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, the data.
Read and written here byte by byte, because the library's slices read the whole tensor and hold it twice, and its
writer wants a whole file's tensors at once: a host would need a multiple of its share of the weights.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct

import jax.numpy as jnp
import numpy as np

from opsd_jax.inputs import json_files
from opsd_jax.inputs.json_files import DAMAGED
from opsd_jax.runtime import progress as progress_lib

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
_EXPONENT = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}


def size_of(size) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is stored: file, positions of its first byte and after its last, dtype as the format spells it."""

    file: str
    offset: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def header(path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. ValueError if it is cut off or no such file."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{path} ends inside its header ({size:,} bytes): {DAMAGED}{json_files.is_pointer(path)}"
            )
        name, found = "", {}
        try:
            rows = json.loads(f.read(length))
            rows.pop("__metadata__", None)
            for name, row in rows.items():
                found[name] = _tensor(path, 8 + length, **row)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} has no readable safetensors header ({name}: {str(error)[:200]}): {DAMAGED}"
            ) from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].end)):
        if tensor.offset != end or (
            tensor.dtype in DTYPES
            and math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
            != tensor.end - tensor.offset
        ):
            raise ValueError(
                f"{path}: sizes in its header contradict each other, first at {name}: {DAMAGED}"
            )
        end = tensor.end
    if end != size:
        raise ValueError(f"{path} has {size:,} bytes, its header says {end:,}: {DAMAGED}")
    return found


def _tensor(path, base, dtype, shape, data_offsets) -> Tensor:
    """A row of a header; whatever is not of its type is a ValueError."""
    numbers = [*shape, *data_offsets]
    if (
        not isinstance(dtype, str)
        or len(data_offsets) != 2
        or any(type(n) is not int or n < 0 for n in numbers)
    ):
        raise ValueError(f"dtype {dtype}, shape {shape}, data_offsets {data_offsets}")
    return Tensor(path, base + data_offsets[0], base + data_offsets[1], dtype, tuple(shape))


def folder(directory) -> tuple[dict[str, Tensor], str]:
    """(tensors, stem) of model.safetensors, else ema.safetensors, or of the shards of an index of either one."""
    for stem in ("model", "ema"):
        index, path = (
            f"{stem}.safetensors.index.json",
            os.path.join(directory, f"{stem}.safetensors"),
        )
        if is_there(directory, stem):
            sharded = os.path.isfile(os.path.join(directory, index))
            return _shards(directory, index) if sharded else header(path), stem
    raise FileNotFoundError(
        f"{directory} holds neither model.safetensors nor ema.safetensors (nor an index of one)"
    )


def is_there(directory, stem: str) -> bool:
    """Whether a folder holds STEM.safetensors, or an index of its shards."""
    return any(
        os.path.isfile(os.path.join(directory, f"{stem}.safetensors{end}"))
        for end in ("", ".index.json")
    )


def _shards(directory, index):
    places = json_files.read(os.path.join(directory, index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise ValueError(
            f"{os.path.join(directory, index)} has no weight_map of names to files: {DAMAGED}"
        )
    parts = sorted(set(places.values()))
    if outside := [part for part in parts if os.path.isabs(part) or ".." in part.split("/")]:
        raise ValueError(
            f"{os.path.join(directory, index)} names {outside[0]}, which is outside the folder: copy the file into "
            "it and correct the name"
        )
    whole = index.removesuffix(".index.json")
    or_else = (
        f", or delete the index, for {whole} is there"
        if os.path.isfile(os.path.join(directory, whole))
        else ""
    )
    if missing := [part for part in parts if not os.path.isfile(os.path.join(directory, part))]:
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
            f"{os.path.join(directory, index)} does not fit its files; take all from one release:\n  "
            + "\n  ".join(problems)
        )
    return found


def _fill(file, offset, array):
    """Reads the bytes of a contiguous array; they arrive in it without a second copy."""
    file.seek(offset)
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(f"{file.name} ended while it was read: {DAMAGED}")
        rest = rest[count:]


def read(tensor: Tensor, index=(), order=None) -> np.ndarray:
    """The slice `index` (a slice for each axis; () for all) of a tensor, its axes in `order`, contiguous.

    Of the file, only the rows of the slice are read. Columns and transposed tensors go through a buffer of few rows,
    in which both ways of reading stay in the processor's cache: at 7B several times as fast as a transpose by XLA.
    """
    dtype = DTYPES[tensor.dtype]
    index = [s.indices(size)[:2] for s, size in zip(index, tensor.shape)] or [
        (0, size) for size in tensor.shape
    ]
    shape = tuple(stop - start for start, stop in index)
    out = np.empty(shape if order is None else [shape[axis] for axis in order], dtype)
    first, row = index[0][0] if index else 0, math.prod(tensor.shape[1:]) * dtype.itemsize
    with open(tensor.file, "rb", buffering=0) as f:
        if order is None and shape[1:] == tensor.shape[1:]:
            _fill(f, tensor.offset + first * row, out)
            return out
        bits = out.view(_EXPONENT[tensor.dtype][0])  # NumPy moves integers faster than bfloat16
        bits = bits if order is None else bits.transpose(np.argsort(order))
        rows = min(shape[0], max(64, (1 << 20) // row))
        columns = tuple(slice(*bounds) for bounds in index[1:])
        block = np.empty((rows, *tensor.shape[1:]), bits.dtype)
        for at in range(0, shape[0], rows):
            part = block[: shape[0] - at]
            _fill(f, tensor.offset + (first + at) * row, part)
            bits[at : at + rows] = part[(slice(None), *columns)]
    return out


def is_finite(array, dtype: str) -> bool:
    """Whether a contiguous array is free of NaN and infinities: their exponent bits are all set."""
    kind, exponent = _EXPONENT[dtype]
    bits, step = array.reshape(-1).view(kind), 1 << 18  # pieces that stay in the processor's cache
    return not any(
        ((bits[at : at + step] & kind(exponent)) == exponent).any()
        for at in range(0, bits.size, step)
    )


def spell(dtype) -> str:
    """A dtype as the format spells it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def write(folder, outline, tensors, stem, limit) -> int:
    """Writes the files of a release and returns their size. Headers first, then each tensor at its place as it
    comes: memory holds one at a time, in whatever order.

    outline: {("model" or "ae", name): (shape, dtype)}. limit: bytes of a file of the model; 0 for one file.
    """
    nbytes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in outline.items()}
    shards, room = [], 0
    for key in sorted(outline):
        if key[0] == "model":
            if not shards or (limit and room + nbytes[key] > limit):
                shards.append([])
                room = 0
            shards[-1].append(key)
            room += nbytes[key]
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    files = dict(zip(names, shards))
    if drawn := [key for key in sorted(outline) if key[0] == "ae"]:
        files["ae.safetensors"] = drawn
    if len(shards) > 1:
        places = {key[1]: file for file, keys in files.items() for key in keys if key[0] == "model"}
        json_files.write(
            os.path.join(folder, f"{stem}.safetensors.index.json"),
            {
                "metadata": {"total_size": sum(nbytes[key] for keys in shards for key in keys)},
                "weight_map": places,
            },
        )

    places, bad, written = {}, [], 0
    with (
        contextlib.ExitStack() as stack,
        progress_lib.Progress(len(outline), "tensors", "written") as progress,
    ):
        for file, keys in files.items():
            rows, at = {"__metadata__": {"format": "pt"}}, 0
            for key in keys:
                shape, dtype = outline[key]
                rows[key[1]] = {
                    "dtype": spell(dtype),
                    "shape": list(shape),
                    "data_offsets": [at, at + nbytes[key]],
                }
                at += nbytes[key]
            header = json.dumps(rows).encode()
            header += b" " * (-len(header) % 8)
            out = stack.enter_context(open(os.path.join(folder, file), "wb"))
            out.write(struct.pack("<Q", len(header)) + header)
            places |= {
                key: (out, 8 + len(header) + rows[key[1]]["data_offsets"][0]) for key in keys
            }
        for file, name, tensor in tensors:
            out, at = places.pop((file, name))
            dtype = outline[file, name][1]
            tensor = np.ascontiguousarray(tensor.astype(dtype, copy=False))
            if not is_finite(tensor, spell(dtype)):
                bad.append(name)
            out.seek(at)
            out.write(memoryview(tensor.reshape(-1).view(np.uint8)))
            written += tensor.nbytes
            progress.update(len(outline) - len(places), size=size_of(written))
            del tensor  # with it, what it is a view of
    if bad:
        raise ValueError(
            f"nothing is exported, for these weights are NaN or infinite: {', '.join(bad)}"
        )
    if places:
        raise ValueError(
            f"these tensors were announced and never written: {', '.join(name for _, name in places)}"
        )
    return written
