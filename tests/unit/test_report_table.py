"""What the table of a run says in words."""

import pytest

import small_run
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import report_table
from opsd_jax.run import scores as scores_lib

TASK, OTHER = "Dots", "Lines"


def scores(share, low=0.0, *, n=500, **more):
    return {TASK: {"overall": share, "interval_95": [low, 1.0], "n": n, **more}}


def table(*, teacher, trained, arms=(), start=None, arm=None):
    """A table; arm: the scores of each arm."""
    shown = {
        scores_lib.TEACHER: teacher,
        **({scores_lib.START: start} if start else {}),
        scores_lib.TRAINED: trained,
        **{scores_lib.arm_label(name): arm or scores(0.2) for name in arms},
        scores_lib.BASELINE: {
            task: {"overall": 0.3, "n": 500, "answer": "red"} for task in trained
        },
    }
    return shown, arms, small_run.config(opsd__steps=300)


def verdict(**given):
    said = table(**given)
    return "\n".join(report_table.verdict(*said)), report_table.in_terminal(*said)


def cautions(**given):
    return cautions_lib.cautions(*table(**given))


def test_a_good_run_is_not_cautioned():
    good = {
        "image_skip_rate": 0.0,
        "most_given": {"answer": "red", "share": 0.3},
        "common": {"given": ["red", "blue", "green"], "right": 5},
    }
    teacher = scores(1.0, 0.99, **good)
    trained = scores(0.98, 0.96, closure=0.53, real={"overall": 1.0, "interval_95": [0.99, 1.0]})
    arm = scores(0.38, 0.33, closure=0.42, **good)
    given = dict(teacher=teacher, trained=trained, start=scores(0.22, **good), arm=arm)
    assert cautions(**given, arms=("noise", "image")) == []
    text, shown = verdict(**given, arms=("noise", "image"))
    assert (
        "The most frequent answer, `red`, given to every question would be right in 30.0 %" in text
    )
    assert text.startswith("**Dots**") and text.count("**") == 2  # nothing else is bold
    assert "Without them the student answers 22.0 % before OPSD and 98.0 % after." in text
    assert "With true visual thoughts the same weights now answer 100.0 %, before OPSD" in text
    assert "**" not in shown and "`" not in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "always the most frequent answer Dots 30.0 %" in rows


def test_a_teacher_no_better_than_the_most_frequent_answer_has_little_to_teach():
    text, _ = verdict(teacher=scores(0.35, 0.29), trained=scores(0.3))
    assert text.startswith("**The teacher is not clearly better than the most frequent answer: it")
    assert cautions(teacher=scores(0.35, 0.31), trained=scores(0.3)) == []


def test_reading_visual_thoughts_worse_than_before():
    """Where the intervals do not overlap: 83.4 % up to 86.4, before 100 % from 99.3 on."""

    def found(high):
        real = {"overall": 0.834, "interval_95": [0.799, high]}
        return verdict(teacher=scores(1.0, 0.993), trained=scores(0.8, real=real))

    text, shown = found(0.864)
    line = "with them the same weights now answer 83.4 %, before OPSD 100.0 %."
    assert text.startswith("**Training made the model worse at reading true visual thoughts: ")
    assert line in text and line in shown and text.count("83.4") == 1
    text, _ = found(0.994)
    assert "worse" not in text and "the same weights now answer 83.4 %, before OPSD" in text


@pytest.mark.parametrize("arm, named", [(0.7, True), (0.61, True), (0.59, False), (0.9, True)])
def test_a_closure_that_other_content_reaches(arm, named):
    given = dict(teacher=scores(0.9, 0.85), trained=scores(0.8, closure=0.7))
    found = cautions(**given, arms=("swap",), arm=scores(0.2, closure=arm))
    assert found == [
        "The closure shows nothing about the content of visual thoughts: it is 70 %, and nearly so "
        f"where the teacher saw other content (swap {100 * arm:.0f} %)."
    ] * int(named)
    # an arm with another objective sees the same content
    assert cautions(**given, arms=("sft",), arm=scores(0.2, closure=arm)) == []


def test_a_start_that_asks_for_images():
    given = dict(teacher=scores(0.9, 0.85), trained=scores(0.8))
    (line,) = cautions(**given, start=scores(0.4, image_skip_rate=0.95))
    assert line.startswith("The start asks for an image in 95 % of its text-only answers")
    assert "may be the format. `eval --checkpoint=W/checkpoints/2 --ban_marker` shows" in line
    assert cautions(**given, start=scores(0.4, image_skip_rate=0.85)) == []
    (line,) = cautions(**given, start=scores(0.8, image_skip_rate=0.95))
    assert "gains" not in line
    shown, *rest = table(**given, start=scores(0.4, image_skip_rate=0.95))
    shown[scores_lib.START_BANNED] = scores(0.3)
    (line,) = cautions_lib.cautions(shown, *rest)
    assert "--ban_marker" not in line  # its row is there


@pytest.mark.parametrize(
    "own, best, clear",
    [
        (0.438, 0.430, False),  # 1.96 sqrt((.438 .562 + .430 .570) / 500) is 6.1 points
        (0.495, 0.430, True),
        (0.485, 0.430, False),
        (0.300, 0.430, False),
    ],
)
def test_a_control_that_chance_does_not_tell_from_opsd(own, best, clear):
    given = dict(teacher=scores(0.9, 0.85), trained=scores(own), arm=scores(best))
    found = cautions(**given, arms=("image",))
    assert len(found) == (not clear)
    if own == 0.438:
        assert found == [
            "OPSD is not clearly better than the control image, whose teacher saw other content: "
            "43.8 % and 43.0 %, 0.8 points apart, where chance alone makes up to 6.1."
        ]
        shown = report_table.in_terminal(*table(**given, arms=("image",)))
        assert "\ncaution: OPSD is not clearly better than" in shown
    assert cautions(**given, arms=("sft",)) == []  # its data are others


