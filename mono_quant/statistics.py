"""What calibration gathered of the inputs of a model, to be used again without the data."""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import cast

import attrs
import torch
from torch import Tensor

from mono_quant.base import AnyStatistic, Statistic, Statistics
from mono_quant.configurable import Config, Json, Kinds
from mono_quant.errors import (
    CalibrationError,
    CheckpointError,
    CorruptCheckpointError,
    InputError,
    Mend,
)
from mono_quant.gathering import Gathered, Wanted
from mono_quant.numerics.granularity import Shape
from mono_quant.serializers import (
    UNFIT,
    checksum,
    read_safetensors,
    read_texts,
    seal,
    unseal,
    write_safetensors,
)

FORMAT = "mono_quant_statistics"
VERSION = 1

Key = tuple[str, str]
"""A layer and the name of a weight in it."""


@attrs.frozen(eq=False)
class Inputs:
    """The inputs of one weight.

    Attributes:
        rows: statistics of them as rows that were asked for, for roundings.
        inputs: statistics of them as they come, for their ranges.
        gathered: the states; without those that no data reached.
    """

    rows: tuple[AnyStatistic, ...]
    inputs: tuple[AnyStatistic, ...]
    gathered: Gathered


@attrs.frozen(eq=False)
class CalibrationStatistics:
    """What was gathered of the inputs of all weights of a model, by its float layers.

    It serves every quantizer that asks for the same statistics, such as one of other bits, and is
    far smaller than the data. A file of it is in the safetensors format, and holds no code.

    Attributes:
        weights: by layer and weight.
        transforms: what was done to the float model first, as configurations.
        turned: names of layers whose inputs were turned first, which may have depended on the
            data; None where a file does not tell.
    """

    weights: Mapping[Key, Inputs]
    transforms: tuple[Config, ...] = ()
    turned: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        wanted: Mapping[str, Wanted],
        gathered: Mapping[Key, Gathered],
        transforms: Sequence[Config],
        turned: Sequence[str],
    ) -> "CalibrationStatistics":
        """Return what was gathered of what was wanted, by layer."""
        weights = {
            (path, name): Inputs(
                want.of_rows.get(name, ()),
                want.of_inputs.get(name, ()),
                gathered.get((path, name), Gathered()),
            )
            for path, want in wanted.items()
            for name in {**want.of_rows, **want.of_inputs}
        }
        return cls(weights, tuple(transforms), tuple(turned))

    def lacking(self, wanted: Mapping[str, Wanted]) -> Mapping[str, AnyStatistic]:
        """Return the first statistic that is not here of each layer that wants one."""
        found: dict[str, AnyStatistic] = {}
        for path, want in wanted.items():
            for name in {**want.of_rows, **want.of_inputs}:
                known = self.weights.get((path, name), Inputs((), (), Gathered()))
                asked = (
                    *(one for one in want.of_rows.get(name, ()) if one not in known.rows),
                    *(one for one in want.of_inputs.get(name, ()) if one not in known.inputs),
                )
                if asked:
                    found.setdefault(path, asked[0])
        return found

    def check_fit(self, stacks: Mapping[Key, Shape]) -> None:
        """Refuse statistics of rows that are of other sizes than the weights of a model.

        Args:
            stacks: the shape ``[G, out, in]`` of each weight, by layer and name.

        Raises:
            CalibrationError: naming the first.
        """
        for key, known in self.weights.items():
            for one in known.rows:
                if key not in stacks or one not in known.gathered.rows:
                    continue
                fold = cast("Statistic[object]", one)  # the only kind of statistic there is
                try:
                    fold.check_state(known.gathered.rows.states[one], stacks[key])
                except InputError as error:
                    name = ".".join(filter(None, key))
                    raise CalibrationError(
                        f"the statistics are not of the inputs of {name}: {error}", Mend.STATISTICS
                    ) from error

    def check_turned(self, turned: Sequence[str]) -> None:
        """Refuse statistics of inputs that were turned first, where those are not, and the reverse.

        Args:
            turned: names of layers whose inputs are turned now.

        Raises:
            CalibrationError: naming the first that differs.
        """
        if self.turned is None:
            return
        for path in (*self.turned, *turned):
            if (path in self.turned) != (path in turned):
                run = "that" if path in self.turned else "this"
                raise CalibrationError(
                    f"the inputs of {path!r} are turned in {run} run alone, which may depend on "
                    "the data, and so the statistics are of others",
                    Mend.STATISTICS,
                )

    def gathered(self) -> Mapping[Key, Gathered]:
        """Return the states by layer and weight."""
        return {key: one.gathered for key, one in self.weights.items()}

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a file, which is called .safetensors, and return its path.

        Raises:
            CheckpointError: the suffix is another one.
            OSError: the file cannot be written; what stood there still stands.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path.name!r} is to hold statistics: call it .safetensors")
        tensors: dict[str, Tensor] = {}
        weights: list[Json] = [
            {
                "layer": layer,
                "name": name,
                "rows": _written(one.rows, one.gathered.rows, tensors),
                "inputs": _written(one.inputs, one.gathered.inputs, tensors),
            }
            for (layer, name), one in self.weights.items()
        ]
        header: Config = {
            "weights": weights,
            "transforms": list(self.transforms),
            "turned": list(self.turned) if self.turned is not None else None,
            "checksums": {key: checksum(tensor) for key, tensor in tensors.items()},
        }
        texts = seal(FORMAT, VERSION, header)
        write_safetensors(path, tensors, {"mono_quant": json.dumps(texts)})
        return path

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, kinds: Kinds | None = None
    ) -> "CalibrationStatistics":
        """Return what a file holds.

        Args:
            path: what `save` wrote.
            kinds: classes of your own by their kind.

        Raises:
            CheckpointError: it is not whole, is something else, or names an unknown kind.
            OSError: it cannot be read.
        """
        path = Path(path)
        texts = read_texts(path)
        if texts.get("format") != FORMAT:
            raise CorruptCheckpointError(f"{path} holds no statistics: calibrate(...) makes them")
        try:
            header = unseal(texts, VERSION)
            tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
            if header["checksums"] != {key: checksum(tensor) for key, tensor in tensors.items()}:
                raise CorruptCheckpointError("a tensor was changed")
            weights = cast("Sequence[Mapping[str, Json]]", header["weights"])  # else it is refused
            transforms = cast("Sequence[Config]", header["transforms"])
            turned = cast("Sequence[Json] | None", header.get("turned"))
            return cls(
                dict(_read(weights, tensors, kinds)),
                tuple(map(_described, transforms)),
                tuple(map(_name, turned)) if turned is not None else None,
            )
        except CheckpointError as error:
            raise type(error)(f"{path} cannot be read: {error.what}", error.mend) from error
        except UNFIT as error:
            raise CorruptCheckpointError(f"{path} cannot be read: {error!r}") from error


