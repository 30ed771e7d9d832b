"""Released checkpoints (safetensors folders of BAGEL / ThinkMorph) <-> our parameters and checkpoints.

    python -m opsd_jax.convert import --source=HF_DIR --target=DIR
    python -m opsd_jax.convert export --source=DIR --target=HF_DIR

  HF_DIR   {model,ema}.safetensors (or shards with an index), ae.safetensors, config files, tokenizer files
  DIR      checkpoints/0/ (Orbax, the weights alone) and release/ (config and tokenizer files, source.json)

Names and layouts are facts of `params.TABLE`; nothing here depends on sizes.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import shutil
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import (
    checks,
    cli,
    distributed,
    json_files,
    locks,
    paths,
    release_configs,
    tensor_files,
)
from opsd_jax import params as params_lib
from opsd_jax.model.config import ModelConfig

# What the understanding path leaves on disk: the generation expert, and the latent path in and out of it.
_GENERATION = re.compile(r".*_moe_gen\b.*|(time_embedder|vae2llm|llm2vae|latent_pos_embed)\..*")
_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "special_tokens.json",
    "generation_config.json",
)
_LISTED = 1000  # faults of tensors that an error lists
_GROUP = (
    1 << 28
)  # bytes of parameters that export takes from a checkpoint at a time (or one larger parameter)


# ---------------------------------------------------------------------------- folders


def is_released(directory: str) -> bool:
    """Whether it is a folder in the layout of the releases."""
    return os.path.isfile(os.path.join(directory, "llm_config.json"))


def is_imported(directory: str) -> bool:
    """Whether it is a folder that `import` made."""
    return os.path.isfile(os.path.join(directory, "release", "source.json"))


def is_model(directory: str) -> bool:
    """Whether `load` can read the folder."""
    return is_released(directory) or is_imported(directory)


def tokenizer_folder(directory: str) -> str:
    """Where the config and tokenizer files of a folder for `load` lie."""
    return os.path.join(directory, "release") if is_imported(directory) else directory


@contextlib.contextmanager
def _new_folder(target):
    """A folder beside `target` that takes its name once complete. FileExistsError if `target` holds anything.

    What a killed process left of it is removed: only one at a time converts into a target.
    """
    target = os.path.abspath(target)
    with locks.only_writer(target):
        if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            raise FileExistsError(
                f"--target={target} exists and is not empty: choose another folder, or delete it"
            )
        made = os.path.join(os.path.dirname(target), f".tmp-{os.path.basename(target)}")
        shutil.rmtree(made, ignore_errors=True)
        os.makedirs(made)
        try:
            yield made
            os.rename(made, target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


# ---------------------------------------------------------------------------- sizes


def read_config(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config files of a released or imported folder; see `release_configs.read`."""
    return release_configs.read(tokenizer_folder(directory), generation=generation, **compute)


@functools.cache
def _abstract(config) -> types.MappingProxyType:
    """{path: shape and dtype} of the model's parameters."""
    from opsd_jax.model import bagel

    shapes = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config))
    return types.MappingProxyType(params_lib.flatten(shapes))


# ---------------------------------------------------------------------------- what goes where


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One parameter and what fills it: tensors of files (one, or one a layer in order), or a table made here."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[tensor_files.Tensor, ...]
    table: np.ndarray | None = None

    @property
    def row(self) -> params_lib.Fact:
        return params_lib.fact(self.path)

    @property
    def names(self) -> list[str]:
        return _names(self.row, self.shape)


def _names(row, shape):
    return [row.name.format(layer=n) for n in range(shape[0])] if row.stacked else [row.name]


def _layer_shape(row, shape):
    """Shape of the checkpoint's tensors for our shape."""
    return row.their_shape(shape[1:] if row.stacked else shape)


