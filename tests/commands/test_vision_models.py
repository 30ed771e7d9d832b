"""Runs on tiny models with the vision towers of Qwen2.5-VL and Qwen3-VL."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, images, train
from opsd_jax.release import export, families, folders
from opsd_jax.run import answering
from opsd_jax.run import model as model_lib

pytestmark = pytest.mark.usefixtures("fast_compiles")

# Images become 2 x 2 tokens of 2 x 2 patches.
SEEING = {
    "model__llm__num_layers": 1,
    "model__llm__mrope": (2, 3, 3),
    "model__vit__merge": 2,
    "model__vit__temporal_patch": 2,
    "model__vit__num_layers": 2,
    "images__stride": 16,
    "images__min_pixels": 256,
    "images__max_pixels": 1024,
    "images__transparency": "white",
    "stages": ("opsd",),
    "data__buckets__student": ((40, 16),),
    "data__buckets__teacher": ((80, 32),),
    "data__buckets__trace": ((96, 32, 44),),
    "opsd__steps": 2,
    "rollout__max_image_skips": 0,
    "eval__every": 0,
    "eval__final_split": "",
    "checkpoint__every": 2,
    "log__samples_every": 0,
}
FAMILIES = {
    "qwen2_5_vl": {
        "llm__qk_norm": False,
        "llm__tied_head": True,
        "vit__side": 0,
        "vit__window": 16,
        "vit__full_layers": (1,),
        "vit__mean": (0.48, 0.46, 0.41),
        "vit__std": (0.27, 0.26, 0.28),
    },
    "qwen3_vl": {
        "llm__qkv_bias": False,
        "llm__mrope_interleaved": True,
        "vit__side": 3,
        "vit__deepstack": (0,),
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the data of all runs."""
    folder = tmp_path_factory.mktemp("seeing")
    small_run.make_data(config("qwen3_vl", ""), folder)
    return str(folder / "data")


def config(family, data, **more):
    changes = {f"model__{key}": value for key, value in FAMILIES[family].items()}
    changes |= {"model__vit__kind": family, "data__dir": data}
    return small_run.config(**SEEING | changes | more)


def check_run(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "jsd" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert np.isfinite(line["loss"]) and line["jsd"] > 0 and line["grad_norm"] > 0


@pytest.mark.slow
def test_opsd_and_evaluation_of_a_qwen2_5_vl(data, tmp_path):
    """Two steps, samples of the images that the model sees, and answers of the final evaluation."""
    train.train(config("qwen2_5_vl", data, eval__final_split="test"), str(tmp_path))
    check_run(tmp_path)
    shown = sorted((tmp_path / "samples").rglob("*row0-problem*"))
    assert shown and {Image.open(path).size for path in shown} == {(32, 32)}
    summary = json.loads((tmp_path / "eval" / "000002-none" / "summary.json").read_text())
    assert summary["benchmarks"][small_run.TASK]["n"] == small_run.TEST_ROWS


@pytest.mark.slow
def test_opsd_of_a_qwen3_vl_and_its_folder(data, tmp_path):
    """The exported folder has the run's sizes, and answers a question about two images."""
    settings, folder = config("qwen3_vl", data), tmp_path / "release"
    train.train(settings, str(tmp_path / "run"))
    check_run(tmp_path / "run")
    export.export_release(str(tmp_path / "run"), str(folder))
    found, sizes = folders.read_config(str(folder)), config_lib.model(settings)
    assert (found.llm, found.vit) == (sizes.llm, sizes.vit)
    assert families.family(found) == "qwen3_vl"
    model = model_lib.load(str(folder), dtype="float32", protocol="paper")
    assert (model.vit.stride, model.vit.min_pixels) == (16, 65_536)  # those of the family
    model = dataclasses.replace(
        model,
        vit=images.SmartResize(16, 256, 1024),
        protocol=dataclasses.replace(model.protocol, max_new_tokens=6),
    )
    asked = [Image.new("RGB", (50, 40), color) for color in ("red", "blue")]
    answers = [
        answering.answer(model, shown, "which one is red ?") for shown in (asked, asked[::-1])
    ]
    assert all(answer.tokens > 0 for answer in answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images__stride": 8}, "must equal config.model.vit.patch_size 8 \\* config.model"),
        ({"data__buckets__teacher": ((80, 30),)}, "patches, a multiple of 4, since 2 x 2 patches"),
        ({"images__min_pixels": 2000}, "min_pixels 2000 is above max_pixels 1024"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_check.check(config("qwen3_vl", "", **changes))
