"""Which activation follows which layer, whatever it is called."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import FoldBatchNorm
from mono_quant.transforms import FollowingActivation, Nonlinearity, activations, trace
from tests.transforms.models import Branching, ResNet, TwoConsumers, lived_in

MODULES: list[tuple[nn.Module, Nonlinearity]] = [
    (nn.ReLU(), Nonlinearity("relu")),
    (nn.ReLU6(), Nonlinearity("relu6")),
    (nn.Hardtanh(), Nonlinearity("clamp", (-1.0, 1.0))),
    (nn.Hardtanh(0, 6), Nonlinearity("relu6")),
    (nn.LeakyReLU(0.2), Nonlinearity("leaky_relu", (0.2,))),
    (nn.SiLU(inplace=True), Nonlinearity("silu")),
    (nn.GELU("tanh"), Nonlinearity("gelu", ("tanh",))),
    (nn.Hardswish(), Nonlinearity("hardswish")),
    (nn.Tanh(), Nonlinearity("tanh")),
    (nn.Sigmoid(), Nonlinearity("sigmoid")),
]

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Nonlinearity]] = {
    "relu": (functional.relu, Nonlinearity("relu")),
    "relu in place": (lambda x: functional.relu(x, inplace=True), Nonlinearity("relu")),
    "torch.relu": (torch.relu, Nonlinearity("relu")),
    "x.relu()": (lambda x: x.relu(), Nonlinearity("relu")),
    "x.relu_()": (lambda x: x.relu_(), Nonlinearity("relu")),
    "relu6": (functional.relu6, Nonlinearity("relu6")),
    "hardtanh": (lambda x: functional.hardtanh(x, -2, 2), Nonlinearity("clamp", (-2.0, 2.0))),
    "clamp": (lambda x: x.clamp(0, 6), Nonlinearity("relu6")),
    "clamp(min=)": (lambda x: torch.clamp(x, min=0), Nonlinearity("relu")),
    "clamp(max=)": (lambda x: x.clamp(max=1.5), Nonlinearity("clamp", (None, 1.5))),
    "clamp_min": (lambda x: x.clamp_min(0), Nonlinearity("relu")),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.1), Nonlinearity("leaky_relu", (0.1,))),
    "silu": (functional.silu, Nonlinearity("silu")),
    "gelu": (functional.gelu, Nonlinearity("gelu", ("none",))),
    "hardswish": (functional.hardswish, Nonlinearity("hardswish")),
    "tanh": (torch.tanh, Nonlinearity("tanh")),
    "x.sigmoid()": (lambda x: x.sigmoid(), Nonlinearity("sigmoid")),
}


class Applied(nn.Module):
    """A layer, and a function of its output."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer(x))


@pytest.mark.parametrize(("module", "expected"), MODULES, ids=str)
def test_a_module_is_known(module: nn.Module, expected: Nonlinearity) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), module, nn.Flatten())
    assert activations(model) == (FollowingActivation("0", expected, "1", False),)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_known(name: str) -> None:
    function, expected = FUNCTIONS[name]
    found = activations(Applied(function))
    assert found == (FollowingActivation("layer", expected, None, False),)


OTHERS: dict[str, Callable[[Tensor], object]] = {
    "ends that are tensors": lambda x: x.clamp(torch.zeros(4), torch.ones(4)),
    "a second use": lambda x: torch.relu(x) + x,
    "not elementwise": lambda x: torch.softmax(x, -1),
    "an output of the model": lambda x: (x, torch.relu(x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_not(name: str) -> None:
    assert activations(Applied(OTHERS[name])) == ()


def test_questions_about_the_shape_are_no_second_use() -> None:
    found = activations(Applied(lambda x: torch.relu(x).view(x.shape[0], x.size(1), -1)))
    assert [one.activation.kind for one in found] == ["relu"]


def test_normalizations_stand_in_between_until_they_are_folded() -> None:
    model = lived_in(ResNet())
    assert activations(model) == ()
    FoldBatchNorm().apply(model)
    relu = Nonlinearity("relu")
    assert activations(model, trace(model)) == (
        FollowingActivation("conv1", relu, None, False),
        FollowingActivation("layers.0.conv1", relu, "layers.0.relu", True),
        FollowingActivation("layers.1.conv1", relu, "layers.1.relu", True),
    )


def test_an_output_that_is_kept_is_seen_by_others() -> None:
    class Keeping(Applied):
        def forward(self, x: Tensor) -> Tensor:
            self.last = self.layer(x)
            return torch.relu(self.last)

    model = Keeping(torch.relu)
    assert activations(model) == ()
    assert trace(model).chain("layer").reason == "its output is kept as an attribute of a module"


@pytest.mark.parametrize("place", ["0", "0.0", "1"])
def test_a_hook_sees_what_flows(place: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    assert len(activations(model)) == 1
    model.get_submodule(place).register_forward_hook(lambda module, args, output: None)
    assert activations(model) == ()


def test_without_a_trace_nothing_is_known() -> None:
    assert activations(lived_in(Branching())) == ()
    assert activations(lived_in(TwoConsumers())) == ()
