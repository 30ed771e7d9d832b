"""The tags around thoughts and answers: written around an example's texts, read in a model's."""

import re
import unicodedata

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