def _plan(directory, config, dtype) -> tuple[list[_Leaf], list[str]]:
    """How the files of a released folder fill the model's parameters, from their headers alone.

    dtype: of all parameters; None for each as it is stored.
    Returns:
      (parameters, sentences for the user).
    Raises:
      ValueError that lists every missing, surplus, misshapen or mistyped tensor by name.
    """
    files, stem = {}, {}
    files["model"], name = tensor_files.folder(directory)
    stem["model"] = f"{name}.safetensors"
    if config.generation:
        path = os.path.join(directory, "ae.safetensors")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing: what draws needs the autoencoder; copy it there, or do "
                "without (import --only=understanding)"
            )
        files["ae"], stem["ae"] = tensor_files.header(path), "ae.safetensors"
    problems, notes, leaves = [], [], []
    if name == "model" and tensor_files.is_there(directory, "ema"):
        notes.append(
            "there is model.safetensors and ema.safetensors; the weights of model.safetensors are read"
        )
    used = {file: set() for file in files}
    default = dtype or tensor_files.DTYPES.get(
        getattr(files["model"].get(params_lib.fact("llm/embed").name), "dtype", None)
    )
    for path, leaf in _abstract(config).items():
        row = params_lib.fact(path)
        shape, found = _layer_shape(row, leaf.shape), []
        for name in _names(row, leaf.shape):
            used[row.file].add(name)
            tensor = files[row.file].get(name)
            if tensor is None:
                wrong = f"missing {name} (expected shape {shape})"
            elif tensor.dtype not in tensor_files.DTYPES:
                wrong = f"mistyped {name}: {tensor.dtype}, where one of {', '.join(tensor_files.DTYPES)} is expected"
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
        target = dtype or (tensor_files.DTYPES[stored.pop()] if stored else default)
        leaves.append(_Leaf(path, leaf.shape, target, tuple(found)))
    for file, tensors in files.items():
        left = [name for name in tensors if name not in used[file]]
        ignored = [name for name in left if not config.generation and _GENERATION.fullmatch(name)]
        problems += [f"surplus {name} in {stem[file]}" for name in left if name not in ignored]
        if ignored:
            notes.append(f"{len(ignored)} tensors of the generation expert stay on disk")
    if problems:
        lacking = [problem.split()[1] for problem in problems if problem.startswith("missing")]
        if any(map(_GENERATION.fullmatch, lacking)):
            problems.insert(
                0, "if the folder holds no generation expert: import --only=understanding"
            )
        more = [f"and {len(problems) - _LISTED:,} more"] if len(problems) > _LISTED else []
        raise ValueError(
            f"{directory} does not fit its configs:\n  " + "\n  ".join(problems[:_LISTED] + more)
        )
    for n, leaf in enumerate(leaves):
        if leaf.row.group == "fixed" and not leaf.tensors:
            from opsd_jax.model.siglip import sincos_table

            leaves[n] = dataclasses.replace(
                leaf, table=sincos_table(math.isqrt(leaf.shape[0]), leaf.shape[1])
            )
    return leaves, notes


# ---------------------------------------------------------------------------- load


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
    if kind is not None and kind not in tensor_files.DTYPES.values():
        raise ValueError(f"dtype={dtype}: parameters are float32, bfloat16 or float16")
    if not is_model(directory):
        raise FileNotFoundError(
            f"{directory} is no released folder (no llm_config.json) and was not made by "
            "`python -m opsd_jax.convert import`"
        )
    config = read_config(directory, generation=generation, **compute)
    if is_imported(directory):
        return config, _restore(directory, config, kind, mesh, layout)
    leaves, notes = _plan(directory, config, kind)
    if jax.process_index() == 0:
        for note in notes:
            print(f"{directory}: {note}", file=sys.stderr)
    return config, _place(directory, leaves, mesh, layout)


