"""What a layer keeps of every past position, and tables looked up by lag.

Rows of a batch may stand at different positions, so every function takes `position` (B,): the number of
tokens that a row has seen.
"""

import torch
from torch import Tensor


def append(history: Tensor, new: Tensor, position: Tensor, lengths: Tensor | None) -> Tensor:
    """History (B, H, ctx_len, N) with the first `lengths` of `new` (B, H, T, N) written at each row's position.

    Writes in place unless a gradient is being recorded.
    """
    if torch.is_grad_enabled():
        history = history.clone()
    T = new.shape[2]
    time = torch.arange(T, device=new.device)
    new = new.to(history.dtype)
    if lengths is None:
        rows = torch.arange(len(position), device=new.device)[:, None]
        history[rows, :, position[:, None] + time] = new.transpose(1, 2)
    else:
        row, step = (time < lengths[:, None]).nonzero(as_tuple=True)
        history[row, :, position[row] + step] = new.transpose(1, 2)[row, step]
    return history


def lags(position: Tensor, T: int, U: int) -> Tensor:
    """Lag t - u (B, T, U) of every past position u seen from each row's next T positions; negative: the future."""
    target = position[:, None] + torch.arange(T, device=position.device)
    return target[:, :, None] - torch.arange(U, device=position.device)


def weights_at(f: Tensor, lag: Tensor) -> Tensor:
    """f (H, ctx_len) looked up at lag (B, T, U), zero in the future: (B, H, T, U)."""
    # Padding may lie past the table's end.
    return torch.where(lag >= 0, f[:, lag.clamp(0, f.shape[1] - 1)], 0).transpose(0, 1)


def pairs_at(f: Tensor, position: Tensor, T: int, U: int) -> Tensor:
    """f (H, ctx_len, ctx_len) at each row's next T positions and U sources, zero in the future: (B, H, T, U)."""
    target = (position[:, None] + torch.arange(T, device=position.device)).clamp(max=f.shape[1] - 1)
    return f.tril()[:, target, :U].transpose(0, 1)


def extended(table: Tensor, length: int) -> Tensor:
    """A table (..., ctx_len) and after it, up to `length`, the mean of its last quarter."""
    ctx_len = table.shape[-1]
    if length <= ctx_len:
        return table
    rest = table[..., -max(1, ctx_len // 4) :].mean(-1, keepdim=True)
    return torch.cat([table, rest.expand(*table.shape[:-1], length - ctx_len)], -1)
