"""A Linear whose inputs are turned before they are multiplied."""

from torch import Tensor, nn

from mono_quant.numerics.rotation import SIZES, block_of, rotated


class RotatedLinear(nn.Linear):
    """`torch.nn.Linear` whose weight is for inputs that are turned first, as `Rotate` makes it.

    Computes what the layer that it was made of does, in blocks of 128 channels or of the largest
    power of two from 16 on that divides them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``rotated(input) @ weight.T + bias``."""
        fits = input.dim() > 0 and input.shape[-1] == self.in_features
        return super().forward(rotated(input) if fits else input)  # which says what does not fit


def refuse_rotation(layer: nn.Module) -> str | None:
    """Return why a layer cannot become a `RotatedLinear`, which one may be already; or None."""
    plain = type(layer) in (nn.Linear, RotatedLinear) and "forward" not in vars(layer)
    if not isinstance(layer, nn.Linear) or not plain:
        return f"it is a {type(layer).__name__}, and only an nn.Linear as it is can be turned"
    channels = layer.in_features
    if block_of(channels) is None:
        return f"its {channels} inputs are no multiple of {SIZES[-1]}"
    return None
