"""Batched inference with resume, edits of generated images, and benchmarks of both kinds."""

import collections
import json
import pathlib
import re
import shlex
import shutil
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image

import opsd_jax
from opsd_jax import interleave, tasks
from opsd_jax import params as params_lib
from opsd_jax.evaluation import (
    answer_files,
    benchmark,
    comparison,
    contexts,
    inference,
    interleaved,
    page,
    shown_answers,
    store,
    summary_tables,
    tables,
    wording,
)
from opsd_jax.evaluation import results as results_lib
from opsd_jax.run import evaluate
from opsd_jax.run.evaluation_request import Request
from opsd_jax.runtime import stopping

TABLES = pathlib.Path(__file__).parents[1] / "scoring" / "tsv"


NO_PREDICTIONS = {"predictions": [], "seconds": 0.0, "compiled": False}


def bench(name, size=5):
    return benchmark.Benchmark(name, tuple(range(size)), None, None, None, size=lambda key: key % 2)


# --- keeping


def collect(folder, batches, died_at=None, identity=None):
    asked = []

    def predict(number, benchmark, keys):
        if number == died_at:
            raise KeyboardInterrupt
        asked.append(number)
        predictions = [{"index": key, "prediction": f"{benchmark.name} ü\n{key}"} for key in keys]
        return {"predictions": predictions, "seconds": 1.0, "compiled": False}

    told = []
    try:
        records = inference.answer(
            batches,
            predict,
            store=store.Store(str(folder), identity or {"seed": 0}),
            on_batch=lambda progress: told.append((progress.done, progress.hits)),
        )
    except KeyboardInterrupt:
        records = None
    return records, asked, told


def test_a_kill_loses_one_batch_at_most(tmp_path):
    batches = inference.batches([bench("A"), bench("B", 2)], 2)
    assert [(b.name, keys) for b, keys in batches] == [
        ("A", [0, 2]),
        ("A", [4, 1]),
        ("A", [3]),
        ("B", [0, 1]),
    ]
    whole, asked, told = collect(tmp_path / "whole", batches)
    assert asked == [0, 1, 2, 3] and told == [(2, None), (4, None), (5, None), (7, None)]
    assert [record["batch"] for record in whole] == asked
    for torn in (b"", b'{"batch": 2, "predictions": [{"ind'):
        folder = tmp_path / f"part{len(torn)}"
        assert collect(folder, batches, died_at=2)[1] == [0, 1]
        with open(folder / store.FILE, "ab") as f:
            f.write(torn)
        records, asked, told = collect(folder, batches)
        assert asked == [2, 3] and records == whole
        assert told == [(2, None), (4, None), (5, None), (7, None)]
        assert (folder / store.FILE).read_bytes() == (tmp_path / "whole" / store.FILE).read_bytes()
        assert collect(folder, batches)[:2] == (whole, [])  # what is done is not asked again


def test_answers_of_several_processes_are_one(tmp_path):
    """Three processes were killed; one goes on with all that they had."""
    batches = inference.batches([bench("A"), bench("B", 2)], 2)
    whole, *_ = collect(tmp_path / "whole", batches)
    lines = (tmp_path / "whole" / store.FILE).read_text().splitlines()
    folder = tmp_path / "parts"
    folder.mkdir()
    for process, line in ((0, lines[1]), (1, None), (2, lines[3])):
        (folder / f"answers-{process}.jsonl").write_text(
            "\n".join(filter(None, [lines[0], line])) + "\n"
        )
    records, asked, _ = collect(folder, batches)
    assert (
        asked == [1, 3] and records == whole and [p.name for p in folder.iterdir()] == [store.FILE]
    )


def test_a_damaged_file_is_named(tmp_path):
    batches = inference.batches([bench("A")], 2)
    collect(tmp_path, batches)
    with open(tmp_path / store.FILE, "a") as f:
        f.write("{no json}\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/answers.jsonl is damaged .* delete it"):
        collect(tmp_path, batches)


def test_generated_images_of_other_answers_are_removed(tmp_path):
    batches, stale = inference.batches([bench("A")], 2), tmp_path / "pictures" / "A" / "0-0.png"
    for kept in (False, True):
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.touch()
        collect(tmp_path, batches)
        assert stale.exists() == kept


