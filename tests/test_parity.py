"""Replays of golden data of the official implementation.

`--goldens=DIR` takes any sizes, seeds and numbers of cases: sizes, settings and names come from the files. A
set that the folder lacks is skipped by name, except in the default copy, where it is an error. Tolerances are
those that the goldens' README suggests.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEFAULT_GOLDENS
from PIL import Image as PillowImage
from reference import Reference, read_tensors, write_checkpoint

from opsd_jax import context as context_lib
from opsd_jax import distill, divergence, flow, images, rollout
from opsd_jax import params as params_lib
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.model import attention, bagel, latent, mot, siglip
from opsd_jax.model.config import LLMConfig, ModelConfig, ViTConfig
from opsd_jax.release import load as load_lib

# Arguments of tests that get the name of every case: one case a file, under any names.
CASES = {
    "und_forward": "und_forward/*",
    "grads": "grads/*",
    "generate": "generate/*",
    "opsd_steps": "opsd_steps/*",
    "autoencoder": "vae/*",
    "drawing": "gen_image/shape*",
}
SPARE = 3  # padding slots, patches and latents in all packs: nothing may depend on them


def pytest_generate_tests(metafunc):
    for argument, pattern in CASES.items():
        if argument in metafunc.fixturenames:
            root = pathlib.Path(metafunc.config.getoption("--goldens"))
            names = sorted(path.stem for path in root.glob(f"{pattern}.safetensors"))
            metafunc.parametrize(argument, names or [None], ids=names or ["absent"])


# --- reading and comparing -----------------------------------------------------------------------------


def path_of(goldens, name):
    path = goldens / name
    if not path.exists():
        report = pytest.fail if goldens == DEFAULT_GOLDENS.resolve() else pytest.skip
        report(f"golden set {name} is not in {goldens}")
    return path


def read(goldens, folder, name):
    """(tensors, settings) of one case; name None: there is none.

    `repeats` in the settings names tensors that are the same in another case of the set, and kept there only.
    """
    from safetensors.numpy import load_file

    path = path_of(goldens, f"{folder}/{name or 'any case'}.safetensors")
    tensors, settings = load_file(path), json.loads(path.with_suffix(".json").read_text())
    for other, names in settings.get("repeats", {}).items():
        kept = load_file(path_of(goldens, f"{folder}/{other}.safetensors"))
        tensors.update({name: kept[name] for name in names})
    return tensors, settings


def matching(tensors, pattern):
    """[(match, tensor)] of the names that match a pattern in full."""
    found = ((re.fullmatch(pattern, name), tensor) for name, tensor in tensors.items())
    return [(match, tensor) for match, tensor in found if match]


def close(actual, wanted, name=""):
    """The tolerance of logits and hidden states."""
    np.testing.assert_allclose(actual, wanted, atol=5e-5, rtol=1e-4, err_msg=name)


def close_gradient(actual, wanted, name=""):
    """The tolerance of gradients: relative to each tensor's largest value."""
    assert np.shape(actual) == wanted.shape, name
    atol = 1e-6 + 1e-3 * np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(actual, wanted, atol=atol, rtol=0, err_msg=name)


equal = np.testing.assert_array_equal


def compare(check, actual, tensors, name):
    """Compares with a golden tensor where there is one: a copy may leave out what repeats, see its README."""
    if name in tensors:
        check(actual, tensors[name], name)


def by_name(params) -> dict:
    """Our parameters, or gradients of them, under their checkpoint names."""
    named = {}
    for path, leaf in params_lib.flatten(params).items():
        named.update(params_lib.to_checkpoint(path, np.asarray(leaf)))
    return named


# What tests compare where a file has it: the carried copy has each in at least one file of the folder.
OPTIONAL = {
    "vae": ("decoded_from_mean", "decoded_from_sampled"),
    "und_forward": (r"\w+\.attention_mask", r"\w+\.hidden_layer0", r"\w+\.hidden_final"),
    "grads": (
        "per_token_jsd",
        "per_token_jsd_unclipped",
        r"grad\.language_model\..+",
        r"grad\.vit_model\..+",
        r"grad\.connector\..+",
    ),
    "jsd": (r"tinker_grad\.\d+",),
    "generate": (
        "logits",
        r"prefill_k_layer\d+",
        r"prefill_v_layer\d+",
        "prefill_k_last",
        "final_k_last",
    ),
    "gen_image": (
        "vae_moments",
        r"k_layer\d+_cond",
        r"k_layer\d+_cfg_text",
        r"k_layer\d+_cfg_img",
        "k_last_cond",
        r"run\d+\.timesteps",
        r"run\d+\.step0_branch_cond",
        r"run\d+\.step0_branch_second",
        r"run\d+\.step0_branch_third",
        r"run\d+\.x_traj",
        r"run\d+\.final_latent_chw",
        r"run\d+\.decoded_preclamp",
        r"run\d+\.image_u8",
        "attention_mask",
        "hidden_final",
    ),
    "opsd_steps": (r"step\d+\.param\..+", r"step\d+\.ema\..+", r"final\.param\..+"),
    "preprocess": (
        r".+\.rgb_sample",
        r".+\.sample_tensor",
        r".+\.tensor",
        r".+\.resized_u8_hwc",
        r".+\.patchified",
        r"pos\.\d+\.extrapolate",
        r"pos\.\d+\.interpolate",
    ),
}


@pytest.mark.parametrize("folder", OPTIONAL)
def test_carried_copy_has_every_kind(folder):
    from safetensors import safe_open

    names = []
    for path in (DEFAULT_GOLDENS / folder).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names += file.keys()
    missing = [
        kind for kind in OPTIONAL[folder] if not any(re.fullmatch(kind, name) for name in names)
    ]
    assert not missing


def test_carried_copy_is_small():
    assert sum(path.stat().st_size for path in DEFAULT_GOLDENS.rglob("*")) < 12_000_000


# --- the model and its inputs --------------------------------------------------------------------------


def load(directory, generation):
    """(config, params), the latter in NumPy: slicing them compiles nothing."""
    config, params = load_lib.load(str(directory), generation=generation)
    return config, jax.tree.map(np.asarray, params)


@pytest.fixture(scope="session")
def model(goldens):
    """(config, params) without the generation expert."""
    return load(path_of(goldens, "checkpoint"), generation=False)


@pytest.fixture(scope="session")
def whole_model(goldens):
    """(config, params) with all that draws: generation expert, latent path, autoencoder."""
    path_of(goldens, "checkpoint/ae.safetensors")
    return load(path_of(goldens, "checkpoint"), generation=True)


@pytest.fixture(scope="session")
def tokenizer(goldens):
    return delimiters(
        **json.loads((path_of(goldens, "checkpoint") / "special_tokens.json").read_text())
    )


def delimiters(bos_token_id, eos_token_id, start_of_image, end_of_image, **_):
    return types.SimpleNamespace(
        bos=bos_token_id, eos=eos_token_id, image_start=start_of_image, image_end=end_of_image
    )


def image_block(pixels, patch):
    """float32 [3, H, W] -> an image block."""
    grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
    return context_lib.Image(images.patchify(pixels.transpose(1, 2, 0), patch), grid)


def role_blocks(tensors, tokenizer, patch, settings, prefix=""):
    """(student, teacher) blocks of a sample whose tensors start with `prefix`."""
    ids = lambda name: tensors.get(f"{prefix}{name}_ids", np.zeros(0, np.int32))
    prompts = context_lib.Prompts(ids("system"), ids("intro"), ids("transition"))
    question = np.concatenate([ids("question"), ids("instruction")])
    problem = image_block(tensors[f"{prefix}problem_image"], patch)
    thoughts = {
        int(match[1]): image_block(pixels, patch)
        for match, pixels in matching(tensors, re.escape(prefix) + r"vt_image(\d+)")
    }
    missing = settings.get("vt_is_none", [False] * (max(thoughts, default=-1) + 1))
    thoughts = [None if none else thoughts[n] for n, none in enumerate(missing)]
    return (
        context_lib.student(tokenizer, prompts, question, problem),
        context_lib.teacher(tokenizer, prompts, question, problem, thoughts),
    )


