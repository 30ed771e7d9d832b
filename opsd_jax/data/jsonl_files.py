"""JSONL files: one example a line, with columns by name or as chat messages.

Images are files beside the JSONL file, or base64. docs/reference/file-formats.md has the keys.
"""

import base64
import binascii
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from absl import logging

from opsd_jax import tags
from opsd_jax.data import parquet_files, schema
from opsd_jax.inputs import columns as columns_lib
from opsd_jax.inputs import json_files

NAMED, CHAT = "JSONL with columns by name", "JSONL with chat messages"

# Keys of lines with columns by name, beside the columns of the schema.
_FRIENDLY = {"image": "problem_image_0", "text_trace": "full_text_only_thought"}
_LISTS = {
    "images": schema.PROBLEM_COLUMNS,
    "thoughts": "resoning_thought_",
    "visual_thoughts": "reasoning_image_",
}
# Keys of chat lines that --columns may keep: {key: its name there}.
OPTIONAL = {
    "teacher_prompt": "text:teacher_prompt",
    "teacher_images": "images:teacher_images",
    "solution": "text:solution",
}
_CHAT_KEYS = ("messages", "images")
_SHARED = ("pid", "task", "metadata")  # columns of the schema that chat lines may have
_FIRST_THOUGHT, _TRACE = "resoning_thought_0", "full_text_only_thought"
_CHAT_COLUMNS = ("question", "answer", "problem_image_0", _FIRST_THOUGHT, _TRACE)
_SECOND_IMAGE = f"{schema.PROBLEM_COLUMNS}1"
# How PNG, JPEG, GIF and WebP files begin in base64, which has no "." that a file's name has.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_IMAGE_FILE = re.compile(r"[^\s:]+\.(png|jpe?g|gif|webp|bmp|tiff?)", re.IGNORECASE)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _FaultError(ValueError):
    """What is wrong with a key of a line: (key, fault)."""


def scan(path: Path, stop: int, further: Sequence[str] = ()) -> schema.Scan:
    """The format, columns and pids of lines 0 .. stop-1, and their checksum with their images.

    further: names of further columns that the file must have, "text:COLUMN" or "images:COLUMN".

    Raises BadSourceError if the file cannot be read, if no line tells its format, if a column is
    missing or a name looks misspelt.
    """
    kind, digest = _format(path), hashlib.blake2b(digest_size=16)
    keys: dict[str, None] = {}
    pids: list = []
    likely: dict[str, Any] = {}  # {key: a value of it that looks like an image}
    several = optional = False
    for raw, line, row in _rows(path, stop, further):
        keys |= dict.fromkeys(line)
        likely |= {key: value for key, value in line.items() if _is_likely_image(value)}
        pids.append(row.values.get("pid"))
        several |= row.values.get(_SECOND_IMAGE) is not None
        optional |= row.fault is None and row.values.get(_CHAT_COLUMNS[2]) is None
        digest.update(raw)
        if row.fault is not None:  # a missing image that is there later changes the checksum
            digest.update(str(row.fault.note.reason).encode("utf-8", "replace"))
        for data in _encoded(row.values):
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    present = _present(path, kind, list(keys), further) if pids else []
    _check_image_keys(path, kind, list(keys), likely, further)
    return schema.Scan(kind, present, pids, len(pids), digest.hexdigest(), several, optional)


def read_batches(path: Path, stop: int, further: Sequence[str] = ()) -> Iterator[list[schema.Row]]:
    """Lines 0 .. stop-1 as lists of rows, with their images.

    A batch is in memory, never the whole file. A faulty line is a row with a `fault`. Raises
    BadSourceError if the file cannot be read or no line tells its format.
    """
    rows, size = [], 0
    for raw, _, row in _rows(path, stop, further):
        rows.append(row)
        size += len(raw) + sum(map(len, _encoded(row.values)))
        if len(rows) == schema.BATCH_ROWS or size >= schema.BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _encoded(values: Mapping[str, Any]) -> Iterator[bytes]:
    """The encoded images among the values of a row."""
    for value in values.values():
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
                yield image["bytes"]


# --- formats and columns -------------------------------------------------------------------------


