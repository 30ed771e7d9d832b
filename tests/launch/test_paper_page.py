"""docs/guides/reproduce-paper.md: all its commands in order, with tiny weights and data and with
stand-ins for what needs a network, a cloud or a cluster.
"""

import json
import os
import pathlib
import re
import shlex
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
          *"billing projects describe"*) echo 0X0X0X-0X0X0X-0X0X0X ;;
          *"storage cat"*) echo '{"step": 10}' ;;
        esac""",
    "git": """
        out=${3#--output=}
        [[ $1 != archive ]] || tar -czf "$out" -C "$ROOT" launch configs
        [[ "$*" != *ls-files* ]] || printf 'launch/tpu_vm.sh\\0'""",
    "kubectl": """[[ $1 != kustomize ]] || { cat "${@: -1}/kustomization.yaml"; echo; }""",
    "docker": "",
    "sbatch": "echo 7",
    "ssh-keygen": "",
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
        "DRY_RUN": "1",  # launch/tpu_vm.sh prints its commands, and gke.sh its JobSets
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
    for text in (called, done.stdout):
        assert not re.search(r"=(\s|$)|gs:///|my-bucket|PROJECT_NUMBER", text)
    assert "--config=configs/visual_opsd.py:v5p-16 --workdir=runs/visual-opsd" in done.stdout
    for command in ("opsd_jax.eval", "queued-resources create", "queued-resources delete"):
        assert command in done.stdout
    assert "--dependency=afterok:7" in called
    # Results are kept outside of the checkout, which is copied to the hosts.
    kept = pathlib.Path(machine["HOME"]) / "opsd-results"
    assert {"samples", "eval", "visual-opsd-7b"} <= {path.name for path in kept.iterdir()}
    # The same commands on GKE as on TPU VMs.
    jobsets = [json.loads(line) for line in done.stdout.splitlines() if '"patches"' in line]
    changes = [json.loads(jobset["patches"][0]["patch"]) for jobset in jobsets]
    values = [{change["path"].split("/")[-1]: change["value"] for change in c} for c in changes]
    assert [value["name"] for value in values] == (
        ["doctor", "mini", "trial", "train", "paper", "paper-before", "harness", "harness-before"]
    )
    assert {value["bucketName"] for value in values} == {"my-project-opsd"}
    assert {value["image"] for value in values} == {"us-docker.pkg.dev/my-project/opsd/opsd:latest"}
    on_vms = [
        shlex.split(shlex.split(line)[-1].partition("tpu_worker.sh run ")[2])
        for line in done.stdout.splitlines()
        if "tpu_worker.sh run " in line
    ]
    assert [value["command"] for value in values] == on_vms


def tables():
    """Rows of the tables of slices on the page, {column: cell}."""
    for text in re.findall(r"^\| (?:preset|slice) \|.*?\n\n", PAGE, flags=re.DOTALL | re.MULTILINE):
        header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line]
        yield [dict(zip(header, row, strict=True)) for row in rows]


def presets() -> list[str]:
    """Names of the slices of configs/visual_opsd.py."""
    found = {}
    exec((ROOT / "configs/visual_opsd.py").read_text(), found)  # noqa: S102  our own file
    return list(found["SLICES"])


def variables(tmp_path, name: str) -> dict[str, str]:
    """What the page's file of variables sets for a slice."""
    (text,) = re.findall(r"^cat > ~/opsd.env <<'END'\n(.*?)^END$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "opsd.env").write_text(text.replace("export TYPE=v5p-16", f"export TYPE={name}"))
    script = f"env -i bash -c 'source {tmp_path}/opsd.env; env'"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout
    return dict(line.split("=", 1) for line in shown.splitlines())


def test_tables_of_slices_are_those_of_the_presets(tmp_path):
    (shapes,) = [rows for rows in tables() if "preset" in rows[0]]
    costs, answers = [rows for rows in tables() if "slice" in rows[0]]
    assert [row["preset"].strip("`") for row in shapes] == presets()
    for row, cost, of_answers in zip(shapes, costs, answers, strict=True):
        name = row["preset"].strip("`")
        slice_ = topology.parse_topology(name)
        text = (ROOT / f"launch/gke/{name}/kustomization.yaml").read_text()
        patch = yaml.safe_load(text)["patches"][0]["patch"]
        given = variables(tmp_path, name)
        assert f"{given['MACHINE']})" in text
        assert f"topology: {given['TOPOLOGY']}\n" in patch
        assert given["TOPOLOGY"] == "x".join(map(str, slice_.grid))
        assert int(row["chips"]) == slice_.chips and row["hosts"] == given["HOSTS"]
        assert f"spec/parallelism, value: {row['hosts']}}}" in patch
        assert (cost["slice"], cost["chips"], cost["hosts"]) == (name, row["chips"], row["hosts"])
        assert (of_answers["slice"], of_answers["BATCH"]) == (name, given["BATCH"])
        dollars = float(of_answers["chip-hours"]) * float(given["PRICE"])
        assert float(of_answers["dollars"]) == pytest.approx(dollars, abs=2)
        assert given["REGION"] == "us-east5" and given["ZONE"] == "us-east5-a"


def test_zones_are_those_of_the_launcher_and_all_are_searched_at_the_end():
    sys.path.insert(0, str(ROOT / "launch"))
    import tpu_vm

    (loop,) = re.findall(r"^for zone in \$ZONE (.*); do$", PAGE, flags=re.MULTILINE)
    searched = set()
    (shapes,) = [rows for rows in tables() if "preset" in rows[0]]
    for row in shapes:
        (column,) = [key for key in row if key.startswith("zones")]
        _, family, _ = tpu_vm.read_type(row["preset"].strip("`"))
        assert row[column].split(", ") == list(family.zones)
        searched |= {*family.zones}
    assert set(loop.split()) == searched


def test_what_deletes_names_the_variable_that_is_not_set():
    """In a shell that has not read the file of variables, `gs://$BUCKET` would be `gs://`."""
    for line in SCRIPT.splitlines():
        if re.search(r"gcloud .*\b(rm|delete)\b", line):
            assert re.search(r"\$\{\w+:\?source ~/opsd.env\}", line), line
