"""Products with weights that oneDNN packed: the integer kernel's sums, few roundings more."""

import pytest
import torch
from torch import Tensor

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.kernels import REFERENCE, PackedLinear, onednn
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

PACKED = PackedLinear()
GRIDS = {
    **INTEGERS,
    "asymmetric weight, symmetric inputs": Quantizer()
    .asymmetric()
    .activations("dynamic", symmetric=True),
}
each_shape = pytest.mark.parametrize("shape", [SHAPES["wide"], SHAPES["long"]])


@pytest.fixture(autouse=True)
def _able() -> None:
    if why := onednn.refuse_linear():
        pytest.skip(why)


def split(made: QuantizedLayer, x: Tensor) -> Tensor:
    """Return the parts that are rounded apart, their sizes added, ``float64 [M, out]``.

    With the codes u of inputs, z their zero points and q the weight's, w its zero points: the
    product of u - c and q, c being z if there is one for all and 128 otherwise, the product of
    c - z and the sums of q, and that of the sums of u - z and w.
    """
    weight, activation = made.packed_weights()["weight"], made.activations()["weight"]
    qparams = activation.qparams(x)
    scale, zero = qparams.scale, qparams.zero_point
    assert scale is not None
    stored = weight.tensors["codes"][0].double()
    codes = activation.scheme.quantize(x, qparams).codes.double()
    inputs = zero.double() if zero is not None else torch.zeros_like(scale).double()
    taken_off = inputs if zero is None or zero.numel() == 1 else torch.full_like(inputs, 128)
    parts = ((codes - taken_off) @ stored.t()).abs()
    parts += ((taken_off - inputs) * stored.sum(1)).abs()
    zeros = weight.tensors.get("zero_point")
    if zeros is not None:
        parts += ((codes - inputs).sum(1, keepdim=True) * zeros.double()).abs()
    factors = weight.tensors["scale"].double().reshape(1, -1)
    return parts * factors * scale.double()


@each_shape
@pytest.mark.parametrize("grid", GRIDS)
def test_with_quantized_inputs_sums_are_exact(grid: str, shape: tuple[int, int]) -> None:
    made = layer(GRIDS[grid], *shape)
    assert PACKED.supports(spec_of(made), CPU, torch.float32) is None
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        expected, _ = exact(made, x)
        found = run(PACKED, made, x)
        assert found.dtype == torch.float32
        # Each part becomes a float and is multiplied by two scales; two parts are added at most.
        assert ((found - expected).abs() <= 6 * EPS * split(made, x) + 1e-37).all()


@each_shape
@pytest.mark.parametrize("grid", FLOATS)
def test_float_inputs_keep_what_float32_keeps(grid: str, shape: tuple[int, int]) -> None:
    made = layer(FLOATS[grid], *shape)
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows) * torch.logspace(-3, 3, rows)[:, None]
        expected, _ = exact(made, x)
        step = 4 * EPS * x.double().abs().amax(1, keepdim=True)  # of the last digit
        packed = made.packed_weights()["weight"]
        weight = packed.dequantize().double()
        room = step / 2 * weight.abs().sum(1) + 8 * EPS * expected.abs()
        zeros = packed.tensors.get("zero_point")
        if zeros is not None:  # a part of its own: the sum of the inputs times zero points
            offsets = zeros.double() * packed.tensors["scale"].double().reshape(-1)
            room += 8 * EPS * (x.double().sum(1, keepdim=True) * offsets).abs()
        assert ((run(PACKED, made, x) - expected).abs() <= room).all()


