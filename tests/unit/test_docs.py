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
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from ml_collections import ConfigDict

import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import config_check, context
from opsd_jax.__main__ import COMMANDS
from opsd_jax.run import report_table
from opsd_jax.run import scores as scores_lib
from opsd_jax.study import grid

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}
pages = pytest.mark.parametrize("page", PAGES)
SITE = [page for page in PAGES if page.startswith("docs/")]


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


def shell_blocks(text: str) -> list[tuple[str, str]]:
    """(how it is tested, content) of the blocks of shell commands.

    The first is the comment in the line before: "test: run", "test: FILE::TEST", "needs: WHAT"; ""
    without one.
    """
    found = re.findall(
        r"^(?:<!-- ([^\n]*) -->\n)?```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE
    )
    return [(how, content) for how, content in found]


def commands(content: str) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    lines = content.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def generate():
    """docs/generate.py, which is no package."""
    return load("docs/generate.py")


def load(path: str):
    """The module in a Python file outside of the package."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    if cell.startswith("blocks."):
        return getattr(blocks_lib, cell.removeprefix("blocks."))
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


def test_steps_of_the_example_run_are_those_of_its_stages():
    """A checkpoint or an evaluation that a page names by its step is one of the README's run."""
    ends = {*config_lib.stage_ends(get_config("configs/mini.py")("chart")).values()}
    found = {
        (name, int(step))
        for name, page in PAGES.items()
        for step in re.findall(r"opsd-mini/checkpoints/(\d+)|--against=W/eval/(\d+)-", page)
        for step in filter(None, step)
    }
    assert len(found) >= 4 and {step for _, step in found} <= ends


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
        arg: leaves(get_config("configs/mini.py")(arg)) for arg in ("chart", "maze", "smoke")
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
    assert listed == set(get_config("configs/mini.py")().arms)


def test_the_numbers_at_the_start_are_those_of_the_results():
    """Means of the default preset on the first pages, in tables each seed of the students."""
    charts = PAGES["docs/results.md"].partition("### Charts")[2].partition("### Maze")[0]
    rows = [row for row in tables(charts) if row.get("measure") == "accuracy"]
    assert len(rows) == 6
    shown = [f"{row['mean ± sd'].partition(' ± ')[0]} %" for row in rows]
    for n, arm in ((1, "start, text only"), (2, "OPSD, text only")):
        assert rows[n]["arm"] == arm
        shown[n] += f" ({rows[n]['seed 0']}, {rows[n]['seed 1']} and {rows[n]['seed 2']}"
    means = [float(row["mean ± sd"].partition(" ± ")[0]) for row in rows]
    stated = re.search(
        r"answers ([\d.]+) % without .* was ([\d.]+) %, and with them ([\d.]+) %\."
        r".* ends at ([\d.]+) to ([\d.]+) %",
        " ".join(PAGES["docs/index.md"].split()),
    )
    controls = sorted(means[3:])
    assert [*map(float, stated.groups())] == [*means[2::-1], controls[0], controls[-1]]
    pages = {"README.md": "correct", "docs/get-started.md": "mean of seeds 0 to 2"}
    for page, column in pages.items():
        rows = [row[column].replace("*", "") for row in tables(PAGES[page]) if column in row]
        assert len(rows) >= 6
        assert all(map(str.startswith, rows, shown)), page


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 130


def get_config(path: str):
    return load(path).get_config


def test_what_the_code_knows_is_up_to_date():
    """`python docs/generate.py` would change nothing."""
    for path, update in generate().PARTS.items():
        page = PAGES[f"docs/{path}"]
        assert update(page) == page, f"docs/{path} is out of date: run python docs/generate.py"


def test_every_option_of_every_command_has_a_meaning():
    text = PAGES["docs/reference/commands.md"]
    found = re.findall(r"<!-- options of (.*) -->", text)
    assert {name.split()[0] for name in found} == set(COMMANDS)
    rows = [row for row in tables(text) if "option" in row]
    assert len(rows) > 50
    for row in rows:
        meaning = re.sub(r"^required; ?|\(default: .*\)", "", row["meaning"])
        assert re.search(r"\w", meaning) or row["option"] == "--batch_size", row


@pytest.mark.parametrize("command, path", [("train", "train.py"), ("plan", "plan/__main__.py")])
def test_options_that_a_command_needs_are_marked(command, path):
    """Of the commands that check them themselves: those that a message asks for."""
    source = (ROOT / "opsd_jax" / path).read_text(encoding="utf-8")
    needed = set(re.findall(r"error: (--\w+) is missing", source))
    options = dict(generate().options(command))
    assert len(needed) == 2
    assert needed == {name for name in options if options[name].startswith("required; ")}


