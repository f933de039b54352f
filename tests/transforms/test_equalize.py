"""Cross-layer equalization: the same function with its channels in the same ranges."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Change, ConfigurationError, EqualizeLayers, FoldBatchNorm
from tests.helpers import noise, same_tensors
from tests.transforms.models import Block, Branching, lived_in, on


def equalized(model: nn.Module) -> tuple[nn.Module, Sequence[Change]]:
    twin = copy.deepcopy(model)
    return twin, EqualizeLayers().apply(twin)


def uneven(model: nn.Module) -> nn.Module:
    """Return a model whose channels lie in very different ranges, with a zero one in each layer."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                shape = (len(module.weight), *[1] * (module.weight.dim() - 1))
                module.weight *= torch.randn(shape).exp() ** 2
                module.weight[1] = 0
    return model.double().eval()


def assert_same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        before, after = model(x), other(x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12 * float(before.abs().max()))


def ranges(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Return the ranges of the channels between layers 0 and 2 of a model, both ungrouped."""
    first, second = (model[place].get_parameter("weight").detach() for place in (0, 2))
    return first.flatten(1).abs().amax(1), second.transpose(0, 1).flatten(1).abs().amax(1)


MODELS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear": (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.Linear(4, 4)),
        (5, 6),
        2,
    ),
    "linear on sequences": (
        nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(), nn.Linear(8, 4)),
        (5, 3, 6),
        1,
    ),
    "conv1d": (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1)),
        (2, 3, 9),
        1,
    ),
    "conv3d": (
        nn.Sequential(nn.Conv3d(3, 8, 2), nn.ReLU(), nn.Conv3d(8, 4, 2)),
        (2, 3, 5, 5, 5),
        1,
    ),
    "depthwise": (
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 1),
        ),
        (2, 3, 8, 8),
        2,
    ),
    "grouped": (
        nn.Sequential(
            nn.Conv2d(4, 12, 1, groups=2), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=3, bias=False)
        ),
        (2, 4, 8, 8),
        1,
    ),
    "transposed": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
            nn.Conv2d(6, 3, 1),
        ),
        (2, 4, 5, 5),
        2,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_the_same(name: str) -> None:
    model, shape, pairs = MODELS[name]
    model = uneven(copy.deepcopy(model))
    result, changes = equalized(model)
    assert [change.done for change in changes] == [True] * pairs
    assert not any(change.edits for change in changes)
    assert not same_tensors(result, model)
    assert_same(model, result, noise(*shape).double())


def test_both_sides_of_a_channel_come_to_the_geometric_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    before = ranges(model)
    result, (change,) = equalized(model)
    assert isinstance(result, nn.Sequential)
    first, second = ranges(result)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, (before[0] * before[1]).sqrt())
    assert change.text.startswith("0 and 2 are equalized, by 1.")


def test_a_chain_converges() -> None:
    model = uneven(nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]))
    result, changes = equalized(model)
    assert len(changes) == 3
    again, _ = equalized(result)
    for one, other in zip(result.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-12)
    with pytest.raises(ConfigurationError, match="1 or more"):
        EqualizeLayers(sweeps=0)


def test_a_zero_channel_stays_as_it_is() -> None:
    model = uneven(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    result, _ = equalized(model)
    for place in (0, 2):
        before, after = (one.get_submodule(str(place)) for one in (model, result))
        if place == 0:
            assert torch.equal(before.get_parameter("bias")[1], after.get_parameter("bias")[1])
        else:
            column = before.get_parameter("weight")[:, 1]
            assert torch.equal(column, after.get_parameter("weight")[:, 1])


@pytest.mark.parametrize(
    ("between", "said"),
    [(nn.ReLU6(), "relu6"), (nn.GELU(), "gelu(none)"), (nn.Hardtanh(), "clamp(-1, 1)")],
)
def test_what_does_not_pass_a_scale_on_is_refused(between: nn.Module, said: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 4))
    result, (change,) = equalized(model)
    assert same_tensors(model, result)
    assert not change.done
    assert change.text == (
        f"0 and 2 are not equalized: between them is {said}, which does not pass a scale on"
    )


def test_folded_layers_are_equalized_and_open_ones_are_not_pairs() -> None:
    model = lived_in(Block(4, 4))
    assert equalized(model)[1] == ()
    FoldBatchNorm().apply(model)
    result, (change,) = equalized(model)
    assert change.text.startswith("conv1 and conv2 are equalized")
    assert_same(model, result, noise(2, 4, 8, 8).double())


def test_a_tied_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    result, (change,) = equalized(model)
    assert same_tensors(model, result)
    assert "the weight of '0' is also that of '2'" in change.text


def test_a_second_weight_that_code_reads_is_left_alone() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x)) + self.b.weight.sum()
            return result

    model = Read()
    result, (change,) = equalized(model)
    assert same_tensors(model, result)
    assert change.text == "a and b are not equalized: of 'b': sum() reads its weight"


def test_what_would_overflow_is_left_alone_and_the_rest_is_done() -> None:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    model = nn.Sequential(layers[0], layers[1], nn.ReLU6(), layers[2], layers[3]).half()
    with torch.no_grad():
        layers[0].weight *= 1e-6
        layers[0].bias.fill_(6e4)
    result, changes = equalized(model)
    assert [change.done for change in changes] == [False, False, True]
    assert "NaN or infinity in torch.float16" in changes[0].text
    assert all(bool(one.isfinite().all()) for one in result.parameters())


def test_a_model_that_cannot_be_traced_is_left_alone_with_data_too() -> None:
    model = lived_in(Branching())
    (change,) = EqualizeLayers().apply(model, on(noise(2, 3, 8, 8).double()))
    assert not change.done
    assert "no layer is equalized: it cannot be traced" in change.text


def test_what_changes_the_outputs_is_taken_back() -> None:
    class Deep(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self[1](self[0](x)) + _peak(self)
            return result

    model = Deep(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    before = copy.deepcopy(model)
    (change,) = EqualizeLayers().apply(model, on(noise(5, 6).double()))
    assert "changes the model's outputs" in change.text
    assert same_tensors(model, before)


def _peak(model: nn.Module) -> float:
    """Return what a tracer does not see a model read."""
    return float(model.state_dict()["0.weight"].abs().sum())


def test_a_layer_between_two_others_in_half_precision_keeps_its_dtype() -> None:
    model = uneven(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))).half()
    model.requires_grad_(False)
    result, _ = equalized(model)
    assert {one.dtype for one in result.parameters()} == {torch.float16}
    assert not any(one.requires_grad for one in result.parameters())
