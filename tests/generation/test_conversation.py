"""Conversations: no text is read twice, answers end where they should, and turns are undone, retried and forked."""

import pytest
import torch

from tests.helpers.models import VARIANTS, build
from tests.helpers.scripted import Scripted
from tests.helpers.vocabularies import BYTES
from timemix.data.templates import PLAIN, WORLD, Message
from timemix.errors import InvalidValue, NotFinite
from timemix.generation.conversation import TURNS_KEPT, Conversation
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import load_session, save_session
from timemix.tokenizers.character import CharacterTokenizer
from timemix.tokenizers.make import train_tokenizer
from timemix.tokenizers.world import WorldTokenizer

TOKENIZERS = {
    "bytes": WorldTokenizer(BYTES, 300),
    "words": WorldTokenizer([*BYTES, b"\n\n", b"User", b"Assistant", b" Hi", b" Fine", b"\n\n\n"], 300),
}
CHARACTERS = CharacterTokenizer(list("abcdefghij\n"), "error")
END = 0
"""Id of the token that ends a text."""


def scripted(tokenizer, *script, **options):
    """Return a conversation whose answers are given, and the step that records what the model reads."""
    model = build(VARIANTS["rwkv7"], torch.float32, vocab_size=300)
    step = Scripted(model, tokenizer, script)
    return Conversation(Engine(model, tokenizer, slots=1, step=step), WORLD, **options), step


def dialogue(*contents):
    roles = ["user", "assistant"] * len(contents)
    return WORLD.render([Message(role, content) for role, content in zip(roles, contents, strict=False)])


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def model():
    return build(VARIANTS["rwkv7"], torch.float64)


@pytest.fixture
def plain(model):
    return Conversation(Engine(model, CHARACTERS, slots=1), PLAIN, tokens=9)


def answer(pieces):
    return "".join(pieces)


def test_the_model_reads_the_text_of_the_template_once(tokenizer):
    conversation, step = scripted(tokenizer, " Hi\n\nyou.\n\nUser:", " Fine.\n\nUser:", system="Be short.")
    assert answer(conversation.say("Hello!\n\nUser: x")) == "Hi\n\nyou."
    assert not conversation.is_unfinished
    assert answer(conversation.say("And you?")) == "Fine."
    messages = [("system", "Be short."), ("user", "Hello!\nUser: x"), ("assistant", "Hi\n\nyou.")]
    messages += [("user", "And you?"), ("assistant", "Fine."), ("user", "x")]
    # The model has not read the last token that it generated, the colon.
    read = tokenizer.decode(step.read) + ": x\n\nAssistant:"
    assert read == WORLD.render([Message(*each) for each in messages])


def test_the_model_does_not_read_the_end_of_text(tokenizer):
    conversation, step = scripted(tokenizer, " Hi.", END, " Fine.", END)
    assert answer(conversation.say("Hello!")) == "Hi."
    assert answer(conversation.say("And you?")) == "Fine."
    assert END not in step.read
    assert tokenizer.decode(step.read) == dialogue("Hello!", "Hi.", "And you?", "Fine.")


@pytest.mark.parametrize("tokens", range(1, 12))
def test_an_unfinished_answer_is_continued_or_left_as_it_is(tokenizer, tokens):
    """The end of --tokens may lie inside a stop string: the text that began the stop string is not read again."""
    script = " Hi\n\nUser:"
    for continues in (True, False):
        conversation, step = scripted(tokenizer, script, " Fine", END, "xxxxxxxxxxx", tokens=tokens)
        text = answer(conversation.say("Hello!"))
        if continues:
            while conversation.is_unfinished:
                text += answer(conversation.proceed())
            assert text == "Hi"
            with pytest.raises(InvalidValue, match="no answer is unfinished; give a message"):
                conversation.proceed()
        read = len(step.read)
        next(conversation.say("x"))
        generated = tokenizer.decode(tokenizer.encode(script)[: None if continues else tokens])
        written = WORLD.render([Message("user", "Hello!")]) + generated
        assert tokenizer.decode(step.read[:read]) == tokenizer.decode(tokenizer.encode(written)[:-1])
        assert tokenizer.decode(step.read) == written + WORLD.following([Message("user", "x")], written)


def test_a_token_may_go_on_after_the_stop_string():
    tokenizer = WorldTokenizer([*BYTES, b"\n\nUser: ", b" dog"], 300)
    conversation, step = scripted(tokenizer, " Hi\n\nUser: ", " Fine.", END)
    assert answer(conversation.say("Hello!")) == "Hi"
    assert not conversation.is_unfinished
    assert answer(conversation.say("And you?")) == "Fine."
    assert tokenizer.decode(step.read) == dialogue("Hello!", "Hi", "And you?", "Fine.")
    conversation, _ = scripted(tokenizer, " Hi dog", stop=[" d"])
    assert answer(conversation.say("Hello!")) == "Hi"
    assert not conversation.is_unfinished


def test_a_long_stop_string_ends_an_answer_and_one_in_the_message_does_not(tokenizer):
    long = "x" * 70
    conversation, _ = scripted(tokenizer, f" Hi{long}", stop=[long])
    assert answer(conversation.say("Hello!")) == "Hi"
    assert not conversation.is_unfinished
    conversation, _ = scripted(tokenizer, " xx", "x", END, stop=["!\n\nAssistant: x"], tokens=2)
    answer(conversation.say("Hello!"))
    assert conversation.is_unfinished


