"""What is seen of inputs: outlier channels, and what ranges cut off, stretch over or never met."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    Activations,
    Affine,
    Auto,
    InputReport,
    MinMax,
    OutlierColumns,
    Percentile,
    QuantizationResult,
    QuantizedModule,
    Quantizer,
)
from mono_quant.layers import BUILT_IN_LAYERS
from mono_quant.plan.inputs import Channels
from tests.helpers import noise

STATIC = Quantizer().activations("static")
DYNAMIC = Quantizer().activations("dynamic")


def linear(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32)).eval()


def seen(result: QuantizationResult[nn.Sequential]) -> InputReport:
    (row,) = result.report.quantized
    (found,) = row.inputs
    return found


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return x on an asymmetric grid of 8 bits, in float64."""
    codes = (x.double() / scale.double() + zero_point.double()).round().clamp(0, 255)
    return (codes - zero_point.double()) * scale.double()


def calibrated(result: QuantizationResult[nn.Sequential]) -> tuple[Tensor, Tensor]:
    layer = result.model[0]
    assert isinstance(layer, QuantizedModule)
    activation = layer.activations()["weight"]
    assert activation.scale is not None
    assert activation.zero_point is not None
    return activation.scale, activation.zero_point


def decibels(more: Tensor, less: Tensor) -> float:
    return 10 * math.log10(float(more.square().sum()) / float(less.square().sum()))


def uniform() -> Tensor:
    return linear()[0].get_parameter("weight").detach()[None]


def stretched() -> Tensor:
    """Return tokens one of which is a hundred times as large."""
    x = noise(64, 64)
    x[7] *= 100
    return x


# --- the figures -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [256, 64])
def test_what_a_range_cuts_off_is_counted_exactly(batch: int) -> None:
    x = noise(256, 1024)  # more than is sampled
    batches = list(torch.split(x, batch))
    result = (
        STATIC.observer(activations=Percentile(99)).fit(batches, samples=256).apply(linear(1024))
    )
    scale, zero_point = (float(one) for one in calibrated(result))
    low, high = -zero_point * scale, (255 - zero_point) * scale
    beyond = (x.double() < low - scale / 2) | (x.double() > high + scale / 2)
    lost = (x.double() - x.double().clamp(low, high))[beyond]
    found = seen(result)
    assert found.cut == int(beyond.sum()) / x.numel()
    energy = float(lost.square().sum() / x.double().square().sum())
    assert found.cut_energy == pytest.approx(energy, rel=1e-6)
    assert found.cut == pytest.approx(0.02, rel=0.2)
    assert (found.low, found.high) == (float(x.min()), float(x.max()))


def test_the_whole_range_is_as_much_better_as_is_said() -> None:
    x = noise(512, 64)
    cut, whole = (
        STATIC.observer(activations=one).fit(x).apply(linear())
        for one in (Percentile(99), MinMax())
    )
    found = seen(cut)
    assert found.uncut_gain_db is not None
    errors = [on_grid(x, *calibrated(one)) - x.double() for one in (cut, whole)]
    assert found.uncut_gain_db == pytest.approx(decibels(*errors), abs=1.0), "but for rounding"
    assert seen(whole).cut == 0
    assert seen(whole).uncut_gain_db is None


def test_ranges_for_tokens_are_as_much_better_as_is_said() -> None:
    x = stretched()
    result = STATIC.fit(x).apply(linear())
    low, high = x.double().amin(1, keepdim=True), x.double().amax(1, keepdim=True)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 255
    zero_point = (-low.clamp(max=0) / scale).round()
    errors = [on_grid(x, *grid) - x.double() for grid in (calibrated(result), (scale, zero_point))]
    gains = [decibels(*rows) for rows in zip(*errors, strict=True)]
    gain = sum(gains) / len(gains)
    assert gain > 30
    assert seen(result).per_token_gain_db == pytest.approx(gain, abs=0.05)
    assert seen(DYNAMIC.fit(x).apply(linear())).per_token_gain_db is None, "it has them"
    whole = DYNAMIC.activations("dynamic", granularity="tensor").fit(x).apply(linear())
    assert seen(whole).per_token_gain_db == pytest.approx(gain, abs=0.05)


def test_values_on_two_codes_are_counted_zeros_apart() -> None:
    x = stretched().relu()
    result = STATIC.fit(x).apply(linear())
    scale, _ = calibrated(result)
    codes = (x[x != 0].double() / scale.double()).round().clamp(0, 255).long()
    two = codes.bincount().sort(descending=True).values[:2].sum()
    assert seen(result).crowded == pytest.approx(int(two) / codes.numel(), abs=1e-3)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (16,)])
def test_channels_are_those_of_float64(shape: tuple[int, ...]) -> None:
    x = noise(*shape).double()
    found = Channels.of(x.float(), -1)
    torch.testing.assert_close(found.peaks, x.float().reshape(-1, 16).abs().amax(0).double())
    torch.testing.assert_close(found.squares, x.float().double().reshape(-1, 16).square().sum(0))


