"""Layers that gain no speed stay float: what is measured, on what, and what comes of it."""

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    BiasCorrection,
    ConfigurationError,
    InputError,
    LinearQuantizer,
    QuantizationResult,
    QuantizedModule,
    Quantizer,
    kernels,
    load_model,
)
from mono_quant.plan.faster import read
from mono_quant.speed import LayerSpeed, Turns
from tests.helpers import noise, same_tensors
from tests.plan.test_damage import uneven

X = noise(2, 64)


class Clock:
    """Time that passes when a layer runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    CLOCK.now, CLOCK.calls = 0.0, 0
    monkeypatch.setattr("mono_quant.speed.time", CLOCK)


class Timed(nn.Linear):
    """Takes a second for each row of its input in float, and another time quantized."""

    def __init__(self, quantized: float, out: int = 64, floats: float = 1.0) -> None:
        super().__init__(64, out)
        self.floats, self.quantized = floats, quantized

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        CLOCK.calls += 1
        of_row = self.quantized if isinstance(self, QuantizedModule) else self.floats
        CLOCK.now += of_row * x.shape[0]
        return super().forward(x)


def model(*seconds: float) -> nn.Sequential:
    """Return layers that take so long quantized, where they take a second in float."""
    torch.manual_seed(0)
    return nn.Sequential(*(Timed(one) for one in seconds))


BASE = Quantizer().layer(LinearQuantizer(own_forward=True))
"""Knows layers that run code of their own, such as `Timed`."""

FASTER = BASE.only_if_faster(X)


def rows(result: QuantizationResult[nn.Sequential]) -> dict[str, tuple[bool, str, float | None]]:
    """Return of each weight whether it was quantized, its fate and its speed."""
    return {
        row.name: (row.scheme is not None, row.fate, row.speed.ratio if row.speed else None)
        for row in result.report.layers
        if row.shape
    }


# --- what is decided ----------------------------------------------------------------------------


def test_layers_that_gain_are_quantized_and_others_stay_float_with_what_was_measured() -> None:
    source = model(0.5, 4.0, 0.25)
    result = FASTER.apply(source)
    found = rows(result)
    assert [one for one, _, _ in found.values()] == [True, False, True]
    assert [ratio for _, _, ratio in found.values()] == [2.0, 0.25, 4.0]
    assert found["1.weight"][1] == (
        "float: no gain in speed, quantized it is 0.25 times as fast on the example"
    )
    assert "2 of 3 layers" in str(result.report)
    assert same_tensors(result.model, BASE.skip("1").apply(source).model)


def test_a_layer_must_be_faster_by_more_than_the_margin() -> None:
    source = model(0.5, 0.25)  # 2 and 4 times as fast
    for margin, kept in {0.0: [True, True], 1.0: [False, True], 3.0: [False, False]}.items():
        result = BASE.only_if_faster(X, margin=margin).apply(source)
        assert [one for one, _, _ in rows(result).values()] == kept


def test_a_model_that_gains_nothing_is_the_model_itself() -> None:
    source = nn.Sequential(Timed(2.0), nn.BatchNorm1d(64), Timed(2.0)).eval()
    result = BASE.fit(noise(8, 64)).only_if_faster(X).apply(source)
    assert not result.report.quantized
    assert same_tensors(result.model, source)
    assert isinstance(result.model[1], nn.BatchNorm1d)  # nothing asks for folding any more
    assert "no weight is quantized by this" in result.report.notes


def test_what_the_example_does_not_reach_stays_float() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Timed(0.5), Timed(0.5)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.used(x)
            return found

    report = FASTER.apply(Branches()).report
    used, unused = (row for row in report.layers if row.shape)
    assert used.scheme is not None
    assert unused.fate == ("float: the example does not reach it, so nothing shows a gain in speed")


@pytest.mark.parametrize(("other", "together"), [(2.5, False), (1.25, True)])
def test_layers_that_share_a_weight_share_what_they_take(other: float, together: bool) -> None:
    source = model(0.5, other, 0.5)
    source[1].weight = source[0].weight
    result = FASTER.apply(source)
    assert isinstance(result.model[0], QuantizedModule) is together
    assert isinstance(result.model[1], QuantizedModule) is together
    assert isinstance(result.model[2], QuantizedModule)
    row = result.report.layers[0]
    assert row.speed == LayerSpeed(4.0, 2 * (0.5 + other))
    assert row.aliases == ("1.weight",)
    assert same_tensors(result.model, BASE.skip(*([] if together else ["0"])).apply(source).model)


def test_the_inputs_of_tied_weights_are_still_told_after_measuring() -> None:
    source = model(0.5, 0.5)
    source[1].weight = source[0].weight
    quantizer = BASE.override("1", activations="float")
    plan = quantizer.only_if_faster(X).plan(source).measured()
    assert [row.fate for row in plan.outline.report.layers] == [
        row.fate for row in quantizer.plan(source).outline.report.layers
    ]


def test_layers_that_are_quantized_already_or_skipped_are_not_measured() -> None:
    source = model(0.5, 4.0)
    once = BASE.skip("1").apply(source).model
    found = rows(BASE.skip("1").only_if_faster(X).apply(source))
    assert found["1.weight"] == (False, "float: skipped", None)
    again = rows(FASTER.apply(once))
    assert again["1.weight"][0] is False
    assert again["0.weight"][2] is None


def test_what_damage_keeps_at_16_bits_is_measured_as_such() -> None:
    class Casts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            quick = 1.0
            if isinstance(self, QuantizedModule):
                (packed,) = self.packed_weights().values()
                quick = 0.5 if packed.scheme.code_bits == 8 else 3.0
            CLOCK.now += quick
            return super().forward(x)

    source, x = uneven()
    mix = Casts(64, 64)
    mix.load_state_dict(source.mix.state_dict())
    source.mix = mix
    source.head = Timed(0.5)
    quantizer = BASE.activations("dynamic").fit(x)
    assert "float16" in quantizer.on_damage("keep").apply(source).report.layers[0].fate
    faster = quantizer.only_if_faster(x).on_damage("keep").apply(source).report
    assert faster.layers[0].reason == "no gain in speed"
    assert faster.layers[0].speed == LayerSpeed(1.0, 3.0)
    assert faster.layers[1].scheme is not None


# --- what is measured ---------------------------------------------------------------------------


def test_layers_that_are_alike_are_measured_once() -> None:
    FASTER.plan(model(0.5, 2.0)).measured()
    two = CLOCK.calls - 2  # those of the model itself
    CLOCK.calls = 0
    plan = FASTER.plan(model(*[0.5] * 18, *[2.0] * 18)).measured()
    assert CLOCK.calls - 36 == two
    assert sum(weight.recipe is not None for weight in plan.weights) == 18


def unbiased() -> nn.Module:
    layer = Timed(0.5)
    layer.register_parameter("bias", None)
    return layer


@pytest.mark.parametrize(
    ("second", "quantizer"),
    [
        (Timed(0.5, out=32), FASTER),
        (Timed(0.4), FASTER),
        (unbiased(), FASTER),
        (Timed(0.5), FASTER.override("1", bits=4)),
        (Timed(0.5), FASTER.override("1", activations="float")),
    ],
    ids=["shape", "attribute", "bias", "grid", "inputs"],
)
def test_layers_that_differ_are_measured_apart(second: nn.Module, quantizer: Quantizer) -> None:
    FASTER.plan(nn.Sequential(Timed(0.5))).measured()
    one = CLOCK.calls - 1  # that of the model itself
    CLOCK.calls = 0
    quantizer.plan(nn.Sequential(Timed(0.5), second)).measured()
    assert CLOCK.calls - 2 == 2 * one


def test_each_call_counts_with_the_inputs_that_it_has() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Timed(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.step(x[:length]) for length in (1, 3, 3)])

    plan = BASE.only_if_faster(noise(3, 64)).plan(Loop()).measured()
    assert plan.weights[0].speed == LayerSpeed(7.0, 3.5)


def test_of_a_loop_that_grows_the_first_lengths_are_measured() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Timed(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.step(x[:length]) for length in range(1, 31)])

    plan = BASE.only_if_faster(noise(30, 64)).plan(Loop()).measured()
    assert plan.weights[0].speed == LayerSpeed(36.0, 18.0)  # 1 to 8 rows


def test_the_example_is_run_as_the_data_is_or_as_it_says_itself() -> None:
    def doubled(model: nn.Module, batch: object) -> object:
        return model(torch.cat([cast("Tensor", batch)] * 2))

    source, data = model(0.5), noise(4, 64)

    def speed(quantizer: Quantizer) -> LayerSpeed | None:
        return quantizer.plan(source).measured().weights[0].speed

    assert speed(FASTER.fit(data)) == LayerSpeed(2.0, 1.0)
    assert speed(FASTER.fit(data, forward=doubled)) == LayerSpeed(4.0, 2.0)
    assert speed(BASE.only_if_faster(X, forward=doubled)) == LayerSpeed(4.0, 2.0)


def test_a_tuple_or_a_mapping_is_one_call() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Timed(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = self.layer(torch.cat([x, y]))
            return found

    for example in ((X, X[:1]), [X, X[:1]], {"x": X, "y": X[:1]}):
        plan = BASE.only_if_faster(example).plan(Two()).measured()
        assert plan.weights[0].speed == LayerSpeed(3.0, 1.5)


Seen = list[tuple[nn.Module, nn.Module]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Let every layer but those of 3 outputs gain, and collect what was compared with what."""
    pairs: Seen = []

    def turns(
        floats: "partial[object]",
        quantized: "partial[object]",
        seconds: float,
        device: torch.device,
        before: tuple[Callable[[], object], Callable[[], object]],
    ) -> Turns:
        for call in (*before, floats, quantized):
            call()
        one, other = cast("nn.Module", floats.func), cast("nn.Module", quantized.func)
        pairs.append((one, other))
        slow = getattr(one, "out_channels", getattr(one, "out_features", 0)) == 3
        return Turns((1.0,), (2.0 if slow else 0.5,))

    monkeypatch.setattr("mono_quant.plan.faster.take_turns", turns)
    return pairs


