"""The server under load: many clients, slow clients, long prompts, and chunks of text at any byte."""

import asyncio
import contextlib
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.engines import Scripted, alone
from tests.helpers.raw_http import connect, post, read_to_end, read_until, within
from tests.helpers.serving import served, tiny
from tests.helpers.tiers import examples, slow
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.server import answers, app, engine_thread, responses
from timemix.server.engine_thread import EngineThread
from timemix.server.errors import ApiError
from timemix.tokenizers.character import ByteTokenizer

ENDLESS = {"prompt": "a", "max_tokens": 1_000_000, "seed": 1}
SMALL_BUFFER = 4096


@pytest.fixture
def server():
    with served([tiny(slots=1, max_pending=2)]) as running:
        yield running


def test_a_client_that_never_reads_loses_its_connection(monkeypatch):
    monkeypatch.setattr(app, "LONGEST_SEND", 1)
    with served([tiny()]) as server:
        engine = server.models[0].engine
        with post(server, "/v1/completions", ENDLESS | {"stream": True}, SMALL_BUFFER) as connection:
            assert within(5, lambda: engine.active == 1)
            assert within(30, lambda: not engine.busy)
            with contextlib.suppress(ConnectionError):
                assert b"[DONE]" not in read_to_end(connection)


def test_a_client_that_reads_too_slowly_gets_an_error(server, monkeypatch):
    monkeypatch.setattr(engine_thread, "MOST_UNREAD", 100)
    engine = server.models[0].engine
    with post(server, "/v1/completions", ENDLESS | {"stream": True}, SMALL_BUFFER) as connection:
        assert within(5, lambda: engine.active == 1)
        assert within(30, lambda: not engine.busy)
        text = read_until(connection, b"0\r\n\r\n").decode()
    assert "the client reads too slowly" in text
    assert "[DONE]" not in text


def test_a_full_queue_refuses_further_requests(server):
    engine = server.models[0].engine
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(post(server, "/v1/completions", ENDLESS))
        assert within(5, lambda: engine.active == 1)
        waiting.enter_context(post(server, "/v1/completions", ENDLESS))
        assert within(5, lambda: engine.pending == 1)
        # One place is left, so that a call with two prompts gets none.
        assert server.call("/v1/completions", {"prompt": ["a", "b"]}).status == 429
        assert within(10, lambda: engine.pending == 1)
        waiting.enter_context(post(server, "/v1/completions", ENDLESS))
        assert within(5, lambda: engine.pending == 2)
        refused = server.call("/v1/completions", {"prompt": "a", "stream": True})
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert refused.json["error"]["code"] == "queue_full"
        assert refused.json["error"]["type"] == "rate_limit_error"
        assert server.call("/tokenize", {"prompt": "a"}).status == 200
    assert within(5, lambda: engine.active == engine.pending == 0)
    assert server.complete(prompt=["a", "b", "c"], max_tokens=1)["usage"]["completion_tokens"] == 3


