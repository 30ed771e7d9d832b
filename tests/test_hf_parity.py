"""Replays of golden data of transformers' models: Qwen2, Qwen3, Llama, Qwen2.5-VL and Qwen3-VL.

`--hf_goldens=DIR` takes any sizes and seeds: a case is a folder FAMILY/CASE with the model's folder
as transformers writes it and the inputs and results, see the goldens' README. Tolerances are those
of tolerances.json.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity.inputs
from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import distill, divergence, images, rollout, tokenizer
from opsd_jax import params as params_lib
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.inputs import json_files
from opsd_jax.model import attention, bagel, masks, mot, qwen_vision
from opsd_jax.release import (
    export,
    families,
    folders,
    importing,
    load,
    qwen_vl_configs,
    safetensors_io,
)

# What a folder of goldens has beside families; each has its own tests.
OTHERS = ("preprocess", "tokenizer", "real_smollm2")
KNOWN = (*families.DECODERS, *qwen_vl_configs.ARCHITECTURES)
BETAS = {"jsd": 0.5, "fkl": 0.0, "rkl": 1.0}


def cases(root: pathlib.Path, *, known: bool) -> list[str]:
    """FAMILY/CASE of the cases of known or of all other families, from the names of folders."""
    return sorted(
        f"{path.parent.parent.name}/{path.parent.name}"
        for path in root.glob("*/*/model")
        if (path.parent.parent.name in KNOWN) == known
    )


def pytest_generate_tests(metafunc):
    root = pathlib.Path(metafunc.config.getoption("--hf_goldens"))
    for argument, known in (("case_name", True), ("other_case", False)):
        if argument in metafunc.fixturenames:
            names = cases(root, known=known)
            metafunc.parametrize(argument, names or [None], ids=names or ["none"], scope="module")
    if "preprocessed" in metafunc.fixturenames:
        path = root / "preprocess" / "preprocess.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        names = [*found.get("results", {})]
        metafunc.parametrize("preprocessed", names or [None], ids=names or ["none"])


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: its model's folder and sizes, weights, tensors and settings, and tolerances."""

    folder: str
    config: object
    params: dict
    tensors: dict
    settings: dict
    tolerances: dict

    def near(self, actual, wanted, tolerance, name):
        np.testing.assert_allclose(
            actual, wanted, rtol=0, atol=self.tolerances[tolerance], err_msg=name
        )

    def rows(self, name="row{}.ids"):
        """Numbers of the sequences."""
        count = 0
        while name.format(count) in self.tensors:
            count += 1
        return range(count)

    @functools.cached_property
    def tokenizer(self):
        """The delimiters of images; the others are not in these contexts."""
        ids = json_files.read(f"{self.folder}/config.json")
        return types.SimpleNamespace(
            bos=-1,
            eos=-1,
            image_start=ids.get("vision_start_token_id"),
            image_end=ids.get("vision_end_token_id"),
        )

    @functools.cached_property
    def images(self):
        """{name: block} of the images, from their files."""
        rule = folders.size_rule(self.folder, self.config)
        vit = self.config.vit
        return {
            name: blocks_lib.image_block(
                images.resize(
                    images.open_rgb(pathlib.Path(self.folder).parent / facts["png"]), rule
                ),
                vit.patch_size,
                vit.merge,
            )
            for name, facts in self.settings.get("images", {}).items()
        }

    def blocks(self, ids, shown=()):
        """Blocks of a row: texts without delimiters, and images in their places in the ids."""
        blocks, at = [], 0
        for name in shown:
            image = self.images[name]
            start = at + ids[at:].tolist().index(self.tokenizer.image_start)
            blocks += [blocks_lib.Text(ids[at:start], delimited=False), image]
            at = start + image.length
            assert ids[at - 1] == self.tokenizer.image_end
        return [*blocks, blocks_lib.Text(ids[at:], delimited=False)]

    def shown(self, r):
        """Names of the images in a prompt."""
        return self.settings["prompts"][r]["images"] if self.images else []

    def context(self, rows):
        """Context of the blocks of each row, padded at the end."""
        needs = [context_lib.need(blocks) for blocks in rows]
        return context_lib.pack(
            rows,
            context_lib.Sizes(*(max(sizes) for sizes in zip(*needs))),
            tokenizer=self.tokenizer,
            side=self.config.patches_per_side,
            patch_dim=self.config.patch_dim,
        )

    def prompts(self, end=None):
        """Context of all rows, up to a token."""
        return self.context(
            [self.blocks(self.tensors[f"row{r}.ids"][:end], self.shown(r)) for r in self.rows()]
        )


