"""Token-shift: part of the channels of a token is replaced by the same channels of earlier tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ShiftedConfig


def shift_fractions(config: ShiftedConfig, layer: int) -> tuple[float, ...]:
    """Return the fractions of a layer's channels that come from 1, 2, 3 ... tokens back.

    The fractions change linearly from `token_shift` in layer 0 to `token_shift_top` in the last layer.
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
    """Take groups of channels from 1, 2, 3 ... tokens back. Channels from before the first token are zero.

    y[t, c] = x[t - d, c] for channels c of group d. The state is the newest `distance` rows of the input, oldest first:
    (B, distance, C).

    Args:
        config: Settings of the model.
        layer: Index of the block, from 0.

    Attributes:
        edges: Boundaries of the groups. Group d has the channels edges[d - 1] to edges[d] - 1.
        distance: Largest d whose group has channels.
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
        """Return the distance in tokens from which each channel comes: (C,) int32, 0 for the token itself."""
        distances = torch.zeros(self.channels, dtype=torch.int32)
        for d, (a, b) in enumerate(self.groups, 1):
            distances[a:b] = d
        return distances

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Replace the first channels of each token by channels of earlier tokens.

        Args:
            x: Input (B, T, C).
            state: Newest rows before x, oldest first (B, distance, C); None: zeros, and the next state is None.
            lengths: Number of valid rows of each batch entry (B,), 1 to T; None: all rows are valid.
            resets: Whether the rows before each row are zero (B, T) bool, for `state` None; None: never.

        Returns:
            Shifted input (B, T, C), and the next state.
        """
        if not self.distance:
            return x, state
        T = x.shape[1]
        if state is None:
            parts = [F.pad(x[:, : max(T - d, 0), a:b], (0, 0, min(d, T), 0)) for d, (a, b) in enumerate(self.groups, 1)]
            if resets is not None:
                # Number of the document of each row, from 1: (B, T). No document has number 0.
                document = 1 + resets.long().cumsum(1)
                source = (F.pad(document[:, : max(T - d, 0)], (min(d, T), 0)) for d in range(1, 1 + len(parts)))
                parts = [x.where((document == u)[:, :, None], 0) for x, u in zip(parts, source, strict=True)]
            return torch.cat([*parts, x[:, :, self.shifted :]], dim=-1), None
        # The rows are (B, D + T, C), with x[t] at index D + t.
        rows = torch.cat([state, x.to(state.dtype)], dim=1)
        D = self.distance
        parts = [rows[:, D - d : D - d + T, a:b] for d, (a, b) in enumerate(self.groups[:D], 1)]
        shifted = torch.cat([*parts, x[:, :, self.shifted :]], dim=-1).to(x.dtype)
        if lengths is None:
            # A view would keep all rows in memory.
            return shifted, rows[:, T:].clone()
        # The indices (B, D) of the D rows that end at the last valid token of each batch entry.
        newest = lengths[:, None] + torch.arange(D, device=x.device)
        return shifted, rows.gather(1, newest[:, :, None].expand(-1, -1, rows.shape[2]))


def previous_token(
    x: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the row before each row of x: y[t] = x[t - 1]. The row before the first token is zero.

    Args:
        x: Input (B, T, C).
        state: Row before x (B, 1, C); None: zeros, and the next state is None.
        lengths: Number of valid rows of each batch entry (B,), 1 to T; None: all rows are valid.
        resets: Whether the row before each row is zero (B, T) bool; None: never.

    Returns:
        The previous rows (B, T, C), and the next state: the last valid row of each batch entry.
    """
    earlier = x[:, :-1]
    previous = F.pad(earlier, (0, 0, 1, 0)) if state is None else torch.cat([state.to(x.dtype), earlier], 1)
    if resets is not None:
        previous = previous.masked_fill(resets[:, :, None], 0)
    if state is None:
        return previous, None
    # A view would keep all rows in memory.
    last = x[:, -1:].clone() if lengths is None else x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))
    return previous, last.to(state.dtype)
