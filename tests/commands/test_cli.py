"""What all commands share: terminals without UTF-8, and checks of flag values."""

import ast
import importlib
import io
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

import small_run
from opsd_jax import config_flags
from opsd_jax.__main__ import COMMANDS
from opsd_jax.inputs import cli

PACKAGE = pathlib.Path(__file__).parents[2] / "opsd_jax"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    cli.start()
    print("12.5–40.1 ± é 问 \ud800", flush=True)
    printed = out.buffer.getvalue().decode(encoding)
    assert printed.startswith("12.5") and printed.endswith("\\ud800\n")
    assert encoding != "ascii" or printed == "12.5\\u201340.1 \\xb1 \\xe9 \\u95ee \\ud800\n"


def test_every_command_prepares_the_terminal_first():
    """Before it parses anything: `cli.start()` comes before every other call in `main`."""
    mains = {}
    programs = {PACKAGE / "study" / "launch.py"}  # no command of users: it prints one ASCII line
    for path in set(PACKAGE.rglob("*.py")) - programs:
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
            main = next(
                n
                for n in ast.parse(path.read_text(encoding="utf-8")).body
                if isinstance(n, ast.FunctionDef) and n.name == "main"
            )
            call = next(
                n for n in main.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
            )
            mains[path.relative_to(PACKAGE).as_posix()] = ast.unparse(call)
    assert len(mains) >= 8 and set(mains.values()) == {"cli.start()"}, mains


