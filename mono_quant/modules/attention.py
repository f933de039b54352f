"""Multi-head attention that calls its output projection, and whose projections are quantized."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.errors import InputError
from mono_quant.modules.layer import QuantizedLayer
from mono_quant.operations import MatrixProduct, PartialProduct, widened

Three = tuple[Tensor, Tensor, Tensor]


class CallingMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that calls its ``out_proj`` instead of reading its weight.

    It computes what torch's own forward does on its ordinary path, and keeps no state of its own:
    an attention becomes one, and a plain one again, by its class alone. Method of Vaswani et al.,
    "Attention Is All You Need", 2017.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values and, where they are asked for, the attention's weights.

        Args:
            query: ``[N, L, E]`` if `batch_first`, else ``[L, N, E]``; ``[L, E]`` without a batch.
            key: likewise, of length S and `kdim` features.
            value: likewise, of length S and `vdim` features.
            key_padding_mask: ``[N, S]`` or ``[S]``, True or minus infinity at keys to leave out.
            need_weights: return the weights too, which forgoes torch's fused attention.
            attn_mask: ``[L, S]`` or ``[N * heads, L, S]``, True where attention is forbidden, or
                floats that are added to the scores.
            average_attn_weights: return the mean of all heads' weights.
            is_causal: a hint that `attn_mask` is the causal mask.

        Returns:
            a tensor shaped like `query`, and the weights ``[N, L, S]``, or ``[N, heads, L, S]`` if
            not averaged (without N for inputs without a batch), or None.

        Raises:
            InputError: shapes do not fit, or an input is a nested tensor.
        """
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask; give the mask as well")
        projected = self._projections(query, key, value)
        q, k, v = (self._split(widened(x, None)[0]) for x in projected)  # (N, heads, L or S, dim)
        hinted = is_causal and key_padding_mask is None and not need_weights
        if key_padding_mask is not None and query.dim() == 2:
            key_padding_mask = key_padding_mask.unsqueeze(0)  # (1, S)
        shape = (q.shape[0], q.shape[2], k.shape[2])
        mask = self._mask(None if hinted else attn_mask, key_padding_mask, shape, q.dtype)
        k, v, mask = self._extended(k, v, mask)
        attended, weights = self._attend(q, k, v, mask, need_weights, hinted)
        output: Tensor = self.out_proj(self._join(attended, query.dim()).to(query.dtype))
        if weights is None:
            return output, None
        weights = weights.to(query.dtype)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        return output, weights if query.dim() == 3 else weights.squeeze(0)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise InputError(
                "only torch's fused float attention takes nested tensors; pad them with "
                "to_padded_tensor and give a key_padding_mask"
            )
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise InputError(
                f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} "
                "dimensions; 3 are expected, or 2 without a batch"
            )

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> Three:
        """Return the projected inputs, in as few products as they allow."""
        if not self._qkv_same_embed_dim:
            return (
                self._product("q_proj_weight", query, self._bias(0, 1)),
                self._product("k_proj_weight", key, self._bias(1, 2)),
                self._product("v_proj_weight", value, self._bias(2, 3)),
            )
        if query is key and key is value:
            q, k, v = self._fused(query, 0, 3).chunk(3, dim=-1)
            return q, k, v
        if key is value:
            q = self._fused(query, 0, 1)
            k, v = self._fused(key, 1, 3).chunk(2, dim=-1)
            return q, k, v
        return self._fused(query, 0, 1), self._fused(key, 1, 2), self._fused(value, 2, 3)

    def _fused(self, x: Tensor, first: int, last: int) -> Tensor:
        """Return the product with parts `first` to `last` of query, key and value's weight."""
        whole = (first, last) == (0, 3)
        rows = None if whole else (first * self.embed_dim, last * self.embed_dim)
        return self._product("in_proj_weight", x, self._bias(first, last), rows)

    def _bias(self, first: int, last: int) -> Tensor | None:
        bias = self._parameters["in_proj_bias"]
        return bias[first * self.embed_dim : last * self.embed_dim] if bias is not None else None

    def _product(
        self, name: str, x: Tensor, bias: Tensor | None, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Return `x` times a weight, or times some of its rows, in the dtype of `x`."""
        weight = cast("Tensor", getattr(self, name))  # a tensor while a trial stands in for it
        wide, bias = widened(x, bias)
        part = weight if rows is None else weight[rows[0] : rows[1]]
        return functional.linear(wide, part.to(wide.dtype), bias).to(x.dtype)

    def _split(self, x: Tensor) -> Tensor:
        """Return a projection as ``[N, heads, length, head_dim]``."""
        if x.dim() == 2:
            x = x.unsqueeze(0)  # (1, length, E)
        elif not self.batch_first:
            x = x.transpose(0, 1)  # (N, length, E)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _join(self, x: Tensor, dims: int) -> Tensor:
        """Return ``[N, heads, L, head_dim]`` in the shape of a query of 2 or 3 dimensions."""
        if dims == 2:
            return x.squeeze(0).transpose(0, 1).flatten(1)  # (L, E)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return x.permute(order).flatten(2)

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return what is added to the scores ``[N, heads, L, S]``, or None for nothing."""
        batch, length, keys = shape
        found: Tensor | None = None
        if attn_mask is not None:
            one, each = (length, keys), (batch * self.num_heads, length, keys)
            if tuple(attn_mask.shape) not in (one, each):
                raise InputError(
                    f"attn_mask is {tuple(attn_mask.shape)}; expected is {one} or {each}"
                )
            found = _additive(attn_mask, dtype)
            if found.dim() == 3:
                found = found.reshape(batch, self.num_heads, length, keys)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, keys):
                raise InputError(
                    f"key_padding_mask is {tuple(key_padding_mask.shape)} for {batch} sequences "
                    f"of {keys} keys"
                )
            padding = _additive(key_padding_mask, dtype).view(batch, 1, 1, keys)
            found = padding if found is None else found + padding
        return found

    def _extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values with `bias_k`, `bias_v` and a zero after them, if there are."""
        if self.bias_k is not None and self.bias_v is not None:
            size = (k.shape[0], self.num_heads, 1, self.head_dim)
            last_k, last_v = (
                bias.to(k.dtype).view(1, self.num_heads, 1, self.head_dim).expand(size)
                for bias in (self.bias_k, self.bias_v)
            )
            k, v = torch.cat([k, last_k], dim=2), torch.cat([v, last_v], dim=2)
            mask = functional.pad(mask, (0, 1)) if mask is not None else None
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            mask = functional.pad(mask, (0, 1)) if mask is not None else None
        return k, v, mask

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        need_weights: bool,
        causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``[N, heads, L, head_dim]`` and the weights ``[N, heads, L, S]``, if needed."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
            return attended, None
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
        weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = functional.dropout(weights, dropout, training=self.training)
        return weights @ v, weights


def _float_weight(name: str) -> property:
    def read(self: "QuantizedMultiheadAttention") -> Tensor | None:
        """Return a float copy of the weight if it is quantized, else the parameter itself."""
        return self.float_weight(name) if name in self.quantized_weights else self._parameters[name]

    return property(read)


class QuantizedMultiheadAttention(QuantizedLayer, CallingMultiheadAttention):
    """`torch.nn.MultiheadAttention` with quantized projections of query, key and value.

    Of the fused weight only the rows that meet an input are decoded. The output projection is a
    layer of its own, quantized or not.
    """

    float_class = nn.MultiheadAttention

    def _product(
        self, name: str, x: Tensor, bias: Tensor | None, rows: tuple[int, int] | None = None
    ) -> Tensor:
        if name not in self.quantized_weights:
            return super()._product(name, x, bias, rows)
        operation = MatrixProduct() if rows is None else PartialProduct(*rows)
        return self.run(operation, x, bias, name)

    in_proj_weight = _float_weight("in_proj_weight")
    q_proj_weight = _float_weight("q_proj_weight")
    k_proj_weight = _float_weight("k_proj_weight")
    v_proj_weight = _float_weight("v_proj_weight")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as floats: minus infinity where a boolean one is True."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise InputError(f"a mask is {mask.dtype}, where bool or a floating dtype was expected")
    return mask.to(dtype)
