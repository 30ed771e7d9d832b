"""KL(teacher with visual thoughts || student without) at each token of shared completions: paper Eq. 4 and 9.

Beside it what the released script measures. Letters: B batch, N completion tokens.
"""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import context as context_lib
from opsd_jax import distill, divergence, rollout, sharding
from opsd_jax.data.randomness import generator
from opsd_jax.diagnose import runs
from opsd_jax.evaluation import charts, html
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.runtime import files

BOOTSTRAP = 2000  # resamples
COMPLETIONS = ("base", "student", "data", "official")
SPANS = {  # parts of an "official" record that are measured again by themselves
    "answer": "The answer with its eos, by which the released script decides (`answer_span_avg_kl`):",
    "tail": "Shared tail, the last positions whose tokens are the same in both texts:",
}
_COMPLETION_TEXTS = {
    "base": "What the model said without visual thoughts before training.",
    "student": "What the trained student says without visual thoughts.",
    "data": "The rows' own text traces.",
    "official": (
        "What the released script computes, for comparison: **not** Eq. 4. After image and question the teacher reads "
        "thought, visual thought, thought and answer, the student the text-only thought and the answer: each the raw "
        "text of its column in a block of its own, with no tags added. Positions are matched from the end, so most of "
        "them compare different words. Image sizes are the run's own."
    ),
}


def divergences(
    run: runs.Run,
    kind: str,
    *,
    teacher,
    before,
    after=None,
    sampler=None,
    temperature: float = 1.0,
    on_rows=lambda count: None,
) -> list[dict]:
    """KL(teacher with visual thoughts || student without) at each token of each row's completion.

    Args:
      kind: of `COMPLETIONS`. teacher, before, after: parameters; the last two are the students, after may be None.
      sampler: parameters that write the completions of kinds "base" and "student", by the run's own sampling at
        `temperature`; 0 for the most likely token. A sampled eos is a token; where the budget ended a completion
        there is none.
      on_rows: called after each batch with its number of rows.
    Returns:
      A record a row, in order: task, index, pid, labels [n], before [n], after [n] (with `after`), in nats; of kind
      "official" also the lengths of its `SPANS`, which end with the last label.
    """
    records, number = {}, 0
    for source, mine in runs.batches(run):
        arrays = (
            _official_batch(run, source, mine)
            if kind == "official"
            else _batch(run, source, mine, kind, sampler, temperature, number)
        )
        number += 1
        found = {name: values for name, values in arrays.items() if name != "kl"}
        found["index"] = runs.put(run, np.asarray(mine, np.int32))
        for name, student in (("before", before), ("after", after)):
            if student is not None:
                found[name] = arrays["kl"](teacher, student)
        found = sharding.gather_to_host(found)
        for b, n in enumerate(found["index"].tolist()):
            mask = found["mask"][b]
            record = {
                "task": run.tasks[source],
                "index": n,
                "pid": run.rows.sources[source][n].pid,
                "labels": found["labels"][b][mask].tolist(),
            }
            record |= {
                name: found[name][b][mask].astype(float).tolist()
                for name in ("before", "after")
                if name in found
            }
            record |= {name: int(found[name][b]) for name in SPANS if name in found}
            records[source, n] = record
        on_rows(len({*found["index"].tolist()}))
    return [records[key] for key in sorted(records)]


def _batch(run, source, mine, kind, sampler, temperature, number) -> dict:
    """Shared completions after the contexts of training: {labels, mask, kl}."""
    prepared, c_t = run.selection.packed(source, mine, "real")
    batch = runs.put(run, context_lib.Batch(run.packer.student(prepared), c_t))
    if kind == "data":
        tokens, mask = runs.put(run, run.packer.references(prepared))
        ended = True
    else:
        decoding = (
            {"temperature": temperature, "greedy": False} if temperature else {"greedy": True}
        )
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        found = rollout.sample(sampler, batch.student, key, config=runs.sampling(run, **decoding))
        tokens, mask, ended = found.tokens, found.mask, found.stop == rollout.STOP_EOS
    completion = context_lib.completion(
        tokens, mask, bos=run.tokenizer.bos, eos=run.tokenizer.eos, eos_label=ended
    )
    kl = lambda teacher, student: distill.kl_to_student(
        teacher, student, batch, completion, config=run.model
    )
    return {"labels": completion.labels, "mask": completion.mask, "kl": kl}


