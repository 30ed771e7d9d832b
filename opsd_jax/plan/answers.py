"""The programs with which questions are answered by a protocol, as `eval`, `generate` and `redraw`
compile them, and what N questions take.

Every host answers its share of the questions on its own devices, so the programs are those of one
host:

  eval       sample                                   a text of full length for each question
  generate   sample, encode, prefill, denoise,        text, an image by flow matching, and text that
             denoise_cond, decode, sample             sees it

Each question has one image of the largest size.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax import flow, interleave, rollout, sharding
from opsd_jax import params as params_lib
from opsd_jax.interleave import Reasoner
from opsd_jax.model import bagel
from opsd_jax.plan import programs
from opsd_jax.plan.programs import Program, Shapes
from opsd_jax.run import model as model_lib
from opsd_jax.run import placement

STAGES = ("eval", "generate")
IMAGES = 1  # generated images of a question; there is one more round of text
_TOKENIZER: Any = types.SimpleNamespace(  # any ids and bytes: they are constants of the programs
    bos=0,
    eos=1,
    further_ends=(),
    image_start=2,
    image_end=3,
    token_bytes=[bytes([n]) for n in range(256)],
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A program, and how often it runs for one batch of questions."""

    program: Program
    times: int


def model_of(
    config: ConfigDict, stage: str, protocol: str = "paper", platform: str = "tpu"
) -> Reasoner:
    """The model that answers, without weights, as `run.model.load` makes that of a release.

    config: sizes of the model; of `drawing` which steps are computed, as --compute_every says.
    stage: "eval", or "generate", for which image generation is on whatever the settings say.
    protocol: one of `interleave.PROTOCOLS`. platform: of the devices.
    """
    generation = None
    if stage == "generate":
        config = config.copy_and_resolve_references()
        config.model.generation.on = True
        generation = config_lib.generation(config)
    sizes = dataclasses.replace(config_lib.model(config), generation=generation)
    sizes = model_lib.in_blocks(sizes, platform)
    asked = model_lib.asked_by(protocol, sizes)
    own = {key: config.drawing[key] for key in ("compute_every", "extrapolation")}
    return Reasoner(sizes, {}, _TOKENIZER, **asked, flow=own)


def calls(model: Reasoner, mesh: jax.sharding.Mesh, batch_size: int) -> list[Call]:
    """The programs of one batch on the devices of one host.

    Args:
      model: see `model_of`.
      batch_size: questions of a batch, a multiple of the copies on the mesh.
    """
    batch = _Batch(model, mesh, batch_size)
    if model.config.generation is None:
        return [Call(_sample(batch), 1)]
    prefill, conditioning, cache = _prefill(batch)
    return [
        Call(_sample(batch), 1 + IMAGES),
        Call(_encode(batch), (1 + IMAGES) * batch_size),
        Call(prefill, IMAGES),
        *(Call(program, IMAGES) for program in _denoise(batch, conditioning, cache)),
        Call(_decode(batch), IMAGES * batch_size),
    ]


