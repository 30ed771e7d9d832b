"""What the calls from Python check that commands do not: names, and how errors call arguments."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from opsd_jax.inputs import checks


def named(function: Callable, options: Mapping[str, str]) -> Callable:
    """The function, whose errors name its arguments, see `naming`.

    options: {option: argument} where the two have different names.
    """
    arguments = {name: name for name in inspect.signature(function).parameters} | {**options}

    @functools.wraps(function)
    def call(*args, **kwargs):
        with naming(arguments):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def naming(arguments: Mapping[str, str]) -> Iterator[None]:
    """Errors of the block say rows=3 where those of commands say --rows=3.

    Commands and functions share their checks, whose messages name options. What a message has in
    `backticks` is a command and stays as it is. Settings, --config.NAME, are called config.NAME.

    arguments: {option without its hyphens: the argument}.
    """

    def rename(match: re.Match) -> str:
        option = match[1] or ""
        own = option if option.startswith("config.") else arguments.get(option)
        return own or match[0]

    try:
        yield
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        pattern = r"`[^`]*`|(?<![\w/'\"-])--(\w+(?:\.\w+)*)"
        error.args = tuple(
            re.sub(pattern, rename, part) if isinstance(part, str) else part for part in error.args
        )
        raise


def names(shown: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """The names in an argument that takes one or several: a text is one.

    Raises TypeError for something else, ValueError for what is no name or given twice.
    """
    checks.instance(shown, given, Iterable, "give a name, or a tuple of names")
    found = (given,) if isinstance(given, str) else tuple(given)
    checks.names(shown, found)
    return found
