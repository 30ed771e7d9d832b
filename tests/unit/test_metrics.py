"""Metrics of a run: every number once, no silent loss, and a stop when the run goes wrong."""

import io
import json
import math
import pathlib
import re
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from opsd_jax.evaluation import statistics
from opsd_jax.runtime import clock as clock_lib
from opsd_jax.runtime import metrics
from opsd_jax.runtime.clock import Clock, CompileGuard, TooManyCompilesError, compilations
from opsd_jax.runtime.health import Health, UnhealthyRunError
from opsd_jax.runtime.metrics import Means, Writer
from opsd_jax.runtime.progress import Progress
from opsd_jax.runtime.terminal_bars import Bars

# ---------------------------------------------------------------------------- numbers


def test_wilson():
    low, high = statistics.wilson(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)  # published values
    low, high = statistics.wilson(1, 10)
    assert (round(low, 4), round(high, 4)) == (0.0179, 0.4042)
    assert (
        statistics.wilson(0, 20)[0] == 0
        and statistics.wilson(20, 20)[1] == 1
        and statistics.wilson(0, 0) == (0, 1)
    )
    with pytest.raises(ValueError, match="7 successes of 5"):
        statistics.wilson(7, 5)


def test_statistics_equal_their_formulas():
    """Wilson's interval in closed form, and the exact tail of a fair coin."""
    z = 1.959963984540054
    for n in (1, 2, 7, 50, 512):
        for k in range(n + 1):
            p = k / n
            centre = p + z * z / (2 * n)
            half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
            limits = [(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
            np.testing.assert_allclose(statistics.wilson(k, n), limits, rtol=0, atol=1e-12)
            tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1))
            assert statistics.mcnemar(k, n - k) == pytest.approx(
                min(1.0, 2 * tail / 2**n), rel=0, abs=1e-12
            )
    assert statistics.mcnemar(0, 0) == 1.0


def test_wilson_of_a_mean():
    assert statistics.wilson_of_mean([(7, 9)]) == statistics.wilson(7, 9)
    low, high = statistics.wilson_of_mean([(19, 19), (0, 1)])
    assert low <= 0.5 <= high and high - low > 0.3  # one row of the second says little
    # of equal parts the distances shrink by the square root of their number, not by their number
    alone, three = statistics.wilson(50, 100), statistics.wilson_of_mean([(50, 100)] * 3)
    assert (0.5 - three[0]) == pytest.approx((0.5 - alone[0]) / 3**0.5)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found = statistics.wilson_of_mean(
            [(int(rng.binomial(n, p)), n) for n, p in ((40, 0.9), (15, 0.3))]
        )
        inside += found[0] <= 0.6 <= found[1]
    assert 0.93 < inside / 2000 < 0.975


def test_means_weigh_by_count_and_wait_for_nothing():
    reads = []

    class OnDevice:
        """Stands for a device array: reading it is what would make the host wait."""

        def __init__(self, value):
            self.value = value

        def __array__(self, dtype=None, copy=None):
            reads.append(self.value)
            return np.asarray(self.value, dtype)

    means = Means()
    means.add({"loss": (OnDevice(2.0), OnDevice(1)), "len": (jnp.int32(10), jnp.int32(2))})
    means.add({"loss": (OnDevice(2.0), OnDevice(3)), "eos": (0, 0)})
    assert reads == []
    taken = means.take()
    assert (
        taken["loss"] == 1.0 and taken["len"] == 5.0 and np.isnan(taken["eos"]) and len(reads) == 4
    )
    assert means.take() == {}
    for _ in range(3):  # float32 would stop counting at 2**24
        means.add({"n": (np.float32(2**24), 1), "m": (np.float32(1), 1)})
    means.add({"n": (np.float32(1), 0)})
    assert means.take()["n"] == (3 * 2**24 + 1) / 3
    with pytest.raises(ValueError, match="'loss' must be a tuple"):
        means.add({"loss": 1.0})


