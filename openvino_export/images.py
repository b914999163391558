# SPDX-License-Identifier: Apache-2.0
"""Images as the models take them: formats, limits, reading, resizing, hashes. Without torch.

What is refused, and in which words, is decided here for the training PC as well.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import Image

    Array = NDArray[np.float32]
    # Some rows of an image, from one up to another: shape `(3, rows, W)`, or `(1, rows, W)` if it is gray; in [0, 1].
    Rows = Callable[[int, int], Array]

# An image with a shorter side than this holds no surface to judge.
SMALLEST_SIDE = 16
# Pixels of the largest image file that is read, and the environment variable that sets another number.
LARGEST_IMAGE, LARGEST_IMAGE_VARIABLE = 512_000_000, "ANOMALIB_EXT_LARGEST_IMAGE"
# Pixels that are floats at a time.
BAND = 1 << 20
# Those that Anomalib reads; only these formats are decoded, whatever a file is called.
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load(source: str | Path | NDArray[Any], name: str = "") -> Array:
    """Read an image at its own size.

    Args:
        source: Path of an image file, or an array of shape `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`, of 8 bits
            or floats in [0, 1], RGB. An alpha channel is dropped.
        name: What messages call an array.

    Returns:
        Shape `(3, H, W)`, in [0, 1].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is unreadable, too small, too large, of more than 8 bits, out of range or not finite.
    """
    rows, shape = _rows(source, name)
    return _in_color(resize_rows(rows, shape, shape[1:]))


def load_resized(
    source: str | Path | NDArray[Any], size: tuple[int, int], name: str = ""
) -> tuple[Array, tuple[int, int]]:
    """Read an image and resize it: the same as :func:`load` and :func:`resize`, without floats of all pixels at once.

    Args:
        source: As for :func:`load`.
        size: Height and width of the result.
        name: What messages call an array.

    Returns:
        Shape `(3, H, W)`, in [0, 1]; and height and width before.

    Raises:
        FileNotFoundError: As :func:`load`.
        ValueError: As :func:`load`.
    """
    rows, shape = _rows(source, name)
    return _in_color(resize_rows(rows, shape, size)), shape[1:]


def _in_color(image: Array) -> Array:
    return image if len(image) == 3 else np.repeat(image, 3, axis=0)


def _rows(source: str | Path | NDArray[Any], name: str) -> tuple[Rows, tuple[int, int, int]]:
    """What gives the rows of an image, and its shape `(C, H, W)` with one channel if it is gray."""
    if isinstance(source, (str, Path)):
        picture = load_picture(Path(source))
        width, height = picture.size
        shape = len(picture.getbands()), height, width
        return (lambda first, last: _to_float(np.asarray(picture.crop((0, first, width, last))))), shape
    pixels = _checked(np.asarray(source), name or "The image")
    shape = pixels.shape[2], pixels.shape[0], pixels.shape[1]
    if pixels.dtype == np.uint8:
        return (lambda first, last: _to_float(pixels[first:last])), shape
    image = check_values(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32), name or "The image")
    return (lambda first, last: image[:, first:last]), shape


def load_picture(path: Path) -> Image.Image:
    """Decode an image file.

    Returns:
        A picture of mode "L" or "RGB".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is unreadable, too small, too large, or of more than 8 bits.
    """
    from PIL import Image

    try:
        # As an open file: Pillow maps those that it opens itself, and the process would end if one was cut meanwhile.
        with path.open("rb") as file, _any_size, Image.open(file, formats=FORMATS) as picture:
            _check_header(picture, path)
            picture.load()
            return picture if picture.mode in {"L", "RGB"} else picture.convert("RGB")
    except FileNotFoundError:
        msg = f"There is no image {path}."
        raise FileNotFoundError(msg) from None
    except Image.UnidentifiedImageError as error:
        msg = f"{path} cannot be read as an image: it is none of {', '.join(FORMATS)}, or damaged."
        raise ValueError(msg) from error
    except (OSError, SyntaxError) as error:  # Pillow's errors for unreadable images
        msg = f"{path} cannot be read as an image: {error}."
        raise ValueError(msg) from error


class _AnySize:
    """Turns off Pillow's limit of pixels, which is one for the whole process, while images are read here.

    This module has its own, which can be set, and with which an image is refused by its name.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        from PIL import Image

        with self._lock:
            if not self._readers:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._readers += 1

    def __exit__(self, *error: object) -> None:
        from PIL import Image

        with self._lock:
            self._readers -= 1
            if not self._readers:
                Image.MAX_IMAGE_PIXELS = self._limit


_any_size = _AnySize()


def check_file(path: str | Path) -> None:
    """Refuse an image file that a reader would take for something else than what it shows.

    A file that cannot be opened is passed over: whoever reads its pixels says so.

    Raises:
        ValueError: If it is too small, too large, or of more than 8 bits.
    """
    from PIL import Image

    try:
        with _any_size, Image.open(path, formats=FORMATS) as image:
            _check_header(image, path)
    except OSError:
        return


def _check_header(image: Image.Image, path: str | Path) -> None:
    width, height = image.size
    check_size(width, height, str(path))
    if width * height > (largest := largest_image()):
        msg = (
            f"{path} has {width} x {height} pixels, more than the {largest:,} that are read. If it is to be read, set "
            f"the environment variable {LARGEST_IMAGE_VARIABLE} to {width * height} or more."
        )
        raise ValueError(msg)
    if image.mode.startswith(("I", "F")):
        msg = (
            f"{path} has pixels of mode {image.mode!r} (more than 8 bits). They would be clipped to 8 bits: "
            "convert the image to 8 bits first, in the same way for learning and for judging."
        )
        raise ValueError(msg)
    _warn_if_turned(image, path)


