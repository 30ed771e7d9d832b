"""Memory and time of a step on a topology."""

import importlib.metadata
import importlib.util
import re
import time

import jax

from opsd_jax import config as config_lib
from opsd_jax import config_check, sharding
from opsd_jax import params as params_lib
from opsd_jax.inputs import cli
from opsd_jax.plan import hlo, programs
from opsd_jax.plan import topology as topology_lib

# Two ways in which libtpu says how much a program wants, arguments and all.
_NEEDS = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bill(
    program: programs.Program, topology: topology_lib.Topology, hbm: float | None = None
) -> dict:
    """Compiles a program and tells what it takes of each device; see docs/scaling.md for every entry.

    hbm: GiB a device, None for no bound. A program that does not fit even alone comes back with `fits` False and
    what the compiler said it needs; other errors of the compiler are raised.
    """
    inside = {kind: programs.bytes_per_device(tree) for kind, tree in program.kinds.items()}
    beside = sum(programs.bytes_per_device(tree) for tree in program.beside.values())
    flops = programs.matmul_flops(program.traced.jaxpr.jaxpr, program.trips) // topology.devices
    found = {
        "program": program.name,
        "fits": None,
        "hbm_gib": hbm,
        "needs_gib": None,
        "peak_gib": None,
        "beside_gib": beside / topology_lib.GIB,
        "bytes": inside | {"beside": beside},
        "flops": {"traced": flops, "cost_analysis": None},
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
        said = _NEEDS.search(str(error))
        needs = float(said[1]) * _UNITS[said[2]] if said else 0
        return found | {
            "fits": False,
            "needs_gib": (max(needs, sum(inside.values())) + beside) / topology_lib.GIB,
            "compile_seconds": time.perf_counter() - started,
        }
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis() or {}
    taken = hlo.traffic(text, topology.devices, program.trips)
    if platform == "tpu":
        peak = memory.peak_memory_in_bytes
    else:  # a CPU's leaves the temporaries out
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
    cache = _cache_bytes(program, text)
    kinds = inside | {
        "padding": max(memory.argument_size_in_bytes - sum(inside.values()), 0),
        "kv_cache": cache,
        "activations": memory.temp_size_in_bytes - cache,
        "code": memory.generated_code_size_in_bytes,
        "beside": beside,
    }
    needs = (peak + beside) / topology_lib.GIB
    return found | {
        "fits": hbm is None or needs <= hbm,
        "needs_gib": needs,
        "peak_gib": peak / topology_lib.GIB,
        "bytes": kinds,
        "flops": {"traced": flops, "cost_analysis": cost.get("flops")},
        **taken,
        "seconds": step_seconds(flops, taken, topology),
        "compile_seconds": seconds,
    }


def _cache_bytes(program, text) -> int:
    """What a device holds of the KV cache, read off the compiled program: the compiler chooses how it is cut."""
    if program.cache is None:
        return 0
    layers, rows, slots, heads, width = program.cache.shape
    cuts = [
        tuple(map(int, cut)) for cut in re.findall(rf"\[{layers},(\d+),{slots},(\d+),(\d+)\]", text)
    ]
    largest = max(
        (b * k * h for b, k, h in cuts if b <= rows and k <= heads and h <= width), default=0
    )
    return 2 * layers * slots * largest * program.cache.dtype.itemsize  # keys and values


def step_seconds(flops: int, taken: dict, topology: topology_lib.Topology) -> dict | None:
    """A model of how long a program runs: {"compute", "hbm", "network", "overlapped", "serial"}; None for a CPU.

    compute: products at UTILIZATION of the peak. hbm: its traffic at full bandwidth. network: collectives along one
    axis of the torus, both directions, at full speed, and what crosses slices at DCN. overlapped: the longest of the
    three; serial: the longer of compute and hbm, then the network. The truth should lie between, or beyond where
    operations are small.
    """
    if topology.family not in topology_lib.CHIPS:
        return None
    chip, moved = (
        topology_lib.CHIPS[topology.family],
        {kind: c["bytes"] for kind, c in taken["collectives"].items()},
    )
    compute, hbm = (
        flops / (chip.flops * topology_lib.UTILIZATION),
        taken["hbm_bytes"] / chip.bandwidth,
    )
    across = moved.pop("send", 0)
    network = sum(moved.values()) / (2 * chip.link) + across / (topology_lib.DCN / chip.devices)
    return {
        "compute": compute,
        "hbm": hbm,
        "network": network,
        "overlapped": max(compute, hbm, network),
        "serial": max(compute, hbm) + network,
    }


def advice(found: dict, config, stage: str, mesh) -> list[str]:
    """What to change where a program does not fit: settings by name, the cheapest first."""
    lines, size = [], found["bytes"]
    if found["program"] == "update":
        s, shards = config[stage], sharding.batch_divisor(mesh)
        if config.model.remat == "none":
            lines.append("config.model.remat=full recomputes activations instead of keeping them")
        if config.model.attention == "dense":
            if not config.model.query_block:
                lines.append(
                    "config.model.query_block=512 computes attention for 512 queries at a time"
                )
            lines.append("config.model.attention=flash keeps no attention scores in memory (TPU)")
        rows = s.batch_size // s.accumulation // shards
        if rows > 1:
            lines.append(
                f"config.{stage}.accumulation={s.batch_size // shards} takes one row a device at a time "
                f"instead of {rows}"
            )
        if config.divergence.chunk > 32:
            lines.append(
                f"config.divergence.chunk={config.divergence.chunk // 2} halves the logits that exist at once"
            )
        if not config.lora.rank:
            lines.append(
                "config.lora.rank=64 trains adapters alone: no moments, gradients or EMA of the weights"
            )
    else:
        lines.append(
            f"smaller config.{stage}.batch_size or config.rollout.max_new_tokens"
            + (
                f": the KV cache takes {size['kv_cache'] / topology_lib.GIB:.1f} GiB"
                if "kv_cache" in size
                else ""
            )
        )
    if stage == "opsd":
        if config.teacher.kind != "self":
            lines.append("config.teacher.kind=self keeps no second set of weights")
    if found["program"] == "sample":
        tensor = mesh.devices.size // sharding.batch_divisor(mesh)
        if not config.rollout.slots and config[stage].batch_size > sharding.batch_divisor(mesh):
            lines.append(
                f"config.rollout.slots={sharding.batch_divisor(mesh)} keeps the cache of one row a device at a time"
            )
        lines.append(
            f"config.mesh.tensor={2 * tensor} halves the sampler's own copy of the weights "
            f"({size['params'] / topology_lib.GIB:.1f} GiB), which mesh.fsdp does not cut"
        )
    lines.append(
        "config.mesh.fsdp: twice as many devices hold half of parameters, moments and EMA each"
    )
    if len(config.data.buckets.student) > 1:
        lines.append(
            "--bucket=0 shows the smaller bucket: config.data.buckets without the largest one, with "
            "config.data.on_too_long=skip, leaves its rows out"
        )
    return lines


def table(report: dict) -> str:
    """The bill for people."""
    several = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    lines = [
        f"{several}{report['topology']}: {report['chips']} chips, {report['devices']} devices"
        + (f" of {report['hbm_gib']:g} GiB" if report["hbm_gib"] else "")
        + f"; mesh {', '.join(f'{axis} {n}' for axis, n in report['mesh'].items())}",
        "parameters: " + ", ".join(f"{group} {n:,}" for group, n in report["parameters"].items()),
    ]
    for p in report["programs"]:
        lines += [
            "",
            f"{p['program']}, for each device"
            + (f" (compiled in {p['compile_seconds']:.0f} s)" if p["peak_gib"] is not None else ""),
        ]
        lines += [
            f"  {kind:<18} {n / topology_lib.GIB:>9.3f} GiB"
            for kind, n in p["bytes"].items()
            if n or kind == "params"
        ]
        bound = f" of {p['hbm_gib']:g} GiB" if p["hbm_gib"] else ""
        if p["peak_gib"] is not None:
            lines.append(
                f"  {'peak':<18} {p['peak_gib']:>9.3f} GiB"
                + (f", with what lies beside {p['needs_gib']:.3f} GiB" if p["beside_gib"] else "")
            )
        lines.append(
            f"  {'fits' if p['fits'] else 'does not fit'}: needs {'' if p['peak_gib'] else 'at least '}"
            f"{p['needs_gib']:.2f} GiB{bound}"
        )
        lines += [f"    {line}" for line in p["advice"]]
        if p["collectives"] is not None:
            lines += [
                f"  {kind:<18} {c['bytes'] / 1e9:>9.3f} GB sent in {c['count']:,} calls"
                for kind, c in p["collectives"].items()
            ]
            lines.append(f"  {'HBM traffic':<18} {p['hbm_bytes'] / 1e9:>9.1f} GB")
        counted = p["flops"]["cost_analysis"]
        lines.append(
            f"  {'matrix products':<18} {p['flops']['traced'] / 1e12:>9.3f} TFLOP"
            + (
                f" (cost analysis, loop bodies once: {counted / 1e12:.3f})"
                if counted is not None
                else ""
            )
        )
        if p["seconds"]:
            s = p["seconds"]
            lines.append(
                f"  {'modelled':<18} {s['overlapped']:>9.3f} to {s['serial']:.3f} s: "
                f"compute {s['compute']:.3f} (at {topology_lib.UTILIZATION:.0%} of peak), HBM {s['hbm']:.3f}, "
                f"network {s['network']:.3f}"
            )
    return "\n".join(lines)


def plan(
    config,
    topology: topology_lib.Topology,
    *,
    stage: str = "",
    only: str = "",
    bucket: int = -1,
    hbm: float = 0,
    quick: bool = False,
) -> dict:
    """The whole report, what --out writes: topology, mesh, parameters by group, one bill a program."""

    cli.check_precision()
    config_check.check(config)
    stage = stage or ("opsd" if "opsd" in config.stages else config.stages[0])
    if stage not in config_lib.STAGES:
        raise ValueError(f"--stage={stage!r}: choose from {config_lib.STAGES}")
    bound = hbm or topology.hbm
    mesh = sharding.make_mesh(**config.mesh, devices=topology_lib.devices_of(topology))
    made = programs.programs(config, stage, mesh, bucket, only)
    if quick:
        jax.config.update("jax_optimization_level", "O1")
    found = [bill(program, topology, bound) for program in made]
    for one in found:
        one["advice"] = [] if one["fits"] else advice(one, config, stage, mesh)
    version = lambda name: (
        importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    )
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.devices,
        "hbm_gib": bound,
        "mesh": dict(mesh.shape),
        "stage": stage,
        "bucket": bucket,
        "parameters": params_lib.count(made[0].kinds["params"]),
        "fits": all(one["fits"] for one in found),
        "programs": found,
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
        "quick": quick,
    }
