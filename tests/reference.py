"""A second opinion: both paths of the model, the autoencoder and the divergence in float64 NumPy,
slow and plain.

Written from the conventions in tests/goldens/README.md, without the package: dense masks, no cache,
no padding, no stacking, weights by their checkpoint names. Letters: T slots, H heads, K kv heads, h
head_dim.
"""

import json
import pathlib
import types

import numpy as np

LLM, VIT = "language_model.model", "vit_model.vision_model"


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(q, k, v, mask):
    """q [T, H, h], k and v [T, K, h], mask [T, T] -> [T, H * h]; query head n uses kv head n // (H
    / K).
    """
    group = q.shape[1] // k.shape[1]
    out = []
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // group].T / np.sqrt(q.shape[2])
        out.append(softmax(np.where(mask, scores, -np.inf)) @ v[:, n // group])
    return np.concatenate(out, axis=1)


def rope(x, positions, theta):
    """Rotary positions in the rotate-half form: x [T, H, h], positions [T]."""
    half = x.shape[2] // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def convolve(x, weight, bias, stride=1, pad=((1, 1), (1, 1))):
    """x [C, H, W] with weight [D, C, k, k]; pad: rows above and below, columns left and right."""
    size = weight.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), *pad)), size, axis=(1, 2))
    return (
        np.einsum("chwij,dcij->dhw", windows[:, ::stride, ::stride], weight, optimize=True)
        + bias[:, None, None]
    )


def guide(v, text, image, *, a, b, renorm, renorm_min):
    """Velocities [N, C] of the three contexts -> the guided one; renorm: "global", "channel" or
    "text_channel".
    """
    axes = None if renorm == "global" else -1

    def norm(x):
        return np.sqrt((x * x).sum(axes, keepdims=True))

    def shrunk(u):
        return u * np.clip(norm(v) / (norm(u) + 1e-8), renorm_min, 1)

    u = text + a * (v - text)
    if renorm == "text_channel":
        return image + b * (shrunk(u) - image)
    return shrunk(image + b * (u - image))


def read_tensors(directory, part="model") -> dict:
    """{name: tensor} of a released folder.

    part: "model", one file or shards, or "ae", its VAE (ae.safetensors).
    """
    import ml_dtypes  # noqa: F401  (gives NumPy the type bfloat16)
    from safetensors.numpy import load_file

    tensors = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        if (path.stem == "ae") == (part == "ae"):
            tensors.update(load_file(path))
    return tensors


