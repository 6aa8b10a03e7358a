"""The operators of quantized graphs, `torch.ops.dmqfx.*`: opaque to torch.export and torch.compile.

Each has one plain kernel for every device, registered without `torch.library.custom_op`, whose calls cost
more; a device with something faster registers its own kernel beside it. Those of attention are made of torch's
operators, and so have shapes and derivatives by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dmqfx.numbers import packing, quant
from dmqfx.runtime import fakes, integer
from dmqfx.runtime.attention import attention_average, attention_softmax, qattention
from dmqfx.runtime.kernels import layers
from dmqfx.runtime.kernels.attend import attend, average
from dmqfx.runtime.kernels.coded import Coded
from dmqfx.runtime.kernels.codes import quantize as kernel_quantize
from dmqfx.runtime.kernels.norms import group_norm_silu

_GRID = "Tensor scale, Tensor zero_point"
_INPUT = "Tensor x_codes, Tensor x_scale, Tensor x_zero_point, Tensor? group"
_WEIGHT = (
    "Tensor packed_weight, int bits, bool signed, SymInt[] weight_shape, Tensor w_scale, Tensor w_zero_point"
)
_CONV = "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1"
_SHIFT = "Tensor? shift=None"
_ADDED = "Tensor? added=None"
_CODED = "Tensor? out_scale=None, Tensor? out_zero_point=None, int out_qmin=0, int out_qmax=255, str activation='none'"
_UPSAMPLE = "SymInt[]? upsample_size=None, float[]? upsample_factors=None, bool channels_last=False"
_KERNEL_WEIGHT = "Tensor packed_weight, int bits, SymInt[] weight_shape, Tensor w_scale, Tensor? bias=None"

_ATTENTION = "Tensor query, Tensor key, Tensor value, float? scale=None, int bits=8"
_NORM = "str norm='none', int norm_groups=1, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0"


def timestep_group(timestep: Tensor, boundaries: Tensor) -> Tensor:
    """The timestep group of every sample: how many boundaries are at or below its timestep.

    A boundary belongs to the group that it opens: the DDIM steps 0, 50, ..., 950 fall into 20 groups of 1000.

    Shapes: timestep [B]; boundaries [G - 1], ascending; returns int64 [B].
    """
    common = torch.promote_types(timestep.dtype, boundaries.dtype)
    return torch.bucketize(timestep.to(common), boundaries.to(common), right=True)


def qconv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    signed: bool,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    shift: Tensor | None = None,
) -> Tensor:
    """Convolution of codes with packed codes; see runtime.integer.conv2d."""
    w_codes = packing.unpack(packed_weight, bits, signed, weight_shape)
    return integer.conv2d(
        x_codes,
        x_scale,
        x_zero_point,
        group,
        w_codes,
        w_scale,
        w_zero_point,
        bias,
        stride,
        padding,
        dilation,
        groups,
        shift,
    )


def qlinear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    signed: bool,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Linear layer of codes with packed codes; see runtime.integer.linear."""
    w_codes = packing.unpack(packed_weight, bits, signed, weight_shape)
    return integer.linear(x_codes, x_scale, x_zero_point, group, w_codes, w_scale, w_zero_point, bias, shift)


def kernel_conv2d(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    upsample_size: Sequence[int] | None = None,
    upsample_factors: Sequence[float] | None = None,
    channels_last: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_qmin: int = 0,
    out_qmax: int = 255,
    activation: str = "none",
) -> Tensor:
    """qconv2d by a native kernel, + added; it reads centered codes in a form of its own, `bits` is what they came from.

    A size or factors upsample the codes first, as aten.upsample_nearest2d. With a scale for it, the result is codes.
    """
    head = (x_codes, x_scale, x_zero_point, group, packed_weight, weight_shape, w_scale, bias)
    tail = (stride, padding, dilation, groups)
    coded = _coded(out_scale, out_zero_point, out_qmin, out_qmax, activation)
    more = (added, upsample_size, upsample_factors, coded)
    made = layers.conv2d(*head, *tail, None, shift, *more)
    return made if channels_last else made.contiguous()


