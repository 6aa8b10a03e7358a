"""What diffusers models can be asked for and a compiled graph cannot: refused by name, never silently done to nothing."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from dmqfx.errors import FixedGraphError

__all__ = ["refuse_inherited"]

# Methods of diffusers' models that are as true of a graph.
_TRUE_OF_A_GRAPH = ("num_parameters", "get_memory_footprint", "enable_group_offload")


class _Refused:
    """An attribute that is not there (`hasattr`), and whose error says why."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, unet: object, owner: type) -> NoReturn:
        root = owner.__name__.removeprefix("Compiled")
        if self._name == "push_to_hub":
            raise FixedGraphError(self._name, root, "save_pretrained(directory), and upload the directory")
        raise FixedGraphError(self._name, root)


def refuse_inherited(cls: type) -> None:
    """Refuse the methods that a class has from diffusers and neither says itself nor can keep."""
    ours = {name for base in cls.__mro__ if base.__module__.startswith("dmqfx.") for name in vars(base)}
    kept = {*dir(nn.Module), *ours, *_TRUE_OF_A_GRAPH}
    for name in set(dir(cls)) - kept:
        if not name.startswith("_") and callable(getattr(cls, name)):
            setattr(cls, name, _Refused(name))
