"""A small tokenizer for the procedural tasks: one token per word, and any other text byte by byte.

It is byte-level BPE without merges. A pre-token (a tag, or a word with at most one space before it)
that is in the vocabulary is one token. Anything else falls back to its bytes, so every text is
decoded exactly.

    <think>start c11</think>   ->   <think> | start | " c11" | </think>

Ids: 0-255 for bytes, then the tags, then the words without and with a space before them, then the
special tokens.
"""

import os
import pathlib
import tempfile
from collections.abc import Iterable

from opsd_jax.tasks import FAMILIES

TAGS = ("<think>", "</think>", "<image_start>", "<image_end>", "<answer>", "</answer>")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
)

# Texts before and after the visual thoughts in the teacher's context, where the released prompts
# have whole sentences.
INTRO = "reference"
TRANSITION = "now answer"

_PRE_TOKENS = r"</?(?:think|answer)>|<image_(?:start|end)>| ?[A-Za-z]+[0-9]*"


def words(families: Iterable[str] = tuple(FAMILIES)) -> list[str]:
    """The words of the families' texts and of the prompts, each once, in a fixed order."""
    texts = [word for family in families for word in FAMILIES[family].WORDS]
    return list(dict.fromkeys(texts + INTRO.split() + TRANSITION.split()))


def build_tokenizer(
    directory: str | os.PathLike,
    families: Iterable[str] = tuple(FAMILIES),
    *,
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face tokenizer folder that `AutoTokenizer.from_pretrained(directory)` loads.

    The same families give the same bytes. The padding token is <|endoftext|>, and <|im_end|> ends a
    sequence.

    Raises FileExistsError if the folder holds a tokenizer and `overwrite` is false.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # Otherwise transformers warns about missing PyTorch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import PreTrainedTokenizerFast

    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").exists() and not overwrite:
        raise FileExistsError(
            f"{directory} holds a tokenizer; choose another folder or pass overwrite=True"
        )

    # The byte-level alphabet writes a space as "Ġ"; the other characters of the words are
    # unchanged.
    spelled = [form for word in words(families) for form in (word, "Ġ" + word)]
    entries = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *TAGS, *spelled])
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp-") as unfinished:
        fast.save_pretrained(unfinished)
        for path in sorted(pathlib.Path(unfinished).iterdir(), reverse=True):  # tokenizer.json last
            os.replace(path, directory / path.name)
