"""Schemes, layers, containers and formats that this package has never heard of."""

import copy
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    Activation,
    Affine,
    Checkpoint,
    CheckpointError,
    Container,
    Granularity,
    LayerQuantizer,
    Layout,
    PackedTensor,
    PerChannel,
    QParams,
    QTensor,
    QuantizedModule,
    Quantizer,
    RangeEstimator,
    Scheme,
    Serializer,
    UnknownKindError,
    UnsupportedLayerError,
    load_model,
    save_model,
)
from mono_quant.base import Grid, Rounding, Statistics
from mono_quant.configurable import Kinds
from mono_quant.modules import QuantizedWeight
from mono_quant.numerics.granularity import Shape
from tests.helpers import same_bits, same_tensors
from tests.serializers.files import SUFFIXES, assert_same, small

each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


@attrs.frozen
class PerColumn(Granularity):
    """One scale for each column, as no built-in one has it."""

    kind: ClassVar[str] = "tests.per_column"

    def block_size(self, shape: Shape) -> Shape:
        return (1, shape[1], 1)


@attrs.frozen
class Sixteenths(Scheme):
    """Multiples of a power of two: codes and nothing else."""

    kind: ClassVar[str] = "tests.sixteenths"
    fraction: int = 4

    @property
    def granularity(self) -> Granularity:
        return PerChannel()

    @property
    def code_bits(self) -> int:
        return 6

    @property
    def code_min(self) -> int:
        return -32

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] * -(-shape[2] * 6 // 8)

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        return QParams(None, None, block_size)

    def choose_qparams(self, x: Tensor, observer: RangeEstimator) -> QParams:
        return QParams(None, None, self.granularity.block_size(tuple(x.shape)))

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        codes = torch.round(x * 2**self.fraction).clamp(-32, 31).to(torch.int8)
        return QTensor(codes, qparams, x.dtype)

    def dequantize(self, q: QTensor) -> Tensor:
        values: Tensor = q.codes.to(torch.float32) / 2**self.fraction
        return values


class Gated(nn.Module):
    """A layer with two weights and no class of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(24, 16))
        self.gate = nn.Parameter(torch.randn(16, 24))  # [in, out]
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = functional.linear(x, self.up, self.bias) * torch.sigmoid(x @ self.gate)
        return found


class QuantizedGated(QuantizedModule):
    """What stands in for it: an object of its own."""

    def __init__(self, weights: Mapping[str, PackedTensor], bias: nn.Parameter) -> None:
        super().__init__()
        self.holders = nn.ModuleDict(
            {name: QuantizedWeight(packed) for name, packed in weights.items()}
        )
        self.bias = bias

    def packed_weights(self) -> Mapping[str, PackedTensor]:
        found = {}
        for name, holder in self.holders.items():
            assert isinstance(holder, QuantizedWeight)
            found[name] = holder.packed
        return found

    def dequantize(self) -> nn.Module:
        layer = Gated().to("meta")
        for name, packed in self.packed_weights().items():
            layer.register_parameter(name, nn.Parameter(packed.dequantize()))
        layer.bias = self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        weights = self.packed_weights()
        up, gate = weights["up"].dequantize(x.dtype), weights["gate"].dequantize(x.dtype)
        return functional.linear(x, up, self.bias) * torch.sigmoid(x @ gate)


@attrs.frozen
class GatedQuantizer(LayerQuantizer):
    """Knows that layer."""

    kind: ClassVar[str] = "tests.gated"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, Gated)

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        return {"up": Layout.grouped((24, 16)), "gate": Layout.transposed((16, 24))}

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        assert isinstance(layer, Gated)
        return QuantizedGated(weights, layer.bias)


class Peeking(nn.Module):
    """Reads the bias of its child when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.quick = True

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.layer.bias if self.quick else self.layer(x)
        return found


@attrs.frozen
class PeekingContainer(Container):
    """Keeps it from doing so."""

    kind: ClassVar[str] = "tests.peeking"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Peeking)

    def adapt(self, module: nn.Module) -> None:
        assert isinstance(module, Peeking)
        module.quick = False

    def revert(self, module: nn.Module) -> None:
        assert isinstance(module, Peeking)
        module.quick = True


KINDS: Kinds = {
    kind.kind: kind for kind in (PerColumn, Sixteenths, GatedQuantizer, PeekingContainer)
}


def net() -> nn.Sequential:
    """Return a model with a layer that only its owner knows, twice."""
    gated = Gated()
    return nn.Sequential(nn.Linear(8, 16), gated, nn.Linear(24, 16), gated).eval()


