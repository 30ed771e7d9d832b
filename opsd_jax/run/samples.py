"""Images and texts of a run for humans."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import config as config_lib
from opsd_jax import flow, images, interleave
from opsd_jax.run import model as model_lib


def show_batch(run, stage, step, prepared, host_batch) -> None:
    """Pictures and texts of the first rows of the first batch, as the model sees them."""
    patch = run.config.model.vit.patch_size
    for n, row in enumerate(prepared[:4]):
        for name, image in (
            ("problem", row.problem),
            *((f"vt{i}", vt) for i, vt in enumerate(row.visual_thoughts)),
        ):
            run.writer.image(
                step, f"{stage}-row{n}-{name}", images.unpatchify(image.patches, image.grid, patch)
            )
    c = getattr(host_batch, "context", None) or host_batch.student
    lines = []
    for n, row in enumerate(prepared[:4]):
        texts = (
            {"context": c}
            if hasattr(host_batch, "context")
            else {"student": host_batch.student, "teacher": host_batch.teacher}
        )
        lines.append(f"== {row.example.pid}: {row.example.question} -> {row.example.answer}")
        lines += [f"{role}: {_context_text(run, x, n)}" for role, x in texts.items()]
    run.writer.text(step, f"{stage}-first-batch", "\n".join(lines))


def show_reconstructions(run, step, prepared, params) -> None:
    """The pictures of the first rows, and below what the autoencoder makes of them."""

    if jax.process_count() > 1:  # a program of one host's pictures would wait for the others
        return
    config = config_lib.model(run.config)
    drawn = config.generation
    for n, row in enumerate(prepared[:4]):
        for m, pixels in enumerate(row.pixels):
            height, width = (side // drawn.stride for side in pixels.shape[:2])
            size = (1, height * drawn.patch, width * drawn.patch, drawn.vae.z_channels)
            sizes = np.array([pixels.shape[:2]])
            latents = flow.encode(
                params, flow.padded(pixels[None], sizes)[0], jnp.zeros(size), config=config
            )
            found = flow.decode(
                params, flow.to_tokens(latents, drawn.patch), grid=(height, width), config=config
            )
            run.writer.image(
                step, f"reconstruction{n}-{m}", images.montage([[pixels], [np.asarray(found[0])]])
            )


def show_drawings(run, step, prepared, params) -> None:
    """For the first rows: the problem, the first visual thought, and what the model draws, side by side; what it wrote."""

    if jax.process_count() > 1:
        return
    model = model_lib.of_run(run, params)
    model = dataclasses.replace(model, protocol=dataclasses.replace(model.protocol, rounds=2))
    rows, lines = prepared[:4], []
    questions = [
        (
            [
                images.open_rgb(
                    row.example.problem_image, transparency=run.config.images.transparency
                )
            ],
            row.example.question + run.config.prompts.suffix,
        )
        for row in rows
    ]
    traces = interleave.reason(
        model, questions, jax.random.key(run.config.seed), generation=True, always=True
    )
    for n, (row, trace) in enumerate(zip(rows, traces)):
        lines.append(f"{row.example.pid}, expected {row.example.answer!r}: " + trace.text)
        shown = images.montage([[*row.pixels[:2], trace.images[0]]])
        run.writer.image(step, f"drawing{n}", shown)
    run.writer.text(step, "drawings", "\n".join(lines))


def _context_text(run, c, row) -> str:
    """The packed sequence of a row as text, patches shown as [n patches], latents as [n latents]."""

    slots, patches = np.arange(c.length[row]), set(c.patch_slots[row].tolist())
    if c.latents is not None:  # in the order of the sequence
        places = np.where(c.segment[row] > 0, c.latents.order[row], c.slots)
        slots = np.argsort(places, kind="stable")[: c.length[row]]
    kind = lambda slot: (
        "latents" if slot >= c.tokens.shape[1] else "patches" if slot in patches else ""
    )
    parts = []
    for name, group in itertools.groupby(slots.tolist(), kind):
        group = list(group)
        parts += (
            [f"[{len(group)} {name}]"]
            if name
            else [run.tokenizer.decode([c.tokens[row, n]]) for n in group]
        )
    return "".join(parts)


def show_rollouts(run, step, prepared, trajectory, profile) -> None:
    """What the student wrote for the first rows, with their pictures, and the divergence at each position."""

    if jax.process_count() > 1:  # rows of other hosts are not here
        return
    for n, row in enumerate(prepared[:4]):
        run.writer.image(
            step,
            f"rollout{n}-problem",
            images.unpatchify(
                row.problem.patches, row.problem.grid, run.config.model.vit.patch_size
            ),
        )
    run.writer.text(
        step,
        "jsd-by-position",
        "\n".join(f"{n:5d}  {x:.6f}" for n, x in enumerate(jax.device_get(profile))),
    )
    tokens, mask, skips = jax.device_get((trajectory.tokens, trajectory.mask, trajectory.num_skips))
    run.writer.text(
        step,
        "rollouts",
        "\n".join(
            f"{row.example.pid} ({skips[n]} skips), expected {row.example.answer!r}: {run.tokenizer.decode(tokens[n][mask[n]])}"
            for n, row in enumerate(prepared[:8])
        ),
    )
