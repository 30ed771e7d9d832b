"""opsd_jax/run/screening.py: which training examples are kept, the file, and a run that screens."""

import dataclasses
import functools
import io
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import small_run
import tiny
from opsd_jax import config as config_lib
from opsd_jax import config_check, context, distill, sharding, tokenizer, train
from opsd_jax.data import batches as batches_lib
from opsd_jax.data import packing, procedural
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.prepare import prepare
from opsd_jax.model import bagel
from opsd_jax.run import report_table, run_page, screening, session, stage_table
from opsd_jax.run import scores as scores_lib
from opsd_jax.runtime import files
from opsd_jax.runtime.stopping import Stopped

TASK, MAZE = small_run.TASK, "Spatial_Navigation"
EXAMPLES = 20  # of each task

pytestmark = pytest.mark.usefixtures("fast_compiles", "own_programs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    procedural.make_procedural(str(made), config(made).data.make.to_dict())
    return made


def config(folder, **changes):
    """Two tasks; mazes and charts take different buckets."""
    return small_run.two_tasks(
        folder,
        **dict(
            data__make__train=EXAMPLES,
            data__screen__on=True,
            stages=("opsd",),
            opsd__batch_size=12,
            opsd__accumulation=2,
        )
        | changes,
    )


class Opened:
    """What `kept_rows` wants, for a config."""

    def __init__(self, config, workdir, params=None):
        self.config, self.workdir = config, workdir
        tok = tokenizer.load(workdir_lib.tokenizer_folder(config.tokenizer, config.data.dir))
        packer = packing.Packer.from_config(config, tok)
        self.run = session.Session(
            config=config,
            workdir=str(workdir),
            data_dir=config.data.dir,
            model=config_lib.model(config),
            mesh=sharding.make_mesh(devices=jax.devices()[:1]),
            sampling_mesh=None,
            tokenizer=tok,
            marker=None,
            packer=packer,
            clock=None,
            writer=None,
            profile=None,
        )
        name = config.stages[0]
        self.stage = types.SimpleNamespace(
            name=name,
            first=0,
            config=types.SimpleNamespace(accumulation=config[name].accumulation),
            batches=config_lib.batches(config, name),
        )
        self.examples = self.run.examples("train")
        self.batches = batches_lib.Batches(self.stage.batches, str(workdir), self.examples, packer)
        self.params = params if params is not None else {"llm": {"head": jnp.ones((2, 3))}}

    def kept(self, **changes):
        given = {"params": self.params} | changes
        params = given.pop("params")
        return screening.kept_rows(self.run, self.stage, self.batches, params, **given)

    @property
    def record(self):
        return json.loads((self.workdir / "screen.json").read_text())


def label_gain(labels, mask):
    """In the place of a model: some number between -3 and 3 of a trace."""
    return (labels * mask).sum(1) % 7 - 3.0


@pytest.fixture
def asked(monkeypatch):
    """Replaces the model; the list of the batches' sizes that were asked for."""
    found = []

    def gain(params, batch, completion, *, config, chunk):
        found.append(completion.mask.shape[0])
        assert batch.student.padded_length < batch.teacher.padded_length
        return label_gain(completion.labels, completion.mask)

    monkeypatch.setattr(distill, "log_prob_gain", gain)
    return found


def expected_gains(opened):
    """{task: gains}, of each example's text trace."""
    found = {}
    for source, task in enumerate(opened.examples.tasks):
        gains = []
        for n in range(len(opened.examples.sources[source])):
            ids = opened.run.packer.reference(opened.examples(source, n))
            gains.append(label_gain(np.array([[*ids, opened.run.tokenizer.eos]]), True)[0])
        found[task] = np.array(gains)
    return found


# --- the gains -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def logits_of(params, traces, model):
    """At all targets, [B, R, V]."""
    hidden, _ = bagel.read(params, traces.context, config=model)
    return bagel.logits(params, jnp.take_along_axis(hidden, traces.positions[..., None], axis=1))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.slow
def test_gains_are_those_of_single_examples(folder, tmp_path):
    """Against NumPy in float64, with the trace packed into one context as SFT does."""
    c = config(folder)
    opened = Opened(c, tmp_path, params=tiny.params(config_lib.model(c)))
    kept = opened.kept()
    packer, model = opened.run.packer, config_lib.model(c)
    for source, task in enumerate(opened.examples.tasks):
        found = opened.record["gains"][task]
        for n in (0, 7, 19):
            row, means = opened.examples(source, n), []
            for layout in ("reference", "text"):  # with the visual thoughts, and without
                traces = packer.traces([row], [layout])
                logits, real = logits_of(opened.params, traces, model)[0], traces.mask[0]
                labels = traces.labels[0][real]
                means.append(log_softmax(logits[real])[np.arange(len(labels)), labels].mean())
            assert found["pid"][n] == row.example.pid
            np.testing.assert_allclose(found["gain"][n], means[0] - means[1], rtol=1e-3, atol=1e-5)
            assert kept[source][n] == (means[0] >= means[1])
        assert np.ptp(found["gain"]) > 0.01  # the images change what this model says


def test_an_example_without_a_trace_is_judged_by_its_answer(folder, tmp_path):
    opened = Opened(config(folder), tmp_path)
    row, packer = opened.examples(0, 3), opened.run.packer
    bare = dataclasses.replace(
        row, example=dataclasses.replace(row.example, full_text_only_thought=" ")
    )
    tokens, mask = packer.references_or_answers([row, bare], 0)
    assert tokens.shape == mask.shape == (2, packer.buckets.trace[0][2])
    decode = opened.run.tokenizer.decode
    whole, answer = (decode(ids[used].tolist()) for ids, used in zip(tokens, mask))
    assert whole.endswith(answer) and "<think>" in whole
    assert answer == f"<answer>{row.example.answer}</answer>"
    with pytest.raises(context.TooLongError, match="screen.on to False"):
        small = dataclasses.replace(packer.buckets, trace=((87, 32, 2), (90, 50, 2)))
        dataclasses.replace(packer, buckets=small).references_or_answers([row], 0)


# --- what is kept --------------------------------------------------------------------------------


def test_what_is_kept_and_what_batches_are_made_of_it(folder, tmp_path, asked):
    opened = Opened(config(folder, data__screen__margin=-1.0), tmp_path)
    gains = expected_gains(opened)
    kept = opened.kept()
    assert asked == [6] * 8  # 20 examples of each of two buckets, in batches of a micro step
    for one, (task, expected) in zip(kept, gains.items()):
        np.testing.assert_array_equal(one, expected >= -1)
        assert opened.record["gains"][task]["gain"] == expected.tolist()
        counts = opened.record["tasks"][task]
        assert counts == {
            "examples": EXAMPLES,
            "kept": (expected >= -1).sum(),
            "left_out": (expected < -1).sum(),
            "too_long": 0,
            "mean_gain_kept": pytest.approx(expected[expected >= -1].mean()),
            "mean_gain_left_out": pytest.approx(expected[expected < -1].mean()),
        }
        assert counts["kept"] and counts["left_out"]
    assert opened.record["complete"] and opened.record["margin"] == -1

    some = opened.batches.only(kept)
    total = sum(one.sum() for one in kept)
    visits = [np.zeros(EXAMPLES, int), np.zeros(EXAMPLES, int)]
    for step in range(10):
        for source, n in some.schedule(step)[1]:
            visits[source][n] += 1
    assert sum(v.sum() for v in visits) == 120
    for one, of_task in zip(kept, visits):
        assert not of_task[~one].any()
        assert set(of_task[one]) <= {120 // total, 120 // total + 1, 120 // total + 2}
    # Batches of all examples are as before.
    whole = Opened(config(folder, data__screen__on=False), tmp_path)
    for step in range(4):
        assert opened.batches.schedule(step) == whole.batches.schedule(step)


def test_an_example_that_fits_no_bucket_is_not_measured(folder, tmp_path, asked):
    c = config(folder, data__on_too_long="skip", data__screen__margin=-3.0)
    c.data.buckets.trace = ((87, 32, 26), (90, 50, 26))  # long paths have more targets
    opened = Opened(c, tmp_path)
    long = [np.asarray(buckets < 0) for buckets in opened.batches.buckets]
    assert 0 < sum(x.sum() for x in long) < 2 * EXAMPLES
    kept = opened.kept()
    for task, one, too_long in zip(opened.examples.tasks, kept, long):
        np.testing.assert_array_equal(one, ~too_long)
        assert opened.record["tasks"][task]["too_long"] == too_long.sum()
        is_null = [gain is None for gain in opened.record["gains"][task]["gain"]]
        np.testing.assert_array_equal(is_null, too_long)


def test_too_few_examples_end_the_run_with_a_margin_that_helps(folder, tmp_path, asked):
    opened = Opened(config(folder, data__screen__margin=2.5), tmp_path)
    gains = np.concatenate(list(expected_gains(opened).values()))
    count, at_most = (gains >= 2.5).sum(), np.sort(gains)[-12]
    assert 0 < count < 12
    message = (
        rf"keeps {count} of 40 training examples, fewer than the 12 of a batch, with a margin of "
        rf"2.5 .*screen.json has the gain.*screen.margin \({at_most:g} keeps 12\)"
    )
    with pytest.raises(ValueError, match=message) as error:
        opened.kept()
    assert "--workdir" not in str(error.value)  # it has trained nothing
    asked.clear()
    lower = Opened(config(folder, data__screen__margin=float(at_most)), tmp_path)
    assert sum(one.sum() for one in lower.kept()) >= 12 and not asked

    opened.stage.first = 350  # after a warm-up
    with pytest.raises(ValueError, match=r"init_from=.* --config.stages=\"\('opsd',\)\""):
        opened.kept()
    # A batch holds the completions of fewer questions.
    several = Opened(config(folder, data__screen__margin=2.5, opsd__completions=12), tmp_path)
    several.kept()


def test_a_task_of_which_nothing_is_kept_is_named(folder, tmp_path, monkeypatch):
    def gain(params, batch, completion, **_):  # by the bucket: mazes are the smaller images
        is_maze = batch.student.padded_length == 25
        return jnp.full(completion.mask.shape[0], -1.0 if is_maze else 1.0)

    monkeypatch.setattr(distill, "log_prob_gain", gain)
    with pytest.raises(
        ValueError,
        match=rf"none of the 20 training examples of {MAZE}.* \(-1 keeps 1\), or take that task",
    ):
        Opened(config(folder), tmp_path).kept()


def test_a_gain_that_is_not_finite_is_named(folder, tmp_path, monkeypatch):
    def gain(params, batch, completion, **_):
        return jnp.where(jnp.arange(completion.mask.shape[0]) == 1, jnp.nan, 0.0)

    monkeypatch.setattr(distill, "log_prob_gain", gain)
    opened = Opened(config(folder), tmp_path)
    pids = {example.pid for source in opened.examples.sources for example in source}
    with pytest.raises(FloatingPointError, match="not finite") as error:
        opened.kept()
    assert str(error.value).split("example ")[1].split(" is")[0] in pids


# --- the file ------------------------------------------------------------------------------------


def test_a_stop_loses_no_gain(folder, tmp_path, asked):
    whole = Opened(config(folder), tmp_path / "whole")
    expected = whole.kept()
    asked.clear()
    cut, left = Opened(config(folder), tmp_path / "cut"), [1, 2, 3]

    def stop_after_three():
        if not left:
            raise Stopped
        left.pop()

    with pytest.raises(Stopped):
        cut.kept(before_batch=stop_after_three)
    assert len(asked) == 3 and not cut.record["complete"] and cut.record["tasks"] == {}
    assert sum(g is not None for x in cut.record["gains"].values() for g in x["gain"]) == 18
    asked.clear()
    np.testing.assert_array_equal(Opened(config(folder), tmp_path / "cut").kept(), expected)
    assert len(asked) == 1 + 4  # 2 examples of the first task, 20 of the other
    assert cut.record == whole.record


def test_a_kill_loses_few_gains(folder, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(screening, "UNSAVED", 12)
    written = []
    monkeypatch.setattr(
        files, "write_json", lambda path, record: written.append(json.dumps(record))
    )
    Opened(config(folder), tmp_path).kept()
    measured = [
        sum(g is not None for x in json.loads(text)["gains"].values() for g in x["gain"])
        for text in written
    ]
    assert measured == [12, 26, 38, 40]  # batches of 6, and one of 2 at the end of each task


def test_a_continued_stage_reads_the_file_or_measures_with_the_start(
    folder, tmp_path, asked, monkeypatch
):
    opened = Opened(config(folder), tmp_path)
    expected, record = opened.kept(), opened.record
    asked.clear()
    time = (tmp_path / "screen.json").stat().st_mtime_ns
    np.testing.assert_array_equal(opened.kept(params=None), expected)
    assert not asked and (tmp_path / "screen.json").stat().st_mtime_ns == time

    read = []
    monkeypatch.setattr(
        screening.start, "read", lambda run, source: read.append(source) or opened.params
    )
    (tmp_path / "screen.json").unlink()
    np.testing.assert_array_equal(opened.kept(params=None), expected)
    assert asked and read == [str(tmp_path / "checkpoints" / "0")] and opened.record == record


def test_an_arm_keeps_what_its_run_kept(folder, tmp_path, asked):
    run = Opened(config(folder), tmp_path)
    expected = run.kept()
    asked.clear()
    for name, changes in {
        "noise": {"teacher__visual_thoughts": "noise"},
        "sft": {"stages": ("sft",), "sft__batch_size": 12, "sft__accumulation": 1},
        "wider": {"data__screen__margin": -2.0},
    }.items():
        arm = Opened(config(folder, **changes), tmp_path / "arms" / name)
        kept = arm.kept()
        assert not asked, name
        assert arm.record["gains"] == run.record["gains"]
        assert arm.record["facts"] == run.record["facts"]
        same = all(np.array_equal(a, b) for a, b in zip(kept, expected))
        assert same == (name != "wider")


def test_other_weights_or_contexts_are_measured_again(folder, tmp_path, asked, caplog):
    Opened(config(folder), tmp_path).kept()
    others = {
        "weights": Opened(
            config(folder), tmp_path / "arms" / "a", {"llm": {"head": jnp.zeros((2, 3))}}
        ),
        "intro": Opened(config(folder, prompts__intro="look"), tmp_path / "arms" / "b"),
    }
    for name, other in others.items():
        asked.clear()
        other.kept()
        assert len(asked) == 8, name
    # The stage after the first one trains on the same examples, with other weights by then.
    c = config(folder, stages=("sft", "offline"), sft__batch_size=12)
    both = Opened(c, tmp_path / "c")
    both.kept()
    asked.clear()
    both.stage.name = "offline"
    both.kept(params={"llm": {"head": jnp.zeros((2, 3))}})
    assert not asked


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("gains"),
        lambda record: record.update(facts=3),
        lambda record: record["gains"][TASK]["gain"].pop(),
        lambda record: record["gains"][TASK].update(gain=["x"] * EXAMPLES),
    ],
)
def test_a_damaged_file_is_named(folder, tmp_path, asked, change):
    opened = Opened(config(folder), tmp_path)
    opened.kept()
    record = opened.record
    change(record)
    (tmp_path / "screen.json").write_text(json.dumps(record))
    if record["facts"] == 3:  # of something else: measured again
        opened.kept()
        assert opened.record["complete"] and opened.record["facts"] != 3
        return
    with pytest.raises(ValueError, match="screen.json is damaged.*delete it"):
        opened.kept()


def test_processes_agree(folder, tmp_path, asked, monkeypatch):
    """The first process reads and writes; another one has what it broadcasts."""
    opened = Opened(config(folder), tmp_path)
    expected = opened.kept()
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        screening.multihost_utils,
        "broadcast_one_to_all",
        lambda values: said.append(jax.tree.map(np.array, values)) or said[0],
    )
    asked.clear()
    np.testing.assert_array_equal(opened.kept(), expected)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    other = Opened(config(folder), tmp_path / "elsewhere")
    np.testing.assert_array_equal(other.kept(), expected)
    assert np.isnan(said[1][0]).all() and not said[1][1]  # it read nothing itself
    assert not asked and not (tmp_path / "elsewhere" / "screen.json").exists()


