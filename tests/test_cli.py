"""What all commands share: terminals without UTF-8, and the values of flags."""

import ast
import io
import pathlib
import subprocess
import sys

import pytest

from opsd_jax import cli

PACKAGE = pathlib.Path(__file__).parent.parent / "opsd_jax"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    cli.start()
    print("12.5–40.1 ± é 问 \ud800", flush=True)
    printed = out.buffer.getvalue().decode(encoding)
    assert printed.startswith("12.5") and printed.endswith("\\ud800\n")
    assert encoding != "ascii" or printed == "12.5\\u201340.1 \\xb1 \\xe9 \\u95ee \\ud800\n"


def test_every_command_prepares_the_terminal_first():
    """Before it parses anything: `cli.start()` comes before every other call in `main`."""
    mains = {}
    for path in PACKAGE.rglob("*.py"):
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
            main = next(n for n in ast.parse(path.read_text(encoding="utf-8")).body
                        if isinstance(n, ast.FunctionDef) and n.name == "main")
            call = next(n for n in main.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call))
            mains[path.relative_to(PACKAGE).as_posix()] = ast.unparse(call)
    assert len(mains) >= 8 and set(mains.values()) == {"cli.start()"}, mains


def test_files_are_written_and_read_as_utf8():
    """Whatever the locale says: every text file that is opened names its encoding."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for call in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "open":
                mode = next((ast.unparse(a) for a in call.args[1:2]), "'r'")
                if "b" not in mode and "encoding" not in {k.arg for k in call.keywords}:
                    found.append(f"{path.name}:{call.lineno}")
    assert found == []


def test_a_question_typed_in_a_terminal_without_utf8():
    code = "import sys; from opsd_jax import cli; print(ascii(cli.text('question', sys.argv[1])))"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(PACKAGE.parent)}
    run = lambda question: subprocess.run([sys.executable, "-c", code, question], env=env, capture_output=True, text=True)
    assert run("wo? – 问".encode()).stdout == ascii("wo? – 问") + "\n"
    assert "the text is no UTF-8" in run(b"wo\xff").stderr
