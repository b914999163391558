# SPDX-License-Identifier: Apache-2.0
"""Local multivariate Gaussian noise (LMGN) of HetNet: boxes of feature maps are replaced by what is normal there."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

NOISES = ("mgd", "diag", "randn", "none")
# Images whose deviations from the mean are kept; the covariances have this rank, less one.
NUM_SAMPLES = 64
# Boxes for each image, and cells of the smallest map along each side of a box: at most so many. Ours.
MAX_BOXES = 8
MAX_CELLS = 4

Box = tuple[slice, slice]


class LocalGaussianNoise(nn.Module):
    """Replaces boxes of feature maps by draws from the Gaussian ``N(mu_ij, Sigma_ij)`` of each place.

    No covariance is stored. With the deviations ``X_m`` of ``M`` maps from their mean, and one ``eps ~ N(0, I_M)`` for
    a box, ``mu + sum_m(eps_m * X_m) / sqrt(M - 1)`` has exactly the covariance of the ``M`` maps, across the places and
    levels of the box too. The replacement and the Gaussians are the paper's; this sampler, and the number and sizes of
    the boxes, are ours.

    Args:
        noise: ``mgd`` as above; ``diag`` with the standard deviation of each value, independently; ``randn`` from the
            standard normal distribution; ``none`` for no noise.

    Attributes:
        means: Mean of each level, ``(C, h, w)``.
        deviations: Deviations of the kept images at each level, ``(M, C, h, w)`` in half precision.

    Raises:
        ValueError: If `noise` is unknown.
    """

    def __init__(self, noise: str = "mgd") -> None:
        super().__init__()
        if noise not in NOISES:
            msg = f"noise must be one of {', '.join(NOISES)}, got {noise!r}."
            raise ValueError(msg)
        self.noise = noise
        self.clear()

    def clear(self) -> None:
        """Forget the statistics, which nothing but training needs."""
        # No buffers: those would be in checkpoints, and sent to every process at every step.
        self.means: list[torch.Tensor] = []
        self.deviations: list[torch.Tensor] = []

    @property
    def needs_statistics(self) -> bool:
        """Whether :meth:`fit` comes before :meth:`forward`."""
        return self.noise in {"mgd", "diag"}

    def fit(self, batches: Iterable[Sequence[torch.Tensor]], num_images: int) -> None:
        """Take the mean over all images, and the deviations of images that are spread evenly over them.

        Args:
            batches: Maps of each batch, a tensor ``(B, C, h, w)`` for each level.
            num_images: Number of images in all batches.

        Raises:
            ValueError: If there are fewer than two images.
        """
        if num_images < 2:
            msg = f"noise={self.noise!r} is estimated from the training images, and there must be at least 2 of them."
            raise ValueError(msg)
        chosen = set(torch.linspace(0, num_images - 1, min(num_images, NUM_SAMPLES)).round().int().tolist())
        sums: list[torch.Tensor] = []
        kept: list[list[torch.Tensor]] = []
        seen = 0
        for maps in batches:
            rows = [row for row in range(len(maps[0])) if seen + row in chosen]
            seen += len(maps[0])
            sums = [
                before + level.float().sum(0) for before, level in zip(sums or [0.0] * len(maps), maps, strict=True)
            ]
            kept.append([level[rows].half() for level in maps])
        samples = [torch.cat(level).float() for level in zip(*kept, strict=True)]
        self.means = [total / seen for total in sums]
        self.deviations = [(sample - sample.mean(0)).half() for sample in samples]

    @torch.no_grad()
    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Replace random boxes of each image, at the same place of all levels.

        Args:
            maps: Three levels, each of shape ``(B, C, h, w)``, the last one the smallest.

        Raises:
            RuntimeError: If the statistics are needed and missing.
        """
        if self.needs_statistics and not self.means:
            msg = "The statistics of the noise are missing: they are fitted when a trainer starts (fit)."
            raise RuntimeError(msg)
        if self.noise == "none":
            return list(maps)
        noisy = [level.clone() for level in maps]
        grid = maps[-1].shape[-2:]
        for image in range(len(maps[0])):
            for box in _random_boxes(*grid):
                cells = [_crop(level[image], box, grid) for level in noisy]
                for view, values in zip(cells, self._draw(cells, box, grid), strict=True):
                    view.copy_(values)
        return noisy

    def _draw(self, cells: Sequence[torch.Tensor], box: Box, grid: torch.Size) -> list[torch.Tensor]:
        """Draw what takes the place of some cells, at all levels."""
        # On the CPU, whose random numbers a checkpoint brings back.
        if self.noise == "randn":
            return [torch.randn(view.shape) for view in cells]
        means = [_crop(level, box, grid) for level in self.means]
        deviations = [_crop(level, box, grid).float() for level in self.deviations]
        samples = len(deviations[0])
        if self.noise == "diag":
            return [
                mean + torch.randn(mean.shape).to(mean) * deviation.square().sum(0).div(samples - 1).sqrt()
                for mean, deviation in zip(means, deviations, strict=True)
            ]
        epsilon = (torch.randn(samples) / math.sqrt(samples - 1)).to(means[0])
        return [mean + torch.tensordot(epsilon, each, 1) for mean, each in zip(means, deviations, strict=True)]


def _random_boxes(height: int, width: int) -> Iterator[Box]:
    """Draw rows and columns of one to eight boxes, each anywhere within a map."""
    for _ in range(_up_to(MAX_BOXES)):
        sides = _up_to(min(MAX_CELLS, height)), _up_to(min(MAX_CELLS, width))
        top, left = (_up_to(whole - side + 1) - 1 for whole, side in zip((height, width), sides, strict=True))
        yield slice(top, top + sides[0]), slice(left, left + sides[1])


def _crop(level: torch.Tensor, box: Box, grid: torch.Size) -> torch.Tensor:
    """View a box of cells of the smallest map, whose height and width `grid` is, in a level."""
    rows, columns = (
        slice(part.start * (side // cells), part.stop * (side // cells))
        for part, side, cells in zip(box, level.shape[-2:], grid, strict=True)
    )
    return level[..., rows, columns]


def _up_to(largest: int) -> int:
    return int(torch.randint(1, largest + 1, ()))
