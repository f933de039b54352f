"""What reaches the product of a layer with a forward of its own, found without computing it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.layers.reaching import reaching
from tests.helpers import noise


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(input, self._around()))

    def _around(self) -> tuple[int, ...]:
        return (1, 0, 1, 0)


class Given(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = self._conv_forward(2 * input, self.weight, self.bias)
        return made


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 3) + 1


class Twice(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + super().forward(-input)


class Looped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        for _ in range(3):
            input = super().forward(input).relu()
        return input


class Helped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self._more(input)

    def _more(self, input: Tensor) -> Tensor:
        return self._again(2 * input)

    def _again(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Inside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first: Tensor = super()._conv_forward(input, weight, bias)
        second: Tensor = super()._conv_forward(-input, weight, bias)
        return first + second


X, ROWS = noise(2, 3, 6, 6), noise(4, 8)

CASES: dict[str, tuple[nn.Module, type[nn.Module], Tensor, list[Tensor], int]] = {
    "padded": (Padded(3, 4, 3), nn.Conv2d, X, [functional.pad(X, (1, 0, 1, 0))], 0),
    "given": (Given(3, 4, 3), nn.Conv2d, X, [2 * X], 0),
    "scaled": (Scaled(8, 8), nn.Linear, ROWS, [3 * ROWS], 0),
    "twice": (Twice(3, 4, 3), nn.Conv2d, X, [X, -X], 2),
    "helped": (Helped(8, 8), nn.Linear, ROWS, [ROWS, 2 * ROWS], 2),
    "inside": (Inside(3, 4, 3), nn.Conv2d, X, [X, -X], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_what_reaches_a_product_is_found_and_one_product_is_not_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, known, x, expected, products = CASES[name]
    computed = 0

    def counting(*args: object) -> Tensor:
        nonlocal computed
        computed += 1
        made: Tensor = product(*args)
        return made

    function = "conv2d" if known is nn.Conv2d else "linear"
    product = getattr(functional, function)
    monkeypatch.setattr(functional, function, counting)
    with torch.no_grad():
        found = reaching(layer, known, (x,), {})
    assert computed == products
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_every_turn_of_a_loop_is_seen() -> None:
    layer = Looped(8, 8)
    with torch.no_grad():
        found = reaching(layer, nn.Linear, (ROWS,), {})
        second = nn.Linear.forward(layer, ROWS).relu()
    assert len(found) == 3
    assert torch.equal(found[0], ROWS)
    assert torch.equal(found[1], second)
