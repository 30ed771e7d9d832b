"""The parts of a training step in plain PyTorch, with random weights, for comparison with step.py.

  VENV/bin/python perf/torch_baseline.py --part=decode|train --batch=N [--size=mid]

The model, the inputs and the settings are those of perf/step.py, written as one would write them in
PyTorch: eager, float32 on a CPU, `scaled_dot_product_attention`, a cache that is allocated once,
fused AdamW, multi-tensor EMA. It imports torch alone and runs in a virtual environment of its own;
perf/against_torch.py runs it alternately with step.py and compares the two.

  decode   --tokens tokens after problem image (256 patches) and question (32 ids), sampled at
           temperature 1 with their log-probabilities. One pass a token: the last is not fed, where
           `rollout.sample` takes one more pass to see whether eos follows
  train    the teacher's forward pass without gradient, the student's with gradient, JSD on the
           teacher's 256 largest entries, backward, clipping, AdamW, EMA. The teacher also sees 40
           intro ids, two images of 256 patches and 24 transition ids
  peak     the largest rate of float32 products of two square matrices

All sequences of a batch are equally long, so there is no padding. Nothing is recomputed in the
backward pass, and the logits of all scored positions exist at once. Sizes repeat `SIZES` of
drawing.py, and tests/commands/test_perf.py compares them. One case in each process; it prints one
JSON object, whose fields are those of step.py. "parameters" counts the fixed 2-D positions, too.

Linux only: memory is read from /proc.
"""

import argparse
import copy
import json
import math
import pathlib
import re
import statistics
import sys
import time
import types

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {
    "tiny": {
        "llm": {
            "vocab_size": 264,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
        },
        "vit": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24},
    },
    "mid": {
        "llm": {
            "vocab_size": 32000,
            "hidden_size": 512,
            "num_layers": 8,
            "num_heads": 8,
            "num_kv_heads": 2,
            "intermediate_size": 1408,
        },
        "vit": {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "intermediate_size": 1024},
    },
}
GRID, SIDE, PATCH_DIM = 16, 70, 14 * 14 * 3  # patches along an image and along the table; values
BOS, EOS, IMAGE_START, IMAGE_END = 1, 2, 3, 4
ROPE_THETA, NORM_EPS = 1e6, 1e-6
TOP_K, CLIP, BETA = 256, 0.05, 0.5
LR, MIN_LR, WARMUP, TOTAL, BETAS, ADAM_EPS = 1e-5, 1e-7, 200, 1000, (0.9, 0.95), 1e-15
MAX_GRAD_NORM, EMA_DECAY = 1.0, 0.995
STUDENT = ("image", 32)  # images, and texts by their number of ids
TEACHER = (*STUDENT, 40, "image", "image", 24)
PEAK_SIZES, PEAK_REPEATS = (1024, 2048, 3072), 3


# --- the model ------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """Pre-norm layer of the vision tower on [N, P, E]: each image attends to all of itself."""

    def __init__(self, c):
        super().__init__()
        e = c.hidden_size
        self.heads = c.num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(e, eps=NORM_EPS) for _ in range(2))
        self.qkv, self.out = nn.Linear(e, 3 * e), nn.Linear(e, e)
        self.fc1, self.fc2 = nn.Linear(e, c.intermediate_size), nn.Linear(c.intermediate_size, e)

    def forward(self, x):
        n, p, e = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, p, 3, self.heads, e // self.heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(y.transpose(1, 2).reshape(n, p, e))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Vision(nn.Module):
    """SigLIP-like tower and connector: uint8 patches [N, P, C] -> [N, P, D]."""

    def __init__(self, c, width):
        super().__init__()
        self.patch = nn.Linear(PATCH_DIM, c.hidden_size)
        self.position = nn.Embedding(SIDE * SIDE, c.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.hidden_size, eps=NORM_EPS)
        self.fc1, self.fc2 = nn.Linear(c.hidden_size, width), nn.Linear(width, width)
        self.register_buffer("position_table", sincos_table(width))
        places = torch.arange(GRID)
        self.register_buffer("places", (places[:, None] * SIDE + places).flatten(), False)

    def forward(self, patches):
        x = self.patch((patches.float() / 255 - 0.5) / 0.5) + self.position(self.places)
        for layer in self.layers:
            x = layer(x)
        x = self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh"))
        return x + self.position_table[self.places]


