"""A compiled ControlNet: diffusers' pipelines ask whether it is a ControlNetModel, so it is one."""

from __future__ import annotations

from typing import NoReturn

from diffusers.models.controlnets.controlnet import ControlNetModel

from dmqfx.errors import FixedGraphError
from dmqfx.runtime.unet import CompiledUNet

__all__ = ["CompiledControlNet"]


class CompiledControlNet(CompiledUNet, ControlNetModel):  # type: ignore[misc]  # diffusers is Any to the type checker
    """A CompiledUNet in the place of a ControlNetModel; what would change its layers is refused."""

    def set_attn_processor(self, processor: object) -> NoReturn:
        """Refused.

        Raises: FixedGraphError always.
        """
        raise FixedGraphError("set_attn_processor", "ControlNetModel")

    def set_default_attn_processor(self) -> NoReturn:
        """Refused.

        Raises: FixedGraphError always.
        """
        raise FixedGraphError("set_default_attn_processor", "ControlNetModel")

    def fuse_qkv_projections(self) -> NoReturn:
        """Refused.

        Raises: FixedGraphError always.
        """
        raise FixedGraphError("fuse_qkv_projections", "ControlNetModel")
