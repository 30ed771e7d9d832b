"""The chat template of a model's folder: the text around the contents of a conversation.

transformers renders it, with marks in the places of the contents. The rendered text is split at the
marks once for each shape of a conversation, so that contents never pass through the template.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_jax.inputs import json_files

TEXT, IMAGE = "text", "image"
# What the templates of Qwen's vision-language models write for an image.
IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"
THINK = "<think>"

# Templates leave a mark of letters as it is. Blanks around it show whether they strip a content.
_MARK = "OPSDCONTENT{}END"
_BLANKS = "\n\t \t\n"
# The date that Llama 3's templates write where they are given none and cannot ask for today's. A
# context must be the same on every day.
_DATE = "26 Jul 2024"

Message = Mapping[str, Any]
"""A message as transformers takes it: "role", and "content", a text or a list of parts."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a content in a rendered conversation.

    part: number of the part of the user's turn, or -1 for the system prompt.
    kind: `TEXT`, or `IMAGE`, which includes the delimiters that the template writes around it.
    strip_left, strip_right: whether the template strips white space of the content at that end.
    """

    part: int
    kind: str = TEXT
    strip_left: bool = False
    strip_right: bool = False

    def stripped(self, text: str) -> str:
        """A content as the template writes it."""
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and how it is rendered.

    text: in Jinja.
    path: the file that it was read from, for messages.
    special_tokens: (name, text) of tokens that templates write by name, such as bos_token.
    thinking: `enable_thinking` of the template; templates without thinking ignore it.
    """

    text: str
    path: str
    special_tokens: tuple[tuple[str, str], ...] = ()
    thinking: bool = False

    @property
    def digest(self) -> str:
        """Checksum of what is rendered."""
        facts = repr((self.text, self.special_tokens, self.thinking)).encode()
        return hashlib.blake2b(facts, digest_size=16).hexdigest()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """The text of a conversation, by transformers.

        Args:
          add_generation_prompt: whether the assistant's next turn is begun.
          values: further variables of the template.
        Raises:
          ValueError: the template is no Jinja, or refuses the messages.
        """
        # It takes seconds, and only chat form needs it.
        from transformers.utils import chat_template_utils

        known = {"date_string": _DATE, "enable_thinking": self.thinking} | dict(self.special_tokens)
        try:
            rendered = chat_template_utils.render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                **known | values,
            )
        except Exception as e:  # templates raise exceptions of Jinja, and of their own
            raise ValueError(
                f"the chat template in {self.path} cannot be rendered ({e}): copy the model's "
                "folder again, or set config.prompts.form='bagel'"
            ) from e
        return rendered[0][0]

    def layout(self, *, system: bool, kinds: tuple[str, ...]) -> tuple[str | Slot, ...]:
        """The conversation up to the assistant's turn: the template's texts, and slots of contents.

        Args:
          system: whether there is a system prompt. Some templates write one of their own otherwise.
          kinds: the parts of the user's turn in order, each `TEXT` or `IMAGE`.
        Raises:
          ValueError: the template drops, repeats or reorders a content, or cannot be rendered.
        """
        return _layout(self, system, kinds)

    def end(self) -> str:
        """What the template writes after the text of the assistant's last turn."""
        mark = _MARK.format("A")
        messages = [_message("user", "Q"), _message("assistant", mark)]
        parts = self.render(messages, add_generation_prompt=False).split(mark)
        if len(parts) != 2:
            raise ValueError(self._fault("the assistant's turn", len(parts) - 1))
        return parts[1]

    def _fault(self, what: str, count: int) -> str:
        found = "drops it" if not count else f"writes it {count} times"
        return (
            f"the chat template in {self.path} should write {what} once and in its place, and "
            f"{found}: use the template of the model's family (one for images, if contexts show "
            "any), or set config.prompts.form='bagel'"
        )


def _message(role: str, content: str | list) -> Message:
    return {"role": role, "content": content}


