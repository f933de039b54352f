"""What a package has to offer: ways to quantize a network, each made into something that runs."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MOST_COMPILED = 128  # ways of a package, each for each of its shapes

Run = Callable[..., Tensor]


class Task(NamedTuple):
    """A network and what it is run on.

    Attributes:
        model: in float32; a contender changes a copy of its own.
        workloads: arguments of a call, by name; the first is what models are traced with.
        calibration: batches for what is calibrated.
    """

    model: nn.Module
    workloads: Mapping[str, tuple[Tensor, ...]]
    calibration: Sequence[Tensor]


class Made(NamedTuple):
    """A quantized network.

    Attributes:
        run: called as the float model.
        nbytes: of its weights, as they are saved.
        note: for the table.
        most_arguments: workloads with more are not run: it takes no key/value cache.
    """

    run: Run
    nbytes: int
    note: str = ""
    most_arguments: int = 9


Ways = Mapping[str, Callable[[Task], Made]]
"""What a package makes of a network, by title."""


class Package(NamedTuple):
    """A package and its ways.

    Attributes:
        title: in the table.
        requirements: of its environment; none for the one of these benchmarks.
        decoders: ways for language models.
        convolutions: ways for networks of images.
    """

    title: str
    requirements: tuple[str, ...]
    decoders: Ways = MappingProxyType({})
    convolutions: Ways = MappingProxyType({})


def compiled(model: Run) -> Run:
    """Return a model as torch.compile makes it, anew for each shape.

    Ways of one package share their forward, which torch would compile eight times, and then run as
    it is: here it raises instead.
    """
    torch._dynamo.config.recompile_limit = _MOST_COMPILED
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    run: Run = torch.compile(model, dynamic=False)
    return run


def saved_bytes(model: nn.Module) -> int:
    """Return what torch.save writes of a model's state; tensors that are shared count once."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch calls its own classes
        torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes
