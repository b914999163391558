# SPDX-License-Identifier: Apache-2.0
"""Tests of compression: what it may lose, and that it is refused when it loses more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType, ExportType

from anomalib_ext import export
from anomalib_ext.models import ContinualPatchCore
from openvino_export.bundle import folder as bundles

Make = Callable[..., Any]


@pytest.mark.usefixtures("one_conversion")
def test_compression_to_half_precision(
    small_two: ContinualPatchCore,
    product_images: torch.Tensor,
    assert_like_torch: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """It keeps the decisions; the size of the images may be fixed."""
    path = make_engine().export(
        small_two,
        ExportType.OPENVINO,
        export_root=tmp_path,
        input_size=(64, 64),
        compression_type=CompressionType.FP16,
    )
    assert 'element_type="f16"' in path.read_text()
    assert_like_torch(path, small_two, product_images, tolerance=0.02)


@pytest.mark.usefixtures("one_conversion")
@pytest.mark.parametrize("compression", ["FP16", "INT8", "INT8_PTQ"])
def test_compression_that_loses_too_much_is_refused(
    compression: str,
    small_two: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both figures are named, and the old bundle remains."""
    kwargs = {"export_root": tmp_path, "compression_type": CompressionType[compression]}
    path = make_engine().export(small_two, "openvino", export_root=tmp_path)
    before = path.with_suffix(".bin").read_bytes()
    data = make_data("stripes")
    compress = export.compress_graph

    def damaged(*args: Any) -> ov.Model:  # noqa: ANN401
        model = compress(*args).clone()
        first = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution")
        readers = first.output(0).get_target_inputs()
        nothing = ov.opset13.multiply(first.output(0), np.float32(0))
        for reader in readers:
            reader.replace_source_output(nothing.output(0))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(export, "compress_graph", damaged)
        name = compression.partition("_")[0]
        with pytest.raises(
            ValueError, match=rf"{name} loses more than max_drop=0.01 .*AUROC \d\.\d+ \(FP32: 1\.0000\)"
        ):
            small_two.to_openvino(datamodule=data, **kwargs)
    assert path.with_suffix(".bin").read_bytes() == before
    small_two.to_openvino(datamodule=data, **kwargs)
    assert path.with_suffix(".bin").read_bytes() != before


@pytest.mark.usefixtures("one_conversion")
def test_compression_checked_without_anomalous_images(
    small_two: ContinualPatchCore,
    products: Path,
    tmp_path: Path,
) -> None:
    """Where there is no AUROC, the decisions on normal images are compared."""
    folder = products / "stripes"
    data = Folder("stripes", root=folder, normal_dir="train/good", normal_test_dir="test/good", num_workers=0)
    path = small_two.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    assert bundles.read(path.parent).metadata["accuracy"].keys() == {"equal decisions"}
