"""The base class of the blocks of an architecture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from timemix.models.config import ModelConfig
from timemix.models.layers.linear import LayerNorm

Tensors = dict[str, Tensor]

FIRST_WEIGHT = -4.0
"""Logarithm of the weight of a learned state at the start of state tuning, in architectures that average values.

At weight 0, a learned value would have no gradient. At exp(-4), the state hardly changes the averages.
"""


class Model(Protocol):
    """The part of a language model that `Block.set_initial_values` uses."""

    @property
    def config(self) -> Any: ...

    @property
    def blocks(self) -> Any: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimizer that depend on the architecture.

    Args:
        lr_scale: Pairs (end of a parameter's name, factor of its learning rate). A parameter whose name matches no pair
            has factor 1.
        decay_all_matrices: Whether weight decay applies to the embedding and the head too, not only to the linear
            weights inside blocks.
        warmup_floor: Learning rate at the start of a warm-up, divided by the learning rate at the end of the warm-up, 0
            to 1.
    """

    lr_scale: tuple[tuple[str, float], ...] = ()
    decay_all_matrices: bool = False
    warmup_floor: float = 0.0

    def scale_of(self, name: str) -> float:
        """Return the factor by which the learning rate of a parameter is multiplied.

        Args:
            name: Name of the parameter.

        Returns:
            The factor.
        """
        return next((scale for end, scale in self.lr_scale if name.endswith(end)), 1.0)


@dataclass(frozen=True)
class Kept:
    """Counts of the numbers that training stores during a forward pass, to estimate the memory of training.

    Args:
        block: Count of stored numbers per token and layer.
        products: Count of stored numbers per token and layer with `recompute="cheap"`, which stores only outputs of
            matrix products.
        squares: Additional count of stored numbers, in all layers together, for matrices over pairs of positions.
    """

    block: int
    products: int
    squares: int = 0


