"""Stable Diffusion's variational autoencoder turns images into small latents, and back.

Most of an image's bytes are fine texture. Latents have a quarter of the height and width, so the
diffusion model draws a sixteenth of the pixels; the decoder, trained once, adds the texture.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import ResBlock, SelfAttention, UNetBlock, Upsample

EPS = 1e-6  # for every norm here; the U-Net's residual blocks use 1e-5


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H / 2, W / 2). It adds zeros only on the right and at the bottom,
    as the published weights expect; zeros on all sides would shift the image."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def middle(channels: int, groups: int) -> nn.ModuleList:
    """Attention between two residual blocks, at the lowest resolution."""
    res1, res2 = (ResBlock(channels, channels, None, groups, EPS) for _ in range(2))
    attention = SelfAttention(channels, heads=1, groups=groups, eps=EPS)
    return nn.ModuleList([UNetBlock(res1, attention), UNetBlock(res2)])


class Encoder(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H / downsampling, W / downsampling)."""

    def __init__(self, c_in, c_out, channels: Sequence[int], num_res_blocks: int, groups: int):
        super().__init__()
        c = channels[0]
        self.conv_in = nn.Conv2d(c_in, c, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(channels):
            for _ in range(num_res_blocks):
                self.down.append(UNetBlock(ResBlock(c, width, None, groups, EPS)))
                c = width
            if level < len(channels) - 1:
                self.down.append(UNetBlock(resample=Downsample(c)))
        self.mid = middle(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, EPS)
        self.conv_out = nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.to(memory_format=torch.channels_last))  # faster
        for block in (*self.down, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """z (B, c_in, h, w) -> (B, c_out, h * downsampling, w * downsampling)."""

    def __init__(self, c_in, c_out, channels: Sequence[int], num_res_blocks: int, groups: int):
        super().__init__()
        c = channels[-1]
        self.conv_in = nn.Conv2d(c_in, c, 3, padding=1)
        self.mid = middle(c, groups)
        self.up = nn.ModuleList()
        for level, width in reversed([*enumerate(channels)]):
            for i in range(num_res_blocks + 1):
                double = Upsample(width) if i == num_res_blocks and level > 0 else None
                res = ResBlock(c, width, None, groups, EPS)
                self.up.append(UNetBlock(res, resample=double))
                c = width
        self.norm_out = nn.GroupNorm(groups, c, EPS)
        self.conv_out = nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z.to(memory_format=torch.channels_last))
        for block in (*self.mid, *self.up):
            z = block(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class VAE(nn.Module):
    """Images (B, in_channels, H, W) in [-1, 1] <-> latents (B, latent_channels, h, w).

    Rombach et al. 2022; h = H / downsampling. channels: one number per level; each level but the
    first halves height and width. scaling_factor: latents times this have a variance of about 1,
    like the noise. It is only stored here: encode and decode do not apply it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        channels: Sequence[int] = (32, 64, 64),
        num_res_blocks: int = 1,
        groups: int = 1,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.config = {"in_channels": in_channels, "latent_channels": latent_channels}
        self.config |= {"channels": list(channels), "num_res_blocks": num_res_blocks}
        self.config |= {"groups": groups}
        self.scaling_factor = scaling_factor
        self.downsampling = 2 ** (len(channels) - 1)
        shape = channels, num_res_blocks, groups
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)
        # quant, post_quant: Stable Diffusion's names; this VAE quantizes nothing.
        self.quant = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        nn.init.constant_(self.quant.bias[latent_channels:], -6.0)  # logvar: little noise at first
        self.post_quant = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, in_channels, *shape)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents' normal distribution, (B, latent_channels, h, w)."""
        H, W, multiple = *x.shape[2:], self.downsampling
        if H % multiple or W % multiple:
            raise ValueError(f"image of {H}x{W}: height and width must be multiples of {multiple}")
        mean, logvar = self.quant(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: x, reconstructed from latents drawn with `noise`; mean and logvar."""
        mean, logvar = self.encode(x)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of the latents from a standard normal distribution, per number. math.md (16)"""
    return (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