def official_blocks(packer, row) -> tuple[list, list]:
    """Blocks of a row as the released script (kl_diagnostic.py) shows it to its teacher and to its student.

      teacher  [problem image] [question] [thought 0] [visual thought 0] [thought 1] [answer]
      student  [problem image] [question] [text-only thought] [answer]

    No system prompt, intro or transition. Each text is the raw one of its column, no tags added, in a block
    bos ... eos of its own. Thoughts and answer have `loss`: they are scored from their bos, which predicts the first
    token, to their last token, which predicts eos. Without a text-only thought the student reads the two thoughts,
    joined with a space.
    """
    example = row.example
    block = lambda text, loss=True: context_lib.Text(packer.tokenizer.encode(text), loss)
    ask, answer = [row.problem, context_lib.Text(row.question)], block(example.answer)
    thoughts = example.thoughts[:2]
    first, *rest = map(block, thoughts)
    text_only = block(example.full_text_only_thought or " ".join(thoughts))
    return [*ask, first, *row.visual_thoughts[:1], *rest, answer], [*ask, text_only, answer]


def align_ends(teacher, student):
    """Scored rows of two `context.Supervised` batches paired from the end, as many as the shorter one has.

    Returns (slots of the teacher int32 [B, R], slots of the student, labels of the student, bool [B, R], tail
    int32 [B]: how many of the last pairs have equal labels).
    """
    shape = teacher.rows.shape
    of_teacher, of_student, labels = (np.zeros(shape, np.int32) for _ in range(3))
    mask, tail = np.zeros(shape, bool), np.zeros(shape[0], np.int32)
    for b in range(shape[0]):
        counts = [int(side.mask[b].sum()) for side in (teacher, student)]
        n = min(counts)
        last = lambda side, count, name: getattr(side, name)[b, count - n : count]
        of_teacher[b, :n], of_student[b, :n] = (
            last(teacher, counts[0], "rows"),
            last(student, counts[1], "rows"),
        )
        labels[b, :n], mask[b, :n] = last(student, counts[1], "labels"), True
        differs = np.flatnonzero(last(teacher, counts[0], "labels") != labels[b, :n])
        tail[b] = n - 1 - differs[-1] if len(differs) else n
    return of_teacher, of_student, labels, mask, tail


def _official_batch(run, source, mine) -> dict:
    """As `_batch`, by the released script's pairing, with the lengths of `SPANS`."""
    prepared = [run.rows(source, n) for n in mine]
    slots, patches, targets = run.packer.buckets.trace[-1]
    sides = [
        context_lib.supervise(
            blocks,
            slots=slots,
            patches=patches,
            targets=targets,
            tokenizer=run.tokenizer,
            side=run.packer.side,
            names=[row.example.pid for row in prepared],
        )
        for blocks in zip(*(official_blocks(run.packer, row) for row in prepared))
    ]
    answer = np.asarray(
        [len(run.packer.tokenizer.encode(row.example.answer)) + 1 for row in prepared], np.int32
    )
    of_teacher, of_student, labels, mask, tail, answer = runs.put(
        run, (*align_ends(*sides), answer)
    )
    contexts = runs.put(run, [side.context for side in sides])
    kl = lambda teacher, student: paired_kl(
        teacher, student, *contexts, of_teacher, of_student, config=run.model
    )
    return {"labels": labels, "mask": mask, "tail": tail, "answer": answer, "kl": kl}


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames="config")
def paired_kl(
    teacher,
    student,
    teacher_context,
    student_context,
    teacher_rows,
    student_rows,
    *,
    config: ModelConfig,
):
    """Forward KL(teacher || student) between predictions at slots of two contexts, full vocabulary, nats.

    teacher_rows, student_rows: int32 [B, R], slots. Returns float32 [B, R]; mask it.
    """
    exact = divergence.DivergenceConfig(beta=0.0, top_k=0, clip=0.0, chunk=64)

    def states(params, context, rows):
        hidden, _ = bagel.read(params, context, config=config)
        return jnp.take_along_axis(hidden, rows[:, :, None], axis=1)

    values, _, _ = divergence.chunked(
        states(student, student_context, student_rows),
        student["llm"]["head"],
        states(teacher, teacher_context, teacher_rows),
        teacher["llm"]["head"],
        student_rows,
        exact,
        with_ce=False,
    )
    return values


