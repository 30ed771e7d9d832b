"""The command: reads a study, runs what is left of it, and writes its table and its page.

  python -m opsd_jax.study --config=configs/study.py --workdir=S

The same command continues a study. Exit codes: 0 all jobs are done; 1 wrong arguments, or a job
failed (the table says which); 42 stopped as asked, after all commands have saved.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from opsd_jax import config as config_lib
from opsd_jax import config_flags
from opsd_jax.inputs import checks, cli, paths
from opsd_jax.runtime import distributed, locks, run_folder, stopping
from opsd_jax.study import grid, jobs, page, scores, slots, table

_CHANGES = "--config.changes."  # of the runs' settings
_PRESETS = (  # of configs/study.py, for the help
    "content",
    "traces",
    "wrong",
    "length",
    "loss",
    "teacher",
    "policy",
    "privileged",
    "transfer",
    "all",
    "smoke",
)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m opsd_jax.study`; exit codes are in the module's docstring."""
    cli.start()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", "opsd_jax.study", *argv])
    settings = [argument for argument in argv if argument.startswith("--config.")]
    args = _parser().parse_args([argument for argument in argv if argument not in settings])
    try:
        paths.check_given("--workdir", args.workdir, orbax=True)
        if args.list and args.table:
            raise ValueError("--list with --table: give one of them")
        study = grid.read(*_given(args.config, settings, args.workdir))
        if args.list:
            _list(study)
            return
        paths.check_writable("--workdir", args.workdir)
        if os.path.exists(run_folder.config(study.workdir)):
            raise ValueError(
                f"--workdir={args.workdir} is the folder of a run: give the study another one"
            )
        count = os.environ.get("OPSD_NUM_PROCESSES") or str(distributed.cluster_size())
        if not args.table and count != "1":
            raise ValueError(
                f"a study starts its commands on one machine, and this is one of {count} "
                "processes (OPSD_NUM_PROCESSES, Slurm or a TPU of several hosts). On one machine, "
                "write their settings with --table and print them with --list; start each on all "
                "machines, then give --table again"
            )
        with locks.only_writer(study.workdir, inside=True):
            failed = _run(study, command, start=not args.table)
    except (ValueError, OSError, RuntimeError) as error:
        distributed.end_with_error(error)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(study.jobs)} jobs are not done; see above")


def _list(study: grid.Study) -> None:
    """Prints the commands that are left; writes nothing."""
    left = list(jobs.left(study))
    for job in left:
        print(shlex.join(job.command()))
    if not left:
        print(f"all {len(study.jobs)} jobs are done", file=sys.stderr)
    if any(not os.path.exists(job.settings) for job in left):
        print(
            "the files of settings that these commands read are not written yet: give the command "
            "with --table first, then with --list again",
            file=sys.stderr,
        )


def _given(config: str, settings: Sequence[str], workdir: str):
    """Arguments of `grid.read`. Raises ValueError for a setting that a study does not have."""
    known = grid.default()
    for argument in settings:
        key = argument.removeprefix("--config.").partition("=")[0]
        if key.partition(".")[0] not in known:
            meant = checks.did_you_mean(key.partition(".")[0], known)
            if key in config_lib.default_values() or not meant:
                meant = f". A setting of all its runs is changed by {_CHANGES}{key}=VALUE"
            raise ValueError(
                f"{argument}: a study has no such setting, only {', '.join(known)}{meant}"
            )
    changes = [a for a in settings if a.startswith(_CHANGES)]
    own = [argument for argument in settings if argument not in changes]
    of_runs = [argument.replace(_CHANGES, "--config.", 1) for argument in changes]
    return config_flags.read([f"--config={config}", *own]), workdir, of_runs


def _run(study: grid.Study, command: str, *, start: bool) -> dict[str, str]:
    """Runs the study and writes what it found; {name of a job: why it is not done}.

    Args:
      command: for the page.
      start: whether to start what is left.
    """
    failed: dict[str, str] = {}
    grid.write_settings(study)
    if start and any(jobs.left(study)):
        runs = [job.config for job in study.jobs if job.is_run]
        with stopping.stoppable("the same command continues the study") as stop:
            stop.promise = "asking all commands to save and to stop"
            failed = jobs.run(study, slots.divide(study.parallel, runs), stop)
    found = scores.read(study)
    rows = scores.rows(study, found, failed)
    table.write(study, rows, failed)
    print(table.in_terminal(study, rows))
    print(f"the page of the study: {page.write(study, found, rows, command)}")
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m opsd_jax.study",
        description="A grid of runs and control arms, and one table of them.",
    )
    parser.add_argument(
        "--config",
        required=True,
        help="file of the study, such as configs/study.py:content; its first lines explain the "
        f"presets: {', '.join(_PRESETS)}",
    )
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        help="a setting of the study, such as --config.seeds=0,1; --config.changes.KEY is a "
        "setting of all its runs",
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of the study; a study that it holds is continued"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the commands that are left, runs before their arms; write and start nothing",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="write the settings of the runs, the table and the page of what is done, and start "
        "nothing",
    )
    of_runs = (key for key in config_lib.default_values() if key.rpartition(".")[2] != "seed")
    parser.settings = [f"--config.{key}" for key in grid.default()]
    parser.settings += [f"{_CHANGES}{key}" for key in of_runs]
    return parser


if __name__ == "__main__":
    main()
