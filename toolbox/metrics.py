"""Is it any good? What a small classifier sees in pictures, distances between sets of them, the best linear denoiser, copies.

Pictures are compared by their features, 128 numbers that the classifier computes on the way to its answers: of two
pictures of one cat, the second moved by a pixel, the pixels differ a lot and the features little. Pictures come as
bytes (N, C, H, W), as data has them. "math.md (14)" is an equation of docs/math.md.
"""

import io
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from toolbox.data import CACHE, Data, from_uint8, to_uint8
from toolbox.files import atomic_write
from toolbox.models import READY, read

FEATURES = 128
DAMAGES = ("none", "jpeg", "moved", "pasted", "lines", "faded")
SURE = 0.9  # the probability from which on an answer counts
NEIGHBOUR = 3  # the k of "k-th nearest"
KNOWN = 16_384  # at most so many real pictures are compared with
FID_FROM = 2000  # fewer pictures than that say little about a covariance of 128 features; KID has no such limit

# ---- what a classifier sees -------------------------------------------------------------------------------------------


class FeatureNet(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] -> for each question the scores of its answers; on the way, 128 features.

    BatchNorm, not GroupNorm: a norm that looks at one picture alone would take its tint and its contrast away.
    """

    name = "our features"

    def __init__(self, channels: int, answers: dict[str, int]):
        super().__init__()
        self.config = {"channels": channels, "answers": answers}

        def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            )

        self.body = nn.Sequential(
            conv(channels, 32),
            conv(32, 32),
            conv(32, 64, 2),
            conv(64, 64),
            conv(64, 128, 2),
            conv(128, FEATURES // 2),
        )
        self.heads = nn.Linear(FEATURES, sum(answers.values()))

    def features(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.body(x), (1, 2)).flatten(
            1
        )  # 64 of the left half, 64 of the right: (B, 128)

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        scores = self.heads(features).split(list(self.config["answers"].values()), dim=1)
        return dict(zip(self.config["answers"], scores, strict=True))

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """Bytes (N, C, H, W) -> features (N, 128)."""
        return torch.cat([self.features(from_uint8(chunk)) for chunk in images.split(256)])


def feature_net(data: Data) -> FeatureNet:
    """The classifier for this data: the repository's own, the one trained here before, or one trained now (a minute or two).

    Whether a stored one belongs to these pictures is told by their mean: another folder, another renderer, another mean;
    and by its questions: the same folder may have been sorted into classes since.
    """
    mean = from_uint8(data.images[:: len(data.images) // 1000 + 1]).mean(0)
    name, questions = f"{data.name}-{data.size}.pt", questions_for(data)
    for path in (READY / "features" / name, CACHE / "features" / name):
        if path.exists():
            stored = read(path)
            fits = (
                stored["mean"].shape == mean.shape
                and (stored["mean"].float() - mean).abs().max() < 0.01
            )
            if fits and stored["network"]["answers"] == questions:
                network = FeatureNet(**stored["network"])
                network.load_state_dict(
                    {key: value.float() for key, value in stored["weights"].items()}
                )
                return network.eval()
    network = train_feature_net(data)
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    with atomic_write(path) as temporary:
        torch.save({"network": network.config, "weights": weights, "mean": mean.half()}, temporary)
    return feature_net(data)  # as it lies in the file: the same figures now and later


def questions_for(data: Data) -> dict[str, int]:
    """What the classifier learns to answer, and between how many answers it chooses."""
    classes = {name: len(values) for name, values in data.classes.items()}
    return (classes or {"turned": 4}) | {"damage": len(DAMAGES)}


def train_feature_net(data: Data, steps: int = 600, batch: int = 128) -> FeatureNet:
    """Learn the data's classes, or, where it has none, which way up a picture is; and to tell what damaged a picture.

    The damages are not those that `evaluate.py` is tested with; without them the network would look at colours and
    large shapes only, since nothing else tells a class.
    """
    alike = same_labels(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FeatureNet(data.channels, questions_for(data))
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        for k in tqdm(range(steps), desc="training the classifier", leave=False):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min((k + 1) / 50, 1 - k / steps)
            chosen = torch.randint(len(data.images), (batch,))
            x = from_uint8(data.images[chosen])
            others = from_uint8(data.images[[alike(int(i)) for i in chosen]])
            if data.classes:
                right = dict(zip(data.classes, data.labels[chosen].T, strict=True))
            else:
                right = {"turned": torch.randint(4, (batch,))}
                x = torch.stack(
                    [
                        picture.rot90(int(turns), (1, 2))
                        for picture, turns in zip(x, right["turned"], strict=True)
                    ]
                )
            right["damage"] = (torch.rand(batch) < 0.5) * torch.randint(1, len(DAMAGES), (batch,))
            x = torch.stack(
                [
                    damage(p, DAMAGES[k], o)
                    for p, k, o in zip(x, right["damage"].tolist(), others, strict=True)
                ]
            )
            scores = network.answers(network.features(x))
            loss = sum(F.cross_entropy(scores[name], right[name]) for name in scores)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def same_labels(data: Data) -> Callable[[int], int]:
    """i -> the index of another picture, drawn at random among those with the labels of picture i."""
    labels = data.labels if data.classes else torch.zeros(len(data.images), 1)
    group = labels.unique(dim=0, return_inverse=True)[1]
    order, sizes = group.argsort(), group.bincount()
    ends = sizes.cumsum(0)
    return lambda i: int(order[ends[group[i]] - 1 - torch.randint(int(sizes[group[i]]), ())])


def damage(picture: Tensor, kind: str, other: Tensor) -> Tensor:
    """(C, H, W) -> the same: compressed; with a rectangle from elsewhere in it or from another one; lined; less coloured."""
    size = picture.shape[-1]
    if kind == "jpeg":
        with io.BytesIO() as file:
            to_pil_image(to_uint8(picture)).save(
                file, "JPEG", quality=int(torch.randint(30, 80, ()))
            )
            return from_uint8(pil_to_tensor(Image.open(file)))
    if kind in ("moved", "pasted"):
        height, width = torch.randint(size // 5, size // 2 + 1, (2,)).tolist()
        top, left = (
            int(torch.randint(size - height + 1, ())),
            int(torch.randint(size - width + 1, ())),
        )
        if kind == "moved":
            other = picture.roll(torch.randint(1, size, (2,)).tolist(), (1, 2))
        damaged = picture.clone()
        damaged[:, top : top + height, left : left + width] = other[
            :, top : top + height, left : left + width
        ]
        return damaged
    if kind == "lines":
        period = int(torch.randint(2, 5, ()))
        lines = (torch.arange(size) % period < period / 2).float() * 2 - 1
        lines = lines if torch.rand(()) < 0.5 else lines[:, None]
        return (picture + (0.1 + 0.1 * torch.rand(())) * lines).clamp(-1, 1)
    if kind == "faded":
        colourless = (
            picture.mean(0, keepdim=True)
            if len(picture) == 3 and torch.rand(()) < 0.5
            else torch.zeros_like(picture)
        )
        return picture.lerp(colourless.expand_as(picture), float(0.1 + 0.15 * torch.rand(())))
    return picture


class Inception:
    """The features of the published FIDs: 2,048 numbers of Inception-v3, by torchmetrics. Another scale than ours."""

    name = "Inception"

    def __init__(self):
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        except Exception as error:  # no such package, no weights, no network to fetch them
            raise ValueError(
                f"--inception: expected torchmetrics, torch-fidelity and Inception's weights, which they fetch from GitHub "
                f"({' '.join(str(error).split())[:200]}): pip install torchmetrics torch-fidelity"
            ) from error

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """Bytes (N, 1 or 3, H, W) -> features (N, 2048)."""
        return torch.cat([self.network(chunk.expand(-1, 3, -1, -1)) for chunk in images.split(64)])


class Judge:
    """Which pictures could be the data's own? Known by what its training pictures look like, and its held-out ones."""

    def __init__(self, network: FeatureNet, data: Data, held_out: Data):
        self.network, self.data = network, data
        self.known = network.see(some(data.images, KNOWN))
        self.reach = self.distance(network.see(some(held_out.images, KNOWN))).quantile(0.99)

    def distance(self, features: Tensor) -> Tensor:
        """To the k-th nearest training picture: (N, 128) -> (N,)."""
        return (
            torch.cdist(features, self.known)
            .kthvalue(min(NEIGHBOUR, len(self.known)), dim=1)
            .values
        )

    def sure(self, features: Tensor) -> dict[str, Tensor]:
        """For each class of the data: is it one of the values, with a probability over 0.9? (N,) truth values."""
        answers = self.network.answers(features)
        return {name: answers[name].softmax(1).amax(1) > SURE for name in self.data.classes}

    def clean(self, features: Tensor) -> Tensor:
        """Each of its classes is sure, and the picture as a whole lies no farther from the data than new data does: (N,)."""
        return torch.stack(
            [*self.sure(features).values(), self.distance(features) <= self.reach]
        ).all(0)

    def variety(self, features: Tensor) -> dict[str, float]:
        """For each class the total-variation distance, 0 .. 1, between the shares of its values here and in the data."""
        answers, result = self.network.answers(features), {}
        for i, (name, values) in enumerate(self.data.classes.items()):
            both = answers[name].argmax(1), self.data.labels[:, i]
            here, there = (x.bincount(minlength=len(values)) / len(x) for x in both)
            result[name] = (here - there).abs().sum().item() / 2
        return result