def sincos_table(width):
    """Fixed 2-D positions [SIDE * SIDE, width]: first half the column, second half the row."""
    waves = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(SIDE)[:, None] * waves
    one = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [SIDE, width / 2]
    column, row = one[None].expand(SIDE, -1, -1), one[:, None].expand(-1, SIDE, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Qwen2-style layer with norms of q and k and grouped kv heads, on [B, T, D]."""

    def __init__(self, c):
        super().__init__()
        d, self.head_dim = c.hidden_size, c.hidden_size // c.num_heads
        self.heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        self.norm1, self.norm2 = (nn.RMSNorm(d, eps=NORM_EPS) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, eps=NORM_EPS) for _ in range(2))
        self.qkv = nn.Linear(d, sum(self.heads) * self.head_dim)
        self.out = nn.Linear(d, d, bias=False)
        self.gate, self.up = (nn.Linear(d, c.intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(c.intermediate_size, d, bias=False)

    def forward(self, x, rope, mask, cache=None, start=0):
        """cache: keys and values [2, B, K, S, h]; new ones are written from column `start` on."""
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            cache[0, :, :, start : start + t], cache[1, :, :, start : start + t] = k, v
            k, v = cache[:, :, :, : start + t]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rope_tables(positions, head_dim):
    """Cosines and sines [T, 1, h] of rope positions [T]."""
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """x [B, T, heads, h], its halves turned by the angles of `rope_tables`."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


class Model(nn.Module):
    """Vision tower, connector and decoder, with random weights: N(0, 1 / fan in), biases 0."""

    def __init__(self, size):
        super().__init__()
        c = self.config = types.SimpleNamespace(**SIZES[size]["llm"])
        self.head_dim = c.hidden_size // c.num_heads
        self.vision = Vision(types.SimpleNamespace(**SIZES[size]["vit"]), c.hidden_size)
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=NORM_EPS)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def count(self):
        return sum(x.numel() for x in self.state_dict().values())

    def forward(self, x, rope, mask, cache=None, start=0):
        """Hidden states [B, T, D] after the final norm. cache: see `new_cache`."""
        for n, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None if cache is None else cache[n], start)
        return self.norm(x)

    def embed_context(self, context):
        """[B, T, D]: token embeddings, and encoded patches in the places of the images."""
        x = self.embed(context.tokens)
        features = self.vision(context.patches.flatten(0, 1))
        x[:, context.places] = features.view(len(x), -1, x.shape[-1])
        return x

    def new_cache(self, batch, columns):
        c = self.config
        return torch.empty(c.num_layers, 2, batch, c.num_kv_heads, columns, self.head_dim)


# --- inputs ---------------------------------------------------------------------------------------


def context(blocks, batch, vocabulary):
    """Random images and texts: tokens [B, T], patches [B, N, P, C], places of the patches, rope
    positions [T], and how far each position sees [T]: an image to its own end, a text to itself.
    """
    tokens, places, rope, limit = [], [], [], []
    for block in blocks:
        start, position = len(limit), rope[-1] + 1 if rope else 0
        length = 2 + (GRID * GRID if block == "image" else block)
        if block == "image":
            tokens.append(torch.tensor([IMAGE_START, *[0] * (length - 2), IMAGE_END]).unsqueeze(0))
            places += range(start + 1, start + length - 1)
            rope += [position] * length
            limit += [start + length] * length
        else:
            ids = torch.randint(5, vocabulary, (batch, block))
            tokens.append(F.pad(F.pad(ids, (1, 0), value=BOS), (0, 1), value=EOS))
            rope += range(position, position + length)
            limit += range(start + 1, start + length + 1)
    shape = (batch, blocks.count("image"), GRID * GRID, PATCH_DIM)
    return types.SimpleNamespace(
        tokens=torch.cat([t.expand(batch, -1) for t in tokens], dim=1),
        patches=torch.randint(0, 256, shape, dtype=torch.uint8),
        places=torch.tensor(places),
        rope=torch.tensor(rope),
        limit=torch.tensor(limit),
    )


def with_text(seen, count):
    """(rope positions, mask [T, T]) of a context and `count` text positions after it."""
    length = len(seen.limit) + count
    rope = torch.cat([seen.rope, seen.rope[-1] + 1 + torch.arange(count)])
    limit = torch.cat([seen.limit, torch.arange(len(seen.limit), length) + 1])
    return rope, torch.arange(length) < limit[:, None]


# --- decoding -------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(model, seen, tokens):
    """(tokens, their log-probabilities), [B, tokens] each, sampled at temperature 1."""
    batch, length = seen.tokens.shape
    cache = model.new_cache(batch, length + tokens)
    positions, mask = with_text(seen, tokens)
    cos, sin = rope_tables(positions, model.head_dim)
    model(model.embed_context(seen), (cos[:length], sin[:length]), mask[:length, :length], cache)
    token, chosen, log_probs = torch.full((batch, 1), BOS), [], []
    for n in range(length, length + tokens):
        hidden = model(model.embed(token), (cos[n : n + 1], sin[n : n + 1]), None, cache, n)
        log_p = F.log_softmax(model.head(hidden[:, 0]), dim=-1)
        token = torch.multinomial(log_p.exp(), 1)
        chosen.append(token)
        log_probs.append(log_p.gather(1, token))
    return torch.cat(chosen, dim=1), torch.cat(log_probs, dim=1)


# --- the update -----------------------------------------------------------------------------------


def score(model, seen, completion):
    """Logits [B, N + 1, V] that predict a completion, given bos and its tokens [B, N + 1]."""
    rope, mask = with_text(seen, completion.shape[1])
    x = torch.cat([model.embed_context(seen), model.embed(completion)], dim=1)
    hidden = model(x, rope_tables(rope, model.head_dim), mask)
    return model.head(hidden[:, len(seen.limit) :])


