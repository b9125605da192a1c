"""Documents of a row as rows of their own, for models that cannot reset their state within a row."""

from collections.abc import Callable

import torch
from torch import Tensor


def by_document(function: Callable[[Tensor], Tensor], tokens: Tensor, resets: Tensor) -> Tensor:
    """Apply a causal function of rows to each document of the rows alone.

    Documents of similar length, from 2^(n-1) + 1 to 2^n tokens, become the rows of one call. Padding thus at most
    doubles the number of tokens.

    Args:
        function: Maps tokens (D, L) to rows (D, L, C).
        tokens: Token ids (B, T).
        resets: Whether a token is the first of a document (B, T) bool. Each row begins with a document.

    Returns:
        The rows (B, T, C).
    """
    B, T = tokens.shape
    if not B:
        return function(tokens)
    begins = resets.clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten().tolist()
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in zip(starts, [*starts[1:], B * T], strict=True):
        groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
    places, results = [], []
    for group in groups.values():
        start, end = torch.tensor(group, device=tokens.device)[:, :, None].unbind(1)
        # (D, L), with the tokens of the next documents as padding
        place = start + torch.arange(int((end - start).max()), device=tokens.device)
        is_own = place < end
        x = function(tokens.flatten()[place.clamp(max=B * T - 1)])
        places.append(place[is_own])
        results.append(x[is_own])
    return torch.cat(results)[torch.cat(places).argsort()].view(B, T, -1)
