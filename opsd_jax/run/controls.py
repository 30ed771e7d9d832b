"""Control arms: ordinary runs that start from the weights with which a run's OPSD stage began.

A control arm is a named set of changes to the run's settings (`config.arms`). Each is a process of
its own in W/arms/NAME, with the run's own command line plus --arm=NAME, so that it can also be
run alone. On CPUs an arm runs while the main run does (a model this small leaves a second core
idle). On accelerators, which belong to one process, arms run one after another after the main run.
"""

import collections
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.runtime import metrics, run_folder
from opsd_jax.runtime.progress import Progress

_LOOK = 2.0  # seconds between two looks at how far an arm is


def settings_of(config: ConfigDict, workdir: str, name: str) -> tuple[ConfigDict, str]:
    """Settings and folder of a control arm of the run in workdir.

    Raises:
      ValueError: no such arm, or a run without an OPSD stage.
      FileNotFoundError: the run is not warmed up.
    """
    if name not in config.arms:
        raise ValueError(f"--arm={name}: the config has the arms {sorted(config.arms)}")
    if "opsd" not in config.stages:
        raise ValueError(
            f"--arm={name}: arms start where the OPSD stage does; config.stages {config.stages} "
            "has none"
        )
    step = config_lib.start_of(config, "opsd")
    start = run_folder.checkpoint(workdir, step)
    if not os.path.isdir(start):
        raise FileNotFoundError(
            f"{start} does not exist: run the same command without --arm first, up to step {step}"
        )
    return config_lib.arm(config, name, start), run_folder.arm(workdir, name)


class ArmsFailedError(RuntimeError):
    """The run itself is done, but a control arm failed."""


class Arms:
    """Runs the control arms of a run as processes; a context manager: if the run stops, so do they.

    Args:
      steps: {name of an arm: number of its steps}, in the order in which they run.
      workdir: folder of the run.
      argv: arguments of the run's own command.
    """

    def __init__(self, steps: Mapping[str, int], workdir: str, argv: Sequence[str]):
        self._steps, self._workdir, self._argv = steps, workdir, argv
        self._queue = collections.deque(steps)
        self._worker: threading.Thread | None = None
        self._failed: list[str] = []
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leaves no process running: arms that still run are asked to save and stop."""
        self._stopped = True
        self._queue.clear()
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            process.wait()
        if self._worker:
            self._worker.join()

    def start(self) -> None:
        """To be called when the run is warmed up: on CPUs a thread runs arms from then on."""
        if jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1 and self._worker is None:
            self._worker = threading.Thread(target=self._work, args=(1,), daemon=True)
            self._worker.start()

    def finish(self) -> None:
        """Runs the arms that are left and waits for all.

        Raises ArmsFailedError, which names those that failed and their logs.
        """
        self._work(0)
        if self._worker:
            self._worker.join()
        if self._failed:
            raise ArmsFailedError("control arms failed: " + "; ".join(self._failed))

    def _work(self, half: int) -> None:
        """Runs arms one after another until none is left.

        With a worker thread, in one half of the cores: two small programs that both spread over all
        cores wait for each other at every matrix product.
        """
        cores = _half_of_cores(half) if self._worker else []
        while True:
            try:
                name = self._queue.popleft()
            except IndexError:
                return
            self._run(name, cores)

    def _run(self, name: str, cores: list[int]) -> None:
        """Runs one arm to its end, with a progress bar.

        cores: those that it may use; [] for all.
        """
        path = run_folder.arm(self._workdir, name)
        os.makedirs(path, exist_ok=True)
        command = [sys.executable, "-m", "opsd_jax.train", *self._argv, f"--arm={name}"]
        print(f"arm {name}: starts, log in {path}/log.txt", file=sys.stderr, flush=True)
        with (
            open(os.path.join(path, "log.txt"), "a", encoding="utf-8") as log,
            Progress(self._steps[name], f"arm {name}") as progress,
        ):
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self._running.add(process)
            if cores:
                os.sched_setaffinity(process.pid, cores)
            if self._stopped:  # while it was being started
                process.terminate()
            while process.poll() is None:
                try:
                    process.wait(_LOOK)
                except subprocess.TimeoutExpired:
                    if done := _steps_done(path):
                        progress.update(done)
            if process.returncode:
                self._failed.append(f"{name} (see {path}/log.txt)")
            self._running.discard(process)


def _steps_done(workdir: str) -> int:
    """The last step in the metrics of a run that is going on."""
    path = run_folder.metrics(workdir)
    records = metrics.read(path) if os.path.exists(path) else []
    return records[-1]["step"] if records else 0


def _half_of_cores(half: int) -> list[int]:
    """The first (0) or second (1) half of this process's cores; [] if they cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    return cores[middle:] if half else cores[:middle]