def divergence(student, teacher):
    """JSD [B, N] of logits [B, N, V], on the teacher's TOP_K entries, each at most CLIP."""
    top, index = teacher.topk(min(TOP_K, teacher.shape[-1]), dim=-1)
    log_s, log_t = student.gather(-1, index).log_softmax(dim=-1), top.log_softmax(dim=-1)
    log_m = torch.logaddexp(log_t + math.log(BETA), log_s + math.log(1 - BETA))
    entries = BETA * log_t.exp() * (log_t - log_m) + (1 - BETA) * log_s.exp() * (log_s - log_m)
    with torch.no_grad():
        signals = {
            "teacher_topk_mass": (top.logsumexp(-1) - teacher.logsumexp(-1)).exp().mean(),
            "clip_fraction": (entries > CLIP).float().mean(),
            "student_entropy": -(log_s.exp() * log_s).sum(-1).mean(),
            "teacher_entropy": -(log_t.exp() * log_t).sum(-1).mean(),
        }
    return entries.clamp(max=CLIP).sum(-1), signals


def learning_rate(step):
    """Linear warm-up from 0, then a cosine to MIN_LR."""
    share = min(max(step - WARMUP, 0) / (TOTAL - WARMUP), 1)
    cosine = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * share)) / 2
    return cosine if step >= WARMUP else LR * step / WARMUP


class Trainer:
    """Student, teacher (their EMA) and optimizer."""

    def __init__(self, model):
        self.student, self.teacher = model, copy.deepcopy(model).requires_grad_(False)
        self.teacher.vision.position_table = model.vision.position_table  # never trained: shared
        self.pairs = [list(m.parameters()) for m in (self.teacher, self.student)]
        settings = {"betas": BETAS, "eps": ADAM_EPS, "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.pairs[1], lr=LR, **settings)
        self.step = 0

    def update(self, seen_s, seen_t, tokens):
        """One step on completions [B, N]: metrics."""
        inputs, labels = F.pad(tokens, (1, 0), value=BOS), F.pad(tokens, (0, 1), value=EOS)
        with torch.no_grad():
            logits_t = score(self.teacher, seen_t, inputs)
        logits_s = score(self.student, seen_s, inputs)
        values, signals = divergence(logits_s, logits_t)
        loss = values.mean(dim=1).mean()
        with torch.no_grad():
            ce = F.cross_entropy(logits_s.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.pairs[1], MAX_GRAD_NORM, foreach=True)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(*self.pairs, 1 - EMA_DECAY)
        self.step += 1
        return {"loss": loss.item(), "ce": ce.item(), "grad_norm": norm.item()} | {
            name: x.item() for name, x in signals.items()
        }


# --- measuring ------------------------------------------------------------------------------------


def resident(field):
    """VmRSS or VmHWM (its peak) of this process, MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) / 1024


def measured(call, repeats):
    """As in step.py: medians after one call that does not count, and the memory of all calls."""
    peak, before = resident("VmHWM"), resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    runs = []
    for _ in range(repeats + 1):
        start = time.perf_counter(), time.process_time()
        call()
        runs.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, cpu = zip(*runs[1:])
    during = resident("VmHWM")
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "runs": seconds,
        "cpu_runs": cpu,
        "run_mib": during - before,
        "peak_mib": max(peak, during),
    }


def peak():
    """Operations per second of the fastest float32 product of two square matrices."""
    rates = []
    for n in PEAK_SIZES:
        a, b = torch.randn(2, n, n)
        for _ in range(PEAK_REPEATS + 1):
            start = time.perf_counter()
            torch.mm(a, b)
            rates.append(2 * n**3 / (time.perf_counter() - start))
    return {"operations_per_second": max(rates)}


def case(args):
    """What is measured of one part at one batch size."""
    if args.part == "peak":
        return peak()
    start, model = resident("VmRSS"), Model(args.size)
    vocabulary = model.config.vocab_size
    seen = [context(blocks, args.batch, vocabulary) for blocks in (STUDENT, TEACHER)]
    facts = {"batch": args.batch, "tokens": args.tokens, "parameters": model.count()}
    if args.part == "decode":
        found = measured(lambda: sample(model, seen[0], args.tokens), args.repeats)
        facts["tokens_per_second"] = args.batch * args.tokens / found["seconds"]
    else:
        completions = torch.randint(5, vocabulary, (args.batch, args.tokens))
        trainer = Trainer(model)
        found = measured(lambda: trainer.update(*seen, completions), args.repeats)
        facts["metrics"] = trainer.update(*seen, completions)
        if not math.isfinite(facts["metrics"]["loss"]):
            sys.exit("the loss is not finite")
    return {**facts, **found, "rss_start_mib": start, "peak_part_mib": found["peak_mib"] - start}


def main(argv):
    """Parses the flags, measures one case and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("decode", "train", "peak"), required=True)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    about = {
        "benchmark": "torch_baseline",
        "part": args.part,
        "size": args.size,
        "dtype": "float32",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    print(json.dumps({**about, **case(args)}))


if __name__ == "__main__":
    main(sys.argv[1:])
