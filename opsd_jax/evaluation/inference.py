"""The evaluation loop: a predictor answers batches of questions; answers are timed and kept.

Training, `python -m opsd_jax.eval` and `python -m opsd_jax.diagnose` all run this loop. A predictor
answers one batch. There are two:

  contexts.ContextPredictor          contexts packed as in training, greedy answers
  interleaved.InterleavedPredictor   a protocol, with image generation or without

Timing rule, for each benchmark: batches during which a program was compiled are not counted. Where
all of its batches (of this process) compiled, the last one is asked again for its time.
`timed_samples` in the summary is the number of examples that were timed.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax

from opsd_jax.evaluation.benchmark import Benchmark
from opsd_jax.evaluation.store import Store
from opsd_jax.runtime import clock
from opsd_jax.runtime.stopping import BeforeBatch, never_stop

T = TypeVar("T")
Batch = tuple[Benchmark, list]  # keys of the benchmark that are asked together
Predict = Callable[[int, Benchmark, list], dict]
"""(batch number, benchmark, keys) -> {"predictions": [dict per key], "seconds", "compiled"}.

A prediction has at least "index" (the key), "prediction" (the text), "expected" and "tokens"; "hit"
where it is known at once. `timed` measures the last two.
"""


@dataclasses.dataclass(frozen=True)
class Answered:
    """How much of an evaluation is answered.

    Attributes:
      done: examples that are answered.
      hits: how many of them are right; None where answers are scored at the end.
    """

    done: int
    hits: int | None

    @property
    def shown(self) -> dict[str, float]:
        """What a progress bar shows beside the number of examples."""
        return {} if self.hits is None else {"accuracy": self.hits / self.done}


def batches(benchmarks: Iterable[Benchmark], batch_size: int) -> list[Batch]:
    """Batches of all benchmarks, examples of similar size together.

    The last batch of a benchmark may be shorter.
    """
    found = []
    for benchmark in benchmarks:
        keys = sorted(benchmark.keys, key=benchmark.size)  # stable: equal sizes stay in order
        found += [(benchmark, keys[n : n + batch_size]) for n in range(0, len(keys), batch_size)]
    return found


def filled(part: Sequence[T], batch_size: int) -> list[T]:
    """A batch filled up with its last element: [2, 5] to four elements is [2, 5, 5, 5]."""
    return [*part, *[part[-1]] * (batch_size - len(part))]


def timed(ask: Callable[[], T]) -> tuple[T, float, bool]:
    """(result of `ask`, once the devices are done; seconds; whether it compiled a program)."""
    with clock.compilations() as compiled:
        began = time.perf_counter()
        found = jax.block_until_ready(ask())
        seconds = time.perf_counter() - began
    return found, seconds, compiled.programs > 0


def answer(
    batches: Sequence[Batch],
    predict: Predict,
    *,
    store: Store | None = None,
    on_batch: Callable[[Answered], None] = lambda progress: None,
    before_batch: BeforeBatch = never_stop,
) -> list[dict] | None:
    """Answers all batches, or those that a store lacks.

    Args:
      store: where answers are kept, so that a killed evaluation continues, with any number of
        processes, and a finished one is not asked again. None: in memory; all processes answer each
          batch together.
      on_batch: called after each batch of this process, also for those that the store had.
      before_batch: called before each batch, by all processes equally often. Raises to stop.
    Returns:
      The records of the batches in order, each with its "batch" number. Where processes answer
      shares, the first process has them and the others have None.
    Raises:
      DifferentAnswersError: the store holds answers of another identity. ValueError: a damaged file
        in it.
    """
    together = store is None or store.together
    processes = 1 if together else jax.process_count()
    mine = share(batches, together)
    records = store.open() if store else {}
    last = {batches[number][0].name: number for number in mine}
    timed_ones, done, hits = collections.Counter(), 0, 0
    for number in mine:
        before_batch()
        benchmark, keys = batches[number]
        if number not in records:
            record = predict(number, benchmark, keys)
            # Processes that answer together compile at the same batches, so all of them repeat it.
            is_only_timing = number == last[benchmark.name] and not timed_ones[benchmark.name]
            if record["compiled"] and is_only_timing:
                record = predict(number, benchmark, keys)
            records[number] = {"batch": number, **record}
            if store:
                store.append(records[number])
        predictions = records[number]["predictions"]
        timed_ones[benchmark.name] += not records[number]["compiled"]
        done, hits = done + len(predictions), hits + sum(bool(p.get("hit")) for p in predictions)
        on_batch(Answered(done, hits if all("hit" in p for p in predictions) else None))
    for _ in range(len(mine), -(-len(batches) // processes)):
        before_batch()  # other processes have one more batch
    if store:
        records = store.close(records)
    if not together and jax.process_index():
        return None
    return [json.loads(json.dumps(records[number])) for number in sorted(records)]


def share(batches: Sequence[Batch], together: bool) -> range:
    """Numbers of the batches that this process answers: all, or every n-th of n processes."""
    if together:
        return range(len(batches))
    return range(jax.process_index(), len(batches), jax.process_count())
