"""Batches of prepared examples as the contexts of an evaluation mode, and greedy answers to them."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax import rollout, sharding, tags, tasks
from opsd_jax.data import randomness
from opsd_jax.data.randomness import generator
from opsd_jax.evaluation import results as results_lib
from opsd_jax.runtime import clock

# Modes of the teacher's context, of drawing, and all.
CONTEXTS = tuple(mode for mode in config_lib.MODES if mode != "none")
DRAWN = ("generated", "generated-noise", "generated-swap", "generated-remove")
MODES = ("none", *CONTEXTS, *DRAWN)


def is_hit(example, text: str) -> tuple[str | None, bool]:
    """(answer found in the text, whether it is right): by the procedural task's rule, or word for word."""
    return tasks.judge(example.metadata, tags.wrap_answer(example.answer), text)


def batches(numbers, batch_size: int):
    """Row numbers by batch, the last one filled up with its last row: 0, 1, 2 by 2 -> [0, 1], [2, 2]."""
    for start in range(0, len(numbers), batch_size):
        part = list(numbers[start : start + batch_size])
        yield part + part[-1:] * (batch_size - len(part))


def buckets_of(rows, packer, source: int, numbers, modes) -> list[int]:
    """For each of the numbered rows of a source the bucket that holds its context in all of the modes.

    With a single bucket nothing is read; else all of these rows are, by every process for itself.
    """
    if len(packer.buckets.student) == 1:
        return [0] * len(numbers)

    def find(n):
        return max(packer.fitting(*_blocks_of(rows, packer, source, n, mode)) for mode in modes)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(find, numbers))


def _blocks_of(rows, packer, source: int, n: int, mode: str):
    """(kind of context, blocks) of a row in a mode; of noise those of what it replaces, which are as large."""
    row = rows(source, n)
    if mode == "none":
        return "student", packer.blocks(row, "student")
    partner = rows.partner(source, n) if mode == "swap" else None
    shown = context_lib.replace_visual_thoughts(
        {"remove": "none", "noise": "real"}.get(mode, mode),
        row.problem,
        row.visual_thoughts,
        partner.visual_thoughts if partner else (),
        None,
    )
    return "teacher", packer.blocks(row, "teacher", shown)


def check_fit(
    rows, packer, task_names, modes, limit: int = 0, subset_seed: int = 0, traces: bool = False
) -> None:
    """TooLongError, with the row's pid, where a context of a mode fits no bucket, or (traces) a text trace its targets."""
    for source, name in enumerate(task_names):
        numbers = chosen_numbers(rows, source, limit, subset_seed)
        rows.check_references(source, numbers)
        for n in numbers:
            row = rows(source, n)
            for mode in modes:
                kind, blocks = _blocks_of(rows, packer, source, n, mode)
                slots, patches, _ = context_lib.need(blocks)
                if np.any(np.array([slots, patches]) > packer.buckets[kind][-1][:2]):
                    raise context_lib.TooLongError(
                        f"row {row.example.pid} of {name}, to be evaluated in mode {mode}, needs {slots} slots and {patches} "
                        f"patches, the largest of config.data.buckets.{kind} has {packer.buckets[kind][-1][:2]}: enlarge it, or "
                        "change config.eval"
                    )
            if traces:
                packer.references([row])


def by_length(rows, packer, source: int, chosen, batch_size: int, modes):
    """(bucket, row numbers) of every batch of the chosen rows: rows of one bucket together, in order."""
    found = dict(zip(chosen, buckets_of(rows, packer, source, chosen, modes), strict=True))
    for numbers in batches(sorted(chosen, key=found.__getitem__), batch_size):
        yield max(found[n] for n in numbers), numbers


def contexts(rows, packer, source: int, numbers, mode: str, seed: int, bucket: int = -1):
    """Prepared rows and the context of a mode for them: the student's for "none", else the teacher's ("remove": with
    its texts alone). bucket: of config.data.buckets."""
    prepared = [rows(source, n) for n in numbers]
    if mode == "none":
        return prepared, packer.student(prepared, bucket)
    partners = [rows.partner(source, n) if mode == "swap" else None for n in numbers]
    rngs = [generator(seed, "eval visual thoughts", source, n) for n in numbers]
    return prepared, packer.teacher(
        prepared, partners, "none" if mode == "remove" else mode, rngs, bucket
    )


