"""The procedural tasks: disjoint splits, gold answers, files that the readers of the released data
accept.
"""

import dataclasses
import io
import itertools
import json
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from opsd_jax import tasks
from opsd_jax.tasks import (
    FAMILIES,
    VISUAL,
    extract_answer,
    generate,
    jigsaw,
    parquet,
    score,
    vocabulary,
    wrong_traces,
)

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def rows_of(family, split, count, **settings):
    return list(generate(family, split, count, seed=3, **settings))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        vocabulary.build_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder)


# ---- rows


@pytest.mark.parametrize("difficulty", ["easy", "default", "hard"])
@pytest.mark.parametrize("family", VISUAL)
def test_rows_are_whole_and_gold_answers_score(family, difficulty):
    rows = rows_of(family, "train", 200, difficulty=difficulty)
    assert len({row.pid for row in rows}) == 200 and rows[12].pid == f"{family}-train-0000012"
    assert len({row.problem_image.tobytes() + row.question.encode() for row in rows}) == 200
    side = 8 * FAMILIES[family].DIFFICULTY[difficulty]["grid"]
    for row in rows:
        assert (
            score(row.metadata, row.answer)
            and tasks.fault(row.metadata, f"<answer>{row.answer}</answer>") is None
        )
        assert row.task == FAMILIES[family].TASK and row.metadata["family"] == family
        assert json.loads(json.dumps(row.metadata)) == row.metadata
        (thought,) = row.visual_thoughts
        assert row.problem_image.shape == thought.shape == (side, side, 3)
        assert row.problem_image.dtype == thought.dtype == np.uint8
        assert (row.problem_image != thought).any()
        for text in (row.question, *row.thoughts, row.answer, row.full_text_only_thought):
            assert text == " ".join(text.split()) and "<" not in text
        assert row.full_text_only_thought == " ".join(row.thoughts)


@pytest.mark.parametrize("family", VISUAL)
def test_streams_are_reproducible_and_differ_by_seed_and_split(family):
    def stream(count, seed, split="train"):
        return [
            (row.pid, row.answer, row.problem_image.tobytes())
            for row in generate(family, split, count, seed=seed)
        ]

    assert stream(5, 0) == stream(20, 0)[:5]
    images = [[image for *_, image in stream(5, *which)] for which in ((0,), (1,), (0, "test"))]
    assert all(a != b for a, b in itertools.combinations(images, 2))


def test_streams_do_not_depend_on_the_process():
    """Python salts `hash` anew in each process; splits and streams must not feel it."""
    program = (
        "from opsd_jax.tasks import generate; import zlib\n"
        "rows = generate('search', 'test', 4, seed=3)\n"
        "print([zlib.crc32(row.problem_image.tobytes()) for row in rows])"
    )
    here = [zlib.crc32(row.problem_image.tobytes()) for row in rows_of("search", "test", 4)]
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == str(here)


def test_importing_the_tasks_is_light():
    program = (
        "import sys, opsd_jax.tasks.parquet\n"
        "print({'jax', 'flax', 'transformers', 'tokenizers', 'pyarrow', 'PIL'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


# ---- splits: what a near-duplicate is, read from the pixels and texts alone


def maze_of(row):
    """The lake cropped out of the image ("#" is a hole), told by the middle pixel of each cell."""
    colors = {(200, 225, 245): ".", (20, 40, 90): "#", (40, 180, 60): "S", (235, 180, 30): "G"}
    lines = [
        "".join(colors.get(tuple(pixel), " ") for pixel in line).strip()
        for line in row.problem_image[4::8, 4::8].tolist()
    ]
    return [line for line in lines if line]


def symmetries(maze):
    for _ in range(4):
        maze = ["".join(column) for column in zip(*maze[::-1], strict=True)]  # a quarter turn
        yield tuple(maze)
        yield tuple(line[::-1] for line in maze)


def chart_of(row):
    return tuple((row.problem_image[:-1, 4::8] != 250).any(-1).sum(0))


def search_of(row):
    side = row.problem_image.shape[0]
    masks = (row.problem_image != 245).any(-1)
    return masks.reshape(side, side).tobytes()


def jigsaw_of(row):
    """The pieces without their frames, in any order."""
    quarters = row.problem_image.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, 16, 16, 3)
    return frozenset(piece[2:-2, 2:-2].tobytes() for piece in quarters)


