"""Integer convolutions: their sums are exact, so results are known but for a few roundings."""

import copy
import math

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.base import KernelSpec
from mono_quant.kernels import IntegerConvolution, PackedConvolution, quantized
from mono_quant.kernels.convolution import Taps
from mono_quant.kernels.digits import Digits, Factor
from mono_quant.kernels.onednn import refuse_conv
from mono_quant.kernels.packed_convolution import PackedTaps
from mono_quant.modules import QuantizedWeight
from mono_quant.operations import Convolution
from tests.helpers import dense, noise, same_bits
from tests.kernels.cases import CPU, EPS, INTEGERS, STATIC, on_grid

KERNEL, PACKED = IntegerConvolution(), PackedConvolution()
ZERO = torch.zeros((), dtype=torch.float64)
CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(24, 16, 11, padding=5), (3, 24, 50)),
    "2d": (nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 12)),
    "many positions": (nn.Conv2d(8, 64, 3, padding=1), (2, 8, 40, 33)),
    "strided": (nn.Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 9, 12)),
    "one by one": (nn.Conv2d(64, 65, 1), (2, 64, 5, 7)),
    "one by one, strided": (nn.Conv2d(64, 65, 1, stride=2), (2, 64, 5, 7)),
    "oblong": (nn.Conv2d(16, 32, (3, 5), stride=(1, 2), padding=(0, 2)), (1, 16, 9, 12)),
    "dilated": (nn.Conv2d(16, 32, 3, dilation=(2, 3), padding=3), (2, 16, 9, 12)),
    "same": (nn.Conv2d(16, 32, 4, padding="same", dilation=2), (2, 16, 9, 12)),
    "valid": (nn.Conv2d(16, 32, 4, padding="valid", bias=False), (2, 16, 9, 12)),
    "reflected": (nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"), (2, 16, 9, 12)),
    "flat": (nn.Conv2d(16, 32, (1, 9)), (2, 16, 1, 100)),
    "flat, strided": (nn.Conv2d(16, 32, (2, 9), stride=(1, 2), padding=1), (2, 16, 3, 100)),
    "3d": (nn.Conv3d(8, 20, 3, padding=(1, 0, 1), stride=(1, 2, 1)), (2, 8, 5, 6, 7)),
}
GROUPED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "grouped": (nn.Conv2d(48, 96, 3, groups=3, padding=1, dilation=(1, 2)), (2, 48, 9, 12)),
    "depthwise": (nn.Conv2d(40, 40, 5, groups=40, padding=2, stride=2), (2, 40, 9, 12)),
    "two a channel": (nn.Conv2d(40, 80, 3, groups=40, bias=False), (2, 40, 9, 12)),
    "1d, grouped": (nn.Conv1d(40, 20, 7, groups=4, padding="same"), (2, 40, 19)),
}
needs_packed = pytest.mark.skipif(refuse_conv() is not None, reason=str(refuse_conv()))
BOTH = [
    *(pytest.param("integer", name) for name in CONVOLUTIONS),
    *(
        pytest.param("onednn", name, marks=needs_packed)
        for name in {**CONVOLUTIONS, **GROUPED}
        if name not in ("3d", "same")
    ),
]
EITHER = pytest.mark.parametrize("kernel", ["integer", pytest.param("onednn", marks=needs_packed)])


@attrs.frozen
class Case:
    """A float convolution whose output channels differ in size, quantized, and inputs for it."""

    source: nn.Module
    made: QuantizedLayer
    x: Tensor

    @classmethod
    def of(cls, name: str, quantizer: Quantizer) -> "Case":
        module, shape = {**CONVOLUTIONS, **GROUPED}[name]
        source, x = copy.deepcopy(module), inputs(shape)
        with torch.no_grad():
            weight = source.get_parameter("weight")
            flat = weight.view(len(weight), -1)
            flat.copy_(noise(*flat.shape) * torch.logspace(-2, 1, len(weight))[:, None])
        fitted = quantizer.fit(x) if quantizer in STATIC else quantizer
        made = fitted.only("*").apply(source, progress=False).model
        assert isinstance(made, QuantizedLayer)
        return cls(source, made, x)

    @property
    def bias(self) -> Tensor:
        """In float64, shaped to meet the result."""
        bias = getattr(self.source, "bias", None)
        ones = (1,) * (self.x.dim() - 2)
        return bias.detach().double().reshape(-1, *ones) if isinstance(bias, Tensor) else ZERO

    def exact(self) -> Tensor:
        """Return the convolution in float64 without its bias."""
        return self.convolved(dense(self.made, self.source))

    def parts(self) -> Tensor:
        """Return the sizes of the product with the codes, and with what of them means zero."""
        packed = self.made.packed_weights()["weight"]
        zero = packed.tensors["zero_point"].double().reshape(-1, 1)
        scale = packed.tensors["scale"].double().reshape(-1, 1)
        whole = dense(self.made, self.source)
        zeros = (zero * scale).expand(len(whole), whole[0].numel()).reshape(whole.shape)
        return self.convolved(whole + zeros).abs() + self.convolved(zeros).abs()

    def convolved(self, weight: Tensor) -> Tensor:
        """Return the convolution of the inputs on their grid with a float64 weight."""
        source, x = self.source, self.x
        assert isinstance(source, nn.modules.conv._ConvNd)
        activation = self.made.activations()["weight"]
        rows, padding = on_grid(activation, x.flatten(1)).reshape(x.shape), source.padding
        if source.padding_mode != "zeros":
            around = source._reversed_padding_repeated_twice
            rows, padding = functional.pad(rows, around, mode=source.padding_mode), (0,)
        convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.dim()]
        found: Tensor = convolve(
            rows, weight, None, source.stride, padding, source.dilation, source.groups
        )
        return found