def _restore(directory, config, dtype, mesh, layout):
    """The parameters of an imported folder."""
    from opsd_jax import checkpoint, sharding

    only = _note(directory)["only"]
    if config.generation and only:
        raise ValueError(
            f"{directory} was imported with --only={only} and cannot draw: import the release again "
            "without it"
        )
    stored = _stored(directory)
    typed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, dtype or getattr(stored.get(path), "dtype", leaf.dtype)
        )
        for path, leaf in _abstract(config).items()
    }
    abstract = params_lib.unflatten(typed)
    if mesh is not None:
        abstract = sharding.abstract(mesh, abstract, layout)
    return checkpoint.restore_params(
        directory, abstract, partial=not config.generation and not only
    )


def _place(directory, leaves, mesh, layout):
    """Reads the planned parameters onto the devices."""
    from opsd_jax import metrics

    began, done, read, flat, bad = time.monotonic(), 0, 0, {}, []
    total = sum(len(leaf.tensors) for leaf in leaves)
    with metrics.Progress(total, "tensors", "read", primary=jax.process_index() == 0) as progress:
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
                progress.update(done, size=tensor_files.size_of(read))
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
        size_of = tensor_files.size_of
        print(
            f"{directory}: read {size_of(read)} in {time.monotonic() - began:.0f} s; target {size_of(held)} on this process, "
            f"peak host memory of the process {size_of(peak_memory())}",
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
            kept[key] = tensor_files.read(tensor, row.their_shape(index), row.order)
            finite = finite and tensor_files.is_finite(kept[key], tensor.dtype)
        return kept[key]

    shape = row.ours(np.broadcast_to(0, tensor.shape)).shape
    array = jax.make_array_from_callback(shape, where, read)
    array.block_until_ready()
    return array, sum(piece.nbytes for piece in kept.values()), finite


def _sharding(leaf, mesh, layout):
    from opsd_jax import sharding

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


def peak_memory() -> int:
    """The most memory in bytes that this process has held so far."""
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) << 10
    except OSError:  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (
            0 if sys.platform == "darwin" else 10
        )


def _note(directory) -> dict[str, str]:
    """What `import` noted about an imported folder: path, file and only."""
    path = os.path.join(directory, "release", "source.json")
    found = json_files.Object(path, json_files.read(path), [])
    note = {key: found.text(key) for key in ("path", "file", "only")}
    for key, values in (("only", ("", "understanding")), ("file", ("model", "ema"))):
        if note[key] is not None and note[key] not in values:
            found.refuse(
                key, f": give {json_files.shown(values[0])} or {json_files.shown(values[1])}"
            )
    found.check("this is not what `convert import` writes; import the release again:")
    return note


def _stored(directory) -> dict:
    """{path: shape and dtype} of the weights in a checkpoint, of a run or imported."""
    from opsd_jax import checkpoint

    items = checkpoint.contents(directory)
    if "params" not in items:
        raise ValueError(f"{directory} holds no weights to export, only {sorted(items)}")
    return items["params"]


# ---------------------------------------------------------------------------- import


def import_release(source: str, target: str, *, only: str = "", dtype: str = "") -> None:
    """Makes `target`, a checkpoint with the weights of the released folder `source`.

    Args:
      only: "understanding" leaves out what draws. dtype: "float32", "bfloat16", or "" for each tensor as stored.
    """
    from opsd_jax import checkpoint

    paths.check_given("--source", source)
    paths.check_given("--target", target, orbax=True)
    if not is_released(source):
        raise FileNotFoundError(
            f"--source={source} is no released folder: it has no llm_config.json"
        )
    with _new_folder(target) as made:
        _check_tokenizer(source, read_config(source))
        config, params = load(source, generation=not only, dtype=dtype)
        kinds = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
        sizes = {
            name: part and dataclasses.asdict(part)
            for name, part in (
                ("llm", config.llm),
                ("vit", config.vit),
                ("generation", config.generation),
            )
        }
        release = os.path.join(made, "release")
        os.makedirs(release)
        _copy(source, release, release_configs.NAMES + _TOKENIZER)
        json_files.write(
            os.path.join(release, "source.json"),
            {
                "path": os.path.abspath(source),
                "file": tensor_files.folder(source)[1],
                "dtype": " and ".join(kinds),
                "only": only,
            },
        )
        checkpoint.save(
            os.path.join(made, "checkpoints", "0"),
            None,
            params,
            stage="import",
            config={"model": sizes},
        )
        counts = ", ".join(f"{group} {n:,}" for group, n in params_lib.count(params).items())
    print(
        f"{target}: {counts} parameters in {' and '.join(kinds)}; peak host memory of the process "
        f"{tensor_files.size_of(peak_memory())}"
    )