@functools.lru_cache(maxsize=1 << 10)
def _layout(template: ChatTemplate, system: bool, kinds: tuple[str, ...]) -> tuple[str | Slot, ...]:
    def marked(name):
        return f"{_BLANKS}{_MARK.format(name)}{_BLANKS}"

    user: str | list[dict[str, str]] = [
        {"type": TEXT, "text": marked(n)} if kind == TEXT else {"type": IMAGE}
        for n, kind in enumerate(kinds)
    ]
    if IMAGE not in kinds:  # templates of models that read text alone take no lists
        if len(kinds) > 1:
            raise ValueError("texts without an image between them are one part")
        user = marked(0) if kinds else ""
    messages = [_message("system", marked("S"))] if system else []
    rendered = template.render([*messages, _message("user", user)])
    names = {_MARK.format("S"): -1} | {_MARK.format(n): n for n in range(len(kinds))}
    marks = "|".join(map(re.escape, names))
    blank = re.escape(_BLANKS)
    found: list[str | Slot] = []
    images = iter([n for n, kind in enumerate(kinds) if kind == IMAGE])
    pattern = rf"((?:{blank})?(?:{marks})(?:{blank})?|{re.escape(IMAGE_TEXT)})"
    for piece in re.split(pattern, rendered):
        name = piece.strip()
        if name in names:
            left, right = not piece.startswith(_BLANKS), not piece.endswith(_BLANKS)
            found.append(Slot(names[name], TEXT, left, right))
        elif piece == IMAGE_TEXT:
            found.append(Slot(next(images, len(kinds)), IMAGE))
        elif piece:
            found.append(piece)
    _check_slots(template, [piece for piece in found if isinstance(piece, Slot)], system, kinds)
    return tuple(found)


def _check_slots(
    template: ChatTemplate, slots: Sequence[Slot], system: bool, kinds: tuple[str, ...]
) -> None:
    """Raises ValueError unless each content is rendered once, in its place."""
    wanted = [(-1, TEXT)] * system + list(enumerate(kinds))
    shown = [(slot.part, slot.kind) for slot in slots]
    if shown == wanted:
        return
    for content in wanted:
        if (count := shown.count(content)) != 1:
            part, kind = content
            what = "the system prompt" if part < 0 else f"the {kind} of the user's turn"
            raise ValueError(template._fault(what, count))
    raise ValueError(template._fault("each content", len(shown)))


def is_there(directory: str | os.PathLike[str]) -> bool:
    """Whether a tokenizer folder has a chat template."""
    return _find(os.fspath(directory))[0] is not None


def read(directory: str | os.PathLike[str], *, thinking: bool = False) -> ChatTemplate:
    """The chat template of a tokenizer folder.

    It is in chat_template.jinja, or else in chat_template.json (of a processor), or else in
    tokenizer_config.json. Of several named ones it is that called "default".

    Args:
      thinking: whether the model writes its thoughts before the answer. Without it, the templates
        of Qwen3 begin the assistant's turn with an empty think block.
    Raises:
      ValueError: there is none, its file does not parse, or it has no thinking that could be asked
        for.
    """
    directory = os.fspath(directory)
    text, path = _find(directory)
    if text is None:
        raise ValueError(
            f"{directory} has no chat template, which config.prompts.form='chat' needs: copy "
            "chat_template.jinja from the model's folder (its tokenizer_config.json may have it "
            "instead), give the tokenizer of a model that was trained on conversations, or set "
            "config.prompts.form='bagel'"
        )
    template = ChatTemplate(text, path, _special_tokens(directory), thinking)
    if thinking:
        question = [_message("user", "Q")]
        thoughtful = template.render(question)
        if (
            thoughtful == dataclasses.replace(template, thinking=False).render(question)
            and THINK not in thoughtful
        ):
            raise ValueError(
                f"config.prompts.thinking is True, but the chat template in {path} has no thinking "
                "mode (it does not read enable_thinking): set config.prompts.thinking=False"
            )
    return template


def _find(directory: str) -> tuple[str | None, str]:
    """(text of the chat template of a folder, its file); (None, "") without one."""
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return file.read(), path
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            continue
        found = json_files.read(path).get("chat_template")
        if isinstance(found, list):  # [{"name": ..., "template": ...}]
            found = {one.get("name"): one.get("template") for one in found}.get("default")
        if isinstance(found, str):
            return found, path
    return None, ""


def _special_tokens(directory: str) -> tuple[tuple[str, str], ...]:
    """(name, text) of the special tokens that tokenizer_config.json names."""
    config = json_files.read(os.path.join(directory, "tokenizer_config.json"))
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return tuple(found.items())
