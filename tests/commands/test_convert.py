"""Released folders in and out: every bit, straight to its device, and every fault named.

Run as a program, this file is the child process that measures memory (`memory DIR`) or loads onto a
mesh of four devices (`mesh DIR`).
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
import xla_flags
from opsd_jax import config as config_lib
from opsd_jax import convert, distill, sharding
from opsd_jax import params as params_lib
from opsd_jax.model import siglip
from opsd_jax.model.config import GenerationConfig, LLMConfig, ModelConfig, VAEConfig, ViTConfig
from opsd_jax.release import (
    bagel_keys,
    configs,
    folders,
    importing,
    load,
    memory,
    metadata,
    safetensors_io,
)
from opsd_jax.release import export as export_lib
from opsd_jax.runtime import checkpoint

# Sizes that no other test has: 5 heads over 1 kv head, head_dim apart from the width, one latent a
# token.
ODD = ModelConfig(
    llm=LLMConfig(
        vocab_size=400,
        hidden_size=60,
        num_layers=2,
        num_heads=5,
        num_kv_heads=1,
        intermediate_size=72,
        rope_theta=5e4,
        rms_norm_eps=1e-5,
        head_dim=16,
    ),
    vit=ViTConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=40,
        patch_size=5,
        side=7,
        layer_norm_eps=1e-5,
    ),
    generation=GenerationConfig(
        patch=1,
        side=6,
        timestep_shift=3.0,
        vae=VAEConfig(
            channels=32, multipliers=(1, 2), num_res_blocks=1, z_channels=8, scale=0.5, shift=0.25
        ),
    ),
    dtype="float32",
    remat="none",
    query_block=0,
)


def tensors_of(config, dtype=np.float32, seed=0):
    """{"model": {name: tensor}, "ae": {...}}: random weights of a release of these sizes."""
    rng, files = np.random.default_rng(seed), {"model": {}, "ae": {}}
    for path, leaf in load.abstract_params(config).items():
        key = bagel_keys.key(path)
        for name in key.names(leaf.shape):
            shape = key.tensor_shape(leaf.shape)
            files[key.file][name] = rng.standard_normal(shape, np.float32).astype(dtype)
    for name, side in (
        ("vit_pos_embed", config.vit.side),
        ("latent_pos_embed", config.generation.side),
    ):
        table = siglip.sincos_table(side, config.llm.hidden_size)
        files["model"][f"{name}.pos_embed"] = table.astype(dtype)
    return files


def write_release(folder, config, dtype=np.float32, name="model", shards=1):
    """A released folder of random weights."""
    folder.mkdir(parents=True)
    files = tensors_of(config, dtype)
    save_file(files["ae"], folder / "ae.safetensors")
    if shards == 1:
        save_file(files["model"], folder / f"{name}.safetensors")
    else:
        places = {}
        for n in range(shards):
            part = dict(list(files["model"].items())[n::shards])
            save_file(part, folder / f"{name}-{n}.safetensors")
            places |= dict.fromkeys(part, f"{name}-{n}.safetensors")
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for file, content in configs.contents(config).items():
        (folder / file).write_text(json.dumps(content))
    return folder


def read_release(folder):
    """{"model": {name: tensor}, "ae": {...}} as the safetensors library reads them."""
    files = {
        path.name: load_file(path) for path in sorted(pathlib.Path(folder).glob("*.safetensors"))
    }
    vae = files.pop("ae.safetensors", {})
    return {"model": {name: x for part in files.values() for name, x in part.items()}, "ae": vae}


def named(params):
    """As `read_release`, of our parameters."""
    files = {"model": {}, "ae": {}}
    for path, leaf in params_lib.flatten(params).items():
        files[bagel_keys.key(path).file] |= tiny.released(path, np.asarray(leaf))
    return files


def same(a, b):
    """Two of those are equal in names, dtypes, shapes and bits."""
    for file in ("model", "ae"):
        assert a[file].keys() == b[file].keys()
        for name, x in a[file].items():
            y = b[file][name]
            assert (x.dtype, x.shape) == (y.dtype, y.shape), name
            assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes(), name


def change(folder, file="model", add=(), drop=()):
    """Rewrites a file of a release with tensors added (or replaced) and dropped."""
    path = folder / f"{file}.safetensors"
    tensors = load_file(path) | dict(add)
    save_file({name: x for name, x in tensors.items() if name not in drop}, path)


@pytest.fixture(scope="module")
def golden(goldens, tmp_path_factory):
    """The golden release, with a tokenizer file; the autoencoder is random where the goldens have
    none.
    """
    folder = tmp_path_factory.mktemp("golden") / "release"
    source = goldens / "checkpoint"
    shutil.copytree(
        source, folder, ignore=lambda _, names: [n for n in names if (source / n).is_dir()]
    )
    (folder / "tokenizer.json").write_text("{}")
    if not (folder / "ae.safetensors").exists():
        z = json.loads((folder / "config.json").read_text())["vae_config"]
        vae = VAEConfig(
            channels=32, multipliers=(1, 1, 1, 1), num_res_blocks=1, z_channels=z["z_channels"]
        )
        config = dataclasses.replace(ODD, generation=GenerationConfig(vae))
        (folder / "ae_params.json").write_text(
            json.dumps(configs.contents(config)["ae_params.json"])
        )
        save_file(tensors_of(config)["ae"], folder / "ae.safetensors")
    return folder


@pytest.fixture(scope="module")
def imported(golden, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "whole"
    convert.main(["import", f"--source={golden}", f"--target={target}"])
    return target


@pytest.fixture(scope="module")
def understanding(golden, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "understanding"
    convert.main(["import", f"--source={golden}", f"--target={target}", "--only=understanding"])
    return target


@pytest.fixture
def copied(golden, tmp_path):
    """The golden release, to be spoiled."""
    return pathlib.Path(shutil.copytree(golden, tmp_path / "spoiled"))


def refuses(folder, *parts, kind=ValueError, generation=True):
    """Loading raises an error of this kind with all the parts in its message."""
    with pytest.raises(kind) as error:
        load.load(str(folder), generation=generation)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


# --- load -----------------------------------------------------------------------------------------


def test_whole_model(golden):
    config, params = load.load(str(golden), generation=True)
    files = read_release(golden)
    same(named(params), files)
    sizes = json.loads((golden / "config.json").read_text())
    assert config.generation.patch == sizes["latent_patch_size"]
    assert config.generation.side == sizes["max_latent_size"]
    assert config.generation.timestep_shift == sizes["timestep_shift"]
    assert config.generation.vae.channels == files["ae"]["encoder.conv_in.weight"].shape[0]


def test_understanding_leaves_the_rest_on_disk(golden, capsys):
    config, params = load.load(str(golden), remat="full")
    assert config.generation is None and config.remat == "full"
    kept, files = named(params), read_release(golden)
    left = {name for name in files["model"] if bagel_keys.GENERATION_KEYS.fullmatch(name)}
    same(
        kept,
        {"model": {name: x for name, x in files["model"].items() if name not in left}, "ae": {}},
    )
    assert (
        len(left) > 25
        and f"{len(left)} tensors of the generation expert stay on disk" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shards", "dtype"),
    [("ema", 1, np.float32), ("model", 3, jnp.bfloat16), ("ema", 2, np.float16)],
)
def test_other_sizes_files_and_dtypes(tmp_path, name, shards, dtype):
    folder = write_release(tmp_path / "odd", ODD, dtype, name, shards)
    config, params = load.load(str(folder), generation=True, dtype=None)
    assert config == ODD
    same(named(params), read_release(folder))


def test_what_the_sampler_reads(tmp_path):
    """In the compute dtype, but for the scales of the norms."""
    folder = write_release(tmp_path / "odd", ODD)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _, whole = load.load(str(folder))
    _, read = load.load(str(folder), dtype="bfloat16", mesh=mesh, layout="rollout")
    same(named(read), named(params_lib.in_compute_dtype(whole, "bfloat16")))


def test_dtypes(tmp_path):
    """float32 unless another is asked for."""
    folder = write_release(tmp_path / "odd", ODD, jnp.bfloat16)
    kept = {
        name: x
        for name, x in read_release(folder)["model"].items()
        if not bagel_keys.GENERATION_KEYS.fullmatch(name)
    }
    for dtype, arguments in (
        (np.float32, {}),
        (np.float16, {"dtype": "float16"}),
        (jnp.bfloat16, {"dtype": ""}),
    ):
        _, params = load.load(str(folder), **arguments)
        same(
            named(params), {"model": {name: x.astype(dtype) for name, x in kept.items()}, "ae": {}}
        )
    with pytest.raises(ValueError, match="dtype=int8: parameters are float32, bfloat16 or float16"):
        load.load(str(folder), dtype="int8")


def test_official_autoencoder_without_a_file_of_its_sizes(copied):
    (copied / "ae_params.json").unlink()
    sizes = json.loads((copied / "config.json").read_text())
    if sizes["vae_config"] != {"downsample": 8, "z_channels": 16}:
        refuses(copied, "the autoencoder has", "ae_params.json")
    else:
        assert folders.read_config(str(copied), generation=True).generation.vae == VAEConfig()


def test_position_tables_are_computed_if_they_do_not_fit(copied, capsys):
    """The official trainer saves none, and extrapolates to other sizes."""
    original = read_release(copied)["model"]
    latent = original["latent_pos_embed.pos_embed"]
    change(copied, add={"latent_pos_embed.pos_embed": latent[:9]}, drop=["vit_pos_embed.pos_embed"])
    _, params = load.load(str(copied), generation=True)
    np.testing.assert_allclose(params["latent"]["position_table"], latent, atol=2e-6)
    np.testing.assert_allclose(
        params["connector"]["position_table"], original["vit_pos_embed.pos_embed"], atol=2e-6
    )
    out = capsys.readouterr().err
    assert (
        f"latent_pos_embed.pos_embed has 9 rows in the file, not {len(latent)}: its fixed positions"
        in out
    )
    assert "vit_pos_embed.pos_embed is not in the file: its fixed positions are computed" in out
    change(copied, add={"latent_pos_embed.pos_embed": latent[:, :8]})
    refuses(copied, "misshapen latent_pos_embed.pos_embed")


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Number of bytes of each read of a safetensors file."""
    found, fill = [], safetensors_io._fill
    monkeypatch.setattr(
        safetensors_io,
        "_fill",
        lambda f, at, array: (found.append(array.nbytes), fill(f, at, array)),
    )
    return found


