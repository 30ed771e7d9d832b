"""Share of attention from texts before and after the visual thoughts to each kind of slot, layer by layer.

Letters: B batch, N completion tokens, L layers, M and K groups of queries and of keys.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import context as context_lib
from opsd_jax import sharding
from opsd_jax.data.randomness import generator
from opsd_jax.diagnose import runs
from opsd_jax.evaluation import charts, html
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig

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


def groups(packer, blocks, layout: str):
    """Groups of the slots of a row, from 1, 0 for none: int32 [slots] as queries (`QUERIES`) and as keys (`KEYS`).

    layout: "student", "teacher" or "interleaved". Text before and after are those parts of the teacher's context that
    can look at a picture; in the interleaved layout only the reasoning that the model itself would write.
    """
    p, queries, keys, pictures = packer.prompts, [], [], 0
    names = [
        "question",
        *(
            name
            for name in ("intro", "transition")
            if layout == "teacher" and len(getattr(p, name))
        ),
    ]
    names = [*(["system prompt"] if len(p.system) else []), *names]
    for block in blocks:
        if isinstance(block, context_lib.Image):
            pictures += 1
            name = "problem image" if pictures == 1 else "visual thoughts"
            edge = KEYS.index("image delimiters") + 1
            keys += [edge, *[KEYS.index(name) + 1] * (block.slots - 2), edge]
            queries += [0] * block.slots
            continue
        name = names.pop(0) if names else "text"
        late = pictures > 1 or name == "transition"
        counted = name == "text" if layout == "interleaved" else name != "system prompt"
        keys += [KEYS.index(name) + 1] * block.slots
        queries += [
            (QUERIES.index("text after" if late else "text before") + 1) * counted
        ] * block.slots
    return np.array(queries, np.int32), np.array(keys, np.int32)


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config", "scaled"))
def attention_shares(
    params, context, tokens, queries, keys, *, config: ModelConfig, scaled: bool = True
):
    """Share of their attention that groups of slots of a context, with completion tokens [B, N + 1] behind it, pay to
    groups: float32 [B, L, M, K], mean over heads and over the slots of a group; NaN for a group without slots.

    queries, keys: int32 [B, slots + N + 1], see `groups`. scaled: see `bagel.attention_shares`.
    """
    x = jnp.concatenate(
        [
            bagel.embed(params, context, config=config),
            bagel.embed_tokens(params, tokens, config=config),
        ],
        axis=1,
    )
    after = context_lib.following(context, tokens.shape[1])
    vectors = [
        jnp.concatenate(pair, axis=1)
        for pair in zip((context.positions, context.limit, context.segment), after)
    ]
    sums = bagel.attention_shares(
        params,
        x,
        *vectors,
        queries,
        keys,
        num_queries=len(QUERIES),
        num_keys=len(KEYS),
        config=config,
        scaled=scaled,
    )
    counts = jnp.sum(jax.nn.one_hot(queries - 1, len(QUERIES)), axis=1)
    return jnp.moveaxis(sums, 0, 1) / counts[:, None, :, None]


def shares_by_row(
    run: runs.Run, params, layout: str, mode: str, predictions=None, scaled: bool = True
) -> dict:
    """`attention_shares` of every row: {task: float32 [rows, L, M, K]}.

    layout: "interleaved" has no completion; the others have the answers in `predictions` (see `answers`) behind them,
    tokenised again. mode: what stands in the places of the visual thoughts; of the student's layout, "none".
    """
    config = dataclasses.replace(run.model, query_block=run.model.query_block or 512)
    ids, width = {}, 0
    if predictions is not None:
        ids = {
            (source, p["index"]): run.tokenizer.encode(p["prediction"])
            for source, task in enumerate(run.tasks)
            for p in predictions[task]
        }
        width = 1 + max(runs.sampling(run).max_new_tokens - 1, *map(len, ids.values()))
    found = {task: {} for task in run.tasks}
    for source, mine in runs.batches(run):
        prepared = [run.rows(source, n) for n in mine]
        # behind the teacher's context only their sizes matter here, and noise has those of the real ones
        shown = "real" if mode == "noise" and layout != "interleaved" else mode
        seen = [_visual_thoughts(run, source, n, row, shown) for n, row in zip(mine, prepared)]
        if layout == "interleaved":
            blocks = [
                run.packer.blocks(dataclasses.replace(row, visual_thoughts=tuple(images)), layout)
                for row, images in zip(prepared, seen)
            ]
            context = run.packer.pack(prepared, "trace", -1, blocks)
        else:  # the very pictures that the answers were given to
            _, context = run.selection.packed(source, mine, mode)
            blocks = [run.packer.blocks(row, layout, images) for row, images in zip(prepared, seen)]
        queries, keys = (np.zeros((len(mine), context.slots + width), np.int32) for _ in range(2))
        tokens = np.zeros((len(mine), width), np.int32)
        for b, (n, own) in enumerate(zip(mine, blocks)):
            of_context = groups(run.packer, own, layout)
            queries[b, : len(of_context[0])], keys[b, : len(of_context[1])] = of_context
            if width:
                text = [run.tokenizer.bos, *ids[source, n]]
                tokens[b, : len(text)] = text
                queries[b, context.slots : context.slots + len(text)] = (
                    QUERIES.index("completion") + 1
                )
                keys[b, context.slots :] = KEYS.index("text") + 1
        context, tokens, queries, keys, index = runs.put(
            run, (context, tokens, queries, keys, np.asarray(mine, np.int32))
        )
        shares = attention_shares(
            params, context, tokens, queries, keys, config=config, scaled=scaled
        )
        shares, index = sharding.gather_to_host((shares, index))
        found[run.tasks[source]] |= zip(index.tolist(), shares)
    return {task: np.stack([rows[n] for n in sorted(rows)]) for task, rows in found.items()}


def _visual_thoughts(run, source, number, row, mode) -> list:
    """Pictures in the places of a row's visual thoughts."""
    rng = generator(run.seed, "diagnose visual thoughts", source, number)
    other = run.rows.partner(source, number).visual_thoughts if mode == "swap" else ()
    mode = "none" if mode == "remove" else mode
    return context_lib.replace_visual_thoughts(mode, row.problem, row.visual_thoughts, other, rng)


