"""A diffusers call becomes named tensors: every way to say the same thing ends in one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

from dmqfx.errors import CallError
from dmqfx.frontend.signature import SUPPORTED
from dmqfx.graph.inputs import Input, InputSpec

__all__ = ["arguments", "bind"]

_NUMBERS = ("timestep", "label", "size")
_LEAVE_OUT = "call without it"
_MEND = {
    "attention_mask": "masks are not captured: call without it",
    "encoder_attention_mask": "masks are not captured: call without it, on a context without padding",
    "cross_attention_kwargs": "fuse a LoRA with pipe.fuse_lora() before compiling, and call without it",
    "down_intrablock_additional_residuals": "T2I-Adapters are not captured: call without it",
    "down_block_additional_residuals": "capture with residuals=True, or compile with data that has residuals",
    "mid_block_additional_residual": "capture with residuals=True, or compile with data that has residuals",
    "guess_mode": "guess mode is not captured: call with guess_mode=False",
    "class_labels": "this model has no class embedding: call without it",
    "image_embeds": "IP-Adapters are not captured: call pipe.unload_ip_adapter()",
}


def bind(inputs: InputSpec, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of a diffusers call of `inputs.root`, by placeholder name, in the dtypes of `inputs`.

    Timesteps come as numbers or tensors of no, one or B elements. Residuals, `timestep_cond` and
    `conditioning_scale` that are left out become what changes nothing.

    Raises: CallError for what the graph does not take, lacks, or has in another size.
    """
    given = arguments(inputs.root, args, kwargs)
    sample = given.get("sample")
    if not isinstance(sample, Tensor) or sample.ndim != 4:
        raise CallError(f"{inputs.root}: sample must be a tensor [batch, channels, height, width]")
    given = dict(_flat(inputs, given))
    known = {i.name for i in inputs.inputs}
    for name in given:
        if name not in known and name not in inputs.unread:
            _refuse(inputs, name)
    tensors = {i.name: _tensor(inputs, i, given.get(i.name), sample) for i in inputs.inputs}
    _check_sizes(inputs, tensors)
    return tensors


