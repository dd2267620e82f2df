"""The U-Net with cross-attention against diffusers' UNet2DConditionModel with the same weights, and cross-attention itself."""

import time

import pytest
import torch
import torch.nn.functional as F
from oracles import V15_UNET, error, unet_pair

import unet
from latent_ext.attention import GEGLU, Attention, SpatialTransformer
from unet import UNet

V15 = V15_UNET | {"widths": (32, 64, 128, 128), "context_width": 24}  # its structure, narrow
TOY = {"widths": (16, 32, 32), "attention": (True, True, True), "heads": 4, "context_width": 12}  # one group, one block
SMALL = V15_UNET | {"widths": (16, 32), "blocks": 1, "attention": (True, False), "groups": 8, "context_width": 12}


def make(config, seed=0):
    return unet_pair(UNet(**config, attention_block=SpatialTransformer).double())


def inputs(config, size=(16, 16), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config["in_channels"], *size, generator=generator, dtype=dtype)
    return x, torch.tensor([3, 870]), torch.randn(2, 7, config["context_width"], generator=generator, dtype=dtype)


@torch.no_grad()
def difference(ours, theirs, size=(16, 16)):
    x, t, context = inputs(ours.config, size)
    return error(ours(x, t, context), theirs(x, t, context).sample)


@pytest.mark.parametrize(
    "config", [V15, V15 | {"in_channels": 9}, TOY, SMALL], ids=["v1.5 narrow", "nine channels", "toy", "small"]
)
def test_equals_diffusers(config):
    ours, theirs = make(config)
    assert difference(ours, theirs) < 1e-9
    for size in ((8, 24), (9, 14), (5, 1)):  # not square; not to be halved without a rest (72 pixels are 9 latents)
        assert difference(ours, theirs, size=size) < 1e-9


def swap(module, a, b):
    one, other = getattr(module, a), getattr(module, b)
    setattr(module, a, other), setattr(module, b, one)


