"""An evaluation, from its request to its results in W/eval.

in_contexts   tasks of a run, packed as in training, greedy
interleaved   tasks and public tables, by a protocol, with image generation or without
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.evaluation import benchmark as benchmark_lib
from opsd_jax.evaluation import (
    comparison,
    contexts,
    html,
    inference,
    page,
    store,
    table_scores,
    tables,
    wording,
)
from opsd_jax.evaluation import results as results_lib
from opsd_jax.evaluation.benchmark import Benchmark, Key
from opsd_jax.evaluation.interleaved import InterleavedPredictor, generated_images
from opsd_jax.inputs import calls, checks
from opsd_jax.interleave import Reasoner
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import model as model_lib
from opsd_jax.run import placement
from opsd_jax.run import scores as scores_lib
from opsd_jax.run import session as session_lib
from opsd_jax.run.evaluation_request import Job, Request, check
from opsd_jax.run.session import Session
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import files, run_folder
from opsd_jax.runtime import progress as progress_lib
from opsd_jax.runtime.stopping import BeforeBatch, never_stop
from opsd_jax.tokenizer import Tokenizer

Shown = Callable[[Benchmark, Key], list[tuple[str, Image.Image]]]
"""(benchmark, key) -> (caption, image) of what the report shows of an example."""


def evaluate_run(
    workdir: str | os.PathLike[str],
    visual_thoughts: str | Sequence[str] = "none",
    **options: Any,
) -> dict[str, dict]:
    """Answers the questions of a run's data, as `python -m opsd_jax.eval` does.

    Args:
      workdir: folder of a run or of one of its arms; the results are written there.
      visual_thoughts: one or several modes of `--visual_thoughts`, such as ("none", "real").
      options: further fields of `Request` by name, such as split="validation" or rows=64.
    Returns:
      {name of the results: content of summary.json}. The run's `predictions` has the answers.
    Raises:
      FileNotFoundError: no run, or no checkpoint. ValueError: a wrong option. TypeError: an option
      that there is not, or no path.
    """
    checks.path("workdir", workdir)
    _, _, *further = [field.name for field in dataclasses.fields(Request)]
    for name in options:
        if name not in further:
            known = ("visual_thoughts", *further)
            raise TypeError(f"there is no option {name!r}: {checks.choose_from(name, known)}")
    if "benchmarks" in options:
        options["benchmarks"] = calls.names("benchmarks", options["benchmarks"])
    modes = calls.names("visual_thoughts", visual_thoughts)
    with calls.naming({name: name for name in further}):
        return evaluate(Request(os.fspath(workdir), modes, **options))


def evaluate(request: Request, before_batch: BeforeBatch = never_stop) -> dict[str, dict]:
    """Evaluates a model in each of the modes and writes the results to W/eval.

    Args:
      before_batch: called before each batch, such as `StopRequest.check`. Raises to stop.
    Returns:
      {name of the results: summary}; on other processes than the first the summaries are {}.
    Raises:
      see `request.check`.
    """

    def work():
        job = check(request)
        compared = None
        if request.against:
            compared = comparison.read_results(request.workdir, request.against)
        opened, summaries = None, {}
        for mode in request.visual_thoughts:
            if job.in_contexts(mode):
                opened = opened or open_for_contexts(job)
                summary = in_contexts(job, mode, opened, compared, before_batch)
            else:
                opened = None  # one model at a time in the memory of the devices
                summary = interleaved(job, mode, compared, before_batch)
            summaries[job.names[mode]] = summary
        return summaries

    return checkpoint_lib.retry_if_gone(work, given=request.checkpoint)


# --- in the contexts of training -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A run whose model answers examples in the contexts of training.

    Attributes:
      session: the opened run.
      selection: the examples.
      params: the model's dict, laid out for the sampler.
      facts: see `facts_of`.
    """

    session: Session
    selection: contexts.Selection
    params: dict
    facts: dict


def open_for_contexts(job: Job) -> Opened:
    """Opens the run of a job and reads its weights.

    ValueError where no example of a task has the visual thoughts that a mode shows.
    """
    request = job.request
    assert job.config is not None  # only runs have contexts of training
    config = session_lib.with_dtype(job.config, request.dtype)
    mesh = placement.of_run(config, tensor=request.tensor, batch_size=job.batch_size)
    session = session_lib.open_run(request.workdir, tasks=job.tasks, mesh=mesh, dtype=request.dtype)
    text = dataclasses.replace(session.model, generation=None)
    session = dataclasses.replace(session, model=text)
    selection = select(job, session)
    shown = [mode for mode in request.visual_thoughts if job.in_contexts(mode)]
    contexts.check_visual_thoughts(selection, shown, request.split)
    params = session.restore_params(job.checkpoint, layout="rollout")
    return Opened(session, selection, params, facts_of(params, selection))