# --- settings and reports ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": ("warmup",)}, r"stages opsd, sft and offline, and config.stages is"),
        (
            {"teacher__blocks": ("image", "question"), "student__blocks": ("image", "question")},
            "student has all blocks of the teacher",
        ),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    config_check.check(small_run.config(data__screen__on=True))
    config_check.check(small_run.config(**changes))
    with pytest.raises(ValueError, match=message):
        config_check.check(small_run.config(data__screen__on=True, **changes))


def test_which_stages_are_screened():
    for stages, expected in {
        ("warmup", "opsd"): ("opsd",),
        ("sft", "opsd", "offline"): ("opsd",),
        ("warmup", "sft", "offline"): ("sft", "offline"),
        ("warmup",): (),
    }.items():
        c = small_run.config(stages=stages)
        assert config_lib.screened_stages(c) == ()
        c.data.screen.on = True
        assert config_lib.screened_stages(c) == expected


def test_reports_say_what_was_left_out(tmp_path):
    def write(folder, kept, **changes):
        c = small_run.config(data__screen__on=True, **changes)
        counts = {"examples": 1000, "kept": kept, "left_out": 999 - kept, "too_long": 1}
        means = {"mean_gain_kept": 0.25, "mean_gain_left_out": -0.125}
        files.write_json(folder / "config.json", config_lib.to_json(c))
        record = {"complete": True, "margin": 0.01, "tasks": {TASK: counts | means}}
        files.write_json(folder / "screen.json", record)

    write(tmp_path, 600)
    write(tmp_path / "arms" / "noise", 600)
    write(tmp_path / "arms" / "other", 700)
    files.write_json(
        tmp_path / "arms" / "off" / "config.json", config_lib.to_json(small_run.config())
    )
    arms = ("noise", "other", "off")
    expected = (
        f"Screening kept 600 of 1,000 examples of {TASK}; the gain of 399 is below the margin of "
        "0.01 nats per token; 1 fit no bucket."
    )
    assert screening.lines(tmp_path, arms) == [
        expected,
        f"arm other: {expected.replace('600', '700').replace('399', '299')}",
    ]
    row = {"overall": 0.5, "n": 10, "interval_95": (0.2, 0.8), "mean_output_tokens": 3.0}
    shown = {scores_lib.TRAINED: {TASK: row}}
    assert f"- {expected}" in report_table.write(str(tmp_path), shown, ()).splitlines()
    page = "".join(run_page._screening(str(tmp_path), arms))
    assert "600" in page and "arm other" in page and "−0.1250" in page and "arm off" not in page


