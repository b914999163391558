# SPDX-License-Identifier: Apache-2.0
"""Tests of where a defect is: masks and boxes, as shares of patches."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvino_export import images
from openvino_export.learning import region_of_patches, regions_of


def test_boxes_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image of 40 x 60 pixels in patches of 10 x 10; a box may reach beyond the image."""
    expected = np.zeros((4, 6), np.float32)
    expected[1, 2:4] = 1, 0.5
    mask = np.zeros((40, 60), bool)
    mask[10:20, 20:35] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    boxes = ((20, 10, 35, 20), [20, 10, 35, 20], np.array([20, 10, 35, 20]), (19.8, 10.1, 35.0, 20.0))
    masks = (mask, mask[..., None], mask.astype(np.uint8), 255 * mask.astype(int), mask / 9)
    for region in (*boxes, *masks, tmp_path / "mask.png", str(tmp_path / "mask.png")):
        np.testing.assert_allclose(region_of_patches(region, (40, 60), (4, 6), "part"), expected, atol=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(images, "BAND", 100)  # a row at a time
            np.testing.assert_allclose(region_of_patches(region, (40, 60), (4, 6), "part"), expected, atol=1e-6)
    whole = region_of_patches((-5, -5, 99, 99), (40, 60), (4, 6), "part")
    np.testing.assert_allclose(whole, 1, rtol=1e-6)


def test_regions_that_mark_nothing() -> None:
    """Beside the image, the wrong way round, an empty mask, and one of another size."""
    for region in ((60, 0, 70, 9), (9, 9, 3, 12), np.zeros((40, 60), bool)):
        with pytest.raises(ValueError, match=r"of part\.png marks nothing of it; it has 60 x 40 pixels"):
            region_of_patches(region, (40, 60), (4, 6), "part.png")
    with pytest.raises(ValueError, match=r"is of shape \(60, 40\), the image of \(40, 60\)"):
        region_of_patches(np.ones((60, 40), bool), (40, 60), (4, 6), "part.png")
    for box in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, np.nan)):
        with pytest.raises(ValueError, match="not left, top, right and bottom in pixels"):
            region_of_patches(box, (40, 60), (4, 6), "part.png")
    with pytest.raises(FileNotFoundError, match="There is no image"):
        region_of_patches("nowhere.png", (40, 60), (4, 6), "part.png")


def test_one_region_for_each_image() -> None:
    """None, one for a single image, or as many as images."""
    box, mask = (1, 2, 3, 4), np.ones((20, 20), bool)
    assert regions_of(None, 2, defective=False) == [None, None]
    for one in (box, [1.0, 2, 3, 4], (np.int64(1), 2, 3, 4)):
        assert regions_of(one, 1, defective=True) == [one]
    assert regions_of([[1, 2, 3, 4], "mask.png"], 2, defective=True) == [[1, 2, 3, 4], "mask.png"]
    assert regions_of(Path("mask.png"), 1, defective=True) == [Path("mask.png")]
    assert regions_of(mask, 1, defective=True)[0] is mask
    for regions, count in ((box, 2), ([], 1), ([box, box], 1)):
        with pytest.raises(ValueError, match="give one for each image"):
            regions_of(regions, count, defective=True)
    with pytest.raises(ValueError, match="give them with defective=True"):
        regions_of(box, 1, defective=False)
