"""Evaluation: the command repeats what training measured, counts correctly, and explains
failures.
"""

import csv
import dataclasses
import json
import operator
import os
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import eval, interleave, rollout, sharding, tokenizer, train
from opsd_jax.data import arrayrecord, examples, packing, randomness, schema
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import (
    benchmark,
    comparison,
    contexts,
    html,
    inference,
    reference_kl,
    results,
    statistics,
    summary_tables,
    table_scores,
    tables,
)
from opsd_jax.run import attention_check, controls, evaluate, session, stage_table
from opsd_jax.run.evaluation_request import Request
from opsd_jax.runtime import checkpoint as checkpoint_lib

LAST = f"{small_run.LAST:06d}"
TABLES = pathlib.Path(__file__).parents[1] / "scoring" / "tsv"

pytestmark = pytest.mark.usefixtures("fast_compiles")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return small_run.trained(tmp_path_factory)


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(trained, tmp_path / "w")
    return tmp_path / "w"


def read(folder):
    """(summary, predictions as text) of a folder of results."""
    return json.loads((folder / "summary.json").read_text()), (
        folder / "predictions.jsonl"
    ).read_text()


def read_summary(folder):
    return read(folder)[0]


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        eval.main([str(argument) for argument in arguments])
    assert stopped.value.code == 1
    return capsys.readouterr().err


def assert_same_results(one, other):
    (a, predictions_a), (b, predictions_b) = read(one), read(other)
    assert predictions_a == predictions_b
    for key in ("protocol", "seed", "split", "weights", "tokenizer"):
        assert a[key] == b[key]
    for summary in (a, b):
        for key in ("seconds_per_sample", "timed_samples"):
            assert summary["benchmarks"][small_run.TASK].pop(key) > 0
    assert a["benchmarks"] == b["benchmarks"]


@pytest.mark.slow
def test_beside_a_run_that_deletes_the_checkpoint(workdir, tmp_path, monkeypatch, caplog):
    """Between the choice of the newest one and its reading; then the next one is answered, under
    its own name.
    """
    steps, load = workdir / "checkpoints", tokenizer.load
    before, last = steps / str(small_run.LAST - 1), steps / str(small_run.LAST)

    def rotated(folder, **kwargs):
        if not last.exists():
            (tmp_path / "last").rename(last)
            shutil.rmtree(before)
        return load(folder, **kwargs)

    monkeypatch.setattr(tokenizer, "load", rotated)
    last.rename(tmp_path / "last")
    with caplog.at_level("WARNING"):
        assert list(evaluate.evaluate(Request(str(workdir), rows=4, name="x"))) == ["x"]
    assert (
        f"{before}: no such checkpoint" in caplog.text and "Going on with the newest" in caplog.text
    )
    assert read(workdir / "eval" / "x")[0]["checkpoint"].endswith(f"/{small_run.LAST}")
    with pytest.raises(
        checkpoint_lib.CheckpointGoneError,
        match=f"{before}: no such checkpoint.*beside it: .*{small_run.LAST}",
    ):
        evaluate.evaluate(Request(str(workdir), rows=4, name="y", checkpoint=str(before)))


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_repeats_what_training_measured(trained, workdir, capsys):
    shutil.rmtree(workdir / "eval")
    eval.main([f"--workdir={workdir}", "--visual_thoughts=none,real"])
    eval.main([f"--workdir={workdir}", "--ban_marker"])
    eval.main([f"--workdir={workdir}", f"--checkpoint={workdir}/checkpoints/{small_run.WARMUP}"])
    names = [f"{small_run.WARMUP:06d}-none", f"{LAST}-none", f"{LAST}-none-banned", f"{LAST}-real"]
    assert sorted(os.listdir(workdir / "eval")) == [*names, "summary.md"]
    for name in names:
        assert_same_results(workdir / "eval" / name, trained / "eval" / name)
    assert read(workdir / "eval" / names[0])[1] != read(workdir / "eval" / names[1])[1]

    printed, progress = capsys.readouterr()
    table = (workdir / "eval" / "summary.md").read_text()
    page = workdir / "eval" / names[0] / "report.html"
    assert printed.endswith(f"{table}\nthe page of {names[0]}: {page}\n") and page.exists()
    pages = [line for line in printed.splitlines() if line.startswith("the page of ")]
    assert [line.split()[3].rstrip(":") for line in pages] == [names[n] for n in (1, 3, 2, 0)]
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == names
    assert f"{LAST}-real test  {small_run.TEST_ROWS}/{small_run.TEST_ROWS}  accuracy" in progress
    assert "left 0:00:00" in progress
    eval.main(
        [f"--workdir={trained}"]
    )  # training wrote the same table, but for the seconds, and kept its answers

    def rows(text):
        return [line.rsplit("|", 2)[0] for line in text.splitlines()]

    assert set(rows(table)) < set(rows((trained / "eval" / "summary.md").read_text()))


