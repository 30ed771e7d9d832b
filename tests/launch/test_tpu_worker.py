"""launch/tpu_worker.sh on machines that lose their mount, their processes, or everything.

A machine is a folder, and its commands for mounting are stand-ins: a mounted bucket is a link from
runs/ to a folder that all machines share. The command is a run that counts its steps there.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from stand_ins import LAUNCH, calls, environment, stand_in, wait_for

# Continues at the step in runs/w/step, and writes where it begins into runs/w/starts. With a file
# `codes` in its machine it ends with the next code of it, after one step.
RUN = """
import os, pathlib, signal, sys, time
w = pathlib.Path("runs/w")
w.mkdir(exist_ok=True)
saved = w / "step"
step = int(saved.read_text()) if saved.exists() else 0
with open(w / "starts", "a") as file:
    print(step, file=file)
def save():
    (w / "new").write_text(str(step))
    (w / "new").rename(saved)
def stop(*_):
    save()
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
codes = pathlib.Path("codes")
for step in range(step + 1, 2000):
    time.sleep(0.01)
    if not w.exists():
        sys.exit("runs/w is gone")
    save()
    if codes.exists():
        code, *rest = codes.read_text().split()
        codes.write_text(" ".join(rest)) if rest else codes.unlink()
        os.kill(os.getpid(), int(code) - 128) if int(code) > 128 else sys.exit(int(code))
