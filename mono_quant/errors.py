"""What can go wrong, as one tree of exceptions.

::

    MonoQuantError
    ├── ConfigurationError (ValueError)      settings that contradict each other or cannot work
    ├── InputError (ValueError)              a model, tensor or batch that cannot be used
    ├── CalibrationError (RuntimeError)      the data could not be run through the model
    ├── DamageError (RuntimeError)           quantizing destroyed a layer, and that was refused
    ├── UnsupportedLayerError (TypeError)    a layer that has no quantized form here
    └── CheckpointError (ValueError)         a file that cannot be written or read
        ├── FormatVersionError               written by a newer version
        ├── UnknownKindError (also KeyError) names a class that is not known here
        └── CorruptCheckpointError           truncated, edited, or not one of ours

Each message says what was wrong with which layer or file, what was expected, and the call that
mends it.
"""


class MonoQuantError(Exception):
    """Parent of every error that this package raises on purpose."""


class ConfigurationError(MonoQuantError, ValueError):
    """Settings contradict each other or cannot be carried out."""


class InputError(MonoQuantError, ValueError):
    """A model, tensor or batch cannot be used as given."""


class DamageError(MonoQuantError, RuntimeError):
    """Quantizing destroyed what a layer computes, and that was to be an error."""


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

    __str__ = Exception.__str__  # KeyError would print the repr of its message


class CorruptCheckpointError(CheckpointError):
    """The file is truncated, was edited, or is not one of ours."""
