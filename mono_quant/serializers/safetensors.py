"""The safetensors format: https://github.com/huggingface/safetensors, "Format"."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from mono_quant.base import Checkpoint, Serializer
from mono_quant.configurable import Config, Kinds, dtype_name
from mono_quant.errors import CheckpointError, CorruptCheckpointError
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.serializers.atomic import replacing
from mono_quant.serializers.wire import decode, encode, read_header


class SafetensorsSerializer(Serializer):
    """Tensors in the safetensors format, the header in its metadata.

    Written with the library's own writer from the tensors' memory, without a copy and without
    numpy.
    """

    format = "safetensors"
    suffixes = (".safetensors",)

    def can_express(self, checkpoint: Checkpoint) -> str | None:
        """Return which tensor has a dtype that safetensors lacks, or None."""
        return _inexpressible(checkpoint.tensors)

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the file."""
        if reason := self.can_express(checkpoint):
            raise CheckpointError(reason)
        texts, tensors = encode(checkpoint)
        write_safetensors(path, tensors, texts)

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        """Return what the file holds, each tensor copied out of the mapped file once."""
        with _opened(path) as file:

            def read(key: str) -> Tensor:
                return file.get_tensor(key).clone()

            return decode(file.metadata() or {}, read, kinds)

    def header(self, path: Path) -> Config:
        """Return the header of a file without reading a tensor."""
        with _opened(path) as file:
            return read_header(file.metadata() or {})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any safetensors file, mapped: read from the file when they are used."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping


def read_texts(path: Path) -> dict[str, str]:
    """Return the texts of any safetensors file without reading a tensor."""
    with _opened(path) as file:
        return file.metadata() or {}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors and texts.

    Raises:
        CheckpointError: safetensors lacks the dtype of one.
    """
    if reason := _inexpressible(tensors):
        raise CheckpointError(reason)
    with replacing(path) as beside:
        specs = {key: _spec(tensor) for key, tensor in tensors.items()}
        serialize_file(specs, beside, metadata=texts)


def _inexpressible(tensors: Mapping[str, Tensor]) -> str | None:
    for key, tensor in tensors.items():
        try:
            _spec(tensor)
        except (ValueError, SafetensorError):
            return f"safetensors has no {tensor.dtype}, the dtype of {key!r}; save as .pt"
    return None


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    except CheckpointError as error:
        raise type(error)(f"{path} cannot be read: {error}") from error


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        dtype=dtype_name(tensor.dtype),
        shape=list(tensor.shape),
        data_ptr=tensor.data_ptr(),
        data_len=tensor_bytes(tensor),
    )
