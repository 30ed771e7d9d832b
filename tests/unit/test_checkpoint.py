"""Checkpoints: exact, complete or absent, on any mesh, with errors that say what to do."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xla_flags
from opsd_jax.runtime import checkpoint, checkpoint_folders, stopping
from opsd_jax.runtime.checkpoint import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    Checkpoints,
)

ROOT = str(pathlib.Path(__file__).parents[2])


def make_state(seed=0, width=4):
    params = {
        "embed": jax.random.normal(jax.random.key(seed), (8, width)),
        "layers": [
            {"kernel": jnp.full((width, width), seed + 0.5, jnp.bfloat16)},
            {"bias": jnp.arange(width)},
        ],
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: x + 1, params),
        "opt": optimizer.init(params),
        "step": jnp.int32(seed),
        "rng": jax.random.key(seed),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def keep(checkpoints, step, **more):
    state = make_state(step)
    return checkpoints.save(step, state, state["ema"], stage="opsd", config={"seed": step}, **more)


def child(code, *arguments, env=None):
    """Starts a fresh Python that runs `code`; its stdout is read line by line."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT, **(env or {})}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


# ---------------------------------------------------------------------------- saving and restoring


def test_round_trip_is_exact_and_metadata_is_kept(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() is None
        config = {"lr": 1e-3, "betas": (0.8, 0.9)}
        assert checkpoints.save(
            3,
            state,
            state["ema"],
            stage="opsd",
            config=config,
            wait=True,
        )
        assert checkpoints.latest() == 3
        assert_same(checkpoints.restore(3, abstract(state)), state)
        found = checkpoints.metadata(3)
    assert found["config"] == {"lr": 1e-3, "betas": [0.8, 0.9]}
    assert (found["format"], found["stage"], found["step"]) == (checkpoint.FORMAT, "opsd", 3)
    assert found["versions"]["jax"] == jax.__version__ and found["versions"]["orbax"]
    # The step folder, its parent and the workdir all lead to it; without shardings it goes to one
    # device.
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        assert_same(checkpoint.restore(folder, plain), state)
        assert_same(checkpoint.restore_params(folder, plain["params"]), state["ema"])
    assert checkpoint.metadata(tmp_path) == found


def test_weights_alone_take_the_place_of_a_start(tmp_path):
    """At step 0 the state would hold them once or twice more; nothing continues from there."""
    weights = make_state(0)["params"]
    with Checkpoints(tmp_path, keep_latest=1, keep_steps=(0,)) as checkpoints:
        assert checkpoints.save(0, None, weights, stage="opsd", config={})
        checkpoints.wait()
        assert {*checkpoint.contents(tmp_path / "0")} == {"params"}
        assert_same(checkpoint.restore_params(tmp_path / "0", abstract(weights)), weights)
        keep(checkpoints, 1)
    assert {*checkpoint.contents(tmp_path / "1")} == {"params", "state"}
    with pytest.raises(CheckpointMismatchError, match="holds no 'state'.*not a run to continue"):
        checkpoint.restore(tmp_path / "0", abstract(make_state(0)))


def test_the_time_of_a_save_is_bounded(tmp_path):
    with Checkpoints(tmp_path, timeout=7) as checkpoints:
        assert checkpoints._checkpointer._manager._options.async_options.timeout_secs == 7


def test_an_array_of_a_one_shot_save_is_stored_in_pieces(tmp_path, monkeypatch):
    """By default it would be one piece, which every process that wants a part reads as a whole."""
    import tensorstore

    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1 << 12)
    weights = {"w": jnp.arange(64 * 48 * 8, dtype=jnp.float32).reshape(8, 64, 48)}
    checkpoint.save(tmp_path / "c", None, weights)
    store = {"driver": "ocdbt", "base": f"file://{tmp_path}/c/params/", "path": "w/"}
    layout = tensorstore.open({"driver": "zarr3", "kvstore": store}).result().chunk_layout
    assert 4 * np.prod(layout.read_chunk.shape) <= 1 << 12
    assert_same(checkpoint.restore_params(tmp_path / "c", abstract(weights)), weights)


