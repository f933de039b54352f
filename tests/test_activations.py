"""What is asked of inputs, what calibration learns of them, and what a report says."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant import (
    MSE,
    Activations,
    CalibrationError,
    ConfigurationError,
    Histogram,
    MinMax,
    PerChannel,
    PerTensor,
    PerToken,
    QuantizedLayer,
    Quantizer,
)
from mono_quant.configurable import Json
from tests.helpers import TiedModel, Whole, fates, layer_rows, noise, same_bits

DYNAMIC = "dynamic 8-bit asymmetric per-token inputs"
STATIC = "static 8-bit asymmetric per-tensor inputs"
WEIGHTS = "8-bit symmetric per-channel"


class Branches(nn.Module):
    """Has a layer that it does not always ask, and one whose input may be NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.spare = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        hidden = self.spare(x) if spare else self.body(x)
        found: Tensor = self.head(torch.log(hidden.abs()) if x.amax() < 100 else hidden.neg().log())
        return found


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def inputs_of(model: nn.Module) -> dict[str, str]:
    """Return how the inputs of each quantized layer are quantized."""
    return {
        name: activation.describe()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        for activation in layer.activations().values()
    }


def test_eight_bits_mean_dynamic_inputs_without_data_and_static_ones_with_it() -> None:
    data = noise(8, 64)
    for quantizer in (Quantizer(), Quantizer().bits(8), Quantizer().asymmetric()):
        rows = layer_rows(quantizer, net())
        assert rows["0.weight"].activation == rows["2.weight"].activation == DYNAMIC
        assert layer_rows(quantizer.fit(data), net())["0.weight"].activation == STATIC
        assert fates(quantizer.activations(None).fit(data), net())["0.weight"].endswith("channel")
    assert inputs_of(Quantizer().apply(net()).model) == {
        "0": "dynamic 8-bit asymmetric per-token",
        "2": "dynamic 8-bit asymmetric per-token",
    }


@pytest.mark.parametrize("quantizer", [Quantizer().bits(4), Quantizer().bits(16)], ids=repr)
@pytest.mark.parametrize("data", [None, noise(8, 64)], ids=["no data", "data"])
def test_other_widths_leave_inputs_float(quantizer: Quantizer, data: Tensor | None) -> None:
    given = quantizer if data is None else quantizer.fit(data)
    result = given.apply(net())
    assert not inputs_of(result.model)
    assert [row.activation for row in result.report.quantized] == [None, None]


def test_four_bits_may_have_quantized_inputs_where_they_are_asked_for() -> None:
    made = Quantizer().bits(4).activations("dynamic", bits=6, symmetric=True, granularity="tensor")
    assert fates(made, net())["0.weight"] == (
        "4-bit asymmetric per-group 64; dynamic 6-bit symmetric per-tensor inputs"
    )


def test_data_may_be_measured_on_with_dynamic_inputs() -> None:
    result = Quantizer().activations("dynamic").fit(noise(8, 64)).apply(net())
    assert set(inputs_of(result.model).values()) == {"dynamic 8-bit asymmetric per-token"}
    assert result.report.samples == 8


