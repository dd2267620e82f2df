"""Guidance; class-conditional networks, and the prompts that name values."""

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
DIGITS = {"digit": tuple("0123456789")}
LABELS = torch.tensor([[1, 2, 3], [2, 0, 1]])


@pytest.mark.parametrize(
    ("scale", "asked"), [(0.0, [7, 7]), (1.0, [5, 6]), (3.0, [7, 7, 5, 6]), (-2.0, [7, 7, 5, 6])]
)
def test_guidance_asks_once_and_only_for_what_counts(scale, asked):
    calls = []

    def predict_noise(x, t, context):
        calls.append(context.tolist())
        return 0.5 * x + 0.001 * t.view(-1, 1, 1, 1) + context.view(-1, 1, 1, 1)

    noise = guided(predict_noise, torch.tensor([5, 6]), torch.tensor([7]), scale)(X, T)
    assert calls == [asked]
    context = torch.tensor([5.0, 6]) * scale + 7 * (1 - scale)  # this network is linear
    torch.testing.assert_close(noise, predict_noise(X, T, context))


@torch.no_grad()
def test_no_labels_are_label_0_and_each_image_and_attribute_and_value_matters():
    net = randomise(ClassUNet(CATS, context_width=6, **SMALL))
    noise = net(X, T, LABELS * torch.tensor([[1], [0]]))
    torch.testing.assert_close(noise[:1], net(X[:1], T[:1], LABELS[:1]))
    torch.testing.assert_close(noise[1:], net(X[1:], T[1:]))
    for attribute, values in enumerate(CATS.values()):
        labels = torch.zeros(1 + len(values), 3, dtype=torch.long)
        labels[:, attribute] = torch.arange(len(labels))
        x, t = X[:1].expand(len(labels), -1, -1, -1), T[:1].expand(len(labels))
        assert torch.pdist(net(x, t, labels).flatten(1)).min() > 1e-3


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
