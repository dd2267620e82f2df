"""The network against diffusers' UNet2DModel with the same weights, and what every part of it has to be able to do."""

import pytest
import torch
from diffusers import UNet2DModel

from unet import ResBlock, SelfAttention, UNet, sinusoid

SMALL = {"widths": (16, 32, 32), "blocks": 1, "attention": (False, True, True), "heads": 4, "groups": 8}


def judge_for(config):
    attention, widths = config["attention"], config["widths"]
    return UNet2DModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=tuple(widths),
        layers_per_block=config["blocks"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=widths[-1] // config["heads"],
        norm_num_groups=config["groups"],
        norm_eps=1e-5,
    )


def to_their_names(name, blocks, levels):
    """down.5.res.conv1.weight -> down_blocks.2.resnets.0.conv1.weight, derived from how both networks are laid out."""
    part, _, rest = name.partition(".")
    group = blocks + 1
    if part in ("norm", "conv"):
        return f"conv_{'norm_' if part == 'norm' else ''}out.{rest}"
    if part == "time":
        return "time_embedding." + {"0": "linear_1", "2": "linear_2"}[rest[0]] + rest[1:]
    index, kind, rest = rest.split(".", 2)
    k = int(index)
    rest = rest.replace("time.", "time_emb_proj.").replace("skip.", "conv_shortcut.")
    if kind == "attn":
        for ours, theirs in {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}.items():
            rest = theirs + rest[len(ours) :] if rest.split(".")[0] == ours else rest
    plural = {"res": "resnets", "attn": "attentions"}.get(kind)
    if part == "mid":
        return f"mid_block.{plural}.{k if kind == 'res' else 0}.{rest}"
    if part == "down":
        if k == 0:
            return f"conv_in.{rest}"
        level, j = divmod(k - 1, group)
        return f"down_blocks.{level}.{plural}.{j}.{rest}" if plural else f"down_blocks.{level}.downsamplers.0.conv.{rest}"
    level, j = divmod(k, group)
    return (
        f"up_blocks.{level}.{plural}.{j}.{rest}" if plural else f"up_blocks.{level}.upsamplers.0.conv.{rest.removeprefix('1.')}"
    )


