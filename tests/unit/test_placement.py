"""On how many devices a copy of a model is divided: by hand, from sizes and the memory of chips."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import tiny
from opsd_jax import config as config_lib
from opsd_jax import images, interleave, sharding
from opsd_jax.release import configs
from opsd_jax.run import placement
from opsd_jax.runtime import chips


class Device(types.SimpleNamespace):
    """A stand-in, equal to nothing else."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def device(kind, platform="tpu", **stats):
    return Device(device_kind=kind, platform=platform, memory_stats=lambda: stats)


def test_memory_of_a_device():
    assert chips.memory(device("TPU v5 lite")) == 15.75 * chips.GIB
    assert chips.memory(device("TPU v5")) == 95.74 * chips.GIB
    assert chips.memory(device("TPU v6 lite")) == 31.25 * chips.GIB
    assert chips.memory(device("NVIDIA H100", "gpu", bytes_limit=60e9)) == 60e9
    assert chips.memory(jax.devices()[0]) is None
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_the_7b_model_is_divided_where_a_chip_is_too_small():
    """15.0 GiB in bfloat16, 56 KiB of keys per position, and some four times that while reading."""
    model = dataclasses.replace(config_lib.model(config_lib.default()), generation=None)
    assert placement.degrees(model, 8) == [1, 2, 4]  # 28 heads, 4 of them with keys
    few, many = placement.Cache(4, 4096), placement.Cache(64, 8192)

    def of(chip, cache, devices=4):
        return placement.fastest(model, devices, chips.CHIPS[chip].hbm * chips.GIB, cache)

    assert (of("v5e", few), of("v6e", few), of("v5p", few)) == (2, 1, 1)
    # 16 sequences a device if whole: 7 GiB of keys, and as much for two with two devices each;
    # with activations more than a v6e has, however it is divided
    assert (of("v5e", many), of("v6e", many), of("v5p", many)) == (4, 4, 1)
    assert of("v6e", placement.Cache(24, 8192)) == 1 and of("v6e", placement.Cache(32, 8192)) == 2
    assert placement._keys(model, 1, 4, many) == placement._keys(model, 2, 4, many) == 7 * 2**30
    assert of("v5e", few, devices=1) == 1  # there is no other way
    message = r"take 1[45]\.\d GiB of each device, with --tensor=1, .* v5 .* give --tensor=2 on"
    with pytest.raises(ValueError, match=message):
        placement.check_memory(model, 1, 14 * chips.GIB, "TPU v5 lite")


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_the_7b_model_is_divided_where_tokens_come_faster(chip):
    """15 GiB of weights take a v5e 20 ms, and a quarter of them 5 ms and 0.6 ms of sums."""
    model, cache = config_lib.model(config_lib.default()), placement.Cache(4, 4096)
    text, sheet = dataclasses.replace(model, generation=None), chips.CHIPS[chip]
    memory = sheet.hbm * chips.GIB
    assert placement.fastest(text, 4, memory, cache, sheet) == 4
    assert placement.fastest(text, 2, memory, cache, sheet) == 2
    small = dataclasses.replace(tiny.MODEL, dtype="bfloat16")  # the sums take longer
    assert placement.fastest(small, 4, memory, placement.Cache(4, 64), sheet) == 1
    images = config_lib.default()
    images.model.generation.on = True
    images = config_lib.model(images)
    fewest = {"v5e": 2, "v5p": 1, "v6e": 1}[chip]  # both experts are 27.4 GiB
    assert placement.fastest(images, 4, memory, placement.Cache(1, 64), sheet) == fewest


