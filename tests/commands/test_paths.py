"""Every command and function refuses unusable paths before it makes anything."""

import os

import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_flags, convert, eval, generate, redraw, train
from opsd_jax.data import __main__ as data
from opsd_jax.data import prepare
from opsd_jax.diagnose import __main__ as diagnose
from opsd_jax.evaluation import answer_files
from opsd_jax.inputs import paths
from opsd_jax.plan import __main__ as plan
from opsd_jax.runtime import checkpoint, metrics
from opsd_jax.tasks import parquet

ADDRESSES = (
    "gs://bucket/p",
    "s3://bucket/p",
    "file:///tmp/p",
    "hf://user/model",
    "http://host/p",
    "gs:/bucket/p",
    "a/gs://b",
    "gs:",
)
OTHERS = {
    "a\nb": "the character",
    "a\0b": "the character",
    "runs/\udcc3\udca9": "LC_ALL=C.UTF-8",
    "~/runs": "$HOME",
    "/gs/bucket/p": "gs://bucket/p",
    "/s3/p": "the address s3://p",
}
CONFIG = small_run.MINI
PATTERNS = ("exp[lr=1e-5]", "a[1]", "a]", "a*", "what?", "a\\b", "a[1]/inside")


def of_train(workdir="w", **changes):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    train.train(config, workdir)


def of_flags(main, **values):
    with flagsaver.flagsaver(**values):
        main([])


# what the user calls it -> what is run with a path there. Every path of every command is here.
READ = {
    "config.data.dir": lambda p: of_train(**{"data.dir": p}),
    "config.tokenizer": lambda p: of_train(tokenizer=p),
    "prepare --source": lambda p: data.main(["prepare", f"--source={p}", "--target=t"]),
    "prepare --target": lambda p: data.main(["prepare", "--source=s", f"--target={p}"]),
    "make-mini --target": lambda p: data.main(["make-mini", "--families=chart", f"--target={p}"]),
    "sizes --workdir": lambda p: data.main(["sizes", f"--config={CONFIG}", f"--workdir={p}"]),
    "index --workdir": lambda p: data.main(["index", f"--config={CONFIG}", f"--workdir={p}"]),
    "import --source": lambda p: convert.main(["import", f"--source={p}", "--target=t"]),
    "export --target": lambda p: convert.main(["export", "--source=s", f"--target={p}"]),
    "redraw --target": lambda p: redraw.main(["--workdir=w", f"--target={p}"]),
    "eval --data_dir": lambda p: eval.main(["--workdir=w", f"--data_dir={p}"]),
    "eval --against": lambda p: eval.main(["--workdir=w", f"--against={p}"]),
    "generate --image": lambda p: generate.main(["--checkpoint=c", "--question=q", f"--image={p}"]),
    "generate --tokenizer": lambda p: generate.main(
        ["--checkpoint=c", "--question=q", f"--tokenizer={p}"]
    ),
    "generate --out": lambda p: generate.main(["--checkpoint=c", "--question=q", f"--out={p}"]),
    "plan --out": lambda p: of_flags(
        plan.main, config=config_lib.default(), topology="cpu:8", out=p
    ),
    "train --config": lambda p: config_flags.parse_flags(["train", f"--config={p}"]),
    # and functions that are called without a command
    "parquet.make_mini": lambda p: parquet.make_mini(p, families=("chart",), counts={"test": 1}),
    "visual_opsd.prepare": lambda p: prepare.prepare("s", p),
    "generate.write": lambda p: answer_files.write(p, [], []),
    "metrics.Writer": lambda p: metrics.Writer(p),
}
ORBAX = {
    "train --workdir": lambda p: of_flags(train.main, config=config_lib.default(), workdir=p),
    "train": lambda p: of_train(p),
    "config.init_from": lambda p: of_train(init_from=p),
    "import --target": lambda p: convert.main(["import", "--source=s", f"--target={p}"]),
    "export --source": lambda p: convert.main(["export", f"--source={p}", "--target=t"]),
    "redraw --workdir": lambda p: redraw.main([f"--workdir={p}", "--target=t"]),
    "eval --workdir": lambda p: eval.main([f"--workdir={p}"]),
    "diagnose --workdir": lambda p: diagnose.main(["all", f"--workdir={p}"]),
    "diagnose --checkpoint": lambda p: diagnose.main(["all", "--workdir=w", f"--checkpoint={p}"]),
    "diagnose --teacher": lambda p: diagnose.main(["kl", "--workdir=w", f"--teacher={p}"]),
    "diagnose --student": lambda p: diagnose.main(["kl", "--workdir=w", f"--student={p}"]),
    "checkpoint.save": lambda p: checkpoint.save(p, None, {"a": jnp.ones(2)}),
    "Checkpoints": lambda p: checkpoint.Checkpoints(p),
    "checkpoint.restore": lambda p: checkpoint.restore(p, {}),
    "checkpoint.metadata": lambda p: checkpoint.metadata(p),
}
READ |= {
    "export --base": lambda p: convert.main(["export", "--source=s", "--target=t", f"--base={p}"]),
    "redraw --checkpoint": lambda p: redraw.main(
        ["--workdir=w", "--target=t", f"--checkpoint={p}"]
    ),
    "eval --checkpoint": lambda p: eval.main(["--workdir=w", f"--checkpoint={p}"]),
    "generate --checkpoint": lambda p: generate.main(["--question=q", f"--checkpoint={p}"]),
}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs something in an empty folder, where it must fail and make nothing; what it says."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    place = tmp_path / "cwd"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(act, path) -> str:
        with pytest.raises((ValueError, SystemExit)) as error:
            act(path)
        assert os.listdir(place) == [], f"{path} made {os.listdir(place)}"
        code = getattr(error.value, "code", error.value)
        return capsys.readouterr().err if isinstance(code, int) else str(code)

    return run