def mean_over_rows(shares: dict):
    """[L, M, K]: mean over the rows of all tasks that have such queries; NaN where none has."""
    rows = np.concatenate(list(shares.values())).astype(np.float64)
    there = np.isfinite(rows)
    with np.errstate(invalid="ignore"):
        return np.where(there, rows, 0).sum(axis=0) / there.sum(axis=0)


def named(shares) -> dict:
    """[M, K] or [L, M, K] -> {query: {key: share, or a list over layers}}; queries that no row has are left out."""
    return {
        query: {key: shares[..., m, k].tolist() for k, key in enumerate(KEYS)}
        for m, query in enumerate(QUERIES)
        if np.all(np.isfinite(shares[..., m, :]))
    }


def measure(
    run: runs.Run, folder: str, *, checkpoint: str, official_scale: bool = False
) -> tuple[str, list[str]]:
    """Measures and writes `attention`. official_scale: softmax without 1 / sqrt(d), as the official recorder."""
    params, modes = runs.load(run, checkpoint), ("real", "noise", "swap")
    predictions = runs.answers(run, params, modes, os.path.basename(folder))
    kinds = [(layout, mode) for layout in ("interleaved", "teacher") for mode in modes]
    arrays, found = {}, {}
    with runs.progress(run, len(kinds), os.path.basename(folder)) as progress:
        for done, (layout, mode) in enumerate(kinds):
            rows = shares_by_row(
                run,
                params,
                layout,
                mode,
                predictions[mode] if layout == "teacher" else None,
                scaled=not official_scale,
            )
            arrays |= {f"{layout}/{mode}/{task}": x for task, x in rows.items()}
            found.setdefault(layout, {})[mode] = mean_over_rows(rows)
            progress.update(done + 1)
    official = {
        mode: {name: shares[:, m, k].tolist() for name, (m, k) in OFFICIAL.items()}
        for mode, shares in found["interleaved"].items()
    }
    runs.write_arrays(os.path.join(folder, "shares.npz"), arrays)
    summary = {
        "analysis": "attention",
        "checkpoint": checkpoint,
        **run.facts(),
        "scaled": not official_scale,
        "official": official,
        "official_mean": {
            m: {k: float(np.mean(v)) for k, v in x.items()} for m, x in official.items()
        },
        "shares": {
            layout: {mode: named(x) for mode, x in modes.items()} for layout, modes in found.items()
        },
    }
    return runs.finish(folder, summary, page)


def page(summary: dict) -> tuple[str, list[str]]:
    """(title, HTML parts) of a summary."""
    shares = summary["shares"]
    scale = (
        "1/√d as the model has it"
        if summary["scaled"]
        else "**without 1/√d**, as the official recorder has it: sharper than the attention that acts"
    )
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, split {runs.rows_text(summary)}. Share of the attention of text tokens, mean "
            f"over heads, tokens and rows; softmax with {scale}."
        ),
        html.note(
            "**interleaved**: the rows' traces, thought – picture – thought. **teacher**: the teacher's context; its texts "
            "before (question, intro) and after (transition) the visual thoughts, and the model's own greedy answer "
            "(completion). Delimiters of pictures count apart. Noise and swap: in the places of the visual thoughts."
        ),
    ]
    line = lambda layout, mode, query, key: [
        (n, 100 * share) for n, share in enumerate(shares[layout][mode][query][key])
    ]
    axes = {"x": "layer", "y": "share of attention, %"}
    before = {
        f"{layout}: problem image": line(layout, "real", "text before", "problem image")
        for layout in shares
        if "text before" in shares[layout]["real"]
    }
    parts += [html.heading("Text before the visual thoughts"), charts.lines(before, **axes)]
    for layout, query in (
        ("interleaved", "text after"),
        ("teacher", "completion"),
        ("teacher", "text after"),
    ):
        series = {
            f"{mode}: {key}": line(layout, mode, query, key)
            for mode in shares[layout]
            if query in shares[layout][mode]
            for key in ("visual thoughts", "problem image")
        }
        if series:
            parts += [
                html.heading(f"After the visual thoughts: {layout}, {query}"),
                charts.lines(series, **axes),
            ]
    parts += [
        html.heading("As in the paper's Fig. 3b"),
        html.note(
            "Interleaved layout, mean over layers, per cent. Paper (ThinkMorph, V*, its own recorder): txt0->img0 2.0, "
            "txt1->img1 3.0, txt1->img0 0.4."
        ),
        html.heat(
            list(summary["official_mean"]),
            list(OFFICIAL),
            [[100 * x[name] for name in OFFICIAL] for x in summary["official_mean"].values()],
        ),
    ]
    parts.append(html.heading("All groups, per cent"))
    for layout, modes in shares.items():
        for mode, queries in modes.items():
            for query, keys in queries.items():
                values = 100 * np.array([keys[key] for key in KEYS]).T
                parts += [
                    html.heading(f"{layout}, {mode}: {query}", 3),
                    html.heat([f"layer {n}" for n in range(len(values))], list(KEYS), values),
                ]
    return "Attention", parts
