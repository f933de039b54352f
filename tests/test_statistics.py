"""What calibration gathered is kept, and serves later runs as the data would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

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
    FormatVersionError,
    Histogram,
    ImportanceWeighted,
    InputError,
    LearnedRounding,
    MinMax,
    MovingAverage,
    Percentile,
    QTensor,
    Quantizer,
    Rotate,
    Rounding,
    Statistic,
    Statistics,
    UnknownKindError,
)
from mono_quant.base import Grid
from mono_quant.serializers import (
    checksum,
    read_safetensors,
    read_texts,
    seal,
    write_safetensors,
)
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
    "turned": EIGHT.transform(Rotate()).observer(activations=MinMax()),
    "folded and turned": EIGHT.transform(Rotate()).fold().bits(4).rounding(GPTQ()),
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


class Untraceable(nn.Module):
    """A model that only data shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x if float(x.sum()) < 1e9 else -x)
        return found


@pytest.mark.parametrize("saved", [False, True])
def test_those_of_layers_that_only_the_data_had_turned_are_refused(
    saved: bool, tmp_path: Path
) -> None:
    turning, x = EIGHT.transform(Rotate()), torch.randn(8, 64)
    known = turning.fit(x).plan(Untraceable()).calibrate(progress=False)
    assert known.turned == ("inner",)
    if saved:
        known = CalibrationStatistics.load(known.save(tmp_path / "known.safetensors"))
    with pytest.raises(
        CalibrationError, match="the inputs of 'inner' are turned in that run alone"
    ):
        turning.statistics(known).apply(Untraceable(), progress=False)
    assert turning.statistics(known).fit(x).apply(Untraceable(), progress=False).validate()


def test_that_a_normalization_was_folded_changes_no_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)).eval()
    known = EIGHT.fit(torch.randn(8, 64)).plan(model).calibrate(progress=False)
    without = EIGHT.statistics(known).apply(model, progress=False)
    assert isinstance(without.model[1], nn.BatchNorm1d)  # no data shows that it sees [N, C]
    assert without.validate(torch.randn(8, 64))


@pytest.mark.parametrize("turned", [[1], [{"op": "rotate"}], 3])
def test_names_that_are_none_are_refused(turned: object, tmp_path: Path) -> None:
    model = Perceptron()
    known = EIGHT.fit(model.example()).plan(model).calibrate(progress=False)
    path = known.save(tmp_path / "known.safetensors")
    texts = read_texts(path)
    header = {**json.loads(texts["header"]), "turned": turned}
    sealed = seal("mono_quant_statistics", 1, header)
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
    write_safetensors(path, tensors, {"mono_quant": json.dumps(sealed)})
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        CalibrationStatistics.load(path)


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


Header = dict[str, Any]  # JSON, which edits change whatever it is
Edit = Callable[[Header, dict[str, Tensor]], object]


def forge(path: Path, edit: Edit, version: int = 1) -> None:
    """Change what a file of statistics says, so that all of its checksums are right."""
    header: Header = json.loads(read_texts(path)["header"])
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
    edit(header, tensors)
    if "checksums" in header:
        header["checksums"] = {key: checksum(tensor) for key, tensor in tensors.items()}
    texts = seal("mono_quant_statistics", version, header)
    write_safetensors(path, tensors, {"mono_quant": json.dumps(texts)})


def state_in(header: Header, place: int = 0, of: str = "inputs") -> Header:
    """Return what a header says of the first state of a weight, to be changed."""
    found: Header = header["weights"][place][of][0]["state"]["fields"]
    return found


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda header, _: header.pop("weights"), "cannot be read: KeyError"),
        (lambda header, _: header.pop("checksums"), "cannot be read: KeyError"),
        (lambda header, _: header.update(weights=3), "cannot be read: TypeError"),
        (lambda header, _: header.update(transforms=[3]), "cannot be read: TypeError"),
        (
            lambda header, _: header["weights"][0]["inputs"][0]["statistic"].update(
                kind="os.system"
            ),
            "no class of kind 'os.system' is known",
        ),
        (
            lambda header, _: state_in(header).update(lowest=state_in(header).pop("low")),
            "a MinMaxState has no",
        ),
        (lambda header, _: state_in(header).update(low={"value": 3}), "cannot be read: KeyError"),
        (lambda _, tensors: tensors["0"].fill_(torch.inf), "the tensor holds infinity"),
        (lambda _, tensors: tensors["0"].fill_(99.0), "smallest value is 99, above the largest"),
        (
            lambda _, tensors: tensors.update({"0": tensors["0"].expand(2).clone()}),
            "torch.float32 of 1 dimensions, where torch.float32 of 0",
        ),
    ],
    ids=[
        "missing",
        "unchecked",
        "type",
        "transform",
        "kind",
        "field",
        "value",
        "infinite",
        "turned",
        "dimension",
    ],
)
def test_what_was_forged_is_refused(edit: Edit, words: str, tmp_path: Path) -> None:
    model, path = Perceptron(), tmp_path / "known.safetensors"
    quantizer = EIGHT.observer(activations=MinMax())
    quantizer.fit(model.example()).plan(model).calibrate(progress=False).save(path)
    forge(path, edit)
    with pytest.raises(CheckpointError, match=words):
        CalibrationStatistics.load(path)


