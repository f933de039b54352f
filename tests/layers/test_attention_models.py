"""nn.MultiheadAttention as a part: of models, files, copies and ties; and what is refused."""

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mono_quant import (
    KernelSpec,
    PackedTensor,
    QuantizedModule,
    Quantizer,
    SlowPathWarning,
    load_model,
)
from mono_quant.kernels import REFERENCE
from mono_quant.modules import CallingMultiheadAttention, QuantizedMultiheadAttention
from tests.helpers import (
    WEIGHTS_ONLY,
    assert_near,
    dense,
    noise,
    oracle,
    quantized,
    same_bits,
    same_tensors,
)

SIZE, HEADS, LENGTH = 64, 4, 5
X = noise(3, LENGTH, SIZE)
Make = Callable[[], nn.MultiheadAttention]


class Plain(nn.MultiheadAttention):
    """Adds nothing."""


class OwnForward(nn.MultiheadAttention):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # that is the point
        found: Tensor = super().forward(x, x, x)[0]
        return found


def fused() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(SIZE, HEADS, batch_first=True).eval()


def apart() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(SIZE, HEADS, kdim=SIZE, vdim=48, add_bias_kv=True).eval()


def inputs_of(attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    return X, X, X if attention.vdim == SIZE else noise(3, LENGTH, attention.vdim)


def codes_of(layer: nn.Module, name: str) -> Tensor:
    """Return the codes of a weight."""
    assert isinstance(layer, QuantizedModule)
    return layer.packed_weights()[name].tensors["codes"]


QUANTIZERS = {
    "weights": WEIGHTS_ONLY,
    "4 bits": Quantizer().bits(4).group_size(16).only("*"),
    "dynamic": Quantizer().activations("dynamic"),
    "no output projection": WEIGHTS_ONLY.skip("out_proj"),
    "only the output projection": WEIGHTS_ONLY.only("out_proj"),
}
each = pytest.mark.parametrize("make", [fused, apart])
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


@each
@each_quantizer
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_gives_the_same_bits_back(
    make: Make, quantizer: Quantizer, suffix: str, device: str, tmp_path: Path
) -> None:
    result = quantizer.apply(make())
    path = result.save(tmp_path / f"attention{suffix}")
    skeleton = make() if device == "cpu" else make().to(device)
    loaded = load_model(path, skeleton)
    assert type(loaded) is type(result.model)
    assert same_tensors(loaded, result.model)
    inputs = inputs_of(loaded)
    for one, other in zip(loaded(*inputs), result.model(*inputs), strict=True):
        assert same_bits(one, other)
    assert result.validate(inputs)


@each
@each_quantizer
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_computes_the_same_bits(
    make: Make, quantizer: Quantizer, again: Callable[[nn.Module], nn.Module]
) -> None:
    model = quantizer.apply(make()).model
    other = again(model)
    assert type(other) is type(model)
    assert same_tensors(model, other)
    assert same_bits(model(*inputs_of(model))[0], other(*inputs_of(model))[0])


@each
@each_quantizer
def test_a_state_dict_is_loaded_into_another_one(make: Make, quantizer: Quantizer) -> None:
    first, second = quantizer.apply(make()).model, quantizer.apply(make()).model
    assert not same_bits(first(*inputs_of(first))[0], second(*inputs_of(first))[0])
    second.load_state_dict(first.state_dict())
    assert same_bits(first(*inputs_of(first))[0], second(*inputs_of(first))[0])


@each
@each_quantizer
def test_dequantize_gives_torchs_attention_back(make: Make, quantizer: Quantizer) -> None:
    source = make()
    result = quantizer.apply(source)
    twin = oracle(result.model, source)
    floats = result.dequantize()
    assert type(floats) is nn.MultiheadAttention
    assert set(vars(floats)) == set(vars(source))
    assert list(floats.state_dict()) == list(source.state_dict())
    assert list(floats._parameters) == list(source._parameters)
    with torch.no_grad():
        found = floats(*inputs_of(floats))[0]
    assert_near(found, twin(*(x.double() for x in inputs_of(floats)))[0].detach())


@pytest.mark.parametrize(
    ("make", "name"),
    [(fused, "dynamic"), (apart, "4 bits"), (fused, "only the output projection")],
)
def test_attention_is_compiled_and_exported_to_the_same_values(make: Make, name: str) -> None:
    result = QUANTIZERS[name].apply(make())
    inputs = inputs_of(result.model)
    expected = result.model(*inputs)[0]
    torch.compiler.reset()  # it gives up on code that it has compiled for many models
    compiled = torch.compile(result.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs)[0], expected)
    program = result.export(inputs).module()
    torch.testing.assert_close(program(*inputs)[0], expected)