@pytest.mark.parametrize("shape", [(37,), (70, 300), (5, 6, 3, 2)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_slices(tmp_path, read, shape, dtype):
    """Any slice with any axes, reading the bytes of its rows and no others."""
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)
    save_file({"before": values, "x": values}, tmp_path / "a.safetensors")
    tensor = safetensors_io.header(tmp_path / "a.safetensors")["x"]
    rng = np.random.default_rng(0)
    for _ in range(12):
        order = rng.permutation(len(shape))
        stops = [int(rng.integers(1, size + 1)) for size in shape]
        index = tuple(
            slice(int(rng.integers(0, stop)), stop) if rng.random() < 0.7 else slice(None)
            for stop in stops
        )
        read.clear()
        piece = safetensors_io.read(tensor, index, tuple(order))
        assert piece.dtype == dtype and piece.flags.c_contiguous
        np.testing.assert_array_equal(piece, values[index].transpose(order))
        rows = values[index[0]]
        assert sum(read) == rows.nbytes


@pytest.mark.parametrize("shape", [(64, 20), (70, 300), (8, 6, 3, 2)])
def test_slices_of_the_same_rows_are_read_once(tmp_path, read, shape):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    save_file({"x": values}, tmp_path / "a.safetensors")
    tensor = safetensors_io.header(tmp_path / "a.safetensors")["x"]
    halves = [[slice(0, size // 2), slice(size // 2, size)] for size in shape[:2]]
    rest = [slice(None)] * (len(shape) - 2)
    for order in (None, tuple(reversed(range(len(shape))))):
        indices = [(rows, columns, *rest) for rows in halves[0] for columns in halves[1]]
        found, count = safetensors_io.read_slices(tensor, indices, order)
        for piece, index in zip(found, indices, strict=True):
            expected = values[index] if order is None else values[index].transpose(order)
            np.testing.assert_array_equal(piece, expected)
            assert piece.flags.c_contiguous
        assert sum(read) == count == values.nbytes
        read.clear()


@pytest.mark.slow
def test_mesh(tmp_path):
    """On four devices every parameter is placed as `sharding` says, and equals what one device
    gets.
    """
    folder = write_release(tmp_path / "odd", ODD)
    child("mesh", folder)


def child(what, folder):
    flags = xla_flags.devices(4) if what == "mesh" else xla_flags.QUICK
    path = os.pathsep.join(map(str, pathlib.Path(__file__).resolve().parents[1:3]))
    found = subprocess.run(
        [sys.executable, __file__, what, str(folder)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout.splitlines()


def on_meshes(folder):
    whole, count, fill = read_release(folder), [], safetensors_io._fill
    safetensors_io._fill = lambda f, at, array: (count.append(array.nbytes), fill(f, at, array))
    for sizes, layout, generation in (
        ((2, 2), "train", True),
        ((2, 2), "rollout", False),
        ((4, 1), "train", False),  # columns of the stored matrices
    ):
        mesh = sharding.make_mesh(fsdp=sizes[0], tensor=sizes[1])
        count.clear()
        _, params = load.load(folder, generation=generation, mesh=mesh, layout=layout)
        read, flat = sum(count), params_lib.flatten(params)
        for path, leaf in flat.items():
            assert leaf.sharding == sharding.parameter(mesh, path, leaf.shape, layout), path
        assert sum(not leaf.sharding.is_fully_replicated for leaf in flat.values()) > 10
        found = named(params)
        expected = {
            file: {name: x for name, x in whole[file].items() if name in found[file]}
            for file in whole
        }
        same(found, expected)
        assert len(found["ae"]) == (len(whole["ae"]) if generation else 0)
        # Four devices of one process: each byte is read once.
        assert read == sum(x.nbytes for tensors in expected.values() for x in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["load", "import"])
def test_memory(tmp_path, command):
    """Host memory peaks at the parameters plus two of the largest tensors (and 64 MiB of small
    things).
    """
    config = dataclasses.replace(
        ODD,
        generation=None,
        llm=LLMConfig(
            vocab_size=32768,
            hidden_size=2048,
            num_layers=7,
            num_heads=16,
            num_kv_heads=4,
            intermediate_size=8192,
        ),
    )
    folder = tmp_path / "large"
    folder.mkdir()
    rows, at, largest = {}, 0, 0
    for path, leaf in load.abstract_params(config).items():
        key = bagel_keys.key(path)
        for name in key.names(leaf.shape):
            size = 4 * math.prod(shape := key.tensor_shape(leaf.shape))
            rows[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at, largest = at + size, max(largest, size)
    header = json.dumps(rows).encode()
    with open(
        folder / "model.safetensors", "wb"
    ) as f:  # zeros, with holes instead of blocks on the disk
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + at)
    for file, content in configs.contents(config).items():
        (folder / file).write_text(json.dumps(content))
    assert at > 2e9
    over = int(child(f"memory of {command}", folder)[-1])
    print(
        f"{command}: {at / 2**30:.2f} GiB of parameters, largest tensor {largest / 2**20:.0f} MiB, "
        f"peak {over / 2**20:.0f} MiB above"
    )
    assert over <= 2 * largest + (64 << 20)


def peak_above_params(folder, read):
    jax.devices()
    before = memory.peak()
    read(folder)
    size = sum(
        math.prod(leaf.shape) * 4
        for leaf in load.abstract_params(folders.read_config(folder)).values()
    )
    print(memory.peak() - before - size)


# --- faults ---------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_named_at_once(copied):
    tensors = load_file(copied / "model.safetensors")
    embed, norm = "language_model.model.embed_tokens.weight", "language_model.model.norm.weight"
    last = "vit_model.vision_model.post_layernorm.bias"
    change(
        copied,
        add={
            "rotary.inv_freq": np.ones(3, np.float32),
            embed: tensors[embed][:-1],
            norm: tensors[norm].astype(np.int32),
        },
        drop=[
            "language_model.lm_head.weight",
            "language_model.model.layers.1.self_attn.q_proj_moe_gen.bias",
        ],
    )
    change(copied, "ae", add={"encoder.extra": np.ones(2, np.float32)})
    rows, width = tensors[embed].shape
    message = refuses(
        copied,
        f"missing language_model.lm_head.weight (expected shape {(rows, width)})",
        "missing language_model.model.layers.1.self_attn.q_proj_moe_gen.bias",
        f"misshapen {embed}: the file has {(rows - 1, width)}, the configs say {(rows, width)}",
        f"mistyped {norm}: I32, where one of F32, BF16, F16 is expected",
        "surplus rotary.inv_freq in model.safetensors",
        "surplus encoder.extra in ae.safetensors",
        "--only=understanding",
    )
    assert last not in message and message.count("\n") == 7
    message = refuses(copied, "surplus rotary.inv_freq", generation=False)
    assert "moe_gen" not in message and "encoder.extra" not in message


def test_non_finite_weights_are_named(copied):
    tensors = load_file(copied / "model.safetensors")
    spoiled = {}
    for name, value in (
        ("language_model.lm_head.weight", np.nan),
        ("connector.fc1.bias", np.inf),
        ("language_model.model.layers.1.mlp.up_proj.weight", -np.inf),
    ):
        spoiled[name] = tensors[name].copy()
        spoiled[name].flat[-1] = value
    change(copied, add=spoiled)
    message = refuses(copied, *(f"non-finite {name}" for name in spoiled), generation=False)
    assert message.count("non-finite") == 3


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_finite(dtype):
    kind = safetensors_io.DTYPES[dtype]
    largest = jnp.finfo(kind).max
    x = np.full(1 << 19, largest, kind)
    assert safetensors_io.is_finite(x, dtype) and safetensors_io.is_finite(-x, dtype)
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, (1 << 18) + 5, -1):
            y = x.copy()
            y[place] = value
            assert not safetensors_io.is_finite(y, dtype)


def test_layers_of_unlike_dtypes(copied):
    name = "language_model.model.layers.{}.input_layernorm.weight"
    change(
        copied,
        add={
            name.format(1): load_file(copied / "model.safetensors")[name.format(1)].astype(
                np.float16
            )
        },
    )
    with pytest.raises(
        ValueError, match=r"mistyped .*input_layernorm.weight: its layers are F16, F32; .*--dtype"
    ):
        load.load(str(copied), dtype=None)
    load.load(str(copied))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda data: data[:-3], "its header says"),
        (lambda data: data + b"x", "its header says"),
        (lambda data: data[:200], "ends inside its header"),
        (lambda data: b"", "ends inside its header"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "ends inside its header",
        ),
        (lambda data: data[:9] + b"!" + data[10:], "no readable safetensors header"),
        (lambda data: data.replace(b"[0,", b"[4,", 1), "contradict each other"),
    ],
)
def test_damaged_files(copied, spoil, part):
    path = copied / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(spoil(data))
    assert path.read_bytes() != data
    refuses(copied, str(path), part, "download or copy it again", generation=False)


def test_damaged_shards(tmp_path):
    folder = write_release(tmp_path / "odd", ODD, shards=3)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    places = json.loads(text)["weight_map"]
    moved = next(name for name, file in places.items() if file == "model-0.safetensors")
    index.write_text(json.dumps({"weight_map": places | {moved: "model-1.safetensors"}}))
    refuses(
        folder,
        f"model-1.safetensors lacks {moved}",
        f"model-0.safetensors holds {moved}, which the index does",
        str(index),
    )
    index.write_text(text[:-5])
    refuses(folder, str(index), "not valid JSON")
    index.write_text("{}")
    refuses(folder, str(index), "no weight_map")
    for away in ("../odd/model-1.safetensors", str(folder / "model-1.safetensors")):
        index.write_text(text.replace("model-1.safetensors", away))
        refuses(folder, f"{index} names {away}, which is outside the folder")
    index.write_text(text)
    for n in (0, 2):
        (folder / f"model-{n}.safetensors").unlink()
    refuses(
        folder, "lacks model-0.safetensors, model-2.safetensors", index.name, kind=FileNotFoundError
    )
    (folder / "model-1.safetensors").rename(folder / "model.safetensors")
    refuses(folder, "or delete the index, because model.safetensors exists", kind=FileNotFoundError)


def test_of_two_sets_of_weights_the_one_that_is_read_is_named(copied, capsys):
    shutil.copyfile(copied / "model.safetensors", copied / "ema.safetensors")
    load.load(str(copied))
    assert (
        f"{copied}: there is model.safetensors and ema.safetensors; the weights of model"
        in capsys.readouterr().err
    )


def test_missing_files(copied):
    (copied / "ae.safetensors").unlink()
    refuses(copied, "ae.safetensors is missing", "--only=understanding", kind=FileNotFoundError)
    (copied / "config.json").unlink()
    refuses(copied, "config.json is missing: image generation needs its latent_patch_size")
    load.load(str(copied))
    (copied / "model.safetensors").unlink()
    refuses(
        copied,
        "neither model.safetensors nor ema.safetensors",
        kind=FileNotFoundError,
        generation=False,
    )
    (copied / "vit_config.json").unlink()
    refuses(copied, "vit_config.json is missing", kind=FileNotFoundError, generation=False)
    (copied / "llm_config.json").unlink()
    refuses(
        copied,
        "is not a released folder",
        "convert import",
        kind=FileNotFoundError,
        generation=False,
    )
    assert not folders.is_model(str(copied))


def test_configs_that_disagree(copied):
    top = json.loads((copied / "config.json").read_text())
    llm, vit = (json.loads((copied / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    wrong = json.loads(json.dumps(top)) | {"vit_max_num_patch_per_side": 3}
    wrong["llm_config"]["rope_theta"], wrong["vit_config"]["hidden_size"] = 12.0, 7
    wrong["vae_config"]["z_channels"] = 5
    (copied / "config.json").write_text(json.dumps(wrong))
    refuses(
        copied,
        f"llm_config.rope_theta is 12.0 in config.json and {llm['rope_theta']} in llm_config.json",
        f"vit_config.hidden_size is 7 in config.json and {vit['hidden_size']}",
        "vit_max_num_patch_per_side is 3",
        "vae_config.z_channels is 5 in config.json",
    )
    # releases differ in whether the layer that is dropped counts here
    for layers in (vit["num_hidden_layers"], vit["num_hidden_layers"] - 1):
        (copied / "config.json").write_text(
            json.dumps(top | {"vit_config": vit | {"num_hidden_layers": layers}})
        )
        assert folders.read_config(str(copied)).vit.num_layers == vit["num_hidden_layers"] - 1
    (copied / "config.json").write_text(
        json.dumps(top | {"vit_config": vit | {"num_hidden_layers": 9}})
    )
    refuses(
        copied,
        f"vit_config.num_hidden_layers is 9 in config.json and {vit['num_hidden_layers']} in "
        f"vit_config.json; config.json may also say {vit['num_hidden_layers'] - 1}, without the "
        "layer that releases drop",
        generation=False,
    )
    (copied / "config.json").write_text(json.dumps(top))
    del llm["rope_theta"], vit["patch_size"]
    (copied / "llm_config.json").write_text(json.dumps(llm))
    (copied / "vit_config.json").write_text(json.dumps(vit))
    refuses(
        copied,
        "llm_config.json lacks 'rope_theta'",
        "vit_config.json lacks 'patch_size'",
        generation=False,
    )


def edit(folder, file, change):
    """Changes keys of a config file: {key: value}, "a.b" for a key of an object, `DROP` to drop
    it.
    """
    path = folder / file
    content = json.loads(path.read_text())
    for key, value in change.items():
        *outer, last = key.split(".")
        place = content
        for name in outer:
            place = place[name]
        if value is DROP:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


DROP = object()
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("llm_config.json", "rope_scaling", YARN),
        ("llm_config.json", "rope_scaling", {"rope_type": "default", "mrope_section": [2, 3, 3]}),
        (
            "llm_config.json",
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        ),
        ("llm_config.json", "rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("llm_config.json", "use_sliding_window", True),
        ("llm_config.json", "layer_types", ["sliding_attention"] * 3),
        ("llm_config.json", "model_type", "llama"),
        ("llm_config.json", "hidden_act", "gelu"),
        ("llm_config.json", "qk_norm", False),
        ("llm_config.json", "qk_norm", 1),
        ("llm_config.json", "layer_module", "Qwen2MoEDecoderLayer"),
        ("llm_config.json", "tie_word_embeddings", True),
        ("llm_config.json", "attention_bias", False),
        ("llm_config.json", "mlp_bias", True),
        ("vit_config.json", "hidden_act", "quick_gelu"),
        ("vit_config.json", "rope", True),
        ("vit_config.json", "num_channels", 1),
        ("config.json", "connector_act", "relu"),
        ("config.json", "interpolate_pos", True),
        ("config.json", "visual_und", False),
        ("config.json", "llm_config.rope_scaling", YARN),
        ("config.json", "llm_config.hidden_act", "gelu"),
        ("config.json", "llm_config.model_type", "qwen3"),
        ("config.json", "vit_config.rope", True),
        ("ae_params.json", "out_ch", 4),
    ],
)
def test_what_is_not_implemented_is_refused(copied, file, key, value):
    """By file, key and value, before any weight is read."""
    edit(copied, file, {key: value})
    refuses(copied, f"{file}: {key} is {json.dumps(value)}, but only")


@pytest.mark.parametrize(
    ("file", "key", "value", "fix"),
    [
        ("config.json", "visual_gen", "yes", "give true or false"),
        ("llm_config.json", "model_type", "llama", 'but only "qwen2" is implemented'),
    ],
)
def test_faults_that_understanding_does_not_need_are_refused_as_well(
    copied, tmp_path, file, key, value, fix
):
    """The import without image generation reads the same files with the same rules."""
    edit(copied, file, {key: value})
    with pytest.raises(ValueError) as error:
        importing.import_release(str(copied), str(tmp_path / "out"), only="understanding")
    assert f"{file}: {key} is {json.dumps(value)}" in str(error.value) and fix in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (
            "llm_config.json",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ),
        (
            "llm_config.json",
            {
                "rope_theta": DROP,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
            },
        ),
        (
            "llm_config.json",
            {
                "rope_theta": DROP,
                "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0},
            },
        ),
        (
            "llm_config.json",
            {"rope_scaling": {"type": "default"}, "layer_types": ["full_attention"] * 3},
        ),
        (
            "llm_config.json",
            {
                "use_sliding_window": False,
                "sliding_window": 8,
                "max_window_layers": 0,
                "attention_dropout": 0.1,
            },
        ),
        (
            "llm_config.json",
            {
                "head_dim": None,
                "hidden_act": None,
                "qk_norm": DROP,
                "freeze_und": True,
                "is_causal": True,
            },
        ),
        (
            "vit_config.json",
            {
                "layer_norm_eps": None,
                "rope": None,
                "hidden_act": "gelu_pytorch_tanh",
                "num_channels": 3,
            },
        ),
        (
            "config.json",
            {"timestep_shift": None, "vae_config": None, "connector_act": None, "vit_config": None},
        ),
        (
            "config.json",
            {"llm_config.rope_theta": DROP, "llm_config.rope_parameters": {"rope_theta": 1e6}},
        ),
        (
            "config.json",
            {
                "llm_config.vocab_size": None,
                "llm_config.head_dim": 16,
                "llm_config.layer_module": DROP,
            },
        ),
    ],
)
def test_keys_that_change_nothing(copied, file, change):
    """null is absent; so are keys of transformers 5 and those without effect."""
    wanted = folders.read_config(str(copied), generation=True)
    if wanted.llm.rope_theta != 1e6 or wanted.llm.head_dim != 16 or wanted.llm.num_layers != 3:
        pytest.skip("written for the goldens of the repository")
    edit(copied, file, change)
    assert folders.read_config(str(copied), generation=True) == wanted


def test_key_heads_that_are_null(tmp_path):
    """As in the official code: as many as query heads."""
    folder = write_release(tmp_path / "odd", ODD)
    for file, key in (
        ("llm_config.json", "num_key_value_heads"),
        ("config.json", "llm_config.num_key_value_heads"),
    ):
        edit(folder, file, {key: None})
    assert folders.read_config(str(folder)).llm.num_kv_heads == 5


@pytest.mark.parametrize(
    ("file", "key", "value", "fix"),
    [
        ("llm_config.json", "hidden_size", "32", "give a whole number from 1"),
        ("llm_config.json", "hidden_size", 64.0, "give a whole number from 1"),
        ("llm_config.json", "hidden_size", None, "give a whole number from 1"),
        ("llm_config.json", "num_hidden_layers", 10**9, "give a whole number from 1 to 1000"),
        ("llm_config.json", "num_attention_heads", 0, "give a whole number from 1"),
        ("llm_config.json", "num_key_value_heads", True, "give a whole number from 1"),
        ("llm_config.json", "vocab_size", [320], "give a whole number from 1"),
        ("llm_config.json", "rope_theta", "1e6", "give a positive number"),
        ("llm_config.json", "rms_norm_eps", float("nan"), "give a positive number"),
        ("llm_config.json", "rms_norm_eps", 10**400, "give a positive number"),
        ("llm_config.json", "head_dim", {}, "give a whole number from 1"),
        ("llm_config.json", "rope_scaling", "linear", "give an object in braces"),
        ("vit_config.json", "num_hidden_layers", 1, "give a whole number from 2"),
        ("vit_config.json", "image_size", -980, "give a whole number from 1"),
        ("vit_config.json", "layer_norm_eps", "1e-6", "give a positive number"),
        ("config.json", "llm_config", [1], "give an object in braces"),
        ("config.json", "vae_config", "", "give an object in braces"),
        ("config.json", "max_latent_size", 10**6, "give a whole number from 1 to 512"),
        ("config.json", "timestep_shift", False, "give a positive number"),
        ("config.json", "visual_gen", "yes", "give true or false"),
        ("ae_params.json", "ch_mult", 2, "give a list of whole numbers"),
        ("ae_params.json", "ch_mult", [1, "2"], "give a list of whole numbers"),
        ("ae_params.json", "ch_mult", [], "give a list of whole numbers"),
        ("ae_params.json", "scale_factor", None, "give a positive number"),
    ],
)
def test_values_of_the_wrong_type(copied, file, key, value, fix):
    edit(copied, file, {key: value})
    refuses(copied, str(copied), f"{file}: {key} is {json.dumps(value)[:70]}", fix)


def test_what_a_killed_conversion_left_is_removed(golden, tmp_path):
    left, target = tmp_path / ".tmp-x", tmp_path / "x"
    (left / "release").mkdir(parents=True)  # killed while it copied
    (left / "release" / "junk").write_text("")
    importing.import_release(str(golden), str(target), only="understanding")
    assert os.listdir(tmp_path) == ["x"] and not (target / "release" / "junk").exists()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        importing.import_release(str(golden), str(target), only="understanding")


@pytest.mark.parametrize(
    ("file", "key", "value", "part"),
    [
        ("llm_config.json", "num_attention_heads", 7, "is not divisible by num_heads 7"),
        ("llm_config.json", "head_dim", 15, "head_dim 15 is odd"),
        ("llm_config.json", "num_key_value_heads", 3, "must be a multiple of num_kv_heads 3"),
        (
            "vit_config.json",
            "num_attention_heads",
            7,
            "vit.hidden_size 48 is not divisible by its num_heads 7",
        ),
        (
            "vit_config.json",
            "patch_size",
            2000,
            "images of 140 pixels (image_size) in patches of 2000",
        ),
        ("ae_params.json", "ch", 48, "channels is 48: group norms need a multiple of 32"),
        ("ae_params.json", "downsample", 16, "downsample is 16, but 4 numbers in ch_mult make 8"),
    ],
)
def test_sizes_that_contradict_each_other(golden, copied, file, key, value, part):
    (copied / "config.json").write_text(
        json.dumps(
            {
                name: value
                for name, value in json.loads((golden / "config.json").read_text()).items()
                if name in ("latent_patch_size", "max_latent_size")
            }
        )
    )
    if json.loads((golden / "vit_config.json").read_text())["image_size"] != 140:
        pytest.skip("written for the goldens of the repository")
    edit(copied, file, {key: value})
    refuses(copied, str(copied), part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"dtype": ["F32"]}, "dtype ['F32']"),
        ({"dtype": None}, "dtype None"),
        ({"shape": "64"}, "shape 64"),
        ({"shape": [4.0]}, "shape [4.0]"),
        ({"shape": [-1]}, "shape [-1]"),
        ({"shape": {}}, "shape {}"),
        ({"data_offsets": [0]}, "data_offsets [0]"),
        ({"data_offsets": [0.5, 1.5]}, "data_offsets [0.5, 1.5]"),
        ({"data_offsets": None}, "data_offsets None"),
        ({"more": 1}, '"more": 1}, not dtype, shape, data_offsets alone'),
    ],
)
def test_header_of_the_wrong_types(copied, change, part):
    path = copied / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    rows = json.loads(data[8 : 8 + length])
    rows["connector.fc1.bias"] |= change
    head = json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])
    refuses(
        copied, str(path), "connector.fc1.bias", part, "download or copy it again", generation=False
    )


