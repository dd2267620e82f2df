"""The two processes against closed forms, formulas derived a second time, and diffusers."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from processes import (
    NoiseSchedule,
    add_noise,
    noise_from_v,
    noise_from_velocity,
    sample,
    snr_pairs,
    timestep_pairs,
)
from toolbox.seeds import generators, sample_seeds

V15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DIFFUSERS = {
    "linear": V15 | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": V15,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)  # of Gaussian data in the plane
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)


def normal(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def toy_model(x, t):
    """Any smooth function of x and t will do to compare samplers."""
    return torch.sin(3 * x + t.view(-1, *[1] * (x.ndim - 1)) / 300) + 0.3 * x.roll(1, -1)


# ---- schedules, and the forward process ----------------------------------------------------------


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "flow"])
def test_schedules_equal_diffusers_and_their_papers(name, T):
    schedule = getattr(NoiseSchedule, name)(T)
    assert (schedule.name, schedule.T, schedule.alpha_bar.dtype) == (name, T, torch.float32)
    assert getattr(NoiseSchedule, name)().T == 1000
    s = torch.arange(1, T + 1).double() / T
    if name in DIFFUSERS:
        expected = DDPMScheduler(num_train_timesteps=T, **DIFFUSERS[name]).alphas_cumprod
    elif name == "flow":
        expected = 1 / (1 + (s / (1 - s)) ** 2)
    else:  # a logistic curve, rescaled
        expected = (1 / (1 + (6 * s - 3).exp()) - 1 / (1 + math.e**3)) / math.tanh(1.5)
    torch.testing.assert_close(schedule.alpha_bar, expected.float(), rtol=3e-5, atol=1e-8)
    assert schedule.alpha_bar.min() > 0  # for by 0 nothing could be divided
    if name in ("linear", "scaled_linear"):  # diffusers computes in float32, we do not
        power = 1 if name == "linear" else 2
        ends = DIFFUSERS[name]["beta_start"], DIFFUSERS[name]["beta_end"]
        roots = torch.linspace(*(end ** (1 / power) for end in ends), T, dtype=torch.float64)
        exact = (1 - roots**power).log().cumsum(0).exp()
        torch.testing.assert_close(schedule.alpha_bar.double(), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 40, 40)])
def test_each_image_has_its_own_level_and_its_own_noise(shape):
    schedule, judge = NoiseSchedule.cosine(), DDPMScheduler(**DIFFUSERS["cosine"])
    x0, t = normal(*shape).float(), torch.tensor([0, 300, 700, 999])
    before, _ = x0.clone(), torch.manual_seed(0)
    x_t, noise = add_noise(x0, t, schedule)
    torch.testing.assert_close(x_t, judge.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    assert torch.equal(x0, before) and noise.unique().numel() > 0.99 * noise.numel()
    assert x0.numel() < 9 or abs(noise.mean()) < 0.03 > abs(noise.std() - 1)
    assert add_noise(x0, t, schedule, noise)[1] is noise


# ---- what a network may output -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 8, 8)])
@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine(), NoiseSchedule.flow()])
def test_the_right_v_and_the_right_velocity_are_the_right_noise(schedule, shape):
    x0, noise, t = normal(*shape), normal(*shape, seed=2), torch.tensor([0, 300, 700, 999])
    x_t, _ = add_noise(x0, t, schedule, noise)
    a = schedule.alpha_bar.double()[t].view(-1, *[1] * (len(shape) - 1))
    v = a.sqrt() * noise - (1 - a).sqrt() * x0  # Salimans & Ho 2022, appendix D
    for wrap, answer in ((noise_from_v, v), (noise_from_velocity, noise - x0)):
        asked = []
        predict_noise = wrap(lambda *words, y=answer, a=asked: a.append(words) or y, schedule)
        torch.testing.assert_close(predict_noise(x_t, t, "context"), noise, atol=1e-7, rtol=0)
        assert asked[0][0] is x_t and asked[0][1:] == (t, "context")


# ---- the loop against diffusers, at every step ---------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("T", "steps"), [(20, 20), (1000, 8), (1000, 1)])
@pytest.mark.parametrize(("kind", "eta"), [("ddpm", 1), ("ddim", 0), ("ddim", 0.5), ("ddim", 1)])
def test_every_step_equals_diffusers(kind, eta, T, steps, prediction, clip):
    schedule, generator = NoiseSchedule.cosine(T), torch.Generator()
    options = {"num_train_timesteps": T, "clip_sample": clip, "timestep_spacing": "trailing"}
    options |= {"prediction_type": prediction} | DIFFUSERS["cosine"]
    if kind == "ddpm":
        judge, arguments = DDPMScheduler(variance_type="fixed_small", **options), {}
    else:
        judge, arguments = DDIMScheduler(**options), {"eta": eta, "use_clipped_model_output": clip}
    judge.alphas_cumprod = schedule.alpha_bar.double()  # the tables are compared above
    judge.final_alpha_cumprod = judge.one = torch.tensor(1.0, dtype=torch.float64)
    judge.set_timesteps(steps)
    x = start = normal(2, 3, 4, 4)
    before, arguments["generator"], expected = start.clone(), generator.manual_seed(2), []
    for t in judge.timesteps:
        step = judge.step(toy_model(x, t.repeat(2)), t, x, **arguments)
        x = step.prev_sample
        expected.append((x, step.pred_original_sample))

    times, states = [], []

    def model(x, t):
        assert t.shape == (2,) and t.dtype == torch.long and t[0] == t[1]
        times.append(t[0].item())
        return toy_model(x, t)

    def on_step(x, t_prev, x0):
        states.append((x, x0))
        assert t_prev == [*judge.timesteps.tolist(), -1][len(states)]
        return x

    predict_noise = noise_from_v(model, schedule) if prediction == "v_prediction" else model
    arguments = {"clip_x0": clip, "generator": generator.manual_seed(2), "on_step": on_step}
    result = sample(predict_noise, start, schedule, steps, eta, **arguments)
    assert times == judge.timesteps.tolist() and torch.equal(start, before)
    torch.testing.assert_close(states, expected, rtol=1e-7, atol=1e-7)
    assert result is states[-1][0] and result.dtype == torch.float64


# ---- the loop against closed forms ---------------------------------------------------------------


def gaussian(schedule):
    """E[noise | x_t] of Gaussian data: sqrt(1 - a) (a S + (1 - a) I)^-1 (x_t - sqrt(a) m)."""

    def predict_noise(x, t):
        a = schedule.alpha_bar[t[0]].item()
        inverse = torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2).double())
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) @ inverse

    return predict_noise


@pytest.mark.parametrize(("kind", "eta"), [("dpmsolver++", 0), ("sde-dpmsolver++", 1)])
def test_order_2_equals_diffusers(kind, eta):
    """math.md (23): each step of DPM-Solver++ (2M), without and with fresh noise."""
    schedule = NoiseSchedule.linear()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    options = {"algorithm_type": kind, "solver_order": 2, "final_sigmas_type": "zero"}
    judge = DPMSolverMultistepScheduler(trained_betas=betas.numpy(), **options)
    judge.set_timesteps(12)
    t = judge.timesteps.tolist()
    pairs = [*itertools.pairwise([*t, -1])]
    predict_noise = lambda x, t: torch.tanh(2 * x) * (1 - t[0] / 2000)  # noqa: E731
    x = start = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    seen = []
    options = {"order": 2, "eta": eta, "timesteps": pairs, "generator": generators[0]}
    options["on_step"] = lambda x, t_prev, x0: seen.append(x) or x
    sample(predict_noise, start, schedule, **options)
    for step, now in enumerate(judge.timesteps):
        noise = predict_noise(x, torch.full((4,), now.item()))
        x = judge.step(noise, now, x, generator=generators[1]).prev_sample.double()
        torch.testing.assert_close(seen[step], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.flow()])
def test_gaussian_points_come_out_with_their_mean_and_covariance(schedule):
    """At eta 0 the sampler is an affine map of the noise here: three points give it exactly."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    origin, *ends = sample(gaussian(schedule), x, schedule, 1000, eta=0)
    matrix = torch.stack(ends) - origin
    torch.testing.assert_close(origin, MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(matrix.T @ matrix, COVARIANCE, atol=0.006, rtol=0)
    x, generator = normal(20_000, 2), torch.Generator().manual_seed(0)
    x0 = sample(gaussian(schedule), x, schedule, 500, eta=1, generator=generator)
    torch.testing.assert_close(x0.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x0.T), COVARIANCE, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "linear", "flow"])
