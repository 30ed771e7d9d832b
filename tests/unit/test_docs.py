"""README.md, CONTRIBUTING.md and docs/ agree with the code: settings, links, commands, messages."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from ml_collections import ConfigDict

import tiny
from opsd_jax import config as config_lib
from opsd_jax import config_check, context

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}
pages = pytest.mark.parametrize("page", PAGES)


def tables(text: str):
    """The rows of all Markdown tables as {column: cell}; code marks are taken off the cells."""
    header = None
    for line in text.splitlines():
        cells = [
            cell.strip().removeprefix("`").removesuffix("`")
            for cell in line.strip("| ").split(" | ")
        ]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = [cell.strip() for cell in line.strip("| ").split("|")]
        elif not set(line) <= set("|-: "):
            yield dict(zip(header, cells, strict=True))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def leaves(config, prefix="") -> dict:
    """{"a.b": value}; an empty group is a value."""
    found = {}
    for name, value in config.items():
        group = isinstance(value, ConfigDict) and len(value)
        found |= leaves(value, f"{prefix}{name}.") if group else {prefix + name: value}
    return {
        key: value.to_dict() if isinstance(value, ConfigDict) else value
        for key, value in found.items()
    }


def value_of(cell: str):
    if cell.startswith("context."):
        return getattr(context, cell.removeprefix("context."))
    return ast.literal_eval(cell)


def test_tables_are_read_as_written():
    text = "| key | x |\n|---|---|\n| `a.b` | `(1, 2)` |\n| c | – |\n\n| y |\n|---|\n| `'d'` |\n"
    assert list(tables(text)) == [
        {"key": "a.b", "x": "(1, 2)"},
        {"key": "c", "x": "–"},
        {"y": "'d'"},
    ]
    assert blocks("```bash\na\n```\n\n```python\nb\n\nc\n```\n") == [
        ("bash", "a\n"),
        ("python", "b\n\nc\n"),
    ]


def test_every_setting_is_documented_with_its_default():
    shown = {}
    for row in tables(PAGES["docs/reference/configuration.md"]):
        cells = (
            {row["key"]: row["default"]}
            if "default" in row
            else {
                f"{stage}.{row['key']}": row[stage]
                for stage in config_lib.STAGES
                if row[stage] != "–"
            }
        )
        assert row["meaning"], f"{row['key']} has no meaning"
        assert not shown.keys() & cells.keys(), f"{row['key']} stands twice"
        shown |= {key: (row["type"], cell) for key, cell in cells.items()}
    defaults = leaves(config_lib.default())
    assert sorted(defaults.keys() - shown.keys()) == [], (
        "in config.default() but not in docs/reference/configuration.md"
    )
    assert sorted(shown.keys() - defaults.keys()) == [], (
        "in docs/reference/configuration.md but not in config.default()"
    )
    wrong = {
        key: f"{kind} {cell}, not {defaults[key]!r}"
        for key, (kind, cell) in shown.items()
        if (kind, value_of(cell)) != (type(defaults[key]).__name__, defaults[key])
    }
    assert wrong == {}


def test_every_range_is_documented():
    shown = {}
    for row in tables(PAGES["docs/reference/configuration.md"]):
        keys = (
            [row["key"]]
            if "default" in row
            else [f"{stage}.{row['key']}" for stage in config_lib.STAGES if row[stage] != "–"]
        )
        shown |= {key: row["range"] for key in keys if row["range"] != "–"}
    assert shown == {key: allowed.partition(";")[0] for key, allowed in config_lib.ranges().items()}


def test_what_may_change_on_resume_is_documented():
    page = PAGES["docs/reference/configuration.md"]
    sentence = re.search(r"may\s+change\s+in\s+between:(.*?)\.\n", page, flags=re.DOTALL)
    assert re.findall(r"`(.*?)`", sentence[1]) == list(config_check.FREE_SETTINGS)


def test_recipe_of_the_miniature():
    configs = {
        arg: leaves(get_config("configs/mini.py")(arg)) for arg in ("maze", "chart", "smoke")
    }
    rows = [row for row in tables(PAGES["docs/results.md"]) if "smoke" in row]
    assert len(rows) > 20
    wrong = {
        f"{row['key']} of {arg}": f"{row[arg]}, not {config[row['key']]!r}"
        for row in rows
        for arg, config in configs.items()
        if value_of(row[arg]) != config[row["key"]]
    }
    assert wrong == {}


def test_arms_of_the_miniature():
    listed = {row["arm"] for row in tables(PAGES["docs/results.md"]) if "differs in" in row}
    assert listed == set(get_config("configs/mini.py")("maze").arms)


def get_config(path: str):
    spec = importlib.util.spec_from_file_location("config_file", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pages
def test_links(page):
    """Files that links and images point to, and headings after a #."""

    def slug(title):
        return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")

    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, titles), f"{page} links to {target}: no such heading"


