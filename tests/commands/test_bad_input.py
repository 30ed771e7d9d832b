"""Mistakes of users: the error names the file, row or key, and how to fix it.

Faults of single functions are tested beside them; here they come through the commands and through
`train`.
"""

import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import small_run
import tiny
from opsd_jax import config as config_lib
from opsd_jax import config_check, config_flags, context, eval, tasks, tokenizer, train
from opsd_jax.data import __main__ as data
from opsd_jax.data import arrayrecord, procedural, sizes
from opsd_jax.data import prepare as prepare_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.diagnose import selection
from opsd_jax.model import attention
from opsd_jax.release import export, importing
from opsd_jax.run import checks, model
from opsd_jax.runtime import checkpoint, growing_file, locks

pytestmark = pytest.mark.usefixtures("fast_compiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data folder with its tokenizer."""
    made = tmp_path_factory.mktemp("data")
    procedural.make_procedural(str(made), small_run.config().data.make.to_dict())
    return made


def refused(kind, tmp_path, *parts, **changes):
    """Training with these settings raises `kind` with all the parts in its message and saves
    nothing.
    """
    with pytest.raises(kind) as error:
        train.train(small_run.config(**changes), str(tmp_path / "w"))
    for part in parts:
        assert part in str(error.value)
    assert checkpoint.Checkpoints(tmp_path / "w" / "checkpoints").latest() is None


# --- parquet files --------------------------------------------------------------------------------


def png():
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def parquet(tmp_path, changes=None, drop=None):
    """A file of three rows in the released layout, the last one changed."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "pid": f"p{n}",
            "question": "Which?",
            "answer": "B",
            "problem_image_0": png(),
            "resoning_thought_0": "look",
            "reasoning_image_0": png(),
            "metadata": None,
        }
        for n in range(3)
    ]
    rows[2] |= changes or {}
    path = tmp_path / "Maze" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [{key: value for key, value in row.items() if key != drop} for row in rows]
        ),
        path,
    )
    return path


def change(path, row, **values):
    """Edits a row of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[row] |= values
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path)


def prepare(tmp_path, capsys, *arguments):
    """(exit status, stdout, stderr) of `python -m opsd_jax.data prepare`."""
    try:
        data.main(["prepare", f"--source={tmp_path}", f"--target={tmp_path}/out", *arguments])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "changes, fault",
    [
        (
            {"problem_image_0": {"bytes": b"\x89PNG, broken", "path": None}},
            "problem_image_0 cannot be decoded",
        ),
        (
            {"problem_image_0": {"bytes": png()["bytes"][:40], "path": None}},
            "problem_image_0 cannot be decoded",
        ),
        ({"question": ""}, "question is empty"),
        ({"question": "  \n"}, "question is empty"),
        ({"answer": None}, "answer is empty"),
        ({"answer": "<answer>B"}, "answer has <answer> without </answer>"),
        ({"metadata": '{"family": "chess"}'}, "metadata has family 'chess'"),
        ({"metadata": '{"family": "maze", "map": ["FG"]}'}, "metadata has no 'map'"),
    ],
)
def test_a_bad_row_is_named_and_may_be_skipped(tmp_path, capsys, changes, fault):
    path = parquet(tmp_path, changes)
    status, _, error = prepare(tmp_path, capsys)
    assert status == 1 and "Traceback" not in error
    for part in (f"error: {path}, row 2, pid 'p2': {fault}", "Fix the row", "--on_bad_row=skip"):
        assert part in error
    status, told, _ = prepare(tmp_path, capsys, "--on_bad_row=skip")
    assert status == 0 and "1 bad rows left out" in told and f"row 2, pid 'p2': {fault}" in told
    assert len(arrayrecord.open_source(tmp_path / "out", task="Maze")) == 2


@pytest.mark.parametrize("column", ["question", "answer", "resoning_thought_0"])
def test_a_missing_column_is_named(tmp_path, capsys, column):
    path = parquet(tmp_path, drop=column)
    status, _, error = prepare(tmp_path, capsys)
    assert status == 1 and f"error: {path} has no column '{column}'" in error
    assert "Rename or add the column" in error
    assert not (tmp_path / "out").exists()


