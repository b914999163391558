# SPDX-License-Identifier: Apache-2.0
"""Product variants made from real photographs that scikit-image ships; no download.

Each category is a surface that one photograph shows. A good image is a crop, mildly turned, mirrored and lit; those
for training and those for testing come from disjoint parts of the photograph. A defect is blended in within its mask,
outside of which no pixel changes. The folders have the layout of MVTec AD::

    root/brick/train/good/000.png
    root/brick/test/{good,crack,scratch,stain,swap}/000.png
    root/brick/ground_truth/{crack,scratch,stain,swap}/000_mask.png
"""

from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils.generators import generate_perlin_noise
from anomalib.utils.path import resolve_dataset_root
from numpy.typing import NDArray
from PIL import Image
from skimage.draw import bezier_curve, polygon
from skimage.filters import gaussian
from skimage.measure import label
from skimage.transform import SimilarityTransform, resize, warp

SIZE = 256  # of an image, in pixels
CROP = 160  # of the photograph that an image shows, in pixels
TRAIN_IMAGES = 24
GOOD_TEST_IMAGES = 8
TEST_IMAGES_PER_DEFECT = 4
DEFECTS = ("crack", "scratch", "stain", "swap")

# Category -> file in the wheel of scikit-image, and the rows and columns that show the surface only.
_PHOTOS = {
    "brick": ("brick.png", np.s_[:, :]),
    "cell": ("cell.png", np.s_[:, :270]),
    "grass": ("grass.png", np.s_[:, :]),
    "gravel": ("gravel.png", np.s_[:, :]),
    "moon": ("moon.png", np.s_[:, :]),
    "retina": ("retina.jpg", np.s_[250:1150:2, 450:1250:2]),
}

_EDGE = SIZE // 5  # defects keep away from the border

FloatImage = NDArray[np.float64]


class PhotoVariants(MVTecAD):
    """Small data for a first try: 24 images to train on, 8 good and 16 defective ones to test on per category.

    The images are written on first use, and are always the same: ``seed`` is that of Anomalib's random splits.

    Args:
        root: Folder of the categories; ``None`` for Anomalib's own data folder.
        category: One of ``brick``, ``cell``, ``grass``, ``gravel``, ``moon`` and ``retina``.
        num_workers: Number of loading processes; 0 is fastest for so few images.
        **kwargs: The other arguments of ``anomalib.data.MVTecAD``, which reads the files.

    Raises:
        ValueError: If the category is unknown.
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/PhotoVariants",
        category: str = "brick",
        num_workers: int = 0,
        **kwargs,
    ) -> None:
        if category not in _PHOTOS:
            msg = f"Unknown category {category!r}. The categories are {', '.join(_PHOTOS)}."
            raise ValueError(msg)
        root = resolve_dataset_root(root, "PhotoVariants")
        super().__init__(root=root, category=category, num_workers=num_workers, **kwargs)

    def prepare_data(self) -> None:
        """Write the images, unless they are there already."""
        target = self.root / self.category
        if target.is_dir():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        # The folder gets its name once it is complete, so that an interruption leaves none.
        with TemporaryDirectory(dir=self.root, prefix=f".{self.category}-") as folder:
            written = Path(folder) / self.category
            _write_category(self.category, written)
            try:
                written.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, with the same images
                    raise


def _write_category(category: str, folder: Path) -> None:
    """Write all images and masks of a category."""
    rng = np.random.default_rng(list(category.encode()))
    train, test = _photo_parts(category)

    for index in range(TRAIN_IMAGES):
        _save(_good_image(train, rng), folder / "train" / "good" / f"{index:03}.png")
    for index in range(GOOD_TEST_IMAGES):
        _save(_good_image(test, rng), folder / "test" / "good" / f"{index:03}.png")
    for kind in DEFECTS:
        for index in range(TEST_IMAGES_PER_DEFECT):
            image, mask = _damage(_good_image(test, rng), kind, rng)
            _save(image, folder / "test" / kind / f"{index:03}.png")
            _save(mask.astype(np.uint8) * 255, folder / "ground_truth" / kind / f"{index:03}_mask.png")


def _save(image: NDArray[np.uint8], path: Path) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def _photo_parts(category: str) -> tuple[FloatImage, FloatImage]:
    """Return the parts of the photograph for training and for testing, ``(H, W, 3)`` with values from 0 to 1."""
    name, surface = _PHOTOS[category]
    with as_file(files("skimage") / "data" / name) as path, Image.open(path) as image:
        photo = np.asarray(image.convert("RGB"))[surface] / 255
    axis = int(photo.shape[1] >= photo.shape[0])  # across the longer side
    train, test = np.split(photo, [round(0.6 * photo.shape[axis])], axis=axis)
    return train, test


def _good_image(photo: FloatImage, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Take an image of the surface as a camera on a production line would: never quite the same."""
    angle = np.deg2rad(rng.uniform(-4, 4))
    margin = CROP / 2 * (np.cos(angle) + np.sin(abs(angle)))
    center = [rng.uniform(margin, length - 1 - margin) for length in (photo.shape[1], photo.shape[0])]
    place = (
        SimilarityTransform(translation=(-(SIZE - 1) / 2, -(SIZE - 1) / 2))
        + SimilarityTransform(scale=CROP / SIZE, rotation=angle)
        + SimilarityTransform(translation=center)
    )
    image = warp(photo, place, output_shape=(SIZE, SIZE), order=3)[:: rng.choice([1, -1]), :: rng.choice([1, -1])]

    rows, columns = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]  # type: ignore[misc]
    light = rng.uniform(0.93, 1.07) + rng.uniform(-0.05, 0.05) * rows + rng.uniform(-0.05, 0.05) * columns
    noise = rng.normal(scale=0.01, size=(SIZE, SIZE, 1))
    return _to_uint8(image * light[..., None] + noise)