@pytest.mark.parametrize("name", ["model.safetensors", "llm_config.json"])
def test_git_lfs_pointers_are_recognised(copied, name):
    (copied / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 29206\n"
    )
    refuses(copied, str(copied / name), "it is a Git LFS pointer: run `git lfs pull`")


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("only", None, "give a text"),
        ("only", "generation", 'give "" or "understanding"'),
        ("file", "weights", 'give "model" or "ema"'),
        ("path", 3, "give a text"),
    ],
)
def test_note_of_an_import_that_was_changed(imported, tmp_path, key, value, fix):
    folder = pathlib.Path(shutil.copytree(imported, tmp_path / "changed"))
    edit(folder / "release", "source.json", {key: value})
    refuses(
        folder,
        f"release/source.json: {key} is {json.dumps(value)}: {fix}",
        "import the release again",
    )


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({}, "has no config.model.llm and .vit"),
        ([1], "has no config.model.llm and .vit"),
        ({"model": 3}, "has no config.model.llm and .vit"),
        ({"model": {"llm": "", "vit": {}}}, 'model.llm is "": give an object in braces'),
        ({"model": {"llm": {}, "vit": {}}}, "lacks 'model.llm.vocab_size'"),
        (
            {
                "model": {
                    "llm": dataclasses.asdict(ODD.llm) | {"num_heads": None},
                    "vit": dataclasses.asdict(ODD.vit),
                }
            },
            "model.llm.num_heads is null: give a whole number",
        ),
        (
            {
                "model": {
                    "llm": dataclasses.asdict(ODD.llm) | {"num_heads": 3, "num_kv_heads": 2},
                    "vit": dataclasses.asdict(ODD.vit),
                }
            },
            "must be a multiple of num_kv_heads 2",
        ),
        (
            {
                "model": {
                    "llm": dataclasses.asdict(ODD.llm),
                    "vit": dataclasses.asdict(ODD.vit),
                    "generation": {"on": True, "channels": "8"},
                }
            },
            'model.generation.channels is "8": give a whole number',
        ),
        (
            {
                "model": {"llm": dataclasses.asdict(ODD.llm), "vit": dataclasses.asdict(ODD.vit)},
                "lora": {"rank": 2, "alpha": "x", "targets": "q"},
            },
            'lora.targets is "q": give a list of texts',
        ),
    ],
)
def test_sizes_in_the_metadata_of_a_checkpoint(config, part):
    with pytest.raises(ValueError) as error:
        metadata.model_config(json.loads(json.dumps(config)), "W/checkpoints/7")
    assert part in str(error.value) and "W/checkpoints/7" in str(error.value)


