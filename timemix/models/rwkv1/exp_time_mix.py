"""Time-mix with curves that are sums of exponentials: rwkv1 as a recurrent network with a state of constant size."""

import torch
from torch import Tensor, nn

from timemix.models.layers.linear import Linear, joint_linear
from timemix.models.layers.tables import time_gamma, time_table, times_gamma
from timemix.models.rwkv1.config import Rwkv1ExpConfig
from timemix.models.rwkv1.time_mix import fused_time_mix, is_plain
from timemix.ops.common import fused
from timemix.ops.common.history import extended
from timemix.ops.rwkv1.curves import Curves, curve, initial_forget, unfading
from timemix.ops.rwkv1.exponential import ExpState, exp_state, wkv1_exp


class ExpTimeMix(nn.Module):
    """The time-mix gamma(t) * output(sigmoid(receptance) * wkv1_exp(key, value)), at any position.

    From position ctx_len on, alpha, beta and gamma equal the mean of their last quarter. The state holds the tensors of
    `ops.rwkv1.ExpState` without the position.
    """

    def __init__(self, config: Rwkv1ExpConfig) -> None:
        super().__init__()
        self.config = config
        C, H, K, M = config.channels, config.heads, config.exponentials, config.taps
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.receptance = Linear(C, C)
        self.output = Linear(C, C)
        self.rate = nn.Parameter(torch.ones(H, K))
        self.angle = nn.Parameter(torch.zeros(H, K // 2))
        self.coefficients = nn.Parameter(torch.ones(H, K))
        self.taps = nn.Parameter(torch.zeros(H, M)) if M else None
        self.forget = nn.Parameter(torch.full((H,), initial_forget(config.ctx_len)))
        self.alpha = time_table(config, config.alpha)
        self.beta = time_table(config, config.beta)
        self.gamma = time_gamma(config, config.gamma)

    @property
    def curves(self) -> Curves:
        """Parameters of the curves, in the format that `wkv1_exp` takes."""
        return Curves(self.rate, self.angle, self.coefficients, self.forget, self.taps)

    def curve(self) -> Tensor:
        """Return the curves f (H, ctx_len) by lag."""
        return curve(self.curves, self.config.ctx_len)

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        """Create the state before the first token, for B rows."""
        config = self.config
        state = exp_state(
            batch_size,
            config.heads,
            config.head_size,
            config.exponentials,
            config.taps,
            dtype=torch.promote_types(self.rate.dtype, torch.float32),
            device=self.rate.device,
        )
        return _tensors(state)

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor] | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Map x (B, T, C) to (B, T, C), and return the next state. `Block.forward` documents the arguments."""
        config, T = self.config, x.shape[1]
        if state is None and config.ctx_len >= T and fused.serves(x) and is_plain(self):
            return fused_time_mix(self, x, unfading(self.curves, config.ctx_len)), None
        # (B, T, H, N)
        heads = (*x.shape[:2], config.heads, config.head_size)
        past = None if state is None or position is None else ExpState(position=position, **_own(state))
        k, v, r = joint_linear(x, self.key, self.value, self.receptance)
        y, past = wkv1_exp(
            k.view(heads), v.view(heads), self.curves, self.alpha, self.beta, config.ctx_len, past, lengths=lengths
        )
        y = self.output(r.sigmoid() * y.flatten(2))
        # With a state, gamma is looked up at each position, and its last entry applies to all later positions.
        end = T if position is None else config.ctx_len + 1
        y = times_gamma(y, None if self.gamma is None else extended(self.gamma, end), position)
        return y, None if past is None else _tensors(past)


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a block's state that belong to the time-mix."""
    return {name: state[name] for name in ("numerators", "denominators", "taps") if name in state}


def _tensors(state: ExpState) -> dict[str, Tensor]:
    """Return the tensors of a state by name, without the position."""
    return {name: x for name, x in state._asdict().items() if x is not None and name != "position"}