def test_answers_of_other_conditions_are_not_mixed(tmp_path):
    batches = inference.batches([bench("A")], 2)
    collect(tmp_path, batches, died_at=1, identity={"seed": 0, "mode": "none"})
    before = (tmp_path / store.FILE).read_bytes()
    with pytest.raises(
        store.DifferentAnswersError, match="begun with another mode, seed: give the same"
    ):
        collect(tmp_path, batches, identity={"seed": 1, "mode": "real"})
    assert (tmp_path / store.FILE).read_bytes() == before


def test_finished_answers_are_found_in_other_batches(tmp_path):
    """Of the same examples, under the same conditions, and only if none is missing."""

    def identity(batches, **changes):
        rows = [[benchmark.name, list(keys)] for benchmark, keys in batches]
        return {"seed": 0, "batch_size": len(rows[0][1]), "rows": rows} | changes

    two, three = (inference.batches([bench("A"), bench("B", 2)], size) for size in (2, 3))
    assert store.finished(str(tmp_path / "none"), identity(two)) is None
    for died_at, answers in ((3, None), (None, identity(two))):
        collect(tmp_path, two, died_at, identity(two))
        assert store.finished(str(tmp_path), identity(three)) == answers
    assert store.finished(str(tmp_path), identity(three, seed=1)) is None
    fewer = inference.batches([bench("A", 4), bench("B", 2)], 2)
    assert store.finished(str(tmp_path), identity(fewer)) is None
    (tmp_path / store.FILE).write_text("")
    assert store.finished(str(tmp_path), identity(two)) is None


def test_a_run_that_answered_nothing_is_in_nobodys_way(tmp_path):
    batches = inference.batches([bench("A")], 2)
    collect(tmp_path, batches, died_at=0, identity={"batch_size": 64})
    assert collect(tmp_path, batches, identity={"batch_size": 2})[1] == [0, 1, 2]


def test_a_stop_between_batches_keeps_what_is_answered(tmp_path):
    batches, asked = inference.batches([bench("A"), bench("B", 2)], 2), []
    kept = store.Store(str(tmp_path), {})

    def predict(number, benchmark, keys):
        asked.append(number)
        return NO_PREDICTIONS

    def stop_before_the_third():
        if len(asked) == 2:
            raise stopping.Stopped

    with pytest.raises(stopping.Stopped):
        inference.answer(batches, predict, store=kept, before_batch=stop_before_the_third)
    inference.answer(batches, predict, store=kept)
    assert asked == [0, 1, 2, 3]
    store.forget(str(tmp_path))
    assert not store.is_begun(str(tmp_path))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("done", [0, 2])
def test_all_processes_ask_equally_often_whether_to_stop(tmp_path, monkeypatch, together, done):
    """Four batches for three processes: those with one batch less ask once more.

    JAX stops all at the same question.
    """
    batches = inference.batches([bench("A"), bench("B", 2)], 2)
    collect(tmp_path / "0", batches, died_at=done)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: x)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    asked = []
    for process in range(3):
        if process:
            shutil.copytree(tmp_path / "0", tmp_path / f"{process}")
        monkeypatch.setattr(jax, "process_index", lambda: process)
        times = iter(range(99))
        inference.answer(
            batches,
            lambda *_: NO_PREDICTIONS,
            store=store.Store(str(tmp_path / f"{process}"), {"seed": 0}, together),
            before_batch=lambda: next(times),
        )
        asked.append(next(times))
    assert asked == [len(batches) if together else 2] * 3


def test_rows_that_take_no_part_are_left_out_of_the_plan():
    part = bench("A", 3).without([1])
    assert inference.batches([part], 4)[0][1] == [0, 2] and part.left_out == (1,)


# --- generated images


def test_what_a_changed_image_is(tmp_path):
    picture = np.full((8, 8, 3), 7, np.uint8)
    assert (
        interleaved.intervention("generated", "T", [1], seed=0) is None
        and interleaved.intervention("none", "T", [1], seed=0) is None
    )
    assert interleaved.intervention("generated-remove", "T", [1], seed=0)(0, 0, picture) is None
    noise = interleaved.intervention("generated-noise", "T", [1, 2], seed=0)
    first, other, round_2 = noise(0, 0, picture), noise(1, 0, picture), noise(0, 1, picture)
    assert first.shape == picture.shape and first.dtype == np.uint8
    assert (
        (noise(0, 0, picture) == first).all()
        and (first != other).any()
        and (first != round_2).any()
    )
    assert (
        interleaved.intervention("generated-noise", "T", [1], seed=1)(0, 0, picture) != first
    ).any()
    values = (
        interleaved.noise_image(np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0)) / 127.5
        - 1
    )
    assert (
        abs(values.mean()) < 0.02 and abs(np.mean(np.abs(values) == 1) - 0.317) < 0.02
    )  # beyond one sigma: cut off