def bucket(rows, config=None):
    """Static sizes that fit the rows, with some padding; config: of the model, where rows hold latents."""
    patches = lambda blocks: sum(len(b.patches) for b in blocks if isinstance(b, context_lib.Image))
    latents = lambda blocks: sum(len(b.tokens) for b in blocks if isinstance(b, context_lib.Latent))
    sizes = {
        "slots": SPARE + max(sum(b.slots for b in blocks) - latents(blocks) for blocks in rows),
        "patches": SPARE + max(map(patches, rows)),
    }
    if config:
        sizes.update(
            latents=SPARE + max(map(latents, rows)),
            latent_dim=config.generation.latent_dim,
            latent_side=config.generation.side,
        )
    return sizes


def pack(rows, tokenizer, config, sizes=None):
    return context_lib.pack(
        rows, **(sizes or bucket(rows)), tokenizer=tokenizer, side=config.vit.side
    )


def completion(ids, tokenizer, batch, spare=SPARE):
    """The completion, padded, the same for each row of a batch."""
    tokens = np.tile(np.pad(ids, (0, spare)), (batch, 1))
    mask = np.broadcast_to(np.arange(tokens.shape[1]) < len(ids), tokens.shape)
    make = jax.jit(functools.partial(context_lib.completion, bos=tokenizer.bos, eos=tokenizer.eos))
    return jax.tree.map(np.asarray, make(tokens, mask))


@functools.partial(jax.jit, static_argnames="config")
def forward(params, context, *, config):
    x = bagel.embed(params, context, config=config)
    return bagel.forward(
        params, x, context.positions, context.limit, context.segment, config=config
    )[0]


score = jax.jit(distill.score, static_argnames="config")
cross_entropy = jax.jit(divergence.cross_entropy)
visible = jax.jit(attention.visible)


def first_layers(config, params, part, count):
    """The model cut off behind `count` layers of "llm" or "vit"."""
    cut = dict(params[part], layers=jax.tree.map(lambda x: x[:count], params[part]["layers"]))
    smaller = dataclasses.replace(getattr(config, part), num_layers=count)
    return dataclasses.replace(config, **{part: smaller}), dict(params, **{part: cut})


def normed(hidden, config, params):
    """A golden residual stream behind the final norm, for models that were cut off."""
    return jax.jit(mot.rms_norm)(hidden, params["llm"]["norm"], config.llm.rms_norm_eps)


def jsd_config(settings, **more):
    return DivergenceConfig(
        beta=settings["beta"],
        temperature=settings["temperature"],
        top_k=settings["top_k"] or 0,
        clip=settings["token_clip"] or 0.0,
        **more,
    )


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The models are tiny: compiling them takes much longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# --- checkpoint ----------------------------------------------------------------------------------------


