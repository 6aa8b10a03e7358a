"""The library of native kernels: found, loaded, and its instruction set chosen. Absent, it says so once."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dmqfx.errors import DmqfxError
from dmqfx.words import suggest

__all__ = [
    "INSTRUCTION_SETS",
    "RUNS",
    "Attention",
    "Coding",
    "Layer",
    "Library",
    "Packing",
    "Step",
    "absent",
    "library",
    "readable",
    "taped",
    "tell_plain",
    "warn_once",
]

logger = logging.getLogger(__name__)

INSTRUCTION_SETS = ("scalar", "avx2", "avx512vnni")
"""What the kernels are compiled for, the slowest first."""

RUNS = (*(1 << k for k in range(9)), *(3 << k for k in range(8)))
"""Lengths of runs of steps whose sums are bounded: 1, 2, 4, ... 256, and 3, 6, 12, ... 384."""

_FILE = Path(__file__).with_name("libdmqfx.so")
_MEND = "install a C++ compiler (g++ or clang++), then `pip install --force-reinstall --no-deps` dmqfx"
_ELSEWHERE = 'q.retarget("simulate") is faster without kernels'


class Layer(ctypes.Structure):
    """DmqfxLayer of layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "height", "width", "groups", "channels", "given")),
        ("out_channels", c_int64),
        *((name, c_int64 * 2) for name in ("taps", "stride", "padding", "dilation")),
        ("upsampled", c_int64 * 2),
        ("steps", c_float * 2),
        *((name, c_int64) for name in ("out_height", "out_width")),
        *((name, c_int64) for name in ("nibbles", "folded", "pair")),
        ("runs", c_void_p),
        *((name, c_int64) for name in ("headroom", "planes", "flip")),
        *((name, c_void_p) for name in ("raw", "codes")),
        ("timestep_groups", c_int64),
        *((name, c_void_p) for name in ("group", "zero_points", "input_scales", "shifts")),
        *((name, c_void_p) for name in ("weights", "sums", "weight_scales", "biases", "added")),
        *((name, c_int64) for name in ("added_image", "added_position")),
        *((name, c_void_p) for name in ("real", "integer", "coding")),
    )


class Coding(ctypes.Structure):
    """DmqfxCoding of layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "channels", "positions", "planes", "split")),
        *((name, c_int64) for name in ("norm", "norm_groups")),
        *(
            (name, c_int64)
            for name in ("activation", "scale_channels", "zero_point_channels", "least", "greatest")
        ),
        ("eps", c_double),
        *((name, c_void_p) for name in ("x", "beside", "gammas", "betas", "scales", "zero_points")),
        ("timestep_groups", c_int64),
        *((name, c_void_p) for name in ("group", "codes", "real", "multipliers", "addends")),
        *((name, c_int64) for name in ("of_multipliers", "of_addends")),
    )


class Packing(ctypes.Structure):
    """DmqfxPacking of layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("groups", "out_channels", "channels", "taps", "nibbles")),
        *((name, c_void_p) for name in ("raw", "weights", "sums", "pair", "runs")),
    )


