"""opsd_jax/offline.py: the cached teacher: loss, files, and the stage that trains on them."""

import copy
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import config_check, context, distill, marker, offline, sharding, tokenizer, train
from opsd_jax.data import batches as batches_lib
from opsd_jax.data import packing, procedural
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.method_config import OfflineConfig
from opsd_jax.model import bagel
from opsd_jax.plan import programs
from opsd_jax.run import session, teacher_cache
from opsd_jax.runtime import checkpoint, clock, metrics

MAZE = "Spatial_Navigation"

pytestmark = pytest.mark.usefixtures("fast_compiles", "own_programs")


@functools.partial(jax.jit, static_argnames="model")
def logits_of(params, traces, model):
    """At all targets, [B, R, V]."""
    hidden, _ = bagel.read(params, traces.context, config=model)
    return bagel.logits(params, jnp.take_along_axis(hidden, traces.positions[..., None], axis=1))


# --- the loss -------------------------------------------------------------------------------------


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl_of(logits, log_probs, indices, temperature):
    """T^2 KL of each token, in float64: the teacher over its entries, the student over the
    vocabulary.
    """
    log_t = log_softmax(np.asarray(log_probs, np.float64) / temperature)
    log_s = np.take_along_axis(
        log_softmax(np.asarray(logits, np.float64) / temperature), np.asarray(indices), -1
    )
    return temperature**2 * (np.exp(log_t) * (log_t - log_s)).sum(-1)


