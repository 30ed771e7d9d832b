"""The timing scripts run at tiny size and report what their readers look for."""

import ast
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import small_run
from opsd_jax import distill
from opsd_jax.model import bagel
from opsd_jax.plan import flops

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
def perf(monkeypatch):
    """perf/NAME.py as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_agreement_of_samples(perf):
    """The second answer differs from its second token on, and what follows no longer counts."""
    tokens = np.array([[5, 6, 7], [5, 6, 0]])
    mask = np.array([[True, True, True], [True, True, False]])
    one = types.SimpleNamespace(tokens=tokens, mask=mask, logprobs=np.zeros((2, 3)))
    other = types.SimpleNamespace(
        tokens=np.array([[5, 6, 7], [5, 9, 0]]),
        mask=mask,
        logprobs=np.array([[0.1, -0.2, 0.0], [0.1, 9.0, 9.0]]),
    )
    assert perf("int8").compare(one, other) == pytest.approx(
        {
            "tokens": 5,
            "equal": 4 / 5,
            "answers": 1 / 2,
            "mean_difference": 0.1,
            "largest_difference": 0.2,
        }
    )


@pytest.mark.slow
def test_int8_samples_of_a_run(perf, tmp_path_factory, capsys):
    perf("int8").main([f"--workdir={small_run.trained(tmp_path_factory)}", "--rows=4"])
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


# --- against PyTorch, which is not installed here ------------------------------------------------


def constants(path):
    """What a file assigns at its top level, without running the rest of it."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    found = {}
    exec(compile(ast.Module(body, type_ignores=[]), path, "exec"), found)
    return found


def test_torch_baseline_has_the_sizes_and_settings_of_step(perf):
    own, drawing, step = constants(FOLDER / "torch_baseline.py"), perf("drawing"), perf("step")
    for size, parts in own["SIZES"].items():
        model = drawing.SIZES[size]
        for name, given in parts.items():
            # all that is not given is the default
            assert type(getattr(model, name))(**given) == getattr(model, name), (size, name)
    assert (own["GRID"], own["GRID"]) == step.GRID
    assert (own["SIDE"], own["PATCH_DIM"]) == (model.vit.side, model.vit.patch_dim)
    assert (own["ROPE_THETA"], own["NORM_EPS"]) == (model.llm.rope_theta, model.llm.rms_norm_eps)
    assert own["NORM_EPS"] == model.vit.layer_norm_eps
    tokenizer = vars(drawing.TOKENIZER)
    assert {name: own[name.upper()] for name in tokenizer} == tokenizer
    lengths = [
        sum(2 + (own["GRID"] ** 2 if block == "image" else block) for block in own[role])
        for role in ("STUDENT", "TEACHER")
    ]
    rows = step.contexts(1, drawing.SIZES["tiny"])
    assert lengths == [rows.student.padded_length, rows.teacher.padded_length]
    config = distill.DistillConfig(model=model, bos=own["BOS"], eos=own["EOS"])
    loss, optim = config.divergence, config.optim
    assert (own["TOP_K"], own["CLIP"], own["BETA"]) == (loss.top_k, loss.clip, loss.beta)
    assert (loss.kind, loss.support, loss.tail, loss.clip_unit, loss.temperature) == (
        "jsd",
        "teacher",
        False,
        "entry",
        1.0,
    )
    assert (own["LR"], own["MIN_LR"], own["WARMUP"], own["TOTAL"]) == (
        optim.lr,
        optim.min_lr,
        optim.warmup_steps,
        optim.total_steps,
    )
    assert (*own["BETAS"], own["ADAM_EPS"], 0.0) == (
        optim.b1,
        optim.b2,
        optim.eps,
        optim.weight_decay,
    )
    assert (own["MAX_GRAD_NORM"], own["EMA_DECAY"]) == (optim.max_grad_norm, config.ema_decay)
    assert (config.teacher, optim.kind, config.reduction) == ("ema", "adamw", "completion")
    for name in ("PEAK_SIZES", "PEAK_REPEATS"):
        assert getattr(perf("against_torch"), name) == own[name]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_operations_of_an_update_are_those_of_the_traced_one(perf, batch):
    """Without recomputation. The tower's attention of the traced one joins the teacher's images."""
    drawing, step, against_torch = (perf(n) for n in ("drawing", "step", "against_torch"))
    model = dataclasses.replace(drawing.SIZES["mid"], generation=None)
    config = distill.DistillConfig(model=model, bos=1, eos=2)
    params = jax.eval_shape(lambda key: bagel.init(key, config=model), jax.random.key(0))
    state = jax.eval_shape(lambda params: distill.init_state(params, config), params)
    rows, completions = step.contexts(batch, model), step.trajectory(batch, 128, model)
    traced = jax.make_jaxpr(lambda *x: distill.update_step(*x, config=config))(
        state, rows, completions
    )
    line = {
        "batch": batch,
        "tokens": 128,
        "student_positions": rows.student.padded_length + 129,
        "teacher_positions": rows.teacher.padded_length + 129,
    }
    counted = against_torch.update_operations(model, line)
    assert counted == pytest.approx(flops.matmul_flops(traced.jaxpr), rel=0.03)


