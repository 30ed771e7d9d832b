"""A whole run: the files that it writes, from the user's command to the report of its control
arms.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

import opsd_jax
import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, rollout, train
from opsd_jax.data import shards
from opsd_jax.evaluation import html
from opsd_jax.run import controls as controls_lib
from opsd_jax.run import saves, session
from opsd_jax.runtime import checkpoint, distributed, health, metrics

COMMON = {
    "step",
    "time",
    "stage",
    "loss",
    "ce",
    "lr",
    "grad_norm",
    "completion_len",
    "tokens_per_sec",
    "samples_per_sec",
    "goodput",
    "time/steps",
    "compiles",
}
OF_STAGE = {
    "warmup": {"accuracy"},
    "sft": {"accuracy"},
    "opsd": {
        "jsd",
        "eos_rate",
        "image_skip_rate",
        "teacher_topk_mass",
        "clip_fraction",
        "student_entropy",
        "teacher_entropy",
        "empty_retries",
        "scored_len",
        "cut_rate",
    },
}

pytestmark = pytest.mark.usefixtures("fast_compiles", "own_programs")


@pytest.fixture
def trained(tmp_path_factory):
    return small_run.trained(tmp_path_factory)


def check_metrics(workdir, stages):
    """Rows of all steps in order, with the documented keys and finite numbers; returns them."""
    rows = metrics.read(workdir / "metrics.jsonl")
    updates = [row for row in rows if "loss" in row]
    expected = [stage for stage, steps in stages.items() for _ in range(steps)]
    assert [row["stage"] for row in updates] == expected
    assert [row["step"] for row in updates] == list(range(1, len(expected) + 1))
    for row in updates:
        assert COMMON | OF_STAGE[row["stage"]] <= row.keys()
        assert all(math.isfinite(v) for v in row.values() if not isinstance(v, str))
        assert "nonfinite" not in row
        assert abs(row["time"] - time.time()) < 3600 and row["samples_per_sec"] > 0
        assert row["compiles/update"] == 1  # one program however many steps
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    return rows


def check_results(folder, *, n=small_run.TEST_ROWS):
    """summary.json and predictions.jsonl agree with each other and with the contract."""
    summary = json.loads((folder / "summary.json").read_text())
    assert {"protocol", "checkpoint", "seed", "benchmarks"} <= summary.keys()
    predictions = [
        json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()
    ]
    ((task, b),) = summary["benchmarks"].items()
    assert {
        "overall",
        "unit",
        "n",
        "categories",
        "mean_output_tokens",
        "seconds_per_sample",
    } <= b.keys()
    assert task == small_run.TASK and b["n"] == n == len(predictions)
    assert [p["index"] for p in predictions] == list(range(n)) and len(
        {p["pid"] for p in predictions}
    ) == n
    assert b["overall"] == sum(p["hit"] for p in predictions) / n
    assert b["mean_output_tokens"] == sum(p["tokens"] for p in predictions) / n
    assert b["seconds_per_sample"] > 0
    return summary


def check_workdir(workdir, stages, names):
    """Every file that a run promises."""
    config = json.loads((workdir / "config.json").read_text())
    assert config["stages"] == list(stages) and config["model"]["llm"]["hidden_size"] == 32
    rows = check_metrics(workdir, stages)
    last = sum(stages.values())
    assert checkpoint.metadata(workdir)["step"] == last
    assert checkpoint.metadata(workdir / "checkpoints" / str(last))["config"] == config
    assert any(path.stat().st_size for path in (workdir / "tb").glob("events.out.tfevents.*"))
    for name in names:
        check_results(workdir / "eval" / f"{last:06d}-{name}")
        assert f"eval/{small_run.TASK}/{name}" in rows[-1]
    times = json.loads((workdir / "time.json").read_text())
    phases = {"compile", "data", "update", "eval", "checkpoint"} | (
        {"sample"} if "opsd" in stages else set()
    )
    assert phases < times.keys() and math.isclose(sum(times.values()), 2 * times["total"])
    assert not list(workdir.rglob("*.tmp"))
    return rows


@pytest.mark.slow
def test_the_command_from_an_empty_folder(tmp_path, tmp_path_factory):
    small_run.trained(tmp_path_factory)  # compiles the programs
    done = small_run.run(
        small_run.command(tmp_path / "w"), env=small_run.environment(tmp_path_factory)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("none", "real", "none-banned")
    check_workdir(tmp_path / "w", {"warmup": small_run.WARMUP, "opsd": small_run.OPSD}, names)

    # The arm is an ordinary run that starts from the warm-up's weights.
    arm = tmp_path / "w" / "arms" / "noise"
    check_workdir(arm, {"opsd": small_run.OPSD}, names)
    config = json.loads((arm / "config.json").read_text())
    assert config["teacher"]["visual_thoughts"] == "noise"
    assert config["init_from"].endswith(f"w/checkpoints/{small_run.WARMUP}")
    start = [
        checkpoint.restore_params(path, small_run.abstract_params())
        for path in (
            arm / "checkpoints" / "0",
            tmp_path / "w" / "checkpoints" / str(small_run.WARMUP),
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, *start)

    page = (tmp_path / "w" / "report.html").read_text()
    assert done.stdout.splitlines()[-1] == f"the page of the run: {tmp_path}/w/report.html"
    assert "arm noise" in page and page.count("<svg") >= 4
    assert (
        "arm noise  4/4" in done.stderr and "warmup, steps 1 to 2: the model learns" in done.stderr
    )

    report = (tmp_path / "w" / "report.md").read_text()
    lines = report.splitlines()
    _, words = report.rstrip().split("\n\n")
    # Where the time went, once the arms are done; then the table and what it says, as plain text.
    times, shown = done.stdout.split("where the time went\n")[1].split("answers of")
    said = [line.removeprefix("- ") for line in words.splitlines()]
    said = [
        f"caution: {line}" if line.startswith("**") and line.endswith("**") else line
        for line in said
    ]
    assert "total" in times
    assert "\n".join(said).replace("**", "").replace("`", "") in shown
    assert sum("mean little" in line for line in lines) == 1  # the run is short
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert [row[0] for row in rows[2:]] == [
        "teacher: start, with true visual thoughts",
        "start, text only",
        "start, text only, `<image_start>` banned",
        "OPSD, text only",
        "arm noise, text only",
        "always the most frequent answer",
    ]
    closures = [bool(row[-1]) for row in rows[2:]]
    assert closures == [False, False, False, True, True, False]
    kl = json.loads((arm / "eval" / f"{small_run.OPSD:06d}-kl" / "summary.json").read_text())[
        "tasks"
    ]
    assert f"{html.fixed(100 * kl[small_run.TASK]['closure'], 0)} %" == rows[-2][-1]
    found = json.loads((tmp_path / "w" / "report.json").read_text())
    assert len(found) == 6
    always, folder = found[-1]["tasks"][small_run.TASK], f"{small_run.LAST:06d}-none"
    lines = (tmp_path / "w/eval" / folder / "predictions.jsonl").read_text().splitlines()
    expected = [json.loads(line)["expected"] for line in lines]
    assert always["overall"] == max(map(expected.count, expected)) / len(expected)
    assert always["n"] == len(expected)
    assert expected.count(always["answer"]) == max(map(expected.count, expected))
    # The same row says how a trained model answers without visual thoughts, and with the true ones.
    place = rows[0].index("with true visual thoughts")
    assert [bool(row[place]) for row in rows[2:]] == [False, True, False, True, True, False]
    for n, folder, step in (
        (1, tmp_path / "w", small_run.WARMUP),
        (3, tmp_path / "w", small_run.LAST),
        (4, arm, small_run.OPSD),
    ):
        real = json.loads((folder / "eval" / f"{step:06d}-real" / "summary.json").read_text())[
            "benchmarks"
        ][small_run.TASK]
        assert found[n]["tasks"][small_run.TASK]["real"] == {
            k: real[k] for k in ("overall", "interval_95")
        }
        assert rows[2 + n][place].startswith(f"{100 * real['overall']:.1f} % (")


@pytest.mark.slow
def test_samples_show_what_the_model_saw_and_wrote(trained):
    stages = config_lib.stage_ends(small_run.config())
    assert stages == {"warmup": small_run.WARMUP, "opsd": small_run.LAST}
    for stage, step in (("warmup", 1), ("opsd", small_run.WARMUP + 1)):
        folder = trained / "samples" / f"{step:06d}"
        text = (folder / f"{stage}-first-batch.txt").read_text()
        assert (
            text.count("Height of the") >= 4 and "[25 patches]" in text and "<|im_start|>" in text
        )
        for n in range(4):
            for name in ("problem", "vt0"):
                pixels = np.asarray(Image.open(folder / f"{stage}-row{n}-{name}.png"))
                assert pixels.shape == (40, 40, 3) and (pixels[-1] == 0).all()  # the chart's axis
    steps = sorted(int(path.parent.name) for path in (trained / "samples").glob("*/rollouts.txt"))
    assert steps == [3, 4, 6]  # the first of the stage, and every second
    lines = (trained / "samples" / "000003" / "rollouts.txt").read_text().splitlines()
    assert len(lines) >= 8 and "expected 'n" in lines[0] and lines[0].startswith("chart-train-")


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(trained, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)

    def contents():
        return {
            path: path.read_bytes()
            for path in workdir.rglob("*")
            if path.is_file()
            and not {"tb", "log"}.intersection(path.parts)  # they record each start
        }

    before = contents()
    train.train(small_run.config(), str(workdir))
    assert contents() == before


@pytest.mark.slow
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(trained, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    for step in range(
        small_run.WARMUP + 1, small_run.LAST + 1
    ):  # as if killed when the warm-up was saved
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(workdir / "eval")
    train.train(small_run.config(), str(workdir))
    assert len(os.listdir(workdir / "eval")) == len(os.listdir(trained / "eval")) == 8
    for path in (workdir / "eval").rglob("predictions.jsonl"):
        assert path.read_text() == (trained / path.relative_to(workdir)).read_text()


@pytest.mark.slow
def test_supervised_training_alone(tmp_path):
    config = small_run.config(
        stages=("sft",),
        sft__mix__interleaved=2,
        sft__mix__reference=1,
        eval__final_visual_thoughts=("none",),
        eval__final_banned=False,
        checkpoint__every=5,
    )
    train.train(config, str(tmp_path))
    check_workdir(tmp_path, {"sft": 2}, ["none"])
    saved = {int(folder) for folder in os.listdir(tmp_path / "checkpoints")}
    assert saved == {step for step, _ in saves.of_run(config)} == {0, 2}  # its start and its end
    kl = json.loads((tmp_path / "eval" / "000002-kl" / "summary.json").read_text())
    assert (
        kl["start"].endswith("checkpoints/0")
        and kl["tasks"][small_run.TASK]["n"] == small_run.TEST_ROWS
    )
    assert kl["tasks"][small_run.TASK]["before"] != kl["tasks"][small_run.TASK]["after"]


@pytest.mark.slow
def test_steps_of_a_run_are_traced(trained, tmp_path, monkeypatch):
    """In each of its stages, also where it is asked to stop within them; the numbers are those of
    metrics.jsonl, and a trace changes nothing else.
    """
    config = small_run.config(
        log__profile_steps=(small_run.WARMUP, small_run.LAST - 1),
        eval__final_split="",
        eval__kl=False,
    )
    scalars, stop_at = metrics.Writer.scalars, small_run.WARMUP + 1

    def scalars_and_signal(self, step, *args):
        scalars(self, step, *args)
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(metrics.Writer, "scalars", scalars_and_signal)
        train.train(config, str(tmp_path))
    assert stopped.value.code == distributed.EXIT_STOPPED
    folder = tmp_path / "profile" / "plugins" / "profile"
    assert sorted(os.listdir(folder)) == ["000002-000002", "000003-000003"]
    train.train(config, str(tmp_path))
    assert sorted(os.listdir(folder)) == ["000002-000002", "000003-000003", "000004-000005"]
    for path in folder.glob("*/*.xplane.pb"):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        names = {event.name for plane in planes for line in plane.lines for event in line.events}
        sampled = {"sample"} if path.parent.name > "000003" else set()
        assert {"train", "data", "update", "checkpoint"} | sampled <= names
    assert len(list(folder.glob("*/*.xplane.pb"))) == 3
    assert os.listdir(tmp_path / "profile") == ["plugins"]
    found, expected = (
        {row["step"]: row["loss"] for row in metrics.read(w / "metrics.jsonl") if "loss" in row}
        for w in (tmp_path, trained)
    )
    assert found == expected


@pytest.mark.slow
def test_opsd_alone_starts_from_a_saved_checkpoint(trained, tmp_path):
    """And rows that a run wrote before its first checkpoint, when it was killed, do not stand there
    twice.
    """
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 0, "stage": "opsd", "loss": 7.0}\n'
    )
    config = small_run.config(
        stages=("opsd",), data__dir=str(trained / "data"), eval__final_split=""
    )
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_json(config)))
    started = []
    train.train(
        config,
        str(tmp_path),
        start_arms=lambda: started.append(checkpoint.metadata(tmp_path)["step"]),
    )
    assert started == [0]
    check_metrics(tmp_path, {"opsd": small_run.OPSD})
    assert "7.0" in (tmp_path / "metrics.jsonl.superseded").read_text()


@pytest.mark.slow
def test_health_remembers_what_was_before_a_resume(trained, tmp_path, monkeypatch):
    workdir, seen = tmp_path / "w", []
    shutil.copytree(trained, workdir)
    for step in (5, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    monkeypatch.setattr(
        health.Health, "replay", lambda _, rows: seen.append([row["step"] for row in rows])
    )
    train.train(small_run.config(), str(workdir))
    assert seen == [[3, 4]]  # rows of OPSD, up to the checkpoint


@pytest.mark.parametrize(
    "limit, cut_to", [(10, 1), (70, 1), (75, 3), (79, 7), (80, None), (10240, None)]
)
def test_the_teacher_must_leave_tokens_to_score(limit, cut_to):
    """A teacher's context of 70 positions and a budget of 8 tokens."""
    config = small_run.config(opsd__max_forward_tokens=limit)
    assert config.data.buckets.teacher[-1][0] == 70 and config.rollout.max_new_tokens == 8
    if cut_to is None:
        config_check.check(config)
    else:
        with pytest.raises(
            ValueError,
            match=rf"max_forward_tokens is {limit}: .* cut to {cut_to} tokens. Give at least 80 ",
        ):
            config_check.check(config)
    config.stages = ("warmup",)
    config_check.check(config)


