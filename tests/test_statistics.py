"""What calibration gathered is kept, and serves later runs as the data would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    AWQ,
    GPTQ,
    CalibrationError,
    CalibrationStatistics,
    CheckpointError,
    ConfigurationError,
    CorruptCheckpointError,
    Entropy,
    EqualizeLayers,
    Histogram,
    InputError,
    LearnedRounding,
    MinMax,
    MovingAverage,
    Percentile,
    QTensor,
    Quantizer,
    Rounding,
    Statistic,
    Statistics,
    UnknownKindError,
)
from mono_quant.base import Grid
from mono_quant.serializers import read_safetensors, read_texts, write_safetensors
from mono_quant.testing.models import Convolutions, Perceptron
from tests.helpers import same_tensors

EIGHT = Quantizer().only("*")
QUANTIZERS = {
    "minmax": EIGHT.observer(activations=MinMax()),
    "moving average": EIGHT.observer(activations=MovingAverage(0.2)),
    "histogram": EIGHT.observer(activations=Histogram(bins=64)),
    "percentile": EIGHT.observer(activations=Percentile(99.0)),
    "entropy": EIGHT.observer(activations=Entropy(bins=300)),
    "gptq": EIGHT.bits(4).rounding(GPTQ()),
    "outliers": EIGHT.bits(4).outliers(),
    "equalized": EIGHT.transform(EqualizeLayers()),
}


def batches(model: Perceptron | Convolutions) -> list[Tensor]:
    x = model.example()
    return [x, 2 * x, x - 0.5]


@pytest.mark.parametrize("make", [Perceptron, Convolutions])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_file_of_them_makes_what_the_data_makes(
    name: str, make: Callable[[], Perceptron | Convolutions], tmp_path: Path
) -> None:
    model, quantizer = make(), QUANTIZERS[name]
    data = quantizer.fit(batches(model))
    path = data.plan(model).calibrate(progress=False).save(tmp_path / "known.safetensors")
    by_data = data.plan(model).run(sequential=False, progress=False)
    for known in (path, str(path), CalibrationStatistics.load(path)):
        by_file = quantizer.statistics(known).apply(make(), progress=False)
        assert same_tensors(by_file.model, by_data.model)


def test_they_serve_another_width(tmp_path: Path) -> None:
    model = Perceptron()
    known = EIGHT.fit(batches(model)).plan(model).calibrate(progress=False)
    six = EIGHT.activations("static", bits=6)
    one = six.statistics(known).apply(model, progress=False)
    other = six.fit(batches(model)).apply(model, progress=False)
    assert same_tensors(one.model, other.model)


def test_data_beside_them_is_measured_on_alone() -> None:
    model = Perceptron()
    known = EIGHT.fit(model.example()).plan(model).calibrate(progress=False)
    both = EIGHT.statistics(known).fit(9 * model.example()).apply(model, progress=False)
    assert same_tensors(both.model, EIGHT.statistics(known).apply(model, progress=False).model)
    assert both.report.output_sqnr_db is not None


def test_what_the_float_model_shows_is_said_of_roundings_that_want_more() -> None:
    model = Perceptron()
    for rounding, words in (
        (GPTQ(), "GPTQ sees the inputs that the float model makes"),
        (LearnedRounding(), "0.weight is rounded apart from its block: statistics were given"),
    ):
        quantizer = EIGHT.bits(4).rounding(rounding)
        known = quantizer.fit(model.example()).plan(model).calibrate(progress=False)
        result = quantizer.statistics(known).apply(model, progress=False)
        assert words in str(result.report)


def test_inputs_that_no_data_reached_are_known_to_be_unknown(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.used(x)
            return found

    model = Idle()
    known = Quantizer().fit(torch.randn(4, 64)).plan(model).calibrate(progress=False)
    loaded = CalibrationStatistics.load(known.save(tmp_path / "known.safetensors"))
    assert set(loaded.weights) == {("used", "weight"), ("unused", "weight")}
    result = Quantizer().statistics(loaded).apply(model, progress=False)
    (row,) = (row for row in result.report.layers if row.name == "unused.weight")
    assert "no data reached it" in row.fate


def test_what_they_lack_is_named_with_the_layers() -> None:
    model = Perceptron()
    known = Quantizer().only("0").fit(model.example()).plan(model).calibrate(progress=False)
    with pytest.raises(CalibrationError, match=r"have no MinMax\(\) of the inputs of 2, 4; gather"):
        EIGHT.observer(activations=MinMax()).statistics(known).plan(model)
    with pytest.raises(CalibrationError, match=r"have no Hessian\(\) of the inputs of 0, 2, 4"):
        EIGHT.bits(4).rounding(GPTQ()).statistics(known).plan(model)


def test_those_of_a_model_that_was_changed_otherwise_are_refused() -> None:
    model = Perceptron()
    known = EIGHT.fit(model.example()).plan(model).calibrate(progress=False)
    with pytest.raises(CalibrationError, match=r"after fold_batch_norm was .* equalize_layers"):
        EIGHT.transform(EqualizeLayers()).statistics(known).plan(model)


def test_where_they_cannot_serve_they_are_refused() -> None:
    model = Perceptron()
    known = EIGHT.fit(model.example()).plan(model).calibrate(progress=False)
    with pytest.raises(CalibrationError, match=r"AWQ.* needs data"):
        EIGHT.bits(4).transform(AWQ()).statistics(known).plan(model)
    with pytest.raises(CalibrationError, match="sequential=True asks for those that quantized"):
        EIGHT.statistics(known).fit(model.example()).plan(model).run(sequential=True)
    with pytest.raises(ConfigurationError, match=r"leave statistics\(...\) or graph\(\) out"):
        EIGHT.statistics(known).fit(model.example()).graph().plan(model)
    with pytest.raises(InputError, match="give the model"):
        EIGHT.statistics(known).plan(model.state_dict())
    with pytest.raises(CalibrationError, match=r"calibrated on data; give some with fit"):
        Quantizer().plan(model).calibrate()


def test_a_quantizer_shows_that_it_has_them() -> None:
    model = Perceptron()
    known = EIGHT.fit(model.example()).plan(model).calibrate(progress=False)
    assert repr(EIGHT.statistics(known)).endswith(".statistics(<3 weights>)")
    assert EIGHT.statistics(known).to_config() == EIGHT.to_config()


@attrs.frozen
class Peak(Statistic[tuple[Tensor, int]]):
    """A statistic of one's own, whose state is a tuple."""

    kind: ClassVar[str] = "tests.peak"

    def observe(self, x: Tensor) -> tuple[Tensor, int]:
        return x.abs().amax(0), len(x)

    def merge(self, left: tuple[Tensor, int], right: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return torch.maximum(left[0], right[0]), left[1] + right[1]


@attrs.frozen
class ByPeak(Rounding):
    """A rounding that asks for it."""

    kind: ClassVar[str] = "tests.by_peak"

    @property
    def needs(self) -> tuple[Peak]:
        return (Peak(),)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        peak, count = statistics.state(Peak())
        return grid.scheme.quantize(weight + 1e-3 * peak / count, grid.qparams(weight))


def test_a_statistic_of_ones_own_is_kept_and_named(tmp_path: Path) -> None:
    model, quantizer = Perceptron(), EIGHT.bits(4).rounding(ByPeak())
    data = quantizer.fit(batches(model))
    path = data.plan(model).calibrate(progress=False).save(tmp_path / "known.safetensors")
    with pytest.raises(UnknownKindError, match=r"tests\.peak"):
        quantizer.statistics(path)
    known = CalibrationStatistics.load(path, kinds={Peak.kind: Peak})
    by_file = quantizer.statistics(known).apply(model, progress=False)
    assert same_tensors(by_file.model, data.apply(model, progress=False).model)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = Perceptron()
    known = EIGHT.fit(model.example()).plan(model).calibrate(progress=False)
    return known.save(tmp_path / "known.safetensors")


def test_the_same_statistics_make_the_same_bytes(path: Path, tmp_path: Path) -> None:
    again = CalibrationStatistics.load(path).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_another_suffix_and_another_file_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"call it \.safetensors"):
        CalibrationStatistics.load(path).save(tmp_path / "known.pt")
    model = Quantizer().apply(Perceptron(), progress=False).save(tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match="holds no statistics"):
        Quantizer().statistics(model)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptCheckpointError):
        Quantizer().statistics(path)


