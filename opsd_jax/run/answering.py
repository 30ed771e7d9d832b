"""Answers to single questions, asked of a run's model in the contexts of its training."""

from collections.abc import Sequence

import jax
from PIL import Image

from opsd_jax import blocks as blocks_lib
from opsd_jax import images, interleave, tags
from opsd_jax.blocks import Block
from opsd_jax.config import BucketsConfig
from opsd_jax.data import randomness
from opsd_jax.data.examples import Preprocessor
from opsd_jax.data.packing import Packer
from opsd_jax.data.schema import Example
from opsd_jax.evaluation.contexts import CONTEXTS, GENERATED, replacement
from opsd_jax.inputs import checks, cli
from opsd_jax.interleave import Answer, ImageGeneration, Reasoner, TrainingContexts

_MODES = ("none", *CONTEXTS)


def answer(
    model: Reasoner,
    about: Image.Image | Sequence[Image.Image] | Example,
    question: str | None = None,
    *,
    visual_thoughts: str = "none",
    partner: Example | None = None,
    seed: int = 0,
    generation: ImageGeneration | None = None,
) -> Answer:
    """Answers one question about an image, or about several.

    The model of a run answers as `python -m opsd_jax.eval` of the same weights does: with the
    blocks of the run's contexts, its prompts, budget of tokens and image skips, greedily. A
    released model, and one that was loaded with a protocol, answers as the official inferencer
    does: its text ends where it asks for an image.

    Args:
      about: the image or images of a question, of any mode that files have, or an example of a run,
        which has the question, too.
      question: its text; None with an example. Images are where it has `<image>`, and before it
        without any.
      visual_thoughts: "none" asks the student. "real", "noise", "swap", "image" and "remove" ask
        the teacher about an example, as these modes of an evaluation do.
      partner: the example whose visual thoughts "swap" shows.
      seed: decides the noise of "noise", which is not that of an evaluation, and what is sampled,
        unless the model decodes greedily.
      generation: the model generates images; it is asked the question without the further blocks.
    Raises:
      TypeError: an argument of another type, such as the path of a model or of an image.
      ValueError: the text has another number of `<image>` than there are images, arguments that do
        not go together, blocks that only an example has, `generation` with a model that was loaded
        without, or an image of grey values with more than 8 bits.
    """
    checks.instance("model", model, Reasoner, "load it first, model = opsd_jax.load(W)")
    given = _check_question(about, question)
    cli.check_seed(seed)
    _check_mode(model, about, visual_thoughts, partner, generation)
    interleave.check_generation(model, generation)
    how = model.protocol.transparency
    shown = [images.open_rgb(image, transparency=how) for image in given]
    key = jax.random.key(seed)
    if model.training and not generation:
        if isinstance(about, Example):
            blocks = _blocks(model, model.training, about, (visual_thoughts, partner, seed))
        else:
            blocks = _plain_blocks(model, model.training, shown, question or "")
        return interleave.complete(model, [blocks], key)[0]
    suffix = model.training.prompts.suffix if model.training else ""
    text = question
    if isinstance(about, Example):
        text = about.question
        shown = [images.open_rgb(data, transparency=how) for data in about.problem_images]
    *before, last = tags.around_places(text or "")
    return interleave.reason(model, [(shown, (*before, last + suffix))], key, generation)[0]


def _check_question(
    about: Image.Image | Sequence[Image.Image] | Example, question: str | None
) -> list[Image.Image]:
    """Checks a question and its images; the images, [] for an example."""
    if isinstance(about, Example):
        if question is not None:
            raise ValueError("an example has a question of its own: leave question out")
        return []
    open_it = "give a Pillow image, PIL.Image.open(FILE), or Image.fromarray of a uint8 array"
    if not isinstance(about, list | tuple):
        checks.instance("about", about, Image.Image, open_it)
    given = [about] if isinstance(about, Image.Image) else list(about)
    if any(isinstance(entry, Example) for entry in given):
        raise TypeError(
            f"about is a list of {len(given)} examples: ask them one by one, "
            "opsd_jax.answer(model, example)"
        )
    interleave.check_images("about", given)
    checks.instance("question", question, str, "give its text")
    if fault := tags.places_fault(str(question), len(given)):
        raise ValueError(f"the question {fault}")
    return given