# ---------------------------------------------------------------------------- files


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_writer_writes_strict_json_lines(tmp_path):
    with Writer(tmp_path, tensorboard=False) as writer:
        values = {
            "loss": jnp.float32(0.5),
            "n": np.int64(2**40),
            "lr": jnp.bfloat16(0.25),
            "on": True,
        }
        writer.scalars(1, "opsd", values)
        assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5  # already on disk
        writer.scalars(2, "opsd", {"loss": float("nan"), "ok": [1.0], "norm": np.float32("inf")})
        for value in ("text", None, np.ones(2)):
            with pytest.raises(TypeError, match="metric 'x' is not a number"):
                writer.scalars(3, "opsd", {"x": value})
        with pytest.raises(ValueError, match="'time'"):
            writer.scalars(3, "opsd", {"time": 1.0})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert (
        list(first)[:3] == ["step", "time", "stage"]
        and first["time"] > 1.7e9
        and first["stage"] == "opsd"
    )
    assert (
        first["n"] == 2**40
        and first["lr"] == 0.25
        and first["on"] == 1
        and "nonfinite" not in first
    )
    assert second["loss"] is None and second["norm"] is None and second["ok"] == 1.0
    assert second["nonfinite"] == ["loss", "norm"]
    assert metrics.read(tmp_path / "metrics.jsonl") == [first, second]
    with pytest.raises(ValueError, match="mount the bucket"):
        Writer("gs://bucket/run")


