"""CPU-seconds and memory of the parts of a training step, with random weights.

  python perf/step.py [--parts=train]

  decode   `rollout.sample`: --tokens tokens after problem image (256 patches) and question (32
           ids), sampled at temperature 1, at each batch size of --decode_batch
  train    `distill.update` alone (nothing is sampled): both forwards, divergence, backward, AdamW,
           EMA; the teacher also sees 40 intro ids, two images of 256 patches and 24 transition ids;
           at each batch size of --train_batch
  loss     `divergence.chunked`, value and gradient, --rows rows of --vocabulary entries from hidden
           states: "loss" with the gradient of the states and of the head, "loss, states" with that
           of the states alone

Chunks, query blocks and remat are those of `config.default` unless a flag says otherwise. No eos is
ever sampled: its id is past the end of the vocabulary. Every case runs in a process of its own, so
that the measured peak is that of the case. Programs are compiled before and not timed; then follow
one call that does not count and --repeats calls, of which the median is reported. CPU-seconds are
those of all threads of the process; on a shared machine they vary less than seconds. Prints one
JSON object per case, then a table; --json=FILE writes the objects as one list.

  rss_start_mib   resident memory after the imports, before weights are made
  peak_mib        peak of the process, compilation included
  run_mib         peak during the calls, above what was resident before them (weights and inputs
                  are not included)
  arguments_mib, outputs_mib, temporary_mib, alias_mib
                  the compiler's figures of the program

Linux only: memory is read from /proc.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import answering
import drawing
import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context, distill, divergence, rollout, sharding

PARTS = ("decode", "train", "loss")
GRID = (16, 16)  # patches of an image of 224 x 224 pixels


# --- memory and time ------------------------------------------------------------------------------


def resident(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, MiB.

    Not getrusage: its peak includes that of the parent.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) / 1024


def compiled(function, *args, **static):
    """(program, facts): `drawing.compiled` with the program's whole bill."""
    start = time.process_time()
    program, facts = drawing.compiled(function, *args, **static)
    memory = program.memory_analysis()
    mib = {
        f"{name}_mib": getattr(memory, f"{field}_size_in_bytes") / drawing.MIB
        for name, field in (("arguments", "argument"), ("outputs", "output"), ("alias", "alias"))
    }
    return program, {**facts, "compile_cpu_seconds": time.process_time() - start, **mib}


def measured(call, repeats: int) -> dict:
    """Medians of `call()` after one that does not count, and the memory that all of them took."""
    peak, before = resident("VmHWM"), resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    runs = []
    for _ in range(repeats + 1):
        start = time.process_time()
        seconds = drawing.timed(call)[1]  # results are let go, or two of them would be counted
        runs.append((seconds, time.process_time() - start))
    seconds, cpu = zip(*runs[1:])
    during = resident("VmHWM")
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "runs": seconds,
        "cpu_runs": cpu,
        "run_mib": during - before,
        "peak_mib": max(peak, during),
    }


# --- inputs ---------------------------------------------------------------------------------------


def contexts(batch: int, model) -> context.Batch:
    """Batch of `batch` random rows, as long as they need."""
    rng = np.random.default_rng(0)

    def image():
        return blocks_lib.Image(
            rng.integers(0, 256, (GRID[0] * GRID[1], model.vit.patch_dim), np.uint8), GRID
        )

    def text(count):
        return drawing.text(rng, count, model)

    def packed(rows):
        return context.pack(
            rows, context.need(rows[0]), side=model.vit.side, tokenizer=drawing.TOKENIZER
        )

    student = [[image(), text(32)] for _ in range(batch)]
    teacher = [[*row, text(40), image(), image(), text(24)] for row in student]
    return jax.device_put(context.Batch(packed(student), packed(teacher)))


