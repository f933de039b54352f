"""Models, data and code that the command line names."""

import importlib
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import overload

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Checkpoint
from mono_quant.calibration import DEFAULT_SAMPLES, CalibrationData, Forward
from mono_quant.cli.arrays import read_arrays
from mono_quant.cli.options import ModelOptions, PlanOptions
from mono_quant.errors import ConfigurationError, CorruptCheckpointError, InputError
from mono_quant.files import fill
from mono_quant.numerics.nested import tensors_in
from mono_quant.serializers import read_plain, read_safetensors, read_state_dict, state_dict_in

_MODULE_NAMES = ("model", "module", "net", "network", "ema")


def imported(target: str) -> object:
    """Return what ``package.module:name`` names; modules are also looked for in this folder.

    Raises:
        ConfigurationError: there is no such module or name, or the module fails.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigurationError(
            f"{target!r} is not package.module:name: say what of it, as in {module_name}:name"
        )
    found: object = import_module(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), 1)
            hint = f"; is {near[0]!r} meant?" if near else ""
            raise ConfigurationError(f"{module_name} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def import_module(name: str) -> object:
    """Return a module, also looked for in the current folder.

    Raises:
        ConfigurationError: there is none, or it fails.
    """
    look_here()
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigurationError(
            f"cannot import {name!r}: {_told(error)} (looked in {Path.cwd()} too)"
        ) from error


def look_here() -> None:
    """Let modules of the current folder be imported, as ``python -m`` does."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def factory_of(options: ModelOptions) -> Callable[[], nn.Module] | None:
    """Return what makes the float model, if a factory was named.

    Raises:
        ConfigurationError: it cannot be imported or called.
    """
    if options.factory is None:
        return None
    target, found = options.factory, imported(options.factory)
    if not callable(found):
        raise ConfigurationError(f"--factory {target} is a {type(found).__name__}, not a function")

    def make() -> nn.Module:
        try:
            model: object = found()
        except Exception as error:
            raise InputError(f"--factory {target} failed: {_told(error)}") from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"--factory {target} returned a {type(model).__name__}, not a torch.nn.Module"
            )
        return model

    return make


def forward_of(options: ModelOptions) -> Forward | None:
    """Return what calls the model with a batch, if it was named.

    Raises:
        ConfigurationError: it cannot be imported or called.
    """
    if options.forward is None:
        return None
    found = imported(options.forward)
    if not callable(found):
        raise ConfigurationError(f"--forward {options.forward} is no function of (model, batch)")

    def forward(model: nn.Module, batch: object) -> object:
        output: object = found(model, batch)
        return output

    return forward


def read_data(path: Path) -> object:
    """Return the data that a file, or a folder of files, holds: what `fit` takes.

    Raises:
        InputError: it holds no tensors.
        CheckpointError: it cannot be read.
        OSError: there is no such file.
    """
    if path.is_dir():
        return Folder.of(path)
    data: object
    if path.suffix in _BY_NAME:
        tensors = _BY_NAME[path.suffix](path)
        single = isinstance(tensors, Mapping) and len(tensors) == 1
        data = next(iter(tensors.values())) if single else tensors
    else:
        data = read_plain(path)
    if next(tensors_in(data), None) is None:
        raise InputError(
            f"{path} holds no data: expected a tensor, a dictionary of tensors (one batch of "
            "keyword arguments) or a list of batches"
        )
    return data


_BY_NAME: Mapping[str, Callable[[Path], Tensor | Mapping[str, Tensor]]] = {
    ".safetensors": read_safetensors,
    ".npz": read_arrays,
    ".npy": read_arrays,
}
"""Files of tensors by name: one of them is a batch, several are a batch of keyword arguments."""


@attrs.frozen(eq=False)
class Folder(Sequence[object]):
    """The batches of a folder of files, in the order of their names, each read when it is used."""

    files: tuple[Path, ...]

    @classmethod
    def of(cls, path: Path) -> "Folder":
        """Return those of a folder.

        Raises:
            InputError: there is none, or a file that is none.
        """
        files = sorted(one for one in path.iterdir() if not one.name.startswith("."))
        foreign = [one.name for one in files if one.suffix not in (*_BY_NAME, ".pt", ".pth")]
        known = ", ".join((".pt", ".pth", *_BY_NAME))
        if foreign:
            raise InputError(f"{path} holds {foreign[0]}, which is no batch: expected {known}")
        if not files:
            raise InputError(f"{path} is empty: expected a batch in each file, {known}")
        return cls(tuple(files))

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.files)

    @overload
    def __getitem__(self, place: int) -> object: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[object]: ...
    def __getitem__(self, place: int | slice) -> object:
        """Return one batch, or a part of the folder."""
        if isinstance(place, slice):
            return Folder(self.files[place])
        return read_data(self.files[place])


def samples_of(samples: int | None) -> int:
    """Return how many samples are used, where nobody may have said it."""
    return DEFAULT_SAMPLES if samples is None else samples


def data_of(path: Path, options: ModelOptions, samples: int | None) -> CalibrationData:
    """Return the batches of a file; see `read_data`."""
    return CalibrationData.bind(read_data(path), samples_of(samples), forward_of(options))


def float_model(options: PlanOptions) -> nn.Module | Mapping[str, Tensor]:
    """Return the model that the options name, or the bare state dict where there is no factory.

    It is in eval mode, in which it is going to be used.

    Raises:
        ConfigurationError: none was named, or two.
        CheckpointError: the file cannot be read or does not fit the model.
    """
    path, make = model_path(options), factory_of(options)
    if path is None:
        if make is None:
            raise ConfigurationError("name a model: --model FILE or --factory package.module:name")
        return make().eval()
    held = _read_model(path, options.trust_pickle)
    if make is None:
        return held.eval() if isinstance(held, nn.Module) else held
    state = held.state_dict() if isinstance(held, nn.Module) else held
    return fill(make(), Checkpoint({}, state)).eval()


def model_path(options: PlanOptions) -> Path | None:
    """Return the path of the model, which may be said in two ways.

    Raises:
        ConfigurationError: both were used.
    """
    if options.positional is not None and options.model is not None:
        raise ConfigurationError(
            f"two models: {options.positional} and --model {options.model}; leave one out"
        )
    return options.model or options.positional


def _read_model(path: Path, trusted: bool) -> nn.Module | dict[str, Tensor]:
    if trusted and path.suffix != ".safetensors":
        return _unpickled(path)
    try:
        return read_state_dict(path)
    except CorruptCheckpointError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise CorruptCheckpointError(
                f"{error}; or, if you trust whoever made it, add --trust-pickle"
            ) from error
        raise


def _unpickled(path: Path) -> nn.Module | dict[str, Tensor]:
    look_here()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(
            f"{path} cannot be unpickled: {_told(error)}; its classes must be importable, as they "
            "are in the folder of the code that saved it"
        ) from error
    if isinstance(content, nn.Module):
        return content
    if isinstance(content, Mapping):
        for name in _MODULE_NAMES:
            if isinstance(inner := content.get(name), nn.Module):
                return inner
        if (state := state_dict_in(content)) is not None:
            return state
    raise InputError(f"{path} holds a {type(content).__name__}, and no module or state dict in it")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
