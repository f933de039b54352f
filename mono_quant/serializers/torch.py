"""Torch's own format, in the part of it that holds no code."""

import errno
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mono_quant.atomic import replacing
from mono_quant.base import Checkpoint, Serializer
from mono_quant.configurable import Config, Kinds
from mono_quant.errors import CheckpointError, CorruptCheckpointError
from mono_quant.serializers.pickled import check_content, check_file, is_archive
from mono_quant.serializers.wire import decode, encode, read_header


class TorchSerializer(Serializer):
    """A dictionary of texts and tensors that ``torch.load(path, weights_only=True)`` reads."""

    format = "torch"
    suffixes = (".pt", ".pth")

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the file."""
        texts, tensors = encode(checkpoint)
        write_pickled(path, {**texts, "tensors": tensors})

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        """Return what the file holds."""
        content = read_pickled(path)
        tensors = content.pop("tensors", {})
        if not isinstance(tensors, Mapping):
            raise CorruptCheckpointError(f"{path} cannot be read: its tensors are no mapping")
        try:
            return decode(_texts(content), tensors.__getitem__, kinds)
        except CheckpointError as error:
            raise type(error)(f"{path} cannot be read: {error.what}", error.mend) from error

    def header(self, path: Path) -> Config:
        """Return the header of a file."""
        try:
            return read_header(_texts(read_pickled(path, mapped=True)))
        except CheckpointError as error:
            raise type(error)(f"{path} cannot be read: {error.what}", error.mend) from error


def write_pickled(path: Path, content: Mapping[str, object]) -> None:
    """Write a dictionary of tensors and plain values."""
    with replacing(path) as beside, beside.open("wb") as file:
        try:
            torch.save(content, file)  # given a path, it would write the temporary name into it
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_pickled(path: Path, *, mapped: bool = False) -> dict[str, object]:
    """Return the dictionary in a file of torch's format; nothing in it is executed.

    Args:
        path: the file.
        mapped: leave the tensors in the file, where its format allows it, until they are used.

    Raises:
        CorruptCheckpointError: it is not whole, holds more than tensors and plain values, or is no
            dictionary.
    """
    content = read_plain(path, mapped=mapped)
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return content


def read_plain(path: Path, *, mapped: bool = False) -> object:
    """Return the tensors and plain values in a file of torch's format; nothing in it is executed.

    They take no more memory than the file is large.

    Raises:
        CorruptCheckpointError: it is not whole, or holds more than that.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        check_file(path)
        content: object = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=mapped and is_archive(path),
        )
        check_content(path, content)
    except CorruptCheckpointError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CorruptCheckpointError(f"{path} is not a file that torch wrote") from error
        raise CorruptCheckpointError(
            f"{path} holds Python objects beside tensors ({named[1]}), and reading those runs code "
            "of the file's choice: save model.state_dict() instead"
        ) from error
    except Exception as error:  # of a damaged pickle, torch's reader raises whatever comes up
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # torch says EINVAL of some files that were cut off
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CorruptCheckpointError(
            f"{path} is not a file of tensors and plain values, or not a whole one: {reason}"
        ) from error
    return content


def _texts(content: Mapping[str, object]) -> dict[str, str]:
    return {key: value for key, value in content.items() if isinstance(value, str)}


def state_dict_in(content: Mapping[str, object]) -> dict[str, Tensor] | None:
    """Return the state dict that a checkpoint is, or holds under one of the usual names."""
    names: Iterable[object] = content  # a file may have anything there
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and len(tensors) == len(content) and all(isinstance(one, str) for one in names):
        return tensors
    for name in ("state_dict", "model_state_dict", "model_state", "model"):
        inner = content.get(name)
        if isinstance(inner, Mapping):
            return state_dict_in(inner)
    return None
