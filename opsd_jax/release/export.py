"""`convert export`: a checkpoint becomes a released folder.

source (run, step folder or imported folder) -> which step and whose weights -> the base, a folder
whose image generation completes a source that has none -> sizes of both must agree -> tensors,
one group of parameters at a time, written at their places -> config and tokenizer files
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import params as params_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.inputs import checks, json_files, paths
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import (
    bagel_keys,
    families,
    folders,
    importing,
    load,
    memory,
    metadata,
    safetensors_io,
)
from opsd_jax.release.keys import TOKENIZER_FILES
from opsd_jax.runtime import checkpoint, run_folder

# Bytes of parameters that are taken from a checkpoint at a time (or one larger parameter).
GROUP_BYTES = 1 << 28

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # {path: shape and dtype}
# (file, name, tensor) of each tensor, as `safetensors_io.write` takes them.
Tensors = Iterable[tuple[str, str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Source:
    """The checkpoint to export.

    directory: its step folder, or the imported folder.
    name: name of the file to write: "model", or "ema" for averaged weights.
    shapes: shapes of its parameters.
    parts: {path: part of the training state, "params" or "ema"} of parameters that the item
      `params` does not hold as they are to be exported.
    config: sizes of its model, with adapters if it has some.
    generates: whether it holds the generation expert.
    """

    directory: str
    name: str
    shapes: Shapes
    parts: Mapping[str, str]
    config: ModelConfig
    generates: bool


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

    Image generation comes from the checkpoint or, if that holds the understanding path alone,
    unchanged from `base`. Adapters (LoRA) are added to their matrices.

    Args:
      source: an imported folder, a run's workdir or one of its step folders.
      base: a released or imported folder, or a run; "" for the one that the source was made or
        started from, "none" for a folder without image generation.
      dtype: "float32", "bfloat16", or "" for each tensor as it is.
      name: which weights, and the name of their file: "model" for the student's, "ema" for the
        teacher's averages of them; "" for "model", or for what the release that was imported calls
        them.
      max_shard_gb: larger files become several with an index; 0 for one file.
    Raises:
      FileNotFoundError: no checkpoint, or its base is gone. FileExistsError: `target` holds
      something. ValueError: sizes or weights do not fit each other, or weights are not finite.
    """
    for flag, path in (("--source", source), ("--target", target), ("--base", base)):
        paths.check(flag, path)
    checks.number("--max_shard_gb", max_shard_gb, float, "[0, 1e9]; 0 for one file")
    if folders.is_released(source):
        raise ValueError(
            f"--source={source} is a released folder already: export reads checkpoints"
        )
    with folders.build_target(target) as made:
        found = _open_source(source, name)
        is_bagel = found.config.is_bagel
        if not is_bagel and base not in ("", "none"):
            raise ValueError(
                f"--base={base}: the model in {source} is not of BAGEL's family and takes no image "
                "generation from a base: leave --base out"
            )
        needs_base = base != "none" and is_bagel
        origin = _find_base(found, base) if needs_base else ""
        config = _merged_config(found, origin)
        outline, tensors = _merged_tensors(found, origin, config)
        if dtype:
            outline = {key: (shape, jnp.dtype(dtype)) for key, (shape, _) in outline.items()}
        _write_side_files(made, found.directory, origin, config)
        # Only folders of BAGEL may have the weights in ema.safetensors.
        name = found.name if is_bagel else "model"
        written = safetensors_io.write(made, outline, tensors, name, int(max_shard_gb * 1e9))
    if not is_bagel:
        print(f"{target}: a model of the family {families.family(config)}")
    elif config.generation is None:
        print(f"{target}: the understanding path only; config.json says visual_gen false")
    elif not found.generates:
        print(f"{target}: image generation is that of {origin}")
    print(
        f"{target}: {memory.format_bytes(written)}, {len(outline)} tensors; peak host memory of "
        f"the process {memory.format_bytes(memory.peak())}"
    )


# --- the source, and whose weights ---------------------------------------------------------------