def test_the_default_limit_is_the_papers_and_leaves_64_tokens():
    config = config_lib.default()
    config_check.check(config)
    assert config.opsd.max_forward_tokens == 10240
    config.opsd.max_forward_tokens -= 63
    with pytest.raises(ValueError, match="64 tokens to score"):
        config_check.check(config)


def test_a_run_and_its_arms_are_a_group_at_wandb():
    settings = config_lib.to_json(small_run.config(log__wandb="opsd"))
    for workdir, name in (("/runs/a/", "a"), ("/runs/a/arms/noise", "noise")):
        assert metrics.wandb_arguments("opsd", workdir, "/runs/a/", settings) == {
            "project": "opsd",
            "name": name,
            "group": "a",
            "config": settings,
        }
    assert metrics.wandb_arguments("", "/runs/a", "/runs/a", settings) is None


@pytest.mark.slow
@pytest.mark.parametrize("lost, step", [(".", small_run.OPSD - 1), ("checkpoints", small_run.OPSD)])
def test_a_run_whose_folder_is_deleted_ends_with_an_error(
    trained, tmp_path, monkeypatch, lost, step
):
    """While it trains, and before its last save."""
    config = small_run.config(
        stages=("opsd",),
        data__dir=str(trained / "data"),
        eval__final_split="",
        checkpoint__every=1000,
    )  # nothing is being written when it is deleted
    scalars = metrics.Writer.scalars

    def scalars_and_delete(self, now, *args):
        scalars(self, now, *args)
        if now == step:
            shutil.rmtree(tmp_path / "w" / lost)

    monkeypatch.setattr(metrics.Writer, "scalars", scalars_and_delete)
    with pytest.raises(OSError, match="was deleted or replaced|is gone"):
        train.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w" / "time.json").exists()


