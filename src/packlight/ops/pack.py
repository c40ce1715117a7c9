"""Dense packing of small integers into int32 words, as compressed-tensors' `pack-quantized` layout stores them.

Code i of a row occupies bits [i*bits, (i+1)*bits) of the row's bit stream, little end first, with 2^(bits-1) added so
that it is unsigned; codes may straddle words, and the last word of a row is filled up with zero bits.
"""

from __future__ import annotations

import math

import torch

ROW_CHUNK = 1024
"""Rows packed at once: the wider integers in between would outweigh an LM head's codes several times."""


def num_words(count: int, bits: int) -> int:
    """int32 words that `count` codes of `bits` bits need."""
    return math.ceil(count * bits / 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes along the last axis: int8 (rows, count) -> int32 (rows, num_words(count, bits))."""
    return torch.cat([_pack_rows(part, bits) for part in codes.split(ROW_CHUNK)])


def pack_unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes in [0, 2^bits - 1] along the last axis: uint8 (rows, count) -> int32 (rows, words)."""
    return pack((codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8), bits)


def unpack_unsigned(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo `pack_unsigned`: int32 (rows, words) -> uint8 (rows, count)."""
    return (unpack(words, bits, count).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, count = codes.shape
    unsigned = codes.to(torch.int16) + (1 << (bits - 1))
    if bits in (2, 4, 8):  # codes never straddle a byte: work on bytes, 8 times less memory than on words
        per_byte = 8 // bits
        total = num_words(count, bits) * 4 * per_byte
        stream = _padded(unsigned.to(torch.uint8), total).reshape(rows, -1, per_byte)
        packed = stream[..., 0].clone()
        for place in range(1, per_byte):
            packed |= stream[..., place] << (place * bits)
        return packed.contiguous().view(torch.int32)
    # 32 codes fill exactly `bits` words
    chunks = math.ceil(count / 32)
    stream = _padded(unsigned.to(torch.int64), chunks * 32).reshape(rows, chunks, 32)
    words = torch.zeros(rows, chunks, bits + 1, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        shifted = stream[..., i] << offset
        words[..., word] |= shifted & 0xFFFFFFFF
        words[..., word + 1] |= shifted >> 32
    packed = words[..., :bits].reshape(rows, chunks * bits)[:, : num_words(count, bits)]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).contiguous()


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo `pack`: int32 (rows, words) -> int8 (rows, count), signed."""
    rows = words.shape[0]
    half = 1 << (bits - 1)
    if bits == 8:  # subtracting 128 from a byte is flipping its highest bit
        return words.contiguous().view(torch.uint8)[:, :count].bitwise_xor(128).view(torch.int8).contiguous()
    if bits in (2, 4):
        per_byte, mask = 8 // bits, (1 << bits) - 1
        stream = words.contiguous().view(torch.uint8)  # (rows, 4 * words)
        codes = torch.empty(rows, stream.shape[1], per_byte, dtype=torch.int8, device=words.device)
        for place in range(per_byte):
            codes[..., place] = ((stream >> (place * bits)) & mask).view(torch.int8) - half
        return codes.reshape(rows, -1)[:, :count].contiguous()
    chunks = math.ceil(count / 32)
    stream = torch.zeros(rows, chunks * bits, dtype=torch.int64, device=words.device)
    stream[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    stream = stream.reshape(rows, chunks, bits)
    codes = torch.empty(rows, chunks, 32, dtype=torch.int8, device=words.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = stream[..., word] >> offset
        if offset + bits > 32:
            value = value | (stream[..., word + 1] << (32 - offset))
        codes[..., i] = ((value & ((1 << bits) - 1)) - half).to(torch.int8)
    return codes.reshape(rows, -1)[:, :count].contiguous()


def _padded(values: torch.Tensor, total: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, total - values.shape[1]))