def _check_tokenizer(directory, config) -> None:
    """Raises ValueError if a tokenizer in a folder is not one of the model: what is imported or exported must work."""
    from opsd_jax import tokenizer

    files = set(os.listdir(directory))
    if "tokenizer_config.json" in files and (
        "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
    ):
        tokenizer.load(directory, vocab_size=config.llm.vocab_size)


def _copy(source, target, names):
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


# ---------------------------------------------------------------------------- export


def export_release(
    source: str,
    target: str,
    *,
    base: str = "",
    dtype: str = "",
    name: str = "",
    max_shard_gb: float = 5,
) -> None:
    """Makes `target`, a folder in the layout of the releases, of a checkpoint's weights.

    What draws comes from the checkpoint or, if that holds the understanding path alone, unchanged from `base`.
    Adapters (LoRA) are added to their matrices.

    Args:
      source: an imported folder, a run's workdir or one of its step folders.
      base: a released or imported folder, or a run; "" for the one that the source was made or started from,
        "none" for a folder that cannot draw.
      dtype: "float32", "bfloat16", or "" for each tensor as it is.
      name: which weights, and the name of their file: "model" for the student's, "ema" for the teacher's averages of
        them; "" for "model", or for what the release that was imported calls them.
      max_shard_gb: larger files become several with an index; 0 for one file.
    """
    from opsd_jax import checkpoint

    for flag, path in (("--source", source), ("--target", target), ("--base", base)):
        paths.check(flag, path)
    checks.number("--max_shard_gb", max_shard_gb, float, "[0, 1e9]; 0 for one file")
    kind = jnp.dtype(dtype) if dtype else None
    if is_released(source):
        raise ValueError(
            f"--source={source} is a released folder already: export reads checkpoints"
        )
    with _new_folder(target) as made:
        workdir = _workdir(source)
        # one step from here on: a run that goes on saves others meanwhile
        source = workdir if is_imported(workdir) else str(checkpoint.resolve(source))
        stored, draws = _stored(source), _draws(source)
        name, places = _chosen(source, stored, name)
        config = release_configs.of_metadata(checkpoint.metadata(source)["config"], source)
        origin = "" if base == "none" else _base(source, base, needed=not draws)
        if origin:
            there = _config_of(origin)
            if (there.llm, there.vit) != (config.llm, config.vit):
                raise ValueError(
                    f"{origin} has other sizes than {source}, for which it shall be the base:\n"
                    f"  {there.llm} {there.vit}\n  {config.llm} {config.vit}"
                )
            if config.generation not in (None, there.generation):
                raise ValueError(
                    f"{origin} draws with other sizes than {source}, for which it shall be the base:\n"
                    f"  {there.generation}\n  {config.generation}"
                )
            config = dataclasses.replace(config, generation=there.generation)
        if draws and config.generation is None:
            raise ValueError(
                f"the metadata of {source} has no sizes of what draws: give --base=FOLDER, a release"
            )
        if not draws and not origin:
            config = dataclasses.replace(config, generation=None)
        wanted = _abstract(config)
        if wrong := [
            path
            for path, leaf in stored.items()
            if path not in wanted or leaf.shape != wanted[path].shape
        ]:
            raise ValueError(
                f"{source}: these weights do not fit the sizes in its metadata: {', '.join(wrong)}"
            )

        lora, config = config.lora, dataclasses.replace(config, lora=None)
        if absent := [
            path for path in wanted if path not in stored and params_lib.fact(path).group == "lora"
        ]:
            raise ValueError(
                f"{source} lacks the adapters that its metadata speaks of: {', '.join(absent)}"
            )
        wanted = _abstract(config)

        parts = [_of_checkpoint(source, stored, places, lora)]
        missing = {path: leaf for path, leaf in wanted.items() if path not in stored}
        if missing and is_released(origin):
            parts.append(_of_release(origin, config, missing))
        elif missing and origin:
            there = _stored(origin)
            parts.append(
                _of_checkpoint(origin, {path: there[path] for path in missing if path in there}, {})
            )
        outline = {}
        for rows, _ in parts:
            outline |= rows
        absent = [
            row.name
            for path in wanted
            for row in [params_lib.fact(path)]
            if (row.file, _names(row, wanted[path].shape)[0]) not in outline
        ]
        if absent:
            raise ValueError(
                f"neither {source} nor its base {origin or '(none)'} holds {', '.join(absent)}"
            )
        if kind is not None:
            outline = {key: (shape, kind) for key, (shape, _) in outline.items()}
        tensors = (item for _, part in parts for item in part)
        _write_configs(made, source, origin, config)
        written = tensor_files.write(made, outline, tensors, name, int(max_shard_gb * 1e9))
    if config.generation is None:
        print(f"{target}: the understanding path only; config.json says visual_gen false")
    elif not draws:
        print(f"{target}: what draws is that of {origin}")
    print(
        f"{target}: {tensor_files.size_of(written)}, {len(outline)} tensors; peak host memory of the process "
        f"{tensor_files.size_of(peak_memory())}"
    )