def is_in_package(name: str) -> bool:
    """Whether the package has a module, class or function of this dotted name."""
    try:
        pkgutil.resolve_name(f"opsd_jax.{name}")
    except (ImportError, AttributeError):
        return False
    return True


@pages
def test_commands_and_paths_exist(page):
    text = PAGES[page]
    for module in re.findall(r"python -m (opsd_jax[\w.]*\w)", text):
        spec = importlib.util.find_spec(module)
        if spec and spec.submodule_search_locations:  # a package: its __main__
            spec = importlib.util.find_spec(f"{module}.__main__")
        is_command = spec and 'if __name__ == "__main__"' in pathlib.Path(spec.origin).read_text()
        assert is_command, f"{page}: no command python -m {module}"
    for path in re.findall(r"(?<![\w/.<>-])(?:opsd_jax|configs|tests|docs)/[\w./-]*[\w/]", text):
        assert (ROOT / path).exists(), f"{page} names {path}, which is not there"
    for path, arg in re.findall(r"--config=([\w./]+):?(\w*)", text):
        if path != "FILE":
            get_config(path)(*[arg] if arg else [])
    known = leaves(config_lib.default())
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in known or key == "a.b", f"{page}: no setting {key}"
    groups = {key.rsplit(".", count)[0] for key in known for count in range(1, key.count(".") + 1)}
    for name in re.findall(rf"`((?:{'|'.join(config_lib.default())})\.(?!md|py)[\w.]*\w)", text):
        assert name in known or name in groups or is_in_package(name), (
            f"{page}: no setting or function {name}"
        )


def test_the_site_builds_without_a_warning(tmp_path):
    """No page without a place in the navigation, no link or anchor into nothing, no network."""
    pytest.importorskip("mkdocs", reason='needs pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_finds_the_test_command():
    """As .ci/run looks for it."""
    part = re.search(r"<!-- test command -->\n```bash\n(.*)\n```\n", PAGES["README.md"])
    assert (
        part
        and part[1].startswith("pip install -e ")
        and part[1].endswith("&& python -m pytest -q -n 2 --dist loadfile")
    )


def test_quoted_messages_are_in_the_code():
    """First column of the tables of messages; … is what is filled in."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(
                part.value if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    messages = {
        re.sub(r"\{[\w.:]*\}", "…", text(node))
        for path in (ROOT / "opsd_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant)
    }
    rows = [row for row in tables(PAGES["docs/troubleshooting.md"]) if "message" in row]
    assert len(rows) > 20
    absent = [
        row["message"] for row in rows if not any(row["message"] in message for message in messages)
    ]
    assert absent == []


def test_figure_of_the_contexts():
    """The rope ids in docs/images/contexts.svg are those that `context.pack` gives to such rows."""
    svg = ElementTree.parse(ROOT / "docs/images/contexts.svg").getroot()

    def name(tag):
        return "{http://www.w3.org/2000/svg}" + tag

    def ids(group):
        return [int(text.text) for text in group.iter(name("text")) if text.get("class") == "rope"]

    drawn = {group.get("aria-label"): ids(group) for group in svg.iter(name("g"))}
    prompts = context.Prompts(system="sss", intro="i", transition="t")
    problem = tiny.image(np.random.default_rng(0))
    asked = (tiny.TOKENIZER, prompts, "qq", problem)
    rows = {"student": context.student(*asked), "teacher": context.teacher(*asked, [problem] * 2)}
    for role, row in rows.items():
        packed = tiny.pack([row])
        behind = np.asarray(context.following(packed, 4)[0][0])
        assert drawn[role] == [*packed.positions[0, : packed.length[0]], *behind]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_code_runs_and_prints_what_it_says(page, tmp_path):
    """Blocks of a page in order; /tmp is a folder of the test. Of shell commands those that make
    data.
    """
    from opsd_jax.data import __main__ as data

    here = functools.partial(re.sub, r"/tmp/", f"{tmp_path}/")
    namespace, printed = {}, None
    for language, content in blocks(PAGES[page]):
        if language == "bash":
            for command in content.replace("\\\n", " ").splitlines():
                if "opsd_jax.data" in command:
                    data.main(shlex.split(here(command))[3:])
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(here(content), page, "exec"), namespace)  # noqa: S102  our own pages
            printed = out.getvalue()
        elif language == "text" and printed:
            assert printed.endswith(content)  # TFDS prints its own lines before
            printed = None
    assert not printed, f"{page} does not show what its last block prints: {json.dumps(printed)}"
