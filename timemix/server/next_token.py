"""The endpoint /v1/next_token: the distribution of the token that follows a text."""

import math
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from timemix.generation.request import Request
from timemix.server.answers import check_event
from timemix.server.completions import build_request, engine_fields, prompts_of, spelled, state_fields
from timemix.server.engine_thread import Stream
from timemix.server.errors import ApiError
from timemix.server.fields import Fields
from timemix.server.responses import while_connected
from timemix.server.service import service_of

MOST = 1000
"""Largest number of tokens in an answer."""


async def next_token(request: HttpRequest) -> Response:
    """Answer POST /v1/next_token: the most probable tokens at temperature 1, before bias and filters."""
    service = service_of(request)
    fields = await Fields.read(request, service.most_bytes)
    served = service.model(fields.text("model"))
    count = min(fields.integer("top", 100, 1, MOST), served.engine.model.config.vocab_size)
    prompts = await run_in_threadpool(prompts_of, fields, served.tokenizer)
    if len(prompts) > 1:
        raise ApiError(400, f"prompt holds {len(prompts)} prompts; give one", "prompt")
    asked: dict[str, Any] = engine_fields(fields, served, 1) | await state_fields(request, fields, served)
    asked |= {"tokens": 1, "samples": 1, "keep_session": False}
    asked["top_log_probabilities"] = count
    built = await run_in_threadpool(build_request, prompts[0].ids, asked, served, "prompt")
    stream = service.thread.submit(served, [built])
    return await while_connected(request.receive, stream, _answer(stream, built, count))


async def _answer(stream: Stream, request: Request, count: int) -> Response:
    """Return the answer with the `count` most probable tokens of the only event of a stream with one request."""
    (_, event), *_ = await stream.take()
    check_event(event, request)
    served, top = stream.served, event.top_log_probabilities
    rest = 1 - math.fsum(math.exp(x) for _, x in top)
    tokenizer = served.tokenizer
    found = [
        {"id": token, "token": spelled(tokenizer, token), "bytes": list(tokenizer.piece(token)), "logprob": x}
        for token, x in top
    ]
    left = math.log(rest) if rest > 1e-12 and count < served.engine.model.config.vocab_size else None
    return JSONResponse({"object": "next_token", "model": served.name, "top": found, "rest": left})
