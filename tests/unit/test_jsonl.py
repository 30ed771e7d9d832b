"""opsd_jax/data/jsonl_files: both JSONL formats, what is refused, and the files that come out."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from opsd_jax.data import source_files
from opsd_jax.data.arrayrecord import open_source
from opsd_jax.data.prepare import Part, prepare
from opsd_jax.data.schema import BadRowError, BadSourceError


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE, GREEN = map(png, ("red", "blue", "green"))
B64 = base64.b64encode(BLUE).decode()
NAMED = {
    "pid": "p0",
    "question": "Which? ü",
    "answer": "red",
    "image": "images/red.png",
    "thoughts": ["look", "it is red"],
    "visual_thoughts": [B64],
    "text_trace": "I see red.",
}
CHAT = {
    "pid": "c0",
    "messages": [
        {"role": "user", "content": "<image>\nWhich?"},
        {"role": "assistant", "content": "I see red.\n<answer> red </answer>"},
    ],
    "images": ["images/red.png"],
    "teacher_prompt": "<image>It is the first.",
    "teacher_images": ["images/green.png", {"bytes": B64, "path": None}],
    "solution": "Red, because.",
}
KEPT = ("text:teacher_prompt", "images:teacher_images", "text:solution")


def write(folder: Path, *lines: dict | str, name: str = "train.jsonl") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for colour, data in (("red", RED), ("green", GREEN)):
        (folder / f"images/{colour}.png").write_bytes(data)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return folder / name


def turns(user, assistant, *before: dict) -> list[dict]:
    return [
        *before,
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]


def read(path: Path, *further: str):
    return list(source_files.read_examples(path, task="T", further=further))


def test_columns_by_name(tmp_path):
    released = {
        "question": "Why?",
        "answer": "so",
        "problem_image_0": {"bytes": None, "path": "images/green.png"},
        "resoning_thought_0": "hm",
        "reasoning_image_0": "data:image/png;base64," + B64,
        "task": "Other",
        "metadata": {"a": [1, "é"]},
        "hint": "left",
        "crops": "images/red.png",
    }
    path = write(tmp_path, NAMED, released)
    first, second = read(path, "text:hint", "images:crops")
    assert (first.pid, first.task, first.question, first.answer) == ("p0", "T", "Which? ü", "red")
    assert (first.problem_image, first.visual_thoughts) == (RED, (BLUE,))
    assert first.thoughts == ("look", "it is red") and first.full_text_only_thought == "I see red."
    assert first.columns == {"text:hint": "", "images:crops": ()}
    assert (second.pid, second.task, second.problem_image) == ("train:1", "Other", GREEN)
    assert (second.visual_thoughts, second.thoughts) == ((BLUE,), ("hm",))
    assert second.metadata == {"a": [1, "é"]}
    assert second.columns == {"text:hint": "left", "images:crops": (RED,)}


def test_chats(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]
    before = ({"role": "system", "content": "S"}, *turns("a", "b"))
    said = "<answer>no</answer> or <answer>so</answer>."
    path = write(
        tmp_path,
        CHAT,
        {"messages": turns("Which one?", "green"), "images": "images/green.png"},
        {"messages": turns(parts, said, *before), "images": [B64], "metadata": '{"a": 1}'},
    )
    first, second, third = read(path, *KEPT)
    assert (first.pid, first.question, first.answer) == ("c0", "Which?", "red")
    assert (first.problem_image, first.visual_thoughts) == (RED, ())
    assert (first.full_text_only_thought, first.thoughts) == ("I see red.", ("I see red.",))
    assert first.columns == {
        "text:teacher_prompt": "It is the first.",
        "images:teacher_images": (GREEN, BLUE),
        "text:solution": "Red, because.",
    }
    assert (second.pid, second.question, second.answer) == ("train:1", "Which one?", "green")
    assert (second.full_text_only_thought, second.thoughts) == ("", ("green",))
    assert (third.question, third.answer, third.metadata) == ("Why?", "so", {"a": 1})
    assert (third.problem_image, third.thoughts) == (BLUE, ("<answer>no</answer> or",))

    report = prepare(tmp_path, tmp_path / "out")
    assert f"read as JSONL with chat messages: {tmp_path.name}/train" in str(report)
    kinds = [(note.row, note.reason.split(":")[0]) for note in report.warnings]
    assert "no_text_trace: the reasoning of the assistant turn is empty" in [
        note.reason for note in report.warnings
    ]
    kept = prepare(tmp_path, tmp_path / "kept", Part(columns=("text:solution",)))
    for found, blocks in ((report, ""), (kept, ", unless its blocks show text:solution")):
        said = f"no_visual_thought: the teacher sees what the student sees{blocks}"
        assert [note.reason for note in found.warnings].count(said) == 3
    assert kinds == [
        *[(None, "ignored_column")] * 3,
        (0, "no_visual_thought"),
        (1, "no_visual_thought"),
        (1, "no_text_trace"),
        (1, "no_thought"),
        (2, "no_visual_thought"),
        (2, "ignored_turn"),
        (2, "ignored_text"),
    ]
    assert "teacher_images is not read, --columns=images:teacher_images keeps it" in str(
        [note.reason for note in report.warnings]
    )


@pytest.mark.parametrize("kind", ["named", "chat"])
def test_the_prepared_files_are_those_of_parquet(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    def image(data):
        return {"bytes": data, "path": None}

    row = {"pid": "p0", "question": "Which? ü", "answer": "red", "problem_image_0": image(RED)}
    row |= {"resoning_thought_0": "look", "resoning_thought_1": "it is red"}
    row |= {"reasoning_image_0": image(BLUE), "full_text_only_thought": "I see red."}
    line, columns = NAMED, ()
    if kind == "chat":
        line, columns = CHAT, KEPT
        row = {"pid": "c0", "question": "Which?", "answer": "red", "problem_image_0": image(RED)}
        row |= {"resoning_thought_0": "I see red.", "full_text_only_thought": "I see red."}
        row |= {"teacher_prompt": "It is the first.", "solution": "Red, because."}
        row |= {"teacher_images": [image(GREEN), image(BLUE)]}
    write(tmp_path / "a/T", line)
    (tmp_path / "b/T").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b/T/train.parquet")
    reports = [
        prepare(tmp_path / s, tmp_path / f"{s}-out", Part(columns=columns)) for s in ("a", "b")
    ]
    one, other = (tmp_path / f"{s}-out/visual_opsd/t/1.0.0" for s in ("a", "b"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert len(names) == 5  # the records, two files for TFDS, progress.json, report.json
    for name in set(names) - {"progress.json", "report.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert [r.formats["T/train"] for r in reports] == [
        {"named": "JSONL with columns by name", "chat": "JSONL with chat messages"}[kind],
        "parquet",
    ]


def named(**changes) -> dict:
    return {key: value for key, value in (NAMED | changes).items() if value != "absent"}


def chat(**changes) -> dict:
    return {key: value for key, value in (CHAT | changes).items() if value != "absent"}


BAD = {
    "not JSON": ('{"question": ', "line is not JSON"),
    "empty": ("", "line is empty"),
    "list": ("[1]", "line is a JSON list"),
    "twice": ('{"answer": "a", "answer": "b"}', "has the key 'answer' twice"),
    "deep": ("[" * 9999, "line is not JSON"),
    "surrogate": (json.dumps(named(answer="\ud800")), "not UTF-8"),
    "missing": (named(answer="absent"), "answer is missing"),
    "no image": (named(image="absent", question="<image>?"), "has 1 place <image> for 0 images"),
    "both": (named(problem_image_0=B64), "problem_image_0 and another key both give"),
    "type": (named(answer=7), "answer is of type int"),
    "pid": (named(pid=[1]), "pid is of type list"),
    "thoughts": (named(thoughts="look"), "thoughts is of type str, not a list"),
    "no thought": (
        named(thoughts=[" "]),
        r"thoughts\[0\] and the columns up to thoughts\[7\] hold no thought",
    ),
    "no thoughts": (
        named(thoughts="absent"),
        "thoughts is missing or empty, and the line has visual thoughts, .*give thoughts, or",
    ),
    "image type": (named(image=7), "image is of type int"),
    "image keys": (named(image={"url": "x"}), "not an image {bytes, path}"),
    "absolute": (named(image="/etc/red.png"), "give a path below"),
    "drive": (named(image="C:\\red.png"), "give a path below"),
    "outside": (named(image="images/../../red.png"), "give a path below"),
    "address": (named(image="https://a/red.png"), "download the image"),
    "no file": (named(image="no.png"), "image is .*no such file"),
    "no visual thought": (
        named(visual_thoughts=["images/red.png", "no.png"]),
        r"visual_thoughts\[1\] is .*no such file",
    ),
    "no file of the schema": (
        named(image="absent", problem_image_0="problem_image_0.png"),
        'problem_image_0 is "problem_image_0.png", and there is no such file',
    ),
    "empty file": (named(image="images/empty.png"), "empty file"),
    "no picture": (named(image="train.jsonl"), "image cannot be decoded"),
    "base64": (named(image={"bytes": "%%"}), "not valid base64"),
    "data URL": (named(image="data:image/png,x"), "not in base64"),
    "a chat": (chat(), "messages belongs to chats"),
}
BAD_CHATS = {
    "no messages": (chat(messages="absent"), "messages is missing"),
    "messages": (chat(messages="hi"), "not a list of objects"),
    "role": (chat(messages=[{"role": "tool", "content": ""}]), 'the role "tool" in turn 0'),
    "no user": (chat(messages=CHAT["messages"][1:]), "no user turn"),
    "no answer": (chat(messages=CHAT["messages"][:1]), "must end with a user turn and one"),
    "content": (chat(messages=turns("a", 7)), "has a int as content of turn 1"),
    "part": (chat(messages=turns([{"type": "image", "image": "x"}], "a")), "has the part"),
    "two images": (chat(images=["images/red.png"] * 2), "has 1 place <image> for 2 images"),
    "two marks": (chat(messages=turns("<image><image>a", "b")), "has 2 places <image> for 1 image"),
    "no images": (chat(images=[]), "has 1 place <image> for 0 images"),
    "mark in the answer": (chat(messages=turns("a", "<image>b")), "in the assistant turn"),
    "open tag": (chat(messages=turns("a", "<answer>b")), "answer"),
    "no question": (chat(messages=turns("<image>", "b")), "question is empty"),
    "named": (named(), "question belongs to lines with columns by name"),
}


@pytest.mark.parametrize("good, bad", [(NAMED, BAD), (CHAT, BAD_CHATS)], ids=["named", "chat"])
def test_bad_lines(tmp_path, good, bad):
    path = write(tmp_path / "T", good, *(line for line, _ in bad.values()), good)
    (tmp_path / "T/images/empty.png").touch()
    with pytest.raises(
        BadRowError, match=r"train\.jsonl, line 2, pid .*--on_bad_row=skip"
    ) as found:
        prepare(tmp_path, tmp_path / "out")
    assert f"--source={tmp_path} --target={tmp_path / 'out'} --on_bad_row" in str(found.value)
    report = prepare(tmp_path, tmp_path / "out", on_bad_row="skip")
    assert report.rows == {"T/train": 2}
    assert [(note.file, note.row) for note in report.bad_rows] == [
        (str(path), n) for n in range(1, len(bad) + 1)
    ]
    for note, (name, (_, reason)) in zip(report.bad_rows, bad.items()):
        with pytest.raises(BadRowError, match=reason):
            raise BadRowError(*note[:3], *note.reason.split(" ", 1))
        assert f"line {note.row + 1}" in str(note), name
    assert [e.pid for e in open_source(tmp_path / "out", task="T")] == [good["pid"]] * 2


def test_a_text_question_needs_no_thoughts(tmp_path):
    """Its text trace is its thought, or else its answer."""
    line = {"question": "1 + 2 = ?", "answer": "3", "text_trace": "1 + 2 = 3."}
    bare = {"question": "2 + 2 = ?", "answer": "4", "thoughts": None, "visual_thoughts": []}
    write(tmp_path / "T", line, bare)
    write(tmp_path / "T", line, name="test.jsonl")  # no line has a key of thoughts
    report = prepare(tmp_path, tmp_path / "out")
    assert report.rows == {"T/train": 2, "T/test": 1} and not report.bad_rows
    source = open_source(tmp_path / "out", task="T")
    assert [e.thoughts for e in source] == [("1 + 2 = 3.",), ("4",)]
    assert [note.reason for note in report.warnings if note.reason.startswith("no_thought")] == [
        "no_thought: the line has no thoughts and no text_trace"
    ]


def test_keys_beside_images_and_kept_ones_are_no_misnamed_images(tmp_path):
    """Also texts that name a file, and addresses of where a question is from."""
    write(tmp_path / "A", NAMED | {"preview": "images/red.png"})
    alone = named(image="absent", crops="images/red.png")
    write(tmp_path / "B", alone | {"source": "https://a.b/c.png", "hint": "see images/red.png"})
    chat = {"messages": turns("Which?", "red"), "teacher_images": ["images/red.png"]}
    write(tmp_path / "C", chat)
    prepare(tmp_path / "A", tmp_path / "out")
    prepare(tmp_path / "B", tmp_path / "out", Part(columns=("images:crops",)))
    prepare(tmp_path / "C", tmp_path / "out")


def test_a_warning_says_its_kind_once(tmp_path):
    path = write(tmp_path / "T", named(image="absent"))
    said = str(prepare(tmp_path, tmp_path / "out"))
    assert (
        f"warning no_image: 1 (first: {path}, line 1, pid 'p0': the question is asked without an "
        "image; all in report.json)"
    ) in said


@pytest.mark.parametrize("name", ["train.csv", "data/train.tsv", "train.jsonl.gz"])
def test_files_in_another_format_are_named(tmp_path, name):
    (tmp_path / "T" / name).parent.mkdir(parents=True)
    (tmp_path / "T" / name).touch()
    with pytest.raises(BadSourceError, match=f"T/{name} is in a format that is not read: write"):
        prepare(tmp_path, tmp_path / "out")


def test_empty_lines_at_the_end(tmp_path):
    """An editor adds them; one between two lines is a fault (above)."""
    path = write(tmp_path / "T", NAMED)
    path.write_bytes(path.read_bytes() + b"\n  \r\n\n")
    report = prepare(tmp_path, tmp_path / "out")
    assert (report.rows, report.bad_rows) == ({"T/train": 1}, ())


SOURCES = {
    "misspelt": ((named(text_traces="x", text_trace="absent"),), (), "did you mean 'text_trace'"),
    "schema": ((named(resoning_thoght_2="x"),), (), "did you mean 'resoning_thought_2'"),
    "no column": ((named(answer="absent"),), (), "has no key 'answer'; its keys: "),
    "further": (
        (NAMED,),
        ("text:hint",),
        "has no key 'hint', as --columns=text:hint asks: it has ",
    ),
    "further chat": ((CHAT,), ("text:hint",), "has no key 'hint'"),
    "similar": (
        (named(hint="x"),),
        ("text:hints",),
        "'hints', as --columns=text:hints asks: did you mean text:hint?",
    ),
    "similar in a chat": ((CHAT,), ("text:solutions",), "did you mean text:solution?"),
    "no thoughts": ((named(thoughts="absent"),), (), "has no key 'thoughts'; its keys: pid, "),
    "own key": ((NAMED,), ("text:thoughts",), "names thoughts, which JSONL files have"),
    "two formats": ((NAMED | CHAT,), (), "both 'messages' and 'question'"),
    "image": (
        (named(image="absent", img="images/red.png"),),
        (),
        "has no key 'image', but 'img' seems to hold images .\"images/red.png\".: rename it to",
    ),
    "images": (
        (named(image="absent"), named(image="absent", pictures=["images/red.png"])),
        (),
        "has no key 'images', but 'pictures' seems to hold images",
    ),
    "base64": ((named(image="absent", picture=B64),), (), "'picture' seems to hold images"),
    "URL": ((named(image="absent", i="data:image/png;base64,x"),), (), "'i' seems to hold images"),
    "object": ((named(image="absent", i={"bytes": B64}),), (), "'i' seems to hold images"),
    "image of a chat": (
        ({"messages": turns("Which?", "red"), "img": "images/red.png"},),
        (),
        "has no key 'images', but 'img' seems to hold images",
    ),
    "no object": (("x", "y"), (), "no line that is a JSON object: line 1 is not JSON"),
    "empty": ((), (), "train files hold no row"),
    "empty lines": (("", ""), (), "train files hold no row"),
}


@pytest.mark.parametrize("lines, columns, message", SOURCES.values(), ids=SOURCES)
def test_files_that_are_refused(tmp_path, lines, columns, message):
    write(tmp_path / "T", *lines)
    with pytest.raises(BadSourceError, match=message):
        prepare(tmp_path, tmp_path / "out", Part(columns=columns))
    assert not (tmp_path / "out").exists()


def test_folders(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "T/data", NAMED | {"pid": split}, name=f"{split}.jsonl")
    write(tmp_path / "T/data", NAMED, name="other.jsonl")
    report = prepare(tmp_path, tmp_path / "out", Part(limit=1))
    assert report.rows == {"T/train": 1, "T/validation": 1, "T/test": 1}
    assert [note.reason.split(":")[0] for note in report.warnings] == ["ignored_file"]
    (tmp_path / "T/data/train.parquet").touch()
    with pytest.raises(BadSourceError, match="parquet and JSONL files .*Keep one kind"):
        prepare(tmp_path, tmp_path / "out")


def test_oddities_are_those_of_parquet(tmp_path):
    """A mark at the start, ends of lines, nine thoughts, and visual thoughts that do not open."""
    line = named(thoughts=[str(n) for n in range(9)], visual_thoughts=["train.jsonl", None, B64])
    path = write(tmp_path / "T", line)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    report = prepare(tmp_path, tmp_path / "out")
    (example,) = open_source(tmp_path / "out", task="T")
    assert (example.visual_thoughts, example.thoughts) == ((BLUE,), tuple("01234567"))
    first, *others = (note.reason for note in report.warnings)
    assert first.startswith("dropped_visual_thought: visual_thoughts[0] cannot be decoded")
    assert others == [
        "dropped_visual_thought: visual_thoughts[1] is missing",
        "dropped_thought: thoughts[8] is not read, a row holds 8",
    ]
    path.write_text(json.dumps(line) + "\n" + json.dumps(line))
    report = prepare(tmp_path, tmp_path / "out", overwrite=True)
    (same,) = (note for note in report.warnings if note.reason.startswith("duplicate_pid"))
    assert str(same) == (
        f"{path}, line 2, pid 'p0': duplicate_pid: first in {path}, line 1; comparisons of "
        "evaluations cannot pair the two where they have the same answer"
    )


def test_an_edited_image_is_seen(tmp_path):
    write(tmp_path / "T", NAMED, NAMED)
    prepare(tmp_path, tmp_path / "out", Part(limit=1))
    prepare(tmp_path, tmp_path / "out", Part(limit=1))
    (tmp_path / "T/images/red.png").write_bytes(GREEN)
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(tmp_path, tmp_path / "out", Part(limit=1))
    prepare(tmp_path, tmp_path / "out", Part(limit=1), overwrite=True)
    assert open_source(tmp_path / "out", task="T")[0].problem_image == GREEN


def test_few_lines_are_in_memory(tmp_path, monkeypatch):
    path = write(tmp_path, *[NAMED] * 70)
    sizes = [len(batch) for batch in source_files.read_batches(path, 65)]
    assert sizes == [32, 32, 1]
    monkeypatch.setattr("opsd_jax.data.schema.BATCH_BYTES", 1)
    assert [len(batch) for batch in source_files.read_batches(path, 3)] == [1, 1, 1]
