"""What capture refuses before it spends any time, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import nn

from dmqfx.errors import CaptureError
from dmqfx.frontend.signature import SUPPORTED, UNet, is_supported

__all__ = ["is_foreign", "refuse"]

_KERNEL = "is a kernel of its own, not operators that a pass can read"
_PROCESSORS = {
    **dict.fromkeys(("XFormers", "Sage", "Flash", "NPU", "XLA"), _KERNEL),
    "Sliced": "loops over the batch",
    "IPAdapter": "takes image tokens beside the context",
    "CustomDiffusion": "writes into a part of a tensor",
}


def refuse(unet: nn.Module) -> None:
    """Look for everything that is known not to become a graph.

    Raises: CaptureError for the first that is there.
    """
    if not is_supported(unet):
        raise CaptureError(f"{type(unet).__name__} is not a supported UNet", mend=_instead(unet))
    found = chain(_model(unet), _modules(unet), _processors(unet))
    error = next(found, None)
    if error is not None:
        raise error


def _instead(module: nn.Module) -> str:
    if hasattr(module, "program"):
        return "pass the float model that it was compiled from"
    if hasattr(module, "_orig_mod"):
        return "pass the module that torch.compile wrapped: unet._orig_mod"
    return f"supported are {', '.join(supported.__name__ for supported in SUPPORTED)} of diffusers"


def is_foreign(unet: UNet) -> bool:
    """Whether a module or attention processor is neither diffusers' nor torch's, and may branch on sizes."""
    objects = chain(unet.modules(), getattr(unet, "attn_processors", {}).values())
    return not all(type(o).__module__.partition(".")[0] in ("diffusers", "torch") for o in objects)


def _model(unet: UNet) -> Iterator[CaptureError]:
    if getattr(unet, "is_quantized", False):
        yield CaptureError("its weights are quantized already", mend="load the float model")
    if any(parameter.is_meta for parameter in unet.parameters()):
        yield CaptureError(
            "its weights are not loaded", mend="load them; a model on the meta device has none"
        )
    if unet.config.get("encoder_hid_dim_type") == "ip_image_proj":
        yield CaptureError("an IP-Adapter is loaded", mend="call pipe.unload_ip_adapter() first")


def _modules(unet: UNet) -> Iterator[CaptureError]:
    for name, module in unet.named_modules():
        if type(module).__module__.startswith("peft."):
            yield CaptureError(
                "a LoRA adapter is loaded beside the weights",
                address=name,
                operator=type(module).__name__,
                mend="call pipe.fuse_lora() and then pipe.unload_lora_weights() first",
            )
        if getattr(module, "_chunk_size", None) is not None:
            yield CaptureError(
                "its feed forward is cut into chunks", address=name, mend="disable forward chunking"
            )
        if all(getattr(module, scale, None) for scale in ("s1", "s2", "b1", "b2")):
            yield CaptureError("FreeU is enabled", address=name, mend="call pipe.disable_freeu() first")
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            yield CaptureError(
                "a hook moves, casts or caches what goes through it",
                address=name,
                mend="compile before offloading, or call pipe.remove_all_hooks() first",
            )


def _processors(unet: UNet) -> Iterator[CaptureError]:
    for name, processor in getattr(unet, "attn_processors", {}).items():
        kind = type(processor).__name__
        why = next((why for word, why in _PROCESSORS.items() if word in kind), None)
        if why is not None:
            yield CaptureError(
                f"{kind} {why}",
                address=name.removesuffix(".processor"),
                mend="call unet.set_attn_processor(AttnProcessor2_0()) first",
            )
