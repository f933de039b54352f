"""Products whose inputs FBGEMM quantizes: exact sums of the codes that torch would choose."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.kernels import REFERENCE, FbgemmLinear, fbgemm, trial
from mono_quant.kernels.fbgemm_linear import FbgemmRows
from mono_quant.kernels.store import STORE
from mono_quant.modules.weight import kernel_bytes
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, EPS, FLOATS, INTEGERS, ROWS, STATIC, layer, run, spec_of

FBGEMM = FbgemmLinear()
SHAPES = {"wide": (95, 1010), "long": (47, 10237)}
"""As odd as may be without much to fill up."""

GRIDS = {
    **INTEGERS,
    "dynamic 7-bit": Quantizer().activations("dynamic", bits=7),
    "dynamic symmetric 7-bit": Quantizer().activations("dynamic", bits=7, symmetric=True),
    "7-bit per tensor": Quantizer().activations("dynamic", bits=7, granularity="tensor"),
    "static 7-bit": STATIC[2],
    "per tensor": Quantizer().activations("dynamic", granularity="tensor"),
    "asymmetric weight, symmetric inputs": Quantizer()
    .asymmetric()
    .activations("dynamic", symmetric=True),
    "scale per tensor": Quantizer().granularity("tensor").activations("dynamic"),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def _able() -> None:
    if why := fbgemm.refuse():
        pytest.skip(why)


def codes_of(x: Tensor, scale: float, zero: int, top: int) -> Tensor:
    """Return codes, ``float64``, of which values on a half are rounded as the kernel does it."""
    inside = x.clamp(-zero * scale, (top - zero) * scale)
    if top < 255 or not fbgemm.saturates():
        codes = torch.quantize_per_tensor(inside, scale, zero, torch.quint8).int_repr().double()
        assert float(codes.max()) <= top
        return codes
    low, high = (
        torch.quantize_per_tensor(inside + half * scale, 2 * scale, (zero + 1) // 2, torch.quint8)
        for half in (-0.5, 0.5)
    )
    assert int(low.int_repr().max()) <= int(high.int_repr().max()) <= 128
    return low.int_repr().double() + high.int_repr().double() - zero % 2


def expected_of(made: QuantizedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product in float64 without bias, and what it may be off by.

    Codes are those of `codes_of` for rows on one grid. Otherwise the row in steps of its scale, its
    zero point less the middle code added, is what is put on a grid of ones.
    """
    packed, activation = made.packed_weights()["weight"], made.activations()["weight"]
    qparams = activation.qparams(x)
    scale, zero = qparams.scale, qparams.zero_point
    assert scale is not None
    half = 1 << (activation.scheme.code_bits or 8) - 1
    top = 2 * half - 1
    middle = zero.float() if zero is not None else torch.full_like(scale, half)
    if scale.numel() == 1:
        codes = codes_of(x, float(scale), int(middle), top)
    else:
        codes = codes_of(x * scale.reciprocal() + (middle - half), 1.0, half, top)
    weight = packed.dequantize().double()
    sums = (codes - middle) @ weight.t() * scale
    parts = (codes - (middle if scale.numel() == 1 else half)) @ weight.t() * scale
    offsets = (half - middle) * weight.sum(1) * scale
    odd = (
        (codes + (middle if scale.numel() == 1 else half)) % 2 * (fbgemm.saturates() and top == 255)
    )
    apart = odd @ weight.t() * scale  # by which what the halves of codes come to may differ
    room = 6 * EPS * (sums.abs() + parts.abs() + offsets.abs() + apart.abs())
    return sums, room + 1e-37


@each_shape
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_sums_of_the_codes_are_exact(grid: str, shape: tuple[int, int]) -> None:
    made = layer(GRIDS[grid], *shape)
    assert FBGEMM.supports(spec_of(made), CPU, torch.float32) is None
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        expected, room = expected_of(made, x)
        found = run(FBGEMM, made, x)
        assert found.dtype == torch.float32
        assert ((found - expected).abs() <= room).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_but_for_values_on_a_half_codes_are_those_of_the_reference(grid: str) -> None:
    """Weights that pick one input each show its code."""
    made = layer(GRIDS[grid], 512, 512)
    weight = made.packed_weights()["weight"]
    weight.tensors["codes"].copy_(torch.eye(512, dtype=torch.int8) * 64)
    if "zero_point" in weight.tensors:
        weight.tensors["zero_point"].zero_()
    weight.tensors["scale"].fill_(1 / 64)
    activation = made.activations()["weight"]
    off = 0
    for rows in (1, 7, 130):
        x = noise(rows, 512, seed=rows)
        step = activation.qparams(x).scale
        assert step is not None
        away = (run(FBGEMM, made, x) - activation.fake_quantize(x)).abs() / step
        off += int((away > 0.01).sum())
        assert float(away.max()) < 1.01
    assert off <= 2, "of 70,000"


