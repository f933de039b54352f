"""What quantizing gives back: the model, the evidence, and what can be done with both."""

import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Generic, Self

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Activation, Checkpoint, LayerQuantizer, PackedTensor, Serializer
from mono_quant.benchmark import measure_speed
from mono_quant.calibration import CalibrationData, evaluating, positional_arguments
from mono_quant.checkpoint import (
    ModelT,
    check_quantized,
    copy_structure,
    dequantized,
    kinds_in,
    rebuild,
    to_checkpoint,
)
from mono_quant.configurable import Config
from mono_quant.devices import devices_of, move
from mono_quant.errors import CheckpointError, InputError
from mono_quant.modules import BareModule
from mono_quant.report import Report
from mono_quant.serializers import BUILT_IN_SERIALIZERS, serializer_for
from mono_quant.speed import Speed
from mono_quant.stored import stored
from mono_quant.text import table


@attrs.frozen
class Outline:
    """What a plan decided, without the model.

    Attributes:
        report: every weight's fate and predicted bytes.
        peak_bytes: predicted peak memory of `apply`: the model, the result and one layer's work.
        peak_bytes_in_place: the same for `apply_`; None for a graph, which has no such form.
        config: the quantizer's configuration, predicates resolved to names.
    """

    report: Report
    peak_bytes: int
    peak_bytes_in_place: int | None
    config: Config

    def explain(self) -> str:
        """Return what will happen to each weight, the predicted size and the peak memory."""
        return self.report.forecast(self.peak_bytes, self.peak_bytes_in_place)


@attrs.frozen
class Validation:
    """What saving, reloading and running a quantized model showed.

    Attributes:
        status: "valid" (reloaded, run, equal), "reloaded, not run" or "failed".
        checks: what was looked at, and what was seen.
    """

    status: str
    checks: tuple[tuple[str, str], ...]

    def __bool__(self) -> bool:
        """Return whether the model is valid: reloaded and run, not only reloaded."""
        return self.status == "valid"

    def __str__(self) -> str:
        """Return the status and the checks as text."""
        return "\n".join([self.status, *table(("check", "seen"), self.checks)])


