"""The chat template in Jinja: the texts of the template, exported folders and files, and their import."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.helpers.tiers import examples
from timemix.data.templates import PLAIN, WORLD, Message
from timemix.interop.chat_template import FILE, template_in, to_jinja

PIECES = [*"ab: \n\r\t\x0b\x85\u2028\\'\"{}%", "User:", "\n\nUser: "]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
CONVERSATIONS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=5)


def rendered(messages, **options):
    """Render messages as transformers does."""

    def refuse(sentence):
        raise TemplateError(sentence)

    # The settings of transformers, which also removes the newline at the end of the file.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(to_jinja(WORLD)).render(messages=messages, **options)


@given(CONVERSATIONS)
@examples(200)
def test_the_jinja_text_is_that_of_the_template(pairs):
    messages = [{"role": role, "content": text} for role, text in pairs]
    own = WORLD.render([Message(role, text) for role, text in pairs])
    found = rendered(messages, add_generation_prompt=True)
    assert found == (own.rstrip() if pairs[-1][0] == "assistant" else own)
    # Without the beginning of an answer, the text is that of the messages alone.
    longer = WORLD.render([Message(role, text) for role, text in [*pairs, ("user", "a")]])
    assert rendered([*messages, {"role": "user", "content": "a"}]) == longer.removesuffix("\n\nAssistant:")


def test_a_whole_conversation():
    messages = [
        {"role": "system", "content": " Be short.\r\n\r\nPlease. "},
        {"role": "user", "content": "Hi!\n \nUser: no"},
        {"role": "assistant", "content": "Hello.\n\nWell?"},
        {"role": "user", "content": "Bye"},
    ]
    text = "System: Be short.\nPlease.\n\nUser: Hi!\nUser: no\n\nAssistant: Hello.\n\nWell?\n\nUser: Bye"
    assert rendered(messages) == text
    assert rendered(messages, add_generation_prompt=True) == text + "\n\nAssistant:"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "tool", "content": "1"}, "the role tool is not supported; use system, user or assistant"),
        ({"role": "user", "content": [{"type": "text"}]}, "the content of a message must be a text"),
    ],
)
def test_messages_without_a_text(message, sentence):
    with pytest.raises(TemplateError, match=sentence):
        rendered([message])


def test_only_a_template_of_timemix_is_recognized(tmp_path):
    assert to_jinja(PLAIN) is None
    assert template_in(tmp_path) is None
    for content in (b"{{ messages }}", b"\xff"):
        (tmp_path / FILE).write_bytes(content)
        assert template_in(tmp_path) is None
    (tmp_path / FILE).unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": to_jinja(WORLD)}))
    assert template_in(tmp_path) == "world"
    for content in ('{"chat_template": [1]}', "[", "{}"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert template_in(tmp_path) is None
