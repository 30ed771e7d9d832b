"""Prepared examples as packed contexts of static sizes.

The sizes are entries of `config.data.buckets`: (positions, patches) of the student's and the
teacher's contexts, (positions, patches, targets) of traces, and (latent tokens, images, height,
width) where images are generated. B is the number of examples in a batch.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax import tags
from opsd_jax.blocks import Block, BlockNames, Content, Image, Latent, Text
from opsd_jax.config import BucketsConfig
from opsd_jax.context import Context, PaddedImages, References, Sizes, Supervised
from opsd_jax.data.examples import PreparedExample
from opsd_jax.inputs import checks
from opsd_jax.model.config import GenerationConfig
from opsd_jax.tokenizer import Tokenizer

SIZES = (
    "`python -m opsd_jax.data sizes`, with the same --config options, prints sizes that fit all "
    "examples"
)
_SHOWN = {
    "student": "the student's context",
    "teacher": "the teacher's context",
    "trace": "the trace to learn from",
    "drawn": "the images to generate",
}


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs examples into contexts, in the same way for training, evaluation and diagnosis.

    A bucket is given by its index; -1 is the largest. Packing raises context.TooLongError, with the
    example's pid, if an example does not fit: nothing is truncated.

    Attributes:
      tokenizer: tokenizer of all texts.
      prompts: the fixed texts of the contexts.
      buckets: static sizes of the contexts.
      side: patches along a side of the vision encoder's position table; see `context.pack`.
      generation: sizes of the image-generation path; None where there is none.
      names: names of the blocks of both contexts.
      patch_dim: values of a patch, for batches without any image.
    """

    tokenizer: Tokenizer
    prompts: blocks_lib.Prompts
    buckets: BucketsConfig
    side: int
    generation: GenerationConfig | None = None
    names: BlockNames = BlockNames()
    patch_dim: int = 1

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer) -> "Packer":
        """The packer of a run's settings."""
        model = config_lib.model(config)
        return cls(
            tokenizer=tokenizer,
            prompts=config_lib.prompts(config),
            buckets=BucketsConfig(**config.data.buckets),
            side=model.patches_per_side,
            generation=config_lib.generation(config),
            names=config_lib.block_names(config),
            patch_dim=model.patch_dim,
        )

    # --- blocks of one example -------------------------------------------------------------------

    def blocks(
        self, example: PreparedExample, kind: str, content: Content | None = None
    ) -> list[Block]:
        """Blocks of an example's context, in order.

        Args:
          kind: "student", "teacher", or a layout of traces to learn from (`config.LAYOUTS`).
          content: what the teacher sees (`shown`); None for the example's own.
        """
        return [block for _, block in self.named_blocks(example, kind, content)]

    def named_blocks(
        self, example: PreparedExample, kind: str, content: Content | None = None
    ) -> list[tuple[str, Block]]:
        """The same with the name of each block; "trace" for a block of a trace to learn from."""
        e, content = example.example, content or example.content
        if kind in ("student", "teacher"):
            names = self.names.student if kind == "student" else self.names.teacher
            blocks = blocks_lib.named_blocks(self.tokenizer, self.prompts, names, content)
            if not blocks:
                raise ValueError(
                    f"example {e.pid} has nothing to show in config.{kind}.blocks, which are "
                    f"{', '.join(names)}: add the question, or leave the example out"
                )
            return blocks
        if kind == "interleaved":
            shown = example.visual_thoughts
            trace = blocks_lib.rounds(self.tokenizer, e.thoughts, shown, e.trace_answer)
        elif kind == "drawn":
            trace = self._generation_trace(example)
            return [("trace", block) for block in trace]
        elif kind in ("reference", "text"):
            trace = [Text(self.reference(example), loss=True)]
        else:
            known = ("student", "teacher", *config_lib.LAYOUTS)
            raise ValueError(f"unknown layout {kind!r}: {checks.choose_from(kind, known)}")
        role = "teacher" if kind == "reference" else "student"
        return [*self.named_blocks(example, role), *(("trace", block) for block in trace)]

    def shown(
        self,
        example: PreparedExample,
        mode: str,
        partner: PreparedExample | None = None,
        rng: np.random.Generator | None = None,
    ) -> Content:
        """What the teacher sees of an example in a mode (`blocks.VISUAL_THOUGHTS`).

        Args:
          partner: the other example, which mode "swap" shows.
          rng: the noise of mode "noise".
        """
        names = self.names.privileged
        is_text = mode == "noise" and not all(map(blocks_lib.holds_images, names))
        return blocks_lib.replace_privileged(
            mode,
            names,
            example.content,
            partner.content if partner else {},
            rng,
            self.tokenizer.ordinary if is_text else None,
            noised=self.prompts.form == "chat",
        )

    def _generation_trace(self, example: PreparedExample) -> list[Block]:
        """Blocks of the interleaved trace as the model sees it when it generates images.

        Each image is shown as latents and then as patches, and each visual thought before that as
        noised latents. The latents are filled in on the device (`flow.with_latents`).
        """
        sizes, generation = iter(example.pixels or ()), self.generation
        blocks: list[Block] = []
        for name, block in self.named_blocks(example, "interleaved"):
            if isinstance(block, Image):
                height, width, _ = next(sizes).shape
                grid = height // generation.stride, width // generation.stride
                empty = np.zeros((grid[0] * grid[1], generation.latent_dim), np.float32)
                if name == "trace":  # the others are the problem images
                    blocks.append(Latent(empty, grid, noised=True))
                blocks.append(Latent(empty, grid))
            blocks.append(block)
        return blocks

    def reference(self, example: PreparedExample) -> np.ndarray:
        """Token ids of an example's text-only trace with its answer, int [N].

        Raises ValueError if the example has no such trace.
        """
        e = example.example
        if not e.full_text_only_thought.strip():
            raise ValueError(
                f"example {e.pid} has no full_text_only_thought, which text and reference traces "
                "need: fill the column, or set the stage's mix to interleaved examples only, "
                "config.opsd.reference_share to 0 and config.eval.kl to False"
            )
        trace = blocks_lib.text_trace(e.full_text_only_thought, e.trace_answer)
        return self.tokenizer.encode(trace)

    # --- batches ---------------------------------------------------------------------------------

    def student(self, examples: Sequence[PreparedExample], bucket: int = -1) -> Context:
        """Student contexts: by default problem images and question."""
        blocks = [self.blocks(example, "student") for example in examples]
        return self.pack(examples, "student", bucket, blocks)

    def teacher(
        self,
        examples: Sequence[PreparedExample],
        partners: Sequence[PreparedExample | None],
        mode: str,
        rngs: Sequence[np.random.Generator],
        bucket: int = -1,
    ) -> Context:
        """Teacher contexts: by default those of the student, then visual thoughts.

        Args:
          partners: another example for each, whose privileged blocks mode "swap" shows.
          mode: one of `blocks.VISUAL_THOUGHTS`.
          rngs: a generator for each example, so that its noise does not depend on the others.
        """
        blocks = []
        for example, partner, rng in zip(examples, partners, rngs, strict=True):
            shown = self.shown(example, mode, partner, rng)
            blocks.append(self.blocks(example, "teacher", shown))
        return self.pack(examples, "teacher", bucket, blocks)

    def traces(
        self, examples: Sequence[PreparedExample], layouts: Sequence[str], bucket: int = -1
    ) -> Supervised:
        """Traces to learn from, each example in its layout (`config.LAYOUTS`)."""
        # All batches of a stage that trains image generation hold latents, whatever the layouts are
        # in this process's part of a batch.
        latents = self.buckets.drawn[bucket][0] if examples[0].pixels is not None else 0
        with _setting_named("trace"):
            return context_lib.supervise(
                [self.blocks(example, layout) for example, layout in zip(examples, layouts)],
                Sizes(*self.buckets.trace[bucket], latents=latents),
                tokenizer=self.tokenizer,
                side=self.side,
                generation=self.generation,
                names=[example.example.pid for example in examples],
                patch_dim=self.patch_dim,
            )

    def pack(
        self,
        examples: Sequence[PreparedExample],
        kind: str,
        bucket: int,
        blocks: Sequence[Sequence[Block]],
    ) -> Context:
        """Contexts of the blocks of each example, in the sizes of `data.buckets.<kind>[bucket]`."""
        with _setting_named(kind):
            return context_lib.pack(
                blocks,
                Sizes(*self.buckets[kind][bucket][:2]),
                tokenizer=self.tokenizer,
                side=self.side,
                names=[example.example.pid for example in examples],
                patch_dim=self.patch_dim,
            )

    def images(self, examples: Sequence[PreparedExample | None], bucket: int = -1) -> PaddedImages:
        """The images of examples for the autoencoder.

        An example is None where its images are left out.
        """
        _, count, height, width = self.buckets.drawn[bucket]
        pixels = np.zeros((len(examples), count, height, width, 3), np.uint8)
        sizes = np.zeros((len(examples), count, 2), np.int32)
        for b, example in enumerate(examples):
            shown = (example.pixels or ()) if example else ()
            if len(shown) > count or any(x.shape[0] > height or x.shape[1] > width for x in shown):
                found = ", ".join(f"{x.shape[0]}x{x.shape[1]}" for x in shown)
                raise context_lib.TooLongError(
                    f"example {example.example.pid} has images of {found} pixels, its bucket "
                    f"{count} of {height}x{width}: enlarge config.data.buckets.drawn, or leave the "
                    f"example out. {SIZES}"
                )
            for m, image in enumerate(shown):
                pixels[b, m, : image.shape[0], : image.shape[1]] = image
                sizes[b, m] = image.shape[:2]
        return PaddedImages(pixels, sizes)

    def references(self, examples: Sequence[PreparedExample]) -> tuple[np.ndarray, np.ndarray]:
        """The examples' text-only traces, padded to R, the number of targets of the largest bucket.

        Returns:
          Token ids int32 [B, R], and bool [B, R], true at tokens and false at padding.
        """
        ids = [self.reference(example) for example in examples]
        return self._padded(examples, ids, -1, "set config.eval.kl to False")

    def references_or_answers(
        self, examples: Sequence[PreparedExample], bucket: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same, padded for a bucket; of an example without a text-only trace its answer."""
        ids = [
            self.reference(example)
            if example.example.full_text_only_thought.strip()
            else self.tokenizer.encode(tags.wrap_answer(example.example.answer))
            for example in examples
        ]
        return self._padded(examples, ids, bucket, "set config.data.screen.on to False")

    def _padded(
        self, examples: Sequence[PreparedExample], ids: Sequence[np.ndarray], bucket: int, fix: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of traces, and which are no padding: int32 and bool [B, R].

        fix: what else than a larger bucket helps where a trace is too long.
        """
        width = self.buckets.trace[bucket][2]
        tokens = np.zeros((len(examples), width), np.int32)
        mask = np.zeros((len(examples), width), bool)
        for b, (example, trace) in enumerate(zip(examples, ids, strict=True)):
            if len(trace) > width:
                which = "the largest" if bucket in (-1, len(self.buckets.trace) - 1) else "one"
                raise context_lib.TooLongError(
                    f"the text trace of example {example.example.pid} has {len(trace)} tokens, "
                    f"{which} of config.data.buckets.trace has space for {width}: enlarge it, or "
                    f"{fix}. {SIZES}"
                )
            tokens[b, : len(trace)], mask[b, : len(trace)] = trace, True
        return tokens, mask

    def in_place_of_completions(
        self, examples: Sequence[PreparedExample | None], tokens: int
    ) -> References:
        """Text traces in the place of completions; None where the completion is sampled.

        tokens: N, the most tokens of a completion. A trace is cut there, as a completion is.
        """
        found = References(
            np.zeros((len(examples), tokens), np.int32),
            np.zeros((len(examples), tokens), bool),
            np.zeros(len(examples), bool),
        )
        for b, example in enumerate(examples):
            if example is not None:
                ids = self.reference(example)
                found.cut[b] = len(ids) > tokens
                ids = ids[:tokens]
                found.tokens[b, : len(ids)], found.mask[b, : len(ids)] = ids, True
        return found

    # --- the bucket of an example ----------------------------------------------------------------

    def bucket(
        self, example: PreparedExample, mode: str = "real", partner: PreparedExample | None = None
    ) -> int:
        """Index of the first bucket that an example fits in every role; -1 if it fits none.

        The bucket has space for the true privileged blocks and for those of `mode`, which a partner
        may have larger.
        """
        needs = self.needs(example, (mode,), partner)
        indices = range(len(self.buckets.student))
        return next((index for index in indices if not self.too_small(needs, index)), -1)

    def too_small(self, needs: dict[str, np.ndarray], bucket: int = -1) -> list[str]:
        """The kinds of which a bucket has less space than an example needs (`needs`)."""
        return [kind for kind in needs if np.any(needs[kind] > self.buckets[kind][bucket])]

    def needs(
        self,
        example: PreparedExample,
        modes: Sequence[str] = (),
        partner: PreparedExample | None = None,
    ) -> dict[str, np.ndarray]:
        """{kind of buckets: sizes that the example's largest context of that kind needs}.

        The sizes are those of `config.BUCKET_SIZES`. The teacher sees the true privileged blocks,
        and those of `modes`. Nothing of an image counts but its size.
        """
        # Noise has the sizes of what it replaces.
        others = (mode for mode in modes if mode not in ("real", "noise"))
        seen = [self.shown(example, mode, partner) for mode in ("real", *others)]
        is_bagel = self.prompts.form == "bagel"  # only its traces are interleaved with images
        layouts = ["interleaved"] if is_bagel else []
        if example.example.full_text_only_thought.strip():
            layouts += ["reference", "text"]
        if example.pixels is not None:
            layouts.append("drawn")
        traces = [self.blocks(example, layout) for layout in layouts]
        needs = {
            "student": _need([self.blocks(example, "student")])[:2],
            "teacher": _need([self.blocks(example, "teacher", shown) for shown in seen])[:2],
            "trace": _need(traces or [[]]),
        }
        if example.pixels is not None:
            latents = context_lib.need(traces[-1]).latents
            height, width = np.max([(0, 0), *(x.shape[:2] for x in example.pixels)], axis=0)
            needs["drawn"] = np.array([latents, len(example.pixels), height, width])
        return needs

    def fitting(self, kind: str, blocks: Sequence[Block]) -> int:
        """The first bucket of a kind of contexts that has space for an example's blocks.

        The last one if none has; packing then refuses the example by its pid.
        """
        need, buckets = _need([blocks])[:2], self.buckets[kind]
        return next(
            (n for n, sizes in enumerate(buckets) if np.all(need <= sizes[:2])), len(buckets) - 1
        )


@contextlib.contextmanager
def _setting_named(kind: str) -> Iterator[None]:
    """Adds to the error of a context that is too long whose it is, the setting, and what helps."""
    try:
        yield
    except context_lib.TooLongError as error:
        raise context_lib.TooLongError(
            f"config.data.buckets.{kind} is too small for {_SHOWN[kind]}: {error}. {SIZES}"
        ) from None


def _need(contexts: Sequence[Sequence[Block]]) -> np.ndarray:
    """The largest numbers of positions, patches and targets of some contexts, int [3]."""
    return np.max([context_lib.need(blocks) for blocks in contexts], axis=0)[:3]
