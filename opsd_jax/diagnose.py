"""The paper's analyses of a run: `python -m opsd_jax.diagnose all|kl|interventions|attention --workdir=W`.

  kl             how much visual thoughts change what the model says (paper Eq. 4), before and after training, with
                 the gap that training closed (Eq. 9); beside it what the released script measures
  interventions  answers with the visual thoughts in place, replaced by noise or by another row's, taken away, and
                 without the teacher's context at all; the same rows throughout, compared in pairs
  attention      how much texts before and after the visual thoughts attend to pictures, layer by layer
  all            answers in all modes (`eval`), then these three, on one page

  W/diagnose/<name>/summary.json   the numbers
  W/diagnose/<name>/report.html    the same to look at, with samples
  W/diagnose/<name>/tokens.jsonl   (kl) each completion, with the divergence at each token
                    predictions.jsonl   (interventions) each answer
                    shares.npz     (attention) each row's shares

Letters: B batch, N completion tokens, L layers, M and K groups of queries and of keys.
"""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import context as context_lib
from opsd_jax import data, distributed, divergence, metrics, sharding
from opsd_jax import eval as eval_lib
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig

ROWS = 128  # of each task, if the command does not say
BOOTSTRAP = 2000  # resamples

COMPLETIONS = ("base", "student", "data", "official")
MODES = ("none", "real", "noise", "swap", "remove")

QUERIES = ("text before", "text after", "completion")
KEYS = ("system prompt", "problem image", "question", "intro", "visual thoughts", "transition", "text",
        "image delimiters")
# Fig. 3b by its own names: (query, key) in the interleaved layout.
OFFICIAL = {"txt0->img0": (0, 1), "txt1->img1": (1, 4), "txt1->img0": (1, 1)}

_COMPLETION_TEXTS = {
    "base": "What the model said without visual thoughts before training.",
    "student": "What the trained student says without visual thoughts.",
    "data": "The rows' own text traces.",
    "official": (
        "The released script's pairing, for comparison: **not** Eq. 4. One model reads thought, picture, thought and "
        "answer, the other the text trace and the answer; both behind picture and question alone; positions are "
        "matched from the end. Only the tail is the same text (“shared tail”). Picture sizes are the run's own.")}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is diagnosed, and the rows it is diagnosed on. Made by `open_run`.

    model: ModelConfig without what draws. limit: first rows of each task, 0 for all. batch_size: of all processes.
    """

    workdir: str
    config: object
    model: ModelConfig
    mesh: object
    tokenizer: object
    marker: object
    rows: object
    packer: object
    tasks: tuple
    split: str
    limit: int
    batch_size: int
    seed: int

    def size(self, source: int) -> int:
        """Rows of a task that are looked at."""
        size = len(self.rows.sources[source])
        return min(self.limit, size) if self.limit else size

    @property
    def total(self) -> int:
        return sum(self.size(source) for source in range(len(self.tasks)))

    def facts(self) -> dict:
        """What every summary says."""
        return {"split": self.split, "seed": self.seed, "rows": {t: self.size(s) for s, t in enumerate(self.tasks)}}


# --- the run ------------------------------------------------------------------------------------------------------

def open_run(workdir: str, *, split: str = "", benchmarks=(), limit: int = ROWS, batch_size: int = 0,
             seed: int | None = None) -> Run:
    """Opens the run (or arm) in a workdir for its diagnosis.

    split: "" for the one that the run evaluates at its end. batch_size: 0 for the run's config.eval.batch_size; made
    a multiple of what the devices share.
    Raises FileNotFoundError: no run or data. ValueError: unknown tasks, no visual thoughts in the rows.
    """
    from opsd_jax import rollout, settings, tokenizer

    if limit < 0 or batch_size < 0:
        raise ValueError(f"--rows={limit} --batch_size={batch_size}: give positive numbers, or 0 for all rows and for "
                         "the run's batch size")
    config = data.load_config(workdir)
    where, chosen = data.workdir_of(config, workdir), eval_lib.choose_tasks(benchmarks, config.data.tasks)
    limits = dict(zip(config.data.tasks, config.data.limits))
    config.data.tasks, config.data.limits = chosen, tuple(limits[task] for task in chosen if limits)
    split = split or config.eval.final_split or "train"
    tok = tokenizer.load(data.tokenizer_folder(config, where))
    mesh = sharding.make_mesh(tensor=config.mesh.tensor)
    unit = sharding.batch_divisor(mesh)
    marker = rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size)
    run = Run(workdir, config, dataclasses.replace(settings.model(config), generation=None), mesh, tok, marker,
              data.Rows(config, where, tok, split), data.Packer(config, tok), chosen, split, limit, unit,
              config.seed if seed is None else seed)
    for source, task in enumerate(chosen):
        if not any(run.rows.sources[source][n].visual_thoughts for n in range(run.size(source))):
            raise ValueError(f"the first {run.size(source)} rows of {task}, {split}, have no visual thoughts: there is "
                             "nothing to diagnose; choose another --split or --benchmarks")
    wanted = min(batch_size or config.eval.batch_size, max(run.size(s) for s in range(len(chosen))))
    return dataclasses.replace(run, batch_size=-(-wanted // unit) * unit)


def newest(workdir: str) -> str:
    """The newest checkpoint of a run."""
    from opsd_jax import checkpoint

    return os.path.join(workdir, "checkpoints", str(checkpoint.metadata(workdir)["step"]))


def start(workdir: str) -> str:
    """The checkpoint that a run's OPSD (or else SFT) stage started from."""
    from opsd_jax import settings

    config = data.load_config(workdir)
    ends = settings.stage_ends(config)
    stage = next((stage for stage in ("opsd", "sft", "offline") if stage in ends), None)
    if stage is None:
        raise ValueError(f"the run in {workdir} has the stages {', '.join(config.stages)}: there is no training to "
                         "compare before and after; diagnose one with an opsd, sft or offline stage")
    return os.path.join(workdir, "checkpoints", str(ends[stage] - config[stage].steps))


