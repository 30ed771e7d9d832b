"""The timing scripts run at tiny size and report what their readers look for."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import small_run

FOLDER = pathlib.Path(__file__).parents[2] / "perf"


def run(name, *options):
    """(the JSON lines, the rows of the table) that a benchmark prints."""
    command = [
        sys.executable,
        str(FOLDER / f"{name}.py"),
        "--size=tiny",
        "--dtype=float32",
        "--repeats=1",
        *options,
    ]
    # compiled without optimisation: half the seconds
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(s) for s in lines if s.startswith("{")], [
        s for s in lines if s.startswith("|")
    ]


@pytest.fixture
def int8(monkeypatch):
    """The module perf/int8.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("int8")


def test_agreement_of_samples(int8):
    """The second answer differs from its second token on, and what follows no longer counts."""
    tokens = np.array([[5, 6, 7], [5, 6, 0]])
    mask = np.array([[True, True, True], [True, True, False]])
    one = types.SimpleNamespace(tokens=tokens, mask=mask, logprobs=np.zeros((2, 3)))
    other = types.SimpleNamespace(
        tokens=np.array([[5, 6, 7], [5, 9, 0]]),
        mask=mask,
        logprobs=np.array([[0.1, -0.2, 0.0], [0.1, 9.0, 9.0]]),
    )
    assert int8.compare(one, other) == pytest.approx(
        {
            "tokens": 5,
            "equal": 4 / 5,
            "answers": 1 / 2,
            "mean_difference": 0.1,
            "largest_difference": 0.2,
        }
    )


@pytest.mark.slow
def test_int8_samples_of_a_run(int8, tmp_path_factory, capsys):
    int8.main([f"--workdir={small_run.trained(tmp_path_factory)}", "--rows=4"])
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [one["samples"] for one in found] == ["greedy", "sampled"]
    assert all(one["rows"] == 4 and one["largest_difference"] > 0 for one in found)
    assert sum(line.startswith("|") for line in lines) == 4


@pytest.mark.long
def test_drawing():
    lines, table = run("drawing", "--image=32x48", "--problem=32x32", "--steps=3", "--context=1200")
    assert [line["measure"] for line in lines] == ["encode", "decode"] + [
        "prepare",
        "denoise",
        "image",
    ] * 3
    assert len(table) == len(lines) + 2
    by = {(line["measure"], line.get("branches")): line for line in lines}
    common = {
        "benchmark": "drawing",
        "size": "tiny",
        "dtype": "float32",
        "platform": "cpu",
        "batch": 1,
        "repeats": 1,
    }
    for line in lines:
        assert (
            common.items() <= line.items() and {"device", "parameters", "peak_mib"} <= line.keys()
        )
        assert line["seconds"] > 0 and len(line["runs"]) == 1
    for branches in (1, 2, 3):
        steps, image = by["denoise", branches], by["image", branches]
        assert (steps["context_positions"], steps["drawn_tokens"], steps["steps"]) == (1200, 6, 2)
        assert steps["per_step"] == steps["seconds"] / 2 and steps["temporary_mib"] > 0
        assert image["seconds"] == pytest.approx(
            sum(image[part] for part in ("prepare", "denoise", "decode"))
        )
        # k and v of 2 layers, 2 kv heads of 8, float32: contexts, the two delimiters and the drawn
        # tokens
        assert steps["cache_mib"] * 2**20 == 2 * 2 * branches * (1200 + 2 + 6) * 2 * 8 * 4


@pytest.mark.slow
def test_answering():
    lines, table = run("answering", "--tokens=5", "--batch=1,2", "--problem=32x32")
    assert [(line["batch"], line["tokens"]) for line in lines] == [(1, 5), (2, 5)] and len(
        table
    ) == 4
    for line in lines:
        assert line["seconds"] > 0 and line["prefill"] > 0
        assert line["tokens_per_second"] == pytest.approx(line["batch"] * 5 / line["seconds"])
        assert line["ms_per_token"] == pytest.approx(1e3 * (line["seconds"] - line["prefill"]) / 6)
        # 112 slots of the system prompt, 27 x 27 patches with two delimiters, 62 of the question;
        # then bos and 5
        assert line["context_positions"] == 112 + 731 + 62
        assert line["cache_mib"] * 2**20 == 2 * 2 * line["batch"] * (905 + 6) * 2 * 8 * 4


