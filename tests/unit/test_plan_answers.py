"""`plan --stage=eval` and `generate`: they compile what the commands call; the hours by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import tiny
from opsd_jax import flow, images, interleave, rollout, sharding
from opsd_jax.plan import advice, answers, table
from opsd_jax.plan import topology as topology_lib
from opsd_jax.run import placement

QUESTIONS = 2


@pytest.fixture(scope="module")
def model():
    """A tiny model whose images have up to 24 pixels for the ViT, 48 for the autoencoder."""
    return interleave.Reasoner(
        tiny.DRAWING,
        tiny.params(tiny.DRAWING, seed=1),
        dataclasses.replace(tiny.TOKENIZER),
        interleave.Protocol(system="sys", max_new_tokens=6, rounds=2),
        images.Resize(4, 24, 8),
        images.Resize(8, 48, 16),
        flow={"num_timesteps": 5},
    )


@pytest.fixture(scope="module")
def planned(model):
    """The programs of a batch, on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return answers.calls(model, mesh, QUESTIONS)


@pytest.fixture
def called(planned, monkeypatch):
    """{program: [shapes of the arguments after the weights] of each call}.

    Nothing compiles: results are zeros, texts of full length.
    """
    found = {}

    def stand_in(module, name):
        real = getattr(module, name)

        def record(params, *arguments, **named):
            shapes = [np.shape(x) for x in jax.tree.leaves(arguments)]
            is_cond = name == "denoise" and len(arguments[0].segment) == QUESTIONS
            found.setdefault(f"{name}_cond" if is_cond else name, []).append(shapes)
            result = jax.eval_shape(lambda *a: real(*a, **named), params, *arguments)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
            if name == "sample":
                return dataclasses.replace(zeros, mask=jnp.ones(zeros.mask.shape, bool))
            return zeros

        monkeypatch.setattr(module, name, record)

    stand_in(rollout, "sample")
    for name in ("prefill", "denoise", "encode", "decode"):
        stand_in(flow, name)
    return found


@pytest.mark.slow
def test_programs_are_those_that_a_batch_calls(model, planned, called):
    picture = Image.fromarray(np.full((90, 90, 3), 7, np.uint8))
    interleave.reason(
        model,
        [([picture], "x" * 500)] * QUESTIONS,
        jax.random.key(0),
        interleave.ImageGeneration(always=True),
    )
    last = {name: calls[-1] for name, calls in called.items()}
    weights = len(jax.tree.leaves(model.params))
    for call in planned:
        name, invars = call.program.name, call.program.traced.jaxpr.jaxpr.invars[weights:]
        assert [v.aval.shape for v in invars] == last.pop(name), name
        assert name.startswith("denoise") or call.times == len(called[name]), name
    assert not last
    assert sum(call.program.trips[0] for call in planned if "denoise" in call.program.name) == 4


def test_weights_that_a_program_does_not_read_are_beside_it(model, planned):
    for call in planned:
        program = call.program
        read, beside = program.arguments["params"], program.beside["params"]
        assert len(read) + len(beside) == len(jax.tree.leaves(model.params)) and not {*read} & {
            *beside
        }
        assert any(path.startswith("vae/decoder") for path in read) == (program.name == "decode")
        assert ("llm/head" in read) == (program.name == "sample")


def test_hours_by_hand(model):
    """7 batches of 16 x 2 questions for 200; a text before the image and one after it."""
    found = answers.outlook(
        model, (36.0, 72.0), batch_size=16, hosts=2, chips=8, questions=200, price=2.0
    )
    assert found["hours"] == pytest.approx((0.07, 0.14)) and found["tokens"] == 2 * 6
    assert found["chip_hours"] == pytest.approx((0.56, 1.12))
    assert found["dollars"] == pytest.approx((1.12, 2.24))
    assert found["tokens_per_sec"] == pytest.approx((32 * 12 / 72, 32 * 12 / 36))
    report = {
        "topology": "v5e:2x4",
        "slices": 1,
        "chips": 8,
        "devices": 8,
        "hbm_gib": 15.75,
        "mesh": {},
        "parameters": {},
        "programs": [],
        "answers": found,
    }
    shown = table.table(report)
    assert "answers, on 8 chips of 2 hosts, in batches of 16 questions on each host\n" in shown
    assert "0.07 to 0.14 hours, 0.6 to 1.1 chip-hours, 1.12 to 2.24 dollars at 2 a" in shown
    assert "12 tokens and 1 image for its answer" in shown
    assert "no time is modelled" in table.table(
        report
        | {
            "answers": answers.outlook(
                model, None, batch_size=1, hosts=1, chips=1, questions=1, price=None
            )
        }
    )


def test_what_does_not_fit_is_told_what_helps(model):
    bill = {"bytes": {"params": 3 * 2**30, "kv_cache": 2**30}}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    lines = "\n".join(advice.of_answers(bill, model.config, mesh, 16))
    assert "--batch_size=8 for the command: the KV cache takes 1.0 GiB" in lines
    assert "--tensor" not in lines  # there is one device


def test_one_host_of_a_slice():
    def of(name: str, *host: int):
        """The slice in hosts of so many chips along each axis."""
        whole = topology_lib.parse_topology(name)
        devices = [
            types.SimpleNamespace(
                coords=(*at, *[0] * (3 - len(at))),
                process_index=tuple(n // size for n, size in zip(at, host)),
            )
            for at in np.ndindex(*whole.grid)
            for _ in range(whole.chip.devices)
        ]
        return topology_lib.of_a_host(whole, devices)

    host, hosts = of("v5e-16", 2, 2)
    assert (host.name, host.devices, hosts) == ("v5e:2x2", 4, 4)
    host, hosts = of("tpu7x-16", 2, 2, 1)
    assert (host.name, host.chips, host.devices, hosts) == ("tpu7x:2x2x1", 4, 8, 2)
    assert of("v5p-8", 2, 2, 1) == (topology_lib.parse_topology("v5p-8"), 1)
    fake = topology_lib.parse_topology("cpu:8")
    assert topology_lib.of_a_host(fake, jax.devices()) == (fake, 1)


def test_largest_image_of_the_released_model():
    """980 pixels: 70 x 70 patches of 14."""
    from opsd_jax import config as config_lib

    model = answers.model_of(config_lib.default(), "eval")
    image, _ = placement.largest_question(model)
    assert image.grid == (70, 70) and model.protocol.max_new_tokens == 1024
    model = answers.model_of(config_lib.default(), "eval", "harness")
    image, _ = placement.largest_question(model)
    assert image.grid == (70, 70) and model.protocol.max_new_tokens == 4096
