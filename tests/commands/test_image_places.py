"""A run on questions with two images in places: training, evaluation, analyses and their pages."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import small_run
from opsd_jax import eval, train
from opsd_jax.data import __main__ as data
from opsd_jax.data import prepare
from opsd_jax.diagnose import __main__ as diagnose

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compiles")]

COLOURS = ("red", "green", "blue")


def png(*colours: str) -> bytes:
    image = Image.new("RGB", (32, 32), colours[0])
    image.paste(colours[-1], (16, 0, 32, 32))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def made(tmp_path):
    """Rows about two colours as JSONL, their prepared files, and a tokenizer."""
    folder = tmp_path / "source/Colours"
    folder.mkdir(parents=True)
    for first in COLOURS:
        for second in COLOURS:
            (folder / f"{first}-{second}.png").write_bytes(png(first, second))
    for split, count in (("train", 16), ("validation", 4), ("test", 8)):
        lines = []
        for n in range(count):
            first, second = COLOURS[n % 3], COLOURS[n // 3 % 3]
            line = {
                "pid": f"{split}-{n}",
                "question": "find <image> or <image> now",
                "answer": "yes" if first == second else "no",
                "images": [f"{first}-{first}.png", f"{second}-{second}.png"],
                "thoughts": ["look", "so"],
                "visual_thoughts": [f"{first}-{second}.png"],
                "text_trace": "look",
            }
            lines.append(json.dumps(line) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    prepare.prepare(tmp_path / "source", tmp_path / "data", progress=False)
    made = ["--families=maze", "--train=1", "--validation=0", "--test=0"]
    data.main(["make-mini", f"--target={tmp_path}/words", *made])
    return tmp_path


def test_a_run_on_questions_with_two_images(made, capsys):
    config = small_run.config(data__dir=str(made / "data"), data__tasks=("Colours",))
    config.data.make.families, config.tokenizer = (), str(made / "words/made/tokenizer")
    config.data.buckets.student, config.data.buckets.teacher = ((128, 50),), ((160, 75),)
    config.data.buckets.trace = ((224, 75, 64),)
    config.eval.every, config.eval.final_visual_thoughts = 0, ("none", "swap")
    config.eval.final_banned = False
    work = made / "w"
    train.train(config, str(work))

    samples = work / "samples/000001"
    student = next(
        line
        for line in (samples / "warmup-first-batch.txt").read_text().splitlines()
        if line.startswith("context: ")
    )
    assert student.count("[25 patches]") >= 2
    before, between, *_ = student.split("[25 patches]")
    assert "find" in before and "or" in between and "now" not in between
    one, two = (
        np.asarray(Image.open(samples / f"warmup-row0-{name}.png"))
        for name in ("problem", "problem1")
    )
    assert one.shape == two.shape == (40, 40, 3)
    assert (samples.parent / f"{small_run.LAST:06d}/rollout0-problem1.png").exists()
    metrics = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == small_run.LAST and np.isfinite(losses).all()

    eval.main([f"--workdir={work}", "--visual_thoughts=none,image"])
    pages = [work / f"eval/{small_run.LAST:06d}-{mode}" for mode in ("none", "image")]
    for page in pages:
        assert len((page / "predictions.jsonl").read_text().splitlines()) == 8
        text = (page / "report.html").read_text()
        assert "find &lt;image&gt; or &lt;image&gt; now" in text and "problem 2" in text
    diagnose.main(["interventions", f"--workdir={work}", "--rows=4"])
    (page,) = (work / "diagnose").glob("interventions-*/report.html")
    assert "problem 2" in page.read_text()
