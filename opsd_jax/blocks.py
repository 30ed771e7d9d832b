"""What each role sees, as a list of blocks.

Training, sampling, scoring and evaluation all use these lists; `context` packs them into sequences
(official: data/opsd_pack_builder.py):

  student  [sys] [problem image] [question]
  teacher  [sys] [problem image] [question] [intro] [VT image]* [transition]
  both                                                               + [completion]

These are the defaults. `BlockNames` chooses other blocks for each role, and `named_blocks` makes
them of an example's content. Where a question has places of images (`tags.PLACE`), it is several
text blocks, with the problem images between them.

In chat form (`Prompts.form`), a context is a conversation up to the assistant's turn: the system
prompt, and all other blocks in the user's turn. The texts have no bos and eos of their own, and the
chat template's texts around them are blocks, too (`chat`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int, Int32, Shaped

from opsd_jax import chat, images
from opsd_jax.inputs import checks, columns
from opsd_jax.tags import around_places, places_fault, wrap_answer, wrap_thought

# Official prompts, byte for byte (data/opsd_pack_builder.py; inferencer.py for the inference
# variant, which has newlines around it and no space after "i.e.", so its token ids differ).
SYSTEM_TRAINING = (
    "Let's think step by step to answer the question. For text-based thinking, enclose the process "
    "within <think> </think>, e.g. <think> thinking process here </think>. For visual thinking, "
    "enclose the content within <image_start> </image_end>, e.g. <image_start> thinking image here "
    "</image_end>. Finally conclude with the final answer wrapped in <answer></answer> tags, i.e. "
    "<answer> answer here </answer>."
)
SYSTEM_INFERENCE = "\n" + SYSTEM_TRAINING.replace("i.e. <answer>", "i.e.<answer>") + "\n"
INTRO = (
    "The following images are privileged visual references that depict the intermediate visual "
    "thoughts on the path to the correct answer. Use them silently as grounding context; do not "
    "describe or echo them."
)
TRANSITION = (
    "Now, using your own independent reasoning, answer the problem above. Think step by step."
)

# Names of blocks. The fixed texts are fields of `Prompts`, and the others come from the example.
FIXED_TEXTS = ("system", "intro", "transition")
CONTENTS = ("image", "question", "visual_thoughts")
# Names may also be "text:COLUMN" and "images:COLUMN", columns of the data (`inputs.columns`), and
# "image@TRANSFORM", the problem image after one of `images.TRANSFORMS`.
TRANSFORMED = "image@"

VISUAL_THOUGHTS = ("real", "noise", "swap", "image", "none")
MARKER = "<image_start>"
MARKER_END = "<image_end>"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The fixed texts of the contexts, and their form. An empty text leaves its block out.

    system: first block of both contexts.
    intro, transition: texts before and after the teacher's visual thoughts.
    suffix: text that is appended to the question.
    form: "bagel", in which bos and eos are around each text; "chat", turns of system, user and
      assistant by the chat template of the tokenizer's folder.
    thinking: whether an assistant's turn in chat form begins with the model's thoughts, where its
      template has that choice. Otherwise Qwen3's begins with an empty think block.
    """

    system: str = SYSTEM_TRAINING
    intro: str = INTRO
    transition: str = TRANSITION
    suffix: str = ""
    form: Annotated[str, ("bagel", "chat")] = "bagel"
    thinking: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """A text block.

    ids: int32 [n], without delimiters.
    loss: whether its tokens and its closing eos are training targets.
    delimited: whether bos and eos are around it. In chat form the template's texts delimit it.
    noise: of a `NoisedText`, until `conversation` has put it in place.
    """

    ids: np.ndarray
    loss: bool = False
    delimited: bool = True
    noise: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Number of tokens, delimiters included."""
        return len(self.ids) + 2 * self.delimited


@dataclasses.dataclass(frozen=True)
class Image:
    """An image block.

    patches: [n, C], uint8, or float32 that is already normalised to [-1, 1]. Their order is that of
      `images.patchify` with the same merge.
    grid: numbers of rows and columns of patches.
    merge: patches along a side of the merge block that becomes one token; 1: each patch is a token.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    merge: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a grid of another number of patches."""
        if len(self.patches) != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"an image block has {len(self.patches)} patches and the grid {self.grid}: give "
                "rows and columns whose product is the number of patches"
            )

    @property
    def length(self) -> int:
        """Number of tokens, delimiters included."""
        return len(self.patches) // self.merge**2 + 2


def image_block(pixels: Shaped[np.ndarray, "H W 3"], patch: int, merge: int = 1) -> Image:
    """The block of an image of the model's size.

    Args:
      pixels: [H, W, 3], uint8, or float32 in [-1, 1].
      patch: pixels along a side of a patch. merge: see `Image`.
    Raises:
      ValueError: H or W is not a multiple of patch * merge.
    """
    grid = pixels.shape[0] // patch, pixels.shape[1] // patch
    return Image(images.patchify(pixels, patch, merge), grid, merge)


@dataclasses.dataclass(frozen=True)
class Latent:
    """An image block as VAE latents.

    tokens: float32 [n, C], clean.
    grid: numbers of rows and columns of latent tokens.
    noised: whether this is a copy that the flow loss is computed on. Other blocks do not see it.
    """

    tokens: np.ndarray
    grid: tuple[int, int]
    noised: bool = False

    @property
    def length(self) -> int:
        """Number of tokens, delimiters included."""
        return len(self.tokens) + 2


Block = Text | Image | Latent


@dataclasses.dataclass(frozen=True, eq=False)
class NoisedText:
    """A text of a context in chat form whose tokens become noise where they are in the context.

    ids: int32 [n], the text. Its tokens in a context may be fewer, as neighbours merge.
    noise: int32 [n], what takes their place, so that the context has the same length.
    """

    ids: np.ndarray
    noise: np.ndarray


Content = Mapping[str, np.ndarray | NoisedText | Sequence[np.ndarray | NoisedText | Image]]
"""What an example has for each block name: token ids int32 [n] of a text, the ids of each text
around the places in a question (`question_ids`), or images. An empty sequence leaves the block out.
"""


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """Names of the blocks of both contexts, in order. The defaults are the paper's (Eq. 1, 2).

    student, teacher: each name is one of `FIXED_TEXTS` or `CONTENTS`, or the name of a column
      ("text:COLUMN" or "images:COLUMN"), or begins with `TRANSFORMED`.
    """

    student: tuple[str, ...] = ("system", "image", "question")
    teacher: tuple[str, ...] = (
        "system",
        "image",
        "question",
        "intro",
        "visual_thoughts",
        "transition",
    )

    @property
    def privileged(self) -> tuple[str, ...]:
        """The blocks of an example that the teacher has and the student lacks, in order."""
        return tuple(n for n in self.teacher if n not in (*self.student, *FIXED_TEXTS))

    @property
    def contents(self) -> tuple[str, ...]:
        """The blocks of an example in either context, each once."""
        every = dict.fromkeys((*self.student, *self.teacher))
        return tuple(name for name in every if name not in FIXED_TEXTS)


def replaces_images(names: BlockNames) -> bool:
    """Whether there are images that mode "image" puts the problem image in the place of.

    Without any, it leaves the privileged blocks out, as mode "none" does.
    """
    return bool({*filter(holds_images, names.privileged)} - {"image"})


def holds_images(name: str) -> bool:
    """Whether a block of this name consists of images. Otherwise it is a text."""
    return name in ("image", "visual_thoughts") or name.startswith((columns.IMAGES, TRANSFORMED))


def named_blocks(
    tokenizer, prompts: Prompts, names: Sequence[str], content: Content
) -> list[tuple[str, Block]]:
    """(name, block) of each block of a context: the one place where names become blocks.

    Args:
      tokenizer: encodes the fixed texts.
      names: names of the blocks in order, see `BlockNames`. Several images have the same name.
      content: what the example has for the names that are not fixed texts.
    Returns:
      The blocks in order. The images of "image", or where the context lacks it those of the first
      transform, are in the places of the question if there are as many. Otherwise they are where
      their name is. In chat form, tokens of the template are blocks named `chat.TEMPLATE`.
    """
    named = _listed(tokenizer, prompts, names, content)
    if prompts.form == "bagel":
        return named
    own = [block.ids for name, block in named if name == "system" and isinstance(block, Text)]
    system = own[0] if own else np.zeros(0, np.int32)
    return conversation(tokenizer, system, [item for item in named if item[0] != "system"])


def conversation(
    tokenizer, system: Int[np.ndarray, " n"], turn: Sequence[tuple[str, Block]]
) -> list[tuple[str, Block]]:
    """(name, block) of each block of a context in chat form.

    Args:
      tokenizer: was loaded in chat form.
      system: ids of the system prompt, none of them for the template's own.
      turn: texts and images of the user's turn, with their names.
    Raises:
      ValueError: see `chat.encode`.
    """
    parts = [
        chat.Part(name, block.ids, block.noise)
        if isinstance(block, Text)
        else chat.Part(name, None)
        for name, block in turn
    ]
    shown = (block for _, block in turn if isinstance(block, Image))
    return [
        (name, next(shown) if ids is None else Text(ids, delimited=False))
        for name, ids in chat.encode(tokenizer, system, parts)
    ]


def _listed(
    tokenizer, prompts: Prompts, names: Sequence[str], content: Content
) -> list[tuple[str, Block]]:
    """The named blocks of a context in BAGEL's form."""
    placed, in_places = _placed(names, content)
    named: list[tuple[str, Block]] = []
    for name in names:
        if name in FIXED_TEXTS:
            named += [(name, block) for block in _prompt(tokenizer, getattr(prompts, name))]
        elif isinstance(value := content[name], np.ndarray | NoisedText):
            named.append((name, _text(value)))
        elif holds_images(name):
            named += [(name, image) for image in _images(value) if name != placed]
        else:
            for n, text in enumerate(map(_text, _texts(value))):
                named += [(name, text)] if len(text.ids) else []
                named += [(placed, image) for image in in_places[n : n + 1]]
    return named


