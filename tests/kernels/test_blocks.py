"""The kernel that decodes some rows at a time: the reference in another order."""

import pytest
import torch

from mono_quant import Quantizer
from mono_quant.kernels import REFERENCE, Blocks
from tests.helpers import noise, same_bits
from tests.kernels.cases import (
    CPU,
    DECODED,
    EPS,
    GROUPED,
    GROUPED_SHAPE,
    ROWS,
    SHAPES,
    Largest,
    exact,
    layer,
    run,
    spec_of,
)

BLOCKS = Blocks()


def assert_exact(quantizer: Quantizer, shape: tuple[int, int]) -> None:
    """Assert that errors are those of summing in float32."""
    made = layer(quantizer, *shape)
    assert BLOCKS.supports(spec_of(made), CPU, torch.float32) is None
    for rows in ROWS[: 2 if shape[1] == 1 else None]:
        x = noise(rows, shape[1], seed=rows)
        expected, size = exact(made, x)
        room = EPS * (8 + shape[1] ** 0.5) * size  # a sum's errors are of random sign
        assert ((run(BLOCKS, made, x) - expected).abs() <= room + 1e-37).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("grid", DECODED)
def test_it_is_the_product_of_what_the_codes_say(grid: str, shape: tuple[int, int]) -> None:
    assert_exact(DECODED[grid], shape)


@pytest.mark.parametrize("grid", GROUPED)
def test_groups_have_scales_of_their_own(grid: str) -> None:
    assert_exact(GROUPED[grid], GROUPED_SHAPE)


def test_a_weight_of_several_blocks_is_multiplied_whole() -> None:
    assert_exact(Quantizer().bits(4), (1100, 1024))


@pytest.mark.parametrize("grid", ["4-bit", "8-bit", "NF4", "NVFP4"])
@pytest.mark.parametrize("rows", [1, 64])
def test_no_float_copy_of_the_weight_is_made(grid: str, rows: int) -> None:
    made = layer(GROUPED[grid], 4096, 1024)
    with Largest() as seen:
        run(BLOCKS, made, noise(rows, 1024))
    assert 0 < seen.size <= 1 << 20
    with Largest() as seen:
        run(REFERENCE, made, noise(rows, 1024))
    assert seen.size >= 4096 * 1024


def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept() -> None:
    made = layer(Quantizer().bits(4), *GROUPED_SHAPE)
    bias, x = noise(81, seed=9), noise(2, 3, 832)
    plain = run(BLOCKS, made, x)
    assert plain.shape == (2, 3, 81)
    assert same_bits(run(BLOCKS, made, x, bias), plain + bias)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert same_bits(run(BLOCKS, made, half), run(BLOCKS, made, half.float()).to(dtype))
    assert same_bits(run(BLOCKS, made, torch.stack([x, x], -1)[..., 0]), plain)
    assert run(BLOCKS, made, x[:0]).shape == (0, 3, 81)


def test_nan_stays_in_its_row() -> None:
    for quantizer in (Quantizer().bits(4), Quantizer().bits(16), DECODED["dynamic"]):
        made = layer(quantizer, *GROUPED_SHAPE)
        x = noise(3, 832)
        x[1, 5] = float("nan")
        found = run(BLOCKS, made, x)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


def test_it_says_why_it_cannot() -> None:
    made = layer(Quantizer().bits(4), *GROUPED_SHAPE)
    assert BLOCKS.supports(spec_of(made), CPU, torch.float64) == "inputs are torch.float64"
    assert "cuda" in str(BLOCKS.supports(spec_of(made), torch.device("cuda"), torch.float32))
    small = layer(Quantizer().bits(4), 64, 64)
    assert "too few" in str(BLOCKS.supports(spec_of(small), CPU, torch.float32))
