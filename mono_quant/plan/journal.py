"""What a run has finished, kept in a folder so that it can go on after it was stopped."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import nn

from mono_quant.atomic import remove_abandoned
from mono_quant.base import Change, Checkpoint, PackedTensor, WeightRecord
from mono_quant.calibration import CalibrationData
from mono_quant.configurable import Config, Json, Kinds, kinds_of
from mono_quant.errors import CorruptCheckpointError, InputError
from mono_quant.numerics.nested import tensors_in
from mono_quant.plan.blocks import BlockFit
from mono_quant.plan.request import WeightPlan
from mono_quant.plan.stages import Stage
from mono_quant.serializers import SafetensorsSerializer
from mono_quant.serializers.wire import checksum
from mono_quant.version import __version__

_NAME = "stage-{:05d}.safetensors"
_FILES = SafetensorsSerializer()


@attrs.frozen(eq=False)
class Journal:
    """A folder with a file for each finished stage, whole or absent.

    Attributes:
        folder: where.
        run: what the files must be of; see `fingerprint`.
        todo: the weights, by name.
    """

    folder: Path
    run: str
    todo: Mapping[str, WeightPlan]

    @classmethod
    def open(
        cls,
        folder: Path,
        model: nn.Module,
        todo: Sequence[WeightPlan],
        data: CalibrationData,
        config: Config,
    ) -> "Journal":
        """Return the journal in a folder, which is made if there is none.

        Raises:
            OSError: the folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, fingerprint(model, data, config), {one.key: one for one in todo})

    def read(self, number: int, stage: Stage, model: nn.Module) -> BlockFit | None:
        """Return what a stage came to, or None where it is not finished.

        Args:
            number: of the stage.
            stage: whose layers are float still.
            model: that they are in.

        Raises:
            InputError: another run has written it.
            CheckpointError: it is not whole, or not of this stage.
        """
        path = self.folder / _NAME.format(number)
        if not path.exists():
            return None
        found = _FILES.load(path, kinds=self._kinds())
        if found.config.get("run") != self.run:
            raise InputError(
                f"{path} is of another run: of another quantizer, model or data, or of another "
                "version of torch or of this package; give an empty folder, or remove it"
            )
        if (why := _unfit(found, stage, model)) is not None:
            raise CorruptCheckpointError(
                f"{path} does not fit its block: {why}; remove it, and the block is done again"
            )
        return BlockFit(
            {key: record.weight for key, record in found.records.items()},
            found.tensors,
            _changes(found.config),
        )

    def write(
        self, number: int, stage: Stage, packed: Mapping[str, PackedTensor], fit: BlockFit
    ) -> None:
        """Write what a stage came to.

        Raises:
            OSError: it cannot be written.
        """
        records = {
            weight.key: WeightRecord(
                weight.path, weight.name, packed[weight.key], weight.maker.to_config()
            )
            for weight in stage.weights
            if weight.tied_to is None
        }
        changes: list[Json] = [[one.path, one.text, one.done] for one in fit.changes]
        config: Config = {"run": self.run, "changes": changes}
        checkpoint = Checkpoint(records, fit.parameters, config=config)
        _FILES.save(checkpoint, self.folder / _NAME.format(number))

    def close(self) -> None:
        """Remove the files, and what killed runs left beside them: the run is at its end."""
        for path in self.folder.glob(_NAME.replace("{:05d}", "*")):
            remove_abandoned(path)
            path.unlink()

    def _kinds(self) -> Kinds:
        schemes = [one.recipe.grid.scheme for one in self.todo.values() if one.recipe is not None]
        return kinds_of(*schemes, *(one.maker for one in self.todo.values()))


def _changes(config: Config) -> tuple[Change, ...]:
    """Return what a file says was done or refused.

    Raises:
        CorruptCheckpointError: it says that in another way than `Journal.write`.
    """
    match config.get("changes"):
        case [*entries]:
            return tuple(map(_change, entries))
    raise CorruptCheckpointError("a file of a finished block has no list of changes")


def _change(entry: Json) -> Change:
    match entry:
        case [str(path), str(text), bool(done)]:
            return Change(path, text, done)
    raise CorruptCheckpointError(f"a file of a finished block has the change {entry!r:.100}")


def _unfit(found: Checkpoint, stage: Stage, model: nn.Module) -> str | None:
    """Return what of a file is not of a stage of a model, or None."""
    own = {weight.key: weight for weight in stage.weights if weight.tied_to is None}
    if set(found.records) != set(own):
        return f"it holds {', '.join(found.records) or 'no weight'}"
    for key, record in found.records.items():
        dtype = model.get_parameter(own[key].sources[0]).dtype
        if record.weight.layout != own[key].layout or record.weight.dtype != dtype:
            return f"{key} is of another shape or dtype"
    known = dict(model.named_parameters())
    prefix = f"{stage.path}." if stage.path else ""
    for name, tensor in found.tensors.items():
        like = known.get(name) if name.startswith(prefix) else None
        if like is None or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            return f"it has no parameter such as {name}"
    return None


def fingerprint(model: nn.Module, data: CalibrationData, config: Config) -> str:
    """Return a checksum of all that a run depends on: configuration, weights, data, versions."""
    versions = [__version__, torch.__version__, torch.get_num_threads()]
    said = json.dumps([config, *versions], sort_keys=True)
    tensors = (tensor for batch in data.batches() for tensor in tensors_in(batch))
    state: Iterable[torch.Tensor] = (*model.parameters(), *model.buffers())
    total = zlib.crc32(said.encode())
    for tensor in (*state, *tensors):
        known = checksum(tensor.detach().to("cpu").contiguous())
        total = zlib.crc32(known.to_bytes(8, "big"), total)
    return f"{total:08x}"
