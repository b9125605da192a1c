"""Conversations in records: the messages of a record become a text with marks, by a chat template."""

from typing import Any

from timemix.data.marks import COUNTED, UNCOUNTED
from timemix.data.templates import ChatTemplate, Message, Role
from timemix.errors import InvalidValue, nearest

ROLES: tuple[Role, ...] = ("system", "user", "assistant")

CHAT_KEYS = ("messages", "prompt", "completion")
"""Keys of a record that hold a conversation."""


def marked_conversation(record: dict[str, Any], template: ChatTemplate, place: str) -> str:
    """Return the text of the conversation in a record. The loss counts only the messages of the assistant.

    Args:
        record: Either `messages`, a list of messages with `role` and `content`, or the texts `prompt` and `completion`.
        template: The chat template.
        place: File and number of the record, for messages.

    Returns:
        The text, which begins with UNCOUNTED. It ends with a counted text, after which the end of text must follow.

    Raises:
        InvalidValue: The record has no conversation, or a message is wrong.
    """
    messages = _messages(record, place)
    try:
        segments = template.segments(messages)
    except InvalidValue as error:
        raise InvalidValue(f"{place} has a conversation without an answer to learn: {error}; remove it") from error
    return "".join((COUNTED if is_counted else UNCOUNTED) + text for text, is_counted in segments)


def _messages(record: dict[str, Any], place: str) -> list[Message]:
    """Return the messages of a record."""
    given = record.get("messages")
    if given is None:
        texts = [record.get("prompt"), record.get("completion")]
        if texts == [None, None]:
            raise InvalidValue(
                f"{place} has neither 'messages' nor 'prompt' and 'completion', which data.template needs in every"
                " record; correct or remove the record"
            )
        return [
            Message(role, _content(text, key, place))
            for role, key, text in zip(ROLES[1:], ("prompt", "completion"), texts, strict=True)
        ]
    if not (isinstance(given, list) and given):
        raise InvalidValue(f"{place} has 'messages' {_kind(given)}; it must be a list of at least one message")
    return [_message(message, f"messages[{i}]", place) for i, message in enumerate(given)]


def _message(given: Any, name: str, place: str) -> Message:
    """Return one message."""
    if not isinstance(given, dict):
        raise InvalidValue(f"{place} has {name} {_kind(given)}; it must be an object with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in given:
            raise InvalidValue(f"{place} has no {key!r} in {name}{nearest(key, given)}")
    role = given["role"]
    if role not in ROLES:
        shown = repr(role) if isinstance(role, str) else _kind(role)
        raise InvalidValue(f"{place} has the role {shown} in {name}; it must be system, user or assistant")
    return Message(role, _content(given["content"], f"{name}.content", place))


def _content(given: Any, name: str, place: str) -> str:
    """Return the text of a message."""
    if not isinstance(given, str):
        raise InvalidValue(f"{place} has {name!r} {_kind(given)}; it must be a text")
    refuse_lone_surrogate(given, name, place)
    return given


def refuse_lone_surrogate(text: str, name: str, place: str) -> None:
    """Raise InvalidValue if a text of a record has a lone surrogate.

    Args:
        text: The text.
        name: Key of the text.
        place: File and number of the record, for the message.
    """
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise InvalidValue(f"{place} has the lone surrogate {code} in {name!r}; remove it") from error


def _kind(value: Any) -> str:
    """Return the end of a clause about a JSON value that is no text."""
    if isinstance(value, list):
        return "as a list of parts" if value else "as an empty list"
    names = {type(None): "null", bool: "as true or false", float: "as a number", int: "as a number", str: "as a text"}
    return names.get(type(value), "as an object")
