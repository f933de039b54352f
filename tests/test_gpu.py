"""The whole product on a CUDA device: models that lie there are quantized, run, saved and read."""

import copy
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    AWQ,
    GPTQ,
    HQQ,
    BiasCorrection,
    Codebook,
    FittedCodebook,
    Float8,
    Histogram,
    LearnedRounding,
    Microscaling,
    PerChannel,
    QuantizedLayer,
    Quantizer,
    SmoothQuant,
    kernels,
    load_model,
)
from mono_quant.modules import layer as layer_module
from tests.helpers import noise, same_bits, same_tensors, sqnr64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = "cuda"
WIDTH = 256


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 128, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(256, 96, batch_first=True)
        self.cell = nn.LSTMCell(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.gru(self.lstm(x)[0])
        found: Tensor = self.cell(steps[:, -1])[0]
        return found


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 512, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 512, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.block(self.embedding(x)))
        return found


def dense() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 512),
        nn.GELU(),
        nn.Linear(512, 272),
        nn.Linear(272, 256),
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 2, stride=2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 128),
    )


def rows() -> Tensor:
    return noise(32, WIDTH)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dense": (dense, rows),
    "convolutions": (convolutions, lambda: noise(8, 16, 14, 14)),
    "recurrent": (Recurrent, lambda: noise(6, 9, WIDTH)),
    "tokens": (Tokens, lambda: torch.arange(96).reshape(4, 24) * 5 % 512),
}

PLAIN: Mapping[str, Quantizer] = {
    "INT8 dynamic": Quantizer(),
    "INT8 weight-only": Quantizer().activations(None),
    "INT8 per tensor, symmetric": Quantizer()
    .granularity("tensor")
    .activations("dynamic", symmetric=True, granularity="tensor"),
    "INT4": Quantizer().bits(4),
    "INT4, float zero points": Quantizer().bits(4).float_zero_point().rounding(HQQ()),
    "INT3": Quantizer().bits(3),
    "INT2": Quantizer().bits(2),
    "FP16": Quantizer().bits(16),
    "FP8": Quantizer().scheme(Float8()).activations("dynamic", dtype=torch.float8_e4m3fn),
    "FP8 weight-only": Quantizer().scheme(Float8(torch.float8_e5m2)),
    "NF4": Quantizer().scheme(Codebook.nf4(PerChannel())),
    "tables": Quantizer().scheme(FittedCodebook(4, PerChannel(), torch.float8_e4m3fn)),
    "MXFP4": Quantizer().scheme(Microscaling.mxfp4()),
    "outlier columns": Quantizer().outliers(4),
}
"""Without data."""

COARSE = ("INT4", "FP8")
"""Whose last bits matter: of a product in bfloat16, and of inputs that round by a sixteenth."""

FITTED_ALONE = ("tables", "INT4, float zero points")
"""By many steps, in which last bits grow."""

FITTED: Mapping[str, Quantizer] = {
    "static": Quantizer(),
    "static, histogram": Quantizer().observer(activations=Histogram()),
    "static FP8": Quantizer().scheme(Float8()).activations("static", dtype=torch.float8_e4m3fn),
    "bias correction": Quantizer().transform(BiasCorrection()),
    "GPTQ": Quantizer().bits(4).rounding(GPTQ()),
    "learned": Quantizer().bits(4).rounding(LearnedRounding(steps=4)),
    "AWQ": Quantizer().bits(4).transform(AWQ()),
    "SmoothQuant": Quantizer().transform(SmoothQuant()),
    "quality": Quantizer().bits(3).quality("balanced"),
}
"""With data."""


def case(name: str) -> tuple[nn.Module, Tensor]:
    make, example = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), example()


