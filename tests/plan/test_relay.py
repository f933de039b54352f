"""Running a model stage by stage: what is kept of each, and for how long."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mono_quant.calibration import CalibrationData
from mono_quant.plan.relay import Calls, Relay
from mono_quant.plan.stages import Slot, Stage
from tests.helpers import noise, same_bits

BATCHES = [noise(4, 8, seed=place) for place in range(3)]
FORM: object = ((Slot(0), Slot(1)), {})
OTHER: object = ((Slot(0),), {})


class Scaled(nn.Module):
    """Hands its blocks a factor beside what they change."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        factor = x.amax(1, keepdim=True)
        for block in self.blocks:
            x = block(x, factor)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        found: Tensor = self.linear(x) * factor
        return found


FIRST = Stage("blocks.0", (), 1, FORM)
SECOND = Stage("blocks.1", (), 1, FORM, follows=((True, 0), (False, 1)))


@pytest.fixture
def model() -> Scaled:
    torch.manual_seed(0)
    return Scaled().eval()


def calls_of(calls: Calls | None) -> list[list[Tensor]]:
    assert calls is not None
    return [list(calls.tensors[place]) for place in range(len(calls))]


def test_a_stage_is_called_with_what_the_one_before_it_returns_as_it_is_then(
    model: Scaled,
) -> None:
    relay = Relay(model, CalibrationData(BATCHES))
    relay.visit(FIRST)
    first = calls_of(relay.calls)
    with torch.no_grad():
        block = model.blocks[0]
        block.get_parameter("linear.weight").mul_(0.5)  # something like what quantizing does
        expected = [block(*tensors) for tensors in first]
    relay.leave(FIRST, SECOND)
    for place, found in enumerate(calls_of(relay.calls)):
        assert same_bits(found[0], expected[place])
        assert same_bits(found[1], BATCHES[place].amax(1, keepdim=True))


def test_calls_are_forgotten_as_the_outputs_of_each_come(model: Scaled) -> None:
    calls = Calls()
    for x in BATCHES:
        calls.add(FORM, [x, x])
    left: list[list[int]] = []

    def outputs() -> Iterator[list[Tensor]]:
        for place in range(3):
            left.append([len(calls.tensors[one]) for one in range(3)])
            yield [calls.tensors[place][0] + 1]

    found = calls.after(SECOND, outputs())
    assert left == [[2, 2, 2], [0, 2, 2], [0, 0, 2]]
    assert [len(calls.tensors[one]) for one in range(3)] == [0, 0, 0]
    for x, (one, other) in zip(BATCHES, calls_of(found), strict=True):
        assert same_bits(one, x + 1)
        assert same_bits(other, x)


def test_what_cannot_be_told_is_not_kept(model: Scaled) -> None:
    calls = Calls()
    for form in (FORM, OTHER):
        calls.add(form, [BATCHES[0], BATCHES[1]])
    assert not calls.lead_to(SECOND)
    assert not Calls().lead_to(FIRST)
    relay = Relay(model, CalibrationData(BATCHES))
    for then in (None, FIRST):
        relay.visit(FIRST)
        relay.leave(FIRST, then)
        assert relay.calls is None
