"""Files: a checkpoint as bytes and back."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from mono_quant.atomic import replacing
from mono_quant.base import Checkpoint, Serializer
from mono_quant.configurable import Config, Kinds
from mono_quant.errors import CheckpointError, CorruptCheckpointError, Mend
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.serializers.safetensors import (
    SafetensorsSerializer,
    read_safetensors,
    read_texts,
    write_safetensors,
)
from mono_quant.serializers.torch import (
    TorchSerializer,
    read_pickled,
    read_plain,
    state_dict_in,
    write_pickled,
)
from mono_quant.serializers.wire import FORMAT, UNFIT, checksum, decode, encode, seal, unseal

SAFETENSORS = SafetensorsSerializer()
TORCH = TorchSerializer()
BUILT_IN_SERIALIZERS: tuple[Serializer, ...] = (SAFETENSORS, TORCH)


def serializer_for(path: Path) -> Serializer:
    """Return the serializer for the suffix of a path.

    Raises:
        CheckpointError: none has that suffix.
    """
    for serializer in BUILT_IN_SERIALIZERS:
        if path.suffix in serializer.suffixes:
            return serializer
    known = [suffix for serializer in BUILT_IN_SERIALIZERS for suffix in serializer.suffixes]
    raise CheckpointError(f"{path.name!r} has none of the suffixes {', '.join(known)}", Mend.SUFFIX)


def read_header(path: Path) -> Config:
    """Return the header of a quantized file without rebuilding anything."""
    if path.suffix in SAFETENSORS.suffixes:
        return SAFETENSORS.header(path)
    return TORCH.header(path)


def is_quantized(path: Path) -> bool:
    """Return whether a file says that this package wrote it; no tensor is read.

    Raises:
        CorruptCheckpointError: it is not a whole file of its format.
    """
    if path.suffix in SAFETENSORS.suffixes:
        return read_texts(path).get("format") == FORMAT
    return read_pickled(path, mapped=True).get("format") == FORMAT


def stored_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor in a quantized file, without reading one."""
    if path.suffix in SAFETENSORS.suffixes:
        tensors: Mapping[str, object] = read_safetensors(path)
    else:
        held = read_pickled(path, mapped=True).get("tensors")
        tensors = held if isinstance(held, Mapping) else {}
    return {str(key): tensor_bytes(x) for key, x in tensors.items() if isinstance(x, Tensor)}


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a float checkpoint: safetensors, or torch's format without code.

    Raises:
        CorruptCheckpointError: it is not whole, or holds no state dict.
        CheckpointError: it is quantized.
    """
    path = Path(path)
    if path.suffix in SAFETENSORS.suffixes:
        if is_quantized(path):
            raise CheckpointError(f"{path} is quantized already", Mend.IS_QUANTIZED)
        return read_safetensors(path)
    content = read_pickled(path)
    if content.get("format") == FORMAT:
        raise CheckpointError(f"{path} is quantized already", Mend.IS_QUANTIZED)
    found = state_dict_in(content)
    if found is None:
        raise CorruptCheckpointError(
            f"{path} holds no state dict: expected a dictionary of tensors, or one under "
            "'state_dict', 'model_state_dict', 'model_state' or 'model'"
        )
    return found


def read_checkpoint(path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
    """Return what a file holds: a quantized one, or a float one as a checkpoint of no record.

    Raises:
        CheckpointError: it can be read as neither.
    """
    if is_quantized(path):
        return serializer_for(path).load(path, kinds=kinds)
    tensors = read_state_dict(path)
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for key, tensor in tensors.items():
        if tensor.numel():
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(memory, key) != key:
                ties[key] = first[memory]
    return Checkpoint({}, tensors, ties=ties)


def write_state_dict(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a float checkpoint: the old file or the whole new one.

    Args:
        path: its suffix chooses the format: .safetensors, .pt or .pth.
        tensors: by name; in a .pt file, tied ones stay tied.

    Raises:
        CheckpointError: no format has that suffix, or it cannot hold the tensors.
        OSError: the file cannot be written.
    """
    if serializer_for(path) is SAFETENSORS:
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_safetensors(path, plain, {"format": "pt"})  # what transformers asks for
    else:
        write_pickled(path, dict(tensors))


__all__ = [
    "BUILT_IN_SERIALIZERS",
    "UNFIT",
    "SafetensorsSerializer",
    "TorchSerializer",
    "checksum",
    "decode",
    "encode",
    "is_quantized",
    "read_checkpoint",
    "read_header",
    "read_plain",
    "read_safetensors",
    "read_state_dict",
    "read_texts",
    "replacing",
    "seal",
    "serializer_for",
    "state_dict_in",
    "stored_bytes",
    "unseal",
    "write_safetensors",
    "write_state_dict",
]