def test_channels_of_parts_add_up_to_those_of_the_whole() -> None:
    x = noise(8, 12, 5)
    whole, parts = Channels.of(x, -2), [Channels.of(part, -2) for part in torch.split(x, 3)]
    added = parts[0] + parts[1] + parts[2]
    assert torch.equal(added.peaks, whole.peaks)
    torch.testing.assert_close(added.squares, whole.squares)


@pytest.mark.parametrize(
    ("layer", "x", "dim"),
    [
        (nn.Linear(16, 16), noise(32, 16), -1),
        (nn.Conv1d(16, 16, 3), noise(4, 16, 9), 1),
        (nn.Conv2d(16, 16, 3, groups=16), noise(4, 16, 9, 9), 1),
        (nn.Conv2d(16, 16, 3), noise(16, 9, 9), 0),
        (nn.ConvTranspose2d(16, 16, 3), noise(4, 16, 9, 9), 1),
        (nn.GRU(16, 16), noise(7, 2, 16), -1),
        (nn.MultiheadAttention(16, 2), noise(7, 2, 16), -1),
    ],
    ids=["Linear", "Conv1d", "depthwise", "unbatched", "ConvTranspose2d", "GRU", "attention"],
)
@torch.no_grad()
def test_every_kind_of_layer_knows_its_channels(layer: nn.Module, x: Tensor, dim: int) -> None:
    x.select(dim, 3).mul_(1000)
    maker = next(one for one in BUILT_IN_LAYERS if one.matches(layer))
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    name, found = next(iter(maker.inputs(layer, args, {})))
    told = maker.channel_dim(layer, name)
    assert told is not None
    assert found.shape[told] == 16
    assert int(Channels.of(found, told).peaks.argmax()) == 3


def test_a_channel_that_dwarfs_the_others_is_seen_in_every_mode() -> None:
    x = noise(512, 64)
    x[:, 9] *= 50
    sizes = x.double().square().mean(0).sqrt()
    peaks = x.double().abs().amax(0)
    expected = max(float(one.max() / one.median()) for one in (sizes, peaks))
    for quantizer in (STATIC, DYNAMIC):
        assert seen(quantizer.fit(x).apply(linear())).outliers == pytest.approx(expected)
    few = nn.Sequential(nn.Linear(4, 32)).eval()
    assert seen(STATIC.fit(noise(32, 4)).apply(few)).outliers is None, "too few to tell"


def test_tied_weights_have_evidence_of_their_own() -> None:
    one, two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    two.weight = one.weight
    model = nn.Sequential(one, nn.ReLU(), two).eval()
    (row,) = STATIC.fit(noise(16, 32)).apply(model).report.quantized
    assert [found.name for found in row.inputs] == ["0.weight", "2.weight"]
    assert row.inputs[0].low < 0 <= row.inputs[1].low


def test_nothing_is_said_of_float_inputs_nor_where_layers_are_not_measured() -> None:
    x = noise(16, 64)
    assert not Quantizer().activations(None).fit(x).apply(linear()).report.quantized[0].inputs
    assert not DYNAMIC.apply(linear()).report.quantized[0].inputs
    assert not STATIC.fit(x).apply_(linear()).report.quantized[0].inputs


def test_the_evidence_is_in_the_json() -> None:
    (row,) = json.loads(STATIC.fit(noise(16, 64)).apply(linear()).report.to_json())["layers"][:1]
    assert row["inputs"][0]["name"] == "0.weight"
    assert row["inputs"][0]["cut"] == 0
    assert row["columns"] == 64


# --- the warnings ------------------------------------------------------------------------------


def lines(quantizer: Quantizer, model: nn.Module, x: Tensor, word: str) -> list[str]:
    return [one for one in quantizer.fit(x).apply(model).report.warnings if word in one]


def output_db(quantizer: Quantizer, model: nn.Module, x: Tensor) -> float:
    found = quantizer.fit(x).apply(model).report.output_sqnr_db
    assert found is not None
    return found


def test_a_range_that_cuts_off_much_is_warned_of_and_the_advice_helps() -> None:
    model, x = linear(), noise(512, 64)
    cutting = STATIC.observer(activations=Percentile(95))
    (line,) = lines(cutting, model, x, "cuts off")
    assert "the inputs of 0.weight cuts off 9.9% of the values" in line
    assert "override('0.weight', activation_observer=MinMax())" in line
    mended = cutting.override("0.weight", activation_observer=MinMax())
    assert output_db(mended, model, x) > output_db(cutting, model, x) + 10
    assert not lines(mended, model, x, "cuts off")


def test_a_range_that_a_token_stretches_is_warned_of_and_the_advice_helps() -> None:
    model, x = linear(), stretched()
    x[7] *= 100
    (line,) = lines(STATIC, model, x, "the inputs of 0.weight")
    assert "lie on two codes" in line
    assert "override('0.weight', activations=\"dynamic\")" in line
    mended = STATIC.override("0.weight", activations="dynamic")
    assert not lines(mended, model, x, "the inputs of")
    rest = x[8:]  # what the large token hides in the sum over all

    @torch.no_grad()
    def error(quantizer: Quantizer) -> float:
        quantized = quantizer.fit(x).apply(model).model
        return float((quantized(rest) - model(rest)).square().sum())

    assert error(mended) < error(STATIC) / 100


