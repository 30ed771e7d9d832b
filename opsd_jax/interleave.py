"""Rounds of text and generated images: how a unified model answers a question."""

import dataclasses
import itertools
import time

import jax
import numpy as np

from opsd_jax import context as context_lib
from opsd_jax import flow, images, rollout, sharding

VISUAL_THOUGHTS = ("none", "generated")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a question is put.

    system: prompt, "" for none. vit: size rule of what the ViT sees, for position tables of the released size.
    two_stages: whether it sees the picture after the autoencoder's resize (as the inference pipeline does) or the
      original. transparency: see `images.open_rgb`. greedy, temperature, max_new_tokens: of each round of text; the
      budget counts bos. guidance: "official" (inferencer.py) or "harness". rounds: of text, at most.
    """

    system: str = context_lib.SYSTEM_INFERENCE
    vit: images.Resize = images.TRAINING
    two_stages: bool = False
    transparency: str = "white"
    greedy: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 1024
    guidance: str = "official"
    rounds: int = 3


PROTOCOLS = {
    # what the paper states (Sec. 3.1, App. M); its guidance is that of the official inferencer.py
    "paper": Protocol(),
    # what the public evaluation harness does (vlm/ThinkMorph.py)
    "harness": Protocol(
        vit=images.HARNESS_VIT,
        two_stages=True,
        greedy=False,
        temperature=0.3,
        max_new_tokens=4096,
        guidance="harness",
    ),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """What answers: sizes, weights, tokenizer, protocol, and the size rules of the ViT and the autoencoder."""

    config: object
    params: dict
    tokenizer: object
    protocol: Protocol
    vit: images.Resize
    vae: images.Resize
    mesh: object = None
    drawing: dict = dataclasses.field(
        default_factory=dict
    )  # changes to `flow.FlowConfig` that belong to it


@dataclasses.dataclass
class Trace:
    """What came of one question. steps: texts (str) and drawn pictures (uint8 [H, W, 3]) in order. tokens: sampled.
    seconds: {"text", "drawing"}, of the whole batch."""

    steps: list
    tokens: int
    seconds: dict

    @property
    def text(self) -> str:
        """All texts, joined as the model wrote them."""
        return "".join(step for step in self.steps if isinstance(step, str))

    @property
    def pictures(self) -> list:
        return [step for step in self.steps if not isinstance(step, str)]


def see(picture, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """A Pillow RGB image -> uint8 pixels [H, W, 3] for the ViT and for the autoencoder."""
    if model.protocol.two_stages:  # also where nothing is drawn
        pixels, seen = images.two_stage(picture, model.vae, model.vit)
        return seen, pixels
    return images.resize(picture, model.vit), images.resize(picture, model.vae)


def _image(pixels, patch):
    return context_lib.Image(
        images.patchify(pixels, patch), (pixels.shape[0] // patch, pixels.shape[1] // patch)
    )


def bucket(n: int, step: int = 16) -> int:
    """The least of step * 2^k and step * 3 * 2^k that holds n (0 for 0): few shapes, so few compilations."""
    if not n:
        return 0
    size = step
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def _pack(rows, model):
    """Rows of blocks -> Context of bucketed sizes."""
    needs = np.max([context_lib.need(blocks) for blocks in rows], axis=0)
    drawn = model.config.generation
    sizes = {"latent_dim": drawn.latent_dim, "latent_side": drawn.side} if drawn else {}
    packed = context_lib.pack(
        rows,
        slots=bucket(needs[0]),
        patches=bucket(needs[1]),
        latents=bucket(needs[2]),
        **sizes,
        tokenizer=model.tokenizer,
        side=model.config.vit.side,
    )
    return sharding.put_batch(model.mesh, packed) if model.mesh else packed


def reason(
    model: Model,
    questions,
    key,
    *,
    draw: bool,
    always: bool = False,
    changes=None,
    change=None,
    on_step=None,
) -> list[Trace]:
    """Answers a batch of questions, drawing where the text asks for it.

    Args:
      questions: list of (Pillow RGB images, text). key: a PRNG key. draw: False for text alone.
      always: draw after every round but the last, whatever the text says. changes: to `flow.FlowConfig`.
      change: (row, round, picture uint8 [H, W, 3]) -> the picture that the model sees instead of the one that it drew,
        or None for none; the trace keeps what was drawn.
      on_step: called with (round, steps done, steps) while drawing.
    Raises:
      ValueError: `draw` with a model that cannot.
    """

    protocol, tokenizer, config = model.protocol, model.tokenizer, model.config
    marker = rollout.Marker.build(tokenizer.token_bytes, config.llm.vocab_size)
    sampling = rollout.RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        marker=marker,
        max_new_tokens=protocol.max_new_tokens,
        greedy=protocol.greedy,
        temperature=protocol.temperature,
        max_image_skips=0,
    )
    drawing = None
    if draw:
        guidance = flow.HARNESS if protocol.guidance == "harness" else {}
        drawing = flow.FlowConfig(
            model=config,
            image_start=tokenizer.image_start,
            image_end=tokenizer.image_end,
            **{**guidance, **model.drawing, **(changes or {})},
        )
    keys = (jax.random.fold_in(key, n) for n in itertools.count())
    rows = [_ask(model, pictures, text, keys, draw) for pictures, text in questions]
    traces = [Trace([], 0, {"text": 0.0, "drawing": 0.0}) for _ in rows]
    active = list(range(len(rows)))
    for number in range(protocol.rounds if draw else 1):
        # The batch keeps its size, so that nothing compiles again: rows that are done are filled up with another.
        chosen = active + [active[0]] * (len(rows) - len(active))
        before = time.perf_counter()
        found = rollout.sample(
            model.params,
            _pack([rows[n]["cond"] for n in chosen], model),
            next(keys),
            config=sampling,
        )
        tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
        _spent(traces, "text", before)
        wants = []
        for b, n in enumerate(active):
            ids = tokens[b][mask[b]]
            text = _until_bos(tokenizer, ids)
            traces[n].steps.append(text)
            traces[n].tokens += len(ids)
            rows[n]["cond"].append(context_lib.Text(tokenizer.encode(text)))
            if draw and (context_lib.MARKER in text or always and number + 1 < protocol.rounds):
                wants.append(n)
        if not wants:
            break
        before = time.perf_counter()
        chosen = wants + [wants[0]] * (len(rows) - len(wants))
        report = on_step and (lambda done: on_step(number, done, drawing.num_timesteps - 1))
        pictures = _draw(model, [rows[n] for n in chosen], next(keys), drawing, report)
        for picture, n in zip(pictures, wants):
            traces[n].steps.append(picture)
            seen = change(n, number, picture) if change else picture
            if number + 1 < protocol.rounds and seen is not None:
                rows[n]["cond"] += _picture_blocks(model, images.open_rgb(seen), next(keys), True)[
                    0
                ]
        _spent(traces, "drawing", before)
        active = wants
    return traces


def _spent(traces, what, before):
    for trace in traces:
        trace.seconds[what] += time.perf_counter() - before


def _until_bos(tokenizer, ids) -> str:
    """Text of the ids up to another bos, where the official code cuts it."""
    stops = np.flatnonzero(ids == tokenizer.bos)
    return tokenizer.decode(ids[: stops[0]] if len(stops) else ids)


def _ask(model, pictures, text, keys, draw) -> dict:
    """The contexts of a question: {"cond", "text", "image"}, lists of blocks, and the grid of what it may draw.

    cond    system, images, question          grows with every round
    text    system, images                    what guidance by text compares with
    image   system, question                  what guidance by images compares with
    """
    tokenizer = model.tokenizer
    block = lambda t: [context_lib.Text(tokenizer.encode(t))] if t else []
    system, question = block(model.protocol.system), block(text)
    shown, grid = [], None
    for picture in pictures:
        blocks, grid = _picture_blocks(model, picture, next(keys), draw)
        shown += blocks
    if draw and grid is None:  # nothing to take the size from: the largest square
        grid = (model.config.generation.side,) * 2
    return {
        "cond": system + shown + question,
        "text": system + shown,
        "image": system + question,
        "grid": grid,
    }


def _picture_blocks(model, picture, key, draw):
    """(blocks of a picture in a context, grid of its latent tokens): as latents, then as ViT patches."""

    config = model.config
    seen, pixels = see(picture, model)
    blocks, grid = [_image(seen, config.vit.patch_size)], None
    if draw:
        drawn = config.generation
        grid = (pixels.shape[0] // drawn.stride, pixels.shape[1] // drawn.stride)
        shape = (1, grid[0] * drawn.patch, grid[1] * drawn.patch, drawn.vae.z_channels)
        values = (pixels[None].astype(np.float32) / 255 - 0.5) / 0.5
        latents = flow.encode(model.params, values, jax.random.normal(key, shape), config=config)[0]
        blocks.insert(0, context_lib.Latent(np.asarray(flow.to_tokens(latents, drawn.patch)), grid))
    return blocks, grid


def _draw(model, rows, key, drawing, on_step):
    """One picture a row, uint8 [H, W, 3]."""

    drawn, grids = model.config.generation, [row["grid"] for row in rows]
    size = bucket(max(a * b for a, b in grids))
    positions, real = flow.layout(grids, size, drawn.side)
    noise = jax.random.normal(key, (len(rows), size, drawn.latent_dim))
    contexts = _pack([row[branch] for branch in drawing.branches for row in rows], model)
    tokens = flow.draw(
        model.params, contexts, noise, positions, real, config=drawing, on_step=on_step
    )
    return [
        np.asarray(
            flow.decode(model.params, tokens[b : b + 1, : a * c], grid=(a, c), config=model.config)[
                0
            ]
        )
        for b, (a, c) in enumerate(grids)
    ]
