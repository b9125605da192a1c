"""Requests to the engine, and the events that answer them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from timemix.errors import InvalidValue, nearest
from timemix.generation.sampler import Sampler
from timemix.generation.session import Session

Context = Literal["reanchor", "exact"]


@dataclass(frozen=True)
class Request:
    """Describe one text to generate.

    Past the model's `max_position`, "reanchor" reads the newest share `keep` of the context again at position 0 and
    continues, so that the cost per token stays constant. "exact" reads the newest max_position tokens for every token,
    as the original code did. A longer prompt is cut to its end.

    Args:
        prompt: Token ids to read first; may be empty where `start` is given.
        tokens: Largest number of tokens to generate, at least 0.
        sampler: Settings of one row.
        seed: 0 to 2^64 - 1; a draw depends on (seed, sample, number of the token) alone.
        sample: Number of the sample, 0 to 2^64 - 1.
        stop: Strings; the text ends before the first of them.
        log_probabilities: Report each token's log-probability in nats, at temperature 1 and before any filter.
        start: Session to continue, None for a new text.
        keep_session: Return the session with the last event.
        context: "reanchor" or "exact".
        keep: Share of the context that "reanchor" keeps, above 0 and at most 1.

    Raises:
        InvalidValue: An empty prompt or stop string, or a number out of its range.
    """

    prompt: Sequence[int]
    tokens: int = 200
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    sample: int = 0
    stop: tuple[str, ...] | str = ()
    log_probabilities: bool = False
    start: Session | None = None
    keep_session: bool = False
    context: Context = "reanchor"
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise InvalidValue(f"sampler is {self.sampler!r}; it must be a Sampler")
        if self.context not in get_args(Context):
            raise InvalidValue(
                f"context={self.context!r} is not supported{nearest(str(self.context), get_args(Context))}"
            )
        if isinstance(self.prompt, str):
            raise InvalidValue("prompt is a text; a request takes token ids: tokenizer.encode(text).tolist()")
        if len(self.prompt) == 0 and (self.start is None or self.start.unread == 0):
            raise InvalidValue("the prompt is empty; give at least one token")
        if self.tokens < 0:
            raise InvalidValue(f"tokens is {self.tokens}; it must be at least 0")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("seed", "sample"):
            if not 0 <= getattr(self, name) < 2**64:
                raise InvalidValue(f"{name} must be a whole number from 0 to 2^64 - 1, not {getattr(self, name)}")
        if "" in self.stop:
            raise InvalidValue("a stop string is empty; give at least one character")
        if not self.sampler.is_of_one_row:
            raise InvalidValue("the sampler of a request has one number for each field, not one per row")
        if not 0 < self.keep <= 1:
            raise InvalidValue(f"keep is {self.keep}; it is a share of the context, above 0 and at most 1")


@dataclass(frozen=True)
class Event:
    """Report one token of a request, or its end.

    Args:
        id: Id of the request, from `Engine.add`.
        token: Token id, None at an end without a token.
        text: Complete characters that do not begin a stop string; the last event brings what was held back.
        log_probability: In nats, None unless the request asks for it.
        finished: "length" or "stop" at the end, otherwise None.
        session: With the last event, where the request asks for it.
    """

    id: int
    token: int | None
    text: str
    log_probability: float | None = None
    finished: Literal["length", "stop"] | None = None
    session: Session | None = None
