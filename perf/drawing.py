"""Seconds to generate an image, with random weights.

  python perf/drawing.py --size=tiny|mid|7b

The context is that of an interleaved evaluation: system prompt (110 ids), problem image as VAE
latents and as ViT patches, question (60 ids), thought (200 ids); guidance as `flow.HARNESS`, with
1, 2 and 3 branches. Every figure is the median of --repeats runs after one that does not count;
programs are compiled before and not timed. Prints one JSON object per figure, then a table.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import blocks as blocks_lib
from opsd_jax import context, flow, images
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.model.config import GenerationConfig, LLMConfig, ModelConfig, VAEConfig, ViTConfig

MIB = 2**20
TOKENIZER = types.SimpleNamespace(bos=1, eos=2, image_start=3, image_end=4)
FLOAT32 = {"dtype": "float32", "remat": "none", "query_block": 0}
SIZES = {
    "tiny": ModelConfig(
        llm=LLMConfig(
            vocab_size=264,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
        ),
        vit=ViTConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24),
        generation=GenerationConfig(
            VAEConfig(channels=32, multipliers=(1, 1, 1, 1), num_res_blocks=1)
        ),
        **FLOAT32,
    ),
    "mid": ModelConfig(
        llm=LLMConfig(
            vocab_size=32000,
            hidden_size=512,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            intermediate_size=1408,
        ),
        vit=ViTConfig(hidden_size=256, num_layers=6, num_heads=4, intermediate_size=1024),
        generation=GenerationConfig(VAEConfig(channels=32)),
        **FLOAT32,
    ),
    # scores at once would take 3 * 28 * 4,098 * 6,865 * 4 bytes: 8.8 GiB a layer
    "7b": ModelConfig(
        llm=LLMConfig(
            vocab_size=152064,
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            intermediate_size=18944,
        ),
        vit=ViTConfig(hidden_size=1152, num_layers=26, num_heads=16, intermediate_size=4304),
        generation=GenerationConfig(),
        **FLOAT32 | {"query_block": 512},
    ),
}


# --- what both benchmarks share -------------------------------------------------------------------


def model(size: str, **changes) -> ModelConfig:
    """The sizes of that name; changes: fields of ModelConfig that are not None."""
    return dataclasses.replace(SIZES[size], **{k: v for k, v in changes.items() if v is not None})


def random_params(config: ModelConfig):
    """Weights N(0, 1 / fan in), norms 1, biases 0, drawn on the device in the compute dtype, one
    leaf at a time.
    """
    abstract = jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))

    @functools.partial(jax.jit, static_argnames=("shape", "scale"))
    def normal(key, shape, scale):
        if (
            len(shape) == 3
        ):  # stacked over layers: one at a time, or the random bits of all would stand beside them
            return jax.lax.map(
                lambda k: normal(k, shape[1:], scale), jax.random.split(key, shape[0])
            )
        return jax.random.normal(key, shape, config.dtype) * jnp.asarray(scale, config.dtype)

    leaves = {}
    for n, (path, leaf) in enumerate(params_lib.flatten(abstract).items()):
        if path.endswith("bias"):
            leaves[path] = jnp.zeros(leaf.shape, config.dtype)
        elif path.endswith("scale") or "norm" in path.split("/")[-1]:
            leaves[path] = jnp.ones(leaf.shape, config.dtype)
        else:
            fan_in = (
                leaf.shape[-1]
                if path.endswith(("embed", "position", "table"))
                else int(np.prod(leaf.shape[:-1]))
            )
            fan_in //= leaf.shape[0] if len(leaf.shape) == 3 else 1
            leaves[path] = normal(jax.random.key(n), leaf.shape, fan_in**-0.5)
    return jax.block_until_ready(params_lib.unflatten(leaves))


def vit_image(rng, size: tuple[int, int], config: ModelConfig) -> blocks_lib.Image:
    """Random pixels as the ViT gets an image of `size` (height, width) pixels: see
    `images.Resize`.
    """
    patch = config.vit.patch_size
    width, height = images.Resize(stride=patch)(size[1], size[0])
    grid = (height // patch, width // patch)
    return blocks_lib.Image(
        rng.integers(0, 256, (grid[0] * grid[1], config.vit.patch_dim), np.uint8), grid
    )


def text(rng, count: int, config: ModelConfig) -> blocks_lib.Text:
    """A text block of `count` random ids."""
    return blocks_lib.Text(rng.integers(5, config.llm.vocab_size, count).astype(np.int32))


def compiled(function, *args, **static):
    """(program, facts about it): compiled ahead of time, so that no timing holds a compilation."""
    start = time.perf_counter()
    program = function.lower(*args, **static).compile()
    memory = program.memory_analysis()
    return program, {
        "compile_seconds": time.perf_counter() - start,
        "temporary_mib": memory.temp_size_in_bytes / MIB,
    }


def timed(function, *args):
    """(result, seconds until it is ready)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def peak_mib():
    """What JAX reports of the device since the start of the process; None where it does not
    (CPU).
    """
    found = jax.local_devices()[0].memory_stats() or {}
    return found["peak_bytes_in_use"] / MIB if "peak_bytes_in_use" in found else None


