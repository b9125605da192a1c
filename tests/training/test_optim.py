"""Muon: its effect on singular values and on weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.helpers.runs import small_trainer
from timemix.training import optim
from timemix.training.optim import _QUINTICS, Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 4)])
def test_singular_values_move_to_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    moved = U.mT @ orthogonalized(matrices * 1e-3) @ V.mT
    values = moved.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(moved, torch.diag_embed(values), atol=1e-12, rtol=0)
    share = S / S.norm(dim=1, keepdim=True)
    assert (values[share > 0.01] > 0.69).all()
    assert (values < (74 * share).clamp(max=1.28)).all()


@given(share=st.floats(0, 1.01))
def test_each_polynomial_takes_what_the_one_before_leaves(share):
    x = share
    for a, b, c in _QUINTICS:
        x = a * x + b * x**3 + c * x**5
    assert (0.69 if share > 0.01 else 0) <= x <= 1.28


@pytest.mark.parametrize("rank", [1, 2, 64])
def test_bfloat16_products_throw_nothing_off(rank):
    matrices = torch.randn(8, 64, rank) @ torch.randn(8, rank, 96)
    moved = torch.linalg.svdvals(orthogonalized(matrices.bfloat16()).double())[:, :rank]
    share = torch.linalg.svdvals(matrices.double())[:, :rank] / matrices.double().norm(dim=(1, 2))[:, None]
    assert (moved[share > 0.01] > 0.65).all()
    assert (moved < 1.3).all()


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalized(torch.zeros(2, 3, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="came with torch 2.9")
def test_it_goes_where_the_frameworks_own_goes(monkeypatch):
    """Both updates agree with the exact orthogonal factor, which each approximates in its own way."""

    def exact(matrices):
        U, _, V = torch.linalg.svd(matrices, full_matrices=False)
        return U @ V

    monkeypatch.setattr(optim, "orthogonalized", exact)
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda update, *_: exact(update))
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (12, 8), (8, 8), (8, 20))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, lr=1e-2, weight_decay=0.1, precision="float32")
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_embedding_learns_at_its_own_multiple_of_the_rate(tmp_path, optimizer):
    def gone(multiple):
        trainer = small_trainer(tmp_path, name=f"at {multiple}", optimizer=optimizer, embedding_lr=multiple)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train_step()
        return {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}

    once, thrice, never = gone(1.0), gone(3.0), gone(0.0)
    torch.testing.assert_close(thrice.pop("embedding.weight"), 3 * once["embedding.weight"], atol=1e-6, rtol=1e-4)
    assert not never.pop("embedding.weight").any()
    for others in (thrice, never):
        for name, change in others.items():
            assert torch.equal(change, once[name])
