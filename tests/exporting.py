"""Models that are made alike share one export: torch.export takes seconds, and gives them all the same graph."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, SimpleNamespace
from unittest.mock import patch

import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN = (str, int, float, type(None), torch.dtype, torch.device)
PROCESSORS = (AttnProcessor2_0, AttnAddedKVProcessor2_0)
HELD = {"_parameters", "_buffers", "_modules"}

Key = tuple[Hashable, ...]
_found: dict[Key, SimpleNamespace] = {}


class UnknownError(Exception):
    """There is something of which it is not known whether an export looks at it."""


@contextmanager
def shared() -> Iterator[None]:
    """Inside, capture exports once what is made alike."""
    with patch("dmqfx.frontend.capture.export", _shared):
        yield


@contextmanager
def afresh() -> Iterator[None]:
    """Inside, capture exports each model itself, and others may share what it finds."""
    with patch("dmqfx.frontend.capture.export", _afresh):
        yield


def _shared(wrapper: nn.Module, examples: tuple[Tensor, ...], **how: object) -> object:
    try:
        kept = _found[_key(wrapper, examples, how)]
    except (UnknownError, KeyError):
        return _afresh(wrapper, examples, **how)
    weights = dict(wrapper.named_parameters(remove_duplicate=False))
    buffers = dict(wrapper.named_buffers(remove_duplicate=False))
    return SimpleNamespace(**vars(_kept(kept)), state_dict={**weights, **buffers})


def _afresh(wrapper: nn.Module, examples: tuple[Tensor, ...], **how: object) -> ExportedProgram:
    made = export(wrapper, examples, **how)
    with suppress(UnknownError):
        key = _key(wrapper, examples, how)
        if not made.constants.keys() & dict(wrapper.named_buffers(remove_duplicate=False)).keys():
            _found[key] = _kept(made)
    return made


def _kept(made: ExportedProgram | SimpleNamespace) -> SimpleNamespace:
    """What is read of an export, and no weight; its graph is changed by who reads it."""
    return SimpleNamespace(
        graph=copy.deepcopy(made.graph), graph_signature=made.graph_signature, constants=dict(made.constants)
    )


def _key(wrapper: nn.Module, examples: tuple[Tensor, ...], how: Mapping[str, object]) -> Key:
    """All that an export sees of a model, but for the values of its weights.

    Raises: UnknownError
    """
    if _get_current_function_mode() or _get_current_dispatch_mode():
        raise UnknownError
    tensors = [
        *wrapper.named_parameters(remove_duplicate=False),
        *wrapper.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    ties = tuple(first.setdefault(id(tensor), name) for name, tensor in tensors)
    modules = tuple((name, _module(module)) for name, module in wrapper.named_modules(remove_duplicate=False))
    seen = tuple((tuple(t.shape), t.dtype, t.device) for t in (*(tensor for _, tensor in tensors), *examples))
    around = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()
    return modules, ties, seen, around, str(how)


def _module(module: nn.Module) -> Hashable:
    state = {name: value for name, value in vars(module).items() if name not in HELD}
    return type(module), type(module).forward, _written(state)


def _written(value: object) -> Hashable:
    """A value as something to compare."""
    if isinstance(value, PLAIN) or (isinstance(value, FunctionType) and not value.__closure__):
        return type(value), value
    if isinstance(value, Mapping):  # names and versions are in a configuration's keys that begin so
        hidden = type(value).__name__ == "FrozenDict"
        pairs = ((k, _written(v)) for k, v in value.items() if not (hidden and k.startswith("_")))
        return type(value), tuple(pairs)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_written, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_written, value))
    if type(value) in PROCESSORS:
        return type(value), _written(vars(value))
    raise UnknownError(type(value).__name__)
