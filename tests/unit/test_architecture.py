"""Rules about the code's structure: layers, commands, private names, mesh axes.

pyproject.toml lists the layers. CONTRIBUTING.md explains them and describes every module.
"""

import ast
import functools
import pathlib
import re
import subprocess
import sysconfig

from opsd_jax import sharding

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "opsd_jax"
CODE = [
    *PACKAGE.rglob("*.py"),
    *(ROOT / "configs").glob("*.py"),
    *(ROOT / "perf").glob("*.py"),
]

# Modules that read command-line flags besides the commands: what several commands share.
READS_FLAGS = {"opsd_jax.inputs.cli", "opsd_jax.config_flags"}


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: pathlib.Path) -> dict[str, str]:
    """{name in the file: full name of what it imports}, imports inside functions included."""
    found = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}, line {node.lineno}: a relative import"
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def is_command(path: pathlib.Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


def test_layers():
    """The contracts of [tool.importlinter] in pyproject.toml.

    In a process of its own: import-linter switches off the loggers that it finds, and later tests
    read what is logged.
    """
    lint = pathlib.Path(sysconfig.get_path("scripts"), "lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_commands_read_flags():
    readers = {
        module_name(path)
        for path in PACKAGE.rglob("*.py")
        if {"argparse", "absl.flags", "absl.app"} & set(imports(path).values())
    }
    commands = {module_name(path) for path in PACKAGE.rglob("*.py") if is_command(path)}
    assert READS_FLAGS <= readers <= commands | READS_FLAGS


def test_commands_are_not_imported():
    """Neither by each other nor by anything else."""
    commands = {module_name(path): path for path in PACKAGE.rglob("*.py") if is_command(path)}
    assert len(commands) > 7
    for path in CODE:
        taken = commands.keys() & set(imports(path).values())
        # The configuration files and scripts may start a command.
        assert not taken or PACKAGE not in path.parents, f"{module_name(path)} imports {taken}"


def private_names(path: pathlib.Path) -> set[str]:
    """Full names of private functions, classes and modules of other modules that a file uses."""
    names = {name: full for name, full in imports(path).items() if full.startswith("opsd_jax.")}
    is_private = re.compile(r"_[a-z]\w*", re.IGNORECASE).fullmatch
    found = {full for full in names.values() if is_private(full.rpartition(".")[2])}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in names and is_private(node.attr):
                found.add(f"{names[node.value.id]}.{node.attr}")
    return found


def test_private_names_stay_in_their_module():
    found = {(module_name(path), name) for path in CODE for name in private_names(path)}
    assert found == set()


def names_mesh_axes(path: pathlib.Path) -> bool:
    """`data` is left out: it is also the name of a package and of a group of settings."""
    axes = {*sharding.AXES} - {"data"}
    return any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in axes
        for node in ast.walk(tree(path))
    )


def test_only_sharding_names_mesh_axes():
    found = {module_name(path) for path in PACKAGE.rglob("*.py") if names_mesh_axes(path)}
    assert found == {"opsd_jax.sharding"}


def test_every_module_is_described():
    """CONTRIBUTING.md's tables list the modules and packages of opsd_jax, each once."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `opsd_jax/([\w/.]+?)(?:\.py|/)` \|", text, flags=re.MULTILINE)
    present = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    present |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(present)
