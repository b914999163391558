# SPDX-License-Identifier: Apache-2.0
"""The continual benchmark."""

import csv
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_ext.benchmark import benchmark, compare, pipeline
from anomalib_ext.benchmark.learners import Cadic, Joint, Reservoir
from anomalib_ext.benchmark.report import METRICS, Row, _summary, write_report
from anomalib_ext.benchmark.tasks import DRIFTS, Images, Task, mixed_stream, product_streams
from anomalib_ext.data import MultiCategory

PUBLISHED = Path(__file__).parents[1] / "configs" / "benchmark" / "published.csv"
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
# What depends on the machine.
COSTS = {"ms_per_image": 0.0, "update_seconds": 0.0, "peak_mib": 0.0}


def _rows(folder: Path) -> list[Row]:
    with (folder / "results.csv").open(newline="") as file:
        return [Row.read(cells) for cells in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(products: Path, make_model: Callable[..., Any]) -> Callable[..., list[Row]]:
    """Return a function that runs the benchmark on the products of the tests."""

    def start(folder: Path, categories: Sequence[str] = PRODUCTS, **kwargs: Any) -> list[Row]:  # noqa: ANN401
        data = MultiCategory(root=products, num_workers=0, val_split_mode="from_test", seed=0, categories=categories)
        return benchmark(make_model(), data, results_dir=folder, **{"learners": LEARNERS, "orders": 1, **kwargs})

    return start


@pytest.fixture(scope="module")
def whole(run: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of all learners, in one order and mixed, and of few images."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, shots=[1, 2])
    return folder


def test_every_product_so_far_is_judged_after_each_step(whole: Path) -> None:
    """A row for each entry of R, in which all is measured."""
    rows = _rows(whole)
    for learner in {row.learner for row in rows if row.stream == "products"}:
        entries = [(row.step, row.task) for row in rows if (row.stream, row.learner) == ("products", learner)]
        assert entries == [(step, task) for step in (1, 2, 3) for task in PRODUCTS[:step]]
    assert len({row.learner for row in rows if row.stream == "products"}) == len(LEARNERS)
    assert len({row.learner for row in rows if row.stream == "mixed"}) == len(LEARNERS) - 1  # without per product
    for row in rows:
        assert all(0 <= getattr(row, metric) <= 1 for metric in METRICS)
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


def test_report(whole: Path) -> None:
    """Tables with the metrics of the rows, and plots that can be read."""
    text = (whole / "report.md").read_text()
    rows = _rows(whole)
    last = [row.image_AUROC for row in rows if (row.stream, row.learner, row.step) == ("products", "reservoir, 300", 3)]
    own = [row for row in rows if (row.stream, row.learner) == ("products", "reservoir, 300")]
    best = [max(row.image_AUROC for row in own if row.task == task and row.step < 3) for task in PRODUCTS[:2]]
    line = next(line for line in text.splitlines() if line.startswith("| reservoir, 300 |"))
    assert line.split(" | ")[1] == f"{np.mean(last):.4f}"
    assert line.split(" | ")[3] == f"{np.mean(np.subtract(best, last[:2])):.4f}"
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"products_image_AUROC.png", "products_curves.png", "mixed_pixel_AUPRO.png", "few_shot.png"} <= {*pictures}
    for picture in pictures:
        with Image.open(whole / picture) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 20  # something is drawn


def _is_interrupted(run: Callable[..., list[Row]], folder: Path) -> bool:
    try:
        run(folder, mixed=False)
    except KeyboardInterrupt:
        return True
    return False


def test_interrupted_it_resumes(
    whole: Path, run: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_results_of_other_settings_are_kept_apart(whole: Path, run: Callable[..., list[Row]]) -> None:
    """Results that cannot be compared do not get into one file."""
    before = (whole / "results.csv").read_bytes()
    with pytest.raises(ValueError, match=r"holds results of another seed: .* Give another results_dir"):
        run(whole, seed=1)
    with pytest.raises(ValueError, match="holds results of another products: "):
        run(whole, categories=PRODUCTS[::-1])
    assert (whole / "results.csv").read_bytes() == before


def test_unknown_names(run: Callable[..., list[Row]], tmp_path: Path) -> None:
    """The error says what there is."""
    with pytest.raises(ValueError, match=r"Unknown: replay, wheel, rust\. Learners are continual_patchcore, joint"):
        run(tmp_path, learners={"replay": [10]}, drifts={"wheel": ["blur"], "dots": ["rust"]})


def test_drift(run: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of one product, each judged as it is then; what is done is not even embedded again."""
    settings = {"orders": 0, "mixed": False, "drifts": {"dots": ["blur"]}}
    rows = run(tmp_path, learners={"reservoir": [50]}, **settings)
    assert [row.task for row in rows if row.step == 10] == [f"blur {level}" for level in range(1, 11)]
    assert {row.stream for row in rows} == {"dots, blur"}
    embedded = []

    def recorded(*args: Any) -> Any:  # noqa: ANN401
        embedded.append(args)
        return drift_stream(*args)

    drift_stream = pipeline.drift_stream
    monkeypatch.setattr(pipeline, "drift_stream", recorded)
    assert run(tmp_path, learners={"reservoir": [50]}, **settings) == rows
    assert not embedded
    run(tmp_path, learners={"reservoir": [50, 60]}, **settings)
    assert len(embedded) == 1


def _tasks(*counts: int) -> list[Task]:
    """Tasks whose images say which task and image they are."""
    nothing = Images(torch.empty(0), torch.empty(0), None, torch.Size([8, 8]))
    return [
        Task(f"task {number}", f"task {number}", _numbered(number, count), nothing, nothing, is_split=False)
        for number, count in enumerate(counts)
    ]


def _numbered(number: int, count: int) -> np.ndarray:
    return np.stack([np.full(count, number), np.arange(count)], axis=1)[:, None].astype(np.float32)


def test_orders() -> None:
    """As given, in reverse, then shuffled; each step is one product with all its images."""
    streams = product_streams(_tasks(3, 4, 5), orders=4, seed=0)
    names = [[task.name for task in stream.tasks] for stream in streams]
    assert names[0] == names[1][::-1] == ["task 0", "task 1", "task 2"]
    assert all(sorted(order) == names[0] for order in names)
    for stream in streams:
        for known, (step, task) in enumerate(zip(stream.steps, stream.tasks, strict=True), start=1):
            assert (step.task, step.known) == (task, known)
            np.testing.assert_array_equal(sorted(image[0, 1] for image in step.images), task.train[:, 0, 1])


def test_mixed_stream_has_no_boundaries() -> None:
    """Every image comes once, neighbors overlap, and nothing says which product an image shows."""
    tasks = _tasks(20, 30, 10)
    stream = mixed_stream(tasks, seed=0)
    images = [tuple(image[0].tolist()) for step in stream.steps for image in step.images]
    assert sorted(images) == [(number, index) for number, task in enumerate(tasks) for index in range(len(task.train))]
    products = [product for product, _ in images]
    assert sum(before != after for before, after in pairwise(products)) > 10
    assert products.index(0.0) < products.index(1.0) < products.index(2.0)
    seen: set[float] = set()
    for step in stream.steps:
        seen |= {image[0, 0] for image in step.images}
        assert step.task is None
        assert seen == set(range(step.known))


@example([2, 2, 2], 43)  # without another draw, a step would have no image
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_mixed_stream_of_unequal_products(counts: list[int], seed: int) -> None:
    """Every product has begun by the end of its step, so that nothing is missing in R for the metrics."""
    stream = mixed_stream(_tasks(*counts), seed)
    assert len(stream.steps) == len(counts)
    assert sum(len(step.images) for step in stream.steps) == sum(counts)
    seen: set[float] = set()
    for number, step in enumerate(stream.steps, start=1):
        seen |= {image[0, 0] for image in step.images}
        assert seen == set(range(step.known))
        assert step.known >= number


@pytest.mark.parametrize("kind", DRIFTS)
def test_drift_grows(kind: str) -> None:
    """Later levels change an image more than earlier ones; a mask moves with its image."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack([rows / 63, columns / 63, ((rows // 8 + columns // 8) % 2).float()])
    mask = image[2:]
    changes = []
    for level in (1, 10):
        rng = np.random.default_rng(0)
        drifted = [DRIFTS[kind](level, rng, image, mask) for _ in range(8)]
        changes.append(np.mean([float((changed - image).abs().mean()) for changed, _ in drifted]))
        for changed, moved in drifted:
            assert changed.shape == image.shape
            assert moved.shape == mask.shape
            if kind == "geometry":
                assert float(((changed[2:] > 0.5) == (moved > 0.5)).float().mean()) > 0.97
            else:
                assert torch.equal(moved, mask)
    assert changes[1] > 2 * changes[0]


def _plain_cadic(patches: np.ndarray, size: int) -> np.ndarray:
    """The rule word by word."""
    bank = patches[:size].copy()
    rest = patches[size:].copy()
    while len(rest):
        far = np.linalg.norm(rest[:, None] - bank, axis=2).min(axis=1)
        among = np.linalg.norm(bank[:, None] - bank, axis=2) + np.where(np.eye(size), np.inf, 0)
        if far.max() <= among.min():
            break
        chosen = int(far.argmax())
        bank[int(among.min(axis=1).argmin())] = rest[chosen]
        rest = np.delete(rest, chosen, axis=0)
    return bank


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.integers(1, 60))
def test_cadic_is_its_rule(seed: int, size: int, count: int) -> None:
    """The fast form keeps the vectors of the plain one."""
    patches = np.random.default_rng(seed).normal(size=(size + count, 5)).astype(np.float32)
    learner = Cadic(size)
    learner.learn([patches], [], None)
    np.testing.assert_array_equal(learner.vectors, _plain_cadic(patches, size))


def test_reservoir_takes_all_alike() -> None:
    """Each patch stays with the same probability, whenever it came."""
    counts = np.zeros(200)
    for seed in range(400):
        learner = Reservoir(20, seed)
        learner.learn(list(np.arange(200, dtype=np.float32).reshape(4, 50, 1)), [], None)
        kept = learner.vectors[:, 0].astype(int)
        assert len(set(kept.tolist())) == 20
        counts[kept] += 1
    for quarter in np.split(counts, 4):
        assert quarter.mean() == pytest.approx(40, rel=0.12)


def test_without_masks(whole: Path, tmp_path: Path) -> None:
    """Without pixel metrics there are no tables and plots of them."""
    nan = float("nan")
    write_report([replace(row, pixel_AUROC=nan, pixel_AUPRO=nan) for row in _rows(whole)], tmp_path)
    assert not list(tmp_path.glob("products_pixel*"))
    assert (tmp_path / "products_image_AUROC.png").exists()


def test_results_of_the_pipeline_beside_published_ones(tmp_path: Path) -> None:
    """Means over what was measured, and the figures of that data set alone."""
    (tmp_path / "results.csv").write_text(
        "model.class_path,data.class_path,data.init_args.category,image_AUROC,pixel_AUROC\n"
        "RdAkf,anomalib.data.MVTecAD,bottle,0.99,0.98\n"
        "RdAkf,anomalib.data.MVTecAD,pill,0.97,0.96\n"
        "Patchcore,anomalib.data.MVTecAD,bottle,1.0,0.95\n"
    )
    text = compare(tmp_path, PUBLISHED)
    assert "| MVTecAD | RdAkf | measured, products: 2 | 98.0 | 97.0 |  |  |" in text
    assert "| MVTecAD | Patchcore | measured, products: 1 | 100.0 | 95.0 |  |  |" in text
    assert "| MVTecAD | RdAkf | one class, wide_resnet50_2 | 99.0 | 97.9 | 94.8 | RD-AKF, table of results |" in text
    assert "Visa" not in text
    with pytest.raises(FileNotFoundError, match=r"There is no results\.csv in .* Run `anomalib benchmark` first"):
        compare(PUBLISHED.parent, PUBLISHED)


def test_of_several_runs_of_the_pipeline_the_last_counts(tmp_path: Path) -> None:
    """Not their mean, and the product is counted once."""
    for day, value in (("2026-01-01", 0.5), ("2026-01-02", 0.9)):
        (tmp_path / day).mkdir()
        (tmp_path / day / "results.csv").write_text(
            "model.class_path,data.class_path,data.init_args.category,image_AUROC\n"
            f"RdAkf,anomalib.data.MVTecAD,bottle,{value}\n"
        )
    assert "| MVTecAD | RdAkf | measured, products: 1 | 90.0 |" in compare(tmp_path, PUBLISHED)


def test_settings_are_not_averaged(tmp_path: Path) -> None:
    """Each has a row that says what is different, also where a file does not know an argument of another."""
    start = "seed,model.class_path,data.class_path,data.init_args.category,data.init_args.train_batch_size"
    for name, text in {
        "a": f"{start},image_AUROC\n0,RdAkf,MVTecAD,bottle,4,0.5\n0,RdAkf,MVTecAD,pill,4,0.7\n"
        "0,RdAkf,MVTecAD,pill,8,0.8\n",
        "b": f"{start},model.init_args.backbone,image_AUROC\n0,RdAkf,anomalib.data.MVTecAD,pill,4,resnet18,0.9\n",
        "c": f"{start},model.init_args.layers,image_AUROC\n1,SaCfaPatchCore,MVTecAD,pill,4,\"['layer2']\",1\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(text)
    text = compare(tmp_path, PUBLISHED)
    assert "| MVTecAD | RdAkf | measured, products: 2, seed: 0, train_batch_size: 4 | 60.0 |" in text
    assert "| MVTecAD | RdAkf | measured, products: 1, seed: 0, train_batch_size: 8 | 80.0 |" in text
    assert "| RdAkf | measured, products: 1, seed: 0, train_batch_size: 4, backbone: resnet18 | 90.0 |" in text
    assert "products: 1, seed: 1, train_batch_size: 4, layers: ['layer2'] | 100.0 |" in text
    assert "| private, heat sinks | SaCfaPatchCore | one class, wide_resnet50_2 | 98.7 |" in text


def test_gap_is_to_the_largest_joint_bank() -> None:
    """Where there is none as large; and empty in an order without joint selection."""

    def row(learner: str, order: int, value: float) -> Row:
        return Row("products", order, learner, 1, "a", "a", value, *[0.0] * 9)

    rows = [
        row(f"{Joint.title}, 10000", 1, 0.90),
        row(f"{Joint.title}, 2000", 1, 0.95),
        row("reservoir, 1000", 1, 0.81),
    ]
    last = _summary(rows, "image_AUROC").splitlines()[-1]
    assert last.split("|")[-2].strip() == "0.1000"
    last = _summary([*rows, row("reservoir, 1000", 2, 0.81)], "image_AUROC").splitlines()[-1]
    assert last.split("|")[-2].strip() == ""


@pytest.mark.parametrize("name", ["mvtec_ad", "visa", "folder"])
def test_configs_of_the_pipeline(name: str) -> None:
    """Anomalib's pipeline finds every model and the data by the names in the file."""
    import anomalib.models
    from anomalib import data

    config = yaml.safe_load((PUBLISHED.parent / f"{name}.yaml").read_text())["benchmark"]
    models = config["model"]["class_path"]["grid"]
    assert {"ContinualPatchCore", "SaCfaPatchCore", "RdAkf", "HetNet", "Crr"} < set(models)
    assert set(models) <= set(anomalib.models.__all__)
    assert config["data"]["class_path"] in data.__all__


def test_command(tmp_path: Path) -> None:
    """One command, in a process of its own."""
    (tmp_path / "config.yaml").write_text("""
model: {class_path: ContinualPatchCore, init_args: {memory_size: 300}}
data:
  class_path: anomalib_ext.data.MultiCategory
  init_args:
    datamodules:
      - {class_path: anomalib_ext.data.PhotoVariants, init_args: {category: cell}}
      - {class_path: anomalib_ext.data.PhotoVariants, init_args: {category: retina}}
learners: {continual_patchcore: [300], last_product: [300]}
orders: 1
mixed: false
results_dir: results
""")
    command = [str(Path(sys.executable).with_name("anomalib-ext")), "benchmark", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "products 1, PatchCore, last product, 300, 2/2 retina: image AUROC" in done.stdout
    assert len(_rows(tmp_path / "results")) == 6
    assert "### AUPRO" in (tmp_path / "results" / "report.md").read_text()
