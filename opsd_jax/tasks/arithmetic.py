"""Arithmetic word problems: how many things somebody has after gaining and losing some.

    question     Mia has 23 pens. Then she buys 14 more pens. Mia also has 9 books. Then she gives
                 8 pens to Leo. How many pens does Mia have now?
    text trace   Mia starts with 23 pens. 23 + 14 = 37. 37 - 8 = 29.
    answer       29

There are no images: the family is for models that read text, with a tokenizer of their own. The
teacher reads the text trace, a worked solution. A sentence about other things is a distractor.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

TASK = "Arithmetic"
RULE = (
    "An answer is right if its last number is the expected one; words around it, such as the name "
    "of the things, do not count."
)
# The miniature's tokenizer spells these texts in bytes, so its ids are what they were without them.
WORDS = ()

NAMES = ("Anna", "Ben", "Emma", "Jack", "Leo", "Lucy", "Mia", "Sam", "Tom", "Zoe")
_PRONOUNS = ("she", "he", "she", "he", "he", "she", "she", "he", "he", "she")
THINGS = (
    *("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "pens"),
    *("shells", "stamps", "stickers", "stones", "toys"),
)
_GAINS = ("buys {n} more {things}", "finds {n} {things}", "gets {n} {things} from {friend}")
_LOSSES = ("gives {n} {things} to {friend}", "loses {n} {things}", "sells {n} {things}")

# start: least and greatest number at the beginning; change: of things gained or lost in a step.
_DEFAULT = {"steps": (2, 2), "start": (11, 60), "change": (3, 29), "distractors": 1}
DIFFICULTY = {
    "easy": _DEFAULT | {"steps": (1, 2), "start": (5, 20), "change": (2, 9), "distractors": 0},
    "default": _DEFAULT,
    "hard": _DEFAULT | {"steps": (3, 4), "start": (50, 400), "change": (11, 99)},
}

_NUMBER = re.compile(r"(?<![\d.,])[-−]?\d+(?:,\d{3})*(?:\.\d+)?")


def make(
    rng: np.random.Generator,
    *,
    steps: Sequence[int],
    start: Sequence[int],
    change: Sequence[int],
    distractors: int,
) -> tuple[bytes, dict[str, Any]]:
    """Makes one random problem.

    Args:
      steps: least and greatest number of steps.
      start, change: least and greatest number at the beginning, and of a step.
      distractors: sentences about other things, at most one for each step.
    Returns:
      key: the numbers with their signs. Names, things and distractors are left out, so that a sum
        never occurs in another split in other words.
      fields of `TaskExample` that differ between examples.
    Raises ValueError when the settings do not fit together.
    """
    for name, (least, most) in (("steps", steps), ("start", start), ("change", change)):
        if not 1 <= least <= most:
            raise ValueError(f"arithmetic {name}=({least}, {most}): give 1 <= least <= greatest")
    if not 0 <= distractors <= steps[0]:
        raise ValueError(f"arithmetic distractors={distractors}: give 0 to steps[0], {steps[0]}")

    def between(bounds: Sequence[int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))

    who, friend = rng.permutation(len(NAMES))[:2]
    name, pronoun, friend = NAMES[who], _PRONOUNS[who], NAMES[friend]
    things, *others = (str(thing) for thing in rng.permutation(THINGS)[: 1 + distractors])
    count = between(steps)
    total = first = between(start)
    told, worked, key = [], [], [str(first)]
    for _ in range(count):
        n = between(change)
        is_loss = bool(rng.integers(2)) and n < total
        phrases = _LOSSES if is_loss else _GAINS
        phrase = phrases[int(rng.integers(len(phrases)))]
        told.append(f"Then {pronoun} {phrase.format(n=n, things=things, friend=friend)}.")
        sign, before, total = "-" if is_loss else "+", total, total - n if is_loss else total + n
        worked.append(f"{before} {sign} {n} = {total}.")
        key.append(f"{sign}{n}")
    for place, other in zip(sorted(rng.permutation(count)[:distractors])[::-1], others):
        told.insert(int(place), f"{name} also has {between(change)} {other}.")
    question = [f"{name} has {first} {things}.", *told]
    return "".join(key).encode(), {
        "question": " ".join([*question, f"How many {things} does {name} have now?"]),
        "answer": str(total),
        "thoughts": (" ".join([f"{name} starts with {first} {things}.", *worked]),),
        "metadata": {"answer": total, "steps": count},
    }


def fault(metadata: dict) -> str | None:
    """What `score` misses in the metadata; None if nothing."""
    found = metadata.get("answer")
    return None if type(found) is int else f"has no whole number 'answer', only {found!r}"


def score(metadata: dict, answer: str | None) -> bool:
    """True if the last number of the answer is the right one."""
    found = _NUMBER.findall(answer or "")
    return bool(found) and float(found[-1].replace(",", "").replace("−", "-")) == metadata["answer"]
