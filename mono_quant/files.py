"""Files as they are, quantized or float: what is in them, and how it gets into a model."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from torch import Tensor, nn

from mono_quant.base import Checkpoint, Scheme
from mono_quant.calibration import CalibrationData
from mono_quant.checkpoint import ModelT, rebuild
from mono_quant.configurable import Config, Json, Kinds, as_dtype
from mono_quant.errors import CheckpointError, CorruptCheckpointError, UnknownKindError
from mono_quant.evidence import LayerReport
from mono_quant.report import Report
from mono_quant.result import Validation, validate
from mono_quant.serializers import read_header, serializer_for, stored_bytes
from mono_quant.stored import LAYERS, report_of
from mono_quant.text import format_bytes, table


@attrs.frozen
class StoredWeight:
    """One quantized weight of a file.

    Attributes:
        name: dotted name, as in a state dict.
        shape: of the float weight.
        scheme: how it is quantized.
        bytes: everything counted; 0 for a weight that shares another's.
        tied_to: name of that other weight.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    bytes: int
    tied_to: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per value, everything counted."""
        count = math.prod(self.shape)
        return 8 * self.bytes / count if count else 0.0


@attrs.frozen
class FileInfo:
    """What a quantized file says of itself.

    Attributes:
        path: the file.
        format: "safetensors" or "torch".
        format_version: of the header.
        producer: what wrote it, with versions.
        file_bytes: size of the file.
        weights: the quantized weights.
        float_tensors: how many tensors stayed as they were.
        float_tensor_bytes: their bytes.
        config: the quantizer that made it; empty if that was not saved.
        summary: figures of the report; empty if they were not saved.
        report: what is known of the model; of a file whose writer kept no rows, the sizes alone.
    """

    path: Path
    format: str
    format_version: int
    producer: Mapping[str, str]
    file_bytes: int
    weights: tuple[StoredWeight, ...]
    float_tensors: int
    float_tensor_bytes: int
    config: Config
    summary: Config
    report: Report

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        rows: list[Config] = [
            {
                "name": weight.name,
                "shape": list(weight.shape),
                "scheme": weight.scheme,
                "bytes": weight.bytes,
                "bits_per_weight": weight.bits_per_weight,
                "tied_to": weight.tied_to,
            }
            for weight in self.weights
        ]
        return {
            "path": str(self.path),
            "format": self.format,
            "format_version": self.format_version,
            "producer": self.producer,
            "file_bytes": self.file_bytes,
            "float_tensors": self.float_tensors,
            "float_tensor_bytes": self.float_tensor_bytes,
            "config": self.config,
            "summary": self.summary,
            "weights": rows,
        }

    def __str__(self) -> str:
        """Return it as text for a terminal."""
        made_by = ", ".join(f"{name} {version}" for name, version in self.producer.items())
        lines = [
            f"{self.path}: {format_bytes(self.file_bytes)}, {self.format}, "
            f"format version {self.format_version}, written by {made_by}"
        ]
        for name, value in self.summary.items():
            said = value if isinstance(value, list) else [_short(name, value)] if value else []
            lines += [f"{name.replace('_', ' ')}: {_text(one)}" for one in said]
        lines += [
            f"config {name}: {json.dumps(value)}" for name, value in self.config.items() if value
        ]
        lines.append(
            f"{len(self.weights)} quantized weights, {self.float_tensors} other tensors "
            f"({format_bytes(self.float_tensor_bytes)})"
        )
        rows = [
            (
                weight.name,
                "x".join(map(str, weight.shape)),
                format_bytes(weight.bytes),
                f"{weight.bits_per_weight:.2f}",
                weight.scheme + (f"; tied to {weight.tied_to}" if weight.tied_to else ""),
            )
            for weight in self.weights
        ]
        columns = ("name", "shape", "size", "bits", "scheme")
        return "\n".join([*lines, "", *table(columns, rows, frozenset({"size", "bits"}))])


def _text(item: object) -> str:
    """Return an item of a list of the summary as text: of a change, what it says."""
    return str(item.get("text", item)) if isinstance(item, Mapping) else str(item)


def describe_file(path: Path, *, kinds: Kinds | None = None) -> FileInfo:
    """Return what a quantized file says of itself, without reading a tensor.

    Schemes of a kind that is not known here go by that kind.

    Raises:
        CheckpointError: the file is not whole, not ours, or too new.
    """
    serializer = serializer_for(path)
    header, sizes = read_header(path), stored_bytes(path)
    try:
        weights = _weights(header, sizes, kinds)
        own = {weight.name for weight in weights}
        others = [size for name, size in sizes.items() if name.rpartition(".")[0] not in own]
        version, producer = header["format_version"], _mapping(header["producer"])
        summary = _mapping(header["summary"])
        return FileInfo(
            path=path,
            format=serializer.format,
            format_version=version if isinstance(version, int) else 0,
            producer={name: str(value) for name, value in producer.items()},
            file_bytes=path.stat().st_size,
            weights=weights,
            float_tensors=len(others),
            float_tensor_bytes=sum(others),
            config=_mapping(header["config"]),
            summary={name: value for name, value in summary.items() if name != LAYERS},
            report=report_of(summary) if LAYERS in summary else _sizes(header, weights, others),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{path} has a header that does not fit: {error!r}") from error


def float_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict of the float model, its weights on the grid; tied ones stay tied.

    Buffers that a state dict leaves out are left out.
    """
    floats: dict[str, Tensor] = {}
    for key, record in checkpoint.records.items():
        first = checkpoint.ties.get(key, key)
        floats[key] = floats[first] if first in floats else record.weight.dequantize()
    for key, tensor in checkpoint.tensors.items():
        if key not in checkpoint.transient:
            floats[key] = tensor
    return floats


