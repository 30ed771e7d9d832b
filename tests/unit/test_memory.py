"""What the compiled programs hold in memory: shapes read off their text, sizes as the compiler
counts them.

Nothing runs here. XLA's passes and its buffer assignment are those of a real run; only the machine
code is made without effort, which halves the time and changes no size. Every bound has a
counterpart that must break it.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import context, distill, divergence, rollout, sharding, supervised
from opsd_jax.method_config import SupervisedConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import LLMConfig, ModelConfig, ViTConfig
from opsd_jax.plan import hlo

VOCAB = 4099  # a prime: no product of other sizes is a multiple of it
ROWS, POSITIONS, BUDGET, CHUNK = 2, 32, 48, 16  # a completion has BUDGET rows
MODEL = ModelConfig(
    llm=LLMConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=16,
    ),
    vit=ViTConfig(
        hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, patch_size=4, side=6
    ),
    dtype="float32",
    remat="none",
    query_block=0,
)
# its cross entropy needs the gradient of all logits, not of the largest alone
CONFIG = distill.DistillConfig(
    model=MODEL, **tiny.ENDS, divergence=divergence.DivergenceConfig(chunk=CHUNK), ce_weight=0.5
)
QUESTION = blocks_lib.Text(np.arange(3, dtype=np.int32))
CODE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def abstract(function):
    """Shapes of what the function returns, placed on one device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(function)
    )


def state_of(config):
    return abstract(
        lambda: distill.init_state(bagel.init(jax.random.key(0), config=config.model), config)
    )


def pack(positions, rows=ROWS):
    return tiny.pack(
        [[QUESTION, tiny.image(np.random.default_rng(0))]] * rows, positions, patches=4
    )


@functools.cache
def update(config=CONFIG, student=POSITIONS, teacher=POSITIONS):
    """The compiled update whose contexts have so many positions."""
    trajectory = tiny.random_trajectory(np.random.default_rng(0), ROWS, BUDGET)
    program = sharding.update_program(distill.update_step, state_of(config), config)
    batch = context.Batch(pack(student), pack(teacher))
    return program.lower(state_of(config), batch, trajectory).compile(compiler_options=CODE)


def temporary(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def size_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes(compiled) -> set[tuple[int, ...]]:
    """Of all arrays that the text of the program names, fused ones too, which never lie in
    memory.
    """
    found = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", compiled.as_text())
    return {tuple(map(int, sizes.split(","))) for sizes in found}


def rows_of_logits(compiled) -> int:
    """The largest product of the other sizes of an array that has the vocabulary among its own,
    alone or merged.
    """
    return max(
        math.prod(shape) // VOCAB for shape in shapes(compiled) if math.prod(shape) % VOCAB == 0
    )


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_update_never_holds_the_logits_of_more_than_a_chunk():
    """96 rows are scored for each role.

    32 rows of logits are as large as embedding and head, and nothing is larger.
    """
    assert ROWS * CHUNK == MODEL.llm.hidden_size < ROWS * BUDGET
    compiled = update()
    assert (ROWS, CHUNK, VOCAB) in shapes(compiled)  # the chunk is found, so more would be
    assert rows_of_logits(compiled) == ROWS * CHUNK
    assert max(map(math.prod, shapes(compiled))) == ROWS * CHUNK * VOCAB


def test_the_definition_from_logits_does_hold_them():
    """So the text of a program shows them where they are."""
    head = jax.ShapeDtypeStruct((MODEL.llm.hidden_size, VOCAB), jnp.float32)
    hidden = jax.ShapeDtypeStruct((ROWS, BUDGET, MODEL.llm.hidden_size), jnp.float32)

    def loss(hidden_s, head_s, hidden_t, head_t):
        values, _ = divergence.generalized_jsd(
            hidden_s @ head_s, hidden_t @ head_t, CONFIG.divergence
        )
        return jnp.mean(values)

    program = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert (
        rows_of_logits(program.lower(hidden, head, hidden, head).compile(compiler_options=CODE))
        == ROWS * BUDGET
    )


@pytest.mark.slow
def test_supervised_steps_never_hold_the_logits_of_more_than_a_chunk():
    targets = blocks_lib.Text(np.arange(40, dtype=np.int32), loss=True)
    batch = context.supervise(
        [[QUESTION, targets]] * ROWS,
        context.Sizes(64, 0, BUDGET),
        tokenizer=tiny.TOKENIZER,
        side=MODEL.vit.side,
    )
    config = SupervisedConfig(model=MODEL, chunk=CHUNK)
    state = state_of(config)
    program = sharding.update_program(supervised.sft_step, state, config)
    compiled = program.lower(state, batch).compile(compiler_options=CODE)
    assert (ROWS, CHUNK, VOCAB) in shapes(compiled) and rows_of_logits(compiled) == ROWS * CHUNK


# --- the update -----------------------------------------------------------------------------------


def test_the_update_writes_the_new_state_over_the_old_one():
    """All of it: frozen leaves and the counters, too."""
    state = state_of(CONFIG)
    assert set(state) == {"params", "opt", "ema", "step"}
    memory = update().memory_analysis()
    assert memory.alias_size_in_bytes == size_of(state)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096  # metrics


SELF = dataclasses.replace(
    CONFIG, teacher="self"
)  # where forgetting to stop a gradient would be easiest
MORE = 128  # positions


def scores(positions) -> int:
    """Bytes of the attention weights of all layers over a context of so many positions and the
    completion.
    """
    return MODEL.llm.num_layers * ROWS * MODEL.llm.num_heads * (positions + BUDGET) ** 2 * 4


@pytest.mark.slow
def test_the_teacher_saves_no_activations():
    """128 positions more in the student's context cost the saved activations of every layer, in the
    teacher's next to
    nothing: one layer's at a time, while there is still memory.
    """
    base = temporary(update(SELF))
    student, teacher = (
        temporary(update(SELF, **{role: POSITIONS + MORE})) - base
        for role in ("student", "teacher")
    )
    assert student > scores(POSITIONS + MORE) - scores(POSITIONS)
    assert teacher < student / 5


@pytest.mark.slow
def test_remat_saves_no_activations_inside_a_layer():
    remat = dataclasses.replace(SELF, model=dataclasses.replace(MODEL, remat="full"))
    kept, recomputed = (
        temporary(update(config, student=POSITIONS + MORE)) for config in (SELF, remat)
    )
    assert kept - recomputed > 0.7 * scores(
        POSITIONS + MORE
    )  # those of one layer exist while it is recomputed


# --- the sampler ----------------------------------------------------------------------------------

# Sixteen layers, so that the cache is large beside one layer's part of it, and heads wider than the
# rest.
SAMPLED = dataclasses.replace(
    MODEL,
    llm=LLMConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=16,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=16,
        head_dim=32,
    ),
)


