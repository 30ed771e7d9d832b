"""`python -m opsd_jax.data sizes`: what examples need of data.buckets."""

import ast
import importlib.util
import os
import re
import shlex

import numpy as np
import pytest
from ml_collections import ConfigDict

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, config_flags, context, images, tokenizer
from opsd_jax.data import __main__ as data
from opsd_jax.data import packing, procedural, sizes
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import contexts
from opsd_jax.run import checks

MAZE = "Spatial_Navigation"
CONFIG = f"--config={small_run.MINI}:smoke"
DATA = "--config.data.dir=DATA", "--config.data.make.families=()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Charts and mazes, whose images and texts have other sizes."""
    made = tmp_path_factory.mktemp("data")
    make = {"families": ["chart", "maze"], "train": 24, "validation": 8, "test": 8}
    procedural.make_procedural(
        str(made), {"difficulty": "default", "wrong_traces": 0.0, "seed": 0, **make}
    )
    return made


@pytest.fixture(scope="module")
def options(folder):
    return [
        f"--config.data.dir={folder}",
        "--config.data.make.families=()",
        f"--config.data.tasks={small_run.TASK},{MAZE}",
        "--config.images.min_size=32",
        "--config.model.llm.vocab_size=512",
        "--config.rollout.max_new_tokens=64",
        "--config.eval.every=10",
        "--config.arms.swap={'teacher': {'visual_thoughts': 'swap'}}",
        "--config.run_arms=swap",
    ]


def printed(capsys, *arguments) -> str:
    data.main(["sizes", CONFIG, *arguments])
    return capsys.readouterr().out


def settings(options, out: str) -> ConfigDict:
    """The settings with what a user pastes: the last line."""
    return config_flags.read([CONFIG, *options, *shlex.split(out.strip().splitlines()[-1])])


def accept(config: ConfigDict) -> None:
    """Packs what the run and its arm pack: every example in every role. It raises what they do."""
    config_check.check(config)
    folder = workdir_lib.tokenizer_folder(config.tokenizer, config.data.dir)
    tok = tokenizer.load(folder, vocab_size=config.model.llm.vocab_size)
    packer = packing.Packer.from_config(config, tok)
    examples = small_run.examples(config, tok)
    rng = np.random.default_rng(0)
    for source in range(2):
        for n in range(len(examples.sources[source])):
            example, partner = examples(source, n), examples.partner(source, n)
            packer.student([example])
            for mode in ("real", "noise", "swap"):
                packer.teacher([example], [partner], mode, [rng])
            for layout in ("interleaved", "reference", "text"):
                packer.traces([example], [layout])
    for split, traces in (("validation", False), ("test", True)):
        selection = contexts.Selection(
            small_run.examples(config, tok, split), packer, None, batch_size=1
        )
        contexts.check_fit(selection, ("none", "real", "noise", "swap"), traces=traces)


def smaller(config: ConfigDict):
    """The settings with one number of the buckets lowered by one, for each number."""
    for kind in ("student", "teacher", "trace"):
        (largest,) = config.data.buckets[kind]
        for column in range(len(largest)):
            changed = config.copy_and_resolve_references()
            lowered = tuple(n - (at == column) for at, n in enumerate(largest))
            changed.data.buckets[kind] = (lowered,)
            yield kind, changed


@pytest.mark.slow
def test_the_printed_line_fits_all_examples_and_one_less_does_not(options, capsys):
    out = printed(capsys, *options)
    config = settings(options, out)
    accept(config)
    assert len({*config.data.buckets.trace}) == 1
    tried = 0
    for kind, config_of_one_less in smaller(config):
        with pytest.raises(context.TooLongError, match=f"config.data.buckets.{kind} "):
            accept(config_of_one_less)
        said = sizes.report(config_of_one_less)
        assert "The present settings refuse" in said, said
        assert said.splitlines()[-1] == out.splitlines()[-1]
        tried += 1
    assert tried == 7
    assert "The present settings fit all 80 examples" in sizes.report(config)


def test_the_table_names_the_example_that_needs_most(options, folder, capsys):
    out = printed(capsys, *options)
    config = settings(options, out)
    tok = tokenizer.load(folder / "made" / "tokenizer")
    packer, found = packing.Packer.from_config(config, tok), {}
    for split in ("train", "validation", "test"):
        examples = small_run.examples(config, tok, split)
        for source, task in enumerate(examples.tasks):
            for n in range(len(examples.sources[source])):
                example = examples(source, n)
                place = f"{example.example.pid} ({task}, {split})"
                found[place] = context.need(packer.blocks(example, "student")).positions
    values = list(found.values())
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["student", "positions"]]
    median, most, largest, owner = line.split(maxsplit=5)[2:]
    assert float(median) == round(np.median(values)) and int(largest) == max(values)
    assert int(most) <= max(values) and found[owner] == max(values)


