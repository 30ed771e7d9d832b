"""What a step takes of each device of a topology: memory, traffic and time of its programs."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check, sharding
from opsd_jax import params as params_lib
from opsd_jax.inputs import checks, cli
from opsd_jax.plan import advice, answers, budget, flops, hlo, programs
from opsd_jax.plan import topology as topology_lib
from opsd_jax.run import placement, saves
from opsd_jax.runtime import chips
from opsd_jax.runtime.chips import GIB

UTILIZATION = 0.5  # share of the peak that matrix products are assumed to reach
# Two ways in which libtpu says how much memory a program wants, arguments and all.
_NEEDS = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned, how it is compiled, and what the run costs: the command's options.

    stage: names of stages, separated by commas; "" for opsd if the config has it, else its first.
    only, bucket: see `programs.programs`.
    hbm: GiB per device; 0 for the chip's own.
    quick: compile with less effort.
    write_speed: GB per second that each host writes of a checkpoint.
    price: dollars of a chip for an hour; None if unknown.
    tensor: devices of a copy of the model that answers questions; 0 for `placement.fastest`.
    questions: how many questions are answered. protocol: by which they are asked.
    """

    stage: str = ""
    only: str = ""
    bucket: int = -1
    hbm: float = 0
    quick: bool = False
    write_speed: float = budget.WRITE_SPEED
    price: float | None = None
    tensor: int = 0
    questions: int = 1000
    protocol: str = "paper"


def plan(
    config: ConfigDict, topology: topology_lib.Topology, options: Options = Options()
) -> dict[str, Any]:
    """The report that --out writes: topology, mesh, parameters, bills, budget of the whole run.

    Raises:
      ValueError: settings that no run would start with, no compiler for the topology, or a price
      for which no time would be modelled.
    """
    cli.check_precision()
    config_check.check(config)
    if options.stage in answers.STAGES:
        return _plan_answers(config, topology, options)
    stages = _stages(config, options.stage)
    checks.number("--write_speed", options.write_speed, float, "(0, inf)")
    if options.price is not None:
        _check_price(options.price, config, topology, stages, options.only)
    bound = options.hbm or topology.hbm
    mesh = sharding.make_mesh(**config.mesh, devices=topology_lib.devices_of(topology))
    traced = [
        (name, program)
        for name in stages
        for program in programs.programs(config, name, mesh, options.bucket, options.only)
    ]
    if options.quick:
        jax.config.update("jax_optimization_level", "O1")
    bills = [{"stage": name} | bill(program, topology, bound) for name, program in traced]
    for one in bills:
        one["advice"] = [] if one["fits"] else advice.advice(one, config, one["stage"], mesh)
    hosts = len({device.process_index for device in mesh.devices.flat})
    return _head(topology, options, mesh) | {
        "rollout_mesh": dict(placement.of_rollouts(config, mesh).shape),
        "stage": ",".join(stages),
        "bucket": options.bucket,
        "parameters": params_lib.count(traced[0][1].arguments["params"]),
        "fits": all(one["fits"] for one in bills),
        "programs": bills,
        "run": budget_of_run(config, bills, topology, hosts, options.write_speed, options.price),
    }


