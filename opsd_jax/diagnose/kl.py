"""KL(teacher with visual thoughts || student without) per token of shared completions (Eq. 4, 9).

It also measures what the released script measures (see `official`). Letters: B batch, N completion
tokens.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from opsd_jax import context as context_lib
from opsd_jax import distill, rollout, sharding
from opsd_jax.diagnose import bootstrap as bootstrap_lib
from opsd_jax.diagnose import kl_page, official, output
from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.run import cautions as cautions_lib

COMPLETIONS = tuple(kl_page.COMPLETION_TEXTS)


def completions(config: ConfigDict) -> tuple[str, ...]:
    """The kinds of completions that a run can be measured on; "official" is BAGEL's form."""
    return tuple(k for k in COMPLETIONS if k != "official" or config.prompts.form == "bagel")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, on which completions.

    Attributes:
      teacher, student: step folders.
      base: step folder of the student before training.
      kinds: some of `COMPLETIONS`.
      temperature: temperature of sampled completions; 0 takes the most probable token.
    """

    teacher: str
    student: str
    base: str
    kinds: tuple[str, ...] = COMPLETIONS
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Parameters that score one kind of completion.

    Attributes:
      teacher: reads the visual thoughts.
      before, after: the students before and after training; `after` may be None.
      sampler: writes the completions, laid out for the sampler; None for texts of the dataset.
    """

    teacher: dict
    before: dict
    after: dict | None = None
    sampler: dict | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """A batch of completions and how they are scored.

    Attributes:
      labels: int32 [B, N + 1], the tokens that are predicted.
      mask: bool [B, N + 1], False at padding.
      kl: (teacher, student) -> float32 [B, N + 1], nats per token.
      spans: {one of `kl_page.SPANS`: int32 [B], its length}; each ends with the last label.
    """

    labels: jax.Array
    mask: jax.Array
    kl: Callable[[dict, dict], jax.Array]
    spans: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


def measure(diagnosis: Diagnosis, folder: str, comparison: Comparison) -> output.Analysis:
    """Measures the analysis `kl`; writes tokens.jsonl."""
    teacher, base, student = _load(
        diagnosis, (comparison.teacher, comparison.base, comparison.student)
    )
    writers = {"base": base, "student": student}
    after = student if student is not base else None
    name, done = os.path.basename(folder), 0
    found, summaries = {}, {}
    with diagnosis.progress(diagnosis.total * len(comparison.kinds), name) as bar:

        def on_batch(count):
            nonlocal done
            done += count
            bar.update(done)

        for kind in comparison.kinds:
            sampler = diagnosis.session.for_sampling(writers[kind]) if kind in writers else None
            weights = Weights(teacher, base, after, sampler)
            found[kind] = divergences(diagnosis, kind, weights, comparison.temperature, on_batch)
            summaries[kind] = summarise(found[kind], diagnosis.tasks, diagnosis.seed)
    output.write_lines(
        folder,
        "tokens.jsonl",
        [
            {"completion": kind, **record, "pieces": kl_page.pieces(diagnosis, record["labels"])}
            for kind, records in found.items()
            for record in records
        ],
    )
    summary = {
        "analysis": "kl",
        **diagnosis.facts(),
        "unit": "nats per token",
        "teacher": comparison.teacher,
        "base": comparison.base,
        "student": comparison.student,
        "temperature": comparison.temperature,
        "bootstrap": bootstrap_lib.RESAMPLES,
        "completions": summaries,
    }
    words = diagnosis.words
    return output.Analysis(
        title=f"Closure: how much {words.content} {words.verb('change', 'changes')} what the model "
        "says",
        summary=summary,
        parts=lambda: kl_page.parts(diagnosis, summary, found),
        words=kl_page.in_words(summary, cautions_lib.closures_of(diagnosis.session.workdir)),
    )


def _load(diagnosis: Diagnosis, checkpoints: Sequence[str]) -> list[dict]:
    """The weights in each of the checkpoints; equal checkpoints share them."""
    weights: dict[str, dict] = {}
    for path in checkpoints:
        if (real := os.path.realpath(path)) not in weights:
            weights[real] = diagnosis.session.restore_params(path)
    return [weights[os.path.realpath(path)] for path in checkpoints]


