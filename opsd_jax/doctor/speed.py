"""Speed of sampling, update and image generation, beside what `plan` models for the chip.

The programs are those of a run: `plan.programs` traces the sampler and the update for the devices
that are here, and `flow` has those of image generation. Weights are random.

Where the whole model does not fit into memory, it has as many layers as do, and the time of all
layers is extrapolated from two numbers of layers:

  t(L) = t(n) + (L - n) (t(n) - t(m)) / (n - m)

Letters: L layers of the model, n layers that fit, m layers of the second, smaller measurement.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context, flow, optimizer, sharding
from opsd_jax import params as params_lib
from opsd_jax.doctor.result import Limits, Result, SkipError, judge, seconds_of
from opsd_jax.method_config import FlowConfig
from opsd_jax.model import bagel
from opsd_jax.plan import bill, flops, hlo, programs
from opsd_jax.plan import topology as topology_lib
from opsd_jax.run import random_arrays

# Shares of a device's memory that weights (of the sampler, of image generation) and the training
# state may take. The rest is for caches, activations, gradients and copies in the compute dtype.
SHARES = {"decode": 0.75, "update": 0.6, "image": 0.5}
ADAPTERS = 64  # rank of the adapters that are trained where not even two whole layers fit
_BUCKET = 0  # the smallest one


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, and on what.

    config: settings of a run; its shapes are measured. devices: of this process.
    memory: bytes that programs may take of a device; None if there is no bound.
    tokens: budget of a completion. pixels: (height, width) of the problem image and of the
      generated image, in pixels. steps: denoising steps that are timed.
    limits: how long it may take.
    """

    config: ConfigDict
    devices: Sequence[jax.Device]
    memory: int | None
    tokens: int
    pixels: tuple[int, int]
    steps: int
    limits: Limits


@dataclasses.dataclass(frozen=True)
class Timing:
    """One measurement.

    seconds: of one run of the program. modelled: what `bill.step_seconds` says of it, or None.
    finite: whether its results are. compile_seconds: how long compiling took.
    more: further values.
    """

    seconds: float
    modelled: dict[str, float] | None
    finite: bool
    compile_seconds: float
    more: dict[str, float] = dataclasses.field(default_factory=dict)


def decode(setting: Setting) -> Iterator[Result]:
    """Sampling of one completion per device, as in training."""
    setting.limits.check()
    config = run_config(setting)

    def held(layers: int) -> int:
        model = _model(_with_layers(config, layers))
        return _bytes(_mesh(setting.devices), _text_weights(model), "rollout")

    def measure(layers: int) -> Timing:
        return _sample(_with_layers(config, layers), setting)

    layers = layers_that_fit(held, config.model.llm.num_layers, setting.memory, SHARES["decode"])
    yield _measured("decode", config, layers, measure, setting.limits)


def update(setting: Setting) -> Iterator[Result]:
    """The update of one sequence per device; of adapters alone where the weights do not fit."""
    setting.limits.check()
    config = run_config(setting)

    def held(config: ConfigDict, layers: int) -> int:
        config = _with_layers(config, layers)
        method = config_lib.stage_config(config, "opsd", random_arrays.IDS)
        params = _abstract(config_lib.model(config))
        state = jax.eval_shape(lambda params: optimizer.init_state(params, method), params)
        return _bytes(_mesh(setting.devices), state, "train")

    def fit(config: ConfigDict) -> int:
        most = config.model.llm.num_layers
        held_by = functools.partial(held, config)
        return layers_that_fit(held_by, most, setting.memory, SHARES["update"])

    layers, note = fit(config), ""
    if layers < min(2, config.model.llm.num_layers) and not config.lora.rank:
        config.lora.update(rank=ADAPTERS, alpha=2.0 * ADAPTERS)
        layers, note = fit(config), f"adapters of rank {ADAPTERS} only, "

    def measure(layers: int) -> Timing:
        return _update(_with_layers(config, layers), setting)

    yield _measured("update", config, layers, measure, setting.limits, note)


def image(setting: Setting) -> Iterator[Result]:
    """Generation of one image on one device, with the guidance of the evaluation harness."""
    setting.limits.check()
    config = run_config(setting)
    config.model.generation.on = True

    def held(layers: int) -> int:
        model = config_lib.model(_with_layers(config, layers))
        return _bytes(_mesh(setting.devices[:1]), _cast(_abstract(model), model.dtype), "rollout")

    def measure(layers: int) -> Timing:
        return _image(_with_layers(config, layers), setting)

    layers = layers_that_fit(held, config.model.llm.num_layers, setting.memory, SHARES["image"])
    yield _measured("image", config, layers, measure, setting.limits)