@attrs.define(eq=False, repr=False, on_setattr=attrs.setters.frozen)
class QuantizationResult(Generic[ModelT]):
    """A quantized model and what is known of it.

    Attributes:
        model: of the class of the float model.
        report: per-layer evidence, and the speed once `benchmark` has measured it.
        plan: what was decided, and why.
    """

    model: ModelT
    report: Report = attrs.field(on_setattr=attrs.setters.NO_OP)
    plan: Outline
    _data: CalibrationData | None = attrs.field(default=None, alias="data")
    _layers: tuple[LayerQuantizer, ...] = attrs.field(default=(), alias="layers")

    def require(self, *, coverage: float | None = None, sqnr: float | None = None) -> Self:
        """Return the result if its report holds what is required; see `Report.require`.

        Args:
            coverage: the least share of the parameters' bytes that is quantized, 0 to 1.
            sqnr: the least SQNR of the outputs on the data, in dB.

        Raises:
            RequirementError: it does not; says by how much, and what stays float and why.
        """
        self.report.require(coverage=coverage, sqnr=sqnr)
        return self

    def checkpoint(self) -> Checkpoint:
        """Return the model as plain data that shares its memory."""
        return to_checkpoint(self._class_kept, self.plan.config, stored(self.report))

    def save(self, path: str | PathLike[str], *, serializer: Serializer | None = None) -> Path:
        """Write the model to a file and return its path.

        Args:
            path: its suffix chooses the format: .safetensors, .pt or .pth.
            serializer: a format of your own.

        Raises:
            CheckpointError: no format has that suffix, or it cannot hold the model.
            OSError: the file cannot be written; what stood there still stands.
        """
        path = Path(path)
        (serializer or serializer_for(path)).save(self.checkpoint(), path)
        return path

    def dequantize(self) -> ModelT:
        """Return a float copy of the model whose weights lie on the grid."""
        return dequantized(copy_structure(self.model))

    def validate(
        self,
        example: object = None,
        *,
        serializer: Serializer | None = None,
        path: str | PathLike[str] | None = None,
    ) -> Validation:
        """Save the model, load it into a fresh one without a weight, run both, and compare.

        Args:
            example: a batch, as `fit` takes them; by default the first one of the data.
            serializer: the format to go through; by default the first that can hold the model.
            path: a file that `save` wrote, to be looked at instead of a temporary one.

        Returns:
            "valid" only if both were run on an example and agree to the bit.
        """
        saved = Path(path) if path is not None else None
        data = self._example(example)
        model, layers = self._class_kept, self._layers
        return validate(model, data, serializer, layers, saved, self._as_run)

    def export(
        self, example: object = None, *, strict: bool = False
    ) -> torch.export.ExportedProgram:
        """Return the model as a program of plain torch operators, which loads without this package.

        Args:
            example: a batch as `fit` takes them: a tensor, a tuple or a mapping of arguments; by
                default the first one of the data.
            strict: as `torch.export.export` has it.

        Raises:
            InputError: there is no example, or no forward.
        """
        if isinstance(self.model, BareModule):
            raise InputError(
                "a state dict has no forward to export; load the file into its model first: "
                "load_model(path, model)"
            )
        data = self._example(example)
        if data is None:
            raise InputError("export needs an example: export(example)")
        if data.forward is not None and example is None:
            raise InputError(
                "the data is run by fit(forward=...), and export traces the model's own forward: "
                "give its arguments, export(example)"
            )
        batch, model = data.first(), self._class_kept
        args: tuple[object, ...] = ()
        kwargs: dict[str, object] = {}
        if isinstance(batch, Mapping):
            kwargs = {str(name): value for name, value in batch.items()}
        elif isinstance(batch, tuple | list):
            args = tuple(batch[: positional_arguments(model)])
        else:
            args = (batch,)
        with evaluating(model):
            return torch.export.export(model, args, kwargs, strict=strict)

    def benchmark(
        self, example: object = None, *, seconds: float = 5.0, progress: bool = True
    ) -> Speed:
        """Measure the model's speed beside the float one, by turns, on this machine.

        The float model is made for it, with weights on the grid, and takes its memory meanwhile.
        From then on the report tells the speed too, and which kernel computed each weight; files
        do not.

        Args:
            example: a batch as `fit` takes them; by default the first one of the data.
            seconds: roughly how long to measure.
            progress: show a progress bar where the output is a terminal.

        Raises:
            InputError: there is no example.
        """
        data = self._example(example)
        if data is None or isinstance(self.model, BareModule):
            raise InputError("benchmark needs a model and an example: benchmark(example)")
        label = "measuring" if progress else None
        found = measure_speed(self.dequantize(), self.model, data, seconds, label)
        self.report = self.report.with_speed(found)
        return found

    def __repr__(self) -> str:
        """Return the model's class and its size; `report` says more."""
        return f"<{type(self).__name__} of {type(self._class_kept).__name__}: {self.report.sizes}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    @property
    def _class_kept(self) -> nn.Module:
        """The model that files hold."""
        return self.model

    def _as_run(self, model: nn.Module) -> nn.Module:
        """Return what is run of a model that files hold."""
        return model

    def _example(self, example: object) -> CalibrationData | None:
        if example is None:
            return self._data
        forward = self._data.forward if self._data is not None else None
        return CalibrationData.example(example, forward)


def _itself(model: nn.Module) -> nn.Module:
    return model


