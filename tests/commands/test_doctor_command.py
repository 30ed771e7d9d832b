"""The command doctor: every check on a CPU, wrong arguments, two processes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from opsd_jax.doctor import sizes
from opsd_jax.doctor.__main__ import NAMES, main

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compiles")  # on a CPU the command sets the same


@pytest.mark.slow
def test_all_checks_on_a_cpu(tmp_path, monkeypatch, capsys):
    # A busy machine would leave checks out.
    monkeypatch.setattr(sizes, "CPU", dataclasses.replace(sizes.CPU, total=1e6, measurement=0))
    out = tmp_path / "doctor.json"
    with pytest.raises(SystemExit) as done:
        main([f"--workdir={tmp_path / 'W'}", f"--out={out}"])
    shown = capsys.readouterr()
    assert done.value.code == 0, shown.out
    found = json.loads(out.read_text())
    assert found["ok"] and shown.out.strip().splitlines()[-1].startswith("all 22 checks")
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert {name.partition("/")[0] for name in status} == {*NAMES}
    skipped = {"memory/device", "network/all-reduce", "network/workdir"}
    assert {name for name, word in status.items() if word == "skipped"} <= skipped
    values = {check["name"]: check["values"] for check in found["checks"]}
    assert values["decode"]["tokens"] == 8 and values["update"]["student_positions"] == 96
    assert values["image"]["steps"] == 49 and values["image"]["seconds"] > 0
    assert values["attention/flash_interpret/teacher"]["positions"] == 200
    assert values["attention/flash_interpret/vision tower"]["errors"]["dv"] < 0.02
    assert found["settings"]["model"]["llm"]["num_layers"] == 2
    assert list((tmp_path / "W").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=matmul,disc"], "--only names 'disc'"),
        (["--only=disk,disk"], "--only names disk twice"),
        (["--workdir=gs://b/w"], "is an address"),
        (["--out=/"], "is a folder: name a file"),
        (["--config.model.attention=flash"], "give --config=FILE first"),
        (["--config=absent.py"], "there is no such Python file"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    said = capsys.readouterr().err + str(done.value.code)
    assert done.value.code != 0 and message in said


def test_a_failed_check_ends_with_its_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("opsd_jax.plan.bill.checkpoints_of_run", lambda config: (4, 2**70))
    with pytest.raises(SystemExit) as done:
        main(["--only=disk,devices", f"--workdir={tmp_path}"])
    shown = capsys.readouterr().out
    assert done.value.code == 3 and "FAILED   disk" in shown and "ok       devices" in shown


@pytest.mark.slow
def test_two_processes_share_a_workdir(tmp_path):
    command = [ROOT / "launch" / "local_multiprocess.sh", "2", "--", sys.executable, "-m"]
    command += ["opsd_jax.doctor", "--only=devices,network", f"--workdir={tmp_path / 'W'}"]
    done = subprocess.run(
        [*map(str, command), f"--out={tmp_path / 'out.json'}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    status = {(one["process"], one["name"]): one["status"] for one in found["checks"]}
    names = ("devices", "network/all-reduce", "network/workdir")
    assert status == {(n, name): "ok" for n in range(2) for name in names}
    assert found["checks"][1]["values"]["devices"] == 4
    assert "all 2 processes see one" in done.stdout and list((tmp_path / "W").iterdir()) == []
