# SPDX-License-Identifier: Apache-2.0
"""Tests of files that are written all at once; a kill in between is tested with checkpoints."""

import csv
from pathlib import Path

import pytest

from anomalib_ext.files import atomic_write, write_table


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """And nothing is left beside it; the folder is made if it is missing."""
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as file:
        file.write(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(list(path.parent.iterdir())) == 2
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    """Whatever was written by then."""
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(KeyError), atomic_write(path) as file:  # noqa: PT012  # the failure is that of the writer
        file.write(b"new")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_is_read_back(tmp_path: Path) -> None:
    """With names that need quotes, and no empty lines between rows."""
    rows = [{"name": 'a "b", c\n', "value": 1.5}, {"name": "é", "value": 2}]
    path = tmp_path / "table.csv"
    write_table(rows, path)
    assert path.read_bytes().count(b"\r\n") == 3
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]
