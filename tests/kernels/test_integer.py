"""The integer kernel: its sums are exact, so its results are known but for a few roundings."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.base import KernelSpec
from mono_quant.kernels import REFERENCE, Integer
from mono_quant.kernels.codes import constants
from mono_quant.operations import MatrixProduct
from tests.helpers import noise, same_bits
from tests.kernels.cases import (
    CPU,
    EPS,
    FLOATS,
    INTEGERS,
    ROWS,
    SHAPES,
    exact,
    layer,
    run,
    spec_of,
)

INTEGER = Integer()
each_shape = pytest.mark.parametrize("shape", [SHAPES["wide"], SHAPES["long"]])


@pytest.mark.parametrize("shape", [SHAPES["wide"], SHAPES["long"], (5, 40), (1, 64)])
@pytest.mark.parametrize("grid", INTEGERS)
def test_with_quantized_inputs_only_the_scales_round(grid: str, shape: tuple[int, int]) -> None:
    made = layer(INTEGERS[grid], *shape)
    assert INTEGER.supports(spec_of(made), CPU, torch.float32) is None
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        expected, _ = exact(made, x)
        found = run(INTEGER, made, x)
        assert found.dtype == torch.float32
        # The sum becomes a float, and is multiplied by two scales.
        assert ((found - expected).abs() <= 3.1 * EPS * expected.abs() + 1e-37).all()


@each_shape
@pytest.mark.parametrize("grid", FLOATS)
def test_float_inputs_keep_what_float32_keeps(grid: str, shape: tuple[int, int]) -> None:
    made = layer(FLOATS[grid], *shape)
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows) * torch.logspace(-3, 3, rows)[:, None]
        expected, _ = exact(made, x)
        step = 4 * EPS * x.double().abs().amax(1, keepdim=True)  # of the last digit
        weight = made.packed_weights()["weight"].dequantize().double()
        room = step / 2 * weight.abs().sum(1) + 8 * EPS * expected.abs()
        assert ((run(INTEGER, made, x) - expected).abs() <= room).all()


def test_it_is_as_near_to_the_exact_product_as_the_reference() -> None:
    made = layer(FLOATS["8-bit"], 256, 4096)
    x = noise(16, 4096)
    expected, _ = exact(made, x)
    ours, theirs = (float((run(k, made, x) - expected).norm()) for k in (INTEGER, REFERENCE))
    assert ours < 2 * theirs


def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    bias = noise(65, seed=9)
    x = noise(2, 3, 1040)
    plain = run(INTEGER, made, x)
    biased = run(INTEGER, made, x, bias)  # in one step with the last factor, on some processors
    assert ((biased - (plain + bias)).abs() <= 2 * EPS * (plain.abs() + biased.abs())).all()
    assert same_bits(run(INTEGER, made, x[0, 0]), run(INTEGER, made, x[:1, 0])[0])
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert same_bits(run(INTEGER, made, half), run(INTEGER, made, half.float()).to(dtype))
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert same_bits(run(INTEGER, made, strided), plain)
    assert run(INTEGER, made, x[:, :0]).shape == (2, 0, 65)


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("grid", ["dynamic symmetric", "dynamic", "static symmetric"])
def test_the_largest_products_do_not_saturate(grid: str, code: int) -> None:
    made = layer(INTEGERS[grid], 4, 1 << 15)
    weight = made.packed_weights()["weight"]
    weight.tensors["codes"].fill_(code)
    for x in (torch.full((3, 1 << 15), -1e3), torch.full((3, 1 << 15), 1e3)):
        expected, _ = exact(made, x)
        assert float(expected.abs().min()) > 0
        found = run(INTEGER, made, x)
        assert ((found - expected).abs() <= 3.1 * EPS * expected.abs()).all()


def test_rows_of_zeros_give_the_bias() -> None:
    for quantizer in (*INTEGERS.values(), *FLOATS.values()):
        made = layer(quantizer, 65, 1040)
        bias = noise(65)
        assert same_bits(run(INTEGER, made, torch.zeros(2, 1040), bias), bias.expand(2, -1).clone())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", ["dynamic", "static", "8-bit"])
def test_what_is_not_finite_comes_out_as_from_the_reference(grid: str, value: float) -> None:
    made = layer({**INTEGERS, **FLOATS}[grid], 65, 1040)
    x = noise(3, 1040)
    x[1, 7] = value
    found, expected = run(INTEGER, made, x), run(REFERENCE, made, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert found[0].isfinite().all()
    assert (grid == "static" and value == value) or not found[1].isfinite().any()


def test_tiny_and_huge_inputs_are_as_good_as_usual_ones() -> None:
    made = layer(FLOATS["8-bit"], 65, 1040)
    x = noise(1, 1040)
    usual = run(INTEGER, made, x)
    for exponent in (-90, -30, 30, 90):
        assert same_bits(run(INTEGER, made, x * 2.0**exponent), usual * 2.0**exponent)


@pytest.mark.parametrize("grid", ["dynamic", "8-bit"])
def test_huge_inputs_overflow_where_the_result_does(grid: str) -> None:
    made = layer({**INTEGERS, **FLOATS}[grid], 65, 1040)
    x = torch.zeros(3, 1040)
    x[1, 7] = 1e37
    found, expected = run(INTEGER, made, x), run(REFERENCE, made, x)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_an_input_of_the_wrong_width_is_refused() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    for wrong in (noise(2, 520), noise(1, 2080), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="1040"):
            run(INTEGER, made, wrong)


def test_sums_of_codes_follow_what_is_written_to_them() -> None:
    made, other = (layer(INTEGERS["dynamic"], 65, 1040) for _ in range(2))
    other.packed_weights()["weight"].tensors["codes"].sub_(1)
    x = noise(3, 1040) + 1
    expected = run(INTEGER, other, x)
    assert not same_bits(run(INTEGER, made, x), expected)
    made.load_state_dict(other.state_dict())
    assert same_bits(run(INTEGER, made, x), expected)
    weight = made.packed_weights()["weight"]
    codes, scale = weight.tensors["codes"], weight.tensors["scale"]
    assert torch.equal(constants(weight).sums, codes.sum(-1, dtype=torch.int32))
    with torch.inference_mode():
        inferred = replace(weight, tensors={**weight.tensors, "codes": codes.clone()})
        assert torch.equal(constants(inferred).sums, constants(weight).sums)
    assert same_bits(run(INTEGER, copy.deepcopy(made), x), expected)
    scale.mul_(2)
    assert torch.equal(constants(weight).scale, scale.flatten().float())
    rescaled = replace(weight, tensors={**weight.tensors, "scale": scale / 4})
    assert torch.equal(constants(rescaled).scale, scale.flatten().float() / 4)


def reasons(made: QuantizedLayer, dtype: torch.dtype = torch.float32) -> str | None:
    return INTEGER.supports(spec_of(made), CPU, dtype)


def test_it_says_why_it_cannot() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    assert reasons(made, torch.float64) == "inputs are torch.float64"
    assert "meta" in str(INTEGER.supports(spec_of(made), torch.device("meta"), torch.float32))
    assert "too few" in str(reasons(layer(FLOATS["8-bit"], 8, 64)))
    assert "4-bit" in str(reasons(layer(Quantizer().bits(4), 81, 832)))
    grouped = layer(Quantizer().activations(None).group_size(32), 81, 832)
    assert "per-group 32" in str(reasons(grouped))
    floats = layer(INTEGERS["dynamic"].float_zero_point(), 65, 1040)
    assert reasons(floats) == "the weight's zero points are floats, and sums of codes are integers"
    assert "too short" in str(reasons(layer(INTEGERS["dynamic"], 1 << 16, 1)))
    assert "overflow" in str(reasons(layer(INTEGERS["dynamic"], 2, (1 << 15) + 1)))


def test_it_is_refused_where_the_product_fails_on_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    monkeypatch.setattr("mono_quant.kernels.integer.int_mm_refusal", lambda: "it died")
    assert reasons(made) == "it died"


def test_inside_a_layer_it_is_what_the_kernel_gives() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    x = noise(3, 1040)
    with torch.no_grad(), kernels.use("integer"):
        found: Tensor = made(x)
    bias = dict(made.named_parameters())["bias"]
    assert same_bits(found, run(INTEGER, made, x, bias))


class Other(MatrixProduct):
    """A product with a twist."""


def test_a_spec_of_another_operation_is_refused() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    spec = spec_of(made)
    other = KernelSpec(Other(), spec.scheme, spec.layout, spec.activation)
    assert "Other" in str(INTEGER.supports(other, CPU, torch.float32))