def test_what_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2, keep_steps=(3, 5)) as checkpoints:
        for step in range(1, 10):
            keep(checkpoints, step)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 5, 8, 9]


def test_saving_a_step_again_is_skipped_and_an_older_one_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert keep(checkpoints, 4) and not keep(checkpoints, 4, wait=True)
        with pytest.raises(ValueError, match="3 is older than checkpoint 4.*workdir"):
            keep(checkpoints, 3)
    with Checkpoints(tmp_path) as checkpoints:
        assert not keep(checkpoints, 4) and keep(checkpoints, 5)
    with pytest.raises(ValueError, match="keep_latest=0"):
        Checkpoints(tmp_path, keep_latest=0)


@pytest.mark.parametrize("when", ["save", "wait", "close"])
def test_a_folder_deleted_meanwhile_is_an_error(tmp_path, when):
    """Orbax would make it again: the run would end well with half of its checkpoints."""
    folder = tmp_path / "checkpoints"
    with pytest.raises(
        CheckpointError, match=r"checkpoints/2 was complete, .* is gone.* Still complete: none"
    ):
        with Checkpoints(folder, keep_latest=2) as checkpoints:
            keep(checkpoints, 1)
            keep(checkpoints, 2, wait=True)
            shutil.rmtree(folder)
            if when == "save":
                keep(checkpoints, 3)
            elif when == "wait":
                checkpoints.wait()
    assert not (folder / "3").exists()


def test_a_folder_deleted_during_a_save(tmp_path, monkeypatch):
    """Not "Is the disk full?"."""

    def fail():
        raise FileNotFoundError(f"{tmp_path}/checkpoints/2.orbax-checkpoint-tmp")

    with pytest.raises(
        CheckpointError,
        match="writing checkpoint 1 .* failed: .* The folder is gone: it was deleted or moved",
    ):
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            keep(checkpoints, 1, wait=True)
            shutil.rmtree(tmp_path / "checkpoints")
            monkeypatch.setattr(checkpoints._checkpointer, "wait", fail)
            checkpoints.wait()


