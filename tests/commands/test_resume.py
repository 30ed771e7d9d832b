"""A run that was stopped or killed and then continued equals, bit for bit, one that was not."""

import json
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, context, sharding, train
from opsd_jax import eval as eval_command
from opsd_jax import params as params_lib
from opsd_jax.data import sizes
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.diagnose import __main__ as diagnose
from opsd_jax.diagnose import kl
from opsd_jax.evaluation import inference
from opsd_jax.run import controls
from opsd_jax.runtime import checkpoint, distributed, metrics

pytestmark = pytest.mark.usefixtures("fast_compiles", "own_programs")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return small_run.trained(tmp_path_factory)


def losses(workdir):
    return {
        row["step"]: row["loss"] for row in metrics.read(workdir / "metrics.jsonl") if "loss" in row
    }


def state(workdir, step):
    """The whole training state of a step as NumPy arrays by path: parameters, moments, teacher,
    step.
    """
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load_checkpointables(workdir / "checkpoints" / str(step), {"state": None})["state"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir, straight, last=small_run.LAST):
    assert losses(workdir) == losses(straight) and len(losses(workdir)) == last
    found, expected = state(workdir, last), state(straight, last)
    assert found.keys() == expected.keys() and len(found) > 50
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    for path in (straight / "eval").glob("*/predictions.jsonl"):
        assert (workdir / path.relative_to(straight)).read_text() == path.read_text()


def cut_off(straight, workdir, step):
    """A copy of the run as a kill leaves it when `step` was the last complete checkpoint: a
    half-written next one, rows of steps that were not saved, a line that breaks off.
    """
    shutil.copytree(straight, workdir)
    folder = workdir / "checkpoints"
    (folder / str(step + 1)).rename(folder / f"{step + 1}.orbax-checkpoint-tmp")
    shutil.rmtree(folder / f"{step + 1}.orbax-checkpoint-tmp" / "params")
    for later in range(step + 2, small_run.LAST + 1):
        shutil.rmtree(folder / str(later))
    rows = [
        json.dumps(row)
        for row in metrics.read(straight / "metrics.jsonl")
        if row["step"] <= step + 1
    ]
    (workdir / "metrics.jsonl").write_text("\n".join([*rows, rows[-1][:40]]))
    shutil.rmtree(workdir / "eval")
    for path in (straight / "eval").iterdir():
        if path.is_dir() and int(path.name[:6]) <= step:
            shutil.copytree(path, workdir / "eval" / path.name)


# Inside the warm-up, between the stages, and inside OPSD.
@pytest.mark.parametrize("step", [1, small_run.WARMUP, small_run.WARMUP + 2])
@pytest.mark.slow
def test_continued_from_any_step(straight, tmp_path, step, caplog):
    workdir = tmp_path / "w"
    cut_off(straight, workdir, step)
    with caplog.at_level("WARNING"):
        train.train(small_run.config(), str(workdir))
    assert f"{step + 1}.orbax-checkpoint-tmp" in caplog.text  # said, not silently removed
    assert_same_run(workdir, straight)
    *moved, torn = (workdir / "metrics.jsonl.superseded").read_text().splitlines()
    assert {json.loads(line)["step"] for line in moved} == {step + 1} and not torn.endswith("}")


@pytest.mark.slow
def test_kill_9_at_a_random_moment(straight, tmp_path, tmp_path_factory):
    workdir, moment = tmp_path / "w", random.SystemRandom().uniform(0, 0.5)
    command = small_run.command(workdir, "--config.run_arms=()")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=small_run.ROOT,
            env=small_run.environment(tmp_path_factory),
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / "2" / "commit_success.txt").exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            tmp_path / "log"
        ).read_text()[-3000:]
        time.sleep(0.005)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run had ended {moment:.3f} s after checkpoint 2"
    train.train(small_run.config(), str(workdir))
    assert_same_run(workdir, straight)


