"""Requests to the engine, and the events with which the engine answers a request."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

from timemix.errors import InvalidValue, nearest
from timemix.generation.sampler import Sampler
from timemix.generation.session import Session

Context = Literal["reanchor", "exact"]
Finished = Literal["length", "stop", "error"]


@dataclass(frozen=True, eq=False)
class Request:
    """Describe one text to generate, or several samples that continue one prompt.

    The context is full when its length reaches the model's `max_position`. With `context="reanchor"`, the model
    processes the newest share `keep` of a full context again from position 0, so that the cost per token stays
    constant. With `context="exact"`, the model processes the newest `max_position` tokens again for every new token, as
    in the original 2021 code. If a prompt has more than `max_position` tokens, the model uses only the last
    `max_position` tokens.

    Args:
        prompt: Token ids that the text continues, at least one; may be empty if `start` is given.
        tokens: Largest number of tokens to generate, at least 0.
        sampler: Sampler of the tokens, with one number in each field.
        seed: Random seed, 0 to 2^64 - 1; a draw depends on (seed, sample, number of the token) alone.
        sample: Number of the first sample, 0 to 2^64 - 1.
        stop: One stop string or several; the text ends before the first stop string that occurs.
        log_probabilities: Whether to report each token's log-probability in nats, at temperature 1, before bias and
            filters.
        start: Session to continue; None: a new text.
        keep_session: Whether to return the session with the last event. A returned session holds back text that may
            begin a stop string, and an unfinished character. A request that continues the session without a prompt
            emits this text first. With a prompt, this text is never emitted, although the model has read it.
        context: Rule for a full context, "reanchor" or "exact", as described above.
        keep: Share of the context that "reanchor" processes again, above 0 and at most 1.
        samples: Number of samples, at least 1; the prompt is processed once for all samples.
        stop_tokens: Token ids; the text ends before the first stop token that is drawn. The last event reports the stop
            token, and the session contains the stop token.
        logit_bias: Numbers, by token id, that are added to the logits before sampling; -inf excludes a token.
        top_log_probabilities: Number of most probable tokens to report with each token, at least 0. Prompt tokens are
            included if `prompt_log_probabilities` is set.
        prompt_log_probabilities: Whether the first event reports the log-probability of each prompt token. Such a
            request does not use the engine's cache, because the model must process the whole prompt.
        scope: Name of the group of requests, such as the requests of one user, that share the engine's cache.
        reuse_decoded: Whether the engine's cache may store states of generated tokens for this request, and give such
            states to this request. With the compiled step, these states are bit-identical to the states of a prompt.
            With the model's own forward pass, they agree to 1e-5.

    Raises:
        InvalidValue: The prompt or a stop string is empty, a value has a wrong type, or a number is out of its range.
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
    scope: str = ""
    reuse_decoded: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise InvalidValue(f"sampler is {self.sampler!r}; it must be a Sampler")
        if not self.sampler.is_of_one_row:
            raise InvalidValue(
                "sampler has a field with one number per row; pass the sampler of one row: sampler.row(i)"
            )
        if not (self.start is None or isinstance(self.start, Session)):
            raise InvalidValue(f"start is {self.start!r}; it must be a Session or None")
        if self.context not in get_args(Context):
            raise InvalidValue(
                f"context={self.context!r} is not supported{nearest(str(self.context), get_args(Context))}"
            )
        if not (_is_real(self.keep) and 0 < self.keep <= 1):
            raise InvalidValue(f"keep is {self.keep!r}; it must be a share of the context, above 0 and at most 1")
        for name, low in {"tokens": 0, "samples": 1, "top_log_probabilities": 0}.items():
            value = getattr(self, name)
            if not (is_integer(value) and value >= low):
                raise InvalidValue(f"{name} is {value!r}; it must be a whole number, at least {low}")
        for name in ("seed", "sample"):
            value = getattr(self, name)
            if not (is_integer(value) and 0 <= value < 2**64):
                raise InvalidValue(f"{name} is {value!r}; it must be a whole number from 0 to 2^64 - 1")
        if self.sample + self.samples > 2**64:
            raise InvalidValue(
                f"sample={self.sample} with samples={self.samples} passes 2^64 - 1; choose a smaller sample"
            )
        if not isinstance(self.scope, str):
            raise InvalidValue(f"scope is {self.scope!r}; it must be a string")
        if self.start is not None and not 0 <= self.start.written < 2**63:
            raise InvalidValue(f"start.written is {self.start.written}; it must be from 0 to 2^63 - 1")
        self._check_prompt()
        self._check_ends()

    def _check_prompt(self) -> None:
        if isinstance(self.prompt, str):
            raise InvalidValue("prompt is a text; pass token ids: tokenizer.encode(text).tolist()")
        # Store a copy as plain numbers, so that later changes of the caller's list do not change the request.
        self._set("prompt", _ids("prompt", self.prompt))
        if len(self.prompt) == 0 and (self.start is None or self.start.unread == 0):
            raise InvalidValue("the prompt is empty; give at least one token")

    def _check_ends(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop))
        for each in self.stop:
            if not isinstance(each, str):
                raise InvalidValue(f"stop holds {each!r}; it must hold strings")
        if "" in self.stop:
            raise InvalidValue("stop holds an empty string; give at least one character")
        self._set("stop_tokens", _ids("stop_tokens", self.stop_tokens))
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidValue(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not (is_integer(token) and _is_real(bias) and (bias == -math.inf or abs(bias) <= sys.float_info.max)):
                raise InvalidValue(
                    f"logit_bias holds {token!r}: {bias!r}; it must map token ids to finite numbers or -inf"
                )
        self._set("logit_bias", {int(token): float(bias) for token, bias in self.logit_bias.items()})

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def token_ids(self) -> Iterable[int]:
        """Return all token ids that the request contains.

        Returns:
            Ids of the prompt, the session, the stop tokens and the logit bias; an id may occur several times.
        """
        old = () if self.start is None else (*self.start.tokens, *self.start.seen, *self.start.counts)
        return (*self.prompt, *old, *self.stop_tokens, *self.logit_bias)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, of Python or numpy, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    """Return the values of an argument as a tuple; raise InvalidValue for a value that is not a sequence."""
    try:
        # `tolist` converts the numbers of an array or a tensor to Python numbers.
        return tuple(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        raise InvalidValue(f"{name} is {values!r}; it must be a sequence") from None


def _ids(name: str, values: Any) -> tuple[int, ...]:
    """Return the token ids of an argument; raise InvalidValue for values that are not whole numbers."""
    listed = _listed(name, values)
    # The usual case. A check of each number of a long prompt takes 20 times as long.
    if set(map(type, listed)) <= {int}:
        return listed
    for each in listed:
        if not is_integer(each):
            raise InvalidValue(f"{name} holds {each!r}; token ids must be whole numbers")
    return tuple(map(int, listed))


class Event(NamedTuple):
    """Report one token of a request, or the end of a request.

    Each token has one event, also if its text is empty.

    Args:
        id: Id of the request, from `Engine.add`.
        token: Token id; None if the request ends without a token.
        text: New text in whole characters. The text is empty if the token only begins or continues a character or a
            stop string: a later event then has the text of this token. The last event adds all text that was held back.
        log_probability: Log-probability of the token in nats; None unless the request asks for it.
        finished: "length", "stop" or "error" in the last event; otherwise None.
        session: Session in the last event if the request has `keep_session`; otherwise None.
        sample: Number of the sample.
        top_log_probabilities: (token id, log-probability) of the most probable tokens, the most probable first.
        prompt_log_probabilities: Log-probability in nats of each prompt token in the first event, if the request asks
            for it; otherwise None. The value is None for the first token of a text.
        prompt_top_log_probabilities: (token id, log-probability) of the most probable tokens in place of each prompt
            token, under the same conditions; empty for the first token of a text.
        reason: Reason of the error, if `finished` is "error"; otherwise None.
        cached: Number of prompt tokens that the model did not process, because the engine's cache had the state after
            them; 0 in later events of a sample.
        restarted: Whether the context was full and re-anchored before this token (`context="reanchor"`).
    """

    id: int
    token: int | None
    text: str
    log_probability: float | None = None
    finished: Finished | None = None
    session: Session | None = None
    sample: int = 0
    top_log_probabilities: tuple[tuple[int, float], ...] = ()
    prompt_log_probabilities: tuple[float | None, ...] | None = None
    prompt_top_log_probabilities: tuple[tuple[tuple[int, float], ...], ...] | None = None
    reason: str | None = None
    cached: int = 0
    restarted: bool = False
