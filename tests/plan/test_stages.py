"""Which parts of a model are quantized one after the other, and what reaches each of them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, cast
from weakref import WeakSet

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    GPTQ,
    AnyStatistic,
    BlockCall,
    BlockWeight,
    FittedBlock,
    Grid,
    LearnedRounding,
    QTensor,
    QuantizedModule,
    Quantizer,
    Rounding,
    RoundToNearest,
    Statistic,
    Statistics,
    kernels,
)
from mono_quant.calibration import CalibrationData, Kept
from mono_quant.plan.stages import Stage, stages_of
from tests.helpers import TiedModel, noise, same_tensors

DATA = [noise(4, 64, seed=place) for place in range(3)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(64), nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.outer = nn.Linear(64, 64)

    def forward(self, x: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
        out: Tensor = x + self.outer(self.inner(self.norm(x))) * mask * scale
        return out


class Deep(nn.Module):
    """Three blocks in a list, all of which are handed the same mask, between two layers."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(64, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        mask, hidden = x.new_ones(64), self.first(x)
        for block in self.blocks:
            hidden = self.between(block(hidden, mask, scale=0.5))
        out: Tensor = self.last(hidden)
        return out


class Remembering(Deep):
    """Hands its blocks an object that a call may change."""

    def forward(self, x: Tensor) -> Tensor:
        class Cache:
            pass

        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden, x.new_ones(64), scale=Number(0.5, Cache()))
        out: Tensor = self.last(hidden)
        return out


class Number(float):
    def __new__(cls, value: float, _: object) -> "Number":
        return super().__new__(cls, value)

    def __init__(self, value: float, cache: object) -> None:
        self.cache = cache


class Overwriting(Deep):
    """Its blocks write into what they are given."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        for block in self.blocks:
            hidden = hidden.add_(block(hidden, x.new_ones(64)))
        out: Tensor = self.last(hidden)
        return out


class Repeating(Deep):
    """Calls its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        mask, hidden = x.new_ones(64), self.first(x)
        for block in (*self.blocks, *self.blocks):
            hidden = block(hidden, mask)
        out: Tensor = self.last(hidden)
        return out


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "deep": Deep,
    "changed between": lambda: Deep(torch.tanh),
    "written to between": lambda: Deep(lambda x: x.mul_(0.5)),
    "remembering": Remembering,
    "overwriting": Overwriting,
    "repeating": Repeating,
    "chain": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), nn.Linear(64, 64)
    ),
}


def stages(model: nn.Module) -> tuple[Stage, ...]:
    plan = Quantizer().bits(4).only("*").plan(model)
    todo = [weight for weight in plan.weights if weight.recipe is not None]
    return stages_of(model, todo, CalibrationData(DATA))


def test_a_block_of_a_list_is_a_stage_and_layers_outside_are_stages_of_their_own() -> None:
    found = stages(Deep().eval())
    assert [stage.path for stage in found] == [
        "first",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "last",
    ]
    assert [len(stage.weights) for stage in found] == [1, 2, 2, 2, 1]


def test_a_block_follows_what_returned_its_input_and_took_its_mask() -> None:
    found = {stage.path: stage.follows for stage in stages(Deep().eval())}
    assert found["first"] is None
    assert found["blocks.0"] is None  # its mask comes from nowhere that is known
    assert found["blocks.1"] == found["blocks.2"] == ((True, 0), (False, 1))
    assert found["last"] == ((True, 0),)


@pytest.mark.parametrize("name", ["changed between", "written to between", "overwriting"])
def test_a_block_whose_input_was_changed_since_follows_nothing(name: str) -> None:
    found = {stage.path: stage.follows for stage in stages(MODELS[name]().eval())}
    assert found["blocks.1"] is found["blocks.2"] is None


@pytest.mark.parametrize("name", ["remembering", "repeating"])
def test_a_block_that_cannot_be_called_again_has_no_form(name: str) -> None:
    found = {stage.path: stage.form for stage in stages(MODELS[name]().eval())}
    assert found["blocks.0"] is found["blocks.1"] is None


def test_stages_stand_in_the_order_of_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Linear(64, 64), nn.Linear(64, 64)
            self.never = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.late(self.early(x))
            return out

    assert [stage.path for stage in stages(Backwards())] == ["early", "late", None]


