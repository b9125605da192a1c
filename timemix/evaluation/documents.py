"""Documents in a stream of tokens: the token that resets the state of a model, and the losses of documents."""

import numpy as np

from timemix.errors import InvalidValue
from timemix.tokenizers.base import Tokenizer


def document_start(tokenizer: Tokenizer, clause: str) -> int:
    """Return the id of the end-of-text token, which is the first token that a model reads of a document.

    In a stream of tokens, the end-of-text token of a document stands before the tokens of the next document.

    Args:
        tokenizer: The tokenizer.
        clause: The setting that needs the id, such as "by_document is True", for the error message.

    Raises:
        InvalidValue: The tokenizer has no end-of-text token.
    """
    if tokenizer.end_of_text is None:
        raise InvalidValue(
            f"{clause}, but the vocabulary has no end-of-text token; leave it out, or train a new model with"
            " data.end_of_text True"
        )
    return tokenizer.end_of_text


class DocumentLosses:
    """The mean losses of documents whose losses arrive in pieces. The memory does not grow with the text."""

    def __init__(self) -> None:
        # Sum and number of the losses of the newest document
        self._sum, self._tokens = 0.0, 0
        # Number of the other documents, and the sum of their mean losses
        self._ended, self._total = 0, 0.0

    def add(self, losses: np.ndarray, begins: np.ndarray, counted: np.ndarray) -> None:
        """Add the losses of the next tokens.

        Args:
            losses: Losses in nats (n,) float64.
            begins: Whether the token is the first predicted token of a document (n,) bool.
            counted: Whether the loss counts the token (n,) bool; otherwise its loss is 0.
        """
        borders = begins.nonzero()[0]
        parts = zip(np.split(losses, borders), np.split(counted, borders), strict=True)
        for number, (part, of_part) in enumerate(parts):
            if number:
                self._ended, self._total = self.count, self._all_means
                self._sum, self._tokens = 0.0, 0
            self._sum += float(part.sum())
            self._tokens += int(of_part.sum())

    @property
    def _all_means(self) -> float:
        return self._total + (self._sum / self._tokens if self._tokens else 0.0)

    @property
    def count(self) -> int:
        """Number of documents with a predicted token."""
        return self._ended + bool(self._tokens)

    @property
    def mean(self) -> float:
        """Mean over all documents of their mean loss in nats per token; NaN without a document."""
        return self._all_means / self.count if self.count else float("nan")