# ---- distances between two sets of pictures ---------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID (Heusel et al. 2017) between features (N, d) and (M, d), as if each set were normally distributed: math.md (14)."""
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The trace of the root of a product: its eigenvalues are those of the symmetric root_a b root_a.
    overlap = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum()
        + covariance_a.trace()
        + covariance_b.trace()
        - 2 * overlap
    ).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID (Binkowski et al. 2018) between features (N, d) and (M, d), without a bias of their numbers: math.md (15)."""
    return (within(a) + within(b) - 2 * likeness(a, b).mean()).item()


def likeness(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


@lru_cache(maxsize=2)  # an error bar compares many sets with the same large one
def within(x: Tensor) -> Tensor:
    """The mean likeness in a set, without that of a picture to itself."""
    k = likeness(x, x)
    return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))


def with_error(
    distance: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor, repeats: int = 32
) -> tuple[float, float]:
    """A distance, and its standard error: how much it differs between random halves of `a` (the delete-half jackknife)."""
    generator = torch.Generator().manual_seed(0)
    halves = [
        distance(a[torch.randperm(len(a), generator=generator)[: len(a) // 2]], b)
        for _ in range(repeats)
    ]
    return distance(a, b), torch.tensor(halves).std().item()


# ---- the best linear denoiser -------------------------------------------------------------------------------------------


class LinearDenoiser:
    """The best that can be done by knowing the pictures' mean and covariance alone: math.md (13).

    A network above it has learned nothing but brightness and smoothness.
    """

    def __init__(self, images: Tensor, at_most: int = 4096):
        pictures, others = (
            from_uint8(some(half, at_most)).flatten(1) for half in (images[::2], images[1::2])
        )
        self.mean = pictures.mean(0)
        centred = pictures - self.mean  # (n, d)
        n, d = centred.shape
        if n > d:
            values, self.directions = torch.linalg.eigh(centred.T @ centred)
        else:  # the Gram matrix has the same eigenvalues and is smaller: if G v = l v, then X'v is an eigenvector of X'X
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            strong = values > 1e-6 * values[-1]
            self.directions = (
                centred.T @ vectors[:, strong] / values[strong].sqrt()
            )  # (d, at most n)
        # The variances of other pictures: along its own directions, a small set shows too much, and none beside them.
        self.variances, self.rest = self.project(others)

    def project(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d) -> mean squares along each direction, and the mean of what is left, for each of the directions left."""
        centred = pictures - self.mean
        along = (centred @ self.directions).square().mean(0)
        d, known = self.directions.shape
        left = (centred.square().sum(1).mean() - along.sum()).clamp(min=0) / max(1, d - known)
        return along, left

    def errors(self, images: Tensor, alpha_bar: Tensor) -> Tensor:
        """Mean squared error of its predicted noise on these pictures (N, C, H, W), at each level (L,): math.md (13)."""
        along, left = self.project(from_uint8(images).flatten(1))
        d, known = self.directions.shape
        seen = torch.cat([along, left.expand(d - known)]).double()
        variances = torch.cat([self.variances, self.rest.expand(d - known)]).double()
        a = alpha_bar.double()[:, None]
        return ((a**2 * variances**2 + a * (1 - a) * seen) / (a * variances + 1 - a) ** 2).mean(1)


# ---- copies -------------------------------------------------------------------------------------------------------------


def nearest(images: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """For each of the pictures the nearest training picture, mirrored if that is nearer, and the distance in bytes (N,)."""
    best, found = torch.full((len(images),), float("inf")), torch.zeros_like(images)
    for chunk in data.images.split(2048):
        for candidates in (chunk, chunk.flip(-1)) if data.hflip else (chunk,):
            distances = torch.cdist(images.flatten(1).float(), candidates.flatten(1).float()).min(1)
            nearer = distances.values < best
            best[nearer], found[nearer] = (
                distances.values[nearer],
                candidates[distances.indices[nearer]],
            )
    return found, best / images[0].numel() ** 0.5  # root of the mean square


def two_parts(images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n real pictures (or as many as there are), and others to compare them with: every second one each."""
    return some(images[::2], n), some(images[1::2], KNOWN)


def some(images: Tensor, at_most: int) -> Tensor:
    """Evenly spread over all of them, since a folder of classes is sorted."""
    return images[torch.linspace(0, len(images) - 1, min(at_most, len(images))).long()]
