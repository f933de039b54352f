"""What a plan says of batch normalizations before a tensor is touched, and what comes of it."""

import copy
from collections.abc import Callable

import pytest
from torch import nn

from mono_quant import FoldBatchNorm, Quantizer
from tests.plan.test_accounting import untouchable
from tests.transforms.models import Branching, Pair, ResNet, lived_in
from tests.transforms.test_fold import Padding, Rectified
from tests.transforms.test_wirings import Anything, Asking, Dense, Upsampling


def in_a_row() -> nn.Module:
    """Return layers with two normalizations in a row, one that is free of parameters, and one
    that follows no layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 64),
        nn.BatchNorm1d(64, affine=False),
    )


MODELS: list[Callable[[], nn.Module]] = [in_a_row, ResNet, Dense, Upsampling, Pair, Anything]


@pytest.mark.parametrize("make", MODELS)
def test_what_is_foreseen_comes_true(make: Callable[[], nn.Module]) -> None:
    model = lived_in(make())
    with untouchable() as watch:
        foreseen = FoldBatchNorm().foresee(model, has_data=False)
    assert not watch.seen
    done = FoldBatchNorm().apply(copy.deepcopy(model))
    assert [(one.path, one.done, one.edits) for one in foreseen] == [
        (one.path, one.done, one.edits) for one in done
    ]
    for before, after in zip(foreseen, done, strict=True):
        assert after.text == before.text.replace("is to be folded", "is folded")


def fates(quantizer: Quantizer, model: nn.Module) -> dict[str, str]:
    """Return what a plan says of each row that is no weight."""
    return {row.name: row.fate for row in quantizer.plan(model).outline.report.kept}


def test_a_plan_says_what_is_folded_into_which_layer_and_what_stays() -> None:
    model = lived_in(in_a_row()).float()
    plan = Quantizer().plan(model)
    found = fates(Quantizer(), model)
    assert found["1"] == found["2"] == "float: it is to be folded into 0"
    assert found["4"] == (
        "float: it is not folded: its input comes from '3', not from a Linear or convolution"
    )
    text = plan.explain()
    assert "3 changes before or after quantizing: 1 is to be folded into 0, ..." in text
    assert "left alone: 4 is not folded" in text
    report = plan.run(progress=False).report
    left = [row.fate for row in report.kept if row.name == "4"]
    assert left == [found["4"]]
    assert not any(row.name in ("1", "2") for row in report.kept)


@pytest.mark.parametrize("make", MODELS)
def test_predicted_bytes_are_those_of_the_folded_model(make: Callable[[], nn.Module]) -> None:
    plan = Quantizer().bits(16).fold().plan(lived_in(make()).float())
    predicted, found = plan.outline.report, plan.run(progress=False).report
    assert (predicted.float_bytes, predicted.bytes) == (found.float_bytes, found.bytes)
    assert predicted.bytes < predicted.float_bytes / 1.9


@pytest.mark.parametrize(
    "quantizer", [Quantizer().fold(False), Quantizer().activations(None), Quantizer().bits(4)]
)
def test_where_nothing_is_folded_a_plan_does_not_say_so(quantizer: Quantizer) -> None:
    model = lived_in(in_a_row()).float()
    assert fates(quantizer, model)["1"] == "float: no quantizer knows a BatchNorm2d"
    assert "folded" not in quantizer.plan(model).explain()


def test_folding_that_was_asked_for_is_foreseen_for_weights_alone_too() -> None:
    quantizer = Quantizer().activations(None).fold()
    assert fates(quantizer, lived_in(in_a_row()).float())["1"].endswith("folded into 0")


@pytest.mark.parametrize("make", [Asking, Branching])
def test_what_the_data_decides_is_left_open(make: Callable[[], nn.Module]) -> None:
    model = lived_in(make())
    for change in FoldBatchNorm().foresee(model, has_data=True):
        assert change.text.startswith(
            f"{change.path} is to be folded if the data shows what it follows, since "
        )
        assert not change.edits
    without = FoldBatchNorm().foresee(model, has_data=False)
    assert all("without example data it cannot be watched" in change.text for change in without)
    assert not any(change.done for change in without)


def test_whether_a_linear_layer_returns_matrices_is_left_to_the_data() -> None:
    model = lived_in(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    (change,) = FoldBatchNorm().foresee(model, has_data=True)
    assert change.text == "1 is to be folded if the data shows that it sees [N, C] alone"
    (change,) = FoldBatchNorm().foresee(model, has_data=False)
    assert "1 is not folded: it is not known to see [N, C] alone" in change.text


@pytest.mark.parametrize("kind", [Padding, Rectified])
def test_a_forward_of_its_own_is_said_to_be_tried(kind: type[nn.Conv2d]) -> None:
    model = lived_in(nn.Sequential(kind(3, 8, 3), nn.BatchNorm2d(8)))
    (change,) = FoldBatchNorm().foresee(model, has_data=False)
    assert change.text == (
        f"1 is to be folded into 0, if its {kind.__name__} computes what its parameters say"
    )
