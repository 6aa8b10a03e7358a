"""Pictures side by side: PSNR, SSIM by its definition and properties, LPIPS only where it is at hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dmqfx.judging import pictures
from dmqfx.judging.pictures import find_lpips, psnr_db, ssim


def picture(seed: int = 0, size: int = 24) -> Tensor:
    """Smooth colours with some noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0]
    return (2 * (smooth + 0.1 * torch.rand(3, size, size, generator=generator)) / 1.1 - 1).double()


def constant(intensity: float) -> Tensor:
    """An intensity from 0 to 1 as a picture in [-1, 1]."""
    return torch.full((3, 16, 16), 2 * intensity - 1, dtype=torch.float64)


# --- PSNR


@pytest.mark.parametrize(("error", "db"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (0.0, math.inf)])
def test_psnr_is_against_the_range_of_pictures(error: float, db: float) -> None:
    image = torch.zeros(3, 4, 4)
    assert psnr_db(image, image + error) == pytest.approx(db)


def test_psnr_of_a_picture_that_is_not_finite_is_no_number() -> None:
    assert math.isnan(psnr_db(torch.zeros(3, 4, 4), torch.full((3, 4, 4), math.nan)))


# --- SSIM


def test_a_picture_is_similar_to_itself_by_one_and_to_others_by_less() -> None:
    assert ssim(picture(), picture()) == pytest.approx(1, abs=1e-12)
    assert ssim(picture(), picture(1)) < 0.9


def test_similarity_is_symmetric() -> None:
    assert ssim(picture(), picture(1)) == pytest.approx(ssim(picture(1), picture()), abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (0.0, 1.0), (0.5, 0.55)])
def test_of_constant_pictures_only_the_luminance_counts(a: float, b: float) -> None:
    c1 = 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(constant(a), constant(b)) == pytest.approx(expected, abs=1e-9)


def test_one_window_is_the_published_formula() -> None:
    """11 x 11 pixels have one place: the sums of the paper, written out."""
    a, b = picture(0, 11)[:1], picture(1, 11)[:1]
    weight = torch.tensor(
        [[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    )
    w = (weight / weight.sum()).double()
    x, y = (a[0] + 1) / 2, (b[0] + 1) / 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(float(expected), abs=1e-6)


def test_a_negative_is_dissimilar_though_its_error_is_no_larger_than_that_of_grey() -> None:
    x = picture() * 0.5
    assert ssim(x, -x) < 0


def test_noise_costs_more_similarity_than_a_shift_of_brightness_of_equal_error() -> None:
    """What SSIM is for: PSNR cannot tell these apart."""
    x = picture() * 0.8
    shift = torch.full_like(x, 0.1)
    noise = 0.1 * torch.sign(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double())
    assert psnr_db(x, x + shift) == pytest.approx(psnr_db(x, x + noise))
    assert ssim(x, x + shift) > ssim(x, x + noise) + 0.05


def test_more_noise_is_less_similar() -> None:
    x = picture()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    found = [ssim(x, x + scale * noise) for scale in (0.0, 0.05, 0.1, 0.3)]
    assert found == sorted(found, reverse=True)


def test_similarity_of_a_picture_that_is_not_finite_is_no_number() -> None:
    assert math.isnan(ssim(picture(), picture() * math.nan))


def test_a_picture_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, not \\[11, 10\\]"):
        ssim(torch.zeros(3, 11, 10), torch.zeros(3, 11, 10))


# --- LPIPS


def test_without_the_package_the_reason_is_said() -> None:
    network, words = find_lpips()
    assert network is None
    assert words == "not measured: the package lpips is not installed"


def test_without_weights_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pictures, "version", lambda _: "0.1.4")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network, words = find_lpips()
    assert network is None
    assert words.startswith(f"not measured: {tmp_path}/checkpoints holds no alexnet-owt-*.pth")


def test_with_package_and_weights_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Distance(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex"
            assert not verbose

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    monkeypatch.setattr(pictures, "version", lambda _: "0.1.4")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    network, words = find_lpips()
    assert words == "lpips 0.1.4, alex"
    assert network is not None
    assert float(network(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))) == 1
