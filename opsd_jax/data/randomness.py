"""Random numbers and random choices that depend on a seed and on names only.

They are the same in every process, on every machine and after every resume.
"""

import numpy as np


def generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """Generator of random numbers that depend on a seed, the name of their use, and counters.

    Args:
      seed: >= 0, such as `config.seed`.
      name: what the numbers are for; each use has a stream of its own.
      numbers: counters >= 0, such as step and position in the batch.
    """
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence([seed, *name.encode(), *numbers]))
    )


def subset(size: int, count: int, seed: int) -> list[int]:
    """Indices of `count` of `size` examples (all for 0), chosen at random by the seed, ascending.

    The first examples are not a fair choice: procedural splits and published tables are often
    ordered. A larger subset of the same seed contains a smaller one.
    """
    if not count or count >= size:
        return list(range(size))
    return sorted(np.random.default_rng([seed, size]).permutation(size)[:count].tolist())


def subset_facts(chosen: int, size: int, seed: int) -> dict | None:
    """What summaries say about such a subset; None if it has all examples."""
    return {"drawn": chosen, "of": size, "seed": seed} if chosen < size else None