def test_a_layer_that_shares_a_weight_waits_for_the_one_it_shares_with() -> None:
    model = TiedModel().eval()
    plan = Quantizer().bits(4).only("*").plan(model)
    todo = [weight for weight in plan.weights if weight.recipe is not None]
    data = CalibrationData([torch.randint(0, 8, (2, 5))])
    found = stages_of(model, todo, data)
    place = {weight.key: number for number, stage in enumerate(found) for weight in stage.weights}
    for weight in todo:
        if weight.tied_to is not None:
            assert place[weight.key] >= place[weight.tied_to.key]


@attrs.frozen
class Inputs(Statistic[tuple[Tensor, ...]]):
    """Everything that was seen."""

    kind: ClassVar[str] = "tests.inputs"

    def observe(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.clone(),)

    def merge(self, left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*left, *right)


@attrs.frozen
class Noted(Rounding):
    """Rounds to nearest and keeps what its statistic saw, by the weight's sum."""

    kind: ClassVar[str] = "tests.noted"
    sequential: ClassVar[bool] = True
    seen: ClassVar[dict[float, tuple[Tensor, ...]]] = {}

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        return (Inputs(),)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        self.seen[float(weight.sum())] = statistics.state(Inputs())
        return RoundToNearest().round(weight, grid, statistics)


@pytest.mark.parametrize("name", MODELS)
def test_a_block_sees_what_the_quantized_ones_before_it_make_of_the_data(name: str) -> None:
    """The oracle runs the whole model, up to there quantized, for each block anew."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    Noted.seen.clear()
    quantizer = Quantizer().bits(4).activations(None)
    quantizer.only("*").fit(DATA).rounding(Noted()).apply(model)
    done: list[str] = []
    for stage in stages(model):
        assert stage.path is not None
        partly = quantizer.only(*done).apply(model).model if done else model
        for each in stage.weights:
            layer = partly.get_submodule(each.path)
            expected: list[Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda _, args, kept=expected: kept.append(args[0].clone())
            )
            with torch.no_grad(), kernels.use("reference"):
                for batch in DATA:
                    partly(batch)
            handle.remove()
            weight = model.get_submodule(each.path).get_parameter("weight")
            found = Noted.seen[float(weight.detach().sum())]
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other.reshape(one.shape), rtol=1e-4, atol=1e-5)
        done.append(stage.path)


def test_what_is_kept_on_disk_is_what_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Deep().eval()
    quantizer = Quantizer().bits(4).rounding(GPTQ()).fit(DATA)
    expected = quantizer.apply(model).model
    monkeypatch.setattr("mono_quant.calibration.Kept.__init__.__defaults__", (0,))
    assert same_tensors(quantizer.apply(model).model, expected)


def test_sequential_or_not_is_the_users_choice() -> None:
    model = Deep().eval()
    plan = Quantizer().bits(4).rounding(GPTQ()).fit(DATA).plan(model)
    one, other = plan.run(sequential=True).model, plan.run(sequential=False).model
    assert same_tensors(plan.run().model, one)
    assert not same_tensors(one, other)


def test_in_place_is_the_same() -> None:
    quantizer = Quantizer().bits(4).rounding(GPTQ()).fit(DATA)
    torch.manual_seed(0)
    model = Deep().eval()
    apart = quantizer.apply(model).model
    assert same_tensors(quantizer.apply_(model).model, apart)


class Scaling(Deep):
    """Hands its blocks a number that depends on the batch."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden, x.new_ones(64), scale=float(len(x)))
        out: Tensor = self.last(hidden)
        return out


class Apart(OrderedDict[str, Tensor]):
    """A mapping whose entries are attributes, too."""

    @property
    def hidden(self) -> Tensor:
        return self["hidden"]


class Wrapping(nn.Module):
    """Hands its blocks a mapping of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unwrapping() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(Apart(hidden=x))
        return x


class Unwrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Apart) -> Tensor:
        out: Tensor = self.other(self.one(x.hidden).relu())
        return out


@attrs.frozen
class Scaled(LearnedRounding):
    """Sees that each call of a block has what its batch hands it."""

    kind: ClassVar[str] = "tests.scaled"
    seen: ClassVar[list[tuple[int, object]]] = []

    def fit(
        self,
        block: nn.Module,
        weights: Mapping[str, BlockWeight],
        calls: Sequence[BlockCall],
        free: Sequence[str],
    ) -> FittedBlock:
        Scaled.seen.extend(
            (len(cast("Tensor", call.args[0])), call.kwargs["scale"]) for call in calls
        )
        return LearnedRounding.fit(self, block, weights, calls, free)


@pytest.mark.parametrize("order", [(4, 9, 4), (4, 4, 9)], ids=["shown", "not shown"])
def test_a_block_is_called_again_with_what_its_batch_hands_it(order: tuple[int, ...]) -> None:
    """Where the first and the last batch, which show what blocks are handed, are alike, and not."""
    Scaled.seen.clear()
    data = [noise(rows, 64, seed=rows) for rows in order]
    quantizer = Quantizer().bits(4).only("blocks").rounding(Scaled(steps=2)).fit(data)
    assert all(change.done for change in quantizer.apply(Scaling().eval()).report.changes)
    assert Scaled.seen == [(rows, float(rows)) for rows in order] * 3


def test_a_mapping_of_a_class_of_its_own_cannot_be_kept() -> None:
    model = Wrapping().eval()
    assert [stage.form for stage in stages(model)] == [None, None]
    assert Quantizer().bits(4).only("*").rounding(GPTQ()).fit(DATA).apply(model).validate()


class Experts(nn.Module):
    """Each batch goes to one of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.all[len(x) % 3](x)
        return out


