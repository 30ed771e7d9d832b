"""Examples whose text trace is wrong: data for the question what OPSD and SFT make of bad traces.

A wrong trace is the one of another example of the same stream: its thoughts, its reasoning without
images and its answer. Question, images, gold answer and metadata stay, so that visual thoughts and
scores are right.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opsd_jax import tasks
from opsd_jax.tasks.example import TaskExample

_DRAWS = 1000  # that find no example with a wrong answer: there is none


def mixed_in(
    examples: Sequence[TaskExample], share: float, rng: np.random.Generator
) -> list[TaskExample]:
    """The examples, of which a share has a wrong text trace.

    Of the first n examples floor(n * share) have one, for every n, so that parts of the data have
    the same share. metadata["trace_answer"] of these examples is the answer that the trace ends
    with (`schema.Example.trace_answer`), metadata["trace_of"] the pid of the example that it comes
    from. Where there is one, that example has the same question.

    Args:
      share: in 0..1; 0 changes nothing.
    Raises:
      ValueError: no other example has an answer that is wrong for one of these.
    """
    same_question: dict[str, list[int]] = {}
    for n, example in enumerate(examples):
        same_question.setdefault(example.question, []).append(n)
    everything, found = range(len(examples)), []
    for n, example in enumerate(examples):
        if int((n + 1) * share) == int(n * share):
            found.append(example)
            continue
        other = _another(example, examples, same_question[example.question], rng)
        other = other or _another(example, examples, everything, rng)
        if other is None:
            raise ValueError(
                f"example {example.pid} has no wrong trace: of {len(examples)} examples of its "
                "split none has an answer that is wrong for it. Make more, or set "
                "config.data.make.wrong_traces=0"
            )
        about = {"trace_answer": other.answer, "trace_of": other.pid}
        found.append(
            dataclasses.replace(
                example,
                thoughts=other.thoughts,
                full_text_only_thought=other.full_text_only_thought,
                metadata=example.metadata | about,
            )
        )
    return found


def _another(
    example: TaskExample,
    examples: Sequence[TaskExample],
    among: Sequence[int],
    rng: np.random.Generator,
) -> TaskExample | None:
    """A random example whose answer is wrong for this one; None if many draws gave none."""
    for _ in range(_DRAWS):
        other = examples[among[int(rng.integers(len(among)))]]
        if not tasks.score(example.metadata, other.answer):
            return other
    return None
