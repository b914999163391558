# SPDX-License-Identifier: Apache-2.0
"""Tests of the saved form: what is loaded is what was saved, and what is damaged is refused."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvino_export.memory import patch_pool, state
from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

from .banks import REPEATABLE, draw, filled, learned, not_learned, reloaded, same

ACTIONS = [("a", 0), ("a", 1), "commit", ("a", 2), ("a", 3), "flush", ("b", 4), ("b", 5), ("a", 6)]


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
    is_saved=st.lists(st.booleans(), min_size=12, max_size=12),
    dtype=st.sampled_from(["float32", "float16"]),
    divided=st.sampled_from([130, patch_pool.DIVIDED_INDEX]),
    pool=st.sampled_from([150, 300]),
)
@example(actions=ACTIONS, is_saved=[True] * 12, dtype="float32", divided=130, pool=150)
@example(actions=ACTIONS, is_saved=[True] * 12, dtype="float32", divided=130, pool=300)
def test_going_on_from_a_saved_update(
    actions: list[Any],
    is_saved: list[bool],
    dtype: str,
    divided: int,
    pool: int,
) -> None:
    """Saved and loaded at any moment, in mid-pool too, an update ends bit by bit as one that was never saved.

    So does one that goes on where another is, which stays as it is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALLEST_POOL", pool)
        patch.setattr(patch_pool, "DIVIDED_INDEX", divided)
        update = Update(MemoryBank(50, dtype))
        kept = Update(MemoryBank(50, dtype))
        for action, save in zip([*actions, "commit"], [*is_saved, True][-len(actions) - 1 :], strict=True):
            if isinstance(action, tuple):
                name, seed = action
                for each in (update, kept):
                    image = draw("lobes", name, seed, 140).reshape(10, 14, 4)
                    each.add(image, name, image_hash=seed, map_size=(20, 30))
            else:
                getattr(update, action)()
                getattr(kept, action)()
            if save:
                before = copy.deepcopy(state.to_arrays(kept))
                continued = kept.continued()
                continued.add(draw("lobes", "a", 99, 140), "a")
                continued.flush()
                np.testing.assert_equal(state.to_arrays(kept), before)
                update, kept = reloaded(update), kept.continued()
            assert same(update, kept)


def test_a_saved_pool_is_reported_whole() -> None:
    """Images that were learned before the interruption are part of the update."""
    update = Update(filled())
    update.add(draw("lobes", "c", 0, 40), "c", image_hash=7)
    for again in (reloaded(update), update.continued()):
        again.add(draw("lobes", "c", 1, 40), "c")
        assert again.knows(7)
        assert [*again.pools] == ["c"]
        report = again.commit()
        assert (report.variants, report.known_images) == ({"c": 2}, 1)
        assert report.added == {"c": len(again.bank.variants["c"].radii)}
        assert again.pools == {}
    assert update.commit().variants == {"c": 1}


def test_a_saved_update_stays_as_it_was_saved() -> None:
    """While the update that it was taken of goes on, with pools that are and are not thinned."""
    update = Update(MemoryBank(50))
    for seed in range(3):
        update.add(draw("lobes", "a", seed, 40), "a")
    arrays, plain = state.to_arrays(update)
    before = copy.deepcopy((arrays, plain))
    for seed in range(3, 9):
        update.add(draw("lobes", "a", seed, 40), "a")
        np.testing.assert_equal((arrays, plain), before)
    update.commit()
    np.testing.assert_equal((arrays, plain), before)


def decided() -> MemoryBank:
    """A bank of variants that decide by all that there is."""
    bank = learned(filled(150, "abcd", validated=True), {"e": [draw("lobes", "e", 0, 40)]})
    far = [np.full((9, 4), value, np.float32) for value in (1e6, 2e6)]  # half precision does not hold them
    update = Update(bank.with_decision(false_alarm_rate=1 / 3).with_decision("a", false_alarm_rate=0.1))
    update.validate("b", not_learned(bank.variants["b"], far, np.array([False, True])))
    bank = update.bank.with_decision("b", threshold=1 / 7)
    update = Update(bank)
    update.show_defect(np.full((3, 3, 4), 50, np.float32), "a")
    bank = update.bank
    return bank.with_changes("c", by_hand=(np.nan, 2.5)).with_changes("d", former=(1 / 9, np.nan, 0.25))


def test_reloaded_decisions() -> None:
    """Thresholds are the same, to the bit, and unequal calibrations do not mix."""
    bank = decided()
    again = reloaded(bank).bank
    assert same(reloaded(again), bank)
    assert again.false_alarm_rate == bank.false_alarm_rate
    for name, variant in bank.variants.items():
        np.testing.assert_equal(asdict(thresholds(again, name)), asdict(thresholds(bank, name)))
        np.testing.assert_equal(asdict(again.variants[name]), asdict(variant))
        for key, value in vars(again.variants[name].calibration).items():
            assert value.dtype == getattr(variant.calibration, key).dtype or key == "patches"


