"""nn.MultiheadAttention: what it computes, for every option of its own.

The oracle is torch's own forward in float64 on the decoded weights, kept from its fast path by
parameters that require a gradient.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import InputError, KernelSpec, PackedTensor, Quantizer, SlowPathWarning
from mono_quant.kernels import REFERENCE
from mono_quant.modules import (
    CallingMultiheadAttention,
    QuantizedLinear,
    QuantizedMultiheadAttention,
)
from tests.helpers import GRIDS, WEIGHTS_ONLY, assert_near, noise, oracle, quantized

Inputs = tuple[Tensor, Tensor, Tensor]
Make = Callable[[], nn.MultiheadAttention]

SIZE, HEADS = 64, 4
LENGTH, KEYS, BATCH = 5, 7, 3


def fresh(**options: object) -> nn.MultiheadAttention:
    """Return an attention whose biases are no zeros."""
    made = nn.MultiheadAttention(SIZE, HEADS, **options).eval()
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made


ATTENTIONS: dict[str, Make] = {
    "plain": fresh,
    "batch first": lambda: fresh(batch_first=True),
    "no bias": lambda: fresh(bias=False),
    "bias_kv": lambda: fresh(add_bias_kv=True),
    "zero": lambda: fresh(add_zero_attn=True, batch_first=True),
    "bias_kv and zero": lambda: fresh(add_bias_kv=True, add_zero_attn=True),
    "kdim": lambda: fresh(kdim=48),
    "vdim without bias": lambda: fresh(vdim=32, bias=False, batch_first=True),
    "everything": lambda: fresh(
        kdim=48, vdim=32, add_bias_kv=True, add_zero_attn=True, batch_first=True
    ),
}
SELF, ENCODED, APART = "self attention", "keys that are the values", "three inputs"


def inputs_of(attention: nn.MultiheadAttention, which: str, batched: bool = True) -> Inputs:
    """Return query, key and value that fit, as a batch in its order or without one."""

    def some(length: int, features: int, seed: int) -> Tensor:
        x = noise(BATCH, length, features, seed=seed)
        if not batched:
            return x[0]
        return x if attention.batch_first else x.transpose(0, 1)

    query = some(LENGTH, SIZE, 0)
    if attention._qkv_same_embed_dim:
        if which == SELF:
            return query, query, query
        if which == ENCODED:
            key = some(KEYS, SIZE, 1)
            return query, key, key
    return query, some(KEYS, attention.kdim, 1), some(KEYS, attention.vdim, 2)


def assert_like_torch(
    model: nn.Module, source: nn.MultiheadAttention, inputs: Inputs, **options: object
) -> None:
    """Assert that outputs and weights are those of the float layer on the decoded weights."""
    twin = oracle(model, source)
    seen: dict[int, Tensor] = {}
    wide = [seen.setdefault(id(x), x.double()) for x in inputs]  # one input stays one
    wide_options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    found, expected = model(*inputs, **options), twin(*wide, **wide_options)
    assert_near(found[0], expected[0])
    if expected[1] is None:
        assert found[1] is None
    else:
        assert_near(found[1], expected[1])


each = pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
each_call = pytest.mark.parametrize("which", [SELF, ENCODED, APART])
either = pytest.mark.parametrize("need_weights", [False, True])


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by operation and shape of the output at each call of a kernel."""
    calls: list[str] = []

    def counting(spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        found = REFERENCE(spec, x, weight, bias)
        calls.append(f"{type(spec.operation).__name__} {found.shape[-1]}")
        return found

    monkeypatch.setattr("mono_quant.kernels.Site.kernel", lambda *_, **__: counting)
    return calls


@each
@each_call
@either
@pytest.mark.parametrize("grid", ["8-bit", "4-bit"])
def test_attention_computes_what_torch_does(
    make: Make, which: str, need_weights: bool, grid: str
) -> None:
    source = make()
    model = quantized(source, GRIDS[grid].group_size(16) if grid == "4-bit" else GRIDS[grid])
    assert isinstance(model, QuantizedMultiheadAttention)
    assert isinstance(model.out_proj, QuantizedLinear)
    for batched in (True, False):
        inputs = inputs_of(source, which, batched)
        assert_like_torch(model, source, inputs, need_weights=need_weights)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@each_call
def test_attention_is_quantized_on_every_grid(grid: Quantizer, which: str) -> None:
    source = fresh()
    model = quantized(source, grid.activations(None))
    assert_like_torch(model, source, inputs_of(source, which))


@each
def test_in_float64_attention_is_the_oracle_to_rounding(make: Make) -> None:
    source = make()
    model = quantized(source).double()
    inputs = [x.double() for x in inputs_of(source, APART)]
    found, expected = model(*inputs), oracle(model, source)(*inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


FLOAT_MASK = noise(LENGTH, KEYS, seed=5)
PADDING = torch.arange(KEYS) >= torch.tensor([[KEYS], [4], [2]])
ATTENTION_MASKS: dict[str, Tensor | None] = {
    "none": None,
    "boolean": FLOAT_MASK > 0.8,
    "float": FLOAT_MASK,
    "boolean of each head": noise(BATCH * HEADS, LENGTH, KEYS, seed=6) > 0.8,
    "float of each head": noise(BATCH * HEADS, LENGTH, KEYS, seed=6),
}
PADDINGS: dict[str, Tensor | None] = {
    "none": None,
    "boolean": PADDING,
    "float": PADDING * -2.0,
}


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize(
    "make", [ATTENTIONS["plain"], ATTENTIONS["everything"]], ids=["plain", "everything"]
)
@pytest.mark.parametrize("mask", ATTENTION_MASKS.values(), ids=ATTENTION_MASKS)
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@either
def test_masks_are_merged_as_torch_merges_them(
    make: Make, mask: Tensor | None, padding: Tensor | None, need_weights: bool
) -> None:
    source = make()
    model = quantized(source)
    assert_like_torch(
        model,
        source,
        inputs_of(source, APART),
        attn_mask=mask,
        key_padding_mask=padding,
        need_weights=need_weights,
    )


@either
def test_masks_of_a_single_sequence_have_no_batch(need_weights: bool) -> None:
    source = fresh(add_bias_kv=True)
    model = quantized(source)
    inputs = inputs_of(source, ENCODED, batched=False)
    for mask in (FLOAT_MASK > 0.8, noise(HEADS, LENGTH, KEYS, seed=6) > 0.8):
        assert_like_torch(
            model,
            source,
            inputs,
            attn_mask=mask,
            key_padding_mask=PADDING[1],
            need_weights=need_weights,
        )


@pytest.mark.parametrize(
    "make", [ATTENTIONS["plain"], ATTENTIONS["bias_kv and zero"]], ids=["plain", "bias_kv and zero"]
)
@pytest.mark.parametrize("padding", [None, torch.arange(LENGTH) >= torch.tensor([[5], [4], [2]])])
@either
def test_the_causal_hint_is_taken_as_torch_takes_it(
    make: Make, padding: Tensor | None, need_weights: bool
) -> None:
    source = make()
    assert_like_torch(
        quantized(source),
        source,
        inputs_of(source, SELF),
        attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        key_padding_mask=padding,
        need_weights=need_weights,
        is_causal=True,
    )


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "make", [ATTENTIONS["plain"], ATTENTIONS["everything"]], ids=["plain", "everything"]
)
def test_the_weights_of_each_head_are_returned_when_they_are_asked_for(
    make: Make, batched: bool
) -> None:
    source = make()
    inputs = inputs_of(source, APART, batched)
    assert_like_torch(quantized(source), source, inputs, average_attn_weights=False)


@either
def test_dropout_in_training_is_torchs(need_weights: bool) -> None:
    source = fresh(dropout=0.4)
    model = quantized(source).double().train()
    inputs = [x.double() for x in inputs_of(source, APART)]
    twin = oracle(model, source).train()
    torch.manual_seed(3)
    found, weights = model(*inputs, need_weights=need_weights)
    torch.manual_seed(3)
    expected, expected_weights = twin(*inputs, need_weights=need_weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)
    again = model(*inputs, need_weights=need_weights)[0]
    assert not torch.equal(again, found)
    model.eval()
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [ATTENTIONS["plain"], ATTENTIONS["everything"]], ids=["plain", "everything"]
)
def test_half_precision_is_computed_wide_and_returned_in_half(
    make: Make, dtype: torch.dtype
) -> None:
    source = make()
    model = quantized(source).to(dtype)
    inputs = inputs_of(source, APART)
    with torch.no_grad():
        found = model(*(x.to(dtype) for x in inputs), attn_mask=FLOAT_MASK.to(dtype))
        expected = oracle(quantized(source), source)(
            *(x.double() for x in inputs), attn_mask=FLOAT_MASK.double()
        )
    assert_near(found[0], expected[0], dtype)
    assert_near(found[1], expected[1], dtype)