def test_checkpoint(goldens, whole_model):
    """Every tensor of both files arrives, with its name, shape and value."""
    from safetensors.numpy import load_file

    folder = path_of(goldens, "checkpoint")
    model, autoencoder = read_tensors(folder), load_file(folder / "ae.safetensors")
    shapes = json.loads((folder / "shapes.json").read_text())
    sizes = lambda tensors: {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert (sizes(model), sizes(autoencoder)) == (shapes["bagel"], shapes["ae"])
    tensors, ours = {**model, **autoencoder}, by_name(whole_model[1])
    assert set(ours) == set(tensors)
    for name, array in ours.items():
        equal(array, tensors[name], err_msg=name)


def test_checkpoint_without_generation(goldens, model, whole_model):
    assert model[0].generation is None
    kept, everything = by_name(model[1]), read_tensors(path_of(goldens, "checkpoint"))
    assert set(kept) == {
        name
        for name in everything
        if "_moe_gen" not in name
        and not name.startswith(("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed."))
    }
    assert {name: x.shape for name, x in kept.items()}.items() <= {
        name: x.shape for name, x in by_name(whole_model[1]).items()
    }.items()


def folder_with(files, configs, target):
    """A released folder of given files, with the configs of another one."""
    target.mkdir()
    for file in [*files, configs / "llm_config.json", configs / "vit_config.json"]:
        shutil.copyfile(file, target / file.name)
    return str(target)


def test_checkpoint_bfloat16(goldens, model, tmp_path):
    """Weights in bfloat16 under the name ema.safetensors: those of the goldens, or else rounded here."""
    from safetensors.numpy import save_file

    configs = path_of(goldens, "checkpoint")
    file = configs / "bf16" / "ema.safetensors"
    if not file.exists():
        file = tmp_path / "ema.safetensors"
        save_file({name: x.astype(jnp.bfloat16) for name, x in read_tensors(configs).items()}, file)
    _, params = load_lib.load(folder_with([file], configs, tmp_path / "bf16"))
    stored, exact = read_tensors(file.parent), by_name(model[1])
    for name, array in by_name(params).items():
        assert stored[name].dtype == jnp.bfloat16 and array.dtype == np.float32
        equal(array, stored[name].astype(np.float32), err_msg=name)
        np.testing.assert_allclose(array, exact[name], rtol=2**-8, err_msg=name)


def test_checkpoint_sharded(goldens, model, tmp_path):
    """Shards with an index: those of the goldens, or else cut here."""
    from safetensors.numpy import save_file

    configs = path_of(goldens, "checkpoint")
    source = configs / "sharded"
    if not source.exists():
        source, tensors, weight_map = tmp_path, read_tensors(configs), {}
        for n in range(2):
            part = {name: tensors[name] for name in sorted(tensors)[n::2]}
            save_file(part, source / f"model-{n}.safetensors")
            weight_map.update(dict.fromkeys(part, f"model-{n}.safetensors"))
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = [*source.glob("*.safetensors"), *source.glob("*.index.json")]
    assert len(files) > 2
    config, params = load_lib.load(folder_with(files, configs, tmp_path / "sharded"))
    assert config == model[0]
    jax.tree.map(equal, params, model[1])


# --- vit -----------------------------------------------------------------------------------------------


def test_vit(goldens, model, tokenizer):
    tensors, settings = read(goldens, "vit", "vit")
    config, params = model
    vit, patch = params["vit"], config.vit.patch_size
    for ours, name in (
        (patch, "patch_size"),
        (config.vit.side, "max_num_patch_per_side"),
        (config.vit.num_layers, "layers_used"),
        (config.vit.layer_norm_eps, "layer_norm_eps"),
    ):
        assert ours == settings[name], name
    blocks = [
        image_block(pixels, patch)
        for _, pixels in sorted(
            matching(tensors, r"image(\d+)"), key=lambda found: int(found[0][1])
        )
    ]
    assert [list(b.grid) for b in blocks] == [
        [h // patch, w // patch] for h, w in settings["image_sizes_hw"]
    ]
    packed = pack([blocks], tokenizer, config)
    lengths = tensors["vit_token_seqlens"]
    n = lengths.sum()
    equal(np.bincount(packed.patch_image[0])[1:], lengths)
    equal(np.concatenate([[0], np.cumsum(lengths)]), tensors["cu_seqlens"])
    compare(equal, packed.patches[0, :n], tensors, "packed_vit_tokens")
    equal(packed.patch_positions[0, :n], tensors["packed_vit_position_ids"])

    @functools.partial(jax.jit, static_argnames="config")
    def encode(params, *, config):
        return siglip.Encoder(config.vit).apply(
            {"params": params["vit"]}, packed.patches, packed.patch_positions, packed.patch_image
        )[0, :n]

    post_norm = lambda x: siglip.layer_norm(
        x, vit["post_norm_scale"], vit["post_norm_bias"], config.vit.layer_norm_eps
    )
    layers = matching(tensors, r"hidden\.layer(\d+)")
    assert len(layers) == config.vit.num_layers
    for match, hidden in layers:
        shorter, cut = first_layers(config, params, "vit", int(match[1]) + 1)
        close(encode(cut, config=shorter), post_norm(hidden), match[0])
    close(
        packed.patches[0, :n] @ vit["patch_kernel"]
        + vit["patch_bias"]
        + vit["position"][tensors["packed_vit_position_ids"]],
        tensors["hidden.embeddings"],
    )
    close(encode(params, config=config), tensors["vit_out"])
    llm_input = jax.jit(functools.partial(bagel.encode_images, config=config))(params, packed)[
        0, :n
    ]
    close(llm_input, tensors["llm_input"])
    close(llm_input - tensors["pos_embed"], tensors["connector_out"])


def test_time_embedding(goldens, whole_model):
    """The sinusoid of flow times, and what the latent path makes of it."""
    tensors, _ = read(goldens, "vit", "vit")
    config, params = whole_model
    times, ours = tensors["time_embed_t"], params["latent"]
    close(jax.jit(latent.sinusoid)(times), tensors["time_embed_sinusoid"])
    zeros = np.zeros((1, len(times), config.generation.latent_dim), np.float32)
    whole = jax.jit(functools.partial(bagel.embed_latents, config=config))(
        params, zeros, times[None], np.zeros((1, len(times)), np.int32)
    )[0]
    close(whole - ours["in_bias"] - ours["position_table"][0], tensors["time_embed_out"])


def test_position_tables(goldens, whole_model):
    """The fixed 2-D tables of the checkpoint can be made afresh, for any side."""
    tensors, _ = read(goldens, "vit", "vit")
    for part, name in (("connector", "vit"), ("latent", "latent")):
        table = whole_model[1][part]["position_table"]
        compare(equal, table, tensors, f"{name}_pos_embed_table")
        ours = siglip.sincos_table(math.isqrt(len(table)), table.shape[1])
        np.testing.assert_allclose(ours, table, atol=1e-6, err_msg=name)


# --- text_forward --------------------------------------------------------------------------------------


def test_text_forward(goldens, model):
    """Several documents in one pack; every layer."""
    tensors, settings = read(goldens, "text_forward", "text")
    config, params = model
    lengths = tensors["sample_lens"]
    assert lengths.tolist() == settings["sample_lens"]
    slots = lengths.sum()
    equal(tensors["packed_text_indexes"], np.arange(slots))
    positions = np.concatenate([np.arange(n) for n in lengths])
    equal(positions, tensors["packed_position_ids"])
    documents = np.repeat(np.arange(len(lengths)) + 1, lengths)
    vectors = [
        np.pad(v, (0, SPARE))[None].astype(np.int32)
        for v in (tensors["packed_text_ids"], positions, np.arange(slots) + 1, documents)
    ]
    mask = np.asarray(visible(vectors[2], vectors[3], vectors[3]))[0]
    equal(mask[:slots, :slots], tensors["attention_mask"])

    @functools.partial(jax.jit, static_argnames="config")
    def run(params, tokens, positions, limit, segment, *, config):
        x = bagel.embed_tokens(params, tokens, config=config)
        return bagel.forward(params, x, positions, limit, segment, config=config)[0][0, :slots]

    layers = matching(tensors, r"hidden\.layer(\d+)")
    assert len(layers) == config.llm.num_layers
    for match, hidden in layers:
        shorter, cut = first_layers(config, params, "llm", int(match[1]) + 1)
        close(run(cut, *vectors, config=shorter), normed(hidden, config, params), match[0])
    hidden = np.asarray(run(params, *vectors, config=config))
    close(hidden, tensors["hidden.norm"])
    logits = bagel.logits(params, hidden)
    compare(close, logits, tensors, "logits")
    ce = np.asarray(cross_entropy(logits, tensors["labels"]))
    close(ce, tensors["ce"])
    assert float(ce.mean()) == pytest.approx(settings["ce_mean"], rel=1e-5)
    chunked, hits = divergence.chunked_cross_entropy(
        hidden[None], params["llm"]["head"], tensors["labels"][None], chunk=5
    )
    close(chunked[0], tensors["ce"])
    equal(hits[0] > 0, logits.argmax(-1) == tensors["labels"])


def test_rope_tables(goldens, model):
    tensors, _ = read(goldens, "text_forward", "text")
    config = model[0].llm
    tables = matching(tensors, r"rope_(cos|sin)_(\d+)_(\d+)")
    assert tables
    for match, table in tables:
        positions = np.arange(int(match[2]), int(match[3]) + 1)[None]
        ours = attention.rope_tables(positions, config.head_dim, config.rope_theta)[
            match[1] == "sin"
        ]
        np.testing.assert_allclose(ours[0, :, 0], table, atol=2e-5, err_msg=match[0])
    cos, _ = attention.rope_tables(np.ones((1, 1)), config.head_dim, config.rope_theta)
    np.testing.assert_allclose(cos.ravel(), np.cos(np.tile(tensors["rope_inv_freq"], 2)), atol=1e-6)


def test_rope_frequencies_in_bfloat16(model):
    """`model.rope_bfloat16`: inv_freq as FSDP casts it, under jit too; the model's output moves by as much as that."""
    theta, dim = 1e6, 128
    exact = np.float32(1) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    rounded = exact.astype(jnp.bfloat16).astype(np.float64)
    assert 0.0035 < np.abs(rounded / exact - 1).max() < 0.0039
    positions = np.array([[1, 7, 4321]])
    for inv_freq, bfloat16 in ((rounded, True), (exact.astype(np.float64), False)):
        angles = np.tile(positions[0][:, None] * inv_freq, 2)
        tables = jax.jit(
            functools.partial(attention.rope_tables, head_dim=dim, theta=theta, bfloat16=bfloat16)
        )(positions)
        for ours, expected in zip(tables, (np.cos(angles), np.sin(angles))):
            # angles reach 4,321, of which float32 keeps 2.4e-4
            np.testing.assert_allclose(ours[0, :, 0], expected, atol=6e-4)
            np.testing.assert_allclose(ours[0, :2, 0], expected[:2], atol=2e-6)

    config, params = model
    x = np.random.default_rng(0).standard_normal((1, 40, config.llm.hidden_size), np.float32)
    everything = (np.arange(40)[None], np.arange(1, 41)[None], np.ones((1, 40), np.int32))
    hidden = [
        np.asarray(
            jax.jit(
                functools.partial(
                    bagel.forward, config=dataclasses.replace(config, rope_bfloat16=bfloat16)
                )
            )(params, x, *everything)[0]
        )
        for bfloat16 in (False, True)
    ]
    assert 1e-4 < np.abs(hidden[0] - hidden[1]).max() / np.abs(hidden[0]).max() < 0.2


# --- und_forward ---------------------------------------------------------------------------------------


def test_und_forward(goldens, und_forward, model, tokenizer):
    """Both packs: slots, positions, mask, targets exactly; hidden states, logits, cross entropy closely."""
    tensors, settings = read(goldens, "und_forward", und_forward)
    config, params = model
    target = context_lib.Text(tensors["completion_ids"], loss=True)
    rows = [
        [*blocks, target]
        for blocks in role_blocks(tensors, tokenizer, config.vit.patch_size, settings)
    ]
    batch = context_lib.supervise(
        rows,
        **bucket(rows),
        targets=len(target.ids) + 1 + SPARE,
        tokenizer=tokenizer,
        side=config.vit.side,
    )
    context = batch.context
    hidden = np.asarray(forward(params, context, config=config))
    shorter, cut = first_layers(config, params, "llm", 1)
    first = np.asarray(forward(cut, context, config=shorter))
    for r, role in enumerate(("student", "teacher")):
        golden = lambda name: tensors[f"{role}.{name}"]
        facts, n = settings[role], len(golden("packed_position_ids"))
        assert context.length[r] == facts["sequence_length"] == n
        assert [b.slots for b in rows[r]] == facts["split_lens"]
        modes = ["causal" if isinstance(b, context_lib.Text) else "full" for b in rows[r]]
        assert modes == facts["attn_modes"]
        equal(context.tokens[r, golden("packed_text_indexes")], golden("packed_text_ids"))
        equal(context.positions[r, :n], golden("packed_position_ids"))
        mask = np.asarray(visible(context.limit, context.segment, context.segment))[r]
        compare(equal, mask[:n, :n], tensors, f"{role}.attention_mask")
        assert not mask[:n, n:].any()
        patches = len(golden("packed_vit_position_ids"))
        compare(equal, context.patches[r, :patches], tensors, f"{role}.packed_vit_tokens")
        equal(context.patch_positions[r, :patches], golden("packed_vit_position_ids"))
        equal(context.patch_slots[r, :patches], golden("packed_vit_token_indexes"))
        assert (context.patch_slots[r, patches:] == context.slots).all()
        equal(np.bincount(context.patch_image[r, :patches])[1:], golden("vit_token_seqlens"))
        targets = batch.mask[r]
        assert targets.sum() == facts["completion_ce_count"]
        equal(batch.rows[r, targets], golden("ce_loss_indexes"))
        equal(batch.labels[r, targets], golden("packed_label_ids"))
        if f"{role}.hidden_layer0" in tensors:
            close(
                first[r, :n],
                normed(golden("hidden_layer0"), config, params),
                f"{role}, first layer",
            )
        compare(close, hidden[r, :n], tensors, f"{role}.hidden_final")
        logits = bagel.logits(params, hidden[r, batch.rows[r, targets]])
        close(logits, golden("logits"), role)
        ce = np.asarray(cross_entropy(logits, golden("packed_label_ids")))
        close(ce, golden("ce"), role)
        assert float(ce.mean()) == pytest.approx(settings[f"{role}_ce_mean"], rel=1e-5)


def test_score(goldens, und_forward, model, tokenizer):
    """`distill.score`: the completion behind padded contexts of both roles, one row each."""
    tensors, settings = read(goldens, "und_forward", und_forward)
    config, params = model
    context = pack(
        role_blocks(tensors, tokenizer, config.vit.patch_size, settings), tokenizer, config
    )
    block = completion(tensors["completion_ids"], tokenizer, batch=2)
    n = len(tensors["completion_ids"]) + 1
    equal(block.mask.sum(axis=1), [n, n])
    hidden = np.asarray(score(params, context, block, config=config))
    for r, role in enumerate(("student", "teacher")):
        equal(block.labels[r, :n], tensors[f"{role}.packed_label_ids"])
        close(bagel.logits(params, hidden[r, :n]), tensors[f"{role}.logits"], role)


# --- grads ---------------------------------------------------------------------------------------------


def kind_of(name, settings):
    """(DivergenceConfig, whether the loss is the cross entropy) of a gradient file."""
    if name.startswith(("ce", "tinker")):
        kind = "sampled_reverse_kl" if name.startswith("tinker") else "jsd"
        return DivergenceConfig(kind=kind, chunk=5), name.startswith("ce")
    return jsd_config(settings, chunk=5), False


def source_of(facts):
    """Which case of und_forward the gradients were taken on."""
    return re.search(r"und_forward/(\w+)", facts["uses"])[1]


def logits_of(role, tensors, sample):
    """A role's logits: the file of gradients repeats those of the case that it was taken on, or leaves them out."""
    return tensors.get(f"{role}_logits", sample[f"{role}.logits"])


def test_grads(goldens, grads, whole_model, tokenizer):
    """Loss and gradients of all parameters, through `distill.score` and the chunked divergence."""
    tensors, facts = read(goldens, "grads", grads)
    config, params = whole_model
    divergence_config, is_ce = kind_of(grads, facts["settings"])
    pack_name = source_of(facts)
    sample, settings = read(goldens, "und_forward", pack_name)
    student, teacher = role_blocks(sample, tokenizer, config.vit.patch_size, settings)
    student, teacher = pack([student], tokenizer, config), pack([teacher], tokenizer, config)
    block = completion(sample["completion_ids"], tokenizer, batch=1)

    hidden_s, pull = jax.vjp(lambda params: score(params, student, block, config=config), params)
    hidden_t = score(params, teacher, block, config=config)  # a constant of the loss

    def reduce(hidden, head):
        values, ce, _ = divergence.chunked(
            hidden, head, hidden_t, head, block.labels, divergence_config
        )
        return jnp.sum(
            (ce if is_ce else values) * distill.row_weights(block.mask, "completion")
        ), values

    (loss, values), (of_hidden, of_head) = jax.jit(
        jax.value_and_grad(reduce, (0, 1), has_aux=True)
    )(hidden_s, params["llm"]["head"])
    gradients = params_lib.flatten(jax.tree.map(np.asarray, pull(of_hidden)[0]))
    gradients["llm/head"] = gradients["llm/head"] + of_head
    np.testing.assert_allclose(loss, tensors["loss"][0], atol=1e-6, rtol=1e-5)
    assert float(loss) == pytest.approx(facts["loss"], rel=1e-5, abs=1e-6)
    n = len(sample["completion_ids"]) + 1
    for role, hidden in (("student", hidden_s), ("teacher", hidden_t)):
        close(
            bagel.logits(params, np.asarray(hidden)[0, :n]), logits_of(role, tensors, sample), role
        )
    if "per_token_jsd" in tensors:
        np.testing.assert_allclose(values[0, :n], tensors["per_token_jsd"], atol=1e-6, rtol=1e-4)
    ours = by_name(params_lib.unflatten(gradients))
    wanted = matching(tensors, r"grad\.(.+)")
    assert wanted
    for match, gradient in wanted:
        close_gradient(ours[match[1]], gradient, match[1])
    trained = set(by_name(params_lib.partition(params)[0]))
    checked = 0
    for name in ours:
        if name in facts["grad_norms"]:
            checked += 1
            wanted = pytest.approx(facts["grad_norms"][name], rel=1e-3, abs=1e-6)
            assert np.linalg.norm(ours[name]) == wanted, name
        if name in facts["params_with_exact_zero_grad"]:
            assert not ours[name].any(), name
        if name in facts["params_with_grad_none"]:
            assert name not in trained, name
    assert checked >= len(trained)
    total = math.sqrt(sum(float(np.sum(ours[name].astype(np.float64) ** 2)) for name in trained))
    assert total == pytest.approx(facts["total_grad_norm"], rel=1e-4)


def test_grads_from_logits(goldens, grads):
    """The divergences as defined on logits, and what they hand back to them."""
    tensors, facts = read(goldens, "grads", grads)
    config, is_ce = kind_of(grads, facts["settings"])
    sample, _ = read(goldens, "und_forward", source_of(facts))
    student, teacher = (logits_of(role, tensors, sample) for role in ("student", "teacher"))
    labels = sample["student.packed_label_ids"]

    def rows(logits, config):
        if is_ce:
            return divergence.cross_entropy(logits, labels)
        if config.kind == "sampled_reverse_kl":
            return divergence.sampled_reverse_kl(logits, teacher, labels, config.temperature)
        return divergence.generalized_jsd(logits, teacher, config)[0]

    loss, gradient = jax.jit(jax.value_and_grad(lambda logits: jnp.mean(rows(logits, config))))(
        student
    )
    np.testing.assert_allclose(loss, tensors["loss"][0], atol=1e-6, rtol=1e-5)
    close_gradient(gradient, tensors["student_logits_grad"])
    for name, clip in (("per_token_jsd", config.clip), ("per_token_jsd_unclipped", 0.0)):
        if name in tensors:
            values = jax.jit(
                functools.partial(rows, config=dataclasses.replace(config, clip=clip))
            )(student)
            np.testing.assert_allclose(values, tensors[name], atol=1e-6, rtol=1e-4, err_msg=name)


# --- jsd -----------------------------------------------------------------------------------------------


def mean_of(values, kept):
    """As the loss adds up the rows that count; 0 where none does."""
    return jnp.sum(values[None] * distill.row_weights(jnp.asarray(kept)[None], "completion"))


def test_jsd(goldens):
    """The whole grid of settings: values, reductions, gradients."""
    tensors, facts = read(goldens, "jsd", "jsd")
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    kept = tensors["labels"] != -100
    assert len(facts["cases"]) == len(tensors["per_token"])
    gradient_of = dict(zip(facts["grad_student_cases"], tensors["grad_student"], strict=True))

    def mean(logits, config):
        values = divergence.generalized_jsd(logits, teacher, config)[0]
        return jnp.mean(values), values

    for i, case in enumerate(facts["cases"]):
        (_, values), gradient = jax.value_and_grad(mean, has_aux=True)(student, jsd_config(case))
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=str(case))
        near(values, tensors["per_token"][i], atol=5e-6)
        near(jnp.mean(values), case["mean"], atol=1e-6)
        near(jnp.sum(values), case["sum"], atol=1e-5)
        near(mean_of(values, kept), case["mean_with_labels"], atol=1e-6)
        if i in gradient_of:
            close_gradient(gradient, gradient_of[i], str(case))
    assert float(mean_of(values, jnp.zeros_like(kept))) == facts["all_masked_value"]


def test_sampled_reverse_kl(goldens):
    tensors, facts = read(goldens, "jsd", "jsd")
    assert facts["tinker"]
    for i, case in enumerate(facts["tinker"]):
        mask = (
            tensors["labels"] != -100
            if case["with_labels"]
            else np.ones(len(tensors["labels"]), bool)
        )
        loss = lambda logits: mean_of(
            divergence.sampled_reverse_kl(
                logits, tensors["teacher_logits"], tensors["sampled_token_ids"], case["temperature"]
            ),
            mask,
        )
        value, gradient = jax.value_and_grad(loss)(tensors["student_logits"])
        assert float(value) == pytest.approx(case["loss"], rel=1e-5, abs=1e-6), case
        compare(close_gradient, gradient, tensors, f"tinker_grad.{i}")


# --- generate ------------------------------------------------------------------------------------------


def prompt_blocks(tensors, tokenizer, patch):
    prompts = context_lib.Prompts(tensors.get("system_ids", ""), "", "")
    problem = image_block(tensors["image"], patch)
    return context_lib.student(tokenizer, prompts, tensors["question_ids"], problem)


def test_generate(goldens, generate, model, tokenizer):
    """`rollout.sample`: tokens, logits of every fed token, and what the image-skip rounds fed between."""
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
    other = [blocks[-1], *blocks]  # a longer row, so that the golden one stands before a gap
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
    ]  # officially an injected eos has no logits
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
        assert event["rope_before"] == context.next_position[0] + len(expected)
        skips += event["event"] == "append_to_cache"
        expected += event["token_ids"] if event["event"] == "append_to_cache" else event["returned"]
    assert fed[:count].tolist() == expected
    assert sampled.num_skips[0] == skips