def test_a_setting_with_choices_names_them():
    """In its meaning, or in its default. A page that the meaning links to may do so instead."""
    rows = {row["key"]: row["meaning"] for row in tables(PAGES["docs/reference/configuration.md"])}
    for key, setting in config_lib.settings().items():
        if key.endswith(".freeze"):
            continue  # the groups of image generation are not listed: most stages never train them
        if setting.rule and setting.rule.kind is str:
            meaning = rows.get(key) or rows[key.partition(".")[2]]
            named = meaning + repr(setting.default)
            absent = [choice for choice in setting.rule.allowed if choice not in named]
            assert not absent or "](" in meaning, f"{key} does not name {absent}"


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
        assert path.exists(), f"{page} links to {target}, which does not exist"
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
        assert (ROOT / path).exists() or "NAME" in path, (
            f"{page} names {path}, which does not exist"
        )
    for path, arg in re.findall(r"--config=([\w./]+):?([\w,-]*)", text):
        if path != "FILE" and not path.endswith(".json"):  # the latter are files of runs
            get_config(path)(*[arg] if arg else [])
    known = leaves(config_lib.default())
    for key in re.findall(r"--config\.(?:changes\.)?([\w.]+)=", text):
        if key in grid.default():  # of a study
            continue
        is_placeholder = key in ("a.b", "KEY") or key.endswith(".NAME")
        assert key in known or is_placeholder, f"{page}: no setting {key}"
    groups = {key.rsplit(".", count)[0] for key in known for count in range(1, key.count(".") + 1)}
    for name in re.findall(rf"`((?:{'|'.join(config_lib.default())})\.(?!md|py)[\w.]*\w)", text):
        assert name in known or name in groups or is_in_package(name), (
            f"{page}: no setting or function {name}"
        )


@pytest.mark.parametrize("page", SITE)
def test_every_shell_block_says_how_it_is_tested(page):
    for how, content in shell_blocks(PAGES[page]):
        kind, _, what = how.partition(": ")
        assert kind in ("test", "needs") and what, f"{page}: no comment before\n{content}"
        path, _, name = what.partition("::")
        if kind == "test" and what != "run":
            text = (ROOT / path).read_text(encoding="utf-8")
            assert f"def {name}(" in text, f"{page}: no test {what}"


@pytest.mark.parametrize("page", [*SITE, "README.md"])
def test_options_of_commands_exist(page):
    """Of commands in blocks and in the text; those in blocks are read by the command's parser."""
    for _, content in shell_blocks(PAGES[page]):
        content = re.sub(r"^\w+=\$\((.*?)\)$", r"\1", content, flags=re.DOTALL | re.MULTILINE)
        for words in commands(content.replace("&&", "\n").replace("$BATCH", "16")):
            if "-m" in words and words[words.index("-m") + 1].startswith("opsd_jax."):
                check_command(page, words[words.index("-m") + 1 :])
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for command in re.findall(r"`python -m (opsd_jax\.[^`]*)`", prose):
        check_command(page, shlex.split(command.replace("\n", " ")), whole=False)


