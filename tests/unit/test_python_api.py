"""The calls that users make from Python: wrong arguments say what to give."""

import dataclasses
import inspect
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import opsd_jax
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import images, interleave
from opsd_jax.data import examples, schema
from opsd_jax.evaluation import results
from opsd_jax.inputs import calls
from opsd_jax.run import answering, session
from opsd_jax.runtime import run_folder


def model():
    """A model without weights that answers text alone."""
    protocol = interleave.Protocol()
    tok, sizes = tiny.TOKENIZER, images.Resize(4, 24, 8)
    return interleave.Reasoner(tiny.MODEL, {}, tok, protocol, sizes, sizes)


def answer(*arguments, **options):
    """`opsd_jax.answer` without the type checks that the tests add, which users do not have."""
    with calls.naming({"seed": "seed"}):
        return inspect.unwrap(answering.answer)(*arguments, **options)


def reason(*arguments):
    return inspect.unwrap(interleave.reason)(model(), *arguments)


IMAGE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: answer("/tmp/w", IMAGE, "How many?"),
            "model is '/tmp/w', of type str: load it first, model = opsd_jax.load(W)",
        ),
        (
            lambda: answer(model(), "dots.png", "How many?"),
            "about is 'dots.png', of type str: give a Pillow image, PIL.Image.open(FILE), or",
        ),
        (lambda: answer(model(), [b"..."], "How many?"), "about[0] is b'...', of type bytes"),
        (lambda: answer(model(), IMAGE, None), "question is None, of type NoneType: give"),
        (lambda: answer(model(), None), "about is None, of type NoneType: give a Pillow image"),
        (lambda: answer(model(), [example(0), example(1)]), "about is a list of 2 examples: ask"),
        (
            lambda: answer(model(), example(0), visual_thoughts="swap", partner=3),
            "partner is 3, of type int: give an example",
        ),
        (
            lambda: answer(model(), IMAGE, "q", generation=True),
            "generation is True, of type bool: give opsd_jax.interleave.ImageGeneration()",
        ),
        (lambda: reason([(IMAGE, "q")], None), "questions[0][0] is <PIL.Image.Image"),
        (lambda: reason([(["a.png"], "q")], None), "questions[0][0][0] is 'a.png', of type str"),
        (lambda: reason([([IMAGE], None)], None), "questions[0][1] is None, of type NoneType"),
        (lambda: inspect.unwrap(opsd_jax.load)("w", tokenizer=None), "tokenizer is None"),
        (lambda: inspect.unwrap(opsd_jax.open_run)("w", mesh=3), "mesh is 3, of type int: give a"),
        (
            lambda: inspect.unwrap(session.Session.predictions)(None, None),
            'name is None, of type NoneType: give a key of evaluations(), such as "000500-none"',
        ),
        (
            lambda: opsd_jax.score("/tmp/w", "<answer>3</answer>"),
            "example is '/tmp/w', of type str: give an example of a run, opsd_jax.open_run(W).ex",
        ),
        (lambda: opsd_jax.load(IMAGE), "of type Image: give the path of a folder, such as a run's"),
        (lambda: opsd_jax.open_run(3), "workdir is 3, of type int: give the path of a folder"),
    ],
)
def test_an_argument_of_another_type(call, said):
    with pytest.raises(TypeError) as error:
        call()
    assert said in str(error.value)


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: answer(model(), IMAGE, "q", generation=interleave.ImageGeneration()),
            "loaded without image generation. Load it with: model = opsd_jax.load(W, generation=",
        ),
        (
            lambda: reason([([], "q")], None, interleave.ImageGeneration()),
            "loaded without image generation",
        ),
        (lambda: answer(model(), IMAGE, "q", seed="a"), "seed is 'a': give a whole number in [0,"),
        (lambda: answer(model(), IMAGE, "q", seed=-1), "seed is -1: give a whole number in [0,"),
        (lambda: reason([], None), "questions is empty: give at least one"),
        (lambda: reason([([IMAGE],)], None), "questions[0] has 1 entries: give ([image], text)"),
        (lambda: reason([([IMAGE] * 2, ("a", "b"))], None), "has 2 images and 2 texts: give one"),
        (
            lambda: answer(model(), Image.fromarray(np.full((4, 5), 999, np.uint16)), "q"),
            "mode I;16: save it with 8",
        ),
    ],
)
def test_a_wrong_argument(call, said):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)


