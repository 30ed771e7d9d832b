"""One problem of the procedural tasks, as plain values."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TaskExample:
    """A visual question with the steps that lead to its answer.

    The full trace reads: thoughts[0], visual_thoughts[0], thoughts[1], answer. Texts are plain words
    separated by single spaces, without tags.
    """

    pid: str  # unique among all families and splits of one seed: "maze-train-0000012"
    question: str
    answer: str  # the gold answer; `tasks.score` may accept others as well
    problem_image: np.ndarray  # uint8[H, W, 3]
    thoughts: tuple[str, ...]  # one more than there are visual thoughts
    visual_thoughts: tuple[
        np.ndarray, ...
    ]  # uint8[H, W, 3] each: pictures of the intermediate step
    task: str  # name of the task in the released data: "Spatial_Navigation"
    full_text_only_thought: str  # the reasoning for a trace without pictures
    metadata: dict  # JSON-able: "family" and what scoring needs