@pytest.mark.slow
def test_programs_have_the_attention_that_was_chosen(workdir, monkeypatch):
    """For model.attention "auto"; the record of the settings keeps what was asked for."""
    monkeypatch.setattr(attention_check, "chosen", lambda config, platform: "flash_interpret")
    run = session.open_run(str(workdir))
    stages = [stage.config.model for stage in stage_table.of_run(run)]
    models = [run.model, run.sampling().model, run.evaluation_sampling().model, *stages]
    assert {model.attention for model in models} == {"flash_interpret"}
    assert run.record["model"]["attention"] == "dense"


@pytest.mark.slow
def test_another_compute_dtype(workdir):
    """Weights are read in it as the sampler casts them; the results say so."""
    opened = session.open_run(str(workdir), dtype="bfloat16")
    folder = str(workdir / "checkpoints" / str(small_run.LAST))
    read = opened.restore_params(folder, layout="rollout")
    cast = opened.for_sampling(opened.restore_params(folder))
    assert {str(x.dtype) for x in jax.tree.leaves(read)} == {"float32", "bfloat16"}
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(cast), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for dtype in ("float32", "bfloat16"):  # the first is the run's own
        eval.main([f"--workdir={workdir}", "--rows=4", f"--dtype={dtype}"])
    own, other = (
        read_summary(workdir / "eval" / f"{LAST}-none-random4{name}") for name in ("", "-bfloat16")
    )
    assert own["weights"] != other["weights"] and "--dtype=bfloat16" in other["command"]


