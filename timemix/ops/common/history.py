"""The history of a layer, with one entry for each past position, and lookups of tables by lag.

    append:      history[b, :, position[b] + i] = new[b, :, i]
    weights_at:  W[b, h, i, u] = f_h(position[b] + i - u), 0 in the future

Rows of a batch may be at different positions. `position` (B,) is the number of earlier tokens of each row.
"""

import torch
from torch import Tensor

from timemix.runtime.device import is_recording


def append(history: Tensor, new: Tensor, position: Tensor, lengths: Tensor | None) -> Tensor:
    """Store new entries at the position of each row, in place if gradients are disabled.

    Args:
        history: Entries of each position (B, H, ctx_len, N).
        new: New entries (B, H, T, N).
        position: Number of earlier tokens of each row (B,).
        lengths: Number of valid entries of `new` in each row (B,), 1 to T; None if all T are valid.

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
        # Indices of shape (B, T) on both sides of a slice of heads give (B, T, H, N).
        history[rows, :, position[:, None] + time] = new.transpose(1, 2)
    else:
        # The valid pairs (row, step), one after another: (pairs, H, N)
        row, step = (time < lengths[:, None]).nonzero(as_tuple=True)
        history[row, :, position[row] + step] = new.transpose(1, 2)[row, step]
    return history


def positions_read(position: Tensor, T: int, ctx_len: int) -> int:
    """Return the number of positions up to the newest of the next T tokens of any row.

    A CUDA graph is recorded once for all positions, and cannot read them, so it reads all positions of the history. The
    lags of later positions are negative.

    Args:
        position: Number of earlier tokens of each row (B,).
        T: Number of new tokens.
        ctx_len: Number of positions of the history.

    Returns:
        Number of positions, 1 to ctx_len.
    """
    if is_recording() or not len(position):
        return ctx_len
    return min(int(position.max()) + T, ctx_len)


def lags(position: Tensor, T: int, U: int) -> Tensor:
    """Return the lags t - u between the next T positions t of each row and all positions u.

    Args:
        position: Number of earlier tokens of each row (B,).
        T: Number of target positions t.
        U: Number of source positions u.

    Returns:
        Lags (B, T, U), negative if u is in the future of t.
    """
    target = position[:, None] + torch.arange(T, device=position.device)
    return target[:, :, None] - torch.arange(U, device=position.device)


def lags_in_documents(resets: Tensor) -> Tensor:
    """Return the lags t - u between the positions t and u of each row, without sources outside the document of t.

    Args:
        resets: Whether a token is the first of a document (B, T) bool. Each row begins with a document.

    Returns:
        Lags (B, T, T), negative if u is in the future of t or in another document.
    """
    time, document = torch.arange(resets.shape[1], device=resets.device), resets.long().cumsum(1)
    return (time[:, None] - time).where(document[:, :, None] == document[:, None, :], -1)


def weights_at(f: Tensor, lag: Tensor) -> Tensor:
    """Look up the weights f at given lags.

    Args:
        f: Weights (H, ctx_len) by lag.
        lag: Lags (B, T, U), negative if u is in the future of t.

    Returns:
        Weights (B, H, T, U), 0 if u is in the future of t.
    """
    # The clamp needs an upper bound because padding may be past the end of the table. (H, B, T, U) -> (B, H, T, U)
    return torch.where(lag >= 0, f[:, lag.clamp(0, f.shape[1] - 1)], 0).transpose(0, 1)


def pairs_at(f: Tensor, position: Tensor, T: int, U: int) -> Tensor:
    """Look up the weights f of pairs of positions.

    Args:
        f: Weights (H, ctx_len, ctx_len) by target position t and source position u.
        position: Number of earlier tokens of each row (B,).
        T: Number of target positions t.
        U: Number of source positions u.

    Returns:
        Weights (B, H, T, U), 0 if u is in the future of t.
    """
    target = (position[:, None] + torch.arange(T, device=position.device)).clamp(max=f.shape[1] - 1)
    # (H, B, T, U) -> (B, H, T, U)
    return f.tril()[:, target, :U].transpose(0, 1)


def extended(table: Tensor, length: int) -> Tensor:
    """Extend a table to a given length, with the mean of its last quarter.

    Args:
        table: Table (..., ctx_len).
        length: Number of entries of the result.

    Returns:
        Table (..., length), or the given table if `length` is at most ctx_len.
    """
    ctx_len = table.shape[-1]
    if length <= ctx_len:
        return table
    rest = table[..., -max(1, ctx_len // 4) :].mean(-1, keepdim=True)
    return torch.cat([table, rest.expand(*table.shape[:-1], length - ctx_len)], -1)
