"""The report of `bill.plan` as human-readable text."""

from typing import Any

from opsd_jax.plan.bill import UTILIZATION
from opsd_jax.runtime.chips import GIB


def table(report: dict[str, Any]) -> str:
    """One block for the topology, one for each program, and one for the whole run."""
    several = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    memory = f" of {report['hbm_gib']:g} GiB" if report["hbm_gib"] else ""
    mesh = _sizes(report["mesh"])
    if report.get("rollout_mesh", report["mesh"]) != report["mesh"]:
        mesh += f"; of the sampler {_sizes(report['rollout_mesh'])}"
    lines = [
        f"{several}{report['topology']}: {report['chips']} chips, {report['devices']} devices"
        f"{memory}; mesh {mesh}",
        "parameters: " + ", ".join(f"{group} {n:,}" for group, n in report["parameters"].items()),
    ]
    several_stages = len({bill["stage"] for bill in report["programs"]}) > 1
    for bill in report["programs"]:
        lines += ["", *_memory(bill, several_stages), *_traffic(bill), *_time(bill)]
    last = _answers(report["answers"]) if "answers" in report else _run(report["run"])
    return "\n".join([*lines, "", *last])


def _sizes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in mesh.items())


def _memory(bill: dict[str, Any], several_stages: bool) -> list[str]:
    compiled = bill["peak_gib"] is not None
    of_stage = f" of {bill['stage']}" if several_stages else ""
    lines = [
        f"{bill['program']}{of_stage}, for each device"
        + (f", {bill['times']:,} times a batch" if bill.get("times", 1) > 1 else "")
        + (f" (compiled in {bill['compile_seconds']:.0f} s)" if compiled else "")
    ]
    lines += [
        f"  {kind:<18} {n / GIB:>9.3f} GiB"
        for kind, n in bill["bytes"].items()
        if n or kind == "params"
    ]
    if compiled:
        lines.append(
            f"  {'peak':<18} {bill['peak_gib']:>9.3f} GiB"
            + (
                f", {bill['needs_gib']:.3f} GiB with what else is in memory"
                if bill["beside_gib"]
                else ""
            )
        )
    bound = f" of {bill['hbm_gib']:g} GiB" if bill["hbm_gib"] else ""
    lines.append(
        f"  {'fits' if bill['fits'] else 'does not fit'}: needs "
        f"{'' if bill['peak_gib'] else 'at least '}{bill['needs_gib']:.2f} GiB{bound}"
    )
    return lines + [f"    {line}" for line in bill["advice"]]


def _traffic(bill: dict[str, Any]) -> list[str]:
    if bill["collectives"] is None:
        return []
    lines = [
        f"  {kind:<18} {sent['bytes'] / 1e9:>9.3f} GB sent in {sent['count']:,} calls"
        for kind, sent in bill["collectives"].items()
    ]
    return [*lines, f"  {'HBM traffic':<18} {bill['hbm_bytes'] / 1e9:>9.1f} GB"]


def _time(bill: dict[str, Any]) -> list[str]:
    counted, s = bill["flops"]["cost_analysis"], bill["seconds"]
    once = "" if counted is None else f" (cost analysis, loop bodies once: {counted / 1e12:.3f})"
    lines = [f"  {'matrix products':<18} {bill['flops']['traced'] / 1e12:>9.3f} TFLOP{once}"]
    if s:
        lines.append(
            f"  {'modelled':<18} {s['overlapped']:>9.3f} to {s['serial']:.3f} s: compute "
            f"{s['compute']:.3f} (at {UTILIZATION:.0%} of peak), HBM {s['hbm']:.3f}, network "
            f"{s['network']:.3f} ({s['latency']:.3f} of it latency)"
        )
    return lines


def _answers(found: dict[str, Any]) -> list[str]:
    """What answering takes: the block after the programs of `--stage=eval` or `generate`."""
    images = f" and {_count(found['images'], 'image')}" if found["images"] else ""
    lines = [
        f"answers, on {_count(found['chips'], 'chip')} of {_count(found['hosts'], 'host')}, in "
        f"batches of {_count(found['batch_size'], 'question')} on each host"
    ]
    if found["hours"] is None:
        return [*lines, "  no time is modelled for what does not fit, or for a CPU"]
    price = found["price_per_chip_hour"]
    dollars = (
        f", {_range(found['dollars'], ',.2f')} dollars at {price:g} a chip-hour" if price else ""
    )
    return [
        *lines,
        f"  {'a batch':<18} {_range(found['seconds_per_batch'], '.2f')} s, "
        f"{_range(found['tokens_per_sec'], ',.0f')} tokens per second of all hosts",
        f"  {_count(found['questions'], 'question'):<18} {_range(found['hours'], '.2f')} hours, "
        f"{_range(found['chip_hours'], ',.1f')} chip-hours{dollars}",
        f"  assumed: each question has one image of the largest size, and {found['tokens']:,} "
        f"tokens{images} for its answer; without start-up, loading and compilation",
    ]


def _run(run: dict[str, Any]) -> list[str]:
    lines = [f"the whole run, on {_count(run['chips'], 'chip')} of {_count(run['hosts'], 'host')}"]
    for stage in run["stages"]:
        start = stage["start_bytes"]
        saves = _count(stage["saves"] - (start > 0), "save")
        saved = f"{saves} of {_size(stage['checkpoint_bytes'])}"
        first = f" and one of {_size(start)}" if start else ""
        if stage["hours"] is None:
            took = f"{_count(stage['steps'], 'step')}, {saved}{first}: {stage['not_modelled']}"
        else:
            took = (
                f"{_count(stage['steps'], 'step')} of {_range(stage['step_seconds'], '.3f')} s, "
                f"{saved} in {stage['save_seconds']:.1f} s{first}: "
                f"{_range(stage['hours'], '.2f')} hours"
            )
        lines.append(f"  {stage['name']:<18} {took}")
    lines.append(
        f"  {'checkpoints':<18} up to {run['checkpoints']:,} at once, "
        f"{_size(run['checkpoints_bytes'])}"
    )
    return lines if run["hours"] is None else [*lines, *_sum(run)]


def _sum(run: dict[str, Any]) -> list[str]:
    left_out = [stage["name"] for stage in run["stages"] if stage["hours"] is None]
    name = f"sum without {', '.join(left_out)}" if left_out else "sum"
    price = run["price_per_chip_hour"]
    dollars = (
        f", {_range(run['dollars'], ',.2f')} dollars at {price:g} a chip-hour" if price else ""
    )
    return [
        f"  {name:<18} {_range(run['hours'], '.2f')} hours, "
        f"{_range(run['chip_hours'], ',.1f')} chip-hours{dollars}",
        "  assumed: all steps in the bucket planned above, completions of full length; training "
        f"waits for each save, each host writes an equal share of it at {run['write_speed']:g} "
        "GB/s; without start-up, compilation, waiting for data, screening, evaluations, a cached "
        "teacher's outputs and control arms",
    ]


def _range(least_and_most: tuple[float, float], digits: str) -> str:
    least, most = least_and_most
    return f"{least:{digits}} to {most:{digits}}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _size(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"