def test_sizes_from_the_metadata(golden):
    """Of an import the dataclasses, of a run its settings."""
    sizes = {"llm": dataclasses.asdict(ODD.llm), "vit": dataclasses.asdict(ODD.vit)}
    drawn = {"generation": dataclasses.asdict(ODD.generation)}
    assert metadata.model_config(json.loads(json.dumps({"model": sizes | drawn})), "x") == ODD
    config = config_lib.default()
    config.model.generation.on, config.lora.rank = True, 4
    again = metadata.model_config(config_lib.to_json(config), "x")
    assert again == dataclasses.replace(
        config_lib.model(config), dtype="float32", remat="none", query_block=0
    )
    config.model.generation.on, config.lora.rank = False, 0
    again = metadata.model_config(config_lib.to_json(config), "x")
    assert again.generation is None and again.lora is None


# --- import ---------------------------------------------------------------------------------------


def test_imported_folder(golden, imported):
    """It loads as the release does, keeps its side files, and tells where it came from."""
    files = read_release(golden)
    for dtype in ("float32", None):
        config, params = load.load(str(imported), generation=True, dtype=dtype)
        same(named(params), files)
    assert config == folders.read_config(str(golden), generation=True)
    _, part = load.load(str(imported), dtype="bfloat16", mesh=sharding.make_mesh())
    assert "latent" not in part and {str(x.dtype) for x in jax.tree.leaves(part)} == {"bfloat16"}
    source = json.loads((imported / "release" / "source.json").read_text())
    assert source == {"path": str(golden), "file": "model", "dtype": "float32", "only": ""}
    for name in (
        "config.json",
        "llm_config.json",
        "vit_config.json",
        "ae_params.json",
        "special_tokens.json",
        "tokenizer.json",
    ):
        assert (imported / "release" / name).read_bytes() == (golden / name).read_bytes()
    assert folders.tokenizer_folder(str(imported)) == str(imported / "release")
    assert folders.tokenizer_folder(str(golden)) == str(golden)
    assert folders.is_model(str(imported)) and folders.is_model(str(golden))


