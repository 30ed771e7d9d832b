"""What the table of a run says in words."""

import json
import re
import types

import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax.blocks import BlockNames
from opsd_jax.evaluation import wording
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import report_table, run_page, stage_evaluation
from opsd_jax.run import scores as scores_lib
from opsd_jax.study import table as study_table

TASK, OTHER = "Dots", "Lines"


def scores(share, low=0.0, *, n=500, **more):
    return {TASK: {"overall": share, "interval_95": [low, 1.0], "n": n, **more}}


def table(*, teacher, trained, arms=(), start=None, arm=None):
    """A table; arm: the scores of each arm."""
    shown = {
        scores_lib.TEACHER: teacher,
        **({scores_lib.START: start} if start else {}),
        scores_lib.TRAINED: trained,
        **{scores_lib.arm_key(name): arm or scores(0.2) for name in arms},
        scores_lib.BASELINE: {
            task: {"overall": 0.3, "n": 500, "answer": "red"} for task in trained
        },
    }
    return shown, arms, small_run.config(opsd__steps=300), "a b"


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


def test_answers_that_are_worse_than_before():
    """Where the intervals do not overlap: 6.7 % up to 0.298, before 66.7 % from 0.417 on."""

    def found(low):
        start = {"overall": 0.667, "interval_95": [low, 0.848], "n": 500}
        trained = {"overall": 0.067, "interval_95": [0.012, 0.298], "n": 500}
        given = {"start": {TASK: start}, "trained": {TASK: trained}}
        return cautions(teacher=scores(1.0, 0.9), **given)

    (line,) = found(0.417)
    assert line.startswith("OPSD made the answers worse: without visual thoughts 6.7 % are right, ")
    assert "before OPSD 66.7 %." in line
    assert found(0.29) == []


def test_a_run_without_a_closure_says_so():
    """Teacher and student said the same before training."""
    kl = {"kl_before": 3e-9, "kl": 0.02, "closure": None}
    given = dict(teacher=scores(0.9, 0.85), trained=scores(0.8, **kl))
    (line,) = cautions(**given, arms=("noise",), arm=scores(0.2, closure=0.9))
    assert line.startswith("There is no closure: before training, the student already said what")
    assert "(KL 3e−09 nats per token, less than 0.0001)" in line
    text, shown = verdict(**given)
    assert line in text and line in shown
    (row,) = [row for row in shown.splitlines() if row.startswith("  OPSD")]
    assert row.split()[-1] == "0.0–100.0"  # its last cell, the closure, is empty


SEEN = ("system", "question")
HINT = "text:hint"
CONTEXTS = {  # teacher's blocks: words of the table
    (*SEEN, "intro", HINT): ("with privileged content", "question alone"),
    (*SEEN, "intro"): ("with the teacher's blocks", "question alone"),
    (*SEEN, "intro", "visual_thoughts"): ("with true visual thoughts", "text only"),
}


@pytest.mark.parametrize("blocks", CONTEXTS)
def test_words_are_those_of_the_blocks(blocks):
    """A run without visual thoughts does not speak of them."""
    shown, arms, config, workdir = table(
        teacher=scores(0.9, 0.85),
        trained=scores(0.6, closure=0.7, real={"overall": 0.5, "interval_95": [0.4, 0.6]}),
        start=scores(0.4, image_skip_rate=0.95),
        arms=("noise", "none"),
        arm=scores(0.55, closure=0.69),
    )
    config.student.blocks, config.teacher.blocks = SEEN, blocks
    given, alone = CONTEXTS[blocks]
    text = "\n".join(
        [
            *report_table.verdict(shown, arms, config, workdir),
            report_table.in_terminal(shown, arms, config, workdir),
            run_page.meaning(config_lib.block_names(config), images=False),
        ]
    )
    for line in (f"teacher: start, {given}", f"OPSD, {alone}", f"arm noise, {alone}"):
        assert f"\n  {line} " in text
    assert f"The teacher answers 90.0 % {given}." in text
    assert "it always sees the question." in text and "problem image" not in text
    assert ("Nothing is privileged: the student has all blocks" in text) == (HINT not in text) * (
        "true visual" not in text
    )
    if "visual_thoughts" not in blocks:
        assert "visual thought" not in text and "any image" not in text and "text only" not in text


