# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what is measured, what that costs, and that it goes on where it was."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anomalib_ext.benchmark import benchmark, pipeline
from anomalib_ext.benchmark.report import METRIC_TITLES
from anomalib_ext.benchmark.results import Row
from anomalib_ext.benchmark.tasks import Task, embed
from anomalib_ext.data import MultiCategory

PRODUCTS = ("stripes", "dots", "checks")
LEARNERS = {
    "continual_patchcore": [300],
    "joint": [300],
    "per_product": [300],
    "last_product": [300],
    "reservoir": [300],
    "cadic": [300],
    "mh_patchcore": [50],
}
# Metrics of pixels take half of the time.
STRIDE = 2
# What depends on the machine.
COSTS = {"ms_per_image": 0.0, "update_seconds": 0.0, "peak_mib": 0.0}
Run = Callable[..., list[Row]]


def _rows(folder: Path) -> list[Row]:
    with (folder / "results.csv").open(newline="") as file:
        return [Row.read(cells) for cells in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(products: Path, make_model: Callable[..., Any]) -> Run:
    """Return a function that runs the benchmark on the products of the tests, embedded once, without its report."""
    embedded: dict[str, Task] = {}

    def embed_once(model: Any, datamodule: Any, name: str) -> Task:  # noqa: ANN401
        if name not in embedded:
            embedded[name] = embed(model, datamodule, name)
        return embedded[name]

    def start(folder: Path, categories: Sequence[str] = PRODUCTS, **kwargs: Any) -> list[Row]:  # noqa: ANN401
        data = MultiCategory(root=products, num_workers=0, val_split_mode="from_test", seed=0, categories=categories)
        options = {"learners": LEARNERS, "orders": 1, "pixel_stride": STRIDE, **kwargs}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "embed", embed_once)
            patch.setattr(pipeline, "write_report", lambda _rows, _folder: None)
            return benchmark(make_model(), data, results_dir=folder, **options)

    return start


