"""Table of a run on all slices that have a preset: python perf/presets.py --plans=FOLDER

Compiles the training step for each slice of configs/visual_opsd.py (`SLICES` there), or of another
file with --config and a size as --run, with `python -m opsd_jax.plan`, one after the other, each
some minutes on a core, and prints one Markdown table. The reports of plan stay in --plans=FOLDER as
RUN-SLICE.json. A report that is there already is not made again, so a second call with a price, or
after an interruption, compiles only what is missing. Delete the folder after a change of the code
or of the config.

  python perf/presets.py --plans=/tmp/plans --price_per_chip_hour=v5p=4.2,v6e=2.7,v5e=1.2

  memory       GiB of each chip that the largest program needs, everything else in memory included
  step         modelled seconds of a step, least to most
  hours        of the whole run, saves included (docs/performance/plan.md says what is not)
  dollars      chip-hours times the price

A line after the table has the bytes of a checkpoint, and of the most that the run holds at once.
It exits with 3 if a preset does not fit.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from opsd_jax import presets

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "visual_opsd.py"
COLUMNS = ("slice", "chips", "hosts", "memory, GiB", "step, s", "hours", "chip-hours")


def price_of(text: str) -> dict[str, float]:
    """{generation: dollars of a chip for an hour}; "" for all. From 4.2 or v5p=4.2,v5e=1.2."""
    found = {}
    for part in text.split(","):
        family, _, price = part.rpartition("=")
        try:
            found[family] = float(price)
        except ValueError:
            found[family] = 0.0
        if found[family] <= 0:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give a price above 0, such as 4.2, or one for each generation, such as "
                "v5p=4.2,v5e=1.2"
            )
    return found


def slices_of(config: pathlib.Path) -> list[str]:
    """Names of the slices that a config file has presets for: its own, or those of all models."""
    spec = importlib.util.spec_from_file_location("config_file", config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(getattr(module, "SLICES", presets.SLICES))


def report_of(config: pathlib.Path, run: str, name: str, plans: pathlib.Path) -> dict[str, Any]:
    """The report of plan about a preset; compiled if the folder does not hold it."""
    out = plans / f"{run}-{name}.json"
    if out.exists():
        print(f"{name}: {out} is there", file=sys.stderr)
    else:
        print(f"{name}: compiling for it", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "opsd_jax.plan", f"--config={config}:{run},{name}"]
        command += [f"--topology={name}", "--quick", f"--out={out}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 3):
            sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(out.read_text(encoding="utf-8"))


def row_of(name: str, report: dict[str, Any], prices: dict[str, float]) -> list[str]:
    """Cells of a preset, in the order of the table's header."""
    run = report["run"]
    needs = max(program["needs_gib"] for program in report["programs"])
    per_chip = report["devices"] / report["chips"]
    fits = "" if report["fits"] else ": does not fit"
    steps = run["stages"][0]["step_seconds"]
    cells = [
        name,
        str(run["chips"]),
        str(run["hosts"]),
        f"{needs * per_chip:.1f} of {report['hbm_gib'] * per_chip:g}{fits}",
        _range(steps, ".1f"),
        _range(run["hours"], ".1f"),
        _range(run["chip_hours"], ".0f"),
    ]
    if prices:
        price = prices.get(name.partition("-")[0], prices.get(""))
        dollars = price and run["chip_hours"] and [price * n for n in run["chip_hours"]]
        cells.append(_range(dollars, ",.0f"))
    return cells


def _range(least_and_most: list[float] | None, digits: str) -> str:
    if not least_and_most:
        return "–"
    least, most = (f"{n:{digits}}" for n in least_and_most)
    return least if least == most else f"{least} to {most}"


def table(reports: dict[str, dict[str, Any]], prices: dict[str, float]) -> str:
    """The Markdown table of {slice: report}, and a line about checkpoints."""
    header = [*COLUMNS, *(["dollars"] if prices else [])]
    rows = [row_of(name, report, prices) for name, report in reports.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    run = next(iter(reports.values()))["run"]
    (stage,) = run["stages"]
    lines += [
        "",
        f"{stage['steps']:,} steps, {stage['saves']} saves; a checkpoint of "
        f"{stage['checkpoint_bytes'] / 1e9:,.1f} GB, up to {run['checkpoints']} at once, "
        f"{run['checkpoints_bytes'] / 1e9:,.1f} GB",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=pathlib.Path, required=True, help="folder of the reports")
    parser.add_argument("--config", type=pathlib.Path, default=CONFIG, help="a file of configs/")
    parser.add_argument("--run", default="paper", help="a run or size, such as sft")
    parser.add_argument("--price_per_chip_hour", type=price_of, default={}, help="see above")
    args = parser.parse_args(arguments)
    os.makedirs(args.plans, exist_ok=True)
    config, plans = args.config.resolve(), args.plans.resolve()
    reports = {name: report_of(config, args.run, name, plans) for name in slices_of(config)}
    print(table(reports, args.price_per_chip_hour))
    return 0 if all(report["fits"] for report in reports.values()) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