def swap_halves(*parameters):
    for rows in parameters:
        rows.data.copy_(rows.data.roll(len(rows) // 2, 0))


def tanh_gelu(ff):
    def forward(x):
        value, gate = ff.hidden(x).chunk(2, dim=-1)
        return ff.out(value * F.gelu(gate, approximate="tanh"))

    ff.forward = forward


def other_side(up):
    return lambda x, height, width: up[1](up[0](x)[:, :, -height:, -width:])


MISTAKES = {  # each in one place only
    "eps of the transformer": lambda net: setattr(net.mid[0].attn.norm, "eps", 1e-5),
    "eps of a residual block": lambda net: setattr(net.down[1].res.norm2, "eps", 1e-6),
    "eps of a LayerNorm": lambda net: setattr(net.mid[0].attn.norm2, "eps", 1e-6),
    "eps at the end": lambda net: setattr(net.norm, "eps", 1e-6),
    "GELU by tanh": lambda net: tanh_gelu(net.mid[0].attn.ff),
    "halves of GEGLU swapped": lambda net: swap_halves(*net.mid[0].attn.ff.hidden.parameters()),
    "norms of a residual block swapped": lambda net: swap(net.mid[1].res, "norm1", "norm2"),
    "norms of the transformer swapped": lambda net: swap(net.mid[0].attn, "norm1", "norm2"),
    "last norms of the transformer swapped": lambda net: swap(net.mid[0].attn, "norm2", "norm3"),
    "queries and values swapped": lambda net: swap(net.mid[0].attn.attn1, "q", "v"),
    "sines first": lambda net: setattr(
        net.time[0].weight, "data", net.time[0].weight.data.roll(net.config["widths"][0] // 2, 1)
    ),
    "half the heads": lambda net: setattr(net.mid[0].attn.attn2, "heads", 4),
    "bilinear instead of nearest": lambda net: setattr(net.up[1].conv[0], "mode", "bilinear"),
    "cropped at the other side": lambda net: setattr(
        net.up[1].conv[0], "forward", lambda x: F.interpolate(x, scale_factor=2)[:, :, 1:]
    ),
    "attention that is forgotten": lambda net: setattr(net.up[-1], "attn", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    """Each mistake, put in, is far above the tolerance of 1e-9."""
    ours, theirs = make(SMALL)
    MISTAKES[mistake](ours)
    assert difference(ours, theirs, size=(15, 16)) > 1e-8


def test_the_comparison_notices_other_frequencies(monkeypatch):
    """half - 1 in the place of half: diffusers calls it downscale_freq_shift=1."""
    ours, theirs = make(SMALL)

    def shifted(t, width):
        frequencies = 10_000 ** (-torch.arange(width // 2) / (width // 2 - 1))
        angles = t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    monkeypatch.setattr(unet, "sinusoid", shifted)
    assert difference(ours, theirs) > 1e-8


def test_by_its_arguments_alone_the_toys_network_is_stable_diffusions():
    for channels, count in ((4, 859_520_964), (9, 859_535_364)):  # text to image; inpainting
        with torch.device("meta"):
            net = UNet(**V15_UNET | {"in_channels": channels}, attention_block=SpatialTransformer)
        assert sum(p.numel() for p in net.parameters()) == count and len(net.state_dict()) == 686


@pytest.mark.slow
def test_equals_diffusers_at_full_width():
    """859,520,964 parameters, once in memory: both networks hold the same ones. Prints what it took."""
    resource = pytest.importorskip("resource")
    with torch.device("meta"):
        ours = UNet(**V15_UNET, attention_block=SpatialTransformer)
    with torch.device("meta"):
        ours, theirs = unet_pair(ours.to_empty(device="cpu"))
    x, t, context = inputs(V15_UNET, dtype=torch.float32)
    x, t, context = x[:1], t[1:], context[:1]
    with torch.no_grad():
        results = []
        for name, net in (("ours", ours), ("diffusers'", theirs)):
            start = time.perf_counter()
            results.append(net(x, t, context))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux
            print(f"{name}: {time.perf_counter() - start:.1f} s, peak memory of the process {peak:.1f} GiB")
    assert error(results[0], results[1].sample) < 1e-4


# ---- cross-attention ------------------------------------------------------------------------------------------------


def test_attention_is_a_weighted_mean_over_the_context():
    """The formula once more, one head and one pixel at a time: softmax(q k / sqrt(d)) v."""
    attention = Attention(8, 5, heads=2).double()
    x, context = torch.randn(1, 6, 8, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    q, k, v = attention.q(x)[0], attention.k(context)[0], attention.v(context)[0]
    seen = torch.zeros(6, 8, dtype=torch.float64)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(6):
            weights = torch.stack([q[i, head] @ k[j, head] / 4**0.5 for j in range(3)]).softmax(0)
            seen[i, head] = sum(weights[j] * v[j, head] for j in range(3))
    torch.testing.assert_close(attention(x, context)[0], attention.out(seen))


def test_one_half_of_geglu_gates_the_other():
    """With a gate far above 0 the values pass, far below they do not."""
    ff = GEGLU(2).double()
    ff.hidden.weight.data[8:] = 0
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    value = ff.hidden(x)[..., :8]
    for gate, passes in ((50.0, 50.0), (-50.0, 0.0)):
        ff.hidden.bias.data[8:] = gate
        torch.testing.assert_close(ff(x), ff.out(passes * value))


def test_an_image_alone_gives_the_same_as_in_a_batch_and_sees_its_own_context():
    ours, _ = make(SMALL)
    x, t, context = inputs(SMALL)
    with torch.no_grad():
        together = ours(x, t, context)
        for i in range(2):
            alone = ours(x[i : i + 1], t[i : i + 1], context[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], atol=1e-10, rtol=1e-10)
        other = context.clone()
        other[1] += 1
        changed = (ours(x, t, other) - together).abs().amax((1, 2, 3))
    assert changed[0] < 1e-12 < changed[1]


def test_the_context_is_a_set():
    """In another order it says the same (a text's order is in its states, by clip.py's positions); each token counts."""
    ours, _ = make(SMALL)
    x, t, context = inputs(SMALL)
    with torch.no_grad():
        answer = ours(x, t, context)
        torch.testing.assert_close(ours(x, t, context.flip(1)), answer, atol=1e-10, rtol=1e-10)
        for token in range(context.shape[1]):
            left = torch.cat([context[:, :token], context[:, token + 1 :]], dim=1)
            assert (ours(x, t, left) - answer).abs().max() > 1e-6


def test_a_context_is_needed():
    with pytest.raises(ValueError, match="call it with one"):
        UNet(**SMALL, attention_block=SpatialTransformer)(torch.randn(1, 4, 8, 8), torch.tensor([5]))


def test_everything_learns_and_a_new_block_changes_next_to_nothing():
    block = SpatialTransformer(8, 2, 4, 5)
    x, context = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 5)
    assert (block(x, context) - x).std((0, 2, 3)).max() < 1e-6  # one number for each channel, whatever x
    torch.nn.init.normal_(block.proj_out.weight)
    block(x, context).square().sum().backward()
    for name, p in block.named_parameters():
        assert p.grad.abs().max() > 0, name
