"""What the table of a run says in words."""

import small_run
from opsd_jax.run import report_table

TASK = "Dots"


def scores(share, low=0.0, **more):
    return {TASK: {"overall": share, "interval_95": [low, 1.0], "n": 500, **more}}


def verdict(*, teacher, trained, arms=()):
    shown = {
        report_table.TEACHER: teacher,
        report_table.TRAINED: trained,
        **{report_table.arm_label(arm): scores(0.2) for arm in arms},
        report_table.BASELINE: {TASK: {"overall": 0.3, "n": 500, "answer": "red"}},
    }
    config = small_run.config(opsd__steps=300)
    text = "\n".join(report_table.verdict(shown, arms, config))
    return text, report_table.in_terminal(shown, arms, config)


def test_a_teacher_above_the_most_frequent_answer_is_not_cautioned():
    text, shown = verdict(teacher=scores(0.9, 0.85), trained=scores(0.8))
    assert (
        "The most frequent answer, `red`, given to every question would be right in 30.0 %" in text
    )
    assert "**Dots**" in text and text.count("**") == 2  # nothing else is bold
    assert "**" not in shown and "`" not in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "always the most frequent answer Dots 30.0 %" in rows


def test_a_teacher_no_better_than_the_most_frequent_answer_has_little_to_teach():
    text, _ = verdict(teacher=scores(0.35, 0.29), trained=scores(0.3))
    assert text.startswith("**The teacher is not clearly better than the most frequent answer: it")


def test_one_answer_to_every_question_is_named():
    same = {"most_given": {"answer": "red", "share": 0.97}}
    differs = {"most_given": {"answer": "red", "share": 0.6}}
    text, _ = verdict(teacher=scores(0.9, 0.85, **differs), trained=scores(0.3, **same))
    assert "same answer to nearly all questions: OPSD, text only, `red` to 97 % of them." in text
    none = {"most_given": {"answer": None, "share": 1.0}}
    text, _ = verdict(teacher=scores(0.0, **none), trained=scores(0.0, **none))
    teacher = "teacher: start, with true visual thoughts, 100 % of them"
    assert f"No answer was found in nearly all texts of: {teacher}; OPSD, text" in text
    assert "same answer" not in text


def test_the_best_control_is_named():
    text, _ = verdict(teacher=scores(0.9, 0.85), trained=scores(0.8), arms=("noise", "image"))
    line = "Control arms: noise 20.0 %, image 20.0 %. OPSD is 60.0 points above the best control"
    assert f"\n{line} (noise)." in text


def test_the_arm_none_is_not_the_evaluation_mode_none():
    text, _ = verdict(teacher=scores(0.9, 0.85), trained=scores(0.8), arms=("none",))
    assert "the arm none sees its texts without any image, which is the evaluation mode" in text