def trajectory(batch: int, tokens: int, model) -> rollout.Trajectory:
    """Completions of random tokens that used up the budget."""
    rng = np.random.default_rng(1)
    drawn = rng.integers(5, model.llm.vocab_size, (batch, tokens)).astype(np.int32)
    sampled = np.ones((batch, tokens), bool)

    def each(value):
        return np.full(batch, value, np.int32)

    return jax.device_put(
        rollout.Trajectory(
            tokens=drawn,
            mask=sampled,
            logprobs=np.zeros((batch, tokens), np.float32),
            num_skips=each(0),
            stop=each(rollout.STOP_BUDGET),
            fed=np.pad(drawn, ((0, 0), (1, 0)), constant_values=drawing.TOKENIZER.bos),
            fed_sampled=np.pad(sampled, ((0, 0), (1, 0))),
            num_fed=each(tokens + 1),
        )
    )


# --- parts ----------------------------------------------------------------------------------------


def decode(args, model, batch: int) -> dict:
    """Measures `rollout.sample` at one batch size."""
    params = drawing.random_params(model)
    # budget: the tokens and the bos that is fed before them; each takes a pass of the decoder
    config = rollout.RolloutConfig(
        model,
        bos=drawing.TOKENIZER.bos,
        eos=model.llm.vocab_size,
        marker=rollout.Marker.build([], model.llm.vocab_size),
        max_new_tokens=args.tokens + 1,
    )
    seen, key = contexts(batch, model).student, jax.random.key(0)
    sample, facts = compiled(rollout.sample, params, seen, key, config=config)
    read, _ = compiled(answering.prefill, params, seen, config=config)
    found = measured(lambda: sample(params, seen, key), args.repeats)
    prefill = measured(lambda: read(params, seen), args.repeats)
    if not bool(sample(params, seen, key).mask.all()):
        sys.exit("a completion ended before --tokens")
    count = batch * args.tokens
    return {
        **drawing.about("step", args, model, params),
        **facts,
        **found,
        "tokens": args.tokens,
        "context_positions": seen.padded_length,
        "prefill_seconds": prefill["seconds"],
        "prefill_cpu_seconds": prefill["cpu_seconds"],
        "tokens_per_second": count / found["seconds"],
        "tokens_per_cpu_second": count / found["cpu_seconds"],
        "cpu_seconds_per_token": found["cpu_seconds"] / count,
        "decoding_cpu_seconds_per_token": (found["cpu_seconds"] - prefill["cpu_seconds"]) / count,
    }


def train(args, model, batch: int) -> dict:
    """Measures `distill.update` at one batch size."""
    # the update keeps its parameters in float32 whatever it computes in
    params = drawing.random_params(dataclasses.replace(model, dtype="float32"))
    config = distill.DistillConfig(
        model=model,
        bos=drawing.TOKENIZER.bos,
        eos=drawing.TOKENIZER.eos,
        divergence=divergence.DivergenceConfig(chunk=args.chunk),
    )
    about = drawing.about("step", args, model, params)
    rows, completions = contexts(batch, model), trajectory(batch, args.tokens, model)
    state = distill.init_state(params, config)
    del params
    update, facts = compiled(
        sharding.update_program(distill.update_step, state, config), state, rows, completions
    )

    def call():
        nonlocal state
        state, metrics = update(state, rows, completions)
        return metrics

    found = measured(call, args.repeats)
    if not np.isfinite(call()["loss"]):
        sys.exit("the loss is not finite")
    return {
        **about,
        **facts,
        **found,
        "tokens": args.tokens,
        "student_positions": rows.student.padded_length + args.tokens + 1,
        "teacher_positions": rows.teacher.padded_length + args.tokens + 1,
        "remat": model.remat,
        "chunk": args.chunk,
        "seconds_per_sample": found["seconds"] / batch,
        "cpu_seconds_per_sample": found["cpu_seconds"] / batch,
        "samples_per_cpu_second": batch / found["cpu_seconds"],
    }