def test_generate_cache(goldens, model, tokenizer):
    """The cache after the prompt and after decoding, and the counters behind every block of the prompt."""
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
        assert (part.length[0], part.next_position[0]) == (fact["kv_len"], fact["rope"])
    context = pack([blocks], tokenizer, config)
    tokens = tensors["tokens"][None]
    room = tokens.shape[1]

    @jax.jit
    def run(params, context):
        segment = jnp.pad(context.segment, ((0, 0), (0, room)))
        cache = bagel.init_cache(1, context.slots + room, config=config)
        x = bagel.embed(params, context, config=config)
        _, prefill = bagel.forward(
            params,
            x,
            context.positions,
            context.limit,
            context.segment,
            config=config,
            cache=cache,
            key_segment=segment,
        )
        x = bagel.embed_tokens(params, tokens, config=config)
        hidden, final = bagel.forward(
            params,
            x,
            *context_lib.behind(context, room),
            config=config,
            cache=prefill,
            offset=context.slots,
            key_segment=segment.at[:, context.slots :].set(1),
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
            else np.concatenate([cache[:used], cache[context.slots :]])
        )
        close(kept, wanted, match[0])
    close(logits, tensors["logits"])
    close(logits[:1], tensors["next_token_logits"])


# --- vae -----------------------------------------------------------------------------------------------

