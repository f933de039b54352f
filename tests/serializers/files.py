"""Models to save, and files to damage."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import TensorSpec, safe_open, serialize_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mono_quant import QuantizedModule
from tests.helpers import TiedModel, same_bits, same_tensors

SUFFIXES = (".safetensors", ".pt")


class Buffers(nn.Module):
    """Holds a buffer of every dtype, empty ones, one without dimensions and one left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 16)
        for dtype in (
            torch.bool,
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.float8_e4m3fn,
        ):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(f"{name}_values", (100 * torch.randn(3, 5)).to(dtype))
        self.register_buffer("scalar", torch.tensor(3.5))
        self.register_buffer("empty", torch.empty(0, 7))
        self.register_buffer("odd", torch.tensor([torch.nan, torch.inf, -0.0]))
        self.register_buffer("view", torch.randn(4, 6).t()[::2])
        self.register_buffer("scratch", torch.randn(5), persistent=False)
        self.register_buffer("nothing", None)
        self.gain = nn.Parameter(torch.randn(16).bfloat16())
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) * self.gain
        return found


class Convolutions(nn.Module):
    """Convolutions with a norm between them, and an embedding bag."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="sum")
        self.body = nn.Sequential(
            nn.Conv1d(8, 16, 3, padding="same", groups=2, bias=False),
            nn.BatchNorm1d(16),
            nn.ConvTranspose1d(16, 8, 3, groups=4),
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = self.bag(x)
        found: Tensor = self.body(rows.unsqueeze(-1).expand(-1, -1, 5))
        return found


class Shared(nn.Module):
    """Uses one layer under two names, and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(64, 64)
        self.right = self.left
        self.register_buffer("one", torch.randn(64))
        self.register_buffer("other", self.get_buffer("one"))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.right(self.left(x)) + self.get_buffer("other")
        return found


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "tied": lambda: (TiedModel(), torch.arange(64)),
    "buffers": lambda: (Buffers(), torch.randn(3, 64)),
    "convolutions": lambda: (Convolutions(), torch.arange(20).reshape(4, 5)),
    "shared": lambda: (Shared(), torch.randn(3, 64)),
    "root": lambda: (nn.Linear(64, 16), torch.randn(3, 64)),
    "bfloat16": lambda: (nn.Linear(64, 16).bfloat16(), torch.randn(3, 64).bfloat16()),
    "float64": lambda: (nn.Linear(64, 16).double(), torch.randn(3, 64).double()),
    "encoder": lambda: (
        nn.TransformerEncoderLayer(64, 4, 64, batch_first=True),
        torch.randn(2, 3, 64),
    ),
    "parametrized": lambda: (nn.Sequential(weight_norm(nn.Linear(64, 16))), torch.randn(3, 64)),
}


def small() -> nn.Sequential:
    """Return what most tests of files save."""
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Assert that two quantized models are equal to the bit, whatever a state dict leaves out."""
    assert same_tensors(one, other)
    for module, twin in zip(one.modules(), other.modules(), strict=True):
        assert type(module) is type(twin)
        if isinstance(module, QuantizedModule):
            assert isinstance(twin, QuantizedModule)
            for name, packed in module.packed_weights().items():
                again = twin.packed_weights()[name]
                assert (packed.scheme, packed.layout, packed.dtype) == (
                    again.scheme,
                    again.layout,
                    again.dtype,
                )
    buffers, others = dict(one.named_buffers()), dict(other.named_buffers())
    assert list(buffers) == list(others)
    for name, buffer in buffers.items():
        assert same_bits(buffer, others[name]), name


Contents = tuple[dict[str, str], dict[str, Tensor]]


def read(path: Path) -> Contents:
    """Return the texts and the tensors of one of our files, read by the formats' own libraries."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
            return json.loads((file.metadata() or {})["mono_quant"]), tensors
    content: dict[str, object] = torch.load(path, weights_only=True)
    texts = {name: value for name, value in content.items() if isinstance(value, str)}
    found = content["tensors"]
    assert isinstance(found, dict)
    return texts, found


def write(path: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write texts and tensors as one of our files holds them."""
    if path.suffix != ".safetensors":
        torch.save({**texts, "tensors": dict(tensors)}, path)
        return
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, path, metadata={"mono_quant": json.dumps(texts)})


def crc(tensor: Tensor) -> int:
    """Return the checksum that a file's header has for a tensor: of dtype, shape and bytes."""
    described = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
    content = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    return zlib.crc32(described.encode() + content)


Header = dict[str, object]
Edit = Callable[[Header, dict[str, Tensor]], object]


def forge(path: Path, edit: Edit) -> None:
    """Change a file's header and tensors so that every checksum is right again."""
    texts, tensors = read(path)
    header: Header = json.loads(texts["header"])
    before = {name: crc(tensor) for name, tensor in tensors.items()}
    edit(header, tensors)
    sums = header.get("checksums")
    if isinstance(sums, dict):
        for name, tensor in tensors.items():
            if tensor.is_contiguous() and crc(tensor) != before.get(name):
                sums[name] = crc(tensor)
    texts["header"] = json.dumps(header)
    texts["header_checksum"] = str(zlib.crc32(texts["header"].encode()))
    write(path, texts, tensors)