def test_refusals_are_counted(options, capsys):
    """Charts need 25 patches, mazes 16."""
    out = printed(capsys, *options, "--config.data.buckets.student=((60, 24),)",
                  "--config.data.buckets.teacher=((99, 50),)",
                  "--config.data.buckets.trace=((99, 50, 50),)")  # fmt: skip
    assert "The present settings refuse 40 of 80 examples (50.0 %). These fit all:" in out
    again = printed(capsys, *options, "--config.eval.final_split=train",
                    "--config.data.buckets.student=((60, 24),)",
                    "--config.data.buckets.teacher=((99, 50),)",
                    "--config.data.buckets.trace=((99, 50, 50),)")  # fmt: skip
    assert int(again.partition(" examples (50.0 %)")[0].split()[-1]) < 80  # each counts once


def test_several_buckets(options, capsys):
    config = settings(options, printed(capsys, *options, "--buckets=2"))
    config_check.check(config)
    buckets = config.data.buckets
    assert [len(buckets[kind]) for kind in ("student", "teacher", "trace")] == [2, 2, 2]
    assert buckets.student[0][1] == 16 and buckets.student[1][1] == 25  # mazes, then charts
    tok = tokenizer.load(os.path.join(config.data.dir, "made", "tokenizer"))
    packer, examples = packing.Packer.from_config(config, tok), small_run.examples(config, tok)
    found = [packer.bucket(examples(s, n)) for s in range(2) for n in range(24)]
    assert found == [1] * 24 + [0] * 24
    (one,) = settings(options, printed(capsys, *options)).data.buckets.trace
    assert buckets.trace[-1] == one


def test_sizes_that_are_all_the_same_make_one_bucket(options, capsys):
    same = [*options, "--config.data.tasks=Spatial_Navigation", "--config.data.limits=1"]
    off = ["--config.eval.every=0", "--config.eval.final_split=", "--config.run_arms=()"]
    config = settings([*same, *off], printed(capsys, *same, *off, "--buckets=3"))
    assert len(config.data.buckets.student) == 1


def test_no_image_is_decoded(options, monkeypatch, capsys):
    monkeypatch.setattr(images, "open_rgb", None)
    monkeypatch.setattr(images, "resize", None)
    assert "--config.data.buckets.trace=" in printed(capsys, *options)


@pytest.mark.parametrize("generation", [False, True])
def test_measured_examples_need_what_decoded_ones_do(folder, generation):
    spec = importlib.util.spec_from_file_location("mini", small_run.MINI)
    mini = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mini)
    config = mini.get_config("draw")
    config.data.dir = str(folder)
    tok = tokenizer.load(folder / "made" / "tokenizer")
    examples = small_run.examples(config, tok, generation=generation)
    packer = packing.Packer.from_config(config, tok)
    for n in range(8):
        whole, measured = examples(0, n), examples.measured(0, n)
        assert bool(whole.pixels) == generation
        needs = [packer.needs(x, ("image", "swap", "none"), x) for x in (whole, measured)]
        assert needs[0].keys() == needs[1].keys() and ("drawn" in needs[0]) == generation
        for kind in needs[0]:
            np.testing.assert_array_equal(needs[0][kind], needs[1][kind])
        assert [x.grid for x in whole.visual_thoughts] == [x.grid for x in measured.visual_thoughts]


def test_images_to_generate(folder, capsys):
    data_options = [option.replace("DATA", str(folder)) for option in DATA]
    out = printed(capsys, *data_options,
                  "--config.model.generation.on=True", "--config.warmup.mix.drawn=1",
                  "--config.data.buckets.drawn=((75, 2, 40, 40),)",
                  "--config.model.generation.z_channels=4",
                  "--config.model.generation.multipliers=1,1,1",
                  "--config.model.generation.side=5")  # fmt: skip
    line = out.strip().splitlines()[-1]
    assert '--config.data.buckets.drawn="((75, 2, 40, 40),)"' in line  # 3 x 25 latent tokens


