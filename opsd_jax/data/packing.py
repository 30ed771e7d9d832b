"""Prepared examples as packed contexts of static sizes."""

import numpy as np

from opsd_jax import (
    config as config_lib,
)
from opsd_jax import (
    context as context_lib,
)
from opsd_jax.context import Image, PaddedImages
from opsd_jax.data import examples


class Packer:
    """Rows -> packed contexts of static buckets. The same for training, evaluation and diagnostics."""

    def __init__(self, config, tokenizer):
        self.tokenizer, self.prompts = tokenizer, config_lib.prompts(config)
        self.side, self.buckets = config.model.vit.side, config.data.buckets
        self.generation = config_lib.model(config).generation

    def blocks(self, row: examples.PreparedExample, kind: str, visual_thoughts=()) -> list:
        """Blocks of a row as `student`, `teacher`, or one of the trace layouts `config.LAYOUTS`."""
        t, p, e = self.tokenizer, self.prompts, row.example
        if kind == "student":
            return context_lib.student(t, p, row.question, row.problem)
        if kind == "teacher":
            return context_lib.teacher(t, p, row.question, row.problem, visual_thoughts)
        if kind == "interleaved":
            return context_lib.interleaved(
                t, p, row.question, row.problem, e.thoughts, row.visual_thoughts, e.answer
            )
        if kind == "drawn":
            return self._drawn(row)
        trace = context_lib.Text(self.reference(row), loss=True)
        if kind == "reference":
            return [
                *context_lib.teacher(t, p, row.question, row.problem, row.visual_thoughts),
                trace,
            ]
        if kind == "text":
            return [*context_lib.student(t, p, row.question, row.problem), trace]
        raise ValueError(
            f"unknown layout {kind!r}: choose student, teacher or one of {config_lib.LAYOUTS}"
        )

    def _drawn(self, row: examples.PreparedExample) -> list:
        """The interleaved trace as the model sees it when it draws: each picture as latents, then as patches, and each
        visual thought first as noised latents. The latents are filled in on the device (`flow.with_latents`)."""
        pictures, drawn, blocks = iter(row.pixels), self.generation, []
        for block in self.blocks(row, "interleaved"):
            if isinstance(block, Image):
                height, width, _ = next(pictures).shape
                grid = height // drawn.stride, width // drawn.stride
                empty = np.zeros((grid[0] * grid[1], drawn.latent_dim), np.float32)
                is_thought = any(isinstance(b, Image) for b in blocks)
                blocks += [context_lib.Latent(empty, grid, noised=True)] * is_thought + [
                    context_lib.Latent(empty, grid)
                ]
            blocks.append(block)
        return blocks

    def pictures(self, rows, bucket: int = -1) -> PaddedImages:
        """The pictures of rows for the autoencoder; None stands for a row without. TooLong where one does not fit."""
        _, count, height, width = self.buckets.drawn[bucket]
        pixels = np.zeros((len(rows), count, height, width, 3), np.uint8)
        sizes = np.zeros((len(rows), count, 2), np.int32)
        for r, row in enumerate(rows):
            shown = row.pixels if row else ()
            if len(shown) > count or any(x.shape[0] > height or x.shape[1] > width for x in shown):
                raise context_lib.TooLong(
                    f"row {row.example.pid} has pictures of {', '.join(f'{x.shape[0]}x{x.shape[1]}' for x in shown)} "
                    f"pixels, its bucket {count} of {height}x{width}: enlarge data.buckets.drawn, or leave the row out"
                )
            for m, picture in enumerate(shown):
                pixels[r, m, : picture.shape[0], : picture.shape[1]] = picture
                sizes[r, m] = picture.shape[:2]
        return PaddedImages(pixels, sizes)

    def reference(self, row: examples.PreparedExample) -> np.ndarray:
        """Ids of the row's text-only trace with its answer."""
        e = row.example
        if not e.full_text_only_thought.strip():
            raise ValueError(
                f"row {e.pid} has no full_text_only_thought, which text and reference traces need: fill "
                "the column, or set the stage's mix to interleaved rows only and config.eval.kl to False"
            )
        return self.tokenizer.encode(context_lib.text_trace(e.full_text_only_thought, e.answer))

    def references(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """The rows' `reference`, padded to the targets of the largest bucket: int32 [B, R] and what is real, bool [B, R].
        TooLong where one does not fit."""
        width = self.buckets.trace[-1][2]
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for b, row in enumerate(rows):
            ids = self.reference(row)
            if len(ids) > width:
                raise context_lib.TooLong(
                    f"the text trace of row {row.example.pid} has {len(ids)} tokens, the largest of "
                    f"config.data.buckets.trace has room for {width}: enlarge it, or set config.eval.kl to False"
                )
            tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
        return tokens, mask

    def pack(self, rows, kind: str, bucket: int, blocks):
        """Contexts of blocks, a list a row, in the sizes of `data.buckets.<kind>[bucket]`."""
        slots, patches = self.buckets[kind][bucket][:2]
        return context_lib.pack(
            blocks,
            slots=slots,
            patches=patches,
            tokenizer=self.tokenizer,
            side=self.side,
            names=[row.example.pid for row in rows],
        )

    def student(self, rows, bucket: int = -1) -> context_lib.Context:
        """Student contexts: picture and question."""
        return self.pack(rows, "student", bucket, [self.blocks(row, "student") for row in rows])

    def teacher(self, rows, partners, mode: str, rngs, bucket: int = -1) -> context_lib.Context:
        """Teacher contexts with the visual thoughts of a mode (`context.VISUAL_THOUGHTS`). rngs: one a row, so that a
        row's noise does not depend on the others."""
        shown = [
            context_lib.replace_visual_thoughts(
                mode, row.problem, row.visual_thoughts, other.visual_thoughts if other else (), rng
            )
            for row, other, rng in zip(rows, partners, rngs, strict=True)
        ]
        return self.pack(
            rows,
            "teacher",
            bucket,
            [self.blocks(row, "teacher", vts) for row, vts in zip(rows, shown)],
        )

    def traces(self, rows, layouts, bucket: int = -1) -> context_lib.Supervised:
        """Traces to learn from, each row in its layout (`config.LAYOUTS`)."""
        slots, patches, targets = self.buckets.trace[bucket]
        sizes = {}
        if rows[
            0
        ].pixels:  # all batches of a stage that draws hold latents, whatever the layouts of this part of one
            sizes = {
                "latents": self.buckets.drawn[bucket][0],
                "latent_dim": self.generation.latent_dim,
                "latent_side": self.generation.side,
            }
        return context_lib.supervise(
            [self.blocks(row, layout) for row, layout in zip(rows, layouts)],
            slots=slots,
            patches=patches,
            targets=targets,
            tokenizer=self.tokenizer,
            side=self.side,
            names=[row.example.pid for row in rows],
            **sizes,
        )

    def bucket(
        self,
        row: examples.PreparedExample,
        mode: str = "real",
        partner: examples.PreparedExample | None = None,
    ) -> int:
        """Index of the first bucket that the row fits in every role; -1 if none does.

        It has room for the true visual thoughts and for those of `mode`, which a partner may have larger.
        """
        shown = context_lib.replace_visual_thoughts(
            "real" if mode == "noise" else mode,
            row.problem,
            row.visual_thoughts,
            partner.visual_thoughts if partner else (),
            None,
        )
        need = {
            "student": self._need([self.blocks(row, "student")]),
            "teacher": self._need(
                [self.blocks(row, "teacher", vts) for vts in (row.visual_thoughts, shown)]
            ),
        }
        layouts = [
            "interleaved",
            *(("reference", "text") if row.example.full_text_only_thought.strip() else ()),
            *(("drawn",) if row.pixels else ()),
        ]
        blocks = [self.blocks(row, layout) for layout in layouts]
        need["trace"] = self._need(blocks)
        if row.pixels:
            need["drawn"] = np.array(
                [
                    context_lib.need(blocks[-1])[2],
                    len(row.pixels),
                    *np.max([x.shape[:2] for x in row.pixels], axis=0),
                ]
            )
        for index in range(len(self.buckets.student)):
            if all(
                np.all(need[kind][: len(self.buckets[kind][index])] <= self.buckets[kind][index])
                for kind in need
            ):
                return index
        return -1

    def fitting(self, kind: str, blocks) -> int:
        """The first bucket of a kind of contexts that has room for a row's blocks; the last where none has, which packing
        will refuse by the row's name."""
        need, sizes = self._need([blocks])[:2], self.buckets[kind]
        return next((n for n, size in enumerate(sizes) if np.all(need <= size[:2])), len(sizes) - 1)

    @staticmethod
    def _need(rows):
        slots, patches, _ = zip(*map(context_lib.need, rows))
        targets = [
            sum(len(b.ids) + 1 for b in blocks if isinstance(b, context_lib.Text) and b.loss)
            for blocks in rows
        ]
        return np.array([max(slots), max(patches), max(targets)])