def _described(transform: Config) -> Config:
    """Return the configuration of a transform, of which no more than its kind is asked."""
    return {**transform, "kind": str(transform["kind"])}


def _name(path: Json) -> str:
    if not isinstance(path, str):
        raise CorruptCheckpointError(f"the name of a layer is a text, not {path!r:.80}")
    return path


def _written(
    asked: Sequence[AnyStatistic], gathered: Statistics, tensors: dict[str, Tensor]
) -> list[Json]:
    """Return statistics and their states as JSON data, the tensors in them apart."""
    return [
        {
            "statistic": one.to_config(),
            "state": _plain(gathered.states[one], tensors) if one in gathered else None,
        }
        for one in asked
    ]


def _plain(state: object, tensors: dict[str, Tensor]) -> Json:
    if isinstance(state, Tensor):
        key = str(len(tensors))
        tensors[key] = state.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if attrs.has(type(state)):
        return {"fields": {name: _plain(value, tensors) for name, value in _fields(state).items()}}
    if isinstance(state, tuple | list):
        return {"items": [_plain(item, tensors) for item in state]}
    if state is None or isinstance(state, bool | int | float | str):
        return {"value": state}
    raise CheckpointError(
        f"a state holds a {type(state).__name__}, which files of statistics cannot: tensors, "
        "numbers, texts, tuples and attrs classes of those"
    )


def _fields(state: object) -> dict[str, object]:
    """Return the fields that make a state, by their arguments; not what it computed meanwhile."""
    known = attrs.fields(cast("type[attrs.AttrsInstance]", type(state)))  # `attrs.has` was asked
    return {str(one.alias): getattr(state, one.name) for one in known if one.init}


def _read(
    weights: Sequence[Mapping[str, Json]], tensors: Mapping[str, Tensor], kinds: Kinds | None
) -> Iterator[tuple[Key, Inputs]]:
    for entry in weights:
        rows, of_rows = _states(entry["rows"], tensors, kinds)
        inputs, of_inputs = _states(entry["inputs"], tensors, kinds)
        key = (str(entry["layer"]), str(entry["name"]))
        yield key, Inputs(rows, inputs, Gathered(Statistics(of_rows), Statistics(of_inputs)))


def _states(
    written: Json, tensors: Mapping[str, Tensor], kinds: Kinds | None
) -> tuple[tuple[AnyStatistic, ...], dict[AnyStatistic, object]]:
    asked: list[AnyStatistic] = []
    states: dict[AnyStatistic, object] = {}
    for entry in cast("Sequence[Mapping[str, Mapping[str, Json]]]", written):  # else it is refused
        statistic = AnyStatistic.from_config(entry["statistic"], kinds)
        asked.append(statistic)
        if entry["state"] is not None:
            fold = cast("Statistic[object]", statistic)  # the only kind of statistic there is
            # what class a state is of, the statistic says, and never the file
            state = _made(entry["state"], fold.observe(torch.ones(1, 1)), tensors)
            fold.check_state(state)
            states[statistic] = state
    return tuple(asked), states


def _made(written: Mapping[str, Json], like: object, tensors: Mapping[str, Tensor]) -> object:
    """Return a state that was written down, of the class of another one."""
    if isinstance(like, Tensor):
        found = tensors[str(written["tensor"])]
        if found.dtype != like.dtype or found.dim() != like.dim():
            raise CorruptCheckpointError(
                f"a state has {found.dtype} of {found.dim()} dimensions, where {like.dtype} of "
                f"{like.dim()} was expected"
            )
        return found
    if attrs.has(type(like)):
        inner = cast("Mapping[str, Mapping[str, Json]]", written["fields"])  # else it is refused
        parts = _fields(like)
        if set(inner) != set(parts):
            raise CorruptCheckpointError(f"a {type(like).__name__} has no {sorted(inner)}")
        return type(like)(**{name: _made(inner[name], parts[name], tensors) for name in parts})
    if isinstance(like, tuple | list):
        items = cast("Sequence[Mapping[str, Json]]", written["items"])  # else it is refused
        made = [_made(one, two, tensors) for one, two in zip(items, like, strict=True)]
        return type(like)(made)
    value = written["value"]
    if type(value) is not type(like):
        raise CorruptCheckpointError(f"a state has {value!r}, where a {type(like).__name__} was")
    return value
