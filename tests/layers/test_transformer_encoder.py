"""nn.TransformerEncoder, whose fast path reads the weights of its children and calls none of them.

What is counted are calls of kernels and of torch's fused operator: a forward hook on a child would
turn the fast path off by itself and prove nothing.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import KernelSpec, PackedTensor, load_model
from mono_quant.kernels import REFERENCE
from tests.helpers import WEIGHTS_ONLY, assert_near, oracle

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

Mode = Callable[[], AbstractContextManager[object]]
MODES: dict[str, Mode] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [False] * 2 + [True] * 5])
MASKS = {"no padding": None, "padding": PADDING}


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of its operation at each call of a kernel."""
    calls: list[str] = []

    def counting(spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        calls.append(type(spec.operation).__name__)
        return REFERENCE(spec, x, weight, bias)

    monkeypatch.setattr("mono_quant.kernels.Site.kernel", lambda *_, **__: counting)
    return calls


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows at each call of torch's fused encoder layer."""
    calls: list[str] = []
    fused = torch._transformer_encoder_layer_fwd

    def counting(*args: object) -> Tensor:
        calls.append("fused")
        found: Tensor = fused(*args)  # type: ignore[arg-type]  # handed on as they came
        return found

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counting)
    return calls


def pickled(model: nn.TransformerEncoder) -> nn.TransformerEncoder:
    """Return what comes back from a pickle."""
    again: nn.TransformerEncoder = pickle.loads(pickle.dumps(model))
    return again


@contextmanager
def slow_path() -> Iterator[None]:
    """Keep torch from its fast paths."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def layer(activation: str = "relu", norm_first: bool = False) -> nn.TransformerEncoderLayer:
    """Return a layer in eval mode."""
    return nn.TransformerEncoderLayer(
        64, 4, 128, activation=activation, batch_first=True, norm_first=norm_first
    ).eval()


def encoder() -> nn.TransformerEncoder:
    """Return two layers of fresh weights in eval mode."""
    made = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(64)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def expected_of(
    model: nn.Module, source: nn.Module, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return what the float encoder computes on its slow path, on the dequantized weights."""
    twin = oracle(model, source)
    with slow_path(), torch.no_grad():
        found: Tensor = twin(x.to(torch.float64), src_key_padding_mask=mask)
    return found


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_quantized_layer_of_an_encoder_is_called(
    mode: Mode, mask: Tensor | None, bits: int, kernel_calls: list[str], fused_calls: list[str]
) -> None:
    source = encoder()
    model = WEIGHTS_ONLY.bits(bits).apply(source).model
    x = torch.randn(3, 7, 64)
    with mode():
        found = model(x, src_key_padding_mask=mask)
    assert kernel_calls == ["MatrixProduct"] * 8
    assert not fused_calls
    assert_near(found, expected_of(model, source, x, mask))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_single_encoder_layer_calls_its_children(
    mode: Mode, mask: Tensor | None, activation: str, norm_first: bool, kernel_calls: list[str]
) -> None:
    source = layer(activation, norm_first)
    model = WEIGHTS_ONLY.apply(source).model
    x = torch.randn(3, 7, 64)
    with mode():
        found = model(x, src_key_padding_mask=mask)
    assert len(kernel_calls) == 4
    assert_near(found, expected_of(model, source, x, mask))