def test_every_public_name_has_its_signature_in_the_docs():
    """For readers without the site, on which `:::` shows them."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "reference" / "python-api.md"
    first = page.read_text().split("```text\n")[1].split("```")[0]
    shown = dict(re.findall(r"^\w+ = opsd_jax\.(\w+)\((.*)\)$", first, re.M))
    for name in opsd_jax._PUBLIC:
        signature = inspect.signature(inspect.unwrap(getattr(opsd_jax, name)))
        names = [
            f"{'**' * (p.kind is p.VAR_KEYWORD)}{p.name}"
            + ("" if p.default is p.empty else f"={p.default!r}".replace("'", '"'))
            for p in signature.parameters.values()
        ]
        assert ", ".join(names) == shown[name].replace("*, ", ""), name


# --- settings of a file

MINI = "configs/mini.py:smoke"


def test_settings_of_a_file_with_changes():
    config = opsd_jax.read_config(MINI, {"opsd.steps": 10, "run_arms": (), "opsd.optim.lr": 1})
    assert (config.opsd.steps, config.run_arms, config.opsd.optim.lr) == (10, (), 1.0)
    assert config.is_locked and opsd_jax.read_config(pathlib.Path("configs/mini.py")).seed == 0
    nested = {"opsd": {"steps": 30, "optim": {"lr": 1}}, "arms": {"far": {"seed": 7}}}
    config = opsd_jax.read_config(MINI, nested)
    assert (config.opsd.steps, config.opsd.optim.lr, config.arms.far.seed) == (30, 1.0, 7)


def test_an_arm_of_ones_own():
    """Added whole or setting by setting; one of the file's gets a further change, or is another."""
    blocks = ["image", "question"]
    config = opsd_jax.read_config(
        MINI,
        {
            "arms.far": {"teacher": {"blocks": blocks}, "opsd.steps": np.int64(20)},
            "arms.near.teacher.blocks": blocks,
            "arms.noise.opsd.optim.lr": 1,
            "arms.swap": {"seed": 7},
            "run_arms": ("far", "near"),
        },
    )
    assert config.arms.far.to_dict() == {"teacher": {"blocks": (*blocks,)}, "opsd": {"steps": 20}}
    assert config.arms.near.to_dict() == {"teacher": {"blocks": (*blocks,)}}
    noise = {"teacher": {"visual_thoughts": "noise"}, "opsd": {"optim": {"lr": 1.0}}}
    assert config.arms.noise.to_dict() == noise and config.arms.swap.to_dict() == {"seed": 7}
    assert config.run_arms == ("far", "near") and config.is_locked and config.arms.is_locked
    assert "far" not in opsd_jax.read_config(MINI).arms


@pytest.mark.parametrize("changes", [[("opsd.steps", 10)], "opsd.steps=10", {("opsd", "steps"): 1}])
def test_changes_that_are_no_dict_of_settings(changes):
    with pytest.raises(TypeError, match=r'give a dict, such as {"opsd.steps": 10}'):
        opsd_jax.read_config(MINI, changes)


