"""Running data through a model: batches, outputs, and the statistics of layers' inputs."""

import inspect
import io
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import IO, cast

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mono_quant.batches import NamedItems, as_tensors, is_array, read
from mono_quant.configurable import dtype_name
from mono_quant.errors import CalibrationError, InputError, Mend, MonoQuantError
from mono_quant.modules import QuantizedInput, QuantizedWeight
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.metrics import SquaredError, tensor_bytes
from mono_quant.numerics.nested import each, tensors_in
from mono_quant.progress import progress_bar

Forward = Callable[[nn.Module, object], object]

DEFAULT_SAMPLES = 150
DATASET_BATCH = 32
KEPT_IN_MEMORY = 1 << 28
"""Bytes of what is kept of all batches in memory; more goes to a temporary file."""


@attrs.frozen(eq=False)
class CalibrationData:
    """Batches that can be gone through again and again, and how a model is called with one.

    Attributes:
        source: what was given.
        samples: go on until this many samples were seen; the batch that reaches it is still used.
        forward: calls the model with a batch; None for the rules of `call`.
        bare_tuple: whether one tuple was given, which is a batch and could be meant for several.
    """

    source: Iterable[object]
    samples: int = DEFAULT_SAMPLES
    forward: Forward | None = None
    bare_tuple: bool = False

    @classmethod
    def bind(
        cls, data: object, samples: int = DEFAULT_SAMPLES, forward: Forward | None = None
    ) -> "CalibrationData":
        """Return `data` as batches; nothing runs.

        A tensor, an array of numpy, a mapping or a tuple is one batch, a `Dataset` is batched by
        32, and anything else is gone through: a `DataLoader`, a list of batches.

        Raises:
            InputError: it cannot be gone through twice, is empty, or is nothing of the kind.
        """
        if type(samples) is not int or samples < 1:
            raise InputError(f"samples is 1 or more, not {samples}", Mend.SAMPLES)
        if isinstance(data, Tensor | Mapping) or is_array(data):
            return cls([data], samples, forward)
        if isinstance(data, tuple) and data:
            return cls([data], samples, forward, bare_tuple=True)
        if isinstance(data, Dataset):
            items = data if isinstance(data, IterableDataset) else NamedItems(data)
            loader: DataLoader[object] = DataLoader(items, batch_size=DATASET_BATCH)
            return cls(loader, samples, forward)
        if isinstance(data, Iterator):
            raise InputError(
                f"a {type(data).__name__} can be gone through only once; give a list of batches, "
                "a Dataset or a DataLoader"
            )
        if isinstance(data, str | bytes) or not isinstance(data, Iterable):
            raise InputError(
                f"a {type(data).__name__} holds no batches; give a tensor, a list of tensors, "
                "tuples or dicts, a Dataset or a DataLoader"
            )
        if isinstance(data, Sequence) and not len(data):
            raise InputError("the data is empty; give one batch or more")
        return cls(data, samples, forward)

    @classmethod
    def example(cls, example: object, forward: Forward | None = None) -> "CalibrationData":
        """Return one batch: a list is one of positional arguments, as a tuple is.

        Raises:
            InputError: as for `bind`.
        """
        one = [example] if isinstance(example, tuple | list) else example
        return cls.bind(one, samples=1, forward=forward)

    def batches(self) -> Iterator[object]:
        """Yield batches until enough samples were seen; `forward` gets them as they came.

        Raises:
            CalibrationError: one cannot be read; names it.
            InputError: there is no sample.
        """
        seen = 0
        for given in read(self.source):
            batch = as_tensors(given) if self.forward is None else given
            yield batch
            seen += count_samples(batch)
            if seen >= self.samples:
                return
        if not seen:
            raise InputError("the data holds no sample; give one batch or more")

    def held(self) -> "CalibrationData":
        """Return the batches that will be used, held in memory.

        Every pass then sees the same ones, whatever a loader shuffles or augments.
        """
        return attrs.evolve(self, source=list(self.batches()))

    def called_as(self, other: "CalibrationData | None") -> "CalibrationData":
        """Return this, with the model called as on other data where nothing is said of that."""
        if self.forward is not None or other is None:
            return self
        return attrs.evolve(self, forward=other.forward)

    def count(self, of_batch: int) -> int:
        """Return about how many samples will be used, without reading more than there must be.

        Args:
            of_batch: samples of a batch.
        """
        if not isinstance(self.source, Sized):
            return self.samples
        return min(self.samples, of_batch * _length(self.source))

    def first(self) -> object:
        """Return the first batch."""
        return next(self.batches())

    def first_and_last(self) -> "Iterator[CalibrationData]":
        """Yield the first batch and, if there are several, the last, each by itself.

        Of those that hold a sample.
        """
        batches = [batch for batch in self.batches() if count_samples(batch)]
        for batch in (batches[0], *batches[1:][-1:]):
            yield attrs.evolve(self, source=[batch], samples=1)

    def call(self, model: nn.Module, batch: object) -> object:
        """Return the model's output for one batch, moved to the model's device.

        A tensor is the one argument, a mapping the keyword arguments, a tuple or list the
        positional ones; of those, what the model's forward has no parameter for is left out, as the
        labels of (inputs, labels) pairs are.
        """
        batch = _to_device(batch, device_of(model))
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch[: positional_arguments(model)])
        return model(batch)

    def inner_outputs(
        self, model: nn.Module, of: nn.Module, calls: int = 1
    ) -> Iterator[list[Tensor]]:
        """Yield `outputs` of a module inside the model; see `InnerOutputs`.

        Args:
            model: what is run.
            of: the module.
            calls: with which call in a batch to stop; 0 for none, and the model's own outputs.
        """
        seen = 0

        def stop(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            nonlocal seen
            seen += 1
            if seen == calls:
                seen = 0
                raise _Reached(output)

        # The last of its hooks, since others may change what comes out.
        handle = of.register_forward_hook(stop)
        try:
            yield from self.outputs(model)
        finally:
            handle.remove()

    def outputs(self, model: nn.Module, progress: str | None = None) -> Iterator[list[Tensor]]:
        """Yield the tensors of the model's output for each batch, in eval mode, without gradients.

        Raises:
            CalibrationError: a batch holds NaN, or the model failed on it; names the batch.
        """
        with evaluating(model), progress_bar(progress, "sample") as bar:
            for place, batch in enumerate(self.batches()):
                with torch.no_grad():  # not across the yield: there it would hold for the caller
                    found = self._run(model, batch, place)
                yield found
                del found  # before the next ones are made
                count = count_samples(batch)
                if not place and isinstance(self.source, Sized):
                    bar.total = self.count(count)
                bar.update(count)

    def _run(self, model: nn.Module, batch: object, place: int) -> list[Tensor]:
        if any(bool(x.isnan().any()) for x in tensors_in(batch) if x.is_floating_point()):
            raise CalibrationError(f"batch {place} of the data holds NaN", Mend.BATCH)
        try:
            with of_batch(place):
                output = self.call(model, batch)
        except _Reached as reached:
            output = reached.output
        except MonoQuantError:
            raise
        except Exception as error:
            unfit = _unfit(model, batch) if self.forward is None else None
            if unfit is not None:
                first = str(error).partition("\n")[0]
                raise CalibrationError(f"batch {place} of the data {unfit} ({first})") from error
            raise CalibrationError(
                f"{type(model).__name__} failed on batch {place} of the data: {error}", Mend.FORWARD
            ) from error
        found = [x.detach() for x in tensors_in(output) if x.is_floating_point()]
        if not found:
            raise CalibrationError(
                f"{type(model).__name__} returned no floating tensor to measure", Mend.OUTPUT
            )
        return found


def _length(source: Sized) -> int:
    """Return how many batches there are, or one more than is asked for where none can tell."""
    try:
        return len(source)
    except TypeError:  # a DataLoader of an IterableDataset has a length and does not know it
        return sys.maxsize


def _unfit(model: nn.Module, batch: object) -> str | None:
    """Return what makes a batch unfit for a model that failed on it, and what mends that, or None.

    The dtype of floats, which arrays of numpy have twice as wide by default, and numbers that lie
    in no tensor.
    """
    tensors, leaves = list(tensors_in(batch)), list[object]()
    each(batch, leaves.append)
    if not tensors and any(isinstance(one, int | float) for one in leaves):
        return (
            f"is a {type(batch).__name__} of numbers without a tensor; give tensors, as "
            "torch.tensor(numbers) makes one"
        )
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    given = {x.dtype for x in tensors if x.is_floating_point()}
    if len(own) != 1 or given <= own:
        return None
    (dtype,) = map(dtype_name, own)
    return (
        f"is {' and '.join(sorted(map(dtype_name, given - own)))}, and {type(model).__name__} "
        f"{dtype}; convert it, a tensor with x.to(torch.{dtype}) and an array of numpy with "
        f"torch.from_numpy(x).to(torch.{dtype})"
    )


def positional_arguments(model: nn.Module) -> int | None:
    """Return how many positional arguments the model's forward takes; None for any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional for parameter in parameters)


def left_over(model: nn.Module, data: CalibrationData) -> int:
    """Return how many items of the first batch the model's forward has no parameter for."""
    taken = positional_arguments(model)
    if taken is None or data.forward is not None:
        return 0
    batch = data.first()
    return max(0, len(batch) - taken) if isinstance(batch, tuple | list) else 0


def check_tuple(model: nn.Module, data: CalibrationData) -> None:
    """Refuse a tuple that may be one batch with labels or several batches.

    Raises:
        InputError: it has more items than the model's forward takes.
    """
    if data.bare_tuple and left_over(model, data):
        raise InputError(
            f"the data is a tuple of {len(cast('tuple[object, ...]', data.first()))} items, and "
            f"the model's forward takes {positional_arguments(model)}",
            Mend.TUPLE,
        )


def count_samples(batch: object) -> int:
    """Return the length of the first dimension of the first tensor of a batch."""
    first = next(tensors_in(batch), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and it and its buffers back to what they were.

    A forward may count its calls or cache what it saw, and running it is no change of the model.
    """
    modes = {module: module.training for module in model.modules()}
    known = {
        module: tuple(module._buffers)
        for module in modes
        if not isinstance(module, QuantizedWeight | QuantizedInput | torch.jit.ScriptModule)
    }
    held = [
        (module, name, buffer, buffer.clone() if buffer is not None else None)
        for module in known
        for name, buffer in module._buffers.items()
    ]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, names in known.items():
            for name in [name for name in module._buffers if name not in names]:
                del module._buffers[name]  # made by the forward
        for module, name, buffer, before in held:
            module._buffers[name] = buffer
            if buffer is not None and before is not None and not _equal(buffer, before):
                buffer.copy_(before)


@contextmanager
def of_batch(place: int) -> Iterator[None]:
    """Have errors about the data name a batch."""
    try:
        yield
    except CalibrationError as error:
        where = f"{error.what}, on batch {place} of the data"
        raise CalibrationError(where, error.mend, layer=error.layer) from error


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are known to be equal: of sparse ones torch does not tell."""
    return one.layout == torch.strided and torch.equal(one, other)


class _Reached(BaseException):
    """The module that was asked for has returned: nothing that a model handles by itself."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


NOTED = 16_000_000
"""Bytes of the first outputs that a report holds while it is made, to come back to."""

_NOTED_BATCHES = 3


class Kept:
    """Tensors of each batch, to come back to after the model was changed.

    Kept in memory up to a bound, in a temporary file past it. On POSIX that file has no name, so
    that nothing is left of it however the process ends.
    """

    def __init__(self, limit: int = KEPT_IN_MEMORY) -> None:
        """Keep up to `limit` bytes in memory."""
        self._limit = limit
        # tensors, or where they begin and end in the file
        self._kept: list[list[Tensor] | tuple[int, int]] = []
        self._file: IO[bytes] | None = None

    def add(self, tensors: list[Tensor]) -> None:
        """Keep copies of the tensors of one more batch."""
        self._limit -= sum(tensor_bytes(tensor) for tensor in tensors)
        if self._limit >= 0:
            self._kept.append([tensor.detach().clone() for tensor in tensors])
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="mono_quant_")  # noqa: SIM115  # kept open
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, os.SEEK_END)
        torch.save([_alone(tensor.detach()) for tensor in tensors], self._file)
        self._kept.append((start, self._file.tell()))

    def add_all(self, batches: Iterable[list[Tensor]]) -> None:
        """Keep those of every batch."""
        for tensors in batches:
            self.add(tensors)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._kept)

    def __getitem__(self, place: int) -> list[Tensor]:
        """Return the tensors of one batch."""
        kept = self._kept[place]
        if isinstance(kept, list):
            return kept
        assert self._file is not None  # whoever kept it there made the file
        part = io.BufferedReader(_Part(self._file, *kept))
        found: list[Tensor] = torch.load(part, weights_only=True)
        return found

    def forget(self, place: int) -> None:
        """Keep nothing of one batch any more."""
        self._kept[place] = []

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Yield them batch by batch."""
        return (self[place] for place in range(len(self)))


_READ = 1 << 20  # bytes that are copied at once


class _Part(io.RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        """Begin at the beginning of the part."""
        self._file, self._start, self._size, self._place = file, start, end - start, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the part, and return it."""
        known = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}
        self._place = known[whence] + offset
        return self._place

    def tell(self) -> int:
        """Return the place in the part."""
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # of bytes, as it says
        """Fill some of a buffer from this place on, and return how much; nothing at the end."""
        self._file.seek(self._start + self._place)
        read = self._file.read(max(0, min(len(buffer), self._size - self._place, _READ)))
        buffer[: len(read)] = read
        self._place += len(read)
        return len(read)


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that shares no memory with others, of which a file would hold all."""
    strided = tensor.layout == torch.strided
    alone = strided and tensor_bytes(tensor) == tensor.untyped_storage().nbytes()
    return tensor if alone else tensor.clone()


class Noted:
    """Tensors of the first batches as they pass by, for whoever needs them again.

    Attributes:
        kept: what was held of up to three; the first batch in any case, on disk if it is large.
        complete: whether that is all that passed.
    """

    def __init__(self, limit: int = NOTED) -> None:
        """Hold nothing yet, and up to `limit` bytes of more than one batch."""
        self.kept = Kept(limit)
        self.complete = True
        self._left = limit

    def passing(self, batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Yield what is given."""
        for tensors in batches:
            self._left -= sum(map(tensor_bytes, tensors))
            fits = self._left >= 0 and len(self.kept) < _NOTED_BATCHES
            self.complete = self.complete and (fits or not len(self.kept))
            if self.complete:
                self.kept.add(tensors)
            yield tensors
            del tensors  # before the next ones are made


def compare(references: Iterable[list[Tensor]], others: Iterable[list[Tensor]]) -> SquaredError:
    """Return the error of outputs against references, over all tensors of all batches.

    Those of a batch are let go before the next ones are made, which may be large.

    Raises:
        CalibrationError: they differ in number or shape.
    """
    return SquaredError.total(compared(references, others))


def compared(
    references: Iterable[list[Tensor]], others: Iterable[list[Tensor]]
) -> Iterator[SquaredError]:
    """Yield the error of each batch of outputs against its reference, as `compare` adds them up."""
    rest = iter(others)
    for reference in references:
        yield _error_of_batch(reference, next(rest, None))
        del reference
    if next(rest, None) is not None:
        raise CalibrationError(_UNEQUAL)


_UNEQUAL = "the data gave another number of batches the second time; give the same ones each time"


def _error_of_batch(reference: list[Tensor], other: list[Tensor] | None) -> SquaredError:
    if other is None:
        raise CalibrationError(_UNEQUAL)
    if [x.shape for x in reference] != [x.shape for x in other]:
        raise CalibrationError("the quantized model's outputs differ in number or shape")
    pairs = [_without_equal_infinities(x, y) for x, y in zip(reference, other, strict=True)]
    return SquaredError.total(SquaredError.between(x, y) for x, y in pairs)


def output_error(reference: object, other: object) -> SquaredError:
    """Return the error of what a layer returned against what it should, over its float tensors."""
    floats = (
        [x for x in tensors_in(output) if x.is_floating_point()] for output in (reference, other)
    )
    return compare(*([one] for one in floats))


def _without_equal_infinities(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with zeros where both hold the same infinity, as masked logits do."""
    if all_finite(one):
        return one, other
    same = (one == other) & one.isinf()
    return one.masked_fill(same, 0), other.masked_fill(same, 0)


def _to_device(batch: object, device: torch.device) -> object:
    """Return a copy of a batch there: a model may write into its inputs."""
    return each(batch, lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x)
