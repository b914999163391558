# SPDX-License-Identifier: Apache-2.0
"""Learners by themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ext.benchmark.cadic import Cadic
from anomalib_ext.benchmark.learners import Reservoir


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
