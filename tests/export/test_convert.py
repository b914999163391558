# SPDX-License-Identifier: Apache-2.0
"""Tests of how a model becomes a graph: its sizes and batches, and what remains when that fails."""

import errno
import os
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType
from anomalib.pre_processing import PreProcessor
from openvino_telemetry.backend.backend_ga4 import GA4Backend
from openvino_telemetry.utils.sender import TelemetrySender
from torch import nn
from torchvision.transforms.v2 import Resize
from torchvision.transforms.v2.functional import resize

from anomalib_ext.export import BundleContent, export_bundle
from anomalib_ext.export.convert import without_telemetry
from anomalib_ext.models import ContinualPatchCore
from openvino_export.bundle import folder as bundles
from openvino_export.bundle import ir
from openvino_export.bundle.constants import graph_tables

Make = Callable[..., Any]


class Mean(nn.Module):
    """The smallest graph."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: PLR6301
        """Score images by their brightness."""
        return {"pred_score": images.mean(dim=(1, 2, 3))}


@pytest.mark.usefixtures("one_conversion")
def test_a_fixed_batch(
    small_two: ContinualPatchCore,
    product_images: torch.Tensor,
    assert_like_torch: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """Processors that need one get it by Anomalib's own argument."""
    path = make_engine().export(small_two, "openvino", export_root=tmp_path, ov_kwargs={"input": [1, 3, 64, 64]})
    assert not ov.Core().read_model(path).is_dynamic()
    assert not ov.Core().read_model(path.with_name("features.xml")).is_dynamic()
    assert_like_torch(path, small_two, product_images[:1])


def test_other_sizes(
    small_two: ContinualPatchCore,
    product_images: torch.Tensor,
    assert_like_torch: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """Images of another size are resized inside; without any, the size must be given."""
    larger = nn.functional.interpolate(product_images, size=(96, 80))
    path = make_engine().export(small_two, "openvino", export_root=tmp_path, input_size=(96, 80))
    assert ov.Core().read_model(path).inputs[0].partial_shape.to_string() == "[?,3,96,80]"
    assert_like_torch(path, small_two, larger)

    for pre_processor in (False, PreProcessor(Resize(64))):
        small_too = deepcopy(small_two)
        small_too.pre_processor = pre_processor or None
        with pytest.raises(ValueError, match="give input_size"):
            small_too.to_openvino(tmp_path / "none")
    assert not (tmp_path / "none" / "weights" / "openvino").exists()


@pytest.mark.usefixtures("one_conversion")
def test_order_of_equals(small_two: ContinualPatchCore, tmp_path: Path) -> None:
    """A search takes any of equally near vectors, also once the bank has grown. Votes have an order."""

    def is_stable(graph: ov.Model) -> dict[bool, bool]:
        nodes = [node for node in graph.get_ops() if node.get_type_name() == "TopK"]
        return {node.get_input_element_type(0).is_real(): node.get_attributes()["stable"] for node in nodes}

    path = small_two.to_openvino(tmp_path)
    assert is_stable(ov.Core().read_model(path)) == {True: False, False: True}
    bank = small_two.model.bank.with_size(500)
    tables = graph_tables(bank, small_two.model.memory_bank.shape[1], capacity=64)
    files = ir.with_tables(path.read_bytes(), path.with_suffix(".bin").read_bytes(), tables)
    grown = ov.Core().read_model(files["model.xml"], files["model.bin"])
    assert is_stable(grown) == {True: False, False: True}


@pytest.mark.usefixtures("one_conversion")
def test_images_of_any_size(
    small_two: ContinualPatchCore,
    product_images: torch.Tensor,
    torch_outputs: Make,
    assert_exported: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """Without a given size, an image of any is resized as the pre-processor does when it learns."""
    path = make_engine().export(small_two, "openvino", export_root=tmp_path)
    larger = nn.functional.interpolate(product_images, size=(200, 150)) * torch.rand(200, 150)
    assert_exported(path, larger, torch_outputs(small_two, resize(larger, [64, 64], antialias=True)))


def test_nothing_is_reported(small_two: ContinualPatchCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's converter would send to Intel that it was used, if the user has not said no."""
    sent: list[Any] = []
    monkeypatch.setattr(GA4Backend, "send", lambda _, message: sent.append(message))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    export_bundle(small_two, lambda *_: BundleContent(Mean()), tmp_path)
    assert not sent


def test_exports_at_once() -> None:
    """When two that overlap are done, other users of OpenVINO report as before."""
    send = TelemetrySender.send
    began, joined, ended = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with without_telemetry():
            began.set()
            joined.wait(0.2)  # the other one need not get in before this one is out
        ended.set()

    def second() -> None:
        with without_telemetry():
            joined.set()
            ended.wait(10)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert began.wait(10)
    assert TelemetrySender.send is not send
    threads[1].start()
    for thread in threads:
        thread.join()
    assert TelemetrySender.send is send


@pytest.mark.usefixtures("one_conversion")
def test_a_failed_export_leaves_the_old_bundle(
    small_two: ContinualPatchCore,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever fails, and whenever; a later export replaces it."""
    folder = make_engine().export(small_two, "openvino", export_root=tmp_path).parent

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before = files()
    assert not {".staging", ".next"} & {path.name for path in folder.iterdir()}
    for kwargs, message in (
        ({"model_file_name": "other"}, "holds its graph in model.xml"),
        ({"compression_type": CompressionType.INT8_PTQ}, "needs a datamodule"),
        ({"onnx_kwargs": {"input_names": ["x"]}}, "may not hold input_names"),
    ):
        with pytest.raises(ValueError, match=message):
            small_two.to_openvino(tmp_path, **kwargs)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space")

        patch.setattr(os, "fsync", full)
        with pytest.raises(bundles.BundleError, match=r"no space.*The disk is full"):
            small_two.to_openvino(tmp_path, compression_type=CompressionType.FP16)
    assert files() == before
    assert not {".staging", ".next"} & {path.name for path in folder.iterdir()}
    small_two.to_openvino(tmp_path, compression_type=CompressionType.FP16)
    assert bundles.read(folder).metadata["compression"] == "FP16"
