"""The one-call functions: each is the builder, said shorter."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    MSE,
    Affine,
    Auto,
    ConfigurationError,
    Entropy,
    Histogram,
    InputError,
    MinMax,
    MonoQuantError,
    MovingAverage,
    Percentile,
    PerChannel,
    QuantizationResult,
    Quantizer,
    RangeEstimator,
    Scheme,
    create_observer,
    dequantize_model,
    dynamic_quantize,
    load_model,
    quantize,
    register,
    save_model,
    static_quantize,
    validate_quantization,
)
from mono_quant.numerics.granularity import Shape
from tests.helpers import noise, same_bits, same_tensors
from tests.serializers.files import assert_same


def net() -> nn.Sequential:
    """Return layers large enough to be quantized at every width."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


DATA = noise(5, 64)
SAME: dict[str, tuple[Callable[[nn.Module], QuantizationResult[nn.Module]], Quantizer]] = {
    "nothing said": (lambda model: quantize(model), Quantizer().bits(8)),  # noqa: PLW0108
    "bits": (lambda model: quantize(model, 4), Quantizer().bits(4)),
    "bits by name": (lambda model: quantize(model, bits=3), Quantizer().bits(3)),
    "a cast": (lambda model: quantize(model, 16), Quantizer().bits(16)),
    "dynamic": (
        lambda model: quantize(model, bits=8, dynamic=True),
        Quantizer().bits(8).activations("dynamic"),
    ),
    "symmetric": (
        lambda model: quantize(model, 4, symmetric=True),
        Quantizer().bits(4).symmetric(),
    ),
    "asymmetric": (lambda model: quantize(model, symmetric=False), Quantizer().asymmetric()),
    "granularity": (
        lambda model: quantize(model, granularity="tensor"),
        Quantizer().granularity("tensor"),
    ),
    "a granularity": (
        lambda model: quantize(model, 4, granularity=PerChannel()),
        Quantizer().bits(4).granularity(PerChannel()),
    ),
    "groups": (
        lambda model: quantize(model, 4, group_size=16),
        Quantizer().bits(4).group_size(16),
    ),
    "an observer": (
        lambda model: quantize(model, 4, observer=MSE(steps=10)),
        Quantizer().bits(4).observer(MSE(steps=10)),
    ),
    "an observer by name": (
        lambda model: quantize(model, 4, observer="mse"),
        Quantizer().bits(4).observer(MSE()),
    ),
    "skip": (lambda model: quantize(model, skip=["2"]), Quantizer().skip("2")),
    "skip in a tuple": (lambda model: quantize(model, skip=("2",)), Quantizer().skip("2")),
    "only": (lambda model: quantize(model, 4, only=["2"]), Quantizer().bits(4).only("2")),
    "data": (lambda model: quantize(model, data=DATA), Quantizer().fit(DATA)),
    "dynamic_quantize": (lambda model: dynamic_quantize(model), Quantizer()),  # noqa: PLW0108
    "static_quantize": (lambda model: static_quantize(model, DATA), Quantizer().fit(DATA)),
}


@pytest.mark.parametrize(("call", "builder"), SAME.values(), ids=SAME)
def test_one_call_agrees_with_the_builder(
    call: Callable[[nn.Module], QuantizationResult[nn.Module]], builder: Quantizer
) -> None:
    source = net()
    found, expected = call(source), builder.apply(source)
    assert_same(found.model, expected.model)
    assert found.report.layers == expected.report.layers
    assert found.report.output_sqnr_db == expected.report.output_sqnr_db
    assert type(source[0]) is nn.Linear


