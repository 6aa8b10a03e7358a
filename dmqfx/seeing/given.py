"""What may be looked at: a Program, or a compiled UNet, which is seen as its program."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from dmqfx.errors import NotAProgramError
from dmqfx.graph.program import Program

if TYPE_CHECKING:
    from dmqfx.runtime.unet import CompiledUNet

__all__ = ["Seen", "program_of"]

Seen: TypeAlias = "Program | CompiledUNet"


def program_of(given: Seen, view: str) -> Program:
    """The program that is meant; `view` is the function that was called.

    Raises: NotAProgramError that says what to pass instead.
    """
    if isinstance(given, Program):
        return given
    inside: object = getattr(given, "program", None)
    if isinstance(inside, Program):
        return inside
    raise NotAProgramError(view, given, _instead(given))


def _instead(given: object) -> str:
    if isinstance(given, (str, os.PathLike)):
        return "dmqfx.load(folder)"
    return "dmqfx.capture(unet)" + ("" if isinstance(given, nn.Module) else ", or what dmqfx.compile gave")
