"""What a step and a whole run take of a TPU topology you do not have.

    python -m opsd_jax.plan --config=C --topology=v5p:2x2x2

  settings -> shapes of state, contexts and trajectory, cut over the mesh -> `rollout.sample` and
  `distill.update`, traced and compiled for the slice as the run would -> bill -> hours,
  checkpoints and dollars of the run

The compiler for TPUs (libtpu) runs on any Linux machine and assigns real buffers, so a program that
does not fit fails here as it would on the slice. What this does not tell: numerics, measured speed,
and what the runtime keeps for itself. `--topology=cpu:8` compiles for eight fake devices, anywhere;
its temporary memory says little about a TPU.

`--stage=eval` and `--stage=generate` say the same of answering questions, and how long N of them
take.

While the student samples, the whole training state is in memory, too, and is added to the program's
peak; the copy of the parameters that sampled is gone when the update begins.
"""

import os
import sys

from absl import app, flags

from opsd_jax import (
    config_flags,  # defines --config
    interleave,
    sharding,
)
from opsd_jax.inputs import cli, paths
from opsd_jax.plan import bill, budget, programs, table, topology
from opsd_jax.runtime import distributed, files

flags.DEFINE_string("topology", "", "v5p:2x2x2, a name such as v5e-64, or cpu:8")
flags.DEFINE_integer("slices", 1, "slices of that topology, joined by the data-centre network")
flags.DEFINE_enum("only", "", ["", *programs.STEP], "compile this program alone")
flags.DEFINE_string(
    "stage",
    "",
    "stages of the config, separated by commas (default: opsd if it has one, else its first); or "
    "eval, or generate: answers of the model, without images or with",
)
flags.DEFINE_integer("bucket", -1, "which of config.data.buckets; -1 is the largest")
flags.DEFINE_float("hbm", 0, "GiB of a device (default, or 0: as many as the chip has)")
flags.DEFINE_bool(
    "quick", False, "compile with less effort: three times faster, peaks some 5 % off"
)
flags.DEFINE_float(
    "write_speed", budget.WRITE_SPEED, "GB per second that each host writes of a checkpoint"
)
flags.DEFINE_float(
    "price_per_chip_hour", None, "dollars of a chip for an hour; prints those of the whole run"
)
flags.DEFINE_integer(
    sharding.AXES[-1],
    0,
    "devices of a copy that answers questions (eval, generate); 0: as the commands choose",
)
flags.DEFINE_integer("questions", 1000, "number of questions whose hours are printed")
flags.DEFINE_enum(
    "protocol", "paper", [*interleave.PROTOCOLS], "how questions are asked (eval, generate)"
)
flags.DEFINE_string("out", "", "also write the report to this JSON file")


def main(argv: list[str]) -> None:
    """The command; exit code 3 if something does not fit."""
    cli.start()
    f = flags.FLAGS
    if f.config is None:
        sys.exit("error: --config is missing: give a file of settings, --config=configs/mini.py")
    if not f.topology:
        sys.exit("error: --topology is missing: give a slice, --topology=v5p:2x2x2, or cpu:8")
    try:
        if f.out:
            _check_out(f.out)
        report = bill.plan(
            f.config,
            topology.parse_topology(f.topology, f.slices),
            bill.Options(
                stage=f.stage,
                only=f.only,
                bucket=f.bucket,
                hbm=f.hbm,
                quick=f.quick,
                write_speed=f.write_speed,
                price=f.price_per_chip_hour,
                tensor=f.tensor,
                questions=f.questions,
                protocol=f.protocol,
            ),
        )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    print(table.table(report))
    if f.out:
        files.write_json(f.out, report)
    sys.exit(0 if report["fits"] else 3)


def _check_out(path: str) -> None:
    """ValueError or OSError for a file that cannot be written, before minutes of compiling."""
    paths.check("--out", path)
    if os.path.isdir(path):
        raise ValueError(
            f"--out={path} is a folder: name a file, such as {os.path.join(path, 'plan.json')}"
        )
    folder = os.path.dirname(os.path.abspath(path))
    paths.check_writable("--out", folder)
    os.makedirs(folder, exist_ok=True)


if __name__ == "__main__":
    app.run(main, flags_parser=config_flags.parse_flags)