def _workdir(source) -> str:
    """The workdir or imported folder that a source of export, which may be its step folder, belongs to."""
    from opsd_jax import checkpoint

    return os.path.dirname(os.path.dirname(str(checkpoint.resolve(source))))


def _origin(directory) -> str:
    """The folder that a checkpoint was made or started from; "" if none."""
    from opsd_jax import checkpoint

    if is_imported(directory):
        return _note(directory)["path"]
    return checkpoint.metadata(directory)["config"].get("init_from") or ""


def _draws(directory) -> bool:
    """Whether a folder holds the generation expert."""
    if is_released(directory):
        return params_lib.fact("llm/norm_gen").name in tensor_files.folder(directory)[0]
    return "llm/norm_gen" in _stored(directory)


def _base(source, base, needed) -> str:
    """The folder with the generation expert that a checkpoint descends from, or a given one; "" if none.

    A released folder without generation expert is none. needed: FileNotFoundError if a folder is gone.
    """
    at = base or _origin(source)
    while at:
        if not os.path.isdir(at):
            if not needed and not base:
                return ""
            raise FileNotFoundError(
                f"{at}, from which {source} takes what draws, is not there: give --base=FOLDER, or "
                "--base=none for a folder that cannot draw"
            )
        if _draws(at):
            return at
        at = "" if is_released(at) else _origin(at)
    if base:
        raise ValueError(f"--base={base} holds no generation expert: give another, or --base=none")
    return ""


def _config_of(directory) -> ModelConfig:
    """Sizes of a folder that draws."""
    from opsd_jax import checkpoint

    if is_model(directory):
        return read_config(directory, generation=True)
    return release_configs.of_metadata(checkpoint.metadata(directory)["config"], directory)


