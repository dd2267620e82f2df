"""Distances against torchmetrics, scipy and closed forms; the judge against what it must notice: it judges the lessons."""

import functools
import math
import sys
import types
from itertools import pairwise

import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.functional import gaussian_blur

from toolbox import metrics
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import Data, from_bytes, load_data, to_bytes
from toolbox.metrics import (
    DAMAGES,
    FeatureNet,
    Inception,
    Judge,
    LinearDenoiser,
    damage,
    feature_net,
    frechet_distance,
    kernel_distance,
    nearest,
    some,
    train_feature_net,
    two_parts,
    with_error,
)
from toolbox.models import READY


class AsItIs(nn.Module):
    """What torchmetrics asks for features: ours."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def gaussian(n, d, seed, shift=0.0):
    """Correlated numbers (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift


# ---- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 16), (100, 100, 2), (1000, 900, 64)])
def test_frechet_distance_equals_torchmetrics_and_scipy(n, m, d):
    a, b = gaussian(n, d, 0), gaussian(m, d, 1, shift=0.3) * 1.5
    judge = FrechetInceptionDistance(feature=AsItIs(d))
    judge.update(a, real=True)
    judge.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(judge.compute().item(), rel=1e-6)
    s, t = a.T.cov().numpy(), b.T.cov().numpy()
    root = scipy.linalg.sqrtm(s @ t).real
    exact = (a.mean(0) - b.mean(0)).square().sum().item() + s.trace() + t.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(exact, rel=1e-4)  # the features come in 32 bits


def test_frechet_distance_of_axes_is_that_of_means_and_spreads():
    """Uncorrelated numbers: (difference of the means)^2 + (difference of the spreads)^2, added up; one number is constant."""
    n, spreads, others = 50, torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([3.0, 2.0, 0.1, 1.0]).double()
    centred = gaussian(n, 4, 0) - gaussian(n, 4, 0).mean(0)
    axes = torch.linalg.qr(centred)[0] * (n - 1) ** 0.5  # mean 0, covariance 1
    shift = torch.tensor([0.0, 1.0, -2.0, 0.5]).double()
    expected = (shift.square() + (spreads - others).square()).sum().item()
    assert frechet_distance(axes * spreads, axes * others + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(axes * others + shift, axes * spreads) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(axes * others, axes * others) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_pictures_than_features():
    """The covariance then has directions without any spread: no NaN, and still the right number."""
    a, b = gaussian(20, 64, 0), gaussian(30, 64, 1, shift=0.1)
    s, t = a.T.cov(), b.T.cov()
    centred_a, centred_b = (a - a.mean(0)) / 19**0.5, (b - b.mean(0)) / 29**0.5
    overlap = torch.linalg.svdvals(centred_a @ centred_b.T).sum()  # trace of the root of S T, by singular values
    exact = (a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize(("n", "d"), [(60, 16), (200, 64)])
def test_kernel_distance_equals_torchmetrics(n, d):
    a, b = gaussian(n, d, 0), gaussian(n, d, 1, shift=0.2)
    judge = KernelInceptionDistance(feature=AsItIs(d), subsets=1, subset_size=n)
    judge.update(a, real=True)
    judge.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(judge.compute()[0].item(), rel=1e-9)


def test_kernel_distance_by_hand_and_without_bias():
    """Of sets of different sizes, pair by pair; and of draws of one distribution it is 0 in the mean, however few they are."""
    a, b = [[1.0, 0.5], [0.0, -1.0], [2.0, 1.0]], [[0.5, 0.5], [1.0, -2.0]]

    def like(x, y):
        return ((x[0] * y[0] + x[1] * y[1]) / 2 + 1) ** 3

    within_a = sum(like(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 6
    within_b = sum(like(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 2
    between = sum(like(x, y) for x in a for y in b) / 6
    assert kernel_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)

    draws = torch.tensor([kernel_distance(gaussian(5, 3, 2 * i), gaussian(8, 3, 2 * i + 1)) for i in range(2000)])
    assert abs(draws.mean()) < 4 * draws.std() / 2000**0.5 < 0.25


@pytest.mark.parametrize(
    ("distance", "n", "d", "shift"),
    [*[(kernel_distance, 256, 8, shift) for shift in (0.0, 0.3, 1.0)], (frechet_distance, 300, 4, 0.5)],
)
def test_the_error_bar_is_the_spread_of_independent_draws(distance, n, d, shift):
    b = gaussian(400, d, 10_000)
    draws = [gaussian(n, d, seed, shift) for seed in range(150)]
    spread = torch.tensor([distance(a, b) for a in draws]).std().item()
    results = [with_error(distance, a, b) for a in draws[:10]]
    assert [value for value, _ in results] == [distance(a, b) for a in draws[:10]]
    errors = torch.tensor([error for _, error in results])
    assert spread / 1.5 < errors.mean() < spread * 1.5 and (errors > spread / 2.5).all() and (errors < 2.5 * spread).all()


def test_the_error_bar_is_always_the_same_and_disturbs_no_other_randomness():
    a, b = gaussian(50, 4, 0), gaussian(50, 4, 1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = with_error(kernel_distance, a, b), with_error(kernel_distance, a, b)
    assert one == other and one[1] > 0 and torch.equal(before, torch.get_rng_state())


# ---- which pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "at_most"), [(10, 10), (10, 3), (10, 100), (16_384, 8192), (16_384, 1000), (1001, 1000), (5, 1)])
def test_some_are_evenly_spread(n, at_most):
    chosen = some(torch.arange(n), at_most)
    assert len(chosen) == min(n, at_most) == len(chosen.unique()) and chosen[0] == 0
    if at_most >= n:
        assert torch.equal(chosen, torch.arange(n))
    elif at_most > 1:
        gaps = chosen.diff()
        assert chosen[-1] == n - 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("n", "asked"), [(1000, 100), (1000, 10_000), (15, 4), (15, 256), (20_000, 256)])
def test_two_parts_are_disjoint_and_each_has_its_share_of_every_class(n, asked):
    one, other = two_parts(torch.arange(n), asked)
    assert not set(one.tolist()) & set(other.tolist())
    assert len(one) == min(asked, (n + 1) // 2) and len(other) == min(metrics.KNOWN, n // 2)
    if n > 100:  # a folder of ten classes, sorted
        for part in (one, other):
            shares = (part * 10 // n).bincount(minlength=10) / len(part)
            assert (shares - 0.1).abs().max() < 0.03


# ---- the best linear denoiser -----------------------------------------------------------------------------------------


ALPHA_BAR = torch.tensor([0.95, 0.7, 0.3, 0.05])


def noise_pictures(n, spread, seed, channels=1, size=4):
    """Pictures whose numbers are normal, of this spread along each axis of a fixed, random turn of the space; in bytes."""
    d = channels * size * size
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)))[0]
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * spread @ turn.T + 0.1
    return to_bytes(x.view(n, channels, size, size))


def test_the_best_linear_denoiser_of_normal_pictures_is_the_best_of_all():
    """Its error along a direction of variance v is known: a v / (a v + 1 - a)."""
    spread = torch.linspace(0.05, 0.3, 16)
    linear = LinearDenoiser(noise_pictures(8000, spread, 0))
    expected = torch.stack([(a * spread**2 / (a * spread**2 + 1 - a)).mean() for a in ALPHA_BAR]).double()
    errors = linear.errors(noise_pictures(2000, spread, 1), ALPHA_BAR)
    torch.testing.assert_close(errors, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize(("n", "size"), [(400, 4), (40, 8)])
def test_its_errors_are_those_of_a_denoiser_that_does_it(n, size):
    """Noise is drawn, and guessed by one matrix: with as many directions as numbers, and with fewer."""
    d = 3 * size * size
    spread = torch.linspace(0.4, 0.02, d)
    linear = LinearDenoiser(noise_pictures(n, spread, 0, 3, size))
    images = noise_pictures(500, spread, 1, 3, size)
    known = linear.directions.double()
    assert known.shape[0] == d and (known.shape[1] < d) == (n < d)
    torch.testing.assert_close(known.T @ known, torch.eye(known.shape[1]).double(), atol=1e-3, rtol=0)
    covariance = (known * linear.variances) @ known.T + linear.rest * (torch.eye(d).double() - known @ known.T)
    x0, generator = from_bytes(images).flatten(1).double(), torch.Generator().manual_seed(2)
    for a, error in zip(ALPHA_BAR.double(), linear.errors(images, ALPHA_BAR), strict=True):
        total = a * covariance + (1 - a) * torch.eye(d).double()
        noise = torch.randn(20, *x0.shape, generator=generator, dtype=torch.float64)
        deviation = a.sqrt() * (x0 - linear.mean) + (1 - a).sqrt() * noise
        guess = (1 - a).sqrt() * torch.linalg.solve(total, deviation.mT).mT
        assert error.item() == pytest.approx((noise - guess).square().mean().item(), rel=0.02)


@pytest.mark.parametrize("n", [40, 200, 1500])
def test_few_pictures_are_not_taken_for_all_there_are(n):
    """Pictures without any structure: the best is to expect the same variance everywhere, not what these few happen to have."""
    spread = torch.full((192,), 0.3)
    linear = LinearDenoiser(noise_pictures(n, spread, 0, 3, 8))
    best = ALPHA_BAR.double() * 0.09 / (ALPHA_BAR.double() * 0.09 + 1 - ALPHA_BAR.double())
    errors = linear.errors(noise_pictures(500, spread, 1, 3, 8), ALPHA_BAR)
    torch.testing.assert_close(errors, best, rtol=0.1, atol=0)


# ---- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [True, False])
def test_the_nearest_are_found_copies_and_mirrored_copies(mirror):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2500, 3, 6, 6), dtype=torch.uint8, generator=generator)  # more than a chunk
    near = images[2200].int() + torch.randint(-2, 3, (3, 6, 6), generator=generator)
    asked = torch.stack([images[7], images[2400], images[3].flip(-1), near.clamp(0, 255).to(torch.uint8), images[0] // 2])
    found, distance = nearest(asked, Data("test", images, mirror=mirror))
    assert found.dtype == torch.uint8 and distance.shape == (5,)
    every = torch.cat([images, images.flip(-1)]) if mirror else images
    exact = (asked[:, None].double() - every.double()).square().mean((2, 3, 4)).sqrt()
    torch.testing.assert_close(distance.double(), exact.min(1).values, atol=0.1, rtol=1e-3)
    assert torch.equal(found, every[exact.argmin(1)])
    assert torch.equal(found[:2], asked[:2]) and distance[:2].max() < 0.1
    assert (distance[2] < 0.1) == mirror and (distance[2] > 50) != mirror
    assert torch.equal(found[3], images[2200]) and 0.5 < distance[3] < 2


# ---- the judge, with features made by hand ----------------------------------------------------------------------------


class Brightness:
    """One feature, the red of a picture; above 50 it is day, else night, with a certainty that grows with the distance."""

    def see(self, images):
        return images[:, 0].float().mean((1, 2))[:, None]

    def answers(self, features):
        odds = features[:, 0] / 10 - 5
        return {"time": torch.stack([odds, -odds], dim=1), "damage": torch.zeros(len(features), 4)}


def plain(values):
    """Pictures of one red each."""
    images = torch.zeros(len(values), 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1)
    return images


def test_the_judge_by_hand():
    data = Data("reds", plain(range(0, 100, 2)), {"time": ("day", "night")}, torch.tensor([[0]] * 10 + [[1]] * 40))
    held_out = Data("reds", plain([*range(1, 99, 2), 120]))
    judge = Judge(Brightness(), data, held_out)
    features = Brightness().see(plain([0, 50, 98, 150, 47, 62]))
    # The third nearest of 0, 2, 4, ... 98: of 0 it is 4, of 50 it is 52 (or 48), of 150 it is 94.
    assert metrics.NEIGHBOUR == 3 and judge.distance(features).tolist() == [4, 2, 4, 56, 3, 2]
    usual = sorted(sorted(abs(x - y) for y in range(0, 100, 2))[2] for x in [*range(1, 99, 2), 120])
    place = 0.99 * 49
    expected = usual[48] + (place - 48) * (usual[49] - usual[48])
    assert judge.reach.item() == pytest.approx(expected) and usual[48] < expected < usual[49]
    certainty = [1 / (1 + math.exp(-2 * abs(red / 10 - 5))) for red in (0, 50, 98, 150, 47, 62)]
    assert [c > 0.9 for c in certainty] == judge.sure(features)["time"].tolist() == [True, False, True, True, False, True]
    assert list(judge.sure(features)) == ["time"]  # whether it is damaged is no class of the data
    assert judge.clean(features).tolist() == [True, False, True, False, False, True]
    # Day are 4 of 6 (above 50; odds of exactly 0 count for the first), in the data 10 of 50.
    assert judge.variety(features)["time"] == pytest.approx(4 / 6 - 10 / 50)
    everything = Brightness().see(plain([99] * 10 + [1] * 40))
    assert judge.variety(everything)["time"] == pytest.approx(0)

    without = Judge(Brightness(), Data("reds", data.images), held_out)
    assert without.sure(features) == {} == without.variety(features)
    assert without.clean(features).tolist() == [True, True, True, False, True, True]


def test_fewer_pictures_than_neighbours():
    judge = Judge(Brightness(), Data("reds", plain([10, 20, 40])), Data("reds", plain([15])))
    assert judge.distance(Brightness().see(plain([0]))).tolist() == [40] and judge.reach == 25


def test_the_shares_of_several_classes_by_hand():
    """Total variation: half the sum of the differences of the shares."""

    class Told:
        see = staticmethod(lambda images: images.flatten(1).float())

        @staticmethod
        def answers(features):
            return {
                "a": nn.functional.one_hot(features[:, 0].long(), 3).float(),
                "b": nn.functional.one_hot(features[:, 1].long(), 2).float(),
            }

    labels = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 1]])
    data = Data("told", labels.view(4, 2, 1, 1).to(torch.uint8), {"a": ("x", "y", "z"), "b": ("p", "q")}, labels)
    judge = Judge(Told(), data, data)
    result = judge.variety(torch.tensor([[0.0, 1], [0, 1], [2, 1], [2, 0], [2, 1]]))
    # a: shares 2/5, 0, 3/5 and 2/4, 1/4, 1/4; b: 1/5, 4/5 and 1/2, 1/2
    assert result == {"a": pytest.approx((0.1 + 0.25 + 0.35) / 2), "b": pytest.approx(0.3)}


# ---- the classifier: trained, stored, found again ---------------------------------------------------------------------


def small_cats(n=64, size=16, seed=0, name="small"):
    images, labels, _ = draw(n, size, seed=seed)
    return Data(name, to_bytes(images), ATTRIBUTES, torch.stack([labels[a] for a in ATTRIBUTES], dim=1))


@pytest.fixture
def trainings(here, monkeypatch):
    """A list of the data of each training; each one is very short."""
    done = []

    def train(data):
        done.append(data)
        return train_feature_net(data, steps=2, batch=8)

    monkeypatch.setattr(metrics, "train_feature_net", train)
    return done


def test_a_classifier_is_trained_once_and_its_figures_recur(trainings, here):
    data = small_cats()
    first = feature_net(data)
    files = [path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()]
    again = feature_net(data)
    assert len(trainings) == 1 and files == ["data/features/small-16.pt"]
    assert torch.equal(first.see(data.images), again.see(data.images)) and first.see(data.images).shape == (64, 128)
    assert not first.training and not again.training
    assert {name: scores.shape[1] for name, scores in first.answers(first.see(data.images)).items()} == {
        **{name: len(values) for name, values in ATTRIBUTES.items()},
        "damage": len(DAMAGES),
    }


def test_a_stored_classifier_of_other_pictures_is_not_used(trainings, here):
    feature_net(small_cats())
    darker = small_cats()
    darker = Data("small", darker.images // 2, darker.classes, darker.labels)
    feature_net(darker)
    assert len(trainings) == 2
    one = darker.images.clone()
    one[..., 5, 5] = 255  # a single pixel of all of them
    feature_net(Data("small", one, darker.classes, darker.labels))
    assert len(trainings) == 3
    feature_net(Data("small", one[:, :1], darker.classes, darker.labels))  # grey ones
    assert len(trainings) == 4 and trainings[-1].channels == 1
    feature_net(Data("small", one[:, :1], darker.classes, darker.labels))
    feature_net(small_cats(size=8))
    assert len(trainings) == 5 and len(list((here / "data/features").iterdir())) == 2


def test_pictures_that_were_sorted_into_other_classes_get_another_classifier(trainings):
    data = small_cats()
    feature_net(Data("small", data.images))
    network = feature_net(data)
    assert len(trainings) == 2 and set(network.config["answers"]) == {*ATTRIBUTES, "damage"}
    feature_net(Data("small", data.images, {"class": ("a", "b")}, torch.arange(64)[:, None] % 2))
    assert len(trainings) == 3
    assert feature_net(Data("small", data.images, {"class": ("a", "b", "c")}, torch.arange(64)[:, None] % 3)) is not None
    assert len(trainings) == 4


def test_a_ready_classifier_comes_first_where_it_belongs_to_the_pictures(trainings, here, monkeypatch):
    monkeypatch.setattr(metrics, "READY", here / "models")
    data = small_cats()
    ready = feature_net(data)
    (here / "models").mkdir()
    (here / "data/features").rename(here / "models/features")
    before = (here / "models/features/small-16.pt").read_bytes()
    assert torch.equal(feature_net(data).see(data.images), ready.see(data.images)) and len(trainings) == 1
    feature_net(Data("small", 255 - data.images, data.classes, data.labels))
    assert len(trainings) == 2 and (here / "data/features/small-16.pt").exists()
    assert (here / "models/features/small-16.pt").read_bytes() == before


def test_a_training_is_always_the_same_and_disturbs_no_other_randomness():
    data = small_cats()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (train_feature_net(data, steps=3, batch=8).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one) and torch.equal(before, torch.get_rng_state())


def stripes(n, size):
    """Grey pictures of 3 classes: horizontal, vertical, none."""
    labels = torch.arange(n) % 3
    wave = (torch.arange(size) // 3 % 2).float()
    kinds = torch.stack([wave[:, None].expand(size, size), wave.expand(size, size), torch.full((size, size), 0.5)])
    noise = 0.2 * torch.randn(n, size, size, generator=torch.Generator().manual_seed(0))
    return Data("stripes", to_bytes(kinds[labels] * 1.6 - 0.8 + noise)[:, None], {"kind": ("h", "v", "none")}, labels[:, None])


def landscapes(n, size):
    """Colour pictures without classes: a sky, a ground."""
    sky = torch.linspace(1, -1, size)[:, None].expand(3, size, size)
    tints = 0.3 * torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return Data("landscapes", to_bytes(sky + tints))


@pytest.mark.parametrize("make", [lambda: stripes(300, 28), lambda: landscapes(100, 12)])
def test_a_classifier_learns_within_seconds(make):
    """The classes, or without any which way up a picture is; of one channel or three."""
    data = make()
    network = train_feature_net(data, steps=60, batch=24)
    if data.classes:
        images, right, name = data.images, data.labels[:, 0], "kind"
    else:
        images = torch.cat([data.images.rot90(turns, (2, 3)) for turns in range(4)])
        right, name = torch.arange(4).repeat_interleave(len(data.images)), "turned"
    assert list(network.config["answers"]) == [name, "damage"]
    answers = network.answers(network.see(images))[name].argmax(1)
    assert (answers == right).float().mean() > 0.9


def test_seeing_is_the_same_in_any_company():
    """In pieces of 256, and each picture as if it were alone."""
    data = small_cats(n=300, size=8)
    network = train_feature_net(data, steps=2, batch=8)
    features = network.see(data.images)
    assert features.shape == (300, metrics.FEATURES) and not features.requires_grad
    for i in (0, 256, 299):
        torch.testing.assert_close(network.see(data.images[i : i + 1])[0], features[i], atol=1e-5, rtol=1e-4)
    rebuilt = FeatureNet(**network.config)
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt.eval().see(data.images[:5]), network.see(data.images[:5]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damage_is_one_and_a_mild_one(kind, channels):
    torch.manual_seed(0)
    for picture, other in zip(*draw(20, 24)[0][:, :channels].split(10), strict=True):
        before = picture.clone()
        damaged = damage(picture, kind, other)
        assert torch.equal(picture, before) and damaged.shape == picture.shape and damaged.abs().max() <= 1
        difference = (damaged - picture).abs()
        if kind == "none":
            assert not difference.any()
        if kind in ("moved", "pasted"):  # a rectangle, not a half; and no colour that was not there
            rows, columns = (difference.sum(0).sum(side).nonzero() for side in (1, 0))
            assert len(rows) <= 12 and len(columns) <= 12
            source = picture if kind == "moved" else other
            assert set(damaged.flatten().tolist()) <= set(picture.flatten().tolist()) | set(source.flatten().tolist())
        if kind == "faded":
            assert damaged.abs().mean() < picture.abs().mean() and 0 < difference.max() < 0.5
        if kind == "lines":
            assert 0.05 < difference.mean() < 0.21 and difference.max() < 0.21
        if kind == "jpeg":
            assert 0.003 < difference.mean() < 0.3


# ---- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inception(monkeypatch):
    """What stands for torchmetrics: its networks take bytes of three channels, nothing else."""
    seen = []

    class Network(nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert name == "inception-v3-compat" and features_list == ["2048"]

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            seen.append(len(images))
            return images.float().mean((2, 3)).repeat(1, 683)[:, :2048]

    module = types.ModuleType("torchmetrics.image.fid")
    module.NoTrainInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", module)
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_sees_bytes_of_three_channels(inception, channels):
    images = torch.randint(0, 256, (150, channels, 8, 8), dtype=torch.uint8)
    features = Inception().see(images)
    assert features.shape == (150, 2048) and inception == [64, 64, 22]
    torch.testing.assert_close(features[:, :3], images.float().mean((2, 3)).expand(150, 3))
    assert Inception.name == "Inception"


@pytest.mark.parametrize("missing", ["torchmetrics", "weights"])
def test_without_inception_one_sentence_says_what_to_install(inception, monkeypatch, missing):
    def no_weights(**_):
        raise ConnectionError("no route\nto github.com")

    if missing == "weights":
        monkeypatch.setattr(sys.modules["torchmetrics.image.fid"], "NoTrainInceptionV3", no_weights)
    else:
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError) as error:
        Inception()
    sentence = str(error.value)
    assert sentence.startswith("--inception: expected torchmetrics, torch-fidelity") and "\n" not in sentence
    assert sentence.endswith("pip install torchmetrics torch-fidelity")
    assert missing == "torchmetrics" or "no route to github.com" in sentence


# ---- the drawn cats: what the ready classifier must notice --------------------------------------------------------------


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    """The drawn cats, the held-out ones, and the ready classifier; drawn once for all that follows."""
    assert (READY / "features/cats-32.pt").exists(), "the ready classifier is missing"

    def never(*_, **__):
        raise AssertionError("the ready classifier does not belong to these cats: it must be trained anew")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cats"))
        patch.setattr(metrics, "train_feature_net", never)
        data = load_data("cats")
        yield data, load_data("cats", held_out=True), feature_net(data)


@pytest.fixture(scope="module")
def judge(cats):
    data, held_out, network = cats
    return Judge(network, data, held_out)


def changed(images, change):
    return to_bytes(change(from_bytes(images)))


def tint(channel, amount):
    return lambda x: x + amount * (torch.arange(3) == channel).view(3, 1, 1)


def noisy(spread):
    return lambda x: x + spread * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blurred(sigma):
    return functools.partial(gaussian_blur, kernel_size=7, sigma=sigma)


def glued(data, n):
    """Left halves of cats, and right halves of other cats of the same attributes."""
    places = {}
    for i, label in enumerate(data.labels.tolist()):
        places.setdefault(tuple(label), []).append(i)
    pairs = [pair for same in places.values() for pair in pairwise(same)]
    left, right = (data.images[list(side)] for side in zip(*pairs[:: len(pairs) // n], strict=True))
    middle = data.size // 2
    return torch.cat([left[..., :middle], right[..., middle:]], dim=-1)[:n]


def test_blur_noise_tint_and_missing_variety_raise_both_distances(cats):
    data, _, network, n = *cats, 400
    real, others = two_parts(data.images, n)
    b = network.see(some(others, 1024))
    black = data.images[::2][data.labels[::2, 0] == 0][:n]
    assert len(black) == len(real) == n
    worse = {
        "blur": changed(real, blurred(0.6)),
        "noise": changed(real, noisy(0.06)),
        "tint": changed(real, tint(0, 0.15)),
        "one fur": black,
    }
    for distance in (kernel_distance, frechet_distance):
        zero, zero_error = with_error(distance, network.see(real), b)
        if distance is kernel_distance:
            assert abs(zero) < 4 * zero_error  # without a bias
        for name, images in worse.items():
            one, error = with_error(distance, network.see(images), b)
            assert one - zero > 3 * (error**2 + zero_error**2) ** 0.5, (name, distance.__name__, one, error, zero, zero_error)


def share(judge, images):
    return judge.clean(judge.network.see(images)).float().mean().item()


def test_drawings_are_clean(cats, judge):
    assert share(judge, some(cats[1].images, 500)) >= 0.99


@pytest.mark.parametrize(
    "change",
    [
        *[pytest.param(tint(i, 0.15), id=f"tint {name}") for i, name in enumerate(("red", "green", "blue"))],
        pytest.param(noisy(0.08), id="noise"),
        pytest.param(blurred(1.0), id="blur"),
    ],
)
def test_damaged_drawings_are_not_clean(cats, judge, change):
    assert share(judge, changed(some(cats[1].images, 500), change)) <= 0.1


def test_drawings_of_two_cats_are_seldom_clean(cats, judge):
    """The judge is not yet as strict as it should be: 10 of 100 is the aim (docs/results.md)."""
    images = glued(cats[1], 500)
    assert len(images) == 500 and share(judge, images) <= 0.3


def test_copies_of_one_cat_are_clean_but_not_all_that_there_are(cats, judge):
    features = judge.network.see(cats[1].images[:50])
    one = features[judge.clean(features)][:1].expand(100, -1)
    assert judge.clean(one).all() and len(one) == 100
    assert min(judge.variety(one).values()) > 0.2
    real = judge.variety(judge.network.see(some(cats[1].images, 500)))
    assert set(real) == set(ATTRIBUTES) and max(real.values()) < 0.1
