"""A conversation with a model: each turn continues the session of the turns before, so no text is read twice."""

import copy
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from timemix.data.templates import ChatTemplate, Message
from timemix.errors import InvalidValue, NotFinite
from timemix.generation.engine import Engine
from timemix.generation.request import Context, Finished, Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import Session

TURNS_KEPT = 16
"""Number of newest turns that `Conversation.undo` can remove. Each of these turns holds one state."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Args:
        message: The user's message.
        prompt: Token ids that the model reads before the answer.
        before: Session before the turn; None: the turn began the conversation.
        attempt: Number of answers to the message before this answer.
    """

    message: str
    prompt: tuple[int, ...]
    before: Session | None
    attempt: int = 0


class Conversation:
    """Generate answers to messages, one after another.

    Args:
        engine: Engine with a tokenizer, on which no other requests run.
        template: Chat template of the model.
        system: System message that begins the conversation; empty: none.
        tokens: Largest number of tokens of an answer, at least 0.
        sampler: Sampler of the tokens.
        seed: Random seed, 0 to 2^64 - 1; the same seed and messages give the same answers.
        stop: Stop strings besides those of the template.
        context: Rule for a full context, see `Request`.

    Attributes:
        session: Session of the conversation; None: empty.
        tokens_cut: Number of tokens at the beginning of the newest message that the model did not read, because the
            message is longer than the context.
    """

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        *,
        system: str = "",
        tokens: int = 200,
        sampler: Sampler | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        context: Context = "reanchor",
    ) -> None:
        if engine.tokenizer is None:
            raise InvalidValue("engine has no tokenizer; pass one to Engine")
        if template.has_labels and engine.tokenizer.spaced:
            raise InvalidValue(
                f"the template {template.name} needs case and spaces, which the word tokenizer of the model loses;"
                " choose the template plain"
            )
        self._engine, self._tokenizer, self._template, self._system = engine, engine.tokenizer, template, system
        end = self._tokenizer.end_of_text
        # Each turn replaces the prompt, the session and the sample.
        self._pattern = Request(
            [0],
            tokens,
            sampler or Sampler(),
            seed,
            stop=(*template.stop, *stop),
            stop_tokens=() if end is None else (end,),
            context=context,
            keep_session=True,
        )
        self._turns: deque[Turn] = deque(maxlen=TURNS_KEPT)
        # Newest session that this conversation has made, and why its answer ended (None: the caller ended it).
        self._ended: tuple[Session | None, Finished | None] = (None, None)
        self.session: Session | None = None
        self.tokens_cut = 0

    def fork(self) -> "Conversation":
        """Return a copy, so that the original and the copy can continue in different ways. Both use one engine."""
        other = copy.copy(self)
        other._turns = self._turns.copy()
        return other

    def restart(self, session: Session) -> None:
        """Continue another text from now on. No turn before can be undone.

        Args:
            session: Session of the text.
        """
        self._turns.clear()
        self.session = session

    @property
    def is_unfinished(self) -> bool:
        """Whether the last answer ended before a stop string or a stop token, so that `proceed` can continue it."""
        if self.session is None or not self.session.tokens:
            return False
        session, reason = self._ended
        if self.session is session:
            return reason != "stop"
        if self.session.tokens[-1] in self._pattern.stop_tokens:
            return False
        end = self._end(self.session)
        # A stop string ends an answer at the first token with its end, which may have more text after it.
        new = len(end) - len(self._tokenizer.decode(self.session.tokens[:-1]))
        return not any(stop in end[-(max(new, 1) + len(stop) - 1) :] for stop in self._pattern.stop)

    def say(self, message: str) -> Generator[str, None, None]:
        """Generate the answer to a message.

        If the caller stops the iteration after a token, the answer ends there. If the caller stops the iteration before
        the first token, or an error occurs, the conversation does not change.

        Args:
            message: The message, not empty.

        Returns:
            Generator of the pieces of the answer. A piece may be empty, so that the caller can stop the iteration
            while the model reads a long message.

        Raises:
            InvalidValue: The message is empty, or has characters outside the vocabulary.
            NotFinite: The logits of the model are not finite.
        """
        if not message.strip():
            raise InvalidValue("the message is empty; give at least one character")
        messages = [Message("user", message)]
        if self.session is None or not self.session.tokens:
            text = self._template.render([Message("system", self._system), *messages])
        else:
            text = self._template.following(messages, self._end(self.session))
        return self._take(Turn(message, tuple(self._tokenizer.encode(text).tolist()), self.session))

    def proceed(self) -> Generator[str, None, None]:
        """Continue an unfinished answer.

        Returns:
            Generator of the pieces of the answer, as in `say`.

        Raises:
            InvalidValue: No answer is unfinished.
            NotFinite: The logits of the model are not finite.
        """
        if not self.is_unfinished:
            raise InvalidValue("no answer is unfinished; give a message")
        return self._answer((), self.session, self._turns[-1].attempt if self._turns else 0)

    def undo(self) -> Turn:
        """Remove the last turn.

        Returns:
            The removed turn.

        Raises:
            InvalidValue: There is no turn, or `TURNS_KEPT` turns are already removed.
        """
        turn = self._last_turn()
        self._turns.pop()
        self.session = turn.before
        return turn

    def retry(self) -> Generator[str, None, None]:
        """Replace the last answer by another answer to the same message.

        Returns:
            Generator of the pieces of the answer, as in `say`.

        Raises:
            InvalidValue: There is no turn, or `TURNS_KEPT` turns are already removed.
            NotFinite: The logits of the model are not finite.
        """
        turn = self._last_turn()
        return self._take(replace(turn, attempt=turn.attempt + 1))

    def _last_turn(self) -> Turn:
        if not self._turns:
            raise InvalidValue("there is no turn to remove; give a message")
        return self._turns[-1]

    def _end(self, session: Session) -> str:
        """Return the last characters of the text of a session."""
        return self._tokenizer.decode(session.tokens)

    def _take(self, turn: Turn) -> Generator[str, None, None]:
        """Yield the answer of a turn. If the answer has a token, add the turn, or replace the earlier attempt."""
        before = self.session
        try:
            yield from self._answer(turn.prompt, turn.before, turn.attempt)
        finally:
            if self.session is not before:
                if turn.attempt:
                    self._turns.pop()
                self._turns.append(turn)

    def _answer(self, prompt: tuple[int, ...], before: Session | None, attempt: int) -> Generator[str, None, None]:
        """Yield the pieces of an answer. If the answer has a token, store its session."""
        start = None if before is None else without_stop_token(before, self._pattern.stop_tokens)
        number = self._engine.add(replace(self._pattern, prompt=prompt, start=start, sample=attempt))
        self.tokens_cut = max(0, len(prompt) - (self._engine.model.max_position or len(prompt)))
        space = self._template.space if prompt else ""
        has_token, session, reason = False, None, None
        try:
            while self._engine.busy:
                text = ""
                for event in self._engine.step():
                    if event.finished == "error":
                        raise NotFinite(f"the answer cannot continue: {event.reason}")
                    has_token = has_token or event.token is not None
                    text, session, reason = event.text, event.session, event.finished
                if text:
                    text, space = text.removeprefix(space), ""
                yield text
        except GeneratorExit:
            if session is None and has_token:
                session = self._engine.session(number)
            raise
        finally:
            self._engine.cancel(number)
            if session is not None:
                self.session, self._ended = session, (session, reason)


def without_stop_token(session: Session, stop_tokens: Sequence[int]) -> Session:
    """Return a session without its last token if this token is a stop token, which the model must not read.

    Args:
        session: The session.
        stop_tokens: Ids of the stop tokens.
    """
    if not session.tokens or session.tokens[-1] not in stop_tokens:
        return session
    return replace(session, tokens=session.tokens[:-1], unread=session.unread - 1)
