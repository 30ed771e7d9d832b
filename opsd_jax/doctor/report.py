"""The results of all processes as JSON and as a table."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from opsd_jax.doctor.result import FAILED, OK, SKIPPED, Result

_MARKS = {OK: "ok", FAILED: "FAILED", SKIPPED: "skipped"}


def to_json(results: Sequence[Result]) -> str:
    """The results of one process as text, for `network.gather`."""
    return json.dumps([dataclasses.asdict(result) for result in results])


def report(processes: Sequence[str], settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What --out writes.

    Args:
      processes: what `to_json` returned in each process.
      settings: what the measurements were made with. seconds: of the whole command.
    """
    checks = [
        {"process": number} | check
        for number, text in enumerate(processes)
        for check in json.loads(text)
    ]
    return {
        "ok": all(check["status"] != FAILED for check in checks),
        "time": time.time(),
        "seconds": seconds,
        "settings": settings,
        "checks": checks,
    }


def table(found: dict[str, Any]) -> str:
    """A line for each check, and one for all of them."""
    checks = found["checks"]
    several = any(check["process"] for check in checks)
    names = [
        f"{check['process']}: {check['name']}" if several else check["name"] for check in checks
    ]
    width = max(map(len, names), default=0)
    lines = [
        f"{_MARKS[check['status']]:<8} {name:<{width}}  {check['summary']}"
        for name, check in zip(names, checks)
    ]
    failed = [name for name, check in zip(names, checks) if check["status"] == FAILED]
    ran = sum(check["status"] != SKIPPED for check in checks)
    end = (
        f"{len(failed)} of {ran} checks failed: {', '.join(failed)}"
        if failed
        else f"all {ran} checks that ran hold"
    )
    return "\n".join([*lines, "", f"{end} ({found['seconds']:.0f} s)"])