# --- a run ---------------------------------------------------------------------------------------


COLOURS = ("red", "green", "blue")


def write_colours(folder):
    """A grey problem image; the visual thought shows the answer in every other row, else grey."""
    (folder / "images").mkdir(parents=True)
    for colour in (*COLOURS, "gray"):
        data = io.BytesIO()
        Image.new("RGB", (40, 40), colour).save(data, "PNG")
        (folder / "images" / f"{colour}.png").write_bytes(data.getvalue())
    for split, count in (("train", 48), ("test", 12)):
        lines = []
        for n in range(count):
            answer = COLOURS[n // 2 % 3]
            shown = answer if n % 2 else "gray"
            lines.append(
                {
                    "pid": f"{split}-{n}-{'useful' if n % 2 else 'useless'}",
                    "question": "?",
                    "answer": answer,
                    "image": "images/gray.png",
                    "thoughts": ["look", answer],
                    "visual_thoughts": [f"images/{shown}.png"],
                    "text_trace": answer,
                }
            )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)


def of_run(folder, prepared, **changes):
    """A warm-up that learns to read the visual thoughts, and three steps of OPSD."""
    c = small_run.config(
        **dict(
            data__dir=str(prepared),
            data__tasks=("Colours",),
            data__screen__on=True,
            data__screen__margin=0.1,
            tokenizer=str(folder / "made" / "tokenizer"),
            images__max_size=16,  # 4 patches
            images__min_size=16,
            warmup__steps=60,
            warmup__batch_size=24,
            warmup__mix__interleaved=0,
            opsd__steps=3,
            checkpoint__every=1000,
            log__every=20,
            log__samples_every=0,
            eval__final_split="",
        )
        | changes
    )
    c.data.buckets.update(student=((9, 4),), teacher=((22, 8),), trace=((30, 8, 13),))
    return c


