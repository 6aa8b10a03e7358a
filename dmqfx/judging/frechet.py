"""The Fréchet distance of two sets of pictures, each summed up as a Gaussian in a stated feature space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dmqfx.errors import DmqfxError
from dmqfx.storage.atomic import replacing_file

__all__ = ["Gaussian", "frechet_distance"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of the features of a set of pictures, and of which features.

    Shapes: mean float64 [D]; covariance float64 [D, D], of count - 1 degrees of freedom.
    Units: digest is the SHA-256 of the files that the pictures are from.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    features: str
    digest: str = ""

    @classmethod
    def of(cls, features: Tensor, name: str, digest: str = "") -> Gaussian:
        """Of the features of each picture. Shapes: [N, D].

        Raises: DmqfxError for fewer than two pictures: they have no covariance.
        """
        if len(features) < 2:
            raise DmqfxError(f"a Fréchet distance needs at least 2 pictures in each set, not {len(features)}")
        rows = features.double()
        return cls(rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], -1), len(rows), name, digest)

    def save(self, path: Path) -> None:
        """Write a safetensors file.

        Raises: OSError if it cannot be written.
        """
        about = {"count": str(self.count), "features": self.features, "digest": self.digest}
        text = save({"mean": self.mean, "covariance": self.covariance}, metadata=about)
        with replacing_file(path) as file:
            file.write_bytes(text)

    @classmethod
    def load(cls, path: Path) -> Gaussian:
        """Read what `save` wrote.

        Raises: OSError, or SafetensorError, KeyError, TypeError or ValueError for a file that is another's.
        """
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"a mean {list(mean.shape)} and a covariance {list(covariance.shape)}")
        return cls(mean, covariance, int(about["count"]), about["features"], about["digest"])


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)); nan if a feature is not finite.

    With few pictures it is too large, the more so the more features there are: compare only equal counts.

    Raises: DmqfxError if the features are not the same.
    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982; for
        pictures Heusel et al., "GANs trained by a two time-scale update rule ...", 2017.
    Example:
        >>> a = Gaussian(torch.tensor([0.0]), torch.tensor([[1.0]]), 9, "one number")
        >>> b = Gaussian(torch.tensor([3.0]), torch.tensor([[4.0]]), 9, "one number")
        >>> frechet_distance(a, b)  # (3 - 0)^2 + (2 - 1)^2
        10.0
    """
    if (a.features, a.mean.shape) != (b.features, b.mean.shape):
        raise DmqfxError(
            f"a Fréchet distance needs the same features of both sets: {a.features!r} has {len(a.mean)}, "
            f"{b.features!r} has {len(b.mean)}"
        )
    if not all(torch.isfinite(part).all() for each in (a, b) for part in (each.mean, each.covariance)):
        return math.nan
    root = _square_root(a.covariance)
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(float((a.mean - b.mean).square().sum() + traces - 2 * product), 0.0)


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
