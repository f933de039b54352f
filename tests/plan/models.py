"""Models to plan for: tied, shared, parametrized, quantized before, and of every layer."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations

from mono_quant import (
    Quantizer,
)
from tests.helpers import (
    TiedModel,
)

Make = Callable[[], nn.Module]
FLOAT8 = "8-bit symmetric per-channel"
DYNAMIC8 = f"{FLOAT8}; dynamic 8-bit asymmetric per-token inputs"
INDICES8 = f"{FLOAT8}; float inputs: its inputs are indices"


class Raw(nn.Module):
    """A parameter of its own beside two layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 64))
        self.inner = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("steps", torch.arange(10))


class Twice(nn.Module):
    """One parameter under two names, and two on one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(3, 64))
        self.two = self.one
        self.three = nn.Parameter(self.one.detach())
        self.inner = nn.Linear(64, 64)
        self.inner.bias = nn.Parameter(torch.zeros(64))
        self.other = nn.Linear(64, 64)
        self.other.bias = self.inner.bias


class Masked(nn.Module):
    """One buffer in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        mask = torch.ones(64)
        for layer in self.layers:
            layer.register_buffer("mask", mask)
            layer.register_buffer("nothing", None)


class Above(nn.Module):
    """A parameter of its own that is also the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Parameter(torch.ones(64, 64))
        self.inner = nn.Linear(64, 64)
        self.inner.weight = self.direct


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.two = self.one


def quantized_before() -> nn.Module:
    return Quantizer().skip("2").apply(mlp(), progress=False).model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16))


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 8))


MODELS: dict[str, Make] = {
    "mlp": mlp,
    "half": lambda: mlp().half(),
    "mixed dtypes": lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()),
    "one layer": lambda: nn.Linear(64, 64),
    "nothing at all": nn.ReLU,
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 3, groups=4)
    ),
    "embeddings": lambda: nn.ModuleDict(
        {"one": nn.Embedding(20, 64), "two": nn.EmbeddingBag(20, 64)}
    ),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(16, 32), nn.Linear(32, 64)]),
    "attention": lambda: nn.MultiheadAttention(64, 4),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128), 2, enable_nested_tensor=False
    ),
    "tied": TiedModel,
    "raw parameters": Raw,
    "one layer under two names": Shared,
    "one parameter under two names": Twice,
    "one buffer in two modules": Masked,
    "a parameter that is also a weight": Above,
    "parametrized": normed,
    "quantized before": quantized_before,
    "without bias": lambda: nn.Linear(64, 64, bias=False),
    "frozen": lambda: mlp().requires_grad_(False),
}
QUANTIZERS = {
    "8 bits": Quantizer(),
    "4 bits": Quantizer().bits(4),
    "3 bits, all of it": Quantizer().bits(3).only("*"),
    "half precision": Quantizer().bits(16),
    "groups that do not divide": Quantizer().group_size(48),
    "float32 scales": Quantizer().bits(5).scale_dtype(torch.float32).asymmetric(),
}


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors that a model holds, those on one memory once."""
    every = (*model.parameters(), *model.buffers())
    tensors = {(tensor.data_ptr(), tensor.shape): tensor for tensor in every}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()
