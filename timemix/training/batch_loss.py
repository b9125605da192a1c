"""The training loss of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from timemix.config.run import RunConfig
from timemix.data.batches import Batches
from timemix.errors import Unavailable
from timemix.evaluation.loss import cross_entropy
from timemix.models.language_model import LanguageModel
from timemix.models.size import flops_per_token
from timemix.runtime.device import autocast
from timemix.training.carried import CarriedState
from timemix.training.compiling import choose_compile, compiled_model
from timemix.training.failures import first_line
from timemix.training.masked import counted_only, piece_divisor


class BatchLoss:
    """The training loss of a batch, which is computed in equal pieces (`train.accumulation`).

    Args:
        config: Config of the run, with a number of steps.
        model: The model.
        parallel_model: The model that exchanges gradients between the processes.
        batches: Batches of the run.
        precision: Precision of matrix products, not "auto".
        document_start: Token at which a new document starts, without the state of the document before it. None: the
            state continues.
        processes: Number of processes of the run.
        warn: Function that prints a warning.

    Attributes:
        compiled: Whether the forward and backward passes are compiled.
        compile_reason: The reason for compiling or not compiling.
        carried: The state that a batch continues (`data.order` "carried"); None without such a state.
        counted: Number of targets of the batch that the loss counts; None: the text has no loss mask, so all count.

    Raises:
        InvalidValue: `train.compile` is "on" and the model cannot be compiled.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        parallel_model: nn.Module,
        batches: Batches,
        *,
        precision: str,
        document_start: int | None,
        processes: int,
        warn: Callable[[str], None],
    ) -> None:
        train = config.train
        self._config, self._block, self._batches = config, model.block, batches
        self._parallel_model, self._precision, self._device = parallel_model, precision, model.device
        self._document_start, self._processes, self._warn = document_start, processes, warn
        self.counted: int | None = None
        self.compiled, self.compile_reason = choose_compile(
            train.compile,
            3 * flops_per_token(config.model) * train.steps * train.batch_size * config.window,
            self._device,
            processes,
            fused=model.block.runs_in_c(config.model, precision, self._device),
            ragged=document_start is not None and not model.resets_in_rows,
        )
        # Training batches all have one shape, so the model is compiled once. Validation calls the uncompiled model.
        self._model = compiled_model(model, self._device, train.accumulation) if self.compiled else parallel_model
        self.carried: CarriedState | None = None
        if config.data.order == "carried":
            self.carried = CarriedState(model, batches, train.batch_size, train.accumulation)

    def begin(self, step: int) -> None:
        """Begin an optimizer step, before the pieces of its batch.

        Args:
            step: Number of the step, counted from 0.
        """
        self.counted = self._batches.counted(step) if self._batches.has_uncounted else None
        if self.carried is not None:
            self.carried.begin(step)

    def of_piece(self, inputs: Tensor, targets: Tensor, piece: int) -> Tensor:
        """Return the part of a piece in the loss of its batch. The losses of all pieces add up to that of the batch.

        Args:
            inputs: Tokens of the piece, (rows, T) int64.
            targets: Tokens one position after the inputs, (rows, T) int64.
            piece: Number of the piece, counted from 0.

        Raises:
            Unavailable: `train.compile` is "on" and the model cannot be compiled.
        """
        return self(inputs, targets, piece) / self._divisor(targets)

    def __call__(self, inputs: Tensor, targets: Tensor, piece: int | None = None) -> Tensor:
        """Return the loss of tokens: mean cross-entropy in nats per token, plus terms of the architecture.

        Args:
            inputs: Tokens, (B, T) int64.
            targets: Tokens one position after the inputs, (B, T) int64. The loss counts all of them, unless the text
                has a loss mask. Then it does not count targets with the value IGNORED, and is 0 if no target counts.
            piece: Number of the piece of a batch whose carried state the inputs continue; None: no earlier tokens.

        Raises:
            Unavailable: `train.compile` is "on" and the model cannot be compiled.
        """
        logits = self.logits(inputs, piece)
        if self._batches.has_uncounted:
            logits, targets = counted_only(logits, targets)
            if not targets.numel():
                return logits.sum()
        return self._block.training_loss(self._config.model, cross_entropy(logits, targets), logits)

    def logits(self, inputs: Tensor, piece: int | None = None) -> Tensor:
        """Return the logits of tokens, and carry the state of their piece. If compiling fails, train uncompiled.

        Args:
            inputs: Tokens, (B, T) int64.
            piece: Number of the piece of a batch whose carried state the inputs continue; None: no earlier tokens.

        Returns:
            Logits (B, T, V).

        Raises:
            Unavailable: `train.compile` is "on" and the model cannot be compiled.
        """
        with autocast(self._precision, self._device):
            try:
                return self._forward(inputs, piece)
            except torch._dynamo.exc.TorchDynamoException as error:
                if self._config.train.compile == "on":
                    raise Unavailable(
                        f"the model cannot be compiled: {first_line(error)}; leave train.compile out"
                    ) from error
                self._warn(f"the model cannot be compiled ({first_line(error)}); training continues uncompiled")
                self.compiled, self._model = False, self._parallel_model
                return self._forward(inputs, piece)

    def _forward(self, inputs: Tensor, piece: int | None) -> Tensor:
        resets = None if self._document_start is None else inputs == self._document_start
        if self.carried is None or piece is None:
            logits, _ = self._model(inputs, resets=resets)
        else:
            logits, self.carried[piece] = self._model(inputs, self.carried[piece], resets=resets)
        result: Tensor = logits
        return result

    def _divisor(self, targets: Tensor) -> float:
        """Return the divisor of the mean loss of a piece."""
        if self.counted is None:
            return self._config.train.accumulation
        return piece_divisor(targets, self.counted, self._processes)
