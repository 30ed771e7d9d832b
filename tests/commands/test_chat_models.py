"""Runs on tiny models of other families whose contexts are in chat form."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import small_run
from opsd_jax import config_check, interleave, train
from opsd_jax.diagnose import __main__ as diagnose
from opsd_jax.evaluation import prompts
from opsd_jax.release import export
from opsd_jax.run import answering
from opsd_jax.run import model as model_lib
from opsd_jax.run import session as session_lib

pytestmark = pytest.mark.usefixtures("fast_compiles")

TEMPLATES = pathlib.Path(__file__).parents[1] / "goldens_hf" / "tokenizer"
TEXT = {
    "model__vit__on": False,
    "model__llm__num_layers": 1,
    "model__llm__qkv_bias": False,
    "model__llm__tied_head": True,
    "prompts__form": "chat",
    "prompts__system": "which bar is higher ?",
    "student__blocks": ("system", "question"),
    "teacher__blocks": ("system", "question", "intro", "text:full_text_only_thought", "transition"),
    "data__buckets__student": ((160, 0),),
    "data__buckets__teacher": ((260, 0),),
    "data__buckets__trace": ((300, 0, 40),),
    "stages": ("sft", "opsd"),
    "sft__steps": 1,
    "sft__mix__reference": 1,
    "opsd__steps": 2,
    "rollout__max_image_skips": 0,
    "eval__every": 0,
    "eval__final_banned": False,
    "eval__final_visual_thoughts": ("none", "real", "noise"),
    "checkpoint__every": 3,
    "log__samples_every": 0,
}


def folder_with(template, source, target, ends):
    """The made tokenizer as a folder of a model that has a chat template."""
    shutil.copytree(source, target)
    shutil.copy(TEMPLATES / f"{template}.jinja", target / "chat_template.jinja")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return str(target)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with the data of all runs, folder of tokenizers)."""
    folder = tmp_path_factory.mktemp("chat")
    small_run.make_data(small_run.config(), folder)
    for template in ("qwen3", "qwen3_vl"):
        source = folder / "data" / "made" / "tokenizer"
        folder_with(template, source, folder / template, [5, 6])
    return folder


def config(made, **changes):
    places = {"data__dir": str(made / "data"), "tokenizer": str(made / "qwen3")}
    return small_run.config(**TEXT | places | changes)


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train.train(config(made), str(workdir))
    return workdir


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_opsd_and_sft_in_chat_form(trained):
    lines = [line for line in lines_of(trained) if "loss" in line]
    assert [line["stage"] for line in lines] == ["sft", "opsd", "opsd"]
    for line in lines:
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert all(line["jsd"] > 0 and line["image_skip_rate"] == 0 for line in lines[1:])
    for mode in ("none", "real", "noise"):
        path = trained / "eval" / f"000003-{mode}" / "summary.json"
        assert json.loads(path.read_text())["benchmarks"][small_run.TASK]["n"] == 20


@pytest.mark.slow
def test_the_sampler_and_the_update_read_the_same_conversation(trained):
    """The first token that is fed is the template's last, and the ends are those of both files."""
    run = session_lib.open_run(str(trained))
    tokenizer, sampling = run.tokenizer, run.sampling()
    assert tokenizer.decode([sampling.bos]) == "\n" and tokenizer.chat is not None
    assert tokenizer.decode([sampling.eos]) == "<|im_end|>"
    assert sampling.further_ends == (5, 6)
    assert "chat_template" in run.digests
    example = run.examples("test")(0, 0)
    ids = [i for block in run.packer.blocks(example, "student") for i in block.ids]
    messages = [
        {"role": "system", "content": "which bar is higher ?"},
        {"role": "user", "content": example.example.question},
    ]
    text = tokenizer.chat.render(messages)
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode([*ids, tokenizer.bos]) == text
    needs = run.packer.needs(example, ("noise",))
    assert needs["student"][0] == len(ids)
    assert needs["trace"][0] == needs["teacher"][0] + needs["trace"][2] + 1


