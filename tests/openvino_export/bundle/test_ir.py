# SPDX-License-Identifier: Apache-2.0
"""Tests of the constants in a graph: each is found by its name, and changed without a trace in any other."""

import numpy as np
import pytest

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
