"""The flags --config=FILE and --config.NAME=VALUE of the commands that take settings."""

import argparse
import ast
import contextlib
import glob
import importlib.util
import logging
import os
import re
import shlex
import sys
import traceback
import types
from collections.abc import Iterator, Mapping

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.inputs import checks, cli, json_files, paths
from opsd_jax.runtime import growing_file


class _ConfigFile(flags.ArgumentParser):
    """Reads FILE.py, FILE.py:ARGUMENT, or FILE.json: settings as in a run's W/config.json.

    An error in the file ends the command with one line that names the file and the line.
    """

    def parse(self, path):
        if path.endswith(".json"):
            return _from_json(path).lock()
        file, colon, argument = path.partition(":")
        if colon and not argument:
            sys.exit(f"error: --config={path} ends with a colon: name a preset after it, or none")
        spec = importlib.util.spec_from_file_location("config_file", file)
        try:
            if not os.path.isfile(file) or spec is None:
                raise ValueError(
                    "there is no such Python file: give one with get_config(), such as "
                    f"configs/mini.py{_similar_file(file)}"
                )
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise ValueError(
                    "it has no function get_config(), which returns the settings; see "
                    "configs/mini.py"
                )
            config = module.get_config(*[argument] if argument else [])
            if not isinstance(config, ConfigDict):
                raise ValueError(
                    f"get_config() returned {config!r:.40}: return the ConfigDict of "
                    "opsd_jax.config.default(), with changed values"
                )
        except Exception as error:  # whatever the file does
            origin, said = spec and spec.origin, str(error).partition("\n")[0]
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == origin
            ]
            if isinstance(error, SyntaxError) and error.filename == origin:
                lines = [error.lineno]
            if not isinstance(error, (ValueError, OSError)):
                said = f"{type(error).__name__}: {said}"
            where = f"{file}, line {lines[-1]}: " if lines else f"{file}: "
            sys.exit(f"error: {said}" if said.startswith(path) else f"error: {where}{said}")
        return config.lock()


def _similar_file(path: str) -> str:
    """ "; did you mean 'configs/mini.py'?", of the files beside `path` and in configs/; or ""."""
    folders = dict.fromkeys((os.path.dirname(path), "configs"))
    there = [file for folder in folders for file in glob.glob(os.path.join(folder, "*.py"))]
    names = {os.path.basename(file): file for file in reversed(there)}
    close = names.get(checks.closest(os.path.basename(path), names))
    return f"; did you mean {close!r}?" if close else ""


def _from_json(path: str) -> ConfigDict:
    """The settings in a JSON file; what is wrong with it ends the command with one line."""
    try:
        record = json_files.read(
            path, "give a run's config.json, or a Python file", fix="repair it"
        )
        if unknown := _unknown_key(record, config_lib.default()):
            raise ValueError(f"{path}: {config_check.unknown(unknown)}")
        try:
            return config_lib.from_json(record)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} holds a setting of another type: {error}") from error
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _unknown_key(record: Mapping, known: ConfigDict, prefix: str = "") -> str:
    """The first key of a record that is no setting; "" if there is none."""
    for name, value in record.items():
        if name not in known:
            return prefix + name
        if isinstance(value, Mapping) and isinstance(known[name], ConfigDict) and name != "arms":
            if found := _unknown_key(value, known[name], f"{prefix}{name}."):
                return found
    return ""


class _Tuple(flags.ArgumentParser):
    """Reads a tuple as Python writes it, or its elements separated by commas: a,b.

    As with any other setting, the last one on the command line holds. The parser of ml_collections
    would join them.
    """

    def parse(self, argument):
        if not isinstance(argument, str):
            return tuple(argument)
        try:
            value = ast.literal_eval(argument)
        except (ValueError, SyntaxError):
            value = tuple(filter(None, re.split(r"[\s,]+", argument.strip("()[] "))))
            if not value:
                raise ValueError("give names such as a,b, or () for none") from None
        return tuple(value) if isinstance(value, (tuple, list, set)) else (value,)


config_flags.register_flag_parser_for_type(tuple, _Tuple())


def _define(flag_values: flags.FlagValues, argv: list[str] | None = None) -> None:
    """Defines --config. argv: the command line that has the changes; None for the process's."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "File with get_config(), see configs/, or the config.json of a run.",
        flag_values,
        lock_config=True,
        sys_argv=argv,
    )
    flag_values["config"].parser = _ConfigFile()


_define(flags.FLAGS)


_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


class _Lines(logging.Formatter):
    """The message alone, or after its level from warnings on."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().format(record)


def log_plainly() -> None:
    """A run's terminal shows the messages of this package, and warnings of all.

    Orbax and TFDS log a lot; a time and a line of code before each message would hide what it says.
    """
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(_Lines())
    handler.addFilter(_is_ours)


