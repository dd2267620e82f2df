"""The two processes of a diffusion model: `add_noise` destroys data, `sample` creates it.

Everywhere: x0 is clean data and x_t its noised version, float (B, ...). Images are (B, C, H, W) in
[-1, 1], but only clip_x0 depends on that: points in the plane, (B, 2), work as well.
t is an int64 tensor (B,) of time steps, 0 .. T-1; noise is standard normal. The model is any
callable predict_noise(x_t, t) -> noise of the shape of x_t.
"math.md (4)" in a comment is equation 4 of docs/math.md, where it is derived.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[..., Tensor]  # (x_t, t, *context) -> noise, v or u; context: second evening
Generators = torch.Generator | Sequence[torch.Generator]  # one, or one for each image of a batch


@dataclass(frozen=True)
class NoiseSchedule:
    """How much data is left at each step: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise.

    alpha_bar, float32 (T,), falls from almost 1 at t = 0 to almost 0 at t = T-1.
    """

    name: str
    alpha_bar: Tensor

    @property
    def T(self) -> int:
        return len(self.alpha_bar)

    def alpha_bar_at(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_bar of each t (B,), as (B, 1, ..., 1): it broadcasts over `like` (B, ...)."""
        return self.alpha_bar.to(like)[t].view(-1, *[1] * (like.ndim - 1))

    @classmethod
    def linear(cls, T: int = 1000) -> "NoiseSchedule":
        """DDPM (Ho et al. 2020, section 4): beta, the share of variance that a step replaces by
        noise, grows from 0.0001 to 0.02. math.md (1)"""
        return cls.from_betas("linear", torch.linspace(1e-4, 0.02, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, T: int = 1000) -> "NoiseSchedule":
        """Stable Diffusion (Rombach et al. 2022, its code): sqrt(beta) grows linearly."""
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64)
        return cls.from_betas("scaled_linear", roots**2)

    @classmethod
    def cosine(cls, T: int = 1000) -> "NoiseSchedule":
        """Nichol & Dhariwal 2021, eq. 17: alpha_bar is a squared cosine.

        It is computed from beta, because the paper limits beta to 0.999.
        """
        s = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas("cosine", (1 - f[1:] / f[:-1]).clamp(max=0.999))

    @classmethod
    def sigmoid(cls, T: int = 1000) -> "NoiseSchedule":
        """Jabri et al. 2022, fig. 8: the sigmoid of 3 .. -3, rescaled to run from 1 to 0."""
        curve = torch.sigmoid(torch.linspace(3, -3, T + 1, dtype=torch.float64))
        return cls.from_alpha_bar("sigmoid", ((curve - curve[-1]) / (curve[0] - curve[-1]))[1:])

    @classmethod
    def flow(cls, T: int = 1000) -> "NoiseSchedule":
        """Flow matching (Lipman et al. 2023): a straight line, (1 - s) x0 + s noise, s = 1/T .. 1.

        It is scaled so that the squares of both factors add up to 1. math.md (19)
        """
        s = torch.arange(1, T + 1, dtype=torch.float64) / T
        return cls.from_alpha_bar("flow", (1 - s) ** 2 / ((1 - s) ** 2 + s**2))

    @classmethod
    def from_betas(cls, name: str, betas: Tensor) -> "NoiseSchedule":
        return cls(name, torch.cumprod(1 - betas, dim=0).float())  # math.md (2)

    @classmethod
    def from_alpha_bar(cls, name: str, alpha_bar: Tensor) -> "NoiseSchedule":
        # Not 0: math.md (8) divides by its root.
        return cls(name, alpha_bar.clamp(min=1e-9).float())