def check_command(page: str, words: list[str], whole: bool = True) -> None:
    """Checks the options of a command. whole: whether its parser accepts it as it is written."""
    module, *arguments = words
    name, sub = module.removeprefix("opsd_jax."), ""
    if arguments and not arguments[0].startswith("-") and arguments[0] != "...":
        sub = re.split(r"\\?\|", arguments[0])[0]
    known = {option for option, _ in generate().options(name, sub)} | {"--help", "--verbosity"}
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    unknown = {g for g in given if g not in known and not g.startswith("--config.")}
    assert not unknown, f"{page}: {name} has no {', '.join(sorted(unknown))}"
    is_absl = "--config" in known
    if whole and not is_absl and "|" not in " ".join(arguments) and "..." not in arguments:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                generate().parser_of(name).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page}: {' '.join(words)}: {said.getvalue()}")


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
        and part[1].endswith('&& python -m pytest -q -n 2 --dist loadfile -m "not slow"')
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
        for folder in ("opsd_jax", "configs", "launch")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant)
    }
    messages |= {
        re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "…", path.read_text(encoding="utf-8"))
        for path in (ROOT / "launch").glob("*.sh")
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
    prompts = blocks_lib.Prompts(system="sss", intro="i", transition="t")
    problem = tiny.image(np.random.default_rng(0))
    asked = (tiny.TOKENIZER, prompts, "qq", problem)
    rows = {
        "student": blocks_lib.student(*asked),
        "teacher": blocks_lib.teacher(*asked, [problem] * 2),
    }
    for role, row in rows.items():
        packed = tiny.pack([row])
        behind = np.asarray(context.following(packed, 4)[0][0])
        assert drawn[role] == [*packed.rope_positions[0, : packed.length[0]], *behind]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the pages call W and /tmp/opsd-mini: a finished run, and the commands done on it."""
    workdir = tmp_path_factory.mktemp("docs") / "run"
    shutil.copytree(small_run.trained(tmp_path_factory), workdir)
    report_table.write(str(workdir), scores_lib.collect(str(workdir), ()), ())
    return workdir, set()


def executed(page: str) -> bool:
    return "```python" in PAGES[page] or "<!-- test: run -->" in PAGES[page]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compiles")
@pytest.mark.parametrize("page", list(filter(executed, PAGES)))
def test_code_runs_and_prints_what_it_says(page, run, tmp_path, tmp_path_factory):
    """Blocks of a page in order; /tmp is a folder of the test, W a small finished run. Of shell
    commands those that are marked, each once in all pages; a text marked as printed is what the one
    before it printed.
    """
    workdir, done = run

    def here(text):
        return re.sub(
            r"/tmp/(opsd-mini(?![\w-]))?", lambda m: str(workdir) if m[1] else f"{tmp_path}/", text
        )

    namespace, printed, said = {}, None, io.StringIO()
    for how, language, content in re.findall(
        r"^(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)^```$",
        PAGES[page],
        flags=re.DOTALL | re.MULTILINE,
    ):
        if language == "bash" and how == "test: run":
            on_the_run = re.sub(r"(?<![\w/.-])W(?=/|\s|$)", "/tmp/opsd-mini", content)
            for words in commands(here(on_the_run)):
                if str(tmp_path) in " ".join(words) or tuple(words) not in done:
                    with contextlib.redirect_stdout(io.StringIO()) as said:
                        execute(words, tmp_path_factory)
                    done.add(tuple(words))
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(here(content), page, "exec"), namespace)  # noqa: S102  our own pages
            printed = out.getvalue()
        elif language == "text" and how == "printed":
            assert said.getvalue() == content
        elif language == "text" and printed:
            assert printed.endswith(content)  # TFDS prints its own lines before
            printed = None
    assert not printed, f"{page} does not show what its last block prints: {json.dumps(printed)}"


def execute(words: list[str], tmp_path_factory) -> None:
    """Runs a command of a page in this process; training in one of its own, with small sizes."""
    module, arguments = words[2], words[3:]
    if module == "opsd_jax.train":
        config = [a for a in arguments if a.startswith("--config=")]
        small = [f"--config.{key}={value}" for key, value in small_run.CHANGES.items()]
        others = [a for a in arguments if a not in config]
        command = [sys.executable, "-m", module, *config, *small, *others]
        done = small_run.run(command, env=small_run.environment(tmp_path_factory))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return
    spec = importlib.util.find_spec(module)
    package = "" if spec.submodule_search_locations is None else ".__main__"
    importlib.import_module(module + package).main(arguments)


def test_own_data_are_trained_with_the_printed_options():
    page = PAGES["docs/guides/own-data.md"]
    (printed,) = re.findall(r"<!-- printed -->\n```text\n(.*?)```", page, flags=re.DOTALL)
    options = shlex.split(printed.splitlines()[-1])
    every = [words for _, content in shell_blocks(page) for words in commands(content)]
    asked, trained = (
        next(words for words in every if name in words) for name in ("sizes", "opsd_jax.train")
    )
    assert len(options) == 3 and set(options) < set(trained)
    assert set(asked[4:]) < set(trained), "a run with other settings needs other sizes"


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compiles")
def test_keys_of_the_files_of_a_run_are_documented(run):
    """Every key that a run wrote is in docs/reference/file-formats.md, in the part about its
    file.
    """
    workdir, _ = run
    parts = re.split(r"^## ", PAGES["docs/reference/file-formats.md"], flags=re.MULTILINE)
    known = {part.partition("\n")[0]: set(re.findall(r"`([^`\s]+)`", part)) for part in parts}

    def check(part, keys):
        generic = {re.sub(r"^(eval|kl)/[^/]*", r"\1/<task>", key) for key in keys}
        generic = {re.sub(r"^eval/<task>/.*", "eval/<task>/<mode>", key) for key in generic}
        assert generic <= known[part], f"{part} does not describe {sorted(generic - known[part])}"

    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        check("metrics.jsonl", json.loads(line))
    for folder in (workdir / "eval").glob("000*"):
        summary = json.loads((folder / "summary.json").read_text())
        check("summary.json", summary)
        for found in {**summary.get("benchmarks", {}), **summary.get("tasks", {})}.values():
            check("summary.json", found)
        if (folder / "predictions.jsonl").exists():
            line = (folder / "predictions.jsonl").read_text().partition("\n")[0]
            check("predictions.jsonl", json.loads(line))
