"""Quantized lookups."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.modules.layer import QuantizedLayer
from mono_quant.operations import Lookup


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`torch.nn.Embedding` with a quantized weight: only the rows asked for are decoded."""

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of integer indices, ``[*input.shape, embedding_dim]``."""
        return self.run(Lookup(), input, None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        """A float copy of the weight."""
        return self.float_weight()


class QuantizedEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with a quantized weight: only the rows asked for are decoded."""

    float_class = nn.EmbeddingBag

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the sum, mean or maximum of the rows of each bag.

        The rows are looked up in the order of `input`, and a float embedding bag then reads them
        one by one; entries equal to `padding_idx` are all sent to one further row, which it leaves
        out.
        """
        rows = self.run(Lookup(), input.flatten(), None)
        places = torch.arange(rows.shape[0], dtype=input.dtype, device=input.device)
        padding = None
        if self.padding_idx is not None:
            padding = rows.shape[0]
            rows = functional.pad(rows, (0, 0, 0, 1))
            places = torch.where(input.flatten() == self.padding_idx, padding, places)
        return functional.embedding_bag(
            places.reshape(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, computed here
        """A float copy of the weight."""
        return self.float_weight()
