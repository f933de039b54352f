"""Models that cannot be quantized are refused, with the call that mends it."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    CheckpointError,
    InputError,
    LinearLikeQuantizer,
    MonoQuantError,
    QuantizedLayer,
    Quantizer,
)
from tests.helpers import same_bits, same_tensors


def net() -> nn.Sequential:
    """Return two layers."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


class Uncopyable(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)
        self.live = (x for x in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_script_module_is_refused(in_place: bool) -> None:
    scripted = torch.jit.script(net())
    apply = Quantizer().apply_ if in_place else Quantizer().apply
    with pytest.raises(InputError, match=r"ScriptModule.*give the module it was made from"):
        apply(scripted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_is_refused() -> None:
    x = torch.randn(1, 64)
    traced = torch.jit.trace(net(), x)  # type: ignore[no-untyped-call]  # untyped in torch
    with pytest.raises(InputError, match="ScriptModule"):
        Quantizer().apply(traced)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_module_inside_a_model_does_not_break_it() -> None:
    scripted = torch.jit.script(net())
    model = nn.ModuleList([scripted, nn.Linear(64, 8)])
    try:
        result = Quantizer().apply(model)
    except MonoQuantError:
        return  # a reason is as good
    x = torch.randn(2, 64)
    assert same_bits(result.model[0](x), model[0](x))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_model_is_refused_until_it_was_run() -> None:
    model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 8))
    with pytest.raises(InputError, match=r"0\.weight is lazy.*run the model once on an example"):
        Quantizer().apply(model)
    model(torch.randn(1, 32))
    assert isinstance(Quantizer().apply(model).model[0], QuantizedLayer)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(InputError, match=r"0\.weight is on the meta device.*load them first"):
        Quantizer().apply(model)


def test_a_buffer_on_the_meta_device_is_refused() -> None:
    model = net()
    model.register_buffer("positions", torch.empty(3, device="meta"))
    with pytest.raises(InputError, match=r"positions is on the meta device.*load them first"):
        Quantizer().apply(model)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_a_sparse_weight_is_refused_with_the_call_that_mends_it(
    sparse: Callable[[Tensor], Tensor],
) -> None:
    model = net()
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(sparse(linear.weight.detach()), requires_grad=False)
    with pytest.raises(InputError, match=r"0\.weight is stored as torch\.sparse.*to_dense\(\)"):
        Quantizer().apply(model)


class Graph(nn.Module):
    """Multiplies by a sparse adjacency, as graph networks do."""

    def __init__(self, sparse: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("adjacency", sparse(torch.eye(5)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(torch.sparse.mm(self.get_buffer("adjacency"), x))
        return found


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize(
    ("sparse", "indices"), [(Tensor.to_sparse, 5 + 5), (Tensor.to_sparse_csr, 6 + 5)]
)
def test_a_sparse_buffer_is_kept_counted_and_refused_by_files(
    sparse: Callable[[Tensor], Tensor], indices: int, tmp_path: Path
) -> None:
    model, x = Graph(sparse), torch.randn(5, 64)
    result = Quantizer().fit(x).apply(model)
    assert result.report.buffer_bytes == 5 * 4 + indices * 8  # float32 values and int64 indices
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db > 30
    with pytest.raises(CheckpointError, match=r"adjacency is stored as torch\.sparse_.*dense"):
        result.save(tmp_path / "model.safetensors")
    assert result.validate().status == "failed"
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_is_refused_with_the_way_to_do_it() -> None:
    compiled = torch.compile(net(), backend="eager")
    assert isinstance(compiled, nn.Module)
    with pytest.raises(InputError, match=r"quantize model\._orig_mod and compile the result"):
        Quantizer().apply(compiled)
    original = compiled._orig_mod
    assert isinstance(original, nn.Module)
    assert Quantizer().apply(original).report.quantized


def test_a_model_compiled_in_place_runs_its_quantized_layers() -> None:
    source = net()
    source.compile(backend="eager")
    model = Quantizer().apply(source).model
    x = torch.randn(2, 64)
    expected = Quantizer().apply(net_like(source)).model(x)
    assert same_bits(model(x), expected)


def net_like(source: nn.Sequential) -> nn.Sequential:
    """Return an uncompiled model of the same weights."""
    other = net()
    other.load_state_dict(source.state_dict())
    return other


def test_a_compiled_layer_inside_a_model_is_quantized_or_left_whole() -> None:
    source = net()
    plain = copy.deepcopy(source)
    compiled = torch.compile(source[0], backend="eager")
    assert isinstance(compiled, nn.Module)
    source[0] = compiled
    x = torch.randn(2, 64)
    try:
        model = Quantizer().apply(source).model
    except MonoQuantError:
        return  # a reason is as good
    allowed = [Quantizer().apply(plain).model(x), Quantizer().skip("0").apply(plain).model(x)]
    assert any(same_bits(model(x), expected) for expected in allowed)
    assert same_bits(source(x), plain(x))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"a Tensor is no model.*a state dict"):
        Quantizer().apply(torch.randn(3))  # type: ignore[call-overload]  # the point


def test_a_model_that_cannot_be_copied_is_refused_and_quantized_in_place() -> None:
    model = Uncopyable()
    with pytest.raises(InputError, match=r"Uncopyable cannot be copied.*in place with apply_"):
        Quantizer().apply(model)
    assert isinstance(Quantizer().apply_(model).model.layer, QuantizedLayer)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_quantized_model_is_not_quantized_twice(bits: int, in_place: bool) -> None:
    once = Quantizer().bits(4).apply(net()).model
    before = copy.deepcopy(once)
    quantizer = Quantizer().bits(bits)
    result = (quantizer.apply_ if in_place else quantizer.apply)(once)
    assert same_tensors(result.model, before)
    rows = [row for row in result.report.layers if row.shape]
    assert [row.reason for row in rows] == ["quantized before"] * 2
    assert [row.scheme for row in rows] == ["4-bit asymmetric per-group 64"] * 2
    assert all(row.bytes == row.float_bytes for row in rows)


def test_the_rest_of_a_half_quantized_model_is_quantized() -> None:
    once = Quantizer().only("0").apply(net()).model
    first = copy.deepcopy(once[0])
    twice = Quantizer().bits(4).apply(once).model
    assert same_tensors(twice[0], first)
    assert isinstance(twice[2], QuantizedLayer)
    assert twice[2].packed_weights()["weight"].scheme.code_bits == 4


def test_a_model_without_layers_comes_back_as_it_is() -> None:
    source = nn.Sequential(nn.ReLU(), nn.LayerNorm(8))
    result = Quantizer().apply(source)
    assert same_tensors(result.model, source)
    assert "no weight is quantized by this" in result.report.notes


def test_a_model_of_inference_tensors_is_refused_with_what_to_do() -> None:
    with torch.inference_mode():
        model = net()
    with pytest.raises(InputError, match=r"0\.weight was made under torch\.inference_mode\(\)"):
        Quantizer().apply(model)


class Vector(nn.Module):
    """Has a weight of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_like_a_product_without_a_matrix_stays_float(transposed: bool) -> None:
    quantizer = Quantizer().layer(LinearLikeQuantizer(f"{__name__}.Vector", transposed=transposed))
    [row] = quantizer.plan(nn.Sequential(Vector())).outline.report.layers
    assert row.reason is not None
    assert "has no two-dimensional parameter named weight" in row.reason
