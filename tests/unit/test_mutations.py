"""Small valid inputs, damaged at random: whatever reads them succeeds, or raises an error that a
user understands.

Each seed makes one change to one file: a JSON value of another type, a key dropped, a file cut,
emptied or replaced. The commands print ValueError and OSError in one line; anything else is a
traceback, and a fault.
"""

import base64
import csv
import io
import json
import os
import pathlib
import shutil
import struct

import numpy as np
import pytest
import test_tokenizer
from PIL import Image

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, tokenizer
from opsd_jax.data import arrayrecord, prepare, shards, workdir
from opsd_jax.evaluation import prompts, table_scores
from opsd_jax.evaluation import tables as tables_lib
from opsd_jax.release import folders, importing, load, metadata
from opsd_jax.runtime import checkpoint

VALUES = [
    None,
    "",
    "64",
    "1e6",
    "text",
    [],
    [1, 2],
    ["a"],
    [None],
    {},
    {"a": 1},
    {"type": "default"},
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    0.5,
    -2.5,
    10**6,
    10**9,
    10**400,
    float("nan"),
    float("inf"),
    "\x00",
    "\ud83e",
]
WHOLE = [[], None, "text", 3, {}, [{}], True]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 29206\n"


def places(value, path=()):
    """The paths of all keys and entries of a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [
        found for key, child in items for found in [path + (key,), *places(child, path + (key,))]
    ]


def damage_json(rng, content):
    """(a JSON value with one change, what was changed)."""
    if rng.random() < 0.05:
        whole = WHOLE[rng.integers(len(WHOLE))]
        return whole, f"the whole file: {whole!r}"
    content = json.loads(json.dumps(content))
    paths = places(content)
    depth = rng.integers(
        1, max(map(len, paths)) + 1
    )  # or vocabularies would be all that is changed
    paths = [path for path in paths if len(path) == depth]
    path = paths[rng.integers(len(paths))]
    place = content
    for key in path[:-1]:
        place = place[key]
    if rng.random() < 0.2:
        del place[path[-1]]
        return content, f"{path} dropped"
    value = VALUES[rng.integers(len(VALUES))]
    place[path[-1]] = value
    return content, f"{path}: {value!r}"


def damage_bytes(rng, data):
    """(the bytes of a file with one change, what was changed)."""
    kind = rng.integers(8)
    at = int(rng.integers(max(len(data), 1)))
    if kind == 0:
        return b"", "emptied"
    if kind == 1:
        return data[:at], f"cut at {at}"
    if kind == 2:
        return b"\0" * len(data), "zeros"
    if kind == 3:
        return b"\xef\xbb\xbf" + data, "with a byte order mark"
    if kind == 4:
        return LFS, "a Git LFS pointer"
    if kind == 5:
        return b"<!DOCTYPE html><html>401 Unauthorized</html>", "an error page"
    at = at % 400 if kind == 6 else at  # where the headers are
    noise = rng.integers(0, 256, 8, np.uint8).tobytes()
    return data[:at] + noise + data[at + 8 :], f"8 random bytes at {at}"


def damage_columns(rng, columns):
    """({column: values} with one column changed, what was changed)."""
    columns, name = dict(columns), str(rng.choice(list(columns)))
    kind = rng.integers(3)
    if kind == 0:
        del columns[name]
        return columns, f"{name} dropped"
    if kind == 1:
        return {
            f"{key}_" if key == name else key: values for key, values in columns.items()
        }, f"{name} renamed"
    value = VALUES[rng.integers(len(VALUES))]
    value = (
        10**18 if value == 10**400 else None if value == {} else value
    )  # what parquet cannot hold
    rows = [value] * len(columns[name])
    if rng.random() < 0.5 and isinstance(value, str | None):  # of one row, where the type stays
        rows = [value, *columns[name][1:]]
    return columns | {name: rows}, f"{name}: {value!r}"


def damage_parquet(rng, data):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()
    columns, what = damage_columns(rng, table)
    try:
        table = pyarrow.table(columns)
    except (
        pyarrow.ArrowException,
        UnicodeEncodeError,
        OverflowError,
    ):  # a type within a column changed
        return damage_bytes(rng, data)
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue(), what


def damage_tsv(rng, data):
    header, *lines = csv.reader(io.StringIO(data.decode()), delimiter="\t")
    columns, what = damage_columns(rng, dict(zip(header, map(list, zip(*lines)))))
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerows([list(columns), *zip(*columns.values())])
    return out.getvalue().encode(errors="surrogatepass"), what


def damage(rng, path: pathlib.Path) -> str:
    """Changes a file: most of the time a value of its content, else bytes."""
    data = path.read_bytes()
    path.unlink()  # it may be a link
    tables = {".parquet": damage_parquet, ".tsv": damage_tsv}
    if path.suffix == ".json" and rng.random() < 0.8:
        content, what = damage_json(rng, json.loads(data))
        data = json.dumps(content).encode()
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        length = struct.unpack("<Q", data[:8])[0]
        content, what = damage_json(rng, json.loads(data[8 : 8 + length]))
        head = json.dumps(content).encode()
        data = struct.pack("<Q", len(head)) + head + data[8 + length :]
    elif path.suffix in tables and rng.random() < 0.7:
        data, what = tables[path.suffix](rng, data)
    else:
        data, what = damage_bytes(rng, data)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def linked(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of a folder whose files are links, so that it costs nothing."""
    return pathlib.Path(shutil.copytree(source, target, copy_function=os.link))


