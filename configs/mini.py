"""Visual-OPSD in miniature: a model of 0.3 M parameters, from random weights, on a laptop.

  python -m opsd_jax.train --config=configs/mini.py --workdir=/tmp/opsd-mini
  python -m opsd_jax.train --config=configs/mini.py:maze --workdir=/tmp/opsd-maze
  ... --arm=noise            one control arm alone

  configs/mini.py:chart      questions about charts (the default)
                 :maze       paths in a maze: longer answers, more arms, twice the time
                 :smoke      charts with few steps, to see whether everything works
                 :draw       charts, and image generation is trained, too

The code is that of the 7B model. Settings differ from the paper's, not only in sizes: a fixed
teacher, the divergence over the whole vocabulary without a clip, Muon (docs/results.md). They were
chosen on the validation split.
"""

from opsd_jax import config as config_lib
from opsd_jax.inputs import checks
from opsd_jax.tasks import vocabulary

PRESETS = ("chart", "maze", "smoke", "draw")


def get_config(arg: str = "chart"):
    """The configuration; arg: chart, maze, smoke or draw, see above."""
    if arg not in PRESETS:
        raise ValueError(
            f"configs/mini.py:{arg}: choose from {', '.join(PRESETS)}"
            + checks.did_you_mean(arg, PRESETS)
        )
    task = "maze" if arg == "maze" else "chart"
    c = config_lib.default()
    c.stages = ("warmup", "opsd")

    grid = {"maze": 4, "chart": 5}[task]  # patches along a side of an image; 8 pixels each
    c.model.llm.update(
        vocab_size=448,
        hidden_size=64,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=128,
        rope_theta=100.0,
    )
    c.model.vit.update(
        hidden_size=64, num_layers=1, num_heads=4, intermediate_size=128, patch_size=8, side=8
    )
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.model.unroll = 4
    c.images.update(stride=8, max_size=8 * grid, min_size=8 * grid)
    c.prompts.update(system="", intro=vocabulary.INTRO, transition=vocabulary.TRANSITION)

    c.data.tasks = ({"maze": "Spatial_Navigation", "chart": "Chart_Refocus"}[task],)
    c.data.limits = ()
    c.data.make.update(families=(task,), train=10000, validation=512, test=512)
    patches = grid * grid
    # The longest texts of the task: positions in the student's context, in the teacher's and in a
    # trace; targets of the trace; budget of a completion.
    text = {"maze": (9, 18, 55, 41, 43), "chart": (11, 20, 31, 18, 18)}[task]
    c.data.buckets.student = ((patches + text[0], patches),)
    c.data.buckets.teacher = ((2 * patches + text[1], 2 * patches),)
    c.data.buckets.trace = ((2 * patches + text[2], 2 * patches, text[3]),)
    c.data.cache_rows = 20000
    c.data.threads = 1

    c.warmup.update(steps=300, batch_size=48)
    c.warmup.optim.update(
        kind="muon", lr=4e-3, min_lr=4e-4, warmup_steps=40, b2=0.98, eps=1e-8, weight_decay=0.01
    )
    c.opsd.update(steps=200, batch_size=32, accumulation=1)
    c.opsd.optim.update(
        kind="muon", lr=1.5e-3, min_lr=1.5e-4, warmup_steps=20, b2=0.98, eps=1e-8, weight_decay=0.01
    )
    c.sft.update(steps=200, batch_size=32)
    c.sft.optim.update(c.opsd.optim)  # a copy: one override must not change both
    c.offline.update(steps=200, batch_size=32)
    c.offline.optim.update(c.opsd.optim)
    c.teacher.kind = "fixed"
    c.divergence.update(top_k=0, clip=0.0)
    c.rollout.max_new_tokens = text[4]

    c.eval.update(every=100, rows=128, visual_thoughts=("none", "real"), batch_size=128)
    c.checkpoint.every = 200
    c.arms.noise = {"teacher": {"visual_thoughts": "noise"}}
    c.arms.image = {"teacher": {"visual_thoughts": "image"}}
    c.arms.swap = {"teacher": {"visual_thoughts": "swap"}}
    c.arms.none = {"teacher": {"visual_thoughts": "none"}}
    c.arms.sft = {"stages": ("sft",)}
    c.arms.offline = {"stages": ("offline",)}
    c.run_arms = ("noise", "image")

    if arg in ("maze", "draw"):  # tuned and measured with AdamW
        for stage in ("warmup", "opsd", "sft", "offline"):
            c[stage].optim.kind = "adamw"
        c.opsd.steps = c.sft.steps = c.offline.steps = 400
    if arg == "maze":  # harder than charts: more examples, larger batches, more heads
        c.data.make.train = 12000
        c.model.llm.num_heads = c.model.llm.num_kv_heads = 4
        c.warmup.steps = 500
        c.opsd.batch_size = c.sft.batch_size = c.offline.batch_size = 48
        c.eval.update(rows=256, batch_size=256, final_banned=True)
        c.run_arms = ("noise", "image", "sft")
    if arg == "smoke":
        c.data.make.update(train=1000, validation=128, test=128)
        c.model.llm.num_layers = c.model.unroll = 2  # half the time to compile and to train
        c.warmup.steps, c.opsd.steps, c.sft.steps, c.offline.steps = 30, 20, 20, 20
        c.warmup.optim.warmup_steps = c.opsd.optim.warmup_steps = 10
        c.eval.every = 0
        c.run_arms = ("image",)  # by the programs of the run; noise would compile its own
    if arg == "draw":
        c.stages = ("autoencoder", "warmup", "opsd")
        c.data.make.train = 12000
        c.model.llm.num_heads = c.model.llm.num_kv_heads = 4
        # shift: latent_mean in metrics.jsonl at the end of the autoencoder's stage. scale: 1.8 /
        # latent_std, because charts differ in only a third of the latents' variance, and that third
        # has to be visible through the noise.
        c.model.generation.update(
            on=True,
            channels=32,
            multipliers=(1, 1, 1),
            num_res_blocks=1,
            z_channels=4,
            scale=1.2,
            shift=0.154,
            patch=2,
            side=grid,
            timestep_shift=3.0,
        )
        c.data.buckets.trace = ((2 * patches + text[2] + 6, 2 * patches, text[3]),)
        c.data.buckets.drawn = ((3 * patches, 2, 8 * grid, 8 * grid),)
        c.autoencoder.update(steps=300, batch_size=8, kl_weight=3e-4)
        c.autoencoder.optim.update(lr=3e-3, min_lr=1.5e-4, warmup_steps=20, b2=0.98, eps=1e-8)
        c.warmup.update(steps=2000, batch_size=12)
        c.warmup.mix.update(interleaved=0, reference=1, text=1, drawn=4)
        c.warmup.optim.update(lr=3e-3, min_lr=5e-4)
        c.drawing.update(num_timesteps=25, timestep_shift=3.0, text_scale=1.0, image_scale=1.0)
        c.opsd.batch_size = c.sft.batch_size = c.offline.batch_size = 48
        c.eval.update(rows=256, batch_size=256, final_banned=True)
        c.log.samples_every = 250
        c.run_arms = ()
    return c
