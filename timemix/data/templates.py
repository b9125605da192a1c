"""Chat templates: rules that write the messages of a conversation as one text, for training and for answers.

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
_BLANK_LINES_BEFORE_LABEL = re.compile(rf"\n\s*\n(?=({'|'.join(role.capitalize() for role in get_args(Role))}):)")


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

    def segments(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Return a whole conversation for training, divided into the texts that the model reads and generates.

        The texts of the assistant begin with `space`. If a message of the user follows, they end with the stop string,
        as an answer does that the model generates. The end-of-text token must follow the last text.

        The joined texts are those of `render`, with one exception: in a template with labels, the blank lines before a
        line of an answer that begins with a label are replaced by one line end. Otherwise the answer would contain the
        stop string, or imitate another message.

        Args:
            messages: The messages. The last message that is not empty must be of the assistant.

        Returns:
            Pairs of a text and whether the model generates this text. Texts that it reads and texts that it generates
            take turns.

        Raises:
            InvalidValue: No message of the assistant has text, or a message of another role follows the last answer.
        """
        written = [(message.role, text) for message in messages if (text := self._trained(message))]
        if not any(role == "assistant" for role, _ in written):
            raise InvalidValue("no message of the assistant has text")
        if (last := written[-1][0]) != "assistant":
            raise InvalidValue(f"the last message is of the {last}, not of the assistant")
        found: list[tuple[str, bool]] = []
        read = before = ""
        for number, (role, text) in enumerate(written):
            # The stop string of the answer before may already contain the beginning of this message.
            text = (self.separator + text if number else text).removeprefix(before)
            before = ""
            if role != "assistant":
                read += text
                continue
            label = self.label(role)
            start = text.index(label) + len(label)
            following = "" if number + 1 == len(written) else self.separator + written[number + 1][1]
            before = next((stop for stop in self.stop if following.startswith(stop)), "")
            found += [(read + text[:start], False), (text[start:] + before, True)]
            read = ""
        return found

    def _trained(self, message: Message) -> str:
        """Return a whole message with its label, without a line that could end an answer; empty if it is empty."""
        text = self._written(message)
        return _BLANK_LINES_BEFORE_LABEL.sub("\n", text) if self.has_labels else text

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
        # The token with the end of the stop string may also contain the space after the label.
        longest = len(self.separator + self.label(messages[0].role) + self.space)
        return text[next(n for n in range(longest, -1, -1) if end.endswith(text[:n])) :]


WORLD = ChatTemplate("world", "\n\n", stop=("\n\nUser:",), has_labels=True)
"""Template of the RWKV World models. The end-of-text token ends an answer too."""

PLAIN = ChatTemplate("plain", "\n")
"""Template of models that do not know conversations: the messages are lines of a text, which the model continues."""

TEMPLATES = {template.name: template for template in (WORLD, PLAIN)}
"""All templates, by name."""


def template_of(tokenizer: Tokenizer, trained: str | None = None) -> ChatTemplate:
    """Return the chat template of a model.

    Args:
        tokenizer: Tokenizer of the model.
        trained: Name of the template of the conversations that the model was trained on; None: other text.

    Returns:
        The template of the training. Without it, `WORLD` for the World tokenizer, otherwise `PLAIN`.
    """
    if trained is not None:
        return TEMPLATES[trained]
    return WORLD if tokenizer.kind == "world" else PLAIN