def check(seeds, source, target, names, work, keys=()) -> None:
    """Damages one of the files for each seed and does the work; fails with every outcome that is no
    clear error.

    keys: what an error may name instead of the file.
    """
    wrong, refused = [], 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        folder = linked(source, target / str(seed))
        path = folder / names[seed % len(names)]
        what = damage(rng, path)
        try:
            work(folder)
        except (ValueError, OSError) as error:
            refused += 1
            said = str(error)
            if type(error) in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError):
                wrong.append(f"seed {seed}, {what}: a bare {type(error).__name__}")
            elif not any(name in said for name in (str(folder), path.name, *keys)):
                wrong.append(f"seed {seed}, {what}: names neither file nor folder: {said}")
        except (
            BaseException
        ) as error:  # the parsers written in Rust raise PanicException, which is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong)
    assert refused > len(seeds) // 10


# --- released and imported folders ----------------------------------------------------------------

SIZES = ["llm_config.json", "vit_config.json", "config.json", "ae_params.json"]


@pytest.mark.parametrize("copies", [True, False])
def test_config_files_of_a_release(released, tmp_path, copies):
    """The sizes alone are read, so many of them.

    Without the copies in config.json no disagreement saves the reader.
    """
    folder = linked(released, tmp_path / "release")
    if not copies:
        top = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(
            json.dumps({key: top[key] for key in ("latent_patch_size", "max_latent_size")})
        )
    check(
        range(400),
        folder,
        tmp_path,
        SIZES,
        lambda folder: folders.read_config(str(folder), generation=True),
    )


@pytest.mark.slow
def test_weights_and_configs_of_a_release(released, tmp_path):
    check(
        range(1000, 1150),
        released,
        tmp_path,
        ["model.safetensors", "ae.safetensors", *SIZES],
        lambda folder: load.load(str(folder), generation=True),
    )


@pytest.mark.parametrize("with_json", [True, False])
def test_tokenizer_files(tmp_path, with_json):
    def work(folder):
        found = tokenizer.load(str(folder), vocab_size=1000)
        found.decode(found.encode("What is in the image? <|im_end|> 42"))

    files = (
        ["tokenizer.json", "tokenizer_config.json"]
        if with_json
        else ["vocab.json", "merges.txt", "tokenizer_config.json"]
    )
    check(
        range(2000, 2100),
        test_tokenizer.write(tmp_path / "t", with_json=with_json),
        tmp_path,
        files,
        work,
    )


def test_shards_of_a_release(released, tmp_path):
    """Their index, and the headers."""
    folder = linked(released, tmp_path / "sharded")
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    rows = json.loads(data[8 : 8 + length])
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "metadata": {"total_size": 1},
                "weight_map": dict.fromkeys(
                    [name for name in rows if name != "__metadata__"],
                    "model-00001-of-00001.safetensors",
                ),
            }
        )
    )
    config = folders.read_config(str(folder))
    check(
        range(3000, 3060),
        folder,
        tmp_path / "damaged",
        ["model.safetensors.index.json"],
        lambda folder: load.plan(str(folder), config, None),
    )


