# SPDX-License-Identifier: Apache-2.0
"""Tests of image files that are large, of many modes, or noted to be turned: in bounded memory, as Anomalib reads."""

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.data.utils import read_image
from PIL import Image, ImageOps, PngImagePlugin

from openvino_export import images
from openvino_export.images import check_file, load, load_resized, resize

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (70, 90, 3), dtype=np.uint8))
# Peak memory in MB that reading a file takes.
PEAK = """
import re, sys
from pathlib import Path
from PIL import PngImagePlugin
from openvino_export.images import load_resized
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
load_resized(Path(sys.argv[1]), (256, 256))
print((peak() - before) >> 10)
"""


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "jpg") for mode in ("L", "RGB", "CMYK")],
        *[(mode, "tif") for mode in ("1", "L", "RGB", "CMYK", "YCbCr", "LAB")],
        *[("RGB", suffix) for suffix in ("bmp", "ppm", "webp")],
        ("L", "pgm"),
    ],
)
def test_bands_change_no_bit(mode: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the mode and format, and also of arrays: pixels are Anomalib's, and resized as if it was at once."""
    path = tmp_path / f"image.{suffix}"
    (PICTURE if mode == "LAB" else PICTURE.convert(mode)).save(path)
    whole = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).astype(np.float32) * np.float32(1 / 255)
    np.testing.assert_allclose(whole, read_image(path, as_tensor=True), atol=1e-7)
    monkeypatch.setattr(images, "BAND", 1000)  # bands of 11 rows
    np.testing.assert_array_equal(load(path), whole)
    array = np.asarray(Image.open(path).convert("RGB"))
    for size in ((32, 40), (32, 90), (70, 40), (200, 33), (70, 90)):
        for source, tolerance in ((path, 0), (str(path), 0), (array, 0), (array / 255, 1e-6)):
            image, before = load_resized(source, size)
            np.testing.assert_allclose(image, resize(whole, size), rtol=0, atol=tolerance)
            assert (image.shape, image.dtype, before) == ((3, *size), np.float32, (70, 90))


@pytest.mark.skipif(sys.platform != "linux", reason="The peak is read from /proc.")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Little more than the decoded pixels, of which there are 1 byte for gray and 4 for color."""
    for mode, megabytes in (("L", 40), ("RGB", 160)):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (8000, 5000)).save(path)
        done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
        assert megabytes / 2 < int(done.stdout) < 1.3 * megabytes + 20


@pytest.mark.parametrize("suffix", ["bmp", "jpg", "png", "tif", "webp"])
def test_limit(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Pillow does not count here and stays as it is; ours can be set, and is named without talk of attacks."""
    path = tmp_path / f"image.{suffix}"
    PICTURE.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path).load()
    for largest in ("", "6300"):
        monkeypatch.setenv("ANOMALIB_EXT_LARGEST_IMAGE", largest)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(path).shape == (3, 70, 90)
            check_file(path)
    monkeypatch.setenv("ANOMALIB_EXT_LARGEST_IMAGE", "6299")
    message = r"image\.\w+ has 90 x 70 pixels, more than the 6,299 .* variable ANOMALIB_EXT_LARGEST_IMAGE to 6300"
    for read in (load, check_file):
        with pytest.raises(ValueError, match=message):
            read(path)
    monkeypatch.setenv("ANOMALIB_EXT_LARGEST_IMAGE", "1e9")
    with pytest.raises(ValueError, match="ANOMALIB_EXT_LARGEST_IMAGE must be a number of pixels, got '1e9'"):
        load(path)
    assert Image.MAX_IMAGE_PIXELS == 3000


def test_limit_of_pillow_with_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set back when the last of several readers is done, and not before."""
    PICTURE.save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    failures: list[Exception] = []

    def read() -> None:
        for _ in range(50):
            try:
                load(tmp_path / "image.png")
            except Exception as error:  # noqa: BLE001, PERF203  # any is a failure
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert Image.MAX_IMAGE_PIXELS == 3000


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Whether turned pictures were spoken of; not yet."""
    monkeypatch.setattr(images, "_turned_is_said", event := threading.Event())
    return event


def turned(path: Path, orientation: int) -> Path:
    """Save a picture with a note."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    PICTURE.save(path, exif=exif)
    return path


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_notes_to_turn_are_not_followed(suffix: str, tmp_path: Path) -> None:
    """As by Anomalib, and one warning, which names the first of many files, says so."""
    paths = [turned(tmp_path / f"{number}.{suffix}", 6) for number in range(3)]
    with pytest.warns(UserWarning, match=rf"0\.{suffix} has a note \(EXIF orientation 6\)") as caught:
        pixels = [load(path) for path in paths for _ in range(2)]
    assert len(caught) == 1
    assert pixels[0].shape == (3, 70, 90)
    np.testing.assert_allclose(pixels[0], read_image(paths[0], as_tensor=True), atol=1e-7)


@pytest.mark.parametrize("read", [load, check_file])
def test_both_sides_say_so(read: Any, said: threading.Event, tmp_path: Path) -> None:  # noqa: ANN401
    """Training checks the files; the edge reads them."""
    with pytest.warns(UserWarning, match=r"mirrored\.png has a note"):
        read(turned(tmp_path / "mirrored.png", 2))
    assert said.is_set()


def test_pictures_that_are_upright(said: threading.Event, tmp_path: Path) -> None:
    """Of them nothing is said, nor of TIFF files, which Pillow turns on both sides."""
    PICTURE.save(tmp_path / "plain.jpg")
    for path in (tmp_path / "plain.jpg", turned(tmp_path / "upright.jpg", 1), turned(tmp_path / "turned.tif", 6)):
        np.testing.assert_allclose(load(path), read_image(path, as_tensor=True), atol=1e-7)
    assert load(tmp_path / "turned.tif").shape == (3, 90, 70)
    ImageOps.exif_transpose(Image.open(turned(tmp_path / "turned.png", 6))).save(
        tmp_path / "done.png"
    )  # as in the docs
    assert load(tmp_path / "done.png").shape == (3, 90, 70)
    assert not said.is_set()


@pytest.mark.parametrize(
    "save",
    [
        {"exif": b"MM\0*"},
        {"exif": b"no header of a note"},
        {"exif": b"MM\0*\0\0\0\x08" + RNG.bytes(60)},
        {"pnginfo": [("Raw profile type exif", "\nexif\n 4\nzz\n")]},
    ],
    ids=["cut", "foreign", "random", "text"],
)
def test_damaged_notes_do_no_harm(save: dict[str, Any], tmp_path: Path) -> None:
    """The picture is read; and looking for a note decodes no pixels."""
    texts = PngImagePlugin.PngInfo()
    for text in save.pop("pnginfo", []):
        texts.add_text(*text)
    PICTURE.save(tmp_path / "image.png", pnginfo=texts, **save)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's
        assert load(tmp_path / "image.png").shape == (3, 70, 90)
    with Image.open(tmp_path / "image.png") as picture:
        images._warn_if_turned(picture, "it")
        assert picture.tile  # what is yet to be decoded
