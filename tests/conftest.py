# SPDX-License-Identifier: Apache-2.0
"""What the tests of the models share: small products, datamodules and models, all without network."""

import faulthandler
import inspect
import io
import logging
import os
import random
import shutil
import sys
import warnings
from contextlib import redirect_stdout

# Before anything reads them. For so little work, threads cost more than they give.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from importlib import import_module
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
        defaults = {"pre_processor": pre_processor, "visualizer": False, "memory_size": 400}
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


@pytest.fixture(scope="session")
def trained(make_model: Callable[..., Any], products: Path) -> Any:  # noqa: ANN401
    """Return a model of one product; tests that change it take a copy."""
    model = make_model()
    model.partial_fit(sorted((products / "stripes" / "train" / "good").iterdir()), "stripes")
    return model.eval()


@pytest.fixture(scope="session")
def exported(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ANN401
    """Return its bundle, which is not to be changed."""
    from anomalib.engine import Engine

    return Path(Engine(logger=False).export(trained, "openvino", tmp_path_factory.mktemp("export"))).parent


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def model_config() -> dict[str, Any]:
    """Return what a configuration says of the model that :func:`make_model` makes."""
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [SIDE, SIDE], "antialias": True}}
    normalize = {
        "class_path": "torchvision.transforms.v2.Normalize",
        "init_args": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    transform = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [resize, normalize]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": transform}}
    return {
        "class_path": "ContinualPatchCore",
        "init_args": {"pre_processor": pre_processor, "memory_size": 400},
    }


@pytest.fixture(scope="session")
def run_command() -> Callable[..., str]:
    """Return a function that runs ``anomalib-ext`` in this process, and returns what it has printed."""
    from anomalib_ext.cli import main

    def run(folder: Path, *arguments: str) -> str:
        loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_fabric")]
        levels = [logger.level for logger in loggers]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(printed):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["anomalib-ext", *arguments])
            patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
            try:
                main()
            finally:
                for logger, level in zip(loggers, levels, strict=True):
                    logger.setLevel(level)
        return printed.getvalue()

    return run


# Exports


@pytest.fixture(scope="session")
def product_images(products: Path) -> Any:  # noqa: ANN401
    """Return two good and two bad images of each of two products, shape ``(8, 3, SIDE, SIDE)``."""
    import torch

    paths = [
        products / product / "test" / kind / f"00{i}.png"
        for product in PRODUCTS[:2]
        for kind in ("good", "hole")
        for i in range(2)
    ]
    arrays = np.stack([np.asarray(Image.open(path), np.float32) for path in paths])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="session")
def make_two(make_model: Callable[..., Any], products: Path) -> Callable[..., Any]:
    """Return a function that makes a model that has learned these two products."""

    def make(**kwargs: Any) -> Any:  # noqa: ANN401
        model = make_model(**kwargs)
        for product in PRODUCTS[:2]:
            model.partial_fit(sorted((products / product / "train" / "good").iterdir()), product)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def small_two(make_two: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Return such a model with the smallest backbone; tests that change it take a copy."""
    return make_two(backbone="test_resnet", layers=["layer1"], pre_trained=False)


@pytest.fixture(scope="session")
def torch_outputs() -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that gives what a model says in torch, by name."""
    import torch

    def run(model: torch.nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: value.numpy() for name, value in model(images)._asdict().items() if value is not None}

    return run


@pytest.fixture(scope="session")
def assert_exported() -> Callable[..., None]:
    """Return a function that compares a file in OpenVINO, on all images and on each alone, with what is expected.

    Scores, maps and labels are the same, and nearly all pixels of masks, of which some may lie at the threshold. For
    several images, the file must take any number.
    """
    import openvino as ov

    def check(path: Path, images: Any, expected: dict[str, np.ndarray], tolerance: float = 1e-3) -> None:  # noqa: ANN401
        # The default of processors with bfloat16 changes the scores in the second digit.
        compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert compiled.inputs[0].partial_shape[0].is_dynamic == (len(images) > 1)
        for part in (slice(None), *(slice(i, i + 1) for i in range(len(images)) if len(images) > 1)):
            result = {next(iter(key.names)): value for key, value in compiled(images[part].numpy()).items()}
            assert set(result) == set(expected)
            for name, all_values in expected.items():
                value = all_values[part]
                assert result[name].shape == value.shape
                if name == "pred_label":  # an image that set the threshold lies on it
                    clear = np.abs(expected["pred_score"][part] - 0.5) > tolerance
                    assert np.array_equal(result[name][clear], value[clear])
                elif value.dtype == bool:
                    assert (result[name] != value).mean() < 1e-3, name
                else:
                    assert np.abs(result[name] - value).max() < tolerance, name
        if "pred_label" in expected:
            assert (np.abs(expected["pred_score"] - 0.5) > tolerance).any(), "no label was compared"

    return check


@pytest.fixture(scope="session")
def assert_like_torch(torch_outputs: Callable[..., Any], assert_exported: Callable[..., None]) -> Callable[..., None]:
    """Return a function that compares a file in OpenVINO with the model that it was exported from."""

    def check(path: Path, model: Any, images: Any, tolerance: float = 1e-3) -> None:  # noqa: ANN401
        assert_exported(path, images, torch_outputs(model, images), tolerance)

    return check


@pytest.fixture(scope="session")
def conversions() -> Any:  # noqa: ANN401
    """Return the graphs of :func:`one_conversion`, by model."""
    from weakref import WeakKeyDictionary

    return WeakKeyDictionary()


@pytest.fixture
def one_conversion(conversions: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """Have exports of a model that has not changed share one conversion by ONNX, which takes seconds.

    All else is done anew for each of them.
    """
    convert = import_module("anomalib_ext.export.convert")._convert_module

    def shared(module: Any, name: str, example: Any, tables: Any, *kwargs: Any) -> Any:  # noqa: ANN401
        model = next((getattr(module, key) for key in ("owner", "model") if hasattr(module, key)), module)
        shapes = {table: values.shape for table, (_, values) in tables.items()}
        key = repr((type(module), name, example.shape, shapes, kwargs))
        graphs = conversions.setdefault(model, {})
        if key not in graphs:
            graphs[key] = convert(module, name, example, tables, *kwargs)
        return graphs[key].clone()

    monkeypatch.setattr("anomalib_ext.export.convert._convert_module", shared)
