"""Examples whose visual thoughts are replaced by generated images; the generation itself is
faked.
"""

import dataclasses
import json
import signal
import types

import jax
import numpy as np
import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import images, interleave, sharding
from opsd_jax import redraw as redraw_lib
from opsd_jax.data import arrayrecord
from opsd_jax.run import model as model_lib
from opsd_jax.run import redraw
from opsd_jax.runtime import checkpoint


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir with settings and data, and a model that generates one grey image per question."""
    config = small_run.config()
    config.mesh.tensor = 8  # the run was trained on other devices than those here
    work = tmp_path / "w"
    work.mkdir()
    small_run.make_data(config, work)
    (work / "config.json").write_text(json.dumps(config_lib.to_json(config)))
    calls = []

    def reason(model, questions, key, generation):
        assert generation.always and model.protocol.rounds == 2
        calls.append(len(questions))
        return [
            interleave.Answer(["a", np.full((8, 8, 3), sum(map(ord, q)) % 251, np.uint8), "b"], 2)
            for _, q in questions
        ]

    model = interleave.Reasoner(
        None,
        None,
        None,
        interleave.Protocol(),
        images.TRAINING,
        images.VAE,
        sharding.make_mesh(devices=jax.devices()[:1]),
    )
    monkeypatch.setattr(model_lib, "load", lambda directory, **_: model)
    monkeypatch.setattr(  # the checkpoint "c" is faked, too
        checkpoint, "step_folder", lambda flag, given, workdir: given or checkpoint.newest(workdir)
    )
    monkeypatch.setattr(interleave, "reason", reason)
    return types.SimpleNamespace(path=str(work), calls=calls, config=config, model=model)


def rows(folder, split):
    source = arrayrecord.open_source(folder, split, task=small_run.TASK)
    return [source[n] for n in range(len(source))]


def test_redrawn_examples_differ_only_in_their_images(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(redraw, "SHARD", 8)
    target = tmp_path / "drawn"

    def draw(**kw):
        return redraw.redraw(
            workdir.path, str(target), checkpoint="c", batches=redraw.Batches(4, **kw)
        )

    draw()
    for split in ("train", workdir.config.eval.final_split):
        before, after = rows(f"{workdir.path}/data", split), rows(target, split)
        assert [row.pid for row in before] == [row.pid for row in after]
        for old, new in zip(before, after):
            for name in (
                "question",
                "answer",
                "problem_image",
                "thoughts",
                "full_text_only_thought",
                "metadata",
                "task",
            ):
                assert getattr(old, name) == getattr(new, name)
            assert len(new.visual_thoughts) == len(old.visual_thoughts) == 1
            if split == "train":
                grey = np.asarray(images.open_rgb(new.visual_thoughts[0]))
                assert grey.shape == (8, 8, 3) and (grey == sum(map(ord, new.question)) % 251).all()
            else:
                assert new.visual_thoughts == old.visual_thoughts
    assert set(workdir.calls) == {4} and sum(workdir.calls) >= len(rows(target, "train"))

    done = len(workdir.calls)
    shards = sorted((target / "drawn" / "parquet").glob("*/data/train-*.parquet"))
    assert len(shards) > 1
    shards[-1].unlink()  # a kill before the last file
    draw()
    assert 0 < len(workdir.calls) - done <= 2
    with pytest.raises(FileExistsError, match="generated with other seed.*choose another --target"):
        draw(seed=1)
    other = dataclasses.replace(
        workdir.model, params={"head": np.ones(3, np.float32)}
    )  # another model under the same path
    monkeypatch.setattr(model_lib, "load", lambda directory, **_: other)
    with pytest.raises(FileExistsError, match="generated with other weights"):
        draw()
    record = target / "drawn" / "redraw.json"
    record.write_text(record.read_text()[:20])
    with pytest.raises(ValueError, match=f"{record} is not valid JSON .* delete {target}/drawn"):
        draw()


def test_beside_a_run_that_deletes_the_checkpoint(workdir, tmp_path, monkeypatch):
    """The record has the name of the one that was read."""
    steps, load = [3, 5], model_lib.load
    monkeypatch.setattr(checkpoint, "metadata", lambda folder: {"step": steps[0]})

    def rotated(directory, **how):
        if steps.pop(0) == 3:
            raise checkpoint.CheckpointGoneError(directory)
        return load(directory, **how)

    monkeypatch.setattr(model_lib, "load", rotated)
    redraw.redraw(workdir.path, str(tmp_path / "d"), batches=redraw.Batches(4))
    record = json.loads((tmp_path / "d" / "drawn" / "redraw.json").read_text())
    assert record["checkpoint"].endswith("w/checkpoints/5")


def test_a_stop_between_batches_keeps_whole_files(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(redraw, "SHARD", 8)
    target, reason = tmp_path / "drawn", interleave.reason

    def reason_and_signal(*args, **kwargs):
        if len(workdir.calls) == 2:  # in the first batch of the second file
            signal.raise_signal(signal.SIGTERM)
        return reason(*args, **kwargs)

    def main():
        return redraw_lib.main(
            [f"--workdir={workdir.path}", f"--target={target}", "--checkpoint=c", "--batch_size=4"]
        )

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(interleave, "reason", reason_and_signal)
        main()
    assert stopped.value.code == 42 and len(workdir.calls) == 3
    assert "the same command continues after the last whole file" in capsys.readouterr().err
    assert len(list(target.glob("drawn/parquet/*/data/train-*.parquet"))) == 1
    main()
    assert len(rows(target, "train")) == len(rows(f"{workdir.path}/data", "train"))


def test_what_cannot_be_generated(workdir, tmp_path, capsys):
    with pytest.raises(
        ValueError, match="--splits=dev: the run uses train, validation, test, not dev"
    ):
        redraw.redraw(workdir.path, str(tmp_path / "d"), checkpoint="c", splits=("dev",))
    with pytest.raises(SystemExit):
        redraw_lib.main([f"--workdir={tmp_path}/gone", f"--target={tmp_path}/d"])
    assert "holds no run" in capsys.readouterr().err