def _placed(names: Sequence[str], content: Content) -> tuple[str, list[Image]]:
    """(name, images) of the blocks that are in the places of the question; ("", []) without any."""
    if "question" not in names or isinstance(content["question"], np.ndarray | NoisedText):
        return "", []
    problems = [name for name in names if name == "image" or name.startswith(TRANSFORMED)]
    name = "image" if "image" in problems else next(iter(problems), "")
    shown = _images(content[name]) if name else []
    return (name, shown) if len(shown) + 1 == len(content["question"]) else ("", [])


_Value = np.ndarray | NoisedText | Sequence[np.ndarray | NoisedText | Image]


def _images(value: _Value) -> list[Image]:
    """The images that an example has for a block."""
    every = () if isinstance(value, NoisedText) else value
    return [part for part in every if isinstance(part, Image)]


def _texts(value: _Value) -> list[np.ndarray | NoisedText]:
    """The texts that an example has for a block."""
    if isinstance(value, np.ndarray | NoisedText):
        return [value]
    return [part for part in value if isinstance(part, np.ndarray | NoisedText)]


def _text(value: np.ndarray | NoisedText) -> Text:
    if isinstance(value, np.ndarray):
        return Text(value)
    return Text(value.ids, noise=value.noise)


def student(
    tokenizer,
    prompts: Prompts,
    question: str | Int[np.ndarray, " n"],
    problem: Image | Sequence[Image],
) -> list[Block]:
    """Blocks of the paper's student context (Eq. 2 and 6): system prompt, problem image, question.

    Args:
      tokenizer: encodes the texts.
      question: text, or ids int32 [n]. Only a text may have places of images, and only to a text
        `prompts.suffix` is appended.
      problem: the problem image, or several.
    Raises:
      ValueError: the text has another number of places than there are images.
      TypeError: pixels or a Pillow image in the place of a block.
    """
    content = _asked(tokenizer, prompts, question, problem)
    return [b for _, b in named_blocks(tokenizer, prompts, BlockNames.student, content)]


