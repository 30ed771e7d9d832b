"""docs/guides/reproduce-paper.md: all its commands in order, with tiny weights and data and with
stand-ins for what needs a network, a cloud or a cluster.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import small_run
from opsd_jax.data import __main__ as data
from opsd_jax.plan import topology

ROOT = small_run.ROOT
PAGE = (ROOT / "docs/guides/reproduce-paper.md").read_text(encoding="utf-8")
SCRIPT = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE))
TASKS = ("Visual_Search", "Spatial_Navigation", "Jigsaw_Assembly", "Chart_Refocus")

# Commands by name: what a stand-in does after it has written its arguments to the log.
STAND_INS = {
    # Weights and data: those in $TINY.
    "hf": """
        for last; do :; done
        mkdir -p "$last" && cp -r "$TINY/${2#*/}/." "$last" """,
    "curl": """for last; do :; done; touch "${last##*/}" """,
    "md5sum": "",
    # Of a folder that comes from the bucket, a file that the page shows.
    "gcloud": """
        case "$*" in
          *rsync*gs://*/*) for last; do :; done
            [[ $last == gs://* ]] || { mkdir -p "$last" && touch "$last/summary.md"; } ;;
          *projectNumber*) echo 123 ;;
          *"storage cat"*) echo '{"step": 10}' ;;
        esac""",
    "git": """
        out=${3#--output=}
        [[ $1 != archive ]] || tar -czf "$out" -C "$ROOT" launch configs
        [[ "$*" != *ls-files* ]] || printf 'launch/tpu_vm.sh\\0'""",
    "kubectl": """
        case "$1" in
          kustomize) cat "${@: -1}/kustomization.yaml" ;;
          apply) cat > "$TINY/applied" ;;
        esac""",
    "docker": "",
    "sbatch": "",
    "sudo": "",
    "pip": "",
    "ssh-add": "",
    "python3": """
        if [[ "$*" == "-m venv venv" ]]; then mkdir -p venv/bin && touch venv/bin/activate
        else exec "$PYTHON" "$@"; fi""",
    # What needs no accelerator is done; the rest needs 7B weights.
    "python": """
        case "$*" in
          *"opsd_jax.convert import"* | *"opsd_jax.data prepare"*) exec "$PYTHON" "$@" ;;
          *"opsd_jax.data index"*) exec "$PYTHON" "$@" "--config.data.limits=()" ;;
        esac""",
}


@pytest.fixture
def machine(tmp_path, released):
    """The environment of a machine with a tiny release and tiny data on the hub: variables."""
    tiny, home, bin_ = (tmp_path / name for name in ("hub", "home", "bin"))
    few = ("--train=4", "--validation=0", "--test=0")
    data.main(["make-mini", f"--target={tmp_path / 'mini'}", *few])
    for folder in (tmp_path / "mini/made/parquet").iterdir():
        shutil.copytree(folder, tiny / folder.name)
    shutil.copytree(released, tiny / "ThinkMorph-7B")
    home.mkdir()
    bin_.mkdir()
    for name, body in STAND_INS.items():
        path = bin_ / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$TINY/log"\n{body}\n')
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "HOME": str(home),
        "TINY": str(tiny),
        "ROOT": str(ROOT),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "DRY_RUN": "1",  # launch/tpu_vm.sh prints its commands
    }


@pytest.mark.slow
def test_the_commands_in_order(machine, tmp_path):
    script = re.sub(r"/tmp/", f"{tmp_path}/", SCRIPT)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=machine,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = pathlib.Path(machine["HOME"]) / "opsd"
    assert (made / "thinkmorph/checkpoints/0").is_dir() and (made / "thinkmorph/release").is_dir()
    assert not (ROOT / "thinkmorph").exists()
    for task in TASKS:
        folder = made / "prepared/visual_opsd" / task.lower() / "1.0.0"
        assert list(folder.glob("buckets-*.npy")), f"{task} has no index"
    assert len(list((made / "tables").glob("*.tsv"))) == 11
    tables = re.findall(r"^[0-9a-f]{32}  (.*)$", (made / "tables/md5").read_text(), re.MULTILINE)
    assert sorted(tables) == sorted(path.name for path in (made / "tables").glob("*.tsv"))

    # No place is left that the user would have to fill in by hand.
    called = (pathlib.Path(machine["TINY"]) / "log").read_text()
    applied = (pathlib.Path(machine["TINY"]) / "applied").read_text()
    for text in (called, applied, done.stdout):
        assert not re.search(r"=(\s|$)|gs:///|my-bucket|PROJECT_NUMBER", text)
    assert "bucketName\n        value: my-project-opsd" in applied
    assert "--config=configs/visual_opsd.py:v5p-16 --workdir=runs/visual-opsd" in done.stdout
    for command in ("opsd_jax.eval", "queued-resources create", "queued-resources delete"):
        assert command in done.stdout


def tables():
    """Rows of the tables of slices on the page, {column: cell}."""
    for text in re.findall(r"^\| (?:preset|slice) \|.*?\n\n", PAGE, flags=re.DOTALL | re.MULTILINE):
        header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line]
        yield [dict(zip(header, row, strict=True)) for row in rows]


def test_tables_of_slices_are_those_of_the_presets():
    shapes, costs = None, None
    for rows in tables():
        shapes, costs = (rows, costs) if "preset" in rows[0] else (shapes, rows)
    presets = {}
    exec((ROOT / "configs/visual_opsd.py").read_text(), presets)  # noqa: S102  our own file
    assert [row["preset"].strip("`") for row in shapes] == list(presets["SLICES"])
    for row, cost in zip(shapes, costs, strict=True):
        name = row["preset"].strip("`")
        slice_ = topology.parse_topology(name)
        folder = yaml.safe_load((ROOT / f"launch/gke/{name}/kustomization.yaml").read_text())
        patch = folder["patches"][0]["patch"]
        (column,) = [key for key in row if key.startswith("GKE")]
        machine, grid = row[column].split(", ")
        text = (ROOT / f"launch/gke/{name}/kustomization.yaml").read_text()
        assert f"{machine})" in text and f"topology: {grid}\n" in patch
        assert grid == "x".join(map(str, slice_.grid)) and int(row["chips"]) == slice_.chips
        assert f"spec/parallelism, value: {row['hosts']}}}" in patch
        assert (cost["slice"], cost["chips"], cost["hosts"]) == (name, row["chips"], row["hosts"])
