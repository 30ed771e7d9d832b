"""Prepares data for training.

  python -m opsd_jax.data prepare --source=DIR --target=DIR [--columns=text:solution]
  python -m opsd_jax.data make-mini --target=DIR [--families=maze,chart] [--train=4000]
  python -m opsd_jax.data sizes --config=FILE [--config.data.dir=DIR ...]
  python -m opsd_jax.data index --config=FILE [--config.data.dir=DIR ...]

`prepare` converts parquet files in the released layout, or JSONL files, to ArrayRecord files that
TFDS reads. `make-mini` makes the procedural tasks and prepares them. `sizes` prints what the
examples need of `config.data.buckets`, and the options to give for a run on them. `index` finds the
bucket of each example ahead of a run, which then starts at once.
"""

import argparse
import sys
from collections.abc import Sequence

from opsd_jax import config_flags, tasks
from opsd_jax.data import bucket_index, procedural, sizes
from opsd_jax.data.prepare import Part, prepare
from opsd_jax.inputs import checks, cli, paths
from opsd_jax.runtime import distributed


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; errors in the data end it with one line and exit status 1."""
    cli.start()
    argv = sys.argv[1:] if argv is None else argv
    settings = [argument for argument in argv if argument.startswith("--config.")]
    args = _parser().parse_args([argument for argument in argv if argument not in settings])
    try:
        if args.command in ("sizes", "index"):
            paths.check("--workdir", args.workdir)
            config = config_flags.read([f"--config={args.config}", *settings])
            if args.command == "index":
                print(bucket_index.make(config, args.workdir))
            else:
                cli.check_number("buckets", args.buckets, 1)
                print(sizes.report(config, args.workdir, args.buckets))
            return
        if settings:
            raise ValueError(f"{settings[0]}: settings belong to the commands sizes and index")
        if args.command == "prepare":
            cli.check_number("limit", args.limit, 1)
            report = prepare(
                args.source,
                args.target,
                Part(limit=args.limit, columns=args.columns),
                on_bad_row=args.on_bad_row,
                overwrite=args.overwrite,
            )
            print(report)
        else:
            procedural.make_procedural(args.target, _make_settings(args))
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    print(f"written to {args.target}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m opsd_jax.data", description="Prepare data for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="a folder of parquet or JSONL -> ArrayRecord that TFDS reads"
    )
    prepare.add_argument(
        "--source",
        required=True,
        help="<Task>/data/train-*.parquet, the released layout, or <Task>/train.jsonl, with "
        "columns by name or chat messages; or one task",
    )
    prepare.add_argument("--target", required=True, help="the TFDS data_dir to write")
    prepare.add_argument(
        "--on_bad_row",
        default="fail",
        choices=("fail", "skip"),
        help="what to do about rows that cannot be trained on; skip names them in report.json "
        "(default: fail)",
    )
    prepare.add_argument(
        "--columns",
        default=(),
        type=cli.names,
        help="further columns to keep, such as text:solution,images:crops: a text, or an image or "
        "a list of images, which contexts may show (default: none)",
    )
    prepare.add_argument("--limit", type=int, help="first rows of each split only (default: all)")
    prepare.add_argument(
        "--overwrite", action="store_true", help="replace rows prepared from other files"
    )
    mini = commands.add_parser("make-mini", help="make procedural tasks and prepare them")
    mini.add_argument("--target", required=True, help="the TFDS data_dir to write")
    mini.add_argument(
        "--families",
        default=tasks.VISUAL,
        type=cli.names,
        help=f"{', '.join(tasks.FAMILIES)}; several separated by commas (default: those with "
        f"images, {', '.join(tasks.VISUAL)})",
    )
    for split, count in (("train", 4000), ("validation", 512), ("test", 512)):
        mini.add_argument(f"--{split}", type=int, default=count, help="examples of each family")
    mini.add_argument(
        "--difficulty",
        default="default",
        choices=("easy", "default", "hard"),
        help="named settings of each family",
    )
    mini.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    mini.add_argument(
        "--wrong_traces",
        type=float,
        default=0.0,
        help="share of the train examples whose text trace is wrong (default: 0)",
    )
    fit = commands.add_parser("sizes", help="what the examples need of config.data.buckets")
    index = commands.add_parser(
        "index", help="the bucket of each example, kept beside the prepared data"
    )
    for command in (fit, index):
        command.settings = config_flags.options()
        command.add_argument(
            "--config", required=True, help="file of the run's settings, see configs/"
        )
        command.add_argument(
            "--config.KEY", metavar="VALUE", help="a setting, such as --config.data.dir=DIR"
        )
        command.add_argument(
            "--workdir", default="", help="folder of the run, if its data are there (W/data)"
        )
    fit.add_argument(
        "--buckets",
        type=int,
        default=1,
        help="how many buckets to print: more need less padding and more compilations (default: 1)",
    )
    return parser


def _make_settings(args: argparse.Namespace) -> dict:
    """The settings of the procedural tasks, as in `config.data.make`.

    Raises ValueError for wrong flags.
    """
    paths.check_given("--target", args.target)
    counts = {split: getattr(args, split) for split in tasks.SPLITS}
    cli.check_once("families", args.families)
    for split, count in counts.items():
        cli.check_number(split, count, 0)
    if not any(counts.values()):
        raise ValueError(
            "--train, --validation and --test are all 0: give at least one split an example"
        )
    cli.check_seed(args.seed)
    checks.number("--wrong_traces", args.wrong_traces, float, "[0, 1]")
    return {
        "families": args.families,
        **counts,
        "difficulty": args.difficulty,
        "seed": args.seed,
        "wrong_traces": args.wrong_traces,
    }


if __name__ == "__main__":
    main()
