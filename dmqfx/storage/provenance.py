"""Where a compiled model comes from: versions and a fingerprint. No date: the same model, the same file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from dmqfx.graph.program import Program
from dmqfx.numbers.packing import raw
from dmqfx.storage.codec import Json

__all__ = ["fingerprint", "provenance", "weights_digest"]

PACKAGES = ("dmqfx", "torch", "diffusers")


def provenance(program: Program) -> dict[str, Json]:
    """What a saved model says about the float program that it was compiled from."""
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "fingerprint": fingerprint(program.weights()),
    }


def weights_digest(model: nn.Module) -> str:
    """The SHA-256 of all weights of a float model, the same for a float16 copy of it."""
    return fingerprint({name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors, whatever their order and their layout in memory.

    Example:
        >>> a, b = torch.ones(2), torch.zeros(2)
        >>> fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a}) != fingerprint({"a": b, "b": a})
        True
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(raw(tensor).numpy())
    return found.hexdigest()
