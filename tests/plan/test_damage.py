"""Layers that quantizing destroys: found, explained, and kept away."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    ConfigurationError,
    DamageError,
    InputError,
    QuantizationResult,
    Quantizer,
    load_model,
)
from mono_quant.plan.weight_error import WeightError
from mono_quant.schemes import Affine
from tests.helpers import noise, sqnr64


class Uneven(nn.Module):
    """Reads loud inputs with faint weights and faint inputs with loud ones, as trained nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64)
        with torch.no_grad():
            self.mix.weight[:, 0] *= 3000

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.mix(x)))
        return found


def uneven() -> tuple[Uneven, Tensor]:
    torch.manual_seed(0)
    x = noise(32, 64)
    x[:, 0] *= 1e-5
    return Uneven().eval(), x


class Spiked(nn.Module):
    """Has an input that is ruined by a range of one scale: a channel dwarfs the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        with torch.no_grad():
            self.body.weight[:, 0] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def spiked() -> tuple[Spiked, Tensor]:
    torch.manual_seed(0)
    x = noise(32, 64)
    x[:, 0] *= 3000
    return Spiked().eval(), x


def warning(result: QuantizationResult[Uneven] | QuantizationResult[Spiked], name: str) -> str:
    (found,) = [line for line in result.report.warnings if f"{name} returns" in line]
    return found


def test_a_weight_that_destroys_its_layer_is_named_with_the_call_that_mends_it() -> None:
    model, x = uneven()
    result = Quantizer().activations("dynamic").fit([x]).apply(model)
    row = next(row for row in result.report.quantized if row.name == "mix.weight")
    assert row.sqnr_db is not None
    assert row.sqnr_db > 40, "the weight's own figure does not see it"
    assert row.output_sqnr_db is not None
    assert row.output_sqnr_db < 10
    line = warning(result, "mix")
    assert line.startswith("critical: ")
    assert "by mix.weight alone" in line
    assert "override('mix.weight', bits=16)" in line
    assert 'on_damage("keep")' in line
    assert "head" not in line


def test_the_output_of_a_layer_is_that_of_an_independent_computation() -> None:
    model, x = uneven()
    result = Quantizer().activations(None).fit([x]).apply(model)
    with torch.no_grad():
        expected = sqnr64([model.mix(x)], [result.model.mix(x)])
    row = next(row for row in result.report.quantized if row.name == "mix.weight")
    assert row.output_sqnr_db == pytest.approx(expected, abs=1e-3)


def test_keep_keeps_that_weight_at_16_bits_and_says_so(tmp_path: Path) -> None:
    model, x = uneven()
    result = Quantizer().activations("dynamic").fit([x]).on_damage("keep").apply(model)
    rows = {row.name: row for row in result.report.quantized}
    assert rows["mix.weight"].scheme == "float16"
    assert rows["mix.weight"].activation is None
    assert "kept at 16 bits, since its layer would return" in rows["mix.weight"].fate
    assert rows["head.weight"].scheme == "8-bit symmetric per-channel"
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db > 25
    assert not any("returns" in line for line in result.report.warnings)
    loaded = load_model(result.save(tmp_path / "model.safetensors"), Uneven())
    assert torch.equal(loaded(x), result.model(x))


def test_the_override_that_the_warning_names_does_the_same() -> None:
    model, x = uneven()
    base = Quantizer().activations("dynamic").fit([x])
    kept = base.on_damage("keep").apply(model).model
    said = base.override("mix.weight", bits=16).apply(model).model
    assert torch.equal(kept(x), said(x))


def test_inputs_that_destroy_a_layer_are_left_in_float() -> None:
    model, x = spiked()
    base = Quantizer().activations("static").fit([x])
    line = warning(base.apply(model), "body")
    assert "by the inputs of body.weight" in line
    assert "override('body.weight', activations=\"float\")" in line
    result = base.on_damage("keep").apply(model)
    (row,) = result.report.quantized
    assert row.scheme == "8-bit symmetric per-channel"
    assert row.activation is None
    assert "float inputs, since its layer would return" in row.fate


def test_an_error_is_raised_if_it_was_asked_for() -> None:
    model, x = uneven()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(DamageError, match="mix returns"):
        Quantizer().fit([x]).on_damage("error").apply(model)
    assert all(map(torch.equal, model.parameters(), before))
    sound = nn.Sequential(nn.Linear(64, 64)).eval()
    assert Quantizer().fit([noise(8, 64)]).on_damage("error").apply(sound).report.quantized


def test_in_place_keep_is_refused_before_anything_is_changed() -> None:
    model, x = uneven()
    with pytest.raises(InputError, match="use apply"):
        Quantizer().fit([x]).on_damage("keep").apply_(model)
    assert type(model.mix) is nn.Linear


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'warn', 'keep', 'error', not 'cry'"):
        Quantizer().on_damage("cry")


def test_the_estimate_in_place_does_not_ask_for_data_that_is_there() -> None:
    model, x = uneven()
    found = Quantizer().fit([x]).apply_(model).report.warnings
    (line,) = [one for one in found if "estimate" in one]
    assert "no layer was measured" in line
    assert "fit(data) has it measured" in line


def test_without_data_the_estimate_is_marked_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 0] *= 3000
    (line,) = [one for one in Quantizer().apply(model).report.warnings if "estimate" in one]
    assert "0.weight would leave" in line
    assert "no layer was measured" in line
    kept = Quantizer().on_damage("keep").apply(model).report
    assert [row.scheme for row in kept.quantized] == ["float16"]
    assert "is estimated to return" in kept.quantized[0].fate


def test_values_too_large_for_float16_are_kept_as_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].get_parameter("weight").mul_(1e3)[:, 0] *= 3000
    kept = Quantizer().on_damage("keep").apply(model).report
    assert [row.scheme for row in kept.quantized] == ["bfloat16"]


def test_the_estimate_is_the_expected_sqnr_for_inputs_that_make_columns_count_alike() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 64, 48) * torch.logspace(-1.5, 1.5, 48)
    scheme = Affine(6)
    low, high = weight.amin(2, keepdim=True), weight.amax(2, keepdim=True)
    q = scheme.quantize(weight, scheme.calculate_qparams(low, high, block_size=(1, 1, 48)))
    found = WeightError.of(weight, q, scheme).balanced_db
    inputs = torch.randn(200_000, 48, dtype=torch.float64)
    inputs /= weight[0].double().square().mean(0).sqrt()
    exact = inputs @ weight[0].double().t()
    rounded = inputs @ scheme.dequantize(q)[0].double().t()
    assert found == pytest.approx(sqnr64([exact], [rounded]), abs=0.05)


LOUD = 8


def crossed() -> tuple[nn.Sequential, Tensor]:
    """Return a layer of which no column stands out, and inputs that are loud for small weights.

    All rows but the last ones have one large weight each, which faint inputs meet; the last rows
    are loud all over, as a recurrent layer's may be.
    """
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), noise(512, 64)
    with torch.no_grad():
        weight = model[0].get_parameter("weight").normal_()
        weight[-LOUD:] *= 1000
        weight[torch.arange(64 - LOUD), torch.arange(64 - LOUD) % 16] = 300
    x[:, :16] *= 1e-4
    return model, x


def test_large_weights_that_no_column_shares_are_warned_of_with_a_setting_that_was_tried() -> None:
    model, x = crossed()
    plain = Quantizer().activations(None)
    report = plain.apply(model).report
    (row,) = report.quantized
    assert row.sqnr_db is not None
    assert row.estimated_db is not None
    assert row.outliers is not None
    assert row.faint_db is not None
    assert min(row.sqnr_db, row.estimated_db) > 35, "the other evidence does not see it"
    assert row.outliers < 2
    (line,) = [one for one in report.warnings if "would leave" in one]
    assert f"0.weight would leave {row.faint_db:.1f} dB" in line
    assert "an estimate for drawn inputs: no layer was measured" in line
    assert f"~{row.faint_db:.1f} dB" in str(report)
    mended = plain.override("0.weight", bits=16).apply(model)
    (better,) = mended.report.quantized
    assert better.faint_db == pytest.approx(row.cast_db)
    assert line.endswith(f"override('0.weight', bits=16), which leaves {better.faint_db:.1f} dB")
    assert not any("would leave" in one for one in mended.report.warnings)
    kept = plain.on_damage("keep").apply(model)
    with pytest.raises(DamageError, match="would leave"):
        plain.on_damage("error").apply(model)

    def left(result: QuantizationResult[nn.Sequential]) -> float:
        with torch.no_grad():
            return sqnr64([model(x)[:, :-LOUD]], [result.model(x)[:, :-LOUD]])

    assert left(plain.apply(model)) < 10
    assert left(mended) > 50
    assert torch.equal(kept.model(x), mended.model(x))


def test_the_estimate_of_faint_values_is_the_expected_sqnr_of_rows_that_meet_those_alone() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 48, 31) ** 5
    weight[0, 3, :9] = 0
    scheme = Affine(8)
    low, high = weight.amin(2, keepdim=True), weight.amax(2, keepdim=True)
    q = scheme.quantize(weight, scheme.calculate_qparams(low, high, block_size=(1, 1, 31)))
    error = scheme.dequantize(q)[0].double() - weight[0].double()
    lost = []
    for row, wrong in zip(weight[0].double(), error, strict=True):
        order = row.abs().argsort()[int((row == 0).sum()) :]
        half = order[: (len(order) + 1) // 2]
        inputs = torch.randn(20_000, len(half), dtype=torch.float64)
        lost.append((inputs @ wrong[half]).square().sum() / (inputs @ row[half]).square().sum())
    expected = -10 * torch.stack(lost).mean().log10()
    found = WeightError.of(weight, q, scheme).faint_db
    assert found == pytest.approx(float(expected), abs=0.1)


@pytest.mark.parametrize("every", [8, 10])
def test_such_rows_are_counted_though_only_some_rows_of_a_large_weight_are_looked_at(
    every: int,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048))
    with torch.no_grad():
        model[0].get_parameter("weight")[::every, 7] = 300
    (row,) = Quantizer().apply(model).report.quantized
    assert row.faint_db == pytest.approx(10 * math.log10(every), abs=1)


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
@pytest.mark.parametrize("kind", ["normal", "Laplace", "Student", "pruned", "a few rows"])
def test_ordinary_weights_are_not_taken_for_such(kind: str, bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    weight = model[0].get_parameter("weight")
    with torch.no_grad():
        weight.normal_()
        if kind == "Laplace":
            weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample(weight.shape))
        elif kind == "Student":
            weight.copy_(torch.distributions.StudentT(4.0).sample(weight.shape))
        elif kind == "pruned":
            weight[torch.rand_like(weight) < 0.7] = 0
        elif kind == "a few rows":
            weight[::128, 5] *= 500
    report = Quantizer().bits(bits).apply(model).report
    assert not any(row.loses_faint for row in report.quantized)
    assert not any("would leave" in line for line in report.warnings)


def test_what_meets_no_inputs_value_by_value_has_no_such_estimate() -> None:
    model = nn.Sequential(nn.Conv1d(64, 64, 5), nn.Linear(64, 8), nn.Embedding(64, 64))
    rows = Quantizer().apply(model).report.quantized
    assert [row.faint_db for row in rows] == [None] * 3


class Reader(nn.Module):
    """Looks words up, sums some, and perhaps multiplies by the same weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(512, 64), nn.EmbeddingBag(512, 64)
        self.head = nn.Linear(64, 512, bias=False)
        with torch.no_grad():
            for table in (self.words, self.bag, self.head):
                table.weight.mul_(torch.logspace(-2, 1, 64))
        if tied:
            self.head.weight = self.words.weight


