"""Stable Diffusion, put together: a text encoder, a U-Net in latents, a VAE, and the core's own sampling loop.

    text_to_image(pipeline, ["a black cat"])                      noise                    -> z -> picture
    image_to_image(pipeline, ["a black cat"], images)   picture -> z0 -> z0 + noise        -> z -> picture
    inpaint(pipeline, ["a black cat"], images, masks)   picture -> z0 -> z0 + noise, kept  -> z -> picture

A z is a picture's latents (B, latent_channels, H / factor, W / factor).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.guidance import guided
from latent_ext.vae import VAE
from processes import NoiseSchedule, add_noise, randn, sample, strides, v_to_noise
from unet import UNet


@dataclass
class Pipeline:
    """The parts, and how the U-Net was trained. vae.scale is the factor between its latents and the U-Net's."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    size: int = 512  # pixels: of the pictures it was trained on
    prediction: str = "epsilon"  # what the U-Net answers: the noise, or "v_prediction" (math.md (11))
    spacing: str = "leading"  # which time steps are walked: Stable Diffusion's, or "trailing", the core's

    @property
    def device(self) -> torch.device:
        return self.unet.conv.weight.device

    @property
    def predict_noise(self) -> Callable[..., Tensor]:
        """(x_t, t, context) -> noise. The network may have 16 bits; the sampler around it goes on with those of x_t."""

        def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.unet(x_t.to(context.dtype), t, context).to(x_t.dtype)

        return v_to_noise(network, self.schedule) if self.prediction == "v_prediction" else network

    def states(self, texts: Sequence[str]) -> Tensor:
        """What the U-Net looks at: (B, length, width)."""
        return self.text_encoder(self.tokenizer(texts).to(self.device))

    def encode(self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> one of the latents that each may have."""
        mean, logvar = self.vae.encode(images.to(self.vae.quant.weight))
        std = (logvar / 2).exp()
        return self.vae.scale * (mean + std * randn(mean.shape, generator, mean.dtype, mean.device))

    def decode(self, z: Tensor) -> Tensor:
        """The way back. Colours a little too bright or too dark are clamped."""
        return self.vae.decode((z / self.vae.scale).to(self.vae.quant.weight)).to(z.dtype).clamp(-1, 1)

    def walk(self, steps: int, strength: float = 1.0) -> list[tuple[int, int]]:
        """The pairs (t, t_prev) for `sample`: of `steps` of them the last ones, a share of `strength`; none for 0."""
        T = self.schedule.T
        if self.spacing == "trailing":
            pairs = strides(T, steps)
        else:  # Stable Diffusion's: 981, 961, ..., 21, 1 for 50 steps, and from 1 to 0, the least noise it knows
            if not 1 <= steps < T:
                raise ValueError(f"expected 1 to {T - 1} steps, as the schedule has {T}, got {steps}")
            times = [1 + T // steps * i for i in reversed(range(steps))]
            pairs = list(zip(times, [*times[1:], 0], strict=True))
        return pairs[steps - int(steps * strength) :]


@torch.no_grad()
def text_to_image(pipeline: Pipeline, prompts: Sequence[str], size: int | None = None, **how: object) -> Tensor:
    """A picture (3, size, size) for each prompt, out of noise. how: what `denoise` is to know, for all three of these."""
    size = (size or pipeline.size) // pipeline.vae.factor
    z0 = torch.zeros(len(prompts), pipeline.vae.config["latent_channels"], size, size)  # nothing is known yet
    z = denoise(pipeline, prompts, z0, **how)
    return pipeline.decode(z)


@torch.no_grad()
def image_to_image(
    pipeline: Pipeline, prompts: Sequence[str], images: Tensor, strength: float = 0.75, generator=None, **how: object
) -> Tensor:
    """The images (B, 3, H, W) drawn anew, so far as strength says: 0 leaves them, 1 forgets them."""
    z0 = pipeline.encode(images, generator)
    z = denoise(pipeline, prompts, z0, strength=strength, generator=generator, **how)
    return pipeline.decode(z)


@torch.no_grad()
def inpaint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    images: Tensor,
    masks: Tensor,
    strength: float = 1.0,
    generator=None,
    **how: object,
) -> Tensor:
    """The images drawn anew where their masks (B, 1, H, W) are 1, white; where they are 0 every pixel is kept."""
    images, white = images.to(pipeline.device), masks.to(pipeline.device) >= 0.5
    factor = pipeline.vae.factor
    z0 = pipeline.encode(images, generator)
    z = denoise(pipeline, prompts, z0, strength=strength, repaint=white[..., ::factor, ::factor], generator=generator, **how)
    return torch.where(white, pipeline.decode(z), images)


def denoise(
    pipeline: Pipeline,
    prompts: Sequence[str],
    z0: Tensor,
    strength: float = 1.0,
    repaint: Tensor | None = None,
    negative: str = "",
    steps: int = 50,
    guidance: float = 7.5,
    eta: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Noise latents z0 as far as strength says, and walk back to clean ones with the prompts in view.

    repaint (B, 1, h, w): where it is False, z0 is kept. negative: what no picture shall be. The others: see `sample`.
    """
    context = pipeline.states(prompts)
    predict_noise = guided(pipeline.predict_noise, context, pipeline.states([negative]), guidance)
    z0 = z0.to(context.device, torch.promote_types(context.dtype, torch.float32))
    noise = randn(z0.shape, generator, z0.dtype, z0.device)
    walk = pipeline.walk(steps, strength)

    def noised(t: int) -> Tensor:
        return add_noise(z0, torch.tensor([t]), pipeline.schedule, noise)[0]

    def after_step(z: Tensor, t_prev: int) -> Tensor:
        if repaint is not None:
            known = z0 if t_prev == walk[-1][1] else noised(t_prev)
            z = torch.where(repaint, z, known)  # the model sees what is around the hole at its own level of noise
        return z if on_step is None else on_step(z, t_prev)

    if strength == 1:
        z = noise
    else:
        z = noised(walk[0][0]) if walk else z0
    return sample(predict_noise, z, pipeline.schedule, eta=eta, timesteps=walk, generator=generator, on_step=after_step)
