"""Packing loses nothing, in any shape, at any width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmqfx.numbers.packing import pack, packed_length, unpack


@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(bits: int, signed: bool, shape: list[int], seed: int) -> None:
    low, dtype = (-(2 ** (bits - 1)), torch.int8) if signed else (0, torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + 2**bits, shape, generator=generator).to(dtype)
    packed = pack(codes, bits)
    back = unpack(packed, bits, signed, shape)
    assert back.dtype == dtype
    assert torch.equal(back, codes)
    assert packed.shape == (packed_length(codes.numel(), bits),)


def test_four_bit_codes_lie_two_to_a_byte_the_even_one_low() -> None:
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([-1, -8], dtype=torch.int8), 4).tolist() == [0x8F]
    assert packed_length(1001, 4) == 501
    assert packed_length(1001, 5) == 1001


def test_codes_that_lie_scattered_in_memory_pack_in_row_major_order() -> None:
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    assert torch.equal(unpack(pack(codes.T, 8), 8, False, (4, 3)), codes.T)


def test_packing_shares_no_memory_with_the_codes() -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    packed = pack(codes, 8)
    unpack(packed, 8, False, (4,)).fill_(9)
    codes.fill_(7)
    assert packed.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("code", "bits"), [(16, 4), (4, 2), (64, 6)])
def test_a_code_too_great_for_its_bits_is_refused(code: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"do not fit {bits} bits"):
        pack(torch.tensor([0, code], dtype=torch.uint8), bits)


def test_a_negative_code_too_small_for_its_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from -9 to 0 do not fit 4 bits \(-8 to 7\)"):
        pack(torch.tensor([0, -9], dtype=torch.int8), 4)


def test_bytes_that_cannot_be_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes for"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, False, (3,))


@pytest.mark.parametrize("bits", [1, 9])
def test_codes_have_two_to_eight_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        pack(torch.zeros(1, dtype=torch.uint8), bits)


def test_codes_are_bytes() -> None:
    with pytest.raises(ValueError, match="int8 or uint8"):
        pack(torch.zeros(1, dtype=torch.int32), 4)
