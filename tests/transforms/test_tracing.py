"""What tracing finds out of a model's code, and what it leaves behind: nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.transforms import Chain, Nonlinearity, trace
from tests.helpers import noise
from tests.transforms.models import Branching, Optional, Pair, ResNet


class Calls(Pair):
    """Calls its two modules as a function says."""

    def __init__(self, function: Callable[[nn.Module, nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:  # type: ignore[override]  # whatever it returns
        return self.function(self.conv, self.bn, x)


CHAINS: dict[str, tuple[Callable[[nn.Module, nn.Module, Tensor], object], Chain]] = {
    "one after the other": (lambda conv, bn, x: bn(conv(x)), Chain(then="bn")),
    "by keyword": (lambda conv, bn, x: bn(input=conv(x)), Chain(then="bn")),
    "an activation between": (
        lambda conv, bn, x: bn(functional.relu6(conv(x))),
        Chain(Nonlinearity("relu6"), None, "bn"),
    ),
    "another function between": (
        lambda conv, bn, x: bn(conv(x) * 2),
        Chain(reason="mul() follows it"),
    ),
    "unused": (
        lambda conv, bn, x: (conv(x), bn(torch.zeros(1, 8, 4, 4)))[1],
        Chain(reason="its output is not used"),
    ),
    "returned": (
        lambda conv, bn, x: {"conv": conv(x)},
        Chain(reason="its output is an output of the model"),
    ),
    "returned too": (
        lambda conv, bn, x: [hidden := conv(x), bn(hidden)],
        Chain(reason="its output feeds 'bn' and the model's output"),
    ),
    "changed in place behind its back": (
        lambda conv, bn, x: ((hidden := conv(x)).relu_(), bn(hidden))[1],
        Chain(reason="its output feeds relu_() and 'bn'"),
    ),
    "asked for its shape": (
        lambda conv, bn, x: bn((hidden := conv(x)).view(hidden.shape)),
        Chain(reason="view() follows it"),
    ),
    "the other one twice": (
        lambda conv, bn, x: bn(bn(conv(x))),
        Chain(reason="'bn' is called 2 times"),
    ),
    "not called": (lambda conv, bn, x: x + 1, Chain(reason="the model does not call it")),
    "idle functions": (
        lambda conv, bn, x: bn(functional.dropout(conv(x), 0.5, training=False)),
        Chain(then="bn"),
    ),
    "a dropout that is never idle": (
        lambda conv, bn, x: bn(functional.dropout(conv(x), 0.5)),
        Chain(reason="dropout() follows it"),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_follows_a_layer(name: str) -> None:
    function, expected = CHAINS[name]
    assert trace(Calls(function)).chain("conv") == expected


def test_a_residual_network_is_read_through_its_blocks() -> None:
    graph = trace(ResNet())
    assert graph.chain("layers.0.conv1") == Chain(then="layers.0.bn1")
    assert graph.chain("layers.0.bn1") == Chain(
        Nonlinearity("relu"), "layers.0.relu", "layers.0.conv2"
    )
    assert graph.chain("layers.1.downsample.0").then == "layers.1.downsample.1"
    assert graph.chain("layers.0.bn2").reason == "an addition follows it"
    assert graph.takes_matrices("fc")
    assert not graph.takes_matrices("conv1")


def test_children_of_a_module_that_is_one_step_are_not_known() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    reason = trace(model).chain("0.linear1").reason
    assert reason == "it is inside '0', which is not looked into"


def test_a_model_is_traced_as_it_is_in_eval_mode() -> None:
    class Noisy(Pair):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.conv(x) + noise(1) if self.training else self.conv(x)
            result: Tensor = self.bn(hidden)
            return result

    model = Noisy().train()
    assert trace(model).chain("conv").then == "bn"
    assert model.training
    assert model.conv.training


def test_arguments_that_may_be_left_out_are_tried_both_ways() -> None:
    graph = trace(Optional(flag=True))
    assert len(graph.views) == 4
    assert graph.chain("conv").reason == "what follows it depends on how the model is called"


def test_a_failure_is_a_reason_and_leaves_nothing_behind() -> None:
    model = Branching()
    before = set(vars(model))
    graph = trace(model)
    assert not graph.traced
    assert graph.reason is not None
    assert graph.reason.startswith("it cannot be traced (TraceError: symbolically traced variables")
    assert graph.chain("conv") == Chain(reason=graph.reason)
    assert set(vars(model)) == before
    assert isinstance(nn.Linear(2, 2)(noise(1, 2)), Tensor), "torch is as it was"


def test_a_forward_that_was_replaced_on_the_instance_is_not_the_one_of_its_class() -> None:
    model = Pair()
    vars(model)["forward"] = lambda x: x
    assert trace(model).reason == (
        "its forward was replaced on the instance, so its class does not tell"
    )


def test_a_question_for_the_type_is_answered_both_ways() -> None:
    class Choosing(Pair):
        def forward(self, x: Tensor | list[float]) -> Tensor:
            hidden: Tensor = self.conv(x)
            return hidden if isinstance(x, Tensor) else self.bn(hidden)

    class Converting(Pair):
        def forward(self, x: Tensor | list[float]) -> Tensor:
            x = x if isinstance(x, Tensor | nn.Parameter) else torch.tensor(x)
            return super().forward(x)

    graph = trace(Choosing())
    assert graph.chain("conv").reason == "what follows it depends on how the model is called"
    assert trace(Converting()).chain("conv").then == "bn"
    assert "isinstance" not in globals()
