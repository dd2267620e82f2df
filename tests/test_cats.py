"""The drawn cats: deterministic, the same at every size, and every word of a caption can be seen."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F

from toolbox.cats import ATTRIBUTES, INVISIBLE, draw


def test_shapes_ranges_and_captions():
    images, attributes, captions = draw(20, 32)
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.7 and 0.9 < images.max() <= 1
    assert set(attributes) == set(ATTRIBUTES) and all(a.shape == (20,) and a.dtype == torch.long for a in attributes.values())
    for i, caption in enumerate(captions):
        names = {name: ATTRIBUTES[name][index[i]] for name, index in attributes.items()}
        words = f" {names['fur']} {'' if names['pattern'] == 'plain' else names['pattern'] + ' '}cat with "
        assert caption.endswith(f"{words}{names['eyes']} eyes on a {names['background']} background")
        assert caption.split()[0] == ("an" if names["fur"] == "orange" else "a")


def test_a_cat_depends_on_seed_and_index_alone():
    images, attributes, captions = draw(200, 16, seed=3)
    some, some_attributes, some_captions = draw(70, 16, seed=3, start=100)
    assert torch.equal(images[100:170], some) and captions[100:170] == some_captions
    assert all(torch.equal(attributes[name][100:170], some_attributes[name]) for name in ATTRIBUTES)
    assert not torch.equal(draw(1, 16, seed=4)[0], images[:1])
    assert len(draw(0, 16)[0]) == 0


def test_the_same_cat_at_every_size():
    small, _, words = draw(16, 32)
    large, _, same_words = draw(16, 128)
    shrunk = F.avg_pool2d(large, 4)
    assert words == same_words
    assert (shrunk - small).abs().mean() < 0.03  # anti-aliasing is not exactly a mean over the pixel
    assert (shrunk - small.roll(1, 0)).abs().mean() > 0.3


def test_edges_are_anti_aliased():
    large = draw(16, 128)[0]
    assert (F.avg_pool2d(large, 4) - large[:, :, 2::4, 2::4]).abs().mean() > 0.03  # what one hard point a pixel would miss
    light = draw(1, 64, fur="white", pattern="plain", background="green")[0]
    assert len(light.round(decimals=2).flatten(2)[0].T.unique(dim=0)) > 100  # many in-between colours


def test_wanted_attributes_are_drawn_and_change_nothing_else():
    free = draw(30, 32, seed=1)
    wish = draw(30, 32, seed=1, eyes="blue", background="pink")
    assert all(caption.endswith("with blue eyes on a pink background") for caption in wish[2])
    assert torch.equal(free[1]["fur"], wish[1]["fur"]) and torch.equal(free[1]["pattern"], wish[1]["pattern"])


def coats():
    return [coat for coat in itertools.product(ATTRIBUTES["fur"], ATTRIBUTES["pattern"]) if coat not in INVISIBLE]


@pytest.mark.parametrize("size", [32, 64])
def test_every_word_of_a_caption_can_be_seen(size):
    """Two cats that differ in one attribute differ clearly in enough pixels, whatever the other attributes are."""

    def seen(a, b):  # pixels that differ by a step that the eye sees
        return ((a - b).abs().amax(1) > 0.25).float().mean((1, 2)).min().item() * size * size

    def many(**wanted):
        return draw(6, size, seed=5, **wanted)[0]

    for fur in ATTRIBUTES["fur"]:
        patterns = [p for p in ATTRIBUTES["pattern"] if (fur, p) not in INVISIBLE]
        for one, other in itertools.combinations(patterns, 2):
            assert seen(many(fur=fur, pattern=one), many(fur=fur, pattern=other)) >= size * size * 0.02, (fur, one, other)
    for one, other in itertools.combinations(ATTRIBUTES["fur"], 2):
        assert seen(many(fur=one, pattern="plain"), many(fur=other, pattern="plain")) >= size * size * 0.15, (one, other)
    for fur, pattern in coats():
        for one, other in itertools.combinations(ATTRIBUTES["eyes"], 2):
            difference = seen(many(fur=fur, pattern=pattern, eyes=one), many(fur=fur, pattern=pattern, eyes=other))
            assert difference >= size * size * 0.01, (fur, pattern, one, other)
    for one, other in itertools.combinations(ATTRIBUTES["background"], 2):
        assert seen(many(background=one), many(background=other)) >= size * size * 0.2, (one, other)


def test_all_attributes_occur_and_invisible_coats_never():
    _, attributes, _ = draw(2000, 1)
    found = {
        (ATTRIBUTES["fur"][f], ATTRIBUTES["pattern"][p])
        for f, p in zip(attributes["fur"].tolist(), attributes["pattern"].tolist(), strict=True)
    }
    assert found == set(coats())
    for name in ("eyes", "background"):
        share = attributes[name].bincount() / 2000
        assert (share - 1 / len(ATTRIBUTES[name])).abs().max() < 0.04
    white = attributes["fur"] == ATTRIBUTES["fur"].index("white")
    assert white.any() and not (attributes["pattern"][white] == ATTRIBUTES["pattern"].index("tuxedo")).any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"fur": "blue"}, "fur 'blue' is unknown: choose from black, "),
        ({"hat": "red"}, "no attribute 'hat': choose from fur, "),
        ({"fur": "white", "pattern": "tuxedo"}, "cannot be seen on white fur"),
        ({"n": -1}, "n of 0 or more"),
        ({"size": 0}, "size of 1 pixel or more"),
    ],
)
def test_impossible_wishes_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(**({"n": 1, "size": 16} | arguments))


@pytest.mark.slow
def test_16384_cats_take_at_most_20_seconds():
    draw(256, 32)
    start = time.perf_counter()
    draw(2048, 32)
    assert (time.perf_counter() - start) * 8 < 20
