"""Codes of 1 to 8 bits as a dense stream of bytes.

Value `i` of a row takes bits ``i * bits`` to ``(i + 1) * bits`` of the row, bit 0 being the lowest
bit of byte 0. So two 4-bit values share a byte, the first in the low nibble; three-bit values
straddle bytes. A row starts on a byte of its own.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from mono_quant.numerics.blocks import AT_ONCE, row_parts

_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""

_LOWEST = {1: 0x0101010101010101, 2: 0x03030303, 4: 0x0F0F}
"""The lowest bits of each byte of such an integer, by how many."""


def packed_length(count: int, bits: int) -> int:
    """Return the bytes that `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned `codes` ``[..., n]``, each below ``2 ** bits``, as bytes ``[..., m]``."""
    count = codes.shape[-1]
    if codes.numel() <= AT_ONCE or bits == 8:
        return _pack(codes, bits)
    length = packed_length(count, bits)
    return _in_parts(codes, count, length, lambda rows: _pack(rows, bits))


def _pack(codes: Tensor, bits: int) -> Tensor:
    count = codes.shape[-1]
    per_word, word_bytes, word_dtype = _word(bits)
    if per_word == 1:
        return codes.to(torch.uint8)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % per_word))
    if word_bytes == 1 and sys.byteorder == "little" and padded.numel():
        return _bytes_of_wide(padded, bits)
    values = _split_last(padded, per_word)  # [..., words, per_word]
    words = values[..., 0].to(word_dtype)
    for place in range(1, per_word):
        words |= values[..., place].to(word_dtype) << place * bits
    if word_bytes == 1:
        return words.contiguous()
    shifts = [words >> 8 * byte & 255 for byte in range(word_bytes)]
    stream = torch.stack([part.to(torch.uint8) for part in shifts], -1).flatten(-2)
    return stream[..., : packed_length(count, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``uint8 [..., count]`` codes that `pack_bits` packed."""
    if torch.compiler.is_compiling():  # compilers fuse what reads codes with what spreads them
        return _unpack(packed, bits, count)
    if packed.numel() * 8 <= AT_ONCE * bits or bits == 8:
        return _unpacked(packed, bits, count)
    return _in_parts(packed, count, count, lambda rows: _unpacked(rows, bits, count))


def _in_parts(x: Tensor, count: int, length: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `change` makes of ``x [..., n]``, ``uint8 [..., length]``, some rows at a time.

    Temporaries are several times the codes.

    Args:
        x: codes or bytes.
        count: codes of a row.
        length: of what a row becomes.
        change: of rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    made = rows.new_empty(len(rows), length, dtype=torch.uint8)
    for part in row_parts((1, len(rows), count)):
        made[part] = change(rows[part])
    return made.reshape(*x.shape[:-1], length)


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return what `_unpack` does, several times faster where a machine lets it."""
    if bits in _LOWEST and sys.byteorder == "little" and packed.numel():
        return _wide_of_bytes(packed, bits)[..., :count].contiguous()
    return _unpack(packed, bits, count)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    per_word, word_bytes, word_dtype = _word(bits)
    if per_word == 1:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % word_bytes))
    parts = _split_last(padded, word_bytes).to(word_dtype)  # [..., words, word_bytes]
    words = parts[..., 0]
    for byte in range(1, word_bytes):
        words = words | parts[..., byte] << 8 * byte
    mask = (1 << bits) - 1
    values = torch.stack([(words >> place * bits & mask) for place in range(per_word)], -1)
    return values.flatten(-2)[..., :count].to(torch.uint8)


def _bytes_of_wide(codes: Tensor, bits: int) -> Tensor:
    """Return codes of 1, 2 or 4 bits packed: those of a byte lie in one integer, to be shifted.

    Where a machine keeps the low byte of an integer first, several times faster than code by code.
    """
    codes = codes.contiguous()
    if codes.storage_offset() % (8 // bits):
        codes = codes.clone()  # integers begin at whole places of their memory
    wide = codes.view(_WIDE[8 // bits])  # code i in bits 8i to 8i + bits
    packed = wide
    for place in range(1, 8 // bits):
        packed = packed | wide >> place * (8 - bits)
    return packed.to(torch.uint8)  # the low byte alone


def _wide_of_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of 1, 2 or 4 bits in bytes, each integer spread to one of a byte a code."""
    wide = packed.to(_WIDE[8 // bits])
    spread = wide
    for place in range(1, 8 // bits):
        spread = spread | wide << place * (8 - bits)  # code i at bit 8i, others where none is read
    return spread.bitwise_and_(_LOWEST[bits]).view(torch.uint8)


def _split_last(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Return how many values fill a least whole number of bytes, that number, and a dtype."""
    if 8 % bits == 0:
        return 8 // bits, 1, torch.uint8
    return 8, bits, torch.int64
