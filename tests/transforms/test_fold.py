"""Folding batch normalization: the same function with fewer modules, or a reason why not."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from mono_quant import Change, Edit, FoldBatchNorm, Quantizer, TransformContext
from mono_quant.base import WITHOUT_DATA
from tests.helpers import noise, same_tensors
from tests.transforms.models import (
    Branching,
    Optional,
    Pair,
    ResNet,
    Twice,
    TwoConsumers,
    lived_in,
    on,
)

Layer = type[nn.Module]

KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], int]] = {
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, 1),
    "conv2d": (nn.Conv2d, nn.BatchNorm2d, 2),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, 3),
    "transposed 1d": (nn.ConvTranspose1d, nn.BatchNorm1d, 1),
    "transposed 2d": (nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    "transposed 3d": (nn.ConvTranspose3d, nn.BatchNorm3d, 3),
}


def folded(
    model: nn.Module, context: TransformContext = WITHOUT_DATA
) -> tuple[nn.Module, Sequence[Change]]:
    """Return a folded copy of a model, and what was done."""
    twin = copy.deepcopy(model)
    return twin, FoldBatchNorm().apply(twin, context)


def norms(model: nn.Module) -> int:
    return sum(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules())


def assert_same(model: nn.Module, other: nn.Module, *inputs: Tensor, room: float = 1e-12) -> None:
    with torch.no_grad():
        before, after = model(*inputs), other(*inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=room * float(before.abs().max()))


def refusal(model: nn.Module, context: TransformContext = WITHOUT_DATA) -> str:
    """Return why the only batch normalization of a model is not folded."""
    twin, changes = folded(model, context)
    assert same_tensors(twin, model)
    (change,) = changes
    assert not change.done
    assert change.edits == ()
    assert change.text.startswith(f"{change.path} is not folded: ")
    return change.text


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_takes_its_normalization_in(
    kind: str, bias: bool, affine: bool, groups: int
) -> None:
    conv, norm, dims = KINDS[kind]
    model = lived_in(
        nn.Sequential(
            conv(4, 8, 3, stride=2, groups=groups, bias=bias), norm(8, affine=affine, eps=1e-3)
        )
    )
    x = noise(2, 4, *[7] * dims).double()
    result, changes = folded(model)
    assert_same(model, result, x)
    assert norms(result) == 0
    made = [Edit("identity", "1")] if bias else [Edit("bias", "0"), Edit("identity", "1")]
    assert changes == (Change("1", "1 is folded into 0", True, tuple(made)),)
    assert_same(copy.deepcopy(model).float(), copy.deepcopy(result).float(), x.float(), room=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_depthwise_convolution_takes_its_normalization_in(bias: bool) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(6, 12, 3, groups=6, bias=bias), nn.BatchNorm2d(12)))
    result, _ = folded(model)
    assert_same(model, result, noise(2, 6, 8, 8).double())
    assert norms(result) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parameters_are_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).to(dtype)
    exact, _ = folded(copy.deepcopy(model).double())
    result, _ = folded(model)
    for found, expected in zip(result.parameters(), exact.parameters(), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))


def test_a_normalization_of_another_dtype_is_folded_into_that_of_the_layer() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).float()
    model[0].half()
    result, _ = folded(model)
    assert {parameter.dtype for parameter in result.parameters()} == {torch.float16}


def test_requires_grad_and_strides_stay_as_they_were() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    weight = model[0].get_parameter("weight").requires_grad_(False)
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    result, _ = folded(model)
    weights = [one.get_submodule("0").get_parameter("weight") for one in (model, result)]
    assert weights[0].stride() == weights[1].stride()
    assert [one.requires_grad for one in result.parameters()] == [False, False]


def test_a_residual_network_is_folded_whole() -> None:
    model = lived_in(ResNet())
    result, changes = folded(model)
    assert norms(result) == 0
    assert len(changes) == norms(model) == 6
    assert_same(model, result, noise(2, 3, 16, 16).double())


def test_no_tensor_of_the_source_is_written_to() -> None:
    model = lived_in(ResNet())
    before = copy.deepcopy(model)
    result = Quantizer().transform(FoldBatchNorm()).apply(model, progress=False).model
    assert same_tensors(model, before)
    assert norms(result) == 0
    assert not model.training


def test_a_model_is_as_it_was_after_it_was_traced() -> None:
    class Remembering(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.bn = nn.BatchNorm2d(8)
            self.seen: list[Tensor] = []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            self.count += 1
            self.last = x
            result: Tensor = self.bn(self.conv(x)) * torch.ones(1)
            return result

    model = Remembering().eval()
    names = set(vars(model))
    (change,) = FoldBatchNorm().apply(model)
    assert change.done
    assert set(vars(model)) == names
    assert model.seen == []
    assert float(model.get_buffer("count")) == 0


def test_two_normalizations_in_a_row_are_both_folded() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    result, changes = folded(model)
    assert [change.text for change in changes] == ["1 is folded into 0", "2 is folded into 0"]
    assert_same(model, result, noise(2, 3, 8, 8).double())


def test_identity_and_dropout_between_do_not_hinder() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Identity(), nn.Dropout2d(), nn.BatchNorm2d(8)]
    model = lived_in(nn.Sequential(*layers))
    result, _ = folded(model)
    assert norms(result) == 0
    assert_same(model, result, noise(2, 3, 8, 8).double())


def test_momentum_does_not_matter_and_neither_does_sync() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model = lived_in(nn.Sequential(*layers, nn.SyncBatchNorm(4)))
    result, _ = folded(model)
    assert norms(result) == 0
    assert_same(model, result, noise(2, 3, 8, 8).double())


def test_a_normalization_before_a_convolution_is_not_folded() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)).eval()
    assert "its input comes from the model's input" in refusal(model)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    assert "its input comes from '1', not from a Linear or convolution" in refusal(model.eval())


def test_a_second_consumer_hinders() -> None:
    assert "of 'conv': its output feeds 'bn' and an addition" in refusal(lived_in(TwoConsumers()))


def test_a_convolution_that_is_called_twice_is_left_alone() -> None:
    _, changes = folded(lived_in(Twice()))
    assert [change.text for change in changes] == [
        "bn1 is not folded: of 'conv': it is called 2 times",
        "bn2 is not folded: of 'conv': it is called 2 times",
    ]


def test_a_normalization_that_is_called_twice_is_left_alone() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.Conv2d(3, 3, 3), norm)
    assert "it is called 2 times" in refusal(lived_in(model))


def test_train_mode_is_refused_with_the_call_that_mends_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert "train mode" in refusal(model)
    assert "call model.eval()" in refusal(model)
    model[1].eval()
    assert folded(model)[1][0].done, "frozen: the convolution's mode does not matter"


@pytest.mark.parametrize("flag", [True, False])
def test_a_way_of_calling_that_goes_past_the_normalization_hinders(flag: bool) -> None:
    model = lived_in(Optional(flag))
    assert "depends on how the model is called" in refusal(model)


def test_a_linear_layer_takes_a_normalization_of_matrices_in() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(), nn.BatchNorm1d(8))
    model = lived_in(flat)
    x = noise(5, 3, 4).double()
    result, _ = folded(model)
    assert norms(result) == 0
    assert_same(model, result, x)


def test_a_linear_layer_needs_data_where_the_code_does_not_show_matrices() -> None:
    model = lived_in(nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)))
    assert "not known to see [N, C] alone" in refusal(model)
    assert "not known to see [N, C] alone" in refusal(model, on(noise(4, 8, 6).double()))
    x = noise(4, 6).double()
    result, changes = folded(model, on(x))
    assert changes[0].edits == (Edit("bias", "0"), Edit("identity", "1"))
    assert_same(model, result, x)


def test_a_linear_layer_on_sequences_is_left_alone() -> None:
    model = lived_in(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5)))
    assert "does not have the 8 channels of '0'" in refusal(model, on(noise(4, 5, 6).double()))


def test_a_model_that_cannot_be_traced_is_watched_on_data() -> None:
    model = lived_in(Branching())
    _, changes = folded(model)
    assert all("without example data it cannot be watched" in one.text for one in changes)
    x = noise(2, 3, 8, 8).double()
    result, changes = folded(model, on(x, 2 * x))
    assert [change.text for change in changes] == [
        "bn is folded into conv",
        "head_bn is not folded: folding it changes the model's outputs on the data",
    ]
    assert_same(model, result, x)


def test_code_that_reads_the_normalization_keeps_it() -> None:
    class Curious(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.bn.eps

    model = lived_in(Curious())
    assert "without it" in refusal(model)


def test_code_that_reads_the_weight_keeps_the_normalization() -> None:
    class Regularized(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.conv.weight.sum()

    model = lived_in(Regularized())
    assert "sum() reads its weight" in refusal(model)


@pytest.mark.parametrize("place", ["0", "1"])
def test_hooks_on_either_are_respected(place: str) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model.get_submodule(place).register_forward_hook(lambda module, args, output: None)
    assert "hooks" in refusal(model)


def test_a_hook_on_what_holds_only_one_of_them_is_respected() -> None:
    model = lived_in(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)))
    model[0].register_forward_hook(lambda module, args, output: None)
    assert "'0' has hooks" in refusal(model)


def test_a_weight_that_another_module_uses_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    model[2].weight = model[0].weight
    assert "the weight of '0' is also that of '2'" in refusal(lived_in(model))


def test_a_computed_weight_is_left_alone() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = lived_in(nn.Sequential(conv, nn.BatchNorm2d(8)))
    assert "computed from other parameters" in refusal(model)


def test_statistics_that_are_not_kept_are_refused() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    assert "no running mean" in refusal(model)


def test_a_quantized_layer_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).eval()
    quantized = Quantizer().fold(False).only("0").apply(model, progress=False).model
    (change,) = FoldBatchNorm().apply(quantized)
    assert change.text == "1 is not folded: '0' is quantized"


def test_what_would_overflow_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval().half()
    variance = model[1].running_var
    assert isinstance(variance, Tensor)
    variance.zero_()
    nn.init.constant_(model[1].get_parameter("weight"), 6e4)
    assert "NaN or infinity in torch.float16" in refusal(model)


class Padding(nn.Conv2d):
    """Pads, then convolves: what its parameters say."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, (1, 1, 0, 0)))


class Rectified(nn.Conv2d):
    """Does more than its parameters say."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Standardized(nn.Conv2d):
    """Computes on its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.weight / self.weight.norm(), self.bias)


class NormThenReLU(nn.BatchNorm2d):
    """Does more than normalize."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_subclass_that_pads_is_folded() -> None:
    model = lived_in(nn.Sequential(Padding(3, 8, 3), nn.BatchNorm2d(8)))
    result, _ = folded(model)
    assert norms(result) == 0
    assert_same(model, result, noise(2, 3, 8, 8).double())


@pytest.mark.parametrize("cls", [Rectified, Standardized])
def test_a_subclass_that_computes_something_else_is_not(cls: type[nn.Conv2d]) -> None:
    model = lived_in(nn.Sequential(cls(3, 8, 3), nn.BatchNorm2d(8)))
    assert f"its {cls.__name__} computes something else" in refusal(model)


def test_a_normalization_with_a_forward_of_its_own_is_left_alone() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), NormThenReLU(8)))
    assert "NormThenReLU has a forward of its own" in refusal(model)


def test_a_model_without_normalization_is_not_looked_into() -> None:
    assert FoldBatchNorm().apply(nn.Sequential(nn.Linear(3, 3), nn.ReLU())) == ()
