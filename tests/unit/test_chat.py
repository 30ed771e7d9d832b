"""Contexts in chat form: texts and tokens are those of transformers, contents are blocks."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import chat_template, config_check, context
from opsd_jax import config as config_lib
from opsd_jax import tokenizer as tokenizer_lib
from opsd_jax.blocks import Image, Prompts, Text
from opsd_jax.chat import TEMPLATE
from opsd_jax.chat_template import IMAGE_TEXT, ChatTemplate, Slot

TEMPLATES = pathlib.Path(__file__).parents[1] / "goldens_hf" / "tokenizer"
FAMILIES = ("qwen2_5", "qwen3", "qwen2_5_vl", "qwen3_vl", "smollm2")
# As Llama 3's: no <|im_start|>, bos by name, contents are stripped.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|tail|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}"
)
LLAMA_TOKENS = ("<|begin|>", "<|end|>", "<|head|>", "<|tail|>", "<|eot|>")
QWEN_TOKENS = (*tokenizer_lib.DELIMITERS.values(), "<|image_pad|>", "<|endoftext|>")
NAMES = blocks_lib.BlockNames(
    ("system", "image", "question"),
    ("system", "image", "question", "intro", "text:solution", "transition"),
)
PROMPTS = Prompts(system="Be brief.", intro="Read it:", transition="Now answer.", form="chat")


def template_of(family):
    return (TEMPLATES / f"{family}.jinja").read_text()


def write_folder(folder, template, special=QWEN_TOKENS, ends=None, **config):
    """A tokenizer folder with merges across words and lines, as Qwen's has them."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(tokenizer_lib._SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    text = "What is it?\n\nRead it:\n\nIt is a cat.\n\nNow answer. user\nsystem\nassistant\n" * 3
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """{family: tokenizer in chat form}."""
    folder = tmp_path_factory.mktemp("templates")
    return {
        family: tokenizer_lib.load(
            write_folder(folder / family, template_of(family)), form="chat", thinking=False
        )
        for family in FAMILIES
    }


def image(value=1.0):
    return Image(np.full((16, 12), value, np.float32), (4, 4), 2)


def ids_of(tokenizer, text):
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def content(tokenizer, question="What is it?", solution="It is a cat.", images=()):
    return {
        "question": blocks_lib.question_ids(tokenizer, question),
        "text:solution": tokenizer.encode(solution),
        "image": images,
    }


def whole(tokenizer, named):
    """The ids of a context and of the token after it; images as transformers writes them."""
    parts = [
        ids_of(tokenizer, IMAGE_TEXT) if isinstance(block, Image) else block.ids
        for _, block in named
    ]
    return np.concatenate([*parts, [tokenizer.bos]]).tolist()


# --- the templates -------------------------------------------------------------------------------


def prompts(pytestconfig):
    folder = pathlib.Path(pytestconfig.getoption("--hf_goldens")) / "tokenizer"
    if not (folder / "chat_prompts.json").is_file():
        pytest.skip("the folder has no conversations")
    return json.loads((folder / "chat_prompts.json").read_text())


def test_templates_are_those_of_the_recorded_prompts(pytestconfig):
    recorded = prompts(pytestconfig)["template_sha256"]
    for family in FAMILIES:
        data = (TEMPLATES / f"{family}.jinja").read_bytes()
        assert hashlib.sha256(data).hexdigest() == recorded[family], family


def test_conversations_are_rendered_as_by_transformers(pytestconfig):
    cases = [p for p in prompts(pytestconfig)["prompts"] if p["template"] in FAMILIES]
    assert len(cases) >= 60
    for case in cases:
        template = ChatTemplate(template_of(case["template"]), "", thinking=True)
        found = template.render(
            case["messages"], add_generation_prompt=case["add_generation_prompt"], **case["kwargs"]
        )
        assert found == case["prompt"]


