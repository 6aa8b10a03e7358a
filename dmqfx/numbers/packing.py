"""How integer codes lie in memory: two to a byte up to 4 bits, one to a byte from 5 to 8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check", "pack", "packed_length", "raw", "unpack"]


def packed_length(count: int, bits: int) -> int:
    """How many bytes hold `count` codes.

    Raises: ValueError if bits is not 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    return (count + 1) // 2 if bits <= 4 else count


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its elements, whatever its layout in memory.

    Shapes: returns uint8 [bytes], on the CPU.
    Example:
        >>> raw(torch.ones(1, dtype=torch.int16).expand(2)).tolist()
        [1, 0, 1, 0]
    """
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)  # one of a single element may have any strides
    return flat.copy_(tensor.detach().flatten()).view(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in row-major order, the even one in the low nibble; a last odd nibble is 0.

    Negative codes are stored in two's complement of 4 (or 8) bits: 2 and 3 bit codes take a nibble each, too.

    Shapes: codes int8 or uint8, any shape; returns uint8 [packed_length].
    Raises: ValueError if a code needs more bits than it says.
    """
    if codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"codes are int8 or uint8, not {codes.dtype}")
    length = packed_length(codes.numel(), bits)
    check(codes, bits)
    flat = codes.reshape(-1).view(torch.uint8)
    if bits > 4:
        return flat.clone()
    even, odd = flat[0::2], flat[1::2]
    packed = torch.empty(length, dtype=torch.uint8, device=codes.device)
    torch.bitwise_and(even, 15, out=packed)
    packed[: odd.numel()].bitwise_or_(odd << 4)
    return packed


def unpack(packed: Tensor, bits: int, signed: bool, shape: Sequence[int]) -> Tensor:
    """Inverse of pack: int8 if signed, else uint8.

    Example:
        >>> unpack(pack(torch.tensor([[-8, 7, -1]], dtype=torch.int8), 4), 4, True, (1, 3))
        tensor([[-8,  7, -1]], dtype=torch.int8)
    """
    dtype = torch.int8 if signed else torch.uint8
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.numel() != packed_length(count, bits):
        wanted = f"{packed_length(count, bits)} bytes for {list(shape)} codes of {bits} bits"
        raise ValueError(f"{wanted}, not {packed.dtype} {list(packed.shape)}")
    if bits > 4:
        return packed.view(dtype).reshape(tuple(shape)).clone()
    pairs = torch.empty(packed.numel(), 2, dtype=dtype, device=packed.device)
    # An arithmetic shift of int8 brings the sign along, a logical one of uint8 brings zeros.
    torch.bitwise_right_shift((packed << 4).view(dtype), 4, out=pairs[:, 0])
    torch.bitwise_right_shift(packed.view(dtype), 4, out=pairs[:, 1])
    return (
        pairs.reshape(-1)[:count].reshape(tuple(shape)).clone() if count % 2 else pairs.reshape(tuple(shape))
    )


def check(codes: Tensor, bits: int) -> None:
    """Raise ValueError if a code, int8 or uint8, needs more bits."""
    if codes.numel() == 0:
        return
    least, greatest = int(codes.amin()), int(codes.amax())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if codes.dtype == torch.int8 else (0, 2**bits - 1)
    if least < low or greatest > high:
        raise ValueError(f"codes from {least} to {greatest} do not fit {bits} bits ({low} to {high})")