def fill(model: ModelT, checkpoint: Checkpoint, *, kinds: Kinds | None = None) -> ModelT:
    """Put a checkpoint into a model, in place, and return it: quantized if the checkpoint is.

    A float checkpoint may leave out further names of a tied tensor.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    if checkpoint.records:
        return rebuild(model, checkpoint, kinds=kinds)
    tensors = float_state_dict(checkpoint)
    try:
        fit = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise CheckpointError(f"the checkpoint does not fit the model: {reason}") from error
    held = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for key, tensor in held.items() if key in tensors}
    missing = [key for key in fit.missing_keys if id(held.get(key)) not in loaded]
    for names, owner, other in (
        (missing, "model", "checkpoint"),
        (fit.unexpected_keys, "checkpoint", "model"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"the {owner} has {', '.join(names[:3])}{more}, which the {other} lacks"
            )
    return model


def validate_file(
    path: Path,
    model: nn.Module | None = None,
    example: CalibrationData | None = None,
    *,
    kinds: Kinds | None = None,
) -> Validation:
    """Return what reading a quantized file and running it shows.

    Args:
        path: the file.
        model: a float model of the architecture, which is filled in place.
        example: a batch to run.
        kinds: classes of your own that the file names.

    Returns:
        "valid" only if it was reloaded twice, run on the example, and agreed to the bit.
    """
    try:
        checkpoint = serializer_for(path).load(path, kinds=kinds)
        seen = f"{len(checkpoint.records)} weights, every checksum right"
        if model is None:
            return Validation("reloaded, not run", (("read", seen), ("run", "no model was given")))
        rebuild(model, checkpoint, kinds=kinds)
    except CheckpointError as error:
        return Validation("failed", ((type(error).__name__, str(error)),))
    shown = validate(model, example, path=path)
    return attrs.evolve(shown, checks=(("read", seen), *shown.checks))


def _sizes(header: Config, weights: Sequence[StoredWeight], others: Sequence[int]) -> Report:
    """Return a report of the sizes of a file's tensors."""
    records, rows = _mapping(header["records"]), list[LayerReport]()
    for weight in weights:
        if weight.tied_to is None:
            dtype = as_dtype(str(_mapping(records[weight.name])["dtype"]))
            count = math.prod(weight.shape)
            tied = tuple(other.name for other in weights if other.tied_to == weight.name)
            size = count * dtype.itemsize
            row = LayerReport(weight.name, "", weight.shape, count, size, weight.bytes)
            rows.append(attrs.evolve(row, scheme=weight.scheme, aliases=tied))
    name, size = f"({len(others)} other tensors)", sum(others)
    rows.append(LayerReport(name, "", (), 0, size, size, reason="as they were"))
    return Report(tuple(rows))


def _weights(
    header: Config, sizes: Mapping[str, int], kinds: Kinds | None
) -> tuple[StoredWeight, ...]:
    ties = _mapping(header["ties"])
    weights = []
    for name, value in _mapping(header["records"]).items():
        entry = _mapping(value)
        config = _mapping(entry["scheme"])
        try:
            scheme = Scheme.from_config(config, kinds).describe()
        except UnknownKindError:
            scheme = str(config.get("kind"))
        parts, first = _list(entry["tensors"]), ties.get(name)
        weights.append(
            StoredWeight(
                name,
                tuple(size for size in _list(entry["native"]) if isinstance(size, int)),
                scheme,
                sum(sizes[f"{name}.{part}"] for part in parts) if first is None else 0,
                str(first) if first is not None else None,
            )
        )
    return tuple(weights)


def _mapping(value: Json) -> Config:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is no mapping")
    return value


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _short(name: str, value: Json) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