def test_layouts_with_their_contents_are_the_recorded_prompts(pytestconfig):
    """Of every conversation up to a first answer, split at its contents and joined again."""
    count = 0
    for case in prompts(pytestconfig)["prompts"]:
        *system, user = case["messages"]
        if user["role"] != "user" or [m["role"] for m in system] not in ([], ["system"]):
            continue
        if not case["add_generation_prompt"] or case["kwargs"].get("add_vision_id"):
            continue
        if case["template"] not in FAMILIES:
            continue
        parts = user["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        thinking = case["kwargs"].get("enable_thinking", True)
        template = ChatTemplate(template_of(case["template"]), "", thinking=thinking)
        layout = template.layout(system=bool(system), kinds=tuple(p["type"] for p in parts))
        texts = {-1: system[0]["content"] if system else ""}
        texts |= {n: part.get("text", IMAGE_TEXT) for n, part in enumerate(parts)}
        said = [p.stripped(texts[p.part]) if isinstance(p, Slot) else p for p in layout]
        assert "".join(said) == case["prompt"]
        count += 1
    assert count >= 12


def test_thinking_decides_on_an_empty_think_block():
    by_thinking = {
        thinking: ChatTemplate(template_of("qwen3"), "", thinking=thinking).layout(
            system=False, kinds=("text",)
        )[-1]
        for thinking in (True, False)
    }
    assert by_thinking[True] == "<|im_end|>\n<|im_start|>assistant\n"
    assert by_thinking[False] == by_thinking[True] + "<think>\n\n</think>\n\n"


def test_a_template_whose_date_is_todays_gets_a_fixed_one():
    text = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}"
    text += "{% endif %}"
    template = ChatTemplate(text + "{{ date_string }} {{ messages[0]['content'] }}>", "")
    assert template.layout(system=False, kinds=("text",)) == ("26 Jul 2024 ", Slot(0), ">")


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        ("{{ messages[0]['role'] }}:", ("text",), "the text of the user's turn once .* drops it"),
        ("{{ messages[0]['content'] * 2 }}", ("text",), "the text of the user's turn .* 2 times"),
        (template_of("qwen3"), ("image", "text"), "drops it"),
        (template_of("qwen2_5"), ("image", "text"), "cannot be rendered"),
        ("{% if %}", ("text",), "cannot be rendered"),
        (
            "{% for p in messages[0]['content'] %}{{ p['text'] }}<|vision_start|><|image_pad|>"
            "<|vision_end|>{% endfor %}",
            ("image", "text"),
            "each content once and in its place, and writes it 3 times",
        ),
    ],
)
def test_templates_that_lose_contents_are_refused(text, kinds, message):
    with pytest.raises(ValueError, match=f"FILE .*{message}"):
        ChatTemplate(text, "FILE").layout(system=False, kinds=kinds)


# --- the folder ----------------------------------------------------------------------------------


def test_a_folder_without_a_template_is_refused(tmp_path):
    folder = write_folder(tmp_path / "plain", "")
    with pytest.raises(ValueError, match="no chat template.*copy chat_template.jinja"):
        tokenizer_lib.load(folder, form="chat")
    assert tokenizer_lib.load(folder).chat is None


def test_thinking_of_a_template_without_it_is_refused(tmp_path):
    folder = write_folder(tmp_path / "plain", template_of("qwen2_5"))
    with pytest.raises(ValueError, match="config.prompts.thinking is True.*no thinking mode"):
        tokenizer_lib.load(folder, form="chat", thinking=True)
    thoughtful = write_folder(tmp_path / "thoughtful", template_of("qwen3"))
    assert tokenizer_lib.load(thoughtful, form="chat", thinking=True).chat.thinking


def test_where_the_template_is_read(tmp_path):
    """A processor's file counts before the tokenizer's, and a list has a default."""
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    folder = write_folder(tmp_path / "f", "", chat_template=listed)
    assert chat_template.is_there(folder)
    assert chat_template.read(folder).text == "y"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "z"}))
    assert chat_template.read(folder).text == "z"
    (folder / "chat_template.jinja").write_text("w")
    assert chat_template.read(folder).text == "w"


def test_ends_are_those_of_the_template_and_of_the_folder(tmp_path):
    """<|im_end|>, which the template writes, although the folder's first end is another."""
    plain = tokenizer_lib.load(write_folder(tmp_path / "f", template_of("qwen2_5")))
    other = plain.backend.token_to_id("<|endoftext|>")
    folder = write_folder(tmp_path / "f", template_of("qwen2_5"), ends=[other, plain.eos])
    found = tokenizer_lib.load(folder, form="chat")
    assert found.eos == found.backend.token_to_id("<|im_end|>")
    assert found.further_ends == (other,)
    assert found.decode([found.bos]) == "\n"
    assert found.digest == plain.digest


