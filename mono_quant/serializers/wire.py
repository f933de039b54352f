"""A checkpoint as a JSON header and named tensors: what all of our own formats share."""

import ctypes
import json
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol, cast

import attrs
import torch
from torch import Tensor

from mono_quant.base import Activation, Checkpoint, PackedTensor, Scheme, WeightRecord
from mono_quant.configurable import Config, Json, Kinds, as_dtype, dtype_name
from mono_quant.errors import (
    CheckpointError,
    CorruptCheckpointError,
    FormatVersionError,
    Mend,
    MonoQuantError,
)
from mono_quant.numerics.blocks import block_counts
from mono_quant.numerics.packing import packed_length
from mono_quant.numerics.values import Layout
from mono_quant.progress import Bar, told_bar
from mono_quant.version import __version__

FORMAT = "mono_quant"
FORMAT_VERSION = 1

UNFIT = (
    MonoQuantError,
    LookupError,
    ArithmeticError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
)
"""What is raised by a header that is well formed and says what cannot be."""

_INPUT = "input_"  # before the names of what was calibrated for a weight's inputs


class TensorSource(Protocol):
    """Gives tensors by name, in memory of their own."""

    def __call__(self, key: str, /) -> Tensor:
        """Return the tensor of a key.

        Raises:
            KeyError: there is none.
        """


