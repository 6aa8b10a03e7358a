"""Whether recorded rows are calls that a program can take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmqfx.calibration.rows import Rows
from dmqfx.errors import CalibrationError
from dmqfx.graph.inputs import Input, InputSpec

__all__ = ["check", "listing"]


def check(groups: Sequence[Rows], inputs: InputSpec, models: Sequence[str]) -> None:
    """Refuse rows, recorded from these models, that a program with these inputs cannot take.

    Raises: CalibrationError that names what differs, or the first row and tensor that is not finite.
    """
    if not any(map(len, groups)):
        raise CalibrationError("the calibration is empty: record at least one UNet call")
    for k, group in enumerate(groups):
        if not len(group):
            raise CalibrationError(f"group {k} of the calibration's rows has none: leave it out")
        problem = _another_model(models, inputs) or _misfit(group, inputs)
        if problem:
            recorded = " and ".join(dict.fromkeys(models)) or "an unknown model"
            raise CalibrationError(
                f"the calibration of {recorded} does not fit this {inputs.root}: {problem}\n"
                f"  recorded: {listing(group)}\n  expected: {_wanted(inputs)}"
            )
    _refuse_not_finite(groups)


def listing(group: Rows) -> str:
    """Names and shapes of one row."""
    shapes = {name: list(shape[1:]) for name, shape in _shapes(group).items()}
    return "  ".join(f"{name} {shape}" for name, shape in shapes.items())


def _another_model(models: Sequence[str], inputs: InputSpec) -> str | None:
    return None if set(models) <= {inputs.root} else "it is another kind of model"


def _misfit(group: Rows, inputs: InputSpec) -> str | None:
    known, recorded = {i.name: i for i in inputs.inputs}, _shapes(group)
    missing = [i.name for i in inputs.inputs if not i.optional and i.name not in recorded]
    extra = [name for name in recorded if name not in known and name not in inputs.unread]
    if missing or extra:
        named = [(missing, "not recorded"), (extra, "not taken by the model")]
        return "; ".join(f"{', '.join(names)} {what}" for names, what in named if names)
    sizes = dict(inputs.sizes)
    taken = [(known[name], shape) for name, shape in recorded.items() if name in known]
    for i, shape in taken:
        sizes.update((dim, n) for dim, n in zip(i.dims, shape, strict=False) if isinstance(dim, str))
    for i, shape in taken:
        if len(shape) != len(i.dims) or not _serves(i, shape, i.shape(sizes)):
            return f"{i.name} is {list(shape[1:])} and should be {_dims(i)}"
    if not group.columns["sample"].values.is_floating_point():
        return f"sample is {group.columns['sample'].values.dtype} and should be a floating-point tensor"
    if sizes["H"] % inputs.multiple_of or sizes["W"] % inputs.multiple_of:
        return f"sample is {sizes['H']} x {sizes['W']}, not a multiple of {inputs.multiple_of}"
    return next((wrong for i in inputs.inputs if (wrong := _wrong_labels(group, i))), None)


def _serves(i: Input, got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether sizes fit; those of residuals may broadcast, and are not known before there is a graph."""
    return got == want or (i.optional and all(1 in (a, b) or a == b for a, b in zip(got, want, strict=True)))


def _wrong_labels(group: Rows, i: Input) -> str | None:
    if i.kind != "label" or i.name not in group.columns:
        return None
    labels = group.columns[i.name].values
    lowest, highest = int(labels.min()), int(labels.max())
    legal = 0 <= lowest <= highest < i.high
    return None if legal else f"{i.name} go from {lowest} to {highest} and should be 0 to {i.high - 1}"


def _refuse_not_finite(groups: Sequence[Rows]) -> None:
    before = 0
    for group in groups:
        for name, column in group.columns.items():
            bad = ~torch.isfinite(column.values).reshape(len(column.values), -1).all(1)
            if bad.any():
                row = int(bad[column.index].nonzero()[0])
                where = f"trajectory {int(group.trajectory[row])}, step {int(group.step[row])}"
                raise CalibrationError(
                    f"{name} of row {before + row} is not finite ({where}): "
                    "the sampler or the model overflowed while it was recorded"
                )
        before += len(group)


def _shapes(group: Rows) -> dict[str, tuple[int, ...]]:
    columns = {name: (len(group), *column.values.shape[1:]) for name, column in group.columns.items()}
    return columns | dict.fromkeys(group.scalars, ())


def _wanted(inputs: InputSpec) -> str:
    return "  ".join(f"{i.name} {_dims(i)}" for i in inputs.inputs if not i.optional)


def _dims(i: Input) -> str:
    return f"[{', '.join(map(str, i.dims[1:]))}]"
