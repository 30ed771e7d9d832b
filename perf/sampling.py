"""What finished sequences cost in the sampler, and what a queue saves.

  python perf/sampling.py --size=mid --slots=0,8,16

Samples --rows answers of very different lengths with the lanes of --slots (0: one per sequence) and
prints seconds, tokens per second, and the share of lanes over all decoding steps that held an
unfinished sequence.

Lengths: the head's weights are zero, so that each of the --mean tokens of the vocabulary is sampled
with the same probability, eos too. Lengths are geometric with that mean, cut at --budget. Contexts
as in perf/answering.py, at --problem. Every figure is the median of --repeats runs after one
that does not count; programs are compiled before.
"""

import dataclasses
import json
import statistics
import sys

import drawing
import jax
import numpy as np

from opsd_jax import context, rollout


def numbers(word):
    """Comma-separated whole numbers of a flag."""
    return [int(n) for n in word.split(",")]


def main(argv):
    """Parses the flags, times every number of lanes and prints the results."""
    parser = drawing.options(__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--mean", type=int, default=200, help="tokens, and size of the vocabulary")
    parser.add_argument("--budget", type=int, default=1024, help="most tokens of a row")
    parser.add_argument("--slots", type=numbers, default=[0, 16])
    parser.add_argument(
        "--refill", type=numbers, default=[0], help="for each of --slots; 0: a quarter"
    )
    args = parser.parse_args(argv)
    m = drawing.model(args.size, dtype=args.dtype, query_block=args.query_block, unroll=args.unroll)
    m = dataclasses.replace(
        m, generation=None, llm=dataclasses.replace(m.llm, vocab_size=max(args.mean, 8))
    )
    params = drawing.random_params(m)
    params["llm"]["head"] = params["llm"]["head"] * 0
    base = rollout.RolloutConfig(
        m,
        bos=drawing.TOKENIZER.bos,
        eos=1,
        marker=rollout.Marker.build([], m.llm.vocab_size),
        max_new_tokens=args.budget,
    )
    rng = np.random.default_rng(0)
    seen = drawing.vit_image(rng, args.problem, m)
    rows = [[seen, drawing.text(rng, 60, m)] for _ in range(args.rows)]
    packed = jax.device_put(
        context.pack(
            rows,
            context.need(rows[0]),
            side=m.vit.side,
            tokenizer=drawing.TOKENIZER,
        )
    )
    lines, key, fed = [], jax.random.key(0), None
    for width, refill in [(s, r) for s in args.slots for r in (args.refill if s else [0])]:
        config = dataclasses.replace(base, slots=width, refill=refill)
        sample, made = drawing.compiled(rollout.sample, params, packed, key, config=config)
        runs = [drawing.timed(sample, params, packed, key) for _ in range(args.repeats + 1)]
        found, seconds = runs[0][0], statistics.median(s for _, s in runs[1:])
        if fed is not None and not np.array_equal(fed, found.fed):
            sys.exit(f"--slots={width} drew other tokens than the ones before")
        fed, tokens = np.asarray(found.fed), int(found.mask.sum())
        lines.append(
            {
                **drawing.about("sampling", args, m, params),
                "rows": args.rows,
                "slots": width or args.rows,
                "refill": config.group if width else 0,
                "mean_tokens": tokens / args.rows,
                "longest": int(found.num_fed.max()),
                "steps": int(found.ended.max()),
                "utilisation": float(rollout.utilisation(found, width)),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "runs": [s for _, s in runs[1:]],
                **made,
                "peak_mib": drawing.peak_mib(),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    drawing.show(
        lines,
        [
            "rows",
            "slots",
            "refill",
            "mean_tokens",
            "steps",
            "utilisation",
            "seconds",
            "tokens_per_second",
            "temporary_mib",
            "compile_seconds",
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