@pytest.mark.parametrize(
    "path, changes, said",
    [
        (MINI, {"opsd.stepz": 1}, "no setting 'stepz' in config.opsd. Did you mean \"steps\"?"),
        (MINI, {"opsd": {"stepz": 1}}, "there is no setting 'stepz' in config.opsd. Did you mean"),
        ("README.md", {}, "README.md: not a Python file: give one with get_config(), such as"),
        (MINI, {"opsd": {}}, "opsd is a group of settings: change opsd.accumulation or opsd."),
        (MINI, {"opsd": 1}, "opsd is a group of settings: change opsd.accumulation or opsd."),
        (MINI, {"opsd.steps": 2.5}, "opsd.steps is 2.5: give a whole number in [1, inf)"),
        (MINI, {"opsd.steps": None}, "opsd.steps is None: give a whole number in [1, inf)"),
        (MINI, {"opsd.steps": -1}, "opsd.steps is -1: give a whole number in [1, inf)"),
        (MINI, {"run_arms": "noise"}, "run_arms is 'noise': give a tuple, ('noise',)"),
        (MINI, {"arms": {}}, "arms is a group of settings: change arms."),
        (MINI, {"arms.far": 3}, "config.arms.far is 3: give the settings that the arm changes"),
        (MINI, {"arms.far.teecher.blocks": ()}, 'in config. Did you mean "teacher"?'),
        (MINI, {"arms.far": {"teacher": {"block": ()}}}, 'config.teacher. Did you mean "blocks"?'),
        (MINI, {"arms.far.opsd.steps": 0}, "config.arms.far.opsd.steps is 0: give a whole number"),
        (MINI, {"arms.far.opsd": 0}, "config.arms.far.opsd is 0, but it is a group of settings"),
        (
            MINI,
            {"run_arms": ("nois",)},
            "config.run_arms names 'nois', which is not one of the arms",
        ),
        (MINI, {"opsd.batch_size": 7, "opsd.accumulation": 2}, "7 is not divisible by"),
        (MINI, {"arms.../far": {"seed": 1}}, "give one folder name"),
        ("configs/mimi.py", {}, "no such Python file.*did you mean 'configs/mini.py'"),
        ("configs/mini.py:smok", {}, "did you mean 'smoke'"),
    ],
)
def test_settings_that_there_are_not(path, changes, said):
    with pytest.raises(ValueError, match=re.escape(said).replace("\\.\\*", ".*")):
        opsd_jax.read_config(path, changes)


def test_what_a_run_and_an_evaluation_are_asked_for(tmp_path):
    with pytest.raises(TypeError, match="config is 'configs/mini.py', of type str: read it first"):
        opsd_jax.train_run("configs/mini.py", tmp_path)
    with pytest.raises(TypeError, match="no option 'row': choose from .*did you mean 'rows'"):
        opsd_jax.evaluate_run(tmp_path, row=3)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        opsd_jax.evaluate_run(tmp_path, ("none", "real"), rows=3)
    assert os.listdir(tmp_path) == []


# --- what errors call arguments


@pytest.fixture
def record(tmp_path):
    """A folder with the settings of a run, and nothing else."""
    config = config_lib.to_json(opsd_jax.read_config(MINI))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda w: opsd_jax.load(w, protocol="papr"), "protocol=papr: choose from paper, harn"),
        (lambda w: opsd_jax.load(""), "directory is empty (an unset shell variable?): give a"),
        (lambda w: opsd_jax.load("/no/run"), "directory=/no/run: there is no such folder: give"),
        (lambda w: opsd_jax.load(w, tokenizer="gs://t"), "tokenizer='gs://t' is an address"),
        (lambda w: opsd_jax.load(w, dtype="float16"), "dtype is 'float16': use 'float32' or"),
        (lambda w: opsd_jax.load(w, tensor=-1), "tensor is -1: give a whole number in"),
        (lambda w: opsd_jax.load(w, batch_size=-1), "batch_size is -1: give a whole number"),
        (lambda w: opsd_jax.open_run(""), "workdir is empty (an unset shell variable?)"),
        (lambda w: opsd_jax.open_run("/no/run"), "give the workdir of a run of `python -m opsd_"),
        (
            lambda w: opsd_jax.open_run(w, tasks="Chart_Refocsu"),
            "tasks names 'Chart_Refocsu': choose from Chart_Refocus; did you mean 'Chart_Refocus'?",
        ),
        (lambda w: opsd_jax.open_run(w, tasks=3), "tasks is 3, of type int: give a name, or a"),
        (lambda w: opsd_jax.read_config(""), "path is empty (an unset shell variable?)"),
        (lambda w: opsd_jax.read_config("mini.py:"), "path=mini.py: ends with a colon"),
        (lambda w: opsd_jax.train_run(opsd_jax.read_config(MINI), ""), "workdir is empty (an"),
        (
            lambda w: opsd_jax.train_run(opsd_jax.read_config(MINI), "/proc/version/w"),
            "workdir=/proc/version/w: /proc/version is not a folder",
        ),
        (
            lambda w: opsd_jax.train_run(opsd_jax.read_config(MINI, {"run_arms": ("x",)}), w),
            "config.run_arms names 'x', which is not one of the arms",
        ),
        (lambda w: opsd_jax.evaluate_run(w, "reel"), "visual_thoughts=reel: choose from none, r"),
        (
            lambda w: opsd_jax.evaluate_run(w, benchmarks="Chart_Refocsu"),
            "benchmarks=Chart_Refocsu: this run has the tasks Chart_Refocus (or, by family, chart)",
        ),
        (
            lambda w: opsd_jax.evaluate_run(w, benchmarks=("Chart_Refocus",) * 2),
            "benchmarks names Chart_Refocus twice: give each once",
        ),
        (lambda w: opsd_jax.evaluate_run(w, modes="real"), "no option 'modes': choose from visu"),
        (lambda w: opsd_jax.evaluate_run(w, rows="3"), "rows is '3': give a whole number in"),
        (lambda w: opsd_jax.evaluate_run(w, ban_marker="yes"), "ban_marker is 'yes', of type str"),
        (lambda w: opsd_jax.evaluate_run(w, ()), "visual_thoughts names nothing: choose from none"),
        (lambda w: opsd_jax.evaluate_run(w, split=3), "split is 3, of type int: give a text"),
        (lambda w: opsd_jax.evaluate_run(w, on_bad_row="x"), "on_bad_row is 'x': use 'fail'"),
        (
            lambda w: opsd_jax.evaluate_run(w, temperature=1.0),
            "temperature=1.0 without samples: answers are greedy. Give samples=K, the number",
        ),
        (
            lambda w: opsd_jax.evaluate_run(w, checkpoint="/tmp/no-step"),
            "checkpoint=/tmp/no-step: there is no such folder",
        ),
    ],
)
def test_errors_name_the_arguments(record, call, said):
    with pytest.raises((TypeError, ValueError, OSError)) as error:
        call(record)
    assert str(error.value).startswith(said) or f" {said}" in str(error.value)
    assert os.listdir(record) == ["config.json"]


