"""The sizes of the 7B model, with random weights, on a machine without an accelerator."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
MOST = 18  # GiB: of weights of 15.0
DISK = 50  # GiB: release, import and export


def has_room(folder):
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return False
    return memory >= 22 * GIB and shutil.disk_usage(folder).free >= DISK * GIB


def measured(*command):
    """What a command prints; shows its seconds and its largest resident memory, in GiB."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    name = " ".join(map(str, command[:3])).replace(f"{ROOT}/", "")
    print(f"{name}: {time.monotonic() - start:.0f} s, peak {peak:.1f} GiB", flush=True)
    return said, peak


def places(folder):
    """{name of a tensor: (what the file says of it, its bytes)} of a folder of safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = np.memmap(path, np.uint8, "r")
        first = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:first].tobytes())
        header.pop("__metadata__", None)
        for name, told in header.items():
            start, end = told.pop("data_offsets")
            found[name] = told, content[first + start : first + end]
    return found


@pytest.mark.long
@pytest.mark.slow
def test_7b_is_imported_asked_and_exported(tmp_path):
    """Within 18 GiB: what a command holds besides the parameters is little."""
    if not has_room(tmp_path):
        pytest.skip(f"needs 22 GiB of memory and {DISK} GiB of disk")
    release, imported, exported = (tmp_path / name for name in ("release", "imported", "exported"))
    image = tmp_path / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
    Image.fromarray(noise).save(image)
    measured("perf/random_release.py", f"--target={release}", "--size=7b")
    peaks = []
    for source in (release, imported):
        if source == imported:
            convert = ("-m", "opsd_jax.convert", "import", f"--source={release}")
            peaks.append(measured(*convert, f"--target={imported}", "--only=understanding")[1])
        said, peak = measured(
            *("-m", "opsd_jax.generate", f"--checkpoint={source}", f"--image={image}"),
            *("--question=How many dots are there?", "--max_new_tokens=4", "--rounds=1"),
        )
        assert said.strip()
        peaks.append(peak)
    convert = ("-m", "opsd_jax.convert", "export", f"--source={imported}")
    peaks.append(measured(*convert, f"--target={exported}")[1])
    assert max(peaks) <= MOST, peaks
    wrote, given = places(exported), places(release)
    assert wrote.keys() == given.keys()
    for name, (told, content) in given.items():
        assert wrote[name][0] == told and np.array_equal(wrote[name][1], content), name
