"""Is this answer right? The public harness's rules for one item, as pure functions of texts.

Where the harness would ask a judge model, nothing is asked here: the item is marked by
`needs_judge`.
The rules keep their quirks, because published numbers were made with them; each function names its
own.
`table_scores` applies them to whole tables.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

NOTHING = "Z"
"""The option of a refusal, of a lone Z, and of an answer in which no rule finds a letter."""
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def tagged(text: str) -> str | None:
    """The text after the first <answer>, up to the next tag of either kind.

    None without a pair of tags.

    Quirk: the pair may be in any order, so the text after the first <answer> may extend to the end.
    """
    if "<answer>" not in text or "</answer>" not in text:
        return None
    return text.split("<answer>", 2)[1].split("</answer>", 1)[0]


def infer(text: str, options: dict[str, str]) -> str | None:
    """The option letter that a text names, or None if no rule decides.

    "Z" for a refusal or a lone Z.

    By letter: exactly one of the options is a token of the text, and its first position is among
    the last four tokens. Otherwise by content: exactly one option's text occurs in the text,
    ignoring case, and the text is at most twice as long as all options together.
    Quirks: the article "A" is a letter; a repeated letter counts where it occurs first;
    "<answer>B</answer>" is one token, and so is "B?"; a lone letter too far from the end may still
    win by content.

    Args:
      options: letter -> text, as `tables` reads them; letters may be missing.
    """
    if _FAILED not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return NOTHING
        tokens = text.translate(_MARKS).split()
        letters = [letter for letter in options if letter in tokens]
        if len(letters) == 1 and tokens.index(letters[0]) >= len(tokens) - 4:
            return letters[0]
        if not letters and NOTHING in tokens:
            return NOTHING
    if len(text) <= 2 * sum(map(len, options.values())):
        found = [letter for letter, option in options.items() if option.lower() in text.lower()]
        if len(found) == 1:
            return found[0]
    return None


def choose(prediction: str, options: dict[str, str]) -> tuple[str, bool]:
    """(option, needs_judge) of one multiple-choice answer.

    needs_judge: no rule found the option, which is then "Z".
    The whole answer is tried first, then its tagged part or, in a text without a pair of tags, its
    first \\boxed{}.
    Quirk: a lone letter at the end of the whole answer therefore beats the tag.
    """
    option = infer(prediction, options)
    if option is None:
        part = tagged(prediction)
        if part is None and (box := re.search(r"\\boxed\{([^}]*)\}", prediction)):
            part = box[1].strip()
        option = infer(part, options) if part else None
    return (NOTHING, True) if option is None else (option, False)


def circular(
    rows: Sequence[tuple[str, dict[str, str], str]],
) -> tuple[bool, bool | None]:
    """(hit, hit of the first pass) of one question asked in several orders of its options.

    All answers must be right.

    The first pass tries whole answers only: one wrong letter or refusal is a miss, all right is a
    hit. Otherwise it leaves the question open (None), and the open rows go through `choose`.
    Quirk: in its exact-matching run the harness stops after the first pass and counts open
      questions as misses.

    Args:
      rows: (prediction, options, answer) of each order.
    """
    first = [(infer(prediction, options), answer) for prediction, options, answer in rows]
    if any(option is not None and option != answer for option, answer in first):
        return False, False
    if all(option is not None for option, _ in first):
        return True, True
    return all(
        choose(prediction, options)[0] == answer for prediction, options, answer in rows
    ), None


_ROUTE = re.compile(r"\\boxed\{([RLUD](?:\s*,\s*[RLUD])*)\}")
_MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def boxed_path(prediction: str) -> str | None:
    """The moves of the last well-formed \\boxed{R, D, ...} joined by commas ("R,D"), or None.

    Quirks: a backspace character is read as "\\b", since unescaping turns "\\boxed" into one;
    blanks are allowed around commas but not next to the braces; tags are ignored.
    """
    boxes = _ROUTE.findall(prediction.replace("\b", r"\b"))
    return "".join(boxes[-1].split()) if boxes else None


def maze_rows(maze: str | list[str] | float) -> list[str]:
    """Rows of a maze of S, G, F, H, given as a list or printed as one, with commas or without.

    An empty cell (NaN) has no rows.
    """
    if isinstance(maze, float):
        return []
    return re.findall(r"'([^']*)'", maze) if isinstance(maze, str) else list(maze)


def walk(maze: str | list[str] | float, size: int, path: str | None) -> bool:
    """Whether a path ("R,D") leads from S to an end on G.

    It must stay inside size x size cells and never enter an H.

    Quirks: passing over G does not count; of two S or two G the last one in reading order counts.
    """
    rows = maze_rows(maze)
    cells = {(r, c): cell for r, row in enumerate(rows) for c, cell in enumerate(row)}
    places = {cell: place for place, cell in cells.items()}
    if not path or "S" not in places or "G" not in places:
        return False
    r, c = places["S"]
    for move in path.split(","):
        r, c = r + _MOVES[move][0], c + _MOVES[move][1]
        if not (0 <= r < size and 0 <= c < size) or cells.get((r, c), "H") == "H":
            return False
    return (r, c) == places["G"]


def extract(prediction: str) -> tuple[str, bool]:
    """(answer, needs_judge) of a chart answer: the tagged part, else the whole text.

    It is stripped and may be empty.

    Without a pair of tags the harness has a judge find the answer in the text.
    """
    text = prediction.replace("Round_0:", " ").replace("Round_1:", " ")
    part = tagged(text)
    return (text.strip(), True) if part is None else (part.strip(), False)


def number(text: str) -> float | None:
    """The text as Python reads a float, "50%" as 0.5.

    None if it is not a number ("1,200", "$5", "12 units").
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def accepted(answer: Any) -> list[str]:
    """The right answers of a chart question: the cell's text, or the items of the list in it."""
    try:
        value = ast.literal_eval(str(answer))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    return [str(item) for item in value] if isinstance(value, list) else [str(answer)]


def relaxed(extracted: str, truth: str, *, fork: bool) -> bool:
    """Whether a chart answer is within 5 % of the truth, or else the same text.

    fork=False: the usual definition, 5 % of the truth. fork=True: what the harness does, 5 % of the
    answer: 95 for 100 is wrong, 105.2 for 100 right.

    Texts are compared where one of the two is no number, or where the number that the error is
    relative to is zero: for fork=True "0" differs from "0.0". "nan" equals no number.
    """
    reference, other = map(number, (extracted, truth) if fork else (truth, extracted))
    if reference and other is not None:
        return abs(other - reference) / abs(reference) <= 0.05
    return extracted.lower() == truth.lower()


def chart_score(extracted: str, answer: Any, *, fork: bool) -> float:
    """1.0 if the extracted answer matches any accepted one, else 0.0."""
    return float(any(relaxed(extracted, truth, fork=fork) for truth in accepted(answer)))
