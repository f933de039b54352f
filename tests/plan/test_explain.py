"""What a plan says of each layer, and why some stay float."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mono_quant import (
    GPTQ,
    LearnedRounding,
    QuantizedModule,
    Quantizer,
    RoundToNearest,
)
from tests.helpers import (
    layer_rows,
    same_tensors,
)
from tests.plan.models import FLOAT8, Make, Raw, held_bytes, mlp


def test_predicted_peak_memory_is_the_model_its_result_and_one_layer() -> None:
    outline = Quantizer().plan(mlp()).outline
    report, work = outline.report, 12 * 128 * 64
    assert outline.peak_bytes == report.float_bytes + report.bytes + work
    assert outline.peak_bytes_in_place == report.float_bytes + work


def test_a_plan_is_explained_line_by_line() -> None:
    text = Quantizer().bits(4).skip("2").plan(mlp()).explain()
    head, memory, *rest = text.splitlines()
    assert head == (
        "predicted: 37.18 kB -> 8.83 kB (4.21 times smaller), 1 weights at 4.312 bits per weight"
    )
    assert memory == "peak memory: 144.32 kB for apply, 135.49 kB for apply_"
    table = [line.split("  ") for line in rest if line]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert cells[0] == "name layer shape before after bits fate".split()
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


def parametrized_lstm() -> nn.Module:
    layer = nn.LSTM(4, 4)
    parametrizations.weight_norm(layer, "weight_hh_l0")
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
    (
        lambda: nn.Sequential(nn.PReLU(4)),
        Quantizer(),
        "0",
        "no quantizer knows a PReLU",
    ),
    (
        lambda: nn.Sequential(parametrized_lstm()),
        Quantizer(),
        "0.weight_ih_l0",
        "a weight of it is parametrized: make the weight an ordinary one with "
        "torch.nn.utils.parametrize.remove_parametrizations",
    ),
    (mlp, Quantizer(), "(2 biases)", "biases stay float"),
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


def test_the_peak_of_memory_counts_what_a_block_of_roundings_holds() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)) for _ in range(3)))
    quantizer = Quantizer().bits(4).fit([torch.ones(2, 64)])
    plain, gptq, learned = (
        quantizer.rounding(rounding).plan(model).outline
        for rounding in (RoundToNearest(), GPTQ(), LearnedRounding(start=RoundToNearest()))
    )
    moments = max(GPTQ().work_bytes((1, 32, 64)), GPTQ().work_bytes((1, 64, 32)))
    assert moments == 20 * 64 * 64  # bytes of each element, and the elements
    assert gptq.peak_bytes - plain.peak_bytes == moments  # lists in lists: a layer is a block
    assert learned.peak_bytes - plain.peak_bytes == 12 * 4 * 64 * 32
    assert plain.peak_bytes_in_place is not None
    assert gptq.peak_bytes_in_place == plain.peak_bytes_in_place + moments
