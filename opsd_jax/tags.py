"""The tags around thoughts and answers: written around what a row holds, read in what a model says."""

import re
import unicodedata


def wrap_thought(text: str) -> str:
    """A reasoning text inside its <think> tags, which some sources already have."""
    text = text.strip()
    return text if text.startswith("<think>") else f"<think>{text}</think>"


def wrap_answer(text: str) -> str:
    """An answer inside its <answer> tags, which some sources already have."""
    text = text.strip()
    return text if text.startswith("<answer>") else f"<answer>{text}</answer>"


def extract_answer(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, stripped; None when there is none.

    "<answer>A</answer> no, <answer>B</answer> or <answer>C" -> "B"

    In Unicode's normal form C, as tokenizers of the Qwen2 kind write every text.
    """
    found = re.findall(
        r"<answer>((?:(?!<answer>).)*?)</answer>",
        unicodedata.normalize("NFC", text),
        flags=re.DOTALL,
    )
    return found[-1].strip() if found else None