@pytest.mark.slow
def test_public_tables_on_the_small_model(workdir, capsys, monkeypatch):
    """Both protocols; a kill in between changes nothing; what the harness would judge; the page
    shows the images.
    """

    def run(*more):
        return eval.main(
            [
                f"--workdir={workdir}",
                f"--data_dir={TABLES}",
                "--batch_size=4",
                "--benchmarks=BLINK,ChartQA_h_bar",
                *more,
            ]
        )

    run()
    folder = workdir / "eval" / f"{LAST}-none-BLINK-ChartQA_h_bar"
    summary, predictions = read(folder)
    table = tables.read(TABLES / "BLINK.tsv")
    blink, chart = (summary["benchmarks"][name] for name in ("BLINK", "ChartQA_h_bar"))
    assert blink["n"] == len(table.rows) and blink["md5"] == table.md5 and blink["needs_judge"] > 0
    assert (blink["unit"], chart["unit"]) == ("fraction", "percent") and blink["timed_samples"] > 0
    lines = [json.loads(line) for line in predictions.splitlines()]
    assert [line["index"] for line in lines if line["benchmark"] == "BLINK"] == [
        row.index for row in table.rows
    ]
    texts = {line["index"]: line["prediction"] for line in lines if line["benchmark"] == "BLINK"}
    assert table_scores.score(table, texts).overall == blink["overall"]
    with open(folder / "BLINK.tsv", encoding="utf-8", newline="") as f:
        exported = list(csv.DictReader(f, delimiter="\t"))
    assert {int(row["index"]): row["prediction"] for row in exported} == texts
    html = (folder / "report.html").read_text()
    assert html.count("data:image") >= len(lines) and "59.49" in html
    assert "| 59.49 | 61.44 |" in (workdir / "eval" / "summary.md").read_text()

    asked, reason = [], interleave.reason

    def dies(*args, **kwargs):
        asked.append(len(args[1]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return reason(*args, **kwargs)

    monkeypatch.setattr(interleave, "reason", dies)
    with pytest.raises(KeyboardInterrupt):
        run("--name=again")
    run("--name=again", f"--against={folder.name}")
    assert f"Against {folder.name}" in (workdir / "eval" / "again" / "report.html").read_text()
    against = read(workdir / "eval" / "again")[0]["against"]
    assert against["name"] == folder.name and set(against["benchmarks"]) == {
        "BLINK",
        "ChartQA_h_bar",
    }
    assert against["benchmarks"]["BLINK"]["n"] == len(table.rows)
    *_, said, last, page_line = capsys.readouterr().out.splitlines()
    assert said == comparison.in_words("again", against)[0]
    assert last == comparison.in_words("again", against)[1]
    assert page_line == f"the page of again: {workdir}/eval/again/report.html"
    run("--name=again")  # scored again: its comparison, and what made it, stay on the page
    again = read(workdir / "eval" / "again")[0]
    assert again["against"] == against and "--against" in again["command"]
    assert f"Against {folder.name}" in (workdir / "eval" / "again" / "report.html").read_text()
    # the one that died twice; all programs were compiled before
    assert len(asked) == 1 + -(-len(table.rows) // 4) + -(-chart["n"] // 4)
    assert read(workdir / "eval" / "again")[1] == predictions

    run("--protocol=harness", "--rows=2", "--seed=3")
    summary, _ = read(workdir / "eval" / f"{LAST}-none-harness-random2-BLINK-ChartQA_h_bar-seed3")
    assert (
        summary["protocol"] == "harness-none"
        and summary["seed"] == 3
        and summary["asked_by"] == "harness"
    )


@pytest.mark.slow
def test_a_released_model_and_its_import_give_the_same(released, tmp_path, tmp_path_factory):
    """Folders without a run: results lie under the folder's own name."""
    from opsd_jax import convert

    imported, results = tmp_path / "imported", tmp_path / "results"
    with small_run.fast_compiles(tmp_path_factory):
        convert.main(["import", f"--source={released}", f"--target={imported}"])
        for checkpoint in (released, imported):
            for protocol in ("paper", "harness"):
                eval.main(
                    [
                        f"--workdir={results}",
                        f"--checkpoint={checkpoint}",
                        f"--data_dir={TABLES}",
                        "--rows=2",
                        "--benchmarks=BLINK",
                        f"--protocol={protocol}",
                        "--batch_size=2",
                    ]
                )
    for protocol in ("paper", "harness"):
        (a, one), (b, other) = (
            read(results / "eval" / f"{folder.name}-none-{protocol}-random2-BLINK")
            for folder in (released, imported)
        )
        assert one == other and a["benchmarks"]["BLINK"]["n"] == 2 and a["step"] is None
        assert (
            a["protocol"] == b["protocol"] == f"{protocol}-none"
            and a["checkpoint"] != b["checkpoint"]
        )


@pytest.mark.slow
def test_other_weights_under_the_same_path_are_asked_anew(
    released, tmp_path, tmp_path_factory, capsys
):
    """As when a later checkpoint is exported to the same folder: its answers are its own, or there
    are none.
    """
    from safetensors import numpy as safetensors

    latest = tmp_path / "latest"
    shutil.copytree(released, latest)
    command = [
        f"--workdir={tmp_path}/results",
        f"--data_dir={TABLES}",
        "--rows=2",
        "--benchmarks=BLINK",
        "--batch_size=2",
    ]
    folder = tmp_path / "results" / "eval" / "latest-none-random2-BLINK"
    with small_run.fast_compiles(tmp_path_factory):
        eval.main([*command, f"--checkpoint={latest}"])
        before, predictions = read(folder)
        shutil.move(latest, tmp_path / "moved")  # the same weights elsewhere are the same model
        (tmp_path / "again").mkdir()
        shutil.copytree(tmp_path / "moved", tmp_path / "again" / "latest")
        eval.main([*command, f"--checkpoint={tmp_path}/again/latest"])
        assert read(folder)[1] == predictions

        file = (
            next((tmp_path / "moved").glob("*ema*.safetensors"), None)
            or tmp_path / "moved" / "model.safetensors"
        )
        tensors = safetensors.load_file(file)
        name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
        tensors[name] = tensors[name][::-1].copy()  # one matrix, the same numbers in another order
        safetensors.save_file(tensors, file)
        shutil.move(tmp_path / "moved", latest)
        message = error_of(capsys, *command, f"--checkpoint={latest}")
        assert (
            "another weights: the model has changed since: choose another --name" in message
            and str(folder) in message
        )
        assert read(folder)[1] == predictions
        eval.main([*command, f"--checkpoint={latest}", "--name=later"])
    after, _ = read(tmp_path / "results" / "eval" / "later")
    assert after["weights"] != before["weights"] and after["tokenizer"] == before["tokenizer"]


@pytest.mark.slow
def test_a_row_that_cannot_be_shown(workdir, tmp_path, capsys):
    text = (TABLES / "MMVP.tsv").read_text()
    table = tables.read(TABLES / "MMVP.tsv")
    (tmp_path / "MMVP.tsv").write_text(text.replace(table.rows[1].images[0], "AAAA" * 40))
    command = [f"--workdir={workdir}", f"--data_dir={tmp_path}", "--batch_size=4"]
    message = error_of(capsys, *command)
    assert "1 rows cannot be shown" in message and f"row {table.rows[1].index}" in message
    eval.main([*command, "--on_bad_row=skip"])
    summary, predictions = read(workdir / "eval" / f"{LAST}-none-public")
    assert summary["benchmarks"]["MMVP"]["bad_rows"] == [str(table.rows[1].index)]
    assert (
        len(predictions.splitlines()) == len(table.rows) - 1 == summary["benchmarks"]["MMVP"]["n"]
    )


@pytest.mark.slow
def test_tasks_by_a_protocol_and_the_texts_alone(workdir):
    eval.main([f"--workdir={workdir}", "--visual_thoughts=remove,noise"])
    texts, noise = (read(workdir / "eval" / f"{LAST}-{mode}")[0] for mode in ("remove", "noise"))
    assert texts["protocol"] == "mini-greedy-remove" and texts["mode"] == "remove"
    assert (
        "visual thought 1 (noise)"
        in (workdir / "eval" / f"{LAST}-noise" / "report.html").read_text()
    )
    assert (
        "visual thought 1" not in (workdir / "eval" / f"{LAST}-remove" / "report.html").read_text()
    )
    eval.main([f"--workdir={workdir}", "--protocol=paper", "--rows=3"])
    summary, predictions = read(workdir / "eval" / f"{LAST}-none-paper-random3")
    assert summary["benchmarks"][small_run.TASK]["n"] == 3 and '"pid"' in predictions


def test_pass_at_k():
    """By hand: of 4 answers 1 is right. Of the 6 pairs 3 have it, and 3 of the 4 triples."""
    found = [statistics.pass_at_k(4, 1, k) for k in (1, 2, 3, 4)]
    assert found == [0.25, 0.5, 0.75, 1.0]
    assert [statistics.pass_at_k(3, c, 2) for c in range(4)] == pytest.approx([0, 2 / 3, 1, 1])
    with pytest.raises(ValueError, match="pass@3 of 2 answers"):
        statistics.pass_at_k(2, 1, 3)


def test_scores_of_several_answers():
    """Three examples, of whose 3 answers 0, 1 and 3 are right, the first one of the last only."""
    hits = [[False, False, False], [False, True, False], [True, True, True]]
    predictions = [
        {"hit": own[0], "tokens": 5, "samples": [{"hit": hit} for hit in own]} for own in hits
    ]
    found = results.Result("task", predictions, 1.0, 3).summary()
    assert found["samples"] == 3 and found["overall"] == 1 / 3
    assert found["pass_at_k"] == pytest.approx({"1": 4 / 9, "2": (0 + 2 / 3 + 1) / 3, "3": 2 / 3})
    greedy = {key: found[key] for key in found if key not in ("samples", "pass_at_k")}
    lines = summary_tables.table(
        {"some": {"benchmarks": {"task": found}}, "one": {"benchmarks": {"task": greedy}}}
    ).splitlines()
    assert lines[0].endswith(" | pass@k |") and lines[3].endswith(" |  |")
    assert lines[2].endswith("| 1: 44.4 %, 2: 55.6 %, 3: 66.7 % |")


@pytest.mark.slow
def test_several_answers_to_a_question(workdir):
    arguments = [f"--workdir={workdir}", "--samples=3", "--temperature=0.7", "--rows=6"]
    eval.main(arguments)
    folder = workdir / "eval" / f"{LAST}-none-random6-samples3-temperature0.7"
    summary, predictions = read(folder)
    assert (summary["samples"], summary["temperature"]) == (3, 0.7)
    assert summary["protocol"] == "mini-sampled-none"
    rows = [json.loads(line) for line in predictions.splitlines()]
    assert len(rows) == 6 and all(len(row["samples"]) == 3 for row in rows)
    assert all(row["samples"][0]["prediction"] == row["prediction"] for row in rows)
    assert any(len({s["prediction"] for s in row["samples"]}) > 1 for row in rows)
    page = (folder / "report.html").read_text()
    assert "3 answers sampled at temperature 0.7" in page and "greedy" not in page
    pass_at_k = summary["benchmarks"][small_run.TASK]["pass_at_k"]
    shares = [html.fixed(100 * share, 1) for share in pass_at_k.values()]
    heads = re.findall(r"<th[^>]*>(.*?)</th>", page)
    first = heads.index("pass@1 %")
    assert heads[first : first + 3] == ["pass@1 %", "pass@2 %", "pass@3 %"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", page)[first : first + 3] == shares
    right = sum(sample["hit"] for sample in rows[0]["samples"])
    assert f"; the first of 3 answers, of which {right} are right" in page
    shutil.rmtree(folder)
    eval.main(arguments)
    assert read(folder)[1] == predictions  # the same command repeats them


@pytest.mark.slow
def test_the_name_tells_what_was_measured(workdir):
    def run(*arguments):
        return eval.main([f"--workdir={workdir}", *arguments])

    run(
        "--rows=3",
        "--split=validation",
        "--benchmarks=chart",
        "--visual_thoughts=noise",
        "--seed=5,6",
    )
    assert "| 5, 6 | 3 of 16 |" in (workdir / "eval" / "summary.md").read_text()
    summary, predictions = read(workdir / "eval" / f"{LAST}-noise-validation-random3-seed5")
    source = arrayrecord.open_source(workdir / "data", "validation", task=small_run.TASK)
    assert [json.loads(line)["pid"] for line in predictions.splitlines()] == [
        source[n].pid for n in randomness.subset(16, 3, 0)
    ]  # the run's seed, whatever --seed is
    assert [summary[key] for key in ("seed", "split", "step")] == [5, "validation", 6]
    assert summary["benchmarks"][small_run.TASK]["rows"] == {"drawn": 3, "of": 16, "seed": 0}
    assert (
        "a random subset, 3 of 16"
        in (workdir / "eval" / f"{LAST}-noise-validation-random3-seed5" / "report.html").read_text()
    )
    run(
        f"--checkpoint={workdir}/checkpoints/3",
        "--name=mine",
        "--rows=2",
        f"--benchmarks={small_run.TASK}",
    )
    assert read(workdir / "eval" / "mine")[0]["benchmarks"][small_run.TASK]["n"] == 2
    run("--name=two", "--rows=2", "--visual_thoughts=none,swap")
    assert {"two-none", "two-swap"} < set(os.listdir(workdir / "eval"))
    assert (
        f"{LAST}-none" in (workdir / "eval" / "summary.md").read_text()
    )  # and what was there before


@pytest.mark.slow
def test_an_arm_finds_its_data_with_its_run(workdir, capsys):
    config = small_run.config(eval__final_visual_thoughts=("none",), eval__final_banned=False)
    train.train(*controls.settings_of(config, str(workdir), "noise"), data_workdir=str(workdir))
    arm = workdir / "arms" / "noise"
    shutil.move(arm / "eval", arm / "by_training")
    eval.main([f"--workdir={arm}/"])  # a slash at the end does no harm
    name = f"{small_run.OPSD:06d}-none"
    assert_same_results(arm / "eval" / name, arm / "by_training" / name)

    # Weights of another run: not under a name that this run's own could have.
    foreign = [f"--workdir={workdir}", f"--checkpoint={arm}/checkpoints/{small_run.OPSD}"]
    message = error_of(capsys, *foreign)
    assert "is not a step of" in message and "--name" in message
    eval.main([*foreign, "--name=noise"])
    assert read(workdir / "eval" / "noise")[1] == read(arm / "eval" / name)[1]

    shutil.move(workdir / "data", workdir / "moved")
    message = error_of(capsys, f"--workdir={arm}")
    assert f"{arm}/data" in message and f"{arm}/../../data" in message and "data.dir" in message


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--visual_thoughts=reel"],
            "--visual_thoughts=reel: choose from none, real, noise, swap, image, remove, generated",
        ),
        (["--visual_thoughts=reel"], "generated-remove; did you mean 'real'?"),
        (["--benchmarks=Chart_Refocsu"], "; did you mean 'Chart_Refocus'?"),
        (["--checkpoint=77"], "--checkpoint=77: there is no such folder; the run in"),
        (["--visual_thoughts="], "--visual_thoughts=: choose from"),
        (
            ["--benchmarks=maze"],
            "--benchmarks=maze: this run has the tasks Chart_Refocus (or, by family, chart)",
        ),
        (["--rows=-1"], "--rows is -1: give a whole number in [0, inf)"),
        (["--split=dev"], "dev"),
        (["--protocol=papr"], "--protocol=papr: choose from paper, harness"),
        (
            ["--protocol=paper", "--visual_thoughts=real"],
            "--protocol=paper with --visual_thoughts=real: the teacher's",
        ),
        (
            [f"--data_dir={TABLES}", "--visual_thoughts=none,swap"],
            "--visual_thoughts=swap: public tables hold no",
        ),
        (
            [f"--data_dir={TABLES}", "--benchmarks=MMVQ"],
            "--benchmarks=MMVQ: this run has the tasks",
        ),
        (["--data_dir=/nowhere"], "no benchmark file in /nowhere: put NAME.tsv there"),
        (["--ban_marker", "--protocol=paper"], "--ban_marker is for tasks of a run"),
        (["--samples=2", "--protocol=paper"], "--samples is for tasks of a run"),
        (["--temperature=0.5"], "--temperature=0.5 without --samples: answers are greedy"),
        (["--visual_thoughts=generated"], "was trained without image generation"),
        (["--against=gone", "--rows=1"], "--against=gone: no "),
        (
            [f"--against={LAST}-none", "--split=validation"],
            f"--against={LAST}-none has results of split test, these are of validation",
        ),
        (
            [f"--name={small_run.WARMUP:06d}-none"],
            f"eval/{small_run.WARMUP:06d}-none/answers.jsonl was begun with another "
            f"step, weights: the model has changed since: choose "
            "another --name",
        ),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_evaluated(trained, capsys, arguments, message):
    before = read(trained / "eval" / f"{LAST}-none")
    assert message in error_of(capsys, f"--workdir={trained}", *arguments)
    assert read(trained / "eval" / f"{LAST}-none") == before


@pytest.mark.slow
def test_no_run_and_no_checkpoint(workdir, tmp_path, capsys):
    message = error_of(capsys, f"--workdir={tmp_path}")
    assert f"{tmp_path} holds no run" in message and "opsd_jax.train" in message
    steps = [int(name) for name in os.listdir(workdir / "checkpoints")]
    message = error_of(capsys, f"--workdir={workdir}", f"--checkpoint={workdir}/checkpoints/77")
    assert f"no such checkpoint. Complete steps beside it: {sorted(steps)}" in message
    for step in steps:
        os.remove(workdir / "checkpoints" / str(step) / "commit_success.txt")
    message = error_of(capsys, f"--workdir={workdir}")
    assert "interrupted" in message and "no complete checkpoint: start the run again" in message


@pytest.mark.slow
def test_settings_come_back_as_they_were(trained):
    config = workdir_lib.load_config(str(trained))
    assert config_lib.to_json(config) == config_lib.to_json(small_run.config())
    before = small_run.config()
    for path in (
        "stages",
        "data.tasks",
        "data.limits",
        "eval.final_visual_thoughts",
        "sft.freeze",
        "mesh",
    ):
        key = operator.attrgetter(path)
        assert key(config) == key(before) and type(key(config)) is type(key(before))
    assert config_lib.model(config) == config_lib.model(before) and hash(config_lib.model(config))


# --- what is counted ------------------------------------------------------------------------------


class Example(schema.Example):
    def __init__(self, pid: str, answer: str, metadata: dict):
        super().__init__(pid, "", "", answer, b"", (), (), metadata=metadata)

    @property
    def example(self):  # it stands in for a data.PreparedExample, too
        return self


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


class Sources:
    """Stands for data.Examples, data.Packer and the tokenizer.

    Row n of source s is "s-n", its answer "an".
    """

    def __init__(self, *sizes):
        self.sources = [
            [Example(f"{s}-{n}", f"a{n}", {}) for n in range(size)] for s, size in enumerate(sizes)
        ]
        self.tasks = ("A", "B")[: len(sizes)]
        self.tokenizer, self.packed, self.buckets = (
            self,
            [],
            types.SimpleNamespace(student=["the only one"]),
        )

    def __call__(self, source, n):
        return self.sources[source][n]

    def student(self, prepared, bucket):
        self.packed.append([row.pid for row in prepared])
        return np.array([[ord(c) for c in row.pid.ljust(6)] for row in prepared], np.int32)

    def check_references(self, source, numbers):
        pass

    def decode(self, ids):
        return "".join(map(chr, ids))


class Sampler:
    """Stands for rollout.sample: answers rows of even numbers rightly, compiles once for each batch
    shape.
    """

    def __init__(self):
        self.shapes, self.calls = set(), 0

    def __call__(self, params, context, key, *, config):
        assert config.greedy
        self.calls += 1
        if context.shape not in self.shapes:
            jax.monitoring.record_event_duration_secs(
                "/jax/core/compile/backend_compile_duration", 0.1
            )
        self.shapes.add(context.shape)
        tokens, mask = np.zeros((len(context), 40), np.int32), np.zeros((len(context), 40), bool)
        for b, row in enumerate(context):
            number = int("".join(map(chr, row)).split("-")[1])
            text = f"<answer>a{number if number % 2 == 0 else 'x'}</answer>"
            tokens[b, : len(text)], mask[b, : len(text)] = [ord(c) for c in text], True
        zeros = np.zeros(len(context), np.int32)
        return rollout.Trajectory(
            tokens,
            mask,
            np.zeros_like(tokens, np.float32),
            zeros,
            zeros + rollout.STOP_EOS,
            tokens,
            mask,
            zeros,
        )


def test_every_row_is_counted_once(monkeypatch):
    rows, sampler, told = Sources(5, 3), Sampler(), []
    monkeypatch.setattr(rollout, "sample", sampler)
    config = rollout.RolloutConfig(model=None, bos=0, eos=1, marker=None, greedy=True)

    def evaluate(on_batch=lambda done: None, **selected):
        selection = contexts.Selection(rows, rows, one_device(), 2, **selected)
        return contexts.answer_all({}, selection, "none", sampling=config, on_batch=on_batch)

    results = evaluate(lambda done: told.append((done.done, done.hits)))
    assert rows.packed == [
        ["0-0", "0-1"],
        ["0-2", "0-3"],
        ["0-4", "0-4"],
        ["1-0", "1-1"],
        ["1-2", "1-2"],
    ]
    assert told == [(2, 1), (4, 2), (5, 3), (7, 4), (8, 5)]
    found = [(r.name, r.hits, len(r.predictions), r.timed) for r in results]
    assert found == [("A", 3, 5, 3), ("B", 2, 3, 3)]
    first, second = results[0].predictions[:2]
    assert first == {
        "index": 0,
        "pid": "0-0",
        "prediction": "<answer>a0</answer>",
        "answer": "a0",
        "expected": "a0",
        "hit": True,
        "tokens": 19,
        "stop": "eos",
        "image_skips": 0,
    }
    assert not second["hit"] and second["answer"] == "ax"
    summary = results[0].summary()
    assert (
        summary["overall"] == 0.6
        and summary["eos_rate"] == 1
        and summary["mean_output_tokens"] == 19
    )
    low, high = summary["interval_95"]
    assert 0.2 < low < 0.6 < high < 0.9

    first, second = evaluate(limit=2, subset_seed=3, seed=9)
    assert [p["index"] for p in first.predictions] == randomness.subset(5, 2, 3) != [0, 1]
    assert (
        first.summary()["rows"] == {"drawn": 2, "of": 5, "seed": 3} and len(second.predictions) == 2
    )
    assert "rows" not in evaluate(limit=7)[0].summary()


def test_seconds_are_not_the_compilers(monkeypatch):
    """A single batch that compiled is sampled again for its time; one that did not is not."""
    rows, sampler = Sources(2), Sampler()
    monkeypatch.setattr(rollout, "sample", sampler)
    config = rollout.RolloutConfig(model=None, bos=0, eos=1, marker=None, greedy=True)
    selection = contexts.Selection(rows, rows, one_device(), 2)
    for calls in (2, 3):
        (result,) = contexts.answer_all({}, selection, "none", sampling=config)
        assert sampler.calls == calls and result.timed == 2 and result.seconds > 0


def test_batches_are_filled_with_the_last_row():
    bench = benchmark.Benchmark("A", tuple(range(5)), None, None, None)
    parts = [keys for _, keys in inference.batches([bench], 2)]
    assert [inference.filled(part, 2) for part in parts] == [[0, 1], [2, 3], [4, 4]]
    assert inference.filled([7, 3], 4) == [7, 3, 3, 3]
    assert inference.filled(range(4), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "metadata, gold, text, expected",
    [
        ({}, "7 cm", "<answer> 7   cm </answer>", ("7   cm", True)),
        ({}, "7 cm", "<answer>7cm</answer>", ("7cm", False)),
        ({}, "b", "<answer>b</answer> no: <answer>c</answer>", ("c", False)),
        ({}, "b", "b", (None, False)),
        (
            {"family": "chart", "answer": "n7"},
            "something else",
            "<answer>n7</answer>",
            ("n7", True),
        ),
        ({"family": "chart", "answer": "n7"}, "n8", "<answer>n8</answer>", ("n8", False)),
    ],
)
def test_hits(metadata, gold, text, expected):
    assert benchmark.score(Example("", gold, metadata), text) == expected


@pytest.mark.slow
def test_contexts_of_the_modes(trained):
    config = small_run.config()
    tok = tokenizer.load(workdir_lib.tokenizer_folder("", str(trained / "data")))
    rows, packer = (
        small_run.examples(config, tok, "test", data_dir=trained / "data"),
        packing.Packer.from_config(config, tok),
    )
    numbers = [0, 4, 4]

    def get(mode, seed=0):
        selection = contexts.Selection(rows, packer, None, 4, seed=seed)
        return selection.packed(0, numbers, mode)

    prepared, student = get("none")
    assert [row.example.pid for row in prepared] == [rows.sources[0][n].pid for n in numbers]
    assert student.padded_length == config.data.buckets.student[-1][0]
    shown = {mode: get(mode)[1].patches[:, 25:] for mode in ("real", "noise", "swap", "image")}
    for b, n in enumerate(numbers):
        own, other = rows(0, n), rows(0, (n + small_run.TEST_ROWS // 2) % small_run.TEST_ROWS)
        np.testing.assert_array_equal(shown["real"][b], own.visual_thoughts[0].patches)
        np.testing.assert_array_equal(shown["swap"][b], other.visual_thoughts[0].patches)
        np.testing.assert_array_equal(shown["image"][b], own.problems[0].patches)
    np.testing.assert_array_equal(shown["noise"], get("noise")[1].patches[:, 25:])
    assert (get("noise", 1)[1].patches[:, 25:] != shown["noise"]).mean() > 0.99


@pytest.mark.slow
def test_rows_are_answered_in_the_bucket_they_fit(trained, monkeypatch):
    """Short rows in short contexts, and the same answers and KL as with one bucket; in all modes,
    with a swapped image.
    """
    config = small_run.config()
    tok = tokenizer.load(workdir_lib.tokenizer_folder("", str(trained / "data")))

    class Rows(examples.Examples):  # every third question is asked twice
        def __call__(self, source, n):
            row = super().__call__(source, n)
            return row if n % 3 else dataclasses.replace(row, question=np.tile(row.question, 2))

    preprocess = examples.Preprocessor.from_config(config, tok)
    rows = Rows.open(config_lib.data(config), str(trained / "data"), "test", preprocess)
    buckets = config.data.buckets
    more = len(rows(0, 0).question) // 2
    long = {
        kind: ((buckets[kind][0][0] + more, *buckets[kind][0][1:]),)
        for kind in ("student", "teacher", "trace")
    }
    short = {kind: (buckets[kind][0],) for kind in long}
    buckets.update(long)
    packer = packing.Packer.from_config(config.copy_and_resolve_references(), tok)
    buckets.update({kind: short[kind] + long[kind] for kind in long})
    both = packing.Packer.from_config(config, tok)

    def select(packer, limit=0):
        return contexts.Selection(rows, packer, one_device(), 4, limit)

    found = contexts.buckets_of(select(both), 0, ("none",))
    assert found == [int(n % 3 == 0) for n in range(small_run.TEST_ROWS)]

    params = checkpoint_lib.restore_params(trained, small_run.abstract_params())
    sampled, sample = [], rollout.sample

    def seen(params, packed, key, *, config):
        sampled.append((packed.padded_length, packed.length.tolist()))
        return sample(params, packed, key, config=config)

    monkeypatch.setattr(rollout, "sample", seen)
    sampling = session.open_run(str(trained)).evaluation_sampling(max_new_tokens=8)
    assert sampling.greedy

    def ask(packer, mode):
        return contexts.answer_all(params, select(packer), mode, sampling=sampling)[0].predictions

    for mode in ("none", "swap", "noise", "remove"):
        sampled.clear()
        with_two, sizes = ask(both, mode), {slots for slots, _ in sampled}
        assert len(sizes) == (1 if mode == "remove" else 2) and with_two == ask(packer, mode)
        assert all(length <= slots for slots, of_batch in sampled for length in of_batch)

    def kl(packer):
        selection = select(packer, limit=6)
        return reference_kl.reference_kl(params, params, selection, config=config_lib.model(config))

    assert kl(both)[small_run.TASK]["kl"] == pytest.approx(
        kl(packer)[small_run.TASK]["kl"], abs=1e-5
    )


@pytest.mark.slow
def test_kl_is_a_mean_over_tokens_then_over_rows(trained, monkeypatch):
    """With a KL of 0, 1, 2, ... along a trace, one of n targets has the mean (n - 1) / 2."""
    from opsd_jax import distill

    config = small_run.config()
    tok = tokenizer.load(workdir_lib.tokenizer_folder("", str(trained / "data")))
    rows, packer = (
        small_run.examples(config, tok, "test", data_dir=trained / "data"),
        packing.Packer.from_config(config, tok),
    )
    seen = []

    def kl_to_student(teacher, student, batch, completion, *, config):
        assert (teacher, student) == ("theirs", "ours")
        seen.append((batch.student.length, batch.teacher.length))
        return np.broadcast_to(
            np.arange(completion.mask.shape[1], dtype=np.float32), completion.mask.shape
        )

    monkeypatch.setattr(distill, "kl_to_student", kl_to_student)
    selection = contexts.Selection(rows, packer, one_device(), 4, limit=6)
    found = reference_kl.reference_kl("theirs", "ours", selection, config=None)
    targets = np.array(
        [
            len(packer.reference(rows(0, n))) + 1
            for n in randomness.subset(small_run.TEST_ROWS, 6, 0)
        ]
    )  # and the closing eos
    assert found == {small_run.TASK: {"kl": pytest.approx(((targets - 1) / 2).mean()), "n": 6}}
    assert len(seen) == 2 and all(
        (t > s + 25).all() for s, t in seen
    )  # the teacher sees an image more
