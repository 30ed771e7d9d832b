"""The calls that users make from Python: wrong arguments say what to give."""

import inspect
import pathlib

import pytest
from PIL import Image

import opsd_jax
from opsd_jax import interleave


def model():
    return object.__new__(interleave.Reasoner)  # without weights


def answer(*arguments):
    """`opsd_jax.answer` without the type checks that the tests add, which users do not have."""
    return inspect.unwrap(opsd_jax.answer)(*arguments)


IMAGE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: answer("/tmp/w", IMAGE, "How many?"),
            "model is '/tmp/w', of type str: load it first, model = opsd_jax.load(W)",
        ),
        (
            lambda: answer(model(), "dots.png", "How many?"),
            "image is 'dots.png', of type str: open it first, image = PIL.Image.open(FILE)",
        ),
        (lambda: answer(model(), [b"..."], "How many?"), "image is b'...', of type bytes"),
        (lambda: answer(model(), IMAGE, None), "question is None, of type NoneType: give"),
        (
            lambda: opsd_jax.score("/tmp/w", "<answer>3</answer>"),
            "example is '/tmp/w', of type str: give an example of a run, opsd_jax.open_run(W).ex",
        ),
        (lambda: opsd_jax.load(IMAGE), "of type Image: give the path of a folder, such as a run's"),
        (lambda: opsd_jax.open_run(3), "workdir is 3, of type int: give the path of a folder"),
    ],
)
def test_an_argument_of_another_type(call, said):
    with pytest.raises(TypeError) as error:
        call()
    assert said in str(error.value)


def test_paths_may_be_pathlib(tmp_path):
    for call in (opsd_jax.load, opsd_jax.open_run):
        with pytest.raises(FileNotFoundError, match="no-run"):
            call(pathlib.Path(tmp_path, "no-run"))