def load(run: Run, checkpoint: str):
    """The weights in a checkpoint, laid out for scoring."""
    from opsd_jax import checkpoint as checkpoint_lib

    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=run.model))
    return checkpoint_lib.restore_params(checkpoint, sharding.abstract(run.mesh, abstract),
                                         partial=run.config.model.generation.on)


def _for_sampling(run, params):
    return sharding.move(run.mesh, params, "rollout")(params)


def _sampling(run, **changes):
    """RolloutConfig of the run's evaluation."""
    from opsd_jax import settings

    c = run.config
    return settings.rollout(c, run.tokenizer, run.marker, slots=c.eval.slots, refill=0,
                            shards=sharding.batch_divisor(run.mesh),
                            max_new_tokens=c.eval.max_new_tokens or c.rollout.max_new_tokens, **changes)


def _batches(run):
    """(source, numbers of the rows that this process packs) of every batch."""
    mine = sharding.local_rows(run.mesh, run.batch_size)
    for source in range(len(run.tasks)):
        for numbers in eval_lib.batches(run.size(source), run.batch_size):
            yield source, [numbers[n] for n in mine]


def _put(run, tree):
    return sharding.put_batch(run.mesh, tree)


def _fetch(tree):
    """Global arrays -> NumPy arrays of the whole batch, on every process."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def _progress(run, total, name):
    return metrics.Progress(total, name, run.split, primary=jax.process_index() == 0)


# --- kl -----------------------------------------------------------------------------------------------------------

def divergences(run: Run, kind: str, *, teacher, before, after=None, sampler=None, temperature: float = 1.0,
                on_rows=lambda count: None) -> list[dict]:
    """KL(teacher with visual thoughts || student without) at each token of each row's completion.

    Args:
      kind: of `COMPLETIONS`. teacher, before, after: parameters; the last two are the students, after may be None.
      sampler: parameters that write the completions of kinds "base" and "student", by the run's own sampling at
        `temperature`; 0 for the most likely token. A sampled eos is a token; where the budget ended a completion
        there is none.
      on_rows: called after each batch with its number of rows.
    Returns:
      A record a row, in order: task, index, pid, labels [n], before [n], after [n] (with `after`), in nats; of kind
      "official" also `tail`, how many of the last labels are the same in both texts.
    """
    records, number = {}, 0
    for source, mine in _batches(run):
        arrays = _official_batch(run, source, mine) if kind == "official" else _batch(
            run, source, mine, kind, sampler, temperature, number)
        number += 1
        found = {"labels": arrays["labels"], "mask": arrays["mask"], "tail": arrays["tail"],
                 "index": _put(run, np.asarray(mine, np.int32))}
        for name, student in (("before", before), ("after", after)):
            if student is not None:
                found[name] = arrays["kl"](teacher, student)
        found = _fetch(found)
        for b, n in enumerate(found["index"].tolist()):
            mask = found["mask"][b]
            record = {"task": run.tasks[source], "index": n, "pid": run.rows.sources[source][n].pid,
                      "labels": found["labels"][b][mask].tolist()}
            record |= {name: found[name][b][mask].astype(float).tolist()
                       for name in ("before", "after") if name in found}
            if kind == "official":
                record["tail"] = int(found["tail"][b])
            records[source, n] = record
        on_rows(len({*found["index"].tolist()}))
    return [records[key] for key in sorted(records)]


def _batch(run, source, mine, kind, sampler, temperature, number) -> dict:
    """Shared completions behind the contexts of training: {labels, mask, tail, kl}."""
    from opsd_jax import distill, rollout

    prepared, c_t = eval_lib.contexts(run.rows, run.packer, source, mine, "real", run.seed)
    batch = _put(run, distill.Batch(run.packer.student(prepared), c_t))
    if kind == "data":
        tokens, mask = _padded([run.packer.reference(row) for row in prepared], run.packer.buckets.trace[-1][2])
        tokens, mask = _put(run, (tokens, mask))
        ended = True
    else:
        decoding = {"temperature": temperature, "greedy": False} if temperature else {"greedy": True}
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        found = rollout.sample(sampler, batch.student, key, config=_sampling(run, **decoding))
        tokens, mask, ended = found.tokens, found.mask, found.stop == rollout.STOP_EOS
    completion = context_lib.completion(tokens, mask, bos=run.tokenizer.bos, eos=run.tokenizer.eos, eos_row=ended)
    kl = lambda teacher, student: distill.kl_to_student(teacher, student, batch, completion, config=run.model)
    return {"labels": completion.labels, "mask": completion.mask, "tail": jnp.sum(completion.mask, axis=1), "kl": kl}


def _padded(ids, width):
    """Lists of ids -> int32 [B, width], bool [B, width]."""
    tokens, mask = np.zeros((len(ids), width), np.int32), np.zeros((len(ids), width), bool)
    for b, row in enumerate(ids):
        tokens[b, :len(row)], mask[b, :len(row)] = row, True
    return tokens, mask


def official_blocks(packer, row) -> tuple[list, list]:
    """Blocks of a row as the released script (kl_diagnostic.py) shows it to its teacher and to its student.

      teacher  [problem image] [question] [thought 0] [visual thought 0] [thought 1, answer]
      student  [problem image] [question] [text-only thought, answer]

    No system prompt, intro or transition. The texts with `loss` are scored.
    """
    tokenizer, example = packer.tokenizer, row.example
    text = lambda *parts: context_lib.Text(tokenizer.encode("".join(parts)), loss=True)
    ask = [row.problem, context_lib.Text(row.question)]
    first, *rest = map(context_lib.wrap_thought, example.thoughts[:2])
    answer = context_lib.wrap_answer(example.answer)
    teacher = [*ask, text(first), *row.visual_thoughts[:1], text(*rest, answer)]
    return teacher, [*ask, context_lib.Text(packer.reference(row), loss=True)]


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
        last = lambda side, count, name: getattr(side, name)[b, count - n:count]
        of_teacher[b, :n], of_student[b, :n] = last(teacher, counts[0], "rows"), last(student, counts[1], "rows")
        labels[b, :n], mask[b, :n] = last(student, counts[1], "labels"), True
        differs = np.flatnonzero(last(teacher, counts[0], "labels") != labels[b, :n])
        tail[b] = n - 1 - differs[-1] if len(differs) else n
    return of_teacher, of_student, labels, mask, tail


def _official_batch(run, source, mine) -> dict:
    """As `_batch`, by the released script's pairing."""
    prepared = [run.rows(source, n) for n in mine]
    slots, patches, targets = run.packer.buckets.trace[-1]
    sides = [context_lib.supervise(blocks, slots=slots, patches=patches, targets=targets, tokenizer=run.tokenizer,
                                   side=run.packer.side, names=[row.example.pid for row in prepared])
             for blocks in zip(*(official_blocks(run.packer, row) for row in prepared))]
    of_teacher, of_student, labels, mask, tail = _put(run, align_ends(*sides))
    contexts = _put(run, [side.context for side in sides])
    kl = lambda teacher, student: paired_kl(teacher, student, *contexts, of_teacher, of_student, config=run.model)
    return {"labels": labels, "mask": mask, "tail": tail, "kl": kl}


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames="config")
def paired_kl(teacher, student, teacher_context, student_context, teacher_rows, student_rows, *, config: ModelConfig):
    """Forward KL(teacher || student) between predictions at slots of two contexts, full vocabulary, nats.

    teacher_rows, student_rows: int32 [B, R], slots. Returns float32 [B, R]; mask it.
    """
    exact = divergence.DivergenceConfig(beta=0.0, top_k=0, clip=0.0, chunk=64)

    def states(params, context, rows):
        hidden, _ = bagel.read(params, context, config=config)
        return jnp.take_along_axis(hidden, rows[:, :, None], axis=1)

    values, _, _ = divergence.chunked(
        states(student, student_context, student_rows), student["llm"]["head"],
        states(teacher, teacher_context, teacher_rows), teacher["llm"]["head"], student_rows, exact, with_ce=False)
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
    from opsd_jax.data import generator

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
            "n": int(n), **_interval("before", pre),
            **({} if after is None else {**_interval("after", post), **_interval("closure", 1 - post / pre)})}
        weighted = lambda x: np.average(x, axis=0, weights=sizes)
        return {"tasks": [summary(means[0, t], means[1, t], n) for t, n in enumerate(sizes)],
                "macro": summary(*means.mean(axis=1), sizes.sum()),
                "samples": summary(*map(weighted, means), sizes.sum())}