def _to_uint8(image: FloatImage) -> NDArray[np.uint8]:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _damage(
    good: NDArray[np.uint8],
    kind: str,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the image with a defect, and the mask outside of which it is unchanged."""
    image = good / 255
    color = image.mean(axis=(0, 1))
    # A defect has to be visible on its own surface: the rougher that is, the larger and stronger.
    gray = image.mean(axis=2)
    roughness = np.median(np.abs(gray - gaussian(gray, 4)))
    size = 1 + 22 * roughness
    contrast = (0.03 + 2 * roughness) * rng.uniform(0.5, 1.5)
    sign = rng.choice([-1, 1])
    damaged: FloatImage
    if kind == "crack":
        alpha, damaged = _crack(size, rng), color - 2.5 * contrast
    elif kind == "scratch":
        alpha, damaged = _scratch(size, rng), color + 2.5 * sign * contrast
    elif kind == "stain":
        alpha, damaged = _stain(size, rng), color + sign * contrast * rng.uniform(0.8, 1.4, size=3)
    else:  # coarser material from elsewhere
        piece = resize(np.rot90(image)[: SIZE // 3, : SIZE // 3], image.shape)
        alpha, damaged = _patch(size, rng), piece + sign * contrast / 2
    mask = alpha > 0.25
    blended = _to_uint8(image + alpha[..., None] * (damaged - image))
    return np.where(mask[..., None], blended, good), mask


def _perlin(scale: int, rng: np.random.Generator) -> FloatImage:
    """Return Anomalib's Perlin noise, ``(SIZE, SIZE)`` with values around 0."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**31)))
        return generate_perlin_noise(SIZE, SIZE, (scale, scale), torch.device("cpu")).double().numpy()


def _blurred(shape: NDArray[np.bool_], sigma: float) -> FloatImage:
    """Return the shape with soft edges, 1 at its most solid."""
    soft = gaussian(shape.astype(float), sigma)
    return soft / soft.max()


def _distance(row: int, column: int) -> FloatImage:
    """Return the distance of each pixel from one."""
    rows, columns = np.ogrid[:SIZE, :SIZE]
    return np.hypot(rows - row, columns - column)


def _crack(size: float, rng: np.random.Generator) -> FloatImage:
    """Follow the zero line of noise for a while."""
    noise = _perlin(4, rng) + 0.15 * _perlin(16, rng) + 0.05 * _perlin(64, rng)
    line = np.abs(noise) < 0.7 * size * np.hypot(*np.gradient(noise))  # so many pixels wide
    row, column = rng.choice(np.argwhere(line[_EDGE:-_EDGE, _EDGE:-_EDGE])) + _EDGE
    parts = label(line & (_distance(row, column) < rng.uniform(25, 50)))
    return _blurred(parts == np.bincount(parts.ravel())[1:].argmax() + 1, 0.7)


def _scratch(size: float, rng: np.random.Generator) -> FloatImage:
    """Draw a slightly bent line."""
    angle, length = rng.uniform(0, np.pi), rng.uniform(40, 100)
    center = rng.uniform(_EDGE, SIZE - _EDGE, size=2)
    half = length / 2 * np.array([np.sin(angle), np.cos(angle)])
    bend = center + rng.normal(scale=length / 10, size=2)
    (r0, c0), (r1, c1), (r2, c2) = np.rint([center - half, bend, center + half]).astype(int)
    line = np.zeros((SIZE, SIZE), dtype=bool)
    line[bezier_curve(r0, c0, r1, c1, r2, c2, weight=1, shape=line.shape)] = True
    return _blurred(line, size * rng.uniform(0.6, 0.9))


def _stain(size: float, rng: np.random.Generator) -> FloatImage:
    """Let a round spot run out unevenly."""
    row, column = rng.integers(_EDGE, SIZE - _EDGE, size=2)
    spot = 1.2 - _distance(row, column) / (size * rng.uniform(12, 22)) + 0.5 * _perlin(8, rng)
    return _blurred(spot > 0.3, 2) * rng.uniform(0.6, 0.9)


def _patch(size: float, rng: np.random.Generator) -> FloatImage:
    """Cut out a piece with straight edges."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, size=7))
    radii = size * rng.uniform(12, 22, size=7)
    row, column = rng.uniform(_EDGE, SIZE - _EDGE, size=2)
    piece = np.zeros((SIZE, SIZE), dtype=bool)
    piece[polygon(row + radii * np.sin(angles), column + radii * np.cos(angles), piece.shape)] = True
    return _blurred(piece, 1)