class _Batch:
    """A batch of questions of the largest size.

    model, mesh, size: as of `calls`. params: shapes of the weights, cut over the mesh.
    """

    def __init__(self, model: Reasoner, mesh: jax.sharding.Mesh, size: int):
        self.model, self.mesh, self.size = model, mesh, size
        self.params = placement.abstract_weights(model.config, mesh)

    def array(self, *shape: int, dtype=jnp.float32, count: int = 0) -> jax.ShapeDtypeStruct:
        """[count, *shape], cut over the copies of the model; count: 0 for one of each question."""
        return jax.ShapeDtypeStruct(
            (count or self.size, *shape), dtype, sharding=sharding.batch(self.mesh)
        )

    def whole(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """An array that is whole on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(self.mesh))

    def contexts(self, blocks: list[blocks_lib.Block], count: int) -> context_lib.Context:
        """Shapes of a batch of contexts that are as large as a list of blocks."""
        packed = context_lib.pack(
            [blocks],
            interleave.bucketed([blocks]),
            tokenizer=_TOKENIZER,
            side=self.model.config.patches_per_side,
            generation=self.model.config.generation,
        )
        return jax.tree.map(lambda x: self.array(*x.shape[1:], dtype=x.dtype, count=count), packed)

    def program(
        self, name: str, traced: jax.stages.Traced, arguments: dict[str, Shapes], **more
    ) -> Program:
        """A program whose first argument are the weights.

        arguments: the others. Weights that the program does not read are in memory beside it.
        """
        jaxpr = traced.jaxpr.jaxpr
        read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        leaves, structure = jax.tree.flatten(self.params)
        is_read = [id(v) in read for v in jaxpr.invars[: len(leaves)]]
        paths = params_lib.flatten(self.params)
        flags = params_lib.flatten(jax.tree.unflatten(structure, is_read))
        used, rest = (
            {path: leaf for path, leaf in paths.items() if flags[path] == flag}
            for flag in (True, False)
        )
        beside = more.pop("beside", {}) | {"params": rest}
        return Program(name, traced, {"params": used} | arguments, beside, **more)


def _sample(batch: _Batch) -> Program:
    """A round of text: the last one, with everything before it in the context."""
    model = batch.model
    sampling = interleave.rollout_config(model)
    blocks = placement.largest_question(model, IMAGES if model.config.generation else 0)
    contexts = batch.contexts(blocks, batch.size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = rollout.sample.trace(
        batch.params, contexts, batch.whole(dtype=key.dtype), config=sampling
    )
    positions = contexts.limit.shape[1] + sampling.max_new_tokens
    columns = bagel.cache_columns(positions, config=model.config)
    cache = jax.eval_shape(lambda: bagel.init_cache(batch.size, columns, config=model.config))
    return batch.program(
        "sample",
        traced,
        {"batch": contexts},
        trips=(sampling.max_new_tokens, *programs.key_blocks(columns, model.config)),
        cache=cache["k"],
    )


def _latents(batch: _Batch) -> tuple[tuple[int, int], int]:
    """((rows, columns), number with padding) of the latent tokens of a generated image."""
    (block,) = (
        block
        for block in placement.largest_question(batch.model)
        if isinstance(block, blocks_lib.Latent)
    )
    return block.grid, interleave.bucket(block.grid[0] * block.grid[1])


def _prefill(batch: _Batch) -> tuple[Program, flow.Conditioning, flow.Cache]:
    """The contexts of all branches of guidance before an image; and what the steps read of them."""
    model, branches = batch.model, len(interleave.flow_config(batch.model).branches)
    text = blocks_lib.Text(jnp.zeros(model.protocol.max_new_tokens, jnp.int32))
    contexts = batch.contexts([*placement.largest_question(model), text], branches * batch.size)
    _, tokens = _latents(batch)
    positions = flow.LatentPositions(
        batch.whole(batch.size, tokens, dtype=jnp.int32),
        batch.whole(batch.size, tokens, dtype=jnp.bool_),
    )
    traced = flow.prefill.trace(batch.params, contexts, positions, config=model.config)
    (count, size), keys = contexts.limit.shape, 2 + tokens
    conditioning = flow.Conditioning(
        batch.array(size + keys, dtype=jnp.int32, count=count),
        batch.array(dtype=jnp.int32, count=count),
        positions,
        size,
    )
    cache = jax.eval_shape(lambda: bagel.init_cache(count, size + keys, config=model.config))
    program = batch.program("prefill", traced, {"batch": (contexts, positions)})
    return program, conditioning, sharding.abstract_cache(batch.mesh, cache)


def _denoise(batch: _Batch, conditioning: flow.Conditioning, cache: flow.Cache) -> list[Program]:
    """The steps of an image with guidance, and those without, after the cond contexts alone."""
    config, (_, tokens) = interleave.flow_config(batch.model), _latents(batch)
    computed, found = flow.computed_steps(config), []
    x = batch.array(tokens, batch.model.config.generation.latent_dim)
    number = batch.whole(dtype=jnp.int32)

    def add(name, guided, conditioning, cache, beside):
        own = [phase for phase in flow.phases(config) if phase.guided == guided]
        trips = sum(int(computed[phase.begin : phase.end].sum()) for phase in own)
        if not trips:
            return
        state = jax.eval_shape(functools.partial(flow.start, config=config), x, cache)
        state = dataclasses.replace(
            state,
            x=x,
            cache=cache,
            velocities=batch.whole(*state.velocities.shape),
            times=batch.whole(*state.times.shape),
        )
        traced = flow.denoise.trace(
            batch.params, conditioning, state, number, number, config=config
        )
        arguments = {
            "batch": (conditioning, x, state.velocities, state.times),
            "cache": cache,
        }
        between = () if config.compute_every == 1 else (config.compute_every - 1,)
        found.append(batch.program(name, traced, arguments, trips=(trips, *between), beside=beside))

    add("denoise", True, conditioning, cache, {})
    cond = dataclasses.replace(
        conditioning,
        segment=batch.array(*conditioning.segment.shape[1:], dtype=jnp.int32),
        rope_position=batch.array(dtype=jnp.int32),
    )
    columns = conditioning.segment.shape[1]
    own = sharding.abstract_cache(
        batch.mesh,
        jax.eval_shape(lambda: bagel.init_cache(batch.size, columns, config=batch.model.config)),
    )
    add("denoise_cond", False, cond, own, {"cache": cache} if len(config.branches) > 1 else {})
    return found


def _decode(batch: _Batch) -> Program:
    """The pixels of one image."""
    sizes, (grid, _) = batch.model.config, _latents(batch)
    tokens = batch.whole(1, grid[0] * grid[1], sizes.generation.latent_dim)
    traced = flow.decode.trace(batch.params, tokens, grid=grid, config=sizes)
    return batch.program("decode", traced, {"batch": tokens}, is_whole=True)


def _encode(batch: _Batch) -> Program:
    """The latents of one image."""
    sizes, (grid, _) = batch.model.config, _latents(batch)
    generation = sizes.generation
    pixels = batch.whole(1, *(n * generation.stride for n in grid), 3)
    noise = batch.whole(1, *(n * generation.patch for n in grid), generation.vae.z_channels)
    traced = flow.encode.trace(batch.params, pixels, noise, config=sizes)
    return batch.program("encode", traced, {"batch": (pixels, noise)}, is_whole=True)


# --- what N questions take -----------------------------------------------------------------------


def outlook(
    model: Reasoner,
    seconds: tuple[float, float] | None,
    *,
    batch_size: int,
    hosts: int,
    chips: int,
    questions: int,
    price: float | None,
) -> dict[str, Any]:
    """Speed and hours, from the seconds of a batch.

    Args:
      seconds: (least, most) modelled seconds of a batch on one host; None if not modelled.
      batch_size: questions of a batch. hosts: that answer batches at the same time.
      price: dollars of a chip for an hour; None if unknown.
    Returns:
      {"batch_size", "hosts", "chips", "questions", "tokens", "images", "seconds_per_batch",
      "tokens_per_sec", "hours", "chip_hours", "dollars"}. "tokens" and "images" are of one
      question. Times are (least, most).
    """
    images = IMAGES if model.config.generation else 0
    tokens = (1 + images) * model.protocol.max_new_tokens
    hours = speed = None
    if seconds is not None:
        rounds = -(-questions // (batch_size * hosts))
        hours = tuple(rounds * n / 3600 for n in seconds)
        speed = tuple(batch_size * hosts * tokens / n for n in reversed(seconds))
    chip_hours = hours and tuple(chips * n for n in hours)
    return {
        "batch_size": batch_size,
        "hosts": hosts,
        "chips": chips,
        "questions": questions,
        "tokens": tokens,
        "images": images,
        "seconds_per_batch": seconds,
        "tokens_per_sec": speed,
        "hours": hours,
        "chip_hours": chip_hours,
        "price_per_chip_hour": price,
        "dollars": chip_hours and price and tuple(price * n for n in chip_hours),
    }
