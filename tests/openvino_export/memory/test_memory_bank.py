# SPDX-License-Identifier: Apache-2.0
"""Tests of the memory bank: what it promises must hold for whatever is learned, in whatever order.

Coverage is computed here from all patches ever learned, in double precision and by brute force.
"""

import copy
import json
import math
import tracemalloc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

from openvino_export.memory import k_center, memory_bank, variant
from openvino_export.memory.k_center import BLOCK_SIZE, farthest_first, nearest
from openvino_export.memory.memory_bank import (
    CALIBRATION_IMAGES,
    CALIBRATION_PATCHES,
    MemoryBank,
    f1_threshold,
)

Array = NDArray[np.float32]
Ledger = dict[str, list[Array]]  # patches of each image by variant

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40, database=None)
ROUNDING = 1 + 1e-5


def lobes(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Three lobes of very different density, which stay where they are for a seed."""
    centers = np.random.default_rng(seed).normal(size=(3, dimension)) * 10
    which = rng.choice(3, count, p=[0.8, 0.15, 0.05])
    return centers[which] + rng.normal(size=(count, dimension)) * np.array([0.1, 1, 3])[which, None]


def curve(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """A closed curve through all dimensions."""
    phases = np.random.default_rng(seed).uniform(0, 6, dimension)
    return 5 * np.sin(rng.uniform(0, 2 * np.pi, (count, 1)) * np.arange(1, dimension + 1) + phases)


def repeated(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Few points, each many times."""
    return rng.choice(np.random.default_rng(seed).normal(size=(7, dimension)), count)


def lattice(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Nothing but ties."""
    return seed % 5 + rng.integers(0, 3, (count, dimension)).astype(float)


def far_off(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Lobes far from the origin, where differences of squares lose all digits."""
    return 500 + lobes(seed, count, dimension, rng) / 10


def black(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Zeros, as an image without light may give."""
    del seed, rng
    return np.zeros((count, dimension))


SHAPES = {function.__name__: function for function in (lobes, curve, repeated, lattice, far_off, black)}


def draw(shape: str, variant: str, seed: int, count: int, dimension: int = 4, magnitude: float = 1.0) -> Array:
    """Patches of one image of a variant."""
    place = sum(map(ord, variant))
    points = SHAPES[shape](place, count, dimension, np.random.default_rng([place, seed]))
    return (points * magnitude).astype(np.float32)


def distances_between(patches: Array, vectors: Array, covers: Array | float = 0.0) -> NDArray[np.float64]:
    """Distance of each patch to its nearest vector, or to the nearest of the balls that vectors are said to cover."""
    patches, vectors = patches.astype(np.float64), vectors.astype(np.float64)
    return np.concatenate([
        (np.linalg.norm(patches[i : i + 64, None] - vectors, axis=2) - covers).min(axis=1)
        for i in range(0, len(patches), 64)
    ])


def check(bank: MemoryBank, learned: Ledger) -> None:
    """The budget and the certificate, for all that is in the bank."""
    assert len(bank) == len(bank.vectors) <= bank.size
    assert set(bank.variants) == set(learned)
    for name, images in learned.items():
        variant = bank.variants[name]
        assert len(variant.vectors) == len(variant.radii) == len(variant.covers) >= 1
        assert variant.vectors.dtype == bank.dtype
        assert 0 <= variant.resolution < np.inf
        patches, covers = np.concatenate(images), variant.covers.astype(np.float64) * ROUNDING
        # Stronger than the certificate: every patch lies within the cover of one vector.
        assert distances_between(patches, variant.vectors, covers).max() <= 0
        assert distances_between(patches, variant.vectors).max() <= covers.max() <= bank.radius_bound


def same(one: MemoryBank, other: MemoryBank) -> bool:
    """Whether two banks are the same, bit by bit."""
    arrays, plain = one.to_arrays()
    other_arrays, other_plain = other.to_arrays()
    return plain == other_plain and all(
        array.dtype == other_arrays[key].dtype and array.tobytes() == other_arrays[key].tobytes()
        for key, array in arrays.items()
    )


def reloaded(bank: MemoryBank) -> MemoryBank:
    """The bank after a round trip."""
    arrays, plain = bank.to_arrays()
    return MemoryBank.from_arrays(copy.deepcopy(arrays), json.loads(json.dumps(plain)))


def filled(size: int = 60, variants: str = "ab", *, dtype: str = "float32", calibrated: bool = False) -> MemoryBank:
    """A bank of some variants, of three images each."""
    bank = MemoryBank(size, dtype)
    for name in variants:
        for seed in range(3):
            bank.learn(draw("lobes", name, seed, 40), name, image_hash=100 * ord(name) + seed)
    bank.commit()
    if calibrated:
        for name in variants:
            patches = np.tile(
                [draw("lobes", name, seed, CALIBRATION_PATCHES // 2) for seed in range(50, 56)], (1, 2, 1)
            )
            patches[4:] += 4
            bank.calibrate(name, patches, np.arange(6) >= 4, (0.1, 0.2, 0.7))
    return bank


@contextmanager
def unchanged(bank: MemoryBank) -> Generator[None]:
    """Check that the bank stays as it was, and all that is still in its streams."""

    def state() -> object:
        left_out = {"known", "_index", "_quantizer"}
        streams = [vars(stream).items() for stream in bank._streams.values()]
        return bank.to_arrays(), [{key: value for key, value in own if key not in left_out} for own in streams]

    before = copy.deepcopy(state())
    try:
        yield
    finally:
        np.testing.assert_equal(state(), before)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Generator[None]:
    """Threads of faiss wait for each other longer than these small searches take."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool overflow after a few images."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 40)


# Farthest-first traversal


def plain_farthest_first(
    points: Array,
    size: int,
    distances: Array | None,
    stop: float,
) -> tuple[list[int], list[float]]:
    """The plain loop in double precision."""
    left = np.full(len(points), np.inf) if distances is None else distances.astype(np.float64)
    picks: list[int] = []
    radii: list[float] = []
    while len(picks) < min(size, len(points)):
        pick = int(left.argmax()) if picks or distances is not None else 0
        if left[pick] <= stop:
            break
        picks.append(pick)
        radii.append(left[pick])
        left = np.minimum(left, np.linalg.norm(points.astype(np.float64) - points[pick], axis=1))
        left[pick] = -1
    return picks, radii


@pytest.mark.parametrize("count", [1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 4 * BLOCK_SIZE])
@pytest.mark.parametrize("start", ["empty", "set"])
@pytest.mark.parametrize("stop", [-1.0, 1.5])
def test_farthest_first_is_the_plain_loop(count: int, start: str, stop: float) -> None:
    """Without ties the picks are the same, above and below the size of a block."""
    rng = np.random.default_rng(count)
    points = rng.normal(size=(count, 6)).astype(np.float32)
    distances = distances_between(points, rng.normal(size=(3, 6))).astype(np.float32) if start == "set" else None
    for size in {0, 1, count // 3, count}:
        picks, radii = farthest_first(points, size, distances, stop)
        expected, expected_radii = plain_farthest_first(points, size, distances, stop)
        assert picks.tolist() == expected
        np.testing.assert_allclose(radii, expected_radii, rtol=1e-4, atol=1e-3)


@REPEATABLE
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    count=st.integers(0, 60),
    size=st.integers(0, 70),
    start=st.booleans(),
    stop=st.sampled_from([-1.0, 0.0, 1.0]),
    block=st.sampled_from([1, 7, BLOCK_SIZE]),
    seed=st.integers(0, 99),
)
def test_farthest_first_picks_the_farthest(
    shape: str, count: int, size: int, start: bool, stop: float, block: int, seed: int
) -> None:
    """With ties and duplicates too, every pick is a farthest point, and a smaller size gives a prefix."""
    points = draw(shape, "a", seed, count)
    distances = distances_between(points, points[:2] + 1).astype(np.float32) if start and count else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_center, "BLOCK_SIZE", block)
        picks, radii = farthest_first(points, size, distances, stop)
        shorter = farthest_first(points, size // 2, distances, stop)
    assert len(set(picks.tolist())) == len(picks) == len(radii) <= min(size, count)
    np.testing.assert_array_equal(shorter[0], picks[: size // 2])
    np.testing.assert_array_equal(shorter[1], radii[: size // 2])
    rounding = 2e-3 * max(1.0, np.abs(points).max(initial=0))
    left = np.full(count, np.inf) if distances is None else distances.astype(np.float64)
    for pick, radius in zip(picks, radii, strict=True):
        assert left[pick] == radius or abs(left[pick] - radius) <= rounding
        assert left[pick] >= left.max() - rounding
        left = np.minimum(left, np.linalg.norm(points.astype(np.float64) - points[pick], axis=1))
    if len(picks) < min(size, count):
        assert left[np.setdiff1d(np.arange(count), picks)].max() <= max(stop, 0) + rounding


# The certificate and the budget


class Learning(RuleBasedStateMachine):
    """Any sequence of operations, beside a ledger of all that was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.learned: Ledger = {}  # in the bank
        self.open: Ledger = {}  # in a stream
        self.images: dict[str, int] = {}

    @initialize(
        size=st.integers(1, 90),
        pool=st.sampled_from([8, 60, 200]),
        dtype=st.sampled_from(["float32", "float16"]),
        shape=st.sampled_from(sorted(SHAPES)),
        magnitude=st.sampled_from([1.0, 0.01, 100.0]),
        dimension=st.integers(1, 5),
    )
    def begin(self, size: int, pool: int, dtype: str, shape: str, magnitude: float, dimension: int) -> None:
        """An empty bank."""
        self.patch.setattr(memory_bank, "SMALLEST_POOL", pool)
        self.bank = MemoryBank(size, dtype)
        self.draw = lambda name, seed, count: draw(shape, name, seed, count, dimension, magnitude)
        self._remember()

    def _remember(self) -> None:
        """Note where a failed session leads back to."""
        self.images = {}
        self.committed = dict(self.learned), copy.deepcopy(self.bank), self._counts()

    def _counts(self) -> dict[str, int]:
        return {name: len(variant.radii) for name, variant in self.bank.variants.items()}

    def _bring_in(self, images: Ledger) -> None:
        for name, patches in images.items():
            self.learned[name] = self.learned.get(name, []) + patches

    @rule(name=st.sampled_from("abcd"), seed=st.integers(0, 9), count=st.sampled_from([1, 12, 50, 300]))
    def learn(self, name: str, seed: int, count: int) -> None:
        """Take in an image."""
        patches = self.draw(name, seed, count)
        if len({*self.learned, *self.open, name}) > self.bank.size:
            with unchanged(self.bank), pytest.raises(ValueError, match="cannot hold"):
                self.bank.learn(patches, name)
            return
        assert self.bank.learn(patches, name) == name
        self.open.setdefault(name, []).append(patches)
        for closed in {*self.open} - {*self.bank._streams}:
            self._bring_in({closed: self.open.pop(closed)})
        self.images[name] = self.images.get(name, 0) + 1

    @rule()
    def flush(self) -> None:
        """Bring the streams into the bank."""
        self.bank.flush()
        self._bring_in(self.open)
        self.open = {}

    @rule()
    def commit(self) -> None:
        """End a session."""
        self._compare(self.bank.commit())

    def _compare(self, report: memory_bank.Report) -> None:
        """Check a report against what was learned since the last."""
        self._bring_in(self.open)
        self.open = {}
        before, now = self.committed[2], self._counts()
        assert report.variants == self.images
        assert report.added == {
            name: now[name] - before.get(name, 0) for name in now if now[name] > before.get(name, 0)
        }
        assert report.removed == {name: before[name] - now[name] for name in before if before[name] > now[name]}
        assert report.num_vectors == len(self.bank)
        assert report.nbytes == self.bank.nbytes
        assert report.radius_bound == self.bank.radius_bound
        self._remember()

    @rule()
    def fail(self) -> None:
        """Go back to the end of the last session, with the copy that was made of it."""
        learned, bank, _ = self.committed
        self.bank = copy.deepcopy(bank)
        self.learned, self.open = dict(learned), {}
        self._remember()

    @rule()
    def reload(self) -> None:
        """Save and load, in the middle of a session too."""
        bank = reloaded(self.bank)
        assert same(bank, self.bank)
        self.bank = bank
        # What follows is reported as of a session of its own, with the images that were not in the bank yet.
        self._remember()
        self.images = {name: len(patches) for name, patches in self.open.items()}
        self.committed = {**self.learned}, self._without_streams(), self._counts()

    def _without_streams(self) -> MemoryBank:
        bank = copy.deepcopy(self.bank)
        bank._streams = {}
        return bank

    @rule(
        size=st.integers(2, 90),
        dtype=st.sampled_from(["float32", "float16"]),
        images=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(10, 19)), max_size=5),
    )
    def merge(self, size: int, dtype: str, images: list[tuple[str, int]]) -> None:
        """Learn what another bank knows."""
        assume(len({name for name, _ in images}) <= size)
        other = MemoryBank(size, dtype)
        new: Ledger = {}
        for name, seed in images:
            new.setdefault(name, []).append(self.draw(name, seed, 70))
            other.learn(new[name][-1], name)
        other.commit()
        if len({*self.learned, *self.open, *new}) > self.bank.size:
            with unchanged(self.bank), unchanged(other), pytest.raises(ValueError, match="cannot hold"):
                self.bank.merge(other)
            return
        with unchanged(other):
            report = self.bank.merge(other)
        self._bring_in(new)
        for name, patches in new.items():
            self.images[name] = self.images.get(name, 0) + len(patches)
        self._compare(report)

    @invariant()
    def promises_hold(self) -> None:
        """Whatever is in the bank lies within the bound, and the budget is kept."""
        if hasattr(self, "bank"):
            check(self.bank, self.learned)

    def teardown(self) -> None:
        """Restore the size of the pool."""
        self.patch.undo()


def test_budget_certificate_and_reports_hold_after_any_operations() -> None:
    """Variants in any order, several sessions, tiny budgets, merges, reloads."""
    run_state_machine_as_test(Learning, settings=settings(REPEATABLE, max_examples=120, stateful_step_count=14))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_certificate_with_an_approximate_index(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """A pool that is large enough for the inverted lists of faiss, which miss some neighbors."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 9000)
    bank = MemoryBank(1000, dtype)
    learned: Ledger = {name: [draw("curve", name, seed, 700, 6) for seed in range(14)] for name in "ab"}
    for name, images in learned.items():
        for image in images:
            bank.learn(image, name)
        assert type(bank._streams[name]._index).__name__ == "IndexIVFFlat"
    bank.commit()
    check(bank, learned)


def test_bound_stays_near_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of use only so; a variant that grows for 200 sessions would make long chains of charges."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 88)
    ratios = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        bank, images = MemoryBank(40), []
        for session in range(200):
            images.append(rng.uniform(0, 1 + 0.03 * session, (60, 3)).astype(np.float32))
            bank.learn(images[-1], "a")
            bank.commit()
        ratios.append(bank.radius_bound / distances_between(np.concatenate(images), bank.vectors).max())
    assert np.mean(ratios) < 4


@pytest.mark.usefixtures("small_pool")
def test_known_patches_take_no_room_in_the_pool() -> None:
    """Once the pool was thinned, what lies within its resolution is only counted, also in the next image."""
    bank = MemoryBank(30)
    for seed in range(12):
        bank.learn(draw("lobes", "a", seed, 60), "a")
    stream = bank._streams["a"]
    points = stream.points
    assert stream.resolution > 0
    image = 50 + draw("lobes", "a", 12, 20)
    for added in (True, False):
        bank.learn(image, "a")
        assert (len(stream.points) > len(points)) == added
        points = stream.points


@pytest.mark.usefixtures("small_pool")
def test_certificate_far_from_the_origin() -> None:
    """There faiss loses the digits of the distances, once a search is large enough to be a matrix product."""
    rng = np.random.default_rng(0)
    sheet = np.random.default_rng(7).normal(size=(2, 152))
    images = [(30 + rng.normal(size=(1040, 2)) @ sheet).astype(np.float32) for _ in range(3)]
    bank = MemoryBank(500)
    for image in images:
        bank.learn(image, "a")
    bank.commit()
    check(bank, {"a": images})


@pytest.mark.parametrize("thinned", [False, True])
def test_covers_of_another_bank_are_charged(thinned: bool) -> None:
    """A vector that another bank's vector repeats takes over what that one stands for, as a duplicate or as known."""
    own = np.array([[0, 0], [1, 0], [0.4, 0]] if thinned else [[0, 0]], np.float32)
    others = np.array([[0, 0], [9, 0], [1, 0]], np.float32)
    bank, other = MemoryBank(2), MemoryBank(1)
    for each, patches in ((bank, own), (other, others)):
        each.learn(patches, "a")
        each.commit()
    assert (bank.variants["a"].resolution > 0) == thinned
    bank.merge(other)
    check(bank, {"a": [own, others]})


def test_covers_within_an_image_are_charged() -> None:
    """A patch that another patch of the same image makes superfluous leaves it what it stands for."""
    own = np.array([[0, 0], [1, 0], [0.4, 0]], np.float32)
    bank = MemoryBank(2)
    bank.learn(own, "a")
    bank.commit()
    other = MemoryBank(2)
    other.learn(np.array([[5, 0], [5.3, 0]], np.float32), "a")
    other.commit()
    other.variants["a"].covers[0] = 7
    bank.merge(other)
    check(bank, {"a": [own, np.array([[12, 0]], np.float32)]})


@REPEATABLE
@given(order=st.permutations("abcd"), size=st.integers(4, 120), dtype=st.sampled_from(["float32", "float16"]))
def test_order_of_variants_does_not_matter(order: list[str], size: int, dtype: str) -> None:
    """Learned one after the other, variants share the budget in the same way in any order."""
    banks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_bank, "SMALLEST_POOL", 40)
        for names in (sorted(order), order):
            bank = MemoryBank(size, dtype)
            for name in names:
                for seed in range(3):
                    bank.learn(draw("lobes", name, seed, 30 * (1 + ord(name) % 3)), name)
                bank.commit()
            banks.append(bank)
    for name in order:
        np.testing.assert_array_equal(banks[0].variants[name].vectors, banks[1].variants[name].vectors)


def test_order_does_not_matter_after_the_pool_overflowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complex variant that the pool made coarser leaves room, which a plain one fills in either order."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 640)
    rng = np.random.default_rng(0)
    patches = {
        "complex": rng.normal(size=(660, 6)).astype(np.float32),
        "plain": rng.uniform(0, 1, (500, 1)).astype(np.float32) * np.ones(6, np.float32),
    }
    banks = [MemoryBank(300), MemoryBank(300)]
    for bank, order in zip(banks, (list(patches), list(patches)[::-1]), strict=True):
        for name in order:
            for start in range(0, len(patches[name]), 30):
                bank.learn(patches[name][start : start + 30], name)
            bank.commit()
        assert len(bank) == 300
    assert len(banks[0].variants["complex"].radii) == 160  # a quarter of the pool
    for name in patches:
        np.testing.assert_array_equal(banks[0].variants[name].vectors, banks[1].variants[name].vectors)


def test_budget_is_divided_by_scaled_radius() -> None:
    """The same product under a hundredfold scale gets the same share, a plainer one a smaller share."""
    bank = MemoryBank(200)
    for name, points in {
        "small": draw("curve", "x", 0, 400),
        "large": 100 * draw("curve", "x", 0, 400),
        "plain": np.linspace(0, 5, 400, dtype=np.float32)[:, None] * np.ones(4, np.float32),
    }.items():
        bank.learn(points, name)
    bank.commit()
    small, large, plain = (len(variant.radii) for variant in bank.variants.values())
    assert abs(small - large) <= 2
    assert plain < small
    # What was cut off first lay at the same radius / scale.
    scaled = [variant.resolution / variant.scale for variant in bank.variants.values()]
    np.testing.assert_allclose(scaled, scaled[0], rtol=0.1)


def test_no_room_for_another_variant() -> None:
    """The bank and what was learned before survive, whether the variant is learned, found or merged."""
    bank = MemoryBank(2)
    bank.learn(draw("lobes", "a", 0, 40), "a")
    bank.commit()
    bank.learn(draw("lobes", "b", 0, 40), "b")
    for name in ("c", None):
        with unchanged(bank), pytest.raises(ValueError, match=r"2 vectors cannot hold 3 variants.*memory_size"):
            bank.learn(draw("lobes", "c", 0, 40), name)
    with unchanged(bank), pytest.raises(ValueError, match="2 vectors cannot hold 4 variants"):
        bank.merge(filled(variants="cd"))
    assert bank.commit().variants == {"b": 1}
    assert set(bank.variants) == {"a", "b"}


# Saving and loading


@REPEATABLE
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.sampled_from("ab"), st.integers(0, 9)),
            st.sampled_from(["commit", "flush"]),
        ),
        min_size=6,
        max_size=12,
    ),
    saved=st.lists(st.booleans(), min_size=12, max_size=12),
    dtype=st.sampled_from(["float32", "float16"]),
    divided=st.sampled_from([130, variant.DIVIDED_INDEX]),
    pool=st.sampled_from([150, 300]),
)
@example(
    actions=[("a", 0), ("a", 1), "commit", ("a", 2), ("a", 3), "flush", ("b", 4), ("b", 5), ("a", 6)],
    saved=[True] * 12,
    dtype="float32",
    divided=130,
    pool=150,
)
@example(
    actions=[("a", 0), ("a", 1), "commit", ("a", 2), ("a", 3), "flush", ("b", 4), ("b", 5), ("a", 6)],
    saved=[True] * 12,
    dtype="float32",
    divided=130,
    pool=300,
)
def test_going_on_from_a_saved_bank(
    actions: list[Any],
    saved: list[bool],
    dtype: str,
    divided: int,
    pool: int,
) -> None:
    """Saved and loaded at any moment, in mid-stream too, a bank ends bit by bit as one that was never saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_bank, "SMALLEST_POOL", pool)
        patch.setattr(variant, "DIVIDED_INDEX", divided)
        bank = MemoryBank(50, dtype)
        kept = MemoryBank(50, dtype)
        for action, is_saved in zip([*actions, "commit"], [*saved, True][-len(actions) - 1 :], strict=True):
            if isinstance(action, tuple):
                name, seed = action
                for each in (bank, kept):
                    each.learn(
                        draw("lobes", name, seed, 110), name, image_hash=seed, views=draw("lobes", name, 50 + seed, 30)
                    )
            else:
                getattr(bank, action)()
                getattr(kept, action)()
            if is_saved:
                bank = reloaded(bank)
            assert same(bank, kept)


def test_a_saved_stream_is_reported_whole() -> None:
    """Images that were learned before the interruption are part of the update."""
    bank = filled()
    bank.learn(draw("lobes", "c", 0, 40), "c")
    bank = reloaded(bank)
    bank.learn(draw("lobes", "c", 1, 40), "c")
    assert (bank.is_learning, bank.images("c"), bank.images("a"), bank.images("d")) == (True, 2, 3, 0)
    report = bank.commit()
    assert report.variants == {"c": 2}
    assert report.added == {"c": len(bank.variants["c"].radii)}
    assert (bank.is_learning, bank.images("c")) == (False, 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [2, 300])
def test_calibration_patches_give_the_score_that_will_be(dtype: str, count: int) -> None:
    """Of the whole variant, and once a half, a quarter or an eighth of its vectors are left; also of few patches."""
    bank = MemoryBank(400, dtype)
    for seed in range(4):
        bank.learn(draw("curve", "a", seed, 300), "a")
    bank.commit()
    images = [draw("curve", "a", seed, count) for seed in range(10, 16)]
    kept = [bank.calibration_patches("a", image, nearest(image, bank.vectors)[0]) for image in images]
    assert {patches.shape for patches in kept} == {(CALIBRATION_PATCHES, 4)}
    bank.calibrate("a", np.stack(kept), np.zeros(6, bool))
    whole = bank.variants["a"]
    for share in (1, 2, 4, 8):
        bank.variants = {"a": variant.cut(whole, math.ceil(len(whole.radii) / share))}
        expected = [nearest(image, bank.vectors)[0].max() for image in images]
        lowest, highest = bank.thresholds("a")["image"][1:]
        # Patches are kept in half precision.
        assert (lowest, highest) == pytest.approx((min(expected), max(expected)), rel=5e-3)


def test_reloaded_calibration() -> None:
    """Thresholds are the same, to the bit, and unequal calibrations do not mix."""
    bank = filled(variants="abc", calibrated=True)
    far = np.full((2, CALIBRATION_PATCHES, 4), 1e6, np.float32)
    bank.calibrate("b", far, np.array([False, True]), (0.1, 1 / 3, np.nan))
    bank.learn(draw("lobes", "d", 0, 40), "d")
    bank.commit()
    again = reloaded(bank)
    assert same(reloaded(again), bank)
    for name in "abcd":
        np.testing.assert_equal(again.thresholds(name), bank.thresholds(name))


def test_empty_bank_is_saved() -> None:
    """Before anything was learned."""
    bank = reloaded(MemoryBank(7, "float16"))
    assert (bank.size, bank.dtype, len(bank), bank.variants) == (7, np.float16, 0, {})
    assert bank.radius_bound == 0


def test_load_refuses_another_schema() -> None:
    """Of a newer version, or none at all."""
    arrays, plain = filled().to_arrays()
    for version in (1, 3, None):
        with pytest.raises(ValueError, match=f"schema version {version}"):
            MemoryBank.from_arrays(arrays, plain | {"schema_version": version})


def saved() -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a bank of two calibrated variants, in the middle of a third and of one of the two."""
    bank = filled(calibrated=True)
    for seed in range(3):
        for name in "ac":
            bank.learn(draw("lobes", name, 10 + seed, 40), name, image_hash=ord(name) + seed)
    return bank.to_arrays()


ARRAYS = sorted(saved()[0])


@pytest.mark.parametrize("key", [*ARRAYS, "size", "dtype", "variants", "streams"])
def test_load_refuses_what_lacks_a_part(key: str) -> None:
    """The message names the part."""
    arrays, plain = saved()
    (arrays if key in arrays else plain).pop(key)
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        MemoryBank.from_arrays(arrays, plain)


@pytest.mark.parametrize("key", ["name", "vectors", "scale", "resolution", "images", "spread", "calibration_images"])
def test_load_refuses_a_variant_that_lacks_a_part(key: str) -> None:
    """The message names the part."""
    arrays, plain = saved()
    del plain["variants"][1][key]
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        MemoryBank.from_arrays(arrays, plain)


@pytest.mark.parametrize(
    "key",
    sorted(
        {*ARRAYS}
        - {"image_hashes", *(f"stream_{i}_{key}" for i in (0, 1) for key in ("points", "hashes", "novelties"))}
    ),
)
@pytest.mark.parametrize(
    "change",
    [lambda array: array[:-1], lambda array: np.concatenate([array, array[:1]])],
    ids=["shorter", "longer"],
)
def test_load_refuses_arrays_of_another_length(key: str, change: Callable[[Array], Array]) -> None:
    """Shorter or longer than announced."""
    arrays, plain = saved()
    arrays[key] = change(arrays[key])
    with pytest.raises(ValueError, match=f"damaged: .*{key} has the shape"):
        MemoryBank.from_arrays(arrays, plain)


@pytest.mark.parametrize(
    "key",
    sorted(
        {*ARRAYS} - {"image_hashes", "stream_0_hashes", "stream_1_hashes", "calibration_labels", "calibration_pixels"}
    ),
)
def test_load_refuses_values_that_are_not_finite(key: str) -> None:
    """NaN would spread to every score."""
    arrays, plain = saved()
    arrays[key][1] = np.nan
    with pytest.raises(ValueError, match=f"damaged: .*{key}"):
        MemoryBank.from_arrays(arrays, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(size=59), "60 vectors, but at most 59"),
        (lambda plain: plain.update(dtype="float16"), "vectors are of float32"),
        (lambda plain: plain.update(dtype="int8"), "precision must be"),
        (lambda plain: plain["variants"][0].update(name="b"), "twice"),
        (lambda plain: plain["variants"][0].update(scale=0.0), "scale, resolution, spread or images of a"),
        (
            lambda plain: plain["variants"][1].update(resolution=float("nan")),
            "scale, resolution, spread or images of b",
        ),
        (lambda plain: plain["variants"][1].update(spread=-1.0), "scale, resolution, spread or images of b"),
        (lambda plain: plain["streams"][1].update(name=""), "name or divided_at of stream 1"),
        (lambda plain: plain["streams"][1].update(name="a"), "a stream is there twice"),
        (lambda plain: plain["streams"][1].update(divided_at=121), "name or divided_at of stream 1"),
        (lambda plain: plain["streams"][1].update(divided_at=64), "name or divided_at of stream 1"),
        (lambda plain: plain["streams"][0].update(images=-1), "resolution, spread or images of stream 0"),
        (lambda plain: shift(plain, 1), "radii of b do not fall"),
        (lambda plain: shift(plain, -plain["variants"][0]["vectors"]), "radii of a do not fall"),
    ],
    ids=[
        "size",
        "dtype",
        "unknown dtype",
        "name",
        "scale",
        "resolution",
        "spread",
        "stream",
        "stream twice",
        "index",
        "few lists",
        "count",
        "more vectors",
        "no vectors",
    ],
)
def test_load_refuses_contradictions(change: Callable[[dict[str, Any]], None], message: str) -> None:
    """Numbers that cannot be true together."""
    arrays, plain = saved()
    change(plain)
    with pytest.raises(ValueError, match=message):
        MemoryBank.from_arrays(arrays, plain)


