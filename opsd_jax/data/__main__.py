"""Prepared rows -> batches of contexts on the device; and the command line that prepares them.

  python -m opsd_jax.data prepare --source=PARQUET_DIR --target=DIR [--on_bad_row=skip]
  python -m opsd_jax.data make-mini --target=DIR [--families=maze,chart] [--train=4000]

Every batch is a pure function of (seed, step): a host needs the step number alone to resume, and any number of
hosts read the same global batches.
"""

import argparse
import os

from opsd_jax import (
    tasks,
)
from opsd_jax.data import prepare as prepare_lib
from opsd_jax.data import procedural, schema
from opsd_jax.inputs import cli, paths
from opsd_jax.runtime import distributed, locks


def main(argv=None) -> None:
    """`python -m opsd_jax.data prepare | make-mini`; errors in the data end it with one line and code 1."""
    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.data", description="Prepare data for training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="a folder of parquet -> ArrayRecord that TFDS reads"
    )
    prepare.add_argument(
        "--source",
        required=True,
        help="<Task>/data/train-*.parquet, the released layout, or one task",
    )
    prepare.add_argument("--target", required=True, help="the TFDS data_dir to write")
    prepare.add_argument("--on_bad_row", default="fail", choices=("fail", "skip"))
    prepare.add_argument("--limit", type=int, help="first rows of each split only")
    prepare.add_argument("--overwrite", action="store_true")
    mini = commands.add_parser("make-mini", help="make procedural tasks and prepare them")
    mini.add_argument("--target", required=True)
    mini.add_argument("--families", default=tuple(tasks.FAMILIES), type=cli.names)
    for split, count in (("train", 4000), ("validation", 512), ("test", 512)):
        mini.add_argument(f"--{split}", type=int, default=count, help="rows of each family")
    mini.add_argument("--difficulty", default="default", choices=("easy", "default", "hard"))
    mini.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            cli.check_number("limit", args.limit, 1)
            print(
                prepare_lib.prepare(
                    args.source,
                    args.target,
                    on_bad_row=args.on_bad_row,
                    limit=args.limit,
                    overwrite=args.overwrite,
                )
            )
        else:
            paths.check_given("--target", args.target)
            counts = {split: getattr(args, split) for split in tasks.BUCKETS}
            cli.check_once("families", args.families)
            for split, count in counts.items():
                cli.check_number(split, count, 0)
            if not any(counts.values()):
                raise ValueError(
                    "--train, --validation and --test are all 0: give at least one split a row"
                )
            cli.check_seed(args.seed)
            with locks.only_writer(args.target):
                if (
                    os.path.isdir(os.path.join(args.target, schema.NAME))
                    and procedural.made_with(args.target) is None
                ):
                    raise FileExistsError(
                        f"{args.target} holds prepared data already: choose another --target"
                    )
                procedural.make_procedural(
                    args.target,
                    {
                        "families": args.families,
                        **counts,
                        "difficulty": args.difficulty,
                        "seed": args.seed,
                    },
                )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    print(f"written to {args.target}")


if __name__ == "__main__":
    main()
