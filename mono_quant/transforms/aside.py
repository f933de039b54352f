"""Running a model's code on symbols without leaving a trace of it."""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from mono_quant.base import QuantizedModule


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back: tracing leaves constants there, and a forward may too."""
    spaces = [(vars(module), dict(vars(module))) for module in python_modules(model)]
    inner = [value for _, space in spaces for value in space.values()]
    lists = [(value, value.copy()) for value in inner if isinstance(value, list)]
    tables = [(value, value.copy()) for value in inner if isinstance(value, dict)]
    buffers = [(buffer, buffer.clone()) for buffer in _writable(model)]
    try:
        yield
    finally:
        for space, held in spaces:
            space.clear()
            space.update(held)
        for items, before in lists:
            items[:] = before
        for table, entries in tables:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for buffer, values in buffers:
                if not buffer.is_meta and not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextmanager
def following(model: nn.Module, *, tensors: bool = True) -> Iterator[None]:
    """Run a model's code on symbols: in eval mode, in silence, and as if it had not been run.

    Args:
        model: whose code is to be followed.
        tensors: whether it is to take symbols for tensors if it asks isinstance.
    """

    def answer(value: object, kind: type | tuple[type, ...]) -> bool:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if isinstance(value, fx.Proxy) and any(issubclass(Tensor, one) for one in kinds):
            return tensors
        return isinstance(value, kind)

    with as_it_was(model), named(model, {"isinstance": answer}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model's code warns of is not about this run
        for module in python_modules(model):
            module.training = False
        yield


@contextmanager
def named(model: nn.Module, meanings: Mapping[str, object]) -> Iterator[None]:
    """Let names mean something else to the code of a model's classes.

    They are put into the globals of the files that define a forward, as torch.fx does with the
    functions that it wraps; torch's own files, and those that have such a name, keep theirs.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in classes if "forward" in vars(cls)]
    files = {id(one.__globals__): one.__globals__ for one in forwards if inspect.isfunction(one)}
    patched = [
        (space, name)
        for space in files.values()
        for name in meanings
        if not f"{space.get('__name__')}.".startswith("torch.") and name not in space
    ]
    for space, name in patched:
        space[name] = meanings[name]
    try:
        yield
    finally:
        for space, name in patched:
            del space[name]


def _writable(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that a model's code may write into: not those of quantized weights."""
    fixed = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, QuantizedModule)
        for packed in module.packed_weights().values()
        for tensor in packed.tensors.values()
    }
    return (buffer for buffer in model.buffers() if id(buffer) not in fixed)


def python_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are not compiled by TorchScript."""
    return (one for one in model.modules() if not isinstance(one, torch.jit.ScriptModule))


def proxies(space: Mapping[str, object]) -> Iterator[fx.Proxy]:
    """Yield the symbolic values that a module's attributes hold, also in lists and tables."""
    for value in space.values():
        items: Iterable[object] = (value,)
        if isinstance(value, dict):
            items = value.values()
        elif isinstance(value, list | tuple):
            items = value
        yield from (one for one in items if isinstance(one, fx.Proxy))