def validate(
    model: nn.Module,
    example: CalibrationData | None,
    serializer: Serializer | None = None,
    layers: tuple[LayerQuantizer, ...] = (),
    path: Path | None = None,
    as_run: Callable[[nn.Module], nn.Module] = _itself,
) -> Validation:
    """Return what saving, reloading and running a quantized model shows; see `Validation`.

    With a path, the file there is taken for the saved model; with `as_run`, what that returns is
    run of either.

    Raises:
        InputError: nothing of the model is quantized.
    """
    check_quantized(model)
    checks: list[tuple[str, str]] = []
    try:
        saved, kinds = to_checkpoint(model), kinds_in(model)
        if path is not None:
            chosen = serializer or serializer_for(path)
            loaded = chosen.load(path, kinds=kinds)
            checks.append(("saved", f"{path.stat().st_size} bytes, {chosen.format}"))
        else:
            chosen = serializer or _first_able(saved)
            with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
                path = Path(folder) / f"model{chosen.suffixes[0]}"
                chosen.save(saved, path)
                checks.append(("saved", f"{path.stat().st_size} bytes, {chosen.format}"))
                loaded = chosen.load(path, kinds=kinds)
        fresh = dequantized(copy_structure(model, torch.device("meta")))
        rebuild(fresh, loaded, layers=layers, kinds=kinds)
        if unequal := _unequal(saved, to_checkpoint(fresh)):
            return Validation("failed", (*checks, ("reloaded", f"{unequal} differs")))
        checks.append(("reloaded", f"{len(saved.records)} weights, equal to the bit"))
        move(fresh, devices_of(model))
    except (CheckpointError, InputError) as error:
        return Validation("failed", (*checks, (type(error).__name__, str(error))))
    if example is None or isinstance(model, BareModule):
        bare = isinstance(model, BareModule)
        why = "a state dict has no forward" if bare else "no example: validate(example=...)"
        return Validation("reloaded, not run", (*checks, ("run", why)))
    one = CalibrationData([example.first()], 1, example.forward)
    ours, theirs = (seeded_outputs(one, as_run(which)) for which in (model, fresh))
    if not all(_same_tensor(x, y) for x, y in zip(ours, theirs, strict=True)):
        return Validation("failed", (*checks, ("run", "the reloaded model's output differs")))
    count = sum(x.numel() for x in ours)
    finite = sum(int(torch.isfinite(x).sum()) for x in ours)
    if count and not finite:
        return Validation("failed", (*checks, ("run", "no value of the output is finite")))
    seen = f"{count} output values, equal to the bit"
    if finite < count:
        seen += f", {count - finite} of them not finite"
    return Validation("valid", (*checks, ("run", seen)))


def seeded_outputs(data: CalibrationData, model: nn.Module) -> list[Tensor]:
    """Return the outputs for the first batch, the same random numbers given to every model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return next(data.outputs(model))


def _first_able(checkpoint: Checkpoint) -> Serializer:
    for serializer in BUILT_IN_SERIALIZERS:
        if serializer.can_express(checkpoint) is None:
            return serializer
    raise CheckpointError("no built-in format can hold the model; pass serializer=")


def _unequal(one: Checkpoint, other: Checkpoint) -> str | None:
    """Return the name of a tensor in which two checkpoints differ, or None."""
    if set(one.records) != set(other.records) or set(one.tensors) != set(other.tensors):
        return "the set of names"
    for key, record in one.records.items():
        if not _same_weight(record.weight, other.records[key].weight):
            return key
        if not _same_activation(record.activation, other.records[key].activation):
            return f"what is known of the inputs of {key}"
    for key, tensor in one.tensors.items():
        if not _same_tensor(tensor, other.tensors[key]):
            return key
    return None


def _same_weight(one: PackedTensor, other: PackedTensor) -> bool:
    return (
        (one.scheme, one.layout, one.dtype) == (other.scheme, other.layout, other.dtype)
        and set(one.tensors) == set(other.tensors)
        and all(_same_tensor(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


def _same_activation(one: Activation | None, other: Activation | None) -> bool:
    if one is None or other is None:
        return one is other
    return (
        one.scheme == other.scheme
        and set(one.tensors) == set(other.tensors)
        and all(_same_tensor(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    plain = tensor.detach().cpu().contiguous().flatten()
    if plain.numel() == 1:  # it is contiguous whatever its stride says, and a view minds that
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8)