def test_imported_folder_starts_a_run(imported):
    """What training does with config.init_from = an imported folder."""
    config = folders.read_config(str(imported))
    abstract = params_lib.unflatten(dict(load.abstract_params(config)))
    params = checkpoint.restore_params(imported, abstract, partial=True)
    assert "gen" not in params["llm"]["layers"]
    sizes = json.loads(json.dumps(dataclasses.asdict(config.llm)))
    assert checkpoint.metadata(imported)["config"]["model"]["llm"] == sizes


def test_import_for_understanding(golden, understanding, capsys):
    _, params = load.load(str(understanding))
    same(named(params), named(load.load(str(golden))[1]))
    refuses(understanding, "imported with --only=understanding", "import the release again")


@pytest.mark.slow
def test_import_of_other_dtype(golden, tmp_path):
    importing.import_release(
        str(golden), str(tmp_path / "a"), only="understanding", dtype="bfloat16"
    )
    _, params = load.load(str(tmp_path / "a"), dtype=None)
    same(named(params), named(load.load(str(golden), dtype="bfloat16")[1]))
    assert json.loads((tmp_path / "a/release/source.json").read_text())["dtype"] == "bfloat16"


def test_commands_that_fail_leave_nothing(copied, tmp_path, capsys):
    def fails(*arguments):
        with pytest.raises(SystemExit) as error:
            convert.main(list(arguments))
        assert error.value.code == 1
        return capsys.readouterr().err

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    before = sorted(os.listdir(tmp_path))
    assert "is not empty" in fails("import", f"--source={copied}", f"--target={tmp_path / 'full'}")
    assert "is not a released folder" in fails(
        "import", f"--source={tmp_path}", f"--target={tmp_path / 't'}"
    )
    assert "mount the bucket" in fails("import", f"--source={copied}", "--target=gs://bucket/x")
    change(copied, add={"extra": np.ones(1, np.float32)})
    assert "error: " in (
        said := fails("import", f"--source={copied}", f"--target={tmp_path / 't'}")
    )
    assert "surplus extra" in said
    assert "released folder already" in fails(
        "export", f"--source={copied}", f"--target={tmp_path / 't'}"
    )
    assert "no checkpoint there" in fails(
        "export", f"--source={tmp_path / 'full'}", f"--target={tmp_path / 't'}"
    )
    assert sorted(os.listdir(tmp_path)) == before