def bootstrap(before, after=None, *, count: int = BOOTSTRAP, seed: int = 0) -> dict:
    """Means over rows and the share of them that training closed, with 95 % intervals.

    Rows are drawn again within their task, `before` and `after` together (percentile intervals).

    Args:
      before, after: for each task an array [n] of nats per token, the same rows in both.
    Returns:
      {"tasks": [one dict a task], "macro": mean of the tasks' means, "samples": mean over all rows}; each dict has n,
      before, before_95, and with `after` after, after_95, closure = 1 - after / before, closure_95. None where
      there is nothing to close.
    """
    rng = generator(seed, "bootstrap")
    before = [np.asarray(x, np.float64) for x in before]
    after = None if after is None else [np.asarray(x, np.float64) for x in after]
    sizes = np.array([len(x) for x in before])
    means = np.zeros((2, len(sizes), count + 1))  # the last one is of the rows themselves
    for task, n in enumerate(sizes):
        for k in range(count + 1):
            chosen = np.arange(n) if k == count else rng.integers(n, size=n)
            means[0, task, k] = before[task][chosen].mean()
            if after is not None:
                means[1, task, k] = after[task][chosen].mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        summary = lambda pre, post, n: {
            "n": int(n),
            **_interval("before", pre),
            **(
                {}
                if after is None
                else {**_interval("after", post), **_interval("closure", 1 - post / pre)}
            ),
        }
        weighted = lambda x: np.average(x, axis=0, weights=sizes)
        return {
            "tasks": [summary(means[0, t], means[1, t], n) for t, n in enumerate(sizes)],
            "macro": summary(*means.mean(axis=1), sizes.sum()),
            "samples": summary(*map(weighted, means), sizes.sum()),
        }


def _interval(name, values) -> dict:
    """{name: the last value, name_95: where 95 % of the others lie}."""
    if not np.all(np.isfinite(values)):
        return {name: None, f"{name}_95": None}
    return {name: float(values[-1]), f"{name}_95": np.percentile(values[:-1], (2.5, 97.5)).tolist()}


def summarise(records, tasks, seed: int) -> dict:
    """The summary of one kind of completion: by task, macro mean of the tasks, mean over rows.

    Each value is a mean over the tokens of a completion, then over rows. `spread`: of the rows before training.
    Of kind "official" the same again over each of `SPANS`, under its name; None where a task has none.
    """

    def over(part):
        values = {
            name: [
                [
                    np.mean(part(r, name))
                    for r in records
                    if r["task"] == task and len(part(r, name))
                ]
                for task in tasks
            ]
            for name in ("before", "after")
            if name in records[0]
        }
        if not all(map(len, values["before"])):  # a task whose texts never end alike
            return None
        found = bootstrap(values["before"], values.get("after"), seed=seed)
        every = np.concatenate(values["before"])
        found["tasks"] = dict(zip(tasks, found["tasks"]))
        found["spread"] = {
            "median": float(np.median(every)),
            "std": float(every.std()),
            "max": float(every.max()),
        }
        return found

    found = over(lambda r, name: r[name])
    found["tokens"] = float(np.mean([len(r["labels"]) for r in records]))
    for span in SPANS:
        if span in records[0]:
            found[span] = over(lambda r, name: r[name][len(r[name]) - r[span] :])
    return found


def measure(
    run: runs.Run,
    folder: str,
    *,
    teacher: str,
    student: str,
    base: str,
    kinds=COMPLETIONS,
    temperature: float = 1.0,
) -> tuple[str, list[str]]:
    """Measures and writes `kl`; teacher, student, base: checkpoints. The base is the student before training."""
    weights = {}
    for path in (teacher, base, student):
        real = os.path.realpath(path)
        weights[path] = next(
            (w for p, w in weights.items() if os.path.realpath(p) == real), None
        ) or runs.load(run, path)
    trained = weights[student] is not weights[base]
    found, summary, done = {}, {}, 0
    with runs.progress(run, run.total * len(kinds), os.path.basename(folder)) as progress:

        def on_rows(count):
            nonlocal done
            done += count
            progress.update(done)

        for kind in kinds:
            sampler = {"base": base, "student": student}.get(kind)
            found[kind] = divergences(
                run,
                kind,
                teacher=weights[teacher],
                before=weights[base],
                temperature=temperature,
                on_rows=on_rows,
                after=weights[student] if trained else None,
                sampler=runs.for_sampling(run, weights[sampler]) if sampler else None,
            )
            summary[kind] = summarise(found[kind], run.tasks, run.seed)
    lines = [
        {"completion": kind, **r, "pieces": _pieces(run, r["labels"])}
        for kind in kinds
        for r in found[kind]
    ]
    files.write(
        os.path.join(folder, "tokens.jsonl"),
        "".join(json.dumps(line) + "\n" for line in lines),
        primary=jax.process_index() == 0,
    )
    facts = {
        **run.facts(),
        "unit": "nats per token",
        "teacher": teacher,
        "base": base,
        "student": student,
        "temperature": temperature,
        "bootstrap": BOOTSTRAP,
    }
    return runs.finish(
        folder, {"analysis": "kl", **facts, "completions": summary}, lambda s: page(run, s, found)
    )


