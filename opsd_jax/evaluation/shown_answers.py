"""Answers on pages: which of many are shown, and what is said of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], most: int, benchmark: Callable[[T], str]) -> list[T]:
    """Up to `most` of the items, evenly spaced in each benchmark and in their order.

    All benchmarks have equally many; what one has too few for goes to the others.

    benchmark: the one that an item belongs to.
    """
    of_each: dict[str, list[T]] = {}
    for item in items:
        of_each.setdefault(benchmark(item), []).append(item)
    chosen, left = {}, most
    smallest_first = sorted(of_each, key=lambda name: len(of_each[name]))
    for n, name in enumerate(smallest_first):
        own = of_each[name]
        count = min(len(own), left // (len(of_each) - n))
        chosen[name] = [own[k * len(own) // count] for k in range(count)]
        left -= count
    return [item for name in of_each for item in chosen[name]]


def title(prediction: Mapping) -> str:
    """The title of an answer: its example, what was extracted from it, and what is expected.

    prediction: a line of predictions.jsonl. Long answers, to public tables, are not in the title.
    """
    name = str(prediction.get("pid", prediction["index"]))
    if "answer" not in prediction:
        return name
    found, expected = prediction["answer"], prediction["expected"]
    shown = "no <answer> tag" if found is None else found
    return f"{name}: {shown}" + (f" (expected {expected})" if found != expected else "")


def note(prediction: Mapping) -> str:
    """What is said of an answer besides its title: its length, and what the title leaves out."""
    tokens = prediction["tokens"]
    about = f"{tokens} token{'s' * (tokens != 1)}"
    if "samples" in prediction:
        samples = prediction["samples"]
        right = sum(bool(sample["hit"]) for sample in samples)
        about += f"; the first of {len(samples)} answers, of which {right} are right"
    return about if "answer" in prediction else f"expected {prediction['expected']}; {about}"
