"""One evaluation of a model: what is asked, of which weights, and where the results go."""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable

import jax
import numpy as np

from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax import images, interleave, rollout, sharding, tasks, tokenizer
from opsd_jax import params as params_lib
from opsd_jax.data import arrayrecord, packing, randomness
from opsd_jax.data import examples as examples_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.randomness import generator
from opsd_jax.evaluation import contexts as contexts_lib
from opsd_jax.evaluation import inference, page
from opsd_jax.evaluation import results as results_lib
from opsd_jax.evaluation import tables as tables_lib
from opsd_jax.evaluation import traces as traces_lib
from opsd_jax.inputs import cli, paths
from opsd_jax.model import bagel
from opsd_jax.release import folders
from opsd_jax.run import model as model_lib
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import files
from opsd_jax.runtime import progress as progress_lib


def choose_tasks(benchmarks, task_names) -> tuple[str, ...]:
    """The tasks that `benchmarks` name, or whose family; all for (). ValueError lists what there is."""
    families = {
        family: module.TASK
        for family, module in tasks.FAMILIES.items()
        if module.TASK in task_names
    }
    known = {task.lower(): task for task in task_names} | families
    for name in benchmarks:
        if name.lower() not in known:
            raise ValueError(
                f"--benchmarks={name}: this run has the tasks {', '.join(task_names)} (or, by "
                f"family, {', '.join(families) or 'none'})"
            )
    return tuple(dict.fromkeys(known[name.lower()] for name in benchmarks)) or tuple(task_names)


