"""OPSD of the SmolLM2 models, Llama decoders that read text alone.

  python -m opsd_jax.train --config=configs/smollm2.py:135M --workdir=W \
      --config.init_from=SmolLM2-135M-Instruct --config.tokenizer=SmolLM2-135M-Instruct \
      --config.data.dir=PREPARED

  configs/smollm2.py:135M         360M or 1.7B; 135M is the default
                    :1.7B,v5p-8   on a slice: v5p-8, v6e-16 or v5e-16
                    :arithmetic   135M on arithmetic word problems that the run makes, on a CPU

examples/smollm2.py makes the folder of the 135M model. Sizes are those of the released config.json.
configs/text_opsd.py has the other settings.
"""

import pathlib
import runpy

from opsd_jax import presets

# Size: (hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, rope_theta)
SIZES = {
    "135M": (576, 30, 9, 3, 1536, 1e5),
    "360M": (960, 32, 15, 5, 2560, 1e5),
    "1.7B": (2048, 24, 32, 32, 8192, 1.3e5),
}

# Texts of :arithmetic.
SYSTEM = (
    "Solve the problem step by step, and give the final answer as a number at the end, wrapped in "
    "<answer></answer> tags."
)
INTRO = "A worked solution of the problem:"


def get_config(arg: str = "135M"):
    """The configuration; arg: a size or arithmetic, and after a comma a slice, see above."""
    name, on = presets.size_and_slice("configs/smollm2.py", arg, (*SIZES, "arithmetic"))
    shared = runpy.run_path(str(pathlib.Path(__file__).with_name("text_opsd.py")))
    c = shared["get_config"]()
    hidden_size, num_layers, num_heads, num_kv_heads, width, rope_theta = SIZES.get(
        name, SIZES["135M"]
    )
    c.model.llm.update(
        vocab_size=49152,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=width,
        rope_theta=rope_theta,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied_head=True,
    )
    if name == "arithmetic":
        c = _arithmetic(c)
    if on:
        presets.use_slice(c, on)
    return c


def _arithmetic(c):
    """OPSD on procedural word problems; the teacher also reads the worked solution.

    A warm-up teaches the form of answers, with the solution and without. Adapters alone are trained
    (LoRA), so that a step is affordable on two CPU cores.
    """
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.lora.rank = 16
    c.prompts.update(system=SYSTEM, intro=INTRO, transition="")
    c.data.tasks = ("Arithmetic",)
    c.data.limits = ()
    c.data.make.update(families=("arithmetic",), difficulty="easy")
    c.data.make.update(train=2000, validation=128, test=256)
    c.data.buckets.student = ((80, 0),)
    c.data.buckets.teacher = ((122, 0),)
    c.data.buckets.trace = ((168, 0, 46),)
    c.data.threads = 1
    c.stages = ("warmup", "opsd")
    c.warmup.update(steps=20, batch_size=8)
    c.opsd.update(steps=40, batch_size=8, accumulation=1)
    c.sft.update(steps=40, batch_size=8, accumulation=1)
    for stage in ("warmup", "opsd", "sft"):
        c[stage].optim.update(lr=5e-4, min_lr=5e-5, warmup_steps=5, b2=0.98, weight_decay=0.0)
    c.teacher.kind = "fixed"
    c.divergence.clip = 0.0  # with the paper's 0.05, OPSD ends below its start (docs/results.md)
    c.rollout.max_new_tokens = 47
    c.eval.update(every=0, batch_size=32, final_split="test")
    c.eval.final_visual_thoughts = ("none", "real")
    c.checkpoint.every = 20
    c.arms.swap = {"teacher": {"visual_thoughts": "swap"}}
    c.arms.none = {"teacher": {"visual_thoughts": "none"}}
    c.arms.sft = {"stages": ("sft",)}
    c.run_arms = ("swap", "none", "sft")
    return c
