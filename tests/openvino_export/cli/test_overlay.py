# SPDX-License-Identifier: Apache-2.0
"""Heat maps over images."""

import os
import time
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openvino_export.cli.overlay import heat_map_name, refuse_output_among_images, write_overlay
from openvino_export.detector import EdgeDetector, Prediction


@pytest.mark.parametrize("thresholds", [True, False])
def test_overlay(tmp_path: Path, thresholds: bool) -> None:
    """What is anomalous turns red and is framed in white if there are thresholds; the rest stays as it is."""
    anomaly_map = np.full((8, 8), 0.1, np.float32)
    anomaly_map[4:, 4:] = 0.9
    mask = anomaly_map > 0.5 if thresholds else None
    result = Prediction(0.9, thresholds or None, anomaly_map, mask, None)
    image = np.full((80, 80, 3), 100, np.uint8)
    write_overlay(result, image, tmp_path / "deep" / "map.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "map.png")).astype(int)
    assert pixels.shape == image.shape
    assert (pixels[:30, :30] == 100).all()
    red, green, blue = pixels[70, 70]
    assert red > 150 > max(green, blue)
    assert (pixels == 255).all(axis=2).any() == thresholds


@pytest.mark.parametrize(("side", "other", "expected"), [(724, 724, (724, 724)), (4096, 1025, (1366, 342))])
def test_large_images_are_reduced(tmp_path: Path, side: int, other: int, expected: tuple[int, int]) -> None:
    """To half a megapixel at most, in proportion; what is marked stays where it is."""
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[6:, 6:] = 1
    result = Prediction(
        pred_score=1, pred_label=True, anomaly_map=anomaly_map, pred_mask=anomaly_map > 0.5, variant=None
    )
    Image.new("L", (side, other), 100).save(tmp_path / "image.png")
    for image in (tmp_path / "image.png", np.full((other, side, 3), 100, np.uint8)):
        write_overlay(result, image, tmp_path / "map.png")
        with Image.open(tmp_path / "map.png") as overlay:
            assert overlay.size == expected
            assert overlay.getpixel((10, 10)) == (100, 100, 100)
            red, _, blue = overlay.getpixel((expected[0] - 20, expected[1] - 20))  # type: ignore[misc]
        assert red > 150 > blue


def test_overlay_is_quicker_than_judging(exported: Path, tmp_path: Path) -> None:
    """Of a large image, though the file is decoded again."""
    pixels = np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.bmp")
    detector = EdgeDetector(exported)
    result = detector.predict(tmp_path / "image.bmp")
    judging, writing = [], []
    for _ in range(4):
        start = time.perf_counter()
        detector.predict(tmp_path / "image.bmp")
        judging.append(time.perf_counter() - start)
        write_overlay(result, tmp_path / "image.bmp", tmp_path / "map.png")
        writing.append(time.perf_counter() - start - judging[-1])
    assert min(writing) < min(judging)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            "{}{}{}".format,
            st.sampled_from(["", "d/", "D/", "a.png/"]),
            st.text("aAk\u212aßsäÄ\u0308 .-\n\udcff", min_size=1, max_size=4).filter(lambda text: text[0] != "."),
            st.sampled_from([".png", ".PNG", ".jpg", ".jpg.png", ".png.png", ".JPG.png", ".tif"]),
        ),
        unique=True,
        max_size=40,
    ),
    st.integers(0, 300),
)
def test_heat_maps_never_overwrite_each_other(names: list[str], length: int) -> None:
    """Whatever the names: also where case and the form of accents do not count, and of names of maps themselves."""
    names = [*names, *{f"{letter}{'n' * (length - 5)}.{suffix}" for letter in "xX" for suffix in ("png", "jpg")}]
    maps = [heat_map_name(name) for name in names]
    names += [one for one in maps if one not in names]  # whoever judges heat maps
    maps = [heat_map_name(name) for name in names]
    as_one = {normalize("NFD", normalize("NFD", one).casefold()) for one in maps}
    assert len(as_one) == len(names)
    for name, one in zip(names, maps, strict=True):
        assert Path(one).parent == Path(name).parent
        assert one.endswith(".png")
        if len(Path(name).name) < 250:
            assert len(Path(one).name.encode()) <= 255


def test_names_of_heat_maps() -> None:
    """Common names stay as they are."""
    names = {"part.png": "part.png", "a/part.jpg": "a/part.jpg.png", "line_000001": "line_000001.png", "ä.png": "ä.png"}
    assert {name: heat_map_name(name) for name in names} == names
    assert heat_map_name("d/Part.PNG") == "d/Part.PNG-5e3849ea371306dd.png"  # as in folders that are there
    assert len(os.fsencode(heat_map_name(f"x{'ä' * 124}.jpeg"))) == 255 - 1  # cut between two letters


def test_an_output_in_a_folder_that_is_linked(tmp_path: Path) -> None:
    """Its heat maps would be taken for images, so it is refused."""
    (tmp_path / "images").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "other")
    refuse_output_among_images(str(tmp_path / "maps"), str(tmp_path / "images"))
    for output in (tmp_path / "other" / "maps", tmp_path / "images" / "link"):
        with pytest.raises(ValueError, match="would mix with the images"):
            refuse_output_among_images(str(output), str(tmp_path / "images"))
