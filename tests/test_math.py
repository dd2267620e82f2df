"""The derivation of docs/math.md, carried out with numbers; and its numbers and the code's comments agree."""

import math
import re

import pytest
import torch
from conftest import ROOT
from test_guidance import normal_classes
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from latent_ext.clip import contrast
from latent_ext.guidance import guided
from latent_ext.vae import kl
from processes import NoiseSchedule, add_noise, randn, sample, v_to_noise
from toolbox.cats import caption, describe, draw
from toolbox.data import from_bytes, to_bytes
from toolbox.metrics import LinearDenoiser, frechet_distance, kernel_distance

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

    found = re.search(r"\(([\d.]+) at t = 1 and ([\d.]+) at t = 500 for the linear schedule\)", prose())
    assert weight(1) == pytest.approx(float(found[1]), rel=0.1) and weight(500) == pytest.approx(float(found[2]), rel=0.1)


def test_the_share_of_fresh_noise_in_the_text():
    """Section 6: of the noise that is left after a step at eta = 1, sigma^2 / (1 - ab_prev) is fresh; sigmoid, 40 steps."""
    alpha_bar = [*NoiseSchedule.sigmoid().alpha_bar.tolist(), 1.0]

    def fresh(t, t_prev):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        return 100 * (1 - a_prev) / (1 - a) * (1 - a / a_prev) / (1 - a_prev)

    found = re.search(r"(\d+) % in the second, (\d+) % in the middle", prose())
    assert fresh(999, 974) > 99
    assert fresh(974, 949) == pytest.approx(int(found[1]), abs=0.5) and fresh(499, 474) == pytest.approx(int(found[2]), abs=0.5)


def test_the_table_of_schedules_is_true():
    rows = {
        "linear": "linear (DDPM)",
        "scaled_linear": "scaled linear",
        "cosine": "cosine (Nichol",
        "sigmoid": "sigmoid (Jabri",
    }
    for name, row in rows.items():
        alpha_bar = getattr(NoiseSchedule, name)().alpha_bar
        cells = [cell.strip().replace(",", "") for cell in next(li for li in text().splitlines() if row in li).split("|")[2:6]]
        expected = [alpha_bar[0], alpha_bar[500], alpha_bar[999], alpha_bar[999] ** -0.5]
        for cell, value in zip(cells, expected, strict=True):
            assert float(cell) == pytest.approx(value.item(), rel=0.03), (name, cell)


def test_the_shares_of_steps_at_both_ends():
    found = re.search(r"take ([\d.]+) % of the steps of the linear schedule, ([\d.]+) % of the cosine's, ([\d.]+) %", prose())
    for name, share in zip(("linear", "cosine", "sigmoid"), found.groups(), strict=True):
        alpha_bar = getattr(NoiseSchedule, name)().alpha_bar
        assert 100 * ((alpha_bar > 0.98) | (alpha_bar < 0.02)).float().mean().item() == pytest.approx(float(share), abs=0.06)


# ---- near pure noise ------------------------------------------------------------------------------------------------


def test_an_error_of_v_is_no_larger_in_the_picture():
    """math.md (11): v gives the noise; an error of v counts ab times in the loss, and sqrt(1 - ab) times in x0_hat."""
    schedule = NoiseSchedule.cosine()
    x0, noise, wrong = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 500, 974, 999])  # each picture its own
    ab = schedule.alpha_bar.double()[t].view(4, 1, 1, 1)
    x_t, _ = add_noise(x0, t, schedule, noise)
    v = ab.sqrt() * noise - (1 - ab).sqrt() * x0
    torch.testing.assert_close(v_to_noise(lambda x, t: v, schedule)(x_t, t), noise)

    guess = v_to_noise(lambda x, t: v + wrong, schedule)(x_t, t)
    torch.testing.assert_close((guess - noise) ** 2, ab * wrong**2)
    for i in range(4):
        one = slice(i, i + 1)
        network = v_to_noise(lambda x, t, one=one: (v + wrong)[one], schedule)
        x0_hat = sample(network, x_t[one], schedule, timesteps=[(int(t[i]), -1)])
        torch.testing.assert_close((x0_hat - x0[one]) ** 2, (1 - ab[one]) * wrong[one] ** 2)


