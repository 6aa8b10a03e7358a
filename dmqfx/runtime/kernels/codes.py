"""Real numbers to codes by the native kernels: norm, activation and quantize in one go, channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.numbers import quant
from dmqfx.runtime.kernels.native import Coding, Library, library, readable, tell_plain
from dmqfx.runtime.kernels.recipes import ACTIVATIONS, NORMS, Recipe, check_groups, prepare

__all__ = ["ACTIVATIONS", "NORMS", "laid_out", "quantize"]


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor | None,
    axis: int,
    qmin: int,
    qmax: int,
    norm: str = "none",
    norm_groups: int = 1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    beside: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    instruction_set: str | None = None,
) -> Tensor:
    """quant.quantize of activation(norm(x)); four dimensions with channels on axis 1 come out channels last.

    Before the activation, what a group norm makes is multiplied by `norm_scale`, and `norm_shift` is added to it: some
    UNets take the timestep in so. With `beside` the codes are those of the concatenation of both on axis 1, which is made
    only where one of them is not laid out channels last. `geglu` is the first half of the last axis times gelu of the
    second, without a norm: half as many codes as numbers. Without norm and activation these are the codes of
    quant.quantize. With them a number at the middle of two codes may get the other. Every instruction set gives the same
    codes.

    Shapes: as quant.quantize; `axis` is 1 of [B, C, H, W] or the last; norm_weight, norm_bias [C] or None; beside
        [B, D, H, W]; norm_scale, norm_shift [B, C, 1, 1] of all channels. A group norm is of [B, C, H, W], a layer norm
        over the last axis. Other devices and dtypes are computed in plain torch.
    Raises: ValueError for another axis, norm or activation, groups that do not divide the channels, a timestep group
        that is not there, arms of other sizes, or a norm's scale or shift of another shape.
    """
    if beside is not None and not _side_by_side(x, beside, axis):
        x, beside = torch.cat([x, beside], 1), None
    native, more = library(), 0 if beside is None else beside.shape[1]
    width = more + (x.shape[axis] if -x.dim() <= axis < x.dim() else 0)
    with_norm = (norm, norm_groups, eps, activation)
    recipe = Recipe(scale, zero_point, norm_weight, norm_bias, x.dim(), axis, width, qmin, qmax, *with_norm)
    known = prepare(recipe)
    check_groups(group, scale.shape[0], x.shape[0])
    given = _given_modulation(norm, (x.shape[0], width, 1, 1), norm_scale, norm_shift)
    if native is None or known.native is None or not all(map(readable, (x, *given))):
        tell_plain("kernel_quantize", x, scale, norm_weight, norm_bias, *given)
        normed = _normed(x, beside, norm, norm_groups, norm_weight, norm_bias, eps, norm_scale, norm_shift)
        codes = quant.quantize(_activated(normed, activation), scale, zero_point, group, axis, qmin, qmax)
        return codes.contiguous(memory_format=_format(recipe.planes))
    out = laid_out(x, axis, qmin, activation, beside)
    coding = known.coding()
    read = _read(coding, recipe.planes, x, beside, group), _point_to(coding, norm_scale, norm_shift)
    if out.numel():
        _code(native, coding, out, instruction_set)
    del read
    return out


def _code(native: Library, coding: Coding, out: Tensor, instruction_set: str | None) -> None:
    coding.positions = out.numel() // (coding.batch * coding.channels)
    coding.codes = out.data_ptr()
    native.code(coding, instruction_set)


def _read(
    coding: Coding, planes: bool, x: Tensor, beside: Tensor | None, group: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a call has of its own; the tensors that come back have to outlive it."""
    if not (planes and _is_last(x)):
        coding.planes, x = planes, x.contiguous()
    coding.batch, coding.split, coding.x = x.shape[0], coding.channels, x.data_ptr()
    if beside is not None:
        coding.split, coding.beside = x.shape[1], beside.data_ptr()
    if group is not None:
        group = group.long().contiguous()
        coding.group = group.data_ptr()
    elif coding.norm != NORMS.index("group") and not coding.planes:
        coding.batch = 1  # all rows are alike
    return x, beside, group


def _side_by_side(x: Tensor, beside: Tensor, axis: int) -> bool:
    """Whether the kernel can read two arms as they are."""
    fits = x.dim() == beside.dim() == 4 and axis == 1
    if not fits or x.shape[0] != beside.shape[0] or x.shape[2:] != beside.shape[2:]:
        raise ValueError(f"{list(x.shape)} and {list(beside.shape)} do not lie beside each other on axis 1")
    return _is_last(x) and _is_last(beside) and readable(x) and readable(beside)


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def laid_out(
    x: Tensor, axis: int, qmin: int, activation: str = "none", beside: Tensor | None = None
) -> Tensor:
    """Room for the codes of x, with those of `beside` on axis 1."""
    dtype = torch.int8 if qmin < 0 else torch.uint8
    planes = x.dim() == 4 and axis == 1
    if activation != "geglu" and (beside is None or not planes):
        return torch.empty_like(x, dtype=dtype, memory_format=_format(planes))
    shape: Sequence[int | torch.SymInt] = [*x.shape[:-1], x.shape[-1] // 2]
    if beside is not None:
        shape = [x.shape[0], x.shape[1] + beside.shape[1], *x.shape[2:]]
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(planes))


def _format(planes: bool) -> torch.memory_format:
    return torch.channels_last if planes else torch.contiguous_format


def _given_modulation(norm: str, shape: tuple[int, ...], *operands: Tensor | None) -> list[Tensor]:
    """Scale and shift of what a norm makes, those that there are."""
    given = [each for each in operands if each is not None]
    if given and norm != "group":
        raise ValueError(f"a scale and a shift behind norm {norm!r}: only a group norm has them")
    if wrong := [list(each.shape) for each in given if tuple(each.shape) != shape]:
        raise ValueError(f"a norm's scale and shift have shape {list(shape)}, not {wrong}")
    return given


def _point_to(coding: Coding, scale: Tensor | None, shift: Tensor | None) -> list[Tensor]:
    """Scale and shift of what a norm makes; the tensors that come back have to outlive it."""
    kept = []
    for name, each in (("multipliers", scale), ("addends", shift)):
        if each is not None:
            rows = each[:, :, 0, 0]
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            setattr(coding, name, rows.data_ptr())
            setattr(coding, f"of_{name}", rows.stride(0))
            kept.append(rows)
    return kept


def _normed(
    x: Tensor,
    beside: Tensor | None,
    norm: str,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    if beside is not None:
        x = torch.cat([x, beside], 1)
    if norm == "group":
        x = F.group_norm(x, groups, weight, bias, eps)
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "geglu":
        x, gate = x.chunk(2, -1)
        return x * F.gelu(gate)
    if activation == "gelu":
        return F.gelu(x)
    return F.silu(x) if activation == "silu" else x
