"""The Colab notebook: its cells are run without the installation, as a program or one by one."""

import ast
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "launch" / "colab.ipynb").read_text(encoding="utf-8"))
# What a notebook has and a program does not; what it shows is printed.
PROGRAM_START = """
import sys, types
import matplotlib

matplotlib.use("agg")
display = types.ModuleType("IPython.display")
display.display, display.HTML, display.Markdown = print, str, str
shell = types.ModuleType("IPython")
shell.get_ipython, shell.version_info = lambda: None, (9, 0)  # matplotlib asks
sys.modules.update({"IPython": shell, "IPython.display": display})
"""


def cells(kind: str) -> list[dict]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def execute(tag: str, **names) -> types.SimpleNamespace:
    """Executes the cell with this tag after those of the imports; `names` are what it finds."""
    variables = dict(names)
    (start,) = (cell for cell in cells("code") if cell["source"][0] == "import glob\n")
    (cell,) = (cell for cell in cells("code") if tag in tags(cell))
    for source in (start["source"], cell["source"]):
        exec(compile("".join(source), tag, "exec"), variables)
    return types.SimpleNamespace(**variables)


def test_compiles_and_carries_no_output():
    for cell in cells("code"):
        compile("".join(cell["source"]), "colab.ipynb", "exec")
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert len(cell["source"]) <= 25, "a cell is small"
    found = [tag for cell in cells("code") for tag in tags(cell)]
    assert found == ["settings", "checkout", "accelerator", "install", "devices", "workdir"]
    assert NOTEBOOK["nbformat"] == 4
    assert NOTEBOOK["cells"][0]["cell_type"] == "markdown" and len(cells("markdown")) >= 8


def test_what_it_uses_of_the_package_exists():
    """Linters and the type checker do not read notebooks, and only a slow test runs the cells."""
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells("code")))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("opsd_jax"):
            for alias in node.names:
                package = importlib.import_module(node.module)
                if not hasattr(package, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = getattr(package, alias.name)
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
    ]
    assert {name for name, _ in used} == set(modules)
    assert [use for use in used if not hasattr(modules[use[0]], use[1])] == []


def test_leaves_the_environment_alone():
    """A command that the user types in a cell of their own finds the accelerator."""
    for cell in cells("code"):
        assert "os.environ[" not in "".join(cell["source"])


def test_asks_colab_for_a_tpu():
    assert NOTEBOOK["metadata"]["accelerator"] == "TPU"
    assert NOTEBOOK["metadata"]["colab"]["gpuType"] == "V5E1"


# --- where the project comes from -----------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder as the current one, as in a new session of Colab."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "content"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def project(folder: pathlib.Path) -> pathlib.Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "mini.py").write_text("")
    return folder


def archive(tmp_path, below: str) -> str:
    """A zip whose files are in the folder `below`, as GitHub packs them, or in none."""
    project(tmp_path / "packed" / below)
    return shutil.make_archive(str(tmp_path / "opsd_jax"), "zip", tmp_path / "packed")


@pytest.mark.parametrize("below", ["", "opsd_jax-main"])
def test_uploaded_archive(tmp_path, elsewhere, below):
    execute("checkout", REPOSITORY=archive(tmp_path, below))
    assert pathlib.Path.cwd() == elsewhere / "opsd_jax_checkout" / below
    assert sys.path[0] == str(pathlib.Path.cwd())
    os.chdir(elsewhere)  # the session was started again: the cell finds what it unpacked
    execute("checkout", REPOSITORY="")
    assert pathlib.Path.cwd() == elsewhere / "opsd_jax_checkout" / below


def test_git_address(tmp_path, elsewhere):
    source = project(tmp_path / "source")
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    execute("checkout", REPOSITORY=f"file://{source}")
    assert pathlib.Path.cwd() == elsewhere / "opsd_jax_checkout"


def test_no_checkout(tmp_path, elsewhere):
    with pytest.raises(SystemExit, match="set REPOSITORY"):
        execute("checkout", REPOSITORY="")
    with pytest.raises(RuntimeError, match="(?s)git clone .*code 128"):
        execute("checkout", REPOSITORY="file:///nowhere")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "notes.txt").write_text("")
    other = shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path / "packed")
    with pytest.raises(SystemExit, match="no configs/mini.py"):
        execute("checkout", REPOSITORY=other)


# --- the machine ----------------------------------------------------------------------------------


def test_constraints_of_this_python(elsewhere):
    pins = execute("accelerator").pins
    assert pins == f"constraints/py3{sys.version_info.minor}.txt" and (ROOT / pins).exists()
    with pytest.raises(SystemExit, match=f"no {pins}"):
        execute("install", pins=pins, accelerator="cpu")


def test_tpu_runtime(monkeypatch):
    monkeypatch.setenv("COLAB_TPU_1VM", "1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert execute("accelerator").accelerator == "tpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert execute("accelerator").accelerator == "cpu"


def test_fallback_to_the_cpu_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(RuntimeError, match="the accelerator tpu, and JAX does not use it"):
        execute("devices", accelerator="tpu")


def test_drive(tmp_path, monkeypatch):
    """Mounted when, and only when, the run's folder is there."""
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    colab = types.ModuleType("google.colab")
    colab.drive = drive
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    made = []
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda path, **_: made.append(str(path)))
    execute("workdir", WORKDIR="/content/drive/MyDrive/opsd", FULL=True)
    assert (mounted, made) == (["/content/drive"], ["/content/drive/MyDrive/opsd"])
    monkeypatch.chdir(tmp_path)
    found = execute("workdir", WORKDIR="", FULL=True)
    assert found.workdir == tmp_path / "runs" / "chart" and len(mounted) == 1


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs(tmp_path, tmp_path_factory):
    """Its cells in order, on a run of a few steps, without the installation."""
    import small_run

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("configs", "opsd_jax"):
        (checkout / name).symlink_to(ROOT / name)
    workdir = tmp_path / "run"
    flags = [f"--config.{key}={value}" for key, value in small_run.CHANGES.items()]
    parts = [PROGRAM_START]
    for cell in cells("code"):
        source = "".join(cell["source"])
        if "settings" in tags(cell):
            source += f"\nEXTRA = {flags!r}\nWORKDIR = {str(workdir)!r}"
        if "install" not in tags(cell):
            parts.append(source)
    parts.append("assert 'OPSD_NUM_PROCESSES' not in os.environ")
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join(parts))
    result = subprocess.run(
        [sys.executable, program],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=600,
        env=small_run.environment(tmp_path_factory),
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "question:" in result.stdout and "| arm noise, text only |" in result.stdout
    assert (workdir / "curves.png").stat().st_size > 10_000
    assert (
        result.stdout.count("<iframe srcdoc=") == 3
    )  # the pages of the run, of its evaluation and diagnosis
