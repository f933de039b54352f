"""Where models lie; tests on a device that is no CPU are in `test_gpu`."""

import torch
from torch import nn

from mono_quant.devices import devices_of, move

META, CPU = torch.device("meta"), torch.device("cpu")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))


def test_modules_with_tensors_of_their_own_are_told() -> None:
    made = model()
    assert devices_of(made) == {"0": CPU, "1.0": CPU}
    made[0].to(META)
    assert devices_of(made) == {"1.0": CPU}


def test_modules_are_moved_by_their_paths() -> None:
    made = model()
    move(made, {"1": CPU, "1.0": META, "0": CPU})
    assert devices_of(made) == {"0": CPU}
    assert {tensor.device for tensor in made[1].parameters()} == {META}
    made = model()
    before = list(made.parameters())
    move(made, devices_of(made))
    assert all(one is other for one, other in zip(made.parameters(), before, strict=True))
    move(made, {"0": META})
    assert {tensor.device for tensor in made.parameters()} == {META}
    move(model(), {})
