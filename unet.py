"""The function that a diffusion model learns: given a noised image and its time step, predict the noise in it.

This is the U-Net of DDPM (Ho et al. 2020, appendix B), and by its constructor's arguments alone also Stable Diffusion's.
It works at several sizes at once: on the way down each level halves the picture, on the way up each level doubles it,
and skip connections carry the detail of each size straight across, so that the small sizes can decide *what* is there
(two ears, one cat) and the large ones only *where exactly*.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Time steps (B,) as waves (B, width): cosines, then sines (Vaswani et al. 2017, 3.5; DDPM, appendix B).

    The wavelengths grow geometrically from 2 pi towards 2 pi 10,000: the fast waves tell neighbours apart, the slow ones
    early from late. One plain number would leave it to the network to build such functions of time by itself.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)  # (half,)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, width)


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H, W): two convolutions, the time added between them, the input added to the result.

    GroupNorm, because its statistics are of one image alone: the images of a batch have different noise levels.
    """

    def __init__(self, c_in: int, c_out: int, time_width: int | None, groups: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, c_out) if time_width else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block begins as (almost) "change nothing" and learns what to add

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        if self.time is not None:
            h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """(B, C, H, W) -> the same: every pixel looks at every pixel of its own image and takes over what fits.

    Convolutions see 3x3 pixels; this sees all, so that the left eye can match the right one. The cost grows with
    (H W)^2, which is why only the small sizes have it.
    """

    def __init__(self, channels: int, heads: int, groups: int, context_width: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("this U-Net has no cross-attention, so it cannot use a context: call it without one")
        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = (rearrange(to(pixels), "b n (heads d) -> b heads n d", heads=self.heads) for to in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v, (B, heads, HW, d)
        seen = self.out(rearrange(seen, "b heads n d -> b n (heads d)"))
        return x + rearrange(seen, "b (h w) c -> b c h w", h=x.shape[2])


class Up(nn.Sequential):
    """(B, C, h, w) -> (B, C, 2 h, 2 w), or what height and width say: 7 pixels were halved to 4, and these double to 8."""

    def __init__(self, width: int):
        super().__init__(nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        double, conv = self
        return conv(double(x)[:, :, :height, :width])


class Block(nn.Module):
    """One entry of the U-Net's lists: a residual block, attention, a convolution that resizes; each where there is one."""

    def __init__(self, res: nn.Module | None = None, attn: nn.Module | None = None, conv: nn.Module | None = None):
        super().__init__()
        self.res, self.attn, self.conv = res, attn, conv

    def forward(self, x: Tensor, time: Tensor | None = None, context: Tensor | None = None, size: tuple = ()) -> Tensor:
        x = x if self.res is None else self.res(x, time)
        x = x if self.attn is None else self.attn(x, context)
        return x if self.conv is None else self.conv(x, *size)


class UNet(nn.Module):
    """x_t (B, in_channels, H, W), t (B,) -> its noise, or v (`v_to_noise`), (B, out_channels, H, W) (DDPM, appendix B).

    widths: the channels of each level, half as high and wide as the one before (rounded up); blocks: residual blocks in
    each; attention: a flag for each (the middle always has it). groups=1, because each group's mean is taken away: with 32
    groups on 32 channels that is the colour of the picture (docs/results.md).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        widths: Sequence[int] = (32, 64, 128, 128),
        blocks: int = 1,
        attention: Sequence[bool] = (False, False, True, False),
        heads: int = 2,
        groups: int = 1,
        context_width: int | None = None,
        attention_block: type[nn.Module] = SelfAttention,
    ):
        super().__init__()
        self.config = {  # UNet(**config) is this network again
            "in_channels": in_channels,
            "out_channels": out_channels,
            "widths": list(widths),
            "blocks": blocks,
            "attention": list(attention),
            "heads": heads,
            "groups": groups,
            "context_width": context_width,
        }
        if len(attention) != len(widths):
            raise ValueError(f"expected an attention flag for each of the {len(widths)} levels, got {len(attention)}")
        time_width = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], time_width), nn.SiLU(), nn.Linear(time_width, time_width))

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, time_width, groups)

        def attn(channels: int, wanted: bool = True) -> nn.Module | None:
            return attention_block(channels, heads, groups, context_width) if wanted else None

        width = widths[0]
        self.down = nn.ModuleList([Block(conv=nn.Conv2d(in_channels, width, 3, padding=1))])
        skips = [width]
        for level, wide in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Block(res(width, wide), attn(wide, attention[level])))
                width = wide
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Block(conv=nn.Conv2d(width, width, 3, stride=2, padding=1)))
                skips.append(width)

        self.mid = nn.ModuleList([Block(res(width, width), attn(width)), Block(res(width, width))])

        self.up = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                conv = Up(wide) if i == blocks and level > 0 else None
                self.up.append(Block(res(width + skips.pop(), wide), attn(wide, attention[level]), conv))
                width = wide

        self.norm = nn.GroupNorm(groups, width)
        self.conv = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        time = self.time(sinusoid(t, self.time[0].in_features).to(x.dtype))  # (B, 4 widths[0])
        skips = []
        for block in self.down:
            x = block(x, time, context)
            skips.append(x)
        for block in self.mid:
            x = block(x, time, context)
        for block in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, time, context, size=skips[-1].shape[2:] if skips else ())
        x = F.silu(self.norm(x))
        with torch.autocast(x.device.type, enabled=False):  # an answer rounded to 8 bits would be too coarse for the sampler
            return self.conv(x.to(self.conv.weight.dtype))
