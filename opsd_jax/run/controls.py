"""Control arms: ordinary runs that start from the weights with which a run's OPSD stage began.

An arm is a named set of changes to the run's config (`config.arms`). Each is a process of its own in
<workdir>/arms/<name>, started by the run's own command line plus --arm=NAME, so that it can be run alone as well.
On CPUs one arm runs beside the main run (a model this small leaves a second core idle); on accelerators, which
belong to one process, arms run one after another when the main run has ended.
"""

import collections
import os
import subprocess
import sys
import threading

import jax

from opsd_jax import config as config_lib
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation.results import read_summary
from opsd_jax.runtime import files


def settings_of(config, workdir: str, name: str):
    """(config, workdir) of an arm. ValueError for an unknown one, FileNotFoundError if the run is not warmed up."""
    if name not in config.arms:
        raise ValueError(f"--arm={name}: the config has the arms {sorted(config.arms)}")
    ends = config_lib.stage_ends(config)
    if "opsd" not in ends:
        raise ValueError(
            f"--arm={name}: arms start where the OPSD stage does; config.stages {config.stages} has none"
        )
    warm = ends["opsd"] - config.opsd.steps
    start = os.path.join(workdir, "checkpoints", str(warm))
    if not os.path.isdir(start):
        raise FileNotFoundError(
            f"{start} is not there: run the same command without --arm first, up to step {warm}"
        )
    return config_lib.arm(config, name, start), os.path.join(workdir, "arms", name)


class ArmsFailedError(RuntimeError):
    """The run itself is done; a control arm is not."""


class Arms:
    """Runs the arms of a run, as processes. A context manager: where the run stops, they stop too."""

    def __init__(self, names, workdir: str, argv):
        self._queue, self._workdir, self._argv = collections.deque(names), workdir, argv
        self._worker, self._failed, self._running, self._stopped = None, [], set(), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leaves no process behind: arms that still run are asked to save and stop."""
        self._stopped = True
        self._queue.clear()
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            process.wait()
        if self._worker:
            self._worker.join()

    def start(self) -> None:
        """Called when the run is warmed up: on CPUs a thread now runs arms beside the main run."""
        if jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1 and self._worker is None:
            self._worker = threading.Thread(target=self._work, args=(1,), daemon=True)
            self._worker.start()

    def finish(self) -> None:
        """Runs what is left and waits for all. ArmsFailedError names those that failed, with their logs."""
        self._work(0)
        if self._worker:
            self._worker.join()
        if self._failed:
            raise ArmsFailedError("control arms failed: " + "; ".join(self._failed))

    def _work(self, half: int) -> None:
        """Runs arms one after another until none is left. On CPUs in one half of the cores: two small programs that
        both spread over all cores wait for each other at every matrix product."""
        cores = (
            sorted(os.sched_getaffinity(0))
            if self._worker and hasattr(os, "sched_getaffinity")
            else []
        )
        middle = len(cores) // 2
        cores = cores[middle:] if half else cores[:middle]
        while True:
            try:
                name = self._queue.popleft()
            except IndexError:
                return
            folder = os.path.join(self._workdir, "arms", name)
            os.makedirs(folder, exist_ok=True)
            command = [sys.executable, "-m", "opsd_jax.train", *self._argv, f"--arm={name}"]
            print(
                f"arm {name}: {' '.join(command[1:])}  (log: {folder}/log.txt)",
                file=sys.stderr,
                flush=True,
            )
            with open(os.path.join(folder, "log.txt"), "a", encoding="utf-8") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                self._running.add(process)
                if cores:
                    os.sched_setaffinity(process.pid, cores)
                if self._stopped:  # while it was being started
                    process.terminate()
                if process.wait():
                    self._failed.append(f"{name} (see {folder}/log.txt)")
                self._running.discard(process)


def report(workdir: str, names) -> str:
    """The table of a run and its arms, also written to report.md and report.json in the workdir.

    Beside each text-only accuracy it has that of the same weights with the rows' true visual thoughts, where the final
    evaluation measured it: training changes how well a model reads them.

    Raises FileNotFoundError where an evaluation is missing, ValueError where its summary is cut.
    """
    config, rows = load_config(workdir), []
    warm = config_lib.stage_ends(config)["opsd"] - config.opsd.steps
    for what, kind in (
        ("teacher: start, with visual thoughts", "real"),
        ("start, text only", "none"),
        ("start, text only, `<image_start>` banned", "none-banned"),
    ):
        path = _summary(workdir, warm, kind)
        if os.path.exists(path):
            rows.append({"arm": what, **_read(path)})
            if kind == "none":
                _add_reading(rows[-1], workdir, warm)
    for name, folder in (
        ("OPSD", workdir),
        *((f"arm {n}", os.path.join(workdir, "arms", n)) for n in names),
    ):
        last = max(config_lib.stage_ends(load_config(folder)).values())
        row = {"arm": f"{name}, text only", **_read(_summary(folder, last, "none"))}
        _add_reading(row, folder, last)
        path = _summary(folder, last, "kl")
        if os.path.exists(path):
            for task, kl in read_summary(path)["tasks"].items():
                row["tasks"][task] |= {
                    "kl": kl["after"],
                    "kl_before": kl["before"],
                    "closure": kl["closure"],
                }
        rows.append(row)
    lines = [
        "| arm | task | accuracy | 95 % interval | with true visual thoughts | n | tokens | KL to teacher | closure |",
        "|---" * 9 + "|",
    ]
    interval = lambda b: f"{100 * b['interval_95'][0]:.1f}–{100 * b['interval_95'][1]:.1f}"
    for row in rows:
        for task, b in row["tasks"].items():
            read = (
                f"{100 * b['real']['overall']:.1f} % ({interval(b['real'])})" if "real" in b else ""
            )
            kl = (
                f"{b['kl_before']:.3f} -> {b['kl']:.3f} | {100 * b['closure']:.0f} %"
                if "kl" in b
                else " | "
            )
            lines.append(
                f"| {row['arm']} | {task} | {100 * b['overall']:.1f} % | {interval(b)} | {read} | "
                f"{b['n']} | {b['mean_output_tokens']:.1f} | {kl} |"
            )
    text = "\n".join(lines) + "\n"
    files.write(os.path.join(workdir, "report.md"), text)
    files.write_json(os.path.join(workdir, "report.json"), rows)
    return text


def _summary(folder, step, kind):
    return os.path.join(folder, "eval", f"{step:06d}-{kind}", "summary.json")


def _add_reading(row, folder, step):
    """Adds `real` to each task of a text-only row: how the same weights answer with the true visual thoughts."""
    path = _summary(folder, step, "real")
    if os.path.exists(path):
        for task, b in _read(path)["tasks"].items():
            row["tasks"][task]["real"] = {k: b[k] for k in ("overall", "interval_95")}


def _read(path):
    keys = ("overall", "interval_95", "n", "mean_output_tokens", "seconds_per_sample")
    return {
        "tasks": {
            task: {k: b[k] for k in keys} for task, b in read_summary(path)["benchmarks"].items()
        }
    }
