"""Share of attention from texts before and after the visual thoughts to parts of the context, by
layer.

Letters: B batch, T positions of a context, N completion tokens, L layers, M and K groups of queries
and of keys.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.blocks import Block, BlockNames, Image
from opsd_jax.data.examples import PreparedExample
from opsd_jax.data.randomness import generator
from opsd_jax.diagnose import output
from opsd_jax.diagnose.selection import Answers, Diagnosis
from opsd_jax.evaluation import charts, contexts, html, wording
from opsd_jax.model import bagel
from opsd_jax.model.attention import Groups
from opsd_jax.model.config import ModelConfig

MODES = ("real", "noise", "swap")
LAYOUTS = ("interleaved", "teacher")
QUERIES = ("text before", "text after", "completion")
KEYS = (
    "system prompt",
    "problem image",
    "question",
    "intro",
    "visual thoughts",
    "transition",
    "text",
    "image delimiters",
)
# Fig. 3b by its own names: (query, key) in the interleaved layout.
OFFICIAL = {"txt0->img0": (0, 1), "txt1->img1": (1, 4), "txt1->img0": (1, 1)}


def measure(
    diagnosis: Diagnosis,
    folder: str,
    checkpoint: str,
    answers: dict[str, Answers],
    *,
    official_scale: bool = False,
) -> output.Analysis:
    """Measures the analysis `attention` of a step folder; writes shares.npz.

    Args:
      answers: those of the step folder in the modes of `MODES`, and maybe more.
      official_scale: softmax without 1 / sqrt(d), as the official recorder has it.
    """
    name = os.path.basename(folder)
    params = diagnosis.session.restore_params(checkpoint)
    is_bagel = diagnosis.selection.packer.prompts.form == "bagel"
    layouts = LAYOUTS if is_bagel else LAYOUTS[1:]  # interleaved traces are BAGEL's
    kinds = [(layout, mode) for layout in layouts for mode in MODES]
    arrays, found = {}, {layout: {} for layout in layouts}
    with diagnosis.progress(len(kinds), name) as bar:
        for done, (layout, mode) in enumerate(kinds, start=1):
            predictions = answers[mode].predictions if layout == "teacher" else None
            shares = shares_by_example(
                diagnosis, params, layout, mode, predictions, scaled=not official_scale
            )
            arrays |= {f"{layout}/{mode}/{task}": x for task, x in shares.items()}
            found[layout][mode] = mean_over_examples(shares)
            bar.update(done)
    official = {
        mode: {name: shares[:, m, k].tolist() for name, (m, k) in OFFICIAL.items()}
        for mode, shares in found.get("interleaved", {}).items()
    }
    output.write_arrays(os.path.join(folder, "shares.npz"), arrays)
    summary = {
        "analysis": "attention",
        "checkpoint": checkpoint,
        **diagnosis.facts(),
        "scaled": not official_scale,
        "official": official,
        "official_mean": {
            m: {k: float(np.mean(v)) for k, v in x.items()} for m, x in official.items()
        },
        "shares": {
            layout: {mode: named(x) for mode, x in modes.items()} for layout, modes in found.items()
        },
    }
    title = "Attention: where texts look"
    return output.Analysis(
        title, summary, parts=lambda: _parts(summary, diagnosis.selection.packer.names)
    )


def shares_by_example(
    diagnosis: Diagnosis,
    params: dict,
    layout: str,
    mode: str,
    predictions: dict[str, list[dict]] | None = None,
    *,
    scaled: bool = True,
) -> dict[str, np.ndarray]:
    """`attention_shares` of every example: {task: float32 [examples, L, M, K]}.

    Args:
      layout: "interleaved" (thought, image, thought; no completion), "teacher" or "student".
      mode: what takes the places of the visual thoughts; "none" for the student's layout.
      predictions: {task: answers in that mode, see `Answers`}; they follow the context,
        tokenised again. None for no completion.
      scaled: see `attention_shares`.
    """
    model = diagnosis.model
    config = dataclasses.replace(model, query_block=model.query_block or 512)
    completions = _Completions(diagnosis, predictions)
    found: dict[str, dict[int, np.ndarray]] = {task: {} for task in diagnosis.tasks}
    for source, mine in diagnosis.batches():
        context, blocks = _contexts(diagnosis, source, mine, layout, mode)
        tokens, queries, keys = completions.grouped(
            source, mine, context.padded_length, blocks, layout
        )
        context, tokens, queries, keys, index = diagnosis.selection.put(
            (context, tokens, queries, keys, np.asarray(mine, np.int32))
        )
        shares = attention_shares(
            params, context, tokens, queries, keys, config=config, scaled=scaled
        )
        shares, index = sharding.gather_to_host((shares, index))
        found[diagnosis.tasks[source]] |= zip(index.tolist(), shares)
    return {task: np.stack([of[n] for n in sorted(of)]) for task, of in found.items()}


def _contexts(
    diagnosis: Diagnosis, source: int, mine: Sequence[int], layout: str, mode: str
) -> tuple[context_lib.Context, list]:
    """(Context [B, T] of some examples, the named blocks of each)."""
    selection, packer = diagnosis.selection, diagnosis.selection.packer
    prepared = [diagnosis.examples(source, n) for n in mine]
    if layout == "interleaved":
        seen = [_visual_thoughts(diagnosis, source, n, row, mode) for n, row in zip(mine, prepared)]
        named = [
            packer.named_blocks(dataclasses.replace(row, visual_thoughts=tuple(images)), layout)
            for row, images in zip(prepared, seen)
        ]
        blocks = [[block for _, block in own] for own in named]
        return packer.pack(prepared, "trace", -1, blocks), named
    # The very images and texts that the answers were given to.
    _, context = selection.packed(source, mine, mode)
    partners = [diagnosis.examples.partner(source, n) if mode == "swap" else None for n in mine]
    # Only sizes matter here, and noise has the size of what it replaces.
    is_real = mode == "noise" or layout == "student"
    replaced = "real" if is_real else contexts.replacement(mode)
    return context, [
        packer.named_blocks(row, layout, packer.shown(row, replaced, partner))
        for row, partner in zip(prepared, partners)
    ]


class _Completions:
    """Answers as token ids, and the groups of their positions.

    Args:
      predictions: see `shares_by_example`.
    """

    def __init__(self, diagnosis: Diagnosis, predictions: dict[str, list[dict]] | None):
        self._packer, self._bos = diagnosis.selection.packer, diagnosis.tokenizer.bos
        self._ids: dict[tuple[int, int], Sequence[int] | np.ndarray] = {}
        self._width = 0  # positions for a completion
        if predictions is not None:
            self._ids = {
                (source, p["index"]): diagnosis.tokenizer.encode(p["prediction"])
                for source, task in enumerate(diagnosis.tasks)
                for p in predictions[task]
            }
            budget = diagnosis.sampling().max_new_tokens
            self._width = 1 + max(budget - 1, *map(len, self._ids.values()))

    def grouped(
        self, source: int, mine: Sequence[int], length: int, blocks: list, layout: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Completion tokens and the groups of all positions of a batch.

        Returns:
          tokens int32 [B, N + 1]; queries and keys int32 [B, length + N + 1], see `groups`.
        """
        width = self._width
        queries, keys = (np.zeros((len(mine), length + width), np.int32) for _ in range(2))
        tokens = np.zeros((len(mine), width), np.int32)
        for b, (n, own) in enumerate(zip(mine, blocks)):
            of_context = groups(self._packer.names, own, layout)
            queries[b, : len(of_context[0])], keys[b, : len(of_context[1])] = of_context
            if width:
                text = [self._bos, *self._ids[source, n]]
                tokens[b, : len(text)] = text
                queries[b, length : length + len(text)] = QUERIES.index("completion") + 1
                keys[b, length:] = KEYS.index("text") + 1
        return tokens, queries, keys


