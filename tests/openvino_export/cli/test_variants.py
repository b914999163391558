# SPDX-License-Identifier: Apache-2.0
"""Commands about product variants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


def names(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Images of each variant that was listed."""
    return {line["variant"]: line["images"] for line in lines}


def test_variants(run: Run, bundle: Path, products: Path) -> None:
    """A mistyped name is found and mended, a variant merged and deleted; each can be undone."""
    dots = products / "dots" / "train" / "good"
    assert run("learn", bundle, dots, "--variant", "dits")[0] == 0
    code, lines, errors = run("learn", bundle, dots, "--variant", "dots")
    assert (code, lines[0]["known_as"]) == (0, [{"known": "dits", "given": "dots", "images": 20}])
    assert "20 images are known as 'dits', so they were not learned as 'dots'" in errors
    code, lines, errors = run("learn", bundle, dots, "--variant", "Dits")
    assert code == 1
    assert "--force true" in errors
    code, lines, _ = run("variants", "rename", bundle, "dits", "dots")
    assert (code, names(lines)) == (0, {"stripes": 20, "dots": 20})
    code, lines, _ = run("variants", "merge", bundle, "dots", "stripes")
    assert (code, names(lines)) == (0, {"stripes": 40})
    assert run("undo", bundle)[0] == 0
    code, lines, _ = run("variants", "delete", bundle, "stripes")
    assert (code, names(lines)) == (0, {"dots": 20})
    code, lines, errors = run("variants", "delete", bundle, "dots")
    assert (code, lines) == (1, [])
    assert "is the only variant" in errors
    assert names(run("variants", "list", bundle)[1]) == {"dots": 20}


def test_a_bundle_without_a_bank(run: Run, without_bank: Path) -> None:
    """It knows no variants."""
    code, _, errors = run("variants", "list", without_bank)
    assert code == 1
    assert "has no memory bank, so it knows no variants" in errors
