"""Answers one question, with image generation or without.

  python -m opsd_jax.generate --checkpoint=DIR --image=F --question="..."

  --checkpoint       a released folder, an imported one (`python -m opsd_jax.convert import`), or a
                     run's workdir or step folder
  --visual_thoughts  none: the model answers in text. generated: it may generate images, as
                     ThinkMorph does:

      system, image, question -> text -> if it contains <image_start>: an image is generated and
      enters the context -> text -> ...

The answer goes to stdout. Images, the answer as JSON and an overview go to --out.

The model of a run answers in text as `python -m opsd_jax.eval` does: with the run's prompts, sizes
and budget, greedily, and a text that asks for an image is continued without it (an image skip).
With --protocol, and for a released model, sizes, prompt and decoding are those of a named protocol,
`interleave.PROTOCOLS`, and an answer in text ends where it asks for an image.
Official: inferencer.py, InterleaveInferencer.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from opsd_jax import images, interleave, tags
from opsd_jax.evaluation import answer_files
from opsd_jax.inputs import cli, paths
from opsd_jax.run import answering
from opsd_jax.run import model as model_lib
from opsd_jax.runtime import distributed, progress


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m opsd_jax.generate`; errors in the arguments end it with one line and code 1."""
    cli.start()
    parser = cli.Parser(
        prog="python -m opsd_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.instead = {"--workdir": "--checkpoint"}
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a released or imported folder, a run's workdir, or one of its step folders",
    )
    parser.add_argument(
        "--image", action="append", default=[], help="path of an image; may be given several times"
    )
    parser.add_argument(
        "--question",
        required=True,
        help="text of the question; images are where it has <image>, and before it without any",
    )
    parser.add_argument(
        "--visual_thoughts",
        default="none",
        choices=interleave.IMAGE_MODES,
        help="whether the model may generate images (default: none)",
    )
    parser.add_argument(
        "--always_draw",
        action="store_true",
        help="generate an image after every round but the last, whether the text asks for it or "
        "not",
    )
    parser.add_argument(
        "--protocol",
        default="",
        choices=["", *interleave.PROTOCOLS],
        help="prompt, sizes, decoding, guidance (default: the run's own; of a release, paper)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="points of the denoising grid, one more than steps (default: the run's; of a release, "
        "50)",
    )
    cli.add_compute_every(parser)
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        help="budget of a round of text (default: the run's; of a release, or with --protocol, the "
        "protocol's)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="temperature of the text; 0: most likely token (default: 0; of a release, or "
        "with --protocol, the protocol's)",
    )
    parser.add_argument(
        "--rounds", type=int, help="largest number of rounds of text (default: the protocol's)"
    )
    parser.add_argument(
        "--tokenizer", default="", help="folder of a tokenizer (default: the checkpoint's own)"
    )
    cli.add_dtype(parser)
    parser.add_argument(
        "--tensor",
        type=int,
        default=0,
        help="devices that the model is divided over (default: as many as divide its heads)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of sampling and noise (default: 0)"
    )
    parser.add_argument(
        "--out", default="", help="folder for images and the overview; needed to generate images"
    )
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    generation = args.visual_thoughts == "generated"
    reasoner = model_lib.load(
        args.checkpoint,
        generation=generation,
        protocol=args.protocol,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        tensor=args.tensor,
    )
    protocol = _with_flags(reasoner.protocol, args)
    flow = dict(reasoner.flow)
    if args.steps is not None:
        flow["num_timesteps"] = args.steps
    if args.compute_every:
        flow["compute_every"] = args.compute_every
    reasoner = dataclasses.replace(reasoner, protocol=protocol, flow=flow)
    opened = [images.open_rgb(path, transparency=protocol.transparency) for path in args.image]
    bars: dict[int, progress.Progress] = {}

    def on_step(number, done, steps):
        bar = bars.setdefault(number, progress.Progress(steps, f"image {number + 1}"))
        bar.update(done)
        if done == steps:
            bar.close()

    options = interleave.ImageGeneration(args.always_draw, on_step=on_step)
    answer = answering.answer(
        reasoner,
        opened,
        args.question,
        seed=args.seed,
        generation=options if generation else None,
    )
    _print(answer, args.out)
    if args.out:
        answer_files.write(args.out, [(opened, args.question)], [answer])


def _check(args: argparse.Namespace) -> None:
    """Checks the flags before minutes of loading."""
    generation = args.visual_thoughts == "generated"
    cli.check_compute_every(args.compute_every, generation)
    if generation and not args.out:
        raise ValueError("--visual_thoughts=generated needs --out=FOLDER for the images")
    if not generation and args.always_draw:
        raise ValueError("--always_draw needs --visual_thoughts=generated")
    cli.check_precision()
    # A budget counts the first token, bos; a denoising grid has two ends.
    for flag, least in (("rounds", 1), ("max_new_tokens", 2), ("steps", 2)):
        cli.check_number(flag, getattr(args, flag), least)
    cli.check_tensor(args.tensor)
    cli.check_temperature(args.temperature)
    cli.check_seed(args.seed)
    args.question = cli.text("question", args.question)
    if not args.question.replace(tags.PLACE, "").strip():
        raise ValueError("the question is empty: give --question=TEXT")
    if fault := tags.places_fault(args.question, len(args.image)):
        raise ValueError(f"--question {fault}; each --image is one")
    paths.check_given("--checkpoint", args.checkpoint)
    paths.check("--out", args.out)
    if args.out:
        paths.check_writable("--out", args.out)
        answer_files.earlier(args.out)
    for path in args.image:
        paths.check_given("--image", path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"--image={path}: there is no such file: give the path of an image"
            )
        try:
            images.open_rgb(path)
        except images.UnreadableImageError as error:
            raise ValueError(f"--image={path}: {error}") from error


def _with_flags(protocol: interleave.Protocol, args: argparse.Namespace) -> interleave.Protocol:
    """The protocol with what the flags change."""
    changes = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "rounds")
        if getattr(args, name) is not None
    }
    if args.temperature == 0:
        changes["greedy"] = True
    elif args.temperature is not None:
        changes |= {"greedy": False, "temperature": args.temperature}
    return dataclasses.replace(protocol, **changes)


def _print(answer: interleave.Answer, out: str) -> None:
    """Prints the texts and the paths of the images to stdout, the cost to stderr."""
    count = 0
    for part in answer.parts:
        if isinstance(part, str):
            print(part)
        else:
            print(f"[image: {os.path.join(out, f'0-{count}.png')}]")
            count += 1
    print(
        f"{answer.tokens} tokens in {answer.text_seconds:.1f} s, {count} images in "
        f"{answer.image_seconds:.1f} s (with compilation)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
