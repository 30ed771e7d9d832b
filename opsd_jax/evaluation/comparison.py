"""Comparison with earlier results of the same questions, in pairs."""

import dataclasses
import json
import os
from collections.abc import Hashable, Sequence

from opsd_jax.evaluation.benchmark import Benchmark
from opsd_jax.evaluation.results import read_summary
from opsd_jax.runtime import run_folder


@dataclasses.dataclass(frozen=True)
class Compared:
    """Earlier results that new ones are compared with.

    Attributes:
      name: of the results.
      split: of the tasks.
      hits: {benchmark: {what was asked, see `Benchmark.asked`: whether the answer was right}}.
    """

    name: str
    split: str | None
    hits: dict[str, dict[tuple[str, Hashable], bool]]


def read_results(workdir: str, against: str) -> Compared:
    """Reads earlier results.

    Args:
      against: a name in W/eval, or a folder.
    Raises:
      FileNotFoundError: not a finished evaluation. ValueError: a damaged file.
    """
    folder = against if os.path.isdir(against) else run_folder.evaluation(workdir, against)
    record, path = (
        os.path.join(folder, name) for name in (run_folder.SUMMARY, run_folder.PREDICTIONS)
    )
    if absent := [file for file in (record, path) if not os.path.isfile(file)]:
        raise FileNotFoundError(
            f"--against={against}: no {absent[-1]}: give a name in {workdir}/eval, or such a "
            "folder, of a finished evaluation"
        )
    summary, hits, twice = read_summary(record), {}, set()
    try:
        with open(path, encoding="utf-8") as f:
            for row in map(json.loads, f):
                name = row["benchmark"]
                asked = (
                    (row["pid"], row["expected"])
                    if "pid" in row
                    else (summary["benchmarks"][name]["md5"], str(row["index"]))
                )
                if asked in hits.setdefault(name, {}):
                    twice.add((name, asked))
                hits[name][asked] = bool(row["hit"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--against={against}: {path} is damaged ({error!r}): evaluate again"
        ) from error
    for name, asked in twice:  # ambiguous: nothing says which one is the pair
        del hits[name][asked]
    return Compared(os.path.basename(os.path.normpath(folder)), summary.get("split"), hits)


def check_pairs(compared: Compared, chosen: Sequence[Benchmark], split: str | None) -> None:
    """Checks that the earlier results answered at least half of the examples of each benchmark.

    An example and its pair have the same pid and the same answer; of a public table, the same file
    and index.

    Args:
      chosen: the benchmarks. split: of the tasks among them.
    Raises:
      ValueError: other benchmarks, another split, or other examples.
    """
    shared = [benchmark for benchmark in chosen if benchmark.name in compared.hits]
    start = f"--against={compared.name}"
    if not shared:
        raise ValueError(
            f"{start} has results of {', '.join(compared.hits) or 'nothing'}, not of "
            f"{', '.join(b.name for b in chosen)}: give results of the same benchmarks"
        )
    if any(not b.table for b in shared) and split and compared.split and split != compared.split:
        raise ValueError(
            f"{start} has results of split {compared.split}, these are of {split}: give results "
            "of the same rows"
        )
    for benchmark in shared:
        here = {benchmark.asked(key) for key in benchmark.keys}
        there, others = compared.hits[benchmark.name], 0
        pairs = len(here & there.keys())
        if not benchmark.table:
            others = len({name for name, _ in here} & {name for name, _ in there.keys() - here})
        if 2 * pairs < min(len(here), len(there)) or not pairs or 10 * others > pairs:
            why = f", and {others} have the same pid and another answer" if others else ""
            raise ValueError(
                f"{start}: {benchmark.name} has {len(here)} rows here and {len(there)} there, of "
                f"which {pairs} are the same{why}: give results of the same data"
            )