@pytest.mark.slow
def test_answers_of_the_run_and_of_its_folder(trained, made, tmp_path):
    """A run is asked with its system prompt, its folder without one; a protocol cuts no answer."""
    run = model_lib.load(str(trained))
    found = answering.answer(run, [], "which bar is higher ?")
    example = session_lib.open_run(str(trained)).examples("test").sources[0][0]
    taught = answering.answer(run, example, visual_thoughts="real")
    assert found.tokens > 0 and taught.tokens > 0
    folder = tmp_path / "release"
    export.export_release(str(trained), str(folder))
    assert (folder / "chat_template.jinja").read_text() == run.tokenizer.chat.text
    released = model_lib.load(str(folder), dtype="float32")
    assert released.tokenizer.chat and released.protocol.system == ""
    contexts = interleave._contexts(released, ([], "which ?"), iter(()), False)
    asked = released.tokenizer.chat.render([{"role": "user", "content": "which ?"}])
    ids = [*np.concatenate([b.ids for b in contexts["cond"]]), released.tokenizer.bos]
    assert released.tokenizer.decode(ids) == asked
    protocol = dataclasses.replace(released.protocol, max_new_tokens=6)
    said = answering.answer(dataclasses.replace(released, protocol=protocol), [], "which ?")
    assert said.tokens > 0
    with pytest.raises(ValueError, match="in chat form generates no images"):
        interleave.reason(
            released, [([], "which ?")], jax.random.key(0), interleave.ImageGeneration()
        )


@pytest.mark.slow
@pytest.mark.parametrize("analysis", ["kl", "attention"])
def test_diagnosis_in_chat_form(trained, analysis, capsys):
    arguments = [analysis, f"--workdir={trained}", "--name=" + analysis]
    assert not diagnose.main(arguments)
    folder = trained / "diagnose" / analysis
    summary = json.loads((folder / "summary.json").read_text())
    if analysis == "kl":
        assert set(summary["completions"]) == {"base", "student", "data"}
    else:
        shares = summary["shares"]["teacher"]["real"]["completion"]
        assert set(summary["shares"]) == {"teacher"}
        assert shares["question"] > [0] and shares["visual thoughts"] > [0]
        assert np.allclose(np.sum([*shares.values()], axis=0), 1, atol=1e-4)


@pytest.mark.slow
def test_another_template_is_another_run(made, trained, tmp_path):
    """A run continues with the template that it started with."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(made / "qwen3", folder)
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(text + " ")
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    with pytest.raises(config_check.ConfigMismatchError, match="another content of chat_template"):
        train.train(config(made, tokenizer=str(folder)), str(copy))


@pytest.mark.slow
def test_opsd_of_a_vision_model_in_chat_form(made, tmp_path):
    """Images in the user's turn, by the template of Qwen3-VL."""
    seeing = {
        "model__vit__on": True,
        "model__vit__kind": "qwen3_vl",
        "model__vit__merge": 2,
        "model__vit__temporal_patch": 2,
        "model__vit__num_layers": 2,
        "model__vit__side": 3,
        "model__vit__deepstack": (0,),
        "model__llm__mrope": (2, 3, 3),
        "model__llm__mrope_interleaved": True,
        "images__stride": 16,
        "images__min_pixels": 256,
        "images__max_pixels": 1024,
        "student__blocks": ("system", "image", "question"),
        "teacher__blocks": ("system", "image", "question", "intro", "visual_thoughts"),
        "data__buckets__student": ((160, 16),),
        "data__buckets__teacher": ((260, 32),),
        "data__buckets__trace": ((300, 32, 40),),
        "tokenizer": str(made / "qwen3_vl"),
        "stages": ("opsd",),
        "teacher__visual_thoughts": "noise",
        "eval__final_split": "",
        "checkpoint__every": 2,
    }
    settings = config(made, **seeing)
    train.train(settings, str(tmp_path))
    found = [line for line in lines_of(tmp_path) if "jsd" in line]
    assert len(found) == 2 and all(line["jsd"] > 0 for line in found)
    run = session_lib.open_run(str(tmp_path))
    example = run.examples("test")(0, 0)
    names = [name for name, _ in run.packer.named_blocks(example, "teacher")]
    expected = "template system template image question template intro visual_thoughts template"
    assert names == expected.split()
    model = model_lib.load(str(tmp_path))
    shown = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    assert answering.answer(model, shown, "Is <image> like <image> ?").tokens > 0


def test_public_prompts_have_their_images_in_place():
    """Where a table's prompt has them, instead of the harness's marks."""
    assert prompts.conversation([0, 1, "Which?"]) == (("", "", "Which?"), [0, 1])
    assert prompts.conversation(["a", 1, "b", "c"]) == (("a", "bc"), [1])
