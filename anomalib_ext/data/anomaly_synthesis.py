# SPDX-License-Identifier: Apache-2.0
"""Synthetic anomalies with exact masks, as CRR trains on them."""

from collections.abc import Collection
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from anomalib.data.transforms import MultiRandomChoice
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from openvino_export.images import FORMATS, check_size

# Without a texture folder: surfaces among the photographs in the wheel of scikit-image, which Anomalib requires.
_TEXTURES = ("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png")
_STRIPS = 8
_MAX_REDRAWS = 50
_NOISE_THRESHOLD = 0.5
_LARGEST_SCALE = 5  # exponent of 2
_SMALLEST_CELL = 4  # of the noise's grid, in pixels (ours, for small images)
_ROUNDING = 1e-4  # by which resizing may leave the range of an image


class AnomalySynthesis(v2.Transform):
    """Puts an anomaly on an image: a foreign or shuffled texture, blended in where Perlin noise is high.

    The method is the one of CRR (arXiv 2512.11401, the authors' code), itself DiffusionAD's. From Anomalib's
    ``PerlinAnomalyGenerator`` come the noise, its rotation and the augmentations of the source. Added are the image
    itself as source, its strips shuffled, for half of the images; foreground masks; classes with textures only; and
    an anomaly on every image. The augmentations run on 8-bit images, which is faster. Of Anomalib's ten, three are
    closer to the authors' here: autocontrast instead of ``AutoAugment``, brightness without an exchange of the color
    channels, and a threshold of solarization drawn for each image instead of once.

    All random numbers come from a generator of its own; the global one is left as it was. In each worker of a
    dataloader it starts from ``seed`` and from the worker's seed, which PyTorch draws anew for every epoch and
    ``seed_everything`` makes reproducible.

    Args:
        texture_dir: Folder with images of textures such as DTD, at any depth; without one, some photographs of surfaces
            that scikit-image ships.
        texture_only: Whether textures are the only source, or the names of the categories for which they are: those
            of a folder in the image's path.
        beta: Range of the image's weight in the blend.
        foreground_dir: Folder with gray maps of what is object, bright, and what background, dark. It repeats the end
            of the images' paths: that of ``bottle/train/good/000.png`` is at the same place in it, or at
            ``train/good/000.png``, and so on; PNG files may stand for other formats.
        seed: Seed of all random numbers.

    Raises:
        ValueError: If the texture folder has no images, or the range is not within 0 to 1.
        NotADirectoryError: If a folder does not exist.
    """

    def __init__(
        self,
        texture_dir: str | Path | None = None,
        texture_only: bool | Collection[str] = False,
        beta: tuple[float, float] = (0.2, 0.8),
        foreground_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        low, high = beta
        if not 0 <= low <= high < 1:
            msg = f"beta must be a range (low, high) with 0 <= low <= high < 1, got {beta}."
            raise ValueError(msg)
        if foreground_dir is not None and not Path(foreground_dir).is_dir():
            msg = f"The foreground folder {foreground_dir} does not exist."
            raise NotADirectoryError(msg)
        self.textures = None if texture_dir is None else _images_in(Path(texture_dir))
        self.texture_only = {texture_only} if isinstance(texture_only, str) else texture_only
        self.beta = (low, high)
        self.foreground_dir = None if foreground_dir is None else Path(foreground_dir)
        self.seed = seed
        with torch.random.fork_rng(devices=[]):  # it draws a threshold
            parts = PerlinAnomalyGenerator()
        self.rotation = parts.perlin_rotation_transform
        self.augmentations = _augmentations(parts.augmenters)
        self._rng = np.random.default_rng(seed)
        self._worker_seed: int | None = None
        self._bundled: dict[tuple[str, int, int], Image.Image] = {}
        self._foregrounds: dict[Path, str] = {}  # file -> image that it belongs to

    def forward(self, image: torch.Tensor, image_path: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image with an anomaly, and where that is.

        Args:
            image: RGB image of shape ``(3, H, W)`` with values from 0 to 1.
            image_path: Its file, where foregrounds or the categories of textures ask for it.

        Returns:
            The image with an anomaly, shape ``(3, H, W)``, and its mask of zeros and ones, shape ``(1, H, W)`` and
            never empty. Outside the mask the image is unchanged.

        Raises:
            ValueError: If the image is not such, or smaller than 16 pixels, or its foreground is black, or its path is
                needed and missing.
            FileNotFoundError: If there is no foreground for it.
            OSError: If a texture or foreground cannot be read.
        """
        _check(image)
        self._seed_in_worker()
        rng = self._rng
        height, width = image.shape[-2:]
        foreground = self._foreground(image_path, height, width)
        from_texture = self._is_texture_only(image_path) or rng.random() < 0.5
        with torch.random.fork_rng(devices=[]):  # the parts of Anomalib and torchvision draw from the global generator
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            mask = self._mask(foreground, height, width)
            if from_texture:
                source = self.augmentations(self._texture(height, width))
            else:
                pixels = (image.detach().float() * 255).round_().to(torch.uint8).permute(1, 2, 0)
                source = self.augmentations(Image.fromarray(pixels.numpy()))
        anomaly = torch.from_numpy(np.array(source)).permute(2, 0, 1)
        if not from_texture:
            anomaly = shuffle_strips(anomaly, rng)
        beta = rng.uniform(*self.beta)
        blended = beta * image + (1 - beta) / 255 * anomaly.to(image.dtype)
        return torch.where(mask, blended, image), mask.float()

    def reseed(self, seed: int) -> None:
        """Go on as another seed does, for whoever knows where a training that goes on has been."""
        self._rng = np.random.default_rng(seed)

    def _seed_in_worker(self) -> None:
        """Start anew in each worker, whose copy begins with the state of the main process."""
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self._rng = np.random.default_rng([self.seed, worker.seed])

    def _mask(self, foreground: torch.Tensor | None, height: int, width: int) -> torch.Tensor:
        """Where turned Perlin noise is high, within the foreground: bool, shape ``(1, H, W)``, never empty."""
        rows, columns = (2 ** int(self._rng.integers(_max_exponent(side) + 1)) for side in (height, width))
        noise = mask = torch.empty(0)
        for _ in range(_MAX_REDRAWS):
            angles = self._rng.uniform(0, 2 * np.pi, (rows + 1, columns + 1))
            noise = self.rotation(perlin_noise(height, width, torch.from_numpy(angles).float())[None])
            mask = noise > _NOISE_THRESHOLD
            if foreground is not None:
                mask &= foreground
            if mask.any():
                return mask
        # A foreground that the noise keeps missing is so small that half of it will do (ours).
        if foreground is None:
            return noise >= noise.median()
        return foreground & (noise >= noise[foreground].median())

    def _texture(self, height: int, width: int) -> Image.Image:
        names = self.textures or _TEXTURES
        name = names[self._rng.integers(len(names))]
        if isinstance(name, Path):
            return _read(name, "RGB", height, width)
        key = (name, height, width)
        if key not in self._bundled:
            with as_file(files("skimage") / "data" / name) as path:
                self._bundled[key] = _read(path, "RGB", height, width)
        return self._bundled[key]

    def _is_texture_only(self, image_path: str | Path | None) -> bool:
        if isinstance(self.texture_only, bool):
            return self.texture_only
        return not set(self.texture_only).isdisjoint(_needed(image_path, "texture_only").parts[:-1])

    def _foreground(self, image_path: str | Path | None, height: int, width: int) -> torch.Tensor | None:
        """Where the object is: bool, shape ``(1, H, W)``."""
        if self.foreground_dir is None:
            return None
        path = _needed(image_path, "foreground_dir")
        parts = path.parts[1:] if path.anchor else path.parts
        ends = [Path(*parts[start:]) for start in range(len(parts))]
        candidates = [self.foreground_dir / name for end in ends for name in (end, end.with_suffix(".png"))]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            msg = (
                f"There is no foreground for {path} in {self.foreground_dir}. "
                f"Put it at {self.foreground_dir / Path(*parts[-4:])}."
            )
            raise FileNotFoundError(msg)
        if self._foregrounds.setdefault(file, str(path)) != str(path):
            msg = (
                f"{file} would be the foreground of both {self._foregrounds[file]} and {path}. "
                "Put foregrounds into folders that are named as those of the images."
            )
            raise ValueError(msg)
        foreground = torch.from_numpy(np.array(_read(file, "L", height, width)))[None] > 127
        if not foreground.any():
            msg = f"The foreground {file} of {path} is black everywhere, which leaves no place for an anomaly."
            raise ValueError(msg)
        return foreground


def perlin_noise(height: int, width: int, angles: torch.Tensor) -> torch.Tensor:
    """Evaluate Perlin noise, with values around 0.

    Equal to Anomalib's ``generate_perlin_noise`` for the same angles and, at 256 to 448 pixels on one core, 20 to 60
    times faster: within a cell the weights are products of a function of the row and one of the column, so two matrix
    products do.

    Args:
        height: Height ``H`` in pixels.
        width: Width ``W`` in pixels.
        angles: Directions of the gradients at the corners of the cells, shape ``(rows + 1, columns + 1)``. The numbers
            of cells in the next powers of two of height and width are powers of two, too.

    Returns:
        Noise of shape ``(H, W)``.
    """
    row_weights, row_offsets = _corner_weights(height, len(angles) - 1)
    column_weights, column_offsets = _corner_weights(width, angles.shape[1] - 1)
    return 2**0.5 * (row_offsets @ angles.cos() @ column_weights.mT + row_weights @ angles.sin() @ column_offsets.mT)


def shuffle_strips(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shuffle 8 column strips, then 8 row strips: of each, first the even ones, then the odd ones.

    Args:
        image: Image of shape ``(C, H, W)``.
        rng: Generator of the order.

    Returns:
        Image of the same shape.
    """
    for dim in (2, 1):
        strips = image.tensor_split(_STRIPS, dim)
        order = [2 * index + first for first in (0, 1) for index in rng.permutation(_STRIPS // 2)]
        image = torch.cat([strips[index] for index in order], dim)
    return image


def _corner_weights(length: int, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the corners of each position's cell, alone and times the offset from it; ``(length, cells + 1)``."""
    size = _next_power_of_2(length) // cells
    position = torch.arange(length)
    cell, offset = (position // size)[:, None], (position % size / size)[:, None]
    fade = offset**3 * (offset * (6 * offset - 15) + 10)
    corners = torch.cat([cell, cell + 1], dim=1)
    weights = torch.cat([1 - fade, fade], dim=1)
    empty = torch.zeros(length, cells + 1)
    return (
        empty.scatter(1, corners, weights),
        empty.scatter(1, corners, weights * torch.cat([offset, offset - 1], dim=1)),
    )


def _next_power_of_2(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _max_exponent(side: int) -> int:
    """Largest exponent of the number of cells along a side."""
    return min(_LARGEST_SCALE, (_next_power_of_2(side) // _SMALLEST_CELL).bit_length() - 1)


def _augmentations(augmenters: MultiRandomChoice) -> MultiRandomChoice:
    """Anomalib's augmentations, for 8-bit images."""
    replaced = {
        # Anomalib's is for images up to 1 and draws its threshold once.
        v2.RandomSolarize: v2.RandomChoice([v2.RandomSolarize(threshold, p=1.0) for threshold in range(32, 129, 8)]),
        v2.AutoAugment: v2.RandomAutocontrast(p=1.0),
        # Anomalib's also exchanges the color channels.
        v2.RandomPhotometricDistort: v2.ColorJitter(brightness=(0.8, 1.2)),
    }
    augmenters.transforms = [replaced.get(type(transform), transform) for transform in augmenters.transforms]
    return augmenters


def _check(image: torch.Tensor) -> None:
    """Refuse what is no RGB image from 0 to 1."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        msg = f"An RGB image of shape (3, H, W) in floating point is needed, got {tuple(image.shape)}, {image.dtype}."
        raise ValueError(msg)
    check_size(image.shape[2], image.shape[1], "The image")
    lowest, highest = (float(value) for value in image.aminmax())  # both NaN if one value is
    if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):
        msg = f"The image has values from {lowest} to {highest}; from 0 to 1, before normalization, are needed."
        raise ValueError(msg)


def _images_in(folder: Path) -> list[Path]:
    """Images at any depth, always in the same order."""
    if not folder.is_dir():
        msg = f"The texture folder {folder} does not exist."
        raise NotADirectoryError(msg)
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not images:
        msg = f"The texture folder {folder} has no images ({', '.join(IMG_EXTENSIONS)})."
        raise ValueError(msg)
    return images


def _needed(image_path: str | Path | None, why: str) -> Path:
    if image_path is None:
        msg = f"With {why} the image's path is needed as second argument."
        raise ValueError(msg)
    return Path(image_path)


def _read(path: Path, mode: str, height: int, width: int) -> Image.Image:
    """Read an image as 8 bits, resized."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError) as error:  # Pillow does not say which file is truncated
        msg = f"{path} cannot be read as an image; repair or remove it."
        raise OSError(msg) from error
