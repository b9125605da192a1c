"""The endpoint /v1/completions, and the fields that it shares with /v1/chat/completions."""

import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import Session
from timemix.server.answers import Call, Form, Piece, Score
from timemix.server.engine_thread import Served
from timemix.server.errors import ApiError
from timemix.server.fields import Fields, checked
from timemix.server.responses import respond
from timemix.server.service import owner_of, service_of
from timemix.server.state_store import largest_file
from timemix.tokenizers.base import Tokenizer

MOST_TOKENS = 1_000_000
"""Largest number of tokens that one call can ask for in each choice."""

MOST_CHOICES = 128
"""Largest number of choices of one prompt."""

MOST_PROMPTS = 1024
"""Largest number of prompts of one call."""

MOST_REPEATED = 4_000_000
"""Largest number of prompt tokens in the answer of one call."""

MOST_STOPS = 16
"""Largest number of stop strings, and of stop tokens."""

MOST_TOP = 20
"""Largest number of most probable tokens in an answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "grammar": (),
    "json_schema": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
}
"""Fields of other servers that change the answer and are not supported, with their values that change nothing."""


class Prompt(NamedTuple):
    """A prompt of a call: its token ids, and its text if the client sent a text."""

    ids: list[int]
    text: str | None

    def shown(self, tokenizer: Tokenizer, is_scored: bool) -> str:
        """Return the text. A prompt of token ids, and a prompt whose tokens have places in the text, is decoded.

        Args:
            tokenizer: The tokenizer.
            is_scored: Whether the answer has the log-probability of each token, with its place in the text.
        """
        if self.text is not None and not is_scored:
            return self.text
        # An unfinished character at the end comes with the text of the answer, whose first tokens may complete it.
        return tokenizer.stream().push_all(np.array(self.ids, np.int64))


async def complete(request: HttpRequest) -> Response:
    """Answer POST /v1/completions."""
    service = service_of(request)
    fields = await Fields.read(request, service.most_bytes)
    served = service.model(fields.text("model"))
    fields.unsupported("suffix", ("",))
    fields.unsupported("best_of", (1,))
    count = fields.integer("logprobs", -1, 0, MOST_TOP)
    asked = engine_fields(fields, served, default_tokens=16) | await state_fields(request, fields, served)
    echo = fields.flag("echo")
    prompts = await run_in_threadpool(prompts_of, fields, served.tokenizer)
    asked |= {
        "log_probabilities": count >= 0,
        "top_log_probabilities": max(count, 0),
        "prompt_log_probabilities": echo and count >= 0,
    }
    # A long prompt takes long to check: other requests continue meanwhile.
    requests = await run_in_threadpool(
        lambda: [build_request(prompt.ids, asked, served, "prompt") for prompt in prompts]
    )
    if echo or fields.flag("return_token_ids"):
        check_repeated(requests)
    shown: list[str] = []
    if echo:
        shown = await run_in_threadpool(lambda: [prompt.shown(served.tokenizer, count >= 0) for prompt in prompts])
    call = Call(
        served=served,
        form=CompletionForm(),
        requests=requests,
        echo=shown,
        scored=count >= 0,
        returns_ids=fields.flag("return_token_ids"),
        keep=keeper(request, fields, served, requests),
        **stream_fields(fields),
    )
    return await respond(request, call, service.thread)


def check_repeated(requests: Sequence[Request]) -> None:
    """Check the size of an answer whose choices all repeat their prompt.

    Raises:
        ApiError: There are several choices, and their prompts have too many tokens together.
    """
    repeated = sum(each.samples * len(each.prompt) for each in requests)
    if requests[0].samples > 1 and repeated > MOST_REPEATED:
        raise ApiError(
            400,
            f"the choices repeat {repeated:,} tokens of prompts, more than {MOST_REPEATED:,}; give a smaller n, or"
            " leave echo and return_token_ids out",
            "n",
        )


def stream_fields(fields: Fields) -> dict[str, Any]:
    """Return the fields of a call about its stream.

    Args:
        fields: Fields of the body.

    Raises:
        ApiError: A field is wrong.
    """
    is_stream, options = fields.flag("stream"), fields.get("stream_options")
    if options is not None and not is_stream:
        raise ApiError(400, "stream_options needs stream: true; leave stream_options out", "stream_options")
    if not isinstance(options, dict | None):
        fields.refuse("stream_options", "an object")
    inner = Fields(options or {})
    return {
        "is_stream": is_stream,
        "includes_usage": inner.flag("include_usage"),
        "repeats_usage": inner.flag("continuous_usage_stats"),
    }


async def state_fields(request: HttpRequest, fields: Fields, served: Served) -> dict[str, Any]:
    """Return the arguments of the engine's Request about stored and cached states.

    Args:
        request: The HTTP request.
        fields: Fields of the body.
        served: The model.

    Raises:
        ApiError: A field is wrong, or the state is not known or belongs to another model.
    """
    id, states, owner = fields.text("state"), service_of(request).states, owner_of(request)
    start = None if id is None else await run_in_threadpool(states.session, owner, id, served)
    return {
        "start": start,
        "keep_session": fields.flag("return_state"),
        "scope": owner,
        "reuse_decoded": fields.flag("reuse_decoded"),
    }


def keeper(
    request: HttpRequest, fields: Fields, served: Served, requests: Sequence[Request]
) -> Callable[[Session], Awaitable[dict[str, Any]]] | None:
    """Return the function that stores the state of a choice and describes it; None if the call returns no states.

    Args:
        request: The HTTP request.
        fields: Fields of the body.
        served: The model.
        requests: The requests to the engine.

    Raises:
        ApiError: The states of all choices do not fit into the store.
    """
    if not fields.flag("return_state"):
        return None
    states, owner, parent = service_of(request).states, owner_of(request), fields.text("state")
    states.check_room(largest_file(served.engine.model) * sum(each.samples for each in requests))

    async def keep(session: Session) -> dict[str, Any]:
        return (await run_in_threadpool(states.add, owner, served, session, parent=parent)).json()

    return keep


def engine_fields(fields: Fields, served: Served, default_tokens: int, tokens: str = "max_tokens") -> dict[str, Any]:
    """Return the arguments of the engine's Request, apart from the prompt and the log-probabilities.

    Args:
        fields: Fields of the body.
        served: The model.
        default_tokens: Number of tokens if the body names none.
        tokens: Field that holds the number of tokens.

    Raises:
        ApiError: A field is wrong or not supported.
    """
    for name, harmless in UNSUPPORTED.items():
        fields.unsupported(name, harmless)
    sampler = {name: fields.number(name, default) for name, default in vars(Sampler()).items()}
    # Many clients send -1 if the user has chosen no seed.
    seed = fields.integer("seed", -1, -(2**63), 2**64 - 1)
    stop_tokens, vocab_size = fields.ids("stop_token_ids"), served.engine.model.config.vocab_size
    if len(stop_tokens) > MOST_STOPS:
        raise ApiError(400, f"stop_token_ids has {len(stop_tokens)} ids; give at most {MOST_STOPS}", "stop_token_ids")
    _check_ids("stop_token_ids", stop_tokens, vocab_size)
    bias = _logit_bias(fields, vocab_size)
    _check_ids("logit_bias", bias, vocab_size)
    end, ignores_end = served.tokenizer.end_of_text, fields.flag("ignore_eos")
    if end is not None and not ignores_end:
        stop_tokens += (end,)
    context = fields.one_of("context", "", ("reanchor", "exact", "error"))
    return {
        "tokens": fields.integer(tokens, default_tokens, 0, MOST_TOKENS),
        "sampler": checked(None, lambda: Sampler(**sampler)),
        "seed": None if seed == -1 else seed % 2**64,
        "samples": fields.integer("n", 1, 1, MOST_CHOICES),
        "stop": fields.texts("stop", MOST_STOPS),
        "stop_tokens": stop_tokens,
        "logit_bias": bias,
        "context": context,
    }


def build_request(prompt: list[int], asked: dict[str, Any], served: Served, param: str) -> Request:
    """Return a request to the engine.

    Args:
        prompt: Token ids of the prompt.
        asked: Arguments from `engine_fields`.
        served: The model.
        param: Field of the body that holds the prompt.

    Raises:
        ApiError: The prompt is empty, does not fit the context, or a token is outside the vocabulary.
    """
    limit, context, tokens = served.engine.model.max_position, asked["context"], asked["tokens"]
    start: Session | None = asked.get("start")
    past = 0 if start is None else int(start.state.position) + start.unread
    needed = past + len(prompt) + (tokens if context == "error" else 0)
    # A state without a prompt is a text that grows, even if it fills the context.
    is_checked = context == "error" or (context == "" and prompt)
    if limit is not None and is_checked and needed > limit:
        parts = [] if start is None else [f"the state has {past}"]
        parts += [f"the prompt has {len(prompt)}"] + ([f"max_tokens is {tokens}"] if context == "error" else [])
        way = " or lower max_tokens" if context == "error" else ""
        raise ApiError(
            400,
            f"the context of {served.name} has {limit} tokens, but {' and '.join(parts)}; shorten the prompt{way}, or"
            ' send context: "reanchor", which leaves out the beginning of the text',
            param,
            "context_length_exceeded",
        )
    if not prompt and (start is None or not start.tokens):
        end = served.tokenizer.end_of_text
        if end is None:
            raise ApiError(400, "the prompt is empty; give at least one token", param)
        prompt = [end]
    # Without a seed, each prompt gets texts of its own, also if a call repeats the prompt.
    seed = secrets.randbits(64) if asked["seed"] is None else asked["seed"]
    own = asked | {"context": "exact" if context == "exact" else "reanchor", "seed": seed}
    return checked(param, lambda: Request(prompt, **own))


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    for token in (min(ids), max(ids)) if ids else ():
        if not 0 <= token < vocab_size:
            raise ApiError(400, f"{name} holds {token}; the vocabulary has ids from 0 to {vocab_size - 1}", name)


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    """Return the biases by token id."""
    given = fields.get("logit_bias")
    if given is None:
        return {}
    if isinstance(given, dict) and len(given) > vocab_size:
        raise ApiError(400, f"logit_bias has {len(given)} ids; the vocabulary has {vocab_size}", "logit_bias")
    if not (isinstance(given, dict) and all(token.isascii() and token.isdigit() for token in given)):
        fields.refuse("logit_bias", "an object of numbers by token id")
    try:
        return {int(token): Fields(given).number(token, 0.0) for token in given}
    except (ValueError, ApiError):
        fields.refuse("logit_bias", "an object of numbers by token id")


def prompts_of(fields: Fields, tokenizer: Tokenizer) -> list[Prompt]:
    """Return the prompts of a call. With the field `state`, the prompt may be missing.

    Args:
        fields: Fields of the body.
        tokenizer: The tokenizer.

    Raises:
        ApiError: The field `prompt` is missing or wrong.
    """
    given = fields.get("prompt")
    wanted = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
    if fields.get("state") is not None and (given is None or given == []):
        given = ""
    if given is None:
        raise ApiError(400, f"prompt is missing; give {wanted}", "prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and all(isinstance(x, int) for x in given)):
        given = [given]
    if not (isinstance(given, list) and given):
        fields.refuse("prompt", wanted)
    if len(given) > MOST_PROMPTS:
        raise ApiError(400, f"prompt holds {len(given)} prompts; give at most {MOST_PROMPTS}", "prompt")
    prompts = []
    for each in given:
        own = Fields({"prompt": each})
        if isinstance(each, str):
            text = own.text("prompt") or ""
            ids = checked("prompt", lambda text=text: tokenizer.encode(text).tolist())  # type: ignore[misc]
            prompts.append(Prompt(ids, text))
        elif isinstance(each, list):
            ids = list(own.ids("prompt"))
            _check_ids("prompt", ids, tokenizer.vocab_size)
            prompts.append(Prompt(ids, None))
        else:
            fields.refuse("prompt", wanted)
    return prompts


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, with a distinct spelling for tokens that are not text of their own.

    Args:
        tokenizer: The tokenizer.
        token: Token id.

    Returns:
        The text; `bytes:` and the bytes in hexadecimal if they are not UTF-8; `token_id:` and the id of an empty token.
    """
    piece = tokenizer.piece(token)
    try:
        return piece.decode() or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class CompletionForm(Form):
    """The form of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, piece: Piece, tokenizer: Tokenizer, *, is_part: bool) -> dict[str, Any]:
        """Return a choice."""
        scores = None if piece.scores is None else _legacy(piece.scores, tokenizer)
        found = {"index": piece.index, "text": piece.text, "logprobs": scores, "finish_reason": piece.finish}
        return found | piece.extras


def _legacy(scores: list[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return log-probabilities in the form of /v1/completions."""
    spell: Callable[[int], str] = lambda token: spelled(tokenizer, token)  # noqa: E731
    return {
        "tokens": [spell(score.token) for score in scores],
        "token_logprobs": [score.log_probability for score in scores],
        # The drawn token is reported even if it is not among the most probable tokens.
        "top_logprobs": [
            None
            if score.log_probability is None
            else {spell(token): x for token, x in score.top} | {spell(score.token): score.log_probability}
            for score in scores
        ],
        "text_offset": [score.offset for score in scores],
    }
