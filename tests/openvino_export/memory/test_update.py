# SPDX-License-Identifier: Apache-2.0
"""Tests of learning: what it promises must hold for whatever is learned, in whatever order."""

import copy
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from openvino_export.memory import memory_bank, patch_pool
from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update, merged

from .banks import (
    REPEATABLE,
    SHAPES,
    Array,
    Ledger,
    as_if_not_called,
    check,
    draw,
    filled,
    learned,
    reloaded,
    same,
    unchanged,
)


class Learning(RuleBasedStateMachine):
    """Any sequence of operations, beside a ledger of all that was learned and a copy of every bank that was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.learned: Ledger = {}  # in the bank
        self.open: Ledger = {}  # in a pool
        self.images: dict[str, int] = {}
        self.seen: list[tuple[MemoryBank, MemoryBank]] = []

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
        self.patch.setattr(updates, "SMALLEST_POOL", pool)
        self.update = Update(MemoryBank(size, dtype))
        self.draw = lambda name, seed, count: draw(shape, name, seed, count, dimension, magnitude)
        self._remember()

    def _remember(self) -> None:
        """Note where dropping the update leads back to."""
        self.images = {}
        self.committed = dict(self.learned), self.update.bank, self._counts()

    def _counts(self) -> dict[str, int]:
        return {name: len(variant.radii) for name, variant in self.update.bank.variants.items()}

    def _bring_in(self, images: Ledger) -> None:
        for name, patches in images.items():
            self.learned[name] = self.learned.get(name, []) + patches

    @rule(name=st.sampled_from("abcd"), seed=st.integers(0, 9), count=st.sampled_from([1, 12, 50, 300]))
    def add(self, name: str, seed: int, count: int) -> None:
        """Take in an image."""
        patches = self.draw(name, seed, count)
        if len({*self.learned, *self.open, name}) > self.update.bank.size:
            with as_if_not_called(self.update), pytest.raises(ValueError, match="cannot hold"):
                self.update.add(patches, name)
            return
        assert self.update.add(patches, name) == name
        self.open.setdefault(name, []).append(patches)
        for closed in {*self.open} - {*self.update.pools}:
            self._bring_in({closed: self.open.pop(closed)})
        self.images[name] = self.images.get(name, 0) + 1

    @rule()
    def flush(self) -> None:
        """Bring the pools into the bank."""
        self.update.flush()
        self._bring_in(self.open)
        self.open = {}

    @rule(anew=st.booleans())
    def commit(self, anew: bool) -> None:
        """End an update, and go on with it or with a new one."""
        report = self.update.commit()
        self._bring_in(self.open)
        self.open = {}
        before, now = self.committed[2], self._counts()
        assert report.variants == self.images
        assert report.added == {
            name: now[name] - before.get(name, 0) for name in now if now[name] > before.get(name, 0)
        }
        assert report.removed == {name: before[name] - now[name] for name in before if before[name] > now[name]}
        assert report.num_vectors == len(self.update.bank)
        assert report.nbytes == self.update.bank.nbytes()
        assert report.radius_bound == self.update.bank.radius_bound()
        if anew:
            self.update = Update(self.update.bank)
        self._remember()

    @rule()
    def drop(self) -> None:
        """Forget the update."""
        images, bank, _ = self.committed
        self.update = Update(bank)
        self.learned, self.open = dict(images), {}
        self._remember()

    @rule()
    def go_on(self) -> None:
        """Go on in another update, while this one is dropped."""
        update = self.update.continued()
        assert same(update, self.update)
        self.update.flush()
        self.update = update
        self._remember()
        self.images = {name: len(patches) for name, patches in self.open.items()}

    @rule()
    def reload(self) -> None:
        """Save and load, in the middle of an update too."""
        update = reloaded(self.update)
        assert same(update, self.update)
        for name in update.bank.variants:
            np.testing.assert_equal(asdict(thresholds(update.bank, name)), asdict(thresholds(self.update.bank, name)))
        self.update = update
        # What follows is reported as of an update of its own, with the images that were not in the bank yet.
        self._remember()
        self.images = {name: len(patches) for name, patches in self.open.items()}

    @rule(
        size=st.integers(2, 90),
        dtype=st.sampled_from(["float32", "float16"]),
        images=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(10, 19)), max_size=5),
    )
    def merge(self, size: int, dtype: str, images: list[tuple[str, int]]) -> None:
        """Learn what another bank knows."""
        assume(len({name for name, _ in images}) <= size)
        new: Ledger = {}
        for name, seed in images:
            new.setdefault(name, []).append(self.draw(name, seed, 70))
        other = learned(MemoryBank(size, dtype), new)
        if len({*self.learned, *self.open, *new}) > self.update.bank.size:
            with as_if_not_called(self.update), unchanged(other), pytest.raises(ValueError, match="cannot hold"):
                self.update.merge(other)
            return
        with unchanged(other):
            self.update.merge(other)
        self._bring_in(self.open)
        self._bring_in(new)
        self.open = {}
        for name, patches in new.items():
            self.images[name] = self.images.get(name, 0) + len(patches)

    @rule(name=st.sampled_from("abcd"), other=st.sampled_from("abcd"))
    def edit(self, name: str, other: str) -> None:
        """Rename, delete or merge a variant, as far as that is possible."""
        self.flush()
        bank = self.update.bank
        assume(name in bank.variants)
        if other not in bank.variants:
            bank = bank.renamed(name, other)
            self.learned = {other if each == name else each: images for each, images in self.learned.items()}
        elif other == name:
            bank = bank.of_variants([each for each in bank.variants if each != name])
            del self.learned[name]
        else:
            bank = merged(bank, name, other)
            self.learned[other] = self.learned[other] + self.learned.pop(name)
        self.update = Update(bank)
        self._remember()

    @invariant()
    def promises_hold(self) -> None:
        """Whatever is in the bank lies within the bound, and the budget is kept."""
        if hasattr(self, "update"):
            bank = self.update.bank
            check(bank, self.learned)
            if not self.seen or self.seen[-1][0] is not bank:
                self.seen.append((bank, copy.deepcopy(bank)))

    def teardown(self) -> None:
        """No bank was changed by what was done on top of it."""
        self.patch.undo()
        assert all(same(bank, before) for bank, before in self.seen)


def test_budget_certificate_and_reports_hold_after_any_operations() -> None:
    """Variants in any order, several updates, tiny budgets, merges, reloads."""
    run_state_machine_as_test(Learning, settings=settings(REPEATABLE, max_examples=120, stateful_step_count=14))


# Several variants in turn


@REPEATABLE
@given(names=st.lists(st.sampled_from("abc"), min_size=1, max_size=12), known=st.booleans())
def test_variants_in_turn_are_as_one_after_another(names: list[str], known: bool) -> None:
    """Image by image in any order, the bank ends bit by bit as if each variant had come at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALLEST_POOL", 300)
        bank = filled(50, variants="abc", validated=True) if known else MemoryBank(50)
        mixed, sorted_out = Update(bank), Update(bank)
        first = list(dict.fromkeys(names))
        for update, order in (
            (mixed, [*enumerate(names)]),
            (sorted_out, sorted(enumerate(names), key=lambda item: first.index(item[1]))),
        ):
            for seed, name in order:
                update.add(draw("lobes", name, 10 + seed, 90), name, image_hash=seed)
        assert mixed.commit().variants == sorted_out.commit().variants
        assert same(mixed, sorted_out)