def test_the_estimate_of_a_lookup_is_the_sqnr_of_the_rows_that_it_returns() -> None:
    torch.manual_seed(0)
    model = Reader()
    result = Quantizer().apply(model)
    rows = {row.name: row for row in result.report.quantized}
    words = torch.arange(512)
    for name in ("words", "bag"):
        float_rows, found = (
            one.get_submodule(name)(words[:, None] if name == "bag" else words)
            for one in (model, result.model)
        )
        expected = sqnr64([float_rows.detach()], [found.detach()])
        assert rows[f"{name}.weight"].estimated_db == pytest.approx(expected, abs=1e-3)
    # inputs that make columns count alike show what is lost in the small ones
    head, looked_up = rows["head.weight"].estimated_db, rows["words.weight"].estimated_db
    assert head is not None
    assert looked_up is not None
    assert head < looked_up - 10


def test_a_lookup_that_shares_the_weight_of_a_product_is_judged_as_that() -> None:
    torch.manual_seed(0)
    rows = Quantizer().apply(Reader(tied=True)).report.quantized
    (shared,) = [row for row in rows if row.aliases]
    assert shared.sqnr_db is not None
    assert shared.estimated_db is not None
    assert shared.estimated_db < shared.sqnr_db - 10


@pytest.mark.parametrize("shape", [(2, 64, 8), (1, 4, 8), (1, 64, 0)])
def test_what_is_no_matrix_of_enough_rows_is_judged_as_for_inputs_all_alike(
    shape: tuple[int, int, int],
) -> None:
    weight, scheme = torch.randn(shape), Affine(4)
    ends = weight.new_zeros(*shape[:2], 1), weight.new_ones(*shape[:2], 1)
    qparams = scheme.calculate_qparams(*ends, block_size=(1, 1, shape[2]))
    error = WeightError.of(weight, scheme.quantize(weight, qparams), scheme)
    assert error.balanced_db is None
    assert error.estimated_db == error.total.sqnr_db


def test_columns_that_dwarf_the_others_are_warned_of() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 5] *= 40
    (row,) = Quantizer().apply(model).report.quantized
    assert row.outliers == pytest.approx(40, rel=0.2)
    lines = Quantizer().apply(model).report.warnings
    (line,) = [line for line in lines if "columns" in line]
    assert "override('0.weight', group_size=32)" in line
    grouped = Quantizer().group_size(32).apply(model).report.warnings
    assert not any("columns" in line for line in grouped)
