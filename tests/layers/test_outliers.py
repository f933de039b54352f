"""Layers that keep a few columns of their weights apart, and the inputs that meet them in float."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    Activation,
    Affine,
    ConfigurationError,
    CorruptCheckpointError,
    OutlierColumns,
    Outliers,
    PerTensor,
    QuantizationResult,
    QuantizedLayer,
    QuantizedModule,
    Quantizer,
    SafetensorsSerializer,
    kernels,
    load_model,
    sqnr_db,
)
from mono_quant.kernels.outliers import DECOMPOSED
from mono_quant.schemes.outliers import COLUMNS, WEIGHTS
from tests.helpers import ModelT, layer_rows, noise, same_bits, same_tensors, sqnr64
from tests.kernels.cases import CPU, spec_of

WIDE, OUT = 384, 256
LOUD = (5, 77, 300)
OUTLIERS = Quantizer().outliers()
DYNAMIC = OUTLIERS.activations("dynamic")
WEIGHTS_ALONE = OUTLIERS.activations(None)
KINDS = {
    "weights alone": WEIGHTS_ALONE,
    "4-bit": WEIGHTS_ALONE.bits(4),
    "dynamic": DYNAMIC,
    "dynamic per tensor": OUTLIERS.activations("dynamic", granularity="tensor"),
    "dynamic symmetric": OUTLIERS.activations("dynamic", symmetric=True),
    "static": OUTLIERS.activations("static"),
}


def loud(rows: int = 32, by: float = 60.0, seed: int = 3) -> Tensor:
    """Return inputs some of whose channels dwarf the others."""
    x = noise(rows, WIDE, seed=seed)
    x[:, list(LOUD)] *= by
    return x


def linear(bias: bool = True) -> nn.Linear:
    """Return a layer large enough for fast kernels."""
    torch.manual_seed(0)
    return nn.Linear(WIDE, OUT, bias=bias).eval()


def made(quantizer: Quantizer, source: nn.Module, x: Tensor | None = None) -> QuantizedLayer:
    """Return a layer quantized, by data where there is some."""
    fitted = quantizer.fit(x) if x is not None else quantizer
    model = fitted.only("*").apply(source, progress=False).model
    assert isinstance(model, QuantizedLayer)
    return model


def kept(layer: QuantizedModule, name: str = "weight") -> list[int]:
    """Return the columns that are kept apart."""
    found = layer.packed_weights()[name].tensors.get(COLUMNS)
    return found.tolist() if found is not None else []


# --- products ------------------------------------------------------------------------------------


def per_token(x: Tensor) -> Tensor:
    """Return rows on 8-bit asymmetric grids of their own, as torch puts them there."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low) / 255
    zero = (-(low / scale).round()).clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 255)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["reference", None])
def test_inputs_of_the_columns_stay_float_and_the_rest_has_a_range_of_its_own(
    kernel: str | None,
) -> None:
    source, x = linear(), loud()
    layer = made(DYNAMIC, source, x)
    assert kept(layer) == list(LOUD)
    others = [place for place in range(WIDE) if place not in LOUD]
    rest = source.weight[:, others]
    scale = (rest.abs().amax(1) / 127).half().float()
    zeros = torch.zeros(OUT, dtype=torch.int32)
    on_grid = torch.fake_quantize_per_channel_affine(rest, scale, zeros, 0, -128, 127)
    columns = source.weight[:, list(LOUD)].half()
    expected = per_token(x[:, others]).double() @ on_grid.double().t()
    expected += x[:, list(LOUD)].double() @ columns.double().t() + source.bias.double()
    with kernels.use(kernel):
        found = layer(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("quantizer", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(WIDE,), (1, WIDE), (2, 17, WIDE), (0, WIDE)])
def test_the_kernel_computes_what_the_reference_does(
    quantizer: Quantizer, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    layer = made(quantizer, linear(), loud()).to(dtype)
    rows = max(1, torch.Size(shape[:-1]).numel())
    x = loud(rows).to(dtype)[: torch.Size(shape[:-1]).numel()].reshape(shape)
    spec = spec_of(layer)
    assert DECOMPOSED.supports(spec, CPU, dtype) is None
    with kernels.use("reference"):
        expected = layer(x)
    bias = layer.get_parameter("bias")
    found = DECOMPOSED(spec, x, layer.packed_weights()["weight"], bias)
    assert found.dtype == dtype
    room = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=room * largest + 1e-30)