@pytest.mark.slow
def test_stages_go_on_from_what_the_checkpoint_offers(straight, tmp_path):
    """With checkpoint.params = "ema" that is the average, in a run of one piece as well as after a
    resume.
    """
    changes = dict(
        data__dir=str(straight / "data"),
        stages=("opsd", "sft"),
        teacher__kind="ema",
        teacher__ema_decay=0.5,
        checkpoint__params="ema",
        eval__final_split="",
    )
    whole, workdir = tmp_path / "whole", tmp_path / "w"
    train.train(small_run.config(**changes), str(whole))
    shutil.copytree(whole, workdir)
    for step in range(small_run.OPSD + 1, small_run.OPSD + small_run.WARMUP + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    train.train(small_run.config(**changes), str(workdir))
    assert_same_run(workdir, whole)
    folder = whole / "checkpoints" / str(small_run.OPSD)
    offered = checkpoint.restore_params(folder, small_run.abstract_params())
    live = state(whole, small_run.OPSD)["['params']['llm']['head']"]
    assert not np.array_equal(offered["llm"]["head"], live)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(straight, tmp_path, monkeypatch):
    """Only the signal makes this run save before its stage ends."""
    config, stop_at = small_run.config(checkpoint__every=1000), small_run.WARMUP + 2
    scalars = metrics.Writer.scalars

    def scalars_and_signal(self, step, *args):
        scalars(self, step, *args)
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(metrics.Writer, "scalars", scalars_and_signal)
        train.train(config, str(tmp_path))
    assert stopped.value.code == distributed.EXIT_STOPPED != 0
    assert checkpoint.metadata(tmp_path)["step"] == max(losses(tmp_path)) == stop_at
    assert signal.getsignal(signal.SIGTERM) == before  # the run's handler is gone
    train.train(config, str(tmp_path))
    assert_same_run(tmp_path, straight)
    assert not (tmp_path / "metrics.jsonl.superseded").exists()  # no step was lost
    compiles = {
        row["step"]: row["compiles/update"]
        for row in metrics.read(tmp_path / "metrics.jsonl")
        if "loss" in row
    }
    # Each stage compiles its update once. The continuation, in the same process, finds it there
    # (`sharding.update_program` keeps it); a process of its own would compile it once, too.
    assert compiles == {step: int(step <= stop_at) for step in range(1, small_run.LAST + 1)}


@pytest.mark.slow
@pytest.mark.parametrize("moment, stop_at", [("compile", 1), ("save", 4)])
def test_sigterm_while_it_compiles_or_saves(straight, tmp_path, monkeypatch, moment, stop_at):
    """The step that compiles is taken and saved; a save that had begun is completed."""
    first, save = sharding.update_program, checkpoint.Checkpoints.save

    def signal_in_first_call(*args):
        update = first(*args)

        def call(*args):
            signal.raise_signal(signal.SIGTERM)
            return update(*args)

        return call

    def save_and_signal(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == stop_at - 1:
            signal.raise_signal(signal.SIGTERM)  # it is written in the background

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        if moment == "compile":
            patched.setattr(sharding, "update_program", signal_in_first_call)
        else:
            patched.setattr(checkpoint.Checkpoints, "save", save_and_signal)
        train.train(small_run.config(), str(tmp_path))
    assert stopped.value.code == distributed.EXIT_STOPPED
    assert checkpoint.metadata(tmp_path)["step"] == max(losses(tmp_path)) == stop_at
    train.train(small_run.config(), str(tmp_path))
    assert_same_run(tmp_path, straight)
    assert not (tmp_path / "metrics.jsonl.superseded").exists()


def signal_at(patched, number, module=inference, function="timed"):
    """SIGTERM in the batch of that number (from 0) of evaluations from now on; the list of the
    batches' numbers.
    """
    run, batches = getattr(module, function), []

    def run_and_signal(*args, **kwargs):
        batches.append(len(batches))
        if batches[-1] == number:
            signal.raise_signal(signal.SIGTERM)
        return run(*args, **kwargs)

    patched.setattr(module, function, run_and_signal)
    return batches


@pytest.mark.slow
def test_a_stop_while_evaluating_loses_no_step_and_no_answer(
    straight, tmp_path, monkeypatch, caplog
):
    """In an evaluation in between, in its repetition, and in the final one."""
    at = small_run.WARMUP + 1
    config = small_run.config(
        data__dir=str(straight / "data"),
        stages=("opsd",),
        checkpoint__every=1000,
        eval__every=at,
        eval__visual_thoughts=("none", "real"),
        eval__rows=16,
        eval__kl=False,
        eval__final_banned=False,
    )
    whole, workdir = tmp_path / "whole", tmp_path / "w"
    train.train(config, str(whole))

    def rows(folder):
        return [(row["step"], sorted(row)) for row in metrics.read(folder / "metrics.jsonl")]

    def final(folder):
        return {
            path.parent.name: path.read_text() for path in folder.glob("eval/*/predictions.jsonl")
        }

    assert any(key.startswith("eval/") for step, keys in rows(whole) if step == at for key in keys)

    def stopped(number):
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as error:
            batches = signal_at(patched, number)
            train.train(config, str(workdir))
        assert error.value.code == distributed.EXIT_STOPPED
        return len(batches)

    for _ in range(2):  # of 4 batches of an evaluation the second
        assert stopped(1) == 2
        assert (
            checkpoint.metadata(workdir)["step"] == at == rows(workdir)[-1][0] == len(rows(workdir))
        )
        assert (
            caplog.messages[-1]
            == f"SIGTERM: step {at} is saved; stopping after this batch of the evaluation"
        )
    # then all of it, and of the final evaluation, 2 x 3 batches, which may be asked twice for their
    # time, some
    asked = stopped(6)
    folder = workdir / "eval" / f"{small_run.OPSD:06d}-none"
    kept = len((folder / "answers.jsonl").read_text().splitlines()) - 1
    assert asked == 7 and 1 <= kept <= 3 and checkpoint.metadata(workdir)["step"] == small_run.OPSD
    assert not list(workdir.glob("eval/*/summary.json")) or kept == 3
    with monkeypatch.context() as patched:
        again = signal_at(patched, None)
        train.train(config, str(workdir))
    assert 6 - kept <= len(again) < 12
    assert rows(workdir) == rows(whole) and final(workdir) == final(whole)
    assert not (workdir / "metrics.jsonl.superseded").exists()


@pytest.mark.slow
def test_answers_under_other_settings_are_asked_again(straight, tmp_path, monkeypatch, caplog):
    """eval.batch_size may change between two starts."""
    workdir = tmp_path / "w"
    less = dict(eval__kl=False, eval__final_visual_thoughts=("none",), eval__final_banned=False)
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "eval")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        signal_at(patched, 1)
        train.train(small_run.config(**less), str(workdir))
    train.train(small_run.config(eval__batch_size=4, **less), str(workdir))
    assert (
        "asking all again" in caplog.text and "begun with another batch_size, rows" in caplog.text
    )
    for path in (workdir / "eval").glob("*/predictions.jsonl"):
        assert len(path.read_text().splitlines()) == small_run.TEST_ROWS


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, module, function, arguments",
    [
        (eval_command, inference, "timed", ["--visual_thoughts=none,real", "--name=x"]),
        (diagnose, kl, "_batch", ["kl", "--rows=0", "--completions=data"]),
    ],
    ids=["eval", "diagnose"],
)
def test_commands_stop_between_batches(
    straight, tmp_path, monkeypatch, capsys, command, module, function, arguments
):
    workdir = tmp_path / "w"
    shutil.copytree(straight, workdir)

    def run():
        return command.main([*arguments, f"--workdir={workdir}"])

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as error:
        batches = signal_at(patched, 1, module, function)
        run()
    assert error.value.code == distributed.EXIT_STOPPED and len(batches) == 2
    assert "stopped as asked; the same command" in capsys.readouterr().err
    assert not list((workdir / "diagnose").rglob("*.json")) if command is diagnose else True
    run()


