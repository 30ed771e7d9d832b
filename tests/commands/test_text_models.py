"""Runs on decoders of other families, which read text alone: the teacher reads the solution."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import train
from opsd_jax.release import export, families, folders
from opsd_jax.run import answering, run_page
from opsd_jax.run import model as model_lib
from opsd_jax.run import scores as scores_lib

pytestmark = pytest.mark.usefixtures("fast_compiles")

TEXT = {
    "model__vit__on": False,
    "model__llm__num_layers": 1,
    "model__llm__hidden_size": 30,
    "model__llm__num_heads": 3,
    "model__llm__num_kv_heads": 1,
    "model__llm__head_dim": 12,
    "stages": ("opsd",),
    "student__blocks": ("question",),
    "teacher__blocks": ("question", "intro", "text:full_text_only_thought", "transition"),
    "data__buckets__student": ((20, 0),),
    "data__buckets__teacher": ((50, 0),),
    "data__buckets__trace": ((50, 0, 30),),
    "opsd__steps": 2,
    "eval__every": 0,
    "eval__visual_thoughts": ("none",),
    "checkpoint__every": 2,
    "log__samples_every": 0,
}
FAMILIES = {
    "qwen2": {"qk_norm": False},
    "qwen3": {"qkv_bias": False, "tied_head": True},
    "llama": {
        "qkv_bias": False,
        "qk_norm": False,
        "tied_head": True,
        "rope_llama3": (8.0, 1.0, 4.0, 16.0),
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the data of all runs."""
    folder = tmp_path_factory.mktemp("text")
    small_run.make_data(small_run.config(**TEXT), folder)
    return str(folder / "data")


def config(family, data, **more):
    changes = {f"model__llm__{key}": value for key, value in FAMILIES[family].items()}
    return small_run.config(**TEXT | changes | {"data__dir": data} | more)


def opsd_lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "jsd" in line]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run of a Llama decoder."""
    workdir = tmp_path_factory.mktemp("llama")
    train.train(config("llama", data), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "release"
    export.export_release(str(trained), str(folder))
    return folder


def check_run(workdir):
    lines = opsd_lines(workdir)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert np.isfinite(line["loss"]) and line["jsd"] > 0 and line["grad_norm"] > 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_opsd_of_a_text_model(family, data, tmp_path):
    train.train(config(family, data, eval__final_split=""), str(tmp_path))
    check_run(tmp_path)
    assert families.family(config_lib.model(config(family, data))) == family


def test_opsd_of_a_llama(trained):
    check_run(trained)
    summary = json.loads((trained / "eval" / "000002-none" / "summary.json").read_text())
    assert summary["benchmarks"][small_run.TASK]["n"] == small_run.TEST_ROWS


def test_a_run_is_exported_as_a_folder_of_its_family(trained, exported, data):
    content = json.loads((exported / "config.json").read_text())
    assert content["model_type"] == "llama" and content["tie_word_embeddings"]
    assert content["rope_scaling"]["rope_type"] == "llama3"
    sizes = config_lib.model(config("llama", data))
    assert folders.read_config(str(exported)).llm == sizes.llm
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in exported.iterdir()
    }


def test_an_exported_folder_answers_as_its_run(trained, exported):
    answers = []
    for source in (trained, exported):
        model = model_lib.load(str(source), dtype="float32", protocol="paper")
        protocol = dataclasses.replace(model.protocol, max_new_tokens=6)
        model = dataclasses.replace(model, protocol=protocol)
        answers.append(answering.answer(model, [], "which bar is higher ?"))
    assert answers[0].tokens == answers[1].tokens > 0
    assert answers[0].text == answers[1].text


def test_a_run_starts_from_a_released_folder(exported, data, tmp_path):
    """In the programs of the run before; its first step is not that of random weights."""
    train.train(config("llama", data, init_from=str(exported), eval__final_split=""), str(tmp_path))
    check_run(tmp_path)
    other = config("llama", data, init_from=str(exported), model__llm__rope_theta=50.0)
    with pytest.raises(ValueError, match="set config.model to them"):
        train.train(other, str(tmp_path / "other"))


WORD_PROBLEMS = {
    "data__tasks": ("Arithmetic",),
    "data__make__families": ("arithmetic",),
    "data__make__difficulty": "easy",
    # spelled in bytes
    "data__buckets__student": ((200, 0),),
    "data__buckets__teacher": ((270, 0),),
    "data__buckets__trace": ((400, 0, 120),),
}


@pytest.mark.slow
def test_opsd_of_questions_without_images(tmp_path):
    """The run makes the data. Its samples, evaluations with and without the solution, and pages."""
    teacher = {"final_visual_thoughts": ("none", "swap"), "kl": False, "final_banned": False}
    changes = WORD_PROBLEMS | {f"eval__{key}": value for key, value in teacher.items()}
    fields = {f"model__llm__{key}": value for key, value in FAMILIES["llama"].items()}
    train.train(small_run.config(**TEXT | fields | changes), str(tmp_path))
    check_run(tmp_path)
    for mode in ("none", "swap"):
        folder = tmp_path / "eval" / f"000002-{mode}"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["benchmarks"]["Arithmetic"]["n"] == small_run.TEST_ROWS
        page = (folder / "report.html").read_text()
        assert "How many" in page and "<img" not in page
        what = {"none": "without", "swap": "with another example&#x27;s"}[mode]
        assert f"Evaluation 000002-{mode}: {what} privileged content" in page
    assert "How many" in next(tmp_path.glob("samples/*/opsd-first-batch.txt")).read_text()
    assert not [*tmp_path.glob("samples/**/*.png")]
    scores = scores_lib.collect(str(tmp_path), ())
    page = pathlib.Path(run_page.write(str(tmp_path), scores, ())).read_text()
    assert "OPSD, question alone" in page and "it always sees the question. " in page
    assert "visual thought" not in page and "problem image" not in page


def test_a_teacher_that_sees_nothing_more_is_refused(tmp_path):
    """A model that sees images, with the paper's blocks: nobody sees any."""
    changes = {"stages": ("opsd",), "eval__every": 0, "eval__final_split": ""}
    with pytest.raises(
        ValueError, match="no example of Arithmetic has visual_thoughts, so teacher"
    ):
        train.train(small_run.config(**WORD_PROBLEMS | changes), str(tmp_path))
