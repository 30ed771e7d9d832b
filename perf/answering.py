"""Seconds of text-only answering, with random weights.

  python perf/answering.py --size=tiny|mid|7b

Greedy decoding of --tokens tokens after the system prompt (110 ids), the problem image as ViT
patches and the question (60 ids), at each batch size of --batch. The model is built without the
generation expert. Its eos id is past the end of the vocabulary, so no answer ends early. Every
figure is the median of --repeats runs after one that does not count; programs are compiled before
and not timed. Prints one JSON object per batch size, then a table.
"""

import dataclasses
import functools
import json
import statistics
import sys

import drawing
import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import context, rollout
from opsd_jax.model import bagel


@functools.partial(jax.jit, static_argnames=("config",))
def prefill(params, contexts, *, config: rollout.RolloutConfig):
    """What `rollout.sample` does before its first token: (hidden, cache)."""
    model, (batch, slots) = config.model, contexts.rope_positions.shape
    segment = jnp.pad(contexts.segment, ((0, 0), (0, config.max_new_tokens)))
    cache = bagel.init_cache(batch, slots + config.max_new_tokens, config=model)
    return bagel.read(params, contexts, config=model, cache=cache, key_segment=segment)


def main(argv):
    """Parses the flags, times every batch size and prints the results."""
    parser = drawing.options(__doc__)
    parser.add_argument("--tokens", type=int, default=201, help="tokens of an answer")
    parser.add_argument(
        "--batch", type=lambda word: [int(n) for n in word.split(",")], default=[1, 16]
    )
    args = parser.parse_args(argv)
    m = drawing.model(args.size, dtype=args.dtype, query_block=args.query_block, unroll=args.unroll)
    m = dataclasses.replace(m, generation=None)
    params = drawing.random_params(m)
    # budget: the tokens and the bos that is fed before them; each takes a pass of the decoder
    config = rollout.RolloutConfig(
        m,
        bos=drawing.TOKENIZER.bos,
        eos=m.llm.vocab_size,
        greedy=True,
        marker=rollout.Marker.build([], m.llm.vocab_size),
        max_new_tokens=args.tokens + 1,
    )
    rng = np.random.default_rng(0)
    seen = drawing.vit_image(rng, args.problem, m)
    row = [drawing.text(rng, 110, m), seen, drawing.text(rng, 60, m)]
    need = sum(b.length for b in row)
    if args.context and args.context < need:
        sys.exit(f"--context={args.context}: the context takes {need} positions")
    lines = []
    for batch in args.batch:
        packed = jax.device_put(
            context.pack(
                [row] * batch,
                context.Sizes(args.context or need, len(seen.patches)),
                side=m.vit.side,
                tokenizer=drawing.TOKENIZER,
            )
        )
        key = jax.random.key(0)
        sample, made = drawing.compiled(rollout.sample, params, packed, key, config=config)
        read, made_read = drawing.compiled(prefill, params, packed, config=config)
        whole = [drawing.timed(sample, params, packed, key) for _ in range(args.repeats + 1)]
        first = [drawing.timed(read, params, packed)[1] for _ in range(args.repeats + 1)][1:]
        if not all(bool(trajectory.mask.all()) for trajectory, _ in whole):
            sys.exit("an answer ended before --tokens")
        seconds, prefilling = statistics.median(s for _, s in whole[1:]), statistics.median(first)
        decoding = seconds - prefilling
        lines.append(
            {
                **drawing.about("answering", args, m, params),
                "batch": batch,
                "tokens": args.tokens,
                "problem": "x".join(map(str, args.problem)),
                "context_positions": packed.padded_length,
                "seconds": seconds,
                "prefill": prefilling,
                "ms_per_token": 1e3 * decoding / config.max_new_tokens,
                "tokens_per_second": batch * args.tokens / seconds,
                "runs": [s for _, s in whole[1:]],
                "prefill_runs": first,
                **made,
                "prefill_temporary_mib": made_read["temporary_mib"],
                "cache_mib": 2
                * np.dtype("uint16" if args.dtype == "bfloat16" else args.dtype).itemsize
                * m.llm.num_layers
                * batch
                * (packed.padded_length + config.max_new_tokens)
                * m.llm.num_kv_heads
                * m.llm.head_dim
                / drawing.MIB,
                "peak_mib": drawing.peak_mib(),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    drawing.show(
        lines,
        [
            "batch",
            "tokens",
            "seconds",
            "prefill",
            "ms_per_token",
            "tokens_per_second",
            "context_positions",
            "temporary_mib",
            "cache_mib",
            "peak_mib",
            "compile_seconds",
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
