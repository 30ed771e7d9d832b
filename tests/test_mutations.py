"""Small valid inputs, damaged at random: whatever reads them succeeds, or raises an error that a user understands.

Each seed makes one change to one file: a JSON value of another type, a key dropped, a file cut, emptied or replaced. The
commands print ValueError and OSError in one line; anything else is a traceback, and a fault.
"""

import json
import os
import pathlib
import shutil
import struct

import numpy as np
import pytest

from opsd_jax import checkpoint, convert, release_configs, tokenizer

VALUES = [None, "", "64", "1e6", "text", [], [1, 2], ["a"], [None], {}, {"a": 1}, {"type": "default"}, True, False, 0, -1, 1,
          3, 7, 0.5, -2.5, 10**6, 10**9, 10**400, float("nan"), float("inf"), "\x00", "\ud83e\udd8a"]
WHOLE = [[], None, "text", 3, {}, [{}], True]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 29206\n"


def places(value, path=()):
    """The paths of all keys and entries of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in items for found in [path + (key,), *places(child, path + (key,))]]


def damage_json(rng, content):
    """(a JSON value with one change, what was changed)."""
    if rng.random() < 0.05:
        whole = WHOLE[rng.integers(len(WHOLE))]
        return whole, f"the whole file: {whole!r}"
    content = json.loads(json.dumps(content))
    paths = places(content)
    depth = rng.integers(1, max(map(len, paths)) + 1)  # or vocabularies would be all that is changed
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
    return data[:at] + noise + data[at + 8:], f"8 random bytes at {at}"


def damage(rng, path: pathlib.Path) -> str:
    """Changes a file; JSON, and the header of safetensors, half the time as JSON."""
    data = path.read_bytes()
    path.unlink()  # it may be a link
    if path.suffix == ".json" and rng.random() < 0.8:
        content, what = damage_json(rng, json.loads(data))
        data = json.dumps(content).encode()
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        length = struct.unpack("<Q", data[:8])[0]
        content, what = damage_json(rng, json.loads(data[8:8 + length]))
        head = json.dumps(content).encode()
        data = struct.pack("<Q", len(head)) + head + data[8 + length:]
    else:
        data, what = damage_bytes(rng, data)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def linked(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of a folder whose files are links, so that it costs nothing."""
    return pathlib.Path(shutil.copytree(source, target, copy_function=os.link))


def check(seeds, source, target, names, work) -> None:
    """Damages one of the files for each seed and does the work; fails with every outcome that is no clear error."""
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
            elif str(folder) not in said and path.name not in said:
                wrong.append(f"seed {seed}, {what}: names neither file nor folder: {said}")
        except BaseException as error:  # the parsers written in Rust raise PanicException, which is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong)
    assert refused > len(seeds) // 3


SIZES = ["llm_config.json", "vit_config.json", "config.json", "ae_params.json"]


def test_config_files_of_a_release(released, tmp_path):
    """The sizes alone are read, so many of them."""
    check(range(400), released, tmp_path, SIZES, lambda folder: convert.read_config(str(folder), generation=True))


@pytest.mark.slow
def test_weights_and_configs_of_a_release(released, tmp_path):
    check(range(1000, 1150), released, tmp_path, ["model.safetensors", "ae.safetensors", *SIZES],
          lambda folder: convert.load(str(folder), generation=True))


def test_tokenizer_of_a_release(released, tmp_path):
    def work(folder):
        found = tokenizer.load(str(folder), vocab_size=320)
        found.decode(found.encode("What is in the image? <|im_end|> 42"))

    check(range(2000, 2100), released, tmp_path, ["tokenizer.json", "tokenizer_config.json"], work)


def test_shards_of_a_release(released, tmp_path):
    """Their index, and the headers."""
    folder = linked(released, tmp_path / "sharded")
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    rows = json.loads(data[8:8 + length])
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(
        [name for name in rows if name != "__metadata__"], "model-00001-of-00001.safetensors")}))
    config = convert.read_config(str(folder))
    check(range(3000, 3060), folder, tmp_path / "damaged", ["model.safetensors.index.json"],
          lambda folder: convert._plan(str(folder), config, None))


@pytest.fixture(scope="module")
def imported(released, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "understanding"
    convert.import_release(str(released), str(target), only="understanding")
    return target


def test_an_imported_folder(imported, tmp_path):
    """Its note, its configs, and the metadata of its checkpoint."""
    def work(folder):
        found = checkpoint.metadata(folder)
        release_configs.of_metadata(found["config"], str(folder))
        convert._note(str(folder))
        convert.read_config(str(folder))

    small = [path.relative_to(imported).as_posix() for path in sorted((imported / "checkpoints/0").rglob("*"))
             if path.is_file() and path.name in ("orbax.checkpoint", "_CHECKPOINT_METADATA", "_METADATA", "checkpoint_metadata")]
    assert small
    check(range(4000, 4080), imported, tmp_path, ["release/source.json", "release/llm_config.json", *small], work)


@pytest.mark.slow
def test_weights_of_an_imported_folder(imported, tmp_path):
    """Any file of its checkpoint."""
    names = [path.relative_to(imported).as_posix() for path in sorted((imported / "checkpoints").rglob("*")) if path.is_file()]
    check(range(5000, 5040), imported, tmp_path, names, lambda folder: convert.load(str(folder)))