def test_reloaded_images_of_a_pool() -> None:
    """With their places and the sizes of their maps, in any precision."""
    update = Update(filled())
    update.add(draw("lobes", "a", 8, 40).reshape(5, 8, 4), "a", map_size=(50, 80))
    update.add(draw("lobes", "a", 9, 40), "a")
    update.add(1e6 * draw("lobes", "c", 9, 30).reshape(5, 6, 4), "c", map_size=(20, 30))
    again = reloaded(update)
    for name, pool in update.pools.items():
        assert [each._replace(patches=None) for each in again.pools[name].samples] == [
            each._replace(patches=None) for each in pool.samples
        ]
        for one, other in zip(again.pools[name].samples, pool.samples, strict=True):
            assert one.patches.dtype == other.patches.dtype == (np.float16 if name == "a" else np.float32)
            np.testing.assert_array_equal(one.patches, other.patches)
    assert sorted(sample.grid for sample in again.pools["a"].samples) == [(0, 0), (5, 8)]


def test_empty_bank_is_saved() -> None:
    """Before anything was learned."""
    bank = reloaded(MemoryBank(7, "float16")).bank
    assert (bank.size, bank.dtype, len(bank), bank.variants) == (7, np.float16, 0, {})
    assert bank.radius_bound() == 0


@pytest.mark.parametrize("bank", [filled(validated=True), filled(dtype="float16"), decided(), MemoryBank(7)])
def test_a_file_holds_the_bank(bank: MemoryBank) -> None:
    """Bit by bit."""
    assert same(state.from_bytes(state.to_bytes(bank)), bank)