def test_a_swap_shows_what_the_next_row_drew(tmp_path):
    shade = {(1, 0): 10, (3, 0): 30, (3, 1): 31, (5, 0): 50}
    for (row, number), value in shade.items():
        answer_files.save_image(
            np.full((4, 4, 3), value, np.uint8),
            interleaved.image_path(str(tmp_path), "T", row, number),
        )
    answer_files.save_image(
        np.zeros((4, 4, 3), np.uint8), interleaved.image_path(str(tmp_path), "T-2", 4, 0)
    )
    swap = interleaved.intervention(
        "generated-swap", "T", [1, 3, 5, 4], seed=0, swap_from=str(tmp_path)
    )
    mine = np.zeros((4, 4, 3), np.uint8)
    assert [int(swap(b, 0, mine)[0, 0, 0]) for b in range(4)] == [30, 50, 10, 50]
    assert int(swap(0, 1, mine)[0, 0, 0]) == 31
    assert int(swap(9, 0, mine)[0, 0, 0]) == 50  # a filler row is the last one again
    with pytest.raises(FileNotFoundError, match="no other example of T has an image of round 2"):
        swap(1, 1, mine)
    with pytest.raises(
        FileNotFoundError, match="--visual_thoughts=generated of the same checkpoint"
    ):
        interleaved.intervention(
            "generated-swap", "T", [1], seed=0, swap_from=str(tmp_path / "gone")
        )


def test_images_of_any_index_stay_in_their_folder(tmp_path):
    """An index of a public table may be any text."""
    keys = ["../../x", "a/b"]
    for shade, key in enumerate(keys):
        path = interleaved.image_path(str(tmp_path), "T", key, 0)
        assert pathlib.Path(path).resolve().parent == tmp_path / "pictures" / "T"
        answer_files.save_image(np.full((4, 4, 3), shade, np.uint8), path)
    swap = interleaved.intervention("generated-swap", "T", keys, seed=0, swap_from=str(tmp_path))
    assert [int(swap(b, 0, None)[0, 0, 0]) for b in range(2)] == [1, 0]


def test_the_form_of_the_harness():
    answer = interleave.Answer(["a<image_start>", np.zeros((2, 2, 3)), "b"], 5)
    assert answer_files.as_harness(answer) == "Round_0:\na<image_start>\n[Image]\nRound_1:\nb"


# --- benchmarks


def test_a_table_as_a_benchmark():
    table = tables.read(TABLES / "BLINK.tsv")
    found = benchmark.of_table(table, cache="lossless", limit=3)
    assert found.keys == tuple(
        row.index for row in tables.subset(table, 3, 0).rows
    ) and not benchmark.broken(found)
    pictures, text = found.question(found.keys[0])
    assert (
        all(isinstance(p, Image.Image) for p in pictures)
        and "<|image_1|>" in text
        and len(pictures) == found.size(found.keys[0])
    )
    lines, summary = found.judge({key: found.expected(key) for key in found.keys})
    assert summary["overall"] == 1 == summary["n"] / 3 and all(
        line["hit"] for line in lines.values()
    )
    lines, summary = found.judge({found.keys[0]: found.expected(found.keys[0]), found.keys[1]: "?"})
    assert (
        summary["overall"] == 0.5 and summary["needs_judge"] == 1 and summary["interval_95"][0] > 0
    )


def test_first_rows_of_a_circular_table_are_whole_questions():
    table = tables.read(TABLES / "SAT_circular.tsv")
    found = benchmark.of_table(table, cache="lossless", limit=1)
    right = found.judge({key: f"<answer>{found.expected(key)}</answer>" for key in found.keys})[1]
    assert len(found.keys) > 1 and right["n"] == 1 and right["overall"] == 1


# --- tables


def entry(overall, seconds, unit="fraction"):
    return {
        "overall": overall,
        "unit": unit,
        "n": 10,
        "interval_95": [0.1, 0.9],
        "mean_output_tokens": 3.0,
        "seconds_per_sample": seconds,
    }