def encode(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the text entries and the tensors of a file; tied tensors once.

    Tensors are contiguous and on the CPU, and shared with the checkpoint where they already were.
    """
    tensors: dict[str, Tensor] = {}
    records: dict[str, Json] = {}
    for key, record in checkpoint.records.items():
        records[key] = {
            "module": record.module,
            "name": record.name,
            "layer": record.layer,
            "scheme": record.weight.scheme.to_config(),
            "native": record.weight.layout.native,
            "split": record.weight.layout.split,
            "order": record.weight.layout.order,
            "stack": record.weight.layout.stack,
            "dtype": dtype_name(record.weight.dtype),
            "tensors": list(record.weight.tensors),
            "activation": _activation_entry(record.activation),
        }
        for name, tensor in (record.activation.tensors if record.activation else {}).items():
            tensors[f"{key}.{_INPUT}{name}"] = tensor
        if key not in checkpoint.ties:
            for name, tensor in record.weight.tensors.items():
                tensors[f"{key}.{name}"] = tensor
    for key, tensor in checkpoint.tensors.items():
        if key in tensors:
            raise CheckpointError(f"two tensors of the file would be called {key!r}")
        if key not in checkpoint.ties:
            tensors[key] = tensor
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    checksums: dict[str, int] = {}
    with ThreadPoolExecutor() as pool, told_bar("tensor", len(tensors)) as bar:
        for key, found in zip(tensors, pool.map(checksum, tensors.values()), strict=True):
            checksums[key] = found
            bar.update()
    header: Config = {
        "records": records,
        "transient": sorted(checkpoint.transient),
        "ties": checkpoint.ties,
        "containers": checkpoint.containers,
        "edits": checkpoint.edits,
        "applied": checkpoint.applied,
        "config": checkpoint.config,
        "summary": checkpoint.summary,
        "checksums": checksums,
        "producer": {"mono_quant": __version__, "torch": torch.__version__},
    }
    return seal(FORMAT, FORMAT_VERSION, header), tensors


def seal(form: str, version: int, header: Config) -> dict[str, str]:
    """Return the text entries of a file of some form, with a checksum of its header."""
    text = json.dumps(header, allow_nan=False)
    return {
        "format": form,
        "format_version": str(version),
        "header": text,
        "header_checksum": str(zlib.crc32(text.encode())),
    }


def unseal(texts: Mapping[str, str], newest: int) -> Config:
    """Return the header in the text entries of a file.

    Args:
        texts: what `seal` returned.
        newest: the version that is known here.

    Raises:
        CorruptCheckpointError: something was changed.
        FormatVersionError: its version is newer.
    """
    version = texts.get("format_version", "")
    if not version.isdecimal():
        raise CorruptCheckpointError(f"its format version is {version!r}")
    if int(version) > newest:
        raise FormatVersionError(
            f"it has format version {version}, and this mono_quant reads up to {newest}; "
            "upgrade mono_quant"
        )
    header = texts.get("header", "")
    if str(zlib.crc32(header.encode())) != texts.get("header_checksum"):
        raise CorruptCheckpointError("its header was changed: the checksum differs")
    try:
        parsed: Json = json.loads(header, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"its header is not JSON: {error}") from error
    return _mapping(parsed)


def decode(texts: Mapping[str, str], source: TensorSource, kinds: Kinds | None) -> Checkpoint:
    """Return the checkpoint of a file's text entries and tensors.

    Raises:
        CorruptCheckpointError: it is not one of ours, or something was changed.
        FormatVersionError: it is newer than this package.
        UnknownKindError: it names a class that is not known.
    """
    header = _header(texts)
    try:
        checksums = _mapping(header["checksums"])
        with ThreadPoolExecutor() as pool, told_bar("tensor", len(checksums)) as bar:
            return _checkpoint(header, _Checked(source, checksums, pool, bar), kinds)
    except CheckpointError:
        raise
    except UNFIT as error:
        raise CorruptCheckpointError(f"the header does not fit the file: {error!r}") from error


def read_header(texts: Mapping[str, str]) -> Config:
    """Return the header without a tensor: what `decode` reads first, and the format's version."""
    return {**_header(texts), "format_version": int(texts["format_version"])}


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous CPU tensor: dtype and shape as text, then its bytes.

    The bytes are read in place. Formats keep dtype and shape where nothing else would notice a
    change of them.
    """
    described = f"{dtype_name(tensor.dtype)} {list(tensor.shape)} "
    start = zlib.crc32(described.encode())
    size = tensor.numel() * tensor.element_size()
    if not size:
        return start
    return zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr()), start)


def _header(texts: Mapping[str, str]) -> Config:
    if texts.get("format") != FORMAT:
        raise CorruptCheckpointError("it was not written by mono_quant", Mend.IS_FLOAT)
    return unseal(texts, FORMAT_VERSION)


@attrs.frozen(eq=False)
class _Checked:
    """Reads tensors, whose checksums are computed meanwhile on other cores.

    Attributes:
        source: of the tensors.
        checksums: of every tensor of the file.
        pool: that computes them anew.
        bar: counts the tensors that are read; those that check them keep up.
        found: what it computes, by key.
    """

    source: TensorSource
    checksums: Config
    pool: Executor
    bar: Bar
    found: dict[str, Future[int]] = attrs.field(factory=dict)

    def __call__(self, key: str) -> Tensor:
        """Return a tensor that is not trusted yet."""
        tensor = self.source(key).detach()
        if not _is_plain(tensor):
            raise CorruptCheckpointError(f"tensor {key!r} is not stored as plain memory")
        self.found[key] = self.pool.submit(checksum, tensor)
        self.bar.update()
        return tensor

    def check(self) -> None:
        """Refuse the file if a tensor that was read is not what was written."""
        for key, found in self.found.items():
            if found.result() != self.checksums[key]:
                raise CorruptCheckpointError(f"tensor {key!r} was changed: the checksum differs")


def _is_plain(tensor: Tensor) -> bool:
    stored = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return stored and tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _checkpoint(header: Config, tensor: _Checked, kinds: Kinds | None) -> Checkpoint:
    try:
        return _unchecked(header, tensor, kinds)
    finally:
        tensor.check()  # first of all that may be wrong


def _unchecked(header: Config, tensor: _Checked, kinds: Kinds | None) -> Checkpoint:
    ties = {alias: _text(first) for alias, first in _mapping(header["ties"]).items()}
    entries = _mapping(header["records"])
    records: dict[str, WeightRecord] = {}
    packed_keys: set[str] = set()
    for key, value in entries.items():
        entry = _mapping(value)
        first = ties.get(key, key)
        names = [_text(name) for name in _items(entry["tensors"])]
        packed_keys.update(f"{first}.{name}" for name in names)
        if first != key:
            tensors = records[first].weight.tensors
        else:
            tensors = {name: tensor(f"{key}.{name}") for name in names}
        activation = None
        if entry["activation"] is not None:
            described = _mapping(entry["activation"])
            found = [_text(name) for name in _items(described["tensors"])]
            calibrated = {name: tensor(f"{key}.{_INPUT}{name}") for name in found}
            packed_keys.update(f"{key}.{_INPUT}{name}" for name in found)
            activation = _activation(key, described, calibrated, kinds)
        records[key] = attrs.evolve(_record(key, entry, tensors, kinds), activation=activation)
    rest = {key: tensor(key) for key in tensor.checksums if key not in packed_keys}
    rest.update({alias: rest[first] for alias, first in ties.items() if alias not in records})
    return Checkpoint(
        records,
        rest,
        frozenset(_text(key) for key in _items(header["transient"])),
        ties,
        tuple(_mapping(config) for config in _items(header["containers"])),
        tuple(_mapping(config) for config in _items(header["edits"])),
        {path: _text(layer) for path, layer in _mapping(header["applied"]).items()},
        _mapping(header["config"]),
        _mapping(header["summary"]),
    )


def _record(
    key: str, entry: Config, tensors: Mapping[str, Tensor], kinds: Kinds | None
) -> WeightRecord:
    scheme = Scheme.from_config(_mapping(entry["scheme"]), kinds)
    layout = Layout(*(_shape(entry[part]) for part in ("native", "split", "order", "stack")))
    packed = PackedTensor(tensors, scheme, layout, as_dtype(_text(entry["dtype"])))
    _check_shapes(key, packed)
    return WeightRecord(
        _text(entry["module"]), _text(entry["name"]), packed, _mapping(entry["layer"])
    )


def _activation_entry(activation: Activation | None) -> Json:
    if activation is None:
        return None
    return {"scheme": activation.scheme.to_config(), "tensors": list(activation.tensors)}


def _activation(
    key: str, entry: Config, tensors: Mapping[str, Tensor], kinds: Kinds | None
) -> Activation:
    scheme = Scheme.from_config(_mapping(entry["scheme"]), kinds)
    for name, tensor in tensors.items():
        floating = name == "scale"
        if tensor.numel() != 1 or tensor.is_floating_point() is not floating:
            raise CorruptCheckpointError(
                f"the input's {name} of {key!r} is {tuple(tensor.shape)} of {tensor.dtype}"
            )
    if set(tensors) - {"scale", "zero_point"} or ("scale" not in tensors and tensors):
        raise CorruptCheckpointError(f"the input of {key!r} has {', '.join(sorted(tensors))}")
    return Activation(scheme, tensors.get("scale"), tensors.get("zero_point"))


def _check_shapes(key: str, packed: PackedTensor) -> None:
    layout, scheme, tensors = packed.layout, packed.scheme, packed.tensors
    *rows, length = layout.stack
    counts = block_counts(layout.stack, packed.block_size)
    bits = scheme.code_bits
    columns = length if bits is None else packed_length(length, bits)
    expected: dict[str, tuple[int, ...]] = {"codes": (*rows, columns)}
    floating = {"codes": bits is None}
    if "scale" in tensors:
        expected["scale"] = counts
    if "zero_point" in tensors:
        expected["zero_point"] = counts
        floating["zero_point"] = tensors["zero_point"].is_floating_point()
        if bits is not None and not floating["zero_point"]:
            expected["zero_point"] = (packed_length(math.prod(counts), bits),)
    if scheme.has_zero_point:
        floating["zero_point"] = _has_float_zero_points(scheme)
    if missing := set(floating) - set(tensors):
        raise CorruptCheckpointError(f"{key!r} has no {', '.join(sorted(missing))}")
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise CorruptCheckpointError(
                f"{name} of {key!r} is {found}, where {shape} was expected"
            )
        dtype = tensors[name].dtype
        is_float = floating.get(name)  # of scales, the scheme knows
        if is_float is not None and not (
            dtype.is_floating_point if is_float else dtype == scheme.stored_dtype
        ):
            raise CorruptCheckpointError(f"{name} of {key!r} is of {dtype}")
    if reason := scheme.refuse_parts(tensors, layout.stack):
        raise CorruptCheckpointError(f"{key!r} is no {scheme.describe()}: {reason}")
    count = math.prod(layout.stack)
    moved = sorted(layout.order) == list(range(len(layout.split)))
    if not moved or math.prod(layout.native) != count or math.prod(layout.split) != count:
        raise CorruptCheckpointError(f"the layout of {key!r} does not fit its shape")
    if not packed.dtype.is_floating_point:
        raise CorruptCheckpointError(f"{key!r} is said to be of {packed.dtype}")


def _has_float_zero_points(scheme: Scheme) -> bool:
    """Return whether a scheme that has zero points holds them as floats."""
    one = torch.ones(1, device="cpu")
    return scheme.hold_zero_point(one, one).is_floating_point()


def _finite(text: str) -> float:
    """Return a number that JSON has, which has no infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is not a number of JSON")
    return value


def _mapping(value: Json) -> Config:
    if not isinstance(value, Mapping):
        raise CorruptCheckpointError(f"the header has {value!r} where a mapping was expected")
    return value


def _items(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise CorruptCheckpointError(f"the header has {value!r} where a list was expected")
    return cast("list[Json]", value)  # what json.loads makes of a list


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise CorruptCheckpointError(f"the header has {value!r} where a text was expected")
    return value


def _shape(value: Json) -> tuple[int, ...]:
    sizes = tuple(size for size in _items(value) if isinstance(size, int) and size >= 0)
    if len(sizes) != len(_items(value)):
        raise CorruptCheckpointError(f"the header has the shape {value!r}")
    return sizes