def test_the_table_of_the_two_trainings_agrees_with_itself():
    """The errors of x0_hat are those of the noise times sqrt(1 - ab) / sqrt(ab), and alpha_bar is the cosine schedule's."""
    rows = re.findall(r"^\| (\d{3}) \|(.*)\|$", text(), flags=re.MULTILINE)
    assert [int(t) for t, _ in rows] == [974, 949, 924, 899]
    for t, cells in rows:
        ab = NoiseSchedule.cosine().alpha_bar[int(t)].item()
        written, direct, by_v, direct_x0, by_v_x0 = map(float, cells.split("|"))
        assert written == pytest.approx(ab, abs=5e-5)
        assert direct_x0 == pytest.approx((direct * (1 - ab) / ab) ** 0.5, rel=0.01)
        assert by_v_x0 == pytest.approx((by_v * (1 - ab) / ab) ** 0.5, rel=0.01)


def test_where_the_mean_colour_comes_out_of_the_noise():
    """Section 6: the noise in it at t = 924, beside its spread over the drawings; and what the mean drawing is off by."""
    ab = NoiseSchedule.cosine().alpha_bar[924].item()
    noise = float(re.search(r"([\d.]+) at t = 924, and from", prose())[1])
    assert ((1 - ab) / ab) ** 0.5 / 32 == pytest.approx(noise, abs=0.005)
    drawings = draw(512, 32)[0]
    assert drawings.mean((2, 3)).std(0).mean().item() == pytest.approx(noise, rel=0.2)
    off = float(re.search(r"mean of all drawings is off by ([\d.]+\d)", prose())[1])
    assert drawings.std(0).square().mean().sqrt().item() == pytest.approx(off, abs=0.02)


# ---- what the best network knows ------------------------------------------------------------------------------------

EYE = torch.eye(2, dtype=torch.float64)
WIDE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
ONE = (torch.ones(1), torch.tensor([[0.5, -0.4]]), WIDE[None])
TWO = (torch.tensor([0.3, 0.7]), torch.tensor([[-0.8, 0.2], [0.6, -0.3]]), torch.stack([0.1 * EYE, 0.4 * WIDE]))


def density(weights, means, covariances):
    return MixtureSameFamily(Categorical(weights.double()), MultivariateNormal(means.double(), covariances.double()))


@pytest.mark.parametrize("t", [5, 20, 49])
@pytest.mark.parametrize("data", [ONE, TWO], ids=["one normal distribution", "two"])
def test_the_best_answer_is_the_slope_of_the_log_density(data, t):
    """math.md (12): the slope by autograd; the mean noise by Bayes on a grid of x0, without any algebra."""
    weights, means, covariances = data
    ab, ab_prev, beta = ALPHA_BAR[t], ALPHA_BAR[t - 1], BETAS[t]
    x_t = torch.tensor([[0.3, 0.1], [-1.0, 0.7], [0.9, -1.2]], dtype=torch.float64, requires_grad=True)
    noised = density(weights, ab.sqrt() * means, ab * covariances + (1 - ab) * EYE)
    (slope,) = torch.autograd.grad(noised.log_prob(x_t).sum(), x_t)
    x_t = x_t.detach()

    x0 = torch.cartesian_prod(*2 * [torch.linspace(-4, 4, 401, dtype=torch.float64)])
    noise = (x_t[:, None] - ab.sqrt() * x0) / (1 - ab).sqrt()
    share = (density(*data).log_prob(x0) - noise.square().sum(-1) / 2).softmax(1)
    best = (share[..., None] * noise).sum(1)
    torch.testing.assert_close(best, -(1 - ab).sqrt() * slope, rtol=1e-5, atol=1e-6)
    if len(weights) == 1:  # a straight line
        line = torch.linalg.solve(ab * WIDE + (1 - ab) * EYE, (x_t - ab.sqrt() * means).T).T
        torch.testing.assert_close(best, (1 - ab).sqrt() * line, rtol=1e-5, atol=1e-6)

    def step(eta):
        generator = torch.Generator().manual_seed(0)
        return sample(lambda x, t: best, x_t, SCHEDULE, eta=eta, timesteps=[(t, t - 1)], generator=generator)

    fresh = ((1 - ab_prev) / (1 - ab) * beta).sqrt() * randn(x_t.shape, torch.Generator().manual_seed(0), torch.float64)
    torch.testing.assert_close(step(1.0), (x_t + beta * slope) / (1 - beta).sqrt() + fresh, rtol=1e-4, atol=1e-5)
    climbed = step(0.0) * (1 - beta).sqrt() - x_t
    torch.testing.assert_close(climbed, beta / 2 * slope, rtol=beta / (1 - ab), atol=1e-5)


