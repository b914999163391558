# SPDX-License-Identifier: Apache-2.0
"""Heat maps over images."""

from __future__ import annotations

import math
import re
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageFilter

from openvino_export.images import SUFFIXES, folders_in, load_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from openvino_export.detector import Prediction


# Pixels of the largest heat map.
LARGEST_HEAT_MAP = 1 << 19
# Of the name of a file, in bytes.
LONGEST_NAME = 255
_HASHED = re.compile(r"-[0-9a-f]{16}\.png$")


def refuse_output_among_images(output: str | None, source: str) -> None:
    """Refuse to write heat maps among the images, which they would replace or be taken for.

    Args:
        output: Folder for heat maps, if there is one.
        source: Image, or folder of images.

    Raises:
        ValueError: If heat maps would be written beside or below the images.
    """
    if output is None:
        return
    folder, images = Path(output).resolve(), Path(source).resolve()
    if folder / images.name == images or any(folder.is_relative_to(one) for one in [str(images), *folders_in(images)]):
        msg = f"Heat maps in {output} would mix with the images of {source}; choose an output folder outside of it."
        raise ValueError(msg)


def heat_map_name(name: str) -> str:
    """Path of the heat map of an image, below the folder for them: another one for every image, on any file system.

    It is `part.png` for `part.png` and `part.jpg.png` for `part.jpg`. A hash is added where another image could meet it
    there: to capitals and other letters that some file systems take for the same, to the name `part.jpg.png`, and to
    one that is too long.

    Args:
        name: Path of the image relative to its source, or the name of a frame.
    """
    plain = name if name.endswith(".png") else f"{name}.png"
    # What is equal for a file system that looks neither at case nor at how accents are put together.
    folded = normalize("NFC", normalize("NFC", plain.encode(errors="ignore").decode()).casefold())
    is_of_other = name == plain and Path(name).with_suffix("").suffix in SUFFIXES
    last = Path(plain).name
    if plain == folded and not is_of_other and len(last.encode()) <= LONGEST_NAME and not _HASHED.search(last):
        return plain
    ending = f"-{blake2b(name.encode(errors='surrogatepass'), digest_size=8).hexdigest()}.png"
    start = Path(name).name.removesuffix(".png").encode(errors="ignore")[: LONGEST_NAME - len(ending)]
    return str(Path(name).with_name(start.decode(errors="ignore") + ending))


def write_overlay(result: Prediction, image: Path | NDArray[Any], target: Path) -> None:
    """Write an image with its anomaly map laid over it, and the borders of the mask in white.

    Args:
        result: What was said about the image.
        image: Path or RGB pixels of 8 bits.
        target: File to write.
    """
    picture = reduced(load_picture(image) if isinstance(image, Path) else Image.fromarray(image))
    lay_over(picture, levels_of(result))
    if result.pred_mask is not None:
        mask = Image.fromarray(result.pred_mask.astype(np.uint8) * 255)
        border = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) != np.asarray(mask)
        outline = Image.fromarray(border.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
        picture.paste((255, 255, 255), (0, 0), outline)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target, compress_level=1, compress_type=3)  # runs only: photographs hold no long repetitions


def reduced(picture: Image.Image) -> Image.Image:
    """A picture in RGB, reduced by a whole number if it is large: what a map shows is coarser anyway."""
    return picture.reduce(math.ceil(math.sqrt(picture.width * picture.height / LARGEST_HEAT_MAP))).convert("RGB")


def levels_of(result: Prediction) -> NDArray[np.uint8]:
    """Anomaly map in 256 levels, shape `(H, W)`; without thresholds in the range of the image."""
    values = result.anomaly_map
    if result.pred_mask is None:
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def heat_map(levels: NDArray[np.uint8]) -> Image.Image:
    """Colors of an anomaly map in 256 levels, shape `(H, W)`; what is low is transparent."""
    colors, shares = _palette()
    picture = Image.fromarray(colors[levels])
    picture.putalpha(Image.fromarray(shares[levels]))
    return picture


def lay_over(picture: Image.Image, levels: NDArray[np.uint8]) -> None:
    """Lay the colors of an anomaly map over a picture in RGB."""
    # Colors at the size of the map, which is small; only the blending is at the size of the image.
    heat = heat_map(levels)
    colors, share = heat.convert("RGB"), heat.getchannel("A")
    size = picture.size
    picture.paste(colors.resize(size, Image.Resampling.BILINEAR), (0, 0), share.resize(size, Image.Resampling.BILINEAR))


@cache
def _palette() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Color of each of 256 levels, from blue over yellow to red, and its opacity, which rises with them."""
    strength = np.linspace(0, 1, 256)[:, None]
    colors = np.concatenate([2 * strength, 1.6 - 2 * np.abs(strength - 0.5) - 0.6, 1 - 2 * strength], axis=1)
    shares = 0.65 * np.clip(2 * strength[:, 0] - 0.5, 0, 1)
    return (255 * np.clip(colors, 0, 1)).astype(np.uint8), (255 * shares).astype(np.uint8)
