# SPDX-License-Identifier: Apache-2.0
"""What the tests of the models share: small products, datamodules and models, all without network."""

import faulthandler
import inspect
import os
import random

# Before anything reads them. For so little work, threads cost more than they give.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from PIL import Image

SIDE = 64
PRODUCTS = ("stripes", "dots", "checks")


def product_image(product: str, rng: np.random.Generator, defect: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image ``(SIDE, SIDE, 3)`` of a product, and the mask of its defect."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    period = 2 * np.pi / 16
    wave = {
        "stripes": np.sin(columns * period),
        "dots": np.sin(columns * period) * np.sin(rows * period),
        "checks": np.sign(np.sin(columns * period / 2)) * np.sign(np.sin(rows * period / 2)),
    }[product]
    color = np.roll([70, 20, -40], PRODUCTS.index(product))
    image = 128 + wave[..., None] * color + rng.normal(0, 3, (SIDE, SIDE, 3))
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    if defect:
        row, column = rng.integers(12, SIDE - 28, 2)
        mask[row : row + 16, column : column + 16] = True
        image[mask] = rng.uniform(0, 255, (16 * 16, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have loaders shuffle alike in every run, a crash say where it was, and an export be quick."""
    import torch
    import torch.fx.config

    # Lightning's trainer resets the handler of every signal that Python does not know of, this one's among them.
    faulthandler.enable(item.config.stash[fault_handler_stderr_fd_key])
    # An export would note with each node where in the program it was made: nearly half of its time.
    torch.fx.config.do_not_emit_stack_traces = True
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # Anomalib's own generators
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def set_defaults() -> Callable[..., None]:
    """Return a function that changes what a function takes where its caller gives nothing."""

    def change(patch: pytest.MonkeyPatch, function: Any, **values: Any) -> None:  # noqa: ANN401
        parameters = inspect.signature(function).parameters.values()
        names = [each.name for each in parameters if each.default is not each.empty]
        defaults = dict(zip(names, function.__defaults__, strict=True))
        assert values.keys() <= defaults.keys()
        patch.setattr(function, "__defaults__", tuple({**defaults, **values}.values()))

    return change


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of :data:`PRODUCTS` in the layout of MVTec AD: 20 images to learn, 6 good and 6 bad to test."""
    root = tmp_path_factory.mktemp("products")
    for seed, product in enumerate(PRODUCTS):
        rng = np.random.default_rng(seed)
        for kind, count in (("train/good", 20), ("test/good", 6), ("test/hole", 6)):
            for index in range(count):
                image, mask = product_image(product, rng, defect=kind == "test/hole")
                path = root / product / kind / f"{index:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
                if mask.any():
                    path = root / product / "ground_truth" / "hole" / f"{index:03}_mask.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return root


@pytest.fixture(scope="session")
def make_data(products: Path) -> Callable[..., Any]:
    """Return a function that makes the datamodule of a product."""
    from anomalib.data import MVTecAD

    def make(product: str = "stripes", **kwargs: Any) -> MVTecAD:  # noqa: ANN401
        return MVTecAD(products, product, **{"train_batch_size": 8, "num_workers": 0, **kwargs})

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Return a function that makes a model for images of :data:`SIDE` pixels, with the default backbone."""
    from anomalib_ext.models import ContinualPatchCore

    def make(**kwargs: Any) -> ContinualPatchCore:  # noqa: ANN401
        pre_processor = ContinualPatchCore.configure_pre_processor((SIDE, SIDE))
        defaults = {"pre_processor": pre_processor, "visualizer": False, "memory_size": 400, "one_shot": False}
        return ContinualPatchCore(**{**defaults, **kwargs})

    return make


@pytest.fixture
def make_engine(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes a quiet engine."""
    from anomalib.engine import Engine

    def make(**kwargs: Any) -> Engine:  # noqa: ANN401
        defaults = {"default_root_dir": tmp_path / "results", "accelerator": "cpu", "enable_progress_bar": False}
        return Engine(**{**defaults, "enable_model_summary": False, **kwargs})

    return make