def test_the_ratio_of_image_generation_to_text():
    def of(mode, found, **more):
        return {
            "mode": mode,
            "checkpoint": "c",
            "benchmarks": {"MMVP": found},
            **more,
        }

    summaries = {
        "n": of("none", entry(0.75, 0.1)),
        "g": of("generated", entry(70.0, 1.43, "percent") | {"pictures_per_sample": 1.25}),
        "other": of("generated", entry(0.1, 9), checkpoint="d"),
        "untimed": of("none", entry(0.5, None)),
    }
    lines = summary_tables.speeds(summaries).splitlines()
    assert len(lines) == 3 and lines[2].endswith("| 1.25 | 1.4300 | 0.1000 | 14.3x | +5.0 |")
    assert "| 78.33 | 77.33 |" in summary_tables.table(
        summaries
    ) and "| – |" in summary_tables.table(summaries)
    assert summary_tables.speeds({"n": summaries["n"]}) == ""
    assert (
        summary_tables.speeds(
            {"n": summaries["n"] | {"weights": "1"}, "g": summaries["g"] | {"weights": "2"}}
        )
        == ""
    )


def test_mean_over_seeds():
    def of(seed, overall, **more):
        return {
            "seed": seed,
            "checkpoint": "w/c",
            "protocol": "harness-none",
            "benchmarks": {"MMVP": entry(overall, 0.1)},
            **more,
        }

    summaries = {
        "a": of(0, 0.5),
        "b": of(1, 0.7),
        "c": of(2, 0.6),
        "again": of(2, 0.9),
        "p": of(1, 0.1, protocol="paper-none"),
    }
    *_, line = summary_tables.seeds(summaries).splitlines()
    assert line == "| harness-none | c | MMVP | 60.0 ± 10.0 % | 0, 1, 2 | 10 |"
    assert summary_tables.seeds({name: summaries[name] for name in "ap"}) == ""
    # the path is the same, the weights are not; the weights are the same, the path is not
    assert summary_tables.seeds({"a": of(0, 0.5, weights="1"), "b": of(1, 0.7, weights="2")}) == ""
    moved = summary_tables.seeds(
        {"a": of(0, 0.5, weights="1"), "b": of(1, 0.7, weights="1", checkpoint="w/d")}
    )
    assert "| c | MMVP | 60.0" in moved


def test_paper_numbers_are_of_known_benchmarks():
    assert set(tables.PAPER) == set(tables.KINDS)
    unique = collections.OrderedDict((value, None) for value in tables.PAPER.values())
    teacher, student = np.mean(
        list(unique), axis=0
    )  # nine columns of Table 2 and their published means
    assert len(unique) == 9 and round(teacher, 2) == 70.63 and round(student, 2) == 74.03


def test_json_lines_are_what_training_writes(tmp_path):
    """One row of predictions, by hand."""
    result = results_lib.Result(
        "T", [{"index": 0, "prediction": "x", "hit": True, "tokens": 1}], 1.0, 1
    )
    results_lib.write(str(tmp_path), [result], checkpoint="c", seed=0, protocol="p")
    assert json.loads((tmp_path / "predictions.jsonl").read_text()) == {
        "benchmark": "T",
        "index": 0,
        "prediction": "x",
        "hit": True,
        "tokens": 1,
    }


# --- random subsets