def teacher(
    tokenizer,
    prompts: Prompts,
    question: str | Int[np.ndarray, " n"],
    problem: Image | Sequence[Image],
    visual_thoughts: Iterable[Image | None],
) -> list[Block]:
    """Blocks of the paper's teacher context (Eq. 1 and 5).

    They are the student's blocks, then the intro, the visual thoughts in order (None entries are
    skipped) and the transition. The reasoning texts and the answer are never part of it.
    """
    content = _asked(tokenizer, prompts, question, problem)
    _check_block("visual_thoughts", visual_thoughts)
    thoughts = [vt for vt in visual_thoughts if vt is not None]
    for n, thought in enumerate(thoughts):
        _check_block(f"visual_thoughts[{n}]", thought, Image)
    content = {**content, "visual_thoughts": thoughts}
    return [b for _, b in named_blocks(tokenizer, prompts, BlockNames.teacher, content)]


def _check_block(name: str, value: Any, kind: type | tuple[type, ...] = (Image, Iterable)) -> None:
    """Raises TypeError for an image that is no block, which would be left out of a context."""
    fix = "make a block of it, blocks.image_block(pixels, patch)"
    if hasattr(value, "shape"):
        raise TypeError(f"{name} is an array of shape {tuple(value.shape)}: {fix}")
    checks.instance(name, value, kind, fix)