def test_the_mesh_is_what_was_asked_for_or_fits(monkeypatch):
    devices, seen = [device("TPU v5 lite")] * 4, []

    def stand_in(tensor, given):
        seen.append((tensor, len(given)))
        return jax.sharding.AbstractMesh((1, len(given) // tensor, tensor), sharding.AXES)

    monkeypatch.setattr(sharding, "inference_mesh", stand_in)
    cache = placement.Cache(4, 64)
    sizes = dataclasses.replace(tiny.MODEL, dtype="float32")
    placement.mesh(sizes, devices, cache, tensor=0, otherwise=2)
    placement.mesh(sizes, devices, cache, tensor=2, otherwise=1)
    for otherwise in (2, 3):  # nothing is known of the memory: the run's own, if it divides them
        placement.mesh(sizes, [jax.devices()[0]] * 4, cache, tensor=0, otherwise=otherwise)
    assert seen == [(1, 4), (2, 4), (2, 4), (1, 4)]


def training_mesh(kind, *sizes):
    """A stand-in of a mesh, of devices that nothing is computed on."""
    devices = np.array([device(kind, "tpu" if "TPU" in kind else "cpu") for _ in range(8)])
    return jax.sharding.Mesh(devices.reshape(sizes), sharding.AXES)


@pytest.mark.parametrize(
    "kind, changes, tensor",
    [
        # Of 15.0 GiB of weights in bfloat16 a v5p reads 2.77 TB/s: 5.8 ms for each token. Divided
        # by four, it is 1.5 ms and 56 sums of 10 us. More than 4 heads with keys there are not.
        ("TPU v5p", {}, 4),
        ("TPU v5p", {"rollout.tensor": 2}, 2),
        ("TPU v5p", {"rollout.tensor": 1}, 1),
        # 0.2 M parameters are read in less than the sums take.
        ("TPU v5p", {"model.llm.num_layers": 1, "model.llm.hidden_size": 112}, 1),
        ("cpu", {}, 1),  # nothing is known: as the update has it
        ("cpu", {"rollout.tensor": 8}, 8),
    ],
)
def test_the_sampler_has_a_mesh_of_its_own(kind, changes, tensor):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    if "model.llm.num_layers" in changes:
        config.model.llm.update(vocab_size=64, intermediate_size=64)
        config.model.vit.update(hidden_size=16, num_layers=1, intermediate_size=16, num_heads=1)
    mesh = training_mesh(kind, 1, 8, 1)
    found = placement.of_rollouts(config, mesh)
    assert dict(found.shape) == {"data": 1, "fsdp": 8 // tensor, "tensor": tensor}
    assert list(found.devices.flat) == list(mesh.devices.flat)
    assert (found is mesh) == (tensor == 1)


def test_a_sampler_whose_copies_do_not_divide_the_batch():
    config = config_lib.default()
    config.opsd.batch_size, config.rollout.tensor = 4, 1
    mesh = training_mesh("TPU v5p", 1, 4, 2)
    message = "rollout.tensor=1 makes 8 copies .* config.opsd.batch_size is 4: .* multiple of 8"
    with pytest.raises(ValueError, match=message):
        placement.of_rollouts(config, mesh)
    config.rollout.tensor = 3
    with pytest.raises(
        ValueError, match="rollout.tensor=3 must divide .* slice, here 8: give a divisor"
    ):
        placement.of_rollouts(config, mesh)
    config.rollout.tensor = 0  # 4 sequences for at most 4 copies
    assert placement.of_rollouts(config, mesh).shape["tensor"] == 4
    config.opsd.batch_size, config.rollout.slots = 16, 12  # lanes divide, too
    assert placement.of_rollouts(config, mesh).shape["tensor"] in (2, 4)


def test_a_number_that_does_not_divide_the_devices():
    with pytest.raises(ValueError, match="--tensor=3: .* there are 4: give a divisor of 4"):
        sharding.inference_mesh(3, [device("cpu", "cpu")] * 4)
    with pytest.raises(ValueError, match="--tensor=2: there are 1 devices"):
        placement.single_copy(tiny.MODEL, 2)


def test_the_largest_question():
    """One image, its latents if images are generated, and the text before and after it."""
    model = interleave.Reasoner(
        tiny.DRAWING,
        {},
        tiny.TOKENIZER,
        interleave.Protocol(max_new_tokens=6),
        images.Resize(4, 24, 8),
        images.Resize(8, 48, 16),
    )
    text = dataclasses.replace(model, config=tiny.MODEL)
    assert [type(b).__name__ for b in placement.largest_question(text)] == ["Image", "Text"]
    blocks = placement.largest_question(model, 1)
    kinds = "".join(type(block).__name__[0] for block in blocks)
    assert kinds == "LITTLI" and blocks[0].grid == blocks[1].grid == (6, 6)
    # 36 patches, their two delimiters, 512 tokens with two: 552, in the bucket 768
    assert placement.cache_of(text, 3) == placement.Cache(3, 768 + 6)
    cache = placement.cache_of(model, 3)
    assert cache.sequences == 3 * len(interleave.flow_config(model).branches)


@pytest.mark.parametrize(
    "key, value, dtype",
    [
        ("torch_dtype", "float32", "float32"),
        ("torch_dtype", "bfloat16", "bfloat16"),
        ("dtype", "float32", "float32"),  # transformers 5
        ("torch_dtype", "float16", "bfloat16"),
        ("torch_dtype", None, "bfloat16"),
        ("torch_dtype", ["float32"], "bfloat16"),
    ],
)
def test_compute_dtype_of_a_release(tmp_path, key, value, dtype):
    """Whatever its weights are stored in."""
    configs.json_files.write(str(tmp_path / "llm_config.json"), {key: value})
    assert configs.compute_dtype(str(tmp_path)) == dtype
