"""The golden model's inputs: blocks, packs and completions from golden tensors; jitted forward
passes.
"""

import dataclasses
import functools
import re
import types

import jax
import numpy as np

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import distill, divergence, images
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.model import bagel, masks, mot
from opsd_jax.release import load as load_lib
from parity.replay import matching

SPARE = 3  # padding positions, patches and latents in all packs: nothing may depend on them


def load(directory, generation):
    """(config, params), the latter in NumPy: slicing them compiles nothing."""
    config, params = load_lib.load(str(directory), generation=generation)
    return config, jax.tree.map(np.asarray, params)


def delimiters(bos_token_id, eos_token_id, start_of_image, end_of_image, **_):
    return types.SimpleNamespace(
        bos=bos_token_id, eos=eos_token_id, image_start=start_of_image, image_end=end_of_image
    )


def image_block(pixels, patch):
    """float32 [3, H, W] -> an image block."""
    grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
    return blocks_lib.Image(images.patchify(pixels.transpose(1, 2, 0), patch), grid)


def role_blocks(tensors, tokenizer, patch, settings, prefix=""):
    """(student, teacher) blocks of a sample whose tensors start with `prefix`."""

    def ids(name):
        return tensors.get(f"{prefix}{name}_ids", np.zeros(0, np.int32))

    prompts = blocks_lib.Prompts(ids("system"), ids("intro"), ids("transition"))
    question = np.concatenate([ids("question"), ids("instruction")])
    problem = image_block(tensors[f"{prefix}problem_image"], patch)
    thoughts = {
        int(match[1]): image_block(pixels, patch)
        for match, pixels in matching(tensors, re.escape(prefix) + r"vt_image(\d+)")
    }
    missing = settings.get("vt_is_none", [False] * (max(thoughts, default=-1) + 1))
    thoughts = [None if none else thoughts[n] for n, none in enumerate(missing)]
    return (
        blocks_lib.student(tokenizer, prompts, question, problem),
        blocks_lib.teacher(tokenizer, prompts, question, problem, thoughts),
    )


def bucket(rows, *, latents=False):
    """Static sizes that fit the rows, with some padding; latents: whether there are any."""
    sizes = np.max([context_lib.need(blocks) for blocks in rows], axis=0) + SPARE
    sizes = context_lib.Sizes(*sizes.tolist())
    return sizes if latents else sizes._replace(latents=0)


def pack(rows, tokenizer, config, sizes=None):
    return context_lib.pack(
        rows,
        sizes or bucket(rows),
        tokenizer=tokenizer,
        side=config.vit.side,
        generation=config.generation,
    )


def completion(ids, tokenizer, batch, spare=SPARE):
    """The completion, padded, the same for each row of a batch."""
    tokens = np.tile(np.pad(ids, (0, spare)), (batch, 1))
    mask = np.broadcast_to(np.arange(tokens.shape[1]) < len(ids), tokens.shape)
    make = jax.jit(functools.partial(context_lib.completion, bos=tokenizer.bos, eos=tokenizer.eos))
    return jax.tree.map(np.asarray, make(tokens, mask))


@functools.partial(jax.jit, static_argnames="config")
def forward(params, context, *, config):
    return bagel.read(params, context, config=config)[0]


score = jax.jit(distill.score, static_argnames="config")
cross_entropy = jax.jit(divergence.cross_entropy)
visible = jax.jit(lambda *vectors: masks.visible(masks.Mask(*vectors)))


def first_layers(config, params, part, count):
    """The model cut off after `count` layers of "llm" or "vit"."""
    cut = dict(params[part], layers=jax.tree.map(lambda x: x[:count], params[part]["layers"]))
    smaller = dataclasses.replace(getattr(config, part), num_layers=count)
    return dataclasses.replace(config, **{part: smaller}), dict(params, **{part: cut})


def normed(hidden, config, params):
    """A golden residual stream after the final norm, for models that were cut off."""
    norm = jax.jit(mot.rms_norm, static_argnames="eps")
    return norm(hidden, params["llm"]["norm"], eps=config.llm.rms_norm_eps)


def jsd_config(settings, **more):
    return DivergenceConfig(
        beta=settings["beta"],
        temperature=settings["temperature"],
        top_k=settings["top_k"] or 0,
        clip=settings["token_clip"] or 0.0,
        **more,
    )