@pytest.mark.slow
def test_a_run_leaves_out_what_does_not_help(folder, tmp_path, monkeypatch):
    """Half of the visual thoughts show nothing; the trained model tells which."""
    write_colours(tmp_path / "source" / "Colours")
    prepare(tmp_path / "source", tmp_path / "prepared")
    c, w = of_run(folder, tmp_path / "prepared"), tmp_path / "w"
    used, measured = [], []

    def opsd(batches, step):
        found = batches_lib.Batches.opsd(batches, step)
        used.append((step, [row.example.pid for row in found[1]]))
        return found

    def gain(*arguments, of=distill.log_prob_gain, **named):
        measured.append(1)
        return of(*arguments, **named)

    kind = dataclasses.replace(stage_table.KINDS["opsd"], load=opsd)
    monkeypatch.setitem(stage_table.KINDS, "opsd", kind)
    monkeypatch.setattr(distill, "log_prob_gain", gain)
    train.train(c, str(w))
    record, whole = json.loads((w / "screen.json").read_text()), sorted(used)
    (found,) = record["gains"].values()
    for pid, one in zip(found["pid"], found["gain"]):
        assert (one >= 0.1) == pid.endswith("useful"), (pid, one)
    assert record["tasks"]["Colours"]["kept"] == 24 and len(measured) == 6
    assert [step for step, _ in whole] == [60, 61, 62]
    assert all(pid.endswith("useful") for _, pids in whole for pid in pids)

    # Continued from the end of the warm-up, and as an arm: the same examples, nothing measured.
    for path in (w / "checkpoints").glob("63*"):
        shutil.rmtree(path)
    used.clear()
    train.train(c, str(w))
    assert sorted(used) == whole and len(measured) == 6
    used.clear()
    arm = config_lib.arm(c, "image", str(w / "checkpoints" / "60"))
    train.train(arm, str(w / "arms" / "image"), data_workdir=str(w))
    assert len(measured) == 6 and used and all(pid.endswith("useful") for _, p in used for pid in p)
    of_arm = json.loads((w / "arms" / "image" / "screen.json").read_text())
    assert of_arm == record
    (line,) = screening.lines(str(w), ["image"])  # of both
    assert line.startswith("Screening kept 24 of 48 examples of Colours; the gain of 24 is below")
