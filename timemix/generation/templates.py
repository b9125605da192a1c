"""Chat templates: rules that write the messages of a conversation as one text, which the model continues.

The template of the RWKV World models separates messages by a blank line:

    System: Answer in one sentence.

    User: Hello!

    Assistant:
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from timemix.errors import InvalidValue, nearest
from timemix.tokenizers.base import Tokenizer

Role = Literal["system", "user", "assistant"]

_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: Author of the message: "system", "user" or "assistant".
        content: Text of the message.

    Raises:
        InvalidValue: The role is unknown.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InvalidValue(f"role={self.role!r} is not supported{nearest(str(self.role), get_args(Role))}")


@dataclass(frozen=True)
class ChatTemplate:
    """Write messages as a text.

    Args:
        name: Name of the template.
        separator: Text between two messages.
        stop: Stop strings that end an answer.
        has_labels: Whether the label of its role precedes each message, as in "User: Hello!". The messages of a
            template without labels are parts of one text, and keep every character.
    """

    name: str
    separator: str
    stop: tuple[str, ...] = ()
    has_labels: bool = False

    def label(self, role: Role) -> str:
        """Return the label of a role, such as "User:"; empty in a template without labels."""
        return f"{role.capitalize()}:" if self.has_labels else ""

    @property
    def space(self) -> str:
        """Text between a label and its message, with which the model begins an answer."""
        return " " if self.has_labels else ""

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that the model continues with the next answer.

        Messages keep their order, and several messages of one role may follow one another. Empty messages are left out.
        The model continues the last message if its role is "assistant", and otherwise begins a new message.

        A template with labels removes white space at both ends of a message. It also replaces blank lines in system and
        user messages by one line end, so that such a message cannot contain the separator: a line "User: ..." inside
        the message does not begin a new message. Messages of the assistant keep their blank lines, because the model
        has generated these blank lines.

        Args:
            messages: The messages, at least one.

        Returns:
            The text.

        Raises:
            InvalidValue: There are no messages.
        """
        if not messages:
            raise InvalidValue("messages is empty; give at least one message")
        *before, last = messages
        texts = [self._written(message) for message in before]
        if last.role == "assistant":
            texts.append(self._begun(last))
        else:
            texts += [self._written(last), self.label("assistant")]
        return self.separator.join(text for text in texts if text)

    def _written(self, message: Message) -> str:
        """Return a whole message with its label; empty if the message is empty."""
        text = self._cleaned(message).rstrip() if self.has_labels else message.content
        return f"{self.label(message.role)}{self.space}{text}" if text else ""

    def _begun(self, message: Message) -> str:
        """Return an unfinished message of the assistant with its label. Its last character may be white space."""
        text = self._cleaned(message)
        return self.label(message.role) + (self.space + text if text else "")

    def _cleaned(self, message: Message) -> str:
        """Return the text of a message without white space at its start, and without blank lines unless generated."""
        if not self.has_labels:
            return message.content
        text = message.content.replace("\r\n", "\n").replace("\r", "\n").lstrip()
        return text if message.role == "assistant" else _BLANK_LINES.sub("\n", text)

    def following(self, messages: Sequence[Message], end: str) -> str:
        """Return the text to read after a conversation so far, before the next answer.

        Args:
            messages: The next messages, at least one.
            end: End of the conversation so far. Its last characters may already begin the next message: the model
                generates the stop string before the stop string ends an answer.

        Returns:
            The part of the separator and of the next messages that does not end the conversation so far.

        Raises:
            InvalidValue: There are no messages.
        """
        text = self.separator + self.render(messages)
        longest = len(self.separator + self.label(messages[0].role))
        return text[next(n for n in range(longest, -1, -1) if end.endswith(text[:n])) :]


WORLD = ChatTemplate("world", "\n\n", stop=("\n\nUser:",), has_labels=True)
"""Template of the RWKV World models. The end-of-text token ends an answer too."""

PLAIN = ChatTemplate("plain", "\n")
"""Template of models that do not know conversations: the messages are lines of a text, which the model continues."""

TEMPLATES = {template.name: template for template in (WORLD, PLAIN)}
"""All templates, by name."""


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template of the models that use a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        `WORLD` for the World tokenizer, otherwise `PLAIN`.
    """
    return WORLD if tokenizer.kind == "world" else PLAIN