def test_older_checkpoints_may_be_deleted_meanwhile(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        for step in (1, 2):
            keep(checkpoints, step, wait=True)
        shutil.rmtree(tmp_path / "1")
        keep(checkpoints, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_save_in_flight_survives_donation_and_is_not_yet_the_latest(tmp_path):
    state = {"params": {"w": jnp.arange(2**22, dtype=jnp.float32)}, "step": jnp.int32(1)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, state["params"], stage="opsd", config={})
        assert checkpoints.latest() is None or (tmp_path / "1").exists()
        state = jax.block_until_ready(update(state))
        checkpoints.wait()
        assert checkpoints.latest() == 1
        assert_same(jax.tree.map(np.asarray, checkpoints.restore(1, abstract(state))), expected)


def test_one_shot_save_refuses_to_overwrite(tmp_path):
    state = make_state(1)
    checkpoint.save(
        tmp_path / "run", state, state["params"], step=1, stage="warmup", config={"a": 1}
    )
    assert_same(checkpoint.restore(tmp_path / "run", abstract(state)), state)
    with pytest.raises(FileExistsError, match="run exists and is not empty"):
        checkpoint.save(tmp_path / "run", state, state["params"])
    (tmp_path / "release").mkdir()  # an empty folder is welcome
    checkpoint.save(tmp_path / "release", None, state["params"])
    assert_same(
        checkpoint.restore_params(tmp_path / "release", abstract(state["params"])), state["params"]
    )
    with pytest.raises(CheckpointMismatchError, match="no 'state', only .'params'."):
        checkpoint.restore(tmp_path / "release", abstract(state))


def test_params_may_change_their_floating_dtype_or_be_a_part(tmp_path):
    params = {
        "und": {"w": jnp.linspace(0, 1, 12).reshape(3, 4)},
        "gen": {"w": jnp.ones((3, 4))},
        "ids": jnp.arange(3),
    }
    checkpoint.save(tmp_path / "c", None, params)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    with pytest.raises(
        CheckpointMismatchError, match=r"1 of 3 arrays(.|\n)*ids +int32\[3\] +bfloat16\[3\]"
    ):
        checkpoint.restore_params(tmp_path / "c", half)
    half["ids"] = params["ids"]
    loaded = checkpoint.restore_params(tmp_path / "c", half)
    assert_same(loaded["und"]["w"], params["und"]["w"].astype(jnp.bfloat16))
    part = {"und": half["und"]}
    assert_same(
        checkpoint.restore_params(tmp_path / "c", part, partial=True), {"und": loaded["und"]}
    )
    with pytest.raises(CheckpointMismatchError, match=r"gen/w"):
        checkpoint.restore_params(tmp_path / "c", part)
    with pytest.raises(
        CheckpointMismatchError, match=r"und/b +absent +float32\[2\]"
    ):  # partial is one way only
        checkpoint.restore_params(
            tmp_path / "c", {"und": {**half["und"], "b": jnp.ones(2)}}, partial=True
        )


# ---------------------------------------------------------------------------- errors


def test_large_arrays_are_read_one_after_the_other(tmp_path, monkeypatch):
    """Orbax holds what it reads twice; little else is there while the largest array is read."""
    from orbax.checkpoint import v1 as ocp

    tree = {
        "a": {"small": jnp.arange(3.0), "large": jnp.arange(400.0)},
        "larger": jnp.arange(600.0),
        "n": jnp.arange(5),
    }
    checkpoint.save(tmp_path / "0", None, tree)
    asked, load = [], ocp.load_checkpointables

    def recorded(directory, items):
        leaves = jax.tree.leaves_with_path(items["params"])
        asked.append([jax.tree_util.keystr(path) for path, leaf in leaves if leaf is not ...])
        return load(directory, items)

    monkeypatch.setattr(ocp, "load_checkpointables", recorded)
    monkeypatch.setattr(checkpoint, "_ALONE", 1000)
    found = checkpoint.restore_params(tmp_path / "0", tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert asked == [["['larger']"], ["['a']['large']"], ["['a']['small']", "['n']"]]
    monkeypatch.setattr(checkpoint, "_ALONE", 1 << 30)
    checkpoint.restore_params(tmp_path / "0", tree)
    assert len(asked) == 4 and len(asked[-1]) == 4


def test_mismatch_lists_every_difference_at_once(tmp_path):
    state = make_state(1, width=4)
    checkpoint.save(tmp_path / "c", state, state["params"])
    other = make_state(1, width=6)
    del other["ema"]
    other["params"]["head"] = jnp.ones((2, 2))
    other["step"] = jnp.float32(0)
    with pytest.raises(CheckpointMismatchError) as caught:
        checkpoint.restore(tmp_path / "c", abstract(other))
    text = " ".join(str(caught.value).split())
    for row in (
        "params/embed float32[8, 4] float32[8, 6]",
        "params/layers/0/kernel bfloat16[4, 4] bfloat16[6, 6]",
        "opt/1/0/mu/embed float32[8, 4] float32[8, 6]",
        "ema/embed float32[8, 4] absent",
        "params/head absent float32[2, 2]",
        "step int32[] float32[]",
    ):
        assert row in text, row
    assert str(tmp_path / "c") in text and "opt/1/0/count" not in text  # what agrees is not listed


def test_a_flag_names_a_step_or_a_folder_whose_newest_step_is_taken(tmp_path, monkeypatch):
    run, params = tmp_path / "run", {"w": jnp.ones(2)}
    for step in (30, 50):
        checkpoint.save(run / "checkpoints" / str(step), None, params, step=step)
    checkpoint.save(tmp_path / "kept" / "7", None, params, step=7)

    def named(given, workdir=run):
        return checkpoint.step_folder("--checkpoint", str(given), str(workdir))

    newest = f"{run}/checkpoints/50"
    for given in ("", run, f"{run}/", run / "checkpoints", f"{run}/checkpoints/", newest):
        assert named(given) == newest
    assert named(run / "checkpoints" / "30") == named("30") == f"{run}/checkpoints/30"
    assert named(tmp_path / "kept") == f"{tmp_path}/kept/7"
    monkeypatch.chdir(run)
    assert named("checkpoints") == "./checkpoints/50"

    for absent in ("40", tmp_path / "away" / "50"):
        with pytest.raises(CheckpointNotFoundError) as raised:
            named(absent)
        assert str(raised.value) == (
            f"--checkpoint={absent}: there is no such folder; the run in {run} has the steps 30, "
            f"50: give --checkpoint={run}/checkpoints/50"
        )
    with pytest.raises(CheckpointNotFoundError, match=r"/40: no such .*beside it: \[30, 50\]"):
        named(run / "checkpoints" / "40")
    with pytest.raises(CheckpointNotFoundError, match="empty has no complete checkpoint: start"):
        named("40", tmp_path / "empty")


def test_no_checkpoint_says_what_is_there(tmp_path):
    with pytest.raises(
        CheckpointNotFoundError, match="nothere: there is no such folder: give a workdir"
    ):
        checkpoint.restore(tmp_path / "nothere", {})
    with pytest.raises(CheckpointNotFoundError, match="it holds: nothing"):
        checkpoint.restore(tmp_path, {})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointNotFoundError, match=f"{tmp_path}.*it holds: model.safetensors"):
        checkpoint.restore_params(tmp_path, {})


def test_a_workdir_may_have_a_number_as_its_name(tmp_path):
    state = make_state(5)
    checkpoint.save(tmp_path / "7" / "checkpoints" / "5", state, state["params"])
    assert_same(checkpoint.restore(tmp_path / "7", abstract(state)), state)


def test_half_a_save_is_named_and_the_complete_one_used(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    (folder / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    for path in (tmp_path, folder, folder / "7"):
        with pytest.raises(CheckpointNotFoundError, match="interrupted"):
            checkpoint.restore(path, {})
    state = make_state(5)
    checkpoint.save(folder / "5", state, state["params"])
    with caplog.at_level("WARNING"):
        assert_same(checkpoint.restore(tmp_path, abstract(state)), state)
    assert "7.orbax-checkpoint-tmp" in caplog.text and "using step 5" in caplog.text
    with pytest.raises(CheckpointNotFoundError, match=r"7: this save was interrupted.*\[5\]"):
        checkpoint.restore(folder / "7", abstract(state))
    with pytest.raises(CheckpointNotFoundError, match=r"6: no such checkpoint.*\[5\]"):
        checkpoint.restore(folder / "6", abstract(state))
    assert (
        folder / "7.orbax-checkpoint-tmp"
    ).exists()  # reading deletes nothing: a run may be writing it
    caplog.clear()
    with caplog.at_level("WARNING"), Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 5
        keep(checkpoints, 8, wait=True)
        assert sorted(path.name for path in folder.iterdir()) == ["5", "8"]
    assert "removing half-written" in caplog.text and "7.orbax-checkpoint-tmp" in caplog.text


def test_damaged_files_and_strange_checkpoints(tmp_path):
    from orbax.checkpoint import v1 as ocp

    state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    for step in (1, 2):
        checkpoint.save(tmp_path / str(step), state, state)
    largest = max(
        (path for path in (tmp_path / "2" / "params").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    os.truncate(largest, 100)
    with pytest.raises(
        CheckpointError, match=rf"(?s){tmp_path}/2 failed.*delete that folder.*\(1\)"
    ):
        checkpoint.restore_params(tmp_path, abstract(state))
    ocp.save_checkpointables(tmp_path / "foreign", {"params": state})
    with pytest.raises(
        CheckpointMismatchError, match="foreign is an Orbax checkpoint, but not one of opsd_jax"
    ):
        checkpoint.restore_params(tmp_path / "foreign", abstract(state))
    future = {"format": checkpoint.FORMAT + 1}
    ocp.save_checkpointables(tmp_path / "future", {"params": state}, custom_metadata=future)
    with pytest.raises(CheckpointMismatchError, match="update opsd_jax"):
        checkpoint.metadata(tmp_path / "future")


def test_a_full_disk_is_told_and_harms_no_earlier_checkpoint(tmp_path):
    """Writes truly fail (a file-size limit); keep_latest=1 deletes step 1 if step 2 passes for
    written.
    """
    code = """
        import resource, sys
        import jax, jax.numpy as jnp
        from opsd_jax.runtime.checkpoint import Checkpoints, CheckpointError
        state = lambda step: {"w": jax.random.normal(jax.random.key(step), (512, 512))}
        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        def save(c, step, **more):
            return c.save(step, state(step), state(step), stage="opsd", config={}, **more)
        with Checkpoints(sys.argv[1], keep_latest=1) as c:
            save(c, 1, wait=True)
            limit(100_000)
            save(c, 2)  # async: the error comes with the next call
            for call in (lambda: save(c, 3), lambda: save(c, 3, wait=True)):
                try:
                    call()
                    print("no error")
                except CheckpointError as error:
                    print(isinstance(error, OSError), sys.argv[1] in str(error),
                          "too large" in str(error), "usable: [1]" in str(error), c.latest())
            c.wait()  # told already
            restored = c.restore(1, state(0))
            print("restored", bool((restored["w"] == state(1)["w"]).all()))
            limit(resource.RLIM_INFINITY)
            print("again", save(c, 3, wait=True), c.latest())
            print("restored", bool((c.restore(3, state(0))["w"] == state(3)["w"]).all()))
    """
    lines = finish(child(code, tmp_path)).splitlines()
    assert lines == ["True True True True 1"] * 2 + [
        "restored True",
        "again True 3",
        "restored True",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "3"
    ]  # 1 went only when 3 was complete


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 0),
        lambda folder: shutil.rmtree(folder / "params"),
        lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 40),
        lambda folder: os.remove(folder / "state" / "_METADATA"),
        lambda folder: os.truncate(folder / "params" / "manifest.ocdbt", 0),
        lambda folder: os.remove(folder / "_CHECKPOINT_METADATA"),
    ],
)
def test_a_save_that_cannot_be_opened_is_not_complete_and_the_older_one_stays(tmp_path, damage):
    """Found when it is waited for, and when the next one is saved."""
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        keep(checkpoints, 1, wait=True)
        for step, find in ((2, checkpoints.wait), (3, lambda: keep(checkpoints, 4))):
            keep(checkpoints, step)
            checkpoints._checkpointer.wait()
            damage(tmp_path / str(step))
            with pytest.raises(
                CheckpointError,
                match=rf"(?s){tmp_path}/{step} was written but cannot be opened: .*usable: \[1\]",
            ):
                find()
            assert checkpoints.latest() == 1 and checkpoint.metadata(tmp_path)["step"] == 1
        assert keep(checkpoints, 4, wait=True)
        assert [path.name for path in tmp_path.iterdir()] == ["4"]
    assert_same(checkpoint.restore(tmp_path, abstract(make_state(4))), make_state(4))


@pytest.mark.parametrize(
    "name",
    [
        "_CHECKPOINT_METADATA",
        "params/_METADATA",
        "params/_sharding",
        "params/manifest.ocdbt",
        "params/array_metadatas/process_0",
    ],
)
def test_cut_files_name_the_folder_and_the_fix(tmp_path, name):
    """Orbax takes most of them for an empty checkpoint."""
    weights = {"w": jnp.arange(6.0)}
    checkpoint.save(tmp_path / "3", None, weights, step=3)
    raw = (tmp_path / "3" / name).read_bytes()
    for content in (b"", raw[: len(raw) // 2], b"\0" * 100):
        (tmp_path / "3" / name).write_bytes(content)
        with pytest.raises(
            CheckpointError,
            match=rf"(?s){tmp_path}/3.*delete that folder and start anew: no other checkpoint",
        ):
            checkpoint.restore_params(tmp_path, weights)


def test_beside_a_damaged_checkpoint_the_others_are_named(tmp_path):
    """Not the damaged one, and first what changes nothing."""
    weights = {"w": jnp.arange(6.0)}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / str(step), None, weights, step=step)
    said = checkpoint._if_damaged(tmp_path / "3")
    assert f"take another one, --checkpoint={tmp_path}/2; or delete that folder" in said
    assert said.endswith("the newest of the others is used then (1, 2)")


@pytest.mark.parametrize(
    "key, value", [("format", "x"), ("config", []), ("step", None), ("stage", 3)]
)
def test_details_of_another_type(tmp_path, key, value):
    checkpoint.save(tmp_path / "3", None, {"w": jnp.ones(2)})
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=f"3/_CHECKPOINT_METADATA: {key} of custom_metadata cannot be read. .*delete that",
    ):
        checkpoint.metadata(tmp_path)


def test_where_orbax_loses_arrays_the_save_fails(tmp_path, monkeypatch):
    """Such paths are refused; without that, the check after the save finds what is lost."""
    monkeypatch.setattr(checkpoint_folders.paths, "check_given", lambda *_, **__: None)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)a\[1\] was written but cannot be opened: .*no array of 'params'",
    ):
        checkpoint.save(tmp_path / "a[1]", None, {"w": jnp.ones(2)})
    assert not (tmp_path / "a[1]").exists()