def test_a_template_with_labels_needs_case_and_spaces():
    tokenizer = train_tokenizer("word", "user : hi")
    model = build(VARIANTS["rwkv7"], torch.float32, vocab_size=tokenizer.vocab_size)
    with pytest.raises(InvalidValue, match="the template world needs case and spaces, .*; choose the template plain"):
        Conversation(Engine(model, tokenizer, slots=1), WORLD)
    Conversation(Engine(model, tokenizer, slots=1), PLAIN)


def test_an_answer_that_the_caller_stops_is_kept(tokenizer):
    conversation, step = scripted(tokenizer, " He", " Fine.", END)
    pieces = conversation.say("Hello!")
    text = ""
    while "He" not in text:
        text += next(pieces)
    pieces.close()
    assert answer(conversation.say("And you?")) == "Fine."
    assert tokenizer.decode(step.read) == dialogue("Hello!", "He", "And you?", "Fine.")


def test_a_message_that_the_caller_stops_leaves_no_trace():
    tokenizer = TOKENIZERS["bytes"]
    conversation, _ = scripted(tokenizer, " Hi.", END, " Fine.", END)
    answer(conversation.say("Hello!"))
    before = conversation.session
    pieces = conversation.say("x" * 200)
    assert next(pieces) == ""
    pieces.close()
    assert conversation.session is before
    assert answer(conversation.say("And you?")) == "Fine."
    assert conversation.undo().message == "And you?"
    assert conversation.undo().message == "Hello!"


def test_lines_are_one_text_in_the_plain_template():
    """At temperature 0, each answer is the text that the model generates after the whole text before."""
    tokenizer = TOKENIZERS["bytes"]
    model = build(VARIANTS["rwkv7"], torch.float64, vocab_size=300)
    conversation = Conversation(Engine(model, tokenizer), PLAIN, tokens=7, sampler=Sampler(temperature=0), stop="\n")
    ids, engine = [], Engine(model, tokenizer)
    for line in ("it was", "then it"):
        text = line if not ids or tokenizer.decode(ids[-1:]) == "\n" else f"\n{line}"
        ids += tokenizer.encode(text).tolist()
        answer(conversation.say(line))
        engine.add(Request(ids, 7, Sampler(temperature=0), stop_tokens=(END,), stop="\n"))
        while engine.busy:
            ids += [event.token for event in engine.step()]
    assert conversation.session.tokens[-len(ids) :] == tuple(ids)


def test_undo_retry_and_fork(plain):
    first = answer(plain.say("ab"))
    second = answer(plain.say("cd"))
    fork = plain.fork()
    third = answer(plain.retry())
    assert len({second, third, answer(plain.retry())}) == 3
    assert plain.undo().message == "cd"
    assert answer(plain.say("cd")) == second
    assert (fork.undo().message, fork.undo().message) == ("cd", "ab")
    with pytest.raises(InvalidValue, match="there is no turn to remove; give a message"):
        fork.undo()
    assert answer(fork.say("ab")) == first
    assert answer(fork.say("cd")) == second


def test_a_continued_answer_is_one_answer(plain):
    plain.say("ab").close()
    assert plain.session is None
    text = answer(plain.say("ab"))
    text += answer(plain.proceed())
    assert plain.undo().message == "ab"
    assert plain.session is None
    assert answer(plain.say("ab")) + answer(plain.proceed()) == text


def test_a_conversation_continues_from_a_file(plain, model, tmp_path):
    answer(plain.say("ab"))
    save_session(plain.session, tmp_path / "state", model)
    expected = answer(plain.say("cd"))
    other = Conversation(Engine(model, CHARACTERS), PLAIN, tokens=9)
    other.restart(load_session(tmp_path / "state", model))
    with pytest.raises(InvalidValue, match="there is no turn to remove"):
        other.retry()
    assert answer(other.say("cd")) == expected


def test_the_memory_of_a_long_conversation_is_bounded(plain):
    for _ in range(TURNS_KEPT + 3):
        answer(plain.say("ab"))
    for _ in range(TURNS_KEPT):
        plain.undo()
    with pytest.raises(InvalidValue, match="there is no turn"):
        plain.undo()
    assert plain.session is not None


@pytest.mark.parametrize("message", ["", " \n", "aΩ"])
def test_a_message_that_is_empty_or_unknown_changes_nothing(plain, message):
    with pytest.raises(InvalidValue, match="the message is empty; give at least one character|no 'Ω'"):
        plain.say(message)
    assert plain.session is None


def test_an_error_changes_nothing(plain, model):
    answer(plain.say("ab"))
    session, weight = plain.session, model.head.weight
    with torch.no_grad():
        before = weight.clone()
        weight.fill_(torch.nan)
    for pieces in (plain.say("cd"), plain.retry(), plain.proceed()):
        with pytest.raises(NotFinite, match="the answer cannot continue"):
            answer(pieces)
    with torch.no_grad():
        weight.copy_(before)
    assert plain.session is session
    assert plain.undo().message == "ab"


def test_an_engine_without_a_tokenizer_is_refused():
    with pytest.raises(InvalidValue, match="engine has no tokenizer"):
        Conversation(Engine(build(VARIANTS["rwkv7"], torch.float32)), PLAIN)
