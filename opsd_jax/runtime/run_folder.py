"""Where a run keeps its files, in its folder W. A control arm has the same files in W/arms/NAME.

W/config.json                  every setting
W/metrics.jsonl  W/tb/         one record per logged step; the same for TensorBoard
W/log/<process>.txt            log messages of each process, of all its starts
W/profile/                     traces of steps, if config.log.profile_steps names some
W/checkpoints/<step>/          weights, optimizer, schedule
W/screen.json                  gains of the training examples, where config.data.screen is on
W/samples/<step>/              sampled answers, human-readable
W/eval/<step>-<name>/          predictions.jsonl, summary.json, report.html of an evaluation
W/diagnose/<name>/             summary.json, report.html of an analysis
W/data/                        prepared data, unless config.data.dir names a folder
W/time.json                    where the time went
  W/report.html                  the page of the run: result, curves, samples
  W/report.md  W/report.json     the table of the run and its arms
W/xla_cache/                   compiled programs, unless JAX_COMPILATION_CACHE_DIR is set
"""

import os

SUMMARY = "summary.json"
PREDICTIONS = "predictions.jsonl"
PAGE = "report.html"


def config(workdir: str) -> str:
    """File of the run's settings."""
    return os.path.join(workdir, "config.json")


def metrics(workdir: str) -> str:
    """File of the run's metrics, one JSON object per line."""
    return os.path.join(workdir, "metrics.jsonl")


def tensorboard(workdir: str) -> str:
    """Folder of the run's metrics for TensorBoard."""
    return os.path.join(workdir, "tb")


def log(workdir: str, process: int) -> str:
    """File of the log messages of a process."""
    return os.path.join(workdir, "log", f"{process:03d}.txt")


def profile(workdir: str) -> str:
    """Folder of traces of steps, for XProf and TensorBoard."""
    return os.path.join(workdir, "profile")


def time(workdir: str) -> str:
    """File of the seconds that each phase of the run took."""
    return os.path.join(workdir, "time.json")


def screening(workdir: str) -> str:
    """File of the gains of the training examples."""
    return os.path.join(workdir, "screen.json")


def report(workdir: str) -> str:
    """File of the table of the run and its control arms."""
    return os.path.join(workdir, "report.md")


def page(workdir: str) -> str:
    """File of the page of the run."""
    return os.path.join(workdir, PAGE)


def report_data(workdir: str) -> str:
    """File of the numbers in that table."""
    return os.path.join(workdir, "report.json")


def compiled_programs(workdir: str) -> str:
    """Folder of compiled programs, an absolute path as JAX wants it."""
    return os.path.join(os.path.abspath(workdir), "xla_cache")


def arm(workdir: str, name: str) -> str:
    """Folder of a control arm."""
    return os.path.join(workdir, "arms", name)


def run_of(workdir: str) -> str:
    """Folder W of the run whose control arm has the folder W/arms/NAME; "" for any other folder."""
    run, arms = os.path.split(os.path.dirname(os.path.abspath(workdir)))
    return run if arms == "arms" else ""


def data(workdir: str) -> str:
    """Folder of the run's own data."""
    return os.path.join(workdir, "data")


def checkpoints(workdir: str) -> str:
    """Folder of all checkpoints."""
    return os.path.join(workdir, "checkpoints")


def checkpoint(workdir: str, step: int) -> str:
    """Folder of the checkpoint of a step."""
    return os.path.join(checkpoints(workdir), str(step))


def samples(workdir: str, step: int) -> str:
    """Folder of the samples of a step."""
    return os.path.join(workdir, "samples", f"{step:06d}")


def evaluations(workdir: str) -> str:
    """Folder of the results of all evaluations."""
    return os.path.join(workdir, "eval")


def evaluation(workdir: str, name: str) -> str:
    """Folder of the results of an evaluation, by its full name."""
    return os.path.join(evaluations(workdir), name)


def evaluation_name(step: int, name: str) -> str:
    """Full name of the evaluation of a checkpoint: "000150-none"."""
    return f"{step:06d}-{name}"


def diagnosis(workdir: str, name: str) -> str:
    """Folder of the results of an analysis."""
    return os.path.join(workdir, "diagnose", name)