def test_resume_moves_what_will_be_done_again(tmp_path, caplog):
    path, old = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.superseded"

    def run(steps, loss, resume_step=None):
        with Writer(tmp_path, tensorboard=False, resume_step=resume_step) as writer:
            for step in steps:
                writer.scalars(step, "opsd", {"loss": loss})

    run(range(1, 8), 1.0, resume_step=1)
    with open(path, "a") as file:
        file.write('{"step": 8, "time": 17')  # killed while writing
    run(range(5, 7), 2.0, resume_step=5)
    rows = [(row["step"], row["loss"]) for row in lines(path)]
    assert rows == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    moved = old.read_text().splitlines()
    assert [json.loads(line)["step"] for line in moved[:-1]] == [5, 6, 7]
    assert moved[-1] == '{"step": 8, "time": 17'
    assert "moved 4 lines" in caplog.text
    run([6], 3.0, resume_step=6)  # once more: the file of moved lines grows
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4, 5, 6]
    assert len(old.read_text().splitlines()) == 5
    before = path.read_text()
    run([7], 4.0)  # without resume_step all rows stay
    assert path.read_text().startswith(before) and len(old.read_text().splitlines()) == 5
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    "damaged",
    [b"\0" * 40, b'{"step": 2, "ti', b'{"stop": 2}', b"[]", b"\xff\xfe", b'{"step": "2"}'],
)
def test_damaged_lines_are_named_and_a_continuation_goes_on_without_them(tmp_path, damaged, caplog):
    """As a power cut or a full disk leaves them, in the middle of the file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a JSON object.*Delete that line"):
        metrics.read(path)
    with caplog.at_level("WARNING"), Writer(tmp_path, tensorboard=False, resume_step=4) as writer:
        writer.scalars(4, "opsd", {"loss": 1.0})
    assert f"{path}: lines [2] are damaged" in caplog.text
    assert [row["step"] for row in metrics.read(path)] == [1, 3, 4]
    assert len((tmp_path / "metrics.jsonl.superseded").read_bytes().splitlines()) == 1


def test_samples_tensorboard_and_processes_that_do_not_write(tmp_path):
    from PIL import Image

    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    with Writer(tmp_path) as writer:
        writer.scalars(3, "opsd", {"loss": 0.5, "bad": float("nan"), "eval/maze/text": 0.25})
        writer.text(3, "rollout_0", "go right ünïcode")
        writer.image(3, "batch/problem", image)
        with pytest.raises(ValueError, match="not uint8"):
            writer.image(3, "x", image / 255)
        for name in ("../x", "a b", "/x", ""):
            with pytest.raises(ValueError, match="sample name"):
                writer.text(3, name, "x")
    folder = tmp_path / "samples" / "000003"
    assert (folder / "rollout_0.txt").read_text(encoding="utf-8") == "go right ünïcode"
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "batch" / "problem.png")), image)
    (events,) = (tmp_path / "tb").iterdir()
    content = events.read_bytes()
    for tag in (b"opsd/loss", b"eval/maze/text", b"rollout_0", b"batch/problem"):
        assert tag in content
    assert b"opsd/bad" not in content
    with Writer(tmp_path / "other", primary=False) as writer:
        writer.scalars(1, "opsd", {"loss": 1.0})
        writer.text(1, "a", "b")
        writer.image(1, "a", image)
    assert not (tmp_path / "other").exists()


def wandb_stand_in(monkeypatch):
    """A module in the place of wandb; what it is told."""
    told = []
    run = types.SimpleNamespace(
        log=lambda row, step: told.append((step, row["loss"])), finish=lambda: told.append("end")
    )
    client = types.SimpleNamespace(init=lambda **arguments: told.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", client)
    return told


def test_wandb_is_asked_for_by_its_arguments(tmp_path, monkeypatch):
    told = wandb_stand_in(monkeypatch)
    with Writer(tmp_path, tensorboard=False, wandb={"project": "opsd"}) as writer:
        writer.scalars(4, "opsd", {"loss": 0.5})
    assert told[0]["project"] == "opsd" and told[1:] == [(4, 0.5), "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install opsd_jax\[wandb\]"):
        Writer(tmp_path, tensorboard=False, wandb={})


def test_all_starts_of_a_run_are_one_run_at_wandb(tmp_path, monkeypatch):
    told = wandb_stand_in(monkeypatch)
    for folder in ("run", "run", "other"):
        Writer(tmp_path / folder, tensorboard=False, wandb={"project": "opsd"}).close()
    first, again, other = (x for x in told if x != "end")
    assert (
        first["id"] == again["id"] != other["id"] and first["resume"] == again["resume"] == "allow"
    )
    for text in ("", "{", "[]", '{"id": 3}', '{"id": ""}'):
        (tmp_path / "run" / "wandb.json").write_text(text)
        with pytest.raises(ValueError, match="run/wandb.json is damaged.* delete the file"):
            Writer(tmp_path / "run", tensorboard=False, wandb={"project": "opsd"})


@pytest.mark.parametrize("lost", ["the workdir", "the file", "its content"])
def test_a_file_that_is_deleted_while_it_is_written_is_an_error(tmp_path, lost):
    import shutil

    def lose(workdir):
        shutil.rmtree(workdir)
        if lost != "the workdir":
            workdir.mkdir()
        if lost == "its content":  # another run has begun there
            (workdir / "metrics.jsonl").write_text("{}\n")

    with pytest.raises(
        FileNotFoundError,
        match="metrics.jsonl was deleted or replaced while the run was writing it",
    ):
        with Writer(tmp_path / "w", tensorboard=False) as writer:
            writer.scalars(1, "opsd", {"loss": 1.0})
            lose(tmp_path / "w")
            writer.scalars(2, "opsd", {"loss": 1.0})
    with pytest.raises(FileNotFoundError, match="deleted or replaced"):  # after the last line
        with Writer(tmp_path / "v", tensorboard=False) as writer:
            writer.scalars(1, "opsd", {"loss": 1.0})
            lose(tmp_path / "v")
    with pytest.raises(KeyError):  # another error is not hidden
        with Writer(tmp_path / "u", tensorboard=False) as writer:
            lose(tmp_path / "u")
            raise KeyError


# ---------------------------------------------------------------------------- the terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_plain_lines_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with Progress(100, "maze", "opsd", start=40, file=file) as progress:
        for step in range(41, 101):
            now[0] += 1
            progress.update(step, loss=0.123456, note="ok")
    shown = file.getvalue().splitlines()
    assert [line.split()[2] for line in shown] == [
        f"{n}/100" for n in (41, 51, 61, 71, 81, 91, 100)
    ]
    assert shown[1] == "maze opsd  51/100  loss 0.1235  note ok  elapsed 0:00:11  left 0:00:49"
    file = io.StringIO()
    with Progress(2, "arm noise", file=file) as progress:
        progress.update(2)  # without numbers
    assert file.getvalue() == "arm noise  2/2  elapsed 0:00:00  left 0:00:00\n"
    silent = io.StringIO()
    with Progress(5, primary=False, file=silent) as progress:
        progress.update(5)
    assert silent.getvalue() == ""


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Progress(10, "maze", "opsd", start=2, file=file) as progress:
        progress.update(7, loss=0.5)
    shown = file.getvalue()
    assert (
        "maze opsd" in shown and "7/10" in shown and "loss 0.5" in shown and "elapsed" not in shown
    )


def frame(width, *bars):
    """The lines of a terminal of a width: bars of (title, total, done, numbers), a minute on."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    shown = Bars(console, lambda seconds: "0:01:00")
    for title, total, done, numbers in bars:
        shown.add_task(title, total=total, completed=done, numbers=numbers, left="0:00:36")
    console.print(shown.make_tasks_table(shown.tasks))
    return [line.rstrip() for line in file.getvalue().splitlines()]