def test_snr_pairs_have_even_strides_in_the_logarithm_of_the_snr(name):
    schedule = getattr(NoiseSchedule, name)()
    pairs = snr_pairs(schedule, 10)
    assert pairs[0][0] == 999 and pairs[-1][1] == -1 and len(pairs) == 10
    assert all(one[1] == other[0] for one, other in itertools.pairwise(pairs))
    a = schedule.alpha_bar.double()[[t for t, _ in pairs]]
    strides = (a / (1 - a)).log().clamp(min=-10).diff()[:-1]
    torch.testing.assert_close(strides, strides.mean().expand(8), rtol=0.2, atol=0.1)
    assert len(snr_pairs(NoiseSchedule.cosine(5), 100)) == 5


# ---- the loop's doors ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 40, 128, 600, 1000])
def test_timesteps_have_even_strides_from_the_last_one(steps):
    judge = DDIMScheduler(timestep_spacing="trailing")
    judge.set_timesteps(steps)
    assert [t for t, _ in timestep_pairs(1000, steps)] == judge.timesteps.tolist()


def test_the_default_is_40_steps_of_ddpm_without_clipping_and_without_gradients():
    schedule, weight = NoiseSchedule.linear(), torch.ones(1, requires_grad=True)
    generator, x, types = torch.Generator(), normal(2, 3, 4, 4).float(), set()

    def predict_noise(x, t):
        types.add(x.dtype)
        return (weight * toy_model(x, t)).bfloat16()  # must not coarsen the loop

    result = sample(predict_noise, x, schedule, generator=generator.manual_seed(0))
    assert not result.requires_grad and types == {result.dtype} == {torch.float32}
    pairs = [(t, t - 25) for t in range(999, 0, -25)]
    options = {"clip_x0": False, "order": 1, "generator": generator.manual_seed(0)}
    in_float32 = lambda x, t: predict_noise(x, t).float()  # noqa: E731
    assert torch.equal(result, sample(in_float32, x, schedule, 7, 1, pairs, **options))


