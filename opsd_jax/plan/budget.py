"""Hours, bytes of checkpoints and dollars of a whole run, from the modelled time of its steps.

  seconds of a stage   steps x seconds of a step + seconds of its saves
  seconds of a save    bytes of a checkpoint / (hosts x bytes per second of a host)
  chip-hours           hours x chips;  dollars = chip-hours x price

Start-up, compilation, waiting for data, screening, evaluations and control arms are not included.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

# GB per second that a host writes into a mounted bucket. Source: docs/benchmarks.md of gcsfuse
# 3.4.3 has 4.06 for files of 100 MiB on a machine with 200 Gbit/s; a quarter of that.
WRITE_SPEED = 1.0


@dataclasses.dataclass(frozen=True)
class StageOfRun:
    """What the steps and saves of one stage take.

    name: of the stage. steps: how many it has.
    saves: how many checkpoints it saves, that of its start included.
    checkpoint_bytes: bytes of the arrays in one of them.
    step_seconds: (least, most) modelled seconds of a step; None if they are not modelled.
    not_modelled: why they are not, and what to do; "" if they are.
    start_bytes: bytes of the arrays in that of the start, which has the weights alone; 0 if the
      stage saves none.
    """

    name: str
    steps: int
    saves: int
    checkpoint_bytes: int
    step_seconds: tuple[float, float] | None
    not_modelled: str = ""
    start_bytes: int = 0


def save_seconds(checkpoint_bytes: int, hosts: int, write_speed: float) -> float:
    """Seconds of a save, of which each host writes an equal share.

    write_speed: GB (10^9 bytes) per second of one host.
    """
    return checkpoint_bytes / (hosts * write_speed * 1e9)


def stage_hours(stage: StageOfRun, hosts: int, write_speed: float) -> tuple[float, float] | None:
    """(least, most) hours of a stage if training waits for every save; None if not modelled."""
    if stage.step_seconds is None:
        return None
    written = stage.saves * stage.checkpoint_bytes
    if stage.start_bytes:
        written += stage.start_bytes - stage.checkpoint_bytes
    saving = save_seconds(written, hosts, write_speed)
    least, most = ((stage.steps * seconds + saving) / 3600 for seconds in stage.step_seconds)
    return least, most


def most_at_once(
    saved: Sequence[tuple[int, int]], keep_latest: int, never_deleted: Collection[int]
) -> tuple[int, int]:
    """Number and bytes of the checkpoints that a run holds when they take most.

    While one is written, those that it replaces still exist (see `runtime.checkpoint.Checkpoints`).

    Args:
      saved: (step, bytes) of each save, in order.
      keep_latest: how many of the newest stay.
      never_deleted: steps whose checkpoints stay, too.
    Returns:
      (checkpoints, bytes), the largest of each.
    """
    held: list[tuple[int, int]] = []
    count = size = 0
    for save in saved:
        held.append(save)
        count, size = max(count, len(held)), max(size, sum(n for _, n in held))
        held = [old for old in held[:-keep_latest] if old[0] in never_deleted] + held[-keep_latest:]
    return count, size


def budget(
    stages: Sequence[StageOfRun],
    *,
    chips: int,
    hosts: int,
    write_speed: float,
    price: float | None,
) -> dict[str, Any]:
    """What the stages of a run take, one by one and together.

    Args:
      write_speed: GB per second of one host.
      price: dollars of a chip for an hour; None if unknown.
    Returns:
      {"stages", "chips", "hosts", "write_speed", "price_per_chip_hour", "hours", "chip_hours",
      "dollars"}. Times are (least, most), those of the run sums over the stages that are modelled;
      None where nothing is modelled, and dollars also without a price. An entry of "stages" has the
      fields of `StageOfRun` with "save_seconds", of `checkpoint_bytes`, and "hours".
    """
    entries = []
    for stage in stages:
        seconds = save_seconds(stage.checkpoint_bytes, hosts, write_speed)
        hours = stage_hours(stage, hosts, write_speed)
        entries.append(dataclasses.asdict(stage) | {"save_seconds": seconds, "hours": hours})
    modelled = [entry["hours"] for entry in entries if entry["hours"] is not None]
    hours = tuple(map(sum, zip(*modelled))) if modelled else None
    chip_hours = hours and tuple(chips * n for n in hours)
    dollars = chip_hours and price and tuple(price * n for n in chip_hours)
    return {
        "stages": entries,
        "chips": chips,
        "hosts": hosts,
        "write_speed": write_speed,
        "price_per_chip_hour": price,
        "hours": hours,
        "chip_hours": chip_hours,
        "dollars": dollars,
    }
