# SPDX-License-Identifier: Apache-2.0
"""Settings that all tests of the memory run with."""

from collections.abc import Generator

import faiss
import pytest

from openvino_export.memory import update


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
    monkeypatch.setattr(update, "SMALLEST_POOL", 40)
