# SPDX-License-Identifier: Apache-2.0
"""Commands that measure a bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openvino_export.bundle.ir import find_constants

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


def test_parity(run: Run, exported: Path, bundle: Path, products: Path) -> None:
    """The runtime gives what model.xml gives; a bundle that has learned more does not."""
    code, lines, _ = run("parity", exported, products / "dots" / "test")
    assert (code, lines[0]["same"], lines[0]["images"], lines[0]["different_labels"]) == (0, True, 12, 0)
    assert lines[0]["largest_difference_of_pred_score"] < 1e-3
    run("learn", bundle, products / "dots" / "train" / "good", "--variant", "dots")
    code, lines, _ = run("parity", bundle, products / "dots" / "test")
    assert code == 0
    code, lines, _ = run("parity", bundle, products / "dots" / "test", "--reference", exported / "model.xml")
    assert (code, lines[0]["same"]) == (3, False)
    assert lines[0]["different_labels"] > 0


def test_benchmark(run: Run, exported: Path, products: Path) -> None:
    """A line for each device, precision and hint."""
    options = ["--devices", "CPU", "--precisions", "[f32, bf16]", "--seconds", "0.1"]
    for source in ([], ["--source", products / "dots" / "test"]):
        code, lines, _ = run("benchmark", exported, *source, *options)
        assert code == 0
        assert [(line["device"], line["precision"], line["hint"]) for line in lines] == [
            ("CPU", precision, hint) for precision in ("f32", "bf16") for hint in ("LATENCY", "THROUGHPUT")
        ]
        assert all(0 < line["latency_p50_ms"] <= line["latency_p99_ms"] and line["images_per_s"] > 0 for line in lines)


def test_parity_with_what_is_no_model(run: Run, exported: Path, products: Path, tmp_path: Path) -> None:
    """It says what is wrong, in one line; values that are no numbers are no agreement."""
    graph, weights = ((exported / f"model{kind}").read_bytes() for kind in (".xml", ".bin"))
    place = find_constants(graph, ["bank.vectors"])["bank.vectors"]
    nothing = weights[: place.offset] + b"\xff" * place.size + weights[place.offset + place.size :]
    for content, message in (
        (b"", "cannot be compared with: "),
        (graph[:5000], "cannot be compared with: "),
        ((exported / "features.xml").read_bytes(), "cannot be compared with: "),
        (graph.replace(b'"pred_score"', b'"score"'), "no finite pred_score"),
        (graph, "no finite pred_score"),
    ):
        (tmp_path / "model.xml").write_bytes(content)
        (tmp_path / "model.bin").write_bytes(nothing)
        code, lines, errors = run("parity", exported, products / "dots" / "test", "--reference", tmp_path / "model.xml")
        assert (code, lines) == (1, [])
        assert message in errors
        assert "Give an undamaged model for the same images." in errors
