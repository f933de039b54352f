"""The product of float inputs and 8-bit codes in bfloat16, for processors without exact ones."""

import pytest
import torch

from mono_quant import Quantizer, kernels, sqnr_db
from mono_quant.kernels import REFERENCE, Blocks, Int8, onednn
from mono_quant.kernels.ops import int8_mm_refusal
from mono_quant.modules import kernels_run
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, EPS, FLOATS, INTEGERS, ROWS, exact, layer, run, spec_of

INT8 = Int8()
BF16 = 2.0**-8
"""What rounding to bfloat16 may change a value by, as a share of it."""

GRIDS = {
    "per channel": FLOATS["8-bit"],
    "per tensor": FLOATS["8-bit"].granularity("tensor"),
}
SHAPE = (95, 1024)


@pytest.fixture(autouse=True)
def _able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where torch cannot, and let it have its turn where exact products are as fast."""
    if why := int8_mm_refusal():
        pytest.skip(why)
    monkeypatch.setattr(onednn, "refuse_linear", lambda: "it was not tried")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [SHAPE, (1025, 64)])
def test_inputs_and_results_are_rounded_and_nothing_else(grid: str, shape: tuple[int, int]) -> None:
    made = layer(GRIDS[grid], *shape)
    assert INT8.supports(spec_of(made), CPU, torch.float32) is None
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        expected, size = exact(made, x.bfloat16().float())
        found = run(INT8, made, x)
        assert found.dtype == torch.float32
        room = BF16 * expected.abs() + EPS * (8 + shape[1] ** 0.5) * size
        assert ((found - expected).abs() <= room).all()
        assert sqnr_db(run(REFERENCE, made, x), found) > 50


def test_bias_leading_dimensions_and_dtypes_are_kept() -> None:
    made, bias, x = layer(GRIDS["per channel"], *SHAPE), noise(95, seed=9), noise(2, 3, 1024)
    plain, biased = run(INT8, made, x), run(INT8, made, x, bias)
    assert biased.shape == (2, 3, 95)
    assert ((biased - (plain + bias)).abs() <= 4 * EPS * (plain.abs() + bias.abs())).all()
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert same_bits(run(INT8, made, half), run(INT8, made, half.float()).to(dtype))
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert same_bits(run(INT8, made, strided), plain)
    assert run(INT8, made, x[:, :0]).shape == (2, 0, 95)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37, -3e38])
def test_what_is_not_finite_or_overflows_is_decoded(value: float) -> None:
    made, x = layer(GRIDS["per channel"], *SHAPE), noise(3, 1024)
    x[1] = value
    found = run(INT8, made, x)
    assert torch.equal(found.nan_to_num(), run(Blocks(), made, x).nan_to_num())
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("quantizer", "shape", "why"),
    [
        (Quantizer().bits(4), SHAPE, "4-bit"),
        (INTEGERS["dynamic"], SHAPE, "inputs are dynamic"),
        (FLOATS["8-bit asymmetric"], SHAPE, "has zero points"),
        (FLOATS["8-bit"], (96, 1000), "rows of 1000 values are no multiple of 64"),
        (FLOATS["8-bit"], (64, 64), "too few"),
    ],
)
def test_it_says_why_it_cannot(quantizer: Quantizer, shape: tuple[int, int], why: str) -> None:
    assert why in str(INT8.supports(spec_of(layer(quantizer, *shape)), CPU, torch.float32))


def test_where_products_are_exact_it_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(layer(FLOATS["8-bit"], *SHAPE))
    monkeypatch.setattr(onednn, "refuse_linear", lambda: None)
    assert INT8.supports(spec, CPU, torch.float32) == "exact products are as fast here"


def test_a_failed_trial_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(layer(FLOATS["8-bit"], *SHAPE))
    monkeypatch.setattr("mono_quant.kernels.int8.int8_mm_refusal", lambda: "it died")
    assert INT8.supports(spec, CPU, torch.float32) == "it died"


def test_inside_a_layer_it_is_what_the_kernel_gives() -> None:
    made, x = layer(FLOATS["8-bit"], *SHAPE), noise(3, 1024)
    bias = dict(made.named_parameters())["bias"]
    with torch.no_grad(), kernels.use("int8"), kernels_run() as ran:
        found = made(x)
    assert set(ran.values()) == {"int8"}
    assert same_bits(found, run(INT8, made, x, bias))
