"""Cross-attention: how a picture looks at a text. This is Stable Diffusion's transformer block, which `UNet` takes as its own.

    UNet(..., context_width=768, attention_block=SpatialTransformer)(x_t, t, context)

The core's self-attention lets every pixel look at every pixel. Here each pixel then also looks at every token of the
context, whatever that is: a class, an attribute, the words of a caption.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """x (B, N, width) looks at context (B, M, context_width), and takes over what fits: (B, N, width).

    softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1). With the context x itself this is self-attention.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)  # what do I look for?
        self.k = nn.Linear(context_width, width, bias=False)  # what is to be found here?
        self.v = nn.Linear(context_width, width, bias=False)  # what does one get here?
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rearrange(to(y), "b n (heads d) -> b heads n d", heads=self.heads)
            for to, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        seen = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.out(rearrange(seen, "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """(B, N, width) -> the same, each token alone: one half of the hidden numbers gates the other (Shazeer 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.hidden(x).chunk(2, dim=-1)  # (B, N, 4 width) each
        return self.out(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """(B, C, H, W), context (B, M, context_width) -> (B, C, H, W): pixels look at pixels, then at the context, then think.

    Rombach et al. 2022, appendix E.2.1. One transformer layer between two 1x1 convolutions; the input is added.
    """

    def __init__(self, channels: int, heads: int, groups: int, context_width: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, heads)
        self.attn2 = Attention(channels, context_width, heads)
        self.ff = GEGLU(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)  # begins as (almost) "change nothing", as the residual blocks do

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            raise ValueError("this U-Net looks at a context (a class, a text): call it with one, predict_noise(x, t, context)")
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y = self.norm1(h)
        h = h + self.attn1(y, y)
        h = h + self.attn2(self.norm2(h), context)
        h = h + self.ff(self.norm3(h))
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))
