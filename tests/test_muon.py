"""Muon against an exact singular value decomposition, and against PyTorch's own."""

import math

import pytest
import torch

from toolbox.muon import Muon, orthogonal

SHAPES = [(6, 6), (5, 20), (20, 5), (1, 7), (7, 1), (1, 1), (64, 288)]


def well_conditioned(rows, columns, seed=0):
    """A matrix with singular values from 0.5 to 1, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.5, len(vh), dtype=torch.float64)
    return ((u * s) @ vh).float(), u, s, vh


def newton_schulz(s, length):
    """What five rounds do to singular values: plain numbers, one by one."""
    s = s / length
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_stay_and_lengths_become_one(shape):
    matrix, u, s, vh = well_conditioned(*shape)
    result = orthogonal(matrix).double()
    inner = u.T @ result @ vh.T  # diagonal, if the singular vectors are the same
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-4, rtol=0)
    torch.testing.assert_close((u * inner.diagonal()) @ vh, result, atol=1e-4, rtol=0)  # and nothing lies beside them
    assert inner.diagonal().min() > 0.65 and inner.diagonal().max() < 1.25
    torch.testing.assert_close(inner.diagonal(), newton_schulz(s, s.norm()), atol=1e-4, rtol=0)
    assert result.shape == shape


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_length_of_a_gradient_does_not_matter(scale):
    matrix = well_conditioned(5, 9)[0]
    torch.testing.assert_close(orthogonal(scale * matrix), orthogonal(matrix), atol=1e-4, rtol=0)


def test_no_gradient_is_no_step_and_a_lost_direction_stays_lost():
    assert not orthogonal(torch.zeros(4, 6)).any()
    flat = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0]))  # one direction only
    values = torch.linalg.svdvals(orthogonal(flat))
    assert 0.65 < values[0] < 1.25 and values[1] < 1e-4


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4), (8, 3, 3, 3), (40, 2, 3, 3)])
def test_steps_are_those_of_an_exact_decomposition(shape):
    """Momentum, Nesterov's look ahead, decay and size, with the singular values mapped one by one; in double precision."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
    if len(shape) == 4:
        w.data = w.data.contiguous(memory_format=torch.channels_last)
    expected, average = w.detach().clone(), torch.zeros(shape).double()
    muon = Muon([w], lr=0.1, momentum=0.9, weight_decay=0.3)
    rows, columns = shape[0], math.prod(shape[1:])
    for _ in range(4):
        w.grad = torch.randn(*shape, generator=generator, dtype=torch.float64)
        before = w.grad.clone()
        muon.step()
        assert torch.equal(w.grad, before)
        average = 0.9 * average + 0.1 * before
        u, s, vh = torch.linalg.svd((0.1 * before + 0.9 * average).reshape(rows, columns), full_matrices=False)
        turn = (u * newton_schulz(s, s.norm())) @ vh
        expected = expected * (1 - 0.1 * 0.3) - 0.1 * 0.2 * math.sqrt(max(rows, columns)) * turn.reshape(shape)
        torch.testing.assert_close(w.detach(), expected, atol=1e-9, rtol=1e-9)


def test_a_steps_numbers_are_as_large_as_adamws():
    for shape in [(64, 64), (16, 144), (144, 16)]:
        w = torch.zeros(shape, requires_grad=True)
        w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([w], lr=1.0).step()
        # min / max of the sides is the share of the directions that are turned
        usual = 0.2 * math.sqrt(max(shape)) * math.sqrt(min(shape) / (shape[0] * shape[1]))
        assert w.detach().square().mean().sqrt().item() == pytest.approx(usual, rel=0.25) and usual == pytest.approx(0.2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_equals_pytorchs_own(shape):
    """PyTorch works in bfloat16, 8 bits: so to 3 % of a step, and its noise must not add up in one direction."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(shape).requires_grad_(), torch.zeros(shape).requires_grad_()
    theirs.data.copy_(ours.data)
    start = ours.detach().clone()
    muon = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    judge = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        muon.step()
        judge.step()
        assert (ours - theirs).norm() < 0.06 * (ours - before).norm()
        torch.testing.assert_close(muon.state[ours]["average"], judge.state[theirs]["momentum_buffer"])
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_its_state_is_saved_and_goes_on():
    def steps(w, muon, gradients):
        for gradient in gradients:
            w.grad = gradient
            muon.step()
        return w.detach()

    gradients = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    straight = torch.ones(4, 8, requires_grad=True)
    steps(straight, Muon([straight], lr=0.1), gradients)
    first = torch.ones(4, 8, requires_grad=True)
    muon = Muon([first], lr=0.1)
    steps(first, muon, gradients[:3])
    again = Muon([first], lr=0.5)
    again.load_state_dict(muon.state_dict())
    assert torch.equal(steps(first, again, gradients[3:]), straight.detach())