@pytest.mark.slow
def test_other_settings_are_refused_with_the_difference(straight, tmp_path):
    with pytest.raises(config_check.ConfigMismatchError) as error:
        train.train(small_run.config(opsd__jsd_weight=2.0, divergence__beta=0.0), str(straight))
    for part in ("divergence.beta", "0.5", "0.0", "opsd.jsd_weight", "2.0", "--workdir"):
        assert part in str(error.value)
    assert "warmup" not in str(error.value).split("May change on resume")[0]
    # ... but what cannot change the result may change, and a run that failed before its first step
    # is no run.
    train.train(small_run.config(data__threads=2, log__every=5), str(straight))
    (tmp_path / "config.json").write_text((straight / "config.json").read_text())
    workdir_lib.write_record(str(tmp_path), config_lib.to_json(small_run.config(opsd__steps=7)))
    assert json.loads((tmp_path / "config.json").read_text())["opsd"]["steps"] == 7


@pytest.mark.slow
def test_a_run_that_took_no_step_starts_anew_with_other_settings(tmp_path, monkeypatch):
    """Its initial weights are saved, and then its first batch does not fit."""
    # Examples that are too long are found before the weights are saved, unless nobody looks.
    monkeypatch.setattr(sizes, "check_training", lambda *_: None)
    start, buckets = tmp_path / "w" / "checkpoints" / "0", small_run.config().data.buckets
    ((positions, patches),) = buckets.teacher

    def fail(kind=context.TooLongError, **changes):
        """Returns when the checkpoint of the start was written, and the settings in it."""
        config = small_run.config(
            stages=("opsd",), eval__final_split="", data__dir=data_dir, **changes
        )
        with pytest.raises(kind):
            train.train(config, str(tmp_path / "w"))
        record = json.loads((tmp_path / "w" / "config.json").read_text())
        assert checkpoint.metadata(start)["config"] == record
        assert {*checkpoint.contents(start)} == {"params"}
        return start.stat().st_mtime_ns, record["opsd"]["optim"]["lr"]

    small_run.make_data(small_run.config(), tmp_path)
    data_dir = str(tmp_path / "data")
    too_small = {"data__buckets__teacher": ((positions - 30, patches),)}
    first = fail(**too_small, opsd__optim__lr=0.5)
    assert first[1] == 0.5
    assert fail(**too_small, opsd__optim__lr=0.5) == first  # nothing differs: it goes on
    second = fail(**too_small, opsd__optim__lr=0.25)
    assert second[1] == 0.25 and second[0] > first[0]
    swap_two_tokens(tmp_path / "data" / "made" / "tokenizer")
    third = fail(**too_small, opsd__optim__lr=0.25)
    assert third[0] > second[0]
    mismatch = config_check.ConfigMismatchError
    for of in (tmp_path / "w", tmp_path / "w" / "arms" / "noise"):  # a step that was logged
        of.mkdir(parents=True, exist_ok=True)
        (of / "metrics.jsonl").write_text('{"step": 1}\n')
        assert fail(mismatch, **too_small, opsd__optim__lr=0.1) == third
        (of / "metrics.jsonl").unlink()
    later = tmp_path / "w" / "checkpoints" / "3"  # a step that was saved and not yet logged
    record = checkpoint.metadata(start)["config"]
    checkpoint.save(later, None, {"a": np.zeros(3, np.float32)}, step=3, config=record)
    assert fail(mismatch, **too_small, opsd__optim__lr=0.1) == third


