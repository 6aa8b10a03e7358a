"""Recording: what a UNet is called with while anything at all runs it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dmqfx.calibration.calibration import Calibration, Json, Origin
from dmqfx.calibration.rows import Key, RowsWriter
from dmqfx.errors import CalibrationError
from dmqfx.frontend.call import arguments, bind
from dmqfx.frontend.signature import SUPPORTED, UNet, is_supported, signature

__all__ = ["Tape", "origin", "plain", "recording", "refuse_others"]


@contextmanager
def recording(unet: UNet) -> Iterator[Tape]:
    """Record every call of a UNet inside the block; the hook is gone afterwards, also after an error.

    Calls of the module are seen (`unet(...)`, as pipelines do), calls of its bare `forward` are not. A call
    that raises is not recorded. Only the inputs are kept, on the CPU.

    Example:
        >>> from dmqfx import emoji
        >>> unet = emoji.load_unet()
        >>> with recording(unet) as tape:
        ...     latents = emoji.sample(unet, emoji.calibration_prompts(1), steps=2)
        >>> len(tape.calibration())  # two halves of a guided batch, two steps
        4
    """
    tape = Tape(unet)
    before = unet.register_forward_pre_hook(tape._called, with_kwargs=True)
    after = unet.register_forward_hook(tape._returned)
    try:
        yield tape
    finally:
        before.remove()
        after.remove()


class Tape:
    """The calls of one UNet so far.

    A new set of trajectories begins where the batch size changes or time runs backwards; once `start` was
    called, only where it says so or the batch size changes.
    """

    def __init__(self, unet: UNet) -> None:
        refuse_others(unet)
        self._unet = unet
        self._spec = signature(unet)
        self._root = self._spec.root
        self._writers: dict[Key, RowsWriter] = {}
        self._pending: dict[str, Tensor] = {}
        self._last: Tensor | None = None
        self._told = False
        self._numbers = range(0)
        self._step = 0
        self.calls = 0

    def start(self) -> None:
        """Say that the next call begins new trajectories: two runs of one step look like one run of two."""
        self._last, self._told = None, True

    def calibration(
        self,
        how: Literal["pipeline", "sampler", "synthetic", "tape"] = "tape",
        *,
        scheduler: object = None,
        settings: Mapping[str, object] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Calibration:
        """What was recorded.

        Raises: CalibrationError if nothing was.
        """
        if not self.calls:
            raise CalibrationError(
                f"nothing was recorded: the {self._root} was never called\n"
                "  mend: record the module that the sampler calls, as unet(...) and not as unet.forward(...)"
            )
        rows = tuple(writer.rows() for writer in self._writers.values())
        return Calibration(rows, (origin(self._unet, how, scheduler, settings or {}, notes),))

    def _called(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        residuals = "mid_block_additional_residual" in arguments(self._root, args, kwargs)
        self._spec = signature(self._unet, residuals=residuals)
        named = bind(self._spec, args, kwargs)
        self._pending = {name: value.detach().to("cpu", copy=True) for name, value in named.items()}

    def _returned(self, *_: object) -> None:
        rows = len(self._pending["sample"])
        columns, scalars = dict[str, Tensor](), dict[str, float]()
        for i in self._spec.inputs:
            value = self._pending[i.name]
            if i.dims:
                columns[i.name] = value.expand(rows, *value.shape[1:])
            else:
                scalars[i.name] = float(value)
        self._place(columns["timestep"])
        key: Key = tuple((n, tuple(v.shape[1:]), v.dtype) for n, v in columns.items()), tuple(scalars.items())
        self._writers.setdefault(key, RowsWriter(scalars)).add(columns, self._numbers, self._step)
        self.calls += 1

    def _place(self, timestep: Tensor) -> None:
        """Find out which trajectories, and which step of them, a call is."""
        last, self._last = self._last, timestep
        if begins := last is None or len(last) != len(timestep) or self._runs_backwards(last, timestep):
            self._numbers = range(self._numbers.stop, self._numbers.stop + len(timestep))
        self._step = 0 if begins else self._step + 1

    def _runs_backwards(self, last: Tensor, timestep: Tensor) -> bool:
        return not self._told and bool((timestep > last).any())


def refuse_others(module: object) -> None:
    """Raise for what is no float UNet, whose calls nobody can compile."""
    if not is_supported(module):
        names = ", ".join(supported.__name__ for supported in SUPPORTED)
        raise CalibrationError(f"{type(module).__name__} cannot be recorded; {names} of diffusers can")


def origin(
    unet: UNet,
    how: Literal["pipeline", "sampler", "synthetic", "tape"],
    scheduler: object,
    settings: Mapping[str, object],
    notes: tuple[str, ...],
) -> Origin:
    """Where rows come from, in words that can be saved."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    return Origin(
        how,
        signature(unet).root,
        hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest(),
        weights_fingerprint(unet),
        "" if scheduler is None else type(scheduler).__name__,
        {k: plain(v) for k, v in getattr(scheduler, "config", {}).items() if not k.startswith("_")},
        {k: plain(v) for k, v in settings.items()},
        {
            **{name: version(name) for name in ("dmqfx", "torch", "diffusers")},
            "python": platform.python_version(),
        },
        notes,
    )


def plain(value: object) -> Json:
    """The nearest JSON value: small tensors and arrays as lists, other objects by their type's name."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.nbytes <= 8192:
        return plain(value.tolist())
    return type(value).__name__


def weights_fingerprint(unet: nn.Module) -> str:
    """A fingerprint of eight of the weights, the same for a half precision copy of them."""
    named = sorted(unet.state_dict().items())
    digest = hashlib.sha256()
    for name, tensor in named[:: max(len(named) // 8, 1)]:
        digest.update(name.encode())
        digest.update(tensor.detach().reshape(-1)[:4096].to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()
