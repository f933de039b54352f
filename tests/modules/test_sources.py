"""The given model stays as it is; in place, it is the one that changes."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import Grid, InputError, QTensor, QuantizedLayer, Quantizer, Rounding, Statistics
from tests.helpers import same_bits, same_tensors


class Net(nn.Module):
    """Layers, a norm with running statistics, buffers of both kinds, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").add_(1)
        hidden: Tensor = self.drop(self.norm(self.conv(x))).mean(-1)
        scores: Tensor = self.head(hidden)
        return scores * self.gain * self.get_buffer("mask")


def _write_buffers(model: Net) -> None:
    for buffer in model.buffers():
        buffer.zero_()


def _run_in_training(model: Net) -> None:
    model.train()
    for _ in range(3):
        model(torch.randn(4, 8, 5))


def _train(model: Net) -> None:
    model(torch.randn(4, 8, 5)).sum().backward()


ACTIONS: dict[str, Callable[[Net], object]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "meta": lambda model: model.to("meta"),
    "train": lambda model: model.train(),
    "freeze": lambda model: model.requires_grad_(False),
    "write buffers": _write_buffers,
    "run in training": _run_in_training,
    "backward": _train,
    "new parameter": lambda model: setattr(model, "gain", nn.Parameter(torch.zeros(8))),
    "replace a layer": lambda model: setattr(model, "head", nn.Identity()),
    "hook": lambda model: model.head.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
def test_the_source_is_unchanged_by_what_is_done_to_the_result(
    act: Callable[[Net], object],
) -> None:
    source = Net().eval()
    before = copy.deepcopy(source)
    result = Quantizer().fit(torch.randn(2, 8, 5)).apply(source)
    act(result.model)
    assert same_tensors(source, before)
    assert same_bits(source.get_buffer("mask"), before.get_buffer("mask"))
    for one, other in zip(source.modules(), before.modules(), strict=True):
        assert type(one) is type(other)
        assert one.training is other.training
        assert len(one._forward_hooks) == len(other._forward_hooks)
    for parameter, earlier in zip(source.parameters(), before.parameters(), strict=True):
        assert parameter.requires_grad is earlier.requires_grad
        assert parameter.grad is None
        assert parameter.device == earlier.device


def test_the_result_is_unchanged_by_what_is_done_to_the_source() -> None:
    source = Net().eval()
    model = Quantizer().apply(source).model
    before = copy.deepcopy(model)
    source.to(torch.bfloat16).train().requires_grad_(False)
    assert same_tensors(model, before)
    assert not model.training
    assert model.head.bias.requires_grad


def test_float_parameters_share_storage_and_are_other_objects() -> None:
    source = Net().eval()
    model = Quantizer().fold(False).apply(source).model
    theirs = dict(source.named_parameters())
    found = dict(model.named_parameters())
    assert set(found) == {"conv.bias", "norm.weight", "norm.bias", "head.bias", "gain"}
    for name, parameter in found.items():
        assert parameter is not theirs[name]
        assert parameter.data_ptr() == theirs[name].data_ptr()
        assert parameter.requires_grad is theirs[name].requires_grad


def test_buffers_are_copies() -> None:
    source = Net().eval()
    model = Quantizer().fold(False).apply(source).model
    for name, buffer in source.named_buffers():
        assert model.get_buffer(name).data_ptr() != buffer.data_ptr()
        assert same_bits(model.get_buffer(name), buffer)


@pytest.mark.parametrize("training", [False, True])
def test_the_result_is_in_the_mode_of_the_source(training: bool) -> None:
    source = Net().train(training)
    source.drop.train(not training)
    result = Quantizer().fit(torch.randn(2, 8, 5)).apply(source)
    for one, other in zip(source.children(), result.model.children(), strict=True):
        assert one.training is other.training
    assert result.model.training is source.training is training


@pytest.mark.parametrize("with_data", [False, True])
def test_in_place_keeps_the_identity_of_every_module(with_data: bool) -> None:
    model = Net().eval()
    modules = dict(model.named_modules())
    unfolded = Quantizer().fold(False)
    quantizer = unfolded.fit(torch.randn(2, 8, 5)) if with_data else unfolded
    result = quantizer.apply_(model)
    assert result.model is model
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    assert isinstance(model.head, QuantizedLayer)


def test_in_place_gives_what_apply_gives() -> None:
    source = Net().eval()
    apart = Quantizer().bits(4).only("*").apply(source).model
    Quantizer().bits(4).only("*").apply_(source)
    assert same_tensors(source, apart)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keep the garbage collector from freeing what should not have been kept."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("with_data", [False, True])
def test_in_place_frees_the_float_weights(with_data: bool) -> None:
    model = Net().eval()
    unfolded = Quantizer().fold(False)
    quantizer = unfolded.fit(torch.randn(2, 8, 5)) if with_data else unfolded
    weights = [weakref.ref(model.conv.weight), weakref.ref(model.head.weight)]
    kept = weakref.ref(model.norm.weight)
    result = quantizer.apply_(model)
    assert [weight() for weight in weights] == [None, None]
    assert kept() is result.model.norm.weight


ALIVE: list[int] = []
WATCHED: list["weakref.ref[Tensor]"] = []


@attrs.frozen
class Watching(Rounding):
    """Counts the float weights that are left when a layer is rounded."""

    kind: ClassVar[str] = "watching"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        ALIVE.append(sum(watched() is not None for watched in WATCHED))
        return grid.scheme.quantize(weight, grid.qparams(weight))


@pytest.mark.usefixtures("no_collector")
def test_in_place_frees_each_weight_before_the_next_layer() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    ALIVE.clear()
    WATCHED[:] = [
        weakref.ref(parameter) for name, parameter in model.named_parameters() if "w" in name
    ]
    Quantizer().rounding(Watching()).apply_(model)
    assert ALIVE == [4, 3, 2, 1]


def test_in_place_refuses_before_anything_is_changed() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"head\.weight holds NaN"):
        Quantizer().apply_(model)
    assert type(model.conv) is nn.Conv1d
    assert same_tensors(model, before)


def test_a_failing_apply_leaves_the_source_as_it_was() -> None:
    source = Net().eval()
    with torch.no_grad():
        source.head.weight[0, 0] = torch.inf
    before = copy.deepcopy(source)
    with pytest.raises(InputError, match=r"head\.weight holds NaN or infinity"):
        Quantizer().apply(source)
    assert same_tensors(source, before)
    assert type(source.conv) is nn.Conv1d


def test_the_gradients_of_the_source_are_kept() -> None:
    source = Net().train()
    source(torch.randn(4, 8, 5)).sum().backward()
    gradient = source.head.weight.grad
    Quantizer().apply(source)
    assert source.head.weight.grad is gradient
