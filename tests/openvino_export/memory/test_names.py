# SPDX-License-Identifier: Apache-2.0
"""Tests of names of variants, and of which images a variant is known to have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvino_export.memory import memory_bank
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.names import checked_name
from openvino_export.memory.update import Update, merged

from .banks import REPEATABLE, check, draw, filled, reloaded, same


@pytest.mark.parametrize("name", ["", " ", "\t\n", "\u3000"])
def test_blank_names(name: str) -> None:
    """They are refused."""
    with pytest.raises(ValueError, match="must not be blank"):
        checked_name(name)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x00"])
def test_names_that_cannot_be_printed(name: str) -> None:
    """They would break lines of logs and terminals."""
    with pytest.raises(ValueError, match="must be printable"):
        checked_name(name)


@pytest.mark.parametrize(
    ("name", "known"),
    [("Pill", "pill"), ("pill 2", "pill2"), ("STRASSE", "straße"), ("cafe\u0301", "café"), ("Ⅳ", "iv")],
)
def test_alike_names(name: str, known: str) -> None:
    """They are refused unless forced, and name the other; the same name is no mistake."""
    with pytest.raises(ValueError, match=f"differs from the variant '{known}' by case or blanks alone"):
        checked_name(name, ["lid", known])
    assert checked_name(name, [known], force=True) == name
    assert checked_name(name, [known, name]) == name


@REPEATABLE
@given(name=st.text(), blanks=st.text(" \t\n"))
def test_names_are_stripped(name: str, blanks: str) -> None:
    """Whatever is accepted stays as it is the second time, and is alike what it was with blanks around it."""
    try:
        first = checked_name(blanks + name + blanks)
    except ValueError:
        assert not name.strip() or not name.strip().isprintable()
        return
    assert first == name.strip() == checked_name(first, [first])
    with pytest.raises(ValueError, match="differs"):
        checked_name(first + " x", [first + "X"])


def hashes(name: str) -> list[int]:
    """Hashes of the images of a variant of :func:`filled`."""
    return [100 * ord(name) + seed for seed in range(3)]


def variants_of(bank: MemoryBank, *names: str) -> list[str | None]:
    """Variants as which the bank knows the images that were learned under some names."""
    found = {bank.variant_of_image(value) for name in names for value in hashes(name)}
    return sorted(found, key=str)


def test_images_go_with_their_variant() -> None:
    """Through renaming, merging and deleting; images of a deleted one can be learned again."""
    bank = filled(variants="abc", validated=True)
    assert [variants_of(bank, name) for name in "abc"] == [["a"], ["b"], ["c"]]
    renamed = bank.renamed("b", "x")
    assert [variants_of(renamed, name) for name in "abc"] == [["a"], ["x"], ["c"]]
    assert list(renamed.variants) == ["a", "x", "c"]
    joined = merged(renamed, "a", "c")
    assert [variants_of(joined, name) for name in "abc"] == [["c"], ["x"], ["c"]]
    assert {name: each.images for name, each in joined.variants.items()} == {"x": 3, "c": 6}
    check(
        joined.renamed("x", "b"),
        {
            "b": [draw("lobes", "b", seed, 40) for seed in range(3)],
            "c": [draw("lobes", name, seed, 40) for name in "ca" for seed in range(3)],
        },
    )
    rest = joined.of_variants(["x"])
    assert [variants_of(rest, name) for name in "abc"] == [[None], ["x"], [None]]
    again = Update(rest)
    assert again.add(draw("lobes", "a", 0, 40), "a", image_hash=hashes("a")[0]) == "a"
    assert same(reloaded(joined).bank, joined)


def test_merging_keeps_what_decides() -> None:
    """The rate of the variant that stays; images that it judges itself by are those of both."""
    bank = filled(200, variants="ab", validated=True).with_decision("b", false_alarm_rate=0.2)
    bank = bank.with_decision("a", threshold=3.0)
    known = merged(bank, "a", "b").variants["b"]
    assert (known.false_alarm_rate, known.by_hand) == (0.2, None)
    parts = [bank.variants[name].calibration for name in "ab"]
    assert known.calibration is not None
    assert len(known.calibration.labels) == sum(len(part.labels) for part in parts if part)


def test_images_of_a_former_version() -> None:
    """Nobody knows their variant: they are known all the same, and stay so when a variant is deleted."""
    bank = MemoryBank(60, "float32", filled().variants, np.array(hashes("a")))
    update = Update(bank.of_variants(["b"]))
    assert update.bank.variant_of_image(hashes("a")[0]) == ""
    assert update.knows(hashes("a")[0], "b")
    assert not update.report.known_as


def test_the_last_images_keep_their_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are more than are remembered."""
    monkeypatch.setattr(memory_bank, "REMEMBERED_IMAGES", 4)
    bank = filled(variants="abc")
    assert [bank.variant_of_image(value) for name in "abc" for value in hashes(name)] == [
        *(None, None, None, None, None),
        *("b", "c", "c", "c"),
    ]


@pytest.mark.parametrize("in_pool", [False, True])
def test_known_under_another_name(in_pool: bool) -> None:
    """The report says as which, and what to do."""
    update = Update(filled(variants="a"))
    if in_pool:
        update = Update(MemoryBank(60))
        for seed, value in enumerate(hashes("a")):
            update.add(draw("lobes", "a", seed, 40), "a", image_hash=value)
    for value in hashes("a"):
        assert update.add(draw("lobes", "b", 0, 40), "b", image_hash=value) is None
    update.add(draw("lobes", "b", 0, 40), "a", image_hash=hashes("a")[0])  # under its own name
    update.add(draw("lobes", "b", 0, 40), image_hash=hashes("a")[0])
    report = update.commit()
    assert (report.known_images, dict(report.known_as)) == (5, {("a", "b"): 3})
    assert "(5 known already, 3 of them as a)" in str(report)
    assert report.advice[0].startswith("3 images are known as 'a', so they were not learned as 'b'.")
    assert "b" not in update.bank.variants