# --- arms -----------------------------------------------------------------------------------------


def test_arms_need_a_name_and_a_start(tmp_path):
    config = small_run.config()
    with pytest.raises(ValueError, match="--arm=nosie: .*; did you mean 'noise'?"):
        controls_lib.settings_of(config, str(tmp_path), "nosie")
    with pytest.raises(
        FileNotFoundError, match=r"config.json does not exist: run the same .* without --arm"
    ):
        controls_lib.settings_of(config, str(tmp_path), "noise")
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_json(config)))
    with pytest.raises(
        FileNotFoundError, match=r"checkpoints/2 does not exist: run the same command without"
    ):
        controls_lib.settings_of(config, str(tmp_path), "noise")
    with pytest.raises(
        config_check.ConfigMismatchError, match=r"--arm=noise is a control .*\n.*\n +seed +0 +3\n"
    ):
        controls_lib.settings_of(small_run.config(seed=3), str(tmp_path), "noise")
    allowed = small_run.config(eval__rows=4, run_arms=("noise",))
    with pytest.raises(FileNotFoundError, match="checkpoints/2 does not exist"):
        controls_lib.settings_of(allowed, str(tmp_path), "noise")


def fake_python(tmp_path, monkeypatch, script):
    """Arms started from now on run a shell script instead of Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_an_arm_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, 'echo "$@"; [ "${*##*=}" = good ]')
    with controls_lib.Arms({"bad": 1, "good": 1}, str(tmp_path), ["--x"]) as controls:
        log = tmp_path / "arms" / "bad" / "log.txt"
        assert controls.finish() == {"bad": f"see {log}"}
    assert (
        tmp_path / "arms" / "good" / "log.txt"
    ).read_text() == "-m opsd_jax.train --x --arm=good\n"


@pytest.mark.parametrize(
    "error",
    [
        health.UnhealthyRunError("stopped at step 3: loss is nan"),
        controls_lib.ArmsFailedError({"noise": "loss is nan"}, ["noise"]),
        ValueError("config.seed is -1"),
        FileNotFoundError("no data"),
    ],
)
def test_what_is_no_fault_of_the_code_is_told_in_one_line(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "_run_command", fail)
    monkeypatch.setattr(train.flags, "FLAGS", types.SimpleNamespace(config=1, workdir="w", arm=""))
    with pytest.raises(SystemExit) as stopped:
        train.main([])
    assert stopped.value.code == 1 and capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_while_only_arms_run(tmp_path, monkeypatch, capsys, number):
    """The run is done: the command waits until the arm has saved, and ends with 42."""
    fake_python(
        tmp_path,
        monkeypatch,
        "trap 'echo saved; exit 42' TERM; echo ready; while :; do sleep 0.02; done",
    )
    log = tmp_path / "arms" / "noise" / "log.txt"

    def ask():
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        signal.raise_signal(number)

    monkeypatch.setattr(train, "check", lambda *_: None)
    monkeypatch.setattr(train, "_train_alone", lambda *_, **__: None)
    monkeypatch.setattr(controls_lib.Arms, "finish", lambda self: (self.start(), ask()))
    monkeypatch.setattr(controls_lib, "_cores", lambda: [None, None])
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            train._run_command(small_run.config(run_arms=("noise",)), str(tmp_path), "")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == distributed.EXIT_STOPPED and log.read_text() == "ready\nsaved\n"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{number.name}: stopping")


@pytest.mark.parametrize(
    "error",
    [health.UnhealthyRunError("loss is nan"), ValueError("loss is nan"), OSError("loss is nan")],
)
def test_arms_on_an_accelerator_follow_in_the_process_of_the_run(tmp_path, monkeypatch, error):
    """It belongs to that process. An arm that breaks leaves the others alone, and is named."""
    run, trained, written = str(tmp_path), [], []

    def train_one(config, workdir, data_workdir, start_arms):
        assert data_workdir == run
        trained.append(workdir)
        if workdir.endswith("image"):
            raise error

    def write_report(config, workdir, arms, command):
        written.append(arms)
        return {}, "page"

    monkeypatch.setattr(train, "check", lambda *_: None)
    monkeypatch.setattr(train, "_train_alone", train_one)
    monkeypatch.setattr(train, "_print_times", lambda _: None)
    monkeypatch.setattr(train, "_write_report", write_report)
    monkeypatch.setattr(controls_lib, "settings_of", lambda c, w, name: (c, f"{w}/arms/{name}"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    config = small_run.config(run_arms=("noise", "image", "swap"))
    for command in (
        lambda: train._run_command(config, run, ""),
        lambda: train.train_run(config, run),
    ):
        trained.clear(), written.clear()
        try:
            with pytest.raises(controls_lib.ArmsFailedError) as failed:
                command()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        assert str(failed.value) == (
            "control arms failed: image (loss is nan). Table and page are without them. The same "
            "command tries again; --config.run_arms=noise,swap leaves them out"
        )
        assert trained == [run, *(f"{run}/arms/{name}" for name in ("noise", "image", "swap"))]
        assert written == [["noise", "swap"]]


@pytest.mark.slow
def test_a_run_and_its_arm_from_python(trained, tmp_path):
    """The run is that of the command; its arm follows in the same process."""
    config = small_run.config(run_arms=("noise",))
    config.data.dir = str(trained / "data")
    run = opsd_jax.train_run(config, tmp_path)
    assert [row["who"] for row in run.report().records] == [
        *("teacher", "start", "start, banned", "OPSD", "arm noise", "baseline")
    ]
    page = (tmp_path / "report.html").read_text()
    assert "opsd_jax.train_run(opsd_jax.read_config(" in page and "UTC by opsd_jax" in page
    losses = [row["loss"] for row in run.read_metrics() if "loss" in row]
    of_command = [row["loss"] for row in metrics.read(trained / "metrics.jsonl") if "loss" in row]
    assert losses == of_command
    (found,) = opsd_jax.evaluate_run(run.workdir, "real", rows=8).values()
    assert found["benchmarks"][small_run.TASK]["n"] == 8
    assert len(opsd_jax.train_run(config, tmp_path).read_metrics()) == len(run.read_metrics())


def test_an_arm_does_not_outlive_the_run(tmp_path, monkeypatch):
    """SIGTERM to the run alone: its arms save and stop too, and the next one is not started."""
    fake_python(
        tmp_path,
        monkeypatch,
        "trap 'echo saved; exit 42' TERM; echo ready; while :; do sleep 0.02; done",
    )
    monkeypatch.setattr(controls_lib, "_cores", lambda: [None, None])  # two arms at a time
    logs = [tmp_path / "arms" / name / "log.txt" for name in "ab"]
    with (
        pytest.raises(SystemExit),
        controls_lib.Arms({"a": 1, "b": 1, "c": 1}, str(tmp_path), []) as controls,
    ):
        controls.start()
        while not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.01)
        sys.exit(distributed.EXIT_STOPPED)
    assert [log.read_text() for log in logs] == ["ready\nsaved\n"] * 2
    assert not (tmp_path / "arms" / "c").exists()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_each_arm_has_a_core_of_its_own(tmp_path, monkeypatch):
    core = min(os.sched_getaffinity(0))
    fake_python(tmp_path, monkeypatch, "sleep 0.5; grep Cpus_allowed_list /proc/self/status")
    monkeypatch.setattr(controls_lib, "_cores", lambda: [core, core])
    with controls_lib.Arms({"a": 1, "b": 1}, str(tmp_path), []) as controls:
        controls.start()
        controls.finish()
    for name in "ab":
        log = (tmp_path / "arms" / name / "log.txt").read_text()
        assert log.split() == ["Cpus_allowed_list:", str(core)]


def test_the_digests_of_a_run_are_those_of_its_start(tmp_path, monkeypatch):
    """Data that change before the first save are not recorded as the run's own."""
    config, workdir = small_run.config(), str(tmp_path)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        run, _ = session.open_training(config, workdir, workdir, checkpoints)
    there = run.digests

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(shards, "digests", fail)
    assert run.digests is there and set(there) == {"data", "tokenizer"}


@pytest.mark.slow
def test_training_samples_with_int8_weights_and_evaluates_without(tmp_path, monkeypatch):
    seen = []

    def sample(params, context, key, *, config, of=rollout.sample, **named):
        seen.append((params["llm"]["head"].dtype.name, config.greedy))
        return of(params, context, key, config=config, **named)

    monkeypatch.setattr(rollout, "sample", sample)
    config = small_run.config(rollout__int8=True, eval__final_banned=False)
    train.train(config, str(tmp_path / "w"))
    assert set(seen) == {("int8", False), ("float32", True)}
    assert sum(dtype == "int8" for dtype, _ in seen) == small_run.OPSD
