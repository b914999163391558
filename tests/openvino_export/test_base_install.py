# SPDX-License-Identifier: Apache-2.0
"""Test of the base install, as on an edge PC: an environment of its own, without torch, and the command itself."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EDGE = os.environ.get("EDGE_PYTHON", "")
KILLS = 6


@pytest.mark.slow
@pytest.mark.skipif(not EDGE, reason="EDGE_PYTHON names no Python with the base install of this package")
def test_base_install(bundle: Path, good: dict[str, list[Path]], tested: list[Path], tmp_path: Path) -> None:
    """It judges, learns a second product, and judges both; after every kill in learning, the bundle is whole."""
    # Nothing of this checkout or environment may help out.
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True}
    command = str(Path(EDGE).with_name("anomalib-edge"))

    def edge(*args: object) -> tuple[int, list[dict[str, Any]]]:
        done = subprocess.run([command, *map(str, args)], check=False, capture_output=True, **options)
        assert done.returncode in {0, 3}, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    def judge(product: str) -> list[tuple[str, bool]]:
        """Variant and decision of good and bad images."""
        folder = next(path for path in tested if product in path.parts).parents[1]
        lines = edge("predict", bundle, folder)[1]
        assert all(line["pred_label"] for line in lines if "hole" in line["source"])
        # One of the good may lie above a threshold that so few images have set.
        assert sum(line["pred_label"] for line in lines if "hole" not in line["source"]) <= 1
        return [(line["variant"], line["pred_label"]) for line in lines]

    for name in ("torch", "anomalib", "lightning"):
        failed = subprocess.run([EDGE, "-c", f"import {name}"], check=False, capture_output=True, **options)
        assert f"No module named '{name}'" in failed.stderr
    failed = subprocess.run([command, "serve", bundle], check=False, capture_output=True, **options)
    assert failed.returncode == 1
    assert "pip install 'anomalib-ext[serve]'" in failed.stderr

    stripes = judge("stripes")
    assert edge("learn", bundle, good["dots"][0].parent, "--variant", "dots")[1][0]["learned"] == {"dots": 20}
    assert judge("stripes") == stripes
    assert {variant for variant, _ in judge("dots")} == {"dots"}

    learning = ("learn", bundle, good["checks"][0].parent, "--variant", "checks")
    start = time.monotonic()
    edge(*learning)
    whole = time.monotonic() - start
    edge("undo", bundle)
    rng = np.random.default_rng(0)
    for share in rng.uniform(0.3, 1, KILLS):
        worker = subprocess.Popen(
            [command, *map(str, learning)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
        )
        time.sleep(share * whole)
        worker.kill()
        worker.wait()
        # It reads and verifies all files, and compares the bank with the constants of model.xml.
        assert edge("parity", bundle, tested[0])[1][0]["same"]
        known = json.loads((bundle / "metadata.json").read_text())["variants"]
        assert known in (["stripes", "dots"], ["stripes", "dots", "checks"])
        if "checks" in known:
            edge("undo", bundle)
    assert edge(*learning)[1][0]["learned"] == {"checks": 20}
    assert {variant for variant, _ in judge("checks")} == {"checks"}
    assert {variant for variant, _ in judge("dots")} == {"dots"}
