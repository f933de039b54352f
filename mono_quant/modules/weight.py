"""Where modules keep quantized weights, and what is known of the inputs that meet them."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Self, cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import (
    Activation,
    Arranged,
    ArrangedT,
    ArrangingKernel,
    KernelSpec,
    Operation,
    PackedTensor,
)
from mono_quant.kernels import CUDA_INT4, INT4_TRACED, SUMS, Row, memory, remembered_bytes, sums_of
from mono_quant.kernels.ops import untraced
from mono_quant.modules.fixed import Fixed
from mono_quant.operations import MatrixProduct

_LOCK = threading.RLock()
"""Held while codes change their order, so that nobody finds a weight without any."""

_SCALES = ("scale", "zero_point")
_MATRIX = 2
_BYTE = 8

_OPAQUE: "weakref.WeakSet[QuantizedWeight]" = weakref.WeakSet()
"""Weights that were held in an order that `torch.compile` cannot trace."""


@attrs.frozen(eq=False)
class _Held:
    """What takes the place of canonical codes, and what it was made of.

    Attributes:
        arranged: the codes in a kernel's order.
        source: the canonical tensor, which lives on where somebody else holds it.
        written: how often that had been written to.
        scales: scale and zero point, and how often each had been written to.
    """

    arranged: Arranged
    source: "weakref.ref[Tensor]"
    written: int
    scales: Mapping[str, tuple[Tensor, int]]


@attrs.frozen(eq=False)
class Short:
    """The shorter way to the product with single rows, and for whom it is.

    Attributes:
        row: computes it.
        operation: as it was asked for.
        inputs: what is known of them.
        activation: the same, as it was then.
    """

    row: Row
    operation: Operation
    inputs: "QuantizedInput"
    activation: Activation


class QuantizedWeight(Fixed):
    """A packed weight as the buffers of a small module.

    A module of its own, so that layers with tied weights share one object: it stays shared when the
    model is moved, copied or saved. Moving it to another dtype changes the dtype that the weight is
    dequantized to, and never that of codes and scales.

    A kernel may have the codes in an order of its own: then `arranged` holds them, the buffer
    ``codes`` is None, and ``buffers()`` leaves it out. Whoever asks otherwise has canonical codes:
    `packed`, ``state_dict``, ``load_state_dict`` and ``to`` put them back, copies and pickles hold
    them.
    """

    def __init__(self, packed: PackedTensor) -> None:
        """Hold the tensors of `packed` as buffers of the same names."""
        super().__init__(packed.tensors)
        self.scheme = packed.scheme
        self.layout = packed.layout
        self._held: _Held | None = None
        self._summed: Tensor | None = None
        self.short: Short | None = None
        self._pinned = False
        device = packed.tensors["codes"].device
        like = torch.empty(0, dtype=packed.dtype, device=device)
        self.register_buffer("_like", like, persistent=False)  # follows the model's dtype
        self.register_buffer("_sums", None, persistent=False)

    @property
    def packed(self) -> PackedTensor:
        """The weight, sharing this module's memory; its codes are put back where they were."""
        codes = self._buffers["codes"]
        if codes is None:
            with _LOCK:
                codes = self._restored()
        return self._with(codes)

    @property
    def held_codes(self) -> Tensor | None:
        """The canonical codes, or None while they are in another order."""
        return self._buffers["codes"]

    @property
    def held_grid(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point of the codes, in whatever order these are; None without."""
        return self._buffers.get("scale"), self._buffers.get("zero_point")

    @property
    def columns_apart(self) -> Tensor | None:
        """Columns of a matrix whose inputs stay float where they are quantized as they come."""
        name = self.scheme.columns_apart
        if name is None or len(self.layout.native) != _MATRIX:
            return None
        return self._buffers[name]

    def read(self) -> PackedTensor:
        """Return `packed` for a kernel: the other order stays beside it where memory is double."""
        codes = self._buffers["codes"]
        if codes is None:
            with _LOCK:
                codes = self._restored(keep=memory.is_double())
        return self._with(codes)

    def peek(self) -> PackedTensor:
        """Return the weight to read once: codes in another order stay so, and are copied back.

        `torch.compile` finds canonical ones where it could not trace the way back.
        """
        if torch.compiler.is_compiling():
            self._steady()
        codes = cast("Tensor | None", self.codes)
        if codes is None:
            held = self._held
            if held is None:  # another thread has put them back since
                return self.packed
            source = None if torch.compiler.is_compiling() else held.source()
            codes = held.arranged.canonical() if source is None else source
        return self._with(codes)

    def summed(self) -> PackedTensor:
        """Return the weight for a compiled trace, with the sums that `sum_up` found.

        A trace of other codes than those, as `torch.func.functional_call` makes one, goes without.
        """
        weight = self.peek()
        sums, codes = cast("Tensor | None", self._sums), weight.tensors["codes"]
        if sums is None or self._summed is not codes:
            return weight
        tensors = {**weight.tensors, SUMS: sums}
        return PackedTensor(tensors, weight.scheme, weight.layout, weight.dtype)

    def laid_out(self) -> Arranged | None:
        """Return a 4-bit weight for a compiled trace in the order that its device's product reads.

        It is put in that order while the trace is made. A state that is asked for puts codes back,
        and the next call then traces anew.

        Returns:
            None where codes may not lie in another order.
        """
        held = self._held if self._lay_out() else None
        return held.arranged if held is not None else None

    @untraced
    def _lay_out(self) -> bool:
        """Put codes in order if they may be; called while a trace is made, and no part of it."""
        with _LOCK:
            if not self.is_arrangeable():
                return False
            spec = KernelSpec(MatrixProduct(), self.scheme, self.layout, None)
            if cast("Tensor", self._buffers["_like"]).device.type == "cuda":
                self.arranged(CUDA_INT4, spec)
            else:
                self.arranged(INT4_TRACED, spec)
            _OPAQUE.discard(self)  # the trace has no need of canonical codes
            return True

    @untraced
    def sum_up(self) -> bool:
        """Find the sums of rows of 8-bit codes; called while a trace is made, and no part of it.

        Before the trace has read any buffer. They are found anew when a state is loaded.
        """
        if self.scheme.code_bits != _BYTE:
            return False
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            codes = self._restored()
            if codes.dtype == torch.int8 and self._summed is not codes:
                self._summed, self._buffers["_sums"] = codes, sums_of(codes)
        return True

    def pin(self) -> PackedTensor:
        """Return `packed`, and keep codes canonical from now on: rows are looked up in them."""
        if not self._pinned:
            self._pinned = True
        return self.packed

    def is_arrangeable(self) -> bool:
        """Return whether the codes may lie in another order.

        Not where someone else would miss them or change them unseen: in memory that processes
        share, and made in inference mode, where writing is not counted; nor for a weight that is
        also looked up by rows, or whose codes were replaced from outside.
        """
        codes, held = self._buffers["codes"], self._held
        if self._pinned:
            return False
        if codes is None:
            return True
        if held is not None and held.source() is not codes:
            return False
        if type(codes) is not Tensor or not codes.is_contiguous():
            return False
        # memory of a GPU counts as shared, all of it
        shared = codes.device.type == "cpu" and codes.is_shared()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        known = codes.device.type in ("cpu", "cuda")
        written = not any(self.get_buffer(name).is_inference() for name in self._names)
        return known and not shared and written

    def arranged(self, kernel: ArrangingKernel[ArrangedT], spec: KernelSpec) -> ArrangedT:
        """Return the weight as `kernel` reads it for `spec`, which it then is the only copy of."""
        found = self._found(kernel)
        if found is None:
            with _LOCK:
                found = self._found(kernel)
                if found is None:
                    found = self._arrange(kernel, spec)
        return found

    def shorten(self, short: Short, weight: PackedTensor | Arranged) -> None:
        """Keep a shorter way through `weight`, unless this module holds another by now."""
        with _LOCK:
            if self._is_only_copy(weight):
                self.short = short

    def _is_only_copy(self, weight: PackedTensor | Arranged) -> bool:
        """Return whether `weight` is what this module holds, and in no other order elsewhere."""
        held, codes = self._held, self._buffers["codes"]
        if isinstance(weight, PackedTensor):
            return weight.tensors["codes"] is codes
        if held is None or held.arranged is not weight:  # another thread has changed it since
            return False
        return codes is None and held.source() is None

    @property
    def kernel_bytes(self) -> int:
        """Bytes that kernels keep of this weight beside codes, scales and zero points."""
        codes, held = self._buffers["codes"], self._held
        kept = remembered_bytes(codes) if codes is not None else 0
        sums = self._buffers["_sums"]
        kept += sums.nbytes if sums is not None else 0
        if held is not None:
            kept += held.arranged.beside + (held.arranged.nbytes if codes is not None else 0)
        return kept

    def extra_repr(self) -> str:
        """Return the shape and the scheme."""
        return f"{list(self.layout.native)}, {self.scheme}"

    def _with(self, codes: Tensor) -> PackedTensor:
        tensors = {name: cast("Tensor", self._buffers[name]) for name in self._names}
        tensors["codes"] = codes
        like = cast("Tensor", self._buffers["_like"])  # less of a detour than `get_buffer`
        return PackedTensor(tensors, self.scheme, self.layout, like.dtype)

    def _found(self, kernel: ArrangingKernel[ArrangedT]) -> ArrangedT | None:
        """Return what is held, if `kernel` reads it and nothing it was made of has changed."""
        held, codes = self._held, self._buffers["codes"]
        if held is None:
            return None
        source = held.source()
        if codes is not None and (source is not codes or not memory.is_double()):
            return None
        if source is not None and source._version != held.written:
            return None
        for name, (tensor, written) in held.scales.items():
            if self._buffers[name] is not tensor or tensor._version != written:
                return None
        return held.arranged if isinstance(held.arranged, kernel.arrangement) else None

    def _arrange(self, kernel: ArrangingKernel[ArrangedT], spec: KernelSpec) -> ArrangedT:
        with torch.inference_mode(False), torch.no_grad():
            weight = self._with(self._restored())
            parts = {name: weight.tensors[name] for name in _SCALES if name in weight.tensors}
            scales = {name: (tensor, tensor._version) for name, tensor in parts.items()}
            codes = weight.tensors["codes"]
            written = codes._version
            arranged = kernel.arrange(spec, weight)
        self._held, self.short = _Held(arranged, weakref.ref(codes), written, scales), None
        self._buffers["codes"] = None
        if not arranged.traceable:
            _OPAQUE.add(self)
        return arranged

    def _restored(self, keep: bool = False) -> Tensor:
        """Put canonical codes back, under the lock, and return them.

        Args:
            keep: what took their place, beside them.
        """
        codes, held = self._buffers["codes"], self._held
        if codes is None:
            assert held is not None  # codes are one or the other
            codes = held.source()
            if codes is None:
                with torch.inference_mode(False):
                    codes = held.arranged.canonical()
            self._buffers["codes"] = codes
            kept = attrs.evolve(held, source=weakref.ref(codes), written=codes._version)
            self._held, self.short = (kept if keep else None), None
        return codes

    @untraced
    def _steady(self) -> bool:
        """Keep codes canonical from now on, where their order cannot be traced.

        Called while a trace is made, and no part of it. All such weights are put back at once:
        layers that share what is compiled then need not be traced each on its own.
        """
        with _LOCK:
            if self in _OPAQUE or (self._held is not None and not self._held.arranged.traceable):
                self._pinned = True
                self._settle()
            for weight in list(_OPAQUE):
                weight._settle()
        return True

    def _settle(self) -> None:
        """Hold canonical codes and nothing else."""
        self._restored()
        self._held = self.short = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with _LOCK:
            self._settle()
            self._summed = self._buffers["_sums"] = None
            return super()._apply(fn, recurse)

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module, as `torch.nn.Module` does.

        `torch.export` walks a model with its duplicates to find the buffers that it will write,
        and has canonical codes; they may be put in another order again.
        """
        if not remove_duplicate:
            with _LOCK:
                self._restored()
                _OPAQUE.discard(self)
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *rest: object
    ) -> None:
        with _LOCK:
            self._settle()
            super()._load_from_state_dict(state_dict, prefix, *rest)
            sums, codes = self._buffers["_sums"], self._buffers["codes"]
            if sums is not None and codes is not None and self._summed is codes:
                sums.copy_(sums_of(codes))  # in the place that compiled traces read

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        with _LOCK:
            self._restored()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, object]:
        """Return what copies and pickles hold: canonical codes alone."""
        with _LOCK:
            codes = self.peek().tensors["codes"]
            buffers = {**self._buffers, "codes": codes, "_sums": None}
            left = {"_held": None, "_summed": None, "short": None}
            return {**self.__dict__, **left, "_buffers": buffers}


