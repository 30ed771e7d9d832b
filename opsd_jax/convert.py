"""Released checkpoints (safetensors folders of BAGEL / ThinkMorph) <-> checkpoints of opsd_jax.

    python -m opsd_jax.convert import --source=HF_DIR --target=DIR
    python -m opsd_jax.convert export --source=DIR --target=HF_DIR

  HF_DIR   {model,ema}.safetensors (or shards with an index), ae.safetensors, config files,
           tokenizer files
  DIR      checkpoints/0/ (Orbax, the weights alone) and release/ (config and tokenizer files,
           source.json)

Names and layouts are in `release.bagel_keys`; nothing here depends on sizes.
"""

import argparse
import os

import jax

from opsd_jax.inputs import cli
from opsd_jax.release import export, importing
from opsd_jax.runtime import distributed


def main(argv: list[str] | None = None) -> None:
    """The command; errors in the arguments or files end it with a message and code 1."""
    cli.start()
    args = _parser().parse_args(argv)
    if not os.environ.get("JAX_PLATFORMS"):  # the host's memory and cores do all of it
        jax.config.update("jax_platforms", "cpu")
    try:
        cli.check_precision()
        if args.command == "import":
            importing.import_release(args.source, args.target, only=args.only, dtype=args.dtype)
        else:
            export.export_release(
                args.source,
                args.target,
                base=args.base,
                dtype=args.dtype,
                name=args.name,
                max_shard_gb=args.max_shard_gb,
            )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m opsd_jax.convert",
        description="Released safetensors folders <-> checkpoints of opsd_jax.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="released folder -> checkpoint")
    reading.add_argument("--source", required=True, help="a released folder")
    reading.add_argument("--target", required=True, help="the folder to make")
    reading.add_argument(
        "--only", default="", choices=["understanding"], help="leave out image generation"
    )
    writing = commands.add_parser("export", help="checkpoint -> folder as released")
    writing.add_argument(
        "--source", required=True, help="an imported folder, a run's workdir or a step folder"
    )
    writing.add_argument("--target", required=True, help="the folder to make")
    writing.add_argument(
        "--base",
        default="",
        help="folder that image generation is taken from if the source lacks it: a released or "
        "imported folder (default: the one that the source descends from), or none",
    )
    writing.add_argument(
        "--name",
        default="",
        choices=["", "model", "ema"],
        help="which weights, and the name of their file: model, the student's, or ema, the "
        "teacher's averages (default: model, or as imported)",
    )
    writing.add_argument(
        "--max_shard_gb",
        default=5,
        type=float,
        help="cut larger files and write an index, which the official demo reads; 0 for one file, "
        "which the official trainer wants (default: 5)",
    )
    for command in (reading, writing):
        command.add_argument(
            "--dtype", default="", choices=["float32", "bfloat16"], help="default: as stored"
        )
    return parser


if __name__ == "__main__":
    main()
