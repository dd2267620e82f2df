"""Is it any good? A small classifier as judge, distances between sets, a linear baseline, copies.

Images are compared by their features: 128 numbers that the classifier computes on the way to its
answers. If a cat moves by one pixel, its pixels change a lot and its features little. Images are
uint8 (N, C, H, W), as in Data; "math.md (14)" is an equation of docs/math.md.
"""

import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation as Conv
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from toolbox.data import CACHE, Data, evenly_spaced, from_uint8, to_uint8
from toolbox.models import PRETRAINED, read, write

FEATURES = 128
CORRUPTIONS = ("none", "jpeg", "moved", "pasted", "lines", "faded")
CONFIDENT = 0.9  # an answer counts from this probability on
NEIGHBOUR = 3  # the k of "k-th nearest"
MAX_REAL = 16_384  # compare with at most so many real images
FRECHET_FROM = 2000  # fewer images say little about the covariance of 128 features

# ---- features ------------------------------------------------------------------------------------


class FeatureNet(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> 128 features -> logits of the answers to each question.

    BatchNorm, not GroupNorm: normalizing each image alone would remove its tint and its contrast.
    """

    def __init__(self, channels: int, questions: dict[str, int]):
        super().__init__()
        self.questions = questions  # name -> number of answers

        self.body = nn.Sequential(  # 3x3 convolutions, each with BatchNorm and ReLU
            *(Conv(channels, 32), Conv(32, 32), Conv(32, 64, stride=2), Conv(64, 64)),
            *(Conv(64, 128, stride=2), Conv(128, FEATURES // 2)),
        )
        self.heads = nn.Linear(FEATURES, sum(questions.values()))

    def features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.body(x), (1, 2)).flatten(1)  # (B, 128): 64 of each half

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        logits = self.heads(features).split([*self.questions.values()], dim=1)
        return dict(zip(self.questions, logits, strict=True))

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> (N, 128)."""
        return torch.cat([self.features(from_uint8(chunk)) for chunk in images.split(256)])


def feature_net(data: Data) -> FeatureNet:
    """A classifier for this data: the repository's, an earlier one in CACHE, or a new one.

    A stored one belongs to this data if the mean image and the classes are the same.
    """
    mean = from_uint8(data.images[:: len(data.images) // 1000 + 1]).mean(0)
    name = f"features/{data.name}-{data.size}.pt"
    for path in filter(Path.exists, (PRETRAINED / name, CACHE / name)):
        stored = read(path)
        same_classes = stored.get("classes", data.classes) == data.classes
        if same_classes and (stored["mean"] - mean).abs().max() < 0.01:
            network = FeatureNet(data.channels, questions_of(data))
            network.load_state_dict(stored["weights"])
            return network.eval()
    network = train_feature_net(data).half()
    content = {"classes": data.classes, "mean": mean.half(), "weights": network.state_dict()}
    write(CACHE / name, content)
    return network.float()  # rounded, as it is stored: the same numbers now and later


def questions_of(data: Data) -> dict[str, int]:
    """The questions that a classifier learns, and the number of possible answers to each."""
    classes = {name: len(values) for name, values in data.classes.items()}
    return (classes or {"rotation": 4}) | {"corruption": len(CORRUPTIONS)}


def train_feature_net(data: Data, steps: int = 600, batch: int | None = None) -> FeatureNet:
    """Learn the classes (without any: which way up an image is), and how it was corrupted.

    Without corruptions the network would look only at colours and large shapes, which suffice to
    tell the classes. The judge's tests use corruptions of other kinds.
    """
    batch = batch or 4 * max(4, 32 * 32**2 // max(32, data.size) ** 2)  # fewer large images
    labels = data.labels if data.classes else torch.zeros(len(data.images), 1)
    order = labels.unique(dim=0, return_inverse=True)[1].argsort()  # equal labels side by side
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FeatureNet(data.channels, questions_of(data))
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        tqdm.write("training a classifier, once for this data: up to 3 minutes on 2 cores")
        for step in tqdm(range(steps), desc="training", leave=False):
            optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, 1 - step / steps)
            place = torch.randint(len(order), (batch,))
            chosen, partners = order[place], order[place - 1]
            x, others = from_uint8(data.images[chosen]), from_uint8(data.images[partners])
            right = {name: data.labels[chosen, i] for i, name in enumerate(data.classes)}
            if not data.classes:
                x = torch.cat([part.rot90(k, (2, 3)) for k, part in enumerate(x.chunk(4))])
                right["rotation"] = torch.arange(4).repeat_interleave(batch // 4)
            kinds = (torch.rand(batch) < 0.5) * torch.randint(1, len(CORRUPTIONS), (batch,))
            right["corruption"] = kinds
            x = torch.stack([*map(corrupt, x, [CORRUPTIONS[kind] for kind in kinds], others)])
            answers = network.answers(network.features(x))
            loss = sum(F.cross_entropy(answers[name], right[name]) for name in answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def corrupt(image: Tensor, kind: str, other: Tensor) -> Tensor:
    """Compress (C, H, W), paste a rectangle (from itself or `other`), draw lines, or fade it."""
    size = image.shape[-1]
    if kind == "jpeg":
        file, quality = io.BytesIO(), int(torch.randint(30, 80, ()))
        to_pil_image(to_uint8(image)).save(file, "JPEG", quality=quality)
        return from_uint8(pil_to_tensor(Image.open(file)))
    if kind in ("moved", "pasted"):
        height, width = torch.randint(size // 5, size // 2 + 1, (2,)).tolist()
        top, left = (int(torch.randint(size - side + 1, ())) for side in (height, width))
        if kind == "moved":
            other = image.roll(torch.randint(1, size, (2,)).tolist(), (1, 2))
        inside = ..., slice(top, top + height), slice(left, left + width)
        image = image.clone()
        image[inside] = other[inside]
        return image
    if kind == "lines":
        period = int(torch.randint(2, 5, ()))
        lines = (torch.arange(size) % period < period / 2).float() * 2 - 1
        lines = lines if torch.rand(()) < 0.5 else lines[:, None]
        return (image + (0.1 + 0.1 * torch.rand(())) * lines).clamp(-1, 1)
    if kind == "faded":
        grey = image.mean(0, keepdim=True) if len(image) == 3 else torch.zeros(1)
        target = grey if torch.rand(()) < 0.5 else torch.zeros(1)
        return image.lerp(target, 0.1 + 0.15 * torch.rand(()))
    return image


# ---- the judge -----------------------------------------------------------------------------------


class Judge:
    """Which images could be the data's own? It compares with training and held-out images."""

    def __init__(self, network: FeatureNet, data: Data, held_out: Data):
        self.network, self.data = network, data
        self.real = network.extract_features(evenly_spaced(data.images, MAX_REAL))
        new = network.extract_features(evenly_spaced(held_out.images, MAX_REAL))
        self.radius = self.distance(new).quantile(0.99)

    def distance(self, features: Tensor) -> Tensor:
        """Distance to the k-th nearest training image: (N, 128) -> (N,)."""
        k = min(NEIGHBOUR, len(self.real))
        return torch.cdist(features, self.real).kthvalue(k, dim=1).values

    def confident(self, features: Tensor) -> dict[str, Tensor]:
        """For each attribute: does one of its values have a probability above 0.9? (N,) bool."""
        answers = self.network.answers(features)
        return {name: answers[name].softmax(1).amax(1) > CONFIDENT for name in self.data.classes}

    def clean(self, features: Tensor) -> Tensor:
        """Confident of every attribute, and as near to the data as 99 % of new images? (N,) bool"""
        near = self.distance(features) <= self.radius
        return torch.stack([*self.confident(features).values(), near]).all(0)

    def total_variation(self, features: Tensor) -> dict[str, float]:
        """For each attribute the distance (0 .. 1) from its values' shares here to the data's."""
        answers, result = self.network.answers(features), {}
        for i, (name, values) in enumerate(self.data.classes.items()):
            both = answers[name].argmax(1), self.data.labels[:, i]
            here, there = (x.bincount(minlength=len(values)) / len(x) for x in both)
            result[name] = (here - there).abs().sum().item() / 2
        return result


# ---- distances between two sets of features ------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Distance of features (N, d), (M, d), as if normal (Heusel et al. 2017): math.md (14).

    With Inception's features this is FID.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The trace of a product's root: its eigenvalues are those of the symmetric root_a b root_a.
    overlap = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    traces = covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID (Binkowski et al. 2018) between features (N, d) and (M, d), unbiased: math.md (15)."""
    across = polynomial_kernel(a, b).mean()
    return (mean_off_diagonal(a) + mean_off_diagonal(b) - 2 * across).item()


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


@lru_cache(maxsize=2)  # the jackknife compares many sets with the same large one
def mean_off_diagonal(x: Tensor) -> Tensor:
    """The mean kernel within a set, without pairs of an image with itself."""
    k = polynomial_kernel(x, x)
    return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))


def jackknife(distance: Callable, a: Tensor, b: Tensor) -> tuple[float, float]:
    """A distance and its standard error: how it varies over 32 random halves of `a`."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randperm(len(a), generator=generator)[: len(a) // 2] for _ in range(32)]
    return distance(a, b), torch.tensor([distance(a[half], b) for half in halves]).std().item()


# ---- the best linear denoiser --------------------------------------------------------------------


class LinearDenoiser:
    """The best denoiser that knows only the images' mean and covariance: math.md (13).

    A network that is no better has learned only brightness and smoothness.
    """

    def __init__(self, images: Tensor, at_most: int = 4096):
        halves = (evenly_spaced(images[i::2], at_most) for i in (0, 1))
        images, others = (from_uint8(half).flatten(1) for half in halves)
        self.mean = images.mean(0)
        # The eigenvectors of the covariance matrix, as columns: (d, min(n, d)).
        self.directions = torch.linalg.svd((images - self.mean).T, full_matrices=False).U
        # Along its own directions a small set varies too much, and not at all along all others:
        # measure on other images.
        self.variances = self.project(others)

    def project(self, images: Tensor) -> Tensor:
        """(N, d) -> mean squares along each direction; the others share the rest equally: (d,)."""
        centred = images - self.mean
        along = (centred @ self.directions).square().mean(0)
        d, known = self.directions.shape
        left = (centred.square().sum(1).mean() - along.sum()).clamp(min=0) / max(1, d - known)
        return torch.cat([along, left.expand(d - known)])

    def errors(self, images: Tensor, alpha_bar: Tensor) -> Tensor:
        """Mean squared error of its predicted noise, at each level (L,): math.md (13)."""
        seen = self.project(from_uint8(images).flatten(1)).double()
        variances, a = self.variances.double(), alpha_bar.double()[:, None]
        return ((a**2 * variances**2 + a * (1 - a) * seen) / (a * variances + 1 - a) ** 2).mean(1)


# ---- which images to compare ---------------------------------------------------------------------


def nearest_neighbours(images: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """For each image the nearest training image, flipped if that is nearer; RMS distances (N,)."""
    best, found = torch.full((len(images),), float("inf")), torch.zeros_like(images)
    for chunk in data.images.split(2048):
        candidates = torch.cat([chunk, chunk.flip(-1)]) if data.hflip else chunk
        distances = torch.cdist(images.flatten(1).float(), candidates.flatten(1).float()).min(1)
        nearer = distances.values < best
        best[nearer] = distances.values[nearer]
        found[nearer] = candidates[distances.indices[nearer]]
    return found, best / images[0].numel() ** 0.5


def split(images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n real images (or as many as there are), and others to compare them with."""
    return evenly_spaced(images[::2], n), evenly_spaced(images[1::2], MAX_REAL)
