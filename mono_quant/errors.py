"""What can go wrong, as one tree of exceptions.

::

    MonoQuantError
    ├── ConfigurationError (ValueError)      settings that contradict each other or cannot work
    ├── InputError (ValueError)              a model, tensor or batch that cannot be used
    ├── CalibrationError (RuntimeError)      the data could not be run through the model
    ├── DamageError (RuntimeError)           quantizing destroyed a layer, and that was refused
    ├── RequirementError (RuntimeError)      the result falls short of what was required of it
    ├── UnsupportedLayerError (TypeError)    a layer that has no quantized form here
    └── CheckpointError (ValueError)         a file that cannot be written or read
        ├── FormatVersionError               written by a newer version
        ├── UnknownKindError (also KeyError) names a class that is not known here
        └── CorruptCheckpointError           truncated, edited, or not one of ours

Each message says what was wrong with which layer or file, what was expected, and the call that
mends it. Where another interface says the call in other words, it is a `Mend`.
"""

from collections.abc import Mapping
from enum import Enum


class Mend(Enum):
    """What mends an error, as calls of Python; ``{layer}`` stands for the name of a layer."""

    SAMPLES = "say how many with fit(data, samples=...)"
    FORWARD = (
        "if it is called another way, say how with fit(data, forward=lambda model, batch: ...)"
    )
    OUTPUT = "return one with fit(data, forward=lambda model, batch: ...)"
    BATCH = "leave it out of what fit(data) or measure_on(data) is given"
    TUPLE = "write fit([(inputs, labels)]) for one batch, or fit(list(batches)) for several"
    DATA = "give some with fit(data)"
    DATA_OR_DYNAMIC = 'give some with fit(data), or say activations("dynamic")'
    STATISTICS = "gather them with the same settings: quantizer.fit(data).plan(model).calibrate()"
    NO_STATIC = 'leave activations("static") out; of a state dict, quantize its model instead'
    COPY = "use apply"
    GRID = (
        "give it another grid, or round it otherwise with "
        "override({layer}, rounding=RoundToNearest())"
    )
    ROUNDING = "skip({layer}) or give it another rounding with override(...)"
    SKIP = "mend the weight, or leave the layer in float with skip({layer})"
    SUFFIX = "rename it or pass serializer="
    LAYER = "give one that does with layers=(...), or its class with kinds={{...}}"
    IS_QUANTIZED = "load_model(path) reads it"
    IS_FLOAT = "a float checkpoint is quantized first, with quantize(...)"


class MonoQuantError(Exception):
    """Parent of every error that this package raises on purpose.

    Attributes:
        what: what was wrong.
        mend: what mends it, where `what` does not say it already.
        layer: the name of the layer that `mend` speaks of.
    """

    def __init__(self, what: str = "", mend: Mend | None = None, *, layer: str = "") -> None:
        """Raise `what`, with what mends it."""
        super().__init__(what)
        self.what, self.mend, self.layer = what, mend, layer

    def told(self, words: Mapping[Mend, str]) -> str:
        """Return what was wrong and what mends it, in the words of some interface."""
        if self.mend is None:
            return self.what
        return f"{self.what}; {words[self.mend].format(layer=repr(self.layer))}"

    def __str__(self) -> str:
        """Return it as calls of Python."""
        return self.told({mend: mend.value for mend in Mend})


class ConfigurationError(MonoQuantError, ValueError):
    """Settings contradict each other or cannot be carried out."""


class InputError(MonoQuantError, ValueError):
    """A model, tensor or batch cannot be used as given."""


class DamageError(MonoQuantError, RuntimeError):
    """Quantizing destroyed what a layer computes, and that was to be an error."""


class RequirementError(MonoQuantError, RuntimeError):
    """The result falls short of what was required of it."""


class CalibrationError(MonoQuantError, RuntimeError):
    """The data could not be run through the model."""


class UnsupportedLayerError(MonoQuantError, TypeError):
    """A layer has no quantized form here."""


class CheckpointError(MonoQuantError, ValueError):
    """A file cannot be written or read."""


class FormatVersionError(CheckpointError):
    """The file was written by a newer version of this package."""


class UnknownKindError(CheckpointError, KeyError):
    """A file or configuration names a class that is not known here."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated, was edited, or is not one of ours."""
