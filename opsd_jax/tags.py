"""Tags in texts: those around thoughts and answers, and the places of images in a question.

The tags are written around an example's texts, and read in a model's.
"""

import re
import unicodedata

PLACE = "<image>"  # of an image in a question, as TRL and ms-swift write it

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", flags=re.DOTALL)


def wrap_thought(text: str) -> str:
    """A reasoning text inside <think> tags, which texts of some sources already have."""
    text = text.strip()
    return text if text.startswith("<think>") else f"<think>{text}</think>"


def wrap_answer(text: str) -> str:
    """An answer inside <answer> tags, which answers of some sources already have."""
    text = text.strip()
    return text if text.startswith("<answer>") else f"<answer>{text}</answer>"


def extract_answer(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, stripped; None if there is none.

    "<answer>A</answer> no, <answer>B</answer> or <answer>C" -> "B"

    The result is in Unicode's normal form C, which Qwen2's tokenizers write every text in.
    """
    found = _ANSWER.findall(unicodedata.normalize("NFC", text))
    return found[-1].strip() if found else None


def split_answer(text: str) -> tuple[str, str, str] | None:
    """(text before, content, text after) of the last complete `<answer>...</answer>`, stripped.

    The content is the one that `extract_answer` finds, in the form that it has in the text. None if
    there is none.
    """
    found = [*_ANSWER.finditer(text)]
    if not found:
        return None
    last = found[-1]
    return text[: last.start()].strip(), last[1].strip(), text[last.end() :].strip()


def around_places(question: str) -> tuple[str, ...]:
    """The texts before, between and after the places of images in a question; one more than places.

    "Is <image> in <image>?" -> ("Is", "in", "?")

    White space is left out at the ends of the texts, which may be empty. A question without places
    is the only text, as it is. So is the text after places that all come first: they say no more
    than a question without places.
    """
    *before, last = question.split(PLACE)
    if not any(text.strip() for text in before):
        return (last.strip() if before else last,)
    return tuple(text.strip() for text in (*before, last))


def places_fault(question: str, images: int) -> str | None:
    """What is wrong with the places in a question about a number of images.

    None for as many places as images, and for none.
    """
    places = question.count(PLACE)
    if places in (0, images):
        return None
    return (
        f"has {places} place{'s' * (places != 1)} {PLACE} for {images} image"
        f"{'s' * (images != 1)}: give as many places as images, or none, and all images come first"
    )
