"""Fixtures of the parity tests, and one test for every case that the golden folder has."""

import json
import pathlib

import jax
import pytest

from parity.inputs import delimiters, load
from parity.replay import path_of

# Arguments of tests that get the name of every case: one case a file, under any names.
CASES = {
    "und_forward": "und_forward/*",
    "grads": "grads/*",
    "generate": "generate/*",
    "opsd_steps": "opsd_steps/*",
    "autoencoder": "vae/*",
    "drawing": "gen_image/shape*",
}


def pytest_generate_tests(metafunc):
    for argument, pattern in CASES.items():
        if argument in metafunc.fixturenames:
            root = pathlib.Path(metafunc.config.getoption("--goldens"))
            names = sorted(path.stem for path in root.glob(f"{pattern}.safetensors"))
            metafunc.parametrize(argument, names or [None], ids=names or ["absent"])


@pytest.fixture(scope="session")
def model(goldens):
    """(config, params) without the generation expert."""
    return load(path_of(goldens, "checkpoint"), generation=False)


@pytest.fixture(scope="session")
def whole_model(goldens):
    """(config, params) with the image-generation path: generation expert, latent path,
    autoencoder.
    """
    path_of(goldens, "checkpoint/ae.safetensors")
    return load(path_of(goldens, "checkpoint"), generation=True)


@pytest.fixture(scope="session")
def tokenizer(goldens):
    return delimiters(
        **json.loads((path_of(goldens, "checkpoint") / "special_tokens.json").read_text())
    )


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The models are tiny: compiling them takes much longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
