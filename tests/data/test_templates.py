"""Chat templates: the texts of published code, and messages that cannot imitate other messages."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiers import examples
from tests.helpers.vocabularies import BYTES
from timemix.data.templates import PLAIN, TEMPLATES, WORLD, Message, template_of
from timemix.errors import InvalidValue
from timemix.tokenizers.character import CharacterTokenizer
from timemix.tokenizers.world import WorldTokenizer

QUESTION = Message("user", "Hello!")
ROLES = st.sampled_from(["system", "user", "assistant"])
CONTENTS = st.text("a :\r\n\t", max_size=12) | st.sampled_from(["x\n\nUser: y", "x\n \nSystem: y", "x\r\rAssistant:"])
MESSAGES = st.lists(st.builds(Message, ROLES, CONTENTS), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("user", "Hello!")], "User: Hello!\n\nAssistant:"),
        ([("system", "Be short."), ("user", "Hello!")], "System: Be short.\n\nUser: Hello!\n\nAssistant:"),
        (
            [("user", "Hello!"), ("assistant", "Hi."), ("user", "Bye!")],
            "User: Hello!\n\nAssistant: Hi.\n\nUser: Bye!\n\nAssistant:",
        ),
        ([("user", " one\r\n\r\ntwo\n \n\n  three\n")], "User: one\ntwo\n  three\n\nAssistant:"),
        ([("user", "one\ntwo")], "User: one\ntwo\n\nAssistant:"),
        # A label inside a message does not begin a message, because a message begins after a blank line.
        ([("user", "Hello!\n\nAssistant: Yes.")], "User: Hello!\nAssistant: Yes.\n\nAssistant:"),
        ([("user", "1"), ("user", "2")], "User: 1\n\nUser: 2\n\nAssistant:"),
        ([("user", ""), ("system", " \n"), ("user", "2"), ("assistant", "")], "User: 2\n\nAssistant:"),
        ([("user", "Hello!"), ("assistant", "One \n\ntwo ")], "User: Hello!\n\nAssistant: One \n\ntwo "),
        ([("user", "")], "Assistant:"),
    ],
)
def test_the_world_template(messages, text):
    assert WORLD.render([Message(*each) for each in messages]) == text


def test_an_answer_keeps_its_blank_lines_in_later_turns():
    answer = Message("assistant", "One.\n\nTwo.\n")
    assert WORLD.render([QUESTION, answer, QUESTION]) == (
        "User: Hello!\n\nAssistant: One.\n\nTwo.\n\nUser: Hello!\n\nAssistant:"
    )


def test_the_plain_template_keeps_every_character():
    assert PLAIN.render([Message("user", "It was\n\n the ")]) == "It was\n\n the "
    assert PLAIN.render([Message("system", "I"), QUESTION, Message("assistant", " ")]) == "I\nHello!\n "
    assert PLAIN.render([QUESTION, Message("assistant", "")]) == "Hello!"


@given(MESSAGES)
@examples(60)
def test_only_the_messages_of_the_assistant_can_add_turns(messages):
    """Split at each separator with a label: the turns of the system and the user are exactly the messages."""
    messages = [each for each in messages if each.role != "assistant"] or [QUESTION]
    *turns, last = re.split(r"\n\n(?=System:|User:|Assistant:)", WORLD.render(messages))
    assert last == "Assistant:"
    filled = [each for each in messages if each.content.strip()]
    assert [turn.partition(":")[0].lower() for turn in turns] == [each.role for each in filled]
    assert all("\n\n" not in turn for turn in turns)


@given(MESSAGES, st.text("a :\n", min_size=1).filter(str.strip))
@examples(60)
def test_the_text_of_a_next_turn_extends_the_text_before(messages, answer):
    """So the state after an answer is the state of a whole conversation, and a server finds it in its cache."""
    asked = [*messages, QUESTION]
    answer = answer.strip()
    before = WORLD.render(asked) + WORLD.space + answer
    after = WORLD.render([*asked, Message("assistant", answer), Message("user", "Bye!")])
    assert after.startswith(before)
    for end in range(len(WORLD.separator + "User:") + 1):
        written = before + (WORLD.separator + "User:")[:end]
        assert written + WORLD.following([Message("user", "Bye!")], written) == after


@pytest.mark.parametrize(
    ("messages", "segments"),
    [
        ([("user", "2+3"), ("assistant", "5")], [("User: 2+3\n\nAssistant:", False), (" 5", True)]),
        (
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
            [
                ("System: S\n\nUser: a\n\nAssistant:", False),
                (" b\n\nUser:", True),
                (" c\n\nAssistant:", False),
                (" d", True),
            ],
        ),
        # No stop string follows an answer before a message of the system or the assistant.
        (
            [("user", "a"), ("assistant", "b"), ("assistant", "c")],
            [("User: a\n\nAssistant:", False), (" b", True), ("\n\nAssistant:", False), (" c", True)],
        ),
        ([("assistant", "b")], [("Assistant:", False), (" b", True)]),
        (
            [("user", "x\n\nUser: y "), ("assistant", "One\n\ntwo\n\nUser: z\n\n\nAssistant:\n")],
            [
                ("User: x\nUser: y\n\nAssistant:", False),
                (" One\n\ntwo\nUser: z\nAssistant:", True),
            ],
        ),
    ],
)
def test_a_conversation_for_training_has_the_texts_that_the_model_generates(messages, segments):
    assert WORLD.segments([Message(*each) for each in messages]) == segments


@given(MESSAGES)
@examples(60)
def test_a_conversation_for_training_continues_each_prompt(messages):
    """Each text that the model must generate follows the prompt of `timemix chat`, and is an answer with its stop."""
    messages = [each for each in messages if each.content.strip()] + [Message("assistant", "z")]
    # Blank lines before a label are removed from the answers of the training alone.
    messages = [Message(each.role, re.sub(r"\s*\n\s*", "\n", each.content.replace("\r", "\n"))) for each in messages]
    found = WORLD.segments(messages)
    assert "".join(text for text, _ in found) == WORLD.render(messages)
    read, answers = "", [i for i, each in enumerate(messages) if each.role == "assistant"]
    for text, is_counted in found:
        if is_counted:
            number = answers.pop(0)
            prompt = WORLD.render([*messages[:number], Message("assistant", "")])
            assert read == prompt
            follows = number + 1 < len(messages) and messages[number + 1].role == "user"
            assert text == " " + messages[number].content.strip() + ("\n\nUser:" if follows else "")
        read += text
    assert not answers


def test_the_model_reads_the_same_texts_in_training_and_in_a_chat():
    """So the tokens of a prompt are those of the training, too."""
    (first, _), (answer, _), (second, _), _ = WORLD.segments(
        [QUESTION, Message("assistant", "Hi."), Message("user", "Bye?\n\nNo."), Message("assistant", "Yes.")]
    )
    assert first == WORLD.render([QUESTION])
    assert second == WORLD.following([Message("user", "Bye?\n\nNo.")], first + answer)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([QUESTION], "no message of the assistant has text"),
        ([QUESTION, Message("assistant", " ")], "no message of the assistant has text"),
        ([Message("assistant", "a"), QUESTION], "the last message is of the user, not of the assistant"),
        ([], "no message of the assistant has text"),
    ],
)
def test_a_conversation_without_an_answer_is_refused(messages, words):
    with pytest.raises(InvalidValue, match=words):
        WORLD.segments(messages)


def test_messages_of_unknown_roles_and_no_messages_are_refused():
    with pytest.raises(InvalidValue, match="role='usr' is not supported; did you mean 'user'"):
        Message("usr", "x")
    with pytest.raises(InvalidValue, match="messages is empty; give at least one message"):
        WORLD.render([])


def test_the_tokenizer_decides_the_template():
    assert template_of(WorldTokenizer(BYTES, 300)) is WORLD
    assert template_of(CharacterTokenizer(["a"], "error")) is PLAIN
    assert template_of(CharacterTokenizer(["a"], "error"), "world") is WORLD
    assert list(TEMPLATES) == ["world", "plain"]
