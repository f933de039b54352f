"""Small models that the command line finds by name, and functions that are no use as factories."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant import Affine, register

NOT_CALLABLE = 7


class Tied(nn.Module):
    """An embedding whose table is the output head too, called with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        scores: Tensor = self.head(self.table(ids) * mask.unsqueeze(-1))
        return scores


@register
@attrs.frozen
class Renamed(Affine):
    """A scheme that only those know who import this module."""

    kind: ClassVar[str] = "renamed_for_the_command_line"


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(1152, 10)
    ).eval()


def training() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).train()


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 10))


def deeper() -> nn.Module:
    return nn.Sequential(*small().children(), nn.Linear(10, 10))


def talkative() -> nn.Module:
    print("making a model")  # noqa: T201  # it is what is tested
    return small()


def failing() -> nn.Module:
    raise RuntimeError("out of luck")


def a_number() -> int:
    return 7


def doubled(model: nn.Module, batch: dict[str, Tensor]) -> object:
    return model(2 * batch["x"])


class Chooses(nn.Module):
    """Returns no floating tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found.argmax(-1)


def not_finite() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = torch.nan
    return model
