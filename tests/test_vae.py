"""The autoencoder against diffusers' AutoencoderKL, and what its latents have to be."""

import pytest
import torch
import torch.nn.functional as F
from oracles import V15_VAE, error, vae_pair
from torch import distributions
from torch.distributions import Normal

from latent_ext.vae import VAE, kl_divergence

SMALL = {"channels": (8, 16), "groups": 4}
GREY = SMALL | {"in_channels": 1, "latent_channels": 2, "num_res_blocks": 3}


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@torch.no_grad()
def difference(ours, theirs, x):
    """The largest of mean, logvar, and the image decoded from the mean."""
    mean, logvar = ours.encode(x)
    expected = theirs.encode(x).latent_dist
    decoded = error(ours.decode(expected.mean), theirs.decode(expected.mean).sample)
    return max(error(mean, expected.mean), error(logvar, expected.logvar), decoded)


@pytest.mark.parametrize(
    "config", [V15_VAE | {"channels": (32, 64, 64, 64)}, {}, GREY, {"channels": (8,)}]
)
def test_it_equals_diffusers(config):
    ours, theirs = vae_pair(VAE(**config).double())
    assert difference(ours, theirs, images(2, ours.config["in_channels"], 16, 24)) < 1e-9


def test_by_its_arguments_alone_it_is_stable_diffusions():
    with torch.device("meta"):
        vae = VAE(**V15_VAE)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863 and len(vae.state_dict()) == 248
    assert vae.downsampling == 8 and vae.scaling_factor == 0.18215


@pytest.mark.slow
def test_it_equals_diffusers_at_full_width():
    with torch.device("meta"):
        ours, theirs = vae_pair(VAE(**V15_VAE).to_empty(device="cpu"))
    assert difference(ours, theirs, images(1, 3, 64, 64, dtype=torch.float32)) < 1e-4


def test_logvar_is_clamped_as_in_diffusers():
    ours, theirs = vae_pair(VAE(**SMALL).double())
    with torch.no_grad():
        ours.quant.weight *= 1e4
        theirs.quant_conv.weight *= 1e4
        mean, logvar = ours.encode(images(2, 3, 8, 8))
    assert logvar.min() == -30 and logvar.max() == 20 and mean.abs().max() > 30
    assert difference(ours, theirs, images(2, 3, 8, 8)) < 1e-9


@torch.no_grad()
def test_latents_are_drawn_with_mean_and_standard_deviation():
    vae = VAE(**SMALL).double()
    x, noise = images(2, 3, 8, 8), images(2, 4, 4, 4)
    reconstruction, mean, logvar = vae(x, noise)
    assert torch.equal(mean, vae.encode(x)[0])
    z = Normal(mean, logvar.exp().sqrt()).icdf(Normal(0.0, 1.0).cdf(noise))
    torch.testing.assert_close(reconstruction, vae.decode(z))


def test_kl_divergence_is_that_of_torch():
    mean, logvar = images(2, 3, 4, 5, 5)
    expected = distributions.kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
    assert kl_divergence(mean, logvar).item() == pytest.approx(expected.mean().item(), rel=1e-12)


@pytest.mark.parametrize(("levels", "downsampling"), [(1, 1), (2, 2), (4, 8)])
def test_each_level_but_the_last_halves(levels, downsampling):
    vae = VAE(channels=[8] * levels)
    mean, logvar = vae.encode(torch.randn(1, 3, 16, 24))
    shape = (1, 4, 16 // downsampling, 24 // downsampling)
    assert vae.downsampling == downsampling and mean.shape == logvar.shape == shape
    assert vae.decode(mean).shape == (1, 3, 16, 24)


@pytest.mark.parametrize("size", [(17, 16), (16, 18)])
def test_other_sizes_are_refused(size):
    with pytest.raises(
        ValueError, match=f"an image of {size[0]}x{size[1]}: expected multiples of 4"
    ):
        VAE().encode(torch.randn(1, 3, *size))


def test_config_rebuilds_the_network_and_the_scaling_factor_is_only_stored():
    vae = VAE(**SMALL, scaling_factor=0.2)
    again = VAE(**vae.config)
    again.load_state_dict(vae.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(vae.encode(x)[0], again.encode(x)[0]) and again.config == vae.config


def test_it_starts_with_little_noise_and_blocks_that_change_nothing_and_learns():
    torch.manual_seed(0)
    vae = VAE(**SMALL)
    zeros = [name for name, p in vae.named_parameters() if name.endswith("weight") and not p.any()]
    assert len(zeros) == 10 + 2  # the last layers of residual blocks and attention
    assert (vae.quant.bias[4:] == -6).all() and vae.quant.bias[:4].abs().max() < 1
    x = F.interpolate(torch.randn(8, 3, 4, 4), scale_factor=4.0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        y, mean, logvar = vae(x, torch.randn(8, 4, 8, 8))
        loss = F.mse_loss(y, x) + 1e-6 * kl_divergence(mean, logvar)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # for one step the zeros hold gradients back
            for name, p in vae.named_parameters():
                assert p.grad.any() or name.endswith("k.bias"), name  # softmax ignores k's bias
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
