"""The history of a layer, one entry for each past position, and tables looked up by lag.

    append:      history[b, :, position[b] + i] = new[b, :, i]
    weights_at:  W[b, h, i, u] = f_h(position[b] + i - u), 0 in the future

Rows of a batch may be at different positions. So every function takes `position` (B,), the number of tokens that each
row has seen.
"""

import torch
from torch import Tensor


def append(history: Tensor, new: Tensor, position: Tensor, lengths: Tensor | None) -> Tensor:
    """Store new entries at each row's position, in place unless gradients are recorded.

    Args:
        history: Entries of each position (B, H, ctx_len, N).
        new: New entries (B, H, T, N).
        position: Number of earlier tokens of each row (B,).
        lengths: Number of entries of `new` that count (B,), 1 to T; None: all T.

    Returns:
        The history (B, H, ctx_len, N).
    """
    if torch.is_grad_enabled():
        history = history.clone()
    T = new.shape[2]
    time = torch.arange(T, device=new.device)
    new = new.to(history.dtype)
    if lengths is None:
        rows = torch.arange(len(position), device=new.device)[:, None]
        # Indexed by (B, T) around a slice of heads: (B, T, H, N)
        history[rows, :, position[:, None] + time] = new.transpose(1, 2)
    else:
        # The pairs (row, step) that count, one after another: (pairs, H, N)
        row, step = (time < lengths[:, None]).nonzero(as_tuple=True)
        history[row, :, position[row] + step] = new.transpose(1, 2)[row, step]
    return history


def lags(position: Tensor, T: int, U: int) -> Tensor:
    """Return the lag t - u of every position u from each row's next T positions t.

    Args:
        position: Number of earlier tokens of each row (B,).
        T: Number of targets.
        U: Number of sources.

    Returns:
        Lags (B, T, U), negative in the future.
    """
    target = position[:, None] + torch.arange(T, device=position.device)
    return target[:, :, None] - torch.arange(U, device=position.device)


def weights_at(f: Tensor, lag: Tensor) -> Tensor:
    """Look up f by lag.

    Args:
        f: Weights (H, ctx_len) by lag.
        lag: Lags (B, T, U), negative in the future.

    Returns:
        Weights (B, H, T, U), 0 in the future.
    """
    # The clamp has an upper bound too: padding may be past the end of the table. (H, B, T, U) -> (B, H, T, U)
    return torch.where(lag >= 0, f[:, lag.clamp(0, f.shape[1] - 1)], 0).transpose(0, 1)


def pairs_at(f: Tensor, position: Tensor, T: int, U: int) -> Tensor:
    """Look up f by pair of positions.

    Args:
        f: Weights (H, ctx_len, ctx_len) by target and source.
        position: Number of earlier tokens of each row (B,).
        T: Number of targets.
        U: Number of sources.

    Returns:
        Weights (B, H, T, U), 0 in the future.
    """
    target = (position[:, None] + torch.arange(T, device=position.device)).clamp(max=f.shape[1] - 1)
    # (H, B, T, U) -> (B, H, T, U)
    return f.tril()[:, target, :U].transpose(0, 1)


def extended(table: Tensor, length: int) -> Tensor:
    """Extend a table by the mean of its last quarter.

    Args:
        table: Table (..., ctx_len).
        length: Number of entries wanted.

    Returns:
        Table (..., length), or the given table if `length` is at most ctx_len.
    """
    ctx_len = table.shape[-1]
    if length <= ctx_len:
        return table
    rest = table[..., -max(1, ctx_len // 4) :].mean(-1, keepdim=True)
    return torch.cat([table, rest.expand(*table.shape[:-1], length - ctx_len)], -1)