def select(job: Job, session: Session) -> contexts.Selection:
    """The examples of a job. session: its run, opened with its tasks."""
    return contexts.Selection(
        examples=session.examples(job.request.split, asked_by="--split"),
        packer=session.packer,
        mesh=session.mesh,
        batch_size=job.batch_size,
        limit=job.request.rows,
        subset_seed=job.subset_seed,
        seed=job.seed,
    )


def in_contexts(
    job: Job,
    mode: str,
    opened: Opened,
    compared: comparison.Compared | None = None,
    before_batch: BeforeBatch = never_stop,
) -> dict:
    """Answers the tasks of a run in the contexts of a mode, packed as in training; the summary."""
    selection, config = opened.selection, opened.session.config
    changes, restricted = {"ban_marker": job.request.ban_marker}, {}
    if job.sampled:
        changes |= {"greedy": False, "temperature": job.sampled["temperature"]}
        restricted = {key: config.rollout[key] for key in ("top_k", "top_p")}
    sampling = opened.session.evaluation_sampling(**changes)
    asked = contexts.benchmarks(selection, (mode,))
    predict = contexts.ContextPredictor(
        opened.params, selection, mode, sampling, job.request.samples, job.seed
    )

    def shown(benchmark, key):
        return selection.shown_images(selection.tasks.index(benchmark.name), key, mode)

    return _answer(
        _Mode(
            job=job,
            mode=mode,
            protocol=f"mini-{'sampled' if job.sampled else 'greedy'}-{job.label(mode)}",
            facts=opened.facts,
            decoding={
                "max_new_tokens": sampling.max_new_tokens,
                "prompts": opened.session.prompts_record,
                "images": config.images.to_dict(),
                **restricted,
            },
            together=True,
        ),
        asked,
        inference.batches(asked, job.batch_size),
        predict,
        shown,
        compared,
        before_batch,
    )


# --- by a protocol -------------------------------------------------------------------------------


