"""Token-shift: part of the channels of a token is replaced by the same channels of earlier tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ShiftedConfig


def shift_fractions(config: ShiftedConfig, layer: int) -> tuple[float, ...]:
    """Fractions of the channels of a layer taken from 1, 2, 3 ... tokens back.

    Linear from `token_shift` in layer 0 to `token_shift_top` in the last.
    """
    bottom, top = config.token_shift, config.token_shift_top
    if top is None or config.layers == 1:
        return bottom
    height = layer / (config.layers - 1)
    distances = max(len(bottom), len(top))
    pairs = zip(_padded(bottom, distances), _padded(top, distances), strict=True)
    return tuple(low + (high - low) * height for low, high in pairs)


def _padded(fractions: tuple[float, ...], length: int) -> tuple[float, ...]:
    return fractions + (0.0,) * (length - len(fractions))


class TokenShift(nn.Module):
    """Takes groups of channels from 1, 2, 3 ... tokens back, zeros before the first token.

    The state is the newest `distance` rows of the input, oldest first: (B, distance, C).
    """

    def __init__(self, config: ShiftedConfig, layer: int) -> None:
        super().__init__()
        ends, total = [], 0.0
        for fraction in shift_fractions(config, layer):
            total += fraction
            ends.append(int(total * config.channels + 1e-6))
        self.edges = (0, *ends)
        self.groups = list(zip(self.edges, ends, strict=False))
        self.distance = max((d for d, (a, b) in enumerate(self.groups, 1) if a < b), default=0)
        self.shifted = ends[-1] if ends else 0
        self.channels = config.channels

    def distances(self) -> Tensor:
        """Tokens back that each channel is taken from (C,) int32, 0 for its own."""
        distances = torch.zeros(self.channels, dtype=torch.int32)
        for d, (a, b) in enumerate(self.groups, 1):
            distances[a:b] = d
        return distances

    def forward(
        self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C) to shifted x (B, T, C) and the next state; `lengths` (B,) as in the model."""
        if not self.distance:
            return x, state
        T = x.shape[1]
        if state is None:
            parts = [F.pad(x[:, : max(T - d, 0), a:b], (0, 0, min(d, T), 0)) for d, (a, b) in enumerate(self.groups, 1)]
            return torch.cat([*parts, x[:, :, self.shifted :]], dim=-1), None
        rows = torch.cat([state, x.to(state.dtype)], dim=1)
        D = self.distance
        parts = [rows[:, D - d : D - d + T, a:b] for d, (a, b) in enumerate(self.groups[:D], 1)]
        shifted = torch.cat([*parts, x[:, :, self.shifted :]], dim=-1)
        if lengths is None:
            return shifted, rows[:, T:]
        newest = lengths[:, None] + torch.arange(D, device=x.device)
        return shifted, rows.gather(1, newest[:, :, None].expand(-1, -1, rows.shape[2]))
