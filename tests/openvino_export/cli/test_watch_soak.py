# SPDX-License-Identifier: Apache-2.0
"""A minute of the benchmark that kills watch again and again, and looks at its memory."""

from importlib import import_module
from pathlib import Path

import pytest


@pytest.mark.slow
def test_soak(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is judged exactly once in each state, while another process learns and undoes; nothing is leaked."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    soak = import_module("soak")
    rows = []
    for name, images, seconds in (("killed", 800, 1.0), ("steady", 1000, None)):
        (tmp_path / name).mkdir()
        rows = list(soak.Soak(exported, tmp_path / name, images).run(name, seconds))  # which raises if one is missing
        assert rows[-1]["recorded"] > images  # some in two states
        assert rows[-1]["learned"] > 0
        assert (rows[-1]["starts"] > 1) == (name == "killed")
    grown = soak.growth(rows)
    assert grown["mib"] < 20
    assert grown["descriptors"] <= 0
