"""What transformers makes of a model's files is the yardstick."""

import json
import random

import pytest
from transformers import AutoTokenizer

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.gateway.chat import ChatMessage
from pageframe.gateway.tokenizer import TextCodec
from unit.gateway import tiny_tokenizers
from unit.gateway.tiny_tokenizers import SAMPLES

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {%- if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "[{{ message.role }}] {{ message.content | trim }}\n"
    "    {% if loop.last %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% generation %}{{ {'ü': 1} | tojson }}{% endgeneration %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = [ChatMessage("system", " be brief "), ChatMessage("user", "hi <b>\n")]
CHAT_DICTS = [{"role": item.role, "content": item.content} for item in CHAT]


def _edit_config(folder, **entries):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | entries))


def test_encode_equals_transformers(tokenizer_folder):
    codec = TextCodec.load(tokenizer_folder)
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in SAMPLES:
        assert codec.encode(text) == reference(text)["input_ids"], text
        assert codec.encode_released(text) == reference(text)["input_ids"], text


def test_decode_equals_transformers(tokenizer_folder):
    codec = TextCodec.load(tokenizer_folder)
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(len(reference)) for _ in range(12)]
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip)
            assert codec.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("place", ["file", "config", "list"])
def test_chat_equals_transformers_wherever_the_template_is(tmp_path, place):
    folder = tiny_tokenizers.byte_level(tmp_path)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    elif place == "config":
        _edit_config(folder, chat_template=TEMPLATE)
    else:
        named = [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": TEMPLATE},
        ]
        _edit_config(folder, chat_template=named)
    codec = TextCodec.load(folder)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT_DICTS, add_generation_prompt=True, return_dict=False
    )
    assert codec.encode_chat(CHAT) == expected
    assert '{"ü": 1}[assistant] ' in codec.render_chat(CHAT)


def test_the_template_may_refuse_messages(tmp_path):
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(InvalidRequestError, match="no tools here") as caught:
        TextCodec.load(folder).encode_chat([ChatMessage("tool", "x")])
    assert caught.value.reason == "CHAT_TEMPLATE_REFUSED"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path, source):
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(InvalidRequestError):
        TextCodec.load(folder).encode_chat(CHAT)


def test_a_model_without_template_says_so(byte_level_codec):
    assert not byte_level_codec.has_chat_template
    with pytest.raises(InvalidRequestError) as caught:
        byte_level_codec.encode_chat(CHAT)
    assert caught.value.reason == "CHAT_TEMPLATE_MISSING"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, "TOKENIZER_MISSING"),
        ("tokenizer.json", "{", "TOKENIZER_MALFORMED"),
        ("tokenizer_config.json", "[1]", "TOKENIZER_MALFORMED"),
        ("chat_template.jinja", "{% if %}", "CHAT_TEMPLATE_MALFORMED"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, reason):
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(PreconditionError) as caught:
        TextCodec.load(folder)
    assert caught.value.reason == reason


def test_special_tokens_of_the_configuration_are_added(tmp_path):
    """A file made by training alone may lack what only the configuration names."""
    folder = tiny_tokenizers.byte_level(tmp_path)
    _edit_config(
        folder,
        pad_token={"__type": "AddedToken", "content": "<|pad|>"},
        extra_special_tokens=["<|x|>"],
    )
    codec = TextCodec.load(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    text = "a<|pad|>b<|x|>c"
    assert codec.encode(text) == reference(text)["input_ids"]
    assert codec.decode(codec.encode(text)) == "abc"


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path):
    folder = tiny_tokenizers.byte_level(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert len(TextCodec.load(folder).encode("the quick brown fox jumps")) > 3


def test_text_that_is_far_too_long_is_counted_only_until_that_is_known(byte_level_codec):
    text = "the dog " * 200_000
    bound = byte_level_codec.num_tokens_at_least(text, 1000)
    assert 1000 < bound < len(byte_level_codec.encode_released(text[:200_000]))


def test_text_of_ordinary_length_is_not_counted(byte_level_codec):
    assert byte_level_codec.num_tokens_at_least("the dog " * 100, 1000) == 0


@pytest.mark.model
def test_embedded_model_equals_transformers(embedded_folder):
    codec = TextCodec.load(embedded_folder)
    reference = AutoTokenizer.from_pretrained(embedded_folder)
    for text in SAMPLES:
        assert codec.encode(text) == reference(text)["input_ids"], text
    expected = reference.apply_chat_template(
        CHAT_DICTS, add_generation_prompt=True, return_dict=False
    )
    assert codec.encode_chat(CHAT) == expected
    rng = random.Random(6)
    for _ in range(200):
        ids = [rng.randrange(len(reference)) for _ in range(20)]
        for skip in (True, False):
            expected_text = reference.decode(ids, skip_special_tokens=skip)
            assert codec.decode(ids, skip_special_tokens=skip) == expected_text
            stream = codec.detokenizer(skip_special_tokens=skip)
            assert "".join([stream.feed([i]) for i in ids]) + stream.flush() == expected_text


@pytest.mark.model
def test_the_embedded_models_template_knows_no_tools(embedded_folder):
    codec = TextCodec.load(embedded_folder)
    tool = {"type": "function", "function": {"name": "now"}}
    with pytest.raises(InvalidRequestError) as caught:
        codec.render_chat([ChatMessage("user", "hi")], [tool])
    assert caught.value.reason == "TOOLS_UNSUPPORTED"