def _open_source(source: str, name: str) -> _Source:
    workdir = _workdir(source)
    # one step from here on: a run that continues saves others meanwhile
    directory = workdir if folders.is_imported(workdir) else str(checkpoint.resolve(source))
    shapes = folders.checkpoint_shapes(directory)
    name, parts = _choose_weights(directory, shapes, name)
    return _Source(
        directory=directory,
        name=name,
        shapes=shapes,
        parts=parts,
        config=metadata.model_config(checkpoint.metadata(directory)["config"], directory),
        generates=_generates(directory),
    )


def _workdir(source: str) -> str:
    """The workdir or imported folder of a source, which may be one of its step folders."""
    return os.path.dirname(os.path.dirname(str(checkpoint.resolve(source))))


def _choose_weights(directory: str, shapes: Shapes, name: str) -> tuple[str, dict[str, str]]:
    """(name, parts) of `_Source`; ValueError if the checkpoint does not hold these weights.

    The item `params` is the student's weights or, with config.checkpoint.params=ema, the teacher's.
    The training state has the student's as `params` and, of those that are trained, the teacher's
    as `ema`.
    """
    if folders.is_imported(directory):
        file = folders.read_import_source(directory)["file"]
        if name not in ("", file):
            raise ValueError(
                f"--name={name}: {directory} was imported from {file}.safetensors and holds those "
                f"weights alone; leave --name out, or import a release with {name}.safetensors"
            )
        return file, {}
    details, state = checkpoint.metadata(directory), checkpoint.contents(directory).get("state", {})
    averages = [path.removeprefix("ema/") for path in state if path.startswith("ema/")]
    if name == "ema" and not averages:
        raise ValueError(
            f"--name=ema: {directory} holds no averaged weights (its stage is "
            f"{details['stage']!r}): they exist in the opsd stage with config.teacher.kind=ema; "
            "export the student with --name=model"
        )
    if name == "ema":
        return name, dict.fromkeys(averages, "ema")
    of_teacher = averages and (details["config"].get("checkpoint") or {}).get("params") == "ema"
    return "model", dict.fromkeys(shapes if of_teacher else (), "params")


# --- the base ------------------------------------------------------------------------------------


def _find_base(source: _Source, base: str) -> str:
    """The folder with the generation expert that a checkpoint descends from, or the given one.

    Returns "" if there is none; a released folder without a generation expert is not a base.
    Raises FileNotFoundError if a folder is gone and needed, ValueError if `base` is not one.
    """
    at = base or _origin(source.directory)
    while at:
        if not os.path.isdir(at):
            if source.generates and not base:
                return ""
            raise FileNotFoundError(
                f"{at}, from which {source.directory} takes image generation, does not exist: give "
                "--base=FOLDER, or --base=none for a folder without image generation"
            )
        if _generates(at):
            return at
        at = "" if folders.is_released(at) else _origin(at)
    if base:
        raise ValueError(f"--base={base} holds no generation expert: give another, or --base=none")
    return ""


def _origin(directory: str) -> str:
    """The folder that a checkpoint was made or started from; "" if none."""
    if folders.is_imported(directory):
        return folders.read_import_source(directory)["path"]
    return checkpoint.metadata(directory)["config"].get("init_from") or ""


def _generates(directory: str) -> bool:
    """Whether a folder holds the generation expert."""
    path = "llm/norm_gen"
    if folders.is_released(directory):
        return bagel_keys.key(path).template in safetensors_io.open_weights(directory)[0]
    return path in folders.checkpoint_shapes(directory)


def _merged_config(source: _Source, origin: str) -> ModelConfig:
    """Sizes of what is exported, with the source's adapters: generation is that of the base.

    Raises ValueError if the sizes of source and base differ, or the source's are not known.
    """
    config = source.config
    if origin:
        found = _config_with_generation(origin)
        if (found.llm, found.vit) != (config.llm, config.vit):
            raise ValueError(
                f"{origin} has other sizes than {source.directory} and cannot be its base:\n"
                f"  {found.llm} {found.vit}\n  {config.llm} {config.vit}"
            )
        if config.generation not in (None, found.generation):
            raise ValueError(
                f"{origin} has other sizes of image generation than {source.directory} and cannot "
                f"be its base:\n  {found.generation}\n  {config.generation}"
            )
        return dataclasses.replace(config, generation=found.generation)
    if source.generates and config.generation is None:
        raise ValueError(
            f"the metadata of {source.directory} has no sizes of image generation: give "
            "--base=FOLDER, a release"
        )
    return config if source.generates else dataclasses.replace(config, generation=None)


