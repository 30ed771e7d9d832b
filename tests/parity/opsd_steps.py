"""Golden set `opsd_steps`: several optimizer steps of `distill.update`."""

import functools
import re

import jax
import numpy as np
import pytest

from opsd_jax import context as context_lib
from opsd_jax import distill, rollout
from opsd_jax import params as params_lib
from parity.inputs import SPARE, bucket, jsd_config, pack, role_blocks
from parity.replay import by_name, equal, matching, read


def trajectory(completions):
    """What the sampler would return for these completions."""
    room = max(map(len, completions)) + SPARE
    tokens = np.array([np.pad(ids, (0, room - len(ids))) for ids in completions])
    length = np.array([len(ids) for ids in completions], np.int32)
    mask = np.arange(room) < length[:, None]
    zeros = np.zeros_like(length)
    return rollout.Trajectory(
        tokens=tokens,
        mask=mask,
        logprobs=np.zeros(mask.shape, np.float32),
        num_skips=zeros,
        stop=zeros + rollout.STOP_EOS,
        fed=np.pad(tokens, ((0, 0), (1, 0))),
        fed_sampled=np.pad(mask, ((0, 0), (1, 0))),
        num_fed=length + 1,
    )


@pytest.mark.slow
def test_opsd_steps(goldens, opsd_steps, whole_model, tokenizer):
    """`distill.update`, several optimizer steps: rate, losses, gradient norm, parameters, EMA."""
    tensors, facts = read(goldens, "opsd_steps", opsd_steps)
    model, params = whole_model
    settings = facts["settings"]
    config = distill.DistillConfig(
        model=model,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        divergence=jsd_config(settings["jsd"], chunk=7),
        teacher=settings["teacher_mode"],
        ema_decay=settings["ema_decay"],
        jsd_weight=settings["jsd_weight"],
        ce_weight=settings["ce_weight"],
        accumulation=settings["grad_accum"],
        optim=distill.OptimConfig(
            lr=settings["lr"],
            min_lr=settings["min_lr"],
            warmup_steps=settings["warmup"],
            total_steps=settings["total"],
            b1=settings["betas"][0],
            b2=settings["betas"][1],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            max_grad_norm=settings["max_grad_norm"],
        ),
    )
    numbers = sorted({int(match[1]) for match, _ in matching(tensors, r"sample(\d+)\..*")})
    samples = {
        n: role_blocks(tensors, tokenizer, model.vit.patch_size, {}, f"sample{n}.") for n in numbers
    }
    sizes = [bucket([blocks[role] for blocks in samples.values()]) for role in (0, 1)]
    completions = {n: tensors[f"sample{n}.completion_ids"] for n in numbers}
    longest = max(completions.values(), key=len)

    # Their gradient is zero but for rounding, which AdamW's tiny epsilon blows up to whole steps of
    # noise.
    def is_trap(name):
        return name.startswith("vit_model.") and name.endswith("self_attn.k_proj.bias")

    def check(prefix, params):
        """Compares the tensors called `prefix` + parameter name and counts them."""
        ours = by_name(params)
        wanted = matching(tensors, re.escape(prefix) + r"(.+)")
        for match, tensor in wanted:
            if not is_trap(match[1]):
                np.testing.assert_allclose(
                    ours[match[1]], tensor, atol=2e-5, rtol=0, err_msg=match[0]
                )
        return len(wanted)

    # Committed to a device like what comes back from an update, so that the program is compiled
    # once.
    state = jax.jit(functools.partial(distill.init_state, config=config))(params)
    state = jax.device_put(state, jax.devices()[0])
    order = facts["sample_order"]
    done = found = 0
    for k, step in enumerate(facts["steps"]):
        micros = step["micros"]
        ids = [micro["sample"] for micro in micros]
        assert ids == [order[(done + m) % len(order)] for m in range(config.accumulation)]
        done += len(ids)
        batch = context_lib.Batch(
            *(
                pack([samples[n][role] for n in ids], tokenizer, model, sizes[role])
                for role in (0, 1)
            )
        )
        # The longest completion rides along for its length only: all steps share one compiled
        # program.
        sampled = trajectory([*(completions[n] for n in ids), longest])
        sampled = jax.tree.map(lambda x: x[: len(ids)], sampled)
        assert [len(completions[n]) + 1 for n in ids] == [
            micro["n_completion_rows"] for micro in micros
        ]
        state, metrics = distill.update(state, batch, sampled, config=config)

        def mean(name):
            return np.mean([micro[name] for micro in micros])

        for ours, wanted in (
            ("lr", step["lr_used"]),
            ("grad_norm", step["grad_norm_before_clip"]),
            ("jsd", mean("jsd")),
            ("ce", mean("ce")),
            ("loss", mean("loss")),
        ):
            np.testing.assert_allclose(
                metrics[ours], wanted, rtol=1e-4, atol=1e-7, err_msg=f"{ours}, step {k}"
            )
        found += check(f"step{k}.param.", state["params"])
        if config.teacher == "ema":
            found += check(f"step{k}.ema.", state["ema"])
    assert found + check("final.param.", state["params"]) > len(facts["steps"])
    before, after = by_name(params), by_name(state["params"])
    unchanged = set(facts["unchanged_params"]) & set(after)
    assert unchanged
    unchanged |= set(
        by_name(params_lib.partition(params)[1])
    )  # the official code lists only some of these
    for name in unchanged:
        equal(after[name], before[name], err_msg=name)
    for name in set(after) - unchanged:
        assert is_trap(name) or (after[name] != before[name]).any(), name