def teacher_entries(rng, shape, vocabulary, k):
    """The k largest log-probabilities of random logits, and their indices."""
    log_probs = log_softmax(3 * rng.standard_normal((*shape, vocabulary)))
    indices = np.argsort(-log_probs, axis=-1)[..., :k]
    return np.take_along_axis(log_probs, indices, -1).astype(np.float16), indices.astype(np.int32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_that_of_numpy(temperature):
    rng = np.random.default_rng(0)
    log_probs, indices = teacher_entries(rng, (3, 5), 40, 7)
    logits = 2 * rng.standard_normal((3, 5, 40)).astype(np.float32)
    found = offline.cached_kl(logits, log_probs, indices, temperature)
    np.testing.assert_allclose(found, kl_of(logits, log_probs, indices, temperature), rtol=1e-5)
    gradient = jax.grad(lambda x: offline.cached_kl(x, log_probs, indices, temperature).sum())(
        logits
    )
    assert (
        np.abs(gradient) > 1e-6
    ).all()  # entries that were not kept, too: the student's softmax is over them


def test_a_student_equal_to_the_teacher_pays_for_its_mass_elsewhere():
    rng = np.random.default_rng(1)
    logits = 3 * rng.standard_normal((4, 40))
    order = np.argsort(-logits, axis=-1)[:, :6]
    log_probs = np.take_along_axis(log_softmax(logits), order, -1)
    mass = np.exp(np.take_along_axis(log_softmax(logits / 2), order, -1)).sum(-1)
    found = offline.cached_kl(logits.astype(np.float32), log_probs.astype(np.float32), order, 2.0)
    np.testing.assert_allclose(found, -4 * np.log(mass), rtol=1e-5)


def test_shares_are_weighted_means_of_rows():
    weights = np.array([[1, 3, 0, 9], [0, 0, 0, 5], [2, 2, 2, 2]], np.float16)
    used = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(
        offline.shares(weights, used),
        np.array([[0.25, 0.75, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]) / 3,
        rtol=1e-6,
    )


def small_batch(rng, count=4, targets=9, k=6):
    """Traces of random rows with a random teacher; row 2 without weights."""
    blocks, _ = tiny.rows(rng, count)
    lengths = rng.integers(2, targets, count)
    rows = [
        [*row, blocks_lib.Text(rng.integers(0, 256, n).astype(np.int32), loss=True)]
        for row, n in zip(blocks, lengths)
    ]
    traces = context.supervise(
        rows,
        context.Sizes(tiny.POSITIONS, tiny.PATCHES, targets),
        tokenizer=tiny.TOKENIZER,
        side=tiny.MODEL.vit.side,
    )
    log_probs, indices = teacher_entries(rng, (count, targets), tiny.MODEL.llm.vocab_size, k)
    weights = rng.exponential(size=(count, targets)).astype(np.float16)
    weights[2] = 0
    labels = np.where(traces.mask, traces.labels, -1)
    return offline.Cached(traces, labels, log_probs, indices, weights)


def updated(batch, **changes):
    own = {
        "reduction": "token",
        "chunk": 4,
        "weight": 0.7,
        "temperature": 2.0,
    }
    config = OfflineConfig(model=tiny.MODEL, **own | changes)
    state = jax.jit(lambda p: distill.init_state(p, config))(tiny.params())
    return sharding.update_program(offline.step, state, config)(state, batch)


@pytest.mark.slow
def test_step_is_cross_entropy_plus_weighted_kl():
    batch, params = small_batch(np.random.default_rng(2)), tiny.params()
    logits = np.asarray(logits_of(params, batch.traces, tiny.MODEL))
    mask, total = batch.traces.mask, []
    ce = -np.take_along_axis(log_softmax(logits), batch.traces.labels[..., None], -1)[..., 0][
        mask
    ].mean()
    for b in range(4):
        kl, w = (
            x[mask[b]]
            for x in (
                kl_of(logits[b], batch.log_probs[b], batch.indices[b], 2.0),
                batch.weights[b].astype(np.float64),
            )
        )
        total.append((w * kl).sum() / w.sum() if w.sum() else kl.mean())
    _, found = updated(batch)
    np.testing.assert_allclose(found["ce"], ce, rtol=1e-4)
    np.testing.assert_allclose(found["kl"], np.mean(total), rtol=1e-4)
    np.testing.assert_allclose(found["loss"], ce + 0.7 * np.mean(total), rtol=1e-4)
    assert found["cache_used"] == 1 and found["completion_len"] == mask.sum() / 4


@pytest.mark.long
def test_accumulation_changes_nothing():
    batch = small_batch(np.random.default_rng(3))
    whole, cut = (updated(batch, accumulation=count)[1] for count in (1, 2))
    for name in ("loss", "ce", "kl", "cache_used", "grad_norm", "accuracy"):
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_tokens_without_a_teacher_are_counted_and_have_no_kl():
    batch = small_batch(np.random.default_rng(4))
    lost = dataclasses.replace(batch, labels=np.full_like(batch.labels, -1))
    half = batch.labels.copy()
    half[:2] = -1
    found = updated(lost)[1]
    assert found["cache_used"] == 0 and found["kl"] == 0 and found["loss"] == found["ce"]
    share = batch.traces.mask[2:].sum() / batch.traces.mask.sum()
    np.testing.assert_allclose(
        updated(dataclasses.replace(batch, labels=half))[1]["cache_used"], share, rtol=1e-6
    )


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    procedural.make_procedural(str(made), config(made).data.make.to_dict())
    return made


def config(folder, **changes):
    """Two tasks; mazes and charts take different buckets."""
    return small_run.two_tasks(
        folder,
        **dict(stages=("offline",), offline__batch_size=4, offline__top_k=300) | changes,
    )


class Made:
    """What `collect` wants, for a config."""

    def __init__(self, config, workdir, seed=0):
        self.config, self.workdir = config, workdir
        self.tokenizer = tokenizer.load(
            workdir_lib.tokenizer_folder(config.tokenizer, config.data.dir)
        )
        self.packer, self.mesh = (
            packing.Packer.from_config(config, self.tokenizer),
            sharding.make_mesh(devices=jax.devices()[:1]),
        )
        self.rows = self.session(config).examples("train")
        self.params = tiny.params(config_lib.model(config), seed)

    def session(self, config):
        size = config.model.llm.vocab_size
        return session.Session(
            config=config,
            workdir=str(self.workdir),
            data_dir=config.data.dir,
            model=config_lib.model(config),
            mesh=self.mesh,
            sampling_mesh=self.mesh,
            tokenizer=self.tokenizer,
            marker=marker.Marker.build(self.tokenizer.token_bytes, size),
            packer=self.packer,
            clock=clock.Clock(),
            writer=metrics.Writer(self.workdir, primary=False),
            profile=None,
        )

    def collect(self, **changes):
        given = dict(params=self.params, config=self.config) | changes
        return teacher_cache.collect(
            self.session(given["config"]),
            given["params"],
            self.rows,
            before_batch=given.get("before_batch", lambda: None),
        )

    def batches(self, cache):
        """The schedule of the stage, and a function of a step that makes its batch."""
        made = batches_lib.Batches(
            config_lib.batches(self.config, "offline"), str(self.workdir), self.rows, self.packer
        )
        return made.schedule, lambda step: teacher_cache.batch(made, step, cache)


@pytest.fixture(scope="module")
def collected(folder, tmp_path_factory):
    """A whole cache of 16 rows a file; copy it to change it."""
    before, teacher_cache.SHARD = teacher_cache.SHARD, 16
    made = Made(config(folder), tmp_path_factory.mktemp("collected"))
    made.collect()
    yield made
    teacher_cache.SHARD = before


@pytest.fixture
def copied(collected, tmp_path):
    shutil.copytree(collected.workdir / "teacher_cache", tmp_path / "teacher_cache")
    made = Made(collected.config, tmp_path)
    made.rows = collected.rows
    return made


def files(made):
    return {path.name: path.read_bytes() for path in (made.workdir / "teacher_cache").iterdir()}


def test_cache_holds_the_teacher_and_the_weights(collected):
    cache = collected.collect()
    assert sorted(files(collected)) == [
        f"{task}-{first:07d}.npz" for task in (small_run.TASK, MAZE) for first in (0, 16)
    ] + ["key.json"]
    for source, task in enumerate(collected.config.data.tasks):
        for n in (0, 17, 19):
            row, logits = collected.rows(source, n), []
            for layout in ("reference", "text"):
                traces = collected.packer.traces([row], [layout])
                found = logits_of(collected.params, traces, config_lib.model(collected.config))
                logits.append(log_softmax(found[0][traces.mask[0]]))
            labels = traces.labels[0][traces.mask[0]]
            assert labels.tolist() == [*collected.packer.reference(row), collected.tokenizer.eos]
            found = cache(task, n, row.example.pid, labels)
            assert (
                found["log_probs"].shape == (len(labels), 300)
                and found["log_probs"].dtype == np.float16
            )
            with_vt, without = logits
            exact = -np.sort(-with_vt, axis=-1)[:, :300]
            np.testing.assert_allclose(found["log_probs"], exact, rtol=2e-3, atol=2e-4)
            np.testing.assert_allclose(
                np.take_along_axis(with_vt, found["indices"], -1), exact, atol=1e-4
            )
            kl = (np.exp(with_vt) * (with_vt - without)).sum(-1)
            assert kl.max() > 0.01  # the images change what this model says
            np.testing.assert_allclose(found["weight"], kl, rtol=2e-3, atol=1e-5)


def test_batches_hold_their_rows(collected):
    cache = collected.collect()
    _, load = collected.batches(cache)
    for step in range(6):
        batch, rows = load(step)
        assert batch.log_probs.shape == (4, 41, 300)
        np.testing.assert_array_equal(
            batch.labels, np.where(batch.traces.mask, batch.traces.labels, -1)
        )
        for b, row in enumerate(rows):
            task = small_run.TASK if "chart" in row.example.pid else MAZE
            n = next(
                n
                for n, e in enumerate(
                    collected.rows.sources[collected.config.data.tasks.index(task)]
                )
                if e.pid == row.example.pid
            )
            count = batch.traces.mask[b].sum()
            found = cache(task, n, row.example.pid, batch.labels[b][:count])
            np.testing.assert_array_equal(batch.log_probs[b][:count], found["log_probs"])
            np.testing.assert_array_equal(batch.indices[b][:count], found["indices"])
            np.testing.assert_array_equal(batch.weights[b][:count], found["weight"])


def test_the_plan_knows_the_batch(collected):
    """Shapes that `plan` compiles for are those of a run."""
    schedule, load = collected.batches(collected.collect())
    batch, _ = load(0)
    (program,) = programs.programs(
        collected.config, "offline", collected.mesh, bucket=schedule(0)[0]
    )

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)

    assert program.name == "update" and shapes(program.arguments["batch"]) == shapes(batch)


def test_more_files_than_may_be_open(collected, monkeypatch):
    monkeypatch.setattr(teacher_cache, "OPEN", 1)
    cache = collected.collect()
    _, load = collected.batches(cache)
    found = [load(step)[0].indices for step in range(6)]
    assert len(cache._open) == 1
    monkeypatch.setattr(teacher_cache, "OPEN", 256)
    _, again = collected.batches(collected.collect())
    for step, indices in enumerate(found):
        np.testing.assert_array_equal(indices, again(step)[0].indices)


def test_top_k_is_bounded_by_the_vocabulary(folder):
    c = config(folder, offline__top_k=100000)
    assert teacher_cache.kept_entries(c) == c.model.llm.vocab_size == 448


def test_what_is_there_stays_and_what_lacks_is_collected(copied, monkeypatch):
    whole, computed, run = files(copied), [], teacher_cache._outputs
    (copied.workdir / "teacher_cache" / f"{MAZE}-0000016.npz").unlink()
    times = {
        path.name: path.stat().st_mtime_ns for path in (copied.workdir / "teacher_cache").iterdir()
    }
    monkeypatch.setattr(teacher_cache, "_outputs", lambda *a: computed.append(a[3]) or run(*a))
    copied.collect()
    assert computed == [[16, 17, 18, 19]]
    assert all(
        (copied.workdir / "teacher_cache" / name).stat().st_mtime_ns == t
        for name, t in times.items()
    )
    found = {
        name: np.load(copied.workdir / "teacher_cache" / name)
        for name in whole
        if name.endswith("npz")
    }
    assert len(found) == 4
    name = f"{MAZE}-0000016.npz"
    before = copied.workdir / "before.npz"
    before.write_bytes(whole[name])
    for entry in (was := np.load(before)).files:
        np.testing.assert_array_equal(found[name][entry], was[entry])


def test_a_stop_and_a_failed_write_leave_whole_files(copied, monkeypatch):
    shutil.rmtree(copied.workdir / "teacher_cache")
    asked = iter(range(6))
    with pytest.raises(StopIteration):
        copied.collect(before_batch=lambda: next(asked))
    assert [name for name in sorted(files(copied)) if name.endswith(".npz")] == [
        f"{small_run.TASK}-0000000.npz",
        f"{small_run.TASK}-0000016.npz",
    ]

    def half(file, **_):
        file.write(b"PK")
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(np, "savez", half)
        copied.collect()
    assert f"{MAZE}-0000000.npz" not in files(copied)
    assert copied.collect() is not None and f"{MAZE}-0000000.npz" in files(copied)


def test_the_cache_of_another_teacher_or_setting_is_refused(copied):
    other = copied.params | {
        "llm": copied.params["llm"] | {"head": copied.params["llm"]["head"].at[3, 5].add(1e-6)}
    }
    message = r"(?s)another teacher.*teacher: there \w+, now \w+.*delete the folder"
    with pytest.raises(teacher_cache.WrongCacheError, match=message):
        copied.collect(params=other)
    changed = copy.deepcopy(copied.config)
    changed.offline.top_k, changed.prompts.intro = 200, "look"
    with pytest.raises(
        teacher_cache.WrongCacheError,
        match=r"(?s)prompts.intro: there .*, now look.*top_k: there 300, now 200",
    ):
        copied.collect(config=changed)
    changed = copy.deepcopy(copied.config)
    changed.offline.temperature = 1.0  # used when training alone
    assert copied.collect(config=changed).digest


def test_the_name_of_weights_is_theirs_alone():
    params = tiny.params()
    name = offline.fingerprint(params)
    assert (
        name == offline.fingerprint(tiny.copy(params)) != offline.fingerprint(tiny.params(seed=1))
    )
    kernel = params["llm"]["head"]
    for other in (kernel[::-1], kernel[:, ::-1], kernel.at[0, 0].multiply(1 + 1e-6)):
        assert offline.fingerprint(params | {"llm": params["llm"] | {"head": other}}) != name


def rewritten(path, change):
    shard = np.load(path)
    arrays = {name: shard[name] for name in shard.files}
    change(arrays)
    np.savez(path, **arrays)


def test_a_row_without_its_teacher_stops_the_run(copied):
    cache = copied.collect()
    row = copied.rows(1, 16)
    pid, labels = row.example.pid, [*copied.packer.reference(row), copied.tokenizer.eos]
    path = copied.workdir / "teacher_cache" / f"{MAZE}-0000016.npz"

    def fresh():
        return copied.collect()

    assert len(fresh()(MAZE, 16, pid, labels)) == len(labels)
    with pytest.raises(
        teacher_cache.WrongCacheError, match=f"another trace of example 16, pid {pid}"
    ):
        fresh()(MAZE, 16, pid, labels[::-1])
    with pytest.raises(
        teacher_cache.MissingTargetsError, match="example 16, pid other-pid, of Spatial_Navigation"
    ):
        fresh()(MAZE, 16, "other-pid", labels)
    rewritten(path, lambda arrays: arrays.pop(f"16:{pid}"))
    with pytest.raises(
        teacher_cache.MissingTargetsError,
        match=f"no teacher for example 16, pid {pid}, of {MAZE}.*collects it again",
    ):
        fresh()(MAZE, 16, pid, labels)
    _, load = copied.batches(fresh())
    with pytest.raises(teacher_cache.MissingTargetsError):
        for step in range(10):  # an epoch
            load(step)
    rewritten(path, lambda arrays: arrays.update(key="other"))
    with pytest.raises(teacher_cache.WrongCacheError, match="belongs to another cache"):
        fresh()(MAZE, 17, "any", labels)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="0000016.npz is damaged"):
        fresh()(MAZE, 17, "any", labels)
    path.unlink()
    with pytest.raises(teacher_cache.MissingTargetsError, match="is missing"):
        cache(MAZE, 16, pid, labels)


