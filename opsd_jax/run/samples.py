"""Human-readable samples of a run, in W/samples/<step>/: what the model saw, wrote and generated.

Functions named write_* are called after every step of a stage whose table entry lists them; each
decides itself when it writes.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import flow, images, interleave
from opsd_jax.context import Context
from opsd_jax.run import model as model_lib
from opsd_jax.run.session import Session
from opsd_jax.run.stage import Stage
from opsd_jax.run.step_inputs import StepInputs

EXAMPLES = 4  # number of examples that are shown
TEXTS = 8  # number of completions that are shown


@dataclasses.dataclass(frozen=True)
class FinishedStep:
    """A step of a stage that is done.

    Attributes:
      stage: the stage.
      begin: the step that this process continued from.
      number: the number of this step.
      inputs: what the update read.
      metrics: what it returned.
      params: the weights after it.
    """

    stage: Stage
    begin: int
    number: int
    inputs: StepInputs
    metrics: dict
    params: dict

    def is_sampled(self, run: Session) -> bool:
        """Whether config.log.samples_every asks for samples of this step."""
        every = run.config.log.samples_every
        return every > 0 and self.number % every == 0


def write(
    run: Session, writers: tuple[Callable[[Session, FinishedStep], None], ...], step: FinishedStep
) -> None:
    """Writes the samples of a step that are due."""
    with run.clock("samples"):
        for writer in writers:
            writer(run, step)


def write_first_batch(run: Session, step: FinishedStep) -> None:
    """Images and texts of the first examples of the stage's first batch, as the model sees them."""
    if step.number != step.stage.first + 1:
        return
    examples, patch = step.inputs.examples[:EXAMPLES], run.config.model.vit.patch_size
    lines = []
    for n, example in enumerate(examples):
        shown = {_problem_name(m): image for m, image in enumerate(example.problems)}
        shown |= {f"vt{m}": image for m, image in enumerate(example.visual_thoughts)}
        for name, part in example.further.items():
            if isinstance(part, tuple):
                safe = re.sub(r"\W", "-", name)
                shown |= {f"{safe}-{m}": image for m, image in enumerate(part)}
        for name, image in shown.items():
            pixels = images.unpatchify(image.patches, image.grid, patch, image.merge)
            run.writer.image(step.number, f"{step.stage.name}-row{n}-{name}", pixels)
        source = example.example
        lines.append(f"== {source.pid}: {source.question} -> {source.answer}")
        lines += [
            f"{role}: {_context_text(run, context, n)}"
            for role, context in _contexts(step.inputs.host).items()
        ]
    run.writer.text(step.number, f"{step.stage.name}-first-batch", "\n".join(lines))


def write_rollouts(run: Session, step: FinishedStep) -> None:
    """What the student wrote for the first examples, their images, and the divergence by position.

    At the first step of a process, at the last one, and every config.log.samples_every steps.
    """
    if not (step.number in (step.begin + 1, step.stage.last) or step.is_sampled(run)):
        return
    if jax.process_count() > 1:  # examples of other hosts are not on this one
        return
    (trajectory,), patch = step.inputs.sampled, run.config.model.vit.patch_size
    for n, example in enumerate(step.inputs.examples[:EXAMPLES]):
        for m, problem in enumerate(example.problems):
            pixels = images.unpatchify(problem.patches, problem.grid, patch, problem.merge)
            run.writer.image(step.number, f"rollout{n}-{_problem_name(m)}", pixels)
    profile = jax.device_get(step.metrics["jsd_by_position"])
    lines = [f"{n:5d}  {x:.6f}" for n, x in enumerate(profile)]
    run.writer.text(step.number, "jsd-by-position", "\n".join(lines))
    tokens, mask, skips = jax.device_get((trajectory.tokens, trajectory.mask, trajectory.num_skips))
    lines = [
        f"{example.example.pid} ({skips[n]} skips), expected {example.example.answer!r}: "
        f"{run.tokenizer.decode(tokens[n][mask[n]])}"
        for n, example in enumerate(step.inputs.examples[:TEXTS])
    ]
    run.writer.text(step.number, "rollouts", "\n".join(lines))


