"""`graph()`: the builder's form of integer flow."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import mono_quant
from mono_quant import (
    CalibrationError,
    ConfigurationError,
    GraphQuantizer,
    InputError,
    QuantizedModule,
    Quantizer,
    integer_flow,
    load_model,
    save_model,
)
from mono_quant.configurable import Json
from mono_quant.numerics.metrics import sqnr_db
from tests.flow.marks import needs_integers
from tests.flow.models import Joined, Padding, ResNet, alive
from tests.test_quantizer import CALLS, Call


def batches(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


WANTED = Quantizer().only("*").activations("static")
IMAGES = (2, 3, 17, 22)


# --- the builder --------------------------------------------------------------------------------


def test_graph_may_stand_anywhere_in_the_chain() -> None:
    data = batches(*IMAGES)
    first = Quantizer().graph().bits(8).skip("last").fit(data)
    last = Quantizer().bits(8).skip("last").fit(data).graph()
    assert type(first) is GraphQuantizer
    assert repr(first) == repr(last) == "Quantizer().bits(8).skip('last').fit(<list>).graph()"
    model, x = alive(Joined()), torch.randn(IMAGES)
    with torch.no_grad():
        one, other = (made.apply(model, progress=False).model(x) for made in (first, last))
    assert torch.equal(one, other)


REFUSED = {"only_if_faster"}  # it measures layers of floats, as tests/plan/test_faster.py says


def test_graph_leaves_the_quantizer_alone() -> None:
    base = Quantizer().bits(4)
    base.graph()
    assert repr(base) == "Quantizer().bits(4)"
    assert type(base) is Quantizer


@pytest.mark.parametrize("name", [name for name in CALLS if name not in REFUSED])
def test_the_calls_of_a_graph_are_those_of_a_quantizer(name: str) -> None:
    call: Call = CALLS[name]
    before = Quantizer().graph()
    made = before.__class__
    assert made is GraphQuantizer
    plain = repr(call(Quantizer()))
    assert repr(call(Quantizer()).graph()) == f"{plain}.graph()"


def test_a_graph_quantizer_has_no_calls_of_its_own() -> None:
    public = {name for name in dir(GraphQuantizer) if not name.startswith("_")}
    assert public == set(CALLS) | {"plan", "apply", "to_config", "from_config"}


def test_its_repr_pastes_back_and_its_configuration_comes_back() -> None:
    made = Quantizer().bits(8).activations("static", bits=7).skip("a").graph()
    back: object = eval(repr(made), dict(vars(mono_quant)))
    assert type(back) is GraphQuantizer
    config: Mapping[str, Json] = json.loads(json.dumps(made.to_config()))
    assert config["graph"] is True
    again = GraphQuantizer.from_config(config)
    assert repr(again) == repr(back) == repr(made)
    assert again.to_config() == made.to_config()
    assert "graph" not in Quantizer().to_config()


def test_each_refuses_the_configuration_of_the_other_and_names_the_call() -> None:
    with pytest.raises(ConfigurationError, match=r"GraphQuantizer\.from_config\(config\)"):
        Quantizer.from_config(Quantizer().graph().to_config())
    with pytest.raises(ConfigurationError, match=r"Quantizer\.from_config\(config\)\.graph\(\)"):
        GraphQuantizer.from_config(Quantizer().to_config())
    assert repr(Quantizer.from_config({"graph": False})) == "Quantizer()"
    with pytest.raises(ConfigurationError, match="graph is true or false, not 1"):
        GraphQuantizer.from_config({"graph": 1})


# --- the result ---------------------------------------------------------------------------------


def test_the_result_is_the_flow_of_the_class_kept_model() -> None:
    model, data = alive(ResNet()), batches(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = WANTED.fit(data).graph().apply(model, progress=False)
    kept = WANTED.fit(data).apply(model, progress=False)
    graph: fx.GraphModule = result.model
    assert isinstance(graph, fx.GraphModule)
    assert type(result.kept.model) is ResNet
    flow, x = integer_flow(kept.model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(graph(x), flow.model(x))
        assert torch.equal(result.kept.model(x), kept.model(x))
    assert result.report.flow == flow.lines
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(result.kept.report) == str(kept.report)
    assert result.kept.plan.config == kept.plan.config
    assert result.plan.config == {**kept.plan.config, "graph": True}


def test_the_output_is_measured_on_the_graph_and_the_class_kept_one_stands_beside() -> None:
    model, data = alive(ResNet()), batches(2, 3, 64, 64)
    result = WANTED.fit(data).graph().apply(model, progress=False)
    with torch.no_grad():
        exact, found = (torch.cat([one(x) for x in data]) for one in (model, result.model))
        kept = torch.cat([result.kept.model(x) for x in data])
    report = result.report
    assert report.output_sqnr_db == pytest.approx(sqnr_db(exact, found), abs=1e-3)
    assert report.class_kept_sqnr_db == pytest.approx(sqnr_db(exact, kept), abs=1e-3)
    assert report.output_sqnr_db != report.class_kept_sqnr_db
    assert f"; {report.class_kept_sqnr_db:.1f} dB with its class kept" in str(report)


def test_the_warning_about_the_output_is_about_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(*IMAGES)
    wanted = Quantizer().bits(3).only("*").activations("static", bits=3).fit(data)
    result = wanted.graph().apply(alive(Joined()), progress=False)
    said = [warning for warning in result.report.warnings if "the output is at" in warning]
    assert said == [
        warning for warning in said if f"{result.report.output_sqnr_db:.1f} dB" in warning
    ]
    assert len(said) == 1


@needs_integers
def test_the_report_says_that_the_class_is_gone_and_what_each_layer_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))
    result = WANTED.fit(batches(2, 3, 9, 9)).graph().apply(model.eval(), progress=False)
    note = "written as a graph: a GraphModule, no longer a Sequential; files hold the Sequential"
    line = "0: uint8 -> float32, as '1' takes floats"
    for text in (str(result.report), result.report.to_markdown(), result.report._repr_html_()):
        assert note in text
        assert line.replace(">", "&gt;").replace("'", "&#x27;") in text or line in text
    assert note in result.plan.explain()
    assert line in json.loads(result.report.to_json())["flow"]


def test_files_hold_the_class_kept_model_and_the_graph_is_written_anew(tmp_path: Path) -> None:
    result = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)
    loaded = load_model(result.save(tmp_path / "model.safetensors"), Joined())
    assert type(loaded) is Joined
    x = torch.randn(IMAGES)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.kept.model(x))
        assert torch.equal(integer_flow(loaded).model(x), result.model(x))
    assert result.checkpoint().config["graph"] is True


def test_a_graph_alone_is_no_file_and_the_error_says_what_is(tmp_path: Path) -> None:
    result = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)
    with pytest.raises(InputError, match=r"use the model .* result\.kept\.model"):
        save_model(result.model, tmp_path / "graph.pt")


def test_validation_runs_the_graph_of_what_was_saved(tmp_path: Path) -> None:
    result = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)
    assert result.validate()
    other = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)
    assert result.validate(path=other.save(tmp_path / "other.pt")).status == "failed"
    layer = result.model.get_submodule("stem")
    assert isinstance(layer.bias, Tensor)
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)  # the graph's alone
    assert dict(result.validate().checks)["run"] == "the reloaded model's output differs"


def test_it_is_dequantized_to_a_float_graph_and_exported_as_the_class_kept_model() -> None:
    result = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)
    x = torch.randn(IMAGES)
    floats, exported = result.dequantize(), result.export(x)
    assert isinstance(floats, fx.GraphModule)
    with torch.no_grad():
        assert torch.equal(floats(x), result.kept.dequantize()(x))
        torch.testing.assert_close(exported.module()(x), result.kept.model(x), rtol=0, atol=1e-5)


def test_weights_are_held_once() -> None:
    result = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)

    def places(model: nn.Module) -> set[int]:
        state = model.state_dict().items()
        return {value.data_ptr() for name, value in state if name.endswith(("codes", "bias"))}

    assert places(result.model) == places(result.kept.model)


def test_moving_the_graph_leaves_the_class_kept_model_alone() -> None:
    result = WANTED.fit(batches(*IMAGES)).graph().apply(alive(Joined()), progress=False)
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = result.kept.model(x)
        result.model.to(torch.bfloat16)
        assert torch.equal(result.kept.model(x), expected)


def test_damage_that_is_kept_out_shows_in_the_graph() -> None:
    model, data = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), batches(16, 8)
    with torch.no_grad():
        model.get_parameter("0.weight")[:, 0] = (
            1e4  # meets nothing but zeros, and takes the grid of its rows
        )
    for batch in data:
        batch[:, 0] = 0
    result = WANTED.on_damage("keep").fit(data).graph().apply(model, progress=False)
    assert result.report.layers[0].scheme == "float16"
    assert [line.split(";")[0] for line in result.report.flow] == [
        "'0': float32, rounded to uint8 for '1'",
        "2: uint8 -> float32, as the model's output takes floats",
        "0: float32, as its inputs are not quantized",
    ]
    assert result.validate()


# --- refusals, before anything is quantized -------------------------------------------------------


class Branching(nn.Module):
    """Looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if out.sum() > 0 else -out


