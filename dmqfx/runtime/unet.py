"""CompiledUNet: a finished program as a module that goes where the diffusers UNet went."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, TypeAlias

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

import dmqfx.runtime.operators  # noqa: F401  # registers torch.ops.dmqfx, which graphs call
from dmqfx.errors import CallError, FixedGraphError, StoreError
from dmqfx.frontend.call import arguments, bind
from dmqfx.frontend.signature import SUPPORTED
from dmqfx.graph.facts import QDQ
from dmqfx.graph.modules import clone
from dmqfx.graph.pipeline import PassContext
from dmqfx.graph.program import Outputs, Program
from dmqfx.policy.policy import Policy
from dmqfx.runtime import targets
from dmqfx.runtime.fixed import refuse_inherited
from dmqfx.runtime.targets import Target
from dmqfx.seeing.report import Report
from dmqfx.storage.codec import Json

__all__ = ["CompiledUNet", "Result"]

logger = logging.getLogger(__name__)
KEEPS_PRECISION = (
    "a compiled UNet keeps its own precision: it now takes and gives %s, but computes as it was compiled"
)

Result: TypeAlias = (
    UNet2DOutput
    | UNet2DConditionOutput
    | ControlNetOutput
    | tuple[Tensor]
    | tuple[tuple[Tensor, ...], Tensor]
)


class CompiledUNet(ModelMixin):  # type: ignore[misc]  # diffusers is Any to the type checker
    """A compiled UNet, called like the diffusers model that it was compiled from.

    `program` is the portable program: `save_pretrained` stores it, and it stays where it was compiled.
    `runner` is that program lowered for `target`; it moves with `.to(device)`. `lowering` is the log of the passes
    that lowered it: what they refused, and why. `policy`, `report` and `provenance` say how it was made. A compiled
    ControlNetModel is a ControlNetModel: pipelines ask for one.

    Example:
        >>> import dmqfx, diffusers
        >>> levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=2, sample_size=8, **levels)
        >>> q = dmqfx.compile(unet, "w8a16", target="simulate", report_rows=0, progress=False)
        >>> q
        CompiledUNet(UNet2DModel, policy w8a16, target simulate)
        >>> q(torch.zeros(1, 3, 24, 16), 500).sample.shape
        torch.Size([1, 3, 24, 16])
    """

    def __new__(cls, program: Program | None = None, **_: object) -> CompiledUNet:
        if cls is CompiledUNet and program is not None and program.inputs.root == "ControlNetModel":
            from dmqfx.runtime.controlnet import CompiledControlNet

            cls = CompiledControlNet
        made: CompiledUNet = super().__new__(cls)
        return made

    def __init__(
        self,
        program: Program,
        *,
        config: Mapping[str, object],
        target: str | Target = "auto",
        policy: Policy | None = None,
        report: Report | None = None,
        provenance: Mapping[str, Json] | None = None,
    ) -> None:
        ModelMixin.__init__(self)
        self.program = program
        self.target = targets.resolve(target)
        self.policy = policy
        self.report = report
        self.provenance = dict(provenance or {})
        quantized = QDQ in program.facts  # float throughout, if not: there is nothing to lower
        lowered = targets.lower(program, self.target, PassContext(policy=policy)) if quantized else program
        self.lowering = lowered.log[len(program.log) :]
        self.runner = _runner(lowered)
        self._internal_dict = FrozenDict(config)  # the name under which pipelines replace it
        self._dtype = program.dtype
        nn.Module.eval(self)

    def forward(self, *args: object, **kwargs: object) -> Result:
        """One call, with the arguments of the diffusers class; the result has the dtype of the sample, in torch's layout.

        Raises: CallError for an argument that this program does not take.
        """
        if self.device.type == "meta":
            raise CallError("the weights are elsewhere: use enable_model_cpu_offload, not the sequential one")
        root = self.program.inputs.root
        inputs = bind(self.program.inputs, args, kwargs)
        given = arguments(root, args, kwargs)
        sample = given["sample"]
        outputs: Outputs = self.runner(**inputs)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        dtype = sample.dtype if isinstance(sample, Tensor) else self.dtype
        made = tuple(t.to(dtype).contiguous() for t in tensors)
        return _result(root, made, as_tuple=given.get("return_dict") is False)

    @property
    def config(self) -> FrozenDict:
        """The configuration of the diffusers model."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """What callers exchange with this module; it follows `.to(dtype)`, the arithmetic inside does not."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the lowered program is."""
        held = next(chain(self.runner.parameters(), self.runner.buffers()), None)
        return torch.device("cpu") if held is None else held.device

    @property
    def add_embedding(self) -> SimpleNamespace:
        """What SDXL pipelines ask of the embedding of sizes and pooled text: its number of input features."""
        if self.config.get("addition_embed_type") != "text_time":
            raise AttributeError("this model has no add_embedding")
        features = self.config["projection_class_embeddings_input_dim"]
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=features))

    @property
    def encoder_hid_proj(self) -> None:
        """Nothing that an IP-Adapter could be attached to."""
        return None

    @property
    def attn_processors(self) -> dict[str, object]:
        """None: attention is part of the graph."""
        return {}

    def retarget(self, target: str | Target) -> CompiledUNet:
        """The same program, lowered for another target."""
        twin = CompiledUNet(
            self.program, config=self.config, target=target, policy=self.policy, report=self.report,
            provenance=self.provenance,
        )  # fmt: skip
        twin._dtype = self._dtype
        return twin.to(self.device)

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write a directory that `dmqfx.load` reads; see docs/file-format.md.

        Raises: StoreError for a directory that holds anything else.
        """
        from dmqfx.storage import store

        store.save(self, save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        subfolder: str = "",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **_: object,
    ) -> CompiledUNet:
        """`dmqfx.load` of a directory, as pipelines call it; options that are not listed change nothing here.

        Raises: StoreError as `dmqfx.load`.
        """
        from dmqfx.storage import store

        loaded, asked = store.load(Path(pretrained_model_name_or_path) / subfolder), dtype or torch_dtype
        return loaded if asked is None else loaded.to(asked)

    def to(self, *args: object, **kwargs: object) -> CompiledUNet:
        """Move the lowered program; a dtype changes only what callers exchange with it, which is logged."""
        nn.Module.to(self, *args, **kwargs)  # type: ignore[call-overload]  # what Module.to takes
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledUNet:
        """Every move and cast of a module ends here: moves are made, casts are not."""
        before = self.device
        small, large = (fn(torch.empty(1, dtype=d, device=before)) for d in (torch.float16, torch.float64))
        if small.dtype == large.dtype:
            if small.dtype != self.program.dtype:
                logger.warning(KEEPS_PRECISION, small.dtype)
            self._dtype = small.dtype
            super()._apply(lambda tensor: tensor.to(small.device), recurse)
        else:
            super()._apply(fn, recurse)
        if self.device != before:
            _redirect(self.runner, self.device)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> CompiledUNet:
        own = {name: copy.deepcopy(tensor, memo) for name, tensor in self.program.weights().items()}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.program)] = replace(self.program, gm=clone(self.program.gm, own))
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin

    def __copy__(self) -> CompiledUNet:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise StoreError(
            "a compiled UNet is not pickled\n  mend: save_pretrained(directory), and dmqfx.load(directory)"
        )

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            root = self.__dict__["program"].inputs.root if "program" in self.__dict__ else ""
            replaced = next((cls for cls in SUPPORTED if cls.__name__ == root), None)
            if hasattr(replaced, name):
                raise FixedGraphError(name, root) from error
            raise

    def __repr__(self) -> str:
        policy = "" if self.policy is None else f", policy {self.policy.name}"
        return f"{type(self).__name__}({self.program.inputs.root}{policy}, target {self.target.name})"


refuse_inherited(CompiledUNet)


def _result(root: str, tensors: tuple[Tensor, ...], *, as_tuple: bool) -> Result:
    if root == "ControlNetModel":
        *down, mid = tensors
        return (tuple(down), mid) if as_tuple else ControlNetOutput(tuple(down), mid)
    if as_tuple:
        return (tensors[0],)
    return UNet2DOutput(tensors[0]) if root == "UNet2DModel" else UNet2DConditionOutput(tensors[0])


def _runner(program: Program) -> fx.GraphModule:
    """The graph over parameters of its own that share memory with the program, which stays when they move."""
    gm = clone(program.gm, {name: _held(tensor) for name, tensor in program.weights().items()})
    _LazyGraphModule.force_recompile(gm)  # it will be called, by several threads perhaps
    return gm


def _held(tensor: Tensor) -> Tensor:
    return (
        nn.Parameter(tensor.detach(), requires_grad=False) if tensor.is_floating_point() else tensor.detach()
    )


def _redirect(gm: fx.GraphModule, device: torch.device) -> None:
    """Devices named inside the graph (arange, zeros) follow the weights."""
    for node in gm.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda a: device if isinstance(a, torch.device) else a)
        node.kwargs = fx.node.map_aggregate(
            node.kwargs, lambda a: device if isinstance(a, torch.device) else a
        )
    gm.recompile()
    _LazyGraphModule.force_recompile(gm)