@pytest.fixture(scope="module", autouse=True)
def precise_and_quickly_compiled():
    """The models are tiny: compiling them takes much longer than running them."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="module")
def case(case_name, pytestconfig):
    if case_name is None:
        pytest.fail("the folder has no case of a known family")
    from safetensors.numpy import load_file

    root = pathlib.Path(pytestconfig.getoption("--hf_goldens")).resolve()
    family, name = case_name.split("/")
    folder, tolerances = root / family / name, json.loads((root / "tolerances.json").read_text())
    config, params = load.load(str(folder / "model"))
    return Case(
        folder=str(folder / "model"),
        config=config,
        params=jax.tree.map(np.asarray, params),
        tensors=load_file(folder / f"{name}.safetensors"),
        settings=json.loads((folder / f"{name}.json").read_text()),
        tolerances={
            key: value.get(family) if key in ("logits", "hidden") else value
            for key, value in tolerances.items()
        },
    )


# --- forward pass --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def forward(params, ids, positions, segment, *, config):
    """(hidden, logits) of sequences that are padded where segment is 0."""
    limit = jnp.broadcast_to(jnp.arange(1, ids.shape[1] + 1), ids.shape)
    x = bagel.embed_tokens(params, ids, config=config)
    inputs = bagel.Embedded(x, positions, masks.Mask(limit, segment, segment))
    hidden = bagel.forward(params, inputs, config=config)[0]
    return hidden, bagel.logits(params, hidden)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hf_forward(case, side):
    """Hidden states and logits of each row, in a padded batch of texts."""
    if case.images:
        pytest.skip("rows have images: test_hf_forward_of_contexts")
    ids, positions, real = (
        case.tensors[f"{side}.{name}"] for name in ("input_ids", "position_ids", "attention_mask")
    )
    found = forward(case.params, ids, positions, real.astype(np.int32), config=case.config)
    hidden, logits = map(np.asarray, found)
    assert len(case.rows()) == len(ids) > 1
    for r in case.rows():
        np.testing.assert_array_equal(ids[r][real[r]], case.tensors[f"row{r}.ids"])
        case.near(hidden[r][real[r]], case.tensors[f"row{r}.hidden"], "hidden", f"row{r}")
        case.near(logits[r][real[r]], case.tensors[f"row{r}.logits"], "logits", f"row{r}")


@functools.partial(jax.jit, static_argnames="config")
def read(params, context, *, config):
    """(hidden, logits) of packed contexts."""
    hidden = bagel.read(params, context, config=config)[0]
    return hidden, bagel.logits(params, hidden)


def test_hf_forward_of_contexts(case):
    """Positions, hidden states and logits of each row, with its images, from packed contexts."""
    context = case.prompts()
    hidden, logits = map(np.asarray, read(case.params, context, config=case.config))
    for r in case.rows():
        ids = case.tensors[f"row{r}.ids"]
        used = slice(len(ids))
        if case.images:
            positions = case.tensors[f"row{r}.position_ids"]
            np.testing.assert_array_equal(context.rope_positions[r, used].T, positions)
            delta = case.settings["prompts"][r]["rope_delta"]
            assert context.next_rope_position[r] == len(ids) + delta
        case.near(hidden[r, used], case.tensors[f"row{r}.hidden"], "hidden", f"row{r}")
        case.near(logits[r, used], case.tensors[f"row{r}.logits"], "logits", f"row{r}")


@functools.partial(jax.jit, static_argnames="config")
def embedded(params, context, *, config):
    x, deep = bagel.embed_deep(params, context, config=config)
    mask = masks.Mask(context.limit, context.segment, context.segment)
    return bagel.Embedded(x, context.rope_positions, mask, deep)


@functools.partial(jax.jit, static_argnames="config")
def decode(params, inputs, *, config):
    return bagel.forward(params, inputs, config=config)[0]


def first_layers(case, count):
    """(config, params) of a decoder with the first layers alone."""
    config = case.config
    if config.vit and config.vit.deepstack:  # at most one for each layer
        vit = dataclasses.replace(config.vit, deepstack=config.vit.deepstack[:count])
        config = dataclasses.replace(config, vit=vit)
    return parity.inputs.first_layers(config, case.params, "llm", count)


def test_hf_layers(case):
    """The residual stream after each layer, compared after the final norm."""
    wanted = case.tensors["row0.layer_out"]
    assert len(wanted) == case.config.llm.num_layers
    context = case.context([case.blocks(case.tensors["row0.ids"], case.shown(0))])
    inputs = embedded(case.params, context, config=case.config)
    for n, residual in enumerate(wanted):
        config, params = first_layers(case, n + 1)
        hidden = decode(params, inputs, config=config)
        if inputs.deep is not None and n < len(inputs.deep.features):
            # the golden residual is that before the features of the images are added
            added = mot.Deep(inputs.deep.features[n:], inputs.deep.positions)
            residual = np.asarray(
                mot._add_features(jnp.asarray(residual[None]), added, jnp.int32(0))
            )[0]
        normed = parity.inputs.normed(residual, case.config, case.params)
        case.near(hidden[0], normed, "layer_out", f"layer {n}")


def test_hf_rope_frequencies(case):
    if "rope_inv_freq" not in case.tensors:
        assert case.images  # of these families the positions of all rows are stored instead
        return
    llm = case.config.llm
    found = attention.rope_frequencies(llm.head_dim, llm.rope_theta, llm.rope_llama3)
    np.testing.assert_allclose(found, case.tensors["rope_inv_freq"], rtol=5e-6)


# --- images --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def encode(params, context, *, config):
    """What the tower and the mergers make of the images of one row, step by step."""
    vit, tower = config.vit, params["vit"]
    patches = qwen_vision.normalize(context.patches, vit)
    kernel = jnp.sum(tower["patch_convolution"], axis=0).reshape(-1, vit.hidden_size)
    steps = {"vit_patch_embed": patches @ kernel + tower.get("patch_bias", 0)}
    if vit.kind == "qwen3_vl":
        steps["pos_embed"] = qwen_vision.resample(tower["position"], context.patch_cells)
    last, taps = bagel._vit(config).apply(
        {"params": tower}, patches, context.patch_cells, context.patch_image
    )
    steps["vit_last_hidden"] = last
    steps["vit_out"], deep = bagel._connector(config).apply(
        {"params": params["connector"]}, last, taps
    )
    for n in range(len(vit.deepstack)):
        steps[f"deepstack{n}"] = deep[n]
    return {name: values[0] for name, values in steps.items()}


def test_hf_images(case):
    """Pixel values, places, windows and features of all images, packed into one row."""
    if not case.images:
        pytest.skip("the family reads text alone")
    vit, blocks = case.config.vit, [*case.images.values()]
    context = case.context([blocks])
    found = encode(case.params, context, config=case.config)
    at = 0
    for name, block in case.images.items():

        def golden(what, name=name):
            return case.tensors[f"img.{name}.{what}"]

        assert [1, *block.grid] == golden("grid_thw").tolist()
        own = slice(at, at + len(block.patches))
        at = own.stop
        np.testing.assert_array_equal(context.patch_cells[0, own, :2], golden("vit_pos_hw"))
        if f"img.{name}.pixel_values" in case.tensors:  # the carried copy lacks them
            values = images.pixel_values(block.patches, vit.mean, vit.std, vit.temporal_patch)
            near = case.tolerances["pixel_values"]["after_the_same_uint8_resize"]
            np.testing.assert_allclose(values, golden("pixel_values"), rtol=0, atol=near)
        if vit.window:
            numbers = qwen_vision.window_numbers(
                context.patch_cells, context.patch_image, vit.window_side
            )[0, own][:: vit.merge**2]
            order = np.argsort(numbers, kind="stable")
            np.testing.assert_array_equal(order, golden("window_index"))
            ends = np.cumsum(np.unique(numbers, return_counts=True)[1]) * vit.merge**2
            np.testing.assert_array_equal(ends, golden("cu_window_seqlens")[1:])
        merged = slice(own.start // vit.merge**2, own.stop // vit.merge**2)
        for what, values in found.items():
            part = merged if what == "vit_out" or what.startswith("deepstack") else own
            tolerance = "deepstack" if what.startswith("deepstack") else what
            case.near(values[part], golden(what), tolerance, f"{name} {what}")


def test_hf_preprocessing(preprocessed, pytestconfig):
    """Bytes of the resized image, grid and pixel values, by their checksums."""
    if preprocessed is None:
        pytest.skip("the folder has no preprocessing")
    folder = pathlib.Path(pytestconfig.getoption("--hf_goldens")) / "preprocess"
    facts = json.loads((folder / "preprocess.json").read_text())
    wanted, (image, family, limits) = facts["results"][preprocessed], preprocessed.split(".")
    processor = facts["processors"][family]
    patch, merge = processor["patch_size"], processor["merge_size"]
    rule = images.SmartResize(patch * merge, *processor["limits"][limits])
    opened = images.open_rgb(folder / "images" / f"{image}.png")
    assert checksum(np.asarray(opened)) == facts["images"][image]["rgb_sha256"]
    pixels = images.resize(opened, rule)
    assert list(pixels.shape[:2]) == wanted["resized_hw"]
    assert checksum(pixels) == wanted["resized_u8_hwc_sha256"]
    block = blocks_lib.image_block(pixels, patch, merge)
    assert [1, *block.grid] == wanted["grid_thw"]
    assert block.length - 2 == wanted["n_image_tokens"]
    values = images.pixel_values(
        block.patches,
        processor["image_mean"],
        processor["image_std"],
        processor["temporal_patch_size"],
    )
    assert list(values.shape) == wanted["pixel_values_shape"]
    assert checksum(values) == wanted["pixel_values_f32_sha256"]


def checksum(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_hf_smart_resize(pytestconfig):
    path = pathlib.Path(pytestconfig.getoption("--hf_goldens")) / "preprocess" / "preprocess.json"
    if not path.is_file():
        pytest.skip("the folder has no preprocessing")
    rows = json.loads(path.read_text())["smart_resize"]["rows"]
    assert len(rows) > 20
    for height, width, stride, smallest, largest, wanted in rows:
        rule = images.SmartResize(stride, smallest, largest)
        if wanted is None:
            with pytest.raises(ValueError, match="more than 200 times"):
                rule(width, height)
        else:
            assert rule(width, height) == (wanted[1], wanted[0]), (height, width, stride)


# --- losses and gradients ------------------------------------------------------------------------


def by_name(case, params):
    """Parameters, or gradients of them, under the names of their tensors in the folder."""
    named = {}
    for path, leaf in params_lib.flatten(params).items():
        key = families.key(case.config, path)
        layers = leaf if key.stacked else [leaf]
        for name, layer in zip(key.names(leaf.shape), layers, strict=True):
            named[name] = key.to_release(np.asarray(layer))
    return named


def check_gradient(case, loss, grads):
    """Whole tensors, chosen elements, and norms of all tensors."""
    settings, total = case.settings[loss], case.settings[loss]["total_grad_norm"]
    found, rule, seen = by_name(case, grads), case.tolerances["grad_elements"], set()
    assert found.keys() == settings["grad_norms"].keys()
    for name, gradient in found.items():
        at, values = gradient.ravel(), case.tensors.get(f"{loss}.grad.{name}")
        if values is None:
            at = at[case.tensors[f"{loss}.gidx.{name}"]]
            values = case.tensors[f"{loss}.gval.{name}"]
        else:
            assert values.shape == gradient.shape
            seen.add(name)
        np.testing.assert_allclose(
            at,
            values.ravel(),
            rtol=rule["rel"],
            atol=rule["abs_of_total"] * total,
            err_msg=f"{loss} {name}",
        )
    assert seen == set(settings["whole"])
    norms = {name: np.linalg.norm(gradient.astype(np.float64)) for name, gradient in found.items()}
    rule = case.tolerances["grad_norms"]
    for name, norm in norms.items():
        assert norm == pytest.approx(
            settings["grad_norms"][name], rel=rule["rel"], abs=rule["abs_of_total"] * total
        ), name
    assert np.linalg.norm([*norms.values()]) == pytest.approx(total, rel=rule["rel"])


@functools.partial(jax.jit, static_argnames="config")
@functools.partial(jax.value_and_grad, has_aux=True)
def cross_entropy(params, context, labels, *, config):
    hidden = bagel.read(params, context, config=config)[0]
    counts = labels >= 0
    values, _ = divergence.chunked_cross_entropy(
        hidden, bagel.head(params), jnp.maximum(labels, 0), chunk=5
    )
    values = jnp.where(counts, values, 0)
    return jnp.sum(values) / jnp.sum(counts), values


@pytest.mark.slow
def test_hf_cross_entropy(case):
    context = case.prompts()
    labels = np.full(context.tokens.shape, -100, np.int32)
    for r in case.rows():
        labels[r, : context.length[r]] = case.tensors[f"row{r}.labels"]
    (loss, values), grads = cross_entropy(case.params, context, labels, config=case.config)
    for r in case.rows():
        own = values[r, : context.length[r]]
        case.near(own, case.tensors[f"row{r}.ce"], "ce_per_row", f"row{r}")
    assert (labels >= 0).sum() == case.settings["ce"]["n_labels"]
    case.near(loss, case.settings["ce"]["loss"], "losses", "loss")
    check_gradient(case, "ce", grads)


def padded(rows):
    """Rows of unlike lengths as an array, 0 at their ends."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row))) for row in rows]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
