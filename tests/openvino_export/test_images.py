# SPDX-License-Identifier: Apache-2.0
"""Tests of images as models take them: what is read, what is refused and in which words, sizes and hashes."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Resize

from openvino_export.images import SUFFIXES, check_file, check_values, files_in, image_hash, load, resize

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS / 255,
        PIXELS.astype(np.float32) / 255,
        np.concatenate([PIXELS, np.full_like(PIXELS[..., :1], 7)], axis=2),
        np.asfortranarray(PIXELS),
        np.repeat(PIXELS, 2, axis=1)[:, ::2],
    ],
    ids=["8 bits", "float64", "float32", "alpha", "Fortran", "strided"],
)
def test_arrays_are_read_as_files_are(array: NDArray[Any], tmp_path: Path) -> None:
    """Of 8 bits or floats, with or without alpha, in any layout; the array stays as it is."""
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    before = array.copy()
    image = load(array)
    assert (image.shape, image.dtype) == ((3, 20, 30), np.float32)
    np.testing.assert_allclose(image, load(tmp_path / "image.png"), atol=1e-6)
    np.testing.assert_allclose(image, PIXELS.transpose(2, 0, 1) / 255, atol=1e-6)
    np.testing.assert_array_equal(array, before)
    check_values(image, "it")


def test_gray_images_are_of_three_equal_channels(tmp_path: Path) -> None:
    """As an array of two or three dimensions, of 8 bits or floats, and as a file."""
    gray = PIXELS[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    expected = load(np.repeat(gray[..., None], 3, axis=2))
    for source in (gray, gray[..., None], gray / 255, tmp_path / "gray.png", str(tmp_path / "gray.png")):
        np.testing.assert_allclose(load(source), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((64, 64, 3), np.nan), "it holds NaN or infinite"),
        (np.full((64, 64), np.inf, np.float32), "it holds NaN or infinite"),
        (np.full((64, 64, 3), 255.0), r"it must lie in \[0, 1\], got 255 to 255"),
        (np.linspace(-0.01, 1, 64 * 64).reshape(64, 64), r"it must lie in \[0, 1\], got -0.01 to 1"),
        (np.zeros((64, 64, 3), np.int64), "it must be of 8 bits or of floats.*int64"),
        (np.zeros((64, 64), np.uint16), "it must be of 8 bits or of floats.*uint16"),
        (np.zeros((64, 64, 2), np.uint8), r"it must be of shape.*got \(64, 64, 2\)"),
        (np.zeros((3, 64, 64), np.uint8), r"it must be of shape.*got \(3, 64, 64\)"),
        (np.zeros(64, np.uint8), r"it must be of shape.*got \(64, 1\)|it must be of shape.*got \(64,\)"),
        (np.zeros((15, 64, 3), np.uint8), "it has 64 x 15 pixels; at least 16"),
        (np.zeros((64, 15)), "it has 15 x 64 pixels; at least 16"),
    ],
)
def test_arrays_that_are_refused(array: NDArray[Any], message: str) -> None:
    """With the name and the reason; without a name, it is the image."""
    with pytest.raises(ValueError, match=message):
        load(array, "it")
    with pytest.raises(ValueError, match=message.replace("it ", "The image ")):
        load(array)


def files(folder: Path) -> dict[str, Path]:
    """Image files of all kinds."""
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    for name, pixels in {
        "deep": np.zeros((64, 64), np.uint16),
        "thin": np.zeros((64, 15), np.uint8),
        "whole": np.zeros((16, 16), np.uint8),
    }.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(np.zeros((64, 64), np.float32)).save(folder / "floats.tif")
    Image.fromarray(PIXELS).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-100])
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message", "by_header"),
    [
        ("text", "text.png cannot be read as an image", False),
        ("empty", "empty.png cannot be read as an image", False),
        ("cut", "cut.png cannot be read as an image", False),
        ("deep", r"deep.png has pixels of mode 'I.*\(more than 8 bits\).*convert", True),
        ("floats", r"floats.tif has pixels of mode 'F'.*convert", True),
        ("thin", "thin.png has 15 x 64 pixels; at least 16", True),
    ],
)
def test_files_that_are_refused(name: str, message: str, by_header: bool, tmp_path: Path) -> None:
    """Those that would be taken for something else are known by their header, for a reader that is not ours."""
    path = files(tmp_path)[name]
    with pytest.raises(ValueError, match=message):
        load(path)
    if by_header:
        with pytest.raises(ValueError, match=message):
            check_file(path)
    else:
        check_file(path)


def test_files_that_are_good_or_gone(tmp_path: Path) -> None:
    """The smallest that is read; and one that is not there."""
    whole = files(tmp_path)["whole"]
    check_file(whole)
    assert load(whole).shape == (3, 16, 16)
    check_file(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"no image .*gone.png"):
        load(tmp_path / "gone.png")


def test_files_in_a_folder(tmp_path: Path) -> None:
    """Those of images that are not hidden, sorted by path, whatever the case of their ending, in other folders too."""
    (tmp_path / "b" / "folder.png").mkdir(parents=True)
    names = ["a.PNG", "b/c.jpeg", "b/d.pgm", "b/folder.png/d.TIFF", "z.webp"]
    (tmp_path / ".trash").mkdir()
    for name in [*names, "notes.txt", "b/.png", "b/._c.jpeg", ".trash/e.png"]:
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in files_in(tmp_path)] == names


def test_linked_folders(tmp_path: Path) -> None:
    """Each is looked into once, by its own path where it has one, without going round; links to images are images."""
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "b").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for path in (root / "b" / "1.png", other / "2.png", other / "deep" / "3.png"):
        path.touch()
    links = {"a": root / "b", "c": other, "d": other, "e": other / "deep", "b/up": root, "f": tmp_path, "g.png": other}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "h.png").symlink_to(root / "b" / "1.png")
    for name in ("i", "i.png"):
        (root / name).symlink_to(name)  # to itself
        (root / f"gone{name}").symlink_to(tmp_path / "gone")
    found = [path.relative_to(root).as_posix() for path in files_in(root)]
    assert found == ["b/1.png", "c/2.png", "c/deep/3.png", "h.png"]


def test_folders_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is found."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scandir = os.scandir

    def vanishing(path: Any) -> Any:  # noqa: ANN401
        if path == str(tmp_path / "a"):
            shutil.rmtree(tmp_path / "b")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert [path.parent.name for path in files_in(tmp_path)] == ["a", "c"]
    assert files_in(tmp_path / "gone") == []


def test_the_formats_that_anomalib_reads() -> None:
    """Are those of the edge."""
    assert set(IMG_EXTENSIONS) == SUFFIXES


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_other_formats_start_no_program(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under another name is not given to Ghostscript, which would run what it says."""
    program = tmp_path / "gs"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "ran"}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / f"part{suffix}"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("value", "fits"), [(-2e-3, False), (-5e-4, True), (1 + 5e-4, True), (1 + 2e-3, False)])
