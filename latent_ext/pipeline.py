"""Stable Diffusion, put together: a text encoder, a U-Net for latents, a VAE, and `sample`.

    text_to_image                        noise    ->  sample              ->  decode
    inpaint          encode  ->  z0 with noise    ->  sample, keeping z0  ->  decode
    image_to_image   the same, keeping nothing

Each makes one image per prompt. Images are (B, C, H, W) in [-1, 1]. z is the U-Net's latents,
(B, c, h, w) with h = H / downsampling; z0 has no noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.guidance import ClassUNet, guided, parse_labels
from latent_ext.vae import VAE
from processes import (
    Generators,
    Network,
    NoiseSchedule,
    add_noise,
    noise_from_v,
    randn_like,
    sample,
    timestep_pairs,
)
from toolbox.files import check_number
from toolbox.models import predict_noise_of
from unet import UNet

OnStep = Callable[[Tensor, int, Tensor], Tensor]  # (z, t_prev, z0) -> the z to continue with


@dataclass
class Pipeline:
    """The networks, and how the U-Net was trained."""

    unet: UNet
    vae: VAE | None  # None: z is the image itself
    text_encoder: TextEncoder | nn.Module
    tokenizer: Tokenizer | None
    schedule: NoiseSchedule
    size: int = 512  # width and height of its training images, in pixels
    prediction: str = "epsilon"  # diffusers' words: epsilon is the noise; or "v_prediction"
    spacing: str = "leading"  # diffusers' word for the time steps 981 ... 1; trailing: 999 ... 19

    clip_x0 = False  # latents have no known range

    @property
    def downsampling(self) -> int:
        return self.vae.downsampling if self.vae else 1

    @property
    def image_channels(self) -> int:
        return (self.vae or self.unet).config["in_channels"]

    @property
    def weight(self) -> Tensor:
        """One parameter: all others share its device and precision."""
        return next(self.text_encoder.parameters())

    @property
    def for_inpainting(self) -> bool:
        """Does the U-Net take, besides z, a mask and the latents around it?"""
        return self.unet.config["in_channels"] > self.unet.config["out_channels"]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> the context of the U-Net, (B, length, width)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.weight.device))

    def predict_noise(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if self.prediction == "v_prediction":
            return noise_from_v(self.call_unet, self.schedule)(z_t, t, context)
        return self.call_unet(z_t, t, context)

    def call_unet(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net may compute in 16 bits; z_t and all arithmetic of `sample` have 32."""
        return self.unet(z_t.to(context.dtype), t, context).to(z_t.dtype)

    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        """Images -> z0, drawn from the distribution that the VAE returns for each image."""
        mean, logvar = (y.to(images.dtype) for y in self.vae.encode(images.to(self.weight)))
        z0 = mean + (logvar / 2).exp() * randn_like(mean, generator)
        return self.vae.scaling_factor * z0

    def decode(self, z0: Tensor) -> Tensor:
        images = self.vae.decode((z0 / self.vae.scaling_factor).to(self.weight))
        return images.to(z0.dtype).clamp(-1, 1)

    def timesteps(self, steps: int, strength: float = 1.0) -> list[tuple[int, int]]:
        """Pairs (t, t_prev) for `sample`: the last int(steps * strength) of `steps` pairs."""
        T, leading = self.schedule.T, self.spacing == "leading"
        check_number("--steps", steps, 1, T - leading)  # leading starts at 1: one step less
        check_number("--strength", strength, 0, 1)
        pairs = timestep_pairs(T, steps)
        if leading:  # for 50 of 1000 steps: 981, 961, ..., 21, 1, and finally 0, not -1
            t = [1 + T // steps * i for i in reversed(range(steps))]
            pairs = list(zip(t, [*t[1:], 0], strict=True))
        return pairs[steps - int(steps * strength) :]


@torch.no_grad()
def text_to_image(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    size: int | None = None,
    steps: int = 50,
    generator: Generators | None = None,
    **options: object,
) -> Tensor:
    """Draw an image per prompt. size: its width and height in pixels. options: for `denoise`."""
    weight, side = pipeline.weight, (size or pipeline.size) // pipeline.downsampling
    shape = len(prompts), pipeline.unet.config["out_channels"], side, side
    dtype = torch.promote_types(weight.dtype, torch.float32)
    z = randn_like(torch.empty(shape, dtype=dtype, device=weight.device), generator)
    z0 = denoise(pipeline, prompts, z, pipeline.timesteps(steps), generator, **options)
    return pipeline.decode(z0)


@torch.no_grad()
def inpaint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    images: Tensor,
    masks: Tensor,
    *,
    strength: float = 1.0,
    steps: int = 50,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    **options: object,
) -> Tensor:
    """Redraw only where masks (B, 1, H, W) are 1 (white). All other pixels are kept.

    strength: how much to redraw. 0 keeps the images, 1 forgets them.
    """
    timesteps, device = pipeline.timesteps(steps, strength), pipeline.weight.device
    images, white = images.to(device), masks.to(device) >= 0.5
    z0 = pipeline.encode(images, generator)
    latent_mask = white[:, :, :: pipeline.downsampling, :: pipeline.downsampling]  # (B, 1, h, w)
    keep = ~latent_mask
    if pipeline.for_inpainting:  # its U-Net sees mask and surroundings: put nothing back
        around = pipeline.encode(images * ~white, generator)
        unet = concat_channels(pipeline.unet, torch.cat([latent_mask, around], dim=1))
        pipeline, keep = replace(pipeline, unet=unet), torch.zeros_like(keep)
    noise = randn_like(z0, generator)

    def noised(t: int) -> Tensor:
        return add_noise(z0, torch.tensor([t], device=device), pipeline.schedule, noise)[0]

    def keep_known(z: Tensor, t_prev: int, x0: Tensor) -> Tensor:
        """Put z0 back, with the noise that the U-Net expects at t_prev; at the end, with none."""
        known = z0 if t_prev == timesteps[-1][1] else noised(t_prev)
        z = torch.where(keep, known, z)
        return z if on_step is None else on_step(z, t_prev, x0)

    z = z0
    if strength == 1:
        z = noise  # Stable Diffusion's first time step would leave a trace of z0
    elif timesteps:
        z = noised(timesteps[0][0])
    redrawn = denoise(pipeline, prompts, z, timesteps, generator, on_step=keep_known, **options)
    return torch.where(white, pipeline.decode(redrawn), images)


