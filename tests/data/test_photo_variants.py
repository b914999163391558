# SPDX-License-Identifier: Apache-2.0
"""Tests of the data that need no download."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from PIL import Image

from anomalib_ext.data import PhotoVariants, photo_variants

CATEGORIES = ["brick", "cell", "grass", "gravel", "moon", "retina"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the category ``gravel``."""
    root = tmp_path_factory.mktemp("data") / "PhotoVariants"
    PhotoVariants(root, "gravel").prepare_data()
    return root


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of each file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout(root: Path) -> None:
    """The files are those of MVTec AD's layout, and nothing else is left in the root."""
    counts = Counter(Path(name).parent.as_posix() for name in digests(root / "gravel"))
    kinds = ("crack", "scratch", "stain", "swap")
    assert counts == {
        "train/good": 24,
        "test/good": 8,
        **{f"test/{kind}": 4 for kind in kinds},
        **{f"ground_truth/{kind}": 4 for kind in kinds},
    }
    assert [path.name for path in root.iterdir()] == ["gravel"]
    assert (root / "gravel/ground_truth/crack/003_mask.png").is_file()


def test_behaves_as_a_datamodule_of_anomalib(root: Path) -> None:
    """The samples, batches, names and splits are what the engine expects."""
    data = PhotoVariants(root, "gravel", train_batch_size=5, val_split_mode="from_test", val_split_ratio=0.5, seed=1)
    assert isinstance(data, AnomalibDataModule)
    assert (data.name, data.category) == ("PhotoVariants", "gravel")
    data.prepare_data()
    data.setup()
    assert isinstance(data.train_data, AnomalibDataset)
    assert data.task == "segmentation"
    assert [len(subset) for subset in (data.train_data, data.val_data, data.test_data)] == [24, 12, 12]
    assert {"image_path", "label_index", "mask_path", "split"} <= set(data.test_data.samples.columns)

    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (5, 3, 256, 256)
    assert not batch.gt_label.any()
    for sample in data.test_data:
        assert bool(sample.gt_label) == bool(sample.gt_mask.any())


def test_is_configured_as_others_are(root: Path, tmp_path: Path) -> None:
    """A configuration may set what the class takes itself and what it passes on."""
    config = tmp_path / "data.yaml"
    arguments = f"{{root: '{root}', category: gravel, eval_batch_size: 3, seed: 7}}"
    config.write_text(f"class_path: anomalib_ext.data.PhotoVariants\ninit_args: {arguments}\n")
    data = AnomalibDataModule.from_config(config)
    assert isinstance(data, PhotoVariants)
    assert (data.category, data.eval_batch_size, data.seed, data.num_workers) == ("gravel", 3, 7, 0)


def test_is_always_the_same(root: Path, tmp_path: Path) -> None:
    """Neither the seed nor the state of the global generators matters, nor is that state touched."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    PhotoVariants(tmp_path, "gravel", seed=5).prepare_data()
    assert torch.equal(torch.get_rng_state(), before)
    assert digests(tmp_path / "gravel") == digests(root / "gravel")


def test_images_differ(root: Path) -> None:
    """No image is there twice."""
    images = {name: digest for name, digest in digests(root / "gravel").items() if "mask" not in name}
    assert len(set(images.values())) == len(images) == 48


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_and_test_images_share_no_part_of_the_photograph(category: str) -> None:
    """The parts are disjoint, and each is large enough for an image at any angle."""
    train, test = photo_variants._photo_parts(category)
    assert not np.shares_memory(train, test)
    assert min(*train.shape[:2], *test.shape[:2]) > photo_variants.CROP * 1.1
    assert train.shape[0] == test.shape[0] or train.shape[1] == test.shape[1]


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("kind", photo_variants.DEFECTS)
def test_masks_are_exact(category: str, kind: str) -> None:
    """A defect changes nothing outside its mask, nearly everything within, and is small."""
    rng = np.random.default_rng(1)
    _, part = photo_variants._photo_parts(category)
    for _ in range(3):
        good = photo_variants._good_image(part, rng)
        damaged, mask = photo_variants._damage(good, kind, rng)
        changed = (damaged != good).any(axis=2)
        assert not changed[~mask].any()
        assert changed[mask].mean() > 0.8
        assert 30 < mask.sum() < 0.1 * mask.size
        assert damaged.shape == (256, 256, 3)
        assert damaged.dtype == np.uint8


def test_written_masks_are_black_and_white(root: Path) -> None:
    """The mask files hold 0 and 255 only."""
    for path in (root / "gravel" / "ground_truth").rglob("*.png"):
        assert set(np.unique(np.asarray(Image.open(path)))) == {0, 255}


def test_unknown_category() -> None:
    """The error names the categories."""
    with pytest.raises(ValueError, match=f"Unknown category 'bottle'. The categories are {', '.join(CATEGORIES)}."):
        PhotoVariants(category="bottle")


def test_default_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a root the data lie below the working folder, with ``None`` where Anomalib keeps its own."""
    assert PhotoVariants().root == Path("datasets/PhotoVariants")
    monkeypatch.setattr("anomalib.utils.path.get_datasets_dir", lambda: tmp_path)
    assert PhotoVariants(None).root == tmp_path / "PhotoVariants"


def test_an_interruption_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An interrupted preparation is as if it had not begun."""
    save, saved = photo_variants._save, []

    def interrupted(image: np.ndarray, path: Path) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(image, path)
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(photo_variants, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PhotoVariants(tmp_path, "cell").prepare_data()
    assert len(saved) == 3
    assert not list(tmp_path.iterdir())


def test_complete_data_are_reused(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """What is there is not written again."""
    monkeypatch.setattr(photo_variants, "_write_category", lambda *_: pytest.fail("written again"))
    PhotoVariants(root, "gravel").prepare_data()


def test_another_process_may_be_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data that appear during the preparation are kept."""

    def write(_: str, folder: Path) -> None:
        for place in (folder, tmp_path / "cell"):
            place.mkdir()
            (place / f"of {place.parent.name}").touch()

    monkeypatch.setattr(photo_variants, "_write_category", write)
    PhotoVariants(tmp_path, "cell").prepare_data()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "cell",
        f"cell/of {tmp_path.name}",
    ]


def test_a_file_in_the_way_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that cannot get its name is not passed over."""
    (tmp_path / "cell").touch()
    monkeypatch.setattr(photo_variants, "_write_category", lambda _, folder: folder.mkdir())
    with pytest.raises(OSError, match="cell"):
        PhotoVariants(tmp_path, "cell").prepare_data()