class Attention(ctypes.Structure):
    """DmqfxAttention of layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "heads", "queries", "keys", "width", "bits")),
        ("scale", c_double),
        *((name, c_int64 * 3) for name in ("of_q", "of_k", "of_v", "of_out")),
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
    )


class Step(ctypes.Structure):
    """DmqfxStep of layer.h."""

    _fields_ = (("kind", c_int64), ("what", c_void_p))


_KINDS: dict[type[ctypes.Structure], int] = {Layer: 0, Coding: 1, Attention: 2}
_TAPE = threading.local()


@contextmanager
def taped() -> Iterator[list[ctypes.Structure]]:
    """What this thread has the library compute meanwhile: structures to be filled in for another call."""
    before, calls = getattr(_TAPE, "calls", None), list[ctypes.Structure]()
    _TAPE.calls = calls
    try:
        yield calls
    finally:
        _TAPE.calls = before


def _note(call: ctypes.Structure) -> None:
    calls = getattr(_TAPE, "calls", None)
    if calls is not None:
        calls.append(call)


@dataclass(frozen=True)
class Library:
    """The loaded library and the instruction set that layers run on.

    Units: `run` takes torch.get_num_threads() threads, `peak` is 10^9 multiply-adds a second on one.
    """

    file: Path
    handle: ctypes.CDLL
    instruction_sets: tuple[str, ...]
    chosen: str

    @property
    def has_threads(self) -> bool:
        """Whether the compiler had OpenMP."""
        return bool(self.handle.dmqfx_has_threads())

    def run(self, layer: Layer, instruction_set: str | None = None) -> None:
        """Compute a layer.

        Raises: DmqfxError for an instruction set that is not there or no memory; ValueError for a zero point
        outside the codes, a shift beyond 30 or a timestep group that is not there.
        """
        number = INSTRUCTION_SETS.index(instruction_set or self.chosen)
        status = self.handle.dmqfx_run(ctypes.byref(layer), number, torch.get_num_threads())
        if status == 2:
            raise ValueError(
                "a zero point of the input is not one of its codes; padding could not stand for it"
            )
        if status == 4:
            raise ValueError(
                "an input channel is shifted by more than 30 bits, or weights have no such headroom"
            )
        if status == 5:
            raise _no_group(layer.timestep_groups)
        if status != 0:
            raise DmqfxError(
                {1: f"no kernel for {instruction_set}", 3: "no memory left"}.get(status, str(status))
            )
        _note(layer)

    def code(self, coding: Coding, instruction_set: str | None = None) -> None:
        """Turn real numbers into codes.

        Raises: DmqfxError for an instruction set that is not there or no memory; ValueError for a timestep group
        that is not there.
        """
        number = INSTRUCTION_SETS.index(instruction_set or self.chosen)
        status = self.handle.dmqfx_code(ctypes.byref(coding), number, torch.get_num_threads())
        if status == 5:
            raise _no_group(coding.timestep_groups)
        if status != 0:
            raise DmqfxError(
                {1: f"no kernel for {instruction_set}", 3: "no memory left"}.get(status, str(status))
            )
        _note(coding)

    def attend(self, attention: Attention, instruction_set: str | None = None) -> None:
        """Compute attention.

        Raises: DmqfxError for an instruction set that is not there or no memory.
        """
        chosen = instruction_set or self.chosen
        number = INSTRUCTION_SETS.index(chosen)
        status = self.handle.dmqfx_attend(ctypes.byref(attention), number, torch.get_num_threads())
        if status == 1:
            raise DmqfxError(
                f"this machine and build have no {chosen} kernels; there is {', '.join(self.instruction_sets)}"
            )
        if status != 0:
            heads = f"{attention.batch} x {attention.heads} heads of {attention.keys} keys"
            raise DmqfxError(f"no memory left for {heads}; mend: fewer rows at a time, or a smaller image")
        _note(attention)

    def steps(self, calls: Sequence[ctypes.Structure]) -> ctypes.Array[Step]:
        """Calls in a row, for `run_all`; they point to these structures, which have to outlive them."""
        return (Step * len(calls))(*(Step(_KINDS[type(each)], ctypes.addressof(each)) for each in calls))

    def run_all(self, steps: ctypes.Array[Step]) -> bool:
        """Compute one behind the other on the chosen instruction set; False, at the first that cannot be."""
        number, threads = INSTRUCTION_SETS.index(self.chosen), torch.get_num_threads()
        return not self.handle.dmqfx_run_all(steps, len(steps), number, threads)

    def pack(self, packing: Packing) -> None:
        """Lay out weights, with the bounds of their pairs and of the runs of steps of each block."""
        self.handle.dmqfx_pack(ctypes.byref(packing), torch.get_num_threads())

    def peak(self, instruction_set: str, *, widening: bool = False) -> float:
        """The rate of the innermost instructions alone; `widening` for what W8A8 takes on AVX2."""
        return float(self.handle.dmqfx_peak(INSTRUCTION_SETS.index(instruction_set), int(widening)))


_STRUCTURES = {"layer": Layer, "coding": Coding, "packing": Packing, "attention": Attention}


@cache
def library() -> Library | None:
    """The library, or None where it was not built or does not load, which is logged once.

    The environment variable DMQFX_ISA picks another instruction set than the best, DMQFX_KERNELS another file.

    Raises: DmqfxError for an instruction set that this machine or build does not have.
    """
    file = Path(os.environ.get("DMQFX_KERNELS", _FILE))
    try:
        handle = ctypes.CDLL(str(file))
        handle.dmqfx_run.argtypes = (POINTER(Layer), c_int, c_int)
        handle.dmqfx_code.argtypes = (POINTER(Coding), c_int, c_int)
        handle.dmqfx_attend.argtypes = (POINTER(Attention), c_int, c_int)
        handle.dmqfx_run_all.argtypes = (POINTER(Step), c_int64, c_int, c_int)
        handle.dmqfx_peak.argtypes, handle.dmqfx_peak.restype = (c_int, c_int), c_double
        handle.dmqfx_pack.argtypes, handle.dmqfx_pack.restype = (POINTER(Packing), c_int), None
        for name, structure in _STRUCTURES.items():
            size = getattr(handle, f"dmqfx_{name}_size")
            size.restype = c_int64
            if size() != ctypes.sizeof(structure):
                raise OSError(f"{file} was built from other sources")
        found = handle.dmqfx_instruction_sets()
    except (OSError, AttributeError) as error:
        logger.warning(
            "no native kernels, layers run in plain torch: %s\n  mend: %s; %s", error, _MEND, _ELSEWHERE
        )
        return None
    there = tuple(name for k, name in enumerate(INSTRUCTION_SETS) if found >> k & 1)
    return Library(file, handle, there, _chosen(there))


def readable(x: Tensor) -> bool:
    """Whether the kernels can read a tensor of real numbers: float32 on the CPU."""
    return x.is_cpu and x.dtype == torch.float32


def tell_plain(
    operator: str, *operands: Tensor | None, takes: str = "float32 on the CPU", wide: str = ""
) -> None:
    """Log, once for each kind of operand, that an operator computes these in plain torch: its kernel does not take them.

    Nothing is said of float64, in which programs are verified, nor without the library, which is logged itself. `wide` says
    what else than their kind it is that the kernel does not take.
    """
    there = [each for each in operands if each is not None]
    odd = next((each for each in there if not readable(each)), there[0])
    if library() is None or odd.dtype == torch.float64:
        return
    why = wide or f"its kernel takes {takes}"
    given = f"{str(odd.dtype).removeprefix('torch.')} on {odd.device.type}"
    mend = "call it in float32, without autocast" if odd.is_cpu else _ELSEWHERE
    mend = "leave quantize-attention out of the policy" if wide else mend
    warn_once(f"{operator} computes {given} in plain torch, slowly: {why}\n  mend: {mend}")


@cache
def warn_once(message: str) -> None:
    """Log a warning, if it was not logged before."""
    logger.warning(message)


def _no_group(there: int) -> ValueError:
    return ValueError(f"a timestep group beyond the {there} that there are")


def absent() -> str:
    """Why no layer can run natively, or "" if the library is there."""
    return "" if library() is not None else f"the library of native kernels is not there; {_MEND}"


def _chosen(there: tuple[str, ...]) -> str:
    asked = os.environ.get("DMQFX_ISA", "")
    if not asked:
        return there[-1]
    if asked not in there:
        known = asked in INSTRUCTION_SETS
        hint = f"there is {', '.join(there)}" if known else suggest(asked, list(INSTRUCTION_SETS))
        raise DmqfxError(f"DMQFX_ISA={asked}: this machine and build have no such kernels; {hint}")
    return asked