def _interval(name, values) -> dict:
    """{name: the last value, name_95: where 95 % of the others lie}."""
    if not np.all(np.isfinite(values)):
        return {name: None, f"{name}_95": None}
    return {name: float(values[-1]), f"{name}_95": np.percentile(values[:-1], (2.5, 97.5)).tolist()}


def summarise_kl(records, tasks, seed: int) -> dict:
    """The summary of one kind of completion: by task, macro mean of the tasks, mean over rows.

    Each value is a mean over the tokens of a completion, then over rows. `spread`: of the rows before training.
    Where texts differ ("official") the same again over the shared tail, under "tail".
    """
    def over(part):
        values = {name: [[np.mean(part(r, name)) for r in records if r["task"] == task and len(part(r, name))]
                         for task in tasks] for name in ("before", "after") if name in records[0]}
        if not all(map(len, values["before"])):  # a task without a shared tail
            return None
        found = bootstrap(values["before"], values.get("after"), seed=seed)
        every = np.concatenate(values["before"])
        found["tasks"] = dict(zip(tasks, found["tasks"]))
        found["spread"] = {"median": float(np.median(every)), "std": float(every.std()), "max": float(every.max())}
        return found

    found = over(lambda r, name: r[name])
    found["tokens"] = float(np.mean([len(r["labels"]) for r in records]))
    if "tail" in records[0]:
        found["tail"] = over(lambda r, name: r[name][len(r[name]) - r["tail"]:])
    return found