def test_maze_pixels_say_what_the_metadata_says():
    for row in rows_of("maze", "train", 100):
        assert [
            line.replace("F", ".").replace("H", "#") for line in row.metadata["map"]
        ] == maze_of(row)


@pytest.mark.parametrize(
    "family, look",
    [
        ("maze", lambda row: min(symmetries(maze_of(row)))),
        ("chart", chart_of),
        ("search", search_of),
        ("jigsaw", jigsaw_of),
    ],
)
def test_splits_share_no_near_duplicates(family, look):
    looks = {
        split: [look(row) for row in rows_of(family, split, count)]
        for split, count in {"train": 3000, "validation": 200, "test": 200}.items()
    }
    for one, other in itertools.combinations(looks, 2):
        assert not set(looks[one]) & set(looks[other])
    for split in ("validation", "test"):
        assert len(set(looks[split])) == 200


def test_maze_splits_hold_across_difficulties_and_seeds():
    test = {
        min(symmetries(maze_of(row)))
        for row in generate("maze", "test", 20, seed=8, difficulty="easy", sizes=(3,))
    }
    train = {
        min(symmetries(maze_of(row))) for row in generate("maze", "train", 1500, seed=9, sizes=(3,))
    }
    assert len(train) > 120  # nearly all that belong to train, of 179 in all
    assert not test & train


def test_search_splits_share_no_layout_of_shapes():
    """In a world of 144 layouts, where chance alone would mix the splits."""
    looks = {
        split: {search_of(row) for row in rows_of("search", split, count, grid=2, objects=2)}
        for split, count in {"train": 500, "validation": 8, "test": 8}.items()
    }
    assert len(looks["train"]) > 90
    assert not any(looks[one] & looks[other] for one, other in itertools.combinations(looks, 2))


def test_jigsaw_key_is_the_image_whatever_the_order():
    def make(picture, order):
        rng = types.SimpleNamespace(
            integers=np.random.default_rng(picture).integers,
            permutation=np.random.default_rng(order).permutation,
        )
        key, fields = jigsaw.make(rng, **jigsaw.DIFFICULTY["default"])
        return key, fields["problem_image"].tobytes()

    keys, images = zip(*(make(0, order) for order in range(10)), strict=True)
    assert len(set(keys)) == 1 < len(set(images))
    assert len({make(picture, 0)[0] for picture in range(100)}) == 100


def test_train_holds_mazes_that_validation_would_call_duplicates():
    looks = [min(symmetries(maze_of(row))) for row in rows_of("maze", "train", 500)]
    assert len(set(looks)) < 500


@pytest.mark.slow
def test_exhausted_space():
    with pytest.raises(
        ValueError, match=r"maze/test: only \d+ of 1000 distinct problems .* ask for fewer"
    ):
        rows_of("maze", "test", 1000, sizes=(3,))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("snake", "train", {}), "unknown family: 'snake'; choose from maze, jigsaw"),
        (("maze", "dev", {}), "unknown split: 'dev'"),
        (("maze", "train", {"difficulty": "brutal"}), "unknown difficulty of maze: 'brutal'"),
        (("maze", "train", {"size": 3}), "unknown setting of maze: 'size'"),
    ],
)
def test_wrong_arguments_raise_before_iteration(arguments, message):
    family, split, settings = arguments
    with pytest.raises(ValueError, match=message):
        generate(family, split, 1, seed=0, **settings)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("maze", {"sizes": (3, 5)}, "between 2 and grid=4"),
        ("maze", {"sizes": (2,)}, "no maze with a shortest path of 3"),
        ("chart", {"grid": 7}, "grid <= 6"),
        ("chart", {"kinds": ("median",)}, "must be among"),
        ("search", {"objects": 17}, "between 2 and"),
        ("search", {"relations": ("beside",)}, "must be some of"),
        ("jigsaw", {"columns": 3}, "both numbers divide"),
        ("jigsaw", {"frame": 8}, "leave space"),
    ],
)
def test_settings_that_do_not_fit_raise(family, settings, message):
    with pytest.raises(ValueError, match=message):
        rows_of(family, "train", 1, **settings)


# ---- what the images and texts say


