"""Scales, biases and norms that are learned by what the whole model returns."""

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mono_quant import (
    BiasCorrection,
    ConfigurationError,
    QuantizationResult,
    Quantizer,
    TuneScales,
)
from mono_quant.modules.weight import QuantizedWeight
from tests.helpers import WEIGHTS_ONLY, noise, same_bits, same_tensors

COARSE = WEIGHTS_ONLY.bits(3).group_size(16).only("*")
TUNING = TuneScales(steps=32, scale_rate=3e-3, float_rate=3e-3)
TUNED = COARSE.transform(TUNING)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 16))
    return nn.Sequential(*layers).eval()


def batches() -> list[Tensor]:
    mixed = noise(32, 32, seed=9)
    return [noise(64, 32, seed=seed) @ mixed for seed in range(4)]


def said(result: QuantizationResult[nn.Sequential]) -> tuple[float, float]:
    """Return the SQNR before and after, as the report has them."""
    (text,) = [one.text for one in result.report.changes if "tuned to what" in one.text]
    before, after = re.findall(r"(-?[\d.]+) dB", text)
    return float(before), float(after)


def left_alone(result: QuantizationResult[nn.Sequential]) -> str:
    """Return why nothing was tuned."""
    (change,) = [one for one in result.report.changes if "not tuned" in one.text]
    assert not change.done
    return change.text


def codes_of(model: nn.Module) -> Mapping[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if key.endswith("codes")}


@pytest.mark.parametrize(
    "grid",
    [
        COARSE,
        COARSE.symmetric(),
        COARSE.scale_dtype(torch.float32),
        WEIGHTS_ONLY.bits(3).quality("fast").only("*"),
        COARSE.activations("dynamic"),
        COARSE.activations("static"),
        COARSE.activations("dynamic", bits=4),
    ],
    ids=["codes", "symmetric", "float32", "tables", "dynamic", "static", "4-bit inputs"],
)
def test_outputs_are_nearer_by_what_the_report_says(grid: Quantizer) -> None:
    """The twin that is learned on computes what the quantized model does, inputs on grids too."""
    source, data = mlp(), batches()
    plain = grid.fit(data).apply(source, progress=False)
    result = grid.transform(TUNING).fit(data).apply(source, progress=False)
    before, after = said(result)
    assert plain.report.output_sqnr_db == pytest.approx(before, abs=0.1)
    assert result.report.output_sqnr_db == pytest.approx(after, abs=0.1)
    assert after > before + 1
    codes, others = codes_of(plain.model), codes_of(result.model)
    assert list(codes) == list(others)
    assert all(same_bits(codes[key], others[key]) for key in codes)
    bias = result.model.get_parameter("0.bias")
    assert not same_bits(bias, source[0].get_parameter("bias"))
    assert bias.requires_grad
    assert not same_bits(result.model.get_parameter("1.weight"), torch.ones(64))


def test_the_source_is_left_as_it_was_and_the_same_seed_gives_the_same_bits() -> None:
    source, twin = mlp().train(), mlp()
    first, second = (TUNED.fit(batches()).apply(source, progress=False).model for _ in range(2))
    assert same_tensors(source, twin)
    assert all(module.training for module in source.modules())
    assert not any(module._forward_hooks for module in source.modules())
    assert same_tensors(first, second)
    other = COARSE.transform(TuneScales(steps=30, scale_rate=3e-3, float_rate=3e-3, seed=1))
    assert not same_tensors(first, other.fit(batches()).apply(source, progress=False).model)


def test_outputs_that_are_not_held_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TUNED.activations("static")
    held = grid.fit(batches()).apply(mlp(), progress=False).model
    monkeypatch.setattr("mono_quant.transforms.tune._HELD", 2 * 64 * 16 * 4)
    assert same_tensors(held, grid.fit(batches()).apply(mlp(), progress=False).model)


@pytest.mark.parametrize(
    "useless", [TuneScales(scale_rate=9.0, float_rate=9.0), TuneScales(minutes=1e-9)]
)
def test_what_helps_nothing_changes_nothing(useless: TuneScales) -> None:
    plain = COARSE.fit(batches()).apply(mlp(), progress=False)
    result = COARSE.transform(useless).fit(batches()).apply(mlp(), progress=False)
    assert same_tensors(plain.model, result.model)
    before, after = said(result)
    assert before == after
    assert not any(change.done for change in result.report.changes)


