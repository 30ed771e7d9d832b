"""One problem of the procedural tasks as plain values."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TaskExample:
    """A question, visual but in families of texts, with the steps that lead to its answer.

    The full trace reads: thoughts[0], visual_thoughts[0], thoughts[1], answer. Texts are plain
    words separated by single spaces, without tags.

    Attributes:
      pid: identifier, unique among all families and splits of one seed, such as
        "maze-train-0000012".
      question: text of the question.
      answer: the gold answer; `tasks.score` may accept others as well.
      problem_image: uint8 [H, W, 3]; None in families of texts.
      thoughts: texts of the reasoning, one more than there are visual thoughts.
      visual_thoughts: images of the intermediate steps, uint8 [H, W, 3].
      task: name of the task in the released data, such as "Spatial_Navigation".
      full_text_only_thought: the reasoning for a trace without images.
      metadata: JSON-serialisable: "family" and what scoring needs.
    """

    pid: str
    question: str
    answer: str
    problem_image: np.ndarray | None
    thoughts: tuple[str, ...]
    visual_thoughts: tuple[np.ndarray, ...]
    task: str
    full_text_only_thought: str
    metadata: dict
