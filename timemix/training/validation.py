"""Validation of a run: the loss on held-out text, and the early stop."""

import math

from timemix.data.corpus import Corpus
from timemix.errors import InvalidValue
from timemix.evaluation.loss import loss_per_token
from timemix.evaluation.texts import bits_per_byte
from timemix.models.language_model import LanguageModel
from timemix.runtime.distributed import World


class Validation:
    """The validation losses of a run.

    Args:
        model: The model.
        corpus: Tokens of the run.
        patience: Number of validations without a lower loss after which the run stops early (`train.patience`). 0: the
            run never stops early.
        precision: Precision of matrix products, not "auto".
        document_start: Token at which a new document starts, without the state of the document before it. None: the
            state continues.
        world: The processes of the run.

    Attributes:
        loss: Newest loss in nats per token, None before the first validation.
        step: Number of finished optimizer steps at the newest validation.
        best: Lowest loss so far, in nats per token.
        without_gain: Number of validations since the validation with the lowest loss.

    Raises:
        InvalidValue: `patience` needs held-out text, and the corpus has none.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        patience: int,
        *,
        precision: str,
        document_start: int | None,
        world: World,
    ) -> None:
        if patience and len(corpus.valid) < 2:
            raise InvalidValue(
                f"train.patience={patience} needs held-out text, and there is none; set data.valid_fraction or"
                " data.valid"
            )
        self._model, self._corpus, self._patience = model, corpus, patience
        self._precision, self._document_start, self._world = precision, document_start, world
        self.loss: float | None = None
        self.step: int | None = None
        self.best = math.inf
        self.without_gain = 0

    @property
    def bits_per_byte(self) -> float | None:
        """Newest loss in bits per byte, None before the first validation and for unknown sizes of texts."""
        return None if self.loss is None else bits_per_byte(self.loss, self._corpus)

    @property
    def stopped_early(self) -> bool:
        """Whether none of the last `patience` validations lowered the loss, which ends the run."""
        return 0 < self._patience <= self.without_gain

    def measure(self) -> float | None:
        """Return the loss on the whole held-out text in nats per token, or None without held-out text.

        All processes must call this method.
        """
        if len(self._corpus.valid) < 2:
            return None
        return loss_per_token(
            self._model,
            self._corpus.valid,
            precision=self._precision,
            document_start=self._document_start,
            world=self._world,
        )

    def count(self) -> bool:
        """Count the newest loss for the early stop, and return whether it is the lowest so far."""
        if self.loss is None:
            return False
        is_lowest = self.loss < self.best
        self.without_gain = 0 if is_lowest else self.without_gain + 1
        self.best = min(self.best, self.loss)
        return is_lowest
