"""The network against diffusers' UNet2DModel with the same weights, and against closed forms."""

import pytest
import torch
from diffusers import UNet2DModel

from unet import ResBlock, SelfAttention, UNet, timestep_embedding

SMALL = {"channels": (16, 32, 32), "attention_levels": (False, True, True), "heads": 4, "groups": 8}
RES = {"t_proj": "time_emb_proj", "shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def judge_for(config):
    attention, channels = config["attention_levels"], config["channels"]
    return UNet2DModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=tuple(channels),
        layers_per_block=config["num_res_blocks"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=channels[-1] // config["heads"],
        norm_num_groups=config["groups"],
        norm_eps=1e-5,
    )


def pair(**config):
    """Ours with random weights, and diffusers' with the same: part by part, in their order."""
    ours = UNet(**config).double()
    theirs, generator = judge_for(ours.config).double(), torch.Generator().manual_seed(0)
    for w in ours.parameters():
        random = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        w.data = 0.5 + 0.2 * random if w.ndim == 1 else random / w[0].numel() ** 0.5
    for w in theirs.parameters():
        w.data.fill_(torch.nan)  # whatever gets no weight shows

    def copy(mine, other, names):
        parts = [(*name.rpartition("."), w) for name, w in mine.state_dict().items()]
        state = {f"{names.get(part, part)}.{kind}".lstrip("."): w for part, _, kind, w in parts}
        other.load_state_dict(state)

    stages = [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]
    blocks = [*ours.down, *ours.mid, *ours.up]
    for kind, lists, names in (
        ("res", ["resnets"], RES),
        ("attn", ["attentions"], ATTENTION),
        ("resample", ["downsamplers", "upsamplers"], {"": "conv"}),
    ):
        mine = [getattr(block, kind) for block in blocks if getattr(block, kind) is not None]
        other = [part for s in stages for name in lists for part in getattr(s, name, None) or []]
        for one, judge in zip(mine, other, strict=True):
            copy(one, judge, names)
    copy(ours.t_mlp, theirs.time_embedding, {"0": "linear_1", "2": "linear_2"})
    for name, other in {
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }.items():
        copy(getattr(ours, name), getattr(theirs, other), {})
    return ours, theirs


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize(
    "config",
    [
        {},  # the default toy
        SMALL,
        SMALL | {"in_channels": 1, "out_channels": 6, "num_res_blocks": 2},
        SMALL | {"channels": (16, 16), "attention_levels": (True, False), "heads": 1},
        SMALL | {"channels": (16,), "attention_levels": (True,), "num_res_blocks": 3},
    ],
)
@torch.no_grad()
def test_equals_diffusers(config, size):
    ours, theirs = pair(**config)
    x, t = torch.randn(2, ours.config["in_channels"], *size).double(), torch.tensor([3, 870])
    expected = theirs(x, t).sample
    assert (ours(x, t) - expected).abs().max() < 1e-9 * expected.abs().max()
    for i in range(2):  # an image alone gives the same
        torch.testing.assert_close(ours(x[i : i + 1], t[i : i + 1])[0], ours(x, t)[i])


def test_the_timestep_embedding_is_its_formula_cosines_first():
    waves = timestep_embedding(torch.tensor([0, 1, 700]), 6)
    for row, t in zip(waves, (0, 1, 700), strict=True):
        angles = torch.tensor([t / 10_000 ** (i / 3) for i in range(3)], dtype=torch.float64)
        expected = torch.cat([angles.cos(), angles.sin()])
        torch.testing.assert_close(row.double(), expected, atol=1e-4, rtol=0)


def test_at_first_each_block_passes_its_input_on_and_the_network_ignores_it():
    x, t = torch.randn(2, 8, 5, 5), torch.randn(2, 16)
    for block in (ResBlock(8, 8, 16, groups=4), SelfAttention(8, heads=2, groups=4)):
        added = block(x, t) - x if isinstance(block, ResBlock) else block(x) - x
        assert added.std((0, 2, 3)).max() < 1e-6  # a bias at most
    network = UNet(**SMALL)
    assert network(torch.randn(2, 3, 16, 16), torch.tensor([1, 500])).std((0, 2, 3)).max() == 0
    zeros = {name for name, w in network.named_parameters() if w.ndim > 1 and not w.any()}
    ends = ("conv2.weight", "attn.out.weight", "conv_out.weight")
    assert zeros == {name for name, _ in network.named_parameters() if name.endswith(ends)}


def test_the_configuration_rebuilds_the_network():
    network = UNet(1, 2, (8, 16), 2, (True, False), 4, 8)
    again = UNet(**network.config)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config and network.config["channels"] == [8, 16]
    toy = (3, 3, [32, 64, 128, 128], 1, [False, False, True, False], 2, 1)
    assert tuple(UNet().config.values()) == toy


@pytest.mark.parametrize("size", [(28, 28), (7, 30), (1, 2)])
def test_any_size_works(size):
    """28 -> 14 -> 7 -> 4 pixels, and back: doubled, and cropped to what they came from."""
    assert UNet()(torch.randn(1, 3, *size), torch.tensor([5])).shape == (1, 3, *size)


def test_attention_is_whatever_the_caller_builds_and_gets_the_context():
    class Sum(torch.nn.Module):
        def __init__(self, channels, heads, groups):
            super().__init__()
            made.append((channels, heads, groups))

        def forward(self, x, context=None):
            return x if context is None else x + context

    made, x, t = [], torch.randn(1, 3, 8, 8), torch.tensor([5])
    network = UNet(**SMALL, attention_block=Sum)
    torch.nn.init.normal_(network.conv_out.weight)
    assert made == [(32, 4, 8)] * 7  # down, middle, up: only where they are asked for
    assert not torch.allclose(network(x, t, torch.ones(1)), network(x, t))
    with pytest.raises(ValueError, match="expected no context"):
        UNet(**SMALL)(x, t, torch.randn(1, 7, 16))
    with pytest.raises(ValueError, match="expected 2 attention_levels"):
        UNet(channels=(16, 32))


def test_a_block_without_time_and_with_another_eps():
    block = ResBlock(8, 16, None, groups=4, eps=1e-6)
    assert block(torch.randn(1, 8, 4, 4)).shape == (1, 16, 4, 4) and block.t_proj is None
    assert block.norm1.eps == block.norm2.eps == SelfAttention(8, 2, 4, 1e-6).norm.eps == 1e-6


def test_the_last_convolution_stays_float32():
    network = UNet(**SMALL)
    torch.nn.init.normal_(network.conv_out.weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert out.dtype == torch.float32 and (out != out.bfloat16().float()).any()
    out = network.bfloat16()(torch.randn(1, 3, 8, 8).bfloat16(), torch.tensor([5]))
    assert out.dtype == torch.bfloat16  # a network that is 16 bits wide itself works, too
