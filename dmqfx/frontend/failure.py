"""An export that failed, told in the words of the model: which module, which operator, and whose fault it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch._ops import OpOverload

from dmqfx.errors import CaptureError

__all__ = ["explained", "quiet"]

_CHATTER = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def quiet() -> Iterator[None]:
    """torch writes pages about an error that it also raises; inside, only the error is left."""
    before, _CHATTER.disabled = _CHATTER.disabled, True
    try:
        yield
    finally:
        _CHATTER.disabled = before


def explained(
    error: Exception, unet: nn.Module, wrapper: nn.Module, examples: Sequence[Tensor]
) -> CaptureError:
    """Why a wrapped UNet was not exported: it does not run at all, or torch.export met what it does not take."""
    address, operator = _place(error, unet)
    own = _error_of(wrapper, examples)
    if own is None:
        why = f"torch.export: {_gist(error)}"
        mend = "replace this module or its attention processor by one that torch.export accepts"
    else:
        why = f"diffusers cannot run this model either: {_gist(own)}"
        mend = "change its configuration until unet(sample, timestep, ...) runs"
        address = _place(own, unet)[0] or address
    return CaptureError(why, address=address, operator=operator, mend=mend)


def _error_of(wrapper: nn.Module, examples: Sequence[Tensor]) -> Exception | None:
    try:
        wrapper(*examples)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is told
        return error
    return None


def _place(error: BaseException, unet: nn.Module) -> tuple[str, str]:
    """The deepest module and operator that were running when an error was raised."""
    names = {id(module): name for name, module in unet.named_modules()}
    address, operator, seen = "", "", set[int]()
    causes: list[BaseException | None] = [error]
    while causes:
        cause = causes.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        causes += [cause.__context__, cause.__cause__]
        trace = cause.__traceback__
        while trace is not None:
            local = trace.tb_frame.f_locals
            address = names.get(id(local.get("self")), "") or address
            operator = str(local["func"]) if isinstance(local.get("func"), OpOverload) else operator
            trace = trace.tb_next
    return address, operator


def _gist(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
