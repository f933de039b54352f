"""What the builder returns, by its types; an error is expected where a comment says so."""

from typing import assert_type

import torch
from torch import Tensor, nn

from mono_quant import (
    Affine,
    GraphPlan,
    GraphQuantizer,
    GraphResult,
    Plan,
    QuantizationResult,
    Quantizer,
    RoundToNearest,
    load_model,
    quantize,
)
from mono_quant.modules import BareModule


class House(Quantizer):
    """A builder with a word of its own."""

    def as_we_do(self) -> "House":
        return self.bits(4)


class Net(nn.Module):
    """A model with an attribute of its own."""

    depth: int = 3

    def forward(self, x: Tensor) -> Tensor:
        return x


net, x = Net(), torch.zeros(1, 4)
assert_type(Quantizer().bits(4).skip("head").fit(x), Quantizer)
assert_type(House().group_size(32).observer("mse").as_we_do().symmetric(), House)
assert_type(Quantizer().graph().bits(4), GraphQuantizer)
assert_type(Quantizer().plan(net), Plan[Net])
assert_type(Quantizer().apply(net), QuantizationResult[Net])
assert_type(House().apply(net).model, Net)
assert_type(House().apply(net).model.depth, int)
assert_type(House().apply_(net).dequantize(), Net)
assert_type(Quantizer().apply(net.state_dict()), QuantizationResult[BareModule])
assert_type(Quantizer().graph().plan(net), GraphPlan[Net])
assert_type(Quantizer().graph().apply(net), GraphResult[Net])
assert_type(quantize(net).model, Net)
assert_type(load_model("file", net), Net)
assert_type(load_model("file", Net), Net)

Quantizer().bits("4")  # E: arg-type
Quantizer().scheme(RoundToNearest())  # E: arg-type
Quantizer().rounding(Affine())  # E: arg-type
Quantizer().override("head", bit=4)  # E: call-arg
print(Quantizer().apply(net).models)  # E: attr-defined
Quantizer().graph().apply_(net)  # E: attr-defined
