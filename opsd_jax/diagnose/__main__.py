"""The command: one analysis, or evaluation in all modes and all analyses on one page."""

import argparse
import dataclasses
import os

from opsd_jax.data import workdir as workdir_lib
from opsd_jax.diagnose import attention, interventions, kl, runs
from opsd_jax.evaluation import charts, contexts, html, results
from opsd_jax.inputs import cli, paths
from opsd_jax.run import job
from opsd_jax.run.request import Request
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import distributed, stopping


def run_all(run: runs.Run, folder: str, *, checkpoint: str) -> tuple[str, list[str]]:
    """Answers in every mode that the model and its rows allow (`eval.evaluate_run`), with those of the weights that
    training started from, then the three analyses; one page that contains the pages of the analyses."""
    modes = (
        "none",
        *contexts.CONTEXTS,
        *(contexts.GENERATED if run.config.model.generation.on else ()),
    )
    request = Request(
        run.workdir,
        modes,
        checkpoint=checkpoint,
        benchmarks=run.tasks,
        split=run.split,
        rows=run.limit,
        batch_size=run.batch_size,
        seed=run.seed,
        name="" if _own(run.workdir, checkpoint) else os.path.basename(folder),
    )
    summaries = job.evaluate(request, run.before_batch)
    base, traced = runs.start(run.workdir), run.without_trace() is None
    before = {}
    if os.path.realpath(base) != os.path.realpath(checkpoint):
        started = dataclasses.replace(request, modes=("none", "real"), checkpoint=base, name="")
        before = job.evaluate(started, run.before_batch)
    analyses = {
        "kl": lambda to: kl.measure(
            run,
            to,
            teacher=base,
            student=checkpoint,
            base=base,
            kinds=[kind for kind in kl.COMPLETIONS if kind != "data" or traced],
        ),
        "interventions": lambda to: interventions.measure(run, to, checkpoint=checkpoint),
        "attention": lambda to: attention.measure(run, to, checkpoint=checkpoint),
    }
    pages = {name: analyse(os.path.join(folder, name)) for name, analyse in analyses.items()}
    summary = {
        "analysis": "all",
        "checkpoint": checkpoint,
        **run.facts(),
        "evaluations": [*summaries, *before],
        "analyses": list(analyses),
    }
    return runs.finish(folder, summary, lambda s: all_page(run, s, summaries, before, pages))


def all_page(
    run: runs.Run, summary: dict, summaries: dict, before: dict, pages: dict
) -> tuple[str, list[str]]:
    """(title, HTML parts): accuracies, tokens and seconds of all modes, then the pages of the analyses.

    summaries, before: of the model in all modes, and of the weights that its training started from in some.
    """
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, split {runs.rows_text(summary)}. One model answers the same questions: from the "
            "picture alone (**none**, the student); as the teacher with the rows' own visual thoughts (**real**), with **noise**, "
            "another row's (**swap**), the problem once more (**image**) or nothing (**remove**) in their places; and, if it can "
            "draw, with pictures that it draws itself (**generated**), or again with something else in the places of those. **Before "
            "training**: the weights that the run's training started from, on the same rows; **real** beside it is what training "
            "did to how the model reads true visual thoughts."
        ),
        html.heading("Answers"),
    ]
    for task in run.tasks:
        found = [(s["mode"], s["benchmarks"][task]) for s in summaries.values()]
        found += [(f"{s['mode']}, before training", s["benchmarks"][task]) for s in before.values()]
        parts += [
            html.heading(task, 3),
            charts.intervals(
                [
                    (mode, results.percent(b), *(100 * x for x in b["interval_95"]))
                    for mode, b in found
                ]
            ),
        ]
        text = dict(found)["none"]["seconds_per_sample"]
        rows = [
            [
                mode,
                results.percent(b),
                b["n"],
                b["mean_output_tokens"],
                b["seconds_per_sample"],
                b["seconds_per_sample"] and text and b["seconds_per_sample"] / text,
                b["timed_samples"],
                b.get("pictures_per_sample"),
            ]
            for mode, b in found
        ]
        parts += [
            html.table(
                [
                    "sees",
                    "accuracy %",
                    "rows",
                    "tokens",
                    "s/sample",
                    "times none",
                    "rows timed",
                    "pictures drawn",
                ],
                rows,
            ),
            html.note(
                "Seconds leave out batches that compiled a program. Paper: drawing takes 14.3 times as long "
                f"as answering in text. Every answer to leaf through: {run.workdir}/eval/*/report.html"
            ),
        ]
    for title, inner in pages.values():
        parts += [html.heading(title, 1), *inner]
    return f"Evaluation and diagnosis of {os.path.basename(os.path.normpath(run.workdir))}", parts


