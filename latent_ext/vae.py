"""The variational autoencoder of Stable Diffusion: a picture becomes a small stack of numbers, its latents, and back again.

Most of a picture's bytes are fine texture. A diffusion model that works on latents of a quarter of the height and width
has a sixteenth of the pixels to think about; the decoder, trained once and for all, adds the texture.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from unet import Block, ResBlock, SelfAttention, Up

EPS = 1e-6  # of all norms here; the U-Net's residual blocks have 1e-5


def down(width: int) -> nn.Module:
    """Half the height and width. Zeros are added right and below only: that is all a stride of 2 needs of an even size, and
    the rule of the code it was first written in; with zeros all around, the published weights shift the picture."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))


def middle(width: int, groups: int) -> nn.ModuleList:
    """Where the picture is smallest, every pixel looks at every pixel."""
    res1, res2 = (ResBlock(width, width, None, groups, EPS) for _ in range(2))
    return nn.ModuleList([Block(res1, SelfAttention(width, 1, groups, eps=EPS)), Block(res2)])


class Encoder(nn.Module):
    """x (B, channels, H, W) -> (B, out_channels, H / factor, W / factor)."""

    def __init__(self, channels: int, out_channels: int, widths: Sequence[int], blocks: int, groups: int):
        super().__init__()
        width = widths[0]
        self.down = nn.ModuleList([Block(conv=nn.Conv2d(channels, width, 3, padding=1))])
        for level, wide in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Block(ResBlock(width, wide, None, groups, EPS)))
                width = wide
            if level < len(widths) - 1:
                self.down.append(Block(conv=down(width)))
        self.mid = middle(width, groups)
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.conv = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.down, *self.mid):
            x = block(x)
        return self.conv(F.silu(self.norm(x)))


class Decoder(nn.Module):
    """z (B, latent_channels, h, w) -> (B, channels, h * factor, w * factor)."""

    def __init__(self, latent_channels: int, channels: int, widths: Sequence[int], blocks: int, groups: int):
        super().__init__()
        width = widths[-1]
        self.first = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mid = middle(width, groups)
        self.up = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                conv = Up(wide) if i == blocks and level > 0 else None
                self.up.append(Block(ResBlock(width, wide, None, groups, EPS), conv=conv))
                width = wide
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.first(z)
        for block in (*self.mid, *self.up):
            z = block(z)
        return self.conv(F.silu(self.norm(z)))


class VAE(nn.Module):
    """Pictures (B, channels, H, W) in [-1, 1] <-> latents (B, latent_channels, H / factor, W / factor) (Rombach et al. 2022).

    widths: the channels of each level, half as high and wide as the one before; blocks: residual blocks in each of the
    encoder's, one more in the decoder's. scale: what latents are multiplied with to have a variance of about 1, as the
    noise has; encode and decode know nothing of it.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        widths: Sequence[int] = (32, 64, 64),
        blocks: int = 1,
        groups: int = 1,
        scale: float = 1.0,
    ):
        super().__init__()
        self.config = {
            "channels": channels,
            "latent_channels": latent_channels,
            "widths": list(widths),
            "blocks": blocks,
            "groups": groups,
        }
        self.scale = scale
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(channels, 2 * latent_channels, widths, blocks, groups)
        self.quant = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        nn.init.constant_(self.quant.bias[latent_channels:], -6.0)  # begins with hardly any noise: first learn to copy
        self.post_quant = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, channels, widths, blocks, groups)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents that x may have are normally distributed around mean with the variance exp(logvar)."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"a picture of {x.shape[2]}x{x.shape[3]}: expected multiples of {self.factor}")
        mean, logvar = self.quant(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training needs: x encoded, one of its latents drawn by `noise`, that decoded; and mean, logvar."""
        mean, logvar = self.encode(x)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """How far the latents' distributions are from the standard normal one, a mean over all numbers. math.md (16)"""
    return (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