def shift(plain: dict[str, Any], count: int) -> None:
    """Announce more vectors for the first variant and less for the second."""
    first, second = plain["variants"]
    first["vectors"] += count
    second["vectors"] -= count


# Several variants in turn


@REPEATABLE
@given(names=st.lists(st.sampled_from("abc"), min_size=1, max_size=12), known=st.booleans())
def test_variants_in_turn_are_as_one_after_another(names: list[str], known: bool) -> None:
    """Image by image in any order, the bank ends bit by bit as if each variant had come at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_bank, "SMALLEST_POOL", 300)
        mixed = filled(50, variants="abc", calibrated=True) if known else MemoryBank(50)
        sorted_out = copy.deepcopy(mixed)
        first = list(dict.fromkeys(names))
        for bank, order in (
            (mixed, [*enumerate(names)]),
            (sorted_out, sorted(enumerate(names), key=lambda item: first.index(item[1]))),
        ):
            for seed, name in order:
                bank.learn(draw("lobes", name, 10 + seed, 90), name, image_hash=seed)
        assert mixed.commit().variants == sorted_out.commit().variants
        assert same(mixed, sorted_out)


@pytest.mark.usefixtures("small_pool")
def test_open_streams_are_bounded() -> None:
    """Together they take no more room than some full pools; what was learned is not lost."""
    bank, learned = (
        MemoryBank(30),
        {name: [draw("curve", name, seed, 50, 4) for seed in range(9)] for name in "abcdefgh"},
    )
    pool, opened = 0, 0
    for seed in range(9):
        for name, images in learned.items():
            bank.learn(images[seed], name)
            pool = bank._streams[name].capacity if name in bank._streams else pool
            opened = max(opened, len(bank._streams))
            assert sum(len(stream.points) for stream in bank._streams.values()) <= 4 * pool
    assert opened > 1
    assert bank.commit().variants == dict.fromkeys("abcdefgh", 9)
    check(bank, learned)


def test_calibration_while_a_stream_is_open() -> None:
    """Thresholds that are set meanwhile remain."""
    bank = filled()
    bank.learn(draw("lobes", "a", 9, 40), "a")
    bank.calibrate("a", np.ones((2, CALIBRATION_PATCHES, 4), np.float32), np.array([False, True]))
    bank.commit()
    assert bank.variants["a"].calibration is not None


# Images that are known


@pytest.mark.usefixtures("small_pool")
def test_known_image_changes_nothing() -> None:
    """In the session in which it was learned and in a later one, whatever name it comes with."""
    bank = filled(calibrated=True)
    bank.learn(draw("lobes", "c", 0, 40), "c", image_hash=7)
    for name in ("c", "a", None):
        with unchanged(bank):
            assert bank.learn(draw("lobes", "c", 0, 40), name, image_hash=7) is None
    assert bank.commit().known_images == 3
    with unchanged(bank):
        assert bank.learn(draw("lobes", "c", 0, 40), "c", image_hash=7) is None
        bank.count_known(2)
        report = bank.commit()
    assert (report.known_images, report.variants, report.added, report.removed) == (3, {}, {}, {})
    assert bank.knows(7)
    assert not bank.knows(8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", ["lobes", "black"])
def test_repeated_patches_add_no_vectors(monkeypatch: pytest.MonkeyPatch, dtype: str, shape: str) -> None:
    """Without a hash, often enough that the pool overflows, in one session and in later ones."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 600)
    bank = MemoryBank(200, dtype)
    image = draw(shape, "a", 0, 100)
    for _ in range(15):
        bank.learn(image, "a")
    bank.commit()
    vectors = bank.vectors
    assert len(vectors) == len(np.unique(image.astype(dtype), axis=0))
    assert bank.variants["a"].resolution == 0  # nothing was lost
    check(bank, {"a": [image]})
    for _ in range(3):
        for _ in range(10):
            bank.learn(image, "a")
        report = bank.commit()
        assert (report.added, report.removed) == ({}, {})
    np.testing.assert_array_equal(np.unique(bank.vectors, axis=0), np.unique(vectors, axis=0))