def inputs(shape: tuple[int, ...]) -> Tensor:
    """Return samples that differ in size and lie on one side of zero."""
    factors = torch.logspace(-1, 1, shape[0]).reshape(-1, *(1 for _ in shape[1:]))
    return noise(*shape, seed=3).abs() * factors - 0.1


@torch.no_grad()
def run(made: nn.Module, x: Tensor, name: str = "integer") -> Tensor:
    """Return what a layer makes of `x` by the kernel of that name."""
    with kernels.use(name):
        found = made(x)
    assert isinstance(found, Tensor)
    return found


def holder(made: QuantizedLayer) -> QuantizedWeight:
    found = made.quantized_weights["weight"]
    assert isinstance(found, QuantizedWeight)
    return found


def holds_taps(made: QuantizedLayer) -> bool:
    held = holder(made)._held
    return held is not None and isinstance(held.arranged, Taps | PackedTaps)


@pytest.mark.parametrize(("kernel", "name"), BOTH)
@pytest.mark.parametrize("grid", INTEGERS)
def test_only_the_scales_and_the_bias_round(kernel: str, name: str, grid: str) -> None:
    case = Case.of(name, INTEGERS[grid])
    expected = case.exact()
    found = run(case.made, case.x, kernel)
    assert holds_taps(case.made)
    assert found.is_contiguous()
    room = 3.1 * EPS * expected.abs() + EPS * (expected + case.bias).abs()
    if (kernel, grid) == ("onednn", "asymmetric weight"):  # two products of floats
        room += 4.1 * EPS * (case.parts() + case.bias.abs())
    assert ((found - (expected + case.bias)).abs() <= room + 1e-37).all()


