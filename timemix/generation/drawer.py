"""The draw of each row's next token from the logits of a step, with the log-probabilities that a request asks for."""

from collections.abc import Sequence

import numpy as np

from timemix.generation.ranking import most_probable
from timemix.generation.request import Request
from timemix.generation.row import Row
from timemix.generation.sampler import Sampler

Drawn = tuple[int, float | None, tuple[tuple[int, float], ...]]
"""A token, its log-probability (None unless requested), and (token, log-probability) of the most probable tokens."""


EXCLUDED = "logit_bias excludes every token; allow at least one"
NOT_FINITE = "the model's logits are not finite; use another checkpoint"


class Drawer:
    """Draw the next tokens of all rows of a step at once."""

    def __init__(self) -> None:
        # Cache the joined sampler of a step, because the next step usually has the same requests.
        self._requests: list[Request] = []
        self._sampler = Sampler()

    def draw(self, rows: Sequence[Row], logits: np.ndarray) -> list[Drawn | str]:
        """Draw a token for each row.

        Args:
            rows: The R rows that each get a token.
            logits: Logits (R, V), float32 or float64.

        Returns:
            For each row the drawn token with its log-probabilities, or the reason why no token can be drawn.
        """
        # A row is finite if its smallest and its largest number are finite: NaN is both.
        finite = np.isfinite(logits.min(-1)) & np.isfinite(logits.max(-1))
        biased = _biased(rows, logits)
        possible = finite & (biased.max(-1) > -np.inf)
        found: list[Drawn | str] = [EXCLUDED if each else NOT_FINITE for each in finite]
        good = np.flatnonzero(possible).tolist()
        if good:
            tokens = self._tokens([rows[i] for i in good], biased if possible.all() else biased[good])
            for i, token in zip(good, tokens, strict=True):
                found[i] = _drawn(rows[i].request, token, logits[i])
        return found

    def _tokens(self, rows: Sequence[Row], logits: np.ndarray) -> list[int]:
        """Draw a token for each row from logits (R, V). Each row of logits holds a number above -inf."""
        requests = [row.request for row in rows]
        if list(map(id, requests)) != list(map(id, self._requests)):
            self._requests, self._sampler = requests, Sampler.joined([request.sampler for request in requests])
        tokens: list[int] = self._sampler.draw(
            logits,
            [row.seen for row in rows],
            [row.counts for row in rows],
            u=np.array([row.uniforms.at(row.written) for row in rows]),
        ).tolist()
        return tokens


def _biased(rows: Sequence[Row], logits: np.ndarray) -> np.ndarray:
    """Return the logits (R, V) with the biases of the requests, float64 if a request has a bias."""
    if not any(row.request.logit_bias for row in rows):
        return logits
    biased = logits.astype(np.float64)
    for x, row in zip(biased, rows, strict=True):
        if bias := row.request.logit_bias:
            x[list(bias)] += list(bias.values())
    return biased


def _drawn(request: Request, token: int, logits: np.ndarray) -> Drawn:
    """Return a token with the log-probabilities that the request asks for, computed from logits (V,) without bias."""
    count = request.top_log_probabilities
    if not (request.log_probabilities or count):
        return token, None, ()
    score, top = scores_of(logits, token, count)
    return token, score if request.log_probabilities else None, top


def scores_of(logits: np.ndarray, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token, and (token, log-probability) of the `count` most probable tokens.

    Among equally probable tokens, the lowest ids come first.
    """
    best = most_probable(logits, count)
    score, *top = _log_softmax(logits, [token, *best]).tolist()
    return score, tuple(zip(best.tolist(), top, strict=True))


def _log_softmax(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Return the log-probabilities (n,) float64 in nats of some tokens (n,), from logits (V,)."""
    with np.errstate(invalid="ignore"):
        shifted: np.ndarray = np.subtract(logits, logits.max(), dtype=np.float64)
        scores: np.ndarray = shifted[tokens] - np.log(np.exp(shifted).sum())
    return scores
