"""Greedy answers to every row of a split, scored: `python -m opsd_jax.eval --workdir=W`.

  --visual_thoughts   what the model sees: `none` is the student (image and question); the others are the
                      teacher's context with its own pictures (`real`), noise, another row's (`swap`) or the
                      problem image (`image`). Several, separated by commas.
  --benchmarks        tasks of the run, by their own name or that of their family; all if not given

  W/eval/<step>-<mode>/predictions.jsonl   one answer a line
  W/eval/<step>-<mode>/summary.json        accuracy with its interval, tokens and seconds of each task
  W/eval/summary.md                        all summaries in W/eval as one table

Training evaluates with the same functions: the same checkpoint gives the same answers.
"""

import dataclasses
import json
import os
import time

import numpy as np

from opsd_jax import distributed, metrics, tasks


@dataclasses.dataclass(frozen=True)
class Result:
    """Predictions of one benchmark in one mode, with what they cost."""

    name: str
    predictions: list  # dicts: index, pid, prediction, answer, expected, hit, tokens, stop, image_skips
    seconds: float  # of generation, without batches that compiled
    timed: int  # rows that `seconds` covers

    @property
    def hits(self) -> int:
        return sum(p["hit"] for p in self.predictions)

    def summary(self) -> dict:
        n = len(self.predictions)
        low, high = metrics.wilson(self.hits, n)
        return {
            "overall": self.hits / n, "unit": "fraction", "n": n, "categories": {},
            "interval_95": [low, high],
            "mean_output_tokens": sum(p["tokens"] for p in self.predictions) / n,
            "seconds_per_sample": self.seconds / self.timed, "timed_samples": self.timed,
            "eos_rate": sum(p["stop"] == "eos" for p in self.predictions) / n,
            "image_skip_rate": sum(p["image_skips"] > 0 for p in self.predictions) / n,
        }


def is_hit(example, text: str) -> tuple[str | None, bool]:
    """(answer found in the text, whether it is right): by the procedural task's rule, or word for word."""
    answer = tasks.extract_answer(text)
    if "family" in example.metadata:
        return answer, bool(tasks.score(example.metadata, answer))
    return answer, answer is not None and answer.split() == example.answer.split()


def batches(size: int, batch_size: int):
    """Row numbers by batch, the last one filled up with its last row: 3 rows by 2 -> [0, 1], [2, 2]."""
    for start in range(0, size, batch_size):
        yield [min(n, size - 1) for n in range(start, start + batch_size)]


def contexts(rows, packer, source: int, numbers, mode: str, seed: int):
    """Prepared rows and the context of a mode for them: the student's for "none", else the teacher's."""
    from opsd_jax.data import generator

    prepared = [rows(source, n) for n in numbers]
    if mode == "none":
        return prepared, packer.student(prepared)
    partners = [rows.partner(source, n) if mode == "swap" else None for n in numbers]
    rng = generator(seed, "eval visual thoughts", numbers[0])
    return prepared, packer.teacher(prepared, partners, mode, rng)


def evaluate(params, rows, packer, *, config, task_names, mode: str, batch_size: int, limit: int = 0,
             seed: int = 0, mesh=None, on_batch=None) -> list[Result]:
    """Answers all rows of all sources greedily.

    Args:
      params: the model's dict. rows, packer: of the split. config: RolloutConfig; sampling is made greedy.
      mode: see the module. batch_size: of all processes together. limit: first rows of each task; 0: all.
      on_batch: called after each batch with how many rows are done, and how many of them right, in all tasks.
    """
    import jax

    from opsd_jax import rollout

    config, key = dataclasses.replace(config, greedy=True), jax.random.key(seed)
    results, done, hits = [], 0, 0
    for source, name in enumerate(task_names):
        predictions, seconds, timed = {}, 0.0, 0
        for numbers in batches(_size(rows, source, limit), batch_size):
            mine = _own_part(numbers)
            _, packed = contexts(rows, packer, source, mine, mode, seed)
            packed, placed = _put(mesh, (packed, np.asarray(mine, np.int32)))
            before, programs = time.perf_counter(), rollout.sample._cache_size()
            found = jax.block_until_ready(rollout.sample(params, packed, key, config=config))
            if rollout.sample._cache_size() == programs:  # else the time is the compiler's
                seconds, timed = seconds + time.perf_counter() - before, timed + len(set(numbers))
            found, placed = _fetch((found, placed))
            for b, n in enumerate(placed.tolist()):
                ids, example = found.tokens[b][found.mask[b]], rows.sources[source][n]
                text = packer.tokenizer.decode(ids)
                answer, hit = is_hit(example, text)
                predictions[n] = {
                    "index": n, "pid": example.pid, "prediction": text, "answer": answer,
                    "expected": example.answer, "hit": hit, "tokens": len(ids),
                    "stop": "eos" if found.stop[b] == rollout.STOP_EOS else "budget",
                    "image_skips": int(found.num_skips[b])}
            if on_batch:
                on_batch(done + len(predictions), hits + sum(p["hit"] for p in predictions.values()))
        if not timed:  # a single batch, and it compiled
            before, timed = time.perf_counter(), len(set(numbers))
            jax.block_until_ready(rollout.sample(params, packed, key, config=config))
            seconds = time.perf_counter() - before
        results.append(Result(name, [predictions[n] for n in sorted(predictions)], seconds, timed))
        done, hits = done + len(predictions), hits + results[-1].hits
    return results