# --- export ---------------------------------------------------------------------------------------


def export(source, target, *arguments):
    convert.main(["export", f"--source={source}", f"--target={target}", *arguments])
    return target


@pytest.mark.slow
def test_round_trip(golden, imported, tmp_path):
    """import, export, import: the same bits, configs and tokenizer."""
    out = export(imported, tmp_path / "out")
    same(read_release(out), read_release(golden))
    names = {name for name in os.listdir(golden) if name.endswith("json") and name != "shapes.json"}
    assert {"config.json", "ae_params.json", "special_tokens.json", "tokenizer.json"} < names
    assert names | {"model.safetensors", "ae.safetensors"} == set(os.listdir(out))
    for name in names:
        assert (out / name).read_bytes() == (golden / name).read_bytes()
    importing.import_release(str(out), str(tmp_path / "again"))
    same(named(load.load(str(tmp_path / "again"), generation=True)[1]), read_release(golden))


@pytest.mark.slow
def test_round_trip_of_bfloat16(golden, tmp_path):
    """A release in bfloat16 with its autoencoder in float32, under the name ema; by a step
    folder.
    """
    folder = pathlib.Path(shutil.copytree(golden, tmp_path / "release"))
    (folder / "model.safetensors").unlink()
    save_file(
        {
            name: x.astype(jnp.bfloat16)
            for name, x in load_file(golden / "model.safetensors").items()
        },
        folder / "ema.safetensors",
    )
    importing.import_release(str(folder), str(tmp_path / "a"))
    assert (
        json.loads((tmp_path / "a/release/source.json").read_text())["dtype"]
        == "bfloat16 and float32"
    )
    out = export(tmp_path / "a/checkpoints/0", tmp_path / "out", "--name=ema")
    same(read_release(out), read_release(folder))
    assert (out / "ema.safetensors").exists() and not (out / "model.safetensors").exists()
    importing.import_release(str(out), str(tmp_path / "b"))
    (_, a), (_, b) = (load.load(str(tmp_path / name), generation=True, dtype="") for name in "ab")
    same(named(a), named(b))


