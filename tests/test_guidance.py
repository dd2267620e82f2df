"""Guidance against closed forms; class-conditional networks, and the prompts that name values."""

import pytest
import torch
from oracles import randomise

from latent_ext.guidance import ClassUNet, guided, parse_labels
from toolbox.files import UserError

CATS = {"fur": ("black", "white"), "eyes": ("green", "blue")}
CATS |= {"background": ("green", "blue", "pink")}
SMALL = {"channels": (8, 16), "attention_levels": (True, True), "heads": 2, "groups": 4}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([50, 999])
LABELS = torch.tensor([[1, 2, 3], [2, 0, 1]])
OPEN = torch.zeros(1, 3, dtype=torch.long)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -2.0])
def test_the_scale_moves_along_a_line_from_unconditional_through_conditional(scale, rows):
    calls = []

    def predict_noise(x, t, context):
        calls.append(context)
        return 0.5 * x + 0.001 * t.view(-1, 1, 1, 1) + context.sum(1).view(-1, 1, 1, 1)

    context, null_context = torch.tensor([[[1.0, 2], [0, 5]], [[0.1, 0.2], [7, 7]]])
    both = null_context[:rows].expand(2, 2), context
    noise = guided(predict_noise, context, null_context[:rows], scale)(X, T)
    asked = {0.0: both[0], 1.0: both[1]}.get(scale, torch.cat(both))  # in one call, null first
    assert len(calls) == 1 and torch.equal(calls[0], asked)
    unconditional, conditional = (predict_noise(X, T, one) for one in both)
    torch.testing.assert_close(noise, scale * conditional + (1 - scale) * unconditional)


def make():
    return randomise(ClassUNet(CATS, context_width=6, **SMALL))


@torch.no_grad()
def test_each_image_and_attribute_and_value_matters():
    net = make()
    noise = net(X, T, LABELS * torch.tensor([[1], [0]]))
    torch.testing.assert_close(noise[:1], net(X[:1], T[:1], LABELS[:1]))
    torch.testing.assert_close(noise[1:], net(X[1:], T[1:], OPEN))
    # labels are a context for `guided`
    expected = 2 * net(X, T, LABELS) - net(X, T, OPEN.expand(2, 3))
    torch.testing.assert_close(guided(net, LABELS, OPEN, 2.0)(X, T), expected)
    for attribute, values in enumerate(CATS.values()):
        labels = OPEN.repeat(1 + len(values), 1)
        labels[:, attribute] = torch.arange(len(labels))
        x, t = X[:1].expand(len(labels), -1, -1, -1), T[:1].expand(len(labels))
        assert torch.pdist(net(x, t, labels).flatten(1)).min() > 1e-3


def test_everything_learns_and_config_rebuilds_the_network():
    net = make()
    noise = net(X, T, LABELS), net(X, T, OPEN.expand(2, 3))
    torch.cat(noise).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    assert all(embed.weight.grad[0].any() for embed in net.label_embedding)
    again = ClassUNet(**net.config)
    again.load_state_dict(net.state_dict())
    assert again.config == net.config and net.config["channels"] == [8, 16]


DIGITS = {"digit": tuple("0123456789")}


@pytest.mark.parametrize(
    ("prompt", "classes", "labels"),
    [
        ("", CATS, [0, 0, 0]),
        ("black", CATS, [1, 0, 0]),
        ("  WHITE Fur ,blue EYES,, pink", CATS, [2, 2, 3]),
        ("green background, green eyes", CATS, [0, 1, 1]),
        ("7", DIGITS, [8]),
        ("0 digit", DIGITS, [1]),
    ],
)
def test_a_prompt_names_values(prompt, classes, labels):
    assert parse_labels(prompt, classes) == labels


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("black, green", "'green' is ambiguous: write 'green eyes' or 'green background'"),
        ("green eyes, blue eyes", "two values for eyes; the second is 'blue eyes': give one"),
        ("Purple", "this model does not know 'Purple'. It knows fur: black, white; eyes:"),
        ("green fur", "this model does not know 'green fur'"),
        ("a cat " * 500, "a cat [...]'. It knows fur"),
    ],
)
def test_a_prompt_that_cannot_be_read_gets_one_sentence(prompt, sentence):
    with pytest.raises(UserError) as error:
        parse_labels(prompt, CATS)
    assert sentence in str(error.value) and len(str(error.value)) < 250