@pytest.mark.parametrize("what", READ | ORBAX)
def test_addresses_and_what_is_read_as_one(what, refusal):
    name = what.split()[-1] if "--" in what or what.startswith("config.") else ""
    for path in ADDRESSES:
        message = refusal((READ | ORBAX)[what], path)
        assert f"{name}={path!r} is an address" in message and "mount the bucket" in message, (
            message
        )
    for path, part in OTHERS.items():
        assert part in refusal((READ | ORBAX)[what], path)


@pytest.mark.parametrize("what", ORBAX)
def test_patterns_where_checkpoints_are(what, refusal):
    for path in PATTERNS:
        message = refusal(ORBAX[what], path)
        assert f"={path!r} (which is " in message and "Use a path without them" in message, message


def test_the_folders_above_and_links_count(tmp_path, monkeypatch):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a[1]")
    monkeypatch.chdir(tmp_path / "a[1]")
    for path in ("run", tmp_path / "link", tmp_path / "link" / "checkpoints" / "3"):
        with pytest.raises(ValueError, match=r"which is .*a\[1\].* holds \[ \]: checkpoints"):
            checkpoint.Checkpoints(path)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "act",
    [
        lambda: of_train(""),
        lambda: data.main(["make-mini", "--target="]),
        lambda: data.main(["prepare", "--source=s", "--target="]),
        lambda: convert.main(["import", "--source=s", "--target="]),
        lambda: eval.main(["--workdir="]),
        lambda: redraw.main(["--workdir=w", "--target="]),
    ],
)
def test_an_unset_shell_variable_is_not_the_current_folder(act, refusal):
    assert "is empty (an unset shell variable?)" in refusal(lambda _: act(), "")


def test_what_is_accepted(tmp_path):
    for path in (
        "runs/a b",
        "lr=1e-5",
        "a:b",
        "a+b,c@d#e&f{g}(h)'i\"j|k;l%m$n",
        "日本/é",
        "12:30/run",
        "..",
        ".",
        "/",
        "C",
        "a~",
    ):
        paths.check("--workdir", path, orbax=True)
    for path in ("data[1]", "what?.png", "a\\b", ""):
        paths.check("--image", path)
    paths.check("--workdir", tmp_path, orbax=True)


def test_checkpoints_in_folders_with_odd_but_accepted_names(tmp_path):
    """`_GLOB` is complete: what is not refused can be read again."""
    weights = {"a": jnp.arange(6.0)}
    for name in ("a b=c,d:e+f;g@h~i", "{j}(k)'l\"m|n#o&p$HOME%s%20", "日本é^!<>`"):
        checkpoint.save(tmp_path / name, None, weights)
        assert (
            checkpoint.restore_params(tmp_path / name, weights)["a"].tolist()
            == weights["a"].tolist()
        )


@pytest.mark.parametrize(
    "config, topology, message",
    [
        (None, "cpu:8", "--config is missing: give a file of settings"),
        (config_lib.default(), "", "--topology is missing: give a slice, --topology=v5p:2x2x2"),
    ],
)
def test_plan_names_the_option_that_is_missing(config, topology, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        of_flags(plan.main, config=config, topology=topology)