def test_variants_are_found_in_an_interleaved_stream() -> None:
    """Without labels, each product gets a name of its own when it first comes and is recognised from then on."""
    update = Update(MemoryBank(200))
    expected = {"x": "variant_1", "y": "variant_2", "z": "variant_3"}
    for session in range(2):
        for seed, product in enumerate("xxyxzyzzxy"):
            assert update.add(draw("lobes", product, 10 * session + seed, 60, 16)) == expected[product]
            assert update.identify(draw("lobes", product, 98, 60, 16)) == expected[product]
        update.commit()
    assert {name: variant.images for name, variant in update.bank.variants.items()} == {
        "variant_1": 8,
        "variant_2": 6,
        "variant_3": 6,
    }
    for product, name in expected.items():
        assert update.bank.identify(draw("lobes", product, 99, 60, 16)) == name
    assert update.bank.identify(draw("lobes", "q", 99, 60, 16)) is None


def test_new_names_avoid_those_of_the_user() -> None:
    """In the bank and in a pool."""
    update = Update(learned(MemoryBank(200), {"variant_1": [draw("lobes", "x", 0, 60, 16)]}))
    update.add(draw("lobes", "y", 0, 60, 16), "variant_2")
    assert update.add(draw("lobes", "z", 0, 60, 16)) == "variant_3"
    assert update.add(draw("lobes", "x", 1, 60, 16)) == "variant_1"
    assert update.add(draw("lobes", "y", 1, 60, 16)) == "variant_2"


# Images that are known


@pytest.mark.usefixtures("small_pool")
def test_known_image_changes_nothing() -> None:
    """In the update in which it was learned and in a later one, whatever name it comes with."""
    update = Update(filled(validated=True))
    update.add(draw("lobes", "c", 0, 40), "c", image_hash=7)
    before = copy.deepcopy(update)
    for name in ("c", "a", None):
        assert update.add(draw("lobes", "c", 0, 40), name, image_hash=7) is None
        assert same(update, before)
    assert update.knows(7)
    assert update.commit().known_images == 4
    bank = update.bank
    update = Update(bank)
    with unchanged(bank):
        assert update.add(draw("lobes", "c", 0, 40), "c", image_hash=7) is None
        report = update.commit()
    assert update.bank is bank
    assert (report.known_images, report.variants, report.added, report.removed) == (1, {}, {}, {})
    assert update.knows(7)
    assert not update.knows(8)
    assert update.report.known_images == 1


