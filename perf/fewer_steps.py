"""Generated images of a trained run with fewer computed flow steps, against all steps.

  python perf/fewer_steps.py --workdir=W --checkpoint=W/checkpoints/2300 --out=fewer_steps.png

For the first --rows test examples and every setting (`drawing.compute_every`, `.extrapolation`) the
model reasons, generates as many images as the example has visual thoughts, and answers, with the
same noise. Prints a Markdown table and writes a picture of the first examples side by side.

  computed     share of the flow steps whose velocities are computed
  difference   root of the mean squared difference of pixels (0 to 255) from all steps computed
  right        answers, with the 95 % interval
  seconds      of image generation, a question, in batches of --batch_size, without compilation
"""

import argparse
import dataclasses
import io
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

import opsd_jax
from opsd_jax import flow, interleave
from opsd_jax.evaluation import statistics
from opsd_jax.run import model as model_lib
from opsd_jax.run import session as session_lib

SETTINGS = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1))
SHOWN, SIDE = 4, 160  # examples in the picture, and pixels of each image


class Found(NamedTuple):
    """What a setting gives: images, right answers, seconds of a question, share of steps."""

    images: list[np.ndarray]
    right: int
    seconds: float
    computed: float


def generate(reasoner: interleave.Reasoner, asked: list, examples: list, batch_size: int) -> Found:
    """The first generated image of each example, and how many answers are right."""
    seconds, images, right = [], [], 0
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        filled = part + part[-1:] * (batch_size - len(part))
        answers = interleave.reason(
            reasoner,
            filled,
            jax.random.fold_in(jax.random.key(0), start),
            interleave.ImageGeneration(always=True),
        )
        seconds.append(answers[0].image_seconds / batch_size)
        for example, answer in zip(examples[start : start + batch_size], answers):
            images.append(answer.images[0])
            right += bool(opsd_jax.score(example, answer.text).right)
    steps = flow.computed_steps(interleave.flow_config(reasoner))
    return Found(images, right, min(seconds), float(np.mean(steps)))


def difference(images: list[np.ndarray], full: list[np.ndarray]) -> float:
    """Root of the mean squared difference of pixels, uint8 [H, W, 3] each."""
    squares = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(images, full, strict=True)]
    return float(np.mean(squares) ** 0.5)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, help="a run that generates images")
    parser.add_argument("--checkpoint", default="", help="default: the newest of the run")
    parser.add_argument("--rows", type=int, default=256, help="test examples")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--out", default="fewer_steps.png", help="the picture")
    args = parser.parse_args(arguments)
    run = session_lib.open_run(args.workdir)
    reasoner = model_lib.load(
        args.checkpoint or args.workdir, generation=True, batch_size=args.batch_size
    )
    examples = run.examples("test")[: args.rows]
    rounds = 1 + max(len(example.visual_thoughts) for example in examples)
    reasoner = dataclasses.replace(
        reasoner, protocol=dataclasses.replace(reasoner.protocol, rounds=rounds)
    )
    ask = run.preprocessor().question
    asked = [ask(example) for example in examples]
    found: dict[tuple[int, int], Found] = {}
    print("| computed every | degree | steps computed | difference of pixels | right | seconds |")
    print("|---|---|---|---|---|---|")
    for every, degree in SETTINGS:
        own = dict(reasoner.flow, compute_every=every, extrapolation=degree)
        one = generate(dataclasses.replace(reasoner, flow=own), asked, examples, args.batch_size)
        found[every, degree] = one
        low, high = statistics.wilson(one.right, len(examples))
        print(
            f"| {every} | {degree if every > 1 else '–'} | {one.computed:.0%} | "
            f"{difference(one.images, found[SETTINGS[0]].images):.1f} | "
            f"{one.right / len(examples):.1%} ({low:.1%} to {high:.1%}) | {one.seconds:.4f} |",
            flush=True,
        )
    rows = examples[:SHOWN]
    sheet = Image.new("RGB", (SIDE * (len(SETTINGS) + 2), SIDE * len(rows)), "white")
    for row, example in enumerate(rows):
        thought = Image.open(io.BytesIO(example.visual_thoughts[0])).convert("RGB")
        generated = [Image.fromarray(one.images[row]) for one in found.values()]
        for column, image in enumerate([example.image, thought, *generated]):
            large = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(large, (SIDE * column, SIDE * row))
    sheet.save(args.out)
    print(f"\n{args.out}: problem, visual thought, then the settings of the table in order")


if __name__ == "__main__":
    main()
