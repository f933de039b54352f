"""Two checkpoints side by side: weights, sizes, and what the model makes of each."""

import math
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Checkpoint
from mono_quant.calibration import CalibrationData, compare, count_samples
from mono_quant.configurable import Config, Kinds
from mono_quant.errors import InputError
from mono_quant.evidence import grade
from mono_quant.files import fill
from mono_quant.numerics.metrics import SquaredError, tensor_bytes
from mono_quant.progress import told_bar
from mono_quant.serializers import read_checkpoint
from mono_quant.text import format_bytes, format_db, table


@attrs.frozen
class ComparedTensor:
    """One tensor of two checkpoints.

    Attributes:
        name: dotted name.
        reference_bytes: its bytes in the reference; 0 where it shares another's.
        bytes: its bytes in the other.
        sqnr_db: of the other's values against the reference's, in dB; None where the shapes differ.
    """

    name: str
    reference_bytes: int
    bytes: int
    sqnr_db: float | None


@attrs.frozen
class Comparison:
    """What two checkpoints have in common, and what not.

    Attributes:
        tensors: those that are quantized in one of the two, or whose values differ.
        equal: how many further tensors are equal.
        missing: names that only the reference has.
        added: names that only the other has.
        reference_bytes: all tensors of the reference.
        bytes: all tensors of the other.
        output_sqnr_db: of the model's outputs with the other, in dB; None if they were not run.
        samples: how many samples the outputs were measured on.
    """

    tensors: tuple[ComparedTensor, ...]
    equal: int
    missing: tuple[str, ...]
    added: tuple[str, ...]
    reference_bytes: int
    bytes: int
    output_sqnr_db: float | None = None
    samples: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller the other is."""
        return self.reference_bytes / self.bytes if self.bytes else 1.0

    def to_dict(self) -> Config:
        """Return everything as JSON data; an infinite SQNR is the string "inf"."""
        return {
            "reference_bytes": self.reference_bytes,
            "bytes": self.bytes,
            "ratio": self.ratio,
            "equal": self.equal,
            "missing": list(self.missing),
            "added": list(self.added),
            "output_sqnr_db": _finite(self.output_sqnr_db),
            "samples": self.samples,
            "tensors": [
                {
                    "name": row.name,
                    "reference_bytes": row.reference_bytes,
                    "bytes": row.bytes,
                    "sqnr_db": _finite(row.sqnr_db),
                }
                for row in self.tensors
            ],
        }

    def __str__(self) -> str:
        """Return it as text for a terminal."""
        times, what = (self.ratio, "smaller")
        if self.bytes > self.reference_bytes > 0:
            times, what = (1 / self.ratio, "larger")
        lines = [
            f"{format_bytes(self.reference_bytes)} -> {format_bytes(self.bytes)} "
            f"({times:.2f} times {what})"
        ]
        if self.output_sqnr_db is not None:
            lines.append(
                f"output SQNR {format_db(self.output_sqnr_db)} on {self.samples} samples "
                f"({grade(self.output_sqnr_db)})"
            )
        lines.append(f"{len(self.tensors)} tensors compared, {self.equal} more are equal")
        for what, names in (("missing", self.missing), ("added", self.added)):
            lines += [f"{what}: {name}" for name in names]
        if self.tensors:
            columns = ("name", "before", "after", "SQNR")
            rows = [
                (
                    row.name,
                    format_bytes(row.reference_bytes),
                    format_bytes(row.bytes),
                    format_db(row.sqnr_db) if row.sqnr_db is not None else "shapes differ",
                )
                for row in self.tensors
            ]
            lines += ["", *table(columns, rows, frozenset(columns[1:]))]
        return "\n".join(lines)


def compare_checkpoints(reference: Checkpoint, other: Checkpoint) -> Comparison:
    """Return how the tensors of one checkpoint differ from those of a reference.

    Raises:
        InputError: they have no name in common.
    """
    ours, theirs = (set(one.records) | set(one.tensors) for one in (reference, other))
    common = [name for name in (*reference.records, *reference.tensors) if name in theirs]
    if not common:
        raise InputError("the two have no tensor of one name in common")
    rows: list[ComparedTensor] = []
    equal = 0
    with told_bar("tensor", len(common)) as bar:
        for name in common:
            row = ComparedTensor(
                name,
                _bytes(reference, name),
                _bytes(other, name),
                _sqnr(_values(reference, name), _values(other, name)),
            )
            quantized = name in reference.records or name in other.records
            if not quantized and row.sqnr_db == math.inf:
                equal += 1
            else:
                rows.append(row)
            bar.update()
    return Comparison(
        tuple(rows),
        equal,
        tuple(sorted(ours - theirs)),
        tuple(sorted(theirs - ours)),
        sum(_bytes(reference, name) for name in ours),
        sum(_bytes(other, name) for name in theirs),
    )


def compare_files(
    reference: str | PathLike[str],
    other: str | PathLike[str],
    model: Callable[[], nn.Module] | None = None,
    data: CalibrationData | None = None,
    *,
    kinds: Kinds | None = None,
) -> Comparison:
    """Return how one file differs from a reference; both may be float or quantized.

    Args:
        reference: the path of the file that is right.
        other: the path of the other one.
        model: makes a float model of the architecture, once for each file.
        data: what to run both on; without it, and without a model, only tensors are compared.
        kinds: classes of your own that the files name.

    Raises:
        CheckpointError: a file cannot be read, or does not fit the model.
        CalibrationError: the model failed on the data.
    """
    checkpoints = [read_checkpoint(Path(path), kinds=kinds) for path in (reference, other)]
    comparison = compare_checkpoints(*checkpoints)
    if model is None or data is None:
        return comparison
    held = data.held()
    outputs = [_outputs(model(), checkpoint, held, kinds) for checkpoint in checkpoints]
    error = compare(*outputs)
    return attrs.evolve(
        comparison,
        output_sqnr_db=error.sqnr_db,
        samples=sum(count_samples(batch) for batch in held.batches()),
    )


def _outputs(
    model: nn.Module, checkpoint: Checkpoint, data: CalibrationData, kinds: Kinds | None
) -> Iterator[list[Tensor]]:
    return data.outputs(fill(model, checkpoint, kinds=kinds), "comparing")


def _values(checkpoint: Checkpoint, name: str) -> Tensor:
    record = checkpoint.records.get(name)
    return record.weight.dequantize() if record is not None else checkpoint.tensors[name]


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    if name in checkpoint.ties:
        return 0
    record = checkpoint.records.get(name)
    return record.weight.nbytes if record is not None else tensor_bytes(checkpoint.tensors[name])


def _sqnr(reference: Tensor, other: Tensor) -> float | None:
    if reference.shape != other.shape:
        return None
    if reference.dtype == other.dtype and torch.equal(reference, other):
        return math.inf
    return SquaredError.between(reference, other).sqnr_db


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