def largest_image() -> int:
    """Pixels of the largest image file that is read.

    Raises:
        ValueError: If the environment variable that sets it holds no number.
    """
    text = os.environ.get(LARGEST_IMAGE_VARIABLE) or str(LARGEST_IMAGE)
    if not text.isdecimal():
        msg = f"The environment variable {LARGEST_IMAGE_VARIABLE} must be a number of pixels, got {text!r}."
        raise ValueError(msg)
    return int(text)


def _warn_if_turned(image: Image.Image, path: str | Path) -> None:
    """Say once, and not for each of thousands of files, that cameras may note how to turn a picture."""
    from PIL import ExifTags
    from PIL import Image as Pillow

    if image.format == "TIFF":  # those Pillow turns itself
        return
    try:
        # Not the method of PNG files, which decodes all pixels.
        orientation = Pillow.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):  # damaged, so nobody turns it
        return
    if orientation in range(2, 9) and not _turned_is_said.is_set():
        _turned_is_said.set()
        msg = (
            f"{path} has a note (EXIF orientation {orientation}) to turn or mirror it for people. Such notes are not "
            "followed, neither in training nor on the edge, and other images with one are not named. If some were "
            "taken turned and others not, turn the files first: see 'Turned pictures' in docs/edge.md."
        )
        warnings.warn(msg, stacklevel=2)


_turned_is_said = threading.Event()


def _checked(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    """Refuse an array that is no image, except for its values.

    Returns:
        Shape `(H, W, 1)` or `(H, W, 3)`, of 8 bits or floats.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in {1, 3, 4}:
        msg = f"{name} must be of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {pixels.shape}."
        raise ValueError(msg)
    check_size(pixels.shape[1], pixels.shape[0], name)
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        msg = f"{name} must be of 8 bits or of floats in [0, 1], got {pixels.dtype}; convert it first."
        raise ValueError(msg)
    return pixels[..., :3]


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
    """Shape `(C, H, W)` of pixels `(H, W)` or `(H, W, C)`."""
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    image = np.empty(pixels.shape, np.float32)
    np.multiply(pixels, np.float32(1 / 255), out=image, casting="unsafe")
    return image


def resize(image: Array, size: tuple[int, int], resample: Image.Resampling | None = None) -> Array:
    """Resize as torchvision's antialiased bilinear `Resize` does with floats.

    Args:
        image: Shape `(C, H, W)`.
        size: Height and width of the result.
        resample: Another filter than the bilinear one.
    """
    if image.shape[1:] == size:
        return image
    from PIL import Image

    # Floats, since 8-bit images would be rounded between the two passes and at the end.
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in image]
    resample = Image.Resampling.BILINEAR if resample is None else resample
    return np.stack([np.asarray(channel.resize(size[::-1], resample)) for channel in channels])


def resize_rows(
    rows: Rows, shape: tuple[int, int, int], size: tuple[int, int], resample: Image.Resampling | None = None
) -> Array:
    """Resize an image as :func:`resize` does, with floats of few rows at a time.

    Args:
        rows: Gives rows of the image.
        shape: Its shape `(C, H, W)`.
        size: Height and width of the result.
        resample: As for :func:`resize`.
    """
    channels, height, width = shape
    step = max(1, BAND // width)
    if height <= step:
        return resize(rows(0, height), size, resample)
    # Pillow, too, resizes along the rows first, each by itself, and then along the columns.
    image = np.empty((channels, height, size[1]), np.float32)
    for first in range(0, height, step):
        last = min(first + step, height)
        image[:, first:last] = resize(rows(first, last), (last - first, size[1]), resample)
    return resize(image, size, resample)


def image_hash(image: Array) -> int:
    """Hash of 64 bits of a normalised image of shape `(3, H, W)`, rounded finer than the steps of 8 bits."""
    with np.errstate(invalid="ignore"):  # NaN is refused elsewhere, with a better message
        levels = np.rint(np.asarray(image, np.float32) * np.float32(256)).astype(np.int32)
    return int.from_bytes(blake2b(levels.tobytes(), digest_size=8).digest(), "big", signed=True)


def files_in(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by path, without hidden ones and those in hidden folders.

    Links to folders are followed, but no folder is looked into twice. What cannot be listed is passed over.
    """
    paths = (path for files in folders_in(folder).values() for path in files)
    # As paths compare, but these do so slowly.
    return [Path(path) for path in sorted(paths, key=lambda path: path.split(os.sep))]  # noqa: PTH206


def folders_in(folder: Path) -> dict[str, list[str]]:
    """The folders that :func:`files_in` looks into, by their real paths, and the paths of the image files in each."""
    endings = tuple(SUFFIXES)
    found: dict[str, list[str]] = {}
    waiting: list[str] = [str(folder)]
    links: list[str] = []
    # Links come last, so that what is in the folder itself goes by its own path.
    while waiting or links:
        current = waiting.pop() if waiting else links.pop()
        real = os.path.realpath(current)
        if real in found:
            continue
        found[real] = []
        try:
            with os.scandir(current) as entries:
                shown = sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: one.name)
        except OSError:  # taken away meanwhile, or not for us
            continue
        for entry in reversed(shown):
            with suppress(OSError):  # a link to itself
                if entry.name.lower().endswith(endings) and entry.is_file():
                    found[real].append(entry.path)
                elif entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
    return found
