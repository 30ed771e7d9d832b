"""Answers to every question of a benchmark, scored: `python -m opsd_jax.eval --workdir=W`.

  --benchmarks        tasks of the run, by their own name or that of their family; with --data_dir also the public
                      tables there (`benchmarks.KINDS`); all that there are if not given
  --visual_thoughts   what the model sees, several separated by commas:
                        none       the student: pictures and question of the row
                        real       the teacher's context with the row's own visual thoughts; noise, another row's (swap)
                                   or the problem image (image) in their places; none of them (remove): tasks whose rows
                                   have visual thoughts, those without are counted
                        generated  the model draws them where its text asks for it, as ThinkMorph does, and sees them;
                                   generated-noise, -swap, -remove: it sees noise, what another row drew, or nothing
  --protocol          prompt, picture sizes and decoding of a named protocol (`generate.PROTOCOLS`); the run's own and
                      greedy if not given

  W/eval/<name>/predictions.jsonl   one answer a line        W/eval/<name>/<table>.tsv   for the public harness
  W/eval/<name>/summary.json        scores                   W/eval/<name>/pictures/     what was drawn
  W/eval/<name>/report.html         all of it to leaf through
  W/eval/<name>/answers.jsonl       what was answered so far
  W/eval/summary.md                 all summaries in W/eval as one table

An evaluation that was killed goes on where it stopped when the same command comes again, and one that is done is scored
again without asking. Training evaluates with the same functions: the same checkpoint gives the same answers.
"""

import argparse

import jax

from opsd_jax.evaluation import contexts, results
from opsd_jax.inputs import cli
from opsd_jax.run import job
from opsd_jax.run.request import Request
from opsd_jax.runtime import distributed, stopping


def main(argv=None) -> None:
    """`python -m opsd_jax.eval`; errors in the arguments end it with one line and code 1."""

    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.eval",
        description="Answer the questions of benchmarks and score the answers.",
    )
    parser.add_argument(
        "--workdir", required=True, help="of a run, or of one of its arms: W/arms/NAME"
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
        help="tasks or families, public tables (default: all tables of --data_dir, else all of the run)",
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
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        help="a random subset of so many rows of each benchmark (default, or 0: all)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=0, help="rows (default: the run's config.eval.batch_size)"
    )
    parser.add_argument(
        "--on_bad_row",
        choices=("fail", "skip"),
        default="fail",
        help="rows of a table that cannot be shown or scored; skip lists them in the summary",
    )
    parser.add_argument(
        "--ban_marker", action="store_true", help="never sample what completes <image_start>"
    )
    parser.add_argument(
        "--seed",
        default=(None,),
        type=cli.whole_numbers,
        help="of noise and sampling; several separated by commas (default: the run's)",
    )
    parser.add_argument(
        "--against", default="", help="results to compare with: a name in W/eval, or a folder"
    )
    parser.add_argument(
        "--name",
        default="",
        help="of the results in W/eval (default: <step>-<mode>[-banned][-<protocol>])",
    )
    args = parser.parse_args(argv)
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
                    seed=seed,
                    name=name,
                    batch_size=args.batch_size,
                    on_bad_row=args.on_bad_row,
                    against=args.against,
                )
                job.evaluate(request, stop.check)
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    if jax.process_index() == 0:
        print(results.write_table(args.workdir), end="")


if __name__ == "__main__":
    main()
