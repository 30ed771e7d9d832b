"""docs/guides/reproduce-paper.md: all its commands in order, with tiny weights and data and with
stand-ins for what needs a network, a cloud or a cluster.
"""

import itertools
import json
import math
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
from opsd_jax import config as config_lib
from opsd_jax.data import __main__ as data
from opsd_jax.plan import topology

ROOT = small_run.ROOT
PAGE = (ROOT / "docs/guides/reproduce-paper.md").read_text(encoding="utf-8")
PLAN = (ROOT / "docs/performance/plan.md").read_text(encoding="utf-8")
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
    assert "--config=configs/visual_opsd.py:v5p-8 --workdir=runs/visual-opsd" in done.stdout
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
    # Training is there twice, with you and without you.
    assert [value["command"] for value in values] == [
        words for words, _ in itertools.groupby(on_vms)
    ]
    # What each place trains and evaluates is the same; Slurm has no preset, and another batch.
    on_slurm = [
        line.partition("launch/slurm.sbatch ")[2]
        for line in called.splitlines()
        if line.startswith("sbatch ")
    ]
    assert on_slurm == [
        " ".join(value["command"]).replace(":v5p-8", "").replace("batch_size=64", "batch_size=16")
        if value["name"] != "mini"
        else " ".join(value["command"])
        for value in values
    ]
    assert called.count("--dependency=afterok:7") == len(on_slurm) - 1
    # Every slice of a block that trains or evaluates is given back at its end.
    trained = done.stdout.rindex("opsd_jax.train --config=configs/visual_opsd.py:v5p-8")
    assert "queued-resources delete" in done.stdout[trained:].partition("opsd_jax.eval")[0]


def tables(page: str = PAGE):
    """Rows of the tables of slices on a page, {column: cell}."""
    for text in re.findall(r"^\| (?:preset|slice) \|.*?\n\n", page, flags=re.DOTALL | re.MULTILINE):
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
    text = text.replace("export TYPE=v5p-8", f"export TYPE={name}")
    (tmp_path / "opsd.env").write_text(text)
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


def most(cell: str) -> float:
    """The upper figure of a cell such as "9.5 to 12.0"."""
    return float(cell.split(" to ")[-1])


def stated(pattern: str, page: str = PAGE) -> tuple[str, ...]:
    """The groups of a pattern that prose has once, in which a space is any white space."""
    (found,) = re.findall(pattern.replace(" ", r"\s+"), page)
    return found


@pytest.fixture
def figures(tmp_path):
    """{slice: (row of the table of costs, seconds and hours of each protocol, dollars an hour)}.

    Those of the protocols are of 7,500 questions, from docs/performance/plan.md: on v5p-16 and
    v5p-32 several hosts run the program of v5p-8.
    """
    costs, _ = [rows for rows in tables() if "slice" in rows[0]]
    (answers,) = [rows for rows in tables(PLAN) if "protocol" in rows[0]]
    found = {}
    for cost in costs:
        name = cost["slice"]
        program = "v5p-8" if name.startswith("v5p") else name
        shared = int(cost["hosts"]) if program != name else 1
        protocols = {
            row["protocol"].strip("`"): (
                most(row["seconds of a batch"]),
                most(row["7,500 questions, hours"]) / shared,
            )
            for row in answers
            if row["slice"] == program
        }
        price = int(cost["chips"]) * float(variables(tmp_path, name)["PRICE"])
        found[name] = (cost, protocols, price)
    return found


def test_the_table_of_a_first_run_is_the_sum_of_its_parts(figures):
    _, answers = [rows for rows in tables() if "slice" in rows[0]]
    for row in answers:
        cost, protocols, _ = figures[row["slice"]]
        paper, harness = protocols["paper"][1], protocols["harness"][1]
        assert float(row["`paper` once, minutes"]) == pytest.approx(60 * paper, abs=0.7)
        assert float(row["`harness` with one seed, hours"]) == pytest.approx(harness, abs=0.06)
        hours = most(cost["hours"]) + 1 + 2 * paper + harness  # an hour for set-up and trials
        assert float(row["first run, hours"]) == pytest.approx(hours, abs=0.11)