def diagnose(args, before_batch=lambda: None) -> str:
    """Runs the analysis that the parsed arguments ask for; the folder of its results."""
    cli.check_precision()
    for name in ("workdir", "checkpoint", "teacher", "student"):
        paths.check(f"--{name}", getattr(args, name, ""), orbax=True)
    if args.seed is not None:
        cli.check_seed(args.seed)
    if args.name:
        cli.check_name(args.name)
    cli.check_once("benchmarks", args.benchmarks)
    what, workdir = args.analysis, os.path.normpath(args.workdir)
    config = workdir_lib.load_config(workdir)  # no run: said first
    given = args.student if what == "kl" else args.checkpoint
    model = given or checkpoint_lib.newest(workdir)
    step = checkpoint_lib.metadata(model)["step"]
    foreign = [x for x in (given, getattr(args, "teacher", "")) if x and not _own(workdir, x)]
    if foreign and not args.name:
        raise ValueError(
            f"{foreign[0]} is no step of {os.path.realpath(workdir)}/checkpoints: say with --name under which "
            f"name the results shall stand in {workdir}/diagnose"
        )
    differs = [args.split] if args.split not in ("", config.eval.final_split) else []
    run = runs.open_run(
        workdir,
        split=args.split,
        benchmarks=args.benchmarks,
        limit=args.rows,
        batch_size=args.batch_size,
        seed=args.seed,
        before_batch=before_batch,
    )
    differs += [f"random{args.rows}"] if run.is_subset else []
    differs += args.benchmarks
    differs += [f"seed{args.seed}"] if args.seed not in (None, config.seed) else []
    if what == "kl":
        for kind in args.completions:
            if kind not in kl.COMPLETIONS:
                raise ValueError(f"--completions={kind}: choose from {', '.join(kl.COMPLETIONS)}")
        cli.check_once("completions", args.completions)
        cli.check_temperature(args.temperature)
        base = runs.start(workdir)
        teacher = args.teacher or base
        differs += args.completions if args.completions != kl.COMPLETIONS else ()
        differs += [f"temperature{args.temperature:g}"] if args.temperature != 1 else []
        if args.teacher:
            differs += [f"teacher{checkpoint_lib.metadata(teacher)['step']:06d}"]
    elif what == "all":
        runs.start(workdir)  # nothing to compare: said before anything is answered
    elif what == "attention":
        differs += ["official-scale"] if args.official_scale else []
    folder = os.path.join(
        workdir, "diagnose", args.name or "-".join([what, f"{step:06d}", *differs])
    )
    if args.name and os.path.exists(os.path.join(folder, "summary.json")):
        raise FileExistsError(f"{folder} exists: choose another --name, or delete it")
    paths.check_writable("--workdir", folder)
    if what == "kl":
        if "data" in args.completions and (pid := run.without_trace()):
            raise ValueError(
                f"row {pid} has no full_text_only_thought, which --completions=data needs: give "
                "--completions=base,student,official"
            )
        kl.measure(
            run,
            folder,
            teacher=teacher,
            student=model,
            base=base,
            kinds=args.completions,
            temperature=args.temperature,
        )
    elif what == "interventions":
        interventions.measure(run, folder, checkpoint=model)
    elif what == "attention":
        attention.measure(run, folder, checkpoint=model, official_scale=args.official_scale)
    else:
        run_all(run, folder, checkpoint=model)
    return folder


def _own(workdir, checkpoint) -> bool:
    """Whether a checkpoint is a step of the run."""
    steps = os.path.realpath(os.path.join(workdir, "checkpoints"))
    return os.path.realpath(os.path.dirname(os.path.normpath(checkpoint))) == steps


def main(argv=None) -> None:
    """`python -m opsd_jax.diagnose`; errors in the arguments end it with one line and code 1."""

    cli.start()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--workdir", required=True, help="of a run, or of one of its arms: W/arms/NAME"
    )
    common.add_argument(
        "--split", default="", help="of the rows (default: the run's config.eval.final_split)"
    )
    common.add_argument(
        "--rows",
        type=int,
        default=runs.ROWS,
        help=f"a random subset of so many rows of each task, 0 for all (default: {runs.ROWS})",
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
    common.add_argument(
        "--seed", type=int, help="of noise, sampling and resampling (default: the run's)"
    )
    common.add_argument(
        "--name", default="", help="of the results in W/diagnose (default: tells what was measured)"
    )
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.diagnose", description="The paper's analyses of a run."
    )
    analyses = parser.add_subparsers(dest="analysis", required=True)
    compared = analyses.add_parser(
        "kl", parents=[common], help="how much visual thoughts change what the model says"
    )
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
        help="of sampled completions; 0: most likely token (default: 1)",
    )
    for name, text in (
        ("all", "evaluation in all modes and the three analyses, on one page"),
        ("interventions", "answers with visual thoughts replaced or removed"),
        ("attention", "attention to pictures, layer by layer"),
    ):
        analysis = analyses.add_parser(name, parents=[common], help=text)
        analysis.add_argument(
            "--checkpoint", default="", help="a step folder (default: the newest of the run)"
        )
    analysis.add_argument(
        "--official_scale",
        action="store_true",
        help="softmax without 1/sqrt(d), as officially recorded",
    )
    args = parser.parse_args(argv)
    try:
        distributed.initialize()
        given = "".join(getattr(args, name, "") for name in ("checkpoint", "teacher", "student"))
        with stopping.stoppable("the same command starts the analysis again") as stop:
            folder = checkpoint_lib.retry_if_gone(
                lambda: diagnose(args, before_batch=stop.check), given=given
            )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
