"""What all commands share: output to a terminal of any encoding, and checks of flag values."""

import argparse
import difflib
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence

import jax

from opsd_jax.inputs import checks

DTYPES = ("float32", "bfloat16")  # of a computation
_MOST_MEANT = 3  # options that an unknown one may stand for, in an error message


def start() -> None:
    """Prints characters that the terminal's encoding lacks as escapes such as \\u2013.

    To be called first in every command. Otherwise a finished evaluation could end with a
    UnicodeEncodeError while it prints its table.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Of a command's options. Errors are one line; one about an unknown option suggests another.

    argparse would first miss the required option that was misspelt, and suggest nothing.

    settings: options --config.KEY of the command, which are suggested, too.
    instead: {option that other commands have: what this one has in its place}.
    """

    settings: Sequence[str] = ()
    instead: Mapping[str, str] = types.MappingProxyType({})

    def __init__(self, *args, **kwargs):
        # Otherwise --sample=8 would silently be --samples=8.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *names, **options):
        """As in argparse; the help of an option ends with its default, unless it names one."""
        default, help_text = options.get("default"), options.get("help")
        unsaid = default not in (None, "", (), [], argparse.SUPPRESS)
        if help_text and unsaid and "default" not in help_text:
            shown = ",".join(default) if isinstance(default, tuple) else default
            options["help"] = f"{help_text} (default: {shown})"
        return super().add_argument(*names, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse; ends the command with code 2 for an option that does not exist."""
        args = list(sys.argv[1:] if args is None else args)
        # A command with subcommands has --help alone; each subcommand's parser checks the rest.
        options = _long_options(self.format_help())
        if options != {"--help"}:
            for argument in args[: args.index("--")] if "--" in args else args:
                given = re.match(r"(--?[A-Za-z][\w.-]*)(?:=|$)", argument)
                if given and given[1] != "-h" and given[1] not in options:
                    if own := self.instead.get(given[1]):
                        self.error(f"{given[1]}: there is no such option; did you mean {own}?")
                    self.error(unknown_option(given[1], [*options, *self.settings]))
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """Ends the command with one line and code 2."""
        said = _plain(message, self.format_usage())
        print(f"error: {said} ({self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(2)


def _plain(message: str, usage: str) -> str:
    """An error of argparse in the words of the other errors: what was typed, and what to do.

    "argument --rows: invalid int value: 'x'" becomes "--rows=x: give a whole number".

    usage: of the command; it has the names of subcommands, "{prepare,sizes}".
    """
    name, colon, problem = message.removeprefix("argument ").partition(": ")
    if not colon or message == problem:
        return message
    if problem == "expected one argument":
        return f"{name} has no value: write {name}=VALUE"
    if name == "the following arguments are required":
        missing, subcommands = problem.split(", "), re.search(r"\{([^}]*)\}", usage)
        if not missing[0].startswith("-") and subcommands:
            return f"no {missing[0]} is given: choose from {subcommands[1].replace(',', ', ')}"
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if name == "unrecognized arguments":
        return f"{problem}: no option takes this; options are written --NAME=VALUE"
    if found := re.fullmatch(r"invalid (int|float) value: '(.*)'", problem, re.DOTALL):
        kind = "whole number" if found[1] == "int" else "number"
        return f"{name}={found[2]}: give a {kind}"
    if found := re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", problem, re.DOTALL):
        choices = re.split(r"'?, '?", found[2].strip("'"))
        given = f"{name}={found[1]}" if name.startswith("-") else f"there is no {name} {found[1]!r}"
        return f"{given}: {checks.choose_from(found[1], filter(None, choices))}"
    return f"{name}: {problem}"


def unknown_option(given: str, options: Iterable[str]) -> str:
    """What is wrong with an option that does not exist, and which one may be meant.

    Args:
      given: as typed, without its value. options: those that exist, with their hyphens.
    """

    def plain(option: str) -> str:
        return option.lower().strip("-").replace("-", "").replace("_", "")

    wanted = plain(given)
    named: dict[str, list[str]] = {}
    for option in options:
        name = plain(option)
        # "config.opsd.optim.lr", and "lr" for those who leave the groups out
        for part in {name, name.rpartition(".")[2]}:
            named.setdefault(part, []).append(option)
    meant = [o for o in named.get(wanted.rpartition(".")[2], ()) if plain(o).endswith(wanted)]
    if not meant:
        close = difflib.get_close_matches(wanted, named, n=1, cutoff=0.6)
        meant = [option for name in close for option in named[name]]
    shown = " or ".join(meant[:_MOST_MEANT]) + (" ..." if meant[_MOST_MEANT:] else "")
    return f"{given}: there is no such option" + (f"; did you mean {shown}?" if meant else "")


def _long_options(help_text: str) -> set[str]:
    """The options that the lines of a help text begin with."""
    starts = re.findall(r"^  (-.*?)(?:  |$)", help_text, flags=re.MULTILINE)
    return {option for start in starts for option in re.findall(r"--[\w-]+", start)}


# ---------------------------------------------------------------------------- types of flags


def names(text: str) -> tuple[str, ...]:
    """The names in "a,b"."""
    return tuple(text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """The numbers in "0,1"."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number nor a list of them such as 0,1,2"
        ) from None