def _check_mode(
    model: Reasoner,
    about: Image.Image | Sequence[Image.Image] | Example,
    mode: str,
    partner: Example | None,
    generation: ImageGeneration | None,
) -> None:
    """Checks what the model is shown."""
    if mode in GENERATED:
        raise ValueError(
            f"visual_thoughts={mode!r}: the model generates images with "
            "generation=opsd_jax.interleave.ImageGeneration(), whose intervention changes them"
        )
    checks.choice("visual_thoughts", mode, _MODES)
    if partner is not None:
        fix = "give an example, opsd_jax.open_run(W).examples('test')[1]"
        checks.instance("partner", partner, Example, fix)
    if (mode == "swap") != (partner is not None):
        raise ValueError(
            "visual_thoughts='swap' shows those of another example: give partner=EXAMPLE with it, "
            "and only with it"
        )
    if mode == "none":
        return
    start = f"visual_thoughts={mode!r}"
    if generation:
        raise ValueError(f"{start} with generation: the teacher is shown images, give one of both")
    if not isinstance(about, Example):
        raise ValueError(
            f"{start} shows what an example has: give one in the place of image and question, "
            "example = opsd_jax.open_run(W).examples('test')[0]"
        )
    if not model.training:
        raise ValueError(
            f"{start}: the teacher's context is that of a run: load a run, without a protocol"
        )
    if mode == "image" and not blocks_lib.replaces_images(model.training.names):
        privileged = ", ".join(model.training.names.privileged) or "none"
        raise ValueError(
            f"{start} puts the problem image in the place of other images, but the teacher's "
            f"privileged blocks are {privileged}: choose from 'noise', 'swap' and 'remove'"
        )


def _blocks(
    model: Reasoner,
    training: TrainingContexts,
    example: Example,
    shown: tuple[str, Example | None, int],
) -> list[Block]:
    """The blocks of an example's context. shown: (mode, partner, seed), as `answer` takes them."""
    (mode, partner, seed), names, vit = shown, training.names, model.config.vit
    packer = Packer(
        model.tokenizer,
        training.prompts,
        BucketsConfig(),  # not used: the blocks are packed by their own sizes
        model.config.patches_per_side,
        names=names,
    )
    prepare = Preprocessor(
        tokenizer=model.tokenizer,
        suffix=training.prompts.suffix,
        resize=model.vit,
        transparency=model.protocol.transparency,
        patch_size=vit.patch_size if vit else model.vit.stride,
        merge=vit.merge if vit else 1,
        further=tuple(name for name in names.contents if name not in blocks_lib.CONTENTS),
        transforms=training.transforms,
    )
    prepared = prepare(example)
    if mode == "none":
        return packer.blocks(prepared, "student")
    rng = randomness.generator(seed, f"visual thoughts of {example.pid}")
    other = prepare(partner) if partner else None
    content = packer.shown(prepared, replacement(mode), other, rng)
    return packer.blocks(prepared, "teacher", content)


def _plain_blocks(
    model: Reasoner, training: TrainingContexts, shown: Sequence[Image.Image], question: str
) -> list[Block]:
    """The blocks of the student's context of a question without an example.

    ValueError where the student sees blocks that only an example has.
    """
    names = training.names.student
    plain = ("image", "question", *blocks_lib.FIXED_TEXTS)
    if absent := [name for name in names if name not in plain]:
        raise ValueError(
            f"the run's student sees {', '.join(absent)}, which a question alone does not have: "
            "ask with an example, opsd_jax.answer(model, example)"
        )
    content = {
        "image": [interleave.image_block(image, model) for image in shown],
        "question": blocks_lib.question_ids(model.tokenizer, question, training.prompts.suffix),
    }
    return [
        b for _, b in blocks_lib.named_blocks(model.tokenizer, training.prompts, names, content)
    ]
