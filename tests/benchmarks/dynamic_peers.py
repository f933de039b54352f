"""Dynamic INT8 by torch.ao and torchao: what the benchmarks of activations compare with."""

import importlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from mono_quant import Quantizer

Only = Callable[[str, nn.Module], bool]
"""Whether a layer, by its name, is to be quantized."""


class Peer(NamedTuple):
    """One way of another package to quantize a model dynamically.

    Attributes:
        distribution: of the package.
        title: in the table.
        package: that has to be importable.
        quantize: returns a model of its own making; it may change the one it is given.
    """

    distribution: str
    title: str
    package: str
    quantize: Callable[[nn.Module, Only], nn.Module]


class Found(NamedTuple):
    """A quantized model, or why there is none.

    Attributes:
        package: with its version.
        setting: what was asked of it.
        model: None where it is skipped.
        reason: why it is skipped.
    """

    package: str
    setting: str
    model: nn.Module | None
    reason: str = ""


def dynamic(
    model: nn.Module, only: Only, ours: Mapping[str, Quantizer], peers: Iterable[Peer] | None = None
) -> Iterator[Found]:
    """Yield a model as it is quantized by each of `ours`, then by each peer."""
    for title, quantizer in ours.items():
        yield Found("mono_quant", title, quantizer.only(only).apply(model, progress=False).model)
    for peer in PEERS if peers is None else peers:
        try:
            importlib.import_module(peer.package)
        except ImportError as reason:
            yield Found(peer.distribution, peer.title, None, f"skipped: {reason}")
            continue
        package = f"{peer.distribution} {metadata.version(peer.distribution)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what other packages call themselves
            quantized = peer.quantize(deepcopy(model), only)
        yield Found(package, peer.title, quantized)


def torch_dynamic(model: nn.Module, names: Collection[str], *, per_channel: bool) -> nn.Module:
    """Return a model whose layers of these names torch.ao quantized dynamically."""
    ao: Any = importlib.import_module("torch.ao.quantization")
    config = ao.per_channel_dynamic_qconfig if per_channel else ao.default_dynamic_qconfig
    quantized: nn.Module = ao.quantize_dynamic(model, dict.fromkeys(names, config))
    return quantized


def _torch(*, per_channel: bool) -> Callable[[nn.Module, Only], nn.Module]:
    def quantize(model: nn.Module, only: Only) -> nn.Module:
        kinds = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
        names = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, kinds) and only(name, layer)
        ]
        return torch_dynamic(model, names, per_channel=per_channel)

    return quantize


def _torchao(model: nn.Module, only: Only) -> nn.Module:
    torchao: Any = importlib.import_module("torchao.quantization")

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and only(name, module)

    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(), filter_fn=chosen)
    return model


TORCH = (
    Peer("torch", "quantize_dynamic", "torch.ao.quantization", _torch(per_channel=False)),
    Peer("torch", "quantize_dynamic by channel", "torch.ao.quantization", _torch(per_channel=True)),
)
PEERS = (
    *TORCH,
    Peer("torchao", "Int8DynamicActivationInt8Weight", "torchao.quantization", _torchao),
)


def engine() -> str:
    """Return which of its integer kernels torch uses."""
    return f"torch.backends.quantized.engine is {torch.backends.quantized.engine}"
