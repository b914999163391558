# SPDX-License-Identifier: Apache-2.0
"""Tests of synthetic anomalies: exact masks, the formula of the blend, seeds, foregrounds and textures."""

import pickle  # noqa: S403
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils.generators import generate_perlin_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Identity

from anomalib_ext.data import AnomalySynthesis
from anomalib_ext.data.anomaly_synthesis import perlin_noise, shuffle_strips

SIDES = st.integers(16, 90)
SEEDS = st.integers(0, 2**62)


def random_image(height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Return an image of 8-bit values, as files hold them."""
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed % 2**32)) / 255


def save(path: Path, value: int | np.ndarray, mode: str = "RGB", side: int = 40) -> None:
    """Write an image of one gray value, or of an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((side, side), value, np.uint8) if isinstance(value, int) else value
    Image.fromarray(array).convert(mode).save(path)


@given(SIDES, SIDES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_mask_is_binary_and_nothing_changes_outside_it(height: int, width: int, seed: int) -> None:
    """Every image gets an anomaly, also small and narrow ones, and no pixel outside its mask changes."""
    image = random_image(height, width, seed)
    before = image.clone()
    damaged, mask = AnomalySynthesis(seed=seed)(image)
    assert torch.equal(image, before)
    assert (damaged.shape, damaged.dtype) == (image.shape, image.dtype)
    assert (mask.shape, mask.dtype) == ((1, height, width), torch.float32)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.any()
    outside = (mask == 0).expand_as(image)
    assert torch.equal(damaged[outside], image[outside])
    assert 0 <= damaged.min() <= damaged.max() <= 1


@given(SEEDS, st.floats(0, 0.9), st.floats(0, 0.09))
@settings(max_examples=40, deadline=None)
def test_blend_follows_the_formula(seed: int, low: float, width: float) -> None:
    """With a black source what is left of the image is its weight, one for all pixels and within the range."""
    synthesis = AnomalySynthesis(beta=(low, low + width), texture_only=True, seed=seed)
    synthesis.augmentations = Identity()
    synthesis._texture = lambda height, width: Image.new("RGB", (width, height))  # type: ignore[method-assign]
    image = random_image(seed=seed) * 0.5 + 0.5
    damaged, mask = synthesis(image)
    weights = (damaged / image)[mask.bool().expand_as(image)]
    assert low - 1e-5 <= weights.min()
    assert weights.max() <= low + width + 1e-5
    assert weights.max() - weights.min() < 1e-5


def test_source_is_texture_or_image_in_equal_parts(tmp_path: Path) -> None:
    """A self-source holds nothing but the image's values, a texture those of its file."""
    save(tmp_path / "a" / "black.JPG", 0)
    synthesis = AnomalySynthesis(texture_dir=tmp_path, beta=(0.0, 0.0))
    synthesis.augmentations = Identity()
    image = torch.full((3, 64, 64), 0.8)
    darkest = [float(synthesis(image)[0].min()) for _ in range(200)]
    textures = sum(value < 0.1 for value in darkest)
    assert 70 <= textures <= 130
    assert all(abs(value - 0.8) < 1e-6 for value in darkest if value >= 0.1)
    only = AnomalySynthesis(texture_dir=tmp_path, texture_only=True, beta=(0.0, 0.0))
    only.augmentations = Identity()
    assert all(float(only(image)[0].min()) < 0.1 for _ in range(20))


def test_textures_alone_for_some_categories(tmp_path: Path) -> None:
    """The category is a folder in the image's path."""
    save(tmp_path / "black.png", 0)
    synthesis = AnomalySynthesis(texture_dir=tmp_path, texture_only=["carpet"], beta=(0.0, 0.0))
    synthesis.augmentations = Identity()
    image = torch.full((3, 32, 32), 0.8)

    def share(path: str) -> float:
        return sum(float(synthesis(image, path)[0].min()) < 0.1 for _ in range(30)) / 30

    assert share("data/carpet/train/good/000.png") == 1
    assert share("data/bottle/train/good/carpet.png") < 1
    with pytest.raises(ValueError, match="With texture_only the image's path is needed"):
        synthesis(image)


@given(SIDES, SIDES, st.integers(0, 3), st.integers(0, 3), SEEDS)
@settings(max_examples=40, deadline=None)
def test_noise_is_that_of_anomalib(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    """The same angles give the same noise."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        expected = generate_perlin_noise(height, width, (2**rows, 2**columns), torch.device("cpu"))
        torch.default_generator.manual_seed(seed)
        angles = 2 * torch.pi * torch.rand(2**rows + 1, 2**columns + 1)
    torch.testing.assert_close(perlin_noise(height, width, angles), expected, rtol=0, atol=1e-5)


@given(SIDES, SIDES, SEEDS)
@settings(max_examples=40, deadline=None)
def test_strips_keep_all_pixels_even_ones_first(height: int, width: int, seed: int) -> None:
    """Each strip moves as a whole, and the even ones come to lie before the odd ones."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    shuffled = shuffle_strips(torch.stack([rows, columns]), np.random.default_rng(seed))
    for values, length in ((shuffled[0, :, 0], height), (shuffled[1, 0], width)):
        strip = torch.cat([torch.full((len(part),), i) for i, part in enumerate(torch.arange(length).tensor_split(8))])
        order = strip[values].unique_consecutive().tolist()
        assert sorted(order[:4]) == [0, 2, 4, 6]
        assert sorted(order[4:]) == [1, 3, 5, 7]
        assert values.sort().values.tolist() == list(range(length))
    assert torch.equal(shuffled[0], shuffled[0, :, :1].expand(height, width))
    assert torch.equal(shuffled[1], shuffled[1, :1].expand(height, width))


def test_same_seed_same_output_and_global_state_is_left_alone() -> None:
    """Only the seed matters, and images follow one another differently."""
    image = random_image()
    torch.manual_seed(1)
    first = AnomalySynthesis(seed=7)
    state = torch.get_rng_state()
    made = [first(image) for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = AnomalySynthesis(seed=7)
    for (damaged, mask), (damaged_again, mask_again) in zip(made, (again(image) for _ in range(5)), strict=True):
        assert torch.equal(damaged, damaged_again)
        assert torch.equal(mask, mask_again)
    assert len({damaged.numpy().tobytes() for damaged, _ in made}) == 5
    assert not torch.equal(AnomalySynthesis(seed=8)(image)[0], made[0][0])
    pickled = pickle.loads(pickle.dumps(first))  # noqa: S301  # as for a worker that is spawned
    assert torch.equal(pickled(image)[0], first(image)[0])


class _Images(Dataset):
    """The same image again and again, with another anomaly each time."""

    def __init__(self) -> None:
        self.synthesis = AnomalySynthesis(seed=3)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.synthesis(random_image(32, 32))[0]


def test_workers_and_epochs_differ_but_can_be_repeated() -> None:
    """No image comes twice from two workers in two epochs, and all come again with the same global seed."""

    def epochs() -> list[bytes]:
        torch.manual_seed(5)
        loader: DataLoader[torch.Tensor] = DataLoader(_Images(), num_workers=2)
        return [image.numpy().tobytes() for _ in range(2) for image in loader]

    images = epochs()
    assert len(set(images)) == len(images) == 16
    assert epochs() == images


def test_foreground_bounds_the_mask(tmp_path: Path) -> None:
    """The map that repeats most of the image's path is taken, whatever the image's format."""
    object_ = np.zeros((64, 64), np.uint8)
    object_[10:30, 20:50] = 255
    save(tmp_path / "bottle/train/good/000.png", object_, "L")
    save(tmp_path / "pill/train/good/000.png", 255 - object_, "L")
    synthesis = AnomalySynthesis(foreground_dir=tmp_path)
    allowed = torch.from_numpy(object_ > 0)
    for _ in range(30):
        assert not synthesis(random_image(), "/data/bottle/train/good/000.jpg")[1][0][~allowed].any()
        assert not synthesis(random_image(), Path("data/pill/train/good/000.png"))[1][0][allowed].any()


def test_tiny_foreground_gets_an_anomaly(tmp_path: Path) -> None:
    """A few pixels that the noise misses in all its tries are enough."""
    speck = np.zeros((64, 64), np.uint8)
    speck[0, 0] = speck[0, 1] = 255
    save(tmp_path / "000.png", speck, "L")
    synthesis = AnomalySynthesis(foreground_dir=tmp_path)
    for _ in range(5):
        mask = synthesis(random_image(), "000.png")[1]
        assert 1 <= mask.sum() == mask[0, 0, :2].sum()


def test_foregrounds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Missing, ambiguous, black and unreadable maps, and a missing path."""
    save(tmp_path / "train/good/000.png", 255)
    save(tmp_path / "train/good/001.png", 0)
    (tmp_path / "train/good/002.png").write_text("no image")
    synthesis = AnomalySynthesis(foreground_dir=tmp_path)
    image = random_image()
    synthesis(image, "bottle/train/good/000.png")
    with pytest.raises(ValueError, match=r"the foreground of both bottle/train/good/000.png and pill/train/good/000"):
        synthesis(image, "pill/train/good/000.png")
    with pytest.raises(ValueError, match=r"001.png of bottle/train/good/001.png is black everywhere"):
        synthesis(image, "bottle/train/good/001.png")
    with pytest.raises(OSError, match=r"002.png cannot be read as an image"):
        synthesis(image, "bottle/train/good/002.png")
    with pytest.raises(FileNotFoundError, match=r"no foreground for bottle/train/good/003.png"):
        synthesis(image, "bottle/train/good/003.png")
    with pytest.raises(ValueError, match=r"With foreground_dir the image's path is needed"):
        synthesis(image)
    with pytest.raises(NotADirectoryError, match="nowhere does not exist"):
        AnomalySynthesis(foreground_dir=tmp_path / "nowhere")


def test_texture_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A missing folder, one without images, and an unreadable texture."""
    with pytest.raises(NotADirectoryError, match=r"texture folder .*nowhere does not exist"):
        AnomalySynthesis(texture_dir=tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="has no images"):
        AnomalySynthesis(texture_dir=tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(OSError, match=r"broken.png cannot be read as an image"):
        AnomalySynthesis(texture_dir=tmp_path, texture_only=True)(random_image())


@pytest.mark.parametrize("beta", [(0.5, 0.2), (-0.1, 0.5), (0.2, 1.0)])
def test_blend_ranges_that_do_not_fit_are_refused(beta: tuple[float, float]) -> None:
    """A weight of 1 would leave the image as it is."""
    with pytest.raises(ValueError, match="beta must be a range"):
        AnomalySynthesis(beta=beta)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 32, 32), "RGB image"),
        (torch.zeros(2, 3, 32, 32), "RGB image"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "floating point"),
        (torch.zeros(3, 15, 32), "32 x 15 pixels; at least 16"),
        (torch.full((3, 32, 32), torch.nan), "from nan to nan"),
        (torch.full((3, 32, 32), 255.0), "from 255.0 to 255.0; from 0 to 1"),
        (torch.full((3, 32, 32), -1.0), "from -1.0"),
    ],
)
def test_images_that_do_not_fit_are_refused(image: torch.Tensor, message: str) -> None:
    """What is no RGB image from 0 to 1 is named."""
    with pytest.raises(ValueError, match=message):
        AnomalySynthesis()(image)