@pytest.mark.parametrize("which", ["layers.0", "layers.1"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_one_quantized_layer_among_float_ones_is_called(
    which: str, mask: Tensor | None, kernel_calls: list[str], fused_calls: list[str]
) -> None:
    source = encoder()
    model = WEIGHTS_ONLY.only(which).apply(source).model
    x = torch.randn(3, 7, 64)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=mask)
    assert len(kernel_calls) == 4
    assert len(fused_calls) == 1, "the float layer lost its fast path"
    assert_near(found, expected_of(model, source, x, mask))


def test_the_float_source_takes_its_fast_path_as_before(
    kernel_calls: list[str], fused_calls: list[str]
) -> None:
    source = encoder()
    result = WEIGHTS_ONLY.apply(source)
    with torch.no_grad():
        source(torch.randn(3, 7, 64), src_key_padding_mask=PADDING)
    assert len(fused_calls) == 2
    assert not kernel_calls
    assert source.use_nested_tensor
    assert not result.model.use_nested_tensor


def test_an_encoder_left_in_float_is_not_adapted(fused_calls: list[str]) -> None:
    source = nn.ModuleList([encoder(), nn.Linear(64, 64)])
    model = WEIGHTS_ONLY.skip("0").apply(source).model
    with torch.no_grad():
        model[0](torch.randn(3, 7, 64), src_key_padding_mask=PADDING)
    assert len(fused_calls) == 2


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_loaded_encoder_calls_its_children_too(
    mode: Mode, mask: Tensor | None, suffix: str, tmp_path: Path, kernel_calls: list[str]
) -> None:
    result = WEIGHTS_ONLY.apply(encoder())
    loaded = load_model(result.save(tmp_path / f"encoder{suffix}"), encoder())
    x = torch.randn(3, 7, 64)
    with mode():
        found = loaded(x, src_key_padding_mask=mask)
        assert len(kernel_calls) == 8
        torch.testing.assert_close(
            found, result.model(x, src_key_padding_mask=mask), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copied_encoder_calls_its_children_too(
    again: Callable[[nn.TransformerEncoder], nn.TransformerEncoder], kernel_calls: list[str]
) -> None:
    model = again(WEIGHTS_ONLY.apply(encoder()).model)
    with torch.no_grad():
        model(torch.randn(3, 7, 64), src_key_padding_mask=PADDING)
    assert len(kernel_calls) == 8


@pytest.mark.parametrize("through_file", [False, True])
def test_dequantize_restores_the_fast_path(
    through_file: bool, tmp_path: Path, kernel_calls: list[str], fused_calls: list[str]
) -> None:
    source = encoder()
    result = WEIGHTS_ONLY.apply(source)
    if through_file:
        path = result.save(tmp_path / "encoder.safetensors")
        floats = WEIGHTS_ONLY.apply(load_model(path, encoder())).dequantize()
    else:
        floats = result.dequantize()
    assert floats.use_nested_tensor is source.use_nested_tensor is True
    x = torch.randn(3, 7, 64)
    with torch.no_grad():
        found = floats(x, src_key_padding_mask=PADDING)
    assert len(fused_calls) == 2
    assert not kernel_calls
    real = ~PADDING  # nested tensors leave zeros where there is padding
    assert_near(found[real], expected_of(result.model, source, x, PADDING)[real])


def test_dequantized_layers_have_the_attributes_and_keys_of_the_source() -> None:
    source = encoder()
    floats = WEIGHTS_ONLY.apply(source).dequantize()
    for one, other in zip(floats.modules(), source.modules(), strict=True):
        assert type(one) is type(other)
        assert set(vars(one)) == set(vars(other))
    assert list(floats.state_dict()) == list(source.state_dict())
    for block in floats.layers:
        assert isinstance(block, nn.TransformerEncoderLayer)
        assert block.activation_relu_or_gelu == 1


def test_an_encoder_that_was_quantized_twice_is_restored_all_the_same() -> None:
    source = encoder()
    once = WEIGHTS_ONLY.only("layers.0").apply(source).model
    floats = WEIGHTS_ONLY.apply(once).dequantize()
    assert floats.use_nested_tensor is True
    assert [block.activation_relu_or_gelu for block in floats.layers] == [1, 1]


def test_an_encoder_in_place_calls_its_children(kernel_calls: list[str]) -> None:
    model = encoder()
    WEIGHTS_ONLY.apply_(model)
    with torch.no_grad():
        model(torch.randn(3, 7, 64))
    assert len(kernel_calls) == 8


def test_a_whole_transformer_computes_what_its_float_twin_does(kernel_calls: list[str]) -> None:
    source = nn.Transformer(64, 4, 1, 1, 128, batch_first=True).eval()
    model = WEIGHTS_ONLY.apply(source).model
    source_tokens, target_tokens = torch.randn(2, 5, 64), torch.randn(2, 3, 64)
    with torch.no_grad():
        found = model(source_tokens, target_tokens)
        encoder_layer, cross_attention = ["MatrixProduct"] * 4, ["PartialProduct"] * 2
        rest = ["MatrixProduct"] * 3
        assert kernel_calls == [*encoder_layer, *["MatrixProduct"] * 2, *cross_attention, *rest]
        with slow_path():
            expected = oracle(model, source)(source_tokens.double(), target_tokens.double())
    assert_near(found, expected)


def test_an_encoder_in_training_still_learns(kernel_calls: list[str]) -> None:
    model = WEIGHTS_ONLY.apply(encoder().train()).model
    x = torch.randn(3, 7, 64, requires_grad=True)
    model(x).sum().backward()
    assert len(kernel_calls) == 8
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