def _pieces(run, ids) -> list[str]:
    return [run.tokenizer.decode([i]) for i in ids]


def page(run: runs.Run, summary: dict, found: dict, most: int = 4) -> tuple[str, list[str]]:
    """(title, HTML parts) of a summary and its records; `most` samples of each task."""
    trained = "after" in next(iter(summary["completions"].values()))["macro"]
    parts = [
        html.paragraph(
            "K = KL(teacher with visual thoughts ‖ student without) on the same completion, full vocabulary, mean over the "
            "tokens of a completion, then over rows (paper Eq. 4). **before**: the student is "
            f"`{summary['base']}`, **after**: `{summary['student']}`; the teacher is `{summary['teacher']}` both times. "
            "Closed = 1 − after / before (Eq. 9)."
        ),
        html.note(
            f"Rows of split {runs.rows_text(summary)}; sampled completions at temperature {summary['temperature']:g} (0: the most "
            f"likely token). Intervals hold 95 %: {summary['bootstrap']} resamples of the rows within their task, before "
            f"and after together, seed {summary['seed']}. Paper, on rows of its own: 4.64 before, 1.93 after, 58 % "
            "closed."
        ),
    ]
    for kind, s in summary["completions"].items():
        parts += [
            html.heading(f"Completions: {kind}"),
            html.paragraph(_COMPLETION_TEXTS[kind]),
            _kl_table(s),
        ]
        for span, text in SPANS.items():
            if s.get(span):
                parts += [html.paragraph(text), _kl_table(s[span])]
        names = ["before", *(["after"] if trained else [])]
        longest = max(len(r["labels"]) for r in found[kind])
        at = lambda name, n: np.mean([r[name][n] for r in found[kind] if len(r[name]) > n])
        parts.append(
            charts.lines(
                {name: [(n + 1, float(at(name, n))) for n in range(longest)] for name in names},
                x="token of the completion",
                y="nats",
            )
        )
        every = np.concatenate([r[name] for r in found[kind] for name in names])
        top = float(np.percentile(every, 95)) or None
        samples = []
        for source, task in enumerate(run.tasks):
            for r in [r for r in found[kind] if r["task"] == task][:most]:
                row = run.rows(source, r["index"])
                pieces = _pieces(run, r["labels"])
                shown = [html.row(*runs.pictures(run, row))]
                for name in names:
                    shown += [
                        html.note(f"{name}: {np.mean(r[name]):.4g} nats per token"),
                        html.tokens(pieces, r[name], unit="nats", top=top),
                    ]
                samples.append(
                    html.Sample(
                        title=f"{task} {r['pid']}",
                        parts=[html.paragraph(row.example.question), *shown],
                    )
                )
        parts.append(html.samples(samples))
    return "Divergence that visual thoughts make", parts


def _kl_table(s):
    interval = lambda values, scale=1: (
        "–" if values is None else f"{scale * values[0]:.4g} to {scale * values[1]:.4g}"
    )
    rows = []
    for name, x in {
        **s["tasks"],
        "mean of the tasks": s["macro"],
        "mean of the rows": s["samples"],
    }.items():
        closed = x.get("closure")
        rows.append(
            [
                name,
                x["n"],
                x["before"],
                interval(x["before_95"]),
                x.get("after"),
                interval(x.get("after_95")),
                None if closed is None else 100 * closed,
                interval(x.get("closure_95"), 100),
            ]
        )
    spread = s["spread"]
    return html.stack(
        html.table(["task", "rows", "before", "95 %", "after", "95 %", "closed %", "95 %"], rows),
        html.note(
            f"Rows before training: median {spread['median']:.4g}, standard deviation {spread['std']:.4g}, "
            f"largest {spread['max']:.4g}."
        ),
    )
