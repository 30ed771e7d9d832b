"""Golden set `checkpoint`: every tensor of a released folder is read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.release import load as load_lib
from parity.replay import by_name, equal, path_of
from reference import read_tensors


def test_checkpoint(goldens, whole_model):
    """Every tensor of both files arrives, with its name, shape and value."""
    from safetensors.numpy import load_file

    folder = path_of(goldens, "checkpoint")
    model, autoencoder = read_tensors(folder), load_file(folder / "ae.safetensors")
    shapes = json.loads((folder / "shapes.json").read_text())

    def sizes(tensors):
        return {name: list(tensor.shape) for name, tensor in tensors.items()}

    assert (sizes(model), sizes(autoencoder)) == (shapes["bagel"], shapes["ae"])
    tensors, ours = {**model, **autoencoder}, by_name(whole_model[1])
    assert set(ours) == set(tensors)
    for name, array in ours.items():
        equal(array, tensors[name], err_msg=name)


def test_checkpoint_without_generation(goldens, model, whole_model):
    assert model[0].generation is None
    kept, everything = by_name(model[1]), read_tensors(path_of(goldens, "checkpoint"))
    assert set(kept) == {
        name
        for name in everything
        if "_moe_gen" not in name
        and not name.startswith(("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed."))
    }
    assert {name: x.shape for name, x in kept.items()}.items() <= {
        name: x.shape for name, x in by_name(whole_model[1]).items()
    }.items()


def folder_with(files, configs, target):
    """A released folder of given files, with the configs of another one."""
    target.mkdir()
    for file in [*files, configs / "llm_config.json", configs / "vit_config.json"]:
        shutil.copyfile(file, target / file.name)
    return str(target)


def test_checkpoint_bfloat16(goldens, model, tmp_path):
    """Weights in bfloat16 under the name ema.safetensors: those of the goldens, or else rounded
    here.
    """
    from safetensors.numpy import save_file

    configs = path_of(goldens, "checkpoint")
    file = configs / "bf16" / "ema.safetensors"
    if not file.exists():
        file = tmp_path / "ema.safetensors"
        save_file({name: x.astype(jnp.bfloat16) for name, x in read_tensors(configs).items()}, file)
    _, params = load_lib.load(folder_with([file], configs, tmp_path / "bf16"))
    stored, exact = read_tensors(file.parent), by_name(model[1])
    for name, array in by_name(params).items():
        assert stored[name].dtype == jnp.bfloat16 and array.dtype == np.float32
        equal(array, stored[name].astype(np.float32), err_msg=name)
        np.testing.assert_allclose(array, exact[name], rtol=2**-8, err_msg=name)


def test_checkpoint_sharded(goldens, model, tmp_path):
    """Shards with an index: those of the goldens, or else cut here."""
    from safetensors.numpy import save_file

    configs = path_of(goldens, "checkpoint")
    source = configs / "sharded"
    if not source.exists():
        source, tensors, weight_map = tmp_path, read_tensors(configs), {}
        for n in range(2):
            part = {name: tensors[name] for name in sorted(tensors)[n::2]}
            save_file(part, source / f"model-{n}.safetensors")
            weight_map.update(dict.fromkeys(part, f"model-{n}.safetensors"))
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = [*source.glob("*.safetensors"), *source.glob("*.index.json")]
    assert len(files) > 2
    config, params = load_lib.load(folder_with(files, configs, tmp_path / "sharded"))
    assert config == model[0]
    jax.tree.map(equal, params, model[1])