def test_figures_in_prose_are_those_of_the_tables(figures):
    # A step of training, and what losing a slice costs.
    step, rate, name = stated(r"16 / ([\d.]+) = ([\d.]+) on (\S+) ")
    assert float(step) == most(figures[name][0]["step, s"])
    assert float(rate) == pytest.approx(16 / float(step), abs=0.005)
    steps, name, minutes, dollars = stated(
        r"at most (\d+) steps: on (\S+) (\d+) minutes, ([\d.]+) dollars"
    )
    assert int(steps) == config_lib.default().checkpoint.every
    lost = int(steps) * most(figures[name][0]["step, s"])
    assert float(minutes) == pytest.approx(lost / 60, abs=0.5)
    assert float(dollars) == pytest.approx(lost / 3600 * figures[name][2], abs=0.1)
    # Evaluations: six by `harness`, and one by `paper`.
    name, hours, dollars = stated(r"six evaluations: on (\S+) ([\d.]+) hours and (\d+) dollars")
    _, protocols, price = figures[name]
    assert float(hours) == pytest.approx(6 * protocols["harness"][1], abs=0.06)
    assert float(dollars) == pytest.approx(6 * protocols["harness"][1] * price, abs=1)
    seconds, questions, batches, minutes, name = stated(
        r"modelled ([\d.]+) s of a host's four v5p for (\d+) questions would make that (\d+) "
        r"batches one after another, (\d+) minutes, on the two hosts of (\S+);"
    )
    cost, protocols, _ = figures[name]
    assert float(seconds) == protocols["paper"][0] and cost["hosts"] == "2"
    assert int(batches) == math.ceil(7500 / int(questions) / 2)
    assert int(minutes) == round(int(batches) * float(seconds) / 60)
    assert float(stated(r"tokens: ([\d.]+) s a batch")) == protocols["harness"][0]
    # Idle slices.
    name, chips, price, dollars = stated(r"an idle (\S+) costs (\d+) x ([\d.]+) = ([\d.]+) dollars")
    assert figures[name][0]["chips"] == chips
    assert float(dollars) == pytest.approx(figures[name][2]) == int(chips) * float(price)


def test_sizes_in_prose_are_those_of_plan():
    full, start = stated(r"10 saves of ([\d.]+) GB in [\d.]+ s and one of ([\d.]+) GB", PLAN)
    assert stated(r"A checkpoint has ([\d.]+) GB") == full
    assert stated(r"these alone, ([\d.]+) GB") == start
    at_once = stated(r"up to ([\d.]+) GB while it trains")
    assert at_once == stated(r"up to 4 at once, ([\d.]+) GB", PLAN)
    left, other, month = stated(
        r"\| ([\d.]+) GB of checkpoints, (\d+) GB of [a-z, ]+ \| ([\d.]+) a month"
    )
    full, start = float(full), float(start)
    assert float(at_once) == pytest.approx(3 * full + start, abs=0.2)
    assert float(left) == pytest.approx(2 * full + start, abs=0.1)
    price = float(stated(r"the bucket, ([\d.]+) a GB and month"))
    assert float(month) == pytest.approx(price * (float(left) + int(other)), abs=0.05)
    seconds, dollars = stated(r"It takes (\d+) s on v5p-8, and ([\d.]+) dollars a month")
    assert int(seconds) == round(start)  # one host, 1 GB/s
    assert float(dollars) == pytest.approx(price * start, abs=0.005)
    cluster, node, month = stated(
        r"cluster \(([\d.]+) an hour\) and its one node \(([\d.]+)\).*?\| (\d+) a month"
    )
    assert float(month) == pytest.approx(730 * (float(cluster) + float(node)), abs=1)


def test_every_preset_is_compiled():
    """As the page's first warning says."""
    (rows,) = [rows for rows in tables(PLAN) if {"of it latency", "fits"} <= rows[0].keys()]
    assert list(dict.fromkeys(row["slice"] for row in rows)) == presets()
    assert {row["fits"] for row in rows} == {"yes"}


def test_commands_about_the_budget_name_the_project_that_pays_for_them():
    lines = SCRIPT.replace("\\\n", " ").splitlines()
    of_billing = [line for line in lines if re.search(r"gcloud billing", line)]
    assert len(of_billing) == 2
    assert all("--billing-project=$PROJECT" in line for line in of_billing)


def test_spot_is_asked_for_on_gke_too(tmp_path):
    text = re.search(r"^export SPOT_FLAG=.*$", PAGE, flags=re.MULTILINE)[0]
    for spot, flag in (("0", ""), ("1", "--spot")):
        script = f'set -eu; SPOT={spot}; {text}\nprintf %s "$SPOT_FLAG"'
        assert subprocess.check_output(["bash", "-c", script], text=True) == flag
    (pool,) = re.findall(r"^gcloud container node-pools create(?:.*\\\n)*.*$", SCRIPT, re.MULTILINE)
    assert pool.endswith(" $SPOT_FLAG") and "--service-account=$ACCOUNT" in pool


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
