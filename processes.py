"""The two processes of a diffusion model: `add_noise` destroys a picture at once, `sample` makes one step by step.

Everywhere: x0 is a clean image and x_t a noised one, float (B, C, H, W), images in [-1, 1]; t is a long (B,) in 0 .. T-1;
noise is standard normal. The model is any callable predict_noise(x_t, t) -> noise of the shape of x_t.
"math.md (4)" in a comment is equation 4 of docs/math.md, where it is derived.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of the picture is left at each time step: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise.

    alpha_bar, float32 (T,), falls from almost 1 at t = 0 to almost 0 at t = T-1.
    """

    name: str
    alpha_bar: Tensor

    @property
    def T(self) -> int:
        return len(self.alpha_bar)

    @classmethod
    def linear(cls, T: int = 1000) -> "NoiseSchedule":
        """DDPM (Ho et al. 2020, section 4): each step's share of noise, math.md (1)'s beta, grows from 0.0001 to 0.02."""
        return cls.from_betas("linear", torch.linspace(1e-4, 0.02, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, T: int = 1000) -> "NoiseSchedule":
        """Stable Diffusion (Rombach et al. 2022, its code): sqrt(beta) grows linearly."""
        return cls.from_betas("scaled_linear", torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000) -> "NoiseSchedule":
        """Nichol & Dhariwal 2021, eq. 17: alpha_bar falls as a squared cosine; no step's beta is above 0.999."""
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas("cosine", (1 - f[1:] / f[:-1]).clamp(max=0.999))

    @classmethod
    def sigmoid(cls, T: int = 1000) -> "NoiseSchedule":
        """Jabri et al. 2022, fig. 8: alpha_bar is a logistic curve from 3 to -3: few steps are nearly clean or nearly noise."""
        curve = torch.sigmoid(torch.linspace(3, -3, T + 1, dtype=torch.float64))
        alpha_bar = (curve - curve[-1]) / (curve[0] - curve[-1])  # 1 for a clean picture .. 0 for noise alone
        return cls("sigmoid", alpha_bar[1:].clamp(min=1e-9).float())  # not 0: math.md (8) divides by its root

    @classmethod
    def from_betas(cls, name: str, betas: Tensor) -> "NoiseSchedule":
        return cls(name, torch.cumprod(1 - betas, dim=0).float())  # math.md (2): alpha_bar_t = (1 - beta_0) ... (1 - beta_t)


def add_noise(x0: Tensor, t: Tensor, schedule: NoiseSchedule, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The forward process in one jump (DDPM eq. 4): returns x_t, and the noise that the model shall find in it."""
    if noise is None:
        noise = torch.randn_like(x0)
    alpha_bar = schedule.alpha_bar.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))  # (B, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise  # math.md (3)


def v_to_noise(network: Callable[..., Tensor], schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """A predict_noise whose network answers v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, app. D).

    In nearly pure noise the answer is nearly x_t: here it passes by the network, which would copy it with small errors that
    are large beside what is left of the picture. math.md (11)
    """

    def predict_noise(x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar.to(x_t)[t].view(-1, *[1] * (x_t.ndim - 1))
        return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * network(x_t, t, *context)  # math.md (11)

    return predict_noise


# What to pass to `sample`, and what one gets (network calls: `steps`):
#
#   DDPM    steps=1000  eta=1   every step of the chain, fresh noise after each        (Ho et al. 2020, Algorithm 2)
#   fast    steps=40    eta=1   the same with longer strides; fresh noise washes errors out: the default
#   DDIM    steps=40    eta=0   no fresh noise: the picture is a function of x_T       (Song et al. 2021)
#   edit    timesteps=[599, 579, ..., 19], x=x_t at t=599: begins in the middle        (image-to-image)
@torch.no_grad()
def sample(
    predict_noise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int = 40,
    eta: float = 1.0,
    timesteps: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    clip: bool = False,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """The reverse process (DDPM Algorithm 2; DDIM eq. 12): from noise x (B, C, H, W), or from the middle, to clean x0.

    timesteps, if given, replace steps: descending, the last one leads to clean; or pairs (t, t_prev), -1 meaning clean.
    clip: the pictures are known to lie in [-1, 1]. generator: one, or one for each image. on_step(x, t_prev) returns the
    x to go on with.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"expected an eta from 0 (DDIM, no fresh noise) to 1 (DDPM), got {eta}")
    alpha_bar = [*schedule.alpha_bar.tolist(), 1.0]  # the last one is alpha_bar[-1]: a clean picture
    for t, t_prev in strides(schedule.T, steps, timesteps):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        noise = predict_noise(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)

        x0 = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)  # math.md (8): the picture, if it is right
        if clip:
            x0 = x0.clamp(-1, 1)
            noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)  # (8) the other way round
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))  # math.md (10); 0 in the last step
        x = math.sqrt(a_prev) * x0 + math.sqrt(max(0.0, 1 - a_prev - sigma**2)) * noise  # math.md (9)
        if sigma > 0:
            x = x + sigma * randn(x.shape, generator, x.dtype, x.device)

        if on_step is not None:
            x = on_step(x, t_prev)
    return x


def strides(T: int, steps: int, timesteps: Sequence | None = None) -> list[tuple[int, int]]:
    """The pairs (t, t_prev) to walk: `steps` even strides that begin at T - 1, or what the caller wants."""
    if timesteps is None:
        if not 1 <= steps <= T:
            raise ValueError(f"expected 1 to {T} steps, as the schedule has {T}, got {steps}")
        timesteps = [round(T * i / steps) - 1 for i in range(steps, 0, -1)]
    walk = list(timesteps)
    if not walk or not isinstance(walk[0], tuple | list):
        walk = list(zip(walk, [*walk, -1][1:], strict=True))
    for t, t_prev in walk:
        if not -1 <= t_prev < t < T:
            raise ValueError(f"expected time steps that descend from at most {T - 1}, got {t} and then {t_prev}")
    return [(int(t), int(t_prev)) for t, t_prev in walk]


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise. With one generator for each image, an image's noise does not depend on its neighbours."""
    if generator is None:
        return torch.randn(*shape, dtype=dtype, device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, dtype=dtype, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"expected one generator for each of the {shape[0]} images, got {len(generator)}")
    return torch.stack([torch.randn(*shape[1:], generator=g, dtype=dtype, device=g.device) for g in generator]).to(device)
