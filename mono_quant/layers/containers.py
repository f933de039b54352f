"""Modules of torch that read their children by attribute instead of calling them."""

from typing import ClassVar

import attrs
from torch import nn

from mono_quant.base import Container, QuantizedModule
from mono_quant.configurable import register
from mono_quant.modules import CallingMultiheadAttention

_REMEMBERED = "_float_fast_path"


@register
@attrs.frozen
class MultiheadAttentionContainer(Container):
    """`torch.nn.MultiheadAttention`, which hands the weight of its ``out_proj`` to a function.

    An adapted one calls it. Subclasses may do with it what they like, so theirs stays float.
    """

    kind: ClassVar[str] = "multihead_attention"

    def matches(self, module: nn.Module) -> bool:
        """Return whether `module` is one; a quantized one calls its child anyway."""
        return isinstance(module, nn.MultiheadAttention) and not isinstance(module, QuantizedModule)

    def refuse_child(self, module: nn.Module, name: str) -> str | None:
        """Return why the ``out_proj`` of a subclass stays float."""
        plain = type(module) in (nn.MultiheadAttention, CallingMultiheadAttention)
        if name == "out_proj" and (not plain or "forward" in vars(module)):
            return (
                f"{type(module).__name__} is no plain MultiheadAttention, and may read this weight "
                "by attribute"
            )
        return None

    def adapt(self, module: nn.Module) -> None:
        """Have `module` call its output projection."""
        if type(module) is nn.MultiheadAttention:
            module.__class__ = CallingMultiheadAttention

    def revert(self, module: nn.Module) -> None:
        """Make it torch's own again."""
        if type(module) is CallingMultiheadAttention:
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]  # its parent


@register
@attrs.frozen
class TransformerEncoderContainer(Container):
    """`torch.nn.TransformerEncoder` and its layers, which in eval read weights past their children.

    Their fast path calls one fused float operator on the weights themselves and no child at all. An
    adapted layer says that its activation is not one that the operator knows, and an adapted
    encoder that it does not want nested tensors; both then take the ordinary path.
    """

    kind: ClassVar[str] = "transformer_encoder"

    def matches(self, module: nn.Module) -> bool:
        """Return whether `module` is an encoder or a layer of one."""
        return isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer)

    def adapt(self, module: nn.Module) -> None:
        """Turn the fast path off, and remember how it was."""
        switch = self._switch(module)
        module.__dict__.setdefault(_REMEMBERED, getattr(module, switch))
        setattr(module, switch, False)

    def revert(self, module: nn.Module) -> None:
        """Set the fast path back to how it was."""
        if _REMEMBERED in module.__dict__:
            setattr(module, self._switch(module), module.__dict__.pop(_REMEMBERED))

    def _switch(self, module: nn.Module) -> str:
        encoder = isinstance(module, nn.TransformerEncoder)
        return "use_nested_tensor" if encoder else "activation_relu_or_gelu"