def reference_kl(teacher, student, rows, packer, *, config, task_names, batch_size: int, limit: int = 0,
                 mesh=None) -> dict:
    """KL(teacher with the true visual thoughts || student without) on the rows' text traces, nats per token.

    Paper Eq. 4 on fixed completions: mean over the tokens of a trace, then over rows. config: ModelConfig.
    Returns {task: {"kl", "n"}}.
    """
    from opsd_jax import context as context_lib
    from opsd_jax import distill

    found, width = {}, packer.buckets.trace[-1][2]
    ends = {"bos": packer.tokenizer.bos, "eos": packer.tokenizer.eos}
    for source, name in enumerate(task_names):
        values = {}
        for numbers in batches(_size(rows, source, limit), batch_size):
            mine = _own_part(numbers)
            prepared, c_t = contexts(rows, packer, source, mine, "real", 0)
            tokens, mask = np.zeros((len(mine), width), np.int32), np.zeros((len(mine), width), bool)
            for b, row in enumerate(prepared):
                ids = packer.reference(row)
                tokens[b, :len(ids)], mask[b, :len(ids)] = ids, True
            batch = distill.Batch(packer.student(prepared), c_t)
            batch, tokens, mask, placed = _put(mesh, (batch, tokens, mask, np.asarray(mine, np.int32)))
            completion = context_lib.completion(tokens, mask, **ends)
            kl = distill.kl_to_student(teacher, student, batch, completion, config=config)
            kl, counted, placed = _fetch((kl, completion.mask, placed))
            values |= zip(placed.tolist(), ((kl * counted).sum(1) / counted.sum(1)).tolist())
        found[name] = {"kl": float(np.mean(list(values.values()))), "n": len(values)}
    return found


def _size(rows, source: int, limit: int) -> int:
    size = len(rows.sources[source])
    return min(limit, size) if limit else size


def _own_part(numbers: list) -> list:
    """The rows of a batch that this process packs."""
    import jax

    if len(numbers) % jax.process_count():
        raise ValueError(f"an evaluation batch of {len(numbers)} rows cannot be shared by "
                         f"{jax.process_count()} processes: set config.eval.batch_size to a multiple of them")
    return numbers[jax.process_index()::jax.process_count()]


def _put(mesh, host_batch):
    from opsd_jax import sharding

    return sharding.put_batch(mesh, host_batch) if mesh else host_batch