def text(flag: str, value: str) -> str:
    """The value of a flag as it was typed, also if Python read it without UTF-8."""
    try:
        return os.fsencode(value).decode() if re.search("[\ud800-\udfff]", value) else value
    except UnicodeError as error:
        raise ValueError(
            f"--{flag}={value}: the text is not UTF-8 ({error}): set a UTF-8 locale, such as "
            "LC_ALL=C.UTF-8"
        ) from error


# ---------------------------------------------------------------------------- shared flags


def add_tensor(parser: argparse.ArgumentParser) -> None:
    """The flag --tensor of commands that ask a model."""
    parser.add_argument(
        "--tensor",
        type=int,
        default=0,
        help="devices of one copy of the model (default: chosen for speed, see "
        "docs/guides/evaluate.md)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The flag --dtype of commands that ask a model."""
    parser.add_argument(
        "--dtype",
        default="",
        choices=["", *DTYPES],
        help="compute dtype, which the weights are cast to (default: the run's config.model.dtype; "
        "of a release what its config files say, else bfloat16)",
    )


def add_compute_every(parser: argparse.ArgumentParser) -> None:
    """The flag --compute_every of commands that generate images."""
    parser.add_argument(
        "--compute_every",
        type=int,
        default=0,
        metavar="N",
        help="compute every N-th denoising step of generated images and extrapolate between "
        "(default: the run's config.drawing.compute_every; of a release 1, all)",
    )


# ---------------------------------------------------------------------------- checks of flags


def check_number(flag: str, value: int | None, least: int) -> None:
    """Raises ValueError for a whole number below `least`. None: the flag was not given."""
    if value is not None:
        checks.number(f"--{flag}", value, int, f"[{least}, inf)")


def check_tensor(value: int) -> None:
    """Raises ValueError for a number of devices that no copy of a model has; 0: not given."""
    checks.number("--tensor", value, int, "[0, inf); 0 for the default")


def check_dtype(value: str) -> None:
    """Raises ValueError for a compute dtype that there is not; "": not given."""
    if value:
        checks.choice("--dtype", value, DTYPES)


def check_compute_every(value: int, generates: bool) -> None:
    """Raises ValueError for a number of steps that makes no sense; 0: not given.

    generates: whether images are generated.
    """
    checks.number("--compute_every", value, int, "[0, inf); 0 for the default")
    if value and not generates:
        raise ValueError(
            f"--compute_every={value} is for generated images: give --visual_thoughts=generated"
        )


def check_temperature(value: float | None) -> None:
    """Raises ValueError for a temperature that sampling cannot use. None: not given."""
    if value is not None:
        allowed = f"{checks.TEMPERATURE}, or 0; 0 takes the most probable token"
        checks.number("--temperature", value, float, allowed)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed of more than 32 bits."""
    checks.number("--seed", seed, int, f"{checks.SEED}; others would repeat one of these")


def check_name(name: str) -> None:
    """Raises ValueError unless a name of results is the name of one folder.

    Then nothing is written elsewhere, and every summary is found.
    """
    checks.folder_name(f"--name={name}", name)
    if name == "summary.md":
        raise ValueError(
            "--name=summary.md: the table of all results has that name: give one folder name of "
            "your own"
        )


def check_once(flag: str, values: Sequence) -> None:
    """Raises ValueError for a value that is given twice."""
    checks.once(f"--{flag}={','.join(map(str, values))}", values)


def check_precision() -> None:
    """Raises ValueError if JAX would compute in 64 bits. Commands that compute call this first."""
    if jax.config.jax_enable_x64:
        raise ValueError(
            "JAX_ENABLE_X64 is set, but the programs of opsd_jax compute in 32 bits and less and "
            "do not compile with 64: unset JAX_ENABLE_X64, or set it to 0"
        )