def test_samples_of_a_run_are_of_all_tasks(monkeypatch):
    """Predictions are grouped by task, so that the first ones would be of the first task."""
    predictions = [
        {"benchmark": task, "index": n, "pid": f"{task}{n}", "prediction": "x", "tokens": 2}
        | {"hit": n % 2, "answer": None, "expected": "y"}
        for task in (TASK, OTHER)
        for n in range(60)
    ]
    monkeypatch.setattr(run_page.results, "read_predictions", lambda folder: predictions)
    example = types.SimpleNamespace(question="q?")
    selection = types.SimpleNamespace(
        tasks=(TASK, OTHER),
        packer=types.SimpleNamespace(names=BlockNames()),
        examples=types.SimpleNamespace(without=lambda names: [], sources=[[example] * 60] * 2),
        shown_images=lambda source, n, mode: [],
    )
    html = "".join(run_page._samples("w", 3, selection, "test"))
    titles = re.findall(r"</b>\d+\. (.*?)</summary>", html)
    shown = [f"{task} {task}{n}" for task in (TASK, OTHER) for n in range(0, 60, 10)]
    assert titles[:12] == [f"{name}: no &lt;answer&gt; tag (expected y)" for name in shown]
    assert [title.split()[0] for title in titles[12:]] == [TASK] * 6 + [OTHER] * 6
    assert "24 of 120 test examples: 12 of the 60 wrong answers, then 12 right ones" in html


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {},
            "the generalised Jensen-Shannon divergence with β = 0.5 over the 256 most probable "
            "tokens of the teacher, renormalised; each vocabulary entry's part is at most 0.05 "
            "nats",
        ),
        (
            {"beta": 0.0, "top_k": 0, "clip": 0.0},
            "the forward KL(teacher ‖ student) over the whole vocabulary",
        ),
        (
            {
                "beta": 1.0,
                "support": "union",
                "tail": True,
                "clip_unit": "token",
                "temperature": 2.0,
            },
            "the reverse KL(student ‖ teacher) over the 256 most probable tokens of the teacher or "
            "the student, one more for all others, at temperature 2, times its square; the sum of "
            "each token is at most 0.05 nats",
        ),
        (
            {"top_k": 448, "clip": 0.0},
            "the generalised Jensen-Shannon divergence with β = 0.5 over the whole vocabulary",
        ),
        (
            {"kind": "sampled_reverse_kl"},
            "the loss at the sampled token whose gradient is the policy gradient of the reverse "
            "KL(student ‖ teacher), over the whole vocabulary",
        ),
    ],
)
def test_the_divergence_in_words(changes, said):
    config = config_lib.default().divergence
    config.update(changes)
    assert run_page.divergence_in_words(config, 448) == said


def test_words_of_a_stage_and_of_a_study():
    scored = {"eval/maze/none": 0.5, "eval/maze/real": 0.6, "kl/maze/closure": -0.4}
    said = stage_evaluation._in_words(scored, wording.OF_VISUAL_THOUGHTS)
    assert said == "maze text only 50.0 %, with true visual thoughts 60.0 %, closure −40.0 %"
    said = stage_evaluation._in_words(scored, wording.OF_PRIVILEGED)
    assert said.startswith("maze question alone 50.0 %, with privileged content 60.0 %")
    own, other = BlockNames(), BlockNames(SEEN, (*SEEN, HINT))
    assert wording.of_runs([own, own]) == wording.OF_VISUAL_THOUGHTS
    assert wording.of_runs([own, other]) == wording.of_runs([other]) == wording.OF_PRIVILEGED
    head = study_table.header(wording.OF_PRIVILEGED)
    assert "with privileged content %" in head and "closure %" in head
    meaning = study_table.meaning("opsd", wording.OF_PRIVILEGED)
    assert "is without privileged content, the mean" in meaning and "visual" not in meaning


