"""Writes into the pages what the code knows: `python docs/generate.py`.

reference/configuration.md   type, default and range of each setting. Its key and its meaning are
                             written by hand in the page.
reference/commands.md        the options of each command, from its own parser, between the lines
                             <!-- options of NAME --> and <!-- end -->.

results.md                   values of the miniature's presets in the table of the recipe.

tests/unit/test_docs.py compares these pages with what this script would write.
"""

import argparse
import functools
import importlib
import importlib.util
import pathlib
import re
import types
from collections.abc import Iterator
from unittest import mock

from absl import flags

from opsd_jax import blocks, config_flags
from opsd_jax import config as config_lib

DOCS = pathlib.Path(__file__).parent
_VERBOSITY = (
    "1 also shows where in the code an error comes from, and the shapes of each stage's first batch"
)


def configuration(page: str) -> str:
    """The page with type, default and range of each setting as they are in the code.

    Raises ValueError for a setting without a row, and for a row without a setting.
    """
    settings, shown, header, lines = config_lib.settings(), [], [], []
    arms = config_lib.Setting({}, None)  # its keys are free
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = [cell.strip() for cell in line.strip("|").split("|")]
        elif header[0] == "key" and not set(line) <= set("|- "):
            row = dict(zip(header, cells, strict=True))
            key = row["key"].strip("`")
            found = {}
            for stage in config_lib.STAGES if "default" not in header else [""]:
                full = f"{stage}.{key}" if stage else key
                setting = arms if full == "arms" else settings.get(full)
                if setting:
                    shown.append(full)
                found[stage or "default"] = setting
            known = [setting for setting in found.values() if setting]
            if not known:
                raise ValueError(f"{key} is in the page, but it is not a setting")
            row |= {
                name: f"`{_literal(setting.default)}`" if setting else "–"
                for name, setting in found.items()
            }
            row |= {"type": type(known[0].default).__name__, "range": _range(known[0])}
            line = "| " + " | ".join(row.values()) + " |"
        lines.append(line)
    if missing := [key for key in settings if key not in shown]:
        raise ValueError(f"the page has no row for {', '.join(missing)}: write key and meaning")
    return "\n".join(lines) + "\n"


def _literal(value: config_lib.Value) -> str:
    """A default as Python writes it, with double quotes; a long text by its name in `blocks`."""
    for name, text in vars(blocks).items():
        if name.isupper() and isinstance(text, str) and text == value:
            return f"blocks.{name}"
    return repr(value).replace("'", '"')


def _range(setting: config_lib.Setting) -> str:
    """The range of numbers; a dash where there is none, as for choices, which the meaning names."""
    rule = setting.rule
    if rule is None or rule.kind is str:
        return "–"
    return f"`{rule.allowed.partition(';')[0]}`"


def commands(page: str) -> str:
    """The page with the options of each command, as its own parser describes them."""

    def table(match: re.Match) -> str:
        rows = [f"| `{name}` | {meaning} |" for name, meaning in options(*match[1].split())]
        rows = ["| option | meaning |", "|---|---|", *rows]
        return f"<!-- options of {match[1]} -->\n" + "\n".join(rows) + "\n<!-- end -->"

    return re.sub(r"<!-- options of ([\w\- ]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def options(command: str, sub: str = "") -> Iterator[tuple[str, str]]:
    """(option, meaning) of a command: "data", "make-mini"."""
    parser = parser_of(command)
    (groups,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)] or [None]
    if groups and sub:
        parser = groups.choices[sub]
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            meaning = _meaning(action.help or "", action.default, action.nargs == 0)
            if action.choices and not all(c in meaning for c in action.choices):
                meaning = f"{' or '.join(f'`{c}`' for c in action.choices if c)}; {meaning}"
            required = "required; " if action.required else ""
            yield action.option_strings[-1], required + meaning
    if command == "train":  # absl's own
        yield "--verbosity", _VERBOSITY


def _module(command: str) -> types.ModuleType:
    """The module of a command: "eval", or the package "data"."""
    module = importlib.import_module(f"opsd_jax.{command}")
    if hasattr(module, "main"):
        return module
    return importlib.import_module(f"opsd_jax.{command}.__main__")


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command: as its `main` builds it, or of what it declares to absl."""

    class Parsed(BaseException):
        pass

    def parse(parser, *_):
        raise Parsed(parser)

    module = _module(command)
    if module.__name__ in flags.FLAGS.flags_by_module_dict():
        return config_flags.parser_of(module)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse):
        try:
            module.main([])
        except Parsed as found:
            return found.args[0]
    raise ValueError(f"{module.__name__}.main parses no arguments")


def _meaning(text: str, default, is_switch: bool) -> str:
    """The help text in one line, with the default where the text does not tell it."""
    text = " ".join(text.split()).replace("%%", "%")  # argparse has % twice
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
    text = re.sub(r"(?<![\w`*])(\*)(?![\w`*])", r"\\\1", text)
    if "default" in text or is_switch or default in (None, "", (), []) or default == (None,):
        return text
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def recipe(page: str) -> str:
    """The page with the values of configs/mini.py in the table of its recipe."""
    spec = importlib.util.spec_from_file_location("mini", DOCS.parent / "configs" / "mini.py")
    mini = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mini)
    presets = [mini.get_config(name) for name in ("chart", "maze", "smoke")]

    def row(match: re.Match) -> str:
        values = []
        for config in presets:
            for part in match[1].split("."):
                config = config[part]
            values.append(f"`{_literal(config)}`")
        return f"| `{match[1]}` | {' | '.join(values)} |"

    header, divider = "| key | chart | maze | smoke |\n", "|---|---|---|---|\n"
    before, _, after = page.partition(header + divider)
    table, end, rest = after.partition("\n\n")
    table = re.sub(r"^\| `(\S+)` \|.*$", row, table, flags=re.MULTILINE)
    return before + header + divider + table + end + rest


PARTS = {
    "reference/configuration.md": configuration,
    "reference/commands.md": commands,
    "results.md": recipe,
}


if __name__ == "__main__":
    for name, update in PARTS.items():
        path = DOCS / name
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