def test_samples_and_forward_reach_the_data() -> None:
    def forward(model: nn.Module, batch: object) -> object:
        assert isinstance(batch, dict)
        return model(batch["inputs"])

    batches = [{"inputs": noise(4, 64)}] * 5
    for result in (
        quantize(net(), data=batches, samples=6, forward=forward),
        static_quantize(net(), batches, samples=6, forward=forward),
    ):
        assert result.report.samples == 8


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        (dynamic_quantize, "dynamic 8-bit asymmetric per-token inputs"),
        (lambda model: static_quantize(model, DATA), "static 8-bit asymmetric per-tensor inputs"),
    ],
    ids=["dynamic", "static"],
)
def test_how_inputs_are_quantized_is_said_in_the_report(
    call: Callable[[nn.Module], QuantizationResult[nn.Module]], inputs: str
) -> None:
    report = call(net()).report
    assert [row.activation for row in report.quantized] == [inputs] * 2
    assert report.notes == ()


def test_dynamic_quantization_of_a_cast_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"bits\(16\) is a cast"):
        quantize(net(), 16, dynamic=True)


def test_dynamic_quantization_has_any_width_and_is_measured_on_data() -> None:
    report = quantize(net(), 4, dynamic=True, data=DATA, only=["*"]).report
    (said,) = {row.activation for row in report.quantized}
    assert said == "dynamic 8-bit asymmetric per-token inputs"
    assert report.output_sqnr_db is not None


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, -4, True])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ConfigurationError, match="bits is 2 to 8, or 16"):
        quantize(net(), bits)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no groups"):
        quantize(net(), 4, granularity="channel", group_size=64)
    with pytest.raises(ConfigurationError, match=r"bits\(16\) is a cast"):
        quantize(net(), 16, symmetric=True)
    with pytest.raises(ConfigurationError, match="granularity is 'tensor', 'channel', 'group'"):
        quantize(net(), 4, granularity="row")
    with pytest.raises(ConfigurationError, match="matches no layer"):
        quantize(net(), skip=["head"])


@pytest.mark.parametrize(
    "model", [3, None, [net()], noise(3)], ids=lambda model: type(model).__name__
)
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(InputError, match="is no model"):
        quantize(model)  # type: ignore[call-overload]  # the point


def test_a_state_dict_and_a_path_are_models_too(tmp_path: Path) -> None:
    source = net()
    path = tmp_path / "float.pt"
    torch.save(source.state_dict(), path)
    results = [quantize(source.state_dict(), 4), quantize(path, 4), quantize(str(path), 4)]
    for result in results:
        assert same_tensors(result.model, results[0].model)
        assert len(result.report.quantized) == 2


def test_a_missing_path_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        quantize(tmp_path / "nothing.pt")


def test_dequantize_model_is_the_results_dequantize() -> None:
    result = quantize(net(), 4)
    floats = dequantize_model(result.model)
    assert same_tensors(floats, result.dequantize())
    assert type(floats[0]) is nn.Linear
    assert type(result.model[0]) is not nn.Linear


def test_dequantize_model_refuses_a_float_model() -> None:
    with pytest.raises(InputError, match="Sequential has no quantized layer"):
        dequantize_model(net())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_the_round_trip_of_the_functions(suffix: str, tmp_path: Path) -> None:
    result = quantize(net(), 4)
    path = save_model(result.model, str(tmp_path / f"model{suffix}"))
    assert path == tmp_path / f"model{suffix}"
    loaded = load_model(path, net)
    assert_same(loaded, result.model)
    assert same_bits(loaded(DATA), result.model(DATA))
    assert validate_quantization(loaded, DATA)
    assert validate_quantization(loaded).status == "reloaded, not run"


def test_an_example_may_be_a_tuple_of_arguments() -> None:
    assert validate_quantization(quantize(net()).model, (DATA, torch.arange(5)))


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("minmax", {}, MinMax()),
        ("mse", {}, MSE()),
        ("mse", {"steps": 100}, MSE(steps=100)),
        ("mse", {"steps": 20, "smallest": 0.5}, MSE(steps=20, smallest=0.5)),
        ("movingaverage", {"momentum": 0.1}, MovingAverage(0.1)),
        ("histogram", {"bins": 4096}, Histogram(4096)),
        ("percentile", {"p": 99.9}, Percentile(99.9)),
        ("entropy", {"bins": 1024}, Entropy(1024)),
        ("auto", {}, Auto()),
    ],
)
def test_an_observer_is_created_by_its_name(
    name: str, parameters: dict[str, float], expected: RangeEstimator
) -> None:
    assert create_observer(name, **parameters) == expected