def write_reconstructions(run: Session, step: FinishedStep) -> None:
    """The images of the first examples, and below each what the autoencoder makes of it.

    At the last step, and every config.log.samples_every steps.
    """
    if not (step.number == step.stage.last or step.is_sampled(run)):
        return
    if jax.process_count() > 1:  # a program of one host's images would wait for the others
        return
    for n, example in enumerate(step.inputs.examples[:EXAMPLES]):
        for m, pixels in enumerate(example.pixels or ()):
            pair = images.montage([[pixels], [_reconstruction(run, step.params, pixels)]])
            run.writer.image(step.number, f"reconstruction{n}-{m}", pair)


def write_generated_images(run: Session, step: FinishedStep) -> None:
    """What the model generates for the first examples: its text and its first image.

    The image is shown beside the problem images and the first true visual thought. At the last
    step, and every config.log.samples_every steps.
    """
    if not (step.number == step.stage.last or step.is_sampled(run)):
        return
    if jax.process_count() > 1:
        return
    model = model_lib.of_run(run, step.params)
    model = dataclasses.replace(model, protocol=dataclasses.replace(model.protocol, rounds=2))
    examples = step.inputs.examples[:EXAMPLES]
    answers = interleave.reason(
        model,
        [run.preprocessor().question(example.example) for example in examples],
        jax.random.key(run.config.seed),
        interleave.ImageGeneration(always=True),
    )
    lines = []
    for n, (example, answer) in enumerate(zip(examples, answers)):
        beside = (example.pixels or ())[: len(example.problems) + 1]
        shown = images.montage([[*beside, answer.images[0]]])
        run.writer.image(step.number, f"drawing{n}", shown)
        source = example.example
        lines.append(f"{source.pid}, expected {source.answer!r}: " + answer.text)
    run.writer.text(step.number, "drawings", "\n".join(lines))


def _problem_name(number: int) -> str:
    """The name of a problem image in names of files, counted from 0."""
    return f"problem{number}" if number else "problem"


def _contexts(host) -> dict[str, Context]:
    """The contexts in a batch by their names: those of both roles, or that of the traces."""
    if hasattr(host, "student"):
        return {"student": host.student, "teacher": host.teacher}
    return {"context": getattr(host, "traces", host).context}


def _context_text(run: Session, c: Context, n: int) -> str:
    """Packed sequence n as text; patches are shown as "[16 patches]", latents as "[4 latents]"."""
    positions, patches = np.arange(c.length[n]), set(c.patch_positions[n].tolist())
    if c.latents is not None:  # in the order of the sequence
        places = np.where(c.segment[n] > 0, c.latents.order[n], c.padded_length)
        positions = np.argsort(places, kind="stable")[: c.length[n]]

    def kind(position):
        if position >= c.tokens.shape[1]:
            return "latents"
        return "patches" if position in patches else ""

    parts = []
    for name, group in itertools.groupby(positions.tolist(), kind):
        members = list(group)
        if name:
            parts.append(f"[{len(members)} {name}]")
        else:
            parts += [run.tokenizer.decode([c.tokens[n, position]]) for position in members]
    return "".join(parts)


def _reconstruction(run: Session, params, pixels: np.ndarray) -> np.ndarray:
    """What the autoencoder makes of an image, without noise; uint8 [height, width, 3] both."""
    generation = run.model.generation
    height, width = (side // generation.stride for side in pixels.shape[:2])
    grid = (1, height * generation.patch, width * generation.patch, generation.vae.z_channels)
    padded, _ = flow.normalize_padded(pixels[None], np.array([pixels.shape[:2]]))
    latents = flow.encode(params, padded, jnp.zeros(grid), config=run.model)
    tokens = flow.to_tokens(latents, generation.patch)
    decoded = flow.decode(params, tokens, grid=(height, width), config=run.model)
    return np.asarray(decoded[0])
