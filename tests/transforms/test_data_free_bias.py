"""Biases corrected without data, by what batch normalizations tell of the next layer's inputs."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    BiasCorrection,
    CalibrationError,
    Change,
    Correction,
    CorrectionContext,
    EqualizeLayers,
    FoldBatchNorm,
    QuantizedModule,
    Quantizer,
    load_model,
)
from mono_quant.transforms.expected import expected_inputs
from tests.helpers import WEIGHTS_ONLY, noise

COARSE = WEIGHTS_ONLY.bits(3).granularity("channel").only("*").fold()
CORRECTED = COARSE.transform(BiasCorrection())


class Block(nn.Module):
    """Convolutions between batch normalizations, a residual sum and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 32, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.act = nn.ReLU6()
        self.project = nn.Conv2d(32, 16, 1)
        self.norm3 = nn.BatchNorm2d(16)
        self.mix = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.expand(x)))
        x = self.norm3(self.project(self.act(self.norm2(self.depthwise(x)))))
        found: Tensor = self.last(self.mix(x) + x)
        return found


def trained() -> Block:
    """Return a block whose running statistics are those of normal inputs."""
    torch.manual_seed(0)
    model = Block()
    for norm in (model.norm1, model.norm2, model.norm3):
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.uniform_(norm.bias, -1, 3)
        norm.momentum = None  # a plain mean over all batches
    with torch.no_grad():
        for batch in torch.split(inputs(), 64):
            model(batch)
    return model.eval()


def inputs() -> Tensor:
    return noise(256, 4, 12, 12)


def outcome(changes: Sequence[Change]) -> dict[str, bool]:
    return {change.path: change.done for change in changes if "bias of" in change.text}


def reason(changes: Sequence[Change], path: str) -> str:
    (text,) = [one.text for one in changes if one.path == path and "not corrected" in one.text]
    return text.rpartition("corrected: ")[2]


@torch.no_grad()
def seen(model: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer is given and what it returns."""
    found: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    model(x)
    handle.remove()
    return found[0]


def channel_means(x: Tensor) -> Tensor:
    return x.double().mean((0, 2, 3))


@attrs.frozen
class Needy(Correction):
    """Needs data, as corrections do unless they say otherwise."""

    kind: ClassVar[str] = "needy"

    def apply(self, model: nn.Module, context: CorrectionContext) -> tuple[Change, ...]:
        return ()


def floats_of(model: Block, quantizer: Quantizer) -> Block:
    """Return the float twin of what a quantizer makes: folded, if it folds."""
    twin = copy.deepcopy(model)
    if quantizer is COARSE:
        FoldBatchNorm().apply(twin)
    return twin


@pytest.mark.parametrize("quantizer", [COARSE, COARSE.fold(False)], ids=["folded", "kept"])
def test_the_expected_inputs_are_those_that_the_layers_see(quantizer: Quantizer) -> None:
    source = trained()
    rooms = {"depthwise": 0.005, "project": 0.05, "mix": 0.005}
    found = expected_inputs(source, floats_of(source, quantizer), list(rooms))
    for path, room in rooms.items():  # what a ReLU has clipped is no longer normal further on
        mean, exact = found[path], channel_means(seen(source, path, inputs())[0])
        assert isinstance(mean, Tensor)
        assert (mean - exact).norm() < room * exact.norm(), path


@pytest.mark.parametrize("quantizer", [COARSE, COARSE.fold(False)], ids=["folded", "kept"])
def test_the_mean_of_what_a_layer_returns_comes_nearer(quantizer: Quantizer) -> None:
    source, x = trained(), inputs()
    result = quantizer.transform(BiasCorrection()).apply(source)
    plain = quantizer.apply(source).model
    assert outcome(result.report.changes) == {
        "expand": False,
        "depthwise": True,
        "project": True,
        "mix": True,
        "last": False,
    }
    assert "its inputs are not known: its input comes from the model's input" in reason(
        result.report.changes, "expand"
    )
    assert reason(result.report.changes, "last").endswith("comes from an addition")
    twin = floats_of(source, quantizer)
    for path in ("depthwise", "project", "mix"):
        given, exact = seen(twin, path, x)
        errors = [
            channel_means(model.get_submodule(path)(given)) - channel_means(exact)
            for model in (plain, result.model)
        ]
        assert errors[1].norm() < 0.35 * errors[0].norm(), path


def test_the_shift_is_that_of_float64() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3, groups=2))
    nn.init.uniform_(source[1].get_parameter("weight"))
    nn.init.normal_(source[1].get_parameter("bias"))
    source.eval()
    result, plain = (one.apply(source).model for one in (CORRECTED, COARSE))
    weight = source[2].get_parameter("weight").double()
    layer = plain[2]
    assert isinstance(layer, QuantizedModule)
    error = (
        (layer.packed_weights()["weight"].dequantize().double() - weight).sum(2).reshape(2, 2, 3)
    )
    mean = source[1].get_parameter("bias").double().reshape(2, 3, 1)
    expected = source[2].get_parameter("bias").double() - (error @ mean).flatten()
    torch.testing.assert_close(result[2].get_parameter("bias").double(), expected)


def test_what_changed_the_statistics_is_found_out() -> None:
    source = trained()
    result = CORRECTED.transform(EqualizeLayers()).apply(source)
    assert any(change.done and "equalized" in change.text for change in result.report.changes)
    assert reason(result.report.changes, "depthwise").startswith(
        "something else than folding 'norm1' changed"
    )


def test_other_activations_and_layers_are_left_alone() -> None:
    for between, last, why in (
        (nn.SiLU(), nn.Conv1d(8, 4, 1), "behind '1' is silu, which does not clip"),
        (nn.ReLU(), nn.ConvTranspose1d(8, 4, 3), "what a ConvTranspose1d makes of its input"),
        (nn.MaxPool1d(2), nn.Conv1d(8, 4, 1), "its input comes from '2'"),
    ):
        source = nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), between, last).eval()
        assert reason(CORRECTED.apply(source).report.changes, "3").endswith(why)


def test_a_model_that_cannot_be_traced_is_left_alone() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self[2](self[1](self[0](x)))
            return found if bool(found.sum() > 0) else -found

    source = Branching(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)).eval()
    why = reason(CORRECTED.apply(source).report.changes, "2")
    assert why.startswith("without data, the model's code has to tell: it cannot be traced")


def test_with_data_the_data_tells() -> None:
    report = CORRECTED.fit(inputs()).apply(trained()).report
    assert all(outcome(report.changes).values())


def test_a_correction_that_needs_data_is_refused_without() -> None:
    with pytest.raises(CalibrationError, match=r"Needy.*needs data"):
        COARSE.transform(Needy()).plan(trained())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_it_comes_back_from_a_file(suffix: str, tmp_path: Path) -> None:
    result, x = CORRECTED.apply(trained()), inputs()[:2]
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), Block().eval())
    assert torch.equal(loaded(x), result.model(x))
