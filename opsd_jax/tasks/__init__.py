"""Procedural visual-reasoning tasks whose intermediate step is an image (the visual thought).

There are four families, one module each, modelled on the four released data sets but small enough
for a laptop: `maze`, `jigsaw`, `search`, `chart`. A fifth, `arithmetic`, has texts alone. Each has
TASK (name of the released data set), DIFFICULTY (named settings), `make` (one random problem and
its canonical key), `score`, `fault`, and the WORDS of its texts; where other answers than the
stored one are right, also a RULE that says so.

Train, validation and test are disjoint by construction: the hash of a problem's canonical key
decides to which split the problem belongs. The key leaves out what makes near-duplicates (see each
`make`). No seed, no count and no difficulty can move a problem from one split to another.
"""

import hashlib
import types
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opsd_jax.inputs import checks
from opsd_jax.tags import extract_answer
from opsd_jax.tasks import arithmetic, chart, jigsaw, maze, search
from opsd_jax.tasks.example import TaskExample

FAMILIES = {
    "maze": maze,
    "jigsaw": jigsaw,
    "search": search,
    "chart": chart,
    "arithmetic": arithmetic,
}
VISUAL = ("maze", "jigsaw", "search", "chart")  # the families with images
# The tenths of all hashes that belong to each split.
SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(0, 1)}

# Fields that families of texts leave out.
_NO_IMAGES = {"problem_image": None, "visual_thoughts": ()}

# Rejections without a problem in between that end a stream. A split that is not exhausted accepts
# about every tenth problem at least.
_MAX_REJECTIONS = 10_000


def generate(
    family: str, split: str, count: int, *, seed: int, difficulty: str = "default", **overrides
) -> Iterator[TaskExample]:
    """Yields `count` distinct problems, the same ones for the same arguments.

    A longer stream begins with the shorter one. Validation and test never hold two problems with
    the same canonical key. Train may (a maze and its mirror image), but it never holds a problem
    image twice with the same question.

    Args:
      family: one of FAMILIES.
      split: one of SPLITS.
      seed: seed of the stream, together with split and family.
      difficulty: name of the settings in the family's DIFFICULTY.
      **overrides: single settings that replace those.
    Raises:
      ValueError: at once if an argument is unknown; while iterating if the settings do not fit
        together or allow fewer than `count` distinct problems.
    """
    module = _known(FAMILIES, family, "family")
    tenths = _known(SPLITS, split, "split")
    settings = dict(_known(module.DIFFICULTY, difficulty, f"difficulty of {family}"))
    for name in overrides:
        _known(settings, name, f"setting of {family}")
    return _stream(family, split, count, seed, module, tenths, settings | overrides)


def score(metadata: dict, answer: str | None) -> bool:
    """Whether an answer solves the problem that the metadata describe.

    answer: the text between the tags; None if there was none.
    """
    return _known(FAMILIES, metadata.get("family"), "family in the metadata").score(
        metadata, answer
    )


def judge(metadata: dict, taught: str, text: str) -> tuple[str | None, bool]:
    """The answer found in a text, and whether it is right.

    Args:
      metadata: those of the example. With a "family", the family's rule decides; otherwise the
        answer has to equal the example's own, word for word.
      taught: the example's own answer as training teaches it (`tags.wrap_answer`). It is read in
        the same way as the text, so a completion that repeats it exactly is right.
    """
    answer, reference = extract_answer(text), extract_answer(taught)
    if "family" in metadata:
        return answer, bool(score(metadata, answer))
    return answer, None not in (answer, reference) and answer.split() == reference.split()


def rule(metadata: dict) -> str:
    """The rule by which `judge` decides, as a sentence for readers."""
    family = FAMILIES.get(metadata.get("family", ""))
    return getattr(
        family, "RULE", "An answer is right if it equals the expected one word for word."
    )


def fault(metadata: dict, taught: str) -> str | None:
    """Why an example cannot be scored, or its own answer counts as wrong; None for a good example.

    The text begins with the column at fault. Args: as for `judge`.
    """
    reference = extract_answer(taught)
    if reference is None:
        return "answer has <answer> without </answer>, so no completion matches it"
    if is_blank(reference):
        return "answer is empty"
    taught_by_traces = metadata.get("trace_answer", "any")
    if not isinstance(taught_by_traces, str) or is_blank(taught_by_traces):
        return f"metadata has trace_answer {taught_by_traces!r}, which is no answer"
    if "family" not in metadata:
        return None
    family = metadata["family"]
    if not isinstance(family, str) or family not in FAMILIES:
        return (
            f"metadata has family {family!r}, and no rule scores it: choose from "
            f"{', '.join(FAMILIES)}, or rename the key"
        )
    if reason := FAMILIES[family].fault(metadata):
        return f"metadata {reason}"
    if not score(metadata, reference):
        return f"answer {reference!r} is wrong by the row's metadata"
    return None


def is_blank(text: str) -> bool:
    """Whether a text has only white space, control and zero-width characters."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def _stream(
    family: str,
    split: str,
    count: int,
    seed: int,
    module: types.ModuleType,
    tenths: range,
    settings: dict[str, Any],
) -> Iterator[TaskExample]:
    rng = generator(f"{seed}/{split}/{family}")
    seen = set()
    index = rejections = 0
    while index < count:
        key, fields = module.make(rng, **settings)
        identity = key
        if split == "train":
            image = fields.get("problem_image")
            identity += fields["question"].encode() + (b"" if image is None else image.tobytes())
        identity = _hash(identity)
        if identity in seen or _hash(family.encode() + key) % 10 not in tenths:
            rejections += 1
            if rejections == _MAX_REJECTIONS:
                raise ValueError(
                    f"{family}/{split}: only {index} of {count} distinct problems found before "
                    f"{_MAX_REJECTIONS:,} random problems in a row brought nothing new; ask for "
                    f"fewer, or widen the settings {settings}"
                )
            continue
        seen.add(identity)
        yield TaskExample(
            pid=f"{family}-{split}-{index:07d}",
            task=module.TASK,
            full_text_only_thought=" ".join(fields["thoughts"]),
            **_NO_IMAGES | fields | {"metadata": {"family": family, **fields["metadata"]}},
        )
        index += 1
        rejections = 0


def generator(name: str) -> np.random.Generator:
    """Generator of random numbers that depend on a name only, whatever the process and machine."""
    return np.random.Generator(np.random.Philox(key=_hash(name.encode())))


def _hash(data: bytes) -> int:
    """128-bit hash that is the same on every machine, in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "big")


def _known(table: Mapping[str, Any], name: str | None, what: str) -> Any:
    """table[name]. Raises ValueError, which lists the names, if there is no such entry."""
    if name not in table:
        raise ValueError(f"unknown {what}: {name!r}; {checks.choose_from(str(name), table)}")
    return table[name]