def test_one_benchmark_is_a_text(record):
    """It is known, so that only the checkpoint is missing."""
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        opsd_jax.evaluate_run(record, benchmarks="Chart_Refocus", split="test")
    with pytest.raises(FileNotFoundError, match="has no data"):
        opsd_jax.open_run(record, tasks="Chart_Refocus")


def test_what_of_a_message_is_renamed():
    """Options that are arguments; not those of commands that are quoted, of others, or in paths."""
    with pytest.raises(ValueError) as error:
        with calls.naming({"split": "split", "checkpoint": "directory"}):
            raise ValueError(
                "--checkpoint=/w/--split and '--split': give --split=a, --config.eval.rows=3. Or "
                "run `x --split=b`, --splits=c, --overwrite"
            )
    assert str(error.value) == (
        "directory=/w/--split and '--split': give split=a, config.eval.rows=3. Or run "
        "`x --split=b`, --splits=c, --overwrite"
    )


def test_public_calls_keep_their_identity():
    assert opsd_jax.load is opsd_jax.load and opsd_jax.load.__name__ == "load"
    assert {"load", "answer", "__version__"} <= {*dir(opsd_jax)}


def test_interleave_is_reachable_after_the_import_alone():
    code = "import opsd_jax; assert 'interleave' in dir(opsd_jax); opsd_jax.interleave.Reasoner"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_score_says_what_it_found():
    row = schema.Example("p", "T", "q?", "B", b"", (), ())
    assert opsd_jax.score(row, "<answer>B</answer>") == ("B", True)
    found = opsd_jax.score(row, "<answer>C</answer>")
    assert (found.answer, found.right) == ("C", False)


def test_paths_may_be_pathlib(tmp_path):
    for call in (opsd_jax.load, opsd_jax.open_run):
        with pytest.raises(FileNotFoundError, match="no-run"):
            call(pathlib.Path(tmp_path, "no-run"))


# --- the results of a run


@pytest.fixture
def run(tmp_path):
    """A run of which nothing is opened but its folder."""
    found = object.__new__(session.Session)
    object.__setattr__(found, "workdir", str(tmp_path))
    return found


def evaluated(run, name, *predictions):
    """Writes the results of an evaluation."""
    scored = [{"index": n, "tokens": 1, **p} for n, p in enumerate(predictions)]
    results.write(
        run_folder.evaluation(run.workdir, name),
        [results.Result("Chart_Refocus", scored, 1.0, len(scored))],
        checkpoint="c",
        seed=0,
        protocol="p",
    )


