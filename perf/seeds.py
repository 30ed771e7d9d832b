"""Table of one run over several seeds: python perf/seeds.py W0 W1 W2

Reads the report.json that each run with arms writes to its working folder. Prints accuracies (text
only, and of the same weights with the examples' real visual thoughts) and closures in per cent, one
column per seed, then mean and standard deviation.
"""

import json
import os
import statistics
import sys


def main(workdirs):
    """Prints the table of these runs."""
    if not workdirs:
        sys.exit(__doc__)
    reports = []
    for workdir in workdirs:
        with open(os.path.join(workdir, "report.json")) as f:
            reports.append({row["arm"]: row["tasks"] for row in json.load(f)})
    print(
        "| arm | measure | "
        + " | ".join(os.path.basename(os.path.normpath(w)) for w in workdirs)
        + " | mean ± sd |"
    )
    print("|---" * (3 + len(workdirs)) + "|")
    for arm in dict.fromkeys(arm for report in reports for arm in report):
        tasks = [next(iter(r[arm].values())) if arm in r else {} for r in reports]
        for name, values in (
            ("accuracy", [b.get("overall") for b in tasks]),
            ("with true visual thoughts", [b.get("real", {}).get("overall") for b in tasks]),
            ("closure", [b.get("closure") for b in tasks]),
        ):
            found = [100 * v for v in values if v is not None]
            if found:
                spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
                cells = " | ".join("–" if v is None else f"{100 * v:.1f}" for v in values)
                print(f"| {arm} | {name} | {cells} | {statistics.mean(found):.1f}{spread} |")


if __name__ == "__main__":
    main(sys.argv[1:])
