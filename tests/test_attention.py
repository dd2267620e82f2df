"""Cross-attention, and the U-Net with it against diffusers' UNet2DConditionModel."""

from functools import partial

import pytest
import torch
from oracles import V15_UNET, error, unet_pair

from latent_ext.attention import FeedForward, SpatialTransformer, attend
from unet import UNet

V15 = {name: value for name, value in V15_UNET.items() if name != "context_width"}
NARROW = V15 | {"channels": (32, 64, 128, 128)}
TOY = {"channels": (16, 32, 32), "attention_levels": (True, True, True), "heads": 4}
SMALL = {"channels": (16, 32), "attention_levels": (True, False), "num_res_blocks": 3, "groups": 8}


def make(config, context_width):
    return UNet(**config, attention_block=partial(SpatialTransformer, context_width=context_width))


def inputs(config, context_width, height, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config["in_channels"], height, width, generator=generator, dtype=dtype)
    context = torch.randn(2, 7, context_width, generator=generator, dtype=dtype)
    return x, torch.tensor([3, 870]), context


@pytest.mark.parametrize("config", [NARROW, NARROW | {"in_channels": 9}, TOY, SMALL])
@torch.no_grad()
def test_the_unet_equals_diffusers(config):
    """In float64, with random numbers in every parameter."""
    ours, theirs = unet_pair(make(config, 12).double())
    for size in ((16, 16), (8, 24), (9, 14), (5, 1)):  # odd sizes are halved with a rest
        x, t, context = inputs(ours.config, 12, *size)
        assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-9


@pytest.mark.parametrize(("in_channels", "count"), [(4, 859_520_964), (9, 859_535_364)])
def test_by_its_arguments_alone_the_toy_is_stable_diffusions(in_channels, count):
    with torch.device("meta"):
        net = make(V15 | {"in_channels": in_channels}, 768)
    assert sum(p.numel() for p in net.parameters()) == count and len(net.state_dict()) == 686


@pytest.mark.slow
@torch.no_grad()
def test_the_unet_equals_diffusers_at_full_width():
    """859,520,964 parameters, shared by both networks."""
    with torch.device("meta"):
        ours, theirs = unet_pair(make(V15, 768).to_empty(device="cpu"))
    x, t, context = (y[:1] for y in inputs(V15, 768, 16, 16, torch.float32))
    assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_weighted_mean_in_each_head(causal):
    """softmax(q k / sqrt(d)) v once more, one query at a time."""
    q, k, v = torch.randn(3, 2, 5, 8, dtype=torch.float64)  # batch 2, 5 tokens, width 8
    expected = torch.zeros_like(q)
    for image in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            for i in range(5):
                seen = range(i + 1 if causal else 5)
                scores = [q[image, i, head] @ k[image, j, head] / 4**0.5 for j in seen]
                weights = torch.stack(scores).softmax(0)
                expected[image, i, head] = sum(weights[j] * v[image, j, head] for j in seen)
    torch.testing.assert_close(attend(q, k, v, 2, causal), expected)


def test_one_half_of_the_feed_forward_gates_the_other():
    """A gate far above 0 lets the values pass, one far below does not."""
    ff, x = FeedForward(2).double(), torch.randn(1, 3, 2, dtype=torch.float64)
    value = ff.fc1(x)[..., :8]
    ff.fc1.weight.data[8:] = 0
    for gate, factor in ((50.0, 50.0), (-50.0, 0.0)):
        ff.fc1.bias.data[8:] = gate
        torch.testing.assert_close(ff(x), ff.fc2(factor * value))


def test_each_image_reads_its_own_context_and_needs_one():
    net, _ = unet_pair(make(TOY, 12).double())
    x, t, context = inputs(net.config, 12, 8, 8)
    other = context.clone()
    other[1] += 1
    with torch.no_grad():
        changed = (net(x, t, other) - net(x, t, context)).abs().amax((1, 2, 3))
    assert changed[0] < 1e-12 < 1e-6 < changed[1]
    with pytest.raises(ValueError, match="expected a context"):
        net(x, t)


def test_a_new_block_changes_next_to_nothing_and_all_of_it_learns():
    torch.manual_seed(0)
    block, x, context = (
        SpatialTransformer(8, 2, 4, 5),
        torch.randn(2, 8, 4, 4),
        torch.randn(2, 3, 5),
    )
    change = block(x, context) - x
    assert change.std((0, 2, 3)).max() < 1e-6  # the bias of proj_out, whatever x
    torch.nn.init.normal_(block.proj_out.weight)
    block(x, context).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.parameters())
