"""How a run chooses its attention kernel."""

import pytest

from opsd_jax.doctor import sizes
from opsd_jax.run import attention_check


@pytest.fixture
def config():
    found = sizes.default_config("cpu")
    found.model.attention = "auto"
    found.rollout.max_new_tokens = 8
    return found


@pytest.fixture
def log(monkeypatch):
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            attention_check.logging, level, lambda text, *rest: lines.append(text % rest)
        )
    return lines


def test_a_setting_is_taken_as_it_is(config):
    config.model.attention = "flash"
    assert attention_check.chosen(config, "cpu") == "flash"


def test_a_cpu_has_no_kernel(config, log):
    assert (attention_check.chosen(config, "cpu"), log) == ("dense", [])


def test_cudnn_needs_bfloat16(config, log):
    config.model.dtype = "float32"
    assert (attention_check.chosen(config, "gpu"), log) == ("dense", [])


def test_a_kernel_that_does_not_compile(config, log):
    """The TPU's, on this CPU."""
    assert attention_check.chosen(config, "tpu") == "dense"
    assert (
        "'flash' is not usable: student: NotImplementedError: model.attention is 'flash'" in log[-1]
    )


def test_a_kernel_that_is_right_or_wrong(config, log, monkeypatch):
    """Of student, teacher and vision tower, each is compared."""
    monkeypatch.setitem(attention_check.OF_PLATFORM, "tpu", "flash_interpret")
    assert attention_check.chosen(config, "tpu") == "flash_interpret"
    assert "'flash_interpret', equal to dense attention" in log[-1]
    real = attention_check.relative_error
    for wrong in range(3):
        calls: list[int] = []

        def spoiled(found, wanted, mask):
            calls.append(1)
            is_gradient_of_wrong = len(calls) == 4 * wrong + 3
            return real(found * 1.5 if is_gradient_of_wrong else found, wanted, mask)

        monkeypatch.setattr(attention_check, "relative_error", spoiled)
        assert attention_check.chosen(config, "tpu") == "dense"
        name = ("student", "teacher", "vision tower")[wrong]
        assert f"{name}: relative error dk 0.5" in log[-1]


def test_a_kernel_of_another_machine_is_wrong_there(config, log, monkeypatch):
    monkeypatch.setitem(attention_check.OF_PLATFORM, "tpu", "flash_interpret")
    monkeypatch.setattr(attention_check.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        attention_check.multihost_utils, "process_allgather", lambda found: [found, [False]]
    )
    assert attention_check.chosen(config, "tpu") == "dense"
    assert "another process" in log[-1]