def evaluate_run(
    workdir: str,
    modes=("none",),
    *,
    checkpoint: str = "",
    benchmarks=(),
    data_dir: str = "",
    protocol: str = "",
    split: str = "test",
    limit: int = 0,
    ban_marker: bool = False,
    seed: int | None = None,
    name: str = "",
    batch_size: int = 0,
    skip_bad: bool = False,
    against: str = "",
    before_batch=lambda: None,
) -> dict:
    """Evaluates a model in each of the modes and writes the results to W/eval.

    Args:
      workdir: of the run, or of an arm; with another model in `checkpoint`, a folder for results.
      checkpoint: a step folder; "" for the newest one of the run; or a released or imported model.
      benchmarks: names, see the module. data_dir: folder of the public tables. protocol: see the module.
      limit: a random subset of so many rows of each benchmark (of whole questions where a table asks each several times);
        0 for all. It depends on config.seed (0 for a model that is no run), so results of several seeds stay paired.
      seed: of noise and sampling; None for the run's.
      name: of the results. "" makes one that tells what was measured, so that a rerun replaces equals by
        equals: <step>-<mode>[-banned][-<protocol>], and more where split, rows, tasks or seed are not the run's own.
      batch_size: 0 for config.eval.batch_size (16 for a model that is no run).
      skip_bad: rows of a table that cannot be shown are listed in the summary and left out, instead of an error.
      against: results to compare with in the report: a name in W/eval, or a folder.
      before_batch: called before each batch, such as `checkpoint.Flag.check`.
    Returns:
      {name: summary}.
    Raises:
      FileNotFoundError: no run, data or checkpoint. FileExistsError: `name` is taken. ValueError: unknown
      modes, benchmarks or split, or a checkpoint of another run without a name.
    """
    paths.check_given("--workdir", workdir, orbax=True)
    paths.check("--checkpoint", checkpoint)
    paths.check("--data_dir", data_dir)
    paths.check("--against", against)

    def evaluate():
        job = prepare(
            workdir,
            modes,
            checkpoint=checkpoint,
            benchmarks=benchmarks,
            data_dir=data_dir,
            protocol=protocol,
            split=split,
            limit=limit,
            ban_marker=ban_marker,
            seed=seed,
            name=name,
            batch_size=batch_size,
        )
        job = dataclasses.replace(job, before_batch=before_batch)
        compared = results_lib.read_results(workdir, against) if against else None
        summaries = {}
        for mode in modes:
            summaries[job.names[mode]] = (
                answer_in_context(job, mode, open_model(job, mode), compared)
                if mode in job.contexts
                else _asked(job, mode, skip_bad, compared)
            )
        return summaries

    return checkpoint_lib.retry_if_gone(evaluate, given=checkpoint)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all modes of one command share. Made by `prepare`, which finds out what cannot be done."""

    workdir: str
    config: object  # of the run; None for a model that is none
    checkpoint: str
    names: dict  # mode -> name of the results
    contexts: tuple  # modes in which rows are packed as in training, by the run's own protocol
    tasks: tuple  # of the run
    tables: tuple  # benchmarks.Table
    where: str  # whose data: W, or of an arm the run's
    protocol: str
    split: str
    limit: int
    subset_seed: int  # the same for every --seed
    ban_marker: bool
    seed: int
    batch_size: int
    about: dict  # for every summary
    before_batch: Callable = lambda: None


def prepare(
    workdir,
    modes,
    *,
    checkpoint,
    benchmarks,
    data_dir,
    protocol,
    split,
    limit,
    ban_marker,
    seed,
    name,
    batch_size,
    config=None,
) -> Job:
    """Checks what `evaluate_run` is given, before anything slow. config: of the run; None: what W/config.json says."""
    cli.check_precision()
    for mode in modes:
        if mode not in contexts_lib.MODES:
            raise ValueError(
                f"--visual_thoughts={mode}: choose from {', '.join(contexts_lib.MODES)}"
            )
    cli.check_once("visual_thoughts", modes)
    cli.check_once("benchmarks", benchmarks)
    if seed is not None:
        cli.check_seed(seed)
    if name:
        cli.check_name(name)
    cli.check_number("rows", limit, 0)
    cli.check_number("batch_size", batch_size, 0)
    if protocol and protocol not in interleave.PROTOCOLS:
        raise ValueError(f"--protocol={protocol}: choose from {', '.join(interleave.PROTOCOLS)}")
    released = bool(checkpoint) and folders.is_model(checkpoint)
    config = (
        None if released else config if config is not None else workdir_lib.load_config(workdir)
    )
    files = tables_lib.find(data_dir) if data_dir else {}
    if released and not data_dir:
        raise ValueError(
            f"--checkpoint={checkpoint} is a model without data of its own: give --data_dir=FOLDER with "
            "the public tables"
        )
    public = [b for b in benchmarks if b in files] if benchmarks else list(files)
    rest = [b for b in benchmarks if b not in files]
    if data_dir and (unknown := [b for b in rest if b in tables_lib.KINDS or released]):
        raise ValueError(f"--benchmarks={unknown[0]}: {data_dir} holds {', '.join(files)}")
    if not data_dir and (absent := [b for b in rest if b in tables_lib.KINDS]):
        raise ValueError(
            f"--benchmarks={absent[0]} is a public table: give --data_dir=FOLDER that holds {absent[0]}.tsv"
        )
    own = choose_tasks(rest, config.data.tasks) if config and (rest or not data_dir) else ()
    if public and (wrong := [mode for mode in modes if mode in contexts_lib.CONTEXTS]):
        raise ValueError(
            f"--visual_thoughts={wrong[0]}: public tables hold no visual thoughts of their rows: choose from "
            f"none, {', '.join(contexts_lib.DRAWN)}"
        )
    if protocol and (wrong := [mode for mode in modes if mode in contexts_lib.CONTEXTS]):
        raise ValueError(
            f"--protocol={protocol} with --visual_thoughts={wrong[0]}: the teacher's contexts are those of "
            "training, without a protocol"
        )
    if ban_marker and (protocol or public or set(modes) & set(contexts_lib.DRAWN)):
        raise ValueError(
            "--ban_marker is for tasks of a run without a protocol and without drawing"
        )
    contexts = () if protocol or public else ("none", *contexts_lib.CONTEXTS)

    if released:
        step, stem = None, os.path.basename(os.path.abspath(checkpoint))
    else:
        steps = os.path.join(workdir, "checkpoints")
        checkpoint = checkpoint or checkpoint_lib.newest(workdir)
        step = checkpoint_lib.metadata(checkpoint)["step"]
        stem = f"{step:06d}"
        if not name and os.path.realpath(
            os.path.dirname(os.path.normpath(checkpoint))
        ) != os.path.realpath(steps):
            raise ValueError(
                f"--checkpoint={checkpoint} is no step of {steps}: say with --name under which name "
                f"its results shall stand in {workdir}/eval"
            )
    tables = tuple(tables_lib.read(files[b]) for b in public)
    where = workdir_lib.data_workdir(config, workdir) if own else workdir
    own_seed = config.seed if config else 0
    seed = own_seed if seed is None else seed
    labels = {mode: f"{mode}-banned" if ban_marker else mode for mode in modes}
    if name:
        names = {
            mode: name if len(modes) == 1 else f"{name}-{label}" for mode, label in labels.items()
        }
        for folder in (os.path.join(workdir, "eval", n) for n in names.values()):
            if os.path.exists(os.path.join(folder, "summary.json")) and not inference.is_begun(
                folder
            ):
                raise FileExistsError(
                    f"{folder} holds results of something else: choose another --name, or delete it"
                )
        if "generated-swap" in modes and len(modes) == 1:
            raise ValueError(
                "--visual_thoughts=generated-swap with a --name: it shows what other rows drew in mode generated "
                "of the same name, so give --visual_thoughts=generated,generated-swap"
            )
    else:
        sizes = [tables_lib.size(table) for table in tables]
        if limit and own:
            place = workdir_lib.data_dir(config, where)
            sizes += [len(arrayrecord.open_source(place, split, task=task)) for task in own]
        differs = [protocol] if protocol else []
        differs += [split] if config and own and split != config.eval.final_split else []
        differs += [f"random{limit}"] if any(limit < size for size in sizes) and limit else []
        if public:
            differs += [*public, *own] if benchmarks else ["public"]
        elif own != tuple(config.data.tasks):
            differs += own
        differs += [f"seed{seed}"] if seed != own_seed else []
        names = {mode: "-".join([stem, label, *differs]) for mode, label in labels.items()}
    for folder in names.values():
        paths.check_writable("--workdir", os.path.join(workdir, "eval", folder))
    batch_size = batch_size or (config.eval.batch_size if config else 16)
    about = {
        "checkpoint": checkpoint,
        "seed": seed,
        "split": split if own else None,
        "step": step,
        "asked_by": protocol or "run",
    }
    return Job(
        workdir,
        config,
        checkpoint,
        names,
        contexts,
        own,
        tables,
        where,
        protocol,
        split,
        limit,
        own_seed,
        ban_marker,
        seed,
        batch_size,
        about,
    )


@dataclasses.dataclass(frozen=True)
class Opened:
    """What answers tasks of a run in its contexts: rows of the split, and the model.

    params: laid out for the sampler. facts: see `facts_of`.
    """

    params: dict
    rows: object
    packer: object
    marker: object
    mesh: object
    facts: dict


def open_model(job: Job, mode: str) -> Opened:
    """Reads what a command needs; ValueError where no row of a task has the visual thoughts that the mode shows."""

    config = workdir_lib.with_tasks(job.config, job.tasks)
    tok = tokenizer.load(
        workdir_lib.tokenizer_folder(config, job.where), vocab_size=config.model.llm.vocab_size
    )
    rows, packer = (
        examples_lib.Examples.open(config, job.where, tok, job.split),
        packing.Packer.from_config(config, tok),
    )
    for source, name in enumerate(job.tasks if mode in contexts_lib.CONTEXTS else ()):
        numbers = contexts_lib.chosen_numbers(rows, source, job.limit, job.subset_seed)
        if contexts_lib.without_visual_thoughts(rows, source, numbers) == len(numbers):
            raise ValueError(
                f"--visual_thoughts={mode}: no row of {name}, {job.split}, has visual thoughts: leave the mode "
                "or the task out"
            )
    mesh, model = sharding.make_mesh(tensor=config.mesh.tensor), config_lib.model(config)
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    params = checkpoint_lib.restore_params(job.checkpoint, sharding.abstract(mesh, abstract))
    facts = facts_of(params, rows, packer, job.tasks)
    return Opened(
        rollout.relayout_program(mesh, params, config.model.dtype)(params),
        rows,
        packer,
        rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size),
        mesh,
        facts,
    )


def answer_in_context(job: Job, mode: str, opened: Opened, compared=None) -> dict:
    """Tasks of the run, rows packed as in training; the summary."""
    config, rows, packer, mesh = job.config, opened.rows, opened.packer, opened.mesh
    sampling = config_lib.rollout(
        config,
        packer.tokenizer,
        opened.marker,
        ban_marker=job.ban_marker,
        slots=config.eval.slots,
        refill=0,
        greedy=True,
        shards=sharding.batch_divisor(mesh),
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
    )
    asked = {
        "max_new_tokens": sampling.max_new_tokens,
        "prompts": config.prompts.to_dict(),
        "images": config.images.to_dict(),
    }
    chosen = [_of_rows(rows, source, name, job) for source, name in enumerate(job.tasks)]
    lengths = {
        b.name: dict(
            zip(b.keys, contexts_lib.buckets_of(rows, packer, source, b.keys, (mode,)), strict=True)
        )
        for source, b in enumerate(chosen)
    }
    chosen = [dataclasses.replace(b, size=lengths[b.name].__getitem__) for b in chosen]
    without = (
        {
            b.name: contexts_lib.without_visual_thoughts(rows, source, b.keys)
            for source, b in enumerate(chosen)
        }
        if mode in contexts_lib.CONTEXTS
        else {}
    )

    def answer(number, benchmark, keys):
        source = job.tasks.index(benchmark.name)
        filled = [*keys, *[keys[-1]] * (job.batch_size - len(keys))]
        packed, placed = contexts_lib.placed_batch(
            rows, packer, source, filled, mode, job.seed, mesh, max(map(benchmark.size, keys))
        )
        found, seconds, compiled = contexts_lib.timed_sample(opened.params, packed, sampling)
        if compiled:  # or there might be no time of rows of this length at all
            found, seconds, compiled = contexts_lib.timed_sample(opened.params, packed, sampling)
        predictions = contexts_lib.read_predictions(
            found, placed, rows.sources[source], packer.tokenizer
        )
        return {
            "predictions": [predictions[key] for key in keys],
            "seconds": seconds,
            "compiled": compiled,
        }

    label = f"{mode}-banned" if job.ban_marker else mode
    shown = lambda benchmark, key: _shown(
        rows, job.tasks.index(benchmark.name), key, mode, job.seed
    )
    return _run(
        job,
        mode,
        chosen,
        inference.plan(chosen, job.batch_size),
        answer,
        together=True,
        shown=shown,
        compared=compared,
        protocol=f"mini-greedy-{label}",
        without=without,
        facts=opened.facts,
        asked=asked,
    )


def _asked(job: Job, mode: str, skip_bad: bool, compared) -> dict:
    """Questions put by a protocol, with drawing or without; each process asks its share on its own devices."""

    mesh = sharding.make_mesh(
        tensor=job.config.mesh.tensor if job.config else 1, devices=jax.local_devices()
    )
    cache = "jpeg75" if job.protocol == "harness" else "lossless"
    chosen = [
        inference.of_table(table, cache=cache, limit=job.limit, seed=job.subset_seed)
        for table in job.tables
    ]
    bad = {
        benchmark.name: inference.broken(benchmark) for benchmark in chosen
    }  # before minutes of loading
    bad = {name: rows for name, rows in bad.items() if rows}
    if bad and not skip_bad:
        first = next(iter(next(iter(bad.values())).values()))
        where = "; ".join(f"{name}: {', '.join(map(str, rows))}" for name, rows in bad.items())
        raise ValueError(
            f"{sum(map(len, bad.values()))} rows cannot be shown, or no answer can match them, the first: {first}. "
            f"Correct them, or leave them out with --on_bad_row=skip; {where}"
        )
    model = model_lib.load(job.checkpoint, draw=mode != "none", protocol=job.protocol, mesh=mesh)
    facts = model_facts(model.params, model.tokenizer)
    if job.tasks:
        rows = examples_lib.Examples.open(
            workdir_lib.with_tasks(job.config, job.tasks), job.where, model.tokenizer, job.split
        )
        facts["data"] = dict(zip(job.tasks, rows.digests, strict=True))
        chosen += [_of_rows(rows, source, name, job) for source, name in enumerate(job.tasks)]
    batch_size = -(-job.batch_size // sharding.batch_divisor(mesh)) * sharding.batch_divisor(mesh)
    for benchmark in chosen:  # what cannot be scored shows before anything is asked
        left = [key for key in benchmark.keys if key not in bad.get(benchmark.name, {})]
        try:
            benchmark.judge(dict.fromkeys(left, ""))
        except ValueError as error:
            raise ValueError(
                f"{benchmark.name}: {len(left)} of {len(benchmark.keys)} rows can be asked, and no score comes of "
                f"them ({error}): mend the rows that cannot be shown, or ask more of them"
            ) from error
    folder = os.path.join(job.workdir, "eval", job.names[mode])
    drawn = _generated_of(job, mode, facts) if mode == "generated-swap" else ""
    batches = inference.plan(chosen, batch_size, bad)
    last = {benchmark.name: number for number, (benchmark, _) in enumerate(batches)}

    def answer(number, benchmark, keys):
        questions = [benchmark.question(key) for key in keys]
        key = jax.random.fold_in(jax.random.key(job.seed), number)
        again = functools.partial(
            inference.ask,
            model,
            questions,
            key,
            mode=mode,
            batch_size=batch_size,
            change=inference.changer(mode, benchmark.name, keys, seed=job.seed, drawn=drawn),
        )
        traces, seconds, compiled = again()
        if (
            compiled and number == last[benchmark.name]
        ):  # or there might be no time of this benchmark at all
            traces, seconds, compiled = again()
        predictions = []
        for row, trace in zip(keys, traces):
            for n, picture in enumerate(trace.pictures):
                traces_lib.save_picture(
                    picture, inference.picture_path(folder, benchmark.name, row, n)
                )
            text = (
                traces_lib.as_harness(trace)
                if job.protocol == "harness" and mode != "none"
                else trace.text
            )
            predictions.append(
                {
                    "index": row,
                    "prediction": text,
                    "expected": benchmark.expected(row),
                    "tokens": trace.tokens,
                    "pictures": len(trace.pictures),
                }
            )
        return {"predictions": predictions, "seconds": seconds, "compiled": compiled}

    def shown(benchmark, key):
        own = [
            (f"picture {n + 1}", picture) for n, picture in enumerate(benchmark.question(key)[0])
        ]
        files = itertools.takewhile(
            os.path.exists,
            (inference.picture_path(folder, benchmark.name, key, n) for n in itertools.count()),
        )
        return own + [(f"drawn {n + 1}", images.open_rgb(file)) for n, file in enumerate(files)]

    return _run(
        job,
        mode,
        chosen,
        batches,
        answer,
        together=False,
        shown=shown,
        compared=compared,
        bad=bad,
        protocol=f"{job.protocol or 'run'}-{mode}",
        facts=facts,
        asked={**dataclasses.asdict(model.protocol), "drawing": model.drawing},
    )


def model_facts(params, tokenizer) -> dict:
    """What tells a model from another one under the same path. Weights that only generate images are apart, so that
    results with and without images have the other fingerprint in common."""
    understanding = params_lib.understanding(params)
    text = params_lib.flatten(understanding)
    rest = {path: leaf for path, leaf in params_lib.flatten(params).items() if path not in text}
    facts = {"weights": params_lib.fingerprint(understanding), "tokenizer": tokenizer.digest}
    return facts | (
        {"generation_weights": params_lib.fingerprint(params_lib.unflatten(rest))} if rest else {}
    )


def facts_of(params, rows, packer, task_names) -> dict:
    """What tells a run's model and its rows from others under the same paths. params: as they are stored."""
    return {
        **model_facts(params_lib.understanding(params), packer.tokenizer),
        "data": dict(zip(task_names, rows.digests, strict=True)),
    }


