"""The values of the contract: packed tensors, grids and statistics."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mono_quant import (
    Affine,
    Configurable,
    FloatCast,
    Granularity,
    Grid,
    InputError,
    MinMax,
    PackedTensor,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QTensor,
    QuantizedModule,
    Quantizer,
    Scheme,
    Statistic,
    Statistics,
    WeightRecord,
)
from mono_quant.numerics.granularity import Shape
from mono_quant.numerics.values import Layout
from tests.helpers import noise, same_bits, stack_and_step, unpacked

SCHEMES: list[Scheme] = [
    Affine(bits, symmetric, granularity)
    for bits in (3, 4, 8)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), PerGroup(4))
]


def packed(scheme: Scheme, layout: Layout) -> PackedTensor:
    x = noise(*layout.stack)
    q = scheme.quantize(x, Grid(scheme, MinMax()).qparams(x))
    return PackedTensor.pack(q, scheme, layout, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_what_is_packed_in_its_own_memory_is_the_same(scheme: Scheme) -> None:
    layout = Layout.transposed((8, 6))
    x = layout.to_stack(noise(*layout.native))
    assert not x.is_contiguous()
    q = scheme.quantize(x, Grid(scheme, MinMax()).qparams(x))
    kept = PackedTensor.pack(q, scheme, layout, torch.float32)
    used_up = PackedTensor.pack(q, scheme, layout, torch.float32, consume=True)
    assert kept.tensors.keys() == used_up.tensors.keys()
    for name, tensor in used_up.tensors.items():
        assert tensor.is_contiguous()
        assert same_bits(tensor, kept.tensors[name])


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize(
    "layout", [Layout.grouped((6, 4, 2), 3), Layout.transposed((4, 3, 4), 2)], ids=["plain", "back"]
)
def test_a_packed_weight_is_its_codes_in_the_native_shape(scheme: Scheme, layout: Layout) -> None:
    weight = packed(scheme, layout)
    found = weight.dequantize()
    assert found.shape == layout.native
    values, _ = stack_and_step(weight, layout.stack[2])
    assert torch.allclose(layout.to_stack(found).to(torch.float64), values, rtol=1e-6, atol=0)
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in weight.tensors.values())


@pytest.mark.parametrize("scheme", [*SCHEMES, FloatCast()], ids=repr)
@pytest.mark.parametrize(
    "indices",
    [torch.tensor([0, 4, 4, 2]), torch.tensor([[1, 3], [0, 4]]), torch.empty(0, dtype=torch.int64)],
    ids=["list", "matrix", "none"],
)
def test_rows_are_those_of_the_whole(scheme: Scheme, indices: Tensor) -> None:
    weight = packed(scheme, Layout.grouped((5, 8)))
    assert same_bits(weight.rows(indices), weight.dequantize()[indices])
    half = weight.rows(indices, torch.float16)
    assert same_bits(half, weight.dequantize(torch.float16)[indices])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_comes_back_in_its_dtype_unless_another_is_asked_for(dtype: torch.dtype) -> None:
    x = noise(1, 4, 8).to(dtype)
    scheme = Affine(8)
    q = scheme.quantize(x, Grid(scheme, MinMax()).qparams(x))
    weight = PackedTensor.pack(q, scheme, Layout.grouped((4, 8)), dtype)
    assert weight.dequantize().dtype == dtype
    assert weight.dequantize(torch.float32).dtype == torch.float32
    assert same_bits(weight.dequantize(), weight.dequantize(torch.float32).to(dtype))


@attrs.frozen
class Levels(Scheme):
    """A third party's grid: four levels for the whole tensor, which travel with the codes."""

    kind = "tests.levels"

    @property
    def granularity(self) -> Granularity:
        return PerTensor()

    @property
    def code_bits(self) -> int:
        return 2

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] * -(-shape[2] // 4) + 4 * 4

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        steps = torch.linspace(0, 1, 4)
        levels = min_val.flatten() + (max_val - min_val).flatten() * steps
        return QParams(None, None, block_size, {"levels": levels})

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        codes = (x.unsqueeze(-1) - qparams.extra["levels"]).abs().argmin(-1)
        return QTensor(codes.to(torch.uint8), qparams, x.dtype)

    def dequantize(self, q: QTensor) -> Tensor:
        return q.qparams.extra["levels"][q.codes.to(torch.int64)]


def test_a_scheme_of_ones_own_packs_what_it_declares() -> None:
    scheme = Levels()
    x = noise(1, 5, 9)
    q = scheme.quantize(x, Grid(scheme, MinMax()).qparams(x))
    weight = PackedTensor.pack(q, scheme, Layout.grouped((5, 9)), torch.float32)
    assert set(weight.tensors) == {"codes", "levels"}
    assert weight.nbytes == scheme.nbytes((1, 5, 9)) == 5 * 3 + 16
    assert unpacked(weight.tensors["codes"], 2, 9).tolist() == q.codes.tolist()
    expected = q.qparams.extra["levels"][q.codes[0].to(torch.int64)]
    assert same_bits(weight.dequantize(), expected)
    assert same_bits(weight.rows(torch.tensor([3, 0])), expected[[3, 0]])
    assert scheme.describe() == "tests.levels"
    assert scheme.remark(q) is None
    assert scheme.refuse((1, 5, 9)) is None
    assert scheme.bits_per_weight((1, 5, 9)) == 8 * (15 + 16) / 45


def test_a_scheme_of_ones_own_quantizes_a_model() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Embedding(6, 12))
    result = Quantizer().scheme(Levels()).only("*").apply(model, progress=False)
    assert [row.scheme for row in result.report.quantized] == ["tests.levels"] * 2
    for place, name in enumerate(("0.weight", "1.weight")):
        layer = result.model[place]
        assert isinstance(layer, QuantizedModule)
        weight = model.get_parameter(name).detach()
        found = layer.packed_weights()["weight"].dequantize()
        step = (weight.max() - weight.min()) / 3
        assert (found - weight).abs().max() <= step / 2 + 1e-6
        assert len(set(found.flatten().tolist())) == 4
    assert result.model[1](torch.tensor([2, 5])).shape == (2, 12)


@attrs.frozen
class Count(Statistic[int]):
    """How many rows were seen."""

    kind = "count"
    step: int = 1

    def observe(self, x: Tensor) -> int:
        return x.shape[0] * self.step

    def merge(self, left: int, right: int) -> int:
        return left + right


def test_a_state_is_asked_for_by_the_statistic_that_made_it() -> None:
    statistics = Statistics({Count(): 3, Count(step=2): 6})
    assert statistics.state(Count()) == 3
    assert statistics.state(Count(step=2)) == 6
    assert Count() in statistics


def test_a_state_that_was_not_gathered_is_refused_by_name() -> None:
    assert Count() not in Statistics()
    with pytest.raises(InputError, match=r"Count\(step=1\) was not gathered; name it in `needs`"):
        Statistics().state(Count())


@given(st.sampled_from(["", "a", "a.b"]), st.sampled_from(["weight", "weight_hh_l0"]))
def test_a_record_has_the_dotted_name_of_a_state_dict(module: str, name: str) -> None:
    record = WeightRecord(module, name, packed(Affine(8), Layout.grouped((2, 4))), {})
    assert record.key == (f"{module}.{name}" if module else name)


def test_strategies_without_words_of_their_own_describe_themselves_by_their_kind() -> None:
    assert issubclass(Count, Configurable)
    assert Count().to_config() == {"kind": "count", "step": 1}
