# SPDX-License-Identifier: Apache-2.0
"""A bundle that someone has changed, with checksums that are right: it is judged with, or refused in words.

With `FUZZ_CASES=100000` in the environment, so many of each kind are tried, and others each time.
"""

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from openvino_export import EdgeDetector
from openvino_export.bundle.constants import graph_tables
from openvino_export.bundle.folder import BANK, Bundle
from openvino_export.bundle.metadata import _checksum, parse
from openvino_export.detector import _decider_of
from openvino_export.drift import DriftMonitor
from openvino_export.info import about
from openvino_export.memory import state
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

CASES = int(os.environ.get("FUZZ_CASES", "0"))
FUZZ = settings(
    max_examples=CASES or 400,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
REFUSALS = (ValueError, OSError)  # of which BundleError is one
SHAPE = (4, 4, 3)
METADATA = {
    "model": "M",
    "backbone": "b",
    "layers": ["1"],
    "input_size": [16, 16],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "variants": ["a", "b"],
    "normalization": True,
    "thresholding": True,
    "image_sensitivity": 0.5,
    "pixel_sensitivity": 0.5,
    "precision_hint": "f32",
    "last_values": {"image": [1.5, 0.0, 3.0], "pixel": [None, None, None]},
    "num_neighbors": 2,
    "variant_capacity": 64,
    "shown_defects": True,
    "variant_thresholds": True,
    "score": "rate",
    "schema_version": 2,
    "files": {name: {"sha256": "0" * 64, "size": 9} for name in ("model.xml", "model.bin", BANK)},
}


def image(seed: int) -> np.ndarray:
    """Patch embeddings of an image."""
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def bank() -> MemoryBank:
    """A bank of two variants that decide by all that there is."""
    update = Update(MemoryBank(60))
    for seed in range(12):
        update.add(image(seed) + 9 * (seed % 2), "ab"[seed % 2], image_hash=seed, map_size=(16, 16))
    update.commit()
    update.show_defect(image(20) + 5, "a", map_size=(16, 16))
    update.commit()
    return update.bank.with_decision("b", threshold=2.0).with_changes("a", former=(1.0, np.nan, 0.0))


ARRAYS, PLAIN = state.to_arrays(bank())
CONTENT = state.to_bytes(bank())

TYPES = ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**64, -(10**30), 10**4000, 0.0, 0.5, -0.5, 1e-300, 1e39, 1e308),
    *(float("nan"), float("inf"), "", "a", "1", "\0", "\ud800", "../x", "x" * 5000, "float16", "rate", "NaN"),
    *([], {}, [None], [[]], [1, 2], [0.5] * 3, [-1.0] * 3, [float("nan")] * 3, ["a"] * 3, {"a": 1}, {"": []}),
    [[[[[[[[[[0]]]]]]]]]],
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
    """Yield the paths of all entries of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*path, key)
        yield from places(entry, (*path, key))


def changes(value: Any) -> st.SearchStrategy[list[tuple[tuple[Any, ...], str, Any]]]:  # noqa: ANN401
    """One to three changes of a JSON value."""
    change = st.tuples(
        st.sampled_from(sorted(places(value), key=str)),
        st.sampled_from(["set", "set", "set", "delete", "repeat", "rename"]),
        st.sampled_from(ODD),
    )
    return st.lists(change, min_size=1, max_size=3)


def changed(value: Any, todo: list[tuple[tuple[Any, ...], str, Any]]) -> Any:  # noqa: ANN401
    """Make such changes; what an earlier one has taken away stays away."""
    value = copy.deepcopy(value)
    for (*path, key), how, new in todo:
        owner = value
        try:
            for step in path:
                owner = owner[step]
            entry = owner[key]
        except (KeyError, IndexError, TypeError):
            continue
        if isinstance(owner, str):
            continue
        if how == "set":
            owner[key] = copy.deepcopy(new)
        elif how == "repeat" and isinstance(owner, list):
            owner.append(copy.deepcopy(entry))
        elif how == "rename" and isinstance(owner, dict):
            owner[str(new)] = owner.pop(key)
        else:
            del owner[key]
    return value


def text_of(metadata: dict[str, Any]) -> bytes:
    """The content of metadata.json, with a checksum that is right."""
    return json.dumps({**metadata, "checksum": _checksum(metadata)}).encode()


def use(text: bytes, content: bytes) -> str:
    """Judge, tell about, learn and save by the parts of a bundle; return whether they were refused."""
    refusal = ""
    try:
        metadata = parse(Path("the_bundle"), text)
        decider = _decider_of(Bundle(Path("the_bundle"), metadata, {BANK: content}, ""), SHAPE[2])
    except REFUSALS as error:
        refusal = str(error)
    if refusal:
        assert "the_bundle" in refusal
        assert len(refusal) < 2000
        return "refused"
    for seed in (0, 1):
        result = decider.decide(image(seed), (16, 16))
        assert not np.isnan(result.pred_score)
        assert type(result.pred_label) in {bool, type(None)}
    json.dumps(about(metadata, decider.bank))
    DriftMonitor(decider.bank).add(result)
    update = Update(decider.bank)
    try:
        update.add(image(3), None, image_hash=3, map_size=(16, 16))
        update.show_defect(image(4) + 9, decider.names[0], map_size=(16, 16))
        update.commit()
    except ValueError as error:
        return f"not learned: {error}"
    assert len(state.from_bytes(state.to_bytes(update.bank))) == len(update.bank)
    if update.bank.size < 10_000:
        graph_tables(update.bank, SHAPE[2], max(64, len(update.bank.variants)), metadata.get("score") != "rate")
    return "used"


def test_the_bundle_itself_is_used() -> None:
    """Else the others would tell nothing."""
    assert use(text_of(METADATA), CONTENT) == "used"


def run(strategy: st.SearchStrategy[Any], act: Callable[[Any], str], least_used: float = 0.01) -> None:
    """Try many, and see that some were used and some refused."""
    seen: Counter[str] = Counter()

    @FUZZ
    @given(strategy)
    def one(case: Any) -> None:  # noqa: ANN401
        seen[act(case).partition(":")[0]] += 1

    one()
    print(dict(seen))  # shown by -s
    assert seen["refused"] > 0.1 * seen.total()
    assert seen["used"] >= least_used * seen.total()


def test_metadata() -> None:
    """Entries of other kinds, huge, negative, not finite, missing or too many."""
    run(changes(METADATA), lambda todo: use(text_of(changed(METADATA, todo)), CONTENT))


def test_what_describes_the_bank() -> None:
    """The same for what describes the arrays of the bank."""

    def act(todo: Any) -> str:  # noqa: ANN401
        plain = json.dumps(changed(PLAIN, todo))
        return use(text_of(METADATA), save(ARRAYS, {"plain": plain}))

    run(changes(PLAIN), act)


def other(array: np.ndarray, how: str, value: float, position: int) -> np.ndarray:
    """Change an array."""
    if how == "set":
        array = array.copy()
        if array.size:
            array.flat[position % array.size] = np.float64(value).astype(array.dtype)
        return array
    if how in TYPES:
        return array.astype(how)
    return {
        "cut": array[: position % (len(array) + 1)],
        "repeat": np.concatenate([array, array]),
        "flatten": array.ravel(),
        "wrap": array[None],
    }[how]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arrays_of_the_bank() -> None:
    """Of other shapes, types and values."""
    change = st.tuples(
        st.sampled_from(sorted(ARRAYS)),
        st.sampled_from(["take away", "cut", "repeat", "flatten", "wrap", *TYPES, *["set"] * 8]),
        st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.0, 1.0, 1e30, -1e30, 1e-30, 3.0, 2**31 - 1]),
        st.integers(0, 2**20),
    )

    def act(todo: Any) -> str:  # noqa: ANN401
        arrays = dict(ARRAYS)
        for name, how, value, position in todo:
            if name in arrays:
                array = arrays.pop(name)
                if how != "take away":
                    arrays[name] = np.ascontiguousarray(other(array, how, value, position))
        return use(text_of(METADATA), save(arrays, {"plain": json.dumps(PLAIN)}))

    run(st.lists(change, min_size=1, max_size=2), act)


def test_header_of_the_file() -> None:
    """What safetensors says of itself."""
    length = int.from_bytes(CONTENT[:8], "little")
    header = json.loads(CONTENT[8 : 8 + length])

    def act(todo: Any) -> str:  # noqa: ANN401
        text = json.dumps(changed(header, todo)).encode()
        return use(text_of(METADATA), len(text).to_bytes(8, "little") + text + CONTENT[8 + length :])

    run(changes(header), act, least_used=0)  # all that it says matters


def test_bytes() -> None:
    """Any bytes in place of those of the bank, or of the metadata."""
    text = text_of(METADATA)
    change = st.tuples(st.booleans(), st.integers(0, len(CONTENT) - 1), st.binary(max_size=20), st.integers(0, 20))

    def act(todo: Any) -> str:  # noqa: ANN401
        parts = {True: text, False: CONTENT}
        for which, position, new, length in todo:
            start = position % max(len(parts[which]), 1)
            parts[which] = parts[which][:start] + new + parts[which][start + length :]
        return use(parts[True], parts[False])

    run(st.lists(change, min_size=1, max_size=2), act)


def test_a_whole_bundle(bundle: Path) -> None:
    """Its graphs are changed as well; whoever opens, learns and saves meets no other error."""
    whole = {path.name: path.read_bytes() for path in bundle.iterdir()}
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    seen: Counter[str] = Counter()
    for case in range(CASES // 100 or 30):
        rng = np.random.default_rng([case, CASES])
        for name, content in whole.items():
            (bundle / name).write_bytes(content)
        name = rng.choice(["features.xml", "model.xml", "features.bin", "model.bin"], p=[0.4, 0.4, 0.1, 0.1])
        damaged = bytearray(whole[name])
        for position in rng.integers(len(damaged), size=rng.integers(1, 4)).tolist():
            damaged[position : position + int(rng.integers(20))] = rng.bytes(int(rng.integers(3)))
        (bundle / name).write_bytes(damaged)
        metadata = json.loads(whole["metadata.json"])
        metadata["files"][name] = {"sha256": hashlib.sha256(damaged).hexdigest(), "size": len(damaged)}
        del metadata["checksum"]
        (bundle / "metadata.json").write_bytes(text_of(metadata))
        try:
            detector = EdgeDetector(bundle)
            detector.predict(picture)
            detector.learn(picture, "b", force=True)
            detector.set_memory_size(450)
            detector.save()
        except REFUSALS as error:
            seen["refused" if name.partition(".")[0] in str(error) else str(error)] += 1
        else:
            seen["used"] += 1
    print(dict(seen))  # shown by -s
    assert set(seen) == {"refused", "used"}