def test_files_are_written_and_read_as_utf8():
    """Whatever the locale says: every text file that is opened names its encoding."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for call in (
            n
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Call)
        ):
            if ast.unparse(call.func) == "open":
                mode = next((ast.unparse(a) for a in call.args[1:2]), "'r'")
                if "b" not in mode and "encoding" not in {k.arg for k in call.keywords}:
                    found.append(f"{path.name}:{call.lineno}")
    assert found == []


def test_a_question_typed_in_a_terminal_without_utf8():
    code = (
        "import sys; from opsd_jax.inputs import cli; "
        "print(ascii(cli.text('question', sys.argv[1])))"
    )
    env = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(PACKAGE.parent),
    }

    def run(question):
        return subprocess.run(
            [sys.executable, "-c", code, question], env=env, capture_output=True, text=True
        )

    assert run("wo? – 问".encode()).stdout == ascii("wo? – 问") + "\n"
    assert "the text is not UTF-8" in run(b"wo\xff").stderr


# --- values of flags


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "/tmp/x",
        ".",
        "..",
        ".hidden",
        "a b",
        "a\n",
        "x*",
        "a:b",
        "a\\b",
        "",
        "summary.md",
    ],
)
def test_names_that_are_no_folder_name(name):
    with pytest.raises(ValueError, match="^--name=(.|\n)*give one folder name"):
        cli.check_name(name)


@pytest.mark.parametrize("name", ["x", "000500-none", "lr=1e-5,b2=0.95", "v1.2", "_a", "-", "é"])
def test_names_of_results(name):
    cli.check_name(name)


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (cli.check_seed, [0, 1, 2**32 - 1], [-1, 2**32, 2**32 + 7, -(2**32)]),
        (
            cli.check_temperature,
            [None, 0, 0.0, 1e-3, 0.3, 1],
            [-1, float("nan"), float("inf"), -float("inf"), 1e-40, 1e30],
        ),
        (lambda x: cli.check_number("steps", x, 2), [None, 2, 50], [1, 0, -5]),
        (
            lambda x: cli.check_once("seed", x),
            [(), (None,), (0, 1)],
            [(0, 0), ("a", "b", "a"), ("", "")],
        ),
    ],
)
def test_ranges(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError, match=r"^--(seed|temperature|steps)(=| is ).*give"):
            check(value)


@pytest.mark.parametrize(
    "module, arguments, flag",
    [
        ("eval", ["--workdir=W", "--seed=x"], "--seed"),
        ("eval", ["--workdir=W", "--seed=0,,1"], "--seed"),
        ("eval", ["--workdir=W", "--seed=1.5"], "--seed"),
        ("eval", ["--workdir=W", "--rows=many"], "--rows"),
        ("eval", ["--workdir=W", "--batch_size=1e3"], "--batch_size"),
        ("generate", ["--checkpoint=C", "--question=q", "--temperature=warm"], "--temperature"),
        ("generate", ["--checkpoint=C", "--question=q", "--steps=3.5"], "--steps"),
        ("diagnose.__main__", ["kl", "--workdir=W", "--temperature="], "--temperature"),
        ("diagnose.__main__", ["attention", "--workdir=W", "--seed=0,1"], "--seed"),
    ],
)
def test_what_does_not_parse_is_named_by_its_flag(module, arguments, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"opsd_jax.{module}").main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "lambda" not in message
    assert message.startswith((f"error: {flag}=", f"error: {flag}: ")), message


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (
            "eval",
            ["--workdir=W", "--seed=0,4294967296"],
            "--seed is 4294967296: give a whole number in [0, 4294967296); others would repeat",
        ),
        ("eval", ["--workdir=W", "--seed=-1"], "--seed is -1: give"),
        ("eval", ["--workdir=W", "--seed=3,4,3"], "--seed=3,4,3 names 3 twice"),
        (
            "eval",
            ["--workdir=W", "--visual_thoughts=none,none"],
            "--visual_thoughts=none,none names none twice",
        ),
        (
            "eval",
            ["--workdir=W", "--benchmarks=MMVP,BLINK,MMVP"],
            "--benchmarks=MMVP,BLINK,MMVP names MMVP twice",
        ),
        ("eval", ["--workdir=W", "--name=../../x"], "--name=../../x: give one folder name"),
        ("eval", ["--workdir=W", "--name=a/b"], "--name=a/b: give one folder name"),
        (
            "diagnose.__main__",
            ["kl", "--workdir=W", "--name=../x"],
            "--name=../x: give one folder name",
        ),
        (
            "diagnose.__main__",
            ["kl", "--workdir=W", "--seed=4294967296"],
            "--seed is 4294967296: give",
        ),
        (
            "diagnose.__main__",
            ["attention", "--workdir=W", "--benchmarks=a,a"],
            "--benchmarks=a,a names a twice",
        ),
        (
            "redraw",
            ["--workdir=W", "--target=T", "--splits=train,train"],
            "--splits=train,train names train twice",
        ),
        (
            "redraw",
            ["--workdir=W", "--target=T", "--batch_size=0"],
            "--batch_size is 0: give a whole number in [1, inf)",
        ),
        ("redraw", ["--workdir=W", "--target=T", "--seed=-2"], "--seed is -2: give"),
        (
            "generate",
            ["--checkpoint=C", "--question=q", "--temperature=nan"],
            "--temperature is nan: give",
        ),
        (
            "generate",
            ["--checkpoint=C", "--question=q", "--temperature=1e-40"],
            "--temperature is 1e-40: give",
        ),
        (
            "generate",
            ["--checkpoint=C", "--question=q", "--steps=1"],
            "--steps is 1: give a whole number in [2, inf)",
        ),
        (
            "generate",
            ["--checkpoint=C", "--question=q", "--max_new_tokens=0"],
            "--max_new_tokens is 0: give a whole number in [2, inf)",
        ),
        (
            "generate",
            ["--checkpoint=C", "--question=q", "--rounds=0"],
            "--rounds is 0: give a whole number in [1, inf)",
        ),
        (
            "generate",
            ["--checkpoint=C", "--question=q", "--seed=4294967296"],
            "--seed is 4294967296: give",
        ),
        ("generate", ["--checkpoint=C", "--question=q", f"--out={__file__}"], "is not a folder"),
        (
            "generate",
            ["--checkpoint=C", "--question=q", f"--out={__file__}/inside"],
            "is not a folder",
        ),
    ],
)
def test_wrong_values_end_a_command_before_anything_is_read(
    module, arguments, message, capsys, tmp_path, monkeypatch
):
    import importlib

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"opsd_jax.{module}").main(arguments)
    found = capsys.readouterr().err
    assert stopped.value.code == 1 and message in found and found.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(tmp_path):
    from opsd_jax.inputs import paths

    paths.check_writable("--out", tmp_path / "new" / "one")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/x", "gone", "gone/x"):
        with pytest.raises(
            ValueError, match=r"^--out=.*: .*/(file|gone) is not a folder: give another path"
        ):
            paths.check_writable("--out", tmp_path / place)


def opsd(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "opsd_jax", *arguments], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_options_alike(command):
    shown = opsd(command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: python -m opsd_jax.{command} [-h]")
    assert ("\noptions:\n" in shown.stdout) and shown.stderr == ""


# Options that need not be given, and then do nothing.
_OPTIONAL = {"--data_dir", "--against", "--image", "--out", "--only", "--workdir", "--config.KEY"}


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("eval", []),
        ("generate", []),
        ("convert", ["import"]),
        ("convert", ["export"]),
        ("redraw", []),
        ("doctor.__main__", []),
        ("study.__main__", []),
        ("data.__main__", ["prepare"]),
        ("data.__main__", ["make-mini"]),
        ("data.__main__", ["sizes"]),
        ("diagnose.__main__", ["kl"]),
        ("diagnose.__main__", ["attention"]),
    ],
)
def test_every_option_says_its_default_once(module, arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        importlib.import_module(f"opsd_jax.{module}").main([*arguments, "--help"])
    usage, shown = capsys.readouterr().out.split("\noptions:\n")
    for part in re.split(r"\n(?=  -)", shown):
        option, value, text = (" ".join(part.split()) + " .").split(" ", 2)
        takes_value = value.isupper() or value.startswith("{")
        required = f"[{option} " not in usage
        if takes_value and not required and option not in _OPTIONAL:
            assert text.count("default:") + text.count("(default, or 0:") == 1, part


@pytest.mark.parametrize(
    "module, arguments, said",
    [
        ("eval", ["--workdir=W", "--visual-thoughts=none"], "--visual_thoughts"),
        ("eval", ["--work-dir=W"], "--workdir"),  # not: --workdir is missing
        ("eval", ["-workdir=W"], "--workdir"),
        ("diagnose.__main__", ["kl", "--workdir=W", "--completion-s=data"], "--completions"),
        ("data.__main__", ["prepare", "--source=S", "--on-bad-row=skip"], "--on_bad_row"),
        ("convert", ["export", "--source=S", "--target=T", "--max-shard-gb=1"], "--max_shard_gb"),
        ("redraw", ["--workdir=W", "--traget=T"], "--target"),
        ("generate", ["--checkpoint=C", "--max-new-tokens=3"], "--max_new_tokens"),
    ],
)
def test_a_misspelt_option_is_named_with_the_one_that_is_meant(module, arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"opsd_jax.{module}").main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message.splitlines()) == 1
    assert f"there is no such option; did you mean {said}? (python -m opsd_jax." in message


@pytest.mark.parametrize(
    "module, arguments, said",
    [
        ("eval", ["--workdir=W", "--rows=abc"], "--rows=abc: give a whole number"),
        ("eval", ["--workdir=W", "--rows=1.5"], "--rows=1.5: give a whole number"),
        ("eval", ["--workdir=W", "--temperature=hot"], "--temperature=hot: give a number"),
        ("eval", [], "--workdir is missing"),
        ("generate", [], "--checkpoint and --question are missing"),
        ("eval", ["--workdir"], "--workdir has no value: write --workdir=VALUE"),
        ("eval", ["--workdir=W", "5"], "5: no option takes this; options are written --NAME=VALUE"),
        (
            "eval",
            ["--workdir=W", "--dtype=float3"],
            "--dtype=float3: choose from float32, bfloat16; did you mean 'float32'?",
        ),
        (
            "data.__main__",
            ["prepar"],
            "there is no command 'prepar': choose from prepare, make-mini, sizes, index; did you "
            "mean 'prepare'?",
        ),
        ("convert", [], "no command is given: choose from import, export"),
        ("diagnose.__main__", ["kl", "--workdir=W", "--rows="], "--rows=: give a whole number"),
    ],
)
def test_argparse_errors_say_what_was_typed_and_what_to_do(module, arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"opsd_jax.{module}").main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message.splitlines()) == 1
    assert message.startswith(f"error: {said} (python -m opsd_jax."), message


@pytest.mark.parametrize(
    "given, said",
    [
        ("--seed", "--config.seed or --config.data.make.seed"),
        ("--opsd.steps", "--config.opsd.steps"),
        ("--opsd.stesp", "--config.opsd.steps"),
        ("--run-arms", "--config.run_arms"),
        ("--run_arm", "--config.run_arms"),
        ("--max_token", "--config.rollout.max_new_tokens"),
        ("--tokeniser", "--config.tokenizer"),
        ("--workdr", "--workdir"),
        ("--optim.lr", "--config.autoencoder.optim.lr or --config.warmup.optim.lr or"),
    ],
)
def test_a_setting_without_config_is_suggested(given, said):
    message = cli.unknown_option(given, ["--workdir", "--arm", *config_flags.options()])
    assert message.startswith(f"{given}: there is no such option; did you mean {said}"), message


@pytest.mark.parametrize(
    "module, arguments, said",
    [
        ("data.__main__", ["sizes", "--config=C", "--cache-rows=1"], "--config.data.cache_rows"),
        ("doctor.__main__", ["--attention=flash"], "--config.model.attention"),
        ("study.__main__", ["--workdir=S", "--seed=1"], "--config.seeds"),
        ("study.__main__", ["--workdir=S", "--init-from=A"], "--config.changes.init_from"),
    ],
)
def test_commands_that_take_settings_suggest_them(module, arguments, said, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"opsd_jax.{module}").main(arguments)
    assert f"; did you mean {said}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, arguments, said",
    [
        ("diagnose.__main__", ["kll", "--workdir=W"], "'kl'"),
        ("diagnose.__main__", ["kl", "--checkpoint=C"], "--student or --teacher"),
        ("diagnose.__main__", ["attention", "--student=C"], "--checkpoint"),
        ("generate", ["--workdir=W", "--question=Q"], "--checkpoint"),
        ("generate", ["--checkpoint=C", "--question=Q", "--protocol=papr"], "'paper'"),
        ("data.__main__", ["prepar", "--source=S"], "'prepare'"),
        ("data.__main__", ["make-mini", "--target=T", "--difficulty=hrad"], "'hard'"),
        ("convert", ["exprot", "--source=S"], "'export'"),
    ],
)
def test_a_misspelt_choice_is_named_with_the_one_that_is_meant(module, arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"opsd_jax.{module}").main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message.splitlines()) == 1
    assert f"; did you mean {said}" in message


@pytest.mark.parametrize(
    "given, said",
    [
        ("configs/mimi.py", "configs/mini.py"),
        ("mini.py", "configs/mini.py"),
        ("configs/mini", "configs/mini.py"),
        ("config/qwen3.py:8B", "configs/qwen3.py"),
        ("configs/zzzzzz.py", ""),
    ],
)
def test_a_misspelt_config_file_is_named_with_the_one_that_is_meant(given, said, monkeypatch):
    monkeypatch.chdir(small_run.ROOT)
    with pytest.raises(SystemExit) as stopped:
        config_flags.read([f"--config={given}"])
    hint = f"; did you mean {said!r}?" if said else ""
    assert str(stopped.value).endswith(
        f"there is no such Python file: give one with get_config(), such as configs/mini.py{hint}"
    )


def test_a_config_file_with_a_colon_and_no_preset(monkeypatch):
    monkeypatch.chdir(small_run.ROOT)
    with pytest.raises(SystemExit, match="configs/qwen3.py: ends with a colon: name a preset"):
        config_flags.read(["--config=configs/qwen3.py:"])


def test_a_misspelt_choice_of_an_absl_flag(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_enum("only", "", ["", "sample", "update"], "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit, match="--only=sampel: choose from sample, update; did you mean"):
        config_flags.parse_flags(["plan", "--only=sampel"])


def test_values_are_no_misspelt_options_and_beginnings_are(capsys):
    parser = cli.Parser(prog="p")
    parser.add_argument("--visual_thoughts")
    parser.add_argument("--rest", nargs="*")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--visual=a"])
    assert ended.value.code == 2
    assert "--visual: there is no such option" in capsys.readouterr().err
    assert parser.parse_args(["--visual_thoughts", "-1"]).visual_thoughts == "-1"
    assert parser.parse_args(["--visual_thoughts=--x y"]).visual_thoughts == "--x y"
    assert cli.unknown_option("--zzz", ["--workdir"]) == "--zzz: there is no such option"


def test_one_name_for_all_commands():
    packages = {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    modules = {
        path.stem
        for path in PACKAGE.glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert set(COMMANDS) == packages | modules - {"__main__"}
    listed = opsd().stdout
    assert all(f"  {name} " in listed for name in COMMANDS)
    wrong = opsd("trian", "--workdir=w")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith(
        "error: no command 'trian'; did you mean train? Commands: train,"
    )
    assert opsd("eval").returncode == 2  # arguments of its own are missing
