# SPDX-License-Identifier: Apache-2.0
"""Images as the models take them: formats, limits, reading, resizing, hashes. Without torch.

What is refused, and in which words, is decided here for the training PC as well.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    Array = NDArray[np.float32]

# An image with a shorter side than this holds no surface to judge.
SMALLEST_SIDE = 16
# Those that Anomalib reads; only these formats are decoded, whatever a file is called.
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load(source: str | Path | NDArray[Any], name: str = "") -> Array:
    """Read an image.

    Args:
        source: Path of an image file, or an array of shape `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, of 8 bits
            or floats in [0, 1], RGB. An alpha channel is dropped.
        name: What messages call an array.

    Returns:
        Shape `(3, H, W)`, in [0, 1].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is unreadable, too small, of more than 8 bits, out of range or not finite.
    """
    if isinstance(source, (str, Path)):
        return _from_file(Path(source))
    return _from_array(np.asarray(source), name or "The image")


def _from_file(path: Path) -> Array:
    from PIL import Image

    try:
        pixels = _pixels(path)
    except FileNotFoundError:
        msg = f"There is no image {path}."
        raise FileNotFoundError(msg) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's errors for unreadable images
        msg = f"{path} cannot be read as an image: {error}."
        raise ValueError(msg) from error
    return _to_float(pixels)


def _pixels(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        _check_header(image, path)
        return np.asarray(image.convert("RGB"))


def check_file(path: str | Path) -> None:
    """Refuse an image file that a reader would take for something else than what it shows.

    A file that cannot be opened is passed over: whoever reads its pixels says so.

    Raises:
        ValueError: If it is too small, or of more than 8 bits.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image, path)
    except OSError:
        return


def _check_header(image: Image.Image, path: str | Path) -> None:
    check_size(*image.size, str(path))
    if image.mode.startswith(("I", "F")):
        msg = (
            f"{path} has pixels of mode {image.mode!r} (more than 8 bits). They would be clipped to 8 bits: "
            "convert the image to 8 bits first, in the same way for learning and for judging."
        )
        raise ValueError(msg)


def _from_array(pixels: NDArray[Any], name: str) -> Array:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in {1, 3, 4}:
        msg = f"{name} must be of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {pixels.shape}."
        raise ValueError(msg)
    check_size(pixels.shape[1], pixels.shape[0], name)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if pixels.shape[2] == 1 else pixels[..., :3]
    if pixels.dtype == np.uint8:
        return _to_float(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        msg = f"{name} must be of 8 bits or of floats in [0, 1], got {pixels.dtype}; convert it first."
        raise ValueError(msg)
    return check_values(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32), name)


def check_values(image: Array, name: str) -> Array:
    """Refuse an image of floats that cannot be learned or judged.

    Args:
        image: Shape `(3, H, W)`.
        name: What messages call it.

    Returns:
        The image.

    Raises:
        ValueError: If it is too small, not finite, or not in [0, 1].
    """
    check_size(image.shape[2], image.shape[1], name)
    if not np.isfinite(image).all():
        msg = f"{name} holds NaN or infinite values."
        raise ValueError(msg)
    if image.min() < -1e-3 or image.max() > 1 + 1e-3:  # resampling rounds
        msg = f"{name} must lie in [0, 1], got {float(image.min()):.3g} to {float(image.max()):.3g}."
        raise ValueError(msg)
    return image


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an image with too short a side.

    Raises:
        ValueError: If it is one.
    """
    if min(width, height) < SMALLEST_SIDE:
        msg = f"{name} has {width} x {height} pixels; at least {SMALLEST_SIDE} each way are needed to judge it."
        raise ValueError(msg)


def _to_float(pixels: NDArray[np.uint8]) -> Array:
    image = np.empty((3, *pixels.shape[:2]), np.float32)
    np.multiply(pixels.transpose(2, 0, 1), np.float32(1 / 255), out=image, casting="unsafe")
    return image


def resize(image: Array, size: tuple[int, int]) -> Array:
    """Resize as torchvision's antialiased bilinear `Resize` does with floats.

    Args:
        image: Shape `(3, H, W)`.
        size: Height and width of the result.
    """
    if image.shape[1:] == size:
        return image
    from PIL import Image

    # Floats, since 8-bit images would be rounded between the two passes and at the end.
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in image]
    return np.stack([np.asarray(channel.resize(size[::-1], Image.Resampling.BILINEAR)) for channel in channels])


def image_hash(image: Array) -> int:
    """Hash of 64 bits of a normalised image of shape `(3, H, W)`, rounded finer than the steps of 8 bits."""
    with np.errstate(invalid="ignore"):  # NaN is refused elsewhere, with a better message
        levels = np.rint(np.asarray(image, np.float32) * np.float32(256)).astype(np.int32)
    return int.from_bytes(blake2b(levels.tobytes(), digest_size=8).digest(), "big", signed=True)


def files_in(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by path, without hidden ones and those in hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
