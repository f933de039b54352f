"""The choice among kernels: the first that can do what is asked of it."""

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer, kernels
from mono_quant.base import KernelSpec, PackedTensor
from tests.helpers import noise, same_bits


@attrs.frozen
class Negative:
    """Does static inputs of one dtype, and gives the product with its sign turned."""

    name: str = "negative"
    asked: list[tuple[str, torch.dtype]] = attrs.field(factory=list)

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        self.asked.append((device.type, dtype))
        static = spec.activation is not None and spec.activation.mode == "static"
        return None if static and dtype == torch.float32 else "static inputs of float32 only"

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        return -kernels.REFERENCE(spec, x, weight, bias)


def test_a_kernel_is_asked_for_scheme_inputs_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, source = noise(3, 64), nn.Linear(64, 8)
    dynamic, static = Quantizer().apply(source).model, Quantizer().fit(x).apply(source).model
    expected = [model(x) for model in (dynamic, static)]
    ours = Negative()
    monkeypatch.setattr(kernels, "KERNELS", (ours, *kernels.KERNELS))
    assert same_bits(dynamic(x), expected[0])
    assert same_bits(static(x), -expected[1])
    assert ours.asked == [("cpu", torch.float32)] * 2
    wide = x.double()
    assert static.double()(wide).dtype == torch.float64
    assert ours.asked[-1] == ("cpu", torch.float64)


def test_the_reference_can_do_everything_and_is_asked_last() -> None:
    assert kernels.KERNELS[-1] is kernels.REFERENCE
    spec = KernelSpec.__new__(KernelSpec)
    assert kernels.REFERENCE.supports(spec, torch.device("meta"), torch.int8) is None
