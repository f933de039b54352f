"""Quantized inputs, against the formulas in float64: a grid for each row, or for all of them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import LinearLikeQuantizer, QuantizedLayer, Quantizer, kernels
from tests.helpers import TOLERANCES, assert_near, oracle, same_bits, same_tensors

HERE = __name__


class Conv1D(nn.Module):
    """What transformers calls so: a product whose weight is ``[in, out]``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Make = Callable[[], tuple[nn.Module, tuple[int, ...]]]

PRODUCTS: dict[str, Make] = {
    "linear": lambda: (nn.Linear(64, 12), (5, 64)),
    "linear of three dimensions": lambda: (nn.Linear(64, 12), (2, 3, 64)),
    "linear-like": lambda: (Conv1D(12, 64), (2, 3, 64)),
}
CONVOLUTIONS: dict[str, Make] = {
    "conv1d": lambda: (nn.Conv1d(8, 12, 3, padding=1), (3, 8, 9)),
    "conv2d": lambda: (nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (3, 8, 6, 5)),
    "conv3d": lambda: (nn.Conv3d(4, 6, 2), (3, 4, 3, 4, 5)),
    "grouped": lambda: (nn.Conv2d(8, 12, 3, groups=4), (3, 8, 6, 5)),
    "depthwise": lambda: (nn.Conv1d(8, 8, 3, groups=8), (3, 8, 9)),
    "conv transpose": lambda: (nn.ConvTranspose1d(8, 12, 3, stride=2), (3, 8, 9)),
    "grouped conv transpose": lambda: (nn.ConvTranspose2d(8, 12, 3, groups=2), (3, 8, 4, 5)),
    "conv transpose 3d": lambda: (nn.ConvTranspose3d(4, 6, 2), (3, 4, 3, 4, 5)),
}
LAYERS = {**PRODUCTS, **CONVOLUTIONS}

each_layer = pytest.mark.parametrize("name", LAYERS)
each_bits = pytest.mark.parametrize("bits", [8, 4])
each_symmetry = pytest.mark.parametrize("symmetric", [False, True], ids=["zero point", "symmetric"])
each_mode = pytest.mark.parametrize("mode", ["dynamic", "static"])

TAUGHT = Quantizer().layer(LinearLikeQuantizer(f"{HERE}.Conv1D", transposed=True)).only("*")


def as_rows(x: Tensor, name: str) -> Tensor:
    """Return an input as rows: those of a product, or a sample of a convolution each."""
    return x.reshape(-1, x.shape[-1]) if name in PRODUCTS else x.reshape(len(x), -1)