def _visual_thoughts(
    diagnosis: Diagnosis, source: int, number: int, row: PreparedExample, mode: str
) -> list:
    """Images in the places of an example's visual thoughts."""
    rng = generator(diagnosis.seed, "diagnose visual thoughts", source, number)
    other = diagnosis.examples.partner(source, number).visual_thoughts if mode == "swap" else ()
    problem = next(iter(row.problems), None)
    return blocks_lib.replace_visual_thoughts(
        contexts.replacement(mode), problem, row.visual_thoughts, other, rng
    )


def groups(
    names: BlockNames, blocks: Sequence[tuple[str, Block]], layout: str
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of the positions of a sequence, counted from 1; 0 for none.

    Args:
      names: names of the blocks of both contexts.
      blocks: the blocks with their names, see `Packer.named_blocks`.
      layout: "student", "teacher" or "interleaved". Text before and after are those parts of the
        teacher's context that can look at an image; in the interleaved layout only the reasoning
        that the model itself would write.

    Returns:
      int32 [T] as queries (`QUERIES`) and as keys (`KEYS`).
    """
    queries, keys, late = [], [], False
    for name, block in blocks:
        is_image = isinstance(block, Image)
        key = _key(names, name, is_image)
        late = late or key in ("visual thoughts", "transition")
        number = KEYS.index(key) + 1
        if is_image:
            edge = KEYS.index("image delimiters") + 1
            keys += [edge, *[number] * (block.length - 2), edge]
            queries += [0] * block.length
            continue
        unseen = ("system prompt", "visual thoughts")  # of the texts of a context
        counted = key == "text" if layout == "interleaved" else key not in unseen
        group = QUERIES.index("text after" if late else "text before") + 1
        keys += [number] * block.length
        queries += [group * counted] * block.length
    return np.array(queries, np.int32), np.array(keys, np.int32)


def _key(names: BlockNames, name: str, is_image: bool) -> str:
    """The group of `KEYS` that a block belongs to.

    All privileged blocks are counted with the visual thoughts, except the problem image itself.
    """
    if name == "system":
        return "system prompt"
    if name in ("question", "intro", "transition"):
        return name
    if name == "trace":
        return "visual thoughts" if is_image else "text"
    if name == "image" or (is_image and name not in names.privileged):
        return "problem image"
    return "visual thoughts" if name in names.privileged else "text"


@sharding.jit_on_mesh(static_argnames=("config", "scaled"))
def attention_shares(
    params: dict,
    context: context_lib.Context,
    tokens: Int[AnyArray, "B completion"],
    queries: Int[AnyArray, "B S"],
    keys: Int[AnyArray, "B S"],
    *,
    config: ModelConfig,
    scaled: bool = True,
) -> Float32[Array, "B L M K"]:
    """Share of their attention that groups of positions of a context pay to groups.

    Args:
      params: the model's dict.
      context: Context [B, T].
      tokens: int32 [B, N + 1], completion tokens that follow the context.
      queries, keys: int32 [B, T + N + 1], see `groups`.
      scaled: False leaves 1 / sqrt(h) out of the softmax that is recorded (not out of the one that
        the decoder uses), as the official recorder does (modeling/bagel/qwen2_navit.py).
    Returns:
      float32 [B, L, M, K], mean over heads and over the positions of a group; NaN for a group
      without positions.
    """
    groups = Groups(
        jax.nn.one_hot(queries - 1, len(QUERIES)),
        jax.nn.one_hot(keys - 1, len(KEYS)),
        jnp.float32(config.llm.head_dim**-0.5 if scaled else 1),
    )
    inputs = bagel.embed_with_completion(params, context, tokens, config=config)
    sums = bagel.attention_shares(params, inputs, groups, config=config)
    counts = jnp.sum(groups.queries, axis=1)
    return jnp.moveaxis(sums, 0, 1) / counts[:, None, :, None]


def mean_over_examples(shares: dict[str, np.ndarray]) -> np.ndarray:
    """[L, M, K]: mean over the examples of all tasks that have such queries; NaN if none has."""
    every = np.concatenate(list(shares.values())).astype(np.float64)
    there = np.isfinite(every)
    with np.errstate(invalid="ignore"):
        return np.where(there, every, 0).sum(axis=0) / there.sum(axis=0)


def named(shares: np.ndarray) -> dict:
    """[M, K] or [L, M, K] as {query: {key: share, or a list over layers}}.

    Queries that no example has are left out.
    """
    return {
        query: {key: shares[..., m, k].tolist() for k, key in enumerate(KEYS)}
        for m, query in enumerate(QUERIES)
        if np.all(np.isfinite(shares[..., m, :]))
    }


def _parts(summary: dict, names: BlockNames) -> list[str]:
    """The parts of a summary's page."""
    shares = summary["shares"]
    scale = (
        "with 1/√d, as the model has it"
        if summary["scaled"]
        else "**without 1/√d**, as the official recorder has it: sharper than the attention that "
        "acts"
    )
    here = ""
    if wording.of_blocks(names) != wording.OF_VISUAL_THOUGHTS:
        listed = wording.listed(names.privileged, images=True)
        here = f" Here **visual thoughts** are the privileged blocks: {listed}."
    parts = [
        html.paragraph(
            "Do texts look at the visual thoughts, and at true ones more than at false ones? "
            "A share is the part of their attention that the tokens of a text pay to a part of "
            "the context, mean over heads, tokens and examples. Equal shares for **real**, "
            "**noise** and **swap** (another example's) mean that attention does not tell true "
            "visual thoughts from false ones."
        ),
        html.note(
            "Two layouts: **interleaved**, the examples' traces, thought – image – thought; and "
            "**teacher**, the teacher's context with the model's own greedy answer (completion), "
            "whose texts before the visual thoughts are question and intro, and after them the "
            f"transition. Delimiters of images count apart. Softmax {scale}.{here}"
        ),
    ]

    def line(layout, mode, query, key):
        return [(n, 100 * share) for n, share in enumerate(shares[layout][mode][query][key])]

    x, y = "layer", "share of attention, %"
    before = {
        f"{layout}: problem image": line(layout, "real", "text before", "problem image")
        for layout in shares
        if "text before" in shares[layout]["real"]
    }
    parts += [html.heading("Text before the visual thoughts"), charts.lines(before, x=x, y=y)]
    for layout, query in (
        ("interleaved", "text after"),
        ("teacher", "completion"),
        ("teacher", "text after"),
    ):
        series = {
            f"{mode}: {key}": line(layout, mode, query, key)
            for mode in shares.get(layout, ())
            if query in shares[layout][mode]
            for key in ("visual thoughts", "problem image")
        }
        if series:
            parts += [
                html.heading(f"After the visual thoughts: {layout}, {query}"),
                charts.lines(series, x=x, y=y),
            ]
    if official := summary["official_mean"]:
        parts += [
            html.heading("As in the paper's Fig. 3b"),
            html.note(
                "Interleaved layout, mean over layers, per cent; in this order the figure's "
                "txt0->img0 (paper, ThinkMorph on V*, its own recorder: 2.0), txt1->img1 (3.0), "
                "txt1->img0 (0.4)."
            ),
            html.heat(
                list(official),
                [f"{QUERIES[query]} → {KEYS[key]}" for query, key in OFFICIAL.values()],
                [[100 * x[name] for name in OFFICIAL] for x in official.values()],
            ),
        ]
    parts += [
        html.heading("All shares"),
        html.note("Mean over layers, per cent. summary.json has every layer."),
    ]
    for layout, modes in shares.items():
        rows = {
            f"{mode}: {query}": [100 * np.mean(keys[key]) for key in KEYS]
            for mode, queries in modes.items()
            for query, keys in queries.items()
        }
        parts += [
            html.heading(f"Layout {layout}", 3),
            html.heat(list(rows), list(KEYS), list(rows.values())),
        ]
    return parts
