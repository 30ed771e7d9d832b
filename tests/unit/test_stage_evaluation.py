"""run.stage_evaluation: what is evaluated while a stage trains."""

import contextlib
import types

import pytest

from opsd_jax import config as config_lib
from opsd_jax.evaluation import contexts
from opsd_jax.run import stage_evaluation


@pytest.mark.parametrize(
    "visual_thoughts, mode", [("real", "real"), ("noise", "noise"), ("none", "remove")]
)
def test_an_ema_teacher_is_evaluated_in_its_own_context(monkeypatch, visual_thoughts, mode):
    """`none` is another thing for a teacher, its texts alone, than as a mode, the student's."""
    config = config_lib.default()
    config.teacher.visual_thoughts = visual_thoughts
    asked, logged = [], {}

    def evaluate(params, selection, mode, **options):
        asked.append((params, mode))
        result = types.SimpleNamespace(name="T", hits=1, predictions=[{}, {}])
        return [result]

    monkeypatch.setattr(contexts, "answer_all", evaluate)
    monkeypatch.setattr(stage_evaluation, "moving_teacher", lambda stage, state: "teacher")
    found = object.__new__(stage_evaluation.Evaluation)
    found.run = types.SimpleNamespace(
        config=config,
        clock=lambda name: contextlib.nullcontext(),
        writer=types.SimpleNamespace(scalars=lambda step, stage, values: logged.update(values)),
        evaluation_sampling=lambda: None,
        for_sampling=lambda params: params,
        packer=None,
        mesh=None,
        sampling_mesh=None,
    )
    found.stage, found._examples = types.SimpleNamespace(name="opsd"), {"validation": None}
    found._stop = types.SimpleNamespace(promise="", check=lambda: None)
    health = types.SimpleNamespace(check=lambda step, scores: None)
    found.during(7, {"params": "student"}, health)
    assert asked == [("student", "none"), ("teacher", mode)]
    assert logged == {"eval/T/none": 0.5, "eval/T/teacher": 0.5}
    assert contexts.replacement(mode) == visual_thoughts


@pytest.mark.parametrize(
    "before, after, closure", [(0.5, 0.2, 0.6), (0.5, 0.6, -0.2), (1e-9, 5e-3, None), (0, 0, None)]
)
def test_a_closure_of_rounding_errors_is_none(tmp_path, monkeypatch, before, after, closure):
    """A teacher that says what the student says: the quotient would be any number."""
    config = config_lib.default()
    config.eval.final_split = "test"
    found = object.__new__(stage_evaluation.Evaluation)
    found.run = types.SimpleNamespace(
        config=config,
        workdir=str(tmp_path),
        model=None,
        results_folder=lambda step, name: str(tmp_path / name),
    )
    found.stage = types.SimpleNamespace(name="opsd", last=7)
    found._stop = types.SimpleNamespace(check=lambda: None)
    values = {"start": before, "end": after}
    monkeypatch.setattr(stage_evaluation.saves, "origin", lambda *_: "W/0")
    monkeypatch.setattr(stage_evaluation.start_lib, "read", lambda *_: "start")
    monkeypatch.setattr(found, "_select", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(
        stage_evaluation.reference_kl,
        "reference_kl",
        lambda start, student, *_, **__: {"T": {"kl": values[student], "n": 3}},
    )
    (of_task,) = found._closure("end").values()
    assert of_task["closure"] == (None if closure is None else pytest.approx(closure))
    scores = stage_evaluation._kl_scores({"T": of_task})
    assert ("kl/T/closure" in scores) == (closure is not None)
    assert scores["kl/T/after"] == after and None not in scores.values()
