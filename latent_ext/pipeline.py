"""Stable Diffusion, put together: a text encoder, a U-Net in latents, a VAE, and the core's own sampling loop."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.vae import VAE
from processes import NoiseSchedule, v_to_noise
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
    def predict_noise(self) -> Callable[..., Tensor]:
        """(x_t, t, context) -> noise."""
        return v_to_noise(self.unet, self.schedule) if self.prediction == "v_prediction" else self.unet

    def states(self, texts: list[str]) -> Tensor:
        """What the U-Net looks at: (B, length, width)."""
        return self.text_encoder(self.tokenizer(texts).to(next(self.text_encoder.parameters()).device))
