"""Files: a checkpoint as bytes and back."""

from pathlib import Path

from torch import Tensor

from mono_quant.base import Serializer
from mono_quant.configurable import Config
from mono_quant.errors import CheckpointError, CorruptCheckpointError
from mono_quant.serializers.safetensors import SafetensorsSerializer, read_safetensors
from mono_quant.serializers.torch import TorchSerializer, read_pickled, state_dict_in

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
    raise CheckpointError(
        f"{path.name!r} has none of the suffixes {', '.join(known)}; rename it or pass serializer="
    )


def read_header(path: Path) -> Config:
    """Return the header of a quantized file without rebuilding anything."""
    if path.suffix in SAFETENSORS.suffixes:
        return SAFETENSORS.header(path)
    return TORCH.header(path)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a float checkpoint: safetensors, or torch's format without code.

    Raises:
        CorruptCheckpointError: it is not whole, or holds no state dict.
    """
    if path.suffix in SAFETENSORS.suffixes:
        return read_safetensors(path)
    found = state_dict_in(read_pickled(path))
    if found is None:
        raise CorruptCheckpointError(
            f"{path} holds no state dict: expected a dictionary of tensors, or one under "
            "'state_dict', 'model_state_dict', 'model_state' or 'model'"
        )
    return found


__all__ = [
    "BUILT_IN_SERIALIZERS",
    "SafetensorsSerializer",
    "TorchSerializer",
    "read_header",
    "read_state_dict",
    "serializer_for",
]