def swap_two_tokens(folder):
    """Another tokenizer of the same size: two of its tokens have each other's ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_other_data_or_another_tokenizer_in_the_same_place(straight, tmp_path):
    workdir, other = tmp_path / "w", small_run.config(data__make__seed=5)
    shutil.copytree(straight, workdir)
    small_run.make_data(other, tmp_path / "other")
    shutil.rmtree(workdir / "data")
    shutil.copytree(tmp_path / "other" / "data", workdir / "data")
    shutil.copy(straight / "data" / "made.json", workdir / "data")
    rows = (workdir / "metrics.jsonl").read_text()
    with pytest.raises(
        config_check.ConfigMismatchError,
        match=rf"another content of data .digests.:(.|\n)*data.{small_run.TASK} ",
    ):
        train.train(small_run.config(), str(workdir))
    swap_two_tokens(workdir / "data" / "made" / "tokenizer")
    with pytest.raises(config_check.ConfigMismatchError, match="another content of tokenizer"):
        train.train(small_run.config(checkpoint__accept_changed=("data",)), str(workdir))
    with pytest.raises(
        config_check.ConfigMismatchError,
        match=f"{straight} was trained with another content of tokenizer",
    ):
        train.train(
            small_run.config(init_from=str(straight), data__dir=str(workdir / "data")),
            str(tmp_path / "new"),
        )
    assert (workdir / "metrics.jsonl").read_text() == rows and not (
        tmp_path / "new" / "metrics.jsonl"
    ).exists()
    train.train(small_run.config(checkpoint__accept_changed=("data", "tokenizer")), str(workdir))


@pytest.mark.slow
def test_a_moved_run_and_its_arm_go_on(straight, tmp_path, monkeypatch):
    """Also with data and tokenizer in another place, if they are the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(straight, first)
    train.train(*controls.settings_of(small_run.config(), str(first), "noise"), data_workdir=first)
    before = losses(first / "arms" / "noise")
    shutil.move(first, second)
    shutil.move(second / "data", tmp_path / "data")
    shutil.rmtree(second / "arms" / "noise" / "checkpoints" / str(small_run.OPSD))
    shutil.rmtree(second / "checkpoints" / str(small_run.LAST))
    monkeypatch.chdir(tmp_path)
    moved = small_run.config(data__dir="data", tokenizer="data/made/tokenizer")
    train.train(moved, "second")
    assert_same_run(second, straight)
    train.train(*controls.settings_of(moved, "second", "noise"), data_workdir="second")
    arm = second / "arms" / "noise"
    assert losses(arm) == before and len(before) == small_run.OPSD
    for folder, start in ((second, ""), (arm, f"second/checkpoints/{small_run.WARMUP}")):
        record = json.loads((folder / "config.json").read_text())
        assert (record["data"]["dir"], record["init_from"]) == ("data", start)

    other = small_run.config(data__make__seed=5)
    small_run.make_data(other, tmp_path / "other")
    shutil.copy(tmp_path / "data" / "made.json", tmp_path / "other" / "data")
    elsewhere = small_run.config(data__dir="other/data", tokenizer="data/made/tokenizer")
    for config, workdir in (
        (elsewhere, "second"),
        controls.settings_of(elsewhere, "second", "swap"),  # it has not begun
    ):
        with pytest.raises(config_check.ConfigMismatchError, match="another content of data"):
            train.train(config, workdir, data_workdir="second")
    assert json.loads((second / "config.json").read_text())["data"]["dir"] == "data"