@pytest.fixture(scope="module")
def whole(
    products: Path,
    model_config: dict[str, Any],
    run_command: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the results of all learners, in one order and mixed, and of few images, as the command writes them."""
    folder = tmp_path_factory.mktemp("whole")
    options = {"root": str(products), "num_workers": 0, "val_split_mode": "from_test", "seed": 0}
    config = {
        "model": model_config,
        "data": {
            "class_path": "anomalib_ext.data.MultiCategory",
            "init_args": {**options, "categories": PRODUCTS},
        },
        "learners": LEARNERS,
        "orders": 1,
        "shots": [1, 2],
        "pixel_stride": STRIDE,
        "results_dir": ".",
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "printed.txt").write_text(run_command(folder, "benchmark", "--config", "config.yaml"))
    return folder


def test_command(whole: Path) -> None:
    """It says how it goes on, and writes tables and plots."""
    printed = (whole / "printed.txt").read_text()
    assert "products 1, PatchCore, last product, 300, 2/3 dots: image AUROC" in printed
    text = (whole / "report.md").read_text()
    assert "### AUPRO" in text
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"products_image_AUROC.png", "products_curves.png", "mixed_pixel_AUPRO.png", "few_shot.png"} <= {*pictures}
    assert all((whole / picture).is_file() for picture in pictures)


def test_every_product_so_far_is_judged_after_each_step(whole: Path) -> None:
    """A row for each entry of R, in which all is measured."""
    rows = _rows(whole)
    for learner in {row.learner for row in rows if row.stream == "products"}:
        entries = [(row.step, row.task) for row in rows if (row.stream, row.learner) == ("products", learner)]
        assert entries == [(step, task) for step in (1, 2, 3) for task in PRODUCTS[:step]]
    assert len({row.learner for row in rows if row.stream == "products"}) == len(LEARNERS)
    assert len({row.learner for row in rows if row.stream == "mixed"}) == len(LEARNERS) - 1  # without per product
    for row in rows:
        assert all(0 <= getattr(row, metric) <= 1 for metric in METRIC_TITLES)
        assert all(getattr(row, cost) > 0 for cost in ("ms_per_image", "update_seconds", "bank_mib"))
    few = [row for row in rows if row.stream == "few-shot"]
    assert sorted({row.step for row in few}) == [1, 2]
    assert {row.learner.rsplit(", ", 1)[1] for row in few} == {"400"}  # the model's own


def test_who_forgets_is_seen_to_forget(whole: Path) -> None:
    """Only who keeps the last product alone judges the first badly at the end."""
    end = {row.learner: row for row in _rows(whole) if (row.stream, row.step, row.task) == ("products", 3, PRODUCTS[0])}
    assert end["PatchCore, last product, 300"].pixel_AUROC < 0.8
    for learner in ("ContinualPatchCore, 300", "PatchCore, joint, 300", "CADIC rule, 300", "MHPatchcore, refitted, 50"):
        assert end[learner].pixel_AUROC > 0.9
        assert end[learner].image_AUROC > 0.9


def test_costs_are_those_of_what_is_kept(whole: Path) -> None:
    """Banks of 300 vectors; joint selection holds all patches, a stream learner those of an image."""
    end = {row.learner: row for row in _rows(whole) if (row.stream, row.step) == ("products", 3)}
    bank = 300 * 152 * 4 / 2**20
    assert end["reservoir, 300"].bank_mib == pytest.approx(bank)
    assert end["PatchCore, per product, 300"].bank_mib == pytest.approx(3 * bank)
    patches = 60 * 64 * 152 * 4 / 2**20
    if sys.platform == "linux":
        assert end["PatchCore, joint, 300"].peak_mib >= patches
        assert end["reservoir, 300"].peak_mib < patches


def _is_interrupted(run: Run, folder: Path) -> bool:
    try:
        run(folder, mixed=False)
    except KeyboardInterrupt:
        return True
    return False


def test_interrupted_it_resumes(whole: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is interrupted, nothing is learned twice, and the figures are those of one run."""
    learned: list[str] = []
    judged = []
    learn, evaluate = pipeline._learn, pipeline.evaluate

    def recorded(learner: Any, step: Any, seen: Any) -> dict[str, float]:  # noqa: ANN401
        costs = learn(learner, step, seen)
        learned.append(f"{learner.title} {step.name}")
        return costs

    def failing(*args: Any) -> dict[str, float]:  # noqa: ANN401
        judged.append(args)
        if len(judged) % 13 == 0:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(pipeline, "_learn", recorded)
    monkeypatch.setattr(pipeline, "evaluate", failing)
    interruptions = 0
    while _is_interrupted(run, tmp_path):
        interruptions += 1
        rows = _rows(tmp_path)
        assert len({(row.learner, row.step, row.task) for row in rows}) == len(rows)
    assert interruptions > 1
    assert len(learned) == len(LEARNERS) * len(PRODUCTS) + interruptions  # the interrupted steps anew
    expected = [replace(row, **COSTS) for row in _rows(whole) if row.stream == "products"]
    assert [replace(row, **COSTS) for row in _rows(tmp_path)] == expected
    assert not list((tmp_path / "state").iterdir())
    run(tmp_path, mixed=False)
    assert len(learned) == len(LEARNERS) * len(PRODUCTS) + interruptions  # nothing is left to do


def test_results_of_other_settings_are_kept_apart(whole: Path, run: Run) -> None:
    """Results that cannot be compared do not get into one file."""
    before = (whole / "results.csv").read_bytes()
    with pytest.raises(ValueError, match=r"holds results of another seed: .* Give another results_dir"):
        run(whole, seed=1)
    with pytest.raises(ValueError, match="holds results of another products: "):
        run(whole, categories=PRODUCTS[::-1])
    assert (whole / "results.csv").read_bytes() == before


def test_unknown_names(run: Run, tmp_path: Path) -> None:
    """The error says what there is."""
    with pytest.raises(ValueError, match=r"Unknown: replay, wheel, rust\. Learners are continual_patchcore, joint"):
        run(tmp_path, learners={"replay": [10]}, drifts={"wheel": ["blur"], "dots": ["rust"]})


@pytest.mark.slow
def test_drift(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of one product, each judged as it is then; what is done is not even embedded again."""
    settings = {"categories": ["dots"], "orders": 0, "mixed": False, "drifts": {"dots": ["blur"]}}
    embedded: list[Any] = []

    def recorded(*args: Any) -> Any:  # noqa: ANN401
        embedded.append(embedded[0] if embedded else drift_stream(*args))
        return embedded[-1]

    drift_stream = pipeline.drift_stream
    monkeypatch.setattr(pipeline, "drift_stream", recorded)
    rows = run(tmp_path, learners={"reservoir": [50]}, **settings)
    assert [row.task for row in rows if row.step == 10] == [f"blur {level}" for level in range(1, 11)]
    assert {row.stream for row in rows} == {"dots, blur"}
    assert len(embedded) == 1
    assert run(tmp_path, learners={"reservoir": [50]}, **settings) == rows
    assert len(embedded) == 1
    run(tmp_path, learners={"reservoir": [50, 60]}, **settings)
    assert len(embedded) == 2
