"""Quantized matrix products."""

from torch import Tensor, nn

from mono_quant.modules.layer import QuantizedLayer
from mono_quant.operations import BilinearProduct, MatrixProduct

_PRODUCT = MatrixProduct()


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`torch.nn.Linear` with a quantized weight."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        return self.run(_PRODUCT, input, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        """A float copy of the weight."""
        return self.float_weight()


class QuantizedBilinear(QuantizedLayer, nn.Bilinear):
    """`torch.nn.Bilinear` with a quantized weight."""

    float_class = nn.Bilinear

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return ``input1 @ weight @ input2 + bias``."""
        return self.run(BilinearProduct(input2), input1, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        """A float copy of the weight."""
        return self.float_weight()


class QuantizedLinearLike(QuantizedLayer):
    """Some other layer that computes ``x @ weight.T + bias``, with a quantized weight."""

    float_class = nn.Module
    keeps_forward = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        bias = getattr(self, "bias", None)  # a layer of its own need not know the word
        return self.run(self._operation, x, bias if isinstance(bias, Tensor) else None)

    @property
    def weight(self) -> Tensor:
        """A float copy of the weight."""
        return self.float_weight()

    @property
    def _operation(self) -> MatrixProduct:
        layout = self._holder("weight").layout
        return MatrixProduct(transposed=layout.order != (0, 1, 2))
