"""opsd_jax/data: prepared examples, packed contexts, and batches that depend on (seed, step)
only.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import small_run
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context, images, tokenizer
from opsd_jax.data import __main__ as data
from opsd_jax.data import arrayrecord, bucket_index, packing, procedural, schema, shards
from opsd_jax.data import batches as batches_lib
from opsd_jax.data import examples as examples_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.runtime import files

CHART, MAZE = "Chart_Refocus", "Spatial_Navigation"
MODES = [mode for mode in blocks_lib.VISUAL_THOUGHTS if mode != "none"]
BUCKETS = {  # positions, patches (and targets). The first fits a maze, 16 patches; a chart has 25
    "student": ((25, 16), (36, 25)),
    "teacher": ((50, 32), (70, 50)),
    "trace": ((87, 32, 41), (90, 50, 41)),
}


def config(folder, buckets=None, **changes):
    c = small_run.config(
        **dict(
            data__dir=str(folder),
            data__tasks=(CHART, MAZE),
            data__make__families=("chart", "maze"),
            images__max_size=40,
            images__min_size=32,
            data__cache_rows=200,
        )
        | changes
    )
    c.data.buckets.update(buckets or {name: sizes[1:] for name, sizes in BUCKETS.items()})
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    procedural.make_procedural(str(made), config(made).data.make.to_dict())
    return made


@pytest.fixture(scope="module")
def tok(folder):
    return tokenizer.load(folder / "made" / "tokenizer")


@pytest.fixture
def make(folder, tok, tmp_path):
    """make(stage, buckets, share, **changes) -> Batches of the two tasks."""

    def made(stage="opsd", buckets=None, share=None, **changes):
        c = config(folder, buckets, **changes)
        return batches_lib.Batches(
            config_lib.batches(c, stage),
            str(tmp_path),
            small_run.examples(c, tok),
            packing.Packer.from_config(c, tok),
            share=share,
        )

    return made


def arrays(context):
    found = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
    assert found.pop("latents") is None and found.pop("patch_cells") is None
    return found


def assert_same(one, other, pick=slice(None)):
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array[pick], arrays(other)[name], err_msg=name)


def pids(prepared):
    return [row.example.pid for row in prepared]


# --- rows -----------------------------------------------------------------------------------------


def test_rows(folder, tok):
    c = config(folder, data__cache_rows=2, data__limits=(10, 0), prompts__suffix=" now answer")
    rows = small_run.examples(c, tok)
    assert [len(source) for source in rows.sources] == [
        10,
        64,
    ]  # the limit is of the train split only
    assert [len(source) for source in small_run.examples(c, tok, "test").sources] == [
        small_run.TEST_ROWS
    ] * 2
    row = rows(0, 3)
    assert tok.decode(row.question) == row.example.question + " now answer"
    assert row.problems[0].grid == row.visual_thoughts[0].grid == (5, 5)
    assert row.problems[0].patches.shape == (25, 192)
    assert rows(1, 3).problems[0].grid == (4, 4) and row.problems[0].patches.dtype == np.uint8
    assert rows(0, 3) is row  # kept in memory ...
    rows(0, 4), rows(0, 5)
    assert rows(0, 3) is not row and len(rows._cache) == 2  # ... as long as there is space
    assert small_run.examples(config(folder, data__cache_rows=0), tok)._cache_size == 0


def test_the_partner_is_another_row_of_the_task(folder, tok):
    rows = small_run.examples(config(folder), tok, "test")
    for source in (0, 1):
        partners = [rows.partner(source, n).example.pid for n in range(small_run.TEST_ROWS)]
        own = [rows(source, n).example.pid for n in range(small_run.TEST_ROWS)]
        assert sorted(partners) == sorted(own) and all(a != b for a, b in zip(partners, own))


# --- packing --------------------------------------------------------------------------------------


def test_layouts(folder, tok):
    c = config(folder)
    rows, packer = small_run.examples(c, tok), packing.Packer.from_config(c, tok)
    row = rows(0, 0)

    def texts(kind, *args):
        return [
            tok.decode(b.ids) if isinstance(b, blocks_lib.Text) else "image"
            for b in packer.blocks(row, kind, *args)
        ]

    e = row.example
    trace = f"<think>{e.full_text_only_thought}</think><answer>{e.answer}</answer>"
    student, teacher = (
        ["image", e.question],
        ["image", e.question, "reference", "image", "now answer"],
    )
    assert texts("student") == student and texts("teacher") == teacher
    assert texts("text") == [*student, trace] and texts("reference") == [*teacher, trace]
    assert texts("interleaved") == [
        *student,
        f"<think>{e.thoughts[0]}</think><image_start>",
        "image",
        f"<image_end><think>{e.thoughts[1]}</think><answer>{e.answer}</answer>",
    ]
    targets = [
        getattr(b, "loss", False)
        for kind in ("text", "reference")
        for b in packer.blocks(row, kind)
    ]
    assert targets == [False, False, True] + [False] * 5 + [True]
    with pytest.raises(ValueError, match="unknown layout 'talk': choose"):
        packer.blocks(row, "talk")
    bare = dataclasses.replace(row, example=dataclasses.replace(e, full_text_only_thought=" "))
    with pytest.raises(
        ValueError, match=f"example {e.pid} has no full_text_only_thought.*mix.*config.eval.kl"
    ):
        packer.reference(bare)


@pytest.mark.parametrize(
    "ratios, count, expected",
    [
        ({"a": 2, "b": 1, "c": 1}, 8, "aaaabbcc"),
        ({"a": 2, "b": 1}, 6, "aaaabb"),
        ({"a": 0, "b": 3}, 3, "bbb"),
        ({"a": 1, "b": 0, "c": 1}, 5, "aaccc"),
        ({"a": 1, "b": 9}, 4, "bbbb"),
    ],
)
def test_mixture(ratios, count, expected):
    assert "".join(batches_lib.mixture(ratios, count)) == expected


def test_a_mixture_of_nothing():
    with pytest.raises(ValueError, match="no layout with a positive share"):
        batches_lib.mixture({"a": 0}, 4)


# --- buckets --------------------------------------------------------------------------------------


def test_each_row_goes_to_the_first_bucket_that_it_fits(make, folder, tmp_path, monkeypatch):
    for path in folder.rglob("buckets-*.npy"):
        path.unlink()
    batches = make(buckets=BUCKETS, opsd__batch_size=4)
    seen = collections.Counter()
    for step in range(batches.schedule.chunk):
        bucket, pairs = batches.schedule(step)
        batch, prepared = batches.opsd(step)
        for role in ("student", "teacher"):
            c = getattr(batch, role)
            assert (c.padded_length, c.patches.shape[1]) == BUCKETS[role][bucket]
        assert {row.example.task for row in prepared} <= ({MAZE} if bucket == 0 else {CHART, MAZE})
        seen[bucket] += 1
    assert min(seen[0], seen[1]) > 10
    found = {path.parent.parent.name: path for path in folder.rglob("buckets-*.npy")}
    assert found.keys() == {CHART.lower(), MAZE.lower()} and not [*tmp_path.iterdir()]
    monkeypatch.setattr(
        packing.Packer, "bucket", None
    )  # the second time the index is read, not made
    assert make(buckets=BUCKETS, opsd__batch_size=4).schedule(0) == batches.schedule(0)
    monkeypatch.undo()
    for path in found.values():  # cut by a power failure
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    for _ in range(2):
        assert make(buckets=BUCKETS, opsd__batch_size=4).schedule(0) == batches.schedule(0)
        monkeypatch.setattr(packing.Packer, "bucket", None)  # it was written again


def test_where_data_are_read_only_the_workdir_has_the_index(make, folder, tmp_path, monkeypatch):
    replacing = files.replacing

    def refused(path):
        if str(path).startswith(str(folder)):
            raise OSError(30, "Read-only file system", path)
        return replacing(path)

    monkeypatch.setattr(files, "replacing", refused)
    before = {*folder.rglob("buckets-*.npy")}
    buckets = {
        name: ((sizes[0][0] + 1, *sizes[0][1:]), sizes[1]) for name, sizes in BUCKETS.items()
    }
    batches = make(buckets=buckets)
    names = sorted(path.name.split("-")[1] for path in tmp_path.glob("buckets-*.npy"))
    assert names == [CHART, MAZE] and before == {*folder.rglob("buckets-*.npy")}
    monkeypatch.setattr(packing.Packer, "bucket", None)
    assert make(buckets=buckets).schedule(0) == batches.schedule(0)


def test_an_index_of_other_settings_or_data_is_not_used(folder, tok):
    c = config(folder, BUCKETS)
    packer, examples = packing.Packer.from_config(c, tok), small_run.examples(c, tok)
    limited = small_run.examples(config(folder, BUCKETS, data__limits=(10, 10)), tok)
    other_data = small_run.examples(c, tok)
    other_data.digests = ["0"] * 2
    other_tokenizer = dataclasses.replace(tok, image_end=tok.image_start)
    larger = dataclasses.replace(packer.buckets, student=((26, 16), (36, 25)))
    resized = small_run.examples(config(folder, BUCKETS, images__max_size=38), tok)
    digests = [
        bucket_index._digest(found, by, 0, mode)
        for found, by, mode in (
            (examples, packer, "real"),
            (examples, packer, "image"),
            (limited, packer, "real"),
            (other_data, packer, "real"),
            (resized, packer, "real"),
            (examples, dataclasses.replace(packer, buckets=larger), "real"),
            (examples, dataclasses.replace(packer, tokenizer=other_tokenizer), "real"),
        )
    ]
    assert len({*digests}) == len(digests)
    assert digests[0] == bucket_index._digest(small_run.examples(c, tok), packer, 0, "real")


@pytest.fixture
def two_processes(monkeypatch):
    """run(work): work(0) and work(1) in threads that stand for the processes of a run."""
    local, barrier, boxes = threading.local(), threading.Barrier(2, timeout=20), [None, None]

    def gathered(x):
        boxes[local.number] = x
        barrier.wait()
        found = np.stack(boxes)
        barrier.wait()
        return found

    monkeypatch.setattr(
        bucket_index,
        "_processes",
        lambda: (local.number, 2) if hasattr(local, "number") else (0, 1),
    )
    monkeypatch.setattr(bucket_index.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(
        bucket_index.multihost_utils, "broadcast_one_to_all", lambda x: gathered(x)[0]
    )

    def run(work):
        def numbered(number):
            local.number = number
            return work(number)

        with ThreadPoolExecutor(2) as pool:
            return [pool.submit(numbered, number) for number in range(2)]

    return run


def test_each_process_measures_a_part_of_the_examples(
    make, folder, tmp_path, monkeypatch, two_processes
):
    buckets = {
        name: ((sizes[0][0] + 2, *sizes[0][1:]), sizes[1]) for name, sizes in BUCKETS.items()
    }
    one = make(buckets=buckets)
    for path in folder.rglob("buckets-*.npy"):
        path.unlink()
    measured, bucket = [], packing.Packer.bucket

    def counted(packer, example, *rest):
        measured.append(example.example.pid)
        return bucket(packer, example, *rest)

    monkeypatch.setattr(packing.Packer, "bucket", counted)
    for expected in (128, 0):  # the second time the first process reads the file for both
        found = [done.result() for done in two_processes(lambda number: make(buckets=buckets))]
        assert [batches.schedule(3) for batches in found] == [one.schedule(3)] * 2
        assert len(measured) == len({*measured}) == expected
        measured.clear()


def test_an_example_that_one_process_cannot_measure_ends_all(
    make, folder, monkeypatch, two_processes
):
    for path in folder.rglob("buckets-*.npy"):
        path.unlink()
    bucket = packing.Packer.bucket

    def damaged(packer, example, *rest):
        if example.example.pid == "maze-train-0000005":
            raise images.UnreadableImageError("example maze-train-0000005: no image")
        return bucket(packer, example, *rest)

    monkeypatch.setattr(packing.Packer, "bucket", damaged)
    for done in two_processes(lambda number: make(buckets=BUCKETS)):
        with pytest.raises(images.UnreadableImageError, match="maze-train-0000005"):
            done.result()


def test_the_command_makes_what_a_run_and_its_arms_read(
    folder, make, tmp_path, capsys, monkeypatch
):
    for path in folder.rglob("buckets-*.npy"):
        path.unlink()
    changes = {
        **small_run.CHANGES,
        "data.dir": folder,
        "images.max_size": 40,
        "images.min_size": 32,
    }
    changes |= {f"data.buckets.{name}": sizes for name, sizes in BUCKETS.items()}
    command = [
        "index",
        f"--config={small_run.MINI}:smoke",
        *(f"--config.{key}={value}" for key, value in changes.items()),
        f"--config.data.tasks={CHART},{MAZE}",
        "--config.data.make.families=chart,maze",
        "--config.run_arms=image",
    ]
    data.main(command)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{CHART}, teacher sees real: 64 examples, 0 in bucket 0, 64 in bucket 1",
        f"{MAZE}, teacher sees real: 64 examples, 64 in bucket 0, 0 in bucket 1",
        f"{CHART}, teacher sees image: 64 examples, 0 in bucket 0, 64 in bucket 1",
        f"{MAZE}, teacher sees image: 64 examples, 64 in bucket 0, 0 in bucket 1",
    ]
    assert len([*folder.rglob("buckets-*.npy")]) == 4 and not [*tmp_path.iterdir()]
    monkeypatch.setattr(packing.Packer, "bucket", None)  # it reads them, too
    data.main(command)
    assert capsys.readouterr().out.splitlines() == said
    make(buckets=BUCKETS), make("warmup", buckets=BUCKETS, teacher__visual_thoughts="image")

    one = [f"--config.data.buckets.{name}={sizes[1:]}" for name, sizes in BUCKETS.items()]
    data.main([*command, *one])
    assert "nothing to do: with one bucket" in capsys.readouterr().out


def test_rows_that_fit_no_bucket_are_named(make, tmp_path):
    small = {name: sizes[:1] for name, sizes in BUCKETS.items()}
    with pytest.raises(
        context.TooLongError,
        match=r"^config.data.buckets.student is too small for the student's context: example "
        r"chart-train-\d{7} needs 3\d positions and 25 patches, its .*`python -m opsd_jax.data "
        "sizes`",
    ):
        [
            make(buckets=small).opsd(step) for step in range(4)
        ]  # one bucket: measured when they are packed
    smaller = {name: (tuple(n - 1 for n in sizes[0]), sizes[0]) for name, sizes in BUCKETS.items()}
    message = (
        f"^64 examples of {CHART} fit no bucket, first .'chart-train-00000.*: enlarge "
        r"config.data.buckets.student and config.data.buckets.teacher and "
        r"config.data.buckets.trace, or set config.data.on_too_long=skip.*`python -m opsd_jax.data "
        "sizes`"
    )
    with pytest.raises(context.TooLongError, match=message):
        make(buckets=smaller)
    assert not (tmp_path / "too_long.json").exists()

    batches = make(buckets=smaller, data__on_too_long="skip", data__tasks=(MAZE,))
    assert not (tmp_path / "too_long.json").exists()
    with pytest.raises(ValueError, match="source 0 has no example to use"):
        make(buckets=smaller, data__on_too_long="skip", data__tasks=(CHART,))
    named = json.loads((tmp_path / "too_long.json").read_text())
    assert list(named) == [CHART] and len(set(named[CHART])) == 64
    assert batches.opsd(0)[1][0].example.task == MAZE


def test_some_rows_left_out(folder, tok, make, tmp_path):
    """A budget of targets that half of the mazes' traces exceed."""
    c = config(folder, data__tasks=(MAZE,))
    rows, packer = small_run.examples(c, tok), packing.Packer.from_config(c, tok)
    targets = {}
    for row in (rows(0, n) for n in range(64)):
        layouts = [packer.blocks(row, layout) for layout in ("interleaved", "reference", "text")]
        targets[row.example.pid] = max(
            sum(len(b.ids) + 1 for b in blocks if getattr(b, "loss", False)) for blocks in layouts
        )
    width = int(np.median(list(targets.values())))
    too_long = {pid for pid, n in targets.items() if n > width}
    assert 5 < len(too_long) < 59

    sizes = {name: sizes[:1] for name, sizes in BUCKETS.items()} | {"trace": ((87, 32, width),)}
    batches = make(
        "warmup", sizes, data__on_too_long="skip", data__tasks=(MAZE,), warmup__batch_size=4
    )
    assert set(json.loads((tmp_path / "too_long.json").read_text())[MAZE]) == too_long
    drawn = {pid for step in range(20) for pid in pids(batches.traces(step)[1])}
    assert drawn == targets.keys() - too_long


