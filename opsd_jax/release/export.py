"""A checkpoint becomes a released folder."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np

from opsd_jax import params as params_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.inputs import checks, json_files
from opsd_jax.inputs import paths as paths_lib
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import configs, importing, load, safetensors_io
from opsd_jax.release import folders as folders_lib
from opsd_jax.runtime import checkpoint


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
    for flag, path in (("--source", source), ("--target", target), ("--base", base)):
        paths_lib.check(flag, path)
    checks.number("--max_shard_gb", max_shard_gb, float, "[0, 1e9]; 0 for one file")
    kind = jnp.dtype(dtype) if dtype else None
    if folders_lib.is_released(source):
        raise ValueError(
            f"--source={source} is a released folder already: export reads checkpoints"
        )
    with folders_lib.new_folder(target) as made:
        workdir = _workdir(source)
        # one step from here on: a run that goes on saves others meanwhile
        source = workdir if folders_lib.is_imported(workdir) else str(checkpoint.resolve(source))
        stored, draws = folders_lib.stored(source), _draws(source)
        name, places = _chosen(source, stored, name)
        config = configs.of_metadata(checkpoint.metadata(source)["config"], source)
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
        wanted = load.abstract_params(config)
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
        wanted = load.abstract_params(config)

        parts = [_of_checkpoint(source, stored, places, lora)]
        missing = {path: leaf for path, leaf in wanted.items() if path not in stored}
        if missing and folders_lib.is_released(origin):
            parts.append(_of_release(origin, config, missing))
        elif missing and origin:
            there = folders_lib.stored(origin)
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
            if (row.file, folders_lib.names(row, wanted[path].shape)[0]) not in outline
        ]
        if absent:
            raise ValueError(
                f"neither {source} nor its base {origin or '(none)'} holds {', '.join(absent)}"
            )
        if kind is not None:
            outline = {key: (shape, kind) for key, (shape, _) in outline.items()}
        tensors = (item for _, part in parts for item in part)
        _write_configs(made, source, origin, config)
        written = safetensors_io.write(made, outline, tensors, name, int(max_shard_gb * 1e9))
    if config.generation is None:
        print(f"{target}: the understanding path only; config.json says visual_gen false")
    elif not draws:
        print(f"{target}: what draws is that of {origin}")
    print(
        f"{target}: {safetensors_io.size_of(written)}, {len(outline)} tensors; peak host memory of the process "
        f"{safetensors_io.size_of(folders_lib.peak_memory())}"
    )


def _workdir(source) -> str:
    """The workdir or imported folder that a source of export, which may be its step folder, belongs to."""
    return os.path.dirname(os.path.dirname(str(checkpoint.resolve(source))))


def _origin(directory) -> str:
    """The folder that a checkpoint was made or started from; "" if none."""
    if folders_lib.is_imported(directory):
        return folders_lib.note(directory)["path"]
    return checkpoint.metadata(directory)["config"].get("init_from") or ""


def _draws(directory) -> bool:
    """Whether a folder holds the generation expert."""
    if folders_lib.is_released(directory):
        return params_lib.fact("llm/norm_gen").name in safetensors_io.folder(directory)[0]
    return "llm/norm_gen" in folders_lib.stored(directory)


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
        at = "" if folders_lib.is_released(at) else _origin(at)
    if base:
        raise ValueError(f"--base={base} holds no generation expert: give another, or --base=none")
    return ""


def _config_of(directory) -> ModelConfig:
    """Sizes of a folder that draws."""
    if folders_lib.is_model(directory):
        return folders_lib.read_config(directory, generation=True)
    return configs.of_metadata(checkpoint.metadata(directory)["config"], directory)


def _chosen(source, stored, name) -> tuple[str, dict[str, str]]:
    """(name of the file to export, where in the state of the checkpoint each parameter is that `params` has not right).

    `params` is the student's weights or, with config.checkpoint.params=ema, the teacher's. The state has the student's as
    `params` and, of those that are trained, the teacher's as `ema`.
    """
    if folders_lib.is_imported(source):
        file = folders_lib.note(source)["file"]
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
            (row.file, name): (load.layer_shape(row, leaf.shape), np.dtype(leaf.dtype))
            for name in folders_lib.names(row, leaf.shape)
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
            for n, name in enumerate(folders_lib.names(row, array.shape)):
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
        if group and size + leaf.size * leaf.dtype.itemsize > load.GROUP:
            yield group
            group, size = {}, 0
        group[path] = leaf
        size += leaf.size * leaf.dtype.itemsize
    yield group


def _of_release(directory, config, paths):
    """As `_of_checkpoint`, of a released folder."""
    leaves = [leaf for leaf in load.plan(directory, config, None)[0] if leaf.path in paths]
    outline = {
        (leaf.row.file, name): (load.layer_shape(leaf.row, leaf.shape), leaf.dtype)
        for leaf in leaves
        for name in leaf.names
    }

    def tensors():
        for leaf in leaves:
            if leaf.table is not None:
                yield leaf.row.file, leaf.names[0], leaf.table
            for name, tensor in zip(leaf.names, leaf.tensors):
                yield leaf.row.file, name, safetensors_io.read(tensor)

    return outline, tensors()


def _write_configs(folder, source, origin, config) -> None:
    """Config and tokenizer files: those of the release that the weights descend from, else made from the sizes."""
    release = next(
        (
            folders_lib.tokenizer_folder(at)
            for at in (source, origin)
            if at and folders_lib.is_model(at)
        ),
        "",
    )
    if release:
        found = folders_lib.read_config(release, generation=config.generation is not None)
        if found != config:
            raise ValueError(
                f"the config files in {release} say other sizes than the weights of {source}:\n  {found}\n"
                f"  {config}"
            )
        importing.copy(
            release,
            folder,
            configs.NAMES if config.generation else configs.NAMES[:-1],
        )
    for name, content in configs.contents(config).items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            json_files.write(path, content)
    if config.generation is None:  # a whole release's says that it draws
        path = os.path.join(folder, "config.json")
        json_files.write(path, json_files.read(path) | {"visual_gen": False})
    tokenizer = _tokenizer_of(source) or release
    if tokenizer:
        importing.check_tokenizer(tokenizer, config)
        importing.copy(tokenizer, folder, folders_lib.TOKENIZER)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in folders_lib.TOKENIZER):
        print(f"{source}: no tokenizer files found; copy them into the target")


def _tokenizer_of(source) -> str:
    """The tokenizer folder of a run; "" if the source is no run, or the folder is not there."""
    workdir = _workdir(source)
    if not os.path.isfile(os.path.join(workdir, "config.json")):
        return ""
    config = workdir_lib.load_config(workdir)
    folders = [
        workdir_lib.tokenizer_folder(config, at)
        for at in (workdir, os.path.join(workdir, "..", ".."))
    ]  # or its run's
    return next(filter(os.path.isdir, folders), "")
