"""The network against diffusers' UNet2DModel with the same weights, and against closed forms."""

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from oracles import randomise

from latent_ext.weight_names import DIFFUSERS, name_pairs
from unet import ResBlock, SelfAttention, UNet, timestep_embedding

SMALL = {"channels": (16, 32, 32), "attention_levels": (False, True, True), "heads": 4, "groups": 8}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def judge_for(config):
    """diffusers' network by the numbers that a model file has, too."""
    attention = config["attention_levels"]
    network = UNet2DModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=config["channels"],
        layers_per_block=config["num_res_blocks"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=1,
        norm_num_groups=config["groups"],
        norm_eps=1e-5,
    )
    for part in network.modules():  # diffusers has one width of a head for all levels
        if isinstance(part, Attention):
            part.heads = config["heads"]
    return network


def pair(**config):
    """Ours with random weights, and diffusers' with the same."""
    ours = randomise(UNet(**config).double())
    weights = {}
    for name, own in name_pairs("unet", ours, DIFFUSERS):
        if ".attentions." in name:  # named like the extension's: here it is a simpler one
            block, layer, parameter = name.rsplit(".", 2)
            name = f"{block}.{ATTENTION[layer]}.{parameter}"
        weights[name] = ours.state_dict()[own]
    theirs = judge_for(ours.config).double()
    theirs.load_state_dict(weights)
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
    for y in (ResBlock(8, 8, 16, groups=4)(x, t), SelfAttention(8, heads=2, groups=4)(x)):
        assert (y - x).std((0, 2, 3)).max() < 1e-6  # a bias at most is added
    network = UNet(**SMALL)
    assert network(torch.randn(2, 3, 16, 16), torch.tensor([1, 500])).std((0, 2, 3)).max() == 0


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


def test_the_last_convolution_stays_float32():
    network = UNet(**SMALL)
    torch.nn.init.normal_(network.conv_out.weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert out.dtype == torch.float32 and (out != out.bfloat16().float()).any()
    out = network.bfloat16()(torch.randn(1, 3, 8, 8).bfloat16(), torch.tensor([5]))
    assert out.dtype == torch.bfloat16  # a network that is 16 bits wide itself works, too