class BranchingConv(nn.Conv2d):
    """A convolution that looks at a value before it calls its parent."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.sum() > 0 else -input)


def test_a_model_that_does_not_trace_is_refused_by_the_plan_with_the_place() -> None:
    wanted = WANTED.fit(batches(4, 6)).graph()
    with pytest.raises(InputError, match=r"in '1' \(Branching\), line \d+ of test_graph.py"):
        wanted.plan(nn.Sequential(nn.Linear(6, 6), Branching()))


def test_so_is_a_layer_with_a_forward_that_cannot_be_followed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BranchingConv(4, 4, 3))
    wanted = WANTED.fit(batches(2, 3, 9, 9))
    with pytest.raises(InputError, match=r"in '1' \(BranchingConv\), line"):
        wanted.graph().plan(model)
    wanted.skip("1").graph().plan(model)  # then it is one step


def test_so_is_what_is_changed_in_place_and_read_again() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            x.relu_()
            out: Tensor = self.two(x)
            return out

    with pytest.raises(InputError, match="in place, which 'two' reads afterwards"):
        WANTED.fit(batches(4, 6)).graph().plan(Changing())


def test_so_is_a_forward_that_was_replaced_on_the_object() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].forward = lambda x: x
    with pytest.raises(InputError, match="the forward of 0 was replaced on the object"):
        WANTED.fit(batches(4, 6)).skip("0").graph().plan(nn.Sequential(*model, nn.Linear(6, 6)))


def test_without_data_it_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"calibrated on data; give some with fit\(data\)"):
        Quantizer().graph().plan(nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (Quantizer().activations("dynamic"), "0 (its inputs are dynamic, not static)"),
        (Quantizer().bits(4), "0 (its inputs are float, not static)"),
        (WANTED.skip("*"), "0 (float: skipped)"),
        (Quantizer().activations("static", symmetric=True), "its inputs are on a symmetric grid"),
    ],
)
def test_if_no_layer_would_pass_codes_the_plan_says_why(wanted: Quantizer, why: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        wanted.fit(batches(4, 64)).graph().plan(nn.Sequential(nn.Linear(64, 64)))
    assert why in str(caught.value)
    assert 'say activations("static")' in str(caught.value)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Sequential has no weight that can be quantized"):
        Quantizer().fit(batches(4, 6)).graph().plan(nn.Sequential(nn.ReLU()))


def test_half_precision_is_refused_by_the_plan() -> None:
    with pytest.raises(InputError, match=r"'0.weight' is bfloat16.*call float\(\) on the model"):
        WANTED.fit(batches(4, 6)).graph().plan(nn.Sequential(nn.Linear(6, 6)).bfloat16())


def test_a_state_dict_is_refused() -> None:
    with pytest.raises(InputError, match="has no code to make a graph of"):
        Quantizer().graph().plan({"a": torch.ones(2)})  # type: ignore[type-var]  # that is the point


class Optional(nn.Module):
    """Takes a mask, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x)
        return out if mask is None else out * mask


