"""The kernel of float16 weights: torch's own product on weights that were packed for it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from mono_quant import FloatCast, PackedTensor, QuantizedLayer, Quantizer, kernel_bytes, kernels
from mono_quant.base import KernelSpec
from mono_quant.kernels import REFERENCE, Fp16, ops, trial
from mono_quant.kernels.ops import fp16_refusal
from mono_quant.modules import QuantizedWeight
from mono_quant.modules.layer import kernels_run
from mono_quant.numerics.values import Layout
from mono_quant.operations import MatrixProduct
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, EPS, ROWS, SHAPES, Largest, exact, layer, run, spec_of

pytestmark = pytest.mark.skipif(fp16_refusal() is not None, reason=str(fp16_refusal()))

FP16 = Fp16()
BITS16 = Quantizer().bits(16)
SHAPE = (120, 1500)
IN_PIECES = (300, 1500)
"""Packed in three pieces, the last one smaller and no whole panel."""


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mono_quant.kernels.fp16._PIECE", 1 << 18)


def cast(codes: Tensor) -> tuple[KernelSpec, PackedTensor]:
    """Return float16 codes ``[out, in]`` as a weight, and what is asked of a kernel for it."""
    layout = Layout.grouped(tuple(codes.shape))
    weight = PackedTensor({"codes": codes[None]}, FloatCast(), layout, torch.float32)
    return KernelSpec(MatrixProduct(), weight.scheme, layout), weight


def holder(made: QuantizedLayer) -> QuantizedWeight:
    found = made.quantized_weights["weight"]
    assert isinstance(found, QuantizedWeight)
    return found


def held(made: nn.Module) -> bool:
    """Return whether the codes of a layer are packed."""
    assert isinstance(made, QuantizedLayer)
    return holder(made)._buffers["codes"] is None


@pytest.fixture
def ran() -> Iterator[QuantizedLayer]:
    """Return a layer whose codes are packed, while the kernel is in use."""
    made = layer(BITS16, *SHAPE)
    with kernels.use("fp16"), torch.no_grad():
        made(noise(1, SHAPE[1]))
        assert held(made)
        yield made


# --- the product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES.values(), SHAPE, IN_PIECES, (4096, 512), (33, 4097)])
def test_it_is_the_product_of_what_the_codes_say(shape: tuple[int, int]) -> None:
    made = layer(BITS16, *shape)
    for rows in ROWS[: 2 if shape[1] == 1 else None]:
        x = noise(rows, shape[1], seed=rows)
        expected, size = exact(made, x)
        room = EPS * (8 + shape[1] ** 0.5) * size  # a sum's errors are of random sign
        assert ((run(FP16, made, x) - expected).abs() <= room + 1e-37).all()


@pytest.mark.parametrize("shape", [*SHAPES.values(), SHAPE, IN_PIECES])
def test_sums_that_float32_holds_are_exact(shape: tuple[int, int]) -> None:
    spec, weight = cast(torch.randint(-64, 65, shape).to(torch.float16) / 8)
    x = torch.randint(-4, 5, (17, shape[1])).float()
    expected = x.double() @ weight.tensors["codes"][0].double().t()
    assert same_bits(FP16(spec, x, weight, None), expected.float())


def test_inputs_keep_all_digits_of_float32() -> None:
    made = layer(BITS16, *SHAPE)
    x = noise(5, SHAPE[1])
    assert not torch.equal(run(FP16, made, x), run(FP16, made, x.half().float()))
    single = torch.zeros(SHAPE[1], SHAPE[1]).fill_diagonal_(1 + 2.0**-20)
    values = made.packed_weights()["weight"].dequantize().t()
    found = run(FP16, made, single)
    assert same_bits(found + 0, values * (1 + 2.0**-20) + 0)  # no minus zero among sums


@pytest.mark.parametrize("shape", [SHAPE, IN_PIECES])
def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept(shape: tuple[int, int]) -> None:
    made, length = layer(BITS16, *shape), shape[1]
    bias, x = noise(shape[0], seed=9), noise(2, 3, length)
    plain = run(FP16, made, x)
    assert plain.shape == (2, 3, shape[0])
    assert plain.dtype == torch.float32
    assert same_bits(run(FP16, made, x, bias), plain + bias)
    assert torch.allclose(run(FP16, made, x[0, 0]), plain[0, 0], rtol=1e-4, atol=1e-4)
    assert run(FP16, made, x[0, 0]).shape == (shape[0],)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert same_bits(run(FP16, made, half), run(FP16, made, half.float()).to(dtype))
    assert same_bits(run(FP16, made, torch.stack([x, x], -1)[..., 0]), plain)
    assert same_bits(run(FP16, made, x.transpose(0, 1).contiguous().transpose(0, 1)), plain)
    assert run(FP16, made, x[:0]).shape == (0, 3, shape[0])
    with pytest.raises(RuntimeError, match=f"rows are {length}"):
        run(FP16, made, noise(2, length - 1))
    with pytest.raises(RuntimeError, match=f"rows are {length}"):
        run(FP16, made, torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(65, 1040), (130, 513), IN_PIECES])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_of_floats(shape: tuple[int, int], value: float) -> None:
    rows, length = shape
    codes = torch.randint(-3, 4, shape).to(torch.float16)
    codes[:, -1] = torch.arange(rows) % 3 - 1  # of the column that is padded behind
    spec, weight = cast(codes)
    x = torch.randint(-2, 3, (20, length)).float()
    x[1, 5], x[18, -1], x[19, -2:] = value, value, value
    expected = functional.linear(x.double(), codes.double()).float()
    assert not expected[[1, 18, 19]].isfinite().all()
    assert same_bits(FP16(spec, x, weight, None).nan_to_num(7), expected.nan_to_num(7))


def test_the_default_dtype_has_no_say() -> None:
    made, x = layer(BITS16, *SHAPE), noise(3, SHAPE[1])
    expected = run(FP16, made, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run(FP16, made, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found, expected)


class Attention(nn.Module):
    """Attends to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(512, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return found


def test_projections_of_attention_are_such_products() -> None:
    source = Attention().eval()
    model = BITS16.only("*").apply(source, progress=False).model
    x = noise(2, 7, 512)
    with torch.no_grad():
        expected = model(x)  # by whatever kernel
        with kernels.use("reference"):
            plain = model(x)
        with kernels.use("fp16"), kernels_run() as seen:
            found = model(x)
    assert set(seen.values()) == {"fp16"}
    assert torch.allclose(found, plain, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_whose_rows_are_inputs_is_packed_by_its_columns() -> None:
    codes = noise(520, 512).to(torch.float16)
    spec, weight = cast(codes)
    transposed = KernelSpec(MatrixProduct(transposed=True), spec.scheme, spec.layout)
    assert FP16.supports(transposed, CPU, torch.float32) is None
    x = noise(3, 512)
    assert same_bits(FP16(transposed, x, weight, None), FP16(spec, x, weight, None))


# --- the packed weight ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [((62, 1024), 1), ((1024, 62), 1), ((31, 2048), 1), ((1, 63488), 1), ((1240, 4096), 20)],
)
def test_every_finite_float16_is_given_back_to_the_bit(shape: tuple[int, int], pieces: int) -> None:
    patterns = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    patterns = patterns[patterns.isfinite()]
    assert len(patterns) == 63488, "subnormals and both zeros among them"
    codes = patterns.repeat(shape[0] * shape[1] // len(patterns)).reshape(shape)
    spec, weight = cast(codes)
    packed = FP16.arrange(spec, weight)
    assert len(packed.pieces) == pieces
    again = packed.canonical()
    assert again.is_contiguous()
    assert same_bits(again, codes[None])


def test_no_float_copy_of_the_weight_is_made() -> None:
    made = layer(BITS16, 1024, 1024)
    weight = made.packed_weights()["weight"]
    with Largest() as seen:
        packed = FP16.arrange(spec_of(made), weight)
    assert 0 < seen.size <= 1 << 18
    with Largest() as seen, torch.no_grad():
        FP16.product(spec_of(made), noise(3, 1024), packed, None)
    assert 0 < seen.size <= 3 * 1024


@pytest.mark.parametrize("shape", [SHAPE, IN_PIECES])
def test_bytes_that_fill_panels_up_are_counted(shape: tuple[int, int]) -> None:
    rows, length = shape
    made = layer(BITS16, *shape)
    pieces = FP16.arrange(spec_of(made), made.packed_weights()["weight"]).pieces
    assert len(pieces) == (1 if shape == SHAPE else 3)
    with torch.no_grad(), kernels.use("fp16"):
        made(noise(1, length))
    packed = 2 * (rows + -rows % 32) * (length + -length % 512)
    assert kernel_bytes(made) == packed - 2 * rows * length
    made.state_dict()
    assert kernel_bytes(made) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_left_as_it_is(
    ran: QuantizedLayer, bad: float, capfd: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor.clone() for name, tensor in ran.state_dict().items()}
    codes = state["quantized_weights.weight.codes"]
    codes[0, 2, 1] = bad
    ran.load_state_dict(state)
    x = noise(3, SHAPE[1])
    for _ in range(2):
        found = ran(x)
        assert not found[:, 2].isfinite().any()
        assert found[:, 3:].isfinite().all()
        with kernels.use("reference"):
            assert torch.allclose(found, ran(x), rtol=1e-4, atol=1e-4, equal_nan=True)
        assert same_bits(ran.state_dict()["quantized_weights.weight.codes"], codes)
    assert kernel_bytes(ran) == 0
    assert capfd.readouterr().err == "", "torch warns of values that it changes"


def test_another_engine_is_a_refusal_and_changes_no_result() -> None:
    made = layer(BITS16, *SHAPE)
    x = noise(3, SHAPE[1])
    before = torch.backends.quantized.engine
    with torch.no_grad(), kernels.use("fp16"):
        expected = made(x)
        made.state_dict()
        try:
            torch.backends.quantized.engine = "onednn"
            assert "engine is onednn" in str(FP16.supports(spec_of(made), CPU, torch.float32))
            found = made(x)  # the kernel was chosen before
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
            made.state_dict()
        finally:
            torch.backends.quantized.engine = before
        assert same_bits(made(x), expected)


@pytest.mark.parametrize(
    ("quantizer", "shape", "why"),
    [
        (Quantizer().bits(4), (128, 768), "4-bit"),
        (Quantizer().scheme(FloatCast(torch.bfloat16)), SHAPE, "bfloat16"),
        (BITS16, (300, 300), "filled up by 82%"),
        (BITS16, (64, 64), "too few"),
    ],
)
def test_it_says_why_it_cannot(quantizer: Quantizer, shape: tuple[int, int], why: str) -> None:
    spec = spec_of(layer(quantizer, *shape))
    assert why in str(FP16.supports(spec, CPU, torch.float32))
    assert "float64" in str(FP16.supports(spec, CPU, torch.float64))
    assert "cuda" in str(FP16.supports(spec, torch.device("cuda"), torch.float32))


@pytest.mark.parametrize("shape", [SHAPE, (384, 384), (30522, 384), (768, 768), (50257, 1024)])
def test_common_shapes_are_not_refused(shape: tuple[int, int]) -> None:
    layout = Layout.grouped(shape)
    spec = KernelSpec(MatrixProduct(), FloatCast(), layout)
    assert FP16.supports(spec, CPU, torch.float32) is None
    assert FP16.supports(spec, CPU, torch.bfloat16) is None


def test_a_machine_without_the_product_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(BITS16, *SHAPE)
    monkeypatch.setattr(ops, "refusal", lambda name, program: f"{name} failed")
    assert FP16.supports(spec_of(made), CPU, torch.float32) == (
        "the product with packed float16 weights failed"
    )
    monkeypatch.undo()
    wrong = ops._FP16_TRIAL.replace("(weight.float(), None)", "(weight.float() * 0.999, None)")
    assert wrong != ops._FP16_TRIAL
    assert "other weights" in str(trial.refusal("a product that rounds", wrong))


# --- who follows what is computed ----------------------------------------------------------------


def traced(made: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = make_fx(made)(x)(x)
    return found


def faked(made: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = made(mode.from_tensor(x)).shape
    found: Tensor = made(x)
    assert found.shape == shape
    with kernels.use("reference"):
        again: Tensor = made(x)
    return again


def mapped(made: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.vmap(made)(x)
    return found


def pushed(made: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.func.jvp(made, (x,), (x,))[0]
    return found


def differentiated(made: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        found: Tensor = made(x)
        assert torch.autograd.grad(found.sum(), x)[0].shape == x.shape
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("how", [traced, faked, mapped, pushed, differentiated])
def test_those_who_follow_get_the_reference_on_unpacked_codes(
    ran: QuantizedLayer, how: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    x = noise(3, SHAPE[1])
    weight = ran.packed_weights()["weight"]
    expected = REFERENCE(spec_of(ran), x, weight, ran.get_parameter("bias"))
    del weight
    ran(x)
    assert held(ran)
    assert torch.allclose(how(ran, x), expected, rtol=1e-5, atol=1e-5)
    assert held(ran), "codes are packed still"


def test_a_compiled_weight_stays_canonical(ran: QuantizedLayer) -> None:
    torch.compiler.reset()
    x = noise(3, SHAPE[1])
    with kernels.use("reference"):
        expected = ran(x)
    compiled = torch.compile(ran, fullgraph=True, backend="eager")
    assert held(ran)
    assert same_bits(compiled(x), expected)
    assert not held(ran)
    ran(x)
    assert not held(ran)
    assert same_bits(compiled(x), expected)


def test_a_model_is_compiled_once_whatever_runs_between(ran: QuantizedLayer) -> None:
    torch.compiler.reset()
    model = nn.Sequential(*(layer(BITS16, 512, 512) for _ in range(3)))
    x = noise(3, 512)
    with kernels.use("reference"):
        expected = model(x)
    model(x)
    assert all(map(held, model))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        assert same_bits(compiled(x), expected)
        model(x)
    assert counter.frame_count == 1


def test_layers_that_are_compiled_one_by_one_share_what_is_compiled(ran: QuantizedLayer) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    layers = [layer(BITS16, *SHAPE) for _ in range(10)]
    x = noise(3, SHAPE[1])
    for one in layers:
        one(x)
        one.compile(fullgraph=True, backend=counter)
    for one in layers:
        one(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_may_be_packed_again(ran: QuantizedLayer, strict: bool) -> None:
    x = noise(3, SHAPE[1])
    y = ran(x)
    program = torch.export.export(ran, (x,), strict=strict)
    assert torch.allclose(program.module()(x), y, rtol=1e-4, atol=1e-4)
    assert same_bits(ran(x), y)
    assert held(ran)