# --- how many layers, and all of them -------------------------------------------------------------


def layers_that_fit(
    held: Callable[[int], int], layers: int, memory: int | None, share: float
) -> int:
    """The most layers whose bytes are at most a share of the memory; 0 if not one is.

    Args:
      held: number of layers -> bytes on a device; each layer takes the same.
      layers: of the whole model. memory: bytes of a device; None for no bound. share: in (0, 1].
    """
    if memory is None or held(layers) <= share * memory:
        return layers
    one = held(1)
    each = held(2) - one
    return max(min(int((share * memory - one) // each) + 1, layers - 1), 0)


def extrapolate(
    seconds: float, layers: int, fewer_seconds: float, fewer: int, whole: int
) -> dict[str, float]:
    """Seconds of all layers from those of two numbers of layers.

    Returns:
      {"seconds_per_layer", "seconds_of_all_layers"}.
    """
    each = (seconds - fewer_seconds) / (layers - fewer)
    return {
        "seconds_per_layer": each,
        "seconds_of_all_layers": seconds + (whole - layers) * each,
    }


def _measured(
    name: str,
    config: ConfigDict,
    layers: int,
    measure: Callable[[int], Timing],
    limits: Limits,
    note: str = "",
) -> Result:
    """The result of one measurement, with a second one if not all layers fit."""
    whole = config.model.llm.num_layers
    if layers == 0:
        raise SkipError("not one layer of the model fits into the memory of a device")
    began = time.monotonic()
    found = measure(layers)
    took = time.monotonic() - began
    values: dict[str, Any] = {"layers": layers, "layers_of_the_model": whole, "note": note}
    values |= {"seconds": found.seconds, "compile_seconds": found.compile_seconds, **found.more}
    summary = f"{note}{layers} of {whole} layers: {_shown(found)}"
    values["modelled"] = found.modelled
    if layers < whole:
        fewer = layers // 2
        if fewer and limits.left() > 1.5 * took:
            other = measure(fewer)
            values |= extrapolate(found.seconds, layers, other.seconds, fewer, whole)
            values |= {"fewer_layers": fewer, "seconds_of_fewer": other.seconds}
            summary += (
                f"; {values['seconds_per_layer']:.4g} s a layer, so all {whole} take "
                f"{values['seconds_of_all_layers']:.4g} s"
            )
        else:
            summary += "; not extrapolated: no time or memory for a second number of layers"
    return judge(
        name,
        found.finite,
        summary,
        f"{summary}; the result is not finite: do not train here",
        values,
    )


def _shown(found: Timing) -> str:
    said = f"{found.seconds:.4g} s"
    if found.modelled:
        said += (
            f" (plan models {found.modelled['overlapped']:.4g} to {found.modelled['serial']:.4g})"
        )
    more = ", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in found.more.items())
    return f"{said}, {more}" if more else said


# --- settings and shapes --------------------------------------------------------------------------


def run_config(setting: Setting) -> ConfigDict:
    """The settings of the measured run: one sequence per device, the smallest bucket."""
    count = len(setting.devices)
    config = setting.config.copy_and_resolve_references()
    config.model.generation.on = False
    config.opsd.batch_size, config.opsd.accumulation = count, 1
    config.eval.batch_size, config.eval.slots = count, 0
    config.rollout.update(max_new_tokens=setting.tokens, slots=0, refill=0)
    return config


def _with_layers(config: ConfigDict, layers: int) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.model.llm.num_layers = layers
    return changed


def _model(config: ConfigDict):
    return dataclasses.replace(config_lib.model(config), generation=None)


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=devices)


def _abstract(model) -> dict:
    return jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))


def _cast(abstract: dict, dtype: str) -> dict:
    return jax.eval_shape(lambda tree: params_lib.in_compute_dtype(tree, dtype), abstract)


def _text_weights(model) -> dict:
    return _cast(params_lib.understanding(_abstract(model)), model.dtype)


