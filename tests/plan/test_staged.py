"""What modules return, found from the stage that they are in, is what the whole model shows."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mono_quant import BiasCorrection, Quantizer
from mono_quant.calibration import CalibrationData
from mono_quant.plan.staged import StagedOutputs
from tests.helpers import noise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(torch.relu(self.first(x)))
        return found


class Deep(nn.Module):
    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


DATA = CalibrationData.bind([noise(8, 16, seed=seed) for seed in range(3)])


def deep() -> tuple[Deep, StagedOutputs]:
    torch.manual_seed(0)
    source = Deep().eval()
    todo = Quantizer().bits(8).only("*").plan(source).weights
    return source, StagedOutputs(source, todo, DATA)


def layers(model: nn.Module) -> list[nn.Linear]:
    return [one for one in model.modules() if isinstance(one, nn.Linear)]


def same(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y) for (x,), (y,) in zip(one, other, strict=True)
    )


def expect_as_of_the_whole(source: Deep, outputs: StagedOutputs, of: nn.Module) -> None:
    found, whole = list(outputs(source, of)), list(DATA.inner_outputs(source, of))
    assert same(found, whole)


def test_each_module_returns_what_it_does_in_the_whole_model_in_any_order() -> None:
    source, outputs = deep()
    forth = [*layers(source), *source.blocks, source]
    for of in (*forth, *reversed(forth), *forth):
        expect_as_of_the_whole(source, outputs, of)


def test_a_change_of_what_was_left_behind_shows() -> None:
    source, outputs = deep()
    for of in layers(source):
        expect_as_of_the_whole(source, outputs, of)
        of.bias = nn.Parameter(of.bias.detach() + 1)  # as corrections do, and then another way
        expect_as_of_the_whole(source, outputs, of)
        with torch.no_grad():
            source.stem.bias.add_(0.1)
        expect_as_of_the_whole(source, outputs, of)


def test_another_model_and_a_module_that_not_every_batch_calls_are_run_as_a_whole() -> None:
    class Choosing(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x

    source, outputs = deep()
    source.blocks[2] = Choosing()
    other = Deep().eval()
    assert same(list(outputs(other, other.stem)), list(DATA.inner_outputs(other, other.stem)))
    for of in layers(source):
        expect_as_of_the_whole(source, outputs, of)


def test_correcting_all_layers_in_turn_runs_each_a_few_times_whatever_the_depth() -> None:
    runs: dict[int, int] = {}
    for depth in (4, 12):
        torch.manual_seed(0)
        source, called = Deep(depth).eval(), Counter[str]()
        plain = Quantizer().bits(4).activations(None).only("*")
        plan = plain.transform(BiasCorrection()).fit(list(DATA.batches())).plan(source)

        def count(_: nn.Module, __: object, ___: object, called: Counter[str] = called) -> None:
            called["first"] += 1

        first = source.get_submodule("blocks.0.first")
        handle = first.register_forward_hook(count)
        changes = plan.run(progress=False).report.changes
        handle.remove()
        assert all("is corrected" in change.text for change in changes), changes
        runs[depth] = called["first"]
    assert 0 < runs[4] == runs[12]