@contextlib.contextmanager
def also_logging_to(path: str) -> Iterator[None]:
    """Appends the same messages to a file, with their times, and the error that ends the block.

    The terminal of a machine is gone with the machine.
    """
    handler, root = growing_file.LogFile(path), logging.getLogger()
    handler.addFilter(_is_ours)

    def note(level: int, message: str, exception=None) -> None:  # the terminal has it already
        handler.handle(root.makeRecord("", level, __file__, 0, message, (), exception))

    root.addHandler(handler)
    try:
        note(logging.INFO, shlex.join(sys.argv))
        yield
        note(logging.INFO, "done")
    except SystemExit as error:
        note(logging.INFO, f"ends with exit code {error.code}")
        raise
    except BaseException:
        note(logging.ERROR, "ended by an error", sys.exc_info())
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a message is of this package, or a warning."""
    # A virtual environment may lie in a folder of the package's name.
    return record.pathname.startswith(_PACKAGE) or record.levelno >= logging.WARNING


def _help(command: types.ModuleType) -> str:
    """The options of a command and what it does, in the form that argparse gives other commands."""
    spec = command.__spec__
    prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = flags.FLAGS.get_flags_for_module(command)
    for flag in [flags.FLAGS["config"], *own]:
        default = f" (default: {flag.value})" if flag.value not in (None, "") else ""
        text = (flag.help + default).replace("%", "%%")  # argparse fills in % itself
        if flag.boolean:
            parser.add_argument(f"--{flag.name}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{flag.name}", help=text)
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="a setting, such as --config.opsd.steps=100"
    )
    return parser.format_help()


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, for `app.run`; returns the name of the program.

    An override of a setting that does not exist, or with a value of another type, ends the command
    with one line that names the argument.
    """
    if not {"-h", "--help", "-help", "--h"}.isdisjoint(argv):
        print(_help(sys.modules["__main__"]), end="")
        sys.exit(0)
    return _parse(argv, flags.FLAGS)


def read(arguments: list[str]) -> ConfigDict:
    """The settings that --config=FILE and --config.KEY=VALUE give, of a command without absl.

    Wrong ones end the command as `parse_flags` does.
    """
    argv, values = ["", *arguments], flags.FlagValues()
    _define(values, argv)
    _parse(argv, values)
    return values["config"].value


# What absl and Python say about a value that is no number or flag, and what to say instead.
_FIXES = {
    "invalid literal for int": "give a whole number",
    "could not convert string to float": "give a number",
    "Non-boolean argument": "give true or false",
}


def _parse(argv: list[str], values: flags.FlagValues) -> list[str]:
    for argument, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config":
            path = value if equals else following
            _check_path("--config", path.removesuffix(":"))  # "FILE:" is no address
    try:
        rest = values(argv)
    except flags.IllegalFlagValueError as error:
        argument, _, reason = str(error).removeprefix("flag ").partition(": ")
        reason = next((fix for part, fix in _FIXES.items() if part in reason), reason)
        if one_of := re.search("should be one of <(.*)>", reason):
            value = argument.partition("=")[2]
            reason = checks.choose_from(value, filter(None, one_of[1].split("|")))
        if "as a ConfigDict" in reason:
            group = argument.partition("=")[0]
            inside = [option for option in options() if option.startswith(f"{group}.")]
            reason = f"a group of settings, which takes no value: give {' or '.join(inside[:3])}"
        sys.exit(f"error: {argument}: {reason}")
    except config_flags.config_flags.FlagOrderError as error:
        sys.exit(f"error: give --config=FILE first, then the settings that change it ({error})")
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: {cli.unknown_option(f'--{error.flagname}', _options())}")
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, TypeError) as error:
        for argument in argv:
            key = re.match(r"--?(?:no)?config\.([^=]+)", argument)
            if key and key[1] not in config_lib.default_values():
                sys.exit(f"error: {argument}: {config_check.unknown(key[1])}")
        raise error
    if rest[1:]:
        sys.exit(
            f"error: {' '.join(rest[1:])}: options begin with --, settings with --config., such as "
            "--config.opsd.steps=100"
        )
    return rest


def options() -> list[str]:
    """All settings of a run, as options."""
    return [f"--config.{key}" for key in config_lib.default_values()]


def _options() -> list[str]:
    """The options of the command and the settings, which are what a user may have meant."""
    own = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
    return ["--config", *(f"--{flag.name}" for flag in own), *options()]


def _check_path(flag: str, path: str) -> None:
    """Ends the command where a path cannot be used (`paths.check_given`)."""
    try:
        paths.check_given(flag, path)
    except ValueError as error:
        sys.exit(f"error: {error}")
