"""A seed for each image, so that every image can be drawn again alone."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from processes import Network, NoiseSchedule, randn_like, sample


def sample_seeds(
    predict_noise: Network,
    shape: Sequence[int],
    seeds: Iterable[int],
    schedule: NoiseSchedule,
    device: torch.device | str = "cpu",
    **options: object,
) -> Tensor:
    """One x0 of `shape` for each seed, whatever the other seeds are; options: for `sample`."""
    generator = generators(seeds)
    x = randn_like(torch.empty(len(generator), *shape, device=device), generator)
    return sample(predict_noise, x, schedule, generator=generator, **options)


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One per image: image i of seed s uses seed s + i, whatever else is in its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
