"""Golden set `schedule`: learning rates, gradient clipping, AdamW and EMA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import distill, optimizer
from opsd_jax.model.config import LLMConfig, ModelConfig, ViTConfig
from parity.replay import read


def test_schedule(goldens):
    """Up to its end.

    After it the official cosine would climb again; here it stays at the end's rate.
    """
    _, facts = read(goldens, "schedule", "schedule")
    main = facts["schedule"]
    settings = distill.OptimConfig(
        lr=main["lr"],
        min_lr=main["min_lr"],
        warmup_steps=main["warmup_steps"],
        total_steps=main["total_steps"],
    )
    for name, schedule in (("schedule", "cosine"), ("constant_schedule", "constant")):
        steps = np.array(facts[name]["steps"])
        rates = optimizer.learning_rate(steps, dataclasses.replace(settings, schedule=schedule))
        last = optimizer.learning_rate(
            main["total_steps"], dataclasses.replace(settings, schedule=schedule)
        )
        wanted = np.where(steps <= main["total_steps"], facts[name]["lr_values"], last)
        assert np.sum(steps <= main["total_steps"]) > 10
        np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-6 * main["lr"], err_msg=name)


def test_optimizer(goldens):
    """Clipping, AdamW with its tiny epsilon, schedule and EMA on a toy vector, step by step."""
    tensors, facts = read(goldens, "schedule", "schedule")
    toy = facts["toy"]
    sizes = ModelConfig(
        LLMConfig(1, 4, 1, 1, 1, 1), ViTConfig(1, 1, 1, 1), dtype="float32"
    )  # not used by the update
    config = distill.DistillConfig(
        model=sizes,
        bos=0,
        eos=0,
        ema_decay=toy["ema_decay"],
        optim=distill.OptimConfig(
            lr=toy["lr"],
            min_lr=toy["min_lr"],
            warmup_steps=toy["warmup"],
            total_steps=toy["total"],
            b1=toy["betas"][0],
            b2=toy["betas"][1],
            eps=toy["eps"],
            weight_decay=toy["weight_decay"],
            max_grad_norm=toy["max_grad_norm"],
        ),
    )

    def vector(x):
        return {"llm": {"norm": jnp.asarray(x)}}

    state = distill.init_state(vector(tensors["toy_x0"]), config)
    update = jax.jit(functools.partial(optimizer.apply_gradients, config=config))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    previous = np.zeros_like(tensors["toy_x0"])
    for k, gradient in enumerate(tensors["toy_raw_grads"]):
        state, metrics = update(state, vector(gradient))

        def at(name):
            return tensors[f"toy_{name}"][k]

        moments = state["opt"]
        near(metrics["lr"], at("lr_used")[0])
        near(metrics["grad_norm"], at("grad_norm")[0])
        near(moments.mu["llm"]["norm"], at("exp_avg"))
        near(moments.nu["llm"]["norm"], at("exp_avg_sq"))
        b1 = toy["betas"][0]
        near((moments.mu["llm"]["norm"] - b1 * previous) / (1 - b1), at("clipped_grad"))
        near(state["params"]["llm"]["norm"], at("param"))
        near(state["ema"]["llm"]["norm"], at("ema"))
        previous = np.asarray(moments.mu["llm"]["norm"])