def test_a_transformer_is_measured_as_torch_runs_it_in_float(seen: Seen) -> None:
    source = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    fused = source.activation_relu_or_gelu
    result = BASE.only_if_faster(noise(2, 5, 64)).apply(source)
    assert {row.name for row in result.report.quantized} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    attention, _ = next(pair for pair in seen if isinstance(pair[0], nn.MultiheadAttention))
    assert type(attention) is nn.MultiheadAttention
    assert source.activation_relu_or_gelu == fused
    assert type(source.self_attn) is nn.MultiheadAttention
    assert result.validate(noise(2, 5, 64))


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_kinds_of_layers_are_measured_whatever_their_inputs(
    activations: str | None, seen: Seen
) -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 32)
            self.conv = nn.Conv1d(32, 48, 3, groups=2)
            self.steps = nn.LSTM(48, 24, num_layers=2, bidirectional=True)
            self.head = nn.Linear(48, 3)

        def forward(self, ids: Tensor) -> Tensor:
            rows = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
            found: Tensor = self.head(self.steps(rows)[0])
            return found

    ids = torch.arange(40).reshape(2, 20)
    quantizer = BASE.activations(activations).fit(ids)
    result = quantizer.only_if_faster(ids).apply(Kinds())
    assert [pair[0].__class__ for pair in seen] == [nn.Embedding, nn.Conv1d, nn.LSTM, nn.Linear]
    expected = quantizer.skip("head").apply(result.dequantize()).report
    assert [row.name for row in result.report.quantized] == [row.name for row in expected.quantized]
    assert result.report.layers_speed == LayerSpeed(4.0, 2.5)  # the LSTM's rows count once
    assert result.validate()


