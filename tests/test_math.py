"""The derivation of docs/math.md, carried out with numbers; and the figures of docs/ are right.

What an equation claims of code is proved where that code is tested; here is what lies between.
"""

import math
import re

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from latent_ext.clip import contrastive_loss
from latent_ext.data import held_out_combination
from latent_ext.guidance import guided
from latent_ext.vae import kl_divergence
from processes import NoiseSchedule, add_noise, noise_from_v, randn_like, sample
from toolbox.cats import ATTRIBUTES, draw
from toolbox.metrics import frechet_distance, kernel_distance
from unet import UNet

SCHEDULE = NoiseSchedule.linear(50)
ALPHA_BAR = SCHEDULE.alpha_bar.double()
BETA = 1 - ALPHA_BAR / torch.cat([torch.ones(1), ALPHA_BAR[:-1]])
EYE = torch.eye(2, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---- one step, the bound, the loss ---------------------------------------------------------------


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
    torch.testing.assert_close(
        got.squeeze(), weight_of(t, SCHEDULE) * 0.5**2, rtol=0.02, atol=1e-6
    )


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


def test_an_error_of_v_is_no_larger_in_the_image():
    """math.md (11): an error of v counts ab times in the loss, and sqrt(1 - ab) times in x0."""
    schedule = NoiseSchedule.cosine()
    x0, noise, wrong = torch.randn(3, 4, 5, generator=seeded(), dtype=torch.float64)
    for t in (0, 500, 974, 999):
        ab, at = schedule.alpha_bar.double()[t], torch.full((4,), t)
        x_t, _ = add_noise(x0, at, schedule, noise)
        v = ab.sqrt() * noise - (1 - ab).sqrt() * x0
        network = noise_from_v(lambda x, t, v=v: v + wrong, schedule)
        torch.testing.assert_close((network(x_t, at) - noise) ** 2, ab * wrong**2)
        x0_hat = sample(network, x_t, schedule, timesteps=[(t, -1)])
        torch.testing.assert_close((x0_hat - x0) ** 2, (1 - ab) * wrong**2)


# ---- what the best network knows -----------------------------------------------------------------

WIDE = double(0.5, 0.3, 0.3, 0.4).view(2, 2)
ONE = double(1.0), double(0.5, -0.4)[None], WIDE[None]
TWO = double(0.3, 0.7), double(-0.8, 0.2, 0.6, -0.3).view(2, 2), torch.stack([0.1 * EYE, 0.4 * WIDE])
POINTS = double(0.3, 0.1, -1.0, 0.7, 0.9, -1.2).view(3, 2)


def density(weights, means, covariances):
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def noised(means, covariances, ab):
    return ab.sqrt() * means, ab * covariances + (1 - ab) * EYE


def mean_noise(log_p, x_t, ab):
    """By Bayes on a grid of x0, without any algebra; log_p(grid) is the data's density."""
    x0 = torch.cartesian_prod(*2 * [torch.linspace(-4, 4, 401, dtype=torch.float64)])
    noise = (x_t[:, None] - ab.sqrt() * x0) / (1 - ab).sqrt()
    share = (log_p(x0) - noise.square().sum(-1) / 2).softmax(-1)
    return (share[..., None] * noise).sum(1)


@pytest.mark.parametrize("t", [5, 20, 49])
@pytest.mark.parametrize("data", [ONE, TWO], ids=["one normal distribution", "two"])
def test_the_best_answer_is_the_slope_of_the_log_density(data, t):
    """math.md (12), by autograd; and how far a step of `sample` climbs with eta 1 and 0."""
    (weights, *shapes), ab, ab_prev, beta = data, ALPHA_BAR[t], ALPHA_BAR[t - 1], BETA[t]
    x_t = POINTS.clone().requires_grad_()
    log_p = density(weights, *noised(*shapes, ab)).log_prob(x_t)
    (slope,) = torch.autograd.grad(log_p.sum(), x_t)
    best = mean_noise(density(*data).log_prob, POINTS, ab)
    torch.testing.assert_close(best, -(1 - ab).sqrt() * slope, rtol=1e-5, atol=1e-6)

    options = {"timesteps": [(t, t - 1)], "generator": seeded()}
    x = sample(lambda x, t: best, POINTS, SCHEDULE, eta=1.0, **options)
    fresh = ((1 - ab_prev) / (1 - ab) * beta).sqrt() * randn_like(POINTS, seeded())
    up = (POINTS + beta * slope) / (1 - beta).sqrt() + fresh
    torch.testing.assert_close(x, up, rtol=1e-4, atol=1e-5)
    climbed = sample(lambda x, t: best, POINTS, SCHEDULE, eta=0.0, **options)
    climbed = climbed * (1 - beta).sqrt() - POINTS
    torch.testing.assert_close(climbed, beta / 2 * slope, rtol=beta / (1 - ab), atol=1e-5)


def test_what_the_two_distances_do_not_see():
    """Section 9: one sees no skewness, and neither sees more. Even quantiles stand for draws."""
    even = (torch.arange(3000, dtype=torch.float64)[:, None] + 0.5) / 3000
    normal, skewed, coin = Normal(0, 1).icdf(even), -torch.log(1 - even) - 1, (even > 0.5) * 2.0 - 1
    for other in (skewed, coin):  # both have mean 0 and variance 1; the second feature is 0
        assert frechet_distance(*(nn.functional.pad(x, (0, 1)) for x in (other, normal))) < 0.001
    assert kernel_distance(skewed, normal) == pytest.approx(4, abs=0.5)  # third moments: 2 and 0
    assert abs(kernel_distance(coin, normal)) < 0.05


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


def test_too_much_weight_on_the_divergence_silences_a_latent():
    """Section 10: the best s^2 for one pixel and one latent is half of the weight, at most 1."""
    axes = torch.linspace(0, 1.2, 241), torch.linspace(0.005, 1.2, 240)
    a, s2 = torch.meshgrid(*axes, indexing="ij")  # z = a x + s noise
    each = torch.stack([kl_divergence(a.flatten()[i], s2.log().flatten()[i]) for i in range(5)])
    divergence = (a**2 + s2 - 1 - s2.log()) / 2
    torch.testing.assert_close(divergence.flatten()[:5], each)
    for weight in (0.1, 0.5, 2.5):
        i = (s2 / (a**2 + s2) + weight * divergence).argmin()  # the error of the best line
        assert s2.flatten()[i].item() == pytest.approx(min(1, weight / 2), abs=0.006)
        assert (a.flatten()[i] == 0) == (weight > 2)


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
        log_p = lambda x0: torch.stack([density(c, *shapes).log_prob(x0) for c in context])  # noqa: E731
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
    return [*ab[[0, 500, 999]].tolist(), ab[999].item() ** -0.5]


def share_of_ends(name):
    ab = getattr(NoiseSchedule, name)().alpha_bar
    return 100 * ((ab > 0.98) | (ab < 0.02)).double().mean().item()


def first_below(name, level):
    return int((getattr(NoiseSchedule, name)().alpha_bar < level).nonzero()[0])


def fresh_share(t, t_prev):
    """In percent, of the noise that is left after a step with eta = 1: sigma^2 / (1 - ab_prev)."""
    ab = [*NoiseSchedule.sigmoid().alpha_bar.tolist(), 1.0]
    return 100 * (1 - ab[t] / ab[t_prev]) / (1 - ab[t])


def mean_colour_noise(ab, size=32):
    return ((1 - ab) / ab) ** 0.5 / size


def error_left(variance, eta):
    """Of an error of 1 at t = 699, after the exact denoiser of N(0, variance), 40 steps in all."""
    schedule = NoiseSchedule.sigmoid()

    def predict_noise(x, t):
        ab = schedule.alpha_bar_at(t, x)
        return (1 - ab).sqrt() / (ab * variance + 1 - ab) * x

    pairs = [pair for pair in timestep_pairs(1000, 40) if pair[0] <= 699]
    options = {"timesteps": pairs, "eta": eta, "generator": [seeded(), seeded()]}
    x = sample(predict_noise, double(0, 1).view(2, 1), schedule, **options)
    return (x[1] - x[0]).item()


def guidance_row(scale):
    """Two classes N(-0.5, 0.25^2) and N(0.5, 0.25^2), drawn by the best network: the second."""
    schedule, means, std = NoiseSchedule.cosine(), double(-0.5, 0.5), 0.25

    def predict_noise(x, t, shares):
        ab = schedule.alpha_bar_at(t, x)
        variance, off = ab * std**2 + 1 - ab, x - ab.sqrt() * means
        share = (shares.log() - off**2 / (2 * variance)).softmax(1)
        return (1 - ab).sqrt() * (share * off).sum(1, keepdim=True) / variance

    noise = Normal(0, 1).icdf((torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000)
    second = double(0, 1).expand(20_000, 2)
    network, row = guided(predict_noise, second, double(0.5, 0.5)[None], scale), []
    for eta in (0, 1):
        x = sample(network, noise, schedule, 200, eta, generator=seeded())
        row += [x.mean().item(), x.std().item()]
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    each = Normal(means[:, None], std).log_prob(grid)
    share = (scale * each[1] + (1 - scale) * each.logsumexp(0)).softmax(0)
    return [*row, (share * grid).sum().item()]


def captions():
    """Of the drawn cats without those held out: how many; how many of 64 share theirs; the loss."""
    lengths = [len(values) for values in ATTRIBUTES.values()]
    labels = torch.cartesian_prod(*map(torch.arange, lengths))
    visible = [(FUR_NAMES[fur], PATTERN[pattern]) in COATS for fur, pattern in labels[:, :2]]
    labels = labels[torch.tensor(visible)]
    n = int((~held_out_combination(labels)).sum())
    batch = torch.randint(n, (2000, 64), generator=seeded())
    same = batch[:, :, None] == batch[:, None]
    losses = [contrastive_loss(200.0 * row, caption) for row, caption in zip(same, batch)]
    return [len(labels), n, (same.sum(2) > 1).sum(1).double().mean().item(), sum(losses) / 2000]


def mean_colour_response(groups):
    """How much of a tint of its input reaches the output's mean colour; random weights."""
    ratios = []
    for seed in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = UNet(groups=groups)
            for layer in network.modules():  # some begin at 0
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.reset_parameters()
        x, t = torch.randn(4, 3, 32, 32, generator=seeded(seed)), torch.full((4,), 500)
        with torch.no_grad():
            y, tinted = network(x, t), network(x + 0.3, t)
        grain = (y - y.mean((2, 3), keepdim=True)).std()
        ratios.append(((tinted - y).mean((2, 3)).norm(dim=1) / grain / 0.3).mean().item())
    return sum(ratios) / len(ratios)


# (page, words around the figures (#), what they must be, how far off beyond their last digit)
FIGURES = [
    ("math", "| linear (DDPM) | # | # | # | # |", lambda: levels("linear"), 0),
    ("math", "| scaled linear (Stable Diffusion) | # | # | # | # |", lambda: levels("scaled_linear"), 0),
    ("math", "| cosine (Nichol & Dhariwal) | # | # | # | # |", lambda: levels("cosine"), 0),
    ("math", "| sigmoid (Jabri et al. 2022), ours | # | # | # | # |", lambda: levels("sigmoid"), 0),
    ("math", "| flow (Lipman et al. 2023) | # | # | # | # |", lambda: levels("flow"), 0),
    (
        "math",
        "# % of the steps of the linear schedule, # % of the cosine's, # % of the sigmoid's",
        lambda: [share_of_ends(name) for name in ("linear", "cosine", "sigmoid")],
        0,
    ),
]
