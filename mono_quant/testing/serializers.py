"""Laws of file formats."""

import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Checkpoint, Serializer
from mono_quant.errors import CheckpointError, UnknownKindError
from mono_quant.quantizer import Quantizer
from mono_quant.schemes import Affine
from mono_quant.testing.law import (
    Broken,
    DoesNotApply,
    Laws,
    Untouched,
    expect,
    refused,
    same_bits,
)
from mono_quant.testing.models import Convolutions, Perceptron, Tied


@attrs.frozen
class _Unheard(Affine):
    """A grid whose kind nobody has registered."""

    kind: ClassVar[str] = "mono_quant_testing.unheard"


def checkpoints() -> Iterator[tuple[str, Checkpoint]]:
    """Yield checkpoints of all sorts by what they are of."""
    convolutions, perceptron = Convolutions(), Perceptron()
    four = Quantizer().bits(4).only("*")
    for what, quantizer, model in (
        ("8-bit convolutions with static inputs", Quantizer().fit(convolutions.example()), None),
        ("4-bit weights", four, perceptron),
        ("half precision", Quantizer().bits(16), perceptron),
        ("tied weights", four, Tied()),
        ("float weights", Quantizer().skip("*"), perceptron),
    ):
        chosen: nn.Module = convolutions if model is None else model
        yield what, quantizer.apply(chosen, progress=False).checkpoint()


def a_file_gives_back_every_bit(serializer: Serializer) -> None:
    """What is loaded equals what was saved: weights, grids, ties, the float rest, all words."""
    tried = 0
    with _folder(serializer) as path:
        for what, checkpoint in _expressible(serializer):
            tried += 1
            serializer.save(checkpoint, path)
            _expect_same(serializer.load(path), checkpoint, what)
    expect(tried > 0, "it can express none of the checkpoints that were tried")


def the_same_checkpoint_makes_the_same_bytes(serializer: Serializer) -> None:
    """A file is written twice alike, so that it can be compared and cached."""
    with _folder(serializer) as path:
        for what, checkpoint in _expressible(serializer):
            serializer.save(checkpoint, path)
            first = path.read_bytes()
            serializer.save(checkpoint, path)
            expect(path.read_bytes() == first, f"{what}: other bytes the second time")


def saving_changes_nothing(serializer: Serializer) -> None:
    """The checkpoint, which shares the model's memory, is read only."""
    with _folder(serializer) as path:
        for _, checkpoint in _expressible(serializer):
            given = Untouched(a_tensor=checkpoint.tensors, a_weight=_weights(checkpoint))
            serializer.save(checkpoint, path)
            given.expect()


def what_is_loaded_owns_its_memory(serializer: Serializer) -> None:
    """A file that is overwritten later changes nothing of what was loaded from it."""
    with _folder(serializer) as path:
        for what, checkpoint in _expressible(serializer):
            serializer.save(checkpoint, path)
            loaded = serializer.load(path)
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
            _expect_same(loaded, checkpoint, f"{what}, once its file was overwritten")


def a_damaged_file_is_refused(serializer: Serializer) -> None:
    """A file that was cut short, or is none of its format, is a `CheckpointError`."""
    with _folder(serializer) as path:
        for what, checkpoint in _expressible(serializer):
            serializer.save(checkpoint, path)
            whole = path.read_bytes()
            for share in (0.0, 0.1, 0.5, 0.99):
                path.write_bytes(whole[: int(share * len(whole))])
                of_what = f"{what}: a file cut to {share:.0%}"
                with refused(CheckpointError, of_what):
                    serializer.load(path)
        path.write_bytes(b"something else entirely\n" * 40)
        with refused(CheckpointError, "a file of something else"):
            serializer.load(path)


def code_in_a_file_is_never_run(serializer: Serializer) -> None:
    """A file that holds a pickle with a call in it is refused, and the call not made."""
    with _folder(serializer) as path:
        marker = path.with_name("ran")
        trap = {"format": serializer.format, "tensors": {"weight": _Trap(marker)}}
        for how in ("pickle", "torch.save"):
            if how == "pickle":
                path.write_bytes(pickle.dumps(trap))
            else:
                torch.save(trap, path)
            try:
                serializer.load(path)
            except CheckpointError:
                refused = True
            except Exception as error:
                raise Broken(f"a file of {how} raises {type(error).__name__}: {error}") from error
            else:
                refused = False
            expect(not marker.exists(), f"code in a file written by {how} was run")
            expect(refused, f"a file of {how} with a call in it is not refused: CheckpointError")


def a_failed_save_leaves_what_stood(serializer: Serializer) -> None:
    """Where writing fails, the file that stood there still stands, whole."""
    with _folder(serializer) as path:
        what, checkpoint = next(_expressible(serializer))
        serializer.save(checkpoint, path)
        before = path.read_bytes()
        broken = attrs.evolve(checkpoint, tensors=_Breaking(checkpoint.tensors))
        try:
            serializer.save(broken, path)
        except _Interrupted:
            pass
        except Exception as error:
            raise Broken(f"an OSError became a {type(error).__name__}: {error}") from error
        else:
            raise DoesNotApply("it wrote a file without going through the tensors as a mapping")
        expect(path.exists() and path.read_bytes() == before, f"{what}: the old file is gone")
        left = sorted(one.name for one in path.parent.iterdir() if one != path)
        expect(not left, f"it leaves {', '.join(left)} behind")


