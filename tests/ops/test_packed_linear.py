"""Every fast multiplication against the plain one, and both against the product in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from packlight.ops import packed_linear
from packlight.ops.grid import QuantizedTensor, quantize
from packlight.ops.pack import pack
from packlight.plan.kernels import int4_group
from packlight.spec import Grid

BF16_ROUNDING = torch.finfo(torch.bfloat16).eps / 2
FLOAT32_ROUNDING = torch.finfo(torch.float32).eps / 2

INT8 = [Grid(8, None, symmetric) for symmetric in (True, False)]
INT4 = [Grid(4, group, symmetric) for group in (32, 64, 128, 256, None) for symmetric in (True, False)]


def matrix(grid: Grid, rows: int = 128, cols: int = 512, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Off-centre weights with a few large ones, so that zero points and scales differ from group to group."""
    generator = torch.Generator().manual_seed(rows + cols)
    weight = torch.randn(rows, cols, generator=generator) * 0.05 + 0.02
    weight[::7, ::11] *= 4
    return quantize(weight, grid, dtype)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def plain(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    words = pack(weight.codes, weight.grid.bits)
    return packed_linear.reference(x, words, weight.scale, weight.zero_point, weight.grid.bits)


def fast(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    if weight.grid.bits == 8:
        zero = None if weight.zero_point is None else weight.zero_point[:, 0].to(weight.scale.dtype)
        return packed_linear.int8(x, weight.codes, weight.scale[:, 0].contiguous(), zero)
    group = int4_group(weight.grid, weight.shape[1])
    assert group is not None
    packed, scale_and_zero = packed_linear.pack_int4(weight, group)
    return packed_linear.int4(x, packed, scale_and_zero, group)


def exact(x: torch.Tensor, weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and what rounding may do to it in bfloat16.

    A path rounds its output once. It may also round each weight to bfloat16, or the offset `z * scale` of its group,
    or the product with the codes alone before the offset is taken off: all three are at most half an epsilon of
    `(|q - z| + |z|) * scale`, summed over the row. Sums are kept in float32.
    """
    cols = weight.shape[1]
    repeats = cols // weight.scale.shape[1]
    scale = weight.scale.double().repeat_interleave(repeats, dim=1)
    zero = torch.zeros_like(scale)
    if weight.zero_point is not None:
        zero = weight.zero_point.double().repeat_interleave(repeats, dim=1)
    shifted = weight.codes.double() - zero
    product = x.double() @ (shifted * scale).T
    magnitude = x.double().abs() @ ((shifted.abs() + zero.abs()) * scale).T
    return product, BF16_ROUNDING * (product.abs() + magnitude) + cols * FLOAT32_ROUNDING * magnitude


@pytest.mark.parametrize("grid", [*INT8, *INT4], ids=str)
def test_a_fast_path_errs_by_rounding_only(grid: Grid) -> None:
    weight, x = matrix(grid), inputs(5, 512)
    product, rounding = exact(x, weight)
    for path in (plain, fast):
        out = path(x, weight)
        assert out.dtype == torch.bfloat16 and out.shape == (5, 128)
        assert bool(((out.double() - product).abs() <= rounding).all()), path.__name__


@pytest.mark.parametrize("grid", [*INT8, *INT4], ids=str)
def test_a_fast_path_is_as_good_as_the_plain_one(grid: Grid) -> None:
    """Root mean square error at most twice that of the reference and of one rounding of the output together."""
    weight, x = matrix(grid), inputs(16, 512)
    product, _ = exact(x, weight)
    rounded = product.to(torch.bfloat16).double()

    def error(out: torch.Tensor) -> float:
        return float((out.double() - product).square().mean().sqrt())

    assert error(fast(x, weight)) <= 2 * (error(plain(x, weight)) + error(rounded))


@pytest.mark.parametrize("grid", [*INT8, *INT4], ids=str)
def test_a_row_of_zeros_gives_exactly_zero(grid: Grid) -> None:
    """The row of a padding token: whatever its scale, there is nothing to round."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    for path in (plain, fast):
        out = path(inputs(4, 512), quantize(weight, grid, torch.bfloat16))
        assert bool((out[:, 3] == 0).all()), path.__name__


@pytest.mark.parametrize("grid", [Grid(8, None, False), Grid(4, 32, False), Grid(4, None)], ids=str)
def test_the_bound_sees_a_damaged_matrix(grid: Grid) -> None:
    """Two rows of codes changed places: were the bound too wide to notice, the tests above would say nothing."""
    weight, x = matrix(grid), inputs(5, 512)
    product, rounding = exact(x, weight)
    damaged = replace(weight, codes=weight.codes[[1, 0, *range(2, 128)]])
    wrong = (fast(x, damaged).double() - product).abs() > rounding
    assert bool(wrong[:, :2].any()) and not bool(wrong[:, 2:].any())


@pytest.mark.parametrize("grid", [*INT8, Grid(4, 32), Grid(4, 128, False), Grid(4, None, False)], ids=str)
@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512), (33, 512), (1, 1, 1, 512), (0, 512)], ids=str)
def test_any_shape_of_batch(grid: Grid, shape: tuple[int, ...]) -> None:
    weight, x = matrix(grid), inputs(*shape)
    product, rounding = exact(x, weight)
    out = fast(x, weight)
    assert out.shape == (*shape[:-1], 128)
    assert bool(((out.double() - product).abs() <= rounding).all())