def test_remembered_images_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten, in the pool, the bank and a merge."""
    for module in (memory_bank, patch_pool):
        monkeypatch.setattr(module, "REMEMBERED_IMAGES", 4)
    update, other = Update(MemoryBank(9)), Update(MemoryBank(9))
    for value in range(9, 0, -1):
        update.add(np.ones((1, 2), np.float32), "a", image_hash=value)
        assert len(update.pools["a"].hashes) <= 4
    update.commit()
    assert update.bank.image_hashes.tolist() == [4, 3, 2, 1]
    other.add(np.ones((1, 2), np.float32), "a", image_hash=0)
    other.add(np.ones((1, 2), np.float32), "a", image_hash=2)
    other.commit()
    update.merge(other.bank)
    assert update.bank.image_hashes.tolist() == [3, 2, 1, 0]


# What is refused

IMAGE = draw("lobes", "a", 9, 20)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (np.where(IMAGE[3] == IMAGE, np.nan, IMAGE), "NaN or infinite"),
        (np.where(IMAGE[3] == IMAGE, -np.inf, IMAGE), "NaN or infinite"),
        (IMAGE * np.float32(1e20), "reach .*holds values up to"),
        (IMAGE[0], "shape"),
        (IMAGE[None, None], "shape"),
        (np.where(IMAGE[3] == IMAGE, np.nan, IMAGE).reshape(4, 5, 4), "NaN or infinite"),
        (IMAGE.reshape(2, 10, 4)[:, :0], "shape"),
        (IMAGE.reshape(2, 10, 4)[..., :3], "dimension 3, the memory bank has 4"),
        (IMAGE[:0], "shape"),
        (IMAGE[:, :0], "shape"),
        (IMAGE[:, :3], "dimension 3, the memory bank has 4"),
    ],
    ids=[
        "NaN",
        "infinite",
        "too large",
        "1D",
        "4D",
        "NaN, 3D",
        "no patches, 3D",
        "other dimension, 3D",
        "no patches",
        "no dimension",
        "other dimension",
    ],
)
@pytest.mark.parametrize("known", ["bank", "pool", "both"])
@pytest.mark.parametrize("variant", ["a", "c", None])
def test_bad_patches_are_refused(patches: Array, message: str, known: str, variant: str | None) -> None:
    """Whether there is a bank, a pool on its way, or both; the update ends as if they had never come."""
    update = Update(MemoryBank(60) if known == "pool" else filled(validated=True))
    if known != "bank":
        update.add(draw("lobes", "b", 9, 40), "b", image_hash=1)
    twin = copy.deepcopy(update)
    with as_if_not_called(update), unchanged(update.bank), pytest.raises(ValueError, match=message):
        update.add(patches, variant, image_hash=2)
    assert not update.knows(2)
    for each in (update, twin):
        each.add(IMAGE, variant, image_hash=2)
    assert update.commit().variants == twin.commit().variants
    assert same(update, twin)


def test_empty_name() -> None:
    """Is refused: it is no name, and not the lack of one either."""
    update = Update(filled())
    with as_if_not_called(update), pytest.raises(ValueError, match="must not be blank"):
        update.add(draw("lobes", "z", 0, 40), " ")


def test_values_out_of_range_of_half_precision() -> None:
    """They would become infinite."""
    update = Update(filled(dtype="float16"))
    other = learned(MemoryBank(60), {"c": [np.full((1, 4), 7e4, np.float32)]})
    with as_if_not_called(update), pytest.raises(ValueError, match=r"reach 7e\+04.*float16.*6\.55e\+04"):
        update.add(np.full((1, 4), 7e4, np.float32), "a")
    with as_if_not_called(update), pytest.raises(ValueError, match=r"reach 7e\+04"):
        update.merge(other)


def test_no_room_for_another_variant() -> None:
    """What was learned before survives, whether the variant is added, found or merged."""
    update = Update(learned(MemoryBank(2), {"a": [draw("lobes", "a", 0, 40)]}))
    update.add(draw("lobes", "b", 0, 40), "b")
    for name in ("c", None):
        with (
            as_if_not_called(update),
            pytest.raises(ValueError, match=r"2 vectors cannot hold 3 variants.*memory_size"),
        ):
            update.add(draw("lobes", "c", 0, 40), name)
    with as_if_not_called(update), pytest.raises(ValueError, match="2 vectors cannot hold 4 variants"):
        update.merge(filled(variants="cd"))
    assert update.commit().variants == {"b": 1}
    assert set(update.bank.variants) == {"a", "b"}
