"""Learned rounding: what a block returns comes nearer to what the float block returned."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant import (
    GPTQ,
    Affine,
    BlockCall,
    BlockWeight,
    CalibrationError,
    ConfigurationError,
    FittedBlock,
    FloatCast,
    Grid,
    InputError,
    LearnedRounding,
    MinMax,
    PerGroup,
    Quantizer,
    Rounding,
    RoundToNearest,
    Scheme,
    Statistics,
    load_model,
)
from mono_quant.numerics.values import Layout
from tests.helpers import noise, same_tensors

SCHEME = Affine(3, symmetric=False, granularity=PerGroup(16))
NEAREST = RoundToNearest()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.widen, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.tanh(self.widen(self.norm(x)))
        return x + scale * self.narrow(wide), wide


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def calls(source: Block, count: int = 4, damage: float = 0.02) -> list[BlockCall]:
    """Return calls with inputs that quantized blocks before have damaged."""
    found = []
    for place in range(count):
        x = noise(16, 32, seed=place)
        with torch.no_grad():
            targets = source(x, scale=0.5)
        worse = x + damage * noise(16, 32, seed=50 + place)
        found.append(BlockCall((worse,), {"scale": 0.5}, targets))
    return found


def asked(source: Block, scheme: Scheme = SCHEME) -> dict[str, BlockWeight]:
    found = {}
    for name in ("widen.weight", "narrow.weight"):
        weight = source.get_parameter(name).detach()
        layout = Layout.grouped(tuple(weight.shape))
        grid = Grid(scheme, MinMax())
        found[name] = BlockWeight(layout.to_stack(weight), layout, grid, Statistics())
    return found


def error(source: Block, fitted: FittedBlock, data: Sequence[BlockCall], scheme: Scheme) -> float:
    """Return the squared error of the outputs of a block with what was fitted."""
    weights = {name: scheme.dequantize(q)[0] for name, q in fitted.weights.items()}
    total = 0.0
    with torch.no_grad():
        for call in data:
            parameters = {**weights, **fitted.parameters}
            outputs = functional_call(source, parameters, call.args, dict(call.kwargs))
            pairs = zip(outputs, call.targets, strict=True)
            total += sum(float((one - other).double().square().sum()) for one, other in pairs)
    return total


def begun(source: Block, scheme: Scheme) -> FittedBlock:
    return FittedBlock(
        {
            name: NEAREST.round(one.stack, one.grid, one.statistics)
            for name, one in asked(source, scheme).items()
        }
    )


FREE = ["norm.weight", "norm.bias", "widen.bias"]


@pytest.mark.parametrize(
    "scheme",
    [SCHEME, Affine(4, granularity=PerGroup(8)), Affine(2, symmetric=False), FloatCast()],
    ids=repr,
)
@pytest.mark.parametrize("free", [[], FREE], ids=["weights", "and floats"])
def test_the_blocks_output_comes_nearer(scheme: Scheme, free: list[str]) -> None:
    source = block()
    data = calls(source)
    rounding = LearnedRounding(40, start=NEAREST, rounding_rate=0.005, scale_rate=3e-3)
    fitted = rounding.fit(source, asked(source, scheme), data, free)
    before, after = (
        error(source, begun(source, scheme), data, scheme),
        error(source, fitted, data, scheme),
    )
    assert set(fitted.parameters) == set(free)
    assert after <= before
    if not isinstance(scheme, FloatCast) or free:
        assert after < 0.97 * before


@pytest.mark.parametrize(
    ("rounding", "scale", "floats"), [(0.005, 0.0, 0.0), (0.0, 0.01, 0.0), (0.0, 0.0, 0.01)]
)
def test_each_of_what_is_learned_helps_by_itself(
    rounding: float, scale: float, floats: float
) -> None:
    source = block()
    data = calls(source)
    learned = LearnedRounding(
        60, start=NEAREST, rounding_rate=rounding, scale_rate=scale, float_rate=floats
    )
    fitted = learned.fit(source, asked(source), data, FREE)
    assert error(source, fitted, data, SCHEME) < error(source, begun(source, SCHEME), data, SCHEME)
    first = begun(source, SCHEME).weights
    moved = any(not torch.equal(first[name].codes, q.codes) for name, q in fitted.weights.items())
    assert moved == bool(rounding)
    assert set(fitted.parameters) == (set(FREE) if floats else set())


def test_rates_that_ruin_it_leave_what_it_began_with() -> None:
    source = block()
    data = calls(source)
    wild = LearnedRounding(
        steps=3, start=NEAREST, rounding_rate=1.0, scale_rate=0.9, float_rate=50.0
    )
    fitted = wild.fit(source, asked(source), data, FREE)
    first = begun(source, SCHEME).weights
    # a weight begins within its grid point's reach, so none is rounded elsewhere
    for name, q in fitted.weights.items():
        assert torch.equal(q.codes, first[name].codes)
        one, other = q.qparams.scale, first[name].qparams.scale
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert not fitted.parameters


def test_the_block_stays_as_it_was() -> None:
    source, twin = block(), block()
    LearnedRounding(steps=5, start=NEAREST).fit(source, asked(source), calls(source), FREE)
    assert same_tensors(source, twin)
    assert not any(one.grad is not None for one in source.parameters())


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    source = block()
    found = [
        LearnedRounding(steps=10, start=NEAREST, seed=seed).fit(
            source, asked(source), calls(source), FREE
        )
        for seed in (0, 0, 1)
    ]
    one, same, other = (fitted.parameters["widen.bias"] for fitted in found)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_budget_of_time_ends_it() -> None:
    source = block()
    data = calls(source)
    rounding = LearnedRounding(steps=10**9, minutes=1e-3, start=NEAREST)
    fitted = rounding.fit(source, asked(source), data, FREE)
    assert error(source, fitted, data, SCHEME) < error(source, begun(source, SCHEME), data, SCHEME)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is a whole number, 1 or more, not 0"),
        ({"steps": 2.5}, "steps is a whole number"),
        ({"seed": 0.5}, "seed is a whole number"),
        ({"minutes": 0.0}, "minutes is more than 0"),
        ({"scale_rate": -1.0}, "rates are 0 or more"),
        ({"float_rate": math.nan}, "rates are 0 or more"),
    ],
)
def test_what_is_no_learning_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LearnedRounding(**wrong)  # type: ignore[arg-type]  # what is tested


def test_it_does_not_begin_with_itself() -> None:
    for wrong in (LearnedRounding(), GPTQ):  # the class, where an instance was meant
        with pytest.raises(ConfigurationError, match="start rounds weights one by one"):
            LearnedRounding(start=wrong)  # type: ignore[arg-type]  # what is tested


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.blocks:
            x, _ = one(x, scale=0.5)
        out: Tensor = self.head(x)
        return out


DATA = [noise(16, 32, seed=place) for place in range(4)]


def quantizer(rounding: Rounding) -> Quantizer:
    return Quantizer().bits(3).group_size(16).only("*").rounding(rounding).fit(DATA)


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


@pytest.mark.parametrize("start", [NEAREST, GPTQ()], ids=repr)
def test_a_models_output_comes_nearer_block_by_block(start: Rounding) -> None:
    source = stack()
    plain = quantizer(start).apply(source).report.output_sqnr_db
    learned = LearnedRounding(
        200, start=start, rounding_rate=0.02, scale_rate=0.01, float_rate=0.01
    )
    found = quantizer(learned).apply(source).report
    assert plain is not None
    assert found.output_sqnr_db is not None
    assert found.output_sqnr_db > plain + 0.4


def test_what_was_learned_with_the_weights_is_in_the_report_and_in_the_file(
    tmp_path: Path,
) -> None:

    source = stack()
    result = quantizer(LearnedRounding(steps=8)).apply(source)
    said = [change.text for change in result.report.changes]
    assert any("'blocks.0' is fitted with 3 of its biases and norms" in text for text in said)
    assert result.validate()
    path = tmp_path / "model.safetensors"
    result.save(path)
    assert same_tensors(load_model(path, Stack().eval()), result.model)
    assert same_tensors(source, stack())


def test_a_block_that_is_called_twice_is_rounded_weight_by_weight_and_said_so() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for one in (*self.blocks, *self.blocks):
                x, _ = one(x, scale=0.5)
            out: Tensor = self.head(x)
            return out

    torch.manual_seed(0)
    source = Twice().eval()
    result = quantizer(LearnedRounding(steps=8, start=NEAREST)).apply(source)
    refused = [change.text for change in result.report.changes if not change.done]
    assert any("'blocks.0' is not fitted as a block" in text for text in refused), refused
    plain = quantizer(NEAREST).apply(source).model
    assert same_tensors(result.model.blocks, plain.blocks)


def test_a_bias_that_is_shared_is_left_alone() -> None:
    source = stack()
    shared = source.get_parameter("blocks.0.norm.bias")
    source.get_submodule("blocks.1.norm").register_parameter("bias", shared)
    result = quantizer(LearnedRounding(steps=8)).apply(source)
    one, other = (result.model.get_parameter(f"blocks.{place}.norm.bias") for place in (0, 1))
    assert one is other
    assert torch.equal(one, shared)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 16, "vdim": 16}], ids=["fused", "apart"])
def test_attention_is_learned_too(sizes: dict[str, int]) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True, **sizes)
            self.after = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            given = x[..., : self.attention.kdim]
            out: Tensor = x + self.after(self.attention(x, given, given)[0])
            return out

    torch.manual_seed(0)
    model = nn.Sequential(Attending(), Attending()).eval()
    data = [noise(2, 5, 32, seed=place) for place in range(3)]
    settings = Quantizer().bits(3).group_size(16).only("*").fit(data)
    plain = settings.rounding(NEAREST).apply(model).report.output_sqnr_db
    learned = LearnedRounding(60, start=NEAREST, scale_rate=0.01, float_rate=0.01)
    found = settings.rounding(learned).apply(model)
    assert plain is not None
    assert found.report.output_sqnr_db is not None
    assert found.report.output_sqnr_db > plain + 0.4
    assert all(change.done for change in found.report.changes)


class Odd(nn.Module):
    """A block that computes in a way of its own, with a weight that stays float."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.never = nn.Linear(32, 32)
        self.stays = nn.Parameter(torch.eye(32))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.between(self.last(self.first(x).relu() @ self.stays))
        return out