def test_a_subset_is_random_in_order_and_nested():
    from opsd_jax.data import randomness

    some, more = randomness.subset(512, 128, 0), randomness.subset(512, 256, 0)
    assert len(set(some)) == 128 and some == sorted(some) == randomness.subset(
        512, 128, 0
    ) != randomness.subset(512, 128, 1)
    assert set(some) < set(more) and randomness.subset(5, 0, 0) == randomness.subset(
        5, 9, 0
    ) == list(range(5))
    by_quarter = np.bincount(np.array(some) // 128)  # an ordered split: small problems first
    assert by_quarter.min() > 16 and by_quarter.max() < 48
    times = np.bincount(sum([randomness.subset(20, 5, seed) for seed in range(400)], []))
    assert abs(times - 100).max() < 40


def test_a_subset_of_a_table_has_whole_questions():
    table = tables.read(TABLES / "SAT_circular.tsv")
    part, whole = tables.subset(table, 1, 0), tables.questions(table)
    asked = tables.questions(part)
    assert len(asked) == 1 and part.rows == tuple(
        row for row in table.rows if tables.question(row) in asked
    )
    assert {
        q for seed in range(40) for q in tables.questions(tables.subset(table, 1, seed))
    } == whole
    found = benchmark.of_table(table, cache="lossless", limit=1, seed=0)
    assert found.subset == {"drawn": 1, "of": len(whole), "seed": 0} and found.keys == tuple(
        row.index for row in part.rows
    )
    assert benchmark.of_table(table, cache="lossless").subset is None


def test_answers_of_another_model_are_not_taken(tmp_path):
    """Same path, same name, other weights or another tokenizer."""
    batches = inference.batches([bench("A")], 2)
    first = {"weights": "a", "tokenizer": "t", "step": 3}
    collect(tmp_path, batches, identity=first)
    for changes, named in (
        ({"weights": "b"}, "weights"),
        ({"tokenizer": "u"}, "tokenizer"),
        ({"weights": "b", "step": 4}, "step, weights"),
    ):
        with pytest.raises(
            store.DifferentAnswersError,
            match=f"begun with another {named}: the model has changed since: choose another --name",
        ):
            collect(tmp_path, batches, identity=first | changes)
    (tmp_path / "old").mkdir()
    collect(tmp_path / "old", batches, identity={"step": 3})  # as before there were fingerprints
    with pytest.raises(
        store.DifferentAnswersError,
        match="no fingerprint of the weights: an older version began it.*delete the folder",
    ):
        collect(tmp_path / "old", batches, identity=first)
    assert (
        store.identity_of(str(tmp_path)) == first
        and collect(tmp_path, batches, identity=first)[1] == []
    )
    (tmp_path / store.FILE).write_text('{"weights": "a"')
    with pytest.raises(ValueError, match=f"{tmp_path}/answers.jsonl is damaged .* delete it"):
        store.identity_of(str(tmp_path))


# --- summaries and comparisons


def results(folder, rows, **more):
    """Writes results of a benchmark T: rows of (pid, expected, hit)."""
    predictions = [
        {"index": n, "pid": pid, "expected": expected, "prediction": "x", "hit": hit, "tokens": 1}
        for n, (pid, expected, hit) in enumerate(rows)
    ]
    results_lib.write(
        str(folder),
        [results_lib.Result("T", predictions, 1.0, 1)],
        checkpoint="c",
        seed=0,
        protocol="p",
        **more,
    )


def test_the_terminal_shows_the_new_results_alone_where_there_are_many(tmp_path):
    for n in range(5):
        results(tmp_path / "eval" / f"old{n}", [("a", "A", True)], mode="none", split=f"s{n}")
    results(tmp_path / "eval" / "new", [("a", "A", False)], mode="generated", split="s3")
    said = summary_tables.write_table(str(tmp_path), ["new"])
    assert said == (tmp_path / "eval" / "summary.md").read_text()  # six are few
    results(tmp_path / "eval" / "old5", [("a", "A", True)], mode="none", split="s5")
    said = summary_tables.write_table(str(tmp_path), ["new"])
    scores, times, where = said.strip().split("\n\n")
    assert "| new | T |" in scores and "old" not in scores
    assert "| T | new | old3 |" in times  # what it is compared with
    assert where == f"all 7 results of {tmp_path}: {tmp_path}/eval/summary.md"
    whole = (tmp_path / "eval" / "summary.md").read_text()
    assert whole == summary_tables.write_table(str(tmp_path)) and "| old5 | T |" in whole


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"benchmarks": {"T": {"overall": 0.5}}, "seed": 0}',
        "[1]",
        "null",
        '{"benchmarks": 7}',
        '{"benchmarks": {"T": 1}}',
        '{"benchmarks": {"T": null}}',
        "\ufffd\x00",
    ],
)
def test_a_summary_that_is_cut_ends_no_other_evaluation(tmp_path, content, caplog):
    results(tmp_path / "eval" / "good", [("a", "A", True)])
    results(tmp_path / "eval" / "bad", [("a", "A", True)])
    (tmp_path / "eval" / "bad" / "summary.json").write_text(content)
    table = summary_tables.write_table(str(tmp_path))
    assert (
        "| good | T | 100.0 %" in table
        and "bad" not in table
        and (tmp_path / "eval" / "summary.md").read_text() == table
    )
    assert (
        f"an evaluation is left out: {tmp_path}/eval/bad/summary.json " in caplog.text
        and "evaluate again" in caplog.text
    )
    with pytest.raises(
        ValueError,
        match="bad/summary.json (is not valid JSON|is not a summary|holds "
        "a).*: delete its folder, and",
    ):
        comparison.read_results(str(tmp_path), "bad")