def _plan_answers(
    config: ConfigDict, topology: topology_lib.Topology, options: Options
) -> dict[str, Any]:
    """`plan` of answering questions: the programs of one host, and what N questions take."""
    stage, price = options.stage, options.price
    if options.only or options.bucket != -1:
        raise ValueError(
            f"--stage={stage} with --only or --bucket: they are of training; leave them out"
        )
    checks.number("--questions", options.questions, int, "[1, inf)")
    checks.number("--tensor", options.tensor, int, "[0, inf); 0 as the commands choose")
    if price is not None:
        _check_price(price, config, topology, list(config.stages), "")
    bound = options.hbm or topology.hbm
    host, hosts = topology_lib.of_a_host(topology, topology_lib.devices_of(topology))
    devices = topology_lib.devices_of(host)
    platform = devices[0].platform
    model = answers.model_of(config, stage, options.protocol, platform)
    batch_size = config.eval.batch_size
    mesh = placement.mesh_within(
        model.config,
        devices,
        placement.cache_of(model, batch_size),
        memory=bound and bound * GIB,
        tensor=options.tensor,
        otherwise=max(config.mesh.tensor, 1),
    )
    copies = sharding.batch_divisor(mesh)
    batch_size = -(-batch_size // copies) * copies
    calls = answers.calls(model, mesh, batch_size)
    if options.quick:
        jax.config.update("jax_optimization_level", "O1")
    bills = []
    for call in calls:
        one = {"stage": stage, "times": call.times} | bill(call.program, host, bound)
        one["advice"] = (
            [] if one["fits"] else advice.of_answers(one, model.config, mesh, batch_size)
        )
        bills.append(one)
    fits, seconds = all(one["fits"] for one in bills), None
    if fits and topology.chip:
        least, most = (
            sum(one["times"] * one["seconds"][kind] for one in bills)
            for kind in ("overlapped", "serial")
        )
        seconds = least, most
    return _head(topology, options, mesh) | {
        "stage": stage,
        "parameters": params_lib.count(placement.abstract_weights(model.config, mesh)),
        "fits": fits,
        "programs": bills,
        "answers": answers.outlook(
            model,
            seconds,
            batch_size=batch_size,
            hosts=hosts,
            chips=topology.chips,
            questions=options.questions,
            price=price,
        ),
    }


def _head(
    topology: topology_lib.Topology, options: Options, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """What a report says of the devices and of how the programs are compiled."""
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.devices,
        "hbm_gib": options.hbm or topology.hbm,
        "mesh": dict(mesh.shape),
        "versions": {"jax": jax.__version__, "libtpu": _version("libtpu")},
        "quick": options.quick,
    }


def _stages(config: ConfigDict, names: str) -> list[str]:
    """The stages that --stage names."""
    default = "opsd" if "opsd" in config.stages else config.stages[0]
    stages = list(cli.names(names or default))
    checks.names("--stage", stages, config_lib.STAGES)
    return stages


def _check_price(
    price: float,
    config: ConfigDict,
    topology: topology_lib.Topology,
    stages: list[str],
    only: str,
) -> None:
    """Raises ValueError for a price that is no price, or has no hours to multiply."""
    flag = "--price_per_chip_hour"
    checks.number(flag, price, float, "(0, inf)")
    if topology.chip is None:
        raise ValueError(
            f"{flag}={price:g} with --topology={topology.name}: no time is modelled for a CPU, "
            "name a slice of TPUs, or leave the price out"
        )
    if only:
        raise ValueError(
            f"{flag}={price:g} with --only={only}: dollars need all programs of a step, leave "
            "--only out"
        )
    if not set(stages) & set(config.stages):
        raise ValueError(
            f"{flag}={price:g} with --stage={','.join(stages)}: the run has the stages "
            f"{tuple(config.stages)}, name one of them"
        )


def budget_of_run(
    config: ConfigDict,
    bills: list[dict[str, Any]],
    topology: topology_lib.Topology,
    hosts: int,
    write_speed: float,
    price: float | None,
) -> dict[str, Any]:
    """The budget of a run, from the bills of its programs.

    Args:
      bills: of the stages that were planned, each with its "stage".
      hosts: machines that hold the chips.
      write_speed, price: as of `Options`.
    Returns:
      What `budget.budget` returns, with "checkpoints" and "checkpoints_bytes": the most that the
      run holds at once.
    """
    stages, saved = [], saves.of_run(config)
    for name in config.stages:
        seconds, why = _modelled(config, name, [one for one in bills if one["stage"] == name])
        stages.append(
            budget.StageOfRun(
                name=name,
                steps=config[name].steps,
                saves=sum(stage == name for _, stage in saved),
                checkpoint_bytes=programs.checkpoint_bytes(config, name),
                step_seconds=seconds,
                not_modelled=why,
                start_bytes=programs.start_bytes(config) if (0, name) in saved else 0,
            )
        )
    count, size = checkpoints_of_run(config)
    found = budget.budget(
        stages, chips=topology.chips, hosts=hosts, write_speed=write_speed, price=price
    )
    return found | {"checkpoints": count, "checkpoints_bytes": size}


def checkpoints_of_run(config: ConfigDict) -> tuple[int, int]:
    """Number and bytes of the checkpoints that a run holds when they take most."""
    sizes = {name: programs.checkpoint_bytes(config, name) for name in config.stages}
    start = programs.start_bytes(config)
    return budget.most_at_once(
        [(step, sizes[name] if step else start) for step, name in saves.of_run(config)],
        config.checkpoint.keep_latest,
        saves.never_deleted(config),
    )


def _modelled(
    config: ConfigDict, stage: str, bills: list[dict[str, Any]]
) -> tuple[tuple[float, float] | None, str]:
    """((least, most) seconds of a step of a stage, ""), or (None, why they are not modelled)."""
    if not programs.can_plan(config, stage):
        return None, "plan does not know its programs"
    if not bills:
        known = ",".join(name for name in config.stages if programs.can_plan(config, name))
        return None, f"not planned, --stage={known} does"
    if not all(one["fits"] for one in bills):
        return None, "it does not fit"
    if stage == "opsd" and len(bills) < len(programs.STEP):
        return None, f"leave out --only={bills[0]['program']}"
    if any(one["seconds"] is None for one in bills):
        return None, "no time is modelled for a CPU"
    least, most = (sum(one["seconds"][kind] for one in bills) for kind in ("overlapped", "serial"))
    return (least, most), ""


def _version(package: str) -> str | None:
    installed = importlib.util.find_spec(package)
    return importlib.metadata.version(package) if installed else None


def bill(
    program: programs.Program, topology: topology_lib.Topology, hbm: float | None = None
) -> dict[str, Any]:
    """Compiles a program and says what it takes of each device.

    docs/performance/plan.md describes every entry.

    A program that does not fit even alone comes back with `fits` False and what the compiler said
    it needs; other errors of the compiler are raised.

    hbm: GiB per device, None for no bound.
    """
    arguments = {kind: bytes_per_device(tree) for kind, tree in program.arguments.items()}
    beside = sum(bytes_per_device(tree) for tree in program.beside.values())
    operations = flops.matmul_flops(program.traced.jaxpr.jaxpr, program.trips)
    operations //= 1 if program.is_whole else topology.devices
    found = {
        "program": program.name,
        "fits": None,
        "hbm_gib": hbm,
        "needs_gib": None,
        "peak_gib": None,
        "beside_gib": beside / GIB,
        "bytes": arguments | {"beside": beside},
        "flops": {"traced": operations, "cost_analysis": None},
        "hbm_bytes": None,
        "collectives": None,
        "seconds": None,
    }
    platform = "cpu" if topology.family == "cpu" else "tpu"
    started = time.perf_counter()
    try:
        compiled = program.traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = max(_bytes_wanted(str(error)), sum(arguments.values())) + beside
        return found | {
            "fits": False,
            "needs_gib": needs / GIB,
            "compile_seconds": time.perf_counter() - started,
        }
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    peak = _peak_bytes(memory, platform)
    cache = _cache_bytes(program.cache, text)
    needs = (peak + beside) / GIB
    taken = hlo.traffic(text, topology.devices, program.trips)
    cost = compiled.cost_analysis() or {}
    return found | {
        "fits": hbm is None or needs <= hbm,
        "needs_gib": needs,
        "peak_gib": peak / GIB,
        "bytes": arguments
        | {
            "padding": max(memory.argument_size_in_bytes - sum(arguments.values()), 0),
            "kv_cache": cache,
            "activations": memory.temp_size_in_bytes - cache,
            "code": memory.generated_code_size_in_bytes,
            "beside": beside,
        },
        "flops": {"traced": operations, "cost_analysis": cost.get("flops")},
        **taken,
        "seconds": step_seconds(operations, taken, topology),
        "compile_seconds": seconds,
    }


# --- memory --------------------------------------------------------------------------------------


def bytes_per_device(tree: programs.Shapes) -> int:
    """Bytes that one device holds of a pytree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _bytes_wanted(message: str) -> float:
    """What the compiler says that a program needs; 0 if it does not say."""
    said = _NEEDS.search(message)
    return float(said[1]) * _UNITS[said[2]] if said else 0


def _peak_bytes(memory, platform: str) -> int:
    """Peak memory of a compiled program, from its memory analysis."""
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    # on a CPU, that number leaves the temporaries out
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _cache_bytes(keys: jax.ShapeDtypeStruct | None, text: str) -> int:
    """Bytes that a device holds of the KV cache, read off the text of the compiled program.

    The compiler chooses how the cache is cut. keys: their shape on all devices; None for no cache.
    """
    if keys is None:
        return 0
    layers, lanes, positions, heads, width = keys.shape
    cuts = [
        tuple(map(int, cut))
        for cut in re.findall(rf"\[{layers},(\d+),{positions},(\d+),(\d+)\]", text)
    ]
    largest = max(
        (b * k * h for b, k, h in cuts if b <= lanes and k <= heads and h <= width), default=0
    )
    return 2 * layers * positions * largest * keys.dtype.itemsize  # keys and values


# --- time ----------------------------------------------------------------------------------------


def step_seconds(
    operations: int, taken: dict[str, Any], topology: topology_lib.Topology
) -> dict[str, float] | None:
    """A model of how long a program runs; None for a CPU.

    Args:
      operations: floating point operations per device. taken: what `hlo.traffic` returns.
    Returns:
      Seconds: {"compute", "hbm", "network", "latency", "overlapped", "serial"}.
      compute: products at UTILIZATION of the peak. hbm: its traffic at full bandwidth.
      network: collectives along one axis of the torus, both directions, at full speed, what crosses
      slices at DCN, and the latency. latency: `chips.LATENCY` for each collective.
      overlapped: the longest of compute, hbm and network. serial: the longer of compute and hbm,
      then the network. The truth should be between these two, or beyond them if operations are
      small.
    """
    chip = topology.chip
    if chip is None:
        return None
    sent = {kind: counted["bytes"] for kind, counted in taken["collectives"].items()}
    across_slices = sent.pop("send", 0)
    compute = operations / (chip.flops * UTILIZATION)
    hbm = taken["hbm_bytes"] / chip.bandwidth
    latency = chips.LATENCY * sum(counted["count"] for counted in taken["collectives"].values())
    network = sum(sent.values()) / (2 * chip.link) + across_slices / (
        topology_lib.DCN / chip.devices
    )
    network += latency
    return {
        "compute": compute,
        "hbm": hbm,
        "network": network,
        "latency": latency,
        "overlapped": max(compute, hbm, network),
        "serial": max(compute, hbm) + network,
    }
