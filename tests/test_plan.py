"""Plans: what is said before a tensor is touched, and what is then done."""

import copy
from collections.abc import Callable, Iterator
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant import (
    Affine,
    CalibrationError,
    ConfigurationError,
    Grid,
    InputError,
    LinearLikeQuantizer,
    PerGroup,
    QTensor,
    QuantizationResult,
    QuantizedModule,
    Quantizer,
    Rounding,
    RoundToNearest,
    Statistic,
    Statistics,
)
from tests.helpers import (
    Doubled,
    TiedModel,
    fates,
    layer_rows,
    noise,
    same_bits,
    same_tensors,
)

Make = Callable[[], nn.Module]
FLOAT8 = "8-bit symmetric per-channel"


class Raw(nn.Module):
    """A parameter of its own beside two layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 64))
        self.inner = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("steps", torch.arange(10))


class Twice(nn.Module):
    """One parameter under two names, and two on one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(3, 64))
        self.two = self.one
        self.three = nn.Parameter(self.one.detach())
        self.inner = nn.Linear(64, 64)
        self.inner.bias = nn.Parameter(torch.zeros(64))
        self.other = nn.Linear(64, 64)
        self.other.bias = self.inner.bias


class Masked(nn.Module):
    """One buffer in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        mask = torch.ones(64)
        for layer in self.layers:
            layer.register_buffer("mask", mask)
            layer.register_buffer("nothing", None)


class Above(nn.Module):
    """A parameter of its own that is also the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Parameter(torch.ones(64, 64))
        self.inner = nn.Linear(64, 64)
        self.inner.weight = self.direct


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.two = self.one


def quantized_before() -> nn.Module:
    return Quantizer().skip("2").apply(mlp(), progress=False).model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16))


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 8))


MODELS: dict[str, Make] = {
    "mlp": mlp,
    "half": lambda: mlp().half(),
    "mixed dtypes": lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()),
    "one layer": lambda: nn.Linear(64, 64),
    "nothing at all": nn.ReLU,
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 3, groups=4)
    ),
    "embeddings": lambda: nn.ModuleDict(
        {"one": nn.Embedding(20, 64), "two": nn.EmbeddingBag(20, 64)}
    ),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(16, 32), nn.Linear(32, 64)]),
    "attention": lambda: nn.MultiheadAttention(64, 4),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128), 2, enable_nested_tensor=False
    ),
    "tied": TiedModel,
    "raw parameters": Raw,
    "one layer under two names": Shared,
    "one parameter under two names": Twice,
    "one buffer in two modules": Masked,
    "a parameter that is also a weight": Above,
    "parametrized": normed,
    "quantized before": quantized_before,
    "without bias": lambda: nn.Linear(64, 64, bias=False),
    "frozen": lambda: mlp().requires_grad_(False),
}
QUANTIZERS = {
    "8 bits": Quantizer(),
    "4 bits": Quantizer().bits(4),
    "3 bits, all of it": Quantizer().bits(3).only("*"),
    "half precision": Quantizer().bits(16),
    "groups that do not divide": Quantizer().group_size(48),
    "float32 scales": Quantizer().bits(5).scale_dtype(torch.float32).asymmetric(),
}


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors that a model holds, those on one memory once."""
    every = (*model.parameters(), *model.buffers())
    tensors = {(tensor.data_ptr(), tensor.shape): tensor for tensor in every}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


# --- before ------------------------------------------------------------------------------------


class Untouchable(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Fails on every operator: nothing may be computed from a tensor, or made."""

    def __torch_dispatch__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        raise AssertionError(f"{func} was called on a tensor")


def untouchable() -> Untouchable:
    return Untouchable()  # type: ignore[no-untyped-call]  # torch's own


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_planning_calls_no_operator_on_any_tensor(name: str, quantizer: str) -> None:
    model = original(name)
    with untouchable():
        plan = QUANTIZERS[quantizer].plan(model)
        text = plan.explain()
    assert text == str(plan)


def test_the_watch_sees_a_tensor_that_is_read() -> None:
    model = mlp()
    with untouchable(), pytest.raises(AssertionError, match="was called on a tensor"):
        weight_of(model, "0").amax()