def odd(between: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Odd(between), Odd(between)).eval()


def test_nothing_is_left_with_a_gradient() -> None:
    for apply in (Quantizer.apply, Quantizer.apply_):
        source = odd()
        settings = quantizer(LearnedRounding(steps=4)).skip("*.never", "0.last")
        model = apply(settings, source).model
        assert all(one.grad is None for one in (*source.parameters(), *model.parameters()))


@torch.no_grad()
def without_gradients(x: Tensor) -> Tensor:
    return x + 1


def overwriting(x: Tensor) -> Tensor:
    return x.sigmoid().mul_(2)


@pytest.mark.parametrize("between", [without_gradients, overwriting])
def test_a_block_without_gradients_is_refused_with_what_mends_it(
    between: Callable[[Tensor], Tensor],
) -> None:
    source, settings = odd(between), quantizer(LearnedRounding(steps=4)).skip("*.never")
    with pytest.raises(InputError, match=r"'0' cannot be fitted .* no gradient .*skip\('0'\) or"):
        settings.apply(source)
    assert settings.override("*", rounding=GPTQ()).apply(source).validate()


def test_a_layer_that_no_data_reaches_is_refused_by_its_name() -> None:
    with pytest.raises(CalibrationError, match=r"no data reached '0.never'.*skip\('0.never'\)"):
        quantizer(LearnedRounding(steps=4)).apply(odd())
    found = quantizer(LearnedRounding(steps=4, start=NEAREST)).apply(odd())
    assert found.validate()  # which needs to know nothing of inputs


