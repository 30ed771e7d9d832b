"""The command opsd_jax.study: killed and started again, its table and its page."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import browser
import small_run
from opsd_jax.runtime import locks

pytestmark = pytest.mark.slow

# Two groups from two warm-ups, one of them with a control arm, one seed.
STUDY = f"""
from opsd_jax.study import grid

def get_config():
    c = grid.default()
    c.base = {str(small_run.MINI) + ":smoke"!r}
    c.groups = {{"all": {{}}, "few": {{"data": {{"limits": (32,)}}}}}}
    c.arms.noise = {{"teacher": {{"visual_thoughts": "noise"}}}}
    c.arms_of = {{"few": ()}}
    return c
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder, output of the last command) of a study that was killed in its first run."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.py").write_text(STUDY)
    command = [sys.executable, "-m", "opsd_jax.study", f"--config={folder}/study.py"]
    command += [f"--workdir={folder}/S"]
    command += [f"--config.changes.{key}={value}" for key, value in small_run.CHANGES.items()]
    environment = small_run.environment(tmp_path_factory)
    first = subprocess.Popen(command, cwd=small_run.ROOT, env=environment)
    metrics, until = folder / "S" / "runs" / "all" / "seed0" / "metrics.jsonl", time.time() + 300
    while not (metrics.exists() and metrics.read_text()) and time.time() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    last = small_run.run(command, env=environment)
    assert last.returncode == 0, last.stderr
    return folder / "S", command, environment, last


def test_a_killed_study_goes_on(study):
    folder, _, _, last = study
    assert "all seed 0: continues" in last.stderr or "waits for an earlier" in last.stderr
    assert last.stdout.splitlines()[-1] == f"the page of the study: {folder}/study.html"
    record = json.loads((folder / "study.json").read_text())
    assert [(job["group"], job["arm"], job["status"]) for job in record["jobs"]] == [
        ("all", "opsd", "done"),
        ("all", "noise", "done"),
        ("few", "opsd", "done"),
    ]
    rows = {(row["group"], row["arm"]): row for row in record["rows"]}
    assert sorted(rows) == [
        (group, arm)
        for group, arms in (("all", "noise opsd start teacher"), ("few", "opsd start teacher"))
        for arm in arms.split()
    ]
    summary = folder / f"runs/all/seed0/eval/{small_run.LAST:06d}-none/summary.json"
    score = json.loads(summary.read_text())["benchmarks"][small_run.TASK]
    row = rows["all", "opsd"]
    assert row["accuracy"] == score["overall"] and row["tokens"] == score["mean_output_tokens"]
    assert rows["all", "noise"]["difference"]["rows"] == small_run.TEST_ROWS
    assert row["kl_before"] > 0 and row["real"] is not None
    # The warm-up is the group's, and an arm starts from it.
    arm = json.loads((folder / "runs/all/seed0/arms/noise/config.json").read_text())
    assert arm["init_from"] == f"{folder}/runs/all/seed0/checkpoints/{small_run.WARMUP}"


def test_a_finished_study_starts_nothing(study):
    folder, command, environment, _ = study
    before = (folder / "study.json").read_bytes()
    listed = small_run.run([*command, "--list"], env=environment)
    assert (listed.returncode, listed.stdout) == (0, "")
    again = small_run.run(command, env=environment)
    assert again.returncode == 0 and "starts" not in again.stderr
    assert (folder / "study.json").read_bytes() == before
    other = small_run.run([*command, "--config.changes.opsd.steps=5"], env=environment)
    assert other.returncode == 1 and "seed0 exists, but this run was started" in other.stderr
    with locks.only_writer(folder, inside=True):
        busy = small_run.run(command, env=environment)
    assert busy.returncode == 1 and "is being written by process" in busy.stderr


def test_the_page_shows_result_curves_and_answers(study):
    html = (study[0] / "study.html").read_text()
    titles = re.findall(r"<h[23] id=.*?>(.*?)</h[23]>", html)
    assert titles[:2] == ["Result", "Difference to opsd"]
    assert "<dt>command</dt><dd><code>python -m opsd_jax.study --config=" in html
    assert "Group all" in titles and "Loss, stage opsd" in html
    assert "Answers side by side, all, seed 0" in titles
    assert html.count("<details class") == 8 and html.count("<img") == 2 * 8
    cells = re.findall(r"<td[^>]*>(noise|opsd)</td>", html.partition("<details class")[2])
    assert cells == ["opsd", "noise"] * 8
    links = re.findall(r'<li><a href="([^#].*?)">', html)
    assert links and all((study[0] / link).exists() for link in links)


@browser.needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(study, tmp_path, width):
    page = study[0] / "study.html"
    pixels = browser.screenshot(page, tmp_path, width, 3000)
    assert all(part.std() > 5 for part in np.array_split(pixels, 6))
    assert pixels[:, :8].std() < 1 and pixels[:, -8:].std() < 1
    assert browser.scroll_width(page, tmp_path, width) == width