def image_to_image(
    pipeline: Pipeline,
    prompts: Sequence[str],
    images: Tensor,
    *,
    strength: float = 0.75,
    **options: object,
) -> Tensor:
    """`inpaint` with masks that are white everywhere."""
    masks = torch.ones_like(images[:, :1])
    return inpaint(pipeline, prompts, images, masks, strength=strength, **options)


def denoise(
    pipeline: Pipeline,
    prompts: Sequence[str],
    z: Tensor,
    timesteps: list[tuple[int, int]],
    generator: Generators | None,
    *,
    negative: str = "",
    guidance_scale: float = 7.5,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    predict_noise: Network | None = None,
) -> Tensor:
    """z (B, c, h, w) -> z0, guided by the prompts: the part that all three tasks share.

    negative: what no image must show. predict_noise(z_t, t, context): replaces the pipeline's.
    """
    context = pipeline.encode_prompts(prompts)  # (B, length, width)
    null_context = pipeline.encode_prompts([negative])  # (1, length, width)
    predict_noise = predict_noise or pipeline.predict_noise
    predict_noise = guided(predict_noise, context, null_context, guidance_scale)
    options = {"clip_x0": pipeline.clip_x0, "generator": generator, "on_step": on_step}
    return sample(predict_noise, z, pipeline.schedule, eta=eta, timesteps=timesteps, **options)


def concat_channels(unet: UNet, extra: Tensor) -> Network:
    """A U-Net that also sees `extra` (B, c, h, w), next to each copy of z_t from guidance."""

    def network(z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        copies = extra.to(z_t.dtype).repeat(len(z_t) // len(extra), 1, 1, 1)
        return unet(torch.cat([z_t, copies], dim=1), t, context)

    return network


class ClassPipeline(Pipeline):
    """A class-conditional model: prompts name values ("green eyes"), and z is the image itself."""

    clip_x0 = True  # pixels lie in [-1, 1]

    def __init__(self, network: ClassUNet, schedule: NoiseSchedule, config: dict):
        super().__init__(network.unet, None, network.label_embedding, None, schedule)
        self.classes, self.size, self.spacing = network.classes, config["size"], "trailing"
        self.predict_noise = predict_noise_of(network.unet, schedule, config)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        labels = torch.tensor([parse_labels(prompt, self.classes) for prompt in prompts])
        return self.text_encoder(labels.to(self.weight.device))

    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        randn_like(images, generator)  # unused: later random numbers stay as they were
        return images

    def decode(self, z0: Tensor) -> Tensor:
        return z0.clamp(-1, 1)