def test_on_step_decides_what_x_the_loop_continues_with():
    seen, schedule = [], NoiseSchedule.linear()
    options = {"on_step": lambda x, t_prev, x0: torch.full_like(x, t_prev)}
    result = sample(lambda x, t: seen.append(x[0].item()) or x, normal(1), schedule, 4, **options)
    assert seen[1:] == [749, 499, 249] and result == -1


def test_a_seed_gives_the_same_image_whatever_the_others_are():
    schedule, options = NoiseSchedule.linear(), {"steps": 5, "eta": 1, "clip_x0": True}
    together = sample_seeds(toy_model, (3, 4, 4), [7, 8, 9], schedule, **options)
    for seed, image in zip([7, 8, 9], together, strict=True):
        options["generator"] = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 3, 4, 4, generator=options["generator"])
        torch.testing.assert_close(sample(toy_model, x, schedule, **options)[0], image)
    x = sample_seeds(toy_model, (5,), range(4), schedule, device="meta")
    assert x.is_meta and x.shape == (4, 5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *[({"steps": steps}, "expected 1 to 100 steps") for steps in (0, 101)],
        *[({"eta": eta}, "expected an eta from 0") for eta in (-0.01, 1.01, math.nan)],
        *[
            ({"timesteps": [pair]}, "expected 100 > t > t_prev >= -1")
            for pair in [(100, 50), (10, 50), (50, 50), (50, -2)]
        ],
        *[({"generator": generators(range(n))}, "expected 2 generators") for n in (1, 3)],
    ],
)
def test_what_cannot_be_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(toy_model, normal(2, 1, 2), NoiseSchedule.linear(100), **{"steps": 5} | arguments)