def test_a_rate_of_zero_leaves_scales_or_floats_alone() -> None:
    plain = COARSE.fit(batches()).apply(mlp(), progress=False).model.state_dict()
    for keep, tuning in (
        ("scale", TuneScales(scale_rate=0.0)),
        ("bias", TuneScales(float_rate=0.0)),
    ):
        made = COARSE.transform(tuning).fit(batches()).apply(mlp(), progress=False).model
        state = made.state_dict()
        changed = {key for key in plain if not same_bits(plain[key], state[key])}
        assert changed
        assert not any(key.endswith(keep) for key in changed)


class Tied(nn.Module):
    """Looks tokens up and scores them with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.middle(self.embedding(ids))))
        return found


def test_tied_weights_are_tuned_as_one() -> None:
    torch.manual_seed(0)
    ids = [
        torch.randint(40, (8, 16), generator=torch.Generator().manual_seed(one)) for one in (1, 2)
    ]
    result = TUNED.fit(ids).apply(Tied().eval(), progress=False)
    weights = [one for one in result.model.modules() if isinstance(one, QuantizedWeight)]
    assert len(weights) == 2, "one of both, and the middle one"
    (text,) = [one.text for one in result.report.changes if "tuned to what" in one.text]
    after = float(re.findall(r"([\d.]+) dB", text)[1])
    assert result.report.output_sqnr_db == pytest.approx(after, abs=0.1)


def test_half_precision_stays() -> None:
    source = mlp().to(torch.bfloat16)
    data = [one.to(torch.bfloat16) for one in batches()]
    result = TUNED.fit(data).apply(source, progress=False)
    assert result.model.get_parameter("0.bias").dtype == torch.bfloat16
    before, after = said(result)
    assert after > before


def test_it_says_why_a_model_is_left_alone() -> None:
    def by_parts(model: nn.Module, batch: object) -> object:
        for part in model.children():
            batch = part(batch)
        return batch

    fitted = TUNED.fit(batches(), forward=by_parts)
    assert "call the model itself" in left_alone(fitted.apply(mlp(), progress=False))

    parametrized = mlp()
    parametrizations.weight_norm(parametrized.get_submodule("0"))
    result = TUNED.fit(batches()).apply(parametrized, progress=False)
    assert "0.weight is made of other parameters" in left_alone(result)

    bare = nn.Sequential(nn.Linear(32, 8, bias=False)).eval()
    both = COARSE.transform(BiasCorrection(), TUNING)
    result = both.fit(batches()).apply(bare, progress=False)
    assert "0.bias was added" in left_alone(result)


class Detached(nn.Module):
    """Computes without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 8)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def test_a_model_without_gradients_is_left_alone() -> None:
    source = Detached().eval()
    result = TUNED.fit(batches()).apply(source, progress=False)
    plain = COARSE.fit(batches()).apply(source, progress=False)
    (change,) = [one for one in result.report.changes if "not tuned" in one.text]
    assert not change.done
    assert "there is no gradient of its outputs" in change.text
    assert same_tensors(result.model, plain.model)


def test_recurrent_layers_whose_inputs_are_quantized_are_named() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(32, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.lstm(x)[0]
            return found

    torch.manual_seed(0)
    grid = TUNED.activations("dynamic")
    result = grid.fit([noise(4, 6, 32)]).apply(Reading().eval(), progress=False)
    (unseen,) = [one for one in result.report.changes if "is not seen while" in one.text]
    assert unseen.path == "lstm"
    assert not unseen.done


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"steps": 0}, "steps is a whole number"),
        ({"seed": -1}, "seed is a whole number"),
        ({"minutes": 0.0}, "minutes is more than 0"),
        ({"scale_rate": -1.0}, "rates are 0 or more"),
        ({"float_rate": float("nan")}, "rates are 0 or more"),
    ],
)
def test_what_is_no_learning_is_refused(setting: Mapping[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TuneScales(**setting)  # type: ignore[arg-type]  # whole numbers among them