# ---- the linear denoiser --------------------------------------------------------------------------------------------

LEVELS = torch.tensor([0.002, 0.1, 0.5, 0.95, 0.9995], dtype=torch.float64)


def normal_pictures(n, seed, alike, side=4, channels=1):
    """Bytes (n, channels, side, side), about normal: every pixel alone with the spread 0.25, or all of them mixed."""
    d = channels * side**2
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.02, 0.1, d)
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) @ (mix if alike else 0.25 * torch.eye(d))
    return to_bytes((z + 0.1).view(n, channels, side, side).clamp(-1, 1))


@pytest.mark.parametrize("alike", [False, True])
def test_the_linear_denoiser_errs_as_its_formula_says(alike):
    """math.md (13): its error, by formula, is that of its guesses; and no worse than what least squares find by themselves."""
    images, held_out = normal_pictures(16_384, 1, alike), normal_pictures(4096, 2, alike)
    denoiser = LinearDenoiser(images)
    errors = denoiser.errors(held_out, LEVELS)
    generator = torch.Generator().manual_seed(0)

    def noised(images, ab, times):
        x0 = from_bytes(images).flatten(1).double().repeat(times, 1)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise, noise

    mean, directions, variances = (x.double() for x in (denoiser.mean, denoiser.directions, denoiser.variances))
    for ab, error in zip(LEVELS, errors.tolist(), strict=True):
        x_t, noise = noised(held_out, ab, 25)
        guess = (x_t - ab.sqrt() * mean) @ directions * ((1 - ab).sqrt() / (ab * variances + 1 - ab)) @ directions.T
        assert (guess - noise).square().mean().item() == pytest.approx(error, rel=0.01)
        seen, hidden = noised(images, ab, 6)
        line = torch.linalg.lstsq(torch.nn.functional.pad(seen, (0, 1), value=1.0), hidden).solution
        regression = (torch.nn.functional.pad(x_t, (0, 1), value=1.0) @ line - noise).square().mean().item()
        assert error == pytest.approx(regression, rel=0.015)
        if not alike:  # the closed form in the text
            assert error == pytest.approx((ab * 0.25**2 / (ab * 0.25**2 + 1 - ab)).item(), rel=0.02)


@pytest.mark.parametrize("n", [20, 200])
def test_fewer_pictures_than_pixels_give_the_same_denoiser(n):
    """math.md (13) with 48 pixels, written with whole matrices and the pixels' own covariance, never with the Gram matrix."""
    images, held_out = normal_pictures(2 * n, 1, True, channels=3), normal_pictures(30, 2, True, channels=3)
    x, others, new = (from_bytes(part).flatten(1).double() for part in (images[::2], images[1::2], held_out))
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(x.T.cov())
    directions = vectors[:, values > 1e-6 * values[-1]]
    known = directions.shape[1]
    assert known == min(n - 1, 48)
    inside = directions @ directions.T
    second = (others - mean).T @ (others - mean) / len(others)
    outside = torch.eye(48, dtype=torch.float64) - inside
    rest = (second @ outside).trace() / max(1, 48 - known)
    covariance = directions * (directions.T @ second @ directions).diagonal() @ directions.T + rest * outside
    spread = (new - mean).T @ (new - mean) / len(new)
    expected = []
    for ab in LEVELS:
        guess = (1 - ab).sqrt() * torch.linalg.inv(ab * covariance + (1 - ab) * torch.eye(48))
        missed = torch.eye(48) - (1 - ab).sqrt() * guess
        expected.append((missed @ missed.T + ab * guess @ spread @ guess.T).trace() / 48)
    errors = LinearDenoiser(images, at_most=n).errors(held_out, LEVELS)
    torch.testing.assert_close(errors, torch.stack(expected), rtol=1e-3, atol=1e-6)


# ---- distances between sets -----------------------------------------------------------------------------------------


def features(n, d, seed, stretch=1.0, shift=0.0):
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(seed + 100))
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) @ mix * stretch + shift


def beside_nothing(feature):
    """One feature, and a second one that is always 0."""
    return torch.nn.functional.pad(feature, (0, 1))