@pytest.fixture(scope="module")
def imported(released, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "understanding"
    importing.import_release(str(released), str(target), only="understanding")
    return target


def test_an_imported_folder(imported, tmp_path):
    """Its note, its configs, and the metadata of its checkpoint."""

    def work(folder):
        found = checkpoint.metadata(folder)
        metadata.model_config(found["config"], str(folder))
        folders.read_import_source(str(folder))
        folders.read_config(str(folder))

    small = [
        path.relative_to(imported).as_posix()
        for path in sorted((imported / "checkpoints/0").rglob("*"))
        if path.is_file()
        and path.name
        in ("orbax.checkpoint", "_CHECKPOINT_METADATA", "_METADATA", "checkpoint_metadata")
    ]
    assert small
    check(
        range(4000, 4080),
        imported,
        tmp_path,
        ["release/source.json", "release/llm_config.json", *small],
        work,
    )


@pytest.mark.slow
def test_weights_of_an_imported_folder(imported, tmp_path):
    """Any file of its checkpoint."""
    names = [
        path.relative_to(imported).as_posix()
        for path in sorted((imported / "checkpoints").rglob("*"))
        if path.is_file()
    ]
    check(range(5000, 5040), imported, tmp_path, names, lambda folder: load.load(str(folder)))


# --- data -----------------------------------------------------------------------------------------


def png(seed=0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(
        out, "PNG"
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A task of four rows in the released layout."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("parquet")

    def picture(n):
        return {"bytes": png(n), "path": None}

    rows = [
        {
            "pid": f"p{n}",
            "question": "Which?",
            "answer": "B",
            "task": "Maze",
            "full_text_only_thought": "so B",
            "metadata": "{}",
            "problem_image_0": picture(n),
            "resoning_thought_0": "look",
            "reasoning_image_0": picture(n),
        }
        for n in range(4)
    ]
    (folder / "Maze" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / "Maze" / "data" / "train-00000-of-00001.parquet"
    )
    return folder


def read_all(folder):
    source = arrayrecord.open_source(folder, "train", task="Maze")
    return [source[n] for n in range(len(source))]


@pytest.mark.slow
def test_parquet_files(parquet, tmp_path):
    def work(folder):
        prepare.prepare(folder, folder / "out", progress=False)
        read_all(folder / "out")

    check(range(6000, 6100), parquet, tmp_path, ["Maze/data/train-00000-of-00001.parquet"], work)


@pytest.mark.slow
def test_prepared_folders(parquet, tmp_path):
    """Read, and prepared again."""
    prepared = tmp_path / "prepared"
    prepare.prepare(parquet, prepared, progress=False)
    names = [path.relative_to(prepared).as_posix() for path in sorted(prepared.rglob("*.json"))]
    assert len(names) > 2

    def work(folder):
        shards.digest(shards.version_folder(folder, "Maze"))
        read_all(folder)

    check(range(7000, 7080), prepared, tmp_path / "read", names, work)
    rows = [path.relative_to(prepared).as_posix() for path in prepared.rglob("*.array_record*")]
    check(range(7500, 7530), prepared, tmp_path / "rows", rows, work)
    check(
        range(8000, 8080),
        prepared,
        tmp_path / "again",
        names,
        lambda folder: (prepare.prepare(parquet, folder, progress=False), read_all(folder)),
    )


def test_benchmark_tables(tmp_path):
    """Read, shown and scored."""
    folder = tmp_path / "tables"
    folder.mkdir()
    image = base64.b64encode(png()).decode()
    for name, more in (
        ("VisPuzzle", {}),
        ("VSP", {"maze_size": 3}),
        ("CV-Bench-2D", {"source": "ADE20K"}),
    ):
        rows = [
            {
                "index": n,
                "image": image,
                "question": f"Where is {n}?",
                "A": "left",
                "B": "right",
                "answer": "A",
                **more,
            }
            for n in range(4)
        ]
        with open(folder / f"{name}.tsv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    for name in ("VisPuzzle", "CV-Bench-2D"):

        def work(folder):
            table = tables_lib.read(folder / f"{name}.tsv")  # noqa: B023
            table_scores.unmatchable(table)
            for row in table.rows:
                prompts.images(row), prompts.messages(row)
            table_scores.score(table, {row.index: "<answer>A</answer>" for row in table.rows})

        check(range(9000, 9080), folder, tmp_path / name, [f"{name}.tsv"], work)


def test_record_of_a_run(tmp_path):
    """config.json of a workdir: what eval, generate and diagnose read."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config_lib.to_json(small_run.config())))

    def work(folder):
        config = workdir.load_config(str(folder))
        config_check.check(config)
        config_lib.model(config)

    check(
        range(10000, 10200),
        run,
        tmp_path / "damaged",
        ["config.json"],
        work,
        keys=("config.", "model."),
    )
