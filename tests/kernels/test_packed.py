"""Packed weights: for which inputs they are in order, and that none is lost."""

import pytest
import torch
from torch import Tensor

from mono_quant.kernels import onednn
from mono_quant.kernels.packed import PackedWeight
from tests.helpers import noise

pytestmark = pytest.mark.skipif(onednn.refuse_conv() is not None, reason=str(onednn.refuse_conv()))
PLACE = ((1, 1), (1, 1), (1, 1), 1)


def codes(*shape: int) -> Tensor:
    found = torch.randint(0, 256, shape, dtype=torch.uint8)
    return found.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("zero", [False, True])
def test_a_weight_is_packed_for_what_comes_first_and_for_what_comes_twice(
    zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def seen(*given: object) -> Tensor:
        asked.append(given[3] if len(given) > 3 else None)
        return pack(*given)  # type: ignore[arg-type]  # whatever it was called with

    pack = onednn.pack_conv
    monkeypatch.setattr(onednn, "pack_conv", seen)
    weight = torch.randint(-128, 128, (32, 16, 3, 3), dtype=torch.int8)
    scale = noise(32).abs() + 0.1
    zeros = torch.arange(32) - 16 if zero else None
    made = PackedWeight.of(weight, scale, zeros, PLACE)
    asked.clear()
    small, large = codes(1, 16, 7, 7), codes(2, 16, 14, 9)
    values = (weight.double() - (0 if zeros is None else zeros[:, None, None, None])) * scale[
        :, None, None, None
    ].double()
    for x, middle, packed in (
        (small, 3, True),
        (small, 3, False),
        (codes(4, 16, 7, 7), 3, False),  # the batch is no matter
        (large, 3, False),  # once
        (small, 3, False),
        (large, 3, False),
        (large, 3, True),  # twice in a row
        (large, 0, False),
        (large, 0, True),
        (large, 5, False),
        (small, 5, False),
        (large, 5, False),
    ):
        before = len(asked)
        grid = (0.25, middle, 255)
        if zeros is None:
            found = made.product(x, grid, None, None)
        else:
            found = made.corrected(x, grid, torch.zeros(32))
        exact = torch.nn.functional.conv2d((x.double() - middle) * 0.25, values, padding=1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
        assert asked[before:] == ([(x.shape, middle)] if packed else [])
        assert torch.equal(made.weight.to_dense(), weight)


def test_sums_are_added_whatever_the_weight_is_packed_for() -> None:
    weight = torch.randint(-128, 128, (16, 16, 3, 3), dtype=torch.int8)
    made = PackedWeight.of(weight, torch.full((16,), 0.01), None, PLACE)
    for side in (7, 7, 9, 9, 7):
        x, beside = codes(1, 16, side, side), codes(1, 16, side, side)
        exact = torch.nn.functional.conv2d(x.double() - 3, weight.double() * 0.01, padding=1) * 0.25
        total = ((exact + (beside.double() - 5) * 2.0) / 4.0 + 100).round().clamp(0, 255)
        done = made.sum_with(
            x, (0.25, 3, 255), None, (4.0, 100, 255), beside.clone(), (2.0, 5, 255)
        )
        assert (done.double() - total).abs().max() <= 1