def test_fid_is_the_formula():
    """math.md (14): the root's trace by the eigenvalues of the product, which is not symmetric; and with one feature."""
    a, b = features(300, 6, 0), features(500, 6, 1, 1.5, 0.3)
    (mean_a, c_a), (mean_b, c_b) = (
        (x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1)) for x in (a.double(), b.double())
    )
    root = torch.linalg.eigvals(c_a @ c_b).sqrt().sum().real
    expected = ((mean_a - mean_b) ** 2).sum() + c_a.trace() + c_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    a, b = a[:, :1].double(), b[:, :1].double()
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(beside_nothing(a), beside_nothing(b)) == pytest.approx(expected.item(), rel=1e-6)


def test_fid_equals_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(300, 20, 2), features(400, 20, 3, 0.7, 0.1)
    c_a, c_b = a.double().T.cov(), b.double().T.cov()
    root = linalg.sqrtm((c_a @ c_b).numpy()).trace().real
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(mean + (c_a + c_b).trace().item() - 2 * root, rel=1e-6)


def test_kid_is_the_formula():
    """math.md (15), pair by pair."""
    a, b = features(7, 3, 0).double(), features(5, 3, 1, shift=0.5).double()

    def mean(x, y, same):
        pairs = [(p, q) for i, p in enumerate(x.tolist()) for j, q in enumerate(y.tolist()) if not same or i != j]
        return sum((sum(u * v for u, v in zip(p, q, strict=True)) / 3 + 1) ** 3 for p, q in pairs) / len(pairs)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_between_sets_of_one_kind_kid_is_0_on_average_and_fid_is_not():
    draws = [torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(i)) for i in range(600)]
    kid = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(kid.mean()) < 4 * kid.std() / 600**0.5 < 0.15 and kid.min() < 0
    assert torch.tensor([frechet_distance(a, b) for a, b in draws]).min() > 0.1

    few, many = map(float, re.search(r"by ([\d.]+) for 256 points .*, by ([\d.]+) for 2,000", prose()).groups())
    for n, written in ((256, few), (2000, many)):
        a, b = torch.randn(2, n, 128, generator=torch.Generator().manual_seed(0))
        assert frechet_distance(a, b) == pytest.approx(written, rel=0.04)


def test_what_the_two_distances_do_not_see():
    """Section 9: FID no skewness, neither of them more than that. Evenly spaced quantiles stand for random draws."""
    even = (torch.arange(3000, dtype=torch.float64)[:, None] + 0.5) / 3000
    normal, skewed = Normal(0.0, 1.0).icdf(even), -torch.log(1 - even) - 1  # both of mean 0 and variance 1
    coin = (even > 0.5) * 2.0 - 1
    for other in (skewed, coin):
        assert frechet_distance(beside_nothing(other), beside_nothing(normal)) < 0.001
    assert kernel_distance(skewed, normal) == pytest.approx(4, abs=0.5)  # their third moments are 2 and 0
    assert abs(kernel_distance(coin, normal)) < 0.05


# ---- the second evening: latents, captions, guidance ----------------------------------------------------------------


def test_the_bound_of_an_autoencoder_is_tight_where_it_can_be():
    """math.md (16): z standard normal, x = 0.7 z + normal noise of variance v. Both sides are known, and equal for the z that
    Bayes finds behind x; any other cloud costs more."""
    v, b, x = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64)

    def bound(m, s):
        decoded = ((x - b * m) ** 2 + (b * s) ** 2) / (2 * v)  # the mean over z = m + s noise
        return decoded + kl(m, (s**2).log()) + torch.log(2 * torch.pi * v) / 2

    m, s = b * x / (b**2 + v), (v / (b**2 + v)).sqrt()
    exact = -Normal(0.0, (b**2 + v).sqrt()).log_prob(x)
    torch.testing.assert_close(bound(m, s), exact)
    for other in (bound(m + 0.1, s), bound(m - 0.1, s), bound(m, 1.2 * s), bound(m, 0.8 * s)):
        assert other > exact