def test_older_checkpoints_go_when_the_new_one_is_complete(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        for step in (1, 2):
            keep(checkpoints, step)
        assert (tmp_path / "1").exists()
        checkpoints.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["2"]
    (tmp_path / "2").rename(tmp_path / "2.being-deleted")  # as a kill in the middle leaves it
    with pytest.raises(CheckpointNotFoundError):
        checkpoint.metadata(tmp_path)
    with Checkpoints(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_reading_beside_a_run_that_deletes_its_older_checkpoints(tmp_path, caplog):
    """The newest when nothing else was asked for; otherwise an error that says what happened."""
    states = {step: make_state(step) for step in (1, 2)}
    checkpoint.save(tmp_path / "1", states[1], states[1]["ema"], step=1)
    read, seen = checkpoint._read_metadata, []

    def rotated(folder):
        if not seen:
            seen.append(folder.name)
            checkpoint.save(tmp_path / "2", states[2], states[2]["ema"], step=2)
            shutil.rmtree(tmp_path / "1")
        return read(folder)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(checkpoint, "_read_metadata", rotated)
        assert_same(checkpoint.restore(tmp_path, abstract(states[2])), states[2])
        assert seen == ["1"] and "going on with the newest" in caplog.text
        shutil.rmtree(tmp_path / "2")
        checkpoint.save(tmp_path / "1", states[1], states[1]["ema"], step=1)
        seen.clear()
        with pytest.raises(
            checkpoint.CheckpointGoneError,
            match=f"{tmp_path}/1 was deleted while.*take a later step",
        ):
            checkpoint.restore_params(tmp_path / "1", abstract(states[1]["ema"]))
    os.truncate(tmp_path / "2" / "_CHECKPOINT_METADATA", 0)
    with pytest.raises(
        CheckpointError, match="_CHECKPOINT_METADATA is not valid JSON.*delete that folder"
    ):  # not deleted
        checkpoint.metadata(tmp_path)


def test_several_processes_take_the_checkpoint_that_the_first_one_finds(tmp_path, monkeypatch):
    from jax.experimental import multihost_utils

    states, given = make_state(1), []
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        checkpoint.newest(tmp_path / "none")
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints" / str(step), states, states["ema"], step=step)
    assert checkpoint.newest(tmp_path) == f"{tmp_path}/checkpoints/2"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils,
        "broadcast_one_to_all",
        lambda step: given.append(int(step)) or np.int32(first),
    )
    first = 1  # the run saved another one before this process looked
    assert checkpoint.newest(tmp_path) == f"{tmp_path}/checkpoints/1" and given == [2]
    first = -1
    with pytest.raises(CheckpointNotFoundError, match="the first process finds no checkpoint"):
        checkpoint.newest(tmp_path)
    first = 2
    assert (
        checkpoint.newest(tmp_path / "none") == f"{tmp_path}/none/checkpoints/2" and given[-1] == -1
    )


@pytest.mark.parametrize(
    "processes, given, times", [(1, "", 3), (1, "W/checkpoints/1", 1), (2, "", 1)]
)
def test_one_process_begins_again_where_its_checkpoint_is_deleted(
    monkeypatch, processes, given, times
):
    """Several do not: the others may have read it, and would wait for this one."""
    calls = []

    def work():
        calls.append(0)
        if len(calls) < 3:
            raise checkpoint.CheckpointGoneError("1 was deleted.")
        return "done"

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    if times == 3:
        assert checkpoint.retry_if_gone(work, given=given) == "done"
    else:
        with pytest.raises(checkpoint.CheckpointGoneError):
            checkpoint.retry_if_gone(work, given=given)
    assert len(calls) == times


def test_writers_of_a_failed_save_may_still_be_at_work(tmp_path):
    """As after a full disk in a notebook: the folder comes back while it is removed, and then stays
    away.
    """
    half = tmp_path / "1.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    stop = time.monotonic() + 1.0

    def write():
        number = 0
        while time.monotonic() < stop:
            half.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed in between
                (half / f"{(number := number + 1)}").write_text("x")

    writer = threading.Thread(target=write)
    writer.start()
    with Checkpoints(tmp_path) as checkpoints:
        keep(checkpoints, 1, wait=True)
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(
        checkpoints._checkpointer, "close", lambda: (_ for _ in ()).throw(ValueError("disk"))
    )
    with pytest.raises(ZeroDivisionError), checkpoints:
        1 / 0
    checkpoints._failed = False
    with pytest.raises(CheckpointError, match="disk"), checkpoints:
        pass


# --- other machines, and death --------------------------------------------------------------------


def test_saved_on_eight_devices_restored_on_four(tmp_path):
    code = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from opsd_jax.runtime import checkpoint
        count = int(sys.argv[2])
        assert jax.device_count() == count
        value = {"w": np.arange(16 * 24, dtype=np.float32).reshape(16, 24),
                 "b": (np.arange(24) * 0.5).astype(jnp.bfloat16), "step": np.int32(9)}
        if count == 8:
            mesh = Mesh(np.array(jax.devices()), ("fsdp",))
            specs = {"w": P("fsdp"), "b": P("fsdp"), "step": P()}
        else:
            mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
            specs = {"w": P("y", "x"), "b": P(), "step": P()}
        shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
        state = jax.device_put(value, shardings)
        if count == 8:
            checkpoint.save(sys.argv[1], state, {"w": state["w"]})
        else:
            shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            loaded = checkpoint.restore(sys.argv[1], jax.tree.map(shape, state))
            params = checkpoint.restore_params(sys.argv[1], {"w": shape(state["w"])})
            for found in (loaded, params):
                print(all(found[key].sharding == shardings[key] for key in found),
                      all((np.asarray(found[key]) == value[key]).all() for key in found))
    """
    for count in (8, 4):
        flags = {"XLA_FLAGS": xla_flags.devices(count)}
        out = finish(child(code, tmp_path / "c", count, env=flags))
    assert out.split() == ["True"] * 4


@pytest.mark.slow
def test_kill_9_while_saving_loses_nothing_complete(tmp_path):
    """A run of 100 MB saves is killed in the middle of one, three times; each start finds exact
    weights.
    """
    code = """
        import sys
        import jax, jax.numpy as jnp
        from opsd_jax.runtime.checkpoint import Checkpoints
        size = 25 * 2**20 // 3
        weights = jax.jit(lambda step: jnp.arange(size, dtype=jnp.float32) % 1000 + step)
        def make(step):
            return {"params": weights(step), "ema": weights(step + 1), "opt": weights(step + 2),
                    "step": jnp.int32(step)}
        with Checkpoints(sys.argv[1]) as checkpoints:
            step = checkpoints.latest() or 0
            if step:
                state = checkpoints.restore(step, jax.eval_shape(make, 0))
                same = jax.tree.map(lambda a, b: bool((a == b).all()), state, make(step))
                assert jax.tree.all(same)
                assert checkpoints.metadata(step)["step"] == step
            print("restored", step, flush=True)
            while True:
                step += 1
                state = make(step)
                checkpoints.save(step, state, state["ema"], stage="opsd", config={})
                checkpoints.wait()
                print("saved", step, flush=True)
    """
    last, killed_midway, deadline = 0, 0, time.monotonic() + 300
    for delay in (0.0, 0.05, 0.15, None):
        process = child(code, tmp_path)
        try:
            word, step = process.stdout.readline().split() or pytest.fail(
                process.stderr.read()[-3000:]
            )
            assert word == "restored" and int(step) >= last, (word, step, last)
            last = int(step)
            if delay is None:
                break
            last = int(process.stdout.readline().split()[1])  # one more is complete
            half = tmp_path / f"{last + 1}.orbax-checkpoint-tmp"
            while not half.exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            process.kill()
            process.communicate()
        killed_midway += half.exists()
    assert killed_midway >= 1 and last >= 3


# ---------------------------------------------------------------------------- being asked to stop


def test_sigterm_and_ctrl_c_set_a_flag_and_the_second_ctrl_c_aborts():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with stopping.install_sigterm() as flag:
            assert not flag.is_set and not flag.reached()
            os.kill(os.getpid(), number)
            assert flag.is_set and flag.reached()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_the_message_at_a_signal_says_what_happens_now(caplog):
    with stopping.install_sigterm() as flag:
        flag.check()
        for number, promise, end in (
            (signal.SIGTERM, "saving after this step, then stopping", ""),
            (signal.SIGINT, "step 7 is saved; stopping", " (again to abort at once)"),
        ):
            flag.is_set, flag.promise = False, promise
            signal.raise_signal(number)
            assert caplog.messages[-1] == f"{number.name}: {promise}{end}"
        with pytest.raises(SystemExit) as stopped:
            flag.check()
    assert stopped.value.code == 42 and isinstance(stopped.value, stopping.Stopped)


def test_a_command_that_is_stopped_says_how_it_goes_on(capsys):
    with (
        pytest.raises(stopping.Stopped),
        stopping.stoppable("the same command continues") as stop,
    ):
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        stop.check()
    assert capsys.readouterr().err.endswith("stopped as asked; the same command continues\n")


def test_outside_of_the_main_thread_there_is_a_warning(caplog):
    import threading

    flags = []
    with caplog.at_level("WARNING"):
        thread = threading.Thread(target=lambda: flags.append(stopping.install_sigterm()))
        thread.start()
        thread.join()
    assert not flags[0].is_set and "not in the main thread" in caplog.text


def test_only_the_flag_asks_whether_to_stop(tmp_path, monkeypatch):
    """The processes of a run agree on the number of a question after a signal. A question of Orbax,
    which counts steps, would be taken for one of the loop's, and a run of several processes would
    not stop.
    """
    asked = []
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda n: asked.append(n) or False,
    )
    x = {"w": np.arange(4.0, dtype=np.float32)}
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, x, x, stage="opsd", config={})
    assert checkpoints.latest() == 2 and not asked
