"""Packed codes, bit by bit against one long integer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant.numerics.blocks import AT_ONCE
from mono_quant.numerics.packing import pack_bits, packed_length, unpack_bits

WIDTHS = range(1, 9)


def stream(codes: list[int], bits: int) -> list[int]:
    """Return the bytes of one integer whose bits ``i * bits`` on are code i."""
    number = sum(code << place * bits for place, code in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Draw some rows of one length, and the width of their codes."""
    bits = draw(st.sampled_from(WIDTHS))
    row = st.integers(0, 37).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length), min_size=1
        )
    )
    return draw(row), bits


@given(rows_of_codes())
def test_packed_rows_are_the_bits_of_one_long_integer(drawn: tuple[list[list[int]], int]) -> None:
    rows, bits = drawn
    packed = pack_bits(torch.tensor(rows, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.tolist() == [stream(row, bits) for row in rows]


@given(rows_of_codes())
def test_unpacking_reads_the_bits_of_one_long_integer(drawn: tuple[list[list[int]], int]) -> None:
    rows, bits = drawn
    packed = torch.tensor([stream(row, bits) for row in rows], dtype=torch.uint8)
    codes = unpack_bits(packed, bits, len(rows[0]))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == rows


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_at_every_place_of_a_word(bits: int) -> None:
    for offset in range(8):
        codes = torch.arange(offset, offset + 2**bits + 8).remainder(2**bits).to(torch.uint8)
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, len(codes)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [1024, 1021])
def test_many_codes_are_unpacked_by_blocks_to_what_they_were(bits: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2 * AT_ONCE // length, length)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, length), codes)
    assert torch.equal(unpack_bits(packed[:, 3:5], bits, length), codes[:, 3:5])  # not contiguous
    every = packed.new_empty(*packed.shape[:-1], 2 * packed.shape[-1])[..., ::2].copy_(packed)
    assert torch.equal(unpack_bits(every[0, :3], bits, length), codes[0, :3])


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_machines_of_either_order_of_bytes_find_the_same(
    bits: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mono_quant.numerics.packing.sys.byteorder", order)
    codes = torch.arange(3 * 37).remainder(2**bits).to(torch.uint8).reshape(3, 37)
    packed = pack_bits(codes, bits)
    assert packed.tolist() == [stream(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(packed, bits, 37), codes)


def test_the_first_of_two_nibbles_is_the_low_one() -> None:
    assert pack_bits(torch.tensor([0x1, 0xA, 0xF], dtype=torch.uint8), 4).tolist() == [0xA1, 0x0F]


def test_three_bit_codes_straddle_bytes() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    assert pack_bits(codes, 3).tolist() == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]


@pytest.mark.parametrize("bits", WIDTHS)
def test_leading_dimensions_are_kept_and_each_row_starts_on_a_byte(bits: int) -> None:
    codes = torch.arange(2 * 3 * 5).remainder(2**bits).to(torch.uint8).reshape(2, 3, 5)
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, 3, packed_length(5, bits))
    assert packed.tolist() == [[stream(row, bits) for row in part] for part in codes.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 7)])
def test_empty_tensors_pack_and_unpack(bits: int, shape: tuple[int, ...]) -> None:
    packed = pack_bits(torch.zeros(shape, dtype=torch.uint8), bits)
    assert packed.shape == (*shape[:-1], packed_length(shape[-1], bits))
    assert unpack_bits(packed, bits, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_changes_neither_its_input_nor_its_stream(bits: int) -> None:
    codes = torch.arange(16).remainder(2**bits).to(torch.uint8)
    before = codes.clone()
    packed = pack_bits(codes, bits)
    kept = packed.clone()
    unpack_bits(packed, bits, 16)
    assert torch.equal(codes, before)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_codes_pack_like_contiguous_ones(bits: int) -> None:
    codes = torch.arange(6 * 10).remainder(2**bits).to(torch.uint8).reshape(10, 6).t()
    assert torch.equal(pack_bits(codes, bits), pack_bits(codes.contiguous(), bits))


@given(count=st.integers(0, 10_000), bits=st.sampled_from(WIDTHS))
def test_a_packed_length_is_the_bits_rounded_up_to_bytes(count: int, bits: int) -> None:
    assert packed_length(count, bits) == math.ceil(count * bits / 8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_from_the_middle_of_memory_pack_as_any_others(bits: int) -> None:
    codes = torch.arange(65).remainder(2**bits).to(torch.uint8)
    for start in range(8):
        part = codes[start : start + 48]
        assert pack_bits(part, bits).tolist() == stream(part.tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_many_codes_pack_row_by_row_as_few_do(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 2, 45_001), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 2, packed_length(45_001, bits))
    assert packed.is_contiguous()
    for matrix, found in zip(codes, packed, strict=True):
        for row, expected in zip(matrix, found, strict=True):
            assert torch.equal(pack_bits(row, bits), expected)