def test_the_weight_of_the_divergence():
    """Section 10: a latent known to a hundredth; the weight in means; and the best cloud under a weight, by trying all."""
    s = torch.tensor(0.01)
    nats = float(re.search(r"costs log 100 = ([\d.]+) nats", prose())[1])
    assert kl((1 - s**2).sqrt(), (s**2).log()).item() == pytest.approx(nats, abs=0.05)

    error, v, weight = map(float, re.search(r"36 dB \(([\d.]+), so that v = ([\d.]+)\) that is ([\d.]+\d)", prose()).groups())
    exact = (2 * 10 ** (-36 / 20)) ** 2  # 36 dB below the square of the range, which is 2
    assert exact == pytest.approx(error**2, rel=0.03) and exact == pytest.approx(v, rel=0.01)
    assert 2 * exact * (16 * 16 * 4) / (64 * 64 * 3) == pytest.approx(weight, rel=0.03)

    a, s2 = torch.meshgrid(torch.linspace(0, 1.2, 241), torch.linspace(0.005, 1.2, 240), indexing="ij")  # z = a x + s noise
    for weight in (0.1, 0.5, 2.5):
        divergence = (a**2 + s2 - 1 - s2.log()) / 2
        i = (s2 / (a**2 + s2) + weight * divergence).argmin()  # the best line through z leaves s2 / (a^2 + s2) of x
        assert divergence.flatten()[i].item() == pytest.approx(kl(a.flatten()[i], s2.log().flatten()[i]).item(), abs=1e-6)
        assert s2.flatten()[i].item() == pytest.approx(min(1, weight / 2), abs=0.006)
        assert (a.flatten()[i] == 0) == (weight > 2)


def test_latents_without_their_scale():
    """Section 10: what is left of them at the end of Stable Diffusion's schedule."""
    left = NoiseSchedule.scaled_linear().alpha_bar[-1].sqrt().item()
    scale = float(re.search(r"1 / spread \(Stable Diffusion: ([\d.]+)\)", prose())[1])
    spread = float(re.search(r"Stable Diffusion have a spread of ([\d.]+\d)", prose())[1])
    found = re.search(r"schedule ([\d.]+) of the picture would be left as intended, .* but ([\d.]+) of such latents", prose())
    assert spread == pytest.approx(1 / scale, abs=0.05)
    assert float(found[1]) == pytest.approx(left, abs=0.005) and float(found[2]) == pytest.approx(left / scale, abs=0.005)


def test_the_contrastive_loss_is_its_formula():
    """math.md (17), pair by pair, in plain Python."""
    captions = [4, 1, 4, 4, 0, 1]
    scores = (3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).tolist()

    def mean_loss(scores):
        total = 0.0
        for i, row in enumerate(scores):
            everything = sum(math.exp(score) for score in row)
            right = [j for j in range(6) if captions[j] == captions[i]]
            total -= sum(math.log(math.exp(row[j]) / everything) for j in right) / len(right)
        return total / 6

    expected = (mean_loss(scores) + mean_loss(list(zip(*scores, strict=True)))) / 2
    assert contrast(torch.tensor(scores), torch.tensor(captions)).item() == pytest.approx(expected, rel=1e-5)


def test_how_many_drawings_share_their_caption():
    """The numbers of section 11."""
    found = re.search(r"have (\d+) captions: in a batch of 64, about (\d+) pictures share", prose())
    texts = [caption(describe(0, i, {})) for i in range(64 * 200)]
    number = {text: i for i, text in enumerate(sorted(set(texts)))}
    assert len(number) == int(found[1])
    batches = torch.tensor([number[text] for text in texts]).view(200, 64)
    same = batches[:, :, None] == batches[:, None, :]
    shared = (same.sum(2) > 1).sum(1).double().mean().item()
    lowest = sum(contrast(200.0 * row, batch).item() for row, batch in zip(same, batches, strict=True)) / 200
    assert shared == pytest.approx(int(found[2]), abs=0.6)

    low, ignorant = map(float, re.search(r"log n_i, ([\d.]+); it begins at log 64 = ([\d.]+\d)", prose()).groups())
    assert lowest == pytest.approx(low, abs=0.01)
    assert contrast(torch.zeros(64, 64), torch.arange(64)).item() == pytest.approx(ignorant, abs=0.005)
    perfect = torch.full((64,), -1.0)
    perfect[0] = 1.0
    assert perfect.softmax(0)[0].item() == pytest.approx(
        float(re.search(r"believe in it by ([\d.]+) only", prose())[1]), abs=0.005
    )
    assert round(1 / 0.07) == int(re.search(r"begins at 1 / 0.07 = (\d+)", prose())[1])


