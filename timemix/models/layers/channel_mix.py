"""The channel-mix of the 2021 RWKV (RWKV-LM 0.01)."""

from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ShiftedConfig
from timemix.models.layers.activations import ACTIVATIONS
from timemix.models.layers.linear import Linear, are_plain, joint_linear, side_by_side
from timemix.ops.common import fused


class ChannelMix(nn.Module):
    """The channel-mix sublayer: sigmoid(receptance(x)) * output(act(key(x)) * value(x))."""

    def __init__(self, config: ShiftedConfig) -> None:
        super().__init__()
        self.activation = config.activation
        C, hidden = config.channels, config.ffn_hidden
        self.key = Linear(C, hidden)
        self.value = Linear(C, hidden)
        self.output = Linear(hidden, C)
        self.receptance = Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        if fused.serves(x) and are_plain(self.key, self.value, self.receptance, self.output):
            weight, bias = side_by_side(self.key, self.value, self.receptance)
            hidden, gate = fused.gates(F.linear(x, weight.to(x.dtype)), bias, x.shape[-1], self.activation)
            return fused.scaled(F.linear(hidden, self.output.weight), self.output.bias, gate)
        k, v, r = joint_linear(x, self.key, self.value, self.receptance)
        result: Tensor = r.sigmoid() * self.output(ACTIVATIONS[self.activation](k) * v)
        return result