hwc = functools.partial(np.moveaxis, source=-3, destination=-1)  # [..., C, H, W] -> [..., H, W, C]


@functools.partial(jax.jit, static_argnames="config")
def moments(params, pixels, *, config):
    return jnp.concatenate(bagel.encode_pixels(params, pixels, config=config), axis=-1)


decode_latents = jax.jit(bagel.decode_latents, static_argnames="config")


def test_autoencoder(goldens, autoencoder, whole_model):
    tensors, _ = read(goldens, "vae", autoencoder)
    config, params = whole_model
    pixels, noise = hwc(tensors["image"]), hwc(tensors["noise"])
    close(moments(params, pixels, config=config), hwc(tensors["moments"]))
    for name, draw in (("mean", np.zeros_like(noise)), ("sampled", noise)):
        latents = hwc(tensors[f"latent_{name}"])
        close(flow.encode(params, pixels, draw, config=config), latents, name)
        if f"decoded_from_{name}" in tensors:
            close(
                decode_latents(params, latents, config=config),
                hwc(tensors[f"decoded_from_{name}"]),
                name,
            )


# --- gen_image -----------------------------------------------------------------------------------------

BRANCHES = {
    "cond": "cond",
    "cfg_text": "text",
    "cfg_img": "image",
}  # golden name: name in FlowConfig.branches


