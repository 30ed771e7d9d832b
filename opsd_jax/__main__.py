"""All commands by one name: `opsd train ...` is `python -m opsd_jax.train ...`, and so on."""

import difflib
import runpy
import sys
from collections.abc import Sequence

from opsd_jax.inputs import cli

COMMANDS = {
    "train": "a training run and its control arms",
    "study": "a grid of runs and control arms, and one table of them",
    "eval": "accuracy, tokens and seconds on a split or on public benchmarks",
    "diagnose": "divergence per token, interventions and attention of a run",
    "generate": "one answer, with generated images if asked",
    "convert": "released checkpoints in and out",
    "data": "your data, or the procedural tasks, as files that training reads",
    "redraw": "a data set with visual thoughts that a model generated",
    "plan": "memory, traffic and time of a training step on a TPU slice",
    "doctor": "checks of a new machine: devices, disk, network, kernels, speed",
}


def main(argv: Sequence[str] | None = None) -> None:
    """`opsd COMMAND ...`. Without a command it lists them; an unknown one ends it with code 2."""
    cli.start()
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: opsd COMMAND ...     (opsd COMMAND --help shows its options)\n")
        for command, does in COMMANDS.items():
            print(f"  {command:{width}}  {does}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else "."
        print(f"error: no command {name!r}{meant} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [name, *rest]
    runpy.run_module(f"opsd_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
