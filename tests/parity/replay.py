"""Reads golden cases and compares arrays with them, at the tolerances of the goldens' README."""

import json
import re

import numpy as np
import pytest

import tiny
from conftest import DEFAULT_GOLDENS
from opsd_jax import params as params_lib


def path_of(goldens, name):
    path = goldens / name
    if not path.exists():
        report = pytest.fail if goldens == DEFAULT_GOLDENS.resolve() else pytest.skip
        report(f"golden set {name} is not in {goldens}")
    return path


def read(goldens, folder, name):
    """(tensors, settings) of one case; name None: there is none.

    `repeats` in the settings names tensors that are the same in another case of the set, and kept
    there only.
    """
    from safetensors.numpy import load_file

    path = path_of(goldens, f"{folder}/{name or 'any case'}.safetensors")
    tensors, settings = load_file(path), json.loads(path.with_suffix(".json").read_text())
    for other, names in settings.get("repeats", {}).items():
        kept = load_file(path_of(goldens, f"{folder}/{other}.safetensors"))
        tensors.update({name: kept[name] for name in names})
    return tensors, settings


def matching(tensors, pattern):
    """[(match, tensor)] of the names that match a pattern in full."""
    found = ((re.fullmatch(pattern, name), tensor) for name, tensor in tensors.items())
    return [(match, tensor) for match, tensor in found if match]


def close(actual, wanted, name=""):
    """The tolerance of logits and hidden states."""
    np.testing.assert_allclose(actual, wanted, atol=5e-5, rtol=1e-4, err_msg=name)


def close_gradient(actual, wanted, name=""):
    """The tolerance of gradients: relative to each tensor's largest value."""
    assert np.shape(actual) == wanted.shape, name
    atol = 1e-6 + 1e-3 * np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(actual, wanted, atol=atol, rtol=0, err_msg=name)


equal = np.testing.assert_array_equal


def compare(check, actual, tensors, name):
    """Compares with a golden tensor where there is one: a copy may leave out what repeats, see its
    README.
    """
    if name in tensors:
        check(actual, tensors[name], name)


def by_name(params) -> dict:
    """Our parameters, or gradients of them, under their checkpoint names."""
    named = {}
    for path, leaf in params_lib.flatten(params).items():
        named.update(tiny.released(path, np.asarray(leaf)))
    return named