def _config_with_generation(directory: str) -> ModelConfig:
    """Sizes of a folder that holds the generation expert."""
    if folders.is_model(directory):
        return folders.read_config(directory, generation=True)
    return metadata.model_config(checkpoint.metadata(directory)["config"], directory)


# --- tensors -------------------------------------------------------------------------------------


def _merged_tensors(
    source: _Source, origin: str, config: ModelConfig
) -> tuple[safetensors_io.Outline, Tensors]:
    """(shapes and dtypes, tensors) of a release: from the source and, what it lacks, from the base.

    config: sizes of what is exported, with the source's adapters.
    Raises ValueError if the weights do not fit the sizes, or some are in neither folder.
    """
    shapes, at = source.shapes, source.directory
    wanted = load.abstract_params(config)
    if wrong := [
        path
        for path, leaf in shapes.items()
        if path not in wanted or leaf.shape != wanted[path].shape
    ]:
        raise ValueError(
            f"{at}: these weights do not fit the sizes in its metadata: {', '.join(wrong)}"
        )
    if absent := [path for path in wanted if path not in shapes and _is_adapter(path)]:
        raise ValueError(f"{at} lacks the adapters that its metadata names: {', '.join(absent)}")

    parts = [_of_checkpoint(at, shapes, source.parts, config)]
    wanted = {path: leaf for path, leaf in wanted.items() if not _is_adapter(path)}
    missing = {path: leaf for path, leaf in wanted.items() if path not in shapes}
    if missing and folders.is_released(origin):
        parts.append(_of_release(origin, dataclasses.replace(config, lora=None), missing))
    elif missing and origin:
        others = folders.checkpoint_shapes(origin)
        parts.append(
            _of_checkpoint(
                origin, {path: others[path] for path in missing if path in others}, {}, config
            )
        )
    outline = {}
    for entries, _ in parts:
        outline |= entries
    absent = []
    for path, leaf in wanted.items():
        key = families.key(config, path)
        if (key.file, key.names(leaf.shape)[0]) not in outline:
            absent.append(key.template)
    if absent:
        raise ValueError(
            f"neither {at} nor its base {origin or '(none)'} holds {', '.join(absent)}"
        )
    return outline, (item for _, tensors in parts for item in tensors)


def _is_adapter(path: str) -> bool:
    return params_lib.fact(path).group == "lora"


def _of_checkpoint(
    directory: str,
    shapes: Shapes,
    parts: Mapping[str, str],
    config: ModelConfig,
) -> tuple[safetensors_io.Outline, Tensors]:
    """(outline, tensors) of parameters of a checkpoint, adapters added to their matrices.

    parts: see `_Source`. config: sizes, also of the adapters among the parameters.
    """
    adapters = {path: leaf for path, leaf in shapes.items() if _is_adapter(path)}
    matrices = {path: leaf for path, leaf in shapes.items() if path not in adapters}
    outline = {}
    for path, leaf in matrices.items():
        key = families.key(config, path)
        entry = (key.tensor_shape(leaf.shape), np.dtype(leaf.dtype))
        outline |= {(key.file, name): entry for name in key.names(leaf.shape)}

    def tensors_of(group: Shapes) -> Iterator[tuple[str, str, np.ndarray]]:
        pairs = {path: params_lib.adapters_of(path) for path in group}
        pairs = {path: pair for path, pair in pairs.items() if pair and pair[0] in adapters}
        factors = {path: adapters[path] for pair in pairs.values() for path in pair}
        arrays = _restore(directory, {**group, **factors}, parts)
        for path in group:
            key, array = families.key(config, path), arrays[path]
            pair = [arrays[factor] for factor in pairs.get(path, ())]
            for n, name in enumerate(key.names(array.shape)):
                tensor = array[n] if key.stacked else array
                if pair:
                    a, b = (factor[n] for factor in pair)
                    tensor = np.asarray(params_lib.merge_matrix(tensor, a, b, config.lora))
                yield key.file, name, key.to_release(tensor)

    # a generator for each group, so that nothing of it is left when the next one is read
    return outline, (item for group in _groups(matrices) for item in tensors_of(group))