@pytest.mark.parametrize(
    "content",
    ["", '{"seed": ', "\0" * 50, "[]", '{"model": 3}', '{"seed": "x"}', '{"data": {"tasks": 3}}'],
)
def test_a_damaged_record_of_the_settings_names_the_file_and_the_fix(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        ValueError,
        match=f"{tmp_path}/config.json.*delete the file and give the run's training command",
    ):
        workdir_lib.load_config(str(tmp_path))
    if not content.startswith('{"'):
        with pytest.raises(
            ValueError,
            match=f"{tmp_path}/config.json.*delete the file and give the run's training command",
        ):
            workdir_lib.write_record(str(tmp_path), config_lib.to_json(small_run.config()))
    (tmp_path / "config.json").unlink()
    workdir_lib.write_record(str(tmp_path), config_lib.to_json(small_run.config()))
    assert workdir_lib.load_config(str(tmp_path)).opsd.steps == small_run.OPSD


@pytest.mark.parametrize(
    "content, said",
    [
        ({"opsd": {"steps": "abc"}}, "config.opsd.steps is 'abc': give a whole number in"),
        ({"seed": None}, "config.seed is None: give a whole number in"),
    ],
)
def test_a_wrong_value_in_the_record_is_named(tmp_path, content, said):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: {said}"):
        workdir_lib.load_config(str(tmp_path))


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    older = config_lib.to_json(small_run.config())
    del older["model"]["rope_bfloat16"], older["arms"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    workdir_lib.write_record(str(tmp_path), config_lib.to_json(small_run.config()))
    with pytest.raises(config_check.ConfigMismatchError, match=r"model.rope_bfloat16 +false +true"):
        workdir_lib.write_record(
            str(tmp_path), config_lib.to_json(small_run.config(model__rope_bfloat16=True))
        )


@pytest.mark.slow
def test_final_parameters_are_returned(straight):
    params = train.train(small_run.config(), str(straight))
    kept = checkpoint.restore_params(straight, params)
    for path, leaf in params_lib.flatten(kept).items():
        np.testing.assert_array_equal(leaf, params_lib.flatten(params)[path], err_msg=path)
