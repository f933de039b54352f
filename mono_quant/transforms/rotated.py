"""A Linear whose inputs are turned before they are multiplied."""

from torch import Tensor, fx, nn

from mono_quant.numerics.rotation import SIZES, block_of, rotated


class RotatedLinear(nn.Linear):
    """`torch.nn.Linear` whose weight is for inputs that are turned first, as `Rotate` makes it.

    Computes what the layer that it was made of does, in blocks of 128 channels or of the largest
    power of two from 16 on that divides them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``rotated(input) @ weight.T + bias``."""
        return super().forward(_turned(input, self.in_features))


def _turned(x: Tensor, channels: int) -> Tensor:
    """Return inputs turned, or as they are where their channels are others: the product refuses."""
    return rotated(x) if x.dim() > 0 and x.shape[-1] == channels else x


fx.wrap("_turned")  # one step of a symbolic trace, which knows no shapes


def turned_in(model: nn.Module) -> list[str]:
    """Return the names of the layers of a model whose inputs are turned."""
    return [path for path, one in model.named_modules() if isinstance(one, RotatedLinear)]


def refuse_rotation(layer: nn.Module) -> str | None:
    """Return why a layer cannot become a `RotatedLinear`, which one may be already; or None."""
    plain = type(layer) in (nn.Linear, RotatedLinear) and "forward" not in vars(layer)
    if not isinstance(layer, nn.Linear) or not plain:
        return f"it is a {type(layer).__name__}, and only an nn.Linear as it is can be turned"
    channels = layer.in_features
    if block_of(channels) is None:
        return f"its {channels} inputs are no multiple of {SIZES[-1]}"
    return None