def _fetch(tree):
    """Global arrays -> NumPy arrays of the whole batch, on every process, in the order of the mesh."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


# --- files --------------------------------------------------------------------------------------------------

def write(directory: str, results, *, checkpoint: str, seed: int, protocol: str, **more) -> dict:
    """Writes predictions.jsonl and summary.json, the latter last and atomically; returns the summary."""
    summary = {"protocol": protocol, "checkpoint": checkpoint, "seed": seed, **more,
               "benchmarks": {r.name: r.summary() for r in results}}
    _write(os.path.join(directory, "predictions.jsonl"), "".join(
        json.dumps({"benchmark": r.name, **p}) + "\n" for r in results for p in r.predictions))
    _write(os.path.join(directory, "summary.json"), json.dumps(summary, indent=1) + "\n")
    return summary


def write_table(workdir: str) -> str:
    """Writes W/eval/summary.md, the table of all summaries in W/eval, and returns it."""
    folder, summaries = os.path.join(workdir, "eval"), {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name, "summary.json")
        if os.path.exists(path):
            with open(path) as f:
                summary = json.load(f)
            if "benchmarks" in summary:  # a summary of the KL has none
                summaries[name] = summary
    text = table(summaries) + "\n"
    _write(os.path.join(folder, "summary.md"), text)
    return text


def _write(path, text):
    """By the first process for all."""
    import jax

    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)


def table(summaries: dict[str, dict]) -> str:
    """Markdown table of summaries by name: accuracy with its 95 % interval, tokens, seconds."""
    lines = ["| run | task | accuracy | 95 % interval | n | tokens | s/sample |", "|---" * 7 + "|"]
    for name, summary in summaries.items():
        for task, b in summary["benchmarks"].items():
            low, high = b["interval_95"]
            lines.append(f"| {name} | {task} | {100 * b['overall']:.1f} % | {100 * low:.1f}–{100 * high:.1f} "
                         f"| {b['n']} | {b['mean_output_tokens']:.1f} | {b['seconds_per_sample']:.4f} |")
    return "\n".join(lines)


# --- command line -------------------------------------------------------------------------------------------

def load_config(workdir: str):
    """The settings of the run in a workdir, as ConfigDict. FileNotFoundError if there is no run."""
    from opsd_jax import settings

    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{workdir} holds no run (no {path}): give the --workdir of a run of "
                                "`python -m opsd_jax.train`, or of one of its arms, W/arms/NAME")
    config = settings.default()
    with open(path) as f:
        config.update(json.load(f))  # JSON's lists become tuples where the default is one
    return config


def data_workdir(config, workdir: str) -> str:
    """The workdir whose data the run in `workdir` used: its own, or for an arm (W/arms/NAME) the run's, W."""
    from opsd_jax import data
    from opsd_jax.datasets import visual_opsd

    places = {data.folder(config, w): w for w in (workdir, os.path.join(workdir, "..", ".."))}
    for folder, where in places.items():
        if os.path.isdir(os.path.join(folder, visual_opsd.NAME)):
            return where
    raise FileNotFoundError(f"the data of {workdir} are not there: looked for {visual_opsd.NAME}/ in "
                            f"{' and '.join(places)}. Put them back, or set data.dir in "
                            f"{workdir}/config.json")


def choose_tasks(benchmarks, task_names) -> tuple[str, ...]:
    """The tasks that `benchmarks` name, or whose family; all for (). ValueError lists what there is."""
    families = {family: module.TASK for family, module in tasks.FAMILIES.items() if module.TASK in task_names}
    known = {task.lower(): task for task in task_names} | families
    for name in benchmarks:
        if name.lower() not in known:
            raise ValueError(f"--benchmarks={name}: this run has the tasks {', '.join(task_names)} (or, by "
                             f"family, {', '.join(families) or 'none'})")
    return tuple(dict.fromkeys(known[name.lower()] for name in benchmarks)) or tuple(task_names)


