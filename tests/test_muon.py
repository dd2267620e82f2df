"""Muon against an exact singular value decomposition, and against PyTorch's own."""

import math

import pytest
import torch

from toolbox.muon import Muon, orthogonal

SHAPES = [(6, 6), (5, 20), (20, 5), (1, 7), (7, 1), (1, 1), (64, 288), (288, 64)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_become_one(shape, scale):
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    matrix = (u * torch.linspace(1, 0.3, len(vh))) @ vh
    result = orthogonal((scale * matrix).float()).double()
    values = u.T @ result @ vh.T  # diagonal, if the singular vectors are the same
    torch.testing.assert_close(values, torch.diag(values.diagonal()), atol=1e-3, rtol=0)
    torch.testing.assert_close(u @ values @ vh, result, atol=1e-3, rtol=0)  # and nothing else
    assert values.diagonal().min() > 0.65 and values.diagonal().max() < 1.25


def test_bfloat16_changes_it_by_a_few_percent():
    matrix = torch.randn(96, 864, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = orthogonal(matrix)
    fine = orthogonal(matrix)
    assert coarse.dtype == torch.bfloat16
    assert (coarse - fine).norm() < 0.03 * fine.norm()


def test_each_matrix_of_a_stack_is_as_if_alone():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([orthogonal(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonal(matrices), alone)


def test_matrices_of_one_shape_are_updated_each_by_its_own_gradient():
    """A kernel (4, 2, 1, 3) is a matrix (4, 6), too."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in [(4, 6), (4, 2, 1, 3), (6, 4), (4, 6)]]
    twins = [w.clone() for w in weights]
    for w in weights + twins:
        w.requires_grad_()
    for w, twin in zip(weights, twins, strict=True):
        w.grad = torch.randn(w.shape)
        twin.grad = w.grad.clone()
        Muon([twin], lr=0.1).step()
    Muon(weights, lr=0.1).step()
    torch.testing.assert_close(weights, twins)


def test_what_a_gradient_does_not_have_is_not_invented():
    assert not orthogonal(torch.zeros(4, 6)).any()
    one_direction = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0]))
    values = torch.linalg.svdvals(orthogonal(one_direction))
    assert 0.65 < values[0] < 1.25 and values[1] < 1e-3


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4), (8, 3, 3, 3), (40, 2, 3, 3)])
def test_a_step_is_momentum_nesterov_decay_and_an_orthogonal_turn(shape):
    torch.manual_seed(0)
    w = torch.randn(shape, requires_grad=True)
    if len(shape) == 4:
        w.data = w.data.contiguous(memory_format=torch.channels_last)
    expected, average = w.detach().clone(), torch.zeros(shape)
    muon = Muon([w], lr=0.1, momentum=0.9, weight_decay=0.3)
    longer = max(shape[0], math.prod(shape[1:]))
    for _ in range(3):
        w.grad = torch.randn(shape)
        before = w.grad.clone()
        muon.step()
        assert torch.equal(w.grad, before)
        average = 0.9 * average + 0.1 * before
        turn = orthogonal((0.1 * before + 0.9 * average).flatten(1)).reshape(shape)
        expected = expected * (1 - 0.1 * 0.3) - 0.1 * 0.2 * math.sqrt(longer) * turn
        torch.testing.assert_close(w.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="came with PyTorch 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_equals_pytorchs_own(shape):
    """To a few percent of a step: PyTorch works in bfloat16, 8 bits, with other coefficients."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    muon = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    options |= {"adjust_lr_fn": "match_rms_adamw", "ns_steps": orthogonal.__defaults__[0]}
    judge = torch.optim.Muon([theirs], **options)
    for _ in range(6):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        judge.step()
    assert (ours - theirs).norm() < 0.15 * (ours - start).norm()
