# SPDX-License-Identifier: Apache-2.0
"""The saved form of a memory bank, and of an update that is not committed yet: arrays and plain data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.images import image_hash

from .memory_bank import MemoryBank
from .patch_pool import LISTS, PatchPool
from .thresholds import CALIBRATION_PATCHES
from .update import Update, pool_capacity
from .variant import Calibration, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .update import Waiting

SCHEMA_VERSION = 2


def to_arrays(known: MemoryBank | Update) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """State as arrays and as plain data, fit for safetensors and JSON. That of an update holds its pools, too.

    The keys are those of the first files: `covers` are cover radii, `resolution` is the merge radius, `novelties` are
    prequential scores, and a stream is a pool.
    """
    bank = known.bank if isinstance(known, Update) else known
    variants = bank.variants.values()
    dimension = bank.dimension() or 0
    empty = Calibration(
        np.empty((0, CALIBRATION_PATCHES, dimension), np.float16),
        np.empty(0, bool),
        np.empty(0, np.float32),
    )
    calibrations = [variant.calibration or empty for variant in variants]
    nothing = np.empty(0, np.float32)
    arrays = {
        "vectors": np.concatenate([np.empty((0, dimension), bank.dtype), *(v.vectors for v in variants)]),
        "radii": np.concatenate([nothing, *(v.radii for v in variants)]),
        "covers": np.concatenate([nothing, *(v.cover_radii for v in variants)]),
        "calibration_patches": np.concatenate([empty.patches, *(c.patches for c in calibrations)]),
        "calibration_labels": np.concatenate([empty.labels, *(c.labels for c in calibrations)]),
        "calibration_scores": np.concatenate([empty.scores, *(c.scores for c in calibrations)]),
        "calibration_pixels": np.array([c.pixel for c in calibrations], np.float64).reshape(-1, 3),
        "calibration_margins": np.array([c.margin for c in calibrations], np.float64),
        "novelties": np.concatenate([nothing, *(v.prequential_scores for v in variants)]),
        "prototypes": np.array([v.prototype for v in variants], np.float32).reshape(len(variants), dimension),
        "image_hashes": bank.image_hashes,
    }
    plain: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "size": bank.size,
        "dtype": bank.dtype.name,
        "variants": [
            {
                "name": name,
                "vectors": len(variant.radii),
                "scale": variant.scale,
                "resolution": variant.merge_radius,
                "images": variant.images,
                "spread": variant.spread,
                "calibration_images": len(variant.calibration.labels) if variant.calibration else 0,
                "novelties": len(variant.prequential_scores),
            }
            for name, variant in bank.variants.items()
        ],
        "streams": [],
    }
    if isinstance(known, Update) and known.is_open():
        _add_update(known, arrays, plain)
    return arrays, plain


def _add_update(update: Update, arrays: dict[str, NDArray[Any]], plain: dict[str, Any]) -> None:
    """Add what an update holds besides its bank."""
    for position, pool in enumerate(update.pools.values()):
        own, described = pool.to_arrays()
        arrays |= {f"stream_{position}_{key}": value for key, value in own.items()}
        plain["streams"].append(described)
    names = list(dict.fromkeys(update.learned.values()))
    plain["learned"] = names
    arrays["learned_hashes"] = np.array(list(update.learned), np.int64)
    arrays["learned_variants"] = np.array([names.index(name) for name in update.learned.values()], np.int64)
    waiting = [
        (name, image, patches)
        for name, images in update.waiting.items()
        for image, _, patches in images
        if patches is not None
    ]
    plain["waiting"] = [name for name, *_ in waiting]
    for position, (_, image, patches) in enumerate(waiting):
        arrays |= {f"waiting_{position}_image": image, f"waiting_{position}_patches": patches}


def from_arrays(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> Update:
    """Inverse of :func:`to_arrays`: an update with the pools, if there are any; its :attr:`Update.bank` is the bank.

    Raises:
        ValueError: If the state is of another schema, or damaged.
    """
    version = plain.get("schema_version")
    if version != SCHEMA_VERSION:
        msg = (
            f"The memory bank has schema version {version}, this version of anomalib-ext reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or a newer one."
        )
        raise ValueError(msg)
    try:
        empty = MemoryBank(plain["size"], plain["dtype"])
        problems = _contradictions(arrays, plain)
    except KeyError as error:
        problems = [f"{error} is missing"]
    if problems:
        msg = f"The memory bank is damaged: {'; '.join(problems)}. Use an undamaged copy of the file."
        raise ValueError(msg)
    bank = empty.with_variants(_variants(arrays, plain), np.array(arrays["image_hashes"]))
    capacity = pool_capacity(bank)
    pools = []
    for position, described in enumerate(plain["streams"]):
        prefix = f"stream_{position}_"
        own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        name = described["name"]
        pool = PatchPool(name, bank.variants.get(name), own["points"].shape[1], capacity, bank.dtype)
        pool.restore(own, described)
        pools.append(pool)
    learned = {value: pool.name for pool in pools for value in pool.hashes}  # files of before say no more
    if "learned" in plain:
        owners = (plain["learned"][i] for i in arrays["learned_variants"].tolist())
        learned = dict(zip(arrays["learned_hashes"].tolist(), owners, strict=True))
    waiting: Waiting = {}
    for position, name in enumerate(plain.get("waiting", [])):
        image, patches = (np.array(arrays[f"waiting_{position}_{key}"]) for key in ("image", "patches"))
        waiting.setdefault(name, []).append((image, image_hash(image), patches))
    update = Update(bank)
    update.resume(pools, waiting, learned)
    return update


def _variants(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> dict[str, Variant]:
    variants = {}
    first = image = score = 0
    for position, entry in enumerate(plain["variants"]):
        part = slice(first, first + entry["vectors"])
        images = slice(image, image + entry["calibration_images"])
        scores = slice(score, score + entry["novelties"])
        first, image, score = part.stop, images.stop, scores.stop
        calibration = None
        if entry["calibration_images"]:
            threshold, lowest, highest = (float(value) for value in arrays["calibration_pixels"][position])
            calibration = Calibration(
                np.array(arrays["calibration_patches"][images]),
                np.array(arrays["calibration_labels"][images]),
                np.array(arrays["calibration_scores"][images]),
                (threshold, lowest, highest),
                float(arrays["calibration_margins"][position]),
            )
        variants[entry["name"]] = Variant(
            vectors=np.array(arrays["vectors"][part]),
            radii=np.array(arrays["radii"][part]),
            cover_radii=np.array(arrays["covers"][part]),
            scale=entry["scale"],
            merge_radius=entry["resolution"],
            images=entry["images"],
            prototype=np.array(arrays["prototypes"][position]),
            spread=entry["spread"],
            calibration=calibration,
            prequential_scores=np.array(arrays["novelties"][scores]),
        )
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
    counts = [entry["vectors"] for entry in entries]
    images = sum(entry["calibration_images"] for entry in entries)
    dimension = arrays["vectors"].shape[-1]
    shapes = {
        "vectors": (sum(counts), dimension),
        "radii": (sum(counts),),
        "covers": (sum(counts),),
        "calibration_patches": (images, CALIBRATION_PATCHES, dimension),
        "calibration_labels": (images,),
        "calibration_scores": (images,),
        "calibration_pixels": (len(entries), 3),
        "calibration_margins": (len(entries),),
        "novelties": (sum(entry["novelties"] for entry in entries),),
        "prototypes": (len(entries), dimension),
        "image_hashes": (arrays["image_hashes"].size,),
    }
    finite = [
        "vectors",
        "covers",
        "prototypes",
        "calibration_patches",
        "calibration_scores",
        "calibration_margins",
        "novelties",
    ]
    more, also_finite = _shapes_of_update(arrays, plain, dimension)
    shapes |= more
    finite += also_finite
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
    if len({entry["name"] for entry in entries}) < len(entries):
        problems.append("a variant is there twice")
    if len({stream["name"] for stream in plain["streams"]}) < len(plain["streams"]):
        problems.append("a pool is there twice")
    problems += _problems_of_update(arrays, plain)
    first = 0
    for entry, count in zip(entries, counts, strict=True):
        radii = arrays["radii"][first : first + count]
        first += count
        if count < 1 or radii[0] != np.inf or not (np.diff(radii) <= 0).all():
            problems.append(f"radii of {entry['name']} do not fall from infinity")
        if not (entry["scale"] > 0 and all(entry[key] >= 0 for key in ("resolution", "spread", "images"))):
            problems.append(f"scale, resolution, spread or images of {entry['name']} are out of range")
    return problems


def _shapes_of_update(
    arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any], dimension: int
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes that arrays of an update must have, and names of those that must be finite.

    Args:
        arrays: The arrays.
        plain: The plain data.
        dimension: Length of a vector, 0 while the bank is empty.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    finite = []
    for position in range(len(plain["streams"])):
        prefix = f"stream_{position}_"
        count = len(arrays[f"{prefix}points"])
        dimension = dimension or arrays[f"{prefix}points"].shape[-1]
        shapes |= {
            f"{prefix}points": (count, dimension),
            f"{prefix}radii": (count,),
            f"{prefix}covers": (count,),
            f"{prefix}prototype": (dimension,),
            f"{prefix}hashes": (arrays[f"{prefix}hashes"].size,),
            f"{prefix}novelties": (arrays[f"{prefix}novelties"].size,),
        }
        finite += [f"{prefix}{key}" for key in ("points", "covers", "prototype", "novelties")]
    for position in range(len(plain.get("waiting", []))):
        image, patches = (f"waiting_{position}_{key}" for key in ("image", "patches"))
        dimension = dimension or arrays[patches].shape[-1]
        shapes |= {image: (3, *arrays[image].shape[-2:]), patches: (len(arrays[patches]), dimension)}
        finite += [image, patches]
    if "learned" in plain:
        shapes["learned_hashes"] = (arrays["learned_variants"].size,)
        shapes["learned_variants"] = (arrays["learned_hashes"].size,)
    return shapes, finite


def _problems_of_update(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with an update whose arrays have the right shapes."""
    problems = []
    for position, stream in enumerate(plain["streams"]):
        points, radii = (arrays[f"stream_{position}_{key}"] for key in ("points", "radii"))
        if np.isnan(radii).any() or (radii < 0).any():
            problems.append(f"stream_{position}_radii holds negative values or NaN")
        if points.dtype != np.float32:
            problems.append(f"stream_{position}_points are of {points.dtype} in place of float32")
        if not stream["name"] or stream["divided_at"] not in {0, *range(LISTS, len(points) + 1)}:
            problems.append(f"name or divided_at of pool {position} are out of range")
        if not all(stream[key] >= 0 for key in ("resolution", "spread", "images")):
            problems.append(f"resolution, spread or images of pool {position} are out of range")
    if "learned" in plain and not np.isin(arrays["learned_variants"], np.arange(len(plain["learned"]))).all():
        problems.append("learned images are of variants that are not named")
    return problems