def test_damaged_files_are_refused() -> None:
    """Cut off, of something else, or without what describes the arrays."""
    from safetensors.numpy import save

    content = state.to_bytes(filled())
    for damaged in (b"", b"no file", content[:-1], content[: len(content) // 2], save({"vectors": np.ones(3)})):
        with pytest.raises(ValueError, match="no file of a memory bank"):
            state.from_bytes(damaged)
    with pytest.raises(ValueError, match="damaged: 'vectors' is missing"):
        state.from_bytes(content.replace(b'"vectors":{', b'"Vectors":{', 1))


def test_load_refuses_another_schema() -> None:
    """Of a newer version, a very old one, or none at all."""
    arrays, plain = state.to_arrays(filled())
    for version in (1, state.SCHEMA_VERSION + 1, None):
        with pytest.raises(ValueError, match=f"schema version {version}"):
            state.from_arrays(arrays, plain | {"schema_version": version})


def saved() -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a bank of two validated variants, in the middle of a third and one of them."""
    update = Update(filled(validated=True).with_decision("b", threshold=3.0))
    for name in "ab":
        update.show_defect(draw("lobes", name, 30, 40).reshape(5, 8, 4) + 20, name, map_size=(50, 80))
    for seed in range(3):
        for name in "ac":
            image = draw("lobes", name, 10 + seed, 40).reshape(5, 8, 4)
            update.add(image, name, image_hash=10 * ord(name) + seed, map_size=(50, 80))
    return state.to_arrays(update)


ARRAYS = sorted(saved()[0])
NUMBERS = [key for key, array in saved()[0].items() if array.dtype.kind == "f"]
MAY_BE_INFINITE = ("radii", "stand_ins", "gains", "scores", "reaches")


@pytest.mark.parametrize("key", [*ARRAYS, "size", "dtype", "false_alarm_rate", "variants", "streams"])
def test_load_refuses_what_lacks_a_part(key: str) -> None:
    """The message names the part."""
    arrays, plain = saved()
    (arrays if key in arrays else plain).pop(key)
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        state.from_arrays(arrays, plain)


@pytest.mark.parametrize(("part", "key"), [(p, key) for p in ("variants", "streams") for key in saved()[1][p][1]])
def test_load_refuses_a_variant_that_lacks_a_part(part: str, key: str) -> None:
    """Or a pool; the message names the part."""
    arrays, plain = saved()
    del plain[part][1][key]
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        state.from_arrays(arrays, plain)


@pytest.mark.parametrize("key", ARRAYS)
def test_load_refuses_another_shape(key: str) -> None:
    """One row less, or, where there may be any number of rows, one column less; the message names the array."""
    arrays, plain = saved()
    if key.endswith("hashes"):
        arrays[key] = arrays[key][None]
    else:
        arrays[key] = arrays[key][:, :-1] if "_sample_" in key else arrays[key][:-1]
    # The number of points is not said elsewhere: then all that belongs to them does not fit.
    with pytest.raises(ValueError, match=f"damaged: .*{key.replace('points', 'radii')} has the shape"):
        state.from_arrays(arrays, plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, np.nan) for key in NUMBERS),
        *((key, np.inf) for key in NUMBERS if not key.endswith(MAY_BE_INFINITE)),
    ],
)
def test_load_refuses_values_that_are_not_finite(key: str, value: float) -> None:
    """They would spread to every score."""
    arrays, plain = saved()
    arrays[key][1] = value
    with pytest.raises(ValueError, match=f"damaged: .*{key}"):
        state.from_arrays(arrays, plain)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "size": (lambda plain: plain.update(size=59), "60 vectors, but at most 59"),
    "dtype": (lambda plain: plain.update(dtype="float16"), "vectors are of float32"),
    "unknown dtype": (lambda plain: plain.update(dtype="int8"), "precision must be"),
    "rate": (lambda plain: plain.update(false_alarm_rate=0.7), "false_alarm_rate must be"),
    "name": (lambda plain: plain["variants"][0].update(name="b"), "a variant is there twice"),
    "resolution": (lambda plain: plain["variants"][1].update(resolution=np.nan), "b: resolution is nan, not a number"),
    "spread": (lambda plain: plain["variants"][1].update(spread=-1.0), "b: spread is -1.0, not a number"),
    "images": (lambda plain: plain["variants"][0].update(images=-1), "a: images is -1, not a count"),
    "wanted": (lambda plain: plain["variants"][0].update(wanted=-1), "a: wanted is -1, not a count"),
    "shown": (lambda plain: plain["variants"][0].update(shown=-1), "a: shown is -1, not a count"),
    "counts": (lambda plain: plain["variants"][0].update(defects=-1), "a: defects is -1, not a count"),
    "no whole number": (lambda plain: plain["variants"][0].update(defects=2.0), "a: defects is 2.0, not a count"),
    "of no image": (lambda plain: plain["variants"][0].update(shown=0), "a holds defects of no image"),
    "own rate": (lambda plain: plain["variants"][1].update(false_alarm_rate=0.0), "b: false_alarm_rate must be"),
    "by hand": (lambda plain: plain["variants"][1].update(by_hand=[-1.0, None]), "b: by_hand is"),
    "by hand, NaN": (lambda plain: plain["variants"][1].update(by_hand=[np.nan, None]), "b: by_hand is"),
    "by hand, one": (lambda plain: plain["variants"][1].update(by_hand=[1.0]), "b: by_hand is"),
    "by hand, huge": (lambda plain: plain["variants"][1].update(by_hand=[2**64, None]), "b: by_hand is"),
    "former": (lambda plain: plain["variants"][0].update(former=[1.0, 1.0]), "a: former is"),
    "former, negative": (lambda plain: plain["variants"][0].update(former=[1.0, 1.0, -1.0]), "a: former is"),
    "stream": (lambda plain: plain["streams"][1].update(name=""), ": name is '', not a name"),
    "stream twice": (lambda plain: plain["streams"][1].update(name="a"), "a pool is there twice"),
    "index": (lambda plain: plain["streams"][1].update(divided_at=121), "divided_at of pool 1"),
    "few lists": (lambda plain: plain["streams"][1].update(divided_at=64), "divided_at of pool 1"),
    "count": (lambda plain: plain["streams"][0].update(images=-1), "a: images is -1, not a count"),
    "grid": (lambda plain: plain["streams"][1]["samples"][2].__setitem__(2, 7), "image 2 of pool 1 has 40 patches"),
    "map": (lambda plain: plain["streams"][1]["samples"][0].__setitem__(3, 0), "image 0 of pool 1 has 40 patches"),
    "more vectors": (lambda plain: shift(plain, 1), "radii of b do not fall"),
    "no vectors": (lambda plain: shift(plain, -plain["variants"][0]["vectors"]), "radii of a do not fall"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_load_refuses_contradictions(name: str) -> None:
    """Numbers that cannot be true together."""
    change, message = CHANGES[name]
    arrays, plain = saved()
    change(plain)
    with pytest.raises(ValueError, match=message):
        state.from_arrays(arrays, plain)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("radii", "radii of a do not fall from infinity"),
        ("gains", "gains of a do not fall from infinity"),
        ("stand_ins", "stand_ins of a are negative"),
        ("defect_reaches", "defect_reaches are not above 0"),
        ("stream_1_radii", "stream_1_radii holds negative"),
        ("stream_1_stand_ins", "stream_1_stand_ins holds negative"),
        ("origins", "origins of a are no numbers of its images"),
        ("calibration_origins", "calibration_origins of a are no numbers of its images"),
        ("vectors", "vectors holds values that are too large or not finite"),
    ],
)
def test_load_refuses_what_is_out_of_order(key: str, message: str) -> None:
    """Radii and gains that rise, and distances below 0."""
    arrays, plain = saved()
    arrays[key][3] = {"radii": 1e9, "gains": 1e9, "vectors": 1e16, "origins": 99, "calibration_origins": 99}.get(
        key, -1
    )
    with pytest.raises(ValueError, match=f"damaged: .*{message}"):
        state.from_arrays(arrays, plain)


def shift(plain: dict[str, Any], count: int) -> None:
    """Announce more vectors for the first variant and less for the second."""
    first, second = plain["variants"]
    first["vectors"] += count
    second["vectors"] -= count


@pytest.mark.parametrize(
    ("key", "kind"), [("origins", "float32"), ("radii", "float64"), ("calibration_labels", "int8")]
)
def test_load_refuses_another_type(key: str, kind: str) -> None:
    """Whose values would mean something else."""
    arrays, plain = saved()
    arrays[key] = arrays[key].astype(kind)
    with pytest.raises(ValueError, match=f"damaged: {key} is of {kind}, not"):
        state.from_arrays(arrays, plain)