@torch.no_grad()
def test_the_kernel_is_chosen_and_says_what_it_cannot_do() -> None:
    x = loud()
    layer = made(DYNAMIC, linear(), x)
    spec = spec_of(layer)
    assert kernels.select(spec, CPU, torch.float32, 32) is DECOMPOSED
    plain = spec_of(made(Quantizer().activations("dynamic"), linear()))
    assert "no column" in str(DECOMPOSED.supports(plain, CPU, torch.float32))
    assert "float64" in str(DECOMPOSED.supports(spec, CPU, torch.float64))
    assert spec.activation is not None
    on_all = replace(spec, activation=Activation(spec.activation.scheme))
    assert "quantized with the others" in str(DECOMPOSED.supports(on_all, CPU, torch.float32))
    with pytest.raises(RuntimeError, match="does not meet"):
        layer(x[:, :-1])


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["reference", None])
@pytest.mark.parametrize("place", [LOUD[0], 0])
def test_nan_reaches_its_row_and_no_other(kernel: str | None, place: int) -> None:
    x = loud()
    layer = made(DYNAMIC, linear(), x)
    clean = layer(x)
    x[3, place] = torch.nan
    with kernels.use(kernel):
        found = layer(x)
    assert found[3].isnan().all()
    rest = [row for row in range(len(x)) if row != 3]
    torch.testing.assert_close(found[rest], clean[rest], rtol=1e-4, atol=1e-4)