@EITHER
@pytest.mark.parametrize("grid", ["dynamic", "static"])
def test_results_lie_in_memory_as_inputs_do(kernel: str, grid: str) -> None:
    case = Case.of("2d", INTEGERS[grid])
    x = case.x.contiguous(memory_format=torch.channels_last)
    first, last = run(case.made, case.x, kernel), run(case.made, x, kernel)
    assert first.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(first, last.contiguous())
    strided = torch.stack([case.x, case.x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(run(case.made, strided, kernel), first)


@EITHER
def test_a_sample_alone_and_other_dtypes(kernel: str) -> None:
    for name in ("1d", "2d", "3d") if kernel == "integer" else ("1d", "2d", "1d, grouped"):
        case = Case.of(name, INTEGERS["dynamic"])
        found = run(case.made, case.x, kernel)
        assert same_bits(run(case.made, case.x[1], kernel), found[1])
        for dtype in (torch.float16, torch.bfloat16):
            half = case.x.to(dtype)
            assert same_bits(
                run(case.made, half, kernel), run(case.made, half.float(), kernel).to(dtype)
            )
        assert run(case.made, case.x[:0], kernel).shape == (0, *found.shape[1:])


@EITHER
@pytest.mark.parametrize("grid", ["dynamic", "static"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_the_reference(kernel: str, grid: str, value: float) -> None:
    case = Case.of("2d", INTEGERS[grid])
    run(case.made, case.x, kernel)
    x = case.x.clone()
    x[1, 3, 4, 5] = value
    found = run(case.made, x, kernel)
    assert same_bits(found, run(case.made, x, "reference"))
    assert holds_taps(case.made), "the order of codes is left"
    assert found[0].isfinite().all()


@EITHER
def test_huge_inputs_overflow_where_the_result_does(kernel: str) -> None:
    case = Case.of("2d", INTEGERS["dynamic"])
    x = torch.zeros_like(case.x)
    x[:, 3, 4, 5] = 1e37
    expected = run(case.made, x, "reference")
    assert expected.isfinite().all()
    torch.testing.assert_close(run(case.made, x, kernel), expected, rtol=1e-5, atol=0)


@EITHER
def test_attributes_may_be_numbers_and_lists_as_for_torch(kernel: str) -> None:
    case = Case.of("valid", INTEGERS["dynamic"])
    for name, values in (
        ("padding", (1, [2, 1], (1,))),
        ("stride", (2, [1, 2])),
        ("dilation", (2,)),
    ):
        for value in values:
            setattr(case.source, name, value)
            setattr(case.made, name, value)
            torch.testing.assert_close(run(case.made, case.x, kernel), case.exact().float())


@pytest.mark.parametrize("name", ["flat", "flat, strided", "3d"])
def test_long_lines_are_done_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of(name, INTEGERS["dynamic"])
    expected = run(case.made, case.x)
    monkeypatch.setattr("mono_quant.kernels.convolution._LONG", 1)
    monkeypatch.setattr("mono_quant.kernels.convolution.AT_ONCE", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    most: list[int] = []
    product = Factor.product

    def noted(self: Factor, x: Digits, out: Tensor) -> None:
        most.append(len(x.digits))
        product(self, x, out)

    monkeypatch.setattr(Factor, "product", noted)
    assert same_bits(run(case.made, case.x), expected)
    assert max(most) <= 16


@EITHER
def test_the_default_dtype_and_device_have_no_say(kernel: str) -> None:
    case = Case.of("2d", INTEGERS["dynamic"])
    expected = run(case.made, case.x, kernel)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            found = run(case.made, case.x, kernel)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found, expected)


@EITHER
def test_zeros_give_the_bias(kernel: str) -> None:
    for quantizer in INTEGERS.values():
        case = Case.of("2d", quantizer)
        found = run(case.made, torch.zeros_like(case.x), kernel)
        assert same_bits(found, case.bias.float().expand_as(found).contiguous())


@EITHER
def test_codes_are_held_once_and_files_have_them_in_their_own_order(kernel: str) -> None:
    for name in ("2d", "one by one"):
        case = Case.of(name, INTEGERS["dynamic"])
        before = {key: tensor.clone() for key, tensor in case.made.state_dict().items()}
        expected = run(case.made, case.x, kernel)
        weight = holder(case.made)
        assert weight.kernel_bytes == 4 * expected.shape[1]
        twin = copy.deepcopy(case.made)
        assert same_bits(weight.peek().tensors["codes"], before["quantized_weights.weight.codes"])
        after = case.made.state_dict()
        assert list(after) == list(before)
        assert all(same_bits(after[key], before[key]) for key in before)
        assert same_bits(run(twin, case.x, kernel), expected)
        other = Case.of(name, INTEGERS["dynamic"]).made
        with torch.no_grad():
            holder(other).packed.tensors["codes"].sub_(1)
        case.made.load_state_dict(other.state_dict())
        assert same_bits(run(case.made, case.x, kernel), run(other, case.x, kernel))


@EITHER
def test_inputs_that_do_not_fit_are_refused_as_by_torch(kernel: str) -> None:
    case = Case.of("2d", INTEGERS["dynamic"])
    for shape in ((2, 15, 9, 12), (2, 17, 9, 12), (2, 16, 0, 12), (16, 9), (1, 2, 16, 9, 12)):
        with pytest.raises(RuntimeError):
            run(case.source, torch.ones(shape))
        with pytest.raises(RuntimeError):
            run(case.made, torch.ones(shape), kernel)
    valid = Case.of("valid", INTEGERS["dynamic"])
    with pytest.raises(RuntimeError, match=r"\[2, 16, 3, 12\]"):
        run(valid.made, torch.ones(2, 16, 3, 12), kernel)


@EITHER
def test_gradients_and_compilers_get_the_reference(kernel: str) -> None:
    case = Case.of("2d", INTEGERS["static"])
    x = case.x.clone().requires_grad_()
    with kernels.use(kernel):
        case.made(x).sum().backward()
    assert x.grad is not None
    run(case.made, case.x, kernel)
    torch.compiler.reset()
    with torch.no_grad(), kernels.use(kernel):
        compiled = torch.compile(case.made, fullgraph=True, backend="eager")(case.x)
    assert same_bits(compiled, run(case.made, case.x, "reference"))


def reason(
    source: nn.Module,
    quantizer: Quantizer,
    dtype: torch.dtype = torch.float32,
    kernel: IntegerConvolution | PackedConvolution = KERNEL,
) -> str:
    made = quantizer.only("*").apply(source, progress=False).model
    assert isinstance(made, QuantizedLayer)
    assert isinstance(source, nn.modules.conv._ConvNd)
    weight = made.packed_weights()["weight"]
    operation = Convolution(source.stride, source.padding, source.dilation, source.groups)
    activation = made.activations().get("weight")
    spec = KernelSpec(operation, weight.scheme, weight.layout, activation)
    return str(kernel.supports(spec, CPU, dtype))


def test_it_says_why_it_cannot() -> None:
    dynamic = INTEGERS["dynamic"]
    assert reason(nn.Conv2d(16, 32, 3), dynamic) == "None"
    assert "2 groups" in reason(nn.Conv2d(64, 64, 3, groups=2), dynamic)
    assert "float" in reason(nn.Conv2d(16, 32, 3), Quantizer().activations(None))
    assert "too few" in reason(nn.Conv2d(4, 32, 3), dynamic)
    assert "too short" in reason(nn.Conv2d(16, 512, 1), dynamic)
    assert "float64" in reason(nn.Conv2d(16, 32, 3), dynamic, torch.float64)
    assert "4-bit" in reason(nn.Conv2d(16, 64, 3), dynamic.bits(4).activations("dynamic"))


@needs_packed
def test_the_packed_one_says_why_it_cannot() -> None:
    def why(source: nn.Module, quantizer: Quantizer, dtype: torch.dtype = torch.float32) -> str:
        return reason(source, quantizer, dtype, PACKED)

    dynamic = INTEGERS["dynamic"]
    assert why(nn.Conv2d(64, 64, 3, groups=64), dynamic) == "None"
    assert "float" in why(nn.Conv2d(16, 32, 3), Quantizer().activations(None))
    assert "too few" in why(nn.Conv2d(4, 5, 3), dynamic)
    assert "one or two dimensions" in why(nn.Conv3d(16, 32, 3), dynamic)
    assert "one end" in why(nn.Conv2d(16, 32, 4, padding="same"), dynamic)
    assert "float64" in why(nn.Conv2d(16, 32, 3), dynamic, torch.float64)
    assert "4-bit" in why(nn.Conv2d(16, 64, 3), dynamic.bits(4).activations("dynamic"))


@needs_packed
def test_a_tied_weight_packed_for_other_strides_is_left_to_the_reference() -> None:
    first, second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, stride=2)
    second.weight = first.weight
    made = INTEGERS["dynamic"].only("*").apply(nn.Sequential(first, second), progress=False).model
    x = inputs((2, 16, 9, 12))
    expected = run(made, x, "reference")
    torch.testing.assert_close(run(made, x, "onednn"), expected, rtol=1e-4, atol=1e-4)
    one, other = (run(made[place], x, "onednn") for place in (0, 1))
    assert not same_bits(one, run(made[0], x, "reference"))
    assert same_bits(other, run(made[1], x, "reference"))


@needs_packed
def test_what_was_compiled_holds_canonical_codes_from_then_on() -> None:
    case = Case.of("2d", INTEGERS["static"])
    run(case.made, case.x, "onednn")
    assert holds_taps(case.made)
    torch.compiler.reset()
    compiled = torch.compile(case.made, fullgraph=True, backend="eager")
    expected = run(case.made, case.x, "reference")
    with torch.no_grad():
        assert same_bits(compiled(case.x), expected)
        assert not holds_taps(case.made)
        assert same_bits(run(case.made, case.x, "onednn"), expected)
        holder(case.made).packed.tensors["codes"].neg_()
        assert same_bits(compiled(case.x), run(case.made, case.x, "reference"))


@pytest.mark.parametrize(
    ("kernel", "mode"),
    [
        ("reference", "static"),
        ("integer", "static"),
        ("integer", "dynamic"),
        pytest.param("onednn", "static", marks=needs_packed),
        pytest.param("onednn", "dynamic", marks=needs_packed),
    ],
)
def test_a_single_image_stays_channels_last(kernel: str, mode: str) -> None:
    """Whose strides torch's views forget."""
    case = Case.of("2d", INTEGERS[mode])
    x = case.x[:1].contiguous(memory_format=torch.channels_last)
    found = run(case.made, x, kernel)
    assert found.stride() == case.source(x).stride()
    assert run(case.made, x.contiguous(), kernel).is_contiguous()


@needs_packed
def test_codes_found_by_several_operators_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("static", "static symmetric", "dynamic"):
        case = Case.of("2d", INTEGERS[mode])
        x = case.x[:1]
        found = run(case.made, x, "onednn")
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "refuse", lambda: "no such luck")
            expected = run(case.made, x, "onednn")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_fastest_is_measured_against_the_float_convolution() -> None:
    case = Case.of("2d", INTEGERS["dynamic"])
    with torch.no_grad():
        found = case.made(case.x)
    by_name = [run(case.made, case.x, name) for name in ("integer", "onednn", "reference")]
    assert any(same_bits(found, one) for one in by_name)
    assert not same_bits(by_name[0], by_name[2])
