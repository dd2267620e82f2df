"""The autoencoder against diffusers' AutoencoderKL with the same weights, and what its latents have to be."""

import pytest
import torch
import torch.nn.functional as F
from oracles import V15_VAE, error, vae_pair
from torch.distributions import Normal, kl_divergence

from latent_ext.vae import VAE, down, kl

V15 = V15_VAE | {"widths": (32, 64, 64, 64)}  # its structure, narrow
SMALL = {"widths": (8, 16), "groups": 4}


def make(config):
    return vae_pair(VAE(**config).double())


def picture(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@torch.no_grad()
def differences(ours, theirs, size=(16, 24)):
    """Of mean, logvar, the picture decoded from the mean."""
    x = picture(2, ours.config["channels"], *size)
    mean, logvar = ours.encode(x)
    latent = theirs.encode(x).latent_dist
    decoded = theirs.decode(latent.mean).sample
    return [error(mean, latent.mean), error(logvar, latent.logvar), error(ours.decode(latent.mean), decoded)]


@pytest.mark.parametrize(
    "config",
    [V15, {}, SMALL | {"channels": 1, "latent_channels": 2, "blocks": 3}, {"widths": (8,)}],
    ids=["v1.5 narrow", "toy", "grey", "one level"],
)
def test_equals_diffusers(config):
    assert max(differences(*make(config))) < 1e-9


def swap(module, a, b):
    one, other = getattr(module, a), getattr(module, b)
    setattr(module, a, other), setattr(module, b, one)


def swap_mean_and_logvar(net):
    for parameter in net.quant.parameters():
        parameter.data = parameter.data.roll(net.config["latent_channels"], 0)


MISTAKES = {  # each in one place only
    "eps of a residual block": lambda net: setattr(net.encoder.down[1].res.norm1, "eps", 1e-5),
    "eps of attention": lambda net: setattr(net.decoder.mid[0].attn.norm, "eps", 1e-5),
    "eps at the end": lambda net: setattr(net.decoder.norm, "eps", 1e-5),
    "zeros all around": lambda net: setattr(net.encoder.down[2].conv[0], "padding", (1, 1, 1, 1)),
    "mean and logvar swapped": swap_mean_and_logvar,
    "norms swapped": lambda net: swap(net.decoder.up[1].res, "norm1", "norm2"),
    "queries and values swapped": lambda net: swap(net.encoder.mid[0].attn, "q", "v"),
    "two heads": lambda net: setattr(net.encoder.mid[0].attn, "heads", 2),
    "bilinear instead of nearest": lambda net: setattr(net.decoder.up[1].conv[0], "mode", "bilinear"),
    "a convolution of the latents forgotten": lambda net: setattr(net, "post_quant", torch.nn.Identity()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    """Each mistake, put in, is far above the tolerance of 1e-9."""
    ours, theirs = make(SMALL)
    MISTAKES[mistake](ours)
    assert max(differences(ours, theirs)) > 1e-8


def test_by_its_arguments_alone_it_is_stable_diffusions():
    with torch.device("meta"):
        vae = VAE(**V15_VAE)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863 and len(vae.state_dict()) == 248
    assert vae.factor == 8 and vae.scale == 0.18215


@pytest.mark.slow
def test_equals_diffusers_at_full_width():
    with torch.device("meta"):
        ours = VAE(**V15_VAE)
    with torch.device("meta"):
        ours, theirs = vae_pair(ours.to_empty(device="cpu"))
    x = picture(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        mean, _ = ours.encode(x)
        assert error(mean, theirs.encode(x).latent_dist.mean) < 1e-4
        assert error(ours.decode(mean), theirs.decode(mean).sample) < 1e-4


# ---- its parts ------------------------------------------------------------------------------------------------------


def test_halving_adds_zeros_right_and_below_only():
    """A kernel that copies its first number takes rows and columns 0, 2, 4; one that copies its last takes 2, 4, zeros."""
    x = picture(1, 1, 6, 6)
    half = down(1).double()
    half[1].bias.data.zero_()
    for corner, expected in ((0, x), (2, F.pad(x, (0, 2, 0, 2))[:, :, 2:, 2:])):
        half[1].weight.data.zero_()[0, 0, corner, corner] = 1
        torch.testing.assert_close(half(x), expected[:, :, ::2, ::2])


def test_logvar_is_kept_in_its_range():
    ours, theirs = make(SMALL)
    with torch.no_grad():
        ours.quant.weight *= 1e4
        theirs.quant_conv.weight *= 1e4
        mean, logvar = ours.encode(picture(2, 3, 8, 8))
    assert logvar.min() == -30 and logvar.max() == 20 and mean.abs().max() > 30
    assert max(differences(ours, theirs)) < 1e-9  # diffusers' range is the same


def test_a_latent_is_drawn_with_mean_and_spread():
    vae, _ = make(SMALL)
    x, noise = picture(2, 3, 8, 8), picture(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(vae(x, 0 * noise)[0], vae.decode(vae.encode(x)[0]))
        vae.decode = lambda z: z
        z, mean, logvar = vae(x, noise)
    torch.testing.assert_close(z, Normal(mean, logvar.exp().sqrt()).icdf(Normal(0.0, 1.0).cdf(noise)))


def test_kl_is_the_divergence_from_the_standard_normal_distribution():
    mean, logvar = picture(2, 3, 4, 5, 5)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
    assert kl(mean, logvar).item() == pytest.approx(expected.mean().item(), rel=1e-12)
    assert kl(torch.zeros(3), torch.zeros(3)) == 0


def test_an_image_alone_gives_the_same_as_in_a_batch():
    vae, _ = make(SMALL)
    x = picture(3, 3, 8, 8)
    noise = picture(3, 4, 4, 4)
    with torch.no_grad():
        together = vae(x, noise)
        for i in range(3):
            for alone, batch in zip(vae(x[i : i + 1], noise[i : i + 1]), together, strict=True):
                torch.testing.assert_close(alone[0], batch[i], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("widths", "factor"), [((8,), 1), ((8, 8), 2), ((8, 8, 8), 4), ((8, 8, 8, 8), 8)])
def test_each_level_but_the_last_halves(widths, factor):
    vae = VAE(widths=widths)
    mean, logvar = vae.encode(torch.randn(1, 3, 16, 24))
    assert vae.factor == factor and mean.shape == logvar.shape == (1, 4, 16 // factor, 24 // factor)
    assert vae.decode(mean).shape == (1, 3, 16, 24)


@pytest.mark.parametrize("size", [(17, 16), (16, 18)])
def test_other_sizes_get_one_sentence(size):
    with pytest.raises(ValueError, match=f"a picture of {size[0]}x{size[1]}: expected multiples of 4"):
        VAE()(torch.randn(1, 3, *size), torch.randn(1, 4, 4, 4))


def test_the_scale_is_only_stored_and_config_rebuilds_the_network():
    vae = VAE(**SMALL, scale=0.2)
    again = VAE(**vae.config)
    again.load_state_dict(vae.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert vae.scale == 0.2 and again.scale == 1.0 and again.config == vae.config
    assert torch.equal(vae.encode(x)[0], again.encode(x)[0])


def test_everything_learns_and_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    vae = VAE(**SMALL)
    x = F.interpolate(torch.randn(8, 3, 4, 4), scale_factor=4.0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        y, mean, logvar = vae(x, torch.randn(8, 4, 8, 8))
        loss = F.mse_loss(y, x) + 1e-6 * kl(mean, logvar)
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # the zeros at the ends of the blocks hold gradients back for one step
            for name, p in vae.named_parameters():
                assert p.grad.abs().max() > 0 or name.endswith("k.bias"), name  # softmax does not feel a constant of all keys
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