def test_a_tokenizer_without_im_start_is_accepted_in_chat_form_alone(tmp_path):
    folder = write_folder(
        tmp_path / "llama", LLAMA, LLAMA_TOKENS, bos_token="<|begin|>", eos_token="<|end|>"
    )
    with pytest.raises(ValueError, match="lacks .*im_start.* or config.prompts.form='chat'"):
        tokenizer_lib.load(folder, images=False)
    found = tokenizer_lib.load(folder, images=False, form="chat")
    assert found.decode([found.eos]) == "<|eot|>"
    assert found.decode([found.bos]) == "\n\n"
    assert found.digest == tokenizer_lib.load(folder, images=False, form="").digest
    own = content(found, question="\n What is it? \n")
    named = blocks_lib.named_blocks(found, PROMPTS, ("system", "question"), own)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\n What is it? \n"},
    ]
    text = found.chat.render(messages)
    assert text.startswith("<|begin|><|head|>system<|tail|>\n\nBe brief.<|eot|>")
    assert whole(found, named) == ids_of(found, text)


def test_a_template_without_an_end_is_refused(tmp_path):
    text = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}answer:"
    with pytest.raises(ValueError, match="a completion would not end"):
        tokenizer_lib.load(write_folder(tmp_path / "f", text), form="chat")


# --- contexts ------------------------------------------------------------------------------------


def test_tokens_of_a_context_by_hand(qwen):
    """Names, tokens and lengths of a teacher's context."""
    tok = qwen["qwen2_5"]
    named = blocks_lib.named_blocks(
        tok, PROMPTS, ("system", "question", "intro", "text:solution"), content(tok)
    )
    texts = [(name, tok.decode(block.ids)) for name, block in named]
    assert texts == [
        (TEMPLATE, "<|im_start|>system\n"),
        ("system", "Be brief."),
        (TEMPLATE, "<|im_end|>\n<|im_start|>user\n"),
        ("question", "What is it?\n\n"),  # "?" and the line ends are one token
        ("intro", "Read it:\n\n"),
        ("text:solution", "It is a cat."),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant"),
    ]
    assert tok.decode([named[3][1].ids[-1]]) == "?\n\n"
    packed = context.pack(
        [[b for _, b in named]], context.Sizes(100, 0), tokenizer=tok, side=1, patch_dim=12
    )
    length = sum(len(block.ids) for _, block in named)
    assert packed.length[0] == packed.next_rope_position[0] == length
    assert packed.tokens[0, :length].tolist() == [n for _, b in named for n in b.ids.tolist()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_tokens_are_those_of_the_rendered_conversation(qwen, family, system):
    """Of both roles, with blanks at the ends of contents, which merge with the template's."""
    tok, own = qwen[family], dataclasses.replace(PROMPTS, system=system)
    for question in ("What is it?", "\n  Two\n\n", "0 + 1 = ?\n"):
        given = content(tok, question)
        student = blocks_lib.named_blocks(tok, own, ("system", "question"), given)
        names = ("system", "question", "intro", "text:solution", "transition")
        teacher = blocks_lib.named_blocks(tok, own, names, given)
        joined = "\n\n".join([question, "Read it:", "It is a cat.", "Now answer."])
        for named, text in ((student, question), (teacher, joined)):
            messages = [{"role": "system", "content": system}] if system else []
            rendered = tok.chat.render([*messages, {"role": "user", "content": text}])
            assert whole(tok, named) == ids_of(tok, rendered)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_are_where_the_turn_has_them(qwen, family):
    """In places of the question, with rope positions of three dimensions around them."""
    tok, shown = qwen[family], (image(1.0), image(-1.0))
    given = content(tok, "Is <image> like <image>?", images=shown)
    named = blocks_lib.named_blocks(tok, PROMPTS, NAMES.teacher, given)
    assert [block for _, block in named if isinstance(block, Image)] == list(shown)
    assert [n for n, b in named if n in ("image", "question")] == [
        "question", "image", "question", "image", "question",
    ]  # fmt: skip
    parts = [
        {"type": "text", "text": "Is"},
        {"type": "image"},
        {"type": "text", "text": "like"},
        {"type": "image"},
        {"type": "text", "text": "?\n\nRead it:\n\nIt is a cat.\n\nNow answer."},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert whole(tok, named) == ids_of(tok, tok.chat.render(messages))
    packed = context.pack([[b for _, b in named]], context.Sizes(120, 32), tokenizer=tok, side=0)
    start = packed.tokens[0].tolist().index(tok.image_start)
    at = start + 1 + np.arange(4)  # four merge blocks
    relative = packed.rope_positions[0, at] - packed.rope_positions[0, start]
    assert relative.tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2]]
    assert packed.tokens[0, start + 5] == tok.image_end