@pytest.mark.parametrize("rate, named", [(0.0, True), (0.85, True), (0.95, False)])
def test_answers_that_the_budget_cuts_off(rate, named):
    found = cautions(teacher=scores(0.9, 0.85), trained=scores(0.8, eos_rate=rate))
    assert len(found) == named
    if named:
        assert (
            f"{100 * (1 - rate):.0f} % of the student's answers are cut off at 8 tokens" in found[0]
        )


def test_one_answer_to_every_question_is_named():
    same = {
        "most_given": {"answer": "red", "share": 0.97},
        "common": {"given": ["red"], "right": 5},
    }
    differs = {"most_given": {"answer": "red", "share": 0.6}}
    text, _ = verdict(teacher=scores(0.9, 0.85, **differs), trained=scores(0.3, **same))
    assert "same answer to nearly all questions: OPSD, text only, `red` to 97 % of them." in text
    none = {"most_given": {"answer": None, "share": 1.0}}
    text, _ = verdict(teacher=scores(0.0, **none), trained=scores(0.0, **none))
    teacher = "teacher: start, with true visual thoughts, 100 % of them"
    assert f"No answer was found in nearly all texts of: {teacher}; OPSD, text" in text
    assert "same answer" not in text


def test_few_different_answers_are_named():
    """81 and 47 of 128 answers are two of the five that make up 90 % of the right ones."""
    given = ["n6"] * 81 + ["n7"] * 47
    right = ["n5"] * 34 + ["n6"] * 29 + ["n7"] * 26 + ["n4"] * 22 + ["n8"] * 10 + ["n3"] * 7
    assert scores_lib._common(given) == ["n6", "n7"]  # 81 of 128 are 63 %
    assert len(scores_lib._common(right)) == 5  # four are 111, 87 %; five 121, 95 %

    def found(answers, right=5):
        common = {"given": answers, "right": right}
        most = {"answer": "n6", "share": 0.63}
        trained = scores(0.24, common=common, most_given=most)
        return cautions(teacher=scores(0.9, 0.85), trained=trained)

    (line,) = found(["n6", "n7"])
    assert line == (
        "The same few answers to nearly all questions: OPSD, text only, `n6` and `n7`. Of the "
        "right answers it takes 5 to cover as many. Questions with another right answer are missed."
    )
    assert found(["n6", "n7", "n5"]) == []  # more than half as many as the right ones
    assert found(["yes", "no"], right=2) == []


def test_cautions_of_several_tasks_name_theirs_and_those_of_the_run_come_once():
    teacher = scores(0.9, 0.85) | {OTHER: scores(0.35, 0.29)[TASK]}
    trained = scores(0.8) | {OTHER: scores(0.3)[TASK]}
    (line,) = cautions(teacher=teacher, trained=trained)
    assert line.startswith(f"{OTHER}: The teacher is not clearly better than the most frequent")
    trained = scores(0.8, n=128) | {OTHER: scores(0.3, n=100)[TASK]}
    first, second = cautions(teacher=teacher, trained=trained)
    assert first.startswith("These numbers mean little") and second == line
    assert first.endswith("(300 OPSD steps, 100 and 128 test examples).")
    trained = scores(0.8, n=128) | {OTHER: scores(0.3)[TASK]}
    first, second = cautions(teacher=teacher, trained=trained)
    assert first.startswith(f"{TASK}: These numbers mean little") and second == line
    text, _ = verdict(teacher=teacher, trained=trained)
    assert text.index("mean little") < text.index(line) < text.index(f"**{TASK}**")


def test_the_best_controls_are_named():
    def found(**given):
        return verdict(teacher=scores(0.9, 0.85), arms=("noise", "image", "sft"), **given)[0]

    line = "Control arms: noise 20.0 %, image 20.0 %, sft 20.0 %. OPSD is"
    assert f"\n{line} 60.0 points above the best controls (noise and image)." in found(
        trained=scores(0.8)
    )
    assert f"{line} no better than the best controls (noise and image)." in found(
        trained=scores(0.2)
    )
    assert f"{line} 10.0 points below the best controls" in found(trained=scores(0.1))


def test_the_arm_none_is_not_the_evaluation_mode_none():
    text, _ = verdict(teacher=scores(0.9, 0.85), trained=scores(0.8), arms=("none",))
    assert "the arm none sees its texts without any image, which is the evaluation mode" in text


def test_finished_arms_that_are_not_in_the_table_are_named(tmp_path, monkeypatch):
    for name in ("image", "swap", "noise"):
        (tmp_path / "arms" / name).mkdir(parents=True)
    done = {str(tmp_path / "arms" / name): str(tmp_path) for name in ("image", "swap")}
    monkeypatch.setattr(report_table, "last_summary", lambda folder: done.get(folder, ""))
    (line,) = report_table.other_arms(str(tmp_path), ("image",))
    assert line.startswith("Not shown: the finished arms swap, which") and "noise" not in line
    assert "--config.run_arms=\"('image', 'swap',)\" shows all" in line
    assert report_table.other_arms(str(tmp_path), ("image", "swap")) == []
    assert report_table.other_arms(str(tmp_path / "elsewhere"), ()) == []
