"""The endpoint /v1/chat/completions: the messages become one text by the chat template of the model."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from timemix.data.templates import ChatTemplate, Message, Role
from timemix.generation.conversation import without_stop_token
from timemix.generation.session import Session
from timemix.server.answers import Call, Form, Piece, Score
from timemix.server.completions import (
    MOST_TOP,
    build_request,
    check_repeated,
    engine_fields,
    keeper,
    spelled,
    state_fields,
    stream_fields,
)
from timemix.server.engine_thread import Served
from timemix.server.errors import ApiError
from timemix.server.fields import Fields, checked
from timemix.server.responses import respond
from timemix.server.service import service_of
from timemix.tokenizers.base import Tokenizer

DEFAULT_TOKENS = 1024
"""Largest number of tokens of an answer if the body names none."""

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of the API, with their roles in a template."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "chat_template": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Fields of other servers that change the answer and are not supported, with their values that change nothing."""


async def chat(request: HttpRequest) -> Response:
    """Answer POST /v1/chat/completions."""
    service = service_of(request)
    fields = await Fields.read(request, service.most_bytes)
    served = service.model(fields.text("model"))
    template, tokenizer = served.template, served.tokenizer
    messages = await run_in_threadpool(messages_of, fields)
    asked = answer_fields(fields, served, template) | await state_fields(request, fields, served)
    start = asked["start"]
    if start is not None and tokenizer.end_of_text is not None:
        # The end of a text must not stand between two messages.
        start = asked["start"] = without_stop_token(start, [tokenizer.end_of_text])
    ids = await run_in_threadpool(_prompt, messages, template, tokenizer, start)
    requests = [await run_in_threadpool(build_request, ids, asked, served, "messages")]
    if fields.flag("return_token_ids"):
        check_repeated(requests)
    is_begun = messages[-1].role == "assistant" and bool(messages[-1].content.strip())
    call = Call(
        served=served,
        form=ChatForm("" if is_begun else template.space),
        requests=requests,
        echo=[],
        scored=asked["log_probabilities"],
        returns_ids=fields.flag("return_token_ids"),
        keep=keeper(request, fields, served, requests),
        **stream_fields(fields),
    )
    return await respond(request, call, service.thread)


def answer_fields(fields: Fields, served: Served, template: ChatTemplate) -> dict[str, Any]:
    """Return the arguments of the engine's Request, apart from the prompt.

    Args:
        fields: Fields of the body.
        served: The model.
        template: Chat template of the model.

    Raises:
        ApiError: A field is wrong or not supported.
    """
    for name, harmless in UNSUPPORTED.items():
        fields.unsupported(name, harmless)
    is_scored, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, MOST_TOP)
    if top and not is_scored:
        raise ApiError(400, "top_logprobs needs logprobs: true; leave top_logprobs out", "top_logprobs")
    limit = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    asked = engine_fields(fields, served, DEFAULT_TOKENS, limit)
    return asked | {
        "stop": (*template.stop, *asked["stop"]),
        "log_probabilities": is_scored,
        "top_log_probabilities": top,
    }


def _prompt(messages: list[Message], template: ChatTemplate, tokenizer: Tokenizer, start: Session | None) -> list[int]:
    """Return the token ids of the text of messages, which may continue the text of a session."""
    # The text of a session may end with a stop string, which begins the next message.
    end = "" if start is None else tokenizer.decode(start.tokens)
    first = next((message.role for message in messages if message.content.strip()), "user")
    if template.stop and end.endswith(template.stop) and first != "user":
        raise ApiError(
            400,
            "the text of the state ends with the beginning of a user message; let messages begin with the role user",
            "messages",
        )
    text = template.following(messages, end) if start is not None and start.tokens else template.render(messages)
    return checked("messages", lambda: tokenizer.encode(text).tolist())


def messages_of(fields: Fields) -> list[Message]:
    """Return the messages of a body.

    Args:
        fields: Fields of the body.

    Raises:
        ApiError: The field `messages` is missing or wrong.
    """
    given = fields.get("messages")
    if given is None:
        raise ApiError(400, "messages is missing; give a list of messages", "messages")
    if not (isinstance(given, list) and given):
        fields.refuse("messages", "a list of at least one message")
    return [_message(f"messages[{i}]", each) for i, each in enumerate(given)]


def _message(name: str, given: Any) -> Message:
    """Return one message."""
    if not isinstance(given, dict):
        Fields({name: given}).refuse(name, "an object with role and content")
    own = Fields({f"{name}.{key}": value for key, value in given.items()})
    role = f"{name}.role"
    if own.get(role) is None:
        raise ApiError(400, f"{role} is missing; give one of {', '.join(ROLES)}", role)
    own.unsupported(f"{name}.tool_calls", ([],))
    message = Message(ROLES[own.one_of(role, "", ROLES)], _content(own, f"{name}.content"))
    # Only an answer, such as one of tool calls, may have no content.
    if message.role != "assistant" and own.get(f"{name}.content") is None:
        raise ApiError(400, f"{name}.content is missing; give a string", f"{name}.content")
    return message


def _content(own: Fields, name: str) -> str:
    """Return the text of a message: a string, the lines of a list of text parts, or "" for null."""
    given = own.get(name)
    if not isinstance(given, list):
        return own.text(name) or ""
    texts = []
    for i, part in enumerate(given):
        part_name = f"{name}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f" of type {kind!r}" if isinstance(kind, str) else ""
            raise ApiError(400, f"{part_name} is no text{shown}; send parts of the type 'text' alone", part_name)
        text = Fields({f"{part_name}.text": part.get("text")}).text(f"{part_name}.text")
        if text is None:
            raise ApiError(400, f"{part_name}.text is missing; give a string", f"{part_name}.text")
        texts.append(text)
    return "\n".join(texts)


class ChatForm(Form):
    """The form of /v1/chat/completions.

    Args:
        space: Text with which the model begins an answer, and which the answer leaves out.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, space: str) -> None:
        self.space = space

    def opening(self, index: int) -> dict[str, Any]:
        """Return the choice of the first chunk, which holds the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, piece: Piece, tokenizer: Tokenizer, *, is_part: bool) -> dict[str, Any]:
        """Return a choice."""
        content = {"content": piece.text} if piece.text or not is_part else {}
        body = {"delta": content} if is_part else {"message": {"role": "assistant"} | content | {"refusal": None}}
        scores = None
        if piece.scores is not None:
            scores = {"content": [_score(score, tokenizer) for score in piece.scores], "refusal": None}
        return {"index": piece.index} | body | {"logprobs": scores, "finish_reason": piece.finish} | piece.extras


def _score(score: Score, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the log-probability of a token, and those of the most probable tokens."""
    top = [_entry(token, value, tokenizer) for token, value in score.top]
    return _entry(score.token, score.log_probability, tokenizer) | {"top_logprobs": top}


def _entry(token: int, log_probability: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": spelled(tokenizer, token),
        "logprob": log_probability,
        "bytes": list(tokenizer.piece(token)),
    }