def loss(args, model, head: bool) -> dict:
    """head: with the gradient of the student's head as well."""
    config = divergence.DivergenceConfig(chunk=args.chunk)
    width = model.llm.hidden_size

    def random(n, *shape):
        return jax.random.normal(jax.random.key(n), shape, model.dtype)

    states = [random(n, 1, args.rows, width) for n in (0, 1)]
    heads = [
        random(n, width, args.vocabulary) * jnp.asarray(width**-0.5, model.dtype) for n in (2, 3)
    ]
    labels = jax.random.randint(jax.random.key(4), (1, args.rows), 0, args.vocabulary)

    def mean(states_s, head_s, states_t, head_t, labels):
        jsd, ce, signals = divergence.chunked(states_s, head_s, states_t, head_t, labels, config)
        return jnp.mean(jsd), jax.tree.map(jnp.mean, (ce, signals))

    inputs = jax.block_until_ready((states[0], heads[0], states[1], heads[1], labels))
    program, facts = compiled(
        jax.jit(jax.value_and_grad(mean, argnums=(0, 1) if head else 0, has_aux=True)), *inputs
    )
    found = measured(functools.partial(program, *inputs), args.repeats)
    return {
        **drawing.about("step", args, model, {"llm": {"head": heads[0]}}),
        **facts,
        **found,
        "rows": args.rows,
        "vocabulary": args.vocabulary,
        "hidden": width,
        "top_k": config.top_k,
        "chunk": config.chunk,
    }


# --- cases ----------------------------------------------------------------------------------------


def cases(args) -> list[tuple[str, int]]:
    """(part, batch) of every process to start; for the loss 1 and 0 stand for with and without the
    head.
    """
    found = {"decode": args.decode_batch, "train": args.train_batch, "loss": [1, 0]}
    return [(part, n) for part in args.parts for n in found[part]]


def run(args) -> dict:
    """One case, in this process."""
    part, n = args.case.split(":")
    model = drawing.model(
        args.size,
        dtype=args.dtype,
        query_block=args.query_block,
        unroll=args.unroll,
        remat=args.remat,
    )
    model = dataclasses.replace(model, generation=None)
    jax.block_until_ready(jnp.zeros(1))
    start = resident("VmRSS")
    line = {"decode": decode, "train": train, "loss": loss}[part](args, model, int(n))
    name = {"loss": "loss" if n == "1" else "loss, states"}.get(part, part)
    return {
        "part": name,
        **({} if part == "loss" else {"batch": int(n)}),
        **line,
        "rss_start_mib": start,
        "peak_part_mib": line["peak_mib"] - start,
    }


def main(argv):
    """Parses the flags, measures every case in a process of its own and prints the results."""

    def numbers(word):
        return [int(n) for n in word.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=lambda word: word.split(","), default=list(PARTS))
    parser.add_argument("--size", choices=drawing.SIZES, default="mid")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype"
    )
    parser.add_argument("--decode_batch", type=numbers, default=[1, 4, 16])
    parser.add_argument("--train_batch", type=numbers, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--rows", type=int, default=1025, help="rows of the loss")
    parser.add_argument(
        "--vocabulary", type=int, default=152064, help="entries of each row of the loss"
    )
    usual = config_lib.default()
    parser.add_argument(
        "--chunk", type=int, default=usual.divergence.chunk, help="see DivergenceConfig"
    )
    for name in ("query_block", "unroll", "remat"):
        parser.add_argument(
            f"--{name}",
            type=type(usual.model[name]),
            default=usual.model[name],
            help="see ModelConfig",
        )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each program")
    parser.add_argument("--json", type=pathlib.Path, help="file for the JSON objects")
    parser.add_argument("--case", help="PART:BATCH, for the processes that this one starts")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        sys.exit(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    if args.case:
        print(json.dumps(run(args)))
        return
    lines = []
    for part, n in cases(args):
        done = subprocess.run(
            [sys.executable, __file__, *argv, f"--case={part}:{n}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{part}:{n} failed with {done.returncode}: {done.stdout}")
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(lines[-1]), flush=True)
    drawing.show(
        lines,
        [
            "part",
            "batch",
            "seconds",
            "cpu_seconds",
            "cpu_seconds_per_token",
            "cpu_seconds_per_sample",
            "tokens_per_second",
            "compile_seconds",
            "rss_start_mib",
            "peak_mib",
            "run_mib",
            "arguments_mib",
            "outputs_mib",
            "temporary_mib",
            "alias_mib",
        ],
    )
    if args.json:
        unfinished = args.json.with_name(args.json.name + ".part")
        unfinished.write_text(json.dumps(lines, indent=1) + "\n")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