def _bytes(mesh: jax.sharding.Mesh, tree: Any, layout: str) -> int:
    return bill.bytes_per_device(sharding.abstract(mesh, tree, layout))


# --- measurements ---------------------------------------------------------------------------------


def _compiled(traced: jax.stages.Traced) -> tuple[Any, float]:
    """(program, seconds that compiling took)."""
    start = time.perf_counter()
    return traced.lower().compile(), time.perf_counter() - start


def modelled(
    traced: jax.stages.Traced, compiled: Any, trips: tuple[int, ...], devices: Sequence[jax.Device]
) -> dict[str, float] | None:
    """Seconds that `plan` models for a program; None where no data sheet is known.

    trips: see `programs.Program`.
    """
    topology, text = topology_lib.of_devices(devices), compiled.as_text()
    if topology is None or not text:
        return None
    operations = flops.matmul_flops(traced.jaxpr.jaxpr, trips) // len(devices)
    return bill.step_seconds(operations, hlo.traffic(text, len(devices), trips), topology)


def _sample(config: ConfigDict, setting: Setting) -> Timing:
    """The sampler with its whole budget, and with a budget of two tokens, which is the prefill."""
    mesh, budget = _mesh(setting.devices), setting.limits.measurement
    (program,) = programs.programs(config, "opsd", mesh, _BUCKET, "sample")
    params = random_arrays.weights(program.arguments["params"])
    batch = random_arrays.contexts(config, _BUCKET, config.opsd.batch_size)
    batch = random_arrays.put(batch.student, program.arguments["batch"])
    key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
    compiled, compiling = _compiled(program.traced)
    trajectory = compiled(params, batch, key)
    steps = int(np.max(trajectory.ended))
    seconds = seconds_of(lambda: compiled(params, batch, key), budget, 3)
    more = {}
    if setting.limits.left() > 1.5 * compiling:
        config = config.copy_and_resolve_references()
        config.rollout.max_new_tokens = 2
        (prefill,) = programs.programs(config, "opsd", mesh, _BUCKET, "sample")
        short, _ = _compiled(prefill.traced)
        first = seconds_of(lambda: short(params, batch, key), budget, 3)
        if steps > 2 and seconds > first:
            more["ms_per_token"] = 1e3 * (seconds - first) / (steps - 2)
        more["prefill_seconds"] = first
    more |= {"tokens": steps, "context_positions": batch.padded_length}
    return Timing(
        seconds,
        modelled(program.traced, compiled, program.trips, setting.devices),
        bool(jnp.all(jnp.isfinite(trajectory.logprobs))),
        compiling,
        more,
    )


def _update(config: ConfigDict, setting: Setting) -> Timing:
    mesh = _mesh(setting.devices)
    (program,) = programs.programs(config, "opsd", mesh, _BUCKET, "update")
    batch_shapes, trajectory_shapes = program.arguments["batch"]
    method = config_lib.stage_config(config, "opsd", random_arrays.IDS)

    def start(params):
        return optimizer.init_state(params, method)

    params = random_arrays.weights(program.arguments["params"])
    places = sharding.tree_shardings(mesh, jax.eval_shape(start, params))
    state = jax.jit(start, out_shardings=places)(params)
    del params
    batch = random_arrays.put(
        random_arrays.contexts(config, _BUCKET, config.opsd.batch_size), batch_shapes
    )
    trajectory = random_arrays.trajectory(trajectory_shapes, config.model.llm.vocab_size)
    compiled, compiling = _compiled(program.traced)
    metrics: dict[str, jax.Array] = {}

    def step():
        nonlocal state, metrics
        state, metrics = compiled(state, batch, trajectory)  # the state is donated
        return metrics

    seconds = seconds_of(step, setting.limits.measurement, 3)
    norms = np.array([metrics["loss"], metrics["grad_norm"]])
    positions = (batch.student.padded_length, batch.teacher.padded_length)
    more = dict(zip(("student_positions", "teacher_positions"), positions))
    return Timing(
        seconds,
        modelled(program.traced, compiled, program.trips, setting.devices),
        bool(np.all(np.isfinite(norms))),
        compiling,
        more | {"sequences": config.opsd.batch_size},
    )