def _generated_of(job: Job, mode: str, facts: dict) -> str:
    """Folder of the results in mode "generated" that go with those of `mode`. ValueError where other weights made them."""
    folder = os.path.join(job.workdir, "eval", job.names[mode].replace(mode, "generated"))
    there = inference.identity_of(folder) if inference.is_begun(folder) else facts
    if any(there.get(key) != facts[key] for key in ("weights", "generation_weights")):
        raise ValueError(
            f"{folder} holds images that other weights generated than those in {job.checkpoint}: delete it, and "
            "evaluate --visual_thoughts=generated again"
        )
    return folder


def _of_rows(rows, source: int, name: str, job: Job):
    """Prepared rows as a benchmark: the task's rule scores."""
    examples = rows.sources[source]

    def question(key):
        example = examples[key]
        picture = images.open_rgb(
            example.problem_image, transparency=job.config.images.transparency
        )
        return [picture], example.question + job.config.prompts.suffix

    def judge(texts):
        found = {}
        for key, text in texts.items():
            answer, hit = contexts_lib.is_hit(examples[key], text)
            found[key] = {"pid": examples[key].pid, "answer": answer, "hit": hit}
        return found, None

    keys = tuple(contexts_lib.chosen_numbers(rows, source, job.limit, job.subset_seed))
    rows.check_references(source, keys)
    return inference.Benchmark(
        name,
        keys,
        question,
        lambda key: examples[key].answer,
        judge,
        asked=lambda key: (examples[key].pid, examples[key].answer),
        subset=randomness.subset_facts(len(keys), len(examples), job.subset_seed),
    )


