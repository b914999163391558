# SPDX-License-Identifier: Apache-2.0
"""Tests of the noise: its statistics, its boxes, and its covariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ext.models.het_net import noise as module
from anomalib_ext.models.het_net.noise import NUM_SAMPLES, LocalGaussianNoise, _crop, _random_boxes

CHANNELS = (2, 3, 4)
GRID = torch.Size((4, 6))


def levels(images: int, seed: int = 0) -> list[torch.Tensor]:
    """Return maps of three levels, in which neighbouring channels and places go together."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(images, 1, 1, 1, generator=generator)
    shapes = [(images, c, GRID[0] * f, GRID[1] * f) for c, f in zip(CHANNELS, (4, 2, 1), strict=True)]
    return [common + torch.randn(shape, generator=generator) + 3 for shape in shapes]


def fitted(noise: str, images: int = 30, batch: int = 7) -> tuple[LocalGaussianNoise, list[torch.Tensor]]:
    """Return noise that was fitted in batches, and the maps it was fitted to."""
    maps = levels(images)
    result = LocalGaussianNoise(noise)
    result.fit(([level[s : s + batch] for level in maps] for s in range(0, images, batch)), images)
    return result, maps


@pytest.mark.parametrize("images", [2, 30, NUM_SAMPLES, NUM_SAMPLES + 35])
def test_statistics(images: int) -> None:
    """The mean is of all images; the deviations are of images that are spread evenly, first and last included."""
    noise, maps = fitted("mgd", images)
    chosen = [round(i * (images - 1) / (min(images, NUM_SAMPLES) - 1)) for i in range(min(images, NUM_SAMPLES))]
    for mean, deviations, level in zip(noise.means, noise.deviations, maps, strict=True):
        torch.testing.assert_close(mean, level.mean(0))
        kept = level[chosen].half().float()
        torch.testing.assert_close(deviations.float(), kept - kept.mean(0), atol=2e-3, rtol=2e-3)


BOX = slice(1, 2), slice(3, 4)


def draws(noise: LocalGaussianNoise, count: int) -> torch.Tensor:
    """Return draws of a box of one cell of the smallest map, all levels flattened, shape ``(count, values)``."""
    cells = [_crop(level, BOX, GRID) for level in noise.means]
    return torch.stack([torch.cat([v.flatten() for v in noise._draw(cells, BOX, GRID)]) for _ in range(count)])


def test_the_samplers_covariance_is_that_of_the_images() -> None:
    """Exactly, across channels, places and levels: by the unit vectors in place of random numbers."""
    noise, maps = fitted("mgd")
    flat = torch.cat([_crop(level, BOX, GRID).flatten(1) for level in maps], dim=1)
    rows = []
    for unit in torch.eye(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.torch, "randn", lambda *_, unit=unit: unit)
            rows.append(draws(noise, 1)[0])
    mean = torch.cat([_crop(level, BOX, GRID).flatten() for level in noise.means])
    factor = torch.stack(rows) - mean
    torch.testing.assert_close(factor.T @ factor, torch.cov(flat.T), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(mean, flat.mean(0))


def test_draws_are_gaussian_with_that_covariance() -> None:
    """So are many random draws, within what chance allows."""
    noise, maps = fitted("mgd")
    drawn = draws(noise, 4000)
    flat = torch.cat([_crop(level, BOX, GRID).flatten(1) for level in maps], dim=1)
    assert (drawn.mean(0) - flat.mean(0)).abs().max() < 0.15
    assert (torch.cov(drawn.T) - torch.cov(flat.T)).abs().max() < 0.35
    assert torch.cov(flat.T).max() > 1.5


def test_diagonal_draws_have_the_same_deviation_and_no_correlation() -> None:
    """The channels of ``diag`` are independent."""
    noise, maps = fitted("diag")
    drawn = draws(noise, 4000)
    flat = torch.cat([_crop(level, BOX, GRID).flatten(1) for level in maps], dim=1)
    covariance = torch.cov(drawn.T)
    torch.testing.assert_close(covariance.diagonal(), flat.var(0), atol=0.3, rtol=0.1)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.25


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.sampled_from(["mgd", "diag", "randn"]))
def test_noise_touches_only_its_boxes(seed: int, noise: str) -> None:
    """At each level just the cells of the boxes change, at the same place; the input stays as it is."""
    model, _ = fitted(noise, images=5)
    maps = levels(3, seed=1)
    before = [level.clone() for level in maps]
    torch.manual_seed(seed)
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def boxes(height: int, width: int) -> list[module.Box]:
            seen.append(list(_random_boxes(height, width)))
            return seen[-1]

        patch.setattr(module, "_random_boxes", boxes)
        noisy = model(maps)
    assert len(seen) == 3
    for level, original, changed in zip(maps, before, noisy, strict=True):
        assert torch.equal(level, original)
        factor = level.shape[-1] // GRID[1]
        for image, places in enumerate(seen):
            mask = torch.zeros(GRID, dtype=torch.bool)
            for rows, columns in places:
                assert 1 <= rows.stop - rows.start <= 4
                assert 1 <= columns.stop - columns.start <= 4
                mask[rows, columns] = True
            mask = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            different = (changed[image] != level[image]).any(0)
            assert torch.equal(different, mask)


def test_boxes_are_anywhere_and_of_all_sizes() -> None:
    """Every cell is covered at some time, every number of boxes and every side occurs."""
    drawn = [list(_random_boxes(5, 16)) for _ in range(400)]
    assert {len(boxes) for boxes in drawn} == set(range(1, 9))
    flat = [box for boxes in drawn for box in boxes]
    assert {rows.stop - rows.start for rows, _ in flat} == {1, 2, 3, 4}
    assert {rows.start for rows, _ in flat} == set(range(5))
    assert max(columns.stop for _, columns in flat) == 16
    assert max(rows.stop for rows, _ in flat) == 5


def test_no_noise_and_bad_use() -> None:
    """``none`` gives the maps back; missing statistics, too few images and unknown modes are named."""
    maps = levels(2)
    assert all(torch.equal(a, b) for a, b in zip(LocalGaussianNoise("none")(maps), maps, strict=True))
    with pytest.raises(RuntimeError, match="statistics of the noise are missing"):
        LocalGaussianNoise("mgd")(maps)
    with pytest.raises(ValueError, match="at least 2"):
        LocalGaussianNoise("diag").fit([levels(1)], 1)
    with pytest.raises(ValueError, match="noise must be one of mgd, diag, randn, none, got 'salt'"):
        LocalGaussianNoise("salt")