@each_suffix
def test_a_scheme_of_ones_own_needs_its_class_to_be_loaded(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().scheme(Sixteenths()).only("*").apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    with pytest.raises(UnknownKindError, match=r"'tests\.sixteenths' is known.*kinds="):
        load_model(path, small())
    loaded = load_model(path, small(), kinds=KINDS)
    assert_same(loaded, result.model)
    found = load_model(path, kinds=KINDS)["0.weight"]
    assert isinstance(found, QTensor)
    expected = torch.round(small_weight(result.model) * 16)
    assert torch.equal(found.codes[0].float(), expected)


def small_weight(model: nn.Sequential) -> Tensor:
    """Return the dequantized weight of the first layer."""
    layer = model[0]
    assert isinstance(layer, QuantizedModule)
    return layer.packed_weights()["weight"].dequantize()


@each_suffix
def test_a_granularity_of_ones_own_is_saved_and_loaded(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().scheme(Affine(8, granularity=PerColumn())).only("*").apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    layer = result.model[0]
    assert isinstance(layer, QuantizedModule)
    assert layer.packed_weights()["weight"].tensors["scale"].shape == (1, 1, 64)
    assert_same(load_model(path, small(), kinds=KINDS), result.model)


@each_suffix
@pytest.mark.parametrize("how", ["kinds", "layers"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_of_ones_own_is_saved_and_loaded(
    bits: int, how: str, suffix: str, tmp_path: Path
) -> None:
    quantizer = Quantizer().bits(bits).only("*").layer(GatedQuantizer())
    result = quantizer.apply(net())
    assert isinstance(result.model[1], QuantizedGated)
    assert result.model[1] is result.model[3]
    path = result.save(tmp_path / f"model{suffix}")
    with pytest.raises(UnsupportedLayerError, match=r"knows '1', a Gated.*tests\.gated.*kinds="):
        load_model(path, net())
    if how == "kinds":
        loaded = load_model(path, net(), kinds=KINDS)
    else:
        loaded = load_model(path, net(), layers=(GatedQuantizer(),))
    assert_same(loaded, result.model)
    assert loaded[1] is loaded[3]
    x = torch.randn(3, 8)
    assert same_bits(loaded[:2](x), result.model[:2](x))


@each_suffix
def test_a_layer_of_ones_own_fills_a_meta_skeleton(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().layer(GatedQuantizer()).apply(net())
    path = result.save(tmp_path / f"model{suffix}")
    with torch.device("meta"):
        skeleton = net()
    loaded = load_model(path, skeleton, kinds=KINDS)
    assert_same(loaded, result.model)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_a_layer_of_ones_own_is_computed_moved_and_dequantized() -> None:
    source = net()
    result = Quantizer().bits(16).layer(GatedQuantizer()).apply(source)
    x = torch.randn(3, 8)
    torch.testing.assert_close(result.model[:2](x), source[:2](x), rtol=1e-2, atol=1e-2)
    for model in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert same_tensors(model, result.model)
        assert same_bits(model[:2](x), result.model[:2](x))
    floats = result.dequantize()
    assert type(floats[1]) is Gated
    assert floats[1] is floats[3]
    torch.testing.assert_close(floats[:2](x), result.model[:2](x))
    assert type(result.model[1]) is QuantizedGated, "dequantize changed the model itself"


def test_a_layer_of_ones_own_is_quantized_in_place() -> None:
    model = net()
    Quantizer().layer(GatedQuantizer()).apply_(model)
    assert isinstance(model[1], QuantizedGated)
    assert model[1] is model[3]


@pytest.mark.parametrize("grid", [Sixteenths(), Affine(granularity=PerColumn())], ids=repr)
def test_what_is_not_registered_is_validated_all_the_same(grid: Scheme) -> None:
    """Instances are enough to use a class: a name is only needed to load it elsewhere."""
    quantizer = Quantizer().scheme(grid).only("*").layer(GatedQuantizer())
    validation = quantizer.apply(net()[:2]).validate(torch.randn(3, 8))
    assert validation, str(validation)


@each_suffix
def test_a_container_of_ones_own_is_adapted_saved_and_reverted(suffix: str, tmp_path: Path) -> None:
    source = nn.Sequential(Peeking())
    result = Quantizer().layer(PeekingContainer()).apply(source)
    assert not result.model[0].quick
    assert source[0].quick
    path = result.save(tmp_path / f"model{suffix}")
    with pytest.raises(UnknownKindError, match=r"tests\.peeking"):
        load_model(path, nn.Sequential(Peeking()))
    loaded = load_model(path, nn.Sequential(Peeking()), kinds=KINDS)
    assert not loaded[0].quick
    assert result.dequantize()[0].quick
    assert not result.model[0].quick
    assert result.validate(torch.randn(2, 16))


class Listing(Serializer):
    """A format of ones own: text, without a byte of the built-in ones."""

    format = "listing"
    suffixes = (".list",)

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(checkpoint, file)

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        found = pickle.loads(path.read_bytes())
        assert isinstance(found, Checkpoint)
        return found


class Picky(Listing):
    """A format that can hold nothing."""

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        raise CheckpointError("picky holds nothing")

    def can_express(self, checkpoint: Checkpoint) -> str | None:
        return "picky holds nothing"


def test_a_format_of_ones_own_is_passed_by_hand(tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    path = result.save(tmp_path / "model.list", serializer=Listing())
    assert_same(load_model(path, small(), serializer=Listing()), result.model)
    save_model(result.model, path, serializer=Listing())
    assert_same(load_model(path, small(), serializer=Listing()), result.model)
    validation = result.validate(torch.randn(2, 64), serializer=Listing())
    assert validation
    assert "listing" in str(validation)


def test_a_format_that_cannot_hold_the_model_fails_validation() -> None:
    validation = Quantizer().apply(small()).validate(serializer=Picky())
    assert validation.status == "failed"
    assert "picky holds nothing" in str(validation)


@attrs.frozen
class Down(Rounding):
    """A rounding of ones own: files need not know it."""

    kind: ClassVar[str] = "tests.down"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        return grid.scheme.quantize(weight - 1e-3, grid.qparams(weight))


@each_suffix
def test_a_rounding_of_ones_own_is_not_needed_to_load(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().rounding(Down()).apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    assert_same(load_model(path, small()), result.model)
    assert json.dumps(result.plan.config).count("tests.down") == 1
    with pytest.raises(UnknownKindError, match=r"tests\.down"):
        Quantizer.from_config(result.plan.config)
    again = Quantizer.from_config(result.plan.config, kinds={Down.kind: Down})
    assert repr(again) == repr(Quantizer().rounding(Down()))
