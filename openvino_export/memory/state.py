# SPDX-License-Identifier: Apache-2.0
"""The saved form of a memory bank, and of an update that is not committed yet: arrays and plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .former_states import upgraded
from .leave_one_out import no_images, worth
from .memory_bank import MemoryBank
from .patch_pool import PatchPool
from .state_checks import CALIBRATION, VECTORS, contradictions, wrong_forms
from .update import Update, pool_capacity
from .variant import Calibration, Defects, Variant

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA_VERSION = 5
OLDEST_VERSION = 2


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
    version = plain.get("schema_version") if isinstance(plain, Mapping) else None
    if type(version) is not int or not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        msg = (
            f"The memory bank has schema version {version!s:.20}, this version of anomalib-ext reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or a newer one."
        )
        raise ValueError(msg)
    _refuse(wrong_forms(arrays, plain))
    try:
        if version < SCHEMA_VERSION:
            arrays, plain = upgraded(arrays, plain)
        rate = plain["false_alarm_rate"]
        MemoryBank(plain["size"], plain["dtype"], false_alarm_rate=rate)  # which refuses what is out of range
        problems = contradictions(arrays, plain)
    except KeyError as error:
        problems = [f"{error} is missing"]
    _refuse(problems)
    hashes, owners = (np.array(arrays[key]) for key in ("image_hashes", "image_owners"))
    bank = MemoryBank(plain["size"], plain["dtype"], _variants(arrays, plain), hashes, rate, owners)
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


def _refuse(problems: list[str]) -> None:
    if problems:
        msg = f"The memory bank is damaged: {'; '.join(problems[:5])}. Use an undamaged copy of the file."
        raise ValueError(msg)


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
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        msg = f"It is no file of a memory bank: {error!s:.200}"
        raise ValueError(msg) from error
    return from_arrays(arrays, plain).bank
