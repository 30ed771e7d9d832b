"""A second opinion: the understanding path and the divergence in float64 NumPy, slow and plain.

Written from the conventions in tests/goldens/README.md, without the package: dense masks, no cache, no
padding, no stacking, weights by their checkpoint names. Letters: T slots, H heads, K kv heads, h head_dim.
"""

import json
import pathlib

import numpy as np

LLM, VIT = "language_model.model", "vit_model.vision_model"


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def attention(q, k, v, mask):
    """q [T, H, h], k and v [T, K, h], mask [T, T] -> [T, H * h]; query head n uses kv head n // (H / K)."""
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


def read_tensors(directory) -> dict:
    """{name: tensor} of a released folder: one file or shards, but not its VAE (ae.safetensors)."""
    import ml_dtypes  # noqa: F401  (gives NumPy the type bfloat16)
    from safetensors.numpy import load_file

    tensors = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        if path.stem != "ae":
            tensors.update(load_file(path))
    return tensors


class Reference:
    """The model of a released folder. Blocks have `ids`, or normalised `patches` and a `grid`."""

    def __init__(self, directory, delimiters):
        """delimiters: ids of bos, eos, image start, image end."""
        directory = pathlib.Path(directory)
        self.llm = json.loads((directory / "llm_config.json").read_text())
        self.vit = json.loads((directory / "vit_config.json").read_text())
        self.weights = {name: w.astype(np.float64) for name, w in read_tensors(directory).items()}
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
        heads = lambda y: y.reshape(len(ids), self.vit["num_attention_heads"], -1)
        for n in range(self.vit["num_hidden_layers"] - 1):
            layer = f"{VIT}.encoder.layers.{n}"
            y = self.layer_norm(x, f"{layer}.layer_norm1")
            q, k, v = (heads(self.linear(y, f"{layer}.self_attn.{c}_proj")) for c in "qkv")
            x = x + self.linear(attention(q, k, v, np.True_), f"{layer}.self_attn.out_proj")
            y = gelu(self.linear(self.layer_norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
            x = x + self.linear(y, f"{layer}.mlp.fc2")
        x = gelu(self.linear(self.layer_norm(x, f"{VIT}.post_layernorm"), "connector.fc1"))
        return self.linear(x, "connector.fc2") + self.weights["vit_pos_embed.pos_embed"][ids]

    def pack(self, blocks, after=()):
        """Blocks, and a causal block of the raw ids `after`, as (embeddings, rope positions, mask)."""
        table = self.weights[f"{LLM}.embed_tokens.weight"]
        pieces, positions, starts, stops, rope_id = [], [], [], [], 0
        text = lambda b: table[[self.bos, *b.ids, self.eos]]
        image = lambda b: np.concatenate(
            [table[[self.image_start]], self.image(b.patches, b.grid), table[[self.image_end]]])
        rows = [(text(b), True) if hasattr(b, "ids") else (image(b), False) for b in blocks]
        for piece, causal in [*rows, (table[list(after)], True)]:
            n, at = len(piece), len(positions)
            pieces.append(piece)
            positions += range(rope_id, rope_id + n) if causal else [rope_id] * n
            rope_id += n if causal else 1
            starts += [at] * n
            stops += range(at + 1, at + n + 1) if causal else [at + n] * n
        mask = np.arange(len(positions)) < np.array(stops)[:, None]
        return np.concatenate(pieces), np.array(positions), mask

    def hidden(self, x, positions, mask):
        """States after the final norm, [T, D]."""
        heads = lambda y: y.reshape(len(x), -1, self.llm["hidden_size"] // self.llm["num_attention_heads"])
        for n in range(self.llm["num_hidden_layers"]):
            layer = f"{LLM}.layers.{n}"
            y = self.rms_norm(x, f"{layer}.input_layernorm")
            q, k, v = (heads(self.linear(y, f"{layer}.self_attn.{c}_proj")) for c in "qkv")
            q, k = (rope(self.rms_norm(a, f"{layer}.self_attn.{c}_norm"), positions, self.llm["rope_theta"])
                    for a, c in ((q, "q"), (k, "k")))
            x = x + self.linear(attention(q, k, v, mask), f"{layer}.self_attn.o_proj")
            y = self.rms_norm(x, f"{layer}.post_attention_layernorm")
            gate = self.linear(y, f"{layer}.mlp.gate_proj")
            y = gate / (1 + np.exp(-gate)) * self.linear(y, f"{layer}.mlp.up_proj")
            x = x + self.linear(y, f"{layer}.mlp.down_proj")
        return self.rms_norm(x, f"{LLM}.norm")

    def logits(self, blocks, after=()):
        """Logits of every slot, [T, V]."""
        return self.linear(self.hidden(*self.pack(blocks, after)), "language_model.lm_head")

    def greedy(self, blocks, budget):
        """(fed tokens with the leading bos, logits of each), a whole forward pass for each; stops at eos."""
        fed, rows = [self.bos], []
        while True:
            rows.append(self.logits(blocks, fed)[-1])
            token = int(rows[-1].argmax())
            if token == self.eos or len(fed) == budget:
                return fed, np.array(rows)
            fed.append(token)


def write_checkpoint(directory, llm: dict, vit: dict, seed: int):
    """A released folder of random weights with the generation expert. llm, vit: the two config files."""
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(seed), {}
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
    draw("language_model.lm_head.weight", llm["vocab_size"], d, scale=3 * d ** -0.5)
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
            for name, size in ((f"self_attn.q_norm{gen}", h), (f"self_attn.k_norm{gen}", h),
                               (f"input_layernorm{gen}", d), (f"post_attention_layernorm{gen}", d)):
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
    for name in [f"{VIT}.post_layernorm"] + [f"{VIT}.encoder.layers.{n}.layer_norm{i}" for i in (1, 2)
                                             for n in range(vit["num_hidden_layers"] - 1)]:
        draw(f"{name}.weight", e, mean=1.0, scale=0.1)
        draw(f"{name}.bias", e, scale=0.1)
    linear("connector.fc1", d, e)
    linear("connector.fc2", d, d)
    draw("vit_pos_embed.pos_embed", side * side, d, scale=0.5)
    for name in ("vae2llm", "llm2vae"):
        linear(name, d, d)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "ema.safetensors")
    (directory / "llm_config.json").write_text(json.dumps(llm))
    (directory / "vit_config.json").write_text(json.dumps(vit))


def generalized_jsd(student, teacher, beta=0.5, temperature=1.0, top_k=0, tail=False, clip=0.0,
                    clip_unit="entry"):
    """Divergence of each row of logits [N, V]; the meaning of the arguments is that of `DivergenceConfig`."""
    student, teacher = (np.asarray(x, np.float64) / temperature for x in (student, teacher))
    if 0 < top_k < student.shape[-1]:
        index = np.argsort(-teacher, axis=-1, kind="stable")[:, :top_k]
        kept = [np.take_along_axis(log_softmax(x), index, axis=-1) for x in (student, teacher)]
        if tail:
            rest = lambda x: np.log1p(-np.exp(x).sum(-1, keepdims=True))
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
    return values * temperature ** 2