@pytest.mark.parametrize("grid", [*INT8, Grid(4, 32), Grid(4, None, False)], ids=str)
def test_a_view_with_strides_gives_what_its_copy_gives(grid: Grid) -> None:
    weight = matrix(grid)
    for x in (inputs(3, 4, 512)[:, -1:], inputs(512, 6).T, inputs(4, 1024)[:, ::2]):
        assert not x.is_contiguous()
        assert torch.equal(fast(x, weight), fast(x.contiguous(), weight))


@pytest.mark.parametrize("cols", [32, 64, 96, 160, 256, 768])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_is_repeated_over_groups_that_the_kernel_knows(cols: int, symmetric: bool) -> None:
    weight, x = matrix(Grid(4, None, symmetric), rows=64, cols=cols), inputs(3, cols)
    product, rounding = exact(x, weight)
    assert bool(((fast(x, weight).double() - product).abs() <= rounding).all())


@pytest.mark.parametrize("rows", [64, 192, packed_linear.ROW_CHUNK + 64])
def test_the_int4_layout_is_made_in_parts_of_many_rows(rows: int) -> None:
    weight, x = matrix(Grid(4, 32, symmetric=False), rows=rows, cols=64), inputs(2, 64)
    product, rounding = exact(x, weight)
    assert bool(((fast(x, weight).double() - product).abs() <= rounding).all())
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32) + 8, 1)
    assert torch.equal(packed_linear.pack_int4(weight, 32)[0], whole)


@pytest.mark.parametrize("grid", [Grid(3, 16, False), Grid(4, 32), Grid(5), Grid(8, 32, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_multiplies_by_the_decoded_matrix(
    grid: Grid, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks or at once: the same products, up to the order of a sum, which a kernel may choose by the shape."""
    weight, x = matrix(grid, rows=50, cols=96, dtype=dtype), inputs(4, 96).to(dtype)
    at_once = plain(x, weight)
    assert torch.equal(at_once, torch.nn.functional.linear(x, weight.dequantize()))
    monkeypatch.setattr(packed_linear, "ROW_CHUNK", 16)
    in_chunks = plain(x, weight)
    assert in_chunks.shape == at_once.shape
    magnitude = x.double().abs() @ weight.dequantize().double().abs().T
    sums = 2 * 96 * FLOAT32_ROUNDING * magnitude
    outputs = 2 * torch.finfo(dtype).eps / 2 * (at_once.double().abs() + sums)
    assert bool(((in_chunks.double() - at_once.double()).abs() <= sums + outputs).all())


def test_the_reference_chunks_a_matrix_with_the_chunk_it_ships_with() -> None:
    rows = packed_linear.ROW_CHUNK + 5
    weight, x = matrix(Grid(4, 16, False), rows=rows, cols=32, dtype=torch.float32), inputs(2, 32).float()
    product, _ = exact(x, weight)
    out = plain(x, weight)
    assert out.shape == (2, rows)
    torch.testing.assert_close(out, product.float())  # torch's own tolerances for float32
