"""4-bit weights that meet quantized inputs: as bfloat16, decoded, and as bytes."""

import pytest
import torch
from torch import nn

from mono_quant import PerTensor, QuantizedLayer, Quantizer, kernels
from mono_quant.kernels import REFERENCE, Int4, PanelBlocks, PanelBytes
from mono_quant.kernels.ops import int4_panel, int_mm_refusal
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, EPS, ROWS, exact, layer, on_grid, run, spec_of
from tests.kernels.test_int4 import ROUND, SHAPE, parts

pytestmark = pytest.mark.skipif(isinstance(int4_panel(), str), reason=str(int4_panel()))

INT4, BLOCKS, BYTES = Int4(), PanelBlocks(), PanelBytes()
KERNELS = (INT4, BLOCKS, BYTES)
BITS4 = Quantizer().bits(4).activations("dynamic")
GRIDS = {
    "groups of 64": BITS4,
    "symmetric": BITS4.symmetric(),
    "symmetric inputs": Quantizer().bits(4).activations("dynamic", symmetric=True),
    "inputs per tensor": Quantizer().bits(4).activations("dynamic", granularity=PerTensor()),
    "4-bit inputs": Quantizer().bits(4).activations("dynamic", bits=4),
    "groups of 384": BITS4.group_size(384),
    "per channel": BITS4.granularity("channel"),
    "per tensor": BITS4.granularity("tensor"),
    "static": Quantizer().bits(4).activations("static").fit(noise(64, SHAPE[1], seed=5)),
}


@pytest.fixture(autouse=True)
def _able() -> None:
    if why := int_mm_refusal():
        pytest.skip(why)


@pytest.mark.parametrize("grid", GRIDS)
def test_inputs_lose_nothing_to_bfloat16(grid: str) -> None:
    made = layer(GRIDS[grid], *SHAPE)
    assert INT4.supports(spec_of(made), CPU, torch.float32) is None
    size = parts(made)
    for rows in ROWS:
        x = noise(rows, SHAPE[1], seed=rows)
        expected, _ = exact(made, x)
        # scales and offsets are rounded once each, then the result, and its sum in float32
        once = on_grid(spec_of(made).activation, x).abs() @ size.t()
        room = (ROUND + EPS * SHAPE[1]) * once + ROUND * (expected.abs() + 2 * ROUND * once)
        assert ((run(INT4, made, x) - expected).abs() <= room).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_decoded_panels_meet_inputs_on_their_grid(grid: str) -> None:
    made = layer(GRIDS[grid], *SHAPE)
    for rows in ROWS:
        x = noise(rows, SHAPE[1], seed=rows)
        expected, _ = exact(made, x)
        size = on_grid(spec_of(made).activation, x).abs() @ parts(made, centre=0).t()
        room = EPS * (8 + SHAPE[1] ** 0.5) * size
        assert ((run(BLOCKS, made, x) - expected).abs() <= room).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_bytes_are_off_by_half_a_step_of_their_grid(grid: str) -> None:
    made = layer(GRIDS[grid], *SHAPE)
    assert BYTES.supports(spec_of(made), CPU, torch.float32) is None
    q = made.packed_weights()["weight"].unpack()
    scale, zero = q.qparams.scale, q.qparams.zero_point
    assert scale is not None
    below = scale.double() * (8 if zero is None else zero.double())
    reach = torch.maximum(below, 15 * scale.double() - below).amax(2)[0]  # [out or 1]
    for rows in ROWS:
        x = noise(rows, SHAPE[1], seed=rows)
        expected, size = exact(made, x)
        inputs = on_grid(spec_of(made).activation, x).abs().sum(1, keepdim=True)
        room = (0.5 + 1e-4) * reach / 127 * inputs + 4 * EPS * (size + expected.abs())
        assert ((run(BYTES, made, x) - expected).abs() <= room).all()


def test_a_weight_whose_codes_are_steps_loses_nothing_to_bytes() -> None:
    made = layer(BITS4.symmetric(), *SHAPE)
    made.packed_weights()["weight"].tensors["scale"].fill_(127 / 128)
    made.packed_weights()["weight"].tensors["codes"].bitwise_and_(0x88)  # values of -8 and 0
    x = noise(33, SHAPE[1])
    expected, _ = exact(made, x)
    assert float(expected.abs().max()) > 1
    assert ((run(BYTES, made, x) - expected).abs() <= 4 * EPS * expected.abs()).all()


def test_noise_of_bytes_is_far_below_that_of_four_bits() -> None:
    source = nn.Linear(1024, 512)
    made = BITS4.apply(source, progress=False).model
    assert isinstance(made, QuantizedLayer)
    x = torch.randn(64, 1024)
    expected, _ = exact(made, x)
    floats = x.double() @ source.weight.double().t()
    noises = [(run(BYTES, made, x) - expected).square().sum(), (floats - expected).square().sum()]
    found, rounding = (10 * torch.log10(expected.square().sum() / one) for one in noises)
    assert found > 40 > rounding + 15


@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept(
    kernel: Int4 | PanelBlocks | PanelBytes,
) -> None:
    made = layer(BITS4, *SHAPE)
    bias, x = noise(SHAPE[0], seed=9), noise(2, 3, SHAPE[1])
    plain = run(kernel, made, x)
    assert plain.shape == (2, 3, SHAPE[0])
    biased = run(kernel, made, x, bias)
    assert ((biased - (plain + bias)).abs() <= 2 * EPS * (plain.abs() + biased.abs())).all()
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert same_bits(run(kernel, made, half), run(kernel, made, half.float()).to(dtype))
    assert run(kernel, made, x[:0]).shape == (0, 3, SHAPE[0])
    with pytest.raises(RuntimeError, match="768"):
        run(kernel, made, noise(2, 767))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("grid", ["groups of 64", "static"])
def test_what_is_not_finite_comes_out_as_from_the_reference(
    kernel: Int4 | PanelBlocks | PanelBytes, grid: str, value: float
) -> None:
    made = layer(GRIDS[grid], *SHAPE)
    x = noise(3, SHAPE[1])
    x[1, 7] = value
    found, expected = run(kernel, made, x), run(REFERENCE, made, x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2, equal_nan=True)


def test_rows_of_zeros_give_the_bias() -> None:
    bias = noise(SHAPE[0])
    for grid in GRIDS.values():
        made = layer(grid, *SHAPE)
        for kernel in KERNELS:
            found = run(kernel, made, torch.zeros(2, SHAPE[1]), bias)
            assert ((found - bias).abs() <= 1e-6 * bias.abs()).all()


def test_inside_a_layer_all_three_read_one_order() -> None:
    made = layer(BITS4, *SHAPE)
    bias, x = dict(made.named_parameters())["bias"], noise(3, SHAPE[1])
    held = []
    for kernel in KERNELS:
        expected = run(kernel, made, x, bias)
        with torch.no_grad(), kernels.use(kernel.name):
            assert same_bits(made(x), expected)
            held.append(made.quantized_weights["weight"]._held)
    assert all(one is not None for one in held)


def test_bytes_say_why_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(Quantizer().bits(4), *SHAPE)
    assert BYTES.supports(spec_of(made), CPU, torch.float32) == "inputs are float"
    monkeypatch.setattr("mono_quant.kernels.int4.int_mm_refusal", lambda: "it died")
    quantized = spec_of(layer(BITS4, *SHAPE))
    assert BYTES.supports(quantized, CPU, torch.float32) == "it died"
    assert INT4.supports(quantized, CPU, torch.float32) is None