@functools.partial(jax.jacrev, has_aux=True)
def divergences(params, student, teacher, *, config):
    """The mean divergence of each kind; with its gradient (losses, values [B, N], both logits).

    student, teacher: (context, completion).
    """
    sides = [
        distill.score(params, *student, config=config),
        distill.score(jax.lax.stop_gradient(params), *teacher, config=config),
    ]
    head, completion = bagel.head(params), student[1]
    losses, values = {}, {}
    for kind, beta in BETAS.items():
        setting = DivergenceConfig(beta=beta, top_k=0, clip=0.0, chunk=3)
        found, _, _ = divergence.chunked(sides[0], head, sides[1], head, completion.labels, setting)
        values[kind] = jnp.where(completion.mask, found, 0)
        losses[kind] = jnp.sum(values[kind]) / jnp.sum(completion.mask)
    return losses, (losses, values, [bagel.logits(params, hidden) for hidden in sides])


def side_of(case, role, rows):
    """(context, completion) of a role.

    The context is without its last token, which takes the place of bos, the token before a
    completion.
    """
    ids, index = (
        [case.tensors[f"distill.row{r}.{role}_{name}"] for r in rows] for name in ("ids", "index")
    )
    names = [row.get(f"{role}_images", ()) for row in case.settings["distill"]["rows"]]
    context = case.context(
        [case.blocks(own[: at[0]], shown) for own, at, shown in zip(ids, index, names)]
    )
    for r, at in zip(rows, index):
        if case.images:
            name = f"distill.row{r}.{role}_position_ids"
            positions = context.rope_positions[r, : at[0]].T
            np.testing.assert_array_equal(positions, case.tensors[name][:, : at[0]])
            assert (case.tensors[name][:, at[0]] == context.next_rope_position[r]).all()
    tokens, labels = (padded([own[at + shift] for own, at in zip(ids, index)]) for shift in (0, 1))
    counts = np.array([len(at) for at in index])
    mask = np.arange(tokens.shape[1]) < counts[:, None]
    return context, context_lib.Completion(tokens, labels, mask)


