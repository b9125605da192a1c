"""Muon: what it does to singular values, and to weights."""

import pytest
import torch
from torch import nn

from timemix.optim import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 4)])
def test_singular_values_move_to_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    moved = U.mT @ orthogonalized(matrices * 1e-3) @ V.mT
    values = moved.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(moved, torch.diag_embed(values), atol=1e-12, rtol=0)
    # The polynomial overshoots on purpose; what is below a hundredth of the norm needs more than five steps.
    strong = S / S.norm(dim=1, keepdim=True) > 0.01
    assert (values[strong] > 0.6).all()
    assert (values[strong] < 1.3).all()


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalized(torch.zeros(2, 3, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="came with torch 2.9")
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2e-2), ("float32", 3e-2)])
def test_it_goes_where_the_frameworks_own_goes(precision, tolerance):
    """The framework's computes in bfloat16, hence the tolerance: of the distance gone, not of the weights."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (12, 8), (8, 8), (8, 20))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    muon = Muon(ours, lr=1e-2, weight_decay=0.1, precision=precision)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < tolerance * (b - before).norm()


def test_a_matrix_without_gradient_stays_as_it_is():
    still, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.eye(2)
    Muon([still, moved], lr=0.1, weight_decay=0.1, precision="float32").step()
    assert (still == 1).all()
    assert (moved != 1).any()


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    matrix = nn.Parameter(torch.ones(2, 2))
    muon = Muon([matrix], lr=0.1, weight_decay=0.0, precision="float32")

    def closure():
        loss = (matrix * torch.eye(2)).sum()
        loss.backward()
        return loss

    assert muon.step(closure) == 2
    assert (matrix != 1).any()