def run_kl(run: Run, folder: str, *, teacher: str, student: str, base: str, kinds=COMPLETIONS,
           temperature: float = 1.0) -> tuple[str, list[str]]:
    """Measures and writes `kl`; teacher, student, base: checkpoints. The base is the student before training."""
    weights = {}
    for path in (teacher, base, student):
        real = os.path.realpath(path)
        weights[path] = next((w for p, w in weights.items() if os.path.realpath(p) == real), None) or load(run, path)
    trained = weights[student] is not weights[base]
    found, summary, done = {}, {}, 0
    with _progress(run, run.total * len(kinds), os.path.basename(folder)) as progress:
        def on_rows(count):
            nonlocal done
            done += count
            progress.update(done)

        for kind in kinds:
            sampler = {"base": base, "student": student}.get(kind)
            found[kind] = divergences(
                run, kind, teacher=weights[teacher], before=weights[base], temperature=temperature, on_rows=on_rows,
                after=weights[student] if trained else None,
                sampler=_for_sampling(run, weights[sampler]) if sampler else None)
            summary[kind] = summarise_kl(found[kind], run.tasks, run.seed)
    lines = [{"completion": kind, **r, "pieces": _pieces(run, r["labels"])} for kind in kinds for r in found[kind]]
    _write(os.path.join(folder, "tokens.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    facts = {**run.facts(), "unit": "nats per token", "teacher": teacher, "base": base, "student": student,
             "temperature": temperature, "bootstrap": BOOTSTRAP}
    return _finish(folder, {"analysis": "kl", **facts, "completions": summary}, lambda s: kl_page(run, s, found))


def _pieces(run, ids) -> list[str]:
    return [run.tokenizer.decode([i]) for i in ids]


def kl_page(run: Run, summary: dict, found: dict, most: int = 4) -> tuple[str, list[str]]:
    """(title, HTML parts) of a summary and its records; `most` samples of each task."""
    from opsd_jax import report

    trained = "after" in next(iter(summary["completions"].values()))["macro"]
    parts = [report.paragraph(
        "K = KL(teacher with visual thoughts ‖ student without) on the same completion, full vocabulary, mean over the "
        "tokens of a completion, then over rows (paper Eq. 4). **before**: the student is "
        f"`{summary['base']}`, **after**: `{summary['student']}`; the teacher is `{summary['teacher']}` both times. "
        "Closed = 1 − after / before (Eq. 9)."), report.note(
        f"Rows of split {summary['split']}; sampled completions at temperature {summary['temperature']:g} (0: the most "
        f"likely token). Intervals hold 95 %: {summary['bootstrap']} resamples of the rows within their task, before "
        f"and after together, seed {summary['seed']}. Paper, on rows of its own: 4.64 before, 1.93 after, 58 % "
        "closed.")]
    for kind, s in summary["completions"].items():
        parts += [report.heading(f"Completions: {kind}"), report.paragraph(_COMPLETION_TEXTS[kind]), _kl_table(s)]
        if s.get("tail"):
            parts += [report.paragraph("Shared tail:"), _kl_table(s["tail"])]
        names = ["before", *(["after"] if trained else [])]
        longest = max(len(r["labels"]) for r in found[kind])
        at = lambda name, n: np.mean([r[name][n] for r in found[kind] if len(r[name]) > n])
        parts.append(report.lines({name: [(n + 1, float(at(name, n))) for n in range(longest)] for name in names},
                                  x="token of the completion", y="nats"))
        every = np.concatenate([r[name] for r in found[kind] for name in names])
        top = float(np.percentile(every, 95)) or None
        samples = []
        for source, task in enumerate(run.tasks):
            for r in [r for r in found[kind] if r["task"] == task][:most]:
                row = run.rows(source, r["index"])
                pieces = _pieces(run, r["labels"])
                shown = [report.row(*_pictures(run, row))]
                for name in names:
                    shown += [report.note(f"{name}: {np.mean(r[name]):.4g} nats per token"),
                              report.tokens(pieces, r[name], unit="nats", top=top)]
                samples.append({"title": f"{task} {r['pid']}",
                                "parts": [report.paragraph(row.example.question), *shown]})
        parts.append(report.samples(samples))
    return "Divergence that visual thoughts make", parts


def _kl_table(s):
    from opsd_jax import report

    interval = lambda values, scale=1: "–" if values is None else f"{scale * values[0]:.4g} to {scale * values[1]:.4g}"
    rows = []
    for name, x in {**s["tasks"], "mean of the tasks": s["macro"], "mean of the rows": s["samples"]}.items():
        closed = x.get("closure")
        rows.append([name, x["n"], x["before"], interval(x["before_95"]), x.get("after"), interval(x.get("after_95")),
                     None if closed is None else 100 * closed, interval(x.get("closure_95"), 100)])
    spread = s["spread"]
    return report.stack(
        report.table(["task", "rows", "before", "95 %", "after", "95 %", "closed %", "95 %"], rows),
        report.note(f"Rows before training: median {spread['median']:.4g}, standard deviation {spread['std']:.4g}, "
                    f"largest {spread['max']:.4g}."))


# --- interventions ------------------------------------------------------------------------------------------------

def compare(hits, reference) -> dict:
    """Two lists of hits of the same rows: discordant counts and McNemar's exact p-value."""
    gained = sum(a and not b for a, b in zip(hits, reference, strict=True))
    lost = sum(b and not a for a, b in zip(hits, reference, strict=True))
    return {"only_this": gained, "only_reference": lost, "p": metrics.mcnemar(gained, lost)}


def answers(run: Run, params, modes, name: str) -> dict:
    """Greedy answers in each of the modes: {mode: {task: [prediction]}}, predictions as in `eval.Result`."""
    params, found = _for_sampling(run, params), {}
    with _progress(run, run.total * len(modes), name) as progress:
        for k, mode in enumerate(modes):
            results = eval_lib.evaluate(
                params, run.rows, run.packer, config=_sampling(run), task_names=run.tasks, mode=mode,
                batch_size=run.batch_size, limit=run.limit, seed=run.seed, mesh=run.mesh,
                on_batch=lambda done, hits: progress.update(k * run.total + done, mode=mode, accuracy=hits / done))
            found[mode] = {r.name: r.predictions for r in results}
    return found


def summarise_interventions(found: dict, tasks) -> dict:
    """{task, or "all": {mode: accuracy, interval_95, n, and against "real" and "none" what `compare` finds}}."""
    summary = {}
    for task in (*tasks, "all"):
        hits = {mode: [bool(p["hit"]) for t in (tasks if task == "all" else (task,)) for p in by_task[t]]
                for mode, by_task in found.items()}
        summary[task] = {}
        for mode, own in hits.items():
            summary[task][mode] = {
                "accuracy": sum(own) / len(own), "interval_95": list(metrics.wilson(sum(own), len(own))), "n": len(own),
                **{f"against_{other}": compare(own, hits[other]) for other in ("real", "none") if other != mode}}
    return summary


def run_interventions(run: Run, folder: str, *, checkpoint: str) -> tuple[str, list[str]]:
    """Measures and writes `interventions`."""
    params = load(run, checkpoint)
    found = answers(run, params, MODES, os.path.basename(folder))
    attention = {}
    for mode in MODES:
        layout = "student" if mode == "none" else "teacher"
        shares = shares_by_row(run, params, layout, mode, found[mode])
        attention[mode] = _named(_mean_over_rows(shares).mean(axis=0))["completion"]
    _write(os.path.join(folder, "predictions.jsonl"), "".join(
        json.dumps({"mode": mode, "task": task, **p}) + "\n"
        for mode, by_task in found.items() for task, predictions in by_task.items() for p in predictions))
    summary = {"analysis": "interventions", "checkpoint": checkpoint, **run.facts(),
               "tasks": summarise_interventions(found, run.tasks), "attention_of_the_answers": attention}
    return _finish(folder, summary, lambda s: interventions_page(run, s, found))


def interventions_page(run: Run, summary: dict, found: dict, most: int = 12) -> tuple[str, list[str]]:
    """(title, HTML parts) of a summary and its answers; `most` samples of each task."""
    from opsd_jax import report

    parts = [report.paragraph(
        f"Checkpoint `{summary['checkpoint']}`, split {summary['split']}, greedy answers to the same rows. **none**: "
        "the student's context, picture and question; the others are the teacher's: **real** with the row's own visual "
        "thoughts, **noise** and **swap** (another row's) in their places, **remove** with its texts and no picture."),
        report.note("Bars: 95 % intervals by Wilson. p: McNemar's exact test on the rows that one mode answers right "
                    "and the other does not. Paper, ThinkMorph on nine benchmarks: noise −1.5 points, text only −1.0.")]
    for task, modes in summary["tasks"].items():
        if task == "all" and len(run.tasks) == 1:
            continue
        parts += [report.heading("All tasks" if task == "all" else task), report.intervals(
            [(m, 100 * s["accuracy"], *(100 * x for x in s["interval_95"])) for m, s in modes.items()])]
        rows = []
        for mode, s in modes.items():
            for other in ("real", "none"):
                if (c := s.get(f"against_{other}")):
                    rows.append([f"{mode} against {other}", s["n"], 100 * (s["accuracy"] - modes[other]["accuracy"]),
                                 c["only_this"], c["only_reference"], f"{c['p']:.2g}"])
        parts.append(report.table(
            ["", "rows", "difference, points", "only the first right", "only the second right", "p"], rows))
    shares = summary["attention_of_the_answers"]
    parts += [report.heading("Where the answers look"), report.note(
        "Share of attention in per cent, mean over heads, layers and tokens of each mode's own answers."),
        report.heat(list(shares), list(KEYS), [[100 * shares[m][k] for k in KEYS] for m in shares])]
    for source, task in enumerate(run.tasks):
        items = []
        for k, p in enumerate(found["real"][task][:most]):
            row = run.rows(source, p["index"])
            texts = [[mode, "right" if by_task[task][k]["hit"] else "wrong", by_task[task][k]["prediction"]]
                     for mode, by_task in found.items()]
            items.append({"title": p["pid"], "hit": bool(p["hit"]), "parts": [
                report.row(*_pictures(run, row)), report.paragraph(row.example.question),
                report.table(["visual thoughts", "answer is", "answer"], texts, align=["left"] * 3)],
                "note": f"expected {p['expected']}; hit or miss is that of `real`"})
        parts += [report.heading(f"{task}: samples"), report.samples(items)]
    return "Interventions", parts


# --- attention ----------------------------------------------------------------------------------------------------

def groups(packer, blocks, layout: str):
    """Groups of the slots of a row, from 1, 0 for none: int32 [slots] as queries (`QUERIES`) and as keys (`KEYS`).

    layout: "student", "teacher" or "interleaved". Text before and after are those parts of the teacher's context that
    can look at a picture; in the interleaved layout only the reasoning that the model itself would write.
    """
    p, queries, keys, pictures = packer.prompts, [], [], 0
    names = ["question", *(name for name in ("intro", "transition") if layout == "teacher" and len(getattr(p, name)))]
    names = [*(["system prompt"] if len(p.system) else []), *names]
    for block in blocks:
        if isinstance(block, context_lib.Image):
            pictures += 1
            name = "problem image" if pictures == 1 else "visual thoughts"
            edge = KEYS.index("image delimiters") + 1
            keys += [edge, *[KEYS.index(name) + 1] * (block.slots - 2), edge]
            queries += [0] * block.slots
            continue
        name = names.pop(0) if names else "text"
        late = pictures > 1 or name == "transition"
        counted = name == "text" if layout == "interleaved" else name != "system prompt"
        keys += [KEYS.index(name) + 1] * block.slots
        queries += [(QUERIES.index("text after" if late else "text before") + 1) * counted] * block.slots
    return np.array(queries, np.int32), np.array(keys, np.int32)


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config", "scaled"))
def attention_shares(params, context, tokens, queries, keys, *, config: ModelConfig, scaled: bool = True):
    """Share of their attention that groups of slots of a context, with completion tokens [B, N + 1] behind it, pay to
    groups: float32 [B, L, M, K], mean over heads and over the slots of a group; NaN for a group without slots.

    queries, keys: int32 [B, slots + N + 1], see `groups`. scaled: see `bagel.attention_shares`.
    """
    x = jnp.concatenate([bagel.embed(params, context, config=config),
                         bagel.embed_tokens(params, tokens, config=config)], axis=1)
    after = context_lib.behind(context, tokens.shape[1])
    vectors = [jnp.concatenate(pair, axis=1)
               for pair in zip((context.positions, context.limit, context.segment), after)]
    sums = bagel.attention_shares(params, x, *vectors, queries, keys, num_queries=len(QUERIES), num_keys=len(KEYS),
                                  config=config, scaled=scaled)
    counts = jnp.sum(jax.nn.one_hot(queries - 1, len(QUERIES)), axis=1)
    return jnp.moveaxis(sums, 0, 1) / counts[:, None, :, None]


def shares_by_row(run: Run, params, layout: str, mode: str, predictions=None, scaled: bool = True) -> dict:
    """`attention_shares` of every row: {task: float32 [rows, L, M, K]}.

    layout: "interleaved" has no completion; the others have the answers in `predictions` (see `answers`) behind them,
    tokenised again. mode: what stands in the places of the visual thoughts; of the student's layout, "none".
    """
    config = dataclasses.replace(run.model, query_block=run.model.query_block or 512)
    ids, width = {}, 0
    if predictions is not None:
        ids = {(source, p["index"]): run.tokenizer.encode(p["prediction"])
               for source, task in enumerate(run.tasks) for p in predictions[task]}
        width = 1 + max(_sampling(run).max_new_tokens - 1, *map(len, ids.values()))
    found = {task: {} for task in run.tasks}
    for source, mine in _batches(run):
        prepared = [run.rows(source, n) for n in mine]
        # behind the teacher's context only their sizes matter here, and noise has those of the real ones
        shown = "real" if mode == "noise" and layout != "interleaved" else mode
        seen = [_visual_thoughts(run, source, n, row, shown) for n, row in zip(mine, prepared)]
        if layout == "interleaved":
            blocks = [run.packer.blocks(dataclasses.replace(row, visual_thoughts=tuple(images)), layout)
                      for row, images in zip(prepared, seen)]
            context = run.packer.pack(prepared, "trace", -1, blocks)
        else:  # the very pictures that the answers were given to
            _, context = eval_lib.contexts(run.rows, run.packer, source, mine, mode, run.seed)
            blocks = [run.packer.blocks(row, layout, images) for row, images in zip(prepared, seen)]
        queries, keys = (np.zeros((len(mine), context.slots + width), np.int32) for _ in range(2))
        tokens = np.zeros((len(mine), width), np.int32)
        for b, (n, own) in enumerate(zip(mine, blocks)):
            of_context = groups(run.packer, own, layout)
            queries[b, :len(of_context[0])], keys[b, :len(of_context[1])] = of_context
            if width:
                text = [run.tokenizer.bos, *ids[source, n]]
                tokens[b, :len(text)] = text
                queries[b, context.slots:context.slots + len(text)] = QUERIES.index("completion") + 1
                keys[b, context.slots:] = KEYS.index("text") + 1
        context, tokens, queries, keys, index = _put(
            run, (context, tokens, queries, keys, np.asarray(mine, np.int32)))
        shares = attention_shares(params, context, tokens, queries, keys, config=config, scaled=scaled)
        shares, index = _fetch((shares, index))
        found[run.tasks[source]] |= zip(index.tolist(), shares)
    return {task: np.stack([rows[n] for n in sorted(rows)]) for task, rows in found.items()}


def _visual_thoughts(run, source, number, row, mode) -> list:
    """Pictures in the places of a row's visual thoughts."""
    from opsd_jax.data import generator

    rng = generator(run.seed, "diagnose visual thoughts", source, number)
    other = run.rows.partner(source, number).visual_thoughts if mode == "swap" else ()
    mode = "none" if mode == "remove" else mode
    return context_lib.replace_visual_thoughts(mode, row.problem, row.visual_thoughts, other, rng)


def _mean_over_rows(shares: dict):
    """[L, M, K]: mean over the rows of all tasks that have such queries; NaN where none has."""
    rows = np.concatenate(list(shares.values())).astype(np.float64)
    there = np.isfinite(rows)
    with np.errstate(invalid="ignore"):
        return np.where(there, rows, 0).sum(axis=0) / there.sum(axis=0)


def _named(shares) -> dict:
    """[M, K] or [L, M, K] -> {query: {key: share, or a list over layers}}; queries that no row has are left out."""
    return {query: {key: shares[..., m, k].tolist() for k, key in enumerate(KEYS)}
            for m, query in enumerate(QUERIES) if np.all(np.isfinite(shares[..., m, :]))}


def run_attention(run: Run, folder: str, *, checkpoint: str, official_scale: bool = False) -> tuple[str, list[str]]:
    """Measures and writes `attention`. official_scale: softmax without 1 / sqrt(d), as the official recorder."""
    params, modes = load(run, checkpoint), ("real", "noise", "swap")
    predictions = answers(run, params, modes, os.path.basename(folder))
    kinds = [(layout, mode) for layout in ("interleaved", "teacher") for mode in modes]
    arrays, found = {}, {}
    with _progress(run, len(kinds), os.path.basename(folder)) as progress:
        for done, (layout, mode) in enumerate(kinds):
            rows = shares_by_row(run, params, layout, mode, predictions[mode] if layout == "teacher" else None,
                                 scaled=not official_scale)
            arrays |= {f"{layout}/{mode}/{task}": x for task, x in rows.items()}
            found.setdefault(layout, {})[mode] = _mean_over_rows(rows)
            progress.update(done + 1)
    official = {mode: {name: shares[:, m, k].tolist() for name, (m, k) in OFFICIAL.items()}
                for mode, shares in found["interleaved"].items()}
    _write_arrays(os.path.join(folder, "shares.npz"), arrays)
    summary = {"analysis": "attention", "checkpoint": checkpoint, **run.facts(), "scaled": not official_scale,
               "official": official,
               "official_mean": {m: {k: float(np.mean(v)) for k, v in x.items()} for m, x in official.items()},
               "shares": {layout: {mode: _named(x) for mode, x in modes.items()} for layout, modes in found.items()}}
    return _finish(folder, summary, attention_page)


def attention_page(summary: dict) -> tuple[str, list[str]]:
    """(title, HTML parts) of a summary."""
    from opsd_jax import report

    shares = summary["shares"]
    scale = ("1/√d as the model has it" if summary["scaled"] else
             "**without 1/√d**, as the official recorder has it: sharper than the attention that acts")
    parts = [report.paragraph(
        f"Checkpoint `{summary['checkpoint']}`, split {summary['split']}. Share of the attention of text tokens, mean "
        f"over heads, tokens and rows; softmax with {scale}."), report.note(
        "**interleaved**: the rows' traces, thought – picture – thought. **teacher**: the teacher's context; its texts "
        "before (question, intro) and after (transition) the visual thoughts, and the model's own greedy answer "
        "(completion). Delimiters of pictures count apart. Noise and swap: in the places of the visual thoughts.")]
    line = lambda layout, mode, query, key: [
        (n, 100 * share) for n, share in enumerate(shares[layout][mode][query][key])]
    axes = {"x": "layer", "y": "share of attention, %"}
    before = {f"{layout}: problem image": line(layout, "real", "text before", "problem image")
              for layout in shares if "text before" in shares[layout]["real"]}
    parts += [report.heading("Text before the visual thoughts"), report.lines(before, **axes)]
    for layout, query in (("interleaved", "text after"), ("teacher", "completion"), ("teacher", "text after")):
        series = {f"{mode}: {key}": line(layout, mode, query, key) for mode in shares[layout]
                  if query in shares[layout][mode] for key in ("visual thoughts", "problem image")}
        if series:
            parts += [report.heading(f"After the visual thoughts: {layout}, {query}"), report.lines(series, **axes)]
    parts += [report.heading("As in the paper's Fig. 3b"), report.note(
        "Interleaved layout, mean over layers, per cent. Paper (ThinkMorph, V*, its own recorder): txt0->img0 2.0, "
        "txt1->img1 3.0, txt1->img0 0.4."),
        report.heat(list(summary["official_mean"]), list(OFFICIAL),
                    [[100 * x[name] for name in OFFICIAL] for x in summary["official_mean"].values()])]
    parts.append(report.heading("All groups, per cent"))
    for layout, modes in shares.items():
        for mode, queries in modes.items():
            for query, keys in queries.items():
                values = 100 * np.array([keys[key] for key in KEYS]).T
                parts += [report.heading(f"{layout}, {mode}: {query}", 3), report.heat(
                    [f"layer {n}" for n in range(len(values))], list(KEYS), values)]
    return "Attention", parts


# --- all of it ----------------------------------------------------------------------------------------------------

def run_all(run: Run, folder: str, *, checkpoint: str) -> tuple[str, list[str]]:
    """Answers in every mode that the model and its rows allow (`eval.evaluate_run`), then the three analyses; one page
    for people, and under it what each leaves by itself."""
    modes = ("none", *eval_lib.CONTEXTS, *(eval_lib.DRAWN if run.config.model.generation.on else ()))
    summaries = eval_lib.evaluate_run(
        run.workdir, modes, checkpoint=checkpoint, benchmarks=run.tasks, split=run.split, limit=run.limit,
        batch_size=run.batch_size, seed=run.seed, name="" if _own(run.workdir, checkpoint) else os.path.basename(folder))
    base = start(run.workdir)
    analyses = {
        "kl": lambda to: run_kl(run, to, teacher=base, student=checkpoint, base=base),
        "interventions": lambda to: run_interventions(run, to, checkpoint=checkpoint),
        "attention": lambda to: run_attention(run, to, checkpoint=checkpoint)}
    pages = {name: analyse(os.path.join(folder, name)) for name, analyse in analyses.items()}
    summary = {"analysis": "all", "checkpoint": checkpoint, **run.facts(), "evaluations": list(summaries),
               "analyses": list(analyses)}
    return _finish(folder, summary, lambda s: all_page(run, s, summaries, pages))


def all_page(run: Run, summary: dict, summaries: dict, pages: dict) -> tuple[str, list[str]]:
    """(title, HTML parts): accuracies, tokens and seconds of all modes, then the pages of the analyses."""
    from opsd_jax import report

    parts = [report.paragraph(
        f"Checkpoint `{summary['checkpoint']}`, split {summary['split']}. One model answers the same questions: from the "
        "picture alone (**none**, the student), as the teacher with the rows' own visual thoughts (**real**) or something "
        "else in their places, and, if it can draw, with pictures that it draws itself (**generated**)."),
        report.heading("Answers")]
    for task in run.tasks:
        found = [(s["mode"], s["benchmarks"][task]) for s in summaries.values()]
        parts += [report.heading(task, 3), report.intervals(
            [(mode, eval_lib.percent(b), *(100 * x for x in b["interval_95"])) for mode, b in found])]
        text = dict(found)["none"]["seconds_per_sample"]
        rows = [[mode, eval_lib.percent(b), b["n"], b["mean_output_tokens"], b["seconds_per_sample"],
                 b["seconds_per_sample"] and text and b["seconds_per_sample"] / text, b["timed_samples"],
                 b.get("pictures_per_sample")] for mode, b in found]
        parts += [report.table(["sees", "accuracy %", "rows", "tokens", "s/sample", "times none", "rows timed",
                                "pictures drawn"], rows),
                  report.note("Seconds leave out batches that compiled a program. Paper: drawing takes 14.3 times as long "
                              f"as answering in text. Every answer to leaf through: {run.workdir}/eval/*/report.html")]
    for title, inner in pages.values():
        parts += [report.heading(title, 1), *inner]
    return f"Evaluation and diagnosis of {os.path.basename(os.path.normpath(run.workdir))}", parts


# --- files --------------------------------------------------------------------------------------------------------

def _pictures(run, row) -> list[str]:
    from opsd_jax import images, report

    patch = run.config.model.vit.patch_size
    shown = [("problem", row.problem), *((f"visual thought {n}", vt) for n, vt in enumerate(row.visual_thoughts))]
    return [report.picture(images.unpatchify(image.patches, image.grid, patch), size=160, caption=caption)
            for caption, image in shown]


def _finish(folder, summary, page) -> tuple[str, list[str]]:
    """Writes report.html and, last of all, summary.json, by the first process for all; the parts of the page."""
    from opsd_jax import report

    if jax.process_index():
        return "", []
    title, parts = page(summary)
    report.write(os.path.join(folder, "report.html"), report.page(title, *parts))
    _write(os.path.join(folder, "summary.json"), json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return title, parts


def _write(path, text) -> None:
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)


def _write_arrays(path, arrays) -> None:
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as f:
            np.savez_compressed(f, allow_pickle=False, **arrays)
        os.replace(path + ".tmp", path)


# --- command line -------------------------------------------------------------------------------------------------

def diagnose(args) -> str:
    """Runs the analysis that the parsed arguments ask for; the folder of its results."""
    from opsd_jax import checkpoint as checkpoint_lib

    what, workdir = args.analysis, os.path.normpath(args.workdir)
    config = data.load_config(workdir)  # no run: said first
    given = args.student if what == "kl" else args.checkpoint
    model = given or newest(workdir)
    step = checkpoint_lib.metadata(model)["step"]
    foreign = [x for x in (given, getattr(args, "teacher", "")) if x and not _own(workdir, x)]
    if foreign and not args.name:
        raise ValueError(f"{foreign[0]} is no step of {os.path.realpath(workdir)}/checkpoints: say with --name under which name the results shall "
                         f"stand in {workdir}/diagnose")
    differs = [args.split] if args.split not in ("", config.eval.final_split) else []
    differs += [f"first{args.rows}" if args.rows else "all"] if args.rows != ROWS else []
    differs += args.benchmarks
    differs += [f"seed{args.seed}"] if args.seed not in (None, config.seed) else []
    if what == "kl":
        for kind in args.completions:
            if kind not in COMPLETIONS:
                raise ValueError(f"--completions={kind}: choose from {', '.join(COMPLETIONS)}")
        if args.temperature < 0:
            raise ValueError(f"--temperature={args.temperature:g}: give a positive number, or 0 for the most likely "
                             "token")
        base = start(workdir)
        teacher = args.teacher or base
        differs += args.completions if args.completions != COMPLETIONS else ()
        differs += [f"temperature{args.temperature:g}"] if args.temperature != 1 else []
        if args.teacher:
            differs += [f"teacher{checkpoint_lib.metadata(teacher)['step']:06d}"]
    elif what == "attention":
        differs += ["official-scale"] if args.official_scale else []
    folder = os.path.join(workdir, "diagnose", args.name or "-".join([what, f"{step:06d}", *differs]))
    if args.name and os.path.exists(os.path.join(folder, "summary.json")):
        raise FileExistsError(f"{folder} exists: choose another --name, or delete it")
    run = open_run(workdir, split=args.split, benchmarks=args.benchmarks, limit=args.rows, batch_size=args.batch_size,
                   seed=args.seed)
    if what == "kl":
        run_kl(run, folder, teacher=teacher, student=model, base=base, kinds=args.completions,
               temperature=args.temperature)
    elif what == "interventions":
        run_interventions(run, folder, checkpoint=model)
    elif what == "attention":
        run_attention(run, folder, checkpoint=model, official_scale=args.official_scale)
    else:
        run_all(run, folder, checkpoint=model)
    return folder


def _own(workdir, checkpoint) -> bool:
    """Whether a checkpoint is a step of the run."""
    steps = os.path.realpath(os.path.join(workdir, "checkpoints"))
    return os.path.realpath(os.path.dirname(os.path.normpath(checkpoint))) == steps


def main(argv=None) -> None:
    """`python -m opsd_jax.diagnose`; errors in the arguments end it with one line and code 1."""
    import argparse

    names = lambda text: tuple(text.split(","))
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--workdir", required=True, help="of a run, or of one of its arms: W/arms/NAME")
    common.add_argument("--split", default="", help="of the rows (default: the run's config.eval.final_split)")
    common.add_argument("--rows", type=int, default=ROWS, help=f"first rows of each task, 0 for all (default: {ROWS})")
    common.add_argument("--benchmarks", default=(), type=names, help="tasks or families (default: all of the run)")
    common.add_argument("--batch_size", type=int, default=0, help="(default: the run's config.eval.batch_size)")
    common.add_argument("--seed", type=int, help="of noise, sampling and resampling (default: the run's)")
    common.add_argument("--name", default="", help="of the results in W/diagnose (default: tells what was measured)")
    parser = argparse.ArgumentParser(prog="python -m opsd_jax.diagnose", description="The paper's analyses of a run.")
    analyses = parser.add_subparsers(dest="analysis", required=True)
    kl = analyses.add_parser("kl", parents=[common], help="how much visual thoughts change what the model says")
    kl.add_argument("--teacher", default="", help="a step folder (default: where the run's OPSD stage started)")
    kl.add_argument("--student", default="", help="a step folder (default: the newest of the run)")
    kl.add_argument("--completions", default=COMPLETIONS, type=names,
                    help=f"{', '.join(COMPLETIONS)}; several separated by commas (default: all)")
    kl.add_argument("--temperature", type=float, default=1.0,
                    help="of sampled completions; 0: most likely token (default: 1)")
    for name, text in (("all", "evaluation in all modes and the three analyses, on one page"),
                       ("interventions", "answers with visual thoughts replaced or removed"),
                       ("attention", "attention to pictures, layer by layer")):
        analysis = analyses.add_parser(name, parents=[common], help=text)
        analysis.add_argument("--checkpoint", default="", help="a step folder (default: the newest of the run)")
    analysis.add_argument("--official_scale", action="store_true",
                          help="softmax without 1/sqrt(d), as officially recorded")
    args = parser.parse_args(argv)
    try:
        distributed.initialize()
        folder = diagnose(args)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