@pytest.mark.slow
def test_hf_distillation(case):
    """Divergences of the completion after both prompts, from our contexts and divergence code."""
    rows = case.rows("distill.row{}.student_ids")
    student, teacher = (side_of(case, role, rows) for role in ("student", "teacher"))
    np.testing.assert_array_equal(student[1].labels, teacher[1].labels)
    counts = student[1].mask.sum(axis=1)
    wanted = [row["completion_len"] for row in case.settings["distill"]["rows"]]
    assert counts.tolist() == wanted and counts.sum() == case.settings["distill"]["n_tokens"]
    grads, (losses, values, logits) = divergences(case.params, student, teacher, config=case.config)
    for r in rows:
        name, n = f"distill.row{r}", counts[r]
        case.near(logits[0][r, :n], case.tensors[f"{name}.student_logits"], "logits", name)
        case.near(logits[1][r, :n], case.tensors[f"{name}.teacher_logits"], "logits", name)
        for kind in BETAS:
            tolerance = "jsd_per_token" if kind == "jsd" else "fkl_rkl_per_token"
            case.near(values[kind][r, :n], case.tensors[f"{name}.{kind}"], tolerance, name)
    for kind in BETAS:
        case.near(losses[kind], case.settings[f"distill_{kind}"]["loss"], "losses", kind)
        check_gradient(case, f"distill_{kind}", grads[kind])


