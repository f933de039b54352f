"""nn.MultiheadAttention with quantized inputs: those of its projections, and the joined heads.

What is expected is computed here in float64: inputs put on the grid, projections, softmax, heads.
"""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from mono_quant import LayerReport, QuantizedModule, Quantizer
from mono_quant.layers import AttentionQuantizer
from tests.helpers import dense, noise, quantized

SIZE, HEADS, LENGTH, KEYS, BATCH = 64, 4, 5, 7, 3
OnGrid = Callable[[str, Tensor], Tensor]

DYNAMIC = Quantizer().activations("dynamic")
STATIC = Quantizer().activations("static")


def attention(**options: object) -> nn.MultiheadAttention:
    """Return an attention with the batch first and biases that are no zeros."""
    made = nn.MultiheadAttention(SIZE, HEADS, batch_first=True, **options)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made.eval()


def grid(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `x` on an asymmetric grid of 8 bits that covers zero and ``[low, high]``."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale


def of_each_token(name: str, x: Tensor) -> Tensor:
    """Return each row on a grid of its own, whatever its weight."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return grid(x, low, high)


def of_ranges(ranges: Mapping[str, tuple[float, float]]) -> OnGrid:
    """Return what puts the inputs of each weight on the grid of its range."""

    def on_grid(name: str, x: Tensor) -> Tensor:
        low, high = ranges[name]
        return grid(x, torch.tensor(low).double(), torch.tensor(high).double())

    return on_grid


def weight_of(model: nn.Module, source: nn.MultiheadAttention, name: str) -> Tensor:
    """Return a weight in float64, decoded if it is quantized."""
    path, _, last = name.rpartition(".")
    layer, float_layer = model.get_submodule(path), source.get_submodule(path)
    if isinstance(layer, QuantizedModule) and last in layer.packed_weights():
        return dense(layer, float_layer, last)
    return float_layer.get_parameter(last).detach().double()


def heads_of(
    model: nn.Module, source: nn.MultiheadAttention, inputs: tuple[Tensor, ...], on_grid: OnGrid
) -> Tensor:
    """Return the joined heads ``[N, L, E]`` in float64."""
    if source._qkv_same_embed_dim:
        weights = weight_of(model, source, "in_proj_weight").chunk(3)
        names = ["in_proj_weight"] * 3
    else:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        weights = tuple(weight_of(model, source, name) for name in names)
    biases = source.in_proj_bias.detach().double().chunk(3)
    q, k, v = (
        (on_grid(name, x.double()) @ weight.t() + bias)
        .reshape(x.shape[0], x.shape[1], HEADS, -1)
        .transpose(1, 2)
        for name, x, weight, bias in zip(names, inputs, weights, biases, strict=True)
    )
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(SIZE // HEADS)
    joined: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return joined


def expected_of(
    model: nn.Module, source: nn.MultiheadAttention, inputs: tuple[Tensor, ...], on_grid: OnGrid
) -> Tensor:
    """Return the attended values in float64."""
    heads = on_grid("out_proj.weight", heads_of(model, source, inputs, on_grid))
    bias = source.out_proj.bias.detach().double()
    return heads @ weight_of(model, source, "out_proj.weight").t() + bias


def assert_on_grid(
    model: nn.Module, source: nn.MultiheadAttention, inputs: tuple[Tensor, ...], on_grid: OnGrid
) -> None:
    """Assert that a model computes what is expected on a grid.

    A head that lies halfway between two codes may go to either, in float32 and float64. So the
    model's error is held against that which the grid makes: another grid makes one as large.
    """
    expected = expected_of(model, source, inputs, on_grid)
    without = expected_of(model, source, inputs, lambda name, x: x)
    error = (model(*inputs)[0].detach() - expected).norm()
    assert float(error) < 0.1 * float((without - expected).norm())


def range_of(*tensors: Tensor) -> tuple[float, float]:
    """Return the smallest and largest value of all."""
    low = min(float(x.min()) for x in tensors)
    return low, max(float(x.max()) for x in tensors)


def three_inputs(source: nn.MultiheadAttention, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of three different spreads."""
    return (
        clear_of_halves(noise(BATCH, LENGTH, SIZE, seed=seed)),
        clear_of_halves(noise(BATCH, KEYS, source.kdim, seed=seed + 1) * 2),
        clear_of_halves(noise(BATCH, KEYS, source.vdim, seed=seed + 2) * 3 + 1),
    )


def clear_of_halves(x: Tensor) -> Tensor:
    """Return `x` without values halfway between two codes, which rounding may send to either."""
    on_grid = of_each_token("", x.double())
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    return torch.where((x - on_grid).abs() > 0.45 * step, on_grid.float(), x)


SOURCES = {"fused": attention, "apart": lambda: attention(kdim=48, vdim=32)}
each_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
NAMES = {
    "fused": ["in_proj_weight", "out_proj.weight"],
    "apart": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
}


@each_source
def test_dynamic_inputs_are_put_on_a_grid_of_each_token(
    make: Callable[[], nn.MultiheadAttention],
) -> None:
    source = make()
    model = quantized(source, DYNAMIC)
    inputs = three_inputs(source)
    assert_on_grid(model, source, inputs, of_each_token)


def test_self_attention_in_one_product_is_that_in_three() -> None:
    model = quantized(attention(), DYNAMIC)
    x = noise(BATCH, LENGTH, SIZE)
    torch.testing.assert_close(model(x, x, x)[0], model(x, x.clone(), x.clone())[0])


def test_a_sample_does_not_see_the_batch_it_came_in() -> None:
    model = quantized(attention(), DYNAMIC)
    x = noise(BATCH, LENGTH, SIZE)
    whole = model(x, x, x)[0]
    loud = torch.cat([x[:1], x[1:] * 100])
    torch.testing.assert_close(model(loud, loud, loud)[0][0], whole[0])
    one = x[1]
    torch.testing.assert_close(model(one, one, one)[0], whole[1])


@pytest.mark.parametrize("kind", SOURCES)
def test_static_inputs_are_put_on_the_grid_of_what_was_seen(kind: str) -> None:
    source = SOURCES[kind]()
    batches = [three_inputs(source, seed) for seed in (10, 20)]
    result = STATIC.fit(batches).only("*").apply(source)
    heads = [heads_of(source, source, batch, lambda name, x: x) for batch in batches]
    queries, keys, values = zip(*batches, strict=True)
    ranges = {
        "in_proj_weight": range_of(*queries, *keys, *values),
        "q_proj_weight": range_of(*queries),
        "k_proj_weight": range_of(*keys),
        "v_proj_weight": range_of(*values),
        "out_proj.weight": range_of(*heads),
    }
    assert [row.name for row in result.report.quantized] == NAMES[kind]
    for row in result.report.quantized:
        assert_calibrated(result.model, row, ranges[row.name])
    inputs = three_inputs(source, seed=30)
    assert_on_grid(result.model, source, inputs, of_ranges(ranges))


def assert_calibrated(model: nn.Module, row: LayerReport, expected: tuple[float, float]) -> None:
    """Assert that the grid of a weight's inputs covers a range, and that its report says so."""
    path, _, name = row.name.rpartition(".")
    layer = model.get_submodule(path)
    assert isinstance(layer, QuantizedModule)
    activation = layer.activations()[name]
    assert activation.scale is not None
    low, high = expected
    assert float(activation.scale) == pytest.approx((high - low) / 255, rel=1e-4)
    assert row.activation == "static 8-bit asymmetric per-tensor inputs"


@pytest.mark.parametrize("selector", ["out_proj", "*"])
@pytest.mark.parametrize("how", ["apply", "apply_"])
def test_an_output_projection_is_calibrated_on_the_heads_that_reach_it(
    selector: str, how: str
) -> None:
    source = attention()
    x = noise(BATCH, LENGTH, SIZE)
    heads = heads_of(source, source, (x, x, x), lambda name, x: x)
    result = getattr(STATIC.fit((x, x, x)).only(selector), how)(source)
    [row] = [row for row in result.report.quantized if row.name == "out_proj.weight"]
    assert_calibrated(result.model, row, range_of(heads))


def test_calibrating_leaves_an_attention_that_stays_float_as_it_was() -> None:
    source = nn.ModuleDict({"attention": attention(), "last": nn.Linear(SIZE, SIZE)})

    def forward(model: nn.Module, batch: object) -> Tensor:
        assert isinstance(model, nn.ModuleDict)
        assert isinstance(batch, Tensor)
        found: Tensor = model["last"](model["attention"](batch, batch, batch)[0])
        return found

    fitted = STATIC.fit(noise(BATCH, LENGTH, SIZE), forward=forward)
    assert type(fitted.skip("attention").apply(source).model["attention"]) is nn.MultiheadAttention
    assert type(source["attention"]) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_is_calibrated_where_its_data_is_padded(norm_first: bool) -> None:
    block = nn.TransformerEncoderLayer(SIZE, HEADS, 128, batch_first=True, norm_first=norm_first)
    source = nn.TransformerEncoder(block, 2, enable_nested_tensor=not norm_first).eval()
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [4], [2]])
    batch = {"src": noise(BATCH, LENGTH, SIZE), "src_key_padding_mask": padding}
    result = STATIC.fit(batch).apply(source)
    assert len(result.report.quantized) == 8
    assert {row.activation for row in result.report.quantized} == {
        "static 8-bit asymmetric per-tensor inputs"
    }
    assert source.use_nested_tensor is (not norm_first)
    real = ~padding  # nested tensors leave zeros where there is padding
    with torch.no_grad():
        found, expected = result.model(**batch)[real], source(**batch)[real]
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_what_reaches_each_weight_is_given_once() -> None:
    knows, fused, apart = AttentionQuantizer(), attention(), SOURCES["apart"]()
    query, key, value = three_inputs(apart)

    def names(layer: nn.Module, *args: object, **kwargs: object) -> list[tuple[str, int]]:
        return [(name, id(x)) for name, x in knows.inputs(layer, args, kwargs)]

    whole = "in_proj_weight"
    assert names(fused, query, query, query) == [(whole, id(query))]
    assert names(fused, query, value=key, key=key) == [(whole, id(query)), (whole, id(key))]
    assert names(apart, value=value, key=key, query=query) == [
        ("q_proj_weight", id(query)),
        ("k_proj_weight", id(key)),
        ("v_proj_weight", id(value)),
    ]
    assert torch.equal(knows.rows(apart, "k_proj_weight", key), key.reshape(-1, 48))


def test_a_calibrated_attention_is_valid_after_a_file() -> None:
    source = attention()
    x = noise(BATCH, LENGTH, SIZE)
    assert STATIC.fit((x, x, x)).apply(source).validate()