def recorded(side, number, part, batch, seconds, **more):
    line = {"side": side, "round": number, "part": part, "size": "mid", "batch": batch}
    line |= {"parameters": 64375552, "seconds": seconds, "cpu_seconds": 2 * seconds}
    return line | {"peak_mib": 1000.0 if side == "ours" else 1500.0, "tokens": 128} | more


def a_peak(side, number, rate):
    return {"side": side, "round": number, "part": "peak", "operations_per_second": rate}


def test_table_of_ratios(perf):
    long = {"student_positions": 421, "teacher_positions": 1005}
    lines = [a_peak("ours", 0, 60e9), a_peak("torch", 0, 163.011428352e9), a_peak("ours", 1, 1e9)]
    for number, ours, theirs in ((0, 1.0, 2.0), (1, 2.0, 3.0), (2, 4.0, 4.0)):
        lines += [
            recorded("torch", number, "decode", 16, theirs),  # the order changes nothing
            recorded("ours", number, "decode", 16, ours),
            recorded("ours", number, "train", 1, 2 * ours, **long),
            recorded("torch", number, "train", 1, theirs, **long),
        ]
    assert perf("against_torch").table(lines).splitlines() == [
        "| case | ours, s | PyTorch, s | PyTorch / ours | CPU-seconds, PyTorch / ours | memory, "
        "PyTorch / ours | share of peak, ours | PyTorch |",
        "|---|---|---|---|---|---|---|---|",
        "| decode, batch 16 | 2 | 3 | 1.50 (1.00–2.00) | 1.50 (1.00–2.00) | 1.50 (1.50–1.50) | – "
        "| – |",
        "| update, batch 1 | 4 | 3 | 0.75 (0.50–1.00) | 0.75 (0.50–1.00) | 1.50 (1.50–1.50) | 25 % "
        "| 33 % |",
    ]
    lines[-1]["parameters"] += 1
    with pytest.raises(SystemExit, match=r"64,375,552 \(ours\) and 64,375,552 \(torch\) and "):
        perf("against_torch").table(lines)


def stand_in(tmp_path, body):
    """A program in the place of a Python with PyTorch."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--torch_python is missing"),
        (["--torch_python=/nowhere/bin/python"], "/nowhere/bin/python: No such file or directory"),
        (["--torch_python=/nowhere/bin/python"], "python -m venv VENV && VENV/bin/pip install to"),
        (["--torch_python={without}"], "cannot import torch (No module named 'torch'): install"),
        (["--torch_python={without}"], "own, python -m venv VENV"),
        (["--torch_python={without}", "--rounds=0"], "--rounds=0: give at least 1"),
    ],
)
def test_without_a_python_that_has_torch(perf, tmp_path, capsys, options, says):
    without = stand_in(tmp_path, "raise SystemExit(\"No module named 'torch'\")\n")
    with pytest.raises(SystemExit) as ended:
        perf("against_torch").main([option.format(without=without) for option in options])
    assert says in f"{ended.value}{capsys.readouterr().err}"


THEIRS = """\
import json, sys
if "-c" in sys.argv:
    sys.exit()
given = dict(word[2:].split("=") for word in sys.argv[2:])
line = {"part": given["part"], "size": given["size"], "batch": int(given["batch"])}
if given["part"] == "peak":
    print(json.dumps({"part": "peak", "operations_per_second": 1e9}))
else:
    line |= {"parameters": 282752, "seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 1000.0}
    print(json.dumps(line))
"""


def test_the_sides_take_turns(perf, tmp_path, monkeypatch, capsys):
    module, ran = perf("against_torch"), []

    def run(side, part, batch, number, args):
        ran.append((number, part, batch, side))
        return a_peak(side, number, 1e9) if not batch else recorded(side, number, part, batch, 1.0)

    monkeypatch.setattr(module, "run", run)
    lines = tmp_path / "lines.json"
    python = stand_in(tmp_path, THEIRS)
    options = ["--rounds=2", "--decode_batch=1,16", "--train_batch=", f"--json={lines}"]
    module.main([f"--torch_python={python}", *options])
    both = [("ours", "torch"), ("torch", "ours")]
    cases = [("peak", 0), ("decode", 1), ("decode", 16)]
    assert ran == [(n, *case, side) for n in (0, 1) for case in cases for side in both[n]]
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(lines.read_text()) == [json.loads(line) for line in printed[:12]]
    assert printed[12:] == module.table([json.loads(line) for line in printed[:12]]).splitlines()


@pytest.mark.slow
def test_against_torch(tmp_path):
    """With a stand-in for the other side."""
    command = [
        sys.executable,
        str(FOLDER / "against_torch.py"),
        f"--torch_python={stand_in(tmp_path, THEIRS)}",
        "--size=tiny",
        "--rounds=1",
        "--repeats=1",
        "--tokens=5",
        "--decode_batch=1",
        "--train_batch=",
    ]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    *lines, _, _, row = done.stdout.splitlines()
    peak, _, ours, theirs = map(json.loads, lines)
    assert peak["operations_per_second"] > 1e9
    assert ours["parameters"] == theirs["parameters"] and ours["tokens"] == 5
    assert row.startswith("| decode, batch 1 | ")
