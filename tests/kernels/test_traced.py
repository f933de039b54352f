"""Products that are compiled: the integer product, and rows by themselves, as plain torch."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mono_quant import FloatCast, QuantizedLayer, Quantizer, kernel_bytes, kernels
from mono_quant.base import Kernel
from mono_quant.kernels import traced
from mono_quant.kernels.int4 import INT4, PANEL_BLOCKS
from mono_quant.kernels.integer import INTEGER
from mono_quant.kernels.ops import int4_panel, int_mm_refusal
from mono_quant.kernels.traced import BYTES_TRACED, INTEGER_TRACED, ROW_TRACED
from mono_quant.modules import layer as layer_module
from tests.helpers import noise, same_bits, stack_and_step
from tests.kernels.cases import (
    CPU,
    EPS,
    FLOATS,
    INTEGERS,
    STATIC,
    exact,
    layer,
    on_grid,
    run,
    spec_of,
)

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


@pytest.mark.parametrize("grid", FLOATS)
def test_float_inputs_are_the_digits_of_integer(grid: str) -> None:
    made = layer(FLOATS[grid], *SHAPE)
    for size in (1e-40, 1e-30, 1.0, 1e35):
        x = noise(5, 1040).clamp(-1, 1) * size
        found, expected = run(INTEGER_TRACED, made, x), run(INTEGER, made, x)
        assert torch.equal(found.isfinite(), expected.isfinite())
        here = expected.isfinite()
        assert ((found - expected)[here].abs() <= 3.1 * EPS * expected[here].abs()).all()
    for lost in (float("nan"), float("inf"), -float("inf")):
        x = noise(3, 1040)
        x[1, 7] = lost
        found = run(INTEGER_TRACED, made, x)
        assert found[1].isnan().all()
        assert same_bits(found[::2], run(INTEGER_TRACED, made, x[::2]))


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
        (four, INTEGER_TRACED, "not 8-bit"),
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
        if grid in INTEGERS or grid in FLOATS:
            assert same_bits(call(several), run(INTEGER_TRACED, made, several, bias))
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


def test_sums_of_codes_are_kept_for_a_trace_and_follow_what_is_loaded() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    made, other = (layer(INTEGERS["dynamic"], *SHAPE) for _ in range(2))
    other.packed_weights()["weight"].tensors["codes"].neg_()
    x, bias = noise(3, 1040), made.get_parameter("bias")
    call, others = torch.compile(made, fullgraph=True, backend=counter), other.state_dict()
    with torch.no_grad():
        assert same_bits(call(x), run(INTEGER_TRACED, made, x, bias))
        assert kernel_bytes(made) == 4 * 65
        assert kernel_bytes(copy.deepcopy(made)) == 0
        made.load_state_dict(others)
        expected = run(INTEGER_TRACED, other, x, bias)
        assert same_bits(call(x), expected)
        assert counter.frame_count == 1, "sums are found anew where they were"
        made.load_state_dict(copy.deepcopy(others), assign=True)
        assert same_bits(call(x), expected)
        assert made.double().float() is made
        assert kernel_bytes(made) == 0
        assert same_bits(call(x), expected)


def test_a_trace_of_other_codes_than_the_layers_own_goes_without_their_sums() -> None:
    torch.compiler.reset()
    made = layer(INTEGERS["dynamic"], *SHAPE)
    x, bias = noise(3, 1040), made.get_parameter("bias")
    state = {f"_orig_mod.{name}": one.clone() for name, one in made.state_dict().items()}
    state["_orig_mod.quantized_weights.weight.codes"].neg_()
    call = torch.compile(made, fullgraph=True, backend="eager")
    assert isinstance(call, nn.Module)
    with torch.no_grad():
        own = run(INTEGER_TRACED, made, x, bias)
        for _ in range(2):
            assert same_bits(call(x), own)
            negated = torch.func.functional_call(call, state, x)
            assert torch.allclose(negated - bias, bias - own, rtol=1e-5, atol=1e-6)


FOUR = {
    "float": Quantizer().bits(4),
    "float, symmetric": Quantizer().bits(4).symmetric(),
    "float, per channel": Quantizer().bits(4).granularity("channel"),
    "float, float zero points": Quantizer().bits(4).float_zero_point(),
    "dynamic": Quantizer().bits(4).activations("dynamic"),
    "dynamic symmetric": Quantizer().bits(4).activations("dynamic", symmetric=True),
}
PANELS = (128, 1024)
needs_panels = pytest.mark.skipif(isinstance(int4_panel(), str), reason=str(int4_panel()))


def of_bytes(made: QuantizedLayer, x: Tensor) -> Tensor:
    """Return what the product of bytes makes of a layer."""
    spec, weight = spec_of(made), made.packed_weights()["weight"]
    panels = BYTES_TRACED.arrange(spec, weight)
    return BYTES_TRACED.product(spec, x, panels, made.get_parameter("bias"))


@needs_panels
@pytest.mark.parametrize("grid", [name for name in FOUR if name.startswith("dynamic")])
def test_many_rows_are_products_with_the_nearest_bytes(grid: str) -> None:
    made = layer(FOUR[grid], *PANELS)
    spec, weight = spec_of(made), made.packed_weights()["weight"]
    panels = BYTES_TRACED.arrange(spec, weight)
    step, values = panels.byte_step().double(), stack_and_step(weight, 1024)[0][0].t()
    codes = (panels.decoded() / panels.byte_step()).round().double()
    assert codes.abs().max() <= 127
    assert ((codes * step - values).abs() <= (0.5 + 1e-4) * step).all()
    x = noise(7, 1024)
    assert spec.activation is not None
    exact = on_grid(spec.activation, x) @ (codes * step)
    with torch.no_grad():
        found = BYTES_TRACED.product(spec, x, panels, None)
        assert ((found - exact).abs() <= 3.1 * EPS * exact.abs() + 1e-37).all()
        x[3, 5] = float("nan")
        lost = BYTES_TRACED.product(spec, x, panels, None)
    assert lost.isnan().all(1).tolist() == [False] * 3 + [True] + [False] * 3


@needs_panels
@pytest.mark.parametrize("grid", FOUR)
@pytest.mark.parametrize("decoded", [False, True])
def test_four_bits_are_compiled_from_panels(
    grid: str, decoded: bool, compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "most_rows", lambda *spec: 0 if decoded else sys.maxsize)
    made = layer(FOUR[grid], *PANELS)
    call, bias = compiled(made), made.get_parameter("bias")
    eager: Kernel = PANEL_BLOCKS if decoded else INT4
    as_bytes = decoded and grid.startswith("dynamic")
    with torch.no_grad():
        for x in (noise(1, 1024), noise(1024), noise(2, 3, 1024)):
            found = call(x)
            with kernels.use(eager.name):
                expected = made(x)
            if as_bytes:
                expected = of_bytes(made, x)
            assert found.shape == expected.shape
            room = 1e-5 if decoded else 2.0**-8
            assert (found - expected).abs().max() <= room * (expected - bias).abs().max()
            if not decoded and grid.startswith("float"):
                assert same_bits(found, expected)
        assert call(noise(1, 1024)[:0]).shape == (0, 128)
        assert call(noise(2, 1024).to(torch.bfloat16)).dtype == torch.bfloat16
        lost = noise(2, 1024)
        lost[0, 3] = float("nan")
        assert call(lost).isnan().any(1).tolist() == [True, False]


@needs_panels
def test_panels_of_a_trace_follow_the_layer(compiled: Compile) -> None:
    made, other = (layer(FOUR["float"], *PANELS) for _ in range(2))
    other.packed_weights()["weight"].tensors["codes"].bitwise_xor_(3)
    call, x = compiled(made), noise(2, 1024)
    with torch.no_grad(), kernels.use("int4"):
        before, after = made(x), other(x)
    with torch.no_grad():
        assert same_bits(call(x), before)
        made.state_dict()  # puts canonical codes back
        assert same_bits(call(x), before)
        made.load_state_dict(other.state_dict())
        assert same_bits(call(x), after)
        with kernels.use("reference"):
            expected = other(x)
            torch.compiler.reset()
            assert same_bits(compiled(made)(x), expected)


@needs_panels
def test_what_may_not_be_in_panels_is_the_reference_in_a_trace(compiled: Compile) -> None:
    made = layer(FOUR["float"], *PANELS)
    made.packed_weights()["weight"].tensors["codes"].share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    x = noise(2, 1024)
    with torch.no_grad():
        found = compiled(made)(x)
        with kernels.use("reference"):
            assert same_bits(found, made(x))


@needs_panels
def test_few_rows_are_multiplied_at_once_as_long_as_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, slow_from = layer(FOUR["float"], *PANELS), [0]

    def seconds(pair: object, spec: object, device: object, dtype: object, rows: int) -> object:
        return {INT4.name: 1.0, PANEL_BLOCKS.name: 0.5 if rows >= slow_from[0] else 2.0}

    monkeypatch.setattr(traced, "seconds", seconds)
    found = []
    for first in (1, 8, 64, 512, 1024):
        slow_from[0] = first
        found.append(traced.most_rows(spec_of(made), CPU, torch.float32))
    assert found == [0, 1, 8, 64, sys.maxsize]


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


@needs_panels
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
@pytest.mark.parametrize("grid", ["float", "dynamic"])
@pytest.mark.parametrize("decoded", [False, True])
def test_inductor_computes_from_panels(
    grid: str, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "most_rows", lambda *spec: 0 if decoded else sys.maxsize)
    made = layer(FOUR[grid], *PANELS)
    torch.compiler.reset()
    call = torch.compile(made, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 3):
            x = noise(rows, 1024)
            found = call(x)
            with kernels.use((PANEL_BLOCKS if decoded else INT4).name):
                expected = of_bytes(made, x) if decoded and grid == "dynamic" else made(x)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
