"""The autoencoder against diffusers' AutoencoderKL, and what its latents have to be."""

import pytest
import torch
from oracles import V15_VAE, error, pair, randomise

from latent_ext.vae import VAE, kl_divergence

SMALL = {"channels": (8, 16), "groups": 4}
GREY = SMALL | {"in_channels": 1, "latent_channels": 2, "num_res_blocks": 3}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def difference(ours, theirs, x):
    """The largest of mean, logvar, and the image decoded from the mean."""
    mean, logvar = ours.encode(x)
    expected = theirs.encode(x).latent_dist
    decoded = error(ours.decode(expected.mean), theirs.decode(expected.mean).sample)
    return max(error(mean, expected.mean), error(logvar, expected.logvar), decoded)


@pytest.mark.parametrize(
    ("config", "downsampling"),
    [(V15_VAE | {"channels": (32, 64, 64, 64)}, 8), ({}, 4), (GREY, 2), ({"channels": (8,)}, 1)],
)
def test_it_equals_diffusers(config, downsampling):
    ours, theirs = pair(VAE(**config).double())
    assert difference(ours, theirs, images(2, ours.config["in_channels"], 16, 24)) < 1e-9
    assert ours.downsampling == downsampling


@pytest.mark.slow
def test_it_equals_diffusers_at_full_width():
    ours, theirs = pair(VAE(**V15_VAE))
    assert difference(ours, theirs, images(1, 3, 64, 64).float()) < 1e-4


def test_logvar_starts_with_little_noise_and_is_clamped_as_in_diffusers():
    bias = VAE(**SMALL).quant.bias
    assert (bias[4:] == -6).all() and bias[:4].abs().max() < 1
    ours, theirs = pair(VAE(**SMALL).double())
    with torch.no_grad():
        ours.quant.weight *= 1e4  # and theirs: it is the same
        mean, logvar = ours.encode(images(2, 3, 8, 8))
    assert logvar.min() == -30 and logvar.max() == 20 and mean.abs().max() > 30
    assert difference(ours, theirs, images(2, 3, 8, 8)) < 1e-9


def test_latents_are_drawn_with_mean_and_standard_deviation_and_all_of_it_learns():
    vae = randomise(VAE(**SMALL).double())
    x, noise = images(2, 3, 8, 8), images(2, 4, 4, 4)
    reconstruction, mean, logvar = vae(x, noise)
    torch.testing.assert_close(torch.cat([mean, logvar]), torch.cat(vae.encode(x)))
    torch.testing.assert_close(reconstruction, vae.decode(mean + logvar.exp().sqrt() * noise))
    (reconstruction.square().sum() + kl_divergence(mean, logvar)).backward()
    for name, p in vae.named_parameters():
        assert p.grad.abs().max() > 1e-12 or name.endswith("k.bias"), name  # softmax ignores it


@pytest.mark.parametrize("size", [(17, 16), (16, 18)])
def test_other_sizes_are_refused(size):
    told = "image of {}x{}: height and width must be multiples of 4".format(*size)
    with pytest.raises(ValueError, match=told):
        VAE().encode(torch.randn(1, 3, *size))
