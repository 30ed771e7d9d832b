"""easy-VQA as JSONL that `data prepare` reads: questions about the one shape in an image.

  pip install -e ".[examples]"
  python examples/easy_vqa_data.py --target=/tmp/easy-vqa

Questions, answers and images (64 x 64 pixels) are those of the package easy-vqa (MIT licence, no
network). The rest is derived from them:

  visual_thoughts      the shape, cut out of the image and enlarged
  thoughts, text_trace sentences that name its colour and its kind
  facts                the same as a further column: "red triangle"

What an image shows is read off all questions about it and their answers, see `facts`. The package
has no validation split: it is made of every tenth training image.
"""

import argparse
import json
import pathlib
import random
import sys
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image, ImageChops

TASK = "Easy_VQA"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SIDE = 64  # pixels of the images
_FAINT = 8  # of 255: the edges of a shape differ at least that much from the background
_AROUND = 3  # pixels of background that the cut-out keeps on each side

Question = tuple[str, str, int]
"""(question, answer, number of the image)"""


def facts(questions: Iterable[Question]) -> dict[int, tuple[str, str]]:
    """{image: (colour, shape)}, of the images about which the questions tell both.

    An answer names one of them, and so may the question: "what color is the triangle?". Of yes and
    no those count that say what is there, and what is the only one left.
    """
    absent: dict[int, set[str]] = {}
    present: dict[int, set[str]] = {}
    for question, answer, image in questions:
        words = question.strip("?").split()
        named = {*words} & {*COLOURS, *SHAPES}
        is_there = True
        if answer in ("yes", "no"):
            is_there = (answer == "yes") != bool({"not", "no"} & {*words})
        else:
            named.add(answer)
        (present if is_there else absent).setdefault(image, set()).update(named)
    found = {}
    for image in present | absent:
        known = []
        for names in (COLOURS, SHAPES):
            seen = [name for name in names if name in present.get(image, ())]
            left = [name for name in names if name not in absent.get(image, ())]
            known.append(seen or left)
        if all(len(names) == 1 for names in known):
            found[image] = (known[0][0], known[1][0])
    return found


def cut_out(image: Image.Image) -> Image.Image:
    """The square around the shape, enlarged to the size of an image.

    The background has one colour, that of most corners.
    """
    image = image.convert("RGB")
    corners = [image.getpixel((x, y)) for x in (0, SIDE - 1) for y in (0, SIDE - 1)]
    background = Image.new("RGB", image.size, max(corners, key=corners.count))
    bands = ImageChops.difference(image, background).split()
    largest = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    left, top, right, bottom = largest.point(lambda x: 255 * (x > _FAINT)).getbbox() or (
        *(0, 0),
        *image.size,
    )
    half = min(max(right - left, bottom - top) / 2 + _AROUND, SIDE / 2)
    x, y = (min(max(z, half), SIDE - half) for z in ((left + right) / 2, (top + bottom) / 2))
    box = (x - half, y - half, x + half, y + half)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)


def write(
    target: pathlib.Path,
    split: str,
    questions: Sequence[Question],
    paths: Mapping[int, str],
    known: Mapping[int, tuple[str, str]],
) -> None:
    """Writes <target>/<split>.jsonl, and the images of its questions in <target>/images/.

    Args:
      paths: {image: its file}.
      known: what `facts` returned.
    """
    folder = target / "images"
    folder.mkdir(parents=True, exist_ok=True)
    written: set[int] = set()
    with open(target / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for number, (question, answer, image) in enumerate(questions):
            problem, shape = (f"{split}-{image}{what}.png" for what in ("", "-shape"))
            if image not in written:
                (folder / problem).write_bytes(pathlib.Path(paths[image]).read_bytes())
                with Image.open(paths[image]) as opened:
                    cut_out(opened).save(folder / shape)
                written.add(image)
            shown = " ".join(known[image])
            line = {
                "pid": f"{split}-{number}",
                "question": question,
                "answer": answer,
                "image": f"images/{problem}",
                "thoughts": ["I look at the shape.", f"It is a {shown}."],
                "visual_thoughts": [f"images/{shape}"],
                "text_trace": f"The image shows a {shown}.",
                "facts": shown,
            }
            file.write(json.dumps(line) + "\n")


def chosen(
    questions: Sequence[Question], known: Mapping[int, tuple[str, str]], split: str, count: int
) -> list[Question]:
    """`count` questions of a split in a random order that is always the same.

    Raises ValueError if there are fewer.
    """
    is_validation = split == "validation"
    usable = [
        q
        for q in questions
        if q[2] in known and (split == "test" or (q[2] % 10 == 9) == is_validation)
    ]
    if count > len(usable):
        raise ValueError(f"--{split}={count}: the data have {len(usable)} questions for it")
    random.Random(0).shuffle(usable)
    return usable[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="easy-VQA as JSONL for `data prepare`.")
    parser.add_argument("--target", required=True, type=pathlib.Path, help="folder to write")
    for split, count in (("train", 4000), ("validation", 500), ("test", 500)):
        parser.add_argument(f"--{split}", type=int, default=count, help="number of questions")
    args = parser.parse_args(arguments)
    try:
        import easy_vqa
    except ModuleNotFoundError:
        sys.exit('error: the package easy-vqa is not installed: pip install -e ".[examples]"')
    folder = args.target / TASK
    if folder.exists():
        sys.exit(f"error: {folder} exists: delete it, or give another --target")
    parts = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    for split in ("train", "validation", "test"):
        read_questions, read_paths = parts["test" if split == "test" else "train"]
        questions = list(zip(*read_questions()))
        known = facts(questions)
        try:
            some = chosen(questions, known, split, getattr(args, split))
        except ValueError as error:
            sys.exit(f"error: {error}")
        write(folder, split, some, read_paths(), known)
        print(f"{len(some)} questions in {folder}/{split}.jsonl")


if __name__ == "__main__":
    main()