def test_a_fused_weight_is_decoded_no_further_than_its_inputs_need(
    kernel_calls: list[str],
) -> None:
    source = fresh()
    model = quantized(source)
    model(*inputs_of(source, SELF))
    assert kernel_calls == ["MatrixProduct 192", "MatrixProduct 64"]
    kernel_calls.clear()
    model(*inputs_of(source, ENCODED))
    assert kernel_calls == ["PartialProduct 64", "PartialProduct 128", "MatrixProduct 64"]
    kernel_calls.clear()
    model(*inputs_of(source, APART))
    assert kernel_calls == ["PartialProduct 64"] * 3 + ["MatrixProduct 64"]


SUBSETS: dict[str, tuple[Make, Quantizer, set[str]]] = {
    "no output projection": (fresh, WEIGHTS_ONLY.skip("out_proj"), {"in_proj_weight"}),
    "only the output projection": (fresh, WEIGHTS_ONLY.only("out_proj"), {"out_proj.weight"}),
    "only that, and inputs apart": (
        ATTENTIONS["everything"],
        WEIGHTS_ONLY.only("out_proj"),
        {"out_proj.weight"},
    ),
    "keys that groups do not divide": (
        ATTENTIONS["kdim"],
        WEIGHTS_ONLY.group_size(64).only("*"),
        {"q_proj_weight", "v_proj_weight", "out_proj.weight"},
    ),
    "two widths": (
        fresh,
        WEIGHTS_ONLY.override("out_proj", bits=4),
        {"in_proj_weight", "out_proj.weight"},
    ),
}


