"""Weights for another context length: tables over time are cut, or extended by the mean of their last quarter.

The tables of W(t, u) = f(t-u) alpha(u) beta(t) are not unique: W stays the same if f(lag) is multiplied by c^lag,
alpha(u) by c^u and beta(t) by c^-t. Before tables are extended, c is chosen for each head such that alpha and beta
have the least trend: c minimizes the sum of the squared slopes of log alpha and log beta. If the model has no alpha or
no beta, or if alpha or beta has a value at or below 0, then c is 1.
"""

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.ops.common.history import extended

TABLES = ("f", "alpha", "beta", "gamma")


def with_ctx_len(weights: dict[str, Tensor], old: int, ctx_len: int, *, logarithms: bool = False) -> dict[str, Tensor]:
    """Return the weights of a model for another context length.

    W does not change at positions below the smaller of the two context lengths.

    Args:
        weights: Weights by name.
        old: Context length of `weights`.
        ctx_len: New context length.
        logarithms: Whether the tables hold the logarithms of the factors of W.

    Returns:
        New weights by name.

    Raises:
        InvalidValue: W is free and `ctx_len` is above `old`. A free W has no values beyond the trained positions.
    """
    result = dict(weights)
    mixers = {name.rpartition(".")[0] for name in weights if name.endswith(".mixer.f")}
    for mixer in mixers:
        tables = {name: weights[f"{mixer}.{name}"] for name in TABLES if f"{mixer}.{name}" in weights}
        if tables["f"].ndim == 3:
            if ctx_len > old:
                raise InvalidValue(
                    f"a free W cannot be extended from ctx_len {old} to {ctx_len}; set model.ctx_len to at most {old}"
                )
            tables["f"] = tables["f"][:, :ctx_len, :ctx_len]
        elif ctx_len > old:
            tables = level(tables, logarithms=logarithms)
        result |= {f"{mixer}.{name}": resized_table(table, ctx_len) for name, table in tables.items()}
    return result


def resized_table(table: Tensor, ctx_len: int) -> Tensor:
    """Cut a table at its end to the length ctx_len, or extend the table by the mean of its last quarter."""
    return extended(table, ctx_len)[..., :ctx_len].clone()


def level(tables: dict[str, Tensor], *, logarithms: bool = False) -> dict[str, Tensor]:
    """Multiply f, alpha and beta by powers of c that give alpha and beta the least trend and leave W unchanged.

    Args:
        tables: Tables by name: "f" (H, ctx_len) by lag, optionally "alpha" and "beta" (H, ctx_len). Other tables stay
            unchanged.
        logarithms: Whether the tables hold logarithms.

    Returns:
        Tables by name.
    """
    f, alpha, beta = (tables.get(name) for name in ("f", "alpha", "beta"))
    assert f is not None
    if alpha is None or (beta is None and not logarithms):
        return tables
    if not logarithms and not ((alpha > 0).all() and beta is not None and (beta > 0).all()):
        return tables
    time = torch.arange(f.shape[-1], dtype=torch.float64)
    if logarithms:
        # beta cancels between numerator and denominator, so only the trend of alpha matters.
        log_c = -_slope(alpha.double())
        return tables | {name: (tables[name].double() + log_c * time).to(f.dtype) for name in ("f", "alpha")}
    assert beta is not None
    log_c = (_slope(beta.double().log()) - _slope(alpha.double().log())) / 2
    growth = (log_c * time).exp()
    level = {"f": f.double() * growth, "alpha": alpha.double() * growth, "beta": beta.double() / growth}
    return tables | {name: table.to(f.dtype) for name, table in level.items()}


def _slope(y: Tensor) -> Tensor:
    """Return the least-squares slope (H, 1) of rows (H, T) over positions 0 to T - 1. If T = 1, the slope is 0."""
    time = torch.arange(y.shape[-1], dtype=y.dtype)
    time -= time.mean()
    return (y * time).sum(-1, keepdim=True) / (time**2).sum().clamp(min=1)
