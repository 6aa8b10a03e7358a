"""The Fréchet distance, the features that need no weights, and where reference pictures come from."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmqfx import emoji
from dmqfx.errors import DmqfxError
from dmqfx.judging.features import HAAR, Features, haar_features, load_features
from dmqfx.judging.frechet import Gaussian, frechet_distance
from dmqfx.judging.reference import load_reference

PIXELS = Features("pixels", lambda pictures: pictures.flatten(1))
GREY = Features("brightness", lambda pictures: pictures.mean((2, 3)))


def gaussian(mean: Tensor, covariance: Tensor, name: str = "f") -> Gaussian:
    return Gaussian(mean.double(), covariance.double(), 10, name)


def spread(dimensions: int, seed: int) -> Tensor:
    """A random covariance."""
    root = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T


# --- the distance


def test_equal_sets_are_at_distance_zero() -> None:
    rows = torch.randn(50, 6)
    assert frechet_distance(*(Gaussian.of(rows, "f") for _ in range(2))) == pytest.approx(0, abs=1e-9)


def test_the_order_of_pictures_does_not_matter() -> None:
    rows = torch.randn(50, 6)
    assert frechet_distance(Gaussian.of(rows, "f"), Gaussian.of(rows.flip(0), "f")) == pytest.approx(
        0, abs=1e-9
    )


def test_of_gaussians_along_the_same_axes_it_is_known() -> None:
    """|m - n|^2 + sum (sigma_i - tau_i)^2, whatever rotation both are seen under."""
    m, n = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2, 5])
    sigma, tau = torch.tensor([1.0, 2, 0.5]), torch.tensor([3.0, 1, 0.5])
    axes = torch.linalg.qr(torch.randn(3, 3))[0]
    a = gaussian(axes @ m, axes @ torch.diag(sigma**2) @ axes.T)
    b = gaussian(axes @ n, axes @ torch.diag(tau**2) @ axes.T)
    assert frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (4 + 1 + 0), abs=1e-4)


def test_of_any_gaussians_it_is_the_published_formula() -> None:
    """The trace of (S T)^(1/2) from the eigenvalues of the unsymmetric product."""
    mean, s, t = torch.randn(5).double(), spread(5, 0), spread(5, 1)
    root = torch.linalg.eigvals(s @ t).sqrt().real.sum()
    expected = mean.square().sum() + s.trace() + t.trace() - 2 * root
    found = frechet_distance(gaussian(mean, s), gaussian(torch.zeros(5), t))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_it_is_symmetric() -> None:
    a, b = gaussian(torch.zeros(4), spread(4, 0)), gaussian(torch.ones(4), spread(4, 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_fewer_pictures_than_features_still_have_a_distance() -> None:
    few, others = torch.randn(3, 20), torch.randn(3, 20)
    assert frechet_distance(Gaussian.of(few, "f"), Gaussian.of(few, "f")) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(Gaussian.of(few, "f"), Gaussian.of(others, "f")) > 1


def test_a_mean_and_covariance_are_those_of_the_rows() -> None:
    rows = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    found = Gaussian.of(rows, "f")
    assert found.mean.tolist() == [1, 2]
    assert found.covariance.tolist() == [[2, 4], [4, 8]]
    assert Gaussian.of(rows[:, :1], "f").covariance.tolist() == [[2]]


def test_features_that_are_not_finite_have_no_distance() -> None:
    broken = Gaussian.of(torch.tensor([[0.0], [math.nan]]), "f")
    assert math.isnan(frechet_distance(broken, Gaussian.of(torch.randn(5, 1), "f")))


def test_one_picture_is_no_set() -> None:
    with pytest.raises(DmqfxError, match="at least 2 pictures in each set, not 1"):
        Gaussian.of(torch.zeros(1, 3), "f")


def test_different_features_are_not_compared() -> None:
    a, b = gaussian(torch.zeros(2), spread(2, 0), "a"), gaussian(torch.zeros(2), spread(2, 0), "b")
    with pytest.raises(DmqfxError, match="the same features of both sets: 'a' has 2, 'b' has 2"):
        frechet_distance(a, b)


# --- the features


def test_of_a_plain_picture_only_the_colour_is_there() -> None:
    red = torch.tensor([1.0, -1, -1])[None, :, None, None].expand(1, 3, 16, 16)
    found = haar_features(red)[0]
    assert found[:3].tolist() == pytest.approx([-1 / 3**0.5, 2 / 2**0.5, 2 / 6**0.5])
    assert found[3:].abs().max() < 1e-12


@pytest.mark.parametrize(("level", "size"), [(0, 1), (1, 2), (2, 4)])
def test_a_chessboard_is_diagonal_detail_of_its_own_scale_alone(level: int, size: int) -> None:
    board = torch.ones(1, 1, 16, 16)
    i = torch.arange(16) // size
    board = board * (1 - 2 * ((i[:, None] + i[None]) % 2)).float()
    found = haar_features(board)[0]  # one colour: mean, then three orientations for each scale
    expected = torch.zeros(10).double()
    expected[3 * level + 3] = 1
    assert torch.allclose(found, expected, atol=1e-12)


def test_stripes_tell_their_orientation() -> None:
    upright = (1 - 2 * (torch.arange(8) % 2)).float().expand(1, 1, 8, 8)
    assert haar_features(upright)[0, 1:4].tolist() == pytest.approx([1, 0, 0])
    assert haar_features(upright.mT)[0, 1:4].tolist() == pytest.approx([0, 1, 0])


def test_noise_and_blur_are_far_from_the_pictures_that_they_spoil() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.nn.functional.interpolate(torch.rand(40, 3, 8, 8, generator=generator) * 2 - 1, (32, 32))
    half, rest = HAAR.gaussian([clean[:20]]), HAAR.gaussian([clean[20:]])
    noisy = HAAR.gaussian([clean[20:] + 0.2 * torch.randn(20, 3, 32, 32, generator=generator)])
    blurred = HAAR.gaussian([torch.nn.functional.avg_pool2d(clean[20:], 5, 1, 2)])
    near = frechet_distance(half, rest)
    assert frechet_distance(half, noisy) > 2 * near
    assert frechet_distance(half, blurred) > 2 * near


def test_sides_that_are_no_multiples_are_cut_and_tiny_pictures_refused() -> None:
    x = torch.rand(2, 3, 19, 16)
    assert torch.equal(haar_features(x), haar_features(x[:, :, :16]))
    with pytest.raises(DmqfxError, match="at least 8 x 8 pixels, not \\[7, 16\\]"):
        haar_features(x[:, :, :7])


def test_the_bundled_statistics_are_of_these_features_and_of_emoji() -> None:
    """A change of the features needs another name, and new statistics."""
    known = Gaussian.load(emoji.REFERENCE)
    assert (known.features, known.count, known.mean.shape) == (HAAR.name, 1026, (30,))
    drawn = emoji.decode(emoji.sample(emoji.load_unet(), emoji.demo_prompts(8), steps=6))
    noise = emoji.decode(torch.randn(8, *emoji.LATENT))
    assert frechet_distance(HAAR.gaussian([drawn]), known) < 0.5 * frechet_distance(
        HAAR.gaussian([noise]), known
    )


# --- features of the user


def test_a_function_is_found_by_module_and_name_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_features.py").write_text(
        "def mean(pictures):\n    return pictures.mean((2, 3))\nsize = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    found = load_features("my_features:mean")
    assert found.name == "my_features:mean"
    assert found.gaussian([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]).mean.tolist() == [0.5] * 3
    with pytest.raises(DmqfxError, match="my_features has no function size"):
        load_features("my_features:size")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_features", "names no function; write module:function"),
        ("no_such_module:f", "cannot import no_such_module for no_such_module:f"),
    ],
)
def test_a_function_that_does_not_exist_is_refused(name: str, words: str) -> None:
    with pytest.raises(DmqfxError, match=words):
        load_features(name)


def test_features_must_give_a_row_for_each_picture() -> None:
    with pytest.raises(
        DmqfxError, match=r"wrong must give a tensor \[2, D\] for 2 pictures, and gives \[3\]"
    ):
        Features("wrong", lambda pictures: pictures.mean((0, 2, 3))).gaussian([torch.zeros(2, 3, 4, 4)])


# --- reference pictures


@pytest.fixture
def arrays() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)


def test_a_folder_and_an_array_of_the_same_pictures_are_the_same_reference(
    tmp_path: Path, arrays: np.ndarray
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    for k, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "pictures" / f"{k}.png")
    np.savez(tmp_path / "pictures.npz", images=arrays, tokens=np.zeros((5, 8), np.int16))
    expected = Gaussian.of(torch.from_numpy(arrays).permute(0, 3, 1, 2).flatten(1) / 127.5 - 1, "pixels")
    for name in ("pictures", "pictures.npz"):
        found = load_reference(tmp_path / name, (12, 10), PIXELS)
        assert found.count == 5
        assert torch.allclose(found.mean, expected.mean, atol=1e-6)
        assert torch.allclose(found.covariance, expected.covariance, atol=1e-6)
    files = [(tmp_path / "pictures" / f"{k}.png").read_bytes() for k in range(5)]
    assert (
        load_reference(tmp_path / "pictures", (12, 10), GREY).digest
        == hashlib.sha256(b"".join(files)).hexdigest()
    )


def test_pictures_are_brought_to_size_and_transparent_ones_stand_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (16, 48), 255).save(tmp_path / "white.jpg")
    found = load_reference(tmp_path, (32, 32), GREY)
    assert found.mean.tolist() == [1, 1, 1]


def test_statistics_are_kept_and_refused_for_other_features(tmp_path: Path, arrays: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", arrays)
    known = load_reference(tmp_path / "a.npy", (12, 10), GREY)
    known.save(tmp_path / "known.safetensors")
    again = load_reference(tmp_path / "known.safetensors", (12, 10), GREY)
    assert frechet_distance(known, again) == pytest.approx(0, abs=1e-12)
    assert (again.count, again.digest) == (5, known.digest)
    with pytest.raises(DmqfxError, match="is of the features 'brightness', not 'pixels'"):
        load_reference(tmp_path / "known.safetensors", (12, 10), PIXELS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "empty holds no pictures"),
        ("words.txt", "neither a folder of pictures nor a .npz"),
        ("wrong.npz", "they would be uint8"),
    ],
)
def test_what_holds_no_pictures_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("x")
    np.savez(tmp_path / "wrong.npz", images=np.zeros((5, 12, 10, 3)))
    with pytest.raises(DmqfxError, match=words):
        load_reference(tmp_path / name, (8, 8), GREY)