def test_half_precision_moves_the_loss_less_than_a_thousandth(collected):
    """Why float16 is enough: the loss against the same teacher in float32."""
    row = collected.rows(1, 3)
    teacher, student = (
        logits_of(
            collected.params,
            collected.packer.traces([row], [layout]),
            config_lib.model(collected.config),
        )
        for layout in ("reference", "text")
    )
    log_probs, indices = jax.lax.top_k(jax.nn.log_softmax(teacher), 256)
    exact, rounded = (
        offline.cached_kl(student, log_probs.astype(dtype), indices, 2.0)
        for dtype in (jnp.float32, jnp.float16)
    )
    np.testing.assert_allclose(rounded, exact, rtol=1e-3, atol=1e-4)


# --- the stage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"offline__top_k": 0}, r"config.offline.top_k is 0: give a whole number in \[1, inf\)"),
        (
            {"offline__temperature": 0.0},
            r"config.offline.temperature is 0.0: give a number in \[0.001, 1000\]",
        ),
        ({"offline__weight": -1.0}, r"config.offline.weight is -1.0: give a number in \[0, inf\)"),
        ({"teacher__visual_thoughts": "noise"}, "reads the true ones"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        config_check.check(
            small_run.config(stages=("offline",), offline__optim__warmup_steps=1, **changes)
        )


def test_another_stage_may_have_noise_in_the_teacher():
    config_check.check(small_run.config(stages=("opsd",), teacher__visual_thoughts="noise"))


def stage_config(**changes):
    return small_run.config(
        **dict(
            stages=("offline",),
            offline__steps=4,
            offline__batch_size=8,
            offline__accumulation=2,
            offline__optim__lr=3e-3,
            offline__optim__min_lr=3e-4,
            offline__optim__warmup_steps=1,
        )
        | changes
    )


def states(workdir, step):
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load_checkpointables(workdir / "checkpoints" / str(step), {"state": None})["state"]
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.long
@pytest.mark.slow
def test_a_run_and_its_continuation(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(stage_config(), str(whole))
    rows = [row for row in metrics.read(whole / "metrics.jsonl") if "loss" in row]
    assert [(row["step"], row["stage"]) for row in rows] == [(n, "offline") for n in range(1, 5)]
    for row in rows:
        assert row["cache_used"] == 1 and row["kl"] > 0 and row["compiles/update"] == 1
        assert row["loss"] == pytest.approx(row["ce"] + 0.5 * row["kl"], rel=1e-5)
        assert {"lr", "grad_norm", "accuracy", "completion_len", "tokens_per_sec"} <= row.keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name in ("none", "real", "kl"):
        assert (whole / "eval" / f"000004-{name}" / "summary.json").exists()
    kl = json.loads((whole / "eval" / "000004-kl" / "summary.json").read_text())
    assert (
        kl["start"].endswith("checkpoints/0")
        and kl["tasks"][small_run.TASK]["n"] == small_run.TEST_ROWS
    )

    # As if killed after step 2, with the cache lost as well: the teacher comes back from the start,
    # not from step 2.
    shutil.copytree(whole, cut)
    for step in (3, 4):
        shutil.rmtree(cut / "checkpoints" / str(step))
    shutil.rmtree(cut / "eval")
    shutil.rmtree(cut / "teacher_cache")
    sharding._update_program.cache_clear()
    train.train(stage_config(), str(cut))
    assert json.loads((cut / "teacher_cache" / "key.json").read_text()) == json.loads(
        (whole / "teacher_cache" / "key.json").read_text()
    )
    found, expected = states(cut, 4), states(whole, 4)
    assert found.keys() == expected.keys() and len(found) > 50
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)

    def losses(folder):
        return [row["loss"] for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]

    assert losses(cut) == losses(whole)


@pytest.mark.long
@pytest.mark.slow
def test_an_arm_after_a_warm_up(tmp_path_factory, tmp_path):
    """Its teacher is what the OPSD stage started from; without its KL it is the SFT arm."""
    from opsd_jax.run import controls

    workdir = tmp_path / "w"
    shutil.copytree(small_run.trained(tmp_path_factory), workdir)
    base = stage_config(
        stages=("warmup", "opsd"), sft__steps=4, sft__accumulation=2, eval__final_split=""
    )
    first = {}
    for name in ("offline", "sft"):
        own, folder = controls.settings_of(base, str(workdir), name)
        assert own.stages == (name,)
        train.train(own, folder, data_workdir=str(workdir))
        sharding._update_program.cache_clear()
        first[name] = next(row for row in metrics.read(f"{folder}/metrics.jsonl") if "loss" in row)
    assert first["offline"]["ce"] == pytest.approx(
        first["sft"]["ce"], rel=1e-6
    )  # the same rows, the same weights
    start = checkpoint.restore_params(
        workdir / "checkpoints" / str(small_run.WARMUP), small_run.abstract_params()
    )
    facts = json.loads((workdir / "arms" / "offline" / "teacher_cache" / "key.json").read_text())
    assert facts["teacher"] == offline.fingerprint(start)