def cache_of(rows, budget):
    return jax.eval_shape(lambda: bagel.init_cache(rows, POSITIONS + budget, config=SAMPLED))


@functools.cache
def sampler(rows, budget):
    config = tiny.rollout_config(
        model=SAMPLED,
        max_new_tokens=budget,
        marker=rollout.Marker.build(tiny.TOKENIZER.token_bytes, VOCAB),
    )
    params = abstract(lambda: bagel.init(jax.random.key(0), config=SAMPLED))
    program = rollout.sample.lower(params, pack(POSITIONS, rows), jax.random.key(0), config=config)
    return program.compile(compiler_options=CODE)


@pytest.mark.slow
@pytest.mark.parametrize("rows, budget", [(2, 512), (8, 64)])
def test_the_sampler_holds_its_cache_once(rows, budget):
    """More tokens or more rows cost the keys and values that come with them, once. Else it is the
    prompt's scores against all positions and the slices of one layer, some percent here.
    """
    grown = temporary(sampler(rows, budget)) - temporary(sampler(2, 64))
    cache = size_of(cache_of(rows, budget)) - size_of(cache_of(2, 64))
    assert cache <= grown < 1.3 * cache


def inside_loops(text) -> list[hlo.Instruction]:
    """All instructions that a `while` of the program repeats, with what they call."""
    computations, entry = hlo.read_hlo(text)
    keys = (
        "body",
        "condition",
        "calls",
        "to_apply",
        "branch_computations",
        "true_computation",
        "false_computation",
    )
    left = [
        name
        for i in computations[entry].values()
        if i.op == "while"
        for name in i.named("body", "condition")
    ]
    found = {}
    while left:
        name = left.pop()
        if name not in found:
            found[name] = computations[name].values()
            left += [inner for i in found[name] for inner in i.named(*keys)]
    return [i for instructions in found.values() for i in instructions]


def test_the_sampler_writes_into_its_cache_in_place():
    """In its loops over tokens and layers the cache is handed on and updated, never made anew or
    copied.
    """
    shape = ",".join(map(str, cache_of(2, 64)["k"].shape))
    touched = [
        i.op for i in inside_loops(sampler(2, 64).as_text()) if i.shape.startswith(f"f32[{shape}]")
    ]
    assert (
        touched.count("dynamic-update-slice") >= 4
    )  # keys and values, of the prompt and of a token
    assert set(touched) <= {
        "parameter",
        "get-tuple-element",
        "bitcast",
        "fusion",
        "dynamic-update-slice",
    }


def test_the_sampler_makes_logits_of_the_last_token_alone():
    """Of 64 positions of the prompts none gets logits. What is larger than a row's logits has one
    column for each value of a hidden state (the weights) or fewer (the table of the marker).
    """
    assert rows_of_logits(sampler(2, 64)) == SAMPLED.llm.hidden_size < 2 * POSITIONS
    assert (2, VOCAB) in shapes(sampler(2, 64))


def test_a_cpu_holds_an_eighth_of_a_large_head_in_float32(monkeypatch):
    """A product of bfloat16 needs a float32 copy there. The values are those of one product."""
    width, vocab = 64, 8 * 4096

    def head(dtype):
        return jax.ShapeDtypeStruct((width, vocab), dtype)

    def temporary():
        program = jax.jit(lambda m, h: bagel.logits({"llm": {"head": m}}, h))
        lowered = program.lower(
            head(jnp.bfloat16), jax.ShapeDtypeStruct((1, 1, width), jnp.bfloat16)
        )
        options = CODE | sharding._BFLOAT16_ON_CPU  # as programs of bfloat16 are compiled
        return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes

    of_whole = 4 * width * vocab
    assert temporary() >= of_whole
    monkeypatch.setattr(bagel, "_LARGE", width * vocab)
    assert temporary() < of_whole / 4

    hidden, matrix = (
        jax.random.normal(jax.random.key(n), shape).astype(jnp.bfloat16)
        for n, shape in enumerate([(2, 3, 16), (16, 72)])
    )
    parts = bagel._project_in_parts(hidden, matrix)
    np.testing.assert_array_equal(parts, divergence.project(hidden, matrix))
