"""Running a model's code on symbols without leaving a trace of it."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back: tracing leaves constants there, and a forward may too."""
    spaces = [(vars(module), dict(vars(module))) for module in python_modules(model)]
    inner = [value for _, space in spaces for value in space.values()]
    lists = [(value, value.copy()) for value in inner if isinstance(value, list)]
    tables = [(value, value.copy()) for value in inner if isinstance(value, dict)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
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
def answering(model: nn.Module, tensors: bool) -> Iterator[None]:
    """Let the code of a model's classes take symbols for tensors, or not, if it asks isinstance.

    The name is put into the globals of the files that define a forward, as torch.fx does with the
    functions that it wraps; torch's own files keep theirs.
    """

    def answer(value: object, kind: type | tuple[type, ...]) -> bool:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if isinstance(value, fx.Proxy) and any(issubclass(Tensor, one) for one in kinds):
            return tensors
        return isinstance(value, kind)

    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in classes if "forward" in vars(cls)]
    files = {id(one.__globals__): one.__globals__ for one in forwards if inspect.isfunction(one)}
    patched = [
        names
        for names in files.values()
        if not f"{names.get('__name__')}.".startswith("torch.") and "isinstance" not in names
    ]
    for names in patched:
        names["isinstance"] = answer
    try:
        yield
    finally:
        for names in patched:
            del names["isinstance"]


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
