"""Golden set `generate`: greedy decoding, with and without image-skip rounds; the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import rollout
from opsd_jax.model import bagel, masks
from parity.inputs import image_block, pack
from parity.replay import close, compare, equal, matching, path_of, read


def prompt_blocks(tensors, tokenizer, patch):
    prompts = blocks_lib.Prompts(tensors.get("system_ids", ""), "", "")
    problem = image_block(tensors["image"], patch)
    return blocks_lib.student(tokenizer, prompts, tensors["question_ids"], problem)


@pytest.mark.slow
def test_generate(goldens, generate, model, tokenizer):
    """`rollout.sample`: tokens, logits of every fed token, and what the image-skip rounds fed
    between.
    """
    tensors, facts = read(goldens, "generate", generate)
    config, params = model
    skipping = "events" in facts
    table, vocabulary = facts.get("decode_table", {}), config.llm.vocab_size
    texts = [table.get(str(token), f" {token}").encode() for token in range(vocabulary)]
    marker = rollout.Marker.build(texts, vocabulary)
    settings = rollout.RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        marker=marker,
        greedy=True,
        max_new_tokens=facts["max_new_tokens" if skipping else "max_length"],
        max_image_skips=facts.get("max_image_skips", 0),
    )
    blocks = prompt_blocks(tensors, tokenizer, config.vit.patch_size)
    other = [blocks[-1], *blocks]  # a longer row, so that the golden one has padding after it
    context = pack([blocks, other], tokenizer, config)
    sampled, logits = rollout.sample(
        params, context, jax.random.key(0), config=settings, return_logits=True
    )
    sampled, logits = jax.tree.map(np.asarray, (sampled, logits))
    count, fed = sampled.num_fed[0], sampled.fed[0]
    returned = sampled.tokens[0, sampled.mask[0]]
    wanted = tensors["completion_ids"] if skipping else tensors["tokens"][1:]
    equal(returned, wanted)
    heard = logits[0, :count][
        fed[:count] != tokenizer.eos
    ]  # in the official code an injected eos has no logits
    compare(close, heard, tensors, "logits")
    if not skipping:
        equal(fed[:count], tensors["tokens"])
        equal(heard.argmax(-1), tensors["sampled_argmax"])
        assert (sampled.stop[0] == rollout.STOP_EOS) == facts["stopped_on_eos"]
        assert count == facts["n_tokens_returned"]
        assert heard[-1].argmax() == facts["last_sampled_but_not_returned"]
        return
    assert wanted.tolist() == facts["completion"]
    expected, skips = [], 0
    for event in facts["events"]:
        assert event["kv_len_before"] == context.length[0] + len(expected)
        assert event["rope_before"] == context.next_rope_position[0] + len(expected)
        skips += event["event"] == "append_to_cache"
        expected += event["token_ids"] if event["event"] == "append_to_cache" else event["returned"]
    assert fed[:count].tolist() == expected
    assert sampled.num_skips[0] == skips


def test_generate_cache(goldens, model, tokenizer):
    """The cache after the prompt and after decoding, and the counters after every block of the
    prompt.
    """
    root, checked = path_of(goldens, "generate"), 0
    for path in sorted(root.glob("*.safetensors")):
        tensors, facts = read(goldens, "generate", path.stem)
        cached = matching(tensors, r"(prefill|final)_([kv])_(?:layer(\d+)|last)")
        if cached:
            check_cache(cached, tensors, facts, *model, tokenizer)
            checked += 1
    assert checked


def check_cache(cached, tensors, facts, config, params, tokenizer):
    blocks = prompt_blocks(tensors, tokenizer, config.vit.patch_size)
    assert len(facts["prefill_stages"]) == len(blocks)
    for stage, fact in enumerate(facts["prefill_stages"]):
        part = pack([blocks[: stage + 1]], tokenizer, config)
        assert (part.length[0], part.next_rope_position[0]) == (fact["kv_len"], fact["rope"])
    context = pack([blocks], tokenizer, config)
    tokens = tensors["tokens"][None]
    room = tokens.shape[1]

    @jax.jit
    def run(params, context):
        segment = jnp.pad(context.segment, ((0, 0), (0, room)))
        cache = bagel.init_cache(1, context.padded_length + room, config=config)
        x = bagel.embed(params, context, config=config)
        mask = masks.Mask(context.limit, context.segment, segment)
        inputs = bagel.Embedded(x, context.rope_positions, mask)
        _, prefill = bagel.forward(params, inputs, config=config, cache=cache)
        x = bagel.embed_tokens(params, tokens, config=config)
        positions, limit, own = context_lib.following(context, room)
        mask = masks.Mask(limit, own, segment.at[:, context.padded_length :].set(1))
        inputs = bagel.Embedded(x, positions, mask)
        hidden, final = bagel.forward(
            params, inputs, config=config, cache=prefill, offset=context.padded_length
        )
        return prefill, final, bagel.logits(params, hidden[0])

    prefill, final, logits = jax.tree.map(np.asarray, run(params, context))
    used = context.length[0]
    for match, wanted in cached:
        stage, letter, layer = match.groups()
        cache = (prefill if stage == "prefill" else final)[letter][int(layer or -1), 0]
        kept = (
            cache[:used]
            if stage == "prefill"
            else np.concatenate([cache[:used], cache[context.padded_length :]])
        )
        close(kept, wanted, match[0])
    close(logits, tensors["logits"])
    close(logits[:1], tensors["next_token_logits"])
