"""Runs the commands of a study, as many at a time as there are slots.

What is done is known from the jobs' folders alone, so a study that ended in any way is continued.
On Linux the system asks the commands to stop if the study is killed; where it does not, they go on,
and the next study waits for them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from opsd_jax import config as config_lib
from opsd_jax.runtime import locks, metrics, run_folder
from opsd_jax.runtime.progress import Progress
from opsd_jax.runtime.stopping import StopRequest
from opsd_jax.study.grid import Job, Study
from opsd_jax.study.slots import Slot

_LOOK = 0.5  # seconds between two looks at the commands
_INTERVAL = 30.0  # seconds between two lines about how far they are, where there is no terminal

Command = Callable[[Job], Sequence[str]]


@dataclasses.dataclass
class _Running:
    slot: Slot
    process: subprocess.Popen
    began: float
    steps: int = 0
    looked: float = 0.0


def run(
    study: Study,
    slots: Sequence[Slot],
    stop: StopRequest,
    *,
    command: Command = Job.command,
    look: float = _LOOK,
) -> dict[str, str]:
    """Runs what is left of a study and waits for it.

    Args:
      command: the command of a job; tests have another one.
      look: seconds between two looks at the commands.
    Returns:
      {name of a job that is not done: why}; the other jobs are done.
    Raises:
      Stopped: `stop` was set. All commands were asked to stop, and have.
    """
    with _Jobs(study, slots, command) as jobs:
        while jobs.go_on():
            stop.check()
            time.sleep(look)
        return jobs.failed


class _Jobs:
    """The state of a study's jobs; as a context manager it leaves no command running."""

    def __init__(self, study: Study, slots: Sequence[Slot], command: Command):
        self._study, self._command = study, command
        self._free, self._running = list(slots), dict[Job, _Running]()
        self._waiting = list(left(study))
        self._done = len(study.jobs) - len(self._waiting)
        self._in_use: set[Job] = set()
        self.failed: dict[str, str] = {}
        self._total = sum(job.last for job in study.jobs)
        self._finished_steps = self._total - sum(job.last for job in self._waiting)
        start = self._finished_steps + sum(map(_steps, self._waiting))
        self._progress = Progress(self._total, "study", start=start, interval=_INTERVAL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for running in self._running.values():
            running.process.terminate()
        if self._running:
            _say(f"waiting until {len(self._running)} commands have saved")
        for running in self._running.values():
            running.process.wait()
        self._progress.close()

    def go_on(self) -> bool:
        """Looks at the commands and starts others; whether there is work left."""
        for job, running in list(self._running.items()):
            if running.process.poll() is not None:
                self._end(job, self._running.pop(job))
        for job in list(self._waiting):
            if self._free and self._is_ready(job):
                self._waiting.remove(job)
                if job.is_done():  # by a command of an earlier study that was killed
                    self._close(job)
                else:
                    self._start(job)
        self._show()
        return bool(self._waiting or self._running)

    def _is_ready(self, job: Job) -> bool:
        """Whether a job can start now. One that never can is recorded as failed."""
        if not job.is_run:
            run = self._study.run_of(job)
            if run in self._waiting or run in self._running:
                return False
            if run.name in self.failed and not os.path.isdir(
                run_folder.checkpoint(run.workdir, run.start)
            ):
                self._waiting.remove(job)
                self._close(job, f"not started: {run.name} {self.failed[run.name]}")
                return False
        try:
            with locks.only_writer(job.workdir, inside=True):
                self._in_use.discard(job)
                return True
        except locks.FolderInUseError as error:
            if job not in self._in_use:
                self._in_use.add(job)
                _say(f"{job.name}: waits for an earlier command ({error})")
            return False

    def _start(self, job: Job) -> None:
        slot = self._free.pop(0)
        _share_data(self._study, job)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": run_folder.compiled_programs(self._study.workdir),
            **os.environ,
            **slot.environment,
        }
        with open(job.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                _launched(self._command(job), slot.cores),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._running[job] = _Running(slot, process, time.monotonic())
        begun = "continues" if _steps(job) else "starts"
        _say(f"{job.name}: {begun}, log in {job.log}")

    def _end(self, job: Job, running: _Running) -> None:
        """Records how a command ended."""
        self._free.insert(0, running.slot)
        code, seconds = running.process.returncode, time.monotonic() - running.began
        if code == 0 and job.is_done():
            self._close(job, seconds=seconds)
        else:
            what = "without a final evaluation, " if code == 0 else ""
            self._close(job, f"failed ({what}exit code {code}), see {job.log}", seconds)

    def _close(self, job: Job, failure: str = "", seconds: float = 0.0) -> None:
        self._done += not failure
        self._finished_steps += job.last
        if failure:
            self.failed[job.name] = failure
            said = _last_line(job.log) if failure.startswith("failed") else ""
            _say(f"{job.name}: {failure}" + (f": {said}" if said else ""))
        else:
            took = f" in {seconds / 60:.1f} min" if seconds else ""
            _say(f"{job.name}: finished{took}; {self._done} of {len(self._study.jobs)} jobs done")

    def _show(self) -> None:
        """Shows how far all are; metrics.jsonl of each is read every 5 seconds at most."""
        now = time.monotonic()
        for job, running in self._running.items():
            if now - running.looked > 5:
                running.steps, running.looked = _steps(job), now
        states = [f"{job.name} {r.steps}/{job.last}" for job, r in self._running.items()]
        states += [f"{job.name} (earlier command)" for job in self._in_use]
        done = self._finished_steps + sum(r.steps for r in self._running.values())
        if self._waiting or self._running:  # evaluations follow the last step
            done = min(done, self._total - 1)
        jobs = f"{self._done}/{len(self._study.jobs)}"
        self._progress.update(done, jobs=jobs, running=", ".join(states) or "none")


def _share_data(study: Study, job: Job) -> None:
    """Links the data of a run that makes its own to a folder of all runs with the same ones.

    The run whose command is the first makes them. A run that has data already is left alone.
    """
    data, own = job.config.data, run_folder.data(job.workdir)
    if not job.is_run or data.dir or not data.make.families or os.path.lexists(own):
        return
    made_with = json.dumps(config_lib.to_json(data.make), sort_keys=True)
    name = hashlib.sha256(made_with.encode()).hexdigest()[:8]
    shared = os.path.join(run_folder.data(study.workdir), name)
    os.makedirs(shared, exist_ok=True)
    os.symlink(os.path.relpath(shared, os.path.realpath(job.workdir)), own)


def _launched(command: Sequence[str], cores: Sequence[int]) -> list[str]:
    """The command on these cores, () for all, see launch.py."""
    path = os.path.join(os.path.dirname(__file__), "launch.py")
    numbers = ",".join(map(str, cores))
    return [sys.executable, "-S", path, str(os.getpid()), numbers, *command]


def _steps(job: Job) -> int:
    """The job's last step so far."""
    return metrics.last_step(run_folder.metrics(job.workdir))


def _last_line(path: str) -> str:
    """The last line of a log; "" if it has none."""
    with contextlib.suppress(OSError):
        lines = _tail(path)
        return lines[-1][:300] if lines else ""
    return ""


def _tail(path: str, size: int = 4096) -> list[str]:
    """The lines in the last bytes of a file, without empty ones."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - size, 0))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def left(study: Study) -> Iterator[Job]:
    """The jobs that are not done, runs before their arms."""
    return (job for job in study.jobs if not job.is_done())