def _asked(tokenizer, prompts, question, problem) -> Content:
    _check_block("problem", problem)
    shown = (problem,) if isinstance(problem, Image) else tuple(problem)
    for n, image in enumerate(shown):
        _check_block(f"problem[{n}]", image, Image)
    if isinstance(question, str):
        if fault := places_fault(question, len(shown)):
            raise ValueError(f"the question {fault}")
        question = question_ids(tokenizer, question, prompts.suffix)
    return {"image": shown, "question": question}


def question_ids(
    tokenizer, question: str, suffix: str = ""
) -> Int32[np.ndarray, " n"] | tuple[Int32[np.ndarray, " _"], ...]:
    """The ids of a question, or where it has places of images of each text around them.

    suffix: text that is appended to the last one.
    """
    texts = [*around_places(question)]
    if suffix and tokenizer.chat:  # one text for its template
        texts[-1], suffix = texts[-1] + suffix, ""
    ids = [tokenizer.encode(text) if text else np.zeros(0, np.int32) for text in texts]
    if suffix:
        ids[-1] = np.concatenate([ids[-1], tokenizer.encode(suffix)])
    return ids[0] if len(ids) == 1 else tuple(ids)


def _prompt(tokenizer, text):
    if isinstance(text, str):
        text = tokenizer.encode(text) if text else np.zeros(0, np.int32)
    return [Text(text)] if len(text) else []


def replace_privileged(
    mode: str,
    names: Sequence[str],
    own: Content,
    other: Content,
    rng: np.random.Generator | None,
    ordinary: Int[np.ndarray, " K"] | None = None,
    noised: bool = False,
) -> Content:
    """The content that the teacher gets in a mode of `VISUAL_THOUGHTS`.

    Only the privileged blocks differ from the example's own content:

    real: its own.
    noise: images as in `replace_visual_thoughts`. A text becomes as many ids, each chosen uniformly
      from `ordinary`. `rng` gives both, in the order of the names. With `noised` it becomes a
      `NoisedText` of them.
    swap: those of `other`, another example of the same task.
    image: the first problem image in place of each image, nothing for a question without one.
      Texts are left out.
    none: nothing: all of these blocks are left out. The fixed texts remain.

    Args:
      names: the privileged blocks, see `BlockNames.privileged`.
      own, other: content of the example and of the other one, which is read in mode "swap" only.
      rng, ordinary: needed in mode "noise" only. ordinary: ids of the tokens that are not special.
    Raises:
      ValueError: an unknown mode.
    """
    checks.choice("visual_thoughts", mode, VISUAL_THOUGHTS)
    shown: dict[str, _Value] = {}
    for name in names:
        value = own[name]
        if mode == "swap":
            shown[name] = other[name]
        elif holds_images(name):
            problem = next(iter(_images(own["image"])), None)
            shown[name] = replace_visual_thoughts(mode, problem, _images(value), (), rng)
        elif mode == "noise":
            assert rng is not None and ordinary is not None
            texts = [ids for ids in _texts(value) if isinstance(ids, np.ndarray)]
            noise = [rng.choice(ordinary, len(ids)).astype(np.int32) for ids in texts]
            every = [*map(NoisedText, texts, noise)] if noised else noise
            shown[name] = every[0] if isinstance(value, np.ndarray) else every
        elif mode != "real":
            shown[name] = ()
    return {**own, **shown}


