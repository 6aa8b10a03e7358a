"""A device that is not the CPU, on any machine: what fails on a GPU because it is elsewhere fails on it, too.

It is torch's "PrivateUse1" backend, written in Python. A tensor of it is a plain `torch.Tensor` whose device is
`DEVICE`; its memory is the host's, and the CPU's kernels compute on that. All the rest is torch's own: autograd,
optimizers, functorch, fake tensors and torch.export take it for a device like any other, and operators of other
libraries run the kernel that they have for every device. It refuses what CUDA refuses: operands of two devices
(but CPU tensors without dimensions, and CPU indices into a tensor of its own), results written to another device,
`.numpy()`, a generator of the CPU.

What it cannot show: `data_ptr()` is an address that the host can read, so native code that forgets to ask for the
device works here; nothing is asynchronous or out of memory; sums come in the CPU's order; torch.cuda is not called.

Import it before the first backward pass of a process: torch counts then the devices that need a thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"  # any name would do that safetensors knows as a device's
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten

_HERE, _THERE = 1, 12  # DLPack's kDLCPU, and kDLExtDev, which torch takes for PrivateUse1
_BY_FORM = {"aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::set_", "aten::unfold"}

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _labelled(x: Tensor, kind: int) -> Tensor:
    """A tensor over the same memory that says it is on another kind of device."""
    capsule = torch._C._to_dlpack(x)
    place = _pointer(capsule, b"dltensor") + ctypes.sizeof(
        ctypes.c_void_p
    )  # of DLTensor.device, behind its data
    ctypes.c_int32.from_address(place).value = kind
    made: Tensor = torch._C._from_dlpack(capsule)
    if made.stride() == x.stride():
        return made
    return _by_form(
        aten.as_strided.default, made, x.shape, x.stride()
    )  # DLPack forgets strides of sides of 1


def _by_form(op: OpOverload, *args: object, **kwargs: object) -> Tensor:
    """An operation on sizes and strides alone: the CPU's kernel does it for any device."""
    found: Tensor = op._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
    return found


def _fallback(op: OpOverload, *args: object, **kwargs: object) -> object:
    """What runs for every operation that torch does not make of others."""
    if op._schema.name in _BY_FORM:
        return _by_form(op, *args, **kwargs)
    given = list(args)
    for position, (name, may_differ, is_tensor) in enumerate(_arguments(op)):
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, (Tensor, list, tuple)):
            _refuse_mixture(op, name, value, may_differ)
        elif is_tensor and isinstance(
            value, (int, float)
        ):  # torch shows tensors that it made of numbers as numbers
            given[position] = _tensor_of(value, args)
        elif isinstance(value, torch.Generator):
            raise RuntimeError(f"{op}: expected a generator of {NAME}, found one of {value.device}")
    return _on_the_cpu(op, *given, **kwargs)


def _tensor_of(number: float, beside: tuple[object, ...]) -> Tensor:
    double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in beside)
    return torch.tensor(number, dtype=torch.float64 if double and isinstance(number, float) else None)


@cache
def _arguments(op: OpOverload) -> list[tuple[str, float, bool]]:
    """Of each argument the name, the dimensions that a CPU tensor may have there, and whether it is a tensor."""

    def most(argument: torch.Argument) -> float:
        if argument.alias_info is not None and argument.alias_info.is_write:
            return -1
        return torch.inf if argument.name == "indices" else 0

    return [(a.name, most(a), isinstance(a.type, torch.TensorType)) for a in op._schema.arguments]


def _refuse_mixture(op: OpOverload, name: str, value: object, may_differ: float) -> None:
    for x in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(x, Tensor) and x.device != DEVICE and x.dim() > may_differ:
            raise RuntimeError(f"{op}: {name} is on {x.device}, not on {DEVICE} as others are")


def _on_the_cpu(compute: Callable[..., object], *args: object, **kwargs: object) -> object:
    """What `compute` makes of the same memory; its results are on the stand-in."""
    aliases = list[tuple[Tensor, Tensor]]()

    def alias(x: Tensor) -> Tensor:
        if x.device.type != NAME:
            return x
        found = _labelled(x, _HERE) if x.numel() else torch.empty_like(x, device="cpu")
        aliases.append((x, found))
        return found

    def original(x: Tensor) -> Tensor:
        ours = next((ours for ours, found in aliases if found is x), None)
        return _labelled(x, _THERE) if ours is None else ours

    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    result = compute(*_each(alias, args), **{name: _each(alias, value) for name, value in kwargs.items()})
    for x, found in aliases:
        if x.shape != found.shape:  # an empty one that results were written to
            _by_form(aten.set_.source_Tensor, x, _labelled(found, _THERE))
    return _each(original, result)


def _each(change: Callable[[Tensor], Tensor], value: object) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, x) for x in value])
    return value


def _copy(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    def copy(source: Tensor, destination: Tensor) -> None:
        destination.copy_(source)

    _on_the_cpu(copy, source, destination)
    return destination


def _empty(name: str) -> Callable[..., Tensor]:
    make = getattr(aten, name)
    return lambda *args, **kwargs: _labelled(make(*args, **kwargs | {"device": torch.device("cpu")}), _THERE)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> object:
    return _fallback(aten.convolution.default, x, weight, bias, *rest)


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: object) -> object:
    return _fallback(aten.convolution_backward.default, gradient, x, weight, weight.shape[:1], *rest)


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of memory; torch, for want of an allocator, would crash at it."""
    held = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return held.clone().untyped_storage()


_KERNELS: Mapping[str, Callable[..., object]] = {
    "_copy_from": _copy,
    "empty.memory_format": _empty("empty"),
    "empty_strided": _empty("empty_strided"),
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    "native_group_norm": partial(_fallback, aten.native_group_norm.default),  # what torch makes of others ...
    "native_layer_norm": partial(
        _fallback, aten.native_layer_norm.default
    ),  # ... takes not every layout, as CUDA does
}
_LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL", "PrivateUse1")
_LIBRARIES[0].fallback(_fallback, "PrivateUse1")
for _name, _kernel in _KERNELS.items():
    _LIBRARIES[1].impl(_name, _kernel)
torch.UntypedStorage.clone = _clone