def ends_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each row, with a dimension for each."""
    return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)


def on_grid(rows: Tensor, ends: tuple[Tensor, Tensor], bits: int, symmetric: bool) -> Tensor:
    """Return float64 rows on the grid of the range between two ends, zero included."""
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    if symmetric:
        top = (1 << bits - 1) - 1
        scale = torch.maximum(-low, high) / top
        return (rows / scale).round().clamp(-top - 1, top) * scale
    top = (1 << bits) - 1
    scale = (high - low) / top
    zero = (-low / scale).round()
    return ((rows / scale + zero).round().clamp(0, top) - zero) * scale


def away_from_ties(shape: tuple[int, ...], bits: int, symmetric: bool, seed: int = 0) -> Tensor:
    """Return values in float32 that lie a quarter of a step from the grid of each row, at most.

    Rows have steps of their own and all but two values of a row lie inside its range, so that no
    arithmetic of float32 moves a value to another code.
    """
    generator = torch.Generator().manual_seed(seed)
    least = 1 - (1 << bits - 1) if symmetric else -((1 << bits) // 3)
    most = -least if symmetric else least + (1 << bits) - 1
    codes = torch.randint(least + 1, most, shape, generator=generator).to(torch.float32)
    codes += torch.randint(-1, 2, shape, generator=generator) / 4
    rows = codes.reshape(shape[0], -1)
    rows[:, 0], rows[:, -1] = least, most
    codes = rows.reshape(shape)
    if len(shape) == 3:  # rows of a product are its last dimension
        codes[..., 0], codes[..., -1] = least, most
    steps = torch.tensor([0.125, 0.0625, 0.03125])[torch.arange(shape[0]) % 3]
    return codes * steps.reshape(-1, *(1 for _ in shape[1:]))


@each_layer
@each_bits
@each_symmetry
def test_dynamic_inputs_have_a_grid_for_each_row(name: str, bits: int, symmetric: bool) -> None:
    source, shape = LAYERS[name]()
    model = TAUGHT.activations("dynamic", bits=bits, symmetric=symmetric).apply(source).model
    x = away_from_ties(shape, bits, symmetric)
    rows = as_rows(x.double(), name)
    expected = on_grid(rows, ends_of(rows), bits, symmetric).reshape(shape)
    assert not torch.equal(expected, x.double()), "the grid is finer than what is put on it"
    assert_near(model(x), oracle(model, source)(expected))


@each_layer
@each_bits
@each_symmetry
def test_dynamic_inputs_may_have_one_grid_for_all(name: str, bits: int, symmetric: bool) -> None:
    source, shape = LAYERS[name]()
    quantizer = TAUGHT.activations("dynamic", bits=bits, symmetric=symmetric, granularity="tensor")
    model = quantizer.apply(source).model
    x = away_from_ties(shape, bits, symmetric)[:1].repeat(shape[0], *(1 for _ in shape[1:]))
    x[1:] /= 2
    rows = x.double().reshape(1, -1)
    ends = ends_of(rows)
    rows = without_ties(rows, ends, bits, symmetric)
    expected = on_grid(rows, ends, bits, symmetric).reshape(shape)
    assert_near(model(rows.float().reshape(shape)), oracle(model, source)(expected))


def without_ties(rows: Tensor, ends: tuple[Tensor, Tensor], bits: int, symmetric: bool) -> Tensor:
    """Return the rows with zeros where a value lies between two codes of the range."""
    codes = (1 << bits - 1) - 1 if symmetric else (1 << bits) - 1
    width = torch.maximum(-ends[0], ends[1]) if symmetric else ends[1] - ends[0]
    return torch.where(((rows * codes / width) % 1 - 0.5).abs() < 1e-3, 0.0, rows)


@each_layer
@each_bits
@each_symmetry
def test_static_inputs_have_the_grid_of_all_calibration_data_and_are_clamped_to_it(
    name: str, bits: int, symmetric: bool
) -> None:
    source, shape = LAYERS[name]()
    batches = [away_from_ties(shape, bits, symmetric, seed=seed) for seed in (1, 2)]
    batches[1] = batches[1] / 2
    quantizer = TAUGHT.activations("static", bits=bits, symmetric=symmetric).fit(batches)
    model = quantizer.apply(source).model
    ends = ends_of(torch.stack(batches).double().reshape(1, -1))
    rows = without_ties(1.5 * batches[0].double().reshape(1, -1), ends, bits, symmetric)
    expected = on_grid(rows, ends, bits, symmetric).reshape(shape)
    assert float(expected.abs().max()) < float(rows.abs().max()), "nothing was clamped"
    assert_near(model(rows.float().reshape(shape)), oracle(model, source)(expected))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_value_between_two_codes_goes_to_the_even_one(symmetric: bool) -> None:
    top = 127 if symmetric else 255  # a scale of 1 in both, and a zero point of 0
    source = nn.Linear(6, 2, bias=False)
    model = TAUGHT.activations("dynamic", symmetric=symmetric).apply(source).model
    x = torch.tensor([[0.5, 1.5, 2.5, 3.5, 100.5, float(top)]])
    expected = torch.tensor([[0.0, 2.0, 2.0, 4.0, 100.0, float(top)]])
    assert_near(model(x), oracle(model, source)(expected.double()))


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_on_the_grid_of_inputs_that_are_far_from_it(sign: int) -> None:
    source = nn.Linear(4, 2, bias=False)
    model = TAUGHT.activations("dynamic", bits=4).apply(source).model
    x = sign * torch.tensor([[15.0, 12.2, 13.9, 14.0]])
    expected = sign * torch.tensor([[15.0, 12.0, 14.0, 14.0]])
    assert_near(model(x), oracle(model, source)(expected.double()))


def test_a_row_of_zeros_stays_zeros() -> None:
    source = nn.Linear(64, 12)
    model = TAUGHT.activations("dynamic").apply(source).model
    assert_near(model(torch.zeros(2, 64)), source.bias.detach().double().expand(2, 12))


@pytest.mark.parametrize(("name", "shape"), [("conv1d", (8, 9)), ("conv2d", (8, 6, 5))])
def test_an_input_without_a_batch_is_one_row(name: str, shape: tuple[int, ...]) -> None:
    source, _ = LAYERS[name]()
    model = TAUGHT.activations("dynamic").apply(source).model
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), model(x[None])[0])


@each_layer
def test_a_row_does_not_know_of_the_others_in_its_batch(name: str) -> None:
    source, shape = LAYERS[name]()
    model = TAUGHT.activations("dynamic").apply(source).model
    x = torch.randn(shape)
    x[1:] *= 1000
    alone = model(x[:1])
    torch.testing.assert_close(model(x)[:1], alone, rtol=1e-5, atol=1e-5)


@each_layer
@each_mode
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_an_empty_batch_gives_an_empty_output(name: str, mode: str, granularity: str) -> None:
    source, shape = LAYERS[name]()
    x = torch.randn(shape)
    if mode == "static":
        model = TAUGHT.activations(mode).fit(x).apply(source).model
    else:
        model = TAUGHT.activations(mode, granularity=granularity).apply(source).model
    assert model(x[:0]).shape == source(x)[:0].shape


@each_layer
@each_mode
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_an_output_is_of_the_dtype_of_the_input(name: str, mode: str, dtype: torch.dtype) -> None:
    source, shape = LAYERS[name]()
    x = away_from_ties(shape, 4, symmetric=False)  # codes of 4 bits and their quarters fit bfloat16
    model = TAUGHT.activations("dynamic", bits=4).apply(source).model
    rows = as_rows(x.double(), name)
    ends = ends_of(rows)
    if mode == "static":
        x = x[:1].expand(shape).contiguous()
        rows = as_rows(x.double(), name)
        ends = (rows.amin().reshape(1, 1), rows.amax().reshape(1, 1))
        model = TAUGHT.activations("static", bits=4).fit(x).apply(source).model
    twin = oracle(model, source)
    found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert_near(found, twin(on_grid(rows, ends, 4, symmetric=False).reshape(shape)), dtype)


@each_layer
@each_mode
def test_gradients_pass_straight_through_the_grid(name: str, mode: str) -> None:
    source, shape = LAYERS[name]()
    x = torch.randn(shape)
    model = TAUGHT.activations(mode).fit(x / 2).apply(source).model  # half of them are clamped
    wide = x.double().requires_grad_()
    x.requires_grad_()
    slope = torch.randn_like(model(x))
    (model(x) * slope).sum().backward()
    (oracle(model, source)(wide) * slope.double()).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert_near(x.grad, wide.grad)


@each_mode
def test_nan_in_an_input_is_nan_in_the_output_of_that_row(mode: str) -> None:
    source = nn.Linear(64, 12)
    x = torch.randn(3, 64)
    model = TAUGHT.activations(mode).fit(x).apply(source).model
    odd = x.clone()
    odd[1, 5] = torch.nan
    found = model(odd)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], model(x)[[0, 2]], rtol=1e-5, atol=1e-5)


@each_mode
@each_layer
def test_inputs_of_whole_numbers_are_refused(name: str, mode: str) -> None:
    source, shape = LAYERS[name]()
    model = TAUGHT.activations(mode).fit(torch.randn(shape)).apply(source).model
    with pytest.raises(TypeError, match=r"torch\.int64, where a floating dtype was expected"):
        model(torch.ones(shape, dtype=torch.int64))


@pytest.mark.slow
@each_layer
@each_mode
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
def test_a_layer_is_traced_whole_and_exported(name: str, mode: str) -> None:
    source, shape = LAYERS[name]()
    x = torch.randn(shape)
    result = TAUGHT.activations(mode).fit(x).apply(source.eval())
    torch.compiler.reset()
    compiled = torch.compile(result.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert same_bits(compiled(x), result.model(x))
        with kernels.use("reference"):  # all that an exported program has
            expected = result.model(x)
        assert same_bits(result.export(x).module()(x), expected)


def calibrated(model: nn.Module) -> dict[str, Tensor]:
    """Return what was calibrated for the input of a layer."""
    assert isinstance(model, QuantizedLayer)
    return dict(model.activations()["weight"].tensors)


@each_layer
@each_mode
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_keeps_what_is_known_of_inputs(
    name: str, mode: str, again: Callable[[nn.Module], nn.Module]
) -> None:
    source, shape = LAYERS[name]()
    x = torch.randn(shape)
    model = TAUGHT.activations(mode, bits=5, symmetric=True).fit(x).apply(source).model
    other = again(model)
    assert isinstance(other, QuantizedLayer)
    assert other.activations()["weight"].describe() == f"{mode} 5-bit symmetric " + (
        "per-token" if mode == "dynamic" else "per-tensor"
    )
    assert same_tensors(model, other)
    assert same_bits(model(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_moved_layer_keeps_its_calibrated_scale_as_it_was(dtype: torch.dtype) -> None:
    model = TAUGHT.activations("static").fit(torch.randn(4, 64)).apply(nn.Linear(64, 12)).model
    before = {name: tensor.clone() for name, tensor in calibrated(model).items()}
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        "scale": torch.float32,
        "zero_point": torch.uint8,
    }
    after = calibrated(model.to(dtype))
    assert all(same_bits(after[name], before[name]) for name in before)


def test_a_dequantized_layer_knows_nothing_of_its_inputs() -> None:
    result = TAUGHT.activations("static").fit(torch.randn(4, 64)).apply(nn.Linear(64, 12))
    floats = result.dequantize()
    assert type(floats) is nn.Linear
    assert list(floats.state_dict()) == ["weight", "bias"]
    x = torch.randn(3, 64)
    weights_only = TAUGHT.activations(None).apply(floats).model
    torch.testing.assert_close(floats(x), weights_only(x), rtol=1e-2, atol=1e-2)
