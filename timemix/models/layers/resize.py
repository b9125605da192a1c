"""Weights of a model for another context length: its tables over time cut, or extended by their last quarter's mean.

A table of W = f(t-u) alpha(u) beta(t) says little by itself: W stays the same when f(lag) is multiplied by c^lag,
alpha(u) by c^u and beta(t) by c^-t. So before a table is extended c is chosen, for each head, such that alpha and beta
run as level as they can: the slopes of their logarithms sum to zero in squares. Where alpha or beta is left out or has
values at or below 0, c is 1.
"""

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.ops.common.history import extended

TABLES = ("f", "alpha", "beta", "gamma")


def with_ctx_len(weights: dict[str, Tensor], old: int, ctx_len: int, *, logarithms: bool = False) -> dict[str, Tensor]:
    """Weights by name with tables for `ctx_len` positions instead of `old`; within both of them W is the same.

    `logarithms`: the tables hold those of W's factors. Raises InvalidValue for a free W, which says nothing of
    positions that it was not trained on.
    """
    result = dict(weights)
    mixers = {name.rpartition(".")[0] for name in weights if name.endswith(".mixer.f")}
    for mixer in mixers:
        tables = {name: weights[f"{mixer}.{name}"] for name in TABLES if f"{mixer}.{name}" in weights}
        if tables["f"].ndim == 3:
            if ctx_len > old:
                raise InvalidValue(
                    f"a free W cannot be extended from ctx_len {old} to {ctx_len}; keep model.ctx_len {old}"
                )
            tables["f"] = tables["f"][:, :ctx_len, :ctx_len]
        elif ctx_len > old:
            tables = level(tables, logarithms=logarithms)
        result |= {f"{mixer}.{name}": resized_table(table, ctx_len) for name, table in tables.items()}
    return result


def resized_table(table: Tensor, ctx_len: int) -> Tensor:
    """A table (..., ctx_len): its beginning, or itself and then the mean of its last quarter."""
    return extended(table, ctx_len)[..., :ctx_len].clone()


def level(tables: dict[str, Tensor], *, logarithms: bool = False) -> dict[str, Tensor]:
    """The tables with the c of each head (see above) worked in."""
    f, alpha, beta = (tables.get(name) for name in ("f", "alpha", "beta"))
    assert f is not None
    if alpha is None or (beta is None and not logarithms):
        return tables
    if not logarithms and not ((alpha > 0).all() and beta is not None and (beta > 0).all()):
        return tables
    time = torch.arange(f.shape[-1], dtype=torch.float64)
    if logarithms:
        # beta cancels between numerator and denominator, so that alpha alone can be made level.
        log_c = -_slope(alpha.double())
        return tables | {name: (tables[name].double() + log_c * time).to(f.dtype) for name in ("f", "alpha")}
    assert beta is not None
    log_c = (_slope(beta.double().log()) - _slope(alpha.double().log())) / 2
    growth = (log_c * time).exp()
    level = {"f": f.double() * growth, "alpha": alpha.double() * growth, "beta": beta.double() / growth}
    return tables | {name: table.to(f.dtype) for name, table in level.items()}


def _slope(y: Tensor) -> Tensor:
    """Least-squares slope (H, 1) of rows (H, T) over 0 ... T - 1; 0 for a single column."""
    time = torch.arange(y.shape[-1], dtype=y.dtype)
    time -= time.mean()
    return (y * time).sum(-1, keepdim=True) / (time**2).sum().clamp(min=1)
