# SPDX-License-Identifier: Apache-2.0
"""The saved form of a memory bank, and of an update that is not committed yet: arrays and plain data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .former_states import upgraded
from .leave_one_out import CALIBRATION_PATCHES, no_images, worth
from .memory_bank import MemoryBank
from .patch_pool import LISTS, PatchPool
from .thresholds import check_rate
from .update import Update, pool_capacity
from .variant import Calibration, Defects, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

SCHEMA_VERSION = 5
OLDEST_VERSION = 2
# Under these keys the arrays of all variants follow each other, by the attribute of a variant, or of its calibration.
VECTORS = {
    "vectors": "vectors",
    "radii": "radii",
    "covers": "cover_radii",
    "origins": "origins",
    "stand_ins": "stand_ins",
    "gains": "gains",
}
CALIBRATION = {f"calibration_{key}": key for key in ("patches", "origins", "labels", "factors", "scores")}


def to_arrays(known: MemoryBank | Update) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """State as arrays and as plain data, fit for safetensors and JSON. That of an update holds its pools, too.

    Some keys are those of the first files: `covers` are cover radii, `resolution` is the merge radius, and a stream is
    a pool.
    """
    bank = known.bank if isinstance(known, Update) else known
    variants = bank.variants.values()
    dimension = bank.dimension() or 0
    empty = no_images(dimension)
    calibrations = [variant.calibration or empty for variant in variants]
    nothing = {
        "vectors": np.empty((0, dimension), bank.dtype),
        "origins": np.empty(0, np.int32),
    }
    arrays = {
        key: np.concatenate([
            nothing.get(key, np.empty(0, np.float32)),
            *(getattr(variant, name) for variant in variants),
        ])
        for key, name in VECTORS.items()
    }
    arrays |= {
        key: np.concatenate([getattr(empty, name), *(getattr(each, name) for each in calibrations)])
        for key, name in CALIBRATION.items()
    }
    shown = [variant.defects for variant in variants if variant.defects]
    arrays |= {
        "defects": np.concatenate([np.empty((0, dimension), np.float32), *(each.vectors for each in shown)]),
        "defect_reaches": np.concatenate([np.empty(0, np.float32), *(each.reaches for each in shown)]),
        "prototypes": np.array([v.prototype for v in variants], np.float32).reshape(len(variants), dimension),
        "image_hashes": bank.image_hashes,
        "image_owners": bank.image_owners,
    }
    plain: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "size": bank.size,
        "dtype": bank.dtype.name,
        "false_alarm_rate": bank.false_alarm_rate,
        "variants": [
            {
                "name": name,
                "vectors": len(variant.radii),
                "resolution": variant.merge_radius,
                "images": variant.images,
                "spread": variant.spread,
                "wanted": variant.wanted,
                "floor": None if math.isnan(variant.floor) else variant.floor,
                "calibration_images": len(variant.calibration.labels) if variant.calibration else 0,
                "defects": len(variant.defects.reaches) if variant.defects else 0,
                "shown": variant.defects.images if variant.defects else 0,
                "false_alarm_rate": variant.false_alarm_rate,
                "by_hand": variant.by_hand and [None if math.isnan(value) else value for value in variant.by_hand],
                "former": variant.former and [None if math.isnan(value) else value for value in variant.former],
            }
            for name, variant in bank.variants.items()
        ],
        "streams": [],
    }
    for position, pool in enumerate(known.pools.values() if isinstance(known, Update) else ()):
        own, described = pool.to_arrays()
        arrays |= {f"stream_{position}_{key}": value for key, value in own.items()}
        plain["streams"].append(described)
    return arrays, plain


def from_arrays(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> Update:
    """Inverse of :func:`to_arrays`: an update with the pools, if there are any; its :attr:`Update.bank` is the bank.

    Raises:
        ValueError: If the state is of another schema, or damaged.
    """
    version = plain.get("schema_version")
    if type(version) is not int or not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        msg = (
            f"The memory bank has schema version {version}, this version of anomalib-ext reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or a newer one."
        )
        raise ValueError(msg)
    try:
        if version < SCHEMA_VERSION:
            arrays, plain = upgraded(arrays, plain)
        rate = plain["false_alarm_rate"]
        MemoryBank(plain["size"], plain["dtype"], false_alarm_rate=rate)  # which refuses what is out of range
        problems = _contradictions(arrays, plain)
    except KeyError as error:
        problems = [f"{error} is missing"]
    if problems:
        msg = f"The memory bank is damaged: {'; '.join(problems)}. Use an undamaged copy of the file."
        raise ValueError(msg)
    bank = MemoryBank(
        plain["size"],
        plain["dtype"],
        _variants(arrays, plain),
        np.array(arrays["image_hashes"]),
        rate,
        np.array(arrays["image_owners"]),
    )
    capacity = pool_capacity(bank)
    pools = []
    for position, described in enumerate(plain["streams"]):
        prefix = f"stream_{position}_"
        own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        name = described["name"]
        pool = PatchPool(name, bank.variants.get(name), own["points"].shape[1], capacity, bank.dtype)
        pool.restore(own, described)
        pools.append(pool)
    return Update(bank, pools)


def _variants(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> dict[str, Variant]:
    variants = {}
    first = image = defect = 0
    for position, entry in enumerate(plain["variants"]):
        part = slice(first, first + entry["vectors"])
        images = slice(image, image + entry["calibration_images"])
        shown = slice(defect, defect + entry["defects"])
        first, image, defect = part.stop, images.stop, shown.stop
        calibration = defects = None
        if entry["shown"]:
            defects = Defects(
                np.array(arrays["defects"][shown]), np.array(arrays["defect_reaches"][shown]), entry["shown"]
            )
        if entry["calibration_images"]:
            calibration = Calibration(**{name: np.array(arrays[key][images]) for key, name in CALIBRATION.items()})
        by_hand, former = (
            entry[key] and [math.nan if value is None else value for value in entry[key]]
            for key in ("by_hand", "former")
        )
        variant = Variant(
            **{name: np.array(arrays[key][part]) for key, name in VECTORS.items()},
            merge_radius=entry["resolution"],
            images=entry["images"],
            prototype=np.array(arrays["prototypes"][position]),
            spread=entry["spread"],
            wanted=entry["wanted"],
            floor=math.nan if entry["floor"] is None else entry["floor"],
            calibration=calibration,
            defects=defects,
            false_alarm_rate=entry["false_alarm_rate"],
            by_hand=(by_hand[0], by_hand[1]) if by_hand else None,
            former=(former[0], former[1], former[2]) if former else None,
        )
        if np.isnan(variant.gains).all():  # of a version that divided by radius
            variant = replace(variant, gains=worth(replace(variant, calibration=None)).gains, wanted=0)
        variants[entry["name"]] = variant
    return variants


def to_bytes(bank: MemoryBank) -> bytes:
    """Content of a safetensors file that holds a bank."""
    from safetensors.numpy import save

    arrays, plain = to_arrays(bank)
    return save(arrays, {"plain": json.dumps(plain, allow_nan=False)})


def from_bytes(content: bytes) -> MemoryBank:
    """Inverse of :func:`to_bytes`.

    Raises:
        ValueError: If it is no such file, of another schema, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
        length = int.from_bytes(content[:8], "little")
        plain = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["plain"])
    except (SafetensorError, KeyError) as error:
        msg = f"It is no file of a memory bank: {error}"
        raise ValueError(msg) from error
    return from_arrays(arrays, plain).bank