def _format(path: Path) -> str:
    """NAMED or CHAT, by the keys of the first line that is a JSON object. NAMED for an empty file.

    Raises BadSourceError.
    """
    first = ""
    for index, raw in enumerate(_lines(path)):
        try:
            line = _parse(raw)
        except _FaultError as error:
            first = first or f"line {index + 1} {error.args[1]}"
            continue
        named = [key for key in line if _is_named_only(key)]
        if "messages" in line and named:
            raise schema.BadSourceError(
                f"{path}, line {index + 1} has both 'messages' and {named[0]!r}: is it a chat, or "
                "an example with columns by name? Leave one of them out"
            )
        return CHAT if "messages" in line else NAMED
    if first:
        raise schema.BadSourceError(f"{path} has no line that is a JSON object: {first}")
    return NAMED


def _is_named_only(key: str) -> bool:
    """Whether only lines with columns by name have a key."""
    if key in (*_SHARED, *_CHAT_KEYS):
        return False
    return schema.is_of_schema(key) or key in _FRIENDLY or key in _LISTS


def _present(path: Path, kind: str, keys: list[str], further: Sequence[str]) -> list[str]:
    """The columns that lines with these keys have. Raises BadSourceError for wrong ones."""
    asked = [columns_lib.of_files(name) for name in further]
    if own := [key for key in asked if key in (*_FRIENDLY, *_LISTS, *_CHAT_KEYS)]:
        raise schema.BadSourceError(
            f"{path}: --columns names {own[0]}, which JSONL files have for the example itself: "
            "leave it out, or rename the key"
        )
    if kind == CHAT:
        free = [key for key in keys if key not in (*_CHAT_KEYS, *_SHARED)]
        schema.check_further(path, free, further, "key")
        return [*_CHAT_COLUMNS, *(key for key in keys if key not in _CHAT_KEYS)]
    friendly = [*_FRIENDLY, *_LISTS]
    for key in keys:
        known = schema.is_of_schema(key) or key in friendly or key in asked
        others = [name for name in friendly if name not in keys]
        if not known and (close := difflib.get_close_matches(key, others, 1, cutoff=0.85)):
            raise schema.BadSourceError(f"{path}: {key!r} is not read: did you mean {close[0]!r}?")
    names = _FRIENDLY | {key: f"{prefix}0" for key, prefix in _LISTS.items()}
    present = list(dict.fromkeys(names.get(key, key) for key in keys))
    if not any(map(_is_of_rounds, keys)):
        present.append(_FIRST_THOUGHT)  # see `_from_named`
    schema.check_further(path, keys, further, "key")
    missing = [column for column in schema.REQUIRED_COLUMNS if column not in present]
    if missing and not parquet_files.misspelt(present, further):
        own = _keys({})
        wanted = ", ".join(dict.fromkeys(repr(own.get(c, c).partition("[")[0]) for c in missing))
        raise schema.BadSourceError(
            f"{path} has no key {wanted}; its keys: {', '.join(keys)}. Rename or add the key"
        )
    parquet_files.columns(path, present, further)  # raises for wrong ones
    return present


def _check_image_keys(
    path: Path, kind: str, keys: list[str], likely: Mapping[str, Any], further: Sequence[str]
) -> None:
    """Checks that no key that is not read has the problem images of a file that names none.

    likely: {key: a value of it that looks like an image}. Raises BadSourceError.
    """
    own = ("images",) if kind == CHAT else ("image", "images")
    if any(key in own or schema.is_problem_image(key) for key in keys):
        return
    read = [columns_lib.of_files(name) for name in further]
    for key, value in likely.items():
        if key in (*read, *OPTIONAL, *_LISTS) or schema.is_of_schema(key):
            continue
        wanted = "images" if kind == CHAT or isinstance(value, list) else "image"
        raise schema.BadSourceError(
            f"{path} has no key {wanted!r}, but {key!r} seems to hold images "
            f"({json_files.shown(value)}): rename it to {wanted!r}, or drop it for questions "
            "without an image"
        )


def _is_likely_image(value: Any) -> bool:
    """Whether a value of any key looks like an image, or like a list of them."""
    match value:
        case [first, *_]:
            return not isinstance(first, list) and _is_likely_image(first)
        case {"bytes": _}:
            return True
        case str():
            return _IMAGE_FILE.fullmatch(value) is not None or value.startswith(
                ("data:image/", *_BASE64_STARTS)
            )
    return False


