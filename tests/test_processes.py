"""The two processes against closed forms, against formulas derived a second time here, and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from processes import NoiseSchedule, add_noise, randn, sample, strides, v_to_noise

SCHEDULES = {
    "linear": (NoiseSchedule.linear, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (NoiseSchedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}


def toy_model(x, t):
    """Any smooth function of x and t will do to compare samplers."""
    return torch.sin(3 * x + t.view(-1, *[1] * (x.ndim - 1)) / 300) + 0.3 * x.roll(1, -1)


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [10, 250, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_diffusers(name, T):
    ours, theirs = SCHEDULES[name]
    schedule = ours(T)
    assert (
        schedule.name == name
        and schedule.T == T
        and schedule.alpha_bar.shape == (T,)
        and schedule.alpha_bar.dtype == torch.float32
    )
    expected = DDPMScheduler(num_train_timesteps=T, **theirs).alphas_cumprod  # computed in float32 there
    torch.testing.assert_close(schedule.alpha_bar, expected, rtol=3e-5, atol=1e-8)


def test_schedules_equal_the_papers_in_plain_python():
    product, linear = 1.0, []
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        linear.append(product)
    assert NoiseSchedule.linear().alpha_bar.tolist() == pytest.approx(linear, rel=1e-6)

    published = {0: 0.99914998, 1: 0.99829602, 250: 0.67379230, 500: 0.27633247, 999: 0.00466010}  # Stable Diffusion v1.5
    for t, value in published.items():
        assert NoiseSchedule.scaled_linear().alpha_bar[t].item() == pytest.approx(value, rel=1e-5)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = NoiseSchedule.cosine().alpha_bar
    for t in (0, 1, 500, 998):  # index t is the paper's t + 1; before the cap on beta, alpha_bar is f(t) / f(0)
        assert cosine[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-5)
    assert (cosine[999] / cosine[998]).item() == pytest.approx(0.001, rel=1e-4)  # the cap

    def logistic(x):
        return 1 / (1 + math.exp(-x))

    sigmoid = NoiseSchedule.sigmoid()
    assert sigmoid.name == "sigmoid" and sigmoid.alpha_bar.dtype == torch.float32
    for t in (0, 1, 250, 499, 998):  # their time runs from 0 to 1
        expected = (logistic(3) - logistic(-3 + 6 * (t + 1) / 1000)) / (logistic(3) - logistic(-3))
        assert sigmoid.alpha_bar[t].item() == pytest.approx(expected, rel=1e-5)
    assert sigmoid.alpha_bar[999].item() == pytest.approx(1e-9) and NoiseSchedule.sigmoid(10).T == 10


# ---- forward --------------------------------------------------------------------------------------------------------


def test_add_noise_is_what_many_small_steps_do():
    """math.md (1) -> (2): x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise, followed with its mean and variance."""
    schedule, T = NoiseSchedule.linear(50), 50
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    mean, variance = 1.0, 0.0
    for t in range(T):
        mean, variance = mean * math.sqrt(1 - betas[t]), variance * (1 - betas[t]) + betas[t]
        x0, zero, one = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        index = torch.tensor([t])
        assert add_noise(x0, index, schedule, zero)[0].item() == pytest.approx(float(mean), rel=1e-5)
        assert add_noise(zero, index, schedule, one)[0].item() == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_add_noise_levels_shapes_and_its_own_noise():
    schedule = NoiseSchedule.cosine()
    x0 = torch.rand(4, 3, 8, 8) * 2 - 1
    before, t = x0.clone(), torch.tensor([0, 300, 700, 999])
    torch.manual_seed(0)
    x_t, noise = add_noise(x0, t, schedule)
    assert torch.equal(x0, before) and x_t.shape == noise.shape == x0.shape
    assert abs(noise.mean().item()) < 0.2 and abs(noise.std().item() - 1) < 0.1
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    for i in range(4):  # each image has its own level
        torch.testing.assert_close(add_noise(x0[i : i + 1], t[i : i + 1], schedule, noise[i : i + 1])[0], x_t[i : i + 1])


# ---- the loop against diffusers, at every step ----------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("T", "steps"), [(20, 20), (100, 10), (1000, 25), (1000, 1)])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "ddim eta 1", "ddim eta 0.5"])
def test_every_step_equals_diffusers(solver, T, steps, name, clip):
    ours, theirs = SCHEDULES[name]
    schedule = ours(T)
    eta = {"ddpm": 1.0, "ddim": 0.0, "ddim eta 1": 1.0, "ddim eta 0.5": 0.5}[solver]
    common = {"num_train_timesteps": T, "clip_sample": clip, "timestep_spacing": "trailing", **theirs}
    judge = DDPMScheduler(variance_type="fixed_small", **common) if solver == "ddpm" else DDIMScheduler(**common)
    judge.alphas_cumprod = schedule.alpha_bar.double()  # the tables are compared above; here the arithmetic, in float64
    judge.final_alpha_cumprod = judge.one = torch.tensor(1.0, dtype=torch.float64)
    judge.set_timesteps(steps)

    x = start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    expected = []
    for t in judge.timesteps:
        noise = toy_model(x, t.repeat(2))
        if solver == "ddpm":
            x = judge.step(noise, t, x, generator=generator).prev_sample
        else:
            x = judge.step(noise, t, x, eta=eta, use_clipped_model_output=clip, generator=generator).prev_sample
        expected.append(x)

    states, asked = [], []

    def model(x, t):
        asked.append(t.tolist())
        return toy_model(x, t)

    def keep(x, t_prev):
        states.append((x, t_prev))
        return x

    result = sample(model, start, schedule, steps, eta, clip=clip, generator=torch.Generator().manual_seed(2), on_step=keep)
    assert asked == [[t, t] for t in judge.timesteps.tolist()]
    assert [t_prev for _, t_prev in states] == [*judge.timesteps.tolist()[1:], -1]
    for (x, _), y in zip(states, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)
    assert torch.equal(result, states[-1][0]) and result.dtype == torch.float64


@pytest.mark.parametrize("steps", [3, 7, 30, 128, 600])
def test_uneven_strides_are_diffusers_trailing(steps):
    judge = DDIMScheduler(timestep_spacing="trailing")
    judge.set_timesteps(steps)
    assert [t for t, _ in strides(1000, steps)] == judge.timesteps.tolist()


def test_stable_diffusion_time_steps_as_pairs():
    """v1.5: leading spacing, offset 1, and the last pair is (1, 0): it ends at alpha_bar[0], not at 1."""
    schedule = NoiseSchedule.scaled_linear()
    judge = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    judge.alphas_cumprod = schedule.alpha_bar.double()
    judge.final_alpha_cumprod = judge.alphas_cumprod[0]
    judge.set_timesteps(50)
    x = start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in judge.timesteps:
        x = judge.step(toy_model(x, t.repeat(1)), t, x).prev_sample
    pairs = [(t, max(t - 20, 0)) for t in range(981, 0, -20)]
    assert pairs[0] == (981, 961) and pairs[-1] == (1, 0)
    torch.testing.assert_close(sample(toy_model, start, schedule, eta=0, timesteps=pairs), x, rtol=1e-8, atol=1e-8)


# ---- the loop against closed forms ----------------------------------------------------------------------------------


def gaussian_denoiser(schedule, mean, covariance):
    """The best possible predict_noise for Gaussian data: E[noise | x_t] = sqrt(1-a) (a S + (1-a) I)^-1 (x_t - sqrt(a) m)."""

    def predict_noise(x, t):
        a = schedule.alpha_bar[t[0]].to(x.dtype)
        total = a * covariance + (1 - a) * torch.eye(len(mean), dtype=x.dtype)
        return (1 - a).sqrt() * torch.linalg.solve(total, (x - a.sqrt() * mean).unsqueeze(-1)).squeeze(-1)

    return predict_noise


MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_come_out_with_their_mean_and_covariance(eta):
    schedule = NoiseSchedule.linear()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    x0 = sample(gaussian_denoiser(schedule, MEAN, COVARIANCE), x, schedule, 1000, eta, generator=generator)
    assert x0.mean(0).tolist() == pytest.approx(MEAN.tolist(), abs=0.02)  # 4 standard errors are 0.014
    torch.testing.assert_close(torch.cov(x0.T), COVARIANCE, rtol=0.03, atol=0.015)


def test_at_eta_0_each_point_goes_where_the_closed_form_sends_it():
    """Along a principal axis of Gaussian data, DDIM with ever smaller steps scales a deviation by the ratio of the spreads."""
    schedule = NoiseSchedule.linear()
    values, axes = torch.linalg.eigh(COVARIANCE)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = schedule.alpha_bar[-1].double()
    deviation = (x - a.sqrt() * MEAN) @ axes
    expected = MEAN + (deviation * (values / (a * values + 1 - a)).sqrt()) @ axes.T
    errors = [
        (sample(gaussian_denoiser(schedule, MEAN, COVARIANCE), x, schedule, steps, eta=0) - expected).abs().max().item()
        for steps in (10, 100, 1000)
    ]
    assert errors[2] < 0.01 and errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_one_single_picture_is_met_exactly(eta, steps):
    """Data that are one point: every step of every sampler is exact, and the last one adds no noise."""
    schedule = NoiseSchedule.cosine(100)
    point = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4)

    def predict_noise(x, t):
        a = schedule.alpha_bar[t[0]].double()
        return (x - a.sqrt() * point) / (1 - a).sqrt()

    levels = []

    def on_step(x, t_prev):
        levels.append((t_prev, (x - point).abs().max().item()))
        return x

    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = sample(predict_noise, x, schedule, steps, eta, on_step=on_step, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x0, point.expand_as(x0), rtol=0, atol=1e-9)
    assert [t for t, _ in levels][-1] == -1 and all(error > 1e-3 for _, error in levels[:-1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_mixture_modes_come_out_with_their_weights(eta):
    schedule = NoiseSchedule.cosine()
    weights, means, spread = torch.tensor([0.3, 0.7]), torch.tensor([-0.8, 0.6]), 0.1

    def predict_noise(x, t):
        a = schedule.alpha_bar[t[0]]
        variance = a * spread**2 + 1 - a
        shift = x[..., None] - a.sqrt() * means  # (B, 1, modes)
        share = (weights.log() - shift**2 / (2 * variance)).softmax(-1)
        return (1 - a).sqrt() * (share * shift / variance).sum(-1)

    generator = torch.Generator().manual_seed(0)
    x0 = sample(predict_noise, torch.randn(20_000, 1, generator=generator), schedule, 1000, eta, generator=generator)
    left = x0 < -0.1
    assert left.float().mean().item() == pytest.approx(0.3, abs=0.012)
    for mode, mean in ((left, -0.8), (~left, 0.6)):
        assert x0[mode].mean().item() == pytest.approx(mean, abs=0.01)
        assert x0[mode].std().item() == pytest.approx(spread, rel=0.05)


# ---- the loop's doors -----------------------------------------------------------------------------------------------


def test_default_walks_from_the_last_index_to_the_first():
    asked = []

    def predict_noise(x, t):
        assert t.shape == (len(x),) and t.dtype == torch.long
        asked.append(t[0].item())
        return x

    x = torch.randn(2, 1, 2, 2)
    before = x.clone()
    sample(predict_noise, x, NoiseSchedule.linear(40), steps=40)
    assert asked == list(range(39, -1, -1)) and torch.equal(x, before)
    asked.clear()
    sample(predict_noise, x, NoiseSchedule.linear(40), steps=4)
    assert asked == [39, 29, 19, 9]  # "trailing": begins at the end, where pure noise belongs


def test_it_can_start_in_the_middle():
    schedule = NoiseSchedule.linear()
    point = torch.full((2, 1, 2, 2), 0.3)
    x_t, _ = add_noise(point, torch.tensor([400, 400]), schedule)
    seen = []

    def oracle(x, t):
        seen.append(t[0].item())
        a = schedule.alpha_bar[t[0]]
        return (x - a.sqrt() * point) / (1 - a).sqrt()

    torch.testing.assert_close(sample(oracle, x_t, schedule, timesteps=[400, 200, 0]), point, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample(oracle, x_t, schedule, timesteps=torch.tensor([400, 200, 0])), point, atol=1e-5, rtol=0)
    assert seen == [400, 200, 0] * 2
    assert torch.equal(sample(oracle, point, schedule, timesteps=[]), point)  # nothing to remove


def test_on_step_decides_what_goes_on():
    states = []

    def on_step(x, t_prev):
        states.append(t_prev)
        return torch.zeros_like(x)

    def predict_noise(x, t):
        if states:
            assert not x.any()
        return x

    assert not sample(predict_noise, torch.randn(1, 1, 2, 2), NoiseSchedule.linear(), 4, on_step=on_step).any()
    assert states == [749, 499, 249, -1]


def test_with_a_generator_each_an_image_does_not_depend_on_its_neighbours():
    schedule = NoiseSchedule.linear()

    def picture(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(toy_model, randn((len(seeds), 3, 4, 4), generators), schedule, 5, generator=generators)

    together = picture([7, 8, 9])
    for i, seed in enumerate([7, 8, 9]):
        torch.testing.assert_close(picture([seed])[0], together[i])
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "expected 1 to 100 steps"),
        ({"steps": 101}, "expected 1 to 100 steps"),
        ({"eta": 1.5}, "expected an eta from 0"),
        ({"timesteps": [100, 50]}, "descend from at most 99"),
        ({"timesteps": [10, 50]}, "descend"),
        ({"timesteps": [(50, 50)]}, "descend"),
        ({"generator": [torch.Generator()]}, "one generator for each of the 2 images"),
    ],
)
def test_impossible_wishes_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(toy_model, torch.randn(2, 1, 2, 2), NoiseSchedule.linear(100), **({"steps": 5} | arguments))


def test_half_precision_answers_do_not_coarsen_the_loop():
    x = torch.randn(1, 1, 4, 4)
    seen = []

    def predict_noise(x, t):
        seen.append(x.dtype)
        return toy_model(x, t).bfloat16()

    assert sample(predict_noise, x, NoiseSchedule.linear(), 3).dtype == torch.float32 and set(seen) == {torch.float32}


# ---- the network answers v ------------------------------------------------------------------------------------------


def v_of(x0, noise, t, schedule):
    """Salimans & Ho 2022, appendix D: v = alpha noise - sigma x0, with alpha^2 = alpha_bar and sigma^2 = 1 - alpha_bar."""
    a = schedule.alpha_bar.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
    return a.sqrt() * noise - (1 - a).sqrt() * x0


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 5, 3), (4, 3, 8, 8), (4, 2, 2, 4, 4)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_right_v_is_the_right_noise(name, shape):
    schedule, t = SCHEDULES[name][0](), torch.tensor([0, 300, 700, 999])
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6)):
        x0 = torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2 - 1
        noise = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        x_t, _ = add_noise(x0, t, schedule, noise)
        v = v_of(x0, noise, t, schedule)
        predict_noise = v_to_noise(lambda x, t, v=v: v, schedule)
        torch.testing.assert_close(predict_noise(x_t, t), noise, atol=tolerance, rtol=0)
        assert predict_noise(x_t, t).dtype == dtype


def test_the_network_is_asked_once_with_the_picture_the_time_and_the_context_as_they_came():
    schedule, asked = NoiseSchedule.cosine(), []

    def network(*arguments):
        asked.append(arguments)
        return torch.zeros_like(arguments[0])

    predict_noise = v_to_noise(network, schedule)
    x, t, words, mask = torch.randn(2, 3, 4, 4), torch.tensor([10, 900]), torch.randn(2, 7, 5), torch.ones(2, 7)
    predict_noise(x, t)
    predict_noise(x, t, words)
    result = predict_noise(x, t, words, mask)
    assert [len(arguments) for arguments in asked] == [2, 3, 4]
    assert all(one is other for one, other in zip(asked[2], (x, t, words, mask), strict=True))
    # A network that knows nothing, v = 0, leaves of pure noise the noise, and of a clean picture nearly nothing.
    sigma = (1 - schedule.alpha_bar[t]).sqrt().view(2, 1, 1, 1)
    torch.testing.assert_close(result, sigma * x)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("t", [5, 49, 95])
def test_v_is_that_of_diffusers(solver, name, t):
    """One step of their v_prediction, and one of our loop, for the same answer of a network."""
    ours, theirs = SCHEDULES[name]
    schedule = ours(100)
    judge = solver(num_train_timesteps=100, clip_sample=False, prediction_type="v_prediction", **theirs)
    judge.alphas_cumprod = schedule.alpha_bar.double()
    judge.final_alpha_cumprod = judge.one = torch.tensor(1.0, dtype=torch.float64)
    judge.set_timesteps(100)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answer, eta = toy_model(x, torch.full((2,), t)), {DDPMScheduler: 1.0, DDIMScheduler: 0.0}[solver]
    expected = judge.step(answer, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
    generator = torch.Generator().manual_seed(2)
    step = sample(v_to_noise(toy_model, schedule), x, schedule, eta=eta, timesteps=[(t, t - 1)], generator=generator)
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-8)
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    theirs_v = judge.get_velocity(x0, noise, torch.full((2,), t)) if solver is DDPMScheduler else v_of(x0, noise, t, schedule)
    torch.testing.assert_close(v_of(x0, noise, t, schedule), theirs_v, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_best_denoiser_through_v_draws_the_same(eta):
    schedule = NoiseSchedule.cosine()
    direct = gaussian_denoiser(schedule, MEAN, COVARIANCE)

    def network(x, t):  # v, from what the direct one says of the picture and of the noise
        a, noise = schedule.alpha_bar[t[0]].to(x.dtype), direct(x, t)
        return a.sqrt() * noise - (1 - a).sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt()

    def draw(predict_noise):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(500, 2, generator=generator, dtype=torch.float64)
        return sample(predict_noise, x, schedule, 40, eta, generator=generator)

    torch.testing.assert_close(draw(v_to_noise(network, schedule)), draw(direct), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(draw(network), draw(direct), atol=0.1)