def test_one_layer_is_quantized_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def quantized() -> int:
        return sum(issubclass(type(one), QuantizedModule) for one in gc.get_objects())

    def turns(*_: object) -> Turns:
        alive.append(quantized())
        return Turns((1.0,), (0.5,))

    monkeypatch.setattr("mono_quant.plan.faster.take_turns", turns)
    gc.collect()
    before = quantized()
    widths = [64, 66, 68, 70, 72]
    layers = [nn.Linear(one, other) for one, other in itertools.pairwise(widths)]
    FASTER.plan(nn.Sequential(*layers)).measured()
    assert [count - before for count in alive] == [2, 2, 2, 2]  # it, and the copy run before it


def test_folding_is_decided_after_measuring_and_files_come_back(seen: Seen, tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3),
            nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 10),
        ).eval()  # fmt: skip

    x = noise(4, 3, 8, 8)
    quantizer = BASE.fit(x).transform(BiasCorrection())
    result = quantizer.only_if_faster(x[:1]).apply(network())
    assert [row.name for row in result.report.quantized] == ["0.weight", "6.weight"]
    assert isinstance(result.model[4], nn.Identity)  # folded into a layer that stays float
    assert result.validate()
    loaded = load_model(result.save(tmp_path / "some.safetensors"), network())
    assert torch.equal(loaded(x), result.model(x))
    assert same_tensors(result.model, quantizer.skip("3").apply(network()).model)


