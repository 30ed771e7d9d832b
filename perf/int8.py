"""What int8 weights change in the samples of a trained run: python perf/int8.py --workdir=W

Answers the first --rows test examples of the run's first task twice, with the weights and with
their matrices rounded to int8 (`rollout.int8`), greedily and at the run's temperature with the same
random numbers. Prints one JSON object for each, and then a table:

  tokens       of the answers with the weights
  equal        share of these tokens that int8 chooses, too, at the same place of the same answer
  answers      share of the answers that are equal, every token of them
  difference   mean and largest |log-probability with int8 - without| of a sampled token, in nats,
               over the tokens up to the first that differs
"""

import argparse
import json

import jax
import numpy as np

from opsd_jax import rollout
from opsd_jax.run import session as session_lib
from opsd_jax.runtime import checkpoint


def compare(one: rollout.Trajectory, other: rollout.Trajectory) -> dict[str, float]:
    """The figures of trajectories without int8 and with it, [B, N]."""
    equal = (one.tokens == other.tokens) & (one.mask == other.mask)
    until = np.cumprod(np.pad(equal, ((0, 0), (1, 0)), constant_values=True)[:, :-1], axis=1)
    shared = equal & one.mask & until.astype(bool)
    difference = np.abs(other.logprobs - one.logprobs)[shared]
    return {
        "tokens": int(one.mask.sum()),
        "equal": float((equal & one.mask).sum() / one.mask.sum()),
        "answers": float(equal.all(axis=1).mean()),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Prints the figures of a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--workdir", required=True, help="a finished run")
    parser.add_argument("--rows", type=int, default=256, help="test examples")
    args = parser.parse_args(arguments)
    run = session_lib.open_run(args.workdir)
    params = run.restore_params(checkpoint.resolve(args.workdir))
    examples = run.examples("test")
    rows = [examples(0, n) for n in range(min(args.rows, len(examples.sources[0])))]
    context = run.packer.student(rows)
    found = {}
    for name, settings in (
        ("greedy", run.evaluation_sampling(slots=0)),
        ("sampled", run.sampling(max_new_tokens=run.answer_budget, slots=0)),
    ):
        pair = [
            jax.device_get(
                rollout.sample(
                    run.for_sampling(params, int8=int8), context, jax.random.key(0), config=settings
                )
            )
            for int8 in (False, True)
        ]
        found[name] = compare(*pair)
        print(json.dumps({"samples": name, "rows": len(rows), **found[name]}))
    print("\n| samples | tokens | equal tokens | equal answers | difference, nats: mean, largest |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['tokens']:,} | {row['equal']:.2%} | {row['answers']:.1%} | "
            f"{row['mean_difference']:.2g}, {row['largest_difference']:.2g} |"
        )


if __name__ == "__main__":
    main()