def test_gradients_pass_as_if_inputs_were_on_no_grid() -> None:
    x = loud().requires_grad_()
    layer = made(DYNAMIC, linear(), loud())
    (layer(x).sum()).backward()
    assert x.grad is not None
    expected = layer.packed_weights()["weight"].dequantize().sum(0)
    torch.testing.assert_close(x.grad[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("by", [20.0, 100.0])
def test_inputs_with_loud_channels_gain_what_the_grid_no_longer_spans(
    granularity: str, by: float
) -> None:
    source, x, y = linear(), loud(by=by), loud(by=by, seed=8)
    plain = Quantizer().activations("dynamic", granularity=granularity)
    decibels = [sqnr64([source(y)], [made(one, source, x)(y)]) for one in (plain, plain.outliers())]
    assert decibels[1] > decibels[0] + 12


# --- every kind of layer -------------------------------------------------------------------------


def stretched(module: ModelT) -> ModelT:
    """Return a module with one column of each weight made large."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 and "bias" not in name:
                place = (slice(None), 1) if parameter.dim() == 2 else (slice(None), 0, 0)
                parameter[place] *= 80
    return module.eval()


SOURCES: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(32, 24), noise(5, 32)),
    "conv1d": (nn.Conv1d(8, 16, 3), noise(2, 8, 20)),
    "conv2d": (nn.Conv2d(8, 16, 3, padding=1), noise(2, 8, 6, 6)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=2), noise(2, 8, 6, 6)),
    "transposed": (nn.ConvTranspose2d(8, 16, 3), noise(2, 8, 6, 6)),
    "embedding": (nn.Embedding(40, 32), torch.tensor([[3, 39], [0, 3]])),
    "bag": (nn.EmbeddingBag(40, 32), torch.tensor([[3, 39], [0, 3]])),
    "lstm": (nn.LSTM(32, 16, num_layers=2, bidirectional=True), noise(7, 3, 32)),
    "gru": (nn.GRU(32, 16), noise(7, 3, 32)),
    "cell": (nn.LSTMCell(32, 16), noise(3, 32)),
}


def first(output: object) -> Tensor:
    """Return the first tensor of what a layer returned."""
    while isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor)
    return output


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SOURCES)
def test_a_layer_computes_what_its_dequantized_twin_does(name: str, bits: int) -> None:
    source, x = SOURCES[name]
    source = stretched(copy.deepcopy(source))
    layer = made(WEIGHTS_ALONE.bits(bits), source)
    assert any(kept(layer, one) for one in layer.packed_weights())
    found = first(layer(x))
    twin = copy.deepcopy(layer).dequantize()
    assert type(twin) is type(source)
    torch.testing.assert_close(found, first(twin(x)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("embedding", "bag")])
def test_a_layer_with_quantized_inputs_computes_what_it_should(name: str) -> None:
    source, x = SOURCES[name]
    source = stretched(copy.deepcopy(source))
    layer = made(DYNAMIC, source, x)
    expected = first(source(x))
    assert sqnr64([expected], [first(layer(x))]) > 25


@torch.no_grad()
def test_attention_reads_rows_of_a_weight_with_columns_apart() -> None:
    source = stretched(nn.MultiheadAttention(32, 4, batch_first=True))
    layer = WEIGHTS_ALONE.only("*").apply(source).model
    projection = layer.get_submodule("out_proj")
    assert isinstance(projection, QuantizedModule)
    query, key = noise(2, 5, 32), noise(2, 6, 32, seed=1)
    expected = copy.deepcopy(source)
    assert isinstance(layer, QuantizedModule)
    values = layer.packed_weights()["in_proj_weight"].dequantize()
    assert kept(layer, "in_proj_weight")
    expected.get_parameter("in_proj_weight").copy_(values)
    expected.get_parameter("out_proj.weight").copy_(
        projection.packed_weights()["weight"].dequantize()
    )
    found, _ = layer(query, key, key)
    torch.testing.assert_close(found, expected(query, key, key)[0], rtol=1e-4, atol=1e-4)


def test_h_and_inputs_of_a_recurrent_layer_leave_the_columns_out() -> None:
    source = stretched(nn.LSTM(32, 32))
    layer = made(DYNAMIC, source, noise(7, 3, 32))
    for name, activation in layer.activations().items():
        assert activation.apart is not None
        assert activation.apart.tolist() == kept(layer, name)


def test_inputs_of_convolutions_and_static_ones_are_quantized_whole_and_it_is_said() -> None:
    conv = stretched(nn.Conv2d(8, 16, 3))
    report = DYNAMIC.only("*").apply(conv).report
    assert any("outlier columns are quantized" in one for one in report.warnings)
    model = made(DYNAMIC, conv)
    assert model.activations()["weight"].apart is None
    static = OUTLIERS.activations("static").fit(loud()).apply(linear())
    assert any("on the range of all" in one for one in static.report.warnings)
    dynamic = DYNAMIC.fit(loud()).apply(linear())
    assert not any("outlier columns are" in one for one in dynamic.report.warnings)


# --- copies and files ----------------------------------------------------------------------------


def result(quantizer: Quantizer = DYNAMIC) -> QuantizationResult[nn.Sequential]:
    """Return a model one of whose layers has outliers, and the other none."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(), nn.Linear(OUT, 32)).eval()
    return quantizer.fit(loud()).apply(model, progress=False)


def skeleton() -> nn.Sequential:
    """Return a model to load into."""
    return nn.Sequential(nn.Linear(WIDE, OUT), nn.Linear(OUT, 32)).eval()


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("quantizer", KINDS.values(), ids=KINDS)
def test_files_bring_back_the_same_bits(quantizer: Quantizer, suffix: str, tmp_path: Path) -> None:
    done = result(quantizer)
    path = tmp_path / f"model.{suffix}"
    done.save(path)
    loaded = load_model(path, skeleton())
    assert same_tensors(loaded, done.model)
    assert same_bits(loaded(loud()), done.model(loud()))
    assert done.validate()
    assert path.stat().st_size > done.report.bytes


def test_a_file_with_columns_that_cannot_be_is_refused(tmp_path: Path) -> None:
    done = result()
    path = tmp_path / "model.safetensors"
    done.save(path)
    serializer = SafetensorsSerializer()
    checkpoint = serializer.load(path)
    columns = checkpoint.records["0.weight"].weight.tensors[COLUMNS]
    columns[-1] = WIDE
    serializer.save(checkpoint, path)
    with pytest.raises(CorruptCheckpointError, match="ascending places"):
        serializer.load(path)


@torch.no_grad()
def test_copies_hold_the_same_bits() -> None:
    model, x = result().model, loud()
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_tensors(copied, model)
        assert same_bits(copied(x), expected)
    other = result(DYNAMIC).model
    other.load_state_dict(model.state_dict())
    assert same_bits(other(x), expected)
    with pytest.raises(RuntimeError, match="outlier_columns"):
        result(DYNAMIC.outliers(2)).model.load_state_dict(model.state_dict())


@torch.no_grad()
def test_columns_keep_their_precision_when_a_model_is_moved() -> None:
    model = result().model
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    model.to(torch.bfloat16)
    layer = model[0]
    assert isinstance(layer, QuantizedLayer)
    tensors = layer.packed_weights()["weight"].tensors
    assert tensors[COLUMNS].dtype == torch.int64
    assert same_bits(tensors[WEIGHTS], before["quantized_weights.weight.outlier_weights"])
    assert model(loud().bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("quantizer", [DYNAMIC, WEIGHTS_ALONE.bits(4)], ids=["8", "4"])
def test_a_compiled_and_an_exported_model_compute_the_same(quantizer: Quantizer) -> None:
    done, x = result(quantizer), loud()
    model = done.model
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert sqnr_db(compiled(x), model(x)) > 40  # here products of bfloat16 may be the fastest
    with kernels.use("reference"):
        expected = model(x)
        torch.compiler.reset()
        traced = torch.compile(model, fullgraph=True, backend="eager")
        assert same_bits(traced(x), expected)
    exported = done.export(x).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)


# --- what is said and asked ----------------------------------------------------------------------


def test_the_report_says_how_many_columns_and_which_layers_have_none() -> None:
    report = result().report
    one, other = report.quantized
    assert one.scheme == "8-bit symmetric per-channel, 3 outlier columns in float16"
    assert other.scheme == "8-bit symmetric per-channel"
    assert one.bytes == WIDE * OUT + 2 * OUT + 3 * (8 + 2 * OUT)
    plain = 8 + 16 / WIDE
    assert one.bits_per_weight == pytest.approx(plain + 3 * (64 / OUT + 16) / WIDE)
    assert not any("channel" in line for line in report.warnings)


@pytest.mark.parametrize("observer", ["auto", "mse"])
def test_an_observer_says_of_the_grid_what_it_would_without_the_columns(observer: str) -> None:
    source, quiet = linear(), linear()
    with torch.no_grad():
        source.weight[:, 9] *= 200
        quiet.weight[:, 9] = 0
    quantizer = WEIGHTS_ALONE.bits(4).granularity("channel").observer(weights=observer)
    (found,) = quantizer.apply(source).report.quantized
    (expected,) = quantizer.apply(quiet).report.quantized
    assert found.scheme != expected.scheme
    assert found.ranges == expected.ranges


def test_the_plan_says_what_there_may_be_at_most() -> None:
    row = layer_rows(Quantizer().outliers(), linear())["weight"]
    assert row.scheme is not None
    assert "outlier columns (at most 1/16 of all) in float16" in row.scheme
    assert row.bytes == WIDE * OUT + 2 * OUT + WIDE // 16 * (8 + 2 * OUT)
    assert "dynamic" in row.fate


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        (Quantizer().outliers(), Outliers()),
        (Quantizer().outliers(3), Outliers(columns=3)),
        (Quantizer().outliers(OutlierColumns(9)), Outliers(columns=OutlierColumns(9))),
        (Quantizer().bits(4).outliers(3).asymmetric().granularity("channel"), None),
    ],
)
def test_what_was_asked_for_is_written_down(quantizer: Quantizer, scheme: Outliers | None) -> None:
    expected = scheme or Outliers(Affine(4, symmetric=False), 3)
    (weight,) = quantizer.plan(linear()).weights
    assert weight.recipe is not None
    assert weight.recipe.grid.scheme == expected
    again = Quantizer.from_config(quantizer.to_config())
    assert again.to_config() == quantizer.to_config()
    asked = scheme.columns if scheme is not None else 3
    assert f".outliers({asked!r})" in repr(quantizer)


