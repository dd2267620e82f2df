"""The derivation of docs/math.md, carried out with numbers; and the figures of docs/ are right.

What an equation claims of code is proved where that code is tested; here is what lies between.
"""

import itertools
import math
import re

import pytest
import torch
from conftest import ROOT
from torch.distributions import Binomial, Categorical, MixtureSameFamily, MultivariateNormal, Normal

from latent_ext.clip import contrastive_loss
from latent_ext.data import held_out_combination
from latent_ext.guidance import guided
from latent_ext.vae import kl_divergence
from processes import NoiseSchedule, add_noise, randn_like, sample
from toolbox.cats import ATTRIBUTES, COATS

SCHEDULE = NoiseSchedule.linear(50)
ALPHA_BAR = SCHEDULE.alpha_bar.double()
BETA = 1 - ALPHA_BAR / torch.cat([torch.ones(1), ALPHA_BAR[:-1]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---- one step, the bound, the loss ---------------------------------------------------------------


def test_add_noise_is_what_many_small_steps_do():
    """math.md (1) to (3): the mean and variance of x_t, step by step, and in one jump."""
    mean, variance = 0.7, 0.0
    x0, exact = double(0.7), torch.ones(1).double()
    for t, beta in enumerate(BETA.tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        level = torch.tensor([t])
        assert add_noise(x0, level, SCHEDULE, 0 * exact)[0].item() == pytest.approx(mean, rel=1e-5)
        noise = add_noise(0 * x0, level, SCHEDULE, exact)[0].item()
        assert noise**2 == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("t", [1, 20, 49])
def test_a_step_at_eta_1_is_the_posterior(t):
    """math.md (4), (9), (10): one step of a network that knows x0, and Bayes on a fine grid."""
    x0, x_t, ab, beta = 0.3, 0.9, ALPHA_BAR[t], BETA[t]
    grid = torch.linspace(-3, 3, 200_001, dtype=torch.float64)  # of x_{t-1}
    prior = Normal(ALPHA_BAR[t - 1].sqrt() * x0, (1 - ALPHA_BAR[t - 1]).sqrt()).log_prob(grid)
    likelihood = Normal((1 - beta).sqrt() * grid, beta.sqrt()).log_prob(torch.tensor(x_t).double())
    weight = (prior + likelihood).softmax(0)
    mean = (weight * grid).sum().item()
    std = (weight * (grid - mean) ** 2).sum().sqrt().item()

    x = torch.full((100_000, 1), x_t, dtype=torch.float64)
    network = lambda x, t: (x - ab.sqrt() * x0) / (1 - ab).sqrt()  # noqa: E731
    x = sample(network, x, SCHEDULE, eta=1, timesteps=[(t, t - 1)], generator=seeded())
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / 100_000**0.5 + 1e-5)
    assert x.std().item() == pytest.approx(std, rel=0.02)


def weight_of(t, schedule):
    """math.md (6): what a squared error of the noise at step t >= 1 costs, in nats."""
    ab, ab_prev = schedule.alpha_bar.double()[t], schedule.alpha_bar.double()[t - 1]
    beta = 1 - ab / ab_prev
    variance = (1 - ab_prev) / (1 - ab) * beta
    return beta**2 / (2 * variance * (1 - beta) * (1 - ab))


@pytest.mark.parametrize("t", [1, 20, 49])
def test_the_divergence_is_a_weighted_squared_error(t):
    """math.md (6): two steps of `sample` that differ in the predicted noise only."""
    x_t, noise, guess = double(0.9, 0.7, 0.2).view(3, 1, 1)
    options = {"timesteps": [(t, t - 1)], "eta": 1.0}
    means = [
        sample(lambda x, t, y=y: y, x_t, SCHEDULE, generator=seeded(), **options)
        for y in (noise, guess)
    ]
    many = sample(lambda x, t: 0 * x, x_t.expand(200_000, 1), SCHEDULE, **options)
    got = (means[0] - means[1]) ** 2 / (2 * many.var())  # of normal distributions, equal variances
    torch.testing.assert_close(got.squeeze(), weight_of(t, SCHEDULE) * 0.5**2, rtol=0.02, atol=1e-6)


def test_the_bound_holds_and_the_best_denoiser_makes_it_smallest():
    """math.md (5) for data N(0, 0.5): above -log p, and any but the exact denoiser costs more."""
    schedule, variance = NoiseSchedule.linear(), 0.5
    x0, noise = (double(1, 1, -1, -1) * variance**0.5).repeat(1000), double(1, -1, 1, -1)
    noise = noise.repeat(1000)  # for means of squares, 1 and -1 stand for all normal numbers
    t = torch.arange(1000).repeat_interleave(4)
    ab, beta0 = schedule.alpha_bar.double()[t], 1 - schedule.alpha_bar.double()[0]
    x_t, _ = add_noise(x0, t, schedule, noise)
    last = ab[-1]
    start = 0.5 * (last * variance - last - torch.log(1 - last))  # KL of x_T and pure noise

    def bound(scale):
        guess = scale * ab.sqrt() * variance / (ab * variance + 1 - ab) * x_t  # of x0
        noise_error = ((x_t - ab.sqrt() * guess) / (1 - ab).sqrt() - noise) ** 2
        steps = weight_of(torch.arange(1, 1000), schedule) * noise_error.view(1000, 4)[1:].mean(1)
        end = 0.5 * torch.log(2 * torch.pi * beta0) + ((x0 - guess)[:4] ** 2).mean() / (2 * beta0)
        return (steps.sum() + end + start).item()

    entropy = 0.5 * math.log(2 * math.pi * variance) + 0.5  # the mean of -log p, exactly
    assert 0 < bound(1.0) - entropy < 0.5  # nats: the variance of (4) is not the best one here
    assert bound(0.97) > bound(1.0) and bound(1.03) > bound(1.0)


# ---- what the best network knows -----------------------------------------------------------------

TWO = (  # weights, means and covariances of normal distributions in the plane
    double(0.3, 0.7),
    double(-0.8, 0.2, 0.6, -0.3).view(2, 2),
    double(0.1, 0, 0, 0.1, 0.2, 0.12, 0.12, 0.16).view(2, 2, 2),
)
POINTS = double(0.3, 0.1, -1.0, 0.7, 0.9, -1.2).view(3, 2)


def density(weights, means, covariances):
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def noised(means, covariances, ab):
    return ab.sqrt() * means, ab * covariances + (1 - ab) * torch.eye(2)


def mean_noise(log_p, x_t, ab):
    """By Bayes on a grid of x0, without any algebra; log_p(grid) is the data's density."""
    x0 = torch.cartesian_prod(*2 * [torch.linspace(-4, 4, 401, dtype=torch.float64)])
    noise = (x_t[:, None] - ab.sqrt() * x0) / (1 - ab).sqrt()
    share = (log_p(x0) - noise.square().sum(-1) / 2).softmax(-1)
    return (share[..., None] * noise).sum(1)


@pytest.mark.parametrize("t", [5, 20, 49])
def test_the_best_answer_is_the_slope_of_the_log_density(t):
    """math.md (12), by autograd; and how far a step of `sample` climbs with eta 1 and 0."""
    (weights, *shapes), ab, ab_prev, beta = TWO, ALPHA_BAR[t], ALPHA_BAR[t - 1], BETA[t]
    x_t = POINTS.clone().requires_grad_()
    log_p = density(weights, *noised(*shapes, ab)).log_prob(x_t)
    (slope,) = torch.autograd.grad(log_p.sum(), x_t)
    best = mean_noise(density(*TWO).log_prob, POINTS, ab)
    torch.testing.assert_close(best, -(1 - ab).sqrt() * slope, rtol=1e-5, atol=1e-6)

    options = {"timesteps": [(t, t - 1)], "generator": seeded()}
    x = sample(lambda x, t: best, POINTS, SCHEDULE, eta=1.0, **options)
    fresh = ((1 - ab_prev) / (1 - ab) * beta).sqrt() * randn_like(POINTS, seeded())
    up = (POINTS + beta * slope) / (1 - beta).sqrt() + fresh
    torch.testing.assert_close(x, up, rtol=1e-4, atol=1e-5)
    climbed = sample(lambda x, t: best, POINTS, SCHEDULE, eta=0.0, **options)
    climbed = climbed * (1 - beta).sqrt() - POINTS
    torch.testing.assert_close(climbed, beta / 2 * slope, rtol=beta / (1 - ab), atol=1e-5)


# ---- the curve -----------------------------------------------------------------------------------


def test_a_step_at_eta_0_is_eulers():
    """math.md (21), for any predicted noise and any stride."""
    schedule, x, noise = NoiseSchedule.cosine(), POINTS, POINTS.flip(0)
    ab = schedule.alpha_bar.double()
    for t, t_prev in ((900, 875), (500, 3)):
        stride = (1 / ab[t_prev] - 1).sqrt() - (1 / ab[t] - 1).sqrt()
        expected = ab[t_prev].sqrt() * (x / ab[t].sqrt() + noise * stride)
        got = sample(lambda x, t: noise, x, schedule, eta=0, timesteps=[(t, t_prev)])
        torch.testing.assert_close(got, expected)


def test_twice_as_many_steps_leave_a_quarter_of_the_error():
    """math.md (23), and half of it in the first order: the curve of N(0, 0.05) is known."""
    schedule = NoiseSchedule("log-SNR 3 to -3", torch.linspace(3, -3, 6001).double().sigmoid())
    variance = schedule.alpha_bar * 0.05 + 1 - schedule.alpha_bar  # of x_t

    def predict_noise(x, t):
        return (1 - schedule.alpha_bar[t]).sqrt() / variance[t] * x

    def error(steps, order):
        pairs = [*itertools.pairwise(range(6000, -1, -6000 // steps))]
        x = double(1.0) * variance[-1].sqrt()
        x = sample(predict_noise, x, schedule, timesteps=pairs, eta=0, order=order)
        return abs(x.item() / variance[0].sqrt().item() - 1)

    for order, ratio in ((1, 2), (2, 4)):
        assert error(40, order) / error(80, order) == pytest.approx(ratio, rel=0.1)


def test_the_best_network_draws_only_its_training_images():
    """math.md (24): the mean of all training images, each as likely as it is behind x_t."""
    images, schedule = torch.rand(5, 3, 4, 4, generator=seeded()) * 2 - 1, NoiseSchedule.sigmoid()

    def predict_noise(x, t):
        ab = schedule.alpha_bar_at(t, x)
        distance = (x[:, None] - ab.sqrt()[:, None] * images).square().sum((2, 3, 4))
        weights = (-distance / (2 * (1 - ab.flatten(1)))).softmax(1)  # (B, 5)
        x0 = torch.einsum("bi,ichw->bchw", weights, images)
        return (x - ab.sqrt() * x0) / (1 - ab).sqrt()

    for eta in (0.0, 1.0):
        x = sample(predict_noise, torch.randn(40, 3, 4, 4), schedule, eta=eta)
        nearest = (x[:, None] - images).square().mean((2, 3, 4)).min(dim=1)
        assert nearest.values.max() < 1e-5
        assert len(nearest.indices.unique()) > 1


# ---- the second evening --------------------------------------------------------------------------


def test_the_bound_of_an_autoencoder_is_tight_where_it_can_be():
    """math.md (16): z standard normal, x = 0.7 z + noise of variance v, and what Bayes finds."""
    v, b, x = double(0.2, 0.7, 1.3)

    def bound(m, s):
        decoded = ((x - b * m) ** 2 + (b * s) ** 2) / (2 * v)  # the mean over z = m + s noise
        return decoded + kl_divergence(m, (s**2).log()) + torch.log(2 * torch.pi * v) / 2

    m, s = b * x / (b**2 + v), (v / (b**2 + v)).sqrt()
    exact = -Normal(0.0, (b**2 + v).sqrt()).log_prob(x)
    torch.testing.assert_close(bound(m, s), exact)
    for other in ((m + 0.1, s), (m - 0.1, s), (m, 1.2 * s), (m, 0.8 * s)):
        assert bound(*other) > exact


def test_the_contrastive_loss_is_its_formula():
    """math.md (17), pair by pair, in plain Python."""
    captions = [4, 1, 4, 4, 0, 1]
    logits = (3 * torch.randn(6, 6, generator=seeded())).tolist()

    def mean_loss(logits):
        total = 0.0
        for i, row in enumerate(logits):
            everything = sum(math.exp(logit) for logit in row)
            right = [j for j in range(6) if captions[j] == captions[i]]
            total -= sum(math.log(math.exp(row[j]) / everything) for j in right) / len(right)
        return total / 6

    expected = (mean_loss(logits) + mean_loss(list(zip(*logits, strict=True)))) / 2
    got = contrastive_loss(torch.tensor(logits), torch.tensor(captions))
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("t", [5, 20, 49])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_follows_the_slope_of_a_sharpened_density(t, scale):
    """math.md (18), by autograd; the answers by Bayes. A context is how likely each class is."""
    (shares, *shapes), ab = TWO, ALPHA_BAR[t]

    def best(x, t, context):
        def log_p(x0):
            return torch.stack([density(c, *shapes).log_prob(x0) for c in context])

        return mean_noise(log_p, x, ab)

    predict_noise = guided(best, double(0.0, 1.0).expand(3, 2), shares[None], scale)
    x = POINTS.clone().requires_grad_()
    means, covariances = noised(*shapes, ab)
    log_p = density(shares, means, covariances).log_prob(x)
    log_p_class = MultivariateNormal(means[1], covariances[1]).log_prob(x) + shares[1].log() - log_p
    (slope,) = torch.autograd.grad((log_p + scale * log_p_class).sum(), x)
    got = predict_noise(POINTS, torch.full((3,), t))
    torch.testing.assert_close(got, -(1 - ab).sqrt() * slope, rtol=1e-5, atol=1e-6)


# ---- figures -------------------------------------------------------------------------------------


def levels(name):
    ab = getattr(NoiseSchedule, name)().alpha_bar.double()
    return [*ab[[0, 500, 999]], float(f"{ab[999] ** -0.5:.3g}")]


def ends(name):
    """Percent of the time steps that are nearly clean or nearly pure noise."""
    ab = getattr(NoiseSchedule, name)().alpha_bar
    return 100 * ((ab - 0.5).abs() > 0.48).double().mean()


def mean_log_equal():
    """The mean of log n_i in a batch of 64 drawn cats: the lowest contrastive loss."""
    labels = torch.cartesian_prod(*(torch.arange(len(values)) for values in ATTRIBUTES.values()))
    fur, pattern = ATTRIBUTES["fur"], ATTRIBUTES["pattern"]
    drawn = torch.tensor([(fur[i], pattern[j]) in COATS for i, j, *_ in labels])
    n = int((drawn & ~held_out_combination(labels)).sum())  # captions that are trained
    others = Binomial(63, torch.tensor(1 / n)).log_prob(torch.arange(64.0)).exp()  # equal ones
    return (others * torch.arange(1.0, 65).log()).sum()


FIGURES = {  # words of the page -> the numbers in them
    "linear (DDPM) | {:.5f} | {:.4f} | {:.7f} | {:g} |": levels("linear"),
    "(Stable Diffusion) | {:.5f} | {:.4f} | {:.5f} | {:g} |": levels("scaled_linear"),
    "cosine (Nichol & Dhariwal) | {:.5f} | {:.4f} | {:.10f} | {:,g} |": levels("cosine"),
    "sigmoid (Jabri et al. 2022), ours | {:.5f} | {:.4f} | {:.9f} | {:,g} |": levels("sigmoid"),
    "flow (Lipman et al. 2023) | {:.6f} | {:.4f} | {:.9f} | {:,g} |": levels("flow"),
    "{:.1f} % of the steps of the linear schedule": [ends("linear")],
    "{:.1f} % of the cosine's, {:.1f} % of the sigmoid's": [ends("cosine"), ends("sigmoid")],
    "The weight is {:.1f} at t = 1": [weight_of(1, NoiseSchedule.linear())],
    "{:.4f} at t = 500 for the linear schedule": [weight_of(500, NoiseSchedule.linear())],
    "left of an image should have one of {:.2f}": [levels("scaled_linear")[2] ** 0.5],
    "of such latents it would be {:.2f}": [levels("scaled_linear")[2] ** 0.5 / 0.18215],
    "the mean of log n_i, {:.2f}": [mean_log_equal()],
}


@pytest.mark.parametrize("words", FIGURES)
def test_figures(words):
    page = " ".join((ROOT / "docs/math.md").read_text("utf-8").split())
    assert words.format(*FIGURES[words]) in page


def test_equations_name_code_and_tests_that_exist_and_the_code_names_equations():
    page = (ROOT / "docs/math.md").read_text("utf-8")
    numbers = [int(n) for n in re.findall(r"^\*\*\((\d+)\)\*\*", page, flags=re.MULTILINE)]
    named = re.findall(r"^· code: (.* · test: .*)$", page, flags=re.MULTILINE)
    assert numbers == list(range(1, len(named) + 1))
    rooms = ("", "toolbox", "latent_ext", "tests")
    files = [path for room in rooms for path in (ROOT / room).glob("*.py")]
    code = "".join(path.read_text("utf-8") for path in files)
    assert {int(n) for n in re.findall(r"math\.md \((\d+)\)", code)} <= set(numbers)
    for name in re.findall(r"`([\w.]+)`", " ".join(named)):
        assert (ROOT / name).exists() or f"def {name.split('.')[-1]}(" in code, name
