# SPDX-License-Identifier: Apache-2.0
"""Tests of the constants in a graph: each is found by its name, and changed without a trace in any other."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from openvino_export import EdgeDetector
from openvino_export.bundle.folder import BundleError
from openvino_export.bundle.ir import find_constants, with_new_values


def test_constants_that_share_bytes_are_refused() -> None:
    """Changing one would change the other."""
    layer = '<layer id="0" name="{}" type="Const"><data element_type="f32" shape="2" offset="{}" size="8"/>'
    xml = (layer.format("bank.vectors", 0) + layer.format("other", 4)).encode()
    with pytest.raises(BundleError, match=r"bank.vectors and other of model.xml share"):
        find_constants(xml, ["bank.vectors"])
    apart = (layer.format("bank.vectors", 0) + layer.format("other", 8)).encode()
    places = find_constants(apart, ["bank.vectors"])
    assert with_new_values(bytes(16), places, {"bank.vectors": np.ones(2)}) == np.float32([1, 1]).tobytes() + bytes(8)
    with pytest.raises(BundleError, match="not of one export"):
        with_new_values(bytes(4), places, {"bank.vectors": np.ones(2)})
    with pytest.raises(BundleError, match="not of one export"):
        with_new_values(bytes(16), places, {"bank.vectors": np.ones(3)})
    with pytest.raises(BundleError, match=r"no constant bank.owners"):
        find_constants(apart, ["bank.owners"])


@pytest.mark.parametrize(
    "change", [("offset", "place"), ("shape", "sides"), ('size="8"', 'size="all"'), ("name", "as")]
)
def test_constants_that_are_not_told_rightly_are_refused(change: tuple[str, str]) -> None:
    """With the word that is missing or wrong."""
    layer = '<layer id="0" name="bank.vectors" type="Const"><data element_type="f32" shape="2" offset="0" size="8"/>'
    assert find_constants(layer.encode(), ["bank.vectors"])
    with pytest.raises(BundleError, match=r"model\.xml is damaged: .* in the description of a constant"):
        find_constants(layer.replace(*change).encode(), ["bank.vectors"])
    with pytest.raises(BundleError, match=r"model\.xml is damaged: Unicode.* decode"):
        find_constants(b"\xff" + layer.encode(), ["bank.vectors"])


def test_a_full_temporary_folder(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While a memory grows, OpenVINO writes there. The message names it, and the bundle stays as it was."""
    detector = EdgeDetector(bundle)
    detector.set_memory_size(500)
    version = (bundle / "metadata.json").read_bytes()
    for folder in (tmp_path / "gone", Path("/dev/full")):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(folder))
            with pytest.raises(BundleError, match=r"The temporary folder cannot hold model.xml: .*TMPDIR"):
                detector.save()
        assert (bundle / "metadata.json").read_bytes() == version
    detector.save()
    assert EdgeDetector(bundle).info()["memory_size"] == 500