def test_a_channel_that_stretches_every_token_is_warned_of_and_the_advice_helps() -> None:
    model, x = linear(), noise(512, 64)
    x[:, 9] += 300
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 9] = 0
    (line,) = lines(DYNAMIC, model, x, "have a channel")
    call = "override('0.weight', outliers=OutlierColumns(), activations=\"dynamic\")"
    assert line.endswith(f"a few columns in float16 leave their inputs in float: {call}")
    mended = DYNAMIC.override("0.weight", outliers=OutlierColumns(), activations="dynamic")
    assert output_db(mended, model, x) > output_db(DYNAMIC, model, x) + 10
    assert not lines(mended, model, x, "have a channel")


def test_what_does_no_harm_is_not_warned_of() -> None:
    model, x = linear(), noise(512, 64)
    x[:, 9] *= 50
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 9] *= 20
    result = STATIC.fit(x).apply(model)
    (found,) = result.report.quantized[0].inputs
    assert found.outliers is not None
    assert found.outliers > 20
    assert result.report.quantized[0].output_sqnr_db is not None
    assert result.report.quantized[0].output_sqnr_db > 30
    assert not any("inputs of" in one for one in result.report.warnings)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_inputs_that_never_move_are_warned_of(value: float) -> None:
    x = torch.full((8, 64), value)
    (line,) = lines(STATIC, linear(), x, "is a point")
    assert f"the inputs of 0.weight were {value:g} all over the data" in line
    assert not lines(DYNAMIC, linear(), x, "is a point"), "it has no range to keep"


def test_three_of_a_kind_are_shown_and_the_rest_is_counted() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5))).eval()
    found = lines(STATIC, model, torch.zeros(8, 64), "inputs")
    assert len([one for one in found if "is a point" in one]) == 3
    assert "2 more inputs did not move" in found


def test_rows_that_dwarf_the_others_are_warned_of_where_they_share_a_scale() -> None:
    model = linear()
    with torch.no_grad():
        model[0].get_parameter("weight")[5] *= 40
    by_tensor = Quantizer().activations(None).granularity("tensor")
    report = by_tensor.apply(model).report
    (row,) = report.quantized
    assert row.row_outliers == pytest.approx(40, rel=0.2)
    (line,) = [one for one in report.warnings if "has rows" in one]
    assert "override('0.weight', granularity=\"channel\")" in line
    mended = by_tensor.override("0.weight", granularity="channel").apply(model).report
    assert not any("has rows" in one for one in mended.warnings)
    better, worse = mended.quantized[0].sqnr_db, row.sqnr_db
    assert better is not None
    assert worse is not None
    assert better > worse


@pytest.mark.parametrize(("width", "call"), [(48, "group_size=16"), (60, "bits=16")])
def test_groups_are_advised_that_divide_the_rows(width: int, call: str) -> None:
    model = linear(width)
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 5] *= 40
    (line,) = [one for one in Quantizer().apply(model).report.warnings if "columns" in one]
    assert line.endswith(f"override('0.weight', {call})")
    cast = Quantizer().bits(16).apply(model).report.warnings
    assert not any("columns" in one for one in cast), "a cast has no scales to share"


# --- why a range was chosen --------------------------------------------------------------------


def test_auto_says_in_the_report_why_it_chose_each_range() -> None:
    x = noise(256, 64)
    x[0, 0] = 80.0
    model = linear()
    (row,) = STATIC.observer("auto").fit(x).apply(model).report.quantized
    weight, inputs = row.ranges
    scheme = Activations("static").scheme
    assert inputs == f"input range by {Auto().explain(Auto().observe(x), scheme)}"
    assert "heavy tails" in inputs
    assert weight.startswith("weight range by mse: values of both signs, light tails")
    assert weight in row.fate
    assert inputs in row.fate
    assert row.note is None, "a note would be a warning"
    assert not STATIC.fit(x).apply(model).report.quantized[0].ranges, "there was no choice"


@pytest.mark.parametrize(("values", "name"), [(uniform(), "mse"), (None, "minmax")])
def test_auto_says_of_a_weight_what_clipping_gains(values: Tensor | None, name: str) -> None:
    spread = torch.linspace(-127, 127, 255).repeat(4).reshape(1, 4, 255)  # lies on the grid
    x = values if values is not None else spread
    scheme = Affine(8)
    chosen, whole = (scheme.choose_qparams(x, one) for one in (Auto(), MinMax()))
    errors = [scheme.fake_quantize(x, one).double() - x.double() for one in (whole, chosen)]
    found = Auto().remark(x, scheme, chosen)
    assert found is not None
    assert found.startswith(f"{name}: values of both signs")
    if name == "mse":
        assert found.endswith(f"clipping gains {decibels(*errors):.2f} dB over min-max")
    else:
        assert found.endswith("clipping gains 0.05 dB at most")