def test_a_weight_that_is_not_finite_is_refused_by_its_name() -> None:
    source = odd()
    source.get_parameter("1.last.weight").data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"1.last.weight holds NaN or infinity"):
        quantizer(LearnedRounding(steps=4)).skip("*.never").apply(source)


def test_outputs_that_are_masked_by_infinities_are_learned_from() -> None:
    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(torch.arange(32) == 3, -torch.inf)

    def last(source: nn.Sequential) -> nn.Sequential:
        return nn.Sequential(source[1])

    learned = LearnedRounding(40, start=NEAREST, scale_rate=0.01, float_rate=0.01)
    settings = Quantizer().bits(3).group_size(16).only("*").skip("*.never").fit(DATA)
    errors = [
        settings.rounding(one).apply(last(odd(masked))).report.output_sqnr_db or 0.0
        for one in (NEAREST, learned)
    ]
    assert errors[1] > errors[0] + 0.4


def test_what_is_not_learned_is_said() -> None:
    plan = quantizer(LearnedRounding(steps=4)).plan(stack())
    assert not [one for one in plan.run().report.changes if not one.done]
    changes = plan.run(sequential=False).report.changes
    keys = [weight.key for weight in plan.weights if weight.recipe is not None]
    assert [one.path for one in changes if not one.done] == keys
    assert "sequential=False was asked for" in changes[0].text

    class Unused(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.never, self.tied = nn.Linear(32, 32), nn.Linear(32, 8)
            self.tied.weight = self.head.weight  # which is learned, and so is what shares it

    found = quantizer(LearnedRounding(steps=4, start=NEAREST)).apply(Unused().eval())
    assert [one.path for one in found.report.changes if not one.done] == ["never.weight"]


def test_weights_that_cannot_be_changed_in_a_block_are_said_where_there_are_no_others() -> None:
    settings = Quantizer().bits(4).outliers(2).only("*").fit(DATA)
    found = settings.rounding(LearnedRounding(steps=4)).apply(stack()).report
    apart = "some of its columns are kept apart"
    assert {one.path for one in found.changes if apart in one.text} == {
        "blocks.0.widen.weight",
        "blocks.0.narrow.weight",
        "blocks.1.widen.weight",
        "blocks.1.narrow.weight",
        "head.weight",
    }


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_biases_of_layers_that_are_quantized_already_are_learned(
    cls: type[nn.LSTM] | type[nn.GRU],
) -> None:
    class Recurring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.after = cls(32, 32, batch_first=True), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.after(self.recurrent(x)[0])
            return out

    torch.manual_seed(0)
    half = Quantizer().bits(4).only(cls).apply(nn.Sequential(Recurring(), Recurring()).eval())
    data = [noise(2, 5, 32, seed=place) for place in range(2)]
    settings = Quantizer().bits(3).only("*").rounding(LearnedRounding(20, start=NEAREST)).fit(data)
    found = settings.apply(half.model)
    assert all(change.done for change in found.report.changes)
    one, other = (
        model.get_parameter("1.recurrent.bias_hh_l0") for model in (found.model, half.model)
    )
    assert not torch.equal(one, other)