def _chat_names(line: Mapping[str, Any]) -> dict[str, str]:
    """{column: what it is in a chat}, for messages."""
    shown = line.get("images")
    count = max(1, len(shown) if isinstance(shown, list) else 0)
    one = {f"{schema.PROBLEM_COLUMNS}0": "images"}
    several = {f"{schema.PROBLEM_COLUMNS}{n}": f"images[{n}]" for n in range(count)}
    return (several if count > 1 else one) | {
        "resoning_thought_0": "messages",
        "full_text_only_thought": "the reasoning of the assistant turn",
    }


def _keys(line: Mapping[str, Any]) -> dict[str, str]:
    """{column: key} where a line has, or a user would write, another name than the schema's."""
    found = {}
    for key, prefix in _LISTS.items():
        items = line.get(key)
        count = max(schema.ROUNDS, len(items) if isinstance(items, list) else 0)
        found |= {f"{prefix}{n}": f"{key}[{n}]" for n in range(count)}
    for key, column in _FRIENDLY.items():
        if key in line or not any(k in line and column.startswith(p) for k, p in _LISTS.items()):
            found[column] = key
    return {column: key for column, key in found.items() if column not in line}


# --- lines ---------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, one in memory at a time, without empty ones at its end.

    Raises BadSourceError.
    """
    empty = []
    try:
        with open(path, "rb") as file:
            for line in file:
                if not line.strip():
                    empty.append(line)
                    continue
                yield from empty
                empty.clear()
                yield line
    except OSError as error:
        raise schema.BadSourceError(f"{path} cannot be read ({error})") from error


def _rows(
    path: Path, stop: int, further: Sequence[str]
) -> Iterator[tuple[bytes, dict, schema.Row]]:
    """(bytes of the line, its JSON object or {}, its row) of lines 0 .. stop-1."""
    kind = _format(path)
    for index, raw in zip(range(stop), _lines(path)):
        line: dict = {}
        names: Mapping[str, str] = {}
        try:
            line = _parse(raw)
            names = (_chat_names if kind == CHAT else _keys)(line)
            values, remarks = (_from_chat if kind == CHAT else _from_named)(line, further)
            _check_pid(values)
            values = _with_images(values, path.parent, further)
            row = schema.Row(index, values, tuple(remarks), names=names)
        except (_FaultError, RecursionError) as error:
            if isinstance(error, RecursionError):
                error = _FaultError("line", "has too many brackets inside each other")
            pid = line.get("pid")
            pid = str(pid) if isinstance(pid, str | int) else f"{path.stem}:{index}"
            column, fault = error.args
            column = names.get(column, column)
            bad = schema.BadRowError(str(path), index, pid, column, fault)
            row = schema.Row(index, {}, fault=bad)
        if (index + 1) % 10_000 == 0:  # of a slow file system
            logging.info("%s: %s lines read, with their images", path, f"{index + 1:,}")
        yield raw, line, row


def _parse(raw: bytes) -> dict:
    """The JSON object of a line. Raises _FaultError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _FaultError("line", f"has the key {twice!r} twice: give it once")
        return found

    try:
        text = raw.decode("utf-8-sig").strip()  # some editors begin a file with a mark
        if not text:
            raise _FaultError("line", "is empty: delete it")
        found = json.loads(text, object_pairs_hook=unique)
        if _SURROGATE.search(raw):  # half of a pair is no text, which writing would find too late
            json.dumps(found, ensure_ascii=False).encode()
    except _FaultError:
        raise
    except UnicodeError as error:
        raise _FaultError("line", f"is not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of open brackets
        raise _FaultError("line", f"is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise _FaultError("line", f"is a JSON {type(found).__name__}, not an object {{...}}")
    return found


def _check_pid(values: dict[str, Any]) -> None:
    pid = values.get("pid")
    if isinstance(pid, bool) or not isinstance(pid, str | int | None):
        raise _FaultError("pid", f"is of type {type(pid).__name__}: give a text or a whole number")


def _with_images(values: dict[str, Any], folder: Path, further: Sequence[str]) -> dict[str, Any]:
    """The values with images as {bytes, path}, and metadata as text."""
    several = {columns_lib.of_files(name) for name in schema.further_images(further)}
    found = dict(values)
    for column, value in values.items():
        if column in several and isinstance(value, list):
            found[column] = [_image(image, column, folder) for image in value]
        elif column in several or _is_image(column):
            found[column] = _image(value, column, folder)
        elif column == "metadata" and isinstance(value, dict):
            found[column] = json.dumps(value)
    return found


def _is_image(column: str) -> bool:
    return column in schema.VISUAL_THOUGHT_COLUMNS or schema.is_problem_image(column)


# --- the two formats -----------------------------------------------------------------------------


def _from_named(line: dict, further: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The columns of a line that has them by name, and remarks. Raises _FaultError.

    Thoughts stand between visual thoughts. A line that names neither, such as a question of a text
    model, has its text trace as its one thought.
    """
    if "messages" in line:
        raise _FaultError("messages", "belongs to chats, and this file has columns by name")
    values: dict[str, Any] = {}
    for key, value in line.items():
        items = {_FRIENDLY.get(key, key): value}
        if key in _LISTS:
            if not isinstance(value, list | None):
                raise _FaultError(key, f"is of type {type(value).__name__}, not a list")
            items = {f"{_LISTS[key]}{n}": item for n, item in enumerate(value or ())}
        for column, item in items.items():
            if column in values:
                raise _FaultError(key, f"and another key both give {column}: leave one out")
            values[column] = item
    for column in ("question", "answer"):
        if column not in values:
            raise _FaultError(column, "is missing")
    if any(_is_of_rounds(key) for key, value in line.items() if value):
        if not any(line.get(key) for key in ("thoughts", *schema.THOUGHT_COLUMNS)):
            raise _FaultError(
                "thoughts",
                "is missing or empty, and the line has visual thoughts, which stand between "
                "thoughts: give thoughts, or leave both out",
            )
        return values, []
    trace = values.get(_TRACE)
    values[_FIRST_THOUGHT] = trace or values["answer"]
    return values, [] if trace else ["no_thought: the line has no thoughts and no text_trace"]


def _is_of_rounds(key: str) -> bool:
    """Whether a key by name gives thoughts or visual thoughts."""
    return key in ("thoughts", "visual_thoughts") or key in (
        *schema.THOUGHT_COLUMNS,
        *schema.VISUAL_THOUGHT_COLUMNS,
    )


def _from_chat(line: dict, further: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The columns of a chat line, and remarks on what is not read. Raises _FaultError."""
    asked = {columns_lib.of_files(name) for name in further}
    if named := [key for key in line if _is_named_only(key) and key not in asked]:
        raise _FaultError(
            named[0], "belongs to lines with columns by name, and this file has chats"
        )
    turns, remarks = _turns(line.get("messages"))
    users = [n for n, (role, _) in enumerate(turns) if role == "user"]
    if not users:
        raise _FaultError("messages", "has no user turn, which holds the question")
    if [role for role, _ in turns[users[-1] + 1 :]] != ["assistant"]:
        raise _FaultError("messages", "must end with a user turn and one assistant turn")
    if earlier := [role for role, _ in turns[: users[-1]]]:
        remarks.append(
            f"ignored_turn: {len(earlier)} before the last user turn ({', '.join(earlier)})"
        )
    asked_text, said = turns[users[-1]][1], turns[-1][1]
    shown = line.get("images")
    shown = shown if isinstance(shown, list) else [] if shown is None else [shown]
    if fault := tags.places_fault(asked_text, len(shown)):
        raise _FaultError(
            "messages",
            f"{fault}. Images that only the teacher sees belong in teacher_images, and those of "
            "earlier turns are not read",
        )
    if tags.PLACE in said:
        raise _FaultError(
            "messages",
            f"has {tags.PLACE} in the assistant turn: such images belong in teacher_images",
        )
    trace, answer, after = tags.split_answer(said) or ("", said.strip(), "")
    if after:
        remarks.append("ignored_text: the assistant turn has text after </answer>")
    if not trace:
        remarks.append("no_thought: the assistant turn has no reasoning, its thought is the answer")
    # Keys that a run does not ask for stay out, whatever they hold.
    values = {key: line[key] for key in line if key in asked or key in _SHARED}
    if isinstance(prompt := values.get("teacher_prompt"), str):
        values["teacher_prompt"] = _without_places(prompt)
    # Places before the text say no more than a text without places.
    between = len(tags.around_places(asked_text)) > 1
    question = asked_text.strip() if between else _without_places(asked_text)
    first, *more = shown or [None]
    texts = (question, answer, first, trace or answer, trace)
    values |= dict(zip(_CHAT_COLUMNS, texts, strict=True))
    values |= {f"{schema.PROBLEM_COLUMNS}{n}": image for n, image in enumerate(more, 1)}
    return values, remarks


def _without_places(text: str) -> str:
    return text.replace(tags.PLACE, "").strip()


def _turns(messages: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """(role, text) of each turn, and remarks on keys that are not read. Raises _FaultError."""
    if messages is None:
        raise _FaultError("messages", "is missing")
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise _FaultError("messages", "is not a list of objects {role, content}")
    turns, remarks = [], []
    for n, turn in enumerate(messages):
        role = turn.get("role")
        if role not in ("system", "user", "assistant"):
            raise _FaultError(
                "messages",
                f"has the role {json_files.shown(role)} in turn {n}: system, user and assistant "
                "are read",
            )
        turns.append((role, _text(turn.get("content"), n)))
        others = [key for key in turn if key not in ("role", "content") and turn[key] is not None]
        if others:
            remarks.append(f"ignored_key: {', '.join(others)} of turn {n}")
    return turns, remarks


def _text(content: Any, turn: int) -> str:
    """The text of a turn; content is a text, or a list of parts of type text or image."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _FaultError(
            "messages", f"has a {type(content).__name__} as content of turn {turn}, not a text"
        )
    texts = []
    for part in content:
        # Writers with fixed columns fill what a part lacks with null.
        given = (
            part if not isinstance(part, dict) else {k: v for k, v in part.items() if v is not None}
        )
        match given:
            case {"type": "text", "text": str(text), **rest} if not rest:
                texts.append(text)
                continue
            case {"type": "image", **rest} if not rest:
                texts.append(tags.PLACE)
                continue
        raise _FaultError(
            "messages",
            f"has the part {json_files.shown(part)} in turn {turn}: give {{type: text, text}} or "
            "{type: image}, and the image itself in images",
        )
    return "".join(texts)


# --- images --------------------------------------------------------------------------------------


def _image(value: Any, column: str, folder: Path) -> dict[str, Any] | None:
    """{bytes, path} of an image: a path, base64, a data URL, or an object {bytes, path} of them.

    None stays None. Raises _FaultError.
    """
    if isinstance(value, dict):
        if not value or set(value) - {"bytes", "path"}:
            raise _FaultError(
                column,
                f"is {json_files.shown(value)}, not an image {{bytes, path}}: give its path, "
                'base64, or {"bytes": base64}',
            )
        if value.get("bytes") is not None:
            return _decoded(value["bytes"], column)
        value = value.get("path")
    if value is None:
        return None
    if not isinstance(value, str):
        raise _FaultError(
            column, f"is of type {type(value).__name__}, not an image's path or base64"
        )
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise _FaultError(column, "is a data URL that is not in base64")
        return _decoded(data, column)
    if value.startswith(_BASE64_STARTS) and "." not in value:
        return _decoded(value, column)
    return {"bytes": _file(value, column, folder), "path": value}


def _decoded(text: Any, column: str) -> dict[str, Any]:
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise _FaultError(column, f"is not valid base64 ({error})") from None
    if not data:
        raise _FaultError(column, "holds no bytes")
    return {"bytes": data, "path": None}


def _file(name: str, column: str, folder: Path) -> bytes:
    """The content of a file that a line names. Symbolic links are followed."""
    shown, paths = json_files.shown(name), (PurePosixPath(name), PureWindowsPath(name))
    if "://" in name:
        raise _FaultError(column, f"is the address {shown}: download the image, and give its path")
    if any(path.anchor or ".." in path.parts for path in paths):
        raise _FaultError(
            column, f"is {shown}: give a path below the folder of the JSONL file, relative to it"
        )
    path = folder / name
    if not os.path.isfile(path):
        raise _FaultError(column, f"is {shown}, and there is no such file in {folder}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _FaultError(column, f"is {shown}, which cannot be read ({error})") from None
    if not data:
        raise _FaultError(column, f"is {shown}, which is an empty file")
    return data