def _contradictions(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with a state that was loaded.

    Raises:
        KeyError: If something is missing.
    """
    entries = plain["variants"]
    for entry in entries:
        for key in ("vectors", "calibration_images", "defects", "shown"):
            if type(entry[key]) is not int or entry[key] < 0:
                return [f"{key} of {entry['name']} is {entry[key]!r}, no count"]
    counts = [entry["vectors"] for entry in entries]
    images = sum(entry["calibration_images"] for entry in entries)
    defects = sum(entry["defects"] for entry in entries)
    dimension = arrays["vectors"].shape[-1]
    shapes = {
        **dict.fromkeys(VECTORS, (sum(counts),)),
        "vectors": (sum(counts), dimension),
        **dict.fromkeys(CALIBRATION, (images,)),
        "calibration_patches": (images, CALIBRATION_PATCHES, dimension),
        "calibration_factors": (images, 2),
        "defects": (defects, dimension),
        "defect_reaches": (defects,),
        "prototypes": (len(entries), dimension),
        "image_hashes": (arrays["image_hashes"].size,),
        "image_owners": (arrays["image_hashes"].size,),
    }
    finite = ["vectors", "defects", "covers", "prototypes", "calibration_patches", "calibration_factors"]
    for position, stream in enumerate(plain["streams"]):
        prefix = f"stream_{position}_"
        count = len(arrays[f"{prefix}points"])
        dimension = dimension or arrays[f"{prefix}points"].shape[-1]
        shapes |= {
            f"{prefix}points": (count, dimension),
            **{f"{prefix}{key}": (count,) for key in ("radii", "covers", "origins", "stand_ins")},
            f"{prefix}prototype": (dimension,),
            f"{prefix}hashes": (arrays[f"{prefix}hashes"].size,),
        }
        finite += [f"{prefix}{key}" for key in ("points", "covers", "prototype")]
        for number in range(len(stream["samples"])):
            key = f"{prefix}sample_{number}"
            shapes[key] = (len(arrays[key]), dimension)
            finite.append(key)
    problems = [
        f"{key} has the shape {arrays[key].shape} in place of {shape}"
        for key, shape in shapes.items()
        if arrays[key].shape != shape
    ]
    if problems:
        return problems
    if sum(counts) > plain["size"]:
        problems.append(f"there are {sum(counts)} vectors, but at most {plain['size']} are allowed")
    if arrays["vectors"].dtype != plain["dtype"]:
        problems.append(f"vectors are of {arrays['vectors'].dtype} in place of {plain['dtype']}")
    problems += [f"{key} holds values that are not finite" for key in finite if not np.isfinite(arrays[key]).all()]
    if np.isnan(arrays["calibration_scores"]).any():
        problems.append("calibration_scores holds NaN")
    problems += [f"{key} holds negative values" for key in ("covers", "calibration_scores") if (arrays[key] < 0).any()]
    problems += [
        f"{key} are not above 0" for key in ("calibration_factors", "defect_reaches") if not (arrays[key] > 0).all()
    ]
    if not np.isin(arrays["image_owners"], range(-1, len(entries))).all():
        problems.append("image_owners names variants that are not there")
    if len({entry["name"] for entry in entries}) < len(entries):
        problems.append("a variant is there twice")
    if len({stream["name"] for stream in plain["streams"]}) < len(plain["streams"]):
        problems.append("a pool is there twice")
    problems += _problems_of_pools(arrays, plain)
    first = 0
    for entry, count in zip(entries, counts, strict=True):
        part = slice(first, first + count)
        first = part.stop
        problems += _problems_of_variant(entry, arrays["radii"][part], arrays["gains"][part], arrays["stand_ins"][part])
    return problems


def _problems_of_variant(
    entry: Mapping[str, Any], radii: NDArray[Any], worth: NDArray[Any], stand_ins: NDArray[Any]
) -> list[str]:
    """What is wrong with a variant whose arrays have the right shapes."""
    problems = []
    name = entry["name"]
    if not len(radii) or radii[0] != np.inf or not (np.diff(radii) <= 0).all():
        problems.append(f"radii of {name} do not fall from infinity")
    if not (np.isnan(worth).all() or (worth[0] == np.inf and (worth[1:] <= worth[:-1]).all() and (worth >= 0).all())):
        problems.append(f"gains of {name} do not fall from infinity")
    if not (stand_ins >= 0).all():
        problems.append(f"stand_ins of {name} are negative or NaN")
    if entry["floor"] is not None and not math.isfinite(entry["floor"]):
        problems.append(f"floor of {name} is not finite")
    if not all(entry[key] >= 0 for key in ("resolution", "spread", "images", "wanted")):
        problems.append(f"resolution, spread, images or wanted of {name} are out of range")
    if entry["defects"] and not entry["shown"]:
        problems.append(f"{name} holds defects of no image")
    rate = entry["false_alarm_rate"]
    try:
        if rate is not None:
            check_rate(rate)
    except ValueError as error:
        problems.append(f"{name}: {error}")
    for key, count in (("by_hand", 2), ("former", 3)):
        values = entry[key]
        if values is not None and not (len(values) == count and all(each is None or each >= 0 for each in values)):
            problems.append(f"{key} of {name} is out of range")
    return problems


def _problems_of_pools(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with pools whose arrays have the right shapes."""
    problems = []
    for position, stream in enumerate(plain["streams"]):
        points, radii, stand_ins = (arrays[f"stream_{position}_{key}"] for key in ("points", "radii", "stand_ins"))
        for key, values in (("radii", radii), ("stand_ins", stand_ins)):
            if not (values >= 0).all():
                problems.append(f"stream_{position}_{key} holds negative values or NaN")
        if points.dtype != np.float32:
            problems.append(f"stream_{position}_points are of {points.dtype} in place of float32")
        if not stream["name"] or stream["divided_at"] not in {0, *range(LISTS, len(points) + 1)}:
            problems.append(f"name or divided_at of pool {position} are out of range")
        if not all(stream[key] >= 0 for key in ("resolution", "spread", "images")):
            problems.append(f"resolution, spread or images of pool {position} are out of range")
        for number, described in enumerate(stream["samples"]):
            if len(described) != 5 or not all(type(value) is int for value in described):
                problems.append(f"image {number} of pool {position} is described by {described}")
                continue
            _, rows, columns, height, width = described
            patches = len(arrays[f"stream_{position}_sample_{number}"])
            if (rows or columns) and (rows * columns != patches or not (height > 0 and width > 0)):
                problems.append(f"image {number} of pool {position} has {patches} patches, not {rows} x {columns}")
    return problems
