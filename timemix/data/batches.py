"""Batches of token windows for training, and the windows of a whole text for validation."""

from collections.abc import Iterator

import numpy as np

from timemix.data.shards import Tokens, counted_targets, targets_of
from timemix.errors import InvalidValue


class Batches:
    """Batches of token windows: `batches(step)` returns the batch of a step.

    A batch depends only on the arguments and the step, so a resumed run needs no other state.

    Args:
        tokens: Token ids of the training text, (tokens,).
        batch_size: Number of windows in a batch.
        ctx_len: Number of tokens in a window.
        seed: Random seed of the positions, below 2^64.
        order: "random": windows at uniformly random positions, as in the 2021 code. "epoch": adjacent windows, each
            once per epoch, in a new order and from a new starting point in every epoch. An epoch leaves out up to two
            windows of the text. "carried": the text is cut into
            `batch_size` parts of equal length, and row i of the batches has the adjacent windows of part i, again and
            again. The tokens at the end of a part that fill no window are left out.

    Raises:
        InvalidValue: The text has fewer than ctx_len + 1 tokens, or in the order "carried", fewer than `batch_size`
            windows.
    """

    def __init__(
        self, tokens: np.ndarray | Tokens, *, batch_size: int, ctx_len: int, seed: int, order: str = "random"
    ) -> None:
        if len(tokens) < ctx_len + 1:
            raise InvalidValue(
                f"the training text has {len(tokens)} tokens, but a window of ctx_len={ctx_len} needs {ctx_len + 1};"
                " use more text or a smaller model.ctx_len"
            )
        self._tokens, self._batch_size, self._ctx_len = tokens, batch_size, ctx_len
        self._seed, self._order = seed, order
        # Number of windows in an epoch. With this number, all windows of an epoch fit into the text from any random
        # starting point.
        self._windows = max(1, (len(tokens) - 1) // ctx_len - 1)
        self._slack = min(ctx_len - 1, len(tokens) - 1 - self._windows * ctx_len)
        # Length of a part in tokens, and number of its windows, in the order "carried".
        self._part = (len(tokens) - 1) // batch_size
        self._part_windows = self._part // ctx_len
        if order == "carried" and not self._part_windows:
            raise InvalidValue(
                f"the training text has {len(tokens)} tokens, but data.order 'carried' needs {batch_size * ctx_len + 1}"
                f" for {batch_size} rows of ctx_len={ctx_len}; use more text, or a smaller train.batch_size"
            )
        self._epoch = -1
        self._epoch_starts = np.empty(0, np.int64)

    def __call__(self, step: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Return the batch of a step.

        Args:
            step: Number of the step, counted from 0.
            part: The rows of the batch to return. Default: all rows.

        Returns:
            Inputs and targets, each (rows, ctx_len) int64. Targets are the tokens one position after the inputs, or
            IGNORED where the loss does not count these tokens.
        """
        starts = self._starts(step)[part]
        inputs = np.stack([self._tokens[s : s + self._ctx_len] for s in starts]).astype(np.int64)
        return inputs, np.stack([targets_of(self._tokens, slice(s + 1, s + self._ctx_len + 1)) for s in starts])

    @property
    def has_uncounted(self) -> bool:
        """Whether the text has a loss mask, so that the loss does not count every target."""
        return isinstance(self._tokens, Tokens) and self._tokens.counted is not None

    def counted(self, step: int) -> int:
        """Return the number of targets in the batch of a step that the loss counts."""
        if not isinstance(self._tokens, Tokens):
            return self._batch_size * self._ctx_len
        parts = (self._tokens.part(slice(s, s + self._ctx_len + 1)) for s in self._starts(step))
        return sum(map(counted_targets, parts))

    def earlier(self, step: int) -> int:
        """Return the number of tokens that the rows of the earlier batches have before each row of the batch of a step.

        Args:
            step: Number of the step, counted from 0.

        Returns:
            The number; 0 if the rows continue no row of the batch before.
        """
        return step % self._part_windows * self._ctx_len if self._order == "carried" else 0

    def _starts(self, step: int) -> np.ndarray:
        if self._order == "carried":
            return np.arange(self._batch_size) * self._part + self.earlier(step)
        if self._order == "random":
            return _generator(self._seed, step).integers(0, len(self._tokens) - self._ctx_len, self._batch_size)
        number = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, places = np.divmod(number, self._windows)
        return np.array([self._starts_of_epoch(e)[p] for e, p in zip(epochs.tolist(), places, strict=True)])

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = _generator(self._seed, epoch)
            first = generator.integers(0, self._slack + 1)
            self._epoch, self._epoch_starts = epoch, first + generator.permutation(self._windows) * self._ctx_len
        return self._epoch_starts


def _generator(seed: int, counter: int) -> np.random.Generator:
    """Return a random generator that depends only on the seed and the number of a step or an epoch."""
    return np.random.Generator(np.random.Philox(key=seed | counter << 64))


def validation_windows(
    tokens: np.ndarray | Tokens, ctx_len: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a whole text into adjacent windows, and yield the windows in batches.

    Every token of the text except the first is a target exactly once. IGNORED replaces targets that the loss does not
    count.

    Args:
        tokens: Token ids, (tokens,).
        ctx_len: Number of tokens in a window.
        batch_size: Largest number of windows in a batch.

    Yields:
        Inputs and targets, each (batch, ctx_len) int64. A last, shorter window forms a batch by itself.
    """
    whole = (len(tokens) - 1) // ctx_len
    for first in range(0, whole, batch_size):
        last = min(first + batch_size, whole)
        begin, end = first * ctx_len, last * ctx_len
        inputs = tokens[begin:end].astype(np.int64)
        yield inputs.reshape(-1, ctx_len), targets_of(tokens, slice(begin + 1, end + 1)).reshape(-1, ctx_len)
    rest = tokens[whole * ctx_len :].astype(np.int64)
    if len(rest) > 1:
        yield rest[None, :-1], targets_of(tokens, slice(whole * ctx_len + 1, None))[None]