@pytest.mark.parametrize(("make", "quantizer", "names"), SUBSETS.values(), ids=SUBSETS)
@each_call
@either
def test_any_part_of_an_attention_may_stay_float(
    make: Make, quantizer: Quantizer, names: set[str], which: str, need_weights: bool
) -> None:
    source = make()
    result = quantizer.apply(source)
    assert {row.name for row in result.report.quantized} == names
    inputs = inputs_of(source, which)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        assert_like_torch(result.model, source, inputs, need_weights=need_weights)
    assert isinstance(result.model, CallingMultiheadAttention)
    floats = result.dequantize()
    assert type(floats) is nn.MultiheadAttention
    assert list(floats.state_dict()) == list(source.state_dict())


def test_an_attention_without_a_quantized_part_is_torchs_own() -> None:
    model = WEIGHTS_ONLY.only("1").apply(nn.Sequential(fresh(), nn.Linear(SIZE, SIZE))).model
    assert type(model[0]) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inputs_that_do_not_fit_are_refused_with_what_was_expected() -> None:
    model = quantized(fresh())
    x = torch.randn(LENGTH, BATCH, SIZE)
    with pytest.raises(InputError, match=r"is_causal is a hint about attn_mask"):
        model(x, x, x, is_causal=True)
    with pytest.raises(InputError, match=r"attn_mask is \(1, 5\); expected is \(5, 5\) or"):
        model(x, x, x, attn_mask=torch.zeros(1, LENGTH))
    with pytest.raises(InputError, match=r"key_padding_mask is \(5, 3\) for 3 sequences of 5"):
        model(x, x, x, key_padding_mask=torch.zeros(LENGTH, BATCH))
    with pytest.raises(InputError, match=r"a mask is torch.int64"):
        model(x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH, dtype=torch.int64))
    with pytest.raises(InputError, match=r"3, 2 and 2 dimensions"):
        model(x, x[0], x[0])
    with pytest.raises(InputError, match=r"1, 1 and 1 dimensions"):
        model(x[0, 0], x[0, 0], x[0, 0])
    ragged = torch.nested.nested_tensor([x[:, 0], x[:2, 0]])
    with pytest.raises(InputError, match="nested tensors"):
        model(ragged, ragged, ragged)
