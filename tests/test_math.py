"""The derivation of docs/math.md, carried out with numbers; and its numbers and the code's comments agree."""

import re

import pytest
import torch
from conftest import ROOT
from torch.distributions import Normal, kl_divergence

from processes import NoiseSchedule, sample

SCHEDULE = NoiseSchedule.linear(50)
BETAS = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)


def posterior(x_t, x0, t):
    """(4) by Bayes on a fine grid, without any algebra: prior (3) at t - 1 times the likelihood (1) of x_t."""
    grid = torch.linspace(-3, 3, 200_001, dtype=torch.float64)
    a, beta = ALPHA_BAR[t - 1], BETAS[t]
    log = Normal(a.sqrt() * x0, (1 - a).sqrt()).log_prob(grid) + Normal((1 - beta).sqrt() * grid, beta.sqrt()).log_prob(
        torch.tensor(x_t)
    )
    weight = log.softmax(0)
    mean = (weight * grid).sum()
    return mean.item(), (weight * (grid - mean) ** 2).sum().sqrt().item()


@pytest.mark.parametrize("t", [1, 20, 49])
def test_a_step_at_eta_1_is_the_posterior(t):
    """math.md (4), (9), (10): mean and spread of one step of the loop, for a network that knows x0 = 0.3."""
    x0, x_t = 0.3, 0.9
    a = ALPHA_BAR[t]

    def knows(x, t):
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    x = torch.full((100_000, 1), x_t, dtype=torch.float64)
    x = sample(knows, x, SCHEDULE, eta=1, timesteps=[(t, t - 1)], generator=torch.Generator().manual_seed(0))
    mean, spread = posterior(x_t, x0, t)
    assert x.mean().item() == pytest.approx(mean, abs=5 * spread / 100_000**0.5 + 1e-5)
    assert x.std().item() == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize("t", [1, 20, 49])
def test_the_divergence_is_a_weighted_squared_error(t):
    """math.md (6), by PyTorch's own divergence of two normal distributions."""
    ab, ab_prev, beta = ALPHA_BAR[t], ALPHA_BAR[t - 1], BETAS[t]
    noise, guess, x0 = torch.tensor([0.7, 0.2, 0.3], dtype=torch.float64)
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * noise
    variance = (1 - ab_prev) / (1 - ab) * beta

    def step(x0):
        return Normal((ab_prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab_prev) * x_t) / (1 - ab), variance.sqrt())

    x0_hat = (x_t - (1 - ab).sqrt() * guess) / ab.sqrt()
    expected = beta**2 / (2 * variance * (1 - beta) * (1 - ab)) * (noise - guess) ** 2
    torch.testing.assert_close(kl_divergence(step(x0), step(x0_hat)), expected)


def test_the_bound_holds_and_the_best_denoiser_makes_it_smallest():
    """math.md (5): for data N(0, s^2) the bound lies above -log p, and any guess but the exact denoiser's costs more.

    Sum of the weighted errors (6), the last step's -log likelihood at t = 0, and the start's divergence from pure noise.
    """
    s2 = torch.tensor(0.5, dtype=torch.float64)
    schedule = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

    def bound(scale):  # x0_hat = scale * the best guess; means over data and noise, in closed form
        ab, ab_prev, beta = schedule[1:], schedule[:-1], betas[1:]
        best = ab.sqrt() * s2 / (ab * s2 + 1 - ab)  # E[x0 | x_t] = best * x_t
        error = s2 * (1 - scale * best * ab.sqrt()) ** 2 + (1 - ab) * (scale * best) ** 2  # E (x0 - x0_hat)^2
        variance = (1 - ab_prev) / (1 - ab) * beta
        steps = (ab_prev.sqrt() * beta / (1 - ab)) ** 2 * error / (2 * variance)
        ab0 = schedule[0]
        best0 = scale * ab0.sqrt() * s2 / (ab0 * s2 + 1 - ab0)
        error0 = s2 * (1 - best0 * ab0.sqrt()) ** 2 + (1 - ab0) * best0**2
        last = 0.5 * torch.log(2 * torch.pi * betas[0]) + error0 / (2 * betas[0])
        end = schedule[-1]
        start = 0.5 * (end * s2 + (1 - end) - 1 - torch.log(1 - end))
        return (steps.sum() + last + start).item()

    entropy = (0.5 * torch.log(2 * torch.pi * s2) + 0.5).item()  # the mean of -log p, exactly
    assert 0 < bound(1.0) - entropy < 0.5  # nats; the fixed variance of (4) is not the best one for such data
    assert bound(0.97) > bound(1.0) and bound(1.03) > bound(1.0)


