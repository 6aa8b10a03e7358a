"""How near two pictures are: PSNR, SSIM, and LPIPS where its weights are at hand."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import conv2d

__all__ = ["SSIM_WINDOW", "find_lpips", "psnr_db", "ssim"]

SSIM_WINDOW: Final = 11
_SIGMA, _C1, _C2 = 1.5, 0.01**2, 0.03**2


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures in [-1, 1], in dB; inf if equal, nan if not finite."""
    error = (a.double() - b.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(4 / error))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two pictures in [-1, 1]: 1 if equal, nan if not finite.

    As published: Gaussian window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, places where the window fits;
    intensities from 0 to 1, no scaling down; the mean over places and channels.

    Shapes: [C, H, W], H and W at least 11.
    Raises: ValueError for smaller pictures.
    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
        similarity", IEEE Transactions on Image Processing 13(4), 2004.
    """
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, not {list(a.shape[-2:])}")
    x, y = (0.5 * (picture.double() + 1) for picture in (a, b))
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    variance_x, variance_y = _local_mean(x * x) - mean_x**2, _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float((luminance * structure).mean())


def find_lpips() -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """LPIPS on AlexNet, and which it is; or None, and why. Nothing is downloaded.

    Source: Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a
        perceptual metric", CVPR 2018; the package `lpips`.
    """
    try:
        number = version("lpips")
    except PackageNotFoundError:
        return None, "not measured: the package lpips is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(weights.glob("alexnet-owt-*.pth")):
        return None, f"not measured: {weights} holds no alexnet-owt-*.pth, the weights that LPIPS looks with"
    network = import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    return network, f"lpips {number}, alex"


def _local_mean(picture: Tensor) -> Tensor:
    """Gaussian means wherever the window fits. Shapes: [C, H, W] -> [C, H - 10, W - 10]."""
    offsets = torch.arange(SSIM_WINDOW, dtype=picture.dtype, device=picture.device) - SSIM_WINDOW // 2
    bell = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    bell = bell / bell.sum()
    down = conv2d(picture.unsqueeze(1), bell.reshape(1, 1, -1, 1))
    return conv2d(down, bell.reshape(1, 1, 1, -1)).squeeze(1)
