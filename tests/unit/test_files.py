"""Atomic writes: a file has its old content or its new content, never a part of it."""

import os
import pathlib
import re

import pytest

from opsd_jax.runtime import files

PACKAGE = pathlib.Path(files.__file__).parents[1]


def test_folders_are_made_and_text_is_utf8(tmp_path):
    path = tmp_path / "a" / "report.html"
    files.write(path, "<p>é ∞ 图\n</p>")
    assert path.read_bytes() == "<p>é ∞ 图\n</p>".encode()
    files.write(str(path), "\ud800")  # as in the name of a file that is no UTF-8
    assert path.read_bytes() == b"\\ud800"
    files.write(path, b"\xff")
    assert path.read_bytes() == b"\xff" and os.listdir(path.parent) == ["report.html"]


@pytest.mark.parametrize("fails", ["block", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "report.html"
    files.write(path, "old")

    def full(*_):
        assert path.read_text() == "old"
        raise OSError("disk full")

    if fails != "block":
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="disk full"), files.replacing(path) as file:
        file.write(b"new")
        if fails == "block":
            full()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, call=call: (done.append(name), call(*args))
        )
    files.write(tmp_path / "a", "x")
    assert done == ["fsync", "replace"]


def test_two_writers_of_one_file(tmp_path, monkeypatch):
    """As two evaluations that both write summary.md: the second one to finish does not fail."""
    with files.replacing(tmp_path / "a") as one:
        one.write(b"one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)  # another process
            files.write(tmp_path / "a", "two")
        assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]


def test_no_other_way_of_replacing_a_file():
    """`os.replace` elsewhere moves folders and files that a library has written."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\bos\.replace\(", path.read_text(encoding="utf-8"))
    }
    assert found == {
        "runtime/files.py",
        "data/prepare.py",
        "runtime/profile.py",
        "tasks/parquet.py",
        "tasks/vocabulary.py",
    }
