"""Requests to the engine, and the events that answer them."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

from timemix.errors import InvalidValue, nearest
from timemix.generation.sampler import Sampler
from timemix.generation.session import Session

Context = Literal["reanchor", "exact"]


@dataclass(frozen=True)
class Request:
    """Describe one text to generate, or several samples that continue one prompt.

    Past the model's `max_position`, "reanchor" reads the newest share `keep` of the context again at position 0 and
    continues, so that the cost per token stays constant. "exact" reads the newest max_position tokens for every token,
    as the original code did. A longer prompt is cut to its end.

    Args:
        prompt: Token ids to read first; may be empty where `start` is given.
        tokens: Largest number of tokens to generate, at least 0.
        sampler: Settings of one row.
        seed: 0 to 2^64 - 1; a draw depends on (seed, sample, number of the token) alone.
        sample: Number of the first sample, 0 to 2^64 - 1.
        stop: Strings; the text ends before the first of them.
        log_probabilities: Report each token's log-probability in nats, at temperature 1, before bias and filters.
        start: Session to continue, None for a new text.
        keep_session: Return the session with the last event. Text that may begin a stop string, or an unfinished
            character, then stays in the session, and the text that continues it begins with it.
        context: "reanchor" or "exact".
        keep: Share of the context that "reanchor" keeps, above 0 and at most 1.
        samples: Number of samples, at least 1; the prompt is read once for all of them.
        stop_tokens: Token ids; the text ends before the first of them. The token itself is drawn: the last event
            reports it, and a session that continues reads it.
        logit_bias: Numbers added to the logits of token ids before the sampler; -inf excludes a token.
        top_log_probabilities: Number of most probable tokens to report with each token, at least 0.
        prompt_log_probabilities: Report the log-probability of each token of the prompt, with the first event.

    Raises:
        InvalidValue: An empty prompt or stop string, a value of a wrong type, or a number out of its range.
    """

    prompt: Sequence[int]
    tokens: int = 200
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    sample: int = 0
    stop: Sequence[str] | str = ()
    log_probabilities: bool = False
    start: Session | None = None
    keep_session: bool = False
    context: Context = "reanchor"
    keep: float = 0.5
    samples: int = 1
    stop_tokens: Sequence[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_log_probabilities: int = 0
    prompt_log_probabilities: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise InvalidValue(f"sampler is {self.sampler!r}; it must be a Sampler")
        if not self.sampler.is_of_one_row:
            raise InvalidValue("the sampler of a request has one number for each field, not one per row")
        if not (self.start is None or isinstance(self.start, Session)):
            raise InvalidValue(f"start is {self.start!r}; it must be a Session or None")
        if self.context not in get_args(Context):
            raise InvalidValue(
                f"context={self.context!r} is not supported{nearest(str(self.context), get_args(Context))}"
            )
        if not (_is_real(self.keep) and 0 < self.keep <= 1):
            raise InvalidValue(f"keep is {self.keep!r}; it is a share of the context, above 0 and at most 1")
        for name, low in {"tokens": 0, "samples": 1, "top_log_probabilities": 0}.items():
            value = getattr(self, name)
            if not (is_integer(value) and value >= low):
                raise InvalidValue(f"{name} is {value!r}; it must be a whole number, at least {low}")
        for name in ("seed", "sample"):
            value = getattr(self, name)
            if not (is_integer(value) and 0 <= value < 2**64):
                raise InvalidValue(f"{name} must be a whole number from 0 to 2^64 - 1, not {value!r}")
        if self.sample + self.samples > 2**64:
            raise InvalidValue(f"sample is {self.sample}: the last of {self.samples} samples would be past 2^64 - 1")
        if self.start is not None and not 0 <= self.start.written < 2**63:
            raise InvalidValue(f"the session to continue says that {self.start.written} tokens were generated")
        self._check_prompt()
        self._check_ends()

    def _check_prompt(self) -> None:
        if isinstance(self.prompt, str):
            raise InvalidValue("prompt is a text; a request takes token ids: tokenizer.encode(text).tolist()")
        # Plain numbers: what a caller changes in its list later changes no request.
        self._set("prompt", _ids("prompt", self.prompt))
        if len(self.prompt) == 0 and (self.start is None or self.start.unread == 0):
            raise InvalidValue("the prompt is empty; give at least one token")

    def _check_ends(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop))
        for each in self.stop:
            if not isinstance(each, str):
                raise InvalidValue(f"stop holds {each!r}; it takes strings")
        if "" in self.stop:
            raise InvalidValue("a stop string is empty; give at least one character")
        self._set("stop_tokens", _ids("stop_tokens", self.stop_tokens))
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidValue(f"logit_bias is {self.logit_bias!r}; it maps token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not (is_integer(token) and _is_real(bias) and (bias == -math.inf or abs(bias) <= sys.float_info.max)):
                raise InvalidValue(f"logit_bias holds {token!r}: {bias!r}; it maps token ids to finite numbers or -inf")
        self._set("logit_bias", {int(token): float(bias) for token, bias in self.logit_bias.items()})

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def token_ids(self) -> Iterable[int]:
        """All token ids that the request names."""
        old = () if self.start is None else (*self.start.tokens, *self.start.seen)
        return (*self.prompt, *old, *self.stop_tokens, *self.logit_bias)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, of Python or numpy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    try:
        # Numbers of an array or a tensor are those of Python.
        return tuple(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        raise InvalidValue(f"{name} is {values!r}; it must be a sequence") from None


def _ids(name: str, values: Any) -> tuple[int, ...]:
    listed = _listed(name, values)
    for each in listed:
        if not is_integer(each):
            raise InvalidValue(f"{name} holds {each!r}; a token id is a whole number")
    return tuple(map(int, listed))


@dataclass(frozen=True)
class Event:
    """Report one token of a request, or its end.

    Args:
        id: Id of the request, from `Engine.add`.
        token: Token id, None at an end without a token.
        text: Complete characters that do not begin a stop string; the last event brings what was held back.
        log_probability: In nats, None unless the request asks for it.
        finished: "length", "stop" or "error" at the end, otherwise None.
        session: With the last event, where the request asks for it.
        sample: Number of the sample.
        top_log_probabilities: (token id, log-probability) of the most probable tokens, the most probable first.
        prompt_log_probabilities: With the first event, where the request asks for it: in nats for each token of the
            prompt, None where the model read no token before it.
        reason: A sentence at an end with "error", otherwise None.
    """

    id: int
    token: int | None
    text: str
    log_probability: float | None = None
    finished: Literal["length", "stop", "error"] | None = None
    session: Session | None = None
    sample: int = 0
    top_log_probabilities: tuple[tuple[int, float], ...] = ()
    prompt_log_probabilities: tuple[float | None, ...] | None = None
    reason: str | None = None
