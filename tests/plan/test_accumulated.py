"""How the error grows inside the quantized model, against runs of both models by hand."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.plan import accumulated
from tests.helpers import WEIGHTS_ONLY, noise


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)]
    return nn.Sequential(*layers).eval()


def returned(model: nn.Module, data: Tensor) -> Mapping[str, list[Tensor]]:
    """Return what each layer that has a weight returns, call by call."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "in_features", None), int):

            def see(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                found.setdefault(name, []).append(output.detach().double())

            module.register_forward_hook(see)
    with torch.no_grad():
        model(data)
    return found


def decibels(ones: list[Tensor], others: list[Tensor]) -> float:
    one, other = torch.cat(ones), torch.cat(others)
    return float(10 * torch.log10(one.square().sum() / (one - other).square().sum()))


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer().bits(3), WEIGHTS_ONLY], ids=repr)
def test_the_error_is_that_of_the_layer_inside_the_quantized_model(quantizer: Quantizer) -> None:
    model, data = chain(), noise(32, 64)
    result = quantizer.fold(False).fit(data).apply(model, progress=False)
    floats, quantized = returned(model, data), returned(result.model, data)
    rows = result.report.quantized
    assert len(rows) == 3
    for row in rows:
        name = row.name.removesuffix(".weight")
        assert row.accumulated_db == pytest.approx(
            decibels(floats[name], quantized[name]), abs=1e-6
        )
    assert rows[0].accumulated_db == rows[0].output_sqnr_db, "nothing comes before the first"
    assert rows[-1].accumulated_db == pytest.approx(result.report.output_sqnr_db, abs=1e-9)


def test_of_several_batches_all_count() -> None:
    model, batches = chain(), [noise(8, 64, seed=seed) for seed in range(3)]
    result = WEIGHTS_ONLY.fit(batches).apply(model, progress=False)
    whole = WEIGHTS_ONLY.fit(torch.cat(batches)).apply(model, progress=False)
    for row, other in zip(result.report.quantized, whole.report.quantized, strict=True):
        assert row.accumulated_db == pytest.approx(other.accumulated_db, abs=1e-6)


class Backwards(nn.Module):
    """Calls its layers in another order than it holds them, the middle one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(self.middle(self.first(x))))
        return found


def test_places_are_those_of_calls_and_every_call_counts() -> None:
    torch.manual_seed(0)
    model, data = Backwards().eval(), noise(16, 64)
    result = WEIGHTS_ONLY.fit(data).apply(model, progress=False)
    rows = {row.name.removesuffix(".weight"): row for row in result.report.quantized}
    assert {name: row.place for name, row in rows.items()} == {"last": 2, "middle": 1, "first": 0}
    floats, quantized = returned(model, data), returned(result.model, data)
    assert len(floats["middle"]) == 2
    for name, row in rows.items():
        assert row.accumulated_db == pytest.approx(
            decibels(floats[name], quantized[name]), abs=1e-6
        )


class Choosy(nn.Module):
    """Calls a layer again as often as what it returned is not yet in order: as float tells."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        for _ in range(1 + ("Quantized" in type(self.one).__name__)):
            x = self.two(x)
        return x


def test_a_layer_that_the_models_call_differently_is_not_measured() -> None:
    torch.manual_seed(0)
    result = WEIGHTS_ONLY.fit(noise(8, 64)).apply(Choosy().eval(), progress=False)
    one, two = result.report.quantized
    assert one.accumulated_db is not None
    assert two.accumulated_db is None
    assert two.output_sqnr_db is not None


def test_without_data_nothing_is_known() -> None:
    rows = Quantizer().apply(chain(), progress=False).report.quantized
    assert [(row.accumulated_db, row.place) for row in rows] == [(None, None)] * 3


def test_a_large_output_is_sampled_and_comes_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulated, "KEPT", 1 << 16)
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64)).eval(), noise(1024, 64)
    result = WEIGHTS_ONLY.fit(data).apply(model, progress=False)
    floats, quantized = returned(model, data), returned(result.model, data)
    row = result.report.quantized[0]
    exact = decibels(floats["0"], quantized["0"])
    assert row.accumulated_db != pytest.approx(exact, abs=1e-9)
    assert row.accumulated_db == pytest.approx(exact, abs=0.3)


def test_hooks_are_gone_afterwards() -> None:
    result = WEIGHTS_ONLY.fit(noise(8, 64)).apply(chain(), progress=False)
    assert not any(module._forward_hooks for module in result.model.modules())
