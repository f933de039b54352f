"""What helps where an output is poor and no layer is destroyed, and where columns dwarf others."""

import re

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer, Report
from mono_quant.calibration import Noted
from tests.helpers import noise

DYNAMIC = Quantizer().activations("dynamic")


class Difference(nn.Module):
    """Returns the small difference of two layers that return nearly the same."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(64, 64, bias=False) for _ in range(2))
        self.plain = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        with torch.no_grad():
            self.left.weight[:, 0] *= 5  # so that these two return less than the others
            self.right.weight.copy_(self.left.weight + 0.003 * torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.left(x) - self.right(x)
        for layer in self.plain:
            found = found + 1e-3 * layer(x)
        return found


def advice(report: Report, start: str) -> tuple[str, ...]:
    """Return the warnings that begin so."""
    return tuple(line for line in report.warnings if line.startswith(start))


def follow(quantizer: Quantizer, line: str) -> Quantizer:
    """Return a quantizer told what a warning says."""
    for name in re.findall(r"skip\('([^']+)'\)", line):
        quantizer = quantizer.skip(name)
    for name, size in re.findall(r"override\('([^']+)', group_size=(\d+)\)", line):
        quantizer = quantizer.override(name, group_size=int(size))
    return quantizer


@pytest.mark.parametrize("quantizer", [Quantizer(), DYNAMIC, Quantizer().activations(None)])
def test_layers_that_cost_the_output_most_are_named_though_none_is_destroyed(
    quantizer: Quantizer,
) -> None:
    torch.manual_seed(0)
    model, x = Difference().eval(), noise(64, 64)
    fitted = quantizer.fit(x)
    report = fitted.apply(model, progress=False).report
    assert report.output_sqnr_db is not None
    assert report.output_sqnr_db < 20
    assert all((row.output_sqnr_db or 0) > 25 for row in report.quantized)
    (line,) = advice(report, "with ")
    assert set(re.findall(r"skip\('([^']+)'\)", line)) == {"left", "right"}
    said = float(line.partition("the output would be at ")[2].partition(" ")[0])
    mended = follow(fitted, line).apply(model, progress=False).report
    assert mended.output_sqnr_db == pytest.approx(said, abs=0.06)
    assert said > report.output_sqnr_db + 3


@pytest.mark.parametrize(
    ("held", "which"), [(3, "first 3 batches"), (1, "first batch"), (0, "first batch")]
)
def test_layers_are_tried_on_the_first_batches_alone_where_outputs_are_large(
    monkeypatch: pytest.MonkeyPatch, held: int, which: str
) -> None:
    """So that the memory and the time of the trial do not grow with the data."""
    batches = [noise(32, 64, seed=seed) for seed in range(5)]
    monkeypatch.setattr(Noted.__init__, "__defaults__", (held * 32 * 64 * 4,))
    torch.manual_seed(0)
    model = Difference().eval()
    fitted = DYNAMIC.fit(batches)
    (line,) = advice(fitted.apply(model, progress=False).report, "with ")
    said = float(line.partition("the output would be at ")[2].partition(" ")[0])
    assert f"dB on the {which}: skip(" in line
    few = DYNAMIC.fit(batches[: max(1, held)])
    mended = follow(few, line).apply(model, progress=False).report
    assert mended.output_sqnr_db == pytest.approx(said, abs=0.06)


def test_nothing_is_named_where_no_few_layers_make_the_output_poor() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(24))).eval()
    report = DYNAMIC.bits(4).fit(noise(64, 64)).apply(chain, progress=False).report
    assert report.output_sqnr_db is not None
    assert report.output_sqnr_db < 20
    assert not advice(report, "with ")


def test_layers_are_not_tried_where_they_are_half_of_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    report = Quantizer().bits(2).fit(noise(64, 64)).apply(model, progress=False).report
    assert report.output_sqnr_db is not None
    assert report.output_sqnr_db < 20
    assert not advice(report, "with ")


def test_a_good_output_is_left_alone_and_so_is_the_float_model() -> None:
    torch.manual_seed(0)
    model, x = Difference().eval(), noise(64, 64)
    before = model(x)
    report = Quantizer().bits(16).fit(x).apply(model, progress=False).report
    assert not advice(report, "with ")
    DYNAMIC.fit(x).apply(model, progress=False)
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())


def dwarfed(loud: int) -> tuple[nn.Sequential, Tensor]:
    """Return a layer with one large column that faint inputs meet, and one loud input."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), noise(64, 64)
    with torch.no_grad():
        model[0].get_parameter("weight")[:, 5] *= 100
    x[:, 5] *= 1e-3
    x[:, loud] *= 100
    return model, x


def test_groups_are_advised_where_they_help_what_the_layer_returns() -> None:
    model, x = dwarfed(loud=40)
    fitted = Quantizer().activations(None).fit(x)
    report = fitted.apply(model, progress=False).report
    (line,) = advice(report, "0.weight has columns")
    gain = report.quantized[0].groups_gain_db
    assert gain is not None
    assert f"groups keep them apart and leave {gain:.0f} dB less error" in line
    mended = follow(fitted, line).apply(model, progress=False).report
    before, after = report.quantized[0].output_sqnr_db, mended.quantized[0].output_sqnr_db
    assert before is not None
    assert after == pytest.approx(before + gain, abs=1e-3)


def test_groups_are_advised_untried_in_a_layer_that_no_data_reached() -> None:
    model, x = dwarfed(loud=6)
    unused = nn.ModuleDict({"used": nn.Linear(64, 64), "unused": model})
    fitted = Quantizer().activations(None)
    fitted = fitted.fit(x, forward=lambda one, batch: one.get_submodule("used")(batch))
    report = fitted.apply(unused, progress=False).report
    gains = {row.name: row.groups_gain_db for row in report.quantized}
    assert gains["unused.0.weight"] is None
    (line,) = advice(report, "unused.0.weight has columns")
    assert line.endswith("override('unused.0.weight', group_size=32)")


def test_groups_are_not_advised_where_trying_them_shows_no_gain() -> None:
    model, x = dwarfed(loud=6)  # in the group of the large column
    report = Quantizer().activations(None).fit(x).apply(model, progress=False).report
    (line,) = advice(report, "0.weight has columns")
    gain = report.quantized[0].groups_gain_db
    assert gain is not None
    assert gain < 3
    assert line.endswith("groups do not help it: override('0.weight', bits=16)")
