"""The tokens of a conversation up to the assistant's turn.

  template  system prompt  template  user's texts and images  template  | completion
                                                                      ^ the last token of the
                                                                        template's text

All text between two images is encoded at once, as transformers encodes a rendered conversation.
A token belongs to the content in which it begins. The last token of the last text is left out: it
is the first token that is fed to the sampler, and predicts the first token of a completion, as bos
does in BAGEL's form (`Tokenizer.bos`).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from opsd_jax.chat_template import IMAGE, TEXT, ChatTemplate, Slot
from opsd_jax.tokenizer import Tokenizer

TEMPLATE = "template"  # name of the tokens that no content has
BETWEEN = "\n\n"  # two texts of a turn


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A part of the user's turn.

    name: name of its block.
    ids: int32 [n], ids of a text; None for an image.
    noise: int32 [m], ids that take the place of the text's tokens, whose number stays the same;
      None for the text itself.
    """

    name: str
    ids: Int[np.ndarray, " n"] | None
    noise: Int[np.ndarray, " m"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Segment:
    """A piece of text with the name of its tokens. noise: see `Part`."""

    name: str
    text: str
    noise: Int[np.ndarray, " m"] | None = None


def encode(
    tokenizer: Tokenizer, system: Int[np.ndarray, " n"], parts: Sequence[Part]
) -> list[tuple[str, Int[np.ndarray, " _"] | None]]:
    """(name, ids int32 [n]) of successive tokens; (name, None) for an image, with its delimiters.

    Args:
      tokenizer: was loaded in chat form.
      system: ids of the system prompt, none of them for the template's own.
      parts: the user's turn. Texts without an image between them are joined with an empty line.
    Raises:
      ValueError: see `ChatTemplate.layout`; or the template's last token depends on the contents.
    """
    template = _template(tokenizer)
    groups: list[list[Part]] = []
    for part in parts:
        if part.ids is None or not groups or groups[-1][0].ids is None:
            groups.append([])
        groups[-1].append(part)
    kinds = tuple(IMAGE if group[0].ids is None else TEXT for group in groups)
    found: list[tuple[str, Int[np.ndarray, " _"] | None]] = []
    waiting: list[_Segment] = []  # text since the last image
    for piece in template.layout(system=len(system) > 0, kinds=kinds):
        if isinstance(piece, str):
            waiting.append(_Segment(TEMPLATE, piece))
        elif piece.kind == IMAGE:
            found += [*_encoded(tokenizer, waiting), (groups[piece.part][0].name, None)]
            waiting = []
        elif piece.part < 0:
            waiting.append(_Segment("system", piece.stripped(tokenizer.decode(system))))
        else:
            waiting += _segments(tokenizer, piece, groups[piece.part])
    found += _encoded(tokenizer, waiting)
    name, ids = found.pop()
    if ids is None or name != TEMPLATE or ids[-1] != tokenizer.bos:
        raise ValueError(
            f"the chat template in {template.path} does not begin the assistant's turn with a text "
            "of its own: use the template of the model's folder, or set config.prompts.form='bagel'"
        )
    return [*found, (name, ids[:-1])] if len(ids) > 1 else found


def _template(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat is None:
        raise ValueError(
            "the tokenizer was loaded without its chat template, which contexts in chat form need: "
            "load it with form='chat'"
        )
    return tokenizer.chat


def _segments(tokenizer: Tokenizer, slot: Slot, group: Sequence[Part]) -> list[_Segment]:
    """The texts of a part of the template's, with what is between them."""
    texts = [tokenizer.decode(part.ids) for part in group if part.ids is not None]
    joined = [
        _Segment(part.name, text, part.noise) for part, text in zip(group, texts, strict=True)
    ]
    between = _Segment(TEMPLATE, BETWEEN)
    found = [segment for own in joined for segment in (between, own)][1:]
    # Only the ends of the whole part are the template's to strip.
    at_start = dataclasses.replace(slot, strip_right=False)
    at_end = dataclasses.replace(slot, strip_left=False)
    for at, edge in ((0, at_start), (-1, at_end)):
        found[at] = dataclasses.replace(found[at], text=edge.stripped(found[at].text))
    return found


def _encoded(
    tokenizer: Tokenizer, segments: Sequence[_Segment]
) -> list[tuple[str, Int[np.ndarray, " _"]]]:
    """(name, ids) of successive tokens of some segments, which are encoded as one text."""
    text = "".join(segment.text for segment in segments)
    ids = np.asarray(tokenizer.backend.encode(text, add_special_tokens=False).ids, np.int32)
    ends = np.cumsum([len(segment.text.encode()) for segment in segments])
    lengths = [len(tokenizer.token_bytes[n]) for n in ids]
    starts = np.cumsum([0, *lengths])[:-1]
    owners = np.minimum(np.searchsorted(ends, starts, side="right"), len(segments) - 1)
    found = []
    for owner, tokens in itertools.groupby(range(len(ids)), key=lambda n: owners[n]):
        own = ids[[*tokens]]
        segment = segments[owner]
        if segment.noise is not None:
            own = np.resize(segment.noise, len(own)).astype(np.int32)
        found.append((segment.name, own))
    return found