RUN = "W opsd", 1000, 300, ("loss 0.04321", "completion_len 9.01", "tokens/s 1415")
ARM = "arm noise", 1000, 20, ("jsd 0.5", "stage opsd")
LONG = "a-long-name-of-a-workdir-of-a-run offline", 16000, 12000, ()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("bars", [(RUN,), (RUN, ARM), (ARM, LONG)])
def test_steps_and_the_time_left_are_readable_at_every_width(width, bars):
    lines = frame(width, *bars)
    assert len(lines) == len(bars)  # none goes over two lines
    for line, (title, total, done, numbers) in zip(lines, bars):
        assert len(line) <= width
        assert f" {done}/{total} " in line and line.endswith(" left 0:00:36")
        assert line.startswith(title[:7])
        if width >= 60:
            assert " 0:01:00 " in line
        if width >= 80 and done > total / 10:
            assert "━" in line
        for number in numbers:  # whole or not at all
            assert (number in line) or number.split()[0] not in line


def test_numbers_leave_a_narrow_line_from_the_last_on():
    def shown(width):
        return [number for number in RUN[3] if number in frame(width, RUN, ARM)[0]]

    assert shown(120) == [*RUN[3]]
    assert shown(80) == ["loss 0.04321"]
    assert shown(40) == []


def test_bars_of_several_threads_share_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Progress(10, "run", file=file) as run:

        def arm():
            with Progress(5, "arm noise", file=file) as progress:
                progress.update(5)

        thread = threading.Thread(target=arm)
        thread.start()
        thread.join()
        run.update(3)
        run.close()
        run.close()  # has no effect
    with Progress(2, "next", file=file) as after:
        after.update(2)
    shown = file.getvalue()
    assert all(text in shown for text in ("arm noise", "5/5", "run", "3/10", "next", "2/2"))


