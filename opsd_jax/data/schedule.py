"""Which rows make up step t: a pure function of (seed, step), the same on every host.

A run keeps no iterator state. Every host works out the whole global batch from the step number and takes its
own part, so a run resumes from its step number alone, on any number of hosts, and all hosts pad alike.

How one chunk is made (2 sources of weights 2:1, 2 buckets, batch_size 2, chunk of 3 batches = 6 rows):

    source 0, shuffled for this epoch:   a(0) b(1) c(0) d(0) ...          (bucket index in brackets)
    source 1, shuffled for this epoch:   x(1) y(0) ...
    1. take turns by weight              a(0) x(1) b(1) c(0) y(0) d(0)    turn of draw k = (k + 1/2) / weight
    2. sort by bucket, keep the turns    a(0) c(0) y(0) d(0) x(1) b(1)
    3. cut into batches                  [a c] [y d] [x b]                bucket of each: its largest, 0 0 1
    4. shuffle the batches, and the rows inside each
                                         [b x] [c a] [d y]                steps 0, 1, 2 of the chunk

A host takes the rows of its devices, see `sharding.local_rows`. No chunk needs an earlier one, so a batch
far into the run costs as much as the first.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_ROWS, _BATCHES, _WITHIN, _RETRY = range(4)  # names of the random streams, mixed into every key


class BatchSchedule:
    """The global batch of every step: `bucket, rows = plan(step)`.

    Guarantees, with N = batch_size * steps drawn at the end of a chunk (with one bucket: at every step):
      * source s gave weights[s] / sum(weights) * N rows, rounded like seats (Webster's method);
      * every row of a source was visited equally often, give or take one.

    Args:
      lengths: per source either a row count, or an int array [rows] with the index of the smallest bucket
        that each row fits (-1: the row is left out). Of a source given by its count nothing is known, so its
        rows go to the largest bucket.
      weights: per source a share >= 0 of the mixture; None: the number of its rows, so that one epoch of all
        sources is one visit to every row.
      buckets: the sizes that batches are padded to, ascending; only their number and order matter here.
      batch_size: rows of the global batch, all hosts together.
      seed: >= 0.
      chunk: batches bucketed together: more give less padding, fewer a finer mixture. At most an epoch.

    Raises:
      ValueError: an argument that makes no plan; a source without rows.
    """

    def __init__(
        self,
        lengths: Sequence,
        weights: Sequence[float] | None,
        buckets: Sequence[int],
        batch_size: int,
        seed: int,
        chunk: int = 64,
    ):
        if not len(lengths):
            raise ValueError("lengths names no source: give at least one")
        if not len(buckets) or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets must be ascending sizes, at least one, got {list(buckets)}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("chunk", chunk, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size, self.seed, self.num_buckets = int(batch_size), int(seed), len(buckets)

        # Per source: the numbers of the rows that take part, and the bucket index of each, both [rows].
        self._rows, self._buckets = zip(
            *(self._source(s, length) for s, length in enumerate(lengths))
        )
        if weights is None:
            weights = [len(rows) for rows in self._rows]
        if len(weights) != len(lengths):
            raise ValueError(
                f"{len(weights)} weights for {len(lengths)} sources: give one for each"
            )
        weights = [float(w) for w in weights]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"weights must be finite, >= 0 and not all 0, got {weights}")
        exact = [Fraction(w) for w in weights]  # fractions: shares stay exact however long the run
        self._shares = [w / sum(exact) for w in exact]
        self.chunk = min(int(chunk), max(1, sum(map(len, self._rows)) // self.batch_size))
        self._recent = {}  # the last two chunks: a cache only, never state

    def _source(self, s: int, length) -> tuple[np.ndarray, np.ndarray]:
        if np.ndim(length) == 0:
            length = np.full(int(length), self.num_buckets - 1)
        length = np.asarray(length)
        if length.ndim != 1 or (length.size and length.dtype.kind not in "iu"):
            raise ValueError(
                f"lengths[{s}] must be a row count or an int array [rows], "
                f"got {length.dtype} {length.shape}"
            )
        for row in np.flatnonzero((length < -1) | (length >= self.num_buckets))[:1]:
            raise ValueError(
                f"lengths[{s}][{row}] is bucket index {length[row]}, but there are "
                f"{self.num_buckets} buckets: use 0..{self.num_buckets - 1}, or -1 (left out)"
            )
        rows = np.flatnonzero(length >= 0)
        if not rows.size:
            raise ValueError(
                f"source {s} has no row to draw ({length.size} rows, all left out): "
                "raise the largest bucket, or take the source out"
            )
        return rows, length[rows]

    def __call__(self, step: int, attempt: int = 0) -> tuple[int, list[tuple[int, int]]]:
        """The global batch of a step.

        Args:
          step: >= 0.
          attempt: 0 is the plan. 1, 2, ... are further batches for the same step, in the same bucket and
            mixture, of rows that the plan's batch does not hold (as far as there are others): for when the
            first gave nothing to learn from. They do not count as visits.

        Returns:
          The bucket index, and batch_size pairs (source, row). Host p of n takes `rows[p::n]`.
        """
        if step < 0 or attempt < 0:
            raise ValueError(f"step and attempt must be >= 0, got {step} and {attempt}")
        step, attempt = int(step), int(attempt)
        number, place = divmod(step, self.chunk)
        recent = (
            self._recent
        )  # threads may race here: each replaces the whole dict by one just as right
        if number not in recent:
            recent = dict([*recent.items()][-1:] + [(number, self._make_chunk(number))])
            self._recent = recent
        bucket, rows = recent[number][place]
        return (
            (bucket, list(rows))
            if attempt == 0
            else (bucket, self._retry(step, attempt, bucket, rows))
        )

    def _draws(self, n: int) -> list[int]:
        """How many of the first n draws each source gets.

        Draw k of source s has its turn at (k + 1/2) / share[s]; the draws of all sources, ordered by turn and
        then by source, are the stream, and this counts its first n. E.g. shares 2/3, 1/3: turns .75 2.25 3.75
        5.25 and 1.5 4.5, so the stream is 0 1 0 0 1 0, and among its first 4 draws 3 are of source 0.
        """
        half = Fraction(1, 2)
        draws = [
            math.floor(share * n + half) for share in self._shares
        ]  # all draws with a turn <= n
        some = [s for s, share in enumerate(self._shares) if share]
        while sum(draws) < n:
            draws[min(some, key=lambda s: ((draws[s] + half) / self._shares[s], s))] += 1
        while sum(draws) > n:
            draws[max(some, key=lambda s: ((draws[s] - half) / self._shares[s], s))] -= 1
        return draws

    def _make_chunk(self, number: int) -> list[tuple[int, list[tuple[int, int]]]]:
        n = self.chunk * self.batch_size
        source, row, bucket, turn = [], [], [], []
        for s, (first, last) in enumerate(
            zip(self._draws(number * n), self._draws((number + 1) * n))
        ):
            if first == last:
                continue
            size, draw = len(self._rows[s]), np.arange(first, last)
            epochs = range(first // size, (last - 1) // size + 1)
            walk = np.concatenate([_shuffled(size, self.seed, _ROWS, s, epoch) for epoch in epochs])
            index = walk[draw - epochs[0] * size]
            source.append(np.full(len(draw), s))
            row.append(self._rows[s][index])
            bucket.append(self._buckets[s][index])
            turn.append((draw + 0.5) / float(self._shares[s]))
        source, row, bucket, turn = map(np.concatenate, (source, row, bucket, turn))
        batches = np.lexsort((turn, bucket)).reshape(self.chunk, self.batch_size)
        if self.num_buckets > 1:  # with one bucket the turns are the best order there is
            batches = batches[_shuffled(self.chunk, self.seed, _BATCHES, number)]
        # Turns repeat their pattern of sources; without this a host would always get the same source.
        within = _random_bits(n, self.seed, _WITHIN, number).reshape(batches.shape)
        batches = np.take_along_axis(batches, np.argsort(within, axis=1, kind="stable"), axis=1)
        return [
            (int(bucket[b].max()), list(zip(source[b].tolist(), row[b].tolist()))) for b in batches
        ]

    def _retry(
        self, step: int, attempt: int, bucket: int, planned: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        key = (self.seed, _RETRY, step, attempt)
        fitting = [rows[buckets <= bucket] for rows, buckets in zip(self._rows, self._buckets)]
        share = np.array(
            [float(w) if len(rows) else 0.0 for w, rows in zip(self._shares, fitting)]
        ).cumsum()
        # Systematic sampling: a random offset, then equal steps through the shares: no source is favoured.
        offset = int(_random_bits(1, *key)[0] >> np.uint64(11)) / 2**53
        edges = np.floor(share / share[-1] * self.batch_size + offset).astype(np.int64)
        batch = []
        for s, take in enumerate(np.diff(edges, prepend=0)):
            if take:
                rows = fitting[s][_shuffled(len(fitting[s]), *key, s)]
                seen = np.isin(rows, [row for source, row in planned if source == s])
                rows = np.concatenate([rows[~seen], rows[seen]])
                batch += [(s, int(rows[k % len(rows)])) for k in range(take)]
        return [batch[i] for i in _shuffled(len(batch), *key, len(fitting))]


def _random_bits(n: int, *key: int) -> np.ndarray:
    """[n] uint64, a pure function of the key. Raw bits: NumPy keeps those the same from version to version;
    what it makes of them (permutation, choice) it may change."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def _shuffled(n: int, *key: int) -> np.ndarray:
    """0 .. n-1 in an order that is a pure function of the key."""
    return np.argsort(_random_bits(n, *key), kind="stable")