def test_moving_attention_keeps_its_codes() -> None:
    model = quantized(fused())
    codes = codes_of(model, "in_proj_weight").clone()
    moved = model.double()
    assert moved(X.double(), X.double(), X.double())[0].dtype == torch.float64
    assert same_bits(codes_of(moved, "in_proj_weight"), codes)
    assert codes_of(moved.to("meta"), "in_proj_weight").is_meta


@each
def test_a_quantized_weight_read_by_attribute_is_a_decoded_copy(make: Make) -> None:
    source = make()
    model = quantized(source)
    for name, parameter in source.named_parameters(recurse=False):
        if not name.endswith("proj_weight"):
            assert getattr(model, name) is model._parameters[name]
            continue
        with pytest.warns(SlowPathWarning) as seen:
            copied = getattr(model, name)
        assert seen[0].filename == __file__
        assert copied.shape == parameter.shape
        torch.testing.assert_close(copied.double(), dense(model, source, name))
    missing = "q_proj_weight" if source._qkv_same_embed_dim else "in_proj_weight"
    assert getattr(model, missing) is None


@pytest.mark.parametrize("through_file", [False, True])
def test_weights_that_two_attentions_share_stay_shared(through_file: bool, tmp_path: Path) -> None:
    def make() -> nn.ModuleList:
        one, other = fused(), fused()
        other.in_proj_weight = one.in_proj_weight
        other.out_proj.weight = one.out_proj.weight
        return nn.ModuleList([one, other])

    source = make()
    result = WEIGHTS_ONLY.apply(source)
    assert [row.aliases for row in result.report.quantized] == [
        ("1.in_proj_weight",),
        ("1.out_proj.weight",),
    ]
    model = result.model
    if through_file:
        model = load_model(result.save(tmp_path / "tied.safetensors"), make())
    for path, name in (("", "in_proj_weight"), (".out_proj", "weight")):
        one, other = (model.get_submodule(f"{place}{path}") for place in (0, 1))
        assert codes_of(one, name) is codes_of(other, name)
    assert same_bits(model[0](X, X, X)[0], model[1](X, X, X)[0])
    floats = result.dequantize()
    for name in ("in_proj_weight", "out_proj.weight"):
        assert floats.get_parameter(f"0.{name}") is floats.get_parameter(f"1.{name}")


@pytest.mark.parametrize("first", ["out_proj", "the rest"])
def test_the_second_half_may_be_quantized_later(first: str) -> None:
    source = fused()
    half = WEIGHTS_ONLY.only(first) if first == "out_proj" else WEIGHTS_ONLY.skip("out_proj")
    begun = half.apply(source)
    result = WEIGHTS_ONLY.apply(begun.model)
    assert type(result.model) is QuantizedMultiheadAttention
    assert same_tensors(result.model, WEIGHTS_ONLY.apply(source).model)
    before = {row.name for row in result.report.layers if row.reason == "quantized before"}
    assert before == {row.name for row in begun.report.quantized}
    assert len(before) == 1
    floats = result.dequantize()
    assert type(floats) is nn.MultiheadAttention
    assert set(vars(floats)) == set(vars(source))


