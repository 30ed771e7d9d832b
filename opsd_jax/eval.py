"""Answers the questions of benchmarks and scores the answers.

  python -m opsd_jax.eval --workdir=W

  --benchmarks        tasks of the run, by their own name or that of their family; with --data_dir
                      also the public tables there (`tables.KINDS`); all of them by default
  --visual_thoughts   what the model sees; several modes separated by commas:
                        none       the student's context: images and question
                        real       the teacher's context with the example's own visual thoughts;
                                   noise, another example's (swap) or the problem image (image) in
                                   their places; none of them (remove). For tasks whose examples
                                   have visual thoughts; examples without any are counted
                        generated  the model generates images where its text asks for them, as
                                   ThinkMorph does, and sees them. generated-noise, -swap, -remove:
                                   it sees noise, what another example generated, or nothing
  --protocol          prompt, image sizes and decoding of a named protocol
                      (`interleave.PROTOCOLS`); by default the run's own, greedy

  W/eval/<name>/predictions.jsonl   one answer per line
  W/eval/<name>/summary.json        scores
  W/eval/<name>/report.html         all of it, browsable
  W/eval/<name>/answers.jsonl       what has been answered so far
  W/eval/<name>/<table>.tsv         answers for the public harness
  W/eval/<name>/pictures/           generated images
  W/eval/summary.md                 all summaries in W/eval as one table

The paths of the pages are printed last. The same command resumes an evaluation that was killed; a
finished one is scored again without running the model. Training evaluates with the same functions:
the same checkpoint gives the same answers.
"""

import argparse
import os
from collections.abc import Sequence

import jax

from opsd_jax.evaluation import comparison, contexts, summary_tables
from opsd_jax.inputs import cli
from opsd_jax.run import evaluate
from opsd_jax.run.evaluation_request import Request
from opsd_jax.runtime import distributed, run_folder, stopping


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m opsd_jax.eval`; errors in the arguments end it with one line and code 1."""
    cli.start()
    parser = cli.Parser(
        prog="python -m opsd_jax.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        required=True,
        help="of a run, whose newest checkpoint is evaluated, or of one of its arms: W/arms/NAME",
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        help="a step folder (default: the newest of the run), or a released or imported model",
    )
    parser.add_argument(
        "--benchmarks",
        default=(),
        type=cli.names,
        help="tasks or families, public tables (default: all tables of --data_dir, else all tasks "
        "of the run)",
    )
    parser.add_argument("--data_dir", default="", help="folder of the public tables, NAME.tsv")
    parser.add_argument(
        "--visual_thoughts",
        default=("none",),
        type=cli.names,
        help=f"{', '.join(contexts.MODES)}; several separated by commas",
    )
    parser.add_argument(
        "--protocol", default="", help="paper or harness (default: the run's own, greedy)"
    )
    parser.add_argument("--split", default="test", help="of the tasks (default: test)")
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        help="size of a random subset of each benchmark (default, or 0: all examples)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=0,
        help="examples per batch (default: the run's config.eval.batch_size)",
    )
    cli.add_tensor(parser)
    cli.add_dtype(parser)
    cli.add_compute_every(parser)
    parser.add_argument(
        "--on_bad_row",
        choices=("fail", "skip"),
        default="fail",
        help="what to do about rows of a table that cannot be shown or scored; skip lists them in "
        "the summary (default: fail)",
    )
    parser.add_argument(
        "--ban_marker", action="store_true", help="never sample what completes <image_start>"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        help="answers sampled for each example of the run's tasks, for pass@k (default, or 0: one "
        "greedy answer)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="of --samples (default: the run's config.rollout.temperature)",
    )
    parser.add_argument(
        "--seed",
        default=(None,),
        type=cli.whole_numbers,
        help="of noise and sampling; several separated by commas (default: the run's)",
    )
    parser.add_argument(
        "--against",
        default="",
        help="results to compare with, in pairs: a name in W/eval, or a folder",
    )
    parser.add_argument(
        "--name",
        default="",
        help="of the results in W/eval (default: <step>-<mode>, then what differs from the run's "
        "own evaluation: [-banned][-<protocol>][-<split>][-random<rows>][-<benchmarks>]"
        "[-samples<K>][-temperature<T>][-seed<N>][-<dtype>]"
        "[-every<N>])",
    )
    args, summaries = parser.parse_args(argv), {}
    try:
        cli.check_once("seed", args.seed)
        for seed in args.seed:
            if seed is not None:
                cli.check_seed(seed)
        distributed.initialize()
        with stopping.stoppable("the same command continues") as stop:
            for seed in args.seed:
                name = f"{args.name}-seed{seed}" if args.name and len(args.seed) > 1 else args.name
                request = Request(
                    args.workdir,
                    args.visual_thoughts,
                    checkpoint=args.checkpoint,
                    benchmarks=args.benchmarks,
                    data_dir=args.data_dir,
                    protocol=args.protocol,
                    split=args.split,
                    rows=args.rows,
                    ban_marker=args.ban_marker,
                    samples=args.samples,
                    temperature=args.temperature,
                    seed=seed,
                    name=name,
                    batch_size=args.batch_size,
                    on_bad_row=args.on_bad_row,
                    against=args.against,
                    tensor=args.tensor,
                    dtype=args.dtype,
                    compute_every=args.compute_every,
                )
                summaries |= evaluate.evaluate(request, stop.check)
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    if jax.process_index() == 0:
        print(summary_tables.write_table(args.workdir, [*summaries]))
        for name, summary in summaries.items():
            if "against" in summary:
                print(*comparison.in_words(name, summary["against"]), sep="\n")
        for name in summaries:
            folder = run_folder.evaluation(args.workdir, name)
            print(f"the page of {name}: {os.path.join(folder, run_folder.PAGE)}")


if __name__ == "__main__":
    main()
