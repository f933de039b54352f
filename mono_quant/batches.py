"""Batches as they come: a failure to read one is named, and arrays of numpy become tensors."""

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mono_quant.errors import CalibrationError, InputError, MonoQuantError
from mono_quant.numerics.nested import each


class _Sized(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> object: ...


class NamedItems(Dataset[object]):
    """A dataset that names the item that cannot be read."""

    def __init__(self, dataset: Dataset[object]) -> None:
        """Read `dataset`."""
        self._dataset = cast("_Sized", dataset)  # a loader asks for no more

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self._dataset)

    def __getitem__(self, place: int) -> object:
        """Return an item.

        Raises:
            CalibrationError: the dataset failed on it.
        """
        try:
            return self._dataset[place]
        except Exception as error:  # of anybody's code
            raise CalibrationError(
                f"item {place} of the {type(self._dataset).__name__} cannot be read: {_told(error)}"
            ) from error


def read(source: Iterable[object]) -> Iterator[object]:
    """Yield batches.

    Raises:
        CalibrationError: the source failed on one; names it.
    """
    batches = iter(source)
    for place in count():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except MonoQuantError:
            raise
        except Exception as error:  # of anybody's code
            raise CalibrationError(
                f"batch {place} of the data cannot be read: {_told(error)}"
            ) from error
        yield batch


def is_array(value: object) -> bool:
    """Return whether a value is an array of numpy, which is not imported to see it."""
    return any(
        (cls.__module__, cls.__name__) == ("numpy", "ndarray") for cls in type(value).__mro__
    )


def as_tensors(batch: object) -> object:
    """Return a batch with tensors for arrays of numpy.

    Raises:
        InputError: one holds what no tensor can.
    """
    return each(batch, _as_tensor)


def _as_tensor(value: object) -> object:
    if isinstance(value, Tensor) or not is_array(value):
        return value
    try:
        return torch.tensor(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the data holds an array that no tensor can hold: {error}; give a tensor, as "
            "torch.from_numpy(array) makes one"
        ) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