def interleaved(
    job: Job,
    mode: str,
    compared: comparison.Compared | None = None,
    before_batch: BeforeBatch = never_stop,
) -> dict:
    """Asks by a protocol, with image generation or without; the summary.

    Each process asks its share of the questions on its own devices.
    """
    asked = _askable_tables(job)  # before minutes of loading
    reasoner = model_lib.load(
        job.checkpoint,
        generation=mode != "none",
        protocol=job.request.protocol,
        dtype=job.request.dtype,
        batch_size=job.batch_size,
        tensor=job.request.tensor,
    )
    if every := job.request.compute_every:
        reasoner = dataclasses.replace(reasoner, flow={**reasoner.flow, "compute_every": every})
    facts: dict = model_facts(reasoner.params, reasoner.tokenizer)
    if job.tasks:
        selection = _select_for(job, reasoner)
        facts["data"] = _data_facts(selection)
        asked += [
            benchmark_lib.of_examples(
                selection.examples, source, limit=job.request.rows, seed=job.subset_seed
            )
            for source in range(len(job.tasks))
        ]
    for benchmark in asked:
        _check_scorable(benchmark)
    assert reasoner.mesh is not None  # batches were announced
    shards = sharding.batch_divisor(reasoner.mesh)
    batch_size = -(-job.batch_size // shards) * shards
    folder, protocol = job.folder(mode), job.request.protocol
    predict = InterleavedPredictor(
        reasoner,
        mode,
        batch_size,
        job.seed,
        folder,
        swap_from=_generated_folder(job, mode, facts) if mode == "generated-swap" else "",
        in_rounds=protocol == "harness" and mode != "none",
    )

    def shown(benchmark, key):
        images = [(f"image {n + 1}", image) for n, image in enumerate(benchmark.question(key)[0])]
        replace = predict.intervention(benchmark.name, [key])
        for n, image in enumerate(generated_images(folder, benchmark.name, key)):
            if replace is None:
                images.append((f"generated {n + 1}", image))
                continue
            images.append((f"generated {n + 1}, not seen by the model", image))
            if (seen := replace(0, n, np.asarray(image))) is not None:
                what = mode.removeprefix("generated-")
                images.append((f"seen instead ({what})", Image.fromarray(seen)))
        return images

    return _answer(
        _Mode(
            job=job,
            mode=mode,
            protocol=f"{protocol or 'run'}-{mode}",
            facts=facts,
            decoding={**_protocol_facts(reasoner, mode), "drawing": reasoner.flow},
            together=False,
        ),
        asked,
        inference.batches(asked, batch_size),
        predict,
        shown,
        compared,
        before_batch,
    )


def _protocol_facts(reasoner: Reasoner, mode: str) -> dict:
    """The protocol as a dict.

    Image skips are left out where there are none, as in answers that an older version began.
    """
    facts = dataclasses.asdict(reasoner.protocol)
    skips = facts.pop("max_image_skips")
    return {**facts, "max_image_skips": skips} if skips and mode == "none" else facts


def _select_for(job: Job, reasoner: Reasoner) -> contexts.Selection:
    """The examples of a job's run, with the tokenizer of the model, which may be of another run."""
    session = session_lib.open_run(job.request.workdir, tasks=job.tasks, mesh=reasoner.mesh)
    return select(job, dataclasses.replace(session, tokenizer=reasoner.tokenizer))


def _askable_tables(job: Job) -> list[Benchmark]:
    """The public tables without the questions that cannot be asked or scored.

    ValueError lists these rows, unless the request says to skip them.
    """
    cache = "jpeg75" if job.request.protocol == "harness" else "lossless"
    limit, seed = job.request.rows, job.subset_seed
    if job.config is None:
        in_chat = model_lib.is_in_chat(job.checkpoint)
    else:
        in_chat = job.config.prompts.form == "chat"
    asked = [
        benchmark_lib.of_table(table, cache=cache, limit=limit, seed=seed, in_chat=in_chat)
        for table in job.tables
    ]
    broken = {benchmark.name: benchmark_lib.broken(benchmark) for benchmark in asked}
    broken = {name: rows for name, rows in broken.items() if rows}
    if broken and job.request.on_bad_row == "fail":
        first = next(iter(next(iter(broken.values())).values()))
        where = "; ".join(f"{name}: {', '.join(map(str, rows))}" for name, rows in broken.items())
        raise ValueError(
            f"{sum(map(len, broken.values()))} rows cannot be shown, or no answer can match them, "
            f"the first: {first}. Correct them, or leave them out with --on_bad_row=skip; {where}"
        )
    return [benchmark.without(broken.get(benchmark.name, ())) for benchmark in asked]


def _check_scorable(benchmark: Benchmark) -> None:
    """ValueError if the questions give no score, before anything is asked."""
    try:
        benchmark.judge(dict.fromkeys(benchmark.keys, ""))
    except ValueError as error:
        count = len(benchmark.keys)
        raise ValueError(
            f"{benchmark.name}: {count} of {count + len(benchmark.left_out)} rows can be asked, "
            f"and they give no score ({error}): correct the rows that cannot be shown, or ask "
            "more of them"
        ) from error


def _generated_folder(job: Job, mode: str, facts: dict) -> str:
    """Folder of the results in mode "generated" that go with those of `mode`.

    ValueError where other weights made them.
    """
    folder = run_folder.evaluation(job.request.workdir, job.names[mode].replace(mode, "generated"))
    kept = store.identity_of(folder) if store.is_begun(folder) else facts
    if any(kept.get(key) != facts[key] for key in ("weights", "generation_weights")):
        raise ValueError(
            f"{folder} holds images that other weights generated than those in {job.checkpoint}: "
            "delete it, and evaluate --visual_thoughts=generated again"
        )
    return folder


# --- both ----------------------------------------------------------------------------------------


def model_facts(params: dict, tokenizer: Tokenizer) -> dict[str, str]:
    """Fingerprints that tell a model from another one under the same path.

    Weights that only generate images have a fingerprint of their own, so that results with and
    without image generation have the other fingerprint in common.
    """
    understanding = params_lib.understanding(params)
    text = params_lib.flatten(understanding)
    rest = {path: leaf for path, leaf in params_lib.flatten(params).items() if path not in text}
    facts = {"weights": params_lib.fingerprint(understanding), "tokenizer": tokenizer.digest}
    if tokenizer.chat:
        facts["chat_template"] = tokenizer.chat.digest
    if rest:
        facts["generation_weights"] = params_lib.fingerprint(params_lib.unflatten(rest))
    return facts


def facts_of(params: dict, selection: contexts.Selection) -> dict:
    """Fingerprints of a run's model and of its examples. params: laid out for the sampler."""
    tokenizer = selection.packer.tokenizer
    facts = model_facts(params_lib.understanding(params), tokenizer)
    return {**facts, "data": _data_facts(selection)}


def _data_facts(selection: contexts.Selection) -> dict[str, str]:
    return dict(zip(selection.tasks, selection.examples.digests, strict=True))


@dataclasses.dataclass(frozen=True)
class _Mode:
    """What is written of one mode of a job.

    Attributes:
      job, mode: which one.
      protocol: in the summary.
      facts: fingerprints of the weights, the tokenizer and the examples.
      decoding: prompts and decoding, for the identity of the answers.
      together: whether all processes answer each batch together, greedily, or each a share of the
        batches.
    """

    job: Job
    mode: str
    protocol: str
    facts: dict
    decoding: dict
    together: bool

    def identity(self, batches: list[inference.Batch]) -> dict:
        """What must be the same to continue answers: see `store.Store`.

        The checkpoint's path is not part of it: the weights tell, wherever they are stored.
        """
        job = self.job
        about = {key: value for key, value in job.about.items() if key != "checkpoint"}
        return {
            **about,
            **self.facts,
            "prompt or decoding": self.decoding,
            "mode": self.mode,
            "protocol": self.protocol,
            "batch_size": job.batch_size,
            "ban_marker": job.request.ban_marker,
            "tables": {table.name: table.md5 for table in job.tables},
            "images": {table.name: tables.digest_of_files(table) for table in job.tables},
            "rows": [[benchmark.name, list(keys)] for benchmark, keys in batches],
        }


def _answer(
    asked_in: _Mode,
    asked: list[Benchmark],
    batches: list[inference.Batch],
    predict: inference.Predict,
    shown: Shown,
    compared: comparison.Compared | None,
    before_batch: BeforeBatch,
) -> dict:
    """Answers, scores and writes; the summary, {} on other processes than the first."""
    job, folder = asked_in.job, asked_in.job.folder(asked_in.mode)
    name, together = job.names[asked_in.mode], asked_in.together
    if compared:
        comparison.check_pairs(compared, asked, job.about["split"])
    by_name = {benchmark.name: benchmark for benchmark in asked}
    identity = asked_in.identity(batches)
    answered = store.finished(folder, identity)
    if together and answered:
        # Greedy answers do not depend on their batches.
        identity, batches = answered, [(by_name[name], keys) for name, keys in answered["rows"]]
    kept = store.Store(folder, identity, together)
    total = sum(len(batches[number][1]) for number in inference.share(batches, together))
    split, primary = job.request.split if job.tasks else "", jax.process_index() == 0
    with progress_lib.Progress(total, name, split, primary=primary) as bar:
        records = inference.answer(
            batches,
            predict,
            store=kept,
            on_batch=lambda done: bar.update(done.done, **done.shown),
            before_batch=before_batch,
        )
    if records is None or not primary:
        return {}
    processes = 1 if together else jax.process_count()
    results = results_lib.collect(asked, batches, records, processes=processes)
    for benchmark, result in zip(asked, results):
        if benchmark.table:
            _export(folder, benchmark.table, result)
    about = {**job.about, **asked_in.facts, "command": job.request.command}
    if compared:
        about["against"] = comparison.outcome(compared, results, by_name)
    elif answered:  # and only scored again, for an analysis say: the page keeps what made it
        earlier = _earlier_summary(folder, asked_in.facts)
        about |= {key: earlier[key] for key in ("command", "against") if key in earlier}
    summary = results_lib.write(
        folder,
        results,
        protocol=asked_in.protocol,
        mode=asked_in.mode,
        ban_marker=job.request.ban_marker,
        **about,
    )
    words = scores_lib.words_of(job.config) if job.config else wording.OF_VISUAL_THOUGHTS
    document = page.page(name, summary, results, by_name, shown, _cautions(job), words)
    files.write(os.path.join(folder, run_folder.PAGE), document)
    return summary


def _cautions(job: Job) -> list[str]:
    """HTML of the cautions of the run whose weights answer; [] for weights of another model."""
    workdir = job.request.workdir
    if job.config is None or not checkpoint_lib.is_of_run(job.checkpoint, workdir):
        return []
    return [html.cautions(cautions_lib.of_run(workdir), cautions_lib.OF_THE_RUN)]


def _earlier_summary(folder: str, facts: dict) -> dict:
    """The summary in a folder of results; {} if there is none of the same model and examples.

    facts: fingerprints of both.
    """
    path = os.path.join(folder, run_folder.SUMMARY)
    if not os.path.exists(path):
        return {}
    earlier = results_lib.read_summary(path)
    return earlier if all(earlier.get(key) == value for key, value in facts.items()) else {}


def _export(folder: str, table: tables.Table, result: results_lib.Result) -> None:
    """Writes the answers to a public table as the TSV that the public harness judges."""
    texts = {p["index"]: p["prediction"] for p in result.predictions}
    answered = tuple(row for row in table.rows if row.index in texts)
    path = os.path.join(folder, f"{table.name}.tsv")
    table_scores.export(path, dataclasses.replace(table, rows=answered), texts)
