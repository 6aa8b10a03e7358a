"""The form in which the kernels read weights: blocks of 16 output channels, four input channels side by side.

A blob is one uint8 tensor: a header, the sum of each output channel's codes, the bounds of each block's runs, and the
codes [groups, blocks, taps, channels / 4, 16, 4], output and input channels filled up with 0. Two codes share a byte
where all of them have 4 bits: of the 64 of a step, number k the low half and number k + 32 the high one.
Weights of few output channels may be folded: those of a layer of one tap, whose output channels are theirs under every tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from dmqfx.errors import DmqfxError, StoreError
from dmqfx.runtime import integer
from dmqfx.runtime.kernels.native import RUNS, Packing, absent, library

__all__ = ["LANE", "QUAD", "Weights", "pack", "unpack"]

LANE, QUAD = 16, 4
_STEP, _HEADER = LANE * QUAD, 16  # codes of a step; int32 numbers of the header
_ALIGNED = 64  # bytes of a cache line, at which codes begin in a blob
_MOST_HEADROOM = 7
_MAGIC, _VERSION = 0x4B514D44, 6
_FEW_OUT, _MOST_UNDER = 4, 64  # output channels that are folded, at most; those under all taps
_FEW_IN = 16  # input channels that are not folded, since arrange.cpp gathers them (its kFew)


@dataclass(frozen=True, eq=False)
class Weights:
    """A blob, opened: views of its parts.

    Shapes: codes uint8, 1-D, as the kernel reads them; sums int32 [groups * out_channels]; runs int32
    [groups * blocks, len(RUNS)].
    Units: pair is the greatest magnitude that two neighbouring codes can make of activation codes of 0 or 1,
    runs[:, k] that those of a block in every step of a run of RUNS[k] steps, which begins at a multiple of its length,
    can make of -1 to 1;
    headroom the bits by which every code can be shifted to the left and still has 8; out_channels and channels are
    those of one group, channels before they are filled up. Of folded weights codes, sums and runs are those of the layer
    of one tap, [taps * out_channels, channels].
    """

    codes: Tensor
    sums: Tensor
    nibbles: bool
    folded: bool
    groups: int
    out_channels: int
    channels: int
    taps: tuple[int, int]
    pair: int
    runs: Tensor
    headroom: int

    @classmethod
    def open(cls, blob: Tensor, shape: Sequence[int], groups: int) -> Weights:
        """The parts of a blob.

        Raises: StoreError where it is not one, or not for weights of this shape [O, C / groups, ...].
        """
        head = 4 * _HEADER
        whole = (
            blob.dtype == torch.uint8 and blob.dim() == 1 and blob.numel() >= head and blob.is_contiguous()
        )
        numbers = blob[:head].view(torch.int32).tolist() if whole and blob.storage_offset() % 4 == 0 else [0]
        if numbers[:2] != [_MAGIC, _VERSION]:
            raise _malformed(
                f"{blob.dtype} {list(blob.shape)} does not start with the header of version {_VERSION}"
            )
        nibbles, *sizes, headroom, pair, folded = numbers[2:11]
        if folded not in (0, 1) or (folded and not _may_fold(shape, groups)):
            raise _malformed(f"it is folded ({folded}), which weights {list(shape)} are not")
        _, out, channels, *taps = _sizes(shape, groups)
        expected = _sizes(_laid(shape, bool(folded)), groups)
        if sizes != expected or not 0 <= headroom <= _MOST_HEADROOM or nibbles not in (0, 1):
            raise _malformed(f"it says {numbers[2:10]} where the layer has {expected}")
        ends = _ends_of_parts(expected, bool(nibbles))
        if blob.numel() != ends[-1]:
            raise _malformed(f"it has {blob.numel()} bytes where the layer {list(shape)} needs {ends[-1]}")
        _, sums, runs, filler, codes = (blob[start:end] for start, end in pairwise((0, *ends)))
        bounds = runs.view(torch.int32).view(-1, len(RUNS))
        if filler.count_nonzero():
            raise _malformed("what fills up its tables is not 0")
        if not _may_bound(bounds, pair):
            raise _malformed(f"no codes have runs within {bounds[:1].tolist()} and pairs within {pair}")
        return cls(
            codes, sums.view(torch.int32), bool(nibbles), bool(folded), groups, out, channels, (taps[0], taps[1]),
            pair, bounds, headroom,
        )  # fmt: skip


def pack(codes: Tensor, groups: int, shift: Tensor | None = None, *, strided: bool = False) -> Tensor:
    """A blob of centered codes, in half the bytes where all of them lie in -8..7; `shift` is not in it.

    Those of a `strided` layer are not folded, since sums of all pixels of its input would be made.

    Shapes: codes int8 [O, C / groups, h, w] or [O, K]; shift uint8 [G, C], of the input; returns uint8, 1-D.
    Raises: ValueError for codes of another kind, or if 8 bit activations, shifted, could overflow int32 with them;
        DmqfxError without the library of kernels.
    Example:
        >>> blob = pack(torch.tensor([[1, -2, 3, 7, -8]], dtype=torch.int8), 1)
        >>> unpack(blob, (1, 5), 1)
        tensor([[ 1, -2,  3,  7, -8]], dtype=torch.int8)
    """
    whole = groups > 0 and len(codes) % groups == 0
    if codes.dtype != torch.int8 or codes.dim() not in (2, 4) or not whole:
        raise ValueError(
            f"{codes.dtype} {list(codes.shape)} in {groups} groups are not the codes of a weight"
        )
    least, greatest = _ends(codes)
    if _may_overflow(codes, max(greatest, -least), shift) and (why := integer.overflow(codes.float(), shift)):
        raise ValueError(why)
    folded = not strided and _may_fold(codes.shape, groups)
    sizes, nibbles = _sizes(_laid(codes.shape, folded), groups), least >= -8 and greatest <= 7
    ends = _ends_of_parts(sizes, nibbles)
    blob = torch.zeros(ends[-1], dtype=torch.uint8)
    if folded:
        codes = codes.permute(2, 3, 0, 1)  # [O, C, h, w] to [h, w, O, C]
    pair = _laid_out(codes.cpu().contiguous(), sizes, nibbles, [blob[end:] for end in (*ends[:2], ends[3])])
    numbers = [_MAGIC, _VERSION, int(nibbles), *sizes, _headroom(least, greatest), pair, int(folded)]
    blob[: 4 * len(numbers)] = torch.tensor(numbers, dtype=torch.int32).view(torch.uint8)
    return blob.to(codes.device)


def _laid_out(codes: Tensor, sizes: Sequence[int], nibbles: bool, parts: Sequence[Tensor]) -> int:
    """Sums, bounds of runs and codes written where they go; the bound of pairs."""
    kernels = library()
    if kernels is None:
        raise DmqfxError(absent())
    groups, out, channels, high, wide = sizes
    sums, runs, into = (part.data_ptr() for part in parts)
    pair = torch.zeros(1, dtype=torch.int32)
    places = (codes.data_ptr(), into, sums, pair.data_ptr(), runs)
    kernels.pack(Packing(groups, out, channels, high * wide, nibbles, *places))
    return int(pair)


def unpack(blob: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """Inverse of pack, after a look at everything that the kernel takes for granted.

    Raises: StoreError where the blob is malformed, as Weights.open, or its numbers do not follow from its codes.
    """
    weights = Weights.open(blob, shape, groups)
    data = weights.codes
    if weights.nibbles:
        halves = data.view(-1, _STEP // 2)
        data = torch.cat([(halves & 15) ^ 8, (halves >> 4) ^ 8], 1).view(torch.int8) - 8
    *lead, channels, high, wide = _laid((*shape, 1, 1)[:4], weights.folded)
    out, quads = lead[0] // groups, math.ceil(channels / QUAD)
    laid = data.view(torch.int8).reshape(groups, -1, high * wide, quads, LANE, QUAD)
    codes = laid.permute(0, 1, 4, 3, 5, 2).reshape(groups, -1, quads * QUAD, high * wide)
    filled, codes = codes, codes[:, :out, :channels]
    codes = codes.reshape(out * groups, channels, high * wide)
    pair, runs = _bounds(laid)
    sums = codes.flatten(1).sum(1, dtype=torch.int32)
    known = (pair, _headroom(*_ends(laid))) == (weights.pair, weights.headroom)
    if not known or not torch.equal(runs, weights.runs) or not torch.equal(sums, weights.sums):
        raise _malformed("its sums do not follow from its codes")
    if int(filled.count_nonzero()) != int(codes.count_nonzero()):
        raise _malformed("what fills it up is not 0")
    if weights.folded:
        codes = codes.view(*shape[2:], *shape[:2]).permute(2, 3, 0, 1)
    return codes.reshape(tuple(shape)).contiguous()


def _may_bound(runs: Tensor, pair: int) -> bool:
    """Whether there are codes of 8 bits of which these are the bounds, as far as that is seen without looking at codes."""
    if runs.numel() == 0:
        return pair == 0
    shorter = runs[:, [RUNS.index(max(n // 2, 1)) for n in RUNS]]
    longest = 256 * runs.new_tensor(RUNS)
    within = (runs >= 0).all() and (shorter <= runs).all() and (runs <= longest).all()
    return bool(within) and pair <= int(runs[:, 0].amax()) <= 2 * pair


def _bounds(laid: Tensor) -> tuple[int, Tensor]:
    """Weights' pair and runs.

    Shapes: laid int8 [groups, blocks, taps, quads, 16, 4].
    """
    if laid.numel() == 0:
        return 0, laid.new_zeros((laid.shape[0] * laid.shape[1], len(RUNS)), dtype=torch.int32)
    steps = laid.int().reshape(laid.shape[0] * laid.shape[1], -1, _STEP // 2, 2)
    up, down = (steps.clamp(*ends).sum(3, dtype=torch.int32) for ends in ((0, None), (None, 0)))
    sums = {1: up - down}
    for length in RUNS[1:]:
        shorter = length // 2 if length // 2 in sums else 1
        whole = F.pad(sums[shorter], (0, 0, 0, -sums[shorter].shape[1] % (length // shorter)))
        sums[length] = whole.reshape(len(whole), -1, length // shorter, _STEP // 2).sum(2, dtype=torch.int32)
    runs = torch.stack([sums[length].amax((1, 2)) for length in RUNS], 1)
    return int(max(up.amax(), -down.amin())), runs


def _ends(codes: Tensor) -> tuple[int, int]:
    """The least code and the greatest, 0 included."""
    if codes.numel() == 0:
        return 0, 0
    least, greatest = torch.aminmax(codes)
    return min(0, int(least)), max(0, int(greatest))


def _may_overflow(codes: Tensor, furthest: int, shift: Tensor | None) -> bool:
    """Whether the codes have to be looked at one by one, by their number and the furthest of them."""
    most = 0 if shift is None or not shift.numel() else int(shift.amax())
    return (furthest << most) * (codes[0].numel() if len(codes) else 0) * 255 >= 2**31


def _headroom(least: int, greatest: int) -> int:
    """The bits by which every code can be shifted to the left and still has 8."""
    fits = (
        bits for bits in range(_MOST_HEADROOM, 0, -1) if least << bits >= -128 and greatest << bits <= 127
    )
    return next(fits, 0)


def _sizes(shape: Sequence[int], groups: int) -> list[int]:
    """Groups, output and input channels of one, and the taps of a weight [O, C / groups, ...]."""
    taps = shape[2:] if len(shape) == 4 else (1, 1)
    return [groups, shape[0] // max(groups, 1), shape[1], *taps]


def _may_fold(shape: Sequence[int], groups: int) -> bool:
    """Whether the taps of a weight [O, C / groups, ...] can be folded into its output channels; it is not gathered then."""
    taps = math.prod(shape[2:])
    few = shape[0] <= _FEW_OUT and taps * shape[0] <= _MOST_UNDER
    return groups == 1 and few and taps > 1 and shape[1] > _FEW_IN


def _laid(shape: Sequence[int], folded: bool) -> Sequence[int]:
    """The shape of a weight as it is laid out."""
    return (math.prod(shape[2:]) * shape[0], shape[1], 1, 1) if folded else shape


def _ends_of_parts(sizes: Sequence[int], nibbles: bool) -> list[int]:
    """Where header, sums, runs, what fills them up and codes end, in bytes."""
    groups, out, channels, high, wide = sizes
    blocks = groups * math.ceil(out / LANE)
    codes = blocks * high * wide * math.ceil(channels / QUAD) * (_STEP // 2 if nibbles else _STEP)
    *tables, last = accumulate((4 * _HEADER, 4 * groups * out, 4 * blocks * len(RUNS)))
    begin = last + -last % _ALIGNED
    return [*tables, last, begin, begin + codes]


def _malformed(what: str) -> StoreError:
    return StoreError(f"malformed weights of an integer kernel: {what}\n  mend: lower the program again")