@pytest.mark.parametrize("mode", ["swap", "image"])
def test_a_bucket_fits_what_replaces_the_visual_thoughts(folder, tok, mode):
    c = config(folder, BUCKETS, teacher__visual_thoughts=mode)
    rows, packer = small_run.examples(c, tok), packing.Packer.from_config(c, tok)
    maze, chart = rows(1, 0), rows(0, 0)
    if mode == "swap":
        row, partner = maze, dataclasses.replace(maze, visual_thoughts=chart.visual_thoughts)
    else:  # a problem image larger than its visual thought; student and trace fit the first bucket
        row, partner = dataclasses.replace(maze, problems=chart.problems), None
        buckets = dataclasses.replace(
            packer.buckets,
            student=((40, 25), (41, 25)),
            trace=((90, 50, 41), (91, 50, 41)),
            teacher=((60, 41), (70, 50)),  # problem 25 + visual thought 16 patches
        )
        packer = dataclasses.replace(packer, buckets=buckets)
    assert packer.bucket(row) == 0 and packer.bucket(row, mode, partner) == 1
    packer.teacher([row], [partner], mode, [None], bucket=1)
    with pytest.raises(context.TooLongError):
        packer.teacher([row], [partner], mode, [None], bucket=0)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_a_function_of_seed_and_step(make, mode):
    one, other = make(teacher__visual_thoughts=mode), make(teacher__visual_thoughts=mode)
    other.opsd(7), other.opsd(0)  # what was asked for before does not matter
    for step in (3, 11):
        (a, rows_a), (b, rows_b) = one.opsd(step), other.opsd(step)
        assert pids(rows_a) == pids(rows_b) and len(rows_a) == 8
        assert_same(a.student, b.student)
        assert_same(a.teacher, b.teacher)
    assert pids(make(seed=1).opsd(3)[1]) != pids(one.opsd(3)[1])


