# SPDX-License-Identifier: Apache-2.0
"""Tests of the saved form: what is loaded is what was saved, and what is damaged is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvino_export.memory import patch_pool, state
from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import CALIBRATION_PATCHES, calibrated, thresholds
from openvino_export.memory.update import Update

from .banks import REPEATABLE, draw, filled, learned, reloaded, same

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
    """Saved and loaded at any moment, in mid-pool too, an update ends bit by bit as one that was never saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALLEST_POOL", pool)
        patch.setattr(patch_pool, "DIVIDED_INDEX", divided)
        update = Update(MemoryBank(50, dtype))
        kept = Update(MemoryBank(50, dtype))
        for action, save in zip([*actions, "commit"], [*is_saved, True][-len(actions) - 1 :], strict=True):
            if isinstance(action, tuple):
                name, seed = action
                for each in (update, kept):
                    each.add(draw("lobes", name, seed, 140), name, image_hash=seed)
            else:
                getattr(update, action)()
                getattr(kept, action)()
            if save:
                update = reloaded(update)
            assert same(update, kept)


def test_a_saved_pool_is_reported_whole() -> None:
    """Images that were learned before the interruption are part of the update."""
    update = Update(filled())
    update.add(draw("lobes", "c", 0, 40), "c")
    update = reloaded(update)
    update.add(draw("lobes", "c", 1, 40), "c")
    assert ([*update.pools], update.images("c"), update.images("a"), update.images("d")) == (["c"], 2, 3, 0)
    report = update.commit()
    assert report.variants == {"c": 2}
    assert report.added == {"c": len(update.bank.variants["c"].radii)}
    assert ([*update.pools], update.images("c")) == ([], 2)


def test_reloaded_calibration() -> None:
    """Thresholds are the same, to the bit, and unequal calibrations do not mix."""
    far = np.full((2, CALIBRATION_PATCHES, 4), 1e6, np.float32)
    bank = calibrated(filled(variants="abc", calibrated=True), "b", far, np.array([False, True]), (0.1, 1 / 3, np.nan))
    bank = learned(bank, {"d": [draw("lobes", "d", 0, 40)]})
    again = reloaded(bank).bank
    assert same(reloaded(again), bank)
    for name in "abcd":
        np.testing.assert_equal(thresholds(again, name), thresholds(bank, name))


def test_empty_bank_is_saved() -> None:
    """Before anything was learned."""
    bank = reloaded(MemoryBank(7, "float16")).bank
    assert (bank.size, bank.dtype, len(bank), bank.variants) == (7, np.float16, 0, {})
    assert bank.radius_bound() == 0


@pytest.mark.parametrize("bank", [filled(calibrated=True), filled(dtype="float16"), MemoryBank(7)])
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
    """Of a newer version, or none at all."""
    arrays, plain = state.to_arrays(filled())
    for version in (1, 3, None):
        with pytest.raises(ValueError, match=f"schema version {version}"):
            state.from_arrays(arrays, plain | {"schema_version": version})


def saved() -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a bank of two calibrated variants, in the middle of a third and one of them; a fourth waits."""
    update = Update(filled(calibrated=True), few_shot_views=True)
    patches = np.stack([draw("lobes", "d", seed, 40) for seed in range(2)])
    update.add(np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32), "d", patches=patches)
    for seed in range(3):
        for name in "ac":
            update.add(draw("lobes", name, 10 + seed, 40), name, image_hash=ord(name) + seed)
    return state.to_arrays(update)


ARRAYS = sorted(saved()[0])
FINITE = [key for key, array in saved()[0].items() if key != "calibration_pixels" and array.dtype.kind == "f"]


@pytest.mark.parametrize("key", [*ARRAYS, "size", "dtype", "variants", "streams"])
def test_load_refuses_what_lacks_a_part(key: str) -> None:
    """The message names the part."""
    arrays, plain = saved()
    (arrays if key in arrays else plain).pop(key)
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        state.from_arrays(arrays, plain)


@pytest.mark.parametrize("key", ["name", "vectors", "scale", "resolution", "images", "spread", "calibration_images"])
def test_load_refuses_a_variant_that_lacks_a_part(key: str) -> None:
    """The message names the part."""
    arrays, plain = saved()
    del plain["variants"][1][key]
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        state.from_arrays(arrays, plain)


@pytest.mark.parametrize("key", FINITE)
def test_load_refuses_values_that_are_not_finite(key: str) -> None:
    """NaN would spread to every score."""
    arrays, plain = saved()
    arrays[key][1] = np.nan
    with pytest.raises(ValueError, match=f"damaged: .*{key}"):
        state.from_arrays(arrays, plain)


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
        (lambda plain: plain.update(learned=["a"]), "variants that are not named"),
        (lambda plain: plain["streams"][1].update(name=""), "name or divided_at of pool 1"),
        (lambda plain: plain["streams"][1].update(name="a"), "a pool is there twice"),
        (lambda plain: plain["streams"][1].update(divided_at=121), "name or divided_at of pool 1"),
        (lambda plain: plain["streams"][1].update(divided_at=64), "name or divided_at of pool 1"),
        (lambda plain: plain["streams"][0].update(images=-1), "resolution, spread or images of pool 0"),
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
        "learned",
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
        state.from_arrays(arrays, plain)


def shift(plain: dict[str, Any], count: int) -> None:
    """Announce more vectors for the first variant and less for the second."""
    first, second = plain["variants"]
    first["vectors"] += count
    second["vectors"] -= count
