"""Half precision as a scheme."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.base import RangeEstimator, Scheme
from mono_quant.configurable import as_dtype, dtype_name, register
from mono_quant.errors import ConfigurationError, InputError
from mono_quant.numerics.granularity import Granularity, PerTensor, Shape
from mono_quant.numerics.values import QParams, QTensor

_ONE_BLOCK = PerTensor()  # made once: torch.compile cannot trace the making of an attrs class


@register
@attrs.frozen
class FloatCast(Scheme):
    """The values themselves in float16 or bfloat16, without scales.

    Storage only: products are computed in the dtype of the layer's input, because half-precision
    matrix products are slow on most processors.

    Attributes:
        dtype: float16 (11 significant bits, up to 65504) or bfloat16 (8 bits, the range of
            float32).
    """

    kind: ClassVar[str] = "float_cast"
    dtype: torch.dtype = attrs.field(default=torch.float16, converter=as_dtype)

    def __attrs_post_init__(self) -> None:
        """Refuse other dtypes."""
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise ConfigurationError(f"FloatCast is to float16 or bfloat16, not {self.dtype}")

    @property
    def granularity(self) -> Granularity:
        """One block: there is no scale to share."""
        return _ONE_BLOCK

    @property
    def code_bits(self) -> None:
        """None: the codes are floats."""
        return None

    def describe(self) -> str:
        """Return the name of the dtype."""
        return dtype_name(self.dtype)

    def nbytes(self, shape: Shape) -> int:
        """Return two bytes a value."""
        return 2 * torch.Size(shape).numel()

    def calculate_qparams(self, min_val: Tensor, max_val: Tensor, *, block_size: Shape) -> QParams:
        """Return no scale, once the range is seen to fit the dtype.

        Raises:
            InputError: a bound is not finite in the dtype.
        """
        bounds = torch.stack([min_val.flatten(), max_val.flatten()]).to(torch.float32)
        if not bool(torch.isfinite(bounds).all()):
            raise InputError("a range is not finite: the tensor holds NaN or infinity")
        if not bool(torch.isfinite(bounds.to(self.dtype)).all()):
            cure = "; use FloatCast(torch.bfloat16)" if self.dtype is torch.float16 else ""
            raise InputError(
                f"values up to {float(bounds.abs().max()):.3g} do not fit {self.dtype}{cure}"
            )
        return QParams(None, None, block_size)

    def choose_qparams(self, x: Tensor, observer: RangeEstimator) -> QParams:
        """Return no scale, whatever the observer: only the extremes are looked at."""
        if x.numel() == 0:
            return QParams(None, None, tuple(x.shape))
        return self.calculate_qparams(x.amin(), x.amax(), block_size=tuple(x.shape))

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        """Return the values rounded to the dtype, half to even."""
        return QTensor(x.to(self.dtype), qparams, x.dtype)

    def dequantize(self, q: QTensor) -> Tensor:
        """Return the values in float32, exactly."""
        return q.codes.to(torch.float32)