def arguments(root: str, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """What a call of a diffusers class says, by parameter name, without what is None.

    Raises: CallError for a keyword that the class does not have, or one given twice.
    """
    names = _parameters(root)
    if len(args) > len(names):
        raise CallError(f"{root} takes {len(names)} arguments, not {len(args)}")
    positional = dict(zip(names, args, strict=False))
    for name in kwargs:
        if name in positional:
            raise CallError(f"{root}: {name} is given twice, by position and by name")
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise CallError(f"{root} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return {name: value for name, value in {**positional, **kwargs}.items() if value is not None}


@cache
def _parameters(root: str) -> tuple[str, ...]:
    cls = next(supported for supported in SUPPORTED if supported.__name__ == root)
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _flat(inputs: InputSpec, given: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Dictionaries and lists taken apart; what says nothing left out."""
    names = {i.name for i in inputs.inputs}
    for name, value in given.items():
        match name, value:
            case ("return_dict", _) | ("guess_mode", False):
                pass
            case ("cross_attention_kwargs" | "added_cond_kwargs", dict()):
                if name == "cross_attention_kwargs" and any(v is not None for v in value.values()):
                    yield name, value
                elif name == "added_cond_kwargs":
                    yield from ((k, v) for k, v in value.items() if v is not None)
            case ("down_block_additional_residuals", list() | tuple()) if "mid_residual" in names:
                yield from _residuals(inputs, given, value)
            case ("mid_block_additional_residual", _) if "mid_residual" in names:
                if "down_block_additional_residuals" not in given:
                    _refuse_half(inputs, name, "down_block_additional_residuals")
                yield "mid_residual", value
            case _:
                yield name, value


def _residuals(
    inputs: InputSpec, given: Mapping[str, object], residuals: Sequence[object]
) -> Iterator[tuple[str, object]]:
    wanted = sum(i.name.startswith("down_residual_") for i in inputs.inputs)
    if "mid_block_additional_residual" not in given:
        _refuse_half(inputs, "down_block_additional_residuals", "mid_block_additional_residual")
    if len(residuals) != wanted:
        raise CallError(
            f"{inputs.root}: {len(residuals)} residuals, but the encoder has {wanted} skip connections"
        )
    yield from ((f"down_residual_{k}", residual) for k, residual in enumerate(residuals))


def _refuse_half(inputs: InputSpec, here: str, missing: str) -> NoReturn:
    """diffusers takes one of them alone for a T2I-Adapter's, or does not look at it."""
    raise CallError(
        f"{inputs.root}: {here} comes without {missing}\n"
        "  mend: pass both, as ControlNet gives them; T2I-Adapters are not captured"
    )


def _refuse(inputs: InputSpec, name: str) -> None:
    takes = ", ".join(i.name for i in inputs.inputs if not i.optional)
    near = [] if name in _MEND else get_close_matches(name, takes.split(", "), 1)
    mend = f"did you mean {near[0]!r}?" if near else _MEND.get(name, _LEAVE_OUT)
    raise CallError(
        f"{inputs.root}: the compiled graph does not take {name}; it takes {takes}\n  mend: {mend}"
    )


def _tensor(inputs: InputSpec, wanted: Input, value: object, sample: Tensor) -> Tensor:
    """One input in its dtype and, where it has one number per sample, in the sample's batch size."""
    batch = sample.shape[0]
    if value is None:
        return _neutral(inputs, wanted, sample)
    if wanted.name == "timestep" and inputs.root == "UNet2DModel" and isinstance(value, Real):
        value = int(float(value))  # as diffusers does in this class
    if isinstance(value, Real) and (wanted.kind in _NUMBERS or not wanted.dims):
        value = torch.tensor(value, device=sample.device)
    if not isinstance(value, Tensor):
        legal = "a number or a tensor" if wanted.kind in _NUMBERS or not wanted.dims else "a tensor"
        raise CallError(f"{inputs.root}: {wanted.name} must be {legal}, not {type(value).__name__}")
    if wanted.kind == "label" and value.is_floating_point():
        raise CallError(f"{inputs.root}: {wanted.name} are class numbers, but come as {value.dtype}")
    value = value.to(device=sample.device, dtype=wanted.dtype)
    if not wanted.dims:
        if value.numel() != 1:
            raise CallError(f"{inputs.root}: {wanted.name} is one number, not {list(value.shape)}")
        return value.reshape(())
    if wanted.dims == ("B",) and value.ndim < 2 and value.numel() == 1:
        return value.reshape(1).repeat(batch)
    return value


def _neutral(inputs: InputSpec, wanted: Input, sample: Tensor) -> Tensor:
    """What an input that is left out stands for."""
    if wanted.optional:
        return torch.zeros((1, 1, 1, 1), dtype=wanted.dtype, device=sample.device)
    if wanted.name == "timestep_cond":
        shape = wanted.shape({"B": sample.shape[0]})
        return torch.zeros(shape, dtype=wanted.dtype, device=sample.device)
    if wanted.name == "conditioning_scale":
        return torch.ones((), dtype=wanted.dtype, device=sample.device)
    added = wanted.name in ("text_embeds", "time_ids", "image_embeds", "hint")
    raise CallError(f"{inputs.root} needs {wanted.name}" + (" in added_cond_kwargs" if added else ""))


def _check_sizes(inputs: InputSpec, tensors: Mapping[str, Tensor]) -> None:
    batch, _, height, width = tensors["sample"].shape
    sizes = {"B": batch, "H": height, "W": width}
    for size, side in ((height, "height"), (width, "width")):
        if size % inputs.multiple_of:
            raise CallError(f"{inputs.root}: {side} {size} is not a multiple of {inputs.multiple_of}")
    for i in inputs.inputs:
        got = tuple(tensors[i.name].shape)
        for dim, size in zip(i.dims, got, strict=False):
            if isinstance(dim, str) and dim.isalpha():
                sizes.setdefault(dim, size)
        want = i.shape(sizes) if len(got) == len(i.dims) else None
        if want is None or not (got == want or (i.optional and _broadcasts(got, want))):
            dims = ", ".join(map(str, i.dims))
            means = f" = {list(want)}" if want else ""
            raise CallError(f"{inputs.root}: {i.name} has sizes {list(got)}, not [{dims}]{means}")


def _broadcasts(got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    return all(1 in (a, b) or a == b for a, b in zip(got, want, strict=True))
