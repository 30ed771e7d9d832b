"""Files that grow, on a stand-in for storage that shows a file only once it is closed."""

import builtins
import logging
import os
import pathlib
import shutil
import threading
import time

import pytest

from opsd_jax import config_flags
from opsd_jax.runtime import growing_file
from opsd_jax.runtime.metrics import Writer


class Mount:
    """What is written below `here` is copied to `bucket` when its file is closed."""

    def __init__(self, here, bucket):
        self.here, self.bucket, self.opened = here, bucket, 0

    def open(self, path, mode):
        self.opened += 1
        mount, file = self, builtins.open(path, mode)

        class File:
            def close(self):
                file.close()
                place = mount.bucket / os.path.relpath(path, mount.here)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)

            def __getattr__(self, name):
                return getattr(file, name)

        return File()

    def shows(self, name):
        place = self.bucket / name
        return place.read_bytes() if place.exists() else None


@pytest.fixture
def mount(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    mount = Mount(tmp_path / "here", tmp_path / "bucket")
    monkeypatch.setattr(growing_file, "open", mount.open, raising=False)
    return mount


class Timers:
    """Timers that go off when the test says so."""

    def __init__(self):
        self.waiting = []

    def __call__(self, seconds, work):
        timer = threading.Timer(seconds, work)
        timer.start = lambda: self.waiting.append((seconds, work))
        return timer

    def go_off(self):
        for _, work in self.waiting:
            work()
        self.waiting.clear()


def test_it_is_closed_within_the_period_and_opened_again(mount):
    timers = Timers()
    file = growing_file.GrowingFile(mount.here / "a", period=30.0, timer=timers)
    file.write(b"1\n")
    file.write(b"2\n")
    assert mount.shows("a") is None and (mount.here / "a").read_bytes() == b"1\n2\n"
    assert [seconds for seconds, _ in timers.waiting] == [30.0] and mount.opened == 1
    timers.go_off()
    assert mount.shows("a") == b"1\n2\n"
    file.write(b"3\n")
    assert mount.opened == 2 and len(timers.waiting) == 1
    timers.go_off()
    assert mount.shows("a") == b"1\n2\n3\n"
    timers.go_off()  # nothing was written since
    file.publish()
    assert mount.opened == 2
    file.write(b"4\n")
    file.publish()
    assert mount.shows("a") == b"1\n2\n3\n4\n"


def test_a_close_that_fails_is_told_by_the_next_call(mount, monkeypatch):
    timers = Timers()
    file = growing_file.GrowingFile(mount.here / "a", timer=timers)
    file.write(b"1\n")
    monkeypatch.setattr(shutil, "copy", lambda *_: (_ for _ in ()).throw(OSError("no quota")))
    timers.go_off()
    with pytest.raises(OSError, match="no quota"):
        file.write(b"2\n")


def test_a_file_that_is_deleted_between_two_writes_is_an_error(mount):
    timers = Timers()
    file = growing_file.GrowingFile(mount.here / "a", timer=timers)
    file.write(b"1\n")
    timers.go_off()
    os.remove(mount.here / "a")
    with pytest.raises(FileNotFoundError, match="a was deleted or replaced while the run"):
        file.write(b"2\n")


def test_metrics_and_events_are_seen_while_the_run_goes_on(mount, monkeypatch):
    monkeypatch.setattr(growing_file, "PERIOD", 0.1)
    monkeypatch.setattr(growing_file.GrowingFile.__init__, "__defaults__", (0.1, threading.Timer))

    def seen():
        lines = (mount.shows("metrics.jsonl") or b"").count(b"\n")
        events = [*(mount.bucket / "tb").glob("*")]
        return lines, sum(path.read_bytes().count(b"opsd/loss") for path in events)

    with Writer(mount.here) as writer:
        for step in (1, 2):
            writer.scalars(step, "opsd", {"loss": 1.0})
            deadline = time.monotonic() + 20
            while seen() != (step, step) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert seen() == (step, step)
        assert len([*(mount.here / "tb").iterdir()]) == 1


def test_the_log_is_kept_with_the_run(mount):
    logger = logging.getLogger("absl")
    with (
        pytest.raises(ZeroDivisionError),
        config_flags.also_logging_to(f"{mount.here}/log/000.txt"),
    ):
        logger.warning("step %d", 3)
        1 / 0  # noqa: B018
    logger.warning("not of the run")
    said = mount.shows("log/000.txt").decode()
    assert "WARNING step 3\n" in said and "ended by an error\nTraceback" in said
    assert said.rstrip().endswith("ZeroDivisionError: division by zero") and "not of" not in said
    with pytest.raises(SystemExit), config_flags.also_logging_to(f"{mount.here}/log/000.txt"):
        raise SystemExit(42)
    assert mount.shows("log/000.txt").decode().endswith("INFO ends with exit code 42\n")


def test_messages_of_packages_in_a_folder_of_our_name_are_not_ours():
    """As in a clone with its virtual environment: opsd_jax/.venv."""
    root = pathlib.Path(config_flags.__file__).parents[1]

    def is_ours(path, level=logging.INFO):
        return config_flags._is_ours(logging.LogRecord("", level, str(path), 1, "text", (), None))

    installed = root / ".venv" / "lib" / "site-packages" / "orbax" / "checkpoint.py"
    assert is_ours(root / "opsd_jax" / "run" / "session.py") and not is_ours(installed)
    assert not is_ours("/clones/opsd_jax/.venv/orbax.py")
    assert is_ours(installed, logging.WARNING)