def _restore(directory: str, wanted: Shapes, parts: Mapping[str, str]) -> dict[str, np.ndarray]:
    """{path: array} of parameters of a checkpoint; parts: see `_Source`."""
    arrays = {}
    for part in {parts.get(path, "") for path in wanted}:
        tree: dict[str, Any] = params_lib.unflatten(
            {path: leaf for path, leaf in wanted.items() if parts.get(path, "") == part}
        )
        if part:
            tree = checkpoint.restore(directory, {part: tree}, partial=True)[part]
        else:
            tree = checkpoint.restore_params(directory, tree, partial=True)
        arrays |= {path: np.asarray(array) for path, array in params_lib.flatten(tree).items()}
    return arrays


def _groups(shapes: Shapes) -> Iterator[Shapes]:
    """Cuts {path: shape and dtype} into groups of about GROUP_BYTES."""
    group, size = {}, 0
    for path, leaf in shapes.items():
        nbytes = leaf.size * leaf.dtype.itemsize
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[path] = leaf
        size += nbytes
    yield group


def _of_release(
    directory: str, config: ModelConfig, wanted: Shapes
) -> tuple[safetensors_io.Outline, Tensors]:
    """(outline, tensors) of the wanted parameters of a released folder."""
    planned, _ = load.plan(directory, config, None)
    planned = [parameter for parameter in planned if parameter.path in wanted]
    outline = {
        (parameter.key.file, name): (parameter.key.tensor_shape(parameter.shape), parameter.dtype)
        for parameter in planned
        for name in parameter.key.names(parameter.shape)
    }

    def tensors():
        for parameter in planned:
            key = parameter.key
            names = key.names(parameter.shape)
            if parameter.table is not None:
                yield key.file, names[0], parameter.table
            for name, tensor in zip(names, parameter.tensors):
                yield key.file, name, safetensors_io.read(tensor)

    return outline, tensors()


# --- config and tokenizer files ------------------------------------------------------------------


def _write_side_files(folder: str, source: str, origin: str, config: ModelConfig) -> None:
    """Config and tokenizer files.

    Config files are those of the release that the weights descend from, or are made from the sizes.
    The tokenizer is that of the run, or of the release.
    """
    if not config.is_bagel:
        origin = _model_of_origin(source)
    release = next(
        (folders.tokenizer_folder(at) for at in (source, origin) if at and folders.is_model(at)),
        "",
    )
    generates = config.generation is not None
    config = dataclasses.replace(config, lora=None)
    if release:
        found = folders.read_config(release, generation=generates)
        if found != config:
            raise ValueError(
                f"the config files in {release} say other sizes than the weights of {source}:\n"
                f"  {found}\n  {config}"
            )
        names = folders.config_files(config)
        names = tuple(name for name in names if generates or name != "ae_params.json")
        folders.copy_files(release, folder, names)
    dtype = (checkpoint.metadata(source)["config"].get("model") or {}).get("dtype", "")
    for name, content in folders.config_contents(config, dtype).items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            json_files.write(path, content)
    # The file of a whole release of BAGEL says that it generates images.
    if config.is_bagel and not generates:
        path = os.path.join(folder, "config.json")
        json_files.write(path, json_files.read(path) | {"visual_gen": False})
    tokenizer = _tokenizer_of(source) or release
    if tokenizer:
        importing.check_tokenizer(tokenizer, config)
        folders.copy_files(tokenizer, folder, TOKENIZER_FILES)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        print(f"{source}: no tokenizer files found; copy them into the target")


def _model_of_origin(directory: str) -> str:
    """The released or imported folder that a checkpoint descends from; "" if there is none now."""
    at = directory
    while at and os.path.isdir(at) and not folders.is_model(at):
        at = _origin(at)
    return at if at and os.path.isdir(at) else ""


def _tokenizer_of(source: str) -> str:
    """The tokenizer folder of a run; "" if the source is no run, or the folder is missing."""
    workdir = _workdir(source)
    if not os.path.isfile(run_folder.config(workdir)):
        return ""
    config = workdir_lib.load_config(workdir)
    candidates = [
        workdir_lib.tokenizer_folder(config.tokenizer, workdir_lib.data_dir(config, at))
        for at in (workdir, os.path.join(workdir, "..", ".."))  # of a control arm, its run's
    ]
    return next(filter(os.path.isdir, candidates), "")