def test_the_static_range_is_that_of_all_batches() -> None:
    batches = [noise(5, 64, seed=seed) * size for seed, size in enumerate((1.0, 7.0, 0.1))]
    model = Quantizer().fit(batches).apply(net()).model
    first = model[0]
    assert isinstance(first, QuantizedLayer)
    activation = first.activations()["weight"]
    low, high = (float(end) for end in torch.aminmax(torch.cat(batches).double()))
    assert activation.scale is not None
    assert activation.zero_point is not None
    assert float(activation.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(activation.zero_point) == round(-low / ((high - low) / 255))


def test_static_inputs_without_data_are_refused_by_name_with_both_ways_out() -> None:
    message = (
        r"^static activations of 0, 2 are calibrated on data; give some with fit\(data\), "
        r'or say activations\("dynamic"\)$'
    )
    with pytest.raises(CalibrationError, match=message):
        Quantizer().activations("static").plan(net())
    with pytest.raises(CalibrationError, match="static activations of 2 are"):
        Quantizer().override("2", activations="static").plan(net())
    with pytest.raises(CalibrationError, match="static activations of the model are"):
        Quantizer().activations("static").plan(nn.Linear(64, 64))


def test_a_layer_that_no_data_reached_keeps_float_inputs_and_the_report_says_so() -> None:
    result = Quantizer().fit(noise(4, 64)).apply(Branches())
    rows = {row.name: row for row in result.report.layers}
    assert rows["spare.weight"].fate == f"{WEIGHTS}; float inputs: no data reached it"
    assert rows["body.weight"].fate == f"{WEIGHTS}; {STATIC}"
    assert set(inputs_of(result.model)) == {"body", "head"}
    x = noise(3, 64)
    assert result.model(x, spare=True).shape == (3, 64)


BARE = {"0.weight": torch.ones(64, 64)}


def test_static_inputs_that_no_layer_can_have_are_refused_with_the_reason() -> None:
    message = (
        r"^no layer can have the static inputs that were asked for: 0 \(a state dict does not say "
        r"what reads it\); leave activations\(\"static\"\) out"
    )
    with pytest.raises(ConfigurationError, match=message):
        Quantizer().activations("static").plan(BARE)
    with pytest.raises(ConfigurationError, match="no layer can have the static inputs"):
        Quantizer().override("0", activations="static").plan(BARE)


def test_dynamic_inputs_that_no_layer_can_have_are_warned_of_in_plan_and_report() -> None:
    warning = (
        "no layer can have the dynamic inputs that were asked for: 0 (a state dict does not say "
        "what reads it); only weights are quantized"
    )
    plan = Quantizer().activations("dynamic").plan(BARE)
    assert f"warning: {warning}" in plan.explain().splitlines()
    assert warning in plan.run().report.warnings
    for quantizer in (Quantizer(), Quantizer().activations(None)):
        assert not any("asked for" in line for line in quantizer.apply(BARE).report.warnings)


def test_inputs_that_only_some_layers_can_have_are_not_warned_of() -> None:
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    for mode in ("static", "dynamic"):
        quantizer = Quantizer().activations(mode).fit(torch.arange(64))
        assert not any("asked for" in line for line in quantizer.apply(model).report.warnings)


@pytest.mark.parametrize("mode", ["static", "dynamic", None])
def test_layers_that_no_data_reached_are_named(mode: str | None) -> None:
    quantizer = Quantizer().activations(mode)
    found = quantizer.fit([noise(4, 64)]).apply(Branches()).report.warnings
    (line,) = [one for one in found if one.startswith("no data reached")]
    assert line.startswith("no data reached spare.weight: ")
    both = [{"x": noise(4, 64)}, {"x": noise(4, 64), "spare": True}]
    for other in (quantizer.fit(both), Quantizer().activations("dynamic")):
        assert "no data reached" not in " ".join(other.apply(Branches()).report.warnings)


@pytest.mark.parametrize("in_place", [False, True])
def test_nan_inside_the_model_is_named_by_layer_and_batch(in_place: bool) -> None:
    model, data = Branches(), [noise(4, 64), noise(4, 64), noise(4, 64) + 200]
    quantizer = Quantizer().fit(data)
    message = "^what reaches 'head' holds NaN or infinity, on batch 2 of the data$"
    with pytest.raises(CalibrationError, match=message):
        (quantizer.apply_ if in_place else quantizer.apply)(model)
    assert type(model.body) is nn.Linear, "the model was changed before it was refused"


@pytest.mark.parametrize("action", ["warn", "keep", "error"])
@pytest.mark.parametrize("mode", ["dynamic", None])
def test_nan_that_the_float_model_makes_is_no_damage_of_quantizing(
    mode: str | None, action: str
) -> None:
    data = [noise(4, 64), noise(4, 64) + 200]
    quantizer = Quantizer().activations(mode).fit(data).on_damage(action)
    message = "^what reaches 'head' in the float model holds NaN, on batch 1 of the data$"
    with pytest.raises(CalibrationError, match=message):
        quantizer.apply(Branches())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Activations(None, bits=4), "stay float have no bits"),
        (lambda: Activations(None, symmetric=True), "stay float have no bits, symmetry"),
        (lambda: Activations("dynamic", bits=16), r"2 to 8 bits, not 16; activations\(None\)"),
        (lambda: Activations("static", bits=True), "2 to 8 bits, not True"),
    ],
)
def test_what_no_activations_can_be_is_refused(
    ask: Callable[[], Activations], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ask()


def test_an_override_knows_observers_by_name() -> None:
    by_name = Quantizer().override("0", observer="mse", activation_observer="histogram")
    by_object = Quantizer().override("0", observer=MSE(), activation_observer=Histogram())
    assert by_name.to_config() == by_object.to_config()


def test_inputs_of_tied_weights_are_their_own() -> None:
    x = torch.arange(64)
    result = Quantizer().fit(x).apply(TiedModel().eval())
    embedding, head = result.model.embedding, result.model.head
    assert isinstance(embedding, QuantizedLayer)
    assert isinstance(head, QuantizedLayer)
    assert not embedding.activations()
    assert head.activations()["weight"].mode == "static"
    assert head.quantized_weights["weight"] is embedding.quantized_weights["weight"]
    row = next(row for row in result.report.quantized if row.name == "embedding.weight")
    assert row.fate == (
        f"{WEIGHTS}; float inputs: its inputs are indices; {STATIC} of head.weight; "
        "also head.weight"
    )


def test_tied_products_are_calibrated_each_on_its_own_inputs() -> None:
    source = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    source[2].register_parameter("weight", source[0].get_parameter("weight"))
    model = Quantizer().fit(noise(8, 64)).apply(source).model
    scales = []
    for layer in (model[0], model[2]):
        assert isinstance(layer, QuantizedLayer)
        scale = layer.activations()["weight"].scale
        assert scale is not None
        scales.append(float(scale))
    assert scales[0] != scales[1]


@pytest.mark.parametrize("model", [TiedModel().eval(), net()], ids=["tied", "plain"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_calibrated_bytes_are_predicted_and_counted(model: nn.Module, symmetric: bool) -> None:
    x = torch.arange(64) if isinstance(model, TiedModel) else noise(4, 64)
    plan = Quantizer().activations("static", symmetric=symmetric).fit(x).plan(model)
    result = plan.run(progress=False)
    tensors = {t.data_ptr(): t for t in (*result.model.parameters(), *result.model.buffers())}
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert plan.outline.report.bytes == result.report.bytes == held
    predicted = [row.activation for row in plan.outline.report.layers]
    assert predicted == [row.activation for row in result.report.layers]


def test_an_override_says_it_for_some_layers() -> None:
    made = Quantizer().fit(noise(4, 64)).override("0", activations="float")
    assert fates(made, net()) == {"0.weight": WEIGHTS, "2.weight": f"{WEIGHTS}; {STATIC}"}
    assert inputs_of(made.apply(net()).model) == {"2": "static 8-bit asymmetric per-tensor"}
    made = made.override("2", activations="dynamic").override(
        "0", activations=Activations("static", bits=6, symmetric=True)
    )
    assert inputs_of(made.apply(net()).model) == {
        "0": "static 6-bit symmetric per-tensor",
        "2": "dynamic 8-bit asymmetric per-token",
    }


def test_an_override_of_a_width_leaves_what_was_said_of_inputs() -> None:
    made = Quantizer().bits(4).activations("dynamic").override("0", bits=8)
    assert {row.activation for row in layer_rows(made, net()).values() if row.shape} == {DYNAMIC}


def test_the_observer_of_inputs_may_be_another_one_for_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []
    observe = MinMax.observe

    def watched(self: MinMax, x: Tensor) -> object:
        seen.append(x)
        return observe(self, x)

    monkeypatch.setattr(MinMax, "observe", watched)
    made = Quantizer().activations(None).fit(noise(4, 64))
    made.apply(net())
    assert not seen
    made = made.override("0", activations="static", activation_observer=MinMax())
    assert set(inputs_of(made.apply(net()).model)) == {"0"}
    assert len(seen) == 1
    assert made.to_config()["overrides"] == [
        {
            "selector": "0",
            "activations": Activations("static").to_config(),
            "activation_observer": {"kind": "minmax"},
        }
    ]


def test_a_reader_of_whole_tensors_cannot_watch_inputs() -> None:
    message = r"Whole\(\) sees a tensor whole, and activations come in pieces: give an Observer"
    with pytest.raises(ConfigurationError, match=message):
        Quantizer().observer(activations=Whole())
    with pytest.raises(ConfigurationError, match=message):
        Quantizer().override("0", activation_observer=Whole())


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Quantizer().activations("dynamic"), "Quantizer().activations('dynamic')"),
        (Quantizer().activations(None), "Quantizer().activations(None)"),
        (
            Quantizer().activations("dynamic", bits=4, symmetric=True, granularity="tensor"),
            "Quantizer().activations('dynamic', bits=4, symmetric=True, granularity=PerTensor())",
        ),
        (
            Quantizer().activations("dynamic", granularity=PerToken()),
            "Quantizer().activations('dynamic', granularity=PerToken())",
        ),
        (Quantizer().activations("static").activations("dynamic", bits=5), None),
        (Quantizer().override("0", activations="float", activation_observer=MinMax()), None),
        (Quantizer().override("0", activations=Activations("static", 4)), None),
    ],
    ids=lambda value: repr(value) if isinstance(value, Quantizer) else "",
)
def test_what_is_said_of_inputs_pastes_back_and_comes_back_from_json(
    made: Quantizer, text: str | None
) -> None:
    if text is not None:
        assert repr(made) == text
    back: object = eval(repr(made), dict(vars(mono_quant)))
    assert isinstance(back, Quantizer)
    config: dict[str, Json] = json.loads(json.dumps(made.to_config()))
    for one in (back, Quantizer.from_config(config)):
        assert repr(one) == repr(made)
        assert one.to_config() == made.to_config()


