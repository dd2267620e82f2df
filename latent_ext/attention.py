"""Cross-attention: how an image looks at a text. This is Stable Diffusion's transformer block.

    attention = functools.partial(SpatialTransformer, context_width=768)
    UNet(..., attention_block=attention)(x_t, t, context)

With self-attention (unet.py) every pixel sees every pixel of its image. Here it also sees every
token of the context: a class, an attribute, or the words of a caption.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1): a weighted mean of v for each q.

    q (B, N, width), k and v (B, M, width) -> (B, N, width). causal: token n sees only 0 .. n.
    """
    q, k, v = (rearrange(y, "b n (heads d) -> b heads n d", heads=heads) for y in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, N, d)
    return rearrange(h, "b heads n d -> b n (heads d)")


class Attention(nn.Module):
    """x (B, N, width) reads from context (B, M, context_width) -> (B, N, width).

    With x itself as the context this is self-attention.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected heads that divide the width {width}, got {heads}")
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)  # what a pixel looks for
        self.k = nn.Linear(context_width, width, bias=False)  # what a token offers
        self.v = nn.Linear(context_width, width, bias=False)  # what a pixel then gets
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.out(attend(self.q(x), self.k(context), self.v(context), self.heads))


class FeedForward(nn.Module):
    """(B, N, width) -> the same, token by token. GEGLU (Shazeer 2020): one half gates the other."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 8 * width)  # 4 width for the value, 4 for its gate
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)  # (B, N, 4 width) each
        return self.fc2(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """x (B, C, H, W), context (B, M, context_width) -> (B, C, H, W).

    One transformer layer over the pixels, between two 1x1 convolutions: self-attention,
    cross-attention, feed-forward (Rombach et al. 2022, appendix E.2.1).
    """

    def __init__(self, channels: int, heads: int, groups: int, context_width: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, heads)  # self-attention
        self.attn2 = Attention(channels, context_width, heads)  # cross-attention
        self.ff = FeedForward(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)  # at first the output is (almost) x

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            call = "call predict_noise(x_t, t, context)"
            raise ValueError(f"this U-Net needs a context (a class or a text): {call}")
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y = self.norm1(h)
        h = h + self.attn1(y, y)
        h = h + self.attn2(self.norm2(h), context)
        h = h + self.ff(self.norm3(h))
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))