def test_a_budget_that_cuts_answers_is_told(options, capsys):
    out = printed(capsys, *options, "--config.rollout.max_new_tokens=8")
    config = settings(options, out)
    assert config.rollout.max_new_tokens == config.data.buckets.trace[0][2] or (
        8 < config.rollout.max_new_tokens < config.data.buckets.trace[0][2]
    )
    enough = [*options, f"--config.rollout.max_new_tokens={config.rollout.max_new_tokens}"]
    assert "max_new_tokens" not in printed(capsys, *enough)


def test_what_contradicts_the_printed_line_is_told(options, capsys):
    out = printed(
        capsys,
        *options,
        "--config.data.buckets.teacher=((30, 50),)",
        "--config.opsd.max_forward_tokens=80",
        "--config.rollout.max_new_tokens=27",
    )
    said = out.strip().splitlines()[-1]
    assert said.startswith("With these options, config.opsd.max_forward_tokens is 80: with a")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=nowhere.py"], "nowhere.py: there is no such Python file"),
        ([CONFIG, "--config.data.dri=x"], "--config.data.dri=x: there is no setting 'dri'"),
        ([CONFIG], "config.data.dir is empty: give --config.data.dir=FOLDER, or --workdir=W"),
        ([CONFIG, "--config.data.dir=/nowhere"], "/nowhere holds no data: make them with"),
        ([CONFIG, "--workdir=/nowhere"], "/nowhere/data holds no data yet: start the run"),
        ([CONFIG, "--buckets=0"], "--buckets is 0: give a whole number in [1, inf)"),
        ([CONFIG, "--config.opsd.steps=-1"], "config.opsd.steps is -1: give"),
        ([CONFIG, *DATA, "--config.tokenizer=/x"], "/x: there is no such folder: give"),
        ([CONFIG, *DATA, "--config.model.llm.vocab_size=300"], "but the model has 300 embeddings"),
        (
            [CONFIG, *DATA, "--config.model.llm.vocab_size=512",
             "--config.eval.final_split=dev"],
            "config.eval.final_split asks for the split 'dev' of",
        ),
        (
            [CONFIG, *DATA, "--config.model.llm.vocab_size=512",
             "--config.model.vit.side=4"],
            "an image of 5x5 patches exceeds the 4x4 position table: lower images.max_size",
        ),
    ],
)  # fmt: skip
def test_mistakes_end_it_with_one_line(arguments, message, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main(["sizes", *(a.replace("DATA", str(folder)) for a in arguments)])
    said = f"{capsys.readouterr().err}{'' if stopped.value.code == 1 else stopped.value.code}"
    assert said.startswith("error: ") and message in said and said.strip().count("\n") == 0


def test_settings_belong_to_sizes_alone(capsys, tmp_path):
    with pytest.raises(SystemExit):
        data.main(["prepare", f"--source={tmp_path}", "--target=T", "--config.data.dir=x"])
    assert (
        "--config.data.dir=x: settings belong to the commands sizes and index"
        in capsys.readouterr().err
    )


def test_long_work_shows_progress(options, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "_MANY", 10)
    data.main(["sizes", CONFIG, *options])
    assert "measuring train  48/48" in capsys.readouterr().err
    assert config_lib.BUCKET_SIZES.keys() == {"student", "teacher", "trace", "drawn"}


@pytest.mark.parametrize(
    "preset",
    [
        *(f"mini.py:{name}" for name in ("chart", "maze", "smoke", "draw")),
        *(f"contexts.py:{name}" for name in ("opsd_text", "crop", "degraded")),
        *(f"contexts.py:{name},maze" for name in ("opsd_text", "solution_and_vt")),
    ],
)
def test_presets_fit_the_data_that_they_make(preset):
    sizes.check_unmade(config_flags.read([f"--config={small_run.ROOT}/configs/{preset}"]))


def test_longer_prompts_are_refused_before_data_are_made(tmp_path):
    """The message has the options for data that do not exist yet, and with them a run begins."""
    config = small_run.config(prompts__intro="look at these images and use them")
    with pytest.raises(context.TooLongError, match="config.data.buckets.teacher is ") as found:
        checks.check(config, str(tmp_path / "w"))
    assert not os.listdir(tmp_path)
    assert "config.data.buckets.student" not in str(found.value)
    options = re.findall(r'--config.(data.buckets.\w+)="(.*?)"', str(found.value))
    assert [key for key, _ in options] == ["data.buckets.teacher", "data.buckets.trace"]
    config.update_from_flattened_dict({key: ast.literal_eval(value) for key, value in options})
    checks.check(config, str(tmp_path / "w"))
    checks.check(small_run.config(), str(tmp_path / "w"))
