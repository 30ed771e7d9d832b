"""Starting JAX's devices, with libtpu installed and no TPU."""

import os

import jax
import pytest

from opsd_jax import sharding


@pytest.fixture
def without_tpu(monkeypatch):
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sharding.glob, "glob", lambda pattern: [])


def start(monkeypatch, devices):
    monkeypatch.setattr(jax, "devices", devices)
    sharding.start_devices.__wrapped__()  # without its cache


def test_what_libtpu_says_without_a_tpu_is_not_shown(without_tpu, monkeypatch, capfd):
    start(monkeypatch, lambda: os.write(2, b"could not determine TPU accelerator type\n"))
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"


def test_it_is_shown_where_no_device_is_found(without_tpu, monkeypatch, capfd):
    def devices():
        os.write(2, b"the reason\n")
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        start(monkeypatch, devices)
    assert capfd.readouterr().err == "the reason\n"


def test_it_is_shown_where_there_is_a_tpu(without_tpu, monkeypatch, capfd):
    monkeypatch.setattr(sharding.glob, "glob", lambda pattern: ["/dev/accel0"])
    start(monkeypatch, lambda: os.write(2, b"a TPU says\n"))
    assert capfd.readouterr().err == "a TPU says\n"
