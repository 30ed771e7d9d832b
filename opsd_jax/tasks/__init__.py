"""Procedural visual-reasoning tasks whose intermediate step is a picture (the visual thought).

Four families, one module each, in the manner of the four released data sets but small enough for a laptop:
`maze`, `jigsaw`, `search`, `chart`. Each offers DIFFICULTY (named settings), `make` (one random problem and
its canonical key), `score`, and the WORDS of its texts.

Train, validation and test are disjoint by construction: the canonical key of a problem, which leaves out what
makes near-duplicates (see each `make`), decides by its hash to which split the problem belongs. No seed, no
count and no difficulty can move a problem from one split to another.
"""

import hashlib
import unicodedata
from collections.abc import Iterator

import numpy as np

from opsd_jax.tags import extract_answer
from opsd_jax.tasks import chart, jigsaw, maze, search
from opsd_jax.tasks.example import TaskExample

FAMILIES = {"maze": maze, "jigsaw": jigsaw, "search": search, "chart": chart}
BUCKETS = {"train": range(2, 10), "validation": range(1, 2), "test": range(0, 1)}  # of 10

_MAX_REJECTIONS = (
    10_000  # in a row. A split that is not exhausted accepts at least every tenth draw or so.
)


def generate(
    family: str, split: str, count: int, *, seed: int, difficulty: str = "default", **overrides
) -> Iterator[TaskExample]:
    """Yields `count` distinct problems, the same ones for the same arguments.

    A longer stream begins with the shorter one. Validation and test never hold two problems with one
    canonical key; train may (a maze and its mirror image), but holds no problem image twice with the same
    question.

    Args:
      family: one of FAMILIES.
      split: one of BUCKETS.
      seed: of the stream, together with split and family.
      difficulty: name of the settings in the family's DIFFICULTY.
      **overrides: single settings that replace those.
    Raises:
      ValueError: at once if an argument is not known; while iterating if the settings do not fit together or
        allow fewer than `count` distinct problems.
    """
    module = _known(FAMILIES, family, "family")
    buckets = _known(BUCKETS, split, "split")
    settings = dict(_known(module.DIFFICULTY, difficulty, f"difficulty of {family}"))
    for name in overrides:
        _known(settings, name, f"setting of {family}")
    return _stream(family, split, count, seed, module, buckets, settings | overrides)


def score(metadata: dict, answer: str | None) -> bool:
    """Whether the answer (text between the tags; None if there was none) solves this metadata's problem."""
    return _known(FAMILIES, metadata.get("family"), "family in the metadata").score(
        metadata, answer
    )


def judge(metadata: dict, taught: str, text: str) -> tuple[str | None, bool]:
    """(answer found in the text, whether it is right): by the procedural task's rule, or word for word.

    taught: the row's own answer as training teaches it (`tags.wrap_answer`). It is read as the text is, so that what
    was learnt to the letter is right.
    """
    answer, reference = extract_answer(text), extract_answer(taught)
    if "family" in metadata:
        return answer, bool(score(metadata, answer))
    return answer, None not in (answer, reference) and answer.split() == reference.split()


def fault(metadata: dict, taught: str) -> str | None:
    """Why a row cannot be scored, or calls its own answer wrong; begins with the column at fault. None for a good row.

    Args: as `judge`.
    """
    reference = extract_answer(taught)
    if reference is None:
        return "answer has <answer> without </answer>, so no completion matches it"
    if is_blank(reference):
        return "answer is empty"
    if "family" not in metadata:
        return None
    family = metadata["family"]
    if not isinstance(family, str) or family not in FAMILIES:
        return f"metadata has family {family!r}, and no rule scores it: choose from {', '.join(FAMILIES)}, or rename the key"
    if reason := FAMILIES[family].fault(metadata):
        return f"metadata {reason}"
    return (
        None
        if score(metadata, reference)
        else f"answer {reference!r} is wrong by the row's metadata"
    )


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, control and zero-width characters at most."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def _stream(family, split, count, seed, module, buckets, settings):
    rng = generator(f"{seed}/{split}/{family}")
    seen = set()
    index = rejections = 0
    while index < count:
        key, fields = module.make(rng, **settings)
        identity = key
        if split == "train":
            identity += fields["question"].encode() + fields["problem_image"].tobytes()
        identity = _hash(identity)
        if identity in seen or _hash(family.encode() + key) % 10 not in buckets:
            rejections += 1
            if rejections == _MAX_REJECTIONS:
                raise ValueError(
                    f"{family}/{split}: only {index} of {count} distinct problems found before "
                    f"{_MAX_REJECTIONS:,} draws in a row brought nothing new; ask for fewer, or widen the "
                    f"settings {settings}"
                )
            continue
        seen.add(identity)
        yield TaskExample(
            pid=f"{family}-{split}-{index:07d}",
            task=module.TASK,
            full_text_only_thought=" ".join(fields["thoughts"]),
            **fields | {"metadata": {"family": family, **fields["metadata"]}},
        )
        index += 1
        rejections = 0


def generator(name: str) -> np.random.Generator:
    """Random numbers that depend on the name alone, in every process and on every machine."""
    return np.random.Generator(np.random.Philox(key=_hash(name.encode())))


def _hash(data: bytes) -> int:
    """128 bits that are the same in every process, on every machine and in every version of Python."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "big")


def _known(table, name, what: str):
    """table[name], or an error that lists what there is."""
    if name not in table:
        raise ValueError(f"unknown {what}: {name!r}; there is {', '.join(table)}")
    return table[name]