def decibels(found: Tensor, expected: Tensor) -> float:
    one, other = expected.double().cpu(), found.double().cpu()
    return math.inf if torch.equal(one, other) else sqnr64([one], [other])


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that floats differ in their last bits, and few values by what those decide."""
    assert found.keys() == expected.keys()
    for key, other in expected.items():
        one = found[key].cpu()
        assert one.dtype == other.dtype
        far = (one.double() - other.double()).abs() > 2e-3 * other.double().abs() + 1e-6
        assert float(far.double().mean()) < 0.01, key


@pytest.mark.filterwarnings("ignore:RNN module weights:UserWarning")  # they are decoded anew
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PLAIN)
def test_without_data_a_model_is_quantized_as_on_a_cpu(
    model: str, name: str, tmp_path: Path
) -> None:
    source, x = case(model)
    expected = PLAIN[name].apply(copy.deepcopy(source), progress=False).model
    on_gpu = source.to(GPU)
    result = PLAIN[name].apply(on_gpu, progress=False)
    assert {value.device.type for value in result.model.state_dict().values()} == {"cuda"}
    if name not in FITTED_ALONE:
        assert_alike(result.model.state_dict(), expected.state_dict())
    with torch.no_grad():
        found = result.model(x.to(GPU))
        with kernels.use("reference"):
            plain = result.model(x.to(GPU))
        assert decibels(found, plain) > (35 if name in COARSE else 45)
        assert decibels(plain, expected(x)) > 30
    assert result.validate(x.to(GPU))
    result.save(tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors", case(model)[0].to(GPU))
    with torch.no_grad():
        assert same_bits(again(x.to(GPU)).cpu(), found.cpu())


@pytest.mark.filterwarnings("ignore:RNN module weights:UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FITTED)
def test_with_data_the_outputs_are_as_near_as_on_a_cpu(model: str, name: str) -> None:
    source, x = case(model)
    batches = [x[: len(x) // 2], x[len(x) // 2 :]]
    with torch.no_grad():
        floats = source(x)
        expected = FITTED[name].fit(batches).apply(copy.deepcopy(source), progress=False).model(x)
        result = FITTED[name].fit(batches).apply(source.to(GPU), progress=False)
        found = result.model(x.to(GPU))
    assert {value.device.type for value in result.model.state_dict().values()} == {"cuda"}
    assert abs(decibels(found, floats) - decibels(expected, floats)) < 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["INT8 dynamic", "INT4", "FP8", "INT8 weight-only", "NF4"])
def test_half_precision_stays_half_precision(name: str, dtype: torch.dtype) -> None:
    source, x = case("dense")
    source, x = source.to(GPU, dtype), x.to(GPU, dtype)
    result = PLAIN[name].apply(source, progress=False)
    with torch.no_grad():
        found = result.model(x)
        with kernels.use("reference"):
            plain = result.model(x)
    assert found.dtype == dtype
    assert decibels(found, plain) > 30


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of inductor
@pytest.mark.parametrize("name", ["INT8 dynamic", "INT4", "FP8", "FP16"])
def test_a_compiled_model_computes_the_same(name: str) -> None:
    source, x = case("dense")
    model, x = PLAIN[name].apply(source.to(GPU), progress=False).model, x.to(GPU)
    torch.compiler.reset()
    with torch.no_grad():
        with kernels.use("reference"):
            expected = model(x)
        assert decibels(torch.compile(model)(x), expected) > 30


@pytest.mark.parametrize(
    ("name", "product", "count"),
    [
        ("INT8 dynamic", "_int_mm", 3),
        ("FP8", "_scaled_mm", 3),
        ("INT4", "_weight_int4pack_mm", 2),  # of the last layer, whose rows no tiles divide
    ],
)
def test_a_compiled_model_multiplies_codes(name: str, product: str, count: int) -> None:
    source, x = case("dense")
    model = PLAIN[name].apply(source.to(GPU), progress=False).model
    calls, traces = list[str](), list[int]()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        traces.append(len(inputs))
        return graph.forward

    torch.compiler.reset()
    few = x[:4].to(GPU)
    with torch.no_grad():
        expected = model(few)  # puts codes in order, which the trace finds
        call = torch.compile(model, fullgraph=True, backend=backend)
        assert decibels(call(few), expected) > 30
        assert decibels(call(few), expected) > 30
        assert sum(product in call for call in calls) == count, calls
        assert len(traces) == 1
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        assert decibels(call(few), expected) > 30
    assert same_tensors(model, PLAIN[name].apply(case("dense")[0].to(GPU), progress=False).model)
    assert state.keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of inductor
@pytest.mark.parametrize("many", [False, True])
def test_compiled_tiles_of_four_bits_serve_few_rows_and_many(
    many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "most_rows", lambda *_: 0 if many else sys.maxsize)
    model = PLAIN["INT4"].apply(nn.Linear(512, 256, device=GPU), progress=False).model
    x = noise(40, 512).to(GPU)
    torch.compiler.reset()
    with torch.no_grad():
        with kernels.use("reference"):
            expected = model(x)
        found = torch.compile(model, fullgraph=True)(x)
    assert decibels(found, expected) > 35


def test_models_move_between_devices() -> None:
    source, x = case("dense")
    model = Quantizer().bits(4).apply(source, progress=False).model
    with torch.no_grad():
        expected = model(x)
        assert decibels(model.to(GPU)(x.to(GPU)), expected) > 35
        assert same_bits(model.cpu()(x), expected)
    assert any(isinstance(layer, QuantizedLayer) for layer in model.modules())


def test_a_model_is_quantized_in_place_layer_by_layer() -> None:
    source, x = case("dense")
    expected = Quantizer().bits(4).apply(copy.deepcopy(source).to(GPU), progress=False)
    found = Quantizer().bits(4).apply_(source.to(GPU), progress=False)
    assert same_tensors(found.model, expected.model)
    with torch.no_grad():
        assert same_bits(found.model(x.to(GPU)).cpu(), expected.model(x.to(GPU)).cpu())


def test_speed_is_measured_on_the_device() -> None:
    source, x = case("dense")
    speed = Quantizer().apply(source.to(GPU), progress=False).benchmark(x.to(GPU))
    assert speed.seconds > 0
    assert speed.float_seconds > 0
