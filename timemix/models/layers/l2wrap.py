"""L2Wrap: a gradient that keeps the largest logit of each token near 0, without a change of the loss."""

from torch import Tensor


def l2wrap(loss: Tensor, logits: Tensor, weight: float) -> Tensor:
    """Return the loss, with an additional gradient: that of weight * mean(z^2) / 2 for the largest logits z (B, T).

    The gradient of the largest logit of each token increases by weight times the logit, divided by the number of
    tokens. The gradient scales with the gradient of the result, so gradient accumulation does not change the factor.

    Args:
        loss: Loss in nats, a scalar.
        logits: Logits (B, T, V).
        weight: Factor of the gradient, at least 0; the original code has 1e-4.

    Returns:
        A scalar, equal to `loss`.

    Source:
        The training code of RWKV, https://github.com/BlinkDL/RWKV-LM.
    """
    if not weight:
        return loss
    # (B, T, V) -> (B, T)
    largest = logits.max(-1).values.to(loss.dtype)
    penalty = weight / 2 * largest.square().mean()
    return loss + (penalty - penalty.detach())