def evaluate_run(workdir: str, modes=("none",), *, checkpoint: str = "", benchmarks=(), split: str = "test",
                 limit: int = 0, ban_marker: bool = False, seed: int | None = None, name: str = "") -> dict:
    """Evaluates a checkpoint of a run in each of the modes and writes the results to W/eval.

    Args:
      workdir: of the run, or of an arm. checkpoint: a step folder; "" for the newest one of the run.
      limit: first rows of each task only; 0 for all. seed: of the noise; None for the run's.
      name: of the results. "" makes one that tells what was measured, so that a rerun replaces equals by
        equals: <step>-<mode>[-banned], and more where split, rows, tasks or seed are not the run's own.
    Returns:
      {name: summary}.
    Raises:
      FileNotFoundError: no run, data or checkpoint. FileExistsError: `name` is taken. ValueError: unknown
      modes, benchmarks or split, or a checkpoint of another run without a name.
    """
    import jax

    from opsd_jax import checkpoint as checkpoint_lib
    from opsd_jax import context, data, rollout, settings, sharding, tokenizer
    from opsd_jax.model import bagel

    for mode in modes:
        if mode not in context.VISUAL_THOUGHTS:
            raise ValueError(f"--visual_thoughts={mode}: choose from {', '.join(context.VISUAL_THOUGHTS)}")
    if limit < 0:
        raise ValueError(f"--rows={limit}: give a number of rows, or 0 for all")
    config = load_config(workdir)
    own = os.path.join(workdir, "checkpoints")
    checkpoint = checkpoint or os.path.join(own, str(checkpoint_lib.metadata(workdir)["step"]))
    step = checkpoint_lib.metadata(checkpoint)["step"]
    if not name and os.path.realpath(os.path.dirname(os.path.normpath(checkpoint))) != os.path.realpath(own):
        raise ValueError(f"--checkpoint={checkpoint} is no step of {own}: say with --name under which name "
                         f"its results shall stand in {workdir}/eval")
    chosen, seed = choose_tasks(benchmarks, config.data.tasks), config.seed if seed is None else seed
    labels = {mode: f"{mode}-banned" if ban_marker else mode for mode in modes}
    if name:
        names = {mode: name if len(modes) == 1 else f"{name}-{label}" for mode, label in labels.items()}
        for folder in (os.path.join(workdir, "eval", n) for n in names.values()):
            if os.path.exists(folder):
                raise FileExistsError(f"{folder} exists: choose another --name, or delete it")
    else:
        differs = [split] if split != config.eval.final_split else []
        differs += [f"first{limit}"] if limit else []
        differs += chosen if chosen != tuple(config.data.tasks) else ()
        differs += [f"seed{seed}"] if seed != config.seed else []
        names = {mode: "-".join([f"{step:06d}", label, *differs]) for mode, label in labels.items()}
    config.data.tasks = chosen

    where = data_workdir(config, workdir)
    tok = tokenizer.load(data.tokenizer_folder(config, where))
    rows, packer = data.Rows(config, where, tok, split), data.Packer(config, tok)
    mesh, model = sharding.make_mesh(tensor=config.mesh.tensor), settings.model(config)
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    params = checkpoint_lib.restore_params(checkpoint, sharding.abstract(mesh, abstract, "rollout"))
    marker = rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size)
    rollout_config = settings.rollout(
        config, tok, marker, ban_marker=ban_marker, slots=config.eval.slots, refill=0,
        shards=sharding.batch_divisor(mesh),
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens)

    total, summaries = sum(_size(rows, s, limit) for s in range(len(rows.sources))), {}
    for mode in modes:
        with metrics.Progress(total, names[mode], split, primary=jax.process_index() == 0) as progress:
            results = evaluate(
                params, rows, packer, config=rollout_config, task_names=chosen, mode=mode,
                batch_size=config.eval.batch_size, limit=limit, seed=seed, mesh=mesh,
                on_batch=lambda done, hits: progress.update(done, accuracy=hits / done))
        summaries[names[mode]] = write(
            os.path.join(workdir, "eval", names[mode]), results, protocol=f"mini-greedy-{labels[mode]}",
            checkpoint=checkpoint, seed=seed, split=split, step=step, first_rows=limit)
    return summaries


def main(argv=None) -> None:
    """`python -m opsd_jax.eval`; errors in the arguments end it with one line and code 1."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m opsd_jax.eval",
                                     description="Answer a split greedily and score it.")
    names = lambda text: tuple(text.split(","))
    parser.add_argument("--workdir", required=True, help="of a run, or of one of its arms: W/arms/NAME")
    parser.add_argument("--checkpoint", default="", help="a step folder (default: the newest of the run)")
    parser.add_argument("--benchmarks", default=(), type=names,
                        help="tasks or families (default: all of the run)")
    parser.add_argument("--visual_thoughts", default=("none",), type=names,
                        help="none (the student), real, noise, swap or image; several separated by commas")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=0, help="first rows of each task only (default: all)")
    parser.add_argument("--ban_marker", action="store_true", help="never sample what completes <image_start>")
    parser.add_argument("--seed", type=int, help="of the noise (default: the run's)")
    parser.add_argument("--name", default="",
                        help="of the results in W/eval (default: <step>-<mode>[-banned])")
    args = parser.parse_args(argv)
    try:
        distributed.initialize()
        evaluate_run(args.workdir, args.visual_thoughts, checkpoint=args.checkpoint, split=args.split,
                     benchmarks=args.benchmarks, limit=args.rows, ban_marker=args.ban_marker, seed=args.seed,
                     name=args.name)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(write_table(args.workdir), end="")


if __name__ == "__main__":
    main()
