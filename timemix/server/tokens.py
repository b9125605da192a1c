"""The endpoints that convert between text and token ids."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from timemix.interop.chat_template import to_jinja
from timemix.server.completions import spelled
from timemix.server.errors import ApiError
from timemix.server.fields import Fields, checked
from timemix.server.service import service_of


async def tokenize(request: HttpRequest) -> JSONResponse:
    """Answer POST /tokenize."""
    service = service_of(request)
    fields = await Fields.read(request, service.most_bytes)
    served = service.model(fields.text("model"))
    text = fields.text("prompt")
    if text is None:
        raise ApiError(400, "prompt is missing; give a string", "prompt")
    reports = fields.flag("report_unknown")
    tokenizer = served.tokenizer
    ids, unknown = await run_in_threadpool(tokenizer.encode_counted, text)
    if not reports:
        checked("prompt", lambda: tokenizer.refuse(unknown))
    # Other tokenizers have a token for unknown text, so that a prompt may contain it.
    refused = list(unknown) if tokenizer.unknown == "error" else []
    found: dict[str, Any] = {"count": len(ids), "max_model_len": served.engine.model.max_position}
    found |= {"unknown": refused} if reports else {}
    return await run_in_threadpool(lambda: JSONResponse({"tokens": ids.tolist()} | found))


async def detokenize(request: HttpRequest) -> JSONResponse:
    """Answer POST /detokenize."""
    service = service_of(request)
    fields = await Fields.read(request, service.most_bytes)
    served = service.model(fields.text("model"))
    if fields.get("tokens") is None:
        raise ApiError(400, "tokens is missing; give a list of token ids", "tokens")

    def answer() -> JSONResponse:
        return JSONResponse({"prompt": checked("tokens", lambda: served.tokenizer.decode(fields.ids("tokens")))})

    return await run_in_threadpool(answer)


async def tokenizer_info(request: HttpRequest) -> JSONResponse:
    """Answer GET /tokenizer_info."""
    service = service_of(request)
    served = service.model(request.query_params.get("model"))
    tokenizer = served.tokenizer
    end = None if tokenizer.end_of_text is None else spelled(tokenizer, tokenizer.end_of_text)
    return JSONResponse(
        {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_token": end,
            "eos_token_id": tokenizer.end_of_text,
            "bos_token": None,
            "pad_token": None,
            "chat_template": to_jinja(served.template),
            "hash": tokenizer.hash,
        }
    )
