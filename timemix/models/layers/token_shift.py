"""Token-shift: part of the channels of a token is replaced by the same channels of earlier tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ShiftedConfig


def shift_fractions(config: ShiftedConfig, layer: int) -> tuple[float, ...]:
    """Return the fractions of a layer's channels that come from 1, 2, 3 ... tokens back.

    They change linearly from `token_shift` in layer 0 to `token_shift_top` in the last layer.
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
    """Take groups of channels from 1, 2, 3 ... tokens back; there are zeros before the first token.

    y[t, c] = x[t - d, c] for channels c of group d. The state is the newest `distance` rows of the input, oldest first:
    (B, distance, C).

    Args:
        config: Settings of the model.
        layer: Index of the block, from 0.

    Attributes:
        edges: Group d has channels edges[d - 1] to edges[d].
        distance: Largest d with channels.
        shifted: Number of channels in all groups.
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
        """Return how many tokens back each channel comes from: (C,) int32, 0 for the token itself."""
        distances = torch.zeros(self.channels, dtype=torch.int32)
        for d, (a, b) in enumerate(self.groups, 1):
            distances[a:b] = d
        return distances

    def forward(
        self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Shift rows.

        Args:
            x: Rows (B, T, C).
            state: Newest rows before x, oldest first (B, distance, C); None: zeros, and no next state.
            lengths: Number of rows of each batch entry that count (B,), 1 to T; None: all.

        Returns:
            Shifted rows (B, T, C), and the next state.
        """
        if not self.distance:
            return x, state
        T = x.shape[1]
        if state is None:
            parts = [F.pad(x[:, : max(T - d, 0), a:b], (0, 0, min(d, T), 0)) for d, (a, b) in enumerate(self.groups, 1)]
            return torch.cat([*parts, x[:, :, self.shifted :]], dim=-1), None
        # (B, D + T, C): x[t] is at D + t.
        rows = torch.cat([state, x.to(state.dtype)], dim=1)
        D = self.distance
        parts = [rows[:, D - d : D - d + T, a:b] for d, (a, b) in enumerate(self.groups[:D], 1)]
        shifted = torch.cat([*parts, x[:, :, self.shifted :]], dim=-1)
        if lengths is None:
            return shifted, rows[:, T:]
        # The D rows that end at each row's last token that counts: (B, D)
        newest = lengths[:, None] + torch.arange(D, device=x.device)
        return shifted, rows.gather(1, newest[:, :, None].expand(-1, -1, rows.shape[2]))
