"""Products with a weight some of whose columns are kept apart in float."""

from dataclasses import replace

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from mono_quant.base import Activation, Kernel, KernelSpec, PackedTensor
from mono_quant.kernels.blocks import BLOCKS
from mono_quant.kernels.choice import fastest
from mono_quant.kernels.codes import flat, refuse, shaped
from mono_quant.kernels.integer import INTEGER
from mono_quant.kernels.traced import INTEGER_TRACED
from mono_quant.schemes.outliers import COLUMNS, WEIGHTS, Outliers


@attrs.frozen
class Decomposed:
    """Adds two products: of the codes with the other columns of the inputs, and of those in float.

    The first has zeros for the columns that are kept apart, and is left to the fastest kernel that
    can do it.

    Source: Dettmers et al. 2022, "LLM.int8()", https://arxiv.org/abs/2208.07339, section 3.2.

    Attributes:
        kernels: those that may compute the first product, none of which arranges codes.
    """

    kernels: tuple[Kernel, ...]
    name: str = "outliers"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot: matrices of `Outliers` whose codes some kernel multiplies."""
        if not isinstance(spec.scheme, Outliers):
            return "no column of the weight is kept apart"
        met = spec.activation
        if met is not None and met.scale is None and met.apart is None:
            return "the inputs of the columns that are kept apart are quantized with the others"
        reason = refuse(spec, device, dtype)
        if reason is None and not self._able(spec, spec.scheme, device):
            reason = f"no kernel multiplies codes that are {spec.scheme.scheme.describe()}"
        return reason

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[..., out]`` in the dtype of `x`."""
        assert isinstance(spec.scheme, Outliers)  # `supports` saw to it
        rows, tensors = flat(x, spec.layout.stack[2]), weight.tensors
        able = self._able(spec, spec.scheme, x.device)
        of_codes = _of_codes(spec, spec.scheme)
        kernel = fastest(able, None, of_codes, x.device, rows.dtype, len(rows))
        rest = rows.index_fill(-1, tensors[COLUMNS], 0)
        product = kernel(of_codes, rest, spec.scheme.on_grid(weight), bias)
        met = rows.index_select(-1, tensors[COLUMNS])
        if spec.activation is not None and spec.activation.apart is None:
            met = spec.activation.fake_quantize(met)  # calibrated, and so the same for any column
        product = product + functional.linear(met, tensors[WEIGHTS][0].to(met.dtype))
        return shaped(product, None, x)

    def _able(self, spec: KernelSpec, scheme: Outliers, device: torch.device) -> tuple[Kernel, ...]:
        wide, of_codes = torch.float32, _of_codes(spec, scheme)
        return tuple(one for one in self.kernels if one.supports(of_codes, device, wide) is None)


def _of_codes(spec: KernelSpec, scheme: Outliers) -> KernelSpec:
    met = spec.activation
    plain = Activation(met.scheme, met.scale, met.zero_point) if met is not None else None
    return replace(spec, scheme=scheme.scheme, activation=plain)


DECOMPOSED, DECOMPOSED_TRACED = Decomposed((INTEGER, BLOCKS)), Decomposed((INTEGER_TRACED,))
