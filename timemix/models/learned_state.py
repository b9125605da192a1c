"""The state before the first token as parameters of a model, which state tuning learns."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timemix.errors import InvalidValue
from timemix.models.layers.block import Block, Tensors
from timemix.models.registry import ARCHITECTURES, load_part
from timemix.models.state import State


class LearnedState(nn.Module):
    """The parameters of the state before the first token, by layer.

    `Block.state_parameters` creates the parameters of a layer, and `Block.state_of` computes the state from them. The
    token-shift stays zero: the state of a token-shift is one row for one token, and so has no effect after that token.

    Args:
        blocks: Blocks of the model.

    Raises:
        InvalidValue: The architecture has no recurrent state.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        parameters = [block.state_parameters() for block in blocks]
        self.layers = nn.ModuleList(nn.ParameterDict(each) for each in parameters)
        if not any(parameters):
            able = [name for name, each in ARCHITECTURES.items() if _has_state(load_part(each.model))]
            raise InvalidValue(
                "train.tune is 'state', but this architecture has no recurrent state; set train.tune to 'lora', or"
                f" start from a model of {', '.join(able)}"
            )

    @torch.no_grad()
    def begin_with(self, state: State, blocks: Sequence[Block]) -> None:
        """Take over the recurrent part of a state.

        Args:
            state: State of one row.
            blocks: Blocks of the model.

        Raises:
            InvalidValue: No parameters give this state.
        """
        for own, block, layer in zip(self.layers, blocks, state.layers, strict=True):
            found = block.parameters_of({name: x[0] for name, x in layer.items()}, int(state.position))
            for name, parameter in own.named_parameters():
                parameter.copy_(found[name])

    def rows(self, layer: int, block: Block, count: int) -> Tensors:
        """Return the recurrent part of the state of a block before the first token.

        Args:
            layer: Index of the block.
            block: The block.
            count: Number of rows B.

        Returns:
            Tensors by name, batch first, which own their memory and are differentiable.
        """
        one: Tensors = block.state_of(dict(self.layers[layer].named_parameters()))
        return {name: _repeated(x, count) for name, x in one.items()}


def _repeated(x: Tensor, count: int) -> Tensor:
    """Return count copies of x, batch first: a decode step writes into a state."""
    return x.expand(count, *x.shape).clone(memory_format=torch.contiguous_format)


def _has_state(block: type[Block]) -> bool:
    return block.state_parameters is not Block.state_parameters