@pytest.mark.parametrize("t", [5, 20, 49])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_follows_the_slope_of_a_sharpened_density(t, scale):
    """math.md (18): the slope by autograd; the two answers as the mean noise by Bayes on a grid of x0, without any algebra."""
    ab = ALPHA_BAR[t]
    shares, means, covariances = TWO  # of two classes
    x_t = torch.tensor([[0.3, 0.1], [-1.0, 0.7], [0.9, -1.2]], dtype=torch.float64)
    x0 = torch.cartesian_prod(*2 * [torch.linspace(-4, 4, 401, dtype=torch.float64)])

    def best(x, t, context):
        """context (B, 2): how likely each of the classes is."""
        log_p = torch.stack([density(shares, means, covariances).log_prob(x0) for shares in context])
        noise = (x[:, None] - ab.sqrt() * x0) / (1 - ab).sqrt()
        return ((log_p - noise.square().sum(-1) / 2).softmax(1)[..., None] * noise).sum(1)

    second = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    got = guided(best, second, shares[None], scale)(x_t, torch.full((3,), t))

    x = x_t.clone().requires_grad_()
    noised = [ab.sqrt() * means, ab * covariances + (1 - ab) * EYE]
    p = density(shares, *noised).log_prob(x)
    p_of_class = MultivariateNormal(noised[0][1].double(), noised[1][1].double()).log_prob(x) + shares[1].double().log() - p
    (slope,) = torch.autograd.grad((p + scale * p_of_class).sum(), x)
    torch.testing.assert_close(got, -(1 - ab).sqrt() * slope, rtol=1e-5, atol=1e-6)


def test_too_much_guidance_leaves_the_range():
    """The table of section 12: even quantiles of noise walk to quantiles of what is drawn; the last column on a grid."""
    rows = re.findall(r"^\| (\d) \| (.*) \| (.*) \| (.*) \|$", text(), flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "3", "8"]
    classes, spread = torch.tensor([-0.5, 0.5], dtype=torch.float64), 0.25
    predict_noise = normal_classes(NoiseSchedule.cosine(), classes, spread)
    noise = Normal(0.0, 1.0).icdf((torch.arange(500, dtype=torch.float64)[:, None] + 0.5) / 500)
    second, nothing = torch.full((500, 1), 2), torch.zeros(1, 1, dtype=torch.long)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    log_p = Normal(classes[:, None], spread).log_prob(grid)
    for scale, mean, wide, sharpened in [map(float, row) for row in rows]:
        x = sample(guided(predict_noise, second, nothing, scale), noise, NoiseSchedule.cosine(), steps=200, eta=0)
        assert x.mean().item() == pytest.approx(mean, abs=0.01) and x.std().item() == pytest.approx(wide, abs=0.01)
        share = (log_p.logsumexp(0) + scale * (log_p[1] - log_p.logsumexp(0))).softmax(0)
        assert (share * grid).sum().item() == pytest.approx(sharpened, abs=0.005)


# ---- the text and the code ------------------------------------------------------------------------------------------


def text():
    return (ROOT / "docs/math.md").read_text(encoding="utf8")


def prose():
    return " ".join(text().split())  # wherever its lines break


def test_each_number_in_the_code_is_an_equation_and_each_equation_has_its_code_and_test():
    equations = re.findall(r"^\*\*\((\d+)\)\*\*(.*?)(?=\n\n)", text(), flags=re.MULTILINE | re.DOTALL)
    numbers = [int(number) for number, _ in equations]
    assert numbers == list(range(1, len(numbers) + 1))

    files = [path for folder in (ROOT, ROOT / "toolbox", ROOT / "latent_ext") for path in folder.glob("*.py")]
    tests = "".join(path.read_text(encoding="utf8") for path in (ROOT / "tests").glob("test_*.py"))
    code = "".join(path.read_text(encoding="utf8") for path in files)
    mentioned = {int(n) for n in re.findall(r"math\.md \((\d+)\)", code + tests)}
    assert mentioned == set(numbers)
    for number, equation in equations:
        named = re.search(r"· code: (.*?) · test: (.*)", equation.replace("\n", " "))
        assert named, number
        for name in re.findall(r"`([\w.]+)`", named[1]):
            assert (ROOT / name).exists() or f"def {name.split('.')[-1]}(" in code, (number, name)
        for name in re.findall(r"`(\w+)`", named[2]):
            assert f"def {name}(" in tests, (number, name)
