"""What the released script (kl_diagnostic.py) measures: predictions of two texts, paired from the
end.

Letters: B batch, R scored positions.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import divergence, sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.data.examples import PreparedExample
from opsd_jax.data.packing import Packer
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig


def official_blocks(packer: Packer, prepared: PreparedExample) -> tuple[list, list]:
    """Blocks of an example as the released script shows it to its teacher and to its student.

      teacher  [problem image] [question] [thought 1] [visual thought 1] [thought 2] [answer]
      student  [problem image] [question] [text-only thought] [answer]

    No system prompt, intro or transition. Each text is the raw one of its column, without tags, in
    a block bos ... eos of its own. Thoughts and answer have `loss`: they are scored from their bos,
    which predicts the first token, to their last token, which predicts eos. Without a text-only
    thought the student reads the two thoughts, joined with a space.
    """

    def scored(text):
        return blocks_lib.Text(packer.tokenizer.encode(text), True)

    example = prepared.example
    names, no_fixed_texts = ("image", "question"), blocks_lib.Prompts()
    named = blocks_lib.named_blocks(packer.tokenizer, no_fixed_texts, names, prepared.content)
    ask = [block for _, block in named]
    answer = scored(example.answer)
    thoughts = example.thoughts[:2]
    first, *rest = map(scored, thoughts)
    text_only = scored(example.full_text_only_thought or " ".join(thoughts))
    return [*ask, first, *prepared.visual_thoughts[:1], *rest, answer], [*ask, text_only, answer]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Scored positions of two sequences, paired from the end, as many as the shorter one has.

    Attributes:
      teacher, student: int32 [B, R], positions in the sequences of each side.
      labels: int32 [B, R], tokens that the student's positions predict.
      mask: bool [B, R], False at padding.
      tail: int32 [B], how many of the last pairs have equal labels.
    """

    teacher: np.ndarray
    student: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    tail: np.ndarray


def align_ends(teacher: context_lib.Supervised, student: context_lib.Supervised) -> Pairs:
    """The pairs of two batches of sequences."""
    shape = teacher.positions.shape
    of_teacher, of_student, labels = (np.zeros(shape, np.int32) for _ in range(3))
    mask, tail = np.zeros(shape, bool), np.zeros(shape[0], np.int32)
    for b in range(shape[0]):
        ends = [int(side.mask[b].sum()) for side in (teacher, student)]
        n = min(ends)
        last_of_teacher, last_of_student = (slice(end - n, end) for end in ends)
        of_teacher[b, :n] = teacher.positions[b, last_of_teacher]
        of_student[b, :n] = student.positions[b, last_of_student]
        labels[b, :n], mask[b, :n] = student.labels[b, last_of_student], True
        differs = np.flatnonzero(teacher.labels[b, last_of_teacher] != labels[b, :n])
        tail[b] = n - 1 - differs[-1] if len(differs) else n
    return Pairs(of_teacher, of_student, labels, mask, tail)


@sharding.jit_on_mesh(static_argnames="config")
def paired_kl(
    teacher: dict,
    student: dict,
    teacher_context: context_lib.Context,
    student_context: context_lib.Context,
    teacher_positions: Int[AnyArray, "B R"],
    student_positions: Int[AnyArray, "B R"],
    *,
    config: ModelConfig,
) -> Float32[Array, "B R"]:
    """Forward KL(teacher || student) between predictions at positions of two contexts, in nats.

    The KL is over the full vocabulary.

    Args:
      teacher, student: parameters.
      teacher_positions, student_positions: int32 [B, R].

    Returns:
      float32 [B, R], also at padding: apply the mask of `Pairs`.
    """
    exact = divergence.DivergenceConfig(beta=0.0, top_k=0, clip=0.0, chunk=64)

    def states(params, context, positions):
        hidden, _ = bagel.read(params, context, config=config)
        return jnp.take_along_axis(hidden, positions[:, :, None], axis=1)

    values, _, _ = divergence.chunked(
        states(student, student_context, student_positions),
        bagel.head(student),
        states(teacher, teacher_context, teacher_positions),
        bagel.head(teacher),
        student_positions,
        exact,
        with_ce=False,
    )
    return values
