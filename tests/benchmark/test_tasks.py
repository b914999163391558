# SPDX-License-Identifier: Apache-2.0
"""Streams of products, and products that drift."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from anomalib_ext.benchmark.tasks import DRIFTS, Images, Task, mixed_stream, product_streams


def _tasks(*counts: int) -> list[Task]:
    """Tasks whose images say which task and image they are."""
    nothing = Images(torch.empty(0), torch.empty(0), None, torch.Size([8, 8]))
    return [
        Task(f"task {number}", f"task {number}", _numbered(number, count), nothing, nothing, is_split=False)
        for number, count in enumerate(counts)
    ]


def _numbered(number: int, count: int) -> np.ndarray:
    return np.stack([np.full(count, number), np.arange(count)], axis=1)[:, None].astype(np.float32)


def test_orders() -> None:
    """As given, in reverse, then shuffled; each step is one product with all its images."""
    streams = product_streams(_tasks(3, 4, 5), orders=4, seed=0)
    names = [[task.name for task in stream.tasks] for stream in streams]
    assert names[0] == names[1][::-1] == ["task 0", "task 1", "task 2"]
    assert all(sorted(order) == names[0] for order in names)
    for stream in streams:
        for known, (step, task) in enumerate(zip(stream.steps, stream.tasks, strict=True), start=1):
            assert (step.task, step.known) == (task, known)
            np.testing.assert_array_equal(sorted(image[0, 1] for image in step.images), task.train[:, 0, 1])


def test_mixed_stream_has_no_boundaries() -> None:
    """Every image comes once, neighbors overlap, and nothing says which product an image shows."""
    tasks = _tasks(20, 30, 10)
    stream = mixed_stream(tasks, seed=0)
    images = [tuple(image[0].tolist()) for step in stream.steps for image in step.images]
    assert sorted(images) == [(number, index) for number, task in enumerate(tasks) for index in range(len(task.train))]
    products = [product for product, _ in images]
    assert sum(before != after for before, after in pairwise(products)) > 10
    assert products.index(0.0) < products.index(1.0) < products.index(2.0)
    seen: set[float] = set()
    for step in stream.steps:
        seen |= {image[0, 0] for image in step.images}
        assert step.task is None
        assert seen == set(range(step.known))


@example([2, 2, 2], 43)  # without another draw, a step would have no image
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_mixed_stream_of_unequal_products(counts: list[int], seed: int) -> None:
    """Every product has begun by the end of its step, so that nothing is missing in R for the metrics."""
    stream = mixed_stream(_tasks(*counts), seed)
    assert len(stream.steps) == len(counts)
    assert sum(len(step.images) for step in stream.steps) == sum(counts)
    seen: set[float] = set()
    for number, step in enumerate(stream.steps, start=1):
        seen |= {image[0, 0] for image in step.images}
        assert seen == set(range(step.known))
        assert step.known >= number


@pytest.mark.parametrize("kind", DRIFTS)
def test_drift_grows(kind: str) -> None:
    """Later levels change an image more than earlier ones; a mask moves with its image."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack([rows / 63, columns / 63, ((rows // 8 + columns // 8) % 2).float()])
    mask = image[2:]
    changes = []
    for level in (1, 10):
        rng = np.random.default_rng(0)
        drifted = [DRIFTS[kind](level, rng, image, mask) for _ in range(8)]
        changes.append(np.mean([float((changed - image).abs().mean()) for changed, _ in drifted]))
        for changed, moved in drifted:
            assert changed.shape == image.shape
            assert moved.shape == mask.shape
            if kind == "geometry":
                assert float(((changed[2:] > 0.5) == (moved > 0.5)).float().mean()) > 0.97
            else:
                assert torch.equal(moved, mask)
    assert changes[1] > 2 * changes[0]
