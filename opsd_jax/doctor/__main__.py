"""Checks a new machine before more of its time is paid for.

  python -m opsd_jax.doctor --workdir=W --out=doctor.json

  devices    kind and number; whether an accelerator is there but not used
  versions   of Python and packages; whether libtpu or the CUDA plugin belongs to jax
  memory     of devices and host
  disk       free space at the workdir against the checkpoints of the run
  files      what the workdir's file system does: close, list, rename, fsync; its speed
  network    with several processes: all-reduce, one workdir for all
  matmul     rate of matrix products against the data sheet, in bfloat16 and float32
  bandwidth  of the memory, against the data sheet
  attention  the platform's kernels against dense attention in float32, with gradients; their speed
  decode     sampling, with random weights, beside what `plan` models
  update     a step of OPSD, in the same way
  image      image generation, in the same way

Shapes are those of ThinkMorph-7B, or of the run of --config; on a CPU small ones without --config.
Where the model does not fit into memory, fewer layers of it are measured and all are extrapolated.
An accelerator is measured for at most 8 minutes, a CPU for one. Several processes, started as those
of a run, each check their own devices, and the network between them. The exit code is 0 only if all
checks that ran hold, and 3 if one failed.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from opsd_jax import config_check, config_flags
from opsd_jax.doctor import (
    kernels,
    machine,
    network,
    rates,
    report,
    result,
    sizes,
    speed,
    storage,
)
from opsd_jax.doctor.result import Check, SkipError
from opsd_jax.inputs import checks, cli, paths
from opsd_jax.plan import bill
from opsd_jax.plan import topology as topology_lib
from opsd_jax.run import attention_check
from opsd_jax.runtime import distributed, files

NAMES = (
    "devices",
    "versions",
    "memory",
    "disk",
    "files",
    "network",
    "matmul",
    "bandwidth",
    "attention",
    "decode",
    "update",
    "image",
)
EXIT_FAILED = 3


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exit code 3 if a check failed, 1 for wrong arguments."""
    cli.start()
    argv = sys.argv[1:] if argv is None else argv
    changes = [argument for argument in argv if argument.startswith("--config.")]
    args = _parser().parse_args([argument for argument in argv if argument not in changes])
    began = time.monotonic()
    try:
        only = args.only or NAMES
        checks.names("--only", only, NAMES)
        _check_paths(args.workdir, args.out)
        cli.check_precision()
        if changes and not args.config:
            raise ValueError(f"{changes[0]}: give --config=FILE first, such as configs/mini.py")
        config = config_flags.read([f"--config={args.config}", *changes]) if args.config else None
        if config:
            config_check.check(config)
        distributed.initialize()
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    if jax.process_count() > 1:
        # JAX's service for runs that save would swallow the signal; here is nothing to save.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:  # its times do not count: compile fast
        jax.config.update("jax_disable_most_optimizations", True)
    scale = sizes.CPU if on_cpu else sizes.ACCELERATOR
    config = config or sizes.default_config(jax.default_backend())
    made = _checks(config, scale, args.workdir, began)
    found = result.run({name: made[name] for name in NAMES if name in only})
    raised = [one for one in found if (one.name, one.status) == ("network", result.FAILED)]
    if raised and jax.process_count() > 1:
        # The others may wait in another collective: nothing can be gathered.
        print(report.table(report.report([report.to_json(found)], {}, time.monotonic() - began)))
        distributed.end_with_error(f"the processes cannot be joined: {raised[0].summary}")
    whole = report.report(
        network.gather(report.to_json(found)),
        sizes.described(config, scale),
        time.monotonic() - began,
    )
    if jax.process_index() == 0:
        print(report.table(whole))
        if args.out:
            files.write_json(args.out, whole)
    sys.exit(0 if whole["ok"] else EXIT_FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m opsd_jax.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        default="",
        help="folder that runs will write to, on the disk or bucket to check (default: files are "
        "not checked)",
    )
    parser.add_argument("--out", default="", help="also write all results to this JSON file")
    parser.add_argument(
        "--only",
        type=cli.names,
        default=(),
        help=f"checks to run, separated by commas: {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument(
        "--config",
        default="",
        help="file of a run's settings, whose shapes and checkpoints count (default: those of the "
        "paper, ThinkMorph-7B; on a CPU small ones)",
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="a setting, such as --config.model.attention=flash"
    )
    parser.settings = config_flags.options()
    return parser


def _check_paths(workdir: str, out: str) -> None:
    """ValueError or OSError for paths that cannot be used, before minutes of measuring."""
    paths.check("--workdir", workdir, orbax=True)
    if workdir:
        paths.check_writable("--workdir", workdir)
        os.makedirs(workdir, exist_ok=True)
    if out:
        paths.check("--out", out)
        if os.path.isdir(out):
            raise ValueError(f"--out={out} is a folder: name a file, such as {out}/doctor.json")
        paths.check_writable("--out", os.path.dirname(os.path.abspath(out)))


def _checks(config: ConfigDict, scale: sizes.Scale, workdir: str, began: float) -> dict[str, Check]:
    """All checks by name, of the devices of this process."""
    devices = jax.local_devices()
    topology = topology_lib.of_devices(devices)
    chip = topology.chip if topology else None
    limits = result.Limits(began + scale.total, scale.measurement)
    setting = speed.Setting(
        config,
        devices,
        sizes.memory(devices[0]),
        tokens=scale.tokens,
        pixels=scale.pixels,
        steps=scale.steps,
        limits=limits,
    )

    def in_workdir(check: Check) -> Check:
        def checked():
            if not workdir:
                raise SkipError("no --workdir")
            yield from check()

        return checked

    def attention():
        cases = attention_check.cases_of(config, scale.tokens)
        platform, found = devices[0].platform, []
        kernel = attention_check.OF_PLATFORM.get(platform, "dense")
        kinds = tuple(dict.fromkeys(("dense", kernel)))
        for one in kernels.checks(cases, kinds, config.model.query_block, limits):
            found.append(one)
            yield one
        if config.model.attention == "auto":  # what follows measures what a run would take
            taken = kernels.taken(found, attention_check.candidate(config, platform))
            config.model.attention = taken

    def between_processes():
        yield from network.all_reduce(jax.devices(), scale.sent)
        if workdir:
            yield from network.shared_workdir(workdir)

    return {
        "devices": lambda: machine.devices(devices),
        "versions": lambda: machine.versions(devices[0].platform),
        "memory": lambda: machine.memory(devices),
        "disk": in_workdir(lambda: storage.disk(workdir, bill.checkpoints_of_run(config)[1])),
        "files": in_workdir(lambda: storage.semantics(workdir, scale.file)),
        "network": between_processes,
        "matmul": lambda: rates.products(devices, chip, scale.matrix, scale.measurement),
        "bandwidth": lambda: rates.bandwidth(devices, chip, scale.array, scale.measurement),
        "attention": attention,
        "decode": lambda: speed.decode(setting),
        "update": lambda: speed.update(setting),
        "image": lambda: speed.image(setting),
    }


if __name__ == "__main__":
    main()
