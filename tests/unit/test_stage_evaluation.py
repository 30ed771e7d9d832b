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