def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept() -> None:
    for quantizer in (INTEGERS["dynamic"], INTEGERS["asymmetric weight"]):
        made = layer(quantizer, 95, 1010)
        bias = noise(95, seed=9)
        x = noise(2, 3, 1010)
        plain = run(FBGEMM, made, x)
        biased = run(FBGEMM, made, x, bias)
        room = 4 * EPS * (plain.abs() + biased.abs() + bias.abs())
        assert ((biased - (plain + bias)).abs() <= room).all()
        alone, row = run(FBGEMM, made, x[0, 0], bias), run(FBGEMM, made, x[:1, 0], bias)[0]
        assert same_bits(alone, row)
        for dtype in (torch.float16, torch.bfloat16):
            half = x.to(dtype)
            assert same_bits(run(FBGEMM, made, half), run(FBGEMM, made, half.float()).to(dtype))
        strided = torch.stack([x, x], -1)[..., 0]
        assert not strided.is_contiguous()
        assert same_bits(run(FBGEMM, made, strided), plain)
        assert run(FBGEMM, made, x[:, :0]).shape == (2, 0, 95)


def test_many_rows_are_multiplied_some_at_a_time() -> None:
    made, x = layer(INTEGERS["dynamic"], 95, 1010), noise(1300, 1010)
    apart = [run(FBGEMM, made, x[start : start + 100]) for start in range(0, 1300, 100)]
    assert same_bits(run(FBGEMM, made, x), torch.cat(apart))


def test_large_weights_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for quantizer in (INTEGERS["dynamic"], INTEGERS["asymmetric weight"]):
        made = layer(quantizer, 95, 1010)
        weight, x = made.packed_weights()["weight"], noise(3, 1010)
        whole = FBGEMM.arrange(spec_of(made), weight)
        with monkeypatch.context() as patch:
            patch.setattr("mono_quant.kernels.fbgemm_linear._PIECE", 1 << 15)
            pieces = FBGEMM.arrange(spec_of(made), weight)
        assert (len(whole.pieces), len(pieces.pieces)) == (1, 2)
        for one in (whole, pieces):
            assert same_bits(one.canonical(), weight.tensors["codes"])
        for rows in (x[:1], x):
            found = [FBGEMM.product(spec_of(made), rows, one, None) for one in (whole, pieces)]
            assert same_bits(*found)


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("grid", ["dynamic symmetric", "dynamic", "static symmetric"])
def test_the_largest_products_do_not_saturate(grid: str, code: int) -> None:
    made = layer(INTEGERS[grid], 48, 1 << 15)
    made.packed_weights()["weight"].tensors["codes"].fill_(code)
    for x in (torch.full((3, 1 << 15), -1e3), torch.full((3, 1 << 15), 1e3)):
        expected, room = expected_of(made, x)
        assert float(expected.abs().min()) > 0
        assert ((run(FBGEMM, made, x) - expected).abs() <= room).all()


def test_rows_of_zeros_give_the_bias() -> None:
    for quantizer in GRIDS.values():
        made = layer(quantizer, 95, 1010)
        bias = noise(95)
        for rows in (1, 2):
            found = run(FBGEMM, made, torch.zeros(rows, 1010), bias)
            step = made.packed_weights()["weight"].dequantize().abs().sum(1) * 255 * EPS
            assert ((found - bias).abs() <= step).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", ["dynamic", "dynamic symmetric", "static"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_what_is_not_finite_comes_out_as_from_the_reference(
    grid: str, rows: int, value: float
) -> None:
    made = layer(INTEGERS[grid], 95, 1010)
    x = noise(rows, 1010)
    x[-1, 7] = value
    found, expected = run(FBGEMM, made, x), run(REFERENCE, made, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert found[:-1].isfinite().all()
    assert (grid == "static" and value == value) or not found[-1].isfinite().any()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("size", [1e-28, 1e37])
def test_tiny_and_huge_inputs_overflow_where_the_result_does(rows: int, size: float) -> None:
    made = layer(INTEGERS["dynamic"], 95, 1010)
    x = torch.zeros(rows, 1010)
    x[-1, 7] = size
    found, reference = run(FBGEMM, made, x), run(REFERENCE, made, x)
    assert reference.isfinite().all()
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=0)
    packed, scale = made.packed_weights()["weight"], made.activations()["weight"].qparams(x).scale
    assert scale is not None
    of_zeros = 128 * (packed.dequantize().double().sum(1) * scale.double()).abs()
    room = 6 * EPS * (reference.abs() + of_zeros)  # which is added and taken away again
    assert ((found - reference).abs() <= room).all()