def divergences(
    diagnosis: Diagnosis,
    kind: str,
    weights: Weights,
    temperature: float = 1.0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[dict]:
    """KL(teacher with visual thoughts || student without) at each token of each completion.

    Args:
      kind: one of `COMPLETIONS`. Those of kind "base" and "student" are sampled as the run does.
      weights: those that score and sample.
      temperature: temperature of sampling; 0 takes the most probable token. A sampled eos is a
        token; a completion that the budget ended has none.
      on_batch: called after each batch with its number of examples.

    Returns:
      A record per example, in order: task, index, pid, labels [n], before [n], after [n] (with
      `weights.after`), in nats; of kind "official" also the lengths of its spans.
    """
    records = {}
    for number, (source, mine) in enumerate(diagnosis.batches()):
        if kind == "official":
            scored = _official_batch(diagnosis, source, mine)
        else:
            key = jax.random.fold_in(jax.random.key(diagnosis.seed), number)
            scored = _batch(diagnosis, source, mine, kind, weights.sampler, temperature, key)
        found = {
            "index": diagnosis.selection.put(np.asarray(mine, np.int32)),
            "labels": scored.labels,
            "mask": scored.mask,
            **scored.spans,
            "before": scored.kl(weights.teacher, weights.before),
        }
        if weights.after is not None:
            found["after"] = scored.kl(weights.teacher, weights.after)
        found = sharding.gather_to_host(found)
        for b, n in enumerate(found["index"].tolist()):
            records[source, n] = _record(diagnosis, source, b, found)
        on_batch(len({*found["index"].tolist()}))
    return [records[key] for key in sorted(records)]


def _record(diagnosis: Diagnosis, source: int, b: int, found: dict[str, np.ndarray]) -> dict:
    """The record of sequence `b` of a batch."""
    n, mask = int(found["index"][b]), found["mask"][b]
    return {
        "task": diagnosis.tasks[source],
        "index": n,
        "pid": diagnosis.examples.sources[source][n].pid,
        "labels": found["labels"][b][mask].tolist(),
        **{
            name: found[name][b][mask].astype(float).tolist()
            for name in ("before", "after")
            if name in found
        },
        **{span: int(found[span][b]) for span in kl_page.SPANS if span in found},
    }


def _batch(diagnosis, source, mine, kind, sampler, temperature, key) -> Scored:
    """Shared completions after the contexts of training."""
    selection = diagnosis.selection
    prepared, of_teacher = selection.packed(source, mine, "real")
    batch = selection.put(context_lib.Batch(selection.packer.student(prepared), of_teacher))
    if kind == "data":
        tokens, mask = selection.put(selection.packer.references(prepared))
        ended = True
    else:
        config = diagnosis.sampling(
            **{"temperature": temperature, "greedy": False} if temperature else {}
        )
        found = rollout.sample(sampler, batch.student, key, config=config)
        tokens, mask, ended = found.tokens, found.mask, found.stop == rollout.STOP_EOS
    tokenizer = diagnosis.tokenizer
    completion = context_lib.completion(
        tokens, mask, bos=tokenizer.bos, eos=tokenizer.eos, eos_label=ended
    )

    def kl(teacher, student):
        return distill.kl_to_student(teacher, student, batch, completion, config=diagnosis.model)

    return Scored(completion.labels, completion.mask, kl)


def _official_batch(diagnosis: Diagnosis, source: int, mine: Sequence[int]) -> Scored:
    """The released script's pairing of two texts of an example."""
    packer, tokenizer = diagnosis.selection.packer, diagnosis.tokenizer
    prepared = [diagnosis.examples(source, n) for n in mine]
    sizes = context_lib.Sizes(*packer.buckets.trace[-1])
    teacher, student = (
        context_lib.supervise(
            blocks,
            sizes,
            tokenizer=tokenizer,
            side=packer.side,
            names=[example.example.pid for example in prepared],
        )
        for blocks in zip(*(official.official_blocks(packer, example) for example in prepared))
    )
    pairs = official.align_ends(teacher, student)
    answer = [len(tokenizer.encode(p.example.answer)) + 1 for p in prepared]
    contexts, positions, labels, mask, spans = diagnosis.selection.put(
        (
            (teacher.context, student.context),
            (pairs.teacher, pairs.student),
            pairs.labels,
            pairs.mask,
            {"tail": pairs.tail, "answer": np.asarray(answer, np.int32)},
        )
    )

    def kl(teacher, student):
        return official.paired_kl(teacher, student, *contexts, *positions, config=diagnosis.model)

    return Scored(labels, mask, kl, spans)


def summarise(records: list[dict], tasks: Sequence[str], seed: int) -> dict:
    """The summary of one kind of completion: by task, mean of the tasks, mean of the examples.

    Each value is a mean over the tokens of a completion, then over examples. `spread`
    describes the examples before training. Records of kind "official" have the same for each span,
    under its name; None if a task has none.
    """
    found = _summarise(records, tasks, seed)
    assert found is not None  # whole completions have tokens
    found["tokens"] = float(np.mean([len(record["labels"]) for record in records]))
    for span in kl_page.SPANS:
        if span in records[0]:
            found[span] = _summarise(records, tasks, seed, span)
    return found


def _summarise(records, tasks, seed, span: str = "") -> dict | None:
    """One summary, over whole completions or over a span; None if a task has no such span."""

    def values(name, task):
        parts = [
            record[name][len(record[name]) - record[span] :] if span else record[name]
            for record in records
            if record["task"] == task
        ]
        return [np.mean(part) for part in parts if len(part)]

    before = [values("before", task) for task in tasks]
    if not all(map(len, before)):  # a task whose texts never end alike
        return None
    after = [values("after", task) for task in tasks] if "after" in records[0] else None
    found = bootstrap_lib.bootstrap(before, after, seed=seed)
    every = np.concatenate(before)
    found["tasks"] = dict(zip(tasks, found["tasks"]))
    found["spread"] = {
        "median": float(np.median(every)),
        "std": float(every.std()),
        "max": float(every.max()),
    }
    return found
