"""Replays of golden data of transformers' models: Qwen2, Qwen3 and Llama decoders.

`--hf_goldens=DIR` takes any sizes and seeds: a case is a folder FAMILY/CASE with the model's folder
as transformers writes it and the inputs and results, see the goldens' README. Tolerances are those
of tolerances.json.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity.inputs
from opsd_jax import context as context_lib
from opsd_jax import distill, divergence, rollout, tokenizer
from opsd_jax import params as params_lib
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.inputs import json_files
from opsd_jax.model import attention, bagel, masks
from opsd_jax.release import (
    decoder_configs,
    export,
    families,
    importing,
    load,
    safetensors_io,
)

# What a folder of goldens has beside families; each has its own tests.
OTHERS = ("preprocess", "tokenizer", "real_smollm2")
# Families that have goldens, and no implementation yet.
NOT_YET = ("qwen2_5_vl", "qwen3_vl")
BETAS = {"jsd": 0.5, "fkl": 0.0, "rkl": 1.0}


def cases(root: pathlib.Path, *, known: bool) -> list[str]:
    """FAMILY/CASE of the cases of known or of all other families, from the names of folders."""
    return sorted(
        f"{path.parent.parent.name}/{path.parent.name}"
        for path in root.glob("*/*/model")
        if (path.parent.parent.name in families.DECODERS) == known
    )


def pytest_generate_tests(metafunc):
    root = pathlib.Path(metafunc.config.getoption("--hf_goldens"))
    for argument, known in (("case_name", True), ("other_case", False)):
        if argument in metafunc.fixturenames:
            names = cases(root, known=known)
            metafunc.parametrize(argument, names or [None], ids=names or ["none"], scope="module")


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
    """Hidden states and logits of each row, in a padded batch."""
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


def test_hf_layers(case):
    """The residual stream after each layer, compared after the final norm."""
    wanted = case.tensors["row0.layer_out"]
    assert len(wanted) == case.config.llm.num_layers
    ids = case.tensors["row0.ids"][None]
    positions, segment = np.arange(ids.shape[1], dtype=np.int32)[None], np.ones_like(ids)
    for n, residual in enumerate(wanted):
        config, params = parity.inputs.first_layers(case.config, case.params, "llm", n + 1)
        hidden, _ = forward(params, ids, positions, segment, config=config)
        normed = parity.inputs.normed(residual, case.config, case.params)
        case.near(hidden[0], normed, "layer_out", f"layer {n}")


def test_hf_rope_frequencies(case):
    llm = case.config.llm
    found = attention.rope_frequencies(llm.head_dim, llm.rope_theta, llm.rope_llama3)
    np.testing.assert_allclose(found, case.tensors["rope_inv_freq"], rtol=5e-6)


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
def cross_entropy(params, ids, positions, segment, labels, *, config):
    hidden, _ = forward(params, ids, positions, segment, config=config)
    counts = labels >= 0
    values, _ = divergence.chunked_cross_entropy(
        hidden, bagel.head(params), jnp.maximum(labels, 0), chunk=5
    )
    values = jnp.where(counts, values, 0)
    return jnp.sum(values) / jnp.sum(counts), values


def test_hf_cross_entropy(case):
    ids, positions, real = (
        case.tensors[f"right.{name}"] for name in ("input_ids", "position_ids", "attention_mask")
    )
    labels = np.full_like(ids, -100)
    for r in case.rows():
        labels[r][real[r]] = case.tensors[f"row{r}.labels"]
    (loss, values), grads = cross_entropy(
        case.params, ids, positions, real.astype(np.int32), labels, config=case.config
    )
    for r in case.rows():
        case.near(values[r][real[r]], case.tensors[f"row{r}.ce"], "ce_per_row", f"row{r}")
    assert (labels >= 0).sum() == case.settings["ce"]["n_labels"]
    case.near(loss, case.settings["ce"]["loss"], "losses", "loss")
    check_gradient(case, "ce", grads)


def padded(rows):
    """Rows of unlike lengths as an array, 0 at their ends."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row))) for row in rows]).astype(np.int32)


def context_of(rows):
    """Context of the token ids of each row, one text without delimiters."""
    tokens, lengths = padded(rows), np.array([*map(len, rows)], np.int32)
    index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    used = (index < lengths[:, None]).astype(np.int32)
    none = np.zeros((len(tokens), 0), np.int32)
    return context_lib.Context(
        tokens=tokens,
        rope_positions=index * used,
        limit=(index + 1) * used,
        segment=used,
        patches=np.zeros((len(tokens), 0, 1), np.uint8),
        patch_table_ids=none,
        patch_image=none,
        patch_positions=none,
        length=lengths,
        next_rope_position=lengths,
    )


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
    context = context_of([own[: at[0]] for own, at in zip(ids, index)])
    tokens, labels = (padded([own[at + shift] for own, at in zip(ids, index)]) for shift in (0, 1))
    counts = np.array([len(at) for at in index])
    mask = np.arange(tokens.shape[1]) < counts[:, None]
    return context, context_lib.Completion(tokens, labels, mask)


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
    prompts = [case.tensors[f"row{r}.ids"] for r in rows]
    first = np.array([ids[-1] for ids in prompts])
    found, logits = sample(
        case.params, context_of([ids[:-1] for ids in prompts]), first, config=config
    )
    for r in rows:
        tokens = case.tensors[f"row{r}.greedy_{'eos_' * ends}tokens"].tolist()
        stopped = ends and case.settings["greedy_eos"]["stopped"][r]
        if stopped:
            assert tokens.pop() in named
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
    for name in ("config.json", "generation_config.json"):
        there, back = (pathlib.Path(folder) / name for folder in (case.folder, exported))
        assert back.read_bytes() == there.read_bytes()
    assert load.load(imported)[0] == case.config

    size = sum(len(values) for _, _, values in wanted.values())
    export.export_release(imported, cut, max_shard_gb=size / 2e9)
    assert (pathlib.Path(cut) / "model.safetensors.index.json").is_file()
    assert tensors_of(cut) == wanted


def test_hf_config_is_written_as_it_is_read(case, tmp_path):
    """The config.json of a run that has no released folder."""
    for name, content in decoder_configs.contents(case.config, "float32").items():
        json_files.write(str(tmp_path / name), content)
    assert decoder_configs.read(str(tmp_path)) == case.config
    assert decoder_configs.compute_dtype(str(tmp_path)) == "float32"


def test_hf_other_families(other_case):
    """A folder of a family without an implementation is an error here, unless it is known."""
    if other_case is None:
        return
    family = other_case.split("/")[0]
    if family in NOT_YET:
        pytest.skip(f"the family {family} is not implemented yet")
    assert family in OTHERS, f"{other_case}: no test replays the family {family}"
