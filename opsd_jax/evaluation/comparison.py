"""Comparison with earlier results of the same questions, in pairs."""

import dataclasses
import json
import os
from collections.abc import Hashable, Mapping, Sequence

from opsd_jax.evaluation import statistics
from opsd_jax.evaluation.benchmark import Benchmark
from opsd_jax.evaluation.results import Result, read_summary
from opsd_jax.runtime import run_folder


@dataclasses.dataclass(frozen=True)
class Compared:
    """Earlier results that new ones are compared with.

    Attributes:
      name: name of their evaluation.
      split: split of the tasks' examples.
      hits: {benchmark: {identity of an example (`Benchmark.identify`): whether the answer was
        right}}, without those that several examples have.
      twice: {benchmark: identities that several examples have}: nothing says which one is the pair.
    """

    name: str
    split: str | None
    hits: dict[str, dict[tuple[str, Hashable], bool]]
    twice: dict[str, set[tuple[str, Hashable]]] = dataclasses.field(default_factory=dict)


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
    summary, hits, twice = read_summary(record), {}, {}
    try:
        with open(path, encoding="utf-8") as f:
            for p in map(json.loads, f):
                name = p["benchmark"]
                identity = (
                    (p["pid"], p["expected"])
                    if "pid" in p
                    else (summary["benchmarks"][name]["md5"], str(p["index"]))
                )
                if identity in hits.setdefault(name, {}):
                    twice.setdefault(name, set()).add(identity)
                hits[name][identity] = bool(p["hit"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--against={against}: {path} is damaged ({error!r}): evaluate again"
        ) from error
    for name, identities in twice.items():
        for identity in identities:
            del hits[name][identity]
    name = os.path.basename(os.path.normpath(folder))
    return Compared(name, summary.get("split"), hits, twice)


def check_pairs(compared: Compared, chosen: Sequence[Benchmark], split: str | None) -> None:
    """Checks that the earlier results answered at least half of the examples of each benchmark.

    An example and its pair have the same pid and the same answer, or, in a public table, the same
    file and index.

    Args:
      chosen: the benchmarks. split: split of the tasks among them.
    Raises:
      ValueError: other benchmarks, another split, other examples, or too few that are told apart.
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
            "of the same examples"
        )
    for benchmark in shared:
        here = {benchmark.identify(key) for key in benchmark.keys}
        there, others = compared.hits[benchmark.name], 0
        alike = here & compared.twice.get(benchmark.name, set())
        pairs = len(here & there.keys())
        if alike and pairs < sum(benchmark.identify(key) in alike for key in benchmark.keys):
            pids = sorted({str(pid) for pid, _ in alike})
            shown = ", ".join(pids[:5]) + (", ..." if len(pids) > 5 else "")
            raise ValueError(
                f"{start}: {benchmark.name} has {len(benchmark.keys)} examples, and only {pairs} "
                "have a pid and an answer that no other one has; of the rest, nothing says which "
                f"answers are a pair. Give each example a pid of its own (not so: {shown}), "
                "prepare the data again, and evaluate both again"
            )
        if not benchmark.table:
            others = len({name for name, _ in here} & {name for name, _ in there.keys() - here})
        if 2 * pairs < min(len(here), len(there)) or not pairs or 10 * others > pairs:
            why = f", and {others} have the same pid and another answer" if others else ""
            raise ValueError(
                f"{start}: {benchmark.name} has {len(here)} examples here and {len(there)} there, "
                f"of which {pairs} are the same{why}: give results of the same data"
            )


def outcome(
    compared: Compared, results: Sequence[Result], benchmarks: Mapping[str, Benchmark]
) -> dict:
    """What summary.json says under "against".

    Args:
      results: the new answers. benchmarks: {name: benchmark} of them.
    Returns:
      {"name": name of the earlier results, "benchmarks": {benchmark of both: {"n": examples of
      both, "here", "there": shares of right answers to these, "only_here", "only_there": examples
      that only one of them answers right, "p": of McNemar's exact test}}}.
    """
    found = {}
    for result in results:
        hits, identify = compared.hits.get(result.name, {}), benchmarks[result.name].identify
        both = [
            (bool(p["hit"]), hits[identify(p["index"])])
            for p in result.predictions
            if identify(p["index"]) in hits
        ]
        if both:
            only_here = sum(here and not there for here, there in both)
            only_there = sum(there and not here for here, there in both)
            found[result.name] = {
                "n": len(both),
                "here": sum(here for here, _ in both) / len(both),
                "there": sum(there for _, there in both) / len(both),
                "only_here": only_here,
                "only_there": only_there,
                "p": statistics.mcnemar(only_here, only_there),
            }
    return {"name": compared.name, "benchmarks": found}


def in_words(name: str, against: dict) -> list[str]:
    """What `outcome` found, one line per benchmark. name: name of the new results."""
    return [
        f"{name} against {against['name']}, {x['n']} examples of {task}: {100 * x['here']:.1f} % "
        f"against {100 * x['there']:.1f} %; {x['only_here']} right only here, {x['only_there']} "
        f"only there, p = {x['p']:.2g} (McNemar)"
        for task, x in against["benchmarks"].items()
    ]