def add_noise(
    x0: Tensor, t: Tensor, schedule: NoiseSchedule, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The forward process in one jump (DDPM eq. 4): x_t, and the noise the model must predict."""
    noise = torch.randn_like(x0) if noise is None else noise
    alpha_bar = schedule.alpha_bar_at(t, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise  # math.md (3)


def noise_from_v(network: Network, schedule: NoiseSchedule) -> Network:
    """predict_noise of a network that outputs v = sqrt(ab) noise - sqrt(1 - ab) x0, ab = alpha_bar.

    Salimans & Ho 2022, appendix D. Near pure noise, the noise is almost x_t. A network's copy would
    be off by more than what is left of x0, so x_t is added outside of it.
    """

    def predict_noise(x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar_at(t, x_t)
        v = network(x_t, t, *context)
        return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v  # math.md (11)

    return predict_noise


def noise_from_velocity(network: Network, schedule: NoiseSchedule) -> Network:
    """predict_noise of a network that outputs the velocity u = noise - x0 of flow matching."""

    def predict_noise(x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar_at(t, x_t)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # x_t = a x0 + s noise, and x0 = noise - u
        return (x_t + a * network(x_t, t, *context)) / (a + s)  # math.md (20)

    return predict_noise


# What to pass to `sample`, and which sampler this gives (network calls: `steps`):
#
#   DDPM    steps=1000  eta=1   every step of the chain, fresh noise after each   (Ho et al. 2020)
#   fast    steps=40    eta=1   the same with longer strides: the default
#   DDIM    steps=40    eta=0   no fresh noise: x_T alone decides x0           (Song et al. 2021)
#   few     timesteps=snr_pairs(schedule, 10), order=2: DPM-Solver++ (2M) (Lu et al. 2022)
#   edit    timesteps=[(599, 579), ..., (19, -1)], x=x_t at t=599: image-to-image
@torch.no_grad()
def sample(
    predict_noise: Network,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 40,
    eta: float = 1.0,
    timesteps: Sequence[tuple[int, int]] | None = None,
    clip_x0: bool = False,
    order: int = 1,
    generator: Generators | None = None,
    on_step: Callable[[Tensor, int, Tensor], Tensor] | None = None,
) -> Tensor:
    """The reverse process (DDPM Algorithm 2; DDIM eq. 12): x (B, ...), noise or x_t, becomes x0.

    timesteps replaces steps: pairs (t, t_prev) in descending order; t_prev = -1 is clean data.
    clip_x0 limits each estimate of x0 to [-1, 1]. order 2 extrapolates x0 from the last two
    estimates. generator: one, or one for each image.
    on_step(x, t_prev, x0) returns the x with which the loop continues; x0 is the estimate.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"expected an eta from 0 (DDIM, no fresh noise) to 1 (DDPM), got {eta}")
    alpha_bar = [*schedule.alpha_bar.tolist(), 1.0]  # the last one is alpha_bar[-1]: clean
    log_snr = schedule.alpha_bar.double().logit().tolist()  # log(ab / (1 - ab)), for order 2
    earlier = None  # the estimate of x0 and the log-SNR of the step before
    for t, t_prev in timestep_pairs(schedule.T, steps) if timesteps is None else timesteps:
        if not -1 <= t_prev < t < schedule.T:
            raise ValueError(f"expected {schedule.T} > t > t_prev >= -1, got the pair {t, t_prev}")
        ab, ab_prev = alpha_bar[t], alpha_bar[t_prev]
        noise = predict_noise(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)

        x0 = (x - math.sqrt(1 - ab) * noise) / math.sqrt(ab)  # math.md (8)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            noise = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)  # (8), solved for the noise
        estimate = x0
        if order == 2 and earlier is not None and t_prev >= 0:  # math.md (23)
            ratio = (log_snr[t_prev] - log_snr[t]) / (log_snr[t] - earlier[1])
            x0 = x0 + ratio / 2 * (x0 - earlier[0])
            noise = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
        earlier = estimate, log_snr[t]

        # Back to the level of t_prev, math.md (9), with fresh noise, (10).
        sigma = eta * math.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))
        x = math.sqrt(ab_prev) * x0 + math.sqrt(max(0.0, 1 - ab_prev - sigma**2)) * noise
        if sigma > 0:  # 0 in the last step, where ab_prev is 1
            x = x + sigma * randn_like(x, generator)

        if on_step is not None:
            x = on_step(x, t_prev, estimate)
    return x


def timestep_pairs(T: int, steps: int) -> list[tuple[int, int]]:
    """(t, t_prev) of even strides from T-1 to -1: (999, 974), ..., (24, -1) for 40 of 1000."""
    if not 1 <= steps <= T:
        raise ValueError(f"expected 1 to {T} steps, as the schedule has {T}, got {steps}")
    return list(itertools.pairwise(round(T * i / steps) - 1 for i in range(steps, -1, -1)))


def snr_pairs(schedule: NoiseSchedule, steps: int) -> list[tuple[int, int]]:
    """`steps` pairs, or a few fewer, evenly spaced in log(SNR) from -10 (or its start) on."""
    log_snr = schedule.alpha_bar.double().logit()
    wanted = torch.linspace(max(-10.0, log_snr[-1].item()), log_snr[0].item(), steps + 1)[1:-1]
    nearest = (log_snr[:, None] - wanted).abs().argmin(dim=0)
    t = sorted({schedule.T - 1, *nearest.tolist()}, reverse=True)
    return list(itertools.pairwise([*t, -1]))


def randn_like(x: Tensor, generator: Generators | None = None) -> Tensor:
    """Standard normal noise of x's shape, drawn on the generator's device, then moved to x's."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x)
    if len(generator) != len(x):
        raise ValueError(f"expected {len(x)} generators, one for each image, got {len(generator)}")
    return torch.stack([randn_like(image, one) for image, one in zip(x, generator, strict=True)])
