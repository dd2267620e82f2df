"""Cross-attention: the U-Net with it against diffusers' UNet2DConditionModel."""

import pytest
import torch
from oracles import V15_UNET, cross_unet, error, pair

from latent_ext.attention import SpatialTransformer

NARROW = V15_UNET | {"channels": (32, 64, 128, 128)}
TOY = {"channels": (16, 32, 32), "attention_levels": (True, True, True), "heads": 4}
SMALL = {"channels": (16, 32), "attention_levels": (True, False), "num_res_blocks": 3, "groups": 8}


def inputs(config, context_width, height, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config["in_channels"], height, width, generator=generator, dtype=dtype)
    context = torch.randn(2, 7, context_width, generator=generator, dtype=dtype)
    return x, torch.tensor([3, 870]), context


@pytest.mark.parametrize("config", [NARROW, NARROW | {"in_channels": 9}, TOY, SMALL])
@torch.no_grad()
def test_the_unet_equals_diffusers(config):
    """In float64, with random numbers in every parameter."""
    ours, theirs = pair(cross_unet(12, **config).double())
    for size in ((16, 16), (8, 24), (9, 14), (5, 1)):  # odd sizes are halved with a rest
        x, t, context = inputs(ours.config, 12, *size)
        assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_the_unet_equals_diffusers_at_full_width():
    """859,520,964 parameters, shared by both networks."""
    with torch.device("meta"):
        ours, theirs = pair(cross_unet(768, **V15_UNET).to_empty(device="cpu"))
    x, t, context = (y[:1] for y in inputs(V15_UNET, 768, 16, 16, torch.float32))
    assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-4


def test_a_new_block_changes_next_to_nothing_and_needs_a_context():
    block, x = SpatialTransformer(8, 2, 4, 5), torch.randn(2, 8, 4, 4)
    change = block(x, torch.ones(2, 3, 5)) - x
    assert change.std((0, 2, 3)).max() < 1e-6  # the bias of proj_out, whatever x
    with pytest.raises(ValueError, match="needs a context"):
        block(x, None)