@pytest.mark.parametrize("name", MODELS)
def test_planning_leaves_the_model_as_it_was(name: str) -> None:
    model = original(name)
    before = copy.deepcopy(model)
    Quantizer().bits(4).plan(model).explain()
    assert repr(model) == repr(before)
    assert same_tensors(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_counted_once(name: str, quantizer: str) -> None:
    model = original(name)
    report = QUANTIZERS[quantizer].plan(model).outline.report
    new = [row for row in report.layers if row.reason != "quantized before"]
    different = {(parameter.data_ptr(), parameter.shape) for parameter in model.parameters()}
    assert sum(row.parameters for row in new) == sum(shape.numel() for _, shape in different)
    assert report.float_bytes == held_bytes(model)
    assert len({row.name for row in report.layers}) == len(report.layers)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_predicted_bytes_are_the_bytes_of_the_result(name: str, quantizer: str) -> None:
    model = original(name)
    plan = QUANTIZERS[quantizer].plan(model)
    result = plan.run(progress=False)
    predicted, found = plan.outline.report, result.report
    assert predicted.bytes == found.bytes == held_bytes(result.model)
    assert predicted.float_bytes == found.float_bytes == held_bytes(model)
    for before, after in zip(predicted.layers, found.layers, strict=True):
        assert (before.name, before.bytes, before.scheme) == (after.name, after.bytes, after.scheme)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_is_what_is_quantized(name: str, quantizer: str) -> None:
    model = original(name)
    result = QUANTIZERS[quantizer].apply(model, progress=False)
    found = {
        f"{path}.{weight}" if path else weight
        for path, module in result.model.named_modules()
        if isinstance(module, QuantizedModule)
        for weight in module.packed_weights()
    }
    assert found == {key for row in result.report.quantized for key in (row.name, *row.aliases)}


def test_predicted_peak_memory_is_the_model_its_result_and_one_layer() -> None:
    outline = Quantizer().plan(mlp()).outline
    report, work = outline.report, 24 * 128 * 64
    assert outline.peak_bytes == report.float_bytes + report.bytes + work
    assert outline.peak_bytes_in_place == report.float_bytes + work


def test_a_plan_is_explained_line_by_line() -> None:
    text = Quantizer().bits(4).skip("2").plan(mlp()).explain()
    head, memory, *rest = text.splitlines()
    assert head == (
        "predicted: 37.18 kB -> 8.83 kB (4.21 times smaller), 1 weights at 4.312 bits per weight"
    )
    assert memory == "peak memory: 242.62 kB for apply, 233.79 kB for apply_"
    table = [line.split("  ") for line in rest if line]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert cells[0] == ["name", "layer", "shape", "before", "after", "bits", "SQNR", "fate"]
    assert cells[1] == [
        *("0.weight", "Linear", "64x128", "32.77 kB", "4.42 kB", "4.31"),
        "4-bit asymmetric per-group 64",
    ]
    assert cells[2][-1] == "float: skipped"
    assert cells[3] == ["(2 biases)", "320 B", "320 B", "32.00", "float: biases stay float"]


class OwnForward(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def pruned() -> nn.Module:
    layer = nn.Linear(64, 64)
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]  # torch's own
    return layer


def buffered() -> nn.Module:
    layer = nn.Linear(64, 64)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


REASONS: list[tuple[Make, Quantizer, str, str]] = [
    (mlp, Quantizer().skip("2"), "2.weight", "skipped"),
    (mlp, Quantizer().only("2"), "0.weight", "not among only(...)"),
    (
        mlp,
        Quantizer().group_size(48),
        "2.weight",
        "a group of 48 does not divide a row of 64",
    ),
    (Raw, Quantizer(), "norm", "no quantizer knows a LayerNorm"),
    (Raw, Quantizer(), "(root)", "no quantizer knows a Raw"),
    (lambda: nn.Sequential(nn.LSTM(4, 4)), Quantizer(), "0", "no quantizer knows a LSTM"),
    (mlp, Quantizer(), "(2 biases)", "biases stay float"),
    (
        lambda: nn.MultiheadAttention(64, 4),
        Quantizer(),
        "out_proj.weight",
        "MultiheadAttention reads this weight by attribute and never calls the layer",
    ),
    (
        lambda: nn.Sequential(nn.Embedding(9, 64, max_norm=1.0)),
        Quantizer(),
        "0.weight",
        "max_norm rewrites the weight at each call",
    ),
    (
        lambda: nn.Sequential(OwnForward(64, 64)),
        Quantizer(),
        "0.weight",
        "OwnForward is a Linear with a forward of its own; if it may be quantized all the same, "
        "say layer(LinearQuantizer(own_forward=True))",
    ),
    (
        lambda: nn.Sequential(pruned()),
        Quantizer(),
        "0.weight",
        "its weight is made by a hook (old-style weight_norm, spectral_norm or pruning): "
        "remove that, or use torch.nn.utils.parametrizations",
    ),
    (
        lambda: nn.Sequential(nn.Embedding(9, 64)),
        Quantizer().bits(4),
        "0.weight",
        "embeddings stay float below 8 bits unless asked for",
    ),
    (
        lambda: nn.Sequential(nn.Linear(8, 8)),
        Quantizer().bits(4),
        "0.weight",
        "fewer than 512 values, below 8 bits unless asked for",
    ),
]


@pytest.mark.parametrize("place", range(len(REASONS)))
def test_what_stays_float_says_why(place: int) -> None:
    make, quantizer, name, reason = REASONS[place]
    row = layer_rows(quantizer, make())[name]
    assert row.scheme is None
    assert row.reason == reason
    assert row.bytes == row.float_bytes


def test_a_weight_that_is_a_buffer_stays_float_and_its_model_can_be_planned() -> None:
    model = nn.Sequential(buffered(), nn.Linear(64, 64))
    result = Quantizer().apply(model, progress=False)
    assert [row.name for row in result.report.quantized] == ["1.weight"]
    assert result.report.float_bytes == held_bytes(model)
    assert type(result.model[0]) is nn.Linear


def test_what_was_quantized_before_is_counted_and_left_alone() -> None:
    once = Quantizer().skip("2").apply(mlp(), progress=False)
    plan = Quantizer().bits(16).plan(once.model)
    rows = {row.name: row for row in plan.outline.report.layers}
    assert rows["0.weight"].fate == f"{FLOAT8}; quantized before"
    assert rows["2.weight"].fate == "float16"
    twice = plan.run(progress=False)
    first, second = once.model[0], twice.model[0]
    assert isinstance(first, QuantizedModule)
    assert isinstance(second, QuantizedModule)
    assert same_tensors(first, second)


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_weight_that_is_not_finite_is_planned_and_then_refused_by_name(
    bad: float, in_place: bool
) -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "2")[3, 5] = bad
    plan = Quantizer().plan(model)
    assert "2.weight" in plan.explain()
    message = (
        r"2\.weight holds NaN or infinity; mend the weight, or leave .* float with skip\('2'\)"
    )
    with pytest.raises(InputError, match=message):
        plan.run(in_place=in_place, progress=False)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_weight_that_is_not_finite_may_stay_float() -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "2").fill_(float("nan"))
    result = Quantizer().skip("2").apply(model, progress=False)
    assert [row.name for row in result.report.quantized] == ["0.weight"]