def test_export_in_shards_and_other_dtype(golden, imported, tmp_path, capsys):
    out = export(imported, tmp_path / "out", "--max_shard_gb=0.0003", "--dtype=bfloat16")
    parts = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    assert all((out / part).stat().st_size < 0.0004e9 for part in parts)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    wanted = {
        file: {name: x.astype(jnp.bfloat16) for name, x in found.items()}
        for file, found in read_release(golden).items()
    }
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in wanted["model"].values())
    assert set(index["weight_map"].values()) == set(parts)
    same(read_release(out), wanted)
    same(named(load.load(str(out), generation=True, dtype=None)[1]), wanted)


@pytest.mark.parametrize("size", ["-1", "nan", "inf"])
def test_a_size_of_files_that_cannot_be_is_refused(imported, tmp_path, capsys, size):
    with pytest.raises(SystemExit) as ended:
        export(imported, tmp_path / "out", f"--max_shard_gb={size}")
    assert ended.value.code == 1 and f"--max_shard_gb is {size}.0"[:18] in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_export_completes_the_generation_path_from_the_release(
    golden, imported, understanding, tmp_path, capsys
):
    """By its own note, and from an imported folder."""
    for n, base in enumerate(("", f"--base={imported}")):
        out = export(understanding, tmp_path / f"out{n}", *filter(None, [base]))
        same(read_release(out), read_release(golden))
        assert (out / "config.json").read_bytes() == (golden / "config.json").read_bytes()
        assert (
            f"image generation is that of {base.removeprefix('--base=') or golden}"
            in capsys.readouterr().out
        )


def test_export_of_the_understanding_path(golden, understanding, tmp_path, capsys):
    out = export(understanding, tmp_path / "out", "--base=none")
    assert (
        "the understanding path only; config.json says visual_gen false" in capsys.readouterr().out
    )
    assert not json.loads((out / "config.json").read_text())["visual_gen"]
    assert {path.name for path in out.glob("ae*")} == set()
    _, params = load.load(str(out))
    same(named(params), named(load.load(str(golden))[1]))
    refuses(out, "ae.safetensors is missing", kind=FileNotFoundError)


def test_import_of_a_folder_without_image_generation(golden, understanding, tmp_path):
    """As the export of a run on texts: the error says which flag leaves image generation out."""
    out = export(understanding, tmp_path / "out", "--base=none")
    top = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps({key: top[key] for key in top.keys() - {"latent_patch_size", "max_latent_size"}})
    )
    refuses(out, "config.json: visual_gen is false", "--only=understanding")


