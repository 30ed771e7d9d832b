"""Decoding and the update beside plain PyTorch on this machine, as ratios.

  python -m venv VENV && VENV/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
  python perf/against_torch.py --torch_python=VENV/bin/python --rounds=5

Seconds on a CPU do not travel to another machine, ratios nearly do. Ours are the parts of
perf/step.py with its default settings, theirs those of perf/torch_baseline.py: the same model,
inputs and update in float32, on all cores that this process may use. In every round each case runs
once on each side, one after the other, ours first in every other round. A run is a process of its
own: one call that does not count, then the median of --repeats calls. Ratios are theirs over ours
in the same round (above 1, ours is faster or smaller); the table has their median and range.

  memory           peak of the process. Ours includes compilation
  share of peak    of the fastest float32 product of two square matrices that either library
                   managed in any round: the operations of the update over median seconds and this.
                   The operations are counted by formula (`update_operations`), for both sides the
                   same: recomputation is work, but not counted

Prints one JSON object per run, then the table; --json=FILE has the objects of all complete rounds
as one list.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import drawing
import jax
import jax.numpy as jnp
import step

from opsd_jax.model.config import ModelConfig

FOLDER = pathlib.Path(__file__).parent
SIDES = ("ours", "torch")
PEAK_SIZES, PEAK_REPEATS = (1024, 2048, 3072), 3  # as in torch_baseline.py
INSTALL = "VENV/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu"


# --- counts and the table -------------------------------------------------------------------------


def update_operations(model: ModelConfig, line: dict) -> int:
    """Floating point operations of the matrix products that an update cannot do without.

    The teacher's forward pass, and three times the student's: forward, gradients of inputs, and of
    weights. Attention counts all pairs of positions, in the vision tower those of one image.

    Args:
      model: sizes of the network. line: what step.py printed of the part "train".
    """
    c, v, patches = model.llm, model.vit, step.GRID[0] * step.GRID[1]
    heads = c.num_heads + 2 * c.num_kv_heads
    per_position = c.num_layers * (
        c.hidden_size * heads * c.head_dim
        + c.num_heads * c.head_dim * c.hidden_size
        + 3 * c.hidden_size * c.intermediate_size
    )
    per_pair = 2 * c.num_layers * c.num_heads * c.head_dim
    per_image = patches * (
        v.patch_dim * v.hidden_size
        + v.num_layers * v.hidden_size * 2 * (2 * v.hidden_size + v.intermediate_size + patches)
        + (v.hidden_size + c.hidden_size) * c.hidden_size
    )
    scores = (line["tokens"] + 1) * c.hidden_size * c.vocab_size

    def forward(positions, images):
        return positions * (per_position + positions * per_pair) + images * per_image + scores

    student, teacher = forward(line["student_positions"], 1), forward(line["teacher_positions"], 3)
    return 2 * line["batch"] * (3 * student + teacher)


def check_parameters(lines: list[dict]) -> None:
    """Ends the program unless both sides have models of the same size."""
    counts = {(x["side"], x["parameters"]) for x in lines if "parameters" in x}
    if len({count for _, count in counts}) > 1:
        found = " and ".join(f"{count:,} ({side})" for side, count in sorted(counts))
        sys.exit(
            f"the models have {found} parameters: make SIZES of torch_baseline.py equal to that of "
            "drawing.py"
        )


def ratio(pairs: list[tuple[dict, dict]], field: str) -> str:
    """Median and range of theirs over ours, of runs (ours, theirs)."""
    found = [theirs[field] / ours[field] for ours, theirs in pairs]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def table(lines: list[dict]) -> str:
    """The Markdown table of recorded runs.

    Args:
      lines: of each run "side", "round", "part" and what its program printed; at least one run of
        the part "peak".
    """
    check_parameters(lines)
    peak = max(x["operations_per_second"] for x in lines if x["part"] == "peak")
    columns = (
        "case",
        "ours, s",
        "PyTorch, s",
        "PyTorch / ours",
        "CPU-seconds, PyTorch / ours",
        "memory, PyTorch / ours",
        "share of peak, ours",
        "PyTorch",
    )
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    measured = [x for x in lines if x["part"] != "peak"]
    for part, batch in dict.fromkeys((x["part"], x["batch"]) for x in measured):
        ours, theirs = (
            {
                x["round"]: x
                for x in measured
                if (x["side"], x["part"], x["batch"]) == (side, part, batch)
            }
            for side in SIDES
        )
        pairs = [(ours[n], theirs[n]) for n in ours]
        seconds = [statistics.median(pair[n]["seconds"] for pair in pairs) for n in (0, 1)]
        shares = ["–", "–"]
        if part == "train":
            operations = update_operations(drawing.SIZES[pairs[0][0]["size"]], pairs[0][0])
            shares = [f"{100 * operations / s / peak:.0f} %" for s in seconds]
        name = {"train": "update"}.get(part, part)
        cells = (
            f"{name}, batch {batch}",
            *(f"{s:.3g}" for s in seconds),
            *(ratio(pairs, field) for field in ("seconds", "cpu_seconds", "peak_mib")),
            *shares,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


# --- runs -----------------------------------------------------------------------------------------


def our_peak() -> float:
    """Operations per second of the fastest float32 product of two square matrices in JAX."""
    rates, product = [], jax.jit(jnp.matmul)
    for n in PEAK_SIZES:
        a, b = jax.random.normal(jax.random.key(0), (2, n, n))
        for _ in range(PEAK_REPEATS + 1):
            start = time.perf_counter()
            jax.block_until_ready(product(a, b))
            rates.append(2 * n**3 / (time.perf_counter() - start))
    return max(rates)


def command(side: str, part: str, batch: int, args) -> list[str]:
    """The program that runs one case on one side."""
    if side == "ours" and part == "peak":
        return [sys.executable, __file__, "--our_peak"]
    common = [f"--size={args.size}", f"--tokens={args.tokens}", f"--repeats={args.repeats}"]
    if side == "ours":
        own = [f"--parts={part}", f"--{part}_batch={batch}"]
        return [sys.executable, str(FOLDER / "step.py"), *own, *common]
    own = [f"--part={part}", f"--batch={batch}"]
    return [args.torch_python, str(FOLDER / "torch_baseline.py"), *own, *common]


def run(side: str, part: str, batch: int, number: int, args) -> dict:
    """What one run printed, with its side and the number of its round."""
    words, env = command(side, part, batch, args), {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    line = next(json.loads(s) for s in done.stdout.splitlines() if s.startswith("{"))
    return {"side": side, "round": number, **line}


def check_python(path: str) -> None:
    """Ends the program, saying what to do, unless `path` is a Python that has PyTorch."""
    try:
        done = subprocess.run([path, "-c", "import torch"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(
            f"--torch_python={path}: {error.strerror}: make a virtual environment of its own, "
            f"python -m venv VENV && {INSTALL}, and give VENV/bin/python"
        )
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"ended with {done.returncode}"])[-1]
        sys.exit(
            f"--torch_python={path} cannot import torch ({reason}): install it there, {INSTALL}; "
            "opsd_jax does not need it, so give it a virtual environment of its own, "
            "python -m venv VENV"
        )


def main(argv):
    """Parses the flags, runs both sides alternately and prints the table."""

    def numbers(word):
        return [int(n) for n in word.split(",") if n]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python", help="the Python of the environment with PyTorch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("tiny", "mid"), default="mid")
    parser.add_argument("--decode_batch", type=numbers, default=[1, 16])
    parser.add_argument("--train_batch", type=numbers, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a run")
    parser.add_argument("--json", type=pathlib.Path, help="file for the JSON objects")
    parser.add_argument("--our_peak", action="store_true", help="for a process that this starts")
    args = parser.parse_args(argv)
    if args.our_peak:
        print(json.dumps({"part": "peak", "operations_per_second": our_peak()}))
        return
    if not args.torch_python:
        parser.error("--torch_python is missing: the Python of a virtual environment with PyTorch")
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: give at least 1")
    check_python(args.torch_python)
    cases = [("peak", 0), *(("decode", n) for n in args.decode_batch)]
    cases += [("train", n) for n in args.train_batch]
    lines = []
    for number in range(args.rounds):
        for part, batch in cases:
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                lines.append(run(side, part, batch, number, args))
                print(json.dumps(lines[-1]), flush=True)
        check_parameters(lines)
        if args.json:
            unfinished = args.json.with_name(args.json.name + ".part")
            unfinished.write_text(json.dumps(lines, indent=1) + "\n")
            os.replace(unfinished, args.json)
    print(table(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
