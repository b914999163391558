# SPDX-License-Identifier: Apache-2.0
"""Tests of what an update tells of itself, and of what it advises."""

from typing import Any

import pytest

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.report import Report
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

from .banks import draw, learned


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_advice_on_few_images(count: int) -> None:
    """How many more make a threshold sure; only of variants that were just learned."""
    update = Update(learned(MemoryBank(9000), {"other": [draw("lobes", "b", 0, 40)]}))
    for seed in range(count):
        update.add(draw("lobes", "a", seed, 40), "a")
    advice = update.commit().advice
    if count < 8:
        (sentence,) = advice
        assert (
            sentence
            == f"The threshold of a rests on {count} good images and is a guess; {8 - count} more make it sure."
        )
    else:
        assert advice == []
    assert update.commit().advice == []


def test_advice_on_images_that_say_nothing() -> None:
    """Such as those of a former version: they cannot make a threshold sure, so that more are needed than it seems."""
    bank = learned(MemoryBank(60), {"a": [draw("lobes", "a", seed, 40) for seed in range(20)]})
    bank = bank.with_changes("a", calibration=None)
    update = Update(bank)
    update.add(draw("lobes", "a", 30, 40), "a")
    (sentence, *_) = update.commit().advice
    assert thresholds(update.bank, "a").images == 1
    assert "rests on 1 good images" in sentence
    assert "7 more" in sentence


def all_learned(size: int) -> Update:
    """An update that has learned five variants; of all images there are 1000 patches that differ."""
    update = Update(MemoryBank(size))
    for name in "abcde":
        for seed in range(10):
            update.add(draw("curve", name, seed, 20), name)
    return update


def test_advice_on_a_small_memory() -> None:
    """Which variants have less than half of what they need, and what size would do."""
    update = all_learned(100)
    update.flush()
    update.bank = update.bank.with_changes("e", wanted=1)
    (sentence,) = update.commit().advice
    counts = {name: (len(each.radii), each.wanted) for name, each in update.bank.variants.items()}
    for name, (held, wanted) in counts.items():
        assert (f"{name} has {held} of {wanted}" in sentence) == (2 * held < wanted)
    enough = sum(max(both) for both in counts.values())
    assert enough > 100
    assert f"A memory_size of {enough} would do" in sentence
    assert all_learned(1000).commit().advice == []


def test_the_advice_is_good() -> None:
    """A memory tells of no more than it can hold, so the advice may be followed by another, but soon there is none."""
    size = 100
    for _ in range(3):
        told = all_learned(size).commit().advice
        if not told:
            break
        larger = int(told[0].split("memory_size of ")[1].split()[0])
        assert larger > size
        size = larger
    assert 100 < size <= 1000
    assert all_learned(size).commit().advice == []


def test_report_in_words() -> None:
    """One line says what changed."""
    image: dict[str, Any] = {"variant": "b", "image_hash": 1}
    update = Update(learned(MemoryBank(50), {"a": [draw("lobes", "a", 0, 70)]}))
    for _ in range(3):
        update.add(draw("lobes", "b", 0, 70), **image)
    report = update.commit()
    added = len(update.bank.variants["b"].radii)
    words = str(report)
    assert words.startswith(
        f"learned b: 1 images (2 known already); vectors added {added} of b, removed {added} of a, now 50"
    )
    assert f"radius bound {update.bank.radius_bound():.2f}" in words
    assert str(Update(MemoryBank(9)).commit()).startswith(
        "learned nothing new (0 known already); vectors added none, removed none"
    )
    assert report.seconds > 0
    assert update.commit() == Report(
        radius_bound=report.radius_bound, num_vectors=50, nbytes=report.nbytes, advice=report.advice[1:]
    )