def kernel_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    group: Tensor | None,
    packed_weight: Tensor,
    bits: int,
    weight_shape: Sequence[int],
    w_scale: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_qmin: int = 0,
    out_qmax: int = 255,
    activation: str = "none",
) -> Tensor:
    """qlinear by a native kernel, as kernel_conv2d."""
    coded = _coded(out_scale, out_zero_point, out_qmin, out_qmax, activation)
    head = (x_codes, x_scale, x_zero_point, group, packed_weight, weight_shape, w_scale, bias)
    return layers.linear(*head, None, shift, added, coded)


def _coded(
    scale: Tensor | None, zero_point: Tensor | None, qmin: int, qmax: int, activation: str
) -> Coded | None:
    if scale is None or zero_point is None:
        return None
    return Coded(scale, zero_point, qmin, qmax, activation)


def hoisted(x: Tensor, by: Sequence[Tensor]) -> Tensor:
    """x, a value that is computed from `by` and constants alone; see runtime.hoisted, which keeps it between calls."""
    return x.view_as(x)


Kernel = Callable[..., Tensor]

_OPERATORS: Mapping[str, tuple[str, Kernel, Kernel]] = {
    "timestep_group": ("Tensor timestep, Tensor boundaries", timestep_group, fakes.timestep_group),
    "quantize": (
        f"Tensor x, {_GRID}, Tensor? group, int axis, int qmin, int qmax",
        quant.quantize,
        fakes.quantize,
    ),
    "dequantize": (
        f"Tensor codes, {_GRID}, Tensor? group=None, int axis=0, {_SHIFT}",
        quant.dequantize,
        fakes.dequantize,
    ),
    "unpack": ("Tensor packed, int bits, bool signed, SymInt[] shape", packing.unpack, fakes.unpack),
    "qconv2d": (f"{_INPUT}, {_WEIGHT}, Tensor? bias=None, {_CONV}, {_SHIFT}", qconv2d, fakes.qconv2d),
    "qlinear": (f"{_INPUT}, {_WEIGHT}, Tensor? bias=None, {_SHIFT}", qlinear, fakes.qlinear),
    "kernel_conv2d": (
        f"{_INPUT}, {_KERNEL_WEIGHT}, {_CONV}, {_SHIFT}, {_ADDED}, {_UPSAMPLE}, {_CODED}",
        kernel_conv2d,
        fakes.kernel_conv2d,
    ),
    "kernel_linear": (
        f"{_INPUT}, {_KERNEL_WEIGHT}, {_SHIFT}, {_ADDED}, {_CODED}",
        kernel_linear,
        fakes.kernel_linear,
    ),
    "kernel_quantize": (
        f"Tensor x, {_GRID}, Tensor? group, int axis, int qmin, int qmax, {_NORM}, str activation='none', "
        "Tensor? beside=None, Tensor? norm_scale=None, Tensor? norm_shift=None",
        kernel_quantize,
        fakes.kernel_quantize,
    ),
    "kernel_group_norm_silu": (
        "Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05",
        group_norm_silu,
        fakes.group_norm_silu,
    ),
    "qattention": (_ATTENTION, qattention, fakes.attention),
    "kernel_attention": (_ATTENTION, attend, fakes.attention),
    "kernel_sdpa": ("Tensor query, Tensor key, Tensor value, float? scale=None", average, fakes.attention),
}

for _name, (_arguments, _kernel, _fake) in _OPERATORS.items():
    torch.library.define(f"dmqfx::{_name}", f"({_arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"dmqfx::{_name}", "default", _kernel)
    torch.library.register_fake(f"dmqfx::{_name}", _fake)

_COMPOSED: Mapping[str, tuple[str, Callable[..., Tensor]]] = {
    "attention_softmax": (
        "Tensor query, Tensor key, Tensor? attn_mask=None, float? scale=None",
        attention_softmax,
    ),
    "attention_average": ("Tensor softmax, Tensor value", attention_average),
}

for _name, (_arguments, _composed) in _COMPOSED.items():
    torch.library.define(f"dmqfx::{_name}", f"({_arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"dmqfx::{_name}", "CompositeImplicitAutograd", _composed)

# A composite of operators that autograd and tracing know, for where nothing is kept.
torch.library.define("dmqfx::hoisted", "(Tensor(a) x, Tensor[] by) -> Tensor(a)")
torch.library.impl("dmqfx::hoisted", "CompositeImplicitAutograd", hoisted)

OPS = torch.ops.dmqfx
"""Where graphs and passes find the operators; whoever imports it has registered them."""
