"""The page of a run, W/report.html: its parts, and how a browser shows it."""

import json
import re
import shutil

import numpy as np
import pytest

import browser
import small_run
from opsd_jax.evaluation import shown_answers
from opsd_jax.evaluation.html import text
from opsd_jax.run import report_table, run_page
from opsd_jax.run import scores as scores_lib

pytestmark = [pytest.mark.usefixtures("fast_compiles"), pytest.mark.slow]


@pytest.fixture
def workdir(tmp_path, tmp_path_factory):
    """A copy of a finished run without arms."""
    copy = tmp_path / "w"
    shutil.copytree(small_run.trained(tmp_path_factory), copy)
    return copy


def test_the_page_shows_result_curves_and_answers(workdir):
    with open(workdir / "metrics.jsonl", "a") as file:  # one evaluation while it trained
        row = {"step": small_run.LAST - 1, "stage": "opsd", f"eval/{small_run.TASK}/none": 0.5}
        file.write(json.dumps(row) + "\n")
    scores = scores_lib.collect(str(workdir), ())
    page = workdir / "report.html"
    assert run_page.write(str(workdir), scores, (), "python -m opsd_jax.train") == str(page)
    html = page.read_text()
    titles = re.findall(r"<h[23] id=.*?>(.*?)</h[23]>", html)
    assert titles == [
        "Result",
        "Curves",
        f"Accuracy on {small_run.TASK}, text only, stage opsd",
        f"Accuracy on {small_run.TASK}, with true visual thoughts, stage opsd",
        "Loss, stage opsd",
        "Length of the student's samples, stage opsd".replace("'", "&#x27;"),
        "Loss, stage warmup",
        "Divergence along the answer",
        "Answers of the trained student, text only",
        "Where the time went",
        "More pages",
    ]
    assert "<dt>command</dt><dd><code>python -m opsd_jax.train</code>" in html
    seen = "The student sees the problem image and the question; the visual thoughts are shown for"
    assert f"{seen} comparison. An" in html
    assert "it always sees the problem image and the question. " in html
    trained = scores[scores_lib.TRAINED][small_run.TASK]
    caution = "These numbers mean little: a run this short shows that everything works"
    assert caution in html  # four steps, twenty examples
    shown = report_table.write(str(workdir), scores, ())  # in the terminal, too
    assert caution in shown and f"{100 * trained['overall']:.1f} % after" in shown
    assert caution in (workdir / "report.md").read_text()
    assert f"{100 * trained['overall']:.1f} % after" in html

    folder = workdir / "eval" / f"{small_run.LAST:06d}-none"
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    hits = [bool(p["hit"]) for p in answers]
    wrong, right = min(12, hits.count(False)), min(12, hits.count(True))
    assert len(re.findall("<details class", html)) == wrong + right
    assert [mark == "hit" for mark in re.findall('<details class="(hit|miss)"', html)] == (
        [False] * wrong + [True] * right
    )
    of_each = [[p for p in answers if bool(p["hit"]) == hit] for hit in (False, True)]
    chosen = [p for some in of_each for p in shown_answers.spread(some, 12, lambda p: "")]
    titles = re.findall(r"</b>\d+\. (.*?)</summary>", html)
    assert titles == [text(f"{small_run.TASK} {shown_answers.title(p)}") for p in chosen]
    interval = " to ".join(f"{100 * limit:.1f}" for limit in trained["interval_95"])
    assert '<th scope="col">95 % interval</th>' in html and f">{interval}</td>" in html
    assert "**" not in html and "<strong>n</strong> is the number of questions" in html
    assert "Mean between teacher and student at each token of the samples: the generalised" in html
    assert html.count("<img") == 2 * (wrong + right)  # the problem and one visual thought each
    links = re.findall(r'<li><a href="([^#].*?)">', html)
    assert links and all((workdir / link).exists() for link in links)


def test_a_long_run_is_not_cautioned():
    def verdict(steps: int, examples: int) -> str:
        config = small_run.config(opsd__steps=steps)
        shown = {scores_lib.TRAINED: {"task": {"overall": 0.75, "n": examples}}}
        return "\n".join(report_table.verdict(shown, (), config, "W"))

    assert verdict(200, 200) == (
        "**task**, 200 test examples, seed 0. After OPSD the student answers 75.0 % without visual "
        "thoughts."
    )
    for steps, examples in ((199, 512), (400, 128)):
        assert f"{steps} OPSD steps, {examples} test examples" in verdict(steps, examples)


def test_curves_show_whether_the_teacher_learned(workdir):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for accuracy, row in zip((0.25, 0.75), [row for row in rows if row["stage"] == "warmup"]):
        row[f"eval/{small_run.TASK}/real"] = accuracy
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_page.write(str(workdir), {}, ())
    html = (workdir / "report.html").read_text()
    assert f"Accuracy on {small_run.TASK}, with true visual thoughts, stage warmup" in html


def test_the_pages_of_its_evaluations_have_the_cautions_of_the_run(workdir):
    """Those of the warm-up were written before the run had results."""
    page = workdir / "eval" / f"{small_run.WARMUP:06d}-none" / "report.html"
    caution = "<strong>These numbers mean little: a run this short"
    assert '<section class="cautions"></section>' in page.read_text()
    run_page.caution_pages(str(workdir))
    assert page.read_text().count(caution) == 1
    (workdir / "eval" / f"{small_run.LAST:06d}-none" / "summary.json").unlink()
    run_page.caution_pages(str(workdir))  # a result is missing
    assert caution not in page.read_text()


def test_a_run_without_a_final_evaluation_has_curves(workdir):
    run_page.write(str(workdir), {}, ())
    html = (workdir / "report.html").read_text()
    assert "Loss, stage opsd" in html and "<details class" not in html


@browser.needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(workdir, tmp_path, width):
    run_page.write(str(workdir), scores_lib.collect(str(workdir), ()), ())
    page = workdir / "report.html"
    pixels = browser.screenshot(page, tmp_path, width, 3000)
    assert pixels.shape == (3000, width)
    # Text and charts from top to bottom, and margins at both sides.
    assert all(part.std() > 5 for part in np.array_split(pixels, 6))
    assert pixels[:, :8].std() < 1 and pixels[:, -8:].std() < 1
    assert browser.scroll_width(page, tmp_path, width) == width