def test_curves_have_the_names_of_the_table(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_page.charts, "lines", lambda lines, **_: drawn.append([*lines]) or "")
    config = small_run.config()
    for folder, stages in ((tmp_path, ("warmup", "opsd")), (tmp_path / "arms", ("opsd",))):
        folder.mkdir(exist_ok=True)
        rows = [{"step": n, "stage": stage, "loss": 1.0} for stage in stages for n in (3, 4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_page._curves({"run": str(tmp_path), "arm noise": str(tmp_path / "arms")}, config)
    assert drawn == [["OPSD", "arm noise"], ["run"]]


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
    command = (
        "python -m opsd_jax.eval '--workdir=a b' '--checkpoint=a b/checkpoints/2' --ban_marker"
    )
    assert f"may be the format. `{command}` shows what it answers where it cannot ask." in line
    assert cautions(**given, start=scores(0.4, image_skip_rate=0.85)) == []
    (line,) = cautions(**given, start=scores(0.8, image_skip_rate=0.95))
    assert "gains" not in line
    shown, *rest = table(**given, start=scores(0.4, image_skip_rate=0.95))
    for banned, part in ((0.3, False), (0.5, True)):  # its row is there: no command
        shown[scores_lib.START_BANNED] = scores(banned)
        (line,) = cautions_lib.cautions(shown, *rest)
        start = f"gets none. Where it cannot ask, it answers {100 * banned:.1f} % in the place of"
        end = ": a part of what OPSD gains over it may be the format." if part else "."
        assert line.endswith(f"{start} 40.0 %{end}")


@pytest.mark.parametrize(
    "own, best, clear",
    [
        (0.438, 0.430, False),  # 1.96 sqrt((.438 .562 + .430 .570) / 500) is 6.1 points, too
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
            "43.8 % and 43.0 %, 0.8 points apart (95 % interval: −5.3 to 6.9)."
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
        command = "python -m opsd_jax.data sizes '--config=a b/config.json' '--workdir=a b'"
        assert f"look at them; `{command}` says what" in found[0]


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


def test_examples_that_the_run_trained_on_are_not_called_test_examples():
    """The split is named, and such an accuracy needs a caution."""
    given = table(teacher=scores(0.9, 0.85), trained=scores(0.8))
    assert "500 test examples" in "\n".join(report_table.verdict(*given))
    given[2].eval.final_split = "train[:64]"
    text = "\n".join(report_table.verdict(*given))
    assert "500 train examples" in text and "test examples" not in text
    (line,) = cautions_lib.cautions(*given)
    assert "is of the split `train[:64]`, on which the run trained" in line


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
    best = "the best controls, noise and image (95 % interval of the difference:"
    assert f"\n{line} 60.0 points above {best} 54.7 to 64.6)." in found(trained=scores(0.8))
    assert f"{line} no better than {best} −5.0 to 5.0)." in found(trained=scores(0.2))
    assert f"{line} 10.0 points below {best} −14.4 to −5.6)." in found(trained=scores(0.1))


def test_pairs_of_answers_decide_whether_opsd_is_better_than_a_control():
    """The sentence and the caution use one interval: that of pairs, where there are pairs."""

    def found(**more):
        trained = scores(0.23, **more)
        text, _ = verdict(
            teacher=scores(0.9, 0.85), trained=trained, arm=scores(0.2), arms=("noise",)
        )
        return text

    caution = "**OPSD is not clearly better than the control noise, whose teacher saw other content"
    apart = f"{caution}: 23.0 % and 20.0 %, 3.0 points apart (95 % interval: −2.1 to 8.1).**"
    assert apart in found() and "(95 % interval of the difference: −2.1 to 8.1)." in found()
    paired = found(lead_interval_95=(0.011, 0.05))
    assert caution not in paired and "(95 % interval of the difference: 1.1 to 5.0)." in paired


def test_arms_that_are_not_done_are_named():
    given = table(teacher=scores(0.9, 0.85), trained=scores(0.8), arms=("noise",))
    given[2].run_arms = ("noise", "image", "swap")
    text = "\n".join(report_table.verdict(*given))
    assert "**Not shown, because they are not done: the arms image, swap.** In the" in text
    assert "arms/image/log and arms/swap/log say why" in text
    assert "`--config.run_arms=noise` leaves them out." in text
    given[2].run_arms = ("noise",)
    assert "Not shown" not in "\n".join(report_table.verdict(*given))


def test_the_arm_none_is_not_the_evaluation_mode_none():
    text, _ = verdict(teacher=scores(0.9, 0.85), trained=scores(0.8), arms=("none",))
    assert "the arm none sees its texts without any image, which is the evaluation mode" in text


def test_finished_arms_that_are_not_in_the_table_are_named(tmp_path, monkeypatch):
    for name in ("image", "swap", "noise"):
        (tmp_path / "arms" / name).mkdir(parents=True)
    done = {str(tmp_path / "arms" / name): str(tmp_path) for name in ("image", "swap")}
    monkeypatch.setattr(report_table, "last_summary", lambda folder: done.get(folder, ""))
    named = types.SimpleNamespace(run_arms=())
    monkeypatch.setattr(report_table, "load_config", lambda _: named)
    (line,) = report_table.other_arms(str(tmp_path), ("image",))
    assert line.startswith("Not shown: the finished arms swap, which") and "noise" not in line
    assert "--config.run_arms=\"('image', 'swap',)\" shows all" in line
    assert report_table.other_arms(str(tmp_path), ("image", "swap")) == []
    assert report_table.other_arms(str(tmp_path / "elsewhere"), ()) == []
    named.run_arms = ("swap",)  # an arm of the run that failed at its end
    assert report_table.other_arms(str(tmp_path), ("image",)) == []
