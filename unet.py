"""The function a diffusion model learns: given a noised image and its time step, predict the noise
(or v, from which the noise follows: processes.noise_from_v).

This is the U-Net of DDPM (Ho et al. 2020, appendix B) and, with other arguments, that of Stable
Diffusion. It works at several resolutions: on the way down each level halves the image, on the way
up each level doubles it. Skip connections carry the detail of each resolution across, so that low
resolutions decide what is there, and high ones exactly where.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Time steps (B,) -> (B, dim): cosines of t, then sines (Vaswani et al. 2017, section 3.5).

    The wavelengths grow geometrically from 2 pi towards 2 pi 10,000 time steps: fast waves
    distinguish neighbouring steps, slow ones early from late.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): two convolutions, t between them, and a shortcut.

    GroupNorm normalizes each image by itself, as the images of a batch have different noise levels.
    """

    def __init__(self, c_in: int, c_out: int, t_dim: int | None, groups: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.t_proj = nn.Linear(t_dim, c_out) if t_dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at first only a constant is added to the shortcut

    def forward(self, x: Tensor, t_emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        if self.t_proj is not None:
            h = h + self.t_proj(F.silu(t_emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """Multi-head self-attention over all pixels of each image: (B, C, H, W) -> (B, C, H, W).

    A convolution sees 3x3 pixels; attention sees all, so that the left eye can match the right one.
    Its cost grows with (H W)^2, which is why only low resolutions have it.
    """

    def __init__(self, channels: int, heads: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("expected no context: this U-Net has self-attention only")
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        qkv = [project(h) for project in (self.q, self.k, self.v)]  # (B, HW, C) each
        q, k, v = (rearrange(y, "b n (heads d) -> b heads n d", heads=self.heads) for y in qkv)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v, (B, heads, HW, d)
        h = self.out(rearrange(h, "b heads n d -> b n (heads d)"))  # (B, HW, C)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2 h, 2 w), or cropped: 7 pixels halve to 4, double to 8, crop to 7."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        doubled = F.interpolate(x, scale_factor=2.0)  # nearest neighbour
        return self.conv(doubled[:, :, :height, :width])


class UNetBlock(nn.Module):
    """One entry of the U-Net's lists: a residual block, attention, resampling; any may be None."""

    def __init__(self, res=None, attn=None, resample=None):
        super().__init__()
        self.res, self.attn, self.resample = res, attn, resample

    def forward(self, x: Tensor, t_emb=None, context=None, size=()) -> Tensor:
        x = x if self.res is None else self.res(x, t_emb)
        x = x if self.attn is None else self.attn(x, context)
        return x if self.resample is None else self.resample(x, *size)


class UNet(nn.Module):
    """x_t (B, in_channels, H, W), t (B,) -> noise, or v: (B, out_channels, H, W).

    channels: one number per level; each level is half as high and wide as the one before.
    attention_levels: one flag per level; the middle always has attention. attention_block: a
    callable (channels, heads, groups) -> module. groups is 1, as normalizing few channels at a time
    removes their mean, and with it the image's colour (docs/history.md).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: Sequence[int] = (24, 48, 96, 96),
        num_res_blocks: int = 1,
        attention_levels: Sequence[bool] = (False, False, True, False),
        heads: int = 2,
        groups: int = 1,
        attention_block: Callable[[int, int, int], nn.Module] = SelfAttention,
    ):
        super().__init__()
        if len(attention_levels) != len(channels):
            raise ValueError(f"expected {len(channels)} attention_levels, got {attention_levels}")
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "num_res_blocks": num_res_blocks,
            "attention_levels": list(attention_levels),
            "heads": heads,
            "groups": groups,
        }
        c, t_dim = channels[0], 4 * channels[0]
        self.t_mlp = nn.Sequential(nn.Linear(c, t_dim), nn.SiLU(), nn.Linear(t_dim, t_dim))

        def block(c_in: int, c_out: int, attention: bool, resample=None) -> UNetBlock:
            res = ResBlock(c_in, c_out, t_dim, groups)
            attn = attention_block(c_out, heads, groups) if attention else None
            return UNetBlock(res, attn, resample)

        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        self.down, skips = nn.ModuleList(), [c]
        for level, c_out in enumerate(channels):
            for _ in range(num_res_blocks):
                self.down.append(block(c, c_out, attention_levels[level]))
                c = c_out
                skips.append(c)
            if level < len(channels) - 1:
                halve = nn.Conv2d(c, c, 3, stride=2, padding=1)
                self.down.append(UNetBlock(resample=halve))
                skips.append(c)

        self.mid = nn.ModuleList([block(c, c, attention=True), block(c, c, attention=False)])

        self.up = nn.ModuleList()
        for level, c_out in reversed([*enumerate(channels)]):
            for i in range(num_res_blocks + 1):
                double = Upsample(c_out) if i == num_res_blocks and level > 0 else None
                self.up.append(block(c + skips.pop(), c_out, attention_levels[level], double))
                c = c_out

        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        t_emb = timestep_embedding(t, self.t_mlp[0].in_features).to(x.dtype)
        t_emb = self.t_mlp(t_emb)  # (B, 4 channels[0])
        x = self.conv_in(x.to(memory_format=torch.channels_last))  # all convolutions get faster
        skips = [x]
        for block in self.down:
            x = block(x, t_emb, context)
            skips.append(x)
        for block in self.mid:
            x = block(x, t_emb, context)
        for block in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, t_emb, context, size=skips[-1].shape[2:] if skips else ())
        x = F.silu(self.norm_out(x))
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse here
            return self.conv_out(x.to(self.conv_out.weight.dtype))
