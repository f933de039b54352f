"""Ways in which real models are wired, each folded to the same function."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mono_quant import FoldBatchNorm, TransformContext
from tests.helpers import noise
from tests.transforms.models import Pair, lived_in, on


class Dense(nn.Module):
    """Every layer sees the outputs of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features.append(functional.relu(norm(conv(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class Upsampling(nn.Module):
    """A transposed convolution whose normalization has a second name."""

    def __init__(self) -> None:
        super().__init__()
        up = nn.ConvTranspose2d(3, 6, 2, 2, groups=3)
        self.up = nn.Sequential(nn.Sequential(up, nn.BatchNorm2d(6)), nn.ReLU())
        self.alias = self.up.get_submodule("0.1")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(x)
        return result


class WithoutGradient(Pair):
    """Decorated."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Checkpointed(Pair):
    """Calls its modules from a function that another one calls."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class Anything(Pair):
    """Takes whatever it is given."""

    def forward(self, *args: Tensor, **options: object) -> Tensor:
        return super().forward(args[0])


class Optioned(Pair):
    """Takes options by keyword."""

    def forward(self, x: Tensor, *, scale: float = 2.0, sizes: tuple[int, int] = (1, 2)) -> Tensor:
        return super().forward(x) * scale


class Asking(Pair):
    """Asks for the shape of its input, and goes two ways."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.dim() == 4 else x[None])


class Random(Pair):
    """Adds noise at each call."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) + torch.randn(1, dtype=x.dtype)
        return result


@pytest.mark.parametrize(
    "cls", [Dense, Upsampling, WithoutGradient, Checkpointed, Anything, Optioned]
)
def test_it_is_folded_without_data(cls: type[nn.Module]) -> None:
    model = lived_in(cls())
    result = copy.deepcopy(model)
    assert all(change.done for change in FoldBatchNorm().apply(result))
    assert not any(isinstance(one, nn.BatchNorm2d) for one in result.modules())
    x = noise(2, 3, 9, 9).double()
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [Asking, Random])
def test_it_is_folded_with_data(cls: type[nn.Module]) -> None:
    model = lived_in(cls())
    state = torch.get_rng_state()
    (change,) = FoldBatchNorm().apply(model, on(noise(2, 3, 9, 9).double()))
    assert change.text == "bn is folded into conv"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recurrent_model_is_folded_before_and_after_its_lstm() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn1 = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
            self.lstm = nn.LSTM(8, 4, batch_first=True)
            self.fc, self.bn2 = nn.Linear(4, 2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            _, (hidden, _) = self.lstm(self.bn1(self.conv(x)).transpose(1, 2))
            result: Tensor = self.bn2(self.fc(hidden[-1]))
            return result

    model = lived_in(Recurrent())
    x = noise(2, 3, 9).double()
    assert [one.done for one in FoldBatchNorm().apply(copy.deepcopy(model))] == [True, False]
    result = copy.deepcopy(model)
    assert [one.done for one in FoldBatchNorm().apply(result, on(x))] == [True, True]
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_model_made_by_tracing_is_traced_again() -> None:
    model = fx.symbolic_trace(lived_in(Pair()))
    (change,) = FoldBatchNorm().apply(model)
    assert change.done
    assert model(noise(2, 3, 9, 9).double()).shape == (2, 8, 7, 7)


def test_one_pair_that_fails_does_not_cost_the_others() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Pair(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.other(self.one(x))
            result: Tensor = hidden * float(self.state_dict()["other.0.weight"].abs().sum())
            return result

    model = lived_in(Half())
    changes = FoldBatchNorm().apply(model, on(noise(2, 3, 9, 9).double()))
    assert [change.done for change in changes] == [True, False]
    assert isinstance(model.get_submodule("other.1"), nn.BatchNorm2d)


def test_a_model_that_fails_once_folded_is_put_back() -> None:
    def outputs(model: nn.Module) -> Iterator[list[Tensor]]:
        if not isinstance(model.get_submodule("bn"), nn.BatchNorm2d):
            raise RuntimeError("where is bn?")
        yield [model(noise(2, 3, 9, 9).double()).detach()]

    model = lived_in(Pair())
    (change,) = FoldBatchNorm().apply(model, TransformContext(outputs))
    assert "the model fails on the data (where is bn?)" in change.text
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_a_mean_that_is_not_finite_is_no_reason_to_fold_it() -> None:
    model = lived_in(Pair())
    mean = model.bn.running_mean
    assert isinstance(mean, Tensor)
    mean[0] = float("nan")
    (change,) = FoldBatchNorm().apply(model)
    assert "NaN or infinity" in change.text