def replace_visual_thoughts(
    mode: str,
    problem: Image | None,
    own: Iterable[Image | None],
    other: Iterable[Image | None],
    rng: np.random.Generator | None,
) -> list[Image]:
    """The images that take the place of some images in a mode of `VISUAL_THOUGHTS`.

    real: those of the example, `own`.
    noise: standard normal values of the same shapes, in normalised pixel space, sampled from `rng`
      in every call again.
    swap: those of `other`, another example of the same task.
    image: the problem image in place of each image; the first, if the example has several. No
      image, if it has none (`problem` is None).
    none: no image. Intro and transition remain.

    Args:
      own, other: images. None entries are skipped.
      rng: needed in mode "noise" only.
    Raises:
      ValueError: an unknown mode.
    """
    mine = [vt for vt in own if vt is not None]
    if mode == "real":
        return mine
    if mode == "noise":
        noise = [rng.standard_normal(vt.patches.shape, np.float32) for vt in mine]
        return [Image(values, vt.grid, vt.merge) for values, vt in zip(noise, mine)]
    if mode == "swap":
        return [vt for vt in other if vt is not None]
    if mode == "image":
        return [problem for _ in mine if problem is not None]
    if mode == "none":
        return []
    raise ValueError(f"visual_thoughts is {mode!r}: {checks.choose_from(mode, VISUAL_THOUGHTS)}")


def text_trace(full_text_only_thought: str, answer: str) -> str:
    """The completion of a text-only trace."""
    return wrap_thought(full_text_only_thought) + wrap_answer(answer)


def interleaved(
    tokenizer,
    prompts: Prompts,
    question: str | Int[np.ndarray, " n"],
    problem: Image | Sequence[Image],
    thoughts: Sequence[str],
    visual_thoughts: Iterable[Image],
    answer: str,
) -> list[Block]:
    """Blocks of an interleaved trace as the base model was trained on: text, image, text, ...

    They are the paper's student context and then the `rounds`.
    """
    return [
        *student(tokenizer, prompts, question, problem),
        *rounds(tokenizer, thoughts, visual_thoughts, answer),
    ]


def rounds(
    tokenizer, thoughts: Sequence[str], visual_thoughts: Iterable[Image], answer: str
) -> list[Block]:
    """Blocks of an interleaved trace after its context.

    Round i is `<think>t_i</think><image_start>`, then the image, then the next round, which starts
    with `<image_end>`. The last round ends with the answer. Every text is a training target. The
    images are Image blocks here, which become ViT tokens.
    """
    blocks: list[Block] = []
    shown = list(visual_thoughts)[: len(thoughts)]
    for n, thought in enumerate(thoughts):
        text = (MARKER_END if 0 < n <= len(shown) else "") + wrap_thought(thought)
        text += MARKER if n < len(shown) and n + 1 < len(thoughts) else ""
        text += wrap_answer(answer) if n + 1 == len(thoughts) else ""
        blocks.append(Text(tokenizer.encode(text), loss=True))
        if n < len(shown) and n + 1 < len(thoughts):
            blocks.append(shown[n])
    return blocks
