"""A compiled ControlNet: diffusers' pipelines ask whether it is a ControlNetModel, so it is one."""

from __future__ import annotations

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # a pipeline that is loaded looks for it here

from dmqfx.runtime.fixed import refuse_inherited
from dmqfx.runtime.unet import CompiledUNet

__all__ = ["CompiledControlNet"]


class CompiledControlNet(CompiledUNet, ControlNetModel):  # type: ignore[misc]  # diffusers is Any to the type checker
    """A CompiledUNet in the place of a ControlNetModel; what would change its layers is refused."""


refuse_inherited(CompiledControlNet)
