"""Stable Diffusion, put together: a text encoder, a U-Net in latents, a VAE, and the core's own sampling loop.

    text_to_image(pipeline, ["a black cat"])                      noise                    -> z -> picture
    image_to_image(pipeline, ["a black cat"], images)   picture -> z0 -> z0 + noise        -> z -> picture
    inpaint(pipeline, ["a black cat"], images, masks)   picture -> z0 -> z0 + noise, kept  -> z -> picture

A z is a picture's latents (B, latent_channels, H / factor, W / factor).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.guidance import ClassUNet, guided, labels_of
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
    clip: bool = False  # are the latents known to lie in [-1, 1]?

    @property
    def weight(self) -> Tensor:
        """Any of the networks' numbers: it tells their device and precision."""
        return next(self.text_encoder.parameters())

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def predict_noise(self) -> Callable[..., Tensor]:
        """(x_t, t, context) -> noise. The U-Net may have 16 bits; the sampler around it goes on with those of x_t."""

        def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.unet(x_t.to(context.dtype), t, context).to(x_t.dtype)

        return v_to_noise(network, self.schedule) if self.prediction == "v_prediction" else network

    def states(self, texts: Sequence[str]) -> Tensor:
        """What the U-Net looks at: (B, length, width)."""
        return self.text_encoder(self.tokenizer(texts).to(self.device))

    def encode(self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> latents, one of those that each image may have."""
        mean, logvar = (numbers.to(images.dtype) for numbers in self.vae.encode(images.to(self.weight)))
        return self.vae.scale * (mean + (logvar / 2).exp() * randn(mean.shape, generator, mean.dtype, mean.device))

    def decode(self, z: Tensor) -> Tensor:
        """The way back. What is a little too bright or too dark is clamped."""
        return self.vae.decode((z / self.vae.scale).to(self.weight.dtype)).to(z.dtype).clamp(-1, 1)

    def walk(self, steps: int, strength: float = 1.0) -> list[tuple[int, int]]:
        """The pairs (t, t_prev) for `sample`: `steps` of them, or the last ones, as many as strength says; none for 0."""
        if not 0 <= strength <= 1:
            raise ValueError(f"expected a strength from 0 (leave the picture) to 1 (forget it), got {strength}")
        T = self.schedule.T
        if self.spacing == "trailing":
            pairs = strides(T, steps)
        else:  # Stable Diffusion's: 981, 961, ..., 21, 1 for 50 steps, and to 0, the least noise that it knows
            if not 1 <= steps < T:
                raise ValueError(f"expected 1 to {T - 1} steps, as the schedule has {T}, got {steps}")
            times = [1 + T // steps * i for i in reversed(range(steps))]
            pairs = list(zip(times, [*times[1:], 0], strict=True))
        return pairs[steps - int(steps * strength) :]


@torch.no_grad()
def text_to_image(pipeline: Pipeline, prompts: Sequence[str], size: int | None = None, **how: object) -> Tensor:
    """A picture for each prompt, (B, C, size, size). how: as in the two below, what else `denoise` can be told."""
    size = (size or pipeline.size) // pipeline.vae.factor
    dtype = torch.promote_types(pipeline.weight.dtype, torch.float32)  # the sampler never calculates in 16 bits
    shape = (len(prompts), pipeline.vae.config["latent_channels"], size, size)
    z0 = torch.zeros(shape, dtype=dtype, device=pipeline.device)
    return pipeline.decode(denoise(pipeline, prompts, z0, **how))


@torch.no_grad()
def image_to_image(
    pipeline: Pipeline, prompts: Sequence[str], images: Tensor, strength: float = 0.75, generator=None, **how: object
) -> Tensor:
    """The images (B, C, H, W), one for each prompt, drawn anew as far as strength says: 0 leaves them, 1 forgets them."""
    z0 = pipeline.encode(images, generator)
    return pipeline.decode(denoise(pipeline, prompts, z0, strength, generator=generator, **how))


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
    """The same, but only where the masks (B, 1, H, W) are 1, white. Where they are 0 every pixel is kept."""
    images, white = images.to(pipeline.device), masks.to(pipeline.device) >= 0.5
    z0 = pipeline.encode(images, generator)
    hole = white[:, :, :: pipeline.vae.factor, :: pipeline.vae.factor]  # (B, 1, h, w)
    if pipeline.unet.config["in_channels"] > z0.shape[1]:  # a U-Net trained for this: it is shown the hole, and what is around
        around = pipeline.encode(images * ~white, generator)
        pipeline, hole = replace(pipeline, unet=beside(pipeline.unet, torch.cat([hole, around], dim=1))), None
    z = denoise(pipeline, prompts, z0, strength, hole, generator=generator, **how)
    return torch.where(white, pipeline.decode(z), images)


def beside(unet: UNet, shown: Tensor) -> Callable[..., Tensor]:
    """A U-Net that is shown more channels with each x_t (with guidance's two copies of it, too)."""

    def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(torch.cat([x_t, shown.repeat(len(x_t) // len(shown), 1, 1, 1).to(x_t.dtype)], dim=1), t, context)

    return network


def denoise(
    pipeline: Pipeline,
    prompts: Sequence[str],
    z0: Tensor,
    strength: float = 1.0,
    hole: Tensor | None = None,
    negative: str = "",
    steps: int = 50,
    guidance: float = 7.5,
    eta: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Noise latents z0 (B, c, h, w) as far as strength says, and walk back to clean ones with the prompts in view.

    hole (B, 1, h, w) bool: everywhere else z0 is kept. negative: what no picture shall be. The others: see `sample`.
    """
    predict_noise = guided(pipeline.predict_noise, pipeline.states(prompts), pipeline.states([negative]), guidance)
    noise = randn(z0.shape, generator, z0.dtype, z0.device)
    walk = pipeline.walk(steps, strength)

    def noised(t: int) -> Tensor:
        return add_noise(z0, torch.tensor([t], device=z0.device), pipeline.schedule, noise)[0]

    def after_step(z: Tensor, t_prev: int) -> Tensor:
        if hole is not None:  # around it the network shall see what belongs there, at the level of noise that it expects
            z = torch.where(hole, z, z0 if t_prev == walk[-1][1] else noised(t_prev))
        return z if on_step is None else on_step(z, t_prev)

    if strength == 1:
        z = noise  # without a trace of z0
    elif walk:
        z = noised(walk[0][0])
    else:
        z = z0
    return sample(
        predict_noise,
        z,
        pipeline.schedule,
        eta=eta,
        timesteps=walk,
        clip=pipeline.clip,
        generator=generator,
        on_step=after_step,
    )


class Pixels(nn.Module):
    """In place of a VAE: the latents are the pixels."""

    scale, factor = 1.0, 1

    def __init__(self, channels: int):
        super().__init__()
        self.config = {"channels": channels, "latent_channels": channels}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, -torch.inf)  # no variance

    def decode(self, z: Tensor) -> Tensor:
        return z


class Labels:
    """In place of a tokenizer: the text names classes, `labels_of` reads it. Nothing is cut; a word too many is an error."""

    def __init__(self, classes: dict[str, Sequence[str]]):
        self.classes = classes

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([labels_of(text, self.classes) for text in texts])

    def left_out(self, text: str) -> str:
        return ""

    def unknown(self, text: str) -> list[str]:
        labels_of(text, self.classes)  # or the error
        return []


def of_classes(network: ClassUNet, schedule: NoiseSchedule, size: int) -> Pipeline:
    """A model of classes as a pipeline: its text encoder knows classes only, and there is no VAE between it and the pixels."""
    pixels = Pixels(network.config["in_channels"])
    labels = Labels(network.config["classes"])
    return Pipeline(network.unet, pixels, network.answers, labels, schedule, size, "v_prediction", "trailing", clip=True)