def test_the_configuration_of_the_result_makes_the_same_model_without_a_clock(
    seen: Seen,
) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 3), nn.Sequential(nn.Linear(3, 3)))
    quantizer = BASE.only("*").skip("2").only_if_faster(X)
    result = quantizer.apply(source)
    assert result.plan.config["skip"] == ["2", "1.weight"]
    seen.clear()
    again = Quantizer.from_config(result.plan.config).apply(source)
    assert not seen
    assert same_tensors(again.model, result.model)
    assert quantizer.to_config() == BASE.only("*").skip("2").to_config()


def root() -> nn.Module:
    return nn.Linear(64, 3)


def computed() -> nn.Module:
    """Return a layer whose weight is computed from two parameters."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 3)), nn.Linear(3, 64))


@pytest.mark.parametrize(("make", "left"), [(root, "weight"), (computed, "0")])
def test_configurations_name_single_layers_and_computed_weights_too(
    make: Callable[[], nn.Module], left: str, seen: Seen
) -> None:
    source = make()
    result = Quantizer().only("*").only_if_faster(X).apply(source)
    assert result.plan.config["skip"] == [left]
    again = Quantizer.from_config(result.plan.config).apply(source)
    assert same_tensors(again.model, result.model)


def test_packed_sequences_are_inputs_as_any(seen: Seen) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.LSTM(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_sequence([x, x[:1]])
            found: Tensor = self.steps(packed)[1][0]
            return found

    plan = FASTER.plan(Packed()).measured()
    assert [weight.speed for weight in plan.weights] == [LayerSpeed(1.0, 0.5)] * 2


def test_the_model_is_left_as_it_was(seen: Seen) -> None:
    source = nn.Sequential(nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    FASTER.apply(source)
    assert all(module.training for module in source.modules())
    assert all(not module._forward_pre_hooks for module in source.modules())
    assert all(torch.equal(source.state_dict()[name], before[name]) for name in before)


def test_hooks_of_the_user_run_in_both_and_ours_in_neither(seen: Seen) -> None:
    source = nn.Sequential(nn.Linear(64, 64))
    calls: list[bool] = []

    def hook(layer: nn.Module, args: tuple[object, ...]) -> None:
        calls.append(isinstance(layer, QuantizedModule))

    source[0].register_forward_pre_hook(hook)
    FASTER.plan(source).measured()
    assert {True, False} <= set(calls)
    for pair in seen:
        assert [len(one._forward_pre_hooks) for one in pair] == [1, 1]


def test_in_place_the_given_model_is_measured_and_changed(seen: Seen) -> None:
    source = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    result = FASTER.apply_(source)
    assert result.model is source
    assert isinstance(source[0], QuantizedModule)
    assert type(source[1]) is nn.Linear
    with pytest.raises(InputError, match="begins again from the float model"):
        FASTER.on_damage("keep").apply_(nn.Sequential(nn.Linear(64, 64)))
    assert len(seen) == 2  # it is refused before anything is measured


def test_kernels_that_ran_are_told(seen: Seen) -> None:
    with kernels.use("reference"):
        plan = FASTER.plan(nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 8))).measured()
    told = {row.name: row.kernel for row in plan.outline.report.layers if row.scheme}
    assert told == {
        "0.weight": "reference",
        "1.weight_ih_l0": "reference",
        "1.weight_hh_l0": "reference",
    }
    assert "kernel" in plan.explain()


# --- what is said and refused -------------------------------------------------------------------


def test_the_plan_says_the_rule_and_then_what_came_of_it() -> None:
    plan = FASTER.plan(model(0.5, 2.0))
    said = plan.explain()
    assert "one that is not more than 5% faster quantized stays float" in said
    assert CLOCK.calls == 0
    measured = plan.measured()
    told = measured.explain()
    assert "quantized only where that is more than 5% faster on the example: 1 of 2 layers" in told
    assert "layers measured one by one: 4000 ms -> 3000 ms a call of the model, 1.33 times" in told
    assert "one that is not" not in told
    assert measured.outline.report.bytes > plan.outline.report.bytes
    CLOCK.calls = 0
    result = measured.run()
    assert measured.measured() is measured
    assert CLOCK.calls == 0
    assert result.plan.report == measured.outline.report


def test_without_the_rule_a_plan_is_its_own_answer() -> None:
    plan = BASE.plan(model(0.5))
    assert plan.measured() is plan
    nothing = FASTER.skip("*").plan(model(0.5)).measured()
    assert CLOCK.calls == 0
    assert "no weight is quantized by this" in nothing.explain()


def test_files_hold_no_times(tmp_path: Path) -> None:
    """Decisions that are the same make files that are the same, whatever was measured."""
    quick, slow = (FASTER.apply(model(0.5, 2.0)), FASTER.apply(model(0.4, 3.0)))
    assert quick.report.to_dict() != slow.report.to_dict()
    written = [
        result.save(tmp_path / f"{name}.safetensors").read_bytes()
        for name, result in {"quick": quick, "slow": slow}.items()
    ]
    assert written[0] == written[1]


def test_the_chain_shows_it_and_another_replaces_it() -> None:
    assert repr(Quantizer().only_if_faster(X)) == "Quantizer().only_if_faster(<Tensor>)"
    both = Quantizer().only_if_faster((X, X), margin=0.5).fit(X)
    assert repr(both) == "Quantizer().only_if_faster(<tuple>, margin=0.5).fit(<list>)"
    assert repr(both.only_if_faster({"x": X})) == "Quantizer().only_if_faster(<dict>).fit(<list>)"


def test_graphs_and_state_dicts_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigurationError, match="in a graph layers pass codes on"):
        FASTER.graph()
    with pytest.raises(ConfigurationError, match="in a graph layers pass codes on"):
        BASE.graph().only_if_faster(X)
    with pytest.raises(InputError, match="a state dict cannot be run, so only_if_faster"):
        FASTER.plan({"weight": noise(64, 64)})


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_margin_is_a_share(margin: float) -> None:
    with pytest.raises(ConfigurationError, match="margin is a share"):
        BASE.only_if_faster(X, margin=margin)


@pytest.mark.parametrize("example", ["x", iter([X]), 7])
def test_an_example_is_a_batch(example: object) -> None:
    with pytest.raises(InputError):
        BASE.only_if_faster(example)


def test_weights_that_are_not_finite_are_named() -> None:
    source = nn.Sequential(nn.Sequential(nn.Linear(64, 64)))
    with torch.no_grad():
        source.get_parameter("0.0.weight")[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"0\.0\.weight holds NaN"):
        FASTER.apply(source)


# --- other weights pass through the cache -------------------------------------------------------


def test_no_more_is_read_than_was_asked_for() -> None:
    floats = [torch.ones(100), torch.ones(50, 4), torch.ones(300, dtype=torch.float16)]
    assert read(floats, 10**6) == 400 + 800 + 600
    assert read(floats, 600) == 600
    assert read(floats, 601) == 604  # values are not cut in two
    assert read(floats, 0) == 0
    assert read([torch.ones(9, dtype=torch.int64), torch.ones(4)], 100) == 16
    assert read([torch.ones(4, 6).t()], 40) == 96  # as a whole where it is not contiguous