def test_values_that_resampling_has_rounded_are_taken(value: float, fits: bool) -> None:
    """A thousandth beyond the limits, and no more."""
    image = np.full((3, 16, 16), 0.5, np.float32)
    image[1, 2, 3] = value
    if fits:
        assert check_values(image, "it") is image
    else:
        with pytest.raises(ValueError, match=r"it must lie in \[0, 1\]"):
            check_values(image, "it")


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (201, 128), (64, 300), (1000, 61)])
def test_resizes_as_torchvision_does(size: tuple[int, int]) -> None:
    """Larger, smaller and distorted."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = load(pixels)
    expected = Resize((64, 64), antialias=True)(torch.from_numpy(image)).numpy()
    assert np.abs(resize(image, (64, 64)) - expected).max() < 1e-5


def test_hashes_tell_images_apart() -> None:
    """One grey level of one pixel is enough; rounding errors are not."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    image = ((levels / 255 - 0.45) / 0.23).astype(np.float32)
    assert image_hash(image) == image_hash(image + np.float32(1e-9))
    changed = image.copy()
    changed[1, 3, 4] += 1 / 255 / 0.23
    assert image_hash(changed) != image_hash(image)
    assert image_hash(image[..., ::-1]) != image_hash(image)
    # Hashes are kept in checkpoints, so they stay what they are.
    assert image_hash(np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 7) == -665047435142560193