def test_maze_thought_walks_the_shortest_path():
    for row in rows_of("maze", "train", 100):
        names = row.thoughts[1].split()[1:]
        scene, holes = row.thoughts[0].split(" holes ")
        assert scene == f"start {names[0]} goal {names[-1]}"
        assert len(holes.split()) == max("".join(row.metadata["map"]).count("H"), 1)
        assert (holes == "none") == ("H" not in "".join(row.metadata["map"])) and not set(
            holes.split()
        ) & set(names)
        cells = [(int(name[1]), int(name[2])) for name in names]
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(cells)]
        assert steps == [MOVES[move] for move in row.answer.split()]
        assert 3 <= len(steps) == row.metadata["moves"] <= 8
        # The red line runs over these cells and no others.
        red = (row.visual_thoughts[0] == (230, 20, 20)).all(-1).reshape(4, 8, 4, 8).any((1, 3))
        assert {tuple(cell) for cell in np.argwhere(red).tolist()} == set(cells)
        assert len(steps) == shortest(maze_of(row))


def shortest(maze):
    size = len(maze)
    reached, moves = (
        {next((r, c) for r in range(size) for c in range(size) if maze[r][c] == "S")},
        0,
    )
    while not any(maze[r][c] == "G" for r, c in reached):
        reached |= {
            (r + y, c + x)
            for r, c in reached
            for y, x in MOVES.values()
            if 0 <= r + y < size and 0 <= c + x < size and maze[r + y][c + x] != "#"
        }
        moves += 1
    return moves


def test_chart_thought_keeps_the_bar_that_is_asked_for():
    for row in rows_of("chart", "train", 100):
        heights = sorted(chart_of(row), reverse=True)
        rank = ("second highest", "third highest").index(
            row.question.removeprefix("Height of the ")[:-5]
        ) + 1
        assert row.answer == f"n{heights[rank] // 4}"  # 4 pixels a unit
        kept = (row.visual_thoughts[0] == row.problem_image).all(-1)[:-1, 4::8] & (
            row.problem_image[:-1, 4::8] != 250
        ).any(-1)
        assert kept.any(0).sum() == 1 and kept.sum() == heights[rank]


def test_search_thought_boxes_the_object_beside_the_named_one():
    steps = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for row in rows_of("search", "train", 100):
        boxed = np.argwhere((row.visual_thoughts[0] == 0).all(-1).reshape(4, 8, 4, 8).any((1, 3)))
        _, where, color, shape = row.thoughts[1].split()
        assert [f"c{y}{x}" for y, x in boxed] == [where] and color == row.answer
        down, right = steps[row.metadata["relation"]]
        (y, x), (_, anchor, kind) = boxed[0], row.thoughts[0].split()
        cells = row.problem_image.reshape(4, 8, 4, 8, 3).swapaxes(1, 2)
        look = cells[y - down, x - right]
        assert sum(np.array_equal(look, cells[place]) for place in np.ndindex(4, 4)) == 1
        assert row.question.endswith(f" {anchor} {kind}?") and (look != 245).any()


def test_jigsaw_answer_puts_the_pieces_where_the_thought_shows_them():
    def cut(image):
        return image.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, 16, 16, 3)

    orders = set()
    for row in rows_of("jigsaw", "train", 200):
        pieces, places = cut(row.problem_image), cut(row.visual_thoughts[0])
        for place, letter in zip(places, row.answer.split(), strict=True):
            np.testing.assert_array_equal(place, pieces["ABCD".index(letter)])
        orders.add(row.answer)
    assert len(orders) == 23  # all but "A B C D"


# ---- scoring


def test_maze_scoring():
    metadata = {"family": "maze", "map": ["SFF", "HHF", "GFF"]}
    assert score(metadata, "R R D D L L")
    assert score(metadata, "R L R R D D U D L L")  # any safe path
    assert score(metadata, "  R R D D\nL L ")
    for wrong in (
        None,
        "",
        "R R D D L",
        "R R D D L L R",
        "D D",
        "R R R D D L L",
        "L R R D D L L",
        "R,R,D,D,L,L",
        "RRDDLL",
        "r r d d l l",
        "R R X D D L L",
        "path c00 c01",
    ):
        assert not score(metadata, wrong), wrong


@pytest.mark.parametrize(
    "family, gold, wrong",
    [
        ("chart", "n7", ["n8", "7", "n7 n7", "N7", "", None]),
        ("search", "red", ["blue", "red circle", "", None]),
        ("jigsaw", "B A D C", ["B A C D", "B A D", "BADC", "B A D C A", "", None]),
    ],
)
def test_exact_scoring(family, gold, wrong):
    metadata = {"family": family, "answer": gold}
    assert score(metadata, gold) and score(metadata, f" {gold}\n")
    assert not any(score(metadata, answer) for answer in wrong)


