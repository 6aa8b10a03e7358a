"""Capture: a diffusers UNet becomes a Program by torch.export of a canonical wrapper."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from dmqfx.errors import CaptureError
from dmqfx.frontend import exported
from dmqfx.frontend.exclusions import is_foreign, refuse
from dmqfx.frontend.failure import explained, quiet
from dmqfx.frontend.signature import UNet, rounded_up, signature
from dmqfx.graph import modules
from dmqfx.graph.address import Address
from dmqfx.graph.inputs import Input, InputSpec
from dmqfx.graph.program import Program

__all__ = ["Canonical", "capture", "evaluating"]

_log = logging.getLogger(__name__)
_PREFIX = "unet."
_ADDED = ("text_embeds", "time_ids", "image_embeds", "hint")


def capture(unet: UNet, *, residuals: bool = False) -> Program:
    """The program of a UNet in evaluation mode, over its own weight tensors; the UNet is left as it was.

    With `residuals` the program also takes ControlNet's. Batch, latent size and context length are free.

    Raises: CaptureError for a module that is not a supported UNet or that holds what cannot be exported.
    Example:
        >>> levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=2, sample_size=8, **levels)
        >>> program = capture(unet)
        >>> program(sample=torch.zeros(3, 3, 10, 6), timestep=torch.tensor([0.0, 10.0, 20.0])).shape
        torch.Size([3, 3, 10, 6])
        >>> print(next(program.calls("conv2d")).meta["address"])
        conv_in/conv2d
    """
    refuse(unet)
    started = time.perf_counter()
    spec = signature(unet, residuals=residuals)
    with evaluating(unet), torch.no_grad():
        if isinstance(unet, UNet2DConditionModel):
            spec, found = _export_any_size(unet, spec)
        else:
            found = _export(unet, spec)
        graph, weights = _read(found, spec)
        if is_foreign(unet):
            _refuse_if_sizes_matter(graph, _read(_export(unet, spec, larger=7), spec)[0])
    result = _program(graph, weights, spec)
    _log.info(
        "captured %s  %d operations  %.1f s",
        spec.root,
        len(list(result.calls())),
        time.perf_counter() - started,
    )
    return result


def _read(found: ExportedProgram, spec: InputSpec) -> tuple[fx.Graph, dict[str, Tensor]]:
    return exported.read(found, tuple(i.name for i in spec.inputs), _PREFIX)


def _program(graph: fx.Graph, weights: Mapping[str, Tensor], spec: InputSpec) -> Program:
    taken = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    read = tuple(i for i in spec.inputs if i.name in taken)
    dropped = tuple(i.name for i in spec.inputs if i.name not in taken)
    spec = replace(spec, inputs=read, unread=spec.unread + dropped)
    results = next(iter(reversed(graph.nodes))).args[0]
    if isinstance(results, tuple):
        names = (*(f"down_residual_{k}" for k in range(len(results) - 1)), "mid_residual")
        spec = replace(spec, outputs=names)
    gm = modules.build(graph, weights)
    if any(i.optional for i in read):
        spec = _with_residuals(gm, spec)
    modules.propagate(gm, spec)
    return Program(gm, spec)


def _with_residuals(gm: fx.GraphModule, spec: InputSpec) -> InputSpec:
    """Residuals have the sizes of skips: the latent's, halved and rounded up, if need be only where halves are even.

    Raises: CaptureError if a skip is no power of two smaller than the latent.
    """
    any_size = (
        _seen(gm, spec, 1023, 1025) if spec.multiple_of == 1 else None
    )  # all halves differ if rounded down
    if any_size is not None:
        return replace(spec, inputs=any_size)
    even = _seen(gm, spec, 1024, 1536)
    if even is None:
        raise CaptureError(
            "a skip connection has not the latent's size over a power of two",
            mend="capture without residuals=True",
        )
    multiple = max(
        spec.multiple_of, 1024 // min(i.shape({"B": 1, "H": 1024, "W": 1024})[2] for i in even if i.optional)
    )
    return replace(spec, inputs=even, multiple_of=multiple, sizes=rounded_up(spec.sizes, multiple))


def _seen(gm: fx.GraphModule, spec: InputSpec, height: int, width: int) -> tuple[Input, ...] | None:
    """The inputs, with the sizes that residuals must have at this latent; None if one is no rounded up part of it."""
    modules.propagate(gm, replace(spec, sizes={**spec.sizes, "H": height, "W": width}))
    parts = {(-(-height // 2**k), -(-width // 2**k)): f"/{2**k}" * (k > 0) for k in range(10)}
    found = list[Input]()
    for i in spec.inputs:
        if i.optional:
            placeholder = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.target == i.name)
            _, channels, *sides = next(iter(placeholder.users)).meta["val"].shape
            if tuple(sides) not in parts:
                return None
            part = parts[tuple(sides)]
            i = replace(i, dims=("B", channels, f"H{part}", f"W{part}"))
        found.append(i)
    return tuple(found)


class Canonical(nn.Module):
    """A UNet that takes its inputs as a flat list of tensors and returns a flat list of tensors."""

    def __init__(self, unet: UNet, names: tuple[str, ...]) -> None:
        super().__init__()
        self.unet = unet
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        if self.unet.config.get("time_embedding_type") == "learned":
            given["timestep"] = given["timestep"].long()
        arguments: dict[str, object] = {
            k: given[k] for k in ("sample", "timestep", "class_labels") if k in given
        }
        if not isinstance(self.unet, UNet2DModel):
            arguments["encoder_hidden_states"] = given.get("encoder_hidden_states")
            arguments["added_cond_kwargs"] = {k: given[k] for k in _ADDED if k in given}
            optional = ("timestep_cond", "controlnet_cond", "conditioning_scale")
            arguments.update({k: given[k] for k in optional if k in given})
        if "mid_residual" in given:
            arguments["down_block_additional_residuals"] = tuple(
                given[k] for k in given if k.startswith("down_residual_")
            )
            arguments["mid_block_additional_residual"] = given["mid_residual"]
        first, *rest = self.unet(**arguments, return_dict=False)
        return (*first, *rest) if isinstance(first, (list, tuple)) else (first,)


def _export_any_size(unet: UNet2DConditionModel, spec: InputSpec) -> tuple[InputSpec, ExportedProgram]:
    """Odd sizes first: that branch of diffusers names every upsampled size, so its graph serves all sizes."""
    upsamplers = (u for block in unet.up_blocks for u in getattr(block, "upsamplers", None) or ())
    if all(isinstance(upsampler, Upsample2D) for upsampler in upsamplers):
        try:
            return spec, _export(unet, spec)
        except CaptureError as odd:
            _log.info("trying sizes that halve evenly, because %s", odd)
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    spec = replace(spec, multiple_of=multiple, sizes=rounded_up(spec.sizes, multiple))
    return spec, _export(unet, spec)


def _export(unet: UNet, spec: InputSpec, *, larger: int = 1) -> ExportedProgram:
    examples = _examples(unet, spec, larger)
    wrapper = Canonical(unet, tuple(i.name for i in spec.inputs)).eval()
    try:
        with quiet():
            return export(wrapper, examples, dynamic_shapes=(_dynamic(spec),), strict=False)
    except Exception as error:  # whatever export meets, the user gets one kind of error with a place
        raise explained(error, unet, wrapper, examples) from error


def _examples(unet: UNet, spec: InputSpec, larger: int) -> tuple[Tensor, ...]:
    """Tensors of sizes that are never 1 and all different, so that export ties them to nothing.

    Where any size is to be served, one side is odd at every level that rounds up, the other at every one that
    rounds down.
    """
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    height, width = (4 * step, 6 * step) if spec.multiple_of > 1 else (4 * step + 1, 10 * step - 1)
    sizes = {**spec.sizes, "B": 2 + larger, "T": 7 * larger, "H": height * larger, "W": width * larger}
    return tuple(torch.ones(i.shape(sizes), dtype=i.dtype, device=unet.device) for i in spec.inputs)


def _dynamic(spec: InputSpec) -> tuple[dict[int, object], ...]:
    """The free dims of every input; sides that must be multiples are written so, which makes their halves exact."""
    sides = {side: spec.multiple_of * Dim(side, min=2) for side in "HW"}

    def free(dim: str) -> object:
        side, _, factor = dim.partition("*")
        return sides[side] * int(factor or 1) if side in sides and spec.multiple_of > 1 else Dim.DYNAMIC

    return tuple({k: free(dim) for k, dim in enumerate(i.dims) if isinstance(dim, str)} for i in spec.inputs)


@contextmanager
def evaluating(unet: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it had."""
    modes = [(module, module.training) for module in unet.modules()]
    unet.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _refuse_if_sizes_matter(small: fx.Graph, large: fx.Graph) -> None:
    """Two captures of foreign code must be one graph: a branch on sizes would be decided once and for all."""
    one, other = (
        {_written(n): n for n in graph.nodes if n.op == "call_function"} for graph in (small, large)
    )
    differing = [
        node
        for node in (*other.values(), *one.values())
        if (_written(node) in one) != (_written(node) in other)
    ]
    if differing:
        at: Address = differing[0].meta["address"]
        raise CaptureError(
            "computes something else at larger sizes",
            address=at.path,
            operator=at.op,
            mend="make the module do the same at every batch, height, width and context length",
        )


def _written(node: fx.Node) -> str:
    """A call with its values named by where they come from."""
    return f"{modules.label(node)} {node.target} {fx.node.map_arg((node.args, node.kwargs), modules.label)}"