def test_a_cut_file_of_predictions_is_named(tmp_path):
    results(tmp_path / "eval" / "x", [("a", "A", True)] * 2)
    path = tmp_path / "eval" / "x" / "predictions.jsonl"
    for text in (path.read_text()[:-20], '{"benchmark": "T"}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"--against=x: {path} is damaged .* evaluate again"):
            comparison.read_results(str(tmp_path), "x")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="--against=x: no .*predictions.jsonl: give a name"):
        comparison.read_results(str(tmp_path), "x")


def asking(rows, name="T", table=None):
    return benchmark.Benchmark(
        name,
        tuple(range(len(rows))),
        None,
        None,
        None,
        table=table,
        identify=lambda key: rows[key][:2],
    )


ROWS = [(f"p{n}", "ABCD"[n % 4], n % 3 == 0) for n in range(40)]


@pytest.mark.parametrize(
    "here, there, split, message",
    [
        (ROWS, ROWS, "test", None),
        (ROWS, ROWS[::-1], "test", None),
        (ROWS[:7], ROWS, "test", None),
        (ROWS, ROWS[5:12], "test", None),  # a subset of either
        (
            ROWS,
            [*ROWS[:38], ("p38", "?", True), ("q", "A", True)],
            "test",
            None,
        ),  # one answer was corrected
        (ROWS, ROWS, "validation", "has results of split test, these are of validation"),
        (
            ROWS,
            [(f"v{pid}", a, h) for pid, a, h in ROWS],
            "test",
            "T has 40 examples here and 40 there, of which 0 are the same: give",
        ),
        (
            ROWS,
            [(pid, "ABCD"[n % 3], h) for n, (pid, a, h) in enumerate(ROWS)],
            "test",
            "and 28 have the same pid and another answer",
        ),
        (
            ROWS[:20],
            ROWS[15:],
            "test",
            "T has 20 examples here and 25 there, of which 5 are the same",
        ),
        (ROWS, [("same", "A", True)] * 40, "test", "of which 0 are the same"),
        (
            [("same", "A", True)] * 16 + ROWS[1:3],
            [("same", "A", False)] * 16 + ROWS[1:3],
            "test",
            "T has 18 examples, and only 2 have a pid and an answer that no other one has.*not so: "
            "same",
        ),
        ([*ROWS, ROWS[0]], [*ROWS, ROWS[0]], "test", None),  # one of 40 is left out
    ],
)
def test_only_the_same_questions_are_compared(tmp_path, here, there, split, message):
    results(tmp_path / "eval" / "x", there, split="test")
    compared = comparison.read_results(str(tmp_path), "x")
    if message is None:
        comparison.check_pairs(compared, [asking(here)], split)
    else:
        with pytest.raises(ValueError, match=f"--against=x.*{message}"):
            comparison.check_pairs(compared, [asking(here)], split)
    with pytest.raises(
        ValueError,
        match="--against=x has results of T, not of U: give results of the same benchmarks",
    ):
        comparison.check_pairs(compared, [asking(here, "U")], "test")


def test_pairs_are_found_by_what_was_asked(tmp_path):
    """The other results hold the rows in another order, and one that is not here."""
    results(
        tmp_path / "eval" / "x",
        [("c", "A", True), ("a", "A", False), ("z", "B", True), ("b", "B", True)],
    )
    predictions = [
        {"index": n, "pid": pid, "prediction": "", "expected": e, "hit": hit, "tokens": 1}
        for n, (pid, e, hit) in enumerate([("a", "A", True), ("b", "B", True), ("c", "A", False)])
    ]
    result = results_lib.Result("T", predictions, 1.0, 1)
    bench = benchmark.Benchmark(
        "T",
        (0, 1, 2),
        lambda key: ([], "?"),
        None,
        None,
        identify=lambda key: (predictions[key]["pid"], predictions[key]["expected"]),
    )
    compared = comparison.read_results(str(tmp_path), "x")
    against = comparison.outcome(compared, [result], {"T": bench})
    found = {"n": 3, "here": 2 / 3, "there": 2 / 3, "only_here": 1, "only_there": 1, "p": 1.0}
    assert against == {"name": "x", "benchmarks": {"T": found}}
    assert comparison.in_words("n", against) == [
        "n against x, 3 examples of T: 66.7 % against 66.7 %; 1 right only here, 1 only there, "
        "p = 1 (McNemar)"
    ]
    html = page.page(
        "n", summary_of([result], against=against), [result], {"T": bench}, lambda *_: []
    )
    cells = html[html.rindex("Against x") :].split("</table>")[0].split("<td")[1:]
    assert [cell.split(">")[1].split("<")[0] for cell in cells] == [
        "T",
        "3",
        "66.7",
        "66.7",
        "1",
        "1",
        "1.000",
    ]