# --- decoding ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def sample(params, context, first, *, config):
    """`rollout.sample` with another first token for each row, in the place of bos."""
    config = dataclasses.replace(config, bos=first)
    return rollout.sample.__wrapped__(
        params, context, jax.random.key(0), config=config, return_logits=True
    )


@pytest.mark.parametrize("ends", [False, True])
def test_hf_greedy(case, ends):
    """Our sampler with its cache on a padded batch, without end tokens and with all of them."""
    named = tokenizer.end_tokens(case.folder, case.config.llm.vocab_size)
    assert [*named] == case.settings["greedy_eos"]["eos_token_ids"]
    rows, count = case.rows(), case.settings["greedy"]["max_new_tokens"]
    size = case.config.llm.vocab_size
    config = rollout.RolloutConfig(
        model=case.config,
        bos=0,
        eos=named[0] if ends else -1,
        further_ends=named[1:] if ends else (),
        marker=rollout.Marker.build([], size),
        max_new_tokens=count + 1,
        greedy=True,
        max_image_skips=0,
    )
    first = np.array([case.tensors[f"row{r}.ids"][-1] for r in rows])
    found, logits = sample(case.params, case.prompts(-1), first, config=config)
    for r in rows:
        tokens = case.tensors[f"row{r}.greedy_{'eos_' * ends}tokens"].tolist()
        stopped = ends and tokens[-1] in named
        if stopped:
            tokens.pop()
        assert (found.stop[r] == rollout.STOP_EOS) == stopped
        assert found.tokens[r][found.mask[r]].tolist() == tokens
        steps = len(tokens) + stopped
        wanted = case.tensors[f"row{r}.greedy_logits"][:steps]
        case.near(logits[r, :steps], wanted, "logits", f"row{r}")


