"""Roundings that need statistics get them from the data."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    CalibrationError,
    Grid,
    QTensor,
    QuantizedModule,
    Quantizer,
    Rounding,
    RoundToNearest,
    Statistic,
    Statistics,
)
from tests.helpers import (
    Doubled,
    noise,
    same_tensors,
)
from tests.plan.models import mlp, weight_of


@attrs.frozen
class Mean(Statistic[tuple[Tensor, int]]):
    """The sum and the number of the input rows."""

    kind: ClassVar[str] = "tests.mean"

    def observe(self, x: Tensor) -> tuple[Tensor, int]:
        return x.to(torch.float64).sum(0), x.shape[0]

    def merge(self, left: tuple[Tensor, int], right: tuple[Tensor, int]) -> tuple[Tensor, int]:
        return left[0] + right[0], left[1] + right[1]


@attrs.frozen
class Recorded(Rounding):
    """Rounds to the nearest, and writes down the mean input of the weight it rounds."""

    kind: ClassVar[str] = "tests.recorded"
    seen: ClassVar[dict[int, tuple[Tensor, int]]] = {}

    @property
    def needs(self) -> tuple[Mean, ...]:
        return (Mean(),)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        total, count = statistics.state(Mean())
        self.seen[weight.shape[2]] = (total / count, count)
        return RoundToNearest().round(weight, grid, statistics)


@pytest.fixture
def seen() -> Iterator[dict[int, tuple[Tensor, int]]]:
    """Return the means that were written down, by the length of the weight's rows."""
    Recorded.seen.clear()
    yield Recorded.seen
    Recorded.seen.clear()


Seen = dict[int, tuple[Tensor, int]]


def test_a_rounding_gets_the_statistics_it_needs_from_the_data(seen: Seen) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 16))
    data = [noise(3, 5, 128, seed=seed) for seed in range(4)]
    model.train()
    result = Quantizer().rounding(Recorded()).fit(data).apply(model, progress=False)
    assert model.training
    rows = torch.cat(data).reshape(-1, 128)
    with torch.no_grad():
        hidden = model[0](rows).relu()
    for length, inputs in ((128, rows), (64, hidden)):
        mean, count = seen[length]
        assert count == 4 * 3 * 5
        torch.testing.assert_close(mean, inputs.to(torch.float64).mean(0), rtol=0, atol=1e-6)
    plain = Quantizer().fit(data).apply(model, progress=False)
    assert same_tensors(result.model, plain.model)


def test_statistics_come_from_no_more_samples_than_were_asked_for(seen: Seen) -> None:
    data = [noise(4, 128, seed=seed) for seed in range(5)]
    Quantizer().rounding(Recorded()).fit(data, samples=7).apply(mlp(), progress=False)
    mean, count = seen[128]
    assert count == 8  # the batch that reaches the number is used whole
    torch.testing.assert_close(mean, torch.cat(data[:2]).to(torch.float64).mean(0))


@pytest.mark.parametrize(("samples", "used"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 12), (99, 20)])
def test_batches_are_used_until_enough_samples_were_seen(
    samples: int, used: int, seen: Seen
) -> None:
    data = [noise(4, 128) for _ in range(5)]
    quantizer = Quantizer().rounding(Recorded()).fit(data, samples=samples)
    assert quantizer.apply(mlp(), progress=False).report.samples == used
    assert seen[128][1] == used


def test_statistics_are_gathered_in_place_too(seen: Seen) -> None:
    model, data = mlp(), noise(6, 128)
    Quantizer().rounding(Recorded()).fit(data).apply_(model, progress=False)
    assert seen[128][1] == 6
    assert isinstance(model[0], QuantizedModule)


def test_statistics_are_those_of_the_transformed_model(seen: Seen) -> None:
    model, data = mlp(), noise(6, 128)
    Quantizer().transform(Doubled()).rounding(Recorded()).fit(data).apply(model, progress=False)
    with torch.no_grad():
        first = model.get_parameter("0.bias"), weight_of(model, "0") * 2
        hidden = nn.functional.linear(data, first[1], first[0]).relu()
    torch.testing.assert_close(seen[64][0], hidden.to(torch.float64).mean(0), rtol=0, atol=1e-6)


def test_statistics_leave_no_hook_behind(seen: Seen) -> None:
    model, data = mlp(), noise(6, 128)
    result = Quantizer().rounding(Recorded()).fit(data).apply(model, progress=False)
    for module in (*model.modules(), *result.model.modules()):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert seen


def test_a_rounding_for_some_layers_needs_data_for_those_alone(seen: Seen) -> None:
    quantizer = Quantizer().override("2", rounding=Recorded()).fit(noise(6, 128))
    quantizer.apply(mlp(), progress=False)
    assert list(seen) == [64]


def test_a_rounding_that_needs_data_is_refused_by_the_plan_and_its_layers_named() -> None:
    message = r"the rounding of 0, 2 needs data; give some with fit\(data\)"
    with pytest.raises(CalibrationError, match=message):
        Quantizer().rounding(Recorded()).plan(mlp())
    alone = Quantizer().override("2", rounding=Recorded())
    with pytest.raises(CalibrationError, match="the rounding of 2 needs data"):
        alone.plan(mlp())
    assert "float: skipped" in alone.skip("2").plan(mlp()).explain()


class Unused(nn.Module):
    """A layer that forward never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(128, 64)
        self.spare = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.used(x)
        return found


def test_a_layer_that_no_data_reaches_is_refused_by_name(seen: Seen) -> None:
    quantizer = Quantizer().rounding(Recorded()).fit(noise(6, 128))
    with pytest.raises(CalibrationError, match=r"no data reached 'spare'.*skip\('spare'\)"):
        quantizer.apply(Unused(), progress=False)
    for mended in (quantizer.skip("spare"), quantizer.override("spare", rounding=RoundToNearest())):
        result = mended.apply(Unused(), progress=False)
        assert isinstance(result.model.used, QuantizedModule)
    assert seen


def test_data_that_the_model_cannot_take_is_refused_by_batch() -> None:
    data = [noise(2, 128), noise(2, 100)]
    message = r"Sequential failed on batch 1 of the data: .*fit\(data, forward="
    with pytest.raises(CalibrationError, match=message):
        Quantizer().fit(data).apply(mlp(), progress=False)


def test_data_that_holds_nan_is_refused_by_batch() -> None:
    data = [noise(2, 128), noise(2, 128) * float("nan")]
    with pytest.raises(CalibrationError, match="batch 1 of the data holds NaN"):
        Quantizer().fit(data).apply(mlp(), progress=False)