def _chosen(source, stored, name) -> tuple[str, dict[str, str]]:
    """(name of the file to export, where in the state of the checkpoint each parameter is that `params` has not right).

    `params` is the student's weights or, with config.checkpoint.params=ema, the teacher's. The state has the student's as
    `params` and, of those that are trained, the teacher's as `ema`.
    """
    from opsd_jax import checkpoint

    if is_imported(source):
        file = _note(source)["file"]
        if name not in ("", file):
            raise ValueError(
                f"--name={name}: {source} was imported from {file}.safetensors and holds those weights alone; "
                f"leave --name out, or import a release with {name}.safetensors"
            )
        return file, {}
    details, state = checkpoint.metadata(source), checkpoint.contents(source).get("state", {})
    averages = [path.removeprefix("ema/") for path in state if path.startswith("ema/")]
    if name == "ema" and not averages:
        raise ValueError(
            f"--name=ema: {source} holds no averaged weights (its stage is "
            f"{details['stage']!r}): they exist in the opsd stage with config.teacher.kind=ema; export the "
            "student with --name=model"
        )
    if name == "ema":
        return name, dict.fromkeys(averages, "ema")
    of_teacher = averages and (details["config"].get("checkpoint") or {}).get("params") == "ema"
    return "model", dict.fromkeys(stored if of_teacher else (), "params")


def _of_checkpoint(directory, leaves, places, lora=None):
    """({(file, name): (shape, dtype)}, iterator of (file, name, tensor)) of parameters of a checkpoint.

    places: {path: part of the state} of those that are not taken from the item `params`. lora: the LoRAConfig of
    adapters among them; they are added to their matrices.
    """
    from opsd_jax import checkpoint

    def read(wanted):
        found = {}
        for part in {places.get(path, "") for path in wanted}:
            tree = params_lib.unflatten(
                {path: leaf for path, leaf in wanted.items() if places.get(path, "") == part}
            )
            if part:
                tree = checkpoint.restore(directory, {part: tree}, partial=True)[part]
            else:
                tree = checkpoint.restore_params(directory, tree, partial=True)
            found |= {path: np.asarray(array) for path, array in params_lib.flatten(tree).items()}
        return found

    adapters = {
        path: leaf for path, leaf in leaves.items() if params_lib.fact(path).group == "lora"
    }
    leaves = {path: leaf for path, leaf in leaves.items() if path not in adapters}
    outline = {}
    for path, leaf in leaves.items():
        row = params_lib.fact(path)
        outline |= {
            (row.file, name): (_layer_shape(row, leaf.shape), np.dtype(leaf.dtype))
            for name in _names(row, leaf.shape)
        }

    def tensors(group):
        beside = {
            path: pair
            for path in group
            if (pair := params_lib.adapters_of(path)) and pair[0] in adapters
        }
        wanted = group | {path: adapters[path] for pair in beside.values() for path in pair}
        restored = read(wanted)
        for path in group:
            row, array = params_lib.fact(path), restored[path]
            pair = [restored[factor] for factor in beside.get(path, ())]
            for n, name in enumerate(_names(row, array.shape)):
                tensor = array[n] if row.stacked else array
                if pair:
                    tensor = np.asarray(
                        params_lib.merge_matrix(tensor, *(factor[n] for factor in pair), lora)
                    )
                yield row.file, name, row.theirs(tensor)

    # a generator for each group, so that nothing of it is left when the next one is read
    return outline, (item for group in _groups(leaves) for item in tensors(group))


def _groups(leaves):
    """Cuts {path: shape and dtype} into such dicts of about _GROUP bytes."""
    group, size = {}, 0
    for path, leaf in leaves.items():
        if group and size + leaf.size * leaf.dtype.itemsize > _GROUP:
            yield group
            group, size = {}, 0
        group[path] = leaf
        size += leaf.size * leaf.dtype.itemsize
    yield group


def _of_release(directory, config, paths):
    """As `_of_checkpoint`, of a released folder."""
    leaves = [leaf for leaf in _plan(directory, config, None)[0] if leaf.path in paths]
    outline = {
        (leaf.row.file, name): (_layer_shape(leaf.row, leaf.shape), leaf.dtype)
        for leaf in leaves
        for name in leaf.names
    }

    def tensors():
        for leaf in leaves:
            if leaf.table is not None:
                yield leaf.row.file, leaf.names[0], leaf.table
            for name, tensor in zip(leaf.names, leaf.tensors):
                yield leaf.row.file, name, tensor_files.read(tensor)

    return outline, tensors()


