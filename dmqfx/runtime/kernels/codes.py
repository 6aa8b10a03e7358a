"""Real numbers to codes by the native kernels: norm, activation and quantize in one go, channels last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.numbers import quant
from dmqfx.runtime.kernels.native import Coding, Library, library

__all__ = ["ACTIVATIONS", "NORMS", "laid_out", "quantize"]

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
    instruction_set: str | None = None,
) -> Tensor:
    """quant.quantize of activation(norm(x)); four dimensions with channels on axis 1 come out channels last.

    `geglu` is the first half of the last axis times gelu of the second, without a norm: half as many codes as numbers.
    Without norm and activation these are the codes of quant.quantize. With them a number at the middle of two
    codes may get the other. Every instruction set gives the same codes.

    Shapes: as quant.quantize; `axis` is 1 of [B, C, H, W] or the last; norm_weight, norm_bias [C] or None. A group
    norm is of [B, C, H, W], a layer norm over the last axis. Other devices and dtypes are computed in plain torch.
    Raises: ValueError for another axis, norm or activation, or groups that do not divide the channels.
    """
    planes, channels = _layout(x, axis, norm, activation, norm_groups)
    rows = {each.shape[0] for each in (scale, zero_point)}
    if group is None and rows != {1}:
        raise ValueError(f"parameters of {max(rows)} timestep groups need a group index")
    native, real = library(), (x, scale, norm_weight, norm_bias)
    if native is None or not all(each is None or _readable(each) for each in real):
        real_codes = _plain(x, norm, norm_groups, norm_weight, norm_bias, eps, activation)
        codes = quant.quantize(real_codes, scale, zero_point, group, axis, qmin, qmax)
        return codes.contiguous(memory_format=_format(x, planes))
    if group is not None and len(group) and not 0 <= int(group.min()) <= int(group.max()) < min(rows):
        raise ValueError(f"a timestep group beyond the {min(rows)} that there are")
    turned = planes and norm == "none" and x.is_contiguous(memory_format=torch.channels_last)
    coding = Coding(
        batch=1 if group is None and not planes else len(x), channels=channels, planes=planes and not turned,
        norm=NORMS.index(norm), norm_groups=norm_groups, activation=ACTIVATIONS.index(activation), eps=eps,
        least=qmin, greatest=qmax,
        scale_channels=scale.shape[1], zero_point_channels=zero_point.shape[1],
    )  # fmt: skip
    read = {"x": x if turned else x.contiguous(), "scales": scale, "zero_points": zero_point.to(torch.int32)}
    read |= {} if group is None else {"group": group}
    if norm != "none":
        read |= _weights_of_norm(norm_weight, norm_bias, channels)
    return _coded(native, coding, read, laid_out(x, axis, qmin, activation), instruction_set)


def _weights_of_norm(weight: Tensor | None, bias: Tensor | None, channels: int) -> dict[str, Tensor]:
    """Both, where there are none too."""
    return {
        "gammas": torch.ones(channels) if weight is None else weight,
        "betas": torch.zeros(channels) if bias is None else bias,
    }


def _readable(tensor: Tensor) -> bool:
    return (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")


def _coded(
    native: Library, coding: Coding, read: Mapping[str, Tensor], out: Tensor, instruction_set: str | None
) -> Tensor:
    """`out`, with the codes in it."""
    if not out.numel():
        return out
    coding.positions = out.numel() // (coding.batch * coding.channels)
    grouped = coding.norm == NORMS.index("group")
    room = torch.empty(2 * len(out) * coding.norm_groups if grouped else 0)
    kept = {name: each if name == "x" else each.contiguous() for name, each in read.items()}
    for name, each in {**kept, "moments": room, "codes": out}.items():
        setattr(coding, name, each.data_ptr())
    native.code(coding, instruction_set)
    return out


def laid_out(x: Tensor, axis: int, qmin: int, activation: str = "none") -> Tensor:
    """Room for the codes of x."""
    dtype = torch.int8 if qmin < 0 else torch.uint8
    planes = x.dim() == 4 and axis == 1
    shape = [*x.shape[:-1], x.shape[-1] // 2] if activation == "geglu" else x.shape
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(x, planes))


def _format(x: Tensor, planes: bool) -> torch.memory_format:
    return torch.channels_last if planes else torch.contiguous_format


def _layout(x: Tensor, axis: int, norm: str, activation: str, groups: int) -> tuple[bool, int]:
    """Whether channels are planes, and how many there are."""
    planes = x.dim() == 4 and axis == 1
    if not planes and axis not in (-1, x.dim() - 1):
        raise ValueError(f"channels on axis {axis} of {list(x.shape)}: not 1 of four, nor the last")
    if norm not in NORMS or activation not in ACTIVATIONS:
        raise ValueError(f"norm {norm!r}, activation {activation!r}: there are {NORMS} and {ACTIVATIONS}")
    channels = x.shape[axis]
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
    norm: str,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
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
