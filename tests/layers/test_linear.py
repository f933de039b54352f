"""nn.Linear against F.linear on the dequantized weight."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from mono_quant import (
    Affine,
    LinearQuantizer,
    PerGroup,
    PerTensor,
    Quantizer,
    SlowPathWarning,
    load_model,
)
from mono_quant.modules import QuantizedLinear
from tests.helpers import (
    GRIDS,
    TOLERANCES,
    WEIGHTS_ONLY,
    assert_like_float,
    assert_near,
    oracle,
    quantized,
)


class Scaled(nn.Linear):
    """Has a forward of its own, which reads the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, 2 * self.weight, self.bias)


class Shifted(nn.Linear):
    """Has a forward of its own, which calls the one of its parent."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


class Plain(nn.Linear):
    """A subclass without a forward of its own."""


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_linear_computes_what_the_float_layer_does_on_the_dequantized_weight(
    grid: Quantizer, dtype: torch.dtype
) -> None:
    source = nn.Linear(128, 24).to(dtype)
    assert_like_float(quantized(source, grid), source, torch.randn(5, 128, dtype=dtype))


@pytest.mark.parametrize(
    "grid",
    [
        WEIGHTS_ONLY.granularity(PerTensor()),
        Quantizer().bits(4).granularity("tensor"),
        Quantizer().bits(4).symmetric().granularity("channel"),
        Quantizer().bits(5).group_size(16),
        Quantizer().bits(2).symmetric().group_size(8).scale_dtype(torch.float32),
        Quantizer().scheme(Affine(7, symmetric=False, granularity=PerGroup(32))),
    ],
    ids=repr,
)
def test_every_granularity_computes_on_the_dequantized_weight(grid: Quantizer) -> None:
    source = nn.Linear(64, 24)
    assert_like_float(quantized(source, grid), source, torch.randn(5, 64))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (2, 3, 64), (2, 0, 64), (1, 1, 2, 64)])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_leading_dimensions_are_taken(shape: tuple[int, ...], bits: int) -> None:
    source = nn.Linear(64, 12)
    model = quantized(source, WEIGHTS_ONLY.bits(bits))
    assert model(torch.randn(shape)).shape == (*shape[:-1], 12)
    assert_like_float(model, source, torch.randn(shape))


def test_linear_without_a_bias() -> None:
    source = nn.Linear(64, 12, bias=False)
    model = quantized(source)
    assert not list(model.parameters())
    assert_like_float(model, source, torch.randn(3, 64))


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_a_row_length_that_fills_no_whole_byte_is_quantized(bits: int) -> None:
    source = nn.Linear(13, 7)
    assert_like_float(quantized(source, WEIGHTS_ONLY.bits(bits)), source, torch.randn(3, 13))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_a_view_is_quantized_as_it_reads(bits: int) -> None:
    source = nn.Linear(64, 12)
    source.weight = nn.Parameter(torch.randn(128, 12)[::2].t())
    assert not source.weight.is_contiguous()
    assert_like_float(quantized(source, WEIGHTS_ONLY.bits(bits)), source, torch.randn(3, 64))


def test_an_input_that_is_a_view_is_taken() -> None:
    source = nn.Linear(64, 12)
    model = quantized(source)
    assert_like_float(model, source, torch.randn(64, 6).t()[::2])
    assert_like_float(model, source, torch.randn(1, 64).expand(4, 64))


@pytest.mark.parametrize("bias", [True, False])
def test_integer_inputs_are_refused_as_torch_refuses_them(bias: bool) -> None:
    source = nn.Linear(64, 12, bias=bias)
    model = quantized(source)
    with pytest.raises((RuntimeError, TypeError)):
        source(torch.ones(2, 64, dtype=torch.int64))
    with pytest.raises((RuntimeError, TypeError)):
        model(torch.ones(2, 64, dtype=torch.int64))


def test_an_input_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(RuntimeError):
        quantized(nn.Linear(64, 12))(torch.randn(2, 63))


def test_the_result_is_a_linear_with_its_attributes() -> None:
    source = nn.Linear(64, 12)
    model = quantized(source)
    assert type(model) is QuantizedLinear
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (64, 12)
    assert model is not source


def test_the_weight_read_by_attribute_is_dequantized_with_a_warning() -> None:
    source = nn.Linear(64, 12)
    model = quantized(source)
    with pytest.warns(SlowPathWarning, match="QuantizedLinear was read by attribute"):
        weight = model.weight
    expected = oracle(model, source).weight
    torch.testing.assert_close(weight.to(torch.float64), expected.detach(), rtol=0, atol=0)


def test_the_warning_names_the_line_that_read_the_weight() -> None:
    model = quantized(nn.Linear(64, 12))
    with pytest.warns(SlowPathWarning) as seen:
        assert model.weight.shape == (12, 64)
    assert seen[0].filename == __file__


def test_a_subclass_without_a_forward_is_quantized_and_stays_one() -> None:
    source = Plain(64, 12)
    model = quantized(source)
    assert isinstance(model, Plain)
    assert isinstance(model, QuantizedLinear)
    assert_like_float(model, source, torch.randn(3, 64))


@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_a_subclass_with_a_forward_of_its_own_stays_float_with_the_reason(
    kind: type[nn.Linear],
) -> None:
    source = nn.Sequential(kind(64, 12), nn.Linear(12, 12))
    result = WEIGHTS_ONLY.apply(source)
    assert type(result.model[0]) is kind
    [row] = [row for row in result.report.kept if row.name == "0.weight"]
    assert row.reason is not None
    assert f"{kind.__name__} is a Linear with a forward of its own" in row.reason
    assert "LinearQuantizer(own_forward=True)" in row.reason


def test_a_forward_that_calls_its_parents_runs_on_the_quantized_product() -> None:
    source = Shifted(64, 12)
    taught = WEIGHTS_ONLY.layer(LinearQuantizer(own_forward=True))
    assert_like_float(quantized(source, taught), source, torch.randn(3, 64))


def test_a_forward_that_reads_the_weight_gets_the_right_one_and_warns() -> None:
    source = Scaled(64, 12)
    model = quantized(source, WEIGHTS_ONLY.layer(LinearQuantizer(own_forward=True)))
    x = torch.randn(3, 64)
    expected = oracle(model, source)(x.to(torch.float64))
    with pytest.warns(SlowPathWarning, match="QuantizedScaled"):
        found = model(x)
    assert_near(found, expected)


def _pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]  # untyped in torch
    return layer


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(layer)


HOOKS = {
    "weight_norm": _old_weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": _pruned,
}
each_hook = pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)


@each_hook
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 12), lambda: nn.Conv1d(8, 12, 3)], ids=["linear", "conv"]
)
def test_a_weight_made_by_an_old_style_hook_stays_float_with_the_reason(
    hook: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]
) -> None:
    model = nn.Sequential(hook(make()))
    [row] = Quantizer().plan(model).outline.report.kept[:1]
    assert row.reason is not None
    assert "made by a hook" in row.reason
    assert "torch.nn.utils.parametrizations" in row.reason


@each_hook
@pytest.mark.parametrize("in_place", [False, True])
def test_the_rest_of_a_model_with_such_hooks_is_quantized(
    hook: Callable[[nn.Module], nn.Module], in_place: bool, tmp_path: Path
) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(hook(nn.Linear(64, 64)), nn.Linear(64, 12)).eval()

    source = make()
    x = torch.randn(3, 64)
    hidden = source[0](x)
    result = (WEIGHTS_ONLY.apply_ if in_place else WEIGHTS_ONLY.apply)(source)
    assert isinstance(result.model[1], QuantizedLinear)
    torch.testing.assert_close(result.model[0](x), hidden, rtol=0, atol=0)
    loaded = load_model(result.save(tmp_path / "model.pt"), make())
    torch.testing.assert_close(loaded(x), result.model(x), rtol=0, atol=0)
    assert result.validate(x)


def test_pruning_made_permanent_is_quantized() -> None:
    source = nn.Linear(64, 12)
    prune.remove(_pruned(source), "weight")  # type: ignore[no-untyped-call]  # untyped in torch
    assert_like_float(quantized(source), source, torch.randn(3, 64))