def test_a_completion_follows_the_last_token_of_the_template(qwen):
    """Of a trace: "\\n" predicts its first token, and its last one <|im_end|>."""
    tok = qwen["smollm2"]
    asked = blocks_lib.named_blocks(tok, PROMPTS, ("system", "question"), content(tok))
    answer = Text(tok.encode("a cat"), loss=True)
    found = context.supervise(
        [[*(b for _, b in asked), answer]],
        context.Sizes(100, 0, 20),
        tokenizer=tok,
        side=1,
        patch_dim=12,
    )
    rendered = tok.chat.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "a cat"},
        ],
        add_generation_prompt=False,
    )
    length = found.context.length[0]
    assert found.context.tokens[0, :length].tolist() == ids_of(tok, rendered.removesuffix("\n"))
    labels = found.labels[0][found.mask[0]]
    assert tok.decode(labels) == "a cat<|im_end|>"
    before = found.context.tokens[0, found.positions[0][found.mask[0]]]
    assert tok.decode(before) == "\na cat"


def test_noise_takes_the_place_of_as_many_tokens(qwen):
    """Also where the text's last token has merged with the line ends after it."""
    tok, given = qwen["qwen3"], content(qwen["qwen3"], images=(image(),))
    rng = np.random.default_rng(0)
    names = ("question", "text:solution", "intro")
    noise = blocks_lib.replace_privileged(
        "noise", ("text:solution",), given, {}, rng, tok.ordinary, noised=True
    )
    true, false = (blocks_lib.named_blocks(tok, PROMPTS, names, c) for c in (given, noise))
    assert [(n, len(b.ids)) for n, b in true] == [(n, len(b.ids)) for n, b in false]
    for (name, a), (_, b) in zip(true, false):
        assert (name == "text:solution") != np.array_equal(a.ids, b.ids)
        if name == "text:solution":
            assert set(b.ids) <= set(tok.ordinary.tolist())


def test_a_suffix_is_encoded_with_the_question(qwen):
    tok = qwen["qwen3"]
    ids = blocks_lib.question_ids(tok, "What is it?", "\n\nNow answer.")
    assert ids.tolist() == ids_of(tok, "What is it?\n\nNow answer.")
    plain = dataclasses.replace(tok, chat=None)
    apart = blocks_lib.question_ids(plain, "What is it?", "\n\nNow answer.")
    assert apart.tolist() != ids.tolist()


def test_a_tokenizer_without_its_template_is_refused(qwen):
    plain = dataclasses.replace(qwen["qwen3"], chat=None)
    with pytest.raises(ValueError, match="load it with form='chat'"):
        blocks_lib.named_blocks(plain, PROMPTS, ("question",), content(plain))


def test_noise_of_images_keeps_their_merge_blocks():
    given = {"image": (image(),), "images:crops": (image(),)}
    noise = blocks_lib.replace_privileged(
        "noise", ("images:crops",), given, {}, np.random.default_rng(0)
    )
    assert noise["images:crops"][0].length == image().length


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__max_image_skips": 1}, "max_image_skips is 1: set it to 0"),
        ({"eval__final_banned": True}, "final_banned is True: set it to False"),
        (
            {"stages": ("warmup",), "warmup__mix__interleaved": 2},
            "config.warmup.mix.interleaved is 2: set it to 0",
        ),
        ({"prompts__form": "bagel", "prompts__thinking": True}, "'bagel', which has no thinking"),
        ({"prompts__form": "chatml"}, "form is 'chatml'"),
    ],
)
def test_settings_that_need_the_marker_are_refused(changes, message):
    usual = {"prompts__form": "chat", "rollout__max_image_skips": 0, "stages": ("opsd",)}
    usual["eval__final_banned"] = False
    config_check.check(small_run.config(**usual))
    with pytest.raises(ValueError, match=message):
        config_check.check(small_run.config(**usual | changes))


def test_bagel_is_the_default_and_its_blocks_are_delimited():
    assert config_lib.prompts(config_lib.default()) == Prompts()
    blocks = blocks_lib.student(tiny.TOKENIZER, Prompts(), "a", image())
    assert all(block.delimited for block in blocks if isinstance(block, Text))
