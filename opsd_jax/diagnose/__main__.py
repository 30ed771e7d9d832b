"""The command: parses its flags, opens the run, calls one analysis."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence

import jax

from opsd_jax.data import workdir as workdir_lib
from opsd_jax.diagnose import attention, interventions, kl, output, overview, selection
from opsd_jax.evaluation import summary_tables
from opsd_jax.inputs import checks, cli, paths
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import report_table
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import distributed, run_folder, stopping
from opsd_jax.runtime.stopping import BeforeBatch


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m opsd_jax.diagnose`; errors in the arguments end it with one line and code 1."""
    cli.start()
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    command = shlex.join(["python", "-m", "opsd_jax.diagnose", *argv])
    try:
        distributed.initialize()
        given = "".join(getattr(args, name, "") for name in ("checkpoint", "teacher", "student"))
        with stopping.stoppable("the same command starts the analysis again") as stop:
            folder, words = checkpoint_lib.retry_if_gone(
                lambda: _run(args, command, stop.check), given=given
            )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    if jax.process_index() == 0:
        page = os.path.join(folder, run_folder.PAGE)
        print(*words, f"the page of {os.path.basename(folder)}: {page}", sep="\n")


def _parser() -> argparse.ArgumentParser:
    common = cli.Parser(add_help=False)
    common.add_argument(
        "--workdir",
        required=True,
        help="working folder of a run, or of one of its control arms: W/arms/NAME",
    )
    common.add_argument(
        "--split",
        default="",
        help="split of the examples (default: the run's config.eval.final_split)",
    )
    common.add_argument(
        "--rows",
        type=int,
        default=0,
        help="size of a random subset of the examples of each task (default, or 0: all examples)",
    )
    common.add_argument(
        "--benchmarks",
        default=(),
        type=cli.names,
        help="tasks or families (default: all of the run)",
    )
    common.add_argument(
        "--batch_size", type=int, default=0, help="(default: the run's config.eval.batch_size)"
    )
    cli.add_tensor(common)
    common.add_argument(
        "--seed", type=int, help="seed of noise, sampling and resampling (default: the run's)"
    )
    common.add_argument(
        "--name", default="", help="folder in W/diagnose (default: named after what is measured)"
    )
    parser = cli.Parser(
        prog="python -m opsd_jax.diagnose", description="The paper's analyses of a run."
    )
    analyses = parser.add_subparsers(dest="analysis", required=True)
    compared = analyses.add_parser(
        "kl", parents=[common], help="how much visual thoughts change what the model says"
    )
    compared.instead = {"--checkpoint": "--student or --teacher"}
    compared.add_argument(
        "--teacher", default="", help="a step folder (default: where the run's OPSD stage started)"
    )
    compared.add_argument(
        "--student", default="", help="a step folder (default: the newest of the run)"
    )
    compared.add_argument(
        "--completions",
        default=kl.COMPLETIONS,
        type=cli.names,
        help=f"{', '.join(kl.COMPLETIONS)}; several separated by commas (default: all)",
    )
    compared.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="temperature of sampled completions; 0: most likely token (default: 1)",
    )
    for name, text in (
        ("all", "evaluation in all modes and the three analyses, on one page"),
        ("interventions", "answers with visual thoughts replaced or removed"),
        ("attention", "attention to images, layer by layer"),
    ):
        analysis = analyses.add_parser(name, parents=[common], help=text)
        analysis.instead = {"--student": "--checkpoint", "--teacher": "--checkpoint"}
        analysis.add_argument(
            "--checkpoint", default="", help="a step folder (default: the newest of the run)"
        )
        if name == "attention":
            analysis.add_argument(
                "--official_scale",
                action="store_true",
                help="softmax without 1/sqrt(d), as in the official recorder",
            )
    return parser