def test_base_that_does_not_fit(golden, understanding, tmp_path, capsys):
    def fails(base):
        with pytest.raises(SystemExit):
            export(understanding, tmp_path / "out", f"--base={base}")
        return capsys.readouterr().err

    assert "has other sizes" in fails(write_release(tmp_path / "odd", ODD))
    assert "does not exist" in fails(tmp_path / "gone")
    half = tmp_path / "half"
    export(understanding, half, "--base=none")
    assert "holds no generation expert" in fails(half)
    moved = shutil.copytree(understanding, tmp_path / "moved")
    note = moved / "release" / "source.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"path": str(tmp_path / "gone")}))
    with pytest.raises(SystemExit):
        export(moved, tmp_path / "out")
    assert "--base=FOLDER, or --base=none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def run_folder(workdir, model, init_from, seed=1):
    """A run's workdir with a checkpoint of step 7: (parameters, workdir)."""
    config = config_lib.default()
    config.init_from = str(init_from)
    for name, part in (("llm", model.llm), ("vit", model.vit)):
        config.model[name].update(dataclasses.asdict(part))
    params = tiny.params(dataclasses.replace(model, generation=None), seed)
    saved = config_lib.to_json(config)
    os.makedirs(workdir / "checkpoints")
    (workdir / "config.json").write_text(json.dumps(saved))
    (workdir / "data" / "made" / "tokenizer").mkdir(parents=True)
    (workdir / "data" / "made" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    checkpoint.save(
        workdir / "checkpoints" / "7",
        {"step": jnp.int32(7)},
        params,
        step=7,
        stage="opsd",
        config=saved,
    )
    return params, workdir


def test_export_of_a_run(golden, understanding, tmp_path):
    """Trained weights with the untouched rest of the release that the run's start descends from."""
    model = folders.read_config(str(golden))
    params, workdir = run_folder(tmp_path / "w", model, understanding)
    out, by_step = (
        export(workdir, tmp_path / "out"),
        export(workdir / "checkpoints/7", tmp_path / "step"),
    )
    files, trained = read_release(golden), named(params)["model"]
    assert len(trained) > 50
    same(read_release(out), {"model": files["model"] | trained, "ae": files["ae"]})
    same(read_release(by_step), read_release(out))
    assert (out / "tokenizer_config.json").exists()
    assert (out / "config.json").read_bytes() == (golden / "config.json").read_bytes()
    assert load.load(str(out), generation=True)[0] == folders.read_config(
        str(golden), generation=True
    )


def averaged_run(workdir, *, kept, rank=0, teacher="ema"):
    """A run's workdir with a whole training state: (student's weights, teacher's weights, workdir).

    kept: config.checkpoint.params. rank: of adapters, which are then all that is trained and
      averaged.
    """
    config = config_lib.default()
    for name, part in (("llm", tiny.MODEL.llm), ("vit", tiny.MODEL.vit)):
        config.model[name].update(dataclasses.asdict(part))
    config.checkpoint.params, config.teacher.kind, config.lora.rank = kept, teacher, rank
    config.model.dtype = "float32"
    how = distill.DistillConfig(model=config_lib.model(config), bos=0, eos=1, teacher=teacher)
    params = jax.tree.map(
        lambda x: np.asarray(x) + np.float32(0.01), tiny.params(how.model)
    )  # adapters start at 0
    state = distill.init_state(params, how)
    if teacher == "ema":
        state["ema"] = jax.tree.map(lambda x: np.float32(0.5) * np.asarray(x), state["ema"])
    average = distill.teacher_params(state, how)
    saved = config_lib.to_json(config)
    os.makedirs(workdir)
    (workdir / "config.json").write_text(json.dumps(saved))
    checkpoint.save(
        workdir / "checkpoints" / "7",
        state,
        average if kept == "ema" and teacher == "ema" else params,
        step=7,
        stage="opsd",
        config=saved,
    )
    return [
        {
            "model": {
                name: x
                for path, leaf in params_lib.flatten(
                    params_lib.merge_lora(tree, how.model.lora) if rank else tree
                ).items()
                for name, x in tiny.released(path, np.asarray(leaf)).items()
            },
            "ae": {},
        }
        for tree in (params, average)
    ] + [workdir]


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "rank"), [("student", 0), ("ema", 0), ("ema", 2)])
def test_the_name_of_an_export_says_whose_weights_it_holds(tmp_path, monkeypatch, kept, rank):
    """The student's as model, the teacher's averages as ema, whichever of them the checkpoint keeps
    for inference.
    """
    monkeypatch.setattr(export_lib, "GROUP_BYTES", 1 << 16)  # several groups
    student, average, workdir = averaged_run(tmp_path / "w", kept=kept, rank=rank)
    for n, (arguments, file, wanted) in enumerate(
        ([[], "model", student], [["--name=ema"], "ema", average])
    ):
        out = export(workdir, tmp_path / f"{n}", *arguments)
        assert sorted(path.name for path in out.glob("*.safetensors")) == [f"{file}.safetensors"]
        same(read_release(out), wanted)
    assert any(
        not np.array_equal(x, average["model"][name]) for name, x in student["model"].items()
    )


@pytest.mark.parametrize("teacher", ["self", "fixed"])
def test_no_averages_to_export(tmp_path, capsys, teacher):
    _, _, workdir = averaged_run(tmp_path / "w", kept="student", teacher=teacher)
    with pytest.raises(SystemExit):
        export(workdir, tmp_path / "out", "--name=ema")
    assert (
        f"--name=ema: {workdir}/checkpoints/7 holds no averaged weights (its stage is 'opsd')"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_import_keeps_its_name(golden, imported, tmp_path, capsys):
    """It holds one file's weights, and is exported under that name alone."""
    folder = pathlib.Path(shutil.copytree(golden, tmp_path / "release"))
    (folder / "model.safetensors").rename(folder / "ema.safetensors")
    importing.import_release(str(folder), str(tmp_path / "averages"))
    for source, name, other in (
        (imported, "model", "ema"),
        (tmp_path / "averages", "ema", "model"),
    ):
        out = export(source, tmp_path / f"out-{name}")
        assert (out / f"{name}.safetensors").exists() and not (
            out / f"{other}.safetensors"
        ).exists()
        capsys.readouterr()
        with pytest.raises(SystemExit):
            export(source, tmp_path / "not", f"--name={other}")
        assert (
            f"--name={other}: {source} was imported from {name}.safetensors"
            in capsys.readouterr().err
        )


def test_export_of_a_run_from_nothing(tmp_path, capsys):
    params, workdir = run_folder(tmp_path / "w", tiny.MODEL, "")
    out = export(workdir, tmp_path / "out")
    assert "the understanding path only" in capsys.readouterr().out
    config, found = load.load(str(out))
    assert config == tiny.MODEL
    same(named(found), named(params))


def test_diverged_weights_are_not_exported(tmp_path, capsys):
    params = tiny.params()
    params["llm"]["layers"]["und"]["q_bias"] = (
        params["llm"]["layers"]["und"]["q_bias"].at[1, 0].set(jnp.nan)
    )
    checkpoint.save(
        tmp_path / "c" / "3",
        None,
        params,
        config={
            "model": {
                "llm": dataclasses.asdict(tiny.MODEL.llm),
                "vit": dataclasses.asdict(tiny.MODEL.vit),
            }
        },
    )
    with pytest.raises(SystemExit):
        export(tmp_path / "c" / "3", tmp_path / "out")
    said = capsys.readouterr().err
    assert "NaN or infinite: language_model.model.layers.1.self_attn.q_proj.bias\n" in said
    assert sorted(os.listdir(tmp_path)) == ["c"]


if __name__ == "__main__":
    mode, folder = sys.argv[1:]
    if mode == "mesh":
        on_meshes(folder)
    elif mode == "memory of load":
        kept = []
        peak_above_params(folder, lambda folder: kept.append(load.load(folder)))
    else:
        peak_above_params(
            folder,
            lambda folder: importing.import_release(
                folder, folder + "-imported", only="understanding"
            ),
        )