Edit = Callable[[dict[str, str], dict[str, Tensor]], object]


def rest_of(texts: dict[str, str], key: str, value: object) -> None:
    texts[key] = json.dumps(value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda texts, tensors: tensors["0"].add_(1), "a tensor was changed"),
        (lambda texts, tensors: texts.update(version="2"), "is of version 2, not 1"),
        (lambda texts, tensors: texts.pop("weights"), "cannot be read: KeyError"),
        (lambda texts, tensors: texts.update(weights="3"), "cannot be read: TypeError"),
        (lambda texts, tensors: texts.update(weights="[" * 100_000), "cannot be read: Recursion"),
        (
            lambda texts, tensors: texts.update(
                weights=texts["weights"].replace('"kind": "minmax"', '"kind": "os.system"')
            ),
            "no class of kind 'os.system' is known",
        ),
        (
            lambda texts, tensors: texts.update(
                weights=texts["weights"].replace('"low"', '"lowest"')
            ),
            "a MinMaxState has no",
        ),
        (
            lambda texts, tensors: texts.update(
                weights=texts["weights"].replace('{"tensor": "0"}', '{"value": 3}')
            ),
            "cannot be read: KeyError",
        ),
    ],
    ids=["tensor", "version", "missing", "type", "nested", "kind", "field", "value"],
)
def test_what_was_forged_is_refused(edit: Edit, words: str, path: Path) -> None:
    model = Perceptron()
    quantizer = EIGHT.observer(activations=MinMax())
    quantizer.fit(model.example()).plan(model).calibrate(progress=False).save(path)
    texts = read_texts(path)
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
    edit(texts, tensors)
    write_safetensors(path, tensors, {"mono_quant": json.dumps(texts)})
    with pytest.raises(CheckpointError, match=words):
        CalibrationStatistics.load(path)


@attrs.frozen
class Odd(Statistic[object]):
    """A statistic whose state no file can hold."""

    kind: ClassVar[str] = "tests.odd"

    def observe(self, x: Tensor) -> object:
        return {"x": x}

    def merge(self, left: object, right: object) -> object:
        return left


@attrs.frozen
class ByOdd(ByPeak):
    kind: ClassVar[str] = "tests.by_odd"

    @property
    def needs(self):  # type: ignore[no-untyped-def]  # of another statistic than its parent's
        return (Odd(),)


def test_a_state_that_no_file_can_hold_is_refused_by_its_type(tmp_path: Path) -> None:
    model = Perceptron()
    plan = EIGHT.bits(4).rounding(ByOdd()).fit(model.example()).plan(model)
    with pytest.raises(CheckpointError, match="a state holds a dict, which files of statistics"):
        plan.calibrate(progress=False).save(tmp_path / "known.safetensors")