def scene(tensors, facts, whole_model, tokenizer):
    """(stages, {branch: blocks}, grid): the parts of the context, the three contexts, tokens of the drawn image."""
    config, params = whole_model
    generation = config.generation
    pixels, noise = hwc(tensors["vae_image"])[None], hwc(tensors["vae_encode_noise"])
    latents = np.asarray(flow.encode(params, pixels, noise, config=config))[0]
    grid = tuple(n // generation.patch for n in latents.shape[:2])
    picture = [
        context_lib.Latent(np.asarray(flow.to_tokens(latents, generation.patch)), grid),
        image_block(tensors["vit_image"], config.vit.patch_size),
    ]
    system, question, generated = (
        [context_lib.Text(tensors[f"{name}_ids"])]
        for name in ("system", "question", "generated_text")
    )
    contexts = {
        "cond": [*system, *picture, *question, *generated],
        "text": [*system, *picture],
        "image": [*system, *question],
    }
    return (
        [system, picture, question, generated],
        contexts,
        tuple(n // generation.stride for n in facts["image_shape"]),
    )


def flow_config(model, tokenizer, run):
    return flow.FlowConfig(
        model=model,
        image_start=tokenizer.image_start,
        image_end=tokenizer.image_end,
        num_timesteps=run["num_timesteps"],
        timestep_shift=run["timestep_shift"],
        text_scale=run["cfg_text_scale"],
        image_scale=run["cfg_img_scale"],
        interval=tuple(run["cfg_interval"]),
        renorm=run["cfg_renorm_type"],
        renorm_min=run["cfg_renorm_min"],
    )


def all_branches(model, tokenizer):
    """For raw velocities behind all three contexts, whatever the guidance."""
    return flow.FlowConfig(
        model, tokenizer.image_start, tokenizer.image_end, text_scale=2.0, image_scale=2.0
    )


def padded(tokens):
    """Latent tokens [..., G, C] with some more behind them: nothing may depend on their values."""
    return np.concatenate(
        [tokens, np.full((*tokens.shape[:-2], SPARE, tokens.shape[-1]), 7, np.float32)], axis=-2
    )


def canvas_of(blocks, grid, whole_model, tokenizer, config):
    """(packed contexts, positions, real, Canvas, cache) of rows of blocks."""
    model, params = whole_model
    packed = pack(blocks, tokenizer, model, bucket(blocks, model))
    positions, real = flow.layout([grid], math.prod(grid) + SPARE, model.generation.side)
    return (
        packed,
        positions,
        real,
        *flow.prepare(params, packed, positions, real, config=config.model),
    )


@functools.partial(jax.jit, static_argnames="config")
def raw_velocities(params, canvas, cache, x, times, *, config):
    """x [N, B, G, C], times [N] -> [N, R, B, G, C]."""
    return jax.lax.map(
        lambda at: flow.velocities(params, canvas, cache, *at, config=config)[0], (x, times)
    )


def test_gen_image_contexts(goldens, drawing, whole_model, tokenizer):
    """The context image's moments; lengths, rope ids and cached keys of the three contexts; latent positions."""
    tensors, facts = read(goldens, "gen_image", drawing)
    config, params = whole_model
    found = moments(params, hwc(tensors["vae_image"])[None], config=config)
    compare(close, np.moveaxis(found, -1, -3), tensors, "vae_moments")
    stages, contexts, grid = scene(tensors, facts, whole_model, tokenizer)
    assert len(stages) == len(facts["context_stages"])
    for n, fact in enumerate(facts["context_stages"]):
        row = sum(stages[: n + 1], [])
        part = pack([row], tokenizer, config, bucket([row], config))
        assert (part.length[0], part.next_position[0]) == (fact["kv_len"], fact["rope"]), fact[
            "after"
        ]
    settings = all_branches(config, tokenizer)
    assert settings.branches == tuple(BRANCHES.values())
    packed, positions, real, canvas, cache = canvas_of(
        [contexts[name] for name in settings.branches], grid, whole_model, tokenizer, settings
    )
    equal(positions[real], tensors["packed_vae_position_ids"])
    for r, name in enumerate(BRANCHES):
        length = facts[name]["kv_len"]
        assert (packed.length[r], packed.next_position[r]) == (length, facts[name]["rope"])
        rope = tensors["packed_position_ids" if name == "cond" else f"{name}_position_ids"]
        equal(np.full(real.sum() + 2, canvas.rope[r]), rope)
        used = packed.segment[r] > 0
        places = packed.latents.order[r, used]
        for match, wanted in matching(tensors, rf"([kv])_(?:layer(\d+)|last)_{name}"):
            kept = np.full(wanted.shape, np.nan, np.float32)
            kept[places] = np.asarray(cache[match[1]][int(match[2] or -1), r, : packed.slots])[used]
            close(kept, wanted, match[0])


def test_gen_image_steps(goldens, drawing, whole_model, tokenizer):
    """Time grids; at every step of every trajectory: raw velocities, guidance, the next x."""
    tensors, facts = read(goldens, "gen_image", drawing)
    model, params = whole_model
    configs = {n: flow_config(model, tokenizer, run) for n, run in enumerate(facts["runs"])}
    for n, config in configs.items():
        compare(close, flow.timesteps(config), tensors, f"run{n}.timesteps")
    configs = {n: config for n, config in configs.items() if f"run{n}.x_traj" in tensors}
    assert configs
    _, contexts, grid = scene(tensors, facts, whole_model, tokenizer)
    settings = all_branches(model, tokenizer)
    _, _, real, canvas, cache = canvas_of(
        [contexts[name] for name in settings.branches], grid, whole_model, tokenizer, settings
    )
    # All steps of all runs in one program.
    x = np.concatenate([padded(tensors[f"run{n}.x_traj"][:-1]) for n in configs])[:, None]
    times = np.concatenate([flow.timesteps(config)[:-1] for config in configs.values()])
    found = np.asarray(raw_velocities(params, canvas, cache, x, times, config=settings))
    guide = jax.jit(flow.guide, static_argnames="config")
    for n, config in configs.items():
        run, steps = facts["runs"][n], config.num_timesteps - 1
        v, found = found[:steps], found[steps:]
        # Officially a branch is evaluated if its own scale is above 1, even where guidance is off.
        evaluated = [0, *[1] * (run["cfg_text_scale"] > 1), *[2] * (run["cfg_img_scale"] > 1)]
        for branch, name in zip(evaluated, ("cond", "second", "third")):
            compare(close, v[0, branch, 0, :-SPARE], tensors, f"run{n}.step0_branch_{name}")
        first, last = flow.guided_steps(config)
        grid_of_times, path = flow.timesteps(config), tensors[f"run{n}.x_traj"]
        for k in range(steps):
            guided = first <= k < last
            if run["cfg_text_scale"] > 1:
                assert run["branches_per_step"][k] == (len(config.branches) if guided else 1)
            used = v[k, 0]
            if guided:
                image = v[k, 2] if "image" in config.branches else None
                used = np.asarray(guide(v[k, 0], v[k, 1], image, real, config=config))
            used = used[0, :-SPARE]
            close(used, tensors[f"run{n}.velocity"][k], f"run {n}, step {k}")
            close(
                path[k] - used * (grid_of_times[k] - grid_of_times[k + 1]),
                path[k + 1],
                f"run {n}, step {k}",
            )


def test_gen_image_draw(goldens, drawing, whole_model, tokenizer):
    """`flow.draw`, every run from noise to pixels."""
    tensors, facts = read(goldens, "gen_image", drawing)
    model, params = whole_model
    _, contexts, grid = scene(tensors, facts, whole_model, tokenizer)
    assert len(tensors["init_noise"]) == math.prod(grid)
    positions, real = flow.layout([grid], math.prod(grid) + SPARE, model.generation.side)
    for n, run in enumerate(facts["runs"]):
        config = flow_config(model, tokenizer, run)
        rows = [contexts[name] for name in config.branches]
        sizes = bucket(list(contexts.values()), model)
        drawn = flow.draw(
            params,
            pack(rows, tokenizer, model, sizes),
            padded(tensors["init_noise"])[None],
            positions,
            real,
            config=config,
        )[:, :-SPARE]
        close(drawn[0], tensors[f"run{n}.final_latent_tokens"], f"run {n}")
        latents = flow.to_latents(drawn, grid, model.generation.patch)
        compare(close, np.moveaxis(latents, -1, -3)[0], tensors, f"run{n}.final_latent_chw")
        if f"run{n}.decoded_preclamp" in tensors:
            pixels = np.asarray(decode_latents(params, latents, config=model))[0]
            close(pixels, hwc(tensors[f"run{n}.decoded_preclamp"]), f"run {n}")
        if f"run{n}.image_u8" in tensors:
            wanted = tensors[f"run{n}.image_u8"]
            pixels = np.asarray(flow.decode(params, drawn, grid=grid, config=model))[0]
            assert pixels.dtype == np.uint8 and pixels.shape == wanted.shape
            apart = np.abs(pixels.astype(int) - wanted)
            # Values are truncated: rounding errors of the floats turn some just below a whole number.
            assert apart.max() <= 1 and apart.mean() <= 1e-3, f"run {n}"


def test_flow_velocity(goldens, whole_model, tokenizer):
    """Velocities behind each context at given times."""
    tensors, facts = read(goldens, "gen_image", "flow_velocity")
    source, there = read(goldens, "gen_image", facts["context"].split()[-1])
    model, params = whole_model
    _, contexts, grid = scene(source, {**there, **facts}, whole_model, tokenizer)
    settings = all_branches(model, tokenizer)
    _, _, _, canvas, cache = canvas_of(
        [contexts[name] for name in settings.branches], grid, whole_model, tokenizer, settings
    )
    times = np.array(facts["t"], np.float32)
    x = np.tile(padded(tensors["x_t"]), (len(times), 1, 1, 1))
    found = np.asarray(raw_velocities(params, canvas, cache, x, times, config=settings))[
        :, :, 0, :-SPARE
    ]
    wanted = matching(tensors, r"v\.(\w+)\.t(\d+)")
    assert wanted
    for match, velocity in wanted:
        close(found[int(match[2]), list(BRANCHES).index(match[1])], velocity, match[0])


def train_rows(tensors, facts, whole_model):
    """Blocks of each packed sample; VAE images are sampled with the noise of the golden run."""
    config, params = whole_model
    generation = config.generation
    samples = sorted({int(match[1]) for match, _ in matching(tensors, r"sample(\d+)\..*")})
    is_image = [not step.startswith("text") for step in facts["plan"]]
    order = [sum(part == kind for part in is_image[:n]) for n, kind in enumerate(is_image)]
    plan = list(zip(facts["plan"], order))
    pictures = [
        tensors[f"sample{n}.image{k}"]
        for n in samples
        for step, k in plan
        if step.startswith("vae")
    ]
    # officially all are encoded at once, on black of a common size
    noise = hwc(tensors["vae_encode_noise"])
    assert len(noise) == len(pictures)
    sides = [side * generation.vae.downsample for side in noise.shape[1:3]]
    pad = lambda picture: np.pad(
        picture, [(0, 0), *((0, a - b) for a, b in zip(sides, picture.shape[1:]))]
    )
    pixels = np.stack([pad(picture) for picture in pictures])
    compare(equal, pixels, tensors, "padded_images")
    latents = np.asarray(flow.encode(params, hwc(pixels), noise, config=config))
    compare(close, np.moveaxis(latents, -1, -3), tensors, "padded_latent")
    encoded = []
    for picture, values, grid in zip(
        pictures, latents, facts["patchified_vae_latent_shapes"], strict=True
    ):
        assert [side // generation.stride for side in picture.shape[1:]] == grid
        rows, columns = (side * generation.patch for side in grid)
        encoded.append(
            context_lib.Latent(
                flow.to_tokens(values[:rows, :columns], generation.patch), tuple(grid)
            )
        )

    def block(n, step, k):
        if step.startswith("text"):
            return context_lib.Text(tensors[f"sample{n}.text{k}"], loss="(loss)" in step)
        if step == "vit":
            return image_block(tensors[f"sample{n}.image{k}"], config.vit.patch_size)
        return dataclasses.replace(encoded.pop(0), noised="noised" in step)

    return [[block(n, step, k) for step, k in plan] for n in samples]


def test_train_mse(goldens, whole_model, tokenizer):
    """Training on noised images: latents, packs, flow loss, cross entropy, gradients of their sum.

    Officially the samples are documents of one row; here each has a row of its own.
    """
    tensors, facts = read(goldens, "gen_image", "train_mse")
    config, params = whole_model
    assert facts["timestep_shift"] == config.generation.timestep_shift
    rows = train_rows(tensors, facts, whole_model)
    targets = (
        max(sum(len(b.ids) + 1 for b in blocks if getattr(b, "loss", False)) for blocks in rows)
        + SPARE
    )
    batch = context_lib.supervise(
        rows, targets=targets, tokenizer=tokenizer, side=config.vit.side, **bucket(rows, config)
    )
    context, drawn = batch.context, batch.context.latents
    real, used = drawn.image > 0, context.segment > 0
    stops = np.cumsum(facts["sample_lens"])
    equal(context.length, facts["sample_lens"])
    place = drawn.order + (stops - context.length)[:, None]  # of each slot in the official row
    in_sequence = lambda values: values[used][np.argsort(place[used])]
    slots, patches = context.tokens.shape[1], context.patch_image > 0
    text, at_latents = used[:, :slots].copy(), place[:, slots:]
    for r in range(len(rows)):
        text[r, context.patch_slots[r, patches[r]]] = False
    equal(place[:, :slots][text], tensors["packed_text_indexes"])
    equal(context.tokens[text], tensors["packed_text_ids"])
    equal(in_sequence(context.positions), tensors["packed_position_ids"])
    equal(
        np.take_along_axis(place, context.patch_slots, axis=1)[patches],
        tensors["packed_vit_token_indexes"],
    )
    equal(context.patch_positions[patches], tensors["packed_vit_position_ids"])
    compare(equal, context.patches[patches], tensors, "packed_vit_tokens")
    equal(
        [n for row in context.patch_image for n in np.bincount(row)[1:]],
        tensors["vit_token_seqlens"],
    )
    equal(at_latents[real], tensors["packed_vae_token_indexes"])
    equal(drawn.positions[real], tensors["packed_latent_position_ids"])
    if "attention_mask" in tensors:
        mask = np.asarray(
            visible(
                context.limit,
                context.segment,
                context.segment,
                drawn.order,
                drawn.noised,
                drawn.noised,
            )
        )
        ours = np.zeros_like(tensors["attention_mask"])
        for r in range(len(rows)):
            assert not mask[r][:, ~used[r]].any()
            ours[np.ix_(place[r, used[r]], place[r, used[r]])] = mask[r][np.ix_(used[r], used[r])]
        equal(ours, tensors["attention_mask"])
    equal(np.take_along_axis(place, batch.rows, axis=1)[batch.mask], tensors["ce_loss_indexes"])
    equal(batch.labels[batch.mask], tensors["packed_label_ids"])

    raw, noise = np.full(real.shape, -np.inf, np.float32), np.zeros(drawn.tokens.shape, np.float32)
    raw[real], noise[real] = tensors["packed_timesteps"], tensors["flow_noise"]
    times = flow.training_times(raw, config.generation.timestep_shift)
    equal(np.asarray(times) == 0, np.isneginf(raw))
    equal((np.asarray(times) > 0) & real, np.isin(at_latents, tensors["mse_loss_indexes"]) & real)

    @jax.jit
    def objective(params):
        errors, counted, hidden = flow.loss(params, context, times, noise, config=config)
        logits = bagel.logits(params, jnp.take_along_axis(hidden, batch.rows[:, :, None], axis=1))
        ce = divergence.cross_entropy(logits, batch.labels)
        mean = lambda values, mask: jnp.sum(values * mask) / jnp.sum(mask)
        means = mean(errors.mean(-1), counted), mean(ce, batch.mask)
        return sum(means), (means, errors, counted, hidden, logits, ce)

    (total, found), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    means, errors, counted, hidden, logits, ce = jax.tree.map(np.asarray, found)
    equal(at_latents[counted], tensors["mse_loss_indexes"])
    close(errors[counted], tensors["mse"])
    assert not errors[~counted].any()
    close(errors[counted].mean(-1), tensors["mse_per_token"])
    compare(close, in_sequence(hidden), tensors, "hidden_final")
    compare(close, logits[batch.mask], tensors, "logits")
    close(ce[batch.mask], tensors["ce"])
    for ours, name in (
        (means[0], "mse_mean"),
        (means[1], "ce_mean"),
        (total, "total_loss_for_grads"),
    ):
        assert float(ours) == pytest.approx(facts[name], rel=1e-5), name
    ours, wanted = by_name(gradients), matching(tensors, r"grad\.(.+)")
    assert wanted
    for match, gradient in wanted:
        close_gradient(ours[match[1]], gradient, match[1])


# --- schedule ------------------------------------------------------------------------------------------


def test_schedule(goldens):
    """Up to its end. After it the official cosine would climb again; here it stays at the end's rate."""
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
        rates = distill.learning_rate(steps, dataclasses.replace(settings, schedule=schedule))
        last = distill.learning_rate(
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
        LLMConfig(1, 4, 1, 1, 1, 1), ViTConfig(1, 1, 1, 1)
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
    vector = lambda x: {"llm": {"norm": jnp.asarray(x)}}
    state = distill.init_state(vector(tensors["toy_x0"]), config)
    update = jax.jit(functools.partial(distill.apply_gradients, config=config))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    previous = np.zeros_like(tensors["toy_x0"])
    for k, gradient in enumerate(tensors["toy_raw_grads"]):
        state, metrics = update(state, vector(gradient))
        at = lambda name: tensors[f"toy_{name}"][k]
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


# --- opsd_steps ----------------------------------------------------------------------------------------


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

    # Their gradient is zero but for rounding, which AdamW's tiny epsilon blows up to whole steps of noise.
    is_trap = lambda name: name.startswith("vit_model.") and name.endswith("self_attn.k_proj.bias")

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

    # Committed to a device like what comes back from an update, so that the program is compiled once.
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
        # The longest completion rides along for its length only: all steps share one compiled program.
        sampled = trajectory([*(completions[n] for n in ids), longest])
        sampled = jax.tree.map(lambda x: x[: len(ids)], sampled)
        assert [len(completions[n]) + 1 for n in ids] == [
            micro["n_completion_rows"] for micro in micros
        ]
        state, metrics = distill.update(state, batch, sampled, config=config)
        mean = lambda name: np.mean([micro[name] for micro in micros])
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
    )  # officially only some of these are listed
    for name in unchanged:
        equal(after[name], before[name], err_msg=name)
    for name in set(after) - unchanged:
        assert is_trap(name) or (after[name] != before[name]).any(), name


# --- preprocess ----------------------------------------------------------------------------------------


def resize_rules(facts):
    return {
        name: images.Resize(
            stride=rule["image_stride"],
            max_size=rule["max_image_size"],
            min_size=rule["min_image_size"],
            max_pixels=rule.get("max_pixels", facts["default_max_pixels"]),
        )
        for name, rule in facts["transforms"].items()
    }


def test_preprocess_images(goldens):
    """PNG -> RGB on white -> resized uint8 -> normalised -> patches, bit by bit up to the normalisation."""
    tensors, facts = read(goldens, "preprocess", "preprocess")
    rules = resize_rules(facts)
    path_to = lambda name: goldens / "preprocess" / f"{name}.png"
    rows = [
        row for row in facts["images"] if path_to(row["image"]).exists()
    ]  # a copy may leave out images
    assert rows
    for row in rows:
        name, transform = row["image"], row["transform"]
        path = path_to(name)
        with PillowImage.open(path) as file:
            assert (file.mode, [file.height, file.width]) == (row["png_mode"], row["orig_hw"])
        image = images.open_rgb(path.read_bytes())
        if f"{name}.rgb_sample" in tensors:
            rgb = np.asarray(image)
            down, right = (max(1, n // 8) for n in rgb.shape[:2])
            equal(rgb[::down, ::right], tensors[f"{name}.rgb_sample"], err_msg=name)
        rule, label = rules[transform], f"{name}.{transform}"
        pixels = images.resize(image, rule)
        assert list(pixels.shape[:2]) == row["out_hw"], label
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == row["sha256_resized_u8_hwc"], label
        if f"{label}.resized_u8_hwc" in tensors:
            equal(pixels, tensors[f"{label}.resized_u8_hwc"], err_msg=label)
        near = functools.partial(np.testing.assert_allclose, rtol=0, err_msg=label)
        values = np.asarray(bagel.normalize_patches(pixels)).transpose(2, 0, 1)
        near(values.mean((1, 2), np.float64), row["mean"], atol=1e-5)
        near(values.std((1, 2), np.float64, ddof=1), row["std"], atol=1e-5)
        if f"{label}.tensor" in tensors:
            near(values, tensors[f"{label}.tensor"], atol=3e-7)
        down, right = (max(1, n // 8) for n in pixels.shape[:2])
        if f"{label}.sample_tensor" in tensors:
            near(values[:, ::down, ::right], tensors[f"{label}.sample_tensor"], atol=3e-7)
        patches = images.patchify(pixels, rule.stride)
        assert len(patches) == row["n_patches"], label
        if f"{label}.patchified" in tensors:
            near(bagel.normalize_patches(patches), tensors[f"{label}.patchified"], atol=3e-7)


def test_preprocess_sizes(goldens):
    _, facts = read(goldens, "preprocess", "preprocess")
    rules, grid = resize_rules(facts), facts["resize_shape_grid"]
    assert grid["rows"]
    for row in grid["rows"]:
        case = dict(zip(grid["columns"], row, strict=True))
        size = rules[case["transform"]](case["w"], case["h"], case["img_num"])
        assert size == (case["out_w"], case["out_h"]), case


def test_preprocess_patchify(goldens):
    tensors, _ = read(goldens, "preprocess", "preprocess")
    cases = matching(tensors, r"patchify_out(\d*)_p(\d+)")
    assert cases
    for match, wanted in cases:
        pixels = tensors[f"patchify_in{match[1]}"].transpose(1, 2, 0)
        patch = int(match[2])
        equal(images.patchify(pixels, patch), wanted, err_msg=match[0])
        grid = (pixels.shape[0] // patch, pixels.shape[1] // patch)
        equal(images.unpatchify(wanted, grid, patch), pixels, err_msg=match[0])


def test_preprocess_position_ids(goldens):
    tensors, facts = read(goldens, "preprocess", "preprocess")
    assert facts["position_ids"]
    for row in facts["position_ids"]:
        grid, side = (row["grid_h"], row["grid_w"]), row["max_num_patches_per_side"]
        name = f"pos.{row['index']}"
        compare(equal, images.position_ids(grid, side), tensors, f"{name}.extrapolate")
        if row["interpolate_len_ok"]:  # the official rounding can give one row or column too many
            compare(
                equal, images.interpolated_position_ids(grid, side), tensors, f"{name}.interpolate"
            )


# --- other sizes, without goldens ----------------------------------------------------------------------

OTHER_LLM = {
    "vocab_size": 400,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "intermediate_size": 72,
    "rope_theta": 5e4,
    "rms_norm_eps": 1e-5,
}
OTHER_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 35,
    "patch_size": 5,
}
OTHER_WHOLE = {"latent_patch_size": 3, "max_latent_size": 5, "timestep_shift": 2.0}
OTHER_AE = {
    "ch": 32,
    "ch_mult": [1, 3, 2],
    "num_res_blocks": 1,
    "z_channels": 8,
    "scale_factor": 0.7,
    "shift_factor": -0.2,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "downsample": 4,
}
OTHER_TOKENIZER = types.SimpleNamespace(bos=391, eos=7, image_start=390, image_end=2)


def test_other_sizes(tmp_path):
    """A model of sizes unlike the golden ones against NumPy: both packs, and greedy decoding."""
    tokenizer = OTHER_TOKENIZER
    write_checkpoint(tmp_path, OTHER_LLM, OTHER_VIT, OTHER_WHOLE, OTHER_AE, seed=0)
    config, params = load_lib.load(str(tmp_path))
    assert (config.llm.head_dim, config.vit.num_layers, config.vit.side) == (8, 2, 7)
    reference = Reference(tmp_path, tuple(vars(tokenizer).values()))
    rng = np.random.default_rng(1)
    ids = lambda n: rng.integers(10, 380, n).astype(np.int32)
    picture = lambda rows, columns: context_lib.Image(
        rng.uniform(-1, 1, (rows * columns, 75)).astype(np.float32), (rows, columns)
    )
    prompts = context_lib.Prompts(ids(6), ids(3), ids(4))
    question, problem, answer = ids(5), picture(3, 7), ids(8)
    roles = [
        context_lib.student(tokenizer, prompts, question, problem),
        context_lib.teacher(
            tokenizer, prompts, question, problem, [picture(2, 4), None, picture(6, 1)]
        ),
    ]
    context = pack(roles, tokenizer, config)
    block = completion(answer, tokenizer, batch=2)
    hidden = np.asarray(score(params, context, block, config=config))
    for r, blocks in enumerate(roles):
        wanted = reference.logits(blocks, [tokenizer.bos, *answer])
        close(
            bagel.logits(params, hidden[r, : len(answer) + 1]),
            wanted[-len(answer) - 1 :],
            f"role {r}",
        )

    marker = rollout.Marker.build([b"."] * 400, 400)
    settings = rollout.RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        marker=marker,
        greedy=True,
        max_new_tokens=12,
    )
    sampled, logits = jax.tree.map(
        np.asarray,
        rollout.sample(params, context, jax.random.key(0), config=settings, return_logits=True),
    )
    for r, blocks in enumerate(roles):
        fed, wanted = reference.greedy(blocks, budget=12)
        gap = np.sort(wanted, axis=-1)
        assert (gap[:, -1] - gap[:, -2]).min() > 1e-3  # no near-ties: the tokens are well defined
        assert sampled.fed[r, : sampled.num_fed[r]].tolist() == fed
        close(logits[r, : len(fed)], wanted, f"role {r}")


def test_other_sizes_draw(tmp_path):
    """The same sizes, from a model in shards: pixels to latents, drawings behind three contexts, and back."""
    tokenizer = OTHER_TOKENIZER
    write_checkpoint(tmp_path, OTHER_LLM, OTHER_VIT, OTHER_WHOLE, OTHER_AE, seed=2, shards=3)
    model, params = load_lib.load(str(tmp_path), generation=True)
    generation = model.generation
    assert (generation.stride, generation.latent_dim, generation.timestep_shift) == (12, 72, 2.0)
    reference = Reference(tmp_path, tuple(vars(tokenizer).values()))
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    pixels, noise = np.tanh(normal(3, 24, 36)), normal(8, 6, 9)
    latents = np.asarray(flow.encode(params, hwc(pixels)[None], hwc(noise)[None], config=model))[0]
    close(latents, hwc(reference.encode(pixels, noise)))

    text = lambda n: context_lib.Text(rng.integers(10, 380, n).astype(np.int32))
    system, question, answer = text(4), text(6), text(3)
    picture = [
        context_lib.Latent(np.asarray(flow.to_tokens(latents, 3)), (2, 3)),
        context_lib.Image(np.tanh(normal(2 * 4, 75)), (2, 4)),
    ]
    contexts = [[system, *picture, question, answer], [system, *picture], [system, question]]
    grid, initial = (1, 4), normal(4, 72)
    times = np.linspace(1, 0, 5)
    times = 1.7 * times / (1 + 0.7 * times)
    guided = [0.3 < time <= 0.9 for time in times[:-1]]
    assert not guided[0] and any(guided)
    packed = pack(contexts, tokenizer, model, bucket(contexts, model))
    positions, real = flow.layout([grid], len(initial) + SPARE, generation.side)
    for renorm in flow.RENORMS:
        config = flow.FlowConfig(
            model,
            tokenizer.image_start,
            tokenizer.image_end,
            num_timesteps=5,
            timestep_shift=1.7,
            text_scale=2.5,
            image_scale=1.4,
            interval=(0.3, 0.9),
            renorm=renorm,
            renorm_min=0.2,
        )
        wanted = reference.draw(
            contexts,
            initial,
            grid,
            times,
            config.interval,
            a=2.5,
            b=1.4,
            renorm=renorm,
            renorm_min=0.2,
        )
        drawn = flow.draw(params, packed, padded(initial)[None], positions, real, config=config)[
            :, :-SPARE
        ]
        close(drawn[0], wanted, renorm)
    square = lambda tokens: np.asarray(flow.to_latents(tokens, grid, 3))
    image = decode_latents(params, square(drawn), config=model)[0]
    close(image, hwc(reference.decode(np.moveaxis(square(wanted), -1, 0))))
