"""The flags --config=FILE and --config.NAME=VALUE of the commands that take settings."""

import argparse
import ast
import contextlib
import logging
import os
import re
import shlex
import sys
import types
from collections.abc import Iterator

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from opsd_jax import config as config_lib
from opsd_jax import config_check, config_file
from opsd_jax.inputs import checks, cli
from opsd_jax.runtime import growing_file


class _ConfigFile(flags.ArgumentParser):
    """Reads a file of settings; an error in it ends the command with one line."""

    def parse(self, path):
        try:
            return config_file.of_file(path)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")


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
        "file with get_config(), see configs/, or the config.json of a run",
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


# What the commands with these flags refuse to run without; they say so themselves.
_REQUIRED = frozenset({"config", "workdir", "topology"})


def parser_of(command: types.ModuleType) -> argparse.ArgumentParser:
    """The options of a command and what it does, as the other commands declare them to argparse."""
    spec = command.__spec__
    prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    parser = argparse.ArgumentParser(
        prog=prog,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = flags.FLAGS.get_flags_for_module(command)
    for flag in [flags.FLAGS["config"], *own]:
        text, choices = flag.help, None
        if isinstance(flag, flags.EnumFlag):
            text = text.partition(">: ")[2]  # absl puts the choices before the text
            choices = list(filter(None, flag.parser.enum_values))
        if "default" not in text and not flag.boolean and flag.default not in (None, ""):
            text += f" (default: {flag.default})"
        shown = {"help": text.replace("%", "%%")}  # argparse fills in % itself
        if flag.boolean:
            parser.add_argument(f"--{flag.name}", action="store_true", **shown)
        else:
            required = flag.name in _REQUIRED
            parser.add_argument(f"--{flag.name}", required=required, choices=choices, **shown)
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="a setting, such as --config.opsd.steps=100"
    )
    return parser


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, for `app.run`; returns the name of the program.

    An override of a setting that does not exist, or with a value of another type, ends the command
    with one line that names the argument.
    """
    if not {"-h", "--help", "-help", "--h"}.isdisjoint(argv):
        print(parser_of(sys.modules["__main__"]).format_help(), end="")
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
            shown = " or ".join(inside[:3]) or f"{group}.KEY=VALUE"  # arms have keys of their own
            reason = f"a group of settings, which takes no value: give {shown}"
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