def test_a_cast_has_no_quantized_inputs() -> None:
    wrongs: list[Callable[[], Quantizer]] = [
        lambda: Quantizer().bits(16).activations("dynamic"),
        lambda: Quantizer().activations("static").bits(16),
        lambda: Quantizer().override("0", bits=16, activations="dynamic"),
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError, match=r"bits\(16\) is a cast: its activations"):
            wrong()
    assert Quantizer().bits(16).activations(None).apply(net()).report.quantized


@pytest.mark.parametrize("mode", ["later", "Dynamic", "", 3])
def test_an_unknown_mode_is_refused_with_those_there_are(mode: object) -> None:
    message = r"activations are 'dynamic', 'static' or None \(float\), not "
    with pytest.raises(ConfigurationError, match=message):
        Quantizer().activations(mode)  # type: ignore[arg-type]  # the point
    with pytest.raises(ConfigurationError):
        Quantizer().override("0", activations=mode)  # type: ignore[arg-type]  # the point


def test_granularities_that_inputs_cannot_have_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="of activations is 'token', 'tensor' or a"):
        Quantizer().activations("dynamic", granularity="row")
    with pytest.raises(ConfigurationError, match=r"of static activations is PerTensor\(\), not P"):
        Quantizer().activations("static", granularity="token")
    with pytest.raises(ConfigurationError, match=r"is PerTensor\(\) or PerToken\(\), not PerCh"):
        Quantizer().activations("dynamic", granularity=PerChannel())
    assert Activations("static", granularity=PerTensor()).scheme.granularity == PerTensor()


@pytest.mark.parametrize("bits", [0, 1, 9, 16, True])
def test_inputs_have_2_to_8_bits(bits: int) -> None:
    with pytest.raises(ConfigurationError, match="2 to 8 bits"):
        Quantizer().activations("dynamic", bits=bits)


def test_calibrating_in_place_finds_the_same_ranges() -> None:
    source, data = net(), [noise(4, 64, seed=1), noise(4, 64, seed=2)]
    apart = Quantizer().fit(data).apply(source).model
    within = Quantizer().fit(data).apply_(source).model
    x = noise(3, 64)
    assert same_bits(apart(x), within(x))