def test_score_needs_a_known_family():
    with pytest.raises(ValueError, match="unknown family in the metadata: None"):
        score({"answer": "n7"}, "n7")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>x</think><answer> R D </answer>", "R D"),
        ("<answer>A</answer> no, <answer>B</answer> or <answer>C", "B"),
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer>A</answer></answer>", "A"),
        ("<answer>R\nD</answer>", "R\nD"),
        ("<answer></answer>", ""),
        ("<answer>A", None),
        ("A</answer>", None),
        ("</answer>A<answer>", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


# ---- tokenizer


def test_each_word_is_one_token(tokenizer):
    words = vocabulary.words()
    assert len(words) == len(set(words)) and {"c23", "R", "n7", "reference", "answer"} <= set(words)
    for text in (
        *words,
        *(" " + word for word in words),
        *vocabulary.TAGS,
        *vocabulary.SPECIAL_TOKENS,
    ):
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode([token]) == text
    assert 400 <= len(tokenizer) <= 512
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"
    assert (
        tokenizer.convert_tokens_to_ids(list(vocabulary.SPECIAL_TOKENS))
        == [*range(len(tokenizer))][-5:]
    )


@pytest.mark.parametrize("difficulty", ["easy", "default", "hard"])
@pytest.mark.parametrize("family", VISUAL)
def test_traces_take_one_token_a_word(tokenizer, family, difficulty):
    for row in rows_of(family, "train", 50, difficulty=difficulty):
        trace = (
            f"<think>{row.thoughts[0]}</think><image_start><image_end><think>{row.thoughts[1]}</think>"
            f"<answer>{row.answer}</answer>"
        )
        words = sum(len(text.split()) for text in (*row.thoughts, row.answer))
        assert len(tokenizer.encode(trace, add_special_tokens=False)) == words + 8
        question = tokenizer.encode(row.question, add_special_tokens=False)
        assert len(question) == len(row.question.split()) + 1  # its "?" or "."


def test_any_text_comes_back(tokenizer):
    rng = np.random.default_rng(0)
    texts = [
        "",
        " ",
        "\n\n",
        "\t x  y ",
        "ünïcode 汉字 🦊\u200d é\u0301",
        "<think",
        "Ġ Ċ",
        "\x00\x7f",
        "starting c111 <image_start>x<",
        "a</think><image_start>",
        "<|im_start|>hi<|im_end|>",
    ]
    letters = [chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000] + vocabulary.words()
    texts += ["".join(rng.choice(letters, 40)) for _ in range(100)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            == text
        )


def test_rebuilt_tokenizer_is_identical_and_not_overwritten(tmp_path):
    vocabulary.build_tokenizer(tmp_path / "a")
    vocabulary.build_tokenizer(tmp_path / "b", families=list(FAMILIES))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(files) >= {"tokenizer.json", "tokenizer_config.json"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        vocabulary.build_tokenizer(tmp_path / "a")
    vocabulary.build_tokenizer(tmp_path / "a", families=["chart"], overwrite=True)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() != files["tokenizer.json"]


# ---- files


def test_parquet_in_the_released_schema(tmp_path):
    import pyarrow.parquet as pq

    rows = rows_of("maze", "train", 25)
    paths = parquet.write(iter(rows), tmp_path, split="train", shard_rows=10)
    folder = tmp_path / "Spatial_Navigation" / "data"
    assert paths == [folder / f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert sorted(folder.iterdir()) == paths
    schema = pq.read_schema(paths[0])
    assert schema.names == [
        "pid",
        "question",
        "answer",
        "problem_image_0",
        "resoning_thought_0",
        "reasoning_image_0",
        "resoning_thought_1",
        "task",
        "full_text_only_thought",
        "metadata",
    ]
    for name in schema.names:
        kind = "struct<bytes: binary, path: string>" if "image" in name else "string"
        assert str(schema.field(name).type) == kind
    records = [record for path in paths for record in pq.read_table(path).to_pylist()]
    for row, record in zip(rows, records, strict=True):
        assert (record["pid"], record["question"], record["answer"]) == (
            row.pid,
            row.question,
            row.answer,
        )
        assert (record["resoning_thought_0"], record["resoning_thought_1"]) == row.thoughts
        assert (record["task"], record["full_text_only_thought"]) == (
            row.task,
            row.full_text_only_thought,
        )
        assert score(json.loads(record["metadata"]), record["answer"])
        for name, image in (("problem", row.problem_image), ("reasoning", row.visual_thoughts[0])):
            encoded = record[f"{name}_image_0"]["bytes"]
            assert encoded.startswith(b"\x89PNG")
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)


def test_parquet_is_not_overwritten_unless_asked(tmp_path):
    (path,) = parquet.write(rows_of("chart", "test", 3), tmp_path, split="test")
    before = path.read_bytes()
    with pytest.raises(
        FileExistsError, match="test-00000-of-00001.parquet exists; .*overwrite=True"
    ):
        parquet.write(rows_of("chart", "test", 4), tmp_path, split="test")
    assert path.read_bytes() == before
    parquet.write(
        rows_of("chart", "validation", 3), tmp_path, split="validation"
    )  # another split may join
    paths = parquet.write(
        rows_of("chart", "test", 4), tmp_path, split="test", shard_rows=2, overwrite=True
    )
    assert (
        sorted(path.parent.glob("test*")) == paths and len(paths) == 2
    )  # the old single shard is gone


def test_failed_write_leaves_nothing_and_keeps_the_old(tmp_path):
    (path,) = parquet.write(rows_of("chart", "train", 2), tmp_path, split="train")
    good = rows_of("chart", "train", 2)
    bad = dataclasses.replace(good[0], pid="chart-x", thoughts=("one",))
    with pytest.raises(ValueError, match="chart-x has 1 thoughts"):
        parquet.write([*good, bad], tmp_path, split="train", shard_rows=1, overwrite=True)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="write each task on its own"):
        parquet.write(
            rows_of("chart", "test", 1) + rows_of("search", "test", 1), tmp_path, split="test"
        )
    with pytest.raises(ValueError, match="shard_rows=0"):
        parquet.write(good, tmp_path, split="test", shard_rows=0)
    with pytest.raises(ValueError, match="no examples"):
        parquet.write([], tmp_path, split="test")


def test_make_mini(tmp_path):
    import pyarrow.parquet as pq

    target = tmp_path / "deep" / "mini"
    parquet.make_mini(target, families=["chart", "search"], counts={"train": 6, "test": 2}, seed=3)
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert names == sorted(
        [
            f"parquet/{task}/data/{split}-00000-of-00001.parquet"
            for task in ("Chart_Refocus", "Visual_Search")
            for split in ("test", "train")
        ]
        + ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    )
    table = pq.read_table(target / "parquet/Chart_Refocus/data/train-00000-of-00001.parquet")
    found = dict(zip(table["pid"].to_pylist(), table["answer"].to_pylist()))
    assert found == {
        row.pid: row.answer for row in rows_of("chart", "train", 6)
    }  # in another order
    with pytest.raises(FileExistsError, match="not an empty folder"):
        parquet.make_mini(target, families=["chart"], counts={"train": 1}, seed=3)
    with pytest.raises(ValueError, match="unknown difficulty"):
        parquet.make_mini(
            tmp_path / "b", families=["chart"], counts={"train": 1}, seed=3, difficulty="x"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in target.parent.iterdir()] == ["mini"]


@pytest.mark.parametrize("family", VISUAL)
def test_wrong_traces_are_those_of_other_examples(family):
    rows = rows_of(family, "train", 60)
    by_pid = {row.pid: row for row in rows}
    found = wrong_traces.mixed_in(rows, 1 / 3, tasks.generator("x"))
    wrong = ["trace_of" in row.metadata for row in found]
    assert wrong == [n % 3 == 2 for n in range(60)]  # of every first n rows a third
    same_question = 0
    for before, row, is_wrong in zip(rows, found, wrong):
        if not is_wrong:
            assert row is before
            continue
        other = by_pid[row.metadata["trace_of"]]
        assert row.thoughts == other.thoughts and other is not before
        assert row.full_text_only_thought == other.full_text_only_thought
        assert row.metadata["trace_answer"] == other.answer
        assert not score(row.metadata, other.answer) and score(row.metadata, row.answer)
        assert tasks.fault(row.metadata, f"<answer>{row.answer}</answer>") is None
        assert row.visual_thoughts is before.visual_thoughts and row.answer == before.answer
        same_question += other.question == row.question
    assert same_question == 20 or family == "search"  # whose questions are many


def test_wrong_traces_need_a_wrong_answer():
    (row,) = rows_of("chart", "train", 1)
    with pytest.raises(ValueError, match="has no wrong trace: of 2 examples of its split none"):
        wrong_traces.mixed_in([row, row], 0.5, tasks.generator("x"))


def test_wrong_traces_leave_all_else_of_the_data_alone(tmp_path):
    import pyarrow.parquet as pq

    def made(name, **settings):
        parquet.make_mini(
            tmp_path / name, families=["chart"], counts={"train": 40, "test": 20}, **settings
        )
        folder = tmp_path / name / "parquet" / "Chart_Refocus" / "data"
        return {split: (folder / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}

    right, wrong = made("a"), made("b", wrong=0.5)
    assert right["test"].read_bytes() == wrong["test"].read_bytes()
    before, after = (pq.read_table(files["train"]) for files in (right, wrong))
    changed = {"resoning_thought_1", "full_text_only_thought", "metadata"}
    for column in before.column_names:
        assert before[column].equals(after[column]) == (column not in changed), column
    marked = ["trace_answer" in json.loads(text) for text in after["metadata"].to_pylist()]
    assert marked == [False, True] * 20


@pytest.mark.slow
def test_the_first_rows_of_a_split_are_like_all_of_it(tmp_path):
    """`generate` uses up the small mazes first; a subset of the first rows must not hold them
    all.
    """
    import pyarrow.parquet as pq

    for target in ("a", "b"):
        parquet.make_mini(tmp_path / target, families=["maze"], counts={"test": 512})
    one, other = (
        pq.read_table(
            tmp_path / target / "parquet/Spatial_Navigation/data/test-00000-of-00001.parquet"
        )
        for target in ("a", "b")
    )
    assert one.equals(other)
    assert {*one["pid"].to_pylist()} == {f"maze-test-{n:07d}" for n in range(512)}
    small = np.array([len(json.loads(text)["map"]) == 3 for text in one["metadata"].to_pylist()])
    parts = small.reshape(4, 128).sum(1)
    assert small.sum() > 8 and parts.max() <= small.sum() / 2 and (parts > 0).sum() >= 3


@pytest.mark.parametrize(
    "metadata, answer, fault",
    [
        ({}, "<answer>B</answer>", None),
        ({"family": "chart", "answer": "n7"}, "<answer>n7</answer>", None),
        ({"family": "maze", "map": ["SF", "HG"]}, "<answer>R D</answer>", None),
        ({}, "<answer>B", "answer has <answer> without </answer>"),
        ({}, "<answer> </answer>", "answer is empty"),
        ({}, "<answer>\u200b</answer>", "answer is empty"),
        ({"trace_answer": "C"}, "<answer>B</answer>", None),
        ({"trace_answer": " "}, "<answer>B</answer>", "metadata has trace_answer ' ', which is no"),
        ({"trace_answer": 7}, "<answer>B</answer>", "metadata has trace_answer 7, which is no"),
        ({"family": "chess"}, "<answer>n7</answer>", "metadata has family 'chess'"),
        ({"family": ["maze"]}, "<answer>n7</answer>", "metadata has family"),
        *[
            ({"family": family}, "<answer>n7</answer>", "metadata has no text 'answer'")
            for family in ("chart", "search", "jigsaw")
        ],
        (
            {"family": "chart", "answer": 7},
            "<answer>7</answer>",
            "metadata has no text 'answer', only 7",
        ),
        (
            {"family": "chart", "answer": "n7"},
            "<answer>n8</answer>",
            "answer 'n8' is wrong by the row's metadata",
        ),
        *[
            ({"family": "maze"} | metadata, "<answer>R</answer>", "metadata has no 'map'")
            for metadata in ({}, {"map": None}, {"map": "SG"}, {"map": ["SG"]}, {"map": [1]})
        ],
        (
            {"family": "maze", "map": ["FF", "HG"]},
            "<answer>R D</answer>",
            "metadata has a 'map' without start S:",
        ),
        (
            {"family": "maze", "map": ["SF", "HF"]},
            "<answer>R D</answer>",
            "metadata has a 'map' without goal G:",
        ),
        (
            {"family": "maze", "map": []},
            "<answer>R D</answer>",
            "metadata has a 'map' without start S and goal G:",
        ),
        ({"family": "maze", "map": ["SH", "HG"]}, "<answer>R D</answer>", "answer 'R D' is wrong"),
    ],
)
def test_rows_that_no_answer_can_match_are_told(metadata, answer, fault):
    found = tasks.fault(metadata, answer)
    assert found is None if fault is None else found.startswith(fault)