def test_evaluations_and_their_predictions(run):
    assert run.evaluations() == {}
    evaluated(run, "000006-none", {"prediction": "a", "hit": True}, {"prediction": "b", "hit": 0})
    evaluated(run, "000006-real", {"prediction": "c", "hit": True})
    found = run.evaluations()
    assert list(found) == ["000006-none", "000006-real"]
    assert found["000006-none"]["benchmarks"]["Chart_Refocus"]["overall"] == 0.5
    assert [p["prediction"] for p in run.predictions("000006-none")] == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="'000006-nome'.*did you mean '000006-none'"):
        run.predictions("000006-nome")
    path = pathlib.Path(run_folder.evaluation(run.workdir, "000006-real"), run_folder.PREDICTIONS)
    path.write_text('{"index": 0')
    with pytest.raises(ValueError, match="predictions.jsonl is damaged .* evaluate again"):
        run.predictions("000006-real")


def test_the_report(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="report.json is missing: the run's command"):
        run.report()
    (tmp_path / "report.md").write_text("| a table |")
    (tmp_path / "report.json").write_text(
        '[{"who": "OPSD", "arm": "OPSD, text only", "tasks": {"A": {"overall": 0.5}}}]'
    )
    report = run.report()
    row = {"who": "OPSD", "arm": "OPSD, text only", "task": "A", "overall": 0.5}
    assert report.records == [row]
    assert str(report) == repr(report) == "| a table |"
    (tmp_path / "report.json").write_text('[{"arm": "OPSD"}]')
    with pytest.raises(ValueError, match="report.json is damaged .*tasks.*run's command again"):
        run.report()
    object.__setattr__(run, "workdir", run_folder.arm(run.workdir, "noise"))
    with pytest.raises(FileNotFoundError, match=f"open the run of this arm, {tmp_path}"):
        run.report()


def test_dir_of_a_run_is_what_it_has(run):
    assert all(hasattr(session.Session, name) or name in FIELDS for name in dir(run))
    assert len(dir(run)) < 20


FIELDS = {field.name for field in dataclasses.fields(session.Session)}


# --- examples


def example(n):
    return schema.Example(f"p{n}", "T", "q?", "B", b"x" * 999, (b"y" * 999,), ("a",))


def test_examples_are_indexed_sliced_and_shown():
    held = {"T": [example(0), example(1)], "U": [example(2)]}
    found = examples.Examples(held, preprocess=None)
    assert [found[n].pid for n in (0, 2, -1, -3)] == ["p0", "p2", "p2", "p0"]
    assert [x.pid for x in found[1:]] == ["p1", "p2"] and found[5:] == []
    assert [x.pid for x in found[::-1]] == ["p2", "p1", "p0"]
    for n in (3, -4):
        with pytest.raises(IndexError, match=f"example {n} of 3: give 0 to 2"):
            found[n]
    assert repr(found) == "<3 examples: T 2, U 1>"
    assert repr(example(0)) == "<example p0 of T: 'q?', answer 'B', images 1, visual thoughts 1>"


# --- what a run's model is shown


@pytest.mark.parametrize("sizes", [tiny.MODEL, *tiny.QWEN.values()])
def test_an_example_and_its_question_alone_are_shown_alike(sizes):
    """Both ways to ask make the same blocks, for towers that merge patches, too."""
    tower, names = sizes.vit, blocks_lib.BlockNames()
    model = interleave.Reasoner(
        sizes,
        {},
        tiny.TOKENIZER,
        interleave.Protocol(transparency="drop"),
        images.Resize(tower.patch_size * tower.merge, 24, 8),
        images.Resize(),
        training=interleave.TrainingContexts(
            blocks_lib.Prompts(system="sys", suffix=" Say."), names, images.Transforms()
        ),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    row = schema.Example("p", "T", "q?", "B", file.getvalue(), (file.getvalue(),), ("a",))
    asked = answering._blocks(model, model.training, row, ("none", None, 0))
    plain = answering._plain_blocks(model, model.training, [row.image], row.question)
    taught = answering._blocks(model, model.training, row, ("real", None, 0))
    assert len(asked) == len(plain) == 3 and len(taught) > 3
    for one, other in zip(asked, plain):
        assert type(one) is type(other) and one.length == other.length
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert asked[1].length == 24 // tower.merge**2 + 2