def test_the_time_that_is_left_does_not_count_the_first_update(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with Progress(30, "run", file=file) as progress:
        for done, at in ((10, 100.0), (20, 110.0)):  # the first ten steps also compiled
            now[0] = at
            progress.update(done)
    assert [line.split()[-1] for line in file.getvalue().splitlines()] == ["?", "0:00:10"]


# ---------------------------------------------------------------------------- time


def test_clock_counts_nested_phases_once():
    now = [0.0]
    clock = Clock(now=lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    for _ in range(2):
        with clock("update"):
            spend(3)
            with clock("checkpoint"):
                spend(1)
                with clock("eval"):
                    spend(0.5)
            spend(2)
    with pytest.raises(ZeroDivisionError), clock("sample"):
        spend(4)
        1 / 0
    spend(3)
    with clock("sample"):
        assert clock.report()["other"] == 3
    assert clock.report() == {
        "update": 10,
        "sample": 4,
        "checkpoint": 2,
        "eval": 1,
        "other": 3,
        "total": 20,
    }
    assert list(clock.report()) == ["update", "sample", "checkpoint", "eval", "other", "total"]
    rows = [line.split() for line in clock_lib.table(clock.report()).splitlines()]
    assert rows[0] == ["update", "10.0", "s", "50.0", "%"]
    assert rows[-1] == ["total", "20.0", "s", "100.0", "%"]


def test_shares_are_of_the_time_since_the_line_before():
    now = [0.0]
    clock = Clock(now=lambda: now[0])

    def spend(**phases):
        for phase, seconds in phases.items():
            with clock(phase):
                now[0] += seconds

    now[0] += 2  # other
    spend(data=1, sample=4, update=1, checkpoint=2)
    first = clock.shares()
    assert first == pytest.approx(
        {
            "time/steps": 0.5,
            "time/compile": 0,
            "time/input": 0.1,
            "time/checkpoint": 0.2,
            "time/eval": 0,
            "time/other": 0.2,
            "goodput": 0.5,
        }
    )
    spend(eval=6, update=3, collect=1)
    second = clock.shares()
    shares = {name: share for name, share in second.items() if share and name != "goodput"}
    assert shares == pytest.approx({"time/steps": 0.3, "time/eval": 0.6, "time/other": 0.1})
    assert second["goodput"] == pytest.approx(8 / 20)  # of all time


def test_the_times_of_a_continued_run_are_those_of_all_commands():
    earlier = {"update": 4.0, "sample": 1.0, "other": 2.0, "total": 7.0}
    later = {"eval": 9.0, "update": 1.0, "other": 1.0, "total": 11.0}
    both = clock_lib.added(later, earlier)
    assert list(both.items()) == [
        ("eval", 9.0),
        ("update", 5.0),
        ("sample", 1.0),
        ("other", 3.0),
        ("total", 18.0),
    ]
    assert clock_lib.added(later, {}) == later


def test_clock_takes_compilation_out_of_the_phase_it_happens_in():
    now = [0.0]
    clock = Clock(now=lambda: now[0])

    def compiles(seconds):
        now[0] += seconds
        jax.monitoring.record_event_duration_secs(
            "/jax/core/compile/backend_compile_duration", seconds
        )

    compiles(1)
    with clock("update"):
        now[0] += 5
        compiles(2)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 7.0)
        thread = threading.Thread(
            target=lambda: compiles(4)
        )  # beside this thread's work, not instead of it
        thread.start()
        thread.join()
    assert clock.report() == {"update": 9, "compile": 3, "other": 0, "total": 12}


def test_clock_hears_of_real_compilations():
    clock = Clock()
    with clock("update"):
        jax.jit(lambda x: jnp.tanh(x) * 3)(np.ones(7))
    report = clock.report()
    assert 0 < report["compile"] < report["total"] and report["update"] > 0


# ---------------------------------------------------------------------------- stopping in time


def steps_until_stopped(health, rows):
    for step, row in enumerate(rows, 1):
        try:
            health.check(step, row)
        except UnhealthyRunError as error:
            return step, str(error)
    return None


def test_health_stops_on_nan_at_once():
    for row in (
        {"loss": float("nan")},
        {"loss": 1.0, "grad_norm": jnp.float32("inf")},
        {"loss": None},
    ):
        good = {"loss": jnp.float32(1), "grad_norm": np.float32(2)}
        step, message = steps_until_stopped(Health(), [good, row])
        assert step == 2 and "stopped at step 2" in message and "optim.lr" in message
    assert steps_until_stopped(Health(finite=None), [{"loss": float("nan")}] * 9) is None
    assert steps_until_stopped(Health(), [{"stage": "opsd", "jsd": float("nan")}]) is None


def test_health_stops_on_collapsed_length():
    good, bad = [{"completion_len": n} for n in (90, 110, 100, 80, 120)], {"completion_len": 9.0}
    step, message = steps_until_stopped(Health(), good + [bad] * 9)
    assert step == 10 and "collapsed to 9 tokens, from 100" in message  # the fifth bad one
    assert (
        steps_until_stopped(Health(), good + ([bad] * 4 + good[:1]) * 5) is None
    )  # never five in a row
    assert (
        steps_until_stopped(Health(), good + [{"completion_len": 10.0}] * 9) is None
    )  # at the limit
    assert steps_until_stopped(Health(min_length_fraction=None), good + [bad] * 9) is None
    assert steps_until_stopped(Health(patience=2), good + [bad] * 9)[0] == 7


def test_health_stops_when_completions_no_longer_end():
    rows = [{"eos_rate": rate} for rate in (0.2, 0.6, 0.3, 0, 0.01, 0, 0, 0, 0)]
    step, message = steps_until_stopped(Health(), rows)
    assert step == 8 and "no longer end" in message and "teacher" in message
    never = [{"eos_rate": 0.0}] * 20
    assert steps_until_stopped(Health(min_eos_rate=None), [{"eos_rate": 0.9}] + never) is None


@pytest.mark.parametrize(
    "rows, stopped, message",
    [
        (
            [{"completion_len": 0.0}] * 9,
            5,
            "completions are empty from the start: completion_len is 0, .*init_from",
        ),
        (
            [{"completion_len": n} for n in (0.5, 1.0, 0.9, 1.0, 1.0)],
            5,
            "empty from the start: completion_len is 1,",
        ),
        (
            [{"completion_len": n} for n in (1.0, 1.0, 2.0, *[1.0] * 6)],
            None,
            "",
        ),  # it began with more
        (
            [{"completion_len": 100.0}] * 5 + [{"completion_len": 0.0}] * 5,
            10,
            "collapsed to 0 tokens",
        ),  # not from the start
        (
            [{"eos_rate": 0.0}] * 9,
            None,
            "",
        ),  # this one waits longer: budgets may be short, and models young
        (
            [{"eos_rate": 0.0}] * 10,
            10,
            "completions never end within the budget.*rollout.max_new_tokens",
        ),
        (
            [{"eos_rate": rate} for rate in (0.3, 0.1, *[0.0] * 10)],
            12,
            "never end within the budget",
        ),
        (
            [{"eos_rate": rate} for rate in [0, 0, 0, 0, 0.01] * 9],
            None,
            "",
        ),  # some end now and then
        ([{"eos_rate": 0.6}] + [{"eos_rate": 0.0}] * 5, 6, "no longer end"),
    ],
)
def test_health_stops_what_is_wrong_from_the_start(rows, stopped, message):
    found = steps_until_stopped(Health(), rows)
    assert found is None if stopped is None else found[0] == stopped
    if found:
        assert (
            re.search(message, found[1]) and found[1].count("to go on") == 1
        )  # one watch says it, not two
    off = Health(min_length=0, max_unfinished=0, min_length_fraction=0, min_eos_rate=0)
    assert steps_until_stopped(off, rows) is None


def test_settings_of_health_are_its_own_defaults():
    from opsd_jax import config as config_lib

    assert Health(**config_lib.default().health) == Health() and Health().teacher_floor == 0.5


def test_health_stops_on_teacher_erosion():
    rows = [
        {"eval/maze/teacher": 0.95, "eval/maze/text": 0.02},
        {"loss": 1.0},
        {"eval/maze/teacher": 0.80, "eval/maze/text": 0.30},
        {"eval/maze/teacher": 0.42, "eval/maze/text": 0.08},
    ]
    step, message = steps_until_stopped(Health(), rows)
    assert (
        step == 4
        and "eval/maze/teacher fell to 0.420, from 0.950" in message
        and "slower EMA" in message
    )
    assert steps_until_stopped(Health(teacher_floor=None), rows) is None
    assert steps_until_stopped(Health(teacher_floor=0.4), rows) is None
    text = [
        {"eval/maze/text": 0.5},
        {"eval/maze/text": 0.0},
    ]  # the student's accuracy is its own affair
    assert steps_until_stopped(Health(), text) is None


def test_health_stops_on_an_unsure_teacher():
    rows = [{"teacher_entropy": 0.3}] * 5 + [{"teacher_entropy": 1.4}] * 5
    assert steps_until_stopped(Health(), rows)[0] == 10
    assert steps_until_stopped(Health(teacher_entropy_rise=1.2), rows) is None
    rows = [{"teacher_topk_mass": 0.96}] * 5 + [{"teacher_topk_mass": 0.4}] * 5
    step, message = steps_until_stopped(Health(), rows)
    assert step == 10 and "0.4 of the teacher's probability, from 0.96" in message
    assert steps_until_stopped(Health(teacher_topk_fraction=None), rows) is None


def test_health_remembers_over_a_resume():
    good, bad = {"completion_len": 100.0}, {"completion_len": 5.0}
    health = Health()
    health.replay([good] * 5 + [bad] * 4)
    assert steps_until_stopped(health, [bad])[0] == 1
    assert steps_until_stopped(Health(), [bad] * 20) is None  # what would be missed without
    health.replay([{"loss": None}])  # an old row is not judged
    with pytest.raises(ValueError, match="patience=0"):
        Health(patience=0)


def test_compile_guard():
    update = jax.jit(lambda x: x + 1)
    guard = CompileGuard()
    update(np.ones(9))  # before the guard watches
    update = guard.watch("update", update, 2)
    guard.watch("sample", jax.jit(lambda x: x), 1)
    assert guard.check() == {"compiles": 0, "compiles/update": 0, "compiles/sample": 0}
    for size in (1, 2, 1, 2):
        update(np.ones(size))
    assert guard.check() == {"compiles": 2, "compiles/update": 2, "compiles/sample": 0}
    update(np.ones(3))
    with pytest.raises(TooManyCompilesError, match="update 3 times, limit 2.*buckets"):
        guard.check()


def test_compilations_of_a_block():
    double = jax.jit(lambda x: x * 2)
    with compilations() as first:
        double(np.ones(3))
        double(np.zeros(3))
        thread = threading.Thread(target=lambda: jax.jit(lambda x: x - 1)(np.ones(5)))
        thread.start()
        thread.join()
    assert first.programs == 1 and first.seconds > 0
    with compilations() as again:
        double(np.ones(3))
    double(np.ones(4))  # after the block
    assert (again.programs, again.seconds) == (0, 0.0) and first.programs == 1


def test_importing_it_is_cheap():
    code = (
        "import sys, opsd_jax.runtime.metrics, opsd_jax.runtime.checkpoint; "
        "slow = 'matplotlib', 'tensorboardX', 'rich', "
        "'wandb', 'orbax.checkpoint', 'pandas'; print([name for "
        "name in slow if name in sys.modules])"
    )
    root = str(pathlib.Path(__file__).parents[2])
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "[]\n"


def test_the_share_of_waiting():
    """Weighted by time; without records while a program was compiled, and without evaluation."""

    def record(time, **shares):
        names = ("steps", "compile", "input", "checkpoint", "eval", "other")
        return {"time": time} | {f"time/{name}": shares.get(name, 0.0) for name in names}

    records = [
        record(0, compile=0.5, steps=0.5),
        record(10, steps=0.9, input=0.1),
        {"time": 12, "eval/T/none": 0.5},  # of an evaluation
        record(30, steps=0.4, eval=0.5, checkpoint=0.05, other=0.05),
        record(40, compile=0.9, input=0.1),
    ]
    waited, worked = 10 * 0.1 + 20 * 0.1, 10 * 0.9 + 20 * 0.4
    assert clock_lib.waiting(records) == pytest.approx(waited / (waited + worked))
    assert clock_lib.waiting(records[:1]) is None and clock_lib.waiting([]) is None
