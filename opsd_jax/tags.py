"""The tags around thoughts and answers: written around an example's texts, read in a model's."""

import re
import unicodedata


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
    found = re.findall(
        r"<answer>((?:(?!<answer>).)*?)</answer>",
        unicodedata.normalize("NFC", text),
        flags=re.DOTALL,
    )
    return found[-1].strip() if found else None