def test_a_layer_that_neither_the_first_nor_the_last_batch_reaches_sees_its_own() -> None:
    data = [noise(rows, 64, seed=rows) for rows in (3, 4, 5)]
    model = Experts().eval()
    Noted.seen.clear()
    Quantizer().bits(4).only("*").rounding(Noted()).fit(data).apply(model)
    assert len(Noted.seen) == 3
    (seen,) = Noted.seen[float(model.get_parameter("all.1.weight").detach().sum())]
    assert torch.equal(seen, data[1])


def test_a_layer_called_before_the_one_it_shares_with_is_calibrated_all_the_same() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.middle = nn.Linear(64, 64), nn.Linear(64, 64)
            self.first = nn.Linear(64, 64)
            self.first.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.middle(self.first(x)))
            return out

    quantizer = Quantizer().bits(8).activations("static").rounding(GPTQ()).fit(DATA)
    model = quantizer.apply(Reversed().eval()).model
    first = model.get_submodule("first")
    assert isinstance(first, QuantizedModule)
    low, high = torch.cat(DATA).aminmax()
    scale = first.activations()["weight"].scale
    assert scale is not None
    torch.testing.assert_close(scale.squeeze(), (high - low) / 255)


def test_batches_without_a_sample_say_nothing() -> None:
    model = Deep().eval()
    quantizer = Quantizer().bits(4).rounding(GPTQ())
    expected = quantizer.fit(DATA).apply(model).model
    found = quantizer.fit([*DATA, torch.zeros(0, 64)]).apply(model).model
    assert same_tensors(found, expected)


def test_what_is_gathered_for_a_block_is_gone_before_the_next() -> None:
    @attrs.frozen(eq=False)
    class State:
        alive: ClassVar[WeakSet["State"]] = WeakSet()

        def __attrs_post_init__(self) -> None:
            self.alive.add(self)

    @attrs.frozen
    class Counting(Statistic[State]):
        kind: ClassVar[str] = "tests.counting"
        most: ClassVar[list[int]] = []

        def observe(self, x: Tensor) -> State:
            self.most.append(len(State.alive))
            return State()

        def merge(self, left: State, right: State) -> State:
            return State()

    @attrs.frozen
    class Needing(Noted):
        kind: ClassVar[str] = "tests.needing"

        @property
        def needs(self) -> tuple[AnyStatistic, ...]:
            return (Counting(),)

        def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
            return RoundToNearest().round(weight, grid, statistics)

    Quantizer().bits(4).only("*").fit(DATA).rounding(Needing()).apply(Deep().eval())
    assert max(Counting.most) <= 3  # of the two layers of a block, and one that is being replaced


def test_a_tensor_that_is_given_twice_is_one_when_a_block_is_called_again() -> None:
    class Attending(nn.Module):
        same: ClassVar[list[bool]] = []

        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            self.same.append(query is key)
            out: Tensor = self.one(query) + self.other(key)
            return out

    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Attending() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, x)
            return x

    model = Attended().eval()
    assert [stage.follows for stage in stages(model)] == [None, ((True, 0),), ((True, 0),)]
    Quantizer().bits(4).only("*").rounding(GPTQ()).fit(DATA).apply(model)
    assert all(Attending.same)


def test_of_a_view_no_more_is_kept_on_disk_than_it_shows() -> None:
    table, kept = torch.arange(1 << 20, dtype=torch.float32), Kept(limit=0)
    kept.add([table[8:16], table[:1].expand(4)])
    assert kept._file is not None
    assert kept._file.tell() < 10_000
    assert [one.tolist() for one in kept[0]] == [list(range(8, 16)), [0.0] * 4]
