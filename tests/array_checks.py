"""How tests check the annotations of a module; see opsd_jax/array_types.py."""

import beartype


def arguments_and_results(function):
    """A function whose arguments and results are checked.

    Fields of a dataclass are not: in a tree map they hold shapes, shardings and other values.
    """
    return function if function.__name__ == "__init__" else beartype.beartype(function)
