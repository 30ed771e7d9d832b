"""Control arms: ordinary runs that start from the weights with which a run's OPSD stage began.

A control arm is a named set of changes to the run's settings (`config.arms`), kept in W/arms/NAME.
The run's own command line plus --arm=NAME runs it alone. On a CPU each arm is a process with that
command (`Arms`), which runs while the main run does: a model this small leaves a second core idle.
An accelerator belongs to one process, and several processes work together: there the run's own
process trains its arms, one after another, when the run is done.
"""

import collections
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.data.workdir import read_record
from opsd_jax.inputs import checks, paths
from opsd_jax.run import saves
from opsd_jax.runtime import metrics, run_folder
from opsd_jax.runtime.progress import Progress

_LOOK = 2.0  # seconds between two looks at how far an arm is


def settings_of(config: ConfigDict, workdir: str, name: str) -> tuple[ConfigDict, str]:
    """Settings and folder of a control arm of the run in workdir.

    Raises:
      ValueError: no such arm, or a run without an OPSD stage.
      ConfigMismatchError: the run has other settings than these. An arm with another seed, say,
        would be no control of it.
      FileNotFoundError: there is no run, or it is not warmed up.
    """
    if name not in config.arms:
        raise ValueError(
            f"--arm={name}: there is no such arm; the config has the arms "
            + ", ".join(sorted(config.arms))
            + checks.did_you_mean(name, config.arms)
        )
    if "opsd" not in config.stages:
        raise ValueError(
            f"--arm={name}: arms start where the OPSD stage does; config.stages {config.stages} "
            "has none"
        )
    paths.check_given("--workdir", workdir, orbax=True)
    if not os.path.exists(record := run_folder.config(workdir)):
        raise FileNotFoundError(
            f"{record} does not exist: run the same command without --arm first; the arm {name} "
            "starts from the weights with which the OPSD stage of that run begins"
        )
    try:
        config_check.check_unchanged(read_record(workdir), config)
    except config_check.ConfigMismatchError as error:
        raise config_check.ConfigMismatchError(
            f"--arm={name} is a control of the run in {workdir}, but {error}"
        ) from None
    step, start = config_lib.start_of(config, "opsd"), saves.origin(config, workdir, "opsd")
    if not os.path.isdir(start):
        raise FileNotFoundError(
            f"{start} does not exist: run the same command without --arm first, up to step {step}"
        )
    return config_lib.arm(config, name, start), run_folder.arm(workdir, name)


class ArmsFailedError(RuntimeError):
    """The run itself is done, and so is its page, but control arms failed.

    failed: {name of an arm: why it failed, or where that is written}. arms: all names.
    """

    def __init__(self, failed: Mapping[str, str], arms: Sequence[str]):
        rest = ",".join(arm for arm in arms if arm not in failed) or "'()'"
        why = "; ".join(f"{arm} ({reason})" for arm, reason in failed.items())
        super().__init__(
            f"control arms failed: {why}. Table and page are without them. The same command tries "
            f"again; --config.run_arms={rest} leaves them out"
        )


class Arms:
    """Runs a run's control arms as processes on CPUs; if the run stops, so do they.

    A context manager.

    Args:
      steps: {name of an arm: number of its steps}, in the order in which they run.
      workdir: folder of the run.
      argv: arguments of the run's own command.
    """

    def __init__(self, steps: Mapping[str, int], workdir: str, argv: Sequence[str]):
        self._steps, self._workdir, self._argv = steps, workdir, argv
        self._queue = collections.deque(steps)
        self._workers: list[threading.Thread] = []
        self._failed: dict[str, str] = {}
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
        self._join()

    def start(self) -> None:
        """To be called when the run is warmed up: a thread per core then runs arms."""
        cores = _cores()
        if len(cores) > 1 and not self._workers:
            for core in cores[::-1][: len(self._steps)]:
                self._workers.append(threading.Thread(target=self._work, args=(core,), daemon=True))
                self._workers[-1].start()

    def _join(self) -> None:
        for worker in self._workers:
            worker.join()

    def finish(self) -> dict[str, str]:
        """Runs the arms that are left and waits for all.

        Returns {name: where its log is} of those that failed.
        """
        if not self._workers:
            self._work(None)
        self._join()
        return self._failed

    def _work(self, core: int | None) -> None:
        """Runs arms one after another until none is left, each on this core alone; None for all.

        Two small programs that both spread over all cores wait for each other at every matrix
        product.
        """
        while True:
            try:
                name = self._queue.popleft()
            except IndexError:
                return
            self._run(name, core)

    def _run(self, name: str, core: int | None) -> None:
        """Runs one arm to its end, with a progress bar."""
        path = run_folder.arm(self._workdir, name)
        os.makedirs(path, exist_ok=True)
        command = [sys.executable, "-m", "opsd_jax.train", *self._argv, f"--arm={name}"]
        # Text and end of line in one call: arms start at the same time.
        sys.stderr.write(f"arm {name}: starts, log in {path}/log.txt\n")
        sys.stderr.flush()
        with (
            open(os.path.join(path, "log.txt"), "a", encoding="utf-8") as log,
            Progress(self._steps[name], f"arm {name}") as progress,
        ):
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self._running.add(process)
            if core is not None:
                os.sched_setaffinity(process.pid, [core])
            if self._stopped:  # while it was being started
                process.terminate()
            shown = 0
            while process.poll() is None:
                try:
                    process.wait(_LOOK)
                except subprocess.TimeoutExpired:
                    done, numbers = metrics.progress(run_folder.metrics(path))
                    if done != shown:  # its evaluations follow its last step
                        progress.update(done, **numbers)
                        shown = done
            if process.returncode:
                self._failed[name] = f"see {path}/log.txt"
            self._running.discard(process)


def _cores() -> Sequence[int | None]:
    """Cores that this process may use; None for each where the system lets nobody choose."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)