def test_inputs_are_dynamic_with_data_too_unless_it_is_said() -> None:
    (row,) = OUTLIERS.fit(loud()).apply(linear()).report.quantized
    assert row.activation is not None
    assert row.activation.startswith("dynamic")
    (floats,) = WEIGHTS_ALONE.fit(loud()).apply(linear()).report.quantized
    assert floats.activation is None


def test_an_override_asks_for_columns_of_one_layer() -> None:
    model = nn.Sequential(linear(), nn.Linear(OUT, 32))
    rows = layer_rows(Quantizer().override("0", outliers=4), model)
    assert rows["0.weight"].scheme == "8-bit symmetric per-channel, 4 outlier columns in float16"
    assert rows["1.weight"].scheme == "8-bit symmetric per-channel"
    of_all = Quantizer().outliers(4)
    rows = layer_rows(of_all.override("0", scheme=Affine(8)).override("1", bits=16), model)
    assert rows["0.weight"].scheme == "8-bit symmetric per-channel"
    assert rows["1.weight"].scheme == "float16"


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="already fixes outliers"):
        Quantizer().scheme(Affine(8)).outliers()
    with pytest.raises(ConfigurationError, match="no outliers"):
        Quantizer().bits(16).outliers()
    with pytest.raises(ConfigurationError, match="OutlierColumns"):
        Quantizer.from_config({"settings": {"outliers": {"kind": "minmax"}}})
    with pytest.raises(ConfigurationError, match="1 or more"):
        Quantizer().outliers(0)


def test_a_scheme_of_its_own_keeps_columns_too() -> None:
    scheme = Outliers(Affine(8, granularity=PerTensor()), 2)
    layer = made(Quantizer().scheme(scheme), linear())
    assert len(kept(layer)) == 2
    assert layer.packed_weights()["weight"].scheme == scheme


@torch.no_grad()
def test_the_advice_on_loud_columns_helps() -> None:
    source = linear()
    source.weight[:, 9] *= 200
    x = noise(64, WIDE)
    plain = Quantizer().activations(None).fit(x).apply(source).report
    (line,) = [one for one in plain.warnings if "columns" in one and "times the median" in one]
    assert "override('weight', outliers=OutlierColumns())" in line
    quantizer = Quantizer().activations(None).override("weight", outliers=OutlierColumns())
    mended = quantizer.fit(x).apply(source).report
    assert not any("times the median" in one for one in mended.warnings)
    better, worse = mended.quantized[0].estimated_db, plain.quantized[0].estimated_db
    assert better is not None
    assert worse is not None
    assert better > worse + 20
