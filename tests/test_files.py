# SPDX-License-Identifier: Apache-2.0
"""Tests of files that are written all at once; a kill in between is tested with checkpoints."""

import csv
import re
import zipfile
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_ext.files import atomic_write, check_checkpoint, safe_name, write_table


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


@pytest.mark.parametrize("name", ["lid", "lid 2", "PCB1", "a-b_c.d", "mean", "console", "_x"])
def test_plain_names_stay(name: str) -> None:
    """They are read more easily."""
    assert safe_name(name) == name


ODD = [
    "部品",
    "部品2",
    "föhn",
    "fhn",
    "a/b",
    "a:b",
    "a\\b",
    "..",
    ".",
    "",
    " ",
    "a.",
    "a ",
    " a",
    ".a",
    "%",
    "con",
    "AUX.x",
]
ODD += ["nul .png", "COM1", "\ud800", "x" * 300, "x" * 301, "a\nb", "a\n"]


def check_safe(name: str) -> None:
    """Check a name against the rules of MLflow and Windows."""
    safe = safe_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_. -]{1,100}", safe)  # Lightning's logger of MLflow drops all else
    assert safe.strip(" .") == safe
    assert not PureWindowsPath(safe).is_reserved()


def test_odd_names() -> None:
    """They become names that all take, and no two of them the same."""
    for name in ODD:
        check_safe(name)
    assert len({safe_name(name).lower() for name in ODD}) == len(ODD)


@given(st.text(), st.text())
def test_any_names(first: str, second: str) -> None:
    """The same for whatever there is."""
    check_safe(first)
    assert (safe_name(first) == safe_name(second)) == (first == second)


OLD = Path(__file__).parent / "old_files" / "finished.ckpt"


def held(value: Any) -> Any:  # noqa: ANN401
    """Return what a checkpoint holds, so that it can be compared."""
    if isinstance(value, dict):
        return {key: held(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [held(entry) for entry in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value)


def test_no_bit_of_a_checkpoint_can_change_unnoticed(tmp_path: Path) -> None:
    """Some are flipped in turn, most where the archive tells of its parts: it is refused, or holds what it held."""
    path, whole = tmp_path / "model.ckpt", OLD.read_bytes()
    check_checkpoint(OLD)
    before = held(torch.load(OLD, weights_only=True))
    with zipfile.ZipFile(OLD) as file:
        about = file.start_dir
    rng = np.random.default_rng(0)
    refused = 0
    for position in (*rng.integers(len(whole), size=40), *rng.integers(about, len(whole), size=80)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            check_checkpoint(path)
        except ValueError as error:
            assert "model.ckpt is damaged" in str(error)  # noqa: PT017
            refused += 1
            continue
        try:
            after = held(torch.load(path, weights_only=True))
        except (OSError, RuntimeError):
            continue
        assert after == before
    assert refused > 60


def test_what_is_no_checkpoint_of_torch(tmp_path: Path) -> None:
    """Is left to torch; an archive that is cut off, or a part of which claims to be a folder, is refused."""
    for content in (b"", b"text"):
        (tmp_path / "text").write_bytes(content)
        check_checkpoint(tmp_path / "text")
    check_checkpoint(tmp_path / "gone")
    (tmp_path / "cut").write_bytes(OLD.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut is damaged"):
        check_checkpoint(tmp_path / "cut")
    with zipfile.ZipFile(tmp_path / "folder", "w") as file:
        part = zipfile.ZipInfo("archive/data/0")
        part.external_attr = 0x10
        file.writestr(part, "values")
    with pytest.raises(ValueError, match=r"folder is damaged \(archive/data/0\)"):
        check_checkpoint(tmp_path / "folder")