def test_more_prompts_than_the_queue_ever_takes(server):
    answer = server.call("/v1/completions", {"prompt": ["a"] * 4})
    assert (answer.status, answer.json["error"]["param"]) == (400, "prompt")
    assert "4 prompts; the server takes at most 3" in answer.json["error"]["message"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_past_the_limit(server, is_chunked):
    server.app.state.service.most_bytes = 100_000
    size = 3_000_000
    frame = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {size}"
    body = b'{"prompt": "' + b"a" * size
    with connect(server) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{frame}\r\n\r\n".encode())
        connection.sendall(f"{size:x}\r\n".encode() * is_chunked + body[:size] + b"\r\n0\r\n\r\n" * is_chunked)
        answer = read_until(connection, b"}}").decode()
        assert answer.startswith("HTTP/1.1 413")
        assert "larger than 100,000 bytes" in answer
        # The connection stays usable.
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'{"status":"ok"}' in read_until(connection, b"}")


def test_comments_during_a_long_prompt(server, monkeypatch):
    monkeypatch.setattr(responses, "KEEP_ALIVE", 0.01)
    with post(server, "/v1/completions", {"prompt": "ab" * 10_000, "max_tokens": 1, "stream": True}) as connection:
        text = read_until(connection, b"[DONE]").decode()
    progress = [tuple(map(int, found)) for found in re.findall(r"^: reading (\d+)/(\d+)$", text, re.MULTILINE)]
    assert len(progress) >= 2
    assert progress == sorted(progress)
    assert progress[-1][0] > progress[0][0]
    assert {total for _, total in progress[1:]} == {20_000}


@pytest.fixture(scope="module")
def scripted():
    step = Scripted()
    with served([tiny("bytes", tokenizer=ByteTokenizer(), step=step)]) as running:
        yield running, step


TEXTS = st.text(st.sampled_from("ab中文😀é\n\u200d") | st.characters(codec="utf-8"), min_size=1, max_size=30)


@given(text=TEXTS, cut=st.integers(0, 3), data=st.data())
@examples(300)
def test_chunks_join_to_the_answer_and_hold_whole_characters(scripted, text, cut, data):
    server, step = scripted
    step.script = text.encode()
    length = max(1, len(step.script) - cut)
    stops = data.draw(st.lists(st.sampled_from(all_parts(text)), max_size=3))
    body = {"prompt": "a", "max_tokens": length, "temperature": 0, "stop": stops}
    expected, count = read_naively(step.script[:length], stops)
    whole = server.complete(**body)
    assert whole["choices"][0]["text"] == expected
    assert whole["choices"][0]["finish_reason"] == ("length" if count is None else "stop")
    assert whole["usage"]["completion_tokens"] == (count or length)
    events = server.call("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}).events
    texts = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(texts) == expected
    # No character is sent in halves, so that U+FFFD stands only where the text has it.
    assert sum(part.count("\ufffd") for part in texts) == expected.count("\ufffd")
    assert events[-1]["usage"] == whole["usage"]


def all_parts(text):
    return [text[i:j] for i in range(len(text)) for j in range(i + 1, min(i + 6, len(text) + 1))]


def read_naively(script, stops):
    """Return the text of a script up to the first stop string, and the number of its tokens, or None without one."""
    for count in range(1, len(script) + 1):
        text = script[:count].decode(errors="ignore")
        found = min((text.find(stop) for stop in stops if stop in text), default=None)
        if found is not None:
            return text[:found], count
    return script.decode(errors="replace"), None


def test_two_models_at_once():
    with served([tiny("one"), tiny("two", "rwkv1")]) as server, ThreadPoolExecutor(8) as clients:
        bodies = [
            {"model": name, "prompt": "abc"[: 1 + i % 3], "seed": i, "max_tokens": 8, "logprobs": 1}
            for i in range(20)
            for name in ("one", "two")
        ]
        together = [answer["choices"] for answer in clients.map(lambda body: server.complete(**body), bodies)]
        assert together == [server.complete(**body)["choices"] for body in bodies]
        assert together[0] != together[1]


def conversation(number):
    """Return the bodies of a conversation's turns, without the text so far."""
    chosen = random.Random(number)
    return [
        {
            "prompt": "".join(chosen.choices("abcdefghijk", k=chosen.choice((1, 3, 20, 63, 64, 65, 200)))),
            "max_tokens": chosen.randint(1, 40),
            "seed": chosen.randrange(2**64),
            "temperature": chosen.choice((0.0, 0.7, 1.3)),
            "top_p": chosen.choice((1.0, 0.8)),
            "top_k": chosen.choice((0, 3)),
            "n": chosen.choice((1, 1, 3)),
            "logprobs": 2,
            "kind": chosen.choice(("whole", "stream", "leave", "leave")),
        }
        for _ in range(3)
    ]


def converse(server, number):
    """Hold a conversation over HTTP; return the texts and log-probabilities of the turns that were not left."""
    text, found = "", []
    for turn in conversation(number):
        kind = turn.pop("kind")
        text += turn["prompt"]
        body = turn | {"prompt": text}
        if kind == "leave":
            with post(server, "/v1/completions", body | {"stream": number % 2 == 0, "max_tokens": 5000}) as leaving:
                leaving.settimeout(number % 7 / 200 + 0.001)
                with contextlib.suppress(TimeoutError):
                    leaving.recv(100)
            continue
        if kind == "whole":
            choices = server.complete(**body)["choices"]
        else:
            choices = joined(server.call("/v1/completions", body | {"stream": True}).events)
        found += [(c["text"], c["logprobs"]["token_logprobs"]) for c in choices]
        text += choices[0]["text"]
    return found


def joined(events):
    choices = {}
    for event in events:
        for part in event["choices"]:
            own = choices.setdefault(part["index"], {"text": "", "logprobs": {"token_logprobs": []}})
            own["text"] += part["text"]
            own["logprobs"]["token_logprobs"] += part["logprobs"]["token_logprobs"]
    return [choices[index] for index in sorted(choices)]


def converse_alone(engine, number):
    """Hold a conversation with an engine for each turn."""
    text, found = "", []
    for turn in conversation(number):
        text += turn["prompt"]
        if turn["kind"] == "leave":
            continue
        sampler = Sampler(temperature=turn["temperature"], top_p=turn["top_p"], top_k=turn["top_k"])
        request = Request(
            ["abcdefghijk".index(c) for c in text],
            tokens=turn["max_tokens"],
            seed=turn["seed"],
            sampler=sampler,
            samples=turn["n"],
            log_probabilities=True,
        )
        events = alone(engine.model, request)
        for sample in range(turn["n"]):
            own = [event for event in events if event.sample == sample]
            found.append(("".join(event.text for event in own), [event.log_probability for event in own]))
        text += found[-turn["n"]][0]
    return found


@pytest.mark.parametrize("count", [60, slow(1000)])
def test_conversations_do_not_mix(count):
    with served([tiny(slots=6, max_pending=1000)]) as server:
        engine = server.models[0].engine
        with ThreadPoolExecutor(12) as clients:
            found = list(clients.map(lambda number: converse(server, number), range(count)))
        # A cancelled request holds its slot until the next step, although the engine is no longer busy.
        assert within(10, lambda: engine.active == engine.pending == 0)
        for number in range(count):
            assert found[number] == converse_alone(engine, number), number
        assert json.dumps(found).count("[") > count


def test_a_refused_call_counts_as_no_cancelled_sample():
    async def refused():
        own = tiny(slots=1, max_pending=1)
        thread = EngineThread([own], on_death=print)
        thread.submit(own, [Request([0], 5)])
        with pytest.raises(ApiError, match="too many requests are waiting"):
            thread.submit(own, [Request([0], 5), Request([0], 5)])
        return own

    own = asyncio.run(refused())
    assert own.metrics.finished["cancelled"] == 0


def test_a_stream_with_a_fault_never_looks_like_a_complete_text():
    async def taken():
        own = tiny()
        stream = EngineThread([own], on_death=print).submit(own, [Request([0], 5)])
        stream.fail(ApiError(503, "the server has closed"))
        # An answer that is being sent asks next whether the stream has ended.
        assert not stream.has_ended
        with pytest.raises(ApiError, match="the server has closed"):
            await stream.take()

    asyncio.run(taken())


@pytest.mark.parametrize("is_stream", [False, True])
def test_other_calls_continue_while_the_scores_of_a_long_prompt_are_formatted(server, monkeypatch, is_stream):
    begun, may_end, begin = threading.Event(), threading.Event(), answers._Choice._begin

    def slow_begin(choice, piece, event):
        begun.set()
        assert may_end.wait(20)
        begin(choice, piece, event)

    monkeypatch.setattr(answers._Choice, "_begin", slow_begin)
    fields = {"prompt": "ab" * responses.LONG, "max_tokens": 1, "echo": True, "logprobs": 1, "stream": is_stream}
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(server.call, "/v1/completions", fields)
        try:
            assert begun.wait(20)
            assert server.call("/health").status == 200
        finally:
            may_end.set()
        answer = scoring.result()
    choices = [each["choices"][0] for each in (answer.events if is_stream else [answer.json])]
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 2 * responses.LONG + 1


def test_the_parts_of_an_answer_are_joined_in_linear_time():
    whole, parts = answers.Piece(0), 20_000
    for token in range(parts):
        part = answers.Piece(0, "a", [answers.Score(token, 0.0, (), token)], extras={"token_ids": [token]})
        whole.add(part)
        if token == 1000:
            scores, ids = whole.scores, whole.extras["token_ids"]
    # The lists grow in place: a copy for each token would take quadratic time.
    assert whole.scores is scores
    assert whole.extras["token_ids"] is ids
    assert ids == list(range(parts))
    assert whole.text == "a" * parts
