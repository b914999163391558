# SPDX-License-Identifier: Apache-2.0
"""One decision: arrays on the edge and the graph, in torch and in OpenVINO, say the same of an embedding."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call

from anomalib_ext.models.continual_patchcore.graph import Head
from anomalib_ext.models.continual_patchcore.post_processor import VariantPostProcessor
from anomalib_ext.models.continual_patchcore.torch_model import ContinualPatchCoreModel
from openvino_export.bundle.constants import bank_tables, threshold_tables
from openvino_export.decision import Decider, Prediction, normalize
from openvino_export.memory.defects import raised
from openvino_export.memory.leave_one_out import CALIBRATION_PATCHES
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update
from openvino_export.memory.variant import Calibration, Defects

Array = NDArray[np.float32]

HEIGHT, WIDTH, DIMENSION = 4, 6, 32  # of an embedding
# Those of the last validation; it had no maximum of pixels, as without masks.
LAST_VALUES = {"image_threshold": 7.0, "image_min": 1.0, "image_max": 12.0, "pixel_threshold": 6.0, "pixel_min": 0.5}


def around(variant: str, seed: int, count: int, spread: float = 1.0) -> Array:
    """Patches around the center of a variant."""
    center = 3 * np.random.default_rng(ord(variant)).normal(size=DIMENSION)
    return (center + spread * np.random.default_rng(seed).normal(size=(count, DIMENSION))).astype(np.float32)


def learned(
    images: int,
    dtype: str = "float32",
    size: int = 60,
    variants: str = "abc",
    *,
    patches: int = 30,
    shared: bool = False,
) -> MemoryBank:
    """A bank of some images of each variant, or of images that are alike in part."""
    update = Update(MemoryBank(size, dtype))
    for name in variants:
        for seed in range(images):
            update.add(np.concatenate([around(name, seed, patches), *([around("s", 0, 9, 9)] if shared else [])]), name)
    update.commit()
    return update.bank


def validated(bank: MemoryBank, names: str, *, equal: bool = False) -> MemoryBank:
    """The bank with validation images of some variants: of scores that differ, or that are all zero."""
    update = Update(bank)
    for name in names:
        seen = bank.variants[name].vectors[:1].astype(np.float32)
        patches = np.stack([around(name, seed, CALIBRATION_PATCHES, 1 + seed / 4) for seed in range(6)])
        images = Calibration(
            patches=np.broadcast_to(seen, patches.shape) if equal else patches,
            origins=np.full(6, -1, np.int32),
            labels=np.arange(6) >= (6 if equal else 4),
            factors=np.tile(np.array([1, 0.8], np.float32), (6, 1)),
            scores=np.zeros(6, np.float32),
        )
        update.validate(name, images)
    return update.bank


def shown(bank: MemoryBank) -> MemoryBank:
    """The bank once patches like those of `embeddings` were shown as defects of two variants."""
    update = Update(bank)
    for name in "ca":
        image = np.concatenate([around(name, 91, 4), around(name, 93, 20, 2.0)]).reshape(HEIGHT, WIDTH, DIMENSION)
        update.show_defect(image, name, region=np.ones((HEIGHT, WIDTH), np.float32))
    return update.bank


BANKS: dict[str, Callable[[], MemoryBank]] = {
    "validated": lambda: validated(learned(2), "abc"),
    "validated in part, by hand in part": lambda: validated(learned(1), "b").with_decision("a", threshold=6.0),
    "learned images": lambda: learned(9),
    "another rate": lambda: learned(9).with_decision(false_alarm_rate=0.3),
    "single images": lambda: learned(1),
    "without thresholds": lambda: learned(1, patches=1),
    "scores of zero": lambda: validated(learned(1), "abc", equal=True),
    "half precision": lambda: validated(learned(2, "float16"), "abc"),
    "defects shown": lambda: shown(learned(9)),
    "defects shown, in half precision": lambda: shown(validated(learned(2, "float16"), "abc")),
    "what two variants share": lambda: validated(learned(2, shared=True), "abc"),
    "one vector": lambda: validated(learned(1, size=1, variants="a"), "a"),
}


@cache
def bank_of(kind: str) -> MemoryBank:
    """A bank, which never changes."""
    return BANKS[kind]()


def embeddings(bank: MemoryBank) -> Array:
    """Images that are normal, anomalous, known patch by patch, and of patches that vote for several variants alike."""
    count = HEIGHT * WIDTH
    vectors, owners = bank.vectors(), bank.owners()
    tie = [around(name, 90, count) for name in "cb"]  # two variants of as many votes; the one that came first decides
    images = [
        *(around(name, 91, count) for name in "ac"),
        around("b", 92, count, 3.0),
        np.where(np.arange(count)[:, None] % 2, *tie),
        vectors[np.flatnonzero(owners == owners.max())[np.zeros(count, int)]],
        around("s", 0, 9, 9)[np.arange(count) % 9],
        around("z", 93, count),
    ]
    return np.stack(images).reshape(-1, HEIGHT, WIDTH, DIMENSION)


@pytest.fixture(scope="module")
def model() -> ContinualPatchCoreModel:
    """A model whose backbone is never asked."""
    return ContinualPatchCoreModel("test_resnet", ["layer1"], pre_trained=False).eval()


class _ByRange(PostProcessor):
    """The post-processor of bundles of before, which normalised by threshold, minimum and maximum of a variant."""

    def refresh(self, bank: MemoryBank) -> None:
        """Take the thresholds of all variants from the bank."""
        for kind, table in threshold_tables(bank, len(bank.variants), by_range=True).items():
            self.register_buffer(kind, torch.from_numpy(table), persistent=False)

    def forward(self, predictions: Any) -> InferenceBatch:  # noqa: ANN401
        """Normalise scores and maps and decide."""
        found: dict[str, torch.Tensor | None] = {}
        for kind, name, decision in (("image", "pred_score", "pred_label"), ("pixel", "anomaly_map", "pred_mask")):
            values = getattr(predictions, name)
            shape = (-1,) + (1,) * (values.ndim - 1)
            rows = self.get_buffer(f"{kind}_values")[predictions.variant]
            threshold, lowest, highest = (value.reshape(shape) for value in rows.unbind(dim=-1))
            if self.enable_normalization:
                values = self._normalize(values, lowest, highest, threshold)
                threshold = getattr(self, f"normalized_{kind}_threshold")
            found |= {name: values, decision: values > threshold if self.enable_thresholding else None}
        return InferenceBatch(**found)


def metadata_of(processor: PostProcessor | None, num_neighbors: int) -> dict[str, Any]:
    """What the metadata of a bundle say of the decision."""
    last = {
        kind: [
            getattr(processor, f"{kind}_{name}", torch.tensor(torch.nan)).item() for name in ("threshold", "min", "max")
        ]
        for kind in ("image", "pixel")
    }
    return {
        "num_neighbors": num_neighbors,
        "last_values": {kind: [None if np.isnan(v) else v for v in values] for kind, values in last.items()},
        "normalization": bool(processor and processor.enable_normalization),
        "thresholding": bool(processor and processor.enable_thresholding),
        "image_sensitivity": processor.image_sensitivity if processor else 0.5,
        "pixel_sensitivity": processor.pixel_sensitivity if processor else 0.5,
        "variant_thresholds": isinstance(processor, (VariantPostProcessor, _ByRange)),
        **({"score": "rate"} if isinstance(processor, VariantPostProcessor) else {}),
    }


def assert_same(decided: list[Prediction], graph: dict[str, Array], metadata: dict[str, Any]) -> None:
    """Compare decisions with what a graph says of the batch; only what lies at a threshold may differ."""
    for i, one in enumerate(decided):
        assert one.pred_score == pytest.approx(graph["pred_score"][i], abs=2e-4, nan_ok=True)
        np.testing.assert_allclose(one.anomaly_map, graph["anomaly_map"][i, 0], atol=2e-4)
        if not metadata["thresholding"]:
            assert one.pred_label is one.pred_mask is None
            assert graph.keys() == {"pred_score", "anomaly_map"}
            continue
        assert one.pred_label == graph["pred_label"][i]
        assert one.pred_mask is not None
        assert (one.pred_mask != graph["pred_mask"][i, 0]).mean() < 2e-3


class _WithInputs(nn.Module):
    """A head of which the buffers are inputs, so that it is converted once for many banks."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.names = [name for name, _ in head.named_buffers() if "feature_extractor" not in name]

    def tables(self) -> list[torch.Tensor]:
        """What the buffers hold now."""
        return [self.head.get_buffer(name) for name in self.names]

    def forward(self, embedding: torch.Tensor, *tables: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decide with other buffers."""
        return functional_call(self.head, dict(zip(self.names, tables, strict=True)), (embedding,))


GRAPHS: dict[Any, ov.CompiledModel] = {}


def in_openvino(head: Head, embedding: torch.Tensor, names: list[str], key: object) -> dict[str, Array]:
    """What OpenVINO says of an embedding; a graph of the same key is converted once."""
    module = _WithInputs(head).eval()
    inputs = (embedding, *module.tables())
    if key not in GRAPHS:
        graph = ov.convert_model(torch.export.export(module, inputs))
        GRAPHS[key] = ov.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = GRAPHS[key]([value.numpy() for value in inputs]).values()
    # A score without a threshold is NaN in torch; OpenVINO makes it the lowest that there is.
    return {
        name: np.where(np.isneginf(value), np.nan, value) if value.dtype == np.float32 else value
        for name, value in zip(names, values, strict=True)
    }


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("normalization", "thresholding", "size"),
    [(True, True, (33, 40)), (False, True, (24, 36)), (True, False, (4, 6)), (False, False, (17, 90))],
)
@pytest.mark.parametrize("num_neighbors", [1, 3])
@pytest.mark.parametrize("kind", BANKS)
def test_arrays_and_graph_decide_alike(
    model: ContinualPatchCoreModel,
    kind: str,
    num_neighbors: int,
    normalization: bool,
    thresholding: bool,
    last: bool,
    size: tuple[int, int],
) -> None:
    """Whatever is known of thresholds, with post-processors by variant, of now and before, Anomalib's own, and none."""
    bank = bank_of(kind)
    model.bank, model.num_neighbors = bank, num_neighbors
    model.refresh()
    options = {"enable_normalization": normalization, "enable_thresholding": thresholding}
    by_variant = VariantPostProcessor(image_sensitivity=0.3, pixel_sensitivity=0.8, **options)
    by_range = _ByRange(image_sensitivity=0.7, pixel_sensitivity=0.4, **options)
    by_variant.refresh(bank)
    by_range.refresh(bank)
    images = embeddings(bank)
    embedding = torch.from_numpy(images)
    variants = model.score(embedding, *model.search(embedding), torch.Size(size)).variant
    processors = (by_variant, by_range, PostProcessor(image_sensitivity=0.6, **options), None)
    for processor in processors:
        if last and processor is not None:
            for name, value in LAST_VALUES.items():
                processor.get_buffer(f"_{name}" if "threshold" in name else name).fill_(value)
        metadata = metadata_of(processor, num_neighbors)
        decider = Decider(bank, metadata)
        decided = [decider.decide(image, size) for image in images]
        if processor is by_variant:
            for name in ("image", "pixel"):
                np.testing.assert_array_equal(decider.ranges[name], by_variant.get_buffer(f"{name}_values"))
        head = Head(model, processor, torch.Size(size))
        outputs = head(embedding)
        assert [decider.names.index(one.variant) for one in decided] == variants.tolist()
        assert_same(decided, {name: value.numpy() for name, value in outputs.items()}, metadata)
        # OpenVINO for some, since each graph takes seconds to be converted.
        converted = {(1, True, "float32"), (3, False, "float32"), (3, False, "float16")}
        key = num_neighbors, normalization, bank.dtype.name
        if processor is by_variant and thresholding and key in converted and len(bank) > 1:
            assert_same(decided, in_openvino(head, embedding, [*outputs], key), metadata)


def test_equal_vectors_vote_for_one_variant() -> None:
    """For that which has the first of them, whichever a search finds."""
    bank = bank_of("what two variants share")
    vectors, owners = bank.vectors(), bank.owners()
    first = (vectors[:, None] == vectors).all(axis=2).argmax(axis=1)
    assert (owners[first] != owners).any()
    tables = bank_tables(bank, DIMENSION, capacity=3)
    np.testing.assert_array_equal(tables["owners"][: len(bank)], owners[first])


def test_defects_of_other_variants_raise_nothing(model: ContinualPatchCoreModel) -> None:
    """Arrays and graph alike, wherever patches lie between good vectors and defects of several variants."""
    rng = np.random.default_rng(0)
    bank = learned(2)
    for name in bank.variants:
        vectors = rng.normal(size=(9, DIMENSION)).astype(np.float32)
        bank = bank.with_changes(name, defects=Defects(vectors, np.full(9, 8, np.float32), 1))
    model.bank = bank
    model.refresh()
    patches = rng.normal(size=(50, DIMENSION)).astype(np.float32)
    distances = rng.uniform(2, 20, 50).astype(np.float32)
    for position, variant in enumerate(bank.variants.values()):
        expected = raised(patches, distances, variant.defects)
        assert 5 < (expected > distances).sum() < 50
        tensors = [torch.from_numpy(each)[None] for each in (patches, distances)]
        found = model._raised(*tensors, torch.tensor([position]))[0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", BANKS)
def test_what_decides_and_whether_it_is_sure(kind: str) -> None:
    """The thresholds of the bank, in the form that each kind of bundle has, and the images that they rest on."""
    bank = bank_of(kind)
    by_rate = Decider(bank, {"score": "rate", "normalization": True, "thresholding": True})
    by_range = Decider(bank, {"normalization": True, "thresholding": True})
    for position, name in enumerate(bank.variants):
        decided = thresholds(bank, name)
        for which, threshold in (("image", decided.image), ("pixel", decided.pixel)):
            value = threshold.value
            np.testing.assert_allclose(by_rate.ranges[which][position], [value, threshold.steepness], rtol=1e-6)
            expected = [value, 0, 2 * value] if np.isfinite(value) else [np.nan] * 3
            np.testing.assert_allclose(by_range.ranges[which][position], expected, rtol=1e-6)
        embedding = around(name, 91, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, DIMENSION)
        predictions = [decider.decide(embedding, (20, 30)) for decider in (by_rate, by_range)]
        assert {each.is_sure for each in predictions} == {decided.is_sure()}
        assert {each.variant for each in predictions} == {name}
        if kind == "without thresholds":
            assert predictions[0].pred_label is False
            continue
        # Both forms mean the same by 0.5.
        assert predictions[0].pred_label == predictions[1].pred_label
        assert (predictions[0].pred_mask == predictions[1].pred_mask).mean() > 1 - 2e-3
    expected = {
        "learned images": {True},
        "defects shown": {True},
        "validated in part, by hand in part": {True, False},
        "validated": {False},
    }
    assert set(by_rate.are_sure) == expected.get(kind, set(by_rate.are_sure))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    raw=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9),
    threshold=st.one_of(st.floats(-10, 10, width=32), st.just(np.nan)),
    ends=st.one_of(
        st.tuples(st.floats(-10, 10, width=32), st.floats(0, 20, width=32)),
        st.sampled_from([(0.0, np.nan), (np.nan, 0.0), (2.5, 0.0)]),
    ),
    on_it=st.booleans(),
)
def test_normalisation_is_anomalibs(raw: list[float], threshold: float, ends: tuple[float, float], on_it: bool) -> None:
    """At the threshold, at the ends, for an empty range, and where a value is unknown."""
    lowest, highest = ends[0], ends[0] + ends[1]
    values = np.array([*raw, lowest, highest, threshold] if on_it else raw, np.float32)
    parts = [np.float32(value) for value in (threshold, lowest, highest)]
    own = normalize(values, *parts)
    tensors = [torch.tensor(part) for part in parts]
    expected = PostProcessor._normalize(torch.from_numpy(values), tensors[1], tensors[2], tensors[0])
    assert own.dtype == np.float32
    np.testing.assert_allclose(own, expected.numpy(), atol=1e-5)