def _run(
    args: argparse.Namespace, command: str, before_batch: BeforeBatch
) -> tuple[str, Sequence[str]]:
    """Runs the analysis that the flags ask for: (the folder of its results, its main numbers)."""
    _check(args)
    workdir = os.path.normpath(args.workdir)
    workdir_lib.load_config(workdir)  # raises first if there is no run
    flag = "student" if args.analysis == "kl" else "checkpoint"
    model = checkpoint_lib.step_folder(f"--{flag}", getattr(args, flag), workdir)
    if getattr(args, "teacher", ""):
        args.teacher = checkpoint_lib.step_folder("--teacher", args.teacher, workdir)
    step = checkpoint_lib.metadata(model)["step"]
    base = selection.start_checkpoint(workdir) if args.analysis in ("kl", "all") else ""
    _check_own(args, workdir, (model, getattr(args, "teacher", "")))
    opened = selection.open_run(
        workdir,
        split=args.split,
        benchmarks=args.benchmarks,
        rows=args.rows,
        batch_size=args.batch_size,
        seed=args.seed,
        tensor=args.tensor,
    )
    diagnosis = dataclasses.replace(opened, command=command, before_batch=before_batch)
    name = args.name or "-".join([args.analysis, f"{step:06d}", *_differences(args, diagnosis)])
    folder = run_folder.diagnosis(workdir, name)
    if args.name and os.path.exists(os.path.join(folder, run_folder.SUMMARY)):
        raise FileExistsError(f"{folder} exists: choose another --name, or delete it")
    paths.check_writable("--workdir", folder)
    if args.analysis == "kl":
        if "data" in args.completions and (pid := diagnosis.without_trace()):
            raise ValueError(
                f"example {pid} has no full_text_only_thought, which --completions=data needs: "
                "give --completions=base,student,official"
            )
        possible = kl.completions(diagnosis.session.config)
        kinds = possible if args.completions == kl.COMPLETIONS else args.completions
        if absent := [kind for kind in kinds if kind not in possible]:
            raise ValueError(
                f"--completions={absent[0]}: the released script measures texts between BAGEL's "
                f"bos and eos, and config.prompts.form is 'chat': choose from {', '.join(possible)}"
            )
        comparison = kl.Comparison(args.teacher or base, model, base, kinds, args.temperature)
        found = kl.measure(diagnosis, folder, comparison)
    elif args.analysis == "interventions":
        answers = diagnosis.answers(model, interventions.MODES, name)
        found = interventions.measure(diagnosis, model, answers)
    elif args.analysis == "attention":
        answers = diagnosis.answers(model, attention.MODES, name)
        found = attention.measure(
            diagnosis, folder, model, answers, official_scale=args.official_scale
        )
    else:
        found = overview.measure(diagnosis, folder, model)
    is_own = checkpoint_lib.is_of_run(model, workdir)
    cautions = cautions_lib.of_run(workdir) if is_own else []
    output.write(folder, found, cautions)
    if args.analysis != "kl":
        summary_tables.write_table(workdir)  # with the answers that were asked for
    words = [cautions_lib.OF_THE_RUN, *map(report_table.plain, cautions)] if cautions else []
    return folder, [*found.words, *words]


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that are wrong whatever the run is."""
    cli.check_precision()
    for name in ("workdir", "checkpoint", "teacher", "student"):
        paths.check(f"--{name}", getattr(args, name, ""), orbax=True)
    if args.seed is not None:
        cli.check_seed(args.seed)
    if args.name:
        cli.check_name(args.name)
    cli.check_once("benchmarks", args.benchmarks)
    if args.analysis == "kl":
        for kind in args.completions:
            if kind not in kl.COMPLETIONS:
                raise ValueError(
                    f"--completions={kind}: {checks.choose_from(kind, kl.COMPLETIONS)}"
                )
        cli.check_once("completions", args.completions)
        cli.check_temperature(args.temperature)


def _check_own(args: argparse.Namespace, workdir: str, checkpoints: Sequence[str]) -> None:
    """Raises ValueError for a checkpoint of another run, unless the results have a name."""
    foreign = [x for x in checkpoints if x and not checkpoint_lib.is_of_run(x, workdir)]
    if foreign and not args.name:
        raise ValueError(
            f"{foreign[0]} is not a step of {os.path.realpath(workdir)}/checkpoints: give --name, "
            f"the name of the results in {workdir}/diagnose"
        )


def _differences(args: argparse.Namespace, diagnosis: selection.Diagnosis) -> list[str]:
    """What the name of the results says: everything that is not as the run has it."""
    config = diagnosis.session.config
    found = [args.split] if args.split not in ("", config.eval.final_split) else []
    found += [f"random{args.rows}"] if diagnosis.is_subset else []
    found += args.benchmarks
    found += [f"seed{args.seed}"] if args.seed not in (None, config.seed) else []
    if args.analysis == "kl":
        found += args.completions if args.completions != kl.COMPLETIONS else ()
        found += [f"temperature{args.temperature:g}"] if args.temperature != 1 else []
        if args.teacher:
            found += [f"teacher{checkpoint_lib.metadata(args.teacher)['step']:06d}"]
    elif args.analysis == "attention":
        found += ["official-scale"] if args.official_scale else []
    return found


if __name__ == "__main__":
    main()