def same_weights(ours, theirs):
    """Random numbers for every parameter: with norms at their initial 1 and 0, a swapped pair of them would not show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        numbers = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data = 0.5 + 0.2 * numbers if parameter.ndim == 1 else numbers / parameter[0].numel() ** 0.5
    names = {
        to_their_names(name, ours.config["blocks"], len(ours.config["widths"])): w for name, w in ours.state_dict().items()
    }
    theirs.load_state_dict(names)  # strict: nothing is missing, nothing is left over


def pair(**config):
    ours = UNet(**config).double()
    theirs = judge_for(ours.config).double()
    same_weights(ours, theirs)
    return ours, theirs


def difference(ours, theirs, size=(16, 16)):
    x = torch.randn(2, ours.config["in_channels"], *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 870])
    with torch.no_grad():
        expected = theirs(x, t).sample
        return ((ours(x, t) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "config",
    [
        {},  # the default toy
        SMALL,
        SMALL | {"in_channels": 1, "out_channels": 1, "blocks": 2},
        SMALL | {"in_channels": 4, "out_channels": 8, "widths": (16, 32), "attention": (False, False)},
        SMALL | {"widths": (16, 16, 32, 32), "attention": (False, False, True, False), "heads": 1, "blocks": 3},
        SMALL | {"widths": (16,), "attention": (True,)},
    ],
    ids=["default", "small", "grey", "two levels", "four levels", "one level"],
)
def test_equals_diffusers(config):
    ours, theirs = pair(**config)
    assert difference(ours, theirs) < 1e-9
    if len(ours.config["widths"]) < 4:
        assert difference(ours, theirs, size=(8, 20)) < 1e-9  # not square


def test_the_comparison_notices_small_mistakes():
    """Each classic mistake, put in, is far above the tolerance of the test above."""

    def swap(a, b):
        a.data, b.data = b.data.clone(), a.data.clone()

    mistakes = {
        "eps of a residual block": lambda net: setattr(net.down[1].res.norm1, "eps", 1e-6),
        "eps of attention": lambda net: setattr(net.mid[0].attn.norm, "eps", 1e-6),
        "eps at the end": lambda net: setattr(net.norm, "eps", 1e-6),
        "norms swapped": lambda net: swap(net.mid[1].res.norm1.weight, net.mid[1].res.norm2.weight),
        "queries and keys swapped": lambda net: swap(net.mid[0].attn.q.bias, net.mid[0].attn.k.bias),
        "number of heads": lambda net: setattr(net.mid[0].attn, "heads", 2),
        "bilinear instead of nearest": lambda net: setattr(net.up[1].conv[0], "mode", "bilinear"),
        "time enters before its SiLU": lambda net: setattr(net, "time", net.time[:1]),
        "last attention forgotten": lambda net: setattr(net.up[0], "attn", None),
    }
    for name, mistake in mistakes.items():
        ours, theirs = pair(**SMALL)
        mistake(ours)
        assert difference(ours, theirs) > 1e-8, name  # the tolerance above is 1e-9


def test_sinusoid_is_the_formula_cosines_first():
    waves = sinusoid(torch.tensor([0, 1, 700]), 6)
    for row, t in zip(waves, (0, 1, 700), strict=True):
        angles = torch.tensor([t / 10_000 ** (i / 3) for i in range(3)], dtype=torch.float64)
        torch.testing.assert_close(row.double(), torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=0)


def test_an_image_alone_gives_the_same_as_in_a_batch():
    """Attention that runs over the batch, or a norm that mixes its images, would show here."""
    ours, _ = pair(**SMALL)
    x, t = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        together = ours(x, t)
        for i in range(4):
            torch.testing.assert_close(ours(x[i : i + 1], t[i : i + 1])[0], together[i], atol=1e-10, rtol=1e-10)


def test_every_pixel_reaches_every_pixel_and_no_other_image():
    attention = SelfAttention(8, heads=2, groups=4).double()
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    # d out[0, :, pixel] / d x: nonzero at each pixel of image 0. The norm alone also mixes pixels, so it is taken out.
    attention.norm = torch.nn.Identity()
    reach = torch.autograd.functional.jacobian(lambda x: attention(x)[0].sum(0), x).abs()  # (3, 5, 2, 8, 3, 5)
    assert (reach[:, :, 0].sum(2) > 0).all() and not reach[:, :, 1].any()


def test_attention_is_a_weighted_mean_over_pixels():
    """The formula once more, one head and one pixel at a time: softmax(q k / sqrt(d)) v."""
    attention = SelfAttention(8, heads=2, groups=4).double()
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    pixels = attention.norm(x).flatten(2)[0].T  # (6, 8)
    q, k, v = (linear(pixels) for linear in (attention.q, attention.k, attention.v))
    seen = torch.zeros(6, 8, dtype=torch.float64)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(6):
            weights = torch.stack([q[i, head] @ k[j, head] / 4**0.5 for j in range(6)]).softmax(0)
            seen[i, head] = sum(weights[j] * v[j, head] for j in range(6))
    expected = x + attention.out(seen).T.reshape(1, 8, 2, 3)
    torch.testing.assert_close(attention(x), expected)


def test_everything_learns_and_the_start_knows_nothing():
    net = UNet(**SMALL)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 500])
    assert net(x, t).std((0, 2, 3)).max() == 0  # one number for each channel, whatever x
    for p in net.parameters():  # the zeros at the ends of blocks hold gradients back for one step
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    net(x, t).square().sum().backward()
    for name, p in net.named_parameters():
        if not name.endswith("k.bias"):  # softmax does not feel a constant added to all keys
            assert p.grad.abs().max() > 0, name


def test_config_rebuilds_the_network():
    net = UNet(**SMALL)
    again = UNet(**net.config)
    again.load_state_dict(net.state_dict())
    assert again.config == net.config


@pytest.mark.parametrize("size", [(28, 28), (7, 30), (1, 2)])
def test_any_size_works(size):
    """28 -> 14 -> 7 -> 4 pixels, and back: doubled, and cropped to what they came from."""
    assert UNet()(torch.randn(1, 3, *size), torch.tensor([5])).shape == (1, 3, *size)


def test_an_attention_flag_for_each_level_is_needed():
    with pytest.raises(ValueError, match="an attention flag for each of the 2 levels, got 4"):
        UNet(widths=(16, 32))


def test_a_context_that_cannot_be_used_is_an_error():
    with pytest.raises(ValueError, match="no cross-attention"):
        UNet(**SMALL)(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 7, 16))


def test_a_block_without_time():
    block = ResBlock(8, 16, None, groups=4, eps=1e-6)
    assert block(torch.randn(1, 8, 4, 4)).shape == (1, 16, 4, 4) and block.norm1.eps == block.norm2.eps == 1e-6


def test_the_last_convolution_stays_float32():
    net = UNet(**SMALL)
    torch.nn.init.normal_(net.conv.weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert out.dtype == torch.float32 and (out != out.bfloat16().float()).any()