def test_questions_without_a_column_of_images_are_told(tmp_path, capsys):
    parquet(tmp_path, drop="problem_image_0")
    status, told, error = prepare(tmp_path, capsys)
    assert status == 0 and "no_image" in told + error


def test_a_source_without_parquet(tmp_path, capsys):
    status, _, error = prepare(tmp_path, capsys)
    assert (
        status == 1
        and f"{tmp_path} holds no parquet and no JSONL: looked for *.parquet, *.jsonl, data/*"
        in error
    )


def test_a_full_disk_while_preparing(tmp_path, capsys):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)).save(
        noise, "PNG"
    )
    parquet(tmp_path, {"problem_image_0": {"bytes": noise.getvalue(), "path": None}})
    with file_size_limit(20_000):
        status, _, error = prepare(tmp_path, capsys)
    assert (
        status == 1
        and "visual_opsd-train.array_record-00000-of-00001 could not be written" in error
    )
    assert "free space; then run the same command again" in error
    assert prepare(tmp_path, capsys)[0] == 0
    assert len(arrayrecord.open_source(tmp_path / "out", task="Maze")) == 3


class file_size_limit:
    """Writes beyond so many bytes of a file fail, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


# --- tokenizer and model --------------------------------------------------------------------------


def test_a_tokenizer_with_ids_beyond_the_embedding(folder, released, tmp_path, capsys):
    """Every command that brings the two together refuses them, with both numbers, before it does
    anything slow.
    """
    changes = dict(data__dir=str(folder), model__llm__vocab_size=300)
    largest = len(tokenizer.load(folder / "made" / "tokenizer").token_bytes) - 1
    said = (
        f"has ids up to {largest} ('<|vision_end|>'), but the model has 300 embeddings "
        f"(model.llm.vocab_size)"
    )
    refused(ValueError, tmp_path, said, f"set vocab_size to at least {largest + 1}", **changes)
    workdir, config = tmp_path / "run", config_lib.to_json(small_run.config(**changes))
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    checkpoint.save(
        workdir / "checkpoints" / "7", None, {"a": np.zeros(3, np.float32)}, step=7, config=config
    )
    for command in (
        lambda: eval.main([f"--workdir={workdir}", "--visual_thoughts=none"]),
        lambda: selection.open_run(str(workdir)),
        lambda: model.load(str(workdir), generation=False),
    ):
        try:
            command()
        except (ValueError, SystemExit) as error:
            assert said in f"{error} {capsys.readouterr().err}"
        else:
            raise AssertionError("it goes on")

    spoiled = shutil.copytree(released, tmp_path / "release")
    sizes = json.loads((spoiled / "llm_config.json").read_text())["vocab_size"]
    tiny.write_tokenizer(
        spoiled, json.loads((spoiled / "special_tokens.json").read_text()), sizes + 1
    )
    said = f"has ids up to {sizes} ('<|{sizes}|>'), but the model has {sizes} embeddings"
    with pytest.raises(ValueError, match=re.escape(said)):
        model.load(str(spoiled), generation=True)
    with pytest.raises(ValueError, match=re.escape(said)):
        importing.import_release(str(spoiled), str(tmp_path / "imported"))
    importing.import_release(str(released), str(tmp_path / "imported"), only="understanding")
    tiny.write_tokenizer(
        tmp_path / "imported" / "release",
        json.loads((spoiled / "special_tokens.json").read_text()),
        sizes + 1,
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        export.export_release(str(tmp_path / "imported"), str(tmp_path / "out"), base="none")
    assert not (tmp_path / "out").exists()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mistakes_on_the_command_line(tmp_path):
    mistakes = {
        "--config.divergence.btea=1": [
            "error: --config.divergence.btea=1: there is no",
            'mean "beta"',
        ],
        "--config.divergnce.beta=1": [
            "error: --config.divergnce.beta=1: there is no",
            'mean "divergence"',
        ],
        "--config.opsd.xyzzy=1": [
            "error: --config.opsd.xyzzy=1: there is no",
            "in opsd_jax/config.py",
        ],
        "--config.optm.lr=1": [
            "error: --config.optm.lr=1: there is no setting 'optm' in config. Did you mean",
            '"opsd.optim"',
        ],
        "--config.opsd.steps=abc": ["error: --config.opsd.steps=abc: give a whole number\n"],
        "--config.data.screen=True": [
            "error: --config.data.screen=True: a group of settings, which takes no value: give "
            "--config.data.screen.on or --config.data.screen.margin\n"
        ],
        "--config.opsd.optim.lr=abc": ["error: --config.opsd.optim.lr=abc: give a number\n"],
        "--workdir=": ["error: --workdir is empty"],
        f"--workdir={__file__}": [f"error: --workdir={__file__}: ", "is not a folder"],
        "stray": ["error: stray: options begin with --"],
        "--workdri=x": ["error: --workdri: there is no such option; did you mean --workdir?"],
        "--opsd.steps=3": ["--opsd.steps: there is no such option; did you mean --config.opsd.st"],
        "--config=configs/mini.py:chess": [
            "error: configs/mini.py:chess: choose from chart, maze, smoke, draw"
        ],
        "--config=configs/mini.py:smok": [
            "choose from chart, maze, smoke, draw; did you mean 'smoke'?"
        ],
        "--arm=nosie": [
            "error: --arm=nosie: there is no such arm; the config has the arms image, noise, none, "
            "offline, sft, swap; did you mean 'noise'?"
        ],
        "--config.data.buckets.student=(36,25)": [
            "error: config.data.buckets.student is (36, 25): give a tuple that holds"
        ],
        "--config.stages=('opsd','opsd')": ["error: config.stages names opsd twice"],
    }
    command = [
        sys.executable,
        "-m",
        "opsd_jax.train",
        "--config=configs/mini.py",
        f"--workdir={tmp_path}/w",
    ]

    def start(argument):
        return subprocess.Popen(
            [*command, argument], cwd=small_run.ROOT, text=True, stderr=subprocess.PIPE
        )

    running = {
        argument: start(argument) for argument in mistakes
    }  # all at once: starting is what takes long
    for argument, parts in mistakes.items():
        _, told = running[argument].communicate(timeout=300)
        assert running[argument].returncode == 1
        for part in parts:
            assert part in told, told
        assert "Traceback" not in told
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"stages": ("warmup", "opd")},
            r"config.stages names 'opd': choose from autoencoder, warmup, "
            r"opsd, sft, offline; did you mean 'opsd'\?",
        ),
        ({"stages": ()}, "config.stages is empty"),
        (
            {"run_arms": ("noise",), "eval.final_split": ""},
            "config.run_arms ends with a table of text-only accuracies",
        ),
        (
            {"run_arms": ("nosie",)},
            r"config.run_arms names 'nosie', which is not one of the arms image, noise, "
            r"none, offline, sft, swap; did you mean 'noise'\?",
        ),
        (
            {"opsd.accumulation": 3},
            "config.opsd.batch_size 8 is not divisible by config.opsd.accumulation 3",
        ),
        (
            {"teacher.visual_thoughts": "reel"},
            "config.teacher.visual_thoughts is 'reel': choose from .*; did you mean 'real'",
        ),
        ({"images.stride": 16}, "config.images.stride 16 must equal config.model.vit.patch_size 8"),
        (
            {"checkpoint.params": "average"},
            "config.checkpoint.params is 'average': use 'student' or 'ema'",
        ),
        (
            {"data.limits": (1, 2)},
            "config.data.limits needs one number for each of config.data.tasks",
        ),
        ({"data.on_too_long": "cut"}, "config.data.on_too_long is 'cut': use 'fail' or 'skip'"),
        ({"data.buckets.trace": ()}, "config.data.buckets needs equally many entries"),
        ({"opsd.jsd_weight": 0.0}, "config.opsd.jsd_weight and config.opsd.ce_weight are both 0"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    config = small_run.config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        config_check.check(config)


@pytest.mark.parametrize(
    "kind, platform", [("flash", "cpu"), ("cudnn", "cpu"), ("flash", "gpu"), ("cudnn", "tpu")]
)
def test_kernels_that_the_devices_lack(kind, platform):
    with pytest.raises(
        ValueError,
        match=f"config.model.attention is '{kind}', a kernel for a .*set "
        f"config.model.attention='dense'",
    ):
        attention.check_platform(kind, platform)
    for good in (
        "dense",
        "flash_interpret",
        {"tpu": "flash", "gpu": "cudnn"}.get(platform, "dense"),
    ):
        attention.check_platform(good, platform)


def test_a_kernel_that_the_devices_lack_is_told_before_data_are_made(tmp_path):
    refused(ValueError, tmp_path, "config.model.attention is 'flash'", model__attention="flash")
    assert not (tmp_path / "w" / "data").exists()


def test_batches_that_the_mesh_does_not_divide(tmp_path, folder):
    refused(
        ValueError,
        tmp_path,
        "does not cover",
        "set config.mesh",
        data__dir=str(folder),
        mesh__data=99,
    )


# --- files that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize("families", [(), ("chart",)])
def test_no_data(tmp_path, families):
    away = str(tmp_path / "away")
    command = f"python -m opsd_jax.data prepare --source=SOURCE_DIR --target={away}"
    refused(
        FileNotFoundError,
        tmp_path,
        f"{away} holds no data",
        command,
        f"make-mini --target={away}",
        "--config.data.dir",
        data__dir=away,
        data__make__families=families,
    )
    assert not os.path.exists(away)


def test_no_data_of_a_task(tmp_path, folder):
    refused(
        ValueError,
        tmp_path,
        f"config.data.tasks names 'Jigsaw', which the data in {folder} lack",
        data__dir=str(folder),
        data__tasks=("Jigsaw",),
    )


@pytest.mark.parametrize(
    "splits, shown, changes, message",
    [
        (("train",), ["i.png"], {}, "config.eval.final_split.*'test'"),
        (("train", "test"), [], {}, "no example of Asked has visual_thoughts, so teacher and"),
        (
            ("train", "test"),
            ["i.png"],
            {"model__llm__vocab_size": 9},
            "made/tokenizer has ids up to .*but the model has 9 embeddings",
        ),
        (("train", "test"), ["i.png"], {}, ""),
    ],
)
def test_what_prepared_data_lack_is_said_before_anything_is_made(
    tmp_path, folder, splits, shown, changes, message
):
    source = tmp_path / "Asked"
    source.mkdir()
    (source / "i.png").write_bytes(png()["bytes"])
    line = {"question": "Which?", "answer": "red", "image": "i.png", "thoughts": ["a", "b"]}
    for split in splits:
        text = json.dumps(line | {"visual_thoughts": shown, "pid": split})
        (source / f"{split}.jsonl").write_text(text + "\n")
    prepare_lib.prepare(source, tmp_path / "data", progress=False)
    config = small_run.config(
        data__dir=str(tmp_path / "data"),
        data__tasks=("Asked",),
        data__make__families=(),
        tokenizer=str(folder / "made" / "tokenizer"),
        **changes,
    )
    if not message:
        train.check(config, str(tmp_path / "w"))
        return
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_chat_form_without_a_tokenizer_names_the_setting(tmp_path):
    config = config_flags.read([f"--config={small_run.ROOT}/configs/smollm2.py:arithmetic"])
    with pytest.raises(ValueError, match="^config.tokenizer is empty, .*examples/smollm2.py makes"):
        train.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    with pytest.raises(ValueError, match="W/data/made/tokenizer has ids up to") as raised:
        sizes.check_unmade(small_run.config(model__llm__vocab_size=9))
    assert "/tmp" not in str(raised.value)


def test_a_folder_that_the_system_refuses(tmp_path):
    """No folder can be made in /proc, whose permissions say that root may."""
    root = logging.root.handlers[:]
    with pytest.raises(OSError, match="^/proc/x: the folder cannot be made .*: give another path"):
        with locks.only_writer("/proc/x", inside=True):
            pass
    before = len(logging._handlerList)
    with pytest.raises(OSError):
        growing_file.LogFile("/proc/x/log/000.txt")
    assert len(logging._handlerList) == before and logging.root.handlers == root


def test_no_tokenizer(tmp_path, folder):
    away = str(tmp_path / "away")
    refused(
        FileNotFoundError,
        tmp_path,
        f"{away}: there is no such folder: give",
        "--config.tokenizer=FOLDER",
        "`python -m opsd_jax.data make-mini --target=DIR --families=maze --train=1 --validation=0 "
        "--test=0` makes a small one in DIR/made/tokenizer",
        tokenizer=away,
        data__dir=str(folder),
    )
    os.makedirs(away)
    refused(
        FileNotFoundError,
        tmp_path,
        f"{away} holds no tokenizer",
        tokenizer=away,
        data__dir=str(folder),
    )
    (only,) = os.listdir(folder / "visual_opsd")
    shutil.copytree(
        folder / "visual_opsd", tmp_path / "prepared" / "visual_opsd"
    )  # data that no tokenizer comes with
    with pytest.raises(
        FileNotFoundError, match=f"^config.tokenizer is empty, and the data in {tmp_path}/prepared"
    ):
        train.train(
            small_run.config(data__dir=str(tmp_path / "prepared"), data__tasks=(only,)),
            str(tmp_path / "other"),
        )
    assert not (tmp_path / "other").exists()


def test_no_such_split_is_told_before_the_first_step(tmp_path, folder):
    for setting, changes in {
        "config.eval.final_split ('' for no evaluation)": {"eval__final_split": "dev"},
        "config.eval.split (unused where config.eval.every=0)": {
            "eval__split": "dev",
            "eval__every": 1,
        },
    }.items():
        refused(
            ValueError,
            tmp_path,
            f"{setting} asks for the split 'dev' of {folder}",
            "The folder has the splits train, validation, test: give one of them, or a part of",
            data__dir=str(folder),
            **changes,
        )


@pytest.mark.parametrize(
    "split, reason",
    [
        ("dev[:5]", "Unknown split 'dev'"),
        ("train[:999]", "Requested slice [:999] incompatible with 64 examples"),
        ("train[5", "Error parsing split 'train[5'"),
        ("train[5:5]", "it holds no example"),
        ("", "Error parsing split ''"),
    ],
)
def test_a_split_that_cannot_be_opened(folder, split, reason):
    with pytest.raises(ValueError) as error:
        arrayrecord.open_source(folder, split, task=small_run.TASK, asked_by="--split")
    assert str(error.value).startswith(f"--split asks for the split {split!r} of {folder}")
    assert f": {reason}. The folder has the splits train, validation, test: " in str(error.value)


def test_a_swap_of_a_single_row(tmp_path, folder):
    refused(
        ValueError,
        tmp_path,
        f"{small_run.TASK} has a single example in train",
        "data.limits",
        data__dir=str(folder),
        stages=("opsd",),
        teacher__visual_thoughts="swap",
        data__limits=(1,),
    )


def test_a_row_that_no_completion_matches(tmp_path, folder, monkeypatch):
    """As an older version prepared it; what is new is refused in preparation."""
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "fault", lambda *_: None)
        shutil.copytree(folder, tmp_path / "data")
        rows = tmp_path / "data/made/parquet"
        for path in rows.glob("*/data/test-*.parquet"):
            change(path, 3, answer="<answer>n7")
        prepare_lib.prepare(rows, tmp_path / "data", overwrite=True)
    refused(
        ValueError,
        tmp_path,
        "no completion can be right for 1 examples of Chart_Refocus",
        "answer has <answer> without",
        "example chart-test-",
        data__dir=str(tmp_path / "data"),
    )


def test_an_example_that_exceeds_its_bucket(tmp_path, folder):
    config = small_run.config()
    ((positions, patches, targets),) = config.data.buckets.trace
    refused(
        context.TooLongError,
        tmp_path,
        "training examples are too long, first chart-train-",
        f"buckets.trace is ({positions - 9}, {patches}, {targets}), it needs {positions} positions",
        "`python -m opsd_jax.data sizes`, with the same --config options, prints",
        data__dir=str(folder),
        data__buckets__trace=((positions - 9, patches, targets),),
    )
    refused(
        context.TooLongError,
        tmp_path,
        "training examples are too long, first chart-train-",
        f"config.data.buckets.trace is ({positions}, {patches}, {targets - 9}), it needs",
        " targets",
        data__dir=str(folder),
        data__buckets__trace=((positions, patches, targets - 9),),
    )


def test_after_such_a_refusal_the_fixed_command_runs_in_the_same_folder(tmp_path, folder):
    refused(FileNotFoundError, tmp_path, "tokenizer", tokenizer="/nowhere", data__dir=str(folder))
    record = config_lib.to_json(small_run.config(data__dir=str(folder)))
    workdir_lib.write_record(str(tmp_path / "w"), record)


def test_another_preset_on_a_workdir_names_what_differs_and_offers_no_deletion(tmp_path):
    """Before anything else: the data of the run would be the next to differ."""
    record = config_lib.to_json(small_run.config())
    workdir_lib.write_record(str(tmp_path), record)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "warmup"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/made.json").write_text(json.dumps(record["data"]["make"]))
    other = small_run.config(data__make__families=("maze",))
    with pytest.raises(config_check.ConfigMismatchError) as error:
        checks.check(other, str(tmp_path))
    said = " ".join(str(error.value).split())
    assert 'data.make.families ["chart"] ["maze"]' in said
    assert "the same settings file, preset and settings" in said and "another --workdir" in said
    (tmp_path / "metrics.jsonl").unlink()  # a run that made its data and took no step
    with pytest.raises(ValueError, match="families.*chart.*maze.*another folder") as error:
        checks.check(other, str(tmp_path))
    assert "delete" not in f"{said} {error.value}"


# --- checkpoints ----------------------------------------------------------------------------------


def test_starting_from_half_a_save_or_from_nothing(tmp_path, folder):
    half = tmp_path / "other" / "checkpoints" / "7.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    refused(
        checkpoint.CheckpointNotFoundError,
        tmp_path,
        "interrupted (7.orbax-checkpoint-tmp)",
        "no complete checkpoint",
        data__dir=str(folder),
        init_from=str(half.parent),
    )
    refused(
        checkpoint.CheckpointNotFoundError,
        tmp_path,
        f"{half.parent}/7: this save was interrupted",
        data__dir=str(folder),
        init_from=str(half.parent / "7"),
    )
    refused(
        checkpoint.CheckpointNotFoundError,
        tmp_path,
        "config.init_from='/nowhere': there is no such folder: give a released",
        data__dir=str(folder),
        init_from="/nowhere",
    )


@pytest.mark.slow
def test_starting_from_other_sizes(tmp_path, tmp_path_factory):
    trained = small_run.trained(tmp_path_factory)
    refused(
        checkpoint.CheckpointMismatchError,
        tmp_path,
        "llm/layers/und/gate_kernel",
        "48",
        "56",
        data__dir=f"{trained}/data",
        init_from=str(trained),
        model__llm__intermediate_size=56,
    )


def test_a_folder_that_another_run_writes_into(tmp_path, folder):
    with locks.only_writer(tmp_path / "w", inside=True):
        refused(
            locks.FolderInUseError,
            tmp_path,
            f"{tmp_path}/w",
            f"process {os.getpid()} on",
            data__dir=str(folder),
        )


@pytest.mark.slow
def test_a_full_disk_while_training(tmp_path, tmp_path_factory, capsys):
    """The run ends with the folder's name; when there is space again, it goes on to the same
    end.
    """
    trained, workdir = small_run.trained(tmp_path_factory), tmp_path / "w"
    shutil.copytree(trained / "data", workdir / "data")
    steps = len(os.listdir(trained / "checkpoints"))
    sizes = [path.stat().st_size for path in (trained / "checkpoints").rglob("*") if path.is_file()]
    with file_size_limit(max(sizes) // 2), pytest.raises(checkpoint.CheckpointError) as error:
        train.train(small_run.config(), str(workdir))
    for part in (f"under {workdir}/checkpoints", "too large", "Is the disk full", "usable: none"):
        assert part in str(error.value)
    train.train(small_run.config(), str(workdir))
    assert len(os.listdir(workdir / "checkpoints")) == steps
    kept = [checkpoint.restore_params(w, small_run.abstract_params()) for w in (trained, workdir)]
    np.testing.assert_array_equal(*(params["llm"]["head"] for params in kept))
