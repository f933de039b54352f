"""Inputs as floats of 8 bits, against torch's own cast in float64."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    Activations,
    ConfigurationError,
    Float8,
    QuantizedLayer,
    Quantizer,
    kernels,
    load_model,
)
from tests.helpers import assert_near, noise, oracle, same_bits
from tests.layers.test_activations import LAYERS, TAUGHT, as_rows

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def cast(rows: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows as floats of a scale each, which puts `largest` on the largest one."""
    scale = (largest.float() / LARGEST[dtype]).masked_fill(largest == 0, 1)
    bounded = (rows.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return bounded.to(dtype).double() * scale.double()


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_value_is_the_nearest_float(name: str, mode: str, dtype: torch.dtype) -> None:
    source, size = LAYERS[name]()
    x = noise(*size) * torch.logspace(-3, 2, size[0]).reshape(-1, *[1] * (len(size) - 1))
    quantizer = TAUGHT.scheme(Float8()).activations(mode, dtype=dtype)
    model = (quantizer.fit(x) if mode == "static" else quantizer).apply(source).model
    assert isinstance(model, QuantizedLayer)
    rows = as_rows(x, name)
    sizes = rows.abs()
    largest = sizes.amax(1, keepdim=True) if mode == "dynamic" else sizes.max().reshape(1, 1)
    seen = cast(rows, largest, dtype).reshape(x.shape)
    with torch.no_grad(), kernels.use("reference"):
        assert_near(model(x), oracle(model, source.double())(seen))


def test_rows_of_zeros_nan_and_infinity() -> None:
    quantizer = Quantizer().only("*").scheme(Float8())
    model = quantizer.activations("dynamic", dtype="float8_e4m3fn").apply(nn.Linear(64, 32)).model
    x = noise(4, 64)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    with torch.no_grad():
        found = model(x)
        assert same_bits(found[0], model.bias.detach())
        assert found[1].isnan().all()
        assert not found[2].isfinite().any()
        assert_near(found[3], model(x[3:])[0].double())
        assert model(x[:0]).shape == (0, 32)


def test_a_file_and_a_trace_keep_them(tmp_path: Path) -> None:
    source, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), noise(5, 64)
    quantizer = Quantizer().scheme(Float8()).activations("static", dtype=torch.float8_e4m3fn)
    result = quantizer.fit([x]).apply(copy.deepcopy(source), progress=False)
    assert result.validate(x)
    result.save(tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors", source)
    torch.compiler.reset()
    with torch.no_grad(), kernels.use("reference"):
        expected = result.model(x)
        assert same_bits(again(x), expected)
        assert same_bits(torch.compile(again, fullgraph=True, backend="eager")(x), expected)
        dynamic = quantizer.activations("dynamic", dtype=torch.float8_e5m2).apply(source).model
        traced = torch.compile(dynamic, fullgraph=True, backend="eager")
        assert same_bits(traced(x), dynamic(x))


def test_the_words_for_it_read_back() -> None:
    asked = Quantizer().activations("dynamic", dtype=torch.float8_e5m2, granularity="tensor")
    assert repr(Quantizer.from_config(asked.to_config())) == repr(asked)
    assert "dtype=torch.float8_e5m2" in repr(asked)
    result = asked.scheme(Float8()).only("*").apply(nn.Linear(64, 32), progress=False)
    assert any("8-bit floats are decoded" in note for note in result.report.notes)
    assert result.report.layers[0].activation == "dynamic float8_e5m2 per-tensor inputs"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Activations("dynamic", dtype=torch.float16), "float8_e4m3fn or float8_e5m2"),
        (lambda: Activations("dynamic", 4, dtype=torch.float8_e5m2), "leave bits and symmetric"),
        (
            lambda: Activations("static", symmetric=True, dtype=torch.float8_e5m2),
            "no symmetry to choose",
        ),
        (lambda: Activations(None, dtype=torch.float8_e5m2), "granularity or dtype"),
        (lambda: Quantizer().activations("dynamic", dtype="int8"), "not int8"),
        (lambda: Quantizer().activations("dynamic", dtype="fp8"), "'fp8' is not the name"),
    ],
)
def test_what_is_no_such_grid_is_refused(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(ConfigurationError, match=said):
        call()
