"""How numbers become codes: what stays the same between calls, checked and laid out for the kernel once for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmqfx.errors import DmqfxError
from dmqfx.runtime.kernels.kept import Kept, Stamp, stamp
from dmqfx.runtime.kernels.native import Coding, readable

__all__ = ["ACTIVATIONS", "NORMS", "Recipe", "Recipes", "check_groups", "prepare"]

NORMS = ("none", "group", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "geglu")


class Recipe(NamedTuple):
    """What is done to numbers with `dim` dimensions and `width` channels, of which GEGLU makes half as many, on an axis.

    Shapes: scale, zero_point [G, 1] or [G, channels]; norm_weight, norm_bias [C] or None.
    """

    scale: Tensor
    zero_point: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    dim: int
    axis: int
    width: int
    qmin: int
    qmax: int
    norm: str = "none"
    norm_groups: int = 1
    eps: float = 0.0
    activation: str = "none"

    @property
    def planes(self) -> bool:
        """Whether channels are on axis 1 of four, else on the last."""
        return self.dim == 4 and self.axis == 1

    @property
    def channels(self) -> int:
        """Of the codes."""
        return self.width // 2 if self.activation == "geglu" else self.width

    def check(self) -> None:
        """Raise ValueError for what does not fit."""
        if not self.planes and self.axis not in (-1, self.dim - 1):
            raise ValueError(f"channels on axis {self.axis} of {self.dim}: not 1 of four, nor the last")
        if self.norm not in NORMS or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"norm {self.norm!r}, activation {self.activation!r}: there are {NORMS} and {ACTIVATIONS}"
            )
        if self.norm != "none" and self.planes != (self.norm == "group"):
            raise ValueError(f"a {self.norm} norm with channels on axis {self.axis} of {self.dim}")
        if self.activation == "geglu" and (self.planes or self.norm != "none" or self.width % 2):
            raise ValueError(
                f"geglu of {self.width} channels on axis {self.axis} of {self.dim} behind a {self.norm} norm: "
                "halves of an even last axis, no norm"
            )
        if self.norm == "group" and (self.norm_groups < 1 or self.width % self.norm_groups):
            raise ValueError(f"{self.width} channels do not fall into {self.norm_groups} groups")
        self._check_grid()

    def _check_grid(self) -> None:
        scale, zero_point = self.scale, self.zero_point
        if any(each.shape[1] not in (1, self.channels) for each in (scale, zero_point)):
            raise ValueError(
                f"scale {list(scale.shape)}, zero point {list(zero_point.shape)} for {self.channels} channels"
            )
        if scale.shape[0] != zero_point.shape[0]:
            raise ValueError(f"{scale.shape[0]} rows of scales, {zero_point.shape[0]} of zero points")


@dataclass(frozen=True, eq=False)
class Recipes:
    """A recipe as the kernel reads it, but for what it is of; `tables` are what it points to.

    `native` is None where the kernel cannot read the tensors.
    """

    native: Coding | None
    tables: tuple[Tensor, ...]
    without_scale: Recipe
    stamp: Stamp

    def coding(self) -> Coding:
        """A copy to be filled in, which keeps the tables.

        Raises: DmqfxError where the kernel cannot read the tensors.
        """
        if self.native is None:
            raise DmqfxError("scales, weight and bias of a norm are float32 on the CPU")
        made = Coding.from_buffer_copy(self.native)
        made.kept = self
        return made

    def serves(self, recipe: Recipe) -> bool:
        """Whether it was made of this recipe's tensors, as they are now, beside that scale."""
        mine = self.without_scale
        return (
            mine.zero_point is recipe.zero_point
            and mine.norm_weight is recipe.norm_weight
            and mine.norm_bias is recipe.norm_bias
            and mine[4:] == recipe[4:]
            and self.stamp == stamp(*recipe[:4])
        )


_KNOWN: Kept[Recipes] = Kept()


def prepare(recipe: Recipe) -> Recipes:
    """What the kernel needs of a recipe, kept as long as its scale is.

    Raises: ValueError that says what does not fit.
    """
    known = _KNOWN.get(recipe.scale)
    if known is not None and known.serves(recipe):
        return known
    recipe.check()
    real = (recipe.scale, recipe.norm_weight, recipe.norm_bias)
    tables = _tables(recipe) if all(each is None or readable(each) for each in real) else {}
    native = _coding(recipe, tables) if tables else None
    counted = not any(each is not None and each.is_inference() for each in recipe[:4])
    kept = tuple(each for each in tables.values() if each is not recipe.scale)
    without_scale = recipe._replace(scale=recipe.zero_point)
    found = Recipes(native, kept, without_scale, stamp(*recipe[:4]) if counted else [])
    if counted:  # nobody counts what is written into the others
        _KNOWN.keep(recipe.scale, found)
    return found


def _coding(recipe: Recipe, tables: dict[str, Tensor]) -> Coding:
    made = Coding(
        channels=recipe.channels, norm=NORMS.index(recipe.norm), norm_groups=recipe.norm_groups, eps=recipe.eps,
        activation=ACTIVATIONS.index(recipe.activation), least=recipe.qmin, greatest=recipe.qmax,
        scale_channels=recipe.scale.shape[1], zero_point_channels=recipe.zero_point.shape[1],
        timestep_groups=recipe.scale.shape[0],
    )  # fmt: skip
    for name, table in tables.items():
        setattr(made, name, table.data_ptr())
    return made


def _tables(recipe: Recipe) -> dict[str, Tensor]:
    """What the kernel reads of a recipe, by the name of its field; weight and bias of a norm where it has none too."""
    tables = {"scales": recipe.scale, "zero_points": recipe.zero_point.int()}
    if recipe.norm != "none":
        ones = torch.ones(recipe.width, dtype=torch.float32, device="cpu")
        tables["gammas"] = ones if recipe.norm_weight is None else recipe.norm_weight.expand(recipe.width)
        tables["betas"] = 0 * ones if recipe.norm_bias is None else recipe.norm_bias.expand(recipe.width)
    return {
        name: each if each.is_contiguous() else each.detach().contiguous() for name, each in tables.items()
    }


def check_groups(group: Tensor | None, groups: int, samples: int) -> None:
    """Whether indices of timestep groups are those of so many samples.

    Raises: ValueError that says what does not fit.
    """
    if group is None and groups != 1:
        raise ValueError(f"parameters of {groups} timestep groups need a group index")
    if group is not None and group.shape[0] != samples:
        raise ValueError(f"{group.shape[0]} timestep groups for {samples} samples")
