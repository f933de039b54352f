"""Single rows by the shorter way, which must see whatever has changed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.kernels import fbgemm
from mono_quant.kernels.onednn import refuse_linear
from mono_quant.kernels.ops import int_mm_refusal
from mono_quant.modules.layer import kernels_run
from mono_quant.modules.weight import QuantizedWeight
from tests.helpers import noise, same_bits

REFUSALS = {"integer": int_mm_refusal(), "onednn": refuse_linear(), "fbgemm": fbgemm.refuse()}
each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why)))
        for name, why in REFUSALS.items()
    ],
)

GRIDS = {
    "dynamic": Quantizer(),
    "symmetric": Quantizer().activations("dynamic", symmetric=True),
    "per tensor": Quantizer().activations("dynamic", granularity="tensor"),
    "static": Quantizer().fit(noise(32, 1024)),
    "asymmetric weight": Quantizer().asymmetric(),
}


def made(quantizer: Quantizer, bias: bool = True) -> QuantizedLayer:
    layer = quantizer.only("*").apply(nn.Linear(1024, 96, bias=bias), progress=False).model
    assert isinstance(layer, QuantizedLayer)
    return layer


def held(layer: nn.Module) -> QuantizedWeight:
    return next(one for one in layer.modules() if isinstance(one, QuantizedWeight))


def computed(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer computes that has met no row before."""
    result = copy.deepcopy(layer)(x)
    assert isinstance(result, Tensor)
    return result


@each_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_later_rows_are_computed_as_the_first_one(grid: str, bias: bool, kernel: str) -> None:
    layer = made(GRIDS[grid], bias)
    with torch.no_grad(), kernels.use(kernel):
        layer(noise(1, 1024))
        found = held(layer).short is not None
        assert found == (kernel != "integer" or grid != "asymmetric weight")
        for shape in ((1, 1024), (1, 1, 1024), (1024,)):
            for seed in range(5):
                x = noise(*shape, seed=seed)
                assert same_bits(layer(x), computed(layer, x))
        half = noise(1, 1024).to(torch.bfloat16)
        assert same_bits(layer(half), computed(layer, half))
        for odd in (torch.zeros(1, 1024), torch.full((1, 1024), float("nan"))):
            assert same_bits(layer(odd), computed(layer, odd))
        with pytest.raises(RuntimeError, match="does not meet a weight"):
            layer(noise(1024, 1))


@each_kernel
def test_a_changed_weight_is_seen(kernel: str) -> None:
    layer, x = made(Quantizer()), noise(1, 1024)
    with torch.no_grad(), kernels.use(kernel):
        layer(x)
        weight = held(layer)
        weight.packed.tensors["codes"].neg_()
        assert same_bits(layer(x), computed(layer, x))
        weight.get_buffer("scale").mul_(2)
        assert same_bits(layer(x), computed(layer, x))
        other = made(Quantizer().activations("dynamic", symmetric=True))
        layer.load_state_dict({key: 0 * value for key, value in other.state_dict().items()})
        assert same_bits(layer(x), torch.zeros(1, 96))
        layer.quantized_inputs = other.quantized_inputs
        assert same_bits(layer(noise(1, 1024, seed=3)), computed(layer, noise(1, 1024, seed=3)))


@each_kernel
def test_a_replaced_scale_is_seen(kernel: str) -> None:
    layer, x = made(Quantizer(), bias=False), noise(1, 1024)
    weight = held(layer)
    with torch.no_grad(), kernels.use(kernel):
        before = layer(x)
        weight.register_buffer("scale", weight.get_buffer("scale") * 2)
        assert same_bits(layer(x), 2 * before)


@each_kernel
def test_a_changed_zero_point_of_the_weight_is_seen(kernel: str) -> None:
    layer, x = made(GRIDS["asymmetric weight"]), noise(1, 1024)
    weight = held(layer)
    with torch.no_grad(), kernels.use(kernel):
        before = layer(x)
        weight.get_buffer("zero_point").add_(3)
        assert not same_bits(layer(x), before)
        assert same_bits(layer(x), computed(layer, x))
        weight.register_buffer("zero_point", weight.get_buffer("zero_point") - 3)
        assert same_bits(layer(x), before)


@each_kernel
def test_a_scale_lent_for_a_call_is_seen_for_that_call_alone(kernel: str) -> None:
    layer, x = made(Quantizer(), bias=False), noise(1, 1024)
    lent = {"quantized_weights.weight.scale": held(layer).get_buffer("scale") * 2}
    with torch.no_grad(), kernels.use(kernel):
        before = computed(layer, x)
        assert same_bits(functional_call(layer, lent, (x,)), 2 * before)
        assert same_bits(layer(x), before)
        assert same_bits(functional_call(layer, lent, (x,)), 2 * before)


@each_kernel
def test_a_calibrated_scale_that_moved_is_seen(kernel: str) -> None:
    layer, x = made(GRIDS["static"]), noise(1, 1024)
    with torch.no_grad(), kernels.use(kernel):
        before = layer(x)
        inputs = layer.quantized_inputs["weight"]
        inputs.register_buffer("scale", inputs.get_buffer("scale") * 8)
        assert not same_bits(layer(x), before)
        assert same_bits(layer(x), computed(layer, x))


@each_kernel
def test_whoever_asks_for_more_is_served(kernel: str) -> None:
    layer, x = made(Quantizer()), noise(1, 1024)
    with torch.no_grad(), kernels.use(kernel):
        expected = layer(x)
        with kernels_run() as ran:
            assert same_bits(layer(x), expected)
        assert list(ran.values()) == [kernel]
        with kernels.use("reference"):
            assert not same_bits(layer(x), expected)
        assert same_bits(layer(x), expected)
        torch.compiler.reset()
        fast = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(fast(x), expected)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None


@each_kernel
def test_it_keeps_no_codes_alive_and_is_not_copied(kernel: str) -> None:
    layer, x = made(Quantizer()), noise(1, 1024)
    with torch.no_grad():
        codes = weakref.ref(held(layer).packed.tensors["codes"])
        with kernels.use(kernel):
            layer(x)
        assert held(copy.deepcopy(layer)).short is None
        assert held(pickle.loads(pickle.dumps(layer))).short is None
        layer.to(torch.float64)
        assert held(layer).short is None
        layer.to(torch.float32)
        for name, why in REFUSALS.items():
            if why is None:
                with kernels.use(name):
                    expected = computed(layer, x)
                    assert same_bits(layer(x), expected)
                    assert same_bits(layer(x), expected)
        layer.dequantize()
        gc.collect()
        assert codes() is None


@each_kernel
def test_layers_that_share_a_weight_do_not_share_the_way(kernel: str) -> None:
    one, other = made(Quantizer()), made(Quantizer().activations("dynamic", symmetric=True))
    other.quantized_weights = one.quantized_weights
    x = noise(1, 1024)
    with torch.no_grad(), kernels.use(kernel):
        for _ in range(3):
            assert same_bits(one(x), computed(one, x))
            assert same_bits(other(x), computed(other, x))
        assert not same_bits(one(x), other(x))