def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept() -> None:
    for quantizer in (INTEGERS["dynamic"], INTEGERS["asymmetric weight"], FLOATS["8-bit"]):
        made = layer(quantizer, 65, 1040)
        bias = noise(65, seed=9)
        x = noise(2, 3, 1040)
        plain = run(PACKED, made, x)
        biased = run(PACKED, made, x, bias)
        room = 4 * EPS * (plain.abs() + biased.abs() + bias.abs())
        assert ((biased - (plain + bias)).abs() <= room).all()
        alone, row = run(PACKED, made, x[0, 0]), run(PACKED, made, x[:1, 0])[0]
        assert same_bits(alone, row)
        for dtype in (torch.float16, torch.bfloat16):
            half = x.to(dtype)
            assert same_bits(run(PACKED, made, half), run(PACKED, made, half.float()).to(dtype))
        strided = torch.stack([x, x], -1)[..., 0]
        assert not strided.is_contiguous()
        assert same_bits(run(PACKED, made, strided), plain)
        assert run(PACKED, made, x[:, :0]).shape == (2, 0, 65)


def test_many_rows_are_done_in_parts() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    x = noise(600 * torch.get_num_threads(), 1040)
    found = run(PACKED, made, x)
    for place in (0, 255, 256, len(x) - 2):
        assert same_bits(found[place : place + 2], run(PACKED, made, x[place : place + 2]))


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("grid", ["dynamic symmetric", "dynamic", "static symmetric"])
def test_the_largest_products_do_not_saturate(grid: str, code: int) -> None:
    made = layer(INTEGERS[grid], 4, 1 << 15)
    made.packed_weights()["weight"].tensors["codes"].fill_(code)
    for x in (torch.full((3, 1 << 15), -1e3), torch.full((3, 1 << 15), 1e3)):
        expected, _ = exact(made, x)
        assert float(expected.abs().min()) > 0
        found = run(PACKED, made, x)
        assert ((found - expected).abs() <= 6 * EPS * split(made, x)).all()


def test_rows_of_zeros_give_the_bias() -> None:
    for quantizer in (*GRIDS.values(), *FLOATS.values()):
        made = layer(quantizer, 65, 1040)
        bias = noise(65)
        for rows in (1, 2):
            found = run(PACKED, made, torch.zeros(rows, 1040), bias)
            step = made.packed_weights()["weight"].dequantize().abs().sum(1) * 255 * EPS
            assert ((found - bias).abs() <= step).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", ["dynamic", "dynamic symmetric", "static", "8-bit"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_finite_comes_out_as_from_the_reference(
    grid: str, rows: int, value: float
) -> None:
    made = layer({**INTEGERS, **FLOATS}[grid], 65, 1040)
    x = noise(rows, 1040)
    x[-1, 7] = value
    found, expected = run(PACKED, made, x), run(REFERENCE, made, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert found[:-1].isfinite().all()
    assert (grid == "static" and value == value) or not found[-1].isfinite().any()


@pytest.mark.parametrize("grid", ["dynamic", "8-bit"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [1e-28, 1e37])
def test_tiny_and_huge_inputs_overflow_where_the_result_does(
    grid: str, rows: int, size: float
) -> None:
    made = layer({**INTEGERS, **FLOATS}[grid], 65, 1040)
    x = torch.zeros(rows, 1040)
    x[-1, 7] = size
    found, expected = run(PACKED, made, x), run(REFERENCE, made, x)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_an_input_of_the_wrong_width_is_refused() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    for wrong in (noise(2, 520), noise(1, 2080), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="1040"):
            run(PACKED, made, wrong)


def test_it_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    assert PACKED.supports(spec_of(made), CPU, torch.float64) == "inputs are torch.float64"
    assert "too few" in str(
        PACKED.supports(spec_of(layer(INTEGERS["dynamic"], 8, 64)), CPU, torch.float32)
    )
    four = layer(Quantizer().bits(4), 81, 832)
    assert "4-bit" in str(PACKED.supports(spec_of(four), CPU, torch.float32))
    monkeypatch.setattr(onednn, "refuse_linear", lambda: "it died")
    assert PACKED.supports(spec_of(made), CPU, torch.float32) == "it died"


def test_inside_a_layer_it_is_what_the_kernel_gives() -> None:
    made = layer(INTEGERS["dynamic"], 65, 1040)
    x = noise(3, 1040)
    expected = run(PACKED, made, x, dict(made.named_parameters())["bias"])
    with torch.no_grad(), kernels.use("onednn"):
        assert same_bits(made(x), expected)
        assert same_bits(made(x), expected)
