"""Packing codes into words: what goes in comes out, and compressed-tensors writes the same words."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.ops.pack import ROW_CHUNK, num_words, pack, unpack

WIDTHS = range(2, 9)


@st.composite
def matrices_of_codes(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Codes over the whole range of a width, in any shape: odd counts and words that are not full included."""
    bits = draw(st.integers(2, 8))
    rows, count = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, count), generator=generator, dtype=torch.int8)
    return codes, bits


@settings(max_examples=200, deadline=None)
@given(matrices_of_codes())
def test_unpack_undoes_pack(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], num_words(codes.shape[1], bits))
    assert torch.equal(unpack(words, bits, codes.shape[1]), codes)


@settings(max_examples=200, deadline=None)
@given(matrices_of_codes())
def test_the_words_are_those_of_compressed_tensors(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, codes.shape[1]), unpack_from_int32(words, bits, codes.shape))


@settings(max_examples=50, deadline=None)
@given(matrices_of_codes())
def test_zero_points_are_packed_along_the_rows_as_in_compressed_tensors(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    assert torch.equal(pack(codes.T.contiguous(), bits).T, pack_to_int32(codes, bits, packed_dim=0))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_ends_of_the_range_survive(bits: int) -> None:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.tensor([[low, high, 0, -1, 1] * 13], dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, 65), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_bits_lie_where_the_docstring_says(bits: int) -> None:
    """Code i occupies bits [i*bits, (i+1)*bits) of the stream, little end first, offset by half the range."""
    codes = (torch.arange(33) % (1 << bits) - (1 << (bits - 1))).to(torch.int8).reshape(1, 33)
    stream = sum((int(code) + (1 << (bits - 1))) << (place * bits) for place, code in enumerate(codes[0].tolist()))
    words = pack(codes, bits)
    assert words.numpy().astype("<i4").tobytes() == stream.to_bytes(4 * math.ceil(33 * bits / 32), "little")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_more_rows_than_a_chunk(bits: int) -> None:
    """Rows are packed some at a time; the seam must not show."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (ROW_CHUNK + 3, 5), generator=generator).to(torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack(words, bits, 5), codes)


def test_a_view_with_strides_is_packed_like_its_copy() -> None:
    codes = torch.randint(-8, 8, (12, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    words = pack(codes, 4)
    apart = torch.stack([words, words], dim=-1)[..., 0]
    assert torch.equal(unpack(apart, 4, 10), codes)
