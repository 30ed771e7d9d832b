"""One answer, with or without drawing: `python -m opsd_jax.generate --checkpoint=DIR --image=F --question="..."`.

  --checkpoint       a released folder, an imported one (`python -m opsd_jax.convert import`), or a run's workdir or
                     step folder
  --visual_thoughts  `none`: the model answers in text. `generated`: it may draw, as ThinkMorph does:

      system, image, question -> text -> holds <image_start>? draw, the picture enters the context -> text -> ...

The answer goes to stdout; pictures, the whole trace and a page to look at go to --out. Sizes of pictures, prompt and
decoding are those of a named protocol, `PROTOCOLS`. Official: inferencer.py, InterleaveInferencer.
"""

import argparse
import dataclasses
import os
import sys

import jax

from opsd_jax import images, interleave
from opsd_jax.evaluation import traces as traces_lib
from opsd_jax.inputs import cli, paths
from opsd_jax.run import model as model_lib
from opsd_jax.runtime import distributed, progress


def main(argv=None) -> None:
    """`python -m opsd_jax.generate`; errors in the arguments end it with one line and code 1."""
    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.generate", description="Answer one question."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a released or imported folder, a run's workdir, or one of its step folders",
    )
    parser.add_argument(
        "--image", action="append", default=[], help="a picture; may be given several times"
    )
    parser.add_argument("--question", required=True)
    parser.add_argument("--visual_thoughts", default="none", choices=interleave.VISUAL_THOUGHTS)
    parser.add_argument(
        "--always_draw",
        action="store_true",
        help="draw after every round but the last, whether the text asks for it or not",
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
        help="points of the denoising grid, one more than steps (default: the run's, of a release 50)",
    )
    parser.add_argument("--max_new_tokens", type=int, help="budget of a round of text")
    parser.add_argument(
        "--temperature", type=float, help="of the text; 0 for the most probable token"
    )
    parser.add_argument("--rounds", type=int, help="of text, at most")
    parser.add_argument("--tokenizer", default="", help="a folder (default: the checkpoint's own)")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="default: as stored"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", default="", help="folder for pictures and the page; needed for drawing"
    )
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)


def _run(args):

    draw = args.visual_thoughts == "generated"
    if draw and not args.out:
        raise ValueError("--visual_thoughts=generated needs --out=FOLDER for the pictures")
    if not draw and args.always_draw:
        raise ValueError("--always_draw needs --visual_thoughts=generated")
    cli.check_precision()
    # a budget counts the first token, bos; a denoising grid has two ends
    for flag, least in (("rounds", 1), ("max_new_tokens", 2), ("steps", 2)):
        cli.check_number(flag, getattr(args, flag), least)
    cli.check_temperature(args.temperature)
    cli.check_seed(args.seed)
    args.question = cli.text("question", args.question)
    if not args.question.strip():
        raise ValueError("the question is empty: give --question=TEXT")
    paths.check_given("--checkpoint", args.checkpoint)
    paths.check("--out", args.out)
    if args.out:
        paths.check_writable("--out", args.out)
        traces_lib.earlier(args.out)
    for path in args.image:  # what cannot be read shows before minutes of loading
        paths.check_given("--image", path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"--image={path}: there is no such file: give the path of an image"
            )
        try:
            images.open_rgb(path)
        except images.UnreadableImageError as error:
            raise ValueError(f"--image={path}: {error}") from error
    model = model_lib.load(
        args.checkpoint,
        generation=draw,
        protocol=args.protocol,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
    )
    changes = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "rounds")
        if getattr(args, name) is not None
    }
    if args.temperature is not None:
        changes |= (
            {"greedy": True}
            if args.temperature == 0
            else {"greedy": False, "temperature": args.temperature}
        )
    model = dataclasses.replace(model, protocol=dataclasses.replace(model.protocol, **changes))
    pictures = [
        images.open_rgb(path, transparency=model.protocol.transparency) for path in args.image
    ]
    bars = {}

    def on_step(number, done, steps):
        bar = bars.setdefault(number, progress.Progress(steps, f"drawing {number + 1}"))
        bar.update(done)
        if done == steps:
            bar.close()

    questions = [(pictures, args.question)]
    traces = interleave.reason(
        model,
        questions,
        jax.random.key(args.seed),
        generation=draw,
        always=args.always_draw,
        flow_changes={} if args.steps is None else {"num_timesteps": args.steps},
        on_step=on_step,
    )
    trace, drawn = traces[0], 0
    for step in trace.steps:
        if isinstance(step, str):
            print(step)
        else:
            print(f"[drawn: {os.path.join(args.out, f'0-{drawn}.png')}]")
            drawn += 1
    if args.out:
        traces_lib.write(args.out, questions, traces)
    print(
        f"{trace.tokens} tokens in {trace.seconds['text']:.1f} s, {drawn} pictures in {trace.seconds['drawing']:.1f} s "
        "(with compilation)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