def test_data_that_gives_arguments_with_a_default_is_refused_before_it_is_used() -> None:
    seen: list[object] = []
    model = Optional()
    pairs = [(torch.randn(4, 6), torch.zeros(4, 6)) for _ in range(3)]
    model.layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(
        InputError, match=r"their outputs differ\. In a graph, arguments that have a"
    ):
        WANTED.fit(pairs).graph().apply(model, progress=False)
    named = [{"x": x, "mask": mask} for x, mask in pairs]
    with pytest.raises(InputError, match="the graph of the model's code is not the model"):
        WANTED.fit(named).graph().apply(model, progress=False)
    assert len(seen) <= 4, "the model and its graph ran once each, and nothing was calibrated"


def test_outputs_with_equal_infinities_are_no_difference() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return torch.cat([out, torch.full_like(out, -torch.inf)], 1)

    result = WANTED.fit(batches(4, 6)).graph().apply(Masked(), progress=False)
    assert (result.report.output_sqnr_db or 0) > 30


def test_other_methods_of_the_model_that_the_data_calls_are_refused_too() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x)

        def encode(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    def call(model: nn.Module, batch: object) -> object:
        encode: object = model.encode
        assert callable(encode)
        return encode(batch)

    wanted = WANTED.fit(batches(4, 6), forward=call).graph()
    with pytest.raises(InputError, match="Encoder failed on batch 0 of the data"):
        wanted.apply(Encoder(), progress=False)


# --- odd models -----------------------------------------------------------------------------------


def test_a_single_layer_is_a_graph_too() -> None:
    result = WANTED.fit(batches(4, 6)).graph().apply(nn.Linear(6, 3), progress=False)
    assert result.validate()
    assert isinstance(result.kept.model, QuantizedModule)
    assert "no longer a Linear" in str(result.report)


def test_layers_that_pad_and_layers_that_are_called_twice() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad, self.twice = Padding(3, 4, 3, 2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.twice(self.twice(self.pad(x)).relu())
            return {"y": y, "mean": y.mean((2, 3))}

    result = WANTED.fit(batches(*IMAGES)).graph().apply(Odd(), progress=False)
    assert result.validate()
    assert [line.split(":")[0] for line in result.report.flow[1:4]] == ["pad", "twice", "twice_2"]
    assert (result.report.output_sqnr_db or 0) > 30


def test_tied_layers_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x).relu())
            return out

    result = WANTED.fit(batches(4, 6)).graph().apply(Tied(), progress=False)
    assert result.validate()
    state = result.model.state_dict()
    codes = [value.data_ptr() for name, value in state.items() if name.endswith("codes")]
    assert len(codes) == 2
    assert len(set(codes)) == 1