def test_a_weight_that_does_not_fit_its_grid_is_refused_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "2")[0, 0] = 1e6
    with pytest.raises(InputError, match=r"2\.weight cannot be quantized: values up to 1e\+06"):
        Quantizer().bits(16).apply(model, progress=False)


# --- ties --------------------------------------------------------------------------------------

SKIPPED = "float: tied to 'head.weight', which stays float: skipped; also head.weight"


@pytest.mark.parametrize(
    ("quantizer", "fate"),
    [
        (Quantizer(), f"{FLOAT8}; also head.weight"),
        (
            Quantizer().bits(4),
            "float: embeddings stay float below 8 bits unless asked for; also head.weight",
        ),
        (
            Quantizer().bits(4).override("head", bits=4),
            "4-bit asymmetric per-group 64; also head.weight",
        ),
        (Quantizer().bits(4).override("head", bits=8), f"{FLOAT8}; also head.weight"),
        (Quantizer().bits(4).override("embedding", bits=8), f"{FLOAT8}; also head.weight"),
        (
            Quantizer().bits(4).only("embedding", "head"),
            "4-bit asymmetric per-group 64; also head.weight",
        ),
        (
            Quantizer().override("head", bits=5).override("embedding", bits=5),
            "5-bit asymmetric per-group 64; also head.weight",
        ),
        (Quantizer().skip("head"), SKIPPED),
        (Quantizer().skip("embedding"), "float: skipped; also head.weight"),
        (Quantizer().override("embedding", bits=4).skip("head"), SKIPPED),
        (
            Quantizer().only("embedding"),
            "float: tied to 'head.weight', which stays float: not among only(...); "
            "also head.weight",
        ),
        (
            Quantizer().group_size(48),
            "float: a group of 48 does not divide a row of 64; also head.weight",
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Quantizer) else "",
)
def test_tied_weights_share_one_fate(quantizer: Quantizer, fate: str) -> None:
    model = TiedModel()
    found = fates(quantizer, model)
    assert found["embedding.weight"] == fate
    assert "head.weight" not in found
    result = quantizer.apply(model, progress=False)
    embedding, head = result.model.embedding, result.model.head
    assert isinstance(embedding, QuantizedModule) == isinstance(head, QuantizedModule)
    assert isinstance(embedding, QuantizedModule) != fate.startswith("float")
    if isinstance(embedding, QuantizedModule) and isinstance(head, QuantizedModule):
        first, second = embedding.packed_weights()["weight"], head.packed_weights()["weight"]
        assert all(first.tensors[name] is second.tensors[name] for name in first.tensors)
    else:
        assert head.weight is embedding.weight
    assert result.report.bytes == held_bytes(result.model)
    assert result.model(torch.arange(64)).shape == (64, 64)


def test_tied_weights_asked_for_two_things_are_refused() -> None:
    quantizer = Quantizer().override("head", bits=4).override("embedding", bits=8)
    message = "embedding.weight and head.weight are one tied weight, and different things are asked"
    with pytest.raises(ConfigurationError, match=message):
        quantizer.plan(TiedModel())


def test_a_fork_without_the_tie_may_ask_for_two_things() -> None:
    model = TiedModel()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    quantizer = Quantizer().override("head", bits=4).override("embedding", bits=8)
    found = fates(quantizer, model)
    assert found["head.weight"] == "4-bit asymmetric per-group 64"
    assert found["embedding.weight"] == FLOAT8


def test_a_weight_tied_to_a_parameter_that_no_layer_reads_stays_float() -> None:
    model = Raw()
    model.direct = model.inner.weight
    rows = layer_rows(Quantizer(), model)
    assert rows["inner.weight"].reason == "tied to 'direct', which no layer quantizer reads"
    report = Quantizer().apply(model, progress=False).report
    assert not report.quantized
    assert report.bytes == held_bytes(model)


def test_parameters_on_one_memory_are_tied_though_they_are_two_objects() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in (model[1], model[2]):
        layer.register_parameter("weight", nn.Parameter(weight_of(model, "0").detach()))
    assert fates(Quantizer(), model) == {"0.weight": f"{FLOAT8}; also 1.weight, 2.weight"}
    result = Quantizer().apply(model, progress=False)
    layers = [layer for layer in result.model if isinstance(layer, QuantizedModule)]
    assert len({id(layer.packed_weights()["weight"].tensors["codes"]) for layer in layers}) == 1
    assert len(layers) == 3


def test_equal_values_in_two_places_are_no_tie() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    copied = nn.Parameter(weight_of(model, "0").detach().clone())
    model[1].register_parameter("weight", copied)
    assert fates(Quantizer().skip("0"), model)["1.weight"] == FLOAT8


class Turned(nn.Module):
    """A layer whose weight is ``[in, out]``."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_that_two_layers_read_in_two_shapes_stays_float() -> None:
    linear = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(linear, Turned(linear.get_parameter("weight")))
    turned = LinearLikeQuantizer(f"{__name__}.Turned", transposed=True)
    found = fates(Quantizer().layer(turned), model)
    assert found == {
        "0.weight": "float: tied to a layer that reads the weight in another shape; also 1.weight"
    }
    assert fates(Quantizer().layer(turned), nn.Sequential(model[1])) == {"0.weight": FLOAT8}


def test_one_layer_under_two_names_is_quantized_once() -> None:
    result = Quantizer().apply(Shared(), progress=False)
    assert [row.name for row in result.report.quantized] == ["one.weight"]
    assert result.model.one is result.model.two


# --- statistics --------------------------------------------------------------------------------


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


# --- transforms --------------------------------------------------------------------------------


def dequantized(result: QuantizationResult[nn.Sequential], place: int) -> Tensor:
    layer = result.model[place]
    assert isinstance(layer, QuantizedModule)
    return layer.packed_weights()["weight"].dequantize()


def test_a_transform_is_applied_to_a_copy_and_leaves_the_source_alone() -> None:
    model = mlp()
    before = copy.deepcopy(model)
    plain = Quantizer().apply(model, progress=False)
    result = Quantizer().transform(Doubled()).apply(model, progress=False)
    assert same_tensors(model, before)
    for place in (0, 2):
        assert same_bits(dequantized(result, place), dequantized(plain, place) * 2)


def test_a_transform_reaches_what_stays_float() -> None:
    model = mlp()
    result = Quantizer().skip("2").transform(Doubled()).apply(model, progress=False)
    doubled = weight_of(model, "2").detach() * 2
    assert same_bits(weight_of(result.model, "2").detach(), doubled)


def test_the_damage_of_a_transform_is_measured_against_the_source() -> None:
    result = Quantizer().transform(Doubled()).fit(noise(8, 128)).apply(mlp(), progress=False)
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db < 0  # the outputs are four times too large


def test_in_place_a_transform_changes_the_model_itself() -> None:
    torch.manual_seed(0)
    model = mlp()
    copied = Quantizer().transform(Doubled()).fit(noise(8, 128)).apply(model, progress=False)
    result = Quantizer().transform(Doubled()).fit(noise(8, 128)).apply_(model, progress=False)
    assert result.model is model
    assert same_tensors(result.model, copied.model)
    assert result.report == copied.report


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_in_place_gives_the_bytes_that_a_copy_gives(name: str) -> None:
    model = original(name)
    copied = Quantizer().bits(4).only("*").apply(model, progress=False)
    placed = Quantizer().bits(4).only("*").plan(model).run(in_place=True, progress=False)
    assert placed.model is model
    assert same_tensors(placed.model, copied.model)
    assert placed.report == copied.report


def test_the_same_plan_gives_the_same_bytes_again() -> None:
    model = mlp()
    plan = Quantizer().bits(4).fit(noise(8, 128)).plan(model)
    first, second = plan.run(progress=False), plan.run(progress=False)
    assert same_tensors(first.model, second.model)
    assert first.report == second.report


def test_the_damage_of_each_weight_is_its_sqnr_in_float64() -> None:
    model = mlp()
    result = Quantizer().bits(4).apply(model, progress=False)
    for place, row in zip((0, 2), result.report.quantized, strict=True):
        weight = weight_of(model, str(place)).detach().to(torch.float64)
        error = weight - dequantized(result, place).to(torch.float64)
        expected = 10 * torch.log10(weight.square().sum() / error.square().sum())
        assert row.sqnr_db == pytest.approx(float(expected), abs=1e-4)


def test_the_damage_of_the_output_is_its_sqnr_in_float64() -> None:
    model, data = mlp(), [noise(4, 128), noise(3, 128, seed=1)]
    result = Quantizer().bits(4).fit(data).apply(model, progress=False)
    with torch.no_grad():
        expected, found = model(torch.cat(data)).double(), result.model(torch.cat(data)).double()
    ratio = expected.square().sum() / (expected - found).square().sum()
    assert result.report.samples == 7
    assert result.report.output_sqnr_db == pytest.approx(float(10 * ratio.log10()), abs=1e-3)


def test_a_weight_that_changes_when_it_is_read_in_train_mode_is_read_in_eval() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(64, 64)))
    before = copy.deepcopy(model)
    trained = Quantizer().apply(model.train(), progress=False)
    assert same_tensors(model, before)
    assert trained.model.training
    calm = Quantizer().apply(copy.deepcopy(before).eval(), progress=False)
    assert same_tensors(trained.model, calm.model)


def test_a_scale_that_half_precision_cannot_hold_is_said_and_counted() -> None:
    model = mlp()
    with torch.no_grad():
        weight_of(model, "0")[3] *= 1e-7
    plan = Quantizer().plan(model)
    report = plan.run(progress=False).report
    row = next(row for row in report.layers if row.name == "0.weight")
    assert row.note is not None
    assert "its scales are float32" in row.note
    assert row.bytes == 64 * 128 + 64 * 4
    assert report.bytes == plan.outline.report.bytes + 64 * 2
    assert any("its scales are float32" in warning for warning in report.warnings)


def test_what_was_left_out_of_each_batch_is_said() -> None:
    data = [(noise(4, 128), torch.zeros(4))]
    report = Quantizer().fit(data).apply(mlp(), progress=False).report
    assert any("the last 1 of 2 items of each batch were left out" in note for note in report.notes)


def test_a_plan_that_quantizes_nothing_says_so() -> None:
    plan = Quantizer().skip("*").plan(mlp())
    assert "no weight is quantized by this" in plan.explain()
    result = plan.run(progress=False)
    assert result.report.ratio == 1
    assert same_tensors(result.model, plan.run(progress=False).model)


def test_a_weight_plan_knows_where_its_values_are() -> None:
    plan = Quantizer().bits(4).group_size(32).plan(normed())
    first, second = plan.weights
    assert first.key == "0.weight"
    assert first.sources == (
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    )
    assert first.parameters == 64 * 64 + 64
    assert second.sources == ("1.weight",)
    assert first.recipe is not None
    assert first.recipe.grid.scheme == Affine(4, False, PerGroup(32))
