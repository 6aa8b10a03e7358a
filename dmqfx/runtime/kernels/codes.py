"""Real numbers to codes by the native kernels: norm, activation and quantize in one go, channels last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.numbers import quant
from dmqfx.runtime.kernels.native import Coding, Library, library, readable

__all__ = ["ACTIVATIONS", "NORMS", "check_grid", "laid_out", "quantize"]

NORMS = ("none", "group", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "geglu")


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
    instruction_set: str | None = None,
) -> Tensor:
    """quant.quantize of activation(norm(x)); four dimensions with channels on axis 1 come out channels last.

    With `beside` it is that of the concatenation of both on axis 1, which is made only where one of them is not laid
    out channels last. `geglu` is the first half of the last axis times gelu of the second, without a norm: half as many
    codes as numbers. Without norm and activation these are the codes of quant.quantize. With them a number at the middle
    of two codes may get the other. Every instruction set gives the same codes.

    Shapes: as quant.quantize; `axis` is 1 of [B, C, H, W] or the last; norm_weight, norm_bias [C] or None; beside
    [B, D, H, W]. A group norm is of [B, C, H, W], a layer norm over the last axis. Other devices and dtypes are computed
    in plain torch.
    Raises: ValueError for another axis, norm or activation, groups that do not divide the channels, a timestep group
        that is not there, or arms of other sizes.
    """
    if beside is not None and not _side_by_side(x, beside, axis):
        x, beside = torch.cat([x, beside], 1), None
    more = 0 if beside is None else beside.shape[1]
    planes, channels = _layout(x, axis, norm, activation, norm_groups, more)
    check_grid(scale, zero_point, channels, None if group is None else group.shape[0], x.shape[0])
    native, real = library(), (x, scale, norm_weight, norm_bias)
    if native is None or not all(each is None or readable(each) for each in real):
        real_codes = _plain(x, beside, norm, norm_groups, norm_weight, norm_bias, eps, activation)
        codes = quant.quantize(real_codes, scale, zero_point, group, axis, qmin, qmax)
        return codes.contiguous(memory_format=_format(planes))
    turned = planes and _is_last(x)
    coding = Coding(
        batch=1 if group is None and norm != "group" and (turned or not planes) else x.shape[0],
        channels=channels, planes=planes and not turned, split=channels - more,
        norm=NORMS.index(norm), norm_groups=norm_groups, activation=ACTIVATIONS.index(activation), eps=eps,
        least=qmin, greatest=qmax,
        scale_channels=scale.shape[1], zero_point_channels=zero_point.shape[1], timestep_groups=scale.shape[0],
    )  # fmt: skip
    read = {"x": x if turned else x.contiguous(), "beside": beside, "scales": scale.contiguous()}
    read["zero_points"] = zero_point.to(torch.int32).contiguous()
    read["group"] = None if group is None else group.long().contiguous()
    read |= _of_norm(norm, channels, norm_weight, norm_bias)
    return _coded(native, coding, read, laid_out(x, axis, qmin, activation, more), instruction_set)


def _of_norm(
    norm: str, channels: int, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor]:
    """Weight and bias of a norm, where it has none too."""
    if norm == "none":
        return {}
    return {
        "gammas": torch.ones(channels, dtype=torch.float32, device="cpu")
        if weight is None
        else weight.expand(channels).contiguous(),
        "betas": torch.zeros(channels, dtype=torch.float32, device="cpu")
        if bias is None
        else bias.expand(channels).contiguous(),
    }


def check_grid(scale: Tensor, zero_point: Tensor, channels: int, groups: int | None, batch: int) -> None:
    """Whether scale and zero point [G, 1 or channels] fit, and the indices of so many samples, if there are any.

    Raises: ValueError that says what does not.
    """
    if any(each.shape[1] not in (1, channels) for each in (scale, zero_point)):
        raise ValueError(
            f"scale {list(scale.shape)}, zero point {list(zero_point.shape)} for {channels} channels"
        )
    if scale.shape[0] != zero_point.shape[0]:
        raise ValueError(f"{scale.shape[0]} rows of scales, {zero_point.shape[0]} of zero points")
    if groups is None and scale.shape[0] != 1:
        raise ValueError(f"parameters of {scale.shape[0]} timestep groups need a group index")
    if groups is not None and groups != batch:
        raise ValueError(f"{groups} timestep groups for {batch} samples")


def _side_by_side(x: Tensor, beside: Tensor, axis: int) -> bool:
    """Whether the kernel can read two arms as they are."""
    fits = x.dim() == beside.dim() == 4 and axis == 1
    if not fits or x.shape[0] != beside.shape[0] or x.shape[2:] != beside.shape[2:]:
        raise ValueError(f"{list(x.shape)} and {list(beside.shape)} do not lie beside each other on axis 1")
    return _is_last(x) and _is_last(beside) and readable(x) and readable(beside)


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _coded(
    native: Library,
    coding: Coding,
    read: Mapping[str, Tensor | None],
    out: Tensor,
    instruction_set: str | None,
) -> Tensor:
    """`out`, with the codes in it."""
    if not out.numel():
        return out
    coding.positions = out.numel() // (coding.batch * coding.channels)
    coding.codes = out.data_ptr()
    for name, each in read.items():
        if each is not None:
            setattr(coding, name, each.data_ptr())
    native.code(coding, instruction_set)
    return out


def laid_out(
    x: Tensor, axis: int, qmin: int, activation: str = "none", more: int | torch.SymInt = 0
) -> Tensor:
    """Room for the codes of x, with `more` channels on axis 1."""
    dtype = torch.int8 if qmin < 0 else torch.uint8
    planes = x.dim() == 4 and axis == 1
    shape: Sequence[int | torch.SymInt] = x.shape
    if activation == "geglu":
        shape = [*x.shape[:-1], x.shape[-1] // 2]
    elif planes:
        shape = [x.shape[0], x.shape[1] + more, *x.shape[2:]]
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(planes))


def _format(planes: bool) -> torch.memory_format:
    return torch.channels_last if planes else torch.contiguous_format


def _layout(x: Tensor, axis: int, norm: str, activation: str, groups: int, more: int) -> tuple[bool, int]:
    """Whether channels are planes, and how many there are."""
    planes = x.dim() == 4 and axis == 1
    if not planes and axis not in (-1, x.dim() - 1):
        raise ValueError(f"channels on axis {axis} of {list(x.shape)}: not 1 of four, nor the last")
    if norm not in NORMS or activation not in ACTIVATIONS:
        raise ValueError(f"norm {norm!r}, activation {activation!r}: there are {NORMS} and {ACTIVATIONS}")
    channels = x.shape[axis] + more
    if norm != "none" and planes != (norm == "group"):
        raise ValueError(f"a {norm} norm with channels on axis {axis} of {list(x.shape)}")
    if activation == "geglu" and (planes or norm != "none" or channels % 2):
        raise ValueError(
            f"geglu of {list(x.shape)} behind a {norm} norm: halves of an even last axis, no norm"
        )
    if norm == "group" and (groups < 1 or channels % groups):
        raise ValueError(f"{channels} channels do not fall into {groups} groups")
    return planes, channels // 2 if activation == "geglu" else channels


def _plain(
    x: Tensor,
    beside: Tensor | None,
    norm: str,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    if beside is not None:
        x = torch.cat([x, beside], 1)
    if norm == "group":
        x = F.group_norm(x, groups, weight, bias, eps)
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if activation == "geglu":
        x, gate = x.chunk(2, -1)
        return x * F.gelu(gate)
    if activation == "gelu":
        return F.gelu(x)
    return F.silu(x) if activation == "silu" else x
