"""A run's data with images that its model generates in place of their visual thoughts.

  python -m opsd_jax.redraw --workdir=W --target=DIR [--checkpoint=W/checkpoints/STEP]
  python -m opsd_jax.train ... --config.data.dir=DIR

A control: the teacher reads what the model can generate itself, not what somebody prepared. Every
example gets as many images as it had, whether the model's text asks for them or not. Other splits
are copied, so that a run finds all that it evaluates on.
"""

from opsd_jax.inputs import cli
from opsd_jax.run import redraw
from opsd_jax.runtime import distributed, stopping


def main(argv=None) -> None:
    """`python -m opsd_jax.redraw`; errors in the arguments end it with one line and code 1."""
    cli.start()
    parser = cli.Parser(
        prog="python -m opsd_jax.redraw",
        description="A run's data with images that its model generates in place of their visual "
        "thoughts, to train on.",
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of a run whose model generates images"
    )
    parser.add_argument("--target", required=True, help="the TFDS data_dir to write")
    parser.add_argument(
        "--checkpoint",
        default="",
        help="a step folder, or a released or imported model (default: the newest of the run)",
    )
    parser.add_argument(
        "--splits",
        default=("train",),
        type=cli.names,
        help="splits to generate images for; the others that the run uses are copied",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="examples per batch (default: 64)"
    )
    cli.add_tensor(parser)
    parser.add_argument("--seed", type=int, default=0, help="of sampling and noise (default: 0)")
    args = parser.parse_args(argv)
    try:
        with stopping.stoppable("the same command continues after the last whole file") as stop:
            print(
                redraw.redraw(
                    args.workdir,
                    args.target,
                    checkpoint=args.checkpoint,
                    splits=args.splits,
                    batches=redraw.Batches(args.batch_size, args.tensor, args.seed),
                    before_batch=stop.check,
                )
            )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)


if __name__ == "__main__":
    main()
