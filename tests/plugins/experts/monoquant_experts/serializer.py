"""Checkpoints as zip archives that any tool can list."""

import ctypes
import json
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from mono_quant import Checkpoint, CheckpointError, CorruptCheckpointError, Serializer
from mono_quant.configurable import Kinds, as_dtype, dtype_name
from mono_quant.serializers import decode, encode, replacing

_TEXTS, _INDEX = "texts.json", "tensors.json"


class ZipSerializer(Serializer):
    """The texts as JSON, and the bytes of each tensor as a file of the archive."""

    format = "zip"
    suffixes = (".zip",)

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        texts, tensors = encode(checkpoint)
        index = {name: [dtype_name(x.dtype), *x.shape] for name, x in tensors.items()}
        with replacing(path) as beside, zipfile.ZipFile(beside, "w") as archive:
            # a ZipInfo without a date has always the same one
            archive.writestr(zipfile.ZipInfo(_TEXTS), json.dumps(texts))
            archive.writestr(zipfile.ZipInfo(_INDEX), json.dumps(index))
            for place, x in enumerate(tensors.values()):
                content = ctypes.string_at(x.data_ptr(), x.numel() * x.element_size())
                archive.writestr(zipfile.ZipInfo(f"{place}.bin"), content if x.numel() else b"")

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        try:
            with zipfile.ZipFile(path) as archive:
                texts = json.loads(archive.read(_TEXTS))
                index = json.loads(archive.read(_INDEX))
                tensors = {
                    name: _tensor(archive.read(f"{place}.bin"), *described)
                    for place, (name, described) in enumerate(index.items())
                }
        except (zipfile.BadZipFile, LookupError, ValueError, TypeError, EOFError) as error:
            raise CorruptCheckpointError(f"{path} is not a whole archive: {error}") from error
        try:
            return decode(texts, tensors.__getitem__, kinds)
        except CheckpointError as error:
            raise type(error)(f"{path} cannot be read: {error.what}", error.mend) from error


def _tensor(content: bytes, dtype: str, *shape: int) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=as_dtype(dtype))
    return torch.frombuffer(bytearray(content), dtype=as_dtype(dtype)).reshape(shape)