def kernel_bytes(model: nn.Module) -> int:
    """Return the bytes that kernels keep of a model's weights beside what its file holds.

    Codes are held once, in whatever order. What some kernels add to them (scales in a form of their
    own, sums of rows) appears when a layer first runs, and counts here.
    """
    weights = (module for module in model.modules() if isinstance(module, QuantizedWeight))
    return sum(weight.kernel_bytes for weight in weights)


class QuantizedInput(Fixed):
    """What is known of a weight's inputs, its calibrated scale and zero point as buffers."""

    def __init__(self, activation: Activation) -> None:
        """Hold the tensors of `activation` as buffers of the same names."""
        super().__init__(activation.tensors)
        self.scheme = activation.scheme

    @property
    def activation(self) -> Activation:
        """How inputs are quantized, sharing this module's memory."""
        tensors = self._buffers
        return Activation(self.scheme, tensors.get("scale"), tensors.get("zero_point"))

    def is_held(self, activation: Activation) -> bool:
        """Return whether an activation, once this one's, still shares this module's memory."""
        tensors = self._buffers
        scale, zero_point = tensors.get("scale"), tensors.get("zero_point")
        return activation.scale is scale and activation.zero_point is zero_point

    def extra_repr(self) -> str:
        """Return the mode and the scheme."""
        return self.activation.describe()