# --- folders -------------------------------------------------------------------------------------


def tensors_of(folder):
    """{name: (dtype, shape, bytes)} of all tensors in a folder."""
    found, _ = safetensors_io.open_weights(str(folder))
    return {
        name: (tensor.dtype, tensor.shape, safetensors_io.read(tensor).tobytes())
        for name, tensor in found.items()
    }


def test_hf_folder_round_trip(case, tmp_path):
    """Import and export give every tensor bit by bit and the same config files; shards the same."""
    imported, exported, cut = (str(tmp_path / name) for name in ("imported", "exported", "cut"))
    importing.import_release(case.folder, imported)
    export.export_release(imported, exported)
    wanted = tensors_of(case.folder)
    assert tensors_of(exported) == wanted
    assert wanted.keys() == {*case.settings["tensors_in_file"]}
    for name in (*folders.config_files(case.config), "generation_config.json"):
        there, back = (pathlib.Path(folder) / name for folder in (case.folder, exported))
        assert back.is_file() == there.is_file()
        assert not there.is_file() or back.read_bytes() == there.read_bytes()
    assert load.load(imported)[0] == case.config

    size = sum(len(values) for _, _, values in wanted.values())
    export.export_release(imported, cut, max_shard_gb=size / 2e9)
    assert (pathlib.Path(cut) / "model.safetensors.index.json").is_file()
    assert tensors_of(cut) == wanted


def test_hf_config_is_written_as_it_is_read(case, tmp_path):
    """The config.json of a run that has no released folder."""
    for name, content in folders.config_contents(case.config, "float32").items():
        json_files.write(str(tmp_path / name), content)
    assert folders.read_config(str(tmp_path)) == case.config
    assert folders.compute_dtype(str(tmp_path)) == "float32"


def test_hf_other_families(other_case):
    """A folder of a family without an implementation is an error here."""
    if other_case is None:
        return
    family = other_case.split("/")[0]
    assert family in OTHERS, f"{other_case}: no test replays the family {family}"
