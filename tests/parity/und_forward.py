"""Golden set `und_forward`: student and teacher packs, hidden states, logits, cross entropy."""

import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax.model import bagel
from parity.inputs import (
    bucket,
    completion,
    cross_entropy,
    first_layers,
    forward,
    normed,
    pack,
    role_blocks,
    score,
    visible,
)
from parity.replay import close, compare, equal, read


def test_und_forward(goldens, und_forward, model, tokenizer):
    """Both packs: positions, rope positions, mask, targets exactly; hidden states, logits, cross
    entropy closely.
    """
    tensors, settings = read(goldens, "und_forward", und_forward)
    config, params = model
    target = blocks_lib.Text(tensors["completion_ids"], loss=True)
    rows = [
        [*blocks, target]
        for blocks in role_blocks(tensors, tokenizer, config.vit.patch_size, settings)
    ]
    batch = context_lib.supervise(rows, bucket(rows), tokenizer=tokenizer, side=config.vit.side)
    context = batch.context
    hidden = np.asarray(forward(params, context, config=config))
    shorter, cut = first_layers(config, params, "llm", 1)
    first = np.asarray(forward(cut, context, config=shorter))
    for r, role in enumerate(("student", "teacher")):

        def golden(name):
            return tensors[f"{role}.{name}"]

        facts, n = settings[role], len(golden("packed_position_ids"))
        assert context.length[r] == facts["sequence_length"] == n
        assert [b.length for b in rows[r]] == facts["split_lens"]
        modes = ["causal" if isinstance(b, blocks_lib.Text) else "full" for b in rows[r]]
        assert modes == facts["attn_modes"]
        equal(context.tokens[r, golden("packed_text_indexes")], golden("packed_text_ids"))
        equal(context.rope_positions[r, :n], golden("packed_position_ids"))
        mask = np.asarray(visible(context.limit, context.segment, context.segment))[r]
        compare(equal, mask[:n, :n], tensors, f"{role}.attention_mask")
        assert not mask[:n, n:].any()
        patches = len(golden("packed_vit_position_ids"))
        compare(equal, context.patches[r, :patches], tensors, f"{role}.packed_vit_tokens")
        equal(context.patch_table_ids[r, :patches], golden("packed_vit_position_ids"))
        equal(context.patch_positions[r, :patches], golden("packed_vit_token_indexes"))
        assert (context.patch_positions[r, patches:] == context.padded_length).all()
        equal(np.bincount(context.patch_image[r, :patches])[1:], golden("vit_token_seqlens"))
        targets = batch.mask[r]
        assert targets.sum() == facts["completion_ce_count"]
        equal(batch.positions[r, targets], golden("ce_loss_indexes"))
        equal(batch.labels[r, targets], golden("packed_label_ids"))
        if f"{role}.hidden_layer0" in tensors:
            close(
                first[r, :n],
                normed(golden("hidden_layer0"), config, params),
                f"{role}, first layer",
            )
        compare(close, hidden[r, :n], tensors, f"{role}.hidden_final")
        logits = bagel.logits(params, hidden[r, batch.positions[r, targets]])
        close(logits, golden("logits"), role)
        ce = np.asarray(cross_entropy(logits, golden("packed_label_ids")))
        close(ce, golden("ce"), role)
        assert float(ce.mean()) == pytest.approx(settings[f"{role}_ce_mean"], rel=1e-5)


def test_score(goldens, und_forward, model, tokenizer):
    """`distill.score`: the completion after padded contexts of both roles, one row each."""
    tensors, settings = read(goldens, "und_forward", und_forward)
    config, params = model
    context = pack(
        role_blocks(tensors, tokenizer, config.vit.patch_size, settings), tokenizer, config
    )
    block = completion(tensors["completion_ids"], tokenizer, batch=2)
    n = len(tensors["completion_ids"]) + 1
    equal(block.mask.sum(axis=1), [n, n])
    hidden = np.asarray(score(params, context, block, config=config))
    for r, role in enumerate(("student", "teacher")):
        equal(block.labels[r, :n], tensors[f"{role}.packed_label_ids"])
        close(bagel.logits(params, hidden[r, :n]), tensors[f"{role}.logits"], role)