def about(name: str, args, config: ModelConfig, params) -> dict:
    """What every line of a benchmark carries."""
    counts = params_lib.count(params)
    return {
        "benchmark": name,
        "size": args.size,
        "dtype": config.dtype,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "parameters": counts["total"],
        "query_block": config.query_block,
        "unroll": config.unroll,
        "repeats": args.repeats,
    }


def show(lines: list[dict], columns: list[str]) -> None:
    """The table of some fields of all lines; a line without a field has a dash."""

    def cell(v):
        return "–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)

    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for line in lines:
        print("| " + " | ".join(cell(line.get(name)) for name in columns) + " |")


def options(doc: str) -> argparse.ArgumentParser:
    """The command line that both have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--problem", type=pixels, default=(512, 512), help="problem image, HEIGHTxWIDTH pixels"
    )
    parser.add_argument(
        "--context", type=int, default=0, help="padded length of the context; 0: as many as needed"
    )
    parser.add_argument("--query_block", type=int, help="see ModelConfig; default: the size's")
    parser.add_argument("--unroll", type=int, help="see ModelConfig; default: the size's")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each program")
    return parser


def pixels(word: str) -> tuple[int, int]:
    """ "1024x768" -> (1024, 768): height and width."""
    height, width = map(int, word.split("x"))
    return height, width


# --- drawing --------------------------------------------------------------------------------------


def contexts(args, config: flow.FlowConfig, problem: np.ndarray):
    """Context [R * B, T + G] of the branches; problem: latent tokens [G, C] of the problem
    image.
    """
    m, g, rng = config.model, config.model.generation, np.random.default_rng(0)
    latent = blocks_lib.Latent(problem, tuple(n // g.stride for n in args.problem))
    seen = vit_image(rng, args.problem, m)
    system, question, thought = (text(rng, n, m) for n in (110, 60, 200))
    rows = {
        "cond": [system, latent, seen, question, thought],
        "text": [system, latent, seen],
        "image": [system, question],
    }
    need = sum(b.length for b in rows["cond"])
    if args.context and args.context < need:
        sys.exit(f"--context={args.context}: the context takes {need} positions")
    return context.pack(
        [rows[branch] for branch in config.branches for _ in range(args.batch)],
        context.Sizes(
            (args.context or need) - len(problem), len(seen.patches), latents=len(problem)
        ),
        side=m.vit.side,
        generation=g,
        tokenizer=TOKENIZER,
    )


def main(argv):
    """Parses the flags, times every number of guidance branches and prints the results."""
    parser = options(__doc__)
    parser.add_argument(
        "--image", type=pixels, default=(1024, 1024), help="drawn image, HEIGHTxWIDTH pixels"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="points of the time grid, one more than steps"
    )
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args(argv)
    m = model(args.size, dtype=args.dtype, query_block=args.query_block, unroll=args.unroll)
    g = m.generation
    for name in ("image", "problem"):
        if any(n % g.stride or n > g.stride * g.side for n in getattr(args, name)):
            sys.exit(
                f"--{name}: sides must be multiples of {g.stride} and at most "
                f"{g.stride * g.side} pixels"
            )
    params = random_params(m)
    facts = {
        **about("drawing", args, m, params),
        "image": "x".join(map(str, args.image)),
        "problem": "x".join(map(str, args.problem)),
        "batch": args.batch,
    }
    lines = []

    def report(measure, seconds, **more):
        lines.append(
            {
                **facts,
                "measure": measure,
                "seconds": statistics.median(seconds),
                "runs": seconds,
                **more,
                "peak_mib": peak_mib(),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
        return lines[-1]["seconds"]

    grid = tuple(n // g.stride for n in args.image)
    rng = np.random.default_rng(0)
    pixel_values = rng.uniform(-1, 1, (args.batch, *args.problem, 3)).astype(np.float32)
    noise = np.zeros(
        (args.batch, *(n // g.vae.downsample for n in args.problem), g.vae.z_channels), np.float32
    )
    encode, made = compiled(flow.encode, params, pixel_values, noise, config=m)
    runs = [timed(encode, params, pixel_values, noise) for _ in range(args.repeats + 1)]
    encoding = report("encode", [seconds for _, seconds in runs[1:]], **made)
    problem = np.asarray(flow.to_tokens(runs[0][0][0], g.patch))

    noise = rng.standard_normal((args.batch, grid[0] * grid[1], g.latent_dim), np.float32)
    positions = flow.latent_positions([grid] * args.batch, noise.shape[1], g.side)
    decode, made = compiled(flow.decode, params, jnp.asarray(noise), grid=grid, config=m)
    decoding = report(
        "decode",
        [timed(decode, params, jnp.asarray(noise))[1] for _ in range(args.repeats + 1)][1:],
        **made,
    )

    scales = {1: {"text_scale": 1.0}, 2: {"image_scale": 1.0}, 3: {}}
    steps = args.steps - 1
    for branches, scale in scales.items():
        config = flow.FlowConfig(
            m,
            TOKENIZER.image_start,
            TOKENIZER.image_end,
            num_timesteps=args.steps,
            **{**flow.HARNESS, **scale},
        )
        inputs = jax.device_put((contexts(args, config, problem), positions))
        prepare, made_prepare = compiled(flow.prefill, params, *inputs, config=config.model)
        denoise, runs = None, []
        for _ in range(args.repeats + 1):
            (conditioning, cache), preparing = timed(prepare, params, *inputs)
            bounds = (jnp.int32(0), jnp.int32(steps))
            cache_mib = sum(a.nbytes for a in cache.values()) / MIB
            state = flow.start(jnp.array(noise), cache, config=config)
            if denoise is None:
                denoise, made = compiled(
                    flow.denoise,
                    params,
                    conditioning,
                    state,
                    *bounds,
                    config=config,
                )
            state, denoising = timed(denoise, params, conditioning, state, *bounds)
            runs.append((preparing, denoising))
            x = state.x
            del cache, state
        if not np.isfinite(x).all():
            sys.exit("the drawn latents are not finite")
        size = {
            "branches": branches,
            "context_positions": conditioning.context_size,
            "drawn_tokens": noise.shape[1],
        }
        preparing = report(
            "prepare", [p for p, _ in runs[1:]], **size, **made_prepare, cache_mib=cache_mib
        )
        denoising = [d for _, d in runs[1:]]
        drawing = report(
            "denoise",
            denoising,
            **size,
            **made,
            cache_mib=cache_mib,
            steps=steps,
            per_step=statistics.median(denoising) / steps,
        )
        # the images of a batch are drawn side by side
        report(
            "image",
            [p + d + decoding for p, d in runs[1:]],
            **size,
            steps=steps,
            prepare=preparing,
            denoise=drawing,
            decode=decoding,
            encode=encoding,
        )
    show(
        lines,
        [
            "measure",
            "branches",
            "seconds",
            "per_step",
            "steps",
            "context_positions",
            "drawn_tokens",
            "temporary_mib",
            "cache_mib",
            "peak_mib",
            "compile_seconds",
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
