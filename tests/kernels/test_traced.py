"""Products that are compiled: the integer product, and rows by themselves, as plain torch."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import FloatCast, QuantizedLayer, Quantizer, kernels
from mono_quant.kernels.ops import int_mm_refusal
from mono_quant.kernels.traced import INTEGER_TRACED, ROW_TRACED
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, EPS, FLOATS, INTEGERS, STATIC, exact, layer, run, spec_of

pytestmark = pytest.mark.skipif(int_mm_refusal() is not None, reason=str(int_mm_refusal()))

BY_ROW = {
    **FLOATS,
    "fp16": Quantizer().bits(16),
    "bf16": Quantizer().scheme(FloatCast(torch.bfloat16)),
}
SHAPE = (65, 1040)
Compile = Callable[[nn.Module], Callable[[Tensor], Tensor]]


@pytest.fixture
def compiled() -> Compile:
    """Return what compiles a whole layer into plain calls of torch."""
    torch.compiler.reset()
    return lambda model: torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("grid", INTEGERS)
@pytest.mark.parametrize("shape", [SHAPE, (7, 10001)])
def test_sums_of_codes_are_exact(grid: str, shape: tuple[int, int]) -> None:
    made = layer(INTEGERS[grid], *shape)
    assert INTEGER_TRACED.supports(spec_of(made), CPU, torch.float32) is None
    for rows in (1, 2, 17):
        x = noise(rows, shape[1], seed=rows) * torch.logspace(-3, 3, rows)[:, None]
        expected, _ = exact(made, x)
        found = run(INTEGER_TRACED, made, x)
        assert ((found - expected).abs() <= 3.1 * EPS * expected.abs() + 1e-37).all()


@pytest.mark.parametrize("grid", BY_ROW)
def test_a_row_is_multiplied_and_summed_in_float32(grid: str) -> None:
    made = layer(BY_ROW[grid], *SHAPE)
    assert ROW_TRACED.supports(spec_of(made), CPU, torch.float32) is None
    x, bias = noise(1, 1040), noise(65)
    expected, size = exact(made, x)
    found = run(ROW_TRACED, made, x)
    room = 64 * EPS * size  # pairwise sums of 1040 values, and as many of what zero points take off
    assert ((found - expected).abs() <= room).all()
    assert same_bits(run(ROW_TRACED, made, x, bias), found + bias)
    assert same_bits(run(ROW_TRACED, made, x[0]), found[0])


def test_what_they_cannot() -> None:
    four, floats = layer(Quantizer().bits(4), 64, 1024), layer(FLOATS["8-bit"], *SHAPE)
    dynamic = layer(INTEGERS["dynamic"], *SHAPE)
    for made, kernel, why in (
        (floats, INTEGER_TRACED, "inputs are float"),
        (four, INTEGER_TRACED, "inputs are float"),
        (four, ROW_TRACED, "not 8-bit"),
        (dynamic, ROW_TRACED, "inputs are dynamic"),
    ):
        assert why in str(kernel.supports(spec_of(made), CPU, torch.float32))
    assert "float64" in str(INTEGER_TRACED.supports(spec_of(dynamic), CPU, torch.float64))
    assert "float64" in str(ROW_TRACED.supports(spec_of(floats), CPU, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [*INTEGERS, *BY_ROW])
def test_compiled_layers_use_them(grid: str, compiled: Compile) -> None:
    made = layer({**INTEGERS, **BY_ROW}[grid], *SHAPE)
    bias = made.get_parameter("bias")
    call = compiled(made)
    kernel = INTEGER_TRACED if grid in INTEGERS else ROW_TRACED
    with torch.no_grad():
        for x in (noise(1, 1040), noise(1, 1, 1040), noise(1040)):
            assert same_bits(call(x), run(kernel, made, x, bias))
        several = noise(3, 1040)
        if grid in INTEGERS:
            assert same_bits(call(several), run(kernel, made, several, bias))
            assert call(several[:0]).shape == (0, 65)
        else:
            with kernels.use("reference"):
                assert same_bits(call(several), made(several))
        half = noise(2, 1040).to(torch.bfloat16)
        assert call(half).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["dynamic", "8-bit"])
def test_compiled_layers_see_other_weights(grid: str, compiled: Compile) -> None:
    made = layer({**INTEGERS, **FLOATS}[grid], *SHAPE)
    call, x = compiled(made), noise(1, 1040)
    other = copy.deepcopy(made)
    other.packed_weights()["weight"].tensors["codes"].neg_()
    with torch.no_grad():
        before = call(x)
        made.load_state_dict(other.state_dict())
        kernel = INTEGER_TRACED if grid == "dynamic" else ROW_TRACED
        after = call(x)
        assert same_bits(after, run(kernel, made, x, made.get_parameter("bias")))
        assert not same_bits(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["dynamic", "static"])
def test_nan_is_not_lost(grid: str, compiled: Compile) -> None:
    made = layer(INTEGERS[grid], *SHAPE)
    x = noise(3, 1040)
    x[1, 7] = float("nan")
    with torch.no_grad():
        found = compiled(made)(x)
        assert found[1].isnan().all()
        assert same_bits(found[::2], run(INTEGER_TRACED, made, x[::2], made.get_parameter("bias")))


@pytest.mark.slow
def test_who_wants_gradients_or_names_a_kernel_gets_the_reference(compiled: Compile) -> None:
    made: QuantizedLayer = layer(INTEGERS["dynamic"], *SHAPE)
    x = noise(2, 1040)
    with torch.no_grad(), kernels.use("reference"):
        expected = made(x)
        assert same_bits(compiled(made)(x), expected)
    torch.compiler.reset()
    y = compiled(made)(x.requires_grad_())
    assert same_bits(y.detach(), expected)
    y.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert x.grad is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
@pytest.mark.parametrize("grid", ["dynamic", "dynamic symmetric", "8-bit asymmetric", "fp16"])
def test_inductor_computes_the_same(grid: str) -> None:
    made = layer({**INTEGERS, **BY_ROW}[grid], *SHAPE)
    torch.compiler.reset()
    call = torch.compile(made, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 3):
            x = noise(rows, 1040)
            bias = made.get_parameter("bias").double()
            expected, size = exact(made, x)
            found = call(x)
            assert ((found - expected - bias).abs() <= 64 * EPS * (size + bias.abs())).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
@pytest.mark.parametrize("grid", ["dynamic", "static", "asymmetric weight"])
def test_inductor_keeps_integers_beyond_what_floats_hold(grid: str) -> None:
    """Sums of 25 bits, of which zero points take nearly all away."""
    source = nn.Linear(1040, 65, bias=False)
    source.weight.data = noise(65, 1040).abs() * 0.05 + 1
    x = -(noise(3, 1040).abs() * 1e-3)
    x[:, 0] = -1
    quantizer = INTEGERS[grid]
    fitted = quantizer.fit(x) if quantizer in STATIC else quantizer
    made = fitted.only("*").apply(source, progress=False).model
    assert isinstance(made, QuantizedLayer)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(made, fullgraph=True)(x)
    expected, _ = exact(made, x)
    codes = made.packed_weights()["weight"].tensors["codes"]
    assert int(codes.long().sum(-1).max()) * 250 > 1 << 24
    assert ((found - expected).abs() <= 3.1 * EPS * expected.abs()).all()