class Reference:
    """The model of a released folder. Blocks have `ids`, or a `grid` and normalised `patches` or
    latent `tokens` (with a `time` if it is not 0).
    """

    def __init__(self, directory, delimiters):
        """delimiters: ids of bos, eos, image start, image end."""
        directory = pathlib.Path(directory)
        self.llm = json.loads((directory / "llm_config.json").read_text())
        self.vit = json.loads((directory / "vit_config.json").read_text())
        self.whole = json.loads((directory / "config.json").read_text())
        self.ae = json.loads((directory / "ae_params.json").read_text())
        tensors = {**read_tensors(directory), **read_tensors(directory, "ae")}
        self.weights = {name: w.astype(np.float64) for name, w in tensors.items()}
        self.bos, self.eos, self.image_start, self.image_end = delimiters

    def linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def rms_norm(self, x, name):
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.llm["rms_norm_eps"])
        return x / scale * self.weights[f"{name}.weight"]

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def image(self, patches, grid):
        """What one image becomes in the decoder's sequence."""
        side = self.vit["image_size"] // self.vit["patch_size"]
        ids = np.array([row * side + column for row in range(grid[0]) for column in range(grid[1])])
        x = self.linear(patches.astype(np.float64), f"{VIT}.embeddings.patch_embedding")
        x = x + self.weights[f"{VIT}.embeddings.position_embedding.weight"][ids]

        def heads(y):
            return y.reshape(len(ids), self.vit["num_attention_heads"], -1)

        for n in range(self.vit["num_hidden_layers"] - 1):
            layer = f"{VIT}.encoder.layers.{n}"
            y = self.layer_norm(x, f"{layer}.layer_norm1")
            q, k, v = (heads(self.linear(y, f"{layer}.self_attn.{c}_proj")) for c in "qkv")
            x = x + self.linear(attention(q, k, v, np.True_), f"{layer}.self_attn.out_proj")
            y = gelu(self.linear(self.layer_norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
            x = x + self.linear(y, f"{layer}.mlp.fc2")
        x = gelu(self.linear(self.layer_norm(x, f"{VIT}.post_layernorm"), "connector.fc1"))
        return self.linear(x, "connector.fc2") + self.weights["vit_pos_embed.pos_embed"][ids]

    def latents(self, tokens, grid, time):
        """What latent tokens [n, C] at a flow time become in the decoder's sequence."""
        angles = time * 10000 ** (-np.arange(128) / 128)
        wave = np.concatenate([np.cos(angles), np.sin(angles)])
        ids = [
            row * self.whole["max_latent_size"] + column
            for row in range(grid[0])
            for column in range(grid[1])
        ]
        return (
            self.linear(tokens.astype(np.float64), "vae2llm")
            + self.linear(silu(self.linear(wave, "time_embedder.mlp.0")), "time_embedder.mlp.2")
            + self.weights["latent_pos_embed.pos_embed"][ids]
        )

    def pack(self, blocks, after=()):
        """Blocks, and a causal block of the raw ids `after`, as (embeddings, rope positions, mask,
        whether a slot is a latent token).
        """
        table = self.weights[f"{LLM}.embed_tokens.weight"]
        pieces, positions, stops, drawn, rope_id = [], [], [], [], 0
        for block in [*blocks, None]:
            if block is None:
                piece = table[list(after)]
            elif hasattr(block, "ids"):
                piece = table[[self.bos, *block.ids, self.eos]]
            else:
                inner = (
                    self.image(block.patches, block.grid)
                    if hasattr(block, "patches")
                    else self.latents(block.tokens, block.grid, getattr(block, "time", 0.0))
                )
                piece = np.concatenate([table[[self.image_start]], inner, table[[self.image_end]]])
            n, at, causal = len(piece), len(positions), block is None or hasattr(block, "ids")
            pieces.append(piece)
            positions += range(rope_id, rope_id + n) if causal else [rope_id] * n
            rope_id += n if causal else 1
            stops += range(at + 1, at + n + 1) if causal else [at + n] * n
            drawn += [hasattr(block, "tokens") and 0 < i < n - 1 for i in range(n)]
        mask = np.arange(len(positions)) < np.array(stops)[:, None]
        return np.concatenate(pieces), np.array(positions), mask, np.array(drawn)

    def hidden(self, x, positions, mask, drawn):
        """States after the final norm, [T, D]; `drawn` positions use the weights called
        *_moe_gen.
        """

        def heads(y):
            return y.reshape(len(x), -1, self.llm["hidden_size"] // self.llm["num_attention_heads"])

        def expert(apply, x, name):
            y = apply(x, name.format(""))
            if drawn.any():
                y[drawn] = apply(x, name.format("_moe_gen"))[drawn]
            return y

        for n in range(self.llm["num_hidden_layers"]):

            def linear(x, name):
                return expert(self.linear, x, f"{LLM}.layers.{n}.{name}")

            def norm(x, name):
                return expert(self.rms_norm, x, f"{LLM}.layers.{n}.{name}")

            y = norm(x, "input_layernorm{}")
            q, k, v = (heads(linear(y, f"self_attn.{c}_proj{{}}")) for c in "qkv")
            q, k = (
                rope(norm(a, f"self_attn.{c}_norm{{}}"), positions, self.llm["rope_theta"])
                for a, c in ((q, "q"), (k, "k"))
            )
            x = x + linear(attention(q, k, v, mask), "self_attn.o_proj{}")
            y = norm(x, "post_attention_layernorm{}")
            y = silu(linear(y, "mlp{}.gate_proj")) * linear(y, "mlp{}.up_proj")
            x = x + linear(y, "mlp{}.down_proj")
        return expert(self.rms_norm, x, f"{LLM}.norm{{}}")

    def logits(self, blocks, after=()):
        """Logits of every slot, [T, V]."""
        return self.linear(self.hidden(*self.pack(blocks, after)), "language_model.lm_head")

    def greedy(self, blocks, budget):
        """(fed tokens with the leading bos, logits of each), a whole forward pass for each; stops
        at eos.
        """
        fed, rows = [self.bos], []
        while True:
            rows.append(self.logits(blocks, fed)[-1])
            token = int(rows[-1].argmax())
            if token == self.eos or len(fed) == budget:
                return fed, np.array(rows)
            fed.append(token)

    def draw(self, contexts, noise, grid, times, interval, **guidance):
        """Latent tokens [n, C] at time 0, from `noise` at time 1. contexts: blocks of cond, text
        and image; times: the grid; interval, guidance: see `guide`. No cache: each step is a whole
        forward pass after each context.
        """
        x = noise.astype(np.float64)

        def velocity(blocks, time):
            new = types.SimpleNamespace(tokens=x, grid=grid, time=time)
            states = self.hidden(*self.pack([*blocks, new]))[-len(x) - 1 : -1]
            return self.linear(states, "llm2vae")

        for time, following in zip(times[:-1], times[1:]):
            if interval[0] < time <= interval[1]:
                v = guide(*(velocity(blocks, time) for blocks in contexts), **guidance)
            else:
                v = velocity(contexts[0], time)
            x = x - v * (time - following)
        return x

    def conv(self, x, name, **more):
        return convolve(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **more)

    def group_norm(self, x, name):
        y = x.reshape(32, -1)
        y = y - y.mean(1, keepdims=True)
        y = (y / np.sqrt((y * y).mean(1, keepdims=True) + 1e-6)).reshape(x.shape)
        return (
            y * self.weights[f"{name}.weight"][:, None, None]
            + self.weights[f"{name}.bias"][:, None, None]
        )

    def residual(self, x, name):
        y = self.conv(silu(self.group_norm(x, f"{name}.norm1")), f"{name}.conv1")
        y = self.conv(silu(self.group_norm(y, f"{name}.norm2")), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self.conv(x, f"{name}.nin_shortcut", pad=((0, 0), (0, 0)))
        return x + y

    def middle(self, x, name):
        x, flat = self.residual(x, f"{name}.block_1"), ((0, 0), (0, 0))
        y = self.group_norm(x, f"{name}.attn_1.norm")
        q, k, v = (
            self.conv(y, f"{name}.attn_1.{c}", pad=flat).reshape(len(x), -1).T[:, None]
            for c in "qkv"
        )
        y = attention(q, k, v, np.True_).T.reshape(x.shape)
        return self.residual(
            x + self.conv(y, f"{name}.attn_1.proj_out", pad=flat), f"{name}.block_2"
        )

    def encode(self, pixels, noise):
        """Pixels [3, H, W] and noise [z, h, w] -> sampled latents [z, h, w]."""
        x, levels = self.conv(pixels.astype(np.float64), "encoder.conv_in"), len(self.ae["ch_mult"])
        for level in range(levels):
            for block in range(self.ae["num_res_blocks"]):
                x = self.residual(x, f"encoder.down.{level}.block.{block}")
            if level < levels - 1:
                x = self.conv(
                    x, f"encoder.down.{level}.downsample.conv", stride=2, pad=((0, 1), (0, 1))
                )
        x = silu(self.group_norm(self.middle(x, "encoder.mid"), "encoder.norm_out"))
        mean, log_variance = np.split(self.conv(x, "encoder.conv_out"), 2)
        return self.ae["scale_factor"] * (
            mean + np.exp(log_variance / 2) * noise - self.ae["shift_factor"]
        )

    def decode(self, latents):
        """Latents [z, h, w] -> pixels [3, H, W], not clipped."""
        x = self.conv(
            latents / self.ae["scale_factor"] + self.ae["shift_factor"], "decoder.conv_in"
        )
        x = self.middle(x, "decoder.mid")
        for level in reversed(range(len(self.ae["ch_mult"]))):
            for block in range(self.ae["num_res_blocks"] + 1):
                x = self.residual(x, f"decoder.up.{level}.block.{block}")
            if level:
                x = self.conv(
                    x.repeat(2, axis=1).repeat(2, axis=2), f"decoder.up.{level}.upsample.conv"
                )
        return self.conv(silu(self.group_norm(x, "decoder.norm_out")), "decoder.conv_out")


def write_checkpoint(
    directory, llm: dict, vit: dict, whole: dict, ae: dict, seed: int, shards: int = 1
):
    """A released folder of random weights.

    llm, vit, whole, ae: its four config files; shards: files of the model.
    """
    from safetensors.numpy import save_file

    rng, tensors, of_ae = np.random.default_rng(seed), {}, {}
    d, f, e = llm["hidden_size"], llm["intermediate_size"], vit["hidden_size"]
    h, side = d // llm["num_attention_heads"], vit["image_size"] // vit["patch_size"]

    def draw(name, *shape, mean=0.0, scale=None):
        scale = shape[-1] ** -0.5 if scale is None else scale
        tensors[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name, out, into, bias=True):
        draw(f"{name}.weight", out, into)
        if bias:
            draw(f"{name}.bias", out, scale=0.1)

    draw(f"{LLM}.embed_tokens.weight", llm["vocab_size"], d, scale=1.0)
    draw("language_model.lm_head.weight", llm["vocab_size"], d, scale=3 * d**-0.5)
    for gen in ("", "_moe_gen"):
        draw(f"{LLM}.norm{gen}.weight", d, mean=1.0, scale=0.1)
        for n in range(llm["num_hidden_layers"]):
            layer = f"{LLM}.layers.{n}"
            for letter in "qkv":
                heads = llm["num_attention_heads" if letter == "q" else "num_key_value_heads"]
                linear(f"{layer}.self_attn.{letter}_proj{gen}", heads * h, d)
            linear(f"{layer}.self_attn.o_proj{gen}", d, d, bias=False)
            for name, out, into in (("gate", f, d), ("up", f, d), ("down", d, f)):
                linear(f"{layer}.mlp{gen}.{name}_proj", out, into, bias=False)
            for name, size in (
                (f"self_attn.q_norm{gen}", h),
                (f"self_attn.k_norm{gen}", h),
                (f"input_layernorm{gen}", d),
                (f"post_attention_layernorm{gen}", d),
            ):
                draw(f"{layer}.{name}.weight", size, mean=1.2, scale=0.1)
    linear(f"{VIT}.embeddings.patch_embedding", e, vit["patch_size"] ** 2 * 3)
    draw(f"{VIT}.embeddings.position_embedding.weight", side * side, e, scale=0.3)
    for n in range(vit["num_hidden_layers"] - 1):
        layer = f"{VIT}.encoder.layers.{n}"
        for name in "qkv":
            linear(f"{layer}.self_attn.{name}_proj", e, e)
        linear(f"{layer}.self_attn.out_proj", e, e)
        linear(f"{layer}.mlp.fc1", vit["intermediate_size"], e)
        linear(f"{layer}.mlp.fc2", e, vit["intermediate_size"])
    for name in [f"{VIT}.post_layernorm"] + [
        f"{VIT}.encoder.layers.{n}.layer_norm{i}"
        for i in (1, 2)
        for n in range(vit["num_hidden_layers"] - 1)
    ]:
        draw(f"{name}.weight", e, mean=1.0, scale=0.1)
        draw(f"{name}.bias", e, scale=0.1)
    linear("connector.fc1", d, e)
    linear("connector.fc2", d, d)
    draw("vit_pos_embed.pos_embed", side * side, d, scale=0.5)
    values = whole["latent_patch_size"] ** 2 * ae["z_channels"]
    linear("vae2llm", d, values)
    linear("llm2vae", values, d)
    linear("time_embedder.mlp.0", d, 256)
    linear("time_embedder.mlp.2", d, d)
    draw("latent_pos_embed.pos_embed", whole["max_latent_size"] ** 2, d, scale=0.5)

    def conv(name, out, into, size=3):
        fan_in = into * size**2
        of_ae[f"{name}.weight"] = rng.standard_normal(
            (out, into, size, size), np.float32
        ) / np.float32(fan_in**0.5)
        of_ae[f"{name}.bias"] = 0.1 * rng.standard_normal(out, np.float32)

    def group_norm(name, size):
        of_ae[f"{name}.weight"] = 1 + 0.1 * rng.standard_normal(size, np.float32)
        of_ae[f"{name}.bias"] = 0.1 * rng.standard_normal(size, np.float32)

    def residual(name, out, into):
        group_norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into)
        group_norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if out != into:
            conv(f"{name}.nin_shortcut", out, into, size=1)

    def middle(name, width):
        group_norm(f"{name}.attn_1.norm", width)
        for module in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{module}", width, width, size=1)
        for block in ("block_1", "block_2"):
            residual(f"{name}.{block}", width, width)

    widths = [ae["ch"] * multiplier for multiplier in ae["ch_mult"]]
    conv("encoder.conv_in", widths[0], 3)
    into = widths[0]
    for level, width in enumerate(widths):
        for block in range(ae["num_res_blocks"]):
            residual(f"encoder.down.{level}.block.{block}", width, into)
            into = width
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", into)
    group_norm("encoder.norm_out", into)
    conv("encoder.conv_out", 2 * ae["z_channels"], into)
    conv("decoder.conv_in", into, ae["z_channels"])
    middle("decoder.mid", into)
    for level in reversed(range(len(widths))):
        for block in range(ae["num_res_blocks"] + 1):
            residual(f"decoder.up.{level}.block.{block}", widths[level], into)
            into = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", into, into)
    group_norm("decoder.norm_out", into)
    conv("decoder.conv_out", 3, into)

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "ema.safetensors")
    else:
        files = [f"ema-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        weight_map = {name: files[n % shards] for n, name in enumerate(sorted(tensors))}
        for file in files:
            save_file(
                {name: tensors[name] for name in weight_map if weight_map[name] == file},
                directory / file,
            )
        (directory / "ema.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
    save_file(of_ae, directory / "ae.safetensors")
    for name, settings in (
        ("llm_config", llm),
        ("vit_config", vit),
        ("config", whole),
        ("ae_params", ae),
    ):
        (directory / f"{name}.json").write_text(json.dumps(settings))


def generalized_jsd(
    student, teacher, beta=0.5, temperature=1.0, top_k=0, tail=False, clip=0.0, clip_unit="entry"
):
    """Divergence of each row of logits [N, V]; the meaning of the arguments is that of
    `DivergenceConfig`.
    """
    student, teacher = (np.asarray(x, np.float64) / temperature for x in (student, teacher))
    if 0 < top_k < student.shape[-1]:
        index = np.argsort(-teacher, axis=-1, kind="stable")[:, :top_k]
        kept = [np.take_along_axis(log_softmax(x), index, axis=-1) for x in (student, teacher)]
        if tail:

            def rest(x):
                return np.log1p(-np.exp(x).sum(-1, keepdims=True))

            log_s, log_t = (np.concatenate([x, rest(x)], -1) for x in kept)
        else:
            log_s, log_t = (log_softmax(x) for x in kept)
    else:
        log_s, log_t = log_softmax(student), log_softmax(teacher)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    if beta == 0:
        entries = p_t * (log_t - log_s)
    elif beta == 1:
        entries = p_s * (log_s - log_t)
    else:
        log_m = np.logaddexp(np.log(beta) + log_t, np.log1p(-beta) + log_s)
        entries = beta * p_t * (log_t - log_m) + (1 - beta) * p_s * (log_s - log_m)
    if clip and clip_unit == "entry":
        entries = np.minimum(entries, clip)
    values = entries.sum(-1)
    if clip and clip_unit == "token":
        values = np.minimum(values, clip)
    return values * temperature**2