def _shown(rows, source, key, mode, seed):
    """(caption, picture) of what a row showed: its picture, and what stood in the slots of its visual thoughts."""

    def pixels(image):
        patches = image.patches
        if patches.dtype != np.uint8:  # normalised
            patches = np.round(np.clip(patches + 1, 0, 2) * 127.5).astype(np.uint8)
        return images.unpatchify(patches, image.grid, round((patches.shape[1] / 3) ** 0.5))

    row = rows(source, key)
    found = [("problem", pixels(row.problem))]
    if mode != "none":
        partner = rows.partner(source, key) if mode == "swap" else None
        slots = context_lib.replace_visual_thoughts(
            "none" if mode == "remove" else mode,
            row.problem,
            row.visual_thoughts,
            partner.visual_thoughts if partner else (),
            generator(seed, "eval visual thoughts", source, key),
        )
        found += [
            (f"visual thought {n + 1} ({mode})", pixels(image)) for n, image in enumerate(slots)
        ]
    return found


def _run(
    job: Job,
    mode: str,
    chosen,
    batches,
    answer,
    *,
    together: bool,
    shown,
    compared,
    protocol: str,
    facts: dict,
    asked: dict,
    bad=None,
    without=None,
) -> dict:
    """Answers, scores and writes; the summary.

    facts: fingerprints of the weights, the tokenizer and the tasks' rows, for the summary too. asked: prompts and decoding.
    bad: {benchmark: rows that are left out}. without: {benchmark: how many rows have no visual thoughts}.
    """

    name, bad, without = job.names[mode], bad or {}, without or {}
    folder, share = os.path.join(job.workdir, "eval", name), inference.share(batches, together)
    total = sum(len(batches[number][1]) for number in share)
    identity = {
        **job.about,
        **facts,
        "prompt or decoding": asked,
        "mode": mode,
        "protocol": protocol,
        "batch_size": job.batch_size,
        "ban_marker": job.ban_marker,
        "tables": {table.name: table.md5 for table in job.tables},
        "images": {table.name: tables_lib.digest_of_files(table) for table in job.tables},
        "rows": [[benchmark.name, list(keys)] for benchmark, keys in batches],
    }
    if compared:
        results_lib.check_pairs(compared, chosen, job.about["split"])
    del identity["checkpoint"]  # the weights tell, wherever they are stored
    done = collections.Counter()
    with progress_lib.Progress(
        total, name, job.split if job.tasks else "", primary=jax.process_index() == 0
    ) as progress:

        def on_batch(record):
            done["rows"] += len(record["predictions"])
            done["hits"] += sum(bool(p.get("hit")) for p in record["predictions"])
            known = (
                {"accuracy": done["hits"] / done["rows"]}
                if "hit" in record["predictions"][0]
                else {}
            )
            progress.update(done["rows"], **known)

        records = inference.collect(
            folder,
            identity,
            batches,
            answer,
            on_batch,
            together=together,
            before_batch=job.before_batch,
        )
    results, processes = [], 1 if together else jax.process_count()
    if records is None:  # another process writes
        return {}
    for benchmark in chosen:
        own = [r for r, (b, _) in zip(records, batches, strict=True) if b is benchmark]
        predictions = {p["index"]: p for r in own for p in r["predictions"]}
        found, judged = benchmark.judge({key: p["prediction"] for key, p in predictions.items()})
        if judged is not None:
            judged |= {
                "bad_rows": [str(key) for key in bad.get(benchmark.name, ())],
                "md5": benchmark.table.md5,
                "without_image": list(benchmark.table.dropped),
            }
            judged |= (
                {"respelt_answers": benchmark.table.respelt} if benchmark.table.respelt else {}
            )
        in_order = [
            {**predictions[key], **found[key]} for key in benchmark.keys if key in predictions
        ]
        clean = [r for r in own if not r["compiled"]]  # several processes answer side by side
        results.append(
            results_lib.Result(
                benchmark.name,
                in_order,
                sum(r["seconds"] for r in clean) / processes,
                sum(len(r["predictions"]) for r in clean),
                judged,
                without.get(benchmark.name),
                benchmark.subset,
            )
        )
        if benchmark.table:
            answered = tuple(row for row in benchmark.table.rows if row.index in predictions)
            tables_lib.export(
                os.path.join(folder, f"{benchmark.name}.tsv"),
                dataclasses.replace(benchmark.table, rows=answered),
                {key: p["prediction"] for key, p in predictions.items()},
            )
    summary = results_lib.write(folder, results, protocol=protocol, mode=mode, **job.about, **facts)
    files.write(
        os.path.join(folder, "report.html"),
        page.page(name, summary, results, {b.name: b for b in chosen}, shown, compared),
        primary=jax.process_index() == 0,
    )
    return summary