def _write_configs(folder, source, origin, config) -> None:
    """Config and tokenizer files: those of the release that the weights descend from, else made from the sizes."""
    release = next((tokenizer_folder(at) for at in (source, origin) if at and is_model(at)), "")
    if release:
        found = read_config(release, generation=config.generation is not None)
        if found != config:
            raise ValueError(
                f"the config files in {release} say other sizes than the weights of {source}:\n  {found}\n"
                f"  {config}"
            )
        _copy(
            release,
            folder,
            release_configs.NAMES if config.generation else release_configs.NAMES[:-1],
        )
    for name, content in release_configs.contents(config).items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            json_files.write(path, content)
    if config.generation is None:  # a whole release's says that it draws
        path = os.path.join(folder, "config.json")
        json_files.write(path, json_files.read(path) | {"visual_gen": False})
    tokenizer = _tokenizer_of(source) or release
    if tokenizer:
        _check_tokenizer(tokenizer, config)
        _copy(tokenizer, folder, _TOKENIZER)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _TOKENIZER):
        print(f"{source}: no tokenizer files found; copy them into the target")


def _tokenizer_of(source) -> str:
    """The tokenizer folder of a run; "" if the source is no run, or the folder is not there."""
    from opsd_jax import data

    workdir = _workdir(source)
    if not os.path.isfile(os.path.join(workdir, "config.json")):
        return ""
    config = data.load_config(workdir)
    folders = [
        data.tokenizer_folder(config, at) for at in (workdir, os.path.join(workdir, "..", ".."))
    ]  # or its run's
    return next(filter(os.path.isdir, folders), "")


# ---------------------------------------------------------------------------- the command


def main(argv=None) -> None:
    """`python -m opsd_jax.convert`; errors in the arguments or files end it with a message and code 1."""
    import argparse

    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.convert",
        description="Released safetensors folders <-> checkpoints of opsd_jax.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="released folder -> checkpoint")
    reading.add_argument("--source", required=True, help="a released folder")
    reading.add_argument("--target", required=True, help="the folder to make")
    reading.add_argument(
        "--only", default="", choices=["understanding"], help="leave out what draws"
    )
    writing = commands.add_parser("export", help="checkpoint -> folder as released")
    writing.add_argument(
        "--source", required=True, help="an imported folder, a run's workdir or a step folder"
    )
    writing.add_argument("--target", required=True, help="the folder to make")
    writing.add_argument(
        "--base",
        default="",
        help="where what draws comes from if the source lacks it: a released or "
        "imported folder (default: the one that the source descends from), or none",
    )
    writing.add_argument(
        "--name",
        default="",
        choices=["", "model", "ema"],
        help="which weights, and the name of their "
        "file: model, the student's, or ema, the teacher's averages (default: model, or as imported)",
    )
    writing.add_argument(
        "--max_shard_gb",
        default=5,
        type=float,
        help="cut larger files and write an index (default "
        "5), which the official demo reads; 0 for one file, which the official trainer wants",
    )
    for command in (reading, writing):
        command.add_argument(
            "--dtype", default="", choices=["float32", "bfloat16"], help="default: as stored"
        )
    args = parser.parse_args(argv)
    if not os.environ.get("JAX_PLATFORMS"):  # the host's memory and cores do all of it
        jax.config.update("jax_platforms", "cpu")
    try:
        cli.check_precision()
        if args.command == "import":
            import_release(args.source, args.target, only=args.only, dtype=args.dtype)
        else:
            export_release(
                args.source,
                args.target,
                base=args.base,
                dtype=args.dtype,
                name=args.name,
                max_shard_gb=args.max_shard_gb,
            )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)


if __name__ == "__main__":
    main()