def test_full_bank_stays_full() -> None:
    """Also when images that it knows come again without a hash."""
    bank = MemoryBank(100)
    for _ in range(2):
        for name in "abc":
            for seed in range(3):
                bank.learn(draw("lobes", name, seed, 60), name)
        bank.commit()
        assert len(bank) == 100


def test_remembered_images_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten, in the stream, the bank and a merge."""
    for module in (memory_bank, variant):
        monkeypatch.setattr(module, "REMEMBERED_IMAGES", 4)
    bank, other = MemoryBank(9), MemoryBank(9)
    for value in range(9, 0, -1):
        bank.learn(np.ones((1, 2), np.float32), "a", image_hash=value)
        assert len(bank._streams["a"].hashes) <= 4
    bank.commit()
    assert bank.image_hashes.tolist() == [4, 3, 2, 1]
    other.learn(np.ones((1, 2), np.float32), "a", image_hash=0)
    other.learn(np.ones((1, 2), np.float32), "a", image_hash=2)
    other.commit()
    bank.merge(other)
    assert bank.image_hashes.tolist() == [3, 2, 1, 0]


# Merging


def test_merge_joins_what_two_banks_know() -> None:
    """Variants of one, of the other and of both, their images and their calibration."""
    bank, other = filled(variants="ab"), filled(80, variants="bc", calibrated=True)
    bank.learn(draw("lobes", "d", 0, 40), "d", image_hash=1)
    with unchanged(other):
        report = bank.merge(other)
    assert report.variants == {"b": 3, "c": 3, "d": 1}
    assert {name: variant.images for name, variant in bank.variants.items()} == {"a": 3, "b": 6, "c": 3, "d": 1}
    for value in (1, 100 * ord("a"), 100 * ord("b"), 100 * ord("c")):
        assert bank.knows(value)
    assert len(bank.image_hashes) == 10  # those of b are the same
    assert bank.variants["b"].calibration == other.variants["b"].calibration
    assert bank.variants["c"].calibration == other.variants["c"].calibration
    patches = {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "abc"}
    check(bank, {**patches, "d": [draw("lobes", "d", 0, 40)]})


def test_merge_takes_what_sets_thresholds() -> None:
    """Scores of images before they were learned, of a variant that both know too."""
    bank, other = filled(), filled()
    own, others = bank.variants["a"].novelties, other.variants["a"].novelties
    assert len(others)
    bank.merge(other)
    assert bank.variants["a"].novelties.tolist() == [*own, *others]


def test_merge_of_a_bank_that_learns() -> None:
    """Is refused, for what is not committed would be lost."""
    bank, other = filled(), filled()
    other.learn(draw("lobes", "z", 0, 40), "z")
    with unchanged(bank), pytest.raises(ValueError, match="still learns z; commit that"):
        bank.merge(other)


def test_empty_name() -> None:
    """Is refused: it is no name, and not the lack of one either."""
    bank = filled()
    with unchanged(bank), pytest.raises(ValueError, match="must not be empty"):
        bank.learn(draw("lobes", "z", 0, 40), "")


def test_merge_keeps_its_own_calibration() -> None:
    """The thresholds of a variant are those of this site."""
    bank, other = filled(calibrated=True), filled(80, calibrated=True)
    own = bank.variants["a"].calibration
    bank.merge(other)
    assert bank.variants["a"].calibration is own


def test_merge_with_an_empty_bank() -> None:
    """Either way nothing is lost, and a smaller budget is kept."""
    bank = filled(calibrated=True)
    with unchanged(bank):
        report = bank.merge(MemoryBank(5))
    assert (report.variants, report.added, report.removed) == ({}, {}, {})
    into = MemoryBank(60)
    report = into.merge(bank)
    assert same(into, bank)
    assert report.added == {name: len(variant.radii) for name, variant in bank.variants.items()}
    small = MemoryBank(8)
    small.merge(bank)
    check(small, {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "ab"})


def test_merge_refuses_another_dimension() -> None:
    """Also against a stream that is all there is."""
    other = MemoryBank(9)
    other.learn(np.ones((3, 5), np.float32), "a")
    other.commit()
    empty = MemoryBank(60)
    empty.learn(draw("lobes", "a", 0, 9), "a")
    for bank in (filled(calibrated=True), empty):
        with unchanged(bank), unchanged(other), pytest.raises(ValueError, match="dimension 5, the memory bank has 4"):
            bank.merge(other)


# Bad input

IMAGE = draw("lobes", "a", 9, 20)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (np.where(IMAGE[3] == IMAGE, np.nan, IMAGE), "NaN or infinite"),
        (np.where(IMAGE[3] == IMAGE, -np.inf, IMAGE), "NaN or infinite"),
        (IMAGE * np.float32(1e20), "reach .*holds values up to"),
        (IMAGE[0], "shape"),
        (IMAGE[None], "shape"),
        (IMAGE[:0], "shape"),
        (IMAGE[:, :0], "shape"),
        (IMAGE[:, :3], "dimension 3, the memory bank has 4"),
    ],
    ids=["NaN", "infinite", "too large", "1D", "3D", "no patches", "no dimension", "other dimension"],
)
@pytest.mark.parametrize("state", ["bank", "stream", "both"])
@pytest.mark.parametrize("variant", ["a", "c", None])
def test_bad_patches_are_refused(patches: Array, message: str, state: str, variant: str | None) -> None:
    """Whether there is a bank, a stream on its way, or both; all that was learned stays."""
    bank = MemoryBank(60) if state == "stream" else filled(calibrated=True)
    if state != "bank":
        bank.learn(draw("lobes", "b", 9, 40), "b", image_hash=1)
    with unchanged(bank), pytest.raises(ValueError, match=message):
        bank.learn(patches, variant, image_hash=2)
    assert not bank.knows(2)


def test_values_out_of_range_of_half_precision() -> None:
    """They would become infinite."""
    bank, other = filled(dtype="float16"), MemoryBank(60)
    other.learn(np.full((1, 4), 7e4, np.float32), "c")
    other.commit()
    with unchanged(bank), pytest.raises(ValueError, match=r"reach 7e\+04.*float16.*6\.55e\+04"):
        bank.learn(np.full((1, 4), 7e4, np.float32), "a")
    with unchanged(bank), pytest.raises(ValueError, match=r"reach 7e\+04"):
        bank.merge(other)


@pytest.mark.parametrize("size", [0, -3])
def test_size_must_be_positive(size: int) -> None:
    """At construction."""
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        MemoryBank(size)


def test_precision_must_be_known() -> None:
    """Integers would cut off what matters."""
    with pytest.raises(ValueError, match="got 'int8'"):
        MemoryBank(9, "int8")


def test_image_larger_than_budget_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the pool in parts, in any float type."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 80)
    bank = MemoryBank(20)
    image = draw("lobes", "a", 0, 1000)
    bank.learn(image.astype(np.float64), "a")
    assert bank.commit().num_vectors == 20
    assert bank.variants["a"].covers.dtype == np.float32
    check(bank, {"a": [image]})


@pytest.mark.parametrize("count", [2, 5, 200])
def test_reach_is_the_largest_of_the_later_novelties(count: int) -> None:
    """Of each image, the largest distance to what was known before it; the pool is not thinned here."""
    images = [draw("lobes", "a", seed, 30) for seed in range(count)]
    bank = MemoryBank(10_000)
    expected: list[float] = []
    for i, image in enumerate(images):
        if i:
            expected.append(distances_between(image, np.concatenate(images[:i])).max())
        bank.learn(image, "a", views=image + 100)  # views are no images to score
        if i == count // 2:
            bank.commit()  # in a later session it goes on
        images[i] = np.concatenate([image, image + 100])
    bank.commit()
    latest = expected[-64:]
    assert bank.variants["a"].novelties == pytest.approx(latest, rel=1e-5)
    assert bank.variants["a"].reach == pytest.approx(max(latest[len(latest) // 2 :]), rel=1e-5)
    again = MemoryBank.from_arrays(*bank.to_arrays())
    np.testing.assert_array_equal(again.variants["a"].novelties, bank.variants["a"].novelties)


def test_novelty_by_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the pool is large and indexed, novelties still are distances to it."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 9000)
    bank = MemoryBank(1000)
    for seed in range(14):
        bank.learn(draw("curve", "a", seed, 700, 6), "a")
    stream = bank._streams["a"]
    assert type(stream._index).__name__ == "IndexIVFFlat"
    points, image = stream.points, draw("curve", "a", 99, 700, 6)
    assert stream.absorb(image) == pytest.approx(distances_between(image, points).max(), rel=1e-4)


@pytest.mark.parametrize("reach", [0.0, 1e-3, 50.0])
def test_thresholds_are_raised_to_what_is_reached(reach: float) -> None:
    """By a factor that stays when the bank is saved."""
    bank = filled()
    patches = np.random.default_rng(0).normal(size=(4, CALIBRATION_PATCHES, 4)).astype(np.float32)
    bank.calibrate("a", patches, np.zeros(4, bool), (3.0, 1.0, 3.0))
    plain = bank.thresholds("a")
    bank.calibrate("a", patches, np.zeros(4, bool), (3.0, 1.0, 3.0), reach)
    factor = max(1.0, reach / plain["image"][0])
    raised = MemoryBank.from_arrays(*bank.to_arrays()).thresholds("a")
    for kind in ("image", "pixel"):
        threshold, lowest, highest = plain[kind]
        assert raised[kind] == pytest.approx((factor * threshold, lowest, factor * highest), rel=1e-5)


# Identification


def test_variants_are_found_in_an_interleaved_stream() -> None:
    """Without labels, each product gets a name of its own when it first comes and is recognised from then on."""
    bank = MemoryBank(200)
    expected = {"x": "variant_1", "y": "variant_2", "z": "variant_3"}
    for session in range(2):
        for seed, product in enumerate("xxyxzyzzxy"):
            assert bank.learn(draw("lobes", product, 10 * session + seed, 60, 16)) == expected[product]
        bank.commit()
    assert {name: variant.images for name, variant in bank.variants.items()} == {
        "variant_1": 8,
        "variant_2": 6,
        "variant_3": 6,
    }
    for product, name in expected.items():
        assert bank.identify(draw("lobes", product, 99, 60, 16)) == name
    assert bank.identify(draw("lobes", "q", 99, 60, 16)) is None


def test_new_names_avoid_those_of_the_user() -> None:
    """In the bank and in the stream."""
    bank = MemoryBank(200)
    bank.learn(draw("lobes", "x", 0, 60, 16), "variant_1")
    bank.commit()
    bank.learn(draw("lobes", "y", 0, 60, 16), "variant_2")
    assert bank.learn(draw("lobes", "z", 0, 60, 16)) == "variant_3"
    assert bank.learn(draw("lobes", "x", 1, 60, 16)) == "variant_1"
    assert bank.learn(draw("lobes", "y", 1, 60, 16)) == "variant_2"


def test_mean_and_spread_are_those_of_all_images() -> None:
    """Whether learned in one session, in several, or by another bank."""
    images = [draw("lobes", "x", seed, 60, 16) for seed in range(6)]
    means = [image.mean(axis=0) for image in images]
    spread = np.mean([np.linalg.norm(image - mean, axis=1).mean() for image, mean in zip(images, means, strict=True)])
    bank, other = MemoryBank(50), MemoryBank(50)
    for each, learned in ((bank, images[:3]), (bank, images[3:4]), (other, images[4:])):
        for image in learned:
            each.learn(image, "x")
        each.commit()
    bank.merge(other)
    np.testing.assert_allclose(bank.variants["x"].prototype, np.mean(means, axis=0), rtol=1e-4)
    assert bank.variants["x"].spread == pytest.approx(spread, rel=1e-4)


def test_variant_without_spread_is_found() -> None:
    """An image of nothing but one color still is an image of its product."""
    bank = MemoryBank(50)
    bank.learn(draw("black", "x", 0, 60), "x")
    assert bank.identify(draw("black", "x", 1, 60)) == "x"
    assert bank.identify(draw("black", "x", 1, 60) + np.linspace(-1, 1.2, 60, dtype=np.float32)[:, None]) == "x"
    assert bank.identify(draw("black", "x", 1, 60) + 1) is None


def test_nothing_is_identified_before_anything_is_learned() -> None:
    """An empty bank knows no variant."""
    assert MemoryBank(9).identify(IMAGE) is None


def test_scale_outlives_the_vectors_it_was_measured_on() -> None:
    """A variant that was cut to a single vector still knows its own from strangers."""
    bank = MemoryBank(1)
    for _ in range(2):
        bank.learn(draw("curve", "x", 0, 60) / 100, "x")
        bank.commit()
    assert len(bank) == 1
    assert bank.variants["x"].scale < 0.2
    assert bank.identify(draw("curve", "x", 0, 60) / 100 + 0.5) is None


# Calibration


@REPEATABLE
@given(
    scores=st.lists(st.integers(0, 6), min_size=1, max_size=14),
    data=st.data(),
    factor=st.sampled_from([1.0, 1e-8, 1e8, -1.0]),
)
@example(scores=[0, 0], data=None, factor=1.0)
def test_f1_threshold_is_the_best(scores: list[int], data: st.DataObject | None, factor: float) -> None:
    """No other decision by score has a larger F1, ties included."""
    labels = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))) if data else [True, True]
    )
    values = (np.array(scores) * factor).astype(np.float32)

    def f1(threshold: np.float32) -> float:
        called = values > threshold
        return 2 * (called & labels).sum() / (called.sum() + labels.sum())

    threshold = np.float32(f1_threshold(values, labels))
    if not labels.any():
        assert threshold == values.max()
    else:
        candidates = [np.float32(-np.inf), *values]
        assert f1(threshold) == max(f1(candidate) for candidate in candidates)


def test_f1_threshold_between_neighboring_scores() -> None:
    """Scores that differ in the last bit only are told apart, whichever of them is even."""
    low, middle, high = (1 + i * 2**-23 for i in range(3))
    for pair in ((low, middle), (middle, high)):
        assert pair[0] <= f1_threshold(np.array(pair, np.float32), np.array([False, True])) < pair[1]


def test_thresholds_follow_the_bank() -> None:
    """The same while the bank is the same; when it gets coarser, known images score higher, and thresholds rise."""
    bank = filled(calibrated=True)
    before = bank.thresholds("a")
    assert before["pixel"] == (0.1, 0.2, 0.7)
    assert bank.thresholds("a") == before
    calibration = bank.variants["a"].calibration
    assert calibration is not None
    scores = distances_between(calibration.patches.reshape(-1, 4), bank.vectors).reshape(6, -1).max(axis=1)
    assert before["image"][1:] == pytest.approx((scores.min(), scores.max()), rel=1e-5)
    assert scores[:4].max() <= before["image"][0] < scores[4:].min()
    for name in "cdefgh":
        bank.learn(draw("lobes", name, 0, 40), name)
    bank.commit()
    coarser = distances_between(calibration.patches.reshape(-1, 4), bank.vectors).reshape(6, -1).max(axis=1)
    factor = coarser.mean() / scores.mean()
    assert factor > 1
    after = bank.thresholds("a")
    assert after["image"][1:] == pytest.approx((coarser.min(), coarser.max()), rel=1e-5)
    assert after["pixel"] == pytest.approx([factor * value for value in before["pixel"]], rel=1e-5)


def test_thresholds_without_calibration() -> None:
    """What the last images scored before they were learned; unknown if there was but one."""
    bank = filled()
    bank.calibrate("b", np.empty((0, CALIBRATION_PATCHES, 4), np.float32), np.empty(0, bool))
    for name in "ab":
        reach = bank.variants[name].reach
        assert reach > 0
        assert bank.thresholds(name) == {"image": (reach, 0, reach), "pixel": (reach, 0, reach)}
    bank.learn(draw("lobes", "c", 0, 40), "c")
    bank.commit()
    assert np.isnan(list(bank.thresholds("c").values())).all()


def test_calibration_is_bounded() -> None:
    """Of each label images from the first to the last are kept, in place of the former ones."""
    bank = filled(calibrated=True)
    count = 5 * CALIBRATION_IMAGES
    patches = np.arange(count)[:, None, None] * np.ones((1, CALIBRATION_PATCHES, 4), np.float32)
    labels = np.arange(count) % 5 == 0
    bank.calibrate("a", patches, labels)
    calibration = bank.variants["a"].calibration
    assert calibration is not None
    assert calibration.labels.sum() == (~calibration.labels).sum() == CALIBRATION_IMAGES
    kept = calibration.patches[:, 0, 0]
    assert (kept.min(), kept.max()) == (0, count - 1)
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(calibration.labels, kept % 5 == 0)
    assert np.isnan(calibration.pixel).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_calibration_with_large_values(dtype: str) -> None:
    """Out of the range of float16, in which patches are kept otherwise."""
    bank = filled(dtype=dtype)
    patches = np.full((2, CALIBRATION_PATCHES, 4), 1.0, np.float32)
    bank.calibrate("a", patches, np.array([False, True]))
    assert bank.variants["a"].calibration.patches.dtype == np.float16  # type: ignore[union-attr]
    patches[1] = 1e6
    bank.calibrate("a", patches, np.array([False, True]))
    threshold, lowest, highest = bank.thresholds("a")["image"]
    assert lowest < threshold < highest == pytest.approx(2e6, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [lambda p: p[:, :, :3], lambda p: p[:, 1:], lambda p: p[1:], lambda p: p * np.nan],
    ids=["dimension", "patches", "images", "NaN"],
)
def test_bad_calibration_is_refused(change: Callable[[Array], Array]) -> None:
    """The former one stays."""
    bank = filled(calibrated=True)
    patches = np.ones((3, CALIBRATION_PATCHES, 4), np.float32)
    with unchanged(bank), pytest.raises(ValueError, match="must be finite and of shape"):
        bank.calibrate("a", change(patches), np.zeros(3, bool))


# Memory and reports


def test_memory_does_not_grow_with_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the images take no more memory at the peak, of NumPy and of the index of faiss."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 800)

    def peaks(images: int) -> tuple[int, int]:
        bank, indexed = MemoryBank(100), 0
        tracemalloc.start()
        for seed in range(images):
            bank.learn(draw("lobes", "a", seed, 64, 24), "a", image_hash=seed)
            indexed = max(indexed, bank._streams["a"]._index.ntotal)
        bank.commit()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, indexed

    peaks(2)  # imports and caches
    peak, indexed = peaks(30)
    peak_of_many, indexed_of_many = peaks(300)
    assert indexed_of_many <= 800 + 64
    assert indexed > 0
    assert peak_of_many < 1.05 * peak


def test_report_in_words() -> None:
    """One line says what changed."""
    bank = MemoryBank(50)
    bank.learn(draw("lobes", "a", 0, 70), "a")
    bank.commit()
    bank.learn(draw("lobes", "b", 0, 70), "b")
    bank.count_known(2)
    report = bank.commit()
    added = len(bank.variants["b"].radii)
    words = str(report)
    assert words.startswith(
        f"learned b: 1 images (2 known already); vectors added {added} of b, removed {added} of a, now 50"
    )
    assert f"radius bound {bank.radius_bound:.2f}" in words
    assert str(MemoryBank(9).commit()).startswith(
        "learned nothing new (0 known already); vectors added none, removed none"
    )
    assert report.seconds > 0