def unknown_kinds_are_refused_by_name(serializer: Serializer) -> None:
    """A kind that nobody registered is an `UnknownKindError` that names it, or is in `kinds`."""
    made = Quantizer().scheme(_Unheard(8)).only("*").apply(Perceptron(), progress=False)
    checkpoint = made.checkpoint()
    if (reason := serializer.can_express(checkpoint)) is not None:
        raise DoesNotApply(reason)
    with _folder(serializer) as path:
        serializer.save(checkpoint, path)
        with refused(UnknownKindError, "an unknown kind") as seen:
            serializer.load(path)
        named = _Unheard.kind in str(seen[0])
        expect(named, f"the error does not name the kind: {seen[0]}")
        loaded = serializer.load(path, kinds={_Unheard.kind: _Unheard})
        _expect_same(loaded, checkpoint, "with kinds=")


def what_it_cannot_express_it_does_not_write(serializer: Serializer) -> None:
    """`can_express` returns a reason or None; where there is a reason, `save` raises it."""
    with _folder(serializer) as path:
        for what, checkpoint in checkpoints():
            reason: object = serializer.can_express(checkpoint)
            expect(reason is None or isinstance(reason, str), f"can_express returns {reason!r}")
            if reason is not None:
                with refused(CheckpointError, what):
                    serializer.save(checkpoint, path)
                expect(not path.exists(), f"{what}: a file was written all the same")


def it_says_what_its_files_are_called(serializer: Serializer) -> None:
    """It has a `format` and `suffixes`, each with its dot."""
    name: object = getattr(serializer, "format", None)
    expect(isinstance(name, str) and bool(name), f"its format is {name!r}")
    suffixes = getattr(serializer, "suffixes", ())
    dotted = [isinstance(one, str) and one.startswith(".") and len(one) > 1 for one in suffixes]
    expect(bool(dotted) and all(dotted), f"its suffixes are {suffixes!r}")


class _Interrupted(OSError):
    """The disk is full."""


class _Breaking(Mapping[str, Tensor]):
    """Tensors of which the last cannot be read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        if key == list(self._tensors)[-1]:
            raise _Interrupted("the disk is full")
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._marker),))


@contextmanager
def _folder(serializer: Serializer) -> Iterator[Path]:
    """Give a path in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / f"model{serializer.suffixes[0]}"


def _expressible(serializer: Serializer) -> Iterator[tuple[str, Checkpoint]]:
    return (pair for pair in checkpoints() if serializer.can_express(pair[1]) is None)


def _weights(checkpoint: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
    return {key: record.weight.tensors for key, record in checkpoint.records.items()}


def _expect_same(found: Checkpoint, given: Checkpoint, what: str) -> None:
    for name in ("transient", "ties", "config", "summary", "applied"):
        one, other = getattr(found, name), getattr(given, name)
        expect(one == other, f"{what}: {name} is {one!r}, and was {other!r}")
    for name in ("containers", "edits"):
        one, other = (tuple(map(dict, getattr(x, name))) for x in (found, given))
        expect(one == other, f"{what}: {name} are {one!r}, and were {other!r}")
    _expect_same_tensors(found.tensors, given.tensors, what)
    expect(
        set(found.records) == set(given.records),
        f"{what}: it has the weights {sorted(found.records)}, not {sorted(given.records)}",
    )
    for key, record in given.records.items():
        other = found.records[key]
        for name in ("module", "name", "layer"):
            one, two = getattr(other, name), getattr(record, name)
            expect(one == two, f"{what}: {name} of {key} is {one!r}, and was {two!r}")
        for part in ("scheme", "layout", "dtype"):
            one, two = getattr(other.weight, part), getattr(record.weight, part)
            expect(one == two, f"{what}: {part} of {key} is {one!r}, and was {two!r}")
        _expect_same_tensors(other.weight.tensors, record.weight.tensors, f"{what}: {key}")
        expect(
            (other.activation is None) == (record.activation is None),
            f"{what}: how the inputs of {key} are quantized is lost or made up",
        )
        if other.activation is not None and record.activation is not None:
            expect(
                other.activation.scheme == record.activation.scheme,
                f"{what}: the inputs of {key} have another grid",
            )
            here = f"{what}: the inputs of {key}"
            _expect_same_tensors(other.activation.tensors, record.activation.tensors, here)


def _expect_same_tensors(
    found: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str
) -> None:
    expect(set(found) == set(given), f"{what} has {sorted(found)}, not {sorted(given)}")
    for name, tensor in given.items():
        expect(same_bits(found[name], tensor), f"{what}: {name} comes back otherwise")


LAWS = Laws(
    Serializer,
    (
        a_file_gives_back_every_bit,
        the_same_checkpoint_makes_the_same_bytes,
        saving_changes_nothing,
        what_is_loaded_owns_its_memory,
        a_damaged_file_is_refused,
        code_in_a_file_is_never_run,
        a_failed_save_leaves_what_stood,
        unknown_kinds_are_refused_by_name,
        what_it_cannot_express_it_does_not_write,
        it_says_what_its_files_are_called,
    ),
)
