"""Norm and activation of an image by the native kernels, where real numbers are wanted and no codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.runtime.kernels.native import Coding, library, readable
from dmqfx.runtime.kernels.recipes import ACTIVATIONS, NORMS

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    instruction_set: str | None = None,
) -> Tensor:
    """silu(group_norm(x)), to 1e-6 that of torch; by the kernel for float32 on the CPU that lies channels last.

    Every instruction set and number of threads gives the same bits.

    Shapes: x [B, C, H, W], the result too, channels last where x is; weight, bias [C] or None. All else is left to torch.
    Raises: as F.group_norm; DmqfxError for an instruction set that is not there, or no memory.
    """
    native, operands = library(), [each for each in (x, weight, bias) if each is not None]
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    fits = last and num_groups > 0 and x.shape[1] % num_groups == 0 and x.numel() > 0
    fits &= all(each.shape == x.shape[1:2] for each in operands[1:])
    if native is None or not fits or not all(map(readable, operands)):
        made = F.silu(F.group_norm(x, num_groups, weight, bias, eps))
        return made.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    batch, channels, height, width = x.shape
    gammas = x.new_ones(channels) if weight is None else weight.contiguous()
    betas = x.new_zeros(channels) if bias is None else bias.contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    found = Coding(
        batch=batch, channels=channels, split=channels, positions=height * width, norm=NORMS.index("group"),
        norm_groups=num_groups, eps=eps, activation=ACTIVATIONS.index("silu"), x=x.data_ptr(), gammas=gammas.data_ptr(),
        betas=betas.data_ptr(), real=out.data_ptr(),
    )  # fmt: skip
    native.code(found, instruction_set)
    return out
