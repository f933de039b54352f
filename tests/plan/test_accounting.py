"""Before a tensor is touched: every parameter counted once, every byte foretold."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant import (
    QuantizedModule,
    Quantizer,
)
from tests.helpers import (
    same_tensors,
)
from tests.plan.models import (
    MODELS,
    QUANTIZERS,
    held_bytes,
    mlp,
    original,
    weight_of,
)


class Untouchable(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Fails on every operator: nothing may be computed from a tensor, or made.

    But for buffers, which are put aside while a model's code is traced, and then compared.

    Attributes:
        seen: the operators that were refused, whoever catches the error.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.seen: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        aside = func in (torch.ops.aten.clone.default, torch.ops.aten.equal.default)
        if aside and not any(isinstance(one, nn.Parameter) for one in args):
            return func(*args, **(kwargs or {}))
        self.seen.append(str(func))
        raise AssertionError(f"{func} was called on a tensor")


def untouchable() -> Untouchable:
    return Untouchable()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_planning_calls_no_operator_on_any_tensor(name: str, quantizer: str) -> None:
    model = original(name)
    with untouchable() as watch:
        plan = QUANTIZERS[quantizer].plan(model)
        text = plan.explain()
    assert text == str(plan)
    assert not watch.seen


def test_the_watch_sees_a_tensor_that_is_read() -> None:
    model = mlp()
    with untouchable(), pytest.raises(AssertionError, match="was called on a tensor"):
        weight_of(model, "0").amax()


@pytest.mark.parametrize("name", MODELS)
def test_planning_leaves_the_model_as_it_was(name: str) -> None:
    model = original(name)
    before = copy.deepcopy(model)
    Quantizer().bits(4).plan(model).explain()
    assert repr(model) == repr(before)
    assert same_tensors(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_counted_once(name: str, quantizer: str) -> None:
    model = original(name)
    report = QUANTIZERS[quantizer].plan(model).outline.report
    new = [row for row in report.layers if row.reason != "quantized before"]
    different = {(parameter.data_ptr(), parameter.shape) for parameter in model.parameters()}
    assert sum(row.parameters for row in new) == sum(shape.numel() for _, shape in different)
    assert report.float_bytes == held_bytes(model)
    assert len({row.name for row in report.layers}) == len(report.layers)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_predicted_bytes_are_the_bytes_of_the_result(name: str, quantizer: str) -> None:
    model = original(name)
    plan = QUANTIZERS[quantizer].plan(model)
    result = plan.run(progress=False)
    predicted, found = plan.outline.report, result.report
    assert predicted.bytes == found.bytes == held_bytes(result.model)
    assert predicted.float_bytes == found.float_bytes == held_bytes(model)
    for before, after in zip(predicted.layers, found.layers, strict=True):
        assert (before.name, before.bytes, before.scheme) == (after.name, after.bytes, after.scheme)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_is_what_is_quantized(name: str, quantizer: str) -> None:
    model = original(name)
    result = QUANTIZERS[quantizer].apply(model, progress=False)
    found = {
        f"{path}.{weight}" if path else weight
        for path, module in result.model.named_modules()
        if isinstance(module, QuantizedModule)
        for weight in module.packed_weights()
    }
    assert found == {key for row in result.report.quantized for key in (row.name, *row.aliases)}