def test_another_version_is_refused(path: Path) -> None:
    forge(path, lambda header, _: header, version=2)
    with pytest.raises(FormatVersionError, match=r"has format version 2, and this .* up to 1"):
        CalibrationStatistics.load(path)


def test_a_letter_or_a_tensor_that_was_changed_is_noticed(path: Path) -> None:
    texts, tensors = read_texts(path), read_safetensors(path)
    other = {**texts, "header": texts["header"].replace('"layer": "0"', '"layer": "4"')}
    write_safetensors(path, tensors, {"mono_quant": json.dumps(other)})
    with pytest.raises(CorruptCheckpointError, match="its header was changed"):
        CalibrationStatistics.load(path)
    one, *_ = tensors
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[one] += 1
    write_safetensors(path, tensors, {"mono_quant": json.dumps(texts)})
    with pytest.raises(CorruptCheckpointError, match="a tensor was changed"):
        CalibrationStatistics.load(path)


def first_of(tensors: dict[str, Tensor], dimensions: int, dtype: torch.dtype) -> str:
    """Return the key of the first tensor of a kind."""
    return next(
        key for key, one in tensors.items() if (one.dim(), one.dtype) == (dimensions, dtype)
    )


COUNTS = (1, torch.int64)
GRAM = (3, torch.float32)


@pytest.mark.parametrize(
    ("quantizer", "which", "edit", "words"),
    [
        (EIGHT, COUNTS, lambda x: x[:-1], r"a histogram has \d+ bins of 2\^-?\d+, where"),
        (EIGHT, COUNTS, lambda x: x.repeat(2), r"a histogram has \d+ bins of 2\^-?\d+, where"),
        (EIGHT, COUNTS, lambda x: -x - 1, "no numbers of values"),
        (EIGHT, COUNTS, lambda x: x + (1 << 62), "no numbers of values"),
        (
            EIGHT.bits(4).rounding(GPTQ()),
            GRAM,
            lambda x: x[:, :-1],
            r"second moments are \(1, 63, 64\), where \(1, 64, 64\)",
        ),
    ],
    ids=["fewer", "more", "negative", "too many", "no square"],
)
def test_a_tensor_of_another_length_than_its_statistic_makes_is_refused_when_it_is_read(
    quantizer: Quantizer,
    which: tuple[int, torch.dtype],
    edit: Callable[[Tensor], Tensor],
    words: str,
    tmp_path: Path,
) -> None:
    model, path = Perceptron(), tmp_path / "known.safetensors"
    if which is COUNTS:
        quantizer = quantizer.observer(activations=Histogram(bins=64))
    quantizer.fit(model.example()).plan(model).calibrate(progress=False).save(path)

    def change(_: Header, tensors: dict[str, Tensor]) -> None:
        key = first_of(tensors, *which)
        tensors[key] = edit(tensors[key]).contiguous()

    forge(path, change)
    with pytest.raises(CorruptCheckpointError, match=words):
        CalibrationStatistics.load(path)


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [
        (Quantizer().rounding(GPTQ()), r"second moments are \(1, 5, 5\), where \(1, 64, 64\)"),
        (Quantizer().rounding(ImportanceWeighted()), r"mean squares are \(1, 5\), where \(1, 64\)"),
        (Quantizer().outliers(), "there are 5 peaks of inputs for 64 columns"),
    ],
    ids=["gptq", "importance", "outliers"],
)
def test_statistics_of_rows_of_another_width_than_the_weight_are_refused_by_the_plan(
    quantizer: Quantizer, words: str, tmp_path: Path
) -> None:
    class Narrow(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64))

    narrow, quantizer = Narrow(), quantizer.bits(4).activations(None).only("0")
    known = quantizer.fit(torch.ones(4, 5)).plan(narrow).calibrate(progress=False)
    path = known.save(tmp_path / "known.safetensors")
    with pytest.raises(CalibrationError, match=f"not of the inputs of 0.weight: .*{words}"):
        quantizer.statistics(path).plan(Perceptron())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["minmax", "moving average", "histogram", "gptq", "outliers"])
def test_statistics_of_a_model_of_another_precision_are_read_again(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, quantizer = Perceptron().to(dtype), QUANTIZERS[name]
    data = quantizer.fit(model.example().to(dtype))
    path = data.plan(model).calibrate(progress=False).save(tmp_path / "known.safetensors")
    by_file = quantizer.statistics(path).apply(model, progress=False)
    by_data = data.plan(model).run(sequential=False, progress=False)
    assert same_tensors(by_file.model, by_data.model)


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