def test_the_weight_that_ddpm_drops():
    """The two numbers below (6) in the text."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    ab = torch.cumprod(1 - betas, 0)

    def weight(t):
        variance = (1 - ab[t - 1]) / (1 - ab[t]) * betas[t]
        return (betas[t] ** 2 / (2 * variance * (1 - betas[t]) * (1 - ab[t]))).item()

    found = re.search(r"\(([\d.]+) at t = 1 and ([\d.]+) at t = 500 for the linear schedule\)", text())
    assert weight(1) == pytest.approx(float(found[1]), rel=0.1) and weight(500) == pytest.approx(float(found[2]), rel=0.1)


def test_the_share_of_fresh_noise_in_the_text():
    """Section 6: of the noise that is left after a step at eta = 1, sigma^2 / (1 - ab_prev) is fresh; cosine, 50 steps."""
    alpha_bar = [*NoiseSchedule.cosine().alpha_bar.tolist(), 1.0]

    def fresh(t, t_prev):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        return 100 * (1 - a_prev) / (1 - a) * (1 - a / a_prev) / (1 - a_prev)

    found = re.search(r"(\d+) % in the second, (\d+) % in the middle", text())
    assert fresh(999, 979) > 99
    assert fresh(979, 959) == pytest.approx(int(found[1]), abs=0.5) and fresh(499, 479) == pytest.approx(int(found[2]), abs=0.5)


def test_the_table_of_schedules_is_true():
    for name, row in (("linear", "linear (DDPM)"), ("scaled_linear", "scaled linear"), ("cosine", "cosine (Nichol")):
        alpha_bar = getattr(NoiseSchedule, name)().alpha_bar
        cells = [cell.strip().replace(",", "") for cell in next(li for li in text().splitlines() if row in li).split("|")[2:6]]
        expected = [alpha_bar[0], alpha_bar[500], alpha_bar[999], alpha_bar[999] ** -0.5]
        for cell, value in zip(cells, expected, strict=True):
            assert float(cell) == pytest.approx(value.item(), rel=0.03), (name, cell)


def text():
    return (ROOT / "docs/math.md").read_text(encoding="utf8")


def test_each_number_in_the_code_is_an_equation_and_each_equation_has_its_code_and_test():
    equations = re.findall(r"^\*\*\((\d+)\)\*\*(.*?)(?=\n\n)", text(), flags=re.MULTILINE | re.DOTALL)
    numbers = [int(number) for number, _ in equations]
    assert numbers == list(range(1, len(numbers) + 1))

    sources = {path: path.read_text(encoding="utf8") for path in ROOT.glob("*.py")}
    tests = "".join(path.read_text(encoding="utf8") for path in (ROOT / "tests").glob("test_*.py"))
    code = "".join(sources.values())
    mentioned = {int(n) for n in re.findall(r"math\.md \((\d+)\)", code + tests)}
    assert mentioned == set(numbers)
    for number, equation in equations:
        named = re.search(r"· code: (.*?) · test: (.*)", equation.replace("\n", " "))
        assert named, number
        for name in re.findall(r"`([\w.]+)`", named[1]):
            assert (ROOT / name).exists() or f"def {name.split('.')[-1]}(" in code, (number, name)
        for name in re.findall(r"`(\w+)`", named[2]):
            assert f"def {name}(" in tests, (number, name)
