"""Files that maintain the project: workflows, pre-commit hooks, .ci/run, citation.

They parse, and name what exists.
"""

import pathlib
import re
import shlex
import shutil
import sysconfig

import pytest
import yaml

import opsd_jax

ROOT = pathlib.Path(__file__).parents[2]
CI = ROOT / ".github" / "workflows" / "ci.yml"
WORKFLOWS = sorted(CI.parent.glob("*.yml"))
LINTERS = ("ruff check", "ruff format", "lint-imports", "mypy")


def read(path: pathlib.Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check_command(command: str) -> None:
    """The program is installed, and files, extras, modules and markers that it names exist."""
    words = shlex.split(command)
    here = shutil.which(words[0], path=sysconfig.get_path("scripts")) or shutil.which(words[0])
    # mkdocs belongs to the extra [docs], which the tests do without
    assert here or words[0] == "mkdocs", f"{words[0]} is not installed: {command}"
    for word in words:
        if re.fullmatch(r"(tests|opsd_jax|constraints|configs)/[\w./]+", word):
            assert (ROOT / word).exists(), f"{word} is not there: {command}"
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert f'"{extra}": ' in (ROOT / "setup.py").read_text(encoding="utf-8"), command
    if words[0] == "python":
        assert words[1:3] == ["-m", "pytest"], command


def commands(workflow: dict) -> list[str]:
    """Single-line commands of the jobs, with the values of the matrix filled in."""
    found = []
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            filled = [step.get("run", "")]
            for name, values in matrix.items():
                place = "${{ matrix." + name + " }}"
                filled = [text.replace(place, str(value)) for text in filled for value in values]
            found += [text for text in dict.fromkeys(filled) if text and "\n" not in text]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path):
    workflow = read(path)
    assert workflow[True]  # YAML 1.1 reads the key `on` as true
    found = commands(workflow)
    assert any("pytest" in command for command in found)
    for command in found:
        assert "${{" not in command
        check_command(command)
    for command in found:
        if "pytest" in command:
            marker = shlex.split(command)[-1]
            assert set(marker.split()) - {"not", "or"} <= {"slow", "long"}, command


def test_workflows_cover_every_python():
    for path in WORKFLOWS:
        jobs = [job for job in read(path)["jobs"].values() if "strategy" in job]
        assert [job["strategy"]["matrix"]["python"] for job in jobs] == [["3.11", "3.12", "3.13"]]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_constraints(version):
    """Every supported Python has a file with one version of each package that setup.py names."""
    path = ROOT / "constraints" / f"py{version.replace('.', '')}.txt"
    pins = dict(line.split("==") for line in path.read_text(encoding="utf-8").splitlines())
    names = [name.lower().replace("_", "-") for name in pins]
    assert len(set(names)) == len(names)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = re.findall(r'^ +"([\w-]+)(?:\[\w+\])?(?:[<>=;].*)?",', setup, flags=re.MULTILINE)
    assert {"jax", "jaxtyping", "beartype", "mkdocstrings"} <= set(needed)
    assert {name.lower().replace("_", "-") for name in needed} <= set(names)
    assert pins["jax"] == pins["jaxlib"]


def test_pre_commit_hooks():
    hooks = [
        hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert all(hook["language"] == "system" for hook in hooks)
    for hook in hooks:
        check_command(hook["entry"])
    entries = [hook["entry"] for hook in hooks]
    assert all(any(entry.startswith(linter) for entry in entries) for linter in LINTERS)


@pytest.mark.parametrize("path", [CI, ROOT / ".ci" / "run", ROOT / "CONTRIBUTING.md"], ids=str)
def test_linters_are_the_same_everywhere(path):
    text = path.read_text(encoding="utf-8")
    assert all(linter in text for linter in LINTERS)


def test_ci_runs_what_the_readme_says():
    """.ci/run splits README.md's line into the installation and the tests."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"<!-- test command -->\n```bash\n(pip .*)\n```", text)
    install, tests = line.split(" && ")
    assert install.startswith('pip install -e ".[dev]"')
    assert tests.startswith("python -m pytest")
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_citation():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == opsd_jax.__version__
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme
    assert all(f"{a['given-names']} {a['family-names']}" in readme for a in paper["authors"])
    assert "arXiv:2606.18974" in readme and "2606.18974" in paper["url"]


def test_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE)[:2] == [
        "Unreleased",
        opsd_jax.__version__,
    ]
