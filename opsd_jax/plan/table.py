"""The report of `bill.plan` as human-readable text."""

from typing import Any

from opsd_jax.plan.bill import UTILIZATION
from opsd_jax.plan.topology import GIB


def table(report: dict[str, Any]) -> str:
    """One block for the topology, and one for each program."""
    several = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    memory = f" of {report['hbm_gib']:g} GiB" if report["hbm_gib"] else ""
    mesh = ", ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    lines = [
        f"{several}{report['topology']}: {report['chips']} chips, {report['devices']} devices"
        f"{memory}; mesh {mesh}",
        "parameters: " + ", ".join(f"{group} {n:,}" for group, n in report["parameters"].items()),
    ]
    for bill in report["programs"]:
        lines += ["", *_memory(bill), *_traffic(bill), *_time(bill)]
    return "\n".join(lines)


def _memory(bill: dict[str, Any]) -> list[str]:
    compiled = bill["peak_gib"] is not None
    lines = [
        f"{bill['program']}, for each device"
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
            f"{s['network']:.3f}"
        )
    return lines