def test_a_subclass_without_a_forward_keeps_its_class_and_its_output_projection() -> None:
    source = Plain(SIZE, HEADS, batch_first=True).eval()
    result = WEIGHTS_ONLY.apply(source)
    model = result.model
    assert isinstance(model, Plain)
    assert isinstance(model, QuantizedMultiheadAttention)
    [row] = [row for row in result.report.kept if row.name == "out_proj.weight"]
    assert row.reason == (
        "Plain is no plain MultiheadAttention, and may read this weight by attribute"
    )
    assert_near(model(X, X, X)[0], oracle(model, source)(X.double(), X.double(), X.double())[0])
    assert type(result.dequantize()) is Plain


def with_forward_on_the_object() -> nn.MultiheadAttention:
    made = fused()
    made.forward = made.forward  # type: ignore[method-assign]  # that is the point
    return made


def with_taken_name() -> nn.MultiheadAttention:
    made = fused()
    made.quantized_weights = nn.Identity()
    return made


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own forward": (
        lambda: OwnForward(SIZE, HEADS),
        "OwnForward is a MultiheadAttention with a forward of its own",
    ),
    "parametrized": (
        lambda: parametrizations.weight_norm(fused(), "in_proj_weight"),
        "it is parametrized: apply torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "old hook": (
        lambda: nn.utils.spectral_norm(fused(), "in_proj_weight"),
        "its weight is made by a hook (old-style weight_norm or pruning): remove that",
    ),
    "a name": (
        with_taken_name,
        "it has an attribute called quantized_weights, which a quantized layer needs",
    ),
    "forward on the object": (
        with_forward_on_the_object,
        "its forward was replaced on the object, and would not be asked",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_quantized_stays_float_and_says_why(
    make: Callable[[], nn.Module], reason: str
) -> None:
    rows = {row.name: row for row in WEIGHTS_ONLY.plan(make()).outline.report.layers}
    assert rows["in_proj_weight"].reason == reason
    if reason.startswith("its weight") or "attribute called" in reason:
        assert rows["out_proj.weight"].scheme is not None
    else:
        assert "may read this weight by attribute" in str(rows["out_proj.weight"].reason)


Mode = Callable[[], AbstractContextManager[object]]
MODES: list[Mode] = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_computes_what_its_float_twin_does(
    mode: Mode,
    batch_first: bool,
    padded: bool,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def counting(spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        calls.append(type(spec.operation).__name__)
        return REFERENCE(spec, x, weight, bias)

    monkeypatch.setattr("mono_quant.kernels.Site.kernel", lambda *_, **__: counting)
    source = nn.Transformer(
        SIZE, HEADS, 2, 1, 128, batch_first=batch_first, dropout=0.0, norm_first=False
    ).train(training)
    model = quantized(source).train(training)
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [4], [2]]) if padded else None
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    target = noise(3, 4, SIZE, seed=1)
    tokens = (X, target) if batch_first else (X.transpose(0, 1), target.transpose(0, 1))
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with mode():
        found = model(*tokens, tgt_mask=causal, tgt_is_causal=True, **options)
    encoder, decoder = ["MatrixProduct"] * 4, ["MatrixProduct"] * 2 + ["PartialProduct"] * 2
    assert calls == [*encoder, *encoder, *decoder, *["MatrixProduct"] * 3]
    expected = oracle(model, source)(
        *(x.double() for x in tokens), tgt_mask=causal.double(), **options
    )
    assert_near(found, expected.detach())


def test_an_attention_learns_through_its_inputs() -> None:
    model = quantized(fused()).train()
    x = X.clone().requires_grad_()
    model(x, x, x)[0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
    assert model.in_proj_bias.grad is not None


def test_only_the_class_of_an_attention_says_that_it_calls() -> None:
    model = WEIGHTS_ONLY.only("out_proj").apply(fused()).model
    assert type(model) is CallingMultiheadAttention
    assert list(model._parameters) == list(fused()._parameters)