@pytest.mark.slow
def test_step(tmp_path):
    lines, table = run(
        "step",
        "--tokens=5",
        "--rows=40",
        "--vocabulary=600",
        "--chunk=16",
        "--decode_batch=1,2",
        "--train_batch=2",
        f"--json={tmp_path / 'step.json'}",
    )
    assert [(line["part"], line.get("batch")) for line in lines] == [
        ("decode", 1),
        ("decode", 2),
        ("train", 2),
        ("loss", None),
        ("loss, states", None),
    ] and len(table) == 7
    assert json.loads((tmp_path / "step.json").read_text()) == lines
    for line in lines:
        assert line["seconds"] > 0 and line["cpu_seconds"] > 0 and line["temporary_mib"] > 0
        assert line["peak_mib"] - line["rss_start_mib"] == line["peak_part_mib"] > 0
    for line in lines[:2]:  # image of 256 patches and 32 ids, two delimiters each
        assert line["context_positions"] == 258 + 34
        assert line["tokens_per_second"] == pytest.approx(line["batch"] * 5 / line["seconds"])
        assert line["cpu_seconds_per_token"] == pytest.approx(
            line["cpu_seconds"] / (line["batch"] * 5)
        )
    train, whole, states = lines[2:]
    assert (train["student_positions"], train["teacher_positions"]) == (
        292 + 6,
        292 + 42 + 2 * 258 + 26 + 6,
    )
    assert train["cpu_seconds_per_sample"] == train["cpu_seconds"] / 2
    assert train["alias_mib"] > 0.9 * train["outputs_mib"]  # the state is donated
    # the gradient of the states [40, 32], and of the head [32, 600]; beside them scalars
    head = 32 * 600 * 4 / 2**20
    assert whole["outputs_mib"] - states["outputs_mib"] == pytest.approx(head, rel=1e-2)
    assert states["outputs_mib"] == pytest.approx(40 * 32 * 4 / 2**20, rel=0.1)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("drawing", ["--image=40x32"], "multiples of 16"),
        ("drawing", ["--image=2048x64"], "at most 1024"),
        ("answering", ["--context=9"], "the context takes"),
        ("step", ["--parts=sleep"], "is not one of"),
    ],
)
@pytest.mark.slow
def test_sizes_that_cannot_be(name, options, says):
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--size=tiny", *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1 and says in done.stderr


PRESETS = """\
import sys

sys.path.insert(0, {tests!r})
import small_run

SLICES = {{"v5e-4": (4, 1)}}


def get_config(arg):
    assert arg == "paper,v5e-4"
    return small_run.config(stages=("opsd",))
"""


def presets(tmp_path, *options):
    return subprocess.run(
        [
            sys.executable,
            str(FOLDER / "presets.py"),
            f"--config={tmp_path / 'small.py'}",
            f"--plans={tmp_path / 'plans'}",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )


def report(needs, fits, hours, chips, hosts):
    return {
        "fits": fits,
        "hbm_gib": 15.75,
        "chips": chips,
        "devices": chips,
        "programs": [{"needs_gib": 1.0}, {"needs_gib": needs}],
        "run": {
            "stages": [
                {
                    "steps": 1000,
                    "saves": 11,
                    "checkpoint_bytes": 16e10,
                    "step_seconds": hours and [3600 * n / 1000 for n in hours],
                }
            ],
            "chips": chips,
            "hosts": hosts,
            "hours": hours,
            "chip_hours": hours and [chips * n for n in hours],
            "checkpoints": 4,
            "checkpoints_bytes": 64e10,
        },
    }


def test_table_of_presets_from_reports_that_are_there(tmp_path):
    (tmp_path / "small.py").write_text('SLICES = {"v5e-4": 0, "v6e-4": 0, "v5p-8": 0}')
    (tmp_path / "plans").mkdir()
    for name, found in {
        "v5e-4": report(20.0, False, None, 4, 1),
        "v6e-4": report(3.0, True, [2.0, 2.5], 4, 1),
        "v5p-8": report(5.0, True, [1.0, 1.5], 4, 1),
    }.items():
        (tmp_path / f"plans/paper-{name}.json").write_text(json.dumps(found))
    done = presets(tmp_path, "--price_per_chip_hour=v6e=2,4")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [
        "| slice | chips | hosts | memory, GiB | step, s | hours | chip-hours | dollars |",
        "|---|---|---|---|---|---|---|---|",
        "| v5e-4 | 4 | 1 | 20.0 of 15.75: does not fit | – | – | – | – |",
        "| v6e-4 | 4 | 1 | 3.0 of 15.75 | 7.2 to 9.0 | 2.0 to 2.5 | 8 to 10 | 16 to 20 |",
        "| v5p-8 | 4 | 1 | 5.0 of 15.75 | 3.6 to 5.4 | 1.0 to 1.5 | 4 to 6 | 16 to 24 |",
        "",
        "1,000 steps, 11 saves; a checkpoint of 160.0 GB, up to 4 at once, 640.0 GB",
    ]
    assert "dollars" not in presets(tmp_path).stdout
    assert "give a price above 0" in presets(tmp_path, "--price_per_chip_hour=v6e").stderr


@pytest.mark.long
def test_a_preset_is_compiled_once(tmp_path):
    """With a small config, for four chips."""
    pytest.importorskip("libtpu")
    text = PRESETS.format(tests=str(FOLDER.parent / "tests"))
    (tmp_path / "small.py").write_text(text)
    first, again = presets(tmp_path), presets(tmp_path, "--price_per_chip_hour=4.2")
    assert first.returncode == again.returncode == 0, first.stderr
    assert "compiling" in first.stderr and "is there" in again.stderr
    row, priced = (done.stdout.splitlines()[2].split(" | ") for done in (first, again))
    assert row[:3] == ["| v5e-4", "4", "1"] and row[3].endswith(" of 15.75")
    assert len(priced) == len(row) + 1