def test_the_type_of_an_observer_is_known_by_its_name() -> None:
    """Checked by mypy: each has a field or method of its own."""
    assert create_observer("movingaverage", momentum=0.5).momentum == 0.5
    assert create_observer("histogram").bins == 2048
    assert create_observer("percentile").p == 99.99
    assert create_observer("mse", steps=9).smallest == 0.4
    assert create_observer("entropy").bins == 2048
    auto = create_observer("auto")
    assert auto.explain(auto.observe(noise(99)), Affine())


def test_an_unknown_observer_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigurationError, match=r"no observer 'minimax'; there is .*minmax, movingaverage, mse"
    ):
        create_observer("minimax")


def test_what_is_no_observer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'affine' is a Affine, which is no observer"):
        create_observer("affine")


def test_parameters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="MSE has no field bins; it has"):
        create_observer("mse", bins=1024)
    with pytest.raises(ConfigurationError, match="2 steps or more"):
        create_observer("mse", steps=1)


def test_an_observer_that_was_registered_is_created_and_used() -> None:
    @register
    @attrs.frozen
    class Half(RangeEstimator):
        kind: ClassVar[str] = "tests.half"
        share: float = 0.5

        def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
            low, high = MinMax().range_of(x, scheme, block_size)
            return low * self.share, high * self.share

    assert create_observer("tests.half", share=0.25) == Half(0.25)
    source = net()
    result = quantize(source, 8, observer="tests.half")
    full = quantize(source, 8)
    assert result.report.mean_sqnr_db is not None
    assert full.report.mean_sqnr_db is not None
    assert result.report.mean_sqnr_db < full.report.mean_sqnr_db


def test_static_quantization_without_data_is_refused() -> None:
    with pytest.raises(InputError, match="static_quantize calibrates on data, and None was given"):
        static_quantize(net(), None)


def test_a_float_model_is_neither_validated_nor_saved_as_a_quantized_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Sequential has no quantized layer"):
        validate_quantization(net(), DATA)
    with pytest.raises(InputError, match="Sequential has no quantized layer"):
        save_model(net(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_frozen_parameters_are_frozen_again_when_dequantized() -> None:
    source = net()
    source.get_parameter("0.weight").requires_grad_(False)
    source.get_parameter("2.bias").requires_grad_(False)
    floats = quantize(source).dequantize()
    assert {name: one.requires_grad for name, one in floats.named_parameters()} == {
        name: one.requires_grad for name, one in source.named_parameters()
    }


@pytest.mark.parametrize("name", ["p.type", "m.half", "training", "forward"])
def test_a_tensor_named_as_an_attribute_of_modules_is_refused_by_name(name: str) -> None:
    with pytest.raises(MonoQuantError, match=name.rpartition(".")[2]):
        quantize({"l.weight": noise(64, 64), name: noise(7)})


@pytest.mark.parametrize("name", ["l", "l.a", ".".join("a" * 2000), "..", ""])
@pytest.mark.parametrize("last", [True, False])
def test_a_name_that_no_module_can_have_is_refused(name: str, last: bool) -> None:
    others = {"l.weight": noise(64, 64), "l.a.weight": noise(64, 64)}
    odd = {name: noise(7)}
    with pytest.raises(InputError, match="state dict"):
        quantize({**others, **odd} if last else {**odd, **others})


@pytest.mark.parametrize("name", ["l.quantized.scale", "l.quantized", "quantized"])
def test_a_tensor_that_is_called_quantized_is_not_lost(name: str, tmp_path: Path) -> None:
    state = {"l.weight": noise(64, 64), name: noise(7)}
    result = quantize(state)
    loaded = load_model(save_model(result.model, tmp_path / "model.safetensors"))
    found = loaded[name]
    assert isinstance(found, Tensor)
    assert same_bits(found, state[name])