def evaluate(
    params,
    rows,
    packer,
    *,
    config,
    task_names,
    mode: str,
    batch_size: int,
    limit: int = 0,
    subset_seed: int = 0,
    seed: int = 0,
    mesh=None,
    on_batch=None,
    before_batch=lambda: None,
) -> list[results_lib.Result]:
    """Answers all rows of all sources greedily, or a random subset of each.

    Args:
      params: the model's dict. rows, packer: of the split. config: RolloutConfig; sampling is made greedy.
      mode: see the module. batch_size: of all processes together.
      limit, subset_seed: rows of each task, chosen by the seed (`randomness.subset`); 0: all. seed: of noise.
      on_batch: called after each batch with how many rows are done, and how many of them right, in all tasks.
      before_batch: called before each batch, such as `checkpoint.Flag.check`.
    """
    config = dataclasses.replace(config, greedy=True)
    results, done, hits = [], 0, 0
    for source, name in enumerate(task_names):
        predictions, seconds, timed, single = {}, 0.0, 0, None
        for bucket, numbers in by_length(
            rows,
            packer,
            source,
            chosen_numbers(rows, source, limit, subset_seed),
            batch_size,
            (mode,),
        ):
            before_batch()
            packed, placed = placed_batch(rows, packer, source, numbers, mode, seed, mesh, bucket)
            found, took, compiled = timed_sample(params, packed, config)
            if not compiled:  # else the time is the compiler's
                seconds, timed = seconds + took, timed + len(set(numbers))
            single = packed, numbers
            predictions |= read_predictions(found, placed, rows.sources[source], packer.tokenizer)
            if on_batch:
                on_batch(
                    done + len(predictions), hits + sum(p["hit"] for p in predictions.values())
                )
        if not timed:  # a single batch, and it compiled
            seconds, timed = timed_sample(params, single[0], config)[1], len(set(single[1]))
        without = (
            without_visual_thoughts(rows, source, sorted(predictions)) if mode in CONTEXTS else None
        )
        results.append(
            results_lib.Result(
                name,
                [predictions[n] for n in sorted(predictions)],
                seconds,
                timed,
                None,
                without,
                randomness.subset_facts(len(predictions), len(rows.sources[source]), subset_seed),
            )
        )
        done, hits = done + len(predictions), hits + results[-1].hits
    return results


def placed_batch(rows, packer, source, numbers, mode, seed, mesh, bucket):
    """(context of the batch, row numbers as they lie in it) on the mesh."""
    mine = own_part(numbers, mesh)
    return put_on_mesh(
        mesh,
        (contexts(rows, packer, source, mine, mode, seed, bucket)[1], np.asarray(mine, np.int32)),
    )


def timed_sample(params, packed, config):
    """(Trajectory, seconds, whether a program was compiled in them)."""
    key = jax.random.key(0)
    with clock.compilations() as compiled:
        before = time.perf_counter()
        found = jax.block_until_ready(rollout.sample(params, packed, key, config=config))
        seconds = time.perf_counter() - before
    return found, seconds, compiled.programs > 0


def read_predictions(found, placed, examples, tokenizer) -> dict:
    """{row number: prediction} of a sampled batch."""
    found, placed = sharding.gather_to_host((found, placed))
    predictions = {}
    for b, n in enumerate(placed.tolist()):
        ids, example = found.tokens[b][found.mask[b]], examples[n]
        text = tokenizer.decode(ids)
        answer, hit = is_hit(example, text)
        predictions[n] = {
            "index": n,
            "pid": example.pid,
            "prediction": text,
            "answer": answer,
            "expected": example.answer,
            "hit": hit,
            "tokens": len(ids),
            "stop": "eos" if found.stop[b] == rollout.STOP_EOS else "budget",
            "image_skips": int(found.num_skips[b]),
        }
    return predictions


def without_visual_thoughts(rows, source: int, numbers) -> int:
    return sum(not rows.sources[source][n].visual_thoughts for n in numbers)


def chosen_numbers(rows, source: int, limit: int, subset_seed: int) -> list[int]:
    return randomness.subset(len(rows.sources[source]), limit, subset_seed)


def own_part(numbers: list, mesh) -> list:
    """The rows of a batch that this process packs."""
    return (
        [numbers[n] for n in sharding.local_batch_indices(mesh, len(numbers))] if mesh else numbers
    )


def put_on_mesh(mesh, host_batch):
    return sharding.put_batch(mesh, host_batch) if mesh else host_batch