def test_an_input_of_the_wrong_width_is_refused() -> None:
    made = layer(INTEGERS["dynamic"], 95, 1010)
    for wrong in (noise(2, 505), noise(1, 2020), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="1010"):
            run(FBGEMM, made, wrong)


@pytest.mark.parametrize(
    ("quantizer", "shape", "why"),
    [
        (Quantizer().bits(4), (96, 1024), "4-bit"),
        (Quantizer().activations("dynamic", dtype="float8_e4m3fn"), (96, 1024), "inputs are dyn"),
        (FLOATS["8-bit"], (96, 1024), "inputs are float"),
        (INTEGERS["dynamic"], (160, 640), "filled up by 92%"),
        (INTEGERS["dynamic"], (64, 64), "too few"),
    ],
)
def test_it_says_why_it_cannot(quantizer: Quantizer, shape: tuple[int, int], why: str) -> None:
    spec = spec_of(layer(quantizer, *shape))
    assert why in str(FBGEMM.supports(spec, CPU, torch.float32))


def test_another_dtype_and_a_failed_trial_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(layer(INTEGERS["dynamic"], 96, 1024))
    assert FBGEMM.supports(spec, CPU, torch.float64) == "inputs are torch.float64"
    monkeypatch.setattr(fbgemm, "refuse", lambda: "it died")
    assert FBGEMM.supports(spec, CPU, torch.float32) == "it died"


def test_a_trial_that_finds_a_wrong_number_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is no formality: with sums that are off by one it fails."""
    monkeypatch.setattr(STORE, "get", lambda name: None)
    monkeypatch.setattr(STORE, "set", lambda name, value: None)
    wrong = fbgemm._OF_HALVES.replace("exact = x", "exact = 1 + x")
    assert wrong != fbgemm._OF_HALVES
    assert "AssertionError: a product is wrong" in str(trial.refusal("bytes", wrong))


def test_another_engine_is_a_refusal_and_changes_no_result() -> None:
    made, x = layer(INTEGERS["dynamic"], 95, 1010), noise(3, 1010)
    before = torch.backends.quantized.engine
    with torch.no_grad(), kernels.use("fbgemm"):
        expected = made(x)
        made.state_dict()
        try:
            torch.backends.quantized.engine = "onednn"
            assert "engine is onednn" in str(FBGEMM.supports(spec_of(made), CPU, torch.float32))
            for rows in (x[:1], x):  # the kernel was chosen before
                assert torch.allclose(made(rows), expected[: len(rows)], rtol=1e-3, atol=1e-3)
            made.state_dict()
        finally:
            torch.backends.quantized.engine = before
        assert same_bits(made(x), expected)


def test_nobody_is_told_what_torch_thinks_of_quantized_tensors(
    recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    fbgemm._warn_once.cache_clear()
    made = layer(INTEGERS["dynamic"], 96, 1024)
    run(FBGEMM, made, noise(1, 1024))
    assert not [one for one in recwarn if "quantize" in str(one.message)]
    assert "quantize" not in capfd.readouterr().err


def test_what_is_kept_beside_the_codes_is_counted() -> None:
    made = Quantizer().only("*").apply(nn.Linear(1010, 95), progress=False).model
    with torch.no_grad(), kernels.use("fbgemm"):
        made(noise(1, 1010))
    filled = fbgemm.packed_bytes(95, 1010)
    assert filled == 96 * 1024
    assert kernel_bytes(made) == filled - 95 * 1010 + 4 * 4 * 95


def test_inside_a_layer_it_is_what_the_kernel_gives() -> None:
    made = layer(INTEGERS["dynamic"], 95, 1010)
    x = noise(3, 1010)
    bias = dict(made.named_parameters())["bias"]
    with torch.no_grad(), kernels.use("fbgemm"):
        for rows in (x, x[:1], x[:1], x):
            found = made(rows)
            held = made._holder("weight")._held
            assert held is not None
            assert isinstance(held.arranged, FbgemmRows)
            assert same_bits(found, run(FBGEMM, made, rows, bias))
