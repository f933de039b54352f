"""Multi-head attention: projections of query, key and value."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, cast

import attrs
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mono_quant.base import Activation, PackedTensor, QuantizedModule, Scheme
from mono_quant.configurable import register
from mono_quant.layers.containers import MultiheadAttentionContainer
from mono_quant.layers.converting import ConvertingQuantizer
from mono_quant.modules import CallingMultiheadAttention, QuantizedMultiheadAttention
from mono_quant.numerics.values import Layout

_INPUTS = ("query", "key", "value")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@register
@attrs.frozen
class AttentionQuantizer(ConvertingQuantizer):
    """`torch.nn.MultiheadAttention`: ``in_proj_weight``, or its three parts where they are apart.

    The output projection is a Linear of its own and left to the quantizer of those.
    """

    kind: ClassVar[str] = "attention"
    float_classes: ClassVar = {nn.MultiheadAttention: QuantizedMultiheadAttention}
    takes_children: ClassVar[bool] = False

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that a subclass has a forward of its own or a weight is computed, or None."""
        if type(layer).forward not in (
            nn.MultiheadAttention.forward,
            CallingMultiheadAttention.forward,
        ):
            return f"{type(layer).__name__} is a MultiheadAttention with a forward of its own"
        if reason := ConvertingQuantizer.refuse(self, layer, scheme):
            return reason
        if is_parametrized(layer):
            return "it is parametrized: apply torch.nn.utils.parametrize.remove_parametrizations"
        if any(layer._parameters.get(name) is None for name in self.layouts(layer)):
            return "its weight is made by a hook (old-style weight_norm or pruning): remove that"
        return None

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        """Return ``[1, 3 * E, E]``, or ``[1, E, features]`` of each part."""
        attention = cast("nn.MultiheadAttention", layer)  # `matches` has seen to it
        size = attention.embed_dim
        if attention._qkv_same_embed_dim:
            return {"in_proj_weight": Layout.grouped((3 * size, size))}
        lengths = (size, attention.kdim, attention.vdim)
        parts = zip(_SEPARATE, lengths, strict=True)
        return {name: Layout.grouped((size, length)) for name, length in parts}

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Iterable[tuple[str, Tensor]]:
        """Return query, key and value; one that is given twice only once for a fused weight."""
        given = {**dict(zip(_INPUTS, args, strict=False)), **kwargs}
        found = [x for name in _INPUTS if isinstance(x := given.get(name), Tensor)]
        names = self.layouts(layer)
        if "in_proj_weight" in names:
            return [("in_proj_weight", x) for x in {id(x): x for x in found}.values()]
        return list(zip(_SEPARATE, found, strict=True))

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return an input ``[..., features]`` as ``[n, features]``."""
        return x.reshape(-1, x.shape[-1])

    def channel_dim(self, layer: nn.Module, name: str) -> int:
        """Return the last one."""
        return -1

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return None: projections are matrix products, which take any."""
        return None

    def quantizing_inputs(
        self, layer: nn.Module, activations: Mapping[str, Activation]
    ) -> AbstractContextManager[None] | None:
        """Return what exchanges query, key and value."""
        return _exchanging_three(layer, activations)

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        """Return `layer` itself, converted."""
        MultiheadAttentionContainer().revert(layer)  # if its output projection came before it
        return ConvertingQuantizer.replace(self, layer, weights, activations)


@contextmanager
def _exchanging_three(layer: nn.Module, activations: Mapping[str, Activation]) -> Iterator[None]:
    """Have an attention take query, key and value on their grids; one given twice stays one."""
    of = {
        name: activations.get(separate, activations.get("in_proj_weight"))
        for name, separate in zip(_INPUTS, _SEPARATE, strict=True)
    }

    def exchange(
        _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        made: dict[tuple[int, int], Tensor] = {}

        def on_grid(name: str, x: object) -> object:
            activation = of.get(name)
            if activation is None or not isinstance(x, Tensor):
                return x
            key = id(x), id(activation)
            if key not in made:
                made[key] = activation.fake_quantize(x).to(x.dtype)
            return made[key]

        three = [on_grid(name, x) for name, x in zip(_INPUTS, args, strict=False)]
        return (*three, *args[len(three) :]), {key: on_grid(key, x) for key, x in kwargs.items()}

    handle = layer.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