class Block(nn.Module):
    """One layer of an architecture. The block class also defines the parts of the model outside the blocks.

    A subclass must define `forward`, `init_state`, `set_initial_values` and `kept`, and may override all other methods.

    Args:
        config: Settings of the model.
        layer: Index of the block, from 0.

    Attributes:
        gates: The projections whose outputs go through a sigmoid, as (sublayer, name), the keys of `projections`.
        takes_resets: Whether `forward` has one more argument, `resets`: whether a token is the first of a document
            (B, T) bool, so that its results depend on no earlier token; None: no token, except at position 0.
    """

    gates: ClassVar[tuple[tuple[str, str], ...]] = ()
    takes_resets: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    def init_state(self, batch_size: int) -> Tensors:
        """Create the block's state before the first token.

        Args:
            batch_size: Number B of texts in the batch.

        Returns:
            Tensors by name, batch first.
        """
        raise NotImplementedError

    def state_parameters(self) -> Tensors:
        """Create the parameters from which `state_of` computes the block's state before the first token.

        Returns:
            Initial values by name, for a state like that of `init_state`; {} without a recurrent state of fixed size.
        """
        return {}

    def state_of(self, parameters: Tensors) -> Tensors:
        """Compute the recurrent part of the block's state before the first token. By default, it is the parameters.

        Args:
            parameters: Parameters by name.

        Returns:
            Tensors of the state by name, without the dimension of the batch and without the token-shift.
        """
        return parameters

    def parameters_of(self, state: Tensors, position: int) -> Tensors:
        """Compute the parameters from which `state_of` computes the recurrent part of a state.

        Args:
            state: Tensors of the state of one row by name, without the dimension of the batch.
            position: Number of tokens so far.

        Returns:
            Parameters by name, with the names of `state_parameters`.

        Raises:
            InvalidValue: No parameters give this state.
        """
        return {name: state[name] for name in self.state_parameters()}

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        """Apply the block.

        Args:
            x: Input (B, T, C).
            state: State of the block after the earlier tokens; None, as in training: the tokens begin at position 0.
                With the result of `state_of`, the token-shift is zero, and the next state has no meaning.
            carry: Tensor from an earlier block for the same tokens; None if there is no such tensor.
            position: Number of earlier tokens of each row (B,); None without a state.
            lengths: Number of valid tokens of each row (B,), 1 to T; None: all tokens are valid.

        Returns:
            Output (B, T, C), the next state (None if `state` is None), and the tensor `carry` for the next block.
        """
        raise NotImplementedError

    @classmethod
    def input_norm(cls, config: Any) -> nn.Module:
        """Create the module between the embedding and the first block. By default, the module is the identity.

        Args:
            config: Settings of the model.

        Returns:
            A module that maps (B, T, C) to (B, T, C).
        """
        return nn.Identity()

    @classmethod
    def final_norm(cls, config: Any) -> nn.Module:
        """Create the module between the last block and the head. By default, the module is a LayerNorm.

        Args:
            config: Settings of the model.

        Returns:
            A module that maps (B, T, C) to (B, T, C).
        """
        return LayerNorm(config.channels)

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        """Initialize every weight of a model in place, including embedding and head, with PyTorch's global generator.

        Args:
            model: The model.
        """
        raise NotImplementedError

    @classmethod
    def training_loss(cls, config: Any, loss: Tensor, logits: Tensor) -> Tensor:
        """Return the loss to differentiate. By default, the loss is the mean cross-entropy.

        Args:
            config: Settings of the model.
            loss: Mean cross-entropy in nats, a scalar.
            logits: Logits (B, T, V).

        Returns:
            A scalar.
        """
        return loss

    @classmethod
    def recipe(cls, config: Any) -> Recipe:
        """Return the settings of the optimizer that depend on the architecture.

        Args:
            config: Settings of the model.

        Returns:
            The settings.
        """
        return Recipe()

    @classmethod
    def mixing_flops(cls, config: Any) -> int:
        """Count the operations per token that mix information over time, without the products with weight matrices.

        The count is for a forward pass over ctx_len tokens through all layers.

        Args:
            config: Settings of the model.

        Returns:
            Number of floating-point operations per token.
        """
        return 0

    @classmethod
    def kept(cls, config: Any, rows: int) -> Kept:
        """Count the numbers that a training step stores for its backward pass.

        Args:
            config: Settings of the model.
            rows: Number of windows that a forward pass processes together.

        Returns:
            The counts.
        """
        raise NotImplementedError

    @classmethod
    def resized(cls, weights: Tensors, config: Any, ctx_len: int) -> Tensors:
        """Return the weights of the model for another context length. By default, the weights stay unchanged.

        Args:
            weights: Weights by name.
            config: Settings of the model.
            ctx_len: New context length in tokens.

        Returns:
            New weights by name.

        Raises:
            InvalidValue: The model cannot have this context length.
        """
        return dict(weights)

    @classmethod
    def runs_in_c(cls, config: Any, precision: str, device: torch.device) -> bool:
        """Return whether C code computes the recurrence of a training step, and other parts (by default False).

        torch.compile would replace this C code, so `--train.compile auto` does not compile the model.

        Args:
            config: Settings of the model.
            precision: Precision of matrix products, such as "bfloat16".
            device: Device of the model.

        Returns:
            True if C code computes these parts.
        """
        return False

    @classmethod
    def forms(cls, config: Any, precision: str, device: torch.device, resets: bool = False) -> dict[str, str]:
        """Return the backend that computes each op of the model over a whole context, for the log.

        Args:
            config: Settings of the model.
            precision: Precision of matrix products, such as "bfloat16".
            device: Device of the model.
            resets: Whether the state is reset at the first token of each document.

        Returns:
            Backend of each op, with the reason for the choice, by name of the op.
        """
        return {}

    @property
    def shifted(self) -> int:
        """Number of channels at the start of a projection's input that come from earlier tokens."""
        return 0

    def tables(self) -> Tensors:
        """Return the learned parameters with one value per position, for `timemix inspect`.

        Returns:
            Tables by name.
        """
        return {}

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        """Return the linear maps that read the input of a sublayer, for `timemix inspect`.

        Returns:
            Linear maps by (sublayer, name).
        """
        return {}

    def recurrence(self) -> nn.Module | None:
        """Return the module that updates the matrix state S of each head, for `timemix inspect`.

        The module has no parameters. It gets all arguments by keyword, and returns its output and the next state:

        - `log_decay` (B, T, H, N), or (H, N) for all tokens: logarithm of the share of S that each channel of the keys
          keeps in a token,
        - `rate` (B, T, H, N), only with a delta rule: in-context learning rate of each channel of the keys,
        - `state` (B, H, N, N), or None in training, and `lengths` (B,), as in `forward`,
        - any other tensors, of which those of 4 dimensions are (B, T, H, N), and all others have no effect on S.

        Returns:
            The module; None if the architecture has no matrix states.
        """
        return None