def summary_of(found, **more):
    """A summary as evaluations write it."""
    about = {"asked_by": "run", "ban_marker": False, "split": "test", "command": "python -m x"}
    scores = {result.name: result.summary() for result in found}
    return {"checkpoint": "c", "seed": 7, "mode": "none", **about, **more, "benchmarks": scores}


def page_of(hits, rule="A rule.", name="T", **more):
    """The page of answers to a task, its `hits` in order."""
    predictions = [
        {
            "index": n,
            "pid": f"p{n}",
            "prediction": "",
            "answer": "A" if hit else "B",
            "expected": "A",
            "hit": hit,
            "tokens": 9,
        }
        for n, hit in enumerate(hits)
    ]
    result = results_lib.Result(name, predictions, 1.0, len(hits))
    bench = benchmark.Benchmark(
        name, tuple(range(len(hits))), lambda key: ([], f"q{key}"), None, None, rule=rule
    )
    html = page.page("000180-none", summary_of([result], **more), [result], {name: bench}, shown)
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def shown(bench, key):
    return [("problem", np.zeros((2, 2, 3), np.uint8))]


def test_the_page_shows_all_misses_first():
    html = page_of([n % 5 > 0 for n in range(200)])  # 40 misses
    marks = re.findall('<details class="(hit|miss)"', html)
    assert marks == ["miss"] * 40 + ["hit"] * 20
    titles = [title.split(":")[0] for title in re.findall(r"</b>\d+\. (.*?)</summary>", html)]
    assert titles[:40] == [f"p{n}" for n in range(0, 200, 5)]
    hits = [n for n in range(200) if n % 5]
    assert titles[40:] == [f"p{n}" for n in hits[::8]]  # 20 of 160, evenly spaced
    assert "Shown: all 40 misses, then 20 of 160 hits, evenly spaced. All 200 answers" in html
    assert "1. p0: B (expected A)" in html and "41. p1: A</summary>" in html


def test_answers_of_all_benchmarks_are_shown():
    """Equally many of each, evenly spaced; what one has too few for goes to the others."""
    counts = {"b": 40, "a": 2, "c": 30}
    every = [f"{name}{n:02d}" for name, count in counts.items() for n in range(count)]
    shown = shown_answers.spread(every, 12, lambda item: item[0])
    assert " ".join(shown) == "b00 b08 b16 b24 b32 a00 a01 c00 c06 c12 c18 c24"
    assert shown_answers.spread(every, 100, lambda item: item[0]) == every
    assert shown_answers.spread(every, 0, lambda item: item[0]) == []
    assert shown_answers.spread(every, 2, lambda item: item[0]) == ["b00", "c00"]
    assert shown_answers.spread([], 12, lambda item: item[0]) == []


@pytest.mark.parametrize(
    "answer, title",
    [
        ({"answer": "A", "expected": "A"}, "p3: A"),
        ({"answer": "B", "expected": "A"}, "p3: B (expected A)"),
        ({"answer": None, "expected": "A"}, "p3: no <answer> tag (expected A)"),
        ({"expected": "A"}, "p3"),  # of a public table
    ],
)
def test_titles_of_answers(answer, title):
    prediction = {"index": 3, "pid": "p3", "tokens": 1, **answer}
    assert shown_answers.title(prediction) == title
    said = "" if "answer" in answer else "expected A; "
    assert shown_answers.note(prediction) == f"{said}1 token"


