"""Two commands that write to one folder: the second one is told which process holds the lock."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import convert, redraw
from opsd_jax.data import __main__ as data
from opsd_jax.data import prepare, procedural, source_files
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.runtime import locks

ROOT = str(pathlib.Path(__file__).parents[2])
HOLD = """
import sys, time
from opsd_jax.runtime import locks
with locks.only_writer(sys.argv[1], inside=sys.argv[2] == "inside"):
    print("in", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def holder():
    """Starts processes that hold locks; ends those that are left."""
    started = []

    def hold(folder, how="beside", seconds=600):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLD, str(folder), how, str(seconds)],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
            )
        )
        assert started[-1].stdout.readline() == "in\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_one_run_a_folder(tmp_path, holder):
    """The second is told who is there; a run that was killed keeps nobody out."""
    first = holder(tmp_path / "w", "inside")
    with pytest.raises(
        locks.FolderInUseError,
        match=f"{tmp_path}/w is being written by process {first.pid} on .*another folder",
    ):
        with locks.only_writer(tmp_path / "w", inside=True):
            pass
    with locks.only_writer(tmp_path / "w" / "arms" / "noise", inside=True):  # a folder of its own
        pass
    first.kill()
    first.wait()
    with locks.only_writer(tmp_path / "w", inside=True):
        assert f"process {os.getpid()} on" in (tmp_path / "w" / "lock").read_text()


def test_every_command_that_makes_a_folder(tmp_path, holder, capsys, monkeypatch):
    target, source = tmp_path / "t", tmp_path / "s"
    first = holder(target)
    (source / "data").mkdir(parents=True)
    (source / "llm_config.json").write_text("{}")
    says = f"{target} is being written by process {first.pid} on "
    monkeypatch.setattr(workdir_lib, "load_config", lambda workdir: config_lib.default())
    commands = {
        "make-mini": lambda: data.main(["make-mini", f"--target={target}"]),
        "import": lambda: convert.main(["import", f"--source={source}", f"--target={target}"]),
        "export": lambda: convert.main(["export", f"--source={tmp_path}", f"--target={target}"]),
        "redraw": lambda: redraw.main(
            [f"--workdir={tmp_path}", f"--target={target}", "--checkpoint=c"]
        ),
    }
    for name, command in commands.items():
        with pytest.raises(SystemExit) as error:
            command()
        assert error.value.code == 1 and says in capsys.readouterr().err, name
    monkeypatch.setattr(source_files, "task_folders", lambda source: {})
    with pytest.raises(locks.FolderInUseError, match=says):
        prepare.prepare(source, target)
    assert not target.exists()


def test_what_a_writer_calls_may_write_and_other_threads_may_not(tmp_path):
    refused = []

    def another():
        try:
            with locks.only_writer(tmp_path / "t"):
                pass
        except locks.FolderInUseError as error:
            refused.append(str(error))

    with locks.only_writer(tmp_path / "t"):
        with locks.only_writer(f"{tmp_path}/x/../t"):
            pass
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in refused[0]
        assert [path.name for path in tmp_path.iterdir()] == [".t.lock"]
    assert list(tmp_path.iterdir()) == []


def test_runs_that_share_data_wait_for_the_one_that_makes_them(
    tmp_path, holder, caplog, monkeypatch
):
    config, waited = config_lib.default(), []
    config.data.make.families = ("chart",)
    first = holder(tmp_path / "w" / "data", seconds=1)
    began = time.monotonic()
    monkeypatch.setattr(
        procedural, "_make", lambda target, make: waited.append(time.monotonic() - began)
    )
    with caplog.at_level("WARNING"):
        small_run.make_data(config, tmp_path / "w")
    assert waited[0] > 0.8 and f"is being written by process {first.pid}" in caplog.text


def test_a_lock_file_that_its_owner_removes_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """One after the other, however they meet: the count never shows two."""
    inside, most, sleep = [], [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(0.001))

    def work():
        for _ in range(20):
            with locks.only_writer(tmp_path / "t", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 60 and max(most) == 1


def test_where_no_lock_can_be(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level("WARNING"), locks.only_writer(tmp_path / "file" / "t"):
        pass
    assert (
        "no lock there" in caplog.text and "make sure that no other command writes" in caplog.text
    )
