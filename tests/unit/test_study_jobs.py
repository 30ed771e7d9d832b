"""opsd_jax.study without a trainer: the grid, the commands (stand-ins), the table by hand."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib

import pytest
from ml_collections import ConfigDict

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, config_flags
from opsd_jax.evaluation import charts
from opsd_jax.runtime import distributed, files, run_folder
from opsd_jax.runtime.stopping import Stopped, StopRequest
from opsd_jax.study import __main__ as command_line
from opsd_jax.study import grid, jobs, page, scores, slots, table

PATH = small_run.ROOT / "configs" / "study.py"
PRESETS = "content traces wrong length loss teacher policy privileged transfer".split()
ARMS = ("opsd", "noise", "sft")


def given(**changes) -> ConfigDict:
    """The settings of a study of the small run, without the evaluations that tests do not read."""
    c = grid.default()
    c.base = f"{small_run.MINI}:smoke"
    c.changes = {
        "warmup": {"steps": 2, "optim": {"warmup_steps": 1}},
        "opsd": {"steps": 4, "optim": {"warmup_steps": 1}},
        "sft": {"steps": 3, "optim": {"warmup_steps": 1}},
        "eval": {"kl": False},
    }
    c.seeds = (0, 1)
    c.arms.noise = {"teacher": {"visual_thoughts": "noise"}}
    c.arms.sft = {"stages": ("sft",)}
    if "groups" in changes:
        c.groups = changes["groups"]
    c.update(changes)
    return c


def prediction(n: int, hit: bool) -> dict:
    return {
        "benchmark": small_run.TASK,
        "index": n,
        "pid": f"p{n}",
        "expected": "7",
        "answer": "7" if hit else "8",
        "prediction": "<answer>7</answer>" if hit else "<answer>8</answer>",
        "hit": hit,
        "tokens": 5,
    }


def write_results(folder, step: int, mode: str, hits: str) -> None:
    """An evaluation; hits: "1" or "0" for each question."""
    found = [prediction(n, hit == "1") for n, hit in enumerate(hits)]
    path = pathlib.Path(run_folder.evaluation(folder, run_folder.evaluation_name(step, mode)))
    lines = "".join(json.dumps(p) + "\n" for p in found)
    files.write(path / run_folder.PREDICTIONS, lines)
    score = {
        "overall": sum(p["hit"] for p in found) / len(found),
        "unit": "fraction",
        "n": len(found),
        "interval_95": [0.0, 1.0],
        "mean_output_tokens": 5.0,
        "seconds_per_sample": 0.1,
    }
    facts = {"seed": 0, "checkpoint": "", "protocol": "paper", "split": "test"}
    files.write_json(path / run_folder.SUMMARY, facts | {"benchmarks": {small_run.TASK: score}})


def finish(job: grid.Job, hits: str = "1100", real: str = "1111") -> None:
    write_results(job.workdir, job.last, "none", hits)
    write_results(job.workdir, job.last, "real", real)


class Commands:
    """A command in place of the trainer: each one copies the results of a finished job.

    codes: {name of a job: exit code}, of those that fail instead.
    """

    def __init__(self, tmp_path, codes=None):
        self.folder, self.codes, self.started = tmp_path / "prepared", codes or {}, []

    def __call__(self, job: grid.Job) -> list[str]:
        self.started.append(job.name)
        if job.name in self.codes:
            return ["sh", "-c", f"echo first; echo error: {job.name}; exit {self.codes[job.name]}"]
        prepared = self.folder / job.name.replace(" ", "-")
        number = zlib.crc32(job.name.encode()) % 16  # other answers for each job
        for mode, hits in (("none", f"{number:04b}"), ("real", "1111")):
            write_results(prepared, job.last, mode, hits)
        start = run_folder.checkpoint(job.run, 2)
        words = ["cp", "-r", f"{prepared}/eval", job.workdir]
        return ["sh", "-c", f"{shlex.join(words)} && mkdir -p {start}"]


def run(study, commands, count=2):
    return jobs.run(study, [slots.Slot()] * count, StopRequest(), command=commands, look=0.01)


# --- the grid ------------------------------------------------------------------------------------


def test_jobs_are_ordinary_runs_and_their_arms(tmp_path):
    c = given(groups={"all": {}, "long": {"warmup": {"steps": 5}}}, arms_of={"long": ("sft",)})
    study = grid.read(c, str(tmp_path), ["--config.opsd.batch_size=16"])
    names = [f"all seed {s}{arm}" for s in (0, 1) for arm in ("", " noise", " sft")]
    names += [f"long seed {s}{arm}" for s in (0, 1) for arm in ("", " sft")]
    assert [job.name for job in study.jobs] == names
    run, noise, sft = study.jobs[3:6]
    assert run.workdir == f"{tmp_path}/runs/all/seed1" and run.config.seed == 1
    assert (run.last, run.start, noise.last, sft.last) == (6, 2, 4, 3)
    assert (study.jobs[-1].config.init_from, study.jobs[-1].last) == (
        f"{tmp_path}/runs/long/seed1/checkpoints/5",
        3,
    )
    words = [sys.executable, "-m", "opsd_jax.train", f"--config={run.workdir}.json"]
    assert run.command() == [*words, f"--workdir={run.workdir}"]
    assert noise.command() == [*words, f"--workdir={run.workdir}", "--arm=noise"]
    assert noise.workdir == f"{run.workdir}/arms/noise"
    assert {job.config.opsd.batch_size for job in study.jobs} == {16}
    # The file is what the command reads: the same settings, and the arms of the group alone.
    grid.write_settings(study)
    found = config_flags.read([f"--config={run.workdir}.json"])
    assert found.to_dict() == run.config.to_dict()
    assert sorted(found.arms) == ["noise", "sft"] and found.run_arms == ()
    as_arm = config_lib.arm(found, "noise", noise.config.init_from)
    assert as_arm.to_dict() == noise.config.to_dict()


def test_command_line_then_group_count_more_than_changes(tmp_path):
    c = given(groups={"a": {}, "b": {"opsd": {"steps": 9}}})
    a, b = (grid.read(c, str(tmp_path), ["--config.opsd.steps=7"]).jobs[n] for n in (0, 6))
    assert (a.config.opsd.steps, b.config.opsd.steps, b.config.warmup.steps) == (7, 9, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": ()}, "config.seeds is empty"),
        ({"seeds": (0, 0)}, "config.seeds names 0 twice"),
        ({"seeds": (-1,)}, "config.seeds is -1"),
        ({"base": ""}, "config.base is empty"),
        ({"parallel": -1}, "config.parallel is -1"),
        ({"reference": "swap"}, "config.reference, of group all, is 'swap'"),
        ({"arms": {"opsd": {}}}, "config.arms.opsd: that is the name of the run's own"),
        ({"arms": {"a/b": {}}}, "config.arms.a/b: give one folder name"),
        ({"arms_of": {"other": ()}}, "config.arms_of is 'other'"),
        ({"arms_of": {"all": ("nose",)}}, "config.arms_of.all"),
        ({"base_of": {"other": "x"}}, "config.base_of is 'other'"),
        ({"groups": {"x": {"opsd": {"stepz": 1}}}}, "group x: config.opsd.stepz: there is no"),
        ({"groups": {"x": {"opsd": {"steps": "y"}}}}, "group x: "),
        ({"groups": {"x": {"stages": ("warmup",)}}}, "group x: config.stages is"),
        ({"groups": {"x": {"eval": {"final_split": ""}}}}, "group x: config.eval.final_split is"),
        ({"arms": {"y": {"opsd": {"batch_size": -1}}}}, "config.arms.y.opsd.batch_size is -1"),
        ({"arms": {"y": {"eval": {"final_split": "train"}}}}, "arm y changes eval.final_split"),
        ({"further": 1}, "config.further: a study has no such setting"),
        ({"questions": {"Q": {"x": ()}}}, "config.questions['Q'] is 'x'"),
        ({"questions": {"Q": {"all": ("x",)}}}, "config.questions['Q']['all'] names 'x'"),
        ({"questions": {"Q": ()}}, "config.questions['Q'] is ()"),
    ],
)
def test_wrong_settings_are_named(changes, message, tmp_path):
    c = given()
    with c.unlocked():
        c.update(changes)
    with pytest.raises(ValueError) as error:
        grid.read(c, str(tmp_path))
    assert message in str(error.value)
    assert not os.listdir(tmp_path)


def test_a_run_that_exists_keeps_its_settings(tmp_path):
    """Other settings of a run or an arm are refused; further seeds, groups and arms are not."""
    study = grid.read(given(), str(tmp_path))
    for job in study.jobs[:2]:
        files.write_json(run_folder.config(job.workdir), config_lib.to_json(job.config))
        files.write(run_folder.metrics(job.workdir), '{"step": 1}\n')
    more = given(seeds=(0, 1, 2), groups={"all": {}, "new": {}}, arms={"swap": {}})
    more.changes.log = {"every": 3}  # may change in a continued run
    grid.read(more, str(tmp_path))
    other = given(arms={"noise": {"opsd": {"steps": 3}}})
    with pytest.raises(config_check.ConfigMismatchError, match="arms/noise exists, but .*"):
        grid.read(other, str(tmp_path))
    with pytest.raises(config_check.ConfigMismatchError, match="seed0 exists, but .*"):
        grid.read(given(changes={"warmup": {"steps": 3}}), str(tmp_path))


def test_groups_and_arms_keep_their_order(tmp_path):
    c = grid.default()
    c.base = f"{small_run.MINI}:smoke"
    c.groups = {"b": {}, "a": {}}
    c.arms = {"sft": {"stages": ("sft",)}}
    c.arms.noise = {"teacher": {"visual_thoughts": "noise"}}
    c.arms.image = {"teacher": {"visual_thoughts": "image"}}
    study = grid.read(c, str(tmp_path))
    assert study.groups == ("b", "a") and study.arms("a") == ("opsd", "sft", "noise", "image")
    c.questions = {"Z": {"a": ("noise",), "b": ("image", "sft")}, "A": {"a": ()}}
    first, second = grid.read(c, str(tmp_path)).questions
    assert (first.title, second.title) == ("Z", "A")
    assert [*first.arms.items()] == [("b", ("opsd", "image", "sft")), ("a", ("opsd", "noise"))]
    assert second.arms == {"a": ("opsd",)}


def preset(name, folder):
    return grid.read(config_flags.read([f"--config={PATH}:{name}"]), str(folder))


def test_presets_are_valid_and_share_their_runs(tmp_path):
    """A run or an arm has the same settings in every preset, so that they may share a folder."""
    studies = {name: preset(name, tmp_path) for name in (*PRESETS, "all", "smoke")}
    jobs_of_all = {job.name: job for job in studies["all"].jobs}
    for name in PRESETS:
        for job in studies[name].jobs:
            found, known = (config_lib.to_json(j.config) for j in (job, jobs_of_all[job.name]))
            assert found | {"arms": {}} == known | {"arms": {}}
    for study in studies.values():
        for job in study.jobs:
            assert job.is_run or job.config != study.run_of(job).config
    of_all = studies["all"].questions
    assert [q for name in PRESETS for q in studies[name].questions] == [*of_all]
    asked = {(group, arm) for q in of_all for group, arms in q.arms.items() for arm in arms}
    assert asked == {(job.group, job.arm) for job in jobs_of_all.values()}


def test_a_preset_of_some_groups(tmp_path):
    maze = preset("content,traces,maze", tmp_path)
    assert maze.groups == ("maze",)
    assert maze.arms("maze") == ("opsd", "image", "swap", "noise", "none", "sft")
    charts = ("chart-100", "chart-500", "chart-2000", "chart")
    assert preset("traces,charts", tmp_path).groups == charts
    assert preset("traces,mazes", tmp_path).groups == ("maze-2000", "maze")
    own = config_flags.read([f"--config={PATH}:content,own"])
    own.base = f"{small_run.MINI}:smoke"
    (run,) = (job for job in grid.read(own, str(tmp_path)).jobs if job.is_run and job.seed == 0)
    assert run.config.opsd.steps == 20 and run.config.health.teacher_floor == 0.5
    with pytest.raises(SystemExit, match="'chess' is no question and no group: choose from"):
        preset("content,chess", tmp_path)
    with pytest.raises(SystemExit, match="none of these questions has the groups both"):
        preset("content,both", tmp_path)


def test_transfer_trains_on_one_task_and_asks_both(tmp_path):
    study = preset("transfer", tmp_path)
    weights = {job.arm: job.config.data.weights for job in study.jobs}
    assert weights == {"opsd": (), "only-charts": (1.0, 0.0), "only-mazes": (0.0, 1.0)}
    assert {job.config.data.tasks for job in study.jobs} == {
        ("Chart_Refocus", "Spatial_Navigation")
    }


def test_a_setting_of_a_run_is_no_setting_of_a_study(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.main(
            [f"--config={PATH}:smoke", f"--workdir={tmp_path}", "--config.opsd.steps=3"]
        )
    assert "is changed by --config.changes.opsd.steps=VALUE" in capsys.readouterr().err


def test_a_misspelt_setting_of_a_study_is_named_with_the_one_that_is_meant(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.main([f"--config={PATH}:smoke", f"--workdir={tmp_path}", "--config.seds=3"])
    assert "config.seds=3: a study has no such" in (said := capsys.readouterr().err)
    assert said.strip().endswith("; did you mean 'seeds'?")


def test_help_names_all_presets(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    named = " ".join(capsys.readouterr().out.split())
    assert f"presets: {', '.join([*PRESETS, 'all', 'smoke'])}" in named


def test_a_list_of_commands_writes_nothing(tmp_path, capsys):
    command = [f"--config={PATH}:smoke", f"--workdir={tmp_path / 'S'}"]
    command_line.main([*command, "--list"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(preset("smoke", tmp_path).jobs) > 1
    assert "with --table first, then with --list again" in said.err
    assert not (tmp_path / "S").exists()
    command_line.main([*command, "--table"])
    written = [line.split("--config=")[1].split()[0] for line in said.out.splitlines()]
    assert all(pathlib.Path(path).is_file() for path in written)
    capsys.readouterr()
    command_line.main([*command, "--list"])
    assert capsys.readouterr() == (said.out, "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--list", "--table"], "--list with --table: give one of them"),
        ([], "run is the folder of a run: give the study another one"),
        ([f"--config={small_run.MINI}:smoke"], "--config names a file of a run's settings"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path, capsys, arguments, message):
    files.write_json(tmp_path / "run" / "config.json", {})
    with pytest.raises(SystemExit) as ended:
        command_line.main([f"--config={PATH}:smoke", f"--workdir={tmp_path / 'run'}", *arguments])
    assert message in f"{ended.value}{capsys.readouterr().err}"
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_one_of_several_processes_is_refused(tmp_path, capsys, monkeypatch):
    """On two hosts two studies would write one folder; nobody sets a variable on Slurm and GKE."""
    arguments = [f"--config={PATH}:smoke", f"--workdir={tmp_path / 'S'}"]
    monkeypatch.delenv("OPSD_NUM_PROCESSES", raising=False)
    monkeypatch.setattr(distributed, "cluster_size", lambda: 4)
    for given, count in ((None, 4), ("2", 2)):
        if given:
            monkeypatch.setenv("OPSD_NUM_PROCESSES", given)
        with pytest.raises(SystemExit) as ended:
            command_line.main(arguments)
        said = f"{ended.value}{capsys.readouterr().err}"
        assert f"and this is one of {count} processes" in said
    assert not (tmp_path / "S").exists()


def test_few_questions_are_cautioned():
    def rows(*counts):
        return [{"difference": None}, *({"difference": {"rows": count}} for count in counts)]

    assert table.caution(rows(512, 20)) == [
        "These numbers mean little: they are of 20 test examples."
    ]
    assert table.caution(rows(512, [512, 150]))[0].endswith("of 150 test examples.")
    assert table.caution(rows(512, 200)) == table.caution(rows()) == []


# --- slots ---------------------------------------------------------------------------------------


def test_cores_are_divided():
    assert [slot.cores for slot in slots.of_cores(0, [4, 5, 7])] == [(4,), (5,), (7,)]
    assert [slot.cores for slot in slots.of_cores(2, [4, 5, 7])] == [(4, 7), (5,)]
    assert [slot.cores for slot in slots.of_cores(3, [4, 5])] == [()] * 3
    assert [slot.cores for slot in slots.of_cores(0, [None, None])] == [()] * 2


def test_devices_are_divided(monkeypatch):
    def visible(*arguments):
        found = slots.of_devices(*arguments)
        return [slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in found]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(0, "gpu", 4, 4) == [None]
    assert visible(0, "gpu", 4, 2) == ["0,1", "2,3"]
    assert visible(4, "gpu", 4, 4) == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible(2, "gpu", 2, 2) == ["3", "5"]
    assert visible(0, "tpu", 4, 1) == [None]
    with pytest.raises(ValueError, match="config.parallel is 2, but on tpu one job"):
        slots.of_devices(2, "tpu", 4, 1)
    with pytest.raises(ValueError, match="config.parallel is 5 with 4 devices"):
        slots.of_devices(5, "gpu", 4, 1)


# --- commands ------------------------------------------------------------------------------------


def test_all_jobs_run_and_finished_ones_never_again(tmp_path, capsys):
    study = grid.read(given(), str(tmp_path / "S"))
    finish(study.jobs[0])
    commands = Commands(tmp_path)
    assert run(study, commands) == {}
    assert sorted(commands.started) == sorted(job.name for job in study.jobs[1:])
    runs = [name for name in commands.started if not name.endswith(("noise", "sft"))]
    assert commands.started.index(runs[0]) < commands.started.index("all seed 1 noise")
    assert all(job.is_done() for job in study.jobs) and not any(jobs.left(study))
    told = capsys.readouterr().err
    assert "all seed 1 sft: finished in 0.0 min" in told and "6 of 6 jobs done" in told
    again = Commands(tmp_path)
    assert run(study, again) == {} and again.started == []


def test_a_study_that_was_killed_gives_the_same_table(tmp_path):
    """Killed with one job done and one whose evaluation is half written."""
    whole, killed = (grid.read(given(), str(tmp_path / name)) for name in "ab")
    assert run(whole, Commands(tmp_path / "of-a")) == {}

    class Stop(StopRequest):
        def reached(self):
            return any(job.is_done() for job in killed.jobs) and len(first.started) > 1

    class Slow(Commands):
        def __call__(self, job):
            found = super().__call__(job)
            return found if len(self.started) == 1 else ["sleep", "60"]

    first = Slow(tmp_path / "of-b")
    with pytest.raises(Stopped):
        jobs.run(killed, [slots.Slot()], Stop(), command=first, look=0.01)
    half = next(job for job in killed.jobs if not job.is_done())
    write_results(half.workdir, half.last, "none", "1111")
    folder = pathlib.Path(run_folder.evaluation(half.workdir, f"{half.last:06d}-none"))
    (folder / run_folder.SUMMARY).unlink()
    found = scores.rows(killed, scores.read(killed), {})
    assert [row["accuracy"] is None for row in found] == [False, True, True]

    again = Commands(tmp_path / "of-b")
    assert run(killed, again) == {}
    assert len(again.started) == len(killed.jobs) - 1
    tables = []
    for study in (whole, killed):
        table.write(study, scores.rows(study, scores.read(study), {}), {})
        folder = pathlib.Path(study.workdir)
        tables.append([(folder / name).read_bytes() for name in ("study.json", "study.md")])
    assert tables[0] == tables[1]
    assert len({row["accuracy"] for row in json.loads(tables[0][0])["rows"]}) > 1


def test_runs_with_the_same_procedural_data_share_them(tmp_path):
    groups = {"a": {}, "b": {"data": {"limits": (3,)}}, "c": {"data": {"make": {"seed": 1}}}}
    groups["d"] = {"data": {"dir": str(tmp_path)}}
    study = grid.read(given(groups=groups, arms_of=dict.fromkeys("abcd", ())), str(tmp_path / "S"))
    own = pathlib.Path(run_folder.data(study.jobs[1].workdir))  # of an earlier command
    own.mkdir(parents=True)
    assert run(study, Commands(tmp_path)) == {}
    places = {job.name: pathlib.Path(run_folder.data(job.workdir)) for job in study.jobs}
    shared = places["a seed 0"].resolve()
    assert shared.parent == tmp_path / "S" / "data" and os.readlink(places["a seed 0"])[0] == "."
    assert places["b seed 0"].resolve() == places["b seed 1"].resolve() == shared
    assert places["c seed 0"].resolve() == places["c seed 1"].resolve() != shared
    assert places["a seed 1"].resolve() == own and not places["d seed 0"].exists()


def test_a_failed_job_is_named_and_the_others_go_on(tmp_path, capsys):
    study = grid.read(given(), str(tmp_path / "S"))
    failed = run(study, Commands(tmp_path, {"all seed 0": 3, "all seed 1 sft": 1}))
    logs = [study.jobs[n].log for n in (0, 5)]
    of_run = f"failed (exit code 3), see {logs[0]}"
    assert failed == {
        "all seed 0": of_run,
        "all seed 0 noise": f"not started: all seed 0 {of_run}",
        "all seed 0 sft": f"not started: all seed 0 {of_run}",
        "all seed 1 sft": f"failed (exit code 1), see {logs[1]}",
    }
    assert f"{of_run}: error: all seed 0\n" in capsys.readouterr().err  # the last line of the log
    assert pathlib.Path(logs[0]).read_text() == "first\nerror: all seed 0\n"
    found = scores.rows(study, scores.read(study), failed)
    status = {row["arm"]: row["status"] for row in found}
    assert status["opsd"] == f"seed 0 {of_run}"
    assert status["sft"].endswith(f"; seed 1 failed (exit code 1), see {logs[1]}")
    assert f"all sft: {status['sft']}" in table.in_terminal(study, found)
    assert [[*row["seeds"]] for row in found if row["arm"] == "noise"] == [[1]]

    # An arm starts although its run failed, if that was warmed up.
    os.makedirs(run_folder.checkpoint(study.jobs[0].run, 2))
    again = Commands(tmp_path, {"all seed 0": 3})
    assert set(run(study, again)) == {"all seed 0"}
    assert again.started == ["all seed 0", "all seed 1 sft", "all seed 0 noise", "all seed 0 sft"]


def test_a_command_that_ends_without_results_failed(tmp_path):
    study = grid.read(given(seeds=(0,), arms_of={"all": ()}), str(tmp_path / "S"))
    failed = run(study, lambda job: ["true"])
    assert failed["all seed 0"].startswith("failed (without a final evaluation, exit code 0)")


def test_a_stop_ends_all_commands(tmp_path):
    study, paths = grid.read(given(), str(tmp_path / "S")), []

    class Stop(StopRequest):
        def reached(self):  # when both commands run
            return len(paths) == 2 and all(p.exists() and p.read_text() for p in paths)

    def command(job):
        paths.append(tmp_path / f"pid{len(paths)}")
        return ["sh", "-c", f"echo $$ > {paths[-1]}; exec sleep 60"]

    with pytest.raises(Stopped) as stopped:
        jobs.run(study, [slots.Slot()] * 2, Stop(), command=command, look=0.05)
    assert stopped.value.code == 42
    for path in paths:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system chooses cores")
def test_a_command_has_the_cores_of_its_slot():
    code = "import os; print(*os.sched_getaffinity(0))"
    core = min(os.sched_getaffinity(0))
    words = jobs._launched([sys.executable, "-c", code], (core,))
    assert subprocess.check_output(words, text=True).split() == [str(core)]


def test_a_folder_that_is_in_use_is_waited_for(tmp_path, capsys):
    study = grid.read(given(seeds=(0,), arms_of={"all": ()}), str(tmp_path / "S"))
    (job,) = study.jobs
    os.makedirs(job.workdir)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('locked', flush=True); time.sleep(0.5)"
    )
    lock = os.path.join(job.workdir, "lock")
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert run(study, Commands(tmp_path)) == {}
    holder.wait()
    assert "all seed 0: waits for an earlier command" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_commands_stop_when_the_study_is_killed(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "from opsd_jax.study import jobs\n"
        "words = ['sh', '-c', 'echo $$ > %s; exec sleep 60' % sys.argv[1]]\n"
        "subprocess.Popen(jobs._launched(words, ()))\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(small_run.ROOT)}
    study = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    study.send_signal(signal.SIGKILL)
    study.wait()
    state = pathlib.Path(f"/proc/{int(path.read_text())}/stat")
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


# --- the table -----------------------------------------------------------------------------------


def test_rows_of_two_seeds_by_hand(tmp_path):
    """Seed 0: 3/4 and 1/4; seed 1: 2/4 and 2/4. Differences of noise: -1/2 and 0, mean -1/4."""
    study = grid.read(given(arms_of={"all": ("noise",)}), str(tmp_path / "S"))
    hits = {"all seed 0": "1110", "all seed 0 noise": "1000", "all seed 1": "1100"}
    for job in study.jobs:
        finish(job, hits.get(job.name, "0011"))
        if job.is_run:
            write_results(job.workdir, job.start, "none", "0000")
    found = scores.rows(study, scores.read(study), {})
    start, opsd, noise = found
    assert [row["arm"] for row in found] == ["start", "opsd", "noise"]
    assert opsd["seeds"] == {0: 0.75, 1: 0.5} and opsd["accuracy"] == 0.625
    assert (opsd["difference"], opsd["real"], opsd["tokens"], opsd["kl"]) == (None, 1.0, 5.0, None)
    assert noise["difference"]["mean"] == -0.25 and noise["accuracy"] == 0.375
    low, high = noise["difference"]["interval_95"]
    assert -1 <= low < -0.25 < high <= 1
    assert (noise["difference"]["seeds"], noise["difference"]["rows"]) == ([0, 1], 4)
    assert start["difference"]["mean"] == -0.625 and start["over_start"] is None
    assert (opsd["over_start"]["mean"], noise["over_start"]["mean"]) == (0.625, 0.375)
    unmeasured = {**opsd, "seeds": {}, "accuracy": None, "real": None, "tokens": None}
    unmeasured["over_start"] = None
    assert table.cells(unmeasured)[3:-1] == ["–"] * 11

    table.write(study, found, {})
    lines = (tmp_path / "S" / "study.md").read_text().splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[4].startswith(
        "| all | noise | Chart_Refocus | 37.5 | 25.0, 50.0 | \N{MINUS SIGN}25.0 | "
    )
    record = json.loads((tmp_path / "S" / "study.json").read_text())
    assert record["reference"] == "opsd" and len(record["rows"]) == 3
    assert [job["status"] for job in record["jobs"]] == ["done"] * 4
    assert record["jobs"][1]["workdir"] == "runs/all/seed0/arms/noise"
    again = scores.rows(study, scores.read(study), {})
    assert again == found  # the interval, too


def test_each_question_has_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_samples", lambda study, group: [])  # there are no data
    c = given(seeds=(0,), questions={"Noise?": {"all": ("noise",)}, "Traces?": {"all": ("sft",)}})
    study = grid.read(c, str(tmp_path / "S"))
    for job in study.jobs:
        finish(job)
        if job.is_run:
            write_results(job.workdir, job.start, "none", "0000")
    rows = scores.rows(study, scores.read(study), {})
    table.write(study, rows, {})
    lines = (tmp_path / "S" / "study.md").read_text().splitlines()
    found = [line.split(" | ")[1] if " | " in line else line for line in lines]
    head, of_all = ["arm", "|---" * len(table.header(study.words)) + "|"], ["start", "opsd"]
    assert found[:6] == ["## Noise?", "", *head, *of_all] and found[6:8] == ["noise", ""]
    assert found[8:14] == ["## Traces?", "", *head, *of_all] and found[14:16] == ["sft", ""]
    record = json.loads((tmp_path / "S" / "study.json").read_text())
    assert record["questions"]["Traces?"] == {"all": ["opsd", "sft"]} and len(record["rows"]) == 4
    html = pathlib.Path(page.write(study, scores.read(study), rows, "python -m x")).read_text()
    assert "<dt>command</dt><dd><code>python -m x</code></dd>\n<dt>made</dt><dd>20" in html
    titles = re.findall(r"<h[23] id=.*?>(.*?)</h[23]>", html)
    assert titles[:3] == ["Result", "Noise?", "Traces?"]
    bars = re.findall(r"all: (\w+) \(", html)
    assert {*bars} == {"start", "noise", "sft"}


def test_answers_that_cannot_be_compared_are_refused(tmp_path):
    study = grid.read(given(seeds=(0,), arms_of={"all": ("noise",)}), str(tmp_path / "S"))
    finish(study.jobs[0])
    finish(study.jobs[1], "110")
    with pytest.raises(ValueError, match="4 questions, of which 3 are the same|3 and 4 questions"):
        scores.rows(study, scores.read(study), {})
    path = run_folder.evaluation(study.jobs[0].workdir, run_folder.evaluation_name(6, "none"))
    record = json.loads((pathlib.Path(path) / run_folder.SUMMARY).read_text())
    files.write_json(os.path.join(path, run_folder.SUMMARY), record | {"split": "train"})
    with pytest.raises(ValueError, match="is of the split train, and the settings say test"):
        scores.read(study)


def test_curves_are_means_over_seeds(tmp_path, monkeypatch):
    """Steps count from the start of OPSD; steps that a seed lacks are left out."""
    study = grid.read(given(arms_of={"all": ("noise",)}), str(tmp_path / "S"))
    losses = {"all seed 0": [9, 9, 1, 2, 3], "all seed 1": [9, 9, 3, 4], "all seed 0 noise": [5, 6]}
    for job in study.jobs:
        records = [
            {"step": n, "stage": "opsd", "loss": loss, f"eval/{small_run.TASK}/none": 0.5}
            for n, loss in enumerate(losses.get(job.name, []), 1)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        files.write(run_folder.metrics(job.workdir), lines)
    shown = []
    monkeypatch.setattr(charts, "lines", lambda series, **kw: shown.append((series, kw)) or "")
    page._curves(study, "all")
    (accuracy, _), (loss, options) = shown
    assert loss == {"opsd": [(1, 2.0), (2, 3.0)], "noise": [(1, 5.0), (2, 6.0)]}
    assert options["thin"] == {"opsd": [[(1, 1), (2, 2), (3, 3)], [(1, 3), (2, 4)]]}
    assert accuracy["opsd"] == [(1, 50.0), (2, 50.0)]