"""


class Machine:
    """A worker with its checkout, set up for the bucket."""

    def __init__(self, folder: pathlib.Path, bucket: pathlib.Path | None):
        self.folder, self.bucket = folder, bucket
        (folder / "launch").mkdir(parents=True)
        (folder / "runs").mkdir()
        shutil.copy(LAUNCH / "tpu_worker.sh", folder / "launch")
        (folder / "run.bucket").write_text("b" if bucket else "")
        stand_in(folder / "bin", "mountpoint", f"[[ -L {folder}/runs ]]")
        stand_in(
            folder / "bin",
            "gcsfuse",
            f"[[ ! -e {folder}/no_bucket ]] && rmdir {folder}/runs && ln -s {bucket} {folder}/runs",
        )
        # of `sudo umount -l runs`, where gcsfuse has died
        stand_in(folder / "bin", "sudo", f"rm {folder}/runs && mkdir {folder}/runs")
        self.path = stand_in(folder / "bin", "hostname", f"echo {folder.name}")

    def do(self, *words, **variables) -> subprocess.CompletedProcess:
        given = {"PATH": self.path, "SETTLE_S": 0.1, "PAUSE_S": 0.05, "COPY_S": 0.1, "STOP_S": 10}
        return subprocess.run(
            ["bash", self.folder / "launch/tpu_worker.sh", *words],
            env=environment(**given | variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, **variables) -> subprocess.CompletedProcess:
        return self.do("run", sys.executable, "-c", RUN, **variables)

    def unmount(self):
        (self.folder / "runs").unlink()
        (self.folder / "runs").mkdir()

    def reboot(self):
        """Nothing runs any more, and nothing is mounted; the disk is as it was."""
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        wait_for(lambda: not self.processes())
        if (self.folder / "runs").is_symlink():
            self.unmount()

    def processes(self) -> list[int]:
        """Those with the lock: the supervisor and its command."""
        found = []
        lock = str(self.folder / "run.lock")
        for entry in pathlib.Path("/proc").glob("[0-9]*/fd/9"):
            try:
                if os.readlink(entry) == lock:
                    found.append(int(entry.parts[2]))
            except OSError:
                continue
        return sorted(found)

    @property
    def command(self) -> int:
        wait_for((self.folder / "run.pid").exists)
        return int((self.folder / "run.pid").read_text())

    @property
    def state(self) -> str:
        return self.do("status").stdout.removeprefix(f"worker {self.folder.name} ").strip()

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def starts(self) -> list[int]:
        """Steps at which the run began, each time that it was started."""
        path = self.bucket / "w" / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def trains(self, starts: int) -> bool:
        """Whether it has begun so often, and goes on."""
        return len(self.starts) == starts and bool(self.processes())


@pytest.fixture
def machine(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    found = Machine(tmp_path / "w-0", bucket)
    yield found
    for process in found.processes():
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def training(machine):
    """A machine on which the run has taken a step."""
    assert machine.run().returncode == 0
    wait_for(lambda: (machine.bucket / "w/step").exists())
    return machine


def continued(machine, times: int) -> bool:
    """Whether all starts but the first continued the run."""
    wait_for(lambda: machine.trains(times))
    assert machine.starts[0] == 0 < min(machine.starts[1:]), machine.log
    return True


# --- one command at a time ------------------------------------------------------------------------


def test_starts_once_and_stops(training):
    assert training.state == "running"
    again = training.run()
    assert again.returncode == 0 and "runs already" in again.stdout
    other = training.do("run", "true")
    assert other.returncode == 1 and "another command runs here already" in other.stderr
    assert "a command runs here" in training.do("setup", "b").stderr
    stopped = training.do("stop")
    assert stopped.returncode == 0 and training.state == "ended 42"
    assert len(training.starts) == 1  # not started again, as after a 42 that nobody asked for
    assert training.do("stop").returncode == 1
    assert training.run().returncode == 0 and continued(training, 2)


def test_words_are_kept_and_an_error_is_shown(machine):
    assert (
        machine.do(
            "run", sys.executable, "-c", "import sys; print(sys.argv)", "a b", "()"
        ).returncode
        == 0
    )
    wait_for(lambda: machine.state == "ended 0")
    assert "['-c', 'a b', '()']" in machine.log
    broken = machine.do("run", "bash", "-c", "echo reason; exit 7", SETTLE_S=30)
    assert broken.returncode == 1 and "reason" in broken.stderr and machine.state == "ended 7"


def test_the_log_is_in_the_bucket(training):
    copy = training.bucket / "logs" / "w-0.txt"
    wait_for(lambda: copy.exists() and "start 1 of at most 11" in copy.read_text())
    training.do("stop")
    assert "ended with code 42" in copy.read_text()


# --- faults ---------------------------------------------------------------------------------------


def test_lost_processes_are_started_again(machine):
    """Of this host or another: preempted, another one gone, aborted, killed, ended at its start."""
    (machine.folder / "codes").write_text("42 43 134 137 143")
    machine.run()
    assert continued(machine, 6) and machine.state == "running"


@pytest.mark.parametrize("code, starts", [(0, 1), (1, 1), (2, 1), (43, 3)])
def test_starts_are_bounded(machine, code, starts):
    """And an error of the command is not repeated."""
    (machine.folder / "codes").write_text(f"{code} " * 9)
    machine.run(RESTARTS=2)
    wait_for(lambda: machine.state == f"ended {code}")
    assert len(machine.starts) == starts


def test_stop_between_two_starts(machine):
    (machine.folder / "codes").write_text("43 " * 9)
    machine.run(PAUSE_S=1)
    wait_for(lambda: "code 43" in machine.log and not (machine.folder / "run.pid").exists())
    assert machine.do("stop").returncode == 0 and machine.state == "ended 42"
    assert len(machine.starts) == 1


def test_a_mount_that_is_gone_is_mounted_again(training):
    training.do("stop")
    training.unmount()
    assert training.run().returncode == 0 and continued(training, 2)


@pytest.mark.parametrize("why", ["other files", "no bucket"])
def test_a_mount_that_stays_away_is_refused(training, why):
    training.do("stop")
    training.unmount()
    if why == "other files":
        (training.folder / "runs/w").mkdir()
        message = "runs/ is not the bucket b, and holds files of this machine"
    else:
        (training.folder / "no_bucket").touch()
        message = "the bucket b cannot be mounted"
    refused = training.run()
    assert refused.returncode == 1 and f"error: w-0: {message}" in refused.stderr
    assert len(training.starts) == 1 and not training.processes()
    assert not (training.folder / "runs/w/starts").exists()


def test_a_mount_that_goes_while_it_trains(training):
    """The command ends with an error of its own, and continues in the bucket."""
    training.unmount()
    assert continued(training, 2)


def test_a_machine_that_was_never_set_up(machine):
    (machine.folder / "run.bucket").unlink()
    refused = machine.run()
    assert refused.returncode == 1 and "w-0 is not set up" in refused.stderr and not machine.starts


def test_a_reboot(training):
    """The number of the old process is that of another one now."""
    training.reboot()
    (training.folder / "run.pid").write_text(f"{os.getpid()}\n")
    assert training.state == "lost"
    assert "nothing runs here" in training.do("stop").stderr  # nor is the other one ended
    assert training.run().returncode == 0 and continued(training, 2)


def test_a_supervisor_that_is_killed(training):
    """Its command goes on, and only one does; it can be stopped and continued."""
    command = training.command
    for process in training.processes():
        if process != command:
            os.kill(process, signal.SIGKILL)
    wait_for(lambda: training.processes() == [command])
    assert training.state == "running" and "runs already" in training.run().stdout
    assert training.do("run", "true").returncode == 1, training.log
    assert training.do("stop").returncode == 0 and training.state == "lost"
    assert training.run().returncode == 0 and continued(training, 2)


def test_a_second_start_at_the_same_moment(machine):
    """Both ask for a start; one command runs."""
    with subprocess.Popen(
        ["bash", machine.folder / "launch/tpu_worker.sh", "run", sys.executable, "-c", RUN],
        env=environment(PATH=machine.path, SETTLE_S=0.1, COPY_S=0.1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ):
        machine.run()
    wait_for(lambda: machine.trains(1))
    assert len(machine.processes()) == 2  # it and its supervisor


# --- setting up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [True, False])
def test_setup(tmp_path, bucket):
    """It waits for who else installs something on a new machine, and mounts the bucket."""
    shared = tmp_path / "bucket"
    shared.mkdir()
    machine = Machine(tmp_path / "w-0", shared if bucket else None)
    (machine.folder / "bin/gcsfuse").rename(machine.folder / "later")
    for name in ("uv", "curl", "lsb_release", "tee"):
        stand_in(machine.folder / "bin", name, "")
    stand_in(
        machine.folder / "bin",
        "sudo",
        f"""
        case "$*" in
          *umount*) exit 1 ;;
          *tee*) cat > /dev/null ;;
          *update*) [[ $(grep -c update {machine.folder}/bin/log) -gt 2 ]] ;;  # twice it is locked
          *install*) mv {machine.folder}/later {machine.folder}/bin/gcsfuse ;;
        esac""",
    )
    words = ["setup", "b"] if bucket else ["setup"]
    done = machine.do(*words, PAUSE_S=0, EXTRAS="wandb")
    assert done.returncode == 0, done.stderr
    made = calls(machine.folder / "bin")
    install = next(call for call in made if call[:3] == ["uv", "pip", "install"])
    assert ".[tpu,wandb]" in install and "constraints/py312.txt" in install
    apt = [call for call in made if call[:2] == ["sudo", "apt-get"]]
    assert len(apt) == (4 if bucket else 0)
    if bucket:
        (mount,) = (call for call in made if call[0] == "gcsfuse")
        assert mount[-2:] == ["b", "runs"]
        # Others write there, too; and more than 4 files at a time are not written over the disk.
        assert {
            "--metadata-cache-ttl-secs=0",
            "--metadata-cache-negative-ttl-secs=0",
            "--write-global-max-blocks=1600",
        } <= set(mount)
    assert machine.run().returncode == 0 if bucket else not (machine.folder / "runs").is_symlink()
    machine.do("stop")
