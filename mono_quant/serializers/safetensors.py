"""The safetensors format: https://github.com/huggingface/safetensors, "Format"."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from mono_quant.atomic import replacing
from mono_quant.base import Checkpoint, Serializer
from mono_quant.configurable import Config, Kinds, dtype_name
from mono_quant.errors import CheckpointError, CorruptCheckpointError
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.serializers.wire import decode, encode, read_header

_ENTRY = "mono_quant"


class SafetensorsSerializer(Serializer):
    """Tensors in the safetensors format, our texts as JSON in one entry of its metadata.

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
        write_safetensors(path, tensors, {_ENTRY: json.dumps(texts)})

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        """Return what the file holds, each tensor copied out of the mapped file once."""
        with _opened(path) as file:

            def read(key: str) -> Tensor:
                return file.get_tensor(key).clone()

            return decode(_texts(file), read, kinds)

    def header(self, path: Path) -> Config:
        """Return the header of a file without reading a tensor."""
        with _opened(path) as file:
            return read_header(_texts(file))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any safetensors file, mapped: read from the file when they are used."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping


def read_texts(path: Path) -> dict[str, str]:
    """Return our texts in any safetensors file, none in a foreign one, without reading a tensor."""
    with _opened(path) as file:
        return _texts(file)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write contiguous CPU tensors and metadata.

    Of one entry of metadata the library writes the same bytes each time; of several it does not.

    Raises:
        CheckpointError: safetensors lacks the dtype of one.
    """
    if reason := _inexpressible(tensors):
        raise CheckpointError(reason)
    with replacing(path) as beside:
        specs = {key: _spec(tensor) for key, tensor in tensors.items()}
        try:
            serialize_file(specs, beside, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def _texts(file: safe_open) -> dict[str, str]:
    try:
        found: object = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"its metadata is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorruptCheckpointError("its metadata is no mapping")
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


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
        raise type(error)(f"{path} cannot be read: {error.what}", error.mend) from error


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        dtype=dtype_name(tensor.dtype),
        shape=list(tensor.shape),
        data_ptr=tensor.data_ptr(),
        data_len=tensor_bytes(tensor),
    )
