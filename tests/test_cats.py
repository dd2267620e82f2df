"""The drawn cats: deterministic, the same at every size, and every word of a caption is visible."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from toolbox.cats import ATTRIBUTES, COATS, INVISIBLE, draw

# The mean colour of 1,000 cats in each quarter of the image: red, then green, then blue.
GOLDEN = [
    *(0.259597, 0.262233, 0.269355, 0.266985),
    *(0.232021, 0.236430, 0.209989, 0.213046),
    *(0.025836, 0.031252, 0.017359, 0.025468),
]


def test_the_renderer_is_the_one_that_drew_the_pretrained_models_data():
    """If you change the renderer, change these numbers, and train the pretrained models anew."""
    images = draw(1000, 32)[0].double()
    quarters = F.adaptive_avg_pool2d(images.mean(0), 2).flatten().tolist()
    assert quarters == pytest.approx(GOLDEN, abs=1e-5)


def test_shapes_ranges_and_captions():
    images, labels, captions = draw(20, 32)
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.7 and 0.9 < images.max() <= 1
    assert list(labels) == list(ATTRIBUTES)
    for i, caption in enumerate(captions):
        fur, pattern, eyes, ground = (ATTRIBUTES[name][index[i]] for name, index in labels.items())
        article = "an" if fur == "orange" else "a"
        coat = f"{article} {fur} {pattern}".removesuffix(" plain")
        assert caption == f"{coat} cat with {eyes} eyes on a {ground} background"


def test_a_cat_depends_on_seed_and_index_alone():
    images, labels, captions = draw(200, 16, seed=3)
    part, part_labels, part_captions = draw(70, 16, seed=3, start=100)
    assert torch.equal(images[100:170], part) and captions[100:170] == part_captions
    for name in ATTRIBUTES:
        assert torch.equal(labels[name][100:170], part_labels[name])
    assert not torch.equal(draw(1, 16, seed=4)[0], images[:1])


def test_the_same_cat_at_every_size_anti_aliased():
    small, _, captions = draw(16, 32)
    large, _, same_captions = draw(16, 128)
    shrunk = F.avg_pool2d(large, 4)
    assert captions == same_captions
    assert (shrunk - small).abs().mean() < 0.02  # coverage by distance is not exactly a mean
    assert (shrunk - small.roll(1, 0)).abs().mean() > 0.3
    assert (shrunk - large[:, :, 2::4, 2::4]).abs().mean() > 0.03  # one hard point for each pixel


def test_wanted_attributes_are_drawn_and_change_nothing_else():
    _, free, _ = draw(30, 8, seed=1)
    _, wish, captions = draw(30, 8, seed=1, eyes="blue", background="pink")
    assert all(caption.endswith("with blue eyes on a pink background") for caption in captions)
    assert all(torch.equal(free[name], wish[name]) for name in ("fur", "pattern"))


@pytest.mark.parametrize("size", [32, 64])
def test_every_word_of_a_caption_is_visible(size):
    """Cats that differ in one attribute differ clearly in enough pixels, whatever the others."""

    def differing(one, other):
        a, b = (draw(4, size, seed=5, **wish)[0] for wish in (one, other))
        return ((a - b).abs().amax(1) > 0.25).float().mean((1, 2)).min().item()

    for coat in COATS:
        coat = dict(zip(("fur", "pattern"), coat, strict=True))
        enough = {"fur": 0.15, "pattern": 0.02, "eyes": 0.01, "background": 0.2}
        for name, share in enough.items():
            for one, other in itertools.combinations(ATTRIBUTES[name], 2):
                pair = [coat | {name: value} for value in (one, other)]
                if all((p["fur"], p["pattern"]) in COATS for p in pair):
                    assert differing(*pair) >= share, pair


def test_every_coat_occurs_and_values_are_equally_frequent():
    labels = draw(2000, 1)[1]
    drawn = zip(labels["fur"].tolist(), labels["pattern"].tolist(), strict=True)
    assert {(ATTRIBUTES["fur"][f], ATTRIBUTES["pattern"][p]) for f, p in drawn} == set(COATS)
    assert INVISIBLE not in COATS
    for name in ("eyes", "background"):
        assert (labels[name].bincount() / 2000 - 1 / len(ATTRIBUTES[name])).abs().max() < 0.04


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"fur": "blue"}, "fur='blue': expected one of these: .*'black'"),
        ({"hat": "red"}, "hat='red': expected one of these: .*'fur'"),
        (dict(zip(("fur", "pattern"), INVISIBLE, strict=True)), "cannot be seen on white fur"),
    ],
)
def test_impossible_wishes_are_refused(wish, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(1, 16, **wish)
