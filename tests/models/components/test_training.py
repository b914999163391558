# SPDX-License-Identifier: Apache-2.0
"""Tests of the base that all models have in a trainer."""

import gc

import pytest
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule

from anomalib_ext.models.components.frozen_teacher import FrozenTeacherModule
from anomalib_ext.models.components.patchcore import PatchCoreModule
from anomalib_ext.models.components.training import InspectionModule


@pytest.mark.parametrize("base", [InspectionModule, FrozenTeacherModule, PatchCoreModule])
@pytest.mark.parametrize("anomalibs", [AnomalibModule, Padim])
def test_bases_in_the_wrong_order(base: type, anomalibs: type) -> None:
    """They are refused when the class is made, for Anomalib's methods would hide those of the base."""
    message = f"Model must name {base.__name__} before its bases of Anomalib"
    with pytest.raises(TypeError, match=message):
        type("Model", (anomalibs, base), {})
    assert issubclass(type("Model", (base, anomalibs), {}), base)
    gc.collect()  # Anomalib lists the subclasses that there are


def test_anomalib_takes_no_base_for_a_model() -> None:
    """It lists the subclasses of its own base."""
    for base in (InspectionModule, FrozenTeacherModule, PatchCoreModule):
        assert not issubclass(base, AnomalibModule)
