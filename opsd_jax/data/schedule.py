"""Which examples make up a step's batch: a pure function of (seed, step), the same on every host.

A run keeps no iterator state. Every host computes the whole global batch from the step number and
takes its own part. So a run resumes from its step number alone, on any number of hosts, and all
hosts pad to the same sizes.

How one chunk is made (2 sources of weights 2:1, 2 buckets, batch_size 2, chunk of 3 batches = 6
examples; bucket indices in brackets):

    source 0, shuffled for this epoch:   a(0) b(1) c(0) d(0) ...
    source 1, shuffled for this epoch:   x(1) y(0) ...
    1. take turns by weight              a(0) x(1) b(1) c(0) y(0) d(0)   turn (k + 1/2) / weight
    2. sort by bucket, keep the turns    a(0) c(0) y(0) d(0) x(1) b(1)
    3. cut into batches                  [a c] [y d] [x b]               its largest bucket: 0 0 1
    4. shuffle the batches, and the examples inside each
                                         [b x] [c a] [d y]               steps 0, 1, 2 of the chunk

A host takes the examples of its devices, see `sharding.local_batch_indices`. No chunk needs an
earlier one, so a batch far into the run costs as much as the first.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Numbers of the random streams, which are part of every key.
_EXAMPLES, _BATCHES, _WITHIN, _RETRY = range(4)


class BatchSchedule:
    """The global batch of every step: `bucket, pairs = schedule(step)`.

    Guarantees, with N = batch_size * steps at the end of a chunk (with one bucket: at every step):
      * source s gave weights[s] / sum(weights) * N examples, rounded like seats (Webster's method);
      * every example of a source was visited equally often, give or take one.

    Args:
      lengths: for each source either its number of examples, or an int array [number of examples]
        with the index of the smallest bucket that each example fits (-1: the example is left out).
        Nothing is known about the examples of a source given by its number, so they go to the
        largest bucket.
      weights: for each source a share >= 0 of the mixture; None for the number of its examples, so
        that one epoch of all sources is one visit to every example.
      buckets: the sizes that batches are padded to, ascending; only their number and order matter
        here.
      batch_size: number of examples of the global batch, all hosts together.
      seed: >= 0.
      chunk: number of batches that are sorted by bucket together: more give less padding, fewer a
        finer mixture. At most an epoch.

    Raises:
      ValueError: an argument that allows no schedule; a source without examples.
    """

    def __init__(
        self,
        lengths: Sequence[int | np.ndarray],
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

        # For each source: the indices of the examples that take part, and the bucket of each.
        self._indices, self._buckets = zip(
            *(self._source(s, length) for s, length in enumerate(lengths))
        )
        if weights is None:
            weights = [len(indices) for indices in self._indices]
        if len(weights) != len(lengths):
            raise ValueError(
                f"{len(weights)} weights for {len(lengths)} sources: give one for each"
            )
        weights = [float(w) for w in weights]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"weights must be finite, >= 0 and not all 0, got {weights}")
        exact = [
            Fraction(w) for w in weights
        ]  # with fractions, shares stay exact in a run of any length
        self._shares = [w / sum(exact) for w in exact]
        self.chunk = min(int(chunk), max(1, sum(map(len, self._indices)) // self.batch_size))
        self._recent = {}  # the last two chunks: a cache only, never state

    def _source(self, s: int, length: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices, buckets) of the examples of source s that take part."""
        if np.ndim(length) == 0:
            length = np.full(int(length), self.num_buckets - 1)
        length = np.asarray(length)
        if length.ndim != 1 or (length.size and length.dtype.kind not in "iu"):
            raise ValueError(
                f"lengths[{s}] must be a number of examples or an int array [examples], "
                f"got {length.dtype} {length.shape}"
            )
        for index in np.flatnonzero((length < -1) | (length >= self.num_buckets))[:1]:
            raise ValueError(
                f"lengths[{s}][{index}] is bucket index {length[index]}, but there are "
                f"{self.num_buckets} buckets: use 0..{self.num_buckets - 1}, or -1 (left out)"
            )
        indices = np.flatnonzero(length >= 0)
        if not indices.size:
            raise ValueError(
                f"source {s} has no example to use ({length.size} examples, all left out): "
                "raise the largest bucket, or take the source out"
            )
        return indices, length[indices]

    def __call__(self, step: int, attempt: int = 0) -> tuple[int, list[tuple[int, int]]]:
        """The global batch of a step.

        Args:
          step: >= 0.
          attempt: 0 is the batch of the schedule. 1, 2, ... are further batches for the same step,
            in the same bucket and mixture, of examples that the scheduled batch does not hold (as
            far as there are others): for steps whose first batch gave nothing to learn from. They
            do not count as visits.

        Returns:
          The bucket index, and batch_size pairs (source, index). Host p of n takes `pairs[p::n]`.
        """
        if step < 0 or attempt < 0:
            raise ValueError(f"step and attempt must be >= 0, got {step} and {attempt}")
        step, attempt = int(step), int(attempt)
        number, place = divmod(step, self.chunk)
        recent = (
            self._recent
        )  # threads may race here: each replaces the dict by an equally valid one
        if number not in recent:
            recent = dict([*recent.items()][-1:] + [(number, self._make_chunk(number))])
            self._recent = recent
        bucket, pairs = recent[number][place]
        return bucket, self._retry(step, attempt, bucket, pairs) if attempt else list(pairs)

    def _draws(self, n: int) -> list[int]:
        """How many of the first n draws each source gets.

        Draw k of source s has its turn at (k + 1/2) / share[s]. The draws of all sources, ordered
        by turn and then by source, are a stream, and this counts the first n of it. With shares 2/3
        and 1/3, for example, the turns are .75 2.25 3.75 5.25 and 1.5 4.5, so the stream is 0 1 0 0
        1 0, and 3 of its first 4 draws are of source 0.
        """
        half = Fraction(1, 2)
        draws = [math.floor(share * n + half) for share in self._shares]  # those with a turn <= n
        some = [s for s, share in enumerate(self._shares) if share]
        while sum(draws) < n:
            draws[min(some, key=lambda s: ((draws[s] + half) / self._shares[s], s))] += 1
        while sum(draws) > n:
            draws[max(some, key=lambda s: ((draws[s] - half) / self._shares[s], s))] -= 1
        return draws

    def _make_chunk(self, number: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """(bucket, pairs) of the batches of a chunk."""
        n = self.chunk * self.batch_size
        sources, indices, buckets, turns = [], [], [], []
        for s, (first, last) in enumerate(
            zip(self._draws(number * n), self._draws((number + 1) * n))
        ):
            if first == last:
                continue
            size, draw = len(self._indices[s]), np.arange(first, last)
            epochs = range(first // size, (last - 1) // size + 1)
            walk = np.concatenate(
                [_shuffled(size, self.seed, _EXAMPLES, s, epoch) for epoch in epochs]
            )
            place = walk[draw - epochs[0] * size]
            sources.append(np.full(len(draw), s))
            indices.append(self._indices[s][place])
            buckets.append(self._buckets[s][place])
            turns.append((draw + 0.5) / float(self._shares[s]))
        source, index, bucket, turn = map(np.concatenate, (sources, indices, buckets, turns))
        batches = np.lexsort((turn, bucket)).reshape(self.chunk, self.batch_size)
        if self.num_buckets > 1:  # with one bucket, the order of turns is the best
            batches = batches[_shuffled(self.chunk, self.seed, _BATCHES, number)]
        # Turns repeat their pattern of sources; without this, a host would always get the same
        # source.
        within = _random_bits(n, self.seed, _WITHIN, number).reshape(batches.shape)
        batches = np.take_along_axis(batches, np.argsort(within, axis=1, kind="stable"), axis=1)
        return [
            (int(bucket[b].max()), list(zip(source[b].tolist(), index[b].tolist())))
            for b in batches
        ]

    def _retry(
        self, step: int, attempt: int, bucket: int, scheduled: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The pairs of a further batch for a step; `scheduled` are those of its first batch."""
        key = (self.seed, _RETRY, step, attempt)
        fitting = [
            indices[buckets <= bucket] for indices, buckets in zip(self._indices, self._buckets)
        ]
        share = np.array(
            [float(w) if len(indices) else 0.0 for w, indices in zip(self._shares, fitting)]
        ).cumsum()
        # Systematic sampling: a random offset, then equal steps through the shares: no source is
        # favoured.
        offset = int(_random_bits(1, *key)[0] >> np.uint64(11)) / 2**53
        edges = np.floor(share / share[-1] * self.batch_size + offset).astype(np.int64)
        batch = []
        for s, take in enumerate(np.diff(edges, prepend=0)):
            if take:
                indices = fitting[s][_shuffled(len(fitting[s]), *key, s)]
                seen = np.isin(indices, [index for source, index in scheduled if source == s])
                indices = np.concatenate([indices[~seen], indices[seen]])
                batch += [(s, int(indices[k % len(indices)])) for k in range(take)]
        return [batch[i] for i in _shuffled(len(batch), *key, len(fitting))]


def _random_bits(n: int, *key: int) -> np.ndarray:
    """uint64 [n], a pure function of the key.

    NumPy keeps raw bits the same from version to version. What it makes of them (permutation,
    choice) may change.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def _shuffled(n: int, *key: int) -> np.ndarray:
    """0 .. n-1 in an order that is a pure function of the key."""
    return np.argsort(_random_bits(n, *key), kind="stable")