def test_what_the_teacher_sees_in_each_mode(make):
    shown = {}
    for mode in blocks_lib.VISUAL_THOUGHTS:
        batches = make(teacher__visual_thoughts=mode, data__tasks=(CHART,))
        batch, rows = batches.opsd(0)
        shown[mode] = batch.teacher
        shown["rows"] = rows
    second = slice(25, 50)  # patches after the problem's
    for n, row in enumerate(shown["rows"]):
        for mode in ("real", "swap", "image"):
            np.testing.assert_array_equal(shown[mode].patches[n, :25], row.problems[0].patches)
        np.testing.assert_array_equal(
            shown["real"].patches[n, second], row.visual_thoughts[0].patches
        )
        np.testing.assert_array_equal(shown["image"].patches[n, second], row.problems[0].patches)
        assert (shown["swap"].patches[n, second] != row.visual_thoughts[0].patches).any()
    assert (
        shown["noise"].patches.dtype == np.float32 and (shown["none"].patch_image.max(1) == 1).all()
    )
    noise = shown["noise"].patches[:, second]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_noise_is_fresh_at_every_step_and_attempt_and_the_same_for_a_seed(make):
    def noise(*at, **changes):
        batches = make(teacher__visual_thoughts="noise", data__tasks=(CHART,), **changes)
        return batches.opsd(*at)[0].teacher.patches[:, 25:].ravel()

    draws = [noise(0), noise(1), noise(0, 1), noise(0, seed=1)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    np.testing.assert_array_equal(draws[2], noise(0, 1))


@pytest.mark.parametrize("stage", ["opsd", "warmup"])
def test_two_hosts_share_what_one_would_have(make, stage):
    """Whatever rows a host has, they are those of the whole batch; noise, too."""
    shares = [0, 1, 2, 3], [2, 5, 7]
    whole, *parts = (
        make(stage, share=share, teacher__visual_thoughts="noise") for share in (None, *shares)
    )
    for step in (0, 5):

        def load(b):
            return b.opsd(step) if stage == "opsd" else b.traces(step)

        (all_rows, prepared), halves = load(whole), [load(part) for part in parts]
        for mine, (half, rows) in zip(shares, halves):
            assert pids(rows) == [pids(prepared)[n] for n in mine]
            if stage == "opsd":
                assert_same(all_rows.student, half.student, mine)
                assert_same(all_rows.teacher, half.teacher, mine)
            else:
                assert_same(all_rows.context, half.context, mine)
                for name in ("positions", "labels", "mask"):
                    np.testing.assert_array_equal(
                        getattr(all_rows, name)[mine], getattr(half, name)
                    )


def test_a_question_has_several_completions_on_all_hosts(make):
    """8 sequences are 4 questions, each twice; a host may have one of the two."""
    several = make(opsd__completions=2, teacher__visual_thoughts="noise")
    batch, rows = several.opsd(3)
    assert pids(rows)[::2] == pids(rows)[1::2] and len(set(pids(rows))) == 4
    for name, array in arrays(batch.teacher).items():
        np.testing.assert_array_equal(array[::2], array[1::2], err_msg=name)
    share = [1, 2, 5]
    part, mine = make(share=share, opsd__completions=2, teacher__visual_thoughts="noise").opsd(3)
    assert pids(mine) == [pids(rows)[n] for n in share]
    assert_same(batch.student, part.student, share)
    assert_same(batch.teacher, part.teacher, share)


def test_references_in_the_place_of_completions(make, tok):
    """A quarter of 8 sequences at every step, others at other steps, the same on all hosts."""
    settings = dict(opsd__reference_share=0.25, rollout__max_new_tokens=100)
    batches, chosen = make(**settings), []
    for step in range(6):
        batch, rows = batches.opsd(step)
        found = batch.references
        assert found.tokens.shape == (8, 99) and not found.cut.any()
        given = np.flatnonzero(found.mask[:, 0]).tolist()
        assert len(given) == 2
        for n in given:
            e = rows[n].example
            text = blocks_lib.text_trace(e.full_text_only_thought, e.answer)
            assert tok.decode(found.tokens[n][found.mask[n]]) == text
        assert not found.mask[[n for n in range(8) if n not in given]].any()
        chosen.append(tuple(given))
    assert len(set(chosen)) > 2
    share = [0, *chosen[2]]
    part = make(share=share, **settings).opsd(2)[0].references
    whole = batches.opsd(2)[0].references
    np.testing.assert_array_equal(part.tokens, whole.tokens[share])
    cut = make(opsd__reference_share=1.0, rollout__max_new_tokens=9).opsd(0)[0].references
    assert cut.mask.all() and cut.cut.all() and cut.tokens.shape == (8, 8)
    assert make().opsd(0)[0].references is None


def test_swapped_contexts_to_contrast(make):
    batch, rows = make(teacher__contrast=1.0, teacher__contrast_with="swap").opsd(1)
    assert_same(batch.contrast, make(teacher__visual_thoughts="swap").opsd(1)[0].teacher)
    assert_same(batch.teacher, make().opsd(1)[0].teacher)
    assert make(teacher__contrast=1.0).opsd(1)[0].contrast is None


def test_references_need_traces(make, monkeypatch):
    read = arrayrecord.Source.__getitem__

    def without_trace(self, index):
        return dataclasses.replace(read(self, index), full_text_only_thought="")

    monkeypatch.setattr(arrayrecord.Source, "__getitem__", without_trace)
    with pytest.raises(ValueError, match="no full_text_only_thought.*opsd.reference_share to 0"):
        make(opsd__reference_share=0.5)


def test_attempts_bring_other_rows(make):
    batches = make()
    first, *others = [pids(batches.opsd(2, attempt)[1]) for attempt in range(4)]
    for other in others:
        assert not set(first) & set(other) and len(set(other)) == 8
    assert others[0] != others[1] and pids(make().opsd(2, 1)[1]) == others[0]


def test_traces_follow_the_mix(make, tok):
    supervised, rows = make("warmup").traces(0)
    texts = [tok.decode(labels[mask]) for labels, mask in zip(supervised.labels, supervised.mask)]
    assert ["<image_start>" in text for text in texts] == [True] * 4 + [
        False
    ] * 4  # interleaved 2 : 1 : 1
    pictures = supervised.context.patch_image.max(1)
    assert (
        pictures == [2] * 6 + [1] * 2
    ).all()  # the reference layout with its image, text without
    for text, row in zip(texts, rows, strict=True):
        assert re.search(rf"<answer>{row.example.answer}</answer><\|im_end\|>$", text)


def test_weights_are_shares_of_the_tasks(make):
    batches = make(data__weights=(3, 1))
    tasks = collections.Counter(
        row.example.task for step in range(8) for row in batches.opsd(step)[1]
    )
    assert tasks == {CHART: 48, MAZE: 16}


def test_stream_gives_the_steps_in_order_from_any_start(make):
    batches = make(data__threads=3)
    for step, (_, rows) in enumerate(batches.stream(batches_lib.Batches.opsd, 5, 12), start=5):
        assert pids(rows) == pids(batches.opsd(step)[1])
    assert step == 11
    small = {name: sizes[:1] for name, sizes in BUCKETS.items()}
    with pytest.raises(
        context.TooLongError, match="example chart-train"
    ):  # an error in a thread reaches the loop
        list(make(buckets=small).stream(batches_lib.Batches.opsd, 0, 4))


# --- making data ----------------------------------------------------------------------------------


def test_data_that_were_begun_are_finished_and_others_are_not_taken_for_them(folder, tmp_path):
    c = small_run.config(data__make__train=8, data__make__validation=2, data__make__test=2)
    small_run.make_data(c, tmp_path)
    prepared = shards.version_folder(tmp_path / "data", small_run.TASK)
    before = [path.stat().st_mtime_ns for path in sorted(prepared.iterdir())]
    small_run.make_data(c, tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(prepared.iterdir())] == before
    (prepared / "report.json").unlink()  # as if killed on the way
    small_run.make_data(c, tmp_path)
    assert len(arrayrecord.open_source(prepared)) == 8
    c.data.make.train = 9
    with pytest.raises(
        ValueError,
        match="made with other settings.*'train': 8.*'train': 9.*same --config=.*another",
    ):
        small_run.make_data(c, tmp_path)


def killed(*arguments):
    """make-mini that dies without cleaning up, after it made the rows."""
    script = (
        "import os\nfrom opsd_jax.data import __main__ as data\n"
        "from opsd_jax.tasks import parquet\n"
        "parquet.build_tokenizer = lambda folder: os._exit(9)\n"
        f"data.main(['make-mini', *{arguments}])"
    )
    assert (
        small_run.run(
            [sys.executable, "-c", script], env=os.environ | {"JAX_PLATFORMS": "cpu"}
        ).returncode
        == 9
    )


def test_make_mini_from_the_command_line(tmp_path, capsys):
    target = str(tmp_path / "d")
    command = [f"--target={target}", "--families=chart", "--train=4", "--validation=1", "--test=1"]
    killed(*command)
    assert sorted(os.listdir(target)) == [".tmp-made", "made.json"]

    def refused(message, *arguments):
        with pytest.raises(SystemExit) as stopped:
            data.main(["make-mini", *arguments])
        assert stopped.value.code == 1 and re.search(message, capsys.readouterr().err)

    refused("made with other settings.*'train': 4.*'train': 5", *command, "--train=5")
    for _ in range(2):  # continued; then all is done
        data.main(["make-mini", *command])
        assert f"written to {target}" in capsys.readouterr().out
        assert len(arrayrecord.open_source(target, "train+test", task=CHART)) == 5
        assert sorted(os.listdir(target)) == ["made", "made.json", "visual_opsd"]
    refused("made with other settings.*'seed': 0.*'seed': 1", *command, "--seed=1")
    parquet = next((tmp_path / "d" / "made" / "parquet").glob("*/data/train-*"))
    content = parquet.read_bytes()
    shutil.copyfile(next(parquet.parent.glob("test-*")), parquet)  # an edited file
    refused(
        f"was prepared from other files.*delete {target} and give the same command again", *command
    )
    parquet.write_bytes(content)
    (tmp_path / "d" / "made.json").unlink()  # as a folder prepared from elsewhere
    refused("holds prepared data already: choose another --target", *command)
    other = f"--target={tmp_path}/e"
    refused("unknown family: 'chess'; choose from maze", *command, other, "--families=chess")
    data.main(["make-mini", *command, other])  # a refused command leaves nothing that is in the way


def test_a_named_folder_without_data_is_an_error(tmp_path, folder):
    """Else a mistyped name would be filled with procedural data."""
    mistyped = tmp_path / "dta"
    with pytest.raises(
        FileNotFoundError,
        match=f"{mistyped} holds no data: .*make-mini --target={mistyped}.*data.dir",
    ):
        small_run.make_data(config(mistyped), tmp_path)
    inner = os.path.join(folder, schema.NAME)
    with pytest.raises(
        FileNotFoundError, match=f"{inner} holds no data itself: give the folder .*dir={folder}$"
    ):
        small_run.make_data(config(inner), tmp_path)
    assert not os.listdir(tmp_path)
    # More are there than are asked for.
    small_run.make_data(config(folder, data__make__families=("maze",)), tmp_path)
    with pytest.raises(ValueError, match="made with other settings.*'seed': 0.*'seed': 1"):
        small_run.make_data(config(folder, data__make__seed=1), tmp_path)
    # The data are used as they are.
    small_run.make_data(config(folder, data__make__families=(), data__make__seed=1), tmp_path)
    begun = tmp_path / "begun"
    killed(f"--target={begun}", "--families=chart", "--train=4", "--validation=1", "--test=1")
    small_run.make_data(config(begun, data__make__families=()), tmp_path)
    assert len(arrayrecord.open_source(begun, "train", task=CHART)) == 4


def test_data_that_are_older_than_a_setting_have_its_default(tmp_path):
    c = small_run.config(data__make__train=4, data__make__validation=1, data__make__test=1)
    small_run.make_data(c, tmp_path)
    path = tmp_path / "data" / "made.json"
    record = json.loads(path.read_text())
    assert record.pop("wrong_traces") == 0.0
    path.write_text(json.dumps(record))
    small_run.make_data(c, tmp_path)
    c.data.make.wrong_traces = 0.5
    with pytest.raises(ValueError, match="made with other.*'wrong_traces': 0.0.*traces': 0.5"):
        small_run.make_data(c, tmp_path)


def test_traces_end_with_the_answer_that_they_teach(tmp_path, tok):
    """Wrong traces: what is scored and shown is the gold answer, what is learnt the other one."""
    changes = dict(data__make__train=12, data__make__validation=1, data__make__test=1)
    c = small_run.config(data__make__wrong_traces=0.5, **changes)
    small_run.make_data(c, tmp_path)
    examples = small_run.examples(c, tok, data_dir=tmp_path / "data")
    packer = packing.Packer.from_config(c, tok)
    wrong = 0
    for n in range(12):
        prepared = examples(0, n)
        example, found = prepared.example, []
        for layout in ("text", "reference", "interleaved"):
            *_, last = packer.blocks(prepared, layout)
            found.append(tok.decode(last.ids).partition("<answer>")[2])
        assert {text.partition("</answer>")[0] for text in found} == {example.trace_answer}
        assert example.answer == example.metadata["answer"]
        wrong += example.trace_answer != example.answer
    assert wrong == 6
    examples.check_references(0, range(12))  # raises nothing


def test_stages_with_traces_have_limits_of_their_own(folder, tok):
    def lengths(stage, **changes):
        c = config(folder, **changes)
        preprocess = examples_lib.Preprocessor.from_config(c, tok)
        data = config_lib.data_of(c, stage)
        found = examples_lib.Examples.open(data, str(folder), "train", preprocess)
        return [len(source) for source in found.sources]

    few = dict(data__trace_limits=(5, 0))
    assert lengths("opsd", **few) == lengths("autoencoder", **few) == [64, 64]
    assert lengths("warmup", **few) == lengths("sft", **few) == lengths("offline", **few) == [5, 64]
    assert lengths("sft", data__limits=(3, 7), **few) == [3, 7]
    assert lengths("opsd", data__limits=(0, 7), **few) == [64, 7]
    assert config_lib.batches(config(folder, **few), "sft").data.limits == (5, 0)
    part = workdir_lib.with_tasks(config(folder, **few), (MAZE,))
    assert part.data.trace_limits == (0,) and part.data.limits == ()


def test_rows_beyond_a_split_name_the_setting(folder, tok):
    wrong = config(folder, data__limits=(0, 100))
    with pytest.raises(
        ValueError,
        match=f"config.data.limits asks for the first 100 examples of {MAZE}.*{folder} holds "
        f"64 for train",
    ):
        small_run.examples(wrong, tok)
    assert [
        len(source)
        for source in small_run.examples(config(folder, data__limits=(0, 5)), tok).sources
    ] == [64, 5]


@pytest.mark.parametrize("content", ["", '{"families": ["cha', "\0" * 200, "[]", '{"families": 3}'])
def test_a_damaged_record_of_made_data_is_named(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "made.json").write_text(content)
    with pytest.raises(
        ValueError, match=f"{tmp_path}/data/made.json .*: delete it .*or delete {tmp_path}/data to"
    ):
        small_run.make_data(small_run.config(), tmp_path)


# --- references -----------------------------------------------------------------------------------

ANSWERS = [
    "B",
    "<answer>B</answer>",
    "<answer> B </answer>",
    " B \n",
    "the answer is <answer>B</answer>",
    "B.",
    "1,000",
    "B\u200b",
    "\ufeffB",
    "cafe\u0301",
    "caf\u00e9",
    "<answer>cafe\u0301</answer>",
    "\u212b",
    "\u0958",
    "two\u00a0words",
    "B</answer>",
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tokenizer that normalises to NFC, as Qwen2's does."""
    from opsd_jax.tasks import vocabulary

    made = tmp_path_factory.mktemp("qwen")
    vocabulary.build_tokenizer(made)
    facts = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    (made / "tokenizer.json").write_text(
        json.dumps(facts | {"normalizer": {"type": "NFC"}}), encoding="utf-8"
    )
    return tokenizer.load(made)


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_training_teaches_is_right(qwen, tok, answer):
    from opsd_jax.evaluation import benchmark

    example = schema.Example(
        "p", "T", "Which?", answer, b"", (), ("look",), "<answer>C</answer> or so"
    )
    taught = blocks_lib.text_trace(example.full_text_only_thought, answer)
    for t in (qwen, tok):
        assert benchmark.score(example, t.decode(t.encode(taught))).right
        for wrong in ("<answer>C</answer>", "B", "<answer></answer>", "<answer>B"):
            assert not benchmark.score(example, wrong).right


def test_rows_that_no_completion_matches_are_named_before_sampling(folder, qwen):
    rows = small_run.examples(config(folder), qwen, "test")
    rows.check_references(0, range(small_run.TEST_ROWS))
    good = rows.sources[1]
    edits = {
        3: {"metadata": {"family": "maze", "map": ["FF", "FG"]}},
        5: {"answer": "<answer>R"},
        7: {"answer": "B<|im_end|>", "metadata": {}},
    }
    bad = [dataclasses.replace(good[n], **edits.get(n, {})) for n in range(small_run.TEST_ROWS)]
    rows.sources[1] = type("Source", (list,), {"directory": good.directory})(bad)
    with pytest.raises(ValueError) as error:
        rows.check_references(1, range(small_run.TEST_ROWS))
    for part in (
        f"3 examples of {MAZE} in {good.directory}",
        f"example {bad[3].pid}: metadata has a 'map' without start S",
        f"example {bad[5].pid}: answer has <answer> without",
        f"example {bad[7].pid}: answer 'B<|im_end|>' is read as '<answer>B' by",
        "--on_bad_row=skip",
    ):
        assert part in str(error.value)
    rows.check_references(1, [0, 1, 2, 4, 6])


def test_a_swap_needs_another_row(folder, tok, make):
    one = dict(data__limits=(1, 0), teacher__visual_thoughts="swap")
    with pytest.raises(
        ValueError,
        match=f"mode swap.*another example, and {CHART} has a single example in train.*data.limits",
    ):
        make(**one)
    make("warmup", **one)  # without a teacher
    rows = small_run.examples(config(folder, data__limits=(2, 3)), tok)
    for source, size in ((0, 2), (1, 3)):
        assert all(rows.partner(source, n) is not rows(source, n) for n in range(size))


def test_the_data_command_loads_neither_flax_nor_optax():
    """Preparing data needs arrays of the contexts and the settings, not the network or the
    optimizer.
    """
    code = (
        "import sys\n"
        "from opsd_jax import config, context\nfrom opsd_jax.data import __main__, batches\n"
        "sys.exit(', '.join({'flax', 'optax'} & {*sys.modules}) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr


def test_unprepared_files_in_the_place_of_data_are_recognised(tmp_path):
    """The command of the message writes elsewhere than into the source."""
    (tmp_path / "Bars").mkdir()
    (tmp_path / "Bars" / "train.jsonl").write_text("{}\n")
    data = config_lib.data(small_run.config(data__dir=str(tmp_path)))
    with pytest.raises(
        FileNotFoundError, match="parquet or JSONL files, which are not prepared"
    ) as e:
        procedural.check_available(data, str(tmp_path), "")
    assert f"--source={tmp_path} --target=DIR` with another folder for DIR" in str(e.value)