def test_the_page_says_how_many_misses_it_leaves_out():
    html = page_of([False] * 250)
    assert html.count('<details class="miss"') == 100
    assert "Shown: 100 of 250 misses, evenly spaced, then no hits." in html
    titles = re.findall(r"</b>\d+\. p(\d+):", html)
    assert titles == [str(n * 250 // 100) for n in range(100)]


def test_the_page_of_a_task_says_what_it_is_in_plain_words():
    html = page_of([True, False], rule=tasks.rule({"family": "maze"}), ban_marker=True)
    assert "<h1>Evaluation 000180-none: without visual thoughts</h1>" in html
    for entry in (
        "<dt>weights</dt><dd><code>c</code></dd>",
        "<dt>seed</dt><dd>7</dd>",
        "<dt>command</dt><dd><code>python -m x</code></dd>\n<dt>made</dt><dd>20",
        f" UTC by opsd_jax {opsd_jax.__version__}",
        f", jax {jax.__version__}, Python 3.",
        "<dt>split</dt><dd><code>test</code></dd>",
        "<dt>examples</dt><dd>T: all 2</dd>",
        "<code>&lt;image_start&gt;</code> is never sampled",
    ):
        assert entry in html
    assert "Every path that reaches the goal and avoids the holes is right" in html
    assert [re.sub("<.*?>", "", a) for a in re.findall(r'<a href="#c.*?</a>', html)] == [
        "Scores",
        "Answers to T",
    ]
    assert "mini-greedy" not in html and html.count("95 %") == 1
    heads = re.findall(r"<th [^>]*>(.*?)</th>", html)
    assert heads == ["benchmark", "score %", "examples", "tokens", "s/example", "timed"]
    for absent in ("ThinkMorph", "no rule applied", "left out", "generated images"):
        assert absent not in html


def test_the_page_of_a_public_table_has_the_columns_that_tasks_lack():
    found = {
        "overall": 50.0,
        "unit": "percent",
        "n": 2,
        "categories": {},
        "interval_95": [0.1, 0.9],
    }
    more = {"needs_judge": 0, "bad_rows": ["5"]}
    predictions = [
        {"index": str(n), "prediction": "A", "expected": "A", "hit": n, "tokens": 1, "pictures": 1}
        for n in (0, 1)
    ]
    result = results_lib.Result("MMVP", predictions, 0.0, 0, judged=found | more)
    bench = benchmark.Benchmark("MMVP", ("0", "1"), lambda key: ([], "q"), None, None)
    summary = summary_of([result], asked_by="paper", split=None, mode="generated")
    html = page.page("n", summary, [result], {"MMVP": bench}, shown)
    heads = re.findall(r"<th [^>]*>(.*?)</th>", html)
    assert heads[-5:] == [
        "generated images",
        "no rule applied",
        "left out",
        "ThinkMorph %",
        "Visual-OPSD %",
    ]
    assert "s/example" not in heads  # nothing was timed
    assert "with images that it generates" in html and "protocol <code>paper</code>" in html
    assert "<dt>split</dt>" not in html and "expected A; 1 token<" in html


def test_every_mode_has_a_text():
    assert set(wording.OF_VISUAL_THOUGHTS.modes) == set(contexts.MODES)
    for words in (wording.OF_VISUAL_THOUGHTS, wording.OF_PRIVILEGED, wording.OF_NOTHING):
        assert len(set(words.modes.values())) == len(contexts.MODES)


def test_the_command_asks_for_the_same():
    request = Request("a b", ("none", "swap"), rows=3, seed=0, ban_marker=True, against="x")
    command = shlex.split(request.command)
    assert command == [
        "python",
        "-m",
        "opsd_jax.eval",
        "--workdir=a b",
        "--visual_thoughts=none,swap",
        "--rows=3",
        "--ban_marker",
        "--seed=0",
        "--against=x",
    ]
    assert shlex.split(Request("w").command)[3:] == ["--workdir=w"]


@pytest.mark.slow
def test_weights_that_only_generate_images_have_a_fingerprint_of_their_own():
    import jax

    import tiny

    whole, tok = tiny.params(config=tiny.DRAWING), types.SimpleNamespace(digest="t", chat=None)
    facts = evaluate.model_facts(whole, tok)
    alone = evaluate.model_facts(params_lib.understanding(whole), tok)
    assert {key: facts[key] for key in alone} == alone and set(facts) - set(alone) == {
        "generation_weights"
    }
    for part, same, other in (
        ("vae", "weights", "generation_weights"),
        ("connector", "generation_weights", "weights"),
    ):
        changed = evaluate.model_facts(
            {**whole, part: jax.tree.map(lambda x: x + 1, whole[part])}, tok
        )
        assert changed[same] == facts[same] and changed[other] != facts[other]
