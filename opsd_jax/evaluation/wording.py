"""What tables and pages call the content that the teacher sees and the student lacks.

With the blocks of the paper these are the visual thoughts. A run that names other blocks may have
no image at all, so its words are "privileged content".
"""

import dataclasses
from collections.abc import Iterable

from opsd_jax.blocks import BlockNames

_OF_BLOCKS = {"image": "the problem image", "question": "the question"}


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of one kind of contexts.

    Attributes:
      content: the privileged content, "visual thoughts". is_plural: whether that is a plural.
      true: an example's own, "true visual thoughts". them: the pronoun, "them".
      subject: what the content may teach, "the content of visual thoughts".
      no_part: after "without", no part of it: "any image".
      alone: a context without it, "text only". answers: answers there, "text-only answers".
      without: the same after "answers ... %": "without visual thoughts".
      instead: the same at the start of a sentence, "Without them".
    """

    content: str
    is_plural: bool
    true: str
    them: str
    subject: str
    no_part: str
    alone: str
    answers: str
    without: str
    instead: str

    @property
    def given(self) -> str:
        """How the teacher answers: "with true visual thoughts"."""
        return f"with {self.true}"

    @property
    def modes(self) -> dict[str, str]:
        """{mode of an evaluation: what the model answers with}."""
        return {
            "none": self.without,
            "real": self.given,
            "noise": f"with noise for {self.content}",
            "swap": f"with another example's {self.content}",
            "image": f"with the problem image for {self.content}",
            "remove": f"with the teacher's texts, no {self.content}",
            "generated": "with images that it generates",
            "generated-noise": "with noise for the images that it generates",
            "generated-swap": "with images generated for another example",
            "generated-remove": "without the images that it generates",
        }

    def verb(self, plural: str, singular: str) -> str:
        """The form of a verb, or of a pronoun, that goes with `content`."""
        return plural if self.is_plural else singular


OF_VISUAL_THOUGHTS = Words(
    content="visual thoughts",
    is_plural=True,
    true="true visual thoughts",
    them="them",
    subject="the content of visual thoughts",
    no_part="any image",
    alone="text only",
    answers="text-only answers",
    without="without visual thoughts",
    instead="Without them",
)
OF_PRIVILEGED = Words(
    content="privileged content",
    is_plural=False,
    true="privileged content",
    them="it",
    subject="the privileged content",
    no_part="privileged content",
    alone="question alone",
    answers="answers to the question alone",
    without="without privileged content",
    instead="Without it",
)
OF_NOTHING = dataclasses.replace(
    OF_PRIVILEGED,
    true="the teacher's blocks",
    them="them",
    without="with the student's blocks",
    instead="With the student's blocks",
)
"""Where the student has all blocks of the teacher."""


def of_blocks(names: BlockNames) -> Words:
    """The words of a run with these blocks."""
    if names.privileged == ("visual_thoughts",):
        return OF_VISUAL_THOUGHTS
    return OF_PRIVILEGED if names.privileged else OF_NOTHING


def of_runs(every: Iterable[BlockNames]) -> Words:
    """The words of runs in one table: those of each where they agree."""
    found = {of_blocks(names) for names in every}
    return found.pop() if len(found) == 1 else OF_PRIVILEGED


def listed(blocks: Iterable[str], *, images: bool) -> str:
    """Blocks of an example in words, "the problem image and the question".

    images: whether examples have problem images; if not, their blocks are left out.
    """
    shown = [
        _OF_BLOCKS.get(name, f"`{name}`")
        for name in blocks
        if images or not name.startswith("image") or name.startswith("images:")
    ]
    return " and ".join(shown) if len(shown) < 3 else f"{', '.join(shown[:-1])} and {shown[-1]}"