def _image(config: ConfigDict, setting: Setting) -> Timing:
    """Prefill of the contexts, some denoising steps and decoding; `seconds` is the whole image."""
    devices, limits = setting.devices[:1], setting.limits
    mesh, model = _mesh(devices), config_lib.model(config)
    everywhere, generation = sharding.replicated(mesh), model.generation
    params = random_arrays.weights(
        sharding.abstract(mesh, _cast(_abstract(model), model.dtype), "rollout")
    )
    asked = {**config.drawing, **flow.HARNESS}
    settings = FlowConfig(
        model, random_arrays.IDS.image_start, random_arrays.IDS.image_end, **asked
    )
    rng = np.random.default_rng(0)
    problem, wanted = (
        (min(max(side // generation.stride, 1), generation.side),) * 2 for side in setting.pixels
    )
    contexts = _image_contexts(rng, config, settings, problem, setting.pixels[0])
    noise = rng.standard_normal((1, wanted[0] * wanted[1], generation.latent_dim), np.float32)
    positions = flow.latent_positions([wanted], noise.shape[1], generation.side)
    contexts, positions, noise = jax.device_put((contexts, positions, noise), everywhere)

    traced = flow.prefill.trace(params, contexts, positions, config=model)
    prefill, compiling = _compiled(traced)
    conditioning, cache = prefill(params, contexts, positions)
    prefilling = seconds_of(lambda: prefill(params, contexts, positions), limits.measurement, 3)
    parts: list[tuple[float, dict[str, float] | None]] = [
        (1.0, modelled(traced, prefill, (1,), devices))
    ]

    bounds = (jnp.int32(0), jnp.int32(setting.steps))
    state = flow.start(jnp.copy(noise), cache, config=settings)
    traced = flow.denoise.trace(params, conditioning, state, *bounds, config=settings)
    denoise, more_compiling = _compiled(traced)
    whole = settings.num_timesteps - 1
    parts.append((whole / setting.steps, modelled(traced, denoise, (setting.steps,), devices)))

    def some_steps():
        nonlocal state
        state = denoise(params, conditioning, state, *bounds)  # it is donated
        return state.x

    step = seconds_of(some_steps, limits.measurement, 3) / setting.steps
    traced = flow.decode.trace(params, noise, grid=wanted, config=model)
    decode_pixels, last_compiling = _compiled(traced)
    decoding = seconds_of(lambda: decode_pixels(params, noise), limits.measurement, 3)
    parts.append((1.0, modelled(traced, decode_pixels, (1,), devices)))
    return Timing(
        prefilling + whole * step + decoding,
        _sum(parts),
        bool(jnp.all(jnp.isfinite(state.x))),
        compiling + more_compiling + last_compiling,
        {
            "prefill_seconds": prefilling,
            "step_seconds": step,
            "steps": whole,
            "decode_seconds": decoding,
            "pixels_a_side": wanted[0] * generation.stride,
        },
    )


def _sum(parts: list[tuple[float, dict[str, float] | None]]) -> dict[str, float] | None:
    """Modelled seconds of programs that run so many times; None if one is not modelled."""
    modelled_parts = [(times, part) for times, part in parts if part is not None]
    if len(modelled_parts) < len(parts):
        return None
    return {
        name: sum(times * part[name] for times, part in modelled_parts)
        for name in ("overlapped", "serial")
    }


def _image_contexts(
    rng: np.random.Generator,
    config: ConfigDict,
    settings: FlowConfig,
    problem: tuple[int, int],
    pixels: int,
) -> context.Context:
    """Contexts of all branches of guidance, as in an interleaved evaluation.

    Args:
      problem: grid of the problem image's latent tokens. pixels: its height and width.
    """
    model, vocabulary = settings.model, config.model.llm.vocab_size
    generation, vit = model.generation, model.vit
    latent = blocks_lib.Latent(
        rng.standard_normal((problem[0] * problem[1], generation.latent_dim), np.float32), problem
    )
    seen = random_arrays.image(rng, max(pixels // vit.patch_size, 1) ** 2, model)
    system, question, thought = (random_arrays.text(rng, n, vocabulary) for n in (112, 62, 202))
    blocks: dict[str, list[blocks_lib.Block]] = {
        "cond": [system, latent, seen, question, thought],
        "text": [system, latent, seen],
        "image": [system, question],
    }
    sizes = context.need(blocks["cond"])
    return context.pack(
        [blocks[branch] for branch in settings.branches],
        sizes,
        side=vit.side,
        generation=generation,
        tokenizer=random_arrays.IDS,
    )
